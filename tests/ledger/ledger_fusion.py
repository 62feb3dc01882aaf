"C30: early fusion, cross-attention and late fusion at equal trained parameters."

import torch
from ledger_order import (
    BATCH,
    COMMON,
    HELD,
    SCREEN,
    STEPS,
    TEXT,
    gathered,
    rates,
    scored,
    sound,
    tuned,
)
from run import entry
from world import fresh, pairs_of

from mmkit import chat, evaluate, models, training
from mmkit.core.runtime import seed_everything
from mmkit.core.stats import random_derangement
from mmkit.models.connectors import MLPProjector
from mmkit.models.cross_attention import CrossAttentionConnector
from mmkit.models.parts import get_trainable_parameters
from mmkit.models.surgery import replace_connector
from mmkit.training.fusion import fit_late_fusion, retrieve_captions
from mmkit.training.steps import count_step_flops

IDS = ("C30",)
EARLY, SHUT, OPEN, LATE, LONG = (
    "early",
    "cross-attention, gates at 0",
    "cross-attention, gates at 0.5",
    "late, equal steps",
    "late, equal operations in all",
)
FUSIONS = {
    EARLY: lambda c: MLPProjector(c, hidden_size=704),
    SHUT: CrossAttentionConnector,
    OPEN: lambda c: CrossAttentionConnector(c, initial_gate=0.5),
}


def counted(model):
    return sum(
        p.numel() for part in ("projector", "text") for p in get_trainable_parameters(model, part)
    )


def fused(seed, small, arm, lr, steps, batch):
    """Early fusion or cross-attention, with LoRA in the text model, trained from fresh weights on
    cached features.
    """
    parts, (model, processor) = pairs_of(seed, small), fresh()
    seed_everything(seed)
    model, processor = replace_connector(model, processor, FUSIONS[arm](model.config))
    model = models.add_lora(model, 8)
    run = training.fit(
        model,
        processor,
        parts["train"],
        train=("projector", "text"),
        max_steps=steps,
        batch_size=batch,
        learning_rate=rates(lr),
        seed=seed,
        show_progress=False,
    )
    rows = training.TokenizedDataset(
        parts["validation"],
        chat.Collator(processor),
        training.cache_features(model, processor, parts["validation"], show_progress=False),
    )
    with models.freeze_all_but(model, "projector", "text"):
        flops = count_step_flops(
            model, rows.collate_fn([rows[i] for i in range(min(batch, len(rows)))])
        )
    gates = [float(p.tanh().abs()) for n, p in model.named_parameters() if n.endswith("attn_gate")]
    return scored(model, processor, parts) | {
        "training loss": float(run.smoothed()[-1]),
        "GFLOPs a step": flops / 1e9,
        "TFLOPs in all": steps * flops / 1e12,
        "trained parameters": counted(model),
        **({"gate at the end": sum(gates) / len(gates)} if gates else {}),
    }


def late(seed, small, lr, steps, batch, hidden=528):
    """Two encoders, contrastive; a picture is described by the nearest caption of the training
    lesions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    parts, (model, processor) = pairs_of(seed, small), fresh()
    test, val = (parts[k].select(range(min(HELD, len(parts[k])))) for k in ("test", "validation"))
    net = fit_late_fusion(
        model,
        processor,
        parts["train"],
        max_steps=steps,
        batch_size=batch,
        learning_rate=lr,
        hidden_size=hidden,
        seed=seed,
    )
    with FlopCounterMode(display=False) as count:
        (
            net.encode_image(torch.randn(batch, 64, 128)).sum()
            + net.encode_text(torch.randn(batch, 128)).sum()
        ).backward()
    said = retrieve_captions(net, model, processor, test, parts["train"])
    own, other = (
        evaluate.score_captions(test, said, n_resamples=1),
        evaluate.score_captions(
            test, [said[i] for i in random_derangement(len(said), 0)], n_resamples=1
        ),
    )
    chosen = evaluate.score_captions(
        val, retrieve_captions(net, model, processor, val, parts["train"]), n_resamples=1
    ).macro_f1.value
    return {
        "macro-F1": own.macro_f1.value,
        "balanced accuracy": own.balanced_accuracy.value,
        "macro-F1, shuffled pictures": other.macro_f1.value,
        "validation macro-F1": chosen,
        "GFLOPs a step": count.get_total_flops() / 1e9,
        "TFLOPs in all": steps * count.get_total_flops() / 1e12,
        "trained parameters": sum(p.numel() for p in net.parameters()),
    }


def measure(cells, seeds, small=False):
    steps, batch = (2, 4) if small else (STEPS, BATCH)
    budget = {LATE: (steps, batch), LONG: (3, 4) if small else (3 * steps // 2, 64)}

    def run(arm, s, lr):
        if arm in FUSIONS:
            return cells(
                arm, s, lambda **k: fused(s, small, arm, **k), lr=lr, steps=steps, batch=batch
            )
        return cells(
            arm,
            s,
            lambda **k: late(s, small, **k),
            lr=lr,
            steps=budget[arm][0],
            batch=budget[arm][1],
        )

    rate, by_rate = tuned(run, [*FUSIONS, LATE, LONG], seeds, small)
    found = gathered(cells, seeds, small, run, rate)
    F1, STEP, n = "macro-F1", "GFLOPs a step", min(HELD, len(pairs_of(seeds[0], small)["test"]))
    yield entry(
        cells,
        seeds,
        "C30",
        found,
        [
            dict(
                statement="early fusion beats cross-attention, gates shut at the start",
                a=[EARLY, F1],
                b=[SHUT, F1],
                expect="above",
            ),
            dict(
                statement="gates that start half open beat shut ones",
                a=[OPEN, F1],
                b=[SHUT, F1],
                expect="above",
            ),
            dict(
                statement="early fusion beats late fusion, at equal steps",
                a=[EARLY, F1],
                b=[LATE, F1],
                expect="above",
            ),
            dict(
                statement="and late fusion, at equal operations in all",
                a=[EARLY, F1],
                b=[LONG, F1],
                expect="above",
            ),
            dict(
                statement=(
                    "a step of cross-attention costs fewer operations than one of early fusion"
                ),
                a=[SHUT, STEP],
                b=[EARLY, STEP],
                expect="below",
            ),
            *sound(SHUT),
            *sound(EARLY),
        ],
        (COMMON,),
        n,
        tuned_rate=rate,
        by_rate=by_rate,
        claim="Early, late and cross-attention fusion trade quality against cost.",
        measured=(
            "Macro-F1 of captions (of the nearest training caption, for late fusion), and"
            " operations a step, at equal numbers of trained parameters."
        ),
        setup=(
            "Fresh weights: an MLP into 64 tokens; two gated cross-attention layers that look at"
            " 64 vectors; each with LoRA of rank 8 in the text model; two encoders of an MLP each."
            f" About 271,000 trained parameters everywhere, {steps} steps of {batch} on cached"
            f" features; late fusion also for {budget[LONG][0]} steps of {budget[LONG][1]}, about"
            f" the operations of the whole early run. LoRA's rate is {TEXT:g}; of the connector's"
            " (and the encoders'), each arm has its own best of"
            f" {', '.join(f'{r:g}' for r in SCREEN)} (further out where the best lay at the edge)"
            " by validation lesions of two seeds."
        ),
        limitations=(
            "The text model was pre-trained with image tokens in its sentences, never with"
            " cross-attention: early fusion has a head start. Late fusion cannot say what no"
            " training caption said; with these captions, made from eleven attributes, finding is"
            " easier than with free text. 64 vectors a picture: cross-attention saves most where"
            " pictures have thousands."
        ),
    )
