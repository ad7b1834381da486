"use strict";
// Paper shows what can be unfolded.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  unfolded.forEach((each) => { each.open = true; });
});
addEventListener("afterprint", () => unfolded.forEach((each) => { each.open = false; }));

// Sorts tables by a column: a button in each header, its state in aria-sort, said aloud in the status line.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const status = document.getElementById("status");
  heads.forEach((head, column) => {
    const name = head.textContent.trim();
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? way : "none"));
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const number = head.classList.contains("number");
      const sorted = [...body.rows].sort((a, b) =>
        number ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)),
      );
      body.append(...(way === "ascending" ? sorted : sorted.reverse()));
      status.textContent = `Sorted by ${name}, ${way}.`;
    });
  });
}
