// The page of `dinv serve`. It speaks the API of docs/guide/server.md and nothing else.

const $ = (id) => document.getElementById(id);

/** An element: `make("p", { className: "hint" }, "text", child)`. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// ---------------------------------------------------------------------------------------------
// Asking the server
// ---------------------------------------------------------------------------------------------

/** A message and what to do about it, as sentences. */
function sentences(message, hint) {
  const ended = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
  return hint ? `${ended(message)} ${ended(hint.charAt(0).toUpperCase() + hint.slice(1))}` : message;
}

class Refused extends Error {
  constructor({ message, hint, field }) {
    super(sentences(message, hint));
    this.field = field;
  }
}

async function ask(method, path, body) {
  const options = { method };
  if (body instanceof Blob) options.body = body;
  else if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
    checkSize(options.body.length);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused({ message: "The server does not answer.", hint: "Is `dinv serve` still running?" });
  }
  const told = response.headers.get("Content-Type")?.includes("json") ? await response.json() : null;
  if (!response.ok) throw new Refused(told?.error ?? { message: `The server answered ${response.status}.` });
  return told;
}

function checkSize(bytes) {
  const most = known.capabilities?.limits.upload_bytes;
  if (most && bytes > most) throw new Refused({ message: `These pictures take ${size(bytes)}, and the server takes ${size(most)} at once.`, hint: "Choose fewer or smaller pictures, or start it with a larger `--max-upload`." });
}

function problem(error) {
  $("problem").textContent = error ? error.message : "";
}

/** Runs `work` and shows what went wrong. */
async function attempt(work) {
  problem(null);
  try {
    return await work();
  } catch (error) {
    problem(error);
    $("problem").scrollIntoView({ block: "nearest" });
    return undefined;
  }
}

function announce(text) {
  $("live").textContent = text;
}

// ---------------------------------------------------------------------------------------------
// Pictures
// ---------------------------------------------------------------------------------------------

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refused({ message: "The file cannot be read." }));
    reader.readAsDataURL(blob);
  });
}

async function pictureOf(file) {
  return { name: file.name ?? "picture", data: await dataUrl(file) };
}

/** An image that shows its pixels where it is small. */
function image(source, alt) {
  return make("img", { src: source, alt, decoding: "async", onload: ({ target }) => target.classList.toggle("small", target.naturalWidth <= 256) });
}

const picturesIn = (transfer) => [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/") || /\.(png|jpe?g|webp|tiff?|bmp|gif)$/i.test(file.name));

// ---------------------------------------------------------------------------------------------
// What is being put together
// ---------------------------------------------------------------------------------------------

const TILES = {
  a: { title: "A", about: "before the edit" },
  a_prime: { title: "A′", about: "after the edit" },
  b: { title: "B", about: "the picture to change" },
};
const STRENGTHS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5];

// A picture's `data` is a data URL, or the address of a picture that the server has. B is one of `targets` or many.
const draft = { mode: "new", pictures: {}, captions: {}, targets: [], difference: null, settings: {} };
const known = { capabilities: null, models: null, differences: [], jobs: [], count: 0 };
const describing = {}; // the jobs that write captions, by tile
let shownJob = null; // the job whose B′ the last tile shows
let listed = 50; // how many jobs are asked for

const pictureAt = (key) => (key === "b" ? draft.targets[0] : draft.pictures[key]);

function tile(key) {
  const { title, about } = TILES[key];
  const picture = pictureAt(key);
  const input = make("input", { type: "file", accept: "image/*", multiple: key === "b", onchange: ({ target }) => place(key, target.files) });
  input.setAttribute("aria-label", `${title}, ${about}`);
  const drop = make("label", { className: picture ? "drop full" : "drop" }, input, picture ? image(picture.data, `${title}: ${picture.name}`) : make("span", {}, key === "b" ? "Drop B here, one picture or a folder, paste it, or choose files" : `Drop ${title} here, paste it, or choose a file`));
  dropZone(drop, (files) => place(key, files));
  const caption = make("input", {
    type: "text",
    value: draft.captions[key] ?? "",
    placeholder: "Caption (optional)",
    oninput: ({ target }) => (draft.captions[key] = target.value),
  });
  caption.setAttribute("aria-label", `Caption of ${title}`);
  const describe = describing[key] ? act("Stop", () => attempt(() => ask("POST", `/v1/jobs/${describing[key]}/cancel`))) : make("button", { type: "button", disabled: !picture, onclick: () => describeTile(key) }, "Describe");
  describe.setAttribute("aria-label", `${describe.textContent} ${title}`);
  const head = make("h3", {}, make("span", {}, title, " ", make("small", {}, about)));
  if (picture) head.append(make("button", { type: "button", className: "quiet", onclick: () => remove(key), ariaLabel: `Remove ${title}` }, "Remove"));
  return make("div", { className: "tile", id: `tile-${key}` }, head, drop, make("div", { className: "caption" }, caption, describe));
}

