"""The claims' files say how they were come by, and their verdicts follow from their rows; the
experiments run.
"""

import importlib.util
import json
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT

from mmkit.core.claims import Claim, compare_conditions, decide_verdict, load_claim, plot_conditions
from mmkit.core.provenance import get_provenance
from mmkit.core.stats import bootstrap

FILES = sorted((ROOT / "mmkit" / "assets" / "claims").glob("*.json"))
WANTED = {
    "C1",
    "C2",
    "C3",
    "C4",
    "C5",
    "C6",
    "C7",
    "C9",
    "C10",
    "C11",
    "C12",
    "C14",
    "C15",
    "C16",
    "C17",
    "C18",
    "C19",
    "C19-maps",
    "C20",
    "C21",
    "C22",
    "C23",
    "C24",
    "C25",
    "C26",
    "C27",
    "C29",
    "C30",
    "C30-connectors",
    "C31",
}
FIELDS = (
    "id",
    "claim",
    "measured",
    "limitations",
    "setup",
    "kind",
    "rows",
    "comparisons",
    "verdict",
    "machine",
    "versions",
    "date",
    "command",
    "seeds",
    "seconds",
)
LEDGER = ROOT / "tests" / "ledger"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("run", LEDGER / "run.py")
    m = importlib.util.module_from_spec(spec)
    before, sys.modules["run"] = list(sys.path), m
    spec.loader.exec_module(m)
    yield m
    sys.path[:] = before
    for name in ("run", "world", "contrast", "ledger_order", "ledger_weights"):
        sys.modules.pop(name, None)


def test_every_claim_has_its_file():
    assert {f.stem for f in FILES} >= WANTED


@pytest.fixture(params=FILES, ids=lambda f: f.stem)
def entry(request):
    return json.loads(request.param.read_text(encoding="utf-8")) | {"file": request.param}


def test_how_it_was_come_by(entry):
    assert not [k for k in FIELDS if not entry.get(k)], "a field is missing or empty"
    assert entry["id"] == entry["file"].stem and entry["kind"] == "analogue, not replication"
    assert (
        len(set(entry["seeds"])) >= 5 and entry["seconds"] > 0 and entry["id"] in entry["command"]
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"]) and {
        "python",
        "torch",
        "transformers",
    } <= set(entry["versions"])
    assert not re.search(
        r"/(root|work|home|tmp|Users)/", entry["file"].read_text(encoding="utf-8")
    ), "a path of one machine"


def test_rows_hold_what_they_say(entry):
    assert any(r["control"] for r in entry["rows"]), "no control"
    assert len({(r["condition"], r["measure"]) for r in entry["rows"]}) == len(entry["rows"])
    for r in entry["rows"]:
        assert r["seeds"] == entry["seeds"] and len(r["values"]) == len(r["seeds"]) >= 5, (
            r["condition"],
            r["measure"],
        )
        assert r["low"] <= r["mean"] <= r["high"], (r["condition"], r["measure"])
        again = bootstrap(np.mean, r["values"])
        assert np.allclose([r["mean"], r["low"], r["high"]], again, rtol=1e-4, atol=2e-6), (
            r["condition"],
            r["measure"],
        )


def test_the_verdict_follows_from_the_rows(entry):
    again = [
        compare_conditions(
            entry["rows"], {k: c[k] for k in ("statement", "a", "b", "expect", "control") if k in c}
        )
        for c in entry["comparisons"]
    ]
    assert [c["outcome"] for c in again] == [c["outcome"] for c in entry["comparisons"]]
    for a, c in zip(again, entry["comparisons"]):
        assert np.allclose(a["difference"], c["difference"], rtol=1e-4, atol=2e-6), c["statement"]
    assert decide_verdict(again) == entry["verdict"]
    assert entry["verdict"] != "a control failed"
    assert any(c.get("control") for c in again) and any(not c.get("control") for c in again)


