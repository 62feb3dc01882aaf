"""Mismatched pairs: planting, the four witnesses against libraries and by property, decisions that
survive damage, and the review widget.
"""

import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmkit import data, losses, models
from mmkit.audit.detectors import (
    ProbePredictions,
    contrastive_loss_per_pair,
    cross_val_probe,
    fit_cca,
    fit_contrastive_maps,
    k_nearest_neighbors,
    normalize,
    record_training_dynamics,
    score_by_attributes,
    score_by_neighbors,
    score_by_similarity,
)
from mmkit.audit.label_noise import (
    NOISE_KINDS,
    LabelIssues,
    assign_folds,
    combine_ranks,
    describe_attribute,
    detection_metrics,
    extract_pair_features,
    find_label_issues,
    learn_detector_weights,
    plant_label_noise,
    retrain_and_evaluate,
    run_detectors,
    top_k_indices,
)
from mmkit.audit.label_review import LabelReview, ReviewWidget
from mmkit.data.caption_reader import parse_impression
from mmkit.data.lint_fix import replace_columns
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.data.records import FEATURES, encode_png, make_record

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def ds(cache):
    return load_melanoma_pairs(180, seed=2050, size=32, masks=False)


def world(n=300, d=12, seed=0, share=0.1):
    "Vectors that are two views of one thing, some of the captions passed round."
    g = np.random.default_rng(seed)
    z = g.normal(size=(n, d))
    x, y = (z @ g.normal(size=(d, 2 * d)) + 0.5 * g.normal(size=(n, 2 * d)) for _ in range(2))
    at = g.permutation(n)[: round(share * n)]
    to = np.arange(n)
    to[at] = np.roll(at, 1)
    return x, y[to], to != np.arange(n), g.permutation(n) % 5


# ---- planting
@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NOISE_KINDS), st.floats(0, 1), st.integers(0, 5))
def test_planted_is_what_it_says(ds, kind, share, seed):
    p = plant_label_noise(ds, kind, share, seed)
    own = ds["caption"][:]
    assert (
        [a != b for a, b in zip(p.captions, own)] == p.is_wrong.tolist()
        and p.is_wrong.sum() <= round(share * len(ds))
        and plant_label_noise(ds, kind, share, seed).captions == p.captions
    )
    if kind != "one attribute":
        assert sorted(p.captions) == sorted(own)
    if kind == "same label":
        assert [parse_impression(c) for c in p.captions] == ds["label"][:]
    if kind == "one attribute":
        for c, o, w in zip(p.captions, own, p.is_wrong):
            a, b = data.parse_attributes(c), data.parse_attributes(o)
            assert sum(a[k] != b[k] for k in a) == w and parse_impression(c) == parse_impression(o)
        assert p.is_wrong.sum() == round(share * len(ds))


def test_what_cannot_be_planted(ds):
    same = [dict(caption="Yes.", label="melanoma", attributes=None)] * 9
    assert not plant_label_noise(same, "swap", 1.0).is_wrong.any(), (
        "word for word the same is not wrong"
    )
    gaps = [dict(caption=c, label=None, attributes=None) for c in ("a", None, "b", "", "c")]
    p = plant_label_noise(gaps, "swap", 1.0)
    assert (
        p.captions[1] is None
        and p.captions[3] == ""
        and p.is_wrong.tolist() == [True, False, True, False, True]
    )
    assert plant_label_noise([], "swap", 0.5).captions == []
    for bad in (dict(kind="swaps"), dict(noise_rate=1.5), dict(noise_rate=-0.1)):
        with pytest.raises(ValueError, match="not known|share of the records"):
            plant_label_noise(ds, **bad)
    with pytest.raises(ValueError, match="record . knows no attribute"):
        plant_label_noise(same, "one attribute", 1.0)


def test_folds_keep_patients_together(ds):
    f = assign_folds(ds, 4)
    assert (
        len({(p, k) for p, k in zip(ds["patient"], f)}) == len(set(ds["patient"]))
        and set(f) == set(range(4))
        and (assign_folds(ds, 4, seed=1) != f).any()
    )
    with pytest.raises(ValueError, match="other patients"):
        assign_folds(ds.select([0, 1]) if ds[0]["patient"] == ds[1]["patient"] else ds.select([0]))
    with pytest.raises(ValueError):
        assign_folds(ds.select([]))


