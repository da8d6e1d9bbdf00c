"""Ranks of the study: `docs/examples/pretrain_gpt_elas.py`, without CUDA where there is none, and its numbers kept.

Ranks are forks of a process that has Megatron-LM and Megatron-core imported, which takes most of the time of ten steps
otherwise. The last rank writes the losses and gradient norms of every iteration, and the loss of each evaluation; the
first, where that is asked for, the tokens and labels of each micro-batch that it saw.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs/examples/pretrain_gpt_elas.py"
TIMEOUT_S = 1800.0


def load(checkout: Path) -> None:
    """Import everything into this process; before any `start`."""
    import elas

    os.environ.update(OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.path.insert(0, str(checkout))
    elas.prepare()
    from elas import accelerator

    if accelerator.prepare_megatron():
        import without_cuda

        without_cuda.install()
    import pretrain_gpt  # noqa: F401
    from megatron.training import pretrain  # noqa: F401

    import elas.megatron


def start(ranks: int, out: Path, words: list[str], log: Path, batches: Path | None) -> list[int]:
    """Run the example on as many forks, to their end.

    Args:
        ranks: how many.
        out: JSON file of numbers.
        words: arguments of Megatron-LM.
        log: what they say.
        batches: file for micro-batches, or None.

    Returns:
        Ranks that failed, or did not end in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {}
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            _become(rank, ranks, port, out, words, log, batches)
        running[pid] = rank
    failed, end = [], time.monotonic() + TIMEOUT_S
    while running:
        for pid, rank in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
                failed += [rank] if status else []
        if running and (failed or time.monotonic() > end):
            failed += [rank for rank in running.values() if not failed]
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            break
        time.sleep(0.1)
    return failed


def _become(rank: int, ranks: int, port: int, out: Path, words: list[str], log: Path, batches: Path | None) -> None:
    """This process is a rank from here on; never returns."""
    status = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [str(EXAMPLE), *words]
        _pretrain(out, batches)
        status = 0
    except SystemExit as ended:  # Megatron-LM's way to end at --exit-interval
        status = int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _pretrain(out: Path, batches: Path | None) -> None:
    import megatron.training.training as training

    from elas import accelerator

    if not accelerator.has_cuda():
        import without_cuda

        pipeline = _size("--pipeline-model-parallel-size")
        per_chunk = _size("--num-layers-per-virtual-pipeline-stage", 0)
        virtual = _size("--num-layers") // pipeline // per_chunk if per_chunk else None
        without_cuda.groups(_size("--tensor-model-parallel-size"), pipeline, virtual)
    _keep_numbers(training, out)
    if batches is not None:
        _keep_batches(batches)
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def _size(name: str, default: int = 1) -> int:
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def _keep_numbers(training, out: Path) -> None:
    kept = {"steps": [], "evaluated": []}
    log, evaluate = training.training_log, training.evaluate

    def training_log(loss_dict, total, rate, iteration, scale, report, skipped, grad_norm, *rest, **more):
        if loss_dict:
            loss = float(next(iter(loss_dict.values())))
            kept["steps"].append({"iteration": iteration, "loss": loss, "norm": float(grad_norm)})
            out.write_text(json.dumps(kept))
        return log(loss_dict, total, rate, iteration, scale, report, skipped, grad_norm, *rest, **more)

    def evaluate_and_keep(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        if found[0]:
            kept["evaluated"].append(float(next(iter(found[0].values()))))
            out.write_text(json.dumps(kept))
        return found

    training.training_log, training.evaluate = training_log, evaluate_and_keep


def _keep_batches(path: Path) -> None:
    import pretrain_gpt as gpt
    import torch

    kept, original = [], gpt.get_batch

    def get_batch(*args, **kwargs):
        batch = original(*args, **kwargs)
        kept.append((batch[0].clone(), batch[1].clone()))
        torch.save(kept, path)
        return batch

    gpt.get_batch = get_batch
