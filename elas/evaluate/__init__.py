"""Evaluation of checkpoints and exported folders: loss, perplexity, bits per byte, and tasks of lm-evaluation-harness."""
