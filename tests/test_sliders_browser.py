"""The chapters' dials in a real Chromium, in JupyterLab and in Voilà: by keyboard and by mouse,
the picture follows and does not flicker.
"""

import base64
import io
import json

import nbformat
import numpy as np
import pytest
from browser import shoot, watched_tab
from conftest import ROOT
from PIL import Image


def cells(chapter, *parts):
    "A chapter's own cells: for each part the first cell that holds it."
    code = [
        c.source
        for c in nbformat.read(ROOT / "nbs/course" / f"{chapter}.ipynb", 4).cells
        if c.cell_type == "code"
    ]
    return [next(c for c in code if part in c) for part in parts]


def watched(cell, name):
    """The chapter's cell, with a name for its dial and a line of text that says what Python has
    and how often it was drawn.
    """
    before, at, after = cell.rpartition("interact(")
    return f"{before}{name} = {at}{after}\nfollow({name}, {name!r})"


HEAD = """import json, math, torch, numpy as np, matplotlib.pyplot as plt, ipywidgets
from IPython.display import display
from PIL import Image
from mmkit import chat, losses
from mmkit.chat.prompts import PROMPT
from mmkit.core import PALETTE, interact, set_plot_style
set_plot_style()
def follow(plot, name):
    view, label = plot.view, ipywidgets.Label()
    view.box.add_class(name)
    label.add_class(name + '-told')
    drawn, update_output = [], view.update_output
    def update_and_report(outputs):
        update_output(outputs)
        drawn.append(1)
        label.value = json.dumps(dict(plot.state, drawn=len(drawn), error=str(plot.error or '')))
    view.update_output = update_and_report
    kinds = ['png' if hasattr(child, 'format') else 'html' for child in view.output_box.children]
    update_and_report([(kind, child.value) for kind, child in zip(kinds, view.output_box.children)])
    display(label)
"""
TAU = [
    cells("04_losses", "def plot_tau")[0].rpartition("plot_tau(mark")[0],
    watched(cells("04_losses", "interact(show_tau")[0], "dial"),
]
PAGER = [
    cells("03_chat", "from mmkit import chat")[0],
    """from transformers import AutoProcessor
from mmkit.chat import Collator
from mmkit.core.runtime import get_assets_dir
from mmkit.data import load_melanoma_pairs
processor = AutoProcessor.from_pretrained(get_assets_dir() / 'base')
records = list(load_melanoma_pairs(n=4, masks=False))
batch = Collator(processor, include_captions=True)(records)
captions = ('caption_input_ids', 'caption_attention_mask', 'caption_id')
model_batch = {k: v for k, v in batch.items() if k not in captions}
written_out = processor.full_image_sequence
end_turn = processor.tokenizer.convert_tokens_to_ids('<end_of_turn>')""",
    cells("03_chat", "broken = {")[0],
    watched(cells("03_chat", "interact(\n    pager")[0], "pager_"),
]
ODD = [
    """def odd(how_many, # pixels, or an error above 150
        where='left', seen=False):
    if how_many > 150: raise ValueError(f'how_many={how_many}: <b>at most 150</b>; turn it down')
    display(Image.new('RGB', (500, 160), (how_many, 255 - how_many, 0)))
odd_one = interact(
    odd, how_many=(0, 200, 1, 10), where=['left', 'right'], seen=[False, True]
)
follow(odd_one, 'odd')
def set_both(_):
    odd_one.set(how_many=42, where='right', seen=True)
    dial.set(tau=.07123, own=.83)
button = ipywidgets.Button(description='set')
button.add_class('setter')
button.on_click(set_both)
button"""
]


class Dial:
    "A dial on a page: its parts, and what Python says."

    def __init__(self, tab, name):
        self.tab, self.name, self.root = tab, name, tab.locator(f".{name}")

    def handle(self, label):
        return self.root.locator(
            ".widget-slider", has=self.tab.locator(f'label:text-is("{label}")')
        ).locator(".noUi-handle")

    def readout(self, label):
        return self.root.locator(
            ".widget-slider", has=self.tab.locator(f'label:text-is("{label}")')
        ).locator(".widget-readout")

    def told(self):
        return json.loads(self.tab.locator(f".{self.name}-told").text_content())

    def wait(self, js, arg=None):
        "What Python says, once `js`, of that as `s` and of `arg` as `a`, is true."
        self.tab.wait_for_function(
            "([name, a]) => { const e = document.querySelector(`.${name}-told`); if (!e ||"
            f" !e.textContent) return false; const s = JSON.parse(e.textContent); return {js} }}",
            arg=[self.name, arg],
        )
        return self.told()

    def picture(self):
        return self.root.locator("img").first.evaluate(
            "async e => { for (let k = 0; k < 100; k++) try { await e.decode(); break } catch {"
            " await new Promise(requestAnimationFrame) } const c ="
            ' document.createElement("canvas"); c.width = e.naturalWidth; c.height ='
            ' e.naturalHeight; c.getContext("2d").drawImage(e, 0, 0); return c.toDataURL() }'
        )

    def pixels(self):
        return np.asarray(
            Image.open(io.BytesIO(base64.b64decode(self.picture().partition(",")[2]))).convert(
                "RGB"
            )
        )

    def to_view(self):
        self.root.evaluate('e => e.scrollIntoView({block: "center"})')

    def drag(self, label, dx, steps=8):
        self.to_view()
        box = self.handle(label).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.tab.mouse.move(x, y)
        self.tab.mouse.down()
        self.tab.mouse.move(x + dx, y, steps=steps)
        self.tab.mouse.up()


