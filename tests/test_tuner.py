"""The tuner without a screen: hyperparameters, planted faults, bit-identical replays, snapshots,
exports, and the runner's thread.
"""

import copy
import gc
import json
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit import data, models, training, tuner
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.models.parts import part_of
from mmkit.tuner.export import changes_lost_in_fit, fit_arguments
from mmkit.tuner.faulty_dataset import Variant
from mmkit.tuner.hyperparameters import (
    HYPERPARAMETERS,
    LOSS_TERMS,
    PRESETS,
    apply_changes,
    default_hparams,
    link_weights,
    validate_hparams,
)
from mmkit.tuner.log import read_log, run_log
from mmkit.tuner.plots import compare_runs
from mmkit.tuner.runner import Runner, stop_all_runners
from mmkit.tuner.state import StepError, TunerState

START = default_hparams()
SMALL = dict(num_records=24, batch_size=2)


def losses_of(state):
    return [entry["loss"] for entry in state.history]


@pytest.fixture(scope="module")
def base():
    return TunerState(**SMALL)


@pytest.fixture
def run(base):
    return base.restore("start").fork()


def until(runner, is_ready, seconds=1200):
    "The status when it is ready; the limit guards against a hang."
    end = time.monotonic() + seconds
    while not is_ready(runner.status()):
        large = ("runs", "similarity", "captions")
        status = {key: value for key, value in runner.status().items() if key not in large}
        assert time.monotonic() < end, status
        time.sleep(0.01)
    return runner.status()


@pytest.fixture
def runner(run):
    r = Runner(run)
    until(r, lambda t: t["phase"] == "ready")
    yield r
    r.stop()
    assert not r.alive


# ---- knobs


@given(st.lists(st.tuples(st.sampled_from(LOSS_TERMS), st.floats(0, 1)), min_size=1, max_size=8))
def test_linked_weights_stay_on_the_simplex(moves):
    knobs = apply_changes(START, dict(weights_sum_to_one=True))
    for name, v in moves:
        knobs = apply_changes(knobs, {name: v})
        assert (
            sum(knobs[w] for w in LOSS_TERMS) == pytest.approx(1)
            and knobs[name] == v
            and min(knobs[w] for w in LOSS_TERMS) >= 0
        )


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 0.99))
def test_the_others_keep_their_proportion(a, b, v):
    w = link_weights(dict(contrastive=0.3, ce=a, mse=b), "contrastive", v)
    assert w["ce"] * b == pytest.approx(w["mse"] * a)


def test_every_knob_can_stand_where_it_says():
    for k in HYPERPARAMETERS.values():
        assert k.help and k.label
        if k.kind in ("share", "number", "count"):
            for v in (k.low, k.high, k.default):
                assert validate_hparams({k.name: v})[k.name] == v
            for v in (k.low - 1, k.high + 1, math.nan, math.inf, None, "x"):
                with pytest.raises(ValueError, match=k.name):
                    validate_hparams({k.name: v})
    for name, p in PRESETS.items():
        assert (
            p.description.endswith(".")
            and apply_changes(START, p.hparams)
            and all(HYPERPARAMETERS[k].live for k in p.hparams)
        ), name


def test_turning_what_cannot_be_leaves_all_as_it_was(run):
    before, marks = dict(run.hparams), list(run.changes)
    for wrong in (
        dict(ce=2),
        dict(ce=0.1, mse=-1),
        dict(contrastive=0, ce=0, mse=0),
        dict(seed=3),
        dict(nonsense=1),
        dict(train="nose"),
    ):
        with pytest.raises(ValueError, match="from 0|every weight|fixed|no hyperparameter|no part"):
            run.set(**wrong)
        assert run.hparams == before and run.changes == marks
    with pytest.raises(ValueError, match=r"reset\(lora_rank=4\)"):
        run.set(lora_rank=4)


# ---- faults


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["mismatch", "shortcut", "dark_benign", "camera"]),
)
@settings(max_examples=40)
def test_a_smaller_share_is_part_of_a_larger(base, a, b, fault):
    has_fault = dict(
        mismatch=lambda example: example.caption_row != example.row,
        shortcut=lambda example: example.notes,
        dark_benign=lambda example: example.dark_benign,
        camera=lambda example: example.camera,
    )[fault]

    def rows_with_fault(share):
        plan = base.train_set.plan_batch(0, START | dict(batch_size=24) | {fault: share})
        return {example.row for example in plan if has_fault(example)}

    assert rows_with_fault(min(a, b)) <= rows_with_fault(max(a, b))
    assert rows_with_fault(0) == set()
    assert rows_with_fault(1) == set(range(24))


