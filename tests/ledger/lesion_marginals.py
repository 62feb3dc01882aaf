"""Measures of one lesion's looks, from its image and mask: colour, contrast, rim, texture, outline;
and how far two sets of lesions differ in them.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from sklearn.isotonic import isotonic_regression
from sklearn.model_selection import cross_val_predict

from mmkit.audit.linear_probe import fit_linear_probe

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
def asymmetry(
    mask: np.ndarray,  # (S, S) bool
) -> float:  # 0: its own mirror image over both principal axes; towards 1: nothing coincides
    "Share of the outline that its mirror image misses, mean of both principal axes."
    points = np.argwhere(mask)
    centre = points.mean(0)
    _, axes = np.linalg.eigh(np.cov(points.T) + np.eye(2) / 12)
    missed = []
    for axis in axes.T:
        mirror = np.eye(2) - 2 * np.outer(axis, axis)
        offset = centre - mirror @ centre
        mirrored = ndimage.affine_transform(mask.astype(np.float32), mirror, offset, order=1)
        missed.append(1 - (mask & (mirrored > 0.5)).sum() / len(points))
    return float(np.mean(missed))


def outline_measures(
    mask: np.ndarray,  # (S, S) bool
) -> dict:  # measure -> number
    "Area share, elongation, asymmetry, distance of the centre from the frame's, hull filled."
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
        "asymmetry": asymmetry(mask),
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


ABCD_MEASURES = (
    "asymmetry",
    "solidity",
    "elongation",
    "rim width",
    "contrast L",
    "contrast ΔE",
    "lesion std L",
    "lesion std a",
    "lesion std b",
    "lesion colours",
    "fine std L, lesion",
    "area share",
)  # none depends on the skin's own colour


def abcd_features(
    images: np.ndarray,  # (N, S, S, 3) uint8
    masks: np.ndarray,  # (N, S, S) bool
) -> np.ndarray:  # (N, 12); nan where the mask shows too little
    "What the ABCD rule looks at, as marginals: asymmetry, border, colours, size and structure."
    found = marginals(images, masks)
    missing = np.full(len(images), np.nan)
    return np.stack([found.get(name, missing) for name in ABCD_MEASURES], 1)


def tell_apart(
    real: np.ndarray,  # (N, D) features
    drawn: np.ndarray,  # (M, D)
) -> tuple:  # is_drawn (2K,), scores (2K,); K is the smaller of N and M
    "Scores of a logistic regression that tells drawn from real, over five folds."
    n = min(len(real), len(drawn))
    features = np.concatenate([real[:n], drawn[:n]])
    features = np.where(np.isnan(features), np.nanmedian(features, 0), features)
    is_drawn = np.repeat([False, True], n)
    order = np.random.default_rng(0).permutation(2 * n)
    probe = fit_linear_probe(features, is_drawn)
    found = cross_val_predict(probe, features[order], is_drawn[order], cv=5, method="predict_proba")
    scores = np.empty(2 * n)
    scores[order] = found[:, 1]
    return is_drawn, scores
