"The training engine: parity with a loop by hand, a cache that cannot lie, and only what was named moves."
import math, os, time
from pathlib import Path
import numpy as np, pytest, torch
from mmkit import chat, losses, models, training
from mmkit.pairs import melanoma_pairs

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A cache folder of our own, for pairs and features."
    old, new = os.environ.get('MMKIT_CACHE'), str(tmp_path_factory.mktemp('cache'))
    os.environ['MMKIT_CACHE'] = new
    yield Path(new)
    os.environ.pop('MMKIT_CACHE') if old is None else os.environ.update(MMKIT_CACHE=old)

@pytest.fixture(scope='module')
def ds(home): return melanoma_pairs(n=24, seed=3, masks=False)

@pytest.fixture
def base(): return models.load('base')

def weights_of(model): return {n: p.detach().clone() for n, p in models.inner(model).named_parameters()}
def moved(model, before): return {n for n, p in models.inner(model).named_parameters() if n in before and not torch.equal(p, before[n])}

def test_trainer_is_the_loop_by_hand(ds, base):
    "Three terms, one seed: a plain loop and `fit` give the same losses to 1e-5, over an epoch's end."
    w, steps, lr = losses.Weights(contrastive=.4, ce=.5, mse=.1), 5, 1e-3
    run = training.fit(*base, ds, steps=steps, lr=lr, weights=w, batch=8, warmup=.3, seed=4, bar=False)
    model, processor = models.load('base')
    collate, clock, hand = chat.Collator(processor, captions=True), training.Clock(steps=steps, warmup=.3), []
    clock.start = 0.
    with models.train_only(model, 'projector'):
        params = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.)
        for step in range(steps):
            order = training.shuffled(len(ds), 4, step//3)[step % 3*8:step % 3*8 + 8]
            b = collate([ds[int(i)] for i in order])
            z, read = models.embed_image(model, b['pixel_values']), models.embed_text(model, b['text_ids'], b['text_mask'])
            ce = model(**{k: b[k] for k in ('input_ids', 'attention_mask', 'token_type_ids', 'pixel_values', 'labels')}).loss
            loss = .5*ce + .4*losses.info_nce(z, read, .07, b['caption_id']) + .1*losses.embedding_mse(z, read)
            opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(params, 1.)
            opt.param_groups[0]['lr'] = lr*clock.factor(step); opt.step(); hand.append(loss.item())
    assert np.abs(np.array(hand) - run.history['loss']).max() < 1e-5
    assert set(run.history) == {'step', 'seconds', 'lr', 'loss', 'ce', 'contrastive', 'mse'}

def test_cached_is_uncached_and_the_tower_rests(ds, base):
    "With the cache the losses are the same, and a second run never calls the tower."
    model, processor = base
    plain = training.fit(model, processor, ds, steps=3, batch=8, cache=False, bar=False)
    model, processor = models.load('base')
    cached = training.fit(model, processor, ds, steps=3, batch=8, bar=False)
    assert np.abs(plain.history['loss'] - cached.history['loss']).max() < 1e-5
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    training.fit(model, processor, ds, steps=2, batch=8, bar=False)
    assert not calls
    training.fit(model, processor, ds, train=('vision',), steps=1, batch=8, bar=False); hook.remove()
    assert calls, 'a tower that learns must not be cached'

def test_stale_features_are_never_read(ds, base, tmp_path):
    "Weights, images, their order, or the processor: change one, and the features are computed anew, and rightly."
    model, processor = base
    keys = [training.features_key(model, processor, d) for d in (ds, ds.select(range(23)), ds.select([1, 0, *range(2, 24)]))]
    assert training.features_key(model, processor, ds.remove_columns('caption')) == keys[0], 'captions are not seen by the tower'
    old = training.cache_features(model, processor, ds, tmp_path).features.clone()
    processor.image_processor.image_mean = [.4]*3
    keys.append(training.features_key(model, processor, ds))
    assert not torch.equal(training.cache_features(model, processor, ds, tmp_path).features, old)
    processor.image_processor.image_mean = [.5]*3
    with torch.no_grad(): model.model.vision_tower.get_parameter(next(n for n, _ in model.model.vision_tower.named_parameters())).mul_(1.5)
    keys.append(training.features_key(model, processor, ds))
    fresh = training.cache_features(model, processor, ds, tmp_path)
    with torch.no_grad():
        seen = model.model.vision_tower(pixel_values=chat.pixels(processor, [ds[i]['image'] for i in range(24)])).last_hidden_state
    assert len(set(keys)) == 5 and torch.allclose(fresh.features, models.pool(model, seen), atol=1e-5)
    records = [ds[i] for i in range(3)]
    assert torch.allclose(training.cache_features(model, processor, records, tmp_path).features, fresh[:3], atol=1e-5)

@pytest.mark.parametrize('harm', ['half', 'empty', 'renamed', 'noise'])
def test_damaged_files_are_never_read(ds, base, tmp_path, harm):
    "A file that broke off, is empty, is another's, or is no cache at all counts as none."
    few = ds.select(range(4))
    cache = training.cache_features(*base, few, tmp_path)
    good, content = cache.features.clone(), cache.path.read_bytes()
    if harm == 'renamed': content = training.cache_features(*base, ds.select(range(4, 8)), tmp_path).path.read_bytes()
    cache.path.unlink()
    cache.path.write_bytes({'half': content[:len(content)//2], 'empty': b'', 'renamed': content, 'noise': b'\x00'*999}[harm])
    assert torch.equal(training.cache_features(*base, few, tmp_path).features, good)
    assert not list(tmp_path.glob('*.part'))

def test_an_interrupted_write_leaves_nothing(ds, base, tmp_path, monkeypatch):
    "What fails while writing leaves neither a file under the key nor a part of one."
    def fail(*a, **k): Path(a[1]).write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(training, 'save_file', fail)
    with pytest.raises(OSError): training.cache_features(*base, ds.select(range(2)), tmp_path)
    assert not list(tmp_path.iterdir())

def test_only_named_parts_move(ds, base):
    "The projector alone; then LoRA on the text side beside it; what was frozen is bit-identical and flags come back."
    model, processor = base
    flags, before = [p.requires_grad for p in model.parameters()], weights_of(model)
    training.fit(model, processor, ds, steps=2, batch=8, bar=False)
    assert moved(model, before) and all('multi_modal_projector' in n for n in moved(model, before))
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    before = weights_of(model)
    run = training.fit(model, processor, ds, train=(), lora=dict(rank=4), steps=2, batch=8, bar=False)
    assert hasattr(run.model, 'peft_config')
    after = {n for n, p in run.model.named_parameters() if 'lora_B' in n and p.abs().sum() > 0}
    assert after and all('language_model' in n for n in after)
    assert not [n for n, p in run.model.named_parameters() if 'lora_' in n and 'vision' in n]
    old = {n: p for n, p in models.inner(run.model).named_parameters() if 'lora_' not in n}
    assert all(torch.equal(p, before[n.replace('.base_layer', '')]) for n, p in old.items())
    again = training.fit(run.model, processor, ds, train=('text', 'projector'), steps=1, batch=8, bar=False)
    assert again.model is run.model

def test_a_rate_for_each_part(ds, base):
    "The optimiser gets the rate of each part."
    seen = {}
    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **kw): seen.update({g['name']: g['lr'] for g in groups}); super().__init__(groups, **kw)
    real, torch.optim.AdamW = torch.optim.AdamW, Spy
    try: training.fit(*base, ds, train=('projector', 'text'), lr=dict(text=3e-4), steps=1, batch=8, bar=False)
    finally: torch.optim.AdamW = real
    assert seen == dict(projector=training.RATES['projector'], text=3e-4)

def test_terms_without_weight_cost_nothing(ds, base, monkeypatch):
    "No text-only pass when nothing contrasts, and no logits when nothing is answered."
    model, processor = base
    b = chat.Collator(processor, captions=True)([ds[i] for i in range(4)])
    monkeypatch.setattr(models, 'embed_text', lambda *a: pytest.fail('a text-only pass that nobody asked for'))
    assert set(training.terms(model, b, losses.Weights(ce=1))) == {'ce'}
    monkeypatch.undo()
    monkeypatch.setattr(type(model), 'forward', lambda *a, **k: pytest.fail('logits that nobody asked for'))
    assert set(training.terms(model, b, losses.Weights(ce=0, contrastive=1, mse=1))) == {'contrastive', 'mse'}

def test_budgets(ds, base, tmp_path, monkeypatch, capfd):
    "Seconds, steps and epochs end a run; the rate rises and ends near 0; nothing is left on disk or said aloud."
    model, processor = base
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    run = training.fit(model, processor, ds, seconds=2, batch=4, bar=False)
    assert 2 <= run.seconds < 6 and run.steps == len(run.history['loss']) == len(run.history['lr'])
    assert np.argmax(run.history['lr']) < run.steps/2 and run.history['lr'][-1] < .2*run.history['lr'].max()
    assert training.fit(model, processor, ds, epochs=.5, batch=8, bar=False).steps == 2
    run = training.fit(model, processor, ds, steps=2, batch=4, bar=False, gradient_accumulation_steps=2)
    assert run.steps == 2 and run.rows == 16
    assert training.fit(model, processor, ds.select(range(3)), steps=1, bar=False).rows == 3
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ('', '')
    for bad, say in ((dict(seconds=1, steps=2), 'one of'), (dict(steps=0), 'more than 0'), (dict(train=(), steps=1), 'nothing would learn'),
                     (dict(train='projectr', steps=1), 'projector')):
        with pytest.raises(ValueError, match=say): training.fit(model, processor, ds, bar=False, **bad)
    with pytest.raises(ValueError, match='0 records'): training.fit(model, processor, ds.select([]), steps=1)

def test_same_seed_same_run(ds):
    "Steps, not seconds, make a run repeatable: the same seed gives the same losses, another seed others."
    def run(seed): return training.fit(*models.load('base'), ds, lora=4, steps=3, batch=8, seed=seed, bar=False).history['loss']
    a, b, c = run(0), run(0), run(1)
    assert (a == b).all() and (a != c).any()

def test_lora_errors(base):
    "A layer that is not there is named with its nearest; a second LoRA is refused."
    with pytest.raises(ValueError, match="did you mean 'q_proj'"): training.lora(base[0], targets=('q_prj',))
    model = training.lora(base[0], 2)
    with pytest.raises(ValueError, match='carries LoRA already'): training.lora(model, 2)

def test_clock():
    "Linear up, cosine down, whatever counts."
    clock = training.Clock(steps=10, warmup=.2); clock.start = 0.
    assert clock.factor(0) == pytest.approx(.5) and clock.factor(10) == 0
    assert clock.factor(5) == pytest.approx((1 + math.cos(math.pi*.5))/2)
    clock = training.Clock(seconds=100.); assert clock.factor(0) > 0
    clock.start = time.perf_counter() - 50; assert clock.factor(0) == pytest.approx(.5, abs=.01)

def test_pieces_of_a_batch_train_as_the_batch(ds):
    "Gradient accumulation: two pieces of four are one batch of eight, in loss and in weights, however long the answers are."
    one, two = models.load('base'), models.load('base')
    a = training.fit(*one, ds, steps=3, batch=8, lr=1e-3, seed=2, bar=False)
    b = training.fit(*two, ds, steps=3, batch=4, lr=1e-3, seed=2, bar=False, gradient_accumulation_steps=2)
    assert np.abs(a.history['loss'] - b.history['loss']).max() < 1e-5
    name = 'model.multi_modal_projector.mm_input_projection_weight'
    p, q = (dict(m.named_parameters())[name] for m, _ in (one, two)); torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)

TWO = """
import sys, torch
from mmkit import losses, models, training
from mmkit.pairs import melanoma_pairs
torch.set_num_threads(1)
out, batch, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
ds = melanoma_pairs(n=24, seed=3, masks=False)
model, processor = models.load('base')
kw = dict(lora=4, train=('projector', 'text')) if how == 'lora' else {}
run = training.fit(model, processor, ds, steps=3, batch=batch, lr=1e-3, seed=2, bar=False, weights=losses.Weights(contrastive=.3, ce=.6, mse=.1), **kw)
import os
if os.environ.get('RANK', '0') == '0':
    torch.save(({k: v.tolist() for k, v in run.history.items()}, {n: p.detach() for n, p in models.inner(run.model).named_parameters() if p.requires_grad or 'projector' in n or 'lora' in n}), out)
"""

@pytest.mark.parametrize('how', ['projector', 'lora'])
def test_two_processes_train_as_one(home, ds, tmp_path, how):
    "torchrun with gloo: two processes with batches of four give the losses and the weights of one with a batch of eight."
    import subprocess, sys
    script = tmp_path/'two.py'; script.write_text(TWO)
    env = {**os.environ, 'MMKIT_DEVICE': 'cpu', 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, script, tmp_path/'one.pt', '8', how], check=True, env=env, capture_output=True, timeout=300)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(29000 + os.getpid() % 900), script, tmp_path/'two.pt', '4', how],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (h1, w1), (h2, w2) = torch.load(tmp_path/'one.pt'), torch.load(tmp_path/'two.pt')
    assert np.abs(np.array(h1['contrastive']) - h2['contrastive']).max() < 1e-4      # the joined batch, in every process
    assert set(w1) == set(w2)
    for n in w1: torch.testing.assert_close(w1[n], w2[n], rtol=1e-3, atol=2e-5, msg=n)

