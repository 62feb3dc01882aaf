"""The measures agree with their definitions, order the tasks of known truth, work on every family,
and leave no trace.
"""

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from mmkit import chat, explain, models, training
from mmkit.chat.images import split_per_image
from mmkit.chat.prompts import YESNO_PROMPT
from mmkit.chat.templates import FAMILY_SPECIAL_TOKENS, tiny_processor
from mmkit.explain.ablation import (
    IMAGE_INPUT_KEYS,
    IMAGE_REPLACEMENTS,
    find_prompt_tokens,
    get_pad_token_id,
    mask_inputs,
    mask_text,
    permutation_importance,
    select_example,
    swap_images,
)
from mmkit.explain.attention_weights import image_attention_share
from mmkit.explain.contributions import Contributions, plot_contributions
from mmkit.explain.divergence import bits_to_colour, compute_divergence
from mmkit.explain.known_tasks import (
    KNOWN_TASKS,
    compare_dominance_measures,
    make_known_task,
    shortcut_records,
    train_on_known_task,
)
from mmkit.explain.monitor import ModalityMonitor, mismatched_partners
from mmkit.explain.scoring import choice_logprobs, pair_score, score_answer_tokens
from mmkit.explain.shapley import (
    compute_image_share,
    exact_shapley_values,
    sample_shapley_values,
    shapley_two_players,
)
from mmkit.models.tiny import TINY_CONFIGS

FAMILIES, SPEAKING = list(TINY_CONFIGS), [f for f in TINY_CONFIGS if f not in ("clip", "siglip")]


def noise(k):
    return Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def made(family, B=4):
    if family in FAMILY_SPECIAL_TOKENS:
        p = tiny_processor(family)
        return (
            models.tiny_random_model(family, vocab_size=1024),
            chat.Collator(p)(
                [
                    dict(
                        image=noise(k),
                        prompt="Is the lesion dark?",
                        answer="A lesion." + " It is dark." * (k % 2),
                    )
                    for k in range(B)
                ]
            ),
            p,
        )
    g = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [
            torch.ones(B, 1, dtype=torch.long),
            torch.full((B, 4 * (family == "blip2")), 3),
            torch.randint(8, 100, (B, 5), generator=g),
            torch.full((B, 1), 2),
        ],
        1,
    )
    b = dict(input_ids=ids, pixel_values=torch.randn(B, 3, 32, 32, generator=g))
    if family == "blip2":
        b |= dict(
            attention_mask=torch.ones_like(ids),
            labels=ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100),
        )
    return models.tiny_random_model(family), b, None


@pytest.fixture(scope="module")
def all_made():
    return {f: made(f) for f in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request, all_made):
    return (request.param, *all_made[request.param])


@pytest.fixture(scope="module")
def base():
    return models.load()


# --- known truth
@pytest.fixture(scope="module")
def told():
    return {
        kind: [
            compare_dominance_measures(
                train_on_known_task(kind, s), *make_known_task(kind, 256, s + 50), seed=s
            )
            for s in range(4)
        ]
        for kind in KNOWN_TASKS
    }


@pytest.mark.parametrize(
    "measure", ["perceptual score", "blank", "noise", "MM-SHAP", "divergence", "gradient norm"]
)
def test_measures_order_the_tasks_of_known_truth(told, measure):
    mean = {
        k: [v for v in (s[measure] for s, _ in got) if not math.isnan(v)] for k, got in told.items()
    }
    mean = {k: np.mean(v) for k, v in mean.items() if v}
    for both in {"redundant", "XOR"} & set(mean):
        assert mean["text only"] < mean[both] < mean["image only"], (both, mean)
    assert "XOR" in mean and abs(mean["XOR"] - 0.5) < 0.2
    if measure in ("perceptual score", "blank", "noise", "divergence"):
        assert mean["text only"] < 0.05 and mean["image only"] > 0.95


def test_only_emap_sees_xor(told):
    acc = {k: {a: np.mean([r[a] for _, r in got]) for a in got[0][1]} for k, got in told.items()}
    assert all(a["original"] > 0.97 for a in acc.values())
    assert abs(acc["XOR"]["EMAP"] - 0.5) < 0.12 and all(
        acc[k]["EMAP"] > 0.95 for k in ("text only", "image only", "redundant")
    )
    assert max(acc["XOR"]["shuffled image"], acc["XOR"]["shuffled text"]) < 0.6

    def lost(k):
        return 2 * acc[k]["original"] - acc[k]["shuffled image"] - acc[k]["shuffled text"]

    assert lost("redundant") < 0.6 < 0.85 < lost("XOR"), (
        "what tells redundant from XOR: little is lost twice, or everything twice"
    )