# ---- witnesses
def test_alignment_is_canonical_correlation():
    x, y, _, _ = world(400, 6, share=0.0)
    m = fit_cca(x, y, 4, 1e-10)
    U, V = CCA(4, max_iter=5000, tol=1e-9).fit_transform(x, y)
    np.testing.assert_allclose(
        m.correlations, [np.corrcoef(U[:, k], V[:, k])[0, 1] for k in range(4)], atol=2e-3
    )
    np.testing.assert_allclose(np.linalg.norm(m.transform_image(x), axis=1), 1)
    assert fit_cca(x, y, 99).correlations.shape == (12,)


def test_similarity_is_cross_fitted():
    x, y, wrong, fold = world()
    s = score_by_similarity(x, y, fold)
    assert roc_auc_score(wrong, s) > 0.95
    y2 = y.copy()
    at = np.flatnonzero(fold == 2)[0]
    y2[at] += 50  # a pair's own words move its fold's scores, and no model that judges this fold
    a, b = fit_cca(x[fold != 2], y[fold != 2]), fit_cca(x[fold != 2], y2[fold != 2])
    np.testing.assert_array_equal(a.image_map.matrix, b.image_map.matrix)
    moved = score_by_similarity(x, y2, fold)
    same = [i for i in range(len(x)) if fold[i] == 2 and i != at]
    shift = moved[same] - s[same]
    assert (
        np.abs(
            shift
            - (
                a.transform_image(x[same])
                @ (a.transform_text(y2[[at]]) - a.transform_text(y[[at]]))[0]
            )
            / (2 * (fold == 2).sum())
        ).max()
        < 1e-9
    ), "only the typical caption moved"
    np.testing.assert_allclose(score_by_similarity(3 * x + 1, y * 0.2 - 7, fold), s, atol=1e-4)


@given(st.integers(2, 40), st.integers(1, 50), st.integers(1, 17))
@settings(deadline=None, max_examples=25)
def test_neighbours_as_scikit_learn_finds_them(n, k, block):
    a = np.random.default_rng(n).normal(size=(n, 4))
    who, near = k_nearest_neighbors(a, k, block)
    k = min(k, n - 1)
    z = (a - a.mean(0)) / (a.std(0) + 1e-6)
    d, i = NearestNeighbors(n_neighbors=k, metric="cosine").fit(z).kneighbors()
    np.testing.assert_allclose(1 - near, d, atol=1e-5)
    assert who.shape == (n, k) and not (who == np.arange(n)[:, None]).any()


def test_neighbours_disagree_about_strangers():
    x, y, wrong, _ = world()
    plain = score_by_neighbors(x, y)
    assert roc_auc_score(wrong, plain) > 0.9
    known = score_by_neighbors(x, y, neighbor_suspicion=wrong.astype(float))
    assert roc_auc_score(wrong, known) >= roc_auc_score(wrong, plain) - 0.01
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(
        score_by_neighbors(x[order], y[order])[np.argsort(order)], plain, atol=1e-4
    )


def test_pair_loss_is_the_contrastive_loss():
    g = np.random.default_rng(0)
    a, b = (normalize(g.normal(size=(40, 8))) for _ in range(2))
    ids = g.integers(0, 25, 40)
    b = b[ids]  # the same words, the same vector
    for i in (None, ids):
        assert contrastive_loss_per_pair(a, b, i).mean() == pytest.approx(
            float(
                losses.info_nce(
                    torch.tensor(a), torch.tensor(b), 0.07, None if i is None else torch.tensor(i)
                )
            ),
            abs=1e-5,
        )
    whole = contrastive_loss_per_pair(a, b)
    part = contrastive_loss_per_pair(a, b, sample_size=39)
    assert np.isfinite(part).all() and np.abs(part - whole).max() < 3
    assert contrastive_loss_per_pair(a[:1], b[:1]).tolist() == [0.0]


