"Every chapter runs alone, top to bottom, in a fresh kernel, without a warning, in its time; the index as well."

import io
import os
import time

import nbformat

from mmkit.tour import find_external_urls, run_notebook

LIMIT = {"index": 300}  # seconds on two cores; every other chapter 90
SLACK = float(
    os.environ.get("MMKIT_SLACK", 2)
)  # a busy or slow machine gets this many times as long


def test_chapter(notebook, tmp_path, capsys):
    began = time.time()
    run = run_notebook(notebook, tmp_path, name=notebook.stem, stream=io.StringIO())
    took = time.time() - began
    with capsys.disabled():
        print(f" {took:.0f} s", end="")
    assert not run.error, run.error
    nb = nbformat.read(run.notebook, as_version=4)
    grumbles = [o.text for c in nb.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert not grumbles, f"{notebook.name} writes to stderr: {grumbles[:3]}"
    assert not find_external_urls(run.page.read_text(encoding="utf-8"))
    limit = LIMIT.get(notebook.stem, 90) * SLACK
    assert took < limit, f"{notebook.name} took {took:.0f} s; at most {limit:.0f} here"