/** The pictures that were dropped, also those in folders. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some(({ isDirectory }) => isDirectory)) return picturesIn(transfer);
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a part at a time
      if (!some.length) return;
      for (const one of some) await walk(one);
    }
  };
  for (const entry of entries) await walk(entry);
  return picturesIn({ files }).sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true }));
}

function dropZone(element, accept) {
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("over");
    dropped(event.dataTransfer).then(accept, () => problem(new Refused({ message: "The folder cannot be read." })));
  });
}

function place(key, files) {
  return attempt(async () => {
    if (!files.length) throw new Refused({ message: "That is no picture.", hint: "PNG, JPEG, WebP, TIFF, BMP and GIF can be read." });
    if (key !== "b" && files.length > 1) throw new Refused({ message: `${TILES[key].title} is one picture, and ${files.length} were given.` });
    const pictures = await Promise.all([...files].map(pictureOf));
    const others = [...Object.entries(draft.pictures).filter(([of]) => of !== key).map(([, picture]) => picture), ...draft.targets];
    checkSize([...others, ...pictures].reduce((sum, { data }) => sum + data.length, 0));
    if (key !== "b") draft.pictures[key] = pictures[0];
    else draft.targets = draft.targets.length > 1 || pictures.length > 1 ? [...draft.targets, ...pictures] : pictures;
    draft.captions[key] = "";
    shownJob = null;
    drawTiles();
    const tile = $(`tile-${key}`);
    (tile.querySelector(".caption input") ?? tile.querySelector("input")).focus({ preventScroll: true });
  });
}

function remove(key) {
  if (key === "b") draft.targets = [];
  else delete draft.pictures[key];
  draft.captions[key] = "";
  shownJob = null;
  drawTiles();
}

/** The captioner's words for the picture of a tile. */
function describeTile(key) {
  return attempt(async () => {
    const [picture, before] = [pictureAt(key), draft.captions[key] ?? ""];
    const { id } = await ask("POST", "/v1/jobs", { kind: "caption", targets: [{ name: picture.name, picture: picture.data }], settings: settingsFor("caption") });
    describing[key] = id;
    drawTiles();
    const show = (job) => $(`tile-${key}`)?.querySelector(".caption input")?.setAttribute("placeholder", told(job));
    try {
      const job = await finished({ id }, show);
      const typed = (draft.captions[key] ?? "") !== before;
      if (pictureAt(key) === picture && !typed) draft.captions[key] = job?.results.find(({ caption }) => caption)?.caption ?? before;
    } finally {
      delete describing[key];
      drawTiles();
      ask("DELETE", `/v1/jobs/${id}`).catch(() => {}); // the words are here, and the picture was only lent
    }
  });
}

/** Waits until a job is over, and shows it meanwhile; a refusal if it failed, nothing if it was cancelled. */
function finished(job, show) {
  return new Promise((resolve, reject) => {
    const look = async () => {
      try {
        const now = await ask("GET", `/v1/jobs/${job.id}`);
        if (now.state === "done") resolve(now);
        else if (now.state === "failed") reject(new Refused(now.error));
        else if (now.state === "cancelled") resolve(null);
        else {
          show(now);
          setTimeout(look, 300);
        }
      } catch (error) {
        reject(error);
      }
    };
    look();
  });
}

function resultTile() {
  const job = known.jobs.find(({ id }) => id === shownJob);
  const all = job?.results.filter(({ kind }) => kind === "picture");
  const made = (job?.request.strengths && all.find(({ strength }) => strength === 1)) || all?.at(-1);
  const title = make("h3", {}, make("span", {}, "B′ ", make("small", {}, "what the program makes")));
  const drawing = job?.state === "running" && job.progress?.stage === "generate" && preview?.id === job.id;
  const button = make("button", { type: "button", className: "result", disabled: !made || drawing, onclick: () => view(job, made) });
  if (drawing) button.append(image(preview.picture, "B′ as it is being drawn"), make("span", { className: "over" }, told(job)));
  else if (made) button.append(image(made.url, "B′"));
  else if (!job) button.append(make("span", {}, "B′ appears here"));
  else if (job.state === "failed") button.append(make("span", {}, "It failed: see below"));
  else if (job.state === "cancelled") button.append(make("span", {}, "Cancelled"));
  else if (job.state === "done") button.append(make("span", {}, "Learned: see below"));
  else button.append(make("span", {}, told(job)));
  return make("div", { className: "tile", id: "tile-result" }, title, button);
}

const STAGES = {
  download: "Downloading",
  read: "Reading the model",
  caption: "Writing captions",
  "optimise-prompt": "Finding words",
  "learn-clip": "First steps",
  learn: "Learning",
  invert: "Turning B into noise",
  generate: "Drawing",
};

