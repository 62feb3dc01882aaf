"""Lesions with all their masks, per core and second, beside the renderer that was in use before.

The former renderer painted with colours instead of pigments. It is read from the repository's
history and runs in a process of its own, in turn with the present one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SEED, N_LESIONS, REPEATS = int(os.environ.get("MMKIT_SEED", 0)), 100, 3
WANTED_PER_SECOND = 150
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "ledger"))
from former_renderer import FORMER_COMMIT, extract_former  # noqa: E402 (found by the line above)

# Processor time: other work on the machine does not count.
MEASURE = """
import sys, time
from mmkit.lesions import World
seed, n, start, size = map(int, sys.argv[1:])
world = World(seed=seed, num_lesions=12_874)
for i in range(10):
    world.render(i, size)  # fill the caches
for job in (lambda i: world.render(i, size), world.lesion):
    began = time.process_time()
    for i in range(start, start + n):
        job(i)
    print(n / (time.process_time() - began))
"""


def measure_rates(package_folder, repeat, size):
    "Lesions rendered, and lesions sampled, per second of processor time."
    env = dict(os.environ, PYTHONPATH=str(package_folder), OMP_NUM_THREADS="1")
    numbers = (SEED, N_LESIONS, repeat * N_LESIONS, size)
    command = [sys.executable, "-c", MEASURE, *map(str, numbers)]
    done = subprocess.run(command, env=env, cwd=package_folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return [float(line) for line in done.stdout.split()]


def best_rates(package_folders, size):
    "name -> the best of REPEATS, the packages in turn."
    best = {name: [0.0, 0.0] for name in package_folders}
    for repeat in range(REPEATS):
        for name, folder in package_folders.items():
            rates = measure_rates(folder, repeat, size)
            best[name] = list(map(max, best[name], rates))
    return best


with tempfile.TemporaryDirectory() as former_folder:
    folders = {"now": ROOT}
    if extract_former(former_folder):
        folders["former renderer"] = Path(former_folder)
    conditions = f"with its masks, one core, best of {REPEATS} × {N_LESIONS}, seed {SEED}"
    for size in (96, 128):
        rates = best_rates(folders, size)
        for name, (rendered, _) in rates.items():
            wanted = f"; wanted: {WANTED_PER_SECOND}" if (name, size) == ("now", 96) else ""
            print(
                f"  render a lesion, {name:16s}{rendered:8.0f} /s      "
                f"{size}×{size} {conditions}{wanted}"
            )
    for name, (_, sampled) in rates.items():
        print(f"  sample its parameters, {name:16s}{sampled:8.0f} /s      no image, one core")
    if len(folders) == 1:
        print(f"  No row for the former renderer: commit {FORMER_COMMIT} is not in this checkout.")
