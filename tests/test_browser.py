"The token viewer in a real Chromium: in JupyterLab and in Voilà, by mouse and by keyboard, against Python's own arithmetic."
import json
import numpy as np, pytest
from browser import PATIENCE, shoot, watched_tab

PANELS = '''
import json, numpy as np
from types import SimpleNamespace
from PIL import Image
from ipywidgets import Button, Label, VBox
from mmkit.viewer import TokenViewer, full, inside, overlay, shown
WORDS = ['Describe', ' the', ' lesion', '.', ' A', ' dark', ' network', ' with', ' <b>streaks</b>', ' and', '\\n', ' a', ' veil', '.', ' Clinical', ' impression', ':', ' melanoma', '.']
def panel(label, seed, layers=3, heads=4, grid=6):
    rng, n = np.random.default_rng(seed), len(WORDS)
    y, x = np.mgrid[:96, :96]/95
    skin = np.stack([.88 - .1*y, .70 - .1*x, .62 + 0*x], -1); spot = ((x - .5)**2 + (y - .45)**2 < .08)[..., None]
    picture = Image.fromarray((255*np.where(spot, [.45, .3, .25], skin)).astype('uint8'))
    maps = {'raw': rng.random((n, layers, heads, grid, grid))**6, 'rollout': rng.random((n, grid + 2, grid + 1))**4/50, 'relevancy': rng.random((n, 2, 1, grid, grid))**3}
    maps['raw'][3], maps['rollout'][3], maps['raw'][5, 1, 2] = 0, np.nan, np.nan     # no heat at all; no number; no number in one head
    truth = {6: (x < .5) & (y < .4), 12: (x > .6) & (y > .5)}
    return SimpleNamespace(label=label, image=picture, words=WORDS, answered=[False]*4 + [True]*(n - 4), maps=maps, truth=truth)
def told(v):
    "What Python has: the state, its maps, and the overlay's pixels."
    s = {k: getattr(v, k) for k in ('word', 'method', 'layer', 'head', 'opacity', 'scale', 'smooth', 'outline', 'held')}
    maps = [shown(l, v) for l in v.looks]
    return json.dumps(dict(s, maps=[None if m is None else m.ravel().round(7).tolist() for m in maps], full=[full(l, v) for l in v.looks], inside=[inside(l, v) for l in v.looks],
                           pixels=[np.asarray(overlay(l, v))[24::48, 24::48].reshape(-1, 3).tolist() for l in v.looks]))
def followed(v, name):
    "The viewer under a name, and a line of text that says what Python has."
    line = Label(told(v)); line.add_class(name + '-told'); line.add_class('told'); box = VBox([v]); box.add_class(name)
    v.observe(lambda _: setattr(line, 'value', told(v)), ['word', 'method', 'layer', 'head', 'opacity', 'scale', 'smooth', 'outline', 'held'])
    return VBox([box, line])
one, two = panel('base', 0), panel('tuned', 1)
'''
CELLS = [PANELS, "a = TokenViewer(one, word=1); followed(a, 'alone')", "b = TokenViewer(one, two, word=6, layer=1); followed(b, 'both')",
         "button = Button(description='set'); button.add_class('setter')\nbutton.on_click(lambda _: (setattr(a, 'word', 12), setattr(a, 'scale', 'word')))\nbutton"]
STATE = ('word', 'method', 'layer', 'head', 'opacity', 'scale', 'smooth', 'outline', 'held')

class Viewer:
    "A viewer on a page: its parts, what it shows, and what Python says that it should."
    def __init__(self, tab, name): self.tab, self.name, self.root = tab, name, tab.locator(f'.{name} .mmkit-viewer')
    def word(self, i): return self.root.locator(f'[role=option][data-i="{i}"]')
    def control(self, name): return self.root.locator(f'[data-name={name}]')
    def selected(self): return int(self.root.locator('[role=option][aria-selected=true]').get_attribute('data-i'))
    def focused(self): return self.tab.evaluate('document.activeElement.dataset.i ?? document.activeElement.tagName')
    def python(self, **want):
        "What Python says, once its state is what is wanted."
        self.tab.wait_for_function("([name, want]) => { const e = document.querySelector(`.${name}-told`); if (!e) return false; const s = JSON.parse(e.textContent); "
                                   "return Object.entries(want).every(([k, v]) => s[k] === v) }", arg=[self.name, want])
        return json.loads(self.tab.locator(f'.{self.name}-told').inner_text())
    def face(self):
        "What the page shows: maps, scales, pixels."
        return self.root.evaluate('''e => ({maps: e.look().map(l => l.map && Array.from(l.map)), full: e.look().map(l => l.top), said: [...e.querySelectorAll('.mmkit-said')].map(s => s.textContent),
            pixels: [...e.querySelectorAll('canvas')].map(c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, out = [];
                for (let y = 24; y < c.height; y += 48) for (let x = 24; x < c.width; x += 48) out.push([...d.slice(4*(y*c.width + x), 4*(y*c.width + x) + 3)]); return out })})''')
    def agrees(self, **want):
        "Page and Python have the same maps (to the byte that each value was sent in), the same scale, the same pixels."
        py, js = self.python(**want), self.face()
        for a, b, top in zip(py['maps'], js['maps'], py['full']):
            assert (a is None) == (b is None), (want, py['maps'], js['maps'])
            if a: np.testing.assert_allclose(a, b, atol=max(a)/50 + 1e-6); assert np.corrcoef(a, b)[0, 1] > .999
        np.testing.assert_allclose(py['full'], js['full'], rtol=.01)
        np.testing.assert_allclose(py['pixels'], js['pixels'], atol=6, err_msg=str(want))
        return py, js

@pytest.fixture(scope='module')
def page(browser, lab):
    "The notebook, run in JupyterLab; each test has viewers of its own on it."
    with watched_tab(browser) as tab:
        tab.goto(lab.write('viewer', CELLS)); lab.run_all(tab)
        for name in ('alone', 'both'): tab.wait_for_selector(f'.{name} .mmkit-viewer canvas')
        tab.evaluate("() => document.querySelectorAll('.told').forEach(e => e.style.cssText = 'font-size:1px;max-height:4px;overflow:hidden')")
        yield tab
        assert not tab.troubles, '\n'.join(tab.troubles)

def test_first(page):
    v = Viewer(page, 'alone')
    v.agrees(word=1)
    v.root.scroll_into_view_if_needed(); shoot(page, 'lab_one')
    v = Viewer(page, 'both'); v.root.scroll_into_view_if_needed(); shoot(page, 'lab_two')
