"""What comes from Hugging Face, or does not: datasets and tokenizer folders; one line each, soon, and no traceback."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from elas.data.tokenizer import load_tokenizer
from elas.data_prep import hub
from elas.data_prep.sources import Corpus
from elas.errors import Failure, UserError

ASK = """
import sys, time
from elas.data_prep import hub
from elas.errors import UserError
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        hub.open_dataset(name)
    except UserError as error:
        print(f"{time.monotonic() - start:.1f} {error}")
"""


def ask(*names, **environment) -> list[tuple[float, str]]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names], env=os.environ | environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert all(line.startswith("note: ") for line in done.stderr.splitlines() if "it/s" not in line), done.stderr
    return [(float(line.split()[0]), line.split(None, 1)[1]) for line in done.stdout.splitlines()]


class _Hub(BaseHTTPRequestHandler):
    """Has no dataset, and does not answer for one of them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if "slow" in self.path:
            time.sleep(60)
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound" if "revision" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_a_hub_without_an_answer_or_the_dataset_is_one_line():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = ask("org/none:train", "org/none@v1:train", "org/slow:train", "a b:train", HF_ENDPOINT=endpoint)
    finally:
        server.shutdown()
    assert len(found) == 4
    assert f"hf://org/none:train: {endpoint} has no such dataset, or it is private or gated" in found[0][1]
    assert "has no revision 'v1' of it; check the part after @" in found[1][1]
    assert "does not answer" in found[2][1] and 9 <= found[2][0] < 25  # `hub.TIMEOUT`, once, and a slow machine
    assert "write hf://NAME[@REVISION]" in found[3][1]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ((_, line),) = ask("org/none:train", HF_ENDPOINT=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert "does not answer (" in line and "give downloaded files as --input PATH" in line
    ((_, line),) = ask("org/none:train", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert "unset HF_HUB_OFFLINE" in line


def test_what_a_dataset_has_is_said_where_it_lacks_something(tmp_path):
    rows = [{"text": f"row {n}", "meta": {"title": f"title {n}"}} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given, why in (
        (f"{tmp_path}:nope", r"Bad split: nope\. Available splits: \['train'\]; name one of its splits"),
        (f"{tmp_path}:train[:10]", r"Available splits: \['train'\]"),
        (f"{tmp_path}#conf", r"'conf' not found\. Available: \['default'\]; name one of its configurations"),
        (f"{tmp_path}/gone", "no such folder"),
    ):
        with pytest.raises(UserError, match=why):
            list(Corpus([f"hf://{given}"]).pieces(1))
    for given in ("", ":train", "#conf", "a:b:c:d"):
        with pytest.raises(UserError, match=r"write hf://NAME\[@REVISION\]"):
            Corpus([f"hf://{given}"])
    assert hub.parse("hf://org/n@v1#c:train:meta.title") == ("org/n@v1#c:train", "meta.title")
    assert [d.text for d in Corpus([f"hf://{tmp_path}:train:meta.title"])] == ["title 0", "title 1", "title 2"]
    corpus = Corpus([f"hf://{tmp_path}", f"hf://{tmp_path}:train"])
    assert len(corpus.files) == 1 and corpus.without_column() == []
    ((_, why),) = Corpus([f"hf://{tmp_path}"], field="body").without_column()
    assert why == "no column 'body' (it has text, meta)"


def test_a_connection_that_is_lost_ends_the_task_not_the_data(monkeypatch):
    class Lost:
        num_shards = 1

        def shard(self, count, index):
            yield {"text": "first"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(hub, "open_dataset", lambda name: Lost())
    with pytest.raises(Failure, match=r"reading stopped \(reset by peer\); run the same command again"):
        list(Corpus(["hf://org/name"]))


def test_broken_tokenizer_folders_are_named_by_file(tmp_path):
    from tokenizers import Tokenizer, models

    whole = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "</s>": 2}, "[UNK]")).to_str()
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    cases = {
        ("tokenizer.json", whole[: len(whole) // 2]): "tokenizer.json is damaged or truncated",
        ("tokenizer.json", ""): "tokenizer.json is damaged or truncated",
        ("tokenizer.json", "[]"): "tokenizer.json is not a JSON object",
        ("tokenizer_config.json", config[:20]): "tokenizer_config.json is damaged or truncated",
        ("tokenizer_config.json", "[]"): "tokenizer_config.json is not a JSON object",
        ("special_tokens_map.json", "{"): "special_tokens_map.json is damaged",
        ("added_tokens.json", "{"): "added_tokens.json is damaged",
        ("tokenizer.json", "{}"): "",
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}',
        ): "custom code, which is not run",
    }
    for number, ((name, text), why) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(whole)
        (folder / "tokenizer_config.json").write_text(config)
        (folder / name).write_text(text)
        if "auto_map" in text:
            (folder / "tokenizer.json").unlink()
        with pytest.raises(UserError) as refused:
            load_tokenizer(folder)
        assert why in str(refused.value) and "AutoTokenizer cannot read it" in str(refused.value), (name, text)
    for kind in ("GPT2Tokenizer", "LlamaTokenizer"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        with pytest.raises(UserError, match="finds no vocabulary there"):
            load_tokenizer(folder)
