// The face of mmkit.explain.viewer.TokenViewer: draws what the traits say, and sets them. Its arithmetic is that of viewer_state.py, and a test compares the two.
// Everything that it needs is sent once; pointing at a word asks the kernel nothing.

const bytes = v => new Uint8Array(v.buffer, v.byteOffset, v.byteLength)
const floats = v => new Float32Array(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength))
const figure = x => x === 0 ? '0' : String(Number(x.toPrecision(2)))

// ---- arithmetic: reduced, peaks, full, shown, spread, inside; a word's map is null where it has none ----------------------------

function gather(n, which, part, cells) {          // part(k) gives an array for each of n: one of them, their mean, or their largest, place by place
  if (typeof which === 'number' || n === 1) return part(n === 1 ? 0 : which)
  const out = new Float64Array(cells).fill(which === 'max' ? -Infinity : 0)
  for (let k = 0; k < n; k++) {
    const v = part(k)
    if (which === 'max') for (let c = 0; c < cells; c++) out[c] = v[c] > out[c] || v[c] !== v[c] ? v[c] : out[c]
    else for (let c = 0; c < cells; c++) out[c] += v[c]/n
  }
  return out
}

function reduced(m, i, layer, head) {             // word i of one method's maps -> (h*w): over heads, then over layers
  const [, L, H, h, w] = m.shape, cells = h*w
  function one(at) { const v = new Float64Array(cells), unit = m.max[at]/255, from = at*cells; for (let c = 0; c < cells; c++) v[c] = m.q[from + c]*unit; return v }
  return gather(L, layer, l => gather(H, head, k => one((i*L + l)*H + k), cells), cells)
}

const largest = v => v.reduce((a, b) => b > a || b !== b ? b : a, 0)

function choice(panel, s) {                       // every word's map and its peak, kept until method, layer or head change; a map that is no number peaks at 0
  const m = panel.maps[s.method], key = [s.method, s.layer, s.head].join()
  if (panel.key !== key) {
    panel.key = key
    panel.each = Array.from({length: m.shape[0]}, (_, i) => reduced(m, i, s.layer, s.head))
    panel.peaks = Float64Array.from(panel.each, v => { const p = largest(v); return isFinite(p) ? p : 0 })
    panel.top = largest(panel.peaks)
  }
  return panel
}

const peaks = (panel, s) => choice(panel, s).peaks
const full = (panels, panel, s) => s.scale === 'common' ? Math.max(...panels.map(p => choice(p, s).top)) : s.scale === 'model' ? choice(panel, s).top : peaks(panel, s)[s.word]
const shown = (panel, s) => peaks(panel, s)[s.word] > 0 ? panel.each[s.word] : null

function line(N, n, smooth) {                     // n cells along N pixels: for each pixel the four cells about it, and how far it is from the second to the third
  const cells = new Int32Array(4*N), t = new Float64Array(N)
  for (let k = 0; k < N; k++) {
    const place = (k + .5)*n/N, x = smooth ? Math.min(Math.max(place - .5, 0), n - 1) : Math.floor(place), lo = Math.floor(x)
    for (let j = 0; j < 4; j++) cells[4*k + j] = Math.min(Math.max(lo + j - 1, 0), n - 1)
    t[k] = x - lo
  }
  return {cells, t}
}

function cubic(a, b, c, d, t) {                   // Catmull and Rom's curve from b to c, never outside of the two
  const y = b + .5*t*(c - a + t*(2*a - 5*b + 4*c - d + t*(3*(b - c) + d - a)))
  return b < c ? Math.min(Math.max(y, b), c) : Math.min(Math.max(y, c), b)
}

function spread(v, h, w, H, W, smooth) {          // (h*w) -> (H*W): each cell a block, or blended between cells' centres, as overlay.upsample_map does
  const rows = new Float64Array(H*w), out = new Float64Array(H*W), ys = line(H, h, smooth), xs = line(W, w, smooth)
  for (let y = 0; y < H; y++) {
    const [a, b, c, d] = ys.cells.subarray(4*y, 4*y + 4)
    for (let x = 0; x < w; x++) rows[y*w + x] = cubic(v[a*w + x], v[b*w + x], v[c*w + x], v[d*w + x], ys.t[y])
  }
  for (let x = 0; x < W; x++) {
    const [a, b, c, d] = xs.cells.subarray(4*x, 4*x + 4)
    for (let y = 0; y < H; y++) { const r = y*w; out[y*W + x] = cubic(rows[r + a], rows[r + b], rows[r + c], rows[r + d], xs.t[x]) }
  }
  return out
}

