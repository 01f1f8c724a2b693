// Without this script the page shows all plots and tables; it adds files to save, tooltips and the choice of a layer.
"use strict";
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};

function save(name, kind, content) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type: kind })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
const quoted = (cell) => {
  if (cell === null) return "";
  const text = String(cell);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
for (const button of document.querySelectorAll("button[data-csv]")) {
  button.hidden = false;
  const table = numbers.tables[button.dataset.csv];
  button.setAttribute("aria-label", `Save as CSV: ${table.caption}`);
  button.addEventListener("click", () => {
    const lines = [table.columns, ...table.rows].map((row) => row.map(quoted).join(","));
    save(`${button.dataset.csv}.csv`, "text/csv", `${lines.join("\r\n")}\r\n`);
  });
}
document.querySelector(".files").hidden = false;
document.getElementById("all-numbers").addEventListener("click", () => {
  save("routing.json", "application/json", document.getElementById("numbers").textContent);
});

const choosers = [...document.querySelectorAll("select.layer")];
function chooseLayer(chooser) {
  for (const figure of chooser.closest("section").querySelectorAll("figure[data-layer]")) {
    figure.hidden = figure.dataset.layer !== chooser.value;
  }
}
for (const chooser of choosers) {
  chooser.closest(".chooser").hidden = false;
  chooser.addEventListener("change", () => {
    for (const other of choosers) {
      if ([...other.options].some((option) => option.value === chooser.value)) other.value = chooser.value;
      chooseLayer(other);
    }
  });
  chooseLayer(chooser);
}

const tip = document.getElementById("tip");
function showTip(event, words) {
  tip.hidden = !words;
  if (!words) return;
  tip.textContent = words;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 4)}px`;
}
const shown = (value) => (value === null || value === undefined ? "no value" : typeof value === "number" ? `${+value.toPrecision(4)}` : value);
for (const plot of document.querySelectorAll("svg.heatmap, svg.bars")) {
  const { x, y, w, h, rows, columns } = plot.dataset;
  const table = numbers.tables[plot.closest("figure").id.slice("figure-".length)];
  const titles = [...plot.querySelectorAll("text.axis")].map((title) => title.textContent);
  plot.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    const column = Math.floor((at.x - x) / w);
    const row = Math.floor((at.y - y) / h);
    if (row < 0 || column < 0 || row >= (rows ?? 1) || column >= columns) return showTip(event, "");
    if (rows === undefined) return showTip(event, `${titles[0]} ${table.rows[column][0]}: ${table.columns[1]} ${shown(table.rows[column][1])}`);
    const cells = table.rows[row];
    return showTip(event, `${titles[1]} ${cells[0]}, ${titles[0]} ${table.columns[column + 1]}: ${shown(cells[column + 1])}`);
  });
  plot.addEventListener("pointerleave", (event) => showTip(event, ""));
}
