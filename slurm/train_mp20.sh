#!/bin/bash
# Train AutoPeri on 4 nodes of 8 A100s, one task for each GPU, from the root of the checkout:
#
#   export HPCGEN_STORE=/scratch/me/stores/mp20     # made by slurm/preprocess.sh
#   sbatch slurm/train_mp20.sh
#   HPCGEN_RUN=runs/short sbatch slurm/train_mp20.sh steps=20000     # settings that go before those of the config
#
# It runs in the environment that submits it, with hpcgen on the PATH. Account, partition and the like: on the command
# line (`sbatch --account=abc --partition=gpu slurm/train_mp20.sh`) or as further lines below. Preempted, out of time
# or after the failure of a node the job is queued again by itself and goes on from its newest checkpoint.
#   HPCGEN_RUN     run folder (default: runs/train_mp20)      HPCGEN_CONFIG  (default: configs/autoperi_mp20.yaml)

#SBATCH --job-name=hpcgen-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:a100:8
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120
#SBATCH --output=/dev/null

run=${HPCGEN_RUN:-runs/train_mp20}

# The log goes on after a requeue. The script opens it itself: Slurm does not make folders.
log="$run/submit/train-$SLURM_JOB_ID.log"
if ! { mkdir -p "${log%/*}" && exec >> "$log" 2>&1; }; then
    echo "hpcgen: $log cannot be written on $(hostname): want a run folder that all nodes see, with space in it" |
        tee -a "$HOME/hpcgen-$SLURM_JOB_ID.log" >&2 # a place where it may be found
    exit 7
fi
begun=$(wc -c < "$log") # where the words of this start begin

if [ ! -f "${HPCGEN_STORE:-}/manifest.json" ]; then
    echo "hpcgen: HPCGEN_STORE is '${HPCGEN_STORE:-}', want the folder of a store; sbatch slurm/preprocess.sh makes one"
    exit 4
fi
if ! command -v hpcgen > /dev/null; then
    echo "hpcgen: is not on the PATH of the job; activate its environment before sbatch"
    exit 3
fi
tasks=${SLURM_NTASKS_PER_NODE:-1}
gpus=${SLURM_GPUS_ON_NODE:-0} # 0: none asked for
if [ "$gpus" -gt 0 ] && [ "$tasks" -gt "$gpus" ]; then
    echo "hpcgen: $tasks tasks on a node with $gpus GPUs: want one task for each GPU, as with --ntasks-per-node=$gpus"
    exit 3
fi

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SLURM_EXPORT_ENV=ALL # what is set here reaches the tasks, whatever sbatch was told
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID} # in an array one task bears the number of them all
# When Slurm ends this job, for those that must leave before (Slurm itself tells it since 23.02).
end=$(SLURM_TIME_FORMAT=standard squeue --noheader --format=%e --jobs="$job")
HPCGEN_JOB_END=$(date --date="$end" +%s 2> /dev/null)
export HPCGEN_JOB_END
# Of this start alone: ranks on a lost node may live on.
export HPCGEN_FAILED="$run/submit/failed-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
srun --kill-on-bad-exit=1 --mpi=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    hpcgen train "${HPCGEN_CONFIG:-configs/autoperi_mp20.yaml}" store="$HPCGEN_STORE" out="$run" "$@"
code=$?

if [ -e "$HPCGEN_FAILED" ]; then # a task failed and says with which code; srun may tell that of another one
    told=$(cat "$HPCGEN_FAILED")
    exit "${told:-7}" # where nothing can be written there is no space
elif [ "$code" -ne 75 ] && [ "$code" -ne 140 ] && [ "$code" -ne 143 ]; then
    exit "$code"
fi
# 75: stopped early, all is saved. 140, 143: ended by USR2 or TERM before it began. All go on from what is saved.
# Where USR2 ended one task and srun then the others by TERM, srun tells 143.
if grep -q "User defined signal 2" < <(tail -c "+$((begun + 1))" "$log"); then code=140; fi
for _ in $(seq 20); do # the controller may be away for a while
    state=$(scontrol show job "$job") && break
    command -v scontrol > /dev/null || break # there is none
    sleep 15
done
case "$code $state" in
"143 "*JobState=RUNNING*PreemptTime=None*)
    echo "hpcgen: a task was ended by TERM, but job $job is not preempted: another one failed"
    ;;
*JobState=RUNNING* | *JobState=SIGNALING* | *Reason=TimeLimit*)
    echo "hpcgen: job $job left with $code and asks to be queued again"
    for _ in $(seq 20); do
        scontrol requeue "$job" && sleep 60 # until Slurm ends this script
        sleep 15
    done
    echo "hpcgen: job $job could not be queued again; the same command goes on from here"
    ;;
"$code ")
    echo "hpcgen: scontrol does not answer, so job $job cannot ask to be queued again"
    echo "hpcgen: if it is preempted, Slurm itself does so; if not, the same command goes on from here"
    sleep 300 # one that leaves before its preemption ends it would count as failed
    ;;
*) echo "hpcgen: job $job was cancelled; the same command goes on from here" ;;
esac
exit "$code"
