"The record, its wording, the split, the copies: what `pairs` promises."

import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmkit.chat.prompts import PROMPTS
from mmkit.core.processes import map_in_processes
from mmkit.data.captions import (
    CAPTION_STRUCTURES,
    NUMBERS,
    VAGUE_CAPTIONS,
    compose_caption,
    describe_attributes,
    format_colour_count,
    format_impression,
)
from mmkit.data.duplicates import find_close_hashes, find_near_duplicates
from mmkit.data.gallery import plot_records
from mmkit.data.melanoma_pairs import load_melanoma_pairs, rerender
from mmkit.data.questions import make_questions
from mmkit.data.records import (
    FEATURES,
    LABELS,
    dataset_fingerprint,
    evict_pair_sets,
    iter_raw_records,
    make_record,
    write_records,
)
from mmkit.data.splits import (
    find_leakage,
    find_linked_groups,
    remove_leakage,
    split_records,
    split_summary,
)
from mmkit.lesions.lesion import ATTRIBUTE_LEVELS
from mmkit.lesions.render import World

quick = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def ds(cache):
    return load_melanoma_pairs(n=120, seed=2, size=48)


def flat(colour, size=(24, 24)):
    out = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(out, "PNG")
    return dict(bytes=out.getvalue(), path=None)


def rows(
    n,
    patient=lambda i: f"P{i // 3}",
    label=lambda i: "melanoma" if i % 4 == 0 else "benign",
    **more,
):
    return Dataset.from_list(
        [
            make_record(id=f"r{i}", patient=patient(i), label=label(i), source="made", **more)
            for i in range(n)
        ],
        features=FEATURES,
    )


# ---- the record
def test_missing_is_none_and_wrong_is_refused():
    r = make_record(id="a")
    assert (
        set(r) == set(FEATURES)
        and r["mask"] is r["skin_type"] is r["label"] is None
        and r["boxes"] == []
    )
    assert r["attributes"] == dict.fromkeys(ATTRIBUTE_LEVELS)
    with pytest.raises(TypeError, match="did you mean 'patient'"):
        make_record(pateint="x")
    assert make_record(label="stop sign")["label"] == "stop sign"
    with pytest.raises(ValueError, match="name of the class"):
        make_record(label=1)
    back = Dataset.from_list([r], features=FEATURES)[0]
    assert back["image"] is None and back["questions"] == [] and back["attributes"]["veil"] is None


# ---- the wording
NUMBER = {w: n for n, w in enumerate(("no", "one", "two", "three", "four", "five", "six"))}


def read(text):
    "An independent reader of captions."
    out = {}
    m = re.search(r"asymmetry in (one axis|two axes)|no asymmetry", text)
    out["asymmetry"] = m and (m[1] or "none")
    m = re.search(r"\ban? (regular|irregular) border", text)
    out["border"] = m and m[1]
    m = re.search(r"\ban? (typical|atypical) network", text)
    out["network"] = m[1] if m else "absent"
    for k, w in dict(
        dots="dots",
        globules="globules",
        streaks="streaks",
        veil="a blue-white veil",
        structureless="structureless areas",
        regression="regression",
    ).items():
        out[k] = "present" if re.search(rf"\b{w}\b", text) else "absent"
    m = re.search(r"(light|medium|dark) skin", text)
    out["skin"] = m and m[1]
    m = re.search(r"(\w+) colours?\b", text)
    out["n"] = m and NUMBER[m[1]]
    m = re.search(r"Clinical impression: (\w+)\.$", text)
    out["label"] = m and m[1]
    return out


