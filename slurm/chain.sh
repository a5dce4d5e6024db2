#!/usr/bin/env bash
# slurm/chain.sh CONFIG RUN --evaluate FILE [--prepare FILE] [key.sub=value ...]
#
# Submits prepare -> train -> evaluate -> tables as jobs that wait for one another, and prints their
# numbers. When one fails, those after it are taken out of the queue; the same command again goes on
# from what is there. The table comes to RUN/results/table.md.
#
#   CONFIG    as for train.sbatch     RUN  the run folder
#   --prepare FILE   one job a line, each after the one before: [options of sbatch] data_prep/X.py ...
#             for example  --array=0-15 data_prep/gcc.py --tsv cc3m.tsv --out /d/gcc3m
#                          data_prep/verify.py /d/gcc3m
#   --evaluate FILE  one command a line, as for eval_array.sbatch; one array task each
# In both files $RUN stands for the run folder. Options of sbatch for each stage come from env.sh.
# The quickstart on CPUs, in small:
#   UNICL_TRAIN="--ntasks=2" slurm/chain.sh configs/quickstart_unicl.yaml runs/chain \
#     --prepare slurm/quickstart_prepare.txt --evaluate slurm/quickstart_evaluate.txt \
#     data.image_text=runs/chain/data train.samples=5120
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n 's/^# \(slurm\/chain.sh CONFIG\)/usage: \1/p' slurm/chain.sh >&2
  exit 2
}
[ "$#" -ge 2 ] || usage
config="$1"
export RUN="$2"
shift 2
prepare="" evaluate="" overrides=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --prepare) prepare="${2:?--prepare needs a file}" && shift ;;
    --evaluate) evaluate="${2:?--evaluate needs a file}" && shift ;;
    -*) usage ;;
    *) overrides+=("$1") ;;
  esac
  shift
done
for file in "$config" "$evaluate" ${prepare:+"$prepare"}; do
  [ -f "$file" ] || { echo "error: no such file: ${file:-(--evaluate is missing)}" >&2; exit 2; }
done
source slurm/env.sh

reason="sbatch is not found"
if command -v sbatch >/dev/null; then
  reason="$(scontrol ping 2>&1)" && reason=""
fi
if [ -n "$reason" ]; then
  echo "error: no SLURM answers here (${reason%%$'\n'*}): submit from a login node of the cluster, or" \
    "type the commands of each stage one after the other (docs/cluster.md)" >&2
  exit 3
fi

after=""
submit() { # name, then the arguments of sbatch
  local name="$1"
  shift
  after="$(sbatch --parsable --export=ALL --kill-on-invalid-dep=yes \
    ${after:+--dependency="afterok:$after"} "$@")"
  echo "$name $after"
}
lines_of() { grep -vE '^[[:space:]]*(#|$)' "$1"; }

# Words of UNICL_* are options, so they are split.
# shellcheck disable=SC2086
{
  if [ -n "$prepare" ]; then
    mapfile -t lines < <(lines_of "$prepare")
    for line in "${lines[@]}"; do
      eval "set -- $line"
      options=()
      while [ "${1:0:1}" = - ]; do
        options+=("$1")
        shift
      done
      submit prepare $UNICL_PREPARE "${options[@]}" slurm/data_prep.sbatch "$@"
    done
  fi
  submit train $UNICL_TRAIN slurm/train.sbatch "$config" "output_dir=$RUN" "${overrides[@]}"
  submit evaluate $UNICL_EVALUATE --array="1-$(lines_of "$evaluate" | wc -l)" \
    slurm/eval_array.sbatch "$evaluate"
  submit tables --job-name=tables --output=%x_%j.out $UNICL_TABLES <<'END'
#!/usr/bin/env bash
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/env.sh
python -m eval.tables "$RUN/results" --format md --output "$RUN/results/table.md"
END
}
