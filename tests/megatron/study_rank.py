"""One rank of the study: `docs/examples/pretrain_gpt_elas.py`, without CUDA where there is none, and its numbers kept.

    python -m torch.distributed.run --nproc_per_node N tests/megatron/study_rank.py OUT.json ARGUMENTS OF MEGATRON-LM

The last rank writes the losses and gradient norms of every iteration; with STUDY_BATCHES=FILE also the tokens and
labels of each micro-batch that the first saw.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "docs/examples/pretrain_gpt_elas.py"


def _size(name: str, default: int = 1) -> int:
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def main() -> None:
    out = Path(sys.argv.pop(1))
    from elas import host

    if host.prepare_megatron():
        import without_cuda

        without_cuda.install()
        pipeline = _size("--pipeline-model-parallel-size")
        per_chunk = _size("--num-layers-per-virtual-pipeline-stage", 0)
        virtual = _size("--num-layers") // pipeline // per_chunk if per_chunk else None
        without_cuda.groups(_size("--tensor-model-parallel-size"), pipeline, virtual)
    import megatron.training.training as training

    numbers = []
    original = training.training_log

    def training_log(loss_dict, total, rate, iteration, scale, report, skipped, grad_norm, *rest, **more):
        if loss_dict:
            loss = next(iter(loss_dict.values()))
            numbers.append({"iteration": iteration, "loss": float(loss), "norm": float(grad_norm)})
            out.write_text(json.dumps(numbers))
        return original(loss_dict, total, rate, iteration, scale, report, skipped, grad_norm, *rest, **more)

    training.training_log = training_log
    if os.environ.get("STUDY_BATCHES"):
        _keep_batches(Path(os.environ["STUDY_BATCHES"]))
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def _keep_batches(path: Path) -> None:
    import pretrain_gpt as gpt

    kept, original = [], gpt.get_batch

    def get_batch(*args, **kwargs):
        batch = original(*args, **kwargs)
        kept.append((batch[0].clone(), batch[1].clone()))
        torch.save(kept, path)
        return batch

    gpt.get_batch = get_batch


if __name__ == "__main__":
    main()
