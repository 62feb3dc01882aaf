"""Evaluation: parsed captions, scores that agree with scikit-learn and with values by hand,
baselines that ignore the image, generation that agrees with transformers."""

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from mmkit import chat, data, evaluate, models
from mmkit.core.stats import random_derangement
from mmkit.data.caption_reader import MISSING, mark_claims, parse_impression
from mmkit.data.captions import PHRASINGS, describe_attributes
from mmkit.evaluate.captions import confusion_per_patient, most_common
from mmkit.evaluate.generation import group_by_length
from mmkit.evaluate.marked_captions import marked_caption_html, thumbnail_html
from mmkit.evaluate.scoring import SimilarityMatrix, cut_before_impression, rank_matches
from mmkit.lesions.lesion import ATTRIBUTE_LEVELS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cache folder of our own, for pairs and features."
    old, new = os.environ.get("MMKIT_CACHE"), str(tmp_path_factory.mktemp("cache"))
    os.environ["MMKIT_CACHE"] = new
    yield new
    os.environ.pop("MMKIT_CACHE") if old is None else os.environ.update(MMKIT_CACHE=old)


@pytest.fixture(scope="module")
def ds(home):
    return data.load_melanoma_pairs(n=8, seed=5, masks=False)


@pytest.fixture(scope="module")
def base(home):
    return models.load("base")


def records(n, seed=0, per_patient=3):
    "Records without images, and captions that are right about two times in three."
    rng, rows, said = np.random.default_rng(seed), [], []
    for i in range(n):
        a = {k: str(rng.choice(v)) for k, v in ATTRIBUTE_LEVELS.items()}
        label = str(rng.choice(["benign", "melanoma"]))
        rows.append(dict(attributes=a, label=label, patient=f"p{i // per_patient}"))
        other = {
            k: v if rng.random() < 0.66 else str(rng.choice(ATTRIBUTE_LEVELS[k]))
            for k, v in a.items()
        }
        n_colours = {"few": 2, "several": 3, "many": 6}[other["colours"]]
        said.append(
            data.compose_caption(
                other,
                n_colours,
                label if rng.random() < 0.7 else str(rng.choice(["benign", "melanoma"])),
                rng=rng,
            )
        )
    return rows, said


@pytest.mark.parametrize("phrasing", range(len(PHRASINGS)))
def test_every_phrasing_parses_back(phrasing):
    "What `skeleton` writes about lesions and shapes, the reader reads."
    rng = np.random.default_rng(phrasing)
    for _ in range(40):
        truth = {k: str(rng.choice(v)) for k, v in ATTRIBUTE_LEVELS.items()}
        word = str(
            rng.choice(
                {"few": ["one", "two"], "several": ["three", "four"], "many": ["five", "six"]}[
                    truth["colours"]
                ]
            )
        )
        for subject, ground in (
            ("lesion", f"on {truth['skin']} skin"),
            ("shape", f"on a {truth['skin']} background"),
        ):
            text = describe_attributes(subject, truth, word, ground, phrasing=phrasing)
            want = (
                truth if subject == "lesion" else truth | {"skin": MISSING}
            )  # a background is no skin
            assert data.parse_attributes(text) == want, text
            assert data.parse_attributes(text.upper()) == want


def test_parsing_is_strict():
    "Negations, contradictions and silence."
    read = data.parse_attributes
    assert (
        read("a lesion with no dots and without streaks")["dots"]
        == read("a regular border, without streaks")["streaks"]
        == "absent"
    )
    assert (
        read("dots, and no dots")["dots"] == MISSING
        and read("atypical network")["network"] == "atypical"
    )
    assert (
        read("a regular border")["streaks"] == "absent"
        and read("a regular border")["asymmetry"] == MISSING
    )
    assert set(read("A skin lesion, seen from close by.").values()) == {MISSING}
    for text, want in (
        ("Clinical impression: benign.", "benign"),
        ("no melanoma in the family. Clinical impression: benign", "benign"),
        ("Yes, this is a melanoma.", "melanoma"),
        ("No, this is benign.", "benign"),
        ("Clinical impression: melanoma benign", "missing"),
        ("A lesion.", "missing"),
        ("", "missing"),
        ("No, this is a melanoma.", "missing"),
    ):
        assert parse_impression(text) == want, text


