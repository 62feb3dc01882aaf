"""Published sets: every trap they hold, on small made folders, and on the real files where they
are at hand.
"""

import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from mmkit.data.clinical import load_ddi, load_fitzpatrick17k, load_pad_ufes_20
from mmkit.data.folders import load_folder
from mmkit.data.gallery import plot_records
from mmkit.data.isic import load_ham10000, load_isic2017, load_siim_isic
from mmkit.data.records import dataset_fingerprint
from mmkit.data.seven_point import load_derm7pt, load_ph2
from mmkit.data.splits import find_leakage, remove_leakage, split_records
from mmkit.data.tables import load_table
from mmkit.lesions.render import World

REAL = Path(os.environ.get("MMKIT_REAL") or Path(__file__).resolve().parents[2] / "shared" / "real")


def real(name):
    return pytest.mark.skipif(
        not (REAL / name).is_dir(),
        reason=f"no real data here: {REAL.name}/{name} is absent (set MMKIT_REAL)",
    )


pytestmark = pytest.mark.usefixtures("cache")

WORLD = World(seed=8, num_lesions=40)


def picture(file, i=0, mode="RGB", size=32, **kw):
    "A small lesion as a file."
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    im = PIL.Image.fromarray(WORLD.render(i, size).image)
    if mode == "RGBA":
        im.putalpha(128)
    fmt = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP"}[file.suffix.lower()]
    im.save(file, fmt, **kw)


def sheet(file, text, encoding="utf-8"):
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(encoding))
    return file


# ---- made folders in the publishers' layouts
@pytest.fixture
def siim(tmp_path):
    rows = [
        ("ISIC_1", "IP_1", "IL_1", "male", "45", "torso", "unknown", "benign", "0"),
        ("ISIC_2", "IP_1", "IL_2", "", "", "", "melanoma", "malignant", "1"),
        ("ISIC_3", "IP_2", "IL_1", "female", "0", "head/neck", "nevus", "benign", "0"),
        ("ISIC_4", "IP_3", "IL_4", "female", "30", "palms/soles", "nevus", "benign", "1"),
    ]
    sheet(
        tmp_path / "ISIC_2020_Training_GroundTruth_v2.csv",
        "\n".join(
            map(
                ",".join,
                [
                    (
                        "image_name",
                        "patient_id",
                        "lesion_id",
                        "sex",
                        "age_approx",
                        "anatom_site_general_challenge",
                        "diagnosis",
                        "benign_malignant",
                        "target",
                    ),
                    *rows,
                ],
            )
        ),
    )
    for i in (1, 2, 3, 4):
        picture(tmp_path / "train" / f"ISIC_{i}.jpg", i)
    return tmp_path


def test_siim(siim):
    ds, report = load_siim_isic(siim)
    assert (
        ds["label"][:] == ["benign", "melanoma", "benign"]
        and ds["patient"][:] == ["IP_1", "IP_1", "IP_2"]
        and ds["age"][:] == [45, None, None]
    )
    assert ds["caption"][:] == [
        "This lesion is on the torso. Clinical impression: benign.",
        "Clinical impression: melanoma.",
        "This lesion is on the head or neck. Clinical impression: benign.",
    ]
    assert (
        report.reasons == {"columns contradict each other": 1}
        and report.aside[0]["row"] == 5
        and report.aside[0]["id"] == "ISIC_4"
    )


def test_siim_duplicates_share_a_lesion_where_the_table_has_none(siim):
    lines = [
        item.split(",")
        for item in (siim / "ISIC_2020_Training_GroundTruth_v2.csv").read_text().split("\n")
    ]
    (siim / "ISIC_2020_Training_GroundTruth_v2.csv").unlink()
    sheet(
        siim / "train.csv",
        "\n".join(",".join(c for k, c in enumerate(line) if k != 2) for line in lines),
    )
    assert set(load_siim_isic(siim)[0]["lesion"][:]) == {None}
    sheet(siim / "ISIC_2020_Training_Duplicates.csv", "image_name_1,image_name_2\nISIC_1,ISIC_3")
    ds, report = load_siim_isic(siim)
    assert ds["lesion"][0] == ds["lesion"][2] != ds["lesion"][1] and "1 pairs of duplicates" in str(
        report
    )


