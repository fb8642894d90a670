#!/usr/bin/env bash
# Prunes one student with the original's settings; paths are those of the full run.
#   TASK=mrpc DATA=MRPC CONSTRAINT=0.3 bash scripts/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TASK=${TASK:-sst2}
DATA=${DATA:-SST-2}
CONSTRAINT=${CONSTRAINT:-0.1}
MODEL=${MODEL:-../models/distilled_tinybert_6l_$TASK}
DATA_DIR=${DATA_DIR:-../data/glue_data/$DATA}
OUTPUT=${OUTPUT:-../models/kprune_${CONSTRAINT}_$(basename "$MODEL")}

exec "${PYTHON:-python}" src/main.py \
    --model_name "$MODEL" \
    --ckpt_dir "$MODEL" \
    --task_name "$TASK" \
    --data_dir "$DATA_DIR" \
    --output_dir "$OUTPUT" \
    --constraint "$CONSTRAINT" \
    --lam_rep 2.5e-4 \
    --sublayerwise_tuning "$@"
