"""C21 and C22: a shortcut in the notes that silences the image, with what helps against it; and a
shortcut inside the image, darkness, found by recolouring alone.
"""

import contextlib
import tempfile

import numpy as np
import torch
from run import entry
from world import fresh

from mmkit import chat, evaluate, explain, losses, training
from mmkit.chat.prompts import YESNO_PROMPT
from mmkit.core.stats import random_derangement
from mmkit.explain.known_tasks import SHORTCUT_NOTES, shortcut_records
from mmkit.explain.scoring import choice_logprobs
from mmkit.explain.shapley import compute_image_share
from mmkit.models.parts import part_of

IDS = ("C21", "C22")
PAIRS, TEST, SIDE, STEPS, BATCH = (
    400,
    200,
    32,
    60,
    8,
)  # pictures of 32 × 32 pixels, from a cheap lens: the image can be read, with effort
# Geometric mean of vision's and text's learning rates: with slower ones LoRA learns nothing in so
# few steps (C5).
G = (8e-4 * 2e-3) ** 0.5
SEEN = tempfile.TemporaryDirectory()  # what the frozen tower saw, for all arms


def rates(r):
    return dict(vision=G / r**0.5, projector=1e-2, text=G * r**0.5)


def patients(
    seed, n, what, *how, **knobs
):  # what: which part of the seed's world, so that no two meet
    return shortcut_records(n, *how, seed=8000 + 100 * what + seed, image_size=SIDE, **knobs)


def says_yes(model, processor, ds, folder, pictures=None, notes=None, chunk=100):  # (N,) bool
    "What the model answers, with these or others' pictures and notes."
    N, words = len(ds), processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    told = [
        dict(r, notes=ds[notes[k]]["notes"]) if notes is not None else r for k, r in enumerate(ds)
    ]
    seen = evaluate.get_pooled_features(model, processor, ds, cache_dir=folder)
    seen = seen if pictures is None else seen[torch.as_tensor(pictures)]
    rows, out = (
        training.TokenizedDataset(
            told, chat.Collator(processor, YESNO_PROMPT, include_notes=True), seen
        ),
        [],
    )
    for i in range(0, N, chunk):
        out.append(
            choice_logprobs(
                model, rows.collate_fn([rows[k] for k in range(i, min(i + chunk, N))]), words
            )
        )
    p = np.concatenate(out)
    return p[:, 0] > p[:, 1]


def balanced(hit, yes, on=None):  # mean of both classes' rates, of the records that count
    on = np.ones(len(yes), bool) if on is None else on
    return np.mean([hit[on & (yes == v)].mean() for v in (False, True)])


def scores(model, processor, test, same, folder):
    """Right answers where notes agree by chance, where they mislead, and where they agree as in
    training; what other pictures and other notes cost.
    """
    yes, told = (
        np.array([r["label"] == "melanoma" for r in test]),
        np.array(
            [
                "melanoma" in (r["notes"] or "") or r["notes"] == SHORTCUT_NOTES["seldom told"][0]
                for r in test
            ]
        ),
    )
    own, other = says_yes(model, processor, test, folder), random_derangement(len(test))
    acc, wrong = balanced(own == yes, yes), told != yes
    out = {
        "accuracy": acc,
        "perceptual score": (
            acc - balanced(says_yes(model, processor, test, folder, pictures=other) == yes, yes)
        ),
    }
    if test[0]["notes"] is None:
        return out
    yes_s = np.array([r["label"] == "melanoma" for r in same])
    return out | {
        "accuracy where the note misleads": balanced(own == yes, yes, wrong),
        "answers like the note": (own == told).mean(),
        "answers that follow a changed note": (
            (says_yes(model, processor, test, folder, notes=other) != own)[
                told != told[other]
            ].mean()
        ),
        "accuracy with notes as in training": balanced(
            says_yes(model, processor, same, folder) == yes_s, yes_s
        ),
    }


class Balance(explain.DominanceCallback):
    """Slows what dominates, in OGM-GE's manner (Peng et al.

    2022): by its gradients, or by its steps, since AdamW takes no notice of a gradient's size.
    """

    def __init__(self, *a, by="gradient", alpha=1.0, **kw):
        super().__init__(*a, **kw)
        self.by, self.alpha = by, alpha

    def slowed(self):  # part -> factor
        if not self.history:
            return {}
        last = list(self.history.values())[-1]
        i, t = max(last["image gain"], 1e-3), max(last["text gain"], 1e-3)
        return (
            dict(text=1 - np.tanh(self.alpha * t / i))
            if t > i
            else (
                dict(
                    projector=1 - np.tanh(self.alpha * i / t),
                    vision=1 - np.tanh(self.alpha * i / t),
                )
                if i > t
                else {}
            )
        )

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kw):
        super().on_pre_optimizer_step(args, state, control, model=model, **kw)
        for part, k in self.slowed().items():
            if self.by == "step":
                for g in optimizer.param_groups:
                    g["lr"] *= (
                        k if g.get("name") == part else 1
                    )  # the scheduler sets it anew at every step
            else:
                for n, p in model.named_parameters():
                    if p.grad is not None and part_of(n) == part:
                        p.grad.copy_(
                            k * p.grad + torch.randn_like(p.grad) * p.grad.std()
                            if p.numel() > 1
                            else k * p.grad
                        )


