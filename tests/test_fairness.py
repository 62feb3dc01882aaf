"""Group scores agree with scikit-learn, gaps with their definition; the control finds what was
planted and leaves chance alone; what cannot be said is said; cards hold the report's numbers.
"""

import json
import math
import os
import pathlib
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mmkit import audit, evaluate
from mmkit.audit.card_sections import CARD_CHECKS, NOT_MEASURED, summarize_dataset
from mmkit.audit.group_gaps import measure_gap_amplification, minimum_detectable_gap
from mmkit.audit.groups import assign_groups
from mmkit.audit.linear_probe import fit_linear_probe
from mmkit.audit.synthetic import (
    LabeledImages,
    render_labeled_images,
    sample_balanced,
    sample_exaggerated,
    subgroup_counts,
)
from mmkit.audit.weighted_metrics import LOWER_IS_BETTER, permute_groups
from mmkit.core.claims import load_claim
from mmkit.core.stats import Interval, bootstrap, expected_calibration_error
from mmkit.data.clinical import load_fitzpatrick17k, load_pad_ufes_20
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.data.records import make_record
from mmkit.data.splits import LeakageReport
from mmkit.lesions.lesion import ATTRIBUTE_LEVELS

REAL = pathlib.Path(os.environ.get("MMKIT_REAL") or ROOT.parent / "shared" / "real")
few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def people(y, group=None, patient=None, **more):  # records
    return [
        dict(
            label=None if v is None else "melanoma" if v else "benign",
            patient=None if patient is None else patient[k],
            attributes=dict(skin=None if group is None else group[k]),
            **{n: c[k] for n, c in more.items()},
        )
        for k, v in enumerate(y)
    ]


