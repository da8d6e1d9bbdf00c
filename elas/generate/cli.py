"""`elas generate`: text from a run, a checkpoint or an exported folder."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from elas.checkpoint.choose import check_model
from elas.command import Parser
from elas.console import Heartbeat
from elas.data.tokenizer.found import check_given
from elas.errors import ConfigError, UserError
from elas.files import check_is_no_input, check_readable, write_json

EXAMPLE = 'elas generate --checkpoint runs/60m --prompt "The" --temperature 0.8 --top-p 0.9'


def main(argv: list[str]) -> int:
    """Run `elas generate ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    options = _parser().parse_args(argv)
    for path in options.file:
        check_readable("--file", path, "give a text file")
    check_given(options.tokenizer)
    check_model(options.checkpoint)
    with Heartbeat("starting"):
        from elas.generate.run import Generator, Request, read_prompts
        from elas.hf.source import source_of

    names = [field.name for field in dataclasses.fields(Request)]
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    given["stop"] = tuple(_unescaped(one) for one in options.stop)
    request = Request(**given)
    tokenizer = [options.tokenizer] if options.tokenizer else []
    check_is_no_input(options.json, [options.checkpoint, *tokenizer, *options.file])
    prompts = [*options.prompt, *(line for path in options.file for line in read_prompts(path))]
    if not prompts:
        raise UserError("elas generate: nothing to continue; give --prompt TEXT (empty for a new text), or --file FILE")
    import torch

    device = _device(options.device)
    source = source_of(options.checkpoint)
    for line in source.passed_over:
        print(f"skipped {line}", file=sys.stderr)
    with Heartbeat(f"loading {source.path}"):
        made = Generator(
            source,
            tokenizer=options.tokenizer,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            device=device,
            value_cache=options.value_cache,
        )
    if made.widened:
        fix = "--dtype bfloat16 keeps it: less memory, much slower prompts"
        print(f"in float32: this CPU has no bfloat16 products ({fix})", file=sys.stderr)
    for number, prompt in enumerate(prompts):
        made.ids(prompt, f"prompt {number + 1}")
    streams = len(prompts) == 1
    results, timings = [], []
    if streams:
        _show(prompts[0])
    for found, timing in made.run(prompts, request, _show if streams else None):
        results += found
        timings.append(timing)
        if not streams:
            for number, one in enumerate(found, len(results) - len(found) + 1):
                print(f"── {number}\n{one.text}", flush=True)
    facts = _facts(source.path, results, timings, made)
    print(f"\n{_summary(facts, results)}" if streams else _summary(facts, results), file=sys.stderr)
    write_json(options.json, facts)
    return 0


def _unescaped(text: str) -> str:
    """`\\n`, `\\t` and `\\\\` of a command line as the characters they stand for."""
    stands = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: stands[found[0]], text)


def _facts(path: Path, results: list, timings: list, made) -> dict:
    tokens, seconds = sum(one.tokens for one in timings), sum(one.total_s for one in timings)
    return {
        "checkpoint": str(path),
        "text": results[0].text,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "time_to_first_token_s": timings[0].first_token_s,
        "seconds": seconds,
        "dtype": str(made.model.dtype).removeprefix("torch."),
        "device": str(made.model.device),
        "value_cache": getattr(made.model.config, "value_cache", "full"),
        "results": [dataclasses.asdict(one) | {"text": one.text} for one in results],
    }


def _summary(facts: dict, results: list) -> str:
    reasons = {
        "eos": "the end of the text",
        "stop": "a stop string",
        "length": "--max-new-tokens",
        "context": "the model's longest sequence",
    }
    ends = "; ".join(
        f"{n} ended at {text}" for reason, text in reasons.items() if (n := sum(r.reason == reason for r in results))
    )
    first = facts["time_to_first_token_s"]
    return f"{facts['tokens']:,} tokens, {facts['tokens_per_s']:.1f}/s, first after {first:.2f} s; {ends}"


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _device(given: str | None) -> str:
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ConfigError("--device", given, "is no device", "give cpu or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", given, "there is no CUDA here", "give cpu")
    return given


def _parser() -> Parser:
    parser = Parser("elas generate", "Continue prompts with a trained model.", EXAMPLE)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="C",
        help="a run's folder, a checkpoint, or an exported folder",
    )
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several")
    add("--file", action="append", default=[], type=Path, metavar="FILE", help="a prompt a line; .jsonl: its `prompt`")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="for each prompt (default: 100)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens (default: 0, all)")
    top_p = "sample from the most probable tokens that have this probability together (default: 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    add("--seed", type=int, default=0, metavar="N", help="of the random stream of each prompt (default: 0)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, in which \\n is a new line; repeat it for several",
    )
    add("--batch", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    add("--tokenizer", metavar="PATH", help="default: the run's, or the one in the folder")
    dtype = "of the weights (default: that of training, but float32 on a CPU without bfloat16 products)"
    add("--dtype", choices=["float32", "bfloat16"], help=dtype)
    add("--device", metavar="D", help="default: cuda if there is one, else cpu")
    cache = "latent: of low-rank values keep the rank-wide vector, less memory, more arithmetic (default: full)"
    add("--value-cache", choices=["full", "latent"], default="full", help=cache)
    return parser
