"""Each fault of a run on two hosts ends it in time, by name, and leaves nothing behind; see ssh_faults.py."""

import queue
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import Lab, Ssh, why_not
from ssh_faults import FAULTS, LIMIT_S, run_fault
from support.corpora import write_corpus

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]


LANES = 3
"""Faults at a time, each in a lab of its own: most of a fault's time is waiting."""


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What came of every fault that is asked for, by name: a future."""
    here = [item for item in request.session.items if item.module is request.module]
    names = [item.callspec.params["name"] for item in here]
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    labs = [Lab(tmp_path_factory.mktemp("lab")) for _ in range(min(LANES, len(names)))]
    free = queue.SimpleQueue()
    for lab in labs:
        free.put((lab, Ssh(lab)))

    def run(name: str):
        lane = free.get()
        try:
            return run_fault(*lane, tmp_path_factory.mktemp(name), corpus, FAULTS[name])
        finally:
            free.put(lane)

    pool = ThreadPoolExecutor(len(labs))
    try:
        yield {name: pool.submit(run, name) for name in names}
    finally:
        pool.shutdown(cancel_futures=True)
        for lab in labs:
            lab.close()


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.in_suite])
def test_a_fault_ends_the_run(outcomes, name):
    fault, outcome = FAULTS[name], outcomes[name].result()
    for text in fault.says:
        assert text in outcome.output
    assert "exits with return code" not in outcome.output  # the deepspeed launcher's own line, with all arguments
    assert outcome.status == fault.status if fault.status else outcome.status != 0, outcome.output
    assert outcome.clean_s < LIMIT_S
    assert outcome.saved == name.startswith("launcher-")  # there, all ranks still could
