// Starts the page once its data is there.

function showSettings(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  // A key that one of the runs does not have says that the program changed, not that someone chose.
  const differing = keys.filter((key) => key !== "run_dir" && runs.every((run) => key in run.settings)
    && new Set(runs.map((run) => run.settings[key])).size > 1);
  if (!differing.length) return;
  byId("settings-section").hidden = false;
  byId("settings").append(element("table", {},
    element("tr", {}, element("th", {}, "key"), ...runs.map((run) => element("th", {}, run.name))),
    ...differing.map((key) => element("tr", {}, element("td", {}, key),
      ...runs.map((run) => element("td", {}, run.settings[key]))))));
}

const { runs } = JSON.parse(byId("data").textContent);
byId("runs").append(...runs.map((run, index) => swatch(colourOf(index), `${run.name} (${run.steps} steps)`)));
showSettings(runs);
showCurves(runs);
showPhases(runs);
showCredit(runs);
document.documentElement.dataset.ready = "true";
