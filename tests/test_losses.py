"The losses: parity with torch and transformers, exact zeros where zero is right, clear errors."

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmkit.chat.collator import Collator
from mmkit.losses.causal_lm import causal_lm_loss
from mmkit.losses.contrastive import (
    Temperature,
    embedding_collapse,
    embedding_mse,
    info_nce,
    sigmoid_loss,
)
from mmkit.losses.memory_efficient import TiledLogSumExp
from mmkit.losses.weighting import LossWeights, combine_losses, compute_gradient_shares
from mmkit.models.loading import load


def vectors(N, D=16, seed=0, **kw):
    return torch.randn(
        N, D, generator=torch.Generator().manual_seed(seed), dtype=kw.get("dtype")
    ).requires_grad_(kw.get("grad", False))


def clip(a, b, tau):
    "CLIP's loss as its paper writes it."
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / tau
    y = torch.arange(len(logits))
    return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2


# --- contrast
@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0, 10.0])
@pytest.mark.parametrize("N", [2, 7, 64])
def test_info_nce_is_clips_in_value_and_gradient(N, tau):
    a, b = vectors(N, seed=1, grad=True), vectors(N, seed=2, grad=True)
    for ours, theirs in zip(
        *(torch.autograd.grad(f(a, b, tau), (a, b)) + (f(a, b, tau),) for f in (info_nce, clip))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_info_nce_agrees_with_transformers_clip_loss():
    from transformers.models.clip import modeling_clip as theirs

    clip_loss = (
        getattr(theirs, "image_text_contrastive_loss", None) or theirs.clip_loss
    )  # newer and older name
    a, b = vectors(9, seed=1), vectors(9, seed=2)
    torch.testing.assert_close(
        info_nce(a, b, 0.07), clip_loss(F.normalize(b, dim=1) @ F.normalize(a, dim=1).T / 0.07)
    )


def test_info_nce_is_symmetric_and_blind_to_scale():
    a, b = vectors(8, seed=1), vectors(8, seed=2)
    torch.testing.assert_close(info_nce(a, b), info_nce(b, a))
    torch.testing.assert_close(info_nce(5 * a, b / 7), info_nce(a, b))
    assert info_nce(a, b) > 1 and info_nce(a, a, 0.01) < 1e-3


@pytest.mark.parametrize("tau", [1e-4, 0.07, 100.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_one_pair_is_exactly_nothing(tau, scale):
    a, b = vectors(1, seed=1, grad=True), vectors(1, seed=2)
    loss = info_nce(a * scale, b, tau)
    loss.backward()
    assert loss.item() == 0 and a.grad.abs().max().item() == 0


def test_guessing_costs_log_n():
    for N in (2, 10, 500):
        assert math.isclose(
            info_nce(torch.ones(N, 4), torch.ones(N, 4)).item(), math.log(N), rel_tol=1e-5
        )


@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_identical_captions_cost_log_m_unless_they_are_positives(m):
    ids = torch.tensor([0] * m + list(range(m, 8)))
    z = torch.eye(8, 16)[ids]
    assert math.isclose(info_nce(z, z, 0.02).item(), m / 8 * math.log(m), abs_tol=1e-5)
    assert abs(info_nce(z, z, 0.02, ids).item()) < 1e-5


def test_positives_are_torchs_soft_targets_less_their_floor():
    a, b, ids = (
        vectors(10, seed=1, grad=True),
        vectors(10, seed=2),
        torch.tensor([5, 5, 5, 1, 2, 3, 3, -7, 10**15, 9]),
    )
    soft = (ids[:, None] == ids).float()
    soft = soft / soft.sum(1, keepdim=True)
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1
    want = (
        F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, soft)
    ) / 2 - torch.distributions.Categorical(soft).entropy().mean()
    torch.testing.assert_close(info_nce(a, b, 0.1, ids), want)
    torch.testing.assert_close(info_nce(a, b, 0.1, ids.double()), want)  # any numbers will do
    torch.testing.assert_close(
        info_nce(a, b, 0.1, torch.arange(10)), info_nce(a, b, 0.1)
    )  # all different: the plain loss


@settings(max_examples=50, deadline=None)
@given(
    N=st.integers(1, 12),
    kinds=st.integers(1, 4),
    tau=st.sampled_from([1e-4, 0.01, 0.07, 1.0, 100.0]),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_info_nce_is_finite_and_never_below_zero(N, kinds, tau, half, seed):
    a, b = vectors(N, seed=seed), vectors(N, seed=seed + 100)
    if half:
        a, b = a.bfloat16(), b.bfloat16()
    a.requires_grad_()
    ids = torch.arange(N) % kinds
    loss = info_nce(a, b, tau, ids)
    loss.backward()
    assert (
        loss.dtype == torch.float32
        and torch.isfinite(a.grad).all()
        and -1e-5 * (1 + 1 / tau) <= loss.item() < float("inf")
    )


def test_temperature_can_be_learned_quietly(recwarn):
    s = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    info_nce(vectors(5, seed=1, grad=True), vectors(5, seed=2), (-s).exp()).backward()
    assert s.grad.abs() > 0 and not len(recwarn)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: info_nce(vectors(3), vectors(4)), r"\(3, 16\) and \(4, 16\)"),
        (lambda: info_nce(vectors(3)[None], vectors(3)[None]), "Pool the tokens"),
        (lambda: info_nce(vectors(0), vectors(0)), "N ≥ 1"),
        (lambda: info_nce(vectors(3), vectors(3), 0), "temperature = 0"),
        (lambda: info_nce(vectors(3), vectors(3), float("nan")), "temperature = nan"),
        (lambda: info_nce(vectors(3), vectors(3), -2.66), "logit_scale"),
        (
            lambda: info_nce(vectors(3), vectors(3), caption_ids=torch.arange(2)),
            "2 caption_ids for 3 pairs",
        ),
        (lambda: embedding_mse(vectors(3), vectors(3, 8)), r"\(3, 8\)"),
    ],
)
def test_contrastive_losses_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- what the matrix would be, without the matrix
def open_clip(a, b, scale):
    """open_clip's ClipLoss as it defines it: two matrices of logits, two cross-entropies, their
    mean.
    """
    A, B = F.normalize(a, dim=1), F.normalize(b, dim=1)
    y = torch.arange(len(A))
    per_image, per_text = scale * A @ B.T, scale * B @ A.T
    return (F.cross_entropy(per_image, y) + F.cross_entropy(per_text, y)) / 2


