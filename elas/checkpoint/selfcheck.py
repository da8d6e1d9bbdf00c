"""Self-check of a save: compares what is written with the weights of the model.

A checkpoint holds ZeRO's fp32 masters and moments, located through DeepSpeed's bookkeeping (`elas.engine.zero`). If
that were misread, the files and checksums would still be correct, but resuming would train another model. The model's
weights allow an independent check: DeepSpeed copies every master into them, rounded to their dtype.

- Before anything is written, every rank compares windows of each of its masters with the model's weights. Moments are
  at the same offsets as masters.
- After the index is written, rank 0 reads windows of some tensors back by name, different ones at each save, through
  the index and any rank's files that hold them.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from elas.checkpoint import storage
from elas.checkpoint.tensors import PartOfTensor
from elas.checkpoint.weights import held, parameters_by_name, place_of
from elas.engine.engine import Engine
from elas.engine.zero import fragments

WINDOW = 256  # elements
READ_BACK = 4  # tensors a save


def _windows(numel: int) -> Iterator[tuple[int, int]]:
    """Windows at the beginning, middle and end of a range, as (first, count)."""
    count = min(WINDOW, numel)
    for first in sorted({0, (numel - count) // 2, numel - count}):
        yield first, count


@torch.no_grad()
def scrambled_weight(engine: Engine) -> str | None:
    """Name of the first weight whose fp32 master on this rank differs from the model's weight; None if all agree."""
    of_parameter, names, differ = fragments(engine), [], []
    for name, parameter in parameters_by_name(engine.chunks).items():
        fragment = of_parameter.get(parameter)
        if fragment is None:
            continue
        master = fragment.master()
        weights, start = held(parameter, engine.layout)
        weights = weights.narrow(0, fragment.start - start, fragment.numel)
        for first, count in _windows(fragment.numel):
            here = weights.narrow(0, first, count)
            names.append(name)
            differ.append((master.narrow(0, first, count).to(here.device, here.dtype) != here).any())
    if not differ:
        return None
    wrong = torch.stack(differ).nonzero()  # stacked, to synchronise with the device only once
    return names[int(wrong[0])] if len(wrong) else None


class Sample:
    """Copies of windows of some of this rank's weights, to compare with a checkpoint's files later.

    Args:
        engine: the engine whose weights are sampled.
        step: seeds the choice of tensors and windows, so that each save checks different ones.
    """

    def __init__(self, engine: Engine, step: int):
        self._windows: dict[str, tuple] = {}
        parameters = list(parameters_by_name(engine.chunks).items())
        chosen = torch.Generator().manual_seed(step)
        for number in torch.randperm(len(parameters), generator=chosen)[:READ_BACK].tolist():
            name, parameter = parameters[number]
            weights, start = held(parameter, engine.layout)
            if not weights.numel():
                continue
            count = min(WINDOW, weights.numel())
            first = int(torch.randint(weights.numel() - count + 1, (), generator=chosen))
            values = weights.narrow(0, first, count).to("cpu", copy=True)
            self._windows[f"weight.{name}"] = (place_of(parameter, engine.layout), start + first, values)

    def difference(self, folder: Path) -> str | None:
        """Read the windows back and compare them.

        Args:
            folder: folder of a checkpoint whose index is written.

        Returns:
            A message that names the first tensor that differs; None if all agree.
        """
        read = {name: torch.zeros(values.numel()) for name, (_, _, values) in self._windows.items()}
        parts = {name: PartOfTensor.of(place, read[name], first) for name, (place, first, _) in self._windows.items()}
        try:
            storage.read(folder, parts)
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            return f"reading it back failed ({' '.join(str(error).split())[:200]})"
        for name, (_, _, values) in self._windows.items():
            if not torch.equal(read[name].to(values.dtype), values):
                return f"{name} read back differs from the model's weight"
        return None
