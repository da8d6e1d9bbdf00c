"""The model: low-rank linears, the 2:4 FFN, and their provision to Megatron-core.

Importing it changes nothing in the process. Without CUDA call `elas.prepare()` before building anything.
"""
