// The images: which are shown, which has the focus, which are chosen, and what keys do with them.

import { $, change, changed, className, h, imageOf, percent, picture, store, thumbnail } from "./core.js";

const PAGE = 120;
const TABS = [
  ["next", "Next", "N"],
  ["unlabelled", "Unlabelled", "U"],
  ["labelled", "Labelled", "L"],
  ["wrong", "Wrong", "W"],
];

let tab = "next";
let shown = PAGE;
let focused = null; // id of the image that the keys are about
let chosen = new Set();
let queueOfNext = []; // kept still while one works through it
const cards = new Map();

// --- which images ----------------------------------------------------------------------------------------------------

function idsOf(name) {
  const images = store.state.images;
  if (name === "unlabelled") return images.filter((image) => !image.label).map((image) => image.id);
  if (name === "labelled") return images.filter((image) => image.label).map((image) => image.id);
  if (name === "wrong") return Object.keys(store.estimate?.wrong ?? {}).filter((id) => imageOf(id)?.label);
  return nextIds();
}

/** The proposals: those left stay where they are, new ones come behind them once few are left. */
function nextIds() {
  const open = new Set(store.state.images.filter((image) => !image.label).map((image) => image.id));
  queueOfNext = queueOfNext.filter((id) => open.has(id));
  if (queueOfNext.length < 6) {
    const fresh = store.answers.next.filter((id) => open.has(id) && !queueOfNext.includes(id));
    queueOfNext = [...queueOfNext, ...fresh];
  }
  return queueOfNext;
}

export function show(name) {
  tab = name;
  shown = PAGE;
  chosen.clear();
  if (name === "next") queueOfNext = [];
  changed();
  const first = idsOf(name)[0];
  focus(first ?? null, { move: false });
}

/** Go to one image, wherever it is listed. */
export function reveal(id) {
  const image = imageOf(id);
  if (!image) return;
  if (!idsOf(tab).includes(id)) show(image.label ? "labelled" : "unlabelled");
  shown = Math.max(shown, idsOf(tab).indexOf(id) + 1);
  changed();
  focus(id);
  cards.get(id)?.scrollIntoView({ block: "nearest" });
}

export const focusedImage = () => focused;

/** What the keys act on: the chosen images, or else the one with the focus. */
function subjects() {
  const listed = new Set(idsOf(tab));
  const many = [...chosen].filter((id) => listed.has(id));
  return many.length ? many : focused && listed.has(focused) ? [focused] : [];
}

// --- showing ---------------------------------------------------------------------------------------------------------

export function drawGrid() {
  if (!store.state) return;
  drawTabs();
  const all = idsOf(tab);
  const ids = all.slice(0, shown);
  const keep = new Set(ids);
  const had = holding && (document.activeElement === document.body || document.activeElement?.closest(".card") != null);
  if (focused && !keep.has(focused)) focused = null;
  for (const id of [...chosen]) if (!keep.has(id)) chosen.delete(id);
  const grid = $("#grid");
  ids.forEach((id, place) => {
    const card = cards.get(id) ?? makeCard(id);
    if (grid.children[place] !== card) grid.insertBefore(card, grid.children[place] ?? null);
    fillCard(card, id);
  });
  for (const [id, card] of cards) {
    if (!keep.has(id)) {
      card.remove();
      cards.delete(id);
    }
  }
  if (!focused && ids.length) focused = ids[Math.min(lastPlace, ids.length - 1)];
  for (const [id, card] of cards) card.tabIndex = id === focused ? 0 : -1;
  if (had && focused && document.activeElement !== cards.get(focused)) cards.get(focused).focus({ preventScroll: false });
  $("#more").hidden = all.length <= ids.length;
  $("#note").textContent = note();
  $("#empty").textContent = ids.length ? "" : emptyText();
  drawPreview();
}

let lastPlace = 0; // where the focus was, so that it stays there when the image goes
let holding = false; // whether the focus was on an image last; it comes back when an empty list fills again
document.addEventListener("focusin", (event) => (holding = event.target.closest(".card") != null));

