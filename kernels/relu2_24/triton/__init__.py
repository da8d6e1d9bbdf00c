"""The core in Triton: `compressed` and `fused` passes, their `*_kernels`, `groups` of four in registers, `tiles`."""