@pytest.mark.parametrize(
    "scale", [1.0, 14.29, 39.0, 41.0, 100.0]
)  # both sides of where one shift is enough
@pytest.mark.parametrize("block", [1, 37, 10**6])
def test_blocks_of_info_nce_are_exact_in_loss_and_gradient(scale, block):
    a, b = (
        vectors(300, 64, 1, dtype=torch.float64, grad=True),
        vectors(300, 64, 2, dtype=torch.float64, grad=True),
    )
    s = torch.tensor(1 / scale, dtype=torch.float64, requires_grad=True)
    want = open_clip(a, b, 1 / s)
    gold = torch.autograd.grad(want, (a, b, s))
    f = [x.detach().float().requires_grad_() for x in (a, b, s)]
    got = info_nce(*f, block_size=block)
    grads = torch.autograd.grad(got, f)
    assert abs(got.item() - want.item()) <= 1e-6 * want.item()
    dense = torch.autograd.grad(
        open_clip(f[0], f[1], 1 / f[2]), f
    )  # fp32 itself is no better than this
    for x, d, g in zip(grads, dense, gold):
        assert (x - g).norm() <= max(1e-6 * g.norm(), 2 * (d - g).norm())


def test_info_nce_memory_grows_with_n_and_not_with_its_square():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        info_nce(vectors(2000, 8, 1, grad=True), vectors(2000, 8, 2, grad=True))
    assert max(kept) <= 2000 * 8


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(2, 20),
    K=st.integers(1, 5),
    kinds=st.integers(1, 3),
    alike=st.sampled_from([0.2, 0.5, 0.6, 2 / 3, 0.75, 1.0]),
    block=st.sampled_from([None, 1, 7]),
    seed=st.integers(0, 99),
)
def test_shared_attributes_are_soft_targets(N, K, kinds, alike, block, seed):
    a, b, kin = (
        vectors(N, seed=seed, grad=True),
        vectors(N, seed=seed + 1, grad=True),
        torch.randint(kinds, (N, K), generator=torch.Generator().manual_seed(seed)),
    )
    soft = ((kin[:, None] == kin).float().mean(2) >= alike - 1e-6).float()
    m = soft.sum(1)
    soft = soft / m[:, None]
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1
    want = (F.cross_entropy(logits, soft) + F.cross_entropy(logits.T, soft)) / 2 - m.log().mean()
    got = info_nce(a, b, 0.1, kin, positive_threshold=alike, block_size=block)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for g, w in zip(*(torch.autograd.grad(x, (a, b)) for x in (got, want))):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    if alike == 1:
        torch.testing.assert_close(
            got,
            info_nce(a, b, 0.1, torch.unique(kin, dim=0, return_inverse=True)[1]),
            rtol=1e-5,
            atol=1e-5,
        )


