"Reports that cannot flatter: measures that agree with scikit-learn, controls that are where they should be, and what a report does with odd records."
import json, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, balanced_accuracy_score, brier_score_loss, f1_score, recall_score, roc_auc_score
from mmkit import chat, evaluate, models, pairs, report as rp
from mmkit.core import Interval, bootstrap, paired
from mmkit.lesions import LEVELS
from mmkit.tour import loads

PUBLISHED = {'base': (58, 3219, 0, 36), 'tuned': (35, 1438, 23, 1817), 'medical': (12, 307, 46, 2948)}

@pytest.fixture(scope='module')
def ds(cache): return pairs.melanoma_pairs(n=9, seed=21, size=32, masks=False, prevalence=.5)

@pytest.fixture(scope='module')
def base(): return models.load()

@pytest.fixture(scope='module')
def exam(base, ds): return rp.Exam(*base, ds)

@pytest.fixture(scope='module')
def graded(exam): return rp.grade(exam, bar=False, resamples=20, name='base <i>')

def a_task(n=40, seed=0, right=.7, patients=10):
    rng = np.random.default_rng(seed)
    items = [dict(id=str(k), patient=f'p{k % patients}', at=None, asked='?', wanted='x') for k in range(n)]
    marks = {w: dict(right=list((rng.random(n) < p).astype(float))) for w, p in dict(model=right, shuffled=.5, majority=.6).items()}
    return rp.Task('t', '?', items, {w: ['x']*n for w in marks}, marks, {'accuracy': ('mean', ['right'], 1)})

# --- the published counts

def test_the_published_example():
    "One word beats all three; the recall's interval; an AUC of hard labels."
    for tp, fp, fn, tn in PUBLISHED.values():
        assert (tp + fn, tp + fp + fn + tn) == (58, 3313) and evaluate.rates(tp, fp, fn, tn)['accuracy'] < 3255/3313
    i = rp.proportion(35, 58)
    assert (round(i.value, 3), round(i.low, 2), round(i.high, 2)) == (.603, .47, .72)
    exact = rp.proportion(35, 58, method='exact')
    assert exact.low < i.low and exact.high > i.high and binom.sf(34, 58, exact.low) == pytest.approx(.025, abs=1e-6)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(.02, .98), st.floats(.02, .4))
def test_enough_is_where_the_interval_fits(n, rate, within):
    e = rp.enough(n, rate, within)
    assert bool(e) == (e.interval.width <= 2*within + 1e-12) and e.interval.low <= rate + 1e-12 and rate - 1e-12 <= e.interval.high
    assert rp.enough(e.needed, rate, within) and not (e.needed > 2 and rp.enough(e.needed - 1, rate, within))

@pytest.mark.parametrize('call', [lambda: rp.proportion(4, 3), lambda: rp.proportion(-1, 3), lambda: rp.enough(3, 80), lambda: rp.enough(3, .8, 0)])
def test_impossible_counts(call):
    with pytest.raises(ValueError, match='exchanged|between 0 and 1'): call()

# --- statistics

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 60))
def test_statistics_agree_with_scikit_learn(seed, n):
    "Ties, a score of exactly 0 or 1, few items."
    rng = np.random.default_rng(seed); y = np.r_[0., 1., rng.integers(0, 2, n - 2)]; p = np.round(rng.random(n), int(rng.integers(1, 4)))
    S = rp.STATISTICS
    assert S['AUROC'](y, p) == pytest.approx(roc_auc_score(y, p)) and S['AUPRC'](y, p) == pytest.approx(average_precision_score(y, p)) and S['Brier'](y, p) == pytest.approx(brier_score_loss(y, p))
    f, c = calibration_curve(y, p, n_bins=5); b = np.minimum((p*5 + 1e-9).astype(int), 4); n_b = np.bincount(b, minlength=5); edges = np.isclose(p*5 % 1, 0).any()
    if not edges: assert rp.ece(y, p, 5) == pytest.approx((n_b[n_b > 0]/n*np.abs(f - c)).sum())           # a score on an edge may go either way
    assert S['balanced'](y, (p > .5) == y) == pytest.approx(balanced_accuracy_score(y, p > .5))
    best = max(recall_score(y, p > t) for t in np.r_[p, -1] if recall_score(y, p > t, pos_label=0) >= .9 - 1e-9)
    assert S['sensitivity at 90% specificity'](y, p) == pytest.approx(best)
    t, s = rng.integers(0, 3, n).astype(float), rng.integers(0, 4, n).astype(float); s[s == 3] = np.nan; t[:2] = 0, 1
    want = f1_score(t, np.nan_to_num(s, nan=9), labels=sorted(set(t)), average='macro', zero_division=0)
    assert S['macro-F1'](t, s) == pytest.approx(want)

