"The shape of the code: sizes, names, imports, and what a package shows its users."

import ast
import re
import statistics
import subprocess
import sys
from functools import lru_cache

import pytest
from code_metrics import (
    PACKAGES,
    ROOT,
    SINGLE_MODULES,
    measure,
    notebook_sources,
    package_modules,
)
from conftest import CHAPTERS, LIBRARY


@lru_cache(maxsize=1)
def figures():
    return measure()


def test_code_has_one_statement_a_line_and_100_columns():
    found = figures()
    wide = [place for place in found["wide"] if not place.startswith("tests/")]
    assert not wide, wide[:5]
    assert not found["folded"], found["folded"][:5]


def test_imports_go_down_without_circles():
    found = figures()
    assert not found["circles"], found["circles"]
    assert not found["upward"], found["upward"]
    assert not found["local_imports"], found["local_imports"]


def test_private_names_stay_in_their_module():
    assert not figures()["private"], figures()["private"]


def test_modules_are_short():
    lengths = figures()["lengths"]
    assert statistics.median(lengths.values()) <= 300
    long = {name: lines for name, lines in lengths.items() if lines > 450}
    assert not long, long


def test_locals_have_names():
    assert figures()["one_letter_share"] <= 0.2


def test_functions_are_short():
    long = [place for place in figures()["functions"] if place[0] > 100]
    assert not long, long


def test_packages_show_at_most_200_names():
    public = figures()["public"]
    assert set(public) >= set(PACKAGES) - set(SINGLE_MODULES), "a package without a face"
    assert sum(map(len, public.values())) <= 200


def used_names(code):
    "Names that code takes from mmkit: `data.load_folder`, `from mmkit.data import load_folder`."
    tree, found, packages = ast.parse(code), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmkit":
            names = {alias.name for alias in node.names}
            if node.module == "mmkit":
                packages |= names
            else:
                found |= names
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(node.attr)
    return found


def test_every_public_name_is_used_through_the_package():
    "In a chapter, in another module's notebook, or in a test."
    used = set()
    for path in [*CHAPTERS, *LIBRARY]:
        cells = [code for _, code in notebook_sources(path)]
        if not path.name.startswith("00_"):
            for code in cells:
                used |= used_names(code)
    for path in (ROOT / "tests").rglob("*.py"):
        used |= used_names(path.read_text(encoding="utf-8"))
    public = {f"{p}.{n}" for p, names in figures()["public"].items() for n in names}
    unused = {name for name in public if name.split(".")[1] not in used}
    assert not unused, f"nobody uses {sorted(unused)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_import_in_a_fresh_interpreter(package):
    names = figures()["public"].get(package, [])
    code = (
        f"from mmkit.{package} import ({', '.join(names)},)" if names else f"import mmkit.{package}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_modules_define_what_they_use():
    "A name that only a notebook's hidden cell defines is missing for everybody who imports."
    paths = [str(path) for path in package_modules().values()]
    command = ["ruff", "check", "--isolated", "--select", "F811,F821,F822,F823", *paths]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_docstrings_say_what_a_module_holds():
    for name, path in package_modules().items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert name == "" or docstring, f"mmkit.{name} has no docstring"
        assert not re.search(r"\bTODO\b", docstring or ""), f"mmkit.{name}: {docstring}"
