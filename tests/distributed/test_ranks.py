"""The pool of ranks itself: results, failures on one rank or all, time-outs, and that nothing of a job stays behind."""

import os
import time

import pytest
from support import ranks
from support.ranks import RankError, run_ranks

pytestmark = pytest.mark.timeout(300)


def who(word: str) -> tuple[str, int, str]:
    import torch.distributed as dist

    return word, dist.get_rank(), os.environ["WORLD_SIZE"]


def raise_everywhere() -> None:
    raise ValueError("a mistake of the job")


def raise_on_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("a mistake of rank 1")
    dist.barrier()  # nobody else comes


def raise_while_another_sleeps() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("a mistake of rank 1")
    time.sleep(1000)


def wait_for_nobody() -> None:
    import torch.distributed as dist

    print("said before waiting")
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        time.sleep(1000)


def die_on_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        print("last words")
        os._exit(7)
    dist.barrier()


def layouts(tensor: int, pipeline: int) -> tuple[int, int, int]:
    from elas import parallel
    from elas.config import ParallelConfig

    layout = parallel.initialize(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=1)
    return layout.tp, layout.pp, layout.dp


def test_results_come_back_by_rank():
    assert run_ranks(2, who, "hello") == [("hello", 0, "2"), ("hello", 1, "2")]
    assert run_ranks(2, f"{who.__module__}:who", word="named") == [("named", 0, "2"), ("named", 1, "2")]


def test_one_pool_serves_every_layout():
    pids = None
    for tensor, pipeline in ((2, 1), (1, 2), (1, 1), (2, 1)):
        assert run_ranks(2, layouts, tensor, pipeline) == [(tensor, pipeline, 2 // (tensor * pipeline))] * 2
        pids = pids or ranks._pools[2].pids
        assert ranks._pools[2].pids == pids


def test_a_failure_everywhere_keeps_the_pool():
    run_ranks(2, who, "start")
    pids = ranks._pools[2].pids
    with pytest.raises(RankError, match=r"(?s)raise_everywhere.*ValueError: a mistake of the job"):
        run_ranks(2, raise_everywhere)
    assert run_ranks(2, who, "again")[0] == ("again", 0, "2")
    assert ranks._pools[2].pids == pids


def test_a_failure_on_one_rank_ends_the_collective_of_the_others():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 .*ValueError: a mistake of rank 1"):
        run_ranks(2, raise_on_one)
    assert time.monotonic() - start < 30
    assert run_ranks(2, who, "again")[0] == ("again", 0, "2")


def test_what_cannot_be_pickled_is_reported():
    with pytest.raises(RankError, match="pickle"):
        run_ranks(1, "threading:Lock")


@pytest.mark.parametrize(
    ("job", "timeout", "report"),
    [
        (raise_while_another_sleeps, 60, r"(?s)rank 1 of 2.*waiting.*ValueError: a mistake of rank 1"),
        (die_on_one, 60, r"(?s)rank 1 of 2.*status 7.*last words"),
        (wait_for_nobody, 2, r"(?s)no answer within 2 s from ranks \[0, 1\].*said before waiting.*in wait_for_nobody"),
    ],
    ids=["raises", "dies", "times out"],
)
def test_a_rank_that_never_answers_hangs_nobody(job, timeout, report):
    run_ranks(2, who, "start")
    pids = ranks._pools[2].pids
    start = time.monotonic()
    with pytest.raises(RankError, match=report):
        run_ranks(2, job, timeout=timeout)
    assert time.monotonic() - start < 30
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert 2 not in ranks._pools
