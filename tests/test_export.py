"mmkit/ is what the notebooks export: neither edited by hand nor left behind."

import shutil
import subprocess
import sys

from conftest import ROOT


def modules(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.py")}


def test_modules_are_what_the_notebooks_export(tmp_path):
    repo = tmp_path / "mmkit"
    shutil.copytree(ROOT / "nbs", repo / "nbs", ignore=shutil.ignore_patterns(".*", "images"))
    shutil.copy(ROOT / "settings.ini", repo)
    (repo / "mmkit").mkdir()
    for name in ("__init__.py", "__main__.py"):  # no notebook writes these two
        shutil.copy(ROOT / "mmkit" / name, repo / "mmkit")
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    done = subprocess.run([sys.executable, "-c", export], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported, committed = modules(repo / "mmkit"), modules(ROOT / "mmkit")
    odd = exported.keys() ^ committed.keys()
    assert not odd, f"modules without a notebook, or not exported: {odd}"
    stale = [name for name in committed if committed[name] != exported[name]]
    assert not stale, f"{stale} differ from their notebooks: run nbdev_export"


def test_the_path_of_a_library_notebook_is_the_path_of_its_module():
    from conftest import LIBRARY

    for path in LIBRARY:
        place = path.relative_to(ROOT / "nbs/library").with_suffix("")
        module = place.parent / "__init__" if place.name.startswith("00_") else place
        assert (ROOT / "mmkit" / module).with_suffix(".py").exists(), f"{path.name}: no {module}"
