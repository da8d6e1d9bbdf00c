"""Losses of a micro-batch: per token from a chunk, and their mean."""

import torch

Count = torch.Tensor | float  # of labels; on the device where it comes from a sum over ranks, so that no host waits


class LossModel(torch.nn.Module):
    """A whole model (no pipeline) whose forward returns the mean loss, as DeepSpeed's own forward path requires."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, counted: Count | None = None) -> torch.Tensor:
        """`mean_loss`, 0-dim fp32."""
        return mean_loss(self.model, tokens, labels, counted)


def mean_loss(
    model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor, counted: Count | None
) -> torch.Tensor:
    """Output of a chunk: mean loss of a micro-batch on the last stage, 0-dim fp32; hidden states before it.

    Args:
        model: a chunk of `elas.model.head.LeanGPTModel`.
        tokens: int64 `[b, s]`.
        labels: int64 `[b, s]`, −1 where there is nothing to predict.
        counted: average number of counted labels per micro-batch of the global batch, a float or 0-dim fp32, so that
            the mean over micro-batches is the mean over all counted tokens; None if every label counts.
    """
    counts = (labels >= 0).float()
    return _forward(model, tokens, labels, token_weights=counts / (labels.numel() if counted is None else counted))


def token_losses(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Output of a chunk: loss of each token, fp32 `[b, s]`, on the last stage; hidden states before it."""
    return _forward(model, tokens, labels)


def _forward(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels, **options)
