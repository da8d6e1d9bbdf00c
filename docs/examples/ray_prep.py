"""Tokenise a corpus with Ray, and the same corpus without it: the files are identical.

`elas prep tokenize --executor ray` cuts the corpus into tasks and runs them on the Ray cluster at RAY_ADDRESS, or, as
here, on this machine. On a cluster, the folder must be on a file system that all of its nodes share. The corpus is
small: the help texts that Python has for its keywords.

    pip install 'elas[ray]'
    python ray_prep.py --out ray-data
    RAY_ADDRESS=head:6379 python ray_prep.py --out /shared/ray-data     # on a running cluster

It prints the tables of `elas prep`, the tasks that Ray ran, and at the end whether the token files are identical.
"""

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path


def write_corpus(path: Path) -> None:
    """One help text in each line, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = pydoc_data.topics.topics.values()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def elas(*words: object) -> None:
    """Run a command of elas, as in a shell."""
    print("$ elas", *words, flush=True)
    subprocess.run([sys.executable, "-m", "elas.cli", *map(str, words)], check=True)


def main() -> None:
    """Corpus, tokenizer, tokens by Ray, tokens by local processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus, the tokenizer and the tokens")
    out = parser.parse_args().out
    corpus, tokenizer = out / "corpus.jsonl", out / "tokenizer"
    write_corpus(corpus)
    elas("prep", "tokenizer", "--input", corpus, "--vocab-size", 2048, "--output", tokenizer, "--overwrite")
    tokenize = ["prep", "tokenize", "--input", corpus, "--tokenizer", tokenizer, "--task-bytes", 100_000, "--overwrite"]
    elas(*tokenize, "--workers", 2, "--output", out / "by_ray", "--executor", "ray")
    elas(*tokenize, "--workers", 2, "--output", out / "by_processes")
    elas("prep", "verify", out / "by_ray")
    same = all(
        (out / f"by_ray{end}").read_bytes() == (out / f"by_processes{end}").read_bytes() for end in (".bin", ".idx")
    )
    print("token files of Ray and of local processes are", "identical" if same else "DIFFERENT")
    sys.exit(not same)


if __name__ == "__main__":
    main()