def test_scores_agree_with_scikit_learn():
    "Macro-F1, balanced accuracy, sensitivity and specificity, and the counts."
    rows, said = records(90)
    said[3] = said[40] = "This is a lesion."
    s, read = (
        evaluate.score_captions(rows, said, n_resamples=20),
        [data.parse_caption(c) for c in said],
    )
    f1 = {
        k: f1_score(
            [r["attributes"][k] for r in rows],
            [x[k] for x in read],
            labels=ATTRIBUTE_LEVELS[k],
            average="macro",
            zero_division=0,
        )
        for k in ATTRIBUTE_LEVELS
    }
    assert {k: round(v.value, 12) for k, v in s.attributes.items()} == {
        k: round(v, 12) for k, v in f1.items()
    }
    assert s.macro_f1.value == pytest.approx(np.mean(list(f1.values())))
    y, p = [r["label"] for r in rows], [x["impression"] for x in read]
    recalls = recall_score(y, p, labels=["melanoma", "benign"], average=None, zero_division=0)
    assert (s.sensitivity.value, s.specificity.value) == pytest.approx(
        tuple(recalls)
    ) and s.balanced_accuracy.value == pytest.approx(recalls.mean())
    c = s.counts
    assert (
        sum(c.values()) == 90
        and c["silent"] == 2
        and c["tp"] == sum(a == b == "melanoma" for a, b in zip(y, p))
        and c["fp"] == sum(a == "benign" and b == "melanoma" for a, b in zip(y, p))
    )
    assert s.macro_f1.low < s.macro_f1.value < s.macro_f1.high and s.patients == 30


def test_unknown_labels_and_attributes_are_left_out():
    "Labels without attributes, attributes without labels, one level, a wrong number of captions."
    rows, said = records(12)
    only = evaluate.score_captions(
        [dict(r, attributes=dict.fromkeys(ATTRIBUTE_LEVELS)) for r in rows], said, n_resamples=10
    )
    assert (
        not only.attributes
        and only.macro_f1 is None
        and only.balanced_accuracy.value > 0
        and "macro" not in str(only)
    )
    assert str(evaluate.compare_scores({"a": only})).count("macro-F1") == 0
    none = evaluate.score_captions([dict(r, label=None) for r in rows], said, n_resamples=10)
    assert (
        none.impression == {}
        and none.counts == {}
        and none.balanced_accuracy is None
        and none.macro_f1.value > 0
    )
    light = evaluate.score_captions(
        [dict(r, attributes=dict(r["attributes"], skin="light")) for r in rows],
        said,
        n_resamples=10,
    )
    assert "skin" not in light.attributes
    with pytest.raises(ValueError, match="11 captions for 12 records"):
        evaluate.score_captions(rows, said[1:])


def test_intervals_resample_patients_not_lesions():
    "The same lesions eight times over teach nothing new: the interval by patient stays as wide."
    rows, said = records(30, per_patient=1)
    one, many = (
        evaluate.score_captions(rows, said, n_resamples=300),
        evaluate.score_captions(
            [r for r in rows for _ in range(8)],
            [c for c in said for _ in range(8)],
            n_resamples=300,
        ),
    )
    assert many.macro_f1 == pytest.approx(one.macro_f1) and many.balanced_accuracy == pytest.approx(
        one.balanced_accuracy
    )


def test_paired_difference_resamples_the_same_patients():
    """No gain over oneself; a gain over chance; and a narrower interval than the two alone would
    give.
    """
    rows, said = records(150)
    a, b = (
        evaluate.score_captions(rows, said, n_resamples=200),
        evaluate.score_captions(rows, evaluate.majority_baseline(rows, 150), n_resamples=200),
    )
    assert evaluate.paired_difference(a, a, n_resamples=50) == (0, 0, 0)
    for what in ("macro_f1", "balanced_accuracy", "border"):
        g = evaluate.paired_difference(b, a, what, n_resamples=200)
        assert g.low > 0 and g.low < g.value < g.high
    assert evaluate.paired_difference(b, a).value == pytest.approx(
        a.macro_f1.value - b.macro_f1.value
    )
    assert b.balanced_accuracy.value == 0.5 and b.sensitivity.value in (0, 1)


