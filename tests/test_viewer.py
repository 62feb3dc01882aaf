"The token viewer without a browser: its state, its arithmetic, what it refuses, and its still."

import ast
import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import traitlets
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from mmkit import explain
from mmkit.core.display import VIRIDIS
from mmkit.explain.overlay import enlarge_image, overlay_heatmap, upsample_map
from mmkit.explain.viewer import (
    TokenViewer,
    choose_strip_words,
    describe_map,
    energy_inside_mask,
    pack_for_browser,
    render_overlay,
    render_static_html,
)
from mmkit.explain.viewer_state import (
    ViewState,
    compute_sharpness,
    find_sharpest_word,
    get_vmax,
    max_per_word,
    reduce_heads_and_layers,
    select_map,
)


def look(words=("Describe", " it", ".", " A", " dark", " veil"), label="base", seed=0, **kw):
    rng, n = np.random.default_rng(seed), len(words)
    return SimpleNamespace(
        **dict(
            label=label,
            image=Image.new("RGB", (60, 40), (200, 150, 120)),
            words=list(words),
            in_answer=[False] * 3 + [True] * (n - 3),
            maps={"raw": rng.random((n, 3, 2, 4, 5)), "rollout": rng.random((n, 6, 6))},
            truth={5: np.eye(40, 60) > 0},
        )
        | kw
    )


# ---- arithmetic

pick = st.sampled_from(["mean", "max", 0, 1])


@given(
    arrays(np.float64, (2, 2, 3, 2, 3), elements=st.floats(0, 1e6)),
    pick,
    st.sampled_from(["mean", "max", 0, 2]),
)
def test_reduced_cell_by_cell(m, layer, head):
    def fold(values, which):
        return (
            values[which]
            if isinstance(which, int)
            else (sum(values) / len(values) if which == "mean" else max(values))
        )

    want = [
        [
            [
                fold(
                    [fold([m[n, item, h, y, x] for h in range(3)], head) for item in range(2)],
                    layer,
                )
                for x in range(3)
            ]
            for y in range(2)
        ]
        for n in range(2)
    ]
    np.testing.assert_allclose(reduce_heads_and_layers(m, layer, head), want)


def test_heads_come_before_layers():
    m = np.zeros((1, 2, 2, 1, 1))
    m[0, 0, :, 0, 0], m[0, 1, :, 0, 0] = (0, 4), (3, 3)
    assert (
        reduce_heads_and_layers(m, "max", "mean").item() == 3
        and reduce_heads_and_layers(m, "mean", "max").item() == 3.5
    )


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 99),
)
def test_spread_makes_no_heat(h, w, H, W, smooth, seed):
    m = np.random.default_rng(seed).random((h, w))
    big = upsample_map(m, (H, W), smooth)
    assert big.shape == (H, W) and m.min() - 1e-12 <= big.min() and big.max() <= m.max() + 1e-12
    if not smooth:
        assert np.isin(big, m).all()
    odd = upsample_map(m, (5 * h, 3 * w))
    np.testing.assert_allclose(odd[2::5, 1::3], m, atol=1e-12)  # cells' centres keep their value
    np.testing.assert_allclose(upsample_map(m, (4 * h, 4 * w), False), np.kron(m, np.ones((4, 4))))