def test_the_tasks_are_what_they_say():
    for kind in KNOWN_TASKS:
        words, patches, y = make_known_task(kind, 4000, 3)
        for x, name in ((words[:, 1, 0], "text"), (patches[:, 2, 0], "image")):
            r = abs(np.corrcoef(x, y)[0, 1])
            assert (r > 0.9) == (kind in (f"{name} only", "redundant")) and (r < 0.06 or r > 0.9), (
                kind,
                name,
                r,
            )


# --- Shapley
def game(S):
    return (
        3.0 * S[:, 0]
        + 3.0 * (S[:, 1] & S[:, 2] & S[:, 3])
        - 2.0 * (S[:, 4] | S[:, 0])
        + 0.5 * S[:, 5] * (1 + S[:, 1])
    )


def test_exact_shapley_is_the_definition():
    import itertools

    phi, orders = np.zeros(6), list(itertools.permutations(range(6)))
    for order in orders:
        there = np.zeros(6, bool)
        for k in order:
            was = game(there[None])[0]
            there[k] = True
            phi[k] += (game(there[None])[0] - was) / len(orders)
    np.testing.assert_allclose(exact_shapley_values(game, 6), phi, atol=1e-12)


def test_sampling_converges_to_exact_enumeration_and_knows_its_error():
    exact = exact_shapley_values(game, 6)
    far = []
    for n in (4, 1000):
        phi, error = sample_shapley_values(game, 6, n_permutations=n, seed=1)
        far.append(np.abs(phi - exact).max())
        np.testing.assert_allclose(phi.sum(), exact.sum(), atol=1e-9)
    assert far[1] < 0.03 and far[1] < far[0] and (np.abs(phi - exact) < 4 * error + 1e-9).all()
    hit = [
        np.abs(sample_shapley_values(game, 6, n_permutations=30, seed=s)[0] - exact)
        < 2.5 * sample_shapley_values(game, 6, n_permutations=30, seed=s)[1] + 1e-9
        for s in range(20)
    ]
    assert np.mean(hit) > 0.9


def test_no_coalition_is_asked_for_twice():
    asked = []

    def value(S):
        asked.extend(map(tuple, S))
        return game(S)

    sample_shapley_values(value, 6, n_permutations=20, batch_size=7)
    assert len(asked) == len(set(asked)) <= 64


def test_the_same_as_shaps_permutation_explainer():
    shap = pytest.importorskip("shap")

    def theirs(f, permutations):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            e = shap.explainers.Permutation(
                lambda X: f(np.asarray(X) > 0.5), np.zeros((1, 6)), seed=0
            )
            return e(np.ones((1, 6)), max_evals=permutations * 13, silent=True).values[0]

    def duets(S):
        return (
            3.0 * S[:, 0]
            + 2.0 * (S[:, 1] & S[:, 2])
            - 1.0 * (S[:, 3] | S[:, 4])
            + 0.5 * S[:, 5] * S[:, 0]
        )

    np.testing.assert_allclose(
        sample_shapley_values(duets, 6, n_permutations=2)[0], theirs(duets, 2), atol=1e-9
    )  # walked both ways, duets have no sampling error: the same numbers
    ours, error = sample_shapley_values(game, 6, n_permutations=400)
    np.testing.assert_allclose(ours, theirs(game, 400), atol=0.25)


# --- EMAP
def test_emap_is_hessel_and_lees():
    S = np.random.default_rng(0).normal(size=(7, 7, 3))
    want = np.zeros((7, 3))
    for i in range(
        7
    ):  # their definition: the closest sum of a function of the words and a function of the picture
        want[i] = (
            sum(S[i, j] for j in range(7)) / 7
            + sum(S[j, i] for j in range(7)) / 7
            - sum(S[j, k] for j in range(7) for k in range(7)) / 49
        )
    np.testing.assert_allclose(explain.emap(S), want, atol=1e-12)
    A = np.concatenate(
        [np.kron(np.eye(7), np.ones((7, 1))), np.kron(np.ones((7, 1)), np.eye(7))], 1
    )  # least squares over all pairs gives the same
    fit = A @ np.linalg.lstsq(A, S.reshape(49, 3), rcond=None)[0]
    np.testing.assert_allclose(
        explain.emap(S), fit.reshape(7, 7, 3)[np.arange(7), np.arange(7)], atol=1e-9
    )


