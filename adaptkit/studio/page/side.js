// The left side: classes, and how images come in.

import { $, ask, attempt, change, h, say, store, take, trouble } from "./core.js";
import { label } from "./grid.js";

const PART_FILES = 16;
const PART_BYTES = 48 * 2 ** 20;

/** The key that labels with the class at a place; "" from the eleventh on. */
export const keyOf = (place) => (place < 9 ? String(place + 1) : place === 9 ? "0" : "");

export function drawClasses() {
  const { classes, images } = store.state;
  const counts = new Map();
  for (const image of images) counts.set(image.label, (counts.get(image.label) ?? 0) + 1);
  const list = $("#classes");
  const text = JSON.stringify(classes.map((one) => [one.id, one.name, counts.get(one.id) ?? 0]));
  if (list.dataset.drawn === text) return; // leaves the focus where it is
  const had = document.activeElement?.dataset?.key;
  list.dataset.drawn = text;
  list.replaceChildren(...classes.map((one, place) => classLine(one, place, counts.get(one.id) ?? 0)));
  if (had) list.querySelector(`[data-key="${had}"]`)?.focus();
}

function classLine({ id, name }, place, count) {
  const key = keyOf(place);
  const apply = h(
    "button",
    { type: "button", class: "class", title: `Label the chosen image ${name}`, "data-key": `l${id}`, onclick: () => label(id) },
    h("kbd", {}, key),
    h("span", { class: "name" }, name),
    h("span", { class: "count", "aria-label": `${count} images` }, String(count)),
  );
  const edit = h(
    "button",
    { type: "button", class: "edit", "aria-label": `Rename or remove ${name}`, "data-key": `e${id}`, onclick: () => rename(id, name) },
    "…",
  );
  const line = h("li", { "data-class": id }, apply, edit);
  dropZone(line, (files) => upload(files, id));
  return line;
}

function rename(id, name) {
  const dialog = $("#renamer");
  $("#renamer-text").value = name;
  dialog.returnValue = "cancel";
  dialog.onclose = () => {
    const wanted = $("#renamer-text").value;
    if (dialog.returnValue === "remove") change(`/api/classes/${id}`, { method: "DELETE" }, `Removed ${name}; its images stay.`);
    if (dialog.returnValue === "rename" && wanted.trim() !== name) {
      change(`/api/classes/${id}`, { method: "PATCH", body: { name: wanted } }, `Renamed to ${wanted}.`);
    }
  };
  dialog.showModal();
  $("#renamer-text").select();
}

$("#add-class").addEventListener("submit", async (event) => {
  event.preventDefault();
  const names = $("#class-name").value.split(/[,;\n]/).map((name) => name.trim()).filter(Boolean);
  if (!names.length) return;
  const state = await change("/api/classes", { body: { names } }, `Added ${names.join(", ")}.`);
  if (state) $("#class-name").value = "";
});

// --- images ----------------------------------------------------------------------------------------------------------

/** Make an element take dropped files, also those in dropped folders. */
export function dropZone(element, take) {
  element.addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    event.stopPropagation();
    element.classList.add("over");
  });
  for (const name of ["dragleave", "drop"]) element.addEventListener(name, () => element.classList.remove("over"));
  element.addEventListener("drop", async (event) => {
    event.preventDefault();
    event.stopPropagation();
    const files = await droppedFiles(event.dataTransfer);
    if (files.length) take(files);
    else trouble("Nothing in what you dropped is a file.");
  });
}

async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  if (entries.length && entries.every(Boolean)) return (await Promise.all(entries.map(filesBelow))).flat();
  return [...transfer.files];
}

async function filesBelow(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...some.filter((one) => !one.name.startsWith(".")));
  }
  return (await Promise.all(found.map(filesBelow))).flat();
}

function parts(files) {
  const found = [];
  let part = [];
  let bytes = 0;
  for (const file of files) {
    if (part.length && (part.length >= PART_FILES || bytes + file.size > PART_BYTES)) {
      found.push(part);
      [part, bytes] = [[], 0];
    }
    part.push(file);
    bytes += file.size;
  }
  return part.length ? [...found, part] : found;
}

/** Send images in parts; each part is on disk before the next one goes. */
export async function upload(files, classId = null) {
  const group = `drop-${crypto.randomUUID()}`;
  const refused = [];
  let added = 0;
  let sent = 0;
  for (const part of parts([...files])) {
    const form = new FormData();
    for (const file of part) form.append("files", file, file.name || "picture.png");
    if (classId) form.append("label", classId);
    form.append("group", group);
    working("adding images", sent, files.length);
    try {
      const state = await ask("/api/images", { method: "POST", form });
      added += state.added.length;
      refused.push(...state.refused);
      take(state);
    } catch (error) {
      if (error.status !== 400) {
        working();
        return trouble(`${error.message} ${added} of ${files.length} images were added.`);
      }
      refused.push({ why: error.message });
    }
    sent += part.length;
  }
  working();
  const known = files.length - added - refused.length;
  say(`Added ${added} image${added === 1 ? "" : "s"}${known > 0 ? `; ${known} were there already` : ""}.`);
  trouble(refused.length ? `${refused.length} left out: ${refused.slice(0, 3).map((one) => one.why).join(" ")}` : "");
}

/** Show how far something is; without arguments, that nothing goes on. */
export function working(what = "", done = 0, total = 0) {
  $("#working").hidden = !what;
  $("#working span").textContent = what ? `${what}: ${done} of ${total}` : "";
  $("#working progress").max = total || 1;
  $("#working progress").value = done;
}

$("#files").addEventListener("change", (event) => {
  upload([...event.target.files]);
  event.target.value = "";
});
dropZone($("#drop"), upload);
dropZone(document.body, upload);

$("#add-folder").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    const body = { path: $("#folder-path").value, labels: $("#folder-labels").checked };
    const state = await ask("/api/folder", { method: "POST", body });
    say(`Copying ${state.found} images in.`);
    take(state);
  });
});
