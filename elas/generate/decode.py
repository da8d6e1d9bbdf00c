"""Tokens from a model, greedy or sampled, with a cache of keys and values.

Legend: b prompts in a batch, n tokens, v vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from elas.generate.cache import growing_cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most probable token.
        top_k: choose among this many of the most probable ones; 0 for all.
        top_p: choose among the most probable ones that have this probability together.
        seed: of the random stream. Each prompt has a stream of its own, so its text does not depend on the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def warpers(self) -> LogitsProcessorList:
        """transformers' processors of logits."""
        made = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            made.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            made.append(TopPLogitsWarper(self.top_p))
        return made


@dataclass
class Continuation:
    """What was generated for a prompt.

    Attributes:
        tokens: without the prompt's, and without the end token.
        reason: `eos`, `stop` (the caller's), `length` (tokens asked for) or `context` (the model's longest sequence).
    """

    tokens: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class Timing:
    """Of one batch.

    Attributes:
        first_token_s: until the first token of each prompt.
        total_s: until the last token.
        tokens: generated, over all prompts.
        steps: forward passes.
    """

    first_token_s: float
    total_s: float
    tokens: int
    steps: int


OnToken = Callable[[int, Continuation], bool]
"""Called with a prompt's number in the batch and its continuation after each new token; True ends that prompt."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    context: int,
    sampling: Sampling = Sampling(),
    eos: Sequence[int] = (),
    first: int = 0,
    on_token: OnToken = lambda _row, _continuation: False,
) -> tuple[list[Continuation], Timing]:
    """Continue prompts together; shorter ones are padded on the left and masked.

    Args:
        model: in evaluation mode.
        prompts: ids, each at least one and fewer than `context`.
        max_new_tokens: for each prompt, at least 1.
        context: longest sequence, prompt and continuation.
        sampling: greedy by default.
        eos: ids that end a text.
        first: number of the first prompt, so that streams differ from those of an earlier batch.
        on_token: for streaming, and for stopping.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        padded[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    ids, mask = padded.to(device), mask.to(device)
    even = bool(mask.all())
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    picker = _Picker(sampling, len(prompts), first, device)
    found = [Continuation() for _ in prompts]
    cache, start, first_s, steps = growing_cache(), time.perf_counter(), 0.0, 0
    while True:
        output = model(
            input_ids=ids,
            attention_mask=None if even else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = picker.pick(output.logits[:, -1].float())
        steps += 1
        for row, token in enumerate(chosen.tolist()):
            one = found[row]
            if not one.reason:
                _take(one, token, len(prompts[row]), eos, max_new_tokens, context)
                if on_token(row, one) and not one.reason:
                    one.reason = "stop"
        first_s = first_s or time.perf_counter() - start
        if all(one.reason for one in found):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
    total = time.perf_counter() - start
    return found, Timing(first_s, total, sum(len(one.tokens) for one in found), steps)


def _take(one: Continuation, token: int, prompt: int, eos: Sequence[int], limit: int, context: int) -> None:
    if token in eos:
        one.reason = "eos"
        return
    one.tokens.append(token)
    if len(one.tokens) >= limit:
        one.reason = "length"
    elif prompt + len(one.tokens) >= context:
        one.reason = "context"


class _Picker:
    """Chooses tokens from logits `[b, v]`, with a random stream for each prompt."""

    def __init__(self, sampling: Sampling, rows: int, first: int, device: torch.device):
        self._greedy = sampling.temperature == 0.0
        self._warpers = sampling.warpers()
        self._streams = []
        if not self._greedy:
            for row in range(rows):
                seed = (sampling.seed * 1_000_003 + first + row) % 2**63
                self._streams.append(torch.Generator(device=device).manual_seed(seed))

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """Ids, int64 `[b]`."""
        if self._greedy:
            return logits.argmax(-1)
        warped = self._warpers(None, logits)  # pyright: ignore[reportArgumentType]  these warpers read no ids
        probabilities = warped.softmax(-1)
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, self._streams)]
        return torch.cat(drawn)
