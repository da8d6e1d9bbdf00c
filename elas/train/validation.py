"""Validation within a run: the mean loss over the held-out set, which a stop may interrupt."""

import time

from elas.config import Config
from elas.data.batches import Datasets, whole_set
from elas.engine.engine import Engine
from elas.engine.micro_batches import Abandoned, MicroBatches
from elas.model import observe
from elas.model.activation import set_sparse
from elas.parallel import Layout
from elas.train.bits import BitsPerByte
from elas.train.lines import validation_row


class Validation:
    """Validates the model of a run.

    Args:
        config: of the run.
        layout: this rank's place in it.
        engine: with the model.
        datasets: of the run; `run` requires their validation set.
        due: whether the last validation before this start was interrupted.

    Attributes:
        loss: nats a token, of the last validation of this start that came to its end; None before.
        due: the last one was interrupted by a stop; the next start runs it again.
        seconds: that the last one took.
    """

    def __init__(self, config: Config, layout: Layout, engine: Engine, datasets: Datasets, *, due: bool):
        self.config, self.layout, self.engine, self.datasets = config, layout, engine, datasets
        self.bits = BitsPerByte(config, datasets.valid)
        self.loss: float | None = None
        self.due, self.seconds = due, 0.0

    def run(self, step: int, between: MicroBatches) -> dict | None:
        """Validate after `step`; 2:4 is on unless the run is in its first, dense steps. Every rank must call it.

        Args:
            step: steps taken.
            between: looks for a stop between micro-batches.

        Returns:
            The row of validation.jsonl, complete on rank 0; None if a stop interrupted it.
        """
        config, engine, valid = self.config, self.engine, self.datasets.valid
        assert valid is not None  # else there is nothing to ask for
        observe.look_next(engine.chunks, 0)
        set_sparse(engine.chunks, max(1, step) > config.sparsity.dense_steps)  # at step 0 as in step 1
        samples, total, tokens = len(valid), 0.0, 0
        micro_batches = -(-samples // (config.train.micro_batch_size * self.layout.dp))
        between.begin("validation", micro_batches, len(engine.chunks))
        begun = time.perf_counter()
        try:
            for micro in whole_set(valid, config, self.layout):
                losses, counted = engine.evaluate(micro)
                total, tokens = total + losses, tokens + counted
        except Abandoned:
            self.due = True
            return None
        self.due, self.seconds = False, time.perf_counter() - begun
        self.loss = total / tokens
        row = validation_row(step, total, tokens, samples, self.datasets.valid_available)
        return row | (self.bits.of(total) if self.layout.rank == 0 else {})
