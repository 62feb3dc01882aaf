"""Export to other trainers and hosted services: what is read back is what was in the records, and
the peers' own schemas and loaders accept it where they are installed.
"""

import base64
import io
import json
from pathlib import Path
from re import DOTALL, findall, match
from types import SimpleNamespace

import jsonschema
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import ROOT
from datasets import Dataset, List, load_dataset
from datasets import Image as ImageFeature
from safetensors.torch import load_file

from mmkit import data, models, report
from mmkit.chat import encode_example
from mmkit.data.format_conversations import build_conversation
from mmkit.data.format_settings import RunSettings, axolotl_config
from mmkit.data.formats import FORMATS, export
from mmkit.data.records import make_record

RUN = dict(model="google/gemma-3-4b-it", max_steps=10, learning_rate=1e-3, chat_template="gemma3")
ADDRESS = dict(
    vertex=dict(image_url="gs://bucket/signs/"),
    bedrock=dict(image_url="s3://bucket/signs", bucket_owner="123456789012"),
)
PEERS = "not installed: pip install '.[peers]', or the peer itself with --no-deps"


def draw(seed, height=9, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def text(words):
    return dict(type="text", text=words)


def conversation_records():
    "One image, two images in two turns with a system turn, none; ten in all, OpenAI's least."
    turns = [
        dict(role="system", content="Be brief."),
        dict(role="user", content=[dict(type="image"), text("What is it?")]),
        dict(role="assistant", content="a stop sign"),
        dict(role="user", content=[text("And "), dict(type="image"), text("?")]),
        dict(role="assistant", content=[text("give way — Vorfahrt")]),
    ]
    first = [
        dict(id="one", image=draw(0), prompt="Which sign?", caption="a stop sign"),
        dict(id="two", images=[draw(0), draw(1)], messages=turns),
        dict(id="none", image=None, prompt="What is red?", answer="a colour"),
    ]
    more = [dict(id=f"m{n}", image=draw(n), caption=f"sign number {n}") for n in range(2, 9)]
    return first + more


def single_image_records():
    "What LLaVA takes: at most one image, and no system turn."
    return [record for record in conversation_records() if record["id"] != "two"]


def records_for(to):
    return single_image_records() if to == "llava" else conversation_records()


def expected(record):
    "Turns as (role, parts), where a part is a text or an array of pixels."
    images = record.get("images") or [record["image"]]
    images = iter([image for image in images if image is not None])
    if "messages" not in record:
        prompt = record.get("prompt", "Describe this lesion.")
        answer = record.get("answer") or record["caption"]
        return [("user", [*images, prompt]), ("assistant", [answer])]
    turns = []
    for message in record["messages"]:
        content = message["content"]
        parts = [text(content)] if isinstance(content, str) else content
        turns.append((message["role"], [p.get("text") or next(images) for p in parts]))
    return turns


def load_pixels(source):
    with PIL.Image.open(source) as image:
        return np.asarray(image)


def split_tags(words, images):
    parts = []
    for number, piece in enumerate(words.split("<image>")):
        if number:
            parts.append(next(images))
        parts.append(piece.removeprefix("\n"))
    return [part for part in parts if not isinstance(part, str) or part]


def read_axolotl(row, folder):
    return [
        (
            message["role"],
            [
                p["text"] if "text" in p else load_pixels(folder / p["path"])
                for p in message["content"]
            ],
        )
        for message in row["messages"]
    ]


def read_trl(row, folder):
    images = iter([load_pixels(folder / name) for name in row["images_file_names"]])
    return [
        (message["role"], [p.get("text") or next(images) for p in message["content"]])
        for message in row["prompt"] + row["completion"]
    ]


def read_tagged(row, folder):
    images = iter([load_pixels(folder / name) for name in row["images"]])
    return [(m["role"], split_tags(m["content"], images)) for m in row["messages"]]


def read_llava(row, folder):
    images = iter([load_pixels(folder / row["image"])] if "image" in row else [])
    roles = dict(human="user", gpt="assistant")
    return [(roles[t["from"]], split_tags(t["value"], images)) for t in row["conversations"]]


def read_openai(row, folder):
    def read_part(part):
        if part["type"] == "text":
            return part["text"]
        encoded = part["image_url"]["url"].split("base64,")[1]
        return load_pixels(io.BytesIO(base64.b64decode(encoded)))

    turns = []
    for message in row["messages"]:
        content = message["content"]
        parts = [text(content)] if isinstance(content, str) else content
        turns.append((message["role"], [read_part(part) for part in parts]))
    return turns


def read_vertex(row, folder):
    roles = dict(system="system", user="user", model="assistant")

    def read_part(part):
        if "text" in part:
            return part["text"]
        return load_pixels(folder / part["fileData"]["fileUri"].removeprefix("gs://bucket/signs/"))

    contents = [row["systemInstruction"]] if "systemInstruction" in row else []
    contents += row["contents"]
    return [(roles[turn["role"]], [read_part(part) for part in turn["parts"]]) for turn in contents]


def read_bedrock(row, folder):
    def read_part(part):
        if "text" in part:
            return part["text"]
        uri = part["image"]["source"]["s3Location"]["uri"]
        return load_pixels(folder / uri.removeprefix("s3://bucket/signs/"))

    turns = [dict(role="system", content=row["system"])] if "system" in row else []
    turns += row["messages"]
    return [(turn["role"], [read_part(part) for part in turn["content"]]) for turn in turns]


READERS = {
    "axolotl": read_axolotl,
    "trl": read_trl,
    "llama-factory": read_tagged,
    "ms-swift": read_tagged,
    "llava": read_llava,
    "openai": read_openai,
    "vertex": read_vertex,
    "bedrock": read_bedrock,
}


def assert_same_turns(found, wanted):
    assert [role for role, _ in found] == [role for role, _ in wanted]
    for (_, parts), (_, wanted_parts) in zip(found, wanted):
        assert len(parts) == len(wanted_parts)
        for part, wanted_part in zip(parts, wanted_parts):
            np.testing.assert_array_equal(part, wanted_part)


def read_rows(summary):
    content = summary.records_file.read_text(encoding="utf-8")
    if summary.records_file.suffix == ".json":
        return json.loads(content)
    return [json.loads(line) for line in content.splitlines()]


def exported(to, folder, records=None, **options):
    records = records_for(to) if records is None else records
    return data.formats.export(records, to, folder, **ADDRESS.get(to, {}), **options)


@pytest.mark.parametrize("to", FORMATS)
def test_turns_and_pixels_survive_the_export(to, tmp_path):
    summary = exported(to, tmp_path / "out")
    if to == "openai":
        assert not (tmp_path / "out/images").exists()
    else:
        distinct = 8 if to == "llava" else 9  # the first image occurs in two records
        assert summary.num_images == len(list((tmp_path / "out/images").iterdir())) == distinct
    rows, records = read_rows(summary), records_for(to)
    assert len(rows) == summary.num_records == len(records)
    for row, record in zip(rows, records):
        assert_same_turns(READERS[to](row, summary.folder), expected(record))


@pytest.mark.parametrize("to", [to for to in FORMATS if to not in ADDRESS])
def test_an_exported_folder_is_read_back(to, tmp_path):
    "By our own reader: the same turns and pixels; white space around a text is not kept."
    records = records_for(to)
    loaded, report = data.load_folder(exported(to, tmp_path / "out", records).folder)
    assert not report.aside and len(loaded) == len(records)
    for record, given in zip(loaded, records):
        conversation = build_conversation(record)
        found = [
            (turn.role, [conversation.images[p] if isinstance(p, int) else p for p in turn.parts])
            for turn in conversation.turns
        ]
        wanted = [
            (role, [part.strip() if isinstance(part, str) else part for part in parts])
            for role, parts in expected(given)
        ]
        assert_same_turns(found, wanted)


def test_a_data_set_is_exported_like_its_records(tmp_path):
    "A jpeg is copied byte for byte; a list of images and missing ones are kept."
    pixels = draw(3, 40, 32)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG")
    jpeg = dict(bytes=buffer.getvalue(), path=None)
    rows = [dict(id="a", images=[jpeg], caption="x"), dict(id="b", images=[], caption="y")]
    ds = Dataset.from_list(rows).cast_column("images", List(ImageFeature()))
    summary = export(ds, "ms-swift", tmp_path / "out")
    first, second = read_rows(summary)
    assert (summary.folder / first["images"][0]).read_bytes() == buffer.getvalue()
    assert second["images"] == []
    assert second["messages"][0]["content"] == "Describe this lesion."


def test_a_made_record_is_exported(tmp_path):
    record = make_record(id="r", image=PIL.Image.fromarray(draw(1)), caption="a lesion")
    row = read_rows(export([record], "axolotl", tmp_path / "out"))[0]
    assert row["messages"][1]["content"] == [text("a lesion")]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_exported_image_is_rgb(mode, tmp_path):
    image = PIL.Image.fromarray(draw(2))
    image = PIL.Image.new(mode, (7, 9), 300) if mode == "I;16" else image.convert(mode)
    summary = export([dict(image=image, caption="x")], "trl", tmp_path / "out")
    (path,) = (summary.folder / "images").iterdir()
    with PIL.Image.open(path) as written:
        assert (written.mode, written.size) == ("RGB", (7, 9))


REFUSALS = [
    ("axolotl", [dict(image=draw(0), caption=None)], "has neither caption nor answer"),
    ("axolotl", [dict(image=draw(0), caption=" ")], "has an empty answer"),
    ("axolotl", [dict(picture=draw(0), caption="x")], "rename one"),
    ("axolotl", [dict(image=None, caption="x")], "no image in any record"),
    ("axolotl", [], "no image in any record"),
    ("llava", conversation_records(), "has 2 images, and llava takes at most 1"),
    ("openai", single_image_records()[:4], "openai wants 10 records or more, and got 4"),
    ("ms-swift", [dict(image=draw(0), caption="<image>")], "take it out of the text"),
    ("vertex", [dict(images=[draw(0)] * 31, caption="x")], "vertex takes at most 30"),
    ("axolotl", [dict(image="gone.png", caption="x")], "gone.png is gone"),
]


@pytest.mark.parametrize("to, records, message", REFUSALS)
def test_a_refused_export_says_why_and_leaves_nothing(to, records, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        exported(to, tmp_path / "out", records)
    assert list(tmp_path.iterdir()) == []


def test_an_image_over_the_limit_is_refused(tmp_path, monkeypatch):
    small = FORMATS["openai"]._replace(max_image_bytes=100)
    monkeypatch.setitem(FORMATS, "openai", small)
    with pytest.raises(ValueError, match="image of record one is too large for openai"):
        exported("openai", tmp_path / "out")


def test_wrong_arguments_get_one_sentence(tmp_path):
    records, out = conversation_records(), tmp_path / "out"
    with pytest.raises(ValueError, match="Did you mean 'ms-swift'.*'bedrock'"):
        export(records, "swift", out)
    with pytest.raises(ValueError, match="pass image_url='s3://bucket/folder'"):
        export(records, "bedrock", out, bucket_owner="123456789012")
    with pytest.raises(ValueError, match="12 digits"):
        export(records, "bedrock", out, image_url="s3://b")
    with pytest.raises(ValueError, match="starts with 'gs://'"):
        export(records, "vertex", out, image_url="s3://b")
    with pytest.raises(ValueError, match="openai has no config of a run"):
        export(records, "openai", out, settings=RUN)
    with pytest.raises(TypeError, match=r"records\['train'\]"):
        export(dict(train=records), "trl", out)
    with pytest.raises(TypeError, match="this is a str: give dicts"):
        export(["a.png"], "trl", out)
    with pytest.raises(TypeError, match="load_folder"):
        export("some/folder", "trl", out)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_without_being_told(tmp_path):
    (tmp_path / "axolotl.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match="axolotl.yaml"):
        exported("axolotl", tmp_path, settings=RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["axolotl.yaml"]
    assert (tmp_path / "axolotl.yaml").read_text() == "mine"
    exported("axolotl", tmp_path, settings=RUN, overwrite=True)
    assert yaml.safe_load((tmp_path / "axolotl.yaml").read_text())["max_steps"] == 10
    with pytest.raises(FileExistsError, match="train.jsonl"):
        exported("axolotl", tmp_path)


def test_settings_that_a_config_cannot_say_are_refused():
    with pytest.raises(ValueError, match="'loss_weights' of a run has no counterpart"):
        RunSettings.from_dict(dict(RUN, loss_weights=None))
    with pytest.raises(ValueError, match="one learning rate"):
        RunSettings(**dict(RUN, train=("projector", "text"), learning_rate=dict(text=1e-3)))
    with pytest.raises(ValueError, match="Did you mean 'projector'"):
        RunSettings(**dict(RUN, train="projecter"))


@pytest.mark.parametrize("to", ["axolotl", "llama-factory", "ms-swift"])
def test_a_run_becomes_the_config_of_its_peer(to, tmp_path):
    run = dict(RUN, train="text", lora=dict(rank=4, lora_alpha=12))
    summary = exported(to, tmp_path / "out", settings=run)
    config = yaml.safe_load(summary.config_file.read_text())
    assert config["learning_rate"] == 1e-3 and config["max_steps"] == 10
    assert config["lora_alpha"] == 12
    if to == "llama-factory":
        info = json.loads((summary.folder / "dataset_info.json").read_text())
        assert info[config["dataset"]]["file_name"] == summary.records_file.name
    else:
        source = config["datasets"][0]["path"] if to == "axolotl" else config["dataset"][0]
        assert source == summary.records_file.name


def test_axolotl_trains_the_named_part_alone():
    patterns = axolotl_config(RunSettings(**RUN), "train.jsonl")["unfrozen_parameters"]
    assert match(patterns[0], "model.multi_modal_projector.mm_soft_emb_norm.weight")
    assert not match(patterns[0], "model.language_model.layers.0.mlp.up_proj.weight")


def test_datasets_reads_the_trl_folder(tmp_path):
    summary = exported("trl", tmp_path / "out")
    cache = str(tmp_path / "cache")
    rows = load_dataset("imagefolder", data_dir=str(summary.folder), split="train", cache_dir=cache)
    for row, record in zip(rows, conversation_records()):
        images = iter([np.asarray(image) for image in row["images"]])
        turns = [
            (m["role"], [next(images) if p["type"] == "image" else p["text"] for p in m["content"]])
            for m in row["prompt"] + row["completion"]
        ]
        assert_same_turns(turns, expected(record))


def test_trl_fills_the_images_in(tmp_path):
    trl = pytest.importorskip("trl.data_utils", reason=PEERS, exc_type=ImportError)
    summary = exported("trl", tmp_path / "out")
    for row in read_rows(summary):
        images = [PIL.Image.open(summary.folder / name) for name in row["images_file_names"]]
        messages = trl.prepare_multimodal_messages(row["prompt"] + row["completion"], images)
        filled = [p["image"] for m in messages for p in m["content"] if p["type"] == "image"]
        assert filled == images


def test_openai_takes_the_messages(tmp_path):
    chat = pytest.importorskip("openai.types.chat", reason=PEERS, exc_type=ImportError)
    from pydantic import TypeAdapter

    adapter = TypeAdapter(list[chat.ChatCompletionMessageParam])
    for row in read_rows(exported("openai", tmp_path / "out")):
        for message in adapter.validate_python(row["messages"]):
            list(message["content"])  # it is checked as it is read


def test_vertex_takes_the_contents(tmp_path):
    types = pytest.importorskip("google.genai.types", reason=PEERS, exc_type=ImportError)
    for row in read_rows(exported("vertex", tmp_path / "out")):
        for content in row["contents"] + [row.get("systemInstruction", row["contents"][0])]:
            types.Content.model_validate(content)


def test_bedrock_takes_the_messages(tmp_path):
    session = pytest.importorskip("botocore.session", reason=PEERS, exc_type=ImportError)
    from botocore.validate import ParamValidator

    model = session.get_session().get_service_model("bedrock-runtime")
    shape = model.operation_model("Converse").input_shape
    for row in read_rows(exported("bedrock", tmp_path / "out")):
        assert row.pop("schemaVersion") == "bedrock-conversation-2024"
        report = ParamValidator().validate(dict(row, modelId="m"), shape)
        assert not report.has_errors(), report.generate_report()


def test_llama_factory_finds_and_converts_the_records(tmp_path):
    parser = pytest.importorskip("llamafactory.data.parser", reason=PEERS, exc_type=ImportError)
    converter = pytest.importorskip(
        "llamafactory.data.converter", reason=PEERS, exc_type=ImportError
    )
    summary = exported("llama-factory", tmp_path / "out")
    (attributes,) = parser.get_dataset_list(["mmkit"], str(summary.folder))
    arguments = SimpleNamespace(media_dir=str(summary.folder))
    convert = converter.SharegptDatasetConverter(attributes, arguments)
    for row, record in zip(read_rows(summary), conversation_records()):
        found = convert(row)
        assert len(found["_prompt"]) + len(found["_response"]) == len(
            [role for role, _ in expected(record) if role != "system"]
        )
        assert all(Path(path).is_file() for path in found["_images"] or [])


def test_axolotl_takes_the_config():
    schemas = pytest.importorskip(
        "axolotl.utils.schemas.config", reason=PEERS, exc_type=ImportError
    )
    config = axolotl_config(RunSettings(**RUN), "train.jsonl")
    schemas.AxolotlInputConfig(**config)


def test_axolotl_makes_a_batch(tmp_path, monkeypatch):
    "As `axolotl train` does, started in the folder: rows, its strategy, its collator."
    strategies = pytest.importorskip(
        "axolotl.processing_strategies", reason=PEERS, exc_type=ImportError
    )
    collators = pytest.importorskip(
        "axolotl.utils.collators.mm_chat", reason=PEERS, exc_type=ImportError
    )
    model, processor = models.load()
    summary = exported("axolotl", tmp_path / "out", single_image_records()[:1])
    monkeypatch.chdir(summary.folder)
    cache = str(tmp_path / "cache")
    rows = load_dataset("json", data_files="train.jsonl", split="train", cache_dir=cache)
    strategy = strategies.get_processing_strategy(processor, processor.chat_template, "gemma3")
    collator = collators.MultiModalChatDataCollator(processor.tokenizer, strategy)
    batch = collator([dict(row) for row in rows])
    wanted = encode_example(processor, draw(0), "Which sign?", "a stop sign")
    torch.testing.assert_close(batch["pixel_values"], wanted["pixel_values"])
    assert "a stop sign" in processor.tokenizer.decode(batch["input_ids"][0])


def test_ms_swift_loads_the_records(tmp_path, monkeypatch):
    swift = pytest.importorskip("swift.dataset", reason=PEERS, exc_type=ImportError)
    summary = exported("ms-swift", tmp_path / "out")
    monkeypatch.chdir(summary.folder)
    rows, _ = swift.load_dataset([summary.records_file.name], load_from_cache_file=False)
    for row, record in zip(rows, conversation_records()):
        paths = [image["path"] for image in row["images"] or []]
        read_back = read_tagged(dict(messages=row["messages"], images=paths), summary.folder)
        assert_same_turns(read_back, expected(record))


def test_trl_trains_on_the_folder(tmp_path):
    trl = pytest.importorskip("trl", reason=PEERS, exc_type=ImportError)
    model, processor = models.load()
    summary = exported("trl", tmp_path / "out", single_image_records()[3:])
    cache = str(tmp_path / "cache")
    rows = load_dataset("imagefolder", data_dir=str(summary.folder), split="train", cache_dir=cache)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    assert np.isfinite(trainer.train().training_loss)


def test_round_trip_with_trl_as_the_examples_say(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason=PEERS, exc_type=ImportError)
    examples = (ROOT / "EXAMPLES.md").read_text(encoding="utf-8")
    (code,) = [block for block in findall(r"```py\n(.*?)```", examples, DOTALL) if "SFTT" in block]
    assert "max_steps=300" in code
    short = "max_steps=2, use_cpu=True, bf16=False, save_strategy='no'"
    code = code.replace("max_steps=300", short)
    splits = data.split_records(data.load_melanoma_pairs(n=60, masks=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = dict(data=data, models=models, report=report, splits=splits)
    exec(compile(code, "EXAMPLES.md", "exec"), names)
    trained = load_file(tmp_path / "trl-adapter" / "adapter_model.safetensors")
    assert any(values.any() for name, values in trained.items() if "lora_B" in name)


# What the services' pages require of a row, for machines without their libraries.
TEXT_PART = dict(type="object", required=["text"], additionalProperties=False)
TEXT_PART["properties"] = dict(text=dict(type="string"))
SCHEMAS = dict(
    vertex=dict(
        type="object",
        required=["contents"],
        additionalProperties=False,
        properties=dict(
            systemInstruction=dict(type="object"),
            contents=dict(
                type="array",
                items=dict(
                    type="object",
                    required=["role", "parts"],
                    properties=dict(role=dict(enum=["user", "model"])),
                ),
            ),
        ),
    ),
    bedrock=dict(
        type="object",
        required=["schemaVersion", "messages"],
        additionalProperties=False,
        properties=dict(
            schemaVersion=dict(const="bedrock-conversation-2024"),
            system=dict(type="array", items=TEXT_PART),
            messages=dict(
                type="array",
                items=dict(
                    type="object",
                    required=["role", "content"],
                    properties=dict(role=dict(enum=["user", "assistant"])),
                ),
            ),
        ),
    ),
)


@pytest.mark.parametrize("to", SCHEMAS)
def test_rows_follow_the_documented_shape(to, tmp_path):
    for row in read_rows(exported(to, tmp_path / "out")):
        jsonschema.validate(row, SCHEMAS[to])
