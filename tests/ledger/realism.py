"""How far do drawn lesions look like dermoscopy?

    python tests/ledger/realism.py --real FOLDER [--what marginals,unet,melanoma,encoder,grid]

FOLDER (or MMKIT_REAL) holds `isic2018_masks/` (images/ and masks/) and `isic2017/` (the official
training and validation images with their tables of classes). Nothing of it is copied, but for the
picture that `--grid` asks for. `--draw module:function` measures another renderer: a function
`draw(n, seed, size)` that returns images (n, size, size, 3) uint8, masks (n, size, size) bool and
is_melanoma (n,) bool.

- marginals: colours, contrast, area, rim, texture and outline of drawn and real lesions.
- unet: a small U-Net learns outlines from 500 drawn lesions; IoU on the real masks.
- melanoma: classifiers that saw drawn lesions only; AUROC on ISIC 2017, and on other drawn lesions,
  which says whether there was something to learn. They read 18 colour statistics, pixels (a small
  CNN), or the ABCD measures of the outline that a U-Net finds; and each of these measures alone.
- encoder: the same by a linear probe of the shipped base's vision encoder.
- grid: 24 drawn beside 24 real lesions, in one picture.

`--json FILE` files each part under the renderer's name, with how and when it was measured, and
leaves what else is in the file. The chapter on lesions shows mmkit/assets/realism.json, made by

    realism.py --json FILE --bound --what marginals,unet,melanoma,encoder
    realism.py --json FILE --draw former_renderer:draw --what marginals,unet
"""

import argparse
import csv
import datetime
import hashlib
import importlib
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lesion_marginals import (
    ABCD_MEASURES,
    abcd_features,
    colour_statistics,
    compare,
    marginals,
    tell_apart,
)
from PIL import Image
from small_networks import (
    centred_disc,
    encoder_features,
    fold_unet,
    iou,
    largest_part,
    mean_auroc,
    otsu_masks,
    predict,
    score_by_abcd,
    score_by_probe,
    score_melanoma,
    train_unet,
)

from mmkit.core.display import make_table
from mmkit.core.provenance import WORLD_VERSION, base_checksum  # noqa: F401 (of `draw_world`)
from mmkit.core.runtime import atomic_write, describe_machine, dump_json
from mmkit.core.stats import bootstrap, roc_auc
from mmkit.lesions import World

WHAT = ("marginals", "unet", "melanoma", "encoder", "grid")
SIZE = 128  # pixels a side, at which marginals are taken and lesions are drawn
UNET_SIZE = 64
CLASSIFIER_SIZE = 96
N_MARGINALS = 400
N_OUTLINES = 500
N_CLASSIFIED = 4000
N_MEASURED = 1500  # of them, for the ABCD measures
N_HELD = 500  # other drawn lesions to classify
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


def describe_subject(draw, part: str) -> dict:  # world_version, base_checksum
    "Which lesions and which base model a part is about; None where it depends on neither."
    version = getattr(sys.modules[draw.__module__], "WORLD_VERSION", None)
    return dict(world_version=version, base_checksum=base_checksum() if part == "encoder" else None)


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
    """Marginals of drawn and real lesions, and how well simple classifiers tell them apart; the
    control tells them from another draw.
    """
    real_images, real_masks = read_masked(folder, SIZE)
    draws = [draw(N_MARGINALS, FIRST_SEED + 10 * seed, SIZE)[:2] for seed in range(args.seeds + 1)]
    real = _describe_looks(real_images, real_masks)
    looks = [_describe_looks(images, masks) for images, masks in draws]
    measures = {
        name: np.concatenate([one["marginals"][name] for one in looks[:-1]])
        for name in real["marginals"]
    }
    rows = compare(real["marginals"], measures)
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
    told = []
    for features in ("colours", "measures"):
        for other, found in (("real lesions", real), ("another draw", looks[-1])):
            by_seed = [tell_apart(found[features], one[features]) for one in looks[:-1]]
            told.append(_told_row(features, other, by_seed))
    print(make_table([row | dict(seeds=_list(row["seeds"])) for row in told]))
    return dict(rows=rows, told_apart=told)


