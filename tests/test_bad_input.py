"Bad input: a clear error, or set aside with row and reason; the rest of the data is kept."

import contextlib
import io
import json
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkit.data.fields import TEMPLATE_TOKENS, clean_text, parse_integer
from mmkit.data.images import ImageFolder, get_stored_image, open_image, read_mask
from mmkit.data.loading_report import LoadingReport, RecordRejected
from mmkit.data.tables import load_table

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.usefixtures("cache")

RED = (200, 40, 40)


def save(file, mode="RGB", size=(20, 10), **kw):
    "A picture in a mode; the left half is red, the right half blue."
    im = PIL.Image.new("RGB", size, RED)
    im.paste((40, 40, 200), (size[0] // 2, 0, *size))
    if mode == "RGBA":
        im.putalpha(PIL.Image.linear_gradient("L").resize(size))
    elif mode == "16":
        im = PIL.Image.fromarray(
            np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[::-1])
        )
    elif mode == "P+":
        im = im.quantize(8)
        kw["transparency"] = im.getpixel((0, 0))
    elif mode not in ("RGB", "exif"):
        im = im.convert(mode)
    if mode == "exif":
        e = PIL.Image.Exif()
        e[0x0112] = 6
        kw["exif"] = e
    im.save(file, **kw)
    return file


@pytest.fixture
def folder(tmp_path):
    "Three good pictures and a table of them; `add` puts a bad row in the middle."
    for n in ("a", "b", "c"):
        save(tmp_path / f"{n}.png")
    return tmp_path


def load(
    folder,
    bad=None,
    head="image,label",
    good=("a.png,benign", "b.png,melanoma", "c.png,benign"),
    data=None,
    name="t.csv",
    **kw,
):
    lines = [head, good[0], *([bad] if bad is not None else []), *good[1:]]
    (folder / name).write_bytes(data if data is not None else "\n".join(lines).encode())
    return load_table(folder / name, **kw)


def kept(folder, reason, bad="x.png,benign", detail="", row=3, **kw):
    "The bad row is set aside with its row and reason, and the three good ones are there."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds, report = load(folder, bad, **kw)
    assert ds["id"][:] == ["a", "b", "c"], report
    assert [(a["row"], a["reason"]) for a in report.aside] == [
        (row, reason)
    ] and detail in report.aside[0]["detail"], report
    assert (
        report.rows == 4
        and report.loaded == 3
        and reason in str(report)
        and "Traceback" not in str(report)
    )
    return report


# ---- pictures
def test_missing(folder):
    kept(folder, "image missing", detail="x.png")


def test_empty_file(folder):
    (folder / "x.png").touch()
    kept(folder, "not an image", detail="empty")


def test_no_picture(folder):
    (folder / "x.png").write_text("hello")
    kept(folder, "not an image", detail="b'hello'")


def test_lfs_pointer(folder):
    (folder / "x.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    kept(folder, "not an image", detail="Git LFS")


def test_postscript_is_never_run(folder):
    (folder / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    kept(folder, "not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(folder, suffix, share):
    noise = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    )
    noise.save(folder / f"x.{suffix}")
    data = (folder / f"x.{suffix}").read_bytes()
    (folder / f"x.{suffix}").write_bytes(data[: int(len(data) * share)])
    kept(folder, "image truncated", f"x.{suffix},benign")


def png_of(w, h):
    "The smallest PNG that claims to be this large."

    def chunk(k, d):
        return struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("w,h", [(9001, 9001), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_enormous(folder, w, h):
    (folder / "x.png").write_bytes(png_of(w, h))
    kept(folder, "image too large")


def test_limits_can_be_set(folder):
    for kw in (dict(max_pixels=199), dict(max_bytes=20)):
        with pytest.raises(RecordRejected, match="too large"):
            open_image(folder / "a.png", **kw)
    assert open_image(folder / "a.png", max_pixels=200).size == (20, 10)


@pytest.mark.parametrize(
    "mode,suffix",
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("L", "png"),
        ("1", "png"),
        ("P", "png"),
        ("P+", "png"),
        ("LA", "png"),
        ("16", "png"),
        ("16", "tif"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("exif", "jpg"),
        ("exif", "png"),
        ("RGB", "webp"),
        ("RGB", "gif"),
    ],
)
def test_every_mode_becomes_upright_rgb(folder, mode, suffix):
    save(folder / f"x.{suffix}", mode)
    ds, report = load(folder, f"x.{suffix},benign")
    im = ds[1]["image"]
    left, right = (
        (np.asarray(im)[5, k].astype(int) for k in (4, 15))
        if mode != "exif"
        else (np.asarray(im)[k, 5].astype(int) for k in (4, 15))
    )
    assert (
        not report.aside
        and im.mode == "RGB"
        and im.size == ((10, 20) if mode == "exif" else (20, 10))
    )
    assert np.array_equal(np.asarray(im), np.asarray(open_image(folder / f"x.{suffix}")))
    if mode in ("RGB", "P", "CMYK", "exif"):
        assert abs(left - RED).max() < 60 and abs(right - (40, 40, 200)).max() < 60
    if mode == "P+":
        assert (
            left.min() == 255 and abs(right - (40, 40, 200)).max() < 60
        )  # the transparent half is white
    if mode == "RGBA":
        assert (
            abs(np.asarray(im)[0, 0].astype(int) - 255).max() < 30
            and abs(np.asarray(im)[9, 0].astype(int) - RED).max() < 30
        )
    if mode == "16":
        a = np.asarray(im)[..., 0].ravel().astype(int)
        assert (
            (np.diff(a) >= 0).all()
            and (a.min(), a.max()) == (0, 255)
            and abs(a - np.linspace(0, 255, 200)).max() <= 1
        )


def test_an_eight_bit_picture_in_sixteen_bits_is_not_made_black(folder):
    PIL.Image.fromarray(np.full((8, 8), 200, np.uint16)).save(folder / "x.png")
    assert open_image(folder / "x.png").getpixel((0, 0)) == (200,) * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.astype(np.uint8) * 255,
        lambda m: m.astype(np.uint8),
        lambda m: m,
        lambda m: np.stack([m * 255, m * 0, m * 0], -1).astype(np.uint8),
        lambda m: m.astype(np.uint16) * 65535,
    ],
)
def test_masks_of_every_kind(tmp_path, make):
    m = np.zeros((30, 40), bool)
    m[5:20, 10:30] = True
    PIL.Image.fromarray(make(m)).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), m)


@pytest.mark.parametrize("share", [0.004, 0.987])
def test_masks_of_every_size_and_none(folder, share):
    n = int(10_000 * share)
    m = np.zeros(10_000, bool)
    m[:n] = True
    PIL.Image.new("RGB", (100, 100)).save(folder / "x.png")
    PIL.Image.fromarray(m.reshape(100, 100)).save(folder / "x_segmentation.png")
    PIL.Image.new("1", (20, 10)).save(folder / "a_segmentation.png")
    PIL.Image.new("1", (10, 20), 1).save(folder / "b_segmentation.png")
    ds, report = load(folder, "x.png,benign")
    assert (
        (np.asarray(ds[1]["mask"]) > 0).mean() == pytest.approx(share)
        and ds[0]["mask"] is ds[2]["mask"] is None
        and ds[0]["boxes"] == []
    )
    assert "1 row: mask is empty" in str(report) and "1 row: mask has another shape" in str(report)


# ---- texts
TOKENS_ = [
    "<start_of_image>",
    "<end_of_turn>",
    "<start_of_turn>model",
    "<image_soft_token>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<|image|>",
    "<|im_start|>",
    "<|eot_id|>",
    "</s>",
    "[INST]",
    "<END_OF_TURN>",
    "＜start_of_image＞",
    "<unused7>",
]
CAPTIONED = dict(
    head="image,caption", good=("a.png,a mole", "b.png,a mole <6 mm across>", "c.png,a <b>mole</b>")
)


@pytest.mark.parametrize("token", TOKENS_)
def test_template_tokens(folder, token):
    save(folder / "x.png")
    kept(folder, "template token in caption", f"x.png,a {token} mole", **CAPTIONED)


def test_template_tokens_elsewhere(folder):
    save(folder / "x.png")
    kept(
        folder,
        "template token in notes",
        "x.png,a mole,<end_of_turn>",
        head="image,caption,notes",
        good=("a.png,m,", "b.png,m,fine", "c.png,m,"),
    )
    q = dict(image="x.png", caption="c", questions=[dict(question="Is it?", answer="<eos>")])
    kept(
        folder,
        "template token in answer",
        name="t.jsonl",
        row=2,
        data="\n".join(
            json.dumps(r)
            for r in [
                dict(image="a.png", caption="c"),
                q,
                dict(image="b.png", caption="c"),
                dict(image="c.png", caption="c"),
            ]
        ).encode(),
    )


@pytest.mark.parametrize("caption", ["", "   ", "n/a", '""'])
def test_empty_caption(folder, caption):
    save(folder / "x.png")
    kept(folder, "empty caption", f"x.png,{caption}", **CAPTIONED)


def test_nothing_to_say(folder):
    save(folder / "x.png")
    kept(folder, "empty caption", "x.png,")


def test_duplicate_id(folder):
    kept(folder, "duplicate id", "a.png,benign", detail="t.csv row 2")


def test_duplicate_id_column(folder):
    kept(
        folder,
        "duplicate id",
        "b.png,benign,a",
        head="image,label,id",
        good=("a.png,benign,a", "b.png,melanoma,b", "c.png,benign,c"),
    )
    ds, _ = load(
        folder,
        "a.png,benign,again",
        head="image,label,id",
        good=("a.png,benign,a", "b.png,melanoma,b", "c.png,benign,c"),
    )
    assert len(ds) == 4  # one picture, two records


@pytest.mark.parametrize("label", ["malignant", "maybe", "2", "benign?"])
def test_label_outside_the_set(folder, label):
    save(folder / "x.png")
    kept(folder, "label outside the set", f"x.png,{label}", detail="labels=")
    assert (
        load(folder, f"x.png,{label}", labels={label: "melanoma"})[0]["label"][1] == "melanoma"
        and load(folder, f"x.png,{label}", labels={label: None}, caption_style="vague")[0]["label"][
            1
        ]
        is None
    )


def test_attribute_and_split_outside_their_sets(folder):
    save(folder / "x.png")
    kept(
        folder,
        "border outside the set",
        "x.png,benign,wavy",
        head="image,label,border",
        good=("a.png,benign,regular", "b.png,melanoma,", "c.png,benign,irregular"),
    )
    kept(
        folder,
        "split outside the set",
        "x.png,benign,fold7",
        head="image,label,split",
        good=("a.png,benign,train", "b.png,melanoma,val", "c.png,benign,test"),
    )


# ---- tables
@pytest.mark.parametrize(
    "data,says",
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"image,label\n", "no rows below its header"),
        (b"image,label\n\n , \n", "no rows"),
        (b"image,image,label\na,b,c", "'image' twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>sign in", "web page"),
        (b"PK\x03\x04\0\0", "not a text file"),
        (b"bild,urteil\na.png,benign", "Found: bild, urteil"),
        (b"image,verdict\na.png,benign", "caption"),
        (b"image,lable\na.png,benign", "is 'lable' meant"),
        (b"image,label\n" + b'"' + b"x" * 200_000 + b"\n", "quote"),
    ],
)
def test_hopeless_tables(folder, data, says):
    with pytest.raises(ValueError, match=says) as e:
        load(folder, data=data)
    assert "t.csv" in str(e.value)


