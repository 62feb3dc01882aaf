"""C7: what fine-tuning gains over prompting, in points and in per cent, over one wording, the
worst, and the best of six chosen on validation patients.
"""

import tempfile

import numpy as np
from run import entry
from sklearn.metrics import roc_auc_score
from world import fresh

from mmkit import chat, evaluate, training
from mmkit.chat.prompts import YESNO_PROMPT
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.data.splits import split_records
from mmkit.explain.scoring import choice_logprobs

IDS = ("C7",)
PAIRS, SIDE, STEPS, BATCH, WORLD = (
    1000,
    48,
    120,
    16,
    7700,
)  # 1,000 lesions of 48 × 48 pixels: 600 to learn from, 150 to choose by, 250 to report on
RARE = 58 / 3313  # melanomas among the published example's test images
YES, NO, M, B = "Yes, this is a melanoma.", "No, this is benign.", "Melanoma.", "Benign."
WORDINGS = (  # the question, the answer that means melanoma, the one that means benign
    (YESNO_PROMPT, YES, NO),
    ("Is this lesion benign or a melanoma?", M, B),
    ("What is the clinical impression?", M, B),
    ("Is this lesion benign?", NO, YES),
    (
        (
            "A melanoma often has asymmetry in two axes, an irregular border and many colours. Is"
            " this lesion a melanoma?"
        ),
        YES,
        NO,
    ),
    (
        (
            "A melanoma has streaks, an atypical network or a blue-white veil. What is the clinical"
            " impression?"
        ),
        M,
        B,
    ),
)


def leaning(
    model, processor, ds, wording, folder, image="original", chunk=100
):  # (N,) above 0: melanoma
    "Log-odds of the two answers' first words."
    asked, yes, no = wording
    first = [processor.tokenizer(a, add_special_tokens=False).input_ids[0] for a in (yes, no)]
    seen = evaluate.get_pooled_features(model, processor, ds, image, cache_dir=folder)
    rows, out = (
        training.TokenizedDataset(
            [dict(prompt=asked, answer=yes) for _ in range(len(ds))], chat.Collator(processor), seen
        ),
        [],
    )
    for i in range(0, len(rows), chunk):
        out.append(
            choice_logprobs(
                model,
                rows.collate_fn([rows[k] for k in range(i, min(i + chunk, len(rows)))]),
                first,
            )
        )
    p = np.concatenate(out)
    return p[:, 0] - p[:, 1]


def worth(y, lean, at=0.0):  # measure -> value
    "What answers are worth when everything that leans further than `at` is called melanoma."
    hit = (lean > at) == y
    sens, spec = hit[y].mean(), hit[~y].mean()
    return {
        "balanced accuracy": (sens + spec) / 2,
        "accuracy": hit.mean(),
        "accuracy where 1.8% are melanomas": RARE * sens + (1 - RARE) * spec,
        "sensitivity": sens,
        "specificity": spec,
        "AUROC": roc_auc_score(y, lean) if np.ptp(lean) else 0.5,
    }


def gains(after, before):  # how the same step sounds
    names = "balanced accuracy", "accuracy", "accuracy where 1.8% are melanomas"
    return {
        f"{what} in {n}": v
        for n in names
        for what, v in (
            ("points gained", 100 * (after[n] - before[n])),
            ("per cent gained", 100 * (after[n] / before[n] - 1)),
        )
    }


