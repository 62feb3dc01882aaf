"""The dashboard in a real Chromium: in JupyterLab and in Voilà, by mouse and by keyboard, with the
real tuner behind it; and a monkey.
"""

import contextlib
import json
import os
import random
import re

import pytest
from browser import shoot, watched_tab
from conftest import ROOT

from mmkit import tuner

CELLS = [
    (
        "import torch; torch.set_num_threads(1)\nfrom mmkit.tuner import Dashboard\nd ="
        " Dashboard(initial_steps=0, batch_size=4)\nd"
    ),
    "d.runner.alive",
]
ACTS = int(os.environ.get("MMKIT_MONKEY", 300))


class Face:
    "A dashboard on a page: its parts, and what it was told."

    def __init__(self, tab):
        self.tab, self.root = tab, tab.locator(".mmkit-dash").first

    def do(self, act):
        return self.root.locator(f'[data-do="{act}"]').first

    def hparam(self, name):
        return self.root.locator(f'[data-hparam="{name}"]').first

    def told(self):
        return self.root.evaluate("e => ({...e.told(), runs: e.everyRun()})")

    def run(self):
        t = self.told()
        return t["runs"][t["active"]]

    def until(self, what, arg=None, timeout=None):  # what: JavaScript of t (told) and a (arg)
        self.tab.wait_for_function(
            'a => { const e = document.querySelector(".mmkit-dash"), t = e?.told(); return t &&'
            f" ({what}) }}",
            arg=arg,
            timeout=timeout,
        )
        return self.told()

    def step(self):
        return self.told()["step"]

    def trains(self, n=2):
        at = self.step()
        return self.until("t.step >= a", at + n)

    def start(self):
        if self.told()["phase"] != "running":
            self.do("start").click()
        return self.until('t.phase == "running"')

    def pause(self):
        if self.told()["phase"] == "running":
            self.do("pause").click()
        return self.until('t.phase != "running"')

    def drawn(self):
        return self.root.evaluate(
            """e => Object.fromEntries(
        [...e.querySelectorAll('figure canvas')].filter(c => c.clientWidth).map(c => [
        c.closest('figure').dataset.panel,
        new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width,
          c.height).data.buffer)).size]))"""
        )


def kernel(tab, code):
    "What a line of Python prints, in the kernel of the notebook that JupyterLab shows."
    return tab.evaluate(
        """async code => { const k = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          let out = ''
        const f = k.requestExecute({code, store_history: false}); f.onIOPub = m => {
          if (m.header.msg_type === 'stream') out += m.content.text;
          if (m.header.msg_type === 'error') out += m.content.ename + m.content.evalue }
        await f.done; return out.trim() }""",
        code,
    )


THREADS = "import threading; print(sum('tuner' in t.name for t in threading.enumerate()))"


@pytest.fixture(scope="module")
def page(browser, lab):
    "The notebook, run in JupyterLab; the tests follow one another on one dashboard."
    with watched_tab(browser) as tab:
        tab.goto(lab.write("dashboard", CELLS))
        lab.run_all(tab)
        tab.wait_for_selector(".mmkit-dash [data-panel=ce] canvas")
        Face(tab).until('t.phase == "ready"')
        yield tab
        assert not tab.troubles, "\n".join(tab.troubles)


def test_opens_and_fits(page):
    f = Face(page)
    f.root.scroll_into_view_if_needed()
    box = f.root.bounding_box()
    shoot(page, "dashboard_lab_open")
    assert box["height"] < 600 and box["width"] < 900, (
        box
    )  # JupyterLab's own frame leaves so much of 1280×720
    assert f.root.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    for c in f.root.locator("input, select, textarea").all():
        assert c.evaluate('e => e.labels?.length == 1 || Boolean(e.getAttribute("aria-label"))'), (
            c.evaluate("e => e.outerHTML")
        )
    assert (
        f.root.locator("[data-hparam]").count() == 18 + 2
        and f.root.locator("[data-panel] canvas").count() >= 11
    )
    for c in f.root.locator("figure canvas").all():
        assert c.get_attribute("aria-label")
    assert (
        f.root.locator("[data-panel=lesion0]").count()
        and not f.root.locator(".mm-notice").is_visible()
    )
    assert (
        len(page.locator(".jp-OutputArea-output").all()) == 2
        and not page.locator(".jp-OutputArea-output img").count()
    ), "the still beside the widget"