def test_positive_threshold_is_checked():
    a = vectors(4)
    with pytest.raises(ValueError, match="positive_threshold = 0: give the share"):
        info_nce(a, a, caption_ids=torch.zeros(4, 2), positive_threshold=0)
    with pytest.raises(ValueError, match="3 caption_ids for 4 pairs"):
        info_nce(a, a, caption_ids=torch.zeros(3, 2))


def test_learned_temperature_is_clips_and_is_clamped_at_both_ends():
    t = Temperature()
    assert math.isclose(1 / t().item(), 1 / 0.07, rel_tol=1e-5)
    a, b = vectors(8, seed=1), vectors(8, seed=2)
    info_nce(a, b, t()).backward()
    s = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    clip(a, b, (-s).exp()).backward()
    torch.testing.assert_close(t.log_scale.grad, s.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        t.log_scale.fill_(9.0)
    assert math.isclose(1 / t().item(), 100, rel_tol=1e-4)  # held below the cap …
    with torch.no_grad():
        t.log_scale.fill_(-2.0)
    assert t().item() == 1 and t.log_scale.item() == 0  # … and a temperature above 1 is held at 1
    with torch.no_grad():
        t.log_scale.fill_(9.0)
    t.zero_grad()
    info_nce(a, a.roll(1, 0), t()).backward()
    assert t.log_scale.grad > 0  # … and able to come back
    for tau in (0.001, 14.29, 0):
        with pytest.raises(ValueError, match="14.29 is temperature = 0.07"):
            Temperature(tau)


@pytest.mark.parametrize("tau", [0.07, 0.01])
def test_log_sums_of_half_precision_vectors(tau):
    "What a GPU is given: bf16 vectors, products added up in fp32 (here also made in fp32)."
    a, b = (F.normalize(vectors(50, 32, seed=k), dim=1).detach() for k in (1, 2))
    out = []
    for kind in (torch.float32, torch.bfloat16):
        x, y, s = (
            a.detach().to(kind, copy=True).requires_grad_(),
            b.detach().to(kind, copy=True).requires_grad_(),
            torch.tensor(1 / tau, requires_grad=True),
        )
        rows, cols = TiledLogSumExp.apply(x, y, s, 7)
        assert rows.dtype == cols.dtype == torch.float32
        (rows.square().mean() + cols.sum()).backward()
        assert x.grad.dtype == y.grad.dtype == kind
        out.append((rows, cols, x.grad.float(), y.grad.float(), s.grad))
    for full, half in zip(*out):
        assert (full - half).norm() / full.norm() < 0.02


def test_losses_are_exact_under_autocast():
    a, b = vectors(40, 32, seed=1, grad=True), vectors(40, 32, seed=2)
    h, head = vectors(24, 32, seed=3).view(2, 12, 32), vectors(50, 32, seed=4)
    labels = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(5))
    want = [info_nce(a, b), causal_lm_loss(h, labels, lm_head_weight=head)]
    with torch.autocast("cpu", torch.bfloat16):
        got = [info_nce(a, b), causal_lm_loss(h, labels, lm_head_weight=head)]
    for w, g in zip(want, got):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
    got[0].backward()
    assert torch.isfinite(a.grad).all()


