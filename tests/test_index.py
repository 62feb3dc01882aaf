"The committed tour meets its bars: the last table is read from the stored output."

import re
from pathlib import Path

import nbformat
import pytest


@pytest.fixture(scope="module")
def closing():
    nb = nbformat.read(Path(__file__).parents[1] / "nbs" / "index.ipynb", as_version=4)
    return "".join(
        o.get("text", "") for o in [c for c in nb.cells if c.cell_type == "code"][-1].outputs
    )


def row(text, name):  # value, low, high of every interval in the row
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [
        tuple(map(float, m)) for m in re.findall(r"(-?\d\.\d+) \[(-?\d\.\d+), (-?\d\.\d+)\]", line)
    ]


def test_lora_adds_a_tenth_and_calls_melanoma(closing):
    assert row(closing, "macro-F1, LoRA − projector")[0][0] >= 0.10
    assert row(closing, "LoRA ")[1][0] >= 0.80


def test_without_its_own_image_it_falls_to_chance(closing):
    _, low, high = row(closing, "shuffled")[1]
    assert low <= 0.5 <= high
    assert row(closing, "balanced accuracy, own image − shuffled")[0][1] > 0.2


def test_the_projector_adds_to_the_base(closing):
    gain, low, _ = row(closing, "macro-F1, projector − base")[0]
    assert gain >= 0.15 and low > 0


def test_the_tour_says_how_much_of_that_is_vocabulary(closing):
    assert (
        row(closing, "translated")[0][0] > row(closing, "base")[0][0]
        and "projector − translated" in closing
    )
