"""Study: the real `pretrain` of Megatron-LM over our layers, on every layout, and the same model in `elas train`.

    python tests/megatron/study.py MEGATRON_LM_CHECKOUT [--json docs/experiments/results/megatron.json] [--only tp2,dp2]

Needs a checkout of Megatron-LM core_v0.16.1 and the package `six`. Runs on a CPU with gloo, or on GPUs; 10 minutes.
Ten steps, 2:4 from the third on. What must hold, else the exit status is 1:

- every layout: losses within 2e-5 of one rank's, and gradient norms within 5e-4;
- a checkpoint of tensor × pipeline, read in other layouts: the next loss within 1e-6 of the run that was not stopped,
  and the four after that, which need the moments, within 2e-5; evaluated, it is as sparse as when it was written;
- `elas train`'s engine, from the same weights and on the same batches: as for layouts; and so where either goes on
  from the other's checkpoint, by `elas checkpoint export` and `import`.

With `--only`, rows of other runs that the result file has stay in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import study_rank

HERE = Path(__file__).parent
STEPS, BATCH, MICRO, LENGTH, VOCAB = 10, 8, 2, 64, 511
RATE, DENSE_STEPS, RANK = 1e-3, 2, 32
LOSS_BOUND, NORM_BOUND = 2e-5, 5e-4
SIZES = {"num-layers": 4, "hidden-size": 128, "num-attention-heads": 4, "ffn-hidden-size": 512, "seq-length": LENGTH}
_ALWAYS = (
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --squared-relu "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --transformer-impl local "
    "--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-dropout-fusion --no-rope-fusion --lr-decay-style constant --clip-grad 1.0 --weight-decay 0 "
    "--adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --tokenizer-type NullTokenizer --split 90,10,0 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --log-interval 1 --seed 1234 "
    "--ckpt-format torch_dist --layout-independent-init --low-rank lowrank"
)
ALWAYS = _ALWAYS.split()
LAYOUTS: dict[str, tuple[int, str]] = {
    "tp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": (2, ""),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2 dp2": (4, "--tensor-model-parallel-size 2"),
    "dp2, distributed optimizer, both overlaps, small buckets": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100000",
    ),
    "dp2, distributed optimizer, both overlaps": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 150000",
    ),
    "tp2 sp dp2, distributed optimizer": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "pp2, recomputed, watched": (
        2,
        "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1 --sparsity-tokens 64",
    ),
}
STOPS = 5  # where checkpoints are written
EVALUATES = f"--eval-interval {STOPS} --eval-iters 2"
SAVED = {  # options of both sides
    "": "",
    ", distributed optimizer": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
}


class Study:
    """Runs in one folder, with one corpus."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.corpus = folder / "corpus"
        self.runs = 0

    def write_corpus(self) -> None:
        """Documents of tokens by Zipf's law, half of them a fixed successor of the last."""
        import torch

        import elas

        elas.prepare()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(f"{self.corpus}.bin")
        generator = torch.Generator().manual_seed(1)
        weights = 1.0 / torch.arange(1, VOCAB + 1)
        for _ in range(200):
            tokens = torch.multinomial(weights, 300, replacement=True, generator=generator)
            tokens[1::2] = (tokens[::2] * 7 + 3) % VOCAB
            builder.add_document(tokens.to(torch.int32), [300])
        builder.finalize(f"{self.corpus}.idx")

    def pretrain(self, ranks: int, options: str, batches: Path | None = None) -> dict:
        """One run: `steps`, loss and norm of each iteration, and `evaluated`, losses of evaluations."""
        self.runs += 1
        out = self.folder / f"run{self.runs}.json"
        sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
        words = [*sizes, *ALWAYS, "--max-position-embeddings", str(LENGTH), "--vocab-size", str(VOCAB)]
        words += ["--rank", str(RANK), "--micro-batch-size", str(MICRO), "--global-batch-size", str(BATCH)]
        words += ["--train-iters", str(STEPS), "--lr", str(RATE)]
        words += [] if "--no-sparsity-24" in options else ["--dense-steps", str(DENSE_STEPS)]
        words += ["--data-path", str(self.corpus), "--data-cache-path", str(self.folder / "cache"), *options.split()]
        if "--eval-iters" not in options:
            words += ["--eval-iters", "0", "--eval-interval", str(STEPS)]
        import torch

        if not torch.cuda.is_available():
            words += ["--distributed-backend", "gloo", "--disable-gloo-process-groups"]
        log = out.with_suffix(".log")
        failed = study_rank.start(ranks, out, words, log, batches)
        said = log.read_text(errors="replace")
        if failed or not out.exists():
            tail = "\n".join(said.splitlines()[-40:])
            raise RuntimeError(f"{options or 'one rank'}: failed on ranks {failed}\n{tail}")
        if "--sparsity-tokens" in options and "dropped:" not in said:
            raise RuntimeError(f"{options}: Megatron's log does not say what 2:4 drops")
        return json.loads(out.read_text())

    def elas_train(self, batches: Path, run: str) -> list[dict]:
        """Losses and norms of our own engine on the same batches, from the same weights or the run's checkpoint."""
        out = self.folder / f"{run}.json"
        self.run(str(HERE / "study_elas.py"), str(batches), str(out), str(self.folder / run))
        return json.loads(out.read_text())

    def run(self, *words: str) -> None:
        """A Python program, to its end."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words], env=env, check=True, stdout=subprocess.DEVNULL, timeout=1800)


def deviation(run: list[dict], reference: list[dict], key: str) -> float:
    """Largest relative difference over the iterations that both have; infinite if there are none."""
    by_iteration = {entry["iteration"]: entry[key] for entry in reference}
    pairs = [(entry[key], by_iteration[entry["iteration"]]) for entry in run if entry["iteration"] in by_iteration]
    return max((abs(a / b - 1) for a, b in pairs), default=float("inf"))


class Report:
    """Rows of the table, shown as they come."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, what: str, loss: float, norm: float | None, bound: float) -> None:
        """One comparison: the largest relative differences, and what that of losses may be."""
        fits = loss <= bound and (norm is None or norm <= NORM_BOUND)
        self.rows.append({"run": what, "loss": loss, "norm": norm, "bound": bound, "fits": fits})
        shown = f"norm {norm:.1e}" if norm is not None else ""
        print(f"{what:<72} loss {loss:.1e} (bound {bound:g}) {shown} {'' if fits else 'TOO MUCH'}", flush=True)

    def compare(self, what: str, run: list[dict], reference: list[dict]) -> None:
        """A whole run against another."""
        self.add(what, deviation(run, reference, "loss"), deviation(run, reference, "norm"), LOSS_BOUND)


