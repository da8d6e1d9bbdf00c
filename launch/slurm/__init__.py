"""Batch scripts for SLURM: pretraining and data preparation."""
