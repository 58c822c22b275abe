// How good it is: the estimate, the confused pairs as pictures, and the comparison of methods.

import { $, ask, attempt, change, className, h, percent, store, thumbnail } from "./core.js";
import { reveal } from "./grid.js";

const PAIRS = 6;
const PICTURES = 4;

export function drawGood() {
  drawEstimate();
  drawConfused();
  drawMethods();
}

function drawEstimate() {
  const box = $("#estimate");
  const found = store.estimate;
  if (!found) return box.replaceChildren(h("p", { class: "quiet" }, store.estimateNote || "…"));
  const [low, high] = found.interval;
  const folds = h("details", {}, h("summary", {}, "class by class"), h("ul", {}, ...classLines(found)));
  folds.open = box.querySelector("details")?.open ?? false;
  const single = found.untested.length ? ` ${found.untested.map(className).join(", ")}: one image, not tested yet.` : "";
  box.replaceChildren(
    h("p", { class: "figure" }, h("b", { id: "accuracy" }, percent(found.accuracy)), " right"),
    range(low, high, found.accuracy),
    h(
      "p",
      { class: "quiet" },
      `95 % interval ${percent(low)} to ${percent(high)}: ${found.correct} of ${found.total} labelled images,` +
        ` each answered by a classifier that hadn't seen it.${single}`,
    ),
    folds,
  );
}

function classLines(found) {
  return Object.entries(found.per_class)
    .filter(([, [, total]]) => total)
    .map(([id, [right, total]]) => {
      const line = h("li", { class: "bar" }, h("span", {}, className(id)), h("b", {}, `${right} of ${total}`));
      line.style.setProperty("--share", String(right / total));
      return line;
    });
}

/** An interval with its middle, from 0 to 1. */
function range(low, high, middle) {
  const line = h("div", { class: "range", role: "img", "aria-label": `${percent(low)} to ${percent(high)}` }, h("i"), h("b"));
  line.style.setProperty("--low", String(low));
  line.style.setProperty("--high", String(high));
  line.style.setProperty("--middle", String(middle));
  return line;
}

function drawConfused() {
  const pairs = store.estimate?.confusions ?? [];
  const text = JSON.stringify([Boolean(store.estimate), pairs.slice(0, PAIRS), store.state.classes]);
  const box = $("#confused");
  if (box.dataset.drawn === text) return;
  box.dataset.drawn = text;
  if (!pairs.length) {
    const none = store.estimate ? "No class is taken for another." : "Known when there is an estimate.";
    return box.replaceChildren(h("p", { class: "quiet" }, none));
  }
  box.replaceChildren(
    ...pairs.slice(0, PAIRS).map((pair) =>
      h(
        "figure",
        {},
        h("figcaption", {}, h("b", {}, className(pair.true)), " taken for ", h("b", {}, className(pair.taken_for)), ` ${pair.images.length}×`),
        ...pair.images.slice(0, PICTURES).map((id) =>
          h(
            "button",
            { type: "button", class: "picture", "aria-label": `Look at this ${className(pair.true)}`, onclick: () => reveal(id) },
            h("img", { src: thumbnail(id), alt: "", loading: "lazy" }),
          ),
        ),
      ),
    ),
  );
}

function drawMethods() {
  const select = $("#method");
  if (select.options.length !== store.state.methods.length) {
    select.replaceChildren(...store.state.methods.map((one) => h("option", { value: one.name, title: one.what }, one.name)));
  }
  select.value = store.state.method;
  for (const row of $("#compared tbody").rows) row.classList.toggle("chosen", row.dataset.method === store.state.method);
}

$("#method").addEventListener("change", (event) => choose(event.target.value));

const choose = (method) => change("/api/method", { body: { method } }, `${method} answers now.`);

$("#compare").addEventListener("click", () =>
  attempt(async () => {
    const button = $("#compare");
    button.disabled = true;
    const results = [];
    $("#compared").hidden = false;
    try {
      for (const { name } of store.state.methods) {
        button.textContent = `Comparing: ${name} …`;
        results.push(await ask(`/api/estimate?method=${encodeURIComponent(name)}`));
        results.sort((a, b) => b.accuracy - a.accuracy || a.seconds - b.seconds);
        $("#compared tbody").replaceChildren(...results.map(methodRow));
      }
    } finally {
      button.disabled = false;
      button.textContent = "Compare all on these images";
      $("#compared").hidden = !results.length;
    }
  }),
);

function methodRow(found) {
  const pick = h("button", { type: "button", class: "link", title: "Answer with it", onclick: () => choose(found.method) }, found.method);
  const row = h(
    "tr",
    { "data-method": found.method, class: found.method === store.state.method ? "chosen" : null },
    h("th", { scope: "row" }, pick),
    h("td", {}, percent(found.accuracy)),
    h("td", {}, range(found.interval[0], found.interval[1], found.accuracy), h("span", { class: "quiet" }, found.interval.map(percent).join(" – "))),
  );
  return row;
}
