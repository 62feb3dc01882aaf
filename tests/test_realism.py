"""The program that compares drawn lesions with real ones finds what is known to be there."""

import copy
import importlib
import json
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mmkit.core.provenance import WORLD_VERSION
from mmkit.core.stats import roc_auc
from mmkit.data.realism import (
    FORMER,
    PRESENT,
    describe_realism,
    load_realism,
    plot_realism,
    read_thumbnails,
)

REAL = Path(os.environ.get("MMKIT_REAL") or ROOT.parent / "shared" / "real")
SKIN, LESION = np.array([220.0, 180, 160]), np.array([120.0, 70, 50])


@pytest.fixture(scope="module")
def ledger():
    "The program's modules; they find each other in their folder."
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "tests" / "ledger"))
    names = ("realism", "lesion_marginals", "small_networks")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = before
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def realism(ledger):
    return ledger.realism


@pytest.fixture
def looks(ledger):
    return ledger.lesion_marginals


@pytest.fixture
def networks(ledger):
    return ledger.small_networks


def blend(weight):
    "A lesion where the weight is 1, skin where it is 0."
    image = SKIN + (LESION - SKIN) * np.asarray(weight)[..., None]
    return np.round(image).astype(np.uint8)


def distance_to_centre(size, row=0.5, column=0.5):
    x = (np.arange(size) + 0.5) / size
    return np.hypot(x[:, None] - row, x[None] - column) * size


def draw_discs(n, seed, size):
    "Dark discs on skin; every other one is a melanoma and redder."
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for i in range(n):
        centre = rng.uniform(0.4, 0.6, 2)
        mask = distance_to_centre(size, *centre) < size * rng.uniform(0.15, 0.3)
        image = blend(mask).astype(int)
        image[..., 0] += 25 * (i % 2)
        images.append(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8))
        masks.append(mask)
    return np.stack(images), np.stack(masks), np.arange(n) % 2 == 1


# ---- marginals
def test_lab_of_known_colours(looks):
    lab = looks.rgb_to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]))
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(lab, expected, atol=0.03)


@pytest.mark.parametrize("width", [0.1, 0.3, 0.6])
def test_rim_of_a_disc_has_its_known_width(looks, width):
    size, radius = 128, 36
    distance = distance_to_centre(size)
    weight = np.clip(0.5 - (distance / radius - 1) / width, 0, 1)
    lab_like = np.stack([100 - 60 * weight, 20 * weight, 10 * weight], -1)
    found, position = looks.rim_profile(lab_like, distance < radius)
    assert found == pytest.approx(0.8 * width, abs=0.04)  # of a ramp, 10% to 90% is four fifths
    assert position == pytest.approx(0, abs=0.03)


def test_rim_position_says_how_far_outside_the_mask_the_rim_lies(looks):
    distance = distance_to_centre(128)
    weight = np.clip(0.5 - (distance - 36) / 10, 0, 1)
    lab_like = np.stack([100 - 60 * weight, 20 * weight, 10 * weight], -1)
    _, wide_mask = looks.rim_profile(lab_like, distance < 42)
    _, narrow_mask = looks.rim_profile(lab_like, distance < 30)
    assert wide_mask == pytest.approx(-6 / 42, abs=0.03)
    assert narrow_mask == pytest.approx(6 / 30, abs=0.03)


def test_rim_out_of_the_frame_is_missing(looks):
    mask = np.ones((64, 64), bool)
    mask[:4, :4] = False
    width, position = looks.rim_profile(looks.rgb_to_lab(blend(mask)), mask)
    assert np.isnan(width) and np.isnan(position)