def isic_folder(at, classes="Part3_GroundTruth"):
    for part, ids, yes in (("Training", range(6), (1, 4)), ("Validation", range(10, 13), (11,))):
        seb = ",seborrheic_keratosis" if "Part3" in classes else ""
        sheet(
            at / f"ISIC-2017_{part}_{classes}.csv",
            f"image_id,melanoma{seb}\n"
            + "\n".join(f"ISIC_{i},{float(i in yes)}{',0.0' if seb else ''}" for i in ids),
        )
        sheet(
            at / f"ISIC-2017_{part}_Data_metadata.csv",
            "image_id,age_approximate,sex\n"
            + "\n".join(f"ISIC_{i},{'unknown' if i % 2 else 5 * i + 5},female" for i in ids),
        )
        for i in ids:
            picture(at / f"ISIC-2017_{part}_Data" / f"ISIC_{i}.jpg", i)
            picture(at / f"ISIC-2017_{part}_Data" / f"ISIC_{i}_superpixels.png", 20)
    return at


@pytest.mark.parametrize("classes", ["Part3_GroundTruth", "Classes"])
def test_isic2017_in_both_spellings(tmp_path, classes):
    ds, report = load_isic2017(isic_folder(tmp_path, classes))
    assert (
        len(ds) == 9
        and not report.aside
        and ds["age"][:2] == [5, None]
        and Counter(ds["split"][:]) == dict(train=6, validation=3)
    )
    assert [i for i, label in zip(ds["id"][:], ds["label"][:]) if label == "melanoma"] == [
        "ISIC_1",
        "ISIC_4",
        "ISIC_11",
    ]
    assert ds[0][
        "caption"
    ] == "Clinical impression: benign." and "9 image files are named by no row" in str(report)
    assert {k: len(v) for k, v in split_records(ds).items()} == dict(train=6, validation=3, test=0)


def test_isic2017_masks_come_along(tmp_path):
    isic_folder(tmp_path)
    m = np.zeros((32, 32), np.uint8)
    m[8:24, 4:16] = 255
    (tmp_path / "ISIC-2017_Training_Part1_GroundTruth").mkdir()
    PIL.Image.fromarray(m).save(
        tmp_path / "ISIC-2017_Training_Part1_GroundTruth" / "ISIC_0_segmentation.png"
    )
    r = load_isic2017(tmp_path)[0][0]
    assert (
        np.array_equal(np.asarray(r["mask"]), m)
        and r["boxes"][0]["box"] == [0.125, 0.25, 0.5, 0.75]
        and [q for q in r["questions"] if q["kind"] == "location"]
    )


def test_copies_across_an_official_split_are_found_and_cured(tmp_path):
    isic_folder(tmp_path)
    at = tmp_path / "ISIC-2017_Training_Data" / "ISIC_3.jpg"
    (tmp_path / "ISIC-2017_Validation_Data" / "ISIC_12.jpg").write_bytes(at.read_bytes())
    s = split_records(load_isic2017(tmp_path)[0])
    leaks = find_leakage(s["train"], s["validation"])
    assert [(k, w) for k, _, _, w in leaks.found] == [("identical image", "ISIC_3 = ISIC_12")]
    cured = remove_leakage(s)
    assert (
        "ISIC_3" not in cured["train"]["id"][:]
        and len(cured["validation"]) == 3
        and not find_leakage(cured["train"], cured["validation"])
    )


def test_ham_lesions_stay_together_and_unknowns_stay_unknown(tmp_path):
    dx = ["nv", "nv", "mel", "bkl", "df", "vasc", "bcc", "akiec", "NV", "xx"]
    sheet(
        tmp_path / "HAM10000_metadata.csv",
        "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
        + "\n".join(
            f"HAM_{k // 2},ISIC_{k},{d},histo,{['', '0.0', '45.0', 'NaN'][k % 4]},"
            f"{['male', 'unknown'][k % 2]},{['back', 'unknown'][k % 2]}"
            for k, d in enumerate(dx)
        ),
    )
    for k in range(10):
        picture(tmp_path / f"HAM10000_images_part_{1 + k // 5}" / f"ISIC_{k}.jpg", k)
    ds, report = load_ham10000(tmp_path)
    assert (
        ds["label"][:]
        == ["benign", "benign", "melanoma", "benign", "benign", "benign", None, None, "benign"]
        and ds["lesion"][0] == ds["lesion"][1]
    )
    assert (
        ds["age"][:4] == [None, None, 45, None]
        and ds["sex"][:2] == ["male", None]
        and ds["site"][:2] == ["back", None]
    )
    assert ds["caption"][
        6
    ] == "This lesion is on the back. Diagnosis: basal cell carcinoma." and set(
        ds["patient"][:]
    ) == {None}
    assert report.reasons == {
        "diagnosis outside the set": 1
    } and "'basal cell carcinoma' is neither" in str(report)


