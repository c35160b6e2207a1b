(() => {
"use strict";
const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const FIFTHS = ["best fifth", "second", "third", "fourth", "last fifth"];
let data = null;

// Plotly reads a few tags in texts: names must stay names.
const text = (name) => {
  const short = String(name).length > 48 ? String(name).slice(0, 47) + "…" : String(name);
  return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
};
const swept = (value) => String(+value.toPrecision(6));
const short = (value, digits = 4) => {
  const rounded = +value.toPrecision(digits), size = Math.abs(rounded);
  if (!size || (size >= 1e-4 && size < 10 ** digits)) return String(rounded);
  return rounded.toExponential().replace(/e(.)(\d)$/, "e$10$2");
};
const figure = (value, digits = 3, fine = false) => {
  if (value === null || value === undefined) return "–";
  return fine || Math.abs(value) >= 1000 ? short(value) : value.toFixed(digits);
};
const figures = (of) => `${text(data.metric)} ${figure(of.metric, 3, data.fine.metric)}, cost ${figure(of.cost, 2, data.fine.cost)}`;

// -- charts

function layout(more) {
  const axis = {
    gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, ticks: "",
    tickfont: { color: colour("--soft") }, title: { standoff: 8, font: { color: colour("--soft"), size: 13 } },
    automargin: true, fixedrange: true, exponentformat: "e",
  };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--fg") },
    margin: { l: 8, r: 14, t: 14, b: 8 }, showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("--soft") } },
    hoverlabel: { bgcolor: colour("--bg"), bordercolor: colour("--soft"), font: { color: colour("--fg") }, align: "left" },
    xaxis: { ...axis, showgrid: false, ...xaxis, title: { ...axis.title, text: (xaxis || {}).text } },
    yaxis: { ...axis, ...yaxis, title: { ...axis.title, text: (yaxis || {}).text } },
    ...rest,
  };
}

function draw(id, traces, more) {
  const div = typeof id === "string" ? document.getElementById(id) : id;
  if (div) Plotly.react(div, traces, layout(more), { displayModeBar: false, responsive: true, showTips: false });
}

function empty(id, why) {
  const div = document.getElementById(id);
  if (!div) return;
  div.classList.add("none");
  div.textContent = why;
}

// One value alone would get an axis from far below to far above it.
function metricAxis(points) {
  const values = points.map((p) => p.metric), low = Math.min(...values), high = Math.max(...values);
  if (high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high))) return { text: text(data.metric), autorange: data.higher_is_better ? true : "reversed" };
  const pad = 0.05 * Math.abs(low) || 1e-3, range = [low - pad, low + pad];
  return { text: text(data.metric), range: data.higher_is_better ? range : range.reverse() };
}
const settingsOf = (trial) => Object.entries(data.labels).map(([key, label]) => `${label} ${swept(trial.values[key])}`);
const hover = (trial) => [
  `<b>${text(trial.name)}</b>`, ...settingsOf(trial),
  `${figures(trial)}, utility ${figure(trial.utility, 3, data.fine.utility)}`,
].join("<br>");

// Boxes in pixels, about where Plotly will put them: what labels must keep clear of.
function frameOf(id, points) {
  const div = document.getElementById(id), width = 0.94 * (div.clientWidth - 70), height = 0.85 * (div.clientHeight - 90);
  const right = Math.max(...points.map((p) => p.cost), 1e-9), values = points.map((p) => p.metric);
  const low = Math.min(...values), unit = height / (Math.max(...values) - low || 1);
  const at = (p) => [(p.cost / right) * width, (p.metric - low) * unit * (data.higher_is_better ? 1 : -1)];
  const taken = points.map((p) => { const [x, y] = at(p), bar = (p.sd || 0) * unit, tall = bar > 14 ? bar : 5; return [x - 5, y - tall, x + 5, y + tall]; });
  return { at, taken, width };
}

