"""Greedy text of a GGUF file: `PYTHON engine_llama.py FILE PROMPTS.json OUT.json`, by llama-cpp-python."""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama, __version__


def main(file: str, prompts: str, out: str) -> None:
    given = json.loads(Path(prompts).read_text())
    f32 = 0  # of GGML's types; its cache is fp16 by default
    model = Llama(file, n_ctx=0, logits_all=True, type_k=f32, type_v=f32, verbose=False)
    rows = []
    for prompt in given["ids"]:
        model.reset()
        model.eval(prompt)
        ids, chances = [], []
        for _ in range(given["new"]):
            logits = np.asarray(model.scores[model.n_tokens - 1], dtype=np.float64)
            token = int(logits.argmax())
            ids.append(token)
            top = logits.max()
            chances.append(float(logits[token] - top - np.log(np.exp(logits - top).sum())))
            model.eval([token])
        rows.append({"ids": ids, "logprobs": chances})
    Path(out).write_text(json.dumps({"version": __version__, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
