"""`elas prep`: train a tokenizer and convert text to Megatron token files."""

import sys
from dataclasses import fields
from pathlib import Path

from elas.command import Parser, run_command
from elas.data_prep.formats import FORMATS
from elas.data_prep.held_out import held_out_in_words
from elas.data_prep.loss import in_words
from elas.data_prep.sources import Corpus
from elas.errors import ConfigError, UserError
from elas.files import write_json

_NOTES = 5
"""Notes about single files shown; the rest are counted."""


def main(argv: list[str]) -> int:
    """Run `elas prep ARGV…`; returns the exit status, raises `UserError` for invalid input."""
    return run_command("elas prep", COMMANDS, argv, "example:", *(f"  {e}" for e in EXAMPLES.values()))


def tokenizer(argv: list[str]) -> int:
    """`elas prep tokenizer`: train SentencePiece on a sample of the input."""
    from elas.data.tokenizer import MODEL_NAME
    from elas.data_prep.tokenizer_training import DEFAULT_SAMPLE_BYTES, train_tokenizer
    from elas.data_prep.unread import check_columns

    parser = Parser("elas prep tokenizer", "Train a SentencePiece tokenizer.", EXAMPLES["tokenizer"])
    _add_input(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of token ids")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for tokenizer.model")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe, the faster one")
    parser.add_argument("--sample-bytes", type=int, default=DEFAULT_SAMPLE_BYTES, metavar="N", help="bytes to train on")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.0, metavar="F", help="exclude the documents that tokenize holds out"
    )
    parser.add_argument("--valid-max-bytes", type=int, metavar="N", help="with --valid-fraction, as for tokenize")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args(argv)
    if (args.output / MODEL_NAME).exists() and not args.overwrite:
        why = "already holds a tokenizer, which existing token files may depend on"
        raise ConfigError("--output", str(args.output), why, "give another folder, or --overwrite")
    corpus = _corpus(args)
    check_columns(corpus, None)
    facts = train_tokenizer(
        corpus,
        args.output,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        sample_bytes=args.sample_bytes,
        valid_fraction=args.valid_fraction,
        valid_max_bytes=args.valid_max_bytes,
    )
    write_json(args.json, facts)
    keys = "model_type", "vocab_size", "documents", "bytes_in", "sample_bytes", "skipped", "train_seconds", "sha256"
    print(_table({"tokenizer": args.output} | {key: facts[key] for key in keys}))
    return 0


def tokenize(argv: list[str]) -> int:
    """`elas prep tokenize`: write `.bin`, `.idx` and the manifest."""
    from elas.data_prep.progress import Progress
    from elas.data_prep.quality import parse_filter
    from elas.data_prep.tokenize_corpus import Options, tokenize_corpus
    from elas.data_prep.unread import check_columns

    args = _tokenize_parser().parse_args(argv)
    if args.executor == "slurm" and args.slurm_partition is None:
        raise UserError("--executor slurm: requires a partition; add --slurm-partition NAME")
    slurm = {key: getattr(args, f"slurm_{key}") for key in ("partition", "time", "mem_gb", "qos")}
    read = {
        "append_eod": args.append_eod == "yes",
        "filters": [parse_filter(text) for text in args.filter],
        "share": _share(args.share),
        "slurm": slurm | {"sbatch": _sbatch(args.sbatch)},
    }
    as_given = {of.name: getattr(args, of.name) for of in fields(Options) if of.name not in read}
    options = Options(**as_given, **read)
    corpus = _corpus(args)
    check_columns(corpus, args.max_skipped, ", or accept the loss with --max-skipped 1")
    with Progress(sum(file.size for file in corpus.files)) as progress:
        facts = tokenize_corpus(corpus, args.tokenizer, args.output, options, on_progress=progress.show)
    if facts.pop("already_done", False):
        files = " and ".join(f"{prefix}.bin" for prefix in (args.output, args.valid_output) if prefix)
        print(f"already complete: {files}; nothing to do (--overwrite starts over)")
    write_json(args.json, facts)
    print(_table({"output": args.output} | facts))
    return 0


