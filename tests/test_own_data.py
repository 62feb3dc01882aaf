"Data of one's own: labels are never guessed, nothing is dropped in silence, images look the same."

import base64
import io
import json
import tarfile
import unicodedata

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from mmkit import chat, data, evaluate, explain, models, report, training
from mmkit.chat.images import convert_to_rgb, get_image_size
from mmkit.chat.templates import tiny_processor
from mmkit.data.records import FEATURES, make_record
from mmkit.training.cache import _iter_image_bytes
from mmkit.training.dataset import TokenizedDataset

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("gemma3")


@pytest.fixture
def load(tmp_path):
    "Writes lines as a table beside twelve images, and loads it."
    for k in range(12):
        Image.new("RGB", (32, 24), (20 * k, 90, 250 - 20 * k)).save(tmp_path / f"{k}.png")

    def load_lines(*lines, **options):
        (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
        return data.load_table(tmp_path / "table.csv", **options)

    return load_lines


def rows(values):
    return [f"{k}.png,{value}" for k, value in enumerate(values)]


# ---- labels
@pytest.mark.parametrize(
    "spelled,labels,expected",
    [
        (["stop", "yield", "limit"], None, ["stop", "yield", "limit"]),
        (["nv", "mel", "bcc"], None, ["nv", "mel", "bcc"]),
        (["Benign", "MEL", "melanoma"], None, ["benign", "melanoma", "melanoma"]),
        (["mel", "mel", ""], None, ["melanoma", "melanoma"]),
        (["0", "1", "0"], {0: "benign", 1: "melanoma"}, ["benign", "melanoma", "benign"]),
        (["0.0", "1.0", "7"], {"0": "none", "1": "one", "7": "7"}, ["none", "one", "7"]),
        (["yes", "no", "yes"], {"yes": "ill", "no": "well"}, ["ill", "well", "ill"]),
        (["stop", "yield", "?!"], {"?!": None}, ["stop", "yield", None]),
        (["nevus", "mel", "BCC"], {"nevus": "benign", "bcc": None}, ["benign", "melanoma", None]),
        (["A", "B", "A"], {"A": None, "B": None}, [None, None, None]),
    ],
)
def test_a_label_is_what_the_table_or_the_caller_says(load, spelled, labels, expected):
    records, report = load("image,label", *rows(spelled), labels=labels)
    assert records["label"][:] == expected, report


@pytest.mark.parametrize("spelled", [("0", "1"), ("yes", "no"), ("True", "False"), ("3", "12")])
def test_a_code_asks_what_it_means(load, spelled):
    with pytest.raises(ValueError) as caught:
        load("image,melanoma", *rows(spelled))
    assert f"labels={{'{spelled[0]}': '…', '{spelled[1]}': '…'}}" in str(caught.value)


def test_a_stray_code_among_names_is_set_aside_and_the_rest_kept(load):
    records, report = load("image,label", *rows(["cat", "dog", "1"]))
    assert records["label"][:] == ["cat", "dog"] and report.reasons == {"label outside the set": 1}


def test_foreign_labels_are_all_named_and_none_is_made_a_melanoma(load):
    _, report = load("image,label", *rows(["benign", "melanoma", "BCC", "SCC"]))
    assert [aside["id"] for aside in report.aside] == ["2.png", "3.png"]
    for aside in report.aside:
        assert "labels={'BCC': None, 'SCC': None}" in aside["detail"]


def test_a_label_is_given_as_a_name(load):
    with pytest.raises(ValueError, match="name of the class"):
        load("image,label", *rows("ab"), labels=dict(a=0, b=1))


def test_columns_of_zero_and_one_are_classes(load):
    table = ("image,MEL,NV,UNK", "0.png,1,0,0", "1.png,0.0,1.0,0.0", "2.png,0,0,1")
    records, report = load(*table)
    assert records["label"][:] == ["MEL", "NV", "UNK"]
    assert "the label is read from the columns MEL, NV, UNK" in str(report)
    records, _ = load(*table, labels=dict(mel="melanoma", nv="benign", unk=None))
    assert records["label"][:] == ["melanoma", "benign"]  # of the third row nothing is said
    assert "melanoma" in records["caption"][0]


def test_one_hot_columns_beside_captions_are_taken_when_they_are_named(load):
    table = ("image,caption,cat,dog", "0.png,An animal.,1,0", "1.png,Another.,0,1")
    records, report = load(*table)
    assert records["label"][:] == [None, None] and "not used: cat, dog" in str(report)
    records, report = load(*table, columns=dict(label=["cat", "dog"]))
    assert records["label"][:] == ["cat", "dog"] and "not used" not in str(report)
    _, report = load(*table, "2.png,Both.,1,1", columns=dict(label=["cat", "dog"]))
    assert report.reasons == {"several labels": 1}


# ---- nothing is dropped in silence, and nothing is made up
def test_the_report_names_the_columns_that_are_not_used(load):
    _, report = load("image,label,weather,border", "0.png,benign,rain,regular", "1.png,mel,sun,")
    assert report.notes == [
        "columns that are not used: weather",
        "10 image files are named by no row that was loaded, such as 10.png",
    ]


@pytest.mark.parametrize("names", ["prompt,caption", "question,answer", "instruction,response"])
def test_each_row_is_asked_its_own_prompt(load, processor, names):
    records, _ = load(f"image,{names}", "0.png,Which animal?,A dog.", "1.png,,A cat.")
    assert records["prompt"][:] == ["Which animal?", None]
    asked = [chat.Collator(processor).build_prompt(record) for record in records]
    assert asked == ["Which animal?", chat.PROMPT]
    shuffled = records.select([1, 0]).to_list()
    assert shuffled[1]["prompt"] == "Which animal?"


def test_a_prompt_may_not_hold_control_tokens(load):
    _, report = load("image,prompt,caption", "0.png,<end_of_turn>,A.", "1.png,What?,B.")
    assert report.reasons == {"template token in prompt": 1}


def test_a_traffic_sign_is_asked_nothing_clinical(load):
    records, _ = load("image,caption,label", *rows(["A red sign.,stop", "A sign.,yield"]))
    assert records["questions"][:] == [[], []]
    records, _ = load("image,label", *rows(["stop", "yield"]))
    assert records["caption"][:] == ["Stop.", "Yield."] and records["questions"][:] == [[], []]
    records, _ = load("image,label", *rows(["benign", "melanoma"]))
    assert all(records["questions"][:])


def test_own_classes_are_split_evenly_and_counted(load):
    images = [f"{k}.png,{('stop', 'yield')[k % 2]}" for k in range(12)]
    named = [f"{line},{k}-{turn}" for turn in range(5) for k, line in enumerate(images)]
    records, _ = load("image,label,id", *named)
    splits = data.split_records(records)
    for part in splits.values():
        assert abs(part["label"][:].count("stop") - len(part) / 2) <= 1
    summary = str(data.split_summary(splits))
    assert "stop" in summary and "yield" in summary and "melanoma" not in summary


# ---- images
def transparent():
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse([10, 5, 30, 15], fill=(200, 0, 0, 255))
    return image


def palette(transparency=None):
    image = Image.new("RGB", (40, 20), "green")
    image.paste((200, 0, 0), (0, 0, 20, 20))
    image = image.quantize(4)
    if transparency is not None:
        image.info["transparency"] = image.getpixel((0, 0))
    return image


def grey16():
    ramp = np.linspace(0, 65535, 800).astype(np.uint16).reshape(20, 40)
    return Image.fromarray(ramp)


def two_halves(mode):
    image = Image.new("RGB", (40, 20), "white")
    image.paste((10, 60, 110), (0, 0, 20, 20))
    return image.convert(mode)


MODES = {
    "transparent.png": transparent,
    "palette.png": palette,
    "transparent_palette.png": lambda: palette(0),
    "grey16.png": grey16,
    "grey.png": lambda: two_halves("L"),
    "grey_alpha.png": lambda: two_halves("LA"),
    "one_bit.png": lambda: two_halves("1"),
    "cmyk.tif": lambda: two_halves("CMYK"),
    "turned.png": lambda: two_halves("RGB"),
}


@pytest.mark.parametrize("name", MODES)
def test_an_image_looks_the_same_whichever_way_it_comes_in(tmp_path, processor, name):
    exif = Image.Exif()
    exif[0x0112] = 6 if name.startswith("turned") else 1
    MODES[name]().save(tmp_path / name, exif=exif)
    (tmp_path / "t.csv").write_text(f"image,caption\n{name},An image.\n")
    table = data.load_table(tmp_path / "t.csv")[0][0]["image"]

    with Image.open(tmp_path / name) as opened:
        opened.load()
        made = make_record(id="a", image=opened.copy() if name != "turned.png" else opened)
        stored = datasets.Dataset.from_list([made], features=FEATURES)[0]["image"]
        plain = datasets.Features(dict(image=datasets.Image()))
        column = datasets.Dataset.from_dict(dict(image=[str(tmp_path / name)]), features=plain)
        unshifted = data.apply_shift([dict(id="a", image=opened)], "blur", 0)
        ways = dict(
            file=data.open_image(tmp_path / name),
            direct=opened,
            record=stored,
            column=column[0]["image"],
            unshifted=unshifted[0]["image"],
        )
        expected = np.asarray(table)
        assert expected.shape == ((40, 20, 3) if name == "turned.png" else (20, 40, 3))
        wanted = chat.images_to_pixel_values(processor, [table])
        for way, image in ways.items():
            assert np.array_equal(np.asarray(convert_to_rgb(image)), expected), way
            assert get_image_size(image) == expected.shape[:2], way
            batch = chat.Collator(processor)([dict(image=image, caption="An image.")])
            assert np.array_equal(batch["pixel_values"], wanted), way


def test_arrays_are_images_in_either_order_of_axes(processor):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels)
    for array in (pixels, np.moveaxis(pixels, 2, 0), pixels.astype(np.int64)):
        assert np.array_equal(np.asarray(convert_to_rgb(array)), pixels)
    records = datasets.Dataset.from_list([dict(image=expected, caption="A.")])
    row = records.with_format("torch")[0]
    batch = chat.Collator(processor)([row])
    assert np.array_equal(batch["pixel_values"], chat.images_to_pixel_values(processor, [expected]))


