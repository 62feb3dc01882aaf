// The face of mmkit.audit.label_review.ReviewWidget: shows a card, sends what is decided. All text goes in as text, never as HTML.
const KEYS = {k: 'keep', r: 'remove', f: 'fix', u: 'undo'}
const STYLE = `
.mmkit-review { max-width: 760px; font-size: 14px; line-height: 1.4; outline: none; padding: 8px; border: 1px solid #8884; border-radius: 6px }
.mmkit-review:focus-within, .mmkit-review:focus { border-color: #0072B2 }
.mmkit-review .body { display: flex; flex-wrap: wrap; gap: 12px } .mmkit-review img { width: 220px; height: auto; align-self: flex-start }
.mmkit-review .words { flex: 1 1 300px; overflow-wrap: anywhere } .mmkit-review .why { color: #a33c00; font-style: italic; margin: .5em 0 }
.mmkit-review textarea { width: 100%; box-sizing: border-box; min-height: 4.5em; font: inherit; color: inherit; background: transparent }
.mmkit-review button { font: inherit; margin: 4px 6px 0 0; padding: 3px 12px; cursor: pointer } .mmkit-review button[aria-pressed=true] { outline: 2px solid #0072B2 }
.mmkit-review .bar { opacity: .75; font-size: 12px }`

function render({model, el}) {
  const make = (tag, attrs = {}, ...kids) => { const e = document.createElement(tag); for (const [k, v] of Object.entries(attrs)) k === 'text' ? e.textContent = v : e.setAttribute(k, v); e.append(...kids); return e }
  const img = make('img'), id = make('b'), label = make('span'), caption = make('textarea', {'aria-label': 'caption; change it to fix the pair'}), why = make('div', {class: 'why'}), place = make('span'), said = make('span', {role: 'status', 'aria-live': 'polite'})
  const button = (act, text, title) => { const b = make('button', {type: 'button', title, 'data-do': act, text}); b.addEventListener('click', () => act === 'back' ? walk(-1) : act === 'on' ? walk(1) : send(act)); return b }
  const buttons = [button('keep', 'Keep', 'the pair is right (k)'), button('remove', 'Remove', 'leave the pair out (r)'), button('fix', 'Fix', 'keep the picture with the caption as it stands in the box (f)'), button('undo', 'Undo', 'take the last decision back (u)'),
                   button('back', '←', 'the one before'), button('on', '→', 'the next one')]
  const root = make('div', {class: 'mmkit-review', tabindex: '0', role: 'group', 'aria-label': 'review of suspicious pairs', 'data-lm-suppress-shortcuts': 'true'}, make('style', {text: STYLE}),
    make('div', {class: 'bar'}, place), make('div', {class: 'body'}, img, make('div', {class: 'words'}, id, ' ', label, caption, why, make('div', {}, ...buttons), make('div', {class: 'bar'}, said))))
  const card = () => model.get('cards')[model.get('current')]

  function walk(by) { const n = model.get('cards').length, to = Math.min(Math.max(model.get('current') + by, 0), n - 1); model.set('current', to); model.save_changes() }
  function send(act) { model.send(act === 'fix' ? {do: 'fix', caption: caption.value} : {do: act}) }
  function draw() {
    const c = card(), made = model.get('decisions'), n = model.get('cards').length
    if (!c) { place.textContent = 'no pairs to review'; return }
    const own = made[String(c.row)]
    img.src = c.image; img.alt = `picture of ${c.id}`; img.style.visibility = c.image ? '' : 'hidden'
    id.textContent = c.id; label.textContent = c.label; why.textContent = c.reason; caption.value = own?.caption ?? c.caption
    place.textContent = `${model.get('current') + 1} of ${n}, suspicion ${c.suspicion.toFixed(2)}; ${model.get('cards').filter(k => made[String(k.row)]).length} decided`
    for (const b of buttons.slice(0, 3)) b.setAttribute('aria-pressed', String(own?.decision === b.dataset.do))
  }
  const tell = () => { said.textContent = model.get('status') }
  root.addEventListener('keydown', e => {
    if (e.ctrlKey || e.metaKey || e.altKey) return
    if (e.target === caption) { if (e.key === 'Escape') { root.focus(); e.preventDefault() } e.stopPropagation(); return }
    const act = KEYS[e.key.toLowerCase()]
    if (act === 'fix' && caption.value === card()?.caption) { caption.focus(); caption.select() }            // nothing changed yet: write first
    else if (act) send(act)
    else if (e.key === 'ArrowLeft' || e.key === 'ArrowRight') walk(e.key === 'ArrowLeft' ? -1 : 1)
    else return
    e.preventDefault(); e.stopPropagation()
  })
  model.on('change:cards change:current change:decisions', draw); model.on('change:status', tell); draw(); tell()
  el.append(root)
  return () => { model.off('change:cards change:current change:decisions', draw); model.off('change:status', tell) }
}
export default {render}