def test_start_trains_and_the_pictures_follow(page):
    f = Face(page)
    before = f.drawn()
    f.start()
    f.until("t.step >= 8 && t.captions && t.similarity")
    pictures = f.root.evaluate("e => e.pictures")
    f.trains(4)
    assert f.root.evaluate("e => e.pictures") > pictures
    after = f.drawn()
    assert (
        all(after[p] > before[p] for p in ("contrastive", "ce", "mse", "sum", "shares"))
        and after["similarity"] > 50
    ), (before, after)
    assert (
        re.fullmatch(r"step \d+", f.root.locator(".mm-count").first.inner_text())
        and f.root.locator(".mm-state").inner_text() == "running"
    )
    assert f.root.locator(
        '.mm-caption [data-ok="true"], .mm-caption [data-ok="false"]'
    ).count() and "cross-entropy: from" in f.root.locator("[data-panel=ce] canvas").get_attribute(
        "aria-label"
    )


def test_a_dragged_slider_is_felt_at_the_next_step(page):
    f = Face(page)
    box = f.hparam("ce").bounding_box()
    before = f.told()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, y, steps=4)
    page.mouse.move(box["x"] + box["width"] * 0.9, y, steps=4)
    page.mouse.up()
    # The last of the values that the slider took on its way: the runner may see several of them.
    ce = float(f.hparam("ce").evaluate("e => e.value"))
    assert ce > 0.8
    f.until("t.hparams.ce == a && t.runs[t.active].marks.length > 0", ce)
    mark = f.run()["marks"][-1]
    assert before["step"] <= mark["step"] and mark["says"].startswith("ce"), mark
    f.until("t.step >= a", mark["step"] + 3)
    r = f.run()
    after = [
        (w / v, s)
        for s, v, w in zip(r["step"], r["raw"]["ce"], r["weighted"]["ce"])
        if s > mark["step"] and v
    ]
    assert after[0][0] == pytest.approx(ce, rel=0.02), "not at the first step after it"
    assert (
        f.hparam("ce").evaluate('e => e.labels[0].querySelector("output").textContent')
        == f"{ce:.3g}"
    )


def test_linked_weights_move_together(page):
    f = Face(page)
    f.hparam("weights_sum_to_one").check()
    f.until("t.hparams.weights_sum_to_one")
    f.hparam("contrastive").fill("0.2")
    k = f.until("Math.abs(t.hparams.contrastive - .2) < 1e-6")["hparams"]
    assert k["contrastive"] + k["ce"] + k["mse"] == pytest.approx(1)
    page.wait_for_timeout(900)
    assert float(f.hparam("ce").input_value()) == pytest.approx(k["ce"], abs=0.026)
    f.hparam("weights_sum_to_one").uncheck()
    f.until("!t.hparams.weights_sum_to_one")


def test_pause_and_single_steps(page):
    f = Face(page)
    f.pause()
    at = f.step()
    page.wait_for_timeout(400)
    assert f.step() == at and f.told()["phase"] == "paused"
    f.do("step").click()
    f.until('t.step == a && t.phase == "paused"', at + 1)


