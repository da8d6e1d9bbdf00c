"""Tables on the terminal, and progress while it is one."""

from collections.abc import Iterable

from elas.console import Console


def table(headers: list[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """Aligned columns under a rule.

    Args:
        headers: one a column.
        rows: cells, as text.
        left: columns, from the first, that are text and stand left; numbers stand right.
    """
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: list[str]) -> str:
        parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), "─" * (sum(widths) + 2 * len(widths) - 2), *(line(row) for row in rows)])


def ratio_table(ratios: list[dict], columns: tuple[str, ...]) -> str:
    """Ratios, a line for each quotient and a column for each case; empty without ratios.

    Args:
        ratios: `what` of `of` over that of `to` is `ratio`, and the case by its keys.
        columns: those keys.
    """
    lines: dict[str, dict[str, str]] = {}
    for row in ratios:
        what = row["what"].removesuffix("_bytes").replace("_per_s", "/s")
        case = " ".join(row[key] for key in columns)
        lines.setdefault(f"{what}: {row['of']} ÷ {row['to']}", {})[case] = f"{row['ratio']:.2f}"
    cases = list(dict.fromkeys(case for cells in lines.values() for case in cells))
    return table(["ratio", *cases], [[name, *(cells.get(c, "–") for c in cases)] for name, cells in lines.items()])


def milliseconds(value: float | None) -> str:
    """A time in a cell; a dash where there is none."""
    return "–" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def mebibytes(value: int | None) -> str:
    """Bytes in a cell, in MiB."""
    return "–" if value is None else f"{value / 2**20:,.1f}"


class Progress:
    """One line on stderr, rewritten in place; nothing when stderr is not a terminal."""

    def __init__(self):
        self._console = Console("err")

    def __call__(self, text: str) -> None:
        """Say what runs now."""
        self._console.live(text)

    def clear(self) -> None:
        """Take the line away."""
        self("")
