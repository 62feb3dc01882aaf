"""MM-SHAP in batches against one coalition a forward pass; DominanceCallback's part of a run's
steps.

mm-shap: seconds a coalition of one record of the shipped base: `mm_shap` as it is, all included,
    against a plain forward pass (`own_score` of the hidden record) for each coalition. Best of
    the rounds.
callback: the time spent inside the callback at its defaults (16 records, every 50 steps), as a
    share of all the rest of the same run, from step 1 on: batch 16, projector and LoRA.
"""

import os
import sys
import tempfile
import time
from unittest import mock

from mmkit import chat, explain, models, training
from mmkit.chat.prompts import YESNO_PROMPT
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.explain.ablation import find_prompt_tokens, get_pad_token_id, mask_inputs
from mmkit.explain.known_tasks import shortcut_records
from mmkit.explain.scoring import pair_score
from mmkit.explain.shapley import sample_shapley_values

SEED, ROUNDS = int(os.environ.get("MMKIT_SEED", 0)), int(os.environ.get("MMKIT_ROUNDS", 3))


def mm_shap():
    import numpy as np

    model, processor = models.load("base")
    record = load_melanoma_pairs(4, seed=SEED, masks=False)[0]
    one = chat.Collator(processor, "Describe this lesion, its border and its colours.")([record])
    at = find_prompt_tokens(one, processor)[0].nonzero()[:, 0].numpy()
    W, T, side = len(at), one["input_ids"].shape[1], 4

    def alone(there):  # what a plain loop would do for one coalition
        words = np.zeros((1, T), bool)
        words[0, at] = ~there[:W]
        return pair_score(
            model,
            mask_inputs(one, words, ~there[W:].reshape(1, side, side), get_pad_token_id(processor)),
        )[0]

    coalitions = np.random.default_rng(SEED).random((16, W + side * side)) < 0.5
    num_asked, took = [], dict(batched=[], alone=[])

    def counted(value_fn, *args, **kwargs):
        def value(there):
            num_asked.append(len(there))
            return value_fn(there)

        return sample_shapley_values(value, *args, **kwargs)

    with mock.patch("mmkit.explain.shapley.sample_shapley_values", counted):
        for _ in range(ROUNDS):  # in turn, so that a busy moment does not fall on one side alone
            num_asked.clear()
            began = time.perf_counter()
            explain.mm_shap(model, one, processor, grid_size=side, n_permutations=4)
            took["batched"].append((time.perf_counter() - began) / sum(num_asked))
            began = time.perf_counter()
            for coalition in coalitions:
                alone(coalition)
            took["alone"].append((time.perf_counter() - began) / len(coalitions))
    b, a = min(took["batched"]), min(took["alone"])
    print(
        f"  mm-shap   {b / a:.2f}× the time of an unbatched forward for each coalition"
        f" ({1e3 * b:.1f} ms, {1e3 * a:.1f} ms), {W} words and {side * side} regions,"
        f" {sum(num_asked)} coalitions, seed {SEED}; wanted: 0.3×"
    )


def callback():

    class Timed(explain.DominanceCallback):
        spent = 0.0

        def _timed(name):
            def f(self, *a, **kw):
                t = time.perf_counter()
                getattr(explain.DominanceCallback, name)(self, *a, **kw)
                self.spent += time.perf_counter() - t

            return f

        on_pre_optimizer_step, on_optimizer_step, on_step_end = (
            _timed("on_pre_optimizer_step"),
            _timed("on_optimizer_step"),
            _timed("on_step_end"),
        )

    shares = []
    for _ in range(ROUNDS):
        model, processor = models.load("base")
        eye = Timed(
            processor, shortcut_records(16, 0.9, seed=SEED + 1), prompt=YESNO_PROMPT, notes=True
        )
        with tempfile.TemporaryDirectory() as folder:
            run = training.fit(
                model,
                processor,
                shortcut_records(200, 0.9, seed=SEED),
                train=("projector",),
                lora=8,
                max_steps=100,
                batch_size=16,
                prompt=YESNO_PROMPT,
                include_notes=True,
                seed=SEED,
                callbacks=[eye],
                show_progress=False,
                cache_dir=folder,
            )
        shares.append(eye.spent / (run.seconds - eye.spent))
    print(
        f"  callback  {min(shares):.1%} of step time at the default, best of {ROUNDS}"
        f" ({', '.join(f'{s:.1%}' for s in shares)}), 100 steps of 16, seed {SEED}; wanted: 10% or"
        " less"
    )


if __name__ == "__main__":
    [dict(shap=mm_shap, callback=callback)[k]() for k in sys.argv[1:] or ("shap", "callback")]
