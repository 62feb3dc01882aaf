"Every public call on every model family, on small models of the real classes."

import copy

import numpy as np
import pytest
import torch
from families import MAKERS, TILE, make_family
from test_families import GENERATES, draw_image
from transformers import AutoModelForImageTextToText, TrainerCallback

from mmkit import audit, data, evaluate, report, training
from mmkit.audit.cka import cka_distance, collect_activations
from mmkit.audit.drift import extract_features
from mmkit.audit.label_noise import extract_pair_features
from mmkit.audit.synthetic_quality import extract_image_features
from mmkit.chat.collator import Collator
from mmkit.chat.templates import build_messages
from mmkit.chat.turns import get_token_roles
from mmkit.evaluate.record_batches import RecordBatches, find_image_partners
from mmkit.explain.supervision import fit_with_attention_supervision
from mmkit.losses.contrastive import embedding_mse
from mmkit.losses.weighting import LossWeights
from mmkit.models.adapters import add_bottleneck_adapters, merge_lora
from mmkit.models.connectors import LinearProjector
from mmkit.models.diagram import describe_architecture
from mmkit.models.families import find_family
from mmkit.models.family import select_model_inputs
from mmkit.models.features import embed_texts
from mmkit.models.parts import part_of
from mmkit.models.quantization import build_quantization_config
from mmkit.models.saving import load_adapters, save_adapters
from mmkit.models.surgery import replace_connector, set_image_size
from mmkit.report.context import generate_from_images
from mmkit.report.tasks_captions import evaluate_impressions
from mmkit.report.tasks_contrastive import evaluate_retrieval, evaluate_zero_shot
from mmkit.training.dataset import TokenizedDataset
from mmkit.training.steps import compute_losses
from mmkit.tuner.eval_set import evaluate_run
from mmkit.tuner.export import export_run, fit_arguments
from mmkit.tuner.state import TunerState

# families whose processor writes the image's tokens before the text by itself
WRITES_THE_IMAGE = ("blip2", "instructblip")


def make_records(num_records=2):
    "Records with images of two shapes and captions of two lengths."
    captions = ["a red sign.", "blue, and more."]
    return [
        dict(image=draw_image(TILE, TILE * (1 + k % 2), k), caption=captions[k % 2])
        for k in range(num_records)
    ]


@pytest.mark.parametrize("name", GENERATES)
def test_a_batch_is_what_the_processor_itself_makes(name):
    _, processor = make_family(name)
    record = make_records(2)[1]
    turns = build_messages("What is it?", record["caption"])
    text = processor.apply_chat_template(turns)
    images = [[record["image"]]]
    if name in WRITES_THE_IMAGE:
        text, images = text.replace("<image>", ""), images[0]
    begin = processor.tokenizer.bos_token
    is_begun = bool(begin) and text.startswith(begin)
    if name == "paligemma":  # its processor writes begin and end itself
        kwargs = dict(text=["<image>What is it?"], suffix=[record["caption"]])
    else:
        kwargs = dict(text=[text], add_special_tokens=not is_begun)
    of_processor = processor(images=images, return_tensors="pt", **kwargs)
    batch = Collator(processor, "What is it?")([record])
    answer = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(answer).strip().startswith("blue, and more.")
    unlike = {
        "labels",
        "token_type_ids",
        "mm_token_type_ids",
    }  # what a kind of token is the family says
    if name == "instructblip":  # its own processor shows the queries the answer, too
        unlike |= {"qformer_input_ids", "qformer_attention_mask"}
    for key in set(of_processor) - unlike:
        assert torch.equal(batch[key], of_processor[key]), key


@pytest.mark.parametrize("name", WRITES_THE_IMAGE)
def test_begin_of_text_follows_the_image_where_the_processor_has_it_so(name, monkeypatch):
    _, processor = make_family(name)
    begin_id = processor.tokenizer.bos_token_id
    for add_begin in (False, True):
        monkeypatch.setattr(processor.tokenizer, "add_bos_token", add_begin)
        of_processor = processor(images=[draw_image(TILE, TILE)], text=["What? Answer: "])
        record = dict(image=draw_image(TILE, TILE), prompt="What?")
        batch = Collator(processor, for_training=False)([record])
        assert batch["input_ids"].tolist() == of_processor["input_ids"]
        assert (begin_id in of_processor["input_ids"][0]) == add_begin


