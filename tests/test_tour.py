"The index as a program: says where it is, leaves one page that opens offline, fails readably."

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell as cell
from nbformat.v4 import new_markdown_cell as words
from nbformat.v4 import new_notebook
from PIL import Image

from mmkit.core.stats import Interval
from mmkit.course import find_index_notebook
from mmkit.data.own_pairs import (
    UnusableDataError,
    has_both_labels,
    hold_out_test,
    load_own_pairs,
    oversample_rare_label,
    split_own_pairs,
)
from mmkit.evaluate.stages import (
    choose_measure,
    compare_stages,
    describe_difference,
    score_majority,
    score_stage,
)
from mmkit.tour import (
    find_data_dir,
    find_external_urls,
    notebook_to_html,
    run_notebook,
    show_summary,
)

PICTURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"


def write(path, *cells):
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def call(*args, cwd, **kw):
    return subprocess.run(
        [sys.executable, "-m", "mmkit.tour", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **kw,
    )


def test_notebook_runs_and_leaves_one_page(tmp_path):
    data = tmp_path / "my data"
    data.mkdir()
    nb = write(
        tmp_path / "n.ipynb",
        words("# Hello"),
        cell("from mmkit import tour, core\nfor _ in core.make_progress_bar(range(3)):\n    pass"),
        words("## Middle\nwords"),
        cell(PICTURE),
        cell('tour.show_summary(core.make_table([["data", tour.find_data_dir().name]]))'),
    )
    done = call("--notebook", nb, "--out", "o", "--data", "my data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        [line.split()[0] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
        and "Hello" in lines[0]
        and "Middle" in lines[1]
    )
    assert (
        "data  my data" in done.stdout
        and str(tmp_path / "o" / "tour.html") in done.stdout
        and not done.stderr
    )
    page = (tmp_path / "o" / "tour.html").read_text(encoding="utf-8")
    assert not find_external_urls(page) and "data:image/png;base64" in page and "Middle" in page
    ran = nbformat.read(tmp_path / "o" / "tour.ipynb", as_version=4)
    assert any("image/png" in o.get("data", {}) for o in ran.cells[3].outputs)


def test_failing_cell_is_named_and_the_notebook_kept(tmp_path):
    nb = write(
        tmp_path / "n.ipynb",
        words("# Fine"),
        cell("1"),
        words("## Breaks here"),
        cell('x = {}\nx["melanoma"]'),
        cell('print("never")'),
    )
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "tour.html").write_text("of an earlier run")
    done = call("--notebook", nb, "--out", "o", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "Breaks here" in done.stderr
        and 'x["melanoma"]' in done.stderr
        and "KeyError: 'melanoma'" in done.stderr
    )
    assert "Traceback" not in done.stderr and "← failed" in done.stdout
    assert not (tmp_path / "o" / "tour.html").exists(), "an old page must not pass for this run"
    ran = nbformat.read(tmp_path / "o" / "tour.ipynb", as_version=4)
    assert (
        ran.cells[1].outputs
        and ran.cells[3].outputs[-1].ename == "KeyError"
        and not ran.cells[4].outputs
    )


