"""Connectors: parity with transformers' own, the contract, and that a model with another connector
trains, speaks and is saved like any other.
"""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmkit import chat, evaluate, losses, models, training
from mmkit.chat.images import count_image_tokens, image_placeholder
from mmkit.core.runtime import get_assets_dir
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.models.connectors import (
    Connector,
    Gemma3Projector,
    LinearProjector,
    MLPProjector,
    PixelShuffleProjector,
    QFormer,
    plot_pooling_windows,
    pooling_kernel_size,
)
from mmkit.models.cross_attention import CrossAttentionConnector, GatedCrossAttentionLayer
from mmkit.models.features import reconstruct_images
from mmkit.models.parts import parameter_names_by_part
from mmkit.models.surgery import build_connector, replace_connector, set_image_size
from mmkit.training.cache import features_key
from mmkit.training.fusion import LateFusion, fit_late_fusion, retrieve_captions
from mmkit.training.steps import count_step_flops

BASE = json.loads((get_assets_dir() / "base" / "config.json").read_text("utf-8"))
SIZE = BASE["vision_config"]["image_size"]
SIDE = SIZE // BASE["vision_config"]["patch_size"]  # patches along a side
EVERY, QUARTER = SIDE**2, (SIDE // 2) ** 2  # tokens: one a patch, one for each four
BUDGETS = [k * k for k in range(1, SIDE + 1) if SIDE % k == 0]
TOKENS = BASE["mm_tokens_per_image"]
D, W = BASE["vision_config"]["hidden_size"], BASE["text_config"]["hidden_size"]


@pytest.fixture(scope="module")
def base():
    return models.load()


@pytest.fixture
def loaded(base):
    return copy.deepcopy(base[0]), base[1]


@pytest.fixture(scope="module")
def config(base):
    return copy.deepcopy(base[0].config)


@pytest.fixture(scope="module")
def ds():
    return load_melanoma_pairs(12, seed=5, masks=False)


@pytest.fixture(scope="module")
def patches():
    return torch.randn(3, EVERY, D, generator=torch.Generator().manual_seed(0))


def half_open(c):
    return CrossAttentionConnector(c, initial_gate=0.5)


MAKE = dict(
    linear=LinearProjector,
    mlp=MLPProjector,
    pooled=Gemma3Projector,
    shuffle=lambda c: PixelShuffleProjector(c, QUARTER),
    queries=lambda c: QFormer(c, 7),
    crossed=half_open,
)


@pytest.fixture(params=MAKE)
def connected(request, loaded):
    torch.manual_seed(0)
    return replace_connector(*loaded, MAKE[request.param](loaded[0].config))


@torch.no_grad()
def logits(model, processor, ds, **changed):
    b = chat.Collator(processor)([ds[0], ds[1]])
    return model(**b | {k: f(b[k]) for k, f in changed.items()}).logits


# --- the contract
@pytest.mark.parametrize(
    "make,tokens",
    [
        (k, n)
        for k in (LinearProjector, MLPProjector, Gemma3Projector, PixelShuffleProjector)
        for n in BUDGETS
    ]
    + [(QFormer, n) for n in (1, 7, TOKENS, 200)],
)
def test_shapes(config, patches, make, tokens):
    c = make(config, tokens)
    assert isinstance(c, Connector) and c.tokens == tokens
    assert c(patches).shape == (3, tokens, W)
    assert torch.equal(c(patches), c.project(models.pool_patches(c, patches)))
    again = build_connector(
        copy.deepcopy(config).__class__(
            **config.to_dict() | dict(connector=json.loads(json.dumps(c.recipe)))
        )
    )  # a recipe survives JSON
    assert (
        type(again) is make
        and again.load_state_dict(c.state_dict())
        and torch.equal(again(patches), c(patches))
    )


def test_a_connector_has_the_models_budget_unless_told(config):
    for kind in (LinearProjector, MLPProjector, Gemma3Projector, PixelShuffleProjector, QFormer):
        connector = kind(config)
        assert connector.tokens == connector.recipe["num_image_tokens"] == TOKENS
    assert CrossAttentionConnector(config).recipe["num_states"] == TOKENS
    llava = models.tiny_random_model("llava").config  # says no number: one for each patch
    assert LinearProjector(llava).tokens == 16


def test_tower_and_words_of_other_widths():
    c = models.tiny_random_model("gemma3").config
    c.text_config.hidden_size = 96
    x = torch.randn(2, 16, 64)
    for k in (LinearProjector, MLPProjector, Gemma3Projector, PixelShuffleProjector, QFormer):
        assert k(c, 4)(x).shape == (2, 4, 96)
    assert GatedCrossAttentionLayer(96, 64, initial_gate=1.0)(torch.randn(2, 5, 96), x).shape == (
        2,
        5,
        96,
    )


# --- parity
@pytest.mark.parametrize("tokens", (EVERY, QUARTER, 1))
def test_pooled_is_gemmas(config, patches, tokens):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    c = copy.deepcopy(config)
    c.mm_tokens_per_image = tokens
    theirs, ours = Gemma3MultiModalProjector(c), Gemma3Projector(config, tokens)
    with torch.no_grad():
        theirs.mm_input_projection_weight.normal_()
        theirs.mm_soft_emb_norm.weight.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(patches), theirs(patches), atol=1e-4)


