"""Launchers; all of them start the same script, `pretrain.py`."""