def test_scoring_400_captions_is_quick():
    "400 items, 11 attributes, 1000 resamples."
    rows, said = records(400)
    start = time.process_time()
    evaluate.score_captions(rows, said)
    assert time.process_time() - start < 8


def test_generation_agrees_with_transformers(ds, base):
    "Greedy from cached features agrees with `generate` from pixels, with LoRA too, in any batch."
    model, processor = base

    def theirs(model, i):
        b = chat.encode_example(processor, ds[i]["image"])
        return processor.tokenizer.decode(
            model.generate(**b, max_new_tokens=12, do_sample=False)[0, b["input_ids"].shape[1] :],
            skip_special_tokens=True,
        ).strip()

    ours = evaluate.generate(model, processor, ds, max_new_tokens=12, show_progress=False)
    assert (
        ours[:3] == [theirs(model, i) for i in range(3)]
        and evaluate.generate(
            model, processor, ds, max_new_tokens=12, batch_size=3, show_progress=False
        )
        == ours
    )
    adapted = models.add_lora(models.load("base")[0], 4)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    changed = evaluate.generate(adapted, processor, ds, max_new_tokens=12, show_progress=False)
    assert changed != ours and changed[0] == theirs(adapted, 0) and not adapted.training


def test_prompts_of_different_lengths_keep_their_order(ds, base):
    "Notes before the prompt: every row gets what it would get alone, in order."
    model, processor = base
    rows = [
        dict(image=r["image"], notes=n)
        for r, n in zip(
            ds, ["", "Site: back.", "the spot has changed, and more than that", "Site: back."]
        )
    ]
    together = evaluate.generate(
        model, processor, rows, include_notes=True, max_new_tokens=8, show_progress=False
    )
    assert together == [
        evaluate.generate(
            model, processor, [r], include_notes=True, max_new_tokens=8, show_progress=False
        )[0]
        for r in rows
    ]


def test_blank_and_shuffled_images_are_not_the_original(ds, base):
    "Blank is one picture for all; shuffled is everybody's but one's own; both are seeded."
    model, processor = base
    own, blank, other = (
        evaluate.get_pooled_features(model, processor, ds, image_condition=i)
        for i in ("original", "blank", "shuffled")
    )
    assert (
        (blank == blank[0]).all() and not torch.equal(blank[0], own[0]) and blank.shape == own.shape
    )
    assert all(not torch.equal(a, b) for a, b in zip(own, other))
    assert (
        len(
            set(
                evaluate.generate(
                    model,
                    processor,
                    ds,
                    image_condition="blank",
                    max_new_tokens=6,
                    show_progress=False,
                )
            )
        )
        == 1
    )
    for n in (2, 3, 17):
        for seed in range(5):
            d = random_derangement(n, seed)
            assert (
                (d != np.arange(n)).all()
                and sorted(d) == list(range(n))
                and (d == random_derangement(n, seed)).all()
            )
    with pytest.raises(ValueError, match="at least 2"):
        random_derangement(1)
    with pytest.raises(ValueError, match="'blank'"):
        evaluate.get_pooled_features(model, processor, ds, image_condition="none")


def test_impression_scores_agree_with_one_forward_pass(ds, base):
    "Against one forward pass from pixels, written out."
    model, processor = base
    said = ["A lesion. Clinical impression: benign."] * 4 + ["It has dots."] * 4
    got, tok = evaluate.score_impressions(model, processor, ds, said), processor.tokenizer
    for i, lead in (
        (0, "A lesion. Clinical impression:"),
        (5, "It has dots. Clinical impression:"),
    ):
        logp = []
        for word in ("melanoma", "benign"):
            b = chat.encode_example(processor, ds[i]["image"])
            first, whole = (
                tok(t, add_special_tokens=False).input_ids for t in (lead, f"{lead} {word}")
            )
            assert whole[: len(first)] == first
            b["input_ids"] = torch.cat([b["input_ids"], torch.tensor([whole])], 1)
            b["attention_mask"], b["token_type_ids"] = (
                torch.ones_like(b["input_ids"]),
                (b["input_ids"] == tok.image_token_id).long(),
            )
            with torch.no_grad():
                p = model(**b).logits[0].log_softmax(-1)
            n = len(whole) - len(first)
            logp.append(sum(p[-n - 1 + k, whole[len(first) + k]] for k in range(n)).item())
        assert got[i] == pytest.approx(1 / (1 + np.exp(logp[1] - logp[0])), abs=1e-5)
    y = np.array([r == "melanoma" for r in ds["label"]])
    assert evaluate.auroc_interval(ds, got, n_resamples=5).value == pytest.approx(
        roc_auc_score(y, got)
    )