def test_pad_ufes(tmp_path):
    head = (
        "patient_id,lesion_id,background_father,age,gender,fitspatrick,region,diagnostic,itch,"
        "img_id"
    )
    rows = [
        "PAT_1,7,BRAZIL,55,FEMALE,3.0,NECK,MEL,UNK,PAT_1_7_1.png",
        "PAT_1,8,BRASIL,55,FEMALE,,FACE,NEV,True,PAT_1_8_2.png",
        "PAT_2,7,,8,,,ARM,ACK,False,PAT_2_7_3.png",
        "PAT_3,9,,40,MALE,6.0,HAND,SEK,False,PAT_3_9_4.png",
    ]
    sheet(tmp_path / "metadata.csv", "\n".join([head, *rows]))
    for k, name in enumerate(("PAT_1_7_1", "PAT_1_8_2", "PAT_2_7_3")):
        picture(tmp_path / f"imgs_part_{k + 1}" / f"{name}.png", k, "RGBA" if k == 1 else "RGB")
    ds, report = load_pad_ufes_20(tmp_path)
    assert (
        ds["skin_type"][:] == [3, None, None]
        and [a["skin"] for a in ds["attributes"][:]] == ["medium", None, None]
        and ds["sex"][:] == ["female", "female", None]
    )
    assert (
        ds[0]["caption"].count("medium skin") == 1
        and "on the neck" in ds[0]["caption"]
        and ds["label"][:] == ["melanoma", "benign", None]
    )
    assert (
        ds["lesion"][0] != ds["lesion"][2]
        and ds[1]["image"].mode == "RGB"
        and report.reasons == {"image missing": 1}
    )
    want = PIL.Image.open(tmp_path / "imgs_part_2" / "PAT_1_8_2.png")
    white = PIL.Image.new("RGBA", want.size, "white")
    assert np.array_equal(
        np.asarray(ds[1]["image"]),
        np.asarray(PIL.Image.alpha_composite(white, want).convert("RGB")),
    )


DERM = (
    "case_num,diagnosis,seven_point_score,pigment_network,streaks,pigmentation,"
    "regression_structures,dots_and_globules,blue_whitish_veil,vascular_structures,"
    "level_of_diagnostic_difficulty,elevation,location,sex,management,clinic,derm,case_id,notes"
)


@pytest.fixture
def derm(tmp_path):
    rows = [
        (
            "1,melanoma (in situ),5,atypical,irregular,absent,blue areas,irregular,present,absent,"
            'high,flat,back,female,excision,NEL/Nel1.jpg,NEL/Nel2.jpg,,"two\nlines"'
        ),
        (
            "2,clark nevus,1,typical,absent,absent,absent,absent,absent,absent,low,flat,lower"
            " limbs,male,none,NEL/Nel3.jpg,NEL/Nel4.jpg,,"
        ),
        (
            "3,basal cell"
            " carcinoma,1,absent,absent,absent,absent,regular,absent,arborizing,low,flat,head"
            " neck,male,excision,NEL/Nel5.jpg,NEL/Nel6.jpg,,"
        ),
    ]
    sheet(tmp_path / "meta" / "meta.csv", "\n".join([DERM, *rows]))
    for n, i in (("train", "0"), ("valid", "2"), ("test", "1")):
        sheet(tmp_path / "meta" / f"{n}_indexes.csv", f"indexes\n{i}")
    for k in range(1, 7):
        picture(tmp_path / "images" / "NEL" / f"Nel{k}.jpg", k)
    return tmp_path


