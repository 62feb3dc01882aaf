"""The planner on a card: Gemma 3 4B's real shape with random weights, LoRA and QLoRA, with and
without checkpointing, `torch.cuda.max_memory_allocated` beside the plan; then
tokens a second and peak of mmkit's step beside TRL's SFTTrainer, if trl is installed: same
weights, batch, precision and run.

    python tests/bench/gpu_planner.py --out gpu.json          # needs a GPU of 40 GB or more (20
    GB with --batch 1)
    python tests/bench/gpu_planner.py --tiny --out tiny.json  # a toy on the CPU, to see that the
    script runs; its figures say nothing about a card
"""

import argparse
import datetime
import gc
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
from trl_peer import build_sft_trainer

from mmkit import losses, models, training
from mmkit.chat.templates import tiny_processor
from mmkit.models.modes import disable_cpu_repack
from mmkit.models.parts import numel_and_nbytes
from mmkit.models.quantization import build_quantization_config
from mmkit.planner.architectures import resolve_config
from mmkit.planner.memory import measure_peak_memory
from mmkit.planner.plan import plan_training


def toy():  # what --tiny runs
    c = models.tiny_random_model("gemma3", hidden_size=128, vocab_size=1024).config
    t = c.get_text_config()
    t.num_hidden_layers, t.layer_types = (
        4,
        ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )
    return c


def fresh(config, method, folder, dev, dtype):
    """The model with random weights, as the method trains it.

    4-bit weights are quantised while loading, from a folder that was written once.
    """
    torch.manual_seed(0)
    m = disable_cpu_repack(
        transformers.AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": dev},
            **(dict(quantization_config=quantizer(config, dtype)) if method == "qlora" else {}),
        )
    )
    with torch.no_grad():
        m.model.multi_modal_projector.mm_input_projection_weight.normal_(0, 0.02)
    m.train().requires_grad_(False)
    return models.add_lora(m, 16)


def quantizer(config, dtype):
    c = type(config).from_dict(config.to_dict())
    c.dtype = dtype
    return build_quantization_config(
        "nf4", transformers.AutoModelForImageTextToText, c, dict(dtype=dtype)
    )


def batch_of(config, B, T, graded, dev, dtype):
    v, P, seat = config.vision_config, config.mm_tokens_per_image, config.image_token_id
    ids = torch.randint(6, 1000 if config.get_text_config().vocab_size > 1000 else 100, (B, T))
    ids[:, 1 : 1 + P] = seat
    labels = ids.clone()
    labels[:, : T - graded] = -100
    px = torch.randn(B, 3, v.image_size, v.image_size, dtype=dtype)
    return {
        k: x.to(dev)
        for k, x in dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=(ids == seat).long(),
            pixel_values=px,
            labels=labels,
        ).items()
    }


def ours(m, batch, amp):
    def step():
        with training.fast_gemma3_forward(m), amp():
            training.compute_losses(m, batch, losses.LossWeights())["ce"].backward()

    return step


def own(m, batch, amp):
    def step():
        with amp():
            loss = m(**batch, use_cache=False).loss
        loss.backward()

    return step


def time_trl(model, batch, num_steps, bf16):
    "Seconds of SFTTrainer on rows that are tokenised already, so that only its step is timed."
    batch_size = len(batch["input_ids"])
    rows = datasets.Dataset.from_dict(dict(row=list(range(batch_size)) * num_steps))

    def collate(examples):
        chosen = [example["row"] for example in examples]
        return {name: values[chosen].cpu() for name, values in batch.items()}

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_sft_trainer(
            model,
            rows,
            collate,
            folder,
            max_steps=num_steps,
            batch_size=batch_size,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            processing_class=tiny_processor("gemma3"),  # TRL wants one; the rows need none
        )
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


def timed(step, m, steps, dev):
    "Seconds of `steps` passes with their optimiser steps, after one to warm up."
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], fused=True)

    def once():
        step()
        opt.step()
        opt.zero_grad()

    once()
    if dev != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        once()
    if dev != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def held(m):
    return sum(numel_and_nbytes(p)[1] for p in m.parameters())


