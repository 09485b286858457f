"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with attributes and children; text is never read as HTML. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Shares of 1, shown in percent as the terminal shows them. */
const SHARES = ["right", "edit", "kept"];
const digits = (value, metric) => {
  if (SHARES.includes(metric.name)) return `${Number((100 * value).toFixed(1))}`;
  return value === 0 ? "0" : value.toFixed(Math.abs(value) < 0.05 ? 4 : 3);
};
const titleOf = (metric) => SHARES.includes(metric.name) ? `${metric.title}, %` : metric.title;
const link = (path) => path.split("/").map(encodeURIComponent).join("/");
const methods = data.methods.filter((method) => !method.skipped);
const hasScore = (metric) =>
  data.analogies.some((one) => Object.values(one.results).some((made) => made.scores && metric.name in made.scores));
/** What a reader looks for first. */
const FIRST = ["right", "edit", "kept", "clip_direction"];
const rank = (metric) => (FIRST.indexOf(metric.name) + FIRST.length + 1) % (FIRST.length + 1);
const metrics = data.metrics.filter(hasScore).sort((one, other) => rank(one) - rank(other));
const metricNamed = (name) => metrics.find((metric) => metric.name === name);

/* The tables of means, sorted by a click on a column. */

function meansTable(group) {
  const body = element("tbody");
  const sorted = { column: null, descending: true };
  const scores = metrics.map((metric) => ({
    title: titleOf(metric),
    metric,
    value: (row) => row.scores[metric.name]?.[0],
    text: (row) => {
      const estimate = row.scores[metric.name];
      if (!estimate) return ["–"];
      const [mean, low, high] = estimate.slice(0, 3).map((value) => digits(value, metric));
      const count = estimate[3];
      return [mean, element("small", {}, `${low} … ${high}${count === row.solved ? "" : ` (n = ${count})`}`)];
    },
  }));
  const first = scores.filter((column) => FIRST.includes(column.metric.name));
  const columns = [
    ...first,
    { title: "solved", value: (row) => row.solved, text: (row) => [`${row.solved}${row.failed ? `, ${row.failed} failed` : ""}`] },
    { title: "s per analogy", value: (row) => row.seconds, text: (row) => [row.seconds == null ? "–" : row.seconds.toFixed(1)] },
    { title: "evaluations", value: (row) => row.evaluations, text: (row) => [row.evaluations == null ? "–" : row.evaluations.toFixed(0)] },
    { title: "peak memory", value: (row) => row.memory, text: (row) => [row.memory == null ? "–" : `${(row.memory / 1e9).toFixed(2)} GB`] },
    ...scores.filter((column) => !first.includes(column)),
  ];
  for (const column of columns.filter((one) => one.metric)) {
    const count = (row) => row.scores[column.metric.name]?.[3] ?? 0;
    const most = Math.max(...group.rows.map(count));
    const values = group.rows.filter((row) => count(row) === most).map(column.value);
    const best = column.metric.higher ? Math.max(...values) : Math.min(...values);
    column.isBest = (row) => values.length > 1 && count(row) === most && column.value(row) === best;
  }
  const heads = columns.map((column) =>
    element("th", { scope: "col" }, element("button", { type: "button", onclick: () => sortBy(column) }, column.title)));

  function sortBy(column) {
    sorted.descending = sorted.column === column ? !sorted.descending : !(column.metric && !column.metric.higher);
    sorted.column = column;
    fill();
  }

  function fill() {
    const rows = [...group.rows];
    if (sorted.column) {
      const sign = sorted.descending ? -1 : 1;
      const value = (row) => sorted.column.value(row) ?? sign * Infinity; // last in both directions
      rows.sort((one, other) => sign * (value(one) - value(other)) || 0);
    }
    columns.forEach((column, i) => {
      const order = sorted.descending ? "descending" : "ascending";
      heads[i].setAttribute("aria-sort", column === sorted.column ? order : "none");
    });
    body.replaceChildren(...rows.map((row) => {
      const method = data.methods.find((one) => one.name === row.method);
      const name = element("td", {}, row.method, element("small", {}, method.told ? `given ${method.told}` : ""));
      if (method.skipped) {
        return element("tr", {}, name, element("td", { class: "skipped", colspan: columns.length }, `skipped: ${method.skipped}`));
      }
      const cells = columns.map((column) => {
        return element("td", { class: column.isBest?.(row) ? "best" : false }, ...column.text(row));
      });
      return element("tr", {}, name, ...cells);
    }));
  }

  fill();
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "method"), ...heads));
  const wide = element("div", { class: "wide", tabindex: "0", role: "group", "aria-label": group.title },
    element("table", {}, head, body));
  const mark = () => wide.classList.toggle("cut", wide.scrollLeft + wide.clientWidth < wide.scrollWidth - 1);
  wide.addEventListener("scroll", mark);
  new ResizeObserver(mark).observe(wide);
  return [element("h2", {}, group.title), wide];
}

