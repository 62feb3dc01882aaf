"""The renderer that was in use before, read from the repository's history: it painted with colours
instead of pigments. It draws in a process of its own, beside the present one.

    python tests/ledger/realism.py --real FOLDER --what marginals,unet --draw former_renderer:draw
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np

FORMER_COMMIT, WORLD_VERSION = "6521435", 1
ROOT = Path(__file__).resolve().parents[2]
DRAW = """
import sys
import numpy as np
from mmkit.lesions import World
n, seed, size = map(int, sys.argv[1:4])
world = World(seed=seed, num_lesions=n)
drawn = [world.render(i, size) for i in range(n)]
np.savez(
    sys.argv[4],
    images=np.stack([one.image for one in drawn]),
    masks=np.stack([one.mask for one in drawn]),
    is_melanoma=[one.lesion.label == "melanoma" for one in drawn],
)
"""


def extract_former(
    folder,  # where the package is put
) -> bool:  # False where the repository's history is not at hand
    "The package of FORMER_COMMIT, as far as lesions need it."
    command = ["git", "archive", FORMER_COMMIT, "mmkit/__init__.py", "mmkit/core", "mmkit/lesions"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
    except FileNotFoundError:  # no git
        return False
    if done.returncode:
        return False
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return True


def draw(n: int, seed: int, size: int) -> tuple:  # images, masks, is_melanoma
    "Lesions of the former world, of all skin types and cameras."
    with tempfile.TemporaryDirectory() as folder:
        if not extract_former(folder):
            raise ValueError(
                f"commit {FORMER_COMMIT} is not in this checkout: get the whole history, with "
                "git fetch --unshallow"
            )
        file = Path(folder) / "drawn.npz"
        command = [sys.executable, "-c", DRAW, *map(str, (n, seed, size, file))]
        env = dict(os.environ, PYTHONPATH=folder)
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        with np.load(file) as drawn:
            return drawn["images"], drawn["masks"], drawn["is_melanoma"]
