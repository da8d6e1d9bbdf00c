"""`elas prep`: train a tokenizer, and turn text into Megatron token files with it."""

import sys
from difflib import get_close_matches
from pathlib import Path

from elas.cli import Parser, write_json
from elas.data_prep.sources import Corpus
from elas.errors import UserError


def usage() -> str:
    """The text of `elas prep --help`."""
    lines = ["usage: elas prep COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12} {what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "example:", *(f"  {e}" for e in EXAMPLES.values()), "", "`elas prep COMMAND --help` says more."]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run `elas prep ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see elas prep --help"
        raise UserError(f"elas prep: unknown command {argv[0]!r}; {hint}")
    return COMMANDS[argv[0]][0](argv[1:])


def tokenizer(argv: list[str]) -> int:
    """`elas prep tokenizer`: train SentencePiece on a sample of the input."""
    from elas.data_prep.tokenizer_training import DEFAULT_SAMPLE_BYTES, train_tokenizer

    parser = Parser("elas prep tokenizer", "Train a SentencePiece tokenizer.", EXAMPLES["tokenizer"])
    _add_input(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of token ids")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for tokenizer.model")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe, which is quick")
    parser.add_argument("--sample-bytes", type=int, default=DEFAULT_SAMPLE_BYTES, metavar="N", help="text to train on")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.0, metavar="F", help="leave out what tokenize holds out"
    )
    args = parser.parse_args(argv)
    facts = train_tokenizer(
        _corpus(args),
        args.output,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        sample_bytes=args.sample_bytes,
        valid_fraction=args.valid_fraction,
    )
    write_json(args.json, facts)
    keys = "model_type", "vocab_size", "documents", "bytes_in", "sample_bytes", "skipped", "train_seconds", "sha256"
    print(_table({"tokenizer": args.output} | {key: facts[key] for key in keys}))
    return 0


def tokenize(argv: list[str]) -> int:
    """`elas prep tokenize`: write `.bin`, `.idx` and manifest."""
    from elas.data_prep.tokenize_corpus import tokenize_corpus

    parser = Parser("elas prep tokenize", "Tokenise text to Megatron .bin/.idx files.", EXAMPLES["tokenize"])
    _add_input(parser)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="from elas prep tokenizer, or Hugging Face's")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, manifest"
    )
    parser.add_argument("--valid-output", type=Path, metavar="PREFIX", help="the same for held-out documents")
    parser.add_argument("--valid-fraction", type=float, default=0.0, metavar="F", help="documents to hold out, 0.02")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one for every usable core")
    eod = {"choices": ("yes", "no"), "default": "yes"}
    parser.add_argument("--append-eod", **eod, help="end every document with the end-of-document id; default: yes")
    args = parser.parse_args(argv)
    facts = tokenize_corpus(
        _corpus(args),
        args.tokenizer,
        args.output,
        valid_prefix=args.valid_output,
        valid_fraction=args.valid_fraction,
        workers=args.workers,
        append_eod=args.append_eod == "yes",
    )
    write_json(args.json, facts)
    print(_table({"output": args.output} | facts))
    return 0


COMMANDS = {
    "tokenizer": (tokenizer, "train a SentencePiece tokenizer"),
    "tokenize": (tokenize, "turn text into Megatron .bin/.idx token files"),
}
EXAMPLES = {
    "tokenizer": "elas prep tokenizer --input stdlib --vocab-size 8192 --output data/tokenizer",
    "tokenize": "elas prep tokenize --input stdlib --tokenizer data/tokenizer --output data/train",
}


def _add_input(parser: Parser) -> None:
    what = "files, folders or globs of .jsonl, .jsonl.gz, .txt, .py; or stdlib, this Python's own source"
    parser.add_argument("--input", nargs="+", action="extend", required=True, metavar="PATH", help=what)
    parser.add_argument("--field", default="text", metavar="KEY", help="key of the text in JSONL; default: text")
    parser.add_argument(
        "--suffix", nargs="+", action="extend", default=[], metavar=".EXT", help="read these as text too"
    )


def _corpus(args) -> Corpus:
    corpus = Corpus(args.input, field=args.field, suffixes=args.suffix)
    if corpus.ignored:
        kinds = ", ".join(f"{n} {kind}" for kind, n in corpus.ignored.most_common(4))
        print(f"note: passed over {corpus.ignored.total()} in the inputs ({kinds})", file=sys.stderr)
    return corpus


def _table(facts: dict) -> str:
    """Aligned `key  value` lines; numbers with thousands separators, nested facts in a row."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{n:,} {what}" for what, n in value.items()) or "-"
        elif isinstance(value, int):
            value = f"{value:,}"
        rows.append((key.replace("_", " "), str(value)))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
