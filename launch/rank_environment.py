"""The rank and rendezvous variables of torchrun, the deepspeed launcher and srun, and the network interface to use."""

import os

from elas.errors import ConfigError
from elas.launch import network


def srun_environment() -> None:
    """Under srun without torchrun, set the rank variables of torch.distributed from SLURM's.

    Raises:
        ConfigError: there are several SLURM tasks but no MASTER_ADDR, or a variable is not a number.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or _whole("SLURM_NTASKS", 1, least=1) <= 1:
        return
    if "MASTER_ADDR" not in os.environ:
        fix = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) before srun'
        raise ConfigError("MASTER_ADDR", None, "srun started several tasks without a rendezvous address", fix)
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    for name, slurm in names.items():
        os.environ[name] = str(_whole(slurm))
    os.environ.setdefault("MASTER_PORT", str(20000 + _whole("SLURM_JOB_ID", 0) % 20000))


def is_first_rank() -> bool:
    """Whether this process prints progress: rank 0, or a process without a launcher. Variables may be unchecked yet."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the world size; 0 and 1 without a launcher.

    Raises:
        ConfigError: the variables are not numbers, contradict each other, or some are missing.
    """
    if "RANK" not in os.environ and _whole("WORLD_SIZE", 1, least=1) > 1:
        why = "but no RANK: probably left over from another launcher"
        raise ConfigError("WORLD_SIZE", os.environ["WORLD_SIZE"], why, "unset WORLD_SIZE, or start with a launcher")
    rank, world = _whole("RANK", 0), _whole("WORLD_SIZE", 1, least=1)
    _whole("LOCAL_RANK", 0)
    if rank >= world:
        raise ConfigError("RANK", rank, f"not below WORLD_SIZE={world}", "start with a launcher, or unset both")
    if "RANK" in os.environ:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(name, None, "missing, ranks need it to connect", "start with a launcher, or set it")
        port = os.environ["MASTER_PORT"]
        if not (port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError("MASTER_PORT", port, "is not a port number", "must be from 1 to 65535")
    return rank, world


def choose_interface() -> str | None:
    """On runs of several hosts, select the interface that reaches the others, unless the user has set one.

    Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. Call it after `rank_and_world` and before any process group exists.

    Returns:
        gloo's interface; None if the run appears to have one host, where any interface works.

    Raises:
        ConfigError: MASTER_ADDR does not resolve here, is loopback, or has no route; or the user's interface is wrong.
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
        os.environ["NCCL_SOCKET_IFNAME"] = f"={chosen}"  # `=`: exact match, else NCCL also matches eth01 for eth0
    return chosen


def _several_hosts() -> bool:
    """Whether ranks run on other hosts, according to the variables of torchrun, the deepspeed launcher or srun."""
    if "RANK" not in os.environ:
        return False
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return _whole("WORLD_SIZE", 1, least=1) > _whole(name, least=1)
    return _whole("SLURM_STEP_NUM_NODES", 1, least=1) > 1


def _on_first_host(address: str) -> bool:
    """Whether rank 0 runs on this host.

    True if this host's first rank is 0 (a host's ranks are consecutive), or if torchrun's store, which exists before
    any rank, answers on loopback: then several torchrun agents run on one machine.
    """
    if _whole("RANK", 0) == _whole("LOCAL_RANK", 0):
        return True
    return _torchruns_store() and network.answers(address, int(os.environ["MASTER_PORT"]))


def _torchruns_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _here() -> str:
    return f"on host {os.uname().nodename} (rank {os.environ['RANK']})"


def _check_interface(name: str, found: dict[str, network.Interface]) -> None:
    """Raise `ConfigError` if the user's interface does not exist, or is loopback while other hosts take part."""
    value = os.environ[name]
    if value.startswith("^"):  # NCCL's exclusion list
        return
    exact = name.startswith("GLOO") or value.startswith("=")
    for wanted in value.removeprefix("=").split(","):
        match = [i for i in found.values() if (i.name == wanted if exact else i.name.startswith(wanted))]
        loopback = all(interface.loopback for interface in match)
        if match and (not loopback or all(map(network.is_loopback, network.resolve(os.environ["MASTER_ADDR"])))):
            continue
        why = f"{wanted} is loopback, which reaches no other host," if match else f"there is no interface {wanted}"
        outward = ", ".join(interface.name for interface in network.outward(list(found.values()))) or "one that is up"
        raise ConfigError(name, value, f"{why} {_here()}", f"give {outward}, or unset it")


def _interface_to_master(found: dict[str, network.Interface]) -> network.Interface | None:
    master = os.environ["MASTER_ADDR"]
    addresses = network.resolve(master)
    if not addresses:
        fix = "give an address, or add the name to /etc/hosts there"
        raise ConfigError("MASTER_ADDR", master, f"does not resolve {_here()}", fix)
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
    """The interface if MASTER_ADDR resolves to loopback, as Debian's `127.0.1.1 HOSTNAME` does on the first host.

    Other hosts resolve that name to another address, so the first host may use its only outward interface.
    """
    literal = master in (address, "localhost")
    here = _on_first_host(address)
    if here and literal and _torchruns_store():
        return None  # all agents may be on this machine; an agent on another host finds no store and raises
    if here and not literal and len(outward) == 1:
        return outward[0]
    why = f"is {address} {_here()}: loopback, which other hosts cannot reach"
    fix = "give the first host's address on the network that all hosts share"
    if not literal:
        fix += f", or remove {master} from the 127.* lines of /etc/hosts there"
    if here and not literal and outward:
        names = ", ".join(interface.name for interface in outward)
        fix = f"set GLOO_SOCKET_IFNAME there to the right one of {names}; or {fix}"
    raise ConfigError("MASTER_ADDR", master, why, fix)


def _whole(name: str, default: int | None = None, *, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        value = int(text or "")
    except ValueError:
        value = -1
    if value < least:
        raise ConfigError(name, text, f"must be a whole number, at least {least}", "start with a launcher, or unset it")
    return value
