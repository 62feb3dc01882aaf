"C29: what fewer image tokens and fewer pixels save, and what they cost."

import time

import torch
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

from mmkit import chat, evaluate, losses, models, training
from mmkit.core.runtime import seed_everything
from mmkit.models.connectors import Gemma3Projector
from mmkit.models.surgery import replace_connector, set_image_size
from mmkit.training.steps import count_step_flops

IDS = ("C29",)
BUDGETS = {
    "128 pixels, 256 tokens": (128, 256),
    "128 pixels, 64 tokens": (128, 64),
    "128 pixels, 16 tokens": (128, 16),
    "128 pixels, 1 token": (128, 1),
    "64 pixels, 64 tokens": (64, 64),
}
USUAL, FEW, SMALL, ONE = (
    "128 pixels, 64 tokens",
    "128 pixels, 16 tokens",
    "64 pixels, 64 tokens",
    "128 pixels, 1 token",
)

PLACES = {
    "LoRA in all layers of the text": dict(rank=4),
    "LoRA in the first layer of the text": dict(rank=16, layers_to_transform=[0]),
    "LoRA at the output head": dict(rank=41, target_modules=("lm_head",)),
    "LoRA in the vision tower": dict(rank=4, part="vision"),
}
TEXTUAL, TOWER, ADDS = (
    *(a for a in PLACES if "all" in a or "tower" in a),
    "added by a stranger's picture",
)


def batch_of(processor, ds):
    return chat.Collator(processor)([ds[i] for i in range(min(BATCH, len(ds)))])


def gemmas(size, tokens):  # (model, processor)
    "The shipped base at that resolution and budget, with its own projector's weights."
    model, processor = fresh()
    weights = model.model.multi_modal_projector.state_dict()
    if size != 128:
        model, processor = set_image_size(model, processor, size)
    model, processor = replace_connector(model, processor, Gemma3Projector(model.config, tokens))
    model.model.multi_modal_projector.load_state_dict(weights)
    return model, processor


@torch.no_grad()
def looks(model, processor, ds):  # seconds
    """Tower, connector and the reading of the prompt, for 8 pictures: what stands before the first
    word.
    """
    b = chat.Collator(processor, for_training=False)([ds[i] for i in range(min(8, len(ds)))])
    began = time.perf_counter()
    model(**b, logits_to_keep=1, use_cache=False)
    return time.perf_counter() - began


def seconds(model, processor, ds):  # of one uncached training step
    with models.freeze_all_but(model, "projector", "text"):
        b = batch_of(processor, ds)
        began = time.perf_counter()
        training.compute_losses(model, b, losses.LossWeights())["ce"].backward()
        model.zero_grad()
        return time.perf_counter() - began


def ratios(model, processor, usual, ds):  # both in turn, the quickest of three each
    "Time to the first word, and of an uncached training step, as a share of the usual budget's."
    out = {}
    for name, f in {
        "time to the first word, ratio": looks,
        "time of a step, ratio": seconds,
    }.items():
        got = [(f(model, processor, ds), f(*usual, ds)) for _ in range(4)][1:]
        out[name] = min(a for a, _ in got) / min(b for _, b in got)
    return out


def budget(seed, small, size, tokens, lr, steps, batch):
    "Projector and LoRA trained at one budget; what captions are worth, what a step costs."
    parts, (model, processor) = pairs_of(seed, small), gemmas(size, tokens)
    seed_everything(seed)
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
    usual = gemmas(128, 64)
    usual = models.add_lora(usual[0], 8), usual[1]
    return (
        scored(model, processor, parts)
        | {"training loss": float(run.smoothed()[-1]), "GFLOPs a step": flops / 1e9}
        | ratios(model, processor, usual, parts["validation"])
    )


@torch.no_grad()
def looking(model, processor, ds):
    """Loss of the answers, what a stranger's picture adds to it, and the share of captions that
    differ from one another.
    """
    b = chat.Collator(processor)([ds[i] for i in range(min(32, len(ds)))])
    said = evaluate.generate(model, processor, ds, show_progress=False)
    own = float(model(**b).loss)
    return {
        "loss of the answers": own,
        ADDS: float(model(**dict(b, pixel_values=b["pixel_values"].roll(1, 0))).loss) - own,
        "different captions, %": 100 * len(set(said)) / len(said),
    }


