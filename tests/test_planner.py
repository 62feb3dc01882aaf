"A plan against what layers, optimisers and steps really hold; suggestions, refusals, arithmetic."

import copy
import math
from dataclasses import replace

import pytest
import torch
import transformers
from families import MAKERS, make_family

from mmkit import losses, models, training
from mmkit.core.claims import Claim, load_claim
from mmkit.models.families import find_family
from mmkit.models.parts import numel_and_nbytes
from mmkit.planner.advice import advise_by_data_size, compare_methods, suggest_changes
from mmkit.planner.architectures import (
    get_image_seq_length,
    init_empty_model,
    layer_kinds,
    layer_stacks,
    resolve_config,
    shorten_stack,
)
from mmkit.planner.memory import MemoryTracker, measure_peak_memory, memory_levels
from mmkit.planner.methods import (
    OPTIMIZER_STATE_BYTES,
    TRAINING_METHODS,
    build_meta_model,
    count_static_memory,
    quantization_constant_bytes,
)
from mmkit.planner.plan import GPUS, kv_cache_bytes, plan_training
from mmkit.planner.plots import MEMORY_COLOURS, plot_memory_timeline, plot_plans
from mmkit.planner.trace import trace_step

FAMILIES = ("gemma3", "mllama", "llava", "qwen2_vl")


def config_of(family, layers=None, towers=None, width=64, vocab=128):
    "A tiny configuration of the family, with more layers where wanted."
    c = copy.deepcopy(models.tiny_random_model(family, hidden_size=width, vocab_size=vocab).config)
    t, v = c.get_text_config(), c.vision_config
    if layers:
        t.num_hidden_layers = layers
        if family == "mllama":
            t.cross_attention_layers = list(range(1, layers, 3))
        if getattr(t, "layer_types", None):
            t.layer_types = [
                (
                    ("sliding_attention", "full_attention")[i % 3 == 2]
                    if family == "gemma3"
                    else "full_attention"
                )
                for i in range(layers)
            ]
    if towers:
        setattr(v, "depth" if family == "qwen2_vl" else "num_hidden_layers", towers)
    return c


def length_of(c):
    return get_image_seq_length(c, 32) + 20


