"""What the line of a logged step contains; every rank makes it, since parts of it are sums over ranks."""

import statistics
import time
from typing import Any

from elas.config import Config
from elas.engine.engine import Engine
from elas.model import observe
from elas.parallel import Layout
from elas.train.throughput import Goodput, Throughput, memory


class StepLog:
    """Makes rows of metrics.jsonl.

    Args:
        config: the run's.
        layout: of its ranks.
        goodput: where its time went so far.

    Attributes:
        interval: what has happened since the last row.
    """

    def __init__(self, config: Config, layout: Layout, goodput: Goodput):
        self._config, self._goodput = config, goodput
        self._throughput = Throughput(config, layout.tp * layout.pp * layout.dp)
        self.interval = Interval(0, 0)

    def row(self, engine: Engine, values: dict[str, Any]) -> dict[str, Any]:
        """The row of the step just taken; every rank must call it.

        Args:
            engine: that took it.
            values: `step`, `tokens` and what else is known of it.
        """
        config, step, tokens = self._config, values["step"], values["tokens"]
        counts = observe.sum_over_ranks(engine.chunks, config.model.num_layers)
        rates = self.interval.end(step, tokens)
        row = {
            **values,
            **rates,
            **self._throughput.of(rates["tokens_per_s"], tokens),
            **self._goodput.columns(),
            **memory(),
            **observe.shares(counts.sum(0)),
            "sparse_active": step > config.sparsity.dense_steps and config.sparsity.kind == "2:4",
        }
        return row | ({"layers": observe.by_layer(counts)} if counts.any() else {})


class Interval:
    """Rates and losses since the last logged step; `restart` excludes time spent on validation and saving."""

    def __init__(self, step: int, tokens: int):
        self.losses: list[float] = []
        self.restart(step, tokens)

    def restart(self, step: int, tokens: int) -> None:
        """Measure time and tokens from now on; losses are kept."""
        self.step, self.tokens, self.start = step, tokens, time.perf_counter()

    def end(self, step: int, tokens: int) -> dict[str, float]:
        """Return rates and the mean loss for metrics.jsonl, and start the next interval."""
        passed, trained, steps = time.perf_counter() - self.start, tokens - self.tokens, step - self.step
        means = {"loss_mean": statistics.fmean(self.losses), "loss_steps": len(self.losses)}
        self.losses.clear()
        self.restart(step, tokens)
        return {"tokens_per_s": trained / passed, "step_s": passed / max(1, steps), **means}
