// Elements, numbers and the tooltip: what every part of the page uses.

const COLOURS = 8;
const colourOf = (index) => `var(--run-${index % COLOURS})`;  // by light and dark: style.css
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  return filled(node, attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return filled(node, attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  // One by one: a response may have more tokens than a call may have arguments.
  for (const child of children.flat()) if (child !== null) node.append(child);
  return node;
}

// Text with what nobody would see, or what turns other text around, written out (terminal_text.py).
function visible(text) {
  return String(text).replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, (each) => {
    const code = each.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}

function swatch(colour, text) {
  const square = element("span", { class: "swatch" });
  square.style.background = colour;
  return element("span", {}, square, text);
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 2);
  return String(Number(value.toPrecision(digits)));
}

function numberTable(rows) {
  return element("table", {}, ...rows.map(([name, text, colour]) =>
    element("tr", {}, element("td", {}, colour ? swatch(colour, name) : name),
      element("td", { class: "number" }, text))));
}

const tip = {
  show(event, ...content) {
    const box = byId("tip");
    box.replaceChildren(...content);
    box.hidden = false;
    const gap = 14;
    const right = event.clientX + gap + box.offsetWidth > innerWidth;
    const below = event.clientY + gap + box.offsetHeight > innerHeight;
    box.style.left = `${Math.max(4, right ? event.clientX - gap - box.offsetWidth : event.clientX + gap)}px`;
    box.style.top = `${Math.max(4, below ? event.clientY - gap - box.offsetHeight : event.clientY + gap)}px`;
  },
  hide() { byId("tip").hidden = true; },
};

// Round numbers that divide [low, high] into about `count` parts.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}
