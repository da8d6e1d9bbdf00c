"""ELAS: pre-training of low-rank transformers with 2:4 activation sparsity (arXiv 2605.03667).

The library is imported part by part (`elas.config`, `elas.model`, `elas.train` …); importing `elas` itself is cheap
and pulls in neither torch nor Megatron-core.
"""

__version__ = "0.1.0"


def prepare() -> bool:
    """Make this process ready to train: our extensions folder, quiet imports, and shims where there is no CUDA.

    Nothing else changes the process: importing any part of the library leaves it as it is. Every `elas` command and
    `elas.parallel.initialize` call this; a script of your own on a machine without CUDA calls it first.

    Returns:
        True if shims for want of CUDA are in place; see `elas.accelerator`.
    """
    from elas import accelerator

    return accelerator.prepare()