def main():
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--tiny", action="store_true")
    ask.add_argument("--out", default="gpu_planner.json")
    ask.add_argument("--batch", type=int, default=4)
    ask.add_argument("--length", type=int, default=600)
    ask.add_argument("--graded", type=int, default=128)
    ask.add_argument("--steps", type=int, default=10)
    a = ask.parse_args()
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    if dev == "cpu" and not a.tiny:
        sys.exit("there is no GPU here; --tiny runs a toy on the CPU")
    config, dtype, precision = (
        (toy(), torch.float32, "fp32")
        if a.tiny
        else (resolve_config("Gemma 3 4B"), torch.bfloat16, "bf16")
    )
    B, T, graded, steps = (2, 60, 12, 2) if a.tiny else (a.batch, a.length, a.graded, a.steps)

    def amp():
        return torch.autocast(dev, torch.bfloat16, enabled=not a.tiny)

    name = torch.cuda.get_device_name() if dev == "cuda" else "CPU"
    out = dict(
        gpu=name,
        tiny=a.tiny,
        model="toy" if a.tiny else "Gemma 3 4B, random weights",
        batch=B,
        sequence_length=T,
        num_loss_tokens=graded,
        precision=precision,
        torch=torch.__version__,
        transformers=transformers.__version__,
        date=str(datetime.date.today()),
        memory=[],
        speed=[],
    )
    transformers.utils.logging.disable_progress_bar()
    print(f"{name}, {out['model']}, {B} rows of {T} tokens, {precision}")
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(dev):
            made = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
        made.save_pretrained(folder)
        del made
        gc.collect()
        batch = batch_of(config, B, T, graded, dev, dtype)
        for method in ("lora", "qlora"):
            for checkpointing in (False, True):
                for tiled in (False, True):
                    m = fresh(config, method, folder, dev, dtype)
                    if checkpointing:
                        models.unwrap_model(m).activation_checkpointing_enable(
                            dict(use_reentrant=False)
                        )
                    step = (ours if tiled else own)(m, batch, amp)
                    step()
                    m.zero_grad()
                    still = held(m)
                    top = measure_peak_memory(step)
                    got = still + top
                    p = plan_training(
                        config,
                        method,
                        B,
                        T,
                        rank=16,
                        optimizer="sgd",
                        overhead_bytes=0,
                        precision=precision,
                        num_loss_tokens=graded,
                        gradient_checkpointing=checkpointing,
                        memory_efficient_loss=tiled,
                    )
                    out["memory"].append(
                        dict(
                            method=method,
                            gradient_checkpointing=checkpointing,
                            memory_efficient_loss=tiled,
                            held=still,
                            measured=got,
                            planned=p.peak,
                            error=p.peak / got - 1,
                        )
                    )
                    print(
                        f"  {method:6}{' checkpointing' if checkpointing else '':14}"
                        f"{' tiled' if tiled else '':6}"
                        f" {got / 1e9:8.3f} GB measured, {p.peak / 1e9:8.3f} planned"
                        f" ({p.peak / got - 1:+.1%}; wanted: 10%)",
                        flush=True,
                    )
                    del m, step
                    gc.collect()
                    torch.cuda.empty_cache() if dev == "cuda" else None
        for method in ("lora", "qlora"):
            m = fresh(config, method, folder, dev, dtype)
            with torch.no_grad():
                patches = (
                    models.unwrap_model(m)
                    .model.vision_tower(pixel_values=batch["pixel_values"])
                    .last_hidden_state
                )
            cached = {k: v for k, v in batch.items() if k != "pixel_values"} | dict(
                features=models.pool_patches(m, patches)
            )
            del patches
            for who, step in (
                ("mmkit, features cached", ours(m, cached, amp)),
                ("the model's own loss", own(m, batch, amp)),
            ):
                seconds = timed(step, m, steps, dev)
                m.zero_grad()
                top = held(m) + measure_peak_memory(step)
                m.zero_grad()
                out["speed"].append(
                    dict(
                        method=method, who=who, tokens_per_second=B * T * steps / seconds, peak=top
                    )
                )
            if importlib.util.find_spec("trl"):
                try:
                    if dev == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    base = m.merge_and_unload() if method == "lora" else None
                    del m
                    gc.collect()
                    m = fresh(config, method, folder, dev, dtype)
                    del base
                    if dev == "cuda":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    time_trl(m, batch, 1, not a.tiny)
                    seconds = time_trl(m, batch, steps, not a.tiny)
                    out["speed"].append(
                        dict(
                            method=method,
                            who="trl SFTTrainer",
                            tokens_per_second=B * T * steps / seconds,
                            peak=torch.cuda.max_memory_allocated() if dev == "cuda" else None,
                        )
                    )
                except Exception as e:
                    out["speed"].append(
                        dict(
                            method=method,
                            who="trl SFTTrainer",
                            failed=f"{type(e).__name__}: {e}"[:300],
                        )
                    )
            else:
                out["speed"].append(
                    dict(method=method, who="trl SFTTrainer", failed="trl is not installed")
                )
            mine = out["speed"][-3]
            for r in out["speed"][-3:]:
                ratio = (
                    f" ({mine['tokens_per_second'] / r['tokens_per_second']:.2f}× the tokens/s for"
                    f" mmkit, {mine['peak'] / r['peak']:.2f}× the memory; wanted beside trl: 1.3×"
                    " and 0.8×)"
                    if r is not mine and r.get("peak")
                    else ""
                )
                print(
                    f"  {method:6} {r['who']:24} "
                    + (
                        r["failed"]
                        if "failed" in r
                        else (
                            f"{r['tokens_per_second']:,.0f} tokens/s, peak"
                            f" {(r['peak'] or 0) / 1e9:.3f} GB{ratio}"
                        )
                    ),
                    flush=True,
                )
            del m
            gc.collect()
    Path(a.out).write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {a.out}")


if __name__ == "__main__":
    main()
