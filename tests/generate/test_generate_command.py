"""`elas generate`: text, JSON, and one line for each mistake."""

import json
from pathlib import Path

import pytest
from support.folders import write_model, write_tokenizer

from elas.errors import UserError
from elas.generate.cli import _unescaped, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


def run(folder: Path, *more: str) -> int:
    return main(["--checkpoint", str(folder), *more])


def test_one_prompt_is_streamed_and_counted(folder, tmp_path, capsys):
    assert run(folder, "--prompt", "the cat", "--max-new-tokens", "12", "--json", str(tmp_path / "g.json")) == 0
    out = capsys.readouterr()
    facts = json.loads((tmp_path / "g.json").read_text())
    assert out.out.rstrip("\n") == facts["text"].rstrip("\n")
    assert facts["text"] == "the cat" + facts["results"][0]["completion"]
    assert facts["tokens"] == len(facts["results"][0]["tokens"]) <= 12
    assert facts["tokens_per_s"] > 0 and facts["time_to_first_token_s"] > 0
    assert " tokens, " in out.err


def test_prompts_of_a_file_in_batches(folder, tmp_path, capsys):
    lines = [json.dumps({"prompt": text}) for text in ("the cat", "a dog", "def run")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "p.txt").write_text("the cat\na dog\ndef run\n")
    found = []
    for name, batch in (("p.jsonl", "2"), ("p.txt", "3")):
        out = tmp_path / f"{name}.json"
        options = ["--file", str(tmp_path / name), "--batch", batch, "--max-new-tokens", "8", "--temperature", "0.8"]
        assert run(folder, *options, "--json", str(out)) == 0
        found.append([one["text"] for one in json.loads(out.read_text())["results"]])
    assert found[0] == found[1] and len(found[0]) == 3
    assert "── 3" in capsys.readouterr().out


def test_bf16_is_widened_where_it_would_be_emulated(folder, tmp_path, capsys):
    """On a CPU without bf16 products, said in a line; `--dtype bfloat16` is obeyed."""
    import torch

    from elas.hf.build import open_folder
    from elas.kernels.relu2_24.few_tokens import emulated

    open_folder(folder, torch.bfloat16).save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    slow = emulated(torch.device("cpu"), torch.bfloat16)
    for more, dtype in (([], "float32" if slow else "bfloat16"), (["--dtype", "bfloat16"], "bfloat16")):
        assert run(tmp_path / "m", "--prompt", "the", "--json", str(tmp_path / "g.json"), *more) == 0
        assert json.loads((tmp_path / "g.json").read_text())["dtype"] == dtype
        assert ("in float32: this CPU has no bfloat16" in capsys.readouterr().err) == (slow and not more)


def test_a_stop_string_may_be_a_new_line(folder, tmp_path):
    """As a shell passes it: a backslash and an n."""
    for text, kept in ((r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), ("n", "n")):
        assert _unescaped(text) == kept


def test_weights_that_are_not_finite_are_refused(folder, tmp_path, capsys):
    import torch

    from elas.hf.build import open_folder

    model = open_folder(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.factor_in.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    with pytest.raises(UserError, match=r"q_proj\.factor_in\.weight has values that are not finite"):
        run(tmp_path / "m", "--prompt", "the")


def test_results_do_not_replace_an_input(folder, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\n")
    with pytest.raises(UserError, match="exists and is not JSON, nothing is overwritten"):
        run(folder, "--file", str(tmp_path / "p.txt"), "--json", str(tmp_path / "p.txt"))
    assert (tmp_path / "p.txt").read_text() == "the cat\n"


def test_an_empty_prompt_begins_a_new_text(folder, tmp_path):
    assert run(folder, "--prompt", "", "--max-new-tokens", "3", "--json", str(tmp_path / "g.json")) == 0
    assert json.loads((tmp_path / "g.json").read_text())["results"][0]["prompt"] == ""


BAD = [
    (["--prompt", "the " * 200], "the model's context is 96; give a shorter one"),
    ([], "nothing to continue; give --prompt TEXT"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be 0 (greedy), or 0.000001 or more"),
    (["--prompt", "a", "--temperature", "1e-300"], "--temperature 1e-300: must be 0 (greedy), or"),
    (["--prompt", "a", "--temperature", "nan"], "--temperature nan: must be"),
    (["--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0"),
    (["--prompt", "a", "--top-k", "5"], "--temperature 0: greedy"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["--prompt", "a", "--batch", "0"], "--batch 0: must be at least 1"),
    (["--prompt", "a", "--stop", ""], "--stop '': must not be empty"),
    (["--prompt", "a", "--device", "tpu9"], "--device='tpu9': is no device"),
    (["--file", "/nowhere/p.txt"], "--file /nowhere/p.txt: cannot be read"),
    (["--prompt", "a", "--tokenizer", "/nowhere/t"], "--tokenizer='/nowhere/t': does not exist"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_mistakes_are_one_line(folder, options, message):
    with pytest.raises(UserError) as caught:
        run(folder, *options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_no_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((folder / "config.json").read_text())
    write_tokenizer(tmp_path / "weightless")
    for name, message in (
        ("empty", "holds no checkpoint"),
        ("nowhere", "no such folder"),
        ("broken", "is not JSON"),
        ("weightless", "its model cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / name, "--prompt", "a")


def test_full_rank_values_have_no_latent(tmp_path):
    full = write_model(tmp_path / "full", low_rank="none")
    with pytest.raises(UserError, match="--value-cache='latent': values of full rank have no latent"):
        run(full, "--prompt", "a", "--value-cache", "latent")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    small = write_model(tmp_path / "small", vocab_size=100)
    with pytest.raises(UserError, match="320 tokens, and the model has 100"):
        run(small, "--prompt", "a")
