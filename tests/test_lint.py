"""Lint of pair sets: every check alone, faults of every kind, false alarms, cures that never
happen by themselves.
"""

import io
import json
import os
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats.contingency import association, crosstab

from mmkit import data
from mmkit.data.captions import compose_caption
from mmkit.data.lint import Findings, findings_page, lint_records
from mmkit.data.lint_balance import cramers_v
from mmkit.data.lint_fix import fix_findings, replace_columns, rewrite_caption
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.data.records import FEATURES, dataset_fingerprint, iter_raw_records, make_record
from mmkit.data.splits import split_records
from mmkit.data.text_checks import (
    find_contradictions,
    find_stray_tokens,
    guess_language,
    info_nce_floor,
    normalize_words,
    strip_stray_tokens,
    visual_term_density,
)
from mmkit.lesions.lesion import ATTRIBUTE_LEVELS
from mmkit.losses.contrastive import info_nce

pytestmark = pytest.mark.usefixtures("cache")
REAL = Path(os.environ.get("MMKIT_REAL") or Path(__file__).resolve().parents[2] / "shared" / "real")


@pytest.fixture(scope="module")
def ds(cache):
    return load_melanoma_pairs(260, seed=1950, size=32, masks=False)


def made(*captions, **columns):
    return Dataset.from_list(
        [
            make_record(id=str(i), caption=c, **{k: v[i] for k, v in columns.items()})
            for i, c in enumerate(captions)
        ],
        features=FEATURES,
    )


def kinds(found):
    return [f.kind for f in found]


# ---- measures
words = st.lists(
    st.sampled_from(
        [
            "a",
            "dark",
            "spot",
            "Rand",
            "border,",
            "irregular.",
            "<image>",
            "7",
            "café",
            "{x}",
            "naevus",
            "\u200b",
            "is",
            "of",
        ]
    ),
    max_size=12,
).map(" ".join)


@given(st.text(max_size=60) | words)
def test_measures_of_any_text(t):
    assert (
        0 <= visual_term_density(t) <= 1
        and normalize_words(t) == normalize_words(t.upper().lower())
        or not t.isascii()
    )
    assert guess_language(t) is None or isinstance(guess_language(t), str)
    once = strip_stray_tokens(t)
    assert not find_stray_tokens(once) or find_stray_tokens(once) == find_stray_tokens(
        strip_stray_tokens(once)
    ), "what is left cannot be taken out by taking out again"
    if t.isascii():
        assert not find_stray_tokens(strip_stray_tokens(strip_stray_tokens(t)))


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 64))
def test_the_floor_lies_between_nothing_and_guessing(said, batch):
    low = info_nce_floor(said, batch, 5)
    n = min(batch, len(said))
    assert -1e-9 <= low <= np.log(n) + 1e-9 and np.isclose(
        low, info_nce_floor([c * 3 for c in said], batch, 5)
    ), "names do not matter"
    if batch >= len(said):
        m = Counter(said)
        assert np.isclose(low, np.mean([np.log(m[c]) for c in said]))


def test_the_floor_is_what_training_meets():
    "Vectors that are perfect but for repeats: plain InfoNCE ends at the floor."
    import torch

    ids = torch.tensor([0] * 5 + [1] * 3 + list(range(2, 10)))
    z = torch.eye(10)[ids]
    assert (
        abs(float(info_nce(z, z, temperature=0.02)) - info_nce_floor(ids.tolist(), 64)) < 1e-3
        and float(info_nce(z, z, temperature=0.02, caption_ids=ids)) < 1e-3
    )


@given(st.permutations(["an", "irregular", "dark", "border", "with", "3", "dots"]))
def test_the_same_words_in_another_order(order):
    assert normalize_words(" ".join(order).upper() + ".") == normalize_words(
        "an irregular dark border with 3 dots"
    )


def test_what_differs_is_not_the_same():
    for a, b in (
        ("a typical network", "an atypical network"),
        ("no dots", "dots"),
        ("2 dots", "3 dots"),
        ("dots", "dots and dots"),
    ):
        assert normalize_words(a) != normalize_words(b)


@given(
    st.fixed_dictionaries({k: st.sampled_from([*v, None]) for k, v in ATTRIBUTE_LEVELS.items()}),
    st.sampled_from(["benign", "melanoma", None]),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_a_caption_of_its_own_record_contradicts_nothing(a, label, n, seed):
    a["colours"] = ("few", "several", "many")[(n - 1) // 2] if a["colours"] else None
    said = compose_caption(
        {k: v for k, v in a.items() if v},
        n if a["colours"] else None,
        label,
        "dense",
        np.random.default_rng(seed),
    )
    assert not find_contradictions(said, a, label)
    again = rewrite_caption(dict(caption=said, attributes=a, label=label), seed)
    assert not find_contradictions(again, a, label)
    other = {"benign": "melanoma", "melanoma": "benign"}.get(label)
    if other:
        assert ("label", label, other) in find_contradictions(said, a, other)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), min_size=8, max_size=80))
