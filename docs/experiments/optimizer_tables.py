"""Tables of docs/results.md: what each optimizer reaches, from optimizers.json and optimizer_pace.json."""

import json
import math
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {
    "elas": "ELAS",
    "lowrank_relu2": "ELAS without 2:4",
    "lowrank_swiglu": "low-rank SwiGLU",
    "full_swiglu": "full-rank SwiGLU",
}
OPTIMIZERS = {"adamw": "AdamW", "loro": "LORO", "spectron": "Spectron", "muon": "Muon"}
SHORT, LONG, OTHER = 300, 1500, 0.003
AGAINST = ("full_swiglu", "adamw")
"""Whose final perplexity the others are timed to."""


def rates() -> str:
    """Perplexity after 614k tokens at every rate, the best of each in bold."""
    lines = ["| model | optimizer | rate of matrices / of the rest: perplexity |", "|---|---|---|"]
    for model, optimizer, rows in _pairs(SHORT):
        least = min(row["ppl"] for row in rows)
        cells = []
        for row in sorted(rows, key=lambda row: (row["lr"], row["lr_other"] or 0)):
            value = f"{row['ppl']:.1f}"
            cells.append(f"{_rate(row)}: {f'**{value}**' if row['ppl'] == least else value}")
        lines.append(f"| {MODELS[model]} | {OPTIMIZERS[optimizer]} | {', '.join(cells)} |")
    return "\n".join(lines) + "\n"


