"""The token viewer in a real Chromium: in JupyterLab and in Voilà, by mouse and by keyboard,
against Python's own arithmetic.
"""

import json

import numpy as np
import pytest
from browser import shoot, watched_tab

PANELS = """
import json, numpy as np
from types import SimpleNamespace
from PIL import Image
from ipywidgets import Button, Label, VBox
from mmkit.explain.viewer import TokenViewer, energy_inside_mask, render_overlay
from mmkit.explain.viewer_state import get_vmax, select_map

WORDS = [
    'Describe', ' the', ' lesion', '.', ' A', ' dark', ' network', ' with', ' <b>streaks</b>',
      ' and',
    '\\n', ' a', ' veil', '.', ' Clinical', ' impression', ':', ' melanoma', '.',
]
SETTINGS = [
    'word', 'method', 'layer', 'head', 'opacity', 'scale', 'smooth', 'outline', 'held'
]

def panel(label, seed, layers=3, heads=4, grid=6):
    rng, n = np.random.default_rng(seed), len(WORDS)
    y, x = np.mgrid[:96, :96] / 95
    skin = np.stack([0.88 - 0.1 * y, 0.70 - 0.1 * x, 0.62 + 0 * x], -1)
    spot = ((x - 0.5) ** 2 + (y - 0.45) ** 2 < 0.08)[..., None]
    pixels = 255 * np.where(spot, [0.45, 0.3, 0.25], skin)
    maps = {
        'raw': rng.random((n, layers, heads, grid, grid)) ** 6,
        'rollout': rng.random((n, grid + 2, grid + 1)) ** 4 / 50,
        'relevancy': rng.random((n, 2, 1, grid, grid)) ** 3,
    }
    maps['raw'][3] = 0  # no heat at all
    maps['rollout'][3] = np.nan  # no number
    maps['raw'][5, 1, 2] = np.nan  # no number in one head
    truth = {6: (x < 0.5) & (y < 0.4), 12: (x > 0.6) & (y > 0.5)}
    return SimpleNamespace(
        label=label,
        image=Image.fromarray(pixels.astype('uint8')),
        words=WORDS,
        in_answer=[False] * 4 + [True] * (n - 4),
        maps=maps,
        truth=truth,
    )

def told(v):
    "What Python has: the state, its maps, and the overlay's pixels."
    models = v.attributions_list
    maps = [select_map(one, v) for one in models]
    overlays = [np.asarray(render_overlay(one, v)) for one in models]
    return json.dumps(dict(
        {name: getattr(v, name) for name in SETTINGS},
        maps=[None if m is None else m.ravel().round(7).tolist() for m in maps],
        full=[get_vmax(one, v) for one in models],
        inside=[energy_inside_mask(one, v) for one in models],
        pixels=[pixels[24::48, 24::48].reshape(-1, 3).tolist() for pixels in overlays],
    ))

def followed(v, name):
    "The viewer under a name, and a line of text that says what Python has."
    line = Label(told(v))
    line.add_class(name + '-told')
    line.add_class('told')
    box = VBox([v])
    box.add_class(name)
    v.observe(lambda _: setattr(line, 'value', told(v)), SETTINGS)
    return VBox([box, line])

one, two = panel('base', 0), panel('tuned', 1)
"""
CELLS = [
    PANELS,
    "a = TokenViewer(one, word=1); followed(a, 'alone')",
    "b = TokenViewer(one, two, word=6, layer=1); followed(b, 'both')",
    (
        "button = Button(description='set'); button.add_class('setter')\nbutton.on_click(lambda _:"
        " (setattr(b, 'word', 12), setattr(b, 'scale', 'word')))\nbutton"
    ),
    "TokenViewer(two, word=2)",
]


