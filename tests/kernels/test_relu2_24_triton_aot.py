"""The Triton kernels compiled for chips that need not be there: no spill, shared memory that fits, tensor cores."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from elas.kernels.relu2_24.triton import compressed, compressed_kernels, fused, fused_kernels, tiles, tuned  # noqa: E402

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_8x": 89, "sm_100": 100}
KERNELS = {
    "forward": fused_kernels.forward_kernel,
    "du": fused_kernels.du_kernel,
    "weights": fused_kernels.weights_kernel,
}
SUMS = ("dm", "dn")
"""Outputs in fp32 whatever the dtype."""
LENGTHS = ("tokens", "features", "share", "n", "code_columns")


def compiled(kernel, chip, constants, dtype, bytes_at=()):
    """A kernel for a chip: pointers, strides and f aligned to 16, other lengths anything."""
    constants = dict(constants)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    fused = "features" in kernel.arg_names  # there n and m are matrices
    signature, alignment = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name.endswith("stride") or name == "f" or (name in LENGTHS and not (fused and name == "n")):
            signature[name] = "i32"
        else:
            signature[name] = "*u8" if name in bytes_at else "*fp32" if name in SUMS else f"*{dtype}"
        if signature[name][0] == "*" or name.endswith("stride") or name == "f":
            alignment[(place,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", ARCHITECTURES[chip], 32)
    return triton.compile(ASTSource(kernel, signature, constants, alignment), target=target, options=options)


def resources(binary, tmp_path):
    """Registers of a thread, and bytes of its stack and local memory, where spills go, of a cubin."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listing).groups()
    return int(registers), int(stack), int(local)


def constants(kernel, chip, dtype, rank, method, ste=False, tile=None):
    """What a fused kernel is compiled with where it runs; None where it does not."""
    tile = tile or tiles.choose(chip, kernel, dtype, rank, method == 2)
    if tile is None:
        return None
    words = chip in ("sm_90", "sm_100") and dtype == torch.bfloat16 and method != 2
    given = fused.constants(tile, rank, rank, "tf32" if dtype == torch.float32 else "ieee", method, words)
    if kernel != "forward":
        given["STE"] = ste
    if kernel == "weights":
        given.update(NEEDS_M=True, NEEDS_N=True)
    return given


def held_to(chip, binary, tmp_path, record):
    """No spill, and shared memory that a block of the chip can have; resources go to the report of the test."""
    registers, stack, local = resources(binary, tmp_path)
    for key, value in (("registers", registers), ("stack", stack), ("shared", binary.metadata.shared)):
        record(key, value)
    assert registers > 16  # a kernel that only traps has 4
    assert (stack, local) == (0, 0)
    assert binary.metadata.shared <= tiles.SHARED_BYTES[chip]


ENTRIES = [(chip, kernel, rank) for chip in tiles.SHARED_BYTES for kernel in KERNELS for rank in (128, 256, 512)]


@pytest.mark.parametrize("chip, kernel, rank", ENTRIES, ids=str)
def test_bf16_fits_the_chip_and_runs_on_its_tensor_cores(chip, kernel, rank, tmp_path, record_property):
    """Every entry of the tables of bf16, pruning by magnitude."""
    binary = compiled(KERNELS[kernel], chip, constants(kernel, chip, torch.bfloat16, rank, 1), "bf16")
    held_to(chip, binary, tmp_path, record_property)
    ptx = binary.asm["ptx"]
    products = {name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx}
    assert products
    if chip == "sm_100":
        assert (binary.metadata.tmem_size or 0) <= 512  # columns; Triton makes a kernel that only traps of more
        assert ("tcgen05.mma" in products) == ((kernel, rank) != ("du", 512))
    if chip in ("sm_80", "sm_8x"):
        assert products == {"mma.sync"}
    elif chip == "sm_90" and rank < 512:
        assert products == {"wgmma.mma_async"}


