"use strict";
(() => {
  const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const digits = (value, count) => String(Number(value.toPrecision(count)));
  const short = value => {
    const rounded = Number(value.toPrecision(3));
    const unit = UNITS.find(([size]) => Math.abs(rounded) >= size);
    return unit ? digits(rounded / unit[0], 3) + unit[1] : digits(rounded, 3);
  };
  const FORMATS = {
    plain: value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") :
      value && Math.abs(value) < 1e-3 ? value.toExponential(3).replace(/\.?0*e/, "e") : digits(value, 4),
    short,
    bytes: value => short(value).replace(/([TGMk]?)$/, " $1B"),
    percent: value => digits(100 * value, 3) + " %",
  };
  const element = id => document.getElementById(id);
  const all = selector => [...document.querySelectorAll(selector)];
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const whole = value => value.toLocaleString("en-US");
  const LEFT = 66, RIGHT = 24;  // as the margins of a map of loads
  const LABEL = 17, FONT = "12px system-ui, sans-serif", DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
  const INCREMENTS = Array.from({length: 12}, (_, power) => [1, 2, 5].map(digit => digit * 10 ** power)).flat();
  const RUNS = JSON.parse(element("runs").textContent);
  const X = {
    steps: {title: "step", text: value => whole(Math.round(value)), incrs: INCREMENTS},
    tokens: {title: "tokens", text: short},
    hours: {title: "hours of training steps", text: value => digits(value, 3)},
  };

  // `range` is of x, null if the whole run is shown.
  const state = {x: "steps", log: false, smooth: Number(element("smooth").value), range: null};
  const plots = [];

  // Places of a run's points on the chosen x axis, and of a step between them.
  const places = run => RUNS[run][state.x];
  function interpolate(value, from, to) {
    if (from.length < 2) return to[0];
    let high = from.findIndex(each => each >= value);
    high = high < 0 ? from.length - 1 : Math.max(high, 1);
    const share = (value - from[high - 1]) / (from[high] - from[high - 1] || 1);
    return to[high - 1] + share * (to[high] - to[high - 1]);
  }
  const ofStep = (step, run) => interpolate(step, RUNS[run].steps, places(run));
  function extentOf(run) {
    if (!RUNS[run].steps.length) return [0, 1];
    const [low, high] = RUNS[run].steps.length > 1 ? RUNS[run].extent.map(step => ofStep(step, run)) :
      state.x === "steps" ? RUNS[run].extent : [0.5 * places(run)[0], 1.5 * places(run)[0]];
    return [state.x === "steps" ? low : Math.max(low, 0), high];
  }
  function wholeRange() {
    const extents = RUNS.map((_, run) => extentOf(run)).filter((_, run) => RUNS[run].steps.length);
    return extents.length ? [Math.min(...extents.map(each => each[0])), Math.max(...extents.map(each => each[1]))] : [0, 1];
  }
  const shownRange = () => state.range || wholeRange();

  // Exponential moving average; `weight` is that of what came before.
  function smoothed(values, weight) {
    let sum = 0, total = 0;
    return values.map(value => {
      if (value == null) return value;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + 1 - weight;
      return sum / total;
    });
  }

  // An event is a dashed line over the whole height, a checkpoint a short one at the bottom.
  function drawMarks(plot) {
    const {ctx, bbox} = plot, ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const [number, run] of RUNS.entries())
      for (const [step, kind] of run.marks) {
        const x = Math.round(plot.valToPos(ofStep(step, number), "x", true)), isCheckpoint = kind === "checkpoint";
        ctx.strokeStyle = color(RUNS.length > 1 ? "--c" + (number + 1) : isCheckpoint ? "--soft" : "--event");
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
  function followZoom(heat) {
    const [first, last] = RUNS[0].extent, image = heat.querySelector("img");
    const [low, high] = state.x === "steps" || RUNS[0].steps.length < 2 ? shownRange() :
      shownRange().map(value => interpolate(value, places(0), RUNS[0].steps));
    image.style.width = 100 * (last - first) / (high - low) + "%";
    image.style.left = -100 * (low - first) / (high - low) + "%";
  }

  // A chart's series, one for each run and number, and bands between two of them: from the least to the greatest value
  // of several steps, or of two numbers. Several runs differ by color, and their lines by dashes.
  function build(chart) {
    chart.canBeLog = chart.unit !== "percent" && !chart.is_range;
    chart.series = [];
    chart.bands = [];
    for (const [run, {name, numbers}] of RUNS.entries()) {
      const made = chart.lines.map((line, place) => {
        const values = numbers[line.key];
        if (!values) return null;
        const style = RUNS.length === 1 ? {name: line.name, color: line.color, dash: 0} :
          {name: chart.lines.length > 1 ? name + ": " + line.name : name, color: run + 1, dash: place};
        const add = (shown, edge) => chart.series.push({...style, dots: line.dots, run, values: shown, edge}) - 1;
        const least = values.least || values.mean, most = values.most || values.mean;
        const at = add(!chart.is_range ? values.mean : place ? most : least, false);
        if (values.most && !chart.is_range) chart.bands.push([add(most, true), add(least, true)]);
        return at;
      });
      if (chart.is_range && made.every(at => at != null)) chart.bands.push([made[1], made[0]]);
    }
    return chart;
  }

  // Series of a chart with the values to draw; while lines are smoothed, their recorded values are faint behind them,
  // and the legend shows those.
  function seriesOf(chart) {
    const isSmooth = line => state.smooth > 0 && !line.dots && !line.edge && line.values.length > 2;
    const lines = chart.series.map(line => ({...line, recorded: line.values,
      values: isSmooth(line) ? smoothed(line.values, state.smooth) : line.values}));
    const raw = chart.series.filter(isSmooth).map(line => ({...line, faint: true}));
    return [...lines, ...raw].map(line => state.log && chart.canBeLog ?
      {...line, values: line.values.map(value => value > 0 ? value : null)} : line);
  }

  // Points of several runs have different places: the union of these, with gaps in each line.
  function dataOf(lines) {
    const shown = [...new Set(lines.map(line => line.run))];
    if (shown.length === 1) return [places(shown[0]), ...lines.map(line => line.values)];
    const joined = uPlot.join(lines.map(line => [places(line.run), line.values]));
    return joined;
  }

  // What a line shows at a place: its own point, or the nearest one of its run.
  function reading(line, x) {
    const at = places(line.run);
    let best = null;
    for (const [place, value] of line.recorded.entries())
      if (value != null && (best == null || Math.abs(at[place] - x) < Math.abs(at[best] - x))) best = place;
    return best == null ? null : line.recorded[best];
  }

  function series(line, format) {
    const stroke = color("--c" + line.color), hidden = line.edge || line.faint;
    return {
      label: line.name, class: hidden ? "edge" : undefined, width: line.faint ? 1 : 1.7, spanGaps: true,
      stroke: line.edge ? "transparent" : line.faint ? stroke + "55" : stroke, dash: DASHES[line.dash % DASHES.length],
      points: {show: line.faint || line.edge ? false : line.dots || undefined, size: 6, fill: stroke},
      value: (plot, value, number, place) => {
        if (hidden) return "";
        const last = line.recorded.findLast(each => each != null);
        const found = place == null ? last : RUNS.length > 1 ? reading(line, plot.data[0][place]) : line.recorded[place];
        return found == null ? "none" : format(found);
      },
    };
  }

  // The words for a place on the x axis: its steps, and what happened there.
  function placeText(plot, place) {
    if (place == null) return "last";
    const x = plot.data[0][place];
    if (RUNS.length > 1) return X[state.x].text(x);
    const [from, to] = RUNS[0].spans[place];
    const kinds = new Set(RUNS[0].marks.filter(([at]) => from <= at && at <= to).map(([, kind]) => kind));
    const name = state.x === "steps" ? "" : X[state.x].text(x) + ", step ";
    return [name + (from < to ? whole(from) + " to " + whole(to) + ", mean" : whole(from)), ...kinds].join(", ");
  }

  function options(chart, holder, lines) {
    const format = FORMATS[chart.unit], isLog = state.log && chart.canBeLog, isNarrow = holder.clientWidth < 330;
    const axis = {stroke: color("--soft"), grid: {stroke: color("--line"), width: 1}, ticks: {show: false}, font: FONT,
      labelFont: FONT, labelSize: LABEL, labelGap: 0};
    const linear = (_, min, max) => !min && !max ? [0, chart.unit === "percent" ? 0.1 : 1] : uPlot.rangeNum(chart.from_zero ? Math.min(0, min) : min,
      chart.from_zero ? Math.max(0, max) : max, 0.06, true);
    const logarithmic = (_, min, max) => min == null ? [0.1, 1] : max / min < 20 ? [min / 1.1, max * 1.1] :
      uPlot.rangeLog(min, max, 10, false);
    const heat = holder.parentElement.querySelector(".heat:not(.fixed)");
    const narrowFormat = value => chart.unit === "plain" && Math.abs(value) >= 10000 ? short(value) : format(value);
    // Few powers of ten are visible on a narrow range: round numbers in between get a name too.
    const logTicks = {
      splits: (plot, _, min, max) => {
        const ticks = [];
        for (let power = Math.floor(Math.log10(min)); power <= Math.log10(max); power++)
          for (const digit of max / min < 20 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : max / min < 1e4 ? [1, 2, 5] : [1])
            if (digit * 10 ** power >= min && digit * 10 ** power <= max) ticks.push(digit * 10 ** power);
        const most = Math.max(Math.floor(plot.height / 32), 2), every = Math.ceil(ticks.length / most);
        return ticks.filter((_, place) => place % every === 0);
      },
      filter: (_, ticks) => ticks,
    };
    return {
      width: holder.clientWidth, height: chart.height, padding: [10, RIGHT, 0, 0],
      cursor: {y: false, sync: {key: "run", scales: ["x", null]}, drag: {x: true, y: false}},
      scales: {
        x: {time: false, range: (_, min, max) => state.range || wholeRange()},
        y: {distr: isLog ? 3 : 1, range: isLog ? logarithmic : linear},
      },
      axes: [
        {...axis, size: 24, grid: {show: false}, label: X[state.x].title, space: isNarrow ? 64 : 56,
          ...(X[state.x].incrs ? {incrs: X[state.x].incrs} : {}), values: (_, ticks) => ticks.map(X[state.x].text)},
        {...axis, size: LEFT - LABEL, label: chart.y, values: (_, ticks) => ticks.map(narrowFormat),
          ...(isLog ? logTicks : {})},
      ],
      series: [{label: X[state.x].title, value: (plot, _, __, place) => placeText(plot, place)},
        ...lines.map(line => series(line, format))],
      bands: chart.bands.map(([top, bottom]) => ({
        series: [top + 1, bottom + 1], fill: color("--c" + chart.series[top].color) + "2e",
      })),
      hooks: {
        draw: chart.has_marks ? [drawMarks] : [],
        setScale: heat ? [(_, key) => { if (key === "x") followZoom(heat); }] : [],
        setSelect: [plot => {
          const {left, width} = plot.select;
          if (width > 0) zoom(plot.posToVal(left, "x"), plot.posToVal(left + width, "x"));
        }],
      },
    };
  }

  // Zoom of all charts. Without numbers the whole run is shown.
  function zoom(low, high) {
    const [first, last] = wholeRange();
    if (low != null) {
      const width = Math.min(Math.max(high - low, (last - first) / 1000), last - first);
      low = Math.min(Math.max(low, first), last - width);
      high = low + width;
    }
    state.range = low == null || (low <= first && high >= last) ? null : [low, high];
    for (const plot of plots) plot.setScale("x", {min: shownRange()[0], max: shownRange()[1]});
    element("whole").disabled = !state.range;
  }
  function scaleZoom(factor, centre) {
    const [low, high] = shownRange(), middle = centre ?? (low + high) / 2;
    zoom(middle - (middle - low) * factor, middle + (high - middle) * factor);
  }
  function shiftZoom(share) {
    const [low, high] = shownRange(), by = share * (high - low);
    zoom(low + by, high + by);
  }

  // Keys of a chart that has the focus: see the text above the charts.
  function onKey(event, plot, chart) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target !== plot.root) return;
    const points = plot.data[0], last = points.length - 1, at = plot.cursor.idx;
    const [low, high] = shownRange();
    const visible = points.map((_, place) => place).filter(place => low <= points[place] && points[place] <= high);
    const first = visible[0] ?? 0, end = visible[visible.length - 1] ?? last;
    const move = place => {
      const shown = Math.min(Math.max(place, first), end);
      for (const each of plots) each.setCursor({left: each.valToPos(points[shown], "x"), top: 0}, true, false);
      element("reading").textContent = chart.title + ": " + [...plot.root.querySelectorAll(".u-series:not(.edge)")]
        .map(row => row.textContent.trim().replace(/\s+/g, " ")).join("; ");
    };
    const actions = {
      ArrowLeft: () => event.shiftKey ? shiftZoom(-0.25) : move((at ?? end + 1) - 1),
      ArrowRight: () => event.shiftKey ? shiftZoom(0.25) : move((at ?? first - 1) + 1),
      Home: () => move(first), End: () => move(end),
      "+": () => scaleZoom(0.5, at == null ? null : points[at]), "=": () => scaleZoom(0.5, at == null ? null : points[at]),
      "-": () => scaleZoom(2, at == null ? null : points[at]), 0: () => zoom(), Escape: () => zoom(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // Names of the legend are buttons that hide and show their line.
  function makeLegendButtons(plot) {
    for (const [place, row] of [...plot.root.querySelectorAll(".u-series")].entries()) {
      const head = row.querySelector("th");
      if (!place || !head || row.classList.contains("edge")) continue;
      head.tabIndex = 0;
      head.setAttribute("role", "button");
      head.setAttribute("aria-pressed", "true");
      head.addEventListener("click", () => setTimeout(() => head.setAttribute("aria-pressed", plot.series[place].show)));
      head.addEventListener("keydown", event => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        head.click();
      });
    }
  }

  function draw() {
    plots.splice(0).forEach(plot => { plot.observer.disconnect(); plot.destroy(); });
    const charts = all(".plot").map(holder => [holder, build(JSON.parse(holder.querySelector("script").textContent))]);
    for (const [holder, chart] of charts) {
      const lines = seriesOf(chart), plot = new uPlot(options(chart, holder, lines), dataOf(lines), holder);
      plot.root.tabIndex = 0;
      plot.root.setAttribute("role", "group");
      plot.root.setAttribute("aria-roledescription", "chart");
      plot.root.setAttribute("aria-label", chart.title);
      plot.root.setAttribute("aria-describedby", "keys");
      plot.root.addEventListener("keydown", event => onKey(event, plot, chart));
      plot.over.addEventListener("dblclick", () => zoom());
      makeLegendButtons(plot);
      plot.observer = new ResizeObserver(() => plot.setSize({width: holder.clientWidth, height: chart.height}));
      plot.observer.observe(holder);
      plots.push(plot);
    }
    element("whole").disabled = !state.range;
  }

  function chooseX(kind) {
    const steps = state.range && RUNS[0].steps.length > 1 ?
      state.range.map(value => interpolate(value, places(0), RUNS[0].steps)) : null;
    state.x = kind;
    state.range = steps && steps.map(step => ofStep(step, 0));
    draw();
  }

  for (const choice of all("input[name=x]")) {
    choice.disabled = !RUNS.every(run => run[choice.value]);
    choice.addEventListener("change", () => { if (choice.checked) chooseX(choice.value); });
  }
  element("log").addEventListener("change", event => { state.log = event.target.checked; draw(); });
  element("smooth").addEventListener("change", event => { state.smooth = Number(event.target.value); draw(); });
  element("in").addEventListener("click", () => scaleZoom(0.5));
  element("out").addEventListener("click", () => scaleZoom(2));
  element("earlier").addEventListener("click", () => shiftZoom(-0.25));
  element("later").addEventListener("click", () => shiftZoom(0.25));
  element("whole").addEventListener("click", () => zoom());
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
