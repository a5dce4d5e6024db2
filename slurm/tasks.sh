# Read by the batch scripts. From what the job was given:
#   tasks=(...)          options of srun: one task per GPU; without GPUs the tasks that were asked for
#   SLURM_CPUS_PER_TASK  this task's share of the CPUs, where --cpus-per-task was not given
# How the GPUs were asked for (--gres, --gpus-per-node, --gpus) does not matter.

gpus="${SLURM_GPUS_ON_NODE:-0}"
per_node="${SLURM_TASKS_PER_NODE%%[!0-9]*}" # of the first node; "2(x3)" and "2,1" are possible
total="${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}"
[ -n "${SLURM_NTASKS:-}" ] || per_node=1 # SLURM_TASKS_PER_NODE counts CPUs then
if [ "$gpus" -gt 0 ]; then
  if [ "${SLURM_NTASKS:-$((gpus * SLURM_JOB_NUM_NODES))}" != "$((gpus * SLURM_JOB_NUM_NODES))" ]; then
    echo "error: $SLURM_NTASKS tasks for $SLURM_JOB_NUM_NODES nodes with $gpus GPUs each; one task" \
      "per GPU is needed: leave --ntasks and --ntasks-per-node out" >&2
    exit 2
  fi
  per_node="$gpus"
  total="$((gpus * SLURM_JOB_NUM_NODES))"
fi
if [ "$SLURM_CPUS_ON_NODE" -lt "$per_node" ]; then
  echo "error: $SLURM_CPUS_ON_NODE CPUs for $per_node tasks on a node: ask for --cpus-per-gpu, or" \
    "--cpus-per-task without GPUs" >&2
  exit 2
fi
export SLURM_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / per_node))}"
unset SLURM_CPUS_PER_GPU # srun takes one of the two
tasks=(--ntasks="$total" --cpus-per-task="$SLURM_CPUS_PER_TASK")
[ "$((per_node * SLURM_JOB_NUM_NODES))" != "$total" ] || tasks+=(--ntasks-per-node="$per_node")
