"""The tokenizer of what is evaluated: to tokenise text, and for the bytes of tokens."""

from pathlib import Path

from elas.data.corpus import check_made_with, open_tokenizer
from elas.data.token_files import manifest_tokenizer, read_manifest
from elas.data.tokenizer import Tokenizer, load_tokenizer
from elas.data.tokenizer.found import tokenizer_of
from elas.errors import ConfigError, UserError
from elas.hf.source import Source

_FIX = "give --tokenizer PATH"


def tokenizer_for(source: Source, given: str | None, corpora: list[str]) -> tuple[Tokenizer | None, str]:
    """The tokenizer: the one given, the model's, or the one that the first of the corpora names.

    It is not required to score tokens: if none is known, there are no bits per byte.

    Args:
        source: the model.
        given: value of `--tokenizer`.
        corpora: prefixes of token files to evaluate; each must have been made with it.

    Returns:
        The tokenizer, and why there is none.

    Raises:
        UserError: the one given cannot be used, or a corpus was made with another.
    """
    found, why = _of_model(source, given)
    if found is None and given is None:
        found = next((one for prefix in corpora if (one := _of_corpus(prefix)) is not None), None)
    if found is not None:
        key = "--tokenizer" if given else "--data"
        for prefix in corpora:
            check_made_with(key, given or prefix, found, prefix, "another --data" if not given else None)
    return found, why


def _of_model(source: Source, given: str | None) -> tuple[Tokenizer | None, str]:
    if source.config is not None:
        try:
            return load_tokenizer(tokenizer_of(source.config, given)), ""
        except ConfigError as error:
            if given is not None:
                raise
            return None, str(error)
    if given is not None:
        return open_tokenizer("--tokenizer", given), ""
    try:
        return load_tokenizer(source.path), ""
    except UserError as error:
        return None, str(error)


def _of_corpus(prefix: str) -> Tokenizer | None:
    """The tokenizer that a corpus was made with, if it is still where it was."""
    path = manifest_tokenizer(prefix)
    if path is None or not Path(path).exists():
        return None
    try:
        found = load_tokenizer(path)
    except UserError:
        return None
    return found if read_manifest(prefix).get("tokenizer_sha256") in {None, *found.identities} else None