def test_mlp_is_llavas(config, patches):
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    llava = models.tiny_random_model("llava").config
    llava.vision_config.hidden_size, llava.text_config.hidden_size = D, W
    theirs, ours = LlavaMultiModalProjector(llava), MLPProjector(config, EVERY)
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(patches), theirs(patches), atol=1e-6)


@pytest.mark.parametrize("tokens", (QUARTER, (SIDE // 4) ** 2))
def test_shuffle_is_idefics3s(config, patches, tokens):
    from transformers.models.idefics3 import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    ours, r = PixelShuffleProjector(config, tokens), pooling_kernel_size(SIDE, tokens)
    theirs = Idefics3Connector(
        Idefics3Config(
            scale_factor=r,
            vision_config=dict(hidden_size=D),
            text_config=dict(
                model_type="llama", hidden_size=W, num_attention_heads=4, pad_token_id=0
            ),
        )
    )
    with torch.no_grad():
        w = (
            theirs.modality_projection.proj.weight
        )  # columns: row, column, channel; ours: channel, row, column
        ours.linear.weight.copy_(w.unflatten(1, (r * r, D)).transpose(1, 2).flatten(1))
        ours.linear.bias.zero_()
        assert torch.allclose(ours(patches), theirs(patches), atol=1e-5)


@pytest.mark.parametrize("layers", (1, 2))
def test_qformer_is_blip2s(config, patches, layers):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=W,
            encoder_hidden_size=D,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * W,
            cross_attention_frequency=1,
        )
    ).eval()
    ours = QFormer(config, 7, num_layers=layers).eval()

    def put(a, b):
        return a.load_state_dict(b.state_dict())

    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.1)
        put(ours.norm, theirs.layernorm)
        for b, layer in zip(ours.blocks, theirs.encoder.layer):
            for mine, their, norm in (
                (b.own, layer.attention, b.norm_own),
                (b.across, layer.crossattention, b.norm_across),
            ):
                a = their.attention
                weights = (a.query.weight, a.key.weight, a.value.weight)
                if mine.in_proj_weight is None:  # patches of another width than the queries
                    own = (mine.q_proj_weight, mine.k_proj_weight, mine.v_proj_weight)
                    for to, weight in zip(own, weights, strict=True):
                        to.copy_(weight)
                else:
                    mine.in_proj_weight.copy_(torch.cat(weights))
                mine.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
                put(mine.out_proj, their.output.dense)
                put(norm, their.output.LayerNorm)
            put(b.mlp[0], layer.intermediate_query.dense)
            put(b.mlp[2], layer.output_query.dense)
            put(b.norm_mlp, layer.output_query.LayerNorm)
        want = theirs(
            query_embeds=ours.query_tokens.expand(3, -1, -1), encoder_hidden_states=patches
        ).last_hidden_state
        assert torch.allclose(ours.run_queries(patches), want, atol=1e-4)


