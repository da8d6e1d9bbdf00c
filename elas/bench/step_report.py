"""What `elas bench step` prints."""

from elas.bench import show
from elas.console import table


def show_facts(facts: dict) -> None:
    """Print the rows, where the peaks of memory go, what is wrong, and the ratios."""
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    how = f"medians of {facts['repeats']}" if facts["repeats"] else "memory only"
    print(f"{facts['preset']}, {facts['batch']} × {facts['seq']} tokens a step, ZeRO {facts['zero']}, {how}")
    on_gpu = any(row.get("peak_share") is not None for row in facts["rows"])
    headers = ["variant", "dtype", "M params", "tokens/s", "step ms"] + ["% peak"] * on_gpu
    headers += ["layers save MiB", "peak MiB", "loss", "norm"]
    cells = [
        [
            row["variant"],
            row["dtype"],
            f"{row['params'] / 1e6:.1f}",
            "WRONG" if row["wrong"] else "–" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
            show.milliseconds(row["step_ms"]),
            *(["–" if row.get("peak_share") is None else f"{100 * row['peak_share']:.0f}"] * on_gpu),
            show.mebibytes(row["saved_bytes"]),
            show.mebibytes(row["peak_bytes"]),
            f"{row['loss']:.4f}",
            f"{row['grad_norm']:.3f}",
        ]
        for row in facts["rows"]
    ]
    print(table(headers, cells, left=2))
    print(
        "layers save: for the backward pass; peak: with weights and optimizer state; loss and norm: of the first step\n"
    )
    _print_parts(facts["rows"])
    for row in facts["rows"]:
        if row["wrong"]:
            print(f"note: {row['dtype']} {row['variant']}: WRONG, loss {row['loss']:.5f} and gradient norm "
                  f"{row['grad_norm']:.4f} of the first step should be {row['expected_loss']:.5f} and "
                  f"{row['expected_grad_norm']:.4f}")  # fmt: skip
    if facts["ratios"]:
        print(show.ratio_table(facts["ratios"], ("dtype",)))
        print("above: the peak above weights, optimizer and gradients; saved: by the layers; head: with the loss")


def _print_parts(rows: list[dict]) -> None:
    """What the peak of each variant consists of, and each part at its largest, beside its formula."""
    rows = [row for row in rows if row.get("peak_parts")]
    if not rows:
        return
    names = list(rows[0]["peak_parts"])
    cells = []
    for row in rows:
        state = row["resident_bytes"] - row["weight_bytes"]
        measured = [row["weight_bytes"], state, *row["peak_parts"].values(), row["peak_bytes"]]
        cells.append([row["variant"], row["dtype"], *(show.mebibytes(one) for one in measured)])
    print(table(["at the peak, MiB", "dtype", "weights", "optimizer", *names, "sum"], cells, left=2))
    print("ends: embedding and final norm; head: head and loss; update: copies and buckets of gradients\n")
    ours = [row for row in rows if not row["variant"].startswith("hf_llama")]
    cells = []
    for row in ours:
        plain = row["variant"].endswith("_logits")
        pairs = [(row["measured"][name], None if plain and name == "head" else row["predicted"][name])
                 for name in row["predicted"]]  # fmt: skip
        cells.append([row["variant"], row["dtype"]]
                     + [f"{show.mebibytes(a)} / {show.mebibytes(b)}" for a, b in pairs])  # fmt: skip
    if ours:
        headers = ["gradients and their copies" if name == "gradients" else name for name in ours[0]["predicted"]]
        print(table(["largest / by formula, MiB", "dtype", *headers], cells, left=2), end="\n\n")