function drawTabs() {
  const tabs = $("#tabs");
  TABS.forEach(([name, text, key], place) => {
    const count = idsOf(name).length;
    const button = tabs.children[place] ?? tabs.appendChild(h("button", { type: "button", role: "tab", onclick: () => show(name) }));
    button.setAttribute("aria-selected", name === tab);
    button.setAttribute("aria-keyshortcuts", key);
    button.replaceChildren(text, " ", h("span", { class: "count" }, String(count)));
  });
}

function note() {
  const { note, by } = store.answers;
  if (note) return note;
  return by && tab === "next" ? `These would teach it most. Guesses by ${by}.` : "";
}

function emptyText() {
  if (!store.state.images.length) return "No images yet: drop some on the page, or name a folder.";
  if (tab === "next") return store.answers.waiting ? "Looking at the images …" : "Nothing left to label. Add images, or try it on new ones.";
  if (tab === "wrong") return store.estimate ? "None was answered wrongly in the cross-validation." : "Label a few images of each class first.";
  return tab === "labelled" ? "No image has a label yet." : "Every image has a label.";
}

function makeCard(id) {
  const image = h("img", { src: thumbnail(id), alt: "", loading: "lazy", decoding: "async", draggable: "false" });
  const text = h("span", { class: "guess" });
  const card = h("div", { class: "card", role: "option", "data-id": id, tabindex: "-1" }, image, text);
  card.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey) toggle(id);
    else if (event.shiftKey) chooseTo(id);
    else chosen.clear();
    focus(id);
  });
  card.addEventListener("focus", () => {
    if (focused !== id) focus(id, { move: false });
  });
  cards.set(id, card);
  return card;
}

function fillCard(card, id) {
  const image = imageOf(id);
  const guess = guessOf(id);
  const failed = store.state.failed[id];
  const wrong = store.estimate?.wrong?.[id];
  let text = image.label ? className(image.label) : guess ? `${className(guess[0])}? ${percent(guess[1])}` : "…";
  if (image.label && wrong && tab === "wrong") text = `${className(image.label)}, taken for ${className(wrong)}`;
  if (failed) text = "can't be read";
  card.querySelector(".guess").textContent = text;
  card.title = failed ?? image.name;
  card.setAttribute("aria-label", `${image.name}: ${text}`);
  card.setAttribute("aria-selected", chosen.has(id));
  card.classList.toggle("labelled", Boolean(image.label));
  card.classList.toggle("unsure", !image.label && guess != null && guess[1] < 0.6);
  card.classList.toggle("focused", id === focused);
}

export const guessOf = (id) => store.answers.images[id]?.[0];

function drawPreview() {
  const box = $("#preview");
  const image = focused && imageOf(focused);
  box.hidden = !image;
  if (!image) return;
  if (box.dataset.id !== focused) {
    box.dataset.id = focused;
    box.replaceChildren(largePicture(focused, image.name), h("p", { class: "name" }, image.name), h("ul"), doing());
  }
  const [accept, free] = box.querySelectorAll(".row button");
  accept.hidden = Boolean(image.label) || !guessOf(focused);
  free.hidden = !image.label;
  const rows = (store.answers.images[focused] ?? []).map(([id, share]) => bar(className(id), share));
  const label = image.label ? [h("li", { class: "is" }, `labelled ${className(image.label)}`)] : [];
  box.querySelector("ul").replaceChildren(...label, ...rows);
}

/** What Enter, Backspace and Delete do, for hands without keys. */
function doing() {
  const button = (text, onclick) => h("button", { type: "button", onclick }, text);
  return h("div", { class: "row" }, button("The guess is right", acceptGuesses), button("Take the label away", () => label(null)), button("Remove the image", remove));
}

/** The image itself, or its small picture where the browser can't show the file (TIFF). */
function largePicture(id, name) {
  const small = () => (large.src = thumbnail(id));
  const large = h("img", { src: picture(id), alt: name });
  large.addEventListener("error", small, { once: true });
  return large;
}