def placed(seed, small, place, lr, steps, batch):
    "LoRA alone, in one place, everything else at rest; about 45,000 numbers."
    parts, (model, processor) = pairs_of(seed, small), fresh()
    if place:
        model = training.fit(
            model,
            processor,
            parts["train"],
            train=(),
            lora=PLACES[place],
            learning_rate=lr,
            max_steps=steps,
            batch_size=batch,
            seed=seed,
            show_progress=False,
        ).model
    return looking(model, processor, parts["test"].select(range(min(HELD, len(parts["test"])))))


def measure(cells, seeds, small=False):
    steps, batch = (2, 4) if small else (STEPS, BATCH)

    def run(arm, s, lr):
        return cells(
            arm,
            s,
            lambda **k: budget(s, small, **k),
            size=BUDGETS[arm][0],
            tokens=BUDGETS[arm][1],
            lr=lr,
            steps=steps,
            batch=batch,
        )

    rate, by_rate = tuned(run, [USUAL], seeds, small)
    found = gathered(cells, seeds, small, run, dict.fromkeys(BUDGETS, rate[USUAL]))
    for s in seeds:
        for place in (*PLACES, None):
            for m, v in cells(
                place or "untrained base",
                s,
                lambda **k: placed(s, small, **k),
                place=place,
                lr=5e-3,
                steps=2 if small else 30,
                batch=8,
            ).items():
                found.setdefault((place or "untrained base", m), {})[s] = v
    F1, STEP, WORD, n = (
        "macro-F1",
        "GFLOPs a step",
        "time to the first word, ratio",
        min(HELD, len(pairs_of(seeds[0], small)["test"])),
    )
    yield entry(
        cells,
        seeds,
        "C29",
        found,
        [
            dict(
                statement="half the pixels a side: the first word comes sooner",
                a=[SMALL, WORD],
                b=[USUAL, WORD],
                expect="below",
            ),
            dict(
                statement="and says as much that is right, at 64 tokens",
                a=[SMALL, F1],
                b=[USUAL, F1],
                expect="not below",
            ),
            dict(
                statement="16 tokens for 64: the first word comes sooner",
                a=[FEW, WORD],
                b=[USUAL, WORD],
                expect="below",
            ),
            dict(
                statement="a step costs fewer operations",
                a=[FEW, STEP],
                b=[USUAL, STEP],
                expect="below",
            ),
            dict(
                statement="and 16 tokens say as much that is right",
                a=[FEW, F1],
                b=[USUAL, F1],
                expect="not below",
            ),
            dict(
                statement="a single token says as much that is right",
                a=[ONE, F1],
                b=[USUAL, F1],
                expect="not below",
            ),
            dict(
                statement="LoRA in the vision tower alone looks less than LoRA in the text",
                a=[TOWER, ADDS],
                b=[TEXTUAL, ADDS],
                expect="below",
            ),
            dict(
                statement="and less than before it was trained",
                a=[TOWER, ADDS],
                b=["untrained base", ADDS],
                expect="below",
            ),
            dict(
                statement="though it learns the wording: its loss falls",
                a=[TOWER, "loss of the answers"],
                b=["untrained base", "loss of the answers"],
                expect="below",
            ),
            *sound(USUAL),
        ],
        (COMMON, "untrained base"),
        n,
        tuned_rate=rate,
        by_rate=by_rate,
        claim="Lower image resolution cuts latency, and a wrongly placed adapter blinds the model.",
        measured=(
            "Macro-F1 of captions against the number of image tokens and of pixels, with the"
            " operations of a training step and the time to the first word, as ratios to 64 tokens"
            " from 128 pixels; and for LoRA in four places, what another lesion's picture adds to"
            " the loss of the answers."
        ),
        setup=(
            "The shipped projector's weights at every budget (averaging has none), LoRA of rank 8,"
            f" both trained for {steps} steps of {batch} with the tower frozen, LoRA at {TEXT:g},"
            f" the projector at {rate[USUAL]:g}, the best of {', '.join(f'{r:g}' for r in SCREEN)}"
            " at 64 tokens (further out where the best lay at the edge) by validation lesions of"
            " two seeds. Times are of 8 pictures, both budgets in turn in one process, the"
            " quickest of three, one thread; operations are torch's count with eager attention."
            " Places: LoRA alone, about 45,000 numbers, 30 steps of 8 at 0.005."
        ),
        limitations=(
            "Times are a CPU's, at toy size, where the text of prompt and caption outweighs the"
            " picture: in a large model with hundreds of image tokens the share differs. The tower"
            " was trained at 128 pixels only. One rate for all places: a slower tower would unlearn"
            " less, and learn less."
        ),
    )
