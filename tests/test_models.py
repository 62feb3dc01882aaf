"What is in a model, what trains, and that nothing else moves; adapters included."

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit import models
from mmkit.chat.collator import Collator, encode_example
from mmkit.models.features import (
    embed_images,
    embed_texts,
    get_image_features,
    pool_patches,
    project_patches,
)
from mmkit.models.freezing import (
    UnfreezeSchedule,
    build_param_groups,
    freeze_all_but,
    plot_unfreeze_schedule,
)
from mmkit.models.loading import BASE_MODEL_DIR, load
from mmkit.models.modes import disable_cpu_repack
from mmkit.models.parts import (
    get_trainable_parameters,
    linear_module_names,
    numel_and_nbytes,
    parameter_names_by_part,
    parameter_summary,
    part_of,
    plot_parameter_summary,
)
from mmkit.models.quantization import get_modules_to_not_convert
from mmkit.models.tiny import TINY_CONFIGS

PARTS = ("vision", "projector", "text")


def picture(k):
    return Image.fromarray(np.random.default_rng(k).integers(0, 255, (96, 96, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded[0]).requires_grad_(True)


@pytest.fixture(scope="module")
def batch(loaded):
    return Collator(loaded[1], include_captions=True)(
        [dict(image=picture(k), caption="A lesion." + " It is dark." * k) for k in range(3)]
    )


@pytest.fixture
def wrapped(model):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
        )


def step_inputs(batch):
    return {
        k: v
        for k, v in batch.items()
        if k not in ("caption_input_ids", "caption_attention_mask", "caption_id")
    }


def on(model):
    return {part_of(n) for n, p in model.named_parameters() if p.requires_grad}


# --- the shipped base
def test_base_is_an_ordinary_folder_without_our_code(loaded):
    import json

    assert (
        type(loaded[0]).__name__ == "Gemma3ForConditionalGeneration"
        and type(loaded[1]).__name__ == "Gemma3Processor"
    )
    assert not loaded[0].training and "auto_map" not in json.loads(
        (BASE_MODEL_DIR / "config.json").read_text()
    )
    text, vision = loaded[0].config.text_config, loaded[0].config.vision_config
    assert set(text.layer_types) == {"full_attention"} and text.max_position_embeddings >= 1024
    assert all(
        w % 64 == 0
        for w in (
            text.hidden_size,
            text.intermediate_size,
            vision.hidden_size,
            vision.intermediate_size,
            text.vocab_size,
        )
    )


def test_loads_with_plain_transformers_and_no_torchvision():
    import subprocess
    import sys

    code = (
        "import sys, warnings; warnings.simplefilter('error'); sys.modules['torchvision'] ="
        " None\nfrom transformers import AutoModelForImageTextToText as M, AutoProcessor as P\nm ="
        f" M.from_pretrained({str(BASE_MODEL_DIR)!r}); p ="
        f" P.from_pretrained({str(BASE_MODEL_DIR)!r})\nassert not [k for k in sys.modules if"
        " k.startswith('mmkit')]\nprint(type(p.image_processor).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert out.returncode == 0 and "Pil" in out.stdout, out.stderr[-500:]
    assert "arning" not in out.stderr.replace("Loading weights", "")


def test_a_swapped_picture_moves_the_logits(model, batch):
    b = step_inputs(batch)
    other = {**b, "pixel_values": b["pixel_values"].roll(1, 0)}
    with torch.no_grad():
        moved = (model(**b).logits - model(**other).logits).abs().amax()
        model.model.multi_modal_projector.mm_input_projection_weight.zero_()
        blind = (model(**b).logits - model(**other).logits).abs().amax()
    assert moved > 1e-2 and blind == 0


def test_picture_tokens_see_one_another_and_words_only_look_back(loaded):
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    model.set_attn_implementation("eager")
    b = encode_example(processor, picture(0))
    seat = b["input_ids"][0] == model.config.image_token_id
    with torch.no_grad():
        A = model(**b, output_attentions=True).attentions
    for layer in A:
        a = layer[0].mean(0)
        n = model.config.mm_tokens_per_image
        assert (a[seat][:, seat].triu(1) > 0).sum() == n * (n - 1) // 2 and a[~seat][:, ~seat].triu(
            1
        ).sum() == 0


def test_generates_from_template_and_stops(loaded):
    model, processor = loaded
    b = Collator(processor, for_training=False)(
        [
            dict(image=picture(0)),
            dict(image=picture(1), prompt="What is in the picture, and where?"),
        ]
    )
    out = model.generate(**b, max_new_tokens=6)
    assert out.shape[1] <= b["input_ids"].shape[1] + 6
    assert (
        processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
        in model.generation_config.eos_token_id
    )


# --- loading
def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load(tmp_path)


def test_load_takes_a_folder_and_keywords(loaded, tmp_path):
    for x in loaded:
        x.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)[0].lm_head.weight, loaded[0].lm_head.weight)
    assert load(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


# --- parts
def test_parts_cover_everything_once(loaded):
    found = parameter_names_by_part(loaded[0])
    names = [n for n, _ in loaded[0].named_parameters()]
    assert (
        set(found) == set(PARTS)
        and sorted(sum(found.values(), [])) == sorted(names)
        and all(found.values())
    )
    assert all("vision_tower" in n for n in found["vision"]) and all(
        "projector" in n for n in found["projector"]
    )


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.language_model.layers.3.cross_attn.q_proj.weight", "projector"),
        ("model.language_model.layers.3.self_attn.q_proj.weight", "text"),
        ("qformer.encoder.layer.0.attention.x", "projector"),
        ("language_projection.weight", "projector"),
        ("lm_head.weight", "text"),
        (
            "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.default.weight",
            "text",
        ),
        ("something.else", ""),
        ("my_vision_tower_x.weight", ""),
    ],
)
def test_part_of(name, part):
    assert part_of(name) == part


