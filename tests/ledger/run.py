"""Measures the claims again: `make ledger`, `make ledger ONLY=C24`, `make ledger SEEDS=7`. Every
tests/ledger/ledger_*.py measures one claim or two
and leaves mmkit/assets/claims/C24.json. What is done is kept in runs/ledger/, so that an
interrupted run goes on where it stopped.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

from mmkit.core.claims import compare_conditions, decide_verdict
from mmkit.core.provenance import get_provenance
from mmkit.core.stats import bootstrap

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]


def module(path):
    "A Python file as a module."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def machine():
    return module(HERE.parent / "bench" / "run.py").machine()


class Cells:
    """What was measured, one line of JSON for each (condition, seed, setting): asked for again, it
    is read and not measured, unless lesions or base model have changed since.
    """

    def __init__(self, file, say=print):
        self.file, self.say, self.known, self.seconds = Path(file), say, {}, 0.0
        self.provenance, outdated = get_provenance(), 0
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                r = json.loads(line)
            except ValueError:
                continue  # the line that a killed run was writing
            if r.get("provenance") != self.provenance:
                outdated += 1
                continue
            self.known[self.key(r["condition"], r["seed"], r["setting"])] = r
        if outdated:
            self.say(f"  {outdated} cells of earlier lesions or another base are measured anew")

    def key(self, condition, seed, setting):
        return json.dumps([condition, seed, setting], sort_keys=True)

    def __call__(
        self, condition: str, seed: int, f, **setting
    ) -> dict:  # what f(**setting) found: measure -> number
        "The measures of one condition with one seed."
        key = self.key(condition, seed, setting)
        if key not in self.known:
            began = time.perf_counter()
            got = f(**setting)
            r = dict(
                condition=condition,
                seed=seed,
                setting=setting,
                measures={k: float(v) for k, v in got.items()},
                seconds=round(time.perf_counter() - began, 3),
                provenance=self.provenance,
            )
            with self.file.open("a") as out:
                out.write(json.dumps(r) + "\n")
            self.known[key] = r
            self.say(
                f"  {condition}, seed {seed}:"
                f" {', '.join(f'{k} {v:.4g}' for k, v in r['measures'].items())}"
                f" ({r['seconds']:.1f} s)"
            )
        self.seconds += self.known[key]["seconds"]
        return self.known[key]["measures"]

    def finish(self):  # the next `make ledger` measures anew
        "Set what was measured aside."
        if self.file.exists():
            os.replace(self.file, self.file.with_suffix(".done.jsonl"))


def rows(
    found: dict,  # (condition, measure) -> {seed: value}
    controls: tuple = (),  # conditions that are controls
    n: int = None,
) -> list:  # of how many held-out pairs each value is
    "One row for each condition and measure, with its interval over seeds."
    import numpy as np

    out = []
    for (condition, measure), by_seed in found.items():
        mean = bootstrap(np.mean, list(by_seed.values()))
        out.append(
            dict(
                condition=condition,
                measure=measure,
                control=condition in controls,
                n=n,
                seeds=list(by_seed),
                values=[round(v, 6) for v in by_seed.values()],
                mean=mean.value,
                low=mean.low,
                high=mean.high,
            )
        )
    return out


def entry(
    cells, seeds, id, found, comparisons, controls=(), n=None, draws_lesions=True, **told
) -> dict:  # told: claim, measured, limitations, plots, notes
    """A claim's file: rows, comparisons with their outcomes, the verdict that follows, and how it
    was come by.
    """
    import torch
    import transformers

    made = dict(id=id, **told, kind="analogue, not replication", rows=rows(found, controls, n))
    made["comparisons"] = [compare_conditions(made["rows"], c) for c in comparisons]
    made["verdict"] = decide_verdict(made["comparisons"])
    provenance = get_provenance()
    if not draws_lesions:
        provenance["world_version"] = None  # holds for any world
    return made | dict(
        **provenance,
        machine=machine(),
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        ),
        date=str(datetime.date.today()),
        command=f"make ledger ONLY={id} SEEDS={len(seeds)}",
        seeds=list(seeds),
        seconds=round(cells.seconds, 1),
    )


def plain(x):  # JSON knows no nan
    return (
        {k: plain(v) for k, v in x.items()}
        if isinstance(x, dict)
        else (
            [plain(v) for v in x]
            if isinstance(x, (list, tuple))
            else (
                None
                if isinstance(x, float) and not math.isfinite(x)
                else round(x, 6)
                if isinstance(x, float)
                else x
            )
        )
    )


def write(made, out):
    "The file, whole or not at all."
    file = Path(out) / f"{made['id']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(plain(made), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)
    return file


def measure(file, seeds, out=None, kept=None, small=False, say=print) -> list:  # the files it wrote
    "Run one ledger_*.py and write what it found."
    m = module(Path(file))
    cells = Cells(Path(kept or ROOT / "runs" / "ledger") / f"{'-'.join(m.IDS)}.jsonl", say)
    made = [
        write(e, out or ROOT / "mmkit" / "assets" / "claims")
        for e in m.measure(cells, list(seeds), small)
    ]
    cells.finish()
    return made


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument(
        "only",
        nargs="*",
        default=os.environ.get("ONLY", "").replace(",", " ").split(),
        help="claims, such as C24; all when left out",
    )
    ask.add_argument(
        "--seeds",
        type=int,
        default=int(os.environ.get("SEEDS") or 5),
        help="how many seeds (at least 5 to be kept)",
    )
    args = ask.parse_args()
    if args.seeds < 5:
        ask.error(f"{args.seeds} seeds say too little for a file that is kept; give 5 or more")
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or 1)))
    files = [(p, module(p).IDS) for p in sorted(HERE.glob("ledger_*.py"))]
    unknown = set(args.only) - {i for _, ids in files for i in ids}
    if unknown:
        ask.error(
            f"no experiment for {', '.join(sorted(unknown))}; there are"
            f" {', '.join(i for _, ids in files for i in ids)}"
        )
    print(
        f"machine  {machine()}\nwith     Python {platform.python_version()}, torch"
        f" {torch.__version__}, {args.seeds} seeds",
        flush=True,
    )
    for path, ids in sorted(
        files, key=lambda f: min([args.only.index(i) for i in f[1] if i in args.only], default=0)
    ):  # in the order asked for
        if args.only and not set(ids) & set(args.only):
            continue
        print(f"\n{', '.join(ids)}: {path.relative_to(ROOT)}", flush=True)
        for made in measure(path, range(args.seeds), say=lambda s: print(s, flush=True)):
            e = json.loads(made.read_text(encoding="utf-8"))
            print(f"  {e['id']}: {e['verdict']} ({made.relative_to(ROOT)})", flush=True)


if __name__ == "__main__":
    main()