def assert_brightest_at(heat, cell, grid, tolerance):
    """The highest pixels lie about the cell's centre: beside an edge they reach from there to it.

    Beyond the outermost centres nothing is known, and the value stays."""
    for axis, (number, count) in enumerate(zip(cell, grid, strict=True)):
        along = heat.max(1 - axis)
        places = (np.flatnonzero(along > along.max() - 1e-6) + 0.5) / len(along)
        centre = (number + 0.5) / count
        low = 0 if number == 0 else centre
        high = 1 if number == count - 1 else centre
        assert abs(places[0] - low) < tolerance and abs(places[-1] - high) < tolerance
        assert abs((places[0] + places[-1]) / 2 - (low + high) / 2) < tolerance / 2


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("image_size", [(128, 128), (160, 120)])
def test_a_hot_cell_is_brightest_at_its_centre(grid, image_size):
    "In both pictures: the pale one with red, and the viewer's; the image is enlarged to 256 px."
    image = Image.new("RGB", image_size, "white")
    one_look = look(image=image, truth={}, maps={"m": np.zeros((6, *grid))})
    for cell in [(0, 0), (0, 4), (3, 5), (6, 1), (5, 6), (grid[0] - 1, grid[1] - 1)]:
        heatmap = np.zeros(grid)
        heatmap[cell] = 0.3
        red = overlay_heatmap(image, heatmap)
        assert min(red.shape[:2]) == 256
        heat = red[..., 0] - red[..., 2]
        assert_brightest_at(heat, cell, grid, 1 / 256)
        from_centre = (np.argwhere(heat > 0) + 0.5) / heat.shape - (np.array(cell) + 0.5) / grid
        assert (np.abs(from_centre) < 1 / np.array(grid)).all()  # at its neighbours' centres: none
        one_look.maps["m"][0] = heatmap
        drawn = np.asarray(render_overlay(one_look, ViewState(one_look, word=0)), float)
        assert max(drawn.shape[:2]) == 480
        highest = 0.2 * 255 + 0.8 * VIRIDIS[255].astype(float)  # full colour on white
        likeness = -np.abs(drawn - highest).sum(-1)
        assert_brightest_at(likeness, cell, grid, 12 / 480)


def test_extremes_are_the_cells_own():
    "Two equal cells side by side are one ridge, as high as they and no higher."
    heatmap = np.zeros((8, 8))
    heatmap[3, 3:5] = 1
    pixels = upsample_map(heatmap, (256, 256))
    assert 0.999 < pixels.max() <= 1 and pixels.min() == 0
    ridge = pixels[111, 112:144]  # from the first centre to the second
    assert (ridge == pixels.max()).sum() > 28 and ridge.min() > 0.99
    signed = upsample_map(heatmap - np.flipud(heatmap), (256, 256))
    assert -1 <= signed.min() < -0.99 and 0.99 < signed.max() <= 1


