"use strict";
// A page without scripts shows all of it; with them, its tables are sorted by any column, and filtered.

const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
};

const compare = (column, figures) => (one, other) => {
  if (!figures) return one.cells[column].textContent.localeCompare(other.cells[column].textContent);
  const [a, b] = [value(one, column), value(other, column)];
  return a - b;
};

// Rows without a figure stay last, whichever way the others go.
const sorted = (rows, column, direction) => {
  const figures = rows.some((row) => value(row, column) !== null);
  const last = (row) => (figures ? value(row, column) === null : row.cells[column].textContent.trim() === "");
  const order = rows.filter((row) => !last(row)).sort(compare(column, figures));
  if (direction === "descending") order.reverse();
  return order.concat(rows.filter(last));
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  for (const head of heads.filter((cell) => cell.textContent.trim())) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : sorted(original, head.cellIndex, next)));
    });
  }
}

for (const form of document.querySelectorAll("form.filter")) {
  const rows = [...document.getElementById(form.dataset.for).querySelectorAll("table.sortable > tbody > tr")];
  const search = form.querySelector("input");
  const choices = [...form.querySelectorAll("select")];
  const told = form.querySelector("output");
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const chosen = choices.every((each) => !each.value || row.getAttribute(`data-${each.dataset.key}`) === each.value);
      row.hidden = !(chosen && words.every((word) => text.includes(word)));
      shown += !row.hidden;
    }
    told.value = `${shown} of ${rows.length} rows`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}
