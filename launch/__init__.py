"""Starting jobs: `pretrain.py` is the one file that every launcher starts."""