def test_derm7pt_speaks_of_structures(derm):
    ds, report = load_derm7pt(derm)
    assert (
        ds["split"][:] == ["train", "test", "validation"]
        and ds["label"][:] == ["melanoma", "benign", None]
        and not report.aside
    )
    a = ds[0]["attributes"]
    assert (a["network"], a["streaks"], a["veil"], a["regression"], a["dots"], a["border"]) == (
        "atypical",
        "present",
        "present",
        "present",
        None,
        None,
    )
    assert (
        all(
            w in ds[0]["caption"]
            for w in (
                "an atypical network",
                "streaks",
                "a blue-white veil",
                "regression",
                "on the back",
                "melanoma",
            )
        )
        and "border" not in ds[0]["caption"]
    )
    assert [
        q["answer"] for q in ds[0]["questions"] if q["question"] == "Are there dots or globules?"
    ] == ["Yes, irregular ones."]
    clinic = load_derm7pt(derm, view="clinic")[0]
    assert (
        clinic["id"][0] == "1-clinic"
        and clinic["lesion"][:] == ds["lesion"][:]
        and find_leakage(ds, clinic, near=-1).of("same lesion")
    )
    assert ds.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"].endswith(
        "Nel2.jpg"
    )
    with pytest.raises(ValueError, match="'derm' and 'clinic'"):
        load_derm7pt(derm, view="xray")


PH2 = """|| Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry || \
Pigment Network || Dots/Globules || Streaks || Regression Areas || \
Blue-Whitish Veil || Colors ||
|| IMD003 || || 0 || 0 || T || A || A || A || A || 4 ||
|| IMD009 || Melanoma || 2 || 2 || AT || AT || P || P || P || 3  4  5 6 ||
|| IMD010 || x || 1 ||

Legends:

Clinical Diagnosis:
0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma.
"""


def ph2_pictures(at):
    for k, n in enumerate(("IMD003", "IMD009")):
        picture(at / "PH2 Dataset images" / n / f"{n}_Dermoscopic_Image" / f"{n}.bmp", k)
        m = np.zeros((32, 32), bool)
        m[4:28, 8:28] = True
        (at / "PH2 Dataset images" / n / f"{n}_lesion").mkdir(parents=True)
        PIL.Image.fromarray(m).save(
            at / "PH2 Dataset images" / n / f"{n}_lesion" / f"{n}_lesion.bmp"
        )
        (at / "PH2 Dataset images" / n / f"{n}_roi").mkdir()
        PIL.Image.fromarray(m).save(
            at / "PH2 Dataset images" / n / f"{n}_roi" / f"{n}_R1_Label4.bmp"
        )


def test_ph2_text(tmp_path):
    sheet(tmp_path / "PH2_dataset.txt", PH2, "latin-1")
    ph2_pictures(tmp_path)
    ds, report = load_ph2(tmp_path)
    assert ds["label"][:] == ["benign", "melanoma"] and [
        a["asymmetry"] for a in ds["attributes"][:]
    ] == ["none", "two axes"]
    assert (
        ds[1]["attributes"]["colours"] == "several"
        and "four colours" in ds[1]["caption"]
        and "asymmetry in two axes" in ds[1]["caption"]
        and "one colour," in ds[0]["caption"].replace(" and ", ", ").replace("colour ", "colour, ")
    )
    assert (np.asarray(ds[0]["mask"]) > 0).sum() == 24 * 20 and ds[0]["boxes"] == [
        dict(name="lesion", box=[0.25, 0.125, 0.875, 0.875])
    ]
    assert (
        report.reasons == {"not a row of the table": 1}
        and "are its legend" in str(report)
        and ds[0]["attributes"]["structureless"] is None
    )