def world(n=240, seed=0, worse=0.0, groups=("light", "dark")):  # y, scores, group, patient
    r = np.random.default_rng(seed)
    y, g, p = (
        r.random(n) < 0.5,
        np.array([groups[k] for k in r.integers(0, len(groups), n)], dtype=object),
        np.repeat(np.arange(n // 2), 2),
    )
    g = g[::2].repeat(2)
    s = 1 / (1 + np.exp(-(r.normal(size=n) + 2.5 * (y - 0.5) - worse * (g == groups[-1]) * y)))
    return y, s, g, p


# --- parity
def test_every_group_agrees_with_scikit_learn():
    y, s, g, p = world(400, 1)
    s = np.round(s, 1)  # ties
    got, c = audit.compute_group_metrics(people(y, g, p), s, n_resamples=50), s >= 0.5
    for name in (*ATTRIBUTE_LEVELS["skin"][::2], None):
        on = g == name if name else np.ones(len(y), bool)
        at = (lambda m: got.by_group[m][name]) if name else (lambda m: got.overall[m])
        bins = np.minimum((s[on] * 10).astype(int), 9)
        ece = sum(abs((s[on] - y[on])[bins == b].sum()) for b in range(10)) / on.sum()
        want = dict(
            recall=sk.recall_score(y[on], c[on]),
            precision=sk.precision_score(y[on], c[on]),
            specificity=sk.recall_score(~y[on], ~c[on]),
            Brier=sk.brier_score_loss(y[on], s[on]),
            AUROC=sk.roc_auc_score(y[on], s[on]),
            ECE=ece,
        )
        for m, v in want.items():
            assert at(m).value == pytest.approx(v, abs=1e-12), (name, m)
        assert name is None or got.counts[name] == dict(
            records=on.sum(),
            patients=len(set(p[on])),
            positive=y[on].sum(),
            negative=(~y[on]).sum(),
            predicted_positive=c[on].sum(),
        )


def test_intervals_are_the_bootstrap_by_patient():
    y, s, g, p = world(300, 2)
    got = audit.compute_group_metrics(people(y, g, p), s, n_resamples=1500, seed=3)
    c = s >= 0.5
    a = bootstrap(lambda y, c: c[y].mean(), y, c, groups=p, n_resamples=1500)
    b = got.overall["recall"]
    assert abs(a.low - b.low) < 0.02 and abs(a.high - b.high) < 0.02

    def auc(y, s):
        return sk.roc_auc_score(y, s)

    pair = bootstrap(
        lambda y, s, d: auc(y[d], s[d]) - auc(y[~d], s[~d]),
        y,
        s,
        g == got.gaps["AUROC"].best,
        groups=p,
        n_resamples=500,
    )
    d = got.gaps["AUROC"].difference
    assert (
        d.value == pytest.approx(pair.value)
        and abs(d.low - pair.low) < 0.04
        and abs(d.high - pair.high) < 0.04
    )


def test_patients_are_drawn_whole():
    y, s, g, _ = world(200, 4)

    def many(v):
        return np.repeat(v, 6)

    alone, crowd = (
        audit.compute_group_metrics(people(many(y), many(g), p), many(s), n_resamples=400).overall[
            "recall"
        ]
        for p in (np.arange(1200), np.repeat(np.arange(200), 6))
    )
    assert crowd.width > 1.8 * alone.width


def test_captions_agree_with_evaluate():
    r = np.random.default_rng(0)

    def pick():
        return {a: str(r.choice(level)) for a, level in ATTRIBUTE_LEVELS.items()}

    truth = [pick() for _ in range(160)]
    said = [
        {a: t[a] if r.random() < 0.7 else pick()[a] for a in t} | dict(impression="melanoma")
        for t in truth
    ]
    ds = [
        make_record(
            label=str(r.choice(["melanoma", "benign"])),
            patient=str(k // 2),
            attributes=t,
            sex="female" if k % 3 else "male",
        )
        for k, t in enumerate(truth)
    ]
    got = audit.compute_group_metrics(ds, captions=said, by="sex", n_resamples=30)
    for sex in ("female", "male"):
        at = [k for k, d in enumerate(ds) if d["sex"] == sex]
        want = evaluate.score_captions([ds[k] for k in at], [said[k] for k in at], n_resamples=2)
        assert got.by_group["caption F1"][sex].value == pytest.approx(want.macro_f1.value)
    assert got.skipped_attributes == () and audit.compute_group_metrics(
        ds, captions=said, n_resamples=10
    ).skipped_attributes == ("skin",)


# --- properties
@few
@given(st.integers(0, 10**6))
def test_order_changes_nothing(seed):
    y, s, g, p = world(120, seed, 0.5)
    r = np.random.default_rng(seed).permutation(120)
    rs = people(y, g, p)
    a, b = (
        audit.compute_group_metrics(rs, s, n_resamples=20, min_patients=2),
        audit.compute_group_metrics([rs[k] for k in r], s[r], n_resamples=20, min_patients=2),
    )
    for m in a.by_group:
        for k in a.counts:
            x, z = a.by_group[m][k], b.by_group[m][k]
            assert x == z if isinstance(x, str) else x.value == pytest.approx(z.value), (m, k)
        if a.gaps[m]:
            assert a.gaps[m].difference.value == pytest.approx(b.gaps[m].difference.value) and (
                a.gaps[m].difference.value < 1e-9 or a.gaps[m].worst == b.gaps[m].worst
            )
    assert a.counts == b.counts


@few
@given(st.integers(0, 10**6))
def test_identical_groups_have_no_gap(seed):
    y, s, _, _ = world(100, seed)
    g = np.repeat(["light", "dark"], 100)
    got = audit.compute_group_metrics(
        people(np.r_[y, y], g, np.arange(200)), np.r_[s, s], n_resamples=60
    )
    for m, gap in got.gaps.items():
        if gap:
            assert (
                gap.difference.value == pytest.approx(0, abs=1e-9)
                and gap.difference.low <= 1e-9 <= gap.difference.high + 2e-9
                and gap.p_value > 0.9
                and not gap.significant
            ), m


def test_chance_is_left_alone_and_a_planted_gap_is_found():
    found = [
        audit.compute_group_metrics(
            people(*world(200, k, 0.0, tuple("abcd"))[::2], world(200, k)[3]),
            world(200, k, 0.0, tuple("abcd"))[1],
            n_resamples=120,
            min_patients=5,
        )
        .gaps["recall"]
        .significant
        for k in range(40)
    ]
    assert sum(found) <= 6, f"{sum(found)} false alarms in 40"
    hits = [
        audit.compute_group_metrics(people(y, g, p), s, n_resamples=120).gaps["recall"]
        for k in range(5)
        for y, s, g, p in [world(400, 100 + k, 2.0)]
    ]
    assert all(h.significant and h.worst == "dark" and 0 < h.p_value < 0.02 for h in hits)


def test_the_deal_keeps_sizes_shares_and_patients():
    r = np.random.default_rng(0)
    p = np.repeat(np.arange(60), 3)
    y = (r.random(60) < 0.4).repeat(3)
    G = r.integers(0, 3, 60).repeat(3)
    d = permute_groups(G, y, p, r)
    assert (d != G).any() and (d.reshape(-1, 3) == d[::3, None]).all(), "a patient keeps one group"
    assert [((d == k) & y).sum() for k in range(3)] == [
        ((k == G) & y).sum() for k in range(3)
    ] and (np.bincount(d) == np.bincount(G)).all()
    G = r.integers(0, 3, 180)
    d = permute_groups(G, y, p, r)  # a group that changes within patients, such as the site
    assert [((d == k) & y).sum() for k in range(3)] == [
        ((k == G) & y).sum() for k in range(3)
    ] and (d != G).any()


def test_prevalence_alone_makes_no_precision_gap():
    r = np.random.default_rng(3)
    g = np.repeat(["light", "dark"], 400)
    y = r.random(800) < np.repeat([0.5, 0.1], 400)
    s = np.where(r.random(800) < 0.8, y, ~y) * 0.8 + 0.1
    gap = audit.compute_group_metrics(people(y, g), s, n_resamples=200).gaps["precision"]
    assert gap.difference.value > 0.2 and not gap.significant


# --- what cannot be said
def test_small_groups_are_named_and_never_nan():
    y = np.r_[np.arange(60) % 2 == 0, [False] * 12, [True]]
    g = ["light"] * 60 + ["medium"] * 12 + ["dark"]
    s = np.random.default_rng(0).random(73)
    got = audit.compute_group_metrics(people(y, g), s, n_resamples=100)
    assert (
        got.by_group["recall"]["medium"] == "n/a: 0 patients with melanoma"
        and got.by_group["recall"]["dark"] == "n/a: 1 patient with melanoma"
        and got.by_group["Brier"]["medium"].value >= 0
    )
    assert (
        got.gaps["recall"] is None
        and got.worst_group() is None
        and "AUROC" in got.too_small["medium"]
        and "fewer than two groups" in got.describe()
    )
    assert not re.search(r"\bnan\b", str(got)) and json.loads(
        json.dumps(got.to_dict(), allow_nan=False)
    )
    assert any(t.startswith("dark: nothing is said") for t in got.caveats())


def test_small_means_few_patients_count():
    y = [k % 2 for k in range(60)]
    got = audit.compute_group_metrics(
        people(y, ["light"] * 30 + ["dark"] * 30, [*range(30), *["one"] * 30]),
        [0.6] * 60,
        n_resamples=20,
    )
    assert got.by_group["recall"]["dark"] == "n/a: 1 patient with melanoma" and isinstance(
        got.by_group["recall"]["light"], Interval
    ), "fifteen melanomas of one patient are one patient"


def test_the_best_and_the_worst_orient_by_measure():
    y, s, g, p = world(400, 12, 2.0)
    got = audit.compute_group_metrics(people(y, g, p), s, n_resamples=60)
    for m in ("Brier", "ECE", "recall", "AUROC"):
        v = {k: x.value for k, x in got.by_group[m].items()}
        worst = (max if m in LOWER_IS_BETTER else min)(v, key=v.get)
        assert got.gaps[m].worst == worst and got.gaps[m].difference.value == pytest.approx(
            abs(v["light"] - v["dark"])
        ), m


def test_the_chance_quantile_and_p_agree():
    for k in range(12):
        y, s, g, p = world(200, 50 + k, 0.6 * (k % 3))
        gap = audit.compute_group_metrics(people(y, g, p), s, n_resamples=400, min_patients=2).gaps[
            "recall"
        ]
        assert (
            0 < gap.p_value <= 1
            and gap.under_permutation.low
            <= gap.under_permutation.value
            <= gap.under_permutation.high
        )
        if abs(gap.p_value - 0.05) > 0.02:
            assert (gap.difference.value > gap.under_permutation.high) == (gap.p_value < 0.05), gap


def test_a_perfect_rate_has_an_interval():
    y = np.r_[[True] * 15, [False] * 30]
    got = audit.compute_group_metrics(
        people(y, ["light"] * 45), np.where(y, 0.9, 0.1), n_resamples=50
    ).by_group["recall"]["light"]
    assert got.value == 1 and 0.7 < got.low < 0.9 and got.high == 1


def test_unknown_groups_and_truths_are_counted():
    y, s, g, p = world(200, 7)
    g[:20] = None
    lab = [None if k % 10 == 5 else bool(v) for k, v in enumerate(y)]
    got = audit.compute_group_metrics(people(lab, g, p), s, n_resamples=20)
    assert (
        got.excluded == {"no group": 20, "no label": 20}
        and sum(c["records"] for c in got.counts.values()) == 162
    )
    assert any("20 records are left out: no group" in r for r in got.caveats())


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(scores=[0.1] * 4), "4 scores for 30"),
        (dict(scores=[0.1] * 29 + [1.2]), "score 29 is 1.2"),
        (dict(scores=[0.1] * 29 + [None]), "score 29 is nan"),
        (dict(scores=[0.1] * 29 + [-3]), "1/\\(1 \\+ exp"),
        (dict(), "nothing to report"),
        (dict(predictions=["melanoma"] * 29 + ["perhaps"]), "prediction 29 is 'perhaps'"),
        (dict(predictions=[0.3] * 30), "Probabilities go to"),
        (dict(captions=["x"]), "1 captions for 30"),
        (dict(scores=[0.1] * 30, labels=[1] * 3), "3 labels for 30"),
        (dict(scores=[0.1] * 30, labels=[2] * 30), "value 2"),
        (dict(scores=[0.1] * 30, by="clinic"), "no record has a column 'clinic'"),
        (dict(scores=[0.1] * 30, by="skin"), "all 30 records"),
        (dict(scores=[0.1] * 30, by=["a"]), "1 group names"),
        (dict(scores=[0.1] * 30, labels=[None] * 30, by="sex"), "no record has both"),
    ],
)
def test_faults_say_what_to_do(kw, says):
    with pytest.raises(ValueError, match=says):
        audit.compute_group_metrics(
            people([k % 2 for k in range(30)], sex=["male", "female"] * 15), **dict(by="sex") | kw
        )


