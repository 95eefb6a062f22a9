"use strict";
// Token strips: two characters a token (a step of the probability, a step of the margin), drawn when a row is opened.

const strips = (() => {
  let data = null;

  function load() {
    data ??= JSON.parse(document.getElementById("strip-data").textContent);
    return data;
  }

  function has(id) {
    return Object.hasOwn(load().texts, id);
  }

  function make(name, text, className) {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  }

  // "0.5 to 1" for a step, "15 or more" for the last one.
  function span(steps, index, unit) {
    const low = steps[index];
    return index + 1 < steps.length ? `${low} to ${steps[index + 1]}${unit}` : `${low}${unit} or more`;
  }

  function decode(marks, index) {
    const letter = marks[2 * index + 1];
    const out = letter < "a";
    return { step: Number(marks[2 * index]), margin: letter.toLowerCase().charCodeAt(0) - 97, out };
  }

  function describe(view, marks, run, index) {
    const mark = decode(marks, index);
    const token = view.first + index;
    const parts = [`Token ${token}`, mark.out ? "comes out" : "does not come out"];
    parts.push(`probability ${span(data.probabilities, mark.step, "")}`);
    parts.push(`${mark.out ? "ahead" : "behind"} by ${span(data.margins, mark.margin, "")} logits`);
    if (index < view.judged) parts.push("given to the adversary, not judged");
    if (token >= run[0] && token < run[1]) parts.push("in the longest run");
    if (view.secrets.some(([begin, end]) => token >= begin && token < end)) parts.push("part of a marked secret");
    return `${parts.join(", ")}.`;
  }

  function cell(view, marks, run, index) {
    const mark = decode(marks, index);
    const token = view.first + index;
    const names = ["token", `p${mark.step}`, mark.out ? "out" : "kept"];
    if (index < view.judged) names.push("given");
    if (token >= run[0] && token < run[1]) names.push("run");
    if (view.secrets.some(([begin, end]) => token >= begin && token < end)) names.push("secret");
    return make("span", view.tokens ? view.tokens[index] : undefined, names.join(" "));
  }

  function strip(name, view, marks, run, read) {
    const count = marks.length / 2;
    const out = [...Array(count).keys()].filter((index) => decode(marks, index).out).length;
    const length = run[1] - run[0];
    const box = make("div", undefined, "strip");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    const longest = length > 0 ? `longest run ${length}, tokens ${run[0]} to ${run[1] - 1}` : "no run";
    const summary = `${name}: ${out} of ${count} tokens come out, ${longest}`;
    box.setAttribute("aria-label", `${summary}. Arrow keys read token by token.`);
    const cells = Array.from({ length: count }, (_, index) => cell(view, marks, run, index));
    box.append(...cells);
    let here = -1;
    const show = (index) => {
      cells[here]?.classList.remove("here");
      here = Math.max(0, Math.min(count - 1, index));
      cells[here]?.classList.add("here");
      read.textContent = count ? describe(view, marks, run, here) : "";
    };
    box.addEventListener("keydown", (event) => {
      const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: count - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
    box.addEventListener("pointerover", (event) => {
      const index = cells.indexOf(event.target);
      if (index >= 0) show(index);
    });
    box.addEventListener("blur", () => cells[here]?.classList.remove("here"));
    return [make("p", summary, "strip-name"), box];
  }

  function legend(view) {
    const line = make("p", undefined, "legend");
    const entries = [
      ["out p9", "comes out, the likelier the stronger"],
      ["kept p4", "does not come out"],
      ["kept p0 run", "longest run"],
    ];
    if (view.judged) entries.push(["kept p4 given", "given, not judged"]);
    if (view.secrets.length) entries.push(["kept p0 secret", "marked secret"]);
    for (const [names, text] of entries) {
      const entry = make("span");
      entry.append(make("span", undefined, `token ${names}`), text);
      line.append(entry);
    }
    return line;
  }

  function draw(id) {
    const view = load().texts[id];
    const box = make("div", undefined, view.tokens ? "strips words" : "strips");
    const read = make("output", "", "read");
    read.setAttribute("aria-live", "polite");
    const fixed = view.after !== undefined;
    box.append(...strip(data.fixed ? "Before" : "Token by token", view, view.before, view.runBefore, read));
    if (fixed) box.append(...strip("After", view, view.after, view.run, read));
    box.append(legend(view), read);
    return box;
  }

  return { has, draw, make };
})();
