"Intervals a second, and what `import mmkit` costs. Prints lines: name, value, unit, conditions."

import os
import subprocess
import sys
import time

import numpy as np

from mmkit.core.stats import bootstrap

seed = int(os.environ.get("MMKIT_SEED", 0))
x, patient = np.random.default_rng(seed).integers(0, 2, 400), np.repeat(np.arange(100), 4)

for name, groups in ("lesions", None), ("patients", patient):
    began = time.perf_counter()
    bootstrap(np.mean, x, groups=groups, n_resamples=1000, seed=seed)
    print(
        f"  bootstrap by {name:10s} {time.perf_counter() - began:8.3f} s       "
        f"1,000 resamples of 400 lesions, seed {seed}"
    )


def seconds(code):  # fastest of five
    def once():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return min(once() for _ in range(5))


print(
    f"  import mmkit            {seconds('import mmkit') - seconds('pass'):8.3f} s       "
    "over bare Python, fastest of five"
)
