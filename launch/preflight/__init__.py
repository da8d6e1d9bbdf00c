"""Checks whether hosts are fit for a run, before one is started.

`check` is the command, `survey` queries all hosts at once, `compare` finds problems in their answers. `probe` and
`facts` run on each host, `channels` connects to them, `unanswered` explains a missing answer. `collectives` runs test
collectives on all ranks; `bandwidth` starts and ends that.
"""
