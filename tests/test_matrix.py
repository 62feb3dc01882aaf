"""Every public call on every model family: it works, or it refuses in a sentence of ours.

`MMKIT_WRITE_MATRIX=1 python -m pytest tests/test_matrix.py` writes the table of it anew.
"""

import contextlib
import copy
import functools
import os
import traceback
from pathlib import Path

import pytest
import torch
from families import MAKERS, TILE, make_family
from matplotlib import pyplot as plt
from test_families import draw_image
from transformers import Trainer, TrainingArguments

import mmkit
from mmkit import evaluate, explain, models, planner, training, tuner
from mmkit.audit.cka import collect_activations
from mmkit.audit.drift import extract_features
from mmkit.audit.label_noise import extract_pair_features
from mmkit.chat.collator import Collator, encode_example
from mmkit.chat.validation import validate_batch
from mmkit.chat.xray import xray_batch
from mmkit.explain.divergence import image_divergence
from mmkit.losses.weighting import LossWeights
from mmkit.models.families import find_family
from mmkit.models.parts import parameter_names_by_part
from mmkit.report import evaluate_model
from mmkit.report.tasks_contrastive import evaluate_retrieval

PAGE = Path(__file__).parents[1] / "nbs" / "library" / "models" / "FAMILIES.md"
OURS = Path(mmkit.__file__).parent
THREE_TERMS = LossWeights(ce=1.0, contrastive=1.0, mse=1.0)
CALLS = {}  # what stands in the table -> what is called with a `Family` of the test


def call(title):
    def register(function):
        CALLS[title] = function
        return function

    return register


class Case:
    "One family with its records and what several calls need."

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.model, self.processor = make_family(name)
        captions = ["a red sign.", "blue, and more.", "one line", "dots"]
        self.records = [
            dict(
                image=draw_image(TILE, 2 * TILE, k),
                caption=caption,
                prompt=f"What is in image {k}?",
                id=str(k),
                source="x",
                patient=k,
                label=("benign", "melanoma")[k % 2],
            )
            for k, caption in enumerate(captions)
        ]

    @functools.cached_property
    def batch(self):
        if not find_family(self.model).generates:
            images = [record["image"] for record in self.records]
            texts = [record["caption"] for record in self.records]
            return dict(
                self.processor(images=images, text=texts, return_tensors="pt", padding=True)
            )
        return Collator(self.processor)(self.records)

    def fit(self, model=None, **options):
        options = dict(max_steps=1, batch_size=4, show_progress=False) | options
        model = model or copy.deepcopy(self.model)
        return training.fit(
            model, self.processor, self.records, use_feature_cache=False, **options
        ).model


@call("load a saved folder")
def load_folder(case):
    case.model.save_pretrained(case.folder / "whole")
    case.processor.save_pretrained(case.folder / "whole")
    loaded, processor = models.load(case.folder / "whole")
    assert type(loaded) is type(case.model) and find_family(processor)


@call("parts, freezing, LoRA targets")
def split_parts(case):
    assert all(parameter_names_by_part(case.model).values())
    with models.freeze_all_but(case.model, "projector"):
        assert str(models.parameter_summary(case.model))
    assert find_family(case.model).lora_targets(case.model, "text")


@call("encode, label mask")
def encode(case):
    record = case.records[0]
    batch = encode_example(case.processor, record["image"], "What?", record["caption"])
    answer = batch["labels"][batch["labels"] != -100]
    assert case.processor.tokenizer.decode(answer).strip().startswith(record["caption"])


@call("check and X-ray of a batch")
def xray(case):
    batch = Collator(case.processor)(case.records)
    validate_batch(batch, case.model)
    xray_batch(validate_batch(batch, case.processor), case.processor)


@call("fit the projector")
def fit_projector(case):
    case.fit()


@call("fit LoRA")
def fit_lora(case):
    case.fit(train=(), lora=2)


@call("fit QLoRA (4 bits)")
def fit_qlora(case):
    if not (case.folder / "whole").is_dir():
        load_folder(case)
    quantized, _ = models.load(case.folder / "whole", quantize="nf4")
    case.fit(quantized, train=(), lora=2)


@call("fit with three terms")
def fit_three_terms(case):
    case.fit(loss_weights=THREE_TERMS)


@call("save and load what was trained, merge")
def save_and_merge(case):
    trained = models.add_lora(copy.deepcopy(case.model), rank=2)
    models.save_adapters(trained, case.folder / "adapters")
    again = models.load_adapters(copy.deepcopy(case.model), case.folder / "adapters")
    batch = {key: value for key, value in case.batch.items() if key != "labels"}
    models.merge_lora(again, batch)


@call("tuner")
def tune(case):
    state = tuner.TunerState(
        records=case.records * 2,
        eval_dataset=case.records * 2,
        model=case.model,
        processor=case.processor,
    )
    state.step(1)


@call("generate")
def generate(case):
    answers = evaluate.generate(
        case.model, case.processor, case.records, max_new_tokens=2, show_progress=False
    )
    assert len(answers) == 4