def test_a_silent_model_is_wrong_either_way():
    got = audit.compute_group_metrics(
        people([1, 1, 0, 0] * 10, ["light"] * 40),
        predictions=["melanoma", None, "benign", "missing"] * 10,
        n_resamples=20,
    )
    assert (
        got.overall["recall"].value == 0.5
        and got.overall["specificity"].value == 0.5
        and got.overall["precision"].value == 1
    )


def test_groups_cross_and_names_are_escaped():
    y, s, g, p = world(200, 8, groups=("<b>light</b>", "a|b"))
    ds = people(y, None, p, sex=["male", "female"] * 100, site=list(g))
    got = audit.compute_group_metrics(ds, s, by=("sex", "site"), n_resamples=20, min_patients=3)
    assert list(got.counts)[0] == "female · <b>light</b>" and len(got.counts) == 4
    assert "<b>" not in got._repr_html_() and "&lt;b&gt;" in got._repr_html_() and "<b>" in str(got)
    card = audit.create_model_card("m", measurements={"skin": got}).text
    assert "<b>" not in card and r"a\|b" in card
    ages = assign_groups(people([1] * 5, age=[3, 40, 59, 80, None]), "age")
    assert ages[0] == ["under 40", "40–59", "40–59", "80 and over", None]


def test_pairs_of_the_world(cache):
    ds = load_melanoma_pairs(60, seed=5, size=32, masks=False)
    got = audit.compute_group_metrics(
        ds,
        [0.9 if label == "melanoma" else 0.2 for label in ds["label"]],
        by="camera",
        n_resamples=20,
        min_patients=1,
    )
    assert sum(c["records"] for c in got.counts.values()) == 60 and all(
        v.value == 1 for v in got.by_group["recall"].values() if not isinstance(v, str)
    )


