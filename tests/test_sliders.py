"Interactive plots without a browser: their state, what they refuse and show, what a kernel does."

import json
import time

import matplotlib.pyplot as plt
import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from mmkit.core.slider_widgets import slider_step
from mmkit.core.sliders import InteractivePlot, _InteractiveView, interact


def recording_draw():
    "A drawing function, and the list of what it was asked to draw."
    seen = []

    def draw(
        tau=0.07,  # temperature
        rows=2,
        kind="a",
        on=False,
    ):
        seen.append(dict(tau=tau, rows=rows, kind=kind, on=on))

    return seen, draw


CONTROLS = dict(tau=(0.01, 2.0, 0.01, 0.3), rows=(0, 10, 5, 5), kind=["b", "a"], on=[False, True])
START = dict(tau=0.3, rows=5, kind="b", on=False)

# ---- the state, where nobody is


def test_interact_draws_once_and_again_when_set():
    seen, draw = recording_draw()
    t = interact(draw, **CONTROLS)
    assert seen == [START] and t.state == START and t.view is None
    t.set(tau=0.07, kind="a")
    t.set(rows=10)
    assert (
        seen[1:] == [START | dict(tau=0.07, kind="a"), START | dict(tau=0.07, kind="a", rows=10)]
        and t.state == seen[-1]
    )
    t.reset()
    assert t.state == START == seen[-1] and len(seen) == 4


def test_interactive_plots_do_not_share_state():
    seen, draw = recording_draw()
    a, b = interact(draw, **CONTROLS), interact(draw, **CONTROLS)
    before = a.state
    a.set(tau=1.0)
    assert b.state == START == before and a.start == START


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(tau=2.1), "tau=2.1: a number from 0.01 to 2.0"),
        (dict(tau=float("nan")), "nan"),
        (dict(tau=None), "None"),
        (dict(rows=-1), "rows=-1: a number from 0 to 10"),
        (dict(rows=2.5), "whole number from 0 to 10"),
        (dict(kind="c"), "kind='c': one of 'b', 'a'"),
        (dict(on=None), "one of False, True"),
        (dict(taw=1), "'taw'. Did you mean 'tau'"),
        (dict(temperature=1), "There is 'tau', 'rows', 'kind', 'on'"),
        (dict(rows=10, tau=-1), "tau=-1"),
    ],
)
def test_a_refused_value_changes_nothing(wrong, says):
    seen, draw = recording_draw()
    t = interact(draw, **CONTROLS)
    with pytest.raises(ValueError, match=says):
        t.set(**wrong)
    assert t.state == START and len(seen) == 1


@pytest.mark.parametrize(
    "control, says",
    [
        ((0, 1, 0.1), r"low, high, step, start"),
        ((0, 1, 0.1, 2), "a=2: a number from 0 to 1"),
        ([], "choices"),
        (3, "a=3"),
        ((1, 0, 0.1, 0.5), "a=0.5"),
        ((0, 4, 1, "2"), "a='2'"),
    ],
)
def test_malformed_controls_are_refused(control, says):
    with pytest.raises(ValueError, match=says):
        interact(lambda a: None, a=control)


def test_a_drawing_error_is_raised_without_a_view():
    t = interact(lambda n: 1 // n, n=(0, 3, 1, 2))
    with pytest.raises(ZeroDivisionError, match="division"):
        t.set(n=0)
    t.set(n=1)
    assert t.state == dict(n=1)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 100).map(lambda k: k / 100),
    st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 1.0]),
    st.sampled_from([0.0, 0.5, 0.1]),
)
def test_slider_step_reaches_any_state(value, step, low):
    value = low + value
    s = slider_step((low, low + 1, step, low), value)
    k = (value - low) / s
    assert (
        0 < s <= step and abs(k - round(k)) < 1e-6 and abs(step / s - round(step / s)) < 1e-6
    )  # a finer grid, with the old one in it


