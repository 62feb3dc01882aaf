"""What the shipped base learns of words that it does not know: README's first hour on 400 drawn
traffic signs, the class and the caption right with its own, a shuffled and a blank image.

    python tests/bench/bench_first_hour.py             # 400 + 400 steps, ten minutes on two cores
    python tests/bench/bench_first_hour.py --steps 20  # to see that it runs
"""

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from signs import write_signs

from mmkit import data, evaluate, models, training

SEED = int(os.environ.get("MMKIT_SEED", 0))
ASK = "Describe this sign."


def report(name, model, processor, records):
    "One line a measure: its own image, and two controls."
    for condition in ("original", "shuffled", "blank"):
        captions = evaluate.generate(
            model, processor, records, ASK, image_condition=condition, show_progress=False
        )
        scores = evaluate.score_captions(records, captions)
        for measure in ("accuracy", "balanced_accuracy"):
            print(f"{name}, {condition} image: {measure} {scores.impression[measure]}")
        for measure in ("exact match", "word F1"):
            print(f"{name}, {condition} image: {measure} {scores.free.value(measure)}", flush=True)
    likelihood = evaluate.score_free_captions(records, captions, model, processor, ASK)
    print(
        f"{name}: loss {likelihood.value('loss')}, with shuffled images "
        f"{likelihood.control('loss')}, difference {likelihood.difference('loss'):+.2f}",
        flush=True,
    )


def main():
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--steps", type=int, default=400, help="of each of the three trainings")
    ask.add_argument("--signs", type=int, default=400)
    steps, num_signs = vars(ask.parse_args()).values()
    with tempfile.TemporaryDirectory() as folder:
        records, _ = data.load_table(write_signs(folder, num_signs, SEED))
        splits = data.split_records(records, sizes=(0.6, 0.1, 0.3), seed=SEED)
        train, test = splits["train"], splits["test"]
        print(f"{len(train)} signs to train, {len(test)} to test; guessing: accuracy 0.33")
        model, processor = models.load("base")
        budget = dict(prompt=ASK, max_steps=steps, seed=SEED, show_progress=False)
        report("untrained", model, processor, test)
        parts = dict(train=("projector",))
        projector = training.fit(model, processor, train, **parts, **budget).model
        report(f"projector, {steps} steps", projector, processor, test)
        twin = copy.deepcopy(projector)
        longer = training.fit(twin, processor, train, **parts, **budget).model
        report(f"projector, {steps} + {steps} steps", longer, processor, test)
        tuned = training.fit(projector, processor, train, **parts, lora=8, **budget).model
        report(f"projector, then projector and LoRA, {steps} steps each", tuned, processor, test)


if __name__ == "__main__":
    main()
