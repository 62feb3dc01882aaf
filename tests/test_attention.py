"""Attention seen without changing the model, maps by five methods on every family, their scores,
and the term that teaches the gaze.
"""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_models import picture_inputs

from mmkit import chat, data, explain, lesions, models
from mmkit.chat.templates import FAMILY_SPECIAL_TOKENS, get_special_tokens, tiny_processor
from mmkit.data.melanoma_pairs import rerender
from mmkit.explain.attention_weights import (
    compute_attention_weights,
    find_attention_modules,
    record_attention,
)
from mmkit.explain.layout import ImageTokenLayout, mask_patches
from mmkit.explain.map_evaluation import (
    deletion_curve,
    localization_metrics,
    make_center_prior,
    patch_image_tokens,
)
from mmkit.explain.maps import (
    compute_gradcam,
    compute_occlusion,
    compute_target_scores,
    token_logprobs,
)
from mmkit.explain.plots import plot_head_grid
from mmkit.explain.supervision import attention_supervision_loss
from mmkit.explain.words import WordAttributions, attribute_words, join_tokens_to_words
from mmkit.lesions.lesion import IMAGE_SIZE
from mmkit.models.modes import frozen_eval_mode
from mmkit.models.parts import part_of
from mmkit.models.tiny import TINY_CONFIGS

TEXTUAL, ALL = ("gemma3", "llava", "qwen2_vl", "mllama", "blip2"), tuple(TINY_CONFIGS)
PX = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))


def case(family, seed=0):
    m, b = models.tiny_random_model(family, seed=seed), picture_inputs(family, PX)
    T = b["input_ids"].shape[1]
    return m, b, None if family in ("clip", "siglip") else [T - 3, T - 2]


def outputs(m, b):
    with torch.no_grad():
        out = m(**b)
    return out.logits_per_image if "logits_per_image" in out else out.logits


@pytest.fixture(scope="module")
def drawn():
    return data.load_melanoma_pairs(24, seed=77)


@pytest.fixture(scope="module")
def shipped():
    return models.load()


# --- watching
@pytest.mark.parametrize("family", ALL)
def test_weights_are_eagers_and_nothing_changes(family):
    """What is seen is what transformers' eager setting hands out, module by module; outputs are
    the same bits, also when the weights carry gradients they agree.
    """
    m, b, _ = case(family)
    before, seen, kept = outputs(m, b), {}, [mod.config for _, mod in find_attention_modules(m)]
    with record_attention(m, lambda n, w: seen.setdefault(n, w()), ("text", "projector", "vision")):
        assert torch.equal(before, outputs(m, b))
    assert len(seen) == len(find_attention_modules(m))
    assert all(mod.config is c for (_, mod), c in zip(find_attention_modules(m), kept)) and all(
        not hasattr(c, "recorder") for c in kept
    )
    eager, hooks = {}, []
    m.set_attn_implementation("eager")

    def keep(n):
        def hook(mod, args, out):
            if isinstance(out, tuple) and torch.is_tensor(out[1]):
                eager.setdefault(n, out[1])

        return hook

    for n, mod in find_attention_modules(m):
        hooks.append(mod.register_forward_hook(keep(n)))
    outputs(m, b)
    for h in hooks:
        h.remove()
    assert {n for n in seen if part_of(n) != "vision"} <= set(eager) and (
        set(seen) <= set(eager) or family == "qwen2_vl"
    )  # its tower keeps its weights to itself
    for n in set(seen) & set(eager):
        torch.testing.assert_close(seen[n], eager[n].float(), atol=1e-5, rtol=1e-4)
    tables = []
    with record_attention(
        m, lambda n, w: tables.append(w), ("text", "projector", "vision"), with_grad=True
    ):
        torch.testing.assert_close(outputs(m, b), before, atol=1e-4, rtol=1e-4)
    assert all(torch.allclose(t.sum(-1), torch.ones(()), atol=1e-4) for t in tables)


