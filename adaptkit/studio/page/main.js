// Puts the page together: draws on every change, hands out keys, and opens the dialogs.

import { $, ask, attempt, change, h, onChange, store, take } from "./core.js";
import { chooseAll, drawGrid, focusGrid, focusedImage, gridKey, label, show } from "./grid.js";
import { drawGood } from "./good.js";
import { drawClasses, keyOf, working } from "./side.js";
import { drawCode } from "./use.js";

let drawnMethod = "";

onChange(() => {
  if (!store.state) return;
  const { state } = store;
  $("#folder").textContent = state.folder;
  for (const [name, what] of [["undo", state.undo], ["redo", state.redo]]) {
    $(`#${name}`).disabled = !what;
    $(`#${name}`).title = what ? `${name}: ${what}` : "";
  }
  const now = state.progress;
  if (now) working(now.what, now.done, now.total);
  else if (!$("#working span").textContent.startsWith("adding")) working();
  drawClasses();
  drawGrid();
  drawGood();
  if (drawnMethod !== state.method) drawCode();
  drawnMethod = state.method;
});

// --- keys ------------------------------------------------------------------------------------------------------------

const undo = () => change("/api/undo", { body: {} });
const redo = () => change("/api/redo", { body: {} });
$("#undo").addEventListener("click", undo);
$("#redo").addEventListener("click", redo);
$("#keys-open").addEventListener("click", () => $("#keys").showModal());

const LETTERS = {
  "?": () => $("#keys").showModal(),
  c: openPicker,
  a: chooseAll,
  n: () => go("next"),
  u: () => go("unlabelled"),
  l: () => go("labelled"),
  w: () => go("wrong"),
};

function go(tab) {
  show(tab);
  focusGrid();
}

document.addEventListener("keydown", (event) => {
  const writing = event.target.closest?.("input:not([type=checkbox]):not([type=file]), textarea, select, dialog");
  if (writing || event.altKey || event.isComposing) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    if (key === "z" && !event.shiftKey) event.preventDefault(), undo();
    if (key === "y" || (key === "z" && event.shiftKey)) event.preventDefault(), redo();
    return;
  }
  const place = store.state?.classes.findIndex((one, index) => keyOf(index) === event.key) ?? -1;
  if (place >= 0 && focusedImage()) {
    event.preventDefault();
    label(store.state.classes[place].id);
  } else if (key in LETTERS) {
    event.preventDefault();
    LETTERS[key]();
  } else if (event.target.closest?.("#grid") && gridKey(event)) {
    event.preventDefault();
  }
});

// --- a class by its first letters ------------------------------------------------------------------------------------

function openPicker() {
  if (!store.state?.classes.length || !focusedImage()) return;
  $("#picker-text").value = "";
  listMatches();
  $("#picker").showModal();
}

function matches() {
  const text = $("#picker-text").value.trim().toLowerCase();
  const found = store.state.classes.filter((one) => one.name.toLowerCase().includes(text));
  const first = (one) => (one.name.toLowerCase().startsWith(text) ? 0 : 1);
  return found.sort((a, b) => first(a) - first(b)).slice(0, 8);
}

function listMatches() {
  const found = matches();
  $("#picker-list").replaceChildren(
    ...found.map((one, place) => h("li", {}, h("button", { type: "button", class: place ? null : "first", onclick: () => pick(one.id) }, one.name))),
  );
  if (!found.length) $("#picker-list").replaceChildren(h("li", { class: "quiet" }, "No class is called so."));
}

function pick(id) {
  $("#picker").close();
  focusGrid();
  label(id);
}

$("#picker-text").addEventListener("input", listMatches);
$("#picker form").addEventListener("submit", (event) => {
  event.preventDefault();
  const [first] = matches();
  if (first) pick(first.id);
});
$("#picker").addEventListener("close", focusGrid);

attempt(async () => take(await ask("/api/state")));
