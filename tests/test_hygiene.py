"""Notebooks as they are committed: outputs kept, nothing of one machine in them, exercises with
check and solution.
"""

import copy
import re
import subprocess

import nbformat
import pytest
from conftest import CHAPTERS, COURSE, LIBRARY, ROOT
from nbdev.clean import clean_nb

PATHS = re.compile(
    r"(?<![\w.:/])/(?:root|work|home|tmp|Users|opt|mnt)/[\w.]"
    r"|[A-Z]:\\\\?Users|site-packages|\.pyenv"
)
DATA_URI = re.compile(r"data:[\w/+]+;base64,[A-Za-z0-9+/=]+")
NUMBERED = [path for path in COURSE if re.match(r"[0-8]\d_", path.name)]


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def is_exported(cell):
    return bool(re.search(r"^#\| ?export", cell.source, re.M))


def count_lines(cells):
    "Lines of code, without blank lines and comments."
    lines = [line.strip() for cell in cells for line in cell.source.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def output_texts(output):
    "All text of an output, without images."
    found = [output.get("text", ""), "\n".join(output.get("traceback", []))]
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image") and isinstance(value, str):
            found.append(value)
    return found


def test_there_are_two_shelves():
    assert len(CHAPTERS) >= 10
    assert len(LIBRARY) >= 50


def test_notebook_is_valid_and_small(notebook):
    nbformat.validate(read(notebook))
    size = notebook.stat().st_size
    assert size <= 1e6, (
        f"{notebook.name} has {size / 1e6:.2f} MB: lower the dpi or draw fewer images"
    )


def test_chapter_keeps_its_outputs(chapter):
    outputs = [output for cell in code_cells(read(chapter)) for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(outputs) >= 3 and images, f"{chapter.name} was committed without outputs"


def test_no_output_is_an_error(notebook):
    for cell in code_cells(read(notebook)):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        assert not errors, f"{notebook.name} was committed with an error: {cell.source[:80]}"


def test_no_path_of_one_machine(notebook):
    for cell in read(notebook).cells:
        texts = [t for output in cell.get("outputs", []) for t in output_texts(output)]
        for text in [cell.source, *texts]:
            found = PATHS.search(DATA_URI.sub("", text))
            assert not found, (
                f"{notebook.name}: a path of one machine: "
                f"…{text[max(0, found.start() - 40) : found.end() + 40]}…"
            )


def test_no_warnings_and_no_widget_state(notebook):
    nb = read(notebook)
    assert "widgets" not in nb.metadata, f"{notebook.name} holds widget state"
    for cell in code_cells(nb):
        for output in cell.outputs:
            name = f"{notebook.name}: {cell.source[:80]}"
            assert output.get("name") != "stderr", f"{name}: stderr: {output.text[:200]}"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), (
                f"{name}: a widget, blank without a kernel"
            )
            for text in output_texts(output):
                assert not re.search(r"\b\w*Warning: ", text), f"{name}: a warning: {text[:200]}"


def test_nbdev_clean_has_nothing_to_do(notebook):
    nb = read(notebook)
    cleaned = copy.deepcopy(nb)
    clean_nb(cleaned, allowed_cell_metadata_keys=["jupyter", "tags"])
    assert cleaned == nb, f"{notebook.name} is not clean: run nbdev_clean"


def test_chapters_export_no_long_stretch(chapter):
    "A lesson shows at most 25 exported lines in a row; plumbing belongs to the library."
    for cell in code_cells(read(chapter)):
        if is_exported(cell):
            lines = count_lines([cell])
            assert lines <= 25, f"{chapter.name}: {lines} exported lines: {cell.source[:80]}"


def test_course_exports_at_most_15_percent():
    cells = [cell for path in COURSE for cell in code_cells(read(path))]
    exported = count_lines(filter(is_exported, cells))
    assert exported <= 0.15 * count_lines(cells)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_every_exercise_has_check_and_folded_solution(path):
    def called_checks(cell):
        return re.findall(r"(?<!def )\b(\w*check\w*)\(", cell.source)

    cells = code_cells(read(path))
    starts = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert len(starts) >= 2, f"{path.name} has {len(starts)} exercises; at least two"
    for start, end in zip(starts, [*starts[1:], len(cells)]):
        exercise, name = cells[start:end], f"{path.name}: {cells[start].source[:60]!r}"
        solutions = [cell for cell in exercise if "solution" in tags(cell)]
        stubs = [cell for cell in exercise if "solution" not in tags(cell)]
        assert any(map(called_checks, stubs)), f"{name}: no check is called after the exercise"
        assert solutions, f"{name}: no solution after the exercise"
        for cell in solutions:
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), f"{name}: unfolded"
        source = "\n".join(cell.source for cell in solutions)
        assert "assert" in source and sum(len(called_checks(c)) for c in solutions) >= 2, (
            f"{name}: the solution asserts that the check accepts it and rejects wrong answers"
        )


def test_links_of_the_readmes_lead_somewhere():
    for page in ("README.md", "EXAMPLES.md", "nbs/SCALING.md", "DEVELOPERS.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            exists = re.match(r"https?:|mailto:", target) or (ROOT / target).exists()
            assert exists, f"{page} names {target}, which is not there"


def test_links_between_notebooks_lead_somewhere(notebook):
    text = "\n".join(cell.source for cell in read(notebook).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#\s]+\.ipynb)", text):
        exists = re.match(r"https?:", target) or (notebook.parent / target).exists()
        assert exists, f"{notebook.name} names {target}, which is not there"


def test_nothing_shipped_names_this_workshop():
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if not any(listed):
        pytest.skip("not a git clone")
    suffixes = (".py", ".md", ".ini", ".txt", ".toml", ".ipynb", ".json", ".yaml")
    for name in listed:
        path = ROOT / name
        if path.suffix in suffixes and path.is_file() and path.name != "test_hygiene.py":
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.search(r"(?<![\w.:/])/work/|\.\./shared\b", text)
            assert not found, f"{name} mentions {found[0]}"
