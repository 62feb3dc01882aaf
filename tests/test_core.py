"Intervals that hold what they promise; small tools that say what is wrong."
import warnings
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.metrics import recall_score, roc_auc_score
from mmkit import core
from mmkit.core import Interval, bootstrap, paired, progress, table

flips = st.lists(st.integers(0, 1), min_size=1, max_size=60)

@pytest.mark.parametrize('stat', [np.mean, np.median, np.std])
def test_parity_with_scipy(stat):
    x = np.random.default_rng(0).lognormal(size=80)
    theirs = stats.bootstrap((x,), stat, n_resamples=5000, method='percentile', rng=0).confidence_interval
    ours = bootstrap(stat, x, n=5000)
    assert ours.value == pytest.approx(stat(x))
    assert ours[1:] == pytest.approx(tuple(theirs), rel=.04)

@pytest.mark.parametrize('level', [.5, .8, .99])
def test_level_is_kept(level):
    x = np.random.default_rng(1).normal(size=200)
    half = stats.norm.ppf((1+level)/2)*x.std()/len(x)**.5
    assert bootstrap(np.mean, x, n=3000, level=level).width == pytest.approx(2*half, rel=.08)

def test_patients_widen_the_interval_when_they_differ():
    rng = np.random.default_rng(2)
    patient = np.repeat(np.arange(50), 8)
    hit = (rng.random(400) < rng.beta(.7, .3, 50)[patient]).astype(int)
    assert bootstrap(np.mean, hit, groups=patient).width > 1.6*bootstrap(np.mean, hit).width

def test_groups_hold_the_truth_as_often_as_promised_and_lesions_do_not():
    rng, held = np.random.default_rng(3), {'patient': 0, 'lesion': 0}
    patient = np.repeat(np.arange(60), 6)
    for _ in range(150):
        hit = (rng.random(360) < rng.beta(1.4, .6, 60)[patient]).astype(int)
        held['patient'] += bootstrap(np.mean, hit, groups=patient, n=200).covers(.7)
        held['lesion'] += bootstrap(np.mean, hit, n=200).covers(.7)
    assert held['patient'] >= .88*150 and held['lesion'] < .85*150, held

def test_missing_patients_stand_alone():
    x = np.random.default_rng(4).random(40)
    for missing in (None, float('nan'), '', np.nan):
        alone = bootstrap(np.mean, x, groups=[missing]*40, n=300)
        assert alone.width == pytest.approx(bootstrap(np.mean, x, n=300).width, rel=.2)
    assert np.isnan(bootstrap(np.mean, x, groups=['p1']*40).low)

@given(flips)
@settings(max_examples=60, deadline=None)
def test_interval_holds_the_value_and_stays_in_range(x):
    i = bootstrap(np.mean, x, n=60)
    assert i.value == pytest.approx(np.mean(x))
    if len(x) > 1: assert 0 <= i.low <= i.high <= 1
    if len(set(x)) == 1 and len(x) > 1: assert i.low == i.high == x[0]

@given(flips, st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_same_seed_same_interval_whatever_the_container(x, seed):
    import torch
    a, b, c = (bootstrap(np.mean, f(x), n=20, seed=seed) for f in (list, np.array, torch.tensor))
    assert str(a) == str(b) == str(c)

@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
@settings(max_examples=40, deadline=None)
def test_paired_is_antisymmetric(rows):
    y, a, b = np.array(rows).T
    acc = lambda y, p: (y == p).mean()
    ab, ba = paired(acc, y, a, b, n=50), paired(acc, y, b, a, n=50)
    assert ab == pytest.approx((-ba.value, -ba.high, -ba.low), abs=1e-12)
    assert paired(acc, y, a, a, n=20) == (0, 0, 0)

def test_paired_is_sharper_than_two_intervals():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 300); a = np.where(rng.random(300) < .3, 1-y, y); b = np.where((a != y) & (rng.random(300) < .2), y, a)
    acc = lambda y, p: (y == p).mean()
    assert paired(acc, y, b, a).low > 0 and bootstrap(acc, y, a).high > bootstrap(acc, y, b).low

def test_undefined_resamples_are_left_out_silently():
    y, p = np.array([1] + [0]*30), np.linspace(1, 0, 31)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        i = bootstrap(roc_auc_score, y, p, n=200)   # a third of the resamples has no positive at all
    assert i.low <= i.value <= i.high
    rare = bootstrap(lambda y: 1. if y.sum() == 3 else float('nan'), np.array([1, 1, 1]+[0]*300), n=100)
    assert rare.value == 1 and np.isnan(rare.low)

@pytest.mark.parametrize('kw,says', [({'level': 95}, '0.95'), ({'level': 0}, 'share'), ({'n': 0}, 'at least once'),
                                     ({'groups': [1, 2]}, 'one entry per item')])
def test_errors_name_the_value_and_the_mend(kw, says):
    with pytest.raises(ValueError, match=says): bootstrap(np.mean, [1, 0, 1], **kw)

def test_empty_is_an_error():
    with pytest.raises(ValueError, match='at least one item'): bootstrap(np.mean, [])

def test_interval_prints_as_people_write_it():
    i = Interval(.7149, .66, .751)
    assert str(i) == repr(i) == '0.71 [0.66, 0.75]' and f'{i:.3f}' == '0.715 [0.660, 0.751]'
    assert i.covers(.7) and not i.covers(.8) and i.width == pytest.approx(.091)

def test_table_escapes_and_aligns():
    t = table([{'a': '<b>"x"</b>', 'n': None}, {'a': 2/3, 'n': Interval(1, 0, 2)}])
    assert '<b>' not in t._repr_html_() and '&lt;b&gt;&quot;x' in t._repr_html_()
    assert str(t).splitlines()[0].split() == ['a', 'n'] and '0.667' in str(t) and '–' in str(t) and len(t) == 2
    assert str(table([])) == '(no rows)' and str(table([[1, 2]])) == '1  2'
    with pytest.raises(ValueError, match='one cell per column'): table([[1, 2], [3]])

@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=5))
def test_table_takes_any_text(rows):
    html = table(rows, ['a', 'b'])._repr_html_()
    assert html.count('<td') == 2*len(rows) and html.count('<tr>') == len(rows) + 1

def test_seed_everything_seeds_all_three():
    import random, torch
    def draw(): return core.seed_everything(9).random(), random.random(), np.random.rand(), torch.rand(1).item()
    assert draw() == draw()

def test_device_can_be_overruled(monkeypatch):
    monkeypatch.setenv('MMKIT_DEVICE', 'cpu')
    assert core.device() == 'cpu' and core.n_cores() >= 1

def test_palette_by_name_number_and_place():
    p = core.PALETTE
    assert p.blue == p['blue'] == p[0] and len(set(p)) == len(p) and all(c.startswith('#') for c in p)

def test_progress_and_turn_without_a_notebook(capsys):
    assert list(progress(range(3), desc='counting')) == [0, 1, 2]
    seen = []
    core.turn(lambda a, b: seen.append((a, b)), a=(0, 10, 1, 4), b=['x', 'y'])
    assert seen == [(4, 'x')] and not core.live()