def test_cramers_v_against_scipy(rows):
    a, b = zip(*rows)
    r, k, n = len(set(a)), len(set(b)), len(rows)
    got = cramers_v(a, b)
    if min(r, k) < 2:
        assert np.isnan(got)
        return
    phi = association(crosstab(a, b).count, "cramer") ** 2 * (min(r, k) - 1)
    phi = max(0, phi - (r - 1) * (k - 1) / (n - 1))
    r_, k_ = r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)
    assert np.isclose(got, np.sqrt(phi / (min(r_, k_) - 1))) and np.isclose(got, cramers_v(b, a))


def test_cramers_v_is_nothing_where_nothing_is_told():
    g = np.random.default_rng(0)
    assert (
        np.mean(
            [cramers_v(g.choice(list("abcdef"), 120), g.choice(list("xy"), 120)) for _ in range(40)]
        )
        < 0.1
    )
    assert np.isnan(cramers_v([None] * 5, list("xyxyx"))) and cramers_v(
        ["a", "b", None] * 20, ["x", "y", "x"] * 20
    ) == pytest.approx(1, abs=0.02)


# ---- findings
@pytest.mark.parametrize("seed", (1951, 1952))
def test_a_clean_set_gives_nothing(seed):
    found = lint_records(load_melanoma_pairs(300, seed=seed, size=32, masks=False))
    assert not found, str(found)


