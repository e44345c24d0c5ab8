"use strict";
const all = selector => [...document.querySelectorAll(selector)];

for (const box of all("[data-figure]"))
  box.addEventListener("change", () => document.getElementById(box.dataset.figure).hidden = !box.checked);

document.addEventListener("mouseover", event => {
  const title = event.target.querySelector?.(":scope > title");
  if (title) document.getElementById("operation").textContent = title.textContent;
});

// Wide pictures scroll together because they share one time scale.
for (const figure of all("figure"))
  figure.addEventListener("scroll", () => all("figure").forEach(other => other.scrollLeft = figure.scrollLeft));

// A click on a column's name sorts by it; a second click reverses the order. Unavailable schedules stay at the end.
for (const [column, head] of all("#comparison th").entries())
  head.addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    all("#comparison th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = row => column ? Number(row.cells[column].dataset.value) : row.cells[0].textContent.trim();
    const order = (one, two) => (one < two ? -1 : one > two ? 1 : 0) * (ascending ? 1 : -1);
    const body = document.querySelector("#comparison tbody");
    body.append(...all("tbody tr.shown").sort((one, two) => order(key(one), key(two))), ...all("tbody tr.absent"));
  });