def test_an_enlarged_image_is_smooth_and_keeps_its_shape():
    edge = Image.fromarray(np.arange(128, dtype=np.uint8)[None].repeat(96, 0) // 64 * 200)
    large = np.asarray(enlarge_image(edge))
    assert large.shape == (256, 341, 3)
    assert len(np.unique(large[:, :, 0])) > 4  # shades between the two
    assert enlarge_image(Image.new("RGB", (500, 300))).size == (500, 300)


@given(arrays(np.float32, (3, 2, 2, 4, 4), elements=st.floats(0, 1e4, width=32) | st.just(np.nan)))
def test_a_byte_a_value_is_close(m):
    sent = pack_for_browser(look("abc", maps={"m": m}, truth={}), ["m"])["maps"]["m"]
    q, top = (
        np.frombuffer(sent["q"], np.uint8).reshape(sent["shape"]),
        np.frombuffer(sent["max"], np.float32).reshape(3, 2, 2, 1, 1),
    )
    back, none = q / 255 * top, ~np.isfinite(m).all((3, 4), keepdims=True)
    assert (np.isnan(top) == none).all()
    assert (np.abs(back - m) <= top * 0.503 / 255 + 1e-30)[~np.broadcast_to(none, m.shape)].all()


def test_sharpness_and_the_first_word():
    assert (
        compute_sharpness(np.ones((3, 3))) == pytest.approx(0)
        and compute_sharpness(np.eye(9)[:1]) == pytest.approx(1)
        and compute_sharpness(np.zeros((3, 3))) == 0
    )
    m = np.ones((4, 2, 2))
    m[0] = [[1, 0], [0, 0]]
    m[2] = [[3, 1], [1, 1]]
    m[3] = np.nan
    assert (
        find_sharpest_word(m, [False, False, True, True]) == 2
        and find_sharpest_word(m, [False] * 4) == 0
    )
    m[0] /= 100
    assert (
        find_sharpest_word(m, [False] * 4) == 2 and find_sharpest_word(m * 0, [True] * 4) == 0
    )  # sharp, and too faint to be a finding


# ---- what the state shows


def test_shown_full_and_scales():
    a, b = look(), look(label="tuned", seed=1)
    b.maps = {k: 3 * v for k, v in b.maps.items()}
    s = ViewState(a, b, word=4, layer=1, head="max")
    np.testing.assert_array_equal(select_map(a, s), a.maps["raw"][4, 1].max(0))
    assert (
        get_vmax(a, s) == get_vmax(b, s) == max(max_per_word(a, s).max(), max_per_word(b, s).max())
    )
    s.scale = "model"
    assert get_vmax(a, s) == max_per_word(a, s).max() != get_vmax(b, s) == max_per_word(b, s).max()
    s.scale = "word"
    assert (
        get_vmax(a, s) == select_map(a, s).max()
        and get_vmax(b, s) == select_map(b, s).max()
        and get_vmax(a, s) != get_vmax(b, s)
    )


def test_no_map_is_said_not_drawn():
    one_look = look()
    one_look.maps["raw"][0], one_look.maps["raw"][1, 1, 0, 2, 2], one_look.maps["raw"][2] = (
        0,
        np.nan,
        np.inf,
    )
    for w in (0, 1, 2):
        s = ViewState(one_look, word=w)
        assert (
            select_map(one_look, s) is None
            and describe_map(one_look, s) == "no map for this word"
            and energy_inside_mask(one_look, s) is None
            and np.isfinite(get_vmax(one_look, s))
        )
        assert (
            np.asarray(render_overlay(one_look, s)) == (200, 150, 120)
        ).all() and "no map" in render_static_html(s)
    s = ViewState(one_look, word=1, layer=0)
    assert select_map(one_look, s) is not None  # the other layers have one
    empty = look(maps={"m": np.zeros((6, 2, 2))})
    s = ViewState(empty)
    assert (
        select_map(empty, s) is None
        and get_vmax(empty, s) == 0
        and TokenViewer(empty)._repr_html_()
    )


def test_inside_counts_parts_of_cells():
    one_look = look(
        maps={"m": np.tile([[1.0, 3.0]], (6, 1, 1))},
        truth={5: np.arange(60)[None].repeat(40, 0) >= 45},
    )
    s = ViewState(one_look, word=5)
    assert energy_inside_mask(one_look, s) == pytest.approx((3 / 8, 1 / 4))
    one_look.truth = {5: np.zeros((40, 60), bool)}
    assert energy_inside_mask(one_look, s) is None
    one_look.truth = {}
    assert energy_inside_mask(one_look, s) is None and "outline" not in describe_map(one_look, s)


def test_overlay_pixels():
    one_look = look(maps={"m": np.array([[[0.0, 1.0]]] * 6)}, truth={})
    s = ViewState(one_look, word=0, opacity=0.5, smooth=False)
    px = np.asarray(render_overlay(one_look, s))
    assert px.shape == (320, 480, 3)
    assert (px[0, 0] == (200, 150, 120)).all() and np.abs(
        px[0, -1] - (0.5 * np.array((200, 150, 120)) + 0.5 * VIRIDIS[255])
    ).max() <= 1
    row = np.asarray(render_overlay(one_look, s))[0]
    assert len(np.unique(row, axis=0)) == 2
    assert ViewState(one_look).smooth  # unless blocks are asked for
    s.smooth = True
    row = np.asarray(render_overlay(one_look, s))[0].astype(int)
    assert len(np.unique(row, axis=0)) > 50
    with_outline = look()
    s = ViewState(with_outline, word=5)
    drawn = np.asarray(render_overlay(with_outline, s))
    s.outline = False
    assert (
        (drawn != np.asarray(render_overlay(with_outline, s))).any()
        and (drawn == 255).all(-1).any()
        and (drawn == 34).all(-1).any()
    )


# ---- the state


def test_python_sets_and_hears():
    v = TokenViewer(look())
    heard = []
    v.observe(lambda c: heard.append((c.name, c.new)))
    v.word = np.int64(2)
    v.head = 1
    v.method = "rollout"
    assert (
        sorted(map(str, heard))
        == sorted(map(str, [("word", 2), ("head", 1), ("method", "rollout"), ("head", "mean")]))
        and type(v.word) is int
    )
    assert TokenViewer(look(), method=None, word=None).method == "raw"


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(word=6), "there are 6 words"),
        (dict(word=-1), "count from 0"),
        (dict(method="rolout"), "there is 'raw', 'rollout'"),
        (dict(layer=3), "'raw' has 3"),
        (dict(head=2), "'raw' has 2"),
        (dict(colour="red"), "no setting 'colour'"),
    ],
)
def test_impossible_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        ViewState(look(), **wrong)
    if "colour" not in wrong:
        s = ViewState(look(), word=0)
        ((name, value),) = wrong.items()
        before = getattr(s, name)
        with pytest.raises(ValueError, match=says):
            setattr(s, name, value)
        assert getattr(s, name) == before


