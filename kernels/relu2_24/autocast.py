"""The dtype that autocast requests, and turning it off inside the operation.

`torch.amp.custom_fwd` requires device and dtype when a function is defined; here they are those of the call.
"""

import contextlib

import torch

from elas.errors import UserError

# Found once: Dynamo of torch 2.11 does not trace the question.
_KINDS = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def _enabled(device: torch.device) -> bool:
    return device.type in _KINDS and torch.is_autocast_enabled(device.type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast requests on this device; None if it is off.

    Raises:
        UserError: autocast in float16.
    """
    if not _enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float16:
        raise UserError(
            "ffn_core does not support autocast in float16: relu² overflows above 256; use autocast in bfloat16 "
            "(Hugging Face: bf16=True), or autocast(enabled=False) around the layer"
        )
    return dtype


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which products have the dtype of their operands, also inside an autocast region."""
    return torch.autocast(device.type, enabled=False) if _enabled(device) else contextlib.nullcontext()