def test_ph2_sheet_says_the_same_as_the_text(tmp_path, monkeypatch):
    import pandas as pd

    head = [
        "Image Name",
        "Histological Diagnosis",
        "Common Nevus",
        "Atypical Nevus",
        "Melanoma",
        "Asymmetry\n(0/1/2)",
        "Pigment Network\n(AT/T)",
        "Dots/Globules\n(A/AT/T)",
        "Streaks\n(A/P)",
        "Regression Areas\n(A/P)",
        "Blue-Whitish Veil\n(A/P)",
        "White",
        "Red",
        "Light-Brown",
        "Dark-Brown",
        "Blue-Gray",
        "Black",
    ]
    cells = [
        ["PH2 database"] + [np.nan] * 16,
        head,
        [
            "IMD003",
            np.nan,
            "X",
            np.nan,
            np.nan,
            "0",
            "T",
            "A",
            "A",
            "A",
            "A",
            np.nan,
            np.nan,
            np.nan,
            "X",
            np.nan,
            np.nan,
        ],
        [
            "IMD009",
            "Melanoma",
            np.nan,
            np.nan,
            "X",
            "2",
            "AT",
            "AT",
            "P",
            "P",
            "P",
            np.nan,
            np.nan,
            "X",
            "X",
            "X",
            "X",
        ],
        [np.nan] * 17,
    ]
    sheet(tmp_path / "text" / "PH2_dataset.txt", PH2)
    ph2_pictures(tmp_path / "text")
    sheet(tmp_path / "sheet" / "PH2_dataset.xlsx", "PK")
    ph2_pictures(tmp_path / "sheet")

    def absent(*a, **k):
        raise ImportError("openpyxl")

    monkeypatch.setattr(pd, "read_excel", absent)
    with pytest.raises(ValueError, match="pip install openpyxl.*PH2_dataset.txt"):
        load_ph2(tmp_path / "sheet")
    monkeypatch.setattr(pd, "read_excel", lambda *a, **k: pd.DataFrame(cells))
    text, table = load_ph2(tmp_path / "text")[0], load_ph2(tmp_path / "sheet")[0]
    for column in ("id", "label", "caption", "attributes"):
        assert text[column][:] == table[column][:]


def test_fitzpatrick17k(tmp_path):
    head = (
        "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,"
        "three_partition_label,qc,url,url_alphanum"
    )
    sheet(
        tmp_path / "fitzpatrick17k.csv",
        "\n".join(
            [
                head,
                "aa,3,3,malignant melanoma,malignant melanoma,malignant,,http://x,x1.jpg",
                "bb,-1,1,psoriasis,inflammatory,non-neoplastic,,,x2.jpg",
                "cc,6,6,nevus,benign melanocyte,benign,3 Wrongly labelled,http://x,x3.jpg",
                "dd,6,6,nevus,benign melanocyte,benign,,http://x,x4.jpg",
            ]
        ),
    )
    for k, n in enumerate(("aa", "bb", "x4")):
        picture(tmp_path / "images" / f"{n}.jpg", k)
    ds, report = load_fitzpatrick17k(tmp_path)
    assert (
        ds["label"][:] == ["melanoma", None, "benign"]
        and ds["skin_type"][:] == [3, None, 6]
        and ds["id"][:] == ["aa", "bb", "dd"]
    )
    assert (
        ds[1]["caption"] == "Diagnosis: psoriasis."
        and "1 row: no address" in str(report)
        and report.reasons == {"marked as wrongly labelled by the publisher": 1}
    )


def test_ddi_fills_the_group_and_not_the_type(tmp_path):
    sheet(
        tmp_path / "ddi_metadata.csv",
        ",DDI_ID,DDI_file,skin_tone,malignant,disease\n"
        "0,1,000001.png,56,True,melanoma-in-situ\n"
        "1,2,000002.png,12,True,basal-cell-carcinoma\n"
        "2,3,000003.png,34,False,melanocytic-nevi",
    )
    for k in (1, 2, 3):
        picture(tmp_path / f"00000{k}.png", k)
    ds, _ = load_ddi(tmp_path)
    assert (
        ds["skin_type"][:] == [None] * 3
        and [a["skin"] for a in ds["attributes"][:]] == ["dark", "light", "medium"]
        and ds["label"][:] == ["melanoma", None, "benign"]
    )
    assert "Diagnosis: basal cell carcinoma." in ds[1]["caption"]


# ---- which folder is it?
def test_load_folder_knows_the_layouts(derm, tmp_path_factory):
    assert load_folder(derm)[1].source == "derm7pt"
    a = tmp_path_factory.mktemp("a")
    assert load_folder(isic_folder(a))[1].source == "isic2017"
    b = tmp_path_factory.mktemp("b")
    sheet(b / "PH2_dataset.txt", PH2)
    ph2_pictures(b)
    assert load_folder(b)[1].source == "ph2"
    c = tmp_path_factory.mktemp("c")
    sheet(c / "mine.csv", "file,melanoma\nx.png,1\ny.png,0")
    picture(c / "pics" / "x.png")
    picture(c / "pics" / "y.png", 1)
    with pytest.raises(ValueError, match="say what the labels mean"):
        load_folder(c)
    ds, report = load_folder(c, labels={0: "benign", 1: "melanoma"})
    assert report.source == "mine" and ds["label"][:] == ["melanoma", "benign"]