def _tokenize_parser() -> Parser:
    parser = Parser("elas prep tokenize", "Tokenise text into Megatron .bin/.idx files.", EXAMPLES["tokenize"])
    _add_input(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="an ELAS or Hugging Face tokenizer folder")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, manifest"
    )
    add = parser.add_argument_group("selecting documents").add_argument
    add("--valid-output", type=Path, metavar="PREFIX", help="token files of held-out documents")
    add(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of documents to hold out, chosen by hash of their text",
    )
    add(
        "--valid-max-bytes",
        type=int,
        metavar="N",
        help="never hold out documents of more bytes: a few large ones may dominate the held-out text",
    )
    for key in ("min-chars", "max-chars", "min-tokens", "max-tokens"):
        add(f"--{key}", type=int, metavar="N", help=f"leave out documents with {_fewer_or_more(key)} {key[4:]}")
    what = "a datatrove filter, for example GopherQualityFilter:min_doc_words=10"
    add("--filter", nargs="+", action="extend", default=[], metavar="NAME[:KEY=VALUE,…]", help=what)
    what = "maximum unreadable share of the corpus, 0 to 1; default: 0.25 for records without the field, else unlimited"
    add("--max-skipped", type=float, metavar="F", help=what)
    add("--deduplicate", action="store_true", help="keep only the first of documents with identical text")
    eod = {"choices": ("yes", "no"), "default": "yes"}
    add("--append-eod", **eod, help="append the end-of-document id to every document; default: yes")
    add("--eod-token", metavar="TOKEN", help="end-of-document token; default: the tokenizer's own")
    add("--prepend-bos", action="store_true", help="prepend the beginning-of-sequence id to every document")
    add = parser.add_argument_group("execution").add_argument
    add("--workers", type=int, metavar="N", help="parallel processes (slurm: jobs); default: one per usable core")
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="where the tasks run; default: local")
    add("--task-bytes", type=int, metavar="N", help="bytes per task; default: 1/64 of the corpus, between 2 and 64 MB")
    add("--share", metavar="I/N", help="run only the tasks of machine I (from 0) of N, without merging")
    add("--overwrite", action="store_true", help="start over and replace existing files")
    add = parser.add_argument_group("with --executor slurm").add_argument
    add("--slurm-partition", metavar="NAME", help="partition of the jobs")
    add("--slurm-time", default="20:00:00", metavar="T", help="time limit of a job; default: 20:00:00")
    add("--slurm-mem-gb", type=int, default=2, metavar="N", help="memory of a job; default: 2")
    add("--slurm-qos", default="", metavar="NAME", help="quality of service")
    add("--sbatch", nargs="+", action="extend", default=[], metavar="KEY[=VALUE]", help="further sbatch options")
    return parser


def merge(argv: list[str]) -> int:
    """`elas prep merge`: the last step of tokenize when its tasks ran as separate jobs."""
    from elas.data_prep.tokenize_corpus import merge_work

    parser = Parser("elas prep merge", "Merge the parts of finished tasks.", EXAMPLES["merge"])
    parser.add_argument("output", type=Path, metavar="PREFIX", help="the --output of tokenize")
    args = parser.parse_args(argv)
    facts = merge_work(args.output)
    write_json(args.json, facts)
    print(_table({"output": args.output} | facts))
    return 0


def verify(argv: list[str]) -> int:
    """`elas prep verify`: check token files against their manifest."""
    from elas.data_prep.verify import verify as check

    parser = Parser("elas prep verify", "Check token files against their manifest.", EXAMPLES["verify"])
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path without .bin")
    args = parser.parse_args(argv)
    reports = {prefix: check(prefix) for prefix in args.prefixes}
    bad = [{"prefix": prefix, "why": why} for prefix, report in reports.items() for why in report["bad"]]
    facts = {
        "ok": not bad,
        "files": sum(report["files"] for report in reports.values()),
        "bad": bad,
        "corpora": reports,
    }
    write_json(args.json, facts)
    for prefix, report in reports.items():
        counted = f"{report['documents']:,} documents, {report['tokens']:,} tokens" if report["documents"] else ""
        print(f"{'ok ' if not report['bad'] else 'BAD'}  {prefix}  {counted}")
        for why in report["bad"]:
            print(f"     {why}")
        for note in report["notes"]:
            print(f"     note: {note}")
    return 0 if not bad else 1