def test_what_is_learned_late():
    x, y, wrong, _ = world()
    L = record_training_dynamics(x, y, num_train_epochs=6)
    assert (
        L.shape == (6, 300)
        and L.mean(1)[-1] < L.mean(1)[0]
        and roc_auc_score(wrong, L.mean(0)) > 0.95
    )
    np.testing.assert_array_equal(L, record_training_dynamics(x, y, num_train_epochs=6))
    assert (record_training_dynamics(x, y, num_train_epochs=6, seed=1) != L).any()
    before = torch.get_rng_state()
    fit_contrastive_maps(x, y, max_steps=2)
    assert torch.equal(before, torch.get_rng_state()), "nobody else's dice are thrown"


def test_second_opinion_is_a_cross_fitted_probe(ds):
    g = np.random.default_rng(0)
    veil = np.array([a["veil"] for a in ds["attributes"]])
    x = g.normal(size=(len(ds), 5)) + 2 * (veil == "present")[:, None]
    fold = assign_folds(ds)
    o = cross_val_probe(x, ds["caption"], fold)
    at, learn = fold == 1, fold != 1
    p = (
        make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=500))
        .fit(x[learn], veil[learn])
        .predict_proba(x[at])
    )
    np.testing.assert_allclose(o.probabilities["veil"][at], p, atol=1e-6)
    assert o.levels["veil"] == ["absent", "present"] and set(o.levels) > {"impression", "skin"}
    flip = [c for c in ds["caption"]]
    i = int(np.flatnonzero(veil == "present")[0])
    flip[i] = flip[i].replace("a blue-white veil", "no veil")
    assert (
        cross_val_probe(x, flip, fold).log_odds_against("veil")[i]
        > 0.5
        > 0
        > o.log_odds_against("veil")[i]
    )
    np.testing.assert_allclose(
        score_by_attributes(o),
        np.log(
            np.sum([np.exp(np.nan_to_num(o.log_odds_against(a), nan=-20)) for a in o.levels], 0)
        ),
        atol=1e-6,
    )
    [data.parse_attributes(c)["veil"] for c in flip]
    odds = o.log_odds_against("veil")
    assert np.isfinite(odds).all()


def test_captions_that_name_nothing_give_no_opinion():
    x, y, _, fold = world(60)
    o = cross_val_probe(x, ["A mole."] * 60, fold)
    assert not o.levels and (score_by_attributes(o) == 0).all()
    s, _ = run_detectors(x, y, [f"Mole {i}." for i in range(60)], fold)
    w = learn_detector_weights(x, y, [f"Mole {i}." for i in range(60)], fold)
    assert (
        w["attributes"] < 1e-3
        and sum(w.values()) == pytest.approx(1)
        and np.isfinite(combine_ranks(s, w)).all()
    )
    few = ["Clinical impression: benign."] * 57 + ["Clinical impression: melanoma."] * 3
    assert "impression" not in cross_val_probe(x, few, fold).levels, (
        "three melanomas teach no probe"
    )


@given(
    st.dictionaries(
        st.sampled_from("abc"),
        arrays(np.float64, 7, elements=st.floats(-9, 9).map(lambda v: round(v, 1))),
        min_size=1,
    )
)
def test_ranks_do_not_mind_the_scale(scores):
    c = combine_ranks(scores)
    assert ((c >= 0) & (c <= 1)).all()
    np.testing.assert_allclose(c, combine_ranks({k: np.exp(v) for k, v in scores.items()}))
    one = next(iter(scores))
    np.testing.assert_allclose(combine_ranks(scores, {one: 5.0}), combine_ranks({one: scores[one]}))


@given(
    arrays(np.float64, 9, elements=st.integers(0, 4).map(float)), arrays(bool, 9), st.integers(0, 9)
)
def test_found_as_counted_by_hand(s, wrong, k):
    got, first = detection_metrics(s, wrong, k), sorted(range(9), key=lambda i: (-s[i], i))[:k]
    hit = sum(wrong[i] for i in first)
    assert (
        top_k_indices(s, k).tolist() == first
        and (np.isnan(got["precision"]) if not k else got["precision"] == hit / k)
        and (np.isnan(got["recall"]) if not wrong.any() else got["recall"] == hit / wrong.sum())
    )
    if 0 < wrong.sum() < 9:
        assert got["AUROC"] == roc_auc_score(wrong, s) and got[
            "average precision"
        ] == average_precision_score(wrong, s)
    else:
        assert np.isnan(got["AUROC"])