def test_load_folder_says_what_it_would_know(tmp_path, siim):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"(?s)siim_isic.*ph2.*Found: nothing"):
        load_folder(empty)
    with pytest.raises(ValueError, match="is not a folder"):
        load_folder(tmp_path / "nowhere")
    isic_folder(siim / "more")
    with pytest.raises(ValueError, match="looks like load_isic2017 and load_siim_isic"):
        load_folder(siim)


@pytest.mark.parametrize(
    "load,table,want",
    [
        (load_siim_isic, "train.csv", "image_name"),
        (load_isic2017, "ISIC-2017_Training_Classes.csv", "image_id"),
        (load_ham10000, "HAM10000_metadata.csv", "image_id"),
        (load_pad_ufes_20, "metadata.csv", "img_id"),
        (load_derm7pt, "meta.csv", "pigment_network"),
        (load_fitzpatrick17k, "fitzpatrick17k.csv", "md5hash"),
        (load_ddi, "ddi_metadata.csv", "DDI_file"),
        (load_ph2, "PH2_dataset.txt", "Name"),
    ],
)
def test_a_missing_column_names_both_sides(tmp_path, load, table, want):
    with pytest.raises(ValueError, match="no table"):
        load(tmp_path)
    sheet(
        tmp_path / table,
        (
            "filename,verdict\na.png,bad"
            if table != "PH2_dataset.txt"
            else "|| Nome || Diag ||\n|| a || b ||"
        ),
    )
    with pytest.raises(ValueError) as e:
        load(tmp_path)
    assert (
        want in str(e.value)
        and "Expected: " in str(e.value)
        and "Found: " in str(e.value)
        and ("verdict" in str(e.value) or "Diag" in str(e.value))
        and table in str(e.value)
    )


def test_other_registers_and_a_quick_look(siim):
    assert load_siim_isic(siim, caption_style="yesno")[0]["caption"][:2] == [
        "No, this is benign.",
        "Yes, this is a melanoma.",
    ]
    assert all(
        c.endswith(f"Clinical impression: {label}.") and "torso" not in c
        for c, label in zip(
            *(load_siim_isic(siim, caption_style="vague")[0][k][:] for k in ("caption", "label"))
        )
    )
    (siim / "train" / "ISIC_1.jpg").write_bytes((siim / "train" / "ISIC_1.jpg").read_bytes()[:-60])
    assert len(load_siim_isic(siim, decode=False)[0]) == 3 and len(load_siim_isic(siim)[0]) == 2
    alone = load_siim_isic(siim, with_images=False)[0]
    assert (
        alone[0]["image"] is None
        and dataset_fingerprint(alone) != dataset_fingerprint(alone.select([1, 0, 2]))
        and plot_records(alone, n=2)
    )


def test_same_columns_in_another_order_are_the_same_records(siim):
    mark = dataset_fingerprint(load_siim_isic(siim)[0])
    file = siim / "ISIC_2020_Training_GroundTruth_v2.csv"
    rows = [item.split(",") for item in file.read_text().split("\n")]
    order = np.random.default_rng(0).permutation(9)
    file.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(";".join(r[k] for k in order) for r in rows).encode()
    )
    assert dataset_fingerprint(load_siim_isic(siim)[0]) == mark


# ---- the real files
@real("isic2017")
def test_real_isic2017():
    ds, report = load_folder(REAL / "isic2017")
    assert (
        len(ds) == 750 and report.reasons == {"image missing": 1400} and report.rows == 2150
    )  # trap 1: more rows than files
    s = split_records(ds)
    assert [len(p) for p in s.values()] == [600, 150, 0] and Counter(s["train"]["label"][:])[
        "melanoma"
    ] == 150
    assert None in ds["age"][:] and ds[0]["image"].size == (256, 256)  # trap 4: 'unknown' ages
    leaks = find_leakage(s["train"], s["validation"])
    assert ("ISIC_0000171 = ISIC_0015124" in str(leaks)) and len(
        leaks.of("near-identical image")
    ) < 5  # copies across the official split
    cured = remove_leakage(s)
    assert not find_leakage(cured["train"], cured["validation"]) and len(cured["validation"]) == 150


