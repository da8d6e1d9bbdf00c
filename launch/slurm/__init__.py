"""`elas launch slurm`: jobs that save at their time limit and queue themselves again.

`submit` is the command; `pretrain.sbatch` the job, which asks `batch` what to run; `follow` waits for it.
"""