# --- perceptual score
def test_lost_deals_out_anew_so_that_nobody_keeps_their_own():
    orders = []

    def score(order):
        orders.append(list(order))
        return (np.asarray(order) == np.arange(30)).astype(float)

    got = permutation_importance(score, 30, n_permutations=3)
    assert (
        got.value == 1 and orders[0] == list(range(30)) and len({tuple(o) for o in orders[1:]}) == 3
    )
    assert all(
        sorted(o) == list(range(30)) and all(k != i for i, k in enumerate(o)) for o in orders[1:]
    )


def test_patients_are_drawn_whole():
    own = np.repeat([1.0, 0, 1, 0, 1, 0], 20)

    def score(o):
        return own if list(o) == list(range(120)) else np.zeros(120)

    assert (
        permutation_importance(score, 120, groups=np.repeat(range(6), 20)).width
        > 2 * permutation_importance(score, 120).width
    )


# --- every family
def test_swap_deals_out_pictures_and_nothing_else(family):
    f, m, b, p = family
    x = swap_images(b, [1, 2, 3, 0])
    assert torch.equal(x["input_ids"], b["input_ids"]) and all(
        torch.equal(s, split_per_image(b)[k]) for s, k in zip(split_per_image(x), [1, 2, 3, 0])
    )
    alone = select_example(x, 2)
    mixed = select_example(b, 2) | {
        k: v for k, v in select_example(b, 3).items() if k in IMAGE_INPUT_KEYS
    }
    np.testing.assert_allclose(pair_score(m, alone), pair_score(m, mixed), atol=1e-5)
    assert np.abs(pair_score(m, x) - pair_score(m, b)).max() > 1e-7


def test_every_measure_on_every_family(family):
    f, m, b, p = family
    own = pair_score(m, b)
    modes, rng = [k.training for k in m.modules()], torch.get_rng_state()
    hooks = sum(
        len(k._forward_hooks) + len(k._forward_pre_hooks) + len(k._backward_hooks)
        for k in m.modules()
    )
    assert explain.perceptual_score(m, b).low <= explain.perceptual_score(m, b).value
    for how in IMAGE_REPLACEMENTS:
        assert not np.array_equal(pair_score(m, explain.ablate_image(b, how)), own), how
    assert not np.array_equal(pair_score(m, mask_text(b, p or m)), own)
    s = explain.mm_shap(m, b, p, n_permutations=2)
    assert (
        0 <= s.image_share <= 1
        and s.image_share + s.text_share == 1
        and len(s.words) == len(s.text_values) > 0
    )
    np.testing.assert_allclose(
        np.diag(explain.score_all_pairs(lambda x: pair_score(m, x), b)), own, atol=1e-4
    )
    g = explain.measure_gradient_shares(m, b)
    assert sum(v for _, v in g.values()) == pytest.approx(1) and all(v > 0 for v, _ in g.values())
    if f in SPEAKING:
        bits = explain.image_divergence(m, b)
        on = b["labels"].numpy() != -100
        assert np.isfinite(bits[on]).all() and np.isnan(bits[~on]).all() and 0 < bits[on].max() <= 1
        assert choice_logprobs(m, b, [7, 8]).shape == (4, 2)
    assert (
        [k.training for k in m.modules()] == modes
        and torch.equal(rng, torch.get_rng_state())
        and all(q.grad is None and q.requires_grad for q in m.parameters())
    )
    assert hooks == sum(
        len(k._forward_hooks) + len(k._forward_pre_hooks) + len(k._backward_hooks)
        for k in m.modules()
    )


