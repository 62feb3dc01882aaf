"Where things are, for every test; nothing here reaches the network."

import os
from pathlib import Path

import pytest

pytest_plugins = ["browser"]  # `tab`, `lab`, `voila`: see browser.py

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).parent.parent
COURSE = sorted((ROOT / "nbs/course").glob("*.ipynb"))
LIBRARY = sorted((ROOT / "nbs/library").rglob("*.ipynb"))
CHAPTERS = [ROOT / "nbs/index.ipynb", *COURSE]  # the longest first: two run at a time
NOTEBOOKS = [*CHAPTERS, *LIBRARY]
PARAMETERS = {"notebook": NOTEBOOKS, "chapter": CHAPTERS, "library_notebook": LIBRARY}


def pytest_generate_tests(metafunc):
    "A test that asks for `notebook`, `chapter` or `library_notebook` runs once for each of them."
    for name, paths in PARAMETERS.items():
        if name in metafunc.fixturenames:
            ids = [str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in paths]
            metafunc.parametrize(name, paths, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A test in a browser runs alone; the longest files come first, since two run at a time."
    items.sort(key=lambda item: item.path.stem not in ("test_training", "test_base"))
    for item in items:
        if {"browser", "lab", "voila"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("alone")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "What a module's tests keep, they keep in a folder of their own."
    old, os.environ["MMKIT_CACHE"] = (
        os.environ.get("MMKIT_CACHE"),
        str(tmp_path_factory.mktemp("cache")),
    )
    yield os.environ["MMKIT_CACHE"]
    if old is None:
        del os.environ["MMKIT_CACHE"]
    else:
        os.environ["MMKIT_CACHE"] = old