def test_by_keyboard_alone(page):
    f = Face(page)

    def cells():
        return page.evaluate(
            "jupyterapp.shell.currentWidget.content.widgets.map(w => w.model.type + w.model.id)"
        )

    before = cells()
    f.do("start").focus()
    page.keyboard.press("Space")
    f.until('t.phase == "running"')
    page.keyboard.press("Enter")
    f.until('t.phase == "paused"')
    f.hparam("temperature").focus()
    at = f.told()["hparams"]["temperature"]
    page.keyboard.press("ArrowRight")
    f.until("t.hparams.temperature > a", at)
    page.keyboard.press("ArrowLeft")
    assert "cosines" in f.root.locator(".mm-hint").inner_text()
    for place in (
        f.hparam("temperature"),
        f.do("start"),
        f.root.locator("[role=tab]").first,
        f.root.locator("[data-w]").first,
        f.root.locator("summary").first,
    ):
        place.focus()
        for key in "bmdd":
            page.keyboard.press(key)  # JupyterLab's own keys: a cell below, to Markdown, delete
    assert cells() == before and f.root.is_visible()
    ring = page.evaluate(
        "() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle,"
        " parseFloat(s.outlineWidth)] }"
    )
    assert ring[0] == "solid" and ring[1] >= 2
    f.root.locator("[role=tab]").first.focus()
    page.keyboard.press("ArrowRight")
    assert f.root.locator("[role=tabpanel][data-view=sweep]").is_visible()
    page.keyboard.press("Home")
    assert f.root.locator("[data-panel=ce]").is_visible()
    seen = set()
    f.do("start").focus()
    for _ in range(60):
        seen.add(
            page.evaluate(
                "document.activeElement.dataset.do || document.activeElement.dataset.hparam ||"
                ' document.activeElement.getAttribute("role")'
            )
        )
        page.keyboard.press("Tab")
    assert {
        "start",
        "reset",
        "fork",
        "replay",
        "preset",
        "ce",
        "temperature",
        "learn_temperature",
        "batch_size",
        "tab",
        "switch",
        "option",
    } <= seen, seen


def test_a_word_shows_where_it_looked(page):
    f = Face(page)
    f.root.locator(".mm-caption").nth(1).locator('[data-w="2"]').click()
    t = f.until("t.attention && t.attention.lesion == 1")
    a = t["attention"]
    assert len(a["values"]) == a["h"] * a["w"]
    page.wait_for_function(
        "() => document.querySelector('[data-panel=lesion1]"
        " canvas').getAttribute('aria-label').includes('looked')"
    )
    page.keyboard.press("ArrowRight")
    f.until("t.attention.word == 3")
    assert (
        f.root.locator("[data-panel=lesion1] [aria-selected=true]").get_attribute("data-w") == "3"
    )


def test_fork_compare_switch_drop(page):
    f = Face(page)
    f.pause()
    at = f.step()
    f.do("fork").click()
    f.until('t.active == "B"')
    f.hparam("temperature").fill("120")
    f.start()
    f.trains(3)
    f.pause()
    runs = f.told()["runs"]
    assert (
        runs["A"]["steps"] == at
        and runs["B"]["parent"] == ["A", at]
        and runs["B"]["steps"] >= at + 3
    )
    assert (
        f.root.locator("[data-run]").count() == 2
        and f.root.locator("[data-run=B]").get_attribute("aria-pressed") == "true"
    )
    dashes = f.root.locator("[data-run] path").evaluate_all(
        'l => l.map(p => [p.getAttribute("stroke"), p.getAttribute("stroke-dasharray")])'
    )
    assert dashes[0][0] != dashes[1][0] and dashes[0][1] != dashes[1][1]
    page.mouse.move(5, 5)
    shoot(page, "dashboard_lab_compare")
    f.root.locator("[data-run=A]").click()
    f.until('t.active == "A"')
    f.root.locator("[data-drop=B]").click()
    f.until('e.querySelectorAll("[data-run]").length == 1')


def test_snapshot_and_back(page):
    f = Face(page)
    at = f.step()
    f.do("snapshot").click()
    n = f.until("t.snapshots.some(s => s.step == a)", at)
    name = next(s["name"] for s in n["snapshots"][::-1] if s["step"] == at)
    f.start()
    f.trains(2)
    f.pause()
    f.root.locator("select[data-do=restore]").select_option(name)
    f.until("t.step == a", at)


