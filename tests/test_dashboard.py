"""The dashboard without a browser: its tour, its messages, its static page, and the end of its
thread.
"""

import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmkit import tuner
from mmkit.core.runtime import get_assets_dir
from mmkit.tuner.dashboard import Dashboard
from mmkit.tuner.guided_tour import TOUR_STEPS, GuidedTour
from mmkit.tuner.hyperparameters import TERM_LABELS, default_hparams, validate_hparams
from mmkit.tuner.server import find_free_port, main
from mmkit.tuner.static_page import static_html, svg_chart
from mmkit.tuner.status import latest_value, steps_since

PNG = io.BytesIO()
Image.new("RGB", (40, 40), (200, 150, 120)).save(PNG, "PNG")
LESIONS = [dict(png=PNG.getvalue(), id="a", truth=dict(border="irregular"), label="melanoma")]


def made_up_status(
    step=0,
    active="A",
    label_runs=("A",),
    raw=1.0,
    claim_accuracy=None,
    r1=None,
    image_share=None,
    marks=(),
    parent=None,
    words=None,
    **hparams,
):
    "A runner's status, made up."

    def run(label):
        x = list(range(1, step + 1))

        def line(v):
            return [v] * len(x)

        def looked(v):
            return (
                dict(step=[0, step], value=list(v))
                if v
                else dict(step=[0, step], value=[None, None])
            )

        return dict(
            step=x,
            loss=line(raw),
            raw={t: line(raw) for t in TERM_LABELS},
            weighted={t: line(raw / 3) for t in TERM_LABELS},
            temperature=line(0.07),
            gradient_shares=dict(step=x, vision=line(0.0), projector=line(1.0), text=line(0.0)),
            modality=dict(
                step=[step], image_share=[image_share], image_gain=[1.0], text_gain=[1.0]
            ),
            r1=looked(r1),
            claim_accuracy=looked(claim_accuracy),
            marks=list(marks),
            parent=parent if label == active else None,
            steps=step,
        )

    words = words or [["a ", None], ["veil ", True], ["and ", None], ["dots", False]]
    return dict(
        phase="running",
        reason="",
        restore_to=None,
        busy="",
        active=active,
        step=step,
        rate=9.0,
        seconds=1.0,
        hparams=default_hparams() | hparams,
        runs={one_label: run(one_label) for one_label in label_runs},
        similarity=dict(step=step, n=2, values=[1.0, 0.0, 0.5, 0.2], r1=0.5),
        captions=dict(step=step, items=[dict(words=words, num_right=1, num_claims=2)]),
        attention=None,
        snapshots=[],
        replay=None,
        remarks=[],
    )


class Stub:
    "A runner that writes down what it is asked for, and trains nothing."

    def __init__(self, state=None, on_update=None, update_interval=0.2, **settings):
        self.calls, self.alive = [], True
        self.images_for_display = dict(lesions=LESIONS)
        validate_hparams(settings)

    def status(self):
        return made_up_status()

    def stop(self):
        self.alive = False

    def export(self, kind):
        return f"as {kind}"

    def __getattr__(self, name):
        if name in (
            "set",
            "reset",
            "start",
            "pause",
            "step",
            "snapshot",
            "restore",
            "fork",
            "switch",
            "drop",
            "replay",
            "request_attention",
            "preset",
        ):
            return lambda *a, **kw: self.calls.append((name, *a, *([kw] if kw else [])))
        raise AttributeError(name)


@pytest.fixture
def dash(monkeypatch):
    monkeypatch.setattr("mmkit.tuner.dashboard.Runner", Stub)
    d = Dashboard(initial_steps=0)
    d.sent = []
    d.send = lambda content, buffers=None: d.sent.append(content)
    yield d
    d.close()


# ---- the tour

READY = [
    dict(contrastive=0.0, ce=0.0, mse=1.0),
    dict(contrastive=1.0, ce=0.0, mse=0.0),
    dict(temperature=0.4),
    dict(shortcut=1.0),
    dict(ce=0.9),
]


def at(i):
    "The tour at its prompt i."
    t = GuidedTour()
    for _ in range(i):
        t.act("next")
    return t