@settings(quick, max_examples=200)
@given(
    st.fixed_dictionaries({k: st.sampled_from(v) for k, v in ATTRIBUTE_LEVELS.items()}),
    st.integers(1, 6),
    st.sampled_from(LABELS),
    st.integers(0, 2**32),
)
def test_every_caption_says_exactly_the_truth(a, n, label, seed):
    a["colours"] = ATTRIBUTE_LEVELS["colours"][(n - 1) // 2]
    text = compose_caption(a, n, label, rng=np.random.default_rng(seed))
    got = read(text)
    assert (
        len(text.split()) <= 45 and text.count("  ") == 0 and "{" not in text and text[0].isupper()
    )
    assert got == {k: v for k, v in a.items() if k != "colours"} | dict(n=n, label=label)
    assert ("no other structure" in text) == all(a[s] == "absent" for s in CAPTION_STRUCTURES)


@settings(quick, max_examples=100)
@given(
    st.fixed_dictionaries(
        {}, optional={k: st.sampled_from(v) for k, v in ATTRIBUTE_LEVELS.items()}
    ),
    st.one_of(st.none(), st.integers(1, 6)),
    st.integers(0, 7),
)
def test_a_caption_never_says_what_is_not_known(a, n, p):
    text = describe_attributes(
        "lesion",
        a,
        NUMBERS[n] if n else None,
        f"on {a['skin']} skin" if "skin" in a else None,
        phrasing=p,
    )
    got = read(text)
    assert (got["asymmetry"], got["border"], got["skin"], got["n"]) == (
        a.get("asymmetry"),
        a.get("border"),
        a.get("skin"),
        n,
    )
    assert all(got[s] == a.get(s, "absent") for s in CAPTION_STRUCTURES)
    assert not re.search(r"\s[,.]|,\s*\.|\.\.|None|\{", text), text
    if "no other structure" in text:
        assert all(a.get(s) == "absent" for s in CAPTION_STRUCTURES)


def test_wording_is_drawn_before_the_label():
    a = World(seed=0, num_lesions=1).lesion(0).attributes()
    for style in ("dense", "vague"):
        said = {
            one_label: [
                compose_caption(a, 3, one_label, style, np.random.default_rng(s)).split("Clinical")[
                    0
                ]
                for s in range(200)
            ]
            for one_label in LABELS
        }
        assert said["melanoma"] == said["benign"] and len(set(said["benign"])) >= 6
    with pytest.raises(ValueError, match="dense, vague, yesno"):
        compose_caption(a, 3, "benign", "terse")
    assert (compose_caption(a, 3, "melanoma", "yesno"), compose_caption(a, 3, None, "yesno")) == (
        "Yes, this is a melanoma.",
        "",
    )


def test_words_are_few():
    world, words = World(seed=0, num_lesions=300), set()
    for i in range(300):
        one_lesion, rng = world.lesion(i), np.random.default_rng(i)
        for r in PROMPTS:
            words |= set(
                re.findall(
                    r"\w+",
                    compose_caption(
                        one_lesion.attributes(), one_lesion.colours, one_lesion.label, r, rng
                    ).lower(),
                )
            )
    assert len(words) < 110


def test_skeleton_serves_another_world():
    assert (
        describe_attributes(
            "shape", dict(asymmetry="none"), "two", "on a dark background", phrasing=0
        )
        == "This shape shows no asymmetry and two colours, on a dark background."
    )


def test_questions_follow_the_truth():
    one_lesion, boxes = (
        World(seed=4, num_lesions=1).lesion(0),
        dict(lesion=(0.1, 0.1, 0.3, 0.3), streaks=(0.7, 0.45, 0.9, 0.5)),
    )
    a = one_lesion.attributes()
    for seed in range(20):
        qs = make_questions(
            a,
            one_lesion.colours,
            one_lesion.label,
            boxes,
            np.random.default_rng(seed),
            unanswerable=3,
        )
        by = {
            k: [q for q in qs if q["kind"] == k]
            for k in ("attribute", "count", "location", "impression", "unanswerable")
        }
        assert len(by["unanswerable"]) == len(
            {q["question"] for q in by["unanswerable"]}
        ) == 3 and sum(map(len, by.values())) == len(qs)
        assert [q["answer"] for q in by["location"]] == [
            "In the upper left.",
            "On the right.",
        ] and by["location"][1]["box"] == pytest.approx(boxes["streaks"])
        assert by["impression"][0][
            "answer"
        ] == one_lesion.label.capitalize() + "." and format_colour_count(
            one_lesion.C
        ).capitalize() + "." in {q["answer"] for q in by["count"]}
        assert all("{" not in q["question"] + q["answer"] for q in qs)
    assert not [q for q in make_questions({}, None, None, None, unanswerable=0)]


# ---- making
def test_pairs_are_the_same_whatever_the_number(ds, cache):
    few = load_melanoma_pairs(n=5, seed=2, size=48)
    for i in range(5):
        a, b = ds[i], few[i]
        assert np.array_equal(
            np.asarray(a.pop("image")), np.asarray(b.pop("image"))
        ) and np.array_equal(np.asarray(a.pop("mask")), np.asarray(b.pop("mask")))
        assert a == b
    assert (
        load_melanoma_pairs(n=5, seed=9, size=48)[0]["caption"] != few[0]["caption"]
        or load_melanoma_pairs(n=5, seed=9, size=48)[1]["caption"] != few[1]["caption"]
    )


def test_truth_can_be_drawn_again(cache):
    for r in load_melanoma_pairs(n=4, seed=6, size=40, prevalence=0.9, cameras=("east", "west")):
        t = rerender(r)
        assert np.array_equal(t.image, np.asarray(r["image"])) and np.array_equal(
            t.mask, np.asarray(r["mask"]) > 0
        )
        assert {b["name"] for b in r["boxes"]} == set(t.boxes) and r["camera"] in ("east", "west")
        assert read(r["caption"])["n"] == len(t.lesion.colours) and r["notes"].startswith(
            "Patient: "
        )
    with pytest.raises(ValueError, match="only procedural"):
        rerender(make_record(id="x", source="ham", provenance='{"row": 2}'))


def test_an_other_argument_is_an_other_set_and_an_old_file_is_used_again(cache):
    made = [
        load_melanoma_pairs(n=6, size=32, cache_dir=cache, **k)
        for k in (
            {},
            dict(seed=1),
            dict(caption_style="vague"),
            dict(masks=False),
            dict(prevalence=0.9),
        )
    ]
    files = {d.cache_files[0]["filename"] for d in made}
    assert (
        len(files) == 5
        and made[3][0]["mask"] is None
        and made[2][0]["caption"]
        in [f"{v} {format_impression(made[2][0]['label'])}" for v in VAGUE_CAPTIONS]
    )
    before = {f: os.stat(f).st_mtime_ns for f in files}
    assert load_melanoma_pairs(n=6, size=32, cache_dir=cache).cache_files[0]["filename"] in files
    assert before == {f: os.stat(f).st_mtime_ns for f in files}
    with pytest.raises(ValueError, match="at least one"):
        load_melanoma_pairs(n=0)
    with pytest.raises(ValueError, match="caption_style"):
        load_melanoma_pairs(n=2, caption_style="terse")


def test_a_changed_renderer_does_not_meet_an_old_file(cache, monkeypatch):
    old = load_melanoma_pairs(n=3, size=32, seed=77)
    real = World.render

    def darker(self, i, size):
        r = real(self, i, size)
        r.image = r.image // 2
        return r

    monkeypatch.setattr(World, "render", darker)
    assert (
        np.asarray(load_melanoma_pairs(n=3, size=32, seed=77)[0]["image"]).mean()
        < np.asarray(old[0]["image"]).mean() * 0.7
    )


@pytest.fixture
def used_processes(monkeypatch):
    "How many processes each call asked for; two cores."
    used = []

    def count(function, items, num_processes):
        used.append(num_processes)
        return map_in_processes(function, items, num_processes)

    monkeypatch.setattr("mmkit.data.melanoma_pairs.map_in_processes", count)
    monkeypatch.setattr("mmkit.data.melanoma_pairs.available_cpu_count", lambda: 2)
    return used


def test_pairs_are_the_same_by_any_number_of_processes(tmp_path, used_processes):
    one, two, usual = (
        load_melanoma_pairs(70, 4, 32, cache_dir=tmp_path / str(number), num_processes=number)
        for number in (1, 2, None)
    )
    assert used_processes == [1, 2, 2]
    assert [list(iter_raw_records(ds)) for ds in (two, usual)] == [list(iter_raw_records(one))] * 2


def test_pairs_are_drawn_once_by_however_many_processes(tmp_path, used_processes):
    for number in (2, None, 1):
        again = load_melanoma_pairs(70, 4, 32, cache_dir=tmp_path, num_processes=number)
    assert len(again) == 70 and used_processes == [2]


@pytest.mark.parametrize("n, cores", [(63, 1), (64, 2), (200, 2)])
def test_few_pairs_are_drawn_by_one_process(tmp_path, used_processes, n, cores):
    load_melanoma_pairs(n, size=16, masks=False, cache_dir=tmp_path)
    assert used_processes == [cores]


def test_a_script_without_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('begins')\n"
        "from mmkit.data import load_melanoma_pairs\n"
        f"pairs = load_melanoma_pairs(64, size=16, cache_dir={str(tmp_path)!r}, num_processes=2)\n"
        "print(len(pairs))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.split() == ["begins", "64"], done.stderr[-500:]


def test_a_spoiled_file_is_made_again(cache):
    file = load_melanoma_pairs(n=3, size=32, seed=78).cache_files[0]["filename"]
    Path(file).write_bytes(b"half")
    assert len(load_melanoma_pairs(n=3, size=32, seed=78)) == 3


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stops():
        yield make_record(id="a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(stops(), tmp_path / "x" / "data.arrow")
    assert list((tmp_path / "x").iterdir()) == []


def test_records_are_not_held_in_memory(tmp_path):
    n, each = 1200, 50_000

    def make():
        return (
            make_record(
                id=str(i), image=dict(bytes=bytes(np.random.default_rng(i).bytes(each)), path=None)
            )
            for i in range(n)
        )

    tracemalloc.start()
    d = write_records(make(), tmp_path / "data.arrow")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(d) == n and peak < n * each / 3, (
        f"{peak / 1e6:.0f} MB at the peak for {n * each / 1e6:.0f} MB of records"
    )


def test_the_cache_does_not_grow_for_ever(tmp_path):
    for k in range(4):
        d = tmp_path / f"pairs-{k}"
        d.mkdir()
        (d / "data.arrow").write_bytes(bytes(1000))
        os.utime(d, (k, k))
    evict_pair_sets(tmp_path, cache_size_limit=2500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs-2", "pairs-3"]


# ---- fingerprint
def test_fingerprint_sees_every_field():
    base = make_record(
        id="a",
        image=flat("red"),
        images=[flat("red"), flat("blue")],
        messages=[dict(role="user", content=[dict(type="text", text="q")])],
        prompt="q",
        caption="c",
        label="benign",
        patient="p",
        lesion="l",
        attributes=dict(border="regular"),
        mask=flat("white"),
        questions=[dict(question="q", answer="a", kind="k", box=[0, 0, 1, 1])],
        boxes=[dict(name="lesion", box=[0, 0, 1, 1])],
        skin_type=2,
        camera="n",
        site="s",
        age=40,
        sex="male",
        notes="n",
        source="x",
        provenance="{}",
        licence="l",
        split="train",
    )

    def mark(r):
        return dataset_fingerprint(Dataset.from_list([r], features=FEATURES))

    other = dict(
        image=flat("blue"),
        images=[flat("blue"), flat("red")],
        messages=[dict(role="user", content=[dict(type="text", text="r")])],
        mask=flat("black"),
        label="melanoma",
        attributes=dict.fromkeys(ATTRIBUTE_LEVELS),
        skin_type=3,
        age=41,
        boxes=[],
        questions=[dict(question="q", answer="b", kind="k", box=[0, 0, 1, 1])],
    )
    marks = (
        {mark(base)}
        | {mark(base | {k: other.get(k, "different")}) for k in FEATURES}
        | {mark(base | {k: None}) for k in FEATURES if k not in ("questions", "boxes")}
    )
    assert len(marks) == 1 + 2 * len(FEATURES) - 2
    stored = ("image", "images", "mask")
    assert mark(base) == mark(
        json.loads(json.dumps({k: v for k, v in base.items() if k not in stored}))
        | {k: base[k] for k in stored}
    )


def test_fingerprint_knows_order_and_not_place(ds, tmp_path):
    first = ds.select(range(10))
    assert (
        dataset_fingerprint(first)
        == dataset_fingerprint(Dataset.from_list(list(iter_raw_records(first)), features=FEATURES))
        != dataset_fingerprint(first.select([*range(1, 10), 0]))
    )
    assert (
        dataset_fingerprint(DatasetDict(a=first, b=ds))
        == dataset_fingerprint(dict(b=ds, a=first))
        != dataset_fingerprint(dict(a=ds, b=first))
    )
    at = []
    for where in ("here", "there"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "x.png").write_bytes(flat("red")["bytes"])
        at.append(
            Dataset.from_list(
                [make_record(id="x", image=dict(path=str(tmp_path / where / "x.png"), bytes=None))],
                features=FEATURES,
            )
        )
    assert dataset_fingerprint(at[0]) == dataset_fingerprint(at[1])
    (tmp_path / "there" / "x.png").write_bytes(flat("blue")["bytes"])
    assert dataset_fingerprint(at[0]) != dataset_fingerprint(at[1])
    (tmp_path / "there" / "x.png").unlink()
    with pytest.raises(FileNotFoundError, match="x.png is gone"):
        dataset_fingerprint(at[1])


def test_fingerprint_is_the_same_in_another_process(ds, cache):
    code = (
        "from mmkit.data import load_melanoma_pairs\n"
        "from mmkit.data.records import dataset_fingerprint\n"
        "print(dataset_fingerprint(load_melanoma_pairs(n=120, seed=2, size=48)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONHASHSEED="7"),
    )
    assert out.stdout.strip() == dataset_fingerprint(ds), out.stderr[-500:]


# ---- split
@settings(quick, max_examples=15)
@given(st.integers(0, 2**20), st.integers(120, 400), st.floats(0.05, 0.5))
def test_nobody_is_on_both_sides(seed, n, share):
    rng = np.random.default_rng(seed)
    patient, lesion = rng.integers(0, n // 3, n), rng.integers(0, n, n)
    known, label = rng.random(n) < 0.8, rng.random(n) < share
    d = rows(
        n,
        lambda i: f"P{patient[i]}" if known[i] else None,
        lambda i: ("benign", "melanoma")[int(label[i])],
    )
    d = (
        d.remove_columns("lesion")
        .add_column("lesion", [f"L{v}" for v in lesion])
        .select_columns(list(FEATURES))
    )
    assume(len(set(find_linked_groups(d))) >= 10)  # fewer are refused
    s = split_records(d, seed=seed)
    assert sorted(sum((p["id"][:] for p in s.values()), [])) == sorted(d["id"][:]) and list(s) == [
        "train",
        "validation",
        "test",
    ]
    for a, b in itertools.combinations(s.values(), 2):
        assert not find_leakage(a, b, near=-1)


def test_shares_are_kept():
    s = split_records(rows(2000), seed=1)
    assert [len(p) for p in s.values()] == pytest.approx([1600, 200, 200], abs=12)
    assert [
        np.mean([one_label == "melanoma" for one_label in p["label"][:]]) for p in s.values()
    ] == pytest.approx([0.25] * 3, abs=0.03)
    s = split_records(rows(2000), sizes=(0.65, 0.2, 0.15))
    assert [len(p) for p in s.values()] == pytest.approx([1300, 400, 300], abs=15)
    assert (
        split_records(rows(300), seed=3)["test"]["id"][:]
        == split_records(rows(300), seed=3)["test"]["id"][:]
        != split_records(rows(300), seed=4)["test"]["id"][:]
    )


def test_a_patient_of_another_source_is_someone_else():
    a, b = (
        rows(30, lambda i: f"P{i}"),
        rows(30, lambda i: f"P{i}").map(
            lambda r: r | dict(source="other", id="o" + r["id"]), load_from_cache_file=False
        ),
    )
    both = datasets.concatenate_datasets([a, b])
    assert (
        len(set(find_linked_groups(both))) == 60
        and len(set(find_linked_groups(both, linked=[(0, 30), (0, 1)]))) == 58
    )


@pytest.mark.alone
def test_split_at_the_scale_of_siim():
    rng = np.random.default_rng(0)
    patient = np.concatenate(
        [
            np.arange(2056),
            rng.choice(2056, 33126 - 2056, p=(w := rng.pareto(1.5, 2056) + 0.3) / w.sum()),
        ]
    )
    melanoma = set(rng.choice(33126, 584, replace=False).tolist())
    d = rows(33126, lambda i: f"P{patient[i]}", lambda i: "melanoma" if i in melanoma else "benign")
    start = time.perf_counter()
    s = split_records(d)
    took = time.perf_counter() - start
    assert took < 15 and not set(s["train"]["patient"][:]) & set(s["test"]["patient"][:])
    assert [Counter(p["label"][:])["melanoma"] for p in s.values()] == pytest.approx(
        [467, 58, 58], abs=8
    )


def test_the_official_split_is_honoured():
    d = rows(100, split="train")
    part = ["train"] * 70 + ["validation"] * 30
    d = d.remove_columns("split").add_column("split", part)
    s = split_records(d)
    assert {k: len(v) for k, v in s.items()} == dict(train=70, validation=30, test=0) and s[
        "validation"
    ]["id"][0] == "r70"
    assert len(split_records(d, official=False)["test"]) > 0
    odd = d.remove_columns("split").add_column("split", ["train"] * 70 + ["holdout"] * 30)
    with pytest.raises(ValueError, match="'holdout'.*official=False"):
        split_records(odd)
    assert "validation" in str(split_summary(s)) and "70" in str(split_summary(s))


@pytest.mark.parametrize(
    "sizes", [(0.8, 0.2), (0.8, 0.1, 0.2), (0.81, 0.1, 0.09), (1.2, -0.1, -0.1)]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="multiples of 0.05"):
        split_records(rows(200), sizes)


def test_too_few_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="4 groups.*at least 10"):
        split_records(rows(12))
    with pytest.raises(ValueError, match="0 groups"):
        split_records(rows(3).select([]))


# ---- copies
def test_every_kind_of_leak_is_found(ds):
    r = list(iter_raw_records(ds.select(range(12))))

    def fresh(i, **k):
        return r[i] | dict(id=f"n{i}", patient=f"N{i}", lesion=f"N{i}") | k

    image = ds[4]["image"].resize((36, 36))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=60)
    a = Dataset.from_list(
        [x | dict(id=f"ISIC_{i:07d}") for i, x in enumerate(r[:6])], features=FEATURES
    )
    b = Dataset.from_list(
        [
            fresh(6, id="ISIC_0000001_downsampled"),
            fresh(7, patient=r[2]["patient"]),
            fresh(8, lesion=r[3]["lesion"]),
            fresh(9, image=dict(bytes=out.getvalue(), path=None)),
            fresh(10, image=r[5]["image"]),
            fresh(11),
        ],
        features=FEATURES,
    )
    leaks = find_leakage(a, b)
    assert [(k, i, j) for k, i, j, _ in leaks.found if k != "same patient"] == [
        ("same name", 1, 0),
        ("same lesion", 3, 2),
        ("identical image", 5, 4),
        ("near-identical image", 4, 3),
    ]
    assert (
        [j for _, _, j, _ in leaks.of("same patient")] == [1]
        and leaks
        and leaks.b == {0, 1, 2, 3, 4}
    )
    assert "identical" in str(leaks) and "records of b" in leaks._repr_html_()
    s = remove_leakage(dict(train=a, validation=a.select([]), test=b))
    assert not find_leakage(s["train"], s["test"]) and len(s["test"]) == 6 and len(s["train"]) < 6
    assert not find_leakage(a.select([]), b) and not find_leakage(a, b.select([]))


def test_linked_copies_stay_together(ds):
    d = Dataset.from_list(
        [
            x | dict(id=f"c{i}", patient=None, lesion=None)
            for i, x in enumerate(
                [
                    *iter_raw_records(ds.select(range(60))),
                    *iter_raw_records(ds.select(range(0, 60, 4))),
                ]
            )
        ],
        features=FEATURES,
    )
    links = find_near_duplicates(d)
    assert links == [(4 * k, 60 + k) for k in range(15)]
    s = split_records(d, linked=links)
    assert all(not find_leakage(x, y) for x, y in itertools.combinations(s.values(), 2))
    assert any(
        find_leakage(x, y) for x, y in itertools.combinations(split_records(d).values(), 2)
    )  # without the links they leak


def test_comparing_in_blocks_is_comparing_all():
    rng = np.random.default_rng(0)
    bits, base = rng.random((90, 64)) < 0.5, rng.standard_normal((90, 1024)).astype(np.float32)
    bits[50:70] = bits[:20] ^ (rng.random((20, 64)) < 0.08)
    base[50:65] = base[:15]
    base = (base - base.mean(1, keepdims=True)) / base.std(1, keepdims=True) / 32
    names = np.array([f"e{i}" for i in range(90)], dtype=object)
    names[3] = None
    slow = [
        (i, j)
        for i in range(90)
        for j in range(90)
        if None not in (names[i], names[j])
        and (bits[i] != bits[j]).sum() <= 8
        and base[i] @ base[j] >= 0.95
    ]
    assert (
        sorted(find_close_hashes((names, bits, base), (names, bits, base), 8, 0.95, block=17))
        == slow
        and len(slow) > 90
    )


@pytest.mark.alone
def test_thousands_of_pictures_can_be_compared():
    rng = np.random.default_rng(0)
    n = 6000
    h = (
        np.arange(n).astype(object),
        rng.random((n, 64)) < 0.5,
        rng.standard_normal((n, 1024)).astype(np.float32) / 32,
    )
    start = time.perf_counter()
    found = find_close_hashes(h, h, 8, 0.5)
    assert len(found) == n and time.perf_counter() - start < 20


# ---- looking
def test_show_pairs_shows_label_caption_and_boxes(ds):
    fig = plot_records(ds, n=4, columns=2)
    fig.canvas.draw()
    assert len(fig.axes) == 4
    for ax, r in zip(fig.axes, ds.select(range(4))):
        assert ax.get_title() == r["label"] and ax.get_xlabel().replace("\n", " ") == r["caption"]
        assert [t.get_text() for t in ax.texts] == [b["name"] for b in r["boxes"]] == list(
            rerender(r).boxes
        ) and len(ax.patches) == len(r["boxes"])
    assert len(plot_records(ds, n=1, boxes=False).axes[0].patches) == 0
    plot_records([make_record(id="x", caption="$5 and $6 <b>")], n=3).canvas.draw()