def _describe_looks(images, masks):
    "The marginals of each lesion, and the features by which sets of lesions are told apart."
    found = marginals(images, masks)
    measures = np.stack(list(found.values()), 1)
    return dict(marginals=found, measures=measures, colours=colour_statistics(images))


def _told_row(features, other, by_seed):
    "How well drawn lesions are told from others, from (labels, scores) of each seed."
    scores = np.stack([scores for _, scores in by_seed], 1)
    is_drawn = by_seed[0][0]
    return dict(
        features=features,
        told_from=other,
        auroc=bootstrap(mean_auroc, is_drawn, scores),
        seeds=[roc_auc(is_drawn, column) for column in scores.T],
    )


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


@dataclass
class TestSets:
    "Images to classify: ISIC 2017's two parts, and drawn lesions that nobody has learned from."

    images: np.ndarray  # (M, S, S, 3) uint8, the parts one after the other
    truth: dict  # part -> (N,) bool: is it a melanoma?

    def rows(self, part: str) -> slice:
        "Where the images of a part are."
        names = list(self.truth)
        start = sum(len(self.truth[name]) for name in names[: names.index(part)])
        return slice(start, start + len(self.truth[part]))


def read_test_sets(folder: Path, draw) -> TestSets:
    "The validation images, the training images, of which there are more, and drawn ones."
    images, truth, digests = read_classified(folder, "Validation", CLASSIFIER_SIZE)
    more, more_truth, _ = read_classified(folder, "Training", CLASSIFIER_SIZE, digests)
    held, _, held_truth = draw(N_HELD, FIRST_SEED + 300, CLASSIFIER_SIZE)
    truth = dict(validation=truth, training=more_truth, drawn=held_truth)
    return TestSets(np.concatenate([images, more, held]), truth)


def measure_melanoma(folder: Path, draw, args: argparse.Namespace) -> dict:
    """AUROC on ISIC 2017 of classifiers that saw drawn lesions only, and of each ABCD measure
    alone.
    """
    sets, scores, some = read_test_sets(folder, draw), {}, slice(N_MEASURED)
    for seed in range(args.seeds):
        drawn, masks, labels = draw(N_CLASSIFIED, FIRST_SEED + 100 + seed, CLASSIFIER_SIZE)
        found = score_melanoma(drawn, labels, sets.images, seed)
        _add_scores(scores, found, f"{len(drawn)} drawn", sets, seed)
        outlines = find_outlines(drawn[:N_OUTLINES], masks[:N_OUTLINES], sets.images, seed)
        found = score_by_abcd(drawn[some], masks[some], labels[some], sets.images, outlines)
        _add_scores(scores, dict(ABCD=found), f"{len(labels[some])} drawn", sets, seed)
    real, others = sets.rows("training"), sets.rows("validation")
    if args.bound:
        images, truth, test = sets.images[real], sets.truth["training"], sets.images[others]
        found = score_melanoma(images, truth, test, 0)
        found["ABCD"] = score_by_abcd(images, outlines[real], truth, test, outlines[others])
        _add_scores(scores, found, f"{len(images)} real", sets, 0)
    alone = _measure_alone(sets, outlines)
    return _show_aurocs(scores, sets) | dict(alone=alone)


def _measure_alone(sets, outlines):
    "AUROC of each ABCD measure by itself, on real lesions and on drawn ones."
    features = abcd_features(sets.images, outlines)
    features = np.where(np.isnan(features), np.nanmedian(features, 0), features)
    drawn = sets.rows("drawn")
    truth = np.concatenate([sets.truth["validation"], sets.truth["training"]])
    rows = []
    for name, values in zip(ABCD_MEASURES, features.T):
        at = dict(
            real=bootstrap(mean_auroc, truth, values[: drawn.start, None]),
            drawn=bootstrap(mean_auroc, sets.truth["drawn"], values[drawn, None]),
        )
        rows.append(dict(measure=name) | at)
    print(make_table(rows))
    return rows