@pytest.mark.parametrize("i", range(len(TOUR_STEPS)))
def test_a_prompt_is_done_when_it_was_trained_and_not_before(i):
    t, p = at(i), TOUR_STEPS[i]
    kw = dict(READY[i], r1=(0.1, 0.1), claim_accuracy=(0.2, 0.2), image_share=0.4)
    if i == 4:
        kw |= dict(
            label_runs=("A", "B"),
            active="B",
            parent=["A", 5],
            marks=[dict(step=8, says="ce 0.5 → 0.9")],
        )
    assert (
        not t.update(made_up_status(10, **kw))
        and not t.update(made_up_status(9 + p.min_steps, **kw))
        and not t.progress[i].get("done")
    )
    assert (
        t.update(made_up_status(10 + p.min_steps, **kw))
        and t.progress[i]["done"]
        and t.progress[i]["came"] in range(3)
        and t.progress[i]["found"].strip()
    )
    assert not t.update(made_up_status(90 + p.min_steps, **kw)), "told twice"
    shown = t.status()["prompts"][i]
    assert shown["done"] and json.loads(json.dumps(shown)) == shown


@pytest.mark.parametrize("i", range(len(TOUR_STEPS)))
def test_another_setting_is_not_the_prompt(i):
    t = at(i)
    wrong = [
        dict(contrastive=0.1, ce=0.0, mse=1.0),
        dict(contrastive=1.0, ce=0.2, mse=0.0),
        dict(temperature=0.2),
        dict(shortcut=0.2),
        dict(ce=0.9),
    ][i]
    for step in (10, 200):
        assert not t.update(made_up_status(step, **wrong))


def test_the_count_begins_anew_with_the_setting_the_run_and_a_reset():
    t, one = GuidedTour(), READY[0]
    t.update(made_up_status(10, **one))
    t.update(made_up_status(30))
    assert not t.update(made_up_status(55, **one)), "the setting was left in between"
    assert not t.update(made_up_status(20, **one)), "reset"
    assert not t.update(made_up_status(59, **one)) and t.update(made_up_status(60, **one))
    t = GuidedTour()
    t.update(made_up_status(10, **one))
    assert not t.update(made_up_status(60, active="B", label_runs=("A", "B"), **one))


@pytest.mark.parametrize(
    "i, kw, came",
    [
        (0, dict(r1=(0.1, 0.5)), 0),
        (0, dict(r1=(0.5, 0.5)), 1),
        (0, dict(r1=(0.9, 0.1)), 2),
        (1, dict(claim_accuracy=(0.2, 0.6)), 0),
        (1, dict(claim_accuracy=(0.4, 0.4)), 1),
        (3, dict(image_share=0.8), 0),
        (3, dict(image_share=0.1), 1),
        (3, dict(), 2),
    ],
)
def test_what_came_true_is_read_from_the_run(i, kw, came):
    t = at(i)
    first = {k: (v[0], v[0]) if k in ("r1", "claim_accuracy") else v for k, v in kw.items()}
    t.update(made_up_status(5, **READY[i], **first))
    assert (
        t.update(made_up_status(5 + TOUR_STEPS[i].min_steps, **READY[i], **kw))
        and t.progress[i]["came"] == came
    ), t.progress[i]


def test_a_hotter_temperature_is_seen_in_the_loss():
    t = at(2)
    after = made_up_status(40, **READY[2])
    t.update(made_up_status(20, **READY[2]))
    after["runs"]["A"]["raw"]["contrastive"] = [1.0] * 20 + [2.0] * 20
    assert (
        t.update(after) and t.progress[2]["came"] == 0 and "1.00 to 2.00" in t.progress[2]["found"]
    )


def test_what_was_seen_before_says_nothing_of_what_came_after():
    t, late = GuidedTour(), made_up_status(60, **READY[0])
    t.update(made_up_status(10, **READY[0]))
    late["runs"]["A"]["r1"] = dict(step=[5, 49], value=[0.1, 0.1])
    assert not t.update(late)
    late["runs"]["A"]["r1"]["step"][1] = 50
    assert t.update(late)


def test_acts_of_the_tour():
    t = GuidedTour()
    t.act("guess", 2)
    assert t.status()["prompts"][0]["guess"] == 2
    t.update(made_up_status(10, **READY[0]))
    t.update(made_up_status(60, **READY[0]))
    t.act("guess", 0)
    assert t.progress[0]["guess"] == 2, "a prediction after the fact"
    with pytest.raises(ValueError, match="from 0 to 2"):
        GuidedTour().act("guess", 3)
    with pytest.raises(ValueError, match="action='dance'"):
        t.act("dance")
    for _ in TOUR_STEPS:
        t.act("next")
    assert t.position == 0 and not t.is_open and t.progress == [{}] * 5
    t.act("open")
    assert t.is_open
    t.act("close")
    assert not t.is_open


# ---- the widget


