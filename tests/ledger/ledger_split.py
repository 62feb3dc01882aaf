"""C11: what a split by image promises, beside a split by patient and beside patients whom nobody
had seen; the dial is how many pictures are second photographs of a lesion.
"""

import tempfile

import numpy as np
from PIL import Image, ImageFilter
from run import entry
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from world import fresh

from mmkit import chat, evaluate, training
from mmkit.chat.prompts import YESNO_PROMPT
from mmkit.explain.scoring import choice_logprobs
from mmkit.lesions.render import World

IDS = ("C11",)
PATIENTS, EACH, NEW, SIDE, STEPS, BATCH, WORLD = (
    80,
    6,
    60,
    48,
    80,
    16,
    8700,
)  # 480 pictures of 80 patients, and 360 of 60 others
SHARES = (0.0, 0.4, 0.8)  # of a patient's pictures that show a lesion they have shown before
YES, NO = "Yes, this is a melanoma.", "No, this is benign."


def again(image, rng):  # a second photograph of the same lesion
    "Turned, moved, in other light, through another lens."
    a = np.rot90(image, rng.integers(4))
    a = a[:, ::-1] if rng.random() < 0.5 else a
    a = np.roll(a, rng.integers(-3, 4, 2), (0, 1)).astype(np.float32) * rng.uniform(
        0.9, 1.08
    ) * rng.normal(1, 0.03, 3) + rng.normal(0, 3, a.shape)
    return np.asarray(
        Image.fromarray(np.clip(a, 0, 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(rng.uniform(0, 0.7))
        )
    )


def clinic(seed, patients, share):  # records
    "Six pictures a patient; so large a share of them shows a lesion that is there already."
    w, rng, out = (
        World(
            seed=seed,
            num_lesions=patients * EACH,
            lesions_per_patient=EACH,
            prevalence=0.5,
            difficulty=1.0,
        ),
        np.random.default_rng((seed, 9)),
        [],
    )
    for p in range(patients):
        own, shown = range(p * EACH, (p + 1) * EACH), []
        for i in own:
            i = int(rng.choice(shown)) if shown and rng.random() < share else i
            lesion, image = w.lesion(i), w.render(i, SIDE).image
            out.append(
                dict(
                    image=Image.fromarray(again(image, rng)),
                    patient=lesion.patient_id,
                    lesion=lesion.lesion_id,
                    label=lesion.label,
                    prompt=YESNO_PROMPT,
                    answer=YES if lesion.label == "melanoma" else NO,
                )
            )
            shown.append(i)
    return out


def quarters(records, by, seed):  # four times positions to learn from and to test on
    y, who = (
        np.array([r["label"] == "melanoma" for r in records]),
        np.array([r["patient"] for r in records]),
    )
    cut = (
        StratifiedKFold(4, shuffle=True, random_state=seed).split(y, y)
        if by == "image"
        else StratifiedGroupKFold(4, shuffle=True, random_state=seed).split(y, y, who)
    )
    return list(cut)


def probe(x, y, kind):  # fitted
    m = (
        KNeighborsClassifier(1)
        if kind == "nearest neighbour"
        else LogisticRegression(C=0.03, max_iter=2000)
    )
    return make_pipeline(StandardScaler(), m).fit(x, y)


def called(model, processor, records, folder):  # (N,) bool
    rows, out = (
        training.TokenizedDataset(
            records,
            chat.Collator(processor),
            evaluate.get_pooled_features(model, processor, records, cache_dir=folder),
        ),
        [],
    )
    first = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    for i in range(0, len(rows), 100):
        out.append(
            choice_logprobs(
                model, rows.collate_fn([rows[k] for k in range(i, min(i + 100, len(rows)))]), first
            )
        )
    p = np.concatenate(out)
    return p[:, 0] > p[:, 1]


def one(seed, small, share, tuned, steps):
    """What two splits of one clinic promise, and what patients of another year get, by two probes
    of the frozen tower and by a short fit.
    """
    here, later = (
        clinic(WORLD + 10 * seed, 16 if small else PATIENTS, share),
        clinic(WORLD + 10 * seed + 1, 12 if small else NEW, 0.0),
    )
    model, processor = fresh()
    y, y_later = (np.array([r["label"] == "melanoma" for r in d]) for d in (here, later))
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        x, x_later = (
            evaluate.get_pooled_features(model, processor, d, cache_dir=folder).flatten(1).numpy()
            for d in (here, later)
        )
        for by in ("image", "patient"):
            cuts = quarters(here, by, seed)
            for kind in ("logistic regression", "nearest neighbour"):
                fitted = [(probe(x[train], y[train], kind), test) for train, test in cuts]
                out[f"split by {by}|{kind}"] = np.mean(
                    [balanced_accuracy_score(y[test], m.predict(x[test])) for m, test in fitted]
                )
                out[f"split by {by}|{kind}, new patients"] = np.mean(
                    [balanced_accuracy_score(y_later, m.predict(x_later)) for m, _ in fitted]
                )
            out[f"split by {by}|test pictures whose lesion was trained on"] = np.mean(
                [
                    here[i]["lesion"] in {here[k]["lesion"] for k in train}
                    for train, test in cuts
                    for i in test
                ]
            )
            if tuned:
                (train, test), (model, processor) = cuts[0], fresh()
                run = training.fit(
                    model,
                    processor,
                    [here[i] for i in train],
                    lora=8,
                    max_steps=steps,
                    batch_size=BATCH,
                    seed=seed,
                    show_progress=False,
                    cache_dir=folder,
                )
                out[f"split by {by}|short fit"] = balanced_accuracy_score(
                    y[test], called(run.model, processor, [here[i] for i in test], folder)
                )
                out[f"split by {by}|short fit, new patients"] = balanced_accuracy_score(
                    y_later, called(run.model, processor, later, folder)
                )
    for k in ("logistic regression", "nearest neighbour", "short fit")[: 3 if tuned else 2]:
        out[f"image minus patient|{k}"] = out[f"split by image|{k}"] - out[f"split by patient|{k}"]
        for by in ("image", "patient"):
            out[f"promise minus new patients, split by {by}|{k}"] = (
                out[f"split by {by}|{k}"] - out[f"split by {by}|{k}, new patients"]
            )
    return out


def measure(cells, seeds, small=False):
    steps, found = 4 if small else STEPS, {}
    for s in seeds:
        for share in SHARES:
            for k, v in cells(  # noqa: B020
                f"{share:.0%} second photographs",
                s,
                lambda **k: one(s, small, **k),
                share=share,
                tuned=share in (SHARES[0], SHARES[-1]),
                steps=steps,
            ).items():
                arm, m = k.split("|")
                found.setdefault((f"{arm}, {share:.0%} again", m), {})[s] = v
    D, P, none, most = (
        "image minus patient, {}",
        "promise minus new patients, split by {}, {}",
        f"{SHARES[0]:.0%} again",
        f"{SHARES[-1]:.0%} again",
    )
    LR, NN, FIT = "logistic regression", "nearest neighbour", "short fit"
    controls = tuple({a for a, _ in found if a.endswith(none)})
    yield entry(
        cells,
        seeds,
        "C11",
        found,
        [
            *[
                dict(
                    statement=(
                        "where 80% are second photographs, a split by image promises what new"
                        f" patients get: {k}"
                    ),
                    a=[P.format("image", most), k],
                    b=0,
                    expect="equal",
                )
                for k in (LR, NN, FIT)
            ],
            *[
                dict(
                    statement=f"where 80% are second photographs, both splits say the same: {k}",
                    a=[D.format(most), k],
                    b=0,
                    expect="equal",
                )
                for k in (LR, NN, FIT)
            ],
            dict(
                statement="where none are, both splits say the same: nearest neighbour",
                a=[D.format(none), NN],
                b=0,
                expect="equal",
            ),
            dict(
                statement="where none are, both splits say the same: logistic regression",
                a=[D.format(none), LR],
                b=0,
                expect="equal",
                control=True,
            ),
            *[
                dict(
                    statement=(
                        f"where 80% are, a split by patient promises what new patients get: {k}"
                    ),
                    a=[P.format("patient", most), k],
                    b=0,
                    expect="equal",
                    control=True,
                )
                for k in (LR, NN)
            ],
        ],
        controls,
        PATIENTS * EACH // 4,
        claim="A stratified 80/10/10 split prevents bias.",
        measured=(
            "Balanced accuracy on quarters that were held out (the short fit: on one) by image or"
            " by patient, both stratified by label, and on new patients, as more of a patient's"
            " pictures show a lesion that was shown before."
        ),
        limitations=(
            "The dial is ours: patients share skin, age and camera here, and otherwise only lesions"
            " that were photographed again. In a clinic they share more, and how much is not known"
            " before it is measured."
        ),
        setup=(
            f"{PATIENTS} patients with {EACH} pictures of {SIDE} × {SIDE} pixels, and {NEW} others;"
            f" probes of the frozen tower's patches, and projector with LoRA of rank 8 for {steps}"
            f" steps of {BATCH}"
        ),
    )