def test_what_is_shown(entry):
    m = load_claim(entry["id"])
    assert (
        isinstance(m, Claim)
        and entry["verdict"] in str(m)
        and all(c["statement"] in str(m) for c in entry["comparisons"])
    )
    assert (
        "&lt;b&gt;" in Claim(m, claim="<b>")._repr_html_()
        and "<b>" not in Claim(m, claim="<b>")._repr_html_()
    )
    for measure in dict.fromkeys(r["measure"] for r in m["rows"]):
        ax = plot_conditions(m, measure)
        arms = [t.get_text() for t in ax.get_yticklabels()]
        plt.close(ax.figure)
        assert sorted(arms) == sorted(r["condition"] for r in m["rows"] if r["measure"] == measure)


def test_unknown_claims_name_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="C24"):
        load_claim("C240")
    with pytest.raises(ValueError, match="make ledger"):
        load_claim("C1", tmp_path)


def test_a_cell_is_measured_once_and_survives_a_kill(run, tmp_path):
    asked = []

    def f(lr):
        asked.append(lr)
        return {"R@1": lr}

    file, quiet = tmp_path / "C0.jsonl", lambda s: None
    assert run.Cells(file, quiet)("arm", 0, f, lr=0.5) == {"R@1": 0.5}
    with file.open("a") as out:
        out.write('{"condition": "arm", "se')  # killed while it wrote
    cells = run.Cells(file, quiet)
    assert cells("arm", 0, f, lr=0.5) == {"R@1": 0.5} and asked == [0.5]
    assert cells("arm", 1, f, lr=0.5) and cells("arm", 0, f, lr=0.1) and asked == [0.5, 0.5, 0.1], (
        "another seed or setting is another cell"
    )
    again = run.Cells(file, quiet)
    assert again("arm", 0, f, lr=0.5) and len(asked) == 3
    cells.finish()
    assert not file.exists() and run.Cells(file, quiet)("arm", 0, f, lr=0.5) and len(asked) == 4


def test_cells_of_an_earlier_world_are_measured_anew(run, tmp_path, monkeypatch):
    asked, said = [], []

    def f():
        asked.append(1)
        return {"R@1": 0.5}

    file = tmp_path / "C0.jsonl"
    earlier = get_provenance() | dict(world_version=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "get_provenance", lambda: earlier)
        run.Cells(file, said.append)("arm", 0, f)
    said.clear()
    cells = run.Cells(file, said.append)
    assert len(said) == 1 and "measured anew" in said[0]
    assert cells("arm", 0, f) and len(asked) == 2
    assert run.Cells(file, said.append)("arm", 0, f) and len(asked) == 2


def test_an_experiment_runs_and_goes_on(run, tmp_path, cache):
    file, said = LEDGER / "ledger_mse.py", []
    (made,) = run.measure(
        file, [0, 1], tmp_path / "claims", tmp_path / "cells", small=True, say=said.append
    )
    first = json.loads(made.read_text(encoding="utf-8"))
    assert (
        made.name == "C4.json"
        and not [k for k in FIELDS if not first.get(k)]
        and first["seeds"] == [0, 1]
    )
    assert get_provenance().items() <= first.items()
    assert {r["condition"] for r in first["rows"]} >= {
        "contrastive",
        "MSE alone",
        "untrained",
    } and len(said) > 20
    done = tmp_path / "cells" / "C4.done.jsonl"
    lines = done.read_text().splitlines(True)
    (tmp_path / "cells" / "C4.jsonl").write_text(
        "".join(lines[:-3])
    )  # as if killed three cells before the end
    said.clear()
    run.measure(file, [0, 1], tmp_path / "claims", tmp_path / "cells", small=True, say=said.append)
    again = json.loads(made.read_text(encoding="utf-8"))
    assert len(said) == 3, "only what was missing is measured"
    assert [r["values"] for r in again["rows"]] == [r["values"] for r in first["rows"]], (
        "the same seeds, the same values"
    )
    assert (
        not (ROOT / "runs" / "ledger" / "C4.jsonl").exists()
        or (ROOT / "runs" / "ledger" / "C4.jsonl").stat().st_mtime < made.stat().st_mtime
    )