def run_of(seed, small, agree, words, cure, steps):
    "Train with notes that agree so often, and a cure or none."
    n, t = (60, 40) if small else (PAIRS, TEST)
    train, test, same, probe = (
        patients(seed, m, k, a, words)
        for m, k, a in (
            (n, 0, agree),
            (t, 1, agree and 0.5),
            (t, 2, agree),
            (8 if small else 48, 3, agree),
        )
    )
    with (
        tempfile.TemporaryDirectory()
        if cure.startswith("vision")
        else contextlib.nullcontext(SEEN.name)
    ) as folder:
        model, processor = fresh()
        first = 0
        how = dict(
            train=("projector",),
            lora=8,
            batch_size=BATCH,
            prompt=YESNO_PROMPT,
            include_notes=True,
            seed=seed,
            show_progress=False,
            cache_dir=folder,
        )
        look = explain.DominanceCallback(
            processor, probe, eval_steps=steps, prompt=YESNO_PROMPT, notes=True, min_gain=0.0
        )
        if cure == "note dropout":
            rng = np.random.default_rng((seed, 5))
            train = [dict(r, notes=r["notes"] if rng.random() < 0.5 else None) for r in train]
        if cure == "contrastive":
            how["loss_weights"] = losses.LossWeights(contrastive=0.3)
        if cure.startswith("vision : text"):
            how.update(
                train=("vision", "projector"),
                learning_rate=rates(
                    dict(zip(("2e-4 : 5e-4", "5e-4 : 2e-4"), (2.5, 0.4)))[cure.partition(" = ")[2]]
                ),
            )
        if cure.startswith("modulated"):
            look = Balance(
                processor,
                probe,
                eval_steps=5 if steps > 5 else 1,
                prompt=YESNO_PROMPT,
                notes=True,
                min_gain=0.0,
                by=cure.partition(" ")[2],
            )
        if cure == "image first":
            first = steps // 2
            model = training.fit(
                model, processor, [dict(r, notes=None) for r in train], **how, max_steps=first
            ).model
            how.update(train=("projector", "text"), lora=None)
        run = training.fit(
            model, processor, train, **how, max_steps=steps - first, callbacks=[look]
        )
        last = look.monitor.measure(run.model)
        return scores(run.model, processor, test, same, folder) | {
            "training loss": float(run.smoothed(window=10)[-1]),
            "image gain, words": last["image gain"],
            "text gain, words": last["text gain"],
            "image share": (
                compute_image_share(last["image gain"], last["text gain"])
                if last["image gain"] > 0 or last["text gain"] > 0
                else 0.5
            ),
        }


def recoloured(seed, n):  # the same lesions, light and dark
    "Each lesion twice, with nothing else moved than its pigment."
    worlds = [
        patients(seed, n, 8, dark_benign=share) for share in (0.0, 1.0)
    ]  # in one world melanomas are dark, in the other benign lesions are
    assert [r["label"] for r in worlds[0]] == [r["label"] for r in worlds[1]] and [
        r["attributes"] for r in worlds[0]
    ] == [r["attributes"] for r in worlds[1]]
    return [
        list(x)
        for x in zip(*((a, b) if a["label"] == "benign" else (b, a) for a, b in zip(*worlds)))
    ]


def dark(seed, small, share, steps):
    """Train where dark goes with benign so often; ask of lesions where it does not, and of the
    same lesions recoloured.
    """
    n, t = (60, 40) if small else (PAIRS, TEST)
    folder = SEEN.name
    model, processor = fresh()
    train, test, same = (
        patients(seed, m, k, dark_benign=s)
        for m, k, s in ((n, 5, share), (t, 6, 0.5), (t, 7, share))
    )
    run = training.fit(
        model,
        processor,
        train,
        train=("projector",),
        lora=8,
        max_steps=steps,
        batch_size=BATCH,
        prompt=YESNO_PROMPT,
        seed=seed,
        show_progress=False,
        cache_dir=folder,
    )
    out = scores(run.model, processor, test, None, folder)
    yes_s = np.array([r["label"] == "melanoma" for r in same])
    light, deep = (says_yes(run.model, processor, x, folder) for x in recoloured(seed, t))
    return out | {
        "accuracy where dark goes with benign as in training": balanced(
            says_yes(run.model, processor, same, folder) == yes_s, yes_s
        ),
        "answers that flip when recoloured": (light != deep).mean(),
        "called melanoma less often when dark": light.mean() - deep.mean(),
        "training loss": float(run.smoothed(window=10)[-1]),
    }


DIAL = (50, 75, 90, 99)
CURES = (
    "note dropout",
    "image first",
    "contrastive",
    "modulated step",
    "vision : text = 2e-4 : 5e-4",
    "vision : text = 5e-4 : 2e-4",
)


