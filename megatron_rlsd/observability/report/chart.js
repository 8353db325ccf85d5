// One chart: lines, or the mean of several seeds with its range; read by mouse, touch and keyboard.

const CHART = { width: 300, height: 150, left: 42, right: 8, top: 6, bottom: 18 };

// Exponential mean that starts at the first value's own weight, so that it is not drawn towards 0.
function smoothed(values, factor) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

// The place of `wanted` in rising numbers, as [left neighbour, share of the way to the next].
function placeIn(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  if (wanted <= sorted[low]) return [low, 0];
  if (wanted >= sorted[high]) return [high, 0];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= wanted) low = middle; else high = middle;
  }
  return [low, (wanted - sorted[low]) / (sorted[high] - sorted[low])];
}

function between(xs, ys, wanted) {
  const [at, share] = placeIn(xs, wanted);
  return share === 0 ? ys[at] : ys[at] + share * (ys[at + 1] - ys[at]);
}

function nearest(sorted, wanted) {
  const [at, share] = placeIn(sorted, wanted);
  return share > 0.5 ? at + 1 : at;
}

// {name, colour, x, steps, values, low?, high?} of a metric; `options`: axis, smoothing, bands, seeds.
function linesOf(runs, metric, options) {
  const single = runs.map((run, index) => {
    if (!run.series[metric]) return null;
    const [steps, values] = run.series[metric];
    const x = options.axis === "step" ? steps : steps.map((step) => between(run.axis.steps, run.axis[options.axis], step));
    return { name: run.name, colour: colourOf(index), steps, x, values: smoothed(values, options.smoothing) };
  });
  if (!options.bands) return single.filter(Boolean);
  return options.seeds.map((group) => group.map((index) => single[index]).filter(Boolean)).filter((group) => group.length)
    .map((group) => (group.length === 1 ? group[0] : bandOf(group)));
}

// Mean and range where all of them have values.
function bandOf(lines) {
  const from = Math.max(...lines.map((line) => line.x[0]));
  const to = Math.min(...lines.map((line) => line.x.at(-1)));
  const longest = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  const kept = longest.x.map((x, i) => i).filter((i) => longest.x[i] >= from && longest.x[i] <= to);
  const x = kept.map((i) => longest.x[i]);
  const columns = x.map((at) => lines.map((line) => between(line.x, line.values, at)));
  return { name: `${lines[0].name} and ${lines.length - 1} more seed${lines.length > 2 ? "s" : ""}`, colour: lines[0].colour, x, steps: kept.map((i) => longest.steps[i]),
    values: columns.map((column) => column.reduce((a, b) => a + b) / column.length),
    low: columns.map((column) => Math.min(...column)), high: columns.map((column) => Math.max(...column)) };
}

function drawChart(card, runs, metric, options) {
  const lines = linesOf(runs, metric, options).filter((line) => line.x.length);
  const [low, high] = bounds(lines.flatMap((line) => [...line.values, ...(line.low ?? []), ...(line.high ?? [])]));
  const [first, last] = bounds(lines.flatMap((line) => line.x));
  const { width, height, left, right, top, bottom } = CHART;
  const x = (value) => left + (value - first) / (last - first) * (width - left - right);
  const y = (value) => top + (high - value) / (high - low) * (height - top - bottom);
  const title = options.titles[metric] ?? metric;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": `${title}: ${lines.map((line) => `${line.name} ${number(line.values.at(-1))}`).join(", ")}` });
  const marks = ticks(low, high, 4);
  // As many digits as tell them apart.
  const digits = [3, 4, 5, 6].find((count) => new Set(marks.map((value) => number(value, count))).size === marks.length) ?? 7;
  for (const value of marks) {
    drawing.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, number(value, digits)));
  }
  for (const value of ticks(first, last, 4)) {
    if (options.axis !== "step" || Number.isInteger(value)) drawing.append(svg("text", { x: x(value), y: height - 4, "text-anchor": "middle" }, short(value)));
  }
  for (const line of lines) {
    const point = (values) => (i) => `${x(line.x[i]).toFixed(1)},${y(values[i]).toFixed(1)}`;
    const places = [...line.x.keys()];
    if (line.low) {
      const outline = [...places.map(point(line.high)), ...places.reverse().map(point(line.low))];
      drawing.append(svg("polygon", { class: "band", points: outline.join(" "), fill: line.colour }));
      places.reverse();
    }
    drawing.append(line.x.length === 1
      ? svg("circle", { cx: x(line.x[0]), cy: y(line.values[0]), r: 3, fill: line.colour })
      : svg("polyline", { points: places.map(point(line.values)).join(" "), fill: "none", stroke: line.colour, "stroke-width": 1.6 }));
  }
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  drawing.append(cursor);
  let at = null;  // what the keyboard has reached
  function show(value, event) {
    at = Math.min(last, Math.max(first, value));
    const rows = lines.map((line) => {
      const i = nearest(line.x, at);
      const range = line.low ? ` (${number(line.low[i])} to ${number(line.high[i])})` : "";
      return [`${line.name} @ ${line.steps[i]}`, number(line.values[i]) + range, line.colour];
    });
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(at));
    cursor.setAttribute("visibility", "visible");
    const box = drawing.getBoundingClientRect();
    const where = event ?? { clientX: box.left + x(at) / width * box.width, clientY: box.top + box.height / 2 };
    tip.show(where, element("b", {}, title), title === metric ? "" : element("div", { class: "muted" }, metric), numberTable(rows));
  }
  const pointed = (event) => {
    const box = drawing.getBoundingClientRect();
    show(first + ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * (last - first), event);
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); tip.hide(); };
  drawing.addEventListener("pointermove", pointed);
  drawing.addEventListener("pointerdown", pointed);
  drawing.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
  drawing.addEventListener("click", (event) => event.stopPropagation());  // a touch's end hides nothing
  drawing.addEventListener("focus", () => { if (drawing.matches(":focus-visible")) show(at ?? last); });
  drawing.addEventListener("blur", hide);
  drawing.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 };
    const ends = { Home: first, End: last };
    if (event.key === "Escape") hide();
    else if (event.key in ends) show(ends[event.key]);
    else if (event.key in steps) {
      const xs = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
      show(xs[Math.min(xs.length - 1, Math.max(0, nearest(xs, at ?? last) + steps[event.key]))]);
    } else return;
    event.preventDefault();
  });
  card.replaceChildren(element("h3", {}, title, title === metric ? null : element("span", { class: "name muted" }, metric)), drawing);
}

// Lowest and highest, apart by at least a little so that one value makes an axis too.
function bounds(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (high - low > Math.abs(high) * 1e-9) return [low, high];
  const margin = Math.abs(high) * 0.1 || 0.5;
  return [low - margin, high + margin];
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${number(value / 1e9, 3)}G`;
  if (size >= 1e6) return `${number(value / 1e6, 3)}M`;
  return size >= 1e5 ? `${number(value / 1e3, 3)}k` : number(value, 5);
}
