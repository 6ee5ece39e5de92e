"use strict";
// Everything that comes from the server or the user is put into the page as text, never as markup.

const POLL_MS = 3000;
const REFRESH_EVERY = 5;
const MAX_CHOSEN = 2;
const byId = (id) => document.getElementById(id);
const state = { base: "", task: "", models: [], adapters: [], chosen: new Set(), running: null, before: null };

function make(tag, { text, className, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function notify(text, isBad = false) {
  const notice = byId("notice");
  notice.textContent = text;
  notice.classList.toggle("bad", isBad);
}

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function request(method, path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, { method, headers: headers(), body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const hint = answer.status === 401 ? " Put it into the field at the top." : "";
  throw new Error((said.error?.message ?? `HTTP ${answer.status}`) + hint);
}

const readJson = async (path) => (await request("GET", path)).json();
const shorten = (digest) => (digest ? digest.slice(0, 12) : "");

// What is there

async function refresh() {
  const [models, adapters] = await Promise.all([readJson("v1/models"), readJson("v1/adapters")]);
  state.models = models.data;
  state.adapters = adapters.data;
  const base = state.models.find((model) => model.parent === null);
  if (base) {
    state.base = base.id;
    byId("base-name").textContent = `${base.id} · ${base.task} · ${base.max_model_len} tokens`;
  }
  state.task = (base ?? state.models[0] ?? {}).task ?? "";
  byId("options").hidden = state.task === "classify";
  showChoices();
  showAdapters();
}

function showChoices() {
  const box = byId("choices");
  const names = state.models.map((model) => model.id);
  const isSame = names.join("\n") === box.dataset.names;
  if (isSame) return;
  if (!box.dataset.names) for (const name of names.slice(0, MAX_CHOSEN)) state.chosen.add(name);
  box.dataset.names = names.join("\n");
  box.replaceChildren(...names.map((name) => {
    const tick = make("input", { type: "checkbox", value: name });
    tick.checked = state.chosen.has(name);
    tick.addEventListener("change", () => state.chosen[tick.checked ? "add" : "delete"](name));
    return make("label", {}, tick, ` ${name}`);
  }));
  byId("store-names").replaceChildren(...names.map((name) => make("option", { value: name })));
}

function showAdapters() {
  const body = byId("adapters");
  const rows = JSON.stringify(state.adapters);
  if (rows === body.dataset.rows) return;
  body.dataset.rows = rows;
  const focused = document.activeElement?.dataset?.action;
  body.replaceChildren(...state.adapters.map((adapter) => {
    const name = makeButton(adapter.label, `card ${adapter.label}`, () => showCard(adapter.label), "name");
    const of = adapter.alias_of ? make("span", { className: "quiet", text: ` → ${adapter.alias_of}` }) : "";
    return make("tr", {},
      make("td", {}, name, of),
      make("td", { className: "digest", text: shorten(adapter.digest) || "not read yet" }),
      make("td", { className: "number", text: adapter.rank ?? "" }),
      make("td", { text: adapter.in_slot ? (adapter.pinned ? "yes, pinned" : "yes") : adapter.pinned ? "pinned" : "no" }),
      make("td", { className: "number", text: adapter.leases }),
      make("td", { className: "number", text: adapter.hits }),
      make("td", {}, ...makeChanges(adapter)));
  }));
  if (focused) body.querySelector(`[data-action="${CSS.escape(focused)}"]`)?.focus();
}

function makeChanges(adapter) {
  const label = encodeURIComponent(adapter.label);
  const pin = adapter.pinned
    ? makeButton("Unpin", `unpin ${adapter.label}`, () => change("DELETE", `v1/adapters/${label}/pin`))
    : makeButton("Pin", `pin ${adapter.label}`, () => change("PUT", `v1/adapters/${label}/pin`));
  if (!adapter.alias_of && !adapter.is_loaded) return [pin];
  const body = adapter.alias_of ? undefined : { lora_name: adapter.label };
  const path = adapter.alias_of ? `v1/aliases/${label}` : "v1/unload_lora_adapter";
  const method = adapter.alias_of ? "DELETE" : "POST";
  return [pin, makeButton("Take away", `remove ${adapter.label}`, () => change(method, path, body))];
}

function makeButton(text, action, onClick, className = "") {
  const button = make("button", { type: "button", text, className, "data-action": action, "aria-label": action });
  button.addEventListener("click", onClick);
  return button;
}

async function change(method, path, body) {
  try {
    const answer = await (await request(method, path, body)).json();
    const effect = answer.largest_change_of_a_logit;
    notify(effect === undefined ? "Done." : `Loaded: ${shorten(answer.digest)}, changes a logit by up to ${effect.toPrecision(3)}.`);
    await refresh();
  } catch (error) {
    notify(error.message, true);
  }
}

async function showCard(label) {
  try {
    const adapter = await readJson(`v1/adapters/${encodeURIComponent(label)}`);
    byId("card-title").textContent = `${label} · ${shorten(adapter.digest)}`;
    byId("card-text").textContent = adapter.card || "This adapter has no card.";
    byId("card").showModal();
    await refresh();
  } catch (error) {
    notify(error.message, true);
  }
}

// Asking

function makeColumn(model) {
  const digest = make("span", { className: "digest", text: "" });
  const text = make("pre", { text: "" });
  const end = make("div", { className: "end", text: "waits" });
  byId("columns").append(make("article", { className: "column", "data-model": model }, make("h3", { text: model }), digest, text, end));
  return { model, digest, text, end };
}

function sayDigest(column, answer) {
  const digest = answer.headers.get("lora-kit-digest");
  column.digest.textContent = digest ? shorten(digest) : "the base";
}

async function ask(event) {
  event.preventDefault();
  stop();
  const models = state.models.map((model) => model.id).filter((name) => state.chosen.has(name));
  if (!models.length) return notify("Choose who answers.", true);
  notify("");
  byId("columns").replaceChildren();
  const control = new AbortController();
  state.running = control;
  byId("stop").disabled = false;
  await Promise.all(models.map((model) => answerIn(makeColumn(model), control.signal)));
  if (state.running === control) stop();
  refresh().then(showMetrics).catch((error) => notify(error.message, true));
}

async function answerIn(column, signal) {
  try {
    await (state.task === "classify" ? classifyIn(column, signal) : streamIn(column, signal));
  } catch (error) {
    column.end.textContent = error.name === "AbortError" ? "stopped" : error.message;
    column.end.classList.toggle("bad", error.name !== "AbortError");
  }
}

async function classifyIn(column, signal) {
  const answer = await request("POST", "v1/classify", { model: column.model, input: byId("prompt").value }, signal);
  sayDigest(column, answer);
  const [said] = (await answer.json()).data;
  column.text.textContent = said.value === undefined ? said.labels.join(", ") || "no label" : String(said.value);
  const ordered = Object.entries(said.probabilities ?? {}).sort((one, other) => other[1] - one[1]);
  column.end.replaceChildren(...ordered.map(([label, probability]) => make("div", {},
    make("span", { text: `${label} ${(100 * probability).toFixed(1)} %` }),
    make("meter", { min: 0, max: 1, value: probability, "aria-label": label }))));
}

function makeBody(model) {
  const isChat = byId("form").value === "chat";
  const text = byId("prompt").value;
  const body = {
    model,
    stream: true,
    max_tokens: Number(byId("max-tokens").value) || 64,
    temperature: Number(byId("temperature").value),
    seed: Number(byId("seed").value) || 0,
    ...(isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
  };
  return [isChat ? "v1/chat/completions" : "v1/completions", body];
}

async function streamIn(column, signal) {
  const started = performance.now();
  const answer = await request("POST", ...makeBody(column.model), signal);
  sayDigest(column, answer);
  let tokens = 0;
  for await (const line of readLines(answer.body)) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    const chunk = JSON.parse(line.slice(6));
    if (chunk.error) throw new Error(chunk.error.message);
    const [choice] = chunk.choices;
    if (!choice) continue;
    const added = choice.text ?? choice.delta?.content ?? "";
    tokens += added ? 1 : 0;
    column.text.append(added);
    column.end.textContent = choice.finish_reason
      ? `${choice.finish_reason === "stop" ? "ended by itself" : "cut off"}, ${((performance.now() - started) / 1000).toFixed(1)} s`
      : "writes";
  }
}

async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
  if (rest) yield rest;
}

function stop() {
  state.running?.abort();
  state.running = null;
  byId("stop").disabled = true;
}

// What happens

const METRICS = [
  ["running", "vllm:num_requests_running"],
  ["waiting", "vllm:num_requests_waiting"],
  ["tokens", "vllm:generation_tokens_total"],
];

async function showMetrics() {
  const text = await (await request("GET", "metrics")).text();
  const read = (name) => {
    const line = text.split("\n").find((each) => each.startsWith(`${name}{`));
    return line ? Number(line.slice(line.lastIndexOf(" "))) : 0;
  };
  const now = { time: performance.now(), tokens: read("vllm:generation_tokens_total") };
  const rate = state.before ? (1000 * (now.tokens - state.before.tokens)) / (now.time - state.before.time) : 0;
  state.before = now;
  const inSlots = new Set(state.adapters.filter((adapter) => adapter.in_slot).map((adapter) => adapter.digest)).size;
  const shown = [...METRICS.map(([label, name]) => [label, read(name)]), ["tokens/s", rate.toFixed(0)], ["in slots", inSlots]];
  byId("metrics").replaceChildren(...shown.map(([label, value]) => make("div", {}, make("dt", { text: label }), make("dd", { text: value }))));
}

async function poll(count = 0) {
  if (!document.hidden) {
    try {
      await showMetrics();
      if (count % REFRESH_EVERY === 0 || !state.models.length) await refresh();
      if (byId("notice").dataset.lost) notify("");
      delete byId("notice").dataset.lost;
    } catch (error) {
      notify(error.message, true);
      byId("notice").dataset.lost = "yes";
    }
  }
  setTimeout(poll, POLL_MS, count + 1);
}

byId("key").addEventListener("change", () => refresh().then(() => notify(""), (error) => notify(error.message, true)));
byId("ask").addEventListener("submit", ask);
byId("stop").addEventListener("click", stop);
byId("load").addEventListener("submit", (event) => {
  event.preventDefault();
  change("POST", "v1/load_lora_adapter", { lora_name: byId("load-label").value, lora_path: byId("load-name").value });
});
byId("alias").addEventListener("submit", (event) => {
  event.preventDefault();
  const alias = encodeURIComponent(byId("alias-name").value);
  change("PUT", `v1/aliases/${alias}`, { label: byId("alias-label").value });
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  else if (event.key === "Escape" && !byId("card").open) stop();
  else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    byId("prompt").focus();
  }
});
poll();
