"What is asked of a model family, on small models of the real classes."

import numpy as np
import pytest
import torch
from families import MAKERS, TILE, encode, make_family
from PIL import Image

from mmkit.chat.collator import pad_batch
from mmkit.explain.ablation import ablate_image
from mmkit.explain.layout import ImageTokenLayout
from mmkit.models.families import FAMILIES, find_family
from mmkit.models.family import get_image_token_id
from mmkit.models.features import embed_images, embed_texts
from mmkit.models.modes import unwrap_model
from mmkit.models.parts import part_of

GENERATES = [name for name in MAKERS if name not in ("clip", "siglip")]
# family -> the grid of an image of 32 × 64 pixels (high × wide), its tiles, its tokens in the text
WIDE_IMAGES = dict(
    gemma3=((2, 2), (1, 1), 4),
    llava=((4, 4), (1, 1), 16),
    llava_next=((4, 8), (1, 2), 4 * 4 + 4 * 9),
    qwen2_vl=((2, 4), (1, 1), 8),
    qwen2_5_vl=((2, 4), (1, 1), 8),
    qwen3_vl=((2, 4), (1, 1), 8),
    idefics3=((2, 4), (1, 2), 3 * 4),
    smolvlm=((2, 4), (1, 2), 3 * 4),
    paligemma=((4, 4), (1, 1), 16),
    mllama=((4, 4), (1, 1), 1),
    blip2=(None, (1, 1), 4),
    instructblip=(None, (1, 1), 4),
    clip=((4, 4), (1, 1), 0),
    siglip=((4, 4), (1, 1), 0),
)


def draw_image(height, width, seed=0):
    "Noise, so that no two places are alike."
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def wide_batch(processor, num_rows=2):
    return encode(processor, [draw_image(TILE, 2 * TILE, seed) for seed in range(num_rows)])


