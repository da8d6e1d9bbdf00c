"""Plots a run's curves from its files."""

from pathlib import Path

from elas.files import read_jsonl


def plot_curves(run_dir: Path, target: Path) -> Path:
    """Plot training and validation loss, and sparsity, over tokens.

    Args:
        run_dir: a run's folder with `metrics.jsonl` and `validation.jsonl`.
        target: the PNG to write.

    Returns:
        `target`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics, validation = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "validation.jsonl")
    tokens = [row["tokens"] / 1e3 for row in metrics]
    per_step = metrics[-1]["tokens"] / metrics[-1]["step"]
    figure, (loss, sparsity) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    loss.plot(tokens, [row["loss"] for row in metrics], color="#4878a8", lw=1.2, label="training")
    loss.plot(
        [row["step"] * per_step / 1e3 for row in validation],
        [row["loss"] for row in validation],
        "o-", color="#c8553d", label="validation",
    )  # fmt: skip
    loss.set(xlabel="tokens (thousand)", ylabel="loss (nats a token)", title="Loss")
    loss.legend(frameon=False)
    for name, color, label in (
        ("sparsity", "#5b8c5a", "zeros after relu²"),
        ("dropped", "#b08030", "non-zeros dropped by 2:4"),
    ):  # steps without a count become gaps
        percent = [float("nan") if row[name] is None else 100 * row[name] for row in metrics]
        sparsity.plot(tokens, percent, color=color, label=label)
    first = next((row["tokens"] / 1e3 for row in metrics if row.get("sparse_active")), None)
    if first is not None:
        sparsity.axvline(first, color="#999999", lw=0.8, ls=":")
        sparsity.annotate(" 2:4 on", (first, 2), color="#777777", fontsize=9)
    sparsity.set(xlabel="tokens (thousand)", ylabel="%", title="Activation sparsity", ylim=(0, 100))
    sparsity.legend(frameon=False)
    for axes in (loss, sparsity):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    partial = target.with_name(f".{target.name}")
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    return partial.replace(target)