/** What a job is doing, in words. */
function told(job) {
  if (job.state === "queued") return job.position > 1 ? `Waiting: ${job.position - 1} before it` : "Waiting";
  if (job.stopping) return "Stopping after this step";
  const { stage, step, of, seconds_left: left } = job.progress ?? {};
  if (!stage) return "Starting";
  const amount = (number) => (stage === "download" ? size(number) : number);
  const count = of > 1 ? ` ${amount(step)} of ${amount(of)}` : "";
  return `${STAGES[stage] ?? stage}${count}${left ? `, ${duration(left)} left` : ""}`;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function drawTiles() {
  const typing = focusedIn($("tiles"));
  const b = draft.targets.length > 1 ? targets() : tile("b");
  const tiles = draft.mode === "new" ? [tile("a"), tile("a_prime"), b, resultTile()] : [chooser(), b, resultTile()];
  $("tiles").replaceChildren(...tiles);
  resultDrawn = "";
  typing?.();
  $("tiles").classList.toggle("three", draft.mode === "use");
  const missing = draft.mode === "new" ? Object.keys(TILES).filter((key) => !pictureAt(key)).map((key) => TILES[key].title) : [];
  const uses = [draft.difference ? null : "a difference", draft.targets.length ? null : "a picture"].filter(Boolean);
  if (draft.mode === "new") $("hint").textContent = missing.length === 3 ? "Choose two pictures that show an edit, and a third to be changed in the same way." : missing.length ? `Still missing: ${missing.join(" and ")}.` : "Captions that are left empty are written by the captioner.";
  else $("hint").textContent = uses.length ? `Choose ${uses.join(" and ")}.` : "";
  $("go").disabled = $("draft").disabled = sending || (draft.mode === "new" ? missing.length > 0 : uses.length > 0);
  $("learn").disabled = sending || !(draft.pictures.a && draft.pictures.a_prime);
  $("learn").hidden = draft.mode !== "new";
  $("strip-label").hidden = draft.mode === "new";
  $("example").hidden = draft.mode !== "new" || !known.capabilities?.example;
}

/** What gives the focus, and the place in a text, back to a tile that was drawn anew. */
function focusedIn(tiles) {
  const old = document.activeElement;
  const tile = old?.closest(".tile");
  if (!tile || !tiles.contains(old)) return null;
  const fields = (of) => [...of.querySelectorAll("input, select, button")];
  const place = fields(tile).indexOf(old);
  const caret = old.type === "text" ? [old.selectionStart, old.selectionEnd] : null;
  return () => {
    const now = $(tile.id) && fields($(tile.id));
    const same = now?.[place]?.type === old.type ? now[place] : now?.[0];
    same?.focus({ preventScroll: true });
    if (caret && same?.type === "text") same.setSelectionRange(...caret);
  };
}

function chooser() {
  const select = make(
    "select",
    { onchange: ({ target }) => { choose(target.value || null); drawTiles(); } },
    make("option", { value: "" }, known.differences.length ? "Choose a difference" : "No difference has been learned yet"),
    ...known.differences.map(({ name }) => make("option", { value: name, selected: name === draft.difference }, name)),
  );
  select.setAttribute("aria-label", "Difference");
  const chosen = known.differences.find(({ name }) => name === draft.difference);
  return make(
    "div",
    { className: "tile chosen", id: "tile-difference" },
    make("h3", {}, "Difference"),
    select,
    chosen?.thumbnail ? image(chosen.thumbnail, `A and A′ of ${chosen.name}`) : null,
    chosen?.model ? make("small", {}, `Learned on ${chosen.model}`) : null,
  );
}

/** B, where it is many pictures. */
function targets() {
  const add = (files) => place("b", files);
  const input = make("input", { type: "file", accept: "image/*", multiple: true, onchange: ({ target }) => add(target.files) });
  input.setAttribute("aria-label", "More pictures to change");
  const drop = make("label", { className: "drop" }, input, make("span", {}, `${draft.targets.length} pictures. Drop or choose more`));
  dropZone(drop, add);
  const head = make("h3", {}, make("span", {}, "B ", make("small", {}, "the pictures to change")), make("button", { type: "button", className: "quiet", onclick: () => remove("b"), ariaLabel: "Remove all of B" }, "Remove"));
  const many = make(
    "div",
    { className: "many" },
    ...draft.targets.map((picture, index) =>
      make("figure", {}, image(picture.data, picture.name), make("button", { type: "button", ariaLabel: `Remove ${picture.name}`, onclick: () => { draft.targets.splice(index, 1); drawTiles(); $("tile-b").querySelector("input").focus({ preventScroll: true }); } }, "×")),
    ),
  );
  return make("div", { className: "tile", id: "tile-b" }, head, drop, many);
}

function setMode(mode, focus) {
  draft.mode = mode;
  shownJob = null;
  for (const [name, id] of [["new", "tab-new"], ["use", "tab-use"]]) {
    $(id).setAttribute("aria-selected", String(name === mode));
    $(id).tabIndex = name === mode ? 0 : -1;
    if (focus && name === mode) $(id).focus();
  }
  $("panel").setAttribute("aria-labelledby", mode === "new" ? "tab-new" : "tab-use");
  drawTiles();
  drawSettings();
  modelNote();
}

// ---------------------------------------------------------------------------------------------
// Settings
// ---------------------------------------------------------------------------------------------

const ELSEWHERE = new Set(["model", "caption-a", "caption-a-prime", "caption-b"]);

function settingsOf(kind) {
  return (known.capabilities?.settings[kind] ?? []).filter(({ name }) => !ELSEWHERE.has(name));
}

const kindInUse = () => (draft.mode === "new" ? "analogy" : "apply");

function control(setting) {
  const value = draft.settings[setting.name];
  const id = `setting-${setting.name}`;
  const set = (given) => {
    if (given === "" || given === undefined || given === false) delete draft.settings[setting.name];
    else draft.settings[setting.name] = given;
    $(`holder-${setting.name}`).classList.toggle("changed", setting.name in draft.settings);
    countChanged();
    modelNote();
  };
  const described = { id };
  let field;
  if (setting.kind === "bool") {
    field = make("select", { ...described, onchange: ({ target }) => set(target.value) }, ...[["", `Default${setting.default ? ` (${setting.default})` : ""}`], ["true", "Yes"], ["false", "No"]].map(([v, text]) => make("option", { value: v, selected: String(value ?? "") === v }, text)));
  } else if (setting.kind === "choice") {
    field = make("select", { ...described, onchange: ({ target }) => set(target.value) }, make("option", { value: "" }, `Default${setting.default ? ` (${setting.default})` : ""}`), ...setting.values.map((v) => make("option", { value: v, selected: value === v }, v)));
  } else {
    field = make("input", { ...described, type: "text", inputMode: setting.kind === "number" ? "decimal" : "text", value: value ?? "", placeholder: setting.default ?? "", oninput: ({ target }) => set(target.value.trim()) });
  }
  field.setAttribute("aria-describedby", `help-${setting.name}`);
  return make(
    "div",
    { className: setting.name in draft.settings ? "setting changed" : "setting", id: `holder-${setting.name}` },
    make("label", { htmlFor: id, className: "name" }, setting.name),
    field,
    make("small", { id: `help-${setting.name}` }, setting.help.replaceAll("`", "")),
  );
}

function countChanged() {
  const count = settingsOf(kindInUse()).filter(({ name }) => name in draft.settings).length;
  $("changed").textContent = count ? `${count} changed` : "";
}

function drawSettings() {
  const sought = $("find").value.trim().toLowerCase();
  const shown = settingsOf(kindInUse()).filter((setting) => (sought ? `${setting.name} ${setting.help}`.toLowerCase().includes(sought) : $("all").checked || setting.common || setting.name in draft.settings));
  const groups = Map.groupBy(shown, ({ group }) => group);
  const sets = [...groups].map(([group, members]) => make("fieldset", {}, make("legend", {}, group), ...members.map(control)));
  $("settings").replaceChildren(...(sets.length ? sets : [make("p", { className: "settings-head empty" }, "No setting is called that.")]));
  countChanged();
}

/** The settings that this kind of job knows, as they were changed. */
function settingsFor(kind) {
  const names = new Set(settingsOf(kind).map(({ name }) => name));
  return { ...Object.fromEntries(Object.entries(draft.settings).filter(([name]) => names.has(name))), ...modelSetting() };
}

function modelSetting() {
  return $("model").value ? { model: $("model").value } : {};
}

function restore(file) {
  return attempt(async () => {
    const read = await ask("POST", "/v1/read-png", { picture: await dataUrl(file) });
    useSettings(read.settings ?? {});
    announce("The settings of the picture were restored.");
  });
}

/** The name of a setting on this page; files and programs write it with underscores. */
const named = (name) => name.replaceAll("_", "-");

/** The value of a setting as it is typed; a choice with an argument is an object in files. */
const typed = (value) => (typeof value === "object" ? Object.entries(value).flat().join(":") : String(value));

function useSettings(settings) {
  const { model, ...others } = settings;
  const given = Object.entries(others).filter(([, value]) => value !== null);
  draft.settings = Object.fromEntries(given.map(([name, value]) => [named(name), typed(value)]));
  if (model && [...$("model").options].some(({ value }) => value === model)) $("model").value = model;
  $("settings-box").open = true;
  drawSettings();
  modelNote();
}

// ---------------------------------------------------------------------------------------------
// Models
// ---------------------------------------------------------------------------------------------

const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.max(1, Math.round(bytes / 1e6))} MB`);

async function loadModels() {
  known.models = await ask("GET", "/v1/models");
  const before = $("model").value;
  $("model").replaceChildren(...known.models.models.map(({ name, on_disk: here }) => make("option", { value: name, selected: name === before }, `${name}${here ? "" : " (to download)"}`)));
  modelNote();
}

/** What learning on a model takes, whether that fits, and settings with which it does. */
function memoryOf({ learning = [], bytes }) {
  const free = known.models.memory?.available;
  const dtype = { bf16: "f16" }[draft.settings.dtype] ?? draft.settings.dtype ?? "f32";
  const way = learning.find((way) => way.dtype === dtype && way.memory === (draft.settings.memory ?? "normal"));
  if (!way && dtype === "q8") return {}; // known once the model is here
  if (!way) return free && bytes > free ? { problem: `Its weights alone take ${size(bytes)}, and ${size(free)} of memory are free: it will not fit.` } : {};
  const needs = `Learning needs about ${size(way.bytes)} of memory`;
  if (!free || way.bytes <= free) return { text: needs };
  const better = learning.find(({ bytes: needed }) => needed <= free);
  return { problem: `${needs}, and ${size(free)} are free${better ? "" : ": it will not fit"}.`, better };
}

function modelNote() {
  const model = known.models?.models.find(({ name }) => name === $("model").value);
  if (!model) return;
  const parts = model.title && model.title !== model.name ? [model.title] : [];
  if (!model.on_disk) parts.push(model.bytes ? `About ${size(model.bytes)} to download` : "To download");
  if (model.licence) parts.push(`Licence: ${model.licence}`);
  const { text, problem: tooLarge, better } = draft.mode === "new" ? memoryOf(model) : {};
  if (text) parts.push(text);
  $("model-note").textContent = parts.join(" · ");
  const room = known.models.disk?.free;
  const problems = [tooLarge, !model.on_disk && room < model.bytes ? `The disk has ${size(room)} free: the download will not fit.` : null].filter(Boolean);
  $("model-problem").textContent = problems.join(" ");
  const actions = [];
  if (better) actions.push(act(`${{ f16: "Use half precision", q8: "Use 8 bits" }[better.dtype] ?? "Use less memory"}: ${size(better.bytes)}`, () => {
    Object.assign(draft.settings, { dtype: better.dtype, memory: better.memory });
    drawSettings();
    modelNote();
    $("model").focus();
  }));
  const coming = known.jobs.find(({ kind, state, request: { settings } }) => kind === "download" && !OVER.has(state) && settings?.model === model.name);
  if (!model.on_disk) actions.push(make("button", { type: "button", disabled: Boolean(coming), onclick: ({ target }) => download(model.name, target) }, { running: "Downloading", queued: "Waiting to download" }[coming?.state] ?? "Download"));
  const now = [model.name, ...actions.map(({ textContent, disabled }) => `${textContent}${disabled}`)].join();
  if ($("model-actions").dataset.now === now) return; // keeps the focus
  $("model-actions").dataset.now = now;
  $("model-actions").replaceChildren(...actions);
}

function download(model, button) {
  button.disabled = true;
  return attempt(async () => {
    await ask("POST", "/v1/jobs", { kind: "download", settings: { model, all: true } });
    announce("Added to the queue.");
    await refresh();
  }).finally(() => { delete $("model-actions").dataset.now; modelNote(); });
}

// ---------------------------------------------------------------------------------------------
// Jobs
// ---------------------------------------------------------------------------------------------

const TITLES = { analogy: "Analogy", learn: "Difference", apply: "Applied", caption: "Captions", generate: "Drawn from words", download: "Download" };
const STATES = { queued: "waiting", running: "running", done: "done", failed: "failed", cancelled: "cancelled" };
const OVER = new Set(["done", "failed", "cancelled"]);

function withCaption(value, key) {
  return draft.captions[key]?.trim() ? { ...value, [key === "b" ? "caption" : `caption_${key}`]: draft.captions[key].trim() } : value;
}

function pair() {
  const { a, a_prime } = draft.pictures;
  return withCaption(withCaption({ a: a.data, a_prime: a_prime.data }, "a"), "a_prime");
}

let sending = false; // a second press is not a second job

async function submit(request) {
  if (sending) return;
  sending = true;
  announce("Sending.");
  try {
    shownJob = (await ask("POST", "/v1/jobs", request)).id;
    announce("Added to the queue.");
    await refresh();
  } finally {
    sending = false;
    drawTiles();
  }
}

/** What is put together, as a request for B′. */
function request(more = {}) {
  const all = draft.targets.map(({ name, data }) => ({ name, picture: data }));
  const targets = all.length === 1 ? [withCaption(all[0], "b")] : all;
  if (draft.mode === "new") return { kind: "analogy", pairs: [pair()], targets, settings: { ...settingsFor("analogy"), ...more } };
  const settings = { ...settingsFor("apply"), ...more };
  const strip = $("strip").checked;
  if (strip) delete settings.strength;
  return {
    kind: "apply",
    difference: draft.difference,
    targets,
    ...(strip ? { strengths: STRENGTHS } : {}),
    settings,
  };
}

function go(event) {
  event.preventDefault();
  return attempt(() => submit(request()));
}

/** The same job with all of its steps. */
function refine(job) {
  const { draft: _, ...settings } = job.request.settings;
  return attempt(() => submit({ ...job.request, settings }));
}

function learn() {
  return attempt(() => submit({ kind: "learn", pairs: [pair()], settings: settingsFor("learn") }));
}

/** The name of the difference that a job learned or applied, unless it is gone or another one has got its name since. */
function differenceOf(job) {
  const name = job.results.find(({ kind }) => kind === "difference")?.name ?? job.request.difference;
  const kept = known.differences.find((difference) => difference.name === name);
  return kept && (!job.finished || kept.created <= job.finished) ? name : null;
}

/** Applies the difference of a job to the same B once more; the server still has its pictures. */
function again(job, { strengths, ...more }) {
  const name = differenceOf(job);
  const taken = new Set(["model", ...settingsOf("apply").map((setting) => setting.name)]);
  const settings = Object.fromEntries(Object.entries({ ...job.request.settings, ...more }).filter(([setting]) => taken.has(named(setting))));
  if (strengths) delete settings.strength;
  return attempt(() => submit({ kind: "apply", difference: name, targets: job.request.targets, ...(strengths ? { strengths } : {}), settings }));
}

const cards = new Map();

function figure(source, alt, caption, onclick) {
  const shown = image(source, alt);
  return make("figure", {}, onclick ? make("button", { type: "button", className: "picture", onclick, ariaLabel: `Enlarge ${alt}` }, shown) : shown, make("figcaption", { title: caption ?? alt }, caption ?? alt));
}

const sign = (text) => make("span", { className: "sign", ariaHidden: "true" }, text);

function picturesOf(job) {
  const row = [];
  const { pairs = [], targets: given = [] } = job.request;
  for (const { a, a_prime, caption_a: before, caption_a_prime: after } of pairs) row.push(figure(a, "A", before ? `A: ${before}` : "A"), sign("→"), figure(a_prime, "A′", after ? `A′: ${after}` : "A′"));
  const made = job.results.filter(({ kind }) => kind === "picture");
  given.forEach((target, index) => {
    if (row.length) row.push(sign(index ? "" : "∷"));
    const caption = job.results.find(({ kind, target: of }) => kind === "caption" && (of ?? 0) === index)?.caption ?? target.caption;
    const name = given.length > 1 ? (target.name ?? `B ${index + 1}`) : "B";
    row.push(figure(target.picture, name, caption ? `${name}: ${caption}` : name));
    const mine = made.filter(({ target: of }) => (of ?? 0) === index);
    if (mine.length) row.push(sign("→"));
    for (const result of mine) row.push(figure(result.url, "B′", mine.length > 1 || (result.strength ?? 1) !== 1 ? `strength ${result.strength}` : "B′", () => view(job, result)));
  });
  if (!given.length) for (const result of made) row.push(figure(result.url, job.request.prompt ?? "picture", job.request.prompt, () => view(job, result)));
  return row.filter((part) => part.className !== "sign" || part.textContent);
}

function lossCurve(losses) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const values = losses.map(([, loss]) => loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const steps = losses.map(([step]) => step);
  const [first, last] = [steps[0], steps.at(-1)];
  const points = losses.map(([step, loss]) => `${(((step - first) / (last - first || 1)) * 100).toFixed(2)} ${(30 - ((loss - low) / (high - low || 1)) * 28 - 1).toFixed(2)}`);
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "loss");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Loss: from ${values[0].toPrecision(3)} at step ${first} to ${values.at(-1).toPrecision(3)} at step ${last}`);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", `M${points.join("L")}`);
  svg.append(path);
  return svg;
}

