"""The simplex of the three weights, point by point: what captions get right, how often a picture
finds its caption, and the picture's share of the answers.
`python tests/ledger/sweep.py` leaves mmkit/assets/sweep.json, which the live tuner shows;
interrupted, the same command goes on.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import torch
from ledger_weights import SIMPLEX, name
from run import ROOT, Cells, machine, plain
from world import distinct, fresh, pairs_of

from mmkit import evaluate, losses, training
from mmkit.core.provenance import get_provenance
from mmkit.explain.monitor import ModalityMonitor
from mmkit.training.options import DEFAULT_LEARNING_RATES

POINTS = [
    tuple(map(float, w)) for w in (*SIMPLEX, (1 / 3, 1 / 3, 1 / 3))
]  # contrastive, ce, mse: steps of a quarter, the articles' weights, a third each
STEPS, BATCH, HELD, PROBED = (
    60,
    8,
    100,
    16,
)  # lesions that are described, and that the picture's share is measured on
LRS = {"points": None, "slower": 1e-3}  # of the projector; None: what `fit` takes
MEASURES = (
    "macro_f1",
    "r1",
    "image_share",
    "image_gain",
)  # the prompt is the same for all: the picture's share is all or nothing, its gain is not


def held_of(seed, small):
    return pairs_of(seed, small)["test"].select(range(6 if small else HELD))


def worth(model, processor, seed, small):
    """On lesions of other patients: macro-F1 of captions, R@1, the picture's share of the answers
    and how many of an answer's words it brings.
    """
    held = held_of(seed, small)
    said, look = (
        evaluate.generate(model, processor, held, show_progress=False),
        ModalityMonitor(processor, held.select(range(min(PROBED, len(held))))).measure(model),
    )
    return dict(
        macro_f1=evaluate.score_captions(held, said, n_resamples=1).macro_f1.value,
        r1=evaluate.compute_similarity(model, processor, distinct(held)).recall_at(1),
        image_share=look["image share"],
        image_gain=look["image gain"],
    )


def one(seed, small, w, lr, steps, batch):
    "The projector of a fresh base, trained with these weights."
    model, processor = fresh()
    model = training.fit(
        model,
        processor,
        pairs_of(seed, small)["train"],
        train=("projector",),
        max_steps=steps,
        batch_size=batch,
        learning_rate=lr,
        loss_weights=losses.LossWeights(*w),
        seed=seed,
        show_progress=False,
    ).model
    return worth(model, processor, seed, small)


def control(seed, small, which):
    "The untrained base; or the commonest answer, and a picture that guesses."
    if which == "untrained":
        return worth(*fresh(), seed, small)
    held = held_of(seed, small)
    said = evaluate.majority_baseline(pairs_of(seed, small)["train"], len(held))
    return dict(
        macro_f1=evaluate.score_captions(held, said, n_resamples=1).macro_f1.value,
        r1=1 / len(distinct(held)),
        image_share=float("nan"),
        image_gain=0.0,
    )


def measure(
    out=ROOT / "mmkit" / "assets" / "sweep.json",
    kept=ROOT / "runs" / "ledger" / "sweep.jsonl",
    seeds=range(3),
    small=False,
    say=print,
) -> Path:  # the file
    "Every point with every seed, whatever was measured before left as it is."
    cells, seeds, out, steps, batch = (
        Cells(kept, say),
        list(seeds),
        Path(out),
        *((2, 4) if small else (STEPS, BATCH)),
    )
    points = POINTS[6:9:2] if small else POINTS

    def lists(got):
        return {m: [g[m] for g in got] for m in MEASURES}

    swept = {
        key: [
            dict(contrastive=w[0], ce=w[1], mse=w[2])
            | lists(
                [
                    cells(
                        name(w),
                        s,
                        lambda **k: one(s, small, **k),
                        w=list(w),
                        lr=lr,
                        steps=steps,
                        batch=batch,
                    )
                    for s in seeds
                ]
            )
            for w in points
        ]
        for key, lr in LRS.items()
    }
    told = dict(
        swept,
        controls={
            which: lists(
                [cells(which, s, lambda **k: control(s, small, **k), which=which) for s in seeds]
            )
            for which in ("untrained", "commonest")
        },
        seeds=seeds,
        steps=steps,
        batch=batch,
        train=["projector"],
        lr=dict(points=DEFAULT_LEARNING_RATES["projector"], slower=LRS["slower"]),
        held=len(held_of(seeds[0], small)),
        probed=PROBED,
        **get_provenance(),
        machine=machine(),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        date=str(datetime.date.today()),
        command="python tests/ledger/sweep.py",
        seconds=round(cells.seconds, 1),
    )
    part = out.with_suffix(".part")
    part.write_text(json.dumps(plain(told), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, out)
    cells.finish()
    return out


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or 1)))
    print(machine(), flush=True)
    print(measure(say=lambda s: print(s, flush=True)))
