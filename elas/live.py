"""The live view of a run: one block of lines with a progress bar and its values, rendered by rich.

`elas train` fills a `View` from the running loop, `elas watch` from a run's files; `render` fits it to a terminal. What
is unknown is left out. On few rows the least important values are left out too, on few columns they stand below each
other. Does not import torch.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elas.console import Screen, clock

TWO_COLUMNS = 72
"""Columns from which two values stand beside each other."""
WIDEST = 100
"""Most columns that are used."""
_BAR = 24
"""Columns from which there is a bar."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What is shown of a run; None: unknown.

    Attributes:
        title: a line above all; empty for none.
        step: optimizer steps taken.
        steps: of the whole run; 0: unknown.
        now: the current operation or state.
        loss_steps: steps that `loss_mean` is the mean of.
        valid_step: step of the last validation, whose perplexity is `ppl`.
        left_s: estimated seconds to the end, with validations and saves.
        checkpoint: step of the last checkpoint, which is `checkpoint_age_s` old.
    """

    title: str = ""
    step: int = 0
    steps: int = 0
    now: str = ""
    tokens: int | None = None
    loss: float | None = None
    loss_mean: float | None = None
    loss_steps: int = 0
    ppl: float | None = None
    valid_step: int = 0
    tokens_per_s: float | None = None
    mfu: float | None = None
    left_s: float | None = None
    memory_bytes: int | None = None
    sparsity: float | None = None
    dropped: float | None = None
    checkpoint: int | None = None
    checkpoint_age_s: float | None = None


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `View` that a line of metrics.jsonl holds."""
    return {
        "step": row["step"],
        "tokens": row.get("tokens"),
        "loss": row.get("loss"),
        "loss_mean": row.get("loss_mean"),
        "loss_steps": row.get("loss_steps") or 0,
        "tokens_per_s": row.get("tokens_per_s"),
        "mfu": row.get("mfu"),
        "memory_bytes": row.get("memory_peak_bytes"),
        "sparsity": row.get("sparsity"),
        "dropped": row.get("dropped"),
    }


def position(view: View) -> str:
    """`step 120/400`."""
    return f"step {view.step}/{view.steps}" if view.steps else f"step {view.step}"


def values(view: View) -> list[tuple[str, str]]:
    """Names and texts of the known values, the most important first."""
    found = []
    if view.loss is not None:
        mean = view.loss_mean if view.loss_steps > 1 else None
        found.append(("loss", f"{view.loss:.4f}" + ("" if mean is None else f", mean {mean:.4f} of {view.loss_steps}")))
    if view.left_s is not None:
        found.append(("left", clock(view.left_s)))
    if view.ppl is not None:
        found.append(("perplexity", f"{view.ppl:,.1f} at step {view.valid_step}"))
    if view.tokens_per_s is not None:
        mfu = "" if view.mfu is None else f", MFU {view.mfu:.1%}"
        found.append(("speed", f"{view.tokens_per_s:,.0f} tok/s{mfu}"))
    if view.checkpoint is not None:
        age = "" if view.checkpoint_age_s is None else f", {clock(view.checkpoint_age_s)} ago"
        found.append(("checkpoint", f"step {view.checkpoint}{age}"))
    if view.tokens is not None:
        found.append(("tokens", f"{view.tokens:,}"))
    if view.memory_bytes is not None:
        found.append(("memory", _size(view.memory_bytes)))
    shares = [("zeros", view.sparsity), ("dropped", view.dropped)]
    if known := [f"{name} {share:.1%}" for name, share in shares if share is not None]:
        found.append(("sparsity", ", ".join(known)))
    return found


def render(view: View, screen: Screen) -> list[str]:
    """The lines of a view on a terminal, with its colours, each narrower than the screen."""
    columns = min(WIDEST, max(1, screen.columns - 1))
    title = [Text(view.title[:columns], style="bold")] if view.title else []
    now = [Text(line, style="cyan") for line in wrap(view.now, columns)[:2]]
    rows = max(0, screen.rows - 2 - len(title) - 1 - len(now))
    parts = [*title, _bar(view, columns), *_pairs(values(view), columns, rows), *now]
    return draw(Group(*parts), columns, screen)


def draw(what: RenderableType, columns: int, screen: Screen) -> list[str]:
    """The lines of something that rich can render, cut to `columns`, with the terminal's colours."""
    file = _Encoded(screen.encoding)
    console = Console(
        file=file,
        width=columns,
        height=screen.rows,
        force_terminal=True,
        force_jupyter=False,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(what, no_wrap=True, overflow="crop", crop=True)
    text = file.getvalue().encode(screen.encoding, "replace").decode(screen.encoding)
    return text.splitlines()


class _Encoded(io.StringIO):
    """Text for a stream of this encoding: rich draws with ASCII where the encoding has no more."""

    def __init__(self, encoding: str):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._encoding


def _bar(view: View, columns: int) -> RenderableType:
    """The step, a bar and per cent in one row."""
    if not view.steps or columns < _BAR:
        return Text(position(view))
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    done = min(view.step, view.steps)
    bar = ProgressBar(total=view.steps, completed=done, complete_style="cyan", finished_style="green")
    row.add_row(Text(position(view)), bar, f"{done / view.steps:.0%}")
    return row


def _pairs(known: list[tuple[str, str]], columns: int, rows: int) -> list[RenderableType]:
    """Values below and, if there is room, beside each other, in at most so many rows."""
    beside = 2 if columns >= TWO_COLUMNS else 1
    known = known[: rows * beside]
    if not known:
        return []
    grid = Table.grid(padding=(0, 1), expand=True)
    for ratio in (29, 26)[:beside]:  # columns of the longest values on 80
        grid.add_column(style="dim", no_wrap=True, width=len("perplexity"))
        grid.add_column(no_wrap=True, overflow="crop", ratio=ratio)
    for first in range(0, len(known), beside):
        grid.add_row(*(Text(cell) for pair in known[first : first + beside] for cell in pair))
    return [grid]


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
