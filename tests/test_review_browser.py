"""The review widget in a real Chromium: in JupyterLab and in Voilà, by keyboard and by mouse; what
is decided is in the file.
"""

import json

from browser import shoot, watched_tab

HEAD = """import numpy as np
from mmkit.audit.detectors import ProbePredictions
from mmkit.audit.label_noise import LabelIssues
from mmkit.audit.label_review import ReviewWidget
from mmkit.data import load_melanoma_pairs
from mmkit.data.lint_fix import replace_columns

records = load_melanoma_pairs(12, seed=2060, size=48, masks=False)
hostile = '<img src=x onerror=document.title="broken"> A dark spot.'
records = replace_columns(records, caption=[hostile, *records["caption"][1:]])
scores = dict(similarity=np.arange(12)[::-1].astype(float))
predictions = ProbePredictions([{}] * 12, {}, {})
issues = LabelIssues(
    list(records["caption"]), scores, dict(similarity=1.0), predictions, np.zeros((12, 3), int)
)
"""
CELLS = [HEAD, "w = ReviewWidget(records, issues, 'decisions.json', max_cards=5)\nw"]


class Face:
    def __init__(self, tab):
        self.tab, self.root = tab, tab.locator(".mmkit-review").first

    def do(self, act):
        return self.root.locator(f'[data-do="{act}"]')

    def place(self):
        return self.root.locator(".bar").first.inner_text()

    def at(self, k):
        self.tab.wait_for_function(
            "k => document.querySelector('.mmkit-review .bar').textContent.startsWith(k + ' of 5')",
            arg=k,
        )

    def says(self, what):
        self.tab.wait_for_function(
            "t => document.querySelector('.mmkit-review [role=status]').textContent.includes(t)",
            arg=what,
        )

    def press(self, key):
        self.root.press(key) if not self.inside() else self.tab.keyboard.press(key)

    def inside(self):
        return self.root.evaluate("e => e.contains(document.activeElement)")


def kept(folder):
    return {
        d["row"]: (d["decision"], d["caption"])
        for d in json.loads((folder / "decisions.json").read_text(encoding="utf-8"))["decisions"]
    }


def decided_by_keyboard_and_mouse(f, folder):
    f.at(1)
    assert (
        f.root.locator("textarea").input_value().startswith("<img src=x")
        and f.tab.title() != "broken"
        and f.root.locator("img").count() == 1
    )
    assert (
        f.root.locator("img").evaluate("e => e.complete && e.naturalWidth > 10")
        and "further apart" in f.root.locator(".why").inner_text()
    )
    f.root.focus()
    f.press("r")
    f.at(2)
    f.says("remove")
    assert kept(folder) == {0: ("remove", None)}
    f.press("k")
    f.at(3)
    f.press("ArrowLeft")
    f.at(2)
    assert (
        f.do("keep").get_attribute("aria-pressed") == "true"
        and f.do("remove").get_attribute("aria-pressed") == "false"
    )
    f.press("ArrowRight")
    f.at(3)
    f.press("f")
    assert f.root.locator("textarea").evaluate("e => e === document.activeElement"), (
        "an unchanged caption is written first"
    )
    f.tab.keyboard.type("A dark lesion, kept by ruf.")
    assert f.place().startswith("3 of"), "letters in the box decide nothing"
    f.tab.keyboard.press("Escape")
    f.press("f")
    f.at(4)
    assert kept(folder)[2] == ("fix", "A dark lesion, kept by ruf.")
    f.do("fix").click()
    f.at(5)
    f.root.locator("textarea").fill("  ")
    f.do("fix").click()
    f.says("no caption")
    assert set(kept(folder)) == {0, 1, 2, 3}
    f.do("undo").click()
    f.at(4)
    f.says("taken back")
    assert set(kept(folder)) == {0, 1, 2}
    f.root.focus()
    f.press("u")
    f.at(3)
    assert (
        set(kept(folder)) == {0, 1}
        and f.root.locator("textarea").input_value() != "A dark lesion, kept by ruf."
    )


def test_in_jupyterlab(browser, lab):
    with watched_tab(browser) as tab:
        tab.goto(lab.write("review", CELLS))
        lab.run_all(tab)
        tab.wait_for_selector(".mmkit-review")
        f = Face(tab)
        cells = tab.locator(".jp-Notebook .jp-Cell").count()
        decided_by_keyboard_and_mouse(f, lab.folder)
        f.root.scroll_into_view_if_needed()
        shoot(tab, "review_lab")
        assert tab.locator(".jp-Notebook .jp-Cell").count() == cells, (
            "JupyterLab's own keys stayed out of it"
        )
        lab.run_all(tab)
        f.says("2 decided, read from decisions.json")
        f.at(1)
        assert "2 decided" in f.place() and f.do("remove").get_attribute("aria-pressed") == "true"
        (lab.folder / "decisions.json").write_text("{")
        f.root.focus()
        f.press("k")
        f.says("changed by another program")
        assert (lab.folder / "decisions.json").read_text() == "{"
        assert not tab.troubles, tab.troubles


def test_in_voila(voila, tab):
    tab.goto(voila.write("review", CELLS))
    tab.wait_for_selector(".mmkit-review")
    f = Face(tab)
    decided_by_keyboard_and_mouse(f, voila.folder)
    shoot(tab, "review_voila")