def measure_encoder(folder: Path, draw, args: argparse.Namespace) -> dict:
    "The same by linear probes of the shipped base's vision encoder."
    sets, scores = read_test_sets(folder, draw), {}
    for seed in range(args.seeds):
        drawn, _, labels = draw(N_CLASSIFIED, FIRST_SEED + 100 + seed, CLASSIFIER_SIZE)
        found = score_by_probe(encoder_features, drawn, labels, sets.images)
        _add_scores(scores, dict(encoder=found), f"{len(drawn)} drawn", sets, seed)
    if args.bound:
        real, others = sets.rows("training"), sets.rows("validation")
        images, truth = sets.images[real], sets.truth["training"]
        found = score_by_probe(encoder_features, images, truth, sets.images[others])
        _add_scores(scores, dict(encoder=found), f"{len(images)} real", sets, 0)
    return _show_aurocs(scores, sets)


def _add_scores(scores, found, trained_on, sets, seed):
    "The scores of one seed to those of the others; prints how well they do."
    for name, values in found.items():
        scores.setdefault((name, trained_on), []).append(values)
        auroc = roc_auc(sets.truth["validation"], values[sets.rows("validation")])
        print(f"  {name}, {trained_on}, seed {seed}: {auroc:.3f}", flush=True)


def find_outlines(drawn, masks, images, seed) -> np.ndarray:  # (N, S, S) bool
    "The outlines of images by a U-Net that saw drawn lesions only."
    net = train_unet(resize_images(drawn, UNET_SIZE), resize_masks(masks, UNET_SIZE), seed)
    found = predict(net, resize_images(images, UNET_SIZE)) > 0
    return resize_masks(np.stack([largest_part(mask) for mask in found]), images.shape[1])


def _show_aurocs(scores, sets):
    "A table of AUROCs; what learned from real training images has seen the validation images only."
    rows = []
    for (classifier, trained_on), by_seed in scores.items():
        columns = np.stack(by_seed, 1)
        row = dict(classifier=classifier, trained_on=trained_on)
        for part, truth in sets.truth.items():
            of_part = columns[sets.rows(part)]
            row[part] = bootstrap(mean_auroc, truth, of_part) if len(of_part) else None
        truth, of_part = sets.truth["validation"], columns[sets.rows("validation")]
        row["seeds"] = [roc_auc(truth, column) for column in of_part.T]
        rows.append(row)
    print(make_table([row | dict(seeds=_list(row["seeds"])) for row in rows]))
    counts = {part: [int(truth.sum()), len(truth)] for part, truth in sets.truth.items()}
    return dict(rows=rows, melanoma_of=counts)


def save_grid(folder: Path, draw, args: argparse.Namespace) -> dict:
    "A picture of drawn beside real lesions, where `--grid` says."
    make_grid(read_masked(folder, SIZE)[0], draw(24, FIRST_SEED, SIZE)[0]).save(args.grid)
    print(f"24 real lesions (left) beside 24 drawn (right): {args.grid}")
    return dict(grid=Path(args.grid).name)


def _list(values):
    return ", ".join(f"{value:.3f}" for value in values)


MEASURES = dict(
    marginals=measure_marginals,
    unet=measure_unet,
    melanoma=measure_melanoma,
    encoder=measure_encoder,
    grid=save_grid,
)


def file_part(
    path: Path,  # of the record
    renderer: str,  # 'module:function'
    part: str,  # of WHAT
    found: dict,
) -> None:
    "One part into the record, in place of what was measured of it before."
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record.setdefault(renderer, {})[part] = _round(found)
    atomic_write(path, dump_json(record, indent=1, ensure_ascii=False) + "\n")


def _round(value):
    "Numbers to four digits after the point."
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(item) for item in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


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
    provenance = dict(
        command=command,
        machine=describe_machine(),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        date=str(datetime.date.today()),
        num_seeds=args.seeds,
    )
    print(f"{command}\nmachine  {provenance['machine']}\nwith     {provenance['versions']}")
    draw = load_draw(args.draw)
    for part in what:
        began = time.perf_counter()
        print(f"\n{part}", flush=True)
        found = provenance | describe_subject(draw, part)
        found |= MEASURES[part](Path(args.real), draw, args)
        found["seconds"] = round(time.perf_counter() - began, 1)
        print(f"({found['seconds']} s)", flush=True)
        if args.json:  # after each: what is done is kept when the next is interrupted
            file_part(Path(args.json), args.draw, part, found)


if __name__ == "__main__":
    main()
