"What is in a model, what trains, and that nothing else moves; adapters included."
import copy, logging, warnings
import numpy as np, pytest, torch
from PIL import Image
from mmkit import models
from mmkit.chat import Collator, encode
from mmkit.models import embed_image, embed_text, image_features, load, own, param_groups, part_of, parts, plot_trains, pool, project, train_only, what_trains

logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
PARTS = ('vision', 'projector', 'text')
def picture(k): return Image.fromarray(np.random.default_rng(k).integers(0, 255, (96, 96, 3), dtype=np.uint8))

@pytest.fixture(scope='module')
def loaded(): return load()
@pytest.fixture
def model(loaded): return copy.deepcopy(loaded[0]).requires_grad_(True)
@pytest.fixture(scope='module')
def batch(loaded): return Collator(loaded[1], captions=True)([dict(image=picture(k), caption='A lesion.' + ' It is dark.'*k) for k in range(3)])
@pytest.fixture
def wrapped(model):
    from peft import LoraConfig, get_peft_model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); return get_peft_model(model, LoraConfig(r=4, target_modules=r'.*language_model.*\.(q_proj|v_proj)'))
def step_inputs(batch): return {k: v for k, v in batch.items() if k not in ('text_ids', 'text_mask', 'caption_id')}
def on(model): return {part_of(n) for n, p in model.named_parameters() if p.requires_grad}

# --- the shipped base
def test_base_is_an_ordinary_folder_without_our_code(loaded):
    import json
    assert type(loaded[0]).__name__ == 'Gemma3ForConditionalGeneration' and type(loaded[1]).__name__ == 'Gemma3Processor'
    assert not loaded[0].training and 'auto_map' not in json.loads((models.BASE/'config.json').read_text())
    assert sum(f.stat().st_size for f in models.BASE.rglob('*') if f.is_file()) <= 12e6
    text, vision = loaded[0].config.text_config, loaded[0].config.vision_config
    assert set(text.layer_types) == {'full_attention'} and text.max_position_embeddings >= 1024
    assert all(w % 64 == 0 for w in (text.hidden_size, text.intermediate_size, vision.hidden_size, vision.intermediate_size, text.vocab_size))

def test_loads_with_plain_transformers_and_no_torchvision():
    import subprocess, sys
    code = (f"import sys, warnings; warnings.simplefilter('error'); sys.modules['torchvision'] = None\nfrom transformers import AutoModelForImageTextToText as M, AutoProcessor as P\n"
            f"m = M.from_pretrained({str(models.BASE)!r}); p = P.from_pretrained({str(models.BASE)!r})\nassert not [k for k in sys.modules if k.startswith('mmkit')]\nprint(type(p.image_processor).__name__)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
    assert out.returncode == 0 and 'Pil' in out.stdout, out.stderr[-500:]
    assert 'arning' not in out.stderr.replace('Loading weights', '')

def test_a_swapped_picture_moves_the_logits(model, batch):
    b = step_inputs(batch); other = {**b, 'pixel_values': b['pixel_values'].roll(1, 0)}
    with torch.no_grad():
        moved = (model(**b).logits - model(**other).logits).abs().amax()
        model.model.multi_modal_projector.mm_input_projection_weight.zero_()
        blind = (model(**b).logits - model(**other).logits).abs().amax()
    assert moved > 1e-2 and blind == 0

def test_picture_tokens_see_one_another_and_words_only_look_back(loaded):
    model, processor = copy.deepcopy(loaded[0]), loaded[1]; model.set_attn_implementation('eager')
    b = encode(processor, picture(0)); seat = b['input_ids'][0] == model.config.image_token_id
    with torch.no_grad(): A = model(**b, output_attentions=True).attentions
    for layer in A:
        a = layer[0].mean(0)
        assert (a[seat][:, seat].triu(1) > 0).sum() == 36*35//2 and a[~seat][:, ~seat].triu(1).sum() == 0

def test_generates_from_template_and_stops(loaded):
    model, processor = loaded; b = Collator(processor, answers=False)([dict(image=picture(0)), dict(image=picture(1), prompt='What is in the picture, and where?')])
    out = model.generate(**b, max_new_tokens=6)
    assert out.shape[1] <= b['input_ids'].shape[1] + 6
    assert processor.tokenizer.convert_tokens_to_ids('<end_of_turn>') in model.generation_config.eos_token_id

# --- loading
def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder'): load(tmp_path/'gone')
    with pytest.raises(FileNotFoundError, match='no config.json'): load(tmp_path)

def test_load_takes_a_folder_and_keywords(loaded, tmp_path):
    for x in loaded: x.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)[0].lm_head.weight, loaded[0].lm_head.weight)
    assert load(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16

# --- parts
def test_parts_cover_everything_once(loaded):
    found = parts(loaded[0]); names = [n for n, _ in loaded[0].named_parameters()]
    assert set(found) == set(PARTS) and sorted(sum(found.values(), [])) == sorted(names) and all(found.values())
    assert all('vision_tower' in n for n in found['vision']) and all('projector' in n for n in found['projector'])

@pytest.mark.parametrize('name, part', [
    ('model.visual.merger.mlp.0.weight', 'projector'), ('model.visual.blocks.0.attn.qkv.weight', 'vision'),
    ('model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight', 'vision'), ('model.multi_modal_projector.linear_1.weight', 'projector'),
    ('model.language_model.layers.3.cross_attn.q_proj.weight', 'projector'), ('model.language_model.layers.3.self_attn.q_proj.weight', 'text'),
    ('qformer.encoder.layer.0.attention.x', 'projector'), ('language_projection.weight', 'projector'), ('lm_head.weight', 'text'),
    ('base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.default.weight', 'text'), ('something.else', ''), ('my_vision_tower_x.weight', '')])
def test_part_of(name, part): assert part_of(name) == part

def test_unknown_parameters_are_an_error(model):
    model.mystery = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'mystery.weight'.*SEGMENTS"): parts(model)

def test_real_classes_of_other_families():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**tiny, image_size=16, patch_size=8), text_config=LlamaConfig(**tiny, vocab_size=32), image_token_index=3))
    assert {k: bool(v) for k, v in parts(llava).items()} == dict.fromkeys(PARTS, True)
    assert all(n.split('.')[1] == 'multi_modal_projector' for n in parts(llava)['projector'])

