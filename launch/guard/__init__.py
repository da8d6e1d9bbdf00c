"""The processes between a launcher and its ranks; they ensure that no process of a job outlives it.

    elas launch local            supervise: forwards signals, waits, reports
    └─ guard --leash             guard: adopts orphans, names the first rank that failed
       └─ deepspeed | torchrun   sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
          └─ launch/pretrain.py  a rank; leash: never outlives its guard or its launcher

    elas launch ssh              supervise, and a folder ($ELAS_LAUNCH_DIR) that both sides read
    └─ guard --leash
       └─ deepspeed → pdsh       finds `launch/ssh/ssh` before the real ssh on its PATH
          └─ ssh.wrapper         one per host; holds the remote leash, writes status.HOST into the folder
             └─ ssh → guard      on the other host, --leash
                └─ deepspeed → launch/pretrain.py

    sbatch pretrain.sbatch       reads the run from slurm.batch, requeues itself
    └─ srun → guard              one per host, without a leash: SLURM ends it
       └─ launch/pretrain.py, or torchrun → launch/pretrain.py

| from → to | how |
|---|---|
| supervise → guard | lines on its standard input: `+`, `stop NAME`, `kill`; end of input means: end the job |
| supervise → wrappers | the file `order` in the folder: `stop NAME`, `kill` |
| wrapper → supervise | the files `wrapper.HOST` (its process) and `status.HOST` (how the host's part ended) |
| guard → ranks | signals; ELAS_GUARD (its process); the end of their standard input; ELAS_GUARD_FAILED names a file |
| rank 0 → supervise | the markers RUN_DIR/DONE and RUN_DIR/REQUEUE (`elas.run_dir`) |
| kernel → all | PR_SET_PDEATHSIG: SIGKILL when the parent dies |
"""
