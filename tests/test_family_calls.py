"Every public call on every model family, on small models of the real classes."

import pytest
import torch
from families import TILE, make_family
from test_families import GENERATES, draw_image

from mmkit.chat.collator import Collator
from mmkit.chat.templates import build_messages
from mmkit.chat.turns import get_token_roles

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
