"Notebooks as they are committed: outputs kept, nothing of one machine in them, every exercise with its check and solution."

import copy
import re
import subprocess

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from nbdev.clean import clean_nb

PATHS = re.compile(
    r"(?<![\w.:/])/(?:root|work|home|tmp|Users|opt|mnt)/[\w.]|[A-Z]:\\\\?Users|site-packages|\.pyenv"
)


def read(p):
    return nbformat.read(p, as_version=4)


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def tags(c):
    return c.metadata.get("tags", [])


def texts(o):
    "All text of an output, without pictures."
    found = [o.get("text", ""), "\n".join(o.get("traceback", []))]
    return found + [
        v for k, v in o.get("data", {}).items() if not k.startswith("image") and isinstance(v, str)
    ]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_valid_and_small(notebook):
    nbformat.validate(read(notebook))
    size = notebook.stat().st_size
    assert size <= 1e6, (
        f"{notebook.name} has {size / 1e6:.2f} MB; lower the dpi, or draw fewer pictures"
    )


def test_outputs_are_kept(notebook):
    nb = read(notebook)
    shown = [o for c in code(nb) for o in c.outputs]
    assert len(shown) >= 3 and any("image/png" in o.get("data", {}) for o in shown), (
        f"{notebook.name} was committed without outputs"
    )
    assert not [o for o in shown if o.output_type == "error"], (
        f"{notebook.name} was committed with an error in it"
    )


def test_nothing_of_one_machine(notebook):
    nb = read(notebook)
    for c in nb.cells:
        for t in [c.source] + [t for o in c.get("outputs", []) for t in texts(o)]:
            found = PATHS.search(re.sub(r"data:[\w/+]+;base64,[A-Za-z0-9+/=]+", "", t))
            assert not found, (
                f"{notebook.name}: a path of one machine: …{t[max(0, found.start() - 40) : found.end() + 40]}…"
            )


def test_no_warnings_no_widgets(notebook):
    nb = read(notebook)
    assert "widgets" not in nb.metadata, f"{notebook.name} holds widget state"
    for c in code(nb):
        for o in c.outputs:
            assert o.get("name") != "stderr", (
                f"{notebook.name}: stderr in an output: {o.text[:200]}"
            )
            assert "application/vnd.jupyter.widget-view+json" not in o.get("data", {}), (
                f"{notebook.name}: a widget, blank tomorrow: {c.source[:80]}"
            )
            for t in texts(o):
                assert not re.search(r"\b\w*Warning: ", t), (
                    f"{notebook.name}: a warning in an output: {t[:200]}"
                )


def test_cells_are_short(notebook):
    for c in code(read(notebook)):
        assert len(c.source.splitlines()) <= 45, (
            f"{notebook.name}: {len(c.source.splitlines())} lines: {c.source[:80]}"
        )


def test_nbdev_clean_has_nothing_to_do(notebook):
    nb = read(notebook)
    cleaned = copy.deepcopy(nb)
    clean_nb(cleaned, allowed_cell_metadata_keys=["jupyter", "tags"])
    assert cleaned == nb, f"{notebook.name} is not clean: run nbdev_clean"


@pytest.mark.parametrize(
    "chapter", [p for p in NOTEBOOKS if re.match(r"[0-8]\d_", p.name)], ids=lambda p: p.stem
)
def test_every_exercise_has_check_and_folded_solution(chapter):
    cells = code(read(chapter))
    at = [i for i, c in enumerate(cells) if "exercise" in tags(c)]
    assert len(at) >= 2, f"{chapter.name} has {len(at)} exercises; at least two"
    for i, end in zip(at, at[1:] + [len(cells)]):
        mine = cells[i:end]

        def called(c):
            return re.findall(r"(?<!def )\b(\w*check\w*)\(", c.source)

        assert any(called(c) for c in mine if "solution" not in tags(c)), (
            f"{chapter.name}: no check is called after the exercise {cells[i].source[:60]!r}"
        )
        solutions = [c for c in mine if "solution" in tags(c)]
        assert solutions, f"{chapter.name}: no solution after the exercise {cells[i].source[:60]!r}"
        for c in solutions:
            assert c.metadata.get("jupyter", {}).get("source_hidden"), (
                f"{chapter.name}: an unfolded solution: {c.source[:60]!r}"
            )
        said = "\n".join(c.source for c in solutions)
        assert "assert" in said and sum(len(called(c)) for c in solutions) >= 2, (
            f"{chapter.name}: the solution should assert that the check accepts it and rejects wrong answers: {said[:80]!r}"
        )


def test_links_of_the_readmes_lead_somewhere():
    for page in ("README.md", "DEVELOPERS.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert re.match(r"https?:|mailto:", target) or (ROOT / target).exists(), (
                f"{page} names {target}, which is not there"
            )


def test_nothing_shipped_names_this_workshop():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    if not any(listed):
        pytest.skip("not a git clone")
    for name in listed:
        p = ROOT / name
        if (
            p.suffix in (".py", ".md", ".ini", ".txt", ".toml", ".ipynb", ".json")
            and p.is_file()
            and p.name != "test_hygiene.py"
        ):
            found = re.search(
                r"(?<![\w.:/])/work/|\.\./shared\b", p.read_text(encoding="utf-8", errors="replace")
            )
            assert not found, f"{name} mentions {found[0]}"