# --- shapes
@pytest.mark.parametrize(
    "name,published",
    [
        ("Gemma 3 4B", 4_300_079_472),
        ("Gemma 3 12B", 12_187_325_040),
        ("Gemma 3 27B", 27_432_406_640),
        ("LLaVA 1.5 7B", 7_063_427_072),
        ("Qwen2-VL 2B", 2_208_985_600),
        ("Qwen2-VL 7B", 8_291_375_616),
        ("Llama 3.2 Vision 11B", 10_670_220_835),
        ("Llama 3.2 Vision 90B", 88_593_355_323),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, published):
    m = init_empty_model(resolve_config(name))
    assert sum(p.numel() for p in m.parameters()) == published and all(
        p.is_meta for p in m.parameters()
    )


def test_shape_takes_names_configurations_and_models():
    m = models.tiny_random_model("llava")
    assert (
        resolve_config(m) is m.config
        and resolve_config(m.config) is m.config
        and resolve_config("Gemma 3 4B").text_config.hidden_size == 2560
    )
    with pytest.raises(ValueError, match="vision_config"):
        resolve_config(transformers.LlamaConfig())


# --- what never moves
@pytest.mark.parametrize("method", ("full", "projector", "lora"))
def test_static_bytes_are_those_of_real_tensors(method):
    m = models.tiny_random_model("gemma3").requires_grad_(method == "full")
    if method == "lora":
        m = models.add_lora(m, 4)
    if method == "projector":
        models.freeze_all_but(m, "projector")
    got = count_static_memory(
        build_meta_model(
            models.tiny_random_model("gemma3").config, method, rank=4, precision="fp32"
        )
    )
    on = [p for p in m.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(on, fused=True)
    for p in on:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert got["weights"] + got["adapters"] == sum(p.nbytes for p in m.parameters()) and got[
        "trained"
    ] == sum(p.numel() for p in on)
    assert got["gradients"] == sum(p.grad.nbytes for p in on) and got["optimizer"] == sum(
        t.nbytes for s in opt.state.values() for t in s.values()
    )


def test_constants_are_those_of_bitsandbytes():
    import bitsandbytes as bnb

    for rows, columns in ((64, 64), (64, 128), (128, 512), (1024, 4096)):
        w = bnb.nn.Params4bit(
            torch.randn(rows, columns),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
        ).to("cpu")
        assert numel_and_nbytes(w)[1] == rows * columns // 2 + quantization_constant_bytes(
            rows * columns
        )


def test_states_in_8_bits():
    big, small = torch.empty(64, 128), torch.empty(4095)
    assert (
        OPTIMIZER_STATE_BYTES["adamw_8bit"](big) == 2 * (8192 + 4 * 32)
        and OPTIMIZER_STATE_BYTES["adamw_8bit"](small) == 8 * 4095
    )
    assert (
        OPTIMIZER_STATE_BYTES["sgd"](big) == 0
        and OPTIMIZER_STATE_BYTES["momentum"](big) == big.nbytes
    )


def test_bottlenecks_count_their_own_parameters():
    c = config_of("gemma3")
    got = count_static_memory(build_meta_model(c, "adapters", bottleneck_size=16, precision="fp32"))
    assert (
        got["trained"] == 2 * 2 * (2 * 64 * 16 + 16 + 64) and got["adapters"] == 4 * got["trained"]
    )  # two layers, two adapters each


# --- Live
def test_live_counts_storages_once_and_lets_them_go():
    x = torch.ones(1000)
    with MemoryTracker([x]) as live:
        y = x * 2
        v = y.view(10, 100)
        live.end_segment("made")
        del y
        assert live.current_bytes == 4000
        del v
        assert live.current_bytes == 0
        live.end_segment("gone")
    assert [(s["up"], s["net"]) for s in live.segments] == [(4000, 4000), (0, -4000)]


def test_live_counts_flops_of_products_and_attention():
    a, b, q = torch.ones(3, 5), torch.ones(5, 7), torch.ones(1, 2, 8, 16)
    with MemoryTracker([a, b, q]) as live:
        a @ b
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        live.end_segment("x")
    assert live.segments[0]["flops"] == 2 * 3 * 5 * 7 + 2 * 2 * (2 * 8 * 8 * 16)


def test_live_and_the_profiler_agree_on_a_real_step():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(6)], torch.nn.GELU())
    x = torch.randn(64, 256)

    def step():
        net(x).square().sum().backward()

    step()
    net.zero_grad()
    got = measure_peak_memory(step)
    net.zero_grad()
    with MemoryTracker([x, *net.parameters()]) as live:
        step()
        live.end_segment("x")
    assert abs(live.segments[0]["up"] / got - 1) < 0.02


# --- the rehearsal
@pytest.mark.parametrize("family", FAMILIES)
def test_few_layers_say_what_all_say(family):
    c = config_of(family, layers=7, towers=5)
    for kw in (
        dict(method="full"),
        dict(method="lora", gradient_checkpointing=True),
        dict(method="projector"),
    ):
        (a, _), (b, _) = (
            trace_step(
                c, batch_size=2, sequence_length=length_of(c), image_size=32, shorten=k, **kw
            )
            for k in (True, False)
        )
        # A mask more; in Mllama the first cross-attention layer has nothing to send back when
        # nothing below it trains.
        room = (0.02, 0.07) if family == "mllama" else (0.005, 0.0)
        assert (
            abs(max(memory_levels(a)[1]) / max(memory_levels(b)[1]) - 1) <= room[0]
            and abs(sum(g["flops"] for g in a) / sum(g["flops"] for g in b) - 1) <= room[1]
        ), kw


def test_few_and_kinds():
    assert (
        shorten_stack(list("aaaaaa")) == list("aaa")
        and shorten_stack(list("ab")) == list("ab")
        and shorten_stack(list("aabaabaa")) == list("aaba")
    )
    assert layer_kinds(config_of("mllama", layers=7))[-1] == [
        "early",
        "cross",
        "self",
        "self",
        "cross",
        "self",
        "self",
    ]
    for f in FAMILIES:
        assert [len(s) for s in layer_stacks(init_empty_model(config_of(f, 7, 5)))] == [
            len(s) for s in layer_kinds(config_of(f, 7, 5))
        ]


