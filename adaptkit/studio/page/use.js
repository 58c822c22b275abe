// Trying it on new images and the camera, saving, exporting, and the same in Python.

import { $, ask, attempt, className, h, percent, say, trouble } from "./core.js";
import { bar } from "./grid.js";
import { dropZone, upload } from "./side.js";

const KEPT = 12;
const LOOK_EVERY = 700; // milliseconds between two looks through the camera

// --- images ----------------------------------------------------------------------------------------------------------

async function tryFiles(files) {
  for (const file of files) {
    await attempt(async () => {
      const { answers } = await ask("/api/try", { method: "POST", form: formOf(file) });
      showAnswer(file, answers[0]);
    });
  }
}

function formOf(file) {
  const form = new FormData();
  form.append("files", file, file.name || "picture.png");
  return form;
}

function showAnswer(file, answer) {
  const address = URL.createObjectURL(file);
  const keep = h("button", { type: "button", onclick: () => (upload([file]), (keep.disabled = true)) }, "Keep it, to label");
  const item = h(
    "li",
    {},
    h("img", { src: address, alt: file.name }),
    h("div", {}, h("ul", {}, ...answer.classes.slice(0, 3).map(([id, share]) => bar(className(id), share))), keep),
  );
  $("#tried").prepend(item);
  for (const old of [...$("#tried").children].slice(KEPT)) {
    URL.revokeObjectURL(old.querySelector("img").src);
    old.remove();
  }
  const [id, share] = answer.classes[0];
  say(`${file.name}: ${className(id)}, ${percent(share)}.`);
}

$("#try-files").addEventListener("change", (event) => {
  tryFiles([...event.target.files]);
  event.target.value = "";
});
dropZone($("#trying"), tryFiles);

// --- camera ----------------------------------------------------------------------------------------------------------

let stream = null;

function frame() {
  const video = $("#video");
  const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const name = `camera-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.jpg`;
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(new File([blob], name, { type: "image/jpeg" })), "image/jpeg", 0.92));
}

async function lookOn() {
  while (stream) {
    if ($("#video").videoWidth) {
      const answer = await ask("/api/try", { method: "POST", form: formOf(await frame()) }).catch((error) => error);
      if (!stream) return;
      const best = answer.answers?.[0].classes[0];
      $("#camera-answer").textContent = best ? `${className(best[0])} ${percent(best[1])}` : answer.message;
    }
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY));
  }
}

$("#camera").addEventListener("click", async () => {
  if (stream) return;
  if (!navigator.mediaDevices?.getUserMedia) return trouble("This browser gives no camera to pages.");
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    const why = { NotAllowedError: "The browser was told not to give the camera.", NotFoundError: "There is no camera." };
    return trouble(why[error.name] ?? `The camera can't be used (${error.message}).`);
  }
  trouble("");
  $("#camera-view").hidden = false;
  $("#video").srcObject = stream;
  await $("#video").play().catch(() => {});
  lookOn();
});

$("#camera-stop").addEventListener("click", () => {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  $("#camera-view").hidden = true;
  $("#camera-answer").textContent = "";
});

$("#camera-keep").addEventListener("click", async () => {
  if ($("#video").videoWidth) upload([await frame()]);
});

// --- results ---------------------------------------------------------------------------------------------------------

async function make(button, path, body) {
  button.disabled = true;
  const text = button.textContent;
  button.textContent = "Writing …";
  await attempt(async () => say((await ask(path, { method: "POST", body })).done));
  button.textContent = text;
  button.disabled = false;
}

$("#save").addEventListener("click", (event) => make(event.target, "/api/save", {}));
for (const button of document.querySelectorAll(".export")) {
  button.addEventListener("click", () => make(button, "/api/export", { format: button.dataset.format }));
}

$("#code-box").addEventListener("toggle", drawCode);

export function drawCode() {
  if ($("#code-box").open) attempt(async () => ($("#code").textContent = (await ask("/api/code")).code));
}

$("#copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("#code").textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren($("#code"));
    say("Chosen: copy it with Ctrl C.");
  }
});
