#!/bin/bash
#SBATCH --job-name=hpcgen-train-0123abcd
#SBATCH --account=m1234_g
#SBATCH --qos=regular
#SBATCH --constraint=gpu&hbm80g
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=360
#SBATCH --licenses=scratch
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=/dev/null

# The log goes on after a requeue. The script opens it itself: Slurm does not make folders.
mkdir -p '/scratch/me/my run/submit' || exit 7
exec >> '/scratch/me/my run/submit'/train-"$SLURM_JOB_ID".log 2>&1

# The site's own lines.
module load python cudatoolkit

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# When Slurm ends this job, for those that must leave before (Slurm itself tells it since 23.02).
end=$(SLURM_TIME_FORMAT=standard squeue --noheader --format=%e --jobs="$SLURM_JOB_ID")
HPCGEN_JOB_END=$(date --date="$end" +%s 2> /dev/null)
export HPCGEN_JOB_END
# Of this start alone: ranks on a lost node may live on.
export HPCGEN_FAILED='/scratch/me/my run/submit'/failed-"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
srun --kill-on-bad-exit=1 --mpi=none --cpus-per-task=32 /venv/bin/python -u -m hpcgen.cli train 'my config.yaml' steps=10
code=$?

if [ -s "$HPCGEN_FAILED" ]; then # a task failed and says with which code; srun may tell that of another one
    exit "$(cat "$HPCGEN_FAILED")"
elif [ "$code" -ne 75 ] && [ "$code" -ne 140 ] && [ "$code" -ne 143 ]; then
    exit "$code"
fi
# 75: stopped early, all is saved. 140, 143: ended by USR2 or TERM before it began. All go on from what is saved.
case "$code $(scontrol show job "$SLURM_JOB_ID")" in
"143 "*JobState=RUNNING*PreemptTime=None*)
    echo "hpcgen: a task was ended by TERM, but job $SLURM_JOB_ID is not preempted: another one failed"
    ;;
*JobState=RUNNING* | *JobState=SIGNALING* | *Reason=TimeLimit*)
    echo "hpcgen: job $SLURM_JOB_ID left with $code and asks to be queued again"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until Slurm ends this script
    ;;
"$code ")
    echo "hpcgen: scontrol does not answer; if this is a preemption, Slurm itself queues the job again"
    sleep 600
    ;;
*) echo "hpcgen: job $SLURM_JOB_ID was cancelled; the same command goes on from here" ;;
esac
exit "$code"
