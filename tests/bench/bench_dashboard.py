"""The live tuner with its widget shown in JupyterLab, in Chromium, against the same run with no
screen: steps a second, pictures a second, seconds between captions.

In one kernel, in turn: the run alone (nobody looks at it), in its thread with looks and no
screen, shown; the ratio is of the best of each.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROUNDS, SECONDS = 3, 12
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from browser import FLAGS, Server, watched_tab  # noqa: E402

LAB = (
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
)
SETUP = """
import time
from mmkit.tuner import Dashboard, Runner
def steps(r, seconds, warm=3.):
    "Steps a second once it is warm."
    r.start(); end = time.monotonic() + 60
    while r.status()['step'] < 5 and time.monotonic() < end: time.sleep(.05)
    time.sleep(warm)
    a, at = r.state.steps, time.perf_counter()
    time.sleep(seconds)
    return (r.state.steps - a)/(time.perf_counter() - at)
def plain(seconds):
    "The run alone: no thread, nobody looks."
    from mmkit.tuner import TunerState
    s = TunerState().step(5); a, at = s.steps, time.perf_counter()
    while time.perf_counter() - at < seconds: s.step()
    return (s.steps - a)/(time.perf_counter() - at)
def headless(seconds):
    r = Runner()
    try: return steps(r, seconds)
    finally: r.stop()
"""


def kernel(tab, code):
    return tab.evaluate(
        """async code => { const k = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          let out = ''
        const f = k.requestExecute({code, store_history: false}); f.onIOPub = m => {
          if (m.header.msg_type === 'stream') out += m.content.text;
          if (m.header.msg_type === 'error') out += m.content.ename + m.content.evalue }
        await f.done; return out.trim() }""",
        code,
    )


WATCH = """seconds => new Promise(done => { const e = document.querySelector('.mmkit-dash'),
  first = e.pictures, at = performance.now(), captions = []; let step = null
    const timer = setInterval(() => { const c = e.told().captions; if (c && c.step !== step) {
      step = c.step; captions.push(performance.now()) } }, 20)
    setTimeout(() => { clearInterval(timer);
      done([(e.pictures - first)/(performance.now() - at)*1000, captions.slice(1).map((t,
      i) => (t - captions[i])/1000)]) }, 1000*seconds) })"""


def main():
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not path:
        print("  no chromium here; apt-get install chromium brings one")
        return
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as folder,
        Server(
            Path(folder) / "lab",
            *LAB,
            ready="/api?token=mmkit",
            path="/lab/tree/{name}.ipynb?token=mmkit&reset",
        ) as lab,
        sync_playwright() as p,
    ):
        b = p.chromium.launch(executable_path=path, args=FLAGS)
        with watched_tab(b) as tab:
            tab.goto(lab.write("bench", [SETUP, "d = Dashboard(); d"]))
            lab.run_all(tab)
            tab.wait_for_selector(".mmkit-dash [data-panel=ce] canvas")
            got = dict(plain=[], headless=[], shown=[], pictures=[], captions=[])
            for _k in range(ROUNDS):
                kernel(tab, "d.close()")
                got["plain"].append(float(kernel(tab, f"print(plain({SECONDS}))")))
                got["headless"].append(float(kernel(tab, f"print(headless({SECONDS}))")))
                lab.run_all(tab)
                tab.wait_for_function(
                    "() => document.querySelector('.mmkit-dash')?.told().phase == 'ready'"
                )
                tab.locator(".mmkit-dash").scroll_into_view_if_needed()
                tab.locator(".mm-go").click()
                tab.wait_for_function(
                    "() => document.querySelector('.mmkit-dash').told().step >= 5"
                )
                tab.wait_for_timeout(3000)
                a, at = int(kernel(tab, "print(d.runner.state.steps)")), time.perf_counter()
                pictures, captions = tab.evaluate(WATCH, SECONDS)
                got["shown"].append(
                    (int(kernel(tab, "print(d.runner.state.steps)")) - a)
                    / (time.perf_counter() - at)
                )
                got["pictures"].append(pictures)
                got["captions"] += captions
            assert not tab.troubles, tab.troubles
        b.close()
    h, s = max(got["headless"]), max(got["shown"])
    ratios = [y / x for x, y in zip(got["headless"], got["shown"])]

    def each(v):
        return ", ".join(f"{x:.1f}" for x in v)

    print(
        f"  shown     {s / h:5.2f}×  of the headless run's steps/s (best of {ROUNDS} rounds in"
        f" turn: {s:.1f} of {h:.1f}; rounds {', '.join(f'{r:.2f}' for r in ratios)}; default size,"
        " Chromium and JupyterLab on the same cores; wanted: 0.85×, and 8 steps/s)"
    )
    print(
        f"  alone     {s / max(got['plain']):5.2f}×  of the run that nobody looks at"
        f" ({max(got['plain']):.1f} steps/s; rounds"
        f" {', '.join(f'{y / x:.2f}' for x, y in zip(got['plain'], got['shown']))})"
    )
    print(
        f"  pictures  {statistics.median(got['pictures']):5.1f}   a second while it trains (rounds"
        f" {each(got['pictures'])}; wanted: 3)"
    )
    if got["captions"]:
        print(
            f"  captions  {statistics.median(got['captions']):5.1f} s between two, at most"
            f" {max(got['captions']):.1f} s ({len(got['captions'])} seen; wanted: 3 s)"
        )


if __name__ == "__main__":
    main()
