"""`elas bench`: what the layers, the training step and its communication cost, each beside what it is compared to.

Every benchmark runs all of its variants in one process (or one set of ranks), in turns, and reports medians; none
reports the speed of a variant whose results are wrong.

- cli.py: the `elas bench` commands' common entry.
- measure.py: turns and medians, bytes saved for backward, peak memory.
- show.py: tables and progress.
- one_process.py: process groups of a single rank.
- ffn.py, ffn_variants.py: the feed-forward layer.
- step.py, step_peer.py: the training step, and the peer from transformers.
- comm.py, comm_layers.py: what crosses the tensor-parallel group.
- checkpoint.py: saving and loading.
- prep.py, prep_peers.py: tokenisation, and the bare libraries.
"""
