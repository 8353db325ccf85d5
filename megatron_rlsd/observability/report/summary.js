// On top: what ran, on what, what came of it; and the settings in which the runs differ.

function showSummary(runs, differing) {
  byId("summaries").replaceChildren(...runs.map((run, index) => summaryCard(run, colourOf(index))));
  const keys = Object.entries(differing);
  byId("settings-section").hidden = !keys.length;
  byId("settings").replaceChildren(element("table", {},
    element("tr", {}, element("th", {}, "key"), runs.map((run) => element("th", {}, run.name))),
    keys.map(([key, values]) => element("tr", {}, element("td", {}, key),
      values.map((value) => element("td", {}, visible(value)))))));
}

function summaryCard(run, colour) {
  const { summary } = run;
  const facts = [
    ["state", `${summary.state}${summary.message ? `: ${visible(summary.message)}` : ""}`],
    ["steps", `${summary.steps_done}${summary.steps ? ` of ${summary.steps}` : ""}`],
    ["what", [summary.algorithm, summary.model].filter(Boolean).map(visible).join(" on ")],
    ["data", summary.data.map(visible).join(", ")],
    ["spent", [summary.hours ? duration(summary.hours) : "", summary.tokens ? `${summary.tokens.toLocaleString("en")} tokens sampled` : ""].filter(Boolean).join(", ")],
    ["folder", visible(run.path)],
  ].filter(([, text]) => text);
  const results = element("table", { class: "results" },
    element("tr", {}, ["", "before", "after", "change"].map((name) => element("th", {}, name))),
    summary.results.map((each) => element("tr", { "data-metric": each.metric },
      element("td", { title: each.metric }, visible(each.title)),
      [number(each.before, 3), number(each.after, 3), signed(each.after - each.before)].map((text) => element("td", { class: "number" }, text)))));
  const warnings = summary.warning_count === 0 ? element("p", { class: "muted" }, "no warnings")
    : element("details", { class: "warnings" },
      element("summary", { class: "flag" }, `${summary.warning_count} warning${summary.warning_count === 1 ? "" : "s"}`),
      summary.warnings.map((each) => element("p", {}, element("b", {}, `step ${each.step} `), visible(each.text))));
  return element("div", { class: "card summary" },
    element("h3", {}, swatch(colour, visible(run.name))),
    element("table", { class: "facts" }, facts.map(([name, text]) => element("tr", {},
      element("td", { class: "muted" }, name), element("td", {}, text)))),
    summary.results.length ? element("details", { open: true }, element("summary", {}, "results"),
      element("div", { class: "scroll" }, results)) : null, warnings);
}

function signed(value) {
  return `${value > 0 ? "+" : ""}${number(value, 3)}`;
}

function duration(hours) {
  return hours < 1 ? `${number(60 * hours, 3)} minutes` : `${number(hours, 3)} hours`;
}
