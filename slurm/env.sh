# Values of your site, read by every script of this folder. Change them here, nowhere else.

# How to enter the environment; the default is the one that `make test` creates.
export UNICL_VENV="${UNICL_VENV:-$PWD/.venv}"

# Modules, proxies, network interfaces and the like, for example:
# module load cuda/12.8
# export NCCL_SOCKET_IFNAME=ib0

# Options of sbatch for each stage of chain.sh, for example
# UNICL_PREPARE="--partition=cpu --cpus-per-task=8"
# UNICL_TRAIN="--partition=gpu --time=24:00:00 --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8"
# UNICL_EVALUATE="--partition=gpu --time=04:00:00 --gpus-per-node=1 --cpus-per-gpu=8"
UNICL_PREPARE="${UNICL_PREPARE:-}"
UNICL_TRAIN="${UNICL_TRAIN:-}"
UNICL_EVALUATE="${UNICL_EVALUATE:-}"
UNICL_TABLES="${UNICL_TABLES:-}"

export PATH="$UNICL_VENV/bin:$PATH"
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Not in the shell that submits: jobs inherit what it exports.
if [ -n "${SLURM_JOB_ID:-}" ]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
fi
