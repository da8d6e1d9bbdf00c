"""Cells and tables of the benchmarks."""

from elas.console import table


def ratio_table(ratios: list[dict], columns: tuple[str, ...]) -> str:
    """A table with a line for each quotient and a column for each case; empty without ratios.

    Args:
        ratios: rows with `what`, `of`, `to`, `ratio` and the keys of the case.
        columns: the keys of the case.
    """
    lines: dict[str, dict[str, str]] = {}
    for row in ratios:
        what = row["what"].removesuffix("_bytes").replace("_per_s", "/s")
        case = " ".join(str(row[key]) for key in columns)
        lines.setdefault(f"{what}: {row['of']} ÷ {row['to']}", {})[case] = f"{row['ratio']:.2f}"
    cases = list(dict.fromkeys(case for cells in lines.values() for case in cells))
    return table(["ratio", *cases], [[name, *(cells.get(c, "–") for c in cases)] for name, cells in lines.items()])


def milliseconds(value: float | None) -> str:
    """Format a time in ms; a dash for None."""
    return "–" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def mebibytes(value: int | None) -> str:
    """Format bytes in MiB; a dash for None."""
    return "–" if value is None else f"{value / 2**20:,.1f}"
