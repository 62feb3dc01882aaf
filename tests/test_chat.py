"The answer, and only the answer, carries loss; what would train silently wrong is refused."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers import AutoProcessor
from mmkit import chat
from mmkit.chat import Collator, PROMPT, check, encode, messages, pad, pixels, roles, spans, tokenize
from mmkit.core import assets

CAPTION = "This lesion shows asymmetry in two axes, an irregular border and four colours, on light skin. Clinical impression: melanoma."

@pytest.fixture(scope='module')
def processor(): return AutoProcessor.from_pretrained(assets()/'base')

def picture(seed=0, size=(96, 96)): return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
def record(k, **kw): return dict(image=picture(k), caption=f'{CAPTION[:-1]} {k}.', notes=f'Age {50 + k}, back.') | kw
def said(processor, labels): return processor.tokenizer.decode([int(l) for l in labels if l != -100])
def template(processor, prompt, answer):
    text = processor.apply_chat_template(messages(prompt, answer))
    return processor.tokenizer(text.replace('<start_of_image>', processor.full_image_sequence), add_special_tokens=False).input_ids

# --- the label mask, token by token
NASTY_PROMPTS = [PROMPT, CAPTION, 'melanoma', 'Is it melanoma or benign? Answer melanoma or benign.', f'Repeat: {CAPTION}', 'model\n', 'user',
                 '\n\n', 'one\ntwo', 'ünï©ødé 漢字 🙂', ' blanks ']
@pytest.mark.parametrize('prompt', NASTY_PROMPTS)
@pytest.mark.parametrize('answer', [CAPTION, 'melanoma', 'Yes.', 'model', 'two\nlines', '漢字 🙂', ' padded '])
def test_only_the_answer_carries_loss(processor, prompt, answer):
    row = tokenize(processor, [prompt], [answer])[0]
    ids, labels = row['input_ids'], row['labels']
    assert ids == template(processor, prompt, answer)
    assert said(processor, labels) == answer.strip() + '<end_of_turn>'
    on = [l != -100 for l in labels]
    lo, hi = on.index(True), len(on) - on[::-1].index(True)
    assert all(on[lo:hi]) and labels[lo:hi] == ids[lo:hi]                  # one stretch, unshifted
    before = processor.tokenizer.decode(ids[:lo])
    assert before.endswith('<start_of_turn>model\n') and processor.tokenizer.decode(ids[hi:]) == '\n'

@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=30), answer=st.text(min_size=1, max_size=30))
def test_any_text_is_masked_or_refused(prompt, answer):
    processor = any_text.processor
    if not answer.strip() or '\x11' in prompt + answer or '\x12' in prompt + answer: return
    try: row = tokenize(processor, [prompt], [answer])[0]
    except ValueError as e: assert 'control token' in str(e); return
    assert said(processor, row['labels']) == answer.strip() + '<end_of_turn>'
class any_text: processor = AutoProcessor.from_pretrained(assets()/'base')

def test_no_answer_no_loss(processor):
    row = tokenize(processor, [PROMPT])[0]
    assert set(row['labels']) == {-100} and processor.tokenizer.decode(row['input_ids']).endswith('<start_of_turn>model\n')
    assert tokenize(processor, []) == []

@pytest.mark.parametrize('token', ['<start_of_image>', '<end_of_image>', '<image_soft_token>', '<start_of_turn>', '<end_of_turn>', '<bos>', '<eos>', '<pad>', '<unk>'])
def test_control_tokens_in_data_are_refused(processor, token):
    for f in (lambda: tokenize(processor, [f'a {token} b'], ['x']), lambda: tokenize(processor, ['x'], [f'a{token}']),
              lambda: Collator(processor, notes=True)([record(0, notes=token)])):
        with pytest.raises(ValueError, match='control token.*(Remove|set the record aside)') as e: f()
        assert token in str(e.value)

