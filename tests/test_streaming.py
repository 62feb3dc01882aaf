"A data set without a length trains, and a stopped run goes on with the example that was next."

import itertools

import datasets
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from mmkit import chat, models, training
from mmkit.chat.templates import tiny_processor
from mmkit.training.streaming import StreamedDataset
from mmkit.training.trainer import AlignmentTrainer

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    "Signs in three parquet files, of which a run reads one record after the other."
    folder = tmp_path_factory.mktemp("signs")
    features = datasets.Features(dict(image=datasets.Image(), caption=datasets.Value("string")))
    for shard in range(3):
        rows = [
            dict(image=Image.new("RGB", (32, 32), (9 * k, 80 * shard, 0)), caption=f"{shard} {k}.")
            for k in range(7)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{shard}.parquet")
    files = dict(train=sorted(map(str, folder.glob("*.parquet"))))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


@pytest.fixture
def seen(monkeypatch):
    "The answers of every batch that was trained on, in their order."
    batches, train_batch = [], AlignmentTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        batches.append(inputs["labels"][inputs["labels"] != -100].tolist())
        return train_batch(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "training_step", training_step)
    return batches


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def fit(stream, output_dir, *callbacks, **options):
    model, processor = models.load()
    options = dict(max_steps=8, batch_size=4, shuffle_buffer_size=5, save_steps=3) | options
    settings = dict(show_progress=False, callbacks=callbacks, output_dir=str(output_dir))
    return training.fit(model, processor, stream, **settings, **options)


def test_a_resumed_stream_goes_on_with_the_next_example(stream, seen, tmp_path):
    whole = fit(stream, tmp_path / "whole")
    expected = seen.copy()
    assert len(expected) == 8 and len({str(batch) for batch in expected}) == 8
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        fit(stream, tmp_path / "parts", Stop(7))
    assert seen == expected[:7]
    seen.clear()
    resumed = fit(stream, tmp_path / "parts")
    assert seen == expected[6:]  # in the second round
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_every_record_is_seen_once_a_round_in_another_order(stream):
    dataset = StreamedDataset(stream, chat.Collator(tiny_processor("gemma3")), 100)
    captions = [example["caption"] for example in itertools.islice(dataset, 42)]
    assert sorted(captions[:21]) == sorted(captions[21:]) == sorted(set(captions))
    assert captions[:21] != captions[21:] != sorted(captions[21:])


def test_a_stream_says_what_it_cannot_do(stream, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no length to count epochs by; give max_steps"):
        fit(stream, tmp_path, max_steps=None, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"rename_column\('text', 'caption'\)"):
        fit(stream.rename_column("caption", "text"), tmp_path)
    with pytest.raises(ValueError, match="the stream is empty"):
        fit(stream.take(0), tmp_path)
    fit(stream, tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="shuffle_buffer_size"):
        fit(stream, tmp_path / "run", max_steps=1, shuffle_buffer_size=7)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains in one process"):
        fit(stream, tmp_path)