def test_nothing_loads_is_an_error_with_the_reasons(folder):
    with pytest.raises(ValueError, match="(?s)nothing could be loaded.*0 of 2 rows.*image missing"):
        load(folder, data=b"image,label\nq.png,benign\nr.png,benign")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_separators_and_line_ends(folder, encoding, mark, end):
    text = end.join(
        mark.join(r)
        for r in (
            ("site", "label", "image"),
            ("Rücken", "benign", "a.png"),
            ("Fuß", "melanoma", "b.png"),
            ("Knöchel", "benign", "c.png"),
        )
    )
    ds, report = load(folder, data=(text + end).encode(encoding))
    assert (
        not report.aside
        and ds["site"][:] == ["Rücken", "Fuß", "Knöchel"]
        and ds[1]["caption"] == "This lesion is on the Fuß. Clinical impression: melanoma."
    )


def test_legend_rows_and_ragged_rows(folder):
    ds, report = load(
        folder,
        data=(
            b"image,label,site\na.png,benign,arm\nb.png,benign\nc.png,benign,arm,more\n\nLegend:"
            b" site = body site\n"
        ),
    )
    assert ds["id"][:] == ["a"] and [(a["row"], a["reason"]) for a in report.aside] == [
        (n, "not a row of the table") for n in (3, 4, 6)
    ]


