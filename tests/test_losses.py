"The three pulls: parity with torch and transformers, exact zeros where zero is right, clear errors elsewhere."
import math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from mmkit.losses import Weights, answer_ce, embedding_mse, info_nce, weighted_sum

def vectors(N, D=16, seed=0, **kw): return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=kw.get('dtype')).requires_grad_(kw.get('grad', False))
def clip(a, b, tau):
    "CLIP's loss as its paper writes it."
    l = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / tau; y = torch.arange(len(l))
    return (F.cross_entropy(l, y) + F.cross_entropy(l.T, y)) / 2

# --- contrast
@pytest.mark.parametrize('tau', [.01, .07, 1., 10.])
@pytest.mark.parametrize('N', [2, 7, 64])
def test_info_nce_is_clips_in_value_and_gradient(N, tau):
    a, b = vectors(N, seed=1, grad=True), vectors(N, seed=2, grad=True)
    for ours, theirs in zip(*(torch.autograd.grad(f(a, b, tau), (a, b)) + (f(a, b, tau),) for f in (info_nce, clip))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

def test_info_nce_agrees_with_transformers_clip_loss():
    from transformers.models.clip import modeling_clip as theirs
    clip_loss = getattr(theirs, 'image_text_contrastive_loss', None) or theirs.clip_loss     # newer and older name
    a, b = vectors(9, seed=1), vectors(9, seed=2)
    torch.testing.assert_close(info_nce(a, b, .07), clip_loss(F.normalize(b, dim=1) @ F.normalize(a, dim=1).T / .07))

def test_info_nce_is_symmetric_and_blind_to_scale():
    a, b = vectors(8, seed=1), vectors(8, seed=2)
    torch.testing.assert_close(info_nce(a, b), info_nce(b, a)); torch.testing.assert_close(info_nce(5*a, b/7), info_nce(a, b))
    assert info_nce(a, b) > 1 and info_nce(a, a, .01) < 1e-3

@pytest.mark.parametrize('tau', [1e-4, .07, 100.])
@pytest.mark.parametrize('scale', [1e-6, 1., 1e6])
def test_one_pair_is_exactly_nothing(tau, scale):
    a, b = vectors(1, seed=1, grad=True), vectors(1, seed=2)
    loss = info_nce(a * scale, b, tau); loss.backward()
    assert loss.item() == 0 and a.grad.abs().max().item() == 0

def test_guessing_costs_log_n():
    for N in (2, 10, 500): assert math.isclose(info_nce(torch.ones(N, 4), torch.ones(N, 4)).item(), math.log(N), rel_tol=1e-5)

@pytest.mark.parametrize('m', [1, 2, 5, 8])
def test_identical_captions_cost_log_m_unless_they_are_positives(m):
    ids = torch.tensor([0]*m + list(range(m, 8))); z = torch.eye(8, 16)[ids]
    assert math.isclose(info_nce(z, z, .02).item(), m/8 * math.log(m), abs_tol=1e-5)
    assert abs(info_nce(z, z, .02, ids).item()) < 1e-5

def test_positives_are_torchs_soft_targets_less_their_floor():
    a, b, ids = vectors(10, seed=1, grad=True), vectors(10, seed=2), torch.tensor([5, 5, 5, 1, 2, 3, 3, -7, 10**15, 9])
    soft = (ids[:, None] == ids).float(); soft = soft / soft.sum(1, keepdim=True)
    l = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / .1
    want = (F.cross_entropy(l, soft) + F.cross_entropy(l.T, soft)) / 2 - torch.distributions.Categorical(soft).entropy().mean()
    torch.testing.assert_close(info_nce(a, b, .1, ids), want)
    torch.testing.assert_close(info_nce(a, b, .1, ids.double()), want)                     # any numbers will do
    torch.testing.assert_close(info_nce(a, b, .1, torch.arange(10)), info_nce(a, b, .1))   # all different: the plain loss

@settings(max_examples=50, deadline=None)
@given(N=st.integers(1, 12), kinds=st.integers(1, 4), tau=st.sampled_from([1e-4, .01, .07, 1., 100.]), half=st.booleans(), seed=st.integers(0, 99))
def test_info_nce_is_finite_and_never_below_zero(N, kinds, tau, half, seed):
    a, b = vectors(N, seed=seed), vectors(N, seed=seed + 100)
    if half: a, b = a.bfloat16(), b.bfloat16()
    a.requires_grad_(); ids = torch.arange(N) % kinds
    loss = info_nce(a, b, tau, ids); loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(a.grad).all() and -1e-5 * (1 + 1/tau) <= loss.item() < float('inf')

def test_temperature_can_be_learned_quietly(recwarn):
    s = torch.tensor(math.log(1/.07), requires_grad=True)
    info_nce(vectors(5, seed=1, grad=True), vectors(5, seed=2), (-s).exp()).backward()
    assert s.grad.abs() > 0 and not len(recwarn)

@pytest.mark.parametrize('call, words', [
    (lambda: info_nce(vectors(3), vectors(4)), r'\(3, 16\) and \(4, 16\)'), (lambda: info_nce(vectors(3)[None], vectors(3)[None]), 'Pool the tokens'),
    (lambda: info_nce(vectors(0), vectors(0)), 'N ≥ 1'), (lambda: info_nce(vectors(3), vectors(3), 0), 'tau = 0'),
    (lambda: info_nce(vectors(3), vectors(3), float('nan')), 'tau = nan'), (lambda: info_nce(vectors(3), vectors(3), -2.66), 'logit_scale'),
    (lambda: info_nce(vectors(3), vectors(3), ids=torch.arange(2)), '2 ids for 3 pairs'), (lambda: embedding_mse(vectors(3), vectors(3, 8)), r'\(3, 8\)')])
def test_contrast_refuses(call, words):
    with pytest.raises(ValueError, match=words): call()

# --- the answer
def logits_labels(N=4, T=12, V=30, seed=0):
    g = torch.Generator().manual_seed(seed); labels = torch.randint(0, V, (N, T), generator=g)
    for k in range(N): labels[k, :5 + k] = -100; labels[k, T - k:] = -100
    return torch.randn(N, T, V, generator=g), labels

def test_answer_ce_is_the_models_own_loss():
    from mmkit.chat import Collator
    from mmkit.models import load
    model, processor = load()
    pics = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (96, 96, 3), dtype=np.uint8)) for k in range(3)]
    batch = Collator(processor)([dict(image=p, caption='A lesion. ' * (k + 1)) for k, p in enumerate(pics)])
    with torch.no_grad(): out = model(**batch)
    torch.testing.assert_close(answer_ce(out.logits, batch['labels']), out.loss)

