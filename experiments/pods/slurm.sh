#!/bin/bash
#SBATCH --job-name=hope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# A process for each GPU. Two minutes before its time is over the run is saved; requeued, it goes on.
set -euo pipefail
srun --kill-on-bad-exit=1 nested-jax train --config experiments/pods/760m.json --mesh data=2,fsdp=8 --run-dir "${RUN:?a folder that all nodes share}"