@given(st.floats(0.01, 2.0))
def test_log_slider_step_reaches_any_state(value):
    import math

    s = slider_step((0.01, 2.0, 0.01, 0.3), value)
    k = math.log10(value / 0.01) / s
    assert abs(k - round(k)) < 1e-6 and s <= 0.1


def test_integer_slider_step_stays_whole():
    assert (
        slider_step((600, 4000, 100, 600), 650) == 50
        and isinstance(slider_step((600, 4000, 100, 600), 650), int)
        and slider_step((1, 16, 1, 4), 4) == 1
    )


# ---- the view, without a screen


def viewed(draw, **controls):
    t = InteractivePlot(draw, controls)
    t.view = _InteractiveView(t)
    t.show()
    return t


def test_widget_kind_fits_the_control():
    import ipywidgets as w

    k = viewed(recording_draw()[1], **CONTROLS).view.sliders
    assert [type(x) for x in k.values()] == [
        w.FloatLogSlider,
        w.IntSlider,
        w.Dropdown,
        w.Checkbox,
    ] and k["rows"].step == 5
    linear = viewed(lambda share_of_all: None, share_of_all=(0.0, 1.0, 0.005, 0.5)).view.sliders[
        "share_of_all"
    ]
    assert (
        type(linear) is w.FloatSlider
        and linear.description == "share of all"
        and linear.readout_format == ".3f"
    )


def test_every_control_has_a_description():
    view = viewed(recording_draw()[1], **CONTROLS).view
    assert (
        view.sliders["tau"].tooltip == "temperature, 0.01 to 2"
        and view.sliders["rows"].tooltip == "0 to 10"
    )
    assert "temperature" in view.box.children[0].children[1].value
    bare = viewed(lambda x: None, x=(0, 3, 1, 1)).view
    assert bare.sliders["x"].tooltip == "0 to 3"  # a lambda has nowhere to say it


def test_slider_and_set_move_the_same_state():
    seen, draw = recording_draw()
    t = viewed(draw, **CONTROLS)
    knobs = t.view.sliders
    knobs["tau"].value = 0.31622776601683794
    assert t.state["tau"] == 0.316 == seen[-1]["tau"] and len(seen) == 2  # as the slider says it
    knobs["kind"].value = "a"
    knobs["on"].value = True
    assert t.state == START | dict(tau=0.316, kind="a", on=True) and len(seen) == 4
    t.set(tau=0.07, rows=10)
    assert (knobs["tau"].value, knobs["rows"].value) == (0.07, 10) and len(
        seen
    ) == 5  # once, not once a control
    knobs["tau"].value = 0.0700000001
    assert len(seen) == 5
    t.set(tau=0.0712345)
    assert t.state["tau"] == seen[-1]["tau"] == 0.0712345 and len(seen) == 6
    t.view.reset.click()
    assert t.state == START and {k: x.value for k, x in knobs.items()} == START and len(seen) == 7


def test_slider_reaches_both_ends():
    t = viewed(lambda tau: None, tau=(0.01234, 2.3456, 0.01, 0.3))
    knob = t.view.sliders["tau"]
    knob.value = 10**knob.min
    assert t.state["tau"] == 0.01234
    knob.value = 10**knob.max
    assert t.state["tau"] == 2.3456


def test_a_drawing_error_is_shown_and_the_controls_stay_alive():
    def draw(n):
        plt.figure()
        if n > 5:
            raise ValueError(f"n={n}: <b>at most 5</b>")
        if n == 5:
            raise RuntimeError

    t = viewed(draw, n=(0, 9, 1, 3))
    knob = t.view.sliders["n"]
    knob.value = 7
    said = t.view.output_box.children[0].value
    assert (
        "n=7: &lt;b&gt;at most 5&lt;/b&gt;" in said and "alert" in said and "Traceback" not in said
    )
    assert isinstance(t.error, ValueError) and t.state == dict(n=7)
    knob.value = 5
    assert "RuntimeError" in t.view.output_box.children[0].value
    knob.value = 2
    assert t.error is None and not any("alert" in c.value for c in t.view.output_box.children)
    plt.close("all")


