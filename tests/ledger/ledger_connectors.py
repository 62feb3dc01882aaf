"""Connectors beside each other: one matrix, two layers, Gemma 3's norm and matrix; and at a
quarter of the tokens averages, stacked squares, learned queries.
"""

from ledger_budget import batch_of
from ledger_order import (
    BATCH,
    COMMON,
    HELD,
    SCREEN,
    STEPS,
    TEXT,
    gathered,
    rates,
    scored,
    sound,
    tuned,
)
from run import entry
from world import fresh, pairs_of

from mmkit import models, training
from mmkit.core.runtime import seed_everything
from mmkit.models.connectors import (
    Gemma3Projector,
    LinearProjector,
    MLPProjector,
    PixelShuffleProjector,
    QFormer,
)
from mmkit.models.surgery import replace_connector
from mmkit.training.steps import count_step_flops

IDS = ("C30-connectors",)
LINEAR, MLP, POOLED, AVERAGED, STACKED, ASKED = (
    "linear, 64 tokens",
    "MLP, 64 tokens",
    "norm and matrix (Gemma 3), 64 tokens",
    "linear, 16 tokens",
    "space-to-depth, 16 tokens",
    "Q-Former, 16 tokens",
)
CONNECTORS = {
    LINEAR: LinearProjector,
    MLP: MLPProjector,
    POOLED: Gemma3Projector,
    AVERAGED: lambda c: LinearProjector(c, 16),
    STACKED: lambda c: PixelShuffleProjector(c, 16),
    ASKED: lambda c: QFormer(c, 16),
}
BLIND = "random tower, linear, 64 tokens"


def one(seed, small, arm, lr, steps, batch):
    """A fresh connector, trained with LoRA beside it on cached features; what captions are worth,
    and what a step costs.
    """
    parts, (model, processor) = pairs_of(seed, small), fresh()
    seed_everything(seed)
    if arm == BLIND:
        tower = model.model.vision_tower
        model.model.vision_tower = type(tower)(tower.config).eval()
    connector = CONNECTORS[LINEAR if arm == BLIND else arm](model.config)
    model, processor = replace_connector(model, processor, connector)
    model = models.add_lora(model, 8)
    run = training.fit(
        model,
        processor,
        parts["train"],
        train=("projector", "text"),
        max_steps=steps,
        batch_size=batch,
        learning_rate=rates(lr),
        seed=seed,
        show_progress=False,
    )
    with models.freeze_all_but(model, "projector", "text"):
        flops = count_step_flops(model, batch_of(processor, parts["validation"]))
    return scored(model, processor, parts) | {
        "training loss": float(run.smoothed()[-1]),
        "GFLOPs a step": flops / 1e9,
        "image tokens": connector.tokens,
        "parameters of the connector": sum(p.numel() for p in connector.parameters()),
    }


def measure(cells, seeds, small=False):
    steps, batch = (2, 4) if small else (STEPS, BATCH)

    def run(arm, s, lr):
        return cells(arm, s, lambda **k: one(s, small, arm, **k), lr=lr, steps=steps, batch=batch)

    arms = [LINEAR, MLP, STACKED] if small else [*CONNECTORS]
    rate, by_rate = tuned(run, arms, seeds, small)
    found, F1, n = (
        gathered(cells, seeds, small, run, rate | {BLIND: rate[LINEAR]}),
        "macro-F1",
        min(HELD, len(pairs_of(seeds[0], small)["test"])),
    )
    asked = [
        dict(statement=says, a=[a, F1], b=[b, F1], expect=expect)
        for says, a, b, expect in (
            ("two layers beat one", MLP, LINEAR, "above"),
            ("a norm and a matrix beat the matrix and a bias", POOLED, LINEAR, "above"),
            ("16 averages are as good as 64", AVERAGED, LINEAR, "not below"),
            ("at 16 tokens, stacked squares beat averages", STACKED, AVERAGED, "above"),
            ("learned queries beat averages", ASKED, AVERAGED, "above"),
            ("and stacked squares", ASKED, STACKED, "above"),
        )
        if a in arms and b in arms
    ]
    yield entry(
        cells,
        seeds,
        "C30-connectors",
        found,
        asked
        + [
            dict(
                statement="a random tower is worse than the trained one, behind the same connector",
                a=[BLIND, F1],
                b=[LINEAR, F1],
                expect="below",
                control=True,
            ),
            *sound(LINEAR),
        ],
        (BLIND, COMMON),
        n,
        tuned_rate=rate,
        by_rate=by_rate,
        claim=(
            "Two layers join tower and text model better than one (LLaVA 1.5), and few tokens want"
            " learned queries (BLIP-2) or stacked squares (Idefics 3) rather than averages."
        ),
        measured=(
            "Macro-F1 of captions of test lesions, own pictures and others', at equal steps;"
            " weights of the connector, image tokens and operations of a step beside it."
        ),
        setup=(
            f"Fresh connectors with LoRA of rank 8 in the text model, {steps} steps of {batch} on"
            f" cached features, tower frozen. LoRA's rate is {TEXT:g}; the connector's is each"
            f" arm's own best of {', '.join(f'{r:g}' for r in SCREEN)} (further out where the best"
            " lay at the edge) by validation lesions of two seeds. Operations are torch's count of"
            " an uncached step, tower included."
        ),
        limitations=(
            f"{steps * batch} lesions are seen, where LLaVA's connector sees half a million pairs"
            " and BLIP-2's queries over a hundred million before they speak: what needs long"
            " training loses here. Captions that ask for nothing in a place, 64 tokens at most."
        ),
    )
