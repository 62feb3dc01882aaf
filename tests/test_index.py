"The committed tour meets its bars: the closing table is read from the stored output."

import re
from pathlib import Path

import nbformat
import pytest

from mmkit.course import find_index_notebook


@pytest.fixture(scope="module")
def tour_notebook():
    return nbformat.read(find_index_notebook(), as_version=4)


@pytest.fixture(scope="module")
def closing(tour_notebook):
    texts = [o.get("text", "") for c in tour_notebook.cells for o in c.get("outputs", [])]
    return next(text for text in texts if "comparison" in text and "difference" in text)


@pytest.fixture(scope="module")
def printed(tour_notebook):
    "Every line that a cell printed."
    outputs = [o for cell in tour_notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs)


def row(text, name):  # from, to, and the difference with its interval
    line = next(line for line in text.splitlines() if line.startswith(name))
    numbers = re.findall(r"[+-]?\d\.\d+", line.replace("−", "-"))
    return [float(number) for number in numbers]


def test_the_closing_table_has_at_most_six_rows_and_fits_the_page(closing):
    lines = closing.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("─"))
    assert 1 <= len([line for line in lines[start + 1 :] if line]) <= 6
    assert max(map(len, lines)) <= 100


def test_alignment_lifts_retrieval_from_chance(closing):
    before, after, _, low, _ = row(closing, "base → aligned")
    assert before <= 0.1 and after >= 0.3 and low > 0.2


def test_the_projector_adds_to_the_base(closing):
    _, _, gain, low, _ = row(closing, "base → projector")
    assert gain >= 0.10 and low > 0.05


def test_what_the_projector_adds_is_seen_in_the_image(printed):
    gain, low, _ = row(printed, "its own image minus a shuffled one")
    assert gain >= 0.25 and low > 0.15


def test_lora_is_not_worse_than_the_projector(closing):
    _, _, _, low, _ = row(closing, "projector → LoRA")
    assert low > -0.02


def test_lora_calls_melanoma_and_without_its_own_image_falls_to_chance(printed):
    own, _, _ = row(printed, "LoRA, own image")
    _, low, high = row(printed, "LoRA, shuffled image: balanced")
    assert own >= 0.80 and low <= 0.5 <= high


def test_four_bits_cost_little(closing):
    _, _, _, low, _ = row(closing, "LoRA → QLoRA")
    assert low > -0.05


def test_without_its_own_image_the_tuned_model_loses_much(closing):
    _, _, gain, low, _ = row(closing, "LoRA, shuffled image → LoRA")
    assert gain >= 0.2 and low > 0.1


def test_notes_that_give_the_answer_away_take_the_image_its_share(closing):
    honest, shortcut, _, _, high = row(closing, "notes by chance → notes 95% right")
    assert honest >= 0.8 and shortcut <= honest - 0.3 and high < 0


def test_every_chapter_is_named(tour_notebook):
    text = "\n".join(cell.source for cell in tour_notebook.cells if cell.cell_type == "markdown")
    course = Path(find_index_notebook()).parent / "course"
    missing = [p.name for p in course.glob("*.ipynb") if f"course/{p.name}" not in text]
    assert not missing, missing


def test_budgets_are_steps(tour_notebook):
    code = "\n".join(cell.source for cell in tour_notebook.cells if cell.cell_type == "code")
    assert "max_seconds" not in code
    assert code.count("max_steps=") == 4  # alignment, projector, LoRA, the question with a note