@pytest.mark.parametrize(
    "wrong", [None, "a.png", np.zeros((20, 40, 3)), np.zeros((2, 20, 40, 3), np.uint8)]
)
def test_what_is_no_image_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match="give a PIL image"):
        convert_to_rgb(wrong)


def test_cached_features_know_the_palette_of_an_image():
    images = [Image.frombytes("P", (2, 2), bytes([0, 1, 1, 0])) for _ in range(2)]
    for image, colours in zip(images, ([255, 0, 0, 0, 255, 0], [0, 0, 0, 30, 30, 30])):
        image.putpalette(colours)
    first, second = _iter_image_bytes([dict(image=image) for image in images])
    assert first != second


# ---- conversations, several images, text alone
def say(role, text):
    return {"from": role, "value": text}


def turn(role, *content):
    return dict(role=role, content=list(content))


WORDS, PICTURE = dict(type="text", text="What is it?"), dict(type="image", path="0.png")
ANSWER = "A dog."
ONE_QUESTION = {
    "llava": dict(
        image="0.png", conversations=[say("human", "<image>\nWhat is it?"), say("gpt", ANSWER)]
    ),
    "sharegpt": dict(
        images=["0.png"],
        messages=[
            dict(role="user", content="<image>What is it?"),
            dict(role="assistant", content=ANSWER),
        ],
    ),
    "openai": dict(
        messages=[
            turn("user", WORDS, dict(type="image_url", image_url=dict(url="0.png"))),
            dict(role="assistant", content=ANSWER),
        ]
    ),
    "axolotl": dict(
        messages=[turn("user", PICTURE, WORDS), turn("assistant", dict(type="text", text=ANSWER))]
    ),
    "trl": dict(
        images=["0.png"],
        prompt=[turn("user", dict(type="image"), WORDS)],
        completion=[dict(role="assistant", content=ANSWER)],
    ),
    "alpaca": dict(images=["0.png"], instruction="<image>What is it?", output=ANSWER),
    "plain": dict(images=["0.png"], prompt="What is it?", answer=ANSWER),
}


