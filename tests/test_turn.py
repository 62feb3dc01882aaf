"Something to turn, without a browser: its state, what it refuses, what it shows, and what a kernel does where a person is."

import json
import time

import matplotlib.pyplot as plt
import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from mmkit.core.sliders import InteractivePlot, _InteractiveView, _slider_step, interact


def noting():  # a drawing that notes what it was asked for
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

# ---- the state, where nobody is ---------------------------------------------------------------------------------------------


def test_drawn_once_and_then_when_it_is_set():
    seen, draw = noting()
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


def test_states_are_separate():
    seen, draw = noting()
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
        (dict(taw=1), "'taw'; did you mean 'tau'"),
        (dict(temperature=1), "there is tau, rows, kind, on"),
        (dict(rows=10, tau=-1), "tau=-1"),
    ],
)
def test_what_cannot_be_changes_nothing(wrong, says):
    seen, draw = noting()
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
def test_controls_that_cannot_be(control, says):
    with pytest.raises(ValueError, match=says):
        interact(lambda a: None, a=control)


def test_an_error_where_nobody_is_is_raised():
    t = interact(lambda n: 1 // n, n=(0, 3, 1, 2))
    with pytest.raises(ZeroDivisionError):
        t.set(n=0)
    t.set(n=1)
    assert t.state == dict(n=1)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 100).map(lambda k: k / 100),
    st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 1.0]),
    st.sampled_from([0.0, 0.5, 0.1]),
)
def test_a_slider_can_stand_where_the_state_is(value, step, low):
    value = low + value
    s = _slider_step((low, low + 1, step, low), value)
    k = (value - low) / s
    assert (
        0 < s <= step and abs(k - round(k)) < 1e-6 and abs(step / s - round(step / s)) < 1e-6
    )  # a finer grid, with the old one in it


@given(st.floats(0.01, 2.0))
def test_so_can_a_logarithmic_one(value):
    import math

    s = _slider_step((0.01, 2.0, 0.01, 0.3), value)
    k = math.log10(value / 0.01) / s
    assert abs(k - round(k)) < 1e-6 and s <= 0.1


def test_whole_numbers_stay_whole():
    assert (
        _slider_step((600, 4000, 100, 600), 650) == 50
        and isinstance(_slider_step((600, 4000, 100, 600), 650), int)
        and _slider_step((1, 16, 1, 4), 4) == 1
    )


# ---- the view, without a screen ---------------------------------------------------------------------------------------------


def viewed(draw, **controls):
    t = InteractivePlot(draw, controls)
    t.view = _InteractiveView(t)
    t.show()
    return t


def test_controls_fit_their_range():
    import ipywidgets as w

    k = viewed(noting()[1], **CONTROLS).view.knobs
    assert [type(x) for x in k.values()] == [
        w.FloatLogSlider,
        w.IntSlider,
        w.Dropdown,
        w.Checkbox,
    ] and k["rows"].step == 5
    linear = viewed(lambda share_of_all: None, share_of_all=(0.0, 1.0, 0.005, 0.5)).view.knobs[
        "share_of_all"
    ]
    assert (
        type(linear) is w.FloatSlider
        and linear.description == "share of all"
        and linear.readout_format == ".3f"
    )


def test_every_control_is_explained():
    view = viewed(noting()[1], **CONTROLS).view
    assert (
        view.knobs["tau"].tooltip == "temperature, 0.01 to 2"
        and view.knobs["rows"].tooltip == "0 to 10"
    )
    assert "temperature" in view.box.children[0].children[1].value
    bare = viewed(lambda x: None, x=(0, 3, 1, 1)).view
    assert bare.knobs["x"].tooltip == "0 to 3"  # a lambda has nowhere to say it


def test_hand_and_code_move_the_same_state():
    seen, draw = noting()
    t = viewed(draw, **CONTROLS)
    knobs = t.view.knobs
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


def test_ends_of_a_slider():
    t = viewed(lambda tau: None, tau=(0.01234, 2.3456, 0.01, 0.3))
    knob = t.view.knobs["tau"]
    knob.value = 10**knob.min
    assert t.state["tau"] == 0.01234
    knob.value = 10**knob.max
    assert t.state["tau"] == 2.3456