function inside(v, h, w, truth) {                 // share of the map within the structure, and the structure's share of the image
  const {mask, shape: [H, W]} = truth, big = spread(v, h, w, H, W, false)
  let all = 0, hit = 0, area = 0
  for (let k = 0; k < H*W; k++) { all += big[k]; if (mask[k]) { hit += big[k]; area++ } }
  return [hit/all, area/(H*W)]
}

// ---- drawing ------------------------------------------------------------------------------------------------------------

function overlay(canvas, panel, s, lut, top) {   // the picture under the word's heat, pixel by pixel
  const {width: W, height: H} = canvas, ctx = canvas.getContext('2d', {willReadFrequently: true})
  const v = shown(panel, s), px = new Uint8ClampedArray(panel.pixels.data)
  if (v) {
    const [, , , h, w] = panel.maps[s.method].shape, big = spread(v, h, w, H, W, s.smooth)
    for (let k = 0; k < H*W; k++) {
      const t = Math.min(big[k]/top, 1), c = 3*Math.round(255*t), a = s.opacity*t*(2 - t), o = 4*k
      px[o] = (1 - a)*px[o] + a*lut[c]; px[o + 1] = (1 - a)*px[o + 1] + a*lut[c + 1]; px[o + 2] = (1 - a)*px[o + 2] + a*lut[c + 2]   // rounds by itself
    }
  }
  ctx.putImageData(new ImageData(px, W, H), 0, 0)
  const truth = panel.truth[s.word]
  if (truth && s.outline) contour(ctx, truth, W, H)
}

function contour(ctx, {mask, shape: [H, W]}, width, height) {   // white under black: seen on every colour
  const path = new Path2D(), at = (y, x) => y >= 0 && x >= 0 && y < H && x < W && mask[y*W + x] ? 1 : 0, fx = width/W, fy = height/H
  for (let y = 0; y <= H; y++) for (let x = 0; x <= W; x++) {
    if (at(y, x) !== at(y - 1, x)) { path.moveTo(x*fx, y*fy); path.lineTo((x + 1)*fx, y*fy) }
    if (at(y, x) !== at(y, x - 1)) { path.moveTo(x*fx, y*fy); path.lineTo(x*fx, (y + 1)*fy) }
  }
  ctx.lineCap = 'square'
  for (const [colour, wide] of [['#fff', 4], ['#222', 1.5]]) { ctx.strokeStyle = colour; ctx.lineWidth = wide; ctx.stroke(path) }
}

async function opened(p) {                   // a panel as it was sent -> what drawing needs
  const maps = {}, truth = {}
  for (const [name, m] of Object.entries(p.maps)) maps[name] = {shape: m.shape, q: bytes(m.q), max: floats(m.max)}
  for (const [i, t] of Object.entries(p.truth)) truth[i] = {shape: t.shape, mask: bytes(t.mask)}
  const picture = await createImageBitmap(new Blob([bytes(p.picture)], {type: 'image/png'}))
  const canvas = Object.assign(document.createElement('canvas'), {width: picture.width, height: picture.height})
  const ctx = canvas.getContext('2d'); ctx.drawImage(picture, 0, 0)
  return {label: p.label, maps, truth, pixels: ctx.getImageData(0, 0, picture.width, picture.height)}
}

// ---- the page: words come from data, so they enter as text only ------------------------------------------------------------

const own = {'data-lm-suppress-shortcuts': 'true'}   // on what can have the focus: else JupyterLab takes the keys (dd deletes the cell)

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v)
  e.append(...children)                           // strings become text nodes
  return e
}

function chooser(name, choices, get, set) {
  const select = make('select', {'data-name': name, ...own}, ...choices.map(([value, text]) => make('option', {value: JSON.stringify(value)}, text)))
  select.addEventListener('change', () => set(JSON.parse(select.value)))
  return {node: make('label', {}, name + ' ', select), draw: () => { select.value = JSON.stringify(get()) }}
}

function ticked(name, text, get, set) {
  const box = make('input', {type: 'checkbox', 'data-name': name, ...own})
  box.addEventListener('change', () => set(box.checked))
  return {node: make('label', {}, box, ' ' + text), draw: () => { box.checked = get() }}
}

function slider(name, get, set) {
  const range = make('input', {type: 'range', min: 0, max: 1, step: .05, 'data-name': name, ...own})
  range.addEventListener('input', () => set(Number(range.value)))
  return {node: make('label', {}, name + ' ', range), draw: () => { range.value = get() }}
}

