"""The training engine: parity with a loop by hand, a cache that cannot lie, and only what was
named moves.
"""

import contextlib
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mmkit import chat, losses, models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.models.parts import part_of
from mmkit.training.cache import captions_key, evict_features, features_key
from mmkit.training.callbacks import BudgetCallback, LossSpikeCallback, misranked_pairs
from mmkit.training.dataset import epoch_permutation
from mmkit.training.fast_gemma3 import AnswerOnlyDecoderLayer, FastRMSNorm, build_attention_masks
from mmkit.training.options import DEFAULT_LEARNING_RATES
from mmkit.training.steps import embed_image_tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cache folder of our own, for pairs and features."
    old, new = os.environ.get("MMKIT_CACHE"), str(tmp_path_factory.mktemp("cache"))
    os.environ["MMKIT_CACHE"] = new
    yield Path(new)
    os.environ.pop("MMKIT_CACHE") if old is None else os.environ.update(MMKIT_CACHE=old)


@pytest.fixture(scope="module")
def ds(home):
    return load_melanoma_pairs(n=24, seed=3, masks=False)


@pytest.fixture
def base():
    return models.load("base")


def weights_of(model):
    return {n: p.detach().clone() for n, p in models.unwrap_model(model).named_parameters()}


def moved(model, before):
    return {
        n
        for n, p in models.unwrap_model(model).named_parameters()
        if n in before and not torch.equal(p, before[n])
    }


