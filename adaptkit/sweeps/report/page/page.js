"use strict";
for (const sheet of document.querySelectorAll(".sheet")) {
  const body = sheet.querySelector("tbody");
  const rows = [...body.rows];
  const heads = [...sheet.querySelectorAll("thead th")];
  const words = (cell) => cell.textContent.trim();
  const value = (cell) => (cell.dataset.sort === undefined ? null : Number(cell.dataset.sort));

  function sortBy(head) {
    const column = heads.indexOf(head);
    const numeric = rows.some((row) => value(row.cells[column]) !== null);
    const before = head.getAttribute("aria-sort");
    const falling = before === "none" ? numeric : before === "ascending";
    const compare = (a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      if (!numeric) return (falling ? -1 : 1) * words(x).localeCompare(words(y), undefined, { numeric: true });
      const [p, q] = [value(x), value(y)];
      if (p === null || q === null) return (p === null) - (q === null);  // what has no number stays last
      return falling ? q - p : p - q;
    };
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.append(...[...rows].sort(compare));
    for (const row of rows) row.classList.remove("starts");
  }
  for (const head of heads) head.querySelector("button").addEventListener("click", () => sortBy(head));

  const search = sheet.querySelector("[data-filter]");
  if (!search) continue;
  const selects = [...sheet.querySelectorAll("select")];
  const said = sheet.querySelector("output");
  function filter() {
    const parts = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = [...row.cells].map(words).join(" ").toLowerCase();
      const fits = parts.every((part) => text.includes(part)) &&
        selects.every((select) => !select.value || words(row.cells[select.dataset.column]) === select.value);
      row.hidden = !fits;
      shown += fits;
    }
    said.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  }
  search.addEventListener("input", filter);
  for (const select of selects) select.addEventListener("change", filter);
}
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus({ preventScroll: true });
  }
}
addEventListener("hashchange", openTarget);
openTarget();
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll(".group:not([open])")];
  for (const item of closed) item.open = true;
});
addEventListener("afterprint", () => { for (const item of closed) item.open = false; });