def test_marginals_of_a_flat_disc(looks):
    mask = distance_to_centre(128, 0.5, 0.6) < 30
    found = looks.marginals(blend(mask)[None], mask[None])
    lesion, skin = looks.rgb_to_lab(np.stack([LESION, SKIN]))
    assert [found[f"lesion {c}"][0] for c in "Lab"] == pytest.approx(lesion, abs=1e-4)
    assert [found[f"skin {c}"][0] for c in "Lab"] == pytest.approx(skin, abs=1e-4)
    assert found["contrast ΔE"][0] == pytest.approx(np.linalg.norm(lesion - skin), abs=1e-3)
    assert found["contrast L"][0] == pytest.approx(skin[0] - lesion[0], abs=1e-3)
    assert found["area share"][0] == pytest.approx(np.pi * 30**2 / 128**2, rel=0.01)
    assert found["elongation"][0] == pytest.approx(1, abs=0.01)
    assert found["centre offset"][0] == pytest.approx(0.1, abs=0.002)
    assert found["solidity"][0] > 0.95
    assert found["lesion std L"][0] == pytest.approx(0, abs=1e-3)
    assert found["lesion colours"][0] == 1
    assert found["fine std L, lesion"][0] == pytest.approx(0, abs=0.2)
    assert found["fine std L, skin"][0] == pytest.approx(0, abs=0.2)
    assert found["dark lines on skin"][0] == found["black frame"][0] == 0


def test_outline_of_an_ellipse_and_of_a_cross(looks):
    y, x = np.indices((128, 128)) - 63.5
    assert looks.asymmetry((x / 50) ** 2 + (y / 25) ** 2 < 1) < 0.01
    ellipse = looks.outline_measures((x / 50) ** 2 + (y / 25) ** 2 < 1)
    assert ellipse["elongation"] == pytest.approx(2, rel=0.02)
    assert ellipse["solidity"] > 0.95
    cross = (np.abs(x) < 10) & (np.abs(y) < 50) | (np.abs(y) < 10) & (np.abs(x) < 50)
    share = cross.sum() / (100**2 - 2 * 40**2)  # its hull is a square without four triangles
    assert looks.outline_measures(cross)["solidity"] == pytest.approx(share, rel=0.01)


def test_asymmetry_of_a_half_disc_and_of_one_with_a_bite(looks):
    y, x = np.indices((128, 128)) - 63.5
    disc = x**2 + y**2 < 50**2
    half = disc & (x > 0)  # symmetric over one axis only
    quarter = disc & (x > 0) & (y > 0)
    assert 0 < looks.asymmetry(half) < 0.3
    assert looks.asymmetry(disc) < 0.02 < looks.asymmetry(quarter)
    bitten = half & ~((x - 20) ** 2 + (y - 20) ** 2 < 20**2)
    assert looks.asymmetry(bitten) > looks.asymmetry(half) + 0.1


def test_abcd_features_have_a_row_for_a_lesion_that_was_not_found(looks):
    mask = distance_to_centre(96) < 25
    found = looks.abcd_features(np.stack([blend(mask)] * 2), np.stack([mask, mask & False]))
    assert found.shape == (2, len(looks.ABCD_MEASURES))
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
    assert looks.abcd_features(blend(mask)[None], mask[None] & False).shape == (1, 12)


def test_largest_part_is_one_and_has_no_hole(networks):
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[5:8, 5:8] = False
    mask[15:18, 15:18] = True
    found = networks.largest_part(mask)
    assert found.sum() == 100 and found[6, 6] and not found[16, 16]
    assert not networks.largest_part(mask & False).any()


@pytest.mark.parametrize("exponent", [2.0, 3.0])
def test_slope_of_power_law_noise(looks, exponent):
    rng, size = np.random.default_rng(0), 128
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    slopes = []
    for _ in range(10):
        white = np.fft.rfft2(rng.normal(size=(size, size)))
        noise = np.fft.irfft2(white * frequency ** (-exponent / 2))
        slopes.append(looks.spectrum_slope(noise))
    assert np.mean(slopes) == pytest.approx(-exponent, abs=0.1)


def test_lesion_slope_sees_the_lesion_only(looks):
    rng = np.random.default_rng(0)
    mask = np.zeros((128, 128), bool)
    mask[20:100, 30:110] = True
    noises = [np.where(mask, rng.normal(size=mask.shape), 100.0) for _ in range(10)]
    slopes = [looks.lesion_slope(noise, mask) for noise in noises]
    assert np.mean(slopes) == pytest.approx(0, abs=0.15)
    assert np.isnan(looks.lesion_slope(noises[0], distance_to_centre(128) < 6))


