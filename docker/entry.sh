#!/usr/bin/env bash
# What the images run: `ebbtide` with the words given. Where a cluster started this container as one of several machines,
# its names for that become those which `ebbtide train` reads; the ranks are started there, so that a signal arrives and
# the exit code is the job's.
set -euo pipefail
touch "${TMPDIR:-/tmp}/ebbtide-started" # for health.sh

# srun and torchrun start ranks, not machines
if [[ -z ${LOCAL_RANK:-} && -z ${SLURM_STEP_ID:-} ]]; then
  # PyTorchJob counts pods in RANK; in WORLD_SIZE pods, or later pods times ranks, which is why PET_NNODES goes first
  export PET_NNODES=${PET_NNODES:-${WORLD_SIZE:-1}}
  if [[ $PET_NNODES != 1 ]]; then
    export PET_NODE_RANK=${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-${RANK:-}}}
  fi
  unset RANK WORLD_SIZE

  # ranks: as many as asked for, or GPUs, or as the recipe says
  ranks=${PET_NPROC_PER_NODE:-auto}
  if [[ $ranks == auto || $ranks == gpu ]]; then
    gpus=(/dev/nvidia[0-9]*)
    ranks=
    [[ -e ${gpus[0]} ]] && ranks=${#gpus[@]}
  fi
  if [[ ${1:-} == train && -n $ranks && " $*" != *" nproc="* && " $*" != *" --nproc"* ]]; then
    set -- "$@" "nproc=$ranks"
  fi
fi
exec ebbtide "$@"
