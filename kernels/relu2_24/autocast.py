"""What autocast means here: the dtype it asks for, and doing without it inside.

`torch.amp.custom_fwd` does the same for one device and one dtype that are known when a function is written.
"""

import contextlib

import torch

from elas.errors import UserError


def _enabled(device: torch.device) -> bool:
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on this device; None where it is off.

    Raises:
        UserError: it is fp16.
    """
    if not _enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float16:
        raise UserError(
            "ffn_core does not take autocast in float16: relu² overflows above 256; use autocast in bfloat16 "
            "(Hugging Face: bf16=True), or autocast(enabled=False) around the layer"
        )
    return dtype


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it, products have the dtype of their operands, whatever autocast says outside."""
    return torch.autocast(device.type, enabled=False) if _enabled(device) else contextlib.nullcontext()
