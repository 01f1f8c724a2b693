// The page is complete without this script: it only hides the layers that are not chosen and adds tooltips.
const chooser = document.getElementById("chooser");
const sections = [...document.querySelectorAll("section.layer")];
function choose(layer) {
  for (const section of sections) section.hidden = section.dataset.layer !== layer;
}
if (chooser) {
  chooser.closest(".chooser").hidden = false;
  chooser.addEventListener("change", () => choose(chooser.value));
  choose(chooser.value);
}

const tip = document.getElementById("tip");
for (const plot of document.querySelectorAll("svg.heatmap")) {
  const { x, y, w, h, rows, columns } = plot.dataset;
  const table = plot.closest("figure").querySelector("table.values");
  const titles = plot.querySelectorAll("text.axis");
  plot.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    const column = Math.floor((at.x - x) / w);
    const row = Math.floor((at.y - y) / h);
    tip.hidden = row < 0 || column < 0 || row >= rows || column >= columns;
    if (tip.hidden) return;
    const cells = table.tBodies[0].rows[row].cells;
    const value = cells[column + 1] ? cells[column + 1].textContent : "no expert";
    tip.textContent = `${titles[1].textContent} ${cells[0].textContent}, ${titles[0].textContent} ${column}: ${value}`;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  plot.addEventListener("pointerleave", () => { tip.hidden = true; });
}
