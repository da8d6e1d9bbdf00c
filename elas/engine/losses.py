"""Losses of a micro-batch: per token from a chunk, and their mean."""

import torch

Count = torch.Tensor | float  # of labels; on the device where it comes from a sum over ranks, so that no host waits


class LossModel(torch.nn.Module):
    """A whole model (no pipeline) whose forward returns the mean loss, as DeepSpeed's own forward path requires."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, counted: Count | None = None) -> torch.Tensor:
        """Returns `mean_loss` of `tokens` and `labels [b, s]`, a 0-dim fp32 tensor."""
        return mean_loss(token_losses(self.model, tokens, labels), labels, counted)


def token_losses(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Output of a chunk: per-token loss `[b, s]` on the last stage, hidden states before it."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels)


def mean_loss(losses: torch.Tensor, labels: torch.Tensor, counted: Count | None) -> torch.Tensor:
    """Mean of a micro-batch's losses.

    Args:
        losses: `[b, s]`, per token, fp32.
        labels: `[b, s]`, −1 where there is nothing to predict.
        counted: average number of counted labels per micro-batch of the global batch, a float or 0-dim fp32, so that
            the mean over micro-batches is the mean over all counted tokens; None if every label counts.
    """
    return losses.mean() if counted is None else torch.where(labels >= 0, losses, 0).sum() / counted
