"""`elas eval` computes what plain loops over transformers' model do, on every layout.

fp32 throughout: kernels and layouts sum in other orders, some 1e-6 relative in a loss.
"""

import evaluated
import pytest
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

LENGTH, BATCH = 32, 3
LAYOUTS = {
    "DP 2": {},
    "TP 2": {"tensor": 2},
    "TP 2, sequence": {"tensor": 2, "sequence": True},
    "PP 2": {"pipeline": 2},
    "PP 2, two chunks each": {"pipeline": 2, "virtual_pipeline": 2},
}
EXACT = ("tokens", "documents", "batches")


def agree(found: dict, truth: dict) -> None:
    assert {key: found[key] for key in EXACT} == {key: truth[key] for key in EXACT}
    for key in truth.keys() - set(EXACT):
        assert found[key] == pytest.approx(truth[key], rel=1e-5), key


def figures(found: dict) -> dict:
    return {key: value for key, value in found.items() if key not in ("seconds", "tokens_per_s")}


@pytest.fixture(scope="module")
def truth(trained):
    """The figures of each protocol by plain loops."""
    from elas.checkpoint.choose import find
    from elas.hf.build import model_of

    model, documents = model_of(find(trained / "run")), evaluated.documents_of(str(trained / "valid"))
    rows = {"packed": evaluated.packed_rows, "papers": evaluated.truncated_rows}
    return {name: evaluated.by_hand(model, of(documents, LENGTH), BATCH) for name, of in rows.items()}


def test_every_layout_equals_plain_loops(trained, truth):
    before = evaluated.state_of(str(trained))
    cases = [
        {"checkpoint": trained / "run", "protocol": protocol, "batch": BATCH, "parallel": layout}
        for protocol in truth
        for layout in LAYOUTS.values()
    ]
    results = run_ranks(2, evaluated.evaluate_all, cases, timeout=300)
    assert [figures(one) for one in results[0]] == [figures(one) for one in results[1]]
    for case, found in zip(cases, results[0]):
        agree(found, truth[case["protocol"]])
    assert evaluated.state_of(str(trained)) == before, "evaluation writes nothing"


def test_a_foreign_folder_equals_plain_loops(trained, llama):
    """Two copies of a Llama, of which each computes other batches; the longest sequence is the model's."""
    from elas.hf.build import open_folder

    model, documents = open_folder(llama), evaluated.documents_of(str(trained / "valid"))
    case = {"checkpoint": llama, "data": (str(trained / "valid"),), "batch": BATCH}
    found, also = run_ranks(2, evaluated.evaluate_all, [case], timeout=200)
    truth = evaluated.by_hand(model, evaluated.packed_rows(documents, 40), BATCH)
    agree(found[0], truth)
    assert figures(found[0]) == figures(also[0]) and found[0]["bits_per_byte"] > 0
