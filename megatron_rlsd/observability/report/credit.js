// The credit view: a response's tokens coloured by what the update made of them.

function showCredit(runs) {
  const withSamples = runs.map((run, index) => [index, run.name]).filter(([index]) => runs[index].credit.length);
  if (!withSamples.length) {
    byId("credit").querySelector(".controls").hidden = true;
    byId("credit-count").textContent = "No run has samples (observability.samples_per_step).";
    return;
  }
  fillSelect(byId("credit-run"), withSamples);
  let kept = null;

  function chooseRun() {
    const steps = runs[byId("credit-run").value].credit;
    fillSelect(byId("credit-step"), steps.map((each, index) => [index, each.step]));
    byId("credit-step").value = steps.length - 1;
    draw();
  }

  function draw() {
    release();
    const run = runs[byId("credit-run").value];
    const step = run.credit[byId("credit-step").value];
    const filter = readFilter();
    const shown = step.responses.filter((response) => passes(response, filter));
    const orders = { gain: (r) => -largestGain(r), reward: (r) => -(r.reward ?? -Infinity) };
    const order = orders[byId("credit-order").value];
    if (order) shown.sort((a, b) => order(a) - order(b));
    const colour = colouring(byId("credit-colour").value, run, step);
    byId("credit-legend").replaceChildren(...colour.legend);
    const cut = step.responses.length < step.in_file ? ` (the page holds ${step.responses.length} of ${step.in_file})` : "";
    byId("credit-count").textContent = `${shown.length} of ${step.responses.length} responses${cut}`;
    byId("pair").hidden = true;
    byId("responses").replaceChildren();
    for (const response of shown) byId("responses").append(card(response, colour, filter, step));
  }

  function card(response, colour, filter, step) {
    const leaks = leakSpans(response);
    const head = element("div", { class: "head" },
      element("span", {}, "reward ", element("b", { class: "reward" }, number(response.reward))),
      element("span", {}, "advantage ", element("b", {}, number(response.advantage))),
      element("span", { class: "muted" }, `${response.tokens} tokens, ${response.finish_reason}`),
      element("span", { class: "muted" }, visible(response.problem_id)),
      leaks.length ? element("span", { class: "flag" }, "speaks of a solution") : null,
      step && hasPair(step, response) ? element("button", { type: "button", class: "compare",
        onclick: () => showPair(step, response, (each) => card(each, colour, filter, null)) }, "side by side") : null);
    const tokens = element("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "tokens of the response: arrow keys" }, tokenSpans(response, colour, filter, leaks));
    tokens.addEventListener("mousemove", (event) => {
      const at = event.target.closest(".token");
      if (at && !kept) tip.show(event, ...tokenDetails(response, Number(at.dataset.index)));
    });
    tokens.addEventListener("mouseleave", () => { if (!kept) tip.hide(); });
    tokens.addEventListener("click", (event) => {
      const at = event.target.closest(".token");
      const again = at === kept;
      release();
      if (!at || again) return;
      keep(at, response, event);
      event.stopPropagation();
    });
    tokens.addEventListener("keydown", (event) => {
      const spans = tokens.querySelectorAll(".token");
      const moves = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 };
      if (event.key === "Escape") release();
      else if (event.key in moves && spans.length) {
        const from = kept && tokens.contains(kept) ? Number(kept.dataset.index) + moves[event.key] : 0;
        release();
        keep(spans[Math.min(spans.length - 1, Math.max(0, from))], response, null);
      } else return;
      event.preventDefault();
    });
    const question = element("details", {}, element("summary", { class: "muted" }, `question, answer ${visible(response.answer)}`),
      element("div", { class: "question" }, visible(response.question)));
    return element("div", { class: "card response", "data-reward": response.reward }, head, question, tokens);
  }

  // Without an event (from the keyboard) the numbers stand at the token.
  function keep(token, response, event) {
    kept = token;
    token.classList.add("kept");
    if (!event) token.scrollIntoView({ block: "nearest" });
    const box = token.getBoundingClientRect();
    tip.show(event ?? { clientX: box.left, clientY: box.bottom }, ...tokenDetails(response, Number(token.dataset.index)));
  }

  function release() {
    if (kept) kept.classList.remove("kept");
    kept = null;
    tip.hide();
  }

  document.addEventListener("click", release);
  byId("pair-close").addEventListener("click", () => { byId("pair").hidden = true; });
  byId("credit-run").addEventListener("change", chooseRun);
  for (const id of ["credit-step", "credit-colour", "leaks-only", "credit-order"]) byId(id).addEventListener("change", draw);
  for (const id of ["reward-min", "reward-max", "gain-min"]) byId(id).addEventListener("input", draw);
  chooseRun();
}

