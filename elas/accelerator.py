"""Lets Megatron-core and DeepSpeed run without CUDA; all workarounds for this are in this file.

Importing it has no effect. `prepare()`, which commands and `elas.parallel.initialize` call, changes this process: it
sets our extensions folder and DeepSpeed's accelerator, silences irrelevant warnings, and, if torch sees no CUDA device,
installs replacements for CUDA. Megatron-core 0.16 assumes CUDA in several places, so then

1. `torch.cuda.current_device()` returns the CPU device, since Megatron passes its result as `device=`;
2. `device="cuda"` arguments and `.cuda()` mean the CPU, and memory is not pinned (`CudaMeansCpu`, a torch function
   mode);
3. CPU tensors report the type `'torch.cuda.FloatTensor'` to Megatron only, whose optimizers look for it;
4. streams, events and synchronisation, which its DDP and pipelines use, do nothing;
5. its RNG tracker forks CPU generators (`CpuRngTracker`), and the CUDA generator's state, which recomputation and
   checkpoints save, is that of the CPU.

`shared_gloo_groups()` reduces the cost of gloo groups. The ops that DeepSpeed compiles are handled in
`elas.extensions`.
"""

import contextlib
import os
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from elas.errors import UserError
from elas.extensions import extensions_dir

_mode: "CudaMeansCpu | None" = None


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This process's current CUDA device, or the CPU without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def gpus_here() -> int:
    """GPUs of this host that this process sees."""
    return torch.cuda.device_count() if has_cuda() else 0


def check_gpus(ranks: int) -> None:
    """Check that a host with GPUs has one for each of its ranks; without GPUs any number of ranks can run.

    Raises:
        UserError: it has fewer.
    """
    gpus = gpus_here()
    if 0 < gpus < ranks:
        have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        fix = "start fewer ranks, or hide the GPUs to train on the CPU: CUDA_VISIBLE_DEVICES=''"
        raise UserError(f"{ranks} ranks on a host with {have}: NCCL takes one rank for each; {fix}")


def peak_memory() -> int:
    """Peak memory of this process in bytes: reserved on its CUDA device, without CUDA resident in host memory."""
    if has_cuda():
        return torch.cuda.max_memory_reserved()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def backend() -> str:
    """The torch.distributed backend: nccl with CUDA, gloo without."""
    return "nccl" if has_cuda() else "gloo"


class CudaMeansCpu(TorchFunctionMode):
    """Replaces CUDA devices (`"cuda"`, `"cuda:0"`, `torch.device`) and `Tensor.cuda()` by the CPU; ignores pinning."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call `func` with every CUDA device replaced."""
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            name = func(args[0])
            return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **(kwargs or {}))


class NoStream:
    """A replacement for CUDA streams and events on the CPU, where all work runs in order."""

    def __init__(self, *_args, **_kwargs):
        pass

    def _nothing(self, *_args, **_kwargs) -> None:
        """Do nothing: all earlier work is complete."""

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: "NoStream | None" = None) -> "NoStream":
        """Return an event, which counts as complete."""
        return event or NoStream()

    def query(self) -> bool:
        """Whether all work is complete: always True."""
        return True


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class CpuRngTracker:
    """Megatron's `CudaRNGStatesTracker` over CPU generator states: named random streams that `fork` switches to."""

    def __init__(self):
        self.reset()

    def is_initialized(self) -> bool:
        """Whether any stream was added."""
        return bool(self._states)

    def reset(self) -> None:
        """Remove all streams."""
        self._states: dict[str, torch.Tensor] = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        """Generator states (uint8 tensors) by name."""
        return dict(self._states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace all streams."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Add a stream seeded with `seed`."""
        self._states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng"):
        """Run the body with stream `name`, then restore the previous generator state."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def prepare() -> bool:
    """Prepare this process for Megatron-core and DeepSpeed; may be called repeatedly. Exported as `elas.prepare`.

    Returns:
        True if the CUDA replacements are installed, False if CUDA is available.
    """
    global _mode
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_cuda() else "cpu")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    for message in (
        "Apex is not installed",
        "Transformer Engine and Apex are not installed",
        ".*pynvml.*",
        "full scope is deprecated",
        ".*reduce_scatter_tensor. is deprecated",
        ".*all_gather_into_tensor. is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    if has_cuda():
        return False
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    if _mode is None:
        torch.cuda.current_device = lambda: torch.device("cpu")
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.Stream = torch.cuda.Event = NoStream
        torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: NoStream()
        torch.cuda.stream = lambda stream: contextlib.nullcontext()
        for module in (torch.cuda, torch.cuda.random):
            vars(module).update(get_rng_state=_get_rng_state, set_rng_state=_set_rng_state)
        _mode = CudaMeansCpu()
        autograd: Any = torch.autograd  # the name that is replaced is private
        autograd._engine_run_backward = _in_mode(_mode, autograd._engine_run_backward)
        _mode.__enter__()
    return True


def _in_mode(mode: CudaMeansCpu, run_backward: Callable) -> Callable:
    """Run the backward engine inside the mode: torch disables it during `backward`, but recomputation needs it."""

    def run(*args, **kwargs):
        with mode:
            return run_backward(*args, **kwargs)

    return run


def _get_rng_state(device: object = "cuda", **_options) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = "cuda", **_options) -> None:
    torch.set_rng_state(new_state)


def prepare_megatron() -> bool:
    """Call `prepare()` and patch the random streams of Megatron-core, which this imports.

    Returns:
        As `prepare`.
    """
    if not prepare():
        return False
    from megatron.core.tensor_parallel import random as megatron_random

    # torch's own function queues every state until CUDA is initialised, which never happens here.
    megatron_random._set_cuda_rng_state = _set_rng_state
    return True


_groups: dict[tuple, object] = {}


@contextlib.contextmanager
def shared_gloo_groups():
    """Within this context, `torch.distributed.new_group` reuses the gloo group of the same ranks.

    Megatron creates about thirty groups, most of them of the same few sets of ranks. Each gloo group keeps polling
    threads that cost about 0.2 % of a core each, for as long as the process lives (even after the group is destroyed,
    if its peers are not). Has no effect with CUDA: NCCL creates groups on first use.
    """
    if has_cuda():
        yield
        return
    import torch.distributed as dist

    original, world = dist.new_group, dist.group.WORLD
    for key in [key for key in _groups if key[0] is not world]:  # groups of an earlier, destroyed default group
        del _groups[key]

    def new_group(ranks=None, *args, **kwargs):
        key = (world, None if ranks is None else tuple(ranks))
        if key not in _groups:
            _groups[key] = original(ranks, *args, **kwargs)
        return _groups[key]

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = original


def seed_model_parallel(seed: int, tp_rank: int, pp_rank: int) -> None:
    """Seed torch and Megatron's model-parallel random streams.

    Args:
        seed: the run's seed.
        tp_rank: tensor-parallel rank; only the model-parallel stream differs between these.
        pp_rank: pipeline rank; all streams differ between stages.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    torch.manual_seed(seed + 100 * pp_rank)
    if has_cuda():
        megatron_random.model_parallel_cuda_manual_seed(seed + 100 * pp_rank)
        return
    tracker = CpuRngTracker()
    tracker.add("data-parallel-rng", seed + 100 * pp_rank)
    tracker.add("model-parallel-rng", seed + 2718 + 100 * pp_rank + tp_rank)
    tracker.add("expert-parallel-rng", seed + 1024 + 100 * pp_rank + tp_rank)
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def processor() -> str:
    """Name of this machine's CPU model."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
