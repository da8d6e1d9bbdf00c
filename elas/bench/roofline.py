"""What a GPU can do at most, by its data sheet, and the share of it that a measurement reaches."""

from typing import Any

import torch

from elas.plan.hardware import Peak, peak_of


def peaks(device: torch.device) -> Peak | None:
    """FLOP/s and bytes/s of a device; None for a CPU and for GPUs that are not in the table."""
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device))


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
