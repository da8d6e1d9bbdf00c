#!/usr/bin/env bash
# Four learning rates of the 1B recipe under SLURM: a job array with one run of 10,000 steps for each line of sweep.txt,
# two of them at a time. The data is that of 1b_c4_2nodes.sh:
#
#   export SHARED=/shared/me      # as there
#   bash sweep.sh --dry-run       # check every line for 16 ranks, and print the sbatch command
#   bash sweep.sh                 # submit
#   tail -n 1 $SHARED/runs/1b-lr-*/validation.jsonl
#
# Each run saves, requeues itself and resumes on its own; the same command resumes what did not finish.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "${SHARED:?set it to a folder that all nodes see}" # paths in sweep.txt are relative, since its lines are not expanded
elas launch slurm --sweep "$here/sweep.txt" --nodes 2 --gpus-per-node 8 --cpus-per-task 96 --time 4:00:00 \
  --sbatch '--array=0-3%2' --config "$here/1b_c4.yaml" --data.train c4/train --data.valid c4/valid \
  --data.tokenizer c4/tokenizer --train.steps 10000 --schedule.warmup_steps 0.1 --export.at_end none "$@"
