"Captions that are no lesions: own classes, own parsers, and free captions without labels."

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from families import MAKERS, make_family
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from mmkit import data, evaluate, models
from mmkit.data.caption_reader import MISSING
from mmkit.evaluate.free_captions import compute_caption_losses
from mmkit.evaluate.task import MELANOMA
from mmkit.evaluate.text_overlap import longest_common_subsequence
from mmkit.models.families import find_family

SIGNS = ("stop", "yield", "limit")
GENERATING = [name for name in MAKERS if find_family(make_family(name)[1]).generates]


def sign_records(n=12, with_labels=True):
    "Images of one colour; the caption names class and colour."
    records = []
    for i in range(n):
        name, colour = SIGNS[i % 3], ("red", "blue")[i % 2]
        image = Image.new(
            "RGB", (40, 40), (200, 10 * i, 0) if colour == "red" else (0, 10 * i, 200)
        )
        label = name if with_labels else None
        records.append(dict(image=image, caption=f"A {colour} {name} sign.", label=label))
    return records


def test_free_captions_without_labels_are_scored_compared_and_drawn():
    "Was an empty table, and an IndexError from the plot."
    records = sign_records(with_labels=False)
    right = evaluate.score_captions(records, [record["caption"] for record in records])
    wrong = evaluate.score_captions(records, ["A cat."] * 12)
    table = str(evaluate.compare_scores(dict(right=right, wrong=wrong)))
    assert all(name in table for name in ("exact match", "word F1", "ROUGE-L"))
    assert right.free.value("exact match") == (1, 1, 1)
    assert right.free.value("ROUGE-L").low > wrong.free.value("ROUGE-L").high
    assert right.free.difference("word F1").low > 0
    assert len(evaluate.plot_scores(dict(right=right, wrong=wrong)).get_yticks()) == 3
    assert evaluate.paired_difference(wrong, right, "exact match") == (1, 1, 1)
    assert "shuffled captions" in str(right)
    plt.close("all")


