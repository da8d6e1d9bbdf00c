import json
import sys

import pytest

from elas.data.tokenizer import load_tokenizer
from elas.data_prep.sources import Corpus, Document
from elas.data_prep.tokenizer_training import sample_chunks, train_tokenizer
from elas.errors import ConfigError, UserError

AWKWARD = [
    "",
    " leading and trailing  ",
    "\n\n\n",
    "def f(x):\n\tif x:\n\t\treturn  x   # spaces\n    \n",
    "crlf\r\nand\rcr\n",
    "\0 control \x1b\x7f\x85\u2028",
    "▁ the ▁▁ space mark ▁",
    " ⁇ ▅ what SentencePiece keeps for itself",
    "</s><s><unk><pad><0x41>",
    "e\u0301 é ﬁ Ａ ½ \ufeff no normalisation",
    "日本語 😀 𝒳 \U0010ffff",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_is_exact_on_awkward_text(tokenizer_folder, text):
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert tokenizer.eod not in ids  # text that spells `</s>` does not end the document


def test_round_trip_is_exact_on_source_code(tokenizer_folder, sources):
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = list(Corpus(sources))
    assert len(documents) > 5
    for document in documents:
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text, document.name


def test_training_is_deterministic_and_described(tokenizer_folder, sources, tmp_path):
    facts = train_tokenizer(Corpus(sources), tmp_path, vocab_size=600)
    assert (tmp_path / "tokenizer.model").read_bytes() == (tokenizer_folder / "tokenizer.model").read_bytes()
    assert json.loads((tmp_path / "manifest.json").read_text()) == facts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "tokenizer.model", "tokenizer.vocab"]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.sha256 == facts["sha256"]
    assert tokenizer.vocab_size == len(tokenizer.vocab) == 600
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.pad}) == 3


def test_sample_fits_and_does_not_depend_on_order():
    documents = [Document(f"d{i}", f"{i} line\n" * 500) for i in range(40)]
    sample = sample_chunks(documents, 20_000)
    assert sample == sample_chunks(reversed(documents), 20_000)
    assert 15_000 < sum(map(len, sample)) <= 20_000
    assert all(chunk.endswith("\n") for chunk in sample)
    assert "".join(sorted(sample_chunks([Document("long", "x" * 9000)], 10**6))) == "x" * 9000


def test_mistakes_are_named(tmp_path):
    few = [Document("a", "a few words only\n")]
    with pytest.raises(ConfigError, match=r"--vocab-size=4000: the text has only 297 .*; give more text"):
        train_tokenizer(few, tmp_path, vocab_size=4000)
    few += [Document("b", "and some more of them, quite other ones, whose pieces suffice for a small vocabulary\n")]
    with pytest.raises(ConfigError, match=r"--vocab-size=4000: .*at most \d+, or more text"):
        train_tokenizer(few, tmp_path, vocab_size=4000)
    with pytest.raises(ConfigError, match="--vocab-size=10"):
        train_tokenizer(few, tmp_path, vocab_size=10)
    with pytest.raises(ConfigError, match="--vocab-size=300: fewer pieces"):
        train_tokenizer([Document("a", "".join(map(chr, range(0x4E00, 0x5000))))], tmp_path, vocab_size=300)
    for nothing in ([], [Document("a", "")], [Document("a", "\u2585")]):
        with pytest.raises(UserError, match="no text to train"):
            train_tokenizer(nothing, tmp_path, vocab_size=400)
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tokenizer.model").write_text("junk")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_hugging_face_folder_behind_the_same_interface(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(["def f(x):\n    return x\n"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", pad_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "def g(é):\n\t</s>  "
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert tokenizer.eod not in ids
    with pytest.raises(NotImplementedError):  # padding with `eod` would take it out of the loss
        _ = tokenizer.pad
    (tmp_path / "tokenizer.json").write_text("{junk")
    with pytest.raises(UserError, match="cannot read it"):
        load_tokenizer(tmp_path)


def test_tokenising_needs_neither_torch_nor_megatron(tokenizer_folder, tmp_path, write_jsonl):
    import subprocess

    data = write_jsonl([{"text": "a b"}])
    command = f"prep tokenize --input {data} --tokenizer {tokenizer_folder} --output {tmp_path}/all"
    code = f"""
import sys
from elas.cli import run
run({command.split()!r})
print([m for m in ("torch", "megatron", "transformers") if m in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")


def test_empty_documents_are_skipped_refusals_leave_nothing(tmp_path):
    text = "".join(f"words {i * i} of text {i**3}\n" for i in range(300))
    documents = [Document("a", text), Document("b", "")]
    facts = train_tokenizer(documents, tmp_path / "made", vocab_size=300)
    assert (facts["documents"], facts["skipped"], facts["skip_reasons"]) == (1, 1, {"empty": 1})
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer(documents[1:], tmp_path / "deep" / "refused", vocab_size=300)
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_of_a_huge_corpus_only_a_part_is_read(tmp_path):
    lines = [json.dumps({"text": f"line {n} with a few words\n"}) for n in range(40_000)]
    for part in range(4):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines[part::4]) + "\n")
    corpus = Corpus([f"{tmp_path}/*.jsonl"])
    facts = train_tokenizer(corpus, tmp_path / "a", vocab_size=320, sample_bytes=10_000)
    assert 80_000 <= facts["bytes_in"] < 81_000
    again = train_tokenizer(corpus, tmp_path / "b", vocab_size=320, sample_bytes=10_000)
    assert again["sha256"] == facts["sha256"]