def test_hard_negatives_only_add_wrong_captions():
    a, b, w = (
        vectors(6, seed=1),
        vectors(6, seed=2),
        torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(5)),
    )
    A, B, W = (F.normalize(x, dim=-1) for x in (a, b, w))
    logits = A @ B.T / 0.1
    rows = F.cross_entropy(
        torch.cat([logits, torch.einsum("nd,nkd->nk", A, W) / 0.1], 1), torch.arange(6)
    )
    torch.testing.assert_close(
        info_nce(a, b, 0.1, negatives=w), (rows + F.cross_entropy(logits.T, torch.arange(6))) / 2
    )
    assert info_nce(a[:1], b[:1], 0.1, negatives=w[:1]) > 0
    with pytest.raises(ValueError, match=r"give \(N, K, D\) = \(6, K, 16\)"):
        info_nce(a, b, negatives=w[:5])


def test_sigmoid_loss_is_siglips():
    a, b = vectors(9, seed=1, grad=True), vectors(9, seed=2)
    logits = (
        F.normalize(b, dim=1) @ F.normalize(a, dim=1).T * 10 - 10
    )  # as transformers' SiglipModel.forward computes its loss
    eye = torch.eye(9)
    want = -F.logsigmoid((-torch.ones_like(logits) + 2 * eye) * logits).sum(-1).mean()
    torch.testing.assert_close(sigmoid_loss(a, b), want)
    for block in (1, 4):
        torch.testing.assert_close(
            *(
                torch.autograd.grad(x, a, retain_graph=True)[0]
                for x in (sigmoid_loss(a, b, block_size=block), want)
            )
        )
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    torch.testing.assert_close(
        sigmoid_loss(a, b, caption_ids=ids),
        F.binary_cross_entropy_with_logits(logits.T, (ids[:, None] == ids).float(), reduction="sum")
        / 9,
    )
    with pytest.raises(ValueError, match="2 caption_ids for 9 pairs"):
        sigmoid_loss(a, b, caption_ids=ids[:2])


def test_embedding_collapse():
    assert embedding_collapse(torch.ones(7, 5)) == pytest.approx((0, 1), abs=1e-5)
    v, r = embedding_collapse(torch.eye(6))
    assert math.isclose(r, 6, rel_tol=1e-5) and math.isclose(v, 1 - 1 / 6, rel_tol=1e-5)
    assert 1 <= embedding_collapse(vectors(50, 4))[1] <= 4
    p = np.array([3**0.5, 1]) / (3**0.5 + 1)  # three alike and one other
    assert math.isclose(
        embedding_collapse(torch.eye(2)[[0, 0, 0, 1]])[1],
        math.exp(-(p * np.log(p)).sum()),
        rel_tol=1e-5,
    )
    with pytest.raises(ValueError, match="N ≥ 1"):
        embedding_collapse(torch.zeros(0, 3))


def _two(rank, port, out, x):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    a, b, ids, kin = [v.chunk(2)[rank] for v in x]
    got = []
    for use in (None, ids, kin):
        torch.manual_seed(0)
        net = torch.nn.ModuleList([torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)])
        s = torch.nn.Parameter(torch.tensor(0.1))
        net.s = s

        class Loss(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, a, b):
                return info_nce(
                    self.net[0](a), self.net[1](b), self.net.s, use, positive_threshold=0.6
                )

        ddp = DDP(Loss())
        loss = ddp(a, b)
        loss.backward()
        got.append([loss.detach(), *[p.grad.clone() for p in net.parameters()]])
    if rank == 0:
        torch.save(got, out)
    dist.barrier()
    # The last reducer holds the process group. Torn down with the interpreter's lock held, it can
    # wait for gloo's thread while that thread waits for the lock. So nothing is torn down.
    os._exit(0)


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """gloo, under DDP: the loss and every gradient are those of one process that holds the whole
    batch.
    """
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    x = (
        vectors(12, seed=1),
        vectors(12, seed=2),
        torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 6, 7, 4, 8]),
        torch.randint(3, (12, 3), generator=torch.Generator().manual_seed(3)),
    )
    mp.spawn(_two, (port, str(tmp_path / "out.pt"), x), nprocs=2)
    for use, got in zip((None, *x[2:]), torch.load(tmp_path / "out.pt")):
        torch.manual_seed(0)
        net = torch.nn.ModuleList([torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)])
        net.s = torch.nn.Parameter(torch.tensor(0.1))
        loss = info_nce(net[0](x[0]), net[1](x[1]), net.s, use, positive_threshold=0.6)
        loss.backward()
        for theirs, ours in zip(got, [loss.detach(), *[p.grad for p in net.parameters()]]):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


