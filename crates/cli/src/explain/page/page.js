"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { n, layers, heads_per_layer } = data;
  const heads = layers.length * heads_per_layer;
  const tokens = [...document.getElementById("text").children];
  const places = new Map(tokens.map((token, p) => [token, p]));
  const canvas = document.getElementById("map");
  const out = document.getElementById("at");
  const slider = document.getElementById("scroll");
  const [zoomOut, zoomIn, zoomAll] = ["out", "in", "all"].map((id) => document.getElementById(id));
  if (n === 0 || heads === 0) return;

  // sums[head][p]: how many of the first p tokens the head has; by[p]: how many heads have the token
  const stride = (n + 7) >> 3;
  const summed = (packed) => {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const by = new Uint32Array(n);
    const sums = Array.from({ length: heads }, (_, head) => {
      const sum = new Uint32Array(n + 1);
      for (let p = 0; p < n; p++) {
        const bit = (bytes[head * stride + (p >> 3)] >> (p & 7)) & 1;
        by[p] += bit;
        sum[p + 1] = sum[p] + bit;
      }
      return sum;
    });
    return { by, sums, has: (head, p) => sums[head][p + 1] > sums[head][p] };
  };
  const { by, sums, has: keeps } = summed(data.kept);
  const back = data.back && summed(data.back);

  // Attention is shown on a scale of ratios: from a fifth of an even share to what one token in a thousand exceeds.
  const lane = (title, colour, values) => {
    const low = 0.2 / n, high = Math.max(10 * low, [...values].sort((a, b) => a - b)[Math.floor(0.999 * (n - 1))]);
    return { title, colour, part: (p) => Math.max(0, Math.min(1, Math.log(values[p] / low) / Math.log(high / low))) };
  };
  const lanes = [{ title: "heads that kept it", colour: "--kept", part: (p) => by[p] / heads, isMean: true }];
  if (back) lanes.push({ title: "heads that have it again", colour: "--back", part: (p) => back.by[p] / heads, isMean: true });
  if (data.real.length) lanes.push(lane("real queries look at (log)", "--second", data.real));
  if (data.synthetic.length) lanes.push(lane("synthetic queries look at (log)", "--third", data.synthetic));

  const LANE = 44, TITLE = 15, LEFT = 34, AXIS = 20, LEAST = 12; // pixels; the last one: tokens on the screen
  const row = Math.max(1, Math.min(6, Math.round(440 / heads)));
  const top = lanes.length * LANE + 6;
  let from = 0, to = n; // the tokens that are shown
  let at = -1, atHead = -1;
  let width = 0;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (name) => colour(name).match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16)); // of #rrggbb
  const x = (p) => LEFT + ((p - from) / (to - from)) * (width - LEFT);
  const token = (px) => Math.floor(from + ((px - LEFT) / (width - LEFT)) * (to - from));

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    width = canvas.clientWidth;
    const height = top + heads * row + AXIS;
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const columns = Math.max(1, Math.round((width - LEFT) * ratio));
    // the tokens of each column
    const starts = Array.from({ length: columns + 1 }, (_, c) => Math.min(n - 1, Math.floor(from + (c / columns) * (to - from))));
    const end = (c) => Math.max(starts[c] + 1, starts[c + 1]);

    lanes.forEach(({ title, colour: name, part, isMean }, i) => {
      const base = (i + 1) * LANE;
      pen.fillStyle = colour(name);
      for (let c = 0; c < columns; c++) {
        let most = 0;
        if (isMean) {
          for (let p = starts[c]; p < end(c); p++) most += part(p) / (end(c) - starts[c]);
        } else {
          for (let p = starts[c]; p < end(c); p++) most = Math.max(most, part(p));
        }
        const h = most * (LANE - TITLE - 2);
        pen.fillRect(LEFT + c / ratio, base - h, 1 / ratio, h);
      }
      pen.fillStyle = colour("--dim");
      pen.font = "12px system-ui, sans-serif";
      pen.fillText(title, LEFT, base - LANE + TITLE - 2);
    });

    const [ground, full, again] = [rgb("--shade"), rgb("--kept"), rgb("--back")];
    const image = new ImageData(columns, heads);
    for (let head = 0; head < heads; head++) {
      const sum = sums[head];
      for (let c = 0; c < columns; c++) {
        const part = (sum) => (sum[end(c)] - sum[starts[c]]) / (end(c) - starts[c]);
        const share = part(sum), returned = back ? part(back.sums[head]) : 0;
        const o = 4 * (head * columns + c);
        for (let k = 0; k < 3; k++) image.data[o + k] = ground[k] + share * (full[k] - ground[k]) + returned * (again[k] - full[k]);
        image.data[o + 3] = 255;
      }
    }
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = heads;
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, LEFT, top, width - LEFT, heads * row);

    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    const band = row * heads_per_layer, every = Math.ceil(14 / band);
    layers.forEach((layer, i) => {
      if (band >= 6 && i > 0) {
        pen.fillStyle = colour("--ground");
        pen.fillRect(LEFT, top + i * band - 0.5, width - LEFT, 1);
      }
      pen.fillStyle = colour("--dim");
      if (i % every === 0) pen.fillText(layer, LEFT - 5, top + i * band + Math.max(band / 2, 5) + 4);
    });
    pen.textAlign = "center";
    const step = [1, 2, 5].flatMap((m) => [1, 10, 100, 1e3, 1e4, 1e5].map((t) => m * t)).sort((a, b) => a - b)
      .find((s) => ((width - LEFT) * s) / (to - from) > 70) || n;
    for (let p = Math.ceil(from / step) * step; p < to; p += step) {
      pen.fillRect(x(p), top + heads * row, 1, 4);
      if (x(p) < width - 16) pen.fillText(p.toLocaleString("en"), Math.max(x(p), LEFT + 4), top + heads * row + 16);
    }
    if (at >= from && at < to) {
      pen.strokeStyle = colour("--mark");
      pen.strokeRect(x(at), 0.5, Math.max(1, x(at + 1) - x(at)), top + heads * row - 0.5);
    }
    const share = (to - from) / n;
    [zoomOut.disabled, zoomAll.disabled, zoomIn.disabled] = [share >= 1, share >= 1, to - from <= Math.min(n, LEAST)];
    slider.hidden = share >= 1;
    slider.value = share < 1 ? (1000 * from) / (n - (to - from)) : 0;
  }

  let asked = false;
  const redraw = () => {
    if (!asked) requestAnimationFrame(() => { asked = false; draw(); });
    asked = true;
  };

  function show(first, size) {
    size = Math.max(Math.min(n, LEAST), Math.min(n, size));
    from = Math.max(0, Math.min(n - size, first));
    to = from + size;
    redraw();
  }
  const zoom = (factor, px = LEFT + (width - LEFT) / 2) => {
    const part = Math.max(0, (px - LEFT) / (width - LEFT));
    const size = Math.max(Math.min(n, LEAST), Math.min(n, (to - from) / factor));
    show(from + part * (to - from - size), size);
  };

  const count = (k) => k.toLocaleString("en");
  const percent = (values, p) => (100 * values[p]).toFixed(3) + " %";
  function tell(p, head) {
    const name = document.createElement("bdi");
    name.textContent = "“" + tokens[p].textContent.replace("\n", "") + "”";
    let line = ` held by ${count(by[p])} of ${count(heads)} heads`;
    if (back) line += `, by ${count(back.by[p])} of them again`;
    if (head >= 0) {
      const [layer, h] = [layers[Math.floor(head / heads_per_layer)], head % heads_per_layer];
      line = ` layer ${layer}, head ${h}: ${!keeps(head, p) ? "dropped" : back?.has(head, p) ? "came back" : "kept"};` + line;
    }
    if (data.real.length) line += `; attention of real queries ${percent(data.real, p)}`;
    if (data.synthetic.length) line += `, of synthetic ones ${percent(data.synthetic, p)}`;
    out.replaceChildren(`token ${count(p)} `, name, ":" + line);
  }
  function point(p, head) {
    if (p === at && head === atHead) return;
    if (at >= 0) tokens[at].classList.remove("at");
    [at, atHead] = [p, head];
    if (p >= 0) {
      tokens[p].classList.add("at");
      tell(p, head);
    }
    redraw();
  }
  function pointed(event) {
    const box = canvas.getBoundingClientRect();
    const p = Math.max(0, Math.min(n - 1, token(event.clientX - box.left)));
    const head = Math.floor((event.clientY - box.top - top) / row);
    return [p, head >= 0 && head < heads ? head : -1];
  }
  function scrollTo(p) {
    const box = document.getElementById("text");
    box.scrollTop += tokens[p].getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  }

  // one pointer moves, two zoom
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, event.clientX);
    moved = pointers.size > 1 ? Infinity : 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (before === undefined) return point(...pointed(event));
    const box = canvas.getBoundingClientRect();
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, px]) => px);
      const [was, is] = [Math.abs(before - other), Math.abs(event.clientX - other)];
      if (was > 10 && is > 10) zoom(is / was, (event.clientX + other) / 2 - box.left);
    } else {
      moved += Math.abs(event.clientX - before);
      show(from - ((event.clientX - before) / (width - LEFT)) * (to - from), to - from);
    }
    pointers.set(event.pointerId, event.clientX);
  });
  const released = (event) => pointers.delete(event.pointerId);
  canvas.addEventListener("pointerup", (event) => {
    released(event);
    if (moved < 5) {
      point(...pointed(event));
      scrollTo(at);
    }
  });
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("dblclick", (event) => zoom(3, event.clientX - canvas.getBoundingClientRect().left));
  canvas.addEventListener("wheel", (event) => {
    const box = canvas.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 200), event.clientX - box.left);
    } else if (event.deltaX || event.shiftKey) {
      event.preventDefault();
      show(from + ((event.deltaX || event.deltaY) / (width - LEFT)) * (to - from), to - from);
    }
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const size = to - from;
    const act = {
      "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(0.5), 0: () => show(0, n), Home: () => show(0, size),
      End: () => show(n, size), ArrowLeft: () => show(from - size / 8, size), ArrowRight: () => show(from + size / 8, size),
    }[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  zoomIn.addEventListener("click", () => zoom(2));
  zoomOut.addEventListener("click", () => zoom(0.5));
  zoomAll.addEventListener("click", () => show(0, n));
  slider.addEventListener("input", () => show((slider.value / 1000) * (n - (to - from)), to - from));

  const box = document.getElementById("text");
  const inText = (event) => {
    const p = places.get(event.target);
    if (p === undefined) return;
    if (event.type === "click" && (p < from || p >= to)) show(p - (to - from) / 2, to - from);
    point(p, -1);
  };
  box.addEventListener("pointerover", inText);
  box.addEventListener("click", inText);

  document.querySelector(".buttons").hidden = false;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(() => { if (canvas.clientWidth !== width) redraw(); }).observe(canvas);
  draw();
})();
