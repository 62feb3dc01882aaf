"The index as a program: says where it is, leaves one page that opens offline, fails readably."

import io
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell as cell
from nbformat.v4 import new_markdown_cell as words
from nbformat.v4 import new_notebook

from mmkit.course import find_index_notebook
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
