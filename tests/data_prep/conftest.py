"""A small tokenizer and small corpora; trained once, so the folder runs in seconds."""

import json
from pathlib import Path

import pytest

from elas.data_prep.sources import Corpus
from elas.data_prep.tokenizer_training import train_tokenizer

HERE = Path(__file__).parent
SOURCES = [str(HERE), str(Path(json.__file__).parent), str(Path(pytest.__file__).parent)]


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Folders with a little Python source."""
    return SOURCES


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(Corpus(SOURCES), folder, vocab_size=600)
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes records (or raw lines) to a JSONL file below `tmp_path`."""

    def write(records, name="corpus.jsonl") -> Path:
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def read_back():
    """Reads the documents of a `.bin/.idx` pair, as lists of ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def read(prefix) -> list[list[int]]:
        data = IndexedDataset(str(prefix), mmap=False)
        assert len(data.document_indices) == len(data) + 1  # one sequence a document
        return [data[i].tolist() for i in range(len(data))]

    return read
