# Options, profiles, checks and the Python environment of reproduction.sh, which reads this file.
# Every setting ends in a variable of its name.
# shellcheck shell=bash disable=SC1090,SC2005,SC2034,SC2046,SC2086 # settings; lists of words

RUNTIME_MODULES="torch numpy tokenizers safetensors huggingface_hub filelock nltk tqdm
requests boto3 scipy sklearn matplotlib wikiextractor onnx onnxruntime"
TEST_MODULES="transformers pytest xdist hypothesis ruff"
declare -gA SLUG=([RTE]=rte [SST-2]=sst2 [CoLA]=cola [MRPC]=mrpc [STS-B]=stsb [QQP]=qqp [MNLI]=mnli
  [QNLI]=qnli [WNLI]=wnli) # the tasks' names in folders and settings
# Of each task of the user's own: where its data are and a hash of them, what splits off dev and
# test, the file of augmented rows, and what models are measured on where there is a test set.
declare -gA SOURCE=() CONTENT=() SHARES=() AUG_FILE=() EVAL_SPLITS=()
declare -gA flags=() # --task, --teacher, --student, --vectors

usage() {
  cat <<'TEXT'
Usage: bash reproduction.sh [options]

Without options: the full reproduction (BERT-base, Wikipedia, days on a GPU).
What is finished is skipped, and training goes on inside the step that was
stopped, so the same call continues after Ctrl-C, kill -9 or a power cut.

Your data and your BERT, from a teacher to an exported int8 student:
  --task DATA         folder with train, dev, test, or a file (CSV, TSV, JSON
                      lines, Parquet); without dev, a tenth of train is it
  --teacher MODEL     a BERT (folder, URL, hub id): as it is if its labels are
                      these, else fine-tuned with a new classifier
  --student MODEL     weights to start from, or a config.json for random ones;
                      not given: half of the teacher's layers
  --vectors FILE      augmentation by word vectors; also glove (downloaded) and
                      composed (of the teacher's own); not given: none

  --demo              same as --profile demo: offline, no GPU, minutes
  --profile NAME|FILE settings of a run: full, demo, minilm, ... (profiles/)
  --recipe NAME       hyper-parameters: original (default) or paper
  --list              print the stages and what of them is finished
  --only STAGE        run this stage alone
  --from STAGE        start at this stage
  --dry-run           print every command that is not finished, run none
  --python            set up the environment, print its interpreter
  -h, --help          this text

A setting of profiles/full.env in the environment wins over profile and recipe:
  DATA_DIR=/big/disk bash reproduction.sh --only wikipedia
With GPUS=4 the training scripts run on four GPUs of this machine (torchrun).
TEXT
}

complain() {
  echo "reproduction.sh: error: $*" >&2
  exit 2
}

# ---------------------------------------------------------------- options and settings

read_options() {
  local names stage
  profile='' recipe=original only='' from='' mode=run
  while (($#)); do
    case $1 in
      --demo) profile=demo ;;
      --profile | --recipe | --only | --from)
        (($# > 1)) || complain "$1 needs a value"
        declare -g "${1#--}=$2"
        shift
        ;;
      --task | --teacher | --student | --vectors)
        [[ -n ${2-} && $2 != --* ]] || complain "$1 needs a value"
        flags[${1#--}]=$2
        shift
        ;;
      --list | --dry-run | --python) mode=${1#--} ;;
      -h | --help) usage && exit ;;
      *) complain "unknown option $1; see bash reproduction.sh --help" ;;
    esac
    shift
  done
  [[ $recipe != seed ]] || recipe=original # its former name
  [[ $recipe == original || $recipe == paper ]] ||
    complain "--recipe $recipe: expected original or paper"
  profile=${profile:-$([[ -v flags[task] ]] && echo task || echo full)}
  [[ ! -f $profile ]] || profile=$(realpath "$profile")
  names=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
  for stage in "${!flags[@]}"; do # as they are called from there
    [[ ! -e ${flags[$stage]} ]] ||
      flags[$stage]=$(realpath -s --relative-base="$names" -- "${flags[$stage]}")
  done
  cd "$names" || exit
  names=$(echo $(sed -n 's/^ *stage \([a-z_]*\) .*/\1/p' reproduction.sh))
  for stage in $only $from; do
    [[ " $names " == *" $stage "* ]] || complain "no stage $stage; expected one of: $names"
  done
  [[ -f $profile || -f profiles/$profile.env ]] ||
    complain "no profile $profile; expected a file or one of:" "$(cd profiles && echo *.env)"
}

# read_settings: the profile over profiles/full.env, the recipe over both, and the caller's
# environment over all, also for tasks and students that the files do not name.
read_settings() {
  local files=(profiles/full.env) file name override names
  if [[ -f $profile ]]; then files+=("$profile"); else files+=("profiles/$profile.env"); fi
  [[ $recipe == original ]] || files+=(profiles/paper.env)
  names=" $(setting_names "${files[@]}") " overrides=()
  for name in $(compgen -e); do
    [[ $names != *" ${name%%_[a-z]*}"[\ _]* ]] || overrides+=("$name=${!name}")
  done
  for file in "${files[@]}"; do
    source <(tr -d '\r' <"$file")
  done
  for override in "${overrides[@]}"; do declare -g "$override"; done
  TEACHER=${flags[teacher]-$TEACHER} STUDENT=${flags[student]-$STUDENT}
  WORD_VECTORS=${flags[vectors]-$WORD_VECTORS}
  own_data
  check_names $names
  derive
  check_values
  [[ $mode != run ]] || find_python $RUNTIME_MODULES
  [[ $mode != run || ! ${only:-${from:-inputs}} =~ ^(environment|inputs)$ ]] || check_inputs
}

# setting NAME [CASE]: NAME_CASE if there is one, else NAME; CASE is a task's slug or a student.
setting() {
  local own=${1}_${2-}
  echo ${!own-${!1-}} # without stray spaces
}

setting_names() { echo $(sed -n 's/^ *\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p' "$@"); }

# own_data: has driver/own_data.py read the folders and files of TASKS, and of a run that has them
# the teacher and the student; TASKS then holds the tasks' names.
own_data() {
  local word words=(${TASKS//,/ }) own=() names=() models=() found
  STUDENT_START=general TEACHER_CONTENT='' STUDENT_CONTENT=''
  expect "yes or no" 'yes|no' NEW_CLASSIFIER
  expect "a number" ' *([1-9][0-9]*)? *' MAX_SEQ_LENGTH STUDENT_LAYERS
  expect "a share below 1" '(0?\.[0-9]+|0)?' DEV_SHARE TEST_SHARE
  [[ ! -v flags[task] ]] || words=("${flags[task]}")
  check_flags "${#words[@]}"
  if [[ $MODEL_SOURCE == given ]]; then
    models=(--teacher "$TEACHER" --student "$STUDENT" --new_classifier "$NEW_CLASSIFIER"
      ${STUDENT_LAYERS:+--num_layers "$STUDENT_LAYERS"}
      ${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"})
    [[ -z $WORD_VECTORS || -n $AUGMENTATION_MODEL ]] || models+=(--masked_lm yes)
    [[ -z $PRUNE_STUDENTS$QUANTIZE_STUDENTS$EXPORT_STUDENTS ]] || models+=(--own_layers yes)
  fi
  for word in "${words[@]}"; do
    if [[ $MODEL_SOURCE == given || $word == */* || (-e $word && -z ${SLUG[$word]-}) ]]; then
      own+=("$word") names+=("")
    else
      names+=("$word")
    fi
  done
  if ((${#own[@]} > 0)); then
    [[ $mode != run ]] || find_python $RUNTIME_MODULES
    known_python $RUNTIME_MODULES ||
      complain "own data: ${PYTHON:-python3} lacks packages;" \
        "PYTHON=\$(bash reproduction.sh --python)"
    found=$("$PYTHON" driver/own_data.py --tasks "${own[@]}" "${models[@]}" \
      --dev_share "${DEV_SHARE:-0}" --test_share "${TEST_SHARE:-0}") || exit 2
    eval "$found"
    for word in "${!names[@]}"; do
      [[ -n ${names[word]} ]] || names[word]=${OWN[0]} OWN=("${OWN[@]:1}")
    done
  fi
  TASKS=${names[*]}
}

# check_flags TASKS: of own data the flags, or the settings that stand for them.
check_flags() {
  local name
  if [[ $MODEL_SOURCE != given ]]; then
    [[ ! -v flags[task] ]] ||
      complain "--task and --profile $profile: expected no profile, or one for own data" \
        "(source profiles/task.env)"
    for name in "${!flags[@]}"; do complain "--$name goes with --task, which is missing"; done
    return
  fi
  (($1 == 1)) || complain "profile $profile: expected --task and a folder or file"
  [[ -n $TEACHER ]] || complain "--teacher is missing; expected a BERT: folder, URL or hub id"
  [[ -z $TRAIN_CORPUS || $TRAIN_CORPUS == own || -e $TRAIN_CORPUS ]] ||
    complain "TRAIN_CORPUS=$TRAIN_CORPUS: no such file; expected text, one sentence a line, or own"
  if [[ -f $WORD_VECTORS && $WORD_VECTORS != */* ]]; then
    WORD_VECTORS=./$WORD_VECTORS
  elif [[ ! $WORD_VECTORS =~ ^(glove|composed|)$ && ! -f $WORD_VECTORS ]]; then
    complain "--vectors $WORD_VECTORS: no such file; expected one, or glove, or composed"
  fi
}

# tidy_folder NAME...: a setting's folder without slashes at its end, dots or doubled slashes.
tidy_folder() {
  local name base
  for name; do
    [[ ${!name} && ${!name} != "~"* ]] ||
      complain "$name=${!name}: expected a folder, its path written out"
    base=()
    [[ ${!name} == /* ]] || base=(--relative-to=.)
    printf -v "$name" %s "$(realpath -sm "${base[@]}" -- "${!name}")"
  done
}

derive() {
  GLUE_NAMES=''
  local task known tasks=() names=()
  if [[ $MODEL_SOURCE == given ]]; then # one task
    MODELS_DIR=${MODELS_DIR/SLUG/${SLUG[$TASKS]}} RESULTS_DIR=${RESULTS_DIR/SLUG/${SLUG[$TASKS]}}
    for task in "$TEACHER" "$STUDENT"; do
      [[ ! $task -ef $MODELS_DIR ]] ||
        complain "$task: this run's models would go there; expected another MODELS_DIR"
    done
    TEACHER_MAX_SEQ_LENGTH=${TEACHER_MAX_SEQ_LENGTH:-$LENGTH}
    WORK_DIR=${WORK_DIR:-$MODELS_DIR}
    GLUE_DIR=${GLUE_DIR:-$WORK_DIR/data}
  fi
  tidy_folder DATA_DIR MODELS_DIR RESULTS_DIR ${WORK_DIR:+WORK_DIR} ${GLUE_DIR:+GLUE_DIR}
  WORK_DIR=${WORK_DIR:-$DATA_DIR}
  GLUE_DIR=${GLUE_DIR:-$WORK_DIR/glue_data}
  BASE_MODEL=$MODELS_DIR/$BASE_MODEL_NAME
  [[ $MODEL_SOURCE != given ]] || BASE_MODEL=$TEACHER
  # What the recipe changes: students and the teachers they learn from, augmented rows, results.
  STUDENTS_DIR=$MODELS_DIR
  if [[ $recipe != original ]]; then
    GLUE_DIR+=_$recipe STUDENTS_DIR+=/$recipe RESULTS_DIR+=/$recipe
  fi
  VECTORS=$DATA_DIR/$WORD_VECTORS
  [[ ! $WORD_VECTORS =~ ^(glove|composed)$ ]] || VECTORS=$DATA_DIR/glove.840B.300d.txt
  [[ $WORD_VECTORS != composed || ($MODEL_SOURCE != given && -f $VECTORS) ]] ||
    VECTORS=$WORK_DIR/composed_vectors.txt
  [[ $WORD_VECTORS != */* ]] || VECTORS=$WORD_VECTORS
  if [[ -z $WORD_VECTORS ]]; then # no augmentation
    VECTORS=''
    for task in "${!AUGMENTED@}" "${!PREDICTION_AUGMENTED@}"; do declare -g "$task=no"; done
  fi
  for task in ${TASKS//,/ }; do # as the folders are called, whatever the case
    for known in "${!SLUG[@]}"; do
      [[ ${task,,} != "${known,,}" && ${task,,} != "${SLUG[$known]}" ]] || task=$known
    done
    [[ -n ${SLUG[$task]-} ]] || complain "TASKS: $task; expected some of: ${!SLUG[*]}, or" \
      "a folder or file of your own"
    [[ " ${tasks[*]} " != *" $task "* ]] || complain "TASKS: $task stands there twice"
    tasks+=("$task") names+=("${SLUG[$task]}")
    [[ -v SOURCE[$task] ]] || GLUE_NAMES+="${SLUG[$task]} "
  done
  TASKS=${tasks[*]} NAMES=${names[*]}
  [[ " ${!SLUG[*]} " == *" $LATENCY_TASK "* ]] ||
    complain "LATENCY_TASK=$LATENCY_TASK: expected one of: ${!SLUG[*]}"
  [[ " $TASKS " == *" $LATENCY_TASK "* ]] || LATENCY_TASK=${tasks[0]-}
  CORPUS=$WORK_DIR/wiki_for_bert.txt
  DIRECT=${SMART_STUDENT}_direct # that student without general distillation
  for DUMP in "$DATA_DIR"/$WIKI_DUMP; do :; done # a pattern's last match
  [[ -f $DUMP || $WIKI_DUMP != *'*'* ]] ||
    DUMP=$DATA_DIR/enwiki-20251101-pages-articles-multistream.xml.bz2 # the original's
}

# ---------------------------------------------------------------- checks

# check_names NAME...: a profile sets what profiles/full.env knows, for all or one task or student.
check_names() {
  local name base own known
  known=" $(setting_names profiles/full.env) "
  for name; do
    base=${name%%_[a-z]*}
    [[ $known == *" $base "* || $known == *" ${base}_"[a-z]* ]] ||
      complain "profile $profile: no setting is called $name; profiles/full.env names them all"
    own=${name#"$base"}
    [[ -z $own || $known == *"$own "* || " $* " == *" STUDENT_CONFIG$own "* ||
      " ${SLUG[*]} $STUDENTS $SMART_STUDENT " == *" ${own#_} "* ]] ||
      complain "profile $profile: $name: ${own#_} is neither a task nor a student"
  done
}

# expect TEXT PATTERN NAME...
expect() {
  local name
  for name in "${@:3}"; do
    declare -g "$name=${!name,,}"
    [[ ${!name} =~ ^($2)$ ]] || complain "$name=${!name}: expected $1"
  done
}

check_values() {
  local entry student config known=()
  expect "a number" '[1-9][0-9]*' GPUS JOBS ${SMART_STUDENT:+SMART_LAYERS}
  expect "a number" '[0-9]+' DISK_GB
  expect "a number" ' *([1-9][0-9]*)? *' "${!GENERAL_BATCH_SIZE@}" # they are compared
  expect "yes or no" 'yes|no' NEEDS_GPU SMART_GENERAL PUBLISHED_NUMBERS \
    "${!AUGMENTED@}" "${!PREDICTION_AUGMENTED@}"
  expect "given or demo" 'given|demo' INPUTS
  expect "hub, demo, minilm or given" 'hub|demo|minilm|given' MODEL_SOURCE
  [[ $BASE_MODEL_NAME =~ ^[^/\ ]+$ ]] ||
    complain "BASE_MODEL_NAME=$BASE_MODEL_NAME: expected the name of a folder"
  [[ -n ${TASKS// /} && -n ${STUDENTS// /} ]] || complain "TASKS, STUDENTS: expected one at least"
  for student in $STUDENTS $SMART_STUDENT; do # part of settings' names and of folders
    [[ $student =~ ^[A-Za-z0-9_]+$ && " ${known[*]} $NAMES " != *" $student "* ]] ||
      complain "student $student: expected a name of letters, digits and _, once, and no task's"
    known+=("$student")
  done
  for entry in $STUDENTS $BASELINES; do
    student=${entry#*:} config=$(setting STUDENT_CONFIG "${entry#*:}")
    if [[ $STUDENT_START != general && $entry =~ ^((start|scratch):)?$STUDENTS$ ]]; then
      continue # made from what --student names
    elif [[ $STUDENT_START != general ]]; then
      complain "BASELINES: $entry; expected start:$STUDENTS or scratch:$STUDENTS"
    elif [[ $entry =~ ^(general|smart): ]]; then
      [[ $entry == "smart:$SMART_STUDENT" || $entry =~ general && " $STUDENTS " == *" $student "* ||
        $SMART_GENERAL == yes && $entry == "general:$SMART_STUDENT" ]] ||
        complain "BASELINES: $entry; this run makes no such model of $student"
    elif [[ $entry == *:* && $entry != scratch:* ]]; then
      complain "BASELINES: $entry; expected scratch:, general: or smart: and a student"
    elif [[ ! -f $config/config.json ]]; then
      complain "student $student: no ${config:-STUDENT_CONFIG_$student=FOLDER}/config.json"
    fi
  done
}

# check_inputs: the dump is there, whole as far as its name and first bytes tell, with room for what
# is made of it; and a run that needs a GPU stops here, not after a day on the CPU.
check_inputs() {
  local free
  [[ $INPUTS == given ]] || return 0
  [[ $WORD_VECTORS =~ ^(glove|composed|)$ || -f $VECTORS ]] ||
    complain "WORD_VECTORS=$WORD_VECTORS: no file $VECTORS; expected glove, composed or its name"
  if [[ $STUDENT_START == general && ! -f $WORK_DIR/.state/prepare.json ]]; then
    [[ -f $DUMP ]] || complain "no Wikipedia dump $DATA_DIR/$WIKI_DUMP. $WIKI_DUMP_HELP"
    [[ $(head -c 3 "$DUMP") == BZh || $DUMP != *.bz2 ]] ||
      complain "$DUMP: not a bzip2 file; expected the dump as it was downloaded"
    [[ ! -e $DUMP.part && ! -e $DUMP.aria2 ]] || complain "$DUMP: its download has not finished"
  fi
  if [[ ! -f $WORK_DIR/.state/prepare.json ]]; then
    mkdir -p "$WORK_DIR"
    free=$(($(df -Pk "$WORK_DIR" | awk 'END {print $4}') / 1000000))
    ((free >= DISK_GB)) || complain "$WORK_DIR: $free GB free; this run needs about $DISK_GB" \
      "(DISK_GB=0: do not check)"
  fi
  [[ $NEEDS_GPU == no ]] ||
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    complain "PyTorch finds no GPU (nvidia-smi tells whether the driver does). On a CPU this" \
      "takes months; NEEDS_GPU=no starts it all the same"
}

# ---------------------------------------------------------------- the Python environment

# has_modules PYTHON MODULE...: whether that interpreter can import them all.
has_modules() {
  "$1" -c 'import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 11) or any(find_spec(name) is None for name in sys.argv[1:]))' \
    "${@:2}" &>/dev/null
}

# known_python MODULE...: puts an interpreter that has them into PYTHON.
known_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" "$PWD/.venv/bin/python"; do
    has_modules "$candidate" "$@" && PYTHON=$(command -v "$candidate") && return
  done
  return 1
}

# find_python MODULE...: the same, making .venv if need be.
find_python() {
  local base=${PYTHON:-python3}
  ! known_python "$@" || return 0
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    complain "$base: expected Python 3.11 or newer; set PYTHON to one"
  echo "  making .venv from requirements.txt (some minutes) ..." >&2
  [[ -x .venv/bin/python ]] || "$base" -m venv .venv || "$base" -m virtualenv .venv ||
    complain "cannot make a virtual environment; install python3-venv (apt install python3-venv)" \
      "or use conda: conda env create -f environment.yml"
  .venv/bin/python -m pip install --requirement requirements.txt &>.venv/install.log ||
    complain "pip could not install requirements.txt into .venv; see .venv/install.log:" \
      "$(grep -i error .venv/install.log | tail -n 3)"
  PYTHON=$PWD/.venv/bin/python
}

read_options "$@"
if [[ $mode == python ]]; then
  find_python $RUNTIME_MODULES $TEST_MODULES
  echo "$PYTHON"
  exit
fi
read_settings