def test_the_queries_of_instructblip_read_the_prompt_and_not_the_answer():
    _, processor = make_family("instructblip")
    records = [dict(record, prompt="Which sign?") for record in make_records()]
    batch = Collator(processor)(records)
    read = [processor.qformer_tokenizer.decode(ids) for ids in batch["qformer_input_ids"]]
    assert read == ["Which sign? Answer:"] * 2
    two_images = dict(images=[draw_image(TILE, TILE)] * 2, prompt="Same?", caption="no")
    batch = Collator(processor)([two_images, records[0]])
    assert len(batch["qformer_input_ids"]) == len(batch["pixel_values"]) == 3
    only_text = Collator(processor)([dict(image=None, prompt="Hm?", caption="no")])
    assert "qformer_input_ids" not in only_text


@pytest.mark.parametrize("name", GENERATES)
def test_every_token_has_its_role(name):
    _, processor = make_family(name)
    batch = Collator(processor, "What is it?")(make_records())
    for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        roles = get_token_roles(processor, input_ids)
        text = {role: "" for role in roles}
        for role, token_id in zip(roles, input_ids.tolist(), strict=True):
            text[role] += processor.tokenizer.decode([token_id])
        assert text["prompt"].strip() == "What is it?"
        in_loss = "".join(processor.tokenizer.decode([i]) for i in labels[labels != -100].tolist())
        assert text["answer"].strip() == in_loss.strip()


def test_a_line_break_in_a_prompt_that_it_would_end_is_refused():
    _, processor = make_family("paligemma")
    record = dict(image=draw_image(TILE, TILE), prompt="What?\nSay it.", caption="a sign")
    with pytest.raises(ValueError, match="a prompt has a line break"):
        Collator(processor)([record])
    Collator(processor)([dict(record, prompt="What?\n", caption="a\nsign")])


@pytest.mark.parametrize("name", ["paligemma", "blip2"])
def test_a_system_turn_is_refused_where_there_is_none(name):
    _, processor = make_family(name)
    with pytest.raises(ValueError, match="refuses turns by system"):
        Collator(processor, system="Be brief.")(make_records())


# ---- evaluation and audit

TURNS = [
    dict(role="user", content="What is it?"),
    dict(role="assistant", content="A sign."),
    dict(role="user", content="Which?"),
]
FEW_TOKENS = dict(max_new_tokens=3, show_progress=False)


def make_mixed_records():
    "One image, another of another shape, none, two of them, several turns."
    square, wide = draw_image(TILE, TILE, 1), draw_image(TILE, 2 * TILE, 2)
    return [
        dict(image=square, prompt="Describe it.", caption="Red signs"),
        dict(image=wide, prompt="Say what it is.", caption="Yellow signs"),
        dict(image=None, prompt="What is a sign?", caption="Boards"),
        dict(images=[square, wide], prompt="Compare them.", caption="Two signs"),
        dict(image=draw_image(TILE, TILE, 3), messages=TURNS, caption="Stop signs"),
        dict(images=[wide, draw_image(TILE, TILE, 4)], prompt="Compare them.", caption="Green"),
    ]


def with_images(records):
    return [record for record in records if record.get("image") or record.get("images")]


def with_other_images(records):
    "The same texts; every image is another one of its size."
    others = copy.deepcopy(records)
    for k, record in enumerate(others):
        if record.get("image"):
            record["image"] = draw_image(TILE, record["image"].width, 20 + k)
        if record.get("images"):
            images = enumerate(record["images"])
            record["images"] = [draw_image(TILE, im.width, 30 + 2 * k + j) for j, im in images]
    return others