def test_bad_text_is_refused(processor):
    with pytest.raises(ValueError, match='number 1 is empty'): tokenize(processor, ['a', 'b'], ['x', ' \n'])
    with pytest.raises(ValueError, match='max_length=50'): tokenize(processor, [PROMPT], [CAPTION], max_length=50)
    with pytest.raises(ValueError, match='2 prompts but 1 answers'): tokenize(processor, ['a', 'b'], ['x'])
    with pytest.raises(ValueError, match='empty'): Collator(processor)([dict(image=picture(), caption=None)])

# --- encode and collate
def test_encode_is_the_processors_own(processor):
    turn = [dict(role='user', content=[dict(type='image', image=picture()), dict(type='text', text=PROMPT)])]
    want = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
    got = encode(processor, picture())
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in got)
    assert (got['input_ids'] == processor.tokenizer.image_token_id).sum() == 36

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'CMYK', 'P', 'I;16'])
def test_pixels_take_any_picture(processor, mode):
    im = Image.fromarray(np.full((30, 50), 300, np.uint16)) if mode == 'I;16' else picture(size=(50, 30)).convert(mode)
    assert pixels(processor, [im]).shape == (1, 3, 96, 96)
    assert torch.equal(pixels(processor, [np.asarray(picture())]), pixels(processor, [picture()]))

def test_collator_pads_and_keeps_each_row(processor):
    records = [record(0), record(1, caption='Yes.'), record(2, prompt='Is it melanoma?', answer='No.')]
    batch = check(Collator(processor, captions=True)(records), processor)
    for k, (p, a) in enumerate([(PROMPT, records[0]['caption']), (PROMPT, 'Yes.'), ('Is it melanoma?', 'No.')]):
        one = encode(processor, records[k]['image'], p, a); T = one['input_ids'].shape[1]
        for key in ('input_ids', 'labels', 'attention_mask', 'token_type_ids'): assert torch.equal(batch[key][k, :T], one[key][0])
        assert (batch['labels'][k, T:] == -100).all() and not batch['attention_mask'][k, T:].any() and not batch['token_type_ids'][k, T:].any()
        assert torch.equal(batch['pixel_values'][k], one['pixel_values'][0])
    assert batch['text_ids'].shape == batch['text_mask'].shape and (batch['text_ids'][:, 0] == processor.tokenizer.bos_token_id).all()

def test_identical_captions_share_an_id_in_every_batch(processor):
    make = Collator(processor, captions=True)
    a, b = make([record(0), record(1), record(0)])['caption_id'], make([record(1)])['caption_id']
    assert a[0] == a[2] != a[1] and a[1] == b[0]

def test_notes_come_before_the_prompt_only_when_asked(processor):
    texts = [processor.tokenizer.decode(Collator(processor, notes=n)([record(1)])['input_ids'][0]) for n in (False, True)]
    assert 'Age 51, back.' not in texts[0] and 'Age 51, back. Describe this lesion.' in texts[1]
    assert Collator(processor, notes=True).ask(dict(notes=None)) == PROMPT

def test_generation_batches_end_where_the_model_speaks(processor):
    batch = Collator(processor, answers=False, notes=True)([record(0, notes='Age 5.'), record(1, notes='A much longer note.')])
    assert 'labels' not in batch and not batch['attention_mask'][0, 0] and batch['attention_mask'][:, -1].all()
    assert all(processor.tokenizer.decode(r).endswith('<start_of_turn>model\n') for r in batch['input_ids'])
    check(batch, processor)

def test_cached_features_and_rows_open_no_picture(processor):
    make = Collator(processor)
    rows = [dict(r, features=np.ones((36, 128), np.float32)) for r in make.rows([record(0), record(1)])]
    batch = make(rows)                                                     # no 'image', no 'caption' in there
    assert 'pixel_values' not in batch and batch['features'].shape == (2, 36, 128)
    assert torch.equal(batch['labels'], make([record(0), record(1)])['labels'])
    check(batch, processor)