function text(words, answered, panels) {          // the words as a list to choose from, prompt and answer each a group
  const list = make('div', {class: 'mmkit-words', role: 'listbox', 'aria-label': 'words of prompt and answer', 'aria-orientation': 'horizontal'})
  const options = []; let group = null
  words.forEach((word, i) => {
    const side = answered[i] ? 'answer' : 'prompt'
    if (!group || group.dataset.side !== side) {
      group = make('div', {role: 'group', 'aria-label': side, 'data-side': side}, make('span', {class: 'mmkit-side', 'aria-hidden': 'true'}, side))
      list.append(group)
    }
    const [, blank, rest] = /^(\s*)([^]*)$/.exec(word)
    const option = make('span', {role: 'option', 'data-i': i, class: 'mmkit-word', ...own}, rest || (blank.includes('\n') ? '⏎' : '␣'))
    if (!rest) option.setAttribute('aria-label', 'blank')
    if (panels.some(p => p.truth[i])) option.classList.add('mmkit-known')
    option.bars = panels.map((_, k) => make('i', {class: `mmkit-bar mmkit-of${k}`, 'aria-hidden': 'true'}))
    option.append(make('span', {class: 'mmkit-bars', 'aria-hidden': 'true'}, ...option.bars))
    options.push(option)
    group.append(rest && group.childNodes.length > 1 ? blank : '', option, rest ? '' : blank)
  })
  return {list, options}
}

function neighbour(options, i, key) {             // where an arrow leads from word i
  if (key === 'ArrowRight') return Math.min(i + 1, options.length - 1)
  if (key === 'ArrowLeft') return Math.max(i - 1, 0)
  if (key === 'Home') return 0
  if (key === 'End') return options.length - 1
  const boxes = options.map(o => o.getBoundingClientRect()), here = boxes[i], middle = b => (b.left + b.right)/2
  const rows = boxes.map((b, k) => [k, b]).filter(([, b]) => key === 'ArrowDown' ? b.top > here.top + 4 : b.top < here.top - 4)
  if (!rows.length) return i
  const line = key === 'ArrowDown' ? Math.min(...rows.map(([, b]) => b.top)) : Math.max(...rows.map(([, b]) => b.top))
  return rows.filter(([, b]) => Math.abs(b.top - line) < 4).sort(([, a], [, b]) => Math.abs(middle(a) - middle(here)) - Math.abs(middle(b) - middle(here)))[0][0]
}

