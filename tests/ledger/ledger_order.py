"""C26: projector first, then LoRA; LoRA first; both at once; and what a tower that never learned
to see is worth.
"""

import numpy as np
from run import entry
from world import fresh, pairs_of

from mmkit import evaluate, models, training
from mmkit.core.runtime import seed_everything
from mmkit.models.connectors import Gemma3Projector
from mmkit.models.surgery import replace_connector

IDS = ("C26",)
SCREEN, TEXT, STEPS, BATCH, HELD = (
    (1e-3, 3e-3, 1e-2),
    4e-3,
    150,
    4,
    128,
)  # projector rates to choose from, LoRA's rate, steps of so many rows, lesions that are described
FIRST, LAST, BOTH = "projector, then LoRA", "LoRA, then projector", "both at once"
ALONE, DEAF, BLIND, COMMON = (
    "projector alone",
    "LoRA alone, behind a random matrix",
    "random tower, both at once",
    "always the commonest",
)
PLAN = {
    FIRST: (("projector",), ("text",)),
    LAST: (("text",), ("projector",)),
    BOTH: (("projector", "text"),),
    ALONE: (("projector",),),
    DEAF: (("text",),),
    BLIND: (("projector", "text"),),
}


def rates(lr):
    return dict(projector=lr, text=TEXT)


def scored(model, processor, parts):
    """Macro-F1 and balanced accuracy of captions of test lesions, macro-F1 with others' pictures,
    and macro-F1 on validation lesions, by which rates are chosen.
    """
    test, val = (parts[k].select(range(min(HELD, len(parts[k])))) for k in ("test", "validation"))
    own, other, chosen = (
        evaluate.score_captions(
            ds,
            evaluate.generate(model, processor, ds, image_condition=i, show_progress=False),
            n_resamples=1,
        )
        for ds, i in ((test, "original"), (test, "shuffled"), (val, "original"))
    )
    return {
        "macro-F1": own.macro_f1.value,
        "balanced accuracy": own.balanced_accuracy.value,
        "macro-F1, shuffled pictures": other.macro_f1.value,
        "validation macro-F1": chosen.macro_f1.value,
    }


def tuned(run, arms, seeds, small) -> tuple:  # (arm -> rate, arm -> {rate: validation macro-F1})
    """Each arm's own rate, the best on validation lesions over the first two seeds; `run(arm,
    seed, rate)` gives measures.
    """

    def tried(arm, lr):
        return float(np.mean([run(arm, s, lr)["validation macro-F1"] for s in seeds[:2]]))

    val, best = (
        {arm: {lr: tried(arm, lr) for lr in (SCREEN[1:2] if small else SCREEN)} for arm in arms},
        lambda arm: max(val[arm], key=val[arm].get),
    )
    for arm in arms:
        for _ in range(0 if small else 2):  # where the best lies at the edge, look beyond it
            beyond = {min(val[arm]): min(val[arm]) / 3, max(val[arm]): max(val[arm]) * 3}.get(
                best(arm)
            )
            if beyond:
                val[arm][beyond] = tried(arm, beyond)
    return {arm: best(arm) for arm in arms}, {
        arm: {f"{lr:g}": x for lr, x in sorted(v.items())} for arm, v in val.items()
    }


def commonest(parts):
    test = parts["test"].select(range(min(HELD, len(parts["test"]))))
    s = evaluate.score_captions(
        test, evaluate.majority_baseline(parts["train"], len(test)), n_resamples=1
    )
    return {"macro-F1": s.macro_f1.value, "balanced accuracy": s.balanced_accuracy.value}


def gathered(cells, seeds, small, run, rate) -> dict:  # (arm, measure) -> {seed: value}
    "What every arm of `rate` measures at its rate, with the commonest answer beside it."
    found = {}
    for s in seeds:
        got = {arm: run(arm, s, lr) for arm, lr in rate.items()} | {
            COMMON: cells(COMMON, s, lambda: commonest(pairs_of(s, small)))
        }
        for arm, measures in got.items():
            for m, v in measures.items():
                found.setdefault((arm, m), {})[s] = v
    return found


