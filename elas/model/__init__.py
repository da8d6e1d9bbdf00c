"""The model: low-rank linears and the 2:4 FFN as layers of Megatron-core.

Importing has no side effects. Without CUDA, call `elas.prepare()` before building a model.
"""