class Viewer:
    "A viewer on a page: its parts, what it shows, and what Python says that it should."

    def __init__(self, tab, name):
        self.tab, self.name, self.root = tab, name, tab.locator(f".{name} .mmkit-viewer")

    def word(self, i):
        return self.root.locator(f'[role=option][data-i="{i}"]')

    def control(self, name):
        return self.root.locator(f"[data-name={name}]")

    def selected(self):
        return int(self.root.locator("[role=option][aria-selected=true]").get_attribute("data-i"))

    def focused(self):
        return self.tab.evaluate(
            "document.activeElement.dataset.i ?? document.activeElement.tagName"
        )

    def python(self, **want):
        "What Python says, once its state is what is wanted."
        self.tab.wait_for_function(
            "([name, want]) => { const e = document.querySelector(`.${name}-told`); if (!e) return"
            " false; const s = JSON.parse(e.textContent); return Object.entries(want).every(([k,"
            " v]) => s[k] === v) }",
            arg=[self.name, want],
        )
        return json.loads(self.tab.locator(f".{self.name}-told").inner_text())

    def face(self):
        "What the page shows: maps, scales, pixels."
        return self.root.evaluate(
            """e => ({maps: e.look().map(l => l.map && Array.from(l.map)),
              full: e.look().map(l => l.top),
              said: [...e.querySelectorAll('.mmkit-said')].map(s => s.textContent),
            pixels: [...e.querySelectorAll('canvas')].map(c => {
              const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, out = [];
                for (let y = 24; y < c.height; y += 48) for (let x = 24; x < c.width;
                  x += 48) out.push([...d.slice(4*(y*c.width + x), 4*(y*c.width + x) + 3)]);
                  return out })})"""
        )

    def agrees(self, **want):
        """Page and Python have the same maps (to the byte that each value was sent in), the same
        scale, the same pixels.
        """
        py, js = self.python(**want), self.face()
        for a, b, _top in zip(py["maps"], js["maps"], py["full"]):
            assert (a is None) == (b is None), (want, py["maps"], js["maps"])
            if a:
                np.testing.assert_allclose(a, b, atol=max(a) / 50 + 1e-6)
                assert np.corrcoef(a, b)[0, 1] > 0.999
        np.testing.assert_allclose(py["full"], js["full"], rtol=0.01)
        np.testing.assert_allclose(py["pixels"], js["pixels"], atol=6, err_msg=str(want))
        return py, js


@pytest.fixture(scope="module")
def page(browser, lab):
    "The notebook, run in JupyterLab; each test has viewers of its own on it."
    with watched_tab(browser) as tab:
        tab.goto(lab.write("viewer", CELLS))
        lab.run_all(tab)
        for name in ("alone", "both"):
            tab.wait_for_selector(f".{name} .mmkit-viewer canvas")
        tab.evaluate(
            "() => document.querySelectorAll('.told').forEach(e => e.style.cssText ="
            " 'font-size:1px;max-height:4px;overflow:hidden')"
        )
        yield tab
        assert not tab.troubles, "\n".join(tab.troubles)


def test_page_and_python_agree(page):
    v = Viewer(page, "alone")
    v.agrees(word=1)
    for word in (6, 3, 5, 12):  # plain; no heat; no number in one head; a structure
        v.word(word).hover()
        v.agrees(word=word)
    for name, value in (
        ("head", 2),
        ("layer", 1),
        ("layer", "max"),
        ("head", "mean"),
        ("head", "max"),
        ("layer", "mean"),
        ("scale", "word"),
        ("method", "rollout"),
        ("method", "relevancy"),
        ("layer", 0),
    ):
        v.control(name).select_option(json.dumps(value))
        v.agrees(**{name: value})
    v.control("smooth").uncheck()
    v.agrees(smooth=False)
    v.control("smooth").check()
    v.agrees(smooth=True)
    v.control("opacity").fill("0.35")
    v.agrees(opacity=0.35)
    v.control("outline").uncheck()
    v.agrees(outline=False)
    v.control("method").select_option('"raw"')
    v.control("layer").select_option("2")
    v.agrees(layer=2)
    known = v.root.evaluate(
        """e => { const m = e.querySelector('[data-name=method]'); m.value = '"relevancy"';
          m.dispatchEvent(new Event('change'))
        return [e.look()[0].map !== null, e.querySelector('[data-name=layer]').value] }"""
    )
    assert known == [True, '"mean"']
    v.agrees(
        method="relevancy", layer="mean"
    )  # two layers, no third: the page knows by itself, be the kernel as busy as it likes


def test_numbers_under_the_picture(page):
    v = Viewer(page, "both")
    v.word(6).hover()
    py, js = v.agrees(word=6)
    for line, (hit, area) in zip(js["said"], py["inside"]):
        assert line.endswith(
            f"inside the outline: {100 * hit:.0f}% of the map, {100 * area:.0f}% of the image"
        ), line
    v.word(3).hover()
    py, js = v.agrees(word=3)
    assert py["maps"] == [None, None] and js["said"] == [".no map for this word"] * 2
    assert "mmkit-none" in v.word(3).get_attribute("class") and "mmkit-none" not in v.word(
        4
    ).get_attribute("class")


def test_one_pointing_moves_both(page):
    v = Viewer(page, "both")
    v.word(8).hover()
    before = v.agrees(word=8)[1]["pixels"]
    v.word(6).hover()
    after = v.agrees(word=6)[1]["pixels"]
    assert all(a != b for a, b in zip(before, after)) and after[0] != after[1]
    v.root.scroll_into_view_if_needed()
    shoot(page, "lab_two")
    box = v.root.bounding_box()
    assert box["height"] < 560 and box["width"] < 900, box  # at 1280×720 it is seen whole


