"""Describe a run before it starts: sizes, tokens, memory, and the steps of its phases; as facts and as a table."""

from dataclasses import asdict

from elas.config import Config, recompute_of
from elas.config.deepspeed import read_deepspeed_json, zero_stage
from elas.config.phases import can_be_sparse, unreached
from elas.data.corpus import unused_vocabulary
from elas.data.extent import extent, thin_data
from elas.plan.counts import parameter_count
from elas.plan.memory import estimate


def run_facts(config: Config, world_size: int, start: int) -> dict:
    """The facts that `elas train --dry-run --json` writes.

    Args:
        config: validated for `world_size` ranks, with its ZeRO stage chosen and its corpora checked.
        world_size: number of ranks.
        start: step of the checkpoint that the run resumes from; 0 for a new run.
    """
    parallel, train = config.parallel, config.train
    dp = world_size // (parallel.tensor * parallel.pipeline)
    stage = zero_stage(read_deepspeed_json(config))
    data, memory = extent(config), estimate(config, world_size)
    return {
        "parameters": parameter_count(config),
        "tokens": data.tokens,
        "epochs": data.all_epochs,
        "valid_tokens": data.valid_tokens,
        "memory_bytes": memory.total,
        "memory": asdict(memory),
        "corpus_tokens": sum(source.tokens for source in data.train),
        "sources": [{**asdict(source), "epochs": data.epochs(source)} for source in data.train],
        "tokens_per_step": round(data.tokens / train.steps),
        "micro_batches": train.global_batch_size // (train.micro_batch_size * dp),
        "world_size": world_size,
        "layout": {
            "tp": parallel.tensor,
            "pp": parallel.pipeline,
            "dp": dp,
            "zero": stage,
        },
        "start": start,
        "steps": train.steps,
        "schedule": schedule_steps(config, start),
        "run_dir": train.run_dir,
        "warnings": [*unreached(config, start), *unused_vocabulary(config), *thin_data(config)],
    }


def schedule_steps(config: Config, start: int) -> dict:
    """Each phase as `[first, last]` step (None: never), and the steps of recurring events."""
    steps, schedule, optimizer = config.train.steps, config.schedule, config.optimizer
    warmup = min(schedule.warmup_steps, steps)
    decay = None
    if schedule.kind == "wsd":
        length = schedule.decay_steps if schedule.decay_steps is not None else max(1, steps // 10)
        decay = [max(warmup, steps - length) + 1, steps]
    elif schedule.kind != "constant" and warmup < steps:
        decay = [warmup + 1, steps]
    sparse = can_be_sparse(config)
    dense = min(config.sparsity.dense_steps, steps) if sparse else steps
    loro = optimizer.kind == "loro" and optimizer.exact_every
    validates = bool(config.train.eval_batches)
    return {
        "warmup": [1, warmup] if warmup else None,
        "decay": decay,
        "dense": [1, dense] if dense else None,
        "sparse": [dense + 1, steps] if sparse and dense < steps else None,
        "exact_steps": _multiples(optimizer.exact_every, start, steps) if loro and optimizer.refresh != "only" else [],
        "refreshes": _multiples(optimizer.exact_every, start, steps) if loro and optimizer.refresh != "none" else [],
        "validations": _with_last(config.train.eval_every, start, steps, first=start == 0) if validates else [],
        "saves": _with_last(config.checkpoint.every_steps, start, steps),
    }


def _multiples(every: int | None, start: int, steps: int) -> list[int]:
    return list(range((start // every + 1) * every, steps + 1, every)) if every else []


def _with_last(every: int, start: int, steps: int, *, first: bool = False) -> list[int]:
    return sorted({*([0] if first else []), *_multiples(every, start, steps), steps})


def run_rows(config: Config, facts: dict) -> list[tuple[str, str]]:
    """Format the facts of `run_facts` as `(label, value)` rows."""
    from elas.config.describe import describe, describe_layout, describe_optimizer

    layout, memory, when = facts["layout"], facts["memory"], facts["schedule"]
    parallel = config.parallel
    ranks = describe_layout(
        tensor=layout["tp"], pipeline=layout["pp"], data=layout["dp"], zero=layout["zero"],
        sequence=parallel.sequence, virtual=parallel.virtual_pipeline,
    )  # fmt: skip
    resumed = f", resuming after step {facts['start']:,} if its files are intact" if facts["start"] else ""
    rows = [
        ("model", f"{describe(config)}, {config.train.dtype}"),
        ("optimizer", describe_optimizer(config)),
        ("recompute", recompute_of(config)),
        ("parameters", f"{facts['parameters']:,}"),
        ("ranks", f"{facts['world_size']}: {ranks}"),
        ("steps", f"{facts['steps']:,}" + resumed),
        ("tokens", f"{facts['tokens']:,}: {facts['tokens_per_step']:,} per step, "
                   f"micro-batches per rank: {facts['micro_batches']}"),
        ("epochs", f"{facts['epochs']:.3g} of {facts['corpus_tokens']:,} tokens"),
    ]  # fmt: skip
    if len(facts["sources"]) > 1:
        rows += [(f"  {one['prefix']}", f"{one['epochs']:.3g} epochs of {one['tokens']:,} tokens, "
                  f"{one['share']:.1%} of the samples") for one in facts["sources"]]  # fmt: skip
    rows.append(("validation", f"{facts['valid_tokens']:,} tokens" if facts["valid_tokens"] else "off"))
    rows.append(("memory per rank", f"about {_size(facts['memory_bytes'])} (estimate, largest rank)"))
    rows += [(f"  {part}", _size(size)) for part, size in memory.items()]
    for name, words in (("warmup", "warm-up"), ("decay", "rate decay"), ("dense", "dense"), ("sparse", "2:4")):
        rows.append((words, f"steps {when[name][0]:,} to {when[name][1]:,}" if when[name] else "never"))
    if config.optimizer.kind == "loro":
        rows += [("exact steps", _steps(when["exact_steps"])), ("refreshes", _steps(when["refreshes"]))]
    rows += [("validations", _steps(when["validations"])), ("saves", _steps(when["saves"]))]
    return [*rows, ("run folder", facts["run_dir"])]


def _steps(steps: list[int]) -> str:
    if not steps:
        return "never"
    shown = steps if len(steps) <= 5 else [*steps[:3], "…", steps[-1]]
    return f"{len(steps):,}: steps {', '.join(f'{one:,}' if isinstance(one, int) else one for one in shown)}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
