"""The model as transformers' class, which needs nothing of ELAS but weights under its own names.

`configuration_elas.py` and `modeling_elas.py` leave with every exported folder, so they import torch and transformers
only. `weights.py` maps our names to theirs and back, `build.py` makes the model of a checkpoint or of a folder.
"""
