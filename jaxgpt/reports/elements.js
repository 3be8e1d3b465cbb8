// What both pages draw with.
const COLOURS = ["#2f6fde", "#d9622b", "#2a9d6f", "#a855c7", "#c9a227", "#d6336c", "#12a5b8", "#7c7f88"];
const SVG = new Set(["svg", "path", "line", "text", "circle", "title"]);
const $ = id => document.getElementById(id);
function add(parent, tag, props = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  parent?.append(node);
  return node;
}
const colourOf = i => COLOURS[i % COLOURS.length];
const dot = i => add(null, "i", { class: "dot", style: `background:${colourOf(i)}` });