async function render({model, el}) {
  const {words, answered, methods, lut: colours, panels: sent} = model.get('_sent'), lut = bytes(colours), panels = await Promise.all(sent.map(opened))
  const names = ['word', 'method', 'layer', 'head', 'opacity', 'scale', 'smooth', 'outline', 'held']
  const state = () => Object.fromEntries(names.map(n => [n, model.get(n)]))
  const set = (name, value) => { if (model.get(name) !== value) { model.set(name, value); model.save_changes() } }
  const size = axis => Math.min(...panels.map(p => p.maps[model.get('method')].shape[axis]))
  const fit = () => { for (const [name, axis] of [['layer', 1], ['head', 2]]) if (size(axis) > 1 && model.get(name) >= size(axis)) set(name, 'mean') }
  const numbered = axis => ['mean', 'max', ...Array(size(axis)).keys()].map(v => [v, String(v)])

  // controls
  const row = make('div', {class: 'mmkit-controls'})
  let controls = []
  function lay() {
    const pick = (name, choices) => chooser(name, choices, () => model.get(name), v => set(name, v))
    const held = row.contains(document.activeElement) ? document.activeElement.dataset.name : null
    controls = [methods.length > 1 && pick('method', methods.map(m => [m, m])), size(1) > 1 && pick('layer', numbered(1)), size(2) > 1 && pick('head', numbered(2)),
      slider('opacity', () => model.get('opacity'), v => set('opacity', v)),
      pick('scale', [['common', 'one for all'], ...(panels.length > 1 || model.get('scale') === 'model' ? [['model', 'by model']] : []), ['word', 'by word']]),
      ticked('smooth', 'smooth', () => model.get('smooth'), v => set('smooth', v)),
      panels.some(p => Object.keys(p.truth).length) && ticked('outline', 'outline', () => model.get('outline'), v => set('outline', v))].filter(Boolean)
    row.replaceChildren(...controls.map(c => c.node))
    if (held) row.querySelector(`[data-name="${held}"]`)?.focus()
  }

  // pictures
  const figures = panels.map((p, k) => {
    const canvas = make('canvas', {width: p.pixels.width, height: p.pixels.height, role: 'img'})
    const bar = make('span', {class: 'mmkit-scale', 'aria-hidden': 'true'}), limit = make('span'), said = make('div', {class: 'mmkit-said'})
    bar.style.background = `linear-gradient(to right, ${[0, 51, 102, 153, 204, 255].map(c => `rgb(${lut.slice(3*c, 3*c + 3)})`)})`
    const node = make('figure', {}, make('figcaption', {}, make('i', {class: `mmkit-chip mmkit-of${k}`}), p.label), canvas, make('div', {class: 'mmkit-legend'}, '0 ', bar, limit), said)
    return {node, canvas, limit, said}
  })

  // words
  const {list, options} = text(words, answered, panels)
  const live = make('div', {class: 'mmkit-live', role: 'status'}), hint = make('div', {class: 'mmkit-hint'})
  list.addEventListener('pointerover', e => { const o = e.target.closest('[data-i]'); if (o && !model.get('held')) set('word', Number(o.dataset.i)) })
  list.addEventListener('click', e => {
    const o = e.target.closest('[data-i]'); if (!o) return
    const i = Number(o.dataset.i), again = model.get('held') && model.get('word') === i
    set('word', i); set('held', !again); o.focus({preventScroll: true})
  })
  list.addEventListener('keydown', e => {
    if (e.ctrlKey || e.altKey || e.metaKey || e.shiftKey) return
    if (['ArrowRight', 'ArrowLeft', 'ArrowUp', 'ArrowDown', 'Home', 'End'].includes(e.key)) {
      set('word', neighbour(options, model.get('word'), e.key)); options[model.get('word')].focus({preventScroll: true})
    } else if (e.key === 'Enter' || e.key === ' ') set('held', !model.get('held'))
    else if (e.key === 'Escape') set('held', false)
    else return
    e.preventDefault(); e.stopPropagation()
  })

  function draw() {
    const s = state(), common = Math.max(...panels.map(p => choice(p, s).top))
    for (const c of controls) c.draw()
    options.forEach((o, i) => {
      const chosen = i === s.word
      o.setAttribute('aria-selected', chosen); o.tabIndex = chosen ? 0 : -1
      o.classList.toggle('mmkit-held', chosen && s.held)
      o.classList.toggle('mmkit-none', panels.every(p => !(peaks(p, s)[i] > 0)))
      o.bars.forEach((b, k) => { b.style.height = `${Math.ceil(7*peaks(panels[k], s)[i]/(common || 1))}px` })
    })
    const chosen = options[s.word], [a, b] = [chosen.getBoundingClientRect(), list.getBoundingClientRect()]
    if (a.top < b.top) list.scrollTop -= b.top - a.top + 6
    if (a.bottom > b.bottom) list.scrollTop += a.bottom - b.bottom + 6
    const told = panels.map((p, k) => {
      const {canvas, limit, said} = figures[k], v = shown(p, s), top = full(panels, p, s), [, , , h, w] = p.maps[s.method].shape
      overlay(canvas, p, s, lut, top)
      limit.textContent = ' ' + figure(top)
      const peak = v ? `peak ${figure(peaks(p, s)[s.word])} on a ${h} × ${w} grid` : 'no map for this word'
      const share = v && p.truth[s.word] ? inside(v, h, w, p.truth[s.word]) : null
      const more = share ? `inside the outline: ${Math.round(100*share[0])}% of the map, ${Math.round(100*share[1])}% of the image` : ''
      said.replaceChildren(make('b', {}, words[s.word].trim() || 'blank'), make('br'), peak, ...(more ? [make('br'), more] : []))
      canvas.setAttribute('aria-label', `${p.label}, ${words[s.word].trim() || 'blank'}: ${peak}; ${more}`)
      return `${p.label}: ${peak}${more ? ', ' + more : ''}`
    })
    live.textContent = `${words[s.word].trim() || 'blank'}. ${told.join('. ')}`
    hint.textContent = s.held ? 'held: Esc, or the word again, lets it go' : 'point at a word, or ← → ↑ ↓ Home End; Enter or a click holds it'
  }

  const root = make('div', {class: 'mmkit-viewer', role: 'group', 'aria-label': 'token viewer'}, row,
    make('div', {class: 'mmkit-body'}, make('div', {class: `mmkit-figures mmkit-${panels.length}`}, ...figures.map(f => f.node)), make('div', {class: 'mmkit-text'}, list, hint)), live)
  root.look = () => { const s = state(); return panels.map(p => ({map: shown(p, s), top: full(panels, p, s)})) }   // for tests, and for the curious
  lay(); el.append(root); draw()
  const changed = () => draw(), relaid = () => { fit(); lay(); draw() }
  for (const n of names) model.on(`change:${n}`, n === 'method' ? relaid : changed)
  return () => { for (const n of names) model.off(`change:${n}`, n === 'method' ? relaid : changed) }
}

export default {render}
