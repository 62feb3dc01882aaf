"""Fixtures for tests in a real browser: `tab` (Chromium, 1280×720), `lab` and `voila` (servers of
their own, always ended).

A test writes a notebook, opens it and runs it:

    url = lab.write('mine', ['import ipywidgets', …])        # cells -> a notebook in the server's
    folder; its address
    tab.goto(url); lab.run_all(tab); tab.wait_for_selector('.my-widget')

Where there is no Chromium or no JupyterLab the tests skip and say so; under CI they fail instead.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000 * float(
    os.environ.get("MMKIT_SLACK", 2)
)  # milliseconds that a page may take for anything
SHOTS = Path(__file__).parent.parent / "runs" / "screenshots"  # ignored by git: to be looked at


def missing(what):
    "Skip, and say so; under CI fail."
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no browser test: {what}")


# Not for the session: while Playwright runs, this process cannot start an asyncio loop of its own,
# as nbclient wants to.
@pytest.fixture(scope="module")
def browser():
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    ) or missing("there is no chromium here; apt-get install chromium brings one")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the playwright package is not installed; pip install mmkit[dev] brings it")
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=FLAGS)
        yield b
        b.close()


@contextlib.contextmanager
def watched_tab(browser, **kw):
    """A page that remembers what went wrong in it, `.troubles`, and reaches nothing but this
    machine.
    """
    context = browser.new_context(
        viewport=dict(width=1280, height=720), reduced_motion="reduce", **kw
    )
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    tab.troubles = []
    local = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:")

    def gate(route):
        if local.match(route.request.url):
            return route.continue_()
        if "fontawesome" in route.request.url:
            return route.fulfill(
                content_type="text/css", body=""
            )  # Voilà's own page asks a CDN for icons
        tab.troubles.append(f"asked for {route.request.url}")
        route.abort()

    context.route("**/*", gate)
    tab.on("pageerror", lambda e: tab.troubles.append(f"error: {e}"))
    tab.on(
        "console",
        lambda m: (
            tab.troubles.append(f"console: {m.text} ({m.location.get('url')})")
            if m.type == "error"
            else None
        ),
    )
    try:
        yield tab
    finally:
        context.close()


@pytest.fixture
def tab(browser):
    "A fresh page; the test fails if anything went wrong in it that it did not expect."
    with watched_tab(browser) as t:
        yield t
        assert not t.troubles, "\n".join(t.troubles)


def shoot(tab, name, **kw):
    "Keep a screenshot to look at."
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"{name}.png", animations="disabled", **kw)


# ---- servers


def _dies_with_us():
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # Linux: also when pytest itself is killed


class Server:
    """A Jupyter server in a folder of its own, with a home of its own; `with` ends it and every
    process that it started.
    """

    def __init__(self, folder, *command, ready, path):
        self.folder, self.home, self.path, self.log = (
            Path(folder) / "notebooks",
            Path(folder) / "home",
            path,
            Path(folder) / "server.log",
        )
        for d in (self.folder, self.home / "config" / "labconfig"):
            d.mkdir(parents=True)
        (self.home / "config" / "labconfig" / "page_config.json").write_text(
            '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}'
        )
        (self.home / "config" / "jupyter_server_config.json").write_text(
            '{"LanguageServerManager": {"autodetect": false}}'
        )
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.command, self.base, self.is_ready = (
            [sys.executable, "-m", *command],
            f"http://127.0.0.1:{self.port}",
            ready,
        )

    def __enter__(self):
        drop = ("JPY_", "JUPYTER", "VOILA", "SERVER_SOFTWARE", "MPLBACKEND")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | dict(
            HOME=str(self.home),
            JUPYTER_CONFIG_DIR=str(self.home / "config"),
            JUPYTER_DATA_DIR=str(self.home / "data"),
            JUPYTER_RUNTIME_DIR=str(self.home / "runtime"),
            IPYTHONDIR=str(self.home / "ipython"),
            PYTHONPATH=os.pathsep.join(
                [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
            ),
        )
        place = dict(port=self.port, folder=self.folder)
        self.process = subprocess.Popen(
            [c.format(**place) for c in self.command],
            env=env,
            cwd=self.folder,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_dies_with_us,
        )
        try:
            end = time.monotonic() + PATIENCE / 1000
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(self.base + self.is_ready, timeout=5).close()
                    return self
                assert self.process.poll() is None and time.monotonic() < end, (
                    f"{' '.join(self.command[2:3])} did not start:\n{self.log.read_text()[-2000:]}"
                )
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        with contextlib.suppress(psutil.NoSuchProcess):
            mine = [psutil.Process(self.process.pid)]
            mine += mine[0].children(recursive=True)
            self.process.terminate()
            psutil.wait_procs(mine, timeout=10)
            for p in mine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    p.kill()
        self.process.wait(30)

    def write(self, name: str, cells: list) -> str:  # the notebook's address
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in cells],
            metadata=dict(
                kernelspec=dict(name="python3", display_name="Python 3", language="python"),
                language_info=dict(name="python"),
            ),
        )
        nbformat.write(nb, self.folder / f"{name}.ipynb")
        return self.base + self.path.format(name=name)

    def run_all(self, tab):
        """Run the notebook that is open in JupyterLab; returns when every cell is done. (Voilà
        runs it by itself.)
        """
        tab.wait_for_selector(".jp-Notebook .jp-Cell")
        tab.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady")
        tab.evaluate(
            "async () => { const p = jupyterapp.shell.currentWidget; await p.context.ready; await"
            " p.sessionContext.ready; await jupyterapp.commands.execute('notebook:run-all-cells') }"
        )
        failed = tab.locator(
            '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"],'
            ' .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'
        )
        assert not failed.count(), failed.first.inner_text()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab server: no token, no news, no language servers, only this machine."
    with Server(
        tmp_path_factory.mktemp("lab"),
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.root_dir={folder}",
        "--IdentityProvider.token=mmkit",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ready="/api?token=mmkit",
        path="/lab/tree/{name}.ipynb?token=mmkit&reset",
    ) as server:
        yield server


@pytest.fixture(scope="session")
def voila(tmp_path_factory):
    "A Voilà server."
    with Server(
        tmp_path_factory.mktemp("voila"),
        "voila",
        "{folder}",
        "--no-browser",
        "--Voila.ip=127.0.0.1",
        "--port={port}",
        "--VoilaConfiguration.extension_denylist=jupyterlab-jupytext",
        ready="/",
        path="/voila/render/{name}.ipynb",
    ) as server:
        yield server
