"""Do the maps find real lesions?

A model tuned on drawn ones describes photographs that have a lesion mask:
    python tests/real_masks.py FOLDER [N]
FOLDER holds images/ and masks/ of the same names (ISIC 2018, task 1, is laid out so).
"""

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

SEED = 0
WORDS = ("lesion", "asymmetry", "border", "colours")
METHODS = ("attention", "rollout", "relevancy", "gradcam")
RANDOMIZED_METHODS = ("attention", "relevancy")
MEASURES = dict(hit="brightest point on the lesion", auc="AUC", iou="IoU")


def read_pairs(folder, max_images):
    "Yields (image, (128, 128) bool mask)."
    masks = {
        path.stem.split("_segmentation")[0]: path for path in sorted((folder / "masks").iterdir())
    }
    for path in sorted((folder / "images").iterdir())[:max_images]:
        if path.stem in masks:
            with Image.open(path) as image, Image.open(masks[path.stem]) as mask:
                small = mask.convert("L").resize((128, 128), Image.NEAREST)
                yield image.convert("RGB"), np.asarray(small) > 127


def tune(processor):
    "A model that describes drawn lesions."
    return training.fit(
        models.load()[0],
        processor,
        load_melanoma_pairs(800, seed=41, masks=False),
        train=("projector", "text"),
        lora=16,
        max_steps=150,
        batch_size=16,
        learning_rate=dict(text=3e-3, projector=3e-3),
        seed=SEED,
        show_progress=False,
    ).model


def maps_of_words(tuned, randomized, processor, image):
    "Mean map of WORDS in the caption by method, of the model and of one with randomized weights."
    own = explain.attribute_words(tuned, processor, image, methods=METHODS, only="answer")
    caption = "".join(word for word, used in zip(own.words, own.in_answer) if used).strip()
    control = explain.attribute_words(
        randomized, processor, image, caption, RANDOMIZED_METHODS, only="answer"
    )
    chosen = [
        i for i, word in enumerate(own.words) if word.strip(" .,") in WORDS and own.in_answer[i]
    ]
    if not chosen:
        return {}
    return {
        method + suffix: attributions.mean_maps(method)[chosen].mean(0)
        for suffix, attributions in (("", own), (", weights shuffled", control))
        for method in attributions.maps
    }


def main(folder, max_images=60):
    processor = models.load()[1]
    tuned = tune(processor)
    randomized = explain.randomize_weights(tuned, SEED)
    rng, metrics = np.random.default_rng(SEED), {}
    for image, mask in read_pairs(Path(folder), max_images):
        maps = maps_of_words(tuned, randomized, processor, image)
        maps |= dict(centre=make_center_prior(24, 24), random=rng.random((24, 24)))
        for name, heatmap in maps.items():
            metrics.setdefault(name, []).append(localization_metrics(heatmap, mask))
    rows = [
        dict(map=name, images=len(measured))
        | {
            title: str(bootstrap(np.nanmean, [row[key] for row in measured]))
            for key, title in MEASURES.items()
        }
        for name, measured in metrics.items()
    ]
    print(f"seed {SEED}, torch {torch.__version__}; words: {', '.join(WORDS)}")
    print(make_table(rows))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
