"""The core in PyTorch's own operations: `compressed`, `fused`, and the emulated `split` backward pass."""