def test_an_open_quote_is_not_swallowed(folder):
    ds, report = load(
        folder, data=b'image,label,site\na.png,benign,arm\nb.png,benign,"arm\nc.png,benign,leg\n'
    )
    assert (
        ds["id"][:] == ["a", "b", "c"]
        and ds["site"][:] == ["arm", "arm", "leg"]
        and "never closed" in str(report)
    )
    ds, report = load(
        folder, data=b'image,site,label\na.png,arm,benign\nb.png,"arm,benign\nc.png,leg,benign\n'
    )
    assert ds["id"][:] == ["a", "c"] and [a["row"] for a in report.aside] == [3]
    ds, report = load(
        folder,
        data=b'image,label,notes\na.png,benign,"two\nlines, and ""quotes"""\nb.png,benign,x\n',
    )
    assert (
        ds["notes"][:] == ['two lines, and "quotes"', "x"]
        and json.loads(ds[1]["provenance"])["row"] == 4
    )


def test_json_lines(folder):
    lines = [
        (
            '{"image": "a.png", "label": 1, "age": 44, "questions": [{"question": "Is it round?",'
            ' "answer": "Yes.", "box": [0, 0, 1, 1]}]}'
        ),
        "{broken",
        "[1, 2]",
        '{"image": "b.png", "label": false}',
        '{"image": "c.png", "label": "benign", "questions": [{"question": "Is it?"}]}',
        (
            '{"image": "c.png", "label": "benign", "questions": [{"question": "?", "answer": "!",'
            ' "box": [0, 2, 3]}]}'
        ),
        '["' + "[" * 3000,
    ]
    meanings = {1: "melanoma", False: "benign"}
    ds, report = load(folder, data="\n".join(lines).encode(), name="t.jsonl", labels=meanings)
    assert (
        ds["label"][:] == ["melanoma", "benign"]
        and ds[0]["questions"][0]["answer"] == "Yes."
        and ds["age"][:] == [44, None]
    )
    assert sorted(a["row"] for a in report.aside) == [2, 3, 5, 6, 7]