@pytest.mark.parametrize("f", ["gemma3", "qwen2_vl", "clip"])
def test_mm_shap_is_exact_where_it_can_be_enumerated(all_made, f):
    m, b, p = all_made[f]
    one, source = select_example(b, 0), p or m
    at = find_prompt_tokens(one, source)[0].nonzero()[:, 0].numpy()
    W = len(at)

    def value(there):
        words = np.zeros((len(there), one["input_ids"].shape[1]), bool)
        words[:, at] = ~there[:, :W]
        return pair_score(
            m, mask_inputs(one, words, ~there[:, W:].reshape(-1, 2, 2), get_pad_token_id(source))
        )

    exact, s = (
        exact_shapley_values(value, W + 4),
        explain.mm_shap(m, b, p, grid_size=2, n_permutations=300),
    )
    assert (
        np.abs(np.concatenate([s.text_values, s.image_values.ravel()]) - exact).max()
        < 0.1 * np.abs(exact).max()
    )


def test_hidden_regions_are_where_they_should_be(all_made):
    for f, (_m, b, _p) in all_made.items():
        one = select_example(b, 0)
        hidden = np.zeros((1, 2, 2), bool)
        hidden[0, 0, 1] = True
        x = mask_inputs(one, np.zeros((1, one["input_ids"].shape[1]), bool), hidden)
        if f == "qwen2_vl":
            assert [bool((q == 0).all()) for q in x["pixel_values"].split(4)] == [
                False,
                True,
                False,
                False,
            ]
        else:
            q = x["pixel_values"].reshape(-1, 32, 32)
            assert (
                (q[:, :16, 16:] == 0).all()
                and torch.equal(q[:, 16:], one["pixel_values"].reshape(-1, 32, 32)[:, 16:])
                and (q[:, :16, :16] != 0).any()
            )


def test_words_are_the_prompts(all_made):
    m, b, p = all_made["llava"]
    said = [p.tokenizer.decode([i]) for i in b["input_ids"][0, find_prompt_tokens(b, p)[0]]]
    assert "".join(said).strip() == "Is the lesion dark?"
    with_model = find_prompt_tokens(b, m)
    assert (
        (with_model | ~find_prompt_tokens(b, p)).all()
        and not (with_model & (b["labels"] != -100)).any()
        and not (with_model & (b["input_ids"] == p.image_token_id)).any()
    )


# --- divergence
def test_divergence_against_scipy():
    from scipy.spatial.distance import jensenshannon

    P, Q = np.random.default_rng(0).dirichlet(np.ones(9) * 0.3, (2, 5))
    p, q = (torch.tensor(x).log() for x in (P, Q))
    np.testing.assert_allclose(
        compute_divergence(p, q), jensenshannon(P, Q, base=2, axis=1) ** 2, atol=1e-9
    )
    np.testing.assert_allclose(
        compute_divergence(p, q, "kl"), (P * np.log2(P / Q)).sum(1), atol=1e-9
    )
    with pytest.raises(ValueError, match="'js'"):
        compute_divergence(p, q, "jss")


# --- words
def test_words_of_an_answer_are_coloured_and_escaped(base):
    model, processor = base
    r = dict(image=noise(1), answer='A <b>lesion</b> & "skin".')
    told = explain.attribute_answer(
        model, processor, r, answer=r["answer"], other_records=[dict(image=noise(2))]
    )
    assert "".join(t for t, _ in told.words).strip() == r["answer"] and all(
        0 <= b <= 1 for _, b in told.words
    )
    page = told._repr_html_()
    assert (
        "<b>" not in page
        and "&lt;b&gt;" in page
        and "&amp;" in page
        and "habit" in page
        and r["answer"] not in page
    )
    same = explain.attribute_answer(model, processor, r, answer=r["answer"], other_records=[r])
    assert max(b for _, b in same.words) < 1e-6, "its own picture in its place moves nothing"
    assert bits_to_colour(0) == "#ffffff" and bits_to_colour(1) != bits_to_colour(0.5)

    def dark(c):
        return sum(int(c[i : i + 2], 16) for i in (1, 3, 5))

    assert dark(bits_to_colour(1)) < dark(bits_to_colour(0.5)) < dark(bits_to_colour(0.1)), (
        "one hue, darker and darker: readable without colours"
    )