def test_unknown_parameters_are_an_error(model):
    model.mystery = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'mystery.weight'.*SEGMENTS"):
        parameter_names_by_part(model)


def test_real_classes_of_other_families():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**tiny, image_size=16, patch_size=8),
            text_config=LlamaConfig(**tiny, vocab_size=32),
            image_token_index=3,
        )
    )
    assert {k: bool(v) for k, v in parameter_names_by_part(llava).items()} == dict.fromkeys(
        PARTS, True
    )
    assert all(
        n.split(".")[1] == "multi_modal_projector"
        for n in parameter_names_by_part(llava)["projector"]
    )


# --- what trains
@pytest.mark.parametrize("names", [(), ("projector",), ("text",), ("vision", "projector"), PARTS])
def test_train_only(model, names):
    model.lm_head.weight.requires_grad_(False)  # tied, so an embedding that was frozen before
    before = [p.requires_grad for p in model.parameters()]
    with freeze_all_but(model, *names):
        assert on(model) == set(names)
    assert [p.requires_grad for p in model.parameters()] == before


def test_train_only_restores_after_an_error_and_nested(model):
    with pytest.raises(ZeroDivisionError), freeze_all_but(model, "text"):
        with freeze_all_but(model, "vision"):
            assert on(model) == {"vision"}
        assert on(model) == {"text"}
        _ = 1 / 0
    assert on(model) == set(PARTS)
    freeze_all_but(model, "projector")
    assert on(model) == {"projector"}  # as a function it stays


@pytest.mark.parametrize("names", [("projector",), ("text",), ("vision",), ("vision", "projector")])
def test_nothing_else_moves(model, batch, names):
    before = copy.deepcopy(model.state_dict())
    opt = torch.optim.AdamW(build_param_groups(model, dict.fromkeys(names, 1e-2)), weight_decay=0.1)
    model(**step_inputs(batch)).loss.backward()
    opt.step()
    assert {
        part_of(n) for n, v in model.state_dict().items() if not torch.equal(v, before[n])
    } == set(names)


def test_wrong_names_name_the_right_one(model):
    for call in (
        lambda: freeze_all_but(model, "projecter"),
        lambda: build_param_groups(model, {"projecter": 1e-3}),
        lambda: get_trainable_parameters(model, "projecter"),
    ):
        with pytest.raises(ValueError, match="'projecter'.*Did you mean 'projector'"):
            call()
    assert on(model) == set(PARTS)  # a refused call changes nothing


@pytest.mark.parametrize(
    "lr", [{}, dict(text=0), dict(text=-1e-3), dict(text=float("nan")), dict(text=float("inf")), 0]
)
def test_senseless_rates_are_refused(model, lr):
    with pytest.raises(ValueError, match="nothing would train|give 0|learning rate"):
        build_param_groups(model, lr)


