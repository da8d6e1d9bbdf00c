"""Start one training run: the file that the deepspeed launcher, torchrun, srun and `elas train` all start.

    elas train --config 60m --data.train corpus
    deepspeed --num_gpus 2 launch/pretrain.py --config run.yaml --deepspeed_config ds_configs/zero1.json
    torchrun --nproc_per_node 2 launch/pretrain.py --config run.yaml --parallel.tensor 2
    srun … python launch/pretrain.py --config run.yaml

Every mistake that can be seen in the settings, the files and the number of ranks is told in one line, with exit status
2, before any process group exists.
"""

import dataclasses
import json
import os
import sys

from elas.cli import Parser, exit_status, write_json
from elas.config import Config, load_config, split_overrides
from elas.errors import ConfigError


def parse(argv: list[str]) -> tuple[Config, dict]:
    """Read the command line.

    Args:
        argv: `--config`, `--deepspeed_config`, and `--section.key value` overrides.

    Returns:
        The configuration, and the other options.

    Raises:
        UserError: an unknown option or key, or a bad value.
    """
    overrides, rest = split_overrides(argv)
    parser = Parser(
        "elas train",
        "Train a model. Any setting can be given as --section.key VALUE; they win over the configuration file.",
        "elas train --config 60m --data.train data/c4 --parallel.tensor 2 --train.run_dir runs/60m",
    )
    parser.add_argument("--config", help="YAML file, or a preset: 60m, 130m, 350m, 1b, 7b, quickstart")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, such as ds_configs/zero1.json")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers; not used")
    parser.add_argument("--show-config", action="store_true", help="print the whole configuration as JSON and stop")
    options = vars(parser.parse_args(rest))
    if options["deepspeed_config"]:
        overrides["parallel.deepspeed_config"] = options["deepspeed_config"]
    return load_config(options["config"], overrides), options


def srun_environment() -> None:
    """Under srun without torchrun, name the rank variables as torch.distributed wants them.

    Raises:
        ConfigError: several SLURM tasks, but no MASTER_ADDR to meet at.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) <= 1 or "SLURM_PROCID" not in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        fix = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) before srun'
        raise ConfigError("MASTER_ADDR", None, "srun started several tasks that do not know where to meet", fix)
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


def prebuild(config: Config) -> None:
    """Compile what the run will need; called by every rank, of which one builds while the others wait.

    Raises:
        UserError: DeepSpeed's op cannot be built, or a kernel named in `sparsity.implementation` cannot be had.
    """
    from elas.extensions import prebuild_deepspeed
    from elas.kernels.relu2_24 import Relu24Options, select
    from elas.train.deepspeed_config import check_deepspeed_json, offloads_optimizer, read_deepspeed_json

    check_deepspeed_json(config)
    prebuild_deepspeed(offload=offloads_optimizer(read_deepspeed_json(config)))
    if config.model.activation == "relu2":
        import torch

        options = Relu24Options(
            method=config.sparsity.method, gradient=config.sparsity.gradient, ffn_memory=config.sparsity.ffn_memory
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        select(options, device, getattr(torch, config.train.dtype), config.sparsity.implementation)


def main(argv: list[str]) -> int:
    """Run `elas train`.

    Args:
        argv: arguments after the command.

    Returns:
        Exit status 0.

    Raises:
        UserError: anything the user can mend.
    """
    config, options = parse(argv)
    if options["show_config"]:
        print(json.dumps(config.to_dict(), indent=2))
        return 0
    srun_environment()
    from elas.data.corpus import check_corpus
    from elas.validate import validate

    world = int(os.environ.get("WORLD_SIZE", "1"))
    validate(config, world)
    check_corpus(config)
    from elas.checkpoint.local import find_checkpoint

    resume = find_checkpoint(config, world)

    prebuild(config)
    from elas import parallel
    from elas.train.loop import run

    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    result = run(config, layout, resume)
    parallel.leave()
    if layout.rank == 0:
        write_json(
            options["json"], {**dataclasses.asdict(result), "world_size": layout.world, "run_dir": config.train.run_dir}
        )
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