def test_statistics_with_nothing_to_say():
    "One class, nothing known, nan scores: nan, not a number that looks like one."
    for name in ('AUROC', 'AUPRC', 'Brier', 'balanced', 'sensitivity at 90% specificity'):
        assert math.isnan(rp.STATISTICS[name](np.ones(4), np.arange(4.))) and math.isnan(rp.STATISTICS[name](np.array([]), np.array([])))
    assert math.isnan(rp.STATISTICS['mean']([math.nan])) and math.isnan(rp.STATISTICS['ratio']([0.], [0.])) and math.isnan(rp.STATISTICS['macro-F1']([math.nan], [1.])) and math.isnan(rp.ece([], []))
    assert rp.STATISTICS['F1']([1, 0], [2, 1], [2, 2]) == pytest.approx(2/7)

def test_mcnemar_and_holm():
    a, b = [1]*9 + [0]*2 + [1]*5, [0]*9 + [1]*2 + [1]*5
    assert rp.mcnemar(a, b) == (9, 2, pytest.approx(2*binom.cdf(2, 11, .5))) and rp.mcnemar(b, a)[2] == rp.mcnemar(a, b)[2]
    p = rp.holm([.04, .001, .03, .5]); assert np.allclose(p, [.09, .004, .09, .5]) and (rp.holm([.9, .8]) <= 1).all()

# --- a task

def test_an_interval_goes_by_patient():
    t = a_task(); right, who = t.marks['model']['right'], t.patients()
    assert t.interval('accuracy', n=200) == bootstrap(np.mean, right, groups=who, n=200)
    y = np.ones(len(t)); both = paired(lambda y, p: np.mean(np.asarray(p)), y, right, t.marks['majority']['right'], groups=who, n=200)
    assert t.gain('accuracy', 'majority', n=200) == both
    assert t.blind('accuracy') == max(('majority', 'shuffled'), key=lambda w: t.value('accuracy', w))

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(12)))
def test_the_order_of_items_does_not_matter(seed, order):
    t = a_task(12, seed); s = rp.Task(t.name, t.asks, [t.items[i] for i in order], t.said, {w: {c: [v[i] for i in order] for c, v in m.items()} for w, m in t.marks.items()}, t.measures)
    assert s.value('accuracy') == pytest.approx(t.value('accuracy')) and s.blind('accuracy') == t.blind('accuracy')

def test_less_is_better_where_it_is():
    t = a_task(); t.measures = {'error': ('mean', ['right'], -1)}
    assert t.blind('error') == min(('majority', 'shuffled'), key=lambda w: t.value('error', w))
    for undefined, best in (('majority', 'shuffled'), ('shuffled', 'majority')):
        t = a_task(); t.marks[undefined]['right'] = [math.nan]*40; assert t.blind('accuracy') == best, 'nobody is best by being undefined'

def test_the_worst_come_first():
    t = a_task(6); t.marks['model'] = {'right': [1., 0, 0, .5, 0, 1], 'far off': [.1, .6, .9, .2, .7, 0]}
    assert rp.worst(t, 9) == [2, 4, 1, 3] and rp.worst(t, 2) == [2, 4]

# --- the tasks

