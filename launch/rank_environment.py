"""Which rank this process is, from the variables that torchrun, the deepspeed launcher or srun set."""

import os

from elas.errors import ConfigError
from elas.launch import network


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


def is_first_rank() -> bool:
    """Whether this process shows what goes on, before its variables are checked: rank 0, or no rank of a launcher's."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


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


def choose_interface() -> str | None:
    """For a run of several hosts, tell gloo and NCCL the interface that leads to the others, unless the user has.

    Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; called after `rank_and_world`, before any process group.

    Returns:
        gloo's interface; None when the run has one host, as far as can be seen, and any will do.

    Raises:
        ConfigError: MASTER_ADDR is unknown here, or loopback, or without a route; or the user's interface cannot be.
    """
    if not _several_hosts():
        return None
    found = {interface.name: interface for interface in network.interfaces()}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if os.environ.get(name):
            _check_interface(name, found)
    if not os.environ.get("GLOO_SOCKET_IFNAME"):
        interface = _interface_to_master(found)
        if interface is None:
            return None
        os.environ["GLOO_SOCKET_IFNAME"] = interface.name
    chosen = os.environ["GLOO_SOCKET_IFNAME"]
    if not os.environ.get("NCCL_SOCKET_IFNAME"):
        os.environ["NCCL_SOCKET_IFNAME"] = f"={chosen}"  # NCCL would take eth01 for eth0, too
    return chosen


def _several_hosts() -> bool:
    """Whether ranks run on other hosts: what torchrun, the deepspeed launcher, or srun alone says."""
    if "RANK" not in os.environ:
        return False
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return _whole("WORLD_SIZE", 1, least=1) > _whole(name, least=1)
    return _whole("SLURM_STEP_NUM_NODES", 1, least=1) > 1


def _on_first_host(address: str) -> bool:
    """Whether rank 0 runs here, or torchrun, whose store is there before any rank, answers on loopback.

    The latter are several agents of torchrun on one machine. Ranks of a host follow each other.
    """
    if _whole("RANK", 0) == _whole("LOCAL_RANK", 0):
        return True
    return _torchruns_store() and network.answers(address, int(os.environ["MASTER_PORT"]))


def _torchruns_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _here() -> str:
    return f"on host {os.uname().nodename} (rank {os.environ['RANK']})"


def _check_interface(name: str, found: dict[str, network.Interface]) -> None:
    """Refuse a user's interface that is not there, or is loopback."""
    value = os.environ[name]
    if value.startswith("^"):  # NCCL: any but these
        return
    exact = name.startswith("GLOO") or value.startswith("=")
    for wanted in value.removeprefix("=").split(","):
        match = [i for i in found.values() if (i.name == wanted if exact else i.name.startswith(wanted))]
        loopback = all(interface.loopback for interface in match)
        if match and (not loopback or all(map(network.is_loopback, network.resolve(os.environ["MASTER_ADDR"])))):
            continue
        why = f"{wanted} is loopback, which leads to no other host," if match else f"there is no interface {wanted}"
        outward = ", ".join(interface.name for interface in network.outward(list(found.values()))) or "one that is up"
        raise ConfigError(name, value, f"{why} {_here()}", f"give {outward}, or unset it")


def _interface_to_master(found: dict[str, network.Interface]) -> network.Interface | None:
    master = os.environ["MASTER_ADDR"]
    addresses = network.resolve(master)
    if not addresses:
        fix = "give an address, or add the name to /etc/hosts there"
        raise ConfigError("MASTER_ADDR", master, f"is not known {_here()}", fix)
    elsewhere = [address for address in addresses if not network.is_loopback(address)]
    if not elsewhere:
        return _interface_of_first_host(master, addresses[0], network.outward(list(found.values())))
    for address in elsewhere:
        local = network.local_address(address)
        for interface in found.values():
            if local in interface.addresses and not interface.loopback:
                return interface
    why = f"({elsewhere[0]}) cannot be reached {_here()}: no route"
    raise ConfigError("MASTER_ADDR", master, why, "give an address on a network that all hosts share")


def _interface_of_first_host(master: str, address: str, outward: list[network.Interface]) -> network.Interface | None:
    """Debian's `127.0.1.1 HOSTNAME` on the first host itself: other hosts know the name by another address."""
    literal = master in (address, "localhost")
    here = _on_first_host(address)
    if here and literal and _torchruns_store():
        return None  # its agents may all be on this machine; one that is not will find no store, and refuse
    if here and not literal and len(outward) == 1:
        return outward[0]
    why = f"is {address} {_here()}: loopback, where no other host gets an answer"
    fix = "give the first host's address on the network that all hosts share"
    if not literal:
        fix += f", or take {master} off the 127.* lines of /etc/hosts there"
    if here and not literal and outward:
        names = ", ".join(interface.name for interface in outward)
        fix = f"set GLOO_SOCKET_IFNAME there to the right one of {names}; or {fix}"
    raise ConfigError("MASTER_ADDR", master, why, fix)


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
