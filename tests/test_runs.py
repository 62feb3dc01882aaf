"A run: the prompt it travels with, what it goes on with and what not, how it ends, what is saved."

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from PIL import Image

from mmkit import chat, evaluate, explain, losses, models, training
from mmkit.chat.prompts import resolve_prompt
from mmkit.core.runtime import default_device
from mmkit.models.saving import load_adapters, replace_folder
from mmkit.report.context import EvalContext
from mmkit.training.checkpoints import get_last_checkpoint, list_checkpoints
from mmkit.training.signature import digest_images
from mmkit.training.steps import NonFiniteLossError

SIGN_PROMPT = "Describe this sign."


def draw_signs(n=8, caption="A red sign."):
    "Records of one's own: images of one colour, a caption, no label."
    images = [Image.new("RGB", (64, 64), (20 * i % 256, 0, 0)) for i in range(n)]
    return [dict(id=str(i), image=image, caption=caption) for i, image in enumerate(images)]


@pytest.fixture(autouse=True)
def own_cache(cache):
    "Features of these tests go into a folder of their own."


def train(model_and_processor, records, **options):
    "Two steps on few signs, unless told otherwise."
    options = dict(max_steps=2, batch_size=4, show_progress=False) | options
    return training.fit(*model_and_processor, records, **options)


def logits_of(model, processor):
    with torch.no_grad():
        return model(**chat.Collator(processor)(draw_signs(2))).logits


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def are_equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_asks_a_trained_model_asks_its_own_prompt(tmp_path):
    model, processor = models.load()
    signs = draw_signs()
    monitor = explain.DominanceCallback(processor, signs)
    run = train((model, processor), signs, prompt=SIGN_PROMPT, callbacks=[monitor])
    assert resolve_prompt(run.model) == SIGN_PROMPT
    assert "sign" in processor.tokenizer.decode(monitor.monitor.tokenized["text"][0]["input_ids"])
    words = explain.attribute_words(run.model, processor, signs[0], "A sign.", methods=()).words
    assert "sign" in "".join(words).partition("A sign.")[0]
    assert EvalContext(run.model, processor, signs).prompt == SIGN_PROMPT
    asked = evaluate.generate(run.model, processor, signs[:2], SIGN_PROMPT, show_progress=False)
    other = evaluate.generate(run.model, processor, signs[:2], "Why?", show_progress=False)
    assert evaluate.generate(run.model, processor, signs[:2], show_progress=False) == asked != other
    run.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = models.load(tmp_path)
    assert resolve_prompt(loaded) == SIGN_PROMPT
    again = train((loaded, processor), signs)  # further training asks it as well
    assert resolve_prompt(again.model) == SIGN_PROMPT


def test_all_that_was_trained_is_saved_and_reopened_by_one_call(tmp_path):
    "Projector in one run; LoRA and a learned temperature in the next; the last checkpoint as well."
    model, processor = models.load()
    first = train((model, processor), draw_signs(), train="projector")
    weights = losses.LossWeights(contrastive=0.3, temperature=losses.Temperature())
    options = dict(output_dir=tmp_path / "run", loss_weights=weights, prompt=SIGN_PROMPT)
    run = train((first.model, processor), draw_signs(), train=(), lora=2, **options)
    run.save(tmp_path / "saved")
    expected = logits_of(run.model, processor)
    for folder in (tmp_path / "saved", get_last_checkpoint(tmp_path / "run")):
        loaded, _ = models.load(folder)
        assert torch.equal(logits_of(loaded, processor), expected), folder
        assert resolve_prompt(loaded) == SIGN_PROMPT
        learned = run.model.config.learned_temperature
        assert loaded.config.learned_temperature == learned != 0.07
    assert not list(tmp_path.rglob("*.bin"))
    base, _ = models.load()
    by_peft = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    lora = {name: p for name, p in run.model.named_parameters() if "lora_" in name}
    named = dict(by_peft.named_parameters())
    assert lora and all(torch.equal(named[name], parameter) for name, parameter in lora.items())
    again = train((models.load(tmp_path / "saved")[0], processor), draw_signs(), train="text")
    again.save(tmp_path / "again")
    assert torch.equal(
        logits_of(models.load(tmp_path / "again")[0], processor),
        logits_of(again.model, processor),
    )


