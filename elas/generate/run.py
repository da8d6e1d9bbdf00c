"""`elas generate`: prompts in, text out."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from elas.data.tokenizer import Tokenizer
from elas.data.tokenizer.found import document_ids
from elas.errors import ConfigError, UserError
from elas.generate.decode import Continuation, Sampling, Timing, decode
from elas.generate.few_tokens import prepare_for_few_tokens
from elas.generate.text import TextStream
from elas.hf.source import Source
from elas.kernels.relu2_24.few_tokens import emulated


@dataclass(frozen=True)
class Request:
    """What is asked for; see `elas generate --help`.

    Raises:
        UserError: a number out of its range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch: int = 8

    def __post_init__(self):
        for name, value, ok, what in (
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature,
                self.temperature == 0 or 1e-6 <= self.temperature < float("inf"),
                "0 (greedy), or 0.000001 or more",
            ),
            ("top-k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0, and at most 1"),
            ("batch", self.batch, self.batch >= 1, "at least 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 or more, and below 2⁶³"),
        ):
            if not ok:
                raise UserError(f"--{name} {value}: must be {what}")
        if any(not one for one in self.stop):
            raise UserError("--stop '': must not be empty")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError("--temperature 0: greedy, so --top-k and --top-p have no effect; give a temperature too")

    @property
    def sampling(self) -> Sampling:
        """For `decode`."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


@dataclass(frozen=True)
class Result:
    """A prompt and its continuation.

    Attributes:
        prompt: text.
        completion: text, up to a stop string.
        tokens: generated ids.
        reason: why it ended; see `Continuation`.
    """

    prompt: str
    completion: str
    tokens: list[int]
    reason: str

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion


class Generator:
    """A model with its tokenizer.

    Args:
        source: where the model comes from.
        tokenizer: path given by the user, or None.
        dtype: of the weights; None for the model's, but float32 on a CPU that has no products of its dtype.
        device: of the model.
        value_cache: `full` or `latent`; see `ElasConfig.value_cache`.

    Raises:
        UserError: no tokenizer, or one of another vocabulary.
    """

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: str | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        value_cache: str = "full",
    ):
        self.tokenizer: Tokenizer = source.tokenizer(tokenizer)
        self.model = source.model(dtype, device)
        self.widened = dtype is None and emulated(self.model.device, self.model.dtype)
        if self.widened:
            self.model = self.model.float()
        shape = self.model.config
        if self.tokenizer.vocab_size > shape.vocab_size:
            why = f"{self.tokenizer.vocab_size} tokens, and the model has {shape.vocab_size}"
            raise ConfigError("--tokenizer", tokenizer or str(source.path), why, "give the model's own")
        if value_cache == "latent":
            _check_latent(shape)
            shape.value_cache = "latent"
        prepare_for_few_tokens(self.model)
        self.context = shape.max_position_embeddings
        bos, eod = document_ids(source.config) if source.config is not None else (None, None)
        self._eos = _end_ids(shape.eos_token_id, eod, self.tokenizer)
        self._bos = [] if bos is None else [bos]

    def ids(self, prompt: str, where: str) -> list[int]:
        """Ids of a prompt; a text begins after the end of the one before, which an empty prompt consists of.

        Raises:
            UserError: the prompt is as long as the context, so that nothing can follow.
        """
        ids = [*self._bos, *self.tokenizer.encode(prompt)] or self._eos[:1]
        if not ids:
            raise UserError(
                f"{where}: is empty, and the tokenizer has no end-of-document id to begin with; give a text"
            )
        if len(ids) >= self.context:
            raise UserError(
                f"{where}: has {len(ids):,} tokens, and the model's context is {self.context:,}; give a shorter one"
            )
        return ids

    def run(
        self, prompts: list[str], request: Request, say: Callable[[str], None] | None = None
    ) -> Iterator[tuple[list[Result], Timing]]:
        """Continue prompts, `request.batch` at a time.

        Args:
            prompts: texts.
            request: how.
            say: called with text as it comes, for a single prompt.

        Yields:
            Results in the order of the prompts, and the time that the batch took.
        """
        all_ids = [self.ids(prompt, f"prompt {number + 1}") for number, prompt in enumerate(prompts)]
        for first in range(0, len(prompts), request.batch):
            ids = all_ids[first : first + request.batch]
            streams = [TextStream(self.tokenizer, one, request.stop) for one in ids]

            def on_token(row: int, so_far: Continuation, streams: list[TextStream] = streams) -> bool:
                if so_far.reason == "eos":
                    return False
                new = streams[row].add(so_far.tokens[-1])
                if say is not None:
                    say(new)
                return streams[row].stopped

            found, timing = decode(
                self.model,
                ids,
                max_new_tokens=request.max_new_tokens,
                context=self.context,
                sampling=request.sampling,
                eos=self._eos,
                first=first,
                on_token=on_token,
            )
            results = []
            for prompt, one, stream in zip(prompts[first:], found, streams):
                rest = "" if stream.stopped else stream.finish()
                if say is not None:
                    say(rest)
                results.append(Result(prompt, stream.text, one.tokens, one.reason))
            yield results, timing


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a line each, or of `.jsonl` the `prompt` of each line.

    Raises:
        UserError: the file cannot be read, holds none, or a line has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: is not UTF-8 text ({error.reason}); convert it with iconv") from error
    lines = text.split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise UserError(f"--file {path}: holds no prompt; write one in each line")
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'--file {where}: is not JSON ({error}); write {{"prompt": …}} in each line') from error
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        raise UserError(f'--file {where}: has no text named "prompt"; write {{"prompt": …}} in each line')
    return prompt


def _check_latent(shape) -> None:
    if getattr(shape, "low_rank", "none") == "none":
        why = "values of full rank have no latent"
        raise ConfigError("--value-cache", "latent", why, "use full, or a low-rank model")
    full = shape.num_key_value_heads * shape.head_dim
    if shape.rank >= full:
        why = f"a latent has {shape.rank} numbers, and values only {full}"
        raise ConfigError("--value-cache", "latent", why, "use full")


def _end_ids(configured: int | list[int] | None, eod: int | None, tokenizer: Tokenizer) -> list[int]:
    if configured is not None:
        return configured if isinstance(configured, list) else [configured]
    if eod is not None:
        return [eod]
    try:
        return [tokenizer.eod]
    except UserError:  # a tokenizer without one: a text ends at its length
        return []