def test_shown_captions_are_escaped_and_marked(ds):
    "Markup in a caption stays text; right and wrong are told by marks, not by colour alone."
    truth = dict.fromkeys(ATTRIBUTE_LEVELS, "absent") | dict(
        network="typical", streaks="present", skin="light"
    )
    evil = "<script>x</script> atypical network, on light skin. Clinical impression: benign."
    page = evaluate.show_captions(
        [dict(image=Image.new("L", (9, 5)), label="melanoma", attributes=truth, lesion="<i>")],
        {"<b>": [evil]},
    )
    html, text = page._repr_html_(), str(page)
    assert "<script" not in html and "<b>" not in html and "&lt;script&gt;" in html
    assert (
        "atypical network ✗" in text
        and "light skin ✓" in text
        and "benign ✗" in text
        and text.endswith("omitted: streaks ✗")
    )
    assert html.count("text-decoration:underline") == 2 and html.count("✓") == 1
    assert "".join(t for t, _ in mark_claims(evil, truth, "benign")) == evil


def test_similarity_agrees_with_embed_images_and_embed_texts(ds, base):
    "The matrix of `models.embed_image` and `embed_text`; identical captions count as found."
    model, processor = base
    s, tok = evaluate.compute_similarity(model, processor, ds, batch_size=3), processor.tokenizer
    with torch.no_grad():
        z = models.embed_images(model, chat.images_to_pixel_values(processor, list(ds["image"])))
        r = torch.cat(
            [
                models.embed_texts(
                    model,
                    *(lambda t: (t["input_ids"], t["attention_mask"]))(tok(c, return_tensors="pt")),
                )
                for c in ds["caption"]
            ]
        )
    want = torch.nn.functional.cosine_similarity(z[:, None], r[None], dim=-1).numpy()
    assert np.abs(s.matrix - want).max() < 1e-5 and s.recall_at(8) == 1
    twins = SimilarityMatrix(
        np.array([[0.1, 0.9, 0], [0.9, 0.1, 0], [0, 0, 1]]),
        np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool),
    )
    assert twins.recall_at(1) == 1 and twins.chance == pytest.approx(5 / 9)


def test_the_last_impression_counts():
    assert (
        parse_impression("The first impression was benign. Clinical impression: melanoma.")
        == "melanoma"
    )


# --- values computed by hand


def lesion(label, patient, **attributes):
    return dict(attributes=attributes or None, label=label, patient=patient)


def test_confusion_counts_by_hand():
    "An unknown truth is left out; an unknown prediction counts as missing."
    truth = ["light", "dark", None, "light"]
    predicted = ["dark", "dark", "light", "purple"]
    confusion = confusion_per_patient(truth, predicted, ("light", "dark"), np.array([0, 1, 1, 1]))
    assert confusion.tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 1, 0]]]
    assert confusion_per_patient([], [], ("light", "dark"), np.zeros(0, int)).shape == (0, 2, 3)