@torch.no_grad()
def decode_one_by_one(model, processor, record, num_tokens):
    "The most likely next token, by a whole pass for each."
    batch = Collator(processor, for_training=False)([record])
    prompt, images = batch["input_ids"][0].tolist(), record.get("images") or [record.get("image")]
    images, answer = [image for image in images if image is not None], []
    for _ in range(num_tokens):
        labels = [-100] * len(prompt) + answer
        example = dict(input_ids=prompt + answer, labels=labels, images=images)
        inputs = select_model_inputs(Collator(processor)([example]))
        logits = model(**find_family(model).forward_inputs(model, inputs), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == model.generation_config.eos_token_id:
            break
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", GENERATES)
def test_generate_on_every_family(name):
    "Greedy, whatever records are beside one, with 0, 1 or 2 images and with several turns."
    model, processor = make_family(name)
    records = make_mixed_records()
    answers = evaluate.generate(model, processor, records, batch_size=4, **FEW_TOKENS)
    assert evaluate.generate(model, processor, records, batch_size=1, **FEW_TOKENS) == answers
    for row in (0, 2, 3):
        assert answers[row] == decode_one_by_one(model, processor, records[row], 3), row


@pytest.mark.parametrize("name", GENERATES)
def test_impressions_are_scored_on_every_family(name):
    "The image changes the score, the records beside it and a blank beside text alone do not."
    model, processor = make_family(name)
    records = make_mixed_records()[:4]
    captions = ["It is.", "A lesion.", "It is.", "It is."]

    def score(records, **options):
        return evaluate.score_impressions(model, processor, records, captions, **options)

    scores, blank = score(records), score(records, image_condition="blank")
    assert ((scores > 0) & (scores < 1)).all()
    np.testing.assert_allclose(score(records, batch_size=1), scores, rtol=1e-3)
    changed = score(with_other_images(records))
    has_image = np.array([True, True, False, True])
    assert ((changed != scores) == has_image).all()
    assert ((blank != scores) == has_image).all()


@pytest.mark.parametrize("name", GENERATES)
def test_a_word_scores_as_the_model_itself_computes_it(name):
    model, processor = make_family(name)
    record = dict(image=draw_image(TILE, 2 * TILE, 1), prompt="What is it?")
    prompt = Collator(processor, for_training=False)([record])["input_ids"][0].tolist()
    logprobs = []
    for word in ("melanoma", "benign"):
        start, whole = (
            processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in ("Clinical impression:", f"Clinical impression: {word}")
        )
        labels = [-100] * len(prompt) + whole
        batch = Collator(processor)([dict(record, input_ids=prompt + whole, labels=labels)])
        with torch.no_grad():
            logits = model(**select_model_inputs(batch), use_cache=False).logits[0].double()
        of_tokens = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt + whole)[1:, None])
        logprobs.append(float(of_tokens[len(prompt) + len(start) - 1 :].sum()))
    score = evaluate.score_impressions(model, processor, [record], [""])
    expected = 1 / (1 + np.exp(logprobs[1] - logprobs[0]))
    np.testing.assert_allclose(score, [expected], rtol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_similarity_on_every_family(name):
    "A row belongs to a record's images, a column to its caption; neither to what is beside it."
    model, processor = make_family(name)
    records = with_images(make_mixed_records())
    together = evaluate.compute_similarity(model, processor, records).matrix
    assert len(np.unique(together.round(6))) == together.size
    order = [3, 0, 2]
    alone = [records[k] for k in order]
    matrix = evaluate.compute_similarity(model, processor, alone, batch_size=1).matrix
    np.testing.assert_allclose(matrix, together[np.ix_(order, order)], atol=1e-5)
    with pytest.raises(ValueError, match="record 0 has no image"):
        evaluate.compute_similarity(model, processor, [dict(image=None, caption="Boards")])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_that_compares_is_asked_nothing(name):
    model, processor = make_family(name)
    records = with_images(make_mixed_records())
    calls = [
        lambda: evaluate.generate(model, processor, records),
        lambda: evaluate.score_impressions(model, processor, records),
        lambda: extract_features(model, processor, records),
        lambda: collect_activations(model, processor, records),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="never speaks: .* needs a model that answers"):
            call()
    long_caption = [dict(records[0], caption="sign " * 50)]
    with pytest.raises(ValueError, match="tokens, and .* reads at most"):
        evaluate.compute_similarity(model, processor, long_caption)


def test_images_are_exchanged_among_records_with_as_many():
    partners = find_image_partners([2, 1, 0, 2, 1, 1])
    assert partners[[0, 2, 3]].tolist() == [3, 2, 0]
    assert sorted(partners[[1, 4, 5]]) == [1, 4, 5]
    model, processor = make_family("llava")
    records = make_mixed_records()
    shuffled = RecordBatches(processor, records, image_condition="shuffled")
    assert shuffled.load_images(3) == records[5]["images"]
    assert shuffled.load_images(2) == []
    with pytest.raises(ValueError, match=r"record 0 alone has 1 image\(s\)"):
        evaluate.generate(model, processor, records[1:4], image_condition="shuffled")


def test_pooled_features_are_asked_of_gemma_alone_and_of_one_image():
    with pytest.raises(ValueError, match="kept for Gemma 3 alone, not for LLaVA"):
        evaluate.get_pooled_features(*make_family("llava"), make_mixed_records())
    with pytest.raises(ValueError, match="record 2 has 0 images"):
        evaluate.get_pooled_features(*make_family("gemma3"), make_mixed_records())


@pytest.mark.parametrize("name", GENERATES)
def test_drift_features_on_every_family(name):
    model, processor = make_family(name)
    records = with_images(make_mixed_records())
    found = extract_features(model, processor, records, batch_size=5)
    for row in range(1, 4):
        alone = extract_features(model, processor, records[row : row + 1])
        np.testing.assert_allclose(found.embeddings[row], alone.embeddings[0], atol=1e-4)
        np.testing.assert_allclose(found.scores[row], alone.scores[0], atol=1e-4)
    changed = extract_features(model, processor, with_other_images(records))
    assert (changed.scores != found.scores).all()
    with pytest.raises(ValueError, match="record 2 has no image"):
        extract_features(model, processor, make_mixed_records())


@pytest.mark.parametrize("name", GENERATES)
def test_layers_are_compared_on_every_family(name):
    "From the encoder to the last text layer, with one image a record and with two."
    model, processor = make_family(name)
    records = [dict(image=draw_image(TILE, TILE * (1 + k % 2), k)) for k in range(5)]
    layers = collect_activations(model, processor, records, batch_size=5)
    names = {"vision 0", "vision 1", "projector", "text 0", "text 1"}
    assert set(layers) - {"vision 2"} == names  # Llama 3.2 Vision has a global layer more
    assert all(values.shape[0] == 5 for values in layers.values())
    alone = collect_activations(model, processor, records, batch_size=1)
    for layer, values in layers.items():
        np.testing.assert_allclose(values, alone[layer], atol=1e-4)
    others = collect_activations(model, processor, with_other_images(records))
    blind = {"text 0"} if name == "mllama" else set()  # it comes before the cross-attention
    sees_image = set(layers) - blind
    moved = {layer: np.abs(layers[layer] - others[layer]).max() for layer in sees_image}
    assert min(moved.values()) > 1e-4, moved
    assert cka_distance(layers, others)["projector"].value > 1e-3
    itself = cka_distance(layers, layers)
    assert all(abs(itself[layer].value) < 1e-6 for layer in sees_image)
    pairs = [dict(images=[record["image"]] * 2) for record in records[:2]]
    assert collect_activations(model, processor, pairs)["text 1"].shape == (2, 64)


@pytest.mark.parametrize("name", MAKERS)
def test_pairs_are_embedded_for_the_search_of_wrong_labels(name, tmp_path):
    model, processor = make_family(name)
    records = make_pairs()[:4]
    images, texts = extract_pair_features(model, processor, records, cache_dir=tmp_path)
    assert images.shape == texts.shape == (4, 64)
    assert np.linalg.matrix_rank(images - images.mean(0)) == 3
    reverse, _ = extract_pair_features(model, processor, records[::-1], cache_dir=tmp_path)
    np.testing.assert_allclose(reverse[::-1], images, atol=1e-4)


def test_wrong_labels_are_looked_for_on_another_family(tmp_path):
    pairs = data.load_melanoma_pairs(12, seed=3, size=32, masks=False, cache_dir=tmp_path)
    issues = audit.find_label_issues(*make_family("qwen2_vl"), pairs, n_folds=2)
    assert sorted(issues.ranking) == list(range(12))
    assert issues.explain(issues.ranking[0])


@pytest.mark.parametrize("name", MAKERS)
def test_a_report_on_every_family(name, tmp_path, monkeypatch):
    "Tasks of embeddings for all; tasks of answers for those that answer."
    monkeypatch.setattr("mmkit.report.context.MAX_CAPTION_TOKENS", 3)
    model, processor = make_family(name)
    records = [
        dict(record, id=str(k), source="x", patient=k, label=("benign", "melanoma")[k % 2])
        for k, record in enumerate(make_mixed_records())
    ]
    del records[4]  # its two turns count as one question more
    found = report.evaluate_model(
        model,
        processor,
        records,
        tasks=(evaluate_impressions, evaluate_retrieval, evaluate_zero_shot),
        show_progress=False,
        n_resamples=5,
        cache_dir=tmp_path,
    )
    assert found.metadata["without image"] == 1
    if name in GENERATES:
        assert set(found.tasks) == {"impression", "retrieval", "zero-shot"}
        scores = [found.tasks["impression"].scores[who]["score"] for who in ("model", "shuffled")]
        assert all(own != other for own, other in zip(*scores, strict=True))
    else:
        assert set(found.tasks) == {"retrieval", "zero-shot"}
        assert "never speaks" in found.skipped["impressions"]
    assert "retrieval" in str(found)


def test_a_report_shows_another_records_images_when_shuffled():
    model, processor = make_family("llava_next")
    records = with_images(make_mixed_records())
    context = report.EvalContext(model, processor, records)
    asked = dict(image=records[context.partners[1]]["image"], prompt="Which?")
    expected = evaluate.generate(model, processor, [asked], **FEW_TOKENS)
    assert generate_from_images(context, [1], ["Which?"], ["shuffled"], 3) == expected
    assert generate_from_images(context, [1], ["Which?"], ["original"], 3) != expected


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_attention_is_supervised_where_image_tokens_have_places(name, tmp_path):
    model, processor = make_family(name)
    lesions = data.load_melanoma_pairs(4, seed=77, size=64, cache_dir=tmp_path)
    options = dict(max_steps=6, batch_size=4, layer_indices=(1,), supervision_weight=5.0)
    _, losses = fit_with_attention_supervision(copy.deepcopy(model), processor, lesions, **options)
    assert losses["gaze"][-1] < losses["gaze"][0]


@pytest.mark.parametrize("name", ["mllama", "blip2", "clip"])
def test_attention_is_not_supervised_where_image_tokens_have_no_places(name):
    with pytest.raises(ValueError, match="no word's attention can be asked onto a mask"):
        fit_with_attention_supervision(*make_family(name), make_mixed_records())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_synthetic_images_are_compared_on_another_family(name):
    images = np.stack([np.asarray(draw_image(TILE, TILE, k)) for k in range(3)])
    features = extract_image_features(*make_family(name), images)
    assert features.shape == (3, 64)
    assert not np.allclose(features[0], features[1])


# ---- training

CAPTIONS = ["red net", "blue dots", "a line", "two rings", "one star", "no sign", "a box", "dark"]
OTHERS = [name for name in GENERATES if name != "gemma3"]  # which test_training has
ALL_TERMS = LossWeights(ce=1.0, contrastive=1.0, mse=1.0)


def make_pairs():
    "Eight images of two shapes, each with a caption of its own."
    return [
        dict(image=draw_image(TILE, TILE * (1 + k % 2), k), caption=caption)
        for k, caption in enumerate(CAPTIONS)
    ]


def fit_pairs(model, processor, **options):
    "A few steps on eight pairs, without a cache on disk."
    options = dict(max_steps=12, batch_size=8, learning_rate=5e-3, show_progress=False) | options
    return training.fit(model, processor, make_pairs(), use_feature_cache=False, **options)


def copy_values(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def find_moved(model, before):
    "Names of the parameters that changed, without peft's own segments."
    after = dict(model.named_parameters())
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


@torch.no_grad()
def compute_logits(model, processor):
    "Of two pairs, on the tokens that are no padding."
    batch = Collator(processor)(make_pairs()[:2])
    logits = model.eval()(**select_model_inputs(batch)).logits
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("name", GENERATES)
def test_cross_entropy_is_the_loss_that_the_model_computes_itself(name):
    model, processor = make_family(name)
    batch = Collator(processor, include_captions=True)(make_pairs()[:3])
    own = {k: v for k, v in batch.items() if not k.startswith("caption_")}
    with torch.no_grad():
        expected = model(**own).loss
        of_pixels = compute_losses(model, batch, LossWeights())
        of_all = compute_losses(model, batch, ALL_TERMS)
        vectors = find_family(model).embed_images(model, batch)
    assert list(of_pixels) == ["ce"]
    torch.testing.assert_close(of_pixels["ce"], expected)
    torch.testing.assert_close(of_all["ce"], expected)
    texts = embed_texts(model, batch["caption_input_ids"], batch["caption_attention_mask"])
    torch.testing.assert_close(of_all["mse"], embedding_mse(vectors, texts))


@pytest.mark.parametrize("name", OTHERS)
def test_fit_trains_the_projector_on_three_terms_and_moves_nothing_else(name):
    base, processor = make_family(name)
    model = copy.deepcopy(base)
    before = copy_values(model)
    run = fit_pairs(
        model, processor, loss_weights=ALL_TERMS, eval_dataset=make_pairs()[:3], save_steps=99
    )
    assert find_moved(model, before)
    assert {part_of(moved) for moved in find_moved(model, before)} == {"projector"}
    assert run.history["loss"][-1] < 0.95 * run.history["loss"][0]
    assert run.eval_history["contrastive"].shape == (1,)
    of_first, of_second = (
        Collator(processor)([dict(image=draw_image(TILE, TILE, seed), caption="a")])
        for seed in (0, 1)
    )
    with torch.no_grad():
        logits = model(**select_model_inputs(of_first)).logits
        swapped = model(**select_model_inputs(of_second)).logits
    assert not torch.allclose(logits, swapped, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_projector_and_lora_train_in_stages_are_saved_loaded_and_merged(name, tmp_path):
    base, processor = make_family(name)
    stages = {0: "projector", 0.5: ("projector", "text")}
    half_way = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            half_way[state.global_step] = [p for n, p in lora_of(model) if p.any()]

    def lora_of(model):
        return [(n, p) for n, p in model.named_parameters() if "lora_B" in n]

    run = fit_pairs(
        copy.deepcopy(base),
        processor,
        train=stages,
        lora=4,
        max_steps=6,
        callbacks=(Watch(),),
    )
    model = run.model
    assert not half_way[3]
    assert len(half_way[6]) == len(lora_of(model)) > 0
    expected = compute_logits(model, processor)
    assert not torch.allclose(expected, compute_logits(base, processor), atol=1e-4)
    save_adapters(model, tmp_path, "projector")
    loaded = load_adapters(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(compute_logits(loaded, processor), expected)
    batch = Collator(processor, include_captions=True)(make_pairs()[:2])
    merged, comparison = merge_lora(loaded, batch)
    assert comparison["max_logit_change"] < 1e-4
    assert not any("lora_" in key for key, _ in merged.named_parameters())
    torch.testing.assert_close(compute_logits(merged, processor), expected, atol=1e-4, rtol=1e-3)


# one of each kind: the others have the same layers, and Gemma 3 is in test_training
FOUR_BITS = ("llava", "qwen3_vl", "idefics3", "paligemma", "mllama", "blip2", "instructblip")


@pytest.mark.parametrize("name", FOUR_BITS)
def test_qlora_trains_beside_four_bits(name, tmp_path):
    base, processor = make_family(name)
    base.save_pretrained(tmp_path)
    auto = AutoModelForImageTextToText
    config = build_quantization_config("nf4", auto, base.config, {})
    model = auto.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    before = copy_values(model)
    assert any(value.dtype == torch.uint8 for value in before.values())
    run = fit_pairs(model, processor, train=(), lora=dict(rank=4), max_steps=3)
    assert run.history["loss"][-1] < run.history["loss"][0]
    moved = [key for key, value in run.model.named_parameters() if value.requires_grad]
    after = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for key, value in run.model.named_parameters()
    }
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all("lora_" in key for key in moved)


def mixed_records():
    "A pair, text alone, two images, an image without a caption, a pair."
    turns = [dict(role="user", content="What?"), dict(role="assistant", content="a word")]
    first, second, third, fourth, *_ = make_pairs()
    return [
        first,
        dict(image=None, prompt="Say it.", answer="it", caption=None),
        dict(images=[second["image"], third["image"]], caption="a line and dots"),
        dict(image=second["image"], messages=turns),
        fourth,
    ]


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl", "idefics3"])
def test_rows_without_image_or_caption_take_part_in_cross_entropy_alone(name):
    base, processor = make_family(name)
    model, records = copy.deepcopy(base), mixed_records()
    dataset = TokenizedDataset(records, Collator(processor))
    batch = dataset.collate_fn([dataset[k] for k in range(5)])
    pairs = dataset.collate_fn([dataset[k] for k in (0, 2, 4)])
    embeds = {}
    with torch.no_grad():
        losses = compute_losses(model, batch, ALL_TERMS, embeds_out=embeds)
        of_pairs = compute_losses(model, pairs, ALL_TERMS)
        text_alone = compute_losses(model, dataset.collate_fn([dataset[1]]), ALL_TERMS)
    assert embeds["rows"].tolist() == [0, 2, 4]
    for term in ("contrastive", "mse"):
        torch.testing.assert_close(losses[term], of_pairs[term], atol=1e-4, rtol=1e-4)
        assert text_alone[term] == 0
    assert text_alone["ce"] > 0
    options = dict(batch_size=1, max_steps=5, show_progress=False, use_feature_cache=False)
    with pytest.warns(UserWarning, match="2 of 5 records have no image or no caption"):
        run = training.fit(
            model, processor, records, loss_weights=ALL_TERMS, eval_dataset=records, **options
        )
    assert np.isnan(run.history["contrastive"]).sum() == 2
    assert np.isfinite(run.eval_history["mse"]).all()


def test_terms_that_no_record_has_are_refused():
    model, processor = make_family("llava")
    text = [dict(image=None, prompt="Say it.", answer="it")] * 2
    with pytest.raises(ValueError, match="none of the 2 records has both"):
        training.fit(model, processor, text, max_steps=1, loss_weights=ALL_TERMS)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "idefics3"])
def test_texts_of_images_of_any_size_are_checked_before_the_first_step(name):
    _, processor = make_family(name)
    empty = [*make_pairs()[:2], dict(make_pairs()[2], caption=" ")]
    with pytest.raises(ValueError, match="conversation 2: .*an answer is empty"):
        TokenizedDataset(empty, Collator(processor))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_that_compares_is_not_trained_by_fit(name):
    with pytest.raises(ValueError, match="compares images with texts and never speaks"):
        training.fit(*make_family(name), make_pairs(), max_steps=1)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "gemma3"])
