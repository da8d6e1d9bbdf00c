"""The training state by global names, independent of the layout: fp32 weights and both moments, as views of ZeRO's.

`weight.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` are each a `PartOfTensor` of the whole tensor; names are those of
the whole model. The optimizer's step count, which all parameters share, is a separate number.
"""

import base64
import json
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from elas.checkpoint.storage import MOMENTS
from elas.checkpoint.tensors import PartOfTensor
from elas.checkpoint.weights import parameters_by_name, place_of
from elas.engine.engine import Engine
from elas.engine.zero import base_state, fragments, publish

RANDOM_BYTES = 65536


def capture(engine: Engine) -> dict[str, PartOfTensor]:
    """The tensors that this rank saves, as views of live ones; one rank saves each part of a replicated tensor."""
    return _parts(engine, only_saved=True)


def targets(engine: Engine) -> dict[str, PartOfTensor]:
    """The fp32 weights and moments that this rank's optimizer updates, to load into; the first part of loading."""
    state = base_state(engine)
    for parameter, fragment in fragments(engine).items():
        for moment in engine.moments(parameter):  # ZeRO 0 has none before the first step
            if moment not in state[fragment.flat]:
                state[fragment.flat][moment] = torch.zeros_like(fragment.flat, dtype=torch.float32)
    return _parts(engine)


def zero_moments(tensors: dict[str, PartOfTensor]) -> None:
    """Set the moments among `targets` to zero, in place."""
    for name, tensor in tensors.items():
        if name.startswith(MOMENTS):
            for part in tensor.parts.values():
                part.zero_()


def master_weights(engine: Engine) -> dict[str, PartOfTensor]:
    """The fp32 weights that this rank's optimizer updates, without its moments."""
    return _parts(engine, with_moments=False)


def _parts(engine: Engine, *, with_moments: bool = True, only_saved: bool = False) -> dict[str, PartOfTensor]:
    """The fp32 weights and the moments on this rank, as views."""
    held, state = fragments(engine), base_state(engine)
    tensors = {}
    for number, (name, parameter) in enumerate(parameters_by_name(engine.chunks).items()):
        fragment = held.get(parameter)
        if fragment is None or (only_saved and not _saves(engine, parameter, number)):
            continue
        place = place_of(parameter, engine.layout)
        moments = engine.moments(parameter) if with_moments else ()
        flats = {"weight": fragment.master()} | {moment: fragment.moment(state, moment) for moment in moments}
        tensors |= {f"{kind}.{name}": PartOfTensor.of(place, flat, fragment.start) for kind, flat in flats.items()}
    return tensors


def step_count(engine: Engine) -> int:
    """The optimizer's step count since the last refresh, which bias correction uses."""
    return int(next(iter(base_state(engine).values()))["step"])


def finish_loading(engine: Engine, step: int) -> None:
    """After both parts are loaded: set the step count, and gather the parameters that ZeRO 3 keeps whole."""
    on_device = isinstance(engine.base_optimizer, torch.optim.AdamW)  # fused: counts beside the weights
    state = base_state(engine)
    for fragment in fragments(engine).values():
        entry = state[fragment.flat]
        if torch.is_tensor(entry.get("step")):
            entry["step"].fill_(step)
        elif "step" in entry:  # DeepSpeed's CPU Adam counts in Python
            entry["step"] = step
        else:
            device = fragment.flat.device if on_device else "cpu"
            entry["step"] = torch.full((), float(step), dtype=torch.float32, device=device)
    publish(engine)


def layout_facts(engine: Engine) -> dict[str, int | bool]:
    """The layout, as stored in manifests."""
    layout = engine.layout
    sizes = {"world_size": layout.world, "tensor": layout.tp, "pipeline": layout.pp, "virtual_pipeline": layout.vpp}
    return sizes | {"sequence": layout.sequence_parallel, "data": layout.dp, "zero": engine.stage}


def random_name() -> str:
    """Name of this rank's random streams among the tensors."""
    return f"random.{dist.get_rank():05d}"


def capture_random() -> torch.Tensor:
    """This rank's random streams as JSON text padded with spaces, uint8 `[65536]`."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    facts = {
        "python": [version, list(words), gauss],
        "numpy": numpy_state,
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "megatron": {name: _text(state) for name, state in _megatron_streams().get_states().items()},
    }
    text = json.dumps(facts).encode()
    return torch.frombuffer(bytearray(text.ljust(RANDOM_BYTES)), dtype=torch.uint8)


def restore_random(tensor: torch.Tensor) -> None:
    """Restore random streams from `capture_random`; the layout must be the same."""
    facts = json.loads(tensor.numpy().tobytes())
    version, words, gauss = facts["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = facts["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(_tensor(facts["torch"]))
    if facts["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(facts["cuda"]))
    _megatron_streams().set_states({name: _tensor(text) for name, text in facts["megatron"].items()})


def _megatron_streams() -> Any:
    return get_cuda_rng_tracker()  # annotated as optional, but never None


def _saves(engine: Engine, parameter: torch.nn.Parameter, number: int) -> bool:
    """Whether this rank saves its part; replicas take turns by the parameter's number."""
    layout = engine.layout
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    if not getattr(parameter, "tensor_model_parallel", False) and layout.tp_rank != number % layout.tp:
        return False
    return engine.stage > 0 or layout.dp_rank == number % layout.dp


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
