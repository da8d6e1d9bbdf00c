"""Evaluation of checkpoints and folders: loss, perplexity, bits per byte, tasks of lm-evaluation-harness."""
