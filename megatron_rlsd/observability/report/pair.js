// Two responses to one question beside each other.

function showPair(step, response, cardOf) {
  const group = step.responses.filter((each) => each.problem_id === response.problem_id && each.question === response.question);
  const other = group.find((each) => each.reward !== response.reward) ?? group.find((each) => each !== response);
  const names = group.map((each, i) => [i, `${i + 1}: reward ${number(each.reward)}, ${each.tokens} tokens`]);
  const sides = [response, other].map((each, i) => {
    const select = element("select", { "aria-label": i ? "right response" : "left response" });
    fillSelect(select, names);
    select.value = group.indexOf(each);
    const place = element("div", {});
    const draw = () => place.replaceChildren(cardOf(group[select.value]));
    select.addEventListener("change", draw);
    draw();
    return element("div", {}, select, place);
  });
  byId("pair-sides").replaceChildren(...sides);
  byId("pair").hidden = false;
  byId("pair").scrollIntoView({ block: "nearest" });
}

function hasPair(step, response) {
  return step.responses.some((each) => each !== response && each.problem_id === response.problem_id && each.question === response.question);
}
