"""The answer, and only the answer, carries loss, in every family; what would train silently wrong
is refused; the X-ray shows what the model gets.
"""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from mmkit import models
from mmkit.chat.collator import Collator, collate_examples, encode_example
from mmkit.chat.images import (
    compute_image_grids,
    denormalize_images,
    get_image_token_id,
    get_num_image_tokens,
    image_placeholder,
    images_to_pixel_values,
)
from mmkit.chat.prompts import PROMPT
from mmkit.chat.templates import (
    build_messages,
    get_special_tokens,
    tiny_processor,
    token_bytes,
    turn_delimiters,
)
from mmkit.chat.tokenization import tokenize_conversations
from mmkit.chat.turns import describe_tokens, get_token_roles, group_token_spans
from mmkit.chat.validation import find_batch_errors, validate_batch
from mmkit.chat.xray import layout_token_boxes, xray_batch
from mmkit.core.runtime import get_assets_dir

CAPTION = (
    "This lesion shows asymmetry in two axes, an irregular border and four colours, on light skin."
    " Clinical impression: melanoma."
)
FAMILIES = ("gemma3", "mllama", "llava", "qwen2_vl")
SIZE = (48, 64)


BASE = json.loads((get_assets_dir() / "base" / "config.json").read_text("utf-8"))
SIDE, TOKENS = BASE["vision_config"]["image_size"], BASE["mm_tokens_per_image"]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(get_assets_dir() / "base")


@pytest.fixture(scope="module")
def families(processor):
    return dict(
        {f: tiny_processor(f) for f in FAMILIES},
        base=processor,
        tiles=tiny_processor("mllama", max_image_tiles=4),
    )


@pytest.fixture(params=[*FAMILIES, "base", "tiles"])
def any_processor(request, families):
    return families[request.param]


def picture(seed=0, size=(96, 96)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    )


def record(k, **kw):
    return dict(image=picture(k), caption=f"{CAPTION[:-1]} {k}.", notes=f"Age {50 + k}, back.") | kw


def said(p, labels):
    return p.tokenizer.decode([int(label) for label in labels if label != -100])


def user(*parts):
    return dict(
        role="user",
        content=[dict(type="image") if p is None else dict(type="text", text=p) for p in parts],
    )


def model(text):
    return dict(role="assistant", content=[dict(type="text", text=text)])


def system(text):
    return dict(role="system", content=[dict(type="text", text=text)])


def with_pictures(talk, shown):
    it = iter(shown)
    return [
        dict(
            t,
            content=[
                dict(c, image=next(it)) if c["type"] == "image" else dict(c, text=c["text"].strip())
                for c in t["content"]
            ],
        )
        for t in talk
    ]


def theirs(p, talk, shown, **kw):
    return p.apply_chat_template(with_pictures(talk, shown), tokenize=True, return_dict=True, **kw)