# --- cross-entropy of the answer
def logits_labels(N=4, T=12, V=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N, T), generator=g)
    for k in range(N):
        labels[k, : 5 + k] = -100
        labels[k, T - k :] = -100
    return torch.randn(N, T, V, generator=g), labels


def test_causal_lm_loss_is_the_models_own_loss():

    model, processor = load()
    pics = [
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (96, 96, 3), dtype=np.uint8))
        for k in range(3)
    ]
    batch = Collator(processor)(
        [dict(image=p, caption="A lesion. " * (k + 1)) for k, p in enumerate(pics)]
    )
    with torch.no_grad():
        out = model(**batch)
    torch.testing.assert_close(causal_lm_loss(out.logits, batch["labels"]), out.loss)


def test_causal_lm_loss_value_gradient_and_shift():
    logits, labels = logits_labels()
    logits.requires_grad_()
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    got = causal_lm_loss(logits, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, want)))
    assert causal_lm_loss(logits.detach().bfloat16(), labels).dtype == torch.float32


def test_loss_of_a_batch_in_pieces_adds_up():
    logits, labels = logits_labels()
    count = int((labels[:, 1:] != -100).sum())
    pieces = sum(causal_lm_loss(logits[k : k + 1], labels[k : k + 1], count) for k in range(4))
    torch.testing.assert_close(pieces, causal_lm_loss(logits, labels))


def test_tokens_count_alike_whatever_their_row():
    logits, labels = logits_labels(2, 12)
    labels[0, 6:] = -100  # one token against several
    per = [
        -logits[:, :-1].log_softmax(-1)[r, t, labels[r, t + 1]]
        for r in range(2)
        for t in range(11)
        if labels[r, t + 1] != -100
    ]
    torch.testing.assert_close(causal_lm_loss(logits, labels), torch.stack(per).mean())


def test_only_the_kept_logits_are_needed():
    logits, labels = logits_labels()
    K = 12 - 5 + 1
    torch.testing.assert_close(
        causal_lm_loss(logits[:, -K:], labels), causal_lm_loss(logits, labels)
    )
    with pytest.raises(ValueError, match="keep more logits"):
        causal_lm_loss(logits[:, -K + 1 :], labels)


def test_causal_lm_loss_refuses():
    logits, labels = logits_labels()
    with pytest.raises(ValueError, match="no token is in the loss"):
        causal_lm_loss(logits, torch.full_like(labels, -100))
    for bad in (labels[:2], labels[:, :5], labels[0]):
        with pytest.raises(ValueError, match="one label for each token"):
            causal_lm_loss(logits, bad)


def test_tiled_cross_entropy_has_the_same_loss_and_gradient():
    g = torch.Generator().manual_seed(0)
    h, head = (
        torch.randn(3, 12, 16, generator=g, requires_grad=True),
        torch.randn(50, 16, generator=g, requires_grad=True),
    )
    labels = logits_labels(3, 12, 50)[1]
    want = causal_lm_loss(h @ head.T, labels)
    gold = torch.autograd.grad(want, (h, head))
    for tile in (1, 7, 50, 10**6):
        got = causal_lm_loss(h, labels, lm_head_weight=head, tile_size=tile)
        assert abs(got.item() / want.item() - 1) < 1e-6
        for x, y in zip(torch.autograd.grad(got, (h, head)), gold):
            assert (x - y).norm() <= 2e-6 * y.norm()
    torch.testing.assert_close(
        causal_lm_loss(h[:, -8:], labels, 5, head), causal_lm_loss(h[:, -8:] @ head.T, labels, 5)
    )
    half = causal_lm_loss(h.bfloat16(), labels, lm_head_weight=head.bfloat16())
    half.backward()
    assert (
        half.dtype == torch.float32
        and abs(half.item() / want.item() - 1) < 0.02
        and torch.isfinite(h.grad).all()
    )


