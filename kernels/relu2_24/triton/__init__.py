"""The core in Triton: passes (`compressed`, `fused`) beside their kernels (`*_kernels`); `groups` of four, `tiles`."""
