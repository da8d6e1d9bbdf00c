"""Estimates from the configuration alone: parameters, tokens, memory, and the steps of each phase and event.

Nothing here imports torch or starts a process; `elas train --dry-run` prints the result.
"""
