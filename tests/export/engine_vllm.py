"""Greedy text of a folder by vLLM: `PYTHON engine_vllm.py FOLDER PROMPTS.json OUT.json OPTIONS`; needs vLLM."""

import json
import sys
from pathlib import Path


def main(folder: str, prompts: str, out: str, options: str) -> None:
    from vllm import LLM, SamplingParams, __version__

    given = json.loads(Path(prompts).read_text())
    model = LLM(folder, dtype="float32", enforce_eager=True, **json.loads(options))
    sampling = SamplingParams(temperature=0, max_tokens=given["new"], logprobs=1, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": ids} for ids in given["ids"]], sampling)
    rows = []
    for one in found:
        text = one.outputs[0]
        chances = [step[token].logprob for token, step in zip(text.token_ids, text.logprobs)]
        rows.append({"ids": list(text.token_ids), "logprobs": chances})
    Path(out).write_text(json.dumps({"version": __version__, "rows": rows}))


if __name__ == "__main__":  # vLLM's workers import this file
    main(*sys.argv[1:])
