"""How far do drawn lesions look like dermoscopy?

    python tests/ledger/realism.py --real FOLDER [--what marginals,unet,melanoma,grid] [--seeds 3]

FOLDER (or MMKIT_REAL) holds `isic2018_masks/` (images/ and masks/) and `isic2017/` (the official
training and validation images with their tables of classes). Nothing of it is copied, but for the
picture that `--grid` asks for. `--draw module:function` measures another renderer: a function
`draw(n, seed, size)` that returns images (n, size, size, 3) uint8, masks (n, size, size) bool and
is_melanoma (n,) bool.

- marginals: colours, contrast, area, rim, texture and outline of drawn and real lesions.
- unet: a small U-Net learns outlines from 500 drawn lesions; IoU on the real masks.
- melanoma: classifiers that saw drawn lesions only; AUROC on ISIC 2017's validation images.
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
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from sklearn.isotonic import isotonic_regression
from sklearn.model_selection import cross_val_predict
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from mmkit import models
from mmkit.audit.linear_probe import fit_linear_probe
from mmkit.chat.images import images_to_pixel_values
from mmkit.core.display import make_table
from mmkit.core.runtime import atomic_write, describe_machine, dump_json, seed_everything
from mmkit.core.stats import bootstrap, roc_auc
from mmkit.lesions import World

WHAT = ("marginals", "unet", "melanoma", "grid")
SIZE = 128  # pixels a side, at which marginals are taken and lesions are drawn
UNET_SIZE = 96
CLASSIFIER_SIZE = 96
N_MARGINALS = 400
N_OUTLINES = 500
N_CLASSIFIED = 4000
UNET_STEPS = 400  # of 16 images
CLASSIFIER_STEPS = 800  # of 32 images
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
    for folder in (os.getcwd(), str(Path(__file__).parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
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


# ---- colour
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)  # from linear sRGB, D65
WHITE = TO_XYZ.sum(1)


def rgb_to_lab(
    images: np.ndarray,  # (…, 3) uint8, sRGB
) -> np.ndarray:  # (…, 3) float32: L 0–100, a and b
    "CIELAB under D65."
    rgb = np.asarray(images, np.float32) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ TO_XYZ.T.astype(np.float32) / WHITE.astype(np.float32)
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1).astype(np.float32)


def colour_statistics(
    images: np.ndarray,  # (N, H, W, 3) uint8
) -> np.ndarray:  # (N, 18)
    "Mean, standard deviation and four percentiles of each of R, G and B."
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    percentiles = np.percentile(pixels, [5, 25, 75, 95], axis=1)
    return np.concatenate([pixels.mean(1), pixels.std(1), *percentiles], axis=1)


# ---- rim
RIM_BINS = np.linspace(-0.7, 0.7, 57)  # distance from the border in equivalent radii, outside > 0
N_SECTORS = 16


def signed_distance(
    mask: np.ndarray,  # (H, W) bool
) -> np.ndarray:  # (H, W) pixels; below 0 inside
    "Distance of each pixel's centre from the mask's border."
    outside = ndimage.distance_transform_edt(~mask)
    inside = ndimage.distance_transform_edt(mask)
    return np.where(mask, 0.5 - inside, outside - 0.5)


def _crossing(x, profile, level):
    "Where a falling profile passes the level, between samples."
    after = int(np.argmax(profile <= level))
    if after == 0:
        return x[0]
    before = after - 1
    step = (profile[before] - level) / (profile[before] - profile[after])
    return x[before] + step * (x[after] - x[before])


def rim_profile(
    lab: np.ndarray,  # (H, W, 3)
    mask: np.ndarray,  # (H, W) bool
) -> tuple:  # (width, position), each in equivalent radii; nan where the rim is out of the frame
    """How wide the rim is, from 90% to 10% of the way from lesion to skin colour, and how far
    outside the mask's border its middle lies: medians over sectors of a falling fit.
    """
    lesion, skin = np.median(lab[mask], 0), np.median(lab[~mask], 0)
    axis = lesion - skin
    share = (lab - skin) @ axis / max(float(axis @ axis), 1e-9)  # 1 in the lesion, 0 on the skin
    radius = np.sqrt(mask.sum() / np.pi)
    distance = signed_distance(mask) / radius
    rows, columns = np.indices(mask.shape)
    centre = ndimage.center_of_mass(mask)
    angle = np.arctan2(rows - centre[0], columns - centre[1])
    sector = ((angle + np.pi) / (2 * np.pi) * N_SECTORS).astype(int) % N_SECTORS
    found = []
    for k in range(N_SECTORS):
        here = sector == k
        measured = _measure_rim(distance[here], share[here])
        if measured is not None:
            found.append(measured)
    if len(found) < N_SECTORS // 4:
        return np.nan, np.nan
    return tuple(np.median(found, 0))


def _measure_rim(distance, share):
    "Width and middle of the rim of one sector; None where too little of it is seen."
    count, _ = np.histogram(distance, RIM_BINS)
    total, _ = np.histogram(distance, RIM_BINS, weights=share)
    where, _ = np.histogram(distance, RIM_BINS, weights=distance)
    filled = count > 0
    if filled.sum() < 8:
        return None
    x = where[filled] / count[filled]
    if x[0] > -0.3 or x[-1] < 0.3:
        return None
    profile = isotonic_regression(
        total[filled] / count[filled], sample_weight=count[filled], increasing=False
    )
    drop = profile[0] - profile[-1]
    if drop < 0.2:
        return None  # skin and lesion look alike here
    levels = profile[-1] + drop * np.array([0.9, 0.5, 0.1])
    inner, middle, outer = (_crossing(x, profile, level) for level in levels)
    return outer - inner, middle


# ---- texture
def spectrum_slope(
    luminance: np.ndarray,  # (S, S)
) -> float:  # about -2 to -4: d log power / d log frequency
    "Slope of the radial power spectrum under a Hann window, from 3 cycles to 0.35 a pixel."
    size = len(luminance)
    window = np.outer(np.hanning(size), np.hanning(size))
    centred = luminance - (luminance * window).sum() / window.sum()
    power = np.abs(np.fft.rfft2(centred * window)) ** 2
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    edges = np.geomspace(3 / size, 0.35, 10)
    ring = np.digitize(frequency, edges)
    rings = [k for k in range(1, len(edges)) if (ring == k).any()]
    mean_power = [power[ring == k].mean() for k in rings]
    mean_frequency = [np.exp(np.log(frequency[ring == k]).mean()) for k in rings]
    return float(np.polyfit(np.log(mean_frequency), np.log(np.add(mean_power, 1e-9)), 1)[0])


def lesion_slope(
    luminance: np.ndarray,  # (S, S)
    mask: np.ndarray,  # (S, S) bool
) -> float:  # nan where no square of 24 pixels fits in
    "`spectrum_slope` in the largest square about the mask's inmost point that it covers."
    depth = ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    half = int(depth.max()) - 1
    if half < 12:
        return np.nan
    return spectrum_slope(luminance[row - half : row + half, column - half : column + half])


def count_colours(
    lab: np.ndarray,  # (P, 3) of the lesion's pixels
    side: float = 12.0,  # of a cell of CIELAB
    min_share: float = 0.05,
) -> int:
    "Cells of CIELAB that hold at least a twentieth of the pixels."
    _, counts = np.unique(np.floor(lab / side).astype(int), axis=0, return_counts=True)
    return int((counts >= min_share * len(lab)).sum())


def dark_lines(
    luminance: np.ndarray,  # (H, W) 0–100
) -> np.ndarray:  # (H, W) bool
    "Thin dark marks such as hairs: what a closing over 7 pixels fills by 8 or more."
    return ndimage.grey_closing(luminance, 7) - luminance > 8


# ---- outline
def outline_measures(
    mask: np.ndarray,  # (S, S) bool
) -> dict:  # measure -> number
    "Area share, elongation, distance of the centre from the frame's and share of the hull filled."
    points = np.argwhere(mask)
    variances = np.linalg.eigvalsh(np.cov(points.T) + np.eye(2) / 12)
    centre = points.mean(0) / len(mask) - 0.5 + 0.5 / len(mask)
    corners = np.concatenate([points + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))])
    try:
        hull = ConvexHull(corners).volume
    except QhullError:
        hull = np.nan
    return {
        "area share": mask.mean(),
        "elongation": np.sqrt(variances[1] / variances[0]),
        "centre offset": np.hypot(*centre),
        "solidity": len(points) / hull,
    }


# ---- marginals
def measure_lesion(
    image: np.ndarray,  # (S, S, 3) uint8
    mask: np.ndarray,  # (S, S) bool, neither empty nor full
) -> dict:  # measure -> number
    "All marginals of one lesion."
    lab = rgb_to_lab(image)
    luminance = lab[..., 0]
    is_frame = luminance < 12  # round fields and vignettes are not skin
    on_skin = _or_all(~mask & ~is_frame, ~mask)
    inside, outside = lab[mask], lab[on_skin]
    lesion, skin = np.median(inside, 0), np.median(outside, 0)
    width, position = rim_profile(lab, mask)
    distance = signed_distance(mask)
    core = _or_all(mask & (distance < -4), mask)  # pixels from the rim, which is no texture
    far = _or_all(on_skin & (distance > max(4, 0.15 * np.sqrt(mask.sum() / np.pi))), on_skin)
    fine = luminance - ndimage.gaussian_filter(luminance, 2)
    lines = dark_lines(luminance) & on_skin
    return {
        **{f"lesion {name}": value for name, value in zip("Lab", lesion)},
        **{f"skin {name}": value for name, value in zip("Lab", skin)},
        "contrast ΔE": np.linalg.norm(lesion - skin),
        "contrast L": skin[0] - lesion[0],
        **outline_measures(mask),
        "rim width": width,
        "rim position": position,
        "lesion std L": inside[:, 0].std(),
        "lesion std a": inside[:, 1].std(),
        "lesion std b": inside[:, 2].std(),
        "lesion colours": count_colours(inside),
        "skin std L": lab[far, 0].std(),
        "skin std a": lab[far, 1].std(),
        "skin std b": lab[far, 2].std(),
        "frame slope": spectrum_slope(luminance),
        "lesion slope": lesion_slope(luminance, mask),
        "fine std L, lesion": fine[core].std(),
        "fine std L, skin": fine[far].std(),
        "dark lines on skin": lines.sum() / on_skin.sum(),
        "black frame": (is_frame & ~mask).mean(),
    }


def _or_all(part, whole):
    "The part where it has 30 pixels, else the whole."
    return part if part.sum() >= 30 else whole


def marginals(
    images: np.ndarray,  # (N, S, S, 3) uint8
    masks: np.ndarray,  # (N, S, S) bool
) -> dict:  # measure -> (N,)
    "The marginals of each lesion; nan where the mask is empty or full, or shows too little."
    rows = []
    for image, mask in zip(images, masks):
        if 30 <= mask.sum() <= mask.size - 30:
            rows.append(measure_lesion(image, mask))
        else:
            rows.append({})
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}


def quartiles(values: np.ndarray) -> list:  # 25th, 50th and 75th percentile
    return [float(q) for q in np.nanpercentile(values, [25, 50, 75])]


def compare(
    real: dict,  # measure -> (N,)
    drawn: dict,  # measure -> (M,)
) -> list:  # a row for each measure
    """Quartiles of both; whether the drawn median lies between the real quartiles; how wide the
    drawn middle half is beside the real one (1: as varied).
    """
    rows = []
    for name, values in real.items():
        r, d = quartiles(values), quartiles(drawn[name])
        spread = (d[2] - d[0]) / (r[2] - r[0]) if r[2] > r[0] else np.nan
        rows.append(
            dict(
                measure=name,
                real=r,
                drawn=d,
                inside=bool(r[0] <= d[1] <= r[2]),
                spread=float(spread),
            )
        )
    return rows


def told_apart(
    real: np.ndarray,  # (N, D) features
    drawn: np.ndarray,  # (M, D)
) -> float:  # 0.5: not at all, 1: always
    "AUROC of a logistic regression that tells drawn from real, over five folds."
    n = min(len(real), len(drawn))
    features = np.concatenate([real[:n], drawn[:n]])
    features = np.where(np.isnan(features), np.nanmedian(features, 0), features)
    labels = np.repeat([0, 1], n)
    probe = fit_linear_probe(features, labels)
    order = np.random.default_rng(0).permutation(2 * n)
    scores = cross_val_predict(probe, features[order], labels[order], cv=5, method="predict_proba")[
        :, 1
    ]
    return roc_auc(labels[order], scores)


# ---- outlines learned
def iou(
    predicted: np.ndarray,  # (N, H, W) bool
    masks: np.ndarray,  # (N, H, W) bool
) -> np.ndarray:  # (N,) 0–1; 1 where both are empty
    "Intersection over union of each pair."
    both = (predicted & masks).sum((1, 2))
    either = (predicted | masks).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def centred_disc(size: int, radius: float) -> np.ndarray:  # (size, size) bool
    "A disc in the frame's middle; the radius is in sides of the frame."
    x = (np.arange(size) + 0.5) / size - 0.5
    return np.hypot(x[:, None], x[None]) <= radius


def otsu_masks(images: np.ndarray) -> np.ndarray:  # (N, S, S) bool
    "What Otsu's threshold (1979) on a blurred luminance calls dark."
    masks = []
    for image in images:
        luminance = ndimage.gaussian_filter(rgb_to_lab(image)[..., 0], 2)
        counts, edges = np.histogram(luminance, 128)
        middles = (edges[:-1] + edges[1:]) / 2
        below = counts.cumsum()
        above = below[-1] - below
        sums = (counts * middles).cumsum()
        with np.errstate(all="ignore"):
            gap = sums / below - (sums[-1] - sums) / above
        between = np.nan_to_num(below * above * gap**2)
        masks.append(luminance <= edges[1:][between.argmax()])
    return np.stack(masks)


def _block(c_in, c_out):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
        nn.GroupNorm(4, c_out),
        nn.ReLU(),
        nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
        nn.GroupNorm(4, c_out),
        nn.ReLU(),
    )


class UNet(nn.Module):
    "Ronneberger et al. (2015), small: four levels of `width`, twice as many a level."

    def __init__(self, width=16, levels=4):
        super().__init__()
        widths = [width * 2**k for k in range(levels)]
        self.down = nn.ModuleList([_block(a, b) for a, b in zip([3, *widths], widths)])
        self.up = nn.ModuleList([_block(a + b, a) for a, b in zip(widths, widths[1:])])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):  # (B, 3, S, S) -> (B, S, S) logits
        kept = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for block, skip in zip(self.up[::-1], kept[-2::-1]):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)[:, 0]


def to_tensor(images: np.ndarray) -> torch.Tensor:  # (N, 3, S, S) -1…1
    "uint8 images as a tensor."
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(
    rng: np.random.Generator,
    x: torch.Tensor,  # (B, 3, S, S) -1…1
    masks: torch.Tensor,  # (B, S, S), turned alike
) -> tuple:  # x, masks
    "Flips, quarter turns, and a little brightness, contrast and colour."
    k, flips = int(rng.integers(4)), rng.random() < 0.5
    x, masks = torch.rot90(x, k, (2, 3)), torch.rot90(masks, k, (1, 2))
    if flips:
        x, masks = x.flip(3), masks.flip(2)
    gain = 1 + 0.15 * torch.from_numpy(rng.normal(size=(len(x), 1, 1, 1))).float()
    tint = 0.07 * torch.from_numpy(rng.normal(size=(len(x), 3, 1, 1))).float()
    shift = 0.1 * torch.from_numpy(rng.normal(size=(len(x), 1, 1, 1))).float()
    return x * gain + tint + shift, masks


def train(
    net: nn.Module,
    images: np.ndarray,  # (N, S, S, 3) uint8
    targets: np.ndarray,  # (N, S, S) bool, or (N,) bool
    loss,  # of (logits, targets)
    steps: int,
    batch: int = 16,
    rate: float = 2e-3,
    seed: int = 0,
):
    "AdamW with a one-cycle rate; batches are drawn anew each epoch."
    rng = np.random.default_rng(seed)
    x, y = to_tensor(images), torch.from_numpy(targets).float()
    blank = torch.zeros(1, 1, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    order = np.array([], int)
    net.train()
    for _ in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(x))])
        rows, order = order[:batch], order[batch:]
        is_mask = y.ndim == 3
        seen, turned = augment(rng, x[rows], y[rows] if is_mask else blank.expand(batch, 1, 1))
        optimizer.zero_grad()
        loss(net(seen), turned if is_mask else y[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def predict(net: nn.Module, images: np.ndarray) -> np.ndarray:  # logits
    "The net's logits of each image."
    return torch.cat([net(x) for x in to_tensor(images).split(50)]).numpy()


def outline_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    "Cross-entropy plus soft Dice."
    share = logits.sigmoid()
    both = (share * masks).sum((1, 2))
    dice = (2 * both + 1) / (share.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - dice.mean()


def train_unet(
    images: np.ndarray,  # (N, S, S, 3) uint8
    masks: np.ndarray,  # (N, S, S) bool
    seed: int,
) -> UNet:
    "A U-Net that finds the lesions of these images."
    seed_everything(seed)
    return train(UNet(), images, masks, outline_loss, UNET_STEPS, seed=seed)


def fold_unet(images, masks, seed: int = 0, folds: int = 5) -> np.ndarray:  # (N,) IoU
    "IoU on each image of a U-Net trained on the other folds: what these images themselves allow."
    part = np.random.default_rng(seed).permutation(len(images)) % folds
    scores = np.zeros(len(images))
    for k in range(folds):
        net = train_unet(images[part != k], masks[part != k], seed)
        scores[part == k] = iou(predict(net, images[part == k]) > 0, masks[part == k])
    return scores


# ---- melanoma learned
class Classifier(nn.Module):
    "Five strided convolutions, mean and maximum over the image, one logit."

    def __init__(self, width=24):
        super().__init__()
        layers, c = [], 3
        for k in range(5):
            c_out = width * min(2**k, 8)
            layers += [nn.Conv2d(c, c_out, 3, 2, 1, bias=False), nn.GroupNorm(4, c_out), nn.ReLU()]
            c = c_out
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * c, 1))

    def forward(self, x):  # (B, 3, S, S) -> (B,)
        x = self.body(x)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))[:, 0]


@torch.no_grad()
def encoder_features(images: np.ndarray) -> np.ndarray:  # (N, 3 D)
    "Mean, standard deviation and maximum of the shipped base's patches."
    model, processor = models.load()
    found = []
    for start in range(0, len(images), 64):
        batch = [Image.fromarray(image) for image in images[start : start + 64]]
        pixels = images_to_pixel_values(processor, batch)
        patches = model.model.vision_tower(pixel_values=pixels).last_hidden_state.float()
        found.append(torch.cat([patches.mean(1), patches.std(1), patches.amax(1)], 1))
    return torch.cat(found).numpy()


def score_melanoma(
    images: np.ndarray,  # (N, S, S, 3) uint8, to learn from
    is_melanoma: np.ndarray,  # (N,)
    test: np.ndarray,  # (M, S, S, 3) uint8
    seed: int,
) -> dict:  # classifier -> (M,) scores
    "Scores of the test images by three classifiers that learned from the others."
    found = {}
    for name, features in (("colours", colour_statistics), ("encoder", encoder_features)):
        probe = fit_linear_probe(features(images), is_melanoma)
        found[name] = probe.predict_proba(features(test))[:, 1]
    seed_everything(seed)
    loss = F.binary_cross_entropy_with_logits
    net = Classifier()
    train(net, images, is_melanoma, loss, CLASSIFIER_STEPS, batch=32, seed=seed)
    found["CNN"] = predict(net, test)
    return found


def mean_auroc(labels: np.ndarray, scores: np.ndarray) -> float:  # scores (M, seeds)
    "AUROC averaged over seeds."
    return float(np.mean([roc_auc(labels, column) for column in scores.T]))


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


def measure_marginals(folder, draw, seeds, **options) -> dict:
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


def measure_unet(folder, draw, seeds, bound=False, **options) -> dict:
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
    for seed in range(seeds):
        drawn, drawn_masks, _ = draw(N_OUTLINES, FIRST_SEED + 1 + seed, SIZE)
        drawn, drawn_masks = resize_images(drawn, UNET_SIZE), resize_masks(drawn_masks, UNET_SIZE)
        net = train_unet(drawn, drawn_masks, seed)
        trained.append(iou(predict(net, images) > 0, masks))
        print(f"  U-Net, seed {seed}: {trained[-1].mean():.3f}", flush=True)
    scores[f"U-Net, {N_OUTLINES} drawn"] = trained
    if bound:
        scores["U-Net, real masks, 5 folds"] = [fold_unet(images, masks)]
    rows = []
    for name, by_seed in scores.items():
        interval = bootstrap(np.mean, np.mean(by_seed, 0))
        rows.append(dict(trained=name, iou=interval, seeds=[float(s.mean()) for s in by_seed]))
    print(make_table([row | dict(seeds=_list(row["seeds"])) for row in rows]))
    return dict(rows=rows)


def measure_melanoma(folder, draw, seeds, bound=False, **options) -> dict:
    "AUROC on ISIC 2017's validation images of classifiers that saw drawn lesions only."
    test, truth, digests = read_classified(folder, "Validation", CLASSIFIER_SIZE)
    scores = {}
    for seed in range(seeds):
        images, _, is_melanoma = draw(N_CLASSIFIED, FIRST_SEED + 100 + seed, CLASSIFIER_SIZE)
        for name, found in score_melanoma(images, is_melanoma, test, seed).items():
            scores.setdefault(f"{name}, {N_CLASSIFIED} drawn", []).append(found)
            print(f"  {name}, seed {seed}: {roc_auc(truth, found):.3f}", flush=True)
    if bound:
        images, is_melanoma, _ = read_classified(folder, "Training", CLASSIFIER_SIZE, digests)
        for name, found in score_melanoma(images, is_melanoma, test, 0).items():
            scores[f"{name}, {len(images)} real"] = [found]
    rows = []
    for name, by_seed in scores.items():
        interval = bootstrap(mean_auroc, truth, np.stack(by_seed, 1))
        each = [roc_auc(truth, s) for s in by_seed]
        rows.append(dict(trained=name, auroc=interval, seeds=each))
    print(make_table([row | dict(seeds=_list(row["seeds"])) for row in rows]))
    return dict(rows=rows, images=len(truth), melanoma=int(truth.sum()))


def save_grid(folder, draw, seeds, grid=None, **options) -> dict:
    "A picture of drawn beside real lesions, where `--grid` says."
    if not grid:
        raise SystemExit("--what grid: say where to write the picture with --grid FILE.png")
    make_grid(read_masked(folder, SIZE)[0], draw(24, FIRST_SEED, SIZE)[0]).save(grid)
    print(f"24 real lesions (left) beside 24 drawn (right): {grid}")
    return dict(grid=Path(grid).name)


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
        told[name] = MEASURES[name](
            Path(args.real), draw, args.seeds, bound=args.bound, grid=args.grid
        )
        told[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"({told[name]['seconds']} s)", flush=True)
    if args.json:
        atomic_write(args.json, dump_json(told, indent=1, ensure_ascii=False) + "\n")
    return told


if __name__ == "__main__":
    main()