def test_an_error_is_its_sentence_and_the_controls_live():
    def draw(n):
        plt.figure()
        if n > 5:
            raise ValueError(f"n={n}: <b>at most 5</b>")
        if n == 5:
            raise RuntimeError

    t = viewed(draw, n=(0, 9, 1, 3))
    open_before = plt.get_fignums()
    knob = t.view.knobs["n"]
    knob.value = 7
    said = t.view.stage.children[0].value
    assert (
        "n=7: &lt;b&gt;at most 5&lt;/b&gt;" in said and "alert" in said and "Traceback" not in said
    )
    assert isinstance(t.error, ValueError) and t.state == dict(n=7)
    knob.value = 5
    assert "RuntimeError" in t.view.stage.children[0].value
    knob.value = 2
    assert t.error is None and not any("alert" in c.value for c in t.view.stage.children)
    plt.close("all")


def test_what_others_print_meanwhile_is_theirs(capsys):
    import threading

    def draw(n):
        print("mine", n)
        other = threading.Thread(target=print, args=("another cell",))
        other.start()
        other.join()

    t = viewed(draw, n=(0, 3, 1, 1))
    assert (
        t.view.stage.children[0].value == "<pre>mine 1\n</pre>"
        and capsys.readouterr().out == "another cell\n"
    )


def test_quick_pictures_follow_the_hand_and_slow_ones_wait(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def draw(seconds):
        now[0] += seconds

    t = viewed(draw, seconds=(0.0, 2.0, 0.1, 0.1))
    knob = t.view.knobs["seconds"]
    assert knob.continuous_update
    t.set(seconds=1.0)
    assert not knob.continuous_update
    t.reset()
    assert knob.continuous_update


# ---- in a kernel: where a person is, and where nobody is -----------------------------------------------------------------------

CELLS = [
    """import matplotlib.pyplot as plt, json
from IPython.display import display
from PIL import Image
from mmkit.core import live, turn
def draw(n, kind='line'): # how many
    print('n is', n)
    plt.figure(figsize=(2, 1)); plt.plot(range(n)); plt.show()
    plt.figure(figsize=(1, 1)); plt.plot([0, 1]); display(Image.new('RGB', (9, 9)))                # left to the end of the cell
t = turn(draw, n=(1, 9, 1, 3))
t""",
    """t.set(n=5)
print(json.dumps([live(), t.view and [[type(c).__name__, bytes(c.value[:4]).decode('latin1') if hasattr(c, 'format') else '', hash(c.value)] for c in t.view.stage.children]]))""",
    """t.set(n=6)
print(json.dumps([repr(t), plt.get_fignums(), t.view and [[type(c).__name__, hash(c.value)] for c in t.view.stage.children]]))""",
]


def run(cells, monkeypatch, env):
    for k in ("JPY_SESSION_NAME", "SERVER_SOFTWARE", "MPLBACKEND"):
        monkeypatch.delenv(k, raising=False)
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    return [c.outputs for c in nb.cells]


def test_a_program_gets_the_still_and_nothing_else(monkeypatch):
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
def test_a_person_gets_controls_and_the_picture(monkeypatch, env):
    first, second, third = run(CELLS, monkeypatch, env)
    assert (
        len(first) == 1
        and "application/vnd.jupyter.widget-view+json" in first[0].data
        and first[0].data["image/png"]
    )  # and a still, for the page that is saved
    (live, one), (said, figures, two) = json.loads(second[0].text), json.loads(third[0].text)
    assert live and len(second) == len(third) == 1 and said == "Turn(n=6)" and not figures
    assert [c[0] for c in one] == ["HTML", "Image", "Image", "Image"] == [c[0] for c in two] and {
        c[1] for c in one[1:]
    } == {"\x89PNG"}
    assert (
        [c[-1] for c in one][:2] != [c[-1] for c in two][:2]
        and one[1][-1] != two[1][-1]
        and [c[-1] for c in one[2:]] == [c[-1] for c in two[2:]]
    )
