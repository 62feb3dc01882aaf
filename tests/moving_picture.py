"""Makes README's moving picture of the live tuner: python tests/moving_picture.py [FILE.webp]

It serves the dashboard, moves sliders with a mouse that can be seen, and keeps every frame. Needs
Chromium, like the browser tests. Look at the result before you commit it.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from browser import FLAGS, Server, watched_tab
from PIL import Image
from playwright.sync_api import sync_playwright

DEFAULT_FILE = Path(__file__).resolve().parent.parent / "nbs/images/tuner.webp"
WIDTH = 960  # pixels of the picture; the page is 1280 wide
FRAME_MS = 160  # how long a frame is shown
MAX_BYTES = 2_000_000
CELLS = [
    "import torch; torch.set_num_threads(1)\nfrom mmkit.tuner import Dashboard\nDashboard(seed=0)"
]
POINTER = """() => {
  const pointer = document.createElement('div')
  pointer.style.cssText = 'position:fixed;z-index:9999;pointer-events:none;width:0;height:0;' +
    'border-left:9px solid #000;border-top:9px solid #000;border-right:9px solid transparent;' +
    'border-bottom:9px solid transparent;filter:drop-shadow(0 0 1px #fff)'
  document.body.append(pointer)
  addEventListener('mousemove', e => {
    pointer.style.left = e.clientX + 'px'
    pointer.style.top = e.clientY + 'px'
  }, true)
}"""


class Film:
    "Frames of a page, while the mouse moves on it."

    def __init__(self, tab):
        self.tab = tab
        self.frames = []
        self.mouse = (640, 640)

    def shoot(self, count=1):
        for _ in range(count):
            png = self.tab.screenshot(clip=dict(x=0, y=0, width=1280, height=630))
            frame = Image.open(io.BytesIO(png)).convert("RGB")
            height = round(frame.height * WIDTH / frame.width)
            self.frames.append(frame.resize((WIDTH, height), Image.LANCZOS))

    def wait_for_step(self, step):
        "Keep a frame every third step until the run has come so far, however fast it is."
        told = "() => document.querySelector('.mmkit-dash').told().step"
        now = self.tab.evaluate(told)
        for wanted in range(now + 3, step + 1, 3):
            self.tab.wait_for_function(f"({told})() >= {wanted}")
            self.shoot()

    def go(self, x, y, frames=3):
        "Move the mouse there, seen on the way."
        start_x, start_y = self.mouse
        for i in range(1, frames + 1):
            share = i / frames
            self.tab.mouse.move(start_x + (x - start_x) * share, start_y + (y - start_y) * share)
            self.shoot()
        self.mouse = (x, y)

    def click(self, selector):
        box = self.tab.locator(selector).first.bounding_box()
        self.go(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.tab.mouse.down()
        self.tab.mouse.up()
        self.shoot(2)

    def drag(self, name, share):
        "Drag a slider from where it stands to a share of its length."
        slider = self.tab.locator(f'[data-hparam="{name}"]').first
        box = slider.bounding_box()
        now = slider.evaluate("e => (e.value - e.min) / (e.max - e.min)")
        y = box["y"] + box["height"] / 2
        self.go(box["x"] + 8 + now * (box["width"] - 16), y)
        self.tab.mouse.down()
        self.go(box["x"] + 8 + share * (box["width"] - 16), y, frames=5)
        self.tab.mouse.up()
        self.shoot()


def film_tuner(tab):
    "The story: it trains; the contrastive weight goes up; a word shows where it looked."
    film = Film(tab)
    tab.locator('[data-do="close-tour"]').click()
    tab.evaluate(POINTER)
    film.click('[data-do="start"]')
    film.wait_for_step(30)
    film.drag("contrastive", 0.95)
    film.drag("ce", 0.05)
    film.wait_for_step(110)
    film.drag("ce", 0.9)
    film.wait_for_step(190)
    film.click('[data-do="pause"]')
    film.click('.mm-caption [data-ok="true"]')
    tab.wait_for_function("() => document.querySelector('.mmkit-dash').told().attention")
    film.shoot(3)
    return film.frames


def main(path):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))))
    command = ["voila", "{folder}", "--no-browser", "--Voila.ip=127.0.0.1", "--port={port}"]
    command.append("--VoilaConfiguration.extension_denylist=jupyterlab-jupytext")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(folder, *command, ready="/", path="/voila/render/{name}.ipynb")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        with server, watched_tab(browser) as tab:
            tab.goto(server.write("tuner", CELLS))
            tab.wait_for_selector(".mmkit-dash [data-panel=ce] canvas")
            tab.wait_for_function("document.querySelector('.mmkit-dash').told().phase == 'ready'")
            frames = film_tuner(tab)
        browser.close()
    durations = [FRAME_MS] * (len(frames) - 1) + [3000]
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    frames[0].save(path, quality=55, method=4, minimize_size=True, **options)
    size = Path(path).stat().st_size
    print(f"{path}: {len(frames)} frames, {size / 1e6:.2f} MB")
    assert size <= MAX_BYTES, "too large: fewer frames, or a lower quality"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_FILE)