def test_who_knows_the_truth_is_never_wrong(graded):
    assert set(graded.tasks) == {'caption attributes', 'impression', 'questions', 'retrieval', 'zero-shot', 'grounded', 'extraction', 'probes', 'charts', 'report'} and not graded.left_out
    for t in graded.tasks.values():
        for m, (_, _, sign) in t.measures.items():
            if sign: assert t.value(m, 'oracle') == (1 if sign > 0 else 0), (t.name, m)
        assert np.asarray(t.marks['oracle']['right']).min() == 1 and set(t.said) == set(rp.WHO) and all(len(s) == len(t) for s in t.said.values())
        assert len({i['id'] for i in t.items}) == len(t), t.name

def test_answers_are_those_of_the_model(exam, ds, base, graded):
    "What the quick path says is what `evaluate.generate` says, in all three views; other families' path agrees."
    got = rp.captions(exam)
    for who, view in {'model': 'own', 'text-only': 'blank', 'shuffled': 'shuffled'}.items(): assert got[who] == evaluate.generate(*base, exam.ds, image=view, bar=False), who
    at, asked = [2, 0, 1], ['Are there dots?', 'Where is the lesion?', 'Are there dots?']; views = ['own', 'blank', 'shuffled']
    assert rp._by_transformers(exam, at, asked, views, 12) == rp._quick(exam, at, asked, views, 12)
    s = evaluate.score(exam.ds, got['model'], n=1); t = graded.tasks['caption attributes']
    assert t.value('macro-F1') == pytest.approx(s.macro_f1.value) and {a: t.value(f'macro-F1, {a}') for a in s.attributes} == pytest.approx({a: v.value for a, v in s.attributes.items()})
    i = graded.tasks['impression']; assert i.value('AUROC') == pytest.approx(evaluate.auroc(exam.ds, i.marks['model']['score'], n=1).value)
    assert i.value('balanced accuracy', 'majority') == .5 and i.value('AUROC', 'majority') == .5

def test_a_model_that_says_the_majority_scores_as_the_majority(base, ds, monkeypatch):
    "Whatever the picture: the same words, the same marks."
    top = evaluate.majority(ds, 1)[0]
    monkeypatch.setattr(rp, 'say', lambda exam, at, prompts, most=32: {w: [rp.told(top) if p == pairs.PROMPT else rp.as_json(top, top['impression']) if p == rp.JSON_PROMPT else rp.narrative(top, top['impression']) for p in prompts] for w in rp.VIEWS})
    e = rp.Exam(*base, ds)
    for ask in (rp.attributes, rp.extraction, rp.reports):
        t = ask(e)
        for m in t.measures: assert t.value(m) == pytest.approx(t.value(m, 'majority'), nan_ok=True) == t.value(m, 'shuffled'), (t.name, m)

def test_places_and_fields_are_marked_one_by_one(base, ds, monkeypatch):
    "Who always says the centre is right where the centre is meant; a field that a record does not know is not held against an answer."
    monkeypatch.setattr(rp, 'say', lambda exam, at, prompts, most=32: {w: ['In the centre.' if p.startswith('Where') else 'dots, on light skin' if p == pairs.PROMPT else
        '{"border": "regular", "network": "absent", "streaks": true, "veil": true, "impression": "benign"}' for p in prompts] for w in rp.VIEWS})
    t, boxes = rp.grounded(rp.Exam(*base, ds)), [(b['name'], pairs.place(b['box'])) for r in ds for b in r['boxes'] if b['name'] != 'lesion']
    assert t.value('placed') == pytest.approx(np.mean([p == 'centre' for _, p in boxes])) and 0 < t.value('placed') < 1
    assert t.value('named') == pytest.approx(np.mean([n == 'dots' for n, _ in boxes])) and t.value('named and placed') == pytest.approx(np.mean([n == 'dots' and p == 'centre' for n, p in boxes]))
    known = [dict(id=f'k{k}', image=picture(k), attributes=dict(streaks=v)) for k, v in enumerate(('present', 'absent', 'present'))]
    e = rp.extraction(rp.Exam(*base, known)); assert e.marks['model']['right'] == [1, 0, 1] and e.value('field F1') == pytest.approx(2/3) and e.value('valid JSON') == 1

