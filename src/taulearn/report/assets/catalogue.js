"use strict";
const selects = [...document.querySelectorAll("select[data-facet]")];
const rows = [...document.querySelectorAll("#runs tbody tr")];
const count = document.getElementById("count");

function filter() {
  const wanted = selects.filter((each) => each.value);
  let shown = 0;
  for (const row of rows) {
    const facets = JSON.parse(row.dataset.facets);
    row.hidden = !wanted.every((each) => facets[each.dataset.facet] === each.value);
    shown += row.hidden ? 0 : 1;
  }
  if (count) count.textContent = `${shown} of ${rows.length} runs`;
  const query = new URLSearchParams(wanted.map((each) => [each.dataset.facet, each.value]));
  history.replaceState(null, "", query.size ? `#${query}` : location.pathname + location.search);
}

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const select = selects.find((each) => each.dataset.facet === name);
  if (select && [...select.options].some((option) => option.value === value)) select.value = value;
}
for (const select of selects) select.addEventListener("change", filter);
filter();
