"use strict";
(() => {
  const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const digits = (value, count) => String(Number(value.toPrecision(count)));
  const short = value => {
    const unit = UNITS.find(([size]) => Math.abs(value) >= size);
    return unit ? digits(value / unit[0], 3) + unit[1] : digits(value, 3);
  };
  const FORMATS = {
    plain: value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") : digits(value, 4),
    short,
    bytes: value => short(value).replace(/([TGMk]?)$/, " $1B"),
    percent: value => digits(100 * value, 3) + " %",
  };
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const steps = value => value.toLocaleString("en-US");
  const LEFT = 66, RIGHT = 24;  // as the margins of a map of loads
  const INCREMENTS = Array.from({length: 12}, (_, power) => [1, 2, 5].map(digit => digit * 10 ** power)).flat();

  // What happened at steps: a dashed line over the whole height, or a short one at the bottom for a checkpoint.
  function drawMarks(plot, marks) {
    const {ctx, bbox} = plot, ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const [step, kind] of marks) {
      const x = Math.round(plot.valToPos(step, "x", true)), isCheckpoint = kind === "checkpoint";
      ctx.strokeStyle = colour(isCheckpoint ? "--soft" : "--event");
      ctx.lineWidth = (isCheckpoint ? 2.5 : 1.2) * ratio;
      ctx.setLineDash(isCheckpoint ? [] : [4 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, isCheckpoint ? bbox.top + bbox.height - 7 * ratio : bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // The map of loads above a plot shows the steps that the plot shows.
  function followZoom(heat, [first, last], plot) {
    const {min, max} = plot.scales.x, image = heat.querySelector("img"), shown = max - min;
    image.style.width = 100 * (last - first) / shown + "%";
    image.style.left = -100 * (min - first) / shown + "%";
  }

  function series(line, format) {
    const stroke = colour("--c" + line.colour);
    return {
      label: line.name, class: line.edge ? "edge" : undefined, stroke: line.edge ? "transparent" : stroke,
      width: 1.6, spanGaps: true, points: {show: line.dots || undefined, size: 6, fill: stroke},
      value: (_, value, __, place) => place == null ? "" : value == null ? "none" : format(value),
    };
  }

  function options(chart, holder) {
    const format = FORMATS[chart.unit], last = chart.steps.length - 1;
    const axis = {stroke: colour("--soft"), grid: {stroke: colour("--line"), width: 1}, ticks: {show: false},
      font: "12px system-ui, sans-serif"};
    const bounds = (plot, min, max) => {
      const isWhole = min == null || min === chart.steps[0] && max === chart.steps[last];
      return isWhole ? chart.extent : [min, max];
    };
    const step = (_, value, __, place) => {
      if (place == null) return "";
      const [from, to] = chart.spans[place];
      const kinds = new Set(chart.marks.filter(([at]) => from <= at && at <= to).map(([, kind]) => kind));
      return [from < to ? steps(from) + " to " + steps(to) + ", mean" : steps(from), ...kinds].join(", ");
    };
    const heat = holder.parentElement.querySelector(".heat:not(.fixed)");
    return {
      width: holder.clientWidth, height: chart.height, padding: [10, RIGHT, 0, 0],
      cursor: {y: false, sync: {key: "run", scales: ["x", null]}, drag: {x: true, y: false}},
      scales: {
        x: {time: false, range: bounds},
        y: {range: (_, min, max) => uPlot.rangeNum(chart.fromZero ? Math.min(0, min) : min,
          chart.fromZero ? Math.max(0, max) : max, 0.06, true)},
      },
      axes: [
        {...axis, size: 28, grid: {show: false}, incrs: INCREMENTS, values: (_, ticks) => ticks.map(steps)},
        {...axis, size: LEFT, values: (_, ticks) => ticks.map(format)},
      ],
      series: [{label: "step", value: step}, ...chart.series.map(line => series(line, format))],
      bands: chart.bands.map(([top, bottom]) => ({
        series: [top + 1, bottom + 1], fill: colour("--c" + chart.series[top].colour) + "2e",
      })),
      hooks: {
        draw: [plot => drawMarks(plot, chart.marks)],
        setScale: heat ? [(plot, key) => { if (key === "x") followZoom(heat, chart.extent, plot); }] : [],
      },
    };
  }

  const plots = [];
  function draw() {
    plots.splice(0).forEach(({plot, observer}) => { observer.disconnect(); plot.destroy(); });
    for (const holder of document.querySelectorAll(".plot")) {
      const chart = JSON.parse(holder.querySelector("script").textContent);
      const data = [chart.steps, ...chart.series.map(line => line.values)];
      const plot = new uPlot(options(chart, holder), data, holder);
      plot.root.setAttribute("role", "img");
      plot.root.setAttribute("aria-label", chart.title);
      const observer = new ResizeObserver(() => plot.setSize({width: holder.clientWidth, height: chart.height}));
      observer.observe(holder);
      plots.push({plot, observer});
    }
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