@pytest.mark.parametrize(
    "wrong", [dict(opacity=1.5), dict(layer="median"), dict(scale="own"), dict(word=1.5)]
)
def test_impossible_values(wrong):
    with pytest.raises(traitlets.TraitError):
        ViewState(look(), **wrong)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(words=[]), "at least one"),
        (dict(words=["a", 3, "c", "d", "e", "f"]), "at least one string"),
        (dict(in_answer=[True]), "6 words, but in_answer has 1"),
        (dict(image=np.zeros((4, 4, 3))), "Image.fromarray"),
        (dict(maps={}), "maps is empty"),
        (dict(maps={"m": np.ones((6, 2, 4, 4))}), r"shape \(6, 2, 4, 4\)"),
        (dict(maps={"m": np.ones((5, 4, 4))}), r"for 6 words it should be \(6, h, w\)"),
        (dict(maps={"m": np.ones((6, 0, 4))}), "shape"),
        (dict(maps={"m": np.full((6, 2, 2), -0.5)}), "down to -0.5"),
        (dict(truth={9: np.ones((2, 2))}), r"truth\[9\]"),
        (dict(truth={1: np.ones(4)}), r"truth\[1\]"),
    ],
)
def test_looks_that_cannot_be_shown(wrong, says):
    with pytest.raises(ValueError, match=says):
        TokenViewer(look(**wrong))
    with pytest.raises(ValueError, match="base"):
        TokenViewer(look(label="fine"), look(**wrong))  # the look at fault is named


def test_two_looks_that_do_not_belong_together():
    other = look(words=("Describe", " it", ".", " A", " pale", " veil"), label="tuned")
    with pytest.raises(ValueError, match="word 4 is ' dark' in 'base' and ' pale' in 'tuned'"):
        TokenViewer(look(), other)
    with pytest.raises(ValueError, match="6 words in .* 7 in"):
        TokenViewer(look(), look(words=[*look().words, " more"]))
    with pytest.raises(ValueError, match="no method in common: .*'raw'.*'occlusion'"):
        TokenViewer(look(), look(maps={"occlusion": np.ones((6, 2, 2))}))
    with pytest.raises(ValueError, match="SimpleNamespace has no maps, truth"):
        TokenViewer(SimpleNamespace(label="", image=None, words=[], in_answer=[]))
    v = TokenViewer(look(), look(maps={"rollout": np.ones((6, 2, 2))}, label="tuned"))
    assert v.methods == ["rollout"] and v.method == "rollout"


def test_more_than_a_page_holds(monkeypatch):
    monkeypatch.setattr("mmkit.explain.viewer.MAX_MAP_BYTES", 1000)
    big = look()  # 6*3*2*20 + 6*36 = 936 values
    TokenViewer(big)
    with pytest.raises(
        ValueError, match=r"in 'raw' of shape \(6, 3, 2, 4, 5\).*mean\(2, keepdims=True\)"
    ):
        TokenViewer(big, look(label="tuned"))
    for one_label in (big, other := look(label="tuned")):
        one_label.maps["raw"] = one_label.maps["raw"].mean(2, keepdims=True)  # as it says
    with pytest.raises(ValueError):
        TokenViewer(big, other)
    TokenViewer(big)


