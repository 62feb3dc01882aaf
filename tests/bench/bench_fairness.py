"""A report by group, with intervals by patient and the control: one product of matrices against a
loop over scikit-learn, in one process.
"""

import os
import time

import numpy as np
from sklearn.metrics import brier_score_loss, precision_score, recall_score, roc_auc_score

from mmkit import audit
from mmkit.core.stats import bootstrap

SEED, N, GROUPS, DRAWS = int(os.environ.get("MMKIT_SEED", 0)), 1000, 4, 50
SCORES = dict(
    recall=lambda y, s: recall_score(y, s >= 0.5),
    precision=lambda y, s: precision_score(y, s >= 0.5),
    specificity=lambda y, s: recall_score(~y, s < 0.5),
    Brier=brier_score_loss,
    AUROC=roc_auc_score,
)


def plain(y, s, g, p):
    r = np.random.default_rng(SEED)

    def of(g):
        return {m: [f(y[g == k], s[g == k]) for k in range(GROUPS)] for m, f in SCORES.items()}

    return [
        bootstrap(f, y[g == k], s[g == k], groups=p[g == k], n_resamples=DRAWS)
        for f in SCORES.values()
        for k in range(GROUPS)
    ], [{m: max(v) - min(v) for m, v in of(r.permutation(g)).items()} for _ in range(DRAWS)]


if __name__ == "__main__":
    r = np.random.default_rng(SEED)
    y, p = r.random(N) < 0.4, np.repeat(np.arange(N // 2), 2)
    g = r.integers(0, GROUPS, N // 2).repeat(2)
    s = np.clip(r.normal(0.4 + 0.25 * y, 0.2), 0, 1)
    ds = [
        dict(label="melanoma" if v else "benign", patient=int(k), attributes={})
        for v, k in zip(y, p)
    ]
    took = dict(loop=[], mmkit=[])
    for _ in range(3):  # in turn, so that a busy moment does not fall on one side alone
        for how, job in (
            ("loop", lambda: plain(y, s, g, p)),
            ("mmkit", lambda: audit.compute_group_metrics(ds, s, by=g, n_resamples=DRAWS)),
        ):
            t = time.perf_counter()
            job()
            took[how].append(time.perf_counter() - t)
    a, b = min(took["mmkit"]), min(took["loop"])
    print(
        f"  gaps      1/{b / a:.0f} of the time ({a:.2f} s, a loop over scikit-learn {b:.2f} s);"
        f" best of 3, {N} records, {GROUPS} groups, {DRAWS} resamples and deals, seed {SEED};"
        " wanted: 1/10"
    )
