"The snippets of README and EXAMPLES run as they stand, with fewer pairs and steps."

import os
import re
import subprocess
import sys

from conftest import CHAPTERS, ROOT

from mmkit.planner import plan_training

SMALLER = [
    ("n=1000", "n=240, size=48"),
    ("max_steps=300", "max_steps=2"),
    (".step(30)", ".step(2)"),
    ("TunerState()", "TunerState(num_records=24)"),
]


def test_package_snippets_run(tmp_path):
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "EXAMPLES.md")]
    text = "\n".join(pages)
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 4
    code = "\n".join(snippets)
    for long, short in SMALLER:
        assert long in code, f"no snippet says {long}"
        code = code.replace(long, short)
    (tmp_path / "snippets.py").write_text(code, encoding="utf-8")
    env = {**os.environ, "MMKIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "snippets.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "projector" in done.stdout


def test_readme_is_short_and_begins_with_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines[0].startswith("![")


def test_readme_links_every_chapter():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in CHAPTERS if f"({path.relative_to(ROOT)})" not in text]
    assert not missing


def test_readme_names_the_pinned_torch():
    "The plain commands install the same torch as make does."
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.M)[0]
    assert pin in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_says_what_the_planner_says():
    "The costs elsewhere, from the very call that README names."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    call = re.search(r"planner\.(plan_training\(.*?\))`", text, re.S)[1]
    plan = eval(call, {"plan_training": plan_training})
    assert plan.fits()
    assert f"{plan.memory['weights'] / 1e9:.1f} GB of weights" in text
    assert f"{plan.peak / 1e9:.0f} GB on one GPU" in text
    assert "an hour on an A100" in text and 0.75 <= plan.hours <= 1.25


def test_readme_pictures_are_small():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 2
    assert all((ROOT / name).stat().st_size <= 2e6 for name in pictures)