# --- pictures, made and taken
@pytest.fixture(scope="module")
def sets():
    return render_labeled_images(subgroup_counts(60, 0.25, (0.5, 0.4)), 11), render_labeled_images(
        subgroup_counts(60, 0.25, (0.5, 0.4)), 12
    )


def test_drawn_as_ordered(sets):
    a, b = sets
    assert np.bincount(a.subgroup, minlength=4).tolist() == subgroup_counts(
        60, 0.25, (0.5, 0.4)
    ).tolist() and not set(a.patient) & set(b.patient)
    assert all(
        (r["attributes"]["skin"] == "dark") == d and (r["label"] == "melanoma") == m
        for r, d, m in zip(a.records(), a.dark_skin, a.melanoma)
    )
    assert len(a + b) == 120 and (a[np.arange(3)].images == a.images[:3]).all()
    loud = sample_exaggerated(a, 40, 2.0, 3)
    assert (
        loud.dark_skin.mean() == pytest.approx(0.25)
        and loud.melanoma[loud.dark_skin].mean() < a.melanoma[a.dark_skin].mean()
    )
    assert sample_exaggerated(a, 40, 1.0, 3).melanoma[:].mean() == pytest.approx(
        a.melanoma.mean(), abs=0.06
    )


def test_the_vae_is_seeded_leaves_the_dice_alone_and_draws_what_it_saw(sets):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    v, w = (
        audit.fit_vae(sets[0], max_steps=30, batch_size=20, width=8, latent_dim=4, seed=1)
        for _ in range(2)
    )
    assert (
        torch.equal(torch.random.get_rng_state(), before)
        and (v.sample([1, 0], [0, 1], 3) == w.sample([1, 0], [0, 1], 3)).all()
        and v.history[-1][0] < v.history[0][0]
        and not v.training
    )
    p = sample_balanced(v, 8)
    assert (
        np.bincount(p.subgroup).tolist() == [2] * 4
        and p.images.shape == (8, 32, 32, 3)
        and p.images.dtype == np.uint8
    )
    assert (
        audit.sample_synthetic(v, sets[0]).subgroup.sum() == sets[0].subgroup.sum()
        and audit.sample_synthetic(v, sets[0], 100).images.shape[0] == 100
    )
    light = audit.fit_vae(
        sets[0][~sets[0].dark_skin], max_steps=2, batch_size=20, width=8, latent_dim=4
    )
    with pytest.raises(ValueError, match="no melanoma on dark skin"):
        light.sample([1], [1])


