"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const shown = (value) => (value === null || value === undefined ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value));

// Tables: a click on a head sorts by the numbers behind the cells, a word in the field keeps the rows that hold it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const number = parseFloat(cell.dataset.value);
        return Number.isNaN(number) ? cell.textContent : number;
      };
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // What has no number comes last.
        const order = typeof x === "number" ? x - y : x.localeCompare(y);
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
for (const input of document.querySelectorAll("input[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const count = document.getElementById(`${input.dataset.filters}-count`);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let kept = 0;
    rows.forEach((row, at) => {
      row.hidden = !words.every((word) => texts[at].includes(word));
      kept += row.hidden ? 0 : 1;
    });
    count.textContent = `${kept} of ${rows.length} rows`;
  });
}

// Figures are drawn when they come into view.
const draw = (place, spec) => window.vegaEmbed(place, spec, { actions: false, renderer: "svg" });
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((item) => item.isIntersecting)) {
      seen.unobserve(entry.target);
      draw(entry.target, content.figures[entry.target.dataset.figure]);
    }
  },
  { rootMargin: "300px" },
);
document.querySelectorAll("[data-figure]").forEach((place) => seen.observe(place));

// A run's own section, at #run-<id>.
const element = (name, text, parent) => {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
};
const list = (title, values, parent) => {
  element("h4", title, parent);
  const made = element("dl", "", parent);
  for (const [key, value] of Object.entries(values)) {
    element("dt", key, made);
    element("dd", shown(value), made);
  }
};
const curve = (run, key, title) => ({
  $schema: "https://vega.github.io/schema/vega-lite/v6.json",
  description: `${title} by step`,
  background: "white",
  width: 340,
  height: 180,
  data: { values: run.history.filter((row) => row[key] !== null && row[key] !== undefined) },
  mark: { type: "line", point: true, color: "#0072B2" },
  encoding: { x: { field: "step", type: "quantitative" }, y: { field: key, type: "quantitative", title, scale: { zero: true } } },
});
const open = () => {
  const id = decodeURIComponent(location.hash).replace(/^#run-/, "");
  const run = location.hash.startsWith("#run-") ? content.runs[id] : undefined;
  const place = document.getElementById("run");
  place.replaceChildren();
  if (run === undefined) return;
  const head = element("h3", `Run ${id}`, place);
  head.tabIndex = -1;
  element("p", `${run.setting} (${run.state})`, place);
  for (const text of run.statement) element("p", text, place);
  list("Results", run.results, place);
  list("Settings that differ from the other runs'", run.config, place);
  const whole = element("details", "", place);
  element("summary", "Whole config", whole);
  element("pre", JSON.stringify({ ...content.common, ...run.config }, null, 1), whole);
  list("Provenance", run.provenance, place);
  for (const [key, title] of [["epsilon", "ε spent"], ["noise_multiplier", "noise multiplier"], ["learning_rate", "learning rate"], ["loss", "training loss (not private)"]]) {
    if (run.history.some((row) => row[key] !== null && row[key] !== undefined)) {
      draw(element("div", "", place), curve(run, key, title));
    }
  }
  place.scrollIntoView();
  head.focus({ preventScroll: true });
};
window.addEventListener("hashchange", open);
open();
