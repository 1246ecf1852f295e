
(() => {
  "use strict";
  const runs = JSON.parse(document.getElementById("data").textContent).runs;
  const box = document.getElementById("charts");
  const root = document.documentElement;
  const view = { axis: "tokens", smooth: 2, band: true, saves: false, off: new Set(), noCorpus: new Set(), zoom: null };
  const FEW = 20;  // fewer points than this are drawn as points
  const panels = [
    { key: "loss", title: "Training loss", unit: "nats per token", size: "wide", smooth: true, clip: true, marks: true },
    { key: "lr", title: "Learning rate", unit: "", size: "half", zero: true },
    { key: "grad_norm", title: "Gradient norm", unit: "", size: "half", smooth: true, clip: true, zero: true },
    { key: "tokens_per_second", title: "Throughput", unit: "tokens per second", size: "half", smooth: true, zero: true, marks: true },
    { key: "data_share", title: "Waiting for data", unit: "share of a step", size: "half", smooth: true, zero: true },
  ];

  const short = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    for (const [suffix, unit] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
      if (size >= unit) return +(value / unit).toPrecision(4) + suffix;
    return size && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(5));
  };

  function smoothed(values, strength) {
    const reach = strength ? Math.floor(values.length * strength * strength / 1600) : 0;
    if (!reach) return values;
    const sums = [0];
    values.forEach((value, index) => sums.push(sums[index] + (value ?? 0)));
    return values.map((value, index) => {
      const near = Math.min(reach, index, values.length - 1 - index);
      return value == null ? null : (sums[index + near + 1] - sums[index - near]) / (2 * near + 1);
    });
  }

  /* Columns of one panel: a table per run with [x, y] or [x, low, high, y], joined over a common x. */
  function table(panel) {
    const tables = [], series = [{}], bands = [];
    runs.forEach((run, index) => {
      if (view.off.has(index)) return;
      const columns = panel.corpus ? run.validation[panel.corpus] : run.train;
      const x = columns && columns[view.axis], y = columns && columns[panel.key];
      if (!x || !y || x.some((value) => value == null)) return;
      const stroke = run.colour, dash = panel.key === "lr" && series.length > 1 ? [6, 4] : undefined;
      const few = x.length < FEW;
      const rows = [x];
      if (panel.key === "loss" && view.band && columns.loss_low) {
        rows.push(columns.loss_low, columns.loss_high);
        series.push({ stroke: "transparent", points: { show: false }, spanGaps: true, label: "" },
          { stroke: "transparent", points: { show: false }, spanGaps: true, label: "" });
        bands.push({ series: [series.length - 1, series.length - 2], fill: stroke + "30" });
      }
      rows.push(panel.smooth && !few ? smoothed(y, view.smooth) : y);
      series.push({ label: run.name, stroke, width: 1.6, dash, spanGaps: true,
        points: { show: few || Boolean(panel.corpus && x.length < 60), size: few ? 6 : 4, fill: stroke } });
      tables.push(rows);
    });
    return { series, bands, data: tables.length ? uPlot.join(tables) : null };
  }

  /* All values in sight; the steep beginning of a model from scratch, which would flatten the rest, is left out. */
  function range(panel, data) {
    return (plot, low, high) => {
      if (low == null) return [0, 1];
      if (panel.clip && !view.zoom) {
        const values = data.slice(1).flat().filter((value) => value != null).sort((a, b) => a - b);
        if (values.length >= 3 * FEW) {
          const most = values[Math.floor(0.95 * (values.length - 1))];
          if (high - low > 2 * (most - low) && most > low) high = most + 0.25 * (most - low);
        }
      }
      if (panel.zero) low = Math.min(0, low);
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      return [panel.zero && low === 0 ? 0 : low - room, high + room];
    };
  }

  function seen(panel) {
    return runs.flatMap((run, index) => view.off.has(index) ? [] : run.marks
      .filter((mark) => (mark.kind === "save" ? view.saves : panel.marks) && mark[view.axis] != null)
      .map((mark) => ({ ...mark, colour: run.colour, run: run.name, x: mark[view.axis] })));
  }

  function drawMarks(plot, marks) {
    const { ctx, bbox } = plot, ratio = uPlot.pxRatio;
    ctx.save();
    marks.forEach((mark) => {
      const x = Math.round(plot.valToPos(mark.x, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) return;
      ctx.strokeStyle = ctx.fillStyle = mark.colour;
      ctx.lineWidth = ratio;
      ctx.setLineDash(mark.kind === "layout" ? [] : mark.kind === "save" ? [1 * ratio, 5 * ratio] : [5 * ratio, 3 * ratio]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      if (mark.kind === "save") return;
      ctx.font = `${11 * ratio}px system-ui, sans-serif`;
      ctx.textBaseline = "top";
      const name = { layout: "⇄ re-layout", restart: "↻ restart", spike: "▲ spike" }[mark.kind];
      const isLate = x > bbox.left + 0.8 * bbox.width;
      ctx.textAlign = isLate ? "right" : "left";
      ctx.fillText(name, x + (isLate ? -4 : 4) * ratio, bbox.top + 2 * ratio);
    });
    ctx.restore();
  }

  function tooltip(panel, element, marks) {
    const tip = document.createElement("div");
    tip.className = "tip";
    element.append(tip);
    return (plot) => {
      const { left, top } = plot.cursor;
      if (left == null || left < 0) { tip.style.display = "none"; return; }
      const at = plot.posToVal(left, "x"), lines = [];
      plot.series.forEach((series, index) => {
        if (!index || !series.label) return;
        const x = plot.data[0], y = plot.data[index];
        let best = -1;
        const middle = plot.cursor.idx ?? 0;
        for (let away = 0; away < x.length && best < 0; away++) {
          const near = [middle - away, middle + away].filter((place) => y[place] != null);
          if (near.length) best = near[0];
        }
        if (best < 0 || Math.abs(plot.valToPos(x[best], "x") - left) > 40) return;
        lines.push([series.stroke(), `${series.label} ${short(y[best])}`]);
      });
      marks.filter((mark) => Math.abs(plot.valToPos(mark.x, "x") - left) < 5)
        .forEach((mark) => lines.push([mark.colour, `${mark.run}: ${mark.text}`]));
      tip.replaceChildren(document.createTextNode(`${short(at)} ${view.axis}`));
      lines.forEach(([colour, text]) => {
        const line = document.createElement("div"), spot = document.createElement("i");
        spot.style.background = colour;
        line.append(spot, text);
        tip.append(line);
      });
      tip.style.display = lines.length ? "block" : "none";
      const isRight = left > plot.over.clientWidth / 2;
      tip.style.left = isRight ? "" : `${plot.over.offsetLeft + left + 14}px`;
      tip.style.right = isRight ? `${element.clientWidth - plot.over.offsetLeft - left + 14}px` : "";
      tip.style.top = `${plot.over.offsetTop + Math.max(top - 10, 0) + 24}px`;
    };
  }

  let plots = [], isSettling = false;
  function draw() {
    plots.forEach((plot) => plot.destroy());
    plots = [];
    box.replaceChildren();
    const style = getComputedStyle(root);
    const faint = style.getPropertyValue("--faint").trim(), line = style.getPropertyValue("--line").trim();
    const corpora = [...new Set(runs.flatMap((run) => Object.keys(run.validation)))];
    const shown = corpora.filter((corpus) => !view.noCorpus.has(corpus)).map((corpus) => {
      const isBits = runs.every((run) => !run.validation[corpus] || run.validation[corpus].bits_per_byte);
      return { key: isBits ? "bits_per_byte" : "loss", corpus, title: `Held-out ${corpus}`,
        unit: isBits ? "bits per byte" : "nats per token", size: "", clip: true };
    });
    [panels[0], ...shown, ...panels.slice(1)].forEach((panel) => {
      const found = table(panel);
      if (!found.data) return;
      const element = document.createElement("div");
      element.className = `chart ${panel.size}`;
      const title = document.createElement("h3"), unit = document.createElement("span");
      unit.textContent = ` ${panel.unit}`;
      title.append(panel.title, unit);
      element.append(title);
      box.append(element);
      const marks = seen(panel);
      const axis = { stroke: faint, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui, sans-serif" };
      const plot = new uPlot({
        width: Math.max(element.clientWidth, 200), height: panel.size === "wide" ? 300 : 200,
        legend: { show: false }, series: found.series, bands: found.bands,
        cursor: { sync: { key: "runs", setSeries: false }, drag: { x: true, y: false }, y: false },
        scales: { x: { time: false }, y: { range: range(panel, found.data) } },
        axes: [{ ...axis, values: (_, values) => values.map(short), space: 70 }, { ...axis, size: 62, values: (_, values) => values.map(short) }],
        hooks: { draw: [(self) => drawMarks(self, marks)], setCursor: [tooltip(panel, element, marks)], setScale: [follow] },
      }, found.data, element);
      plots.push(plot);
    });
    if (view.zoom) apply(view.zoom);
    root.dataset.charts = plots.length;
  }

  /* A zoom of one chart is a zoom of all. */
  function follow(plot, key) {
    if (key !== "x" || isSettling || !plots.includes(plot)) return;
    const { min, max } = plot.scales.x, x = plot.data[0];
    const isWhole = min <= x[0] && max >= x[x.length - 1];
    view.zoom = isWhole ? null : { min, max };
    apply(view.zoom, plot);
  }
  function apply(zoom, but) {
    isSettling = true;
    plots.filter((plot) => plot !== but).forEach((plot) => {
      const x = plot.data[0];
      plot.setScale("x", zoom ?? { min: x[0], max: x[x.length - 1] });
    });
    isSettling = false;
  }

  const wire = (selector, event, change) => document.querySelectorAll(selector).forEach((element) =>
    element.addEventListener(event, () => { change(element); draw(); }));
  const toggle = (set, key, isOn) => isOn ? set.delete(key) : set.add(key);
  wire("#axis", "change", (element) => { view.axis = element.value; view.zoom = null; });
  wire("#smooth", "input", (element) => { view.smooth = +element.value; });
  wire("#band", "change", (element) => { view.band = element.checked; });
  wire("#saves", "change", (element) => { view.saves = element.checked; });
  wire("[data-run]", "change", (element) => toggle(view.off, +element.dataset.run, element.checked));
  wire("[data-corpus]", "change", (element) => toggle(view.noCorpus, element.dataset.corpus, element.checked));
  wire("#theme", "click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });
  document.querySelectorAll(".settings").forEach((settings) => {
    const part = settings.closest("details"), filter = part.querySelector(".filter"), stated = part.querySelector(".stated");
    const look = () => {
      settings.classList.toggle("stated", stated.checked);
      settings.querySelectorAll("tr").forEach((row) => row.classList.toggle("unmatched", !row.textContent.includes(filter.value)));
    };
    filter.addEventListener("input", look);
    stated.addEventListener("change", look);
    look();
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => { root.dataset.theme = dark.matches ? "dark" : "light"; draw(); });
  let width = box.clientWidth;
  addEventListener("resize", () => { if (box.clientWidth !== width) { width = box.clientWidth; draw(); } });
  draw();
})();
