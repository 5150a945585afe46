#!/bin/bash
# A store from CSV files of crystals on all cores of one node, from the root of the checkout:
#
#   export HPCGEN_STORE=/scratch/me/stores/mp20
#   sbatch slurm/preprocess.sh preprocess/mp20.py data/train.csv data/val.csv data/test.csv --split source
#   sbatch --nodes=4 slurm/preprocess.sh preprocess/icsd.py /data/icsd     # four MPI ranks, one on each node
#   sbatch --array=0-7 slurm/preprocess.sh preprocess/icsd.py /data/icsd   # or eight jobs that share the work
#
# What follows the script's name is one of preprocess/*.py and what it takes, but for --out.
#   HPCGEN_MPI  plug-in of srun (default: pmix; pmi2 for MPICH and Intel MPI; see `srun --mpi=list`)

#SBATCH --job-name=hpcgen-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@60
#SBATCH --output=/dev/null

store=${HPCGEN_STORE:-stores/mp20}

# The log goes on after a requeue. The script opens it itself: Slurm does not make folders.
log="$store/submit/preprocess-$SLURM_JOB_ID.log"
if ! { mkdir -p "${log%/*}" && exec >> "$log" 2>&1; }; then
    echo "hpcgen: $log cannot be written on $(hostname): want a run folder that all nodes see, with space in it" |
        tee -a "$HOME/hpcgen-$SLURM_JOB_ID.log" >&2 # a place where it may be found
    exit 7
fi
begun=$(wc -c < "$log") # where the words of this start begin

if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("hpcgen") is None)'; then
    echo "hpcgen: the python of the job's PATH does not have it; activate its environment before sbatch"
    exit 3
fi
if [ "$#" -eq 0 ]; then
    echo "hpcgen: no script is named; want for example: sbatch slurm/preprocess.sh preprocess/mp20.py data/mp20.csv"
    exit 2
fi

export OMP_NUM_THREADS=1
export SLURM_EXPORT_ENV=ALL # what is set here reaches the tasks, whatever sbatch was told
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID} # in an array one task bears the number of them all
# When Slurm ends this job, for those that must leave before (Slurm itself tells it since 23.02).
end=$(SLURM_TIME_FORMAT=standard squeue --noheader --format=%e --jobs="$job")
HPCGEN_JOB_END=$(date --date="$end" +%s 2> /dev/null)
export HPCGEN_JOB_END
# Of this start alone: ranks on a lost node may live on.
export HPCGEN_FAILED="$store/submit/failed-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
mpi=none
if [ "$SLURM_NTASKS" -gt 1 ]; then mpi=${HPCGEN_MPI:-pmix}; fi
srun --kill-on-bad-exit=1 --mpi="$mpi" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python -u "$@" --out "$store"
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
