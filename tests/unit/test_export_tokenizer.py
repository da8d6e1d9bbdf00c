"""An exported tokenizer yields the ids of its source in transformers, whatever its kind."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elas.data.tokenizer import load_tokenizer
from elas.errors import UserError
from elas.hf.tokenizer import write_tokenizer

SYMBOLS = ["\n", "\t", "<|user|>", "<|end of turn|>"]
OURS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n", "\t"],
}
STOCK = {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc"}  # what spm_train does by itself
KINDS = {
    "ours": OURS,
    "chat symbols": OURS | {"user_defined_symbols": SYMBOLS},
    "symbols of spaces": OURS | {"user_defined_symbols": ["\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n"]},
    "dummy prefix": OURS | {"add_dummy_prefix": True, "user_defined_symbols": SYMBOLS},
    "no special tokens": OURS | {"bos_id": -1, "eos_id": -1, "pad_id": -1},
    "no byte fallback": OURS | {"byte_fallback": False},
    "stock": STOCK,
    "stock with bytes and symbols": STOCK | {"byte_fallback": True, "user_defined_symbols": SYMBOLS},
    "spaces removed": OURS | {"remove_extra_whitespaces": True, "user_defined_symbols": []},
    "case folded": OURS | {"normalization_rule_name": "nmt_nfkc_cf"},
    "space as suffix": OURS | {"add_dummy_prefix": True, "treat_whitespace_as_suffix": True},
}
HOSTILE = [
    "<|user|>  Hi\n<|end of turn|><|user|> <|end", "\n<|user|>", "  a  \u2581  b  \u2581", "\u2581 x", "   ",
    "x \r\n y", "</s> <s> <unk> <0x41>", "\u00aa\u0302\u0300", "\U0010e000",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


def pieces_of(texts: list[str], size: int) -> list[str]:
    return [text[i : i + size] for text in texts for i in range(0, len(text), size)]


def train(texts, **settings) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    given = {"vocab_size": 700, "pad_id": 3, "minloglevel": 2, "max_sentence_length": 16000, "hard_vocab_limit": False}
    SentencePieceTrainer.train(sentence_iterator=iter(pieces_of(texts, 2000)), model_writer=model, **given | settings)
    return model.getvalue()


def exported(path: Path, folder: Path) -> tuple[dict, object, object]:
    """Facts, the exported tokenizer in transformers, and in ELAS."""
    from transformers import AutoTokenizer

    folder.mkdir()
    facts = write_tokenizer(path, folder, 512)
    return facts, AutoTokenizer.from_pretrained(folder, local_files_only=True), load_tokenizer(folder)


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_sentencepiece_ids_are_equal_for_every_setting(model_type, texts, tmp_path):
    kinds = list(KINDS.items())
    for number, (kind, settings) in enumerate(kinds[1:8:6] if model_type == "char" else kinds):
        path = tmp_path / f"{number}.model"
        path.write_bytes(train(texts, model_type=model_type, **settings))
        ours = load_tokenizer(path)
        facts, auto, again = exported(path, tmp_path / f"out{number}")
        assert (again.vocab_size, again.special_ids, again.unk) == (ours.vocab_size, ours.special_ids, ours.unk), kind
        assert facts["ties"] == 0 or model_type == "unigram", kind
        roles = (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id)
        assert roles == tuple(facts[f"{role}_token_id"] for role in ("bos", "eos", "pad")), kind
        assert roles == ((None, None, None) if kind == "no special tokens" else (1, 2, 3))
        differ = 0
        for text in [*HOSTILE, *pieces_of(texts, 300)]:
            ids, others = ours.encode(text), again.encode(text)
            if ids != others:
                differ += 1
                assert is_tie(path, ids, others), (kind, text)
            if "</s>" not in text:
                assert auto(text)["input_ids"] == others, (kind, text)
            assert ours.unk in ids or auto.decode(ids, skip_special_tokens=True) == ours.decode(ids), (kind, text)
        # Every difference is a tie; their number depends on the texts: 5 of 164 in Python 3.11's, 11 of 165 in 3.13's.
        assert differ <= 0.1 * len(pieces_of(texts, 300)) if model_type == "unigram" else differ == 0, kind


def is_tie(path: Path, first: list[int], second: list[int]) -> bool:
    """Whether scores are equal to single precision: with 300 characters, sums of up to 2,000 have errors of 1e-4."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    one, other = (sum(map(processor.get_score, ids)) for ids in (first, second))
    return processor.decode(first) == processor.decode(second) and abs(one - other) < 0.01