def test_a_parrot_is_caught_and_honest_samplers_are_not():
    r = np.random.default_rng(0)

    def smooth(n):
        return (
            np.kron(r.normal(128, 40, (n, 4, 4, 3)), np.ones((1, 8, 8, 1)))
            .clip(0, 255)
            .astype(np.uint8)
        )

    def bag(n):
        return LabeledImages(
            smooth(n),
            np.zeros(n, bool),
            np.zeros(n, bool),
            np.array([f"{r.random()}" for _ in range(n)], dtype=object),
            np.array([{}] * n, dtype=object),
        )

    alarms, caught, part = 0, 0, 0
    for k in range(20):
        train, held = bag(50), bag(50)
        alarms += audit.memorization_test(
            smooth(60), train, held, n_resamples=100, seed=k
        ).significant
        copy = (
            (train.images[r.integers(0, 50, 60)][:, ::-1] + r.normal(0, 5, (60, 32, 32, 3)))
            .clip(0, 255)
            .astype(np.uint8)
        )
        caught += audit.memorization_test(copy, train, held, n_resamples=100, seed=k).significant
        part += audit.memorization_test(
            np.concatenate([smooth(48), copy[:12]]), train, held, n_resamples=100, seed=k
        ).significant
    assert alarms <= 3 and caught == 20 and part >= 17, (alarms, caught, part)
    got = audit.memorization_test(copy, train, held, n_resamples=50)
    assert got.nearer_share > 0.95 and got.distance_ratio.max() < 0.9 and "copies" in str(got)
    with pytest.raises(ValueError, match="at least 20"):
        audit.memorization_test(copy[:3], train, held)


