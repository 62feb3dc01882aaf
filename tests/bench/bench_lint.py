"""How the cost of lint and of the mismatch detectors grows with the pairs: seconds, and the ratio
to four times as many (4 is linear).
"""

import os
import time

import numpy as np
from datasets import Dataset

from mmkit import data
from mmkit.audit.label_noise import run_detectors
from mmkit.data.duplicates import find_near_duplicates
from mmkit.lesions.render import World

SEED, N = int(os.environ.get("MMKIT_SEED", 0)), 5000
rng, world = np.random.default_rng(SEED), World(seed=SEED, num_lesions=500)
lesions = [world.lesion(i) for i in range(500)]
said = [
    data.compose_caption(lesion.attributes(), lesion.colours, lesion.label, rng=rng)
    for lesion in lesions
]


def texts(n):
    at = rng.integers(0, 500, n)
    d = Dataset.from_dict(
        dict(
            id=[str(i) for i in range(n)],
            caption=[f"{said[a]} Number {i}." for i, a in enumerate(at)],
            label=[lesions[a].label for a in at],
            attributes=[lesions[a].attributes() for a in at],
        )
    )
    return lambda: data.lint_records(d, show_progress=False)


def hashes(n):
    h = (
        np.array([f"{i}" for i in range(n)], object),
        rng.random((n, 64)) < 0.5,
        rng.normal(size=(n, 1024)).astype(np.float32),
    )
    return lambda: find_near_duplicates(Dataset.from_dict(dict(id=[""])), hashes=h)


def detectors(n):
    x, y = (rng.normal(size=(n, 128)) for _ in range(2))
    c = [said[i % 500] for i in range(n)]
    return lambda: run_detectors(x, y, c, np.arange(n) % 5)


for name, make, n in (
    ("text checks", texts, N),
    ("picture hashes, all with all", hashes, N),
    ("four detectors", detectors, N // 5),
):
    took = []
    for k in (n, 4 * n):
        job = make(k)
        began = time.perf_counter()
        job()
        took.append(time.perf_counter() - began)
    print(
        f"  {name:30s} {took[0]:7.2f} s for {n:,}, {took[1]:7.2f} s for {4 * n:,}: ratio"
        f" {took[1] / took[0]:.1f}"
    )