@pytest.fixture(scope="module")
def page(browser, lab):
    "The cells, run in JupyterLab."
    with watched_tab(browser) as tab:
        tab.goto(lab.write("turn", [HEAD, *ODD, *TAU, *PAGER]))
        lab.run_all(tab)
        for name in ("odd", "dial", "pager_"):
            tab.wait_for_selector(f".{name} img")
        yield tab
        assert not tab.troubles, "\n".join(tab.troubles)


def turned_by_keyboard_and_mouse(d):
    "The temperature of chapter 04: from the keyboard, dragged, and back."
    d.wait("s.tau === .3 && s.own === .8")
    d.to_view()  # JupyterLab leaves what is out of view unrendered
    first = d.picture()
    assert (
        d.readout("tau").inner_text() == "0.300"
        and "temperature, 0.01 to 2" in d.root.inner_text()
        and d.root.locator('label[title="temperature, 0.01 to 2"]').count() == 1
    )
    d.handle("tau").focus()
    d.tab.keyboard.press("ArrowLeft")
    one = d.wait("s.tau < .3")
    assert (
        0.26 < one["tau"] < 0.27 and one["own"] == 0.8
    )  # a ninth of the way to a half, wherever one stands
    second = d.picture()
    assert second != first
    d.tab.keyboard.press("Home")
    d.wait("s.tau === .01")
    d.tab.keyboard.press("End")
    d.wait("s.tau === 2")
    d.tab.keyboard.press("ArrowRight")
    d.drag("own", -60)
    less = d.wait("s.own < .7 && s.tau === 2")
    assert d.readout("own").inner_text() == f"{less['own']:.2f}"
    assert d.picture() not in (first, second)
    d.to_view()
    shoot(d.tab, f"turn_{d.where}")
    d.root.locator("button").focus()
    d.tab.keyboard.press("Enter")
    d.wait("s.tau === .3 && s.own === .8")
    assert d.readout("tau").inner_text() == "0.300"
    assert (
        d.pixels()
        == np.asarray(
            Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))).convert("RGB")
        )
    ).all()  # the very picture of the start


def test_temperature(page):
    d = Dial(page, "dial")
    d.where = "lab"
    turned_by_keyboard_and_mouse(d)


def test_code_moves_the_controls(page):
    d = Dial(page, "odd")
    before, drawn = d.wait("s.how_many === 10")["drawn"], Dial(page, "dial").told()["drawn"]
    page.locator(".setter").click()
    assert d.wait('s.how_many === 42 && s.where === "right" && s.seen')["drawn"] == before + 1
    assert (
        d.readout("how many").inner_text() == "42"
        and d.root.locator("select").evaluate("e => e.selectedOptions[0].text") == "right"
        and d.root.locator("input[type=checkbox]").is_checked()
    )
    dial = Dial(page, "dial")
    now = dial.wait("s.tau === .07123 && s.own === .83")
    page.wait_for_timeout(300)  # off the sliders' grids: nothing moves it there
    assert (
        now["drawn"] == dial.told()["drawn"] == drawn + 1
        and dial.readout("tau").inner_text() == "0.0712"
        and dial.readout("own").inner_text() == "0.83"
    )
    dial.root.locator("button").click()
    d.to_view()
    d.root.locator("select").select_option("left")
    d.wait('s.where === "left"')
    d.root.locator("input[type=checkbox]").uncheck()
    d.wait("!s.seen")
    d.root.locator("button").click()
    d.wait("s.how_many === 10")
    assert (
        dial.wait("s.tau === .3")["drawn"] == drawn + 2
    )  # one drawing for each setting, and no click was lost while it drew


