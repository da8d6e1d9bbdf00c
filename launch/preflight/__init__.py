"""Whether hosts are fit for a run, before there is one.

`check` is the command, `report` asks all hosts at once, `compare` looks at their answers; `probe` and `facts` are what
runs on each of them, `channels` how it is talked to, `unanswered` why one did not answer. `collectives` are what ranks
do together to see whether they can, `bandwidth` starts that and ends it.
"""