// Where a label stands: the first place beside its mark that nothing else holds; null: none is free.
function placeOf(point, label, frame) {
  const [x, y] = frame.at(point), wide = 6.3 * label.length + 4, high = 14;
  const starts = { left: x - 6 - wide, center: x - wide / 2, right: x + 6 }, feet = { top: y + 7, middle: y - high / 2, bottom: y - 7 - high };
  const boxes = ["top center", "bottom center", "middle right", "middle left", "top right", "bottom right", "top left", "bottom left"].map((place) => {
    const [v, h] = place.split(" ");
    return [place, [starts[h], feet[v], starts[h] + wide, feet[v] + high]];
  }).filter(([, box]) => box[0] > 0 && box[2] < frame.width + 40);
  const clear = ([, box]) => !frame.taken.some((t) => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3]);
  const [place, box] = boxes.find(clear) || [null, null];
  if (place) frame.taken.push(box);
  return place;
}

// One mark where several methods did the same.
function marks(points, name, symbol, shade, frame) {
  const merged = [], equal = (a, b) => Math.abs(a - b) <= 1e-6 * Math.max(Math.abs(a), Math.abs(b));
  for (const point of [...points].sort((a, b) => a.cost - b.cost)) {
    const same = merged.find((m) => equal(m.cost, point.cost) && equal(m.metric, point.metric));
    if (same) same.names.push(point.name);
    else merged.push({ ...point, names: [point.name] });
  }
  const near = (a, b) => { const [p, q] = [frame.at(a), frame.at(b)]; return Math.hypot(p[0] - q[0], p[1] - q[1]) < 8; };
  const said = merged.map((m, i) => (merged.slice(0, i).some((o) => near(o, m)) ? [] : merged.slice(i).filter((o) => near(m, o)).flatMap((o) => o.names)));
  const at = merged.map((m, i) => (said[i].length ? placeOf(m, said[i].join(", ").slice(0, 48), frame) : null));
  const labels = merged.map((m) => text(m.names.join(", ")));
  return {
    x: merged.map((m) => m.cost), y: merged.map((m) => m.metric), name, mode: "markers+text", text: said.map((names, i) => (at[i] ? text(names.join(", ")) : "")),
    textposition: at.map((place) => place || "top center"), textfont: { color: shade, size: 12 },
    cliponaxis: false, marker: { symbol, size: 9, color: shade },
    error_y: merged.some((m) => m.sd) ? { array: merged.map((m) => m.sd || 0), color: shade, thickness: 1, width: 3 } : undefined,
    hovertext: merged.map((m, i) => `<b>${labels[i]}</b><br>${figures(m)}`),
    hoverinfo: "text",
  };
}

function drawFront() {
  const judged = data.trials.filter((t) => t.metric !== null);
  if (!judged.length) return empty("chart-front", "No trial has been judged yet.");
  const points = (trials, more) => ({
    x: trials.map((t) => t.cost), y: trials.map((t) => t.metric), hovertext: trials.map(hover), hoverinfo: "text", mode: "markers", ...more,
  });
  const front = judged.filter((t) => t.on_front).sort((a, b) => a.cost - b.cost);
  const traces = [
    points(judged.filter((t) => !t.on_front), { name: "trials", marker: { color: colour("--c2"), size: 7, opacity: 0.75 } }),
    points(front, { name: "front", mode: "lines+markers", line: { shape: "hv", width: 1, color: colour("--accent") }, marker: { color: colour("--accent"), size: 8 } }),
    points(judged.filter((t) => t.name === data.best), { name: "best utility", marker: { symbol: "circle-open", size: 15, color: colour("--accent"), line: { width: 2 } } }),
  ].filter((trace) => trace.x.length);
  if (data.val_marks.length) traces.push(marks(data.val_marks, "baselines", "diamond", colour("--warm"), frameOf("chart-front", [...judged, ...data.val_marks])));
  draw("chart-front", traces, { xaxis: { text: `cost, ${data.unit}`, rangemode: "tozero" }, yaxis: metricAxis([...judged, ...data.val_marks]) });
}

