"""Which rank this process is, from the variables that torchrun, the deepspeed launcher or srun set."""

import os

from elas.errors import ConfigError


def srun_environment() -> None:
    """Under srun without torchrun, name the rank variables as torch.distributed wants them.

    Raises:
        ConfigError: several SLURM tasks, but no MASTER_ADDR to meet at; or a variable that is no number.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or _whole("SLURM_NTASKS", 1, least=1) <= 1:
        return
    if "MASTER_ADDR" not in os.environ:
        fix = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) before srun'
        raise ConfigError("MASTER_ADDR", None, "srun started several tasks that do not know where to meet", fix)
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    for name, slurm in names.items():
        os.environ[name] = str(_whole(slurm))
    os.environ.setdefault("MASTER_PORT", str(20000 + _whole("SLURM_JOB_ID", 0) % 20000))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; 0 and 1 without a launcher.

    Raises:
        ConfigError: the variables are no numbers, contradict each other, or some are missing.
    """
    if "RANK" not in os.environ and _whole("WORLD_SIZE", 1, least=1) > 1:
        why = "but no RANK: some launcher's variable is left over"
        raise ConfigError("WORLD_SIZE", os.environ["WORLD_SIZE"], why, "unset WORLD_SIZE, or start with a launcher")
    rank, world = _whole("RANK", 0), _whole("WORLD_SIZE", 1, least=1)
    _whole("LOCAL_RANK", 0)
    if rank >= world:
        raise ConfigError("RANK", rank, f"not below WORLD_SIZE={world}", "start with a launcher, or unset both")
    if "RANK" in os.environ:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(name, None, "the ranks do not know where to meet", "start with a launcher, or set it")
        port = os.environ["MASTER_PORT"]
        if not (port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError("MASTER_PORT", port, "is no port", "give a number from 1 to 65535")
    return rank, world


def _whole(name: str, default: int | None = None, *, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        value = int(text)
    except (TypeError, ValueError):
        value = -1
    if value < least:
        raise ConfigError(name, text, "is no rank or number of ranks", "start with a launcher, or unset it")
    return value