def real_step(m, B, T, tiled=False, graded=8):
    c = m.config if not hasattr(m, "peft_config") else models.unwrap_model(m).config
    P = c.mm_tokens_per_image
    ids = torch.randint(6, 100, (B, T))
    ids[:, 1 : 1 + P] = c.image_token_id
    labels = ids.clone()
    labels[:, : T - graded] = -100
    v = c.vision_config
    b = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=(ids == c.image_token_id).long(),
        pixel_values=torch.randn(B, 3, v.image_size, v.image_size),
        labels=labels,
    )

    def step():
        if not tiled:
            return m(**b, use_cache=False).loss.backward()
        with training.fast_gemma3_forward(m):
            training.compute_losses(m, b, losses.LossWeights())["ce"].backward()

    return step


@pytest.mark.parametrize(
    "method,checkpointing,tiled",
    [
        ("full", False, False),
        ("full", True, False),
        ("lora", False, True),
        ("lora", True, False),
        ("projector", False, False),
    ],
)
def test_peak_within_15_percent_of_the_profilers(method, checkpointing, tiled):
    torch.manual_seed(0)
    B, T, graded = 4, 96, 24
    c = config_of("gemma3", layers=5, towers=3, width=128, vocab=4096)
    m = transformers.Gemma3ForConditionalGeneration(c).train().requires_grad_(method == "full")
    if method == "lora":
        m = models.add_lora(m, 8)
    if method == "projector":
        models.freeze_all_but(m, "projector")
    if checkpointing:
        m.activation_checkpointing_enable(dict(use_reentrant=False))
    step = real_step(m, B, T, tiled, graded)
    step()
    m.zero_grad()
    got = sum(p.nbytes for p in m.parameters()) + measure_peak_memory(step)
    p = plan_training(
        c,
        method,
        B,
        T,
        optimizer="sgd",
        overhead_bytes=0,
        precision="fp32",
        gradient_checkpointing=checkpointing,
        memory_efficient_loss=tiled,
        num_loss_tokens=graded,
    )
    assert abs(p.peak / got - 1) < 0.15, (p.peak, got, p.memory)


def test_accumulation_keeps_gradients_beside_activations():
    c = config_of("gemma3", layers=5)
    one, four = (
        plan_training(
            c, "full", 2, 40, overhead_bytes=0, precision="fp32", gradient_accumulation_steps=k
        )
        for k in (1, 4)
    )
    assert (
        four.memory["gradients"] == four.static_memory["gradients"]
        and four.peak > one.peak
        and math.isclose(four.flops, 4 * one.flops)
    )


def test_checkpointing_trades_memory_for_flops():
    c = config_of("gemma3", layers=9)
    a, b = (
        plan_training(c, "lora", 4, 60, overhead_bytes=0, gradient_checkpointing=k)
        for k in (False, True)
    )
    assert b.memory["activations"] < a.memory["activations"] and 1.2 < b.flops / a.flops < 1.6


def test_tiled_loss_and_cached_features_save():
    c = config_of("gemma3", vocab=50_000)
    a, b = (
        plan_training(
            c, "lora", 4, 60, overhead_bytes=0, memory_efficient_loss=k, num_loss_tokens=8
        )
        for k in (False, True)
    )
    assert b.memory["logits"] < a.memory["logits"] / 2
    assert (
        plan_training(c, "projector", 4, 60, cached_features=True).flops
        < plan_training(c, "projector", 4, 60).flops
    )


# --- the plan
def test_kinds_sum_to_the_peak_and_have_colours():
    for method in TRAINING_METHODS:
        p = plan_training(config_of("llava"), method, 2, 40, overhead_bytes=5)
        assert (
            math.isclose(p.peak, sum(p.memory.values()))
            and set(p.memory) <= set(MEMORY_COLOURS)
            and p.memory["overhead"] == 5
            and all(b >= 0 for b in p.memory.values())
        ), method


def test_time_and_cost_follow_from_what_is_stated():
    a = plan_training(
        config_of("gemma3"),
        "full",
        2,
        40,
        gpu=(1e9, 1e12),
        mfu=0.5,
        num_examples=100,
        price_per_gpu_hour=3.0,
    )
    assert (
        math.isclose(a.seconds, a.flops / 5e11)
        and math.isclose(a.hours, a.seconds * 50 / 3600)
        and math.isclose(a.cost, a.hours * 3)
    )
    b = plan_training(
        config_of("gemma3"),
        "full",
        2,
        40,
        gpu=(1e9, 1e12),
        num_gpus=4,
        mfu=0.5,
        num_examples=100,
        price_per_gpu_hour=3.0,
    )
    assert math.isclose(b.hours, a.hours / 4) and math.isclose(b.cost, a.cost)