@real("siim_isic_2020")
def test_real_siim():
    ds, report = load_siim_isic(REAL / "siim_isic_2020", with_images=False)
    n = Counter(ds["label"][:])
    per = Counter(ds["patient"][:])
    assert (
        len(ds) == 33126
        and n["melanoma"] == 584
        and (len(per), min(per.values()), max(per.values())) == (2056, 2, 115)
    )
    assert (
        [sum(v is None for v in ds[c][:]) for c in ("sex", "site")] == [65, 527]
        and sum(v is None for v in ds["age"][:]) == 68 + 2
        and "425 pairs" in str(report)
    )
    rows = np.random.default_rng(0).permutation(len(ds))
    by_row = find_leakage(ds.select(rows[:26500]), ds.select(rows[-3313:]), near=-1)
    assert len(by_row.of("same patient")) > 0.95 * 3313  # trap 2: a split by row leaks
    s = split_records(ds)
    assert not find_leakage(s["train"], s["test"], near=-1) and not find_leakage(
        s["train"], s["validation"], near=-1
    )
    assert [Counter(p["label"][:])["melanoma"] for p in s.values()] == pytest.approx(
        [467, 58, 58], abs=4
    )
    with pytest.raises(ValueError, match="with_images=False.*33,126 set aside"):
        load_siim_isic(REAL / "siim_isic_2020")


@real("ham10000")
def test_real_ham():
    ds, report = load_ham10000(REAL / "ham10000", with_images=False)
    n = Counter(ds["lesion"][:])
    assert (
        len(ds) == 10015 and sum(v > 1 for v in n.values()) == 1956 and max(n.values()) == 6
    )  # trap 3
    assert (
        sum(a is None for a in ds["age"][:]) == 57 + 39
        and None in ds["sex"][:]
        and "unknown" not in ds["sex"][:]
    )
    s = split_records(ds)
    assert not set(s["train"]["lesion"][:]) & set(s["test"]["lesion"][:])
    ds, report = load_folder(REAL / "ham10000")
    assert len(ds) == 60 and report.reasons == {"image missing": 9955}


@real("pad_ufes_20")
def test_real_pad():
    ds, report = load_pad_ufes_20(REAL / "pad_ufes_20", with_images=False)
    assert (
        len(ds) == 2298
        and sum(v is None for v in ds["skin_type"][:]) == 804
        and Counter(ds["label"][:])["melanoma"] == 52
    )  # trap 5
    ds, _ = load_folder(REAL / "pad_ufes_20")
    assert len(ds) == 4 and {r["image"].mode for r in ds} == {"RGB"}
    raw = {p.name: PIL.Image.open(p).mode for p in (REAL / "pad_ufes_20" / "images").iterdir()}
    assert "RGBA" in raw.values()


@real("fitzpatrick17k")
def test_real_fitzpatrick():
    ds, report = load_fitzpatrick17k(REAL / "fitzpatrick17k", with_images=False)
    assert (
        report.counts["no address in the table"] == 41
        and len(report.aside) == 17
        and len(ds) == 16560
    )  # trap 6
    assert sum(v is None for v in ds["skin_type"][:]) in range(560, 566) and set(
        ds["skin_type"][:]
    ) == {None, 1, 2, 3, 4, 5, 6}


@real("isic2018_masks")
def test_real_masks(tmp_path):
    names = sorted(p.stem for p in (REAL / "isic2018_masks" / "images").iterdir())
    sheet(tmp_path / "t.csv", "image,caption\n" + "\n".join(f"{n},A lesion." for n in names))
    ds, report = load_table(tmp_path / "t.csv", images=REAL / "isic2018_masks")
    assert (
        len(ds) == 150
        and not report.aside
        and all(r["mask"] is not None and r["mask"].size == r["image"].size for r in ds)
    )  # traps 7, 9
    share = [(np.asarray(m) > 0).mean() for m in ds["mask"][:]]
    assert (
        0 < min(share) < 0.02
        and max(share) > 0.8
        and set(np.unique(np.asarray(ds[0]["mask"]))) == {0, 255}
    )
