"""The charts of the page, in their order."""

from elas.report.figures import Chart
from elas.report.heat_maps import heat_maps
from elas.report.lines import Line, LineChart, LineCharts
from elas.report.run_files import RunFiles

TRAINING = (
    LineChart(
        "Loss", "nats a token", wide=True, lines=(Line("training", "loss"), Line("validation", "loss", validation=True))
    ),
    LineChart("Validation perplexity", "logarithmic", (Line("perplexity", "ppl", validation=True),), log=True),
    LineChart("Learning rate", "with Muon, of matrices and of all else; points: exact steps of LORO, and their refresh",
              (Line("learning rate", "lr"), Line("of all else", "lr_other")), points="exact_pairs"),
    LineChart("Gradient norm", "logarithmic", (Line("norm", "grad_norm"),), log=True),
    LineChart("Tokens per second", "of all ranks", (Line("tokens/s", "tokens_per_s"),), zero=True),
    LineChart("Share of the peak", "of dense bf16 products", (Line("MFU", "mfu"), Line("HFU", "hfu")),
              percent=True, zero=True),
    LineChart("TFLOP/s of a rank", "model: needed on the factors; hardware: with recomputation; "
              "dense-equivalent: of the full-rank twin", zero=True,
              lines=(Line("model", "tflops_per_rank"), Line("hardware", "hardware_tflops_per_rank"),
                     Line("dense-equivalent", "dense_equivalent_tflops_per_rank"))),
    LineChart("Goodput", "share of the time since the first start; waiting for data: of the steps' time",
              (Line("goodput", "goodput"), Line("waiting for data", "data_share")), percent=True, zero=True),
    LineChart("Memory of rank 0", "GB", zero=True,
              lines=(Line("peak", "memory_peak_bytes", scale=1e-9),
                     Line("reserved", "memory_reserved_bytes", scale=1e-9))),
    LineChart("Zeros and dropped values", "of the FFN's activation", percent=True, zero=True,
              lines=(Line("zeros after relu²", "sparsity"), Line("non-zeros dropped by 2:4", "dropped"),
                     Line("changed masks", "mask_flips"))),
)  # fmt: skip
FACTORS = (
    LineChart("Factor pairs: condition", "the largest condition number", (Line("condition", "pair_condition"),)),
    LineChart("Factor pairs: balance", "norm of factor_out ÷ factor_in or its inverse, of the most uneven pair",
              (Line("norm ratio", "pair_norm_ratio"),)),
    LineChart("Factor pairs: effective rank", "mean; e to the entropy of a product's singular values",
              (Line("effective rank", "effective_rank"),)),
    LineChart("Time of exact steps", "seconds", (Line("exact step", "exact_s"),), zero=True),
    LineChart("Time of Muon's steps", "seconds a step", (Line("optimizer", "optimizer_s"),), zero=True),
)  # fmt: skip


def charts_of(runs: list[RunFiles]) -> list[Chart]:
    """Every chart that the runs have values for."""
    lines = LineCharts(runs)
    before, after = ([lines.draw(chart) for chart in charts] for charts in (TRAINING, FACTORS))
    return [chart for chart in (*before, *heat_maps(runs), *after) if chart is not None]