/** A class with its probability as a bar. */
export function bar(name, share) {
  const line = h("li", { class: "bar" }, h("span", {}, name), h("b", {}, percent(share)));
  line.style.setProperty("--share", String(share));
  return line;
}

// --- focus and choice ------------------------------------------------------------------------------------------------

function focus(id, { move = true } = {}) {
  const before = focused;
  focused = id;
  lastPlace = Math.max(0, idsOf(tab).indexOf(id));
  for (const one of [before, id]) {
    const card = one && cards.get(one);
    if (card) {
      card.tabIndex = one === id ? 0 : -1;
      card.classList.toggle("focused", one === id);
      card.setAttribute("aria-selected", chosen.has(one));
    }
  }
  for (const [key, card] of cards) card.setAttribute("aria-selected", chosen.has(key));
  if (move && id) cards.get(id)?.focus();
  drawPreview();
}

function toggle(id) {
  if (!chosen.delete(id)) chosen.add(id);
}

function chooseTo(id) {
  const ids = idsOf(tab);
  const [from, to] = [ids.indexOf(focused), ids.indexOf(id)].sort((a, b) => a - b);
  for (const one of ids.slice(Math.max(0, from), to + 1)) chosen.add(one);
}

function columns() {
  const tops = [...$("#grid").children].map((card) => card.offsetTop);
  const second = tops.findIndex((top) => top !== tops[0]);
  return second < 0 ? tops.length || 1 : second;
}

function step(by, choosing) {
  const ids = idsOf(tab).slice(0, shown);
  const place = Math.min(Math.max(ids.indexOf(focused) + by, 0), ids.length - 1);
  if (place < 0) return;
  if (choosing) chooseTo(ids[place]);
  else chosen.clear();
  focus(ids[place]);
}

// --- what keys do ----------------------------------------------------------------------------------------------------

/** Label what the keys are about; the focus then stands on the next image. */
export function label(classId) {
  const images = subjects();
  if (!images.length) return;
  labelImages(images, classId);
}

export function labelImages(images, classId) {
  chosen.clear();
  for (const id of images) {
    const image = imageOf(id);
    if (image) image.label = classId; // shown at once; the answer of the studio replaces it
  }
  const stays = tab === "labelled" || tab === "wrong";
  if (stays && images.length === 1 && images[0] === focused) step(1, false);
  changed();
  const count = images.length > 1 ? `${images.length} images` : "Labelled";
  const spoken = classId ? `${count}: ${className(classId)}.` : "Label taken away.";
  change("/api/label", { body: { images, label: classId } }, spoken);
}

function acceptGuesses() {
  const byClass = new Map();
  for (const id of subjects()) {
    const guess = guessOf(id);
    if (guess && !imageOf(id).label) byClass.set(guess[0], [...(byClass.get(guess[0]) ?? []), id]);
  }
  for (const [classId, images] of byClass) labelImages(images, classId);
}

/** Handle a key while an image has the focus; false where it means nothing here. */
export function gridKey(event) {
  const across = columns();
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -1e9, End: 1e9 };
  if (event.key in steps) step(steps[event.key], event.shiftKey);
  else if (event.key === "Enter") acceptGuesses();
  else if (event.key === " ") focused && (toggle(focused), focus(focused));
  else if (event.key === "Backspace") label(null);
  else if (event.key === "Delete") remove();
  else if (event.key === "Escape") chosen.clear(), changed();
  else return false;
  return true;
}

function remove() {
  const images = subjects();
  if (!images.length) return;
  chosen.clear();
  change("/api/remove", { body: { images } }, `Removed ${images.length === 1 ? "an image" : `${images.length} images`}; Ctrl Z brings it back.`);
}

export function chooseAll() {
  for (const id of idsOf(tab).slice(0, shown)) chosen.add(id);
  changed();
}

export function focusGrid() {
  const id = focused ?? idsOf(tab)[0];
  if (id) focus(id);
}

$("#more").addEventListener("click", () => {
  shown += PAGE;
  changed();
});