def checkpoints(study: Study, report: Report, reference: list[dict]) -> None:
    """Save in the middle of a run on tensor × pipeline, go on in other layouts, and evaluate."""
    ranks, layout = LAYOUTS["tp2 pp2"]
    for kind, more in SAVED.items():
        saved = study.folder / f"checkpoint{len(more)}"
        save = f"--save {saved} --save-interval {STOPS} --exit-interval {STOPS}"
        written = study.pretrain(ranks, f"{layout} {more} {save} {EVALUATES}")
        for target, count in {"tp1": 1, "dp2": 2}.items():
            run = study.pretrain(count, f"{more} --load {saved}")["steps"]
            first = [entry for entry in run if entry["iteration"] == STOPS + 1]
            report.add(f"saved on tp2 pp2{kind}; {target}: next loss", deviation(first, reference, "loss"), None, 1e-6)
            report.compare(f"saved on tp2 pp2{kind}; {target}: to the end", run, reference)
        if not more:
            evaluate = f"--load {saved} --skip-train {EVALUATES}"
            sparse = study.pretrain(1, evaluate)["evaluated"][0]
            dense = study.pretrain(1, f"{evaluate} --no-sparsity-24")["evaluated"][0]
            then = written["evaluated"][0]
            report.add("saved on tp2 pp2; tp1: evaluated", abs(sparse / then - 1), None, 1e-6)
            print(f"  (evaluated without 2:4 the loss is {abs(dense / then - 1):.1e} away)", flush=True)


def crossings(study: Study, report: Report, reference: list[dict], batches: Path) -> None:
    """`elas train` beside Megatron's run, and checkpoints that go over, both ways; after `checkpoints`."""
    report.compare("elas train, same weights and batches", study.elas_train(batches, "ours"), reference)
    exported = study.folder / "exported"
    study.run("-m", "elas.cli", "checkpoint", "export", str(study.folder / "ours"), str(exported), "--adam", "torch")
    for kind, more in SAVED.items():
        for target in ("tp2 pp2", "dp2") if not more else ("dp2",):
            ranks, layout = LAYOUTS[target]
            load = f"{layout} {more} --load {exported} --override-opt-param-scheduler"
            report.compare(f"elas train to {target}{kind}", study.pretrain(ranks, load)["steps"], reference)
    from study_elas import settings

    for number, (kind, more) in enumerate(SAVED.items()):
        run = f"imported{number}"
        given = settings(str(study.folder / run)) | {"data.train": str(study.corpus), "train.eval_batches": 0}
        words = [f"--{key}={value}" for key, value in given.items()]
        study.run("-m", "elas.cli", "checkpoint", "import", str(study.folder / f"checkpoint{len(more)}"), *words)
        report.compare(f"tp2 pp2{kind} to elas train", study.elas_train(batches, run), reference)


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="Megatron-LM core_v0.16.1")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", help="layouts by name, and checkpoint: a,b,c; tp1 is always run, to compare")
    options = parser.parse_args()
    if not (options.checkout / "pretrain_gpt.py").is_file():
        parser.error(f"{options.checkout} holds no pretrain_gpt.py; give a checkout of Megatron-LM core_v0.16.1")
    wanted = options.only.split(",") if options.only else [*LAYOUTS, "checkpoint"]
    report = Report()
    study_rank.load(options.checkout.absolute())
    with tempfile.TemporaryDirectory(prefix="elas-megatron-") as name:
        folder = Path(name)
        study, batches = Study(folder), folder / "batches.pt"
        study.write_corpus()
        reference = study.pretrain(*LAYOUTS["tp1"], batches=batches)["steps"]
        dense = study.pretrain(1, "--no-sparsity-24")["steps"]
        report.add("tp1 without 2:4: its dense steps", deviation(dense[:DENSE_STEPS], reference, "loss"), None, 0.0)
        sparse_differs = deviation(dense[DENSE_STEPS : DENSE_STEPS + 1], reference, "loss")
        for layout in LAYOUTS:
            if layout in wanted and layout != "tp1":
                report.compare(layout, study.pretrain(*LAYOUTS[layout])["steps"], reference)
        if "checkpoint" in wanted:
            checkpoints(study, report, reference)
            crossings(study, report, reference, batches)
    if options.json:
        names = [row["run"] for row in report.rows]
        if options.only and options.json.exists():
            report.rows[:0] = [row for row in json.loads(options.json.read_text())["runs"] if row["run"] not in names]
        facts = {"steps": STEPS, "dense_steps": DENSE_STEPS, "sparse_differs": sparse_differs, "reference": reference}
        options.json.write_text(json.dumps(facts | {"runs": report.rows}, indent=1) + "\n")
    return 0 if sparse_differs > LOSS_BOUND and all(row["fits"] for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