def test_a_table_of_free_captions_is_scored_as_it_was_loaded(tmp_path):
    for i, record in enumerate(sign_records(with_labels=False)):
        record["image"].save(tmp_path / f"{i}.png")
    lines = [f"{i}.png,A {'red' if i % 2 else 'blue'} traffic sign." for i in range(12)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    records, _ = data.load_table(tmp_path / "t.csv")
    assert not any(records["questions"])
    right = evaluate.score_captions(records, records["caption"][:])
    wrong = evaluate.score_captions(records, ["A cat."] * 12)
    assert any(map(str.isdigit, str(evaluate.compare_scores(dict(right=right, wrong=wrong)))))
    constant = evaluate.score_captions(records, evaluate.majority_baseline(records, 12))
    assert constant.free.value("exact match").value == 0.5


def test_a_constant_caption_gains_nothing_over_shuffled_ones():
    scores = evaluate.score_free_captions(sign_records(), ["A red stop sign."] * 12)
    assert scores.value("word F1").value > 0.5  # half of the words are always the same
    assert all(scores.difference(name) == (0, 0, 0) for name in scores.values)


def test_free_scores_of_nothing_say_so():
    with pytest.raises(ValueError, match="no record has a caption"):
        evaluate.score_free_captions([dict(label="stop"), dict(label="stop")], ["", ""])
    with pytest.raises(ValueError, match="3 captions for 2 records"):
        evaluate.score_free_captions([dict(caption="a")] * 2, ["a"] * 3)
    nothing = evaluate.score_captions([dict(image=None)] * 3, ["a", "b", "c"])
    with pytest.raises(ValueError, match="nothing was scored"):
        evaluate.plot_scores(dict(model=nothing))


@pytest.mark.parametrize("seed", range(20))
def test_longest_common_subsequence_agrees_with_trying_all(seed):
    rng = np.random.default_rng(seed)
    a, b = (list("".join(rng.choice([*"abc"], rng.integers(0, 8)))) for _ in range(2))

    def by_hand(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + by_hand(i + 1, j + 1)
        return max(by_hand(i + 1, j), by_hand(i, j + 1))

    assert longest_common_subsequence(a, b) == by_hand(0, 0)


def test_own_classes_agree_with_scikit_learn():
    "Was KeyError: 'stop'."
    rng = np.random.default_rng(0)
    records = sign_records(60)
    said = rng.choice([*SIGNS, "cat"], 60)
    scores = evaluate.score_captions(records, [f"This is a {name} sign." for name in said])
    truth = [record["label"] for record in records]
    f1 = f1_score(truth, said, labels=SIGNS, average="macro")
    assert np.isclose(scores.impression["class_macro_f1"].value, f1)
    is_known = np.where(said == "cat", "none", said)
    recall = np.mean([(is_known == name)[np.array(truth) == name].mean() for name in SIGNS])
    assert np.isclose(scores.balanced_accuracy.value, recall)
    known = said != "cat"
    sure = evaluate.score_captions(
        [r for r, k in zip(records, known, strict=True) if k], [*said[known]]
    )
    agreed = balanced_accuracy_score(np.array(truth)[known], said[known])
    assert np.isclose(sure.balanced_accuracy.value, agreed)
    assert scores.counts == {"no class named": int((said == "cat").sum())}
    assert str(scores.confusion_table()).count("\n") == 4


def test_own_classes_go_through_comparison_baseline_and_plot():
    records = sign_records()
    model = evaluate.score_captions(records, [record["caption"] for record in records])
    majority = evaluate.score_captions(records, evaluate.majority_baseline(records, 12))
    assert majority.balanced_accuracy.value == 1 / 3
    table = str(evaluate.compare_scores(dict(model=model, majority=majority)))
    assert "class macro-F1" in table and "ROUGE-L" in table
    assert evaluate.paired_difference(majority, model, "class_macro_f1").value > 0.5
    with pytest.raises(ValueError, match="'macro_f1' was not scored: class_macro_f1"):
        evaluate.paired_difference(majority, model)
    rows = evaluate.plot_scores(dict(model=model, majority=majority)).get_yticklabels()
    assert [row.get_text() for row in rows][:2] == ["class macro-F1", "balanced accuracy"]
    plt.close("all")


def read_sign(caption):
    words = re.findall(r"\w+", caption.lower())
    found = [word for word in words if word in SIGNS]
    colours = [word for word in words if word in ("red", "blue")]
    return dict(
        label=found[0] if len(found) == 1 else MISSING,
        colour=colours[0] if len(colours) == 1 else MISSING,
    )


def test_a_task_brings_parser_labels_and_attributes():
    task = evaluate.Task(SIGNS, read_sign, dict(colour=("red", "blue")), "Which sign?")
    records = sign_records()
    captions = [record["caption"] for record in records]
    captions[0] = captions[0].replace("red", "blue")
    captions[1] = "A red stop yield sign."
    scores = evaluate.score_captions(records, captions, task=task)
    assert scores.confusion["impression"].sum(0).astype(int).tolist() == [
        [4, 0, 0, 0],
        [0, 3, 0, 1],
        [0, 0, 4, 0],
    ]
    # red: 5 of 6 right, one blue was called red; blue likewise
    assert np.isclose(scores.attributes["colour"].value, 5 / 6)
    assert scores.macro_f1.value == scores.attributes["colour"].value
    unlabelled = sign_records(with_labels=False)  # the class then stands in the own caption
    assert evaluate.score_captions(unlabelled, captions, task=task).impression == scores.impression
    constant = evaluate.majority_baseline(records, 1, task)[0]
    assert constant["colour"] == "blue" and constant["impression"] in SIGNS


def test_a_label_that_the_task_does_not_have_is_named():
    task = evaluate.Task(("stop", "yield"))
    with pytest.raises(ValueError, match="labelled 'limit' too: the task has stop, yield"):
        evaluate.score_captions(sign_records(), ["stop"] * 12, task=task)


def test_two_classes_with_a_positive_one_have_sensitivity():
    task = evaluate.Task(("broken", "whole"), positive_first=True)
    records = [dict(label=label, caption=f"It is {label}.") for label in ("broken", "whole") * 4]
    scores = evaluate.score_captions(records, ["It is broken."] * 8, task=task)
    assert (scores.sensitivity.value, scores.specificity.value) == (1, 0)
    with pytest.raises(ValueError, match="two classes"):
        evaluate.Task(SIGNS, positive_first=True)


def test_lesions_are_scored_as_before():
    "Melanoma is a task like another: no words are compared, and no truth is read from captions."
    truth = dict(border="regular")
    records = [dict(attributes=truth, label=label, caption="x") for label in ("benign", "melanoma")]
    scores = evaluate.score_captions(records, ["Clinical impression: benign."] * 2)
    assert scores.task is MELANOMA and scores.free is None
    assert scores.counts == dict(tp=0, fp=0, fn=1, tn=1, silent=0)
    assert "patients" in str(scores)


@pytest.mark.parametrize("name", GENERATING)
def test_the_loss_of_a_caption_is_the_models_own_on_every_family(name):
    model, processor = make_family(name)
    records = sign_records(4)
    prompt = "Which sign is this?"
    losses, num_tokens = compute_caption_losses(model, processor, records, prompt, batch_size=4)
    one_by_one, _ = compute_caption_losses(model, processor, records, prompt, batch_size=1)
    assert (num_tokens > 0).all()
    assert np.allclose(losses, one_by_one, atol=1e-4)  # padding changes nothing
    swapped, _ = compute_caption_losses(
        model, processor, records, prompt, image_condition="shuffled"
    )
    assert np.isfinite(swapped).all() and not np.array_equal(swapped, losses)
    assert not any(p.requires_grad and p.grad is not None for p in model.parameters())


def test_a_model_adds_similarity_loss_and_perplexity():
    model, processor = models.load("base")
    records = sign_records(6)
    captions = [record["caption"] for record in records]
    scores = evaluate.score_free_captions(records, captions, model, processor)
    assert np.isclose(scores.value("embedding similarity").value, 1)
    assert scores.control("embedding similarity").value < 0.999
    assert np.isclose(scores.value("perplexity").value, np.exp(scores.value("loss").value))
    assert scores.difference("loss").covers(
        scores.control("loss").value - scores.value("loss").value
    )
    table = str(scores)
    assert "better than control by" in table and "perplexity" in table


def test_text_alone_and_several_images_are_left_out_or_swapped_among_themselves():
    model, processor = models.load("base")
    records = sign_records(4)
    text_alone = dict(image=None, prompt="What is a stop sign?", caption="A red sign.", label=None)
    records += [text_alone, text_alone]
    losses, _ = compute_caption_losses(model, processor, records)
    swapped, _ = compute_caption_losses(model, processor, records, image_condition="shuffled")
    assert np.isfinite(losses).all()
    assert np.isfinite(swapped[:4]).all() and np.isnan(swapped[4:]).all()
    texts = [record["caption"] for record in records]
    scores = evaluate.score_free_captions(records, texts, model, processor)
    assert str(scores).splitlines()[-1].split()[-1] == "4"  # captions with an image to swap
    assert torch.is_grad_enabled()


def test_what_knows_melanoma_alone_refuses_other_classes():
    "Was a probability of melanoma for every traffic sign, and an AUROC of empty arrays."
    model, processor = models.load("base")
    records = sign_records()
    foreign = "labelled 'limit', 'stop', 'yield', and none of them is melanoma or benign"
    with pytest.raises(ValueError, match=foreign):
        evaluate.score_impressions(model, processor, records)
    with pytest.raises(ValueError, match=foreign):
        evaluate.auroc_interval(records, np.zeros(12))
    with pytest.raises(ValueError, match="no record has a label"):
        evaluate.auroc_interval([dict(label=None)] * 3, np.zeros(3))


def test_lint_finds_labels_that_are_spelled_in_two_ways():
    labels = ["stop"] * 12 + ["yield"] * 12 + ["yeild", "Stop", "limit 30", "limit 50", None]
    captions = [f"Caption {i}." for i in range(len(labels))]
    records = [
        dict(image=None, caption=caption, label=label)
        for caption, label in zip(captions, labels, strict=True)
    ]
    found = data.lint_records(records).of("similar labels")
    assert found.rows == [24, 25]
    assert "labels={'Stop': 'stop', 'yeild': 'yield'}" in found.message
    assert "similar labels" not in [finding.kind for finding in data.lint_records(records[:24])]
