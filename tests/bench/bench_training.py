"""`fit` against a bare loop, against transformers' Trainer with nothing cached, and against the
text model alone; what checkpointing saves. Fresh processes.

One step is timed from the second epoch on (10 steps of 16 pairs an epoch, projector only, answer
cross-entropy); a figure is the best of the rounds.
plain: Trainer on the records as they are: it opens the pictures, tokenises, and runs
    model(**batch).loss, tower, all logits and all; projector only as well.
text:  transformers' text model, output head and loss, forward and back to the embeddings it is
    given, on batches made in advance: no pictures, no optimiser.
bare:  fifteen lines on the same rows with the same `terms` and the same lean text model: what is
    left is the Trainer's own work.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time

from mmkit import chat, losses, models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.training.dataset import epoch_permutation

SEED, N, BATCH, EPOCHS, ROUNDS = (
    int(os.environ.get("MMKIT_SEED", 0)),
    160,
    16,
    4,
    int(os.environ.get("MMKIT_ROUNDS", 3)),
)


def world():

    model, processor = models.load("base")
    return model, processor, load_melanoma_pairs(n=N, seed=1, masks=False), chat.Collator(processor)


def after_first_epoch(times):
    return (times[-1] - times[N // BATCH - 1]) / (len(times) - N // BATCH)  # seconds a step


def fit(folder, **kw):

    model, processor, ds, _ = world()
    return after_first_epoch(
        training.fit(
            model,
            processor,
            ds,
            num_train_epochs=EPOCHS,
            batch_size=BATCH,
            seed=SEED,
            cache_dir=folder,
            show_progress=False,
            **kw,
        ).history["seconds"]
    )


def bare(folder):
    import torch

    model, processor, ds, collate = world()
    times = []
    rows = training.TokenizedDataset(
        ds, collate, training.cache_features(model, processor, ds, folder, show_progress=False)
    )
    with models.freeze_all_but(model, "projector"), training.fast_gemma3_forward(model):
        opt = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        for epoch in range(EPOCHS):
            for some in epoch_permutation(N, SEED, epoch).reshape(-1, BATCH):
                loss = training.compute_losses(
                    model, rows.collate_fn([rows[int(i)] for i in some]), losses.LossWeights()
                )["ce"]
                opt.zero_grad()
                loss.backward()
                opt.step()
                loss.item()
                times.append(time.perf_counter())
    return after_first_epoch(times)


def plain(folder):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model, processor, ds, collate = world()
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *a, **k):
            times.append(time.perf_counter())

    with models.freeze_all_but(model, "projector"):
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=2,
            learning_rate=1e-3,
            seed=SEED,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(model, args, train_dataset=ds, data_collator=collate, callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return after_first_epoch(times)


def text(folder):
    import torch

    model, processor, ds, collate = world()
    times = [time.perf_counter()]
    model.requires_grad_(False)
    rows = training.TokenizedDataset(ds, collate, torch.zeros(N, 1, 1))
    embed, vocab = model.get_input_embeddings(), model.config.text_config.vocab_size
    batches = [
        rows.collate_fn([rows[int(i)] for i in some])
        for some in epoch_permutation(N, SEED).reshape(-1, BATCH)
    ]
    for _epoch in range(2):
        for b in batches:
            x = embed(b["input_ids"]).detach().requires_grad_()
            h = model.model.language_model(
                inputs_embeds=x, attention_mask=b["attention_mask"], use_cache=False
            ).last_hidden_state
            model.loss_function(model.lm_head(h), b["labels"], vocab).backward()
            times.append(time.perf_counter())
    return after_first_epoch(times[1:])


def extra(folder, on):  # bytes beyond what was held before the first step; LoRA, batch 64

    model, processor, ds, _ = world()
    kw = dict(train=("projector", "text"), lora=8, batch=64, folder=folder, bar=False)
    training.fit(
        model,
        processor,
        ds.select(range(2)),
        train="projector",
        batch_size=2,
        max_steps=1,
        cache_dir=folder,
        show_progress=False,
    )
    training.cache_features(model, processor, ds, folder, show_progress=False)
    held, _began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    run = training.fit(model, processor, ds, max_steps=4, activation_checkpointing=on, **kw)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024)
    return run.seconds / 4


HOW = dict(
    fit=fit,
    bare=bare,
    plain=plain,
    text=text,
    kept=lambda f: extra(f, False),
    again=lambda f: extra(f, True),
)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:]:
            print(HOW[sys.argv[1]](sys.argv[2] if sys.argv[2:] else folder))
            raise SystemExit
        got = {how: [] for how in HOW}
        for _ in range(ROUNDS):  # in turn, so that a busy moment does not fall on one side alone
            for how in got:
                out = subprocess.run(
                    [sys.executable, __file__, how, folder],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                got[how].append([float(v) for v in out.split()])
        t = {how: min(v[-1] for v in values) for how, values in got.items()}
        ms = {how: f"{how} {s * 1e3:.0f} ms" for how, s in t.items()}
        for what, peer, wanted in (
            ("overhead of fit", "bare", 1.1),
            ("cached step", "plain", 0.45),
            ("cached step", "text", 1.15),
        ):
            print(
                f"  {what:16} {t['fit'] / t[peer]:5.2f}×  of {ms[peer]} a step (fit"
                f" {t['fit'] * 1e3:.0f} ms); best of {ROUNDS}, batch {BATCH}, seed {SEED}; wanted:"
                f" {wanted}×"
            )
        m0, m1 = (min(v[0] for v in got[how]) / 2**20 for how in ("kept", "again"))
        print(
            f"  checkpointing    {m1 / m0:5.2f}×  of the extra memory ({m1:.0f} MiB, {m0:.0f} MiB)"
            f" at {t['again'] / t['kept']:.2f}× the time; LoRA, batch 64"
        )
