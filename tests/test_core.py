"Intervals that cover what they claim; files written whole; errors that say what is wrong."

import base64
import io
import json
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score

from mmkit import core
from mmkit.core.display import make_progress_bar, make_table, make_thumbnail, show_source
from mmkit.core.runtime import (
    atomic_path,
    atomic_write,
    available_cpu_count,
    dump_json,
    evict_lru,
)
from mmkit.core.sliders import is_interactive
from mmkit.core.stats import (
    Interval,
    bootstrap,
    group_indices,
    macro_f1,
    paired_bootstrap,
    percentile_interval,
    roc_auc,
    two_sample_auc,
)

flips = st.lists(st.integers(0, 1), min_size=1, max_size=60)


@pytest.mark.parametrize("stat", [np.mean, np.median, np.std])
def test_bootstrap_agrees_with_scipy(stat):
    x = np.random.default_rng(0).lognormal(size=80)
    theirs = stats.bootstrap(
        (x,), stat, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    ours = bootstrap(stat, x, n_resamples=5000)
    assert ours.value == pytest.approx(stat(x))
    assert ours[1:] == pytest.approx(tuple(theirs), rel=0.04)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
def test_bootstrap_width_follows_the_confidence_level(level):
    x = np.random.default_rng(1).normal(size=200)
    half = stats.norm.ppf((1 + level) / 2) * x.std() / len(x) ** 0.5
    assert bootstrap(np.mean, x, n_resamples=3000, confidence_level=level).width == pytest.approx(
        2 * half, rel=0.08
    )


def test_grouped_bootstrap_is_wider_when_patients_differ():
    rng = np.random.default_rng(2)
    patient = np.repeat(np.arange(50), 8)
    hit = (rng.random(400) < rng.beta(0.7, 0.3, 50)[patient]).astype(int)
    assert bootstrap(np.mean, hit, groups=patient).width > 1.6 * bootstrap(np.mean, hit).width


def test_grouped_bootstrap_covers_the_truth_and_ungrouped_does_not():
    rng, held = np.random.default_rng(3), {"patient": 0, "lesion": 0}
    patient = np.repeat(np.arange(60), 6)
    for _ in range(150):
        hit = (rng.random(360) < rng.beta(1.4, 0.6, 60)[patient]).astype(int)
        held["patient"] += bootstrap(np.mean, hit, groups=patient, n_resamples=200).covers(0.7)
        held["lesion"] += bootstrap(np.mean, hit, n_resamples=200).covers(0.7)
    assert held["patient"] >= 0.88 * 150 and held["lesion"] < 0.85 * 150, held


@pytest.mark.parametrize("missing", [None, float("nan"), "", np.datetime64("NaT"), "<NA>"])
def test_items_without_a_group_stand_alone(missing):
    x = np.random.default_rng(4).random(40)
    alone = bootstrap(np.mean, x, groups=[missing] * 40, n_resamples=300)
    assert alone.width == pytest.approx(bootstrap(np.mean, x, n_resamples=300).width, rel=0.2)
    assert len(group_indices([missing] * 3 + ["p1"] * 2, 5)) == 4


def test_one_group_has_no_interval():
    assert np.isnan(bootstrap(np.mean, [0.1, 0.4, 0.9], groups=["p1"] * 3).low)


@pytest.mark.parametrize("defined, has_interval", [(50, True), (49, False), (0, False)])
def test_interval_needs_half_of_the_resamples(defined, has_interval):
    "Counted on draws that we choose; and `bootstrap` uses the same rule."
    draws = [1.0] * defined + [np.nan] * (100 - defined)
    assert np.isfinite(percentile_interval(1.0, draws).low) == has_interval
    calls = iter([1.0, *draws])
    interval = bootstrap(lambda _: next(calls), [0, 1], n_resamples=100)
    assert np.isfinite(interval.low) == has_interval


@given(flips)
@settings(max_examples=60, deadline=None)
def test_bootstrap_interval_stays_in_range(x):
    i = bootstrap(np.mean, x, n_resamples=60)
    assert i.value == pytest.approx(np.mean(x))
    if len(x) > 1:
        assert 0 <= i.low <= i.high <= 1
    if len(set(x)) == 1 and len(x) > 1:
        assert i.low == i.high == x[0]


@given(flips, st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_same_seed_same_interval_for_any_container(x, seed):
    import torch

    a, b, c = (
        bootstrap(np.mean, f(x), n_resamples=20, seed=seed) for f in (list, np.array, torch.tensor)
    )
    assert str(a) == str(b) == str(c)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40
    )
)
@settings(max_examples=40, deadline=None)
def test_paired_bootstrap_is_antisymmetric(rows):
    y, a, b = np.array(rows).T

    def acc(y, p):
        return (y == p).mean()

    ab, ba = (
        paired_bootstrap(acc, y, a, b, n_resamples=50),
        paired_bootstrap(acc, y, b, a, n_resamples=50),
    )
    assert ab == pytest.approx((-ba.value, -ba.high, -ba.low), abs=1e-12)
    assert paired_bootstrap(acc, y, a, a, n_resamples=20) == (0, 0, 0)


