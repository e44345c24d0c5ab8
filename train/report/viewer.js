"use strict";
(() => {
  const GROUPS = JSON.parse(document.getElementById("data").textContent);
  const GROUPS_OF_PAGE = 10, LEAST_LOG = -5, DEPTH = 70;
  const element = id => document.getElementById(id);
  const state = {page: 0, color: "log"};

  // All text of a run reaches the page through `textContent`. This is the only place that makes elements.
  function make(tag, className, text, children = []) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text != null) made.textContent = text;
    made.append(...children);
    return made;
  }

  // Characters that cannot be seen, or that reorder their neighbors, by name.
  const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f]|[\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;
  const visible = text => text.replace(INVISIBLE, each => {
    const code = each.codePointAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : "[U+" + code.toString(16).toUpperCase().padStart(4, "0") + "]";
  });
  const visibleToken = text => text === "" ? "\u00b7" : visible(text).replace(/\n/g, "\u23ce\n");

  const number = (value, digits = 3) => value == null ? "unknown" : String(Number(value.toPrecision(digits)));
  const signed = value => value == null ? "unknown" : (value > 0 ? "+" : "") + number(value);
  const counted = (count, name) => whole(count) + " " + name + (count === 1 ? "" : "s");
  const whole = value => value == null ? "?" : value.toLocaleString("en-US");

  // Filters.
  function filters() {
    const bound = id => element(id).value === "" ? null : Number(element(id).value);
    return {
      step: element("step").value, outcome: element("outcome").value, trained: element("trained").value,
      least: bound("least"), most: bound("most"), prompt: element("prompt").value.trim().toLowerCase(),
    };
  }
  function keepsGroup(group, chosen) {
    if (chosen.step !== "" && String(group.step) !== chosen.step) return false;
    if (chosen.trained !== "" && (group.dropped === "") !== (chosen.trained === "yes")) return false;
    return chosen.prompt === "" || String(group.prompt) === chosen.prompt ||
      [group.text, group.problem].some(text => text.toLowerCase().includes(chosen.prompt));
  }
  function keepsAnswer(answer, chosen) {
    if (chosen.outcome !== "" && answer.outcome !== chosen.outcome) return false;
    if (chosen.least != null && !(answer.reward >= chosen.least && answer.reward != null)) return false;
    return chosen.most == null || (answer.reward <= chosen.most && answer.reward != null);
  }
  function findGroups() {
    const chosen = filters(), found = [];
    for (const group of GROUPS) {
      if (!keepsGroup(group, chosen)) continue;
      const answers = group.answers.filter(answer => keepsAnswer(answer, chosen));
      if (answers.length) found.push({group, answers});
    }
    return found;
  }

  // A token's color: a hue of the palette, and how much of it, in percent.
  function colorOf(log, advantage) {
    if (state.color === "log") return ["--c2", log == null ? 0 : Math.min(log / LEAST_LOG, 1) * DEPTH];
    return [advantage > 0 ? "--c1" : "--c2", Math.min(Math.abs(advantage || 0) / 2, 1) * DEPTH];
  }
  function paint(made, [hue, depth]) {
    made.style.setProperty("--hue", "var(" + hue + ")");
    made.style.setProperty("--depth", String(Math.max(depth, 0)));
  }

  function readToken(answer, place) {
    const log = answer.logs && answer.logs[place];
    const shown = answer.cut && place >= answer.cut[0] ? place + answer.cut[1] : place;
    element("reading").textContent = "Token " + (shown + 1) + " of " + whole(answer.count) + ": " +
      JSON.stringify(visible(answer.pieces[place])) + (log == null ? "" :
        ", log-probability " + number(log) + ", probability " + number(100 * Math.exp(log)) + " %") +
      ", advantage " + signed(answer.advantage);
  }

  function tokensOf(answer) {
    if (!answer.pieces) return make("div", "text", visible(answer.text));
    const spans = answer.pieces.map((piece, place) => {
      const span = make("span", "", visibleToken(piece));
      paint(span, colorOf(answer.logs && answer.logs[place], answer.advantage));
      return span;
    });
    const holder = make("div", "tokens", null, spans);
    if (answer.cut) {
      const gap = make("i", "gap", whole(answer.cut[1]) + " tokens left out");
      holder.insertBefore(gap, spans[answer.cut[0]] || null);
    }
    holder.tabIndex = 0;
    holder.setAttribute("role", "group");
    holder.setAttribute("aria-label", "tokens of answer " + answer.sample);
    let at = -1;
    const go = place => {
      if (at >= 0) spans[at].classList.remove("at");
      at = Math.min(Math.max(place, 0), spans.length - 1);
      if (at < 0) return;
      spans[at].classList.add("at");
      readToken(answer, at);
    };
    holder.addEventListener("mouseover", event => {
      const place = spans.indexOf(event.target);
      if (place >= 0) readToken(answer, place);
    });
    holder.addEventListener("click", event => {
      const place = spans.indexOf(event.target);
      if (place >= 0) go(place);
    });
    holder.addEventListener("keydown", event => {
      const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: spans.length - 1};
      if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      go(moves[event.key]);
      spans[at].scrollIntoView({block: "nearest"});
    });
    return holder;
  }

  function scoresOf(answer) {
    const rows = answer.parts.map(([kind, value, outcome, detail]) => make("tr", "", null,
      [kind, number(value), outcome, detail].map(text => make("td", "", visible(text)))));
    const head = make("tr", "", null, ["part", "value", "outcome", "detail"].map(text => make("th", "", text)));
    const shown = "reward: " + answer.parts.map(([kind, value]) => visible(kind) + " " + number(value)).join(", ");
    return make("details", "", null, [make("summary", "", shown), make("table", "scores", null, [head, ...rows])]);
  }

  function answerOf(answer) {
    const outcome = make("span", "outcome", visible(answer.outcome) || "no outcome");
    if (/^[a-z]+$/.test(answer.outcome)) outcome.classList.add(answer.outcome);
    const facts = [
      outcome, make("b", "", "reward " + number(answer.reward)), make("span", "", "advantage " + signed(answer.advantage)),
      make("span", "", whole(answer.count) + " tokens"),
      make("span", "", answer.finish === "length" ? "cut at the limit" : visible(answer.finish)),
      make("span", "", "sample " + whole(answer.sample)),
    ];
    const parts = answer.parts.length ? [scoresOf(answer)] : [];
    return make("article", "answer", null, [make("h3", "", null, facts), tokensOf(answer), ...parts]);
  }

  function groupOf({group, answers}) {
    const stats = group.stats;
    const facts = ["mean reward " + number(stats.mean) + " (" + number(stats.least) + " to " + number(stats.most) + ")",
      stats.correct + " of " + stats.answers + " correct", "mean length " + number(stats.tokens) + " tokens"];
    if (group.dropped) facts.push("not trained: " + visible(group.dropped));
    if (answers.length < stats.answers) facts.push(answers.length + " of " + stats.answers + " answers shown");
    const title = make("h2", "", "Step " + whole(group.step) + ", prompt " + whole(group.prompt));
    if (group.problem !== group.text) title.append(make("small", "", visible(group.problem)));
    const parts = [title, make("p", "facts", facts.join("; ")), make("div", "name", "prompt"),
      make("div", "text", visible(group.text))];
    if (group.expected != null)
      parts.push(make("div", "name", "expected answer"), make("div", "text", visible(group.expected)));
    return make("section", "group", null, [...parts, ...answers.map(answerOf)]);
  }

  function drawScale() {
    const stops = state.color === "log" ? [0, -1.25, -2.5, -3.75, -5].map(log => colorOf(log, 0)) :
      [-2, -1, 0, 1, 2].map(advantage => colorOf(0, advantage));
    const swatches = stops.map(color => {
      const swatch = make("i", "");
      swatch.style.background = "color-mix(in srgb,var(" + color[0] + ") " + color[1] + "%,transparent)";
      return swatch;
    });
    const names = state.color === "log" ? ["log-probability 0", LEAST_LOG + " or less"] : ["advantage -2 or less", "2 or more"];
    element("scale").replaceChildren(make("span", "", names[0]), ...swatches, make("span", "", names[1]));
  }

  function draw() {
    const found = findGroups(), pages = Math.max(Math.ceil(found.length / GROUPS_OF_PAGE), 1);
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const first = state.page * GROUPS_OF_PAGE;
    const answers = found.reduce((sum, each) => sum + each.answers.length, 0);
    element("found").textContent = counted(answers, "answer") + " in " + counted(found.length, "group");
    element("place").textContent = "page " + whole(state.page + 1) + " of " + whole(pages);
    element("previous").disabled = state.page === 0;
    element("next").disabled = state.page === pages - 1;
    element("groups").replaceChildren(...found.slice(first, first + GROUPS_OF_PAGE).map(groupOf));
    drawScale();
  }

  function addOptions(id, values, write) {
    for (const value of values) {
      const option = make("option", "", write(value));
      option.value = String(value);
      element(id).append(option);
    }
  }

  addOptions("step", [...new Set(GROUPS.map(group => group.step))].sort((one, other) => one - other), whole);
  addOptions("outcome", [...new Set(GROUPS.flatMap(group => group.answers.map(answer => answer.outcome)))].sort(), visible);
  element("filters").addEventListener("submit", event => event.preventDefault());
  element("filters").addEventListener("input", event => {
    if (event.target.name === "color") state.color = event.target.value;
    else state.page = 0;
    draw();
  });
  element("previous").addEventListener("click", () => { state.page--; draw(); });
  element("next").addEventListener("click", () => { state.page++; draw(); });
  draw();
})();
