"""A folder's weights as the linears of another kind: as they are, multiplied out, or factored at a rank."""

from collections.abc import Callable

import torch

from elas.console import Console
from elas.export.safetensors_folder import SafetensorsFolder
from elas.export.svd import truncated

_IN, _OUT = ".factor_in.weight", ".factor_out.weight"
_WEIGHT = ".weight"


class Factored:
    """Reads a folder's tensors by transformers' names, also by those that they would have in another form.

    A weight is decomposed when the first of its two factors is asked for; the other is kept until it is.

    Args:
        files: of the model.
        rank: of the factors to make; None for the folder's own form, or full rank.
        done: called after a decomposition with the linear's name and the share of its energy that was kept.
    """

    def __init__(self, files: SafetensorsFolder, rank: int | None, done: Callable[[str, float], None]):
        self._files, self._rank, self._done = files, rank, done
        self._waiting: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """A tensor, fp32: of the folder, a product of two of its factors, or a factor of a weight or product.

        Raises:
            UserError: the folder's cannot be read.
        """
        if name in self._waiting:
            return self._waiting.pop(name)
        for suffix in (_IN, _OUT):
            if name.endswith(suffix) and self._rank is not None:
                return self._decompose(name.removesuffix(suffix), suffix)
        if name in self._files.shapes:
            return self._files.read(name)
        return self._product(name.removesuffix(_WEIGHT)).float()

    def _product(self, linear: str) -> torch.Tensor:
        """The weight of a linear; fp64 where it is a product of factors."""
        if linear + _WEIGHT in self._files.shapes:
            return self._files.read(linear + _WEIGHT)
        return self._files.read(linear + _OUT).double() @ self._files.read(linear + _IN).double()

    def _decompose(self, linear: str, suffix: str) -> torch.Tensor:
        assert self._rank is not None
        factor_in, factor_out, kept = truncated(self._product(linear), self._rank)
        self._waiting |= {linear + _IN: factor_in, linear + _OUT: factor_out}
        self._done(linear, kept)
        return self._waiting.pop(linear + suffix)


class EnergyTable:
    """Prints the share of each linear's energy that its factors keep, a row when a layer is done.

    Attributes:
        kept: the share by the linear's name.
    """

    def __init__(self, console: Console):
        self._console = console
        self.kept: dict[str, float] = {}
        self._row: dict[str, float] = {}

    @property
    def mean(self) -> float:
        """Over all linears; 1 where nothing was factored."""
        return sum(self.kept.values()) / len(self.kept) if self.kept else 1.0

    def add(self, linear: str, kept: float) -> None:
        """Note a linear by transformers' name; the last of a layer is `down_proj`."""
        _, _, number, _, name = linear.split(".")  # model.layers.3.mlp.down_proj
        name = name.removesuffix("_proj")
        self.kept[linear] = self._row[name] = kept
        if name != "down":
            return
        if number == "0":
            self._console.say("share of the squared weights that the factors keep")
            self._console.say("layer" + "".join(f"{one:>8}" for one in self._row))
            self._console.say("─" * (5 + 8 * len(self._row)))
        self._console.say(f"{number:>5}" + "".join(f"{one:>8.4f}" for one in self._row.values()))
        self._row = {}
