// Starts the page once its data is there.

const data = JSON.parse(byId("data").textContent);
for (const run of data.runs) run.name = visible(run.name);
byId("runs").append(...data.runs.map((run, index) => swatch(colourOf(index), `${run.name} (${run.steps} steps)`)));
document.title = `RLSD: ${data.runs.map((run) => run.name).join(", ")}`;
showSummary(data.runs, data.differing);
showCurves(data);
showPhases(data.runs);
showCredit(data.runs);
keepUp(data.live);
document.documentElement.dataset.ready = "true";