def test_kill_nine_and_go_on_is_bit_identical(home, tmp_path):
    "Killed at a random moment and called again, a run ends with the weights and losses of one that was never stopped."
    import random, kill_nine
    kill_nine.finish(kill_nine.call(tmp_path, '-', 'whole.pt'))
    dice = random.Random(1)
    assert all(kill_nine.one_round(tmp_path, dice) for _ in range(2))

def test_half_checkpoints_and_other_runs(ds, base, tmp_path):
    "A checkpoint without its last file is thrown away; another run's is refused and left alone."
    run = training.fit(*base, ds, steps=4, batch=4, seed=1, bar=False, out=tmp_path, every=2)
    (tmp_path/'checkpoint-4'/'run.json').unlink(); (tmp_path/'checkpoint-9').mkdir()
    again = training.fit(*models.load('base'), ds, steps=4, batch=4, seed=1, bar=False, out=tmp_path, every=2)
    assert (run.history['loss'] == again.history['loss']).all() and not (tmp_path/'checkpoint-9').exists()
    with pytest.raises(ValueError, match='another run .*seed 1, here 2'): training.fit(*models.load('base'), ds, steps=4, batch=4, seed=2, bar=False, out=tmp_path)
    assert (tmp_path/'checkpoint-4'/'run.json').exists()