def test_output_of_other_threads_is_not_captured(capsys):
    import threading

    def draw(n):
        print("mine", n)
        other = threading.Thread(target=print, args=("another cell",))
        other.start()
        other.join()

    t = viewed(draw, n=(0, 3, 1, 1))
    assert (
        t.view.output_box.children[0].value == "<pre>mine 1\n</pre>"
        and capsys.readouterr().out == "another cell\n"
    )


def test_slow_drawings_wait_until_the_slider_is_released(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def draw(seconds):
        now[0] += seconds

    t = viewed(draw, seconds=(0.0, 2.0, 0.1, 0.1))
    knob = t.view.sliders["seconds"]
    assert knob.continuous_update
    t.set(seconds=1.0)
    assert not knob.continuous_update
    t.reset()
    assert knob.continuous_update


# ---- in a kernel: where a person is, and where nobody is

CELLS = [
    """import json
import matplotlib.pyplot as plt
from IPython.display import display
from PIL import Image
from mmkit.core import interact
from mmkit.core.sliders import is_interactive

def draw(n, kind='line'):  # how many
    print('n is', n)
    plt.figure(figsize=(2, 1))
    plt.plot(range(n))
    plt.show()
    plt.figure(figsize=(1, 1))
    plt.plot([0, 1])  # left to the end of the cell
    display(Image.new('RGB', (9, 9)))

def outputs():
    if plot.view is None:
        return None
    return [
        [type(c).__name__, str(bytes(c.value[:4])) if hasattr(c, 'format') else '', hash(c.value)]
        for c in plot.view.output_box.children
    ]

plot = interact(draw, n=(1, 9, 1, 3))
plot""",
    """plot.set(n=5)
print(json.dumps([is_interactive(), outputs()]))""",
    """plot.set(n=6)
print(json.dumps([repr(plot), plt.get_fignums(), outputs()]))""",
]


def run(cells, monkeypatch, env):
    for k in ("JPY_SESSION_NAME", "SERVER_SOFTWARE", "MPLBACKEND"):
        monkeypatch.delenv(k, raising=False)
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    return [c.outputs for c in nb.cells]


def test_an_executed_notebook_gets_a_still_image(monkeypatch):
    first, second, third = run(CELLS, monkeypatch, {})

    def kinds(outs):
        return [o.get("name") or ("image/png" in o.data) for o in outs]

    assert kinds(first) == ["stdout", True, True, True] and first[0].text == "n is 3\n"
    assert (
        kinds(second)[:2] == ["stdout", True]
        and second[0].text.startswith("n is 5\n")
        and json.loads(second[-2 if second[-1].get("data") else -1].text.splitlines()[-1])
        == [False, None]
    )
    assert first[1].data["image/png"] != second[1].data["image/png"]


@pytest.mark.parametrize(
    "env", [dict(JPY_SESSION_NAME="here.ipynb"), dict(SERVER_SOFTWARE="voila/0.5.13")]
)
def test_an_interactive_kernel_gets_widgets_and_a_still(monkeypatch, env):
    first, second, third = run(CELLS, monkeypatch, env)
    assert (
        len(first) == 1
        and "application/vnd.jupyter.widget-view+json" in first[0].data
        and first[0].data["image/png"]
    )  # and a still, for the page that is saved
    interactive, before = json.loads(second[0].text)
    shown_as, figures, after = json.loads(third[0].text)
    assert interactive and len(second) == len(third) == 1
    assert shown_as == "InteractivePlot(n=6)" and not figures
    assert [kind for kind, _, _ in before] == ["HTML", "Image", "Image", "Image"]
    assert [kind for kind, _, _ in after] == [kind for kind, _, _ in before]
    assert {start for _, start, _ in before[1:]} == {str(b"\x89PNG")}
    changed = [a[-1] != b[-1] for a, b in zip(before, after)]
    assert changed == [True, True, False, False]  # the text and the line, not the two others
