"""Text of tokens as they come: pieces of text that no later token changes, and stop strings."""

from collections.abc import Sequence

from elas.data.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a continuation, made of its tokens one by one.

    Decoding each time from the start would cost n² for n tokens, and decoding each token alone would lose spaces and
    characters of several tokens. A few tokens before the new ones are decoded with them, and their text is cut off.

    Args:
        tokenizer: of the model.
        prompt: ids before the first token, whose text is not part of the continuation's.
        stop: strings that end the text.

    Attributes:
        text: so far, up to a stop string.
        stopped: whether a stop string was found.
    """

    _BEFORE = 8

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, list(stop)
        self._ids = list(prompt[-self._BEFORE :])
        self._begin, self._done = 0, len(self._ids)
        self._held = ""  # of tokens whose text may still change
        self._settled = ""
        self._given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All of the text so far."""
        return self._settled + self._held

    def add(self, token: int) -> str:
        """Add a token; returns the text that is new and final."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._begin : self._done])
        after = self._tokenizer.decode(self._ids[self._begin :])
        new = after[len(before) :]
        if new.endswith(_BROKEN):  # a character whose other bytes are in the next token
            self._held = new
        else:
            self._settled, self._held = self._settled + new, ""
            self._begin = max(self._begin, len(self._ids) - self._BEFORE)
            self._done = len(self._ids)
        return self._final()

    def finish(self) -> str:
        """The rest of the text, when no token comes any more."""
        self._settled, self._held = self.text, ""
        self._stop = []
        return self._final()

    def _final(self) -> str:
        at = min((i for one in self._stop if (i := self._settled.find(one)) >= 0), default=None)
        if at is not None:
            self._settled, self._held, self.stopped = self._settled[:at], "", True
        end = len(self._settled) if self.stopped else len(self._settled) - self._may_begin_stop()
        new = self._settled[self._given : end]
        self._given = max(self._given, end)
        return new

    def _may_begin_stop(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = max((len(one) for one in self._stop), default=0)
        for size in range(min(longest - 1, len(self._settled)), 0, -1):
            if any(one.startswith(self._settled[-size:]) for one in self._stop):
                return size
        return 0