def test_ranks_count_ties_against_the_model():
    s = evaluate.Similarity(np.array([[.9, .1, .5], [.5, .5, .1], [.2, .3, .1]]), np.eye(3, dtype=bool))
    assert rp.ranks(s).tolist() == [0, 1, 2]
    twins = evaluate.Similarity(np.array([[.1, .9], [.9, .1]]), np.ones((2, 2), bool)); assert rp.ranks(twins).tolist() == [0, 0], 'the same caption is one\'s own'

def test_probes_ask_what_they_say():
    "Popular is what most have; adversarial what goes with what is there; nothing that is unknown."
    no = dict.fromkeys(pairs.SHOWN, 'absent')
    known = [no | dict(dots='present', streaks='present')]*3 + [no | dict(globules='present')]*5
    got = {w: s for _, s, w in rp.absent_ones([no | dict(dots='present')], known)}
    assert got['present'] == 'dots' and got['popular'] == 'globules' and got['adversarial'] == 'streaks' and got['random'] not in ('dots',)
    assert rp.absent_ones([dict(dots='present')], known) == [] and rp.absent_ones([no], known) == []

@pytest.mark.parametrize('text, fields, fits', [('{"streaks": true, "border": "regular"}', {'streaks': True, 'border': 'regular'}, True), ('{"streaks": 1}', {}, False), ('{"border": true}', {}, False), ('{"other": "x", "veil": false}', {'veil': False}, False),
    ('{"veil": NaN}', None, False), ('{"veil": true, "veil": true}', None, False), ('[true]', None, False), ('{"border": ["regular"]}', {}, False), ('Sure: {"veil": true}', None, False), ('['*100_000, None, False), ('', None, False)])
def test_json_is_read_strictly(text, fields, fits): assert rp.read_json(text) == (fields, fits)

@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({a: st.sampled_from([*v, None]) for a, v in LEVELS.items()}), st.sampled_from(['benign', 'melanoma', None]))
def test_forms_read_back(truth, label):
    "JSON and the longer report of any record say what it knows, and nothing false."
    fields, fits = rp.read_json(rp.as_json(truth, label)); assert fits and fields.get('impression') == label and set(fields) <= set(rp.SCHEMA['properties'])
    assert all((fields[k] == truth[k]) if isinstance(fields[k], str) else fields[k] == (truth[k] == 'present') for k in fields if k != 'impression')
    claims = [c for _, cs in rp.by_sentence(rp.narrative(truth, label), truth, label) for c in cs]
    assert all(ok for _, _, ok in claims) and {a for a, _, _ in claims} == {a for a, v in truth.items() if v not in (None, 'absent')} | ({'impression'} if label else set())

def test_charts_say_what_they_show():
    for r in rp.chart_records(6, 3):
        assert rp.read_table(r['answer']) == r['values']
        px = np.asarray(r['image']).reshape(-1, 3); tall = {b: (px == [int(c[i:i + 2], 16) for i in (1, 3, 5)]).all(1).sum() for b, c in rp.BARS.items()}
        unit = min(tall[b]/r['values'][b] for b in tall); assert all(abs(tall[b]/unit - v) < .35 for b, v in r['values'].items()), 'a bar is as high as its value'

def test_the_rule_is_a_second_opinion():
    "With noisy labels the oracle errs as often as the labels do; a record that was not drawn says its own label."
    ds = pairs.melanoma_pairs(n=30, seed=3, size=16, masks=False, label_noise=.4)
    wrong = [rp.rule(r) != r['label'] for r in ds]; assert 3 < sum(wrong) < 25
    assert rp.rule(dict(label='melanoma')) == 'melanoma' and rp.rule(dict(label=None, provenance='{"row": 3}')) is None

# --- records of every kind

def picture(k=0): return Image.new('RGB', (40, 30), (90 + k, 80, 70))
def bare(n=4, **kw): return [dict(id=f'r{k}', image=picture(k), caption=f'lesion {k}', **kw) for k in range(n)]

