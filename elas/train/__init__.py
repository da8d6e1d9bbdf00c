"""Training: DeepSpeed over Megatron's groups, the loop, metrics."""
