// Ranking by drag, touch and keys; file import; drafts. Every page also
// works without this script: it moves cards, and the lists hold the ranks.
'use strict';

function setUpRanking(list) {
  const count = Number(list.dataset.ranks);
  const announcement = document.getElementById('announcement');
  const board = document.createElement('div');
  board.className = 'board';
  const columns = [];
  for (let rank = 0; rank <= count; rank++) {
    const column = document.createElement('section');
    column.className = 'rank-column';
    column.dataset.rank = rank || '';
    const title = document.createElement('h3');
    title.id = 'rank-title' + rank;
    title.textContent = rank === 0 ? 'Not ranked yet' : 'Rank ' + rank +
      (rank === 1 ? ' (best)' : rank === count ? ' (worst)' : '');
    column.setAttribute('aria-labelledby', title.id);
    const cards = document.createElement('ul');
    cards.className = 'rank';
    column.append(title, cards);
    columns.push(column);
    board.append(column);
  }
  const selectOf = (card) => card.querySelector('select');
  const rankOf = (card) => Number(selectOf(card).value || 0);

  function place(card) {
    const cards = columns[rankOf(card)].querySelector('ul');
    if (card.parentElement !== cards) cards.append(card);
    columns[0].hidden = !columns[0].querySelector('.card');
  }

  function move(card, rank) {
    selectOf(card).value = rank ? String(rank) : '';
    place(card);
    announcement.textContent = 'Output ' + card.dataset.letter +
      (rank ? ' is now at rank ' + rank : ' is not ranked');
    card.dispatchEvent(new Event('input', {bubbles: true}));
  }

  for (const card of [...list.children]) {
    const handle = card.querySelector('.handle');
    handle.hidden = false;
    selectOf(card).addEventListener('change', () => {
      move(card, rankOf(card));
      selectOf(card).focus();
    });
    handle.addEventListener('keydown', (event) => {
      const now = rankOf(card);
      let rank;
      if (event.key === 'ArrowUp') rank = now ? Math.max(1, now - 1) : count;
      else if (event.key === 'ArrowDown') rank = Math.min(count, now + 1);
      else if (event.key === 'Home') rank = 1;
      else if (event.key === 'End') rank = count;
      else if (/^[1-9]$/.test(event.key) && Number(event.key) <= count) {
        rank = Number(event.key);
      } else return;
      event.preventDefault();
      move(card, rank);
      handle.focus();
    });
    setUpDrag(card, handle, columns, move);
    place(card);
  }
  list.replaceWith(board);
}

// Pointer events cover mouse, pen and touch.
function setUpDrag(card, handle, columns, move) {
  let startX = 0;
  let startY = 0;
  let target = null;
  const columnAt = (x, y) => {
    const found = document.elementFromPoint(x, y);
    return found && found.closest('.rank-column');
  };
  function over(column) {
    for (const each of columns) each.classList.toggle('over', each === column);
    target = column;
  }
  function end() {
    card.classList.remove('dragging');
    card.style.removeProperty('transform');
    card.style.removeProperty('pointer-events');
    over(null);
  }
  handle.addEventListener('pointerdown', (event) => {
    if (event.button !== 0) return;
    startX = event.clientX;
    startY = event.clientY + window.scrollY;
    handle.setPointerCapture(event.pointerId);
    card.classList.add('dragging');
  });
  handle.addEventListener('pointermove', (event) => {
    if (!card.classList.contains('dragging')) return;
    const edge = 60;
    if (event.clientY < edge) window.scrollBy(0, -15);
    if (event.clientY > window.innerHeight - edge) window.scrollBy(0, 15);
    const x = event.clientX - startX;
    const y = event.clientY + window.scrollY - startY;
    card.style.transform = `translate(${x}px, ${y}px)`;
    card.style.pointerEvents = 'none';
    over(columnAt(event.clientX, event.clientY));
  });
  handle.addEventListener('pointerup', () => {
    if (!card.classList.contains('dragging')) return;
    const column = target;
    end();
    if (column) move(card, Number(column.dataset.rank || 0));
    handle.focus();
  });
  handle.addEventListener('pointercancel', end);
}

for (const list of document.querySelectorAll('[data-ranks]')) {
  setUpRanking(list);
}