def test_nothing_stays_after_an_error():
    m, b, _ = case("gemma3")
    kept = [mod.config for _, mod in find_attention_modules(m)]
    with pytest.raises(ZeroDivisionError), record_attention(m, lambda n, w: 1 / 0):
        outputs(m, b)
    with pytest.raises(ZeroDivisionError), frozen_eval_mode(m.train()):
        _ = 1 / 0
    assert (
        m.training
        and all(p.requires_grad for p in m.parameters())
        and all(mod.config is c for (_, mod), c in zip(find_attention_modules(m), kept))
    )


@pytest.mark.parametrize("name", list(explain.ATTRIBUTION_METHODS))
def test_a_method_leaves_the_model_as_it_was(name):
    m, b, at = case("gemma3")
    m.train()
    frozen = next(m.parameters())
    frozen.requires_grad_(False)
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)

    def hooks():
        return sum(
            len(mod._forward_hooks) + len(mod._forward_pre_hooks) + len(mod._backward_hooks)
            for mod in m.modules()
        )

    held, kept = hooks(), [mod.config for _, mod in find_attention_modules(m)]
    explain.ATTRIBUTION_METHODS[name](m, b, at)
    assert (
        torch.rand(1) == drawn
        and m.training
        and not frozen.requires_grad
        and sum(p.requires_grad for p in m.parameters()) == len(list(m.parameters())) - 1
    )
    assert (
        hooks() == held
        and all(mod.config is c for (_, mod), c in zip(find_attention_modules(m), kept))
        and all(p.grad is None for p in m.parameters())
    )


def test_only_the_asked_rows_are_held(monkeypatch):
    "Raw attention never makes a T × T table."
    m, b, at = case("gemma3")
    shapes, real = [], compute_attention_weights

    def spy(*args, **kw):
        out = real(*args, **kw)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr("mmkit.explain.attention_weights.compute_attention_weights", spy)
    explain.compute_attention(m, b, at)
    assert shapes == [(1, 2, 2, b["input_ids"].shape[1])] * 2


@pytest.mark.parametrize("mask", ["none", "bool", "added", "flat"])
def test_probabilities_read_every_kind_of_mask(mask):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 5, 8, generator=g), torch.randn(1, 2, 5, 8, generator=g)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    said = dict(
        none=None,
        bool=causal[None, None],
        added=torch.zeros(1, 1, 5, 5).masked_fill(~causal, torch.finfo(torch.float32).min),
        flat=torch.tensor([[1, 1, 1, 0, 0]]),
    )[mask]
    z = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    want = z.masked_fill(
        ~(causal if mask != "flat" else said.bool()[:, None, None]), -torch.inf
    ).softmax(-1)
    got = compute_attention_weights(torch.nn.Module(), q, k, said)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        compute_attention_weights(torch.nn.Module(), q, k, said, rows=torch.tensor([1, 4])),
        want[:, :, [1, 4]],
    )
    torch.testing.assert_close(
        compute_attention_weights(torch.nn.Module(), q, k, causal[None, None], softcap=2.0),
        (2 * torch.tanh(z / 2)).masked_fill(~causal, -torch.inf).softmax(-1),
    )
    assert (
        compute_attention_weights(
            torch.nn.Module(), q, k, torch.zeros(1, 1, 5, 5, dtype=torch.bool)
        )
        .abs()
        .sum()
        == 0
    )  # may see nothing: nothing, not nan


# --- every method, every family
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", list(explain.ATTRIBUTION_METHODS))
def test_every_method_on_every_family(family, name):
    m, b, at = case(family)
    if name == "attention" and at is None:
        with pytest.raises(ValueError, match="only compares"):
            explain.compute_attention(m, b, at)
        return
    got = explain.ATTRIBUTION_METHODS[name](m, b, at)
    s = ImageTokenLayout(m, b)
    assert (
        got.shape[-2:] in (s.token_grid, s.patch_grid)
        and got.shape[-3] == (1 if at is None else 2)
        and torch.isfinite(got).all()
        and (got >= 0).all()
        and got.sum() > 0
    )
    blank = explain.ATTRIBUTION_METHODS[name](m, b | dict(pixel_values=b["pixel_values"] * 0), at)
    assert not torch.equal(got, blank)  # another picture, another map