def test_macro_f1_by_hand():
    "F1 of a: 2·3 / (5 + 4) = 2/3; of b: 2·1 / (2 + 2) = 1/2; of c, which never occurs: left out."
    confusion = np.array([[[3, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]])
    assert evaluate.macro_f1_score(confusion) == pytest.approx((2 / 3 + 1 / 2) / 2)
    split = np.array([[[2, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 0, 0], [0] * 4, [0] * 4]])
    assert evaluate.macro_f1_score(split) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert np.isnan(evaluate.macro_f1_score(np.array([[[3, 1, 0], [0, 0, 0]]])))


def test_rates_and_counts_by_hand():
    "Three melanomas: found, missed, no answer. Two benign lesions: one right, one wrong."
    answers = ["melanoma", "benign", "", "benign", "melanoma"]
    records = [lesion("melanoma", "A")] * 3 + [lesion("benign", "B")] * 2
    captions = [f"A lesion. Clinical impression: {answer}." for answer in answers]
    scores = evaluate.score_captions(records, captions, n_resamples=10)
    assert scores.counts == dict(tp=1, fp=1, fn=1, tn=1, silent=1)
    assert scores.sensitivity.value == pytest.approx(1 / 3)
    assert scores.specificity.value == 1 / 2
    assert scores.balanced_accuracy.value == pytest.approx(5 / 12)
    assert scores.impression["accuracy"].value == pytest.approx(2 / 5)
    assert (scores.n, scores.patients) == (5, 2)


def test_mean_macro_f1_is_the_mean_over_attributes_by_hand():
    "Border is right in both records (1); veil is always predicted absent: F1 2/3 and 0."
    records = [
        lesion(None, "A", border="regular", veil="absent"),
        lesion(None, "B", border="irregular", veil="present"),
    ]
    captions = ["A regular border.", "An irregular border."]
    scores = evaluate.score_captions(records, captions, n_resamples=10)
    values = {name: interval.value for name, interval in scores.attributes.items()}
    assert values == pytest.approx({"border": 1, "veil": 1 / 3})
    assert scores.macro_f1.value == pytest.approx(2 / 3)


def test_records_without_a_patient_stand_alone():
    records = [lesion("benign", None), lesion("melanoma", None), lesion("benign", "A")] * 2
    scores = evaluate.score_captions(records, ["benign"] * 6, n_resamples=5)
    assert scores.patients == 5


def test_no_records_have_no_scores():
    scores = evaluate.score_captions([], [], n_resamples=5)
    assert (scores.n, scores.patients, scores.attributes, scores.counts) == (0, 0, {}, {})


@pytest.mark.parametrize(
    "measure, expected",
    [
        ("sensitivity", 1 / 2),
        ("specificity", -1 / 2),
        ("balanced_accuracy", 0),
        ("accuracy", 0),
        ("border", 1 - 1 / 3),
        ("macro_f1", 1 - 1 / 3),
    ],
)
def test_paired_difference_by_hand(measure, expected):
    "Before: regular and benign of everything but one benign lesion. After: melanoma throughout."
    borders = ["regular", "irregular"] * 2
    labels = ["melanoma", "melanoma", "benign", "benign"]
    records = [
        lesion(label, f"P{i}", border=border)
        for i, (label, border) in enumerate(zip(labels, borders))
    ]
    before = [f"A regular border. Clinical impression: {answer}." for answer in labels]
    before[0] = before[2]
    before = evaluate.score_captions(records, before, n_resamples=1)
    answers = ["melanoma", "melanoma", "melanoma", "benign"]
    after = [f"{b} border. Clinical impression: {a}." for b, a in zip(borders, answers)]
    after = evaluate.score_captions(records, after, n_resamples=1)
    difference = evaluate.paired_difference(before, after, measure, n_resamples=20)
    assert difference.value == pytest.approx(expected)


def test_majority_baseline_by_hand():
    "Ties go to the first in the alphabet; what is never known is missing."
    train = [
        lesion("melanoma", "A", border="regular", skin="dark"),
        lesion("benign", "B", border="irregular", skin="dark"),
        lesion(None, "C", border="regular", skin=None),
    ]
    (prediction,) = set(map(str, evaluate.majority_baseline(train, 3)))
    expected = dict.fromkeys(ATTRIBUTE_LEVELS, MISSING)
    expected |= dict(border="regular", skin="dark", impression="benign")
    assert prediction == str(expected)
    assert most_common([]) == "" and most_common(["b", "a", "b", "a"]) == "a"


def test_compare_scores_has_a_row_per_model_and_a_dash_for_the_unknown():
    records = [lesion("benign", "A", border="regular"), lesion("melanoma", "B", border="irregular")]
    perfect = [
        "A regular border. Impression: benign.",
        "An irregular border. Impression: melanoma.",
    ]
    full = evaluate.score_captions(records, perfect, n_resamples=5)
    bare = evaluate.score_captions(
        [dict(r, attributes=None) for r in records], perfect, n_resamples=5
    )
    table = evaluate.compare_scores({"full": full, "bare": bare}, per_attribute=True)
    assert table.columns == [
        "",
        "macro-F1",
        "border",
        "balanced accuracy",
        "sensitivity",
        "specificity",
    ]
    assert table.rows[0][:3] == ["full", str(full.macro_f1), str(full.attributes["border"])]
    assert table.rows[1][1:3] == [None, None]
    assert str(table).splitlines()[-1].split()[:3] == ["bare", "–", "–"]


def test_plotted_scores_are_the_scores():
    records = [lesion("benign", "A", border="regular"), lesion("melanoma", "B", border="irregular")]
    captions = ["A regular border. Impression: benign.", "A regular border. Impression: benign."]
    scores = evaluate.score_captions(records, captions, n_resamples=20)
    ax = evaluate.plot_scores({"model": scores, "again": scores})
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["border", "macro-F1", "balanced accuracy"]
    (points, *_), *_ = ax.containers
    assert points.get_xdata() == pytest.approx([1 / 3, 1 / 3, 1 / 2])
    assert len(ax.containers) == 2


def test_auroc_by_hand():
    "Pairs won: 0.9 beats both; 0.5 beats 0.2 and ties with 0.5: 3.5 of 4. No label: left out."
    labels = ["melanoma", "benign", "melanoma", None, "benign"]
    records = [dict(label=label, patient=f"P{i}") for i, label in enumerate(labels)]
    interval = evaluate.auroc_interval(records, [0.9, 0.5, 0.5, 0.0, 0.2], n_resamples=20)
    assert interval.value == 3.5 / 4
    only = evaluate.auroc_interval(records[:1] * 2, [0.1, 0.2], n_resamples=5)
    assert np.isnan(only.value)


def test_recall_and_ranks_by_hand():
    "Ranks: 0 others above the own caption, then 2 (one of them a tie), then 1."
    matrix = np.array([[0.9, 0.1, 0.2], [0.6, 0.5, 0.5], [0.1, 0.8, 0.3]])
    similarity = SimilarityMatrix(matrix, np.eye(3, dtype=bool))
    assert rank_matches(similarity).tolist() == [0, 2, 1]
    assert similarity.recall_at(1) == pytest.approx(1 / 3)
    assert similarity.recall_at(2) == 1, "a stable sort takes the first of a tie"
    assert similarity.recall_at(3) == 1
    assert similarity.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "caption, cut",
    [
        ("Dots. Clinical impression: benign.", "Dots. Clinical impression:"),
        ("Dots.", "Dots. Clinical impression:"),
        ("", "Clinical impression:"),
        (
            "Clinical impression: a. Clinical impression: b.",
            "Clinical impression:",
        ),
    ],
)
def test_captions_are_cut_before_their_impression(caption, cut):
    assert cut_before_impression(caption) == cut


