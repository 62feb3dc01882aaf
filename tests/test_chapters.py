"Every chapter and the tour run alone, top to bottom, in a fresh kernel, without a warning."

import io
import time
import warnings

import nbformat

from mmkit.tour import find_external_urls, run_notebook

USUAL_SECONDS = {"index": 300}  # on two slow cores; every other chapter 90
HANG_FACTOR = 10  # only a run of ten times the usual counts as one that hangs


def test_chapter_runs_in_a_fresh_kernel(chapter, tmp_path, capsys):
    began = time.time()
    run = run_notebook(chapter, tmp_path, name=chapter.stem, stream=io.StringIO())
    seconds = time.time() - began
    with capsys.disabled():
        print(f" {seconds:.0f} s", end="")
    assert not run.error, run.error
    cells = nbformat.read(run.notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    stderr = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not stderr, f"{chapter.name} writes to stderr: {stderr[:3]}"
    assert not find_external_urls(run.page.read_text(encoding="utf-8"))
    usual = USUAL_SECONDS.get(chapter.stem, 90)
    if seconds > usual:
        warnings.warn(f"{chapter.name} took {seconds:.0f} s; {usual} is usual", stacklevel=1)
    assert seconds < HANG_FACTOR * usual, f"{chapter.name} took {seconds:.0f} s: does it hang?"