@pytest.mark.parametrize(
    "asked, called",
    [
        (dict(do="start"), ("start",)),
        (dict(do="step"), ("step",)),
        (dict(do="set", hparams=dict(ce=0.3)), ("set", dict(ce=0.3))),
        (dict(do="reset", hparams=dict(seed=3)), ("reset", dict(seed=3))),
        (dict(do="preset", name="LoRA"), ("preset", dict(name="LoRA"))),
        (dict(do="restore", name="x"), ("restore", dict(name="x"))),
        (dict(do="switch", label="B"), ("switch", dict(label="B"))),
        (dict(do="drop", label="B"), ("drop", dict(label="B"))),
        (dict(do="request_attention", lesion=1, word=4), ("request_attention", 1, 4)),
    ],
)
def test_every_act_reaches_the_runner(dash, asked, called):
    dash.act(**asked)
    assert dash.runner.calls == [called] and dash.sent == [dict(did=asked["do"])]


def test_answers(dash):
    dash.act(do="export", kind="fit")
    assert dash.sent[0] == dict(export="fit", text="as fit")
    dash.runner.set = lambda **k: (_ for _ in ()).throw(ValueError("ce=7: a number from 0 to 1"))
    dash.act(do="set", hparams=dict(ce=7))
    assert dash.sent[-1] == dict(refused="ce=7: a number from 0 to 1")
    dash.runner.fork = lambda: 1 / 0
    dash.act(do="fork")
    assert dash.sent[-1]["refused"].startswith("ZeroDivisionError")
    dash.act(do="tour", act="guess", choice=1)
    assert dash._tour["prompts"][0]["guess"] == 1
    dash.act(do="tour", act="guess", choice=9)
    assert "from 0 to 2" in dash.sent[-1]["refused"]
    dash.act(do="fly")
    assert "fly" in dash.sent[-1]["refused"]


def test_what_is_heard_is_sent_once(dash):
    dash._on_update(made_up_status(30, active="B", label_runs=("A", "B")))
    assert (
        list(dash._status["runs"]) == ["B"]
        and list(dash._other_runs) == ["A"]
        and dash._constants["lesions"][0]["label"] == "melanoma"
    )
    heard = []
    dash.observe(lambda c: heard.append(c.name))
    again = made_up_status(31, active="B", label_runs=("A", "B"))
    again["runs"]["A"] = copy.deepcopy(dash._other_runs["A"])
    dash._on_update(again)
    assert heard == ["_status"], heard


def test_no_number_is_null_on_the_screen(dash):
    t = made_up_status(3)
    t["runs"]["A"]["raw"]["ce"] = [1.0, float("nan"), float("inf")]
    dash._on_update(t)
    state = dash.get_state()
    assert (
        json.loads(state["_status"])["runs"]["A"]["raw"]["ce"] == [1.0, None, None]
        and "NaN" not in state["_status"]
    )


def test_the_state_is_complete_for_a_page_that_is_opened_late(dash):
    dash._on_update(made_up_status(30))
    s = dash.get_state()
    assert (
        json.loads(s["_status"])["step"] == 30
        and s["_constants"]["lesions"]
        and len(s["_tour"]["prompts"]) == 5
    )
    assert [k["name"] for k in s["_constants"]["hyperparameters"]] == list(
        tuner.HYPERPARAMETERS
    ) and [p["name"] for p in s["_constants"]["presets"]] == list(tuner.PRESETS)
    assert len(s["_constants"]["lut"]) == 768 and (s["_constants"]["sweep"] is None) == bool(
        s["_constants"]["no_sweep"]
    )
    assert (
        "innerHTML" not in s["_esm"]
        and "insertAdjacent" not in s["_esm"]
        and ".html" not in s["_esm"]
        and "http" not in s["_esm"].replace("http://www.w3.org/2000/svg", "") + s["_css"]
    )


def test_a_tour_prompt_is_noticed_while_it_trains(dash):
    dash._on_update(made_up_status(1, **READY[0]))
    assert not dash._tour["prompts"][0]["done"]
    dash._on_update(made_up_status(60, **READY[0]))
    assert dash._tour["prompts"][0]["done"] and "MSE" in dash._tour["prompts"][0]["found"]


def test_a_new_dashboard_ends_the_old_one(dash):
    other = Dashboard(initial_steps=0)
    assert not dash.runner.alive
    other.close()
    other.close()
    with pytest.raises(ValueError, match="no hyperparameter"):
        Dashboard(colour="red")


def test_hearing_costs_next_to_nothing(dash):
    big = made_up_status(300, active="B", label_runs=("A", "B", "C", "D"))
    dash._on_update(big)
    began = time.thread_time()
    for i in range(20):
        dash._on_update(dict(big, step=300 + i))
    assert (time.thread_time() - began) / 20 < 0.02


# ---- the still