def test_merged_weights_and_new_connectors_are_saved_too(tmp_path):
    model, processor = models.load()
    connector = models.QFormer(model.config, 4)
    model, processor = models.replace_connector(model, processor, connector)
    run = train((model, processor), draw_signs(), train="projector", lora=2, learning_rate=1e-2)
    merged, _ = models.merge_lora(run.model, chat.Collator(processor)(draw_signs(2)), 1.0)
    models.save_adapters(merged, tmp_path)
    loaded, its_processor = models.load(tmp_path)
    assert are_equal(weights_of(loaded), weights_of(merged))
    torch.testing.assert_close(
        logits_of(loaded, its_processor), logits_of(merged, processor), rtol=1e-4, atol=1e-4
    )


def test_a_folder_is_called_what_it_is(tmp_path):
    model, processor = models.load()
    run = train((model, processor), draw_signs(), output_dir=tmp_path / "run")
    checkpoint = get_last_checkpoint(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    run.save(tmp_path / "other")
    description = json.loads((tmp_path / "other/mmkit.json").read_text())
    (tmp_path / "other/mmkit.json").write_text(json.dumps(dict(description, base="/no/such")))
    with pytest.raises(FileNotFoundError, match=f"folder of a run.*{checkpoint}"):
        models.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="it is empty"):
        models.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="trained on '/no/such'.*load_adapters"):
        models.load(tmp_path / "other")
    (tmp_path / "other/mmkit.json").unlink()
    with pytest.raises(FileNotFoundError, match="saved by an older mmkit.*load_adapters"):
        models.load(tmp_path / "other")
    (checkpoint / "run.json").unlink()
    with pytest.raises(ValueError, match="a checkpoint that was not finished"):
        models.load(checkpoint)
    other, _ = models.load()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
    run.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="kept from another base"):
        load_adapters(other, tmp_path / "saved")