def test_a_card_must_hold_the_model_before_it_is_sharded():
    c = config_of("gemma3", layers=8)
    plan = plan_training(c, "lora", 1, 20, overhead_bytes=0, num_gpus=64)
    plan = replace(plan, memory=plan.memory | dict(logits=0, activations=0))  # as of a large model
    whole = plan.static_memory["weights"] + plan.static_memory["adapters"]
    assert plan.peak < plan.loading_peak == whole
    between = (plan.peak + plan.loading_peak) / 2
    assert not plan.fits((between, 1e12)) and plan.fits((plan.loading_peak, 1e12))
    assert "before it is sharded" in str(plan.table())
    alone = plan_training(c, "lora", 1, 20, overhead_bytes=0)
    assert alone.fits((alone.peak, 1e12)) and "sharded" not in str(alone.table())


def test_fsdp_cuts_what_it_cuts():
    c = config_of("gemma3", layers=8)
    a, b = (plan_training(c, "full", 2, 40, overhead_bytes=0, num_gpus=k) for k in (1, 8))
    for k in ("weights", "optimizer"):
        assert math.isclose(b.memory[k] * 8, a.memory[k])
    assert (
        b.memory["activations"] == a.memory["activations"]
        and "gathered" not in a.memory
        and b.memory["gathered"] > 0
    )


def test_fits_and_cards():
    p = plan_training(config_of("gemma3"), "lora", 2, 40, gpu=(1e12, 1e12))
    assert (
        p.fits()
        and not p.fits((1e6, 1e12))
        and p.fits("H200")
        and all(m > 1e10 and f > 1e13 for m, f in GPUS.values())
    )
    with pytest.raises(ValueError, match="RTX 4090"):
        p.fits("RTX 4O90")


def test_mend_stops_at_the_first_that_fits_and_every_line_is_a_plan():
    c = config_of("gemma3", layers=6, vocab=8192)
    p = plan_training(c, "full", 8, 64, overhead_bytes=0, precision="fp32")
    for room in (0.9, 0.5, 0.2):
        q = plan_training(
            c, "full", 8, 64, overhead_bytes=0, precision="fp32", gpu=(p.peak * room, 1e12)
        )
        rows = suggest_changes(q).rows
        assert rows[-1][3] == "fits" and all(r[3] == "–" for r in rows[:-1])
    assert (
        len(
            suggest_changes(
                plan_training(
                    c, "full", 8, 64, overhead_bytes=0, precision="fp32", gpu=(p.peak * 2, 1e12)
                )
            ).rows
        )
        == 1
    )


def test_mend_keeps_the_rows_of_a_step():
    c = config_of("gemma3", layers=6)
    p = plan_training(c, "lora", 4, 40, gpu=(1e4, 1e12), overhead_bytes=0)
    assert any("batch 1, 4 passes" in r[0] for r in suggest_changes(p).rows)


def test_mend_leaves_out_what_does_not_help():
    c = config_of("gemma3", layers=6)
    tight = dict(
        gpu=(1e4, 1e12), overhead_bytes=0, memory_efficient_loss=True, gradient_checkpointing=True
    )
    whole, halved = (
        plan_training(c, "full", 2, 24, **tight),
        plan_training(c, "full", 1, 24, gradient_accumulation_steps=2, **tight),
    )
    assert halved.peak > whole.peak and "LoRA" in suggest_changes(whole).rows[1][0]


@pytest.mark.parametrize("family", ("gemma3", "llava", "qwen2_vl"))
def test_cache_is_that_of_a_real_answer(family):
    m = models.tiny_random_model(family).model.language_model
    with torch.no_grad():
        kept = m(inputs_embeds=torch.randn(2, 9, 64), use_cache=True).past_key_values
    assert kv_cache_bytes(models.tiny_random_model(family).config, 2, 9, "fp32") == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in kept.layers
    )


def test_a_window_bounds_the_cache_of_sliding_layers():
    c = config_of("gemma3", layers=6)
    c.get_text_config().sliding_window = 8
    assert kv_cache_bytes(c, 1, 100) == 2 * 2 * 2 * 32 * (4 * 7 + 2 * 100)


def test_generating_trains_nothing():
    p = plan_training(config_of("gemma3"), "generate", 2, 40, overhead_bytes=0)
    assert (
        set(p.memory) == {"weights", "logits", "cache", "overhead"}
        and p.static_memory["trained"] == 0
    )


