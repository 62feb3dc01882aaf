// The face of mmkit.tuner.Dashboard: draws what the kernel tells, sends what the learner does, and sets no trait itself.
// All drawing is done here, so that the thread that trains is left alone.

const own = {'data-lm-suppress-shortcuts': 'true'}   // on what can have the focus: else JupyterLab takes the keys (dd deletes the cell)
const bytes = v => new Uint8Array(v.buffer, v.byteOffset, v.byteLength)
const clamp = (x, lo, hi) => Math.min(Math.max(x, lo), hi)
const last = (v, i = v.length - 1) => { while (i >= 0 && v[i] == null) i--; return v[i] }

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) if (k.startsWith('aria-') || (v !== null && v !== false)) e.setAttribute(k, v === true && !k.startsWith('aria-') ? '' : v)
  if (/^(button|input|select|textarea|summary)$/.test(tag) || 'tabindex' in attributes) for (const [k, v] of Object.entries(own)) e.setAttribute(k, v)
  e.append(...children.filter(c => c !== null && c !== false))                 // strings become text nodes
  return e
}
const put = (e, text) => { text = String(text); if (e.textContent !== text) e.textContent = text }
const mark = (e, name, value) => { value = String(value); if (e.getAttribute(name) !== value) e.setAttribute(name, value) }

function figure(x, digits = 2) {                   // a number as people write it: 1e-4, 0.07, 12, 340
  if (x == null) return '–'
  if (!isFinite(x)) return 'no number'
  if (x === 0) return '0'
  const a = Math.abs(x)
  if (a < 1e-3) { const e = Math.floor(Math.log10(a)), m = Number((x/10**e).toPrecision(digits)); return m === 10 ? `1e${e + 1}` : `${m}e${e}` }
  return a >= 100 ? String(Math.round(x)) : String(Number(x.toPrecision(digits)))
}
const percent = x => x == null ? '–' : `${Math.round(100*x)}%`

function ticks(lo, hi, n) {                        // at most n + 1 round numbers from lo to hi
  const raw = (hi - lo)/n || 1, p = 10**Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map(k => k*p).find(s => s >= raw*.999), out = []
  for (let k = Math.ceil(lo/step - 1e-9); k*step <= hi + step*1e-9; k++) out.push(k*step)
  return out
}

// ---- pictures: each is a figure with a title, a number and a canvas ----------------------------------------------------------

function panel(name, title, help) {
  const value = make('span', {class: 'mm-value'}), more = make('span', {class: 'mm-value mm-wide'}), canvas = make('canvas', {role: 'img', 'aria-label': title})
  const node = make('figure', {class: 'mm-panel', 'data-panel': name}, make('figcaption', {title: help}, make('span', {class: 'mm-title'}, title), make('span', {class: 'mm-fill'}), value, more), canvas)
  return {name, title, node, canvas, value, more, w: 0, h: 0}
}

function cleared(p) {                              // its context, in CSS pixels, empty; null where it is not shown
  if (!p.w || !p.h) return null
  const k = window.devicePixelRatio || 1, W = Math.round(p.w*k), H = Math.round(p.h*k), ctx = p.canvas.getContext('2d')
  if (p.canvas.width !== W || p.canvas.height !== H) { p.canvas.width = W; p.canvas.height = H }
  ctx.setTransform(k, 0, 0, k, 0, 0); ctx.clearRect(0, 0, p.w, p.h); ctx.font = '10px system-ui, sans-serif'; ctx.lineJoin = 'round'
  return ctx
}

function axes(ctx, p, look, x1, [y0, y1], label, top = 5) {       // draws them; returns where a value goes
  const rows = ticks(y0, y1, p.h > 120 ? 4 : 3), text = rows.map(label), left = Math.max(...text.map(t => ctx.measureText(t).width), 12) + 7
  const box = {l: left, r: p.w - 5, t: top, b: p.h - 15}, X = s => box.l + (box.r - box.l)*s/x1, Y = v => box.b - (box.b - box.t)*(v - y0)/(y1 - y0)
  ctx.lineWidth = 1; ctx.strokeStyle = look.line; ctx.fillStyle = look.quiet; ctx.textBaseline = 'middle'; ctx.textAlign = 'right'
  rows.forEach((v, i) => { const y = Math.round(Y(v)) + .5; ctx.globalAlpha = v === y0 ? 1 : .45; ctx.beginPath(); ctx.moveTo(box.l, y); ctx.lineTo(box.r, y); ctx.stroke(); ctx.globalAlpha = 1; ctx.fillText(text[i], box.l - 5, Y(v)) })
  ctx.textBaseline = 'alphabetic'; ctx.fillText('step', box.r, p.h - 3); const end = box.r - ctx.measureText('step').width - 6
  for (const s of ticks(0, x1, 3)) { const t = figure(s, 4), w = ctx.measureText(t).width; if (X(s) + w/2 < end) { ctx.textAlign = s ? 'center' : 'left'; ctx.fillText(t, X(s), p.h - 3) } }
  p.step = px => clamp(x1*(px - box.l)/(box.r - box.l), 0, x1)
  return {box, X, Y}
}

function marked(ctx, {box, X}, marks, look) {       // where a slider moved
  ctx.strokeStyle = look.quiet; ctx.fillStyle = look.quiet; ctx.lineWidth = 1; ctx.setLineDash([2, 2]); let before = -9
  for (const m of marks) {
    if (!m.step) continue                          // where it began is not where it was turned
    const x = Math.round(X(m.step)) + .5; if (x - before < 4) continue
    before = x; ctx.globalAlpha = .7; ctx.beginPath(); ctx.moveTo(x, box.t + 3); ctx.lineTo(x, box.b); ctx.stroke()
    ctx.globalAlpha = 1; ctx.beginPath(); ctx.moveTo(x - 3.5, box.t - 4); ctx.lineTo(x + 3.5, box.t - 4); ctx.lineTo(x, box.t + 2); ctx.fill()
  }
  ctx.setLineDash([]); ctx.globalAlpha = 1
}

function crossed(ctx, {box, X}, step, look) {
  if (step == null) return
  ctx.strokeStyle = look.ink; ctx.globalAlpha = .55; ctx.lineWidth = 1; ctx.beginPath(); ctx.moveTo(Math.round(X(step)) + .5, box.t); ctx.lineTo(Math.round(X(step)) + .5, box.b); ctx.stroke(); ctx.globalAlpha = 1
}

