"A run: the prompt it travels with, what it goes on with and what not, how it ends, what is saved."

import pytest
from PIL import Image

from mmkit import evaluate, explain, models, training
from mmkit.chat.prompts import resolve_prompt
from mmkit.report.context import EvalContext

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
