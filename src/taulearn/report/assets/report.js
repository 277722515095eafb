"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(max-width: 600px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const plots = [...document.querySelectorAll("[data-figure]")];
  const drawn = (plot) => plot.classList.contains("js-plotly-plot");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Attributes that depend on the page: its colours and its width.
  function surroundings(plot) {
    const layout = figures[plot.dataset.figure].layout;
    const above = narrow.matches || layout.legend.orientation === "h";
    const changes = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": colour("--ink"),
      "font.family": getComputedStyle(document.body).fontFamily,
      "font.size": narrow.matches ? 11 : 13,
      "hoverlabel.align": "left",
      dragmode: coarse.matches ? false : "zoom",
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": colour("--muted"),
      "modebar.activecolor": colour("--ink"),
      "legend.orientation": above ? "h" : "v",
      "legend.x": above ? 0 : 1.01,
      "legend.xanchor": "left",
      "legend.y": above ? 1.02 : 1,
      "legend.yanchor": above ? "bottom" : "top",
      margin: narrow.matches ? { l: 44, r: 8, t: 12, b: 40 } : { l: 60, r: 16, t: 34, b: 48 },
    };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      changes[`${axis}.gridcolor`] = colour("--grid");
      changes[`${axis}.zerolinecolor`] = colour("--grid");
      changes[`${axis}.linecolor`] = colour("--muted");
      changes[`${axis}.automargin`] = true;
      changes[`${axis}.exponentformat`] = axis.startsWith("x") ? "none" : "power";
      changes[`${axis}.separatethousands`] = true;
      if (axis.startsWith("y") && !layout[axis].nticks) changes[`${axis}.nticks`] = narrow.matches ? 4 : 8;
    }
    return changes;
  }

  function inkTraces(plot) {
    return plot.data.flatMap((trace, index) => (trace.meta.ink ? [index] : []));
  }

  async function adapt(plot) {
    const ink = inkTraces(plot);
    if (ink.length) await Plotly.restyle(plot, { "line.color": colour("--ink") }, ink);
    await Plotly.relayout(plot, surroundings(plot));
  }

  async function draw(plot) {
    const { data, layout } = structuredClone(figures[plot.dataset.figure]);
    for (const [path, value] of Object.entries(surroundings(plot))) {
      const keys = path.split(".");
      const last = keys.pop();
      keys.reduce((inner, key) => (inner[key] ??= {}), layout)[last] = value;
    }
    for (const trace of data) if (trace.meta.ink) trace.line.color = colour("--ink");
    await Plotly.newPlot(plot, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: !narrow.matches,
      // Named one by one: by default plotly.js adds a button that uploads the figure to its makers' server.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      plotlyServerURL: "",
    });
  }

  // A plot in closed details has no size yet; it is drawn when they open.
  const visible = (plot) => !plot.closest("details:not([open])");
  const drawVisible = () => Promise.all(plots.filter((plot) => visible(plot) && !drawn(plot)).map(draw));

  function press(button) {
    for (const other of button.parentElement.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  }

  function variantOf(plot) {
    const pressed = plot.parentElement.querySelector("[data-variant][aria-pressed=true]");
    return pressed && pressed.dataset.variant;
  }

  function showAll(plot) {
    const variant = variantOf(plot);
    return Plotly.restyle(plot, { visible: plot.data.map((trace) => !trace.meta.variant || trace.meta.variant === variant) });
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".controls button");
    if (!button) return;
    const plot = button.closest("figure").querySelector(".plot");
    if (button.dataset.axis) {
      press(button);
      Plotly.relayout(plot, { [`${button.dataset.axis}.type`]: button.dataset.type, [`${button.dataset.axis}.autorange`]: true });
    } else if (button.dataset.variant) {
      press(button);
      showAll(plot);
    } else {
      showAll(plot);
    }
  });

  function openTarget() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  }

  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", drawVisible);
  for (const query of [narrow, dark]) query.addEventListener("change", () => plots.filter(drawn).forEach(adapt));
  addEventListener("hashchange", openTarget);
  openTarget();
  drawVisible().then(() => document.documentElement.setAttribute("data-ready", ""));
})();