def test_ctrl_c_keeps_what_there_is(tmp_path):
    nb = write(
        tmp_path / "n.ipynb",
        words("# One"),
        cell("41 + 1"),
        words("# Two"),
        cell("import time; time.sleep(60)"),
    )
    p = subprocess.Popen(
        [sys.executable, "-u", "-m", "mmkit.tour", "--notebook", nb, "--out", "o"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "One" in p.stdout.readline()
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "Ctrl-C" in err and "Traceback" not in err
    assert "the same command again" in err and str(tmp_path / "o" / "tour.ipynb") in err
    assert nbformat.read(tmp_path / "o" / "tour.ipynb", as_version=4).cells[1].outputs


def test_dead_kernel_is_explained(tmp_path):
    nb = write(tmp_path / "n.ipynb", cell("import os; os._exit(9)"))
    result = run_notebook(nb, tmp_path / "o", stream=io.StringIO())
    assert result.exit_code == 1
    assert "memory" in result.error
    assert result.page is None


def test_bad_calls_are_one_line(tmp_path):
    nb = write(tmp_path / "n.ipynb", cell("1"))
    for args, says in (
        (["--notebook", nb, "--data", "nowhere"], "DATA='nowhere' is not a folder"),
        (["--notebook", "none.ipynb"], "none.ipynb"),
    ):
        done = call(*args, cwd=tmp_path)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr


def test_index_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_index_notebook() == ROOT / "nbs" / "index.ipynb"


def test_summary_outside_a_run_only_prints(capsys, monkeypatch):
    monkeypatch.delenv("MMKIT_OUT", raising=False)
    monkeypatch.delenv("MMKIT_DATA", raising=False)
    show_summary("last words")
    assert capsys.readouterr().out == "last words\n" and find_data_dir() is None


def test_page_drops_widgets_directives_and_the_network():
    nb = new_notebook(
        cells=[
            words("$x^2$ and <https://example.org>"),
            cell("#| hide\nsecret = 1"),
            cell("#| export\ndef f(): pass"),
        ]
    )
    nb.metadata["widgets"] = {
        "application/vnd.jupyter.widget-state+json": {
            "state": {},
            "version_major": 2,
            "version_minor": 0,
        }
    }
    nb.cells[2].outputs = [
        nbformat.v4.new_output(
            "display_data",
            data={
                "application/vnd.jupyter.widget-view+json": {"model_id": "abc"},
                "text/plain": "a slider stood here",
            },
        )
    ]
    html = notebook_to_html(nb)
    assert not find_external_urls(html) and "secret" not in html and "#| export" not in html
    assert (
        "a slider stood here" in html
        and "widget-view" not in html
        and "https://example.org" in html
    )


@pytest.mark.parametrize(
    "html,n",
    [
        ('<a href="https://x">y</a>', 0),
        ("<script src=https://x/a.js></script>", 1),
        ("<link rel='stylesheet' href='//x/y.css'>", 1),
        ('<style>@import "http://x";</style>', 1),
        ("<style>a{background:url(https://x/y.png)}</style>", 1),
        ('<img alt="" src="data:image/png;base64,AA">', 0),
        ('<img src="p.png">', 1),
    ],
)
def test_external_urls_are_found(html, n):
    assert len(find_external_urls(html)) == n


# ---- a folder of one's own

LABELS = ("benign", "melanoma")


def own_folder(path, n, labels=LABELS, columns=("image", "caption", "label")):
    "A folder of n small noisy images; their descriptions and labels in a table, unless None."
    path.mkdir()
    rows = []
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 48), Image.NEAREST).save(path / f"{i}.png")
        caption = f"A mole with {i} spots, on the {('arm', 'leg', 'back')[i % 3]}."
        rows.append([f"{i}.png", caption, labels[i % len(labels)] if labels else ""])
    if columns:
        with open(path / "table.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *(row[: len(columns)] for row in rows)])
    return path


@pytest.mark.parametrize("labels", [LABELS, ("benign",), None], ids=["both", "one label", "none"])
@pytest.mark.parametrize("n", [4, 6, 40])
def test_a_small_folder_has_pairs_to_train_on_and_to_test(tmp_path, n, labels):
    records, _ = load_own_pairs(own_folder(tmp_path / "mine", n, labels))
    train, test = split_own_pairs(records)
    assert len(train) >= 2 and len(test) >= 2 and len(train) + len(test) == n
    assert not set(train["id"]) & set(test["id"])
    assert has_both_labels(train) == has_both_labels(test) == (labels == LABELS)
    assert len(oversample_rare_label(train)) >= len(train)
    measure = choose_measure(test)
    assert measure == ("balanced_accuracy" if labels == LABELS else "word_f1")
    constant = score_majority(train, test, measure)
    own = [f"{r['caption']} Clinical impression: {r['label']}." for r in test]
    assert compare_stages(constant, score_stage(test, own, measure)).value > 0


def test_rare_labels_are_drawn_again_and_others_kept(tmp_path):
    labels = ("melanoma", "benign", "benign", "benign", "")
    records, _ = load_own_pairs(own_folder(tmp_path / "mine", 10, labels))
    drawn = oversample_rare_label(records)
    assert drawn["label"][:].count("melanoma") == drawn["label"][:].count("benign") == 6
    assert drawn["label"][:].count(None) == 2


def test_unusable_folders_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    own_folder(tmp_path / "three", 3)
    own_folder(tmp_path / "no table", 4, columns=None)
    own_folder(tmp_path / "no caption", 4, columns=("image",))
    for name, says in {
        "empty": "no images",
        "three": "at least 4 are needed",
        "no table": "no table",
        "no caption": "no column 'caption'",
    }.items():
        with pytest.raises(UnusableDataError) as caught:
            load_own_pairs(tmp_path / name)
        sentence = str(caught.value)
        assert says in sentence and "\n" not in sentence and sentence.endswith("."), sentence


def test_copies_and_patients_are_not_split(tmp_path):
    records, _ = load_own_pairs(own_folder(tmp_path / "mine", 6))
    with pytest.raises(UnusableDataError, match="copies of one another"):
        hold_out_test(records, linked=[(0, k) for k in range(1, 6)])
    train, test = hold_out_test(records, linked=[(0, 1), (2, 3)])
    for pair in ({"0", "1"}, {"2", "3"}):
        assert pair <= set(train["id"]) or pair <= set(test["id"])


@pytest.fixture
def short_tour(tmp_path):
    "The tour with two steps in place of hundreds."
    tour = nbformat.read(find_index_notebook(), as_version=4)
    for one in tour.cells:
        one.source = re.sub(r"max_steps=\d+", "max_steps=2", one.source)
    nbformat.write(tour, tmp_path / "short.ipynb")
    return tmp_path / "short.ipynb"


def test_the_tour_says_in_one_sentence_why_it_stops(tmp_path, short_tour):
    folder = own_folder(tmp_path / "three", 3)
    done = call("--notebook", short_tour, "--out", "o", "--data", folder, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "three gives 3 pairs" in done.stderr and "UnusableDataError" not in done.stderr


def test_the_tour_runs_on_six_unlabelled_images_that_nobody_may_change(tmp_path, short_tour):
    folder = own_folder(tmp_path / "six", 6, None)
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & ~0o222)
    names = sorted(os.listdir(folder))
    result = run_notebook(short_tour, tmp_path / "o", folder, stream=io.StringIO())
    folder.chmod(0o755)
    assert not result.error, result.error
    assert "4 pairs to train on, 2 to test" in result.summary and "word F1" in result.summary
    assert sorted(os.listdir(folder)) == names
    page = result.page.read_text(encoding="utf-8")
    assert "Skipped: this step needs melanomas and benign lesions" in page
    assert "No outlines are known" in page


def test_no_interval_is_claimed_for_a_handful_of_patients(tmp_path):
    for n, is_given in ((6, False), (80, True)):
        records, _ = load_own_pairs(own_folder(tmp_path / str(n), n, None))
        _, test = split_own_pairs(records)
        nothing = score_stage(test, [""] * len(test), "word_f1")
        right = score_stage(test, test["caption"][:], "word_f1")
        sentence = describe_difference("right minus nothing", compare_stages(nothing, right))
        assert ("more than chance" in sentence) == is_given, sentence
        assert ("too few patients" in sentence) != is_given, sentence


def test_a_difference_is_shown_only_where_its_printed_interval_leaves_out_0():
    rounds_to_0 = describe_difference("QLoRA minus LoRA", Interval(-0.01, -0.02, -0.004))
    assert "0.00]" in rounds_to_0 and "shows no difference" in rounds_to_0
    assert "more than chance" in describe_difference("loss", Interval(-0.02, -0.03, -0.006))
    assert "more than chance" in describe_difference("gain", Interval(0.02, 0.006, 0.03))