@pytest.mark.parametrize("family", ALL)
def test_every_picture_on_every_family(family):
    plt.close("all")  # those of other tests
    m, b, at = case(family)
    names = [n for n in explain.ATTRIBUTION_METHODS if not (n == "attention" and at is None)]
    maps = {n: explain.ATTRIBUTION_METHODS[n](m, b, at).numpy() for n in names}
    words = [" lesion"] if at is None else [" a", " $lesion"]
    if "attention" in maps:
        maps["attention"] = np.moveaxis(maps["attention"], 2, 0)
    seen = WordAttributions(
        Image.fromarray((PX.permute(1, 2, 0).sigmoid() * 255).byte().numpy()),
        words,
        [True] * len(words),
        maps,
        {0: np.tri(32, dtype=bool)},
        {0: "dots"},
        family,
    )
    for n in names:
        explain.plot_word_map(seen, 0, n)
        explain.plot_filmstrip(seen, n)
        explain.compare_maps(seen, seen, [0], n)
    if "attention" in maps:
        plot_head_grid(seen, 0)
    figures = [plt.figure(k) for k in plt.get_fignums()]
    assert len(figures) >= len(names)
    for figure in figures:
        figure.canvas.draw()
        assert any(ax.images for ax in figure.axes), figure.get_suptitle()
    plt.close("all")


@pytest.mark.parametrize("family", TEXTUAL)
@pytest.mark.parametrize("tower", [False, True])
def test_batched_gradients_are_those_of_one_word_at_a_time(family, tower):
    m, b, at = case(family)
    one = torch.cat([explain.compute_relevancy(m, b, [k], tower, batched=False) for k in at])
    torch.testing.assert_close(
        explain.compute_relevancy(m, b, at, tower), one, atol=1e-7, rtol=1e-4
    )
    torch.testing.assert_close(
        explain.compute_relevancy(m, b, at, tower, max_bytes=3e4), one, atol=1e-7, rtol=1e-4
    )  # a little at a time


