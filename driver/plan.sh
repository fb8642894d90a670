# The words of reproduction.sh, which reads this file: they make the plan of driver/steps.py.
# shellcheck shell=bash disable=SC2034,SC2086,SC2154,SC2207 # settings; flags are lists of words

plan=() title=()

# stage NAME TITLE: in a run of own data only where it has a step.
stage() {
  title=(stage "$1" "$2" $'\n')
  [[ $MODEL_SOURCE == given ]] || plan+=("${title[@]}") title=()
}

# step NAME [--update] OUTPUT... [--reads PATH...] [--content HASH] -- COMMAND: --reads names what
# the command reads though it does not say so; driver/steps.py explains the rest.
step() { plan+=("${title[@]}" step "$@" $'\n') title=(); }

# options CASE FLAG NAME [FLAG NAME ...]: "FLAG value" for each setting that is not empty.
options() {
  local case=$1 value
  shift
  while (($#)); do
    value=$(setting "$2" "$case")
    [[ -z $value ]] || echo "$1 $value"
    shift 2
  done
}

# per NAME DEFAULT STUDENT...: the setting's value for each student.
per() {
  local student value
  for student in "${@:3}"; do
    value=$(setting "$1" "$student")
    echo "${value:-$2}"
  done
}

TRAINING=$(options '' --precision PRECISION --seed SEED)

# if_yes NAME CASE WORD: the word where the setting is yes.
if_yes() { [[ $(setting "$1" "$2") != yes ]] || echo "$3"; }

# general_flags STUDENT: the flags that students on one teacher pass have in common.
general_flags() {
  options "$1" --eval_step GENERAL_EVAL_STEP --num_train_epochs GENERAL_EPOCHS \
    --warmup_proportion GENERAL_WARMUP --weight_decay GENERAL_WEIGHT_DECAY \
    --max_seq_length GENERAL_MAX_SEQ_LENGTH
}

# teacher_passes: a line "STUDENT,STUDENT..." for those that general distillation trains together:
# with the same flags, and batches that are multiples of the first one's.
teacher_passes() {
  local waiting=$STUDENTS first student group later sizes
  while [[ -n $waiting ]]; do
    first=${waiting%% *} group='' later=''
    for student in $waiting; do
      sizes=($(per GENERAL_BATCH_SIZE 32 "$first" "$student"))
      if [[ $(general_flags "$student") == "$(general_flags "$first")" ]] &&
        ((sizes[1] % sizes[0] == 0 && (sizes[0] == sizes[1] || sizes[0] % 64 == 0))); then
        group+=,$student
      else
        later+=" $student"
      fi
    done
    echo "${group#,}"
    waiting=${later# }
  done
}

# model_of STUDENT NAME: the folder of a student of this run that was trained on the task NAME.
model_of() {
  case $1 in
    "$DIRECT") echo "$1_$2_tsd" ;;
    "$SMART_STUDENT") [[ $SMART_GENERAL != yes ]] || echo "$1_$2" ;;
    *) echo "distilled_$1_$2" ;;
  esac
}

# start_of STUDENT NAME: the folder that task distillation starts from.
start_of() {
  case $STUDENT_START in
    general) echo "$STUDENTS_DIR/distilled_$1" ;;
    given) echo "$STUDENT" ;;
    *) echo "$STUDENTS_DIR/start/$1_$2" ;;
  esac
}

# student_start: the step that makes the student of own data which --student does not name: layers
# of the fine-tuned teacher, or random weights, which general distillation trains if there is text.
student_start() {
  local start data corpus=$TRAIN_CORPUS given=${STUDENT_CONTENT:+--content $STUDENT_CONTENT}
  start=$(start_of "$STUDENTS" "$NAMES") data=(--task_name "$TASKS" --data_dir "$GLUE_DIR/$TASKS")
  case $STUDENT_START${TRAIN_CORPUS:+_corpus} in
    copied*)
      step start "$start" -- python tinybert_6_from_bert.py --output_dir "$start" \
        --bert_model "$STUDENTS_DIR/final_${NAMES}_teacher" --num_layers "$STUDENT_LAYERS"
      ;;
    random)
      step start "$start" $given -- python finetune_teacher.py "${data[@]}" --from_scratch \
        --bert_model "$STUDENT" --vocab_dir "$BASE_MODEL" --num_train_epochs 0 \
        --output_dir "$start" --max_seq_length "$TEACHER_MAX_SEQ_LENGTH" $TRAINING
      ;;
    random_corpus)
      if [[ $TRAIN_CORPUS == own ]]; then
        corpus=$WORK_DIR/corpus.txt
        step corpus "$corpus" -- python prepare_data.py "${data[@]}" --output_file "$corpus"
      fi
      step start "$start" $given -- python general_distill.py --train_corpus "$corpus" \
        --teacher_model "$BASE_MODEL" --student_model "$STUDENT" --output_dir "$start" \
        $(options '' --train_batch_size GENERAL_BATCH_SIZE --learning_rate GENERAL_LEARNING_RATE) \
        $(general_flags '') $TRAINING
      ;;
  esac
}