def test_paired_bootstrap_is_sharper_than_two_intervals():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 300)
    a = np.where(rng.random(300) < 0.3, 1 - y, y)
    b = np.where((a != y) & (rng.random(300) < 0.2), y, a)

    def acc(y, p):
        return (y == p).mean()

    assert (
        paired_bootstrap(acc, y, b, a).low > 0
        and bootstrap(acc, y, a).high > bootstrap(acc, y, b).low
    )


def test_undefined_resamples_are_left_out():
    y, p = np.array([1] + [0] * 30), np.linspace(1, 0, 31)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        i = bootstrap(
            roc_auc_score, y, p, n_resamples=200
        )  # a third of the resamples has no positive at all
    assert i.low <= i.value <= i.high
    rare = bootstrap(
        lambda y: 1.0 if y.sum() == 3 else float("nan"),
        np.array([1, 1, 1] + [0] * 300),
        n_resamples=100,
    )
    assert rare.value == 1 and np.isnan(rare.low)


@pytest.mark.parametrize(
    "kw,says",
    [
        ({"confidence_level": 95}, "0.95"),
        ({"confidence_level": 0}, "share"),
        ({"n_resamples": 0}, "at least once"),
        ({"groups": [1, 2]}, "one entry per item"),
    ],
)
def test_bootstrap_errors_name_the_value_and_the_fix(kw, says):
    with pytest.raises(ValueError, match=says):
        bootstrap(np.mean, [1, 0, 1], **kw)


def test_bootstrap_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap(np.mean, [])


def test_interval_format():
    i = Interval(0.7149, 0.66, 0.751)
    assert str(i) == repr(i) == "0.71 [0.66, 0.75]" and f"{i:.3f}" == "0.715 [0.660, 0.751]"
    assert i.covers(0.7) and not i.covers(0.8) and i.width == pytest.approx(0.091)


def test_table_escapes_html_and_aligns_text():
    t = make_table([{"a": '<b>"x"</b>', "n": None}, {"a": 2 / 3, "n": Interval(1, 0, 2)}])
    assert "<b>" not in t._repr_html_() and "&lt;b&gt;&quot;x" in t._repr_html_()
    assert (
        str(t).splitlines()[0].split() == ["a", "n"]
        and "0.667" in str(t)
        and "–" in str(t)
        and len(t) == 2
    )
    assert str(make_table([])) == "(no rows)" and str(make_table([[1, 2]])) == "1  2"
    with pytest.raises(ValueError, match="one cell per column"):
        make_table([[1, 2], [3]])


@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=5))
def test_table_html_holds_any_text(rows):
    html = make_table(rows, ["a", "b"])._repr_html_()
    assert html.count("<td") == 2 * len(rows) and html.count("<tr>") == len(rows) + 1