def test_relevancy_through_the_tower_is_the_full_matrix_product():
    """Against Chefer's own order of things: whole matrices from the first layer up, the tower's,
    the pooling's, the text's.
    """
    m, b, at = case("gemma3")
    tables = []
    with record_attention(
        m, lambda n, A: tables.append((n, A)), ("text", "vision"), with_grad=True
    ):
        y = m(**b).logits[0, at[0]].log_softmax(-1)[b["input_ids"][0, at[0] + 1]]
        g = torch.autograd.grad(y, [A for _, A in tables])
    bars = {n: (A * gi)[0].clamp(min=0).mean(0).detach() for (n, A), gi in zip(tables, g)}

    def product(part):
        A = [v for n, v in bars.items() if part_of(n) == part]
        R = torch.eye(len(A[0]))
        for x in A:
            R = R + x @ R
        return R

    pool = torch.zeros(4, 16)
    for y_ in range(4):
        for x_ in range(4):
            pool[2 * (y_ // 2) + x_ // 2, 4 * y_ + x_] = 0.25
    want = product("text")[at[0]][ImageTokenLayout(m, b).image_positions] @ pool @ product("vision")
    torch.testing.assert_close(
        explain.compute_relevancy(m, b, at[:1])[0], want.view(4, 4), atol=1e-7, rtol=1e-4
    )


def test_gradcam_is_its_definition():
    m, b, at = case("llava")
    kept = []
    h = m.model.vision_tower.encoder.layers[-1].register_forward_hook(
        lambda mod, i, o: kept.append(o[0] if isinstance(o, tuple) else o)
    )
    y = m(**b).logits[0, at[0]].log_softmax(-1)[b["input_ids"][0, at[0] + 1]]
    (g,) = torch.autograd.grad(y, kept)
    h.remove()
    want = (kept[0][0] * g[0].mean(0)).sum(-1).clamp(min=0)[1:].view(4, 4).detach()
    torch.testing.assert_close(compute_gradcam(m, b, at)[0], want)


def plain_hidden(
    family, cell
):  # the 32 × 32 picture with an 8 × 8 patch at 0, as the family takes it
    px = PX.clone()
    y, x = cell
    px[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 0
    return picture_inputs(family, px)


@pytest.mark.parametrize("family", ALL)
def test_hiding_a_patch_hides_its_pixels_and_occlusion_is_the_fall(family):
    m, b, at = case(family)
    s = ImageTokenLayout(m, b)
    keep = torch.ones(16, 4, 4)
    keep[torch.arange(16), torch.arange(16) // 4, torch.arange(16) % 4] = 0
    hid = mask_patches(s, b["pixel_values"], keep)
    for k in (0, 6, 11):
        want = plain_hidden(family, divmod(k, 4))["pixel_values"]
        assert torch.equal(
            hid[16 * k : 16 * k + 16] if family == "qwen2_vl" else hid[k : k + 1], want
        )

    def said(b):
        return compute_target_scores(s, m(**b), at).detach()

    got = compute_occlusion(m, b, at, grid_size=(4, 4), batch_size=5)
    for k in (0, 6, 11):
        torch.testing.assert_close(
            got[:, k // 4, k % 4],
            said(b) - said(plain_hidden(family, divmod(k, 4))),
            atol=2e-5,
            rtol=1e-4,
        )


def test_tiles_stand_where_they_were_cut():
    """Four tiles of Llama 3.2 Vision: a bright corner of the picture, cut by its own processor, is
    found again in its corner of the grid.
    """
    m, p = (
        models.tiny_random_model("mllama", vocab_size=1024),
        tiny_processor("mllama", max_image_tiles=4),
    )
    m.config.vision_config.max_num_tiles = 4
    m.config.vision_config.supported_aspect_ratios = [
        [1, 1],
        [1, 2],
        [1, 3],
        [1, 4],
        [2, 1],
        [2, 2],
        [3, 1],
        [4, 1],
    ]
    for y, x in ((0, 0), (0, 5), (6, 1), (7, 7)):
        img = np.zeros((64, 64, 3), np.uint8)
        img[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 255
        b = chat.encode_example(p, img, "What is it?", "a lesion")
        s = ImageTokenLayout(m, b)
        assert s.tile_grid == (2, 2) and s.token_grid == (8, 8)
        tile, inner = 2 * (y // 4) + x // 4, 1 + 4 * (y % 4) + x % 4
        v = torch.zeros(4, 17)
        v[tile, inner] = 1
        assert divmod(int(s.to_grid(v.flatten()).argmax()), 8) == (y, x)
        keep = torch.zeros(1, 8, 8)
        keep[0, y, x] = 1
        light, shown = b["pixel_values"].max(), mask_patches(s, b["pixel_values"], keep)
        assert (shown == light).sum() == 3 * 64 and (shown != 0).sum() == 3 * 64


def test_refusals():
    m, b, at = case("gemma3")
    with pytest.raises(ValueError, match="2 rows"):
        ImageTokenLayout(m, {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in b.items()})
    with pytest.raises(ValueError, match="no image"):
        ImageTokenLayout(m, {k: v for k, v in b.items() if k != "pixel_values"})
    with pytest.raises(ValueError, match="form no square"):
        ImageTokenLayout(m, b | dict(input_ids=torch.tensor([[1, 3, 3, 7, 8, 9]])))
    with pytest.raises(ValueError, match="do not fit"):
        compute_occlusion(m, b, at, grid_size=(3, 3))
    with pytest.raises(ValueError, match="attention tables"):
        explain.compute_relevancy(m, b, at, max_bytes=100)
    with pytest.raises(ValueError, match="qwen2vl|qwen2_vl"):
        patch_image_tokens(*case("qwen2_vl")[:2], None, [3], None)
    seen = WordAttributions(
        Image.new("RGB", (8, 8)), [" a"], [False], {"rollout": np.ones((1, 2, 2))}
    )
    for f, said in (
        (lambda: seen.mean_maps("rolout"), "'rollout'"),
        (lambda: seen.find_words("veil"), "'veil'"),
        (lambda: explain.plot_filmstrip(seen, "rollout"), "no words"),
        (lambda: plot_head_grid(seen, 0), "no raw attention"),
        (
            lambda: explain.compare_maps(
                seen, WordAttributions(seen.image, [" b"], [True], seen.maps), [0], "rollout"
            ),
            "different words",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            f()


# --- look
@pytest.mark.parametrize("family", list(FAMILY_SPECIAL_TOKENS))
def test_look_at_every_family_that_speaks(family, drawn):
    """One call, from a record to words, maps and truth; words are the text; the model's own answer
    where none is given.
    """
    m, p = models.tiny_random_model(family, vocab_size=1024), tiny_processor(family)
    seen = attribute_words(m, p, drawn[0], drawn[0]["caption"], tuple(explain.ATTRIBUTION_METHODS))
    assert "".join(w for w, on in zip(seen.words, seen.in_answer) if on).strip() == drawn[0][
        "caption"
    ] and "Describe" in "".join(w for w, on in zip(seen.words, seen.in_answer) if not on)
    assert not any(
        t in "".join(seen.words) for t in get_special_tokens(p.tokenizer)
    ) and seen.image.size == ((64, 64) if family == "qwen2_vl" else (32, 32))
    for n, x in seen.maps.items():
        assert (
            len(x) == len(seen.words)
            and x.ndim == (5 if n == "attention" else 3)
            and np.isfinite(seen.mean_maps(n)[-2]).all()
        )
    assert (
        seen.truth
        and all(v.any() for v in seen.truth.values())
        and set(seen.truth) == set(seen.structure_names)
    )
    own = attribute_words(
        m, p, drawn[0]["image"], methods=("attention",), only="answer", max_new_tokens=3
    )
    assert any(own.in_answer) and not own.truth
    assert all(
        np.isnan(own.mean_maps("attention")[k]).all()
        for k, on in enumerate(own.in_answer)
        if not on
    )


def test_words_name_their_own_masks(shipped, drawn):
    for r in drawn:
        seen, t = attribute_words(*shipped, r, r["caption"], (), "structures"), rerender(r)
        for k, name in seen.structure_names.items():
            want = t.structure_masks.get(name, t.mask)
            assert (seen.truth[k] == want).all()
            if name in ("dots", "globules", "streaks"):
                assert seen.words[k].strip(" .,") == name
        assert {n for n in seen.structure_names.values() if n in t.structure_masks} <= {
            n for n, m in t.structure_masks.items() if m.any()
        }


def test_looks_maps_are_the_methods(shipped, drawn):
    m, p = shipped
    r = drawn[1]
    seen = attribute_words(m, p, r, r["caption"], ("relevancy", "attention"), "answer")
    b = {
        k: v
        for k, v in chat.encode_example(p, r["image"], answer=r["caption"]).items()
        if k != "labels"
    }
    groups = join_tokens_to_words(p, b["input_ids"][0])[0]
    k = seen.find_words("shows", "is", "has", "with")[0]
    want = explain.compute_relevancy(m, b, [t - 1 for t in groups[k]]).mean(0)
    np.testing.assert_allclose(seen.maps["relevancy"][k], want, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        seen.maps["attention"][k],
        explain.compute_attention(m, b, [t - 1 for t in groups[k]]).mean(2),
        rtol=1e-4,
        atol=1e-6,
    )


def test_lora_and_four_bits(drawn):
    """peft's wrapping changes nothing at its start; a quantised model takes one backward pass a
    word.
    """
    m, p = models.load()
    r = drawn[2]
    b = {
        k: v
        for k, v in chat.encode_example(p, r["image"], answer=r["caption"]).items()
        if k != "labels"
    }
    want = explain.compute_relevancy(m, b, [60, 61])
    torch.testing.assert_close(
        explain.compute_relevancy(models.add_lora(models.load()[0], 4), b, [60, 61]),
        want,
        atol=1e-7,
        rtol=1e-4,
    )
    pytest.importorskip("bitsandbytes")
    q = models.load(quantize="nf4")[0]
    got = explain.compute_relevancy(q, b, [60, 61])
    assert torch.isfinite(got).all() and np.corrcoef(got.flatten(), want.flatten())[0, 1] > 0.5


# --- scores
@settings(max_examples=40, deadline=None)
@given(arrays(bool, (12, 12)).filter(lambda m: 0 < m.sum() < m.size), st.integers(0, 99))
def test_a_perfect_map_wins_and_its_opposite_loses(mask, seed):
    got, bad = (
        localization_metrics(mask.astype(float), mask),
        localization_metrics(1.0 - mask, mask),
    )
    assert (
        got == pytest.approx(dict(hit=1, auc=1, iou=1, inside=np.nan), nan_ok=True)
        and bad["hit"] == 0
        and bad["auc"] == 0
    )
    m = np.random.default_rng(seed).random((12, 12))
    j = localization_metrics(m, mask, np.ones_like(mask))
    assert (
        j["auc"]
        == pytest.approx(roc_auc_score(mask.ravel(), m.ravel()))
        == pytest.approx(j["inside"])
        and j["hit"] == mask.flat[m.argmax()]
    )
    top = m >= np.sort(m, None)[-mask.sum()]
    assert j["iou"] == pytest.approx((top & mask).sum() / (top | mask).sum())


def test_a_map_of_nothing_points_nowhere():
    assert localization_metrics(np.full((6, 6), np.nan), np.ones((12, 12), bool)) == dict(
        hit=0.0, auc=0.5, iou=0.0, inside=0.5
    )


def test_centre_prior():
    c = make_center_prior(9, 9)
    assert (
        np.unravel_index(c.argmax(), c.shape) == (4, 4)
        and np.allclose(c, c[::-1])
        and np.allclose(c, c.T)
        and make_center_prior(8, 8, 0.1).sum() < make_center_prior(8, 8).sum()
    )


def test_shuffled_weights_are_the_same_numbers_elsewhere():
    m = models.tiny_random_model("gemma3")
    before = {n: p.clone() for n, p in m.named_parameters()}
    s = explain.randomize_weights(m, 1)
    for n, p in s.named_parameters():
        assert torch.equal(
            before[n].flatten().sort().values, p.flatten().sort().values
        ) and torch.equal(before[n], dict(m.named_parameters())[n])
        if p.numel() > 200 and p.std() > 0:
            assert torch.equal(before[n], p) == (part_of(n) == "vision"), n


def test_pointing_scores_each_structure_once(shipped, drawn):
    looks = [
        attribute_words(*shipped, r, r["caption"], ("attention",), "structures")
        for r in list(drawn)[:6]
    ]
    for s in looks:
        s.maps["truth"] = np.stack(
            [
                s.truth.get(k, np.zeros((IMAGE_SIZE, IMAGE_SIZE))).astype(float)
                for k in range(len(s.words))
            ]
        )
    rows = explain.evaluate_pointing(looks, "truth")
    assert rows and all(r["hit"] == 1 and r["auc"] == 1 and r["iou"] == 1 for r in rows)
    want = sum(
        len({n for n in s.structure_names.values() if n in lesions.STRUCTURES}) for s in looks
    )
    assert len(rows) == len(explain.evaluate_pointing(looks, "centre")) == want
    first, again, other = [explain.evaluate_pointing(looks, "random", seed) for seed in (1, 1, 2)]
    assert len(first) == want
    assert str(first) == str(again) != str(other)  # as text: nan is no equal of itself
    explain.plot_pointing(
        dict(truth=rows, centre=explain.evaluate_pointing(looks, "centre")),
        ("hit", "inside", "iou"),
    )
    plt.close("all")


def test_deletion_starts_whole_and_ends_with_nothing(shipped, drawn):
    m, p = shipped
    r = drawn[3]
    b = {
        k: v
        for k, v in chat.encode_example(p, r["image"], answer=r["caption"]).items()
        if k != "labels"
    }
    layout = ImageTokenLayout(m, b)
    tokens, patches = layout.token_grid, layout.patch_grid
    one, none = torch.ones(1, *patches), torch.zeros(1, *patches)
    at = b["input_ids"].shape[1] - 12  # in the answer
    x, lp = deletion_curve(m, b, at, np.random.default_rng(0).random(tokens))
    x2, back = deletion_curve(m, b, at, np.ones(tokens), insert=True)
    assert list(x) == list(x2) and x[0] == 0 and x[-1] == 1
    for got, keep in ((lp[0], one), (lp[-1], none), (back[0], none), (back[-1], one)):
        assert got == pytest.approx(float(token_logprobs(m, b, [at], keep)[0, 0]), abs=1e-4)
    k = patches[0] // tokens[0]  # patches along a token's side
    first = torch.ones(1, *patches)
    first[0, :k, 2 * k : 3 * k] = 0
    mm = np.zeros(tokens)
    mm[0, 2] = 1
    assert deletion_curve(m, b, at, mm, num_steps=mm.size)[1][1] == pytest.approx(
        float(token_logprobs(m, b, [at], first)[0, 0]), abs=1e-4
    )


# --- tokens from another picture, and the gaze
def test_swapped_tokens(shipped, drawn):
    m, p = shipped
    r = drawn[4]
    b = {
        k: v
        for k, v in chat.encode_example(p, r["image"], answer=r["caption"]).items()
        if k != "labels"
    }
    other = chat.images_to_pixel_values(p, [drawn[5]["image"]])
    length = b["input_ids"].shape[1]
    at = [length - 12, length - 8]  # in the answer
    upper_half = torch.zeros(ImageTokenLayout(m, b).token_grid)
    upper_half[: len(upper_half) // 2] = 1
    got = patch_image_tokens(
        m,
        b,
        other,
        at,
        torch.stack([torch.ones_like(upper_half), torch.zeros_like(upper_half), upper_half]),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            got[:2],
            torch.stack(
                [
                    compute_target_scores(
                        ImageTokenLayout(m, b), m(**b | dict(pixel_values=px)), at
                    )
                    for px in (b["pixel_values"], other)
                ]
            ),
            atol=1e-4,
            rtol=1e-4,
        )
    assert not torch.allclose(got[2], got[0]) and not torch.allclose(got[2], got[1])


def test_carried_counts_the_whole_exchange(shipped, drawn):
    rows = explain.activation_patching(*shipped, list(drawn)[:4])
    assert rows and all(0 < r["tokens"] < 1 and abs(r["loss"]) > 1e-4 for r in rows)
    again = explain.activation_patching(*shipped, list(drawn)[:4], num_draws=1)
    assert [r["on"] for r in again] == pytest.approx([r["on"] for r in rows], abs=1e-5)
    assert np.mean([abs(r["lesion"]) for r in rows]) > 0.5 * np.mean(
        [abs(r["lesion"]) for r in again]
    )  # every draw exchanges something
    assert len(rows) == len({(r["record"], r["structure"]) for r in rows})


def test_gaze_is_the_share_on_the_mask():
    w = torch.tensor([[[0.2, 0.1, 0.1, 0.0]], [[0.0, 0.3, 0.1, 0.4]]])
    on = torch.tensor([[True, True, False, False]])
    assert float(attention_supervision_loss(w, on)) == pytest.approx(-np.log((0.75 + 0.375) / 2))


def test_supervision_moves_the_gaze_and_only_with_its_weight(drawn):
    learn = list(drawn)[:12]
    off, plain = explain.fit_with_attention_supervision(
        models.load()[0],
        models.load()[1],
        learn,
        supervision_weight=0.0,
        max_steps=10,
        batch_size=4,
    )
    m, with_gaze = explain.fit_with_attention_supervision(
        models.load()[0],
        models.load()[1],
        learn,
        supervision_weight=4.0,
        max_steps=10,
        batch_size=4,
    )
    assert (
        with_gaze["gaze"][0] == pytest.approx(plain["gaze"][0], abs=1e-5)
        and np.mean(with_gaze["gaze"][-3:]) < np.mean(plain["gaze"][-3:]) - 0.01
    )
    assert not m.training and all(
        "recorder" not in vars(mod.config) for _, mod in find_attention_modules(m)
    )