# --- turn formats, as published
def test_turn_formats_are_the_published_ones(families):
    talk = [
        system("Be brief."),
        user(None, "What is it?"),
        model("A mole."),
        user("Sure?"),
        model("Yes."),
    ]

    def text(f, t=talk, **kw):
        return families[f].apply_chat_template(t, **kw)

    assert (
        text("mllama") == "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe"
        " brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "<|image|>What is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA"
        " mole.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    )
    assert (
        text("llava")
        == "Be brief. USER: <image>\nWhat is it? ASSISTANT: A mole.</s>USER: Sure? ASSISTANT:"
        " Yes.</s>"
    )
    assert (
        text("qwen2_vl") == "<|im_start|>system\nBe"
        " brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is"
        " it?<|im_end|>\n"
        "<|im_start|>assistant\nA mole.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert (
        text("gemma3") == "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>What is"
        " it?<end_of_turn>\n<start_of_turn>model\nA mole.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    )
    asked = [user(None, "Hi")]
    ends = dict(
        mllama="assistant<|end_header_id|>\n\n",
        llava="USER: <image>\nHi ASSISTANT:",
        qwen2_vl="<|im_end|>\n<|im_start|>assistant\n",
        gemma3="<start_of_turn>model\n",
    )
    for f, end in ends.items():
        assert text(f, asked, add_generation_prompt=True).endswith(end)
    assert text("qwen2_vl", asked).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    )


def test_tiny_processors_fit_tiny_models_and_need_no_torchvision(families):
    for f in FAMILIES:
        p, m = families[f], models.tiny_random_model(f, vocab_size=1024)
        assert len(p.tokenizer) <= 1024 and "Pil" in type(p.image_processor).__name__
        assert m.config.image_token_id == get_image_token_id(p) and p.tokenizer.pad_token_id == 0
        b = Collator(p)([record(k) for k in range(3)])
        with torch.no_grad():
            a, other = m(**b), m(**dict(b, pixel_values=b["pixel_values"].flip(0)))
        assert torch.isfinite(a.loss) and (a.logits - other.logits).abs().max() > 1e-4, f
        validate_batch(b, p)
        validate_batch(b, m)
    with pytest.raises(ValueError, match="no chat format for the family 'gemma'.*gemma3"):
        tiny_processor("gemma")


def test_a_processor_saves_and_loads(families, tmp_path):
    for f in ("gemma3", "mllama", "llava"):
        families[f].save_pretrained(tmp_path / f)
        again = AutoProcessor.from_pretrained(tmp_path / f)
        a, b = (
            encode_example(families[f], picture(), PROMPT, CAPTION),
            encode_example(again, picture(), PROMPT, CAPTION),
        )
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# --- the label mask, token by token
NASTY_PROMPTS = [
    PROMPT,
    CAPTION,
    "melanoma",
    "Is it melanoma or benign? Answer melanoma or benign.",
    f"Repeat: {CAPTION}",
    "model\n",
    "user",
    "assistant\n\nmelanoma",
    "one\ntwo",
    "ünï©ødé 漢字 🙂",
    " blanks ",
    "Yes.",
    "two\nlines",
]
NASTY_ANSWERS = [
    CAPTION,
    "melanoma",
    "Yes.",
    "model",
    "two\nlines",
    "漢字 🙂",
    " padded ",
    "user\nmelanoma",
]


@pytest.mark.parametrize("answer", NASTY_ANSWERS)
def test_only_the_answer_carries_loss(any_processor, answer):
    p = any_processor
    g = turn_delimiters(p)
    for prompt in NASTY_PROMPTS:
        talk = build_messages(prompt, answer)
        row = tokenize_conversations(p, [talk], [[SIZE]])[0]
        ids, labels = row["input_ids"], row["labels"]
        assert ids == theirs(p, talk, [picture(size=SIZE[::-1])])["input_ids"][0]
        assert said(p, labels).strip() == answer.strip() + g.end
        on = [label != -100 for label in labels]
        lo, hi = on.index(True), len(on) - on[::-1].index(True)
        assert all(on[lo:hi]) and labels[lo:hi] == ids[lo:hi]  # one stretch, unshifted
        text = [b"".join(token_bytes(p.tokenizer, part)).decode() for part in (ids[:lo], ids[hi:])]
        assert text[0].rstrip().endswith(g.model.strip()) and not text[1].strip()
        assert [
            t.role == "answer" for t in describe_tokens(p, ids)
        ] == on  # a second way to the same mask


def test_every_answer_of_a_talk_carries_loss(any_processor):
    p = any_processor
    talk = [
        system("Answer melanoma or benign."),
        user(None, "melanoma?"),
        model("melanoma"),
        user("benign, melanoma?"),
        model("benign"),
        user(None, "And the next: benign?"),
        model("No: melanoma."),
    ]
    row = tokenize_conversations(p, [talk], [[SIZE, (96, 32)]])[0]
    assert (
        row["input_ids"]
        == theirs(p, talk, [picture(size=SIZE[::-1]), picture(1, (32, 96))])["input_ids"][0]
    )
    end = turn_delimiters(p).end
    assert "".join(said(p, row["labels"]).split()) == "".join(
        f"melanoma{end}benign{end}No:melanoma.{end}".split()
    )
    assert [t.role == "answer" for t in describe_tokens(p, row["input_ids"])] == [
        label != -100 for label in row["labels"]
    ]
    got = group_token_spans(p, row["input_ids"], row["labels"])
    assert [s.role for s in got if s.role in ("prompt", "answer")] == [
        "prompt",
        "prompt",
        "answer",
        "prompt",
        "answer",
        "prompt",
        "answer",
    ]
    assert (
        sum(s.role == "image" for s in got) == 2
        and max(t.image_index for t in describe_tokens(p, row["input_ids"])) == 1
    )


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.text(max_size=30),
    answer=st.text(min_size=1, max_size=30),
    family=st.sampled_from(FAMILIES),
)
def test_any_text_is_masked_or_refused(prompt, answer, family):
    p = any_text.setdefault(family, tiny_processor(family))
    if not answer.strip() or "\x11" in prompt + answer:
        return
    try:
        row = tokenize_conversations(p, [build_messages(prompt, answer)], [[SIZE]])[0]
    except ValueError as e:
        assert "control token" in str(e)
        return
    assert (
        b"".join(token_bytes(p.tokenizer, [label for label in row["labels"] if label != -100]))
        .decode()
        .strip()
        == (answer.strip() + turn_delimiters(p).end).strip()
    )