@pytest.mark.parametrize("f", [f for f in SPEAKING if f in FAMILY_SPECIAL_TOKENS])
def test_every_family_that_speaks_can_be_coloured(all_made, f, monkeypatch):
    m, b, p = all_made[f]
    told = explain.attribute_answer(m, p, dict(image=noise(3)), answer="It is dark.")
    assert "".join(t for t, _ in told.words).strip() == "It is dark." and "a blank" in str(told)
    # An untrained model may end its answer at once: only words are left to say.
    vocab_size = m.config.get_text_config().vocab_size
    silent = {*p.tokenizer.all_special_ids, *range(len(p.tokenizer), vocab_size)}
    monkeypatch.setattr(m.generation_config, "suppress_tokens", sorted(silent))
    assert explain.attribute_answer(m, p, dict(image=noise(3)), max_new_tokens=4).words


# --- while it trains
def watched(base, eye, seed=0, steps=7, **kw):
    model, processor = models.load(**kw)
    callbacks = (
        [
            explain.DominanceCallback(
                processor,
                shortcut_records(4, 0.9, seed=9),
                eval_steps=3,
                prompt=YESNO_PROMPT,
                notes=True,
                **eye,
            )
        ]
        if eye is not None
        else []
    )
    run = training.fit(
        model,
        processor,
        shortcut_records(16, 0.9, seed=8),
        train=("projector",),
        lora=dict(rank=2, lora_dropout=0.2),
        max_steps=steps,
        batch_size=4,
        prompt=YESNO_PROMPT,
        include_notes=True,
        seed=seed,
        callbacks=callbacks,
        show_progress=False,
    )
    return run, callbacks


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_watched_run_is_the_same_run(base, cache, quantize):
    plain, _ = watched(base, None, quantize=quantize)
    run, (eye,) = watched(base, {}, quantize=quantize)
    assert np.array_equal(plain.history["loss"], run.history["loss"]), "to the bit"
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.state_dict().values(), run.model.state_dict().values())
    )
    assert list(eye.history) == [1, 3, 6] and np.flatnonzero(
        np.isfinite(run.history["image gain"])
    ).tolist() == [0, 2, 5]
    for name in ("gradient", "update"):
        assert (
            sum(eye.history[3][f"{name} share, {part}"] for part in ("vision", "projector", "text"))
            == pytest.approx(1)
            and eye.history[3][f"{name} share, vision"] == 0
        )
    assert (
        eye.previous_parameters is None
        and "nan" not in str(run.table())
        and not [k for k in run.model.modules() if k._forward_hooks]
    )
    explain.plot_dominance_timeline(run, min_image_share=0.3)
    with pytest.raises(ValueError, match="DominanceCallback"):
        explain.plot_dominance_timeline(plain)


def test_looking_leaves_modes_and_dice_alone(base):
    model, processor = base
    probe = ModalityMonitor(
        processor, shortcut_records(4, 0.9, seed=9), prompt=YESNO_PROMPT, notes=True
    )
    model.train()
    model.model.vision_tower.eval()
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    with torch.random.fork_rng():
        a = probe.measure(model)
    b = probe.measure(model)
    assert modes == [m.training for m in model.modules()] and torch.equal(
        rng, torch.get_rng_state()
    )
    model.eval()
    assert a == b or all(a[k] == pytest.approx(b[k], nan_ok=True) for k in a)


def test_two_players():
    assert (
        shapley_two_players(0, 1, 0, 1) == (1, 0)
        and shapley_two_players(0, 0, 1, 1) == (0, 1)
        and shapley_two_players(0, 0, 0, 1) == (0.5, 0.5)
        and shapley_two_players(0, 1, 1, 1) == (0.5, 0.5)
    )
    for v in np.random.default_rng(0).normal(size=(5, 4)):
        np.testing.assert_allclose(
            shapley_two_players(*v),
            exact_shapley_values(lambda S: np.array([v[a + 2 * b] for a, b in S.astype(int)]), 2),
        )
    assert (
        compute_image_share(3, 1) == 0.75
        and compute_image_share(-1, 2) == 0
        and math.isnan(compute_image_share(0.01, 0.01, 0.05))
    )