def test_dark_lines_finds_a_hair_and_no_lesion(looks):
    luminance = np.full((64, 64), 70.0)
    luminance[:, 10] -= 20  # a hair
    luminance[20:40, 30:50] -= 20  # a lesion
    found = looks.dark_lines(luminance)
    assert found[:, 10].all() and found.sum() == 64


def test_count_colours_leaves_out_what_is_rare(looks):
    lab = np.repeat([[6.0, 6, 6], [42, 6, 6], [78, 6, 6]], [60, 37, 3], axis=0)
    assert looks.count_colours(lab) == 2


def test_a_full_or_empty_mask_is_missing(looks):
    mask = distance_to_centre(64) < 20
    masks = np.stack([mask, np.ones_like(mask), np.zeros_like(mask)])
    found = looks.marginals(np.stack([blend(mask)] * 3), masks)
    assert np.isnan(found["area share"]).tolist() == [False, True, True]


def test_compare_says_inside_and_how_varied(looks):
    values = np.random.default_rng(0).normal(size=1000)
    real = {"same": values, "moved": values, "narrow": values}
    drawn = {"same": values, "moved": values + 1, "narrow": values / 2}
    rows = {row["measure"]: row for row in looks.compare(real, drawn)}
    assert [rows[name]["inside"] for name in real] == [True, False, True]
    assert rows["same"]["spread"] == 1
    assert rows["narrow"]["spread"] == pytest.approx(0.5)


def test_told_apart_is_one_half_for_the_same_and_one_for_others(looks):
    rng = np.random.default_rng(0)
    real, alike, other = rng.normal(size=(200, 3)), rng.normal(size=(200, 3)), None
    other = alike + [6, 0, 0]
    other[:20, 1] = np.nan  # what is missing is no error
    assert roc_auc(*looks.tell_apart(real, alike)) == pytest.approx(0.5, abs=0.12)
    is_drawn, scores = looks.tell_apart(real[:50], other)  # as many of either
    assert is_drawn.tolist() == [False] * 50 + [True] * 50
    assert roc_auc(is_drawn, scores) > 0.99


# ---- outlines
def test_iou_of_known_masks(networks):
    a, b, empty = np.zeros((3, 8, 8), bool)
    a[:4], b[2:6] = True, True
    found = networks.iou(np.stack([a, a, a, empty]), np.stack([a, b, empty, empty]))
    np.testing.assert_allclose(found, [1, 1 / 3, 0, 1])


def test_centred_disc_has_its_area(networks):
    assert networks.centred_disc(128, 0.3).mean() == pytest.approx(np.pi * 0.09, rel=0.01)


def test_otsu_finds_a_dark_disc(networks):
    images, masks, _ = draw_discs(4, 0, 96)
    assert networks.iou(networks.otsu_masks(images), masks).min() > 0.9


def test_resized_masks_keep_their_share(realism):
    mask = distance_to_centre(300)[:, :240] < 100
    small = realism.resize_masks(mask[None], 96)
    assert small.shape == (1, 96, 96)
    assert small.mean() == pytest.approx(mask.mean(), rel=0.02)
    stripes = np.zeros((1, 300, 300), bool)
    stripes[:, ::5] = True  # nowhere the larger part
    assert not realism.resize_masks(stripes, 30).any()