def test_keys_stay_in_the_dial(page):
    d = Dial(page, "odd")
    d.wait("s.how_many === 10")
    d.to_view()

    def cells():
        return page.evaluate(
            "jupyterapp.shell.currentWidget.content.widgets.map(w => w.model.type + w.model.id)"
        )

    before = cells()
    d.handle("how many").focus()
    for key in "bmdd":
        page.keyboard.press(key)  # JupyterLab's own keys: a cell below, to Markdown, delete
    page.keyboard.press("ArrowUp")
    d.wait("s.how_many === 11")
    assert cells() == before
    assert (
        page.evaluate(
            'document.activeElement.getAttribute("aria-label") +'
            ' document.activeElement.getAttribute("aria-valuenow")'
        )
        == "how many11.0"
    )
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    d.wait('s.where === "right"')  # past the readout, to the menu
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    d.wait("s.seen")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    d.wait('s.how_many === 10 && s.where === "left" && !s.seen')


def test_an_error_is_shown_in_place_and_mends(page):
    d = Dial(page, "odd")
    d.to_view()
    d.handle("how many").focus()
    page.keyboard.press("End")
    d.wait("s.how_many === 200 && s.error")
    page.wait_for_selector(".odd [role=alert]")
    d.to_view()
    shoot(page, "turn_error")
    said = d.root.locator("[role=alert]")
    assert (
        said.inner_text() == "how_many=200: <b>at most 150</b>; turn it down"
        and not d.root.locator("img").count()
    )
    page.keyboard.press("Home")
    d.wait("s.how_many === 0 && !s.error")
    page.wait_for_selector(".odd img")
    assert not said.count()
    d.readout("how many").fill("77")
    page.keyboard.press("Enter")
    d.wait("s.how_many === 77")
    assert (d.pixels() == [77, 178, 0]).all()
    d.root.locator("button").click()
    d.wait("s.how_many === 10")


def test_the_picture_follows_the_hand_without_a_flicker(page):
    d = Dial(page, "odd")
    before = d.wait("s.how_many === 10")["drawn"]
    d.to_view()
    page.wait_for_timeout(300)
    box, frames, cdp = d.root.locator("img").bounding_box(), [], page.context.new_cdp_session(page)

    def seen(frame):
        frames.append(frame["data"])
        cdp.send("Page.screencastFrameAck", dict(sessionId=frame["sessionId"]))

    cdp.on("Page.screencastFrame", seen)
    cdp.send("Page.startScreencast", dict(format="png", everyNthFrame=1))
    at = d.handle("how many").bounding_box()
    page.mouse.move(at["x"] + 8, at["y"] + 8)
    page.mouse.down()
    for k in range(1, 41):
        page.mouse.move(at["x"] + 8 + 2 * k, at["y"] + 8)
        page.wait_for_timeout(30)
    midway = d.wait("s.how_many > 20")["drawn"]
    page.mouse.up()
    d.wait("s.how_many > 80")
    cdp.send("Page.stopScreencast")
    cdp.detach()
    assert midway > before + 3, (before, midway)  # it was drawn before the hand let go
    x, y, w, h = (int(box[k]) for k in ("x", "y", "width", "height"))
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(f))).convert("RGB"))[
            y + 3 : y + h - 3, x + 3 : x + w - 3
        ]
        for f in frames
    ]
    assert len(shown) > 8 and len({int(s[0, 0, 0]) for s in shown}) > 3
    assert (
        max(int(s[..., 2].max()) for s in shown) == 0
    )  # the picture has no blue; the page behind it, blank for one frame, would
    assert d.root.locator("img").bounding_box() == box
    d.root.locator("button").click()
    d.wait("s.how_many === 10")


def test_pager_of_the_xray(page):
    d = Dial(page, "pager_")
    d.wait("s.row === 1")
    first = d.picture()
    d.to_view()
    d.root.locator("select").focus()
    page.keyboard.press("ArrowDown")
    d.wait('s.fault === "nothing wrong"')
    second = d.picture()
    d.handle("row").focus()
    page.keyboard.press("ArrowRight")
    d.wait("s.row === 2")
    third = d.picture()
    d.to_view()
    shoot(page, "turn_pager")
    assert (
        len({first, second, third}) == 3
        and d.readout("row").inner_text() == "2"
        and "what went wrong" in d.root.inner_text()
    )
    d.drag("row", -200)
    d.wait("s.row === 0")
    assert d.picture() not in (first, second, third)


def test_in_voila(voila, tab):
    tab.goto(voila.write("turn", [HEAD, *TAU]))
    tab.wait_for_selector(".dial img")
    d = Dial(tab, "dial")
    d.where = "voila"
    turned_by_keyboard_and_mouse(d)
