// Where the time went: stacked bars by step, and one step's phases on every rank.

function showPhases(runs) {
  const phaseNames = [...new Set(runs.flatMap((run) => [
    ...Object.keys(run.phases.seconds),
    ...(run.trace ? run.trace.steps.flatMap((step) => step.events.map((event) => event[1])) : []),
  ]))];
  const colours = new Map([...phaseNames, "other"].map((name, index) => [name, colourOf(index)]));
  fillSelect(byId("phase-run"), runs.map((run, index) => [index, run.name]));

  function draw() {
    const run = runs[byId("phase-run").value];
    byId("phase-legend").replaceChildren(...[...colours].map(([name, colour]) => swatch(colour, name)));
    byId("phase-chart").replaceChildren(phaseBars(run.phases, colours));
    byId("trace").hidden = !(run.trace && run.trace.steps.length);
    if (!byId("trace").hidden) {
      fillSelect(byId("trace-step"), run.trace.steps.map((step, index) => [index, step.step]));
      byId("trace-step").value = run.trace.steps.length - 1;
      const cut = run.trace.shown_ranks < run.trace.ranks;
      byId("trace-note").textContent = cut ? `the first ${run.trace.shown_ranks} of ${run.trace.ranks} ranks` : "";
      drawTrace();
    }
  }

  function drawTrace() {
    const trace = runs[byId("phase-run").value].trace;
    byId("trace-chart").replaceChildren(rankRows(trace.steps[byId("trace-step").value], trace.shown_ranks, colours));
  }

  // As wide as the page, so that the text stays as large.
  let drawn = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== drawn) { drawn = innerWidth; draw(); } });
  byId("phase-run").addEventListener("change", draw);
  byId("trace-step").addEventListener("change", drawTrace);
  draw();
}

function phaseBars(phases, colours) {
  const columns = { ...phases.seconds, other: phases.other };
  const totals = phases.steps.map((_, i) => Object.values(columns).reduce((sum, column) => sum + column[i], 0));
  const width = chartWidth(), height = 190, left = 44, bottom = 18, top = 6;
  const highest = Math.max(...totals, 1e-9);
  const y = (seconds) => top + (1 - seconds / highest) * (height - top - bottom);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "phase-bars" });
  for (const value of ticks(0, highest, 4)) {
    drawing.append(svg("line", { class: "axis", x1: left, x2: width, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, `${number(value, 3)} s`));
  }
  const slot = (width - left) / Math.max(1, phases.steps.length);
  const label = Math.ceil(phases.steps.length / (width / 100));
  phases.steps.forEach(([first, last], i) => {
    let below = 0;
    const bar = svg("g", {});
    for (const [name, column] of Object.entries(columns)) {
      if (column[i] > 0) {
        bar.append(svg("rect", { x: left + i * slot + slot * 0.06, width: slot * 0.88,
          y: y(below + column[i]), height: y(below) - y(below + column[i]), fill: colours.get(name) }));
      }
      below += column[i];
    }
    const title = first === last ? `step ${first}` : `steps ${first} to ${last}, means`;
    pointedAt(bar, () => [element("b", {}, title), numberTable([
      ...Object.entries(columns).map(([name, column]) => [name, `${number(column[i], 3)} s`, colours.get(name)]),
      ["step", `${number(totals[i], 3)} s`]])]);
    drawing.append(bar);
    if (i % label === 0) drawing.append(svg("text", { x: left + (i + 0.5) * slot, y: height - 4, "text-anchor": "middle" }, String(first)));
  });
  walkable(drawing);
  return drawing;
}

function rankRows(step, ranks, colours) {
  const row = 18, width = chartWidth(), left = 60;
  const end = step.events.reduce((last, [, , start, length]) => Math.max(last, start + length), 1e-6);
  const x = (ms) => left + ms / end * (width - left);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${ranks * row + 18}`, class: "rank-rows" });
  for (let rank = 0; rank < ranks; rank++) {
    drawing.append(svg("text", { x: left - 6, y: rank * row + 12, "text-anchor": "end" }, `rank ${rank}`));
  }
  for (const [rank, name, start, length, depth] of step.events) {
    const inset = Math.min(depth, 3) * 4;  // a phase within another is drawn lower inside it
    const bar = svg("rect", { x: x(start), width: Math.max(0.7, x(start + length) - x(start)), y: rank * row + 1 + inset,
      height: row - 3 - inset, fill: colours.get(name), "data-phase": name });
    pointedAt(bar, () => [element("b", {}, `${name} on rank ${rank}`),
      numberTable([["starts", `${number(start)} ms`], ["takes", `${number(length)} ms`]])]);
    drawing.append(bar);
  }
  for (const value of ticks(0, end, 6)) {
    drawing.append(svg("text", { x: x(value), y: ranks * row + 13, "text-anchor": "middle" }, `${number(value, 3)} ms`));
  }
  walkable(drawing);
  return drawing;
}

function chartWidth() {
  return Math.max(300, Math.min(1200, byId("phase-chart").clientWidth || 1200));
}

// Shows the tooltip by mouse and touch, and when the keyboard comes to it.
function pointedAt(node, content) {
  const show = (event) => tip.show(event, ...content());
  node.classList.add("stop");
  node.addEventListener("pointermove", show);
  node.addEventListener("pointerdown", show);
  node.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") tip.hide(); });
  node.addEventListener("click", (event) => event.stopPropagation());  // a touch's end hides nothing
  node.addEventListener("reached", () => {
    const box = node.getBoundingClientRect();
    show({ clientX: box.right, clientY: box.top });
  });
}

// One stop of the Tab key; the arrow keys go from bar to bar.
function walkable(drawing) {
  const stops = [...drawing.querySelectorAll(".stop")];
  let at = -1;
  drawing.setAttribute("tabindex", 0);
  drawing.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") tip.hide();
    if (!move || !stops.length) return;
    at = Math.min(stops.length - 1, Math.max(0, at + move));
    stops[at].dispatchEvent(new Event("reached"));
    event.preventDefault();
  });
  drawing.addEventListener("blur", tip.hide);
}