def test_a_look_is_what_four_passes_say(base):
    model, processor = base
    rs = shortcut_records(6, 0.9, seed=9)
    probe = ModalityMonitor(processor, rs, prompt=YESNO_PROMPT, notes=True, min_gain=0.0)
    got = probe.measure(model)
    other, strange = mismatched_partners([r["answer"] for r in rs], 2)

    def v(image, text):  # by the plain way: records and pixels
        b = chat.Collator(processor, YESNO_PROMPT, include_notes=True)(
            [
                dict(
                    r,
                    image=r["image"] if image else rs[other[k]]["image"],
                    notes=r["notes"] if text else rs[strange[k]]["notes"],
                )
                for k, r in enumerate(rs)
            ]
        )
        logp, _, on = score_answer_tokens(model, b)
        return float(logp.exp()[on].sum()) / 6

    image, text = shapley_two_players(v(0, 0), v(1, 0), v(0, 1), v(1, 1))
    assert got["image gain"] == pytest.approx(image, abs=1e-3) and got[
        "text gain"
    ] == pytest.approx(text, abs=1e-3)


def test_strangers_answer_otherwise_where_they_can():
    for answers in (
        ["a", "b"] * 4,
        ["a", "b", "c", "a", "b", "c", "d"],
        list("abcdefgh"),
        ["a"] * 5,
        ["a"] * 6 + ["b"],
        ["a", "b"],
    ):
        for order in mismatched_partners(answers, 2, seed=1):
            n = len(answers)
            assert sorted(order) == list(range(n)) and all(k != i for i, k in enumerate(order))
        first = mismatched_partners(answers, 1, seed=1)[0]
        if 2 * max(answers.count(a) for a in answers) <= len(answers):
            assert all(answers[k] != answers[i] for i, k in enumerate(first))
    with pytest.raises(ValueError, match="at least 2"):
        mismatched_partners(["a"])


def test_the_alarm(base, cache):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run, (eye,) = watched(
            base, dict(min_image_share=0.999, min_gain=-1e9, stop_training=True), steps=9
        )
    said = [str(w.message) for w in heard if "image's share" in str(w.message)]
    low = [s for s, t in eye.history.items() if t["image share"] < 0.999]
    assert (
        (len(said) == 1 and "answers from the text" in said[0] and eye.alarmed_at == run.steps)
        if len(low) >= 2 and eye.num_below >= 2
        else not said
    )


def test_the_alarm_waits_and_rings_once(base):
    class FixedMonitor:
        image_shares = iter([0.1, 0.5, 0.1, 0.1, 0.1])

        def measure(self, model):
            return {"image share": next(self.image_shares), "image gain": 0.1, "text gain": 0.9}

    records = shortcut_records(4, 0.9, seed=9)
    eye = explain.DominanceCallback(
        base[1], records, eval_steps=1, min_image_share=0.2, stop_training=True
    )
    eye.monitor = FixedMonitor()
    control = type("C", (), dict(should_training_stop=False))()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in range(1, 6):
            eye.on_step_end(None, type("S", (), dict(global_step=step)), control)
            assert control.should_training_stop == (step >= 4)
    assert len(heard) == 1 and eye.alarmed_at == 4 and "below 20%" in str(heard[0].message)


# --- a clinic
def test_notes_agree_as_often_as_told():
    for agree in (0.0, 0.5, 0.9, 1.0):
        rs = shortcut_records(200, agree, seed=3)
        said = np.mean([r["label"] in r["notes"] for r in rs])
        assert abs(said - agree) < 0.09
    assert (
        all(r["notes"] is None for r in shortcut_records(5))
        and shortcut_records(5, 0.9)[0]["image"] is shortcut_records(5, 0.5)[0]["image"]
    )
    with pytest.raises(ValueError, match="told before"):
        shortcut_records(3, 0.9, "told befor")
    with pytest.raises(ValueError, match=".9 for 90%"):
        shortcut_records(3, 90)