# ---- on records
@pytest.fixture(scope="module")
def judged(ds):
    model, processor = models.load()
    p = plant_label_noise(ds, "swap", 0.1, seed=3)
    bad = replace_columns(ds, caption=p.captions)
    return model, processor, p, bad, find_label_issues(model, processor, bad, show_progress=False)


def test_suspects(judged, ds):
    model, processor, p, bad, s = judged
    assert (
        roc_auc_score(p.is_wrong, s.suspicion) > 0.7  # 0.80 to 0.97 over four seeds
        and sorted(s.ranking) == list(range(len(ds)))
        and (np.diff(s.suspicion[s.ranking]) <= 0).all()
    )
    for i in s.ranking[:20]:
        assert (
            s.explain(i).endswith(".") and s.explain(i)[0].isupper() and "nan" not in s.explain(i)
        )
    says = next(s.explain(i) for i in s.ranking if "The caption says" in s.explain(i))
    assert "the image looks like" in says and "images most like it" in says
    quiet = s.explain(int(s.ranking[-1]))
    assert "no single attribute" in quiet.lower() and len(s.table(5)) == 5 and len(repr(s)) < 20_000


def test_reasons_are_true_of_the_caption(judged):
    *_, s = judged
    for i in s.ranking[:30]:
        for a in s.probe_predictions.levels:
            if (
                "he caption says"
                f" {describe_attribute(a, s.probe_predictions.caption_attributes[i].get(a, ''))};"
                in s.explain(i)
            ):
                break
        else:
            assert "no single attribute" in s.explain(i).lower()


def test_refit_tells_right_from_wrong(judged, ds):
    model, processor, p, bad, s = judged
    test = load_melanoma_pairs(90, seed=2051, size=32, masks=False)
    x, y = extract_pair_features(model, processor, ds)
    X, Y = extract_pair_features(model, processor, test)
    n = np.arange(len(ds))
    good = retrain_and_evaluate(x, y, ds["caption"], n, X, Y, test, 60)
    lost = np.roll(n, 7)
    none = retrain_and_evaluate(x, y[lost], [ds["caption"][i] for i in lost], n, X, Y, test, 60)
    assert (
        good["R@1"] > none["R@1"] + 0.1
        and good["macro-F1"] > none["macro-F1"] + 0.15
        and retrain_and_evaluate(x, y, ds["caption"], n, X, Y, test, 60) == good
    )
    half = retrain_and_evaluate(
        x, y, [c if i % 2 else "A mole." for i, c in enumerate(ds["caption"])], n, X, Y, test, 2
    )
    assert half["macro-F1"] > good["macro-F1"] - 0.12, (
        "who says nothing teaches nothing, nor anything wrong"
    )


def test_records_that_know_little(judged, ds):
    model, processor, *_ = judged
    bare = Dataset.from_list(
        [
            make_record(
                id=str(i),
                image=dict(bytes=encode_png(np.asarray(ds[i]["image"])), path=None),
                caption=f"A mole of patient {i}.",
            )
            for i in range(30)
        ],
        features=FEATURES,
    )
    s = find_label_issues(model, processor, bare, show_progress=False)
    assert np.isfinite(s.suspicion).all() and "no single attribute" in s.explain(0).lower()
    with pytest.raises(
        ValueError, match=r"1 record\(s\) have no caption \(the first is number 4\)"
    ):
        extract_pair_features(
            model,
            processor,
            replace_columns(bare, caption=[None if i == 4 else "x" for i in range(30)]),
        )
    with pytest.raises(ValueError):
        find_label_issues(model, processor, bare.select([]), show_progress=False)
    with pytest.raises(ValueError, match="other patients"):
        find_label_issues(model, processor, bare.select([0]), show_progress=False)