def test_frechet_is_the_distance_of_gaussians():
    from scipy.linalg import sqrtm

    r = np.random.default_rng(0)
    a, b = r.normal(size=(300, 5)) @ r.normal(size=(5, 5)), r.normal(1, 2, (200, 5))
    A, B = np.cov(a.T), np.cov(b.T)
    assert (
        audit.frechet_distance(a, b)
        == pytest.approx(
            ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * sqrtm(A @ B).real), rel=1e-6
        )
        and audit.frechet_distance(a, a) < 1e-8
    )
    assert (
        audit.frechet_distance(a[:, :1], b[:, :1])
        == pytest.approx(audit.frechet_distance(b[:, :1], a[:, :1]))
        and audit.frechet_distance(a[:150], a[150:]) > 0
    )


def test_amplification_is_the_difference_of_two_gaps():
    y, s, g, p = world(400, 20)
    worse = np.where((g == "dark") & y, s * 0.6, s)
    ds = people(y, g, p)
    got = measure_gap_amplification(ds, worse, s, n_resamples=300)

    def rec(s, k):
        return (s >= 0.5)[y & (g == k)].mean()

    want = (rec(worse, "light") - rec(worse, "dark")) - (rec(s, "light") - rec(s, "dark"))
    assert (
        got.value == pytest.approx(want)
        and got.low > 0
        and measure_gap_amplification(ds, s, s, n_resamples=50) == Interval(0, 0, 0)
    )
    assert (
        measure_gap_amplification(ds, worse, s, metric="AUROC", n_resamples=50).value > 0
        and measure_gap_amplification(ds, worse, s, metric="Brier", n_resamples=50).value > 0
    ), "worse for the second group is above 0, whichever way the measure runs"
    with pytest.raises(ValueError, match="metric="):
        measure_gap_amplification(ds, s, s, metric="f1")


def test_detectable_is_what_a_test_finds():
    r = np.random.default_rng(0)
    d = minimum_detectable_gap(80, 120, 0.6)
    a, b = r.binomial(80, 0.6 + d * 0.6, 4000) / 80, r.binomial(120, 0.6 - d * 0.4, 4000) / 120
    assert 0.74 < (
        abs(a - b) > 1.96 * math.sqrt(0.24 * (1 / 80 + 1 / 120))
    ).mean() < 0.86 and minimum_detectable_gap(10, 10) > minimum_detectable_gap(
        100, 10
    ) > minimum_detectable_gap(100, 100)


# --- cards
@pytest.fixture(scope="module")
def report():
    y, s, g, p = world(400, 30, 1.0)
    return audit.compute_group_metrics(
        people(y, g, p, sex=["male", "female"] * 200), s, n_resamples=100
    )


def test_a_cards_numbers_are_the_reports(report):
    import yaml

    card = audit.create_model_card(
        "head", measurements={"skin": report}, statements={"licence": "mit", "base model": "tiny"}
    )
    text = card.text
    for m in report.by_group:
        assert str(report.overall[m]) in text and str(report.gaps[m].difference) in text
        for k in report.counts:
            assert str(report.by_group[m][k]) in text, (m, k)
    head = yaml.safe_load(card.content.split("---")[1])
    results = {r["type"]: r["value"] for r in head["model-index"][0]["results"][0]["metrics"]}
    assert (
        head["license"] == "mit"
        and head["base_model"] == "tiny"
        and results["recall"] == pytest.approx(report.overall["recall"].value, abs=1e-6)
        and card.data.model_name == "head"
    )


def test_what_was_not_measured_says_so(report):
    empty, full = (
        audit.create_model_card("m").text,
        audit.create_model_card(
            "m",
            measurements={
                "skin": report,
                "leakage": LeakageReport(),
                "my own": (40, Interval(0.5, 0.4, 0.6)),
            },
        ).text,
    )
    assert all(
        f"| {c} | {CARD_CHECKS[c]} | – | **{NOT_MEASURED}** |" in empty for c in CARD_CHECKS
    ) and not re.search(r"\d\.\d", empty)
    for c in CARD_CHECKS:
        assert (f"| {c} | {CARD_CHECKS[c]} | – |" in full) == (
            c not in ("skin", "leakage", "discrimination", "calibration")
        ), c
    assert (
        "| my own | a check of your own | 40 records | 0.50 [0.40, 0.60] |" in full
        and "nothing is shared" in full
        and "prospective" in full.split("Not tested: ")[1]
    )
    for bad in ("fair", 0.9, None, (3, 0.5), {"a": 1}):
        with pytest.raises(TypeError, match="not a measurement"):
            audit.create_model_card("m", measurements={"skin": bad})
    with pytest.raises(ValueError, match="did you mean 'licence'"):
        audit.create_model_card("m", statements={"license": "mit"})


