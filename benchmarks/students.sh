#!/usr/bin/env bash
# Losses, layer maps and small students side by side, on SST-2 and SNIPS: from the repository's
# folder, with SST-2 (train.tsv and dev.tsv of GLUE, Stanford's test.tsv with a header) in
# data/stanford and SNIPS in data/snips,
#
#   bash benchmarks/students.sh sentence-transformers/all-MiniLM-L6-v2
#
# A run that was stopped goes on with the step that it was in. Training uses the first ROWS rows;
# dev chooses the checkpoint, and the last step measures all models on dev and test.
set -euo pipefail
base=$1
root=${OUTPUT_DIR:-models/students}
seed=${SEED:-42}

run() { # SCRIPT FLAGS...: unless what it writes is there and finished
  local flags="$* "
  local output=${flags#*--output_dir }
  output=${output%% *}
  [ -f "$output/eval_results.json" ] || python "$@" --overwrite_output_dir
}

distil() { # STUDENTS -- NAMES -- FLAGS...: the prediction stage of students side by side
  local students=() names=()
  while [ "$1" != -- ]; do students+=("$1"); shift; done; shift
  while [ "$1" != -- ]; do names+=("$out/$1"); shift; done; shift
  models+=("${names[@]}")
  run task_distill.py --pred_distill --teacher_model "$teacher" --student_model "${students[@]}" \
    --output_dir "${names[@]}" "${common[@]}" --eval_step 100 "$@"
}

measure() { # DATA ROWS TEACHER_ROWS TEACHER_EPOCHS TEACHER_RATE INTERMEDIATE PREDICTION (epochs)
  local data=$1 rows=$2 both=$(($6 + $7)) out teacher models common
  out=$root/$(basename "$data")/$seed
  teacher=$root/$(basename "$data")/teacher
  common=(--data_dir "$data" --max_seq_length 64 --seed "$seed" --max_train_rows "$rows")
  models=("$teacher" "$out/start_3l" "$out/start_4l")

  # Teacher; students of 3 and 4 of its 6 layers (2, 4, 6; by the general map 2, 4, 5, 6)
  run finetune_teacher.py --bert_model "$base" --new_classifier --output_dir "$teacher" \
    --data_dir "$data" --max_seq_length 64 --max_train_rows "$3" --num_train_epochs "$4" \
    --learning_rate "$5"
  for layers in 3 4; do
    [ -f "$out/start_${layers}l/config.json" ] || python tinybert_6_from_bert.py \
      --bert_model "$teacher" --num_layers $layers --output_dir "$out/start_${layers}l"
  done

  # A bilstm and a bigru: from the labels alone, then from the teacher's logits
  local recurrent=(profiles/bilstm_1l_config profiles/bigru_1l_config)
  local slow=(--num_train_epochs "$both" --learning_rate 3e-3)
  for cell in bilstm bigru; do
    models+=("$out/${cell}_alone")
    run finetune_teacher.py --bert_model profiles/${cell}_1l_config --from_scratch --vocab_dir \
      "$teacher" --output_dir "$out/${cell}_alone" "${common[@]}" "${slow[@]}"
  done
  distil "${recurrent[@]}" -- bilstm_paper bigru_paper -- "${slow[@]}"

  # Two stages, the second with the paper's loss and with Hinton's
  run task_distill.py --teacher_model "$teacher" --student_model "$out/start_3l" "$out/start_4l" \
    --output_dir "$out/intermediate_3l" "$out/intermediate_4l" "${common[@]}" \
    --num_train_epochs "$6" --learning_rate 1.5e-4
  local second=(--num_train_epochs "$7" --learning_rate 1e-4)
  distil "$out/intermediate_3l" "$out/intermediate_4l" -- paper_3l paper_4l -- "${second[@]}"
  distil "$out/intermediate_3l" -- hinton_3l -- "${second[@]}" \
    --hard_label_weight 0.5 --soft_label_weight 0.5
  distil "$out/intermediate_3l" -- hinton_t4_3l -- "${second[@]}" --temperature 4 \
    --temperature_squared --hard_label_weight 0.1 --soft_label_weight 0.9

  # All losses in a single stage, of as many passes as the two have
  distil "$out/start_3l" -- joint_3l -- --joint --num_train_epochs "$both" --learning_rate 1e-4

  # The small students once more: with Hinton's loss, and from the teacher's word embeddings
  distil "${recurrent[@]}" -- bilstm_hinton bigru_hinton -- "${slow[@]}" \
    --hard_label_weight 0.5 --soft_label_weight 0.5
  distil "${recurrent[@]}" -- bilstm_copied bigru_copied -- "${slow[@]}" --copy_embeddings

  python task_distill.py --do_eval --eval_split dev test --data_dir "$data" --max_seq_length 64 \
    --student_model "${models[@]}" --output_dir "${models[@]/%//on_test}" --overwrite_output_dir
}

measure data/stanford 5000 20000 1 4e-5 2 2 &
measure data/snips 3000 0 2 1e-4 3 3 &
wait
