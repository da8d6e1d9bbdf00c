#!/usr/bin/env bash
# The 1B model on C4 with two nodes of eight H100 under SLURM: data, plan, job. Run it on a login node, step by step, in
# the environment that has elas:
#
#   export SHARED=/shared/me                # a folder that all nodes see, with 200 GB
#   bash 1b_c4_2nodes.sh data               # download, tokenizer, tokens: hours; the same command resumes
#   bash 1b_c4_2nodes.sh verify             # when the tokens are there: checksums, as in their manifests
#   bash 1b_c4_2nodes.sh plan               # layouts, memory and days, on paper
#   bash 1b_c4_2nodes.sh submit --dry-run   # check the settings for 16 ranks, and print the sbatch command
#   bash 1b_c4_2nodes.sh submit             # submit; more options of `elas launch slurm` may follow, such as --wait
#   elas watch $SHARED/runs/1b-c4           # from any machine that sees the folder
#
# CPU_PARTITION  partition for the tokenisation, an array of 64 jobs; if unset it runs on this machine
# The job saves before its time limit, requeues itself and resumes (docs/launch.md).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
c4=${SHARED:?set it to a folder that all nodes see}/c4
run=$SHARED/runs/1b-c4
step=${1:?give data, verify, plan or submit}
shift

case $step in
data)
  # 100 of C4's 1,024 English files: 15 B tokens; and its validation set.
  hf download allenai/c4 --repo-type dataset --local-dir "$c4" \
    --include "en/c4-train.000*-of-01024.json.gz" --include "en/c4-validation.*.json.gz"
  [[ -e $c4/tokenizer/tokenizer.model ]] ||
    elas prep tokenizer --input "$c4/en/c4-train.*" --vocab-size 32000 --output "$c4/tokenizer"
  elas prep tokenize --input "$c4/en/c4-validation.*" --tokenizer "$c4/tokenizer" --output "$c4/valid"
  where=(--executor local)
  if [[ -n ${CPU_PARTITION:-} ]]; then
    where=(--executor slurm --slurm-partition "$CPU_PARTITION" --slurm-time 4:00:00 --workers 64)
  fi
  elas prep tokenize --input "$c4/en/c4-train.*" --tokenizer "$c4/tokenizer" --output "$c4/train" "${where[@]}"
  ;;
verify)
  elas prep verify "$c4/train" "$c4/valid"
  ;;
plan)
  elas plan --config "$here/1b_c4.yaml" --hardware h100 --gpus 16 --tokens 13.1B "$@"
  ;;
submit)
  elas launch slurm --nodes 2 --gpus-per-node 8 --cpus-per-task 96 --time 12:00:00 --config "$here/1b_c4.yaml" \
    --data.train "$c4/train" --data.valid "$c4/valid" --data.tokenizer "$c4/tokenizer" --train.run_dir "$run" "$@"
  ;;
*)
  echo "error: $step: give data, verify, plan or submit" >&2
  exit 2
  ;;
esac
