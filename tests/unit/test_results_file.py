"""`--json FILE` overwrites earlier results, and nothing else; errors of the system behind those of libraries."""

import pytest

from elas.command import Parser
from elas.errors import UserError
from elas.files import check_is_no_input, new_folder, system_error


@pytest.mark.parametrize("content", [b"the cat\n", b"\x00\x01", b'{"step": 1}\n{"step": 2}\n', b"[1]", b"{broken"])
def test_a_file_that_is_no_result_is_kept(tmp_path, content):
    path = tmp_path / "there"
    path.write_bytes(content)
    with pytest.raises(UserError, match="exists and is not JSON"):
        Parser("elas x", "X.", "elas x").parse_args(["--json", str(path)])
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"loss": 1}\n'])
def test_earlier_results_are_overwritten(tmp_path, content):
    (tmp_path / "there").write_bytes(content)
    assert Parser("elas x", "X.", "elas x").parse_args(["--json", str(tmp_path / "there")]).json.name == "there"


@pytest.mark.parametrize(
    "name", ["c.bin", "c.idx", "c.manifest.json", "c", "run/config.json", "run/checkpoints/step_1/manifest.json"]
)
def test_an_input_is_not_overwritten(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    (tmp_path / "link").symlink_to(path)
    for given in (path, tmp_path / "link"):
        with pytest.raises(UserError, match="is an input, which it would overwrite"):
            check_is_no_input(given, [tmp_path / "c", tmp_path / "run"])


def test_results_may_be_in_a_runs_folder_and_beside_a_corpus(tmp_path):
    for name in ("eval.json", "c.eval.json"):
        (tmp_path / name).write_text("{}")
        check_is_no_input(tmp_path / name, [tmp_path, tmp_path / "c"])
    check_is_no_input(tmp_path / "new.json", [tmp_path])
    check_is_no_input(None, [tmp_path])


def test_a_system_error_is_found_behind_a_library_s():
    def raised(suppress):
        try:
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                if suppress:
                    raise ValueError("unrelated") from None
                raise RuntimeError("write failed") from error
        except (ValueError, RuntimeError) as error:
            return system_error(error)

    assert raised(False).errno == 28
    assert raised(True) is None


def test_weights_without_a_config_are_named(tmp_path):
    from elas.hf.source import source_of

    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds weights but no config\.json"):
        source_of(tmp_path)


def test_a_new_folder_is_as_readable_as_its_files_would_be(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").touch(mode=0o600)
    assert (tmp_path / "made" / "sub" / "weights").stat().st_mode & 0o777 == tmp_path.joinpath(
        "made"
    ).stat().st_mode & 0o666
