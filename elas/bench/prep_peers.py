"""The programs that `elas bench prep` compares `elas prep tokenize` with, each in its own process.

- `library`: the tokenizer library alone, on the same number of threads, from texts in memory to lists of ids.
- `datatrove`: its Megatron tokenizer step after our reader, on its local executor.

Prints one line of JSON: `seconds`, `bytes_in`, `tokens`.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def library(inputs: str, tokenizer: str, threads: int) -> dict:
    """Batch encoding by SentencePiece or by tokenizers."""
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(threads), "true"
    from elas.data_prep.sources import Corpus

    texts = [d.text for d in Corpus([inputs]) if d.text and not d.text.isspace()]
    if (Path(tokenizer) / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
        fast.encode_batch_fast(texts[:2], add_special_tokens=False)
        start = time.perf_counter()
        ids = [encoded.ids for encoded in fast.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=f"{tokenizer}/tokenizer.model")
        start = time.perf_counter()
        ids = pieces.encode(texts, num_threads=threads)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes_in": sum(len(t.encode()) for t in texts), "tokens": sum(map(len, ids))}


def datatrove(inputs: str, tokenizer: str, workers: int) -> dict:
    """datatrove's tokenizer step and executor, on the tasks of `elas prep tokenize`."""
    start = time.perf_counter()
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from loguru import logger

    from elas.data_prep.plan import Settings, make_plan
    from elas.data_prep.sources import Corpus
    from elas.data_prep.steps import ReadTask

    logger.remove()
    logger.disable("datatrove")
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(
            Corpus([inputs]), Settings("text", tokenizer, "", 0, "uint16", None), [Path(folder, "o")], None
        )
        plan.work.mkdir()
        plan.save()
        no_end: Any = None  # its code takes None, its annotation does not
        step = MegatronDocumentTokenizer(f"{folder}/out", tokenizer_name_or_path=f"{tokenizer}/tokenizer.json",
                                         eos_token=no_end, batch_size=1000)  # fmt: skip
        executor = LocalPipelineExecutor([ReadTask(str(plan.work)), step], tasks=len(plan.tasks), workers=workers,
                                         logging_dir=f"{folder}/logs", start_method="fork")  # fmt: skip
        executor.run()
        seconds = time.perf_counter() - start
        tokens = sum(path.stat().st_size for path in Path(folder, "out").glob("*.bin")) // step.token_size
    return {"seconds": seconds, "bytes_in": None, "tokens": tokens}


PEERS = {"library": library, "datatrove": datatrove}

if __name__ == "__main__":
    name, given, path, count = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(PEERS[name](given, path, int(count))), file=out)
