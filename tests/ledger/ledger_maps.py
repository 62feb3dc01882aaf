"""C31 and the maps of C19: do attention, relevancy and their like show where a structure is, and
does a loss on the attention help the caption, the map, or only the map?
"""

import tempfile

import numpy as np
from run import entry
from world import fresh, pairs_of

from mmkit import evaluate, explain
from mmkit.explain.map_evaluation import evaluate_pointing
from mmkit.explain.words import attribute_words

IDS = ("C31", "C19-maps")
STEPS, WEIGHT, LEARN, MAPS, HELD = (
    150,
    0.3,
    600,
    40,
    128,
)  # steps of 8; the gaze term's weight; records to learn from, to map, to describe
FAST, SLOW = ("attention", "rollout", "relevancy", "gradcam"), "occlusion"
NAMES = dict(
    attention="attention",
    rollout="rollout",
    relevancy="relevancy",
    gradcam="Grad-CAM",
    occlusion="occlusion",
)
MEASURES = dict(
    hit="brightest point on the structure",
    lesion="brightest point on the lesion",
    inside="AUC inside the lesion",
    iou="IoU",
)
PRIORS = ("centre", "random")
SHUFFLED = tuple(f"{m}, weights shuffled" for m in ("attention", "relevancy"))


def mapped(looks, method):
    rows = evaluate_pointing(looks, method)
    return {MEASURES[k]: float(np.nanmean([r[k] for r in rows])) for k in MEASURES}


def one(seed, small, weight):
    """Train with this weight of the gaze term; say what the captions are worth and what each kind
    of map shows.
    """
    parts, (model, processor) = pairs_of(seed, small), fresh()
    learn, n = parts["train"].select(range(min(LEARN, len(parts["train"])))), 3 if small else MAPS
    model, told = explain.fit_with_attention_supervision(
        model,
        processor,
        list(learn)[: 16 if small else None],
        supervision_weight=weight,
        max_steps=2 if small else STEPS,
        seed=seed,
    )
    test, held, out = (
        list(parts["test"].select(range(n))),
        parts["test"].select(range(min(4 if small else HELD, len(parts["test"])))),
        {},
    )
    with tempfile.TemporaryDirectory() as folder:
        s = evaluate.score_captions(
            held,
            evaluate.generate(model, processor, held, show_progress=False, cache_dir=folder),
            n_resamples=1,
        )
    out |= {
        "captions|macro-F1": s.macro_f1.value,
        "captions|loss": float(np.mean(told["caption"][-20:])),
        "captions|gaze": float(np.mean(told["gaze"][-20:])),
    }
    kinds = ("attention", "relevancy") if small else FAST if weight else (*FAST, SLOW)
    looks = [attribute_words(model, processor, r, r["caption"], kinds, "structures") for r in test]
    for m in kinds:
        out |= {f"{NAMES[m]}|{k}": v for k, v in mapped(looks, m).items()}
    if not weight:
        for m in PRIORS:
            out |= {f"{m}|{k}": v for k, v in mapped(looks, m).items()}
        blank = explain.randomize_weights(model, seed)
        none = [
            attribute_words(
                blank, processor, r, r["caption"], ("attention", "relevancy"), "structures"
            )
            for r in test
        ]
        for m, arm in zip(("attention", "relevancy"), SHUFFLED):
            out |= {f"{arm}|{k}": v for k, v in mapped(none, m).items()}
        lost = [r for r in explain.activation_patching(model, processor, test)]
        out |= {
            f"exchange|{k}": float(np.mean([r[k] for r in lost]))
            for k in ("loss", "on", "lesion", "off", "tokens")
        }
    return out


def commonest(seed, small):
    parts = pairs_of(seed, small)
    test = parts["test"].select(range(min(HELD, len(parts["test"]))))
    return {
        "macro-F1": (
            evaluate.score_captions(
                test, evaluate.majority_baseline(parts["train"], len(test)), n_resamples=1
            ).macro_f1.value
        )
    }


