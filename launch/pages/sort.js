// Sorts a table by the column whose title is pressed; rows without a key come last.
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const compare = (a, b) => {
    const x = a.cells[column].dataset.key, y = b.cells[column].dataset.key;
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  };
  body.append(...[...body.rows].sort(compare));
});