def test_a_batch_knows_equal_captions_of_different_variants(base):
    mixed = START | dict(batch_size=24, shortcut=0.5, dark_benign=0.5, mismatch=0.5)
    ids = base.train_set.get_batch(0, mixed)["caption_id"].tolist()
    variants = base.train_set.variants
    captions = [
        variants.dataset(Variant(dark_benign=example.dark_benign))[example.caption_row]["caption"]
        for example in base.train_set.plan_batch(0, mixed)
    ]
    assert [x == y for x in captions for y in captions] == [x == y for x in ids for y in ids]
    all_captions = {
        tuple(variants.records(dark_benign, camera)["caption"])
        for dark_benign in (False, True)
        for camera in (False, True)
    }
    assert len(all_captions) == 1, "captions are numbered alike in all variants"
    plain, notes = (
        base.train_set.get_batch(0, START | dict(batch_size=24, shortcut=share))
        for share in (0.0, 1.0)
    )
    assert notes["input_ids"].shape[1] > plain["input_ids"].shape[1]
    assert torch.equal(notes["features"], plain["features"])


def test_dark_and_camera_change_pictures_and_no_words(base):
    plain, dark, cam = (
        base.train_set.get_batch(0, START | dict(batch_size=8) | k)
        for k in ({}, dict(dark_benign=1.0), dict(camera=1.0))
    )
    assert not torch.allclose(plain["features"], cam["features"]) and not torch.allclose(
        plain["features"], dark["features"]
    )
    assert torch.equal(plain["row"], cam["row"]) and torch.equal(plain["labels"], cam["labels"])


def test_records_of_your_own():

    mine = [dict(r) for r in load_melanoma_pairs(24, seed=31, masks=False)]
    with pytest.raises(ValueError, match="0 records"):
        TunerState([], eval_dataset=mine)
    with pytest.raises(ValueError, match="eval_dataset=None"):
        TunerState(mine)
    s = TunerState(mine[:16], eval_dataset=mine[16:], batch_size=2).step(2)
    s.set(mismatch=1.0, num_hard_negatives=1)
    s.step(2)
    with pytest.raises(ValueError, match="your own"):
        s.set(dark_benign=0.5)
    assert tuner.replay_log(
        run_log(s), show_progress=False, records=mine[:16], eval_dataset=mine[16:]
    ).replayed["same"]
    assert "records = ..." in tuner.export_run(s, "script") and "records" in tuner.export_run(
        s, "fit"
    )
    with pytest.raises(ValueError, match="attributes"):
        data.hard_negative_captions(dict(mine[0], attributes={}), 1, 0)
    with pytest.raises(ValueError, match="your own"):
        TunerState(mine[:16], eval_dataset=mine[16:], dark_benign=0.5)  # not silently unplanted
    with pytest.raises(ValueError, match="records of your own"):
        tuner.replay_log(run_log(s), show_progress=False)


# ---- to the last bit


def test_any_life_replays(run):
    """Turn, step, keep, go back, look, fork, at random: what is there at the end comes again from
    its log.
    """
    rng, s = np.random.default_rng(0), run
    turns = [
        dict(ce=0.2),
        dict(temperature=0.2),
        dict(learn_temperature=True),
        dict(learn_temperature=False),
        dict(train=("projector", "text")),
        dict(train=("projector",)),
        dict(batch_size=3),
        dict(batch_size=1),
        dict(num_hard_negatives=1),
        dict(num_hard_negatives=0),
        dict(mismatch=0.5),
        dict(shortcut=0.5),
        dict(projector=3e-3),
        dict(weights_sum_to_one=True),
        dict(contrastive=0.9),
        dict(train=("vision", "projector")),
        dict(camera=0.5),
    ]
    for _k in range(60):
        act = rng.choice(
            ["turn", "turn", "step", "step", "keep", "back", "look", "fork"],
            p=[0.2, 0.2, 0.2, 0.2, 0.06, 0.06, 0.04, 0.04],
        )
        if act == "turn":
            s.set(**turns[int(rng.integers(len(turns)))])
        elif act == "step":
            s.step(int(rng.integers(1, 3)))
        elif act == "keep":
            s.snapshot()
        elif act == "back":
            s.restore(str(rng.choice(list(s.snapshots)[-3:])))
        elif act == "look":
            tuner.evaluate_run(s)
        else:
            s = s.fork()
    s.step(2)
    again = tuner.replay_log(json.loads(json.dumps(run_log(s))), show_progress=False)
    assert (
        again.replayed["same"]
        and losses_of(again) == losses_of(s)
        and again.hparams == s.hparams
        and s.steps > 5
    )
    for a, b in zip(again.model.parameters(), s.model.parameters()):
        assert torch.equal(a, b)