def test_what_cannot_be_asked_is_left_out_with_its_reason(base, cache):
    r = rp.report(*base, bare(label='benign'), bar=False, resamples=10, tasks=(rp.attributes, rp.impressions, rp.vqa, rp.grounded, rp.probes, rp.extraction, rp.retrieval, rp.zero_shot))
    assert set(r.tasks) == {'retrieval', 'extraction'} and {'attributes', 'impressions', 'vqa', 'grounded', 'probes', 'zero_shot'} == set(r.left_out)
    assert 'all 4 labelled records are benign' in str(r) and 'no record has a question' in str(r)
    with pytest.raises(ValueError, match='nothing can be asked.*no record has a question'): rp.report(*base, bare(), bar=False, tasks=(rp.vqa,))

def test_a_data_set_with_holes(base, cache):
    "As the loaders give it: attributes of some, labels of some, a picture missing, other sources' patient of the same number."
    from datasets import Dataset
    rows = [pairs.record(id=f'r{k}', image=picture(k) if k != 2 else None, caption=f'lesion {k}', label=(None, 'benign', 'melanoma')[k % 3], source='ab'[k % 2], patient='1',
                         attributes=dict(streaks='present', dots='absent') if k % 2 else None, boxes=[dict(name='streaks', box=[.1, .2, .5, .6])] if k == 1 else []) for k in range(7)]
    ds = Dataset.from_list([{**r, 'image': r['image']} for r in rows], features=pairs.FEATURES)
    r = rp.report(*base, ds, bar=False, resamples=10, tasks=(rp.attributes, rp.impressions, rp.vqa, rp.grounded, rp.probes, rp.extraction, rp.reports, rp.retrieval))
    assert r.about['records'] == 6 and r.about['patients'] == 2 and '1 record without a picture' in str(r)
    assert {k: len(t) for k, t in r.tasks.items()} == {'impression': 3, 'grounded': 1, 'probes': 12, 'extraction': 4, 'report': 3, 'retrieval': 6} and set(r.left_out) == {'attributes', 'vqa'}
    assert 'no attribute has two levels' in r.left_out['attributes'] and r.tasks['extraction'].value('field F1', 'oracle') == 1

def test_peaks_of_maps(exam):
    "The oracle points into every box, the middle of the picture into those that hold it."
    t = rp.pointed(exam, 'rollout', 4)
    assert len(t) == 4 and t.value('peak in the box', 'oracle') == 1
    box = [json.loads(i['wanted']) for i in t.items]; assert t.marks['majority']['right'] == [float(b[0] <= .5 <= b[2] and b[1] <= .5 <= b[3]) for b in box]
    for said, b, right in zip(t.said['model'], box, t.marks['model']['right']):
        x, y = (float(v) for v in said.removeprefix('peak at ').split(', ')); near = min(abs(x - b[0]), abs(x - b[2]), abs(y - b[1]), abs(y - b[3])) < .02
        assert near or right == float(b[0] <= x <= b[2] and b[1] <= y <= b[3])

def test_exams_refuse_what_they_cannot_hold(base, cache):
    with pytest.raises(ValueError, match='0 records'): rp.report(*base, [])
    with pytest.raises(ValueError, match="twice, such as 'r1'"): rp.Exam(*base, bare()[:2] + [dict(bare()[1], image=picture(9))])
    with pytest.raises(ValueError, match='1 of 2 records'): rp.Exam(*base, [bare()[0], dict(id='x', image=None)])
    e = rp.Exam(*base, bare() + [dict(id='x', image=None)]); assert len(e) == 4 and e.no_picture == 1
    assert [len(rp.Exam(*base, bare(), n=3, seed=s)) for s in (0, 1)] == [3, 3] and len({tuple(rp.Exam(*base, bare(), n=2, seed=s).ids) for s in range(6)}) > 1

def test_a_model_that_has_diverged_is_named(ds, cache):
    model, processor = models.load()
    with torch.no_grad(): model.lm_head.weight.fill_(math.nan)
    with pytest.raises(rp.LeftOut, match='nan; has the model diverged'): rp.impressions(rp.Exam(model, processor, ds))

