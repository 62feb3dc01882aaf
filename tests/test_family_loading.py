"A saved folder of every family gives the model and its whole processor again."

import json

import pytest
import torch
import transformers
from families import MAKERS, make_family
from test_families import draw_image
from test_family_calls import make_records

from mmkit import models
from mmkit.chat.collator import Collator
from mmkit.models.families import find_family


def save_both(name, folder):
    model, processor = make_family(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_folder_loads_whole(name, tmp_path):
    model, processor = save_both(name, tmp_path)
    loaded, its_processor = models.load(tmp_path)
    assert type(loaded) is type(model)
    family = find_family(model)
    assert find_family(its_processor) is family
    if not family.generates:
        image = draw_image(32, 32)
        batch, again = (
            p(images=[image], text=["a"], return_tensors="pt") for p in (processor, its_processor)
        )
    else:
        batch, again = (Collator(p)(make_records()) for p in (processor, its_processor))
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        logits = "logits" if family.generates else "logits_per_image"
        assert torch.equal(model(**batch)[logits], loaded(**again)[logits])


def test_published_folders_load_without_the_packages_for_videos(tmp_path):
    save_both("smolvlm", tmp_path / "smolvlm")
    rewrite(tmp_path / "smolvlm/processor_config.json", processor_class="SmolVLMProcessor")
    assert find_family(models.load(tmp_path / "smolvlm")[1]).name == "Idefics3"
    save_both("qwen2_5_vl", tmp_path / "qwen")
    saved = tmp_path / "qwen/processor_config.json"
    settings = json.loads(saved.read_text())["image_processor"]
    settings["image_processor_type"] = "Qwen2VLImageProcessorFast"
    (tmp_path / "qwen/preprocessor_config.json").write_text(
        json.dumps(settings | dict(processor_class="Qwen2_5_VLProcessor"))
    )
    saved.unlink()
    processor = models.load(tmp_path / "qwen")[1]
    assert "pixel_values" in Collator(processor)(make_records())


def test_missing_packages_are_named_with_the_line_that_installs_them(tmp_path, monkeypatch):
    save_both("llava", tmp_path)

    def refuse(*args, **kwargs):
        raise ImportError("LlavaVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ImportError, match=r"needs torchvision.*pip install 'mmkit\[video\]'"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl"])
def test_a_tokenizer_alone_is_no_processor(name, tmp_path):
    model, processor = make_family(name)
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no whole processor"):
        models.load(tmp_path)


def test_a_checkpoint_made_to_complete_gets_its_family_s_template(tmp_path):
    _, processor = save_both("blip2", tmp_path)
    assert models.load(tmp_path)[1].chat_template == find_family(processor).chat_template


def test_an_unknown_family_loads_and_is_refused_where_it_would_be_wrong(tmp_path):
    model, processor = save_both("llava", tmp_path)
    config = transformers.VipLlavaConfig(
        text_config=model.config.text_config,
        vision_config=model.config.vision_config,
        image_token_index=model.config.image_token_id,
        vision_feature_layers=[-1],
    )
    transformers.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    loaded, its_processor = models.load(tmp_path)
    assert type(loaded).__name__ == "VipLlavaForConditionalGeneration"
    with pytest.raises(ValueError, match="is of no family that is known"):
        find_family(loaded)
