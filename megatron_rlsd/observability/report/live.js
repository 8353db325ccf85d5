// A page about runs that go on loads itself again, and is then as the reader had left it.

const LIVE_KEY = `rlsd ${location.pathname}`;
const LEFT_ALONE = 10;  // seconds after the last key or touch, in which nothing is loaded

function keepUp(seconds) {
  restore();
  if (!seconds) return;
  byId("live").hidden = false;
  byId("live").textContent = `live: read again every ${seconds} s`;
  let touched = -Infinity;
  for (const kind of ["keydown", "pointerdown", "input"]) addEventListener(kind, () => { touched = performance.now(); });
  setInterval(() => {
    if (performance.now() - touched < 1000 * LEFT_ALONE) return;
    sessionStorage.setItem(LIVE_KEY, JSON.stringify(state()));
    location.reload();
  }, 1000 * seconds);
}

function controls() {
  return [...document.querySelectorAll(".controls input, .controls select")];
}

function state() {
  return {
    scroll: scrollY,
    values: controls().map((each) => [each.id, each.type === "checkbox" ? each.checked : each.value]),
    // The newest step goes on to be the newest.
    newest: [...document.querySelectorAll("select[data-newest]")].filter((each) => each.selectedIndex === each.options.length - 1).map((each) => each.id),
    open: [...document.querySelectorAll("details[data-group]")].map((each) => [each.dataset.group, each.open]),
  };
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(LIVE_KEY) ?? "null");
  sessionStorage.removeItem(LIVE_KEY);
  if (!kept) return;
  const open = new Map(kept.open);
  for (const each of document.querySelectorAll("details[data-group]")) each.open = open.get(each.dataset.group) ?? each.open;
  for (const [id, value] of kept.values) {
    const control = byId(id);
    if (!control || kept.newest.includes(id)) continue;
    const changed = control.type === "checkbox" ? control.checked !== value : control.value !== value;
    if (control.type === "checkbox") control.checked = value;
    else if (control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value)) control.value = value;
    if (changed) for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind));
  }
  scrollTo(0, kept.scroll);
}