def test_a_held_word_stays(page):
    v = Viewer(page, "both")
    v.word(10).click()
    v.python(word=10, held=True)
    v.word(4).hover()
    assert v.selected() == 10
    page.keyboard.press("Escape")
    v.python(held=False)
    v.word(5).hover()
    v.python(word=5)
    v.word(4).click()
    v.python(held=True)
    v.word(4).click()
    v.python(held=False)


def test_by_keyboard_alone(page):
    v = Viewer(page, "both")

    def cells():
        return page.evaluate(
            "jupyterapp.shell.currentWidget.content.widgets.map(w => w.model.type + w.model.id)"
        )

    before = cells()
    v.word(1).hover()
    page.mouse.move(5, 5)
    v.control("outline").focus()
    page.keyboard.press("Tab")
    assert v.focused() == "1"  # one stop for all words: the chosen one
    assert v.root.locator('[role=option][tabindex="0"]').count() == 1
    ring = page.evaluate(
        "() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle,"
        " parseFloat(s.outlineWidth)] }"
    )
    assert ring[0] == "solid" and ring[1] >= 2
    for key, word in (
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 18),
        ("ArrowRight", 18),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        page.keyboard.press(key)
        assert v.focused() == str(word) == str(v.selected()), key
    page.keyboard.press("ArrowDown")
    below = v.selected()

    def y(i):
        return v.word(i).bounding_box()["y"]

    assert below > 3 and y(below) > y(0)
    page.keyboard.press("ArrowUp")
    assert y(v.selected()) == y(0)
    page.keyboard.press("Enter")
    v.python(held=True)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    v.agrees(held=False)
    for key in "bmdd":
        page.keyboard.press(key)  # JupyterLab's own keys: a cell below, to Markdown, delete
    page.keyboard.press("End")
    v.agrees(word=18)
    assert cells() == before and v.focused() == "18"
    for _ in range(4):
        page.keyboard.press("Shift+Tab")  # back through outline, smooth, scale to the slider
    assert page.evaluate("document.activeElement.dataset.name") == "opacity"
    before = v.python()["opacity"]
    page.keyboard.press("ArrowLeft")
    v.agrees(opacity=round(before - 0.05, 2))
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.dataset.name") == "head"
    page.keyboard.press("ArrowDown")
    v.agrees(head="max")
    page.keyboard.press("ArrowUp")
    v.agrees(head="mean")


def test_said_to_screen_readers(page):
    v = Viewer(page, "both")
    v.word(6).hover()
    v.python(word=6)
    assert (
        v.root.locator("[role=listbox]").get_attribute("aria-label")
        and v.root.locator("[role=group][aria-label=answer] [role=option]").count() == 15
    )
    status = v.root.locator("[role=status]").inner_text()
    assert status.startswith("network. base: peak") and "tuned: peak" in status
    assert [
        c.get_attribute("aria-label").split(":")[0] for c in v.root.locator("canvas").all()
    ] == ["base, network", "tuned, network"]
    for c in v.root.locator("select, input").all():
        assert c.evaluate("e => e.labels.length") == 1


def test_words_are_text(page):
    v = Viewer(page, "alone")
    assert (
        not v.root.locator("[role=option] b").count()
        and v.word(8).inner_text() == "<b>streaks</b>"
        and v.word(10).get_attribute("aria-label") == "blank"
    )


def test_python_moves_the_page(page):
    v = Viewer(page, "both")
    page.locator(".setter").click()
    v.agrees(word=12, scale="word")
    assert v.selected() == 12
    v.control("scale").select_option('"model"')
    py, _ = v.agrees(scale="model")
    assert py["full"][0] != py["full"][1]
    v.control("scale").select_option('"common"')
    v.agrees(scale="common")


def test_shown_itself_it_is_the_widget_not_the_still(page):
    out = page.locator(".jp-OutputArea-output").last
    assert out.locator(".mmkit-viewer canvas").count() == 1 and not out.locator("img").count()


def test_in_voila(voila, tab):
    tab.goto(voila.write("viewer", CELLS))
    tab.wait_for_selector(".both .mmkit-viewer canvas")
    v = Viewer(tab, "both")
    v.agrees(word=6)
    v.word(6).hover()
    v.root.scroll_into_view_if_needed()
    shoot(tab, "voila_two")
    v.word(12).hover()
    v.agrees(word=12)
    v.word(12).focus()
    tab.keyboard.press("ArrowLeft")
    v.agrees(word=11)
    v.control("method").select_option('"rollout"')
    v.agrees(method="rollout")
    assert tab.locator(".mmkit-viewer").count() == 3