def long() -> str:
    """Perplexity after 3.07 M tokens over seeds, zeros and dropped shares, and seconds to full rank's perplexity."""
    lines = [
        "| model | optimizer | rate | perplexity | ÷ ELAS with Muon, by seed | zeros | dropped | s a step "
        "| time to full-rank AdamW's, ÷ its |",
        "|---" * 9 + "|",
    ]
    pace, base = _pace(), perplexities("elas", "muon")
    goal = statistics.mean(row["ppl"] for row in _rows() if (row["model"], row["optimizer"]) == AGAINST and _long(row))
    whole = LONG * pace.get(AGAINST, math.nan)
    groups = [
        (model, optimizer, [row for row in rows if _rate(row) == rate])
        for model, optimizer, rows in _pairs(LONG)
        for rate in dict.fromkeys(map(_rate, rows))
    ]
    for model, optimizer, rows in sorted(groups, key=lambda group: statistics.mean(row["ppl"] for row in group[2])):
        steps = [_steps_to(row, goal) for row in rows]
        pair = (model, optimizer)
        reached = None not in steps and pair in pace
        cells = [
            MODELS[model],
            OPTIMIZERS[optimizer],
            _rate(rows[0]),
            _mean([row["ppl"] for row in rows]),
            ", ".join(f"{row['ppl'] / base[row['seed']]:.2f}" for row in rows if row["seed"] in base),
            *(_share(rows, key) for key in ("sparsity", "dropped")),
            f"{pace[pair]:.3f}" if pair in pace else "–",
            f"{statistics.mean(steps) * pace[pair] / whole:.2f}" if reached else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def twins() -> str:
    """What 2:4 costs under each optimizer."""
    lines = ["| optimizer | ELAS | without 2:4 | ratio, by seed |", "|---|---|---|---|"]
    twin = ("elas", "lowrank_relu2")
    for optimizer, name in OPTIMIZERS.items():
        of = [perplexities(model, optimizer) for model in twin]
        seeds = [seed for seed in of[0] if seed in of[1]]
        if not seeds:
            continue
        with_, without = ([one[seed] for seed in seeds] for one in of)
        ratios = ", ".join(f"{one / other:.3f}" for one, other in zip(with_, without, strict=True))
        lines.append(f"| {name} | {_mean(with_)} | {_mean(without)} | {ratios} |")
    return "\n".join(lines) + "\n"


def with_and_without() -> str:
    """What 2:4 takes from trained weights."""
    lines = ["| trained | optimizer | seed | evaluated with 2:4 | without | ratio |", "|---" * 6 + "|"]
    for row in json.loads((RESULTS / "with_and_without.json").read_text())["rows"]:
        trained = "with 2:4" if row["model"] == "elas" else "without"
        name, ratio = OPTIMIZERS[row["optimizer"]], row["with_2_4"] / row["without"]
        lines.append(
            f"| {trained} | {name} | {row['seed']} | {row['with_2_4']:.3f} | {row['without']:.3f} | {ratio:.4f} |"
        )
    return "\n".join(lines) + "\n"


def transfer() -> str:
    """Rates at several widths and ranks, all else at the same rate."""
    tables = [
        f"{OPTIMIZERS[name]}:\n\n{_by_rate([row for row in _rates_of(name) if row['lr_other'] == OTHER])}"
        for name in ("spectron", "muon")
    ]
    return "\n".join(tables)


def unscaled() -> str:
    """Muon's rates at several widths without the factor √(256/h), which changes nothing at 256."""
    plain = [row for row in _rates_of("muon") if (row["width"], row["rank"]) == (256, 64)]
    return _by_rate([*plain, *json.loads((RESULTS / "optimizers_unscaled.json").read_text())])


def _rates_of(optimizer: str) -> list[dict]:
    return [row for row in _rows() if (row["model"], row["optimizer"], row["steps"]) == ("elas", optimizer, SHORT)]


def _by_rate(rows: list[dict]) -> str:
    columns = sorted({(row["lr"], row["lr_other"]) for row in rows})
    lines = ["| width, rank | " + " | ".join(f"{lr:g} / {other:g}" for lr, other in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for width, rank in sorted({(row["width"], row["rank"]) for row in rows}):
        ppl = {(row["lr"], row["lr_other"]): row["ppl"] for row in rows if (row["width"], row["rank"]) == (width, rank)}
        least = min(ppl.values())
        cells = [f"{ppl[one]:.1f}" if one in ppl else "–" for one in columns]
        cells = [f"**{cell}**" if cell == f"{least:.1f}" else cell for cell in cells]
        lines.append(f"| {width}, h/{width // rank} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cost() -> str:
    """What the optimizer takes of a step."""
    facts = json.loads((RESULTS / "muon_cost.json").read_text())
    lines = ["| layout | step, s | optimizer, s | its share | MB that a rank sends for it |", "|---" * 5 + "|"]
    for row in facts["rows"]:
        cells = f"{row['step_s']:.1f} | {row['optimizer_s']:.2f} | {row['share']:.1%}"
        lines.append(f"| {row['layout']} | {cells} | {row['optimizer_bytes'] / 1e6:.1f} |")
    where = f"The {facts['preset']} preset at its global batch of 131,072 tokens, bf16, {facts['cores']} cores of"
    return "\n".join([*lines, "", f"{where} {facts['cpu']}."]) + "\n"


def rebalance() -> str:
    """What balancing pairs now and then does for Muon."""
    facts = json.loads((RESULTS / "rebalance.json").read_text())
    seeds = facts["rows"][0]["seeds"]
    shown = f"perplexity, seeds {', '.join(map(str, seeds))} | mean | norms of a pair, ratio"
    lines = [f"| pairs balanced | {shown} | largest condition number | effective rank |", "|---" * 6 + "|"]
    for row in facts["rows"]:
        when = f"every {row['every']} steps" if row["every"] else "never"
        cells = [", ".join(f"{one:.1f}" for one in row["ppl"]), _mean(row["ppl"])]
        cells += [
            f"{statistics.mean(row[key]):.{digits}f}"
            for key, digits in (("pair_norm_ratio", 2), ("pair_condition", 0), ("effective_rank", 1))
        ]
        lines.append(f"| {when} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def perplexities(model: str, optimizer: str) -> dict[int, float]:
    """After 3.07 M tokens, by seed."""
    return {
        row["seed"]: row["ppl"]
        for row in _rows()
        if (row["model"], row["optimizer"]) == (model, optimizer) and _long(row)
    }


def _rows() -> list[dict]:
    return json.loads((RESULTS / "optimizers.json").read_text())


def _pace() -> dict[tuple[str, str], float]:
    file = RESULTS / "optimizer_pace.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {(row["model"], row["optimizer"]): row["step_s"] for row in rows}


def _long(row: dict) -> bool:
    """Whether it has all tokens, and the rate that was best after a fifth of them."""
    return row["steps"] == LONG and _rate(row) == _best_rate(row["model"], row["optimizer"])


def _best_rate(model: str, optimizer: str) -> str:
    tuned = "elas" if model == "lowrank_relu2" else model
    return _rate(min(next(rows for *pair, rows in _pairs(SHORT) if pair == [tuned, optimizer]), key=_perplexity))


def _perplexity(row: dict) -> float:
    return row["ppl"]


def _pairs(steps: int) -> list[tuple[str, str, list[dict]]]:
    """Rows of the same model and optimizer, at the width and rank that all were trained at."""
    rows = [row for row in _rows() if (row["steps"], row["width"], row["rank"]) == (steps, 256, 64)]
    pairs = [
        (model, optimizer, [row for row in rows if (row["model"], row["optimizer"]) == (model, optimizer)])
        for model in MODELS
        for optimizer in OPTIMIZERS
    ]
    return [pair for pair in pairs if pair[2]]


def _rate(row: dict) -> str:
    """Of matrices, and of the rest where that is another."""
    return f"{row['lr']:g}" + (f" / {row['lr_other']:g}" if row["lr_other"] else "")


def _mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f} (one seed)"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _share(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row[key]]
    return f"{100 * statistics.mean(values):.1f} %" if values else "–"


def _steps_to(row: dict, goal: float) -> float | None:
    """Steps until a run's validation perplexity is at most `goal`, between validations by the logarithm."""
    before = None
    for step, ppl in row["validation"]:
        if ppl <= goal:
            if before is None:
                return step
            share = (math.log(before[1]) - math.log(goal)) / (math.log(before[1]) - math.log(ppl))
            return before[0] + share * (step - before[0])
        before = (step, ppl)
    return None
