"""Which interface gloo is given, and mistakes that would have ranks wait for each other on different networks."""

import os
import socket

import pytest

from elas.errors import ConfigError
from elas.launch import network
from elas.launch.network import Interface
from elas.launch.rank_environment import choose_interface

LO = Interface("lo", ("127.0.0.1", "::1"), True, True, 65536)
ETH0 = Interface("eth0", ("10.0.0.2", "fe80::1"), True, False, 1500)
DOCKER = Interface("docker0", ("172.17.0.1",), True, False, 1500)
IB0 = Interface("ib0", ("10.1.0.2",), True, False, 4092)
UNPLUGGED = Interface("eth1", ("10.2.0.2",), False, False, 1500)
VARIABLES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_NODES",
             "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME",
             "NCCL_SOCKET_IFNAME"]  # fmt: skip
FIRST = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1",
         "MASTER_PORT": "1"}  # fmt: skip
SECOND = {**FIRST, "RANK": "1"}


@pytest.fixture
def host(monkeypatch):
    """A host with given variables, interfaces, and addresses by name."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def given(variables: dict, found=(LO, ETH0), known=None, local="10.0.0.2"):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        known = {"n1": ["10.0.0.1"], "localhost": ["127.0.0.1"], **(known or {})}
        monkeypatch.setattr(network, "interfaces", lambda: list(found))
        monkeypatch.setattr(network, "resolve", lambda name: known.get(name, [name] if name[0].isdigit() else []))
        monkeypatch.setattr(network, "local_address", lambda address: local)

    return given


def test_this_machines_interfaces():
    found = {interface.name: interface for interface in network.interfaces()}
    assert found["lo"].loopback and "127.0.0.1" in found["lo"].addresses
    assert network.owner("127.0.0.1") == found["lo"]
    assert network.local_address("127.0.0.1") == "127.0.0.1"
    assert not network.resolve("no-such-host.invalid")


def test_the_interface_that_leads_to_the_master(host):
    host(SECOND, found=(LO, DOCKER, IB0, ETH0))
    assert choose_interface() == "eth0"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth0"


@pytest.mark.parametrize(
    "variables",
    [{}, {**FIRST, "LOCAL_WORLD_SIZE": "2"}, {**FIRST, "WORLD_SIZE": "1"}, {"RANK": "0", "SLURM_STEP_NUM_NODES": "1"}],
)
def test_one_host_needs_none(host, variables):
    host(variables)
    assert choose_interface() is None
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_srun_and_deepspeed_say_it_in_their_own_way(host):
    host({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "n1"})
    assert choose_interface() == "eth0"
    host({"LOCAL_SIZE": "2", "GLOO_SOCKET_IFNAME": ""})
    assert choose_interface() is None


def test_a_users_choice_stays(host):
    host({**SECOND, "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}, found=(LO, ETH0, IB0))
    assert choose_interface() == "ib0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib"


def test_debians_line_on_the_first_host(host):
    host(FIRST, found=(LO, DOCKER, UNPLUGGED, ETH0), known={"n1": ["127.0.1.1"]})
    assert choose_interface() == "eth0"


def test_debians_line_beside_the_right_one(host):
    host(FIRST, found=(LO, IB0, ETH0), known={"n1": ["127.0.1.1", "10.0.0.2"]})
    assert choose_interface() == "eth0"


@pytest.mark.parametrize("master, chosen", [("127.0.0.1", None), ("n1", "eth0")])
def test_several_agents_of_torchrun_on_one_machine(host, master, chosen):
    """The second agent's rank finds the store on loopback: it is on the first host, too."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = str(store.getsockname()[1])
        torchrun = {"MASTER_ADDR": master, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for first in (FIRST, SECOND):
            host({**first, **torchrun, "GLOO_SOCKET_IFNAME": ""}, known={"n1": ["127.0.0.1"]})
            assert choose_interface() == chosen
    host({"GLOO_SOCKET_IFNAME": ""}, known={"n1": ["127.0.0.1"]})
    with pytest.raises(ConfigError, match=r"is 127\.0\.0\.1"):  # no store here
        choose_interface()


@pytest.mark.parametrize(
    "variables, found, known, expected",
    [
        ({**SECOND, "MASTER_ADDR": "nowhere"}, (LO, ETH0), {}, ["MASTER_ADDR='nowhere': does not resolve", "(rank 1)"]),
        (SECOND, (LO, ETH0), {"n1": ["127.0.1.1"]}, ["MASTER_ADDR='n1': is 127.0.1.1 on", "remove n1 from the 127"]),
        ({**SECOND, "MASTER_ADDR": "localhost"}, (LO, ETH0), {}, ["is 127.0.0.1", "give the first host's address"]),
        ({**FIRST, "MASTER_ADDR": "127.0.0.1"}, (LO, ETH0), {}, ["is 127.0.0.1", "give the first host's address"]),
        (FIRST, (LO, ETH0, IB0), {"n1": ["127.0.1.1"]}, ["set GLOO_SOCKET_IFNAME there to the right one of eth0, ib0"]),
        (FIRST, (LO,), {"n1": ["127.0.1.1"]}, ["is 127.0.1.1"]),
        (SECOND, (LO, IB0), {}, ["(10.0.0.1) cannot be reached", "no route"]),
        ({**SECOND, "GLOO_SOCKET_IFNAME": "eth9"}, (LO, ETH0), {}, ["GLOO_SOCKET_IFNAME='eth9'", "give eth0"]),
        ({**SECOND, "GLOO_SOCKET_IFNAME": "eth"}, (LO, ETH0), {}, ["there is no interface eth"]),
        ({**SECOND, "GLOO_SOCKET_IFNAME": "lo"}, (LO, ETH0), {}, ["lo is loopback"]),
        ({**SECOND, "NCCL_SOCKET_IFNAME": "=eth"}, (LO, ETH0), {}, ["NCCL_SOCKET_IFNAME='=eth'"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_that_names_host_and_fix(host, variables, found, known, expected):
    host(variables, found, known)
    with pytest.raises(ConfigError) as caught:
        choose_interface()
    message = str(caught.value)
    assert all(words in message for words in [*expected, os.uname().nodename]), message
