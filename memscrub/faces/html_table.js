// The table of texts: sorts, filters, turns pages and opens rows. All text goes through textContent.

const table = (() => {
  const PAGE = 25;
  const PRINTED = 1000;
  const make = strips.make;
  const data = JSON.parse(document.getElementById("row-data").textContent);
  const field = Object.fromEntries(data.fields.map((name, index) => [name, index]));
  const at = (row, name) => row[field[name]];
  const byId = (id) => document.getElementById(id);
  const names = new Intl.Collator("en", { numeric: true });

  // -1 stands for "infinitely much" of a limit, null for "not measured": that goes last in either direction.
  const order = (value) => (value === -1 ? Infinity : value);
  const percent = (value) => (value === null ? "–" : `${Math.round(100 * value)}%`);
  const share = (value) => (value === -1 ? "over" : percent(value));
  function small(value) {
    if (value === null) return "–";
    if (value === 0) return "0";
    return value >= 0.001 ? String(Number(value.toPrecision(2))) : value.toExponential(1).replace("e-", " × 10^-");
  }

  const COLUMNS = [
    { key: "id", head: "Text", first: "ascending" },
    { key: "kind", head: "Class", first: "ascending" },
    { key: "now", head: "Standing", first: "ascending" },
    { key: "run", head: "Run", show: String, number: true },
    { key: "near", head: "Alike", show: percent, number: true },
    { key: "sampled", head: "Sampled", show: small, number: true },
    { key: "secrets", head: "Secrets", show: String, number: true },
    { key: "used", head: "Of limit", show: share, number: true },
  ].filter((column) => data.rows.some((row) => !["near", "sampled"].includes(column.key) || at(row, column.key) !== null))
    .filter((column) => column.key !== "secrets" || data.rows.some((row) => at(row, "marked") > 0));

  const state = { sort: "now", direction: "ascending", page: 0, all: false, shown: [], open: new Set() };
  const body = document.querySelector("#rows tbody");
  // The style sheet leaves only text, standing and run on a narrow page; the rest is in the details.
  const narrow = matchMedia("screen and (max-width: 46rem)");
  const width = () => (narrow.matches ? 3 : COLUMNS.length);

  function compare(a, b) {
    const { sort, direction } = state;
    const x = order(at(a, sort));
    const y = order(at(b, sort));
    if (x === null || y === null) return (x === null) - (y === null);
    let result = sort === "id" ? names.compare(x, y) : sort === "kind" ? names.compare(data.classes[x], data.classes[y]) : x - y;
    if (result === 0 && sort === "now") return (order(at(b, "used")) ?? -2) - (order(at(a, "used")) ?? -2) || 0;
    return direction === "ascending" ? result : -result;
  }

  const MATCHES = {
    "": () => true,
    cured: (row) => at(row, "was") === 0 && at(row, "now") !== 0,
    ...Object.fromEntries(data.standings.map((name, index) => [name, (row) => at(row, "now") === index])),
  };

  function select() {
    const wanted = byId("search").value.trim().toLocaleLowerCase();
    const kind = byId("class").value;
    const matches = MATCHES[byId("standing").value];
    state.shown = data.rows.filter(
      (row) =>
        (!wanted || at(row, "id").toLocaleLowerCase().includes(wanted)) &&
        (kind === "" || at(row, "kind") === Number(kind)) &&
        matches(row),
    );
    state.shown.sort(compare);
    state.page = 0;
    draw();
  }

  function pair(row, key, show) {
    const before = field[`${key}Before`] === undefined ? null : at(row, `${key}Before`);
    const cell = make("td", undefined, `n c-${key}`);
    if (data.fixed && before !== null) {
      cell.append(make("span", show(before), "was"), make("span", "→", "arrow"));
      cell.firstChild.nextSibling.setAttribute("aria-label", "now");
    }
    cell.append(make("span", show(at(row, key)), "now"));
    return cell;
  }

  function standing(row) {
    const name = data.standings[at(row, "now")];
    const cell = make("td", undefined, "c-now");
    cell.append(make("span", name, `tag ${name}`));
    return cell;
  }

  function line(row, number) {
    const id = at(row, "id");
    const element = make("tr");
    const head = make("th", undefined, "c-id");
    head.scope = "row";
    const button = make("button");
    button.type = "button";
    const open = state.open.has(id);
    button.setAttribute("aria-expanded", String(open));
    button.setAttribute("aria-controls", `detail-${number}`);
    const twist = make("span", "›", "twist");
    twist.setAttribute("aria-hidden", "true");
    button.append(twist, make("bdi", id));
    head.append(button);
    element.append(head);
    for (const column of COLUMNS.slice(1)) {
      if (column.key === "kind") {
        const cell = make("td", undefined, "c-kind");
        cell.append(make("bdi", data.classes[at(row, "kind")]));
        element.append(cell);
      } else if (column.key === "now") element.append(standing(row));
      else if (column.key === "secrets" && !at(row, "marked")) element.append(make("td", "–", "n c-secrets"));
      else element.append(pair(row, column.key, column.show));
    }
    const rest = make("tr", undefined, "detail");
    rest.id = `detail-${number}`;
    rest.hidden = !open;
    if (open) fill(rest, row);
    element.classList.toggle("open", open);
    button.addEventListener("click", () => {
      const now = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(now));
      element.classList.toggle("open", now);
      if (now) state.open.add(id);
      else state.open.delete(id);
      if (now && !rest.firstChild) fill(rest, row);
      rest.hidden = !now;
    });
    return [element, rest];
  }

  function fill(element, row) {
    const cell = make("td");
    cell.colSpan = width();
    const facts = [`Class ${data.classes[at(row, "kind")]}, ${at(row, "tokens")} judged tokens.`];
    if (at(row, "marked")) facts.push(`${at(row, "secrets")} of ${at(row, "marked")} marked secrets come out.`);
    if (at(row, "place")) facts.push(`In its list: ${at(row, "place")}.`);
    const list = make("ul");
    for (const text of [...facts, ...at(row, "remarks")]) list.append(make("li", text));
    if (at(row, "findings").length) {
      const box = make("div", undefined, "scroll");
      box.append(findings(row));
      cell.append(box);
    }
    cell.append(list);
    if (strips.has(at(row, "id"))) cell.append(strips.draw(at(row, "id")));
    element.append(cell);
  }

  function findings(row) {
    const grid = make("table");
    const head = grid.createTHead().insertRow();
    const fixed = at(row, "findings").some((each) => each.length > 4);
    for (const name of ["Limit", "Allowed", ...(fixed ? ["Before", "After"] : ["Measured"]), "Holds"]) {
      const cell = make("th", name, ["Limit", "Holds"].includes(name) ? "" : "n");
      cell.scope = "col";
      head.append(cell);
    }
    const rows = grid.createTBody();
    for (const [limit, allowed, measured, holds, before] of at(row, "findings")) {
      const line = rows.insertRow();
      const name = make("th");
      name.scope = "row";
      const code = make("code");
      for (const part of data.limits[limit].split("_")) {
        if (code.firstChild) code.append("_", make("wbr"));
        code.append(part);
      }
      name.append(code);
      line.append(name, make("td", small(allowed), "n"));
      if (fixed) line.append(make("td", before === undefined ? "–" : small(before), "n was"));
      line.append(make("td", small(measured), "n"));
      const word = make("td");
      word.append(make("span", holds ? "holds" : "broken", `tag ${holds ? "within" : "violated"}`));
      line.append(word);
    }
    return grid;
  }

  function draw(all = state.all) {
    state.all = all;
    const pages = Math.max(1, Math.ceil(state.shown.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const begin = all ? 0 : state.page * PAGE;
    const rows = state.shown.slice(begin, all ? PRINTED : begin + PAGE);
    const lines = rows.flatMap((row, index) => line(row, begin + index));
    if (!lines.length) {
      const none = make("td", "No text fits. Show all to start again.", "none");
      none.colSpan = width();
      const only = make("tr");
      only.append(none);
      lines.push(only);
    }
    body.replaceChildren(...lines);
    const total = data.rows.length;
    const count = state.shown.length;
    byId("found").textContent = `${count.toLocaleString("en")} of ${total.toLocaleString("en")} text${total === 1 ? "" : "s"}`;
    byId("page").textContent = `Page ${state.page + 1} of ${pages.toLocaleString("en")}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page + 1 >= pages;
    byId("pager").hidden = pages === 1;
    byId("reset").hidden = count === total;
  }

  function heads() {
    const head = document.querySelector("#rows thead tr");
    for (const column of COLUMNS) {
      const cell = make("th", undefined, `${column.number ? "n " : ""}c-${column.key}`);
      cell.scope = "col";
      const button = make("button", column.head);
      button.type = "button";
      const direction = make("span", "", "direction");
      direction.setAttribute("aria-hidden", "true");
      button.append(direction);
      button.addEventListener("click", () => {
        const again = state.sort === column.key;
        const turned = state.direction === "ascending" ? "descending" : "ascending";
        state.direction = again ? turned : column.first ?? "descending";
        state.sort = column.key;
        sorted();
        select();
      });
      cell.append(button);
      head.append(cell);
    }
    sorted();
  }

  function sorted() {
    document.querySelectorAll("#rows thead th").forEach((cell, index) => {
      const mine = COLUMNS[index].key === state.sort;
      cell.setAttribute("aria-sort", mine ? state.direction : "none");
      cell.querySelector(".direction").textContent = mine ? (state.direction === "ascending" ? "↑" : "↓") : "";
    });
  }

  function choices() {
    data.classes.forEach((name, index) => byId("class").append(new Option(name, String(index))));
    const count = Object.fromEntries(Object.keys(MATCHES).map((name) => [name, data.rows.filter(MATCHES[name]).length]));
    const words = { cured: "violated before, not now" };
    for (const name of ["violated", "excused", "inconclusive", "within", ...(data.fixed ? ["cured"] : [])]) {
      if (count[name]) byId("standing").append(new Option(`${words[name] ?? name} (${count[name].toLocaleString("en")})`, name));
    }
  }

  function turn(by) {
    state.page += by;
    draw();
    byId("texts").scrollIntoView();
  }

  function start() {
    heads();
    choices();
    for (const id of ["search", "class", "standing"]) byId(id).addEventListener("input", select);
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", () => setTimeout(select));
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    narrow.addEventListener("change", () => draw());
    for (const id of ["filters", "rows"]) byId(id).hidden = false;
    select();
  }

  return { start, draw };
})();