def test_replay_gives_the_same_bits(page):
    f = Face(page)
    f.do("replay").click()
    t = f.until("t.replay")
    assert t["replay"]["same"], t["replay"]
    page.wait_for_function(
        "() => document.querySelector('.mm-notice').textContent.includes('Replay')"
    )
    f.do("step").click()
    page.wait_for_function("() => document.querySelector('.mm-notice').hidden")


def test_presets_and_the_tour(page):
    f = Face(page)
    tour = f.root.locator(".mm-tour")
    assert tour.is_visible()
    f.root.locator('[data-guess="1"]').click()
    page.wait_for_function(
        "() => document.querySelector('[data-guess=\"1\"]').getAttribute('aria-pressed') == 'true'"
    )
    f.root.locator("select[data-do=preset]").select_option("MSE only")
    k = f.until("t.hparams.mse == 1")["hparams"]
    assert k["ce"] == k["contrastive"] == 0
    page.wait_for_function(
        "text => document.querySelector('.mm-sentence').textContent == text",
        arg=tuner.PRESETS["MSE only"].description,
    )
    f.start()
    f.root.locator(".mm-found").wait_for()
    assert "chance" in tour.inner_text() and "predicted" in tour.inner_text()
    shoot(page, "dashboard_lab_tour")
    f.pause()
    assert f.root.locator("[data-panel=ce] .mm-value").first.inner_text() == "off"
    f.do("next").click()
    page.wait_for_function("() => document.querySelector('.mm-says').textContent.startsWith('2.')")
    f.do("close-tour").click()
    tour.wait_for(state="hidden")
    f.do("reset").click()
    f.until("t.step == 0")


def test_seed_and_rank_wait_for_a_reset(page):
    f = Face(page)
    f.root.locator("[data-group=start] summary").click()
    f.hparam("seed").fill("5")
    page.wait_for_function(
        "() => document.querySelector('[data-do=reset]').dataset.staged == 'true'"
    )
    assert f.told()["hparams"]["seed"] == 0
    f.do("reset").click()
    f.until("t.hparams.seed == 5")
    page.wait_for_function(
        "() => document.querySelector('[data-do=reset]').dataset.staged == 'false'"
    )
    f.root.locator("[data-group=start] summary").click()


def test_exports(page):
    f = Face(page)
    f.start()
    f.trains(2)
    f.pause()
    f.root.locator("[role=tab][data-view=export]").click()
    text = f.root.locator("textarea")
    for kind, has in (
        ("json", '"steps"'),
        ("script", "import"),
        ("cell", "tuner"),
        ("fit", "fit("),
    ):
        f.root.locator(f"[data-kind={kind}]").click()
        page.wait_for_function(
            "has => document.querySelector('.mmkit-dash textarea').value.includes(has)", arg=has
        )
        if kind == "json":
            assert json.loads(text.input_value())["steps"] == f.step()
        else:
            compile(text.input_value(), kind, "exec")
    with page.expect_download() as d:
        f.root.locator("[data-do=download]").click()
    assert d.value.suggested_filename == "tuner_fit.py"
    shoot(page, "dashboard_lab_export")
    f.root.locator("[role=tab][data-view=live]").click()


def test_sweep_or_its_absence(page):
    f = Face(page)
    f.root.locator("[role=tab][data-view=sweep]").click()
    view = f.root.locator("[role=tabpanel][data-view=sweep]")
    if (ROOT / "mmkit/assets/sweep.json").exists():
        for m in ("r1", "image_gain", "macro_f1"):
            view.locator(f"[data-measure={m}]").check()
            page.wait_for_function(
                "() => document.querySelector('.mm-readout').textContent.includes('nearest')"
            )
        first = view.locator(".mm-readout").inner_text()
        view.locator("canvas").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "t => document.querySelector('.mm-readout').innerText != t", arg=first
        )
        page.wait_for_timeout(100)
        shoot(page, "dashboard_lab_sweep")
    else:
        assert "No sweep is recorded" in view.inner_text()
    f.root.locator("[role=tab][data-view=live]").click()


