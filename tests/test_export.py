"mmkit/*.py is what the notebooks export: neither edited by hand nor left behind."

import shutil
import subprocess
import sys

from conftest import ROOT


def test_modules_are_what_the_notebooks_export(tmp_path):
    repo = tmp_path / "mmkit"
    shutil.copytree(ROOT / "nbs", repo / "nbs", ignore=shutil.ignore_patterns(".*", "images"))
    shutil.copy(ROOT / "settings.ini", repo)
    (repo / "mmkit").mkdir()
    shutil.copy(ROOT / "mmkit/__init__.py", repo / "mmkit")
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    done = subprocess.run([sys.executable, "-c", export], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh = {p.name: p.read_text() for p in (repo / "mmkit").glob("*.py")}
    here = {p.name: p.read_text() for p in (ROOT / "mmkit").glob("*.py")}
    assert here.keys() == fresh.keys(), (
        f"modules without a notebook, or not exported: {here.keys() ^ fresh.keys()}"
    )
    stale = [n for n in here if here[n] != fresh[n]]
    assert not stale, (
        f"{stale} differ from their notebooks: run nbdev_export (and never edit mmkit/*.py by hand)"
    )