def test_a_special_token_in_text_is_special_unless_split(texts, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train(texts, model_type="bpe", **OURS))
    _, auto, again = exported(path, tmp_path / "out")
    text = "a</s>b"
    assert 2 in auto(text)["input_ids"] and 2 not in again.encode(text)
    assert again.encode(text) == load_tokenizer(path).encode(text)
    assert auto.model_max_length == 512 and set(auto(text)) == {"input_ids", "attention_mask"}


def test_an_environment_without_sentencepiece_opens_it(texts, tmp_path):
    path, text = tmp_path / "t.model", "def f(x):\n    return '\u2581 日本'\n"
    path.write_bytes(train(texts, model_type="unigram", **OURS))
    exported(path, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')  # has a tokenizer class of its own
    code = f"""
import sys
sys.modules |= dict.fromkeys(["sentencepiece", "google.protobuf", "elas", "torch"])  # are missing
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})({text!r})["input_ids"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == load_tokenizer(path).encode(text)


def byte_level(folder: Path, texts, **config) -> Path:
    """A byte-level BPE whose post-processor puts `<s>` before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from tokenizers.decoders import ByteLevel

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    special = {"special_tokens": ["<s>", "<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, show_progress=False, **special))
    before = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), before])
    fast.enable_truncation(100)
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def test_hugging_face_folders_keep_their_ids(texts, tmp_path):
    template = "{{ messages[0].content }}"
    folder = byte_level(tmp_path / "t", texts, chat_template=template, add_bos_token=True)
    ours = load_tokenizer(folder)
    facts, auto, again = exported(folder, tmp_path / "out")
    assert (facts["bos_token_id"], facts["eos_token_id"], facts["pad_token_id"]) == (0, 1, None)
    assert again.sha256 == ours.sha256 and auto.chat_template == template and auto.model_max_length == 512
    for text in [*HOSTILE, *texts]:
        assert again.encode(text) == ours.encode(text)
        assert "<s>" in text or auto(text)["input_ids"] == ours.encode(text)
    newline = ours.id_of("Ċ")
    (tmp_path / "newline").mkdir()
    assert write_tokenizer(folder, tmp_path / "newline", 512, eod=newline)["eos_token_id"] == newline
    plain = load_tokenizer(tmp_path / "newline")
    assert plain.decode(plain.encode("a\nb")) == "a\nb"  # an ordinary piece stays one


def test_an_exported_tokenizer_counts_as_its_source(texts, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train(texts, model_type="bpe", **OURS))
    facts, _, again = exported(path, tmp_path / "out")
    assert load_tokenizer(path).sha256 == facts["sha256"] in again.identities
    file = tmp_path / "out" / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["model"]["merges"].pop()
    file.write_text(json.dumps(changed))
    assert facts["sha256"] not in load_tokenizer(tmp_path / "out").identities


def test_what_cannot_be_exact_is_refused(texts, tmp_path):
    words = tmp_path / "words.model"
    words.write_bytes(train(texts, model_type="word", **STOCK))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a SentencePiece model of whole words has no tokenizer\.json"):
        write_tokenizer(words, tmp_path / "out", 512)
    with pytest.raises(UserError, match=r"no tokenizer.model or tokenizer.json there"):
        write_tokenizer(tmp_path / "nowhere", tmp_path / "out", 512)

    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(train(texts, model_type="bpe", **OURS))
    score = next(piece for piece in proto.pieces if piece.piece == "\u2581re").score
    for piece in proto.pieces:  # merges of equal score are chosen from the left, by rank elsewhere
        piece.score = score if piece.type == 1 and len(piece.piece) > 1 else piece.score
    tied = tmp_path / "tied.model"
    tied.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError) as error:
        write_tokenizer(tied, tmp_path / "out", 512)
    start = f"tokenizer {tied}: cannot be exported exactly: the ids of "
    assert re.fullmatch(
        re.escape(start) + r""".+ would be \[[\d, ]+\] instead of \[[\d, ]+\]; train or.+""", str(error.value)
    )
