"""What accelerators can do at most, by their data sheets; looked up by name, without torch."""

from typing import NamedTuple

from elas.plan.rates import Measured


class Peak(NamedTuple):
    """Of one GPU."""

    flops: float
    """FLOP/s of dense bf16 products with sums in fp32, not the twice as high figure for 2:4 operands."""
    bandwidth: float
    """Bytes/s of its memory."""
    fp64: float
    """FLOP/s of fp64 products, of matrix units where it has them."""


PEAKS: dict[str, Peak] = {
    "B200": Peak(2250e12, 8.0e12, 37e12),
    "GH200": Peak(989e12, 4.0e12, 67e12),
    "H200": Peak(989e12, 4.8e12, 67e12),
    "H100 PCIe": Peak(756e12, 2.0e12, 51e12),
    "H100 NVL": Peak(835e12, 3.9e12, 60e12),
    "H100": Peak(989e12, 3.35e12, 67e12),
    "A100-SXM4-40GB": Peak(312e12, 1.555e12, 19.5e12),
    "A100-PCIE-40GB": Peak(312e12, 1.555e12, 19.5e12),
    "A100 80GB PCIe": Peak(312e12, 1.935e12, 19.5e12),
    "A100": Peak(312e12, 2.039e12, 19.5e12),
    "L40S": Peak(362e12, 0.864e12, 1.43e12),
    "A10G": Peak(70e12, 0.6e12, 0.49e12),
    "A10": Peak(125e12, 0.6e12, 0.49e12),
    "L4": Peak(121e12, 0.3e12, 0.47e12),
    "RTX 4090": Peak(165e12, 1.008e12, 1.29e12),
    "RTX 3090": Peak(71e12, 0.936e12, 0.56e12),
}
"""From NVIDIA's data sheets; fp64, where they lack it, is 1/64 of fp32. Of several names that are part of the GPU's,
the first."""


def peak_of(name: str) -> Peak | None:
    """The peak of the GPU that calls itself `name`; None if it is not in the table, so that no figure is made up."""
    words = f" {name.replace('-', ' ')} "
    return next((found for part, found in PEAKS.items() if f" {part.replace('-', ' ')} " in words), None)


class Machine(NamedTuple):
    """A cluster's nodes, all alike. Rates in one direction, of one GPU."""

    peak: Peak
    memory: float
    """Bytes of a GPU."""
    inside: float
    """Bytes/s to other GPUs of the node."""
    between: float
    """Bytes/s to other nodes."""
    gpus: int
    """Of a node."""
    context: float = 1.5e9
    """Bytes of each GPU that CUDA, NCCL and the kernels' workspaces take."""
    measured: Measured | None = None
    """Rates by `elas plan --measure`; None for shares of the peak that are assumed."""

    @property
    def device(self) -> str:
        """cuda or cpu."""
        return self.measured.device if self.measured else "cuda"


MACHINES: dict[str, Machine] = {
    "a100": Machine(PEAKS["A100"], 80e9, 300e9, 25e9, 8),
    "h100": Machine(PEAKS["H100"], 80e9, 450e9, 50e9, 8),
    "h200": Machine(PEAKS["H200"], 141e9, 450e9, 50e9, 8),
    "b200": Machine(PEAKS["B200"], 180e9, 900e9, 50e9, 8),
}
"""SXM modules in DGX or HGX nodes of eight: NVLink, and one network adapter a GPU (200 Gbit/s HDR with A100, else 400
Gbit/s NDR), by NVIDIA's data sheets."""


def measured_machine(measured: Measured) -> Machine:
    """The machine that was measured, as one node; its peaks are its own rates of products and copies."""
    best = measured.busy[measured.ranks]
    of = ("full_rank", "bandwidth", "iteration")
    peak = Peak(*(max(getattr(rates, name) for rates in best.values()) for name in of))
    link = measured.links["all_reduce"].bytes_per_s if measured.links else float("inf")
    context = 1.5e9 if measured.device == "cuda" else 0.0
    return Machine(peak, measured.memory, link, link, measured.ranks, context, measured)