def test_param_groups(model):
    groups = build_param_groups(model, dict(vision=1e-5, projector=1e-3, text=0))
    assert [(g["name"], g["lr"]) for g in groups] == [("vision", 1e-5), ("projector", 1e-3)] and on(
        model
    ) == {"vision", "projector"}
    every = build_param_groups(model, 1e-4)
    assert sum(p.numel() for g in every for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    ) and {g["lr"] for g in every} == {1e-4}


def test_what_trains_counts(model):
    freeze_all_but(model, "projector")
    rows = {
        r[0]: dict(zip(parameter_summary(model).columns, r)) for r in parameter_summary(model).rows
    }
    d, w = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    assert rows["projector"]["parameters"] == rows["all"]["trainable"] == d * w + d
    assert rows["all"]["weight_bytes"] == 4 * sum(p.numel() for p in model.parameters()) and rows[
        "all"
    ]["training_bytes"] == 12 * (d * w + d)
    assert (
        abs(sum(rows[p]["share"] for p in PARTS) - 1) < 1e-9
        and rows["text"]["trainable_share"] == 0
    )
    import matplotlib.pyplot as plt

    assert len(plot_parameter_summary(model).patches) == 6
    plt.close("all")


# --- adapters
def test_text_of_a_peft_model_means_its_adapters(wrapped, batch):
    assert sorted(map(len, parameter_names_by_part(wrapped).values())) and sum(
        map(len, parameter_names_by_part(wrapped).values())
    ) == len(list(wrapped.named_parameters()))
    groups = build_param_groups(wrapped, dict(text=1e-2, projector=1e-3))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "projector" in n for n in trained) and len(trained) == 4 * 2 * 2 + 2
    before = copy.deepcopy(wrapped.state_dict())
    opt = torch.optim.AdamW(groups)
    wrapped(**step_inputs(batch)).loss.backward()
    opt.step()
    assert all(
        "lora_" in n or "projector" in n
        for n, v in wrapped.state_dict().items()
        if not torch.equal(v, before[n])
    )


def test_a_part_kept_whole_by_peft(model):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = get_peft_model(
            model,
            LoraConfig(
                r=2,
                target_modules=r".*language_model.*q_proj",
                modules_to_save=["multi_modal_projector"],
            ),
        )
    freeze_all_but(m, "projector")
    assert all("modules_to_save" in n for n, p in m.named_parameters() if p.requires_grad) and on(
        m
    ) == {"projector"}


# --- inside
def test_features_pool_and_project(loaded, wrapped, batch):
    model, px = loaded[0], batch["pixel_values"]
    with torch.no_grad():
        tower, tokens = model.get_image_features(px), get_image_features(model, px)
        config = model.config
        assert tokens.shape == (
            3,
            config.mm_tokens_per_image,
            config.text_config.hidden_size,
        )
        torch.testing.assert_close(
            project_patches(model, pool_patches(model, tower.last_hidden_state)), tokens
        )
        torch.testing.assert_close(
            project_patches(wrapped, pool_patches(wrapped, tower.last_hidden_state)), tokens
        )
        torch.testing.assert_close(embed_images(wrapped, px), tokens.mean(1))
    with pytest.raises(ValueError, match="Linear has no projector"):
        pool_patches(torch.nn.Linear(2, 2), px)


def test_text_embedding_ignores_padding_and_pictures(loaded, wrapped, batch):
    model, ids, mask = loaded[0], batch["caption_input_ids"], batch["caption_attention_mask"]
    with torch.no_grad():
        z = embed_texts(model, ids, mask)
        assert z.shape == (3, model.config.text_config.hidden_size)
        for k in range(3):
            T = int(mask[k].sum())
            torch.testing.assert_close(
                embed_texts(model, ids[k : k + 1, :T], mask[k : k + 1, :T])[0],
                z[k],
                atol=1e-4,
                rtol=1e-4,
            )
        torch.testing.assert_close(embed_texts(wrapped, ids, mask), z)