def test_other_families_take_no_other_connector_and_say_so(name):
    model, processor = make_family(name)
    calls = [
        lambda: replace_connector(model, processor, LinearProjector(model.config)),
        lambda: set_image_size(model, processor, 64),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="use a model of the Gemma 3 family"):
            call()


@pytest.mark.parametrize("name", MAKERS)
def test_bottlenecks_and_the_diagram_fit_a_family_or_say_why_not(name):
    model, _ = make_family(name)
    if name in ("blip2", "clip", "siglip"):
        with pytest.raises(ValueError, match="has no layers of an attention and an MLP"):
            add_bottleneck_adapters(copy.deepcopy(model))
    else:
        add_bottleneck_adapters(copy.deepcopy(model))
    if name in ("gemma3", "llava", "paligemma", "idefics3", "smolvlm"):
        sizes = describe_architecture(model)
        assert sizes["num_image_tokens"] * sizes["pool_size"] ** 2 == sizes["num_patches"]
    else:
        with pytest.raises(ValueError, match="takes none: parameter_summary"):
            describe_architecture(model)


TUNED = dict(batch_size=4, lora_rank=2, train=("projector", "text"), contrastive=0.3, mse=0.2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mllama", "instructblip"])
def test_the_tuner_trains_evaluates_forks_and_goes_back(name, capsys):
    model, processor = make_family(name)
    pairs = [dict(pair, label="", attributes={}) for pair in make_pairs()]
    source = dict(records=pairs[:6], eval_dataset=pairs[6:], model=model, processor=processor)
    state = TunerState(**source, **TUNED)
    losses = [entry["loss"] for entry in state.step(3).history]
    fork = state.fork()
    state.set(ce=0.9)
    measured = evaluate_run(state.step(1))
    assert {"ce", "contrastive", "mse"} == set(state.history[-1]["raw"])
    assert len(measured["captions"]["items"]) == 2
    assert measured["similarity"]["n"] == 2
    assert np.isfinite([measured[key] for key in ("ce", "mse", "spread", "image_gain")]).all()
    state.restore("start")
    assert [entry["loss"] for entry in state.step(3).history] == losses
    run = training.fit(copy.deepcopy(model), processor, **fit_arguments(fork), show_progress=False)
    assert run.steps == 3
    script = export_run(fork, "script")
    own = dict(model=copy.deepcopy(model), processor=processor, records=pairs[:6])
    exec(script.replace("model, processor, records = ...", "#"), own)
    assert own["history"] == losses
    capsys.readouterr()


def test_the_tuner_refuses_what_it_cannot_show():
    model, processor = make_family("llava")
    source = dict(eval_dataset=make_pairs(), processor=processor)
    with pytest.raises(ValueError, match="records of one image each"):
        TunerState(records=mixed_records(), model=model, **source)
    with pytest.raises(ValueError, match="never speaks: the tuner needs a model that answers"):
        TunerState(records=make_pairs(), model=make_family("clip")[0], **source)
