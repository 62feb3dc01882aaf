"""Two families on a card: projector and LoRA training on random weights of real shape (Gemma 3 4B,
Qwen2.5-VL 3B), `fit` beside trl's SFTTrainer: tokens a second, and peak memory.

    python tests/bench/gpu_families.py                    # needs a GPU of 40 GB
    python tests/bench/gpu_families.py --only qwen --steps 30
    python tests/bench/gpu_families.py --real             # real weights too, where a cache has them
    python tests/bench/gpu_families.py --tiny             # toys on the CPU: that the script runs

Both train the same parameters on the same records, in bf16, and are timed from the third step on.
What cannot run (no GPU, no trl, no weights in the cache) is left out with a word.
"""

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import QWEN_TOKENS, byte_tokenizer, images_only, make_family
from PIL import Image
from trl_peer import build_sft_trainer

from mmkit import chat, models, training
from mmkit.chat.templates import CHAT_TEMPLATES, tiny_processor
from mmkit.planner.architectures import resolve_config

CAPTION = "A red sign with a white band and eight sides, on a grey post beside a road. "
WARM_UP = 2  # steps that are not timed
RANK = 16
REAL = dict(gemma="google/gemma-3-4b-it", qwen="Qwen/Qwen2.5-VL-3B-Instruct")


def gemma_of_real_shape():
    "Gemma 3 4B with the shipped tokenizer's ids: (configuration, processor)."
    config, processor = resolve_config("Gemma 3 4B"), tiny_processor("gemma3")
    tokenizer = processor.tokenizer
    config.image_token_id = tokenizer.image_token_id
    config.boi_token_id = tokenizer.convert_tokens_to_ids("<start_of_image>")
    config.eoi_token_id = tokenizer.convert_tokens_to_ids("<end_of_image>")
    size = config.vision_config.image_size
    image_processor = Gemma3ImageProcessorPil(size=dict(height=size, width=size))
    return config, transformers.Gemma3Processor(
        image_processor,
        tokenizer,
        processor.chat_template,
        image_seq_length=config.mm_tokens_per_image,
    )


def qwen_of_real_shape():
    "Qwen2.5-VL 3B, the numbers of its config.json: (configuration, processor)."
    text = dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
        tie_word_embeddings=True,
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        size=dict(shortest_edge=56 * 56, longest_edge=1024 * 28 * 28),
    )
    processor_class = images_only(transformers.Qwen2_5_VLProcessor)
    tokenizer = byte_tokenizer(QWEN_TOKENS, image_token="<|image_pad|>")
    return config, processor_class(
        image_processor, tokenizer, chat_template=CHAT_TEMPLATES["qwen2_vl"]
    )


SHAPES = dict(gemma=gemma_of_real_shape, qwen=qwen_of_real_shape)
TOYS = dict(gemma="gemma3", qwen="qwen2_5_vl")


def build(config, device, dtype):
    "Random weights; what transformers starts at zero is drawn, so that the image matters."
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.02)
    return model.eval()


def make_records(n, size, repeats):
    rng = np.random.default_rng(0)
    rows = [
        dict(
            id=str(i),
            image=Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)),
            caption=(f"{i}. " + CAPTION * repeats).strip(),
        )
        for i in range(n)
    ]
    return datasets.Dataset.from_list(rows)  # trl takes no list


class StepClock(transformers.TrainerCallback):
    "When each step ended, after the card has finished it."

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


def prepare(model, method):
    "The model with what the method trains switched on, as `fit` would switch it."
    if method == "lora":
        return models.add_lora(model, RANK)
    models.freeze_all_but(model, "projector")
    return model


def train_with_fit(model, processor, records, method, options):
    clock = StepClock()
    run = training.fit(
        model,
        processor,
        records,
        train=("projector",) if method == "projector" else (),
        lora=RANK if method == "lora" else None,
        learning_rate=1e-5,
        max_steps=options.steps,
        batch_size=options.batch,
        callbacks=[clock],
        show_progress=False,
        bf16=not options.tiny,
        cache_dir=options.cache_dir,
    )
    return clock, float(run.history["loss"][-1])


