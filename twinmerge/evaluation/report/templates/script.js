"use strict";
// A test reads these two from the page: did all of this run?
window.addEventListener("error", (e) => { document.documentElement.dataset.error = e.message; });

// Columns sort by data-v, else by text; the second click turns the order round.
for (const head of document.querySelectorAll("thead th")) {
  const button = head.querySelector("button");
  if (!button) continue;
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[head.cellIndex];
      return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
    };
    const order = (a, b) => typeof a === "number" && typeof b === "number"
      ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)) * (up ? 1 : -1));
    body.append(...rows);
  });
}

// What has a data-tip says it under the pointer, or when it is touched.
const tip = document.getElementById("tip");
const show = (event) => {
  const at = event.target.closest("[data-tip]");
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = at.dataset.tip;
  const box = at.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(4, Math.min(innerWidth - tip.offsetWidth - 4, left))}px`;
  tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
};
document.addEventListener("pointerover", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
document.documentElement.dataset.ready = "yes";
