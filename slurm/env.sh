# Values of your site, read by every script of this folder. Change them here, nowhere else.

# How to enter the environment; the default is the one that `make test` creates.
export UNICL_VENV="${UNICL_VENV:-$PWD/.venv}"
# modules, proxies, NCCL_SOCKET_IFNAME and the like belong here, for example:
# module load cuda/12.8

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export PATH="$UNICL_VENV/bin:$PATH"
