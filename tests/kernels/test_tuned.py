"""Measured tiles: which one a call gets, what `elas tune` writes, and damaged files."""

import json

import pytest
import torch

from elas import cli
from elas.bench import tune
from elas.command import exit_status
from elas.errors import UserError
from elas.kernels.relu2_24 import Relu24Options, registry
from elas.kernels.relu2_24.triton import fused, tiles, tuned
from elas.kernels.relu2_24.triton.tiles import Tile

GPU = "NVIDIA Test 9000"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    yield tmp_path / "elas" / "tiles" / "nvidia_test_9000.json"
    tuned.forget()


def row(kernel, r, tile, us=10.0):
    fields = {"tokens": tile.tokens, "features": tile.features, "gap": tile.gap}
    fields |= {"warps": tile.warps, "stages": tile.stages, "chunk": tile.chunk}
    return {
        "kernel": kernel,
        "dtype": "bfloat16",
        "method": "magnitude",
        "r_in": r,
        "r_out": r,
        "tile": fields,
        "us": us,
    }


def test_a_measured_tile_is_found_for_its_widths_and_near_ones(cache):
    near, far = Tile(64, 64, 8, 4, 2), Tile(128, 32, 8, 8, 3)
    tune.keep(cache, GPU, [row("forward", 96, far), row("forward", 128, near)])
    for r_in, r_out, want in ((128, 128, near), (128, 120, near), (100, 96, far), (96, 65, far), (64, 64, None)):
        assert tuned.find(GPU, "forward", torch.bfloat16, r_in, r_out, False) == want
    assert tuned.find(GPU, "du", torch.bfloat16, 128, 128, False) is None
    assert tuned.find(GPU, "forward", torch.float32, 128, 128, False) is None
    assert tuned.find(GPU, "forward", torch.bfloat16, 128, 128, True) is None
    assert tuned.find("another", "forward", torch.bfloat16, 128, 128, False) is None


def test_tuning_again_replaces_what_it_measured_and_keeps_the_rest(cache):
    tune.keep(cache, GPU, [row("forward", 128, Tile(64, 64, 8, 4, 2)), row("du", 128, Tile(64, 64, 8, 4, 2))])
    tune.keep(cache, GPU, [row("forward", 128, Tile(128, 64, 8, 8, 3))])
    found = {one["kernel"]: one["tile"]["tokens"] for one in json.loads(cache.read_text())["tiles"]}
    assert found == {"forward": 128, "du": 64}
    assert json.loads(cache.read_text())["gpu"] == GPU


ROW = '{"tiles": [{"kernel": "du", "dtype": "bfloat16", "method": "magnitude", "r_in": %s, "r_out": 8, "tile": %s}]}'
TILE = '{"tokens": %s, "features": 64, "gap": 8, "warps": 4, "stages": 2, "chunk": null}'
DAMAGED = ("", "[]", '{"tiles": [{"kernel": "du"}]}', '{"tiles": [7]}', "\x00", ROW % ('"128"', TILE % 64))
DAMAGED += (ROW % (128, TILE % -3), ROW % (128, TILE % 63), ROW % (128, TILE % '"x"'), "[" * 100_000)


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_named(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.raises(UserError, match=r"nvidia_test_9000.json: not a table of tiles .*delete it"):
        tuned.find(GPU, "du", torch.bfloat16, 128, 128, False)


def test_what_ships_is_readable_and_names_its_gpu():
    files = sorted(tuned.SHIPPED.glob("*.json"))
    assert files
    for path in files:
        facts = json.loads(path.read_text())
        assert path.name == tuned.file_name(facts["gpu"])
        assert len(tuned.read(path)) == len(facts["tiles"])
        for one in facts["tiles"]:
            assert 0 < one["us"] <= one["default_us"]


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_begin_with_the_tables_and_differ(kernel):
    for r in (64, 128, 256, 512):
        case = tune.Case(kernel, "bfloat16", "magnitude", r, 4096, 16384)
        found = list(tune.candidates(case, "sm_90"))
        assert found[0] == tiles.choose("sm_90", kernel, torch.bfloat16, r)
        assert len(set(found)) == len(found) > 5
        assert all(tile.features % (2 * tile.gap) == 0 for tile in found)


def test_a_case_is_checked_against_its_formula(monkeypatch):
    """The truth that tiles are held to, with PyTorch's chunks in the kernel's place."""
    from elas.kernels.relu2_24.plain.fused import TorchFused

    monkeypatch.setattr(tune.fused, "TritonFused", lambda tile: TorchFused())
    for kernel in tune.KERNELS:
        job = tune.Job(tune.Case(kernel, "float32", "magnitude", 24, 64, 40), 40, torch.device("cpu"))
        truth = job.truth()
        assert job.error(Tile(16, 16, 8, 4, 1), truth) < 1e-6
        assert job.error(Tile(16, 16, 8, 4, 1), tuple(2 * x for x in truth)) > 0.4


@pytest.mark.parametrize(
    "arguments, says",
    (
        ([], "no CUDA device"),
        (["--ranks", "1024"], "up to 512"),
        (["--ranks", "x"], "--ranks 'x'"),
        (["--dtypes", "float64"], "'float64' is unknown"),
        (["--methods", "topk"], "'topk' is unknown"),
    ),
)
def test_tune_refuses_in_one_line(arguments, says, capsys):
    assert exit_status(cli.run, ["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_auto_leaves_wide_sums_to_chunks(monkeypatch):
    """Where both run; by name both are still had."""
    serving = [one for one in registry.implementations("fused") if one.name in ("triton", "chunked", "torch")]
    assert [one.name for one in serving] == ["triton", "chunked", "torch"]
    for one in serving:
        key = ("fused", one.name, torch.device("cpu"), torch.bfloat16)
        monkeypatch.setitem(registry._obstacles, key, None)
    where = torch.device("cpu"), torch.bfloat16
    for r, name in ((64, "triton"), (256, "triton"), (257, "chunked"), (512, "chunked"), (1024, "chunked")):
        chosen, why = registry.choose(Relu24Options(), *where, "auto", registry.Widths(r, 4096, r))
        assert chosen.name == name
        assert name == "triton" or "chunked is faster" in why or "no tile" in why
        assert registry.choose(Relu24Options(), *where, "chunked", registry.Widths(r, 4096, r))[0].name == "chunked"
    assert registry.choose(Relu24Options(), *where, "triton", registry.Widths(512, 4096, 512))[0].name == "triton"


def test_where_the_packed_words_are_used(monkeypatch):
    gpu = torch.device("cuda", 0)
    for capability, dtype, method, want in (
        ((9, 0), torch.bfloat16, 1, True),
        ((9, 0), torch.bfloat16, 0, True),
        ((9, 0), torch.bfloat16, 2, False),
        ((9, 0), torch.float32, 1, False),
        ((8, 0), torch.bfloat16, 1, False),
        ((12, 0), torch.bfloat16, 1, True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fused.packs(gpu, dtype, method) == want
    assert not fused.packs(torch.device("cpu"), torch.bfloat16, 1)
