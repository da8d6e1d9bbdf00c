"""`elas launch slurm`: jobs that save before their time limit and requeue themselves.

`submit` is the command, `pretrain.sbatch` the job script, which reads its run from `batch`; `follow` waits for a job.
"""
