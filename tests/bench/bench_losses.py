"""InfoNCE in blocks against open_clip's dense definition, and the answer's cross-entropy without
logits against the model's own loss; each in a fresh process.
"""

import os
import subprocess
import sys

from mmkit.losses.causal_lm import causal_lm_loss
from mmkit.losses.contrastive import info_nce

SEED = int(os.environ.get("MMKIT_SEED", 0))
PARTS = dict(contrast=("dense", "mmkit"), answer=("model", "mmkit"))


def peak():  # bytes: the most this process ever held
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def contrast(how, N, D):
    import torch
    import torch.nn.functional as F

    def dense(a, b, tau):  # open_clip's ClipLoss: two logit matrices, two cross-entropies
        a, b, y = F.normalize(a, dim=1), F.normalize(b, dim=1), torch.arange(len(a))
        return (F.cross_entropy(a @ b.T / tau, y) + F.cross_entropy(b @ a.T / tau, y)) / 2

    g = torch.Generator().manual_seed(SEED)
    a, b = (torch.randn(N, D, generator=g).requires_grad_() for _ in range(2))
    f = info_nce if how == "mmkit" else dense
    return lambda: f(a, b, 0.07)


def answer(how, T, graded, D, V):
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    g = torch.Generator().manual_seed(SEED)
    h, head = (
        torch.randn(1, T, D, generator=g).requires_grad_(),
        torch.randn(V, D, generator=g).mul_(0.02),
    )  # in place: a larger peak before the pass would hide its own
    labels = torch.full((1, T), -100)
    labels[:, T - graded :] = torch.randint(0, V, (1, graded), generator=g)
    if how == "mmkit":
        return lambda: causal_lm_loss(h, labels, lm_head_weight=head)
    return lambda: ForCausalLMLoss(
        h @ head.T, labels, V
    )  # what a transformers model computes from its logits


SIZES = dict(contrast=(16_384, 512), answer=(330, 40, 640, 262_208))
SMALL = dict(contrast=(64, 512), answer=(33, 4, 640, 2048))  # warm-up: threads and libraries


def one(part, how):
    "Seconds of a forward and backward pass, and bytes beyond what was held before it."
    import time

    make = dict(contrast=contrast, answer=answer)[part]
    make(how, *SMALL[part])().backward()
    job = make(how, *SIZES[part])
    held, began = peak(), time.perf_counter()
    job().backward()
    print(time.perf_counter() - began, peak() - held)


if __name__ == "__main__":
    if sys.argv[1:]:
        one(*sys.argv[1:])
        raise SystemExit
    for part, (peer, ours) in PARTS.items():
        got = {how: [] for how in (peer, ours)}
        for _ in range(3):  # in turn, so that a busy moment does not fall on one side alone
            for how in got:
                out = subprocess.run(
                    [sys.executable, __file__, part, how],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                got[how].append([float(v) for v in out.split()])
        (t0, m0), (t1, m1) = ([min(v) for v in zip(*got[how])] for how in (peer, ours))
        wanted = dict(contrast="0.5× and 1/15", answer="0.3× and 1/10")[part]
        print(
            f"  {part:9} {t1 / t0:5.2f}×  of the time ({t1:.2f} s, {peer} {t0:.2f} s),"
            f" 1/{m0 / max(m1, 1):.0f} of the extra memory ({m1 / 2**20:.0f} MiB, {m0 / 2**20:.0f}"
            f" MiB); best of 3, {SIZES[part]}, seed {SEED}; wanted: {wanted}"
        )
