// Requests, what is known of the project, and small helpers. Every other file imports this one.

const token = new URLSearchParams(location.search).get("token") ?? "";

export const store = {
  state: null, // as /api/state gives it
  answers: { images: {}, next: [], by: "", note: "", waiting: 0 },
  estimate: null,
  estimateNote: "",
};

const listeners = [];

/** Call `listener` after everything that changes what is shown. */
export function onChange(listener) {
  listeners.push(listener);
}

export function changed() {
  for (const listener of listeners) listener();
}

export const $ = (selector) => document.querySelector(selector);

/** An element: h("li", {class: "x", onclick: f}, "text", child). */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export class Refused extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

/** One request; its JSON, or a Refused with the server's sentence. */
export async function ask(path, { method = "GET", body, form } = {}) {
  const headers = { "x-studio-token": token };
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: form ?? (body === undefined ? undefined : JSON.stringify(body)) });
  } catch {
    throw new Refused("The studio doesn't answer: is it still running in the terminal? Your work is saved.", 0);
  }
  const content = await answer.json().catch(() => ({ error: "The studio's answer was cut off." }));
  if (!answer.ok || content.error) throw new Refused(content.error ?? "That didn't work.", answer.status);
  return content;
}

export const thumbnail = (id) => `/thumbnail/${id}?token=${encodeURIComponent(token)}`;
export const picture = (id) => `/image/${id}?token=${encodeURIComponent(token)}`;
export const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
export const className = (id) => store.state?.classes.find((one) => one.id === id)?.name ?? "?";
export const imageOf = (id) => store.state?.images.find((one) => one.id === id);

let fading;

/** Say what was done, to eyes and to screen readers. */
export function say(text) {
  clearTimeout(fading);
  $("#said").textContent = text;
  fading = setTimeout(() => ($("#said").textContent = ""), 5000);
}

export function trouble(text) {
  $("#trouble").textContent = text;
  $("#trouble").hidden = !text;
}

/** Run something for a person; what goes wrong is said in one sentence. */
export async function attempt(action) {
  try {
    const result = await action();
    trouble("");
    return result;
  } catch (error) {
    if (!(error instanceof Refused)) console.error(error);
    trouble(error instanceof Refused ? error.message : `The page itself failed (${error.message}): load it again.`);
    return undefined;
  }
}

let queue = Promise.resolve();
let open = 0; // changes that weren't answered yet

/** Changes one after the other, in the order in which they were asked for; then everything that follows from them. */
export function change(path, request, spoken = "") {
  open += 1;
  const done = queue.then(async () => {
    const state = await attempt(() => ask(path, { method: "POST", ...request }));
    open -= 1;
    // what was refused was shown already: back to what the disk has
    const whole = state ?? (await ask("/api/state").catch(() => null));
    if (whole) take(whole);
    if (state && (spoken || state.done)) say(spoken || state.done);
    return state;
  });
  queue = done.catch(() => {});
  return done;
}

/** Believe a state, unless a newer one is here or on its way, and refresh what depends on it. */
export function take(state) {
  // with a change on its way, this would take back what is shown of it for a moment; its answer brings everything
  if (open || (store.state && state.version < store.state.version)) return;
  store.state = state;
  changed();
  refresh();
  if (state.progress) watch();
}

let asked = 0;

/** Fresh answers, and then the estimate; what was overtaken by a later change is dropped. */
export async function refresh() {
  const mine = ++asked;
  const answers = await ask("/api/answers").catch((error) => error);
  if (mine !== asked) return;
  if (answers instanceof Error) return trouble(answers.message);
  store.answers = answers;
  changed();
  if (answers.waiting) watch();
  const estimate = await ask("/api/estimate").catch((error) => error);
  if (mine !== asked) return;
  if (estimate instanceof Error) {
    if (estimate.status !== 409) [store.estimate, store.estimateNote] = [null, estimate.message];
  } else {
    [store.estimate, store.estimateNote] = [estimate, ""];
  }
  changed();
}

let watching = false;

/** Look after what goes on in the background until it is done. */
async function watch() {
  if (watching) return;
  watching = true;
  try {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, 400));
      const now = await ask("/api/progress");
      store.state.progress = now.progress;
      store.state.failed = now.failed;
      if (now.problems.length) trouble(now.problems.slice(0, 3).join(" "));
      if (now.images_in !== store.state.images.length || !now.progress) {
        take(await ask("/api/state"));
      }
      changed();
      if (!now.progress && !store.answers.waiting) break;
    }
  } catch (error) {
    trouble(error.message);
  } finally {
    watching = false;
  }
}
