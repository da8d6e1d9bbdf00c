"""Each fault of a run on two hosts ends it in time, by name, and leaves nothing behind; see ssh_faults.py."""

import pytest
from corpora import write_corpus
from lab import Lab, Ssh, why_not
from ssh_faults import FAULTS, LIMIT_S, run_fault

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        yield lab, Ssh(lab)
    finally:
        lab.close()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_run(hosts, corpus, tmp_path, name):
    fault = FAULTS[name]
    outcome = run_fault(*hosts, tmp_path, corpus, fault)
    for text in fault.says:
        assert text in outcome.output
    assert outcome.status == fault.status if fault.status else outcome.status != 0, outcome.output
    assert outcome.clean_s < LIMIT_S
    saved = (tmp_path / "run" / "REQUEUE").exists()
    assert saved == name.startswith("launcher-")  # there, all ranks still could
