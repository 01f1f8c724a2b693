// The token explorer: recorded texts as tokens, coloured by what the router did with each.
(() => {
  const data = JSON.parse(document.getElementById("texts").textContent);
  const live = document.getElementById("explorer-live");
  if (!data || !data.documents.length || !live) return;
  const part = (name) => document.getElementById(`explorer-${name}`);
  const TINTS = ["#a6d4f2", "#ffcc94", "#9fdcc2", "#f2b8d5", "#fff0a3", "#cbc4ef", "#d9c4a3", "#c5e48f"];
  const OTHERS = "#e6e9ee";
  const HITS = 200;
  const NOTHING = data.bytes === 1 ? 255 : 65535;
  const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const visible = (text) => text.replace(/[ \n\t\r]/g, (sign) => SIGNS[sign]);
  const state = { text: 0, layer: 0, colour: "expert", expert: null, chosen: 0, query: "", filter: false };
  let spans = [];
  let hits = [];
  let hit = -1;

  // Routing of a text, decoded when it is first shown: layer by layer, token by token, rank by rank.
  const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const wide = (raw) => new Uint16Array(raw.buffer, 0, raw.length / 2);
  const decoded = new Map();
  function routing(number) {
    if (!decoded.has(number)) {
      const text = data.documents[number];
      const raw = bytes(text.choice);
      decoded.set(number, {
        size: text.tokens.length,
        choice: data.bytes === 1 ? raw : wide(raw),
        weight: wide(bytes(text.weight)),
        dropped: text.dropped ? bytes(text.dropped) : null,
        entropy: bytes(text.entropy),
      });
    }
    return decoded.get(number);
  }
  function picks(number, layer, token) {
    const route = routing(number);
    const found = [];
    for (let rank = 0; rank < data.width; rank += 1) {
      const at = (layer * route.size + token) * data.width + rank;
      const expert = route.choice[at];
      if (expert === NOTHING) continue;
      found.push({
        rank: rank + 1,
        expert,
        none: expert >= data.layers[layer].experts,
        weight: (route.weight[at] / 65535) * data.layers[layer].scale,
        share: route.weight[at] / 65535,
        dropped: route.dropped !== null && ((route.dropped[at >> 3] >> (7 - (at & 7))) & 1) === 1,
      });
    }
    return found;
  }
  const entropyOf = (number, layer, token) => {
    const route = routing(number);
    return route.entropy[layer * route.size + token] / 255;
  };
  const textOf = (number, token) => data.texts[data.documents[number].tokens[token]];
  const positionOf = (text, token) => (Array.isArray(text.position) ? text.position[token] : text.position + token);

  // Colours: the experts that the text uses most as first choice have tints of their own.
  function tints(number, layer) {
    const counts = new Map();
    for (let token = 0; token < routing(number).size; token += 1) {
      const first = picks(number, layer, token)[0];
      if (first) counts.set(first.expert, (counts.get(first.expert) ?? 0) + 1);
    }
    const order = [...counts].sort((one, other) => other[1] - one[1] || one[0] - other[0]);
    return { order, colour: new Map(order.slice(0, TINTS.length).map(([expert], index) => [expert, TINTS[index]])) };
  }
  function shade(share) {
    const mix = (from, to) => Math.round(from + (to - from) * Math.min(Math.max(share, 0), 1));
    return `rgb(${mix(250, 107)}, ${mix(252, 174)}, ${mix(255, 214)})`;
  }
  const layersShown = () => (state.layer < 0 ? data.layers.map((_, index) => index) : [state.layer]);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);

  function paint() {
    const layers = layersShown();
    const tinted = new Map(layers.map((layer) => [layer, state.colour === "expert" ? tints(state.text, layer) : null]));
    const numbered = part("numbers").checked && state.layer >= 0;
    const measure = (token) =>
      state.colour === "weight"
        ? mean(layers.map((layer) => picks(state.text, layer, token)[0]?.weight ?? 0))
        : mean(layers.map((layer) => entropyOf(state.text, layer, token)));
    const values = state.colour === "expert" ? [] : spans.map((_, token) => measure(token));
    const [least, most] = [Math.min(...values), Math.max(...values)];
    // Dark is a clear choice: a large weight, or a small entropy.
    const clear = (value) => (state.colour === "weight" ? value - least : most - value) / (most - least || 1);
    spans.forEach((span, token) => {
      const all = layers.map((layer) => picks(state.text, layer, token));
      const first = all.map((found) => found[0]);
      span.lastChild?.nodeName === "SMALL" && span.lastChild.remove();
      span.lastChild?.nodeName === "I" && span.lastChild.remove();
      span.style.background = "";
      if (state.colour !== "expert") span.style.background = shade(clear(values[token]));
      else {
        const colours = first.map((pick, index) => (pick ? tinted.get(layers[index]).colour.get(pick.expert) ?? OTHERS : "#fff"));
        if (layers.length === 1) span.style.background = colours[0];
        else {
          const step = 100 / colours.length;
          const stops = colours.map((colour, index) => `${colour} ${(index * step).toFixed(2)}% ${((index + 1) * step).toFixed(2)}%`);
          const stripes = make("i");
          stripes.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
          span.append(stripes);
        }
      }
      if (numbered) span.append(make("small", { text: first[0] ? (first[0].none ? "null" : first[0].expert) : "–" }));
      span.classList.toggle("dropped", all.some((found) => found.some((pick) => pick.dropped)));
      const off = state.expert !== null && !all[0].some((pick) => pick.expert === state.expert);
      span.classList.toggle("faint", off);
    });
    legend(layers, tinted, least, most);
    panel(state.chosen);
    markHits();
  }

  function legend(layers, tinted, least, most) {
    const box = part("legend");
    const held = document.activeElement?.dataset?.legend;
    box.replaceChildren();
    if (state.colour !== "expert") {
      const name = state.colour === "weight" ? "Weight of the first expert" : "Entropy";
      const where = layers.length > 1 ? ", mean of all layers" : "";
      const [low, high] = state.colour === "weight" ? [least, most] : [most, least];
      const ramp = make("span", { class: "ramp" });
      ramp.style.background = `linear-gradient(to right, ${shade(0)}, ${shade(1)})`;
      box.append(make("span", { text: `${name}${where}: ${low.toFixed(3)}` }), ramp, make("span", { text: high.toFixed(3) }));
      return;
    }
    if (layers.length > 1) {
      box.append(make("span", { text: `Stripes: layers ${data.layers[0].layer} to ${data.layers.at(-1).layer}, each with the colours of its own most used experts.` }));
      return;
    }
    const { order, colour } = tinted.get(layers[0]);
    box.append(make("span", { text: "Experts, with their tokens:" }));
    for (const [expert, count] of order.slice(0, 24)) {
      const none = expert >= data.layers[layers[0]].experts;
      const button = make("button", { type: "button", "data-legend": expert, "aria-pressed": String(state.expert === expert), text: `${none ? "null " : ""}${expert}: ${count}` });
      button.setAttribute("aria-label", `${none ? "Null expert" : "Expert"} ${expert}, first choice of ${count} tokens; show only its tokens`);
      button.style.background = colour.get(expert) ?? OTHERS;
      button.addEventListener("click", () => {
        state.expert = state.expert === expert ? null : expert;
        paint();
      });
      box.append(button);
    }
    if (order.length > 24) box.append(make("span", { text: `and ${order.length - 24} more` }));
    if (held !== undefined) box.querySelector(`[data-legend="${held}"]`)?.focus();
  }

  function chip(pick) {
    const words = `${pick.none ? "null expert" : "expert"} ${pick.expert}, rank ${pick.rank}, weight ${pick.weight.toFixed(4)}${pick.dropped ? ", dropped" : ""}`;
    const element = make("span", {
      class: `pick${pick.none ? " null" : ""}${pick.dropped ? " dropped" : ""}`,
      title: words,
      "data-expert": pick.expert,
      "data-rank": pick.rank,
      "data-weight": pick.weight.toFixed(6),
    });
    element.style.setProperty("--share", `${(pick.share * 100).toFixed(1)}%`);
    element.append(make("b", { text: pick.none ? `null ${pick.expert}` : pick.expert }), pick.dropped ? "dropped" : pick.weight.toFixed(3));
    return element;
  }

  function panel(token) {
    const text = data.documents[state.text];
    const box = part("panel");
    const facts = [`id ${data.ids[text.tokens[token]]}`, `position ${positionOf(text, token)}`, `text ${text.number}`];
    if (text.domain) facts.push(text.domain);
    if (text.turn && text.turn[token] >= 0) facts.push(`turn ${text.turn[token]}`);
    const body = make("tbody");
    data.layers.forEach((layer, index) => {
      const found = picks(state.text, index, token);
      const cell = make("td", {}, ...(found.length ? found.map(chip) : ["none"]));
      const row = make("tr", { "data-layer": layer.layer, class: index === state.layer ? "here" : null });
      row.append(make("th", { scope: "row", text: layer.layer }), cell, make("td", { text: entropyOf(state.text, index, token).toFixed(2) }));
      body.append(row);
    });
    const head = make("thead", {}, make("tr", {}, ...["layer", "experts, best first, with weights", "entropy"].map((name) => make("th", { scope: "col", text: name }))));
    const table = make("table", {}, make("caption", { text: "Experts of this token in each layer" }), head, body);
    const top = box.scrollTop;
    box.replaceChildren(make("h3", {}, "Token ", make("code", { text: visible(textOf(state.text, token)) })), make("p", { text: facts.join(" · ") }), table);
    box.scrollTop = top;
    box.dataset.token = token;
  }

  function choose(token, focus) {
    const before = spans[state.chosen];
    if (before) {
      before.tabIndex = -1;
      before.setAttribute("aria-selected", "false");
    }
    state.chosen = token;
    spans[token].tabIndex = 0;
    spans[token].setAttribute("aria-selected", "true");
    if (focus) spans[token].focus({ preventScroll: true });
    if (focus) reveal(spans[token]);
    panel(token);
  }
  function reveal(span) {
    const box = part("words");
    const [inside, outside] = [span.getBoundingClientRect(), box.getBoundingClientRect()];
    if (inside.top < outside.top) box.scrollTop -= outside.top - inside.top + 12;
    else if (inside.bottom > outside.bottom) box.scrollTop += inside.bottom - outside.bottom + 12;
  }

  function showText(number) {
    state.text = number;
    state.expert = null;
    part("text").value = number;
    const box = part("words");
    const text = data.documents[number];
    spans = text.tokens.map((entry, token) => {
      const words = data.texts[entry];
      const span = make("span", { role: "option", tabindex: -1, "aria-selected": "false", "data-token": token });
      span.append(/[\n\t\r]/.test(words) || !words.trim() ? make("span", { class: "sign", text: visible(words) }) : words);
      return span;
    });
    box.replaceChildren(...spans.flatMap((span, token) => (data.texts[text.tokens[token]].includes("\n") ? [span, make("br")] : [span])));
    if (text.length > text.tokens.length) box.append(make("div", { class: "sign", text: `… the first ${text.tokens.length} of ${text.length} tokens` }));
    box.scrollTop = 0;
    choose(0, false);
    paint();
  }

  // Texts as strings, with the place where each token begins, for finding words that span tokens.
  const strings = new Map();
  function stringOf(number) {
    if (!strings.has(number)) {
      const starts = [];
      let whole = "";
      for (const entry of data.documents[number].tokens) {
        starts.push(whole.length);
        whole += data.texts[entry].toLowerCase();
      }
      starts.push(whole.length);
      strings.set(number, { whole, starts });
    }
    return strings.get(number);
  }
  function find(query) {
    state.query = query.toLowerCase();
    hits = [];
    hit = -1;
    if (state.query) {
      data.documents.forEach((_, number) => {
        const { whole, starts } = stringOf(number);
        let token = 0;
        for (let at = whole.indexOf(state.query); at >= 0; at = whole.indexOf(state.query, at + state.query.length)) {
          while (starts[token + 1] <= at) token += 1;
          let last = token;
          while (starts[last + 1] < at + state.query.length) last += 1;
          hits.push({ text: number, first: token, last });
        }
      });
    }
    fillTexts();
    const here = hits.find((found) => found.text === state.text);
    if (hits.length && !here) showText(hits[0].text);
    markHits();
  }
  function markHits() {
    const marked = new Set();
    for (const found of hits) if (found.text === state.text) for (let token = found.first; token <= found.last; token += 1) marked.add(token);
    spans.forEach((span, token) => {
      span.classList.toggle("found", marked.has(token));
      span.hidden = state.filter && hits.length > 0 && !marked.has(token);
    });
    part("count").textContent = state.query ? `${hits.length.toLocaleString("en")} ${hits.length === 1 ? "match" : "matches"}` : "";
    listHits();
  }
  const glue = (number, first, last) => {
    let words = "";
    for (let token = Math.max(first, 0); token < Math.min(last, data.documents[number].tokens.length); token += 1) words += textOf(number, token);
    return visible(words).replaceAll("␣", " ");
  };
  function listHits() {
    const box = part("hits");
    box.hidden = !hits.length;
    if (!hits.length) return box.replaceChildren();
    const layer = Math.max(state.layer, 0);
    const body = make("tbody");
    hits.slice(0, HITS).forEach((found, index) => {
      const go = make("button", { type: "button", text: glue(found.text, found.first, found.last + 1) });
      go.addEventListener("click", () => jump(index));
      const experts = make("td", { class: "experts" });
      for (let token = found.first; token <= found.last; token += 1) experts.append(...picks(found.text, layer, token).map(chip), token < found.last ? " | " : "");
      body.append(
        make(
          "tr",
          {},
          make("th", { scope: "row", text: data.documents[found.text].number }),
          make("td", { class: "before" }, make("bdi", { text: glue(found.text, found.first - 8, found.first) })),
          make("td", { class: "match" }, go),
          make("td", { class: "after", text: glue(found.text, found.last + 1, found.last + 9) }),
          experts,
        ),
      );
    });
    const names = ["text", "before", "match", "after", `experts in layer ${data.layers[layer].layer}`];
    const head = make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col", class: "text", text: name }))));
    const more = hits.length > HITS ? `, the first ${HITS} of ${hits.length.toLocaleString("en")}` : "";
    box.replaceChildren(make("table", {}, make("caption", { text: `Matches of “${state.query}”${more}` }), head, body));
    return undefined;
  }
  function jump(index) {
    if (!hits.length) return;
    hit = (index + hits.length) % hits.length;
    const found = hits[hit];
    if (found.text !== state.text) showText(found.text);
    choose(found.first, true);
  }

  function fillTexts() {
    const counts = new Map();
    for (const found of hits) counts.set(found.text, (counts.get(found.text) ?? 0) + 1);
    const shown = data.documents.map((_, number) => number).filter((number) => !state.filter || !hits.length || counts.has(number));
    part("text").replaceChildren(
      ...shown.map((number) => {
        const text = data.documents[number];
        const opening = glue(number, 0, 12).replaceAll("⏎", " ").trim().slice(0, 28);
        const found = counts.has(number) ? ` (${counts.get(number)})` : "";
        return make("option", { value: number, text: `${text.number}${text.domain ? ` ${text.domain}` : ""}${found}: ${opening}…` });
      }),
    );
    part("text").value = state.text;
  }

  // What keys and pointers do.
  part("words").addEventListener("pointerover", (event) => {
    const span = event.target.closest("[data-token]");
    if (span) panel(Number(span.dataset.token));
  });
  part("words").addEventListener("pointerleave", () => panel(state.chosen));
  part("words").addEventListener("click", (event) => {
    const span = event.target.closest("[data-token]");
    if (span) choose(Number(span.dataset.token), true);
  });
  part("words").addEventListener("focusin", (event) => {
    const span = event.target.closest("[data-token]");
    if (span && Number(span.dataset.token) !== state.chosen) choose(Number(span.dataset.token), false);
  });
  function beside(step) {
    let token = state.chosen + step;
    while (spans[token]?.hidden) token += step;
    return spans[token] ? token : state.chosen;
  }
  function below(direction) {
    const here = spans[state.chosen].getBoundingClientRect();
    let best = state.chosen;
    let distance = Infinity;
    for (let token = state.chosen + direction; spans[token]; token += direction) {
      const there = spans[token].getBoundingClientRect();
      const line = (there.top - here.top) * direction;
      if (spans[token].hidden || line <= 4) continue;
      const away = Math.abs(there.left - here.left) + line * 3;
      if (away >= distance && line > here.height * 2) break;
      if (away < distance) [best, distance] = [token, away];
    }
    return best;
  }
  part("words").addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: () => beside(1),
      ArrowLeft: () => beside(-1),
      ArrowDown: () => below(1),
      ArrowUp: () => below(-1),
      Home: () => spans.findIndex((span) => !span.hidden),
      End: () => spans.findLastIndex((span) => !span.hidden),
    };
    if (event.key in moves) {
      event.preventDefault();
      choose(moves[event.key](), true);
    } else if (event.key === "Escape" && state.expert !== null) {
      state.expert = null;
      paint();
    }
  });
  part("text").addEventListener("change", (event) => showText(Number(event.target.value)));
  part("layer").addEventListener("change", (event) => {
    state.layer = Number(event.target.value);
    state.expert = null;
    paint();
  });
  part("colour").addEventListener("change", (event) => {
    state.colour = event.target.value;
    state.expert = null;
    paint();
  });
  part("numbers").addEventListener("change", paint);
  part("find").addEventListener("input", (event) => find(event.target.value));
  part("find").addEventListener("keydown", (event) => {
    if (event.key === "Enter") jump(hit + (event.shiftKey ? -1 : 1));
  });
  part("filter").addEventListener("change", (event) => {
    state.filter = event.target.checked;
    fillTexts();
    if (state.filter && hits.length && !hits.some((found) => found.text === state.text)) showText(hits[0].text);
    markHits();
  });

  live.hidden = false;
  part("layer").append(
    ...data.layers.map((layer, index) => make("option", { value: index, text: `${layer.layer} (${layer.experts} experts)` })),
    make("option", { value: -1, text: "all layers" }),
  );
  state.layer = Math.floor((data.layers.length - 1) / 2);
  part("layer").value = state.layer;
  fillTexts();
  showText(0);
})();
