"""`elas checkpoint`: list, verify and inspect checkpoints; export to and import from Megatron-LM."""

from pathlib import Path

from elas.checkpoint.folder import (
    Checkpoint,
    checkpoints_in,
    damaged_files,
    newest_intact,
    read_checkpoint,
    require_intact,
)
from elas.command import Parser, run_command
from elas.config import load_config, split_overrides
from elas.config.arguments import SettingsParser
from elas.config.describe import describe_layout
from elas.console import table
from elas.errors import ConfigError, UserError
from elas.files import check_is_no_input, write_json


def main(argv: list[str]) -> int:
    """Run `elas checkpoint ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    more = "PATH is a run's folder or one checkpoint.", "", "example:", "  elas checkpoint verify runs/60m"
    return run_command("elas checkpoint", COMMANDS, argv, *more)


def list_(argv: list[str]) -> int:
    """`elas checkpoint list`: all checkpoints of a run, oldest first, checked by manifests and sizes."""
    options = _parser("list", "List the checkpoints of a run, oldest first.").parse_args(argv)
    check_is_no_input(options.json, [options.path])
    rows = [_row(path, read_checkpoint(path)) for path in reversed(_folders(options.path))]
    write_json(options.json, {"checkpoints": rows})
    cells = [
        [row["path"], _number(row["step"]), _number(row["tokens"]), _size(row["bytes"]), row["layout"], row["why"]]
        for row in rows
    ]
    print(table(["checkpoint", "step", "tokens", "size", "written on", ""], cells, left=1))
    return 0


def verify(argv: list[str]) -> int:
    """`elas checkpoint verify`: compare every byte with the checksums; returns 1 if a checkpoint is damaged."""
    options = _parser("verify", "Check every byte of checkpoints against their checksums.").parse_args(argv)
    check_is_no_input(options.json, [options.path])
    bad, files, checked = [], 0, []
    for path in _folders(options.path):
        found = read_checkpoint(path)
        problems = [found] if isinstance(found, str) else damaged_files(found)
        checked.append({"path": str(path), "ok": not problems})
        files += 0 if isinstance(found, str) else len(found.manifest["files"])
        bad += [{"checkpoint": str(path), "why": problem} for problem in problems]
        print(f"{'BAD' if problems else 'ok '}  {path}", *(f"     {problem}" for problem in problems), sep="\n")
    write_json(options.json, {"ok": not bad, "files": files, "bad": bad, "checkpoints": checked})
    return 1 if bad else 0


def info(argv: list[str]) -> int:
    """`elas checkpoint info`: the contents of a checkpoint, or of a run's newest intact one."""
    options = _parser("info", "Show the contents of a checkpoint.").parse_args(argv)
    check_is_no_input(options.json, [options.path])
    found = _intact(options.path)
    manifest = found.manifest
    tensors = _tensors(found)
    facts = {"path": str(found.path), "step": found.step, "tokens": manifest["tokens"],
             "consumed_samples": manifest["consumed_samples"], "optimizer_step": manifest["optimizer_step"],
             "layout": manifest["layout"], "versions": manifest["versions"], "files": manifest["files"],
             "parameters": sum(row["numel"] for row in tensors), "tensors": tensors,
             "config": manifest["config"]}  # fmt: skip
    write_json(options.json, facts)
    size = _size(sum(file["bytes"] for file in manifest["files"].values()))
    moments = "without moments" if manifest.get("weights_only") else "with their two moments"
    texts = {
        "layout": _layout_in_words(facts["layout"]),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "files": f"{len(manifest['files'])}, {size}",
        "tensors": f"{len(tensors)} weights, {moments}",
    }
    for key in ("path", "step", "tokens", "consumed_samples", "parameters", "layout", "versions", "files", "tensors"):
        value = texts.get(key, facts[key])
        print(f"{key.replace('_', ' '):<18}{value if isinstance(value, str) else f'{value:,}'}")
    return 0


def export_(argv: list[str]) -> int:
    """`elas checkpoint export`: write a checkpoint that Megatron-LM can load."""
    example = "elas checkpoint export runs/60m megatron/60m"
    parser = Parser("elas checkpoint export", "Write a checkpoint as Megatron-LM's torch_dist.", example)
    parser.add_argument("path", type=Path, metavar="PATH", help="a run's folder, or one checkpoint")
    parser.add_argument("target", type=Path, metavar="FOLDER", help="created, for Megatron-LM's --load")
    adam = "the Adam that will read it: fused with Apex or Transformer Engine, else torch (default: as installed here)"
    parser.add_argument("--adam", choices=["fused", "torch"], help=adam)
    options = parser.parse_args(argv)
    check_is_no_input(options.json, [options.path])
    import elas
    from elas.checkpoint.export import adam_here, export

    elas.prepare()
    found = _intact(options.path)
    require_intact(found)
    adam = options.adam or adam_here()
    print(f"writing {options.target} from {found.path} (step {found.step}), for {adam} Adam", flush=True)
    facts = export(found, options.target, adam)
    print(f"to resume with it: elas.megatron.elas_builder, --load {options.target} --override-opt-param-scheduler,")
    print(f"and for the same model {facts['flags']}, with a vocabulary padded to {facts['vocabulary']}")
    if not facts["moments"]:
        print("it holds weights only: the checkpoint has no AdamW moments")
    write_json(options.json, {**facts, "adam": adam, "checkpoint": str(found.path)})
    return 0