@pytest.fixture
def load_json(load, tmp_path):
    def load_rows(*rows, lines=False):
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        (tmp_path / "talk.json").write_text(text)
        return data.load_table(tmp_path / "talk.json")

    return load_rows


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "array"])
@pytest.mark.parametrize("kind", ONE_QUESTION)
def test_one_question_is_a_prompt_and_a_caption_in_every_format(load_json, processor, kind, lines):
    records, report = load_json(ONE_QUESTION[kind], ONE_QUESTION[kind], lines=lines)
    assert report.reasons == {"duplicate id": 1} and report.rows == 2
    record = records[0]
    if kind == "openai":  # words before the image stay before it
        assert [part["type"] for part in record["messages"][0]["content"]] == ["text", "image"]
    else:
        assert (record["prompt"], record["caption"]) == ("What is it?", ANSWER)
        assert record["messages"] is record["images"] is None
    assert record["image"].size == (32, 24)
    labels = chat.Collator(processor)([record])["labels"][0]
    said = processor.tokenizer.decode(labels[labels != -100])
    assert said.startswith(ANSWER)


def test_turns_system_and_several_images_reach_the_batch(load_json, processor):
    talk = [
        say("system", "Be brief."),
        say("human", "<image>First? <image>"),
        say("gpt", "Blue."),
        say("human", "And now <image>?"),
        say("gpt", "Red."),
    ]
    records, report = load_json(dict(images=["0.png", "5.png", "11.png"], conversations=talk))
    record = records[0]
    assert not report.aside and record["image"] is None and len(record["images"]) == 3
    assert [message["role"] for message in record["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    collator = chat.Collator(processor)
    batch = collator(list(records))
    assert len(batch["pixel_values"]) == 3
    said = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert "Blue." in said and "Red." in said and "First?" not in said
    dataset = TokenizedDataset(records, collator)
    again = dataset.collate_fn([dataset[0]])
    assert again["input_ids"].tolist() == batch["input_ids"].tolist()
    assert np.array_equal(again["pixel_values"], batch["pixel_values"])


def test_a_question_without_image_is_text_alone(load_json, processor):
    records, report = load_json(
        dict(image="0.png", prompt="What is it?", caption="A dog."),
        dict(prompt="How many legs has a dog?", caption="Four."),
        dict(caption="Nothing is shown, and nothing asked."),
    )
    assert records["id"][:] == ["0", "row-2"] and report.reasons == {"no image named": 1}
    collator = chat.Collator(processor)
    dataset = TokenizedDataset(records, collator)
    assert [len(dataset.collate_fn([dataset[k]]).get("pixel_values", [])) for k in (0, 1)] == [1, 0]
    batch = dataset.collate_fn([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == collator(list(records))["input_ids"].tolist()


@pytest.mark.parametrize(
    "row,reason",
    [
        (dict(conversations=[say("human", "What?")]), "ends with a question"),
        (dict(image="0.png", conversations=[say("gpt", "A.")]), "nobody asks"),
        (dict(conversations=[say("human", "<image>?"), say("gpt", "A.")]), "do not fit"),
        (dict(conversations=[say("narrator", "?"), say("gpt", "A.")]), "role outside the set"),
        (dict(conversations=[say("human", " "), say("gpt", "A.")]), "a turn is empty"),
        (dict(messages=["What?", "A."]), "a turn is no object"),
        (dict(messages=[turn("user", "What?"), turn("assistant", "A.")]), "neither text nor image"),
        (dict(image="0.png", caption=["A.", "B."]), "the caption is no text"),
        (dict(conversations=[say("human", "?"), say("gpt", "<eos>")]), "template token in"),
    ],
)
def test_a_broken_conversation_is_set_aside_with_its_reason(load_json, row, reason):
    records, report = load_json(ONE_QUESTION["llava"], row)
    assert len(records) == 1 and reason in next(iter(report.reasons))


def test_turns_of_plain_texts_get_the_image_and_the_system_turn(processor):
    talk = [dict(role="user", content="What is it?"), dict(role="assistant", content="A dog.")]
    record = dict(image=Image.new("RGB", (32, 24)), messages=talk)
    collator = chat.Collator(processor, system="Be brief.")
    wanted = chat.build_messages("What is it?", "A dog.", system="Be brief.")
    assert collator.build_conversation(record) == wanted
    assert len(collator([record])["pixel_values"]) == 1
    with pytest.raises(ValueError, match="conversation 1: the turns announce 1 images, but 0"):
        collator([record, dict(image=None, messages=wanted)])


def test_a_conversation_that_ends_with_a_question_is_not_trained(processor):
    talk = [turn("user", dict(type="text", text="And now?"))]
    with pytest.raises(ValueError, match="ends with a question"):
        chat.Collator(processor)([dict(image=None, messages=talk)])
    assert "labels" not in chat.Collator(processor, for_training=False)(
        [dict(image=None, messages=talk)]
    )


def test_several_captions_of_an_image_and_equal_names_in_two_folders_are_kept(load, tmp_path):
    for place in ("p", "q"):
        (tmp_path / place).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / place / "same.png")
    lines = ["0.png,A dog.", "0.png,A cat.", "0.png,A dog.", "p/same.png,A.", "q/same.png,A."]
    records, report = load("image,caption", *lines)
    assert records["id"][:] == ["0", "0-2", "same", "same-2"]
    assert report.reasons == {"duplicate id": 1}


def test_an_image_inside_the_row_is_decoded(load_json, tmp_path):
    encoded = base64.b64encode((tmp_path / "5.png").read_bytes()).decode()
    rows = []
    for url in (f"data:image/png;base64,{encoded}", "data:image/png;base64,???"):
        picture = dict(type="image_url", image_url=dict(url=url))
        rows.append(dict(messages=[turn("user", picture, WORDS), turn("assistant", WORDS)]))
    records, report = load_json(*rows)
    assert records["id"][:] == ["row-1"] and len(records["provenance"][0]) < 100
    assert records[0]["image"].getpixel((0, 0)) == (100, 90, 150)
    assert report.reasons == {"image inside the row is damaged": 1}


def test_a_class_is_the_caption_where_the_prompt_places_the_image(load):
    records, _ = load("image,prompt,label", "0.png,<image>Which sign?,stop", "1.png,Which?,yield")
    assert records["prompt"][:] == ["Which sign?", "Which?"]
    assert records["caption"][:] == ["Stop.", "Yield."]


def test_a_system_column_beside_prompt_and_answer_is_kept(load_json):
    (record,) = load_json(dict(ONE_QUESTION["alpaca"], system="Be brief."))[0]
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]


def test_a_short_answer_in_words_for_nothing_is_an_answer(load_json):
    "`None` and `?` in a cell are missing values; in a conversation they are what was said."
    talk = [say("human", "Which sign?"), say("gpt", "None"), say("human", "?"), say("gpt", "n/a")]
    first, second = load_json(dict(conversations=talk), dict(conversations=talk[:2]))[0]
    assert [part["text"] for m in first["messages"] for part in m["content"]][1:] == [
        "None",
        "?",
        "n/a",
    ]
    assert second["messages"][1]["content"][0]["text"] == "None"


def test_the_mask_of_a_sign_makes_no_clinical_question(load, tmp_path):
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 24), 255).save(tmp_path / "masks/0.png")
    records, _ = load("image,label", "0.png,stop", "1.png,yield")
    assert records["questions"][:] == [[], []]