function drawMethods() {
  if (!data.methods.length) return;
  const points = data.methods.map((m) => ({ name: m.name, cost: m.cost_mean, metric: m.metric_mean, sd: m.metric_sd }));
  const frame = frameOf("chart-methods", points);
  const own = marks(points.filter((p) => p.name === "policy"), "best policy", "circle", colour("--accent"), frame);
  const others = marks(points.filter((p) => p.name !== "policy"), "baselines", "diamond", colour("--warm"), frame);
  draw("chart-methods", [own, others], { xaxis: { text: `cost, ${data.unit}`, rangemode: "tozero" }, yaxis: metricAxis(points) });
}

// Judged trials in fifths of utility, best first: [[trial, ...], ...]; together where they are few.
function fifths() {
  const judged = data.trials.filter((t) => t.utility !== null).sort((a, b) => b.utility - a.utility);
  const groups = FIFTHS.map(() => []);
  judged.forEach((trial, i) => groups[judged.length < 5 ? 2 : Math.floor((i * 5) / judged.length)].push(trial));
  return groups;
}

// Many lines as one trace: gaps keep them apart, and the page stays quick.
function lines(trials, coordinates, more) {
  const x = [], y = [], hovertext = [];
  for (const trial of trials) {
    for (const [a, b, label] of coordinates(trial)) { x.push(a); y.push(b); hovertext.push(label); }
    x.push(null); y.push(null); hovertext.push("");
  }
  return { x, y, hovertext, hoverinfo: "text", mode: "lines", connectgaps: false, ...more };
}

// A trace per fifth, the best on top, and a legend in which thin lines can be told apart. Of many
// trials the best and the last fifth are shown; a click on the legend brings the others.
function fifthTraces(coordinates) {
  const groups = fifths(), n = groups.flat().length, many = n > 60;
  return groups.map((trials, i) => {
    const shade = colour(`--c${i}`), visible = many && i > 0 && i < 4 ? "legendonly" : true;
    const name = n < 5 ? "trials" : FIFTHS[i], group = { name, legendgroup: name, visible };
    const shown = lines(trials, coordinates, { ...group, showlegend: false, line: { width: many ? 0.8 : 1.4, color: shade }, opacity: many ? 0.55 : 0.9 });
    return shown.x.some((x) => x !== null) ? [{ ...group, x: [null], y: [null], mode: "lines", line: { width: 3, color: shade } }, shown] : [];
  }).reverse().flat();
}

function drawCurves() {
  const label = (t, n, value) => `<b>${text(t.name)}</b><br>after ${n} episodes: ${figure(value, 3, data.fine.return)}`;
  const curve = (t) => t.curve.map(([n, value]) => [n, value, label(t, n, value)]);
  const traces = fifthTraces(curve);
  traces.push(lines(data.trials.filter((t) => t.status === "running" && t.curve.length), curve, {
    name: "running", mode: "lines+markers", marker: { size: 3 }, line: { width: 1.2, dash: "dot", color: colour("--warm") },
  }));
  const best = data.trials.filter((t) => t.name === data.best);
  traces.push(lines(best, curve, { name: "best utility", line: { width: 2.6, color: colour("--accent") } }));
  const shown = traces.filter((t) => t.x.some((x) => x !== null) || t.legendgroup);
  if (!shown.length) return empty("chart-curves", "No episode has been played yet.");
  draw("chart-curves", shown, { xaxis: { text: "episodes" }, yaxis: { text: "return" }, legend: { ...legend(), traceorder: "reversed" } });
}

const legend = () => ({ orientation: "h", x: 0, y: 1.04, yanchor: "bottom", font: { color: colour("--soft") } });

