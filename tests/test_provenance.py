"Recorded results name the lesions and base they were measured on, and say when these change."

import hashlib
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from world_summary import TOLERANCE, looks_the_same, read_recorded, summarize_world

from mmkit.audit.card_sections import format_measurement
from mmkit.core.claims import Claim, load_claim, plot_conditions, plot_scaling_curves
from mmkit.core.provenance import (
    WORLD_VERSION,
    annotate_outdated,
    base_checksum,
    get_provenance,
    outdated_note,
)
from mmkit.planner.advice import advise_by_data_size, compare_methods
from mmkit.tuner import dashboard
from mmkit.tuner.plots import load_sweep, plot_sweep, plot_weight_edge

ASSETS = ROOT / "mmkit" / "assets"
RECORDED = [*sorted((ASSETS / "claims").glob("*.json")), *sorted(ASSETS.glob("*.json"))]
EARLIER = {
    "lesions": (dict(world_version=WORLD_VERSION - 1), "the drawn lesions"),
    "base": (dict(base_checksum="0" * 12), "the base model"),
    "both": (
        dict(world_version=WORLD_VERSION - 1, base_checksum="0" * 12),
        "the drawn lesions and of the base model",
    ),
}


@pytest.fixture(params=EARLIER)
def earlier(request):
    change, name = EARLIER[request.param]
    return get_provenance() | change, f"Measured on an earlier version of {name}."


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def shown_texts(ax):
    return [text.get_text().replace("\n", " ") for text in ax.texts]


# --- versions
def test_lesions_look_as_recorded_for_this_version():
    recorded = read_recorded()
    assert recorded["world_version"] == WORLD_VERSION, (
        "the world has a new version: python tests/world_summary.py writes its summary"
    )
    assert looks_the_same(summarize_world(), recorded), (
        "lesions look different: raise WORLD_VERSION in nbs/library/core/provenance.ipynb, export,"
        " and call python tests/world_summary.py; recorded results then say that they are older"
    )


def test_a_small_change_is_noticed_and_rounding_is_not():
    recorded = read_recorded()
    summary = np.array(recorded["summary"])
    changed = summary.copy()
    changed[0, 0] += 2 * TOLERANCE
    assert looks_the_same(summary + TOLERANCE / 5, recorded)
    assert not looks_the_same(changed, recorded)


def test_checksum_of_the_base_is_that_of_its_weights():
    weights = (ASSETS / "base" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest().startswith(base_checksum())


def read_entries(file):
    "The results in a file: itself, or in the record of realism each part of each renderer."
    document = json.loads(file.read_text(encoding="utf-8"))
    if file.stem != "realism":
        return [document]
    return [part for parts in document.values() for part in parts.values()]


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_every_recorded_result_names_its_lesions_and_base(file):
    entries = read_entries(file)
    assert entries
    for entry in entries:
        assert {"world_version", "base_checksum"} <= set(entry)
        assert entry["world_version"] in (None, *range(1, WORLD_VERSION + 1))
        assert entry["base_checksum"] is None or len(bytes.fromhex(entry["base_checksum"])) == 6
        depends_on_neither = entry["world_version"] is None and entry["base_checksum"] is None
        assert not depends_on_neither


# --- captions
def test_a_note_names_what_has_changed(earlier):
    entry, note = earlier
    assert outdated_note(entry) == outdated_note(get_provenance(), entry) == note
    assert outdated_note(get_provenance()) == outdated_note() == ""
    independent = dict.fromkeys(entry)  # of None: it depends on neither
    assert outdated_note(independent) == ""


def test_a_claim_of_earlier_lesions_or_base_says_so_everywhere(earlier):
    entry, note = earlier
    old, new = (Claim(load_claim("C24") | p) for p in (entry, get_provenance()))
    shown = [
        lambda c: [str(c)],
        lambda c: [c._repr_html_()],
        lambda c: [str(c.table("R@1"))],
        lambda c: [c.outcomes()._repr_html_()],
        lambda c: shown_texts(plot_conditions(c, "R@1")),
        lambda c: shown_texts(plot_scaling_curves(c, "R@1")),
        lambda c: list(format_measurement(c)),
    ]
    for show in shown:
        assert sum(text.count(note) for text in show(old)) == 1
        assert not any("earlier version" in text for text in show(new))


def test_a_sweep_of_earlier_lesions_or_base_says_so_everywhere(earlier, monkeypatch):
    entry, note = earlier
    old, new = (load_sweep() | p for p in (entry, get_provenance()))
    assert note in shown_texts(plot_sweep(old))
    assert all(note in shown_texts(ax) for ax in plot_weight_edge(old))
    for ax in (plot_sweep(new), *plot_weight_edge(new)):
        assert not any("earlier version" in text for text in shown_texts(ax))
    for sweep, said in ((old, note), (new, "")):
        monkeypatch.setattr(dashboard, "load_sweep", lambda sweep=sweep: sweep)
        assert dashboard._collect_constants([])["outdated_note"] == said


def test_advice_from_an_earlier_world_says_so(earlier, monkeypatch):
    entry, note = earlier
    for provenance, said in ((entry, True), (get_provenance(), False)):
        monkeypatch.setattr(
            "mmkit.planner.advice.load_claim",
            lambda name, p=provenance: Claim(load_claim(name) | p),
        )
        assert (note in advise_by_data_size(800)) == said
        assert (compare_methods("Gemma 3 4B", 800).caption == note) == said


@pytest.mark.parametrize("figsize", [(7, 2), (11, 1.6), (4, 3)])
@pytest.mark.parametrize("has_axis", [True, False])
def test_the_caption_is_inside_the_image_and_overlaps_no_label(figsize, has_axis):
    fig, axes = plt.subplots(1, 2, figsize=figsize, layout="constrained")
    for ax in axes:
        if not has_axis:
            ax.axis("off")
        annotate_outdated(ax, get_provenance() | EARLIER["both"][0])
        ax.set_xlabel("a label that is set later")
    fig.canvas.draw()
    for ax in axes:
        extent = ax.texts[0].get_window_extent()
        whole = fig.bbox
        assert whole.y0 <= extent.y0 and extent.y1 <= whole.y1
        assert whole.x0 <= extent.x0 and extent.x1 <= whole.x1 + 1
        if has_axis:
            assert not extent.overlaps(ax.xaxis.label.get_window_extent())
    first, second = (ax.texts[0].get_window_extent() for ax in axes)
    assert not first.overlaps(second)
