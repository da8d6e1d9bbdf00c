"""Streamed text is the text of all tokens, whatever falls between two of them."""

import pytest
from support.folders import TEXTS, write_tokenizer

from elas.data.tokenizer import load_tokenizer
from elas.generate.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", [*TEXTS, "🙂🙂 né\n\n  x", " leading", "的的的", "a" * 300])
def test_pieces_join_to_the_whole(tokenizer, text):
    prompt = tokenizer.encode("the cat")
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(one) for one in ids] + [stream.finish()]
    assert "".join(pieces) == text == stream.text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_lost(tokenizer):
    ids = tokenizer.encode("ok 🎈")[:-1]  # not among the merges
    stream = TextStream(tokenizer, [])
    shown = "".join([stream.add(one) for one in ids])
    assert shown in ("ok", "ok ")  # the space may be in one token with the half
    assert stream.finish().lstrip().startswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(("stop", "text", "left"), [
    (["sat"], "the cat sat on", "the cat "),
    (["on the", "mat"], "the cat sat on the mat", "the cat sat "),
    (["🙂"], "so 🙂 yes", "so "),
    (["t s"], "the cat sat", "the ca"),
    (["zzz"], "the cat", "the cat"),
])  # fmt: skip
def test_a_stop_string_ends_the_text_before_it(tokenizer, stop, text, left):
    stream, shown = TextStream(tokenizer, [], stop), ""
    for one in tokenizer.encode(text):
        shown += stream.add(one)
        if stream.stopped:
            break
    if not stream.stopped:
        shown += stream.finish()
    assert shown == left == stream.text
    assert stream.stopped == (left != text)