def test_python_turns_the_page_and_a_refusal_is_said(page):
    f = Face(page)
    kernel(page, "d.runner.set(batch_size=6)")
    f.until("t.hparams.batch_size == 6")
    page.wait_for_function("() => document.querySelector('[data-hparam=batch_size]').value == '6'")
    parts = f.root.locator("[data-hparam=train]")
    for p in parts.all():
        if p.is_checked():
            p.click()  # not uncheck(): the last one is refused, and may be checked again at once
    page.wait_for_function(
        "() => document.querySelector('.mm-notice').textContent.includes('nothing would train')"
    )
    kernel(page, "d.runner.set(train=('projector',))")
    page.wait_for_function("() => document.querySelector('[data-part=projector]').checked")


# ---- the monkey

ACT = """([kind, u, v]) => { const e = document.querySelector('.mmkit-dash'),
  all = s => [...e.querySelectorAll(s)].filter(x => !x.disabled && x.getClientRects().length),
  pick = l => l[Math.floor(u*l.length)]
  if (kind === 'button') pick(all('button:not([data-do=end]):not([data-do=copy])'))?.click()
  else if (kind === 'start') all('.mm-go')[0]?.click()
  else if (kind === 'range') { const r = pick(all('input[type=range]')); if (!r) return;
    r.value = Number(r.min) + v*(r.max - r.min); r.dispatchEvent(new Event('input',
    {bubbles: true})) }
  else if (kind === 'box') pick(all('input[type=checkbox], input[type=radio]'))?.click()
  else if (kind === 'select') { const s = pick(all('select')); if (!s) return;
    s.value = s.options[Math.floor(v*s.options.length)].value; s.dispatchEvent(new Event('change',
    {bubbles: true})) }
  else if (kind === 'word') pick(all('[data-w]'))?.click()
  else if (kind === 'hover') { const c = pick(all('canvas')); if (!c) return;
    const b = c.getBoundingClientRect(); c.dispatchEvent(new PointerEvent('pointermove',
    {bubbles: true, clientX: b.left + v*b.width, clientY: b.top + u*b.height})) }
  else if (kind === 'summary') pick(all('summary'))?.click() }"""


def test_monkey(page):
    "Random acts leave no error, no stuck state and no thread."
    from playwright.sync_api import TimeoutError  # where it is missing, these tests skip

    f, rng = Face(page), random.Random(int(os.environ.get("MMKIT_MONKEY_SEED", 0)))
    for i in range(ACTS):
        kind = rng.choices(
            ["button", "start", "range", "box", "select", "word", "hover", "summary", "key"],
            [5, 2, 6, 2, 2, 3, 2, 1, 2],
        )[0]
        if kind == "key":
            page.keyboard.press(
                rng.choice(
                    [
                        "Tab",
                        "Shift+Tab",
                        "ArrowRight",
                        "ArrowLeft",
                        "Home",
                        "End",
                        "Escape",
                        "d",
                        "a",
                        "b",
                    ]
                )
            )
        else:
            f.root.evaluate(f"(_, a) => ({ACT})(a)", [kind, rng.random(), rng.random()])
        if i % 10 == 9:
            page.wait_for_timeout(60)
        if i % 60 == 59:
            assert f.told()["phase"] in ("running", "paused", "ready"), (i, f.told()["reason"])
    shoot(page, "dashboard_lab_monkey")
    assert (
        f.root.locator(".mm-side").bounding_box()["width"] < 240
        and f.root.bounding_box()["width"] < 900
    )
    f.root.locator("[role=tab][data-view=live]").click()
    f.root.evaluate(
        "() => new Promise(done => setTimeout(done, 1500))"
    )  # JupyterLab hears clicks in threads of their own: let the last of them arrive
    begin_anew = (
        "d.runner.reset(seed=0, lora_rank=8); d.runner.set(train=('projector',), batch_size=4,"
        " weights_sum_to_one=False, mismatch=0, shortcut=0, dark_benign=0, camera=0);"
        " d.runner.set(contrastive=.4, ce=.5, mse=.1)"
    )
    has_begun = 't.phase != "running" && t.step == 0 && !t.busy && t.hparams.batch_size == 4'
    # On a slow machine commands may wait still, and a click may arrive after the reset.
    for _ in range(8):
        kernel(page, begin_anew)
        with contextlib.suppress(TimeoutError):
            f.until(has_begun, timeout=15_000)
            break
    f.until(has_begun, timeout=1000)
    f.start()
    f.until("t.step >= 5")
    f.pause()
    assert (
        kernel(page, THREADS) == "1"
        and kernel(page, "print(d.runner.error)") == "None"
        and not page.troubles
    )


