// Draws RUNS: see `gather` in gather.py for what a run holds.
const MANY = RUNS.length > 1;
const RATIOS = RUNS.map(run => run.bits_per_nat).filter(Boolean);
// of one tokenizer on one text, a nat per token is always as many bits per byte
const COMPARABLE = RATIOS.every(ratio => Math.abs(ratio / RATIOS[0] - 1) < 1e-3);
const view = { x: "step", log: false };

const clipped = (text, props = {}) => add(null, "span", { class: "clip", title: text, ...props }, text);

// ---- numbers

const whole = v => v == null ? "" : v.toLocaleString("en");
const fixed = v => v == null ? "" : v.toFixed(4);
function short(v) {
  if (v == null) return "";
  const size = Math.abs(v);
  if (size === 0) return "0";
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= (unit === 1e3 ? 1e4 : unit)) return `${+(v / unit).toPrecision(4)}${letter}`;
  return size >= 1e-3 ? String(+v.toPrecision(4)) : v.toExponential().replace(/(\.\d\d)\d+/, "$1");
}
function bytes(v) {
  if (v == null) return "";
  for (const [unit, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (v >= unit) return `${(v / unit).toPrecision(3)} ${name}`;
  return `${v} B`;
}
const percent = v => `${+(100 * v).toPrecision(3)}%`;
function duration(s) {
  const parts = [[86400, "d"], [3600, "h"], [60, "m"], [1, "s"]];
  const first = parts.findIndex(([size]) => s >= size);
  if (first < 0) return s === 0 ? "0s" : `${s.toFixed(1)}s`;
  const [size, unit] = parts[first], whole = Math.floor(s / size);
  const rest = first < 3 ? Math.floor((s - whole * size) / parts[first + 1][0]) : 0;
  return `${whole}${unit}` + (rest ? ` ${rest}${parts[first + 1][1]}` : "");
}

// ---- axes

const STEPS_OF_TIME = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
const AXES = {
  step: { name: "step", title: "step", format: short },
  tokens: { name: "tokens", title: "tokens seen", format: short },
  seconds: { name: "time", title: "training time", format: duration },
};
function niceStep(span, count, isTime) {
  const raw = span / count || 1;
  if (isTime && raw > 1 && raw <= 86400) return STEPS_OF_TIME.find(s => s >= raw);
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map(m => m * power).find(s => s >= raw * (1 - 1e-9));
}
function ticks(low, high, step) {
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  return found;
}
function logTicks(low, high) {
  if (high / low < 8) return ticks(low, high, niceStep(high - low, 8));
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
    for (const m of high / low < 1e3 ? [1, 2, 5] : [1]) if (m * power >= low && m * power <= high) found.push(m * power);
  return found;
}
// Returns {low, high, ticks} of an axis that shows all of `values`.
function range(values, { zero, log }) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) {
    if (low === high) { low /= 1.5; high *= 1.5; }
    const margin = (high / low) ** .04;
    return { low: low / margin, high: high * margin, ticks: logTicks(low / margin, high * margin) };
  }
  if (zero) { low = Math.min(0, low); high = Math.max(0, high); }
  if (low === high) { low -= zero ? 0 : Math.abs(low) * .1 || 1; high += Math.abs(high) * .1 || 1; }
  const step = niceStep(high - low, 5);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  return { low, high, ticks: ticks(low, high, step) };
}

// ---- charts

// The lines of a chart: where `train` and `validation` say how a run's columns become values, or
// `series` names the curves of a run, one value for each row of `train`.
function linesOf({ train, validation, series }) {
  if (series) return RUNS.flatMap((run, i) => Object.entries(series(run)).map(([name, values], j) => ({
    points: values.map((y, k) => ({ step: run.train.step[k], tokens: run.train.tokens[k], seconds: run.train.seconds[k], y })),
    label: MANY ? `${run.name}, ${name}` : name, colour: colourOf(MANY ? i : j),
  })));
  return RUNS.flatMap((run, i) => [["train", train], ["validation", validation]].map(([split, value]) => {
    const rows = run[split], points = [];
    if (value) rows.step.forEach((step, k) => points.push({ step, tokens: rows.tokens[k], seconds: rows.seconds[k], y: value(rows, k, run) }));
    const label = MANY ? (validation && train ? `${run.name}, ${split}` : run.name) : validation && train ? split : "";
    const colour = colourOf(MANY ? i : split === "validation" ? 1 : 0);
    const bold = split === "validation";
    return { points, label, colour, bold, faint: MANY && !bold && validation, best: bold ? run.facts.best_step : null };
  })).filter(line => line.points.some(p => p.y != null));
}

