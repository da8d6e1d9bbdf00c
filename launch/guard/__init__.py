"""Processes between a launcher and its ranks, so that nothing of a job is left when it ends, however it ends.

    elas launch local            supervise: asks, waits, judges
    └─ guard --leash             guard: adopts orphans, names the first rank that failed
       └─ deepspeed | torchrun   sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
          └─ launch/pretrain.py  a rank; leash: never outlives its guard or its launcher

    elas launch ssh              supervise, and a folder ($ELAS_LAUNCH_DIR) that both sides read
    └─ guard --leash
       └─ deepspeed → pdsh       finds `launch/ssh/ssh` before the real one on its PATH
          └─ ssh.wrapper         one a host; holds the remote leash, leaves status.HOST in the folder
             └─ ssh → guard      on the other host, --leash
                └─ deepspeed → launch/pretrain.py

    sbatch pretrain.sbatch       asks slurm.batch, queues itself again
    └─ srun → guard              one a host, without a leash: SLURM holds it
       └─ launch/pretrain.py, or torchrun → launch/pretrain.py

| who tells whom | how |
|---|---|
| supervise → guard | lines on its standard input: `+`, `stop NAME`, `kill`; the end of input is an order to end |
| supervise → wrappers | the file `order` in the folder: `stop NAME`, `kill` |
| wrapper → supervise | the files `wrapper.HOST` (its process) and `status.HOST` (how the host's part ended) |
| guard → ranks | signals; ELAS_GUARD (its process); the end of their standard input; ELAS_GUARD_FAILED names a file |
| rank 0 → supervise | the markers RUN_DIR/DONE and RUN_DIR/REQUEUE (`elas.run_dir`) |
| kernel → all | PR_SET_PDEATHSIG: SIGKILL when the parent is gone |
"""