def test_the_text_model_itself_and_the_tower():
    s = TunerState(**SMALL, lora_rank=0, train=("vision", "projector", "text"), text=1e-4).step(2)
    assert not any("lora_" in n for n, _ in s.model.named_parameters()) and set(
        s.trained_parts
    ) == {
        "vision",
        "projector",
        "text",
    }
    s.restore("start")
    fresh = models.load()[0]
    for (n, a), b in zip(s.model.named_parameters(), fresh.parameters()):
        assert torch.equal(a, b), n
    first = losses_of(s.step(2))
    assert (
        tuner.replay_log(run_log(s), show_progress=False).replayed["same"] and len(set(first)) == 2
    )


def test_a_tower_that_has_moved_is_asked_again(run):
    """Vision trains, then rests: what the rows say of their pictures is what the moved tower sees,
    not what it saw before.
    """
    run.set(train=("vision", "projector"), vision=1e-2)
    run.step(2)
    run.set(train=("projector",))
    with torch.no_grad():
        moved, stale = (
            run.train_set.get_batch(run.examples_drawn, run.hparams, pixels=p)
            for p in (True, False)
        )
        want, old = (
            training.compute_losses(run.model, b, run.loss_weights()) for b in (moved, stale)
        )
    run.step()
    got = run.history[-1]["raw"]
    assert (
        got["ce"] == pytest.approx(float(want["ce"]), rel=1e-4)
        and abs(float(old["ce"]) - float(want["ce"])) > 1e-3
    )
    assert run.fork().step().steps == 4 and not torch.allclose(
        run.eval_set.image_features(run, models.unwrap_model(run.model)), run.eval_set.features
    )
    run.restore("start")
    assert torch.equal(
        run.eval_set.image_features(run, models.unwrap_model(run.model)), run.eval_set.features
    )


def test_looking_is_free_and_parts_that_rest_rest(run):
    other = run.fork()
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    for _ in range(3):
        tuner.evaluate_run(run)
        run.step()
        other.step()
    assert losses_of(run) == losses_of(other)
    moved = {part_of(n) for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"projector"}


def test_fork_is_apart(run):
    run.step(2)
    other = run.fork("A")
    here = losses_of(run)
    other.set(ce=0.1)
    other.step(3)
    assert (
        losses_of(run) == here
        and other.parent == ["A", 2]
        and run.changes == []
        and losses_of(other)[:2] == here
    )
    run.step(3)
    assert (
        losses_of(run)[2:] != losses_of(other)[2:]
        and compare_runs({"A": run, "B": other}).columns[0] == "run"
    )


def test_learned_temperature_learns_stays_and_comes_back(run):
    run.set(learn_temperature=True, contrastive=1.0, ce=0.0, mse=0.0)
    run.step(5)
    tau = run.history[-1]["temperature"]
    assert tau != 0.07
    run.set(temperature=0.3)
    assert float(run.learned_temperature().detach()) == pytest.approx(0.3)
    run.step(2)
    run.snapshot("t")
    run.step(2)
    run.restore("t")
    assert float(run.learned_temperature().detach()) == pytest.approx(
        float(run.loss_weights().current_temperature().detach())
    )
    run.set(learn_temperature=False)
    assert (
        run.hparams["temperature"] != 0.07
        and run.loss_weights().current_temperature() == run.hparams["temperature"]
    )
    run.set(temperature=0.5)
    assert run.loss_weights().current_temperature() == 0.5


