"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
for (const [id, figure] of Object.entries(data.figures)) {
  document.getElementById(id).style.height = `${figure.layout.height}px`;
  Plotly.newPlot(id, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}

const menu = document.getElementById("batch");
function showBatchSize() {
  for (const size of data.batch_sizes) {
    const figure = document.getElementById(`ms${size}`);
    figure.hidden = menu && String(size) !== menu.value;
    if (!figure.hidden) Plotly.Plots.resize(figure);
  }
}
if (menu) menu.addEventListener("change", showBatchSize);
showBatchSize();

const slider = document.getElementById("threshold");

function showThreshold(point) {
  const threshold = point.threshold === null ? "none: no exit is taken" : point.threshold.toFixed(4);
  document.getElementById("at").textContent = threshold;
  slider.setAttribute("aria-valuetext",
    `${threshold}: accuracy ${point.val.shown.accuracy} at ${point.val.shown.macs} of MACs on val`);
}

function fillTable(point) {
  for (const split of ["val", "test"]) {
    const outcome = point[split];
    const show = (row, text) => { document.getElementById(`${row}-${split}`).textContent = text; };
    show("accuracy", outcome.shown.accuracy);
    show("macs", outcome.shown.macs);
    data.batch_sizes.forEach((size, index) => show(`ms${size}`, `${Number(outcome.ms[index].toPrecision(3))} ms`));
    data.exits.forEach((name, index) => show(`share${index}`, outcome.shown.shares[index]));
  }
}

function moveCircles(point) {
  const move = (id, cost) => Plotly.restyle(id, {
    x: [[cost(point.val)], [cost(point.test)]],
    y: [[100 * point.val.accuracy], [100 * point.test.accuracy]],
  }, data.slider_traces[id]);
  move("macs", (outcome) => 100 * outcome.macs);
  data.batch_sizes.forEach((size, index) => move(`ms${size}`, (outcome) => outcome.ms[index]));
}

function setBars(point) {
  const bars = ["val", "test"].map((split) => point[split].shares.map((share) => 100 * share));
  Plotly.restyle("shares", { x: bars }, data.slider_traces.shares);
}

function update() {
  const point = data.curve[slider.value];
  showThreshold(point);
  fillTable(point);
  moveCircles(point);
  setBars(point);
}

if (slider) {
  slider.addEventListener("input", update);
  document.getElementById("back").addEventListener("click", () => {
    slider.value = data.chosen;
    update();
  });
  update();
}
document.body.dataset.ready = "yes";
