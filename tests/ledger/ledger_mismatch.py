"C19, the loss's side: does the contrastive loss tell of mismatched pairs?"

import math

import numpy as np
import torch
from contrast import HOW, TOY, pool_of, r_at_1, train
from run import entry
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from world import vectors

IDS = ("C19",)
SHARES, EPOCHS = (0, 0.05, 0.1, 0.25, 0.5, 1), (1, 2, 5, 10, 20, 40)


def planted(n, share, seed):  # (n,) whose caption; (n,) True where it is not the own one
    "A share of the captions passed round in a circle."
    rng = np.random.default_rng((seed, 19))
    at = rng.permutation(n)[: round(share * n)]
    captions = np.arange(n)
    captions[at] = np.roll(at, 1)
    return torch.as_tensor(captions), captions != np.arange(n)


@torch.no_grad()
def each(h, x, y, ids):
    "The contrastive loss of every pair among all pairs, both ways."
    A, B = (torch.nn.functional.normalize(z, dim=1) for z in (h.see(x), h.read(y)))
    S = A @ B.T / h.temperature
    return ((S.logsumexp(1) + S.logsumexp(0)) / 2 - S.diag()).numpy()


def one(seed, small, share, lr=2e-3, batch=64):
    """Loss, R@1, and how well loss finds the planted pairs: pair by pair after so many epochs, and
    batch by batch in the last half.
    """
    x, y, ids, _ = vectors(seed, small)["train"]
    n = len(x)
    captions, wrong = planted(n, share, seed)
    sham = (
        wrong if 0 < share < 1 else np.random.default_rng((seed, 20)).random(n) < 0.1
    )  # nothing planted, or everything: a tenth drawn at random
    marks, out, batches = {max(1, e * n // batch): e for e in EPOCHS}, {}, []

    def watch(step, h, rows, loss):
        batches.append((step, loss, sham[rows].sum()))
        if step + 1 in marks:
            out[f"AUROC after {marks[step + 1]} epochs"] = roc_auc_score(
                sham, each(h, x, y[captions], ids)
            )

    h, v, said = train(
        seed,
        small,
        lr=lr,
        batch=batch,
        samples=EPOCHS[-1] * n * (100 if small else 1),
        captions=captions,
        watch=watch,
    )
    late = [b for b in batches if b[0] >= len(said) // 2]
    last = said[-max(1, n // batch) :]
    rho = (
        spearmanr([b[1] for b in late], [b[2] for b in late]).statistic
        if len({b[2] for b in late}) > 1
        else 0.0
    )
    spikes = sorted(late, key=lambda b: -b[1])[: max(1, len(late) // 20)]
    rate = np.mean([b[2] for b in late]) or 1
    height = np.mean([b[1] for b in spikes]) / np.mean([b[1] for b in late])
    return {
        "training loss": last.mean(),
        "highest 5% of batch losses, over the mean": height,
        "R@1": r_at_1(h, v["test"]),
        **out,
        "batch loss with its planted pairs (Spearman)": rho,
        "planted pairs in the highest 5% of batches, over the mean": (
            np.mean([b[2] for b in spikes]) / rate
        ),
    }


def measure(cells, seeds, small=False):
    arms = {f"{p:.0%} mismatched": dict(share=p) for p in SHARES}
    low, large = "none, learning rate / 10", "none, N = 256"
    arms |= {
        low: dict(share=0, lr=2e-4),
        "none, learning rate / 30": dict(share=0, lr=2e-3 / 30),
        "none, N = 128": dict(share=0, batch=128),
        large: dict(share=0, batch=256),
    }
    if small:
        arms = {k: a for k, a in arms.items() if k not in ("25% mismatched",)}
    found = {}
    for s in seeds:
        for arm, how in arms.items():
            for m, v in cells(arm, s, lambda **k: one(s, small, **k), **how).items():
                found.setdefault((arm, m), {})[s] = v
    L, R, H, controls = (
        "training loss",
        "R@1",
        "highest 5% of batch losses, over the mean",
        tuple(a for a in arms if a.startswith("none")) + ("100% mismatched",),
    )
    last, n = f"AUROC after {EPOCHS[-1]} epochs", len(pool_of(vectors(seeds[0], small)["test"]))
    tests = [
        dict(
            statement="mismatches raise the loss: 5% against none",
            a=["5% mismatched", L],
            b=["0% mismatched", L],
            expect="above",
        ),
        dict(
            statement="50% against none",
            a=["50% mismatched", L],
            b=["0% mismatched", L],
            expect="above",
        ),
        dict(
            statement="a clean run at a tenth of the rate stays below 5% mismatched",
            a=[low, L],
            b=["5% mismatched", L],
            expect="below",
        ),
        dict(
            statement="a clean run with N = 256 stays below 10% mismatched",
            a=[large, L],
            b=["10% mismatched", L],
            expect="below",
        ),
        dict(
            statement=(
                "spikes mean mismatches: the highest batches stand out more with 10% than with none"
            ),
            a=["10% mismatched", H],
            b=["0% mismatched", H],
            expect="above",
        ),
        dict(
            statement="where nothing matches, the loss does not fall below guessing (log N)",
            a=["100% mismatched", L],
            b=math.log(64),
            expect="not below",
        ),
        dict(
            statement="batches with high loss hold more planted pairs (10%)",
            a=["10% mismatched", "batch loss with its planted pairs (Spearman)"],
            b=0,
            expect="above",
        ),
        dict(
            statement="a pair's own loss ranks the planted ones (10%, last epoch)",
            a=["10% mismatched", last],
            b=0.5,
            expect="above",
        ),
        dict(
            statement="with nothing planted it ranks nothing: under 0.6",
            a=["0% mismatched", last],
            b=0.6,
            expect="below",
            control=True,
        ),
        dict(
            statement="pairs teach something: above all mismatched",
            a=["0% mismatched", R],
            b=["100% mismatched", R],
            expect="above",
            control=True,
        ),
        dict(
            statement="mismatched pairs teach nothing: less than three times chance",
            a=["100% mismatched", R],
            b=3 / n,
            expect="below",
            control=True,
        ),
    ]
    yield entry(
        cells,
        seeds,
        "C19",
        found,
        tests,
        controls,
        n,
        claim=(
            "A falling contrastive loss means that picture and text get linked; spikes mean"
            " misaligned pairs."
        ),
        measured=(
            f"Training loss and held-out R@1 with 0 to 100% planted mismatches, {EPOCHS[-1]} epochs"
            " at one learning rate; the same loss by other causes; whether loss finds the planted"
            " pairs, by batch and by pair, early and late. The attention maps of the claim are"
            " measured elsewhere."
        ),
        setup=HOW.split(";")[0]
        + "; learning rate 2e-3 in every arm that does not say otherwise, N = 64.",
        limitations=TOY
        + " Planted pairs are random swaps: real ones (a neighbour's report, an old picture) look"
        " more alike and are found less well. AUROC on the training pairs themselves, not on new"
        " ones.",
    )
