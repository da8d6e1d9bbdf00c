"""Study: the real `pretrain` of Megatron-LM over our layers, on every layout, and the same model in `elas train`.

    python tests/megatron/study.py MEGATRON_LM_CHECKOUT [--json docs/figures/megatron.json] [--only tp1,tp2]

Needs a checkout of Megatron-LM core_v0.16.1 and the package `six`. Runs on a CPU with gloo, or on GPUs. Ten steps, 2:4
from the third on. Losses must agree with one rank's within 2e-5 and gradient norms within 5e-4; after a checkpoint of
tensor × pipeline the next loss, in other layouts, within 1e-6; and `elas train`'s engine, from the same weights and on
the same batches, within 2e-5. Exit status 1 where they do not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
STEPS, BATCH, MICRO, LENGTH, VOCAB = 10, 8, 2, 64, 511
RATE, DENSE_STEPS, RANK = 1e-3, 2, 32
SIZES = {"num-layers": 4, "hidden-size": 128, "num-attention-heads": 4, "ffn-hidden-size": 512, "seq-length": LENGTH}
_ALWAYS = (
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --squared-relu "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --transformer-impl local "
    "--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-dropout-fusion --no-rope-fusion --lr-decay-style constant --clip-grad 1.0 --weight-decay 0 "
    "--adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --log-interval 1 --eval-iters 0 --eval-interval 1000 --seed 1234 "
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
    "dp2 distributed optimizer, overlaps": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 100000",
    ),
}
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"


class Study:
    """Runs in one folder, with one corpus."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder = checkout, folder
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

    def pretrain(self, ranks: int, options: str, steps: int = STEPS, batches: Path | None = None) -> list[dict]:
        """Loss and norm of each iteration of one run."""
        self.runs += 1
        out = self.folder / f"run{self.runs}.json"
        sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command += ["--master_port", str(29700 + self.runs), str(HERE / "study_rank.py"), str(out), *sizes, *ALWAYS]
        command += ["--max-position-embeddings", str(LENGTH), "--vocab-size", str(VOCAB), "--rank", str(RANK)]
        command += ["--micro-batch-size", str(MICRO), "--global-batch-size", str(BATCH), "--train-iters", str(steps)]
        command += ["--lr", str(RATE), "--dense-steps", str(DENSE_STEPS), "--data-path", str(self.corpus)]
        command += ["--data-cache-path", str(self.folder / "cache"), *options.split()]
        import torch

        if not torch.cuda.is_available():
            command += ["--distributed-backend", "gloo", "--disable-gloo-process-groups"]
        path = os.pathsep.join([str(self.checkout), str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        if batches is not None:
            env["STUDY_BATCHES"] = str(batches)
        log = out.with_suffix(".log")
        with log.open("wb") as stream:
            done = subprocess.run(command, env=env, stdout=stream, stderr=stream, timeout=1800)
        if done.returncode or not out.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{options or 'one rank'}: exit status {done.returncode}\n{tail}")
        return json.loads(out.read_text())

    def elas_train(self, batches: Path) -> list[float]:
        """Losses of our own engine from the same weights and on the same batches."""
        out = self.folder / "elas.json"
        subprocess.run([sys.executable, str(HERE / "study_elas.py"), str(batches), str(out)], check=True, timeout=1800)
        return json.loads(out.read_text())


def deviation(run: list[dict], reference: list[dict], key: str) -> float:
    """Largest relative difference over the iterations that both have; infinite if there are none."""
    by_iteration = {entry["iteration"]: entry[key] for entry in reference}
    pairs = [(entry[key], by_iteration[entry["iteration"]]) for entry in run if entry["iteration"] in by_iteration]
    return max((abs(a / b - 1) for a, b in pairs), default=float("inf"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="Megatron-LM core_v0.16.1")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", help="layouts by name, a,b,c; tp1 is always run, for comparison")
    options = parser.parse_args()
    if not (options.checkout / "pretrain_gpt.py").is_file():
        parser.error(f"{options.checkout} holds no pretrain_gpt.py; give a checkout of Megatron-LM core_v0.16.1")
    wanted = options.only.split(",") if options.only else [*LAYOUTS, "checkpoint", "elas train"]
    rows = []
    with tempfile.TemporaryDirectory(prefix="elas-megatron-") as name:
        folder = Path(name)
        study, batches = Study(options.checkout.absolute(), folder), folder / "batches.pt"
        study.write_corpus()
        reference = study.pretrain(*LAYOUTS["tp1"], batches=batches)

        def report(what: str, loss: float, norm: float | None, bound: float) -> None:
            fits = loss < bound and (norm is None or norm < 5e-4)
            rows.append({"run": what, "loss": loss, "norm": norm, "bound": bound, "fits": fits})
            shown = f"norm {norm:.1e}" if norm is not None else ""
            print(f"{what:<40} loss {loss:.1e} (bound {bound:g}) {shown} {'' if fits else 'TOO MUCH'}", flush=True)

        for layout in LAYOUTS:
            if layout in wanted and layout != "tp1":
                run = study.pretrain(*LAYOUTS[layout])
                report(layout, deviation(run, reference, "loss"), deviation(run, reference, "norm"), 2e-5)
        if "checkpoint" in wanted:
            saved = folder / "checkpoint"
            whole = study.pretrain(4, TP2_PP2)
            report("tp2 pp2", deviation(whole, reference, "loss"), deviation(whole, reference, "norm"), 2e-5)
            study.pretrain(4, f"{TP2_PP2} --save {saved} --save-interval 5", steps=5)
            for layout, (ranks, more) in {"tp1": (1, ""), "dp2": (2, "")}.items():
                load = f"{more} --load {saved} --no-load-optim --no-load-rng"
                run = study.pretrain(ranks, load, steps=6)
                report(f"saved by tp2 pp2, next loss on {layout}", deviation(run, whole, "loss"), None, 1e-6)
        if "elas train" in wanted:
            losses = study.elas_train(batches)
            run = [{"iteration": i + 1, "loss": loss} for i, loss in enumerate(losses)]
            report("elas train, same weights and batches", deviation(run, reference, "loss"), None, 2e-5)
    if options.json:
        facts = {"steps": STEPS, "dense_steps": DENSE_STEPS, "reference": reference, "runs": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
