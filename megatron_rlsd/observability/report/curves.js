// A small chart for every metric, one line a run.

const CHART = { width: 300, height: 150, left: 42, right: 6, top: 6, bottom: 18 };
const OPEN_GROUPS = ["rollout", "algorithm", "eval", "leakage"];

function showCurves(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
  const groups = new Map();
  for (const name of names) {
    const group = name.split("/")[0];
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(name);
  }
  const cards = new Map();
  for (const [group, members] of groups) {
    const grid = element("div", { class: "grid" });
    for (const name of members.sort()) {
      const card = element("div", { class: "card chart", "data-metric": name });
      cards.set(name, card);
      grid.append(card);
    }
    const summary = element("summary", {}, `${group} (${members.length})`);
    const details = element("details", { "data-group": group, open: OPEN_GROUPS.includes(group) }, summary, grid);
    details.addEventListener("toggle", draw);  // a closed group is not drawn
    byId("curve-groups").append(details);
  }

  function draw() {
    const wanted = byId("metric-search").value.trim().toLowerCase();
    const smoothing = Number(byId("smoothing").value);
    byId("smoothing-value").textContent = smoothing;
    for (const details of byId("curve-groups").children) {
      let any = false;
      for (const card of details.querySelectorAll(".card")) {
        card.hidden = !card.dataset.metric.toLowerCase().includes(wanted);
        any ||= !card.hidden;
        if (!card.hidden && details.open) drawChart(card, runs, card.dataset.metric, smoothing);
      }
      details.hidden = !any;
    }
  }

  byId("metric-search").addEventListener("input", () => {
    if (byId("metric-search").value) for (const d of byId("curve-groups").children) d.open = true;
    draw();
  });
  byId("smoothing").addEventListener("input", draw);
  draw();
}

// Exponential mean that starts at the first value's own weight, so that it is not drawn towards 0.
function smoothed(values, factor) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

function drawChart(card, runs, metric, smoothing) {
  const lines = runs
    .map((run, index) => ({ name: run.name, colour: colourOf(index), series: run.series[metric] }))
    .filter((line) => line.series)
    .map((line) => ({ ...line, steps: line.series[0], values: smoothed(line.series[1], smoothing) }));
  const [low, high] = bounds(lines.flatMap((line) => line.values));
  const [first, last] = bounds(lines.flatMap((line) => line.steps));
  const { width, height, left, right, top, bottom } = CHART;
  const x = (step) => left + (step - first) / (last - first) * (width - left - right);
  const y = (value) => top + (high - value) / (high - low) * (height - top - bottom);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const value of ticks(low, high, 3)) {
    drawing.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, number(value, 3)));
  }
  for (const step of ticks(first, last, 4)) {
    if (Number.isInteger(step)) drawing.append(svg("text", { x: x(step), y: height - 4, "text-anchor": "middle" }, String(step)));
  }
  for (const line of lines) {
    const points = line.steps.map((step, i) => `${x(step).toFixed(1)},${y(line.values[i]).toFixed(1)}`);
    drawing.append(line.steps.length === 1
      ? svg("circle", { cx: x(line.steps[0]), cy: y(line.values[0]), r: 3, fill: line.colour })
      : svg("polyline", { points: points.join(" "), fill: "none", stroke: line.colour, "stroke-width": 1.4 }));
  }
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  drawing.append(cursor);
  drawing.addEventListener("mousemove", (event) => {
    const box = drawing.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * width;
    const step = first + (place - left) / (width - left - right) * (last - first);
    const rows = lines.map((line) => {
      const i = nearest(line.steps, step);
      return [`${line.name} @ ${line.steps[i]}`, number(line.values[i]), line.colour];
    });
    const at = x(Math.min(last, Math.max(first, step)));
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    tip.show(event, element("b", {}, metric), numberTable(rows));
  });
  drawing.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); tip.hide(); });
  card.replaceChildren(element("h3", {}, metric), drawing);
}

// Lowest and highest, apart by at least a little so that one value makes an axis too.
function bounds(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (high - low > Math.abs(high) * 1e-9) return [low, high];
  const margin = Math.abs(high) * 0.1 || 0.5;
  return [low - margin, high + margin];
}

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}