any_text = {}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["melanoma", "benign?", "a\nb", "é"]),
            st.sampled_from(["melanoma", "No.", "é b"]),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["", "Be brief."]),
    st.sampled_from(FAMILIES),
)
def test_roles_and_labels_agree_on_any_talk(turns, brief, family):
    p = any_text.setdefault(family, tiny_processor(family))
    talk = [system(brief)] * bool(brief) + [
        t for q, a, n in turns for t in (user(*[None] * n, q), model(a))
    ]
    row = tokenize_conversations(p, [talk], [[SIZE] * sum(n for *_, n in turns)])[0]
    row_tokens = describe_tokens(p, row["input_ids"])
    assert [t.role == "answer" for t in row_tokens] == [label != -100 for label in row["labels"]]
    assert max(t.image_index for t in row_tokens) + 1 == sum(n for *_, n in turns)
    prompts = [s.text.strip() for s in group_token_spans(p, row["input_ids"]) if s.role == "prompt"]
    assert "".join("".join(prompts).split()) == "".join(
        (brief + "".join(q for q, *_ in turns)).split()
    )  # Gemma 3 has no system turn: one span with the first prompt


def test_no_answer_no_loss(any_processor):
    p = any_processor
    row = tokenize_conversations(p, [build_messages(PROMPT)], [[SIZE]], add_generation_prompt=True)[
        0
    ]
    assert (
        set(row["labels"]) == {-100} and describe_tokens(p, row["input_ids"])[-1].role == "template"
    )
    assert (
        row["input_ids"]
        == theirs(
            p, build_messages(PROMPT), [picture(size=SIZE[::-1])], add_generation_prompt=True
        )["input_ids"][0]
    )
    assert tokenize_conversations(p, []) == []


def test_control_tokens_and_turns_in_data_are_refused(any_processor):
    p = any_processor
    g = turn_delimiters(p)
    for token in [*get_special_tokens(p.tokenizer), g.user.strip(), g.model.strip()]:
        for f in (
            lambda: tokenize_conversations(p, [build_messages(f"a {token} b", "x")]),
            lambda: tokenize_conversations(p, [build_messages("x", f"a{token}")]),
            lambda: tokenize_conversations(p, [[system(token), *build_messages("x", "y")]]),
            lambda: Collator(p, include_notes=True)([record(0, notes=token)]),
        ):
            with pytest.raises(
                ValueError, match="control token or a turn.*(Remove|set the record aside)"
            ) as e:
                f()
            assert "contains" in str(e.value)


def test_bad_talks_are_refused(processor, families):
    with pytest.raises(ValueError, match="conversation 1: .*empty"):
        tokenize_conversations(processor, [build_messages("a", "x"), build_messages("b", " \n")])
    with pytest.raises(ValueError, match="max_length=50"):
        tokenize_conversations(processor, [build_messages(PROMPT, CAPTION)], max_length=50)
    with pytest.raises(ValueError, match="empty"):
        Collator(processor)([dict(image=picture(), caption=None)])
    with pytest.raises(ValueError, match="announce 1 images, but 2"):
        encode_example(processor, [picture()] * 2, build_messages("a", "b"))
    with pytest.raises(ValueError, match="is no turn"):
        tokenize_conversations(processor, [[dict(role="user", content="plain string")]])
    with pytest.raises(ValueError, match="is no turn"):
        tokenize_conversations(processor, [[dict(role="tool", content=[])]])
    with pytest.raises(ValueError, match="refuses turns by user, user.*alternate"):
        tokenize_conversations(processor, [[user("a"), user("b")]])
    with pytest.raises(ValueError, match="as many tokens as its size"):
        tokenize_conversations(families["qwen2_vl"], [build_messages("a", "b")])
    with pytest.raises(ValueError, match="cannot mix rows"):
        Collator(families["mllama"])([record(0), dict(images=[], caption="b")])


def test_templates_that_lose_words_are_refused(processor):
    import copy

    p = copy.copy(processor)
    p.chat_template = (
        "{% for m in messages %}{{ '<start_of_turn>' + m.role }}{% for c in m.content %}{% if"
        " c.type == 'text' and m.role != 'system' %}{{ c.text.lower() }}{% endif %}{% endfor"
        " %}<end_of_turn>{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out, repeats or rewrites"):
        tokenize_conversations(p, [[system("Be."), *build_messages("a", "b", num_images=0)]])
    with pytest.raises(ValueError, match="leaves out, repeats or rewrites"):
        tokenize_conversations(p, [build_messages("ABC", "b", num_images=0)])
    with pytest.raises(ValueError, match="leaves out 1 of 1 images"):
        tokenize_conversations(p, [build_messages("abc", "b")])
    p.chat_template = None
    with pytest.raises(ValueError, match="has no chat template.*instruction-tuned"):
        tokenize_conversations(p, [build_messages("abc", "b")])


