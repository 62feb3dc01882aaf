"README's snippets run as they stand, with fewer pairs and steps."

import os
import re
import subprocess
import sys

from conftest import ROOT

SMALLER = [
    ("n=1000", "n=240, size=48"),
    ("max_steps=300", "max_steps=2"),
    (".step(30)", ".step(2)"),
    ("TunerState()", "TunerState(num_records=24)"),
]


def test_package_snippets_run(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 4
    code = "\n".join(snippets)
    for long, short in SMALLER:
        assert long in code, f"README no longer says {long}"
        code = code.replace(long, short)
    (tmp_path / "snippets.py").write_text(code, encoding="utf-8")
    env = {**os.environ, "MMKIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "snippets.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "projector" in done.stdout