function traced(ctx, {X, Y, box}, x, y, {colour, dash = [], wide = 1.75, alpha = 1, fill, dots = x.length < 4}) {     // a line; a gap where there is no value
  ctx.strokeStyle = colour; ctx.lineWidth = wide; ctx.globalAlpha = alpha; ctx.setLineDash(dash); ctx.beginPath()
  let pen = false, from = 0
  for (let i = 0; i < x.length; i++) {
    if (y[i] == null || !isFinite(y[i])) { pen = false; continue }
    if (pen) ctx.lineTo(X(x[i]), Y(y[i])); else { ctx.moveTo(X(x[i]), Y(y[i])); if (i + 1 >= x.length || y[i + 1] == null) ctx.lineTo(X(x[i]) + .5, Y(y[i])) }
    pen = true
  }
  ctx.stroke(); ctx.setLineDash([])
  if (dots && !fill) { ctx.fillStyle = colour; for (let i = 0; i < x.length; i++) if (y[i] != null) { ctx.beginPath(); ctx.arc(X(x[i]), Y(y[i]), wide + .4, 0, 7); ctx.fill() } }   // few values: each is seen
  if (fill) {
    ctx.fillStyle = colour; ctx.globalAlpha = fill
    for (let i = 0; i < x.length; i = from) {
      while (i < x.length && y[i] == null) i++
      from = i; while (from < x.length && y[from] != null) from++
      if (from - i < 2) { from = Math.max(from, i + 1); continue }
      ctx.beginPath(); ctx.moveTo(X(x[i]), box.b); for (let k = i; k < from; k++) ctx.lineTo(X(x[k]), Y(y[k])); ctx.lineTo(X(x[from - 1]), box.b); ctx.fill()
    }
  }
  ctx.globalAlpha = 1
}

function at(x, y, step) {                          // the value at a step, or the newest
  if (!x.length) return null
  if (step == null) return y[y.length - 1] ?? null
  let i = 0; while (i + 1 < x.length && Math.abs(x[i + 1] - step) <= Math.abs(x[i] - step)) i++
  return y[i] ?? null
}

function bands(ctx, place, x, parts, look) {        // areas upon each other, each named where it ends
  const {X, Y, box} = place, low = new Float64Array(x.length); let named = []
  for (const {y, colour, name} of parts) {
    const high = low.map((v, i) => v + (y[i] ?? 0))
    if (x.length) {
      ctx.fillStyle = colour; ctx.globalAlpha = .8; ctx.beginPath(); ctx.moveTo(X(x[0]), Y(low[0]))
      for (let i = 0; i < x.length; i++) ctx.lineTo(X(x[i]), Y(high[i]))
      for (let i = x.length - 1; i >= 0; i--) ctx.lineTo(X(x[i]), Y(low[i]))
      ctx.fill(); ctx.globalAlpha = 1
      const n = x.length - 1, size = Y(low[n]) - Y(high[n])
      if (size > 10) named.push([name, (Y(low[n]) + Y(high[n]))/2])
    }
    low.set(high)
  }
  ctx.textAlign = 'right'; ctx.textBaseline = 'middle'; ctx.font = '600 10px system-ui, sans-serif'
  for (const [name, y] of named) { ctx.lineWidth = 2.5; ctx.strokeStyle = 'rgba(255,255,255,.75)'; ctx.strokeText(name, box.r - 4, y); ctx.fillStyle = '#222'; ctx.fillText(name, box.r - 4, y) }
  ctx.font = '10px system-ui, sans-serif'
}

// ---- the widget ---------------------------------------------------------------------------------------------------------------

