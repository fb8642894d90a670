#!/usr/bin/env bash
# Runs the tests on the CPU, without outer network; sets up .venv first where packages are missing.
#   bash tests/run.sh                    all of them in their short forms, within five minutes
#   bash tests/run.sh --slow             the long ones too, such as twenty kills a script
#   bash tests/run.sh tests/test_glue.py -k dialect
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
  case $argument in
    --slow | -m | *::*) selection=() ;;& # a test that is named is meant
    --slow) ;;
    *) arguments+=("$argument") ;;
  esac
done

python=$(bash reproduction.sh --python </dev/null)
# One thread for each of two test processes: the models are tiny, and threads would only compete.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg GOMP_SPINCOUNT=${GOMP_SPINCOUNT-10000}
exec "$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "${selection[@]}" \
  "${arguments[@]}" </dev/null