def test_a_template_that_ends_answers_with_nothing(families):
    import copy

    p = copy.copy(families["llava"])  # LLaVA 1.5's template on the hub has no </s>
    p.chat_template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content %}{{ '<image>\n'"
        " if c.type == 'image' else c.text + ' ' }}{% endfor %}{% endfor %}{% if"
        " add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    assert turn_delimiters(p).end == "" and turn_delimiters(p).user.strip() == "USER:"
    talk = [user(None, "Is it?"), model("melanoma"), user("Sure?"), model("Yes.")]
    row = tokenize_conversations(p, [talk], [[SIZE]])[0]
    assert "".join(said(p, row["labels"]).split()) == "melanomaYes." and [
        t.role == "answer" for t in describe_tokens(p, row["input_ids"])
    ] == [label != -100 for label in row["labels"]]


def test_padding_that_is_spelled_as_the_end_of_an_answer():
    p = tiny_processor("llava")
    p.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token; choose one"):
        encode_example(p, None, "a", "b")
    p.tokenizer.pad_token = "</s>"
    b = Collator(p)([record(0), record(1, caption="Yes.")])
    assert find_batch_errors(b, p) == [] and said(p, b["labels"][1]).strip() == "Yes.</s>"
    row = describe_tokens(p, b["input_ids"][1])
    assert [t.role for t in row].count("padding") == (b["attention_mask"][1] == 0).sum() > 5


def test_a_changed_image_size_is_seen_at_once(processor):
    p = tiny_processor("llava")
    assert get_num_image_tokens(encode_example(p, picture()), p) == [16]
    p.image_processor.crop_size = dict(height=64, width=64)
    p.image_processor.size = dict(shortest_edge=64)
    b = encode_example(p, picture())
    assert get_num_image_tokens(b, p) == [64] and find_batch_errors(b, p) == []


def test_token_bytes_of_sentencepiece(tmp_path):
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers import models as tm
    from transformers import PreTrainedTokenizerFast

    vocab = {
        w: k
        for k, w in enumerate(
            ["<unk>", "<s>", "▁", "▁mole", "a", "é", *(f"<0x{b:02X}>" for b in range(256))]
        )
    }
    t = Tokenizer(tm.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", unk_token="<unk>")
    ids = [1, 3, 4, 5, 2, vocab["<0xF0>"], vocab["<0x9F>"], vocab["<0x99>"], vocab["<0x82>"]]
    assert b"".join(token_bytes(tok, ids)).decode() == "<s> moleaé 🙂"


# --- encode and collate
def test_encode_is_the_processors_own(any_processor):
    p, shown = any_processor, [picture(0, (64, 48)), picture(1, (32, 96))]
    talk = [system("Be brief."), user(None, "a?"), model("b"), user(None, "c?"), model("d")]
    for turns in (talk, talk[:-1]):
        speak = turns[-1]["role"] == "user"
        want, got = (
            theirs(p, turns, shown, return_tensors="pt", add_generation_prompt=speak),
            encode_example(p, shown, turns),
        )
        assert set(got) == {*want, *(() if speak else ("labels",))} and all(
            torch.equal(got[k], want[k]) for k in want
        )


def test_batches_are_the_processors_own(any_processor):
    p = any_processor
    shown = [[picture(0, (64, 48)), picture(1, (32, 96))], [picture(2)]]
    talks = [
        [user(None, "a?"), model("b"), user(None, "c?"), model("d")],
        [user(None, "Is it melanoma?"), model("No.")],
    ]
    want = p.apply_chat_template(
        [with_pictures(t, s) for t, s in zip(talks, shown)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(padding=True),
    )
    got = Collator(p)([dict(messages=t, images=s) for t, s in zip(talks, shown)])
    assert set(got) == {*want, "labels"} and all(torch.equal(got[k], want[k]) for k in want)
    assert (
        find_batch_errors(got, p) == []
        and not got["labels"][1][got["attention_mask"][1] == 0].ne(-100).any()
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_pixels_take_any_picture(processor, mode):
    im = (
        Image.fromarray(np.full((30, 50), 300, np.uint16))
        if mode == "I;16"
        else picture(size=(50, 30)).convert(mode)
    )
    assert images_to_pixel_values(processor, [im]).shape == (1, 3, SIDE, SIDE)
    assert torch.equal(
        images_to_pixel_values(processor, [np.asarray(picture())]),
        images_to_pixel_values(processor, [picture()]),
    )


def test_collator_pads_and_keeps_each_row(processor):
    records = [
        record(0),
        record(1, caption="Yes."),
        record(2, prompt="Is it melanoma?", answer="No."),
    ]
    batch = validate_batch(Collator(processor, include_captions=True)(records), processor)
    for k, (p, a) in enumerate(
        [(PROMPT, records[0]["caption"]), (PROMPT, "Yes."), ("Is it melanoma?", "No.")]
    ):
        one = encode_example(processor, records[k]["image"], p, a)
        T = one["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask", "token_type_ids"):
            assert torch.equal(batch[key][k, :T], one[key][0])
        assert (
            (batch["labels"][k, T:] == -100).all()
            and not batch["attention_mask"][k, T:].any()
            and not batch["token_type_ids"][k, T:].any()
        )
        assert torch.equal(batch["pixel_values"][k], one["pixel_values"][0])
    assert (
        batch["caption_input_ids"].shape == batch["caption_attention_mask"].shape
        and (batch["caption_input_ids"][:, 0] == processor.tokenizer.bos_token_id).all()
    )


def test_identical_captions_share_an_id_in_every_batch(processor):
    make = Collator(processor, include_captions=True)
    a, b = make([record(0), record(1), record(0)])["caption_id"], make([record(1)])["caption_id"]
    assert a[0] == a[2] != a[1] and a[1] == b[0]


def test_notes_and_system_come_before_the_prompt_only_when_asked(processor):
    texts = [
        processor.tokenizer.decode(
            Collator(processor, include_notes=n, system=s)([record(1)])["input_ids"][0]
        )
        for n, s in ((False, None), (True, "Be brief."))
    ]
    assert (
        "Age 51, back." not in texts[0]
        and "Age 51, back. Describe this lesion." in texts[1]
        and "user\nBe brief.\n\n" in texts[1]
        and "Be brief" not in texts[0]
    )
    assert Collator(processor, include_notes=True).build_prompt(dict(notes=None)) == PROMPT


def test_generation_batches_end_where_the_model_speaks(any_processor):
    p = any_processor
    batch = Collator(p, for_training=False, include_notes=True)(
        [record(0, notes="Age 5."), record(1, notes="A much longer note.")]
    )
    assert (
        "labels" not in batch
        and not batch["attention_mask"][0, 0]
        and batch["attention_mask"][:, -1].all()
    )
    assert all(
        describe_tokens(p, r)[-1].text.strip() in ("", ":", "<|end_header_id|>")
        for r in batch["input_ids"]
    )
    assert find_batch_errors(batch, p) == []
    talk = dict(image=picture(), messages=[user(None, "a"), model("b")])
    assert (
        Collator(p, for_training=False).build_conversation(talk) == [user(None, "a")]
        and Collator(p).build_conversation(talk) == talk["messages"]
    )


def test_cached_features_and_rows_open_no_picture(processor):
    make = Collator(processor)
    rows = [
        dict(r, features=np.full((TOKENS, 128), k, np.float32))
        for k, r in enumerate(make.tokenize_records([record(0), record(1)]))
    ]
    batch = make(rows)  # no 'image', no 'caption' in there
    assert "pixel_values" not in batch and batch["features"].shape == (2, TOKENS, 128)
    assert torch.equal(batch["labels"], make([record(0), record(1)])["labels"])
    validate_batch(batch, processor)


# --- spans, grids and pictures
def test_spans_cover_the_row(processor):
    row = encode_example(processor, picture(), "Is it melanoma?", "melanoma")
    got = group_token_spans(processor, row["input_ids"][0], row["labels"][0])
    assert [s.role for s in got] == [
        "template",
        "image",
        "template",
        "prompt",
        "template",
        "answer",
        "template",
    ]
    assert [s.start for s in got[1:]] == [s.stop for s in got[:-1]] and got[-1].stop == row[
        "input_ids"
    ].shape[1]
    assert [s.num_loss_tokens for s in got] == [0, 0, 0, 0, 0, got[5].stop - got[5].start, 0]
    assert (
        got[1].stop - got[1].start == TOKENS == got[1].grid[0] ** 2
        and got[1].grid[0] == got[1].grid[1]
        and got[3].text == "Is it melanoma?"
        and got[5].text == "melanoma<end_of_turn>"
    )


def test_grids_are_where_pixels_go(families):
    """A bright block moves to another place of the picture: only the image tokens of its grid cell
    may change.
    """
    p, _m = families["qwen2_vl"], models.tiny_random_model("qwen2_vl", vocab_size=1024)
    a = np.zeros((32, 64, 3), np.uint8)
    a[16:32, 32:48] = 255  # cell (1, 2) of 2 × 4
    dark, bright = (encode_example(p, Image.fromarray(x)) for x in (a * 0, a))
    assert compute_image_grids(dark, p) == [(2, 4)] and group_token_spans(
        p, dark["input_ids"][0], image_grids=compute_image_grids(dark, p)
    )[1].grid == (2, 4)
    rows = (dark["pixel_values"] != bright["pixel_values"]).any(
        1
    ).nonzero().flatten() // 4  # merged token of each patch
    assert set(rows.tolist()) == {1 * 4 + 2}
    for f, shape in (("gemma3", (2, 2)), ("llava", (4, 4)), ("mllama", (1, 1))):
        assert compute_image_grids(encode_example(families[f], picture()), families[f]) == [shape]


def test_pictures_are_what_went_in(families):
    for f, p in families.items():
        side = SIDE if f == "base" else 32
        im = picture(3, (side, side))
        got = denormalize_images(encode_example(p, im), p)
        assert len(got) == 1 and np.abs(got[0].astype(int) - np.asarray(im)).max() <= 1, f
    wide = picture(4, (64, 32))
    for f in ("qwen2_vl", "tiles"):
        b = encode_example(
            families[f], [wide, picture(5, (32, 32))], [user(None, None, "a"), model("b")]
        )
        assert compute_image_grids(b, families[f]) == (
            [(2, 4), (2, 2)] if f == "qwen2_vl" else [(1, 2), (1, 1)]
        )
        assert (
            np.abs(denormalize_images(b, families[f])[0].astype(int) - np.asarray(wide)).max() <= 1
        )
    assert (
        denormalize_images(encode_example(families["gemma3"], None, "a", "b"), families["gemma3"])
        == []
    )


# --- check
def good(processor, n=3):
    return Collator(processor)([record(k) for k in range(n)])


def swap(batch, **kw):
    return {**batch, **kw}


def exchange(row, i, j):
    row[[i, j]] = row[[j, i]].clone()


def edit(t, f):
    t = t.clone()
    f(t)
    return t


def by_hand(p, *texts):
    rows = []
    for text in texts:
        ids = p.tokenizer(
            text.replace(p.image_token, image_placeholder(p, (32, 32))),
            add_special_tokens=not text.startswith(p.tokenizer.bos_token or "\0"),
        ).input_ids
        rows.append(
            dict(
                input_ids=ids,
                labels=[i if r == "answer" else -100 for i, r in zip(ids, get_token_roles(p, ids))],
            )
        )
    return collate_examples(
        p,
        rows,
        [[picture(k, (32, 32))] * text.count(p.image_token) for k, text in enumerate(texts)],
    )


def test_check_passes_what_is_right(any_processor):
    p = any_processor
    b = good(p)
    assert validate_batch(b, p) is b
    validate_batch(encode_example(p, None, "Hello", "Yes."), p)
    validate_batch(encode_example(p, picture()), p)
    validate_batch(
        encode_example(p, picture(), [user("Look at this:", None, "Is it?"), model("Yes.")]), p
    )


@pytest.mark.parametrize(
    "words, fault",
    [
        (
            f"3 × {TOKENS} = {3 * TOKENS} image tokens.*{3 * TOKENS - 1}.*row 1 has {TOKENS - 1}",
            lambda b: swap(b, input_ids=edit(b["input_ids"], lambda t: t[1, 7].fill_(99))),
        ),
        ("2 images need", lambda b: swap(b, pixel_values=b["pixel_values"][:2])),
        ("no pixel_values", lambda b: {k: v for k, v in b.items() if k != "pixel_values"}),
        (
            "form 5 groups.*row 1 has 3.*split up",
            lambda b: swap(
                b,
                **{
                    k: edit(b[k], lambda t: exchange(t[1], 7, TOKENS + 9))
                    for k in ("input_ids", "token_type_ids", "labels")
                },
            ),
        ),
        (
            f"{TOKENS} image tokens are masked out",
            lambda b: swap(
                b,
                attention_mask=edit(
                    b["attention_mask"], lambda t: t[1].masked_fill_(b["token_type_ids"][1] == 1, 0)
                ),
            ),
        ),
        (
            "nan or infinite",
            lambda b: swap(
                b, pixel_values=edit(b["pixel_values"], lambda t: t[0, 0, 0, 0].fill_(np.nan))
            ),
        ),
        ("never normalised", lambda b: swap(b, pixel_values=(b["pixel_values"] + 1) * 127.5)),
        (
            "all 3 rows have the same image",
            lambda b: swap(b, pixel_values=b["pixel_values"][:1].repeat(3, 1, 1, 1)),
        ),
        (
            "token_type_ids are missing",
            lambda b: {k: v for k, v in b.items() if k != "token_type_ids"},
        ),
        ("token_type_ids mark", lambda b: swap(b, token_type_ids=b["token_type_ids"].roll(1, 1))),
        ("image tokens are included in the loss", lambda b: swap(b, labels=b["input_ids"].clone())),
        (
            "rows .0, 1, 2. have no token in the loss",
            lambda b: swap(b, labels=torch.full_like(b["labels"], -100)),
        ),
        (
            "rows .1. have no token in the loss",
            lambda b: swap(b, labels=edit(b["labels"], lambda t: t[1].fill_(-100))),
        ),
        ("shifted by one", lambda b: swap(b, labels=b["labels"].roll(-1, 1))),
        (
            "1 labels differ",
            lambda b: swap(
                b,
                labels=edit(
                    b["labels"], lambda t: t[0, int((t[0] != -100).nonzero()[2])].fill_(99)
                ),
            ),
        ),
        ("give one label for each token", lambda b: swap(b, labels=b["labels"][:, 1:])),
        (
            "begin-of-text twice",
            lambda b: {k: torch.cat([v[:, :1], v], 1) if v.ndim == 2 else v for k, v in b.items()},
        ),
        (
            "stops without .<end_of_turn>",
            lambda b: {k: v[:, : TOKENS + 34] if v.ndim == 2 else v for k, v in b.items()},
        ),
        (
            "row 0 does not include '<end_of_turn>' after the answer in the loss",
            lambda b: swap(b, labels=b["labels"].masked_fill(b["labels"] == 5, -100)),
        ),
        (
            "row 2 includes only .* of an answer",
            lambda b: swap(
                b,
                labels=edit(
                    b["labels"],
                    lambda t: t[2].__setitem__((t[2] != -100).nonzero()[:4].flatten(), -100),
                ),
            ),
        ),
        (
            "padding tokens are included in the loss",
            lambda b: dict(
                pad_all(b), labels=torch.cat([b["labels"], torch.zeros(3, 2, dtype=int)], 1)
            ),
        ),
    ],
)
def test_check_refuses(processor, words, fault):
    bad = fault(good(processor))
    assert any(re.search(words, f, re.S) for f in find_batch_errors(bad, processor)), (
        find_batch_errors(bad, processor)
    )
    with pytest.raises(ValueError):
        validate_batch(bad, processor)


def pad_all(b):
    return {
        k: torch.cat([v, torch.zeros(3, 2, dtype=v.dtype)], 1) if v.ndim == 2 else v
        for k, v in b.items()
    }


def test_check_needs_the_template_for_what_the_ids_do_not_say(processor):
    b = good(processor)
    at = [
        r
        for r in range(b["input_ids"].shape[1])
        if get_token_roles(processor, b["input_ids"][0])[r] == "prompt"
    ]
    b["labels"][0, at[0]] = b["input_ids"][0, at[0]]
    with pytest.raises(ValueError, match="row 0: prompt tokens are included in the loss"):
        validate_batch(b, processor)


LINES = dict(
    gemma3="<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>\n{}",
    llava="USER: {} ASSISTANT: {}</s>{}",
    mllama=(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>{}"
    ),
    qwen2_vl=(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n{}"
    ),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_misplaced_picture_is_found_in_every_family(families, family):
    p, line = families[family], LINES[family]
    im = p.image_token
    validate_batch(by_hand(p, line.format(f"{im}Is it?", "Yes, it is.", "")), p)
    for words, text in (
        ("after the prompt", line.format(f"Is it?{im}", "Yes.", "")),
        ("inside the answer", line.format("Is it?", f"Yes, {im}it is.", "")),
        ("after the answer", line.format("Is it?", "Yes.", im)),
        (
            "text of the template inside",
            line.format(f"{im}Is it?", "Yes.", "")
            + line.replace("<bos>", "").split("{}")[0]
            + "Ignore it.",
        ),
    ):
        assert any(words in f for f in find_batch_errors(by_hand(p, text), p)), (
            words,
            find_batch_errors(by_hand(p, text), p),
        )
    cut = by_hand(p, line.format(f"{im}Is it?", "Yes, it is.", ""))
    cut = {
        k: v[:, :-3] if v.ndim == 2 and v.shape == cut["input_ids"].shape else v
        for k, v in cut.items()
    }
    assert any("stops without" in f for f in find_batch_errors(cut, p))
    same = by_hand(p, *(line.format(f"{im}Is it?", a, "") for a in ("Yes.", "No.")))
    for k in same:
        same[k] = (
            torch.cat([same[k][: len(same[k]) // 2]] * 2) if k in ("pixel_values",) else same[k]
        )
    assert any("same image" in f for f in find_batch_errors(same, p)), find_batch_errors(same, p)


@pytest.mark.parametrize(
    "family, words, drop",
    [
        ("mllama", "cross_attention_mask is missing", "cross_attention_mask"),
        ("qwen2_vl", "mm_token_type_ids are missing", "mm_token_type_ids"),
    ],
)
def test_family_masks_are_asked_for(families, family, words, drop):
    b = good(families[family])
    del b[drop]
    with pytest.raises(ValueError, match=words):
        validate_batch(b, families[family])
    with pytest.raises(ValueError, match=words):
        validate_batch(b, models.tiny_random_model(family, vocab_size=1024))


def test_later_turns_and_several_questions_on_one_picture_pass(any_processor):
    p = any_processor
    b = Collator(p)(
        [
            dict(
                images=[picture(), picture(1)],
                messages=[user(None, "a?"), model("b"), user(None, "c?"), model("d")],
            )
        ]
    )
    assert find_batch_errors(b, p) == []
    assert (
        find_batch_errors(
            Collator(p)(
                [
                    dict(image=picture(), prompt=q, answer=a)
                    for q, a in (("Is it melanoma?", "Yes."), ("Is it benign?", "No."))
                ]
            ),
            p,
        )
        == []
    )


def test_wanted_agrees_between_processor_and_model(families):
    for f in FAMILIES:
        b = Collator(families[f])(
            [
                dict(image=picture(0, (64, 48)), caption="a"),
                dict(image=picture(1, (32, 64)), caption="b"),
            ]
        )
        assert (
            get_num_image_tokens(b, families[f])
            == get_num_image_tokens(b, models.tiny_random_model(f, vocab_size=1024))
            == [int((r == get_image_token_id(families[f])).sum()) for r in b["input_ids"]]
        )


# --- the X-ray
def test_xray_draws_every_family_and_what_is_wrong(any_processor):
    import matplotlib.pyplot as plt

    p = any_processor
    b = Collator(p)([record(k) for k in range(3)])
    fig = xray_batch(b, p, examples=[0, 2])
    assert (
        len(fig.axes) == 6
        and len(fig.axes[2].images) == 1
        and "nothing is wrong" in " ".join(t.get_text() for t in fig.axes[1].texts)
    )
    words = " ".join(t.get_text() for t in fig.axes[3].texts)
    assert "in the loss: This lesion shows" in words and "image token" in words
    bad = dict(b, labels=b["labels"].roll(-1, 1), pixel_values=b["pixel_values"])
    assert "shifted by one" in " ".join(t.get_text() for t in xray_batch(bad, p).axes[1].texts)
    xray_batch({k: v for k, v in b.items() if k != "labels"}, p)
    xray_batch(Collator(p, for_training=False)([record(0)]), p)
    xray_batch(encode_example(p, None, "$x$ <b> 漢字", "$a_b$"), p).canvas.draw()
    plt.close("all")


def test_xray_survives_broken_batches(processor):
    import matplotlib.pyplot as plt

    b = good(processor)
    for bad in (
        swap(b, pixel_values=b["pixel_values"][:2]),
        {k: v for k, v in b.items() if k != "pixel_values"},
        swap(b, input_ids=edit(b["input_ids"], lambda t: t[1, 7].fill_(99))),
        swap(b, input_ids=torch.full_like(b["input_ids"], 50)),
        swap(b, labels=b["labels"][:, 1:]),
        swap(b, input_ids=torch.zeros_like(b["input_ids"])),
    ):
        xray_batch(bad, processor, examples=3)
        plt.close("all")
        assert find_batch_errors(bad, processor)


def test_boxes_put_a_picture_in_one_box_and_stay_in_the_line(processor):
    row = describe_tokens(processor, good(processor)["input_ids"][0])
    drawn = layout_token_boxes(row, width=60)
    assert (
        sum(t == f"{TOKENS} image tokens" for *_, t, _ in drawn) == 1
        and all(x + w <= 60 for x, _, w, *_ in drawn)
        and drawn[-1][1] > 2
    )


def test_eight_thousand_rows_in_seconds(processor):
    import time

    t = time.process_time()
    rows = tokenize_conversations(
        processor, [build_messages(PROMPT, f"{CAPTION} {k}") for k in range(8000)]
    )
    assert len(rows) == 8000 and time.process_time() - t < 20
