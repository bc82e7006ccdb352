"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
for (const [id, figure] of Object.entries(data.figures)) {
  document.getElementById(id).style.height = `${figure.layout.height}px`;
  Plotly.newPlot(id, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}

const batches = document.getElementById("batch");
function showBatch() {
  for (const size of data.batches) {
    const figure = document.getElementById(`ms${size}`);
    figure.hidden = batches && String(size) !== batches.value;
    if (!figure.hidden) Plotly.Plots.resize(figure);
  }
}
if (batches) batches.addEventListener("change", showBatch);
showBatch();

const slider = document.getElementById("threshold");
const percent = (value, digits) => `${(100 * value).toFixed(digits)} %`;
function choose() {
  const point = data.curve[slider.value];
  const threshold = point.threshold === null ? "none: nobody leaves early" : point.threshold.toFixed(4);
  document.getElementById("at").textContent = threshold;
  slider.setAttribute("aria-valuetext",
    `${threshold}: ${percent(point.val.accuracy, 2)} right at ${percent(point.val.macs, 1)} of multiply-adds on val`);
  for (const split of ["val", "test"]) {
    const found = point[split];
    const show = (name, text) => { document.getElementById(`${name}-${split}`).textContent = text; };
    show("accuracy", percent(found.accuracy, 2));
    show("macs", percent(found.macs, 1));
    data.batches.forEach((size, index) => show(`ms${size}`, `${found.ms[index].toPrecision(3)} ms`));
    data.exits.forEach((name, index) => show(`share${index}`, percent(found.shares[index], 1)));
  }
  const ring = (x) => ({
    x: [[x(point.val)], [x(point.test)]],
    y: [[100 * point.val.accuracy], [100 * point.test.accuracy]],
  });
  Plotly.restyle("macs", ring((found) => 100 * found.macs), data.rings.macs);
  data.batches.forEach((size, index) => {
    Plotly.restyle(`ms${size}`, ring((found) => found.ms[index]), data.rings[`ms${size}`]);
  });
  Plotly.restyle("shares", { x: ["val", "test"].map((split) => point[split].shares.map((x) => 100 * x)) }, [0, 1]);
}
if (slider) {
  slider.addEventListener("input", choose);
  document.getElementById("back").addEventListener("click", () => {
    slider.value = data.chosen;
    choose();
  });
  choose();
}
document.body.dataset.ready = "yes";
