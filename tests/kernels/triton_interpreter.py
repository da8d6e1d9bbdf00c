"""Triton's interpreter with the GPU's bf16: imported for its effect, in a process of its own, before any kernel.

As it is, the interpreter truncates where fp32 becomes bf16 and multiplies bf16 operands by their bit patterns. Here it
rounds to nearest even and multiplies values, so that a kernel's result is the GPU's up to the order of its sums.
"""

import os
import sys

assert "triton" not in sys.modules, "TRITON_INTERPRET is looked at when kernels are made"
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def _rounding(x, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(x, source, target, mode)
    values = torch.from_numpy(np.array(x).view(np.float32))
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(x.shape)


def _widened(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _multiplying(self, a, b, *rest):
    return _dot(self, _widened(a), _widened(b), *rest)


interpreter._convert_float = _rounding
interpreter.InterpreterBuilder.create_dot = _multiplying
