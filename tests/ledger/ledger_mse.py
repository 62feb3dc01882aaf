"C4: the squared error between picture and caption: beside the contrastive loss, and alone."

import torch
from contrast import HOW, TOY, chosen, pool_of, scored, train
from run import entry
from world import vectors

from mmkit import losses

IDS = ("C4",)
ARMS = {
    "contrastive": (1, 0, True),
    "contrastive + 0.1 MSE": (1, 0.1, True),
    "contrastive + 0.1 D MSE": (1, 0.1, "D"),
    "MSE alone": (0, 1, True),
    "MSE alone, captions fixed": (0, 1, False),
}


def one(seed, small, lr, contrastive, mse, both, shuffle=False):
    "R@1, and whether the vectors still differ."
    D = vectors(seed, small)["W"].shape[1]
    w = mse * (D if both == "D" else 1)
    first = {}

    def loss(h, x, y, ids, rows):
        a, b = h.see(x), h.read(y)
        terms = dict(
            contrastive=losses.info_nce(a, b, h.temperature, ids),
            mse=losses.embedding_mse(a, b),
        )
        if not first and contrastive and mse:
            first["gradient share of MSE"] = losses.compute_gradient_shares(
                terms, losses.LossWeights(contrastive, 0, w), {"projector": [h.W]}
            )["projector"]["mse"][1]
        first.setdefault("0.1 MSE at the start", 0.1 * float(terms["mse"].detach()))
        return sum(k * t for k, t in ((contrastive, terms["contrastive"]), (w, terms["mse"])) if k)

    captions = (
        torch.randperm(
            len(vectors(seed, small)["train"][0]), generator=torch.Generator().manual_seed(seed)
        )
        if shuffle
        else None
    )
    h, v, _ = train(
        seed,
        small,
        loss,
        lr,
        captions=captions,
        learn=("gain", "W", "T") if both else ("gain", "W"),
    )
    x, y = v["test"][:2]
    a, b = h.see(x).detach(), h.read(y).detach()
    return {
        **scored(h, v),
        **first,
        "MSE": float(losses.embedding_mse(a, b)),
        **{
            f"{k}, {s}": n
            for s, z in (("pictures", a), ("captions", b))
            for k, n in zip(("variance", "effective rank"), losses.embedding_collapse(z))
        },
    }


def untrained(seed, small):
    h, v, _ = train(seed, small, lr=0.0, samples=64)
    x, y = v["test"][:2]
    a, b = h.see(x).detach(), h.read(y).detach()
    return {
        "R@1": scored(h, v)["R@1"],
        "MSE": float(losses.embedding_mse(a, b)),
        **{
            f"{k}, {s}": n
            for s, z in (("pictures", a), ("captions", b))
            for k, n in zip(("variance", "effective rank"), losses.embedding_collapse(z))
        },
    }


def measure(cells, seeds, small=False):
    found = {}
    for s in seeds:
        got = {
            arm: chosen(cells, arm, s, lambda lr, w=w: one(s, small, lr, *w))
            for arm, w in ARMS.items()
        }
        got["contrastive, pairs shuffled"] = chosen(
            cells, "contrastive, pairs shuffled", s, lambda lr: one(s, small, lr, 1, 0, True, True)
        )
        got["untrained"] = cells("untrained", s, lambda: untrained(s, small))
        for arm, g in got.items():
            for m, v in g.items():
                found.setdefault((arm, m), {})[s] = v
    v = vectors(seeds[0], small)
    D, n, R, V = v["W"].shape[1], len(pool_of(v["test"])), "R@1", "variance, pictures"
    tests = [
        dict(
            statement="0.1 MSE adds to the contrastive loss",
            a=["contrastive + 0.1 MSE", R],
            b=["contrastive", R],
            expect="above",
        ),
        dict(
            statement="MSE alone aligns: above untrained",
            a=["MSE alone", R],
            b=["untrained", R],
            expect="above",
        ),
        dict(
            statement="MSE alone, captions fixed, aligns: above untrained",
            a=["MSE alone, captions fixed", R],
            b=["untrained", R],
            expect="above",
        ),
        dict(
            statement="MSE alone does as well as contrast",
            a=["MSE alone", R],
            b=["contrastive", R],
            expect="not below",
        ),
        dict(
            statement="MSE alone keeps the pictures apart as the base did",
            a=["MSE alone", V],
            b=["untrained", V],
            expect="not below",
        ),
        dict(
            statement=f"0.1 MSE stays within 0.1 · 4/D = {0.4 / D:.4f}",
            a=["contrastive + 0.1 MSE", "0.1 MSE at the start"],
            b=0.4 / D,
            expect="below",
            control=True,
        ),
        dict(
            statement="shuffled pairs teach nothing: less than three times chance",
            a=["contrastive, pairs shuffled", R],
            b=3 / n,
            expect="below",
            control=True,
        ),
        dict(
            statement="contrast aligns: above shuffled",
            a=["contrastive", R],
            b=["contrastive, pairs shuffled", R],
            expect="above",
            control=True,
        ),
    ]
    yield entry(
        cells,
        seeds,
        "C4",
        found,
        tests,
        ("untrained", "contrastive, pairs shuffled"),
        n,
        claim="A squared error aligns the embeddings of pictures with those of their texts.",
        measured=(
            "R@1 with and without 0.1 of it beside the contrastive loss, with its 1/D undone, and"
            f" alone; what it weighs in the gradient; whether the vectors collapse (D = {D})."
        ),
        setup=HOW,
        limitations=TOY
        + " Neither normalisation nor reduction is told in the claim; here unit vectors and the"
        " mean over dimensions, so that it is (2 - 2 cos)/D.",
    )