def info(argv: list[str]) -> int:
    """`elas prep info`: statistics and sample documents of token files."""
    from elas.data_prep.info import describe, show

    parser = Parser("elas prep info", "Show statistics and sample documents.", EXAMPLES["info"])
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer for decoding; default: the corpus's own")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="documents to decode; default: 3")
    args = parser.parse_args(argv)
    facts = describe(args.prefix, args.tokenizer, args.documents)
    write_json(args.json, facts)
    print(show(facts))
    return 0


COMMANDS = {
    "tokenizer": (tokenizer, "train a SentencePiece tokenizer"),
    "tokenize": (tokenize, "convert text to Megatron .bin/.idx token files"),
    "merge": (merge, "merge the parts of finished tasks (after --executor slurm)"),
    "verify": (verify, "check token files against their manifest"),
    "info": (info, "show statistics and sample documents of token files"),
}
EXAMPLES = {
    "tokenizer": "elas prep tokenizer --input stdlib --vocab-size 8192 --output data/tokenizer",
    "tokenize": "elas prep tokenize --input stdlib --tokenizer data/tokenizer --output data/train",
    "merge": "elas prep merge data/train",
    "verify": "elas prep verify data/train",
    "info": "elas prep info data/train --documents 2",
}


def _fewer_or_more(key: str) -> str:
    return "fewer" if key.startswith("min") else "more"


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, slash, step = text.partition("/")
    if not (slash and first.isdecimal() and step.isdecimal()):
        raise UserError(f"--share {text}: not of the form I/N; for two machines give 0/2 and 1/2")
    return int(first), int(step)


def _sbatch(pairs: list[str]) -> dict[str, str]:
    """Options of sbatch by name; the value of a flag such as `exclusive` is empty."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.lstrip("-").partition("=")
        if not key.replace("-", "").isalnum() or (equals and not value) or "\n" in value:
            raise UserError(f"--sbatch {pair}: not an option of sbatch; give KEY=VALUE, or KEY for a flag")
        if key == "array":
            raise UserError(f"--sbatch {pair}: is set from the tasks; give --task-bytes or --workers instead")
        options[key] = value
    return options


def _add_input(parser: Parser) -> None:
    what = (
        "files, folders, globs: .jsonl .json .csv .tsv .parquet .txt .py, with .gz .zst .bz2 .xz; stdlib; hf://DATASET"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH[:FIELD]",
        help=f"{what}; each may name its own field",
    )
    what = "key or column that holds the text, meta.text for a nested one; default: text"
    parser.add_argument("--field", default="text", metavar="KEY", help=what)
    what = "read every file in this format; default: by name and content"
    parser.add_argument("--format", choices=FORMATS, help=what)
    parser.add_argument(
        "--suffix", nargs="+", action="extend", default=[], metavar=".EXT", help="also read these as text"
    )


def _corpus(args) -> Corpus:
    corpus = Corpus(args.input, field=args.field, suffixes=args.suffix, form=args.format)
    if corpus.ignored:
        kinds = ", ".join(f"{n} {kind}" for kind, n in corpus.ignored.most_common(4))
        print(f"note: ignored {corpus.ignored.total()} files and folders in the inputs ({kinds})", file=sys.stderr)
    notes = corpus.notes + corpus.large_pages()
    for note in notes[:_NOTES]:
        print(note, file=sys.stderr)
    if len(notes) > _NOTES:
        print(f"note: and {len(notes) - _NOTES} more notes like these", file=sys.stderr)
    return corpus


_LABELS = {
    "skipped": "inputs skipped",
    "skip_reasons": "skipped because",
    "unread_share": "share not read",
    "loss": "lost by the tokenizer",
    "eod": "end-of-document id",
    "mb_per_s": "MB of text per s",
    "peak_rss_mb": "peak memory, MB",
    "peak_rss_worker_mb": "peak memory of a worker, MB",
}
"""Labels of facts whose names do not say what they are."""


def _table(facts: dict) -> str:
    """Aligned `label  value` lines; numbers with thousands separators, nested facts in one row."""
    rows = []
    for key, value in facts.items():
        if value is None:
            continue
        if key == "held_out":
            value = held_out_in_words(value)
        if key == "loss":
            value = in_words(facts[key])
        if key == "unread_share":
            value = f"{value:.2%}"
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in value.items()) or "-"
        elif isinstance(value, int):
            value = f"{value:,}"
        rows.append((_LABELS.get(key, key.replace("_", " ")), str(value)))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