@pytest.mark.parametrize("path", sorted(tuned.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_measured_tiles_that_ship_fit_too(path, tmp_path, record_property):
    table = tuned.read(path)
    assert table
    for (kernel, dtype, method, rank, _), tile in table.items():
        assert (dtype, method) == ("bfloat16", "magnitude")
        given = constants(kernel, "sm_90", torch.bfloat16, rank, 1, tile=tile)
        held_to("sm_90", compiled(KERNELS[kernel], "sm_90", given, "bf16"), tmp_path, record_property)


@pytest.mark.parametrize("kernel", KERNELS)
def test_relu_is_no_maximum_that_turns_nan_into_0(kernel):
    """`max.f32` gives the number of a number and NaN; the interpreter's does not, so its tests cannot tell."""
    binary = compiled(KERNELS[kernel], "sm_90", constants(kernel, "sm_90", torch.bfloat16, 256, 1), "bf16")
    assert not re.search(r"\bmax\.(f32|bf16)", binary.asm["ptx"])


def test_groups_are_pruned_in_packed_words_on_sm_90():
    """A group takes five packed instructions a number; one by one it took nineteen."""
    for kernel in KERNELS:
        binary = compiled(KERNELS[kernel], "sm_90", constants(kernel, "sm_90", torch.bfloat16, 256, 1), "bf16")
        assert "set.ge.u32.bf16x2" in binary.asm["ptx"]
        assert not re.search(r"\bsetp\.\w+\.f32", binary.asm["ptx"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_on_wgmma_splitting_groups_moves_nothing_between_threads(kernel):
    """One change of layout into the next product, which keeps values in their threads, and one before the store."""
    binary = compiled(KERNELS[kernel], "sm_90", constants(kernel, "sm_90", torch.bfloat16, 256, 1), "bf16")
    assert binary.asm["ttgir"].count("convert_layout") <= 2


OTHERS = [
    # chip, kernel, dtype, rank, method, ste: TF32, the soft threshold's two gradients, straight-through, padding
    *((chip, kernel, torch.float32, rank, 1, False) for chip, kernel, rank in ENTRIES),
    *((chip, kernel, torch.bfloat16, rank, 2, False) for chip, kernel, rank in ENTRIES),
    *((chip, kernel, torch.bfloat16, rank, 2, True) for chip, kernel, rank in ENTRIES if kernel != "forward"),
    *(("sm_90", kernel, torch.bfloat16, rank, 1, True) for kernel in ("du", "weights") for rank in (128, 256, 512)),
    ("sm_90", "du", torch.bfloat16, 192, 0, False),
    ("sm_80", "forward", torch.bfloat16, 100, 0, False),
]


@pytest.mark.parametrize("chip, kernel, dtype, rank, method, ste", OTHERS, ids=str)
def test_other_methods_dtypes_and_ranks_fit(chip, kernel, dtype, rank, method, ste, tmp_path, record_property):
    """Every entry of the tables of fp32, and of bf16 under the other methods."""
    given = constants(kernel, chip, dtype, rank, method, ste)
    if given is None:
        assert dtype == torch.float32 and (chip == "sm_100" or (chip, rank) == ("sm_8x", 512))
        return
    binary = compiled(KERNELS[kernel], chip, given, "bf16" if dtype == torch.bfloat16 else "fp32")
    held_to(chip, binary, tmp_path, record_property)
    assert "mma" in binary.asm["ptx"]


@pytest.mark.parametrize("method", (1, 2))
@pytest.mark.parametrize("chip", ("sm_80", "sm_90"))
@pytest.mark.parametrize("kernel", ("prune_and_pack", "restore"))
def test_compressed_reads_and_writes_128_bits_at_once(kernel, chip, method, tmp_path, record_property):
    """Where f divides by 16; the codes are bytes, and may be narrower."""
    given = {"METHOD": method, "BM": compressed.TILE[0], "BF": compressed.TILE[1]}
    given.update({"KEEP": compressed.PACKED} if kernel == "prune_and_pack" else {"NEEDS_S": True, "NEEDS_DZ": True})
    function = getattr(compressed_kernels, f"{kernel}_kernel")
    binary = compiled(function, chip, {**given, "num_warps": 4, "num_stages": 1}, "bf16", bytes_at=("codes",))
    held_to(chip, binary, tmp_path, record_property)
    accesses = re.findall(r"(ld|st)\.global(?:\.\w+)*?\.(v4\.b32|v2\.b64|[bu]\d+|v2\.b32|v2\.b16)", binary.asm["ptx"])
    wide = [access for access, width in accesses if width in ("v4.b32", "v2.b64")]
    assert {"ld", "st"} <= set(wide), accesses