def measure(cells, seeds, small=False):
    found, taught, at = {}, {}, lambda table, arm, measure: table.setdefault((arm, measure), {})
    for s in seeds:
        got = {
            w: cells(f"gaze {w}", s, lambda **k: one(s, small, **k), weight=w)
            for w in (0.0, WEIGHT)
        }
        for key, v in got[0.0].items():
            arm, what = key.split("|")
            if arm not in ("captions", "exchange"):
                at(found, arm, what)[s] = v
        for what, says in (
            ("loss", "nats lost without the structure"),
            ("on", "nats carried by the tokens on it"),
            ("lesion", "nats carried by as many in the lesion"),
            ("off", "nats carried by all other tokens"),
        ):
            at(found, "exchange", says)[s] = got[0.0][f"exchange|{what}"]
        for w, arm in ((0.0, "captions alone"), (WEIGHT, "captions and gaze")):
            at(taught, arm, "macro-F1")[s] = got[w]["captions|macro-F1"]
            at(taught, arm, "gaze in training, nats")[s] = got[w]["captions|gaze"]
            for m in ("attention", "relevancy"):
                for k in ("lesion", "hit", "inside"):
                    at(taught, arm, f"{m}: {MEASURES[k]}")[s] = got[w][f"{m}|{MEASURES[k]}"]
        at(taught, "always the commonest", "macro-F1")[s] = cells(
            "always the commonest", s, lambda **k: commonest(s, small, **k)
        )["macro-F1"]
    hit, inside, on = MEASURES["hit"], MEASURES["inside"], MEASURES["lesion"]
    yield entry(
        cells,
        seeds,
        "C31",
        taught,
        [
            dict(
                statement="teaching the gaze improves the captions",
                a=["captions and gaze", "macro-F1"],
                b=["captions alone", "macro-F1"],
                expect="above",
            ),
            dict(
                statement="teaching the gaze brings attention onto the lesion",
                a=["captions and gaze", f"attention: {on}"],
                b=["captions alone", f"attention: {on}"],
                expect="above",
            ),
            dict(
                statement="teaching the gaze improves attention as a map",
                a=["captions and gaze", f"attention: {inside}"],
                b=["captions alone", f"attention: {inside}"],
                expect="above",
            ),
            dict(
                statement="teaching the gaze improves relevancy as a map",
                a=["captions and gaze", f"relevancy: {inside}"],
                b=["captions alone", f"relevancy: {inside}"],
                expect="above",
            ),
            dict(
                statement="the term is learnt",
                a=["captions and gaze", "gaze in training, nats"],
                b=["captions alone", "gaze in training, nats"],
                expect="below",
                control=True,
            ),
            *(
                []
                if small
                else [
                    dict(
                        statement="captions alone: above the commonest answer",
                        a=["captions alone", "macro-F1"],
                        b=["always the commonest", "macro-F1"],
                        expect="above",
                        control=True,
                    )
                ]
            ),
        ],
        ("always the commonest",),
        MAPS,
        claim=(
            "Axolotl has a loss that supervises cross-attention (not found in its documentation)."
            " Our own: a term that draws the words' attention onto what they name."
        ),
        measured=(
            f"Captions (macro-F1 of {HELD} held-out lesions) and maps ({MAPS} held-out lesions,"
            " words that name a structure that is there), with and without the term, weight"
            f" {WEIGHT}."
        ),
        limitations=(
            "One weight, two of four layers, masks that we drew and that are exact. With a tower"
            " that may learn, or masks drawn by people, it may come out otherwise."
        ),
        setup=f"Projector and LoRA of rank 16 on {LEARN} lesions, {STEPS} steps of 8, rate 3e-3.",
    )
    arms = [a for a in NAMES.values() if (a, hit) in found]
    yield entry(
        cells,
        seeds,
        "C19-maps",
        found,
        [
            *(
                dict(
                    statement=f"{a} points at the structure better than the centre",
                    a=[a, hit],
                    b=["centre", hit],
                    expect="above",
                )
                for a in arms
            ),
            *(
                dict(
                    statement=f"{a} ranks inside the lesion better than chance",
                    a=[a, inside],
                    b=0.5,
                    expect="above",
                )
                for a in arms
            ),
            dict(
                statement="relevancy points at the structure better than attention",
                a=["relevancy", hit],
                b=["attention", hit],
                expect="above",
            ),
            dict(
                statement="relevancy ranks inside the lesion better than attention",
                a=["relevancy", inside],
                b=["attention", inside],
                expect="above",
            ),
            dict(
                statement=(
                    "the tokens on a structure carry more of its mention than as many anywhere in"
                    " the lesion"
                ),
                a=["exchange", "nats carried by the tokens on it"],
                b=["exchange", "nats carried by as many in the lesion"],
                expect="above",
            ),
            dict(
                statement="relevancy points better than with shuffled weights",
                a=["relevancy", hit],
                b=[SHUFFLED[1], hit],
                expect="above",
            ),
            dict(
                statement="attention finds the lesion better than with shuffled weights",
                a=["attention", on],
                b=[SHUFFLED[0], on],
                expect="above",
            ),
            *(
                []
                if small
                else [
                    dict(
                        statement="the centre finds the lesion better than a random point",
                        a=["centre", on],
                        b=["random", on],
                        expect="above",
                        control=True,
                    )
                ]
            ),
        ],
        (*PRIORS, *SHUFFLED),
        MAPS,
        claim="Look at the attention maps to see whether picture and text are linked.",
        measured=(
            f"Maps of the words that name a structure which is there, on {MAPS} held-out lesions,"
            " against the true masks; and by how much such a mention loses when the structure is"
            " not drawn, in all and by the image tokens on it."
        ),
        limitations=(
            "A small tower whose attention is global, 8 × 8 image tokens, structures that we drew:"
            " a tower trained on more may keep knowledge where it found it."
        ),
        setup=(
            f"Projector and LoRA of rank 16 on {LEARN} lesions, {STEPS} steps of 8, rate 3e-3."
            " Relevancy through the tower to its patches; attention is the mean over layers and"
            " heads."
        ),
    )