# --- spans
def test_spans_cover_the_row(processor):
    row = encode(processor, picture(), 'Is it melanoma?', 'melanoma')
    got = spans(processor, row['input_ids'][0], row['labels'][0])
    assert [s.role for s in got] == ['template', 'image', 'template', 'prompt', 'template', 'answer', 'template']
    assert [s.start for s in got[1:]] == [s.stop for s in got[:-1]] and got[-1].stop == row['input_ids'].shape[1]
    assert [s.graded for s in got] == [0, 0, 0, 0, 0, got[5].stop - got[5].start, 0]
    assert got[1].stop - got[1].start == 36 and got[3].text == 'Is it melanoma?' and got[5].text == 'melanoma<end_of_turn>'

# --- check
def good(processor, n=3): return Collator(processor)([record(k) for k in range(n)])
def swap(batch, **kw): return {**batch, **kw}
def edit(t, f): t = t.clone(); f(t); return t

def by_hand(processor, text):
    ids = processor.tokenizer(text.replace('<start_of_image>', processor.full_image_sequence), add_special_tokens=False).input_ids
    row = dict(input_ids=ids, labels=[i if r == 'answer' else -100 for i, r in zip(ids, roles(processor, ids))])
    return dict(pad(processor, [row]), pixel_values=pixels(processor, [picture()]))

def test_check_passes_what_is_right(processor):
    b = good(processor); assert check(b, processor) is b
    check(encode(processor, None, 'Hello', 'Yes.'), processor); check(encode(processor, picture()), processor)

@pytest.mark.parametrize('words, fault', [
    ('3 × 36 = 108 image tokens.*107.*row 1 has 35', lambda b: swap(b, input_ids=edit(b['input_ids'], lambda t: t[1, 7].fill_(99)))),
    ('2 pictures need', lambda b: swap(b, pixel_values=b['pixel_values'][:2])),
    ('no pixel_values', lambda b: {k: v for k, v in b.items() if k != 'pixel_values'}),
    ('token_type_ids are missing', lambda b: {k: v for k, v in b.items() if k != 'token_type_ids'}),
    ('token_type_ids mark', lambda b: swap(b, token_type_ids=b['token_type_ids'].roll(1, 1))),
    ('image tokens carry loss', lambda b: swap(b, labels=b['input_ids'].clone())),
    ('rows .0, 1, 2. have no token with loss', lambda b: swap(b, labels=torch.full_like(b['labels'], -100))),
    ('rows .1. have no token with loss', lambda b: swap(b, labels=edit(b['labels'], lambda t: t[1].fill_(-100)))),
    ('shifted by one', lambda b: swap(b, labels=b['labels'].roll(-1, 1))),
    ('1 labels differ', lambda b: swap(b, labels=edit(b['labels'], lambda t: t[0, int((t[0] != -100).nonzero()[2])].fill_(99)))),
    ('give one label for each token', lambda b: swap(b, labels=b['labels'][:, 1:])),
    ('begin-of-text twice', lambda b: {k: torch.cat([v[:, :1], v], 1) if v.ndim == 2 else v for k, v in b.items()}),
])
def test_check_refuses(processor, words, fault):
    bad = fault(good(processor))
    with pytest.raises(ValueError, match=words): check(bad, processor)

def test_check_needs_the_template_for_what_the_ids_do_not_say(processor):
    b = good(processor)
    at = [r for r in range(b['input_ids'].shape[1]) if roles(processor, b['input_ids'][0])[r] == 'prompt']
    b['labels'][0, at[0]] = b['input_ids'][0, at[0]]
    with pytest.raises(ValueError, match='row 0: prompt tokens carry loss'): check(b, processor)

def test_picture_after_the_text_is_refused(processor):
    q = '<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n{}'
    check(by_hand(processor, q.format('<start_of_image>Is it?', '')), processor)
    with pytest.raises(ValueError, match='after the prompt'): check(by_hand(processor, q.format('Is it?<start_of_image>', '')), processor)
    with pytest.raises(ValueError, match='after the answer begins'): check(by_hand(processor, q.format('Is it?', '<start_of_image>')), processor)

def test_eight_thousand_rows_in_seconds(processor):
    import time
    t = time.process_time(); rows = tokenize(processor, [PROMPT] * 8000, [f'{CAPTION} {k}' for k in range(8000)])
    assert len(rows) == 8000 and time.process_time() - t < 20