def test_augment_turns_image_and_mask_alike(networks):
    images, masks, _ = draw_discs(6, 1, 32)
    images = np.repeat(np.where(masks, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    x, y = networks.to_tensor(images), networks.torch.from_numpy(masks)
    for seed in range(6):
        turned, mask = networks.augment(np.random.default_rng(seed), x, y)
        assert turned.shape == x.shape
        assert ((turned.mean(1) < 0) == mask).all()


def test_unet_learns_discs_and_training_is_seeded(networks, monkeypatch):
    monkeypatch.setattr(networks, "UNET_STEPS", 40)
    images, masks, _ = draw_discs(64, 0, 32)
    seen, truth, _ = draw_discs(20, 1, 32)
    logits = networks.predict(networks.train_unet(images, masks, seed=0), seen)
    assert networks.iou(logits > 0, truth).mean() > 0.8
    again = networks.predict(networks.train_unet(images, masks, seed=0), seen)
    np.testing.assert_array_equal(logits, again)


# ---- melanoma
def test_colour_statistics_are_eighteen(looks):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1, :4] = 200
    found = looks.colour_statistics(images)
    assert found.shape == (2, 18)
    assert (found[0] == 0).all()
    np.testing.assert_allclose(found[1, :6], 100)  # means and deviations


def test_mean_auroc_averages_seeds(networks):
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[0, 3], [1, 2], [2, 1], [3, 0]])
    assert networks.mean_auroc(labels, scores) == 0.5
    assert networks.mean_auroc(labels, scores[:, :1]) == 1
    rng = np.random.default_rng(0)
    labels, scores = rng.random(60) < 0.3, rng.integers(0, 9, (60, 3))  # with ties
    expected = np.mean([roc_auc(labels, column) for column in scores.T])
    assert networks.mean_auroc(labels, scores) == pytest.approx(expected)
    assert np.isnan(networks.mean_auroc(np.ones(3, bool), scores[:3]))


# ---- the whole program
@pytest.fixture
def made_folder(tmp_path):
    "Discs, laid out like the real sets; the first training image is also one of validation."
    images, masks, is_melanoma = draw_discs(30, 5, 64)
    folders = [tmp_path / "isic2018_masks" / name for name in ("images", "masks")]
    parts = {"Training": range(0, 20), "Validation": [0, *range(20, 30)]}
    for part in parts:
        folders.append(tmp_path / "isic2017" / f"ISIC-2017_{part}_Data")
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(images[i]).save(folders[0] / f"ISIC_{i}.jpg", quality=95)
        Image.fromarray(masks[i].astype(np.uint8) * 255).save(folders[1] / f"ISIC_{i}.png")
    Image.new("L", (64, 64)).save(folders[1] / "ISIC_99_segmentation.png")  # has no photograph
    for part, rows in parts.items():
        lines = ["image_id,melanoma", "ISIC_absent,1.0"]
        for i in rows:
            name = f"ISIC_{part}_{i}"
            file = tmp_path / "isic2017" / f"ISIC-2017_{part}_Data" / f"{name}.jpg"
            Image.fromarray(images[i]).save(file, quality=95)
            lines.append(f"{name},{float(is_melanoma[i])}")
        table = tmp_path / "isic2017" / f"ISIC-2017_{part}_Classes.csv"
        table.write_text("\n".join(lines), encoding="utf-8-sig")
    return tmp_path


def test_reads_what_is_there_and_leaves_out_copies(realism, made_folder):
    images, masks = realism.read_masked(made_folder, 32)
    assert images.shape == (12, 32, 32, 3) and masks.shape == (12, 32, 32)
    assert ((images.mean(-1) < 140) == masks).mean() > 0.97
    validation, _, digests = realism.read_classified(made_folder, "Validation", 32)
    training, is_melanoma, _ = realism.read_classified(made_folder, "Training", 32, digests)
    assert len(validation) == 11
    assert len(training) == len(is_melanoma) == 19
    assert is_melanoma.sum() == 10


SMALL_NUMBERS = dict(N_MARGINALS=24, N_OUTLINES=24, N_CLASSIFIED=64, N_MEASURED=40, N_HELD=20)