def test_gradient_shares_are_what_backward_sends():
    w = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    frozen = torch.tensor([1.0])
    terms = dict(ce=(w[0] ** 2).sum() + w[1].sum(), mse=w[0].sum())
    got = compute_gradient_shares(
        terms, LossWeights(ce=0.5, mse=2.0), dict(vision=[w[0]], text=[w[1], frozen], none=[frozen])
    )
    ce, mse = math.hypot(1, 2), 2 * math.sqrt(2)
    assert got["vision"]["ce"] == pytest.approx((ce, ce / (ce + mse))) and got["vision"][
        "mse"
    ] == pytest.approx((mse, mse / (ce + mse)))
    assert (
        got["text"] == {"ce": (0.5, 1.0), "mse": (0.0, 0.0)}
        and got["none"]["ce"] == (0.0, 0.0)
        and w[0].grad is None
    )


# --- the squared error
@pytest.mark.parametrize("D", [4, 128, 512])
def test_mse_on_unit_vectors_is_a_cosine(D):
    a, b = vectors(20, D, 1), vectors(20, D, 2)
    torch.testing.assert_close(embedding_mse(a, b), (2 - 2 * F.cosine_similarity(a, b).mean()) / D)
    torch.testing.assert_close(embedding_mse(a, -3 * a), torch.tensor(4 / D))
    assert (
        embedding_mse(a, 2 * a).item() < 1e-10
        and embedding_mse(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    )


# --- the sum
def test_combined_loss_is_the_weighted_sum(recwarn):
    x = torch.tensor(2.0, requires_grad=True)
    got = combine_losses(dict(contrastive=x, ce=x**2, mse=x**3), LossWeights(0.4, 0.5, 0.0))
    got.total.backward()
    assert math.isclose(got.total.item(), 0.4 * 2 + 0.5 * 4, rel_tol=1e-6) and math.isclose(
        x.grad.item(), 0.4 + 0.5 * 4, rel_tol=1e-6
    )
    assert (
        got.raw == dict(contrastive=2, ce=4, mse=8)
        and got.weighted == dict(contrastive=0.8, ce=2, mse=0)
        and not len(recwarn)
    )


def test_a_term_of_weight_zero_cannot_spoil_the_sum():
    x = torch.tensor(2.0, requires_grad=True)
    got = combine_losses(dict(ce=x, mse=x * float("nan")), LossWeights())
    got.total.backward()
    assert got.total == 2 and x.grad == 1 and math.isnan(got.raw["mse"])


def test_weights_may_change_between_steps():
    w, x = LossWeights(), torch.tensor(2.0)
    w.ce, w.mse = 0.0, 3.0
    assert combine_losses(dict(mse=x), w).total == 6
    w.mse = -1.0
    with pytest.raises(ValueError, match="mse = -1"):
        combine_losses(dict(mse=x), w)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: LossWeights(ce=-0.1), "ce = -0.1"),
        (lambda: LossWeights(ce=float("nan")), "ce = nan"),
        (lambda: LossWeights(ce=float("inf")), "ce = inf"),
        (lambda: LossWeights(ce=0.0), "nothing would train"),
        (lambda: LossWeights(temperature=0.0), "temperature"),
        (lambda: combine_losses(dict(contrastve=1.0), LossWeights()), "Did you mean 'contrastive'"),
        (
            lambda: combine_losses(dict(mse=1.0), LossWeights()),
            "ce has weight 1.0 but was not computed",
        ),
    ],
)
def test_combine_losses_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