// Keys of the form of a page. Those without Ctrl do nothing while somebody
// types, and can be turned off: voice control may press them by accident.
function setUpKeys(list) {
  const form = document.querySelector('form[data-keys]');
  const toggle = list.querySelector('input');
  const name = 'labeling-keys';
  list.hidden = false;
  try {
    toggle.checked = localStorage.getItem(name) !== 'off';
    toggle.addEventListener('change', () => {
      localStorage.setItem(name, toggle.checked ? 'on' : 'off');
    });
  } catch { /* Without storage, the choice holds for this page. */ }

  function choose(radio) {
    radio.checked = true;
    radio.focus();
    radio.dispatchEvent(new Event('input', {bubbles: true}));
  }

  document.addEventListener('keydown', (event) => {
    const from = event.target;
    if (event.defaultPrevented || event.isComposing) return;
    if (from.form && from.form !== form) return;
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit(form.querySelector('button.main'));
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (!toggle.checked) return;
    if (from.closest('textarea, select, input:not([type=radio])')) return;
    const key = event.key;
    let found = null;
    if (key === '[') {
      found = form.querySelector('[data-back]');
      if (found) found.click();
    } else if (/^[0-9]$/.test(key)) {
      const scale = form.querySelector('.scale');
      found = scale && scale.querySelector(`input[value="${key}"]`);
      if (found) choose(found);
    } else if (/^[a-zA-Z]$/.test(key)) {
      found = form.querySelector(
        `.card[data-letter="${key.toUpperCase()}"] .handle`);
      if (found) found.focus();
    }
    if (found) event.preventDefault();
  });
}

for (const list of document.querySelectorAll('[data-shortcuts]')) {
  setUpKeys(list);
}

for (const input of document.querySelectorAll('[data-fills]')) {
  input.addEventListener('change', async () => {
    input.setCustomValidity('');
    if (!input.files.length) return;
    const bytes = await input.files[0].arrayBuffer();
    try {
      const decoder = new TextDecoder('utf-8', {fatal: true});
      document.getElementById(input.dataset.fills).value =
        decoder.decode(bytes);
    } catch {
      input.setCustomValidity('This file is not UTF-8. Please convert it.');
      input.reportValidity();
    }
  });
}

// Reloads progress every ten seconds, unless it is hidden or has the focus.
for (const part of document.querySelectorAll('[data-live]')) {
  setInterval(async () => {
    if (document.hidden || part.contains(document.activeElement)) return;
    const reply = await fetch(location.href).catch(() => null);
    if (!reply || !reply.ok) return;
    const page = new DOMParser().parseFromString(
      await reply.text(), 'text/html');
    const fresh = page.getElementById(part.id);
    if (fresh) part.replaceChildren(...fresh.childNodes);
  }, 10000);
}

// Whether a field was changed, which can happen before this script runs.
function differs(field) {
  if (field.type === 'radio' || field.type === 'checkbox') {
    return field.checked !== field.defaultChecked;
  }
  if (field.tagName === 'SELECT') {
    const chosen = [...field.options].findIndex((o) => o.defaultSelected);
    return field.selectedIndex !== Math.max(0, chosen);
  }
  return 'defaultValue' in field && field.value !== field.defaultValue;
}

// Saves a draft two seconds after the last change. Leaving the page earlier asks
// for confirmation.
function setUpDrafts(form) {
  const status = form.querySelector('[data-saved]');
  let changed = false;
  let timer = null;
  let saving = null;

  async function save() {
    const body = new URLSearchParams(new FormData(form));
    body.set('action', 'autosave');
    changed = false;
    status.textContent = '';
    const reply = await fetch(form.getAttribute('action'), {
      method: 'POST', body, signal: AbortSignal.timeout(10000),
    }).catch(() => null);
    const saved = reply !== null && [202, 204].includes(reply.status);
    status.textContent = saved ? 'Draft saved' : 'The draft is not saved yet';
    if (saved && reply.status === 202) status.textContent = await reply.text();
    if (reply !== null && reply.status === 401) {
      status.textContent = 'You are signed out here; the draft is not saved';
    }
    if (!saved) changed = true;
    saving = null;
    // The site would refuse again what it has refused.
    if (changed && (saved || reply === null)) schedule(saved ? 2000 : 10000);
  }

  function schedule(milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(() => { saving = saving || save(); }, milliseconds);
  }

  form.addEventListener('input', () => {
    changed = true;
    if (!saving) schedule(2000);
  });
  form.addEventListener('submit', (event) => {
    clearTimeout(timer);
    if (saving) {
      // An older draft must not arrive after the answer.
      event.preventDefault();
      const button = event.submitter;
      saving.then(() => {
        clearTimeout(timer);
        form.requestSubmit(button);
      });
    } else {
      changed = false;
    }
  });
  window.addEventListener('beforeunload', (event) => {
    if (changed) event.preventDefault();
  });
  if ([...form.elements].some(differs)) {
    changed = true;
    schedule(2000);
  }
}

for (const form of document.querySelectorAll('form.answer')) setUpDrafts(form);
