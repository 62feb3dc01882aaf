"""Do the maps find real lesions? A model tuned on drawn ones describes photographs that have a lesion mask: python tests/real_masks.py FOLDER [N]
FOLDER holds images/ and masks/ of the same names (ISIC 2018, task 1, is laid out so)."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmkit import explain, models, training
from mmkit.core.display import make_table
from mmkit.core.stats import bootstrap
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.explain.map_evaluation import localization_metrics, make_center_prior

SEED, WORDS = 0, ("lesion", "asymmetry", "border", "colours")


def pairs_in(folder, n):  # (picture, (96, 96) bool mask)
    masks = {p.stem.split("_segmentation")[0]: p for p in sorted((folder / "masks").iterdir())}
    for p in sorted((folder / "images").iterdir())[:n]:
        if p.stem in masks:
            with Image.open(p) as i, Image.open(masks[p.stem]) as m:
                yield (
                    i.convert("RGB"),
                    np.asarray(m.convert("L").resize((96, 96), Image.NEAREST)) > 127,
                )


def main(folder, n=60):
    processor = models.load()[1]
    drawn = load_melanoma_pairs(800, seed=41, masks=False)
    tuned = training.fit(
        models.load()[0],
        processor,
        drawn,
        train=("projector", "text"),
        lora=16,
        max_steps=150,
        batch_size=16,
        learning_rate=dict(text=3e-3, projector=3e-3),
        seed=SEED,
        show_progress=False,
    ).model
    blank, found, rng = explain.randomize_weights(tuned, SEED), {}, np.random.default_rng(SEED)
    for i, (picture, mask) in enumerate(pairs_in(Path(folder), n)):
        looks = {
            "": explain.attribute_words(
                tuned,
                processor,
                picture,
                methods=("attention", "rollout", "relevancy", "gradcam"),
                only="answer",
            )
        }
        said = "".join(w for w, a in zip(looks[""].words, looks[""].in_answer) if a).strip()
        looks[", weights shuffled"] = explain.attribute_words(
            blank, processor, picture, said, ("attention", "relevancy"), only="answer"
        )
        words = [
            k
            for k, w in enumerate(looks[""].words)
            if w.strip(" .,") in WORDS and looks[""].in_answer[k]
        ]
        maps = (
            {m + tag: s.flat(m)[words].mean(0) for tag, s in looks.items() for m in s.maps}
            if words
            else {}
        )
        for name, m in (
            maps | dict(centre=make_center_prior(24, 24), random=rng.random((24, 24)))
        ).items():
            found.setdefault(name, []).append(localization_metrics(m, mask))

    def row(name, rows):
        return dict(map=name, pictures=len(rows)) | {
            says: str(bootstrap(np.nanmean, [r[k] for r in rows]))
            for k, says in (
                ("hit", "brightest point on the lesion"),
                ("auc", "AUC"),
                ("iou", "IoU"),
            )
        }

    print(f"seed {SEED}, torch {torch.__version__}; words: {', '.join(WORDS)}")
    print(make_table([row(k, v) for k, v in found.items()]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
