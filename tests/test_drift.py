"""Shifts change one thing in doses, losses are paired, layers are compared without bias, and the
monitor keeps its promise.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp, permutation_test
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score, roc_auc_score

from mmkit import audit, chat, data, lesions, models
from mmkit.audit.cka import (
    extract_attention_maps,
    linear_cka,
    measure_attention_shift,
    plot_cka_distance,
)
from mmkit.audit.drift import (
    finetune_copy,
)
from mmkit.audit.drift_monitor import (
    conformal_p_value,
    mmd_test,
    rbf_kernel,
    simple_jumper_update,
    squared_mmd,
)
from mmkit.audit.performance_drops import (
    compute_drift_metric,
    compute_performance_drops,
    count_outcomes_by_patient,
    tune_threshold,
)
from mmkit.chat.prompts import YESNO_PROMPT
from mmkit.chat.templates import tiny_processor
from mmkit.core.stats import bootstrap
from mmkit.data.melanoma_pairs import load_melanoma_pairs, rerender
from mmkit.data.shifts import (
    IMAGE_CORRUPTIONS,
    rephotograph,
    reword_prompt,
    shift_lesion,
    subsample_positives,
)


@pytest.fixture(scope="module")
def ds(cache):
    return load_melanoma_pairs(18, seed=31, size=32, prevalence=0.5, skin_types=(1, 2, 3))


@pytest.fixture(scope="module")
def tiny():
    return models.tiny_random_model("gemma3", vocab_size=1024), tiny_processor("gemma3")


WORDS = ("Yes", "No")


def px(r):
    return np.asarray(r["image"]).astype(int)


def photo(w=70, h=50, **kw):
    return dict(
        id=f"IMG {w}",
        image=Image.fromarray(np.random.default_rng(w).integers(0, 255, (h, w, 3), np.uint8)),
        label=None,
        **kw,
    )  # a picture of the clinic's: nothing else is known


def cloud(n, off=0.0, soff=0.0, seed=0, D=6):
    g = np.random.default_rng(seed)
    return audit.ExtractedFeatures(g.normal(size=(n, D)) + off, g.normal(size=n) + soff)


# --- shifts
@pytest.mark.parametrize("kind", data.SHIFTS)
def test_strength_0_changes_nothing_and_the_source_stays(ds, kind):
    before = [px(r).copy() for r in ds]
    for a, b in zip(data.apply_shift(ds, kind, 0.0), ds):
        assert (px(a) == px(b)).all() and {
            k: v for k, v in a.items() if k not in ("image", "mask")
        } == {k: v for k, v in b.items() if k not in ("image", "mask")}
    data.apply_shift(ds, kind, 1.0)
    assert all((px(r) == b).all() for r, b in zip(ds, before))


@pytest.mark.parametrize("kind", [k for k in data.SHIFTS if k not in ("prevalence", "prompt")])
def test_more_strength_is_more_of_the_same(ds, kind):
    at = {s: data.apply_shift(ds, kind, s) for s in (0.25, 0.5, 1.0)}
    far = [np.mean([np.abs(px(a) - px(b)).mean() for a, b in zip(at[s], ds)]) for s in at]
    assert 0 < far[0] <= far[1] <= far[2] and far[2] > 1.5 * far[0], far
    again = data.apply_shift(ds, kind, 0.5)
    assert all((px(a) == px(b)).all() for a, b in zip(again, at[0.5])), (
        "the same seed, the same shift"
    )
    alone = data.apply_shift([ds[7]], kind, 0.5)[0]
    assert (px(alone) == px(at[0.5][7])).all(), "in whatever company"
    if kind in ("light", "hairs", "site"):
        assert any(
            (px(a) != px(b)).any() for a, b in zip(data.apply_shift(ds, kind, 0.5, seed=1), at[0.5])
        ), "another seed, another lamp"


def test_the_lamp_stays_on_its_side_and_hairs_where_they_were(ds):
    weak, strong = (px(data.apply_shift([ds[0]], "hairs", s)[0]) - px(ds[0]) for s in (0.2, 1.0))
    touched = np.abs(weak).sum(-1) > 15
    assert touched.any() and (np.abs(strong).sum(-1)[touched] > 3).mean() > 0.9
    grey = Image.new("RGB", (32, 32), (100, 100, 100))

    def tilt(s):
        return np.polyfit(
            np.arange(32),
            px(data.apply_shift([dict(id="a", image=grey)], "light", s)[0]).mean((0, 2)),
            1,
        )[0]

    assert tilt(0.2) * tilt(1.0) > 0 and abs(tilt(1.0)) > abs(tilt(0.2))


@pytest.mark.parametrize("kind", ["skin", "site"])
def test_what_the_world_draws_anew_keeps_its_truth(ds, kind):
    for a, b in zip(data.apply_shift(ds, kind, 1.0), ds):
        now = lesions.render_lesion(
            shift_lesion(rerender(b).lesion, kind, 1.0, np.random.default_rng(0)), 32
        )
        assert (now.mask == (np.asarray(b["mask"]) > 127)).all() and (now.image == px(a)).all(), (
            "the mask is that of what was drawn"
        )
        assert (
            (rerender(a).mask == (np.asarray(b["mask"]) > 127)).all()
            and a["label"] == b["label"]
            and a["boxes"] == b["boxes"]
        )
        assert {k: v for k, v in a["attributes"].items() if k != "skin"} == {
            k: v for k, v in b["attributes"].items() if k != "skin"
        }
        if kind == "site":
            assert (
                a["site"] == "foot" and "Site: foot." in a["notes"] and a["caption"] == b["caption"]
            )
        else:
            assert (
                a["attributes"]["skin"] == "dark"
                and a["skin_type"] == 6
                and "dark skin" in a["caption"]
                and a["caption"].replace("dark", b["attributes"]["skin"]) == b["caption"]
            )
            assert (
                next(q["answer"] for q in a["questions"] if "skin" in q["question"].lower()).lower()
                == "dark skin."
            )
            assert (
                px(a)[np.asarray(b["mask"]) < 127].mean()
                < px(b)[np.asarray(b["mask"]) < 127].mean()
            )
    mild = data.apply_shift(ds, "skin", 0.5)
    assert all(b["skin_type"] <= a["skin_type"] <= 6 for a, b in zip(mild, ds))


def test_shifts_add_up_in_the_order_that_can_be_drawn(ds):
    both = data.apply_shift(
        data.apply_shift(data.apply_shift(ds, "skin", 1.0), "site", 1.0), "blur", 0.5
    )
    story = json.loads(both[0]["provenance"])
    assert (
        [s[0] for s in story["shifts"]] == ["skin", "site", "blur"]
        and both[0]["site"] == "foot"
        and both[0]["skin_type"] == 6
    )
    skin, redone = (
        data.apply_shift(ds, "skin", 1.0),
        data.apply_shift(data.apply_shift(ds, "skin", 1.0), "site", 0.0),
    )
    assert (px(skin[0]) == px(redone[0])).all()
    site = data.apply_shift(data.apply_shift(ds, "site", 1.0), "skin", 1.0)
    assert (
        px(site[0]) == px(data.apply_shift(data.apply_shift(ds, "skin", 1.0), "site", 1.0)[0])
    ).all(), "either order"
    with pytest.raises(ValueError, match="undo"):
        data.apply_shift(both, "skin")
    shots = rephotograph(skin)
    assert (px(shots[0]) != px(skin[0])).any() and abs(
        px(shots[0]).mean() - px(skin[0]).mean()
    ) < 40, "photographed again, still dark"
    assert (px(rephotograph(ds, 2)[0]) != px(rephotograph(ds)[0])).any() and all(
        (rerender(a).mask == (np.asarray(b["mask"]) > 127)).all()
        for a, b in zip(rephotograph(ds), ds)
    )


def test_who_stays_away(ds):
    keep = [set(subsample_positives(ds["label"], ds["id"], s)) for s in (0.0, 0.3, 0.7, 1.0)]
    assert keep[0] == set(range(18)) and keep[3] <= keep[2] <= keep[1] and keep[3] < keep[0]
    benign = {k for k, label in enumerate(ds["label"]) if label == "benign"}
    assert all(benign <= k for k in keep)
    assert len(subsample_positives(["melanoma"] * 2000, list(range(2000)), 1.0)) == pytest.approx(
        200, abs=55
    )
    assert subsample_positives([None, "benign"], ["a", "b"], 1.0).tolist() == [
        0,
        1,
    ], "without a label nobody is sent away"


def test_words():
    said = [reword_prompt(YESNO_PROMPT, s) for s in (0.2, 0.5, 1.0)]
    assert len({YESNO_PROMPT, *said}) == 4 and "melanoma" not in said[2] and "melanoma" in said[1]
    assert (
        data.apply_shift([photo(prompt="Is it dark?")], "prompt", 0.2)[0]["prompt"] == "is it dark"
        and data.apply_shift([photo()], "prompt", 0.2)[0]["prompt"] == "is this lesion a melanoma"
    )


@pytest.mark.parametrize("kind", IMAGE_CORRUPTIONS)
@pytest.mark.parametrize("size", [(70, 50), (31, 97), (1, 1)])
def test_pictures_of_the_clinic_of_any_size(kind, size):
    for s in (0.01, 1.0):
        out = data.apply_shift([photo(*size)], kind, s)[0]
        assert out["image"].size == size and out["image"].mode == "RGB" and "provenance" not in out
    grey = dict(id=None, image=Image.new("L", size))
    assert data.apply_shift([grey], kind, 1.0)[0]["image"].size == size
    assert (
        data.apply_shift(
            [dict(image=np.zeros((*size[::-1], 3), np.uint8), provenance="not JSON")], kind, 1.0
        )[0]["image"].size
        == size
    )


def test_what_cannot_be_shifted(ds):
    with pytest.raises(ValueError, match="'blur'"):
        data.apply_shift(ds, "blurr")
    for s in (-0.1, 1.1, float("nan"), "much"):
        with pytest.raises((ValueError, TypeError)):
            data.apply_shift(ds, "blur", s)
    with pytest.raises(ValueError, match="only the world"):
        data.apply_shift([photo()], "skin")
    with pytest.raises(ValueError, match="no image"):
        data.apply_shift([dict(id="x", image=None)], "blur")


# --- what is lost
def records(n, seed=0):
    g = np.random.default_rng(seed)
    y = g.random(n) < 0.5
    return (
        y,
        2 * y - 1 + g.normal(size=n),
        2 * y - 0.6 + 1.4 * g.normal(size=n),
        g.integers(0, n // 3, n),
    )


def test_rates_agree_with_scikit_learn_and_draws_with_core_bootstrap():
    y, s, t, who = records(90)
    who = np.unique(who, return_inverse=True)[1]
    c, one = count_outcomes_by_patient(y, s, who), np.ones((1, who.max() + 1))
    for what, f in {
        "balanced accuracy": balanced_accuracy_score,
        "sensitivity": recall_score,
        "precision": precision_score,
    }.items():
        assert compute_drift_metric(c, what, one)[0] == pytest.approx(f(y, s > 0))
    assert compute_drift_metric(c, "auroc", one)[0] == pytest.approx(roc_auc_score(y, s))
    ties = np.round(s)
    assert compute_drift_metric(count_outcomes_by_patient(y, ties, who), "auroc", one)[
        0
    ] == pytest.approx(roc_auc_score(y, ties))
    first = {p: k for k, p in reversed(list(enumerate(who)))}
    order = np.argsort(
        [first[p] for p in range(who.max() + 1)]
    )  # core.bootstrap numbers patients as they come
    by_first = np.empty_like(order)
    by_first[order] = np.arange(len(order))
    who = by_first[who]
    for what, f in (
        ("balanced accuracy", lambda y, a: balanced_accuracy_score(y, a > 0)),
        ("auroc", roc_auc_score),
    ):
        got, want = (
            compute_performance_drops(
                y, s, {("x", 1.0): (np.arange(90), t)}, who, what, n_resamples=200, seed=4
            ).rows[0]["points"],
            bootstrap(
                lambda y, a, b: f(y, a) - f(y, b), y, s, t, groups=who, n_resamples=200, seed=4
            ),
        )
        assert np.allclose(got, want), what


def test_nothing_lost_where_nothing_changed_and_a_loss_where_something_did():
    y, s, t, who = records(120)
    same = compute_performance_drops(y, s, {("x", 1.0): (np.arange(120), s)}, who).rows[0]
    assert tuple(same["points"]) == (0, 0, 0) and not same["sure"]
    worse = compute_performance_drops(y, s, {("x", 1.0): (np.arange(120), -s)}, who).rows[0]
    assert (
        worse["sure"]
        and worse["points"].low > 0.3
        and worse["above chance"].value == pytest.approx(2, abs=0.05)
    )
    assert worse["relative"].value == pytest.approx(
        worse["points"].value
        / compute_performance_drops(y, s, {("x", 1.0): (np.arange(120), s)}, who).before.value
    )
    with pytest.raises(ValueError, match="both classes"):
        compute_performance_drops(np.ones(120, bool), s, {}, who)
    with pytest.raises(ValueError, match="auroc"):
        compute_performance_drops(y, s, {("x", 1.0): (np.arange(120), s)}, who, "auc")


def test_all_intervals_together_hold_more_often_than_each_alone():
    g, hold, each, cells = np.random.default_rng(1), 0, 0, 12
    for k in range(40):  # twelve comparisons, none of which changed anything but noise
        y = g.random(90) < 0.5
        who = np.arange(90)
        base = 2 * y - 1 + g.normal(size=90)
        rows = compute_performance_drops(
            y,
            base,
            {(j, 1.0): (np.arange(90), base + 0.7 * g.normal(size=90) * 1.0) for j in range(cells)},
            who,
            "auroc",
            n_resamples=300,
            seed=k,
        ).rows
        truth = np.mean([r["points"].value for r in rows])
        hold += all(r["together"].covers(truth) for r in rows)
        each += all(r["points"].covers(truth) for r in rows)
        assert all(r["together"].width > r["points"].width for r in rows)
    assert hold >= 32 and each < hold


def test_prevalence_moves_precision_and_leaves_sensitivity(ds):
    y, s, _, _ = records(400, 3)
    who = np.arange(400)
    kept = subsample_positives(["melanoma" if v else "benign" for v in y], range(400), 1.0)
    lost = {
        w: compute_performance_drops(y, s, {("prevalence", 1.0): (kept, s[kept])}, who, w).rows[0]
        for w in ("precision", "sensitivity", "specificity")
    }
    assert (
        lost["precision"]["sure"]
        and lost["precision"]["points"].value > 0.2
        and tuple(lost["specificity"]["points"]) == (0, 0, 0)
        and lost["sensitivity"]["points"].covers(0)
    )


# --- the model at work
def test_sense_sees_each_picture_once_and_leaves_no_trace(ds, tiny):
    model, processor = tiny
    calls, kept = [], {}
    h = model.model.vision_tower.register_forward_hook(
        lambda m, a, o: calls.append(len(o.last_hidden_state))
    )
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    one = audit.extract_features(model, processor, ds, answer_words=WORDS, cache=kept)
    two = audit.extract_features(
        model, processor, data.apply_shift(ds, "prompt", 1.0), answer_words=WORDS, cache=kept
    )
    h.remove()
    assert (
        sum(calls) == len(kept) == 18
        and model.training
        and all((p == before[n]).all() for n, p in model.named_parameters())
    )
    model.eval()
    assert (
        one.embeddings.shape == (18, 64)
        and np.allclose(one.embeddings, two.embeddings)
        and not np.allclose(one.scores, two.scores)
    ), "another question: the same eyes, another answer"
    small = audit.extract_features(model, processor, [ds[3]], answer_words=WORDS)
    assert np.allclose(small.embeddings[0], one.embeddings[3], atol=1e-4) and np.allclose(
        small.scores[0], one.scores[3], atol=1e-4
    ), "alone or in a batch"
    plain = (
        models.embed_images(model, chat.images_to_pixel_values(processor, [ds[3]["image"]]))
        .detach()
        .numpy()[0]
    )
    assert np.allclose(plain, one.embeddings[3], atol=1e-4)
    assert len(one[2:5]) == 3 and (one[2:5].scores == one.scores[2:5]).all()
    with pytest.raises(ValueError, match="no images"):
        audit.extract_features(model, processor, [], answer_words=WORDS)
    with pytest.raises(ValueError, match="first tokens"):
        audit.extract_features(model, processor, ds, answer_words=("No", "No dots"))


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_measure_on_real_like_records(family):
    model, processor = models.tiny_random_model(family, vocab_size=1024), tiny_processor(family)
    rs = [photo(40 + k, 30 + k) | dict(label=("melanoma", "benign", None)[k % 3]) for k in range(9)]
    got = audit.evaluate_shifts(
        model,
        processor,
        rs,
        kinds=("blur", "prevalence", "prompt"),
        strengths=(1.0,),
        answer_words=WORDS,
        batch_size=4,
    )
    assert (
        len(got.labels) == 6
        and got.controls == ()
        and set(got.after) == {(k, 1.0) for k in ("blur", "prevalence", "prompt")}
        and len(np.unique(got.groups)) == 6
    )
    assert "blur" in str(got.performance_drops()) and np.isfinite(
        got.performance_drops().row("blur")["points"].value
    )
    with pytest.raises(ValueError, match="label"):
        audit.evaluate_shifts(model, processor, [photo()], kinds=("blur",))
    with pytest.raises(ValueError, match="only the world"):
        audit.evaluate_shifts(model, processor, rs, kinds=("skin",), answer_words=WORDS)


def test_measure_has_its_controls(ds, tiny):
    got = audit.evaluate_shifts(
        *tiny,
        ds,
        kinds=("skin",),
        strengths=(1.0,),
        other_records=load_melanoma_pairs(12, seed=32, size=32, prevalence=0.5),
        answer_words=WORDS,
    )
    rows = got.performance_drops().rows
    assert [r["kind"] for r in rows if r["control"]] == [
        "photographed again",
        "another draw",
    ] and rows[-1]["n"] == 12
    audit.plot_performance_drops(
        {"a": got.performance_drops(), "b": got.performance_drops("auroc")}, strength=1.0
    )


# --- where in the model
def test_cka_is_blind_to_turns_and_scale_and_to_nothing_else():
    g = np.random.default_rng(0)
    X = g.normal(size=(40, 12)) @ np.diag(np.arange(1, 13))
    Q = np.linalg.qr(g.normal(size=(12, 12)))[0]
    Y = X[:, :5] + g.normal(size=(40, 5))
    assert (
        linear_cka(X, X) == pytest.approx(1)
        and linear_cka(X, 0.01 * X @ Q - 5) == pytest.approx(1)
        and linear_cka(X, Y)
        == pytest.approx(linear_cka(Y, X))
        == pytest.approx(linear_cka(X @ Q, 3 * Y + 1))
    )
    assert (
        linear_cka(X, np.c_[X[:, :6], g.normal(size=(40, 6)) * 9]) < 0.9
        and linear_cka(X, X[g.permutation(40)]) < 0.3
    )
    K, L = X @ X.T, Y @ Y.T
    n = 40
    off = ~np.eye(n, dtype=bool)
    K0, L0 = K * off, L * off  # the same by sums over tuples that differ

    def song(K, L):
        return (
            (K * L).sum()
            + K.sum() * L.sum() / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (K.sum(0) @ L.sum(0))
        ) / (n * (n - 3))

    assert linear_cka(X, Y) == pytest.approx(song(K0, L0) / math.sqrt(song(K0, K0) * song(L0, L0)))
    assert (
        abs(
            np.mean(
                [linear_cka(g.normal(size=(20, 100)), g.normal(size=(20, 100))) for _ in range(60)]
            )
        )
        < 0.04
    ), "noise is not alike"
    for bad in (
        lambda: linear_cka(X, Y[1:]),
        lambda: linear_cka(X[:3], X[:3]),
        lambda: linear_cka(X * np.inf, Y),
    ):
        with pytest.raises(ValueError):
            bad()
    assert math.isnan(linear_cka(np.ones((9, 3)), X[:9]))


def test_layers_are_seen_as_they_are(ds, tiny):
    model, processor = tiny
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    a = audit.collect_activations(model, processor, [ds[k] for k in range(6)], batch_size=4)
    assert list(a) == ["vision 0", "vision 1", "projector", "text 0", "text 1"] and all(
        x.shape == (6, 64) for x in a.values()
    )
    assert np.allclose(
        a["projector"],
        audit.extract_features(
            model, processor, [ds[k] for k in range(6)], answer_words=WORDS
        ).embeddings,
        atol=1e-4,
    )
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks, "no hook stays"
    b = chat.Collator(processor, YESNO_PROMPT, for_training=False)([ds[0]])
    with torch.no_grad():
        h = model.model(**b, output_hidden_states=True).hidden_states
    assert np.allclose(h[1][0, -1], a["text 0"][0], atol=1e-4), "where the answer begins"
    mixed = [ds[0], dict(ds[1], prompt="is it"), ds[2]]
    assert np.allclose(
        audit.collect_activations(model, processor, mixed)["text 0"][1],
        audit.collect_activations(model, processor, mixed[1:2])["text 0"][0],
        atol=1e-4,
    ), "padding is not read"
    far = audit.cka_distance(a, a)
    assert all(abs(v.value) < 1e-9 for v in far.values())
    plot_cka_distance(
        {
            "again": far,
            "x": audit.cka_distance(
                a,
                audit.collect_activations(
                    model, processor, data.apply_shift([ds[k] for k in range(6)], "camera", 1.0)
                ),
            ),
        }
    )


def test_gaze(ds, tiny):
    three = [ds[k] for k in range(3)]
    p, q = (
        extract_attention_maps(*tiny, three),
        extract_attention_maps(*tiny, data.apply_shift(three, "light", 1.0)),
    )
    assert p.shape == (3, 2, 2) and np.allclose(p.sum((1, 2)), 1)
    same, other = (
        measure_attention_shift(p, p, three, n_resamples=20),
        measure_attention_shift(p, q, three, n_resamples=20),
    )
    assert (
        same["moved"].value == pytest.approx(0, abs=1e-9)
        and same["lost"].value == 0
        and 0 < same["on the lesion, before"].value < 1
        and 0 < other["moved"].value < 1
    )
    here, there = np.zeros((1, 2, 2)), np.zeros((1, 2, 2))
    here[0, 0, 0] = there[0, 1, 1] = 1
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 255
    far = measure_attention_shift(here, there, [dict(mask=Image.fromarray(mask))], n_resamples=20)
    assert far["moved"].value == pytest.approx(1) and far["lost"].value == pytest.approx(1), (
        "all on the lesion, then nothing"
    )
    bare = measure_attention_shift(
        extract_attention_maps(*tiny, [photo()]),
        extract_attention_maps(*tiny, [photo(72)]),
        [photo()],
        n_resamples=20,
    )
    assert math.isnan(bare["on the lesion, before"].value) and bare["moved"].value >= 0


# --- the stream
def exact(X, Y):
    Z, n = np.concatenate([X, Y]), len(X)
    K = rbf_kernel(Z)[0]

    def statistic(i, j):
        a = np.zeros(len(Z))
        a[i.astype(int)] = 1
        return float(squared_mmd(K, a))

    return permutation_test(
        (np.arange(n), np.arange(n, len(Z))),
        statistic,
        permutation_type="independent",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=False,
    )


@pytest.mark.parametrize("off", [0.0, 1.0, 3.0])
def test_mmd_and_its_p_agree_with_scipy(off):
    g = np.random.default_rng(5)
    X, Y = g.normal(size=(5, 3)), g.normal(size=(4, 3)) + off
    want, (v, p) = exact(X, Y), mmd_test(X, Y, n_permutations=3000)
    assert (
        v == pytest.approx(want.statistic)
        and len(want.null_distribution) == 126
        and abs(p - want.pvalue) < 4 * math.sqrt(want.pvalue * (1 - want.pvalue) / 3000) + 1e-3
    )
    K = rbf_kernel(np.concatenate([X, Y]))[0]
    by_hand = (
        K[:5, :5][~np.eye(5, dtype=bool)].mean()
        + K[5:, 5:][~np.eye(4, dtype=bool)].mean()
        - 2 * K[:5, 5:].mean()
    )
    assert v == pytest.approx(by_hand)


def test_the_permutation_test_keeps_its_level():
    p = np.array(
        [
            mmd_test(
                cloud(20, seed=2 * k).embeddings,
                cloud(8, seed=2 * k + 1).embeddings,
                n_permutations=99,
            )[1]
            for k in range(400)
        ]
    )
    for a in (0.05, 0.2):
        assert abs((p <= a).mean() - a) < 4 * math.sqrt(a * (1 - a) / 400), a
    assert (
        p.min() >= 0.01
        and mmd_test(cloud(20).embeddings, cloud(8, 3.0).embeddings, n_permutations=99)[1] == 0.01
    )


def test_false_alarms_within_the_promise_and_true_ones_come():
    ever = sum(
        max(
            audit.DriftMonitor(cloud(60, seed=3 * k), alpha=0.1, seed=k).update_martingale(
                cloud(150, seed=3 * k + 1)
            )
        )
        >= 10
        for k in range(150)
    )
    assert ever / 150 <= 0.1 + 3 * math.sqrt(0.09 / 150)
    naive = sum(
        any(
            ks_2samp(
                cloud(60, seed=3 * k).scores, cloud(150, seed=3 * k + 1).scores[j : j + 10]
            ).pvalue
            <= 0.1
            for j in range(0, 150, 10)
        )
        for k in range(150)
    )
    assert naive / 150 > 0.5
    late = {}
    for off, soff in ((0.0, 0.0), (0.5, 0.0), (2.0, 0.0), (0.0, 2.0), (0.0, -2.0)):
        m = audit.DriftMonitor(cloud(100, seed=1), seed=1)
        m.update_martingale(cloud(40, seed=2))
        w = np.array(m.update_martingale(cloud(100, off, soff, seed=3)))
        late[off, soff] = int(np.argmax(w >= 100)) if (w >= 100).any() else np.inf
    assert (
        late[0, 0] == np.inf
        and late[2, 0] <= late[0.5, 0]
        and max(late[2, 0], late[0, 2], late[0, -2]) < 60
    ), late


def test_ranks_are_uniform_and_bets_fair():
    g = np.random.default_rng(0)
    a = np.round(g.normal(size=3000))
    u = g.random(3000)  # with ties
    p = np.array([conformal_p_value(a[:k], a[k], u[k]) for k in range(50, 3000)])
    assert (
        abs(p.mean() - 0.5) < 0.03
        and all(abs((p <= x).mean() - x) < 0.04 for x in (0.1, 0.5, 0.9))
        and abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.06
    )
    w = g.random((2, 3))
    assert (
        np.isclose(
            np.mean(
                [
                    simple_jumper_update(w, np.full(2, x)).sum()
                    for x in (np.arange(1000) + 0.5) / 1000
                ]
            ),
            w.sum(),
        )
        and (simple_jumper_update(w, np.zeros(2)) > 0).all()
    )


def test_a_monitor_in_pieces_and_from_a_file(tmp_path):
    ref, s = cloud(60), cloud(40, 1.5, seed=9)
    whole, parts = audit.DriftMonitor(ref), audit.DriftMonitor(ref)
    whole.update(s)
    [parts.update(s[a:b]) for a, b in ((0, 1), (1, 20), (20, 40))]
    assert (
        whole.wealth == pytest.approx(parts.wealth)
        and whole.states[-1].alarmed_at == parts.states[-1].alarmed_at
        and math.isnan(parts.states[0].mmd)
    ), "one picture is no cloud"
    audit.save_monitor(parts, tmp_path / "m.json")
    again = audit.load_monitor(tmp_path / "m.json")
    more = cloud(10, seed=11)
    a, b = again.update(more), parts.update(more)
    assert vars(a) == vars(b) and len(again.states) == 4
    json.loads((tmp_path / "m.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
    audit.plot_drift_monitor(again, change_at=10)
    audit.plot_drift_monitor(audit.DriftMonitor(ref))
    (tmp_path / "x.json").write_text('{"kind": "else"}')
    (tmp_path / "y.json").write_text("{")
    for f in ("x.json", "y.json"):
        with pytest.raises(ValueError, match="save_monitor"):
            audit.load_monitor(tmp_path / f)


def test_what_a_monitor_refuses():
    m = audit.DriftMonitor(cloud(40))
    before = m.past_scores.copy(), m.capital.copy()
    for bad, why in (
        (cloud(0), "empty"),
        (audit.ExtractedFeatures(np.full((3, 6), np.nan), np.zeros(3)), "nan"),
        (cloud(3, D=5), "another model"),
        (audit.ExtractedFeatures(np.zeros((3, 6)), np.array([0, 1, np.nan])), "finite scores"),
        (audit.ExtractedFeatures(np.zeros((3, 6)), np.zeros(2)), "finite scores"),
        (audit.ExtractedFeatures(np.zeros(6), np.zeros(1)), "shape"),
    ):
        with pytest.raises(ValueError, match=why):
            m.update(bad)
        assert (
            (m.past_scores == before[0]).all() and (m.capital == before[1]).all() and not m.states
        ), "a refused batch leaves nothing behind"
    with pytest.raises(ValueError, match="at least 20"):
        audit.DriftMonitor(cloud(19))
    with pytest.raises(ValueError, match="alpha"):
        audit.DriftMonitor(cloud(40), alpha=5)


# --- cures
def test_cures(ds, tiny):
    assert (
        tune_threshold([0, 0, 1, 1], [-3.0, -1.0, 4.0, 5.0]) == 0
        and tune_threshold([0, 0, 1, 1], [-9.0, -7.0, -5.0, -3.0]) == -6
    )
    with pytest.raises(ValueError, match="both classes"):
        tune_threshold([1, 1], [0.0, 1.0])
    rs = data.augment_with_shifts(ds, ("blur",), fraction=0.5, seed=2)
    n = sum((px(a) != px(b)).any() for a, b in zip(rs, ds))
    assert 3 <= n <= 15
    model, processor = tiny
    was = {n: p.clone() for n, p in model.named_parameters()}
    twin = finetune_copy(model, processor, ds, train=("projector",), max_steps=2, batch_size=4)
    assert all((p == was[n]).all() for n, p in model.named_parameters()) and any(
        (p != was[n]).any() for n, p in twin.named_parameters()
    )
    with pytest.raises(ValueError, match="label"):
        finetune_copy(model, processor, [photo()])
