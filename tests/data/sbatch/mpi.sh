#!/bin/bash
#SBATCH --job-name=hpcgen-campaign-0123abcd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=32
#SBATCH --mem=0
#SBATCH --time=1440
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --dependency=afterok:17:18
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=/dev/null

# The log goes on after a requeue. The script opens it itself: Slurm does not make folders.
mkdir -p '/scratch/me/my run/submit' || exit 7
exec >> '/scratch/me/my run/submit'/campaign-"$SLURM_JOB_ID".log 2>&1

export TMPDIR='/scratch/t m'

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# When Slurm ends this job, for those that must leave before (Slurm itself tells it since 23.02).
end=$(SLURM_TIME_FORMAT=standard squeue --noheader --format=%e --jobs="$SLURM_JOB_ID")
HPCGEN_JOB_END=$(date --date="$end" +%s 2> /dev/null)
export HPCGEN_JOB_END
# Of this start alone: ranks on a lost node may live on.
export HPCGEN_FAILED='/scratch/me/my run/submit'/failed-"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
srun --kill-on-bad-exit=1 --mpi=pmi2 /venv/bin/python -u -m hpcgen.cli campaign 'my config.yaml' steps=10
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
