"""Does it help Muon to balance its factor pairs now and then? `python docs/experiments/rebalance.py --workdir DIR`.

The product of a pair stays what it is under factor_out·A, A⁻¹·factor_in, but Muon's steps do not. Every some steps each
pair becomes U√S, √S·Vᵀ of its product, and its momenta what they would be of those factors. ELAS, 614k tokens, three
seeds, against runs without, into docs/experiments/results/rebalance.json. DIR is that of optimizers.py beside it.

    python docs/experiments/rebalance.py train EVERY [options of elas train]        is one such run, on any layout.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from optimizers import SEEDS, SHORT, Run, best, run_train
from torch import Tensor

from elas.checkpoint.identity import versions

RESULT = Path(__file__).resolve().parent / "results" / "rebalance.json"
EVERY = (0, 100, 20)


def main() -> int:
    """Train with each interval; 0 is never."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), help="default: %(default)s")
    parser.add_argument("--together", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    cases = [(every, seed) for seed in SEEDS for every in EVERY]
    with ThreadPoolExecutor(options.together) as pool:
        found = list(pool.map(lambda case: _train(options.workdir, *case), cases))
    rows = [
        {"every": every, "seeds": list(SEEDS), **{key: [one[key] for one in found if one["every"] == every]
         for key in ("ppl", "pair_condition", "pair_norm_ratio", "effective_rank")}}
        for every in EVERY
    ]  # fmt: skip
    RESULT.write_text(json.dumps({"steps": SHORT, "rows": rows, "versions": versions()}, indent=1) + "\n")
    for row in rows:
        print(f"every {row['every']}: perplexity {statistics.mean(row['ppl']):.2f} {row['ppl']}")
    return 0


def _train(workdir: Path, every: int, seed: int) -> dict:
    run = Run("elas", "muon", *best("elas", "muon"), SHORT, seed)
    folder = workdir / f"rebalance_{every}_{seed}"
    done = run_train(workdir, run, folder, {}, program=(str(Path(__file__).resolve()), "train", str(every)))
    if done.returncode:
        raise SystemExit(f"error: {folder.name}: {done.stderr}")
    metrics, validation = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "validation")
    )
    measured = {name: metrics[-1][name] for name in ("pair_condition", "pair_norm_ratio", "effective_rank")}
    print(f"{folder.name:<20} perplexity {validation[-1]['ppl']:.2f}", flush=True)
    return {"every": every, "ppl": validation[-1]["ppl"], **measured}


def balanced(out: Tensor, into: Tensor, of_out: Tensor, of_into: Tensor) -> list[Tensor]:
    """A pair and its momenta in the gauge in which both factors have the same singular values.

    Args:
        out: `[n, r]`, of full rank.
        into: `[r, k]`, of full rank.
        of_out: the momentum of `out`; it follows gradients, so it changes by A⁻ᵀ where `out` changes by A.
        of_into: the momentum of `into`; by Aᵀ.

    Returns:
        The same four, fp64.
    """
    out, into, of_out, of_into = (one.double() for one in (out, into, of_out, of_into))
    q_out, r_out = torch.linalg.qr(out)
    q_into, r_into = torch.linalg.qr(into.T)
    u, s, vt = torch.linalg.svd(r_out @ r_into.T)
    root = s.sqrt()
    a = torch.linalg.solve_triangular(r_out, u * root, upper=True)
    return [q_out @ (u * root), root[:, None] * (vt @ q_into.T), torch.linalg.solve(a, of_out.T).T, a.T @ of_into]


def train(every: int, arguments: list[str]) -> int:
    """`elas train` that balances all pairs after every so many steps."""
    from elas.cli import run
    from elas.command import exit_status
    from elas.engine.matrices import pairs_of
    from elas.engine.muon_cycle import MuonCycle
    from elas.engine.zero import Fragment, base_state

    end = MuonCycle.end

    @torch.no_grad()
    def balance(self: MuonCycle) -> None:
        state, exchange = base_state(self.engine), self.exchange
        sources = (Fragment.master, lambda fragment: fragment.moment(state, "exp_avg"))
        exchange.begin()
        for owned in exchange.rounds(list(pairs_of(self.engine.chunks))):
            wanted = [([(rows, one) for one in sources for rows in pair], owner) for (pair,), owner in owned]
            mine = exchange.gather(wanted)
            new = balanced(*mine) if mine else []
            for (pair,), owner in owned:
                exchange.spread(pair, new[:2] if owner == exchange.rank else (), owner)
            changed = [(pair, owner) for (pair,), owner in owned]
            for fragment, offset, values in exchange.give_back(changed, new[2:]):
                fragment.moment(state, "exp_avg").narrow(0, offset, values.numel()).copy_(values)
        exchange.publish()

    def end_and_balance(self: MuonCycle, step: int, lr: float):
        if every and step % every == 0:
            balance(self)
        return end(self, step, lr)

    MuonCycle.end = end_and_balance
    return exit_status(run, ["train", *arguments])


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        from elas.command import end_process

        end_process(train(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