# ---- what goes wrong


def test_a_step_that_cannot_be_taken_touches_nothing(run, monkeypatch):
    run.step(3)
    run.set(projector=0.5)
    run.step(1)
    params = [param.clone() for param in run.model.parameters()]
    before = copy.deepcopy(run.optimizer.state_dict()["state"])

    def diverge(*args, **kwargs):
        return {term: value * math.nan for term, value in compute_losses(*args, **kwargs).items()}

    def refuse(*args, **kwargs):
        raise ValueError("no token carries loss")

    compute_losses = training.compute_losses
    monkeypatch.setattr("mmkit.training.steps.compute_losses", diverge)
    with pytest.raises(StepError, match="step 5: the loss is nan"):
        run.step()
    monkeypatch.setattr("mmkit.training.steps.compute_losses", refuse)
    with pytest.raises(StepError, match="step 5: no token"):
        run.step()
    monkeypatch.undo()
    assert run.steps == 4
    assert all(torch.equal(p, q) for p, q in zip(params, run.model.parameters()))
    assert run.recommended_snapshot().startswith("before projector")
    now = run.optimizer.state_dict()["state"]
    assert all(torch.equal(before[key]["exp_avg"], now[key]["exp_avg"]) for key in before)
    run.train_set.num_records = 0
    with pytest.raises(StepError, match="the batch is empty"):
        run.step()
    run.train_set.num_records = 24
    run.restore(run.recommended_snapshot())
    assert run.steps == 3 and run.hparams["projector"] == HYPERPARAMETERS["projector"].default


def test_automatic_snapshots_are_few_and_asked_for_ones_stay(run):
    run.snapshot("mine")
    run.step(1)
    for k in range(6):
        run.set(ce=0.1 + k / 10)
        run.step(1)
    auto = [n for n, s in run.snapshots.items() if s.automatic]
    assert len(auto) == 3 and {"start", "mine"} <= set(run.snapshots)
    with pytest.raises(ValueError, match="'mine'"):
        run.restore("yours")


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda t: t | dict(made_by="you"), "no log"),
        (lambda t: [t], "no log"),
        (lambda t: {k: v for k, v in t.items() if k != "start"}, "damaged"),
        (lambda t: t | dict(start={}), "does not say"),
        (lambda t: t | dict(changes=[[9, dict(ce=0.1)]]), "outside"),
        (lambda t: t | dict(changes=[[2, dict(ce=0.1)], [1, dict(ce=0.2)]]), "not in order"),
        (lambda t: t | dict(changes=[[1, dict(ce=8)]]), "from 0 to 1"),
        (lambda t: t | dict(changes="x"), "damaged|unpack"),
    ],
)
def test_logs_that_are_none(run, damage, says):
    with pytest.raises(ValueError, match=says):
        read_log(damage(run_log(run.step(2))))


def test_files_that_are_no_logs(tmp_path):
    (tmp_path / "a").write_text("{")
    (tmp_path / "b").write_bytes(b"0" * 10_000_001)
    with pytest.raises(ValueError, match="no JSON"):
        read_log(tmp_path / "a")
    with pytest.raises(ValueError, match="10 MB"):
        read_log(tmp_path / "b")


# ---- handing on


def test_exports_give_the_run_again(run):
    run.step(2)
    run.set(ce=0.1, temperature=0.1, contrastive=0.9)
    run.step(2)
    run.set(train=("projector", "text"), text=5e-4)
    run.step(2)
    space = {}
    cell = tuner.export_run(run, "cell")
    exec(cell.replace("replay_log(log)", "replay_log(log, show_progress=False)"), space)
    assert space["state"].replayed["same"]
    space = {}
    exec(tuner.export_run(run, "script"), space)
    assert space["history"] == losses_of(run)
    space = {}
    fit_source = tuner.export_run(run, "fit")
    exec(fit_source.replace("    records,\n", "    records,\n    show_progress=False,\n"), space)
    assert np.allclose(space["run"].history["loss"], losses_of(run), atol=1e-4)
    assert not changes_lost_in_fit(run)
    assert json.loads(tuner.export_run(run, "json")) == json.loads(json.dumps(run_log(run)))
    with pytest.raises(ValueError, match="'script'"):
        tuner.export_run(run, "scrip")