def test_gated_layer_is_llamas(patches):
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    c = MllamaTextConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        rms_norm_eps=1e-5,
    )
    c._attn_implementation = "eager"
    theirs, ours, x = (
        MllamaCrossAttentionDecoderLayer(c, 0).eval(),
        GatedCrossAttentionLayer(D, D, 4, 64),
        torch.randn(3, 6, D),
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
        ours.load_state_dict(theirs.state_dict())  # the same names, the same shapes
        want = theirs(
            x,
            cross_attention_states=patches,
            cross_attention_mask=None,
            attention_mask=None,
            full_text_row_masked_out_mask=None,
        )
        assert torch.allclose(
            ours(x, patches), want[0] if isinstance(want, tuple) else want, atol=1e-4
        )
        assert torch.equal(
            GatedCrossAttentionLayer(D, D)(x, patches), x
        )  # shut gates let nothing through


# --- in the model
def test_a_swapped_picture_moves_the_logits(connected, ds):
    model, processor = connected
    n = model.model.multi_modal_projector.tokens
    assert (
        count_image_tokens(image_placeholder(processor), processor)
        == n
        == model.config.mm_tokens_per_image
    )
    assert (
        logits(model, processor, ds)
        - logits(model, processor, ds, pixel_values=lambda x: x.flip(0))
    ).abs().max() > 1e-2
    assert set(parameter_names_by_part(model)["projector"]) == {
        n for n, _ in model.named_parameters() if "multi_modal_projector" in n
    }


def test_only_the_connector_learns_and_the_cache_says_the_same(connected, ds, cache):
    model, processor = connected
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = [
        training.fit(
            copy.deepcopy(model),
            processor,
            ds,
            max_steps=1,
            batch_size=4,
            use_feature_cache=c,
            show_progress=False,
        ).history["loss"][0]
        for c in (True, False)
    ]
    assert abs(loss[0] - loss[1]) < 1e-4
    training.fit(
        model, processor, ds, max_steps=2, batch_size=4, learning_rate=1e-2, show_progress=False
    )
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= set(parameter_names_by_part(model)["projector"])


def test_speaks_as_transformers_does(connected, ds, cache):
    model, processor = connected
    b = chat.encode_example(processor, ds[0]["image"])
    theirs = model.generate(**b, max_new_tokens=8, do_sample=False)[0, b["input_ids"].shape[1] :]
    assert (
        evaluate.generate(model, processor, ds.select([0]), max_new_tokens=8, show_progress=False)[
            0
        ]
        == processor.tokenizer.decode(theirs, skip_special_tokens=True).strip()
    )


def test_saved_and_found_again(connected, ds, tmp_path):
    model, processor = connected
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert {n for n in kept if "projector" in n} == {
        n.removeprefix("model.") for n in parameter_names_by_part(model)["projector"]
    }
    again, proc = models.load(tmp_path)
    assert (
        torch.equal(logits(again, proc, ds), logits(model, processor, ds))
        and not again.training
        and proc.image_seq_length == processor.image_seq_length
    )
    twin = copy.deepcopy(model)
    with torch.no_grad():
        [p.zero_() for p in twin.model.multi_modal_projector.parameters()]
    assert torch.equal(logits(again, proc, ds), logits(model, processor, ds)) and not torch.equal(
        logits(twin, processor, ds), logits(model, processor, ds)
    )


def test_the_cache_knows_what_was_averaged(loaded, ds):
    model, processor = loaded

    def key(c):
        return features_key(replace_connector(model, processor, c)[0], processor, ds)

    own, c = features_key(model, processor, ds), copy.deepcopy(model.config)
    assert own == key(LinearProjector(c)) == key(half_open(c))
    of_patches = key(QFormer(c, 7))
    assert of_patches == key(PixelShuffleProjector(c, QUARTER)) == key(LinearProjector(c, EVERY))
    assert (own == of_patches) == (TOKENS == EVERY)
    assert len({of_patches, key(LinearProjector(c, QUARTER)), key(LinearProjector(c, 1))}) == 3


# --- cross-attention
def test_gates_open_by_themselves(loaded, ds, cache):
    model, processor = replace_connector(*loaded, CrossAttentionConnector(loaded[0].config))
    p = model.model.multi_modal_projector
    assert torch.equal(
        logits(model, processor, ds), logits(model, processor, ds, pixel_values=lambda x: x.flip(0))
    )
    training.compute_losses(model, chat.Collator(processor)([ds[0], ds[1]]), losses.LossWeights())[
        "ce"
    ].backward()
    grad = {n: float(q.grad.abs().max()) for n, q in p.named_parameters()}
    assert all((v > 0) == (n.endswith("gate") or n == "mark") for n, v in grad.items()), grad
    training.fit(
        model, processor, ds, max_steps=3, batch_size=4, learning_rate=1e-2, show_progress=False
    )
    assert not torch.equal(
        logits(model, processor, ds), logits(model, processor, ds, pixel_values=lambda x: x.flip(0))
    )


def test_words_alone_see_no_picture(loaded, ds):
    model, processor = loaded
    t = processor.tokenizer([c for c in ds["caption"][:2]], padding=True, return_tensors="pt")
    ids, mask = t["input_ids"], t["attention_mask"]
    with torch.no_grad():
        plain, text = models.embed_texts(model, ids, mask), model(input_ids=ids).logits
    model, processor = replace_connector(model, processor, half_open(model.config))
    logits(model, processor, ds)
    with torch.no_grad():
        assert model.model.multi_modal_projector.image_states is not None and torch.equal(
            models.embed_texts(model, ids, mask), plain
        )
        assert torch.equal(model(input_ids=ids).logits, text)


def test_hooks_let_go_and_follow_a_copy(loaded, ds):
    model, processor = loaded

    def count(m):
        return sum(len(k._forward_pre_hooks) for k in m.modules())

    before = count(model)
    model, processor = replace_connector(model, processor, half_open(model.config))
    assert count(model) == before + 4
    twin = copy.deepcopy(model)
    a = logits(twin, processor, ds)
    with torch.no_grad():
        [p.zero_() for p in model.model.multi_modal_projector.parameters()]
    assert torch.equal(logits(twin, processor, ds), a) and not torch.equal(
        logits(model, processor, ds), a
    )
    replace_connector(twin, processor, LinearProjector(twin.config))
    assert count(twin) == before


# --- other things
def test_another_resolution(loaded, ds, cache):
    model, processor = loaded
    tower = copy.deepcopy(model.model.vision_tower)
    weights = model.model.multi_modal_projector.state_dict()
    model, small = set_image_size(model, processor, SIZE // 2)
    px = chat.images_to_pixel_values(small, [ds[0]["image"]])
    assert px.shape == (1, 3, SIZE // 2, SIZE // 2)
    unchanged = chat.images_to_pixel_values(processor, [ds[0]["image"]])
    assert unchanged.shape == (1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(
            model.model.vision_tower(px).last_hidden_state,
            tower(px, interpolate_pos_encoding=True).last_hidden_state,
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="made for|equal squares"):
        replace_connector(model, small, LinearProjector(models.load()[0].config))
    model, small = replace_connector(model, small, Gemma3Projector(model.config, (SIDE // 4) ** 2))
    model.model.multi_modal_projector.load_state_dict(weights)
    assert training.fit(model, small, ds, max_steps=1, batch_size=4, show_progress=False).steps == 1
    assert (
        logits(model, small, ds) - logits(model, small, ds, pixel_values=lambda x: x.flip(0))
    ).abs().max() > 1e-2


def test_a_step_is_counted(base, ds):
    model, processor = copy.deepcopy(base[0]), base[1]
    was = model.config._attn_implementation

    def cost(n):
        m, p = replace_connector(model, processor, Gemma3Projector(model.config, n))
        return count_step_flops(m, chat.Collator(p)([ds[0], ds[1]]))

    assert cost(1) < cost(QUARTER) < cost(EVERY) < 4 * cost(QUARTER)
    assert model.config._attn_implementation == was and all(
        p.grad is None for p in model.parameters()
    )


def test_two_encoders_find_captions(loaded, ds, cache):
    bank = ds.select(range(8))
    late = fit_late_fusion(*loaded, bank, max_steps=150, batch_size=8, hidden_size=64)
    said = retrieve_captions(late, *loaded, bank, bank)
    assert np.mean([a == b for a, b in zip(said, bank["caption"])]) > 0.7 and set(
        retrieve_captions(late, *loaded, ds, bank)
    ) <= set(bank["caption"])
    late = LateFusion(loaded[0].config)
    assert late.encode_image(torch.randn(2, TOKENS, D)).shape == (2, 128)


def test_a_line_sees_what_is_linear():
    g = torch.Generator().manual_seed(0)
    W, pooled = torch.rand(9, 192, generator=g) / 9, torch.rand(40, 4, 9, generator=g)
    images = (
        (pooled @ W * 255)
        .reshape(40, 2, 2, 8, 8, 3)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(40, 16, 16, 3)
        .numpy()
    )
    assert (
        np.abs(
            reconstruct_images(pooled[:30], images[:30], pooled[30:], alpha=1e-6)
            - images[30:] / 255
        ).max()
        < 1e-3
    )
    assert len(plot_pooling_windows(images[0] / 255, 4, 4).lines) == 10


# --- errors
def test_errors_name_cause_and_mend(loaded, config):
    model, processor = loaded
    for f, words in (
        (lambda: LinearProjector(config, 30), ("30", str(TOKENS), "QFormer")),
        (
            lambda: PixelShuffleProjector(config, 25),
            ("25", f"{SIDE} × {SIDE}", str(sorted(BUDGETS))),
        ),
        (lambda: pooling_kernel_size(12, 0), ("0",)),
        (lambda: QFormer(config, 0), ("0", "1 or more")),
        (lambda: CrossAttentionConnector(config, 36), ("36", "states")),
        (lambda: CrossAttentionConnector(config, cross_attention_layers=(1, 9)), ("[9]", "0 to 3")),
        (lambda: set_image_size(model, processor, 50), ("50", "48")),
        (
            lambda: replace_connector(
                model, processor, LinearProjector(models.tiny_random_model("gemma3").config, 4)
            ),
            ("4 patches", "model.config"),
        ),
        (
            lambda: replace_connector(
                models.tiny_random_model("llava"), processor, LinearProjector(config)
            ),
            ("Llava", "Gemma"),
        ),
        (
            lambda: reconstruct_images(
                torch.zeros(2, 7, 8), np.zeros((2, 48, 48, 3)), torch.zeros(1, 7, 8)
            ),
            ("7", "queries"),
        ),
    ):
        with pytest.raises(ValueError) as e:
            f()
        assert all(w in str(e.value) for w in words), str(e.value)
    c = copy.deepcopy(config)
    c.connector = dict(kind="QFromer", tokens=4)
    with pytest.raises(ValueError, match="did you mean 'QFormer'|Did you mean 'QFormer'"):
        build_connector(c)
