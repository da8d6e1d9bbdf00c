"""Training and validation data: Megatron-core's datasets, and the batches of each data-parallel rank."""