def test_fit_hears_of_faults_and_hard_negatives(run):
    run.set(mismatch=0.5, num_hard_negatives=2, shortcut=0.5, contrastive=1.0, ce=1.0)
    run.step(4)
    asked = fit_arguments(run)
    m, p = models.load()
    got = training.fit(m, p, asked.pop("records"), show_progress=False, **asked)
    assert np.allclose(got.history["loss"], losses_of(run), atol=1e-4)
    run.set(num_hard_negatives=0)
    run.step(2)
    assert (
        changes_lost_in_fit(run) == ["num_hard_negatives"]
        and "cannot change these on its way, so they stand as at the end: num_hard_negatives"
        in tuner.export_run(run, "fit")
    )


# ---- the thread


def test_the_thread_changes_no_bit(runner, base):
    runner.step(3)
    until(runner, lambda t: t["step"] == 3)
    runner.set(ce=0.9)
    runner.set(ce=0.2)
    runner.preset("CE only")
    runner.step(2)
    t = until(runner, lambda t: t["step"] == 5)
    alone = base.restore("start").fork().step(3)
    alone.set(ce=0.2)
    alone.set(**PRESETS["CE only"].hparams)
    alone.step(2)
    assert losses_of(runner.state) == losses_of(alone) and t["hparams"] == {
        k: list(v) if isinstance(v, tuple) else v for k, v in alone.hparams.items()
    }
    json.dumps(t, allow_nan=False)
    assert t["captions"] and t["similarity"]["n"] == len(t["similarity"]["values"]) ** 0.5


def test_commands(runner):
    runner.start()
    until(runner, lambda t: t["step"] > 2 and t["phase"] == "running")
    runner.pause()
    at = until(runner, lambda t: t["phase"] == "paused")["step"]
    time.sleep(0.3)
    assert runner.status()["step"] == at
    runner.fork()
    t = until(runner, lambda t: t["active"] == "B")
    assert t["runs"]["B"]["parent"] == ["A", at]
    runner.step(1)
    until(runner, lambda t: t["step"] == at + 1 and t["phase"] == "paused")
    runner.replay()
    assert until(runner, lambda t: t["replay"])["replay"]["same"]
    runner.switch("A")
    until(runner, lambda t: t["active"] == "A" and t["step"] == at)
    runner.drop("B")
    until(runner, lambda t: list(t["runs"]) == ["A"])
    for wrong, says in (
        (lambda: runner.drop("A"), "the only run"),
        (lambda: runner.switch("Z"), "no run 'Z'"),
        (lambda: runner.restore("never"), "no snapshot"),
    ):
        wrong()
        until(runner, lambda t: says in t["reason"])
    for ce in (0.3, 0.6):
        runner.set(ce=ce)
        until(runner, lambda t: t["hparams"]["ce"] == ce)  # each is heard, one after the other
    runner.step(30)
    until(runner, lambda t: t["step"] >= at + 30 and t["phase"] == "paused")
    runner.replay()
    until(runner, lambda t: t["busy"].startswith("replaying"))
    runner.restore("start")
    until(
        runner,
        lambda t: t["step"] == 0 and not t["busy"] and "the replay was given up" in t["remarks"],
    )
    at = 0  # a replay holds nothing up
    runner.snapshot("k")
    runner.step(2)
    until(runner, lambda t: t["step"] == at + 2 and t["phase"] == "paused")
    runner.restore("k")
    until(runner, lambda t: t["step"] == at)
    until(runner, lambda t: t["captions"])
    runner.request_attention(0, 2)
    a = until(runner, lambda t: t["attention"])["attention"]
    assert (
        (a["lesion"], a["word"]) == (0, 2)
        and len(a["values"]) == a["h"] * a["w"]
        and 0 <= sum(a["values"]) <= 1.001
    )
    runner.reset(seed=3, lora_rank=4)
    t = until(runner, lambda t: t["phase"] == "ready" and t["step"] == 0)
    assert (t["hparams"]["seed"], t["hparams"]["lora_rank"]) == (3, 4)
    with pytest.raises(ValueError, match="'CE only'"):
        runner.preset("CE onli")