function readFilter() {
  const value = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));
  return { least: value("reward-min", -Infinity), most: value("reward-max", Infinity), gain: value("gain-min", 0),
    leaksOnly: byId("leaks-only").checked };
}

function passes(response, filter) {
  const reward = response.reward;
  if ((filter.least !== -Infinity || filter.most !== Infinity) && (reward === null || reward < filter.least || reward > filter.most)) return false;
  if (filter.gain > 0 && largestGain(response) < filter.gain) return false;
  return !filter.leaksOnly || leakSpans(response).length > 0;
}

function largestGain(response) {
  return (response.columns.gain ?? []).reduce((most, gain) => Math.max(most, Math.abs(gain ?? 0)), 0);
}

function leakSpans(response) {
  const found = response.leakage ?? {};
  return [...(found.phrases ?? []), ...(found.answer_first ? [found.answer_first] : [])];
}

// Value -> [-1, 1] (0: no colour), and the legend that says so.
function colouring(column, run, step) {
  const clip = Number(run.settings["algorithm.evidence_clip"] ?? 0.2) || 0.2;
  if (column === "evidence_weight") {
    return { column, shade: (w) => (w - 1) / clip,
      legend: [`w ≤ ${number(1 - clip)}, less of the advantage`, bar(false), `more of it, w ≥ ${number(1 + clip)}`] };
  }
  if (column === "log_probs") {
    return { column, shade: (lp) => 1 - Math.exp(lp), legend: ["p = 1", bar(true), "p = 0"] };
  }
  const sizes = step.responses.flatMap((r) => r.columns[column] ?? []).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  const largest = sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || 1 : 1;
  const oneSided = column === "entropy";
  return { column, shade: (value) => value / largest, legend: [oneSided ? "0" : number(-largest, 2), bar(oneSided), number(largest, 2)] };
}

function bar(oneSided) {
  return element("span", { class: oneSided ? "scale one-sided" : "scale" });
}

function tokenSpans(response, colour, filter, leaks) {
  const { text, gain, own } = response.columns;
  if (!text) return [visible(response.response)];
  const values = response.columns[colour.column] ?? [];
  let end = 0;
  const spans = text.map((piece, i) => {
    const start = end;
    end += [...piece].length;  // Python counts whole characters
    const classes = ["token"];
    if (piece === "") classes.push("empty");
    if (own && !own[i]) classes.push("foreign");  // an environment's
    if (filter.gain > 0 && Math.abs(gain?.[i] ?? 0) < filter.gain) classes.push("faint");
    if (leaks.some(([from, to]) => from < end && start < to)) classes.push("leak");
    const span = element("span", { class: classes.join(" "), "data-index": i }, piece === "" ? "∅" : visible(piece));
    const value = values[i];
    if (value !== null && value !== undefined) {
      const shade = Math.max(-1, Math.min(1, colour.shade(value)));
      if (Math.abs(shade) > 0.01) span.style.background = `rgba(var(${shade > 0 ? "--more" : "--less"}), ${(0.85 * Math.abs(shade)).toFixed(3)})`;
    }
    return span;
  });
  if (text.length < response.tokens) spans.push(element("span", { class: "muted" }, ` … ${response.tokens - text.length} more tokens`));
  return spans;
}

function tokenDetails(response, i) {
  const at = (name) => response.columns[name]?.[i] ?? null;
  const probability = (name) => (at(name) === null ? "–" : `${number(Math.exp(at(name)))}  (log ${number(at(name))})`);
  return [
    element("b", {}, visible(JSON.stringify(at("text"))), element("span", { class: "muted" }, `  token ${i}, id ${at("id")}`)),
    numberTable([
      ["privileged information gain", number(at("gain"))],
      ["evidence weight", number(at("evidence_weight"))],
      ["advantage of the response", number(response.advantage)],
      ["advantage of the token", number(at("advantages"))],
      ["p of the student", probability("log_probs")],
      ["p of the teacher", probability("teacher_log_probs")],
      ["p at sampling", probability("rollout_log_probs")],
      ["entropy", number(at("entropy"))],
    ]),
  ];
}
