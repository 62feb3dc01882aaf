"The wheel: holds the shipped base, installs on its own, costs next to nothing to import."

import configparser
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import ROOT

SOURCES = ["settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the sources, so that no build folder is left in the clone."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("wheel")
    for f in SOURCES:
        shutil.copy(ROOT / f, src)
    shutil.copytree(ROOT / "mmkit", src / "mmkit", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            out,
            src,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("mmkit-*.whl"))


def test_wheel_holds_modules_licence_and_base(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"mmkit/{p.name}" for p in (ROOT / "mmkit").glob("*.py")}
    assets = {str(p.relative_to(ROOT)) for p in (ROOT / "mmkit/assets").rglob("*") if p.is_file()}
    assert modules <= inside, f"not in the wheel: {modules - inside}"
    assert {
        f"mmkit/assets/base/{f}" for f in ("config.json", "model.safetensors", "tokenizer.json")
    } <= assets, "no shipped base in mmkit/assets/base"
    assert assets <= inside, f"not in the wheel: {assets - inside}"
    assert any("LICENSE" in n for n in inside)


def test_base_is_at_most_12_MB():
    size = sum(p.stat().st_size for p in (ROOT / "mmkit/assets/base").rglob("*") if p.is_file())
    assert 0 < size <= 12e6, f"mmkit/assets/base has {size / 1e6:.1f} MB"


def test_requirements_are_named(wheel):
    z = zipfile.ZipFile(wheel)
    meta = z.read(next(n for n in z.namelist() if n.endswith("/METADATA"))).decode()
    for r in ("torch", "transformers", "peft", "datasets", "scikit-learn", "nbclient"):
        assert f"Requires-Dist: {r}>" in meta
    assert (
        "Provides-Extra: lab" in meta
        and "Provides-Extra: dev" in meta
        and "Requires-Python: " in meta
    )


@pytest.mark.alone
def test_installs_and_imports_lightly(wheel, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            tmp_path / "t",
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "t")}

    def seconds(code):
        def once():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)
            return time.perf_counter() - began

        return min(once() for _ in range(7))

    where = subprocess.run(
        [sys.executable, "-c", "import mmkit; print(mmkit.__file__, mmkit.__version__)"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert str(tmp_path / "t") in where.stdout, where
    cost = seconds("import mmkit") - seconds("pass")
    assert cost <= 0.1, f"import mmkit costs {cost:.2f} s over bare Python"
    heavy = 'import mmkit, sys; print([m for m in ("torch", "transformers", "numpy", "datasets") if m in sys.modules])'
    assert (
        subprocess.run(
            [sys.executable, "-c", heavy], env=env, cwd=tmp_path, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


def test_every_requirement_is_pinned():
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini")
    pins = {
        l.split("==")[0] for l in (ROOT / "constraints.txt").read_text().splitlines() if "==" in l
    }
    for key in ("requirements", "lab_requirements", "dev_requirements"):
        names = {re.split(r"[<>=]", r)[0].lower() for r in cfg["DEFAULT"][key].split()}
        assert names - pins <= {"setuptools", "wheel"}, (
            f"{key} without a pin in constraints.txt: {names - pins}"
        )


def test_pins_agree_with_what_is_installed():
    from importlib.metadata import version

    if sys.version_info[:2] != (3, 11):
        pytest.skip("constraints.txt was taken from Python 3.11")
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        for name in ("torch", "transformers", "peft", "datasets", "numpy", "nbdev"):
            if line.startswith(f"{name}==") and "<" not in line:
                assert version(name).split("+")[0] == line.split("==")[1].split(";")[0].strip()


def test_versions_agree():
    import mmkit

    assert f"version = {mmkit.__version__}\n" in (ROOT / "settings.ini").read_text()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_says_when_python_is_too_old(tmp_path):
    for f in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / f, tmp_path)
    done = subprocess.run(["make", "tour", "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode
        and "Python 3.10 or newer" in done.stdout
        and not (tmp_path / ".venv").exists()
    )


def test_modules_are_python_3_10():
    import ast

    for p in (ROOT / "mmkit").glob("*.py"):
        ast.parse(p.read_text(encoding="utf-8"), p.name, feature_version=(3, 10))


MODULES = sorted(p.stem for p in (ROOT / "mmkit").glob("*.py") if p.stem[0] != "_")
WATCH = """
import logging, os, sys
from importlib.abc import MetaPathFinder
import datasets, ipywidgets, matplotlib.pyplot, scipy.stats, sklearn.linear_model, torch       # what has nothing to do with it, once; then a child for each module
class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'bitsandbytes': print('bitsandbytes', logging.getLogger('bitsandbytes.backends.cpu.ops').level, flush=True)
assert not {'mmkit', 'transformers', 'bitsandbytes', 'peft'} & set(sys.modules)
sys.meta_path.insert(0, Watch())
for module in sys.argv[1:]:
    if not os.fork():
        for k, name in ((1, 'out'), (2, 'err')): os.dup2(os.open(f'{module}.{name}', os.O_WRONLY | os.O_CREAT), k)
        try: __import__(f'mmkit.{module}'); code = 0
        except BaseException as e: print(repr(e), file=sys.stderr); code = 1
        sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    open(f'{module}.code', 'w').write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imports")
    subprocess.run(
        [sys.executable, "-c", WATCH, *MODULES],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONWARNINGS": "default",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_alone_and_quietly(module, imported):
    "Whoever imports bitsandbytes (Trainer does) has asked it first not to tell of a kernel that only some processors could use; so this fails on every machine, not only on those."
    out, err, code = ((imported / f"{module}.{k}").read_text() for k in ("out", "err", "code"))
    assert code == "0" and not [
        l for l in err.splitlines() if "Failed to load" in l or "mmkit" in l
    ], err
    assert out in ("", "bitsandbytes 40\n"), (
        f"bitsandbytes was imported before its messages were silenced: {out}"
    )
