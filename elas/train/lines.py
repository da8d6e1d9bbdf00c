"""Console lines of a run: of a logged step, of a validation, and warnings at the start. Does not import torch."""

import math

from elas.config import Config
from elas.config.phases import unreached
from elas.console import Console, clock
from elas.data.corpus import unused_vocabulary
from elas.data.extent import thin_data


def warn(config: Config, step: int) -> None:
    """Warn on stderr of phases that a run will not reach after `step`, unused vocabulary, and too little text.

    A resumed run calls it after checking the bytes of its checkpoint: if these are damaged, an earlier one is resumed.
    """
    for line in (*unreached(config, step), *unused_vocabulary(config), *thin_data(config)):
        Console("err").say(f"warning: {line}")


def validation_row(step: int, nats: float, tokens: int, samples: int, available: int) -> dict:
    """The line of validation.jsonl.

    Args:
        step: steps taken.
        nats: sum of the losses.
        tokens: labels that count.
        samples: number of samples.
        available: number of samples in the whole validation set.
    """
    loss = nats / tokens
    ppl = math.exp(min(loss, 80.0))
    return {"step": step, "loss": loss, "ppl": ppl, "tokens": tokens, "samples": samples, "share": samples / available}


def validation_line(row: dict) -> str:
    """Format a row of `validation_row`."""
    of = "all" if row["share"] == 1 else f"{row['share']:.1%}"
    results = f"validation loss {row['loss']:.4f}  perplexity {row['ppl']:,.1f}"
    return f"step {row['step']:>6}  {results}  ({row['tokens']:,} tokens, {of} of the validation set)"


def step_line(row: dict, steps: int, width: int | None = None, *, more_s: float = 0.0) -> str:
    """Format a logged step.

    Args:
        row: as in metrics.jsonl.
        steps: total steps of the run.
        width: available columns; the least important parts are left out until the line fits. None for no limit.
        more_s: seconds of the remaining validations and saves.
    """
    meant = row["loss_steps"]
    parts = {
        "step": f"step {row['step']:>{len(str(steps))}}/{steps}",
        "loss": f"loss {row['loss']:.4f}",
        "mean": f"(mean of {meant}: {row['loss_mean']:.4f})" if meant > 1 else "",
        "norm": f"norm {row['grad_norm']:.3f}",
        "lr": f"lr {row['lr']:.2e}",
        "rate": f"{row['tokens_per_s']:,.0f} tok/s",
        "mfu": "" if row.get("mfu") is None else f"MFU {row['mfu']:.1%}",
        "zeros": "" if row["sparsity"] is None else f"zeros {row['sparsity']:.1%}",
        "dropped": "" if row["dropped"] is None else f"dropped {row['dropped']:.1%}",
        "left": f"left {clock((steps - row['step']) * row['step_s'] + more_s)}",
    }
    for unimportant in ("", "dropped", "zeros", "lr", "mfu", "norm", "mean"):
        parts.pop(unimportant, None)
        line = "  ".join(filter(None, parts.values())).replace("  (mean", " (mean")
        if width is None or len(line) <= width:
            break
    return line