def import_(argv: list[str]) -> int:
    """`elas checkpoint import`: convert a checkpoint of Megatron-LM into the first one of a run."""
    example = "elas checkpoint import megatron/60m --config 60m --data.train data/c4 --train.run_dir runs/60m"
    overrides, rest = split_overrides(argv)
    what = "Import a torch_dist checkpoint of Megatron-LM into a run's folder; `elas train` resumes from it."
    parser = SettingsParser("elas checkpoint import", what, example)
    parser.add_argument("path", type=Path, metavar="FOLDER", help="Megatron-LM's --save folder, or an iter_… in it")
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset's name")
    alone = "import no moments, for checkpoint.init_from; needs no corpus"
    parser.add_argument("--weights-only", action="store_true", help=alone)
    options = parser.parse_args(rest)
    check_is_no_input(options.json, [options.path])
    config = load_config(options.config, overrides)
    from elas.config.rules import validate
    from elas.data.corpus import check_corpus

    if not options.path.is_dir():
        what = "is a file" if options.path.exists() else "does not exist"
        raise UserError(f"{options.path}: {what}; give Megatron-LM's --save folder, or an iter_… in it")
    validate(config, None)
    if not options.weights_only:
        check_corpus(config)
    import elas

    elas.prepare()
    from elas import run_dir
    from elas.checkpoint.arguments import notes
    from elas.checkpoint.importing import import_, read_foreign
    from elas.run_dir import checkpoints_dir

    print(f"reading {options.path}", flush=True)
    foreign = read_foreign(options.path)
    lock = run_dir.claim(config)
    if any(checkpoints_in(checkpoints_dir(config))) or (Path(config.train.run_dir) / "metrics.jsonl").exists():
        raise ConfigError("train.run_dir", config.train.run_dir, "already holds a run", "give another folder")
    written = import_(foreign, config, options.weights_only)
    for line in notes(config, foreign.arguments):
        print(line)
    lock.release()
    facts = {"checkpoint": str(written), "iteration": foreign.iteration, "weights_only": options.weights_only}
    key = "checkpoint.init_from" if options.weights_only else "train.run_dir"
    print(f"iteration {foreign.iteration} is {written}; train with the same settings, {key}={config.train.run_dir}")
    write_json(options.json, facts)
    return 0


COMMANDS = {
    "list": (list_, "list all checkpoints of a run, oldest first, and what is wrong with damaged ones"),
    "verify": (verify, "compare every byte with the checksums"),
    "info": (info, "show step, layout, versions, parameters of a checkpoint"),
    "export": (export_, "write a checkpoint for Megatron-LM"),
    "import": (import_, "import a checkpoint of Megatron-LM as the first of a run"),
}


def _parser(name: str, what: str) -> Parser:
    parser = Parser(f"elas checkpoint {name}", what, f"elas checkpoint {name} runs/60m")
    parser.add_argument("path", type=Path, metavar="PATH", help="a run's folder, or one checkpoint")
    return parser


def _folders(path: Path) -> list[Path]:
    """The checkpoint at a path, or those of a run, newest first."""
    if path.name.startswith("step_") and path.is_dir():
        return [path]
    for folder in (path / "checkpoints", path):
        if found := list(checkpoints_in(folder)):
            return found
    raise UserError(f"{path}: no checkpoint there; give a run's folder, or a folder step_…")


def _intact(path: Path) -> Checkpoint:
    """The checkpoint at a path, or a run's newest that is intact by manifest and sizes."""
    found = newest_intact(_folders(path))
    if isinstance(found, str):
        raise UserError(f"{path}: {found}; see elas checkpoint list")
    return found


def _layout_in_words(layout: dict) -> str:
    sizes = {name: layout[name] for name in ("tensor", "pipeline", "data", "zero", "sequence")}
    return describe_layout(**sizes, virtual=layout["virtual_pipeline"])


def _row(path: Path, found: Checkpoint | str) -> dict:
    if isinstance(found, str):
        return {"path": str(path), "step": None, "tokens": None, "bytes": None, "layout": "", "why": found}
    manifest, layout = found.manifest, found.manifest["layout"]
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    return {"path": str(path), "step": found.step, "tokens": manifest["tokens"], "bytes": size,
            "layout": _layout_in_words(layout), "why": ""}  # fmt: skip


def _tensors(found: Checkpoint) -> list[dict]:
    """Name, shape and number of elements of every weight."""
    import pickle

    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from elas.checkpoint.storage import read_index

    try:
        index = read_index(found.path)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UserError(f"{found.path}: its index cannot be read ({error}); see elas checkpoint verify") from error
    weights = {name.removeprefix("weight."): entry.size for name, entry in index.state_dict_metadata.items()
               if name.startswith("weight.") and isinstance(entry, TensorStorageMetadata)}  # fmt: skip
    return [{"name": name, "shape": list(size), "numel": size.numel()} for name, size in sorted(weights.items())]


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _size(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f} MB"
