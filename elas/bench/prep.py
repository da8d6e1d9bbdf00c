"""`elas bench prep`: tokenisation beside the tokenizer libraries alone, its memory, and resuming after kills.

Every measurement is a new process; variants take turns, and medians are reported. The time of `library` is its encoding
alone, from texts in memory to lists of ids. The time of `elas` is the whole run, from listing the inputs to the
manifest, and `datatrove` likewise. A variant whose tokens differ from the library's has no time.
"""

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from elas.bench.arguments import at_least
from elas.command import Parser
from elas.console import table
from elas.errors import Failure, UserError
from elas.files import write_json

EXAMPLE = "elas bench prep --workers 2 --memory 200,2000 --kills 10"
TOKENIZERS = ("sentencepiece", "fast")


def main(argv: list[str]) -> int:
    """`elas bench prep ARGV…`."""
    parser = Parser("elas bench prep", "Time tokenisation beside the libraries alone.", EXAMPLE)
    parser.add_argument("--input", default="stdlib", metavar="PATH", help="texts to tokenise; default: stdlib")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="of both tokenizers; default: 8192")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes, and threads of the libraries")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds; default: 3; 0 for no timing")
    parser.add_argument("--memory", metavar="MB,MB", help="also measure peak memory on generated JSONL of these sizes")
    parser.add_argument(
        "--kills", type=int, default=0, metavar="N", help="also kill and resume a run N times at random"
    )
    args = parser.parse_args(argv)
    at_least("--workers", args.workers, 1)
    at_least("--repeats", args.repeats, 0)
    at_least("--kills", args.kills, 0)
    sizes = _sizes(args.memory)
    with tempfile.TemporaryDirectory(prefix="elas-bench-prep-") as name:
        folder = Path(name)
        tokenizers = _make_tokenizers(args.input, args.vocab_size, folder)
        facts = {"input": args.input, "workers": args.workers, "repeats": args.repeats, "vocab_size": args.vocab_size}
        if args.repeats:
            facts["rows"] = _throughput(args.input, tokenizers, args.workers, args.repeats, folder)
            _print_throughput(facts["rows"])
        if sizes:
            facts["memory"] = [_memory(size, tokenizers["sentencepiece"], args.workers, folder) for size in sizes]
            _print_memory(facts["memory"])
        if args.kills:
            facts["kills"] = _kills(args.input, tokenizers["sentencepiece"], args.workers, args.kills, folder)
            verdict = "identical" if facts["kills"]["identical"] else "DIFFERENT"
            print(f"\n{facts['kills']['killed']} kills at random moments: files {verdict}")
    write_json(args.json, facts)
    return 0


def _sizes(text: str | None) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")] if text else []
    except ValueError:
        sizes = [0]
    if not all(size > 0 for size in sizes):
        raise UserError(f"--memory {text}: not sizes in MB; write 200,2000")
    return sizes


