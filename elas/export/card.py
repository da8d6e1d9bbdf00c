"""The model card of an exported folder: what the model is, how it was trained, what it scores, how to load it."""

from elas.checkpoint.folder import Checkpoint
from elas.config import Config
from elas.config.describe import describe
from elas.config.writing import to_yaml

_LOAD = {
    "elas": (
        'AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        "Factors are kept, and the FFN is 2:4 sparse as in training; the code is in this folder.",
    ),
    "dense": (
        'AutoModelForCausalLM.from_pretrained("{name}")',
        "Factors are multiplied out, so that no code but that of transformers is needed. There is no 2:4 sparsity in "
        "it: what that changes is in the table.",
    ),
}


def model_card(name: str, form: str, checkpoint: Checkpoint, config: Config, parameters: int, scores: dict) -> str:
    """The text of README.md.

    Args:
        name: of the folder.
        form: `elas` or `dense`.
        checkpoint: that was exported.
        config: of its run.
        parameters: of the folder.
        scores: rows of the table of results.
    """
    call, about = _LOAD[form]
    trust = ", trust_remote_code=True" if form == "elas" else ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in scores.items())
    data = config.data.train if isinstance(config.data.train, str) else ", ".join(map(str, config.data.train or ["?"]))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [elas, low-rank, 2-4-sparsity]
---

# {name}

{describe(config)}, {parameters / 1e6:.1f} M parameters in this folder, trained with ELAS (arXiv 2605.03667) for
{checkpoint.step:,} steps and {checkpoint.manifest["tokens"]:,} tokens of `{data}`.

{about}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = {call.format(name=name)}
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

## Results

| | |
|---|---|
{rows}

## Training

```yaml
{to_yaml(config).rstrip()}
```
"""