def test_choose_says_what_was_measured_and_where_nothing_was(monkeypatch):

    c, c23 = config_of("gemma3"), load_claim("C23")
    for data, near, rule in (
        (0, 50, "API"),
        (90, 50, "API"),
        (110, 200, "API"),
        (3200, 3200, "API"),
        (20_000, 3200, "PEFT"),
        (200_000, 3200, "full fine-tuning"),
    ):
        last = compare_methods(c, data, num_tasks=3, expect_drift=True, sequence_length=40).rows[
            -1
        ][-1]
        assert (
            f"say {rule} (C23" in last
            and f"Toy base, {near:,} pairs" in last
            and ("nothing was measured" in last) == (data > 3200)
        )
        for m in ("head", "LoRA", "full"):
            assert f"{m} {c23.interval(f'{m}, {near} pairs', 'macro-F1'):.2f}" in last
        assert (
            f"untrained {c23.interval('untrained base', 'macro-F1'):.2f}" in last
            and "ahead of LoRA from 200 pairs on" in last
        )
    rows = [
        dict(
            r,
            values=[v - (0.1 if r["condition"] == "full, 3200 pairs" else 0) for v in r["values"]],
        )
        for r in c23["rows"]
    ]  # ahead in the middle is not ahead from there on
    with monkeypatch.context() as patch:
        patch.setattr("mmkit.planner.advice.load_claim", lambda name: Claim(c23, rows=rows))
        assert "at the largest size full fine-tuning is not ahead" in advise_by_data_size(100)
    rows = {r[0]: r for r in compare_methods(c, 100, sequence_length=40).rows}
    for m, arm in (("lora", "LoRA"), ("adapters", "Houlsby"), ("full", "full")):
        assert rows[m][4:6] in (
            [
                load_claim("C15").interval(arm, "macro-F1"),
                load_claim("C17").interval(arm, "kept: generic answers"),
            ],
            (
                load_claim("C15").interval(arm, "macro-F1"),
                load_claim("C17").interval(arm, "kept: generic answers"),
            ),
        )


# --- refusals and pictures
@pytest.mark.parametrize(
    "kw,said",
    [
        (dict(method="lorra"), "'lora'"),
        (dict(optimizer="adam"), "'adamw'"),
        (dict(checkpointing=True), "'gradient_checkpointing'"),
        (dict(precision="fp16"), "'bf16'"),
        (dict(sequence_length=3), "larger sequence_length"),
        (dict(gpu="H100"), "H100 80GB"),
    ],
)
def test_refusals_name_the_mend(kw, said):
    with pytest.raises(ValueError, match=said):
        plan_training(config_of("gemma3"), **{"sequence_length": 40, **kw}).fits()


def test_unknown_shape_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'Gemma 3 12B'"):
        plan_training("Gemma 3 12")


def test_pictures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = plan_training(config_of("gemma3", layers=5), "full", 2, 40)
    ax = plot_memory_timeline(p)
    assert len(ax.patches) >= len(p.timeline)
    plt.close(ax.figure)
    ax = plot_plans({"a": p, "b": p})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    plt.close(ax.figure)
    assert "together" in p._repr_html_() and "TFLOP" in repr(p)


PLANNED = [name for name in MAKERS if name not in ("blip2", "instructblip", "clip", "siglip")]


@pytest.mark.parametrize("name", PLANNED)
def test_every_family_is_planned_from_its_own_configuration(name):
    model, _ = make_family(name)
    num_tokens = find_family(model).num_image_tokens(model.config, 32, 32)
    assert get_image_seq_length(model.config, 32) == num_tokens
    options = dict(precision="fp32", image_size=32, overhead_bytes=0)
    short, long = (plan_training(model, "full", 1, num_tokens + n, **options) for n in (20, 220))
    assert short.static_memory["parameters"] == sum(p.numel() for p in model.parameters())
    assert short.memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert short.peak < long.peak and 0 < short.flops < long.flops
    assert plan_training(model, "lora", 1, num_tokens + 20, **options).peak < short.peak


@pytest.mark.parametrize("name", ["blip2", "clip", "GPT-4o", "Phi-3 Vision"])
def test_what_is_not_planned_is_said(name):
    model = make_family(name)[0] if name in MAKERS else name
    with pytest.raises(ValueError, match="is not planned|no weights to plan|no class of its own"):
        plan_training(model)
