"""Charts by layer: shares over time, and the effective rank of each factor pair."""

from collections.abc import Iterator

import numpy as np
from bokeh.models import BasicTicker, ColorBar, FixedTicker, HoverTool, LinearColorMapper, NumeralTickFormatter
from bokeh.palettes import Viridis256

from elas.report.figures import Chart, new_figure, short_numbers
from elas.report.run_files import RunFiles
from elas.report.series import by_layer

SHARES = {
    "sparsity": "Zeros by layer",
    "dropped": "Dropped by 2:4, by layer",
    "mask_flips": "Changed masks by layer",
}
INTERVALS = 200


def heat_maps(runs: list[RunFiles]) -> Iterator[Chart]:
    """The heat maps that the runs have values for."""
    names = ["" if len(runs) == 1 else f": {run.name}" for run in runs]
    for key, title in SHARES.items():
        for run, name in zip(runs, names):
            found = by_layer(run.metrics, key, INTERVALS // len(runs))
            if found is not None:
                yield over_tokens(title + name, *found)
    for run, name in zip(runs, names):
        found = pairs(run, name)
        if found is not None:
            yield found


def over_tokens(title: str, values: np.ndarray, tokens: tuple[float, float]) -> Chart:
    """Shares, fp64 [layers, intervals], from the first to the last number of tokens."""
    layers = len(values)
    made = new_figure(title, x_axis_label="tokens", y_axis_label="layer", x_range=tokens, y_range=(-0.5, layers - 0.5))
    bar = _image(made, values, (tokens[0], max(tokens[1] - tokens[0], 1.0)))
    bar.formatter = NumeralTickFormatter(format="0.[0]%")
    made.xaxis.formatter = short_numbers()
    made.yaxis.ticker = BasicTicker(min_interval=1)
    tips = [("layer", "$y{0}"), ("tokens", "$x{0,0}"), ("share", "@image{0.[00]%}")]
    made.add_tools(HoverTool(tooltips=tips))
    return Chart(title, "means over intervals", made)


def pairs(run: RunFiles, name: str) -> Chart | None:
    """Effective rank of every pair at the last measurement; None without one."""
    row = next((row for row in reversed(run.metrics) if isinstance(row.get("pairs"), dict)), None)
    if row is None:
        return None
    kinds: dict[str, dict[int, float]] = {}
    for parameter, value in zip(row["pairs"]["names"], row["pairs"]["effective_rank"]):
        layer, kind = _place(parameter)
        kinds.setdefault(kind, {})[layer] = value
    layers = 1 + max(layer for of_kind in kinds.values() for layer in of_kind)
    values = np.array([[of_kind.get(layer, np.nan) for layer in range(layers)] for of_kind in kinds.values()])
    title = f"Effective rank by pair{name}"
    made = new_figure(title, x_axis_label="layer", x_range=(-0.5, layers - 0.5), y_range=(-0.5, len(kinds) - 0.5))
    _image(made, values, (-0.5, layers))
    made.yaxis.ticker = FixedTicker(ticks=list(range(len(kinds))))
    made.yaxis.major_label_overrides = dict(enumerate(kinds))
    made.xaxis.ticker = BasicTicker(min_interval=1)
    made.add_tools(HoverTool(tooltips=[("layer", "$x{0}"), ("effective rank", "@image{0.[0]}")]))
    rank = run.config.get("low_rank", {}).get("rank")
    return Chart(title, f"after step {row['step']:,}" + (f", of rank {rank}" if rank else ""), made)


def _place(parameter: str) -> tuple[int, str]:
    """Layer and kind of a pair: `…layers.3.self_attention.linear_qkv.factor_out_q` is (3, "qkv q")."""
    parts = parameter.split(".")
    layer = next((int(part) for part in parts if part.isdecimal()), 0)
    linear = parts[-2].removeprefix("linear_") if len(parts) > 1 else parameter
    return layer, f"{linear} {parts[-1].removeprefix('factor_out').strip('_')}".strip()


def _image(made, values: np.ndarray, across: tuple[float, float]) -> ColorBar:
    """Draw rows of values from `across[0]` on, `across[1]` wide, and their color bar."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    high = high if high > low else low + 1e-9
    colors = LinearColorMapper(palette=Viridis256, low=low, high=high, nan_color="#00000000")
    made.image([values], x=across[0], y=-0.5, dw=across[1], dh=len(values), color_mapper=colors)
    bar = ColorBar(color_mapper=colors, width=10, background_fill_alpha=0.0)
    made.add_layout(bar, "right")
    made.grid.visible = False
    return bar
