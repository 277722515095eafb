"use strict";
const selects = [...document.querySelectorAll("select[data-facet]")];
const rows = [...document.querySelectorAll("#runs tbody tr")];
const count = document.getElementById("count");

function filter() {
  const wanted = selects.filter((each) => each.value).map((each) => `${each.dataset.facet}=${each.value}`);
  let shown = 0;
  for (const row of rows) {
    const facets = row.dataset.facets.split("\n");
    row.hidden = !wanted.every((each) => facets.includes(each));
    shown += row.hidden ? 0 : 1;
  }
  if (count) count.textContent = `${shown} of ${rows.length} runs`;
  const query = new URLSearchParams(selects.filter((each) => each.value).map((each) => [each.dataset.facet, each.value]));
  history.replaceState(null, "", query.size ? `#${query}` : location.pathname + location.search);
}

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const select = selects.find((each) => each.dataset.facet === name);
  if (select && [...select.options].some((option) => option.value === value)) select.value = value;
}
for (const select of selects) select.addEventListener("change", filter);
filter();
