#!/bin/bash
# One node with four GPUs: a study inside one job, a run on each GPU.
#   sbatch examples/slurm/one_node.sh --preset study --families similar
#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=8:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

# Five minutes before its time ends, the job is told so: the runs save a checkpoint each, and the job
# is put into the queue again. The study resumes where it was stopped.
python run_study.py --workers "${WORKERS:-4}" "$@" &
study=$!
trap 'stopped=1; kill -TERM $study' TERM
wait $study
code=$?
while kill -0 $study 2> /dev/null; do # the signal has ended the first wait
    wait $study
    code=$?
done
[ -z "$stopped" ] || scontrol requeue "$SLURM_JOB_ID"
exit $code