# ---- the still


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") or k.startswith("on")]

    def handle_data(self, data):
        self.text += data


nasty = st.lists(
    st.text(
        st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=8
    )
    | st.sampled_from(
        ["<script>alert(1)</script>", " <img src=x onerror=y>", "\"'&amp;", "\n", " "]
    ),
    min_size=3,
    max_size=7,
)


@settings(deadline=None, max_examples=40)
@given(nasty, st.text(max_size=9) | st.sampled_from(["<i>a</i>", '"><script>']))
def test_words_cannot_leave_their_place(words, label):
    page = Seen()
    page.feed(
        render_static_html(
            ViewState(look(words, label=label, truth={0: np.eye(9) > 0}), word=0),
            max_words=2,
            side=20,
        )
    )
    page.close()
    assert set(page.tags) <= {"div", "b", "figure", "figcaption", "img", "br", "span"} and all(
        s.startswith("data:image/jpeg;base64,") for s in page.sources
    )
    assert page.text.startswith("".join(words).replace("\r", "\n"))


def test_still_shows_what_the_state_says():
    v = TokenViewer(look(), look(label="tuned", seed=1), word=0)
    html = v._repr_html_()
    page = Seen()
    page.feed(html)
    words = choose_strip_words(v.attributions_list[0], v)
    assert (
        0 in words and len(words) == 4 and words == sorted(words) and 2 not in words
    )  # not the full stop
    assert (
        len(page.sources) == 8
        and "base" in page.text
        and "tuned" in page.text
        and "one scale for all words" in page.text
    )
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in page.sources]
    assert {p.size for p in pictures} == {(256, 171)}
    for scale in ("word", "model"):
        v.scale = scale
        assert f"every {scale} on a scale of its own" in v._repr_html_() and v._repr_html_() != html
    assert (
        "layer mean, head mean" in html
        and "layer" not in TokenViewer(look(), method="rollout")._repr_html_()
    )


def test_a_person_gets_the_widget_and_a_program_the_still(monkeypatch):
    v = TokenViewer(look())
    assert v.comm is None and set(v._repr_mimebundle_()) == {"text/plain", "text/html"}
    monkeypatch.setattr(
        "mmkit.core.sliders.get_notebook_kernel",
        lambda: SimpleNamespace(shell=SimpleNamespace(user_ns={})),
    )
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    v = TokenViewer(look())
    data, _ = v._repr_mimebundle_()
    assert (
        v.comm is not None
        and "application/vnd.jupyter.widget-view+json" in data
        and "data:image/jpeg" in data["text/html"]
    )
    v.close()


def test_what_the_kernel_sends():
    state = TokenViewer(look()).get_state()
    sent = state["_sent"]
    assert (
        sent["words"] == look().words
        and sent["methods"] == ["raw", "rollout"]
        and sent["panels"][0]["maps"]["rollout"]["shape"] == [6, 1, 1, 6, 6]
    )
    assert (
        Image.open(io.BytesIO(sent["panels"][0]["picture"])).size == (480, 320)
        and len(sent["lut"]) == 768
    )
    assert (
        "innerHTML" not in state["_esm"]
        and "insertAdjacent" not in state["_esm"]
        and "http" not in state["_esm"] + state["_css"]
    )


def test_the_viewer_needs_no_model_library():
    "It shows any object with maps, so neither torch nor transformers is among its imports."
    for module in ("viewer", "viewer_state", "overlay"):
        tree = ast.parse(Path(explain.__file__).with_name(f"{module}.py").read_text("utf-8"))
        imported = {
            name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if name
        }
        assert not imported & {"torch", "transformers", "matplotlib", "maps", "words"}
