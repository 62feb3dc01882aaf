"""How drawn lesions look, in a few numbers: the mean colours of a coarse grid over some images.

`python tests/world_summary.py` writes tests/world_summary.json, with the version of the world that
it belongs to. Recorded results carry this version, so that whoever shows them can say when the
lesions have changed since. It refuses to write other numbers under the same version (`--same` does
it, for a version that nothing has been measured on yet).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mmkit.core.provenance import WORLD_VERSION
from mmkit.lesions.render import World

FILE = Path(__file__).with_suffix(".json")
TOLERANCE = 0.25  # of 255; another machine rounds a few pixels differently, which is far less
SEED, INDICES = 11, range(0, 48, 4)  # of several patients, with every camera
SIZE, GRID = 128, 4


def summarize_world() -> np.ndarray:  # (len(INDICES), GRID, GRID, 3), 0 to 255
    "The mean colour of each square of a coarse grid."
    world = World(seed=SEED, num_lesions=max(INDICES) + 1)
    images = np.stack([world.render(i, SIZE).image for i in INDICES])
    side = SIZE // GRID
    squares = images.reshape(len(INDICES), GRID, side, GRID, side, 3)
    return squares.mean((2, 4))


def looks_the_same(
    summary: np.ndarray,  # of `summarize_world`
    recorded: dict,  # what FILE holds
) -> bool:
    "Do the images look as they did when the file was written?"
    then = np.array(recorded["summary"]).reshape(summary.shape)
    return bool(np.abs(summary - then).max() <= TOLERANCE)


def read_recorded() -> dict:  # world_version, summary
    return json.loads(FILE.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--same", action="store_true", help="keep the version all the same")
    args = parser.parse_args()
    summary = summarize_world()
    if FILE.exists() and not args.same:
        recorded = read_recorded()
        if recorded["world_version"] == WORLD_VERSION and not looks_the_same(summary, recorded):
            parser.error(
                f"lesions look different, and WORLD_VERSION is still {WORLD_VERSION}: raise it in"
                " nbs/library/core/provenance.ipynb, export, and call this again"
            )
    rounded = np.round(summary, 2).reshape(len(INDICES), -1).tolist()
    lines = ",\n".join(f"  {json.dumps(numbers)}" for numbers in rounded)
    FILE.write_text(
        f'{{\n "world_version": {WORLD_VERSION},\n "summary": [\n{lines}\n ]\n}}\n',
        encoding="utf-8",
    )
    print(f"{FILE.name}: world {WORLD_VERSION}")


if __name__ == "__main__":
    main()
