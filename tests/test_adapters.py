"""Adapters: parity with peft and bitsandbytes, nothing at the start, kept and brought back, merged
with a look; and every wrong use refused.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit import chat, models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.models.parts import get_trainable_parameters
from mmkit.models.quantization import (
    NF4_LEVELS,
    dequantize_blockwise,
    normal_float_levels,
    quantize_blockwise,
)


@pytest.fixture(scope="module")
def ds(cache):
    return load_melanoma_pairs(n=24, seed=5, masks=False)


@pytest.fixture(scope="module")
def base():
    return models.load()


@pytest.fixture(scope="module")
def batch(base, ds):
    return chat.Collator(base[1])([ds[i] for i in range(4)])


def stirred(model, of="lora_B"):
    "As if it had learned."
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if of in n:
                p.normal_(std=0.05)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# --- bottlenecks
@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl", "mllama"])
@pytest.mark.parametrize("beside", [False, True])
def test_bottlenecks_add_nothing_at_first_and_train_alone(family, beside):
    m = models.tiny_random_model(family).eval()
    ids = torch.randint(5, 50, (2, 7))
    mask = torch.ones_like(ids)
    before = logits(m, dict(input_ids=ids, attention_mask=mask))
    was = {n for n, _ in m.named_parameters()}
    models.add_bottleneck_adapters(m, 3, beside)
    assert torch.equal(logits(m, dict(input_ids=ids, attention_mask=mask)), before)
    new = {n for n, _ in m.named_parameters()} - was
    with models.freeze_all_but(m, "text"):
        assert {n for n, p in m.named_parameters() if p.requires_grad} == new and new
        m(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
        assert all(p.grad is not None for n, p in m.named_parameters() if n in new)
        assert any(
            p.grad.abs().sum() > 0 for n, p in m.named_parameters() if n in new and ".up." in n
        )
    assert not torch.equal(
        logits(stirred(m, ".up."), dict(input_ids=ids, attention_mask=mask)), before
    )


def test_a_bottleneck_is_where_the_papers_put_it(base, batch):
    "Houlsby: y + road(y) of the layer's output; parallel: y + road(x) of its input."
    for beside in (False, True):
        m = stirred(models.add_bottleneck_adapters(copy.deepcopy(base[0]), 5, beside), ".up.")
        block, seen = m.model.language_model.layers[1], {}
        block.mlp.register_forward_pre_hook(lambda item, a: seen.update(x=a[0]))
        block.mlp.down_proj.register_forward_hook(lambda item, a, o: seen.update(y=o))
        block.post_feedforward_layernorm.register_forward_pre_hook(
            lambda item, a: seen.update(out=a[0])
        )
        logits(m, batch)
        torch.testing.assert_close(
            seen["out"], seen["y"] + block.mlp.bottleneck(seen["x" if beside else "y"])
        )
        assert hasattr(block.self_attn, "bottleneck") != beside


def test_bottlenecks_train_in_fit_and_everything_else_rests(base, ds):
    m = models.add_bottleneck_adapters(copy.deepcopy(base[0]), 4, layers_to_transform=[0, 2])
    old = {n: p.clone() for n, p in m.named_parameters()}
    run = training.fit(
        m, base[1], ds, train=("text",), max_steps=3, batch_size=8, show_progress=False
    )
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, old[n])}
    assert moved and all(
        "bottleneck" in n and ("layers.0." in n or "layers.2." in n) for n in moved
    )


@pytest.mark.parametrize(
    "kw, said",
    [
        (dict(bottleneck_size=0), "bottleneck_size = 0"),
        (dict(layers_to_transform=[9]), "layers 0 to 3"),
    ],
)
def test_bottleneck_errors(base, kw, said):
    with pytest.raises(ValueError, match=said):
        models.add_bottleneck_adapters(copy.deepcopy(base[0]), **kw)
    with pytest.raises(ValueError, match="already"):
        models.add_bottleneck_adapters(models.add_bottleneck_adapters(copy.deepcopy(base[0])))


# --- kept
@pytest.mark.parametrize("how", ["lora", "bottleneck", "both", "projector"])
def test_save_and_load(base, batch, tmp_path, how):
    m = copy.deepcopy(base[0])
    if how in ("bottleneck", "both"):
        stirred(models.add_bottleneck_adapters(m, 4, parallel=how == "both"), ".up.")
    if how in ("lora", "both"):
        m = stirred(models.add_lora(m, 4))
    parts = ("projector",) if how != "bottleneck" else ()
    with torch.no_grad():
        for p in get_trainable_parameters(m, "projector") * bool(parts):
            p.mul_(1.1)
    models.save_adapters(m, tmp_path / "kept", *parts)
    files = {f.name for f in (tmp_path / "kept").iterdir()}
    assert (
        "trained.safetensors" in files
        and ("adapter_model.safetensors" in files) == (how in ("lora", "both"))
        and not [f for f in files if f.endswith((".bin", ".pt", ".part"))]
    )
    again = models.load_adapters(copy.deepcopy(base[0]), tmp_path / "kept")
    assert torch.equal(logits(again, batch), logits(m, batch)) and not torch.equal(
        logits(again, batch), logits(base[0], batch)
    )
    if how == "lora":
        assert any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n), (
            "it can be trained on"
        )


def test_peft_reads_the_adapter_unchanged(base, batch, tmp_path):
    from peft import PeftModel

    m = stirred(models.add_lora(copy.deepcopy(base[0]), 4))
    models.save_adapters(m, tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(copy.deepcopy(base[0]), tmp_path).eval(), batch),
        logits(m, batch),
    )


def test_save_and_load_errors(base, tmp_path):
    with pytest.raises(ValueError, match="nothing to keep"):
        models.save_adapters(base[0], tmp_path / "a")
    with pytest.raises(ValueError, match="Did you mean 'projector'"):
        models.save_adapters(base[0], tmp_path / "a", "projectr")
    with pytest.raises(FileNotFoundError, match="trained.safetensors"):
        models.load_adapters(base[0], tmp_path / "b")
    models.save_adapters(base[0], tmp_path / "c", "projector")
    with pytest.raises(ValueError, match="another base"):
        models.load_adapters(models.tiny_random_model("gemma3"), tmp_path / "c")


# --- merged
def test_merge_says_the_same(base, batch):
    m = stirred(models.add_lora(copy.deepcopy(base[0]), 4)).eval()
    before = logits(m, batch)
    one, comparison = models.merge_lora(m, batch)
    assert (
        comparison["max_logit_change"] < 1e-5
        and comparison["token_agreement"] == 1
        and not [n for n, _ in one.named_parameters() if "lora" in n]
    )
    torch.testing.assert_close(logits(one, batch), before, rtol=1e-4, atol=1e-5)


def test_a_merge_that_changes_the_answers_is_undone(base, batch, monkeypatch):
    "peft's own merge, made wrong: the check must see it, and the model must be what it was."
    from peft.tuners.lora.layer import Linear

    m = stirred(models.add_lora(copy.deepcopy(base[0]), 4)).eval()
    before, weights = logits(m, batch), {n: p.clone() for n, p in m.named_parameters()}
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.5 * right(self, name))
    with pytest.raises(ValueError, match="nothing was merged"):
        models.merge_lora(m, batch)
    monkeypatch.undo()
    assert all(torch.equal(p, weights[n]) for n, p in m.named_parameters()) and torch.equal(
        logits(m, batch), before
    )
    assert models.merge_lora(m, batch)[1]["token_agreement"] == 1


def test_merging_into_four_bits_is_refused_and_undone(ds, batch):
    m = stirred(models.add_lora(models.load(quantize="nf4")[0], 4)).eval()
    before = logits(m, batch)
    with pytest.raises(ValueError, match="quantised base"):
        models.merge_lora(m, batch)
    assert torch.equal(logits(m, batch), before)
    with pytest.raises(ValueError, match="no LoRA"):
        models.merge_lora(models.load()[0], batch)


# --- four bits
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(0, 99), spread=st.sampled_from([1e-4, 1.0, 50.0]))
def test_codes_are_bitsandbytes_codes(n, seed, spread):
    import bitsandbytes.functional as F

    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * spread
    code, scale = quantize_blockwise(w)
    packed, state = F.quantize_4bit(w, quant_type="nf4", blocksize=64)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[:n]
    assert torch.equal(theirs.long(), code) and torch.equal(state.absmax, scale)
    torch.testing.assert_close(
        F.dequantize_4bit(packed, state).flatten(), dequantize_blockwise(code, scale, w.shape)
    )


def test_normal_float():
    import bitsandbytes.functional as F

    torch.testing.assert_close(NF4_LEVELS, F.get_4bit_type("nf4", "cpu"), rtol=0, atol=1e-6)
    for bits in (2, 3, 4, 8):
        v = normal_float_levels(bits)
        assert (
            len(v) == 2**bits
            and (v.diff() > 0).all()
            and v[0] == -1
            and v[-1] == 1
            and (v == 0).sum() == 1
            and (v > 0).sum() == (v < 0).sum() + 1
        )
    assert torch.equal(
        dequantize_blockwise(*quantize_blockwise(torch.zeros(100)), (100,)), torch.zeros(100)
    )


def test_gradients_after_an_evaluation_are_those_before_it(ds, batch):
    m = models.add_lora(models.load(quantize="nf4")[0], 4)
    stirred(m)

    def grads():
        m.zero_grad()
        m.train()
        m(**batch).loss.backward()
        return [p.grad.clone() for p in get_trainable_parameters(m, "text")]

    with models.freeze_all_but(m, "text"):
        before = grads()
        m.eval()
        logits(m, batch)
        after = grads()
    assert (
        all(torch.equal(a, b) for a, b in zip(before, after))
        and sum(float(a.abs().sum()) for a in before) > 0
    )


# --- where
def test_lora_goes_where_it_is_sent(base):
    m = models.add_lora(copy.deepcopy(base[0]), 2, part="vision", layers_to_transform=[1])
    names = {n for n, p in m.named_parameters() if p.requires_grad}
    assert names and all("vision_tower" in n and "layers.1." in n and "lora_" in n for n in names)
    m = models.add_lora(copy.deepcopy(base[0]), 2, target_modules=("lm_head",))
    names = {n for n, p in m.named_parameters() if p.requires_grad}
    assert names and all("lm_head" in n for n in names)


def test_lora_on_the_head_leaves_the_tied_embedding_alone(base, ds):
    m = copy.deepcopy(base[0])
    before = m.get_input_embeddings().weight.clone()
    run = training.fit(
        m,
        base[1],
        ds,
        train=(),
        lora=dict(rank=2, target_modules=("lm_head",)),
        max_steps=2,
        batch_size=8,
        show_progress=False,
    )
    assert torch.equal(models.unwrap_model(run.model).get_input_embeddings().weight, before)
    assert all(p.abs().sum() > 0 for n, p in run.model.named_parameters() if "lora_B" in n)
