"""The wheel holds the shipped base and the course, and installs on its own; its command works;
every package imports alone and quietly.
"""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from code_metrics import PACKAGES, package_modules
from conftest import ROOT

SOURCES = ["settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in"]
SOURCES += ["README.md", "LICENSE", "constraints.txt"]
JUNK = shutil.ignore_patterns("__pycache__", ".*", "*.nb.py")
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
    "voila",
]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the source archive of a copy of the sources, so that no build folder is
    left in the clone and the archive is tested too.
    """
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    for name in ("mmkit", "nbs"):
        shutil.copytree(ROOT / name, sources / name, ignore=JUNK)
    build = [sys.executable, "-m", "build", "-q", "--no-isolation", "--outdir", out, sources]
    done = run(build)
    assert done.returncode == 0, done.stderr
    return next(out.glob("mmkit-*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    "The wheel as it is installed, in a folder of its own: modules, metadata and bin/mmkit."
    target = tmp_path_factory.mktemp("installed") / "site"
    done = run([*PIP, "install", "-q", "--no-deps", "--no-compile", "--target", target, wheel])
    assert done.returncode == 0, done.stderr
    return target


def call(site, *arguments, cwd, **environment):
    "The installed command, away from the clone."
    env = {**os.environ, "PYTHONPATH": str(site), **environment}
    command = [sys.executable, site / "bin/mmkit", *map(str, arguments)]
    return run(command, cwd=cwd, env=env, timeout=120)


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


@pytest.mark.parametrize("name", STACK)
def test_the_users_stack_is_plainly_required(wheel, name):
    "Without an extra; bitsandbytes alone has a marker, since it has no wheel for Intel Macs."
    lines = re.findall(rf"^Requires-Dist: {name}\b.*$", metadata(wheel), re.M)
    assert any("extra ==" not in line for line in lines), lines


def test_the_extra_is_named(wheel):
    text = metadata(wheel)
    assert "Provides-Extra: dev" in text
    assert "Requires-Python: " in text


def test_wheel_installs_and_imports_nothing_large(site, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(site)}
    code = "import mmkit, sys; print(mmkit.__file__); print(*sys.modules)"
    place, loaded = run([sys.executable, "-c", code], env=env, cwd=tmp_path).stdout.splitlines()
    assert place.startswith(str(site))
    assert not {"torch", "transformers", "numpy", "datasets"} & set(loaded.split())


def course_files(folder):
    "Names and contents of the notebooks and images below a folder."
    found = [*folder.rglob("*.ipynb"), *(folder / "images").glob("*")]
    kept = [path for path in found if ".ipynb_checkpoints" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def test_wheel_holds_the_notebooks(site):
    packaged, sources = course_files(site / "mmkit/notebooks"), course_files(ROOT / "nbs")
    assert packaged.keys() == sources.keys()
    assert packaged == sources
    assert not (ROOT / "mmkit/notebooks").exists(), "the sources hold the notebooks once, in nbs/"


def test_wheel_is_at_most_40_MB(wheel):
    assert wheel.stat().st_size <= 40e6


def test_command_says_what_it_does_and_imports_nothing_large(site, tmp_path):
    code = "from mmkit.cli import main; import sys; print(*sys.modules); main(['--help'])"
    done = run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": site})
    modules, text = done.stdout.split("\n", 1)
    assert not {"torch", "transformers", "numpy", "nbformat", "jupyterlab"} & set(modules.split())
    assert all(f"    {name} " in text for name in ("tour", "lab", "tuner"))
    for command in ("tour", "lab", "tuner"):
        helped = call(site, command, "--help", cwd=tmp_path)
        assert helped.returncode == 0
        assert f"usage: mmkit {command}" in helped.stdout


def test_command_and_module_know_their_version(site, tmp_path):
    import mmkit

    expected = f"mmkit {mmkit.__version__}\n"
    assert call(site, "--version", cwd=tmp_path).stdout == expected
    module = [sys.executable, "-m", "mmkit", "--version"]
    done = run(module, cwd=tmp_path, env={**os.environ, "PYTHONPATH": site})
    assert done.stdout == expected


def test_unknown_command_names_the_known_ones(site, tmp_path):
    done = call(site, "tuor", cwd=tmp_path)
    assert done.returncode == 2
    assert "tour" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def course(site, tmp_path_factory):
    "A course copied by the installed command, into a folder with a space and an umlaut."
    place = tmp_path_factory.mktemp("user")
    done = call(site, "lab", "Mein Kurs ü", "--copy-only", cwd=place, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    return place / "Mein Kurs ü"


def test_links_of_the_copied_course_resolve(course):
    assert course_files(course) == course_files(ROOT / "nbs")
    for path in course.rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        targets = re.findall(r"\]\(([^)#\s]+\.(?:ipynb|png|svg|webp))", text)
        targets += re.findall(r"<img[^>]+src=[\"']([^\"']+)", text)
        for target in targets:
            is_elsewhere = re.match(r"https?:|data:", target)
            assert is_elsewhere or (path.parent / target).exists(), f"{path.name}: {target}"


def test_nothing_that_the_user_changed_is_overwritten(site, course, tmp_path):
    mine = shutil.copytree(course, tmp_path / "mine")
    (mine / "course/01_lesions.ipynb").write_text("my answers", encoding="utf-8")
    (mine / "notes.ipynb").write_text("my notes", encoding="utf-8")
    (mine / "index.ipynb").unlink()
    done = call(site, "lab", mine, "--no-open", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 file written" in done.stdout
    assert "kept as you left them: course/01_lesions.ipynb" in done.stdout
    assert (mine / "course/01_lesions.ipynb").read_text(encoding="utf-8") == "my answers"
    assert (mine / "notes.ipynb").read_text(encoding="utf-8") == "my notes"
    assert (mine / "index.ipynb").exists()


@pytest.mark.parametrize("folder", ["file.txt", "file.txt/course", "/sys/mmkit-course"])
def test_a_folder_that_cannot_be_written_is_one_sentence(site, tmp_path, folder):
    if folder.startswith("/sys") and not Path("/sys").is_dir():
        pytest.skip("no /sys here, where nobody can make a folder")
    (tmp_path / "file.txt").write_text("not a folder")
    done = call(site, "lab", folder, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("mmkit lab: ") and done.stderr.count("\n") == 1, done.stderr
    assert Path(folder).name in done.stderr and "Errno" not in done.stderr


def test_tour_of_an_installed_package_writes_where_the_user_is(site, tmp_path):
    "The packaged index runs in the output folder, since site-packages may be read-only."
    installed = shutil.copytree(site, tmp_path / "site", ignore=shutil.ignore_patterns("assets"))
    index = installed / "mmkit/notebooks/index.ipynb"
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell("from pathlib import Path\nPath('left').write_text('x')")]
    nbformat.write(nb, index)
    before = sorted(installed.rglob("*"))
    done = call(installed, "tour", "--out", "o", cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert {"left", "tour.html", "tour.ipynb"} <= {path.name for path in (tmp_path / "o").iterdir()}
    assert sorted(installed.rglob("*")) == before


def test_container_names_what_is_there():
    "A dev container: its set-up is a target of the Makefile, and it opens a notebook that exists."
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    python = re.search(r"python:(?:\d-)?(\d+\.\d+)", container["image"])[1]
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = settings["DEFAULT"]["min_python"]
    assert [*map(int, python.split("."))] >= [*map(int, wanted.split("."))]
    target = re.fullmatch(r"make (\S+)", container["postCreateCommand"])[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for name in container["customizations"]["codespaces"]["openFiles"]:
        assert (ROOT / name).exists(), name
    serve = container["postAttachCommand"].split()
    assert serve[:2] == [".venv/bin/mmkit", "lab"]
    assert (ROOT / serve[2] / "index.ipynb").exists()
    assert int(serve[serve.index("--port") + 1]) in container["forwardPorts"]


def test_every_requirement_is_pinned():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}
    for key in ("requirements", "dev_requirements"):
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