def one(seed, small, steps):
    "Every arm of a seed: the base by its wordings, the same model tuned, and its controls."
    parts = split_records(
        load_melanoma_pairs(120 if small else PAIRS, seed=WORLD + seed, size=SIDE, masks=False),
        (0.6, 0.15, 0.25),
        seed=seed,
    )
    val, test = parts["validation"], parts["test"]
    y_val, y = (np.array([label == "melanoma" for label in d["label"]]) for d in (val, test))
    model, processor = fresh()
    with tempfile.TemporaryDirectory() as folder:
        lean = {
            d: [leaning(model, processor, ds, w, folder) for w in WORDINGS]
            for d, ds in (("val", val), ("test", test))
        }
        on_val = [worth(y_val, item)["balanced accuracy"] for item in lean["val"]]
        best, worst = int(np.argmax(on_val)), int(np.argmin(on_val))
        cuts = np.unique(lean["val"][best])
        cut = max(cuts, key=lambda c: worth(y_val, lean["val"][best], c)["balanced accuracy"])
        out = {
            "always “benign”": worth(y, np.full(len(y), -1.0)),
            "prompted, first wording": worth(y, lean["test"][0]),
            "prompted, worst wording": worth(y, lean["test"][worst]),
            "prompted, best wording": worth(y, lean["test"][best]),
            "prompted, best wording and threshold": worth(y, lean["test"][best], cut),
            "prompted, best wording, another's picture": worth(
                y, leaning(model, processor, test, WORDINGS[best], folder, "shuffled")
            ),
        }
        train = [
            dict(
                image=r["image"],
                prompt=YESNO_PROMPT,
                answer=YES if r["label"] == "melanoma" else NO,
            )
            for r in parts["train"]
        ]
        run = training.fit(
            model,
            processor,
            train,
            lora=8,
            max_steps=steps,
            batch_size=BATCH,
            seed=seed,
            show_progress=False,
            cache_dir=folder,
        )
        out["fine-tuned"] = worth(y, leaning(run.model, processor, test, WORDINGS[0], folder))
        out["fine-tuned, another's picture"] = worth(
            y, leaning(run.model, processor, test, WORDINGS[0], folder, "shuffled")
        )
    for arm in (
        "always “benign”",
        "prompted, worst wording",
        "prompted, first wording",
        "prompted, best wording",
        "prompted, best wording and threshold",
    ):
        out[f"fine-tuned, over: {arm}"] = gains(out["fine-tuned"], out[arm])
    return {f"{arm}|{m}": v for arm, ms in out.items() for m, v in ms.items()}


def measure(cells, seeds, small=False):
    steps, found = 4 if small else STEPS, {}
    for s in seeds:
        measures = cells("all", s, lambda s=s, **k: one(s, small, **k), steps=steps)
        for k, v in measures.items():
            found.setdefault(tuple(k.split("|")), {})[s] = v
    BA, over = "balanced accuracy", "fine-tuned, over: prompted, {}"
    setup = (
        f"{len(WORDINGS)} wordings of the question to the untouched base; projector and LoRA of"
        f" rank 8, {steps} steps of {BATCH} on {int(0.6 * PAIRS)} lesions of {SIDE} × {SIDE}"
        " pixels, asked by the first wording"
    )
    yield entry(
        cells,
        seeds,
        "C7",
        found,
        [
            dict(
                statement=(
                    "fine-tuned is better than the best wording, with the threshold chosen as well"
                ),
                a=["fine-tuned", BA],
                b=["prompted, best wording and threshold", BA],
                expect="above",
            ),
            dict(
                statement="by 74 per cent of balanced accuracy or more, over the best wording",
                a=[over.format("best wording"), "per cent gained in " + BA],
                b=74,
                expect="not below",
            ),
            dict(
                statement="by 74 per cent of balanced accuracy or more, over the worst wording",
                a=[over.format("worst wording"), "per cent gained in " + BA],
                b=74,
                expect="not below",
            ),
            dict(
                statement="the gain is larger over the worst wording than over the best",
                a=[over.format("worst wording"), "per cent gained in " + BA],
                b=[over.format("best wording"), "per cent gained in " + BA],
                expect="above",
            ),
            dict(
                statement=(
                    "where melanoma is rare, fine-tuned is more often right than always “benign”"
                ),
                a=["fine-tuned", "accuracy where 1.8% are melanomas"],
                b=["always “benign”", "accuracy where 1.8% are melanomas"],
                expect="above",
            ),
            dict(
                statement="with another's picture the tuned model is no better than a coin",
                a=["fine-tuned, another's picture", BA],
                b=0.5,
                expect="equal",
                control=True,
            ),
            dict(
                statement="the tuned model looks: better with its own picture than with another's",
                a=["fine-tuned", BA],
                b=["fine-tuned, another's picture", BA],
                expect="above",
                control=True,
            ),
        ],
        (
            "always “benign”",
            "prompted, best wording, another's picture",
            "fine-tuned, another's picture",
        ),
        250,
        claim="Fine-tuning is up to 74% better than prompting.",
        measured=(
            "Yes or no to melanoma by the first word of the answer: the base by six wordings, the"
            " best and worst chosen on validation patients; the same model tuned; the step between"
            " them in points and in per cent."
        ),
        limitations=(
            f"{setup}. A base that has read of lesions and never seen one is easier to improve than"
            " a large model; a wording of yours may be better than our six. How large a share of a"
            " small number is, says little about either."
        ),
        setup=setup,
    )
