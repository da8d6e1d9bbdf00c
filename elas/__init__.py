"""ELAS: pre-training of low-rank transformers with 2:4 activation sparsity (arXiv 2605.03667).

The library is imported part by part (`elas.config`, `elas.model`, `elas.train` …); importing `elas` itself is cheap
and pulls in neither torch nor Megatron-core.
"""

__version__ = "0.1.0"