def _make_tokenizers(inputs: str, vocab_size: int, folder: Path) -> dict[str, Path]:
    """A SentencePiece BPE model and a byte-level BPE of the tokenizers library, of the same size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenizer_training import sample_chunks, train_tokenizer

    train_tokenizer(Corpus([inputs]), folder / "sentencepiece", vocab_size=vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_chunks(Corpus([inputs]), 4_000_000), trainer)
    (folder / "fast").mkdir()
    tokenizer.save(str(folder / "fast" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "fast" / "tokenizer_config.json").write_text(json.dumps(config))
    return {name: folder / name for name in TOKENIZERS}


def _throughput(inputs: str, tokenizers: dict[str, Path], workers: int, repeats: int, folder: Path) -> list[dict]:
    jobs = [
        (t, v) for t in TOKENIZERS for v in ("library", "elas", "datatrove") if (t, v) != (TOKENIZERS[0], "datatrove")
    ]
    times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    rows = {}
    for turn in range(repeats):
        for tokenizer, variant in jobs[turn % len(jobs) :] + jobs[: turn % len(jobs)]:
            if variant == "elas":
                facts = _tokenize(inputs, tokenizers[tokenizer], folder / "out" / "all", workers, "--overwrite")
                facts["tokens"] -= facts["documents"]  # without the end of each document
            else:
                facts = _peer(variant, inputs, tokenizers[tokenizer], workers)
            times[tokenizer, variant].append(facts["seconds"])
            rows[tokenizer, variant] = facts
    table = []
    for tokenizer, variant in jobs:
        facts, truth = rows[tokenizer, variant], rows[tokenizer, "library"]
        ok = facts["tokens"] == truth["tokens"]
        seconds = statistics.median(times[tokenizer, variant])
        library = statistics.median(times[tokenizer, "library"])
        speeds = {"seconds": seconds, "mb_per_s": truth["bytes_in"] / 1e6 / seconds, "of_library": library / seconds}
        row = {"tokenizer": tokenizer, "variant": variant, "tokens": facts["tokens"], "ok": ok}
        table.append(row | (speeds if ok else dict.fromkeys(speeds)))
    return table


def _tokenize(inputs, tokenizer: Path, prefix: Path, workers: int, *more: str) -> dict:
    """Facts of `elas prep tokenize` in a new process."""
    report = Path(f"{prefix}.facts.json")
    done = subprocess.run(
        [*_command(inputs, tokenizer, prefix, workers), "--json", str(report), *more], capture_output=True, text=True
    )
    if done.returncode:
        raise Failure(f"elas prep tokenize failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(report.read_text())


def _command(inputs, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    what = ["--input", str(inputs), "--tokenizer", str(tokenizer), "--output", str(prefix), "--workers", str(workers)]
    return [sys.executable, "-m", "elas.cli", "prep", "tokenize", *what]


def _peer(variant: str, inputs: str, tokenizer: Path, workers: int) -> dict:
    command = [sys.executable, "-m", "elas.bench.prep_peers", variant, inputs, str(tokenizer), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{variant} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def _memory(megabytes: int, tokenizer: Path, workers: int, folder: Path) -> dict:
    """Peak memory of a run over a generated JSONL file."""
    path = folder / f"{megabytes}.jsonl"
    with path.open("w") as file:
        for line in _lines(megabytes * 1_000_000):
            file.write(line)
    facts = _tokenize(path, tokenizer, folder / "memory" / str(megabytes), workers)
    path.unlink()
    keys = "documents", "tokens", "seconds", "mb_per_s", "peak_rss_mb", "peak_rss_worker_mb"
    return {"megabytes": megabytes, **{key: facts[key] for key in keys}}


def _lines(size: int) -> Iterator[str]:
    """JSONL of random words: documents of 1 to 2000 words, up to `size` bytes."""
    random_ = random.Random(1)
    words = ["".join(random_.choices("abcdefghijklmnopqrstuvwxyz_", k=random_.randint(1, 10))) for _ in range(20_000)]
    while size > 0:
        line = json.dumps({"text": " ".join(random_.choices(words, k=random_.randint(1, 2000)))}) + "\n"
        size -= len(line)
        yield line


def _kills(inputs: str, tokenizer: Path, workers: int, kills: int, folder: Path) -> dict:
    """Kill a run at random moments, resume it each time, and compare its files with those of an undisturbed run."""
    start = time.perf_counter()
    _tokenize(inputs, tokenizer, folder / "whole" / "all", workers)
    longest = time.perf_counter() - start
    moments, killed, tasks = random.Random(1), 0, 0
    prefix = folder / "killed" / "all"
    from elas.data_prep.executors import finished_tasks
    from elas.data_prep.plan import work_folder

    while killed < kills:
        process = subprocess.Popen(_command(inputs, tokenizer, prefix, workers), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            process.wait(moments.uniform(0.2, longest))
            tasks += 1
            for path in prefix.parent.iterdir():  # it ended before the kill: start again
                path.unlink()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    before = len(finished_tasks(work_folder(prefix)))
    _tokenize(inputs, tokenizer, prefix, workers)
    same = all(_digest(folder / "whole" / f"all{end}") == _digest(f"{prefix}{end}") for end in ENDS)
    return {"killed": killed, "runs_that_ended_first": tasks, "tasks_done_before_the_last": before, "identical": same}


ENDS = (".bin", ".idx", ".manifest.json", ".skipped.jsonl")


def _digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _print_throughput(rows: list[dict]) -> None:
    cells = [
        [row["tokenizer"], row["variant"]]
        + (
            [f"{row['seconds']:.2f}", f"{row['mb_per_s']:.2f}", f"{row['of_library']:.2f}"]
            if row["ok"]
            else ["WRONG"] * 3
        )
        for row in rows
    ]
    print(table(["tokenizer", "variant", "s", "MB/s", "× library"], cells, left=2))


def _print_memory(rows: list[dict]) -> None:
    cells = [
        [f"{row['megabytes']:,}", f"{row['documents']:,}", f"{row['mb_per_s']:.2f}", f"{row['peak_rss_worker_mb']:.0f}"]
        for row in rows
    ]
    print("\n" + table(["MB", "documents", "MB/s", "peak MB a process"], cells, left=0))