def test_batches_hold_sequences_of_one_length():
    sequences = [[0] * length for length in (3, 1, 3, 3, 1, 2)]
    batches = [batch.tolist() for batch in group_by_length(sequences, 2)]
    assert batches == [[1, 4], [5], [0, 2], [3]]


def test_generation_restores_training_mode_and_the_random_state(ds, base):
    model, processor = base
    model.train()
    state = torch.random.get_rng_state()
    evaluate.generate(model, processor, ds.select([0]), max_new_tokens=2, show_progress=False)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()


def test_another_seed_shuffles_differently(ds, base):
    model, processor = base
    first, again, other = (
        evaluate.get_pooled_features(model, processor, ds, "shuffled", seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_marked_caption_is_the_same_in_html_and_text():
    truth = dict(border="regular", dots="present", skin=None)
    page, text = marked_caption_html("An irregular border, on light skin. benign", truth, "benign")
    assert text == "An irregular border ✗, on light skin. benign ✓ omitted: dots ✗"
    assert page.count("<span") == 2 and page.endswith("<i>omitted: dots ✗</i>")


def test_thumbnail_loads_nothing():
    tag = thumbnail_html(np.zeros((6, 3, 3), np.uint8), size=4)
    assert tag.startswith('<img width="4" alt="the image" src="data:image/jpeg;base64,')
