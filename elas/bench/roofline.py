"""What a GPU can do at most, by its data sheet, and the share of it that a measurement reaches."""

from typing import Any

import torch

PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 8.0e12),
    "GH200": (989e12, 4.0e12),
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A100-PCIE-40GB": (312e12, 1.555e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 2.039e12),
    "L40S": (362e12, 0.864e12),
    "A10": (125e12, 0.6e12),
    "L4": (121e12, 0.3e12),
    "RTX 4090": (165e12, 1.008e12),
    "RTX 3090": (71e12, 0.936e12),
}
"""FLOP/s of dense bf16 products with sums in fp32, and bytes/s of memory, from NVIDIA's data sheets; of several names
that are part of the GPU's, the first."""


def peaks(device: torch.device) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of a device; None for a CPU and for GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((found for part, found in PEAKS.items() if part in name), None)


def shares(flops: float, least_bytes: float, seconds: float, dtype: str, device: torch.device) -> dict[str, Any]:
    """Columns of a row: TFLOP/s of the products that are needed, and shares of the peaks.

    Args:
        flops: of the products, each once.
        least_bytes: inputs, outputs, weights and gradients, each once.
        seconds: measured.
        dtype: shares of the FLOP/s are for bfloat16 alone.
        device: measured on.
    """
    found = peaks(device)
    row = {"tflops": flops / seconds / 1e12, "peak_share": None, "bandwidth_share": None}
    if found is not None:
        if dtype == "bfloat16":
            row["peak_share"] = flops / seconds / found[0]
        row["bandwidth_share"] = least_bytes / seconds / found[1]
    return row