# --- what trains
@pytest.mark.parametrize('names', [(), ('projector',), ('text',), ('vision', 'projector'), PARTS])
def test_train_only(model, names):
    model.lm_head.weight.requires_grad_(False)                    # tied, so an embedding that was frozen before
    before = [p.requires_grad for p in model.parameters()]
    with train_only(model, *names): assert on(model) == set(names)
    assert [p.requires_grad for p in model.parameters()] == before

def test_train_only_restores_after_an_error_and_nested(model):
    with pytest.raises(ZeroDivisionError):
        with train_only(model, 'text'):
            with train_only(model, 'vision'): assert on(model) == {'vision'}
            assert on(model) == {'text'}; 1/0
    assert on(model) == set(PARTS)
    train_only(model, 'projector'); assert on(model) == {'projector'}          # as a function it stays

@pytest.mark.parametrize('names', [('projector',), ('text',), ('vision',), ('vision', 'projector')])
def test_nothing_else_moves(model, batch, names):
    before = copy.deepcopy(model.state_dict())
    opt = torch.optim.AdamW(param_groups(model, dict.fromkeys(names, 1e-2)), weight_decay=.1)
    model(**step_inputs(batch)).loss.backward(); opt.step()
    assert {part_of(n) for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == set(names)

def test_wrong_names_name_the_right_one(model):
    for call in (lambda: train_only(model, 'projecter'), lambda: param_groups(model, {'projecter': 1e-3}), lambda: own(model, 'projecter')):
        with pytest.raises(ValueError, match="'projecter'.*Did you mean 'projector'"): call()
    assert on(model) == set(PARTS)                                              # a refused call changes nothing

@pytest.mark.parametrize('lr', [{}, dict(text=0), dict(text=-1e-3), dict(text=float('nan')), dict(text=float('inf')), 0])
def test_senseless_rates_are_refused(model, lr):
    with pytest.raises(ValueError, match='nothing would train|give 0|learning rate'): param_groups(model, lr)

def test_param_groups(model):
    groups = param_groups(model, dict(vision=1e-5, projector=1e-3, text=0))
    assert [(g['name'], g['lr']) for g in groups] == [('vision', 1e-5), ('projector', 1e-3)] and on(model) == {'vision', 'projector'}
    every = param_groups(model, 1e-4)
    assert sum(p.numel() for g in every for p in g['params']) == sum(p.numel() for p in model.parameters()) and {g['lr'] for g in every} == {1e-4}

def test_what_trains_counts(model):
    train_only(model, 'projector')
    rows = {r[0]: dict(zip(what_trains(model).columns, r)) for r in what_trains(model).rows}
    d, w = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    assert rows['projector']['parameters'] == rows['all']['trains'] == d*w + d
    assert rows['all']['weight_bytes'] == 4*sum(p.numel() for p in model.parameters()) and rows['all']['training_bytes'] == 12*(d*w + d)
    assert abs(sum(rows[p]['share'] for p in PARTS) - 1) < 1e-9 and rows['text']['of_part'] == 0
    import matplotlib.pyplot as plt
    assert len(plot_trains(model).patches) == 6; plt.close('all')

# --- adapters
def test_text_of_a_peft_model_means_its_adapters(wrapped, batch):
    assert sorted(map(len, parts(wrapped).values())) and sum(map(len, parts(wrapped).values())) == len(list(wrapped.named_parameters()))
    groups = param_groups(wrapped, dict(text=1e-2, projector=1e-3))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert all('lora_' in n or 'projector' in n for n in trained) and len(trained) == 4*2*2 + 2
    before = copy.deepcopy(wrapped.state_dict()); opt = torch.optim.AdamW(groups)
    wrapped(**step_inputs(batch)).loss.backward(); opt.step()
    assert all('lora_' in n or 'projector' in n for n, v in wrapped.state_dict().items() if not torch.equal(v, before[n]))

def test_a_part_kept_whole_by_peft(model):
    from peft import LoraConfig, get_peft_model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = get_peft_model(model, LoraConfig(r=2, target_modules=r'.*language_model.*q_proj', modules_to_save=['multi_modal_projector']))
    train_only(m, 'projector')
    assert all('modules_to_save' in n for n, p in m.named_parameters() if p.requires_grad) and on(m) == {'projector'}

# --- inside
def test_features_pool_and_project(loaded, wrapped, batch):
    model, px = loaded[0], batch['pixel_values']
    with torch.no_grad():
        tower, tokens = model.get_image_features(px), image_features(model, px)
        assert tokens.shape == (3, 36, model.config.text_config.hidden_size)
        torch.testing.assert_close(project(model, pool(model, tower.last_hidden_state)), tokens)
        torch.testing.assert_close(project(wrapped, pool(wrapped, tower.last_hidden_state)), tokens)
        torch.testing.assert_close(embed_image(wrapped, px), tokens.mean(1))

def test_text_embedding_ignores_padding_and_pictures(loaded, wrapped, batch):
    model, ids, mask = loaded[0], batch['text_ids'], batch['text_mask']
    with torch.no_grad():
        z = embed_text(model, ids, mask); assert z.shape == (3, model.config.text_config.hidden_size)
        for k in range(3):
            T = int(mask[k].sum()); torch.testing.assert_close(embed_text(model, ids[k:k+1, :T], mask[k:k+1, :T])[0], z[k], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(embed_text(wrapped, ids, mask), z)

# --- the other families
def picture_inputs(family, px): # px (3, 32, 32): what each family's processor would make of one picture and three words
    seats = dict(gemma3=4, llava=16, qwen2_vl=4, blip2=4).get(family, 0)
    row = torch.cat([torch.tensor([[1]]), torch.full((1, seats), 3), torch.tensor([[7, 8, 9]])], 1)
    if family in ('clip', 'siglip'): return dict(input_ids=row, pixel_values=px[None])
    out = dict(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=px[None])
    if family == 'gemma3': out['token_type_ids'] = (row == 3).long()
    if family == 'qwen2_vl':                                     # patches of 8×8 in blocks of 2×2, twice in time
        p = px.reshape(3, 2, 2, 8, 2, 2, 8).permute(1, 4, 2, 5, 0, 3, 6).reshape(16, 3, 1, 8, 8).repeat(1, 1, 2, 1, 1).reshape(16, -1)
        out.update(pixel_values=p, image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=(row == 3).long())
    if family == 'mllama':
        out.update(pixel_values=px[None, None, None], aspect_ratio_ids=torch.ones(1, 1, dtype=torch.long), aspect_ratio_mask=torch.ones(1, 1, 1, dtype=torch.long),
                   cross_attention_mask=torch.ones(1, row.shape[1], 1, 1, dtype=torch.long))
    return out

@pytest.mark.parametrize('family', list(models.TINY))
def test_tiny_families_see(family):
    "A swapped picture moves the logits from the start; every parameter has its part; the same seed gives the same weights."
    m, again, other = models.tiny(family), models.tiny(family), models.tiny(family, seed=1)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    def logits(px):
        out = m(**picture_inputs(family, px))
        return out.logits_per_image if 'logits_per_image' in out else out.logits
    with torch.no_grad(): assert (logits(x[0]) - logits(x[1])).abs().max() > 1e-3
    assert all(models.parts(m).values())
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), again.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(m.parameters(), other.parameters()))

@pytest.mark.parametrize('family', list(models.TINY))
def test_only_the_named_part_of_a_family_moves(family):
    m, x = models.tiny(family), torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    for part in ('vision', 'projector', 'text'):
        before = {n: p.detach().clone() for n, p in m.named_parameters()}
        with models.train_only(m, part):
            opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3)
            out = m(**picture_inputs(family, x)); loss = (out.logits_per_image if 'logits_per_image' in out else out.logits).square().sum()
            loss.backward(); opt.step(); opt.zero_grad()
        moved = {models.part_of(n) for n, p in m.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {part}, (part, moved)

def test_tiny_refuses_and_leaves_the_dice_alone():
    with pytest.raises(ValueError, match="Did you mean 'llava'"): models.tiny('lava')
    torch.manual_seed(3); a = torch.rand(1); torch.manual_seed(3); models.tiny('clip'); assert torch.rand(1) == a