function drawParallel() {
  const judged = fifths().flat();
  if (judged.length < 2) return empty("chart-parallel", "Drawn when two trials have been judged.");
  const judgedBy = [["metric", data.metric], ["cost", "cost"], ["utility", "utility"]];
  const axes = [
    ...Object.entries(data.labels).map(([key, label]) => ({ label, of: (t) => t.values[key], shown: swept })),
    ...judgedBy.map(([key, label]) => ({ label, of: (t) => t[key], shown: (value) => short(value, 3) })),
  ].map((axis) => {
    const values = [...new Set(judged.map(axis.of))].sort((a, b) => a - b);
    return { ...axis, values, low: values[0], high: values[values.length - 1] };
  }).filter((axis) => axis.values.length > 1);
  if (axes.length < 2) return empty("chart-parallel", "The trials do not differ.");
  const place = (axis, value) => (value - axis.low) / (axis.high - axis.low);
  const order = new Map(judged.map((t, i) => [t, i]));
  const coordinates = (t) => axes.map((axis, i) => {
    const spread = axis.values.length <= 6 ? 0.05 * (((order.get(t) * 0.618) % 1) - 0.5) : 0;
    return [i, place(axis, axis.of(t)) + spread, hover(t)];
  });
  const ticks = (axis) => (axis.values.length <= 5 ? axis.values : [axis.low, axis.high]);
  const annotations = axes.flatMap((axis, i) => ticks(axis).map((value) => ({
    x: i, y: place(axis, value), text: axis.shown(value), showarrow: false, xanchor: i === axes.length - 1 ? "right" : "left",
    xshift: i === axes.length - 1 ? -4 : 4, yshift: 8, font: { size: 11, color: colour("--fg") }, bgcolor: colour("--bg"), opacity: 0.85, borderpad: 1,
  })));
  draw("chart-parallel", fifthTraces(coordinates), {
    xaxis: { tickvals: axes.map((_, i) => i), ticktext: axes.map((a) => text(a.label)), showgrid: true, range: [-0.25, axes.length - 0.75], tickangle: 0, side: "bottom" },
    yaxis: { visible: false, range: [-0.06, 1.1] }, annotations, legend: { ...legend(), traceorder: "reversed" },
  });
}

function drawEffects() {
  const judged = data.trials.filter((t) => t.utility !== null);
  data.effects.forEach((effect, index) => {
    const div = one(`[data-effect="${index}"]`);
    const value = (t) => t.values[effect.setting];
    const dots = { y: judged.map((t) => t.utility), hovertext: judged.map(hover), hoverinfo: "text", mode: "markers", marker: { color: colour("--c2"), size: 5, opacity: judged.length > 60 ? 0.4 : 0.7 } };
    const base = { showlegend: false, yaxis: { nticks: 4 }, margin: { l: 8, r: 8, t: 6, b: 8 } };
    if (!effect.values) return draw(div, [{ ...dots, x: judged.map(value) }], { ...base, xaxis: { nticks: 4 } });
    const places = effect.values.map((v) => v.value);
    const x = judged.map((t, i) => places.indexOf(value(t)) + 0.3 * (((i * 0.618) % 1) - 0.5));
    const means = {
      x: places.map((_, i) => i), y: effect.values.map((v) => v.mean), mode: "lines+markers", line: { width: 1, color: colour("--accent") }, marker: { size: 8, color: colour("--accent") },
      error_y: { array: effect.values.map((v) => v.sd || 0), color: colour("--accent"), thickness: 1.2, width: 4 }, hoverinfo: "y",
    };
    draw(div, [{ ...dots, x }, means], { ...base, xaxis: { tickvals: places.map((_, i) => i), ticktext: places.map(swept), range: [-0.5, places.length - 0.5] } });
  });
}

const CHARTS = [drawFront, drawMethods, drawCurves, drawParallel, drawEffects];
const drawAll = () => CHARTS.forEach((chart) => chart());

// One after the other, so that the page answers in between.
function drawInTurn(charts = CHARTS) {
  const reached = document.documentElement.dataset;  // milliseconds since the page was asked for
  if (!charts.length) { reached.ready = Math.round(performance.now()); return; }
  charts[0]();
  if (charts === CHARTS) reached.usable = Math.round(performance.now());
  setTimeout(() => drawInTurn(charts.slice(1)), 0);
}

// -- the table of trials

const view = Object.assign({ filter: "", status: "", sort: null, direction: 1 }, remembered());

function remembered() {
  try { return JSON.parse(sessionStorage.getItem("rlhf_ray:" + location.pathname)) || {}; } catch { return {}; }
}

function remember() {
  try { sessionStorage.setItem("rlhf_ray:" + location.pathname, JSON.stringify(view)); } catch { /* private windows */ }
}