function act(text, onclick, className = "") {
  return make("button", { type: "button", className, onclick }, text);
}

const isDraft = ({ request }) => String(request.settings?.draft) === "true";
const isReversed = ({ request }) => String(request.settings?.reverse) === "true";

function actionsOf(job) {
  const actions = [];
  const name = differenceOf(job);
  const pictures = job.results.filter(({ kind }) => kind === "picture").length;
  if (!OVER.has(job.state)) actions.push(act(job.stopping ? "Stop now" : "Cancel", () => attempt(async () => { await ask("POST", `/v1/jobs/${job.id}/cancel`); await refresh(); })));
  if (job.position > 1) actions.push(act("Run next", () => attempt(async () => { await ask("POST", `/v1/jobs/${job.id}/first`); await refresh(); })));
  if (job.state === "done" && isDraft(job)) actions.push(act("Refine", () => refine(job)));
  if (job.state === "done" && name && pictures && !(job.request.strengths?.length > 1)) actions.push(act("Strengths", () => again(job, { strengths: STRENGTHS })));
  if (job.state === "done" && name && pictures) actions.push(act(isReversed(job) ? "Apply" : "Undo on B", () => again(job, { reverse: !isReversed(job) })));
  if (name) actions.push(act("Use the difference", () => use(name)));
  if (pictures > 1) actions.push(make("a", { className: "button", href: `/v1/jobs/${job.id}/zip`, download: "" }, "Save all"));
  if (job.state === "failed" || job.state === "cancelled") actions.push(act("Try again", () => attempt(async () => { const next = await ask("POST", `/v1/jobs/${job.id}/retry`); if (["analogy", "apply"].includes(job.kind)) shownJob = next.id; await refresh(); })));
  if (job.kind !== "download" && Object.keys(job.request.settings ?? {}).some((name) => name !== "model")) actions.push(act("Same settings", () => useSettings(job.request.settings)));
  if (job.state !== "running") actions.push(act("Delete", () => (!job.results.length || confirm("Delete this result with its pictures?")) && attempt(async () => { await ask("DELETE", `/v1/jobs/${job.id}`); await refresh(); $("jobs-title").focus(); }), "quiet danger"));
  return actions;
}

