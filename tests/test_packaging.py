"The wheel holds the shipped base and installs on its own; every package imports alone and quietly."

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest
from code_metrics import PACKAGES, package_modules
from conftest import ROOT

SOURCES = ["settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
PIP = [sys.executable, "-m", "pip"]
STACK = [
    "bitsandbytes",
    "datasets",
    "ipywidgets",
    "jupyterlab",
    "matplotlib",
    "nbdev",
    "peft",
    "torch",
    "transformers",
]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the sources, so that no build folder is left in the clone."
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "mmkit", sources / "mmkit", ignore=shutil.ignore_patterns("__pycache__"))
    done = run([*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, sources])
    assert done.returncode == 0, done.stderr
    return next(out.glob("mmkit-*.whl"))


def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
    return archive.read(name).decode()


def test_wheel_holds_modules_licence_and_base(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in package_modules().values()}
    files = (path for path in (ROOT / "mmkit/assets").rglob("*") if path.is_file())
    assets = {str(path.relative_to(ROOT)) for path in files}
    base = {
        f"mmkit/assets/base/{n}" for n in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert base <= assets, "no shipped base in mmkit/assets/base"
    missing = (modules | assets) - inside
    assert not missing, f"not in the wheel: {missing}"
    assert any("LICENSE" in name for name in inside)


def test_base_is_at_most_12_MB():
    files = (path for path in (ROOT / "mmkit/assets/base").rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    assert 0 < size <= 12e6, f"mmkit/assets/base has {size / 1e6:.1f} MB"


@pytest.mark.parametrize("name", STACK)
def test_the_users_stack_is_plainly_required(wheel, name):
    "Without an extra; bitsandbytes alone has a marker, since it has no wheel for Intel Macs."
    lines = re.findall(rf"^Requires-Dist: {name}\b.*$", metadata(wheel), re.M)
    assert any("extra ==" not in line for line in lines), lines


def test_extras_are_named(wheel):
    text = metadata(wheel)
    assert "Provides-Extra: lab" in text
    assert "Provides-Extra: dev" in text
    assert "Requires-Python: " in text


def test_wheel_installs_and_imports_nothing_large(wheel, tmp_path):
    target = tmp_path / "site"
    done = run([*PIP, "install", "-q", "--no-deps", "--target", target, wheel])
    assert done.returncode == 0, done.stderr
    env = {**os.environ, "PYTHONPATH": str(target)}
    code = "import mmkit, sys; print(mmkit.__file__); print(*sys.modules)"
    place, loaded = run([sys.executable, "-c", code], env=env, cwd=tmp_path).stdout.splitlines()
    assert place.startswith(str(target))
    assert not {"torch", "transformers", "numpy", "datasets"} & set(loaded.split())


def test_every_requirement_is_pinned():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}
    for key in ("requirements", "lab_requirements", "dev_requirements"):
        names = {re.split(r"[<>=;]", r)[0].lower() for r in settings["DEFAULT"][key].split()}
        unpinned = names - pins - {"setuptools", "wheel"}
        assert not unpinned, f"{key} without a pin in constraints.txt: {unpinned}"


def test_pins_agree_with_what_is_installed():
    if sys.version_info[:2] != (3, 11):
        pytest.skip("constraints.txt was taken from Python 3.11")
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        for name in ("torch", "transformers", "peft", "datasets", "numpy", "nbdev", "ruff"):
            if line.startswith(f"{name}==") and "<" not in line:
                assert version(name).split("+")[0] == line.split("==")[1].split(";")[0].strip()


def test_versions_agree():
    import mmkit

    assert f"version = {mmkit.__version__}\n" in (ROOT / "settings.ini").read_text()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_says_when_python_is_too_old(tmp_path):
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = run(["make", "tour", "PYTHON="], cwd=tmp_path)
    assert done.returncode
    assert "Python 3.10 or newer" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_modules_are_python_3_10():
    for path in package_modules().values():
        ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, 10))


WATCH = """
import logging, os, pkgutil, sys
from importlib import import_module
from importlib.abc import MetaPathFinder

# Large libraries that have nothing to do with it, once; then a child for each package.
import datasets, ipywidgets, matplotlib.pyplot, scipy.stats, sklearn.linear_model, torch


class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes":
            level = logging.getLogger("bitsandbytes.backends.cpu.ops").level
            print("bitsandbytes", level, flush=True)


assert not {"mmkit", "transformers", "bitsandbytes", "peft"} & set(sys.modules)
sys.meta_path.insert(0, Watch())
for package in sys.argv[1:]:
    if not os.fork():
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{package}.{name}", os.O_WRONLY | os.O_CREAT), number)
        try:
            module = import_module(f"mmkit.{package}")
            for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
                import_module(f"mmkit.{package}.{found.name}")
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    open(f"{package}.code", "w").write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imports")
    env = {
        **os.environ,
        "PYTHONWARNINGS": "default",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = run([sys.executable, "-c", WATCH, *PACKAGES], cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-1000:]
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_imports_alone_and_quietly(package, imported):
    """bitsandbytes has been asked not to mention a kernel that only some processors could use.

    transformers' Trainer imports it. Asking first makes this fail on every machine, not on some.
    """
    out, err, code = (
        (imported / f"{package}.{suffix}").read_text() for suffix in ("out", "err", "code")
    )
    complaints = [line for line in err.splitlines() if "Failed to load" in line or "mmkit" in line]
    assert code == "0" and not complaints, err
    assert out in ("", "bitsandbytes 40\n"), f"bitsandbytes was imported too early: {out}"