def test_surrogates_do_not_break_the_rest(folder):
    lines = [
        json.dumps(dict(image="a.png", caption="ok")),
        '{"image": "b.png", "caption": "bad \\ud800 text"}',
        '{"image": "\\ud800.png", "caption": "x"}',
        json.dumps(dict(image="c.png", caption="ok")),
    ]
    ds, report = load(folder, data="\n".join(lines).encode(), name="t.jsonl")
    assert (
        ds["id"][:] == ["a", "c"]
        and len(report.aside) == 2
        and str(report).encode()
        and report._repr_html_().encode()
    )


# ---- paths
@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "..\\secret.png",
        "/etc/passwd",
        "{abs}",
        "C:\\secret.png",
        "//server/share/x.png",
        "link.png",
        "linked/secret.png",
        "..",
        "./../secret.png",
    ],
)
def test_paths_that_leave_the_folder(tmp_path, name):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    save(tmp_path / "secret.png")
    for n in ("a", "b", "c"):
        save(data / f"{n}.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "secret.png")
    (data / "linked").symlink_to(tmp_path / "out")
    name = name.format(abs=tmp_path / "secret.png")
    ds, report = load(data, f"{name},benign")
    assert (
        ds["id"][:] == ["a", "b", "c"]
        and len(report.aside) == 1
        and report.aside[0]["reason"] in ("path leaves the folder", "image missing")
    )
    if name != "linked/secret.png":
        assert report.aside[0]["reason"] == "path leaves the folder", (
            report
        )  # a linked folder is not even entered


def test_a_folder_that_is_itself_a_link_works(folder, tmp_path_factory):
    at = tmp_path_factory.mktemp("x") / "link"
    load(folder)
    at.symlink_to(folder)
    assert len(load_table(at / "t.csv")[0]) == 3


def test_names_as_the_table_spells_them(folder):
    save(folder / "Case.PNG", format="PNG")
    save(folder / "case2.jpeg")
    ds, report = load(folder, data=b"image,label\nCase,benign\nCase2,benign\ncase2.jpg,melanoma")
    assert (
        ds["id"][:] == ["Case", "case2"]
        and report.reasons == {"image missing": 1}
        and "'case2', which differs in capital letters" in str(report)
    )


def test_two_files_of_one_name(folder):
    for d in ("p", "q", "masks"):
        (folder / d).mkdir()
        save(folder / d / "x.png")
    kept(folder, "image ambiguous", "x,benign", detail="p/x.png or q/x.png")
    assert len(load(folder, "q/x.png,benign")[0]) == 4
    (folder / "p" / "x.png").unlink()
    assert len(load(folder, "x,benign")[0]) == 4  # a mask folder is not a picture's place


# ---- properties
@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    at = tmp_path_factory.mktemp("fixed")
    save(at / "a.png")
    save(at / "b.png")
    return at


@settings(quick, max_examples=80)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda b: b"image,label,age\na.png,benign,4\n" + b),
        st.text(alphabet='a.png,;"\n\r\t benign/\\x0é', max_size=120).map(
            lambda t: ("image,label\na.png,benign\n" + t).encode()
        ),
    )
)
def test_any_bytes_as_a_table_are_data_or_a_clear_error(fixed, data):
    (fixed / "t.csv").write_bytes(data)
    try:
        ds, report = load_table(fixed / "t.csv")
    except ValueError as e:
        assert str(e) and "codec" not in str(e)
    else:
        assert (
            len(ds) == report.loaded == len(set(ds["id"][:]))
            and report.loaded + len(report.aside) == report.rows
            and {name.split("-")[0] for name in ds["id"][:]} <= {"a", "b"}
        )
        assert all(label is None or label == label.strip() != "" for label in ds["label"][:])


