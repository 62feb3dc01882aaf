"Maps, dominance and the checks of a batch on every model family."

import numpy as np
import pytest
import torch
from families import TILE, make_family
from test_families import GENERATES, draw_image
from test_family_calls import WRITES_THE_IMAGE, make_records

from mmkit.chat.collator import Collator
from mmkit.chat.images import compute_image_grids, denormalize_images
from mmkit.chat.validation import find_batch_errors
from mmkit.explain.ablation import ablate_image, mask_inputs, mask_text
from mmkit.explain.attention_weights import find_attention_modules
from mmkit.explain.layout import ImageTokenLayout, mask_patches
from mmkit.explain.maps import ATTRIBUTION_METHODS
from mmkit.explain.monitor import ModalityMonitor
from mmkit.explain.shapley import mm_shap
from mmkit.explain.words import attribute_words
from mmkit.models.family import get_image_token_id
from mmkit.models.parts import part_of


@pytest.mark.parametrize("name", GENERATES)
def test_nothing_is_wrong_with_a_batch_of_any_family(name):
    model, processor = make_family(name)
    batch = Collator(processor)(make_records())
    assert find_batch_errors(batch, processor) == find_batch_errors(batch, model) == []
    if name not in ("mllama", *WRITES_THE_IMAGE):
        cut = batch["input_ids"].clone()
        cut[0, (cut[0] == get_image_token_id(processor)).nonzero()[0]] = 5
        assert find_batch_errors(dict(batch, input_ids=cut), processor)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_tiles_are_put_together_again(name):
    _, processor = make_family(name)
    image = draw_image(2 * TILE, 2 * TILE)
    batch = Collator(processor)([dict(image=image, caption="noise")])
    (seen,) = denormalize_images(batch, processor)
    assert seen.shape == (2 * TILE, 2 * TILE, 3)
    assert np.abs(seen - np.asarray(image).astype(int)).max() <= 1
    assert compute_image_grids(batch, processor) in ([(4, 4)], [(8, 8)])


def test_pan_and_scan_is_refused_where_it_would_be_dropped(monkeypatch):
    _, processor = make_family("gemma3")
    monkeypatch.setattr(processor.image_processor, "do_pan_and_scan", True)
    with pytest.raises(ValueError, match="an image would go in whole"):
        Collator(processor)(make_records())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_dual_encoders_refuse_turns(name):
    model, processor = make_family(name)
    for call in (
        lambda: Collator(processor)(make_records()),
        lambda: attribute_words(model, processor, make_records()[0]),
        lambda: ModalityMonitor(processor, make_records()),
    ):
        with pytest.raises(ValueError, match="compares .*and never speaks"):
            call()


@pytest.mark.parametrize("name", GENERATES)
def test_words_have_a_map_by_every_method(name):
    model, processor = make_family(name)
    record = dict(make_records(2)[1], prompt="What is it?")
    found = attribute_words(
        model, processor, record, record["caption"], tuple(ATTRIBUTION_METHODS), only="answer"
    )
    shown = found.image.size[::-1]
    for method in ATTRIBUTION_METHODS:
        maps = found.mean_maps(method)[found.find_words("blue", "more")]
        assert np.isfinite(maps).all() and (maps.max((1, 2)) > 0).all(), method
        rows, columns = maps.shape[1:]
        assert rows * shown[1] == columns * shown[0], (method, maps.shape, shown)


