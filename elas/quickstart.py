"""`elas quickstart`: trains a small model in minutes, on the source of Python's standard library.

Corpus → SentencePiece tokenizer → Megatron token files → training on two ranks with the deepspeed launcher →
evaluation → a loss curve and a table. Each stage leaves a file that marks it as complete, so running the command again
resumes where it stopped, or shows the result.
"""

import shutil
import statistics
import time
from pathlib import Path

from elas.config import Config, flatten, load_config, split_overrides
from elas.config.arguments import SettingsParser
from elas.console import clock, facts_table
from elas.data_prep.sources import STDLIB, Corpus, stdlib_corpus
from elas.errors import UserError
from elas.files import write_json

VALID_FRACTION = 0.02
VALID_MAX_BYTES = 65_536
"""Longer files are never held out: one of them would be a quarter of the held-out text and dominate the perplexity."""
OWN = ("data.train", "data.valid", "data.tokenizer", "train.run_dir")  # settings that follow from --workdir


def main(argv: list[str]) -> int:
    """Run `elas quickstart`.

    Args:
        argv: arguments after the command.

    Returns:
        Exit status: 0, or that of the training.
    """
    overrides, rest = split_overrides(argv)
    parser = SettingsParser(
        "elas quickstart",
        "Train a small ELAS model on Python's standard library, on two ranks (one, on a host with one GPU). "
        "Any setting: --section.key VALUE.",
        "elas quickstart --steps 100 --workdir /tmp/elas",
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("quickstart"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the preset's)")
    parser.add_argument("--ranks", type=int, help="processes to train on (default: 2; on a host with one GPU, 1)")
    options = parser.parse_args(rest)
    workdir = options.workdir
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: is a file; give a folder")
    if options.ranks is None:
        from elas.accelerator import gpus_here

        options.ranks = 1 if gpus_here() == 1 else 2
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: must be at least 1")
    if overrides.get("train.steps", options.steps) != options.steps is not None:
        raise UserError(f"--steps {options.steps}: --train.steps says {overrides['train.steps']}; give one of the two")
    for key in sorted({*OWN, "data.split"} & overrides.keys()):
        raise UserError(f"--{key} {overrides[key]}: quickstart makes its own corpus under --workdir; use elas train")
    if options.steps is not None:
        overrides["train.steps"] = options.steps
    settings = {
        **overrides,
        **dict(zip(OWN, (str(workdir / part) for part in ("tokens/train", "tokens/valid", "tokenizer", "run")))),
    }
    config = load_config("quickstart", settings)
    from elas.accelerator import check_gpus
    from elas.config.deepspeed import choose_zero_stage
    from elas.config.rules import validate
    from elas.train.trackers import check_trackers

    check_gpus(options.ranks)
    choose_zero_stage(config, options.ranks)
    validate(config, options.ranks)
    check_trackers(config)
    start, fresh = time.monotonic(), not (workdir / "tokenizer").exists()
    prepare(workdir, config, stdlib_corpus())
    _train(config, settings, options.ranks)
    facts = _report(config, options.ranks, workdir)
    seconds = time.monotonic() - start
    print(f"total {clock(seconds)}")
    # The time of a resumed quickstart is not that of a complete one.
    write_json(options.json, {**facts, "seconds": round(seconds, 1) if fresh else None})
    return 0


def _say(text: str) -> None:
    print(f"● {text}", flush=True)


def prepare(workdir: Path, config: Config, corpus: Corpus) -> None:
    """Create the tokenizer and the token files of a corpus, unless they exist."""
    from elas.data_prep.tokenize_corpus import Options, tokenize_corpus
    from elas.data_prep.tokenizer_training import train_tokenizer

    tokenizer, tokens = workdir / "tokenizer", workdir / "tokens"
    if not (tokenizer / "manifest.json").exists():
        name = "Python's standard library" if corpus.inputs == [STDLIB] else ", ".join(corpus.inputs)
        _say(f"training a tokenizer of {config.model.vocab_size:,} pieces on {name}")
        facts = train_tokenizer(
            corpus,
            tokenizer,
            vocab_size=config.model.vocab_size,
            valid_fraction=VALID_FRACTION,
            valid_max_bytes=VALID_MAX_BYTES,
        )
        _say(f"{facts['documents']:,} files, {facts['bytes_in'] / 1e6:.1f} MB")
        shutil.rmtree(tokens, ignore_errors=True)  # token files of an earlier tokenizer
    if not all((tokens / f"{part}.manifest.json").exists() for part in ("train", "valid")):
        _say("tokenising")
        options = Options(valid_output=tokens / "valid", valid_fraction=VALID_FRACTION, valid_max_bytes=VALID_MAX_BYTES)
        facts = tokenize_corpus(corpus, tokenizer, tokens / "train", options)
        _say(f"{facts['tokens']:,} tokens to train on, {facts['valid_tokens']:,} held out")


def _train(config: Config, settings: dict, ranks: int) -> None:
    """Start `launch/pretrain.py` with the deepspeed launcher, unless the run is complete.

    Raises:
        UserError: the settings are invalid, or do not fit the existing run.
        SystemExit: the training did not complete and has reported why; with its status.
    """
    from elas.checkpoint.choose import find_checkpoint
    from elas.data.corpus import check_corpus
    from elas.train.result import finished

    check_corpus(config)
    found = find_checkpoint(config)
    if found is not None and finished(config, found):
        _say(f"already trained to step {found.step}; nothing to do")
        return
    from elas.launch import local
    from elas.launch.job import Job

    _say(f"training on {ranks} ranks" + (f", from step {found.step}" if found else ""))
    arguments = [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]
    job = Job(config, ["--config=quickstart", *arguments], ranks)
    status = local.run(job, local.command_of(job, "deepspeed", local.free_port()))
    if status:
        raise SystemExit(status)


def _report(config: Config, ranks: int, workdir: Path) -> dict:
    from elas.accelerator import processor
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.identity import versions
    from elas.config.describe import describe
    from elas.data.token_files import read_token_files
    from elas.files import read_jsonl
    from elas.report.page import write_page
    from elas.report.run_files import read_runs

    run_dir = Path(config.train.run_dir)
    metrics, validation = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "validation.jsonl")
    page = write_page(read_runs([run_dir]), workdir / "report.html")
    last, checkpoint = metrics[-1], find_checkpoint(config)
    assert checkpoint is not None  # the last step always saves
    facts = {
        "tokens_trained": last["tokens"],
        "val_ppl_start": validation[0]["ppl"] if validation else None,
        "val_ppl_end": validation[-1]["ppl"] if validation else None,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in metrics),
        "sparsity": last["sparsity"],
        "dropped": last["dropped"],
        "world_size": ranks,
        "checkpoint": str(checkpoint.path),
        "run_dir": str(run_dir),
        "html": str(page),
        "model": describe(config),
        "seed": config.train.seed,
        "settings": settings_of(config),
        "corpus_tokens": read_token_files("data.train", str(config.data.train)).tokens,
        "cpu": processor(),
        "versions": versions(),
    }
    rows = [("model", describe(config)), ("tokens trained", f"{facts['tokens_trained']:,}")]
    if validation:
        rows.append(("validation perplexity", f"{facts['val_ppl_start']:,.0f} → {facts['val_ppl_end']:,.1f}"))
    if facts["sparsity"] is not None and config.model.activation == "relu2":
        rows.append(("zeros after relu²", f"{facts['sparsity']:.1%}"))
        if last["sparse_active"]:
            rows.append(("non-zeros dropped by 2:4", f"{facts['dropped']:.1%}"))
    rows += [
        ("tokens a second", f"{facts['tokens_per_s']:,.0f} on {ranks} ranks"),
        ("checkpoint", facts["checkpoint"]),
        ("report", facts["html"]),
    ]
    print(facts_table(rows))
    return facts


def settings_of(config: Config) -> dict:
    """The settings that determine the result, by dotted key: not paths, the layout or exports."""
    flat = flatten(config.to_dict())
    return {
        key: value for key, value in flat.items() if key not in OWN and not key.startswith(("parallel.", "export."))
    }
