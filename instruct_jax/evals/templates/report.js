// The page says all it has to say without this; it adds filters, the key that
// closes a plot, and a hint above tables that are wider than the screen.
(function () {
  document.documentElement.classList.add('js');
  function all(selector, within) {
    return Array.prototype.slice.call(
      (within || document).querySelectorAll(selector));
  }

  function hint() {
    all('.scroll').forEach(function (box) {
      box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth;
    });
  }
  window.addEventListener('resize', hint);
  hint();
  document.addEventListener('keydown', function (event) {
    var open = document.querySelector('figure:target');
    if (event.key === 'Escape' && open) {
      open.querySelector('.close').click();
    }
  });
  // Closed parts would be missing on paper.
  window.addEventListener('beforeprint', function () {
    all('details').forEach(function (part) { part.open = true; });
  });

  var category = document.getElementById('category');
  if (!category) { return; }
  var list = document.getElementById('samples');
  var rows = all('article', list);
  var search = document.getElementById('search');
  var order = document.getElementById('order');
  var count = document.getElementById('shown');
  var more = document.getElementById('more');
  var boxes = all('.filters input[type=checkbox]');
  var step = 30, limit = step;

  function apply() {
    var wanted = search.value.toLowerCase(), found = 0;
    rows.forEach(function (row) {
      var fits = (!category.value ||
        row.dataset.category === category.value) &&
        row.textContent.toLowerCase().indexOf(wanted) >= 0;
      found += fits;
      row.hidden = !fits || found > limit;
    });
    count.textContent = found + ' of ' + rows.length + ' prompts' +
      (found > limit ? ', the first ' + limit + ' shown' : '');
    more.hidden = found <= limit;
    boxes.forEach(function (box) {
      all('[data-model="' + box.value + '"]', list).forEach(function (answer) {
        answer.hidden = !box.checked;
      });
    });
  }
  function again() {
    limit = step;
    apply();
  }
  function sort() {
    var sign = { first: 0, gain: -1, loss: 1 }[order.value];
    rows.sort(function (a, b) {
      return sign * (a.dataset.gain - b.dataset.gain) ||
        a.dataset.number - b.dataset.number;
    });
    rows.forEach(function (row) { list.appendChild(row); });
    again();
  }
  location.hash.slice(1).split('&').forEach(function (part) {
    var pair = part.split('=').map(decodeURIComponent);
    var field = { category: category, search: search, order: order }[pair[0]];
    if (field && pair.length === 2) { field.value = pair[1]; }
  });
  category.addEventListener('change', again);
  search.addEventListener('input', again);
  order.addEventListener('change', sort);
  boxes.forEach(function (box) { box.addEventListener('change', apply); });
  more.addEventListener('click', function () {
    limit += step;
    apply();
  });
  sort();
})();