async function render({model, el}) {
  const fixed = () => model.get('_constants'), F = fixed(), P = F.palette, lut = bytes(F.lut)
  const runColour = l => [P.blue, P.vermilion, P.green, P.purple][(l.charCodeAt(0) - 65) & 3], runDash = l => [[], [6, 4], [2, 3], [9, 3, 2, 3]][(l.charCodeAt(0) - 65) & 3]
  const TERMS = F.terms, PARTS = ['vision', 'projector', 'text'], BANDS = [P.sky, P.orange, P.yellow]
  let told = {}, tour = {}, hover = null, refused = null, read = null, heard = Date.now(), asked = null, look = {}, seen = true, view = 'live', chosen = null, drawn = {}
  const root = make('div', {class: 'mmkit-dash', role: 'group', 'aria-label': 'live tuner'})
  const say = (act, more = {}) => { refused = null; read = act === 'replay' ? null : JSON.stringify(told.replay ?? null); asked ??= Date.now(); model.send({do: act, ...more}); ask() }

  // -- acts
  const button = (act, text, help, f = () => say(act), more = {}) => { const b = make('button', {type: 'button', 'data-do': act, title: help, ...more}, text); b.addEventListener('click', f); return b }
  const go = button('start', '▶ Start', 'Train on (or pause)', () => say(told.phase === 'running' ? 'pause' : 'start'), {class: 'mm-go'})
  const acts = {
    step: button('step', 'Step', 'Train one step, then pause'), reset: button('reset', 'Reset', 'From the base again, with the seed and rank chosen at the bottom left', () => say('reset', {hparams: {...staged}})),
    snapshot: button('snapshot', 'Snapshot', 'Keep this moment, to come back to'), fork: button('fork', 'Fork', 'Keep this run as it is, and go on with a copy beside it'),
    replay: button('replay', 'Replay', 'Train once more from the log, and compare every loss bit by bit'), end: button('end', 'End', 'Stop the thread and let its memory go')}
  const restore = make('select', {'data-do': 'restore', 'aria-label': 'restore a snapshot', title: 'Back to a snapshot'})
  restore.addEventListener('change', () => { if (restore.value) say('restore', {name: restore.value}); restore.value = '' })
  const state = make('span', {class: 'mm-state'}), count = make('span', {class: 'mm-count'}), rate = make('span', {class: 'mm-count'}), live = make('span', {class: 'mm-live', role: 'status'})
  const notice = make('div', {class: 'mm-notice', role: 'alert', hidden: true}), noticeText = make('span'), wayBack = button('back', '', 'Restore it', () => say('restore', {name: told.restore_to}))
  notice.append(noticeText, wayBack)
  const bar = make('div', {class: 'mm-bar'}, make('div', {class: 'mm-acts', role: 'toolbar', 'aria-label': 'run'}, go, acts.step, acts.reset, make('i'), acts.snapshot, restore, acts.fork, acts.replay, make('i'), acts.end),
    make('div', {class: 'mm-status'}, state, count, rate, live))

  // -- hyperparameters
  const touched = {}, staged = {}, waiting = {}, controls = [], hint = make('div', {class: 'mm-hint', id: `mm-hint-${Math.random().toString(36).slice(2)}`})
  const explain = k => put(hint, k ? k.help : '')
  function send(name, value) {                      // while a slider is dragged at most one message in 80 ms, the last one always
    touched[name] = Date.now(); const busy = name in waiting; waiting[name] = value
    if (!busy) { say('set', {hparams: {[name]: value}}); waiting[name] = undefined; setTimeout(() => { const v = waiting[name]; delete waiting[name]; if (v !== undefined) send(name, v) }, 80) }
  }
  const near = (k, v) => { if (k.kind === 'count') return Math.round(v); const d = k.log ? Number(v.toPrecision(2)) : Math.round(v/k.step)*k.step; return clamp(Number(d.toPrecision(6)), k.low, k.high) }
  function control(k) {
    const change = v => { if (k.live) send(k.name, v); else { staged[k.name] = v; ask() } }
    const over = n => { for (const e of ['pointerenter', 'focusin']) n.addEventListener(e, () => explain(k)); n.addEventListener('pointerleave', () => explain(null)); return n }
    if (k.kind === 'switch') {
      const box = make('input', {type: 'checkbox', 'data-hparam': k.name, 'aria-describedby': hint.id}); box.addEventListener('change', () => { change(box.checked) })
      return {k, node: over(make('label', {class: 'mm-switch', title: k.help}, box, k.label)), draw: v => { box.checked = v }}
    }
    if (k.kind === 'parts') {
      const boxes = PARTS.map(p => { const b = make('input', {type: 'checkbox', 'data-hparam': k.name, 'data-part': p, 'aria-describedby': hint.id}); b.addEventListener('change', () => change(PARTS.filter((_, i) => boxes[i].checked))); return b })
      return {k, node: over(make('div', {class: 'mm-parts', role: 'group', 'aria-label': k.label, title: k.help}, ...boxes.map((b, i) => make('label', {}, b, PARTS[i])))), draw: v => boxes.forEach((b, i) => { b.checked = v.includes(PARTS[i]) })}
    }
    const grain = 200, to = v => k.log ? Math.round(grain*Math.log(v/k.low)/Math.log(k.high/k.low)) : v, from = x => near(k, k.log ? k.low*(k.high/k.low)**(x/grain) : Number(x))
    const range = make('input', {type: 'range', min: k.log ? 0 : k.low, max: k.log ? grain : k.high, step: k.log ? 1 : k.step, 'data-hparam': k.name, 'aria-describedby': hint.id}), out = make('output')
    const show = v => { put(out, k.kind === 'share' ? Number(v.toFixed(2)) : figure(v, k.log ? 2 : 4)); range.setAttribute('aria-valuetext', out.textContent); range.style.setProperty('--at', `${100*(range.value - range.min)/(range.max - range.min)}%`) }
    range.addEventListener('input', () => { const v = from(Number(range.value)); show(v); change(v) })
    return {k, node: over(make('label', {class: 'mm-hparam', title: k.help}, make('span', {}, k.label), range, out)), draw: v => { const x = String(to(v)); if (range.value !== x) range.value = x; show(v) }}
  }
  const groups = {weights: 'Loss weights', temperature: 'Temperature', rates: 'Learning rates', training: 'Training', faults: 'Planted faults', start: 'At the next reset'}, notes = {}
  const preset = make('select', {'data-do': 'preset', 'aria-label': 'preset'}, make('option', {value: ''}, 'Choose a preset …'), ...F.presets.map(p => make('option', {value: p.name}, p.name))), sentence = make('p', {class: 'mm-sentence'})
  let taken = ''
  preset.addEventListener('change', () => { if (preset.value) { taken = preset.value; say('preset', {name: preset.value}) } })
  const side = make('div', {class: 'mm-side', role: 'group', 'aria-label': 'controls'}, make('div', {class: 'mm-preset'}, preset, sentence))
  for (const [g, title] of Object.entries(groups)) {
    const mine = F.hyperparameters.filter(k => k.group === g).map(control); if (!mine.length) continue
    controls.push(...mine)
    const heads = mine.filter(c => c.k.kind === 'switch').map(c => c.node), rest = mine.filter(c => c.k.kind !== 'switch').map(c => c.node)
    if (g === 'faults' || g === 'start') { notes[g] = make('span', {class: 'mm-note'}); side.append(make('details', {class: 'mm-group', 'data-group': g}, make('summary', {}, title, notes[g]), ...heads, ...rest)) }
    else side.append(make('section', {class: 'mm-group', 'data-group': g, 'aria-label': title}, make('header', {}, title, ...heads), ...rest))
  }
  side.append(hint)

  // -- views
  const tabs = ['live', 'sweep', 'export'].map(v => { const b = make('button', {type: 'button', role: 'tab', 'data-view': v}, {live: 'Live', sweep: 'Sweep', export: 'Export'}[v]); b.addEventListener('click', () => { view = v; shown() }); return b })
  const tablist = make('div', {role: 'tablist', 'aria-label': 'view'}, ...tabs), runs = make('div', {class: 'mm-runs', role: 'group', 'aria-label': 'runs'}), tourButton = button('tour', 'Tour', 'Five predictions', () => say('tour', {act: 'open'}))
  tablist.addEventListener('keydown', e => {
    const i = ['live', 'sweep', 'export'].indexOf(view), j = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: 2}[e.key]; if (j === undefined) return
    view = ['live', 'sweep', 'export'][clamp(j, 0, 2)]; shown(); tabs[clamp(j, 0, 2)].focus(); e.preventDefault(); e.stopPropagation()
  })
  const panels = {}
  for (const [name, title] of TERMS) panels[name] = panel(name, title, `The ${title} term. Line: as it is. Shaded: times its weight, which is what counts.`)
  panels.sum = panel('sum', 'weighted sum', 'Every term times its weight, upon each other: what is minimised.')
  panels.similarity = panel('similarity', 'similarity', 'Cosine of every probe image (row) with every probe caption (column). A white dot: the row’s best is its own caption; a cross: it is another one. Spread: how far the images’ vectors differ, 1 far apart, 0 all at one point.')
  panels.r1 = panel('r1', 'R@1 over time', 'Share of probe images that find their own caption first. Dotted grey: chance.')
  panels.modality = panel('modality', 'image’s share', 'Of the right words that image and prompt bring: the image’s share. At 0 the prompt answers alone.')
  panels.shares = panel('shares', 'gradient', 'Each part’s share of the gradient’s norm.')
  const grid = make('div', {class: 'mm-grid'}, ...Object.values(panels).map(p => p.node)), lesions = make('div', {class: 'mm-lesions'})
  const legend = make('div', {class: 'mm-legend'}), liveView = make('div', {role: 'tabpanel', 'data-view': 'live'}, grid, lesions, legend)
  // sweep
  const ternary = panel('ternary', 'recorded sweep', 'Every disc is a training run of its own, at the weights where it lies.'), which = make('div', {class: 'mm-which', role: 'radiogroup', 'aria-label': 'what is shown'}), readout = make('div', {class: 'mm-readout'})
  const MEASURES = {macro_f1: 'macro-F1', r1: 'R@1', image_gain: 'right words from the image'}, SETS = F.sweep?.slower ? ['points', 'slower'] : ['points']; let measure = 'macro_f1', set = 'points', point = null
  const radios = Object.entries(MEASURES).map(([m, text]) => { const r = make('input', {type: 'radio', name: hint.id + '-measure', 'data-measure': m}); r.addEventListener('change', () => { measure = m; point = null; ask('sweep') }); which.append(make('label', {}, r, text)); return [m, r] })
  const sets = SETS.map(m => { const r = make('input', {type: 'radio', name: hint.id + '-set', 'data-set': m}); r.addEventListener('change', () => { set = m; point = null; ask('sweep') }); return [m, r] })
  if (sets.length > 1) which.append(make('hr'), ...sets.map(([m, r]) => make('label', {}, r, `learning rate ${figure(F.sweep.lr[m])}`)))
  ternary.canvas.tabIndex = 0; for (const [k, v] of Object.entries(own)) ternary.canvas.setAttribute(k, v)
  const sweepView = make('div', {role: 'tabpanel', 'data-view': 'sweep', hidden: true}, F.sweep ? make('div', {class: 'mm-sweep'}, ternary.node, make('div', {class: 'mm-aside'}, which, readout)) : make('p', {class: 'mm-absent'}, F.no_sweep))
  // export
  const text = make('textarea', {readonly: true, spellcheck: 'false', 'aria-label': 'exported text', placeholder: 'Choose what you want: the text comes here.'}), download = make('a', {class: 'mm-button', hidden: true, tabindex: 0, 'data-do': 'download'}, 'Download')
  const copy = button('copy', 'Copy', 'Copy the text', async () => { text.select(); try { await navigator.clipboard.writeText(text.value) } catch { document.execCommand('copy') } put(copy, 'Copied'); setTimeout(() => put(copy, 'Copy'), 1200) })
  copy.disabled = true
  const kinds = {script: ['Script', 'tuner_run.py'], cell: ['Notebook cell', 'tuner_cell.py'], fit: ['fit(…) arguments', 'tuner_fit.py'], json: ['Log (JSON)', 'tuner_log.json']}, remarks = make('ol', {class: 'mm-remarks'})
  const exportView = make('div', {role: 'tabpanel', 'data-view': 'export', hidden: true}, make('div', {class: 'mm-export'}, ...Object.entries(kinds).map(([k, [t]]) => button('export', t, `This run as ${t}`, () => say('export', {kind: k}), {'data-kind': k})), make('span', {class: 'mm-fill'}), copy, download),
    text, make('div', {class: 'mm-title'}, 'Done last'), remarks)
  // tour
  const tourBox = make('section', {class: 'mm-tour', 'aria-label': 'tour', hidden: true})
  root.append(bar, notice, tourBox, make('div', {class: 'mm-body'}, side, make('div', {class: 'mm-main'}, make('div', {class: 'mm-top'}, tablist, runs, tourButton), liveView, sweepView, exportView)))
  const outer = make('div', {class: 'mmkit-dash-outer'}, root); el.append(outer)
  root.addEventListener('keydown', e => { if (!e.ctrlKey && !e.metaKey && !e.altKey) e.stopPropagation() })

  function shown() {
    tabs.forEach(b => { const on = b.dataset.view === view; mark(b, 'aria-selected', on); b.tabIndex = on ? 0 : -1 })
    for (const v of [liveView, sweepView, exportView]) v.hidden = v.dataset.view !== view
    drawn = {}; ask()
  }

  // -- captions
  const cards = []
  async function lay() {                            // the fixed lesions, once they are known
    const sent = fixed().lesions
    if (sent.length === cards.length) return
    cards.length = 0
    for (const [i, l] of sent.entries()) {
      const p = panel('lesion' + i, l.label, Object.entries(l.truth).map(([a, v]) => `${a}: ${v}`).join('\n')), list = make('div', {class: 'mm-caption', role: 'listbox', 'aria-label': `caption of lesion ${i + 1}`, 'aria-orientation': 'horizontal'})
      const card = {i, p, list, spans: [], bitmap: await createImageBitmap(new Blob([bytes(l.png)], {type: 'image/png'}))}
      const choose = k => { if (!card.spans[k]) return; chosen = {lesion: i, word: k}; say('request_attention', chosen); card.spans.forEach((s, j) => { s.tabIndex = j === k ? 0 : -1 }); card.spans[k].focus({preventScroll: true}) }
      list.addEventListener('click', e => { const s = e.target.closest('[data-w]'); if (s) choose(Number(s.dataset.w)) })
      list.addEventListener('keydown', e => {
        const s = e.target.closest('[data-w]'); if (!s || e.ctrlKey || e.metaKey || e.altKey) return
        const k = Number(s.dataset.w), to = {ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: card.spans.length - 1, Enter: k, ' ': k}[e.key]; if (to === undefined) return
        e.preventDefault(); e.stopPropagation(); choose(clamp(to, 0, card.spans.length - 1))
      })
      p.node.classList.add('mm-card'); p.node.append(list); cards.push(card); watch(p)
    }
    lesions.replaceChildren(...cards.map(c => c.p.node)); drawn = {}; ask()
  }
  function caption(card, item) {
    const words = item?.words ?? []
    while (card.spans.length > words.length) card.spans.pop().remove()
    words.forEach(([word, ok], k) => {
      let s = card.spans[k]
      if (!s) { s = make('span', {role: 'option', 'data-w': k, tabindex: k ? -1 : 0}); s.append('', make('b', {}, ''), ''); card.spans.push(s); card.list.append(s) }
      const [, before, body, after] = /^(\s*)([^]*?)(\s*)$/.exec(word), joined = words[k + 1]?.[1] === ok && ok !== null, rest = joined ? body + after : body
      if (s.firstChild.data !== before) s.firstChild.data = before
      put(s.children[0], rest); if (s.lastChild.data !== (joined ? '' : after)) s.lastChild.data = joined ? '' : after
      mark(s, 'data-ok', ok === null ? '' : ok); mark(s, 'aria-label', `${rest.trim() || 'blank'}${ok === null ? '' : ok ? ', right' : ', wrong'}`)
      mark(s, 'aria-selected', Boolean(chosen && chosen.lesion === card.i && chosen.word === k))
    })
    if (card.spans.length && !card.spans.some(s => s.tabIndex === 0)) card.spans[0].tabIndex = 0
    put(card.p.value, item ? `${item.num_right} of ${item.num_claims} right` : '')
    if (!words.length) put(card.list, ''), card.spans = []
  }
  function lesion(card) {
    const ctx = cleared(card.p); if (!ctx) return
    const {w, h} = card.p, side = Math.min(w, h), a = told.attention, on = a && a.lesion === card.i
    ctx.imageSmoothingEnabled = true; ctx.drawImage(card.bitmap, 0, 0, side, side)
    if (on) {
      const top = Math.max(...a.values, 1e-9), cw = side/a.w, ch = side/a.h
      a.values.forEach((v, k) => { const t = clamp(v/top, 0, 1), c = 3*Math.round(255*t); ctx.globalAlpha = .8*Math.sqrt(t); ctx.fillStyle = `rgb(${lut[c]},${lut[c + 1]},${lut[c + 2]})`; const x = k % a.w, y = Math.floor(k/a.w); ctx.fillRect(Math.floor(x*cw), Math.floor(y*ch), Math.ceil(cw), Math.ceil(ch)) })
      ctx.globalAlpha = 1
    }
    card.p.canvas.setAttribute('aria-label', on ? `lesion ${card.i + 1}: where “${a.text.trim()}” looked, ${percent(a.values.reduce((x, y) => x + y, 0))} of its attention is on the image` : `lesion ${card.i + 1}`)
  }

  // -- curves
  const others = () => model.get('_other_runs') || '{}'
  let restText = null, rest = {}
  function everyRun() { const t = others(); if (t !== restText) { restText = t; rest = JSON.parse(t) } return {...rest, ...told.runs} }
  function sorted(all) { return Object.keys(all).sort((a, b) => (a === told.active) - (b === told.active)) }      // the active one last: on top
  const width = all => Math.max(10, ...Object.values(all).map(r => r.steps || 0))
  const reach = (all, f, least) => Math.max(least, ...Object.values(all).flatMap(f).filter(v => v != null && isFinite(v)))*1.05
  function term(p, name, all) {
    const ctx = cleared(p); if (!ctx) return
    const top = reach(all, r => r.raw[name], name === 'mse' ? 1e-4 : .1), place = axes(ctx, p, look, width(all), [0, top], v => figure(v)), run = all[told.active]
    for (const l of sorted(all)) {
      const r = all[l], active = l === told.active
      if (active) traced(ctx, place, r.step, r.weighted[name], {colour: runColour(l), wide: .75, alpha: .6, fill: .22})
      traced(ctx, place, r.step, r.raw[name], {colour: runColour(l), dash: runDash(l), wide: active ? 1.9 : 1.4, alpha: active ? 1 : .85})
    }
    marked(ctx, place, run?.marks ?? [], look); crossed(ctx, place, hover, look)
    const raw = run && at(run.step, run.raw[name], hover), times = run && at(run.step, run.weighted[name], hover)
    put(p.value, raw == null ? (run?.step.length ? 'off' : '') : figure(raw)); put(p.more, raw == null ? '' : `× ${figure(raw ? times/raw : told.hparams[name])} = ${figure(times)}`)
    const first = run && run.raw[name].find(v => v != null)
    mark(p.canvas, 'aria-label', raw == null ? `${p.title}: not computed` : `${p.title}: from ${figure(first)} to ${figure(last(run.raw[name]))}; weighted ${figure(last(run.weighted[name]))}`)
  }
  function sum(p, all) {
    const ctx = cleared(p); if (!ctx) return
    const run = all[told.active], place = axes(ctx, p, look, width(all), [0, reach(all, r => r.loss, .1)], v => figure(v))
    bands(ctx, place, run.step, TERMS.map(([n, name], i) => ({y: run.weighted[n], colour: BANDS[i], name})), look)
    for (const l of sorted(all)) traced(ctx, place, all[l].step, all[l].loss, {colour: runColour(l), dash: runDash(l), wide: l === told.active ? 1.9 : 1.4})
    marked(ctx, place, run.marks, look); crossed(ctx, place, hover, look)
    put(p.value, figure(at(run.step, run.loss, hover))); mark(p.canvas, 'aria-label', `weighted sum: ${figure(last(run.loss))}, of it ${TERMS.map(([n, name]) => `${name} ${figure(last(run.weighted[n]))}`).join(', ')}`)
  }
  function retrieval(p, all) {
    const ctx = cleared(p); if (!ctx) return
    const place = axes(ctx, p, look, width(all), [0, 1], v => figure(v)), run = all[told.active], n = told.similarity?.n
    if (n) traced(ctx, place, [0, width(all)], [1/n, 1/n], {colour: look.quiet, dash: [1, 3], wide: 1.25, dots: false})
    for (const l of sorted(all)) traced(ctx, place, all[l].r1.step, all[l].r1.value, {dots: all[l].r1.step.length < 25, colour: runColour(l), dash: runDash(l), wide: l === told.active ? 1.9 : 1.4})
    marked(ctx, place, run.marks, look); crossed(ctx, place, hover, look)
    put(p.value, percent(at(run.r1.step, run.r1.value, hover))); mark(p.canvas, 'aria-label', `R@1: ${percent(last(run.r1.value))}${n ? `, chance ${percent(1/n)}` : ''}`)
  }
  function source(p, all) {
    const ctx = cleared(p); if (!ctx) return
    const run = all[told.active], g = run.modality, now = at(g.step, g.image_share, hover), bar = 12
    const place = axes(ctx, p, look, width(all), [0, 1], percent, bar + 11), {box} = place
    ctx.fillStyle = look.line; ctx.fillRect(box.l, 0, box.r - box.l, bar)
    ctx.textBaseline = 'middle'; ctx.textAlign = 'left'
    if (now != null) { ctx.fillStyle = P.green; ctx.fillRect(box.l, 0, (box.r - box.l)*now, bar); ctx.fillStyle = look.ink; ctx.fillRect(box.l + (box.r - box.l)*now - 1.5, -1, 3, bar + 2) }
    const label = (t, x, align) => { ctx.textAlign = align; ctx.lineWidth = 2.5; ctx.strokeStyle = look.paper; ctx.globalAlpha = .8; ctx.strokeText(t, x, bar/2 + .5); ctx.globalAlpha = 1; ctx.fillStyle = look.ink; ctx.fillText(t, x, bar/2 + .5) }
    label('image', box.l + 4, 'left'); label('prompt', box.r - 4, 'right')
    for (const l of sorted(all)) traced(ctx, place, all[l].modality.step, all[l].modality.image_share, {dots: all[l].modality.step.length < 25, colour: runColour(l), dash: runDash(l), wide: l === told.active ? 1.9 : 1.4})
    marked(ctx, place, run.marks, look); crossed(ctx, place, hover, look)
    const i = at(g.step, g.image_gain, hover), t = at(g.step, g.text_gain, hover)
    put(p.value, now == null ? (g.step.length ? 'nothing yet' : '') : percent(now)); put(p.more, now == null ? '' : 'of right words')
    mark(p.canvas, 'aria-label', now == null ? 'right words by source: none brought yet' : `the image brings ${figure(i)} right words an answer, the prompt ${figure(t)}: the image’s share is ${percent(now)}`)
  }
  function gradient(p, all) {
    const ctx = cleared(p); if (!ctx) return
    const run = all[told.active], s = run.gradient_shares, place = axes(ctx, p, look, width(all), [0, 1], percent)
    bands(ctx, place, s.step, PARTS.map((n, i) => ({y: s[n], colour: BANDS[i], name: n})), look)
    marked(ctx, place, run.marks, look); crossed(ctx, place, hover, look)
    const most = PARTS.map(n => [at(s.step, s[n], hover) ?? -1, n]).sort((a, b) => b[0] - a[0])[0]
    put(p.value, most[0] < 0 ? '' : `${most[1]} ${percent(most[0])}`); mark(p.canvas, 'aria-label', `gradient by part: ${PARTS.map(n => `${n} ${percent(last(s[n]))}`).join(', ')}`)
  }
  const small = document.createElement('canvas')
  function similarity(p) {
    const ctx = cleared(p), s = told.similarity; if (!ctx) return
    if (!s) { ctx.fillStyle = look.quiet; ctx.fillText('after the first steps', 8, 20); put(p.value, ''); return }
    const lo = Math.min(...s.values), hi = Math.max(...s.values), img = new ImageData(s.n, s.n)
    s.values.forEach((v, k) => { const c = 3*Math.round(255*(hi > lo ? (v - lo)/(hi - lo) : 0)); img.data.set([lut[c], lut[c + 1], lut[c + 2], 255], 4*k) })
    small.width = small.height = s.n; small.getContext('2d').putImageData(img, 0, 0)
    const l = 13, size = Math.max(10, Math.min(p.w - l - 44, p.h - 14)), cell = size/s.n; ctx.imageSmoothingEnabled = false; ctx.drawImage(small, l, 0, size, size)
    for (let r = 0; r < s.n; r++) {
      let best = 0; for (let c = 1; c < s.n; c++) if (s.values[r*s.n + c] > s.values[r*s.n + best]) best = c
      const x = l + (best + .5)*cell, y = (r + .5)*cell, d = Math.max(1.2, cell*.2); ctx.lineWidth = Math.max(1, cell*.14)
      if (best === r) { ctx.fillStyle = '#fff'; ctx.strokeStyle = '#222'; ctx.beginPath(); ctx.arc(x, y, d*1.15, 0, 7); ctx.fill(); ctx.lineWidth = .75; ctx.stroke() }
      else { ctx.strokeStyle = '#222'; ctx.beginPath(); ctx.moveTo(x - d, y - d); ctx.lineTo(x + d, y + d); ctx.moveTo(x - d, y + d); ctx.lineTo(x + d, y - d); ctx.stroke() }
    }
    const bx = l + size + 8, ramp = ctx.createLinearGradient(0, size, 0, 0); for (let k = 0; k <= 5; k++) ramp.addColorStop(k/5, `rgb(${lut.slice(153*k, 153*k + 3)})`)
    ctx.fillStyle = ramp; ctx.fillRect(bx, 0, 7, size); ctx.fillStyle = look.quiet; ctx.textAlign = 'left'; ctx.textBaseline = 'top'; ctx.fillText(hi.toFixed(2), bx + 10, 0); ctx.textBaseline = 'bottom'; ctx.fillText(lo.toFixed(2), bx + 10, size)
    ctx.textBaseline = 'alphabetic'; ctx.textAlign = 'center'; ctx.fillText('captions', l + size/2, p.h - 3); ctx.save(); ctx.translate(9, size/2); ctx.rotate(-Math.PI/2); ctx.fillText('images', 0, 0); ctx.restore()
    put(p.value, `R@1 ${percent(s.r1)}${s.spread == null ? '' : ` · spread ${s.spread.toFixed(2)}`}`); mark(p.canvas, 'aria-label', `similarity of ${s.n} images with ${s.n} captions, cosines ${lo.toFixed(2)} to ${hi.toFixed(2)}; R@1 ${percent(s.r1)}, chance ${percent(1/s.n)}`)
  }

  // -- sweep
  const mean = v => { const k = v.filter(x => x != null); return k.length ? k.reduce((a, b) => a + b, 0)/k.length : null }, three = x => x == null ? '–' : x.toFixed(3), two = x => x == null ? '–' : x.toFixed(2), share = o => { const s = o.contrastive + o.ce + o.mse; return s > 0 ? [o.contrastive/s, o.ce/s, o.mse/s] : null }
  let spots = []
  function simplex(p) {
    const ctx = cleared(p); if (!ctx || !F.sweep) return
    const pts = F.sweep[set], W = p.w, H = p.h, pad = 34, side = Math.min(W - 150, (H - 2*pad)/.866), x0 = (W - side)/2, y1 = (H + side*.866)/2
    const place = ([c, e, m]) => [x0 + side*(e + m/2), y1 - side*.866*m], values = pts.map(q => mean(q[measure])), both = SETS.flatMap(n => F.sweep[n].map(q => mean(q[measure]))).filter(v => v != null), lo = Math.min(...both), hi = Math.max(...both)
    const corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]].map(place); ctx.strokeStyle = look.line; ctx.lineWidth = 1; ctx.beginPath(); ctx.moveTo(...corners[0]); ctx.lineTo(...corners[1]); ctx.lineTo(...corners[2]); ctx.closePath(); ctx.stroke()
    spots = pts.map(q => place(share(q)))
    let gap = side; spots.forEach((a, i) => spots.forEach((b, j) => { if (i < j) gap = Math.min(gap, Math.hypot(a[0] - b[0], a[1] - b[1])) }))
    const r = clamp(gap*.5, 14, 24)
    spots.forEach(([x, y], i) => {
      const v = values[i], c = 3*Math.round(255*(hi > lo && v != null ? (v - lo)/(hi - lo) : 0)), bright = .3*lut[c] + .6*lut[c + 1] + .1*lut[c + 2]
      ctx.fillStyle = v == null ? look.line : `rgb(${lut[c]},${lut[c + 1]},${lut[c + 2]})`; ctx.beginPath(); ctx.arc(x, y, r, 0, 7); ctx.fill(); ctx.strokeStyle = look.paper; ctx.lineWidth = 1; ctx.stroke()
      if (i === point) { ctx.strokeStyle = look.ink; ctx.lineWidth = 2.5; ctx.stroke() }
      ctx.fillStyle = bright > 140 ? '#111' : '#fff'; ctx.textAlign = 'center'; ctx.textBaseline = 'middle'; ctx.font = '10.5px system-ui, sans-serif'; ctx.fillText(two(v), x, y + .5)
    })
    ctx.fillStyle = look.ink; ctx.font = '600 12px system-ui, sans-serif'; ctx.textAlign = 'center'; ctx.textBaseline = 'alphabetic'
    TERMS.forEach(([, name], k) => ctx.fillText(`${name} alone`, clamp(corners[k][0], 56, W - 62), corners[k][1] + (k === 2 ? -r - 6 : r + 15)))
    const here = told.hparams && share(told.hparams)
    if (here) {
      const [x, y] = place(here); for (const [c, w] of [['#fff', 5], [P.vermilion, 2.5]]) { ctx.strokeStyle = c; ctx.lineWidth = w; ctx.beginPath(); ctx.arc(x, y, r + 3, 0, 7); ctx.stroke() }
      const t = `run ${told.active} now`; ctx.textAlign = 'left'; ctx.lineWidth = 5; ctx.strokeStyle = look.paper; ctx.strokeText(t, x + r + 7, y + 4); ctx.fillStyle = P.vermilion; ctx.fillText(t, x + r + 7, y + 4)
    }
    const best = values.indexOf(Math.max(...values.filter(v => v != null))), k = point ?? best, q = pts[k], v = q[measure], line = (...t) => make('div', {}, ...t), weights = w => TERMS.map(([, name], n) => `${name} ${two(w[n])}`).join(', ')
    const near = here && spots.map((s, i) => [Math.hypot(s[0] - place(here)[0], s[1] - place(here)[1]), i]).sort((a, b) => a[0] - b[0])[0][1], spare = Object.entries(F.sweep.controls ?? {}).map(([n, c]) => `${n} ${three(mean(c[measure]))}`).join(', ')
    put(p.value, MEASURES[measure])
    readout.replaceChildren(line(make('b', {}, point == null ? `Highest ${MEASURES[measure]}` : 'The chosen weights')), line(weights(share(q))), line(make('b', {}, three(mean(v))), `, ${v.length} seeds: ${v.map(two).join(', ')}`),
      ...(spare ? [line(make('span', {class: 'mm-quiet'}, `Beside it: ${spare}`))] : []),
      ...(here ? [make('hr'), line(make('b', {}, `Run ${told.active} now`)), line(weights(here)), line(`recorded nearest to it: ${three(mean(pts[near][measure]))}`)] : []),
      make('hr'), make('div', {class: 'mm-quiet'}, `${pts.length} weights × ${F.sweep.seeds.length ?? F.sweep.seeds} seeds, ${F.sweep.steps} steps${F.sweep.train ? `, ${F.sweep.train.join(' + ')}` : ''}; recorded ${F.sweep.date}. ${F.outdated_note ? F.outdated_note + ' ' : ''}Point at a disc, or ← →.`))
    mark(p.canvas, 'aria-label', `recorded sweep, ${MEASURES[measure]} from ${two(lo)} to ${two(hi)}; ${readout.textContent}`)
  }
  ternary.canvas.addEventListener('pointermove', e => { const k = spots.findIndex(([x, y]) => Math.hypot(x - e.offsetX, y - e.offsetY) < 20); if ((k < 0 ? null : k) !== point) { point = k < 0 ? null : k; ask('sweep') } })
  ternary.canvas.addEventListener('pointerleave', () => { point = null; ask('sweep') })
  ternary.canvas.addEventListener('keydown', e => { const d = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1}[e.key]; if (!d || !spots.length) return; point = ((point ?? (d > 0 ? -1 : 0)) + d + spots.length) % spots.length; ask('sweep'); e.preventDefault(); e.stopPropagation() })

  // -- tour
  let tourText = null
  function guide() {
    tour = model.get('_tour') || {}; const key = JSON.stringify(tour); if (key === tourText) return
    tourText = key; tourBox.hidden = !tour.open; mark(tourButton, 'aria-pressed', Boolean(tour.open)); put(tourButton, tour.open ? 'Tour' : `Tour ${Math.min(tour.at + 1, tour.prompts?.length ?? 0)}/${tour.prompts?.length ?? 0}`)
    if (!tour.open) return tourBox.replaceChildren()
    const p = tour.prompts[tour.at], held = tourBox.contains(document.activeElement) && document.activeElement.dataset.guess, lastOne = tour.at + 1 === tour.prompts.length
    const guesses = p.choices.map((c, i) => button('guess', c, 'Your prediction', () => say('tour', {act: 'guess', choice: i}), {'data-guess': i, 'aria-pressed': p.guess === i, class: p.done && p.came === i ? 'mm-came' : ''}))
    if (p.done) guesses.forEach(b => { b.disabled = true })
    tourBox.replaceChildren(make('div', {class: 'mm-where', 'aria-hidden': 'true'}, ...tour.prompts.map((q, i) => make('i', {class: i === tour.at ? 'mm-at' : q.done ? 'mm-done' : ''}))),
      make('div', {class: 'mm-says'}, make('b', {}, `${tour.at + 1}. ${p.title}. `), p.done ? make('span', {class: 'mm-found', role: 'status'}, p.found) : p.says),
      make('div', {class: 'mm-guess', role: 'group', 'aria-label': p.ask}, make('span', {}, p.done ? (p.guess == null ? 'No prediction.' : p.guess === p.came ? 'As you predicted.' : 'Not as you predicted.') : p.ask), ...(p.done ? [] : guesses)),
      button('next', p.done ? (lastOne ? 'Finish' : 'Next') : 'Skip', p.done ? 'The next prompt' : 'Leave this prompt out', () => say('tour', {act: 'next'}), {class: p.done ? 'mm-go' : ''}), button('close-tour', '×', 'Close the tour', () => say('tour', {act: 'close'}), {'aria-label': 'close the tour', class: 'mm-bare'}))
    if (held) tourBox.querySelector(`[data-guess="${held}"]`)?.focus()
  }

  // -- what changed is drawn, once a frame, when somebody can see it
  let wanted = false
  function ask(what) { if (what) drawn[what] = null; if (!wanted) { wanted = true; requestAnimationFrame(frame) } }
  const changed = (name, key) => { key = JSON.stringify(key); if (drawn[name] === key) return false; drawn[name] = key; return true }
  let toldText = null, pictures = 0
  function frame() {
    wanted = false; if (!root.isConnected) return setTimeout(ask, 50)                // rendered before it is on the page
    if (!seen) return
    if (!look.ink) colours()
    const t = model.get('_status') || '{}'; if (t !== toldText) { toldText = t; told = JSON.parse(t); pictures++; root.pictures = pictures }
    status(); guide(); drawControls()
    const run = told.runs?.[told.active]; if (!run) return
    const all = everyRun(), key = [told.active, told.step, hover, ...Object.entries(all).map(([l, r]) => [l, r.steps, r.marks.length])]
    if (changed('chips', Object.keys(all).map(l => [l, l === told.active]))) chips(all)
    for (const n of runs.querySelectorAll('small')) put(n, all[n.dataset.of]?.steps ?? '')
    if (view === 'live') {
      if (changed('curves', key)) { for (const [n] of TERMS) term(panels[n], n, all); sum(panels.sum, all); retrieval(panels.r1, all); source(panels.modality, all); gradient(panels.shares, all) }
      if (changed('similarity', [told.active, told.similarity?.step, told.similarity?.r1])) similarity(panels.similarity)
      if (changed('captions', [told.active, told.captions?.step, chosen])) { cards.forEach((c, i) => caption(c, told.captions?.items[i])); captionsLine(run) }
      if (changed('attention', [told.attention?.step, told.attention?.lesion, told.attention?.word])) cards.forEach(lesion)
      if (changed('hovered', [hover, run.marks.length])) captionsLine(run)
    } else if (view === 'sweep' && changed('sweep', [measure, set, point, told.hparams.contrastive, told.hparams.ce, told.hparams.mse, told.active])) { radios.forEach(([m, r]) => { r.checked = m === measure }); sets.forEach(([m, r]) => { r.checked = m === set }); simplex(ternary) }
    else if (view === 'export' && changed('remarks', told.remarks)) remarks.replaceChildren(...(told.remarks ?? []).map(r => make('li', {}, r)))
  }
  function captionsLine(run) {
    const m = hover == null ? null : run.marks.filter(m => Math.abs(m.step - hover) <= width(everyRun())*.02 + 1), n = told.captions?.items.reduce((a, i) => [a[0] + i.num_right, a[1] + i.num_claims], [0, 0])
    legend.replaceChildren(...(m?.length ? [make('b', {}, `step ${m[0].step}: `), m.slice(-3).map(x => x.says).join('; ')] : hover != null ? [`values at step ${Math.round(hover)}`] :
      ['captions, generated now: ', make('b', {'data-ok': 'true'}, 'right'), ' ', make('b', {'data-ok': 'false'}, 'wrong'), n?.[1] ? ` · ${n[0]} of ${n[1]} claims right` : '', ' · choose a word to see where it looked']))
  }
  function chips(all) {
    const held = runs.contains(document.activeElement) ? document.activeElement.dataset.run : null
    runs.replaceChildren(...Object.keys(all).sort().flatMap(l => {
      const line = document.createElementNS('http://www.w3.org/2000/svg', 'svg'), path = document.createElementNS('http://www.w3.org/2000/svg', 'path'), on = l === told.active
      for (const [k, v] of Object.entries({width: 22, height: 8, 'aria-hidden': 'true'})) line.setAttribute(k, v)
      for (const [k, v] of Object.entries({d: 'M0 4H22', stroke: runColour(l), 'stroke-width': 2.5, 'stroke-dasharray': runDash(l).join(' ')})) path.setAttribute(k, v)
      line.append(path); const parent = all[l].parent, about = parent ? `forked from ${parent[0]} at step ${parent[1]}` : 'from the base'
      const b = button('switch', '', `Run ${l}, ${about}${on ? '; it is the one that trains' : '; go on with it'}`, () => say('switch', {label: l}), {'aria-pressed': on, 'data-run': l}); b.append(line, ` ${l} `, make('small', {'data-of': l}))
      return on ? [b] : [make('span', {class: 'mm-pair'}, b, button('drop', '×', `Drop run ${l}`, () => say('drop', {label: l}), {'data-drop': l, 'aria-label': `drop run ${l}`, class: 'mm-bare'}))]
    }))
    if (held) runs.querySelector(`[data-run="${held}"]`)?.focus()
  }
  function drawControls() {
    const k = told.hparams; if (!k) return
    for (const c of controls) {
      const n = c.k.name; if (!(n in k)) continue
      if (!c.k.live) c.draw(staged[n] ?? k[n]); else if (Date.now() - (touched[n] ?? 0) > 700) c.draw(k[n])
    }
    const faults = F.hyperparameters.filter(x => x.group === 'faults' && k[x.name] > 0); if (notes.faults) put(notes.faults, faults.length ? faults.map(x => `${x.label} ${percent(k[x.name])}`).join(', ') : 'none')
    const soon = F.hyperparameters.filter(x => !x.live); for (const x of soon) if (staged[x.name] === k[x.name]) delete staged[x.name]
    if (notes.start) put(notes.start, soon.map(x => `${x.label} ${staged[x.name] ?? k[x.name]}`).join(', ')); mark(acts.reset, 'data-staged', Boolean(Object.keys(staged).length))
    const alike = (a, b) => typeof a === 'number' ? Math.abs(a - b) < 1e-9 : JSON.stringify(a) === JSON.stringify(b), fits = p => p && Object.entries(p.hparams).every(([n, v]) => alike(v, k[n]))
    const now = fits(F.presets.find(p => p.name === taken)) ? taken : [...F.presets].sort((a, b) => Object.keys(b.hparams).length - Object.keys(a.hparams).length).find(fits)?.name ?? ''
    if (document.activeElement !== preset || now) preset.value = now
    put(sentence, F.presets.find(p => p.name === now)?.says ?? 'Move a slider, or choose a preset: it takes effect at the next step.')
  }
  const SAYS = {ready: 'ready', preparing: 'preparing', running: 'running', paused: 'paused', stopped: 'ended', failed: 'failed'}
  function status() {
    const s = told.phase ?? 'preparing', silent = (s === 'running' && Date.now() - heard > 8000) || (asked && Date.now() - asked > 8000), over = s === 'stopped' || s === 'failed'
    mark(root, 'data-status', s); put(state, told.busy && !over ? told.busy : SAYS[s] ?? s); put(count, told.step == null ? '' : `step ${told.step}`); put(rate, s === 'running' && told.rate ? `${told.rate.toFixed(1)} steps/s` : '')
    put(go, s === 'running' ? '❚❚ Pause' : '▶ Start'); mark(go, 'data-do', s === 'running' ? 'pause' : 'start'); go.disabled = over
    for (const [n, b] of Object.entries(acts)) b.disabled = over || (n === 'step' && s === 'running')
    for (const c of side.querySelectorAll('input, select')) if (c.disabled !== over) c.disabled = over
    const names = (told.snapshots ?? []).map(x => x.name); restore.disabled = over || !names.length
    if (document.activeElement !== restore && changed('snapshots', names)) restore.replaceChildren(make('option', {value: ''}, names.length ? 'Restore …' : 'No snapshot'), ...names.map(n => make('option', {value: n}, n)))
    const r = told.replay, lines = [refused, told.reason, over && s === 'stopped' ? 'The run has ended and its thread with it. Run the cell again for a new one.' : '', silent ? 'No word from the kernel for some seconds. If it was restarted, run the cell again.' : '', r && !refused && read !== JSON.stringify(r) ? `Replay: ${r.says}` : ''].filter(Boolean)
    notice.hidden = !lines.length; put(noticeText, lines.join(' ')); mark(notice, 'data-kind', s === 'failed' || refused ? 'bad' : told.reason || silent ? 'warn' : r && !r.same ? 'bad' : s === 'stopped' ? 'warn' : 'good')
    wayBack.hidden = !(told.restore_to && told.reason) || over; put(wayBack, `Back to ${told.restore_to}`)
    put(live, `${SAYS[s]}${told.reason ? ': ' + told.reason : ''}`)
  }

  // -- listening
  const watched = new Map(), size = new ResizeObserver(list => { for (const e of list) { const p = watched.get(e.target); p.w = e.contentRect.width; p.h = e.contentRect.height } drawn = {...drawn, curves: null, similarity: null, attention: null, sweep: null}; ask() })
  function watch(p) { watched.set(p.canvas, p); size.observe(p.canvas) }
  for (const p of [...Object.values(panels), ternary]) watch(p)
  for (const p of Object.values(panels)) if (p.name !== 'similarity') {
    p.canvas.addEventListener('pointermove', e => { hover = p.step ? Math.round(p.step(e.offsetX)) : null; ask() })
    p.canvas.addEventListener('pointerleave', () => { hover = null; ask() })
  }
  const sight = new IntersectionObserver(list => { seen = list.at(-1).isIntersecting; if (seen) ask() }); sight.observe(root)
  function colours() { if (!root.isConnected) return; const s = getComputedStyle(root), v = n => s.getPropertyValue(n).trim(); look = {ink: v('--ink'), quiet: v('--quiet'), line: v('--line'), paper: v('--paper')}; drawn = {}; ask() }
  const theme = new MutationObserver(colours); theme.observe(document.body, {attributes: true, attributeFilter: ['data-jp-theme-name', 'data-jp-theme-light', 'class']})
  const onTold = () => { heard = Date.now(); asked = null; ask() }, onFixed = () => lay(), onTour = () => ask(), onRest = () => { drawn.curves = null; ask() }
  function onMessage(m) {
    asked = null
    if (m.refused !== undefined) { refused = m.refused; for (const k of Object.keys(touched)) touched[k] = 0 }
    if (m.export !== undefined) {
      text.value = m.text; copy.disabled = false; download.hidden = false; download.setAttribute('download', kinds[m.export][1]); URL.revokeObjectURL(download.href); download.href = URL.createObjectURL(new Blob([m.text], {type: 'text/plain'}))
      for (const b of exportView.querySelectorAll('[data-kind]')) mark(b, 'aria-pressed', b.dataset.kind === m.export)
    }
    ask()
  }
  model.on('change:_status', onTold); model.on('change:_constants', onFixed); model.on('change:_tour', onTour); model.on('change:_other_runs', onRest); model.on('msg:custom', onMessage)
  const pulse = setInterval(() => { if (seen) ask() }, 2000)
  root.told = () => told; root.everyRun = everyRun                                  // for tests, and for the curious
  colours(); await lay(); shown()
  return () => {
    clearInterval(pulse); size.disconnect(); sight.disconnect(); theme.disconnect()
    model.off('change:_status', onTold); model.off('change:_constants', onFixed); model.off('change:_tour', onTour); model.off('change:_other_runs', onRest); model.off('msg:custom', onMessage)
  }
}

export default {render}
