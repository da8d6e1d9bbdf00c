"""Runs an evaluation: the checks before any process group exists, the passes, the figures.

A batch is computed by the ranks of one copy of the model; the data-parallel copies take whole batches in turn, so every
figure is that of one process.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from elas import accelerator
from elas.config.rules import validate_layout
from elas.console import Console, Heartbeat
from elas.errors import ConfigError
from elas.evaluate.models import HuggingFace, evaluation_config, open_checkpoint, open_huggingface
from elas.evaluate.progress import Progress
from elas.evaluate.rows import Rows
from elas.evaluate.scores import Scores, figures
from elas.evaluate.subject import Request, Subject, subject_of
from elas.hf.source import Source, source_of

if TYPE_CHECKING:  # imports Megatron-core
    from elas.evaluate.forward import Forward


@dataclass(frozen=True)
class _Copy:
    """This rank's part of a copy of the model.

    Attributes:
        model: gives the losses.
        number, copies: of the data-parallel copies, the first is 0.
        counts: whether this rank adds the copy's losses up: one rank of each copy does.
        multiple: lengths of sequences must be multiples of it.
        facts: what was evaluated.
    """

    model: "Forward | HuggingFace"
    number: int
    copies: int
    counts: bool
    multiple: int
    facts: dict


def evaluate(request: Request, console: Console, rank: int = 0, world: int = 1) -> dict:
    """Evaluate; every rank calls it, and its caller ends the process groups.

    Args:
        request: the same on every rank.
        console: for lines, used by rank 0.
        rank, world: of the launcher.

    Returns:
        Facts, the same on every rank: the figures of `elas.evaluate.scores`, and what they were measured on.

    Raises:
        UserError: bad input, before any process group exists but for a damaged checkpoint.
        FloatingPointError: a loss is not finite.
    """
    begun, shows = time.monotonic(), rank == 0
    request.check()
    source = source_of(request.checkpoint)
    with Heartbeat(f"loading {source.path}", shows=shows) as heartbeat:
        opened = _open_folder(request, source) if source.checkpoint is None else None
        longest, vocab_size = (opened.longest, opened.vocab_size) if opened else _limits(source)
        heartbeat.begin("reading what to evaluate on")
        subject = subject_of(request, source, longest, vocab_size)
        if shows:
            for line in (*(f"skipped {one}" for one in source.passed_over), *subject.notes):
                console.say(line)
        heartbeat.begin(f"loading {source.path}")
        if opened is None:
            copy = _load_checkpoint(request, source, subject, console, world)
        else:
            copy = _replicate(opened, source, world)
    if shows:
        what = f"{copy.facts['checkpoint']} on {subject.what}"
        console.say(f"evaluating {what}: {subject.tokens:,} tokens, {subject.batch} × {subject.seq_length} a batch")
    scores, seconds = _pass(subject, copy, shows, world)
    facts = figures(scores) | copy.facts
    facts |= {"data": subject.what, "protocol": subject.protocol}
    facts |= {"batch": subject.batch, "seq_length": subject.seq_length, "world_size": world}
    if len(scores) > 1:
        facts["sources"] = [{"data": o.documents.name, **figures([s])} for o, s in zip(subject.rows, scores)]
    facts["tokens_per_s"] = round(facts["tokens"] / seconds, 1)
    return facts | {"seconds": round(time.monotonic() - begun, 1)}


def _limits(source: Source) -> tuple[int, int]:
    """Longest sequence and vocabulary of a run's model."""
    model = source.of_run()[1].model
    return model.max_position_embeddings or model.seq_length, model.vocab_size


def _open_folder(request: Request, source: Source) -> HuggingFace:
    for key in ("tensor", "pipeline", "virtual_pipeline"):
        value = getattr(request.parallel, key)
        if value > 1:
            fix = "leave it out: several ranks are data parallel, or evaluate the checkpoint"
            raise ConfigError(f"parallel.{key}", value, f"{source.path} is a Hugging Face folder", fix)
    return open_huggingface(source.path, request.dtype, accelerator.device())


def _replicate(model: HuggingFace, source: Source, world: int) -> _Copy:
    facts = {"checkpoint": str(source.path), "step": None, "dtype": model.dtype}
    if world == 1:
        return _Copy(model, 0, 1, True, 1, facts)
    from elas import parallel
    from elas.config import ParallelConfig

    layout = parallel.initialize(ParallelConfig(), seed=0)
    return _Copy(model, layout.dp_rank, layout.dp, True, 1, facts)


def _load_checkpoint(request: Request, source: Source, subject: Subject, console: Console, world: int) -> _Copy:
    checkpoint, written = source.of_run()
    config = evaluation_config(written, request.parallel, request.dtype, subject.seq_length)
    validate_layout(config, world)
    from elas import parallel
    from elas.model import kernel

    if config.model.activation == "relu2":
        kernel.chosen(config)  # builds it before process groups exist
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    model, used = open_checkpoint(request.checkpoint, checkpoint, config, layout, console)
    facts = {"checkpoint": str(used.path), "step": used.step, "dtype": config.train.dtype}
    counts = layout.is_last_stage and layout.tp_rank == 0
    multiple = layout.tp if layout.sequence_parallel else 1
    return _Copy(model, layout.dp_rank, layout.dp, counts, multiple, facts)


def _pass(subject: Subject, copy: _Copy, shows: bool, world: int) -> tuple[list[Scores], float]:
    """Every batch once; the scores of each corpus over all ranks, and the seconds it took."""
    plans = [[range(i, min(i + subject.batch, len(rows))) for i in range(0, len(rows), subject.batch)]
             for rows in subject.rows]  # fmt: skip
    scores = [Scores(rows.documents, len(plan), subject.byte_lengths) for rows, plan in zip(subject.rows, plans)]
    mine = [plan[copy.number :: copy.copies] for plan in plans]
    total = sum(int(rows.lengths()[p.start : p.stop].sum()) for rows, plan in zip(subject.rows, mine) for p in plan)
    begun, done = time.monotonic(), 0
    with Progress(total, shows=shows) as progress:
        for rows, plan, of_corpus in zip(subject.rows, mine, scores):
            for number, places in enumerate(plan):
                batch = copy.number + number * copy.copies
                done += _one_batch(rows, places, batch, subject.seq_length, copy, of_corpus)
                progress.done(done, of_corpus.mean)
    if world > 1:
        for of_corpus in scores:
            of_corpus.add_up(accelerator.device())
    return scores, time.monotonic() - begun


def _one_batch(rows: Rows, places: range, number: int, seq_length: int, copy: _Copy, scores: Scores) -> int:
    """Score one batch, padded on the right, where attention does not look; returns its tokens."""
    held = [rows[place] for place in places]
    longest = max(len(owners) for _, owners in held)
    width = min(seq_length, -(-longest // copy.multiple) * copy.multiple)
    tokens, labels = np.zeros((2, len(held), width), np.int64)
    counted = np.zeros((len(held), width), bool)
    for row, (ids, owners) in enumerate(held):
        tokens[row, : len(owners)], labels[row, : len(owners)] = ids[:-1], ids[1:]
        counted[row, : len(owners)] = True
    device = accelerator.device()
    losses = copy.model.losses(torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device))
    if copy.counts:
        assert losses is not None  # such a rank holds the last pipeline stage
        owners = np.concatenate([owners for _, owners in held])
        scores.add(number, losses.float().cpu().numpy()[counted], labels[counted], owners)
    return int(counted.sum())