def test_measures_another_renderer_from_the_command_line(
    realism, networks, made_folder, tmp_path, monkeypatch, capsys
):
    for name, value in SMALL_NUMBERS.items():
        monkeypatch.setattr(realism, name, value)
    for name, value in dict(SIZE=64, UNET_SIZE=32, CLASSIFIER_SIZE=32).items():
        monkeypatch.setattr(realism, name, value)
    for name in ("UNET_STEPS", "CLASSIFIER_STEPS"):
        monkeypatch.setattr(networks, name, 3)
    out, grid = tmp_path / "found.json", tmp_path / "grid.png"
    arguments = ["--real", str(made_folder), "--draw", "test_realism:draw_discs", "--bound"]
    arguments += ["--what", "marginals,unet,melanoma,encoder,grid", "--seeds", "2"]
    out.write_text('{"another:draw": {"unet": 1}}', encoding="utf-8")
    realism.main([*arguments, "--json", str(out), "--grid", str(grid)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert str(made_folder) not in out.read_text(encoding="utf-8")
    assert record["another:draw"] == {"unet": 1}  # what was there is kept
    found = record["test_realism:draw_discs"]
    for part in found.values():
        assert part["num_seeds"] == 2 and part["machine"] and "realism.py" in part["command"]
    rows = {row["measure"]: row for row in found["marginals"]["rows"]}
    assert rows["lesion L"]["inside"] and rows["contrast ΔE"]["inside"]
    told = found["marginals"]["told_apart"]
    assert [row["told_from"] for row in told] == ["real lesions", "another draw"] * 2
    rows = [*found["melanoma"]["rows"], *found["encoder"]["rows"]]
    rows = {(row["classifier"], row["trained_on"]): row for row in rows}
    colours = rows["colours", "64 drawn"]
    assert colours["validation"][0] == colours["drawn"][0] == 1  # redness is there to be read
    assert {("ABCD", "40 drawn"), ("CNN", "64 drawn"), ("encoder", "64 drawn")} < set(rows)
    assert rows["ABCD", "19 real"]["training"] is None  # it has learned from these
    assert found["melanoma"]["melanoma_of"]["drawn"] == [10, 20]
    assert len(found["melanoma"]["alone"]) == 12
    assert [len(row["seeds"]) for row in found["unet"]["rows"]] == [1, 1, 2, 1]
    assert Image.open(grid).size == (2 * 4 * 128 + 24, 3 * 128)  # twelve of either
    assert "another draw" in capsys.readouterr().out


def test_thumbnails_of_a_folder_are_photographs_not_masks(made_folder):
    found = read_thumbnails(made_folder / "isic2018_masks", n=30, size=24)
    assert found.shape == (12, 24, 24, 3)  # of 12 images and 13 masks
    assert (found.std(-1).mean((1, 2)) > 5).all()  # coloured; a mask is grey
    assert len(read_thumbnails(made_folder, n=5)) == 5
    other_seed = read_thumbnails(made_folder, n=5, seed=1)
    assert (read_thumbnails(made_folder, n=5) != other_seed).any()


def test_without_a_folder_it_says_so(realism, monkeypatch, capsys):
    monkeypatch.delenv("MMKIT_REAL", raising=False)
    for arguments in ([], ["--real", "nowhere"]):
        with pytest.raises(SystemExit):
            realism.main(arguments)
        assert "isic2018_masks" in capsys.readouterr().err


def test_todays_world_can_be_drawn(realism):
    draw = realism.load_draw("realism:draw_world")
    images, masks, is_melanoma = draw(12, 0, 48)
    assert images.shape == (12, 48, 48, 3) and images.dtype == np.uint8
    assert masks.shape == (12, 48, 48) and masks.dtype == bool
    assert is_melanoma.shape == (12,) and is_melanoma.dtype == bool
    assert 0 < is_melanoma.sum() < 12


# ---- the record that the chapter shows
@pytest.fixture(scope="module")
def record():
    return load_realism()


def test_record_says_how_and_on_which_lesions_it_was_measured(record):
    assert set(record) == {PRESENT, FORMER}
    assert "marginals" in record[PRESENT] and "marginals" in record[FORMER]
    for renderer, version in {PRESENT: WORLD_VERSION, FORMER: 1}.items():
        for name, part in record[renderer].items():
            assert part["world_version"] == version
            assert bool(part["base_checksum"]) == (name == "encoder")
            assert part["num_seeds"] == 3
            assert f"--draw {renderer}" in part["command"] and "FOLDER" in part["command"]
            assert part["machine"] and part["versions"] and part["date"] and part["seconds"] > 0
    assert len(record[PRESENT]["marginals"]["rows"]) == 28  # as its figure says
    for part in ("melanoma", "encoder"):
        if part in record[PRESENT]:
            assert record[PRESENT][part]["melanoma_of"]["validation"] == [30, 150]


def recorded_rows(record):
    "(intervals, seeds) of each row of the record, except the marginals' quartiles."
    for parts in record.values():
        for part in parts.values():
            rows = part["told_apart"] if "told_apart" in part else part["rows"]
            for row in [*rows, *part.get("alone", [])]:
                numbers = [row.get(name) for name in INTERVALS]
                yield [each for each in numbers if each], row.get("seeds")


INTERVALS = ("auroc", "iou", "validation", "training", "drawn", "real")


def test_recorded_intervals_contain_their_estimates(record):
    found = list(recorded_rows(record))
    assert len(found) >= 8
    for intervals, seeds in found:
        assert intervals
        for value, low, high in intervals:
            assert 0 <= low <= value <= high <= 1
        if seeds:
            assert len(seeds) in (1, 3)
            assert intervals[0][0] == pytest.approx(np.mean(seeds), abs=2e-4)


def drawn_points(ax):
    "The points of an axes with their intervals, as (value, low, high) to three digits."
    points = []
    for container in ax.containers:
        line, _, (bars,) = container.lines
        (low, _), (high, _) = bars.get_segments()[0]
        points.append(tuple(np.round([line.get_xdata()[0], low, high], 3)))
    return sorted(points)


def test_figure_shows_the_points_of_the_record(record):
    now, before = record[PRESENT], record[FORMER]
    told = [row["auroc"] for row in now["marginals"]["told_apart"]]
    for row in before["marginals"]["told_apart"]:
        told += [row["auroc"]] * (row["told_from"] == "real lesions")
    outlines = [row["iou"] for row in now.get("unet", {}).get("rows", [])]
    if outlines:
        rows = before["unet"]["rows"]
        outlines += [row["iou"] for row in rows if row["trained"].endswith("drawn")]
    melanoma = []
    for part in ("melanoma", "encoder"):
        for row in now.get(part, {}).get("rows", []):
            melanoma += [row[name] for name in ("validation", "drawn") if row[name]]
    expected = [numbers for numbers in (told, outlines, melanoma) if numbers]
    figure = plot_realism(record)
    assert len(figure.axes) == len(expected)
    for ax, numbers in zip(figure.axes, expected):
        assert drawn_points(ax) == sorted(tuple(np.round(each, 3)) for each in numbers)
    plt.close(figure)


def test_chapter_prints_the_sentences_of_the_record(record):
    chapter = nbformat.read(ROOT / "nbs/course/01_lesions.ipynb", as_version=4)
    outputs = [output for cell in chapter.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    for paragraph in describe_realism(record):
        assert textwrap.fill(paragraph, 98) in printed, "execute chapter 01 again"


@pytest.mark.skipif(
    not (REAL / "isic2018_masks").is_dir(),
    reason="no real data here: isic2018_masks is absent (set MMKIT_REAL)",
)
def test_real_lesions_are_darker_than_skin_and_of_many_sizes(realism, looks):
    images, masks = realism.read_masked(REAL, 64)
    assert len(images) == len(masks) == 150
    found = looks.marginals(images, masks)
    assert np.nanmedian(found["contrast L"]) > 5
    assert np.nanmedian(found["area share"]) < 0.3 < np.nanmax(found["area share"])
    assert -0.2 < np.nanmedian(found["rim position"]) < 0.05


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ([0.64, 0.59, 0.69], "more than guessing"),
        ([0.52, 0.46, 0.58], "not distinguishable from guessing"),
        ([0.41, 0.36, 0.46], "less than guessing"),
    ],
)
def test_verdicts_on_more_images_follow_their_interval(interval, verdict):
    record = copy.deepcopy(load_realism())
    for part in ("melanoma", "encoder"):
        for row in record[PRESENT][part]["rows"]:
            row["training"] = interval
    (sentences,) = [text for text in describe_realism(record) if "more real images" in text]
    assert f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}], {verdict}" in sentences