def test_lint_takes_questions_turns_and_several_images_as_they_are(load_json, tmp_path):
    noise = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(noise.integers(0, 256, (24, 32, 3), np.uint8)).save(tmp_path / f"{k}.png")
    talk = [say("human", "<image>Hi?"), say("gpt", "Yes."), say("human", "?"), say("gpt", "No.")]
    records, _ = load_json(
        dict(image="0.png", prompt="What is it?", caption="A dog."),
        dict(prompt="How many legs has a dog?", caption="Four."),
        dict(images=["1.png", "2.png"], prompt="Which one?", caption="The first."),
        dict(image="3.png", conversations=talk),
    )
    findings = data.lint_records(records)
    assert {finding.kind for finding in findings} <= {"vague captions"}
    assert "several images" in str(findings)
    assert len(data.fix_findings(records, findings).dataset) == 4


def test_maps_of_other_than_one_image_are_refused():
    model, processor = models.load()
    image = Image.new("RGB", (32, 32))
    several, none = dict(images=[image, image], caption="A."), dict(image=None, caption="A.")
    for record, number in ((several, 2), (none, 0)):
        assert len(evaluate.generate(model, processor, [dict(image=image), record])) == 2
        with pytest.raises(ValueError, match=f"has {number} images"):
            explain.attribute_words(model, processor, record)