function showRows() {
  const body = one("#table tbody"), rows = all("tr", body), wanted = view.filter.trim().toLowerCase();
  if (view.sort !== null) {
    const key = (row) => row.cells[view.sort].dataset.v;
    const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what has no figure stays below
      return view.direction * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
    };
    body.append(...rows.sort(compare));
  }
  let shown = 0;
  for (const row of rows) {
    const fits = (!view.status || row.dataset.status === view.status) && (!wanted || row.textContent.toLowerCase().includes(wanted));
    row.hidden = !fits;
    shown += fits;
  }
  const every = `${rows.length} trial${rows.length === 1 ? "" : "s"}`;
  one("#shown").textContent = shown === rows.length ? every : `${shown} of ${every}`;
  all("#table thead th").forEach((th, i) => {
    if (i === view.sort) th.setAttribute("aria-sort", view.direction > 0 ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
  });
  remember();
}

function wireTable() {
  const filter = one("#filter"), status = one("#status");
  filter.value = view.filter;
  status.value = view.status;
  if (status.selectedIndex < 0) status.value = view.status = "";
  filter.addEventListener("input", () => { view.filter = filter.value; showRows(); });
  status.addEventListener("change", () => { view.status = status.value; showRows(); });
  all("#table thead button").forEach((button, i) => button.addEventListener("click", () => {
    const numeric = button.parentElement.classList.contains("n");
    view.direction = view.sort === i ? -view.direction : numeric ? -1 : 1;
    view.sort = i;
    showRows();
  }));
  showRows();
}

function wireCopying() {
  for (const button of all(".copy")) button.addEventListener("click", async () => {
    const pre = one("pre", button.parentElement);
    try {
      await navigator.clipboard.writeText(pre.textContent);
      button.textContent = "Copied";
    } catch {  // no clipboard here: select it, the user copies
      getSelection().selectAllChildren(pre);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// -- following a running sweep

function showHeard() {
  const heard = Number(one("main").dataset.heard), patience = Number(one("main").dataset.patience);  // in seconds
  if (!heard) return;
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - heard));
  const ago = seconds < 90 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
  one("#heard").textContent = seconds > patience ? `· last heard of ${ago} ago: perhaps it was stopped; the same command resumes it` : `· ${ago} ago`;
}

function show() {
  data = JSON.parse(document.getElementById("data").textContent);
  wireTable();
  wireCopying();
  showHeard();
  // the table can be used while plotly, which follows this script, is still being read
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", () => drawInTurn());
  else drawInTurn();
}

async function follow() {
  try {
    const answer = await fetch("content?have=" + one("main").dataset.version);
    if (answer.status === 200) replace(await answer.text());
    document.documentElement.dataset.following = answer.ok ? "yes" : "no";
  } catch {
    document.documentElement.dataset.following = "no";
    one("#heard").textContent = "· the server of this page has gone";
  }
}

function replace(html) {
  const focused = document.activeElement && document.activeElement.id, at = focused === "filter" ? one("#filter").selectionStart : null;
  const open = all("details").map((d) => d.open), tall = all(".tall").map((d) => d.scrollTop);
  all(".js-plotly-plot").forEach((div) => Plotly.purge(div));
  one("#content").innerHTML = html;
  const now = all("details");
  if (now.length === open.length) now.forEach((d, i) => { d.open = open[i]; });
  show();
  all(".tall").forEach((d, i) => { d.scrollTop = tall[i] || 0; });
  if (focused && document.getElementById(focused)) {
    document.getElementById(focused).focus({ preventScroll: true });
    if (at !== null) one("#filter").setSelectionRange(at, at);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printing");
  drawAll();
  all(".chart").filter((div) => !div.closest(".pair, .effects")).forEach((div) => div.data && Plotly.relayout(div, { width: 660 }));
  all(".pair .chart").forEach((div) => div.data && Plotly.relayout(div, { width: 320 }));
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  all(".js-plotly-plot").forEach((div) => Plotly.relayout(div, { width: null, autosize: true }));
  drawAll();
});
show();
setInterval(showHeard, 1000);
if (location.protocol.startsWith("http")) setInterval(follow, 3000);
else if (one("main").dataset.state === "running") setTimeout(() => location.reload(), 20000);
})();
