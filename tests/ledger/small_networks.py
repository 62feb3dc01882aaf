"""Outlines and melanoma, learned by small networks on one core: a U-Net, a classifier, and linear
probes of colour statistics and of the shipped base's vision encoder.
"""

import functools

import numpy as np
import torch
from lesion_marginals import abcd_features, colour_statistics, rgb_to_lab
from PIL import Image
from scipy import ndimage
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from mmkit import models
from mmkit.audit.linear_probe import fit_linear_probe
from mmkit.chat.images import images_to_pixel_values
from mmkit.core.runtime import seed_everything

UNET_STEPS = 400  # of 16 images
CLASSIFIER_STEPS = 600  # of 32 images


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


@functools.lru_cache(1)
def load_base() -> tuple:  # model, processor
    "The shipped base, loaded once."
    return models.load()


@torch.no_grad()
def encoder_features(images: np.ndarray) -> np.ndarray:  # (N, 3 D)
    "Mean, standard deviation and maximum of the shipped base's patches."
    model, processor = load_base()
    found = []
    for start in range(0, len(images), 64):
        batch = [Image.fromarray(image) for image in images[start : start + 64]]
        pixels = images_to_pixel_values(processor, batch)
        patches = model.model.vision_tower(pixel_values=pixels).last_hidden_state.float()
        found.append(torch.cat([patches.mean(1), patches.std(1), patches.amax(1)], 1))
    return torch.cat(found).numpy()


def largest_part(
    mask: np.ndarray,  # (H, W) bool
) -> np.ndarray:  # (H, W) bool
    "Its largest connected part, holes filled; empty where the mask is."
    parts, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    return ndimage.binary_fill_holes(parts == 1 + sizes.argmax())


def score_by_abcd(
    images: np.ndarray,  # (N, S, S, 3) uint8, to learn from
    masks: np.ndarray,  # (N, S, S) bool
    is_melanoma: np.ndarray,  # (N,)
    test: np.ndarray,  # (M, S, S, 3) uint8
    test_masks: np.ndarray,  # (M, S, S) bool, found by a U-Net
) -> np.ndarray:  # (M,) scores
    "Scores of the test images by a linear probe of asymmetry, border, colours and size."
    features, seen = abcd_features(images, masks), abcd_features(test, test_masks)
    usual = np.nanmedian(features, 0)
    features = np.where(np.isnan(features), usual, features)
    seen = np.where(np.isnan(seen), usual, seen)
    return fit_linear_probe(features, is_melanoma).predict_proba(seen)[:, 1]


def score_by_probe(
    get_features,  # images -> (N, D)
    images: np.ndarray,  # (N, S, S, 3) uint8, to learn from
    is_melanoma: np.ndarray,  # (N,)
    test: np.ndarray,  # (M, S, S, 3) uint8
) -> np.ndarray:  # (M,) scores
    "Scores of the test images by a linear probe of some features of the others."
    probe = fit_linear_probe(get_features(images), is_melanoma)
    return probe.predict_proba(get_features(test))[:, 1]


def score_melanoma(
    images: np.ndarray,  # (N, S, S, 3) uint8, to learn from
    is_melanoma: np.ndarray,  # (N,)
    test: np.ndarray,  # (M, S, S, 3) uint8
    seed: int,
) -> dict:  # classifier -> (M,) scores
    "Scores of the test images by two classifiers that learned from the others."
    found = {"colours": score_by_probe(colour_statistics, images, is_melanoma, test)}
    seed_everything(seed)
    loss = F.binary_cross_entropy_with_logits
    net = Classifier()
    train(net, images, is_melanoma, loss, CLASSIFIER_STEPS, batch=32, seed=seed)
    found["CNN"] = predict(net, test)
    return found


def mean_auroc(
    labels: np.ndarray,  # (M,) bool
    scores: np.ndarray,  # (M, R) one column a seed
) -> float:  # nan unless both classes occur
    "AUROC averaged over seeds, from ranks: quick enough to be resampled."
    positive = np.asarray(labels, bool)
    n, n_negative = positive.sum(), (~positive).sum()
    if not n or not n_negative:
        return float("nan")
    rank_sums = rankdata(scores, axis=0)[positive].sum(0)
    return float(np.mean((rank_sums - n * (n + 1) / 2) / (n * n_negative)))
