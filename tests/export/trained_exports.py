"""Small models that are trained, exported and run on ranks, for the tests of export and import."""

from dataclasses import dataclass
from pathlib import Path

import torch
from support.parity_run import GLOBAL_BATCH, saver_of, tokens

SMALL = {
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 128,
    "model.vocab_size": 256,
    "model.seq_length": 32,
    "model.max_position_embeddings": 288,
    "low_rank.rank": 16,
    "sparsity.dense_steps": 20,
    "optimizer.lr": 3e-3,
    "schedule.warmup_steps": 5,
    "train.steps": 50,
    "train.dtype": "float32",
    "train.micro_batch_size": 4,
    "train.global_batch_size": GLOBAL_BATCH,
    "checkpoint.every_steps": 1000,
}
_TRAINING = {key: value for key, value in SMALL.items() if key.startswith(("train.", "optimizer.", "schedule."))}


@dataclass(frozen=True)
class Trained:
    """One of the cases of conftest.py, trained and exported; here, since several modules are called conftest.

    Attributes:
        run: the run's folder.
        loss: of the step after the checkpoint.
        logits: of our model, `[8, 256, vocab]`, of `rows`.
        text: of our model: a prompt and its greedy continuation, `[1, s]`.
        forms: by form, the facts of the export or the error.
    """

    run: Path
    loss: float
    logits: torch.Tensor
    text: torch.Tensor
    forms: dict[str, dict | str]

    def folder(self, form: str = "elas") -> Path:
        """The exported folder."""
        return self.run / form


def train(cases: dict[str, dict], folder: str) -> dict[str, float]:
    """Train each case's model on this rank's layout and save it in `FOLDER/NAME`; the loss after the last step."""
    return {name: _train(overrides, f"{folder}/{name}") for name, overrides in cases.items()}


def _train(overrides: dict, run_dir: str) -> float:
    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine

    config = load_config(None, {**SMALL, **overrides, "train.run_dir": run_dir})
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine = Engine(config, layout)
    for step in range(1, config.train.steps + 1):
        engine.set_learning_rate(config.optimizer.lr)
        one_step(engine, step)
    samples = config.train.steps * config.train.global_batch_size
    tokens = samples * config.model.seq_length
    saver_of(config, engine).save(config.train.steps, tokens, {"consumed_samples": samples})
    loss = one_step(engine, config.train.steps + 1)
    parallel.shut_down()
    return loss


def one_step(engine, step: int) -> float:
    """Training step `step`, on its tokens; the loss before the update."""
    from elas.model.activation import set_step

    set_step(engine.chunks, step)
    layout, size = engine.layout, engine.config.train.micro_batch_size
    samples = tokens(step)
    starts = [(m * layout.dp + layout.dp_rank) * size for m in range(engine.micro_batches)]
    return engine.step((samples[s : s + size, :-1], samples[s : s + size, 1:]) for s in starts)[0]


def run_ours(cases: dict[str, tuple[list[str], int]], rows: torch.Tensor, prompt: torch.Tensor) -> dict[str, dict]:
    """Export each run and run its checkpoint, on one rank.

    Args:
        cases: by the run's folder, forms to export, to `RUN_DIR/FORM`, and tokens to continue the prompt by, greedily.
        rows: int64 `[b, s]`.
        prompt: int64 `[1, s]`.

    Returns:
        By the run's folder: `logits` of the rows, `text`, the prompt and its continuation, and by form the facts of the
        export or its error.
    """
    return {run: _run_ours(Path(run), forms, rows, prompt, new) for run, (forms, new) in cases.items()}


def _run_ours(run: Path, forms: list[str], rows: torch.Tensor, prompt: torch.Tensor, new: int) -> dict:
    from elas import parallel
    from elas.console import Console
    from elas.errors import UserError
    from elas.export.run import Request, export_hf

    found = {}
    for form in forms:
        try:
            compares = run.name in ("elas-grouped", "elas-bf16")  # it takes a second
            request = Request(
                run, run / form, form, shard_gb=1e-4 if form == "elas" else 5, compare=compares, tokenizer="none"
            )
            found[form] = export_hf(request, Console())
        except UserError as error:
            found[form] = str(error)
    model = forward(run)
    found["logits"] = torch.cat([model.logits(row[None]).clone() for row in rows])
    text = prompt
    for _ in range(new):
        text = torch.cat([text, model.logits(text)[:, -1].argmax(-1)[:, None]], dim=1)
    parallel.shut_down()
    return found | {"text": text}


def forward(run: Path):
    """The checkpoint's model in fp32 and with plain operations, on one rank."""
    import dataclasses

    from elas import parallel
    from elas.checkpoint.choose import find
    from elas.checkpoint.identity import written_config
    from elas.config import ParallelConfig
    from elas.evaluate.forward import Forward

    checkpoint = find(run)
    config = written_config(checkpoint)
    config.parallel = ParallelConfig()
    config.train.dtype = "float32"
    config.sparsity = dataclasses.replace(config.sparsity, ffn_memory="eager", implementation="auto")
    layout = parallel.initialize(config.parallel, seed=1)
    return Forward(checkpoint, config, layout)


def logits(runs: list[str], rows: torch.Tensor) -> list[torch.Tensor]:
    """Logits `[b, s, vocab]` of each run's newest checkpoint, on one rank."""
    from elas import parallel

    found = []
    for run in runs:
        model = forward(Path(run))
        found.append(torch.cat([model.logits(row[None]).clone() for row in rows]))
        parallel.shut_down()
    return found


def resumed(runs: dict[str, dict], step: int) -> dict[str, list[float]]:
    """Resume each run as `elas train --config RUN/config.yaml` does, and take two steps on the tokens of `step`; twice.

    Returns:
        By the run's folder, the losses before the first and the second update, and those after going back to the start.
    """
    from elas import parallel
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.resume import first_intact, restore
    from elas.config import load_config
    from elas.engine.engine import Engine

    losses = {}
    for run, overrides in runs.items():
        config = load_config(f"{run}/config.yaml", {**_TRAINING, **overrides})
        layout = parallel.initialize(config.parallel, seed=config.train.seed)
        engine = Engine(config, layout)
        losses[run] = []
        for _ in range(2):
            restore(engine, first_intact(find_checkpoint(config), config))
            engine.set_learning_rate(1e-3)
            losses[run] += [one_step(engine, step), one_step(engine, step)]
        parallel.shut_down()
    return losses


def run_training(argv: list[str]) -> str:
    """A whole run as `elas train ARGV…` starts it; what the console showed on this rank."""
    import contextlib
    import io

    from elas import parallel
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.initial import find_initial
    from elas.config.rules import validate
    from elas.launch.pretrain import parse
    from elas.train.loop import run

    config, _ = parse(argv)
    validate(config, torch.distributed.get_world_size())
    resume = find_checkpoint(config)
    initial = find_initial(config, resume)
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run(config, layout, resume, initial)
    return shown.getvalue()