def sound(arm) -> list:  # controls
    "An arm that proves that the experiment can tell something: it learned, and it looks."
    return [
        dict(
            statement=f"{arm}: beats the commonest answer",
            a=[arm, "macro-F1"],
            b=[COMMON, "macro-F1"],
            expect="above",
            control=True,
        ),
        dict(
            statement=f"{arm}: what it says comes from the picture",
            a=[arm, "macro-F1"],
            b=[arm, "macro-F1, shuffled pictures"],
            expect="above",
            control=True,
        ),
    ]


def one(seed, small, arm, lr, steps, batch):
    """A fresh projector, and rank 8 beside the text model's layers, trained in that order; every
    stage warms up and decays for itself.
    """
    parts, (model, processor) = pairs_of(seed, small), fresh()
    seed_everything(seed)
    if arm == BLIND:
        tower = model.model.vision_tower
        model.model.vision_tower = type(tower)(tower.config).eval()
    model, processor = replace_connector(model, processor, Gemma3Projector(model.config))
    model, _found = models.add_lora(model, 8), {}
    for k, train in enumerate(PLAN[arm]):
        run = training.fit(
            model,
            processor,
            parts["train"],
            train=train,
            max_steps=steps // len(PLAN[arm]),
            batch_size=batch,
            learning_rate=rates(lr),
            seed=seed + 100 * k,
            show_progress=False,
        )
    return scored(model, processor, parts) | {"training loss": float(run.smoothed()[-1])}


def measure(cells, seeds, small=False):
    steps, batch = (2, 4) if small else (STEPS, BATCH)

    def run(arm, s, lr):
        return cells(arm, s, lambda **k: one(s, small, arm, **k), lr=lr, steps=steps, batch=batch)

    rate, by_rate = tuned(run, PLAN, seeds, small)
    found, F1 = gathered(cells, seeds, small, run, rate), "macro-F1"
    tests = [
        dict(
            statement="projector first, then LoRA, beats LoRA first",
            a=[FIRST, F1],
            b=[LAST, F1],
            expect="above",
        ),
        dict(
            statement="and beats both at once, at equal steps",
            a=[FIRST, F1],
            b=[BOTH, F1],
            expect="above",
        ),
        dict(
            statement="LoRA adds to the projector alone",
            a=[FIRST, F1],
            b=[ALONE, F1],
            expect="above",
        ),
        dict(
            statement="the projector has to learn: LoRA behind a random matrix is worse than both",
            a=[DEAF, F1],
            b=[BOTH, F1],
            expect="below",
        ),
        dict(
            statement="a random tower is worse than the trained one",
            a=[BLIND, F1],
            b=[BOTH, F1],
            expect="below",
            control=True,
        ),
        *sound(BOTH),
    ]
    yield entry(
        cells,
        seeds,
        "C26",
        found,
        tests,
        (BLIND, COMMON),
        tuned_rate=rate,
        by_rate=by_rate,
        n=min(HELD, len(pairs_of(seeds[0], small)["test"])),
        claim="Train the projector first, then, if needed, LoRA on the text model.",
        measured=(
            "Macro-F1 of what captions say, after a fresh projector and LoRA were trained in either"
            " order, at once, or one of them alone; with others' pictures, and behind a tower with"
            " random weights."
        ),
        setup=(
            "A fresh random projector (norm and matrix, 64 tokens) and LoRA of rank 8 on all"
            f" linear layers of the text model; {steps} steps of {batch} in all, {steps // 2} for"
            f" each of two stages, each with its own warm-up and decay; LoRA's rate is {TEXT:g},"
            f" the projector's each arm's own best of {', '.join(f'{r:g}' for r in SCREEN)}"
            " (further out where the best lay at the edge) by validation lesions of two seeds; the"
            " tower is frozen."
        ),
        limitations=(
            "LLaVA's first stage sees half a million pairs before the text model moves; here it"
            f" sees {steps // 2 * batch} lesions. The text model was pre-trained with image tokens"
            " in its sentences (of another projector), which a text-only model was not: that helps"
            " every arm. What is forgotten by moving the text model early is not measured here."
        ),
    )
