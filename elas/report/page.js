// Which quantity the charts are drawn over, and their colors: the page's, so that they follow it into dark mode.
(() => {
  const labels = {tokens: "tokens", step: "steps", hours: "hours since the first start", flops: "model FLOPs"}
  const figures = () => Bokeh.documents.flatMap((document) => document.roots())

  const over = (axis) => {
    for (const figure of figures().filter((one) => one.tags.includes("axes"))) {
      for (const renderer of figure.renderers)
        for (const glyph of [renderer.glyph, renderer.nonselection_glyph, renderer.muted_glyph])
          if (glyph && glyph.x) glyph.x = {field: axis}
      figure.below.filter((one) => one.axis_label != null).forEach((one) => { one.axis_label = labels[axis] })
    }
    for (const button of document.querySelectorAll("[data-axis]"))
      button.setAttribute("aria-pressed", String(button.dataset.axis == axis))
  }

  const hide = (button) => {
    const shown = button.getAttribute("aria-pressed") != "true"
    button.setAttribute("aria-pressed", String(shown))
    const place = button.closest("figure.chart")
    for (const figure of figures().filter((one) => !place || one.name == place.dataset.title))
      for (const renderer of figure.renderers.filter((one) => one.tags.includes(button.dataset.hides)))
        renderer.visible = renderer.tags.every((tag) => pressed(place ? place : document, tag) && pressed(document, tag))
  }
  const pressed = (place, tag) =>
    ![...place.querySelectorAll("[data-hides]")].some((one) => one.dataset.hides == tag &&
      (place != document || !one.closest("figure.chart")) && one.getAttribute("aria-pressed") == "false")

  const paint = () => {
    const style = getComputedStyle(document.documentElement)
    const [ink, dim, line] = ["--ink", "--dim", "--line"].map((name) => style.getPropertyValue(name).trim())
    for (const figure of figures()) {
      for (const part of [...figure.left, ...figure.below, ...figure.right]) {
        if ("axis_label_text_color" in part)
          Object.assign(part, {axis_label_text_color: dim, major_label_text_color: dim, axis_line_color: line,
            major_tick_line_color: line, minor_tick_line_color: null, axis_label_text_font_style: "normal"})
        else if ("major_label_text_color" in part) part.major_label_text_color = dim
        else if ("label_text_color" in part) part.label_text_color = ink
      }
      for (const part of figure.center) if ("grid_line_color" in part) part.grid_line_color = line
    }
  }

  // A chart is drawn for its width on the screen, and not again for paper: print pictures of it, drawn for paper's.
  const print = (onPaper) => {
    paint()
    for (const old of document.querySelectorAll(".printed")) old.remove()
    for (const charts of document.querySelectorAll(".charts")) charts.classList.toggle("paper", onPaper)
    for (const view of Bokeh.index) {
      const figure = view.el.closest("figure.chart")
      if (!figure) continue  // a tooltip
      view.after_resize()
      if (!onPaper) continue
      const picture = view.export("png", true).canvas
      picture.className = "printed"
      picture.removeAttribute("style")
      figure.append(picture)
    }
  }

  const ready = () => {
    if (!window.Bokeh || Bokeh.documents.length == 0) return setTimeout(ready, 20)
    paint()
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint)
    addEventListener("beforeprint", () => print(true))
    addEventListener("afterprint", () => print(false))
    for (const button of document.querySelectorAll("[data-axis]"))
      button.addEventListener("click", () => over(button.dataset.axis))
    for (const button of document.querySelectorAll("[data-hides]")) button.addEventListener("click", () => hide(button))
    document.documentElement.dataset.ready = "true"
  }
  ready()
})()
