"""What SentencePiece does to a text before it looks for pieces, as normalizers of `tokenizers`.

The order is that of SentencePiece's normalizer.cc: protect user-defined symbols, apply the character map, strip and
collapse spaces, prepend (or append) the dummy space.
"""

from collections.abc import Collection, Iterable

from elas.data.tokenizer.sentencepiece_model import SPACE_MARK
from elas.data.tokenizer.special_tokens import model_proto
from elas.errors import UserError

_FREE = [chr(0xFDD1 + i) for i in range(31)] + [chr(0x10E000 + i) for i in range(0x1000)]
# Between two characters of which one is not ASCII, and inside of "\r\n": where graphemes of several characters are.
_BETWEEN = r"(?<=[^\x00-\x7F]|\r)(?=[\s\S])|(?<=[\s\S])(?=[^\x00-\x7F])"


class StandIns:
    """Noncharacters that stand for strings; `taken` maps those that remain in the ids' pieces."""

    def __init__(self):
        self._free = iter(_FREE)
        self.taken: dict[str, str] = {}

    def new(self) -> str:
        """A noncharacter without a use so far."""
        try:
            return next(self._free)
        except StopIteration:
            raise UserError(f"tokenizer: more than {len(_FREE)} user-defined symbols cannot be exported") from None

    def of(self, piece: str) -> str:
        """`piece` with the strings in `taken` replaced."""
        for text, other in self.taken.items():
            piece = piece.replace(text, other)
        return piece

    def step(self, text: str):
        """A normalizer that replaces `text` for good."""
        from tokenizers import normalizers

        self.taken[text] = self.new()
        return normalizers.Replace(text, self.taken[text])


class Normalizers:
    """The normalizers of one model.

    Args:
        model: the serialised model.

    Attributes:
        is_plain: whether they only replace single characters, so that parts of a text may pass through them alone.
    """

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        proto = model_proto(model)
        self._spec = proto.normalizer_spec
        self._as_suffix = proto.trainer_spec.treat_whitespace_as_suffix
        self._sp = SentencePieceProcessor(model_proto=model)
        names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        # `SentencePieceTokenizer` then encodes U+2581 as its bytes, and each part between two of them for itself.
        self._keeps_mark = all(self._sp.is_byte(self._sp.piece_to_id(name)) for name in names)
        spec = self._spec
        self._has_map = bool(spec.precompiled_charsmap)
        self.is_plain = not (spec.add_dummy_prefix or spec.remove_extra_whitespaces or self._has_map)

    def steps(self, symbols: Iterable[str], kept: Collection[str], names: StandIns) -> list:
        """All steps.

        Args:
            symbols: user-defined symbols, with plain spaces.
            kept: those of them that stand-ins replace for good.
            names: gives the stand-ins.
        """
        from tokenizers import normalizers

        before, after, late = [], [], []
        for symbol in sorted(symbols, key=len, reverse=True):
            if symbol in kept:
                (late if " " in symbol else before).append(names.step(symbol))
            elif self._has_map and " " not in symbol:
                before.append(normalizers.Replace(symbol, other := names.new()))
                after.append(normalizers.Replace(other, symbol))
        characters = self._character_map(names) if self._has_map else []
        return [*before, *characters, *self._spaces(), *after, *late]

    def sequence(self, steps: list):
        """One normalizer of all; None without steps."""
        from tokenizers import normalizers

        return normalizers.Sequence(steps) if steps else None

    def _character_map(self, names: StandIns) -> list:
        """The model's map, on code points: `Precompiled` alone would map whole graphemes by their first match.

        The map's keys of several characters are composed by NFC before and after, if the map composes at all.
        """
        from tokenizers import Regex, normalizers

        composes = [normalizers.NFC()] if "\u00e9" in self._sp.normalize("e\u0301") else []
        separator, mark = names.new(), names.new()
        protect = [normalizers.Replace(SPACE_MARK, mark)] if self._keeps_mark else []
        apart = normalizers.Replace(Regex(_BETWEEN), separator)
        precompiled = normalizers.Precompiled(bytes(self._spec.precompiled_charsmap))
        restore = [normalizers.Replace(mark, SPACE_MARK)] if self._keeps_mark else []
        together = normalizers.Replace(separator, "")
        return [*protect, *composes, apart, precompiled, together, *composes, *restore]

    def _spaces(self) -> list:
        """Strip and collapse spaces, and add the dummy one; U+2581 separates parts if it is encoded as bytes."""
        from tokenizers import Regex, normalizers

        def replace(pattern: str, content: str):
            return normalizers.Replace(Regex(pattern), content)

        prefix = self._spec.add_dummy_prefix and not self._as_suffix
        as_space = [] if self._keeps_mark else [normalizers.Replace(SPACE_MARK, " ")]
        steps = as_space
        if self._spec.remove_extra_whitespaces:
            if not self._keeps_mark:
                steps = [replace(r"\A +", ""), replace(" {2,}", " "), *as_space, replace(r" +\z", "")]
            elif prefix:  # the parts after the first are encoded as they are
                first = r"\A[^\x{2581}]*?\K +(?=\x{2581}|\z)"
                steps = [replace(r"\A +", ""), replace(r"\G[^\x{2581}]*? \K +", ""), replace(first, "")]
            else:
                edges = r"(?<=\x{2581}|\A) +| +(?=\x{2581}|\z)"
                steps = [replace(edges, ""), replace(" {2,}", " ")]
        not_mark = r"[^\x{2581}]" if self._keeps_mark else r"[\s\S]"
        if prefix:
            steps.append(replace(rf"\A(?={not_mark})", " "))
        elif self._spec.add_dummy_prefix:
            ends = r"\x{2581}|\z" if self._keeps_mark else r"\z"
            steps.append(replace(rf"(?<={not_mark})(?={ends})", " "))
        return steps