# --- refusals
def test_refusals(all_made):
    m, b, p = all_made["gemma3"]
    bare = {k: v for k, v in b.items() if k != "pixel_values"}
    for f in (
        lambda: swap_images(bare, [1, 0, 3, 2]),
        lambda: explain.ablate_image(bare),
        lambda: explain.mm_shap(m, bare, p),
        lambda: explain.image_divergence(m, bare),
    ):
        with pytest.raises(ValueError, match="no images.*chat.Collator"):
            f()
    with pytest.raises(ValueError, match="2 images for 4 records"):
        swap_images(dict(b, pixel_values=b["pixel_values"][:2]), [1, 0, 3, 2])
    with pytest.raises(ValueError, match="at least 2"):
        explain.perceptual_score(m, select_example(b, 0))
    with pytest.raises(ValueError, match="Did you mean 'blank'"):
        explain.ablate_image(b, "blnk")
    with pytest.raises(ValueError, match="2ⁿ|coalitions"):
        exact_shapley_values(game, 30)
    with pytest.raises(ValueError, match="compares and never speaks"):
        explain.image_divergence(*all_made["clip"][:2])
    with pytest.raises(ValueError, match="compares and never speaks"):
        explain.attribute_answer(all_made["clip"][0], p, dict(image=noise(0)), answer="x")
    with pytest.raises(ValueError, match="N ≥ 2"):
        explain.emap(np.zeros((1, 1)))
    with pytest.raises(ValueError, match="no labels"):
        pair_score(m, {k: v for k, v in b.items() if k != "labels"})
    with pytest.raises(ValueError, match="eval_steps=0"):
        explain.DominanceCallback(p, [], eval_steps=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        explain.DominanceCallback(p, [], min_image_share=20)
    with pytest.raises(ValueError, match="at least 2"):
        ModalityMonitor(p, shortcut_records(1, 0.9))
    with pytest.raises(ValueError, match="not a vision-language model|no vision"):
        pair_score(torch.nn.Linear(2, 2), b)
    q, bq, pq = all_made["qwen2_vl"]
    uneven = dict(bq, image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4], [1, 2, 8], [1, 4, 4]]))
    with pytest.raises(ValueError, match="bring them to one size"):
        swap_images(uneven, [1, 2, 3, 0])


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl", "blip2", "mllama"])
def test_attention_mass_is_what_the_words_leave_over(family):
    """Against every other token of the row; Llama's cross-attention has only the picture, less its
    class token.
    """
    from test_models import picture_inputs

    m, b = (
        models.tiny_random_model(family),
        picture_inputs(family, torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))),
    )
    at = [b["input_ids"].shape[1] - 2]
    got, left = image_attention_share(m, b, at), []

    def see(name, w):
        if "qformer" in name:
            return
        A = w(torch.tensor(at))[0]  # (heads, 1, keys)
        if family == "mllama":
            left.extend([1 - A[..., 0].mean()] if "cross_attn" in name else [])
        else:
            left.append(1 - A[..., (b["input_ids"][0] != 3).nonzero().flatten()].sum(-1).mean())

    with torch.no_grad(), explain.record_attention(m, see):
        m(**b)
    assert len(got) == len(left) and (got <= torch.stack(left) + 1e-5).all() and (got > 0).all()
    if family != "blip2":
        torch.testing.assert_close(
            got, torch.stack(left), atol=0.02 if family == "mllama" else 1e-5, rtol=0
        )  # BLIP-2's queries look at a class token as well
    with pytest.raises(ValueError, match="only compares"):
        image_attention_share(
            models.tiny_random_model("clip"), picture_inputs("clip", torch.randn(3, 32, 32)), at
        )


def test_a_contribution_below_zero_is_a_bar_to_the_left_and_said():
    def measured(image, note):
        return Contributions(np.array([image] * 4), np.array([note] * 4), 0.5, np.arange(4))

    pairs = dict(gains=(0.5, 0.3), costs=(0.4, -0.2), image_costs=(-0.1, 0.6), both=(-0.3, -0.1))
    ax = plot_contributions({name: measured(*gains) for name, gains in pairs.items()})
    bars = list(ax.patches)
    assert len(bars) == 8
    for bar, value in zip(bars, [value for gains in pairs.values() for value in gains]):
        assert bar.get_width() == pytest.approx(value)
        assert bool(bar.get_hatch()) == (value < 0)  # seen without colour, too
    starts = [bar.get_x() for bar in bars]
    assert starts == pytest.approx([0, 0.5, 0, 0, 0, 0, 0, -0.3])  # stacked on either side of 0
    assert ax.get_xlim()[0] < -0.4
    said = [text.get_text() for text in ax.texts]
    assert "image's share: 62%" in said
    assert "image's share: 100%; the note costs 20%" in said
    assert "image's share: 0%; the image costs 10%" in said
    assert "neither brings any; the image costs 30%; the note costs 10%" in said
    ax.figure.canvas.draw()
    assert "−40%" in [label.get_text() for label in ax.get_xticklabels()]
    plt.close(ax.figure)