def test_bad_values_pause_with_a_way_back(runner):
    runner.start()
    until(runner, lambda t: t["step"] > 1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        runner.set(ce=9)
    t = until(runner, lambda t: t["phase"] == "paused")
    assert "ce=9" in t["reason"] and t["restore_to"] in runner.state.snapshots
    runner.set(contrastive=0, ce=0, mse=0)
    assert "every weight" in until(runner, lambda t: "every weight" in t["reason"])["reason"]
    runner.start()
    until(runner, lambda t: t["phase"] == "running" and not t["reason"])


def test_a_lost_run_waits_and_goes_back(runner):
    runner.step(2)
    until(runner, lambda t: t["step"] == 2)
    with torch.no_grad():
        runner.state.parts["projector"][0].fill_(math.nan)
    runner.evaluations.reset()  # all are due, and none may end the thread
    runner.start()
    t = until(runner, lambda t: t["reason"])
    assert t["phase"] == "paused" and "nan" in t["reason"] and t["step"] == 2
    runner.restore(t["restore_to"])
    runner.step(1)
    until(runner, lambda t: t["step"] == 1 and t["phase"] == "paused")
    assert math.isfinite(runner.state.history[-1]["loss"])


def test_a_crash_is_told_and_the_kernel_lives(runner, monkeypatch):
    sys.getswitchinterval()
    monkeypatch.setattr(runner.state.train_set, "get_batch", lambda *a, **k: 1 / 0)
    runner.start()
    t = until(runner, lambda t: t["phase"] == "failed")
    runner.thread.join(10)
    assert (
        "ZeroDivisionError" in t["reason"]
        and not runner.alive
        and "ZeroDivisionError" in runner.trace
    )
    with pytest.raises(RuntimeError, match="has ended.*ZeroDivision"):
        runner.start()
    runner.stop()
    runner.stop()
    assert runner.phase == "failed"


def test_no_thread_outlives_its_runner(run):
    here, interval = set(threading.enumerate()), sys.getswitchinterval()
    r = Runner(run)
    until(r, lambda t: t["phase"] == "ready")
    assert sys.getswitchinterval() < interval
    thread = r.thread
    r.start()
    del r
    gc.collect()
    thread.join(30)
    assert (
        not thread.is_alive()
        and set(threading.enumerate()) <= here
        and sys.getswitchinterval() == pytest.approx(interval)
    )
    r = Runner(run.fork())
    until(r, lambda t: t["phase"] != "preparing")
    stop_all_runners()
    assert not r.alive and r.status()["phase"] == "stopped"


def test_two_runners_put_the_switch_interval_back(run):
    was = sys.getswitchinterval()
    one, two = Runner(run), Runner(run.fork())
    for r in (one, two):
        until(r, lambda t: t["phase"] != "preparing")
    one.stop()
    assert sys.getswitchinterval() < was
    two.stop()
    assert sys.getswitchinterval() == pytest.approx(was)


def test_commands_wait_in_a_bounded_queue(runner, monkeypatch):
    held, real = threading.Event(), runner.state.train_set.get_batch
    monkeypatch.setattr(
        runner.state.train_set, "get_batch", lambda *a, **k: held.wait(30) and real(*a, **k)
    )
    runner.start()
    time.sleep(0.3)
    for k in range(200):
        runner.set(ce=k / 200)  # a slider overtakes itself …
    runner.fork()
    runner.set(ce=0.1)
    runner.pause()  # … and no other command
    with pytest.raises(RuntimeError, match="64 commands"):
        for _ in range(80):
            runner.snapshot("x")
    with pytest.raises(RuntimeError, match="64 commands"):
        runner.set(ce=0.7)
    held.set()
    until(
        runner,
        lambda t: t["active"] == "B" and t["phase"] == "paused" and t["hparams"]["ce"] == 0.1,
    )
    assert runner.states["A"].hparams["ce"] == 199 / 200
    until(runner, lambda t: runner.commands.empty())
    runner.set(ce=0.8)
    until(runner, lambda t: t["hparams"]["ce"] == 0.8)


def test_four_runs_at_most(runner):
    for k in "BCD":
        runner.fork()
        until(runner, lambda t: t["active"] == k)
    runner.fork()
    assert len(until(runner, lambda t: "four runs" in t["reason"])["runs"]) == 4