def test_a_misplaced_picture_is_still_the_same_tokens(run):
    place = run.module(LEDGER / "ledger_placement.py")

    class Tok:
        image_token_id = 8

        def convert_tokens_to_ids(self, t):
            return 5

    ids = [
        2,
        20,
        6,
        8,
        8,
        8,
        7,
        30,
        31,
        5,
        21,
        40,
        41,
        5,
        22,
    ]  # begin, user, <image>, image tokens, </image>, prompt, end, model, answer, end
    labels = [-100] * 11 + [40, 41, 5, -100]
    for where in place.PLACES:
        got, told = place.moved(ids, labels, where, Tok())
        assert sorted(got) == sorted(ids) and [t for t in told if t != -100] == [40, 41, 5], where
        assert all(t in (-100, i) for i, t in zip(got, told)), where
    at = {where: place.moved(ids, labels, where, Tok())[0] for where in place.PLACES + place.BROKEN}
    assert at["before the prompt"] == ids and at["off by one"] == [
        2,
        20,
        8,
        6,
        8,
        8,
        7,
        30,
        31,
        5,
        21,
        40,
        41,
        5,
        22,
    ]
    assert at["after the prompt"] == [2, 20, 30, 31, 6, 8, 8, 8, 7, 5, 21, 40, 41, 5, 22]
    assert at["after the answer"] == [2, 20, 30, 31, 5, 21, 40, 41, 5, 6, 8, 8, 8, 7, 22]
    assert (
        at["no image tokens"] == [2, 20, 30, 31, 5, 21, 40, 41, 5, 22]
        and at["one image token too few"].count(8) == 2
    )


# --- the recorded sweep, which the live tuner shows
MEASURES = ("macro_f1", "r1", "image_share", "image_gain")


def check_sweep(told):
    "Every point of every rate: weights that sum to one, and for every seed a number that can be."

    def within(v):
        return v is None or 0 <= v <= 1

    for key in ("points", "slower"):
        assert len(
            {tuple(round(p[k], 6) for k in ("contrastive", "ce", "mse")) for p in told[key]}
        ) == len(told[key]), "a point is there twice"
        for p in told[key]:
            assert (
                abs(p["contrastive"] + p["ce"] + p["mse"] - 1) < 1e-5
                and min(p["contrastive"], p["ce"], p["mse"]) >= 0
            ), p
            for m in MEASURES:
                assert len(p[m]) == len(told["seeds"]) and (
                    m == "image_gain" or all(map(within, p[m]))
                ), (m, p)
            assert None not in p["macro_f1"] + p["r1"] + p["image_gain"]
    for c in told["controls"].values():
        assert all(len(c[m]) == len(told["seeds"]) for m in MEASURES)


def test_the_sweep_says_what_it_is():
    told = json.loads((ROOT / "mmkit" / "assets" / "sweep.json").read_text(encoding="utf-8"))
    check_sweep(told)
    corners = {(p["contrastive"], p["ce"], p["mse"]) for p in told["points"]}
    assert (
        len(told["points"]) == len(told["slower"]) == 17
        and {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.4, 0.5, 0.1)} <= corners
        and len(told["seeds"]) >= 3
    )
    assert (
        told["command"] == "python tests/ledger/sweep.py"
        and told["train"] == ["projector"]
        and told["steps"] >= 40
        and told["lr"]["slower"] < told["lr"]["points"]
    )
    assert all(
        told[k] for k in ("machine", "date", "versions", "seconds", "batch", "held", "probed")
    )
    at = {(p["contrastive"], p["ce"], p["mse"]): np.mean(p["r1"]) for p in told["slower"]}
    assert at[1, 0, 0] > at[0, 1, 0], "contrast is what finds captions"


def test_the_sweep_runs_and_goes_on(run, tmp_path, cache):
    sweep, said = run.module(LEDGER / "sweep.py"), []

    def again():
        return sweep.measure(
            tmp_path / "sweep.json",
            tmp_path / "sweep.jsonl",
            seeds=[0],
            small=True,
            say=said.append,
        )

    first = json.loads(again().read_text(encoding="utf-8"))
    check_sweep(first)
    assert get_provenance().items() <= first.items()
    assert (
        len(first["points"]) == 2
        and len(said) == 2 * 2 + 2
        and not (tmp_path / "sweep.jsonl").exists()
    )
    (tmp_path / "sweep.jsonl").write_text(
        "".join((tmp_path / "sweep.done.jsonl").read_text().splitlines(True)[:-2])
    )
    said.clear()  # as if killed two cells before the end
    assert (
        json.loads(again().read_text(encoding="utf-8"))["points"] == first["points"]
        and len(said) == 2
    )