// Returns the function that draws a chart into its figure, null if nothing is known of it.
function chart(options) {
  const lines = linesOf(options);
  if (!lines.length) return null;
  const figure = add($("charts"), "figure", options.wide ? { class: "wide" } : {});
  add(figure, "figcaption", {}, add(null, "span", {}, options.title));
  const units = add(figure, "div", { class: "units" }, add(null, "span", {}, options.unit || ""));
  if (options.right) add(units, "span", {}, options.right.unit);
  const tip = add(figure, "div", { class: "tip", hidden: "" });
  return () => draw(figure, lines, options, tip);
}

function draw(figure, lines, options, tip) {
  const log = view.log && options.log, axis = AXES[view.x];
  const shown = lines.map(line => ({ ...line, points: line.points.map(p => ({ ...p, x: p[view.x], y: log && p.y <= 0 ? null : p.y })).filter(p => p.x != null) }));
  const known = shown.flatMap(line => line.points.filter(p => p.y != null));
  figure.querySelector(":scope > svg")?.remove();
  const width = Math.max(figure.clientWidth - 28, 200), height = options.wide ? Math.min(340, Math.max(230, width * .45)) : 210;
  const svg = add(figure, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${options.title} by ${axis.title}` });
  if (!known.length) { add(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, `not known by ${axis.title}`); return; }
  const L = 46, R = options.right ? 46 : 10, T = 8, B = 40, plot = width - L - R;
  const y = range(known.map(p => p.y), { zero: options.zero, log });
  const last = Math.max(...known.map(p => p.x)) || 1;
  const X = v => L + v / last * plot;
  const share = log ? v => Math.log(v / y.low) / Math.log(y.high / y.low) : v => (v - y.low) / (y.high - y.low);
  const Y = v => T + (1 - share(v)) * (height - T - B);
  const place = { svg, X, Y, L, R, T, B, width, height, last };
  drawAxes(place, y, axis, options, log);
  for (const line of shown) drawLine(svg, line, X, Y);
  for (const line of shown) if (options.best && line.best != null) drawBest(place, line, options);
  hover(place, figure, tip, shown, axis, options);
}

function drawAxes({ svg, X, Y, L, R, T, B, width, height, last }, y, axis, options, log) {
  const format = options.format || short, bottom = height - B;
  let above = Infinity;
  for (const v of y.ticks) {
    if (above - Y(v) < 15) continue;
    above = Y(v);
    add(svg, "line", { class: "grid", x1: L, x2: width - R, y1: above, y2: above });
    add(svg, "text", { class: "tick", x: L - 6, y: above + 4, "text-anchor": "end" }, format(v));
  }
  if (options.right) {
    const times = options.right.times, low = y.low * times, high = y.high * times;
    above = Infinity;
    for (const v of log ? logTicks(low, high) : ticks(low, high, niceStep(high - low, 5))) {
      if (above - Y(v / times) < 15) continue;
      above = Y(v / times);
      add(svg, "line", { class: "grid", x1: width - R, x2: width - R + 4, y1: above, y2: above });
      add(svg, "text", { class: "tick", x: width - R + 7, y: above + 4 }, short(v));
    }
  }
  for (const v of ticks(0, last, niceStep(last, (width - L - R) / 80, view.x === "seconds"))) {
    const label = add(svg, "text", { class: "tick x", y: bottom + 18, "text-anchor": "middle" }, axis.format(v));
    label.setAttribute("x", Math.min(X(v), width - label.getBBox().width / 2));
    add(svg, "line", { class: "grid", x1: X(v), x2: X(v), y1: bottom, y2: bottom + 4 });
  }
  add(svg, "line", { class: "grid", x1: L, x2: width - R, y1: bottom, y2: bottom });
  add(svg, "text", { class: "axis", x: L + (width - L - R) / 2, y: height - 4, "text-anchor": "middle" }, axis.title);
}

function drawLine(svg, { points, colour, bold, faint }, X, Y) {
  let path = "", lifted = true;
  for (const p of points) {
    if (p.y != null) path += `${lifted ? "M" : "L"}${X(p.x).toFixed(1)} ${Y(p.y).toFixed(1)}`;
    lifted = p.y == null;
  }
  add(svg, "path", { d: path, fill: "none", stroke: colour, "stroke-width": bold ? 2.2 : 1.3, "stroke-opacity": faint ? .55 : 1, "stroke-linejoin": "round" });
  const finite = points.filter(p => p.y != null);
  if (finite.length === 1 || bold && points.length <= 60)
    for (const p of finite) add(svg, "circle", { cx: X(p.x), cy: Y(p.y), r: 2.6, fill: colour });
}

function drawBest({ svg, X, Y, T, L, R, width }, line, options) {
  const best = line.points.find(p => p.step === line.best && p.y != null);
  if (!best) return;
  const ring = add(svg, "circle", { class: "best", "data-step": best.step, cx: X(best.x), cy: Y(best.y), r: 6.5, fill: "none", stroke: line.colour, "stroke-width": 2 });
  add(ring, "title", {}, `${line.label}: best, ${best.y.toFixed(4)} at step ${whole(best.step)}`);
  if (MANY) return;
  const text = add(svg, "text", { class: "best", y: Math.max(Y(best.y) - 14, T + 10) }, `best: ${best.y.toFixed(3)} at step ${whole(best.step)}`);
  const length = text.getBBox().width, middle = Math.min(Math.max(X(best.x), L + length / 2 + 4), width - R - length / 2 - 4);
  text.setAttribute("x", middle);
  text.setAttribute("text-anchor", "middle");
}

function hover({ svg, X, L, R, T, B, width, height, last }, figure, tip, lines, axis, options) {
  const hair = add(svg, "line", { class: "grid", y1: T, y2: height - B, visibility: "hidden" });
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width * width - L) / (width - L - R) * last;
    const near = line => line.points.reduce((a, b) => Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a);
    const drawn = lines.filter(line => line.points.length).map(line => ({ ...line, point: near(line) }));
    const nearest = drawn.map(l => l.point).reduce((a, b) => Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a);
    hair.setAttribute("x1", X(nearest.x)); hair.setAttribute("x2", X(nearest.x)); hair.setAttribute("visibility", "visible");
    const head = MANY ? `${axis.name} ${axis.format(nearest.x)}` : `step ${whole(nearest.step)}, ${short(nearest.tokens)} tokens, ${duration(nearest.seconds)}`;
    const format = options.format || short;
    tip.replaceChildren(add(null, "div", { class: "soft" }, head), ...drawn.map(({ label, colour, point }) => add(null, "div", {},
      add(null, "i", { class: "dot", style: `background:${colour}` }), clipped(label || options.title),
      add(null, "b", {}, point.y == null ? "not finite" : format(point.y)))));
    tip.hidden = false;
    const x = event.clientX - figure.getBoundingClientRect().left;
    tip.style.left = `${Math.max(4, x > figure.clientWidth / 2 ? x - tip.offsetWidth - 14 : Math.min(x + 14, figure.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = "3.4rem";
  };
  svg.onpointerleave = () => { hair.setAttribute("visibility", "hidden"); tip.hidden = true; };
}

function charts() {
  const inBits = { train: (rows, k, run) => run.bits_per_nat && rows.loss[k] != null ? rows.loss[k] * run.bits_per_nat : null, validation: (rows, k) => rows.bits_per_byte[k] };
  const inNats = { train: (rows, k) => rows.loss[k], validation: (rows, k) => rows.loss[k] };
  const loss = { wide: true, log: true, best: true };
  const right = RATIOS.length ? { unit: "bits per byte", times: RATIOS[0] } : null;
  const column = name => ({ train: (rows, k) => rows[name][k], zero: true });
  return [
    ...(COMPARABLE ? [] : [{ ...loss, ...inBits, title: "Loss in bits per byte, comparable between tokenizers", unit: "bits per byte" }]),
    { ...loss, ...inNats, title: COMPARABLE ? "Loss" : "Loss in nats per token, each of its own tokenizer", unit: "nats per token", right: COMPARABLE ? right : null },
    { ...column("learning_rate"), title: "Learning rate" },
    { ...column("grad_norm"), title: "Gradient norm", log: true, unit: "before clipping" },
    { ...column("tokens_per_second"), title: "Throughput", unit: "tokens per second" },
    { ...column("mfu"), title: "Model FLOPs utilisation", unit: "share of the devices' peak", format: percent },
    { series: run => run.expert_shares, zero: true, title: "Tokens per expert", unit: "share of all choices", format: percent },
    { ...column("expert_load"), title: "Fullest expert", unit: "its tokens over the mean" },
    { ...column("router_entropy"), title: "Router entropy", unit: "nats per token" },
    { ...column("dropped_share"), title: "Dropped choices", unit: "share of all choices", format: percent },
  ].map(chart).filter(Boolean);
}

function controls(redraw) {
  const group = (label, name, choices, set) => {
    const field = add($("controls"), "fieldset", {}, add(null, "span", {}, label));
    choices.forEach(([value, text], i) => {
      const input = add(null, "input", { type: "radio", name, value, ...(i ? {} : { checked: "" }) });
      input.onchange = () => { set(value); redraw(); };
      add(field, "label", {}, input, text);
    });
  };
  group("By", "x", [["step", "step"], ["tokens", "tokens"], ["seconds", "time"]], value => { view.x = value; });
  group("Loss and norm", "log", [["linear", "linear"], ["log", "log"]], value => { view.log = value === "log"; });
}

function legend() {
  const sample = (colour, thick) => add(null, "svg", { viewBox: "0 0 22 10" }, add(null, "path", { d: "M1 5H21", stroke: colour, "stroke-width": thick }));
  const entry = (mark, text, soft) => add($("legend"), "span", soft ? { class: "soft" } : {}, mark, clipped(text));
  if (MANY) RUNS.forEach((run, i) => entry(dot(i), run.name));
  entry(sample(MANY ? "currentColor" : COLOURS[0], 1.3), "training", MANY);
  entry(sample(MANY ? "currentColor" : COLOURS[1], 2.6), "validation", MANY);
  const ring = add(null, "svg", { viewBox: "0 0 22 10" }, add(null, "circle", { cx: 11, cy: 5, r: 4, fill: "none", stroke: MANY ? "currentColor" : COLOURS[1], "stroke-width": 1.6 }));
  entry(ring, "best validation", true);
}

// ---- tables

// A table whose first row is `head`; a cell is a text, a node, or {number: text}.
function table(parent, head, rows, props = {}) {
  const node = add(add(parent, "div", { class: "scroll" }), "table", props);
  const cell = (tag, value) => value?.number !== undefined ? add(null, tag, { class: "number" }, value.number) : add(null, tag, {}, value ?? "");
  if (head) add(node, "tr", {}, ...head.map(value => cell("th", value)));
  for (const { cells, ...rest } of rows) add(node, "tr", rest, ...cells.map((value, i) => cell(i ? "td" : typeof value === "string" ? "th" : "td", value)));
  return node;
}
const num = text => ({ number: text });
const text = v => v === undefined ? "" : typeof v === "number" && v >= 1e4 ? whole(v) : typeof v === "object" ? JSON.stringify(v) : String(v);

// Names and values, a column a run.
function fields(parent, columns, keys) {
  const head = MANY ? ["", ...RUNS.map(run => clipped(run.name))] : null;
  const rows = keys.map(key => ({ cells: [key, ...columns.map(column => text(column[key]))] }));
  table(parent, head, rows, { class: MANY ? "fields many" : "fields", style: `--columns:${columns.length}` });
}
const keysOf = columns => [...new Set(columns.flatMap(column => Object.keys(column)))];

function overview() {
  if (MANY) {
    const lowest = Math.min(...RUNS.map(run => run.facts.best_bits_per_byte ?? Infinity));
    table($("runs"), ["run", ...["best bits per byte", "best nats per token", "at step", "steps", "tokens", "time", "tokens/s"].map(num)],
      RUNS.map((run, i) => {
        const f = run.facts, name = add(null, "span", { style: "display:flex;align-items:center" }, dot(i), clipped(run.name));
        return { class: f.best_bits_per_byte === lowest ? "best" : "", cells: [name, ...[fixed(f.best_bits_per_byte), fixed(f.best_loss), whole(f.best_step), `${whole(f.step)} of ${whole(f.num_steps)}`, short(f.tokens), duration(f.seconds), short(f.tokens_per_second)].map(num)] };
      }));
    const sizes = RUNS.map(run => run.data["validation bytes"]);
    if (sizes.some(size => size !== sizes[0])) add($("runs"), "p", { class: "note" }, "The runs were validated on different texts, which compares the texts too.");
    if (!COMPARABLE) add($("runs"), "p", { class: "note" }, "Between tokenizers compare bits per byte, not nats per token. Training losses become bits per byte at the rate of the run's validation part.");
    return;
  }
  const f = RUNS[0].facts, grid = add($("runs"), "div", { class: "tiles" });
  const tile = (value, name) => value && add(grid, "div", {}, add(null, "b", {}, value), add(null, "span", { class: "soft" }, name));
  tile(fixed(f.best_loss), "best validation loss");
  tile(fixed(f.best_bits_per_byte), "its bits per byte");
  if (f.best_loss != null) tile(whole(f.best_step), "best step");
  if (f.best_loss != null) tile(fixed(f.last_loss), `the last one, step ${whole(f.last_step)}`);
  tile(whole(f.step), `of ${whole(f.num_steps)} steps`);
  tile(short(f.tokens), "tokens seen");
  tile(duration(f.seconds), "training time");
  tile(short(f.tokens_per_second), "tokens per second");
  add($("runs"), "p", { class: "note" }, "Losses are in nats per token. --step=best takes the checkpoint of the best step."
    + (f.not_finite ? ` ${whole(f.not_finite)} of the logged steps had no finite loss; the curve is broken there.` : ""));
}

function evaluations() {
  const all = RUNS.flatMap((run, i) => run.evaluations.map(row => ({ run, i, ...row })));
  if (!all.length) return;
  add($("evaluations"), "h2", {}, "Evaluations");
  const who = ({ run, i }) => MANY ? [add(null, "span", { style: "display:flex;align-items:center" }, dot(i), clipped(run.name))] : [];
  const detail = row => row.on + (row.stride ? `, stride ${row.stride}` : "") + (row.limit ? `, ${row.limit} rows` : "");
  const loss = all.filter(row => !row.task && !row.lm_eval);
  if (loss.length) {
    const best = key => Math.min(...loss.filter(r => r.run.name + detail(r) === key).map(r => r.loss));
    const several = key => loss.filter(r => r.run.name + detail(r) === key).length > 1;
    const head = [...(MANY ? ["run"] : []), "text", ...["step", "nats per token", "perplexity", "bits per byte", "tokens"].map(num)];
    table($("evaluations"), head, loss.map(row => {
      const key = row.run.name + detail(row);
      return { class: several(key) && row.loss === best(key) ? "best" : "", cells: [...who(row), clipped(detail(row)), ...[whole(row.step), fixed(row.loss), short(row.perplexity), fixed(row.bits_per_byte), whole(row.tokens)].map(num)] };
    }));
  }
  const tasks = all.filter(row => row.task).map(row => ({ ...row, figures: row }));
  for (const row of all.filter(row => row.lm_eval))
    for (const [task, figures] of Object.entries(row.lm_eval)) tasks.push({ ...row, on: task, figures });
  const skipped = new Set(["step", "seconds", "stride", "limit", "i"]);
  const names = [...new Set(tasks.flatMap(row => Object.keys(row.figures).filter(k => typeof row.figures[k] === "number" && !skipped.has(k))))];
  if (tasks.length) {
    const value = v => v == null ? "" : Number.isInteger(v) ? whole(v) : fixed(v);
    table($("evaluations"), [...(MANY ? ["run"] : []), "task", num("step"), ...names.map(name => num(name.replace(/_/g, " ")))],
      tasks.map(row => ({ cells: [...who(row), clipped(detail(row)), num(whole(row.step)), ...names.map(name => num(value(row.figures[name])))] })));
  }
  for (const row of tasks.filter(row => row.confusion)) {
    const labels = Object.keys(row.confusion);
    add($("evaluations"), "p", { class: "note" }, `${MANY ? row.run.name + ", " : ""}${detail(row)}, step ${whole(row.step)}: rows are the right labels, columns the answers`);
    table($("evaluations"), ["", ...labels.map(num)], labels.map(label => ({ cells: [label, ...labels.map(given => num(whole(row.confusion[label][given] ?? 0)))] })));
  }
}

function samples() {
  for (const run of RUNS.filter(run => run.samples.length)) {
    add($("samples"), "h2", { class: "clip" }, MANY ? `Samples of ${run.name}` : "Samples");
    const last = run.samples.length - 1;
    const slider = add(null, "input", { type: "range", min: 0, max: last, value: last, "aria-label": `which sample of ${run.name}` });
    const where = add(null, "span"), box = add(null, "pre");
    add($("samples"), "label", { class: "soft" }, slider, where);
    $("samples").append(box);
    slider.oninput = () => {
      const sample = run.samples[slider.value];
      where.textContent = `at step ${whole(sample.step)} (${+slider.value + 1} of ${last + 1})`;
      box.replaceChildren(add(null, "em", {}, sample.prompt), sample.text);
    };
    slider.oninput();
  }
}

function dataCard(run, i) {
  const data = run.data, config = run.config, card = add($("data"), "div", { class: "card" });
  if (MANY) add(card, "h3", { class: "clip", title: run.name }, dot(i), run.name);
  if (!Object.keys(data).length) { add(card, "p", { class: "soft" }, "Nothing is known yet: there is no checkpoint."); return; }
  const of = name => [data[`train ${name}`], data[`validation ${name}`]];
  const per = of("bytes").map((size, k) => size && (size / of("tokens")[k]).toFixed(2));
  table(card, ["", num("training"), num("validation")], [
    ["documents", ...of("documents").map(whole)], ["tokens", ...of("tokens").map(whole)],
    ["text", ...of("bytes").map(bytes)], ["bytes per token", ...per],
  ].map(([name, ...values]) => ({ cells: [name, ...values.map(v => num(v || ""))] })));
  const rest = [["source", config["data.source"]], ["tokenizer", `${config["data.tokenizer"]}: ${whole(data.vocabulary)} tokens`], ["cleaning", config["data.clean"] || "none"]];
  if (data.sources) rest.shift();
  table(card, null, rest.map(([name, value]) => ({ cells: [name, clipped(value)] })));
  if (data.sources) table(card, ["source", num("weight"), num("documents"), num("tokens")], Object.entries(data.sources).map(([name, part]) => ({ cells: [clipped(name), num(part.weight), num(whole(part["train documents"])), num(whole(part["train tokens"]))] })));
  for (const [what, counts] of [["dropped by", data.dropped], ["masked", data.masked]])
    if (counts) table(card, [what, num(what === "masked" ? "times" : "documents")], Object.entries(counts).map(([rule, count]) => ({ cells: [rule, num(whole(count))] })));
}

function settings() {
  const columns = RUNS.map(run => run.config), keys = keysOf(columns);
  const differs = key => new Set(columns.map(column => text(column[key]))).size > 1;
  const first = MANY ? keys.filter(differs) : keys.filter(key => RUNS[0].changed.includes(key));
  add($("config"), "h3", {}, MANY ? "What differs" : "Other than the defaults");
  if (first.length) fields($("config"), columns, first); else add($("config"), "p", { class: "soft" }, "Nothing.");
  const details = add($("config"), "details", {}, add(null, "summary", {}, `All ${keys.length} fields`));
  fields(details, columns, keys);
}

$("title").textContent = MANY ? `${RUNS.length} runs` : RUNS[0].name;
overview();
legend();
evaluations();
samples();
RUNS.forEach(dataCard);
const environments = RUNS.map(run => run.environment);
if (keysOf(environments).length) fields($("environment"), environments, keysOf(environments)); else add($("environment"), "p", { class: "soft" }, "Nothing is known yet: there is no checkpoint.");
settings();

const drawn = charts(), redraw = () => drawn.forEach(one => one());
$("charts").style.setProperty("--columns", (drawn.length - (COMPARABLE ? 1 : 2)) % 3 ? 2 : 3); // the first are wide
controls(redraw);
redraw(); // last: only now is it known whether the page has a scroll bar
addEventListener("resize", redraw);
