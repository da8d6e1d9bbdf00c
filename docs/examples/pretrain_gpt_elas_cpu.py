"""`pretrain_gpt_elas.py` on a machine without CUDA, to try a script before it gets GPUs: same arguments, gloo, slow.

Needs a checkout of Megatron-LM core_v0.16.1 on PYTHONPATH, this repository, and `pip install six`; docs/megatron.md has
a whole command line.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Replace what needs CUDA, make the process groups, train."""
    import elas

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-LM asks for it under tensor parallelism
    elas.prepare()
    sys.path += [str(ROOT / "tests/megatron"), str(Path(__file__).parent)]
    import without_cuda

    without_cuda.install()
    tensor, pipeline = (_size(f"--{kind}-model-parallel-size") for kind in ("tensor", "pipeline"))
    per_chunk = _size("--num-layers-per-virtual-pipeline-stage", 0)
    virtual = _size("--num-layers") // pipeline // per_chunk if per_chunk else None
    without_cuda.groups(tensor, pipeline, virtual)
    import pretrain_gpt_elas

    pretrain_gpt_elas.main()


def _size(name: str, default: int = 1) -> int:
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


if __name__ == "__main__":
    main()