/* The analogies with their pictures. */

const chosen = new Set(methods.map((method) => method.name));

function options(select, entries) {
  select.append(...entries.map(([value, text]) => element("option", { value }, text)));
}

function score(analogy, method, metric) {
  return analogy.results[method]?.scores?.[metric.name];
}

function figure(path, caption) {
  const picture = element("img", { src: link(path), loading: "lazy", alt: caption[0].textContent ?? caption[0], width: 128, height: 128 });
  return element("figure", {}, element("a", { href: link(path) }, picture), element("figcaption", {}, ...caption));
}

function article(analogy, metric) {
  const [a, aPrime, b, truth] = analogy.pictures;
  const given = element("div", { class: "pictures given" },
    figure(a, ["A"]), figure(aPrime, ["A′"]), figure(b, ["B"]),
    ...(analogy.truth ? [figure(truth, ["true B′"])] : []));
  const made = methods.filter((method) => chosen.has(method.name)).map((method) => {
    const result = analogy.results[method.name];
    const name = element("span", {}, method.name);
    if (!result) {
      return element("figure", {}, element("div", { class: "unsolved" }, "not tried"), element("figcaption", {}, name));
    }
    if (result.failed) {
      return element("figure", {}, element("div", { class: "failed" }, `failed: ${result.failed}`), element("figcaption", {}, name));
    }
    const value = metric && score(analogy, method.name, metric);
    return figure(result.picture, [name, ...(value == null ? [] : [" ", element("b", {}, digits(value, metric))])]);
  });
  return element("article", {},
    element("h3", {}, analogy.edit ?? analogy.kind, " ", element("span", {}, analogy.name)),
    element("div", { class: "row" }, given, element("div", { class: "pictures" }, ...made)));
}

function draw() {
  const metric = metricNamed(byId("metric").value);
  const kind = byId("kind").value;
  const sort = byId("sort").value;
  const show = byId("show").value;
  const ofSort = (analogy) => {
    const names = sort === "mean" ? [...chosen] : [sort];
    const values = names.map((name) => score(analogy, name, metric)).filter((value) => value != null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  };
  const any = (analogy, holds) => [...chosen].some((name) => analogy.results[name] && holds(analogy.results[name]));
  const shown = data.analogies.filter((analogy) => (kind === "" || analogy.kind === kind) && (
    show === "all" ||
    (show === "failed" && any(analogy, (made) => made.failed)) ||
    (show === "missed" && any(analogy, (made) => made.scores && made.scores.edit < 1)) ||
    (show === "lost" && any(analogy, (made) => made.scores && made.scores.kept < 1))));
  if (sort !== "name" && metric) {
    const sign = (byId("order").value === "best") === metric.higher ? -1 : 1;
    const value = (analogy) => ofSort(analogy) ?? sign * Infinity;
    shown.sort((one, other) => sign * (value(one) - value(other)) || 0);
  }
  byId("count").textContent = `${shown.length} of ${data.analogies.length} analogies`;
  byId("analogies").replaceChildren(...shown.map((analogy) => article(analogy, metric)));
}

byId("about").textContent = `${data.program}, seed ${data.seed}. Means over the analogies of each kind first, then over kinds, with 95 % bootstrap intervals within kinds; the best of a column is marked, among the methods measured on most analogies.`;
byId("tables").append(...data.groups.flatMap(meansTable));
options(byId("kind"), [["", "all"], ...[...new Set(data.analogies.map((one) => one.kind))].sort().map((kind) => [kind, kind])]);
options(byId("metric"), metrics.map((metric) => [metric.name, titleOf(metric)]));
options(byId("sort"), [["name", "name"], ["mean", "mean of the methods"], ...methods.map((method) => [method.name, method.name])]);
options(byId("show"), [["all", "all analogies"], ["failed", "those that failed"],
  ...(metricNamed("edit") ? [["missed", "the change is missed"], ["lost", "something else is lost"]] : [])]);
byId("methods").append(...methods.map((method) =>
  element("label", {}, element("input", {
    type: "checkbox", checked: true,
    onchange: (event) => { event.target.checked ? chosen.add(method.name) : chosen.delete(method.name); draw(); },
  }), ` ${method.name}`)));
byId("controls").addEventListener("change", draw);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
draw();