def model_inputs(model, batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def test_every_family_has_a_row_here():
    known = {find_family(make_family(name)[0]).name for name in MAKERS}
    assert known == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", MAKERS)
def test_model_configuration_and_processor_name_the_same_family(name):
    model, processor = make_family(name)
    assert find_family(model) is find_family(model.config) is find_family(processor)


def test_an_unknown_family_is_refused_by_what_would_be_wrong():
    with pytest.raises(ValueError, match="image tokens would be looked for in the wrong places"):
        find_family(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", MAKERS)
def test_parts_are_found_and_hold_the_parameters_that_bear_their_name(name):
    model, _ = make_family(name)
    family = find_family(model)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = {}
    for part in ("text", "vision", "projector"):  # the projector may sit inside another part
        for module in family.modules(model, part):
            is_module = isinstance(module, torch.nn.Module)
            for parameter in module.parameters() if is_module else [module]:
                found[names[id(parameter)]] = part
    assert set(found.values()) == {"vision", "projector", "text"}
    assert {key: part_of(key) for key in found} == found
    heads = family.modules(model, "head")
    assert [head is model.get_output_embeddings() for head in heads] == [True] * len(heads)
    assert bool(heads) == family.generates
    missing = set(names.values()) - set(found)
    assert all(key.rpartition(".")[0].endswith("lm_head") for key in missing), missing


@pytest.mark.parametrize("name", MAKERS)
def test_image_tokens_have_their_grid(name):
    model, processor = make_family(name)
    batch, family = wide_batch(processor), find_family(model)
    grid, tiles, num_tokens = WIDE_IMAGES[name]
    images = family.image_tokens(batch, model)
    assert [image.row for image in images] == [0, 1]
    assert [image.grid for image in images] == [grid] * 2
    assert [image.tiles for image in images] == [tiles] * 2
    if num_tokens:
        is_image = batch["input_ids"] == get_image_token_id(model)
        assert is_image.sum(1).tolist() == [num_tokens] * 2
    if not family.tokens_in_text:
        assert all(len(image.positions) == 0 for image in images)
        return
    for image in images:
        assert is_image[image.row, image.positions].all()
        assert len(image.positions.unique()) == len(image.positions)
        assert grid is None or len(image.positions) == grid[0] * grid[1]
    if name != "mllama":
        of_processor = family.image_tokens(batch, processor)
        assert all(
            torch.equal(a.positions, b.positions) for a, b in zip(images, of_processor, strict=True)
        )


@pytest.mark.parametrize("name", ["gemma3", "llava", "llava_next", "qwen2_vl", "paligemma"])
def test_images_without_tokens_in_the_text_are_refused(name):
    model, processor = make_family(name)
    batch = wide_batch(processor)
    batch["input_ids"][batch["input_ids"] == get_image_token_id(model)] = 5
    with pytest.raises(ValueError, match="the text has 0 image tokens, but its 2 images need"):
        find_family(model).image_tokens(batch, model)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_a_token_changes_when_its_own_place_of_the_image_changes(name):
    "The place is taken from the model: the token that moves most is the one of that place."
    model, processor = make_family(name)
    family = find_family(model)
    image = draw_image(TILE, 2 * TILE)
    batch = encode(processor, [image])
    tokens = family.image_tokens(batch, model)[0]
    rows, columns = tokens.grid
    row, column = rows - 1, columns // 2  # the first column of the right half
    changed = np.array(image)
    height, width = TILE // rows, 2 * TILE // columns
    square = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
    changed[square] = 255 - changed[square]
    is_image = batch["input_ids"][0] == get_image_token_id(model)

    def embed(batch):
        encoded = family.encode_images(model, batch).pooler_output
        of_image = encoded[0] if not torch.is_tensor(encoded) else encoded.flatten(0, -2)
        in_text = torch.zeros(len(is_image), of_image.shape[-1])
        in_text[is_image] = of_image
        return in_text[tokens.positions]

    with torch.no_grad():
        before, after = embed(batch), embed(encode(processor, [Image.fromarray(changed)]))
    moved = (after - before).norm(dim=1).reshape(rows, columns)
    assert divmod(int(moved.argmax()), columns) == (row, column), moved


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_maps_of_an_image_in_two_by_eight_tokens_have_that_grid(name):
    model, processor = make_family(name)
    batch = encode(processor, [draw_image(32, 128)])
    layout = ImageTokenLayout(model, batch)
    assert layout.token_grid == (2, 8)
    assert layout.patch_grid == (4, 16)
    assert layout.to_grid(torch.arange(16))[1].tolist() == list(range(8, 16))


def test_maps_of_tiles_are_in_the_order_of_the_image():
    model, processor = make_family("idefics3")
    batch = encode(processor, [draw_image(TILE, 2 * TILE)])
    layout = ImageTokenLayout(model, batch)
    assert layout.token_grid == (2, 4)
    first_line = layout.image_positions[:4]
    assert (first_line.diff() > 1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", GENERATES)
def test_encoded_images_give_the_logits_of_pixels(name):
    model, processor = make_family(name)
    family = find_family(model)
    batch = wide_batch(processor)
    types = family.token_types(batch["input_ids"], get_image_token_id(model))
    batch |= {key: value for key, value in types.items() if key not in batch}
    with torch.no_grad():
        encoded = family.encode_images(model, batch)
        expected = model(**batch, use_cache=False).logits
        logits = model(**family.with_encoded_images(batch, encoded), use_cache=False).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_embeddings_are_one_vector_for_each_image_and_text(name):
    model, processor = make_family(name)
    family = find_family(model)
    batch = wide_batch(processor, 3)
    with torch.no_grad():
        of_images = family.embed_images(model, batch)
        texts = processor.tokenizer(["red", "a blue net"], padding=True, return_tensors="pt")
        of_texts = embed_texts(model, texts["input_ids"], texts["attention_mask"])
    assert of_images.shape == (3, 64)
    assert of_texts.shape == (2, 64)
    assert not torch.equal(of_images[0], of_images[1])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_embed_images_of_a_dual_encoder_has_a_vector_for_each_image(name):
    model, processor = make_family(name)
    batch = wide_batch(processor, 3)
    with torch.no_grad():
        assert embed_images(model, batch["pixel_values"]).shape == (3, 64)


def test_paligemma_answers_do_not_see_their_own_future():
    model, processor = make_family("paligemma")
    family = find_family(processor)
    image_ids = [3] * 16
    example = dict(
        input_ids=[*image_ids, 20, 21, 30, 31, 32, 2], labels=[-100] * 18 + [30, 31, 32, 2]
    )
    batch = pad_batch(processor, [example])
    assert batch["token_type_ids"].tolist() == [[0] * 18 + [1] * 4]
    pixels = torch.randn(1, 3, TILE, TILE)
    other = batch["input_ids"].clone()
    other[0, -2] = 40  # a later word of the answer
    with torch.no_grad():
        inputs = dict(pixel_values=pixels, token_type_ids=batch["token_type_ids"])
        logits = model(input_ids=batch["input_ids"], **inputs).logits
        changed = model(input_ids=other, **inputs).logits
    torch.testing.assert_close(logits[:, :20], changed[:, :20])
    assert family.token_types(batch["input_ids"], 3)["token_type_ids"].any().item() is False


@pytest.mark.parametrize("name", GENERATES)
def test_lora_targets_are_linear_layers_of_their_part(name):
    model, _ = make_family(name)
    family = find_family(model)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    for part in ("vision", "text"):
        own = {id(m) for module in family.modules(model, part) for m in module.modules()}
        targets = [modules[target] for target in family.lora_targets(model, part)]
        assert targets
        assert all(isinstance(target, torch.nn.Linear) for target in targets)
        assert all(id(target) in own and target is not head for target in targets)


@pytest.mark.parametrize("name", [n for n in GENERATES if n != "mllama"])
def test_an_image_takes_as_many_tokens_as_the_planner_counts(name):
    model, processor = make_family(name)
    batch = encode(processor, [draw_image(TILE, 2 * TILE)])
    num_tokens = int((batch["input_ids"] == get_image_token_id(model)).sum())
    assert find_family(model).num_image_tokens(model.config, TILE, 2 * TILE) == num_tokens


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_blank_image_is_not_taken_for_padding(name):
    "transformers drops images of zeros before the encoder."
    model, processor = make_family(name)
    batch = wide_batch(processor, 1)
    blank = ablate_image(batch, "blank")
    with torch.no_grad():
        of_blank = find_family(model).encode_images(unwrap_model(model), blank).pooler_output
    assert len(of_blank[0]) == 3 * 4
    assert float(blank["pixel_values"].abs().max()) < 1e-3


@pytest.mark.parametrize("name", MAKERS)
def test_a_caption_embeds_alike_beside_a_longer_one(name):
    model, processor = make_family(name)
    padding = find_family(model).text_padding(model)
    captions = ["red", "a blue net"]
    with torch.no_grad():
        together, alone = (
            embed_texts(model, tokens["input_ids"], tokens["attention_mask"])
            for tokens in (
                processor.tokenizer(captions, return_tensors="pt", **padding),
                processor.tokenizer(captions[:1], return_tensors="pt", **padding),
            )
        )
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("name", GENERATES)
def test_text_alone_is_answered(name):
    model, processor = make_family(name)
    family = find_family(model)
    family.require_answers("an answer")
    input_ids = processor.tokenizer("What is it?", return_tensors="pt")["input_ids"]
    batch = dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    batch |= family.token_types(input_ids, get_image_token_id(model))
    with torch.no_grad():
        logits = model(**family.forward_inputs(model, batch), use_cache=False).logits
        tokens = family.generate(model, batch, max_new_tokens=1, do_sample=False)
    assert tokens.tolist() == [[int(logits[0, -1].argmax())]]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_that_compares_makes_pixels_and_no_answers(name):
    model, processor = make_family(name)
    family = find_family(model)
    images = [draw_image(TILE, TILE, seed) for seed in range(3)]
    pixels = family.process_images(processor, [[image] for image in images])["pixel_values"]
    torch.testing.assert_close(pixels, encode(processor, images)["pixel_values"])
    with pytest.raises(ValueError, match="never speaks: an answer needs a model that answers"):
        family.require_answers("an answer")