# teacher_start TASK: what its teacher is fine-tuned from, or is.
teacher_start() {
  start=("$BASE_MODEL")
  if [[ $MODEL_SOURCE == given ]]; then
    [[ $NEW_CLASSIFIER != yes ]] || start+=(--new_classifier)
  elif [[ $MODEL_SOURCE == minilm || -v SOURCE[$1] ]]; then
    start+=(--new_classifier)
  else
    start=("$BASE_MODEL-${SLUG[$1]}")
  fi
}

# baseline_start KIND:STUDENT NAME: what a student without distillation starts from, in `start`; for
# start:STUDENT as the distilled one.
baseline_start() {
  kind=${1%%:*} student=${1#*:} start=("$(start_of "$student" "$2")" --new_classifier)
  case $kind in
    scratch)
      [[ $STUDENT_START != general ]] || start[0]=$(setting STUDENT_CONFIG "$student")
      start[1]=--from_scratch
      ;;
    smart) start[0]=$STUDENTS_DIR/${student}_direct_base ;;
    start) # as the report tells them apart
      case $STUDENT_START${TRAIN_CORPUS:+_corpus} in
        copied*) kind=smart ;;
        random) kind=scratch start[1]=--from_scratch ;;
        *) kind=general ;;
      esac
      ;;
  esac
}

# export_flags TASK: what no file tells the model cards; a user's own data are not GLUE.
export_flags() {
  local flags
  flags=$(setting EXPORT_FLAGS "${SLUG[$1]}")
  [[ ! -v SOURCE[$1] ]] || flags=${flags/--dataset nyu-mll\/glue/}
  echo $flags
}

# aug_file TASK: its augmented training rows.
aug_file() { echo "$GLUE_DIR/$1/${AUG_FILE[$1]-train_aug.tsv}"; }

# finished_models SETTING NAME: the models of the students that the setting names (all: every one).
finished_models() {
  local wanted student
  wanted=" $(setting "$1" "$2") "
  for student in $STUDENTS ${SMART_STUDENT:+$DIRECT $SMART_STUDENT}; do
    [[ $wanted != " all " && $wanted != *" $student "* ]] || model_of "$student" "$2"
  done
}

# evaluation STEP TASK MODEL...: the dev scores of trained models, in RESULTS_DIR/eval/MODEL, and
# those on the test set of a task that has one.
evaluation() {
  local models=("${@:3}") outputs=("${@/#/$RESULTS_DIR/eval/}")
  outputs=("${outputs[@]:2}")
  step "eval_$1" "${outputs[@]}" -- python task_distill.py --do_eval \
    --student_model "${models[@]/#/$STUDENTS_DIR/}" --data_dir "$GLUE_DIR/$2" --task_name "$2" \
    --output_dir "${outputs[@]}" $LOWER_CASE_FLAG $(options "${SLUG[$2]}" --eval_batch_size \
      EVAL_BATCH_SIZE --max_seq_length MAX_SEQ_LENGTH --precision PRECISION) \
    ${EVAL_SPLITS[$2]:+--eval_split ${EVAL_SPLITS[$2]}}
}

# exported_models NAME: the models of the task NAME that go to a hub, and of those pruned ones.
exported_models() {
  local model choice
  finished_models EXPORT_STUDENTS "$1"
  for model in $(finished_models PRUNE_STUDENTS "$1"); do
    for choice in $(setting EXPORT_CONSTRAINTS "$1"); do echo "${model}_pruned_$choice"; done
  done
}

# hub_has MODEL: whether the hub (HF_ENDPOINT) or this machine's cache of it has a model.
hub_has() {
  "$PYTHON" -c 'import huggingface_hub, sys
huggingface_hub.hf_hub_download(sys.argv[1], "config.json")' "$1" &>/dev/null
}

# carry_out_plan: hands the plan to driver/steps.py, in this shell's place.
carry_out_plan() {
  local call='' name
  for name in "${overrides[@]%%=*}"; do call+="$name=$(printf %q "${!name}") "; done
  call+="bash reproduction.sh"
  for name in task teacher student vectors; do
    [[ ! -v flags[$name] ]] || call+=" --$name $(printf %q "${flags[$name]}")"
  done
  [[ $profile =~ ^(full|task)$ ]] || call+=" --profile $(printf %q "$profile")"
  [[ $recipe == original ]] || call+=" --recipe $recipe"
  [[ $mode != run ]] || echo "Profile $profile, recipe $recipe; logs in $RESULTS_DIR/logs"
  export PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=${GOMP_SPINCOUNT-10000}
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT-110} # to write a state
  # Large temporary files, such as an epoch of Wikipedia, go where the models go.
  export TMPDIR=${TMPDIR:-$(realpath -m "$MODELS_DIR")/tmp}
  exec "${PYTHON:-python3}" driver/steps.py --mode "$mode" --only "$only" --start "$from" \
    --jobs "$JOBS" --gpus "$GPUS" --cores "$(nproc)" --log_dir "$RESULTS_DIR/logs" --call "$call" \
    --folders "$WORK_DIR" "$MODELS_DIR" "$RESULTS_DIR" < <(printf '%s\0' "${plan[@]}")
}