@settings(quick, max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.png", "b.png", "a", "no.png", "../b.png", "/a.png", ""]),
            st.sampled_from(["benign", "1", "", "unknown", "odd"]),
            st.text(max_size=12),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_row_is_in_exactly_one_place(fixed, rows):
    import csv

    out = io.StringIO()
    w = csv.writer(out)
    w.writerow(["image", "label", "site"])
    w.writerows([[i, item, s.replace("\0", "")] for i, item, s in rows])
    (fixed / "t.csv").write_bytes(out.getvalue().encode("utf-8", "replace"))
    try:
        ds, report = load_table(fixed / "t.csv")
    except ValueError as e:
        assert any(words in str(e) for words in ("nothing could be loaded", "no rows", "labels="))
        return
    assert report.loaded + len(report.aside) == report.rows
    at = [json.loads(p)["row"] for p in ds["provenance"][:]] + [a["row"] for a in report.aside]
    assert len(at) == len(set(at)) and all(a["reason"] for a in report.aside)
    for text in ds["caption"][:]:
        assert text.strip() == text and not TEMPLATE_TOKENS.search(text)


@settings(quick, max_examples=150)
@given(st.text(max_size=40))
def test_no_name_opens_anything_outside(fixed, name):
    look = ImageFolder(fixed)
    try:
        found = look.find(name)
    except RecordRejected as e:
        assert e.explain
    else:
        assert found.resolve().is_relative_to(fixed.resolve())


@settings(quick, max_examples=80)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["png", "jpg", "bmp", "gif", "tif", "webp"]),
    st.integers(1, 6),
)
def test_any_damage_to_a_picture_is_read_or_refused(tmp_path_factory, seed, suffix, n):
    at = tmp_path_factory.mktemp("d") / f"x.{suffix}"
    save(at, size=(24, 24))
    data = bytearray(at.read_bytes())
    rng = np.random.default_rng(seed)
    for k in rng.integers(0, len(data), n):
        data[k] = rng.integers(256)
    at.write_bytes(data[: rng.integers(1, len(data) + 1)] if seed % 2 else data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            im = open_image(at)
        except RecordRejected as e:
            assert e.explain in (
                "not an image",
                "image truncated",
                "image too large",
                "not a photograph",
            )
        else:
            assert im.mode == "RGB"
        with contextlib.suppress(RecordRejected):
            get_stored_image(at)


@settings(quick, max_examples=100)
@given(st.text(max_size=30), st.sampled_from(TOKENS_[:12]), st.text(max_size=30))
def test_no_token_gets_through(before, token, after):
    try:
        text = clean_text(before + token + after, "caption")
    except RecordRejected:
        return
    assert text is None or token not in text


@given(st.one_of(st.text(max_size=8), st.floats().map(str), st.integers().map(str)))
def test_an_age_is_a_possible_age_or_nothing(text):
    n = parse_integer(text, 1, 120, LoadingReport("x"), "age")
    assert n is None or (isinstance(n, int) and 1 <= n <= 120)


@settings(quick, max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=5))
def test_a_report_escapes_what_it_quotes(rows):
    r = LoadingReport("<b>")
    for n, (a, b) in enumerate(rows):
        r.set_aside("t<i>", n, a, "reason", b)
    assert (
        "<b>:" not in r._repr_html_()
        and "t<i>" not in r._repr_html_()
        and str(r)
        and len(r.frame()) == len(rows)
    )