def test_lint_opens_the_images_of_a_plain_data_set(load, tmp_path):
    features = datasets.Features(dict(image=datasets.Image(), caption=datasets.Value("string")))
    rows = [dict(image=f"{tmp_path}/{k}.png", caption=f"A red sign, {k}.") for k in range(12)]
    records = datasets.Dataset.from_list(rows, features=features)
    assert "no image" not in {finding.kind for finding in data.lint_records(records)}


def test_the_report_counts_records_of_text_alone(load_json):
    _, report = load_json(dict(ONE_QUESTION["plain"]), dict(prompt="How many?", answer="Four."))
    assert report.counts["no image, loaded as text alone"] == 1


def test_a_set_aside_row_takes_no_id(load, tmp_path):
    for place in ("p", "q"):
        (tmp_path / place).mkdir()
    (tmp_path / "p/same.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "q/same.png")
    records, report = load("image,caption", "p/same.png,A.", "q/same.png,B.", "q/same.png,B.")
    assert records["id"][:] == ["same"]
    assert report.reasons == {"not an image": 1, "duplicate id": 1}


def test_a_column_called_label_is_no_class(load):
    "0 and 1 in it stay codes, also where another column is its opposite."
    with pytest.raises(ValueError, match="say what the labels mean"):
        load("image,label,flipped", "0.png,0,1", "1.png,1,0")


def test_one_object_is_no_list_of_records(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps(dict(images=["0.png"]), indent=2))
    with pytest.raises(ValueError, match="info.json holds one object"):
        data.load_table(tmp_path / "info.json")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_found_in_either_form_of_unicode(load, tmp_path, form):
    other = dict(NFC="NFD", NFD="NFC")[form]
    (tmp_path / "0.png").rename(tmp_path / unicodedata.normalize(form, "Äpfel.png"))
    records, _ = load("image,caption", unicodedata.normalize(other, "Äpfel.png,An apple."))
    assert len(records) == 1


def test_absolute_paths_inside_the_folder_are_found(load, tmp_path):
    records, _ = load("image,caption", f"{tmp_path}/0.png,A.", f"{tmp_path.resolve()}/1.png,B.")
    assert records["id"][:] == ["0", "1"]
    with pytest.raises(ValueError, match="path leaves the folder"):
        load("image,caption", f"{tmp_path.parent}/0.png,A.")


def test_a_made_record_converts_each_of_its_images():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    record = make_record(images=[clear, clear])
    assert [image.getpixel((0, 0)) for image in record["images"]] == [(255, 255, 255)] * 2


# ---- folders
def image_at(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_class_folders_are_labels_and_splits(tmp_path):
    for place in ("train/stop/a", "train/yield/b", "test/stop/a", "train/masks/a"):
        image_at(tmp_path / f"{place}.png")
    records, _ = data.load_folder(tmp_path)
    rows = zip(records["id"][:], records["label"][:], records["split"][:])
    assert set(rows) == {
        ("a", "stop", "test"),
        ("a-2", "stop", "train"),
        ("b", "yield", "train"),
    }


def test_folders_of_images_and_masks_are_no_classes(tmp_path):
    for place in ("images/a", "masks/a"):
        image_at(tmp_path / f"{place}.png")
    with pytest.raises(ValueError, match="in a folder for each class"):
        data.load_folder(tmp_path)


def test_a_text_beside_an_image_is_its_caption(tmp_path):
    for name in ("a", "b", "c"):
        image_at(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("A dog.\n")
    (tmp_path / "b.txt").write_text("A cat.")
    records, report = data.load_folder(tmp_path)
    assert records["caption"][:] == ["A dog.", "A cat."] and report.reasons == {"empty caption": 1}


def test_metadata_of_an_imagefolder_gives_each_split(tmp_path):
    for split in ("train", "test"):
        image_at(tmp_path / split / "0.png")
        lines = [dict(file_name="0.png", text=f"A dog in {split}."), dict(text="No file.")]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, report = data.load_folder(tmp_path)
    assert report.reasons == {"no image named": 2}
    rows = zip(records["split"][:], records["caption"][:])
    assert sorted(rows) == [("test", "A dog in test."), ("train", "A dog in train.")]


# ---- data sets as everybody has them
@pytest.fixture(scope="module")
def signs():
    "Image, text and a class by number: what the hub calls an image-text data set."
    classes = datasets.ClassLabel(names=["stop", "yield", "limit"])
    features = dict(image=datasets.Image(), text=datasets.Value("string"), label=classes)
    rows = [
        dict(image=Image.new("RGB", (96, 96), (9 * k, 80, 80)), text=f"A sign {k}.", label=k % 3)
        for k in range(24)
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def base():
    return models.load()


def calls_of(records, base, tmp_path):
    "Every call that takes records, with these."
    model, processor = base
    one = records[0] if isinstance(records, (datasets.Dataset, list)) else records
    return {
        "fit": lambda: training.fit(model, processor, records, max_steps=1, show_progress=False),
        "evaluated": lambda: training.fit(
            model, processor, [dict(image=None, caption="A.")], eval_dataset=records, max_steps=1
        ),
        "Collator": lambda: chat.Collator(processor)([one]),
        "generate": lambda: evaluate.generate(
            model, processor, records, max_new_tokens=4, show_progress=False
        ),
        "similarity": lambda: evaluate.compute_similarity(model, processor, records),
        "lint": lambda: data.lint_records(records, show_progress=False),
        "split": lambda: data.split_records(records),
        "summary": lambda: data.split_summary(dict(train=records)),
        "score": lambda: evaluate.score_captions(records, ["A sign."] * 24),
        "plot": lambda: data.plot_records(records, 2),
        "report": lambda: report.EvalContext(model, processor, records),
        "shift": lambda: data.apply_shift(records, "blur"),
        "export": lambda: data.formats.export(records, "trl", tmp_path / "out"),
    }


NEEDS_CAPTION = ("fit", "evaluated", "Collator", "similarity", "lint", "export")


@pytest.mark.parametrize("kind", ["dataset", "list", "torch"])
def test_a_text_column_is_renamed_in_one_sentence(signs, base, tmp_path, kind):
    records = dict(dataset=signs, list=list(signs), torch=signs.with_format("torch"))[kind]
    tries = calls_of(records, base, tmp_path)
    for name in NEEDS_CAPTION if kind != "list" else set(NEEDS_CAPTION) - {"lint"}:
        with pytest.raises(ValueError) as caught:
            tries[name]()
        assert "no column 'caption'" in str(caught.value), (name, caught.value)
        assert "'text'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_column_is_renamed_in_one_sentence(signs, base, tmp_path):
    records = signs.rename_columns(dict(image="picture", text="caption"))
    tries = calls_of(records, base, tmp_path)
    for name in set(tries) - {"split", "summary", "score"}:
        with pytest.raises(ValueError, match="rename one, as in .*'picture'") as caught:
            tries[name]()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parts", "stream", "name"])
def test_what_is_no_list_of_records_is_refused_in_one_sentence(signs, base, tmp_path, kind):
    named = signs.rename_column("text", "caption")
    parts = datasets.DatasetDict(train=named)
    records = dict(parts=parts, stream=named.to_iterable_dataset(), name="signs.csv")[kind]
    advice = dict(parts=r"\['train'\]", stream=r"take\(1000\)", name="load_")[kind]
    tries = calls_of(records, base, tmp_path)
    done = {"parts": {"lint"}, "stream": {"fit", "export"}}.get(kind, set())
    for name in set(tries) - {"Collator", *done}:
        with pytest.raises((ValueError, TypeError), match=advice) as caught:
            tries[name]()
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("kind", ["dataset", "list", "torch", "frame", "paths", "bytes"])
def test_images_with_captions_are_taken_in_every_form(signs, base, tmp_path, kind):
    named = signs.rename_column("text", "caption").select(range(12))
    rows = list(named.remove_columns("label"))
    stored = named.to_pandas()
    for k, row in enumerate(rows):
        row["image"].save(tmp_path / f"{k}.png")
    paths = [str(tmp_path / f"{k}.png") for k in range(12)]
    records = dict(
        dataset=named,
        list=rows,
        torch=named.with_format("torch"),
        frame=pd.DataFrame(rows),
        paths=pd.DataFrame(dict(image=paths, caption=named["caption"][:])),
        bytes=stored,
    )[kind]
    tries = calls_of(records, base, tmp_path)
    tries["score"] = lambda: evaluate.score_captions(records, ["A sign."] * 12)
    if kind in ("frame", "paths", "bytes"):
        tries.pop("Collator")
    for name in set(tries) - {"evaluated", "similarity"}:
        tries[name]()
    if kind in ("dataset", "torch"):
        counts = str(data.split_summary(data.split_records(records)))
        assert all(name in counts for name in ("stop", "yield", "limit"))


def test_labels_too_rare_for_every_fold_are_split_all_the_same(signs):
    splits = data.split_records(signs.select(range(12)))
    assert [len(part) for part in splits.values()] == [8, 2, 2]


# ---- tables that hold their images, texts of several lines
def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, name, images, **columns):
    frame = pd.DataFrame(dict(picture=images, **columns))
    frame.to_parquet(folder / name)
    return folder / name


@pytest.mark.parametrize("kind", ["bytes", "structs", "paths"])
def test_parquet_with_its_own_columns_is_read(tmp_path, kind):
    (tmp_path / "0.png").write_bytes(png("red"))
    cells = dict(
        bytes=[png("red")], structs=[dict(bytes=png("red"), path="x/0.png")], paths=["0.png"]
    )[kind]
    columns = dict(said=["Stop.\n\nNow."], sign=["stop"], weather=["rain"])
    file = write_parquet(tmp_path, "signs.parquet", cells, **columns)
    names = dict(image="picture", caption="said", label="sign")
    (record,), report = data.load_table(file, columns=names)
    assert record["image"].getpixel((0, 0)) == (255, 0, 0)
    assert (record["caption"], record["label"]) == ("Stop.\n\nNow.", "stop")
    assert record["id"] == ("row-1" if kind == "bytes" else "0")
    assert "columns that are not used: weather" in report.notes


def test_parquet_parts_of_a_folder_are_splits_and_classes_have_names(tmp_path):
    classes = datasets.ClassLabel(names=["stop", "yield"])
    features = datasets.Features(dict(image=datasets.Image(), label=classes))
    for split in ("train", "test"):
        pixels = png("red" if split == "train" else "blue")
        rows = [dict(image=dict(bytes=pixels, path=f"{k}.png"), label=k) for k in range(2)]
        part = datasets.Dataset.from_list(rows, features=features)
        part.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    records, _ = data.load_folder(tmp_path)
    rows = zip(records["split"][:], records["label"][:], records["caption"][:])
    assert sorted(rows)[:2] == [("test", "stop", "Stop."), ("test", "yield", "Yield.")]
    assert len(records) == 4


def test_numbers_of_classes_in_parquet_ask_what_they_mean(tmp_path):
    file = write_parquet(tmp_path, "t.parquet", [png("red"), png("blue")], label=[0, 1])
    with pytest.raises(ValueError, match="say what the labels mean"):
        data.load_table(file, columns=dict(image="picture"))


def test_a_webdataset_shard_is_read(tmp_path):
    samples = {
        "a.jpg": png("red"),
        "a.txt": b"A stop sign.",
        "b.jpg": png("blue"),
        "b.txt": b"A yield sign.",
    }
    with tarfile.open(tmp_path / "train-000.tar", "w") as shard:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    records, report = data.load_folder(tmp_path)
    assert records["id"][:] == ["a", "b"] and records["split"][:] == ["train", "train"]
    assert records["caption"][:] == ["A stop sign.", "A yield sign."], report
    assert records[1]["image"].getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "train-000.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no webdataset shard"):
        data.load_folder(tmp_path)


def test_a_data_frame_is_a_table(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    frame = pd.DataFrame(dict(image=["a.png"], caption=["A sign."], age=[61.0]))
    (record,), _ = data.load_table(frame, images=tmp_path)
    assert (record["id"], record["age"]) == ("a", 61)
    held = frame.assign(image=[Image.open(tmp_path / "a.png")])
    assert data.load_table(held)[0][0]["image"].size == (8, 8)
    monkeypatch.chdir(tmp_path)
    assert len(data.load_table(frame)[0]) == 1
    with pytest.raises(ValueError, match=r"give the folder of the images"):
        data.load_table(frame.assign(image=["b.png"]))


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "as pandas prints it"])
def test_turns_in_a_cell_of_a_csv_table_are_turns(load, tmp_path, write):
    talk = [say("human", "<image>Which signs?"), say("gpt", "Two:\n- stop\n- yield")]
    more = [*talk, say("human", "And now?"), say("gpt", "None.")]
    cells = [write(talk), write(more)]
    frame = pd.DataFrame(dict(image=["0.png", "1.png"], conversations=cells))
    frame.to_csv(tmp_path / "talk.csv", index=False)
    first, second = data.load_table(tmp_path / "talk.csv")[0]
    assert (first["prompt"], first["caption"]) == ("Which signs?", "Two:\n- stop\n- yield")
    assert len(second["messages"]) == 4


def test_line_breaks_of_an_answer_reach_the_tokens(load_json, processor):
    row = dict(ONE_QUESTION["llava"])
    row["conversations"] = [row["conversations"][0], say("gpt", "Signs:\r\n\n1.  stop\n2. yield\n")]
    (record,) = load_json(row)[0]
    assert record["caption"] == "Signs:\n\n1. stop\n2. yield"
    labels = chat.Collator(processor)([record])["labels"][0]
    assert "1. stop\n2. yield" in processor.tokenizer.decode(labels[labels != -100])


def test_the_advice_to_load_the_table_alone_works(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\ngone.jpg,A dog.\n")
    for load_it in (lambda **o: data.load_table(tmp_path / "t.csv", **o), data.load_folder):
        place = [tmp_path] if load_it is data.load_folder else []
        with pytest.raises(ValueError, match="with_images=False loads the table alone"):
            load_it(*place)
        records, _ = load_it(*place, with_images=False)
        assert records["caption"][:] == ["A dog."] and records[0]["image"] is None


# ---- what the archive of skin lesions publishes
def write_files(folder, **tables):
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text)


def isic2018(folder):
    image_at(folder / "ISIC2018_Task3_Training_Input/ISIC_0000000.jpg")
    write_files(
        folder,
        ISIC2018_Task3_Training_GroundTruth="image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
        "ISIC_0000000,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n",
        ISIC2018_Task3_Training_LesionGroupings="image,lesion_id,diagnosis_confirm_type\n"
        "ISIC_0000000,HAM_1,histopathology\n",
    )
    return dict(label="melanoma", lesion="HAM_1"), "diagnosis_confirm_type"


def isic2019(folder):
    image_at(folder / "ISIC_2019_Training_Input/ISIC_0000000_downsampled.jpg")
    write_files(
        folder,
        ISIC_2019_Training_GroundTruth="image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
        "ISIC_0000000_downsampled,0,0,0,0,0,0,0,1,0\n",
        ISIC_2019_Training_Metadata="image,age_approx,anatom_site_general,lesion_id,sex\n"
        "ISIC_0000000_downsampled,55,anterior torso,BCN_1,female\n",
    )
    return dict(label=None, lesion="BCN_1", age=55, sex="female"), None


def isic2024(folder):
    image_at(folder / "train-image/image/ISIC_1.jpg")
    write_files(
        folder,
        **{
            "train-metadata": "isic_id,target,patient_id,age_approx,sex,iddx_full,tbp_lv_A\n"
            "ISIC_1,1,IP_1,60.0,male,Malignant::Malignant epidermal proliferations::Basal cell"
            " carcinoma,20.2\n"
        },
    )
    return dict(label=None, patient="IP_1", age=60), "tbp_lv_A"


def isic2024_challenge(folder):
    image_at(folder / "ISIC_2024_Training_Input/ISIC_1.jpg")
    write_files(
        folder,
        ISIC_2024_Training_GroundTruth="isic_id,malignant\nISIC_1,0.0\n",
        metadata="isic_id,attribution,patient_id,sex\nISIC_1,A clinic,IP_1,male\n",
    )
    return dict(label="benign", patient="IP_1", sex="male"), "attribution"


def isic_archive(folder):
    image_at(folder / "ISIC_1.jpg")
    (folder / "licenses").mkdir()
    (folder / "attribution.txt").write_text("A clinic")
    (folder / "licenses/CC-BY.txt").write_text("A licence")
    write_files(
        folder,
        metadata="isic_id,attribution,copyright_license,age_approx,diagnosis_1,diagnosis_2,"
        "diagnosis_3,fitzpatrick_skin_type,lesion_id,patient_id\nISIC_1,A clinic,CC-BY,30,"
        'Malignant,Malignant melanocytic proliferations (Melanoma),"Melanoma, NOS",III,IL_1,IP_1\n',
    )
    known = dict(label="melanoma", lesion="IL_1", patient="IP_1", skin_type=3, licence="CC-BY")
    return known, "attribution"


def milk10k(folder):
    image_at(folder / "MILK10k_Training_Input/IL_0/ISIC_1.jpg")
    write_files(
        folder,
        MILK10k_Training_GroundTruth="lesion_id,AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,"
        "VASC\nIL_0,0,0,0,0,0,0,0,1,0,0,0\n",
        MILK10k_Training_Metadata="lesion_id,image_type,isic_id,age_approx,sex,skin_tone_class,site\n"
        "IL_0,dermoscopic,ISIC_1,70,male,3,head_neck_face\n",
    )
    return dict(label="melanoma", lesion="IL_0", site="head_neck_face"), "skin_tone_class"


def derm7pt_copy(folder):
    image_at(folder / "images/NEL/Nel026.jpg")
    (folder / "meta").mkdir()
    write_files(
        folder / "meta",
        meta="diagnosis,pigment_network,streaks,pigmentation,regression_structures,"
        "dots_and_globules,blue_whitish_veil,vascular_structures,derm\nclark nevus,typical,absent,"
        "absent,absent,regular,absent,absent,NEL/Nel026.jpg\n",
    )
    return dict(label="benign", lesion="Nel026", id="Nel026-derm"), None


LAYOUTS = (
    isic2018,
    isic2019,
    isic2024,
    isic2024_challenge,
    isic_archive,
    milk10k,
    derm7pt_copy,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_known(tmp_path, layout):
    expected, unused = layout(tmp_path)
    records, report = data.load_folder(tmp_path)
    assert len(records) == 1 and not report.aside
    assert {name: records[0][name] for name in expected} == expected
    if unused:
        assert any("not used" in note and unused in note for note in report.notes)
    if expected["label"] is None:  # a carcinoma is never called a melanoma
        assert "carcinoma" in records[0]["caption"] and "elanoma" not in records[0]["caption"]


def test_two_classes_of_one_image_are_set_aside_and_lesions_stay_together(tmp_path):
    lines = ["image,MEL,NV,BCC"]
    about = ["image,lesion_id"]
    for k in range(40):
        image_at(tmp_path / f"ISIC_{k}.jpg")
        lines.append(f"ISIC_{k},{int(k == 0 or k % 2)},{1 - k % 2},0")
        about.append(f"ISIC_{k},L{k // 2}")
    write_files(tmp_path, ISIC_2019_Training_GroundTruth="\n".join(lines))
    write_files(tmp_path, ISIC_2019_Training_Metadata="\n".join(about))
    records, report = data.load_folder(tmp_path)
    assert report.reasons == {"columns contradict each other": 1} and len(records) == 39
    splits = data.split_records(records)
    lesions = [set(part["lesion"][:]) for part in splits.values()]
    assert all(lesions) and not lesions[0] & lesions[1] and not lesions[0] & lesions[2]


def test_a_table_without_image_column_says_how_to_name_one(tmp_path):
    (tmp_path / "table.csv").write_text("bild,text\n0.png,A dog.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"columns=\{'image': 'bild'\}"):
        data.load_table(tmp_path / "table.csv")


def test_the_current_folder_is_called_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "notes.doc").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path.name} is none of the layouts"):
        data.load_folder(".")