def test_answer_ce_value_gradient_and_shift():
    logits, labels = logits_labels(); logits.requires_grad_()
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    got = answer_ce(logits, labels); torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (got, want)))
    assert answer_ce(logits.detach().bfloat16(), labels).dtype == torch.float32

def test_pieces_of_a_batch_add_up():
    logits, labels = logits_labels(); count = int((labels[:, 1:] != -100).sum())
    pieces = sum(answer_ce(logits[k:k+1], labels[k:k+1], count) for k in range(4))
    torch.testing.assert_close(pieces, answer_ce(logits, labels))

def test_tokens_count_alike_whatever_their_row():
    logits, labels = logits_labels(2, 12); labels[0, 6:] = -100                          # one token against several
    per = [-logits[:, :-1].log_softmax(-1)[r, t, labels[r, t+1]] for r in range(2) for t in range(11) if labels[r, t+1] != -100]
    torch.testing.assert_close(answer_ce(logits, labels), torch.stack(per).mean())

def test_only_the_kept_logits_are_needed():
    logits, labels = logits_labels(); K = 12 - 5 + 1
    torch.testing.assert_close(answer_ce(logits[:, -K:], labels), answer_ce(logits, labels))
    with pytest.raises(ValueError, match='keep more logits'): answer_ce(logits[:, -K+1:], labels)

def test_answer_ce_refuses():
    logits, labels = logits_labels()
    with pytest.raises(ValueError, match='no token carries loss'): answer_ce(logits, torch.full_like(labels, -100))
    for bad in (labels[:2], labels[:, :5], labels[0]):
        with pytest.raises(ValueError, match='one label for each token'): answer_ce(logits, bad)

# --- the squared error
@pytest.mark.parametrize('D', [4, 128, 512])
def test_mse_on_unit_vectors_is_a_cosine(D):
    a, b = vectors(20, D, 1), vectors(20, D, 2)
    torch.testing.assert_close(embedding_mse(a, b), (2 - 2*F.cosine_similarity(a, b).mean()) / D)
    torch.testing.assert_close(embedding_mse(a, -3*a), torch.tensor(4/D))
    assert embedding_mse(a, 2*a).item() < 1e-10 and embedding_mse(a.bfloat16(), b.bfloat16()).dtype == torch.float32

# --- the sum
def test_sum_is_what_it_says(recwarn):
    x = torch.tensor(2., requires_grad=True)
    got = weighted_sum(dict(contrastive=x, ce=x**2, mse=x**3), Weights(.4, .5, 0.)); got.total.backward()
    assert math.isclose(got.total.item(), .4*2 + .5*4, rel_tol=1e-6) and math.isclose(x.grad.item(), .4 + .5*4, rel_tol=1e-6)
    assert got.raw == dict(contrastive=2, ce=4, mse=8) and got.weighted == dict(contrastive=.8, ce=2, mse=0) and not len(recwarn)

def test_a_watched_term_cannot_spoil_the_sum():
    x = torch.tensor(2., requires_grad=True)
    got = weighted_sum(dict(ce=x, mse=x * float('nan')), Weights()); got.total.backward()
    assert got.total == 2 and x.grad == 1 and math.isnan(got.raw['mse'])

def test_weights_may_change_between_steps():
    w, x = Weights(), torch.tensor(2.)
    w.ce, w.mse = 0., 3.; assert weighted_sum(dict(mse=x), w).total == 6
    w.mse = -1.
    with pytest.raises(ValueError, match='mse = -1'): weighted_sum(dict(mse=x), w)

@pytest.mark.parametrize('call, words', [
    (lambda: Weights(ce=-.1), 'ce = -0.1'), (lambda: Weights(ce=float('nan')), 'ce = nan'), (lambda: Weights(ce=float('inf')), 'ce = inf'),
    (lambda: Weights(ce=0.), 'nothing would train'), (lambda: Weights(temperature=0.), 'temperature'),
    (lambda: weighted_sum(dict(contrastve=1.), Weights()), "Did you mean 'contrastive'"), (lambda: weighted_sum(dict(mse=1.), Weights()), 'ce has weight 1.0 but was not computed')])
def test_the_sum_refuses(call, words):
    with pytest.raises(ValueError, match=words): call()
