// A small chart for every metric: those that matter first, the others and constant ones folded.

function showCurves(data) {
  const { runs } = data;
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
  const groups = new Map([["first", data.first.filter((name) => !isConstant(runs, name))], ["constant", []]]);
  for (const name of names.filter((each) => !groups.get("first").includes(each)).sort()) {
    const group = isConstant(runs, name) ? "constant" : name.split("/")[0];
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(name);
  }
  const constant = groups.get("constant");
  groups.delete("constant");
  groups.set("constant", constant);
  for (const [group, members] of groups) {
    if (!members.length) continue;
    const cards = members.map((name) => element("div", { class: "card chart", "data-metric": name }));
    const title = { first: "What matters first", constant: "Constant" }[group] ?? group;
    const details = element("details", { "data-group": group, open: group === "first" || names.length < 8 && group !== "constant" },
      element("summary", {}, `${title} (${members.length})`), element("div", { class: "grid" }, cards));
    details.addEventListener("toggle", draw);  // a closed group is not drawn
    byId("curve-groups").append(details);
  }
  const axes = ["step", ...["tokens", "hours"].filter((name) => runs.every((run) => run.axis[name]))];
  fillSelect(byId("x-axis"), axes.map((name) => [name, { step: "steps", tokens: "tokens", hours: "hours" }[name]]));
  const several = data.seeds.some((group) => group.length > 1);
  byId("bands-label").hidden = !several;
  byId("bands").checked = several;

  function draw() {
    const wanted = byId("metric-search").value.trim().toLowerCase();
    const options = { axis: byId("x-axis").value, smoothing: Number(byId("smoothing").value), bands: byId("bands").checked, seeds: data.seeds, titles: data.titles };
    byId("smoothing-value").textContent = options.smoothing;
    for (const details of byId("curve-groups").children) {
      let any = false;
      for (const card of details.querySelectorAll(".card")) {
        const name = card.dataset.metric;
        card.hidden = !`${name} ${data.titles[name] ?? ""}`.toLowerCase().includes(wanted);
        any ||= !card.hidden;
        if (!card.hidden && details.open) drawChart(card, runs, name, options);
      }
      details.hidden = !any;
    }
  }

  byId("metric-search").addEventListener("input", () => {
    if (byId("metric-search").value) for (const d of byId("curve-groups").children) d.open = true;
    draw();
  });
  byId("smoothing").addEventListener("input", draw);
  for (const id of ["x-axis", "bands"]) byId(id).addEventListener("change", draw);
  draw();
}

// Is there one value, for all steps of all runs? One step alone says nothing of the kind.
function isConstant(runs, name) {
  const values = runs.flatMap((run) => run.series[name]?.[1] ?? []);
  return values.length > runs.length && values.every((value) => value === values[0]);
}