def test_a_crash_while_saving_leaves_nothing_that_loads_as_something_else(tmp_path):
    model, processor = models.load()
    models.save_adapters(model, tmp_path / "a", "projector")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "b") as folder:
        (folder / "trained.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    models.load(tmp_path / "a")  # what was there is still whole
    (tmp_path / "a/notes.txt").write_text("mine")
    models.save_adapters(models.add_lora(model, 2), tmp_path / "a", "projector")
    models.save_adapters(models.load()[0], tmp_path / "a", "projector")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "notes.txt" in names and "adapter_config.json" not in names  # of the first of the two
    (tmp_path / "a/mmkit.json").write_text('{"incomplete": true}')
    with pytest.raises(ValueError, match="incomplete"):
        models.load(tmp_path / "a")


def test_a_finished_run_trains_no_more(tmp_path):
    "Called again on a fresh model, or on the very model that it trained."
    options = dict(output_dir=tmp_path, save_steps=2, max_steps=3, lr_schedule=lambda spent: 1.0)
    run = train(models.load(), draw_signs(), **options)
    first = weights_of(run.model)
    again = train(models.load(), draw_signs(), **options)
    third = train((again.model, models.load()[1]), draw_signs(), **options)
    assert run.steps == again.steps == third.steps == 3
    assert are_equal(first, weights_of(third.model))
    assert (run.history["loss"] == third.history["loss"]).all()
    by_clock = dict(output_dir=tmp_path / "clock", max_steps=None, max_seconds=0.2)
    timed = train(models.load(), draw_signs(), **by_clock)
    assert train(models.load(), draw_signs(), **by_clock).steps == timed.steps


OTHER_RUNS = dict(
    prompt=(dict(prompt="Why?"), "prompt 'Describe this lesion.' → 'Why?'"),
    notes=(dict(include_notes=True), "include_notes False → True"),
    captions=(
        dict(records=draw_signs(caption="A blue sign.")),
        "the records' captions, turns or notes, or their order, are others",
    ),
    images=(dict(records=draw_signs(9)[1:]), "the images, or their order, are others"),
    lora=(dict(lora=dict(rank=2, lora_alpha=1)), "lora 'lora_alpha' 4 → 1"),
    rate=(dict(learning_rate=0.1), "learning_rates 'text' 0.002 → 0.1"),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cache):
    "The folder of a run, to which other runs want to go."
    folder = tmp_path_factory.mktemp("stopped")
    train(models.load(), draw_signs(), output_dir=folder, lora=2, train=())
    return folder


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_another_run_is_refused_by_what_differs(stopped, what):
    changed, said = OTHER_RUNS[what]
    options = dict(records=draw_signs(), output_dir=stopped, lora=2, train=()) | changed
    with pytest.raises(ValueError, match="another folder, or delete it") as caught:
        train(models.load(), **options)
    assert f"of another run ({said}); give" in str(caught.value)  # and nothing else


def test_another_model_version_or_older_folder_is_refused(stopped):
    model, processor = models.load()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    options = dict(output_dir=stopped, lora=2, train=())
    with pytest.raises(ValueError, match="the model's frozen weights are others"):
        train((model, processor), draw_signs(), **options)
    file = get_last_checkpoint(stopped) / "run.json"
    saved = json.loads(file.read_text())
    for key, value, said in (
        ("mmkit", "0.0.0", "mmkit '0.0.0' →"),
        ("num_processes", 2, "num_processes 2 → 1"),
    ):
        signature = dict(saved["signature"], **{key: value})
        file.write_text(json.dumps(dict(saved, signature=signature)))
        with pytest.raises(ValueError, match=said):
            train(models.load(), draw_signs(), **options)
    del signature["mmkit"]
    file.write_text(json.dumps(dict(saved, signature=signature)))
    with pytest.raises(ValueError, match="an older mmkit, which did not note data and model"):
        train(models.load(), draw_signs(), **options)
    file.write_text(json.dumps(saved))
    assert train(models.load(), draw_signs(), **options).steps == 2


def test_of_many_images_a_sample_makes_the_digest():
    signs = draw_signs(9)
    changed = [*signs[:1], dict(signs[1], image=signs[2]["image"]), *signs[2:]]
    assert digest_images(signs, 3) == digest_images(changed, 3)  # rows 0, 4 and 8
    assert digest_images(signs) != digest_images(changed)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    "Step, term and tensor are named; what is saved is finite."
    model, processor = models.load()
    options = dict(train=("projector", "text"), learning_rate=1e6, max_steps=9)
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the loss is nan \(ce nan\)") as caught:
        train((model, processor), draw_signs(), **options)
    assert "the weights of model." in str(caught.value) and "no checkpoint" in str(caught.value)
    with pytest.raises(ValueError, match="not finite: training has diverged, so nothing is saved"):
        models.save_adapters(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    options |= dict(output_dir=tmp_path / "run", save_steps=1)
    with pytest.raises(NonFiniteLossError, match="The last good checkpoint is .*checkpoint-1"):
        train(models.load(), draw_signs(), **options)
    assert [f.name for f in list_checkpoints(tmp_path / "run") if (f / "run.json").exists()] == [
        "checkpoint-1"
    ]
    loaded, _ = models.load(tmp_path / "run/checkpoint-1")
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_a_tensor_of_the_batch_that_is_not_finite_is_named(monkeypatch):
    collate = training.TokenizedDataset.collate_fn

    def spoilt(self, examples):
        batch = collate(self, examples)
        batch["features"][0] = float("nan")
        return batch

    monkeypatch.setattr(training.TokenizedDataset, "collate_fn", spoilt)
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*'features' of the batch \(records \["):
        train(models.load(), draw_signs())


@pytest.mark.parametrize("how", ("lora", "qlora", ("projector", "LoRA")))
def test_lora_is_no_part_and_the_error_says_how_it_is_given(how):
    with pytest.raises(ValueError, match="give lora=8"):
        train(models.load(), draw_signs(), train=how)


def test_new_tokens_that_nothing_would_teach_are_refused():
    model, processor = models.load()
    processor.tokenizer.add_tokens([f"<sign{i}>" for i in range(200)])
    signs = draw_signs(caption="A <sign199>.")
    with pytest.raises(ValueError, match=r"'<sign199>'.* no row in the embedding.*resize_token"):
        train((model, processor), signs)
    model.resize_token_embeddings(len(processor.tokenizer))
    with pytest.raises(ValueError, match=r"'<sign199>'.* would never train.*train=.*text"):
        train((model, processor), signs, train="projector")
    train((model, processor), draw_signs())  # they do not occur here
    assert train((model, processor), signs, train="text").steps == 2


def test_a_record_that_is_too_long_is_refused_by_its_number():
    signs = draw_signs()
    signs[2]["caption"] *= 400
    with pytest.raises(
        ValueError, match=r"conversation 2 has \d+ tokens, more than max_length=1024"
    ):
        train(models.load(), signs)
    with pytest.raises(ValueError, match="more than max_length=10"):
        train(models.load(), draw_signs(), max_length=10)
    with pytest.raises(ValueError, match="max_length=5000, but the model has 1024 places"):
        train(models.load(), draw_signs(), max_length=5000)


def test_lora_on_a_tied_head_is_merged_into_a_head_of_its_own(tmp_path):
    model, processor = models.load()
    embedding = model.get_input_embeddings().weight.detach().clone()
    lora = dict(rank=4, target_modules=("q_proj", "lm_head"))
    run = train((model, processor), draw_signs(), train=(), lora=lora, learning_rate=1e-2)
    expected, batch = logits_of(run.model, processor), chat.Collator(processor)(draw_signs(2))
    with pytest.raises(ValueError, match="merge in float32"):
        models.merge_lora(run.model, batch, tolerance=-1.0)
    tied = models.unwrap_model(run.model)
    assert tied.get_output_embeddings().base_layer.weight is tied.get_input_embeddings().weight
    merged, comparison = models.merge_lora(run.model, batch)
    assert comparison["token_agreement"] == 1
    torch.testing.assert_close(logits_of(merged, processor), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    models.save_adapters(merged, tmp_path / "changed")
    for folder in ("whole", "changed"):
        loaded, _ = models.load(tmp_path / folder)
        assert torch.equal(loaded.lm_head.weight, merged.lm_head.weight)
        assert torch.equal(loaded.get_input_embeddings().weight, embedding)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("MMKIT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_device() == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == "cuda:3"
    monkeypatch.setenv("MMKIT_DEVICE", "cpu")
    assert default_device() == "cpu"


def test_one_process_encodes_the_images_and_the_others_wait(tmp_path):
    model, processor = models.load()
    signs, calls = draw_signs(), []
    encoder = model.model.vision_tower
    encoder.register_forward_hook(lambda *args: calls.append(threading.current_thread().name))
    options = dict(cache_dir=tmp_path, show_progress=False)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(
            training.cache_features, model, processor, signs, wait=True, **options
        )
        first = training.cache_features(model, processor, signs, **options)
        second = waiting.result(timeout=60)
    assert torch.equal(first.features, second.features)
    assert set(calls) == {threading.main_thread().name}


def test_only_the_first_process_shows_a_bar(monkeypatch):
    bars = []
    monkeypatch.setattr("mmkit.training.fitting.make_progress_bar", lambda **_: bars.append(1))
    monkeypatch.setenv("RANK", "1")
    train(models.load(), draw_signs(), show_progress=True)
    assert not bars


def test_deepspeed_is_refused_in_words(monkeypatch):
    with pytest.raises(ValueError, match="does not train with DeepSpeed.*FSDP"):
        train(models.load(), draw_signs(), deepspeed="zero3.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not train with DeepSpeed"):
        train(models.load(), draw_signs())


def test_a_large_model_with_the_rates_of_the_small_one_is_warned_of(monkeypatch):
    monkeypatch.setattr("mmkit.training.options.LARGE_MODEL_PARAMETERS", 1e5)
    with pytest.warns(UserWarning, match="learning_rate=1e-4"):
        train(models.load(), draw_signs())