def test_trainer_is_the_loop_by_hand(ds, base):
    """Three terms, one seed: a plain loop and `fit` give the same losses to 1e-5, over an epoch's
    end.
    """
    w, steps, lr = losses.LossWeights(contrastive=0.4, ce=0.5, mse=0.1), 5, 1e-3
    run = training.fit(
        *base,
        ds,
        max_steps=steps,
        learning_rate=lr,
        loss_weights=w,
        batch_size=8,
        warmup_ratio=0.3,
        seed=4,
        show_progress=False,
    )
    model, processor = models.load("base")
    collate, clock, hand = (
        chat.Collator(processor, include_captions=True),
        BudgetCallback(max_steps=steps, warmup_ratio=0.3),
        [],
    )
    clock.start = 0.0
    with models.freeze_all_but(model, "projector"):
        params = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        for step in range(steps):
            order = epoch_permutation(len(ds), 4, step // 3)[step % 3 * 8 : step % 3 * 8 + 8]
            b = collate([ds[int(i)] for i in order])
            z, read = (
                models.embed_images(model, b["pixel_values"]),
                models.embed_texts(model, b["caption_input_ids"], b["caption_attention_mask"]),
            )
            ce = model(
                **{
                    k: b[k]
                    for k in (
                        "input_ids",
                        "attention_mask",
                        "token_type_ids",
                        "pixel_values",
                        "labels",
                    )
                }
            ).loss
            loss = (
                0.5 * ce
                + 0.4 * losses.info_nce(z, read, 0.07, b["caption_id"])
                + 0.1 * losses.embedding_mse(z, read)
            )
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.param_groups[0]["lr"] = lr * clock.lr_factor(step)
            opt.step()
            hand.append(loss.item())
    apart = np.abs(np.array(hand) - run.history["loss"])
    assert apart.max() < 1e-5, apart
    assert set(run.history) == {"step", "seconds", "lr", "loss", "ce", "contrastive", "mse"}


def test_cached_is_uncached_and_the_tower_rests(ds, base):
    "With the cache the losses are the same, and a second run never calls the tower."
    model, processor = base
    plain = training.fit(
        model,
        processor,
        ds,
        max_steps=3,
        batch_size=8,
        use_feature_cache=False,
        show_progress=False,
    )
    model, processor = models.load("base")
    cached = training.fit(model, processor, ds, max_steps=3, batch_size=8, show_progress=False)
    assert np.abs(plain.history["loss"] - cached.history["loss"]).max() < 1e-5
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    training.fit(model, processor, ds, max_steps=2, batch_size=8, show_progress=False)
    assert not calls
    training.fit(
        model, processor, ds, train=("vision",), max_steps=1, batch_size=8, show_progress=False
    )
    hook.remove()
    assert calls, "a tower that learns must not be cached"


def test_stale_features_are_never_read(ds, base, tmp_path):
    """Weights, images, their order, or the processor: change one, and the features are computed
    anew, and rightly.
    """
    model, processor = base
    keys = [
        features_key(model, processor, d)
        for d in (ds, ds.select(range(23)), ds.select([1, 0, *range(2, 24)]))
    ]
    assert features_key(model, processor, ds.remove_columns("caption")) == keys[0], (
        "captions are not seen by the tower"
    )
    old = training.cache_features(model, processor, ds, tmp_path).features.clone()
    processor.image_processor.image_mean = [0.4] * 3
    keys.append(features_key(model, processor, ds))
    assert not torch.equal(training.cache_features(model, processor, ds, tmp_path).features, old)
    processor.image_processor.image_mean = [0.5] * 3
    with torch.no_grad():
        model.model.vision_tower.get_parameter(
            next(n for n, _ in model.model.vision_tower.named_parameters())
        ).mul_(1.5)
    keys.append(features_key(model, processor, ds))
    fresh = training.cache_features(model, processor, ds, tmp_path)
    with torch.no_grad():
        seen = model.model.vision_tower(
            pixel_values=chat.images_to_pixel_values(processor, [ds[i]["image"] for i in range(24)])
        ).last_hidden_state
    assert len(set(keys)) == 5 and torch.allclose(
        fresh.features, models.pool_patches(model, seen), atol=1e-5
    )
    records = [ds[i] for i in range(3)]
    assert torch.allclose(
        training.cache_features(model, processor, records, tmp_path).features, fresh[:3], atol=1e-5
    )


@pytest.mark.parametrize("harm", ["half", "empty", "renamed", "noise"])
def test_damaged_files_are_never_read(ds, base, tmp_path, harm):
    "A file that broke off, is empty, is another's, or is no cache at all counts as none."
    few = ds.select(range(4))
    cache = training.cache_features(*base, few, tmp_path)
    good, content = cache.features.clone(), cache.path.read_bytes()
    if harm == "renamed":
        content = training.cache_features(*base, ds.select(range(4, 8)), tmp_path).path.read_bytes()
    cache.path.unlink()
    cache.path.write_bytes(
        {
            "half": content[: len(content) // 2],
            "empty": b"",
            "renamed": content,
            "noise": b"\x00" * 999,
        }[harm]
    )
    assert torch.equal(training.cache_features(*base, few, tmp_path).features, good)
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_write_leaves_nothing(ds, base, tmp_path, monkeypatch):
    "What fails while writing leaves neither a file under the key nor a part of one."

    def fail(*a, **k):
        Path(a[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mmkit.training.cache.save_file", fail)
    with pytest.raises(OSError):
        training.cache_features(*base, ds.select(range(2)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_named_parts_move(ds, base):
    """The projector alone; then LoRA on the text side beside it; what was frozen is bit-identical
    and flags come back.
    """
    model, processor = base
    flags, before = [p.requires_grad for p in model.parameters()], weights_of(model)
    training.fit(model, processor, ds, max_steps=2, batch_size=8, show_progress=False)
    assert moved(model, before) and all("multi_modal_projector" in n for n in moved(model, before))
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    before = weights_of(model)
    run = training.fit(
        model,
        processor,
        ds,
        train=(),
        lora=dict(rank=4),
        max_steps=2,
        batch_size=8,
        show_progress=False,
    )
    assert hasattr(run.model, "peft_config")
    after = {n for n, p in run.model.named_parameters() if "lora_B" in n and p.abs().sum() > 0}
    assert after and all("language_model" in n for n in after)
    assert not [n for n, p in run.model.named_parameters() if "lora_" in n and "vision" in n]
    old = {n: p for n, p in models.unwrap_model(run.model).named_parameters() if "lora_" not in n}
    assert all(torch.equal(p, before[n.replace(".base_layer", "")]) for n, p in old.items())
    again = training.fit(
        run.model,
        processor,
        ds,
        train=("text", "projector"),
        max_steps=1,
        batch_size=8,
        show_progress=False,
    )
    assert again.model is run.model


def test_a_rate_for_each_part(ds, base):
    "The optimiser gets the rate of each part."
    seen = {}

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **kw):
            seen.update({g["name"]: g["lr"] for g in groups})
            super().__init__(groups, **kw)

    real, torch.optim.AdamW = torch.optim.AdamW, Spy
    try:
        training.fit(
            *base,
            ds,
            train=("projector", "text"),
            learning_rate=dict(text=3e-4),
            max_steps=1,
            batch_size=8,
            show_progress=False,
        )
    finally:
        torch.optim.AdamW = real
    assert seen == dict(projector=DEFAULT_LEARNING_RATES["projector"], text=3e-4)


def test_terms_without_weight_cost_nothing(ds, base, monkeypatch):
    "No text-only pass when nothing contrasts, and no logits when nothing is answered."
    model, processor = base
    b = chat.Collator(processor, include_captions=True)([ds[i] for i in range(4)])
    monkeypatch.setattr(
        "mmkit.training.steps.embed_texts",
        lambda *a: pytest.fail("a text-only pass that nobody asked for"),
    )
    assert set(training.compute_losses(model, b, losses.LossWeights(ce=1))) == {"ce"}
    monkeypatch.undo()
    monkeypatch.setattr(
        type(model), "forward", lambda *a, **k: pytest.fail("logits that nobody asked for")
    )
    assert set(
        training.compute_losses(model, b, losses.LossWeights(ce=0, contrastive=1, mse=1))
    ) == {
        "contrastive",
        "mse",
    }


@pytest.mark.alone
def test_budgets(ds, base, tmp_path, monkeypatch, capfd):
    """Seconds, steps and epochs end a run; the rate rises and ends near 0; nothing is left on disk
    or said aloud.
    """
    model, processor = base
    monkeypatch.chdir(tmp_path)
    time.perf_counter()
    run = training.fit(model, processor, ds, max_seconds=2, batch_size=4, show_progress=False)
    assert 2 <= run.seconds < 6 and run.steps == len(run.history["loss"]) == len(run.history["lr"])
    assert (
        np.argmax(run.history["lr"]) < run.steps / 2
        and run.history["lr"][-1] < 0.2 * run.history["lr"].max()
    )
    assert (
        training.fit(
            model, processor, ds, num_train_epochs=0.5, batch_size=8, show_progress=False
        ).steps
        == 2
    )
    run = training.fit(
        model,
        processor,
        ds,
        max_steps=2,
        batch_size=4,
        show_progress=False,
        gradient_accumulation_steps=2,
    )
    assert run.steps == 2 and run.num_examples == 16
    assert (
        training.fit(
            model, processor, ds.select(range(3)), max_steps=1, show_progress=False
        ).num_examples
        == 3
    )
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    for bad, say in (
        (dict(max_seconds=1, max_steps=2), "one of"),
        (dict(max_steps=0), "more than 0"),
        (dict(train=(), max_steps=1), "nothing would train"),
        (dict(train="projectr", max_steps=1), "projector"),
    ):
        with pytest.raises(ValueError, match=say):
            training.fit(model, processor, ds, show_progress=False, **bad)
    with pytest.raises(ValueError, match="0 records"):
        training.fit(model, processor, ds.select([]), max_steps=1)


def test_same_seed_same_run(ds):
    """Steps, not seconds, make a run repeatable: the same seed gives the same losses, another seed
    others.
    """

    def run(seed):
        return training.fit(
            *models.load("base"),
            ds,
            lora=4,
            max_steps=3,
            batch_size=8,
            seed=seed,
            show_progress=False,
        ).history["loss"]

    a, b, c = run(0), run(0), run(1)
    assert (a == b).all() and (a != c).any()


def test_lora_errors(base):
    "A layer that is not there is named with its nearest; a second LoRA is refused."
    with pytest.raises(ValueError, match="Did you mean 'q_proj'"):
        models.add_lora(base[0], target_modules=("q_prj",))
    model = models.add_lora(base[0], 2)
    with pytest.raises(ValueError, match="carries LoRA already"):
        models.add_lora(model, 2)


def test_clock():
    "Linear up, cosine down, whatever counts."
    clock = BudgetCallback(max_steps=10, warmup_ratio=0.2)
    clock.start = 0.0
    assert clock.lr_factor(0) == pytest.approx(0.5) and clock.lr_factor(10) == 0
    assert clock.lr_factor(5) == pytest.approx((1 + math.cos(math.pi * 0.5)) / 2)
    clock = BudgetCallback(max_seconds=100.0)
    assert clock.lr_factor(0) > 0
    clock.start = time.perf_counter() - 50
    assert clock.lr_factor(0) == pytest.approx(0.5, abs=0.01)


def test_pieces_of_a_batch_train_as_the_batch(ds):
    """Gradient accumulation: two pieces of four are one batch of eight, in loss and in weights,
    however long the answers are.
    """
    one, two = models.load("base"), models.load("base")
    a = training.fit(
        *one, ds, max_steps=3, batch_size=8, learning_rate=1e-3, seed=2, show_progress=False
    )
    b = training.fit(
        *two,
        ds,
        max_steps=3,
        batch_size=4,
        learning_rate=1e-3,
        seed=2,
        show_progress=False,
        gradient_accumulation_steps=2,
    )
    assert np.abs(a.history["loss"] - b.history["loss"]).max() < 1e-5
    name = "model.multi_modal_projector.mm_input_projection_weight"
    p, q = (dict(m.named_parameters())[name] for m, _ in (one, two))
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_frozen_text_model_in_a_hurry_says_the_same(ds, base):
    """Inside `fast_gemma3_forward`, loss and gradients are those of transformers' own layers;
    afterwards the model is as it was.
    """
    model, processor = base
    rows = training.TokenizedDataset(
        ds,
        chat.Collator(processor),
        training.cache_features(model, processor, ds, show_progress=False),
    )
    batch, got = rows.collate_fn([rows[i] for i in range(6)]), []
    for how in (contextlib.nullcontext, training.fast_gemma3_forward, training.fast_gemma3_forward):
        with (
            models.freeze_all_but(model, "projector", *(["text"] if got[1:] else [])),
            how(*[model] * (how is training.fast_gemma3_forward)),
        ):
            out = training.compute_losses(
                model, batch, losses.LossWeights(contrastive=1, ce=1, mse=1)
            )
            sum(out.values()).backward()
        p = model.model.multi_modal_projector.mm_input_projection_weight
        got.append((out, p.grad.clone()))
        model.zero_grad()
    for out, grad in got[1:]:
        assert all(abs(out[k].item() - v.item()) < 1e-5 for k, v in got[0][0].items())
        torch.testing.assert_close(grad, got[0][1], rtol=1e-3, atol=1e-6)
    assert not [
        n for n, k in model.named_modules() if type(k) in (FastRMSNorm, AnswerOnlyDecoderLayer)
    ]
    with models.freeze_all_but(model, "text"), training.fast_gemma3_forward(model):
        training.compute_losses(model, batch, losses.LossWeights())["ce"].backward()
    assert model.model.language_model.norm.weight.grad.abs().sum() > 0, (
        "a norm that learns needs its gradient"
    )


def test_attention_masks_are_transformers_own(ds, base):
    "Padding, two pictures, a short window: what our masks allow is what transformers' allow."
    from transformers.models.gemma3.modeling_gemma3 import (
        create_masks_for_vision_model,
        get_block_sequence_ids_for_mask,
    )

    config = base[0].config.get_text_config()
    window, config.sliding_window = config.sliding_window, 3
    types = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]])
    batch = dict(token_type_ids=types, attention_mask=torch.ones_like(types))
    batch["attention_mask"][1, 8:] = 0
    theirs = create_masks_for_vision_model(
        config=config,
        inputs_embeds=torch.zeros(2, 10, 8),
        attention_mask=batch["attention_mask"],
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=get_block_sequence_ids_for_mask(types, device="cpu"),
    )
    config.sliding_window = window
    for k, mask in build_attention_masks(batch, 3).items():
        assert torch.equal(mask, theirs[k]), k


CONTRAST = losses.LossWeights(contrastive=1, ce=0)


def test_captions_of_a_frozen_text_model_are_read_once(ds, base, monkeypatch):
    """Cached embeddings give the losses of live ones; the key follows text model and captions; a
    text model that learns is not cached.
    """
    model, processor = base
    w = losses.LossWeights(contrastive=0.6, ce=0.2, mse=0.2)
    live = training.fit(
        model,
        processor,
        ds,
        max_steps=3,
        batch_size=8,
        loss_weights=w,
        use_feature_cache=False,
        show_progress=False,
    )
    model, processor = models.load("base")
    said = list(ds["caption"])
    key = captions_key(model, processor, said)
    assert (
        captions_key(model, processor, said[1:] + said[:1])
        != key
        != captions_key(model, processor, said[:-1] + ["another"])
    )
    cached = training.fit(
        model, processor, ds, max_steps=3, batch_size=8, loss_weights=w, show_progress=False
    )
    for k in ("loss", "contrastive", "mse"):
        assert np.abs(live.history[k] - cached.history[k]).max() < 1e-5
    with monkeypatch.context() as m:
        m.setattr("mmkit.training.steps.embed_texts", lambda *a: pytest.fail("captions read again"))
        training.fit(
            model, processor, ds, max_steps=2, batch_size=8, loss_weights=w, show_progress=False
        )
        m.setattr(
            "mmkit.training.dataset.cache_captions",
            lambda *a, **k: pytest.fail("a text model that learns was cached"),
        )
        m.undo()
    monkeypatch.setattr(
        "mmkit.training.dataset.cache_captions",
        lambda *a, **k: pytest.fail("a text model that learns was cached"),
    )
    training.fit(
        model, processor, ds, lora=2, max_steps=1, batch_size=8, loss_weights=w, show_progress=False
    )
    with torch.no_grad():
        next(model.model.language_model.parameters()).mul_(1.5)
    assert captions_key(model, processor, said) != key


def test_the_cache_keeps_within_its_size(ds, base, tmp_path):
    "The files used longest ago go first; never the one just written, and never one that is held."
    few = [
        training.cache_features(*base, ds.select([i]), tmp_path, show_progress=False)
        for i in range(3)
    ]
    size, paths = few[0].path.stat().st_size, [c.path for c in few]
    for k, p in enumerate(paths):
        os.utime(p, (1e9 + k,) * 2)
    kept = few[0].features[:].clone()
    del few[1], few[1]
    import gc

    gc.collect()
    new = training.cache_features(
        *base, ds.select([3]), tmp_path, show_progress=False, cache_size_limit=2 * size
    )
    assert [p.exists() for p in (*paths, new.path)] == [
        True,
        False,
        True,
        True,
    ]  # the first is oldest, but in use
    assert torch.equal(few[0].features, kept)
    del few
    gc.collect()
    training.fit(
        *base,
        ds.select(range(4, 8)),
        max_steps=1,
        batch_size=4,
        cache_dir=tmp_path,
        cache_size_limit=1,
        show_progress=False,
    )
    assert (
        len(list(tmp_path.iterdir())) == 2 and new.path.exists()
    )  # what is held, and what the run wrote
    del new
    gc.collect()
    evict_features(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 1


RACE = """
import sys, time, hashlib
from pathlib import Path
import torch
from mmkit import models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
torch.set_num_threads(1)
folder, me = Path(sys.argv[1]), sys.argv[2]
ds, base = load_melanoma_pairs(n=24, seed=3, masks=False), models.load('base')
(folder/me).touch()
while len(list(folder.glob('ready*'))) < 2: time.sleep(.001)
for i in range(8):
    records = ds.select(range(i % 4, i % 4 + 3))
    options = dict(cache_dir=folder/'cache', show_progress=False, cache_size_limit=1)
    c = training.cache_features(*base, records, **options)
    d = training.cache_captions(*base, records['caption'], **options)
    content = c.features.numpy().tobytes() + d.features.numpy().tobytes()
    print(i % 4, hashlib.sha256(content).hexdigest())
"""


def test_two_processes_share_a_folder(home, ds, tmp_path):
    "Two processes that write, read and clean one folder at the same time both read what is right."
    import subprocess
    import sys

    script = tmp_path / "race.py"
    script.write_text(RACE)
    both = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, f"ready{k}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in "12"
    ]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    lines = [set(out.split("\n")) - {""} for out, _ in said]
    assert (
        lines[0] == lines[1]
        and len(lines[0]) == 4
        and not list((tmp_path / "cache").glob("*.part"))
    )


def test_what_a_spike_is():
    """A leap above median and spread of the recent past, not a slow rise, not noise; too little
    past says nothing; a new temperature starts anew.
    """
    rng, s = np.random.default_rng(0), LossSpikeCallback()
    assert s.limit() == math.inf
    s.past = list(2 + 0.1 * rng.standard_normal(40))
    assert 2.3 < s.limit() < 3
    s.past = [2.0] * 40
    assert s.limit() == pytest.approx(2 + s.threshold * 0.06)
    seen, read = torch.eye(5), torch.eye(5)[[0, 1, 3, 2, 4]]
    assert {i for i, _ in misranked_pairs(seen, read, torch.arange(5), 2)} == {2, 3}
    assert (
        misranked_pairs(seen, read, torch.tensor([0, 1, 7, 7, 4]), 1)[0][1] == 0
    )  # the same caption is no stranger's


def mismatched(ds, rows):
    said = list(ds["caption"])
    new = said.copy()
    for a, b in zip(rows, [*rows[1:], rows[0]]):
        new[a] = said[b]
    return ds.remove_columns("caption").add_column("caption", new)


def test_a_mismatched_batch_is_named_and_ends_the_run(home, base):
    """A batch of strangers' captions spikes when it comes up, its rows are named, and the run ends
    if asked; spread over the batches they do not.
    """
    ds = load_melanoma_pairs(n=128, seed=5, masks=False)
    rows = epoch_permutation(128, 0, 13)[48:64].tolist()  # step 13·8 + 4
    kw = dict(loss_weights=CONTRAST, max_steps=112, show_progress=False)
    with pytest.warns(UserWarning, match="step 108: the contrastive loss leapt .* row "):
        run = training.fit(*base, mismatched(ds, rows), max_loss_spikes=1, **kw)
    told = [dict(zip(run.spikes.columns, r)) for r in run.spikes.rows]
    assert (
        run.steps == 108 == told[0]["step"]
        and {t["row"] for t in told} <= set(rows)
        and len(told) == 3
    )
    assert (
        told[0]["caption"] == mismatched(ds, rows)["caption"][told[0]["row"]]
        and told[0]["id"] == ds["id"][told[0]["row"]]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not len(training.fit(*models.load("base"), ds, **kw).spikes.rows)


def test_stages(ds, base, tmp_path):
    """Parts train when their turn comes, and a run that was stopped in a later stage goes on
    there, bit by bit.
    """
    model, processor = base
    seen, plan = [], {0: "projector", 0.5: "text"}

    class Spy(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *a, model=None, **k):
            seen.append({part_of(n) for n, p in model.named_parameters() if p.grad is not None})

    kw = dict(
        train=plan,
        lora=dict(rank=2, lora_dropout=0.1),
        max_steps=8,
        batch_size=4,
        show_progress=False,
    )
    run = training.fit(model, processor, ds, callbacks=[Spy()], **kw)
    assert seen == [{"projector"}] * 4 + [{"text"}] * 4

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, *a, **k):
            if state.global_step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(
            *models.load("base"), ds, output_dir=tmp_path, save_steps=3, callbacks=[Stop()], **kw
        )
    again = training.fit(*models.load("base"), ds, output_dir=tmp_path, save_steps=3, **kw)
    for (n, p), (_, q) in zip(run.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(p, q), n
    with pytest.raises(ValueError, match="stages"):
        training.fit(
            *models.load("base"),
            ds,
            output_dir=tmp_path,
            **{**kw, "train": {0: "text", 0.5: "projector"}},
        )
    with pytest.raises(ValueError, match="no stage of"):
        training.fit(*models.load("base"), ds, **{**kw, "train": {0: "projector"}})
    calls, (model, processor) = [], models.load("base")
    model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    training.fit(
        model,
        processor,
        ds,
        train={0: "projector", 0.5: "vision"},
        max_steps=4,
        batch_size=4,
        show_progress=False,
    )
    assert len(calls) >= 4, "a tower that learns later was cached"


def test_weights_that_change(ds, base):
    """A function of the share, or a Weights object turned from outside: each step trains on the
    weights of its moment, and the history says which.
    """
    model, processor = base
    run = training.fit(
        model,
        processor,
        ds,
        max_steps=4,
        batch_size=8,
        loss_weights=lambda share: losses.LossWeights(contrastive=share, ce=1 - share / 2),
        show_progress=False,
    )
    np.testing.assert_allclose(run.loss_weights["contrastive"], [0, 0.25, 0.5, 0.75])
    assert np.isnan(run.history["contrastive"][0])
    np.testing.assert_allclose(
        run.history["loss"][1:],
        (run.weighted_loss("ce") + run.weighted_loss("contrastive"))[1:],
        rtol=1e-5,
    )
    assert run.history["loss"][0] == run.history["ce"][0] and "nan" not in str(run).lower()
    w = losses.LossWeights()

    class Turn(transformers.TrainerCallback):
        def on_step_end(self, args, state, *a, **k):
            w.mse = 0.5 * (state.global_step >= 2)

    run = training.fit(
        *models.load("base"),
        ds,
        max_steps=4,
        batch_size=8,
        loss_weights=w,
        callbacks=[Turn()],
        show_progress=False,
    )
    np.testing.assert_allclose(run.loss_weights["mse"], [0, 0, 0.5, 0.5])
    assert np.isfinite(run.history["mse"]).tolist() == [False, False, True, True]


def test_held_out_pairs(ds, base, home):
    """Every term on held-out pairs, averaged over counted tokens; looking does not change the run,
    dropout and all.
    """
    model, processor = base
    w = losses.LossWeights(contrastive=0.3, ce=0.6, mse=0.1)
    held = load_melanoma_pairs(n=12, seed=9, masks=False)
    kw = dict(
        max_steps=4,
        batch_size=4,
        loss_weights=w,
        lora=dict(rank=2, lora_dropout=0.2),
        show_progress=False,
    )
    run = training.fit(model, processor, ds, eval_dataset=held, eval_steps=2, **kw)
    plain = training.fit(*models.load("base"), ds, **kw)
    assert (
        (run.history["loss"] == plain.history["loss"]).all()
        and run.eval_history["step"].tolist() == [2, 4]
        and not plain.eval_history
    )
    rows = training.TokenizedDataset(
        held,
        chat.Collator(processor),
        training.cache_features(model, processor, held, show_progress=False),
    )
    told = []
    for i in range(0, 12, 4):
        b = rows.collate_fn([rows[j] for j in range(i, i + 4)])
        with torch.no_grad():
            told.append(
                [float(v) for v in training.compute_losses(run.model, b, w).values()]
                + [int((b["labels"][:, 1:] != -100).sum())]
            )
    ce, contrastive, mse, n = np.array(told).T
    assert run.eval_history["ce"][-1] == pytest.approx(
        (ce * n).sum() / n.sum(), rel=1e-5
    ) and run.eval_history["contrastive"][-1] == pytest.approx(contrastive.mean(), rel=1e-5)
    assert run.eval_history["loss"][-1] == pytest.approx(
        0.6 * run.eval_history["ce"][-1] + 0.3 * contrastive.mean() + 0.1 * mse.mean(), rel=1e-4
    )
    assert len(run.plot(terms=("ce", "contrastive")).lines) == 6
    live, cached = (
        training.fit(
            *models.load("base"),
            ds,
            max_steps=2,
            batch_size=4,
            loss_weights=w,
            eval_dataset=held,
            use_feature_cache=c,
            show_progress=False,
        ).eval_history
        for c in (False, True)
    )
    for k in live:
        (
            np.testing.assert_allclose(live[k], cached[k], rtol=1e-4) if k != "seconds" else None
        )  # held-out captions, not those that train


def test_loggers_hear_every_term(ds, base):
    """A reporter gets the loss, each term raw and weighted, rate and gradient norm; evaluations as
    well.
    """
    heard, w = [], losses.LossWeights(contrastive=0.3, ce=0.6, mse=0.1)

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **k):
            heard.append(dict(logs))

    run = training.fit(
        *base,
        ds,
        max_steps=6,
        batch_size=8,
        loss_weights=w,
        callbacks=[Reporter()],
        logging_steps=3,
        eval_dataset=ds.select(range(8)),
        show_progress=False,
    )
    first = next(h for h in heard if "loss" in h)
    for k in ("contrastive", "ce", "mse"):
        assert first[k] == pytest.approx(run.history[k][:3].mean(), rel=1e-5) and first[
            f"weighted_{k}"
        ] == pytest.approx(vars(w)[k] * first[k])
    assert {"grad_norm", "learning_rate"} <= set(first) and any(
        "eval_contrastive" in h for h in heard
    )
    second = [h for h in heard if "loss" in h][1]
    assert second["ce"] == pytest.approx(run.history["ce"][3:].mean(), rel=1e-5)


def test_what_the_trainer_brings(ds, base):
    """Clipping clips; gradient checkpointing changes no loss and keeps less; bf16 computes in bf16
    and stays near.
    """
    model, processor = base
    kw = dict(max_steps=3, batch_size=8, lora=dict(rank=2), show_progress=False)
    norms = []

    class Norm(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *a, model=None, **k):
            norms.append(
                float(
                    torch.stack(
                        [p.grad.norm() for p in model.parameters() if p.grad is not None]
                    ).norm()
                )
            )

    plain = training.fit(model, processor, ds, **kw)
    training.fit(*models.load("base"), ds, **kw, max_grad_norm=0.01, callbacks=[Norm()])
    assert norms and max(norms) < 0.0101
    kept = []

    def run(**more):
        m, n = models.load("base")[0], [0]

        def pack(t):
            n[0] += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            r = training.fit(m, processor, ds, **kw, **more)
        kept.append(n[0])
        return r

    _once, again = run(), run(gradient_checkpointing=True)
    assert (
        np.abs(plain.history["loss"] - again.history["loss"]).max() < 1e-5
        and kept[1] < 0.6 * kept[0]
    )
    assert not any(getattr(k, "gradient_checkpointing", False) for k in again.model.modules())
    kinds, m = set(), models.load("base")[0]
    m.model.language_model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda k, i, o: kinds.add(o.dtype)
    )
    half = training.fit(
        m,
        processor,
        ds,
        max_steps=3,
        batch_size=8,
        train=("projector",),
        bf16=True,
        show_progress=False,
    )
    full = training.fit(*models.load("base"), ds, max_steps=3, batch_size=8, show_progress=False)
    assert (
        kinds == {torch.bfloat16}
        and 0 < np.abs(half.history["loss"] - full.history["loss"]).max() < 0.05
    )
    assert all(p.dtype == torch.float32 for p in m.parameters())


TWO = """
import sys, torch
from mmkit import losses, models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
torch.set_num_threads(1)
import os, transformers
from safetensors.torch import load_file
ds = load_melanoma_pairs(n=24, seed=3, masks=False)
def go(out, batch, how):
    model, processor = models.load('base')
    tau, grads = losses.Temperature() if how == 'learned' else .07, []
    class Grads(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kw): grads.append(tau.log_scale.grad.item())
    kept = dict(output_dir=out + '-kept', save_steps=2)
    blocks = ['Gemma3DecoderLayer', 'SiglipEncoderLayer']
    fsdp = dict(fsdp=True, fsdp_config=dict(transformer_layer_cls_to_wrap=blocks))
    options = dict(
        projector={},
        learned=dict(callbacks=[Grads()]),
        lora=dict(lora=4, train=('projector', 'text')),
        staged=dict(lora=4, train={0: 'projector', .5: ('projector', 'text')}, **kept),
        fsdp=dict(**kept, **(fsdp if batch == 4 else {})),
    )[how]
    weights = losses.LossWeights(contrastive=.3, ce=.6, mse=.1, temperature=tau)
    run = training.fit(
        model, processor, ds, max_steps=3, batch_size=batch, learning_rate=1e-3, seed=2,
        show_progress=False, loss_weights=weights, **options,
    )
    if os.environ.get('RANK', '0') == '0':
        if 'output_dir' in options:
            learnt = load_file(out + '-kept/checkpoint-3/trained.safetensors')
        else:
            named = models.unwrap_model(run.model).named_parameters()
            learnt = {n: p.detach() for n, p in named if 'projector' in n or 'lora' in n}
        if how == 'learned':
            learnt |= dict(log_scale=tau.log_scale.detach(), grads=torch.tensor(grads))
        torch.save(({k: v.tolist() for k, v in run.history.items()}, learnt), out)
for how in sys.argv[3:]: go(f'{sys.argv[1]}/{how}', int(sys.argv[2]), how)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # left to the exit, its threads may abort it
"""
HOWS = ["projector", "learned", "lora", "staged", "fsdp"]


@pytest.fixture(scope="module")
def singles(home, ds, tmp_path_factory):
    "What one process says of each way: (folder, script, environment)."
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("one")
    script = folder / "two.py"
    script.write_text(TWO)
    env = {**os.environ, "MMKIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, script, folder, "8", *HOWS],
        check=True,
        env=env,
        capture_output=True,
        timeout=300,
    )
    return folder, script, env


@pytest.mark.parametrize("how", HOWS)
def test_two_processes_train_as_one(singles, tmp_path, how):
    """torchrun or accelerate with gloo, DDP or FSDP: two processes with batches of four give the
    losses and weights of one with a batch of eight; one saves.
    """
    import subprocess
    import sys

    one, script, env = singles
    port = str(29000 + os.getpid() % 900)
    launch = (
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            port,
        ]
        if how == "staged"
        else ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    )
    done = subprocess.run(
        [sys.executable, "-m", *launch, script, tmp_path, "4", how],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (h1, w1), (h2, w2) = torch.load(one / how), torch.load(tmp_path / how)
    assert (
        np.abs(np.array(h1["contrastive"]) - h2["contrastive"]).max() < 1e-4
    )  # the joined batch, in every process
    assert set(w1) == set(w2)
    for n in w1:
        torch.testing.assert_close(w1[n], w2[n], rtol=1e-3, atol=2e-5, msg=n)
    if how == "learned":
        assert len(w1["grads"]) == 3 and w1["grads"].abs().min() > 1e-3, (
            "a gradient that can differ"
        )
    if how == "staged":
        kept = {f.name for f in (tmp_path / f"{how}-kept" / "checkpoint-2").iterdir()}
        assert {
            "run.json",
            "trained.safetensors",
            "optimizer.pt",
            "rng_state_0.pth",
            "rng_state_1.pth",
        } <= kept and "run.tmp" not in kept


def test_kill_nine_and_go_on_is_bit_identical(home, tmp_path):
    """Killed at a random moment and called again, a run ends with the weights and losses of one
    that was never stopped.
    """
    import random

    import kill_nine

    kill_nine.finish(kill_nine.call(tmp_path, "-", "whole.pt"))
    dice = random.Random(1)
    assert kill_nine.one_round(tmp_path, dice)  # `python tests/kill_nine.py 20` for more


def test_half_checkpoints_and_other_runs(ds, base, tmp_path):
    "A checkpoint without its last file is thrown away; another run's is refused and left alone."
    run = training.fit(
        *base,
        ds,
        max_steps=4,
        batch_size=4,
        seed=1,
        show_progress=False,
        output_dir=tmp_path,
        save_steps=2,
    )
    (tmp_path / "checkpoint-4" / "run.json").unlink()
    (tmp_path / "checkpoint-9").mkdir()
    again = training.fit(
        *models.load("base"),
        ds,
        max_steps=4,
        batch_size=4,
        seed=1,
        show_progress=False,
        output_dir=tmp_path,
        save_steps=2,
    )
    assert (run.history["loss"] == again.history["loss"]).all() and not (
        tmp_path / "checkpoint-9"
    ).exists()
    with pytest.raises(ValueError, match="another run .*seed 1 → 2"):
        training.fit(
            *models.load("base"),
            ds,
            max_steps=4,
            batch_size=4,
            seed=2,
            show_progress=False,
            output_dir=tmp_path,
        )
    assert (tmp_path / "checkpoint-4" / "run.json").exists()


def test_a_learned_temperature_trains_is_told_and_resumed(ds, base, tmp_path):
    def go(model, temperature, **kw):
        return training.fit(
            model,
            base[1],
            ds,
            max_steps=6,
            batch_size=8,
            loss_weights=losses.LossWeights(contrastive=1, ce=0, temperature=temperature),
            show_progress=False,
            **kw,
        )

    first = losses.Temperature()
    run = go(base[0], first, output_dir=tmp_path, save_steps=3)
    told = run.history["temperature"]
    assert (
        told[0] == pytest.approx(0.07, rel=1e-6)
        and len(set(told)) == 6
        and float(first().detach()) != pytest.approx(0.07, rel=1e-4)
    )
    again, model = losses.Temperature(), models.load("base")[0]
    go(
        model, again, output_dir=tmp_path, save_steps=3
    )  # the run is over: all of it comes from the checkpoint
    assert torch.equal(again.log_scale, first.log_scale) and not moved(model, weights_of(base[0]))
    assert "temperature" not in go(models.load("base")[0], 0.07).history


def test_a_model_that_never_speaks_is_refused(ds, base):
    with pytest.raises(ValueError, match="CLIP compares images with texts and never speaks"):
        training.fit(models.tiny_random_model("clip"), base[1], ds, max_steps=1)


def test_lora_on_another_part_than_the_text(ds, base):
    model = models.load("base")[0]
    weights_of(model)
    run = training.fit(
        model,
        base[1],
        ds,
        train=(),
        lora=dict(rank=2, part="vision", layers_to_transform=[0]),
        max_steps=2,
        batch_size=8,
        show_progress=False,
    )
    got = {n for n, p in run.model.named_parameters() if "lora_B" in n and p.abs().sum() > 0}
    assert got and all("vision_tower" in n and "layers.0." in n for n in got)
    with pytest.raises(ValueError, match="trains 'vision'"):
        training.fit(
            *models.load("base"),
            ds,
            train={0: "projector"},
            lora=dict(rank=2, part="vision"),
            max_steps=2,
            show_progress=False,
        )


def test_hard_negatives_come_with_the_records(ds, base):
    """Records that bring K wrong captions: the contrastive term sees them, a batch keeps a row's K
    together, and unequal K are refused.
    """
    model, processor = base
    wrong = [
        [f"This is wrong caption {i}.", f"Here is another wrong one, number {i}, a little longer."]
        for i in range(8)
    ]
    records = [dict(ds[i], negatives=w) for i, w in enumerate(wrong)]
    rows = training.TokenizedDataset(records, chat.Collator(processor))
    b = rows.collate_fn([rows[i] for i in (3, 1, 5)])
    assert [
        processor.tokenizer.decode(ids[m.bool()], skip_special_tokens=True).strip()
        for ids, m in zip(b["negative_input_ids"], b["negative_attention_mask"])
    ] == [c for i in (3, 1, 5) for c in wrong[i]]
    with torch.no_grad():
        got = training.compute_losses(model, b, losses.LossWeights(1, 0, 0))["contrastive"]
        z, read = (
            embed_image_tokens(model, b).mean(1),
            models.embed_texts(model, b["caption_input_ids"], b["caption_attention_mask"]),
        )
        K = models.embed_texts(
            model, b["negative_input_ids"], b["negative_attention_mask"]
        ).reshape(3, 2, -1)
        assert (
            torch.allclose(got, losses.info_nce(z, read, 0.07, b["caption_id"], negatives=K))
            and got
            > training.compute_losses(
                model,
                {k: v for k, v in b.items() if "negative" not in k},
                losses.LossWeights(1, 0, 0),
            )["contrastive"]
        )
    run = training.fit(
        *base,
        records,
        max_steps=2,
        batch_size=4,
        loss_weights=losses.LossWeights(1, 0, 0),
        show_progress=False,
    )
    assert np.isfinite(run.history["contrastive"]).all()
    with pytest.raises(ValueError, match=r"\[1, 2\] negatives"):
        training.TokenizedDataset(
            [dict(records[0]), dict(records[1], negatives=["one"])], chat.Collator(processor)
        )


def test_a_schedule_of_your_own(ds, base):
    def half(share):
        return 1.0 if share < 0.5 else 0.25

    run = training.fit(
        *base,
        ds,
        max_steps=4,
        batch_size=4,
        learning_rate=1e-3,
        lr_schedule=half,
        show_progress=False,
    )
    assert np.allclose(run.history["lr"], [1e-3, 1e-3, 2.5e-4, 2.5e-4])
    for wrong in (dict(lr_schedule=dict(txt=half)), dict(learning_rate=dict(txt=1e-3))):
        with pytest.raises(ValueError, match="'txt'.*'text'"):
            training.fit(*base, ds, max_steps=2, batch_size=4, show_progress=False, **wrong)
    clock = BudgetCallback(max_steps=4, lr_schedule=dict(text=half))
    clock.start = 0.0
    assert [clock.lr_factor(s, "text") for s in range(4)] == [1, 1, 0.25, 0.25] and [
        clock.lr_factor(s, "vision") for s in range(4)
    ] == [
        BudgetCallback.lr_factor(c, s)
        for c in [BudgetCallback(max_steps=4)]
        if not setattr(c, "start", 0.0)
        for s in range(4)
    ]


def test_learned_temperature_gets_the_gradient_of_one_step_alone(ds, base, cache):
    "The same batch three times, at a learning rate that moves nothing: three equal gradients."
    temperature, gradients = losses.Temperature(), []

    class Record(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            gradients.append(temperature.log_scale.grad.item())

    training.fit(
        *base,
        ds.select(range(8)),
        max_steps=3,
        batch_size=8,
        learning_rate=1e-12,
        loss_weights=losses.LossWeights(contrastive=1.0, ce=0.0, mse=0.0, temperature=temperature),
        callbacks=[Record()],
        show_progress=False,
    )
    assert np.allclose(gradients, gradients[0], rtol=1e-3), gradients