@pytest.mark.parametrize('family', ['llava', 'qwen2_vl', 'mllama'])
def test_other_families_are_asked_what_they_can_answer(family, ds, cache):
    model, processor = models.tiny(family, vocab=1024).eval(), chat.tiny_processor(family)
    r = rp.report(model, processor, ds, n=2, bar=False, resamples=5, tasks=(rp.attributes, rp.probes, rp.impressions, rp.retrieval))
    assert set(r.tasks) == {'caption attributes', 'probes'} and 'not ' + model.config.model_type in str(r)

# --- the report

def test_the_page_needs_nothing_and_believes_nobody(graded, tmp_path, ds):
    "Self-contained, and hostile text is shown as text."
    t = graded.tasks['questions']; evil = '<script>alert(1)</script><img src=x onerror=alert(1)>'
    was = t.said['model'][0], t.items[0]['asked'], t.marks['model']['right'][0]
    t.said['model'][0], t.items[0]['asked'], t.marks['model']['right'][0] = evil, evil, -1.
    html = graded.page(tmp_path/'deep'/'r.html', n=2).read_text(encoding='utf-8')
    t.said['model'][0], t.items[0]['asked'], t.marks['model']['right'][0] = was; graded.done.clear()
    assert not loads(html) and '<script' not in html and '<img src=x' not in html and html.count('&lt;script') >= 2 and 'base &lt;i&gt;' in html and '<i>' not in html.split('</h1>')[0]
    assert "default-src 'none'" in html and html.count('data:image/jpeg') >= 10

def test_a_report_comes_back_from_its_file(graded, tmp_path):
    back = rp.load(graded.save(tmp_path/'r.json'))
    assert str(back.table(full=True)) == str(graded.table(full=True)) and back.about == graded.about and back.remarks() == graded.remarks()
    told = json.loads((tmp_path/'r.json').read_text(encoding='utf-8')); assert {'rows', 'tasks', 'left_out'} <= set(told) and 'NaN' not in (tmp_path/'r.json').read_text()
    assert all(f in told['rows'][0] for f in ('task', 'measure', 'model', 'majority', 'text-only', 'shuffled', 'oracle', 'beyond'))
    with pytest.raises(ValueError, match='no pictures'): back.page(tmp_path/'x.html')
    for text, why in (('{"made_by": ', 'no JSON'), ('[]', 'not a report'), ('{"made_by": "mmkit report", "tasks": {"a": {}}}', 'missing')):
        (tmp_path/'bad.json').write_text(text)
        with pytest.raises(ValueError, match=why): rp.load(tmp_path/'bad.json')

def test_only_the_same_items_are_compared(graded, base, ds, tmp_path):
    same = rp.compare(graded, rp.load(graded.save(tmp_path/'r.json')))
    assert all(r[5].startswith(('0.00 [0.00, 0.00]', '–')) for r in same.rows) and all(r[7] in ('', '1') for r in same.rows) and '(a)' in str(same)
    other = rp.grade(rp.Exam(*base, ds, n=4), tasks=(rp.probes,), bar=False, resamples=5)
    with pytest.raises(ValueError, match='not the same items'): rp.compare(graded, other)
    with pytest.raises(ValueError, match='no task is in both'): rp.compare(rp.Report({'charts': graded.tasks['charts']}, {}, 'x', graded.about), other)

def test_a_better_model_is_told_apart():
    a, b = (rp.Report({'t': t}, {}, n, dict(records=200, patients=50, seed=0, resamples=200)) for n, t in (('a', a_task(200, 1, .5, 50)), ('b', a_task(200, 2, .9, 50))))
    row, = rp.compare(a, b).rows; t = b.tasks['t'].gain('accuracy', a.tasks['t'], n=200)
    assert t.low > 0 and row[5] == str(t) and float(row[7]) < .001

def test_progress_and_table(graded, capsys):
    assert 'over the best blind' in str(graded) and '9 records of 3 patients' in str(graded) and '&lt;i&gt;' in graded._repr_html_() and '<i>' not in graded._repr_html_()
    leads = graded.table().rows; assert len(leads) == sum(min(2, len(t.measures)) for t in graded.tasks.values()) and len(graded.table(full=True)) > len(leads)