# --- the other families
def picture_inputs(
    family, px
):  # px (3, 32, 32): what each family's processor would make of one picture and three words
    seats = dict(gemma3=4, llava=16, qwen2_vl=4, blip2=4).get(family, 0)
    row = torch.cat([torch.tensor([[1]]), torch.full((1, seats), 3), torch.tensor([[7, 8, 9]])], 1)
    if family in ("clip", "siglip"):
        return dict(input_ids=row, pixel_values=px[None])
    out = dict(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=px[None])
    if family == "gemma3":
        out["token_type_ids"] = (row == 3).long()
    if family == "qwen2_vl":  # patches of 8×8 in blocks of 2×2, twice in time
        p = (
            px.reshape(3, 2, 2, 8, 2, 2, 8)
            .permute(1, 4, 2, 5, 0, 3, 6)
            .reshape(16, 3, 1, 8, 8)
            .repeat(1, 1, 2, 1, 1)
            .reshape(16, -1)
        )
        out.update(
            pixel_values=p,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(row == 3).long(),
        )
    if family == "mllama":
        out.update(
            pixel_values=px[None, None, None],
            aspect_ratio_ids=torch.ones(1, 1, dtype=torch.long),
            aspect_ratio_mask=torch.ones(1, 1, 1, dtype=torch.long),
            cross_attention_mask=torch.ones(1, row.shape[1], 1, 1, dtype=torch.long),
        )
    return out


@pytest.mark.parametrize("family", list(TINY_CONFIGS))
def test_tiny_families_see(family):
    """A swapped picture moves the logits from the start; every parameter has its part; the same
    seed gives the same weights.
    """
    m, again, other = (
        models.tiny_random_model(family),
        models.tiny_random_model(family),
        models.tiny_random_model(family, seed=1),
    )
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def logits(px):
        out = m(**picture_inputs(family, px))
        return out.logits_per_image if "logits_per_image" in out else out.logits

    with torch.no_grad():
        assert (logits(x[0]) - logits(x[1])).abs().max() > 1e-3
    assert all(parameter_names_by_part(m).values())
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), again.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(m.parameters(), other.parameters()))


@pytest.mark.parametrize("family", list(TINY_CONFIGS))
def test_only_the_named_part_of_a_family_moves(family):
    m, x = (
        models.tiny_random_model(family),
        torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)),
    )
    for part in ("vision", "projector", "text"):
        before = {n: p.detach().clone() for n, p in m.named_parameters()}
        with models.freeze_all_but(m, part):
            opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3)
            out = m(**picture_inputs(family, x))
            loss = (
                (out.logits_per_image if "logits_per_image" in out else out.logits).square().sum()
            )
            loss.backward()
            assert all(
                p.grad.norm() < 1e4 for p in m.parameters() if p.grad is not None
            )  # no norm over zeros, no 1e18
            opt.step()
            opt.zero_grad()
        moved = {part_of(n) for n, p in m.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {part}, (part, moved)


def test_tiny_refuses_and_leaves_the_dice_alone():
    with pytest.raises(ValueError, match="Did you mean 'llava'"):
        models.tiny_random_model("lava")
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    models.tiny_random_model("clip")
    assert torch.rand(1) == a


# --- folders of the other families
GENERATIVE = ("gemma3", "mllama", "llava", "qwen2_vl", "blip2")


@pytest.fixture(scope="module")
def folders(loaded, tmp_path_factory):
    "Each tiny family as `save_pretrained` writes it, with a processor beside it."
    out = {}
    for family in TINY_CONFIGS:
        out[family] = tmp_path_factory.mktemp(family)
        models.tiny_random_model(family).save_pretrained(out[family])
        loaded[1].save_pretrained(out[family])
    return out


def px(seed=0):
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))


def some_loss(m, family, seed=0):
    out = m(**picture_inputs(family, px(seed)))
    return (
        (out.logits_per_image if "logits_per_image" in out else out.logits).float().square().sum()
    )


def gradient(m, family, part):
    torch.manual_seed(0)  # some families drop out
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                some_loss(m, family),
                get_trainable_parameters(m, part),
                allow_unused=True,
                materialize_grads=True,
            )
        ]
    )


def adapted(m, part="text", *kinds):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            m,
            LoraConfig(
                r=2, target_modules=linear_module_names(m, part, *(kinds or ("q_proj", "v_proj")))
            ),
        )


@pytest.mark.parametrize("family", list(TINY_CONFIGS))
def test_load_gives_back_what_was_saved(family, folders):
    m, fresh = load(folders[family])[0], models.tiny_random_model(family)
    assert type(m) is type(fresh) and not m.training
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), fresh.parameters()))


