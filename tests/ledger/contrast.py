"""Contrast in milliseconds: the projector and a linear map of the caption's vector, trained on
what the base saw and read once.
"""

import math

import numpy as np
import torch
from world import vectors

from mmkit import losses
from mmkit.training.callbacks import BudgetCallback
from mmkit.training.dataset import epoch_permutation

POOL = 192  # held-out pairs with captions that all differ: R@1 of guessing is 1/192
RATES = (4e-3, 1.6e-2)  # each arm's learning rate is chosen on validation lesions, seed by seed


class Heads(torch.nn.Module):
    """The shipped projector (norm's gain and matrix), and a new map for captions that starts near
    the identity; a temperature that may learn.
    """

    def __init__(self, v, seed, tau=0.07, learned=False):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        D = v["W"].shape[1]
        self.gain, self.W = (torch.nn.Parameter(v[k].clone()) for k in ("gain", "W"))
        self.T = torch.nn.Parameter(torch.eye(D) + torch.randn(D, D, generator=g) * 0.1 / D**0.5)
        self.bias = torch.nn.Parameter(
            torch.tensor(-10.0), requires_grad=False
        )  # of the sigmoid loss
        self.log_scale = torch.nn.Parameter(torch.tensor(-math.log(tau)), requires_grad=learned)

    def see(self, x):
        return x * self.gain @ self.W  # (N, D)

    def read(self, y):
        return y @ self.T  # (N, D)

    @property
    def temperature(self):
        return 1 / self.log_scale.exp().clamp(max=100)


def pool_of(part, size=POOL):
    "The first `size` records with captions that all differ."
    _, first = np.unique(part[2].numpy(), return_index=True)
    return torch.as_tensor(np.sort(first)[:size])


@torch.no_grad()
def r_at_1(heads, part, size=POOL):
    "How often the picture's own caption is the nearest of the pool."
    at = pool_of(part, size)
    A, B = (
        torch.nn.functional.normalize(z, dim=1)
        for z in (heads.see(part[0][at]), heads.read(part[1][at]))
    )
    return float(((A @ B.T).argmax(1) == torch.arange(len(at))).float().mean())


def train(  # noqa: PLR0913
    seed,
    small=False,
    loss=None,  # loss(heads, x, y, ids, rows): scalar; None: info_nce
    lr=2e-3,
    batch=64,
    samples=25_600,
    tau=0.07,
    learned=False,
    captions=None,
    watch=None,
    learn=("gain", "W", "T"),
    said=None,
):
    """(heads, vectors, losses of every step).

    `captions`: (N,) whose caption each picture gets; or `said`: (x, y, ids) to learn from.
    `watch(step, heads, rows, loss)` sees every step.
    """
    v = vectors(seed, small)
    x, y, ids = said or v["train"][:3]
    samples = samples // 100 if small else samples
    if captions is not None:
        y, ids = y[captions], ids[captions]
    h, said = Heads(v, seed, tau, learned), []
    for n, p in h.named_parameters():
        p.requires_grad_(n in learn or (n == "log_scale" and learned))
    loss = loss or (
        lambda h, x, y, ids, rows: losses.info_nce(h.see(x), h.read(y), h.temperature, ids)
    )
    opt = torch.optim.AdamW(
        [p for p in h.parameters() if p.requires_grad], lr, weight_decay=0.0, fused=True
    )
    steps = max(1, samples // batch)
    clock = BudgetCallback(max_steps=steps)
    clock.start = 0.0
    order, epoch, at = epoch_permutation(len(x), seed), 0, 0
    for step in range(steps):
        if at + batch > len(x):
            epoch += 1
            order = torch.cat([order[at:], epoch_permutation(len(x), seed, epoch)])
            at = 0
        rows = order[at : at + batch]
        at += batch
        for g in opt.param_groups:
            g["lr"] = lr * clock.lr_factor(step)
        one_loss = loss(h, x[rows], y[rows], ids[rows], rows)
        one_loss.backward()
        opt.step()
        opt.zero_grad()
        said.append(float(one_loss.detach()))
        if watch:
            watch(step, h, rows, said[-1])
    return h, v, np.array(said)


def chosen(cells, arm, seed, f, rates=RATES):  # f(lr) -> measures with 'validation R@1'
    "The arm at the rate that validation lesions prefer; `lr` is among what it returns."
    got = {lr: cells(arm, seed, f, lr=lr) for lr in rates}
    best = max(got, key=lambda lr: got[lr]["validation R@1"])
    return {k: m for k, m in got[best].items() if k != "validation R@1"} | {"learning rate": best}


def scored(h, v, size=POOL):
    return {"validation R@1": r_at_1(h, v["validation"], size), "R@1": r_at_1(h, v["test"], size)}


HOW = (
    "Projector (from the base) and a linear map of the captions' vectors (new) on features that"
    " the frozen base computed once: the mean of a picture's normed tokens, the mean of a"
    f" caption's hidden states, read alone. R@1 in a fixed pool of up to {POOL} held-out pairs of"
    " other patients, captions all different; the learning rate of each arm and seed is the better"
    f" of {', '.join(f'{r:g}' for r in RATES)} on validation lesions."
)
TOY = (
    "Linear maps over a frozen toy base, about a thousand lesions that we drew: the order of arms"
    " may carry over, the sizes do not."
)
