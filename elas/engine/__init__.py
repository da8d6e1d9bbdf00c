"""One optimizer step on any layout: Megatron's schedules, DeepSpeed's ZeRO, and what gradients owe between the two."""
