"""C23: how many pairs does a method need? Learning curves of the head alone, LoRA and full
fine-tuning.
"""

import functools

from ledger_methods import CONTROLS, HELD, P, V, on_b, prepared, tempfile
from run import entry
from world import WORLD, fresh

from mmkit import evaluate, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.data.splits import split_records

IDS = ("C23",)
SIZES, STEPS, BATCH = (50, 200, 800, 3200), 400, 8
RATES = dict(
    head=1.5e-2, LoRA=5e-3, full=3e-3
)  # chosen in ledger_methods.py, with a thousand pairs
METHODS = tuple(RATES)


@functools.lru_cache(1)
def pool(seed, small):  # train, validation, test
    "A larger set of lesions of the same seed."
    return split_records(
        load_melanoma_pairs(160 if small else 4600, seed=WORLD + 100 + seed, masks=False),
        (0.7, 0.1, 0.2),
        seed=seed,
    )


def one(seed, small, method, size, rate, steps):
    "Train by this method on so many pairs, for the same number of steps whatever the number."
    parts, (model, processor, how) = pool(seed, small), prepared(method)
    test, few = (
        parts["test"].select(range(min(HELD, len(parts["test"])))),
        parts["train"].select(range(min(size, len(parts["train"])))),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = training.fit(
            model,
            processor,
            few,
            **how,
            max_steps=steps,
            batch_size=BATCH,
            learning_rate=dict(text=rate, projector=P, vision=V),
            seed=seed,
            show_progress=False,
        )
        f1, bal = on_b(run.model, processor, test, folder)
    return {"macro-F1": f1, "balanced accuracy": bal, "training loss": float(run.smoothed()[-1])}


def plain(seed, small, which):
    parts = pool(seed, small)
    test = parts["test"].select(range(min(HELD, len(parts["test"]))))
    if which == "commonest":
        s = evaluate.score_captions(
            test, evaluate.majority_baseline(parts["train"], len(test)), n_resamples=1
        )
        return {"macro-F1": s.macro_f1.value, "balanced accuracy": s.balanced_accuracy.value}
    with tempfile.TemporaryDirectory() as folder:
        return dict(zip(("macro-F1", "balanced accuracy"), on_b(*fresh(), test, folder)))


def measure(cells, seeds, small=False):
    steps, sizes, methods = (2, (8, 32), ("LoRA",)) if small else (STEPS, SIZES, METHODS)
    found, at = {}, lambda arm, measure: found.setdefault((arm, measure), {})
    for s in seeds:
        for m in methods:
            for n in sizes:
                for k, v in cells(  # noqa: B020
                    m, s, lambda **k: one(s, small, m, **k), size=n, rate=RATES[m], steps=steps
                ).items():
                    at(f"{m}, {n} pairs", k)[s] = v
        for arm, which in zip(CONTROLS, ("commonest", "base")):
            measures = cells(arm, s, lambda s=s, **k: plain(s, small, **k), which=which)
            for k, v in measures.items():
                at(arm, k)[s] = v
    F1, few, many = "macro-F1", sizes[0], sizes[-1]

    def arm(m, n):
        return [f"{m}, {n} pairs", F1]

    asked = [
        dict(
            statement=f"{m}: {n} pairs are enough to beat the untrained model",
            a=arm(m, n),
            b=[CONTROLS[1], F1],
            expect="above",
        )
        for m in methods
        for n in (few,)
    ]
    asked += (
        [
            dict(
                statement=f"full fine-tuning beats LoRA with {many} pairs",
                a=arm("full", many),
                b=arm("LoRA", many),
                expect="above",
            ),
            dict(
                statement=f"LoRA beats full fine-tuning with {few} pairs",
                a=arm("LoRA", few),
                b=arm("full", few),
                expect="above",
            ),
        ]
        if not small
        else []
    )
    yield entry(
        cells,
        seeds,
        "C23",
        found,
        asked
        + [
            dict(
                statement="LoRA with the most pairs: above the commonest answer",
                a=arm("LoRA", many),
                b=[CONTROLS[0], F1],
                expect="above",
                control=True,
            )
        ],
        CONTROLS,
        HELD,
        claim=(
            "Below 5,000 samples take an API, from 5,000 to 100,000 LoRA or its like, above that"
            " full fine-tuning."
        ),
        measured=(
            "Macro-F1 of captions against the number of pairs, at equal steps and with each"
            ' method\'s own rate; the untrained model stands for "an API".'
        ),
        limitations=(
            "A base of two million weights on lesions that we drew: where the curves cross, if they"
            " do, depends on the model, the task and the distance from what it knows. Nothing here"
            " goes beyond a few thousand pairs."
        ),
        setup=(
            f"Projector and method as in C15, {steps} steps of {BATCH} whatever the number of pairs"
            " (few pairs are seen often)"
        ),
    )
