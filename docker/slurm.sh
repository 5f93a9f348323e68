#!/usr/bin/env bash
# sbatch docker/slurm.sh mine.yaml [key=value ...]
#SBATCH --job-name=ebbtide
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Two minutes before the time is up the ranks get a signal, save and end with 75; the job then goes back into the queue,
# and goes on from there. Any other end is final. The ranks' words are in a file a node, with the rank before each line.
set -uo pipefail
# a preemption tells this script too, which has to outlive the ranks
trap : TERM

srun --kill-on-bad-exit=1 --label --output="%x-%j-node-%n.log" --open-mode=append ebbtide train "$@"
code=$?
if ((code == 75)); then
  echo "stopped with a checkpoint; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