function card(job) {
  const date = new Date(job.created);
  const title = make("h3", { id: `job-${job.id}` }, job.results.find(({ kind }) => kind === "difference")?.name ?? job.request.name ?? job.request.difference ?? (job.kind === "download" ? job.request.settings.model : TITLES[job.kind]));
  const element = make(
    "article",
    { className: "job" },
    make("div", { className: "job-head" }, title, make("span", { className: `state ${job.state}` }, STATES[job.state]), make("time", { dateTime: job.created }, `${TITLES[job.kind] ?? job.kind}${isDraft(job) ? " (draft)" : ""}, ${date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`), make("span", { className: "push" }, ...actionsOf(job))),
  );
  element.setAttribute("aria-labelledby", `job-${job.id}`);
  if (!OVER.has(job.state)) element.append(make("div", { className: "progress" }, make("progress", { max: 1, ariaLabel: "Progress" }), make("span", {})));
  const curve = job.losses?.length > 1 ? lossCurve(job.losses) : null;
  const row = picturesOf(job);
  if (row.length) element.append(make("div", { className: job.request.strengths?.length > 2 ? "row strip" : "row" }, ...row));
  if (job.error) element.append(make("p", { className: "problem" }, sentences(job.error.message, job.error.hint)));
  const passed = (note) => OVER.has(job.state) && note.endsWith("; trying again");
  for (const note of (job.notes ?? []).filter((note) => !passed(note))) element.append(make("p", { className: "note" }, note));
  const more = [OVER.has(job.state) ? curve : null, job.commands.length ? make("pre", {}, job.commands.map((words) => words.map(quoted).join(" ")).join("\n")) : null].filter(Boolean);
  if (more.length) element.append(make("details", { className: "more" }, make("summary", {}, more.length > 1 ? "Loss, and the same in a terminal" : "The same in a terminal"), ...more));
  return element;
}