def test_cards_are_saved_whole_and_never_over_others(tmp_path, monkeypatch):
    file = tmp_path / "model" / "README.md"
    audit.create_model_card("one", path=file)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        audit.create_model_card("two", path=file)
    assert "# one" in file.read_text()
    audit.create_model_card("two", path=file, overwrite=True)
    assert "# two" in file.read_text()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        audit.create_model_card("three", path=file, overwrite=True)
    assert "# two" in file.read_text() and [p.name for p in file.parent.iterdir()] == ["README.md"]


def test_text_is_escaped_in_cards():
    evil = "a|b\n# head <script>alert(1)</script> [x](y) `c` $d$"
    for text in (
        audit.create_model_card(evil, statements={"developers": evil}).text,
        audit.create_dataset_card(
            evil, people([1, 0], site=[evil, evil]), statements={"motivation": evil}
        ).text,
    ):
        assert (
            "<script>" not in text
            and "\n# head" not in text
            and r"\[x\](y)" in text
            and r"a\|b" in text
            and r"\$d\$" in text
        )


def test_a_data_card_counts(cache):
    ds = load_melanoma_pairs(40, seed=9, size=32, masks=False)
    import yaml

    card = audit.create_dataset_card(
        "drawn", {"train": ds.select(range(31)), "test": ds.select(range(31, 40))}
    )
    text = card.text
    c = summarize_dataset(ds)
    assert (
        c["records"] == 40
        and c["melanoma"] + c["benign"] == 40
        and sum(c["skin"].values()) == 40
        and sum(c["Fitzpatrick type"].values()) == 40
        and c["missing"]["age"] == 0
    )
    assert (
        "procedural 31 (100%)" in text
        and "Apache-2.0" in text
        and "*not stated*" in text
        and text.count("fingerprint of") == 2
    )
    shared = len(set(ds["patient"][:31]) & set(ds["patient"][31:]))
    assert shared and "with the same patient" in text, "patients in both splits are counted"
    assert yaml.safe_load(card.content.split("---")[1])["size_categories"] == ["n<1K"]
    lists = audit.create_dataset_card("x", people([1, None, 0])).text
    assert "unlabelled | 1" in lists and "Not recorded: " in lists and "| site |" not in lists
    assert [
        re.search(
            r"size_categories:\n- (.+)",
            audit.create_dataset_card("x", [dict(label="benign")] * n).content,
        )[1].strip("'")
        for n in (999, 1000, 10000)
    ] == ["n<1K", "1K<n<10K", "10K<n<100K"]


def test_a_data_card_of_lists_finds_shared_patients():
    def two(a, b):
        return audit.create_dataset_card(
            "x", dict(a=people([1, 0, 1], patient=a), b=people([0, 1], patient=b))
        ).text

    assert "a and b: 2 patients; names" in two(
        ["p", "q", "r"], ["q", "p"]
    ) and "a and b: no patient; names" in two(["p", None, "r"], ["s", None])


