"What the experiments share: the pairs of a seed, drawn, split by patient, seen and read once."

import functools

import numpy as np
import torch

from mmkit import models, training
from mmkit.data.melanoma_pairs import load_melanoma_pairs
from mmkit.data.splits import split_records

PAIRS, SMALL = (
    1500,
    160,
)  # pairs of a seed: 70% to learn from, 15% to choose by, 15% to report on, apart by patient
WORLD = 7000  # the worlds of these experiments: nobody else draws from them


@functools.lru_cache(6)
def pairs_of(seed: int, small: bool = False):  # train, validation, test
    "A seed's own lesions."
    return split_records(
        load_melanoma_pairs(SMALL if small else PAIRS, seed=WORLD + seed, masks=False),
        (0.7, 0.15, 0.15),
        seed=seed,
    )


def fresh():  # (model, processor)
    "The shipped base, untouched."
    return models.load()


def distinct(ds):  # the same records less those whose caption was there before
    "Records with captions that all differ."
    return ds.select(np.sort(np.unique(ds["caption"], return_index=True)[1]))


@functools.lru_cache(6)
@torch.no_grad()
def vectors(
    seed: int, small: bool = False
) -> dict:  # part -> (x (N, D), y (N, D), ids (N,), records)
    """What the projector gets of each picture (mean of its normed tokens: projecting it is the
    mean of the projected tokens), and each caption read alone by the base.
    """
    model, processor = fresh()
    m, tok, out = models.unwrap_model(model), processor.tokenizer, {}
    norm = m.model.multi_modal_projector.mm_soft_emb_norm
    for name, ds in pairs_of(seed, small).items():
        pooled, said, read = (
            training.cache_features(model, processor, ds, show_progress=False).features,
            list(ds["caption"]),
            [],
        )
        x = norm._norm(pooled.float()).mean(1)  # (N, D)
        for i in range(0, len(said), 64):
            t = tok(said[i : i + 64], padding=True, padding_side="right", return_tensors="pt")
            read.append(models.embed_texts(model, t["input_ids"], t["attention_mask"]))
        out[name] = (
            x,
            torch.cat(read).float(),
            torch.as_tensor(np.unique(said, return_inverse=True)[1]),
            ds,
        )
    out["gain"], out["W"] = (
        1 + norm.weight.detach().float(),
        m.model.multi_modal_projector.mm_input_projection_weight.detach().float(),
    )
    return out
