"""Which rank this is, from whatever a launcher left in the environment."""

import pytest

from elas.command import exit_status
from elas.errors import ConfigError
from elas.launch.rank_environment import rank_and_world, srun_environment

TORCH = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
SLURM = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID"]


@pytest.fixture
def environment(monkeypatch):
    for name in (*TORCH, *SLURM):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def given(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return given


def test_alone_and_under_a_launcher(environment):
    assert rank_and_world() == (0, 1)
    environment(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")
    assert rank_and_world() == (3, 4)


def test_srun_variables_are_taken_over(environment):
    environment(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NTASKS="8", SLURM_JOB_ID="70000", MASTER_ADDR="node0")
    srun_environment()
    assert rank_and_world() == (5, 8)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, "but no RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "not below WORLD_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR=None"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "many"}, "SLURM_NTASKS='many'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "MASTER_ADDR=None"),
        ({"SLURM_PROCID": "", "SLURM_NTASKS": "2", "MASTER_ADDR": "a"}, "SLURM_PROCID=''"),
    ],
)
def test_garbage_is_one_line(environment, values, named):
    environment(**values)
    with pytest.raises(ConfigError) as caught:
        srun_environment()
        rank_and_world()
    assert named in str(caught.value)


@pytest.mark.parametrize("local_rank, printed", (("0", True), ("z", True), ("", True), ("1", False)))
def test_a_mistake_is_printed_by_one_rank_of_each_machine(environment, local_rank, printed, capsys, monkeypatch):
    from elas import cli, command

    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    environment(LOCAL_RANK=local_rank)
    assert exit_status(cli.run, ["tarin"]) == 2
    assert bool(capsys.readouterr().err) == printed
