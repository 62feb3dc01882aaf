"""Reports: statistics that agree with scikit-learn, baselines that are what they should be, odd
records, pages and files."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
)

from mmkit import chat, core, data, evaluate, models, report
from mmkit.chat.templates import tiny_processor
from mmkit.core.stats import (
    bootstrap,
    classification_rates,
    expected_calibration_error,
    holm_correction,
    mcnemar_test,
    paired_bootstrap,
)
from mmkit.data.caption_reader import mark_claims_by_sentence
from mmkit.data.captions import CAPTION_STRUCTURES
from mmkit.data.instructions import (
    BAR_COLOURS,
    JSON_PROMPT,
    JSON_SCHEMA,
    REPORT_PROMPT,
    caption_from_attributes,
    chart_records,
    json_from_attributes,
    parse_chart_values,
    parse_json_answer,
    report_from_attributes,
)
from mmkit.data.questions import grid_cell
from mmkit.evaluate.scoring import SimilarityMatrix, rank_matches
from mmkit.lesions.lesion import ATTRIBUTE_LEVELS
from mmkit.report.context import IMAGE_CONDITIONS, generate_from_features, generate_from_images
from mmkit.report.page import worst_items
from mmkit.report.statistics import STATISTICS
from mmkit.report.task import PREDICTORS, TaskNotApplicable, TaskResult
from mmkit.report.tasks_answers import evaluate_json_extraction, evaluate_vqa
from mmkit.report.tasks_captions import (
    evaluate_attributes,
    evaluate_impressions,
    evaluate_report_generation,
    label_by_abcd_rule,
)
from mmkit.report.tasks_contrastive import evaluate_retrieval, evaluate_zero_shot
from mmkit.report.tasks_grounding import (
    evaluate_grounding,
    evaluate_hallucination,
    evaluate_pointing_game,
    sample_structure_questions,
)
from mmkit.tour import find_external_urls

PUBLISHED = {
    "base": (58, 3219, 0, 36),
    "tuned": (35, 1438, 23, 1817),
    "medical": (12, 307, 46, 2948),
}


@pytest.fixture(scope="module")
def ds(cache):
    return data.load_melanoma_pairs(n=9, seed=21, size=32, masks=False, prevalence=0.5)


@pytest.fixture(scope="module")
def base():
    return models.load()


@pytest.fixture(scope="module")
def exam(base, ds):
    return report.EvalContext(*base, ds)


@pytest.fixture(scope="module")
def graded(exam):
    return report.evaluate_tasks(exam, show_progress=False, n_resamples=20, model_name="base <i>")


def a_task(n=40, seed=0, right=0.7, patients=10):
    rng = np.random.default_rng(seed)
    items = [
        dict(id=str(k), patient=f"p{k % patients}", record_index=None, prompt="?", reference="x")
        for k in range(n)
    ]
    marks = {
        w: dict(right=list((rng.random(n) < p).astype(float)))
        for w, p in dict(model=right, shuffled=0.5, majority=0.6).items()
    }
    return TaskResult(
        "t", "?", items, {w: ["x"] * n for w in marks}, marks, {"accuracy": ("mean", ["right"], 1)}
    )


# --- the published counts


def test_published_counts_lose_to_a_constant_answer():
    "One word beats all three; the recall's interval; an AUC of hard labels."
    for tp, fp, fn, tn in PUBLISHED.values():
        assert (tp + fn, tp + fp + fn + tn) == (58, 3313) and classification_rates(tp, fp, fn, tn)[
            "accuracy"
        ] < 3255 / 3313
    i = core.proportion_interval(35, 58)
    assert (round(i.value, 3), round(i.low, 2), round(i.high, 2)) == (0.603, 0.47, 0.72)
    exact = core.proportion_interval(35, 58, method="exact")
    assert (
        exact.low < i.low
        and exact.high > i.high
        and binom.sf(34, 58, exact.low) == pytest.approx(0.025, abs=1e-6)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0.02, 0.98), st.floats(0.02, 0.4))
def test_required_positives_is_where_the_interval_fits(n, rate, within):
    e = core.required_positives(n, rate, within)
    assert (
        bool(e) == (e.interval.width <= 2 * within + 1e-12)
        and e.interval.low <= rate + 1e-12
        and rate - 1e-12 <= e.interval.high
    )
    assert core.required_positives(e.required, rate, within) and not (
        e.required > 2 and core.required_positives(e.required - 1, rate, within)
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: core.proportion_interval(4, 3),
        lambda: core.proportion_interval(-1, 3),
        lambda: core.required_positives(3, 80),
        lambda: core.required_positives(3, 0.8, 0),
    ],
)
def test_impossible_counts_raise(call):
    with pytest.raises(ValueError, match="exchanged|between 0 and 1"):
        call()


# --- statistics


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 60))
def test_statistics_agree_with_scikit_learn(seed, n):
    "Ties, a score of exactly 0 or 1, few items."
    rng = np.random.default_rng(seed)
    y = np.r_[0.0, 1.0, rng.integers(0, 2, n - 2)]
    p = np.round(rng.random(n), int(rng.integers(1, 4)))
    S = STATISTICS
    assert (
        S["AUROC"](y, p) == pytest.approx(roc_auc_score(y, p))
        and S["AUPRC"](y, p) == pytest.approx(average_precision_score(y, p))
        and S["Brier"](y, p) == pytest.approx(brier_score_loss(y, p))
    )
    f, c = calibration_curve(y, p, n_bins=5)
    b = np.minimum((p * 5 + 1e-9).astype(int), 4)
    n_b = np.bincount(b, minlength=5)
    edges = np.isclose(p * 5 % 1, 0).any()
    if not edges:
        assert expected_calibration_error(y, p, 5) == pytest.approx(
            (n_b[n_b > 0] / n * np.abs(f - c)).sum()
        )  # a score on an edge may go either way
    assert S["balanced"](y, (p > 0.5) == y) == pytest.approx(balanced_accuracy_score(y, p > 0.5))
    best = max(
        recall_score(y, p > t)
        for t in np.r_[p, -1]
        if recall_score(y, p > t, pos_label=0) >= 0.9 - 1e-9
    )
    assert S["sensitivity at 90% specificity"](y, p) == pytest.approx(best)
    t, s = rng.integers(0, 3, n).astype(float), rng.integers(0, 4, n).astype(float)
    s[s == 3] = np.nan
    t[:2] = 0, 1
    want = f1_score(
        t, np.nan_to_num(s, nan=9), labels=sorted(set(t)), average="macro", zero_division=0
    )
    assert S["macro-F1"](t, s) == pytest.approx(want)


def test_undefined_statistics_are_nan():
    "One class, nothing known, nan scores: nan, not a number that looks like one."
    for name in ("AUROC", "AUPRC", "Brier", "balanced", "sensitivity at 90% specificity"):
        assert math.isnan(STATISTICS[name](np.ones(4), np.arange(4.0))) and math.isnan(
            STATISTICS[name](np.array([]), np.array([]))
        )
    assert (
        math.isnan(STATISTICS["mean"]([math.nan]))
        and math.isnan(STATISTICS["ratio"]([0.0], [0.0]))
        and math.isnan(STATISTICS["macro-F1"]([math.nan], [1.0]))
        and math.isnan(expected_calibration_error([], []))
    )
    assert STATISTICS["F1"]([1, 0], [2, 1], [2, 2]) == pytest.approx(2 / 7)


def test_mcnemar_and_holm_by_hand():
    a, b = [1] * 9 + [0] * 2 + [1] * 5, [0] * 9 + [1] * 2 + [1] * 5
    assert (
        mcnemar_test(a, b) == (9, 2, pytest.approx(2 * binom.cdf(2, 11, 0.5)))
        and mcnemar_test(b, a)[2] == mcnemar_test(a, b)[2]
    )
    p = holm_correction([0.04, 0.001, 0.03, 0.5])
    assert np.allclose(p, [0.09, 0.004, 0.09, 0.5]) and (holm_correction([0.9, 0.8]) <= 1).all()


# --- a task


def test_task_intervals_resample_patients():
    t = a_task()
    right, who = t.scores["model"]["right"], t.patients()
    assert t.interval("accuracy", n_resamples=200) == bootstrap(
        np.mean, right, groups=who, n_resamples=200
    )
    y = np.ones(len(t))
    both = paired_bootstrap(
        lambda y, p: np.mean(np.asarray(p)),
        y,
        right,
        t.scores["majority"]["right"],
        groups=who,
        n_resamples=200,
    )
    assert t.paired_difference("accuracy", "majority", n_resamples=200) == both
    assert t.best_blind_baseline("accuracy") == max(
        ("majority", "shuffled"), key=lambda w: t.value("accuracy", w)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(12)))
def test_order_of_items_does_not_change_a_measure(seed, order):
    t = a_task(12, seed)
    s = TaskResult(
        t.name,
        t.description,
        [t.items[i] for i in order],
        t.predictions,
        {w: {c: [v[i] for i in order] for c, v in m.items()} for w, m in t.scores.items()},
        t.measures,
    )
    assert s.value("accuracy") == pytest.approx(t.value("accuracy")) and s.best_blind_baseline(
        "accuracy"
    ) == t.best_blind_baseline("accuracy")


def test_best_blind_baseline_respects_the_sign_and_nan():
    t = a_task()
    t.measures = {"error": ("mean", ["right"], -1)}
    assert t.best_blind_baseline("error") == min(
        ("majority", "shuffled"), key=lambda w: t.value("error", w)
    )
    for undefined, best in (("majority", "shuffled"), ("shuffled", "majority")):
        t = a_task()
        t.scores[undefined]["right"] = [math.nan] * 40
        assert t.best_blind_baseline("accuracy") == best, "nobody is best by being undefined"


def test_worst_items_come_first():
    t = a_task(6)
    t.scores["model"] = {"right": [1.0, 0, 0, 0.5, 0, 1], "error": [0.1, 0.6, 0.9, 0.2, 0.7, 0]}
    assert worst_items(t, 9) == [2, 4, 1, 3] and worst_items(t, 2) == [2, 4]


# --- the tasks


def test_oracle_is_never_wrong(graded):
    assert (
        set(graded.tasks)
        == {
            "caption attributes",
            "impression",
            "questions",
            "retrieval",
            "zero-shot",
            "grounding",
            "JSON extraction",
            "hallucination",
            "charts",
            "report",
        }
        and not graded.skipped
    )
    for t in graded.tasks.values():
        for m, (_, _, sign) in t.measures.items():
            if sign:
                assert t.value(m, "oracle") == (1 if sign > 0 else 0), (t.name, m)
        assert (
            np.asarray(t.scores["oracle"]["right"]).min() == 1
            and set(t.predictions) == set(PREDICTORS)
            and all(len(s) == len(t) for s in t.predictions.values())
        )
        assert len({i["id"] for i in t.items}) == len(t), t.name


def test_answers_agree_with_generate_and_with_transformers(exam, ds, base, graded):
    "All three conditions agree with `evaluate.generate`, and with other families' path."
    got = exam.generate_captions()
    for who, view in {"model": "original", "text-only": "blank", "shuffled": "shuffled"}.items():
        assert got[who] == evaluate.generate(
            *base, exam.records, image_condition=view, show_progress=False
        ), who
    at, asked = [2, 0, 1], ["Are there dots?", "Where is the lesion?", "Are there dots?"]
    views = ["original", "blank", "shuffled"]
    assert generate_from_images(exam, at, asked, views, 12) == generate_from_features(
        exam, at, asked, views, 12
    )
    s = evaluate.score_captions(exam.records, got["model"], n_resamples=1)
    t = graded.tasks["caption attributes"]
    assert t.value("macro-F1") == pytest.approx(s.macro_f1.value) and {
        a: t.value(f"macro-F1, {a}") for a in s.attributes
    } == pytest.approx({a: v.value for a, v in s.attributes.items()})
    i = graded.tasks["impression"]
    assert i.value("AUROC") == pytest.approx(
        evaluate.auroc_interval(exam.records, i.scores["model"]["score"], n_resamples=1).value
    )
    assert i.value("balanced accuracy", "majority") == 0.5 and i.value("AUROC", "majority") == 0.5


class ScriptedContext(report.EvalContext):
    "A context whose model gives the answers of a script, whatever the image."

    def __init__(self, *args, script, **options):
        super().__init__(*args, **options)
        self.script = script

    def generate_answers(self, indices, prompts, max_new_tokens=32):
        return {predictor: [self.script(p) for p in prompts] for predictor in IMAGE_CONDITIONS}


def test_a_model_that_says_the_majority_scores_as_the_majority(base, ds):
    top = evaluate.majority_baseline(ds, 1)[0]
    answers = {
        chat.PROMPT: caption_from_attributes(top),
        JSON_PROMPT: json_from_attributes(top, top["impression"]),
        REPORT_PROMPT: report_from_attributes(top, top["impression"]),
    }
    context = ScriptedContext(*base, ds, script=answers.get)
    for evaluate_task in (
        evaluate_attributes,
        evaluate_json_extraction,
        evaluate_report_generation,
    ):
        task = evaluate_task(context)
        for measure in task.measures:
            majority = pytest.approx(task.value(measure, "majority"), nan_ok=True)
            assert task.value(measure) == majority, (task.name, measure)
            assert task.value(measure, "shuffled") == majority, (task.name, measure)


def always_the_centre(prompt):
    "Places everything in the centre, names dots, and gives one JSON."
    if prompt.startswith("Where"):
        return "In the centre."
    if prompt == chat.PROMPT:
        return "dots, on light skin"
    return (
        '{"border": "regular", "network": "absent", "streaks": true, "veil": true, '
        '"impression": "benign"}'
    )


def test_grounding_scores_naming_and_placing_each(base, ds):
    "An answer that always says the centre is right where the box is in the centre."
    task = evaluate_grounding(ScriptedContext(*base, ds, script=always_the_centre))
    boxes = [
        (box["name"], grid_cell(box["box"]))
        for record in ds
        for box in record["boxes"]
        if box["name"] != "lesion"
    ]
    placed = [cell == "centre" for _, cell in boxes]
    named = [name == "dots" for name, _ in boxes]
    assert task.value("placed") == pytest.approx(np.mean(placed))
    assert 0 < task.value("placed") < 1
    assert task.value("named") == pytest.approx(np.mean(named))
    both = np.mean([n and p for n, p in zip(named, placed)])
    assert task.value("named and placed") == pytest.approx(both)


def test_json_fields_that_a_record_does_not_know_do_not_count(base, cache):
    known = [
        dict(id=f"k{k}", image=picture(k), attributes=dict(streaks=level))
        for k, level in enumerate(("present", "absent", "present"))
    ]
    task = evaluate_json_extraction(ScriptedContext(*base, known, script=always_the_centre))
    assert task.scores["model"]["right"] == [1, 0, 1]
    assert task.value("field F1") == pytest.approx(2 / 3)
    assert task.value("valid JSON") == 1


def test_ranks_count_ties_against_the_model():
    s = SimilarityMatrix(
        np.array([[0.9, 0.1, 0.5], [0.5, 0.5, 0.1], [0.2, 0.3, 0.1]]), np.eye(3, dtype=bool)
    )
    assert rank_matches(s).tolist() == [0, 1, 2]
    twins = SimilarityMatrix(np.array([[0.1, 0.9], [0.9, 0.1]]), np.ones((2, 2), bool))
    assert rank_matches(twins).tolist() == [0, 0], "the same caption is one's own"


def test_hallucination_questions_are_popular_and_adversarial():
    "Popular is what most have; adversarial what goes with what is there; nothing that is unknown."
    no = dict.fromkeys(CAPTION_STRUCTURES, "absent")
    known = [no | dict(dots="present", streaks="present")] * 3 + [no | dict(globules="present")] * 5
    got = {w: s for _, s, w in sample_structure_questions([no | dict(dots="present")], known)}
    assert (
        got["present"] == "dots"
        and got["popular"] == "globules"
        and got["adversarial"] == "streaks"
        and got["random"] not in ("dots",)
    )
    assert (
        sample_structure_questions([dict(dots="present")], known) == []
        and sample_structure_questions([no], known) == []
    )


@pytest.mark.parametrize(
    "text, fields, fits",
    [
        ('{"streaks": true, "border": "regular"}', {"streaks": True, "border": "regular"}, True),
        ('{"streaks": 1}', {}, False),
        ('{"border": true}', {}, False),
        ('{"other": "x", "veil": false}', {"veil": False}, False),
        ('{"veil": NaN}', None, False),
        ('{"veil": true, "veil": true}', None, False),
        ("[true]", None, False),
        ('{"border": ["regular"]}', {}, False),
        ('Sure: {"veil": true}', None, False),
        ("[" * 100_000, None, False),
        ("", None, False),
    ],
)
def test_json_answers_are_parsed_strictly(text, fields, fits):
    assert parse_json_answer(text) == (fields, fits)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({a: st.sampled_from([*v, None]) for a, v in ATTRIBUTE_LEVELS.items()}),
    st.sampled_from(["benign", "melanoma", None]),
)
def test_json_and_reports_parse_back(truth, label):
    "JSON and the longer report of any record say what it knows, and nothing false."
    fields, fits = parse_json_answer(json_from_attributes(truth, label))
    assert (
        fits and fields.get("impression") == label and set(fields) <= set(JSON_SCHEMA["properties"])
    )
    assert all(
        (
            (fields[k] == truth[k])
            if isinstance(fields[k], str)
            else fields[k] == (truth[k] == "present")
        )
        for k in fields
        if k != "impression"
    )
    claims = [
        c
        for _, cs in mark_claims_by_sentence(report_from_attributes(truth, label), truth, label)
        for c in cs
    ]
    assert all(ok for _, _, ok in claims) and {a for a, _, _ in claims} == {
        a for a, v in truth.items() if v not in (None, "absent")
    } | ({"impression"} if label else set())


def test_chart_bars_are_as_high_as_their_values():
    for r in chart_records(6, 3):
        assert parse_chart_values(r["answer"]) == r["values"]
        px = np.asarray(r["image"]).reshape(-1, 3)
        tall = {
            b: (px == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum()
            for b, c in BAR_COLOURS.items()
        }
        unit = min(tall[b] / r["values"][b] for b in tall)
        assert all(abs(tall[b] / unit - v) < 0.35 for b, v in r["values"].items()), (
            "a bar is as high as its value"
        )


def test_abcd_rule_differs_from_noisy_labels():
    "With noisy labels the rule errs as often as they do; else the record's own label counts."
    ds = data.load_melanoma_pairs(n=30, seed=3, size=16, masks=False, label_noise=0.4)
    wrong = [label_by_abcd_rule(r) != r["label"] for r in ds]
    assert 3 < sum(wrong) < 25
    assert (
        label_by_abcd_rule(dict(label="melanoma")) == "melanoma"
        and label_by_abcd_rule(dict(label=None, provenance='{"row": 3}')) is None
    )


# --- records of every kind


def picture(k=0):
    return Image.new("RGB", (40, 30), (90 + k, 80, 70))


def bare(n=4, **kw):
    return [dict(id=f"r{k}", image=picture(k), caption=f"lesion {k}", **kw) for k in range(n)]


def test_tasks_that_do_not_apply_are_skipped_with_a_reason(base, cache):
    r = report.evaluate_model(
        *base,
        bare(label="benign"),
        show_progress=False,
        n_resamples=10,
        tasks=(
            evaluate_attributes,
            evaluate_impressions,
            evaluate_vqa,
            evaluate_grounding,
            evaluate_hallucination,
            evaluate_json_extraction,
            evaluate_retrieval,
            evaluate_zero_shot,
        ),
    )
    assert set(r.tasks) == {"retrieval", "JSON extraction"} and {
        "attributes",
        "impressions",
        "vqa",
        "grounding",
        "hallucination",
        "zero_shot",
    } == set(r.skipped)
    assert "all 4 labelled records are benign" in str(r) and "no record has a question" in str(r)
    with pytest.raises(ValueError, match="no task is applicable.*no record has a question"):
        report.evaluate_model(*base, bare(), show_progress=False, tasks=(evaluate_vqa,))


def test_data_set_with_missing_values(base, cache):
    "As the loaders give it: some attributes, some labels, an image missing, two sources."
    from datasets import Dataset

    rows = [
        data.make_record(
            id=f"r{k}",
            image=picture(k) if k != 2 else None,
            caption=f"lesion {k}",
            label=(None, "benign", "melanoma")[k % 3],
            source="ab"[k % 2],
            patient="1",
            attributes=dict(streaks="present", dots="absent") if k % 2 else None,
            boxes=[dict(name="streaks", box=[0.1, 0.2, 0.5, 0.6])] if k == 1 else [],
        )
        for k in range(7)
    ]
    ds = Dataset.from_list([{**r, "image": r["image"]} for r in rows], features=data.FEATURES)
    r = report.evaluate_model(
        *base,
        ds,
        show_progress=False,
        n_resamples=10,
        tasks=(
            evaluate_attributes,
            evaluate_impressions,
            evaluate_vqa,
            evaluate_grounding,
            evaluate_hallucination,
            evaluate_json_extraction,
            evaluate_report_generation,
            evaluate_retrieval,
        ),
    )
    assert (
        r.metadata["records"] == 6
        and r.metadata["patients"] == 2
        and "1 record without an image" in str(r)
    )
    assert {k: len(t) for k, t in r.tasks.items()} == {
        "impression": 3,
        "grounding": 1,
        "hallucination": 12,
        "JSON extraction": 4,
        "report": 3,
        "retrieval": 6,
    } and set(r.skipped) == {"attributes", "vqa"}
    assert (
        "no attribute has two levels" in r.skipped["attributes"]
        and r.tasks["JSON extraction"].value("field F1", "oracle") == 1
    )


def test_pointing_game_of_oracle_and_majority(exam):
    "The oracle points into every box, the middle of the picture into those that hold it."
    t = evaluate_pointing_game(exam, "rollout", 4)
    assert len(t) == 4 and t.value("peak in the box", "oracle") == 1
    box = [json.loads(i["reference"]) for i in t.items]
    assert t.scores["majority"]["right"] == [
        float(b[0] <= 0.5 <= b[2] and b[1] <= 0.5 <= b[3]) for b in box
    ]
    for said, b, right in zip(t.predictions["model"], box, t.scores["model"]["right"]):
        x, y = (float(v) for v in said.removeprefix("peak at ").split(", "))
        near = min(abs(x - b[0]), abs(x - b[2]), abs(y - b[1]), abs(y - b[3])) < 0.02
        assert near or right == float(b[0] <= x <= b[2] and b[1] <= y <= b[3])


def test_context_refuses_bad_records(base, cache):
    with pytest.raises(ValueError, match="0 records"):
        report.evaluate_model(*base, [])
    with pytest.raises(ValueError, match="twice, such as 'r1'"):
        report.EvalContext(*base, bare()[:2] + [dict(bare()[1], image=picture(9))])
    with pytest.raises(ValueError, match="1 of 2 records"):
        report.EvalContext(*base, [bare()[0], dict(id="x", image=None)])
    e = report.EvalContext(*base, bare() + [dict(id="x", image=None)])
    assert len(e) == 4 and e.n_without_image == 1
    assert [len(report.EvalContext(*base, bare(), max_records=3, seed=s)) for s in (0, 1)] == [
        3,
        3,
    ] and len(
        {tuple(report.EvalContext(*base, bare(), max_records=2, seed=s).ids) for s in range(6)}
    ) > 1


def test_diverged_model_is_named(ds, cache):
    model, processor = models.load()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(TaskNotApplicable, match="nan; has the model diverged"):
        evaluate_impressions(report.EvalContext(model, processor, ds))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_other_families_have_every_task(family, ds, cache):
    model, processor = (
        models.tiny_random_model(family, vocab_size=1024).eval(),
        tiny_processor(family),
    )
    r = report.evaluate_model(
        model,
        processor,
        ds,
        max_records=4,
        show_progress=False,
        n_resamples=5,
        tasks=(
            evaluate_attributes,
            evaluate_hallucination,
            evaluate_impressions,
            evaluate_retrieval,
        ),
    )
    names = {"caption attributes", "hallucination", "retrieval"}
    both_labels = len(set(r.context.column("label"))) == 2
    assert set(r.tasks) == names | ({"impression"} if both_labels else set())


# --- the report


def test_page_loads_nothing_and_escapes_text(graded, tmp_path, ds):
    "Self-contained, and hostile text is shown as text."
    t = graded.tasks["questions"]
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    was = t.predictions["model"][0], t.items[0]["prompt"], t.scores["model"]["right"][0]
    t.predictions["model"][0], t.items[0]["prompt"], t.scores["model"]["right"][0] = (
        evil,
        evil,
        -1.0,
    )
    html = graded.write_page(tmp_path / "deep" / "r.html", errors_per_task=2).read_text(
        encoding="utf-8"
    )
    t.predictions["model"][0], t.items[0]["prompt"], t.scores["model"]["right"][0] = was
    graded.cached_rows.clear()
    assert (
        not find_external_urls(html)
        and "<script" not in html
        and "<img src=x" not in html
        and html.count("&lt;script") >= 2
        and "base &lt;i&gt;" in html
        and "<i>" not in html.split("</h1>")[0]
    )
    assert "default-src 'none'" in html and html.count("data:image/jpeg") >= 10


def test_report_is_saved_and_loaded(graded, tmp_path):
    back = report.EvalReport.load(graded.save(tmp_path / "r.json"))
    assert (
        str(back.table(all_measures=True)) == str(graded.table(all_measures=True))
        and back.metadata == graded.metadata
        and back.remarks() == graded.remarks()
    )
    told = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {"rows", "tasks", "skipped"} <= set(told) and "NaN" not in (
        tmp_path / "r.json"
    ).read_text()
    assert all(
        f in told["rows"][0]
        for f in (
            "task",
            "measure",
            "model",
            "majority",
            "text-only",
            "shuffled",
            "oracle",
            "difference",
        )
    )
    with pytest.raises(ValueError, match="no images"):
        back.write_page(tmp_path / "x.html")
    for text, why in (
        ('{"made_by": ', "no JSON"),
        ("[]", "not a report"),
        ('{"made_by": "mmkit report", "version": 1, "tasks": {}}', "of version 1"),
        ('{"made_by": "mmkit report", "version": 2, "tasks": {"a": {}}}', "missing"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            report.EvalReport.load(tmp_path / "bad.json")


def test_different_items_are_not_compared(graded, base, ds, tmp_path):
    same = report.compare_reports(graded, report.EvalReport.load(graded.save(tmp_path / "r.json")))
    assert (
        all(r[5].startswith(("0.00 [0.00, 0.00]", "–")) for r in same.rows)
        and all(r[7] in ("", "1") for r in same.rows)
        and "(a)" in str(same)
    )
    other = report.evaluate_tasks(
        report.EvalContext(*base, ds, max_records=4),
        tasks=(evaluate_hallucination,),
        show_progress=False,
        n_resamples=5,
    )
    with pytest.raises(ValueError, match="not the same items"):
        report.compare_reports(graded, other)
    with pytest.raises(ValueError, match="no task is in both"):
        report.compare_reports(
            report.EvalReport({"charts": graded.tasks["charts"]}, {}, "x", graded.metadata), other
        )


def test_better_model_is_told_apart():
    a, b = (
        report.EvalReport({"t": t}, {}, n, dict(records=200, patients=50, seed=0, resamples=200))
        for n, t in (("a", a_task(200, 1, 0.5, 50)), ("b", a_task(200, 2, 0.9, 50)))
    )
    (row,) = report.compare_reports(a, b).rows
    t = b.tasks["t"].paired_difference("accuracy", a.tasks["t"], n_resamples=200)
    assert t.low > 0 and row[5] == str(t) and float(row[7]) < 0.001


def test_report_table_has_the_leading_measures(graded, capsys):
    assert (
        "over the best blind baseline" in str(graded)
        and "9 records of 3 patients" in str(graded)
        and "&lt;i&gt;" in graded._repr_html_()
        and "<i>" not in graded._repr_html_()
    )
    leads = graded.table().rows
    assert len(leads) == sum(min(2, len(t.measures)) for t in graded.tasks.values()) and len(
        graded.table(all_measures=True)
    ) > len(leads)
