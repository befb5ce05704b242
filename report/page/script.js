"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);
const tip = one("#tip");

// thumbnails: the first pair of a run's gallery
for (const place of all("[data-thumbs]")) {
  const pair = one(`#run-${place.dataset.thumbs} .enlarge`);
  if (!pair) continue;
  for (const side of ["truth", "rebuilt"]) {
    const image = one(`.${side} img`, pair);
    if (!image) continue;
    const copy = new Image();
    copy.src = image.src;
    copy.alt = "";
    copy.decoding = "async";
    one(`.${side}`, place).append(copy);
  }
}

// table: filters and sorting
const table = one(".runs");
if (table) {
  const body = one("tbody", table);
  const rows = all("tr", body);
  const keys = new Map(rows.map((row) => [row, JSON.parse(row.dataset.keys)]));
  const form = one(".filters");
  const articles = new Map(all("article.run").map((article) => [article.dataset.run, article]));

  const filter = () => {
    const wanted = all("[data-filter]", form).filter((select) => select.value);
    const words = one("[data-filter-text]", form).value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const own = keys.get(row);
      const text = Object.values(own).join(" ").toLowerCase();
      const shown = wanted.every((s) => own[s.dataset.filter] === s.value) && words.every((w) => text.includes(w));
      row.hidden = !shown;
      const article = articles.get(row.dataset.run);
      if (article) article.hidden = !shown;
      count += shown;
    }
    one("[data-count]").textContent = `${count} of ${rows.length} runs`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  one("[type=reset]", form).addEventListener("click", (event) => {
    event.preventDefault();
    form.reset();
    filter();
  });

  const sortBy = (column, descending) => {
    const value = (row) => row.children[column].dataset.value;
    const numeric = rows.every((row) => value(row) === "" || !isNaN(value(row)));
    const order = [...rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // runs without a value come last
      const difference = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
      return descending ? -difference : difference;
    });
    body.append(...order);
    all("th", table).forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  };
  const numbersFirstDown = (column) => rows.some((r) => r.children[column].dataset.value !== "" && !isNaN(r.children[column].dataset.value));
  for (const button of all("[data-sort]", table)) {
    button.addEventListener("click", () => {
      const column = Number(button.dataset.sort);
      const now = button.closest("th").getAttribute("aria-sort");
      sortBy(column, now ? now === "ascending" : column > 0 && numbersFirstDown(column));
    });
  }
  one("[data-sort-by]", form).addEventListener("change", (event) => {
    const column = Number(event.target.value);
    sortBy(column, column > 0 && numbersFirstDown(column));
  });
}

// a hidden run that a link names is shown again
addEventListener("hashchange", () => {
  const target = location.hash.startsWith("#run-") && document.getElementById(location.hash.slice(1));
  if (target) target.hidden = false;
});

// enlarged pairs
const box = one("#lightbox");
let pairs = [];
let current = 0;
const show = (index) => {
  current = (index + pairs.length) % pairs.length;
  const holder = one(".pictures", box);
  holder.replaceChildren();
  for (const side of ["truth", "rebuilt"]) {
    const source = one(`.${side}`, pairs[current]);
    const frame = document.createElement("div");
    frame.className = side;
    for (const child of source.children) frame.append(child.cloneNode(true));
    holder.append(frame);
  }
  one("#lightbox-caption").textContent = pairs[current].dataset.caption;
};
for (const button of all(".enlarge")) {
  button.addEventListener("click", () => {
    pairs = all(".enlarge", button.closest(".run, .showcase"));
    for (const step of all("[data-step]", box)) step.hidden = pairs.length < 2;
    show(pairs.indexOf(button));
    box.showModal();
  });
}
for (const button of all("[data-step]", box)) button.addEventListener("click", () => show(current + Number(button.dataset.step)));
one("[data-close]", box).addEventListener("click", () => box.close());
box.addEventListener("click", (event) => event.target === box && box.close());
box.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && pairs.length > 1) show(current + step);
});

// drawings: the nearest point, by pointer or by arrow keys
const prepare = (svg) => {
  svg.series ??= all(".series", svg).map((group) => {
    const texts = group.dataset.texts.split("\n");
    const drawn = one("polyline", group)?.getAttribute("points") ?? one(".marks", group).getAttribute("d");
    const name = group.dataset.name;
    const between = !name ? "" : name.endsWith("iteration") ? " " : ": ";
    return [...drawn.matchAll(/([\d.-]+),([\d.-]+)/g)].map(([, x, y], i) => {
      return { x: Number(x), y: Number(y), text: name + between + texts[i] };
    });
  });
  return svg.series;
};
const unpoint = (svg) => {
  one(".pointed", svg)?.remove();
  tip.hidden = true;
};
const point = (svg, found) => {
  unpoint(svg);
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  for (const [name, value] of Object.entries({ cx: found.x, cy: found.y, r: 6, class: "pointed" })) ring.setAttribute(name, value);
  svg.append(ring);
  tip.textContent = found.text;
  tip.hidden = false;
  const place = ring.getBoundingClientRect();
  const left = Math.min(Math.max(place.left + 14, 4), innerWidth - tip.offsetWidth - 4);
  const above = place.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : place.bottom + 8}px`;
};
for (const svg of all(".chart svg")) {
  svg.addEventListener("pointermove", (event) => {
    const matrix = svg.getScreenCTM().inverse();
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
    let best = null;
    let least = Infinity;
    for (const candidate of prepare(svg).flat()) {
      const distance = (candidate.x - x) ** 2 + (candidate.y - y) ** 2;
      if (distance < least) [best, least] = [candidate, distance];
    }
    if (best && least < 60 ** 2) point(svg, best);
    else unpoint(svg);
  });
  svg.addEventListener("pointerleave", () => unpoint(svg));
  svg.addEventListener("blur", () => unpoint(svg));
  let line = 0;
  let index = -1;
  svg.addEventListener("keydown", (event) => {
    const series = prepare(svg);
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") return unpoint(svg);
    if (!move) return;
    event.preventDefault();
    line = (line + move[0] + series.length) % series.length;
    index = Math.min(Math.max(index + move[1], 0), series[line].length - 1);
    point(svg, series[line][index]);
  });
}

// commands
for (const button of all("[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = one("code", button.parentElement);
    let copied = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code); // pages from disk have no clipboard in some browsers
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
addEventListener("beforeprint", () => all("details").forEach((d) => (d.open = true)));
