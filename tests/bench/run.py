"Runs every tests/bench/bench_*.py and prints their lines under the machine they were measured on."

import contextlib
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

from mmkit.core.runtime import available_cpu_count, default_device

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEED = 0


def machine():
    "Processor, cores and memory, in one line."
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(s.split(":", 1)[1].strip() for s in lines if s.startswith("model name"))
    import psutil

    return (
        f"{name}, {available_cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB,"
        f" {default_device()}"
    )


def main(wanted):
    "Run the benches whose name holds one of `wanted` (all when empty); 1 when one of them fails."
    files = [
        f for f in sorted(HERE.glob("bench_*.py")) if not wanted or any(w in f.name for w in wanted)
    ]
    import torch

    print(
        f"machine  {machine()}\nwith     Python {platform.python_version()}, torch"
        f" {torch.__version__}, {datetime.date.today()}, seed {SEED}"
    )
    env, failed = {**os.environ, "MMKIT_SEED": str(SEED), "PYTHONUNBUFFERED": "1"}, 0
    for f in files:
        command = f"python {f.relative_to(ROOT)}"
        print(f"\n{command}")
        failed |= subprocess.run([sys.executable, str(f)], cwd=ROOT, env=env).returncode != 0
    if not files:
        print(f"no bench matches {wanted}")
    return int(failed or not files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