class Seen(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") or k.startswith("on")]

    def handle_data(self, data):
        self.text += data


nasty = st.text(max_size=9) | st.sampled_from(
    ["<script>alert(1)</script>", "<img src=x onerror=y>", "\"'&amp;", "\n"]
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(nasty, st.sampled_from([True, False, None])), min_size=1, max_size=6), nasty
)
def test_what_a_model_says_cannot_leave_its_place(words, label):
    t = made_up_status(20, words=[list(w) for w in words], marks=[dict(step=3, says=label)])
    page = Seen(static_html(t, [dict(LESIONS[0], label=label)]))
    assert set(page.tags) <= {
        "div",
        "b",
        "figure",
        "figcaption",
        "img",
        "br",
        "span",
        "svg",
        "path",
        "text",
        "title",
    } and all(s.startswith("data:image/") for s in page.sources)


def test_still_shows_the_run():
    t = made_up_status(
        30,
        label_runs=("A", "B"),
        active="B",
        image_share=0.25,
        r1=(0.1, 0.4),
        claim_accuracy=(0.2, 0.6),
        shortcut=0.5,
        marks=[dict(step=10, says="ce 0.5 → 0.9")],
    )
    page = Seen(static_html(t, LESIONS))
    for said in (
        "step 30",
        "run A",
        "run B",
        "R@1 50%, chance 50%",
        "25%",
        "40%",
        "projector",
        "melanoma",
        "1 of 2 right",
        "ce 0.5 → 0.9",
        tuner.HYPERPARAMETERS["shortcut"].label,
        *TERM_LABELS.values(),
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 9 and len(page.sources) == 2
    assert "line-through" in static_html(t, LESIONS) and "underline" in static_html(t, LESIONS)
    assert "Nothing has trained yet" in static_html(
        made_up_status(0), LESIONS
    ) and "Nothing has trained yet" in static_html(dict(made_up_status(0), runs={}, hparams={}), [])


def test_a_line_has_a_gap_where_there_is_no_value():
    d = svg_chart(
        "x", "", [([1, 2, 3, 4], [1.0, None, float("nan"), 2.0], "#000", "")], num_steps=4
    ).split('<path d="M')[-1]
    assert d.count("M") == 1 and "L" not in d.split('"')[0]


def test_where_steps_are_counted_from():
    assert (
        steps_since(made_up_status(30), made_up_status(10)) == 20
        and steps_since(made_up_status(5), made_up_status(10)) == 5
        and steps_since(made_up_status(30, active="B", label_runs=("B",)), made_up_status(10)) == 30
    )
    assert (
        latest_value(made_up_status(3), "loss") == 1.0
        and latest_value(made_up_status(3), "r1", "value") is None
    )


# ---- the real one


def tuners():
    return [t.name for t in threading.enumerate() if "tuner" in t.name]


def test_unattended_it_trains_a_little_and_ends_its_thread():
    d = Dashboard(initial_steps=3, batch_size=2)
    assert d.runner.status()["step"] == 3 and not d.runner.alive and not tuners()
    page = Seen(d._repr_html_())
    assert "step 3" in page.text and len(page.sources) == 4 and d.comm is None
    assert (
        set(d._repr_mimebundle_()) == {"text/plain", "text/html"} and len(d._repr_html_()) < 150_000
    )


# ---- the page


def test_a_free_port_is_free():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        taken = s.getsockname()[1]
        assert find_free_port(taken) > taken


def test_without_voila_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("mmkit.tuner.server.find_spec", lambda name: None)
    assert main([]) == 1 and "pip install voila" in capsys.readouterr().err


def test_served_to_this_machine_alone_until_it_is_ended(tmp_path):
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("voila")
    port = find_free_port(18866)
    p = subprocess.Popen(
        [sys.executable, "-m", "mmkit.tuner.server", "--no-browser", "--port", str(port)],
        cwd=tmp_path,
        env=os.environ
        | dict(
            PYTHONPATH=os.pathsep.join(
                [str(get_assets_dir().parent.parent), os.environ.get("PYTHONPATH", "")]
            )
        ),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert f"http://127.0.0.1:{port}/" in p.stdout.readline()
        end = time.monotonic() + 900  # guards against a hang
        mine = []
        while time.monotonic() < end and not mine:
            time.sleep(0.3)
            mine = [
                c
                for q in psutil.Process(p.pid).children(recursive=True)
                for c in q.net_connections()
                if c.status == "LISTEN" and c.laddr.port == port
            ]
        assert mine and {c.laddr.ip for c in mine} == {"127.0.0.1"}
        inside = psutil.Process(p.pid).children(recursive=True)
        p.send_signal(signal.SIGTERM)
        assert p.wait(40) == 0
        assert not [q for q in psutil.wait_procs(inside, 10)[1]]
    finally:
        p.kill() if p.poll() is None else None