# ---- ends


def test_a_crash_is_shown_and_the_kernel_lives_on(page):
    f = Face(page)
    kernel(page, "d.runner.state.step = lambda: 1/0")
    f.do("start").click()
    f.until('t.phase == "failed"')
    page.wait_for_function(
        "() => document.querySelector('.mm-notice').textContent.includes('ZeroDivisionError')"
    )
    assert f.do("start").is_disabled() and f.do("fork").is_disabled()
    shoot(page, "dashboard_lab_failed")
    assert kernel(page, "print(1 + 1)") == "2" and kernel(page, THREADS) == "0"


def test_run_again_close_and_restart(page, lab):
    lab.run_all(page)
    f = Face(page)
    f.until('t.phase == "ready"')
    assert page.locator(".mmkit-dash").count() == 1
    kernel(page, "old = d")
    lab.run_all(page)
    f.until('t.phase == "ready"')
    assert (
        kernel(page, "print(old.runner.alive, d.runner.alive)") == "False True"
        and kernel(page, THREADS) == "1"
    )
    f.start()
    f.trains(2)
    kernel(page, "d.close()")
    page.wait_for_function("() => !document.querySelector('.mmkit-dash')")
    assert kernel(page, THREADS) == "0"
    lab.run_all(page)
    f.until('t.phase == "ready"')
    f.do("end").click()
    f.until('t.phase == "stopped"')
    assert kernel(page, THREADS) == "0" and "ended" in f.root.locator(".mm-notice").inner_text()
    lab.run_all(page)
    f.until('t.phase == "ready"')
    f.start()
    f.trains(1)
    page.evaluate(
        "async () => { await"
        " jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }"
    )
    page.wait_for_function(
        "() => document.querySelector('.mm-notice')?.textContent.includes('No word from the"
        " kernel') || !document.querySelector('.mmkit-dash')"
    )
    assert kernel(page, THREADS) == "0"


def test_in_voila(voila, tab):
    tab.goto(
        voila.write(
            "dashboard",
            [
                "import torch; torch.set_num_threads(1)\nfrom mmkit.tuner import"
                " Dashboard\nDashboard()"
            ],
        )
    )
    tab.wait_for_selector(".mmkit-dash [data-panel=ce] canvas")
    f = Face(tab)
    f.until('t.phase == "ready"')
    assert f.root.bounding_box()["y"] + f.root.bounding_box()["height"] <= 720, (
        "does not fit in 1280×720"
    )
    f.start()
    f.until("t.step >= 12 && t.captions")
    f.hparam("ce").fill("0.8")
    f.until("Math.abs(t.hparams.ce - .8) < 1e-9")
    f.trains(10)
    f.do("fork").click()
    f.until('t.active == "B"')
    f.hparam("temperature").fill("140")
    f.trains(16)
    f.root.locator(".mm-caption").nth(0).locator("[data-ok=true]").first.click()
    f.until("t.attention")
    f.trains(4)
    tab.mouse.move(3, 715)
    tab.wait_for_timeout(300)
    shoot(tab, "dashboard_voila")
    assert (
        f.root.bounding_box()["y"] + f.root.bounding_box()["height"] <= 720
        and tab.locator(".mmkit-dash").count() == 1
    )