def test_seed_everything_seeds_all_three():
    import random

    import torch

    def draw():
        return (
            core.seed_everything(9).random(),
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
        )

    assert draw() == draw()


def test_device_follows_the_environment(monkeypatch):
    monkeypatch.setenv("MMKIT_DEVICE", "cpu")
    assert core.default_device() == "cpu" and available_cpu_count() >= 1


def test_palette_by_attribute_name_and_number():
    p = core.PALETTE
    assert (
        p.blue == p["blue"] == p[0] and len(set(p)) == len(p) and all(c.startswith("#") for c in p)
    )


def test_progress_bar_and_interact_without_a_notebook():
    assert list(make_progress_bar(range(3), desc="counting")) == [0, 1, 2]
    seen = []
    core.interact(lambda a, b: seen.append((a, b)), a=(0, 10, 1, 4), b=["x", "y"])
    assert seen == [(4, "x")] and not is_interactive()


# ---- files


def test_atomic_write_leaves_the_old_file_when_the_writer_fails(tmp_path):
    file = tmp_path / "log.json"
    atomic_write(file, "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(file) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError("disk")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    atomic_write(file, b"new\r\n")
    assert file.read_bytes() == b"new\r\n"


def test_atomic_writers_do_not_share_a_temporary_file(tmp_path):
    file = tmp_path / "log.json"
    with atomic_path(file) as one, atomic_path(file) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert file.read_text() == "1" and list(tmp_path.iterdir()) == [file]


def test_lru_eviction_keeps_the_newest_and_what_is_in_use(tmp_path):
    for age in range(4):
        folder = tmp_path / str(age)
        folder.mkdir()
        (folder / "data").write_bytes(b"0" * 100)
        os.utime(folder, (1e9 - age, 1e9 - age))
    removed = evict_lru(tmp_path.iterdir(), 200, in_use=lambda path: path.name == "3")
    assert [path.name for path in removed] == ["2"]
    evict_lru(tmp_path.iterdir(), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_json_has_no_nan():
    value = {"loss": [np.nan, np.float32(np.inf), 0.5], "steps": np.arange(2), "n": np.int64(3)}
    assert json.loads(dump_json(value)) == {"loss": [None, None, 0.5], "steps": [0, 1], "n": 3}
    with pytest.raises(TypeError, match="serializable"):
        dump_json({"model": object()})


# ---- scores


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
def test_auc_counts_ties_half(pairs):
    positives = [score for label, score in pairs if label]
    negatives = [score for label, score in pairs if not label]
    by_hand = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    expected = np.mean(by_hand) if by_hand else np.nan
    assert two_sample_auc(positives, negatives) == pytest.approx(expected, nan_ok=True)
    labels, scores = zip(*pairs)
    assert roc_auc(labels, scores) == pytest.approx(expected, nan_ok=True)


def test_macro_f1_agrees_with_sklearn():
    rng = np.random.default_rng(0)
    truth, answers = rng.integers(0, 3, (2, 200))
    counts = np.zeros((3, 4))
    np.add.at(counts, (truth, answers), 1)
    assert macro_f1(counts) == pytest.approx(f1_score(truth, answers, average="macro"))
    counts[1] = 0  # a class that does not occur, though it is answered
    assert macro_f1(counts) < macro_f1(counts[:, [0, 2, 3]][[0, 2]])
    assert np.isnan(macro_f1(np.diag([5, 0])))


# ---- display


def test_thumbnail_is_small_and_never_enlarged():
    def size(*arguments):
        data = base64.b64decode(make_thumbnail(*arguments).partition(",")[2])
        return Image.open(io.BytesIO(data)).size

    assert size(np.zeros((300, 600, 3)), 100) == (100, 50)
    assert size(Image.new("L", (20, 10)), 100) == (20, 10)


def test_shown_source_is_escaped():
    page = show_source(make_table)
    assert "def make_table(" in page.text and "-&gt; Table" in page.page