@pytest.mark.parametrize("name", GENERATES)
def test_a_patch_of_the_encoder_stands_where_the_image_has_it(name):
    model, processor = make_family(name)
    image = draw_image(TILE, 2 * TILE)
    batches = [Collator(processor)([dict(image=image, caption="x")])]
    layout = ImageTokenLayout(model, batches[0])
    rows, columns = layout.patch_grid
    (shown,) = denormalize_images(batches[0], processor)
    height, width = shown.shape[0] // rows, shown.shape[1] // columns
    row, column = 1, columns - 3
    keep = torch.ones(1, rows, columns)
    keep[0, row, column] = 0
    pixel_values = batches[0]["pixel_values"]
    masked = batches[0] | dict(pixel_values=mask_patches(layout, pixel_values, keep))
    (hidden,) = denormalize_images(masked, processor)
    changed = (hidden != shown).any(-1)
    square = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
    assert changed[square].mean() > 0.9
    changed[square] = False
    assert not changed.any()
    states = []
    last = [n for n, _ in find_attention_modules(model) if part_of(n) == "vision"][-1]
    block = model.get_submodule(last.rpartition(".")[0])
    hook = block.register_forward_hook(
        lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for batch in (batches[0], masked):
            model(**batch)
    hook.remove()
    moved = (states[0] - states[1]).norm(dim=-1).reshape(1, -1)
    on_grid = layout.to_grid(moved, from_patches=True)[0]
    assert divmod(int(on_grid.argmax()), columns) == (row, column), on_grid


def test_image_and_prompt_are_measured_alike_with_and_without_the_cache():
    model, processor = make_family("gemma3")
    records = [dict(r, prompt=f"What {k}?") for k, r in enumerate(make_records(4))]
    cached, collated = (ModalityMonitor(processor, records) for _ in range(2))
    assert cached.uses_cache
    collated.uses_cache, collated.asked = False, None
    collated._tokenize("What?")
    cached._tokenize("What?")
    cached, collated = cached._score_cached(model), collated._score_collated(model)
    assert cached.keys() == collated.keys()
    for key in cached:
        assert cached[key] == pytest.approx(collated[key], rel=1e-4)
    assert len(set(cached.values())) == 4


@pytest.mark.parametrize("name", GENERATES)
def test_what_image_and_prompt_contribute_is_measured_in_every_family(name):
    model, processor = make_family(name)
    records = [dict(r, prompt=f"What {k}?") for k, r in enumerate(make_records(3))]
    measured = ModalityMonitor(processor, records, min_gain=0).measure(model)
    assert measured["image gain"] != 0 and measured["text gain"] != 0
    with pytest.raises(ValueError, match="no record has an image"):
        ModalityMonitor(processor, [dict(record, image=None) for record in records])


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "idefics3"])
def test_images_of_other_sizes_are_not_exchanged(name):
    _, processor = make_family(name)
    images = [draw_image(TILE, 2 * TILE), draw_image(2 * TILE, 2 * TILE)]
    batch = Collator(processor)([dict(image=image, caption="x") for image in images])
    for replacement in ("mean", "shuffled"):
        with pytest.raises(ValueError, match="need different numbers of image tokens"):
            ablate_image(batch, replacement)


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "smolvlm"])
def test_regions_of_an_image_in_tiles_are_those_of_the_whole(name):
    model, processor = make_family(name)
    batch = Collator(processor)([dict(image=draw_image(TILE, 2 * TILE), caption="x")])
    regions = np.zeros((1, 1, 2), bool)
    regions[0, 0, 1] = True  # the right half
    no_tokens = np.zeros((1, batch["input_ids"].shape[1]), bool)
    with pytest.raises(ValueError, match="give the model"):
        mask_inputs(batch, no_tokens, regions)
    masked = mask_inputs(batch, no_tokens, regions, model=model)
    (shown,), (hidden,) = (denormalize_images(b, processor) for b in (batch, masked))
    assert (hidden[:, :TILE] == shown[:, :TILE]).all()
    assert len(np.unique(hidden[:, TILE:].reshape(-1, 3), axis=0)) == 1
    model(**masked)  # a tile that is hidden whole is no padding


def test_a_hidden_prompt_is_hidden_from_the_queries_too():
    model, processor = make_family("instructblip")
    batch = Collator(processor)([dict(r, prompt="What is it?") for r in make_records()])
    assert not mask_text(batch, processor)["qformer_input_ids"].any()
    with pytest.raises(ValueError, match="would still be there"):
        mm_shap(model, batch, processor, n_permutations=1)
