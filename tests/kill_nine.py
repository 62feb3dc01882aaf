"""Kill a training run with signal 9 at a random moment, call it again, compare: `python
tests/kill_nine.py 20`.

Every round must end with the very weights and losses of a run that was never stopped. `make test`
runs one round.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

RUN = """
import sys
import torch
from mmkit import models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs

torch.set_num_threads(1)
output_dir, result, max_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, processor = models.load("base")
run = training.fit(
    model,
    processor,
    load_melanoma_pairs(n=24, seed=3, masks=False),
    train={0: "projector", 0.4: ("projector", "text")},
    lora=dict(rank=4, lora_dropout=0.1),
    max_steps=max_steps,
    batch_size=4,
    seed=2,
    show_progress=False,
    output_dir=None if output_dir == "-" else output_dir,
    save_steps=3,
)
weights = {n: p.detach() for n, p in models.unwrap_model(run.model).named_parameters()}
torch.save((weights, run.history["loss"]), result)
"""
STEPS = 24


def call(folder, out, result):
    script = Path(folder) / "run.py"
    script.write_text(RUN)
    return [sys.executable, str(script), str(out), str(Path(folder) / result), str(STEPS)]


def environment():
    return {**os.environ, "MMKIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}


def finish(command):
    subprocess.run(command, check=True, env=environment(), capture_output=True, timeout=600)


def one_round(folder, dice) -> bool:  # the same weights and losses, bit by bit?
    """Start a run, kill it once a random number of steps is on disk (in the middle of a save,
    perhaps), go on, compare with folder/whole.pt.
    """
    out = Path(tempfile.mkdtemp(dir=folder))
    command = call(folder, out, "pieces.pt")
    while True:
        p = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        want = dice.randrange(0, STEPS - 6)

        def on_disk():
            return max(
                [int(f.parent.name[11:]) for f in out.glob("checkpoint-*/trained.safetensors")],
                default=0,
            )

        while p.poll() is None and on_disk() < want:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.2)
        if p.poll() is None:
            break  # still alive: kill it. Else it was too quick, and the next round starts anew
        out = Path(tempfile.mkdtemp(dir=folder))
        command = call(folder, out, "pieces.pt")
    p.send_signal(signal.SIGKILL)
    p.wait()
    at = on_disk()
    finish(command)
    (w1, l1), (w2, l2) = (
        torch.load(Path(folder) / f, weights_only=False) for f in ("whole.pt", "pieces.pt")
    )
    same = (
        np.array_equal(l1, l2) and len(l2) == STEPS and all(torch.equal(w1[n], w2[n]) for n in w1)
    )
    print(f"killed with step {at} on disk: {'identical' if same else 'DIFFERENT'}", flush=True)
    return same


if __name__ == "__main__":
    rounds, dice = int(sys.argv[1]) if sys.argv[1:] else 20, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        finish(call(folder, "-", "whole.pt"))
        good = sum(one_round(folder, dice) for _ in range(rounds))
    print(f"{good} of {rounds} identical")
    sys.exit(good != rounds)
