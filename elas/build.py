"""`elas build`: compiles the extensions for this machine ahead of time, instead of at the first run."""

from elas.command import Parser
from elas.files import write_json


def main(argv: list[str]) -> int:
    """Run `elas build` with the arguments `argv`; returns 0, or raises `UserError` if a library cannot be built."""
    what = "Compile the CPU kernel, and with --offload DeepSpeed's CPU Adam, for this torch, Python and processor"
    parser = Parser("elas build", f"{what}; later runs use these builds.", "elas build --offload")
    parser.add_argument("--offload", action="store_true", help="also DeepSpeed's CPU Adam, for offloaded optimizers")
    options = parser.parse_args(argv)
    import torch

    from elas import accelerator
    from elas.extensions import extensions_dir, prebuild_deepspeed
    from elas.kernels.relu2_24.cpu import prebuild

    accelerator.prepare()
    facts = {"folder": str(extensions_dir()), "deepspeed_s": prebuild_deepspeed(offload=options.offload)}
    facts["kernel_s"] = 0.0 if torch.cuda.is_available() else prebuild()
    seconds = facts["deepspeed_s"] + facts["kernel_s"]
    print(f"{'built' if seconds else 'already built'}: {facts['folder']}")
    write_json(options.json, facts)
    return 0