FAULTS = {
    "no caption": "",
    "stray tokens": "A dark lesion<|image|> with an irregular border and dots.",
    "contradictions": "A dark lesion with an irregular border. Clinical impression: melanoma.",
    "vague captions": "Here is a picture of the patient that came.",
    "length": "A dark lesion with an irregular border and",
    "language": (
        "Eine dunkle Läsion mit der Struktur und border auf dem Arm in dark brown, das ist"
        " irregular."
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_alone(kind, ds):
    some = ds.select([i for i in range(60) if ds[i]["label"] == "benign"][:20])
    said, known = list(some["caption"]), list(some["attributes"])
    said[7] = FAULTS[kind]
    known[7] = dict.fromkeys(ATTRIBUTE_LEVELS)
    found = lint_records(replace_columns(some, caption=said, attributes=known), images=False)
    assert kinds(found) == [kind] and found[0].rows == [7] and found[0].reasons[7], str(found)


def test_repeats_and_rewordings():
    said = (
        ["A dark lesion with an irregular border."] * 3
        + [f"A round lesion with {n} dots and a regular border." for n in range(30)]
        + ["with dots A round lesion 3 and a REGULAR border!"]
    )
    found = lint_records(made(*said))
    assert set(kinds(found)) == {"repeated captions", "reworded repeats"}
    assert (
        found.of("repeated captions").groups == [[0, 1, 2]]
        and found.of("reworded repeats").groups == [[6, 33]]
        and found.of("repeated captions").fix == "first of each"
    )
    all_same = lint_records(made(*["Yes, dark."] * 9)).of("repeated captions")
    assert all_same.fix == "look" and np.isclose(all_same.details["floor"], np.log(9)), (
        "a cure that leaves one record is none"
    )


def test_notes_are_read_too():
    d = made(
        "A dark lesion with dots.",
        "A round lesion with a regular border.",
        notes=["<start_of_turn>model", None],
    )
    f = lint_records(d).of("stray tokens")
    assert f.rows == [0]
    c = fix_findings(d, f)
    assert (
        c.changed == 1
        and c.dataset["notes"][0] == "model"
        and c.dataset["caption"][:] == d["caption"][:]
    )


def test_columns_that_give_the_label_away(ds):
    y = ds["label"]
    tilted = replace_columns(
        ds,
        camera=[
            ("north" if item == "melanoma" else "south") if i % 10 else "east"
            for i, item in enumerate(y)
        ],
    )
    f = lint_records(tilted, images=False).of("shortcut: camera")
    assert f.details["v"] > 0.8 and "north 100%" in f.message
    rare = replace_columns(ds, site=["nail" if i < 3 else s for i, s in enumerate(ds["site"])])
    f = lint_records(rare, images=False).of("small groups: site")
    assert f.rows == [0, 1, 2] and "nail 3" in f.message
    c = fix_findings(rare, f)
    assert (
        c.added == 7
        and Counter(c.dataset["site"])["nail"] == f.details["least"] == 10
        and len(rare) == len(ds)
    )
    one = replace_columns(ds, site=["nail" if i < 1 else s for i, s in enumerate(ds["site"])])
    g = lint_records(one, images=False).of("small groups: site")
    g.details["least"] = 50
    assert fix_findings(one, g).added == 9, "ten times at the most"
    assert "one label" in kinds(
        lint_records(replace_columns(ds, label=["benign"] * len(ds)), images=False)
    )


@pytest.mark.parametrize(
    "d, n", [(Dataset.from_dict({}), 0), ([], 0), (Dataset.from_dict(dict(caption=[])), 0), ({}, 0)]
)
def test_nothing_at_all(d, n):
    found = lint_records(d)
    assert (
        len(found) == n
        and "nothing found" in str(found)
        and found.json()["findings"] == []
        and isinstance(found._repr_html_(), str)
        and isinstance(findings_page(found).page, str)
    )


def test_one_record_and_missing_columns():
    assert not lint_records(made("A dark lesion with an irregular border."))
    assert kinds(lint_records(made(None))) == ["no caption"] and kinds(
        lint_records(made("  "))
    ) == ["no caption"]
    found = lint_records(
        Dataset.from_dict(dict(caption=["A dark spot with a regular border.", None]))
    )
    assert kinds(found) == ["no caption"] and len(found.unchecked) == 6, found.unchecked
    assert kinds(lint_records(Dataset.from_dict(dict(weather=["x"])))) == ["no caption"]
    with pytest.raises(ValueError, match=r"rename_column\('text', 'caption'\)"):
        lint_records(Dataset.from_dict(dict(text=["x"])))
    with pytest.raises(ValueError, match="no list of records"):
        lint_records(["a caption"])


HOSTILE = [
    "<script>alert(1)</script> dark",
    '"><img src=x onerror=alert(1)> dark border',
    "dark' onmouseover='x",
    "\x00\x1b[31m dark",
    "‮ dark border",
    "dark " * 4000,
    "ﬁ＜image＞ dark",
    "𝕕𝕒𝕣𝕜 dark \ue000",
    "{0.__class__} dark",
    "%s%n dark",
    "[insert text] $x^2$ dark",
]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attrs = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attrs |= {k for k, _ in attrs}


def test_hostile_text_stays_text():
    d = made(*HOSTILE, label=["benign"] * len(HOSTILE))
    d = replace_columns(d, id=HOSTILE, notes=HOSTILE)
    found = lint_records({"<b>part</b>": d}, longest=50, vague=2.0)  # every caption is shown
    seen = Tags()
    seen.feed(findings_page(found, 20).page + found._repr_html_())
    assert (
        not seen.tags & {"script", "b>part<"}
        and not any(a.startswith("on") for a in seen.attrs)
        and seen.tags
        <= {
            "h4",
            "p",
            "i",
            "b",
            "table",
            "tr",
            "td",
            "th",
            "thead",
            "tbody",
            "div",
            "br",
            "img",
        }
    )
    json.dumps(found.json())
    c = fix_findings({"<b>part</b>": d}, found.of("stray tokens"))
    assert not [t for t in c.dataset["<b>part</b>"]["caption"] if find_stray_tokens(t)]


def test_broken_pictures(ds, tmp_path):
    whole = ds.select(range(12))
    rows = [dict(r) for r in iter_raw_records(whole)]
    rows[3]["image"] = None
    rows[5]["image"] = dict(bytes=b"\xff\xd8 no picture", path=None)
    rows[8]["image"] = dict(bytes=None, path=str(tmp_path / "gone.png"))
    d = Dataset.from_list(rows, features=whole.features)
    f = lint_records(d).of("no image")
    assert f.rows == [3, 5, 8] and "gone" in f.reasons[8]
    c = fix_findings(d, f)
    assert len(c.dataset) == 9 and not lint_records(c.dataset)
    assert "no image" in findings_page(Findings([f], {"": d})).page
    none = replace_columns(
        Dataset.from_list([{k: v for k, v in r.items() if k != "image"} for r in rows])
    )
    assert any("none was opened" in u for u in lint_records(none).unchecked)


def copies(ds, *changed):
    "The first records again, with other bytes."
    rows = []
    for i, change in enumerate(changed):
        r = dict(next(iter_raw_records(ds.select([i]))))
        im = ds[i]["image"]
        out = io.BytesIO()
        im.save(out, "JPEG", quality=75)
        rows.append(
            r
            | dict(
                id=f"copy{i}",
                patient=None,
                lesion=None,
                image=dict(bytes=out.getvalue(), path=None),
                caption=f"A dark lesion, {i} of many, with a border.",
                attributes=dict.fromkeys(ATTRIBUTE_LEVELS),
            )
            | change
        )
    return Dataset.from_list(rows, features=ds.features)


def test_copies_and_copies_with_two_labels():
    big = load_melanoma_pairs(8, seed=1955, size=64, masks=False)
    flip = {"benign": "melanoma", "melanoma": "benign"}
    d = concatenate_datasets(
        [big, copies(big, {}, dict(label=flip[big[1]["label"]]), dict(lesion=big[2]["lesion"]))]
    )
    found = lint_records(d)
    assert found.of("copied images").groups == [
        [0, 8],
        [1, 9],
    ], "two views of one lesion are no copies"
    assert found.of("one image, two labels").rows == [1, 9]
    c = fix_findings(d, found)
    assert c.left_out == 3 and c.dataset["id"][:] == [
        i for k, i in enumerate(d["id"]) if k not in (1, 8, 9)
    ]


def test_leaks_between_parts(ds):
    parts = split_records(ds, (0.6, 0.2, 0.2))
    parts["test"] = concatenate_datasets([parts["test"], parts["train"].select([4])])
    found = lint_records(parts, show_progress=False)
    (f,) = found
    who = parts["train"][4]["patient"]
    assert f.kind == "leaks to test" and f.part == "train" and 4 in f.rows
    c = fix_findings(parts, f)
    assert (
        isinstance(c.dataset, DatasetDict)
        and c.left_out == sum(p == who for p in parts["train"]["patient"])
        and not lint_records(c.dataset)
        and len(parts["train"]) > len(c.dataset["train"])
    )
    assert kinds(lint_records(dict(a=parts["train"], b=parts["train"]), images=False)) == [
        "leaks to b"
    ]


# ---- cures
def test_a_cure_is_never_in_place_and_counts(ds):
    said = list(ds["caption"])
    said[2], said[9], said[11] = (
        None,
        said[9] + " <image>",
        (
            said[11].replace("benign", "melanoma")
            if ds[11]["label"] == "benign"
            else said[11].replace("melanoma", "benign")
        ),
    )
    d = replace_columns(ds, caption=said)
    before = dataset_fingerprint(d)
    found = lint_records(d, images=False)
    assert kinds(found) == ["no caption", "contradictions", "stray tokens"]
    c = fix_findings(d, found)
    assert (
        (c.changed, c.left_out, c.added, c.before, len(c.dataset))
        == (2, 1, 0, len(ds), len(ds) - 1)
        and dataset_fingerprint(d) == before
        and not lint_records(c.dataset, images=False)
    )
    assert "2 changed, 1 left out" in repr(c) and c.dataset["caption"][8] == ds["caption"][9], (
        "positions after the cure"
    )
    assert c.dataset.features == ds.features
    for f in found:
        assert len(fix_findings(d, f).dataset) == len(ds) - (f.kind == "no caption")
    assert (
        fix_findings(d, found, how="leave out").left_out == 3
        and fix_findings(
            d,
            [],
        ).left_out
        == 0
    )


def test_cures_refuse_what_is_not_theirs(ds):
    d = replace_columns(ds, caption=[None] + list(ds["caption"])[1:])
    (f,) = lint_records(d, images=False)
    with pytest.raises(ValueError, match="another set"):
        fix_findings(ds, f)
    with pytest.raises(ValueError, match="another set"):
        fix_findings(fix_findings(d, f).dataset, f)
    with pytest.raises(ValueError, match="the parts here are 'train'"):
        fix_findings(dict(train=d), f)
    with pytest.raises(ValueError, match="did you mean 'rewrite'"):
        fix_findings(d, f, how="rewrit")
    with pytest.raises(ValueError, match="no groups"):
        fix_findings(d, f, how="first of each")
    with pytest.raises(ValueError, match="too little"):
        fix_findings(made(None), lint_records(made(None)), how="rewrite")
    with pytest.raises(KeyError, match="there is no caption"):
        lint_records(d, images=False).of("vague")


def test_findings_go_into_a_file(ds, tmp_path):
    d = replace_columns(ds, caption=[None] + list(ds["caption"])[1:])
    found = lint_records(d, images=False)
    found.save(tmp_path / "lint.json")
    back = json.loads((tmp_path / "lint.json").read_text(encoding="utf-8"))
    assert (
        back == json.loads(json.dumps(found.json()))
        and back["findings"][0]["rows"] == [0]
        and back["records"] == {"": len(ds)}
    )


@pytest.mark.skipif(
    not (REAL / "ham10000").is_dir(),
    reason=f"no real data here: {REAL.name}/ham10000 is absent (set MMKIT_REAL)",
)
def test_a_real_set():
    d, _ = data.load_folder(REAL / "ham10000")
    found = lint_records(d)
    assert {"vague captions", "repeated captions"} <= set(kinds(found)) and any(
        "patient" in u for u in found.unchecked
    )
    for f in found:
        c = fix_findings(d, f)
        assert c.before == len(d) and len(c.dataset) == len(d) - c.left_out
    assert len(findings_page(found).page) > 1000
