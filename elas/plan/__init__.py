"""What a run will need, from its configuration alone: parameters, tokens, memory, and when what happens.

Nothing here imports torch or starts anything; `elas train --dry-run` prints it.
"""