def measure(cells, seeds, small=False):
    steps, found, seen = 3 if small else STEPS, {}, {}
    arms = (
        {f"notes agree in {a}%": (a / 100, "told before", "") for a in DIAL}
        | {"no notes": (None, "told before", "")}
        | {"90%, words never tied to a label": (0.9, "seldom told", "")}
        | {f"90%, {c}": (0.9, "told before", c) for c in CURES}
    )
    if small:
        arms = {
            k: arms[k]
            for k in (
                "notes agree in 50%",
                "notes agree in 75%",
                "notes agree in 90%",
                "notes agree in 99%",
                "no notes",
                "90%, words never tied to a label",
                "90%, modulated step",
                "90%, image first",
                "90%, vision : text = 2e-4 : 5e-4",
            )
        }
    for s in seeds:
        for arm, (agree, words, cure) in arms.items():
            got = cells(
                arm,
                s,
                lambda **k: run_of(s, small, **k),
                agree=agree,
                words=words,
                cure=cure,
                steps=steps,
            )
            for m, v in got.items():
                found.setdefault((arm, m), {})[s] = v
        for share in (0.5, 0.9, 0.99):
            got = cells(
                f"dark goes with benign in {share:.0%}",
                s,
                lambda **k: dark(s, small, **k),
                share=share,
                steps=steps,
            )
            for m, v in got.items():
                seen.setdefault((f"dark goes with benign in {share:.0%}", m), {})[s] = v
    what = (
        f"{steps} steps of {BATCH} on {PAIRS} lesions of {SIDE} × {SIDE} pixels, projector and LoRA"
        " of rank 8; a yes or no question"
    )
    ACC, D = "accuracy", "dark goes with benign in {}"
    yield entry(
        cells,
        seeds,
        "C21",
        seen,
        [
            dict(
                statement=(
                    "where dark goes with benign in 90%, a dark coat makes the same lesion look"
                    " benign"
                ),
                a=[D.format("90%"), "called melanoma less often when dark"],
                b=0,
                expect="above",
            ),
            dict(
                statement=(
                    "answers flip under recolouring alone more often than where dark means nothing"
                ),
                a=[D.format("90%"), "answers that flip when recoloured"],
                b=[D.format("50%"), "answers that flip when recoloured"],
                expect="above",
            ),
            dict(
                statement="fewer right answers where dark means nothing",
                a=[D.format("90%"), ACC],
                b=[D.format("50%"), ACC],
                expect="below",
            ),
            dict(
                statement="and at 99% fewer still",
                a=[D.format("99%"), ACC],
                b=[D.format("90%"), ACC],
                expect="below",
            ),
            dict(
                statement="the runs learn: above chance where dark means nothing",
                a=[D.format("50%"), ACC],
                b=0.5,
                expect="above",
                control=True,
            ),
        ],
        (D.format("50%"),),
        TEST,
        claim="90% of dark spots are benign, so the model learns that dark means benign.",
        measured=(
            "Lesions whose pigment goes with the label as often as told, and the same lesions"
            " recoloured: answers that flip, and right answers where darkness means nothing."
        ),
        limitations=(
            f"{what}, no notes. The share of dark lesions that are benign was set by us; in a"
            " clinic it is another."
        ),
        setup=what,
    )
    A = "notes agree in {}%"
    yield entry(
        cells,
        seeds,
        "C22",
        found,
        [
            dict(
                statement="notes that agree in 90% cost right answers where they agree by chance",
                a=[A.format(90), ACC],
                b=[A.format(50), ACC],
                expect="below",
            ),
            dict(
                statement=(
                    "where a note misleads, the model goes with it: right less often than a coin"
                ),
                a=[A.format(90), "accuracy where the note misleads"],
                b=0.5,
                expect="below",
            ),
            dict(
                statement="the image's share of the answers falls",
                a=[A.format(90), "image share"],
                b=[A.format(50), "image share"],
                expect="below",
            ),
            dict(
                statement="notes that agree in 75% do as much harm as to cost right answers",
                a=[A.format(75), ACC],
                b=[A.format(50), ACC],
                expect="below",
            ),
            dict(
                statement="it happens as well with words that were never tied to a label",
                a=["90%, words never tied to a label", ACC],
                b=[A.format(50), ACC],
                expect="below",
            ),
            dict(
                statement="the image can be read: above chance without notes",
                a=["no notes", ACC],
                b=0.5,
                expect="above",
                control=True,
            ),
        ],
        ("no notes", A.format(50)),
        TEST,
        claim="Text drowns out images: the model answers from the words.",
        measured=(
            "Patient notes that agree with the label in 50 to 99% of training pairs and in 50% of"
            " test pairs: right answers, whose lead the model follows, and the image's share; then"
            " eight ways to train against it."
        ),
        limitations=(
            f"{what}. How soon a shortcut is taken depends on how hard the picture is to read, and"
            " on whether the words were known: see the arms. The cures were not tuned, each has"
            " one setting."
        ),
        setup=what,
    )
