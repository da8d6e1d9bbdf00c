"""`elas bench`: time and memory of layers, training steps, communication, checkpoints and tokenisation.

A benchmark runs all of its variants in one process (or one set of ranks), in turns, and reports medians. It reports no
speed of a variant with wrong results.

- cli.py: the `elas bench` command.
- arguments.py: options that benchmarks share; show.py: tables.
- measure.py: turns and medians, bytes saved for backward, peak memory.
- one_process.py: process groups of a single rank.
- ffn.py, ffn_variants.py: the feed-forward layer.
- step.py, step_models.py, step_peer.py: the training step, and transformers' Llama.
- comm.py, comm_layers.py: bytes sent within a tensor-parallel group.
- checkpoint.py: saving and loading.
- prep.py, prep_peers.py: tokenisation, and the tokenizer libraries alone.
"""
