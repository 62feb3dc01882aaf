"""How far do drawn lesions look like dermoscopy?

    python tests/ledger/realism.py --real FOLDER [--what marginals,unet,melanoma,grid] [--seeds 3]

FOLDER (or MMKIT_REAL) holds `isic2018_masks/` (images/ and masks/) and `isic2017/` (the official
training and validation images with their tables of classes). Nothing of it is copied, but for the
picture that `--grid` asks for. `--draw module:function` measures another renderer: a function
`draw(n, seed, size)` that returns images (n, size, size, 3) uint8, masks (n, size, size) bool and
is_melanoma (n,) bool.

- marginals: colours, contrast, area, rim, texture and outline of drawn and real lesions.
- unet: a small U-Net learns outlines from 500 drawn lesions; IoU on the real masks.
- melanoma: classifiers that saw drawn lesions only; AUROC on ISIC 2017. They read 18 colour
  statistics, the shipped base's vision encoder, pixels (a small CNN), or the ABCD measures of the
  outline that a U-Net finds.
- grid: 24 drawn beside 24 real lesions, in one picture.
"""

import argparse
import csv
import datetime
import hashlib
import importlib
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lesion_marginals import colour_statistics, compare, marginals, told_apart
from PIL import Image
from small_networks import (
    centred_disc,
    fold_unet,
    iou,
    largest_part,
    mean_auroc,
    otsu_masks,
    predict,
    score_by_abcd,
    score_melanoma,
    train_unet,
)

from mmkit.core.display import make_table
from mmkit.core.runtime import atomic_write, describe_machine, dump_json
from mmkit.core.stats import bootstrap, roc_auc
from mmkit.lesions import World

WHAT = ("marginals", "unet", "melanoma", "grid")
SIZE = 128  # pixels a side, at which marginals are taken and lesions are drawn
UNET_SIZE = 64
CLASSIFIER_SIZE = 96
N_MARGINALS = 400
N_OUTLINES = 500
N_CLASSIFIED = 4000
N_MEASURED = 1500  # of them, for the ABCD measures
FIRST_SEED = 16000  # the worlds of these experiments: nobody else draws from them


# ---- images
def draw_world(n: int, seed: int, size: int) -> tuple:  # images, masks, is_melanoma
    "Lesions of mmkit's world, of all skin types and cameras."
    world = World(seed=seed, num_lesions=n)
    drawn = [world.render(i, size) for i in range(n)]
    images = np.stack([d.image for d in drawn])
    masks = np.stack([d.mask for d in drawn])
    is_melanoma = np.array([d.lesion.label == "melanoma" for d in drawn])
    return images, masks, is_melanoma


def load_draw(name: str):  # "module:function"
    "The function of that name, from this folder, the working directory or an installed module."
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)


def resize_images(
    images: np.ndarray,  # (N, H, W, 3) uint8
    size: int,  # pixels a side
) -> np.ndarray:  # (N, size, size, 3) uint8
    "Images squashed to a square, averaged where they shrink."
    return np.stack([_squash(Image.fromarray(image), size) for image in images])


def resize_masks(
    masks: np.ndarray,  # (N, H, W) bool
    size: int,  # pixels a side
) -> np.ndarray:  # (N, size, size) bool
    "Masks squashed to a square: a pixel is set where most of it was."
    layers = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    return np.stack([_squash(layer, size) > 127 for layer in layers])


def _squash(picture, size):
    return np.asarray(picture.resize((size, size), Image.BILINEAR))


def read_masked(folder: Path, size: int) -> tuple:  # images (N, size, size, 3), masks
    "ISIC 2018's lesions with their masks."
    images, masks = [], []
    for path in sorted((Path(folder) / "isic2018_masks" / "masks").glob("*.png")):
        name = path.stem.removesuffix("_segmentation")
        photo = path.parent.parent / "images" / f"{name}.jpg"
        if photo.exists():
            with Image.open(photo) as image, Image.open(path) as mask:
                images.append(_squash(image.convert("RGB"), size))
                masks.append(_squash(mask.convert("L"), size) > 127)
    return np.stack(images), np.stack(masks)


def read_classified(
    folder: Path,
    part: str,  # 'Training' or 'Validation'
    size: int,
    left_out: set = frozenset(),  # digests of files to leave out
) -> tuple:  # images (N, size, size, 3), is_melanoma (N,), digests
    "ISIC 2017's lesions of one official part, as far as their files are there."
    folder = Path(folder) / "isic2017"
    images, is_melanoma, digests = [], [], []
    table = folder / f"ISIC-2017_{part}_Classes.csv"
    for row in csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()):
        path = folder / f"ISIC-2017_{part}_Data" / f"{row['image_id']}.jpg"
        if not path.exists():
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in left_out:
            with Image.open(path) as image:
                images.append(_squash(image.convert("RGB"), size))
            is_melanoma.append(float(row["melanoma"]) == 1)
            digests.append(digest)
    return np.stack(images), np.array(is_melanoma), set(digests)


