"""Hugging Face folders from checkpoints, and checkpoints from Hugging Face folders."""
