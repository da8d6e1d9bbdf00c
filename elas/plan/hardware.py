"""What accelerators can do at most, by their data sheets; looked up by name, without torch."""

from typing import NamedTuple


class Peak(NamedTuple):
    """Of one GPU."""

    flops: float
    """FLOP/s of dense bf16 products with sums in fp32, not the twice as high figure for 2:4 operands."""
    bandwidth: float
    """Bytes/s of its memory."""


PEAKS: dict[str, Peak] = {
    "B200": Peak(2250e12, 8.0e12),
    "GH200": Peak(989e12, 4.0e12),
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "A100-PCIE-40GB": Peak(312e12, 1.555e12),
    "A100 80GB PCIe": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 2.039e12),
    "L40S": Peak(362e12, 0.864e12),
    "A10G": Peak(70e12, 0.6e12),
    "A10": Peak(125e12, 0.6e12),
    "L4": Peak(121e12, 0.3e12),
    "RTX 4090": Peak(165e12, 1.008e12),
    "RTX 3090": Peak(71e12, 0.936e12),
}
"""From NVIDIA's data sheets; of several names that are part of the GPU's, the first."""


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


MACHINES: dict[str, Machine] = {
    "a100": Machine(PEAKS["A100"], 80e9, 300e9, 25e9, 8),
    "h100": Machine(PEAKS["H100"], 80e9, 450e9, 50e9, 8),
    "h200": Machine(PEAKS["H200"], 141e9, 450e9, 50e9, 8),
    "b200": Machine(PEAKS["B200"], 180e9, 900e9, 50e9, 8),
}
"""SXM modules in DGX or HGX nodes of eight: NVLink, and one network adapter a GPU (200 Gbit/s HDR with A100, else 400
Gbit/s NDR), by NVIDIA's data sheets."""