@call("score impressions")
def score(case):
    captions = [record["caption"] for record in case.records]
    evaluate.score_impressions(case.model, case.processor, case.records, captions)


@call("similarity of images and texts")
def similarity(case):
    evaluate.compute_similarity(case.model, case.processor, case.records)


@call("report")
def report(case):
    evaluate_model(
        case.model,
        case.processor,
        case.records,
        tasks=(evaluate_retrieval,),
        show_progress=False,
        n_resamples=3,
        cache_dir=case.folder,
    )


def map_words(method):
    def attribute(case):
        record = case.records[0]
        found = explain.attribute_words(
            case.model, case.processor, record, record["caption"], (method,), only="answer"
        )
        assert found.mean_maps(method).ndim == 3

    return attribute


for method in explain.ATTRIBUTION_METHODS:
    CALLS[f"map of a word: {method}"] = map_words(method)


@call("perceptual score, EMAP")
def perceptual(case):
    explain.perceptual_score(case.model, case.batch, n_permutations=1)
    explain.score_all_pairs(lambda b: explain.scoring.pair_score(case.model, b), case.batch)


@call("Shapley values of words and regions")
def shapley(case):
    explain.mm_shap(case.model, case.batch, case.processor, n_permutations=1, grid_size=2)


@call("an answer without its image")
def divergence(case):
    image_divergence(case.model, case.batch)
    explain.attribute_answer(case.model, case.processor, case.records[0], "a red sign")


@call("shares of the gradient")
def gradient_shares(case):
    explain.measure_gradient_shares(case.model, case.batch)


@call("dominance callback, in a Trainer")
def dominance_callback(case):
    callback = explain.DominanceCallback(case.processor, case.records, eval_steps=1)
    settings = dict(report_to="none", remove_unused_columns=False, use_cpu=True, disable_tqdm=True)
    arguments = TrainingArguments(
        str(case.folder / "runs"), max_steps=1, save_strategy="no", **settings
    )
    trainer = Trainer(
        copy.deepcopy(case.model),
        arguments,
        train_dataset=case.records,
        data_collator=Collator(case.processor),
        callbacks=[callback],
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    assert callback.history[1]["image gain"] != 0


@call("drift: features, layers")
def drift(case):
    extract_features(case.model, case.processor, case.records)
    collect_activations(case.model, case.processor, case.records)


@call("features for wrong labels")
def mismatch(case):
    extract_pair_features(case.model, case.processor, case.records, cache_dir=case.folder)


@call("plan a step")
def plan(case):
    for method in ("lora", "generate"):
        planner.plan_training(case.model, method, sequence_length=1024)


def refusal_of(error):
    "Our own sentence; the error itself where another package raised it."
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = OURS in raised_in.parents
    if not is_ours or not isinstance(error, (ValueError, NotImplementedError)):
        raise error
    text = str(error).removeprefix("conversation 0: ")
    return " ".join(text.split()[:12]).rstrip(",;:.") + " …"


def run_family(name, folder):
    "title -> '' where it works, or the first words of the refusal."
    case, results = Case(name, folder), {}
    for title, function in CALLS.items():
        try:
            function(case)
            results[title] = ""
        except Exception as error:
            results[title] = refusal_of(error)
        plt.close("all")
    return results


RESULTS = {}


@pytest.mark.parametrize("name", MAKERS)
def test_every_call_works_or_refuses_in_a_sentence(name, tmp_path):
    torch.manual_seed(0)
    RESULTS[name] = run_family(name, tmp_path)
    if find_family(make_family(name)[0]).generates:
        refused = {title: why for title, why in RESULTS[name].items() if why}
        assert len(refused) <= 2, refused


def write_page(results):
    "The table as Markdown, with each refusal once beneath it."
    names = [find_family(make_family(name)[0]).name for name in results]
    columns = [
        f"{name} ({key})" if names.count(name) > 1 else name
        for name, key in zip(names, results, strict=True)
    ]
    sentences = list(dict.fromkeys(why for row in results.values() for why in row.values() if why))
    lines = [
        "# Which call works on which model family",
        "",
        "Made by `tests/test_matrix.py` on small models of the real classes; it checks that this",
        "page is what it finds (`MMKIT_WRITE_MATRIX=1` writes it anew). ✓ works; a number is a",
        "refusal, whose first words stand below. No call ends in the error of another package.",
        "",
        "Phi-3 Vision and GPT-4o have no class in transformers: `data.formats.export` writes",
        "records for them, and the planner says that it cannot plan them.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for title in CALLS:
        marks = [results[name][title] for name in results]
        cells = [str(1 + sentences.index(why)) if why else "✓" for why in marks]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {why}" for number, why in enumerate(sentences, 1)), ""]
    return "\n".join(lines)


def test_the_page_says_what_was_found():
    if RESULTS.keys() != MAKERS.keys():
        pytest.skip("the families were not all asked in this process")
    page = write_page({name: RESULTS[name] for name in MAKERS})
    if os.environ.get("MMKIT_WRITE_MATRIX"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page