def test_a_folder_without_a_processor(folders, tmp_path):
    models.tiny_random_model("llava").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no whole processor.*processor.save_pretrained"):
        load(tmp_path)
    load(folders["llava"])[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no whole processor"):
        load(tmp_path)


# --- quantised
@pytest.mark.parametrize("quantize", ["nf4", "8bit"])
@pytest.mark.parametrize("family", list(TINY_CONFIGS))
def test_only_the_text_models_linear_layers_are_quantised(family, quantize, folders):
    import bitsandbytes as bnb

    m, plain = load(folders[family], quantize=quantize)[0], models.tiny_random_model(family)
    packed = [
        n for n, x in m.named_modules() if isinstance(x, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    ]
    head = plain.get_output_embeddings()
    assert packed and packed == [
        n
        for n, x in plain.named_modules()
        if isinstance(x, torch.nn.Linear) and part_of(n) == "text" and x is not head
    ] == linear_module_names(m, "text")
    w = dict(m.named_parameters())
    for n, p in plain.named_parameters():  # everything else is what it was, to the bit
        if n.removesuffix(".weight") not in packed:
            assert torch.equal(p, w[n]) or p.dim() == 1 and torch.allclose(p, w[n])
    with torch.no_grad():
        a, b = some_loss(m, family).sqrt(), some_loss(plain, family).sqrt()
    near = (
        0.2 * b if family in GENERATIVE else 0.05 * plain.logit_scale.exp()
    )  # of a cosine's scale
    assert abs(a - b) < near and a != b


@pytest.mark.parametrize("quantize", ["nf4", "8bit"])
@pytest.mark.parametrize("family", GENERATIVE)
def test_a_pass_in_evaluation_mode_leaves_the_gradients_alone(family, quantize, folders):
    m = load(folders[family], quantize=quantize)[0].train()
    before = gradient(m, family, "projector")
    m.eval()
    with torch.no_grad():
        some_loss(m, family)
    m.train()
    assert 0 < before.norm() < 1e4 and torch.equal(before, gradient(m, family, "projector"))
    plain = gradient(models.tiny_random_model(family).train(), family, "projector")
    assert torch.cosine_similarity(before, plain, dim=0) > 0.85


def test_the_trap_is_real_and_refused(loaded, batch):
    import bitsandbytes as bnb

    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    m = load(quantize="nf4")[0]
    for x in m.modules():
        if isinstance(x, bnb.nn.Linear4bit):
            x.support_avx512bf16_for_cpu = True
    freeze_all_but(m, "projector")  # in time: also for a model that came another way
    with torch.no_grad():
        m(**step_inputs(batch))
    freeze_all_but(m, "projector")
    UnfreezeSchedule(m, {0: "projector"})
    for x in m.modules():
        if isinstance(x, bnb.nn.Linear4bit):
            x.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        m(**step_inputs(batch))
    for late in (
        lambda: freeze_all_but(m, "projector"),
        lambda: build_param_groups(m, dict(projector=1e-3)),
        lambda: UnfreezeSchedule(m, {0: "projector"}),
        lambda: disable_cpu_repack(m),
    ):
        with pytest.raises(ValueError, match="repacked for inference.*anew"):
            late()
    with freeze_all_but(m):
        pass  # freezing everything is no training


def test_widths_that_are_no_multiple_of_64(loaded, tmp_path):
    models.tiny_random_model("llava", hidden_size=96).save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    m = load(tmp_path, quantize="nf4")[0]
    with torch.no_grad():
        assert some_loss(m, "llava").isfinite()
    assert gradient(m, "llava", "projector").norm() > 0


def test_true_numbers_and_bytes_of_packed_weights(model):
    four, eight, n = load(quantize="4bit")[0], load(quantize="8bit")[0], 0
    for name in linear_module_names(model, "text"):
        w = model.get_submodule(name).weight
        blocks = math.ceil(w.numel() / 64)
        n += w.numel()
        assert numel_and_nbytes(four.get_submodule(name).weight) == (
            w.numel(),
            w.numel() // 2 + blocks + 4 * math.ceil(blocks / 256) + 4 + 4 * (16 + 256),
        )
        assert numel_and_nbytes(eight.get_submodule(name).weight) == (
            w.numel(),
            w.numel() + 4 * len(w),
        )
    rows = [
        {r[0]: dict(zip(parameter_summary(m).columns, r)) for r in parameter_summary(m).rows}
        for m in (model, four, eight)
    ]
    for part in (*PARTS, "all"):
        assert (
            len({r[part]["parameters"] for r in rows}) == len({r[part]["share"] for r in rows}) == 1
        )
    for part in PARTS[:2]:
        assert len({r[part]["weight_bytes"] for r in rows}) == 1
    assert rows[0]["all"]["weight_bytes"] - rows[2]["all"]["weight_bytes"] == 3 * n - sum(
        4 * len(eight.get_submodule(x).weight) for x in linear_module_names(model, "text")
    )
    with freeze_all_but(four, "projector"):
        rows = {r[0]: r for r in parameter_summary(four).rows}
        assert rows["all"][3] == rows["projector"][1] == 16512 and rows["text"][3] == 0
    import matplotlib.pyplot as plt

    total = sum(numel_and_nbytes(p)[1] for p in four.parameters())
    for by, shares in (
        ("bytes", [r[5] / total for r in parameter_summary(four).rows]),
        ("parameters", [r[2] for r in parameter_summary(four).rows]),
    ):
        drawn = plot_parameter_summary(four, by=by).patches
        assert np.allclose([p.get_width() for p in drawn[::2]], shares[:3]) and len(drawn) == 6
    plt.close("all")
    with pytest.raises(ValueError, match="Did you mean 'bytes'"):
        plot_parameter_summary(four, by="byte")


@pytest.mark.parametrize(
    "wish, hint",
    [("nf5", "'nf4'"), ("int8", "'8bit'"), (8, "'8bit'"), (4, "'nf4'|'4bit'"), ("4bits", "'4bit'")],
)
def test_quantize_names_the_nearest(wish, hint):
    with pytest.raises(ValueError, match=f"quantize={wish!r}.*Did you mean ({hint})"):
        load(quantize=wish)


def test_quantize_refuses_what_it_would_ignore(tmp_path, monkeypatch):
    import sys

    with pytest.raises(ValueError, match="give one of them"):
        load(quantize="nf4", quantization_config=dict(load_in_8bit=True))
    for q in ("nf4", "8bit"):
        for x in load(quantize=q):
            x.save_pretrained(tmp_path)
        m = load(tmp_path)[0]  # quantised as it was saved, and safe
        assert m.is_quantized and not any(
            getattr(x, "support_avx512bf16_for_cpu", False) for x in m.modules()
        )
        with pytest.raises(ValueError, match="before they were saved"):
            load(tmp_path, quantize="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install"):
        load(quantize="nf4")


def test_full_precision_names_are_whole_and_short():
    said = {f: get_modules_to_not_convert(models.tiny_random_model(f)) for f in GENERATIVE}
    assert said["gemma3"] == ["model.vision_tower", "lm_head"] and said["qwen2_vl"] == [
        "model.visual",
        "lm_head",
    ]
    assert set(said["mllama"]) == {
        "model.vision_model",
        "model.language_model.layers.1.cross_attn",
        "model.multi_modal_projector",
        "lm_head",
    }
    assert set(said["blip2"]) == {
        "vision_model",
        "qformer",
        "language_projection",
        "language_model.lm_head",
    }


# --- adapters in every family, beside full and packed weights
@pytest.mark.parametrize("quantize", [None, "nf4", "8bit"])
@pytest.mark.parametrize("family", GENERATIVE)
def test_adapters_train_and_nothing_else_moves(family, quantize, folders):
    m = adapted(load(folders[family], quantize=quantize)[0])
    assert sum(map(len, parameter_names_by_part(m).values())) == len(
        list(m.named_parameters())
    ) and all(parameter_names_by_part(m).values())
    assert linear_module_names(m, "text", "q_proj") == linear_module_names(
        models.tiny_random_model(family), "text", "q_proj"
    )
    rows = {r[0]: dict(zip(parameter_summary(m).columns, r)) for r in parameter_summary(m).rows}
    lora = sum(p.numel() for n, p in m.named_parameters() if "lora_" in n)
    assert rows["all"]["parameters"] == lora + sum(
        p.numel() for p in models.tiny_random_model(family).parameters()
    )
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    with freeze_all_but(m, "text"):
        assert {r[0]: r[3] for r in parameter_summary(m).rows} == dict(
            vision=0, projector=0, text=lora, all=lora
        )
        opt = torch.optim.SGD(build_param_groups(m, dict(text=1e-3)))
        some_loss(m, family).backward()
        opt.step()
        opt.zero_grad()
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(
        "lora_B" in n and part_of(n) == "text" for n in moved
    )  # A waits for B, which starts at zero
    with freeze_all_but(m, "projector"):
        assert on(m) == {"projector"}


@pytest.mark.parametrize("quantize", ["nf4", "8bit"])
def test_codes_are_refused_as_something_to_train(quantize):
    m = load(quantize=quantize)[0]
    was = [p.requires_grad for p in m.parameters()]
    for call in (
        lambda: freeze_all_but(m, "text"),
        lambda: build_param_groups(m, 1e-4),
        lambda: UnfreezeSchedule(m, {0: "projector", 0.5: "text"}),
    ):
        with pytest.raises(ValueError, match="'text' is quantised: 28 of its 54.*adapters"):
            call()
    assert [p.requires_grad for p in m.parameters()] == was


def test_adapters_in_the_wrong_part(model):
    m = adapted(model, "vision", "q_proj")
    with pytest.raises(ValueError, match="all in the part 'vision'.*none in 'text'"):
        freeze_all_but(m, "text")
    with freeze_all_but(m, "vision"):
        assert all("lora_" in n for n, p in m.named_parameters() if p.requires_grad)
    with freeze_all_but(m, "projector"):
        assert on(m) == {"projector"}


def test_layers_of_one_part(loaded, wrapped):
    model = loaded[0]
    assert linear_module_names(model, "text", "q_proj", "down_proj") == [
        n
        for n, x in model.named_modules()
        if n.startswith("model.language_model") and n.endswith(("q_proj", "down_proj"))
    ]
    assert linear_module_names(model, "vision") == [
        n
        for n, x in model.named_modules()
        if isinstance(x, torch.nn.Linear) and "vision_tower" in n
    ]
    assert "lm_head" not in linear_module_names(model, "text") and linear_module_names(
        wrapped, "text"
    ) == linear_module_names(model, "text")
    for ask, said in (
        (("text", "q_prj"), "Did you mean 'q_proj'"),
        (("text", "fc1"), r"but of 'vision' \(6\)"),
        (("vision", "q_proj", "gate_proj"), r"but of 'text' \(4\)"),
        (("projector",), "no linear layer.*train it whole"),
        (("language_model", "q_proj"), "Did you mean 'text'"),
    ):
        with pytest.raises(ValueError, match=said):
            linear_module_names(model, *ask)


@pytest.mark.parametrize(
    "name, said",
    [
        ("language_model", "Did you mean 'text'"),
        ("vision_tower", "Did you mean 'vision'"),
        ("mm_projector", "Did you mean 'projector'"),
        ("multi_modal_projector", "Did you mean 'projector'"),
        ("lm_head", "Did you mean 'text'"),
        ("q_proj", r"'vision' \(12 parameters\) and 'text' \(4 parameters\)"),
        ("gate_proj", "Did you mean 'text'"),
        ("model.language_model.layers.0", "Did you mean 'text'"),
        ("vison", "Did you mean 'vision'"),
        (("vision", "text"), "one by one"),
        (["vision"], "one by one"),
        ("head", "There is 'vision', 'projector', 'text'"),
    ],
)
def test_a_name_that_is_no_part_leads_to_one(model, name, said):
    calls = [lambda: freeze_all_but(model, name), lambda: get_trainable_parameters(model, name)]
    if isinstance(name, str):
        calls += [
            lambda: build_param_groups(model, {name: 1e-3}),
            lambda: UnfreezeSchedule(model, {0: "projector", 0.5: name}),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=said):
            call()
    assert on(model) == set(PARTS)


@pytest.mark.parametrize(
    "family, name, part",
    [
        ("qwen2_vl", "merger", "projector"),
        ("qwen2_vl", "visual", "vision"),
        ("mllama", "cross_attn", "projector"),
        ("blip2", "qformer", "projector"),
        ("blip2", "vision_model", "vision"),
        ("clip", "text_projection", "projector"),
        ("siglip", "text_model", "text"),
    ],
)
def test_pieces_of_every_family_lead_to_their_part(family, name, part):
    try:
        freeze_all_but(models.tiny_random_model(family), name)
    except ValueError as e:
        said = str(e)
    assert f"Did you mean {part!r}" in said or f"{part!r} (" in said and "name a part" in said, said


# --- stages
PLAN = {0.75: "text", 0: "projector", 0.5: ("text", "projector", "text")}


def test_stages_switch_and_restore(model):
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    s = UnfreezeSchedule(model, PLAN)
    assert (
        s.names == ("projector", "text") and [p.requires_grad for p in model.parameters()] == before
    )  # a plan alone changes nothing
    assert [s.parts_at(x) for x in (-1, 0, 0.4999, 0.5, 0.74, 0.75, 1, 7)] == [
        ("projector",)
    ] * 3 + [("text", "projector")] * 2 + [("text",)] * 3
    with pytest.raises(ZeroDivisionError), s:
        assert on(model) == {"projector"}
        for share in (0.5, 0.8, 0.1):
            assert s(share) == s.parts_at(share) and on(model) == set(s.parts_at(share))
        _ = 1 / 0
    assert [p.requires_grad for p in model.parameters()] == before


def test_stages_see_what_others_switched(model):
    """The optimiser's groups are made after the plan, and switch everything on: the next call puts
    it right.
    """
    s = UnfreezeSchedule(model, PLAN)
    with s:
        groups = build_param_groups(model, dict.fromkeys(s.names, 1e-3))
        assert on(model) == {"projector", "text"}
        assert (
            s(0) == ("projector",)
            and on(model) == {"projector"}
            and [g["name"] for g in groups] == ["projector", "text"]
        )


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_a_part_that_is_frozen_again_stands_still(model, batch, keep_zeros):
    "Also where gradients are zeroed and not dropped, and with momentum and weight decay."
    s = UnfreezeSchedule(model, {0: ("projector", "text"), 0.5: "text"})
    opt = torch.optim.AdamW(
        build_param_groups(model, dict.fromkeys(s.names, 1e-3)), weight_decay=0.1
    )
    held = {}
    for k in range(4):
        s(k / 4)
        w = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(**step_inputs(batch)).loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=not keep_zeros)
        held[k] = {part_of(n) for n, p in model.named_parameters() if not torch.equal(p, w[n])}
    assert held == {0: {"projector", "text"}, 1: {"projector", "text"}, 2: {"text"}, 3: {"text"}}


@pytest.mark.parametrize(
    "plan, said",
    [
        ({0.5: "text"}, "from the start"),
        ("projector", "from the start"),
        ({}, "from the start"),
        ({0: "text", 1: "vision"}, "a stage at 1"),
        ({0: "text", 50: "vision"}, "a stage at 50"),
        ({0: "text", -0.1: "vision"}, "a stage at -0.1"),
        ({0: "text", float("nan"): "vision"}, "a stage at nan"),
        ({0: "text", "half": "vision"}, "a stage at 'half'"),
        ({0: ()}, "nothing trains from 0"),
        ({0: "projector", 0.5: ("projecter", "text")}, "Did you mean 'projector'"),
        ({0: "projector", 0.5: "language_model"}, "Did you mean 'text'"),
    ],
)
def test_senseless_plans_are_refused(model, plan, said):
    with pytest.raises(ValueError, match=said):
        UnfreezeSchedule(model, plan)
    assert on(model) == set(PARTS)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_stages_of_an_adapted_model(folders, quantize):
    m = adapted(load(folders["gemma3"], quantize=quantize)[0])
    with UnfreezeSchedule(m, {0: "projector", 0.5: ("projector", "text")}) as s:
        assert on(m) == {"projector"}
        s(0.5)
        assert on(m) == {"projector", "text"}
        assert all(
            "lora_" in n
            for n, p in m.named_parameters()
            if p.requires_grad and part_of(n) == "text"
        )


def test_picture_of_a_plan(model):
    import matplotlib.pyplot as plt

    ax = plot_unfreeze_schedule(UnfreezeSchedule(model, PLAN))
    said = [t.get_text() for t in ax.texts]
    assert len(ax.patches) == 9 and [t.get_text() for t in ax.get_yticklabels()] == [
        "text",
        "projector",
        "vision",
    ]
    assert (
        said == ["frozen", "1,108,352", "1,108,352", "16,512", "16,512", "frozen"] + ["frozen"] * 3
    )
    plt.close("all")