def train_with_trl(model, processor, records, method, options):
    clock = StepClock()
    model = prepare(model, method)
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_sft_trainer(
            model,
            records,
            chat.Collator(processor),
            folder,
            max_steps=options.steps,
            batch_size=options.batch,
            bf16=not options.tiny,
            use_cpu=options.tiny,
            processing_class=processor,
            callbacks=[clock],
        )
        output = trainer.train()
    return clock, output.training_loss


TRAINERS = {"mmkit fit": train_with_fit, "trl SFTTrainer": train_with_trl}


def measure(name, make_model, processor, records, method, options):
    "One line for each trainer; a failure is a line too."
    collator = chat.Collator(processor)
    batch = collator([records[i] for i in range(options.batch)])
    tokens_per_step = int(batch["attention_mask"].sum())
    rows = []
    for who, train in TRAINERS.items():
        row = dict(model=name, method=method, who=who)
        rows.append(row)
        if who.startswith("trl") and not importlib.util.find_spec("trl"):
            row["failed"] = "left out: trl is not installed"
            continue
        try:
            model = make_model()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            clock, row["loss"] = train(model, processor, records, method, options)
            row["tokens_per_second"] = tokens_per_step / clock.seconds_per_step()
            row["steps"] = len(clock.ends)
            has_card = torch.cuda.is_available()
            row["peak"] = torch.cuda.max_memory_allocated() if has_card else None
        except Exception as error:  # the other trainer and family are measured all the same
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def describe(row, first):
    if "failed" in row:
        return f"  {row['method']:9} {row['who']:15} {row['failed']}"
    peak = f"{row['peak'] / 1e9:6.2f} GB" if row["peak"] else "     –"
    text = (
        f"  {row['method']:9} {row['who']:15} {row['tokens_per_second']:9,.0f} tokens/s, "
        f"peak {peak}, loss {row['loss']:.3f} after {row['steps']} steps"
    )
    if row is not first and "failed" not in first:
        speed = first["tokens_per_second"] / row["tokens_per_second"]
        text += f"; {first['who']} is {speed:.2f}× as fast"
        if row["peak"]:
            text += f" with {first['peak'] / row['peak']:.2f}× the memory"
    return text


def list_models(options, device, dtype):
    "Yields (name, function that makes the model, processor)."
    for name in options.only:
        if options.tiny:
            toy = TOYS[name]
            yield (
                f"{toy}, a toy",
                lambda toy=toy: make_family.__wrapped__(toy)[0],
                make_family(toy)[1],
            )
            continue
        config, processor = SHAPES[name]()
        shape = f"{REAL[name]}'s shape, random weights"
        yield shape, lambda config=config: build(config, device, dtype), processor
        if options.real:
            try:
                load = dict(dtype=dtype, local_files_only=True)
                _, processor = models.load(REAL[name], **load)
            except Exception as error:
                print(f"{REAL[name]}: left out, no weights in the cache ({type(error).__name__})")
                continue
            yield (
                REAL[name],
                lambda name=name, load=load: models.load(REAL[name], **load)[0],
                processor,
            )


def main():
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--tiny", action="store_true", help="toys on the CPU")
    ask.add_argument("--real", action="store_true", help="real weights too, from the local cache")
    ask.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    ask.add_argument("--methods", nargs="+", choices=("projector", "lora"), default=None)
    ask.add_argument("--steps", type=int, default=12)
    ask.add_argument("--batch", type=int, default=4)
    ask.add_argument("--size", type=int, default=448, help="pixels of a side of the images")
    ask.add_argument("--out", default=None, help="a JSON file for the lines")
    options = ask.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    if device == "cpu" and not options.tiny:
        print("left out: there is no GPU here; --tiny runs toys on the CPU")
        return
    if options.steps <= WARM_UP:
        sys.exit(f"--steps {options.steps}: the first {WARM_UP} are not timed, give more")
    if options.tiny:
        options.size, options.batch = 32, 2
    dtype = torch.float32 if options.tiny else torch.bfloat16
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, toys: no figures of a card"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}")
    records = make_records(2 * options.batch, options.size, 1 if options.tiny else 5)
    rows = []
    with tempfile.TemporaryDirectory() as options.cache_dir:
        for name, make_model, processor in list_models(options, device, dtype):
            print(f"{name}: batches of {options.batch}, images of {options.size} pixels")
            for method in options.methods or ("projector", "lora"):
                measured = measure(name, make_model, processor, records, method, options)
                rows += measured
                for row in measured:
                    print(describe(row, measured[0]), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