# ---- what is asked for
def make_grid(
    real: np.ndarray,  # (N, S, S, 3) uint8
    drawn: np.ndarray,
    seed: int = 0,
    thumbnail: int = 128,
) -> Image.Image:  # real left, drawn right, a white strip between them
    "24 of either, four a row; fewer, in whole rows, where there are fewer."
    rng = np.random.default_rng(seed)
    count = min(24, len(real), len(drawn)) // 4 * 4
    halves = []
    for images in (real, drawn):
        chosen = resize_images(images[rng.permutation(len(images))[:count]], thumbnail)
        rows = [np.concatenate(chosen[k : k + 4], axis=1) for k in range(0, count, 4)]
        halves.append(np.concatenate(rows))
    strip = np.full((len(halves[0]), 24, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([halves[0], strip, halves[1]], axis=1))


def measure_marginals(folder: Path, draw, args: argparse.Namespace) -> dict:
    "Marginals of drawn and real lesions, and how well simple classifiers tell them apart."
    real_images, real_masks = read_masked(folder, SIZE)
    drawn_images, drawn_masks, _ = draw(N_MARGINALS, FIRST_SEED, SIZE)
    real, drawn = marginals(real_images, real_masks), marginals(drawn_images, drawn_masks)
    rows = compare(real, drawn)
    shown = [
        dict(
            measure=row["measure"],
            real=" | ".join(f"{q:.3g}" for q in row["real"]),
            drawn=" | ".join(f"{q:.3g}" for q in row["drawn"]),
            inside="yes" if row["inside"] else "NO",
            spread=f"{row['spread']:.2f}",
        )
        for row in rows
    ]
    print(make_table(shown))
    by_colour = told_apart(colour_statistics(real_images), colour_statistics(drawn_images))
    by_marginals = told_apart(*(np.stack(list(m.values()), 1) for m in (real, drawn)))
    print(f"drawn told from real: {by_colour:.2f} by 18 colour statistics,", end=" ")
    print(f"{by_marginals:.2f} by these {len(rows)} measures (AUROC)")
    return dict(rows=rows, told_by_colours=by_colour, told_by_marginals=by_marginals)


def measure_unet(folder: Path, draw, args: argparse.Namespace) -> dict:
    "IoU on real masks of U-Nets that saw drawn lesions only, beside baselines."
    images, masks = read_masked(folder, UNET_SIZE)
    discs = {
        r: iou(np.repeat(centred_disc(UNET_SIZE, r)[None], len(masks), 0), masks)
        for r in np.arange(0.1, 0.5, 0.02)
    }
    best = max(discs, key=lambda r: discs[r].mean())
    scores = {f"centred disc, best radius {best:.2f}": [discs[best]]}
    scores["Otsu's threshold"] = [iou(otsu_masks(images), masks)]
    trained = []
    for seed in range(args.seeds):
        drawn, drawn_masks, _ = draw(N_OUTLINES, FIRST_SEED + 1 + seed, SIZE)
        drawn, drawn_masks = resize_images(drawn, UNET_SIZE), resize_masks(drawn_masks, UNET_SIZE)
        net = train_unet(drawn, drawn_masks, seed)
        trained.append(iou(predict(net, images) > 0, masks))
        print(f"  U-Net, seed {seed}: {trained[-1].mean():.3f}", flush=True)
    scores[f"U-Net, {N_OUTLINES} drawn"] = trained
    if args.bound:
        scores["U-Net, real masks, 5 folds"] = [fold_unet(images, masks)]
    rows = []
    for name, by_seed in scores.items():
        interval = bootstrap(np.mean, np.mean(by_seed, 0))
        rows.append(dict(trained=name, iou=interval, seeds=[float(s.mean()) for s in by_seed]))
    print(make_table([row | dict(seeds=_list(row["seeds"])) for row in rows]))
    return dict(rows=rows)


def measure_melanoma(folder: Path, draw, args: argparse.Namespace) -> dict:
    """AUROC on ISIC 2017 of classifiers that saw drawn lesions only: on the validation images, and
    on the training images, of which there are more.
    """
    images, truth, digests = read_classified(folder, "Validation", CLASSIFIER_SIZE)
    more, more_truth, _ = read_classified(folder, "Training", CLASSIFIER_SIZE, digests)
    test = np.concatenate([images, more])
    scores = {}
    for seed in range(args.seeds):
        drawn, masks, labels = draw(N_CLASSIFIED, FIRST_SEED + 100 + seed, CLASSIFIER_SIZE)
        found = score_melanoma(drawn, labels, test, seed)
        outlines = find_outlines(drawn[:N_OUTLINES], masks[:N_OUTLINES], test, seed)
        some = slice(N_MEASURED)
        abcd = score_by_abcd(drawn[some], masks[some], labels[some], test, outlines)
        for name, values in (found | {"ABCD": abcd}).items():
            count = len(labels[some]) if name == "ABCD" else len(labels)
            scores.setdefault(f"{name}, {count} drawn", []).append(values)
            at = [roc_auc(truth, values[: len(truth)]), roc_auc(more_truth, values[len(truth) :])]
            print(f"  {name}, seed {seed}: {_list(at)}", flush=True)
    if args.bound:
        found = score_melanoma(more, more_truth, images, 0)
        own, others = outlines[len(truth) :], outlines[: len(truth)]
        found["ABCD"] = score_by_abcd(more, own, more_truth, images, others)
        scores |= {f"{name}, {len(more)} real": [values] for name, values in found.items()}
    rows = [_auroc_row(name, np.stack(v, 1), truth, more_truth) for name, v in scores.items()]
    print(make_table([row | dict(seeds=_list(row["seeds"])) for row in rows]))
    return dict(rows=rows, images=len(truth), melanoma=int(truth.sum()))


def find_outlines(drawn, masks, images, seed) -> np.ndarray:  # (N, S, S) bool
    "The outlines of images by a U-Net that saw drawn lesions only."
    net = train_unet(resize_images(drawn, UNET_SIZE), resize_masks(masks, UNET_SIZE), seed)
    found = predict(net, resize_images(images, UNET_SIZE)) > 0
    return resize_masks(np.stack([largest_part(mask) for mask in found]), images.shape[1])


def _auroc_row(name, scores, truth, more_truth):
    "A row of the table: the training images are no test of what learned from them."
    row = dict(trained=name, validation=bootstrap(mean_auroc, truth, scores[: len(truth)]))
    row["training"] = "–"
    if len(scores) > len(truth):
        row["training"] = bootstrap(mean_auroc, more_truth, scores[len(truth) :])
    return row | dict(seeds=[roc_auc(truth, column) for column in scores[: len(truth)].T])


def save_grid(folder: Path, draw, args: argparse.Namespace) -> dict:
    "A picture of drawn beside real lesions, where `--grid` says."
    make_grid(read_masked(folder, SIZE)[0], draw(24, FIRST_SEED, SIZE)[0]).save(args.grid)
    print(f"24 real lesions (left) beside 24 drawn (right): {args.grid}")
    return dict(grid=Path(args.grid).name)


def _list(values):
    return ", ".join(f"{value:.3f}" for value in values)


MEASURES = dict(
    marginals=measure_marginals, unet=measure_unet, melanoma=measure_melanoma, grid=save_grid
)


def main(arguments=None):
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--real", default=os.environ.get("MMKIT_REAL"), help="the real images' folder")
    ask.add_argument("--what", default="marginals,unet,melanoma", help=f"of {', '.join(WHAT)}")
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--draw", default="realism:draw_world", help="module:function")
    ask.add_argument("--bound", action="store_true", help="also train on the real images")
    ask.add_argument("--grid", help="where the picture is written")
    ask.add_argument("--json", help="where the numbers are written")
    args = ask.parse_args(arguments)
    if not args.real or not (Path(args.real) / "isic2018_masks").is_dir():
        ask.error(
            f"--real {args.real}: no folder with isic2018_masks/ and isic2017/; name it with --real"
            " or in MMKIT_REAL"
        )
    what = args.what.split(",")
    if set(what) - set(WHAT):
        ask.error(f"--what {args.what}: there are {', '.join(WHAT)}")
    if "grid" in what and not args.grid:
        ask.error("--what grid: say where to write the picture with --grid FILE.png")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    command = f"python tests/ledger/realism.py --real FOLDER --what {args.what}"
    command += f" --seeds {args.seeds} --draw {args.draw}" + " --bound" * args.bound
    told = dict(
        command=command,
        machine=describe_machine(),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        date=str(datetime.date.today()),
        seeds=list(range(args.seeds)),
    )
    print(f"{command}\nmachine  {told['machine']}\nwith     {told['versions']}", flush=True)
    draw = load_draw(args.draw)
    for name in what:
        began = time.perf_counter()
        print(f"\n{name}", flush=True)
        told[name] = MEASURES[name](Path(args.real), draw, args)
        told[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"({told[name]['seconds']} s)", flush=True)
        if args.json:  # after each: what is done is kept when the next is interrupted
            atomic_write(args.json, dump_json(told, indent=1, ensure_ascii=False) + "\n")
    return told


if __name__ == "__main__":
    main()