# ---- decisions
def test_decisions_are_kept_undone_and_applied(ds, tmp_path):
    file = tmp_path / "deep" / "d.json"
    r = LabelReview(ds, file)
    assert not file.exists()
    for row, what in ((3, "remove"), (5, "keep"), (3, "keep"), (8, "remove")):
        r.decide(row, what, reason="<b>")
    r.decide(9, "fix", "A dark lesion.")
    again = LabelReview(ds, file)
    assert again.decisions == r.decisions and {
        i: d["decision"] for i, d in again.decisions.items()
    } == {3: "keep", 5: "keep", 8: "remove", 9: "fix"}
    done = again.apply(ds)
    assert (
        (done.changed, done.left_out, len(done.dataset)) == (1, 1, len(ds) - 1)
        and done.dataset["caption"][8] == "A dark lesion."
        and ds["caption"][9] != "A dark lesion."
        and done.dataset["id"][8] == ds["id"][9]
    )
    while again.undo():
        pass
    assert LabelReview(ds, file).decisions == {} and os.listdir(file.parent) == ["d.json"]
    kept = LabelReview(ds)
    kept.decide(0, "remove")
    assert kept.apply(ds).left_out == 1, "without a file it lives in memory"


BAD = {
    "cut off": (lambda b: b[:-20], "is damaged"),
    "empty": (lambda b: b"", "is damaged"),
    "not text": (lambda b: b"\xff\xfe\x00" + b, "is damaged"),
    "deep": (lambda b: b"[" * 200_000, "is damaged"),
    "a list": (lambda b: b"[]", "not a file of decisions"),
    "other json": (lambda b: b'{"a": 1}', "not a file of decisions"),
    "other pairs": (lambda b: b.replace(b'"about": "', b'"about": "x'), "about other pairs"),
    "row": (lambda b: b.replace(b'"row": 3', b'"row": 3000'), "decision 1: row 3000"),
    "row as text": (lambda b: b.replace(b'"row": 3', b'"row": "3"'), "decision 1: row '3'"),
    "decision": (lambda b: b.replace(b'"remove"', b'"delete"'), "decision 'delete': one of keep"),
    "no caption": (lambda b: b.replace(b'"A dark lesion."', b"null"), "no caption"),
    "token": (lambda b: b.replace(b"A dark", b"A <image> dark"), "take for its own"),
    "another id": (
        lambda b: b.replace(b'"id": "world2050-000003"', b'"id": "world2050-000004"'),
        "is 'world2050-000003', not",
    ),
    "no dict": (
        lambda b: b.replace(b'"decisions": [', b'"decisions": [7, '),
        "decision 1: 7 is no decision",
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_a_damaged_file_is_named_and_left_alone(how, ds, tmp_path):
    file = tmp_path / "d.json"
    r = LabelReview(ds, file)
    r.decide(3, "remove")
    r.decide(5, "fix", "A dark lesion.")
    harm, says = BAD[how]
    data = harm(file.read_bytes())
    assert data != file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=says):
        LabelReview(ds, file)
    assert file.read_bytes() == data
    with pytest.raises(ValueError, match="another program"):
        r.decide(1, "keep")
    assert file.read_bytes() == data and set(r.decisions) == {
        3,
        5,
    }, "what could not be written is not believed"


def test_what_is_no_decision(ds, tmp_path):
    r = LabelReview(ds, tmp_path / "d.json")
    for args, says in (
        ((len(ds), "keep"), "counted from 0"),
        ((-1, "keep"), "counted from 0"),
        ((0, "burn"), "one of keep"),
        ((0, "fix"), "no caption"),
        ((0, "fix", "  "), "no caption"),
        ((0, "fix", "x <eos>"), "take for its own"),
    ):
        with pytest.raises(ValueError, match=says):
            r.decide(*args)
    assert not (tmp_path / "d.json").exists() and not r.decisions and r.undo() is None
    with pytest.raises(ValueError, match="not the pairs"):
        r.apply(ds.select(range(9)))


def test_a_failed_write_loses_nothing(ds, tmp_path, monkeypatch):
    r = LabelReview(ds, tmp_path / "d.json")
    r.decide(1, "keep")
    before = (tmp_path / "d.json").read_bytes()

    def broken(*a):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError):
        r.decide(2, "remove")
    assert (
        (tmp_path / "d.json").read_bytes() == before
        and set(r.decisions) == {1}
        and os.listdir(tmp_path) == ["d.json"]
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attrs = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attrs |= {k for k, _ in attrs}


def test_the_widget_without_a_screen(judged, tmp_path):
    *_, bad, s = judged
    file = tmp_path / "d.json"
    w = ReviewWidget(bad, s, file, max_cards=5)
    assert [c["row"] for c in w.cards] == s.ranking[:5].tolist() and w.cards[0]["image"].startswith(
        "data:image/jpeg"
    )
    w._on_message(w, dict(do="remove"), [])
    w._on_message(w, dict(do="fix", caption="A dark lesion."), [])
    assert (
        w.current == 2
        and LabelReview(bad, file).decisions[w.cards[1]["row"]]["caption"] == "A dark lesion."
        and LabelReview(bad, file).decisions[w.cards[0]["row"]]["reason"] == w.cards[0]["reason"]
    )
    w._on_message(w, dict(do="undo"), [])
    assert w.current == 1 and len(w.decisions) == 1 and "taken back" in w.status
    for bad_message in ({}, dict(do="burn"), dict(do="fix", caption=7), dict(do=["keep"])):
        w._on_message(w, bad_message, [])
    assert len(w.decisions) == 1 and len(json.loads(file.read_text())["decisions"]) == 1
    later = ReviewWidget(bad, s, file, max_cards=5)
    assert later.decisions == w.decisions and "1 decided" in later.status
    file.write_text("{")
    w._on_message(w, dict(do="keep"), [])
    assert "another program" in w.status and len(w.decisions) == 1


def test_hostile_captions_in_the_still(judged, ds):
    *_, bad, s = judged
    evil = ["</i><script>alert(1)</script>", '"><img src=x onerror=alert(1)>']
    c = [*evil, *bad["caption"][2:]]
    d = replace_columns(bad, caption=c, id=[*evil, *bad["id"][2:]])
    t = LabelIssues(
        c,
        {k: np.r_[9.0, 8.0, v[2:] * 0] for k, v in s.scores.items()},
        s.weights,
        s.probe_predictions,
        s.neighbors,
    )
    w = ReviewWidget(d, t, max_cards=3)
    seen = Tags()
    seen.feed(w._repr_html_())
    assert (
        w.cards[0]["caption"] == evil[0]
        and "script" not in seen.tags
        and not any(a.startswith("on") for a in seen.attrs)
        and seen.tags <= {"div", "img", "b", "br", "i", "p"}
    )


def test_a_reason_names_what_speaks_most_against_it():
    said = [
        dict(veil="present", network="typical", skin="light", impression="benign"),
        *[
            dict(veil=v, network="typical", skin="dark", impression="benign")
            for v in ("absent", "absent", "present")
        ],
    ]
    levels = dict(
        skin=["dark", "light"],
        veil=["absent", "present"],
        network=["absent", "typical"],
        impression=["benign", "melanoma"],
    )

    def one(a, b):
        return np.tile([a, b], (4, 1))

    s = LabelIssues(
        ["x"] * 4,
        dict(similarity=np.array([3.0, 0, 1, 2])),
        dict(similarity=1.0),
        ProbePredictions(
            said,
            levels,
            dict(
                skin=one(0.7, 0.3),
                veil=one(0.95, 0.05),
                network=one(0.1, 0.9),
                impression=one(0.6, 0.4),
            ),
        ),
        np.array([[1, 2, 3]] * 4),
    )
    assert (
        s.explain(0)
        == "The caption says a blue-white veil; the image looks like no veil (95% to 5%), and of 3"
        " images most like it 1 has a blue-white veil. The caption says light skin; the image"
        " looks like dark skin (70% to 30%), and of 3 images most like it 0 have light skin."
    )
    assert (
        s.explain(1)
        == "No single attribute stands out; as a whole, caption and image lie further apart than"
        " in 0% of the pairs."
        and s.ranking.tolist()
        == [
            0,
            3,
            2,
            1,
        ]
    )