const quoted = (word) => (/^[\w./:=,-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function showProgress(job) {
  const element = cards.get(job.id)?.element;
  const bar = element?.querySelector("progress");
  if (!bar) return;
  const { step, of } = job.progress ?? {};
  if (job.state === "running" && of) bar.value = step / of;
  else bar.removeAttribute("value");
  if (job.state === "queued") bar.value = 0;
  element.querySelector(".progress > span").textContent = told(job);
  if (job.losses?.length > 1) {
    const [old, curve] = [element.querySelector(":scope > .loss"), lossCurve(job.losses)];
    if (old) old.replaceWith(curve);
    else element.querySelector(".progress").after(curve);
  }
}

/** What of a job makes its card another one; progress does not. */
const signature = ({ progress, losses, ...job }) => JSON.stringify([job, differenceOf(job)]);

/** Replaces an element by another one, in which the button with the same words has the focus. */
function exchange(old, element) {
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  old.replaceWith(element);
  if (focused) [...element.querySelectorAll("button, a, summary")].find(({ textContent, ariaLabel }) => textContent === focused.textContent && ariaLabel === focused.ariaLabel)?.focus({ preventScroll: true });
}

function drawJobs() {
  const shown = known.jobs;
  $("no-jobs").hidden = known.count > 0;
  $("older").hidden = known.jobs.length >= known.count;
  for (const id of [...cards.keys()]) if (!shown.some((job) => job.id === id)) { cards.get(id).element.remove(); cards.delete(id); }
  let previous = null;
  for (const job of shown) {
    const now = signature(job);
    const held = cards.get(job.id);
    if (held?.signature !== now) {
      const element = card(job);
      if (held?.element.querySelector(".more")?.open && element.querySelector(".more")) element.querySelector(".more").open = true;
      if (held) exchange(held.element, element);
      cards.set(job.id, { element, signature: now });
    }
    const { element } = cards.get(job.id);
    const place = previous ? previous.nextSibling : $("jobs").firstChild;
    if (place !== element) $("jobs").insertBefore(element, place);
    previous = element;
    showProgress(job);
  }
}

let stream = null;
let timer = null;
let preview = null; // of the picture that the running job draws
const seen = new Map(); // the states of jobs that were acted upon

/** Follows the running job by its events, and looks at all of them now and then. */
function follow() {
  const all = known.jobs.filter(({ state }) => state === "running");
  const running = all.find(({ kind }) => kind !== "download") ?? all[0]; // downloads run beside it
  if (stream && stream.id !== running?.id) { stream.source.close(); stream = null; }
  if (running && !stream) {
    const source = new EventSource(`/v1/jobs/${running.id}/events`);
    stream = { id: running.id, source };
    source.addEventListener("job", ({ data }) => {
      const job = JSON.parse(data);
      const index = known.jobs.findIndex(({ id }) => id === job.id);
      if (index < 0) return;
      if (job.results.length !== known.jobs[index].results.length) preview = null;
      known.jobs[index] = { ...known.jobs[index], ...job };
      if (OVER.has(job.state)) { source.close(); stream = null; refresh(); return; }
      drawJobs();
      if (job.id === shownJob) updateResult();
    });
    source.addEventListener("preview", ({ data }) => { preview = { id: running.id, picture: data }; });
    source.addEventListener("loss", ({ data }) => {
      const job = known.jobs.find(({ id }) => id === running.id);
      const [step, loss] = JSON.parse(data);
      if (!job) return;
      job.losses ??= [];
      if (step > (job.losses.at(-1)?.[0] ?? -1)) job.losses.push([step, loss]); // a stream begins with what is known
    });
    source.onerror = () => { source.close(); stream = null; };
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, known.jobs.some(({ state }) => !OVER.has(state)) ? 2000 : 20000);
}

let resultDrawn = "";

function updateResult() {
  const job = known.jobs.find(({ id }) => id === shownJob);
  const now = JSON.stringify([shownJob, job?.state, job?.results, job && told(job), preview?.id === shownJob && preview?.picture]);
  if (now === resultDrawn || !$("tile-result")) return;
  resultDrawn = now;
  exchange($("tile-result"), resultTile());
}

async function refresh() {
  try {
    const [found, { differences }] = await Promise.all([ask("GET", `/v1/jobs?limit=${listed}&kinds=analogy,learn,apply,generate,download`), ask("GET", "/v1/differences")]);
    Object.assign(known, { jobs: found.jobs, count: found.count, differences });
    const ended = known.jobs.filter(({ id, state }) => seen.has(id) && seen.get(id) !== state && OVER.has(state));
    for (const { id, state } of known.jobs) seen.set(id, state);
    for (const { kind, state } of ended) announce(`${TITLES[kind]}: ${STATES[state]}.`);
    if (ended.length) await loadModels(); // what is on disk and the free memory have changed
    else modelNote();
    drawJobs();
    drawLibrary();
    updateResult();
    if ($("footer").dataset.lost) { delete $("footer").dataset.lost; foot(); }
  } catch (error) {
    $("footer").dataset.lost = "yes";
    $("footer").textContent = error.message;
  }
  follow();
}

// ---------------------------------------------------------------------------------------------
// Learned differences
// ---------------------------------------------------------------------------------------------

/** Chooses a difference, and the model that it was learned on. */
function choose(name) {
  draft.difference = name;
  const model = known.differences.find((difference) => difference.name === name)?.model;
  if (model && [...$("model").options].some(({ value }) => value === model)) $("model").value = model;
  modelNote();
}

function use(name) {
  choose(name);
  setMode("use", true);
  $("work").scrollIntoView();
}

let libraryDrawn = "";

function drawLibrary() {
  const now = JSON.stringify(known.differences);
  if (now === libraryDrawn) return;
  libraryDrawn = now;
  $("no-differences").hidden = known.differences.length > 0;
  $("library").replaceChildren(
    ...known.differences.map(({ name, model, created, tokens, thumbnail }) =>
      make(
        "article",
        { className: "difference" },
        thumbnail ? image(thumbnail, `A and A′ of ${name}`) : make("span", { className: "blank" }, "No picture"),
        make("h3", {}, name),
        make("small", {}, [model, tokens ? `${tokens} tokens` : null, new Date(created).toLocaleDateString([], { dateStyle: "medium" })].filter(Boolean).join(", ")),
        make(
          "div",
          { className: "buttons" },
          act("Use", () => use(name)),
          act("Rename", () => rename(name)),
          make("a", { className: "button", href: `/v1/differences/${encodeURIComponent(name)}`, download: `${name}.safetensors` }, "Save"),
          act("Export", () => openExports(name)),
          act("Delete", () => confirm(`Delete the difference “${name}”?`) && attempt(async () => { await ask("DELETE", `/v1/differences/${encodeURIComponent(name)}`); await refresh(); }), "quiet danger"),
        ),
      ),
    ),
  );
  if (draft.mode === "use") drawTiles();
}

function rename(name) {
  const to = prompt("New name", name)?.trim();
  if (!to || to === name) return undefined;
  return attempt(async () => {
    await ask("PATCH", `/v1/differences/${encodeURIComponent(name)}`, { name: to });
    if (draft.difference === name) draft.difference = to;
    await refresh();
  });
}

function upload(file) {
  return attempt(async () => {
    const name = file.name.replace(/\.safetensors$/i, "").replace(/[^A-Za-z0-9 _-]/g, "-").slice(0, 64) || "difference";
    await ask("PUT", `/v1/differences/${encodeURIComponent(name)}`, file);
    await refresh();
    announce(`${name} was added.`);
  });
}

// ---------------------------------------------------------------------------------------------
// Other programs
// ---------------------------------------------------------------------------------------------

let exported = null; // the name of the difference
let asked = 0; // of answers that overtake one another, the last one counts

function openExports(name) {
  exported = name;
  $("exports-title").textContent = `${name} in other programs`;
  $("word").value = "";
  $("back").checked = false;
  $("exports").showModal();
  return drawExports();
}

const USAGE = { place: "Where it goes", prompt: "Prompt", negative_prompt: "Negative prompt", guidance_scale: "Guidance scale", strength: "Strength" };

async function drawExports() {
  const query = new URLSearchParams({ reverse: $("back").checked, ...($("word").value.trim() ? { word: $("word").value.trim() } : {}) });
  const mine = ++asked;
  $("exports-problem").textContent = "";
  $("programs").replaceChildren(); // no file of an earlier wish
  try {
    const { exports: all } = await ask("GET", `/v1/differences/${encodeURIComponent(exported)}/exports?${query}`);
    if (mine !== asked) return;
    $("word").placeholder = all[0]?.word ?? "";
    $("programs").replaceChildren(
      ...all.map(({ program, files, usage, notes }) =>
        make(
          "article",
          {},
          make("h3", {}, program),
          make("p", { className: "files" }, ...files.map(({ name, url }) => make("a", { className: "button", href: url, download: name }, name))),
          make("dl", {}, ...Object.entries(USAGE).flatMap(([key, title]) => [make("dt", {}, title), make("dd", {}, String(usage[key]))])),
          ...notes.map((note) => make("p", { className: "note" }, note)),
        ),
      ),
    );
    if (!all.length) $("programs").append(make("p", { className: "empty" }, "No other program reads differences that were learned on this model."));
  } catch (error) {
    if (mine === asked) $("exports-problem").textContent = error.message;
  }
}

// ---------------------------------------------------------------------------------------------
// Looking closely
// ---------------------------------------------------------------------------------------------

function view(job, result) {
  const before = job.request.targets?.[result.target ?? 0]?.picture;
  $("viewer-title").textContent = before ? "B and B′" : (job.request.prompt ?? "Picture");
  $("compare").classList.toggle("alone", !before);
  $("compare").classList.remove("whole");
  for (const [id, source, alt] of [["after", result.url, "B′"], ["before", before, "B"]]) {
    const element = $(id);
    element.onload = () => {
      element.classList.toggle("small", element.naturalWidth <= 256);
      if (id === "after") $("compare").style.setProperty("--ratio", element.naturalWidth / element.naturalHeight);
    };
    if (source) element.src = source;
    else element.removeAttribute("src");
    element.alt = source ? alt : "";
  }
  $("slide").value = 50;
  $("compare").style.setProperty("--at", "50%");
  $("hold").hidden = !before;
  $("save").href = result.url;
  $("save").download = `${(job.request.targets?.[result.target ?? 0]?.name ?? "picture").replace(/\.[^.]*$/, "")}-prime${(result.strength ?? 1) === 1 ? "" : `-${result.strength}`}.png`;
  $("viewer-note").textContent = [result.strength !== undefined ? `strength ${result.strength}` : null, result.caption].filter(Boolean).join(", ");
  $("viewer").showModal();
}

// ---------------------------------------------------------------------------------------------
// Beginning
// ---------------------------------------------------------------------------------------------

function foot() {
  const { version, device } = known.capabilities;
  $("footer").textContent = `dinv ${version}, ${device}. Everything stays on the machine that runs the server.`;
}

function listen() {
  $("form").addEventListener("submit", go);
  $("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input:not([type=file])")) event.preventDefault(); // a search is not a job
  });
  $("draft").addEventListener("click", () => attempt(() => submit(request({ draft: true }))));
  $("learn").addEventListener("click", learn);
  $("clear").addEventListener("click", () => {
    Object.assign(draft, { pictures: {}, captions: {}, targets: [], difference: null });
    shownJob = null;
    problem(null);
    drawTiles();
  });
  $("example").addEventListener("click", () => {
    const [a, a_prime, b] = Object.keys(TILES).map((key) => ({ name: `${key}.png`, data: known.capabilities.example[key] }));
    Object.assign(draft, { pictures: { a, a_prime }, targets: [b], captions: {} });
    shownJob = null;
    drawTiles();
    $("go").focus();
  });
  for (const [id, mode] of [["tab-new", "new"], ["tab-use", "use"]]) {
    $(id).addEventListener("click", () => setMode(mode));
    $(id).addEventListener("keydown", ({ key }) => {
      if (key === "ArrowLeft" || key === "ArrowRight") setMode(mode === "new" ? "use" : "new", true);
    });
  }
  $("find").addEventListener("input", drawSettings);
  $("all").addEventListener("change", drawSettings);
  $("defaults").addEventListener("click", () => { draft.settings = {}; drawSettings(); modelNote(); });
  $("older").addEventListener("click", async () => { listed += 50; await refresh(); $("jobs-title").focus(); });
  for (const id of ["word", "back"]) $(id).addEventListener("input", drawExports);
  $("exports-close").addEventListener("click", () => $("exports").close());
  $("model").addEventListener("change", () => { modelNote(); attempt(loadModels); });
  for (const [id, accept] of [["restore", restore], ["upload", upload]]) {
    $(id).addEventListener("change", async ({ target }) => {
      if (target.files.length) await accept(target.files[0]);
      target.value = "";
    });
  }
  document.addEventListener("paste", (event) => {
    const files = picturesIn(event.clipboardData);
    const isText = event.target.matches?.("input[type=text], input[type=search]") && event.clipboardData.types.includes("text/plain");
    if (!files.length || isText) return;
    event.preventDefault();
    const here = document.querySelector(".drop:hover, .drop:focus-within")?.closest(".tile").id.replace("tile-", "");
    const empty = Object.keys(TILES).find((key) => !pictureAt(key));
    place(draft.mode === "use" ? "b" : here && !pictureAt(here) ? here : (empty ?? here ?? "b"), files);
  });
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault()); // a missed drop must not leave the page
  $("slide").addEventListener("input", ({ target }) => $("compare").style.setProperty("--at", `${target.value}%`));
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", ({ target }) => target === $("viewer") && $("viewer").close());
  const hold = (whole) => () => $("compare").classList.toggle("whole", whole);
  for (const name of ["pointerdown", "keydown"]) $("hold").addEventListener(name, hold(true));
  for (const name of ["pointerup", "pointerleave", "keyup", "blur"]) $("hold").addEventListener(name, hold(false));
}

async function begin() {
  listen();
  drawTiles();
  await attempt(async () => {
    known.capabilities = await ask("GET", "/v1/capabilities");
    await loadModels();
    drawSettings();
    foot();
  });
  await refresh();
  drawTiles();
}

begin();