# --- real records, where they are
@pytest.mark.skipif(
    not (REAL / "pad_ufes_20").is_dir(),
    reason="no real data here: pad_ufes_20 is absent (set MMKIT_REAL)",
)
def test_pad_ufes_20_by_skin_type():
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    ds, _ = load_pad_ufes_20(REAL / "pad_ufes_20", with_images=False)
    y = np.array(["melanoma" in c or "carcinoma" in c for c in ds["caption"]])
    sites = sorted({s for s in ds["site"] if s})

    def guess(*sexes):  # by patient, from age, sex and site
        X = np.column_stack(
            [
                np.nan_to_num(np.array(ds["age"], float), nan=60),
                *[[(v or "blank") == k for v in ds["sex"]] for k in sexes],
                *[[v == k for v in ds["site"]] for k in sites],
            ]
        ).astype(float)
        return cross_val_predict(
            fit_linear_probe(X, y),
            X,
            y,
            groups=ds["patient"],
            cv=StratifiedGroupKFold(5, shuffle=True, random_state=0),
            method="predict_proba",
        )[:, 1]

    s = guess("male", "blank")
    naive, mended = (
        audit.compute_group_metrics(
            ds, v, by="sex", labels=y, target_name="cancer", n_resamples=200
        ).gaps["recall"]
        for v in (guess("male"), s)
    )
    assert (
        naive.worst == "female"
        and naive.difference.value > 0.5
        and naive.significant
        and mended.difference.value < 0.2
    ), "women who share a zero with the blanks"
    got = audit.compute_group_metrics(
        ds, s, by="skin_type", labels=y, target_name="cancer", n_resamples=300
    )
    assert {k: c["records"] for k, c in got.counts.items()} == {
        "I": 153,
        "II": 876,
        "III": 392,
        "IV": 62,
        "V": 10,
        "VI": 1,
    } and got.excluded["no group"] == 804
    assert (
        {"V", "VI"} <= set(got.too_small)
        and "recall" in got.too_small["V"]
        and got.overall["AUROC"].value > 0.6
    )
    tones = audit.compute_group_metrics(ds, s, labels=y, target_name="cancer", n_resamples=50)
    assert tones.counts["dark"]["records"] == 11 and isinstance(
        tones.by_group["recall"]["dark"], str
    )
    text = audit.create_model_card(
        "metadata only", measurements={"skin": got}, test_dataset=ds
    ).text
    assert (
        "not reported for" in text
        and "| V |" in text
        and "real images" in text.split("Not tested: ")[1]
    )


@pytest.mark.skipif(
    not (REAL / "fitzpatrick17k").is_dir(),
    reason="no real data here: fitzpatrick17k is absent (set MMKIT_REAL)",
)
def test_fitzpatrick17k_by_skin():
    ds, _ = load_fitzpatrick17k(REAL / "fitzpatrick17k", with_images=False)
    s = np.random.default_rng(0).random(len(ds))
    got = audit.compute_group_metrics(ds, s, n_resamples=20)
    assert (
        list(got.counts) == ["light", "medium", "dark"]
        and got.counts["dark"]["positive"] == 47
        and got.excluded["no label"] > 10000
        and not got.gaps["recall"].significant
    )


# --- C12
def test_c12_tells_its_controls():
    c = load_claim("C12")
    G = "recall gap"
    assert all(x["outcome"] == "yes" for x in c["comparisons"] if x.get("control")) and {
        "real",
        "further real",
        "duplicates",
        "balanced real",
    } <= {r["condition"] for r in c["rows"] if r["control"]}
    for r in c["rows"]:
        if r["measure"] == G and any(
            q["condition"] == r["condition"] and q["measure"] == "amplification" for q in c["rows"]
        ):

            def at(arm, m):
                return next(
                    q["values"] for q in c["rows"] if (q["condition"], q["measure"]) == (arm, m)
                )

            assert np.allclose(
                at(r["condition"], "amplification"),
                np.array(r["values"]) - at("real", G),
                atol=2e-6,
            ) and np.allclose(
                r["values"],
                np.array(at(r["condition"], "recall, light")) - at(r["condition"], "recall, dark"),
                atol=2e-6,
            ), r["condition"]
    assert "22.8%" in c["limitations"] and "no public source" in c["limitations"]


def test_calibration_error_is_the_one_of_chapter_18():
    rng = np.random.default_rng(6)
    s = np.r_[rng.random(118), 0.0, 1.0]
    y = rng.random(120) < s
    who = np.repeat(["a", "b"], 60)
    got = audit.compute_group_metrics(
        [dict(label="melanoma" if v else "benign", attributes={}) for v in y],
        s,
        by=who,
        n_resamples=20,
    ).by_group["ECE"]
    for k in "ab":
        assert got[k].value == pytest.approx(
            expected_calibration_error(y[who == k].astype(float), s[who == k]), abs=1e-9
        )
