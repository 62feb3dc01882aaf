"""C14: LoRA's rank: the share of the weights that it trains, and how much of full fine-tuning it
keeps.
"""

from ledger_methods import CONTROLS, HELD, P, V, baseline, fresh, on_b, pairs_of, tempfile
from run import entry

from mmkit import training
from mmkit.models.parts import get_trainable_parameters

IDS = ("C14",)
RANKS, STEPS, BATCH = (1, 2, 4, 8, 16, 32), 100, 8
RATES = dict(
    LoRA=5e-3, full=3e-3
)  # chosen in ledger_methods.py for rank 8 and for full fine-tuning


def one(seed, small, rank, rate, steps):
    "Projector and LoRA of this rank on all linear layers of the text (rank 0: all parts whole)."
    parts, (model, processor) = pairs_of(seed, small), fresh()
    total = sum(p.numel() for p in model.parameters())
    how = (
        dict(train=("projector",), lora=rank)
        if rank
        else dict(train=("vision", "projector", "text"))
    )
    test = parts["test"].select(range(min(HELD, len(parts["test"]))))
    with tempfile.TemporaryDirectory() as folder:
        run = training.fit(
            model,
            processor,
            parts["train"],
            **how,
            max_steps=steps,
            batch_size=BATCH,
            learning_rate=dict(text=rate, projector=P, vision=V),
            seed=seed,
            show_progress=False,
        )
        trained = {
            id(p): p
            for name in (*how["train"], *(("text",) if rank else ()))
            for p in get_trainable_parameters(run.model, name)
            if not rank or name == "text"
        }.values()
        f1, bal = on_b(run.model, processor, test, folder)
        return {"trained": 100 * sum(p.numel() for p in trained) / total, "f1": f1, "bal": bal}


def measure(cells, seeds, small=False):
    steps, ranks = (2, (1, 4)) if small else (STEPS, RANKS)
    arms = {f"LoRA, rank {r}": (r, RATES["LoRA"]) for r in ranks} | {
        "full fine-tuning": (0, RATES["full"])
    }
    found, at = {}, lambda arm, measure: found.setdefault((arm, measure), {})
    for s in seeds:
        got = {
            arm: cells(arm, s, lambda **k: one(s, small, **k), rank=r, rate=rate, steps=steps)
            for arm, (r, rate) in arms.items()
        }
        plain = {
            arm: cells(arm, s, lambda **k: baseline(s, small, **k), which=w)
            for arm, w in zip(CONTROLS, ("commonest", "base"))
        }
        for arm, g in got.items():
            at(arm, "macro-F1")[s] = g["f1"]
            at(arm, "trained, % of the weights")[s] = g["trained"]
            at(arm, "kept of full fine-tuning, %")[s] = (
                100 * g["f1"] / got["full fine-tuning"]["f1"]
            )
            at(arm, "kept of its gain over the commonest answer, %")[s] = (
                100
                * (g["f1"] - plain[CONTROLS[0]]["f1"])
                / (got["full fine-tuning"]["f1"] - plain[CONTROLS[0]]["f1"])
            )
        for arm, g in plain.items():
            at(arm, "macro-F1")[s] = g["f1"]
            at(arm, "kept of full fine-tuning, %")[s] = (
                100 * g["f1"] / got["full fine-tuning"]["f1"]
            )
    low, high = (f"LoRA, rank {r}" for r in (ranks[0], ranks[-1]))
    n, SHARE, KEEPS, F1 = (
        min(HELD, len(pairs_of(seeds[0], small)["test"])),
        "trained, % of the weights",
        "kept of full fine-tuning, %",
        "macro-F1",
    )
    yield entry(
        cells,
        seeds,
        "C14",
        found,
        [
            dict(
                statement="the share stays below 0.8% of the weights at rank 8",
                a=["LoRA, rank 8" if 8 in ranks else high, SHARE],
                b=0.8,
                expect="below",
            ),
            dict(
                statement="rank 1, whose share does, keeps 98.7% of full fine-tuning or more",
                a=[low, KEEPS],
                b=98.7,
                expect="not below",
            ),
            dict(
                statement="rank 8 keeps 98.7% of full fine-tuning or more",
                a=["LoRA, rank 8" if 8 in ranks else high, KEEPS],
                b=98.7,
                expect="not below",
            ),
            dict(
                statement="rank is felt: the largest learns more than the smallest",
                a=[high, F1],
                b=[low, F1],
                expect="above",
                control=True,
            ),
            dict(
                statement="full fine-tuning learns: above the commonest answer",
                a=["full fine-tuning", F1],
                b=[CONTROLS[0], F1],
                expect="above",
                control=True,
            ),
        ],
        CONTROLS,
        n,
        claim="LoRA trains 0.5–0.8% of the weights and keeps 98.7% of full fine-tuning.",
        measured=(
            "Trained numbers of LoRA (without the projector) as a share of the weights, exact;"
            " macro-F1 of captions beside full fine-tuning of all three parts at equal steps. The"
            ' commonest answer and the untrained base "keep" something too.'
        ),
        limitations=(
            f"A base of two million weights and {steps} steps; at billions of weights the same"
            " ranks are far smaller shares, and harder tasks may need more rank."
        ),
        setup=(
            f"Projector (rate {P:g}) and LoRA on all linear layers of the text (rate"
            f" {RATES['LoRA']:g}, alpha twice the rank), {steps} steps of {BATCH}; full: text"
            f" {RATES['full']:g}, vision {V:g}."
        ),
    )
