"The shipped base passes its gates, and a short version of its recipe runs from nothing to a folder that loads."

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit import chat, data, lesions, models, pretrain
from mmkit.models.loading import BASE_MODEL_DIR
from mmkit.pretrain.gates import (
    FIRST_HELD_OUT_INDEX,
    PROBED_ATTRIBUTES,
    compare_with_text_only,
    evaluate_linear_probes,
    image_swap_logit_change,
)
from mmkit.pretrain.shapes import (
    DENSE_MAPS,
    PAINT_RGB,
    _draw_background,
    render_shape,
    sample_shape,
)
from mmkit.pretrain.text import (
    build_tokenizer_corpus,
    compose_shape_caption,
    compose_shape_questions,
    encode_conversation,
    to_everyday_terms,
)


@pytest.fixture(scope="module")
def shipped():
    return models.load("base")


def test_card_and_checksum():
    digest = hashlib.sha256((BASE_MODEL_DIR / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (BASE_MODEL_DIR / "README.md").read_text()
    assert json.loads((BASE_MODEL_DIR / "pretraining.json").read_text())["run"]["sha256"] == digest


def test_folder_is_small_and_ordinary(shipped):
    assert sum(f.stat().st_size for f in BASE_MODEL_DIR.iterdir()) < 12e6
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert (
        type(AutoModelForImageTextToText.from_pretrained(BASE_MODEL_DIR)).__name__
        == "Gemma3ForConditionalGeneration"
    )
    assert (
        AutoProcessor.from_pretrained(BASE_MODEL_DIR).tokenizer.convert_tokens_to_ids(
            "<image_soft_token>"
        )
        == shipped[0].config.image_token_id
    )
    widths = [m.in_features for m in shipped[0].modules() if isinstance(m, torch.nn.Linear)]
    assert all(w % 64 == 0 for w in widths)  # bitsandbytes on the CPU fails otherwise
    assert set(shipped[0].config.text_config.layer_types) == {"full_attention"}


def test_a_swap_of_images_moves_the_logits(shipped):
    a, b = [
        Image.fromarray(render_shape(sample_shape(0, FIRST_HELD_OUT_INDEX + i)).image)
        for i in (0, 1)
    ]
    assert (
        image_swap_logit_change(*shipped, a, b) > 0.1
        and image_swap_logit_change(*shipped, a, a) == 0
    )


def test_gate_b_lesions_can_be_told_apart_from_frozen_features(shipped):
    got = evaluate_linear_probes(
        {"shipped": shipped[0].model.vision_tower}, num_lesions=4000, n_resamples=20
    )["shipped"]  # the card's gate has twice as many, and bars .03 higher
    bars = {k: 0.82 if k == "melanoma" else 0.77 for k in PROBED_ATTRIBUTES}
    assert {k: round(got[k].value, 3) for k in bars if got[k].value < bars[k]} == {}


def test_gate_c_it_says_what_it_sees(shipped):
    got = compare_with_text_only(*shipped, num_records=200)
    mean = {(how, image): np.mean(list(v.values())) for how in got for image, v in got[how].items()}
    assert mean["captions", "own"] - mean["captions", "text-only"] > 0.25
    assert min(mean["captions", "own"], mean["answers", "own"]) >= 0.90, mean


def test_the_base_has_never_seen_a_lesion():
    assert not set(PAINT_RGB) & {"light brown", "dark brown", "blue-grey"}
    for i in range(40):  # no ground has skin's hue
        s = sample_shape(0, i)
        g = _draw_background(np.random.default_rng(i), s, 24).mean((0, 1))
        r, gr, b = g / g.max()
        assert not (r == 1 and 0.6 < gr < 0.9 and b < gr - 0.05), (i, g)


def test_conversations_are_what_the_processor_makes(shipped):
    model, processor = shipped
    tok = processor.tokenizer
    ids, labels = encode_conversation(tok, [("Describe this image.", "This image shows a shape.")])
    row = chat.tokenize_conversations(
        processor, [chat.build_messages("Describe this image.", "This image shows a shape.")]
    )[0]
    assert (
        ids == list(row["input_ids"])[: len(ids)] and labels == list(row["labels"])[: len(labels)]
    )


def test_attributes_are_independent():
    shapes = [sample_shape(3, i) for i in range(3000)]
    A, C = np.array([s.A for s in shapes]), np.array([len(s.colours) for s in shapes])
    veil, net = (
        np.array([s.veil for s in shapes]),
        np.array([s.network == "atypical" for s in shapes]),
    )
    assert np.abs(np.corrcoef([A, C, veil, net]) - np.eye(4)).max() < 0.08


def test_the_recipe_from_nothing_to_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mmkit.pretrain.gates.compare_with_text_only",
        lambda m, p, n=4: {
            h: {i: {k: 0.0 for k in lesions.ATTRIBUTE_LEVELS} for i in ("own", "text-only")}
            for h in ("captions", "answers")
        },
    )
    monkeypatch.setattr(
        "mmkit.pretrain.text.build_tokenizer_corpus",
        lambda n=200, seed=0, corpus=build_tokenizer_corpus: corpus(200, seed),
    )
    pretrain.build_base_model(
        tmp_path / "out",
        num_shapes=96,
        vision_steps=2,
        text_steps=2,
        num_workers=1,
        num_probe_lesions=120,
        save_steps=1,
    )
    model, processor = models.load(tmp_path / "out")
    assert "sha256" in (tmp_path / "out" / "README.md").read_text() and not model.training
    log = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert len(log["vision"]) == 2 and len(log["text"]) == 2


def test_everyday_words_and_back():
    "Both vocabularies say the same of every shape; the everyday one names no dermoscopic term."

    terms = (
        "network",
        "dots",
        "globules",
        "streaks",
        "veil",
        "structureless",
        "regression",
        "typical",
    )
    for i in range(300):
        s = sample_shape(5, i)
        said = compose_shape_caption(s, np.random.default_rng(i))
        assert not any(t in said for t in terms), said
        assert data.parse_attributes(pretrain.to_dermoscopic_terms(said)) == s.attributes()
        for q, a in compose_shape_questions(s, np.random.default_rng(i)):
            assert not any(w in q + a for w in terms) and (
                "background" in a or to_everyday_terms(pretrain.to_dermoscopic_terms(a)) == a
            )
    assert to_everyday_terms("Is the network typical or atypical?") == "Is the grid tidy or untidy?"


def test_dots_reach_their_map():
    "A dot is smaller than a cell of the map: the cell says that one is in it, not how little of it it covers."
    s = next(s for s in (sample_shape(0, i) for i in range(99)) if s.dots)
    m = render_shape(s).maps[..., DENSE_MAPS.index("dots")]
    assert (m > 0.9).sum() >= 5


def test_nothing_pale_can_be_mistaken_for_a_film():
    for i in range(300):
        s = sample_shape(6, i)
        if s.veil or s.regression:
            assert not set(s.colours) & {"white", "grey", "light blue"}, s
