"""`elas plan --measure` and `--check`: this machine's rates, and predictions beside real training steps.

The formulas are in `elas.plan`, which imports no torch; here ranks start, compute and count.

- `cli.py` chooses; `measure.py` and `check.py` are the two commands.
- `ranks.py` starts ranks through the project's launcher and guard, and `entry.py` is what each runs.
- `rates_rank.py`, `host_rank.py` and `links_rank.py` measure on a rank; `check_rank.py` takes steps there, watched by
  `watch.py`.
- `components.py` puts predicted and measured side by side, and says which must be equal.
"""
