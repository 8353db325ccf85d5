#!/usr/bin/env bash
# RLSD on several nodes under Slurm: SGLang servers on some of them, the trainer on the others. On
# one node both are on the same GPUs and take turns.
#
#     sbatch examples/run_rlsd_70b.sh [key=value ...]            # as a job that requeues itself
#     bash examples/run_rlsd_70b.sh [key=value ...]              # inside an allocation (salloc)
#     TINY=1 sbatch [--nodes=1] examples/run_rlsd_70b.sh         # the same without any GPU
#
# docs/slurm.md explains it. Every setting below is an environment variable; key=value goes to the
# configuration. A preemption signal makes the trainer save; the job then requeues itself, and goes
# on. Whatever part dies, the job ends, with the last lines of that part's log.
#
# Whole nodes, and with them their GPUs (none is fine for TINY=1). The 70B default wants six: given
# fewer, which the range allows so that TINY=1 takes two, the job submits itself again for six.
#SBATCH --job-name=rlsd
#SBATCH --nodes=2-6
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=rlsd_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }

fail() { # fail MESSAGE [LOG...]: the message, and the end of each log
    say "error: $1" >&2
    local log
    for log in "${@:2}"; do
        [[ -s $log ]] || continue
        printf -- '---- the end of %s\n' "$log" >&2
        # A terminal that shows this acts on nothing that a log holds.
        tail -n "$TAIL_LINES" "$log" | LC_ALL=C tr '\000-\010\013-\037\177' '?' | sed 's/^/    /' >&2
    done
    exit 1
}

settings() {
    TINY=${TINY:-0}
    TAIL_LINES=${TAIL_LINES:-20}
    [[ -n ${SLURM_JOB_ID:-} ]] || fail "no Slurm allocation: use sbatch, or salloc and then bash"
    # An array's last element has the array's own number: Slurm would take all of them for it.
    JOB=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    check_numbers
    find_repository
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    count_cores
    [[ $TINY != 1 ]] || nodes=("${nodes[@]:0:2}")
    # Slurm's defaults for srun; every step says itself what it takes.
    unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET

    CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
    CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python
        [[ -n $CONTAINER_IMAGE || ! -x $REPO/.venv/bin/python ]] || PYTHON=$REPO/.venv/bin/python
    fi
    # The image's own. Beside the repository, which is mounted over it, there is none.
    SGLANG_PYTHON=${SGLANG_PYTHON:-${CONTAINER_IMAGE:+/opt/sglang/bin/python}}
    if [[ $TINY == 1 ]]; then
        CONFIG=${CONFIG:-$REPO/examples/configs/tiny_slurm.yaml}
        RUN_DIR=${RUN_DIR:-$REPO/runs/tiny_slurm}
        MODEL=${MODEL:-$RUN_DIR/model}
        GPUS_PER_NODE=${GPUS_PER_NODE:-0}
        TRAINER_TASKS_PER_NODE=${TRAINER_TASKS_PER_NODE:-2}
        NODES=${NODES:-0}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    else
        # How many nodes another configuration wants, its author knows.
        NODES=${NODES:-$([[ -n ${CONFIG:-} ]] && echo 0 || echo 6)}
        CONFIG=${CONFIG:-$REPO/examples/configs/llama_70b.yaml}
        RUN_DIR=${RUN_DIR:-$REPO/runs/llama_70b}
        MODEL=${MODEL:-$REPO/models/Llama-3.3-70B-Instruct}
        GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
    fi
    # By default a third of the nodes (or a little more) sample.
    ROLLOUT_NODES=${ROLLOUT_NODES:-$((${#nodes[@]} > 1 ? (${#nodes[@]} + 2) / 3 : 0))}
    TRAINER_NODES=${TRAINER_NODES:-$((${#nodes[@]} - ROLLOUT_NODES))}
    COLOCATED=${COLOCATED:-$((ROLLOUT_NODES == 0 && TRAINER_NODES == 1))}
    [[ $COLOCATED == [01] ]] || fail "COLOCATED=$COLOCATED: expected 0 or 1"
    if [[ -z ${TRAINER_TASKS_PER_NODE:-} ]]; then
        TRAINER_TASKS_PER_NODE=$((ROLLOUT_NODES || COLOCATED ? GPUS_PER_NODE : GPUS_PER_NODE / 2))
    fi
    # Compiled kernels: a home on NFS would have all nodes wait for each other.
    CACHE_DIR=${CACHE_DIR:-${TMPDIR:-/tmp}/rlsd_cache_$UID}
    CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # Or each of a node's tasks would take all of its cores.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cores_of "$TRAINER_TASKS_PER_NODE" \
        "${nodes[@]:0:TRAINER_NODES}")}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    MASTER_PORT=${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 8000))}
    START_SECONDS=${START_SECONDS:-1800}
    STOP_SECONDS=${STOP_SECONDS:-30}
    LATE_SECONDS=${LATE_SECONDS:-900}
    WAIT_SECONDS=${WAIT_SECONDS:-600}
    STATUS_SECONDS=${STATUS_SECONDS:-60}
    RUN_DIR=$(realpath -m "$RUN_DIR") MODEL=$(realpath -m "$MODEL") CONFIG=$(realpath -m "$CONFIG")
    LOG_DIR=${LOG_DIR:-$RUN_DIR/logs/job_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}}

    # srun reads it as "take % for what it is".
    [[ $LOG_DIR != *\\* ]] || fail "LOG_DIR=$LOG_DIR: srun writes to no path with a backslash"

    say "job $JOB, start ${SLURM_RESTART_COUNT:-0}, on ${nodes[*]}"
    printf '  %s\n' "TINY=$TINY" "REPO=$REPO" "CONFIG=$CONFIG" "MODEL=$MODEL" "RUN_DIR=$RUN_DIR" \
        "PYTHON=$PYTHON" \
        "SGLANG_PYTHON=$SGLANG_PYTHON  (of the servers; empty: the configuration's)" \
        "NODES=$NODES  (to ask for should the layout need more than these; 0: none)" \
        "TRAINER_NODES=$TRAINER_NODES" \
        "ROLLOUT_NODES=$ROLLOUT_NODES  (0: servers share the trainer's nodes)" \
        "COLOCATED=$COLOCATED  (1: and its GPUs; 0: they have those behind the trainer's)" \
        "GPUS_PER_NODE=$GPUS_PER_NODE" \
        "TRAINER_TASKS_PER_NODE=$TRAINER_TASKS_PER_NODE  (one for each of the trainer's GPUs)" \
        "CACHE_DIR=$CACHE_DIR  (on each node, of compiled kernels)" \
        "CUDA_DEVICE_MAX_CONNECTIONS=$CUDA_DEVICE_MAX_CONNECTIONS  (of the trainer)" \
        "OMP_NUM_THREADS=$OMP_NUM_THREADS  (of the trainer)" \
        "NCCL_DEBUG=$NCCL_DEBUG" \
        "MASTER_PORT=$MASTER_PORT" \
        "START_SECONDS=$START_SECONDS  (until all servers serve; not if colocated)" \
        "STOP_SECONDS=$STOP_SECONDS  (a part has to end once it is told)" \
        "LATE_SECONDS=$LATE_SECONDS  (before the job's time limit it does not start anew)" \
        "WAIT_SECONDS=$WAIT_SECONDS  (after the first trainer task ended, for the others)" \
        "STATUS_SECONDS=$STATUS_SECONDS  (until the status of a trainer that ended is seen here)" \
        "CONTAINER_IMAGE=$CONTAINER_IMAGE  (empty: no container)" \
        "CONTAINER_MOUNTS=$CONTAINER_MOUNTS" \
        "LOG_DIR=$LOG_DIR" "TAIL_LINES=$TAIL_LINES" "arguments: ${arguments[*]}"
}

check_numbers() { # of what is given: bash reads anything else in a sum as the name of a variable
    local name
    for name in TINY TAIL_LINES NODES GPUS_PER_NODE TRAINER_NODES ROLLOUT_NODES COLOCATED \
        TRAINER_TASKS_PER_NODE OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS MASTER_PORT \
        START_SECONDS STOP_SECONDS LATE_SECONDS WAIT_SECONDS STATUS_SECONDS; do
        [[ -z ${!name:-} || ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
            fail "$name=${!name}: expected a whole number"
    done
}

find_repository() {
    local place submitted places=("$(dirname "${BASH_SOURCE[0]}")/..")
    # sbatch runs a copy of this file, far from the repository, and Slurm knows of which file.
    submitted=$(scontrol show job --oneliner "$JOB" |
        sed -n 's/.* Command=\([^ ]*\) .*/\1/p') || true
    [[ -z $submitted ]] || places+=("$(dirname "$submitted")/..")
    places+=("${SLURM_SUBMIT_DIR:-.}")
    [[ -z ${REPO:-} ]] || places=("$REPO")
    for place in "${places[@]}"; do
        REPO=$(realpath -m "$place")
        [[ ! -f $REPO/megatron_rlsd/train.py ]] || return 0
    done
    fail "REPO=$REPO is not this repository; submit from there, or set REPO"
}

count_cores() { # in $cores, of each node: Slurm's "64(x2),48" counts those of $nodes in their order
    local part i=0 end
    declare -gA cores=()
    for part in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
        [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]] ||
            fail "SLURM_JOB_CPUS_PER_NODE=$SLURM_JOB_CPUS_PER_NODE: expected counts like 64(x2),48"
        for ((end = i + ${BASH_REMATCH[3]:-1}; i < end; i++)); do
            cores[${nodes[i]}]=${BASH_REMATCH[1]}
        done
    done
}

cores_of() { # cores_of TASKS NODE...: of each task, where so many are on each of the nodes
    local node least=''
    for node in "${@:2}"; do
        ((${least:-cores[$node]} < cores[$node])) || least=${cores[$node]}
    done
    least=$((${least:-1} / ($1 > 0 ? $1 : 1)))
    printf '%s' $((least > 0 ? least : 1))
}

check_sizes() {
    local wanted=$((TRAINER_NODES + ROLLOUT_NODES)) free=$((GPUS_PER_NODE - TRAINER_TASKS_PER_NODE))
    local trainer="TRAINER_TASKS_PER_NODE=$TRAINER_TASKS_PER_NODE"
    [[ -f $CONFIG ]] || fail "CONFIG=$CONFIG does not exist"
    ((TRAINER_NODES >= 1 && TRAINER_TASKS_PER_NODE >= 1)) ||
        fail "TRAINER_NODES=$TRAINER_NODES and $trainer: there must be a trainer"
    ((wanted <= ${#nodes[@]})) || fail "TRAINER_NODES=$TRAINER_NODES + \
ROLLOUT_NODES=$ROLLOUT_NODES = $wanted nodes, but the job has ${#nodes[@]}"
    ((!COLOCATED || wanted == 1)) || fail "COLOCATED=1 needs TRAINER_NODES=1 and ROLLOUT_NODES=0, \
not $TRAINER_NODES and $ROLLOUT_NODES: the trainer starts the servers that share its GPUs, and on \
its first node alone"
    ((GPUS_PER_NODE > 0)) || return 0
    ((free >= 0)) || fail "$trainer is more than GPUS_PER_NODE=$GPUS_PER_NODE"
    ((ROLLOUT_NODES > 0 || COLOCATED || free > 0)) || fail "COLOCATED=0, ROLLOUT_NODES=0 and \
$trainer leave the servers none of the $GPUS_PER_NODE GPUs of a node"
}

check_folders() { # srun starts no task, and says nothing, on a node that it cannot log from
    local all=("${trainer_nodes[@]}") list blind node
    for node in "${rollout_nodes[@]}"; do
        [[ " ${all[*]} " == *" $node "* ]] || all+=("$node")
    done
    list=$(IFS=,; printf '%s' "${all[*]}")
    # shellcheck disable=SC2016
    blind=$(srun --job-name=look --nodelist="$list" --nodes="${#all[@]}" --ntasks="${#all[@]}" \
        --ntasks-per-node=1 --cpus-per-task=1 --overlap --chdir=/ bash -c 'for folder in "$@"; do
            [[ -d $folder ]] || echo "$SLURMD_NODENAME does not see $folder"
        done' look "$LOG_DIR" "$REPO") || fail "srun starts nothing on $list"
    [[ -z $blind ]] || fail "${blind//$'\n'/, }: RUN_DIR, LOG_DIR and REPO must be on a file \
system that all nodes share"
}

# The parts of the job: each is one srun in the background, known by its step's name.

start_part() { # start_part NAME NODELIST TASKS_PER_NODE COMMAND...; logs are NAME_TASK.log
    local name=$1 list=$2 tasks=$3 names container=() gpus=()
    shift 3
    IFS=, read -ra names <<<"$list"
    if [[ -n $CONTAINER_IMAGE ]]; then
        local mounts=$REPO:$REPO,$RUN_DIR:$RUN_DIR,$MODEL:$MODEL
        container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$REPO"
            --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
            --no-container-mount-home)
    fi
    # Of GPUs that came with the whole node a step gets none unless it says so.
    [[ ! ${SLURM_GPUS_ON_NODE:-} =~ ^[1-9] ]] || gpus=(--gres="gpu:$SLURM_GPUS_ON_NODE")
    # Slurm tells all parts at once when a job has to end, and servers must outlive the trainer's
    # last step: each part hears of it from this script alone, in its turn.
    # Steps overlap: where parts share a node, each sees all of it and takes GPUs by number.
    # Unbound: the first task's rewards, and colocated servers, may use all of the node's cores.
    # shellcheck disable=SC2016
    srun --job-name="$name" --nodelist="$list" --nodes="${#names[@]}" \
        --ntasks=$((${#names[@]} * tasks)) --ntasks-per-node="$tasks" \
        --cpus-per-task="$(cores_of "$tasks" "${names[@]}")" --cpu-bind=none --distribution=block --overlap \
        --export=ALL --disable-status --kill-on-bad-exit=0 --wait="$WAIT_SECONDS" --chdir="$REPO" \
        --output="${LOG_DIR//%/%%}/${name}_%t.log" "${gpus[@]}" "${container[@]}" \
        bash -c 'trap "" TERM USR1
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            cache=$1 && shift
            mkdir -p "$cache/home"
            # Of a container that mounts no home it may not be there.
            [[ -w ${HOME:-/nowhere} ]] || export HOME=$cache/home
            export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
            export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
            export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$cache/cuda}
            export TVM_FFI_CACHE_DIR=${TVM_FFI_CACHE_DIR:-$cache/tvm-ffi}
            # flashinfer adds .cache/flashinfer; under SGLang lies DeepGEMM.
            export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$cache}
            export SGLANG_CACHE_DIR=${SGLANG_CACHE_DIR:-$cache/sglang}
            exec "$@"' "$name" "$CACHE_DIR" "$@" &
    parts[$name]=$!
}

running() { kill -0 "${parts[$1]}" 2>/dev/null; }

exit_code_of() { # exit_code_of NAME: in $code, of a part that ended
    code=0
    wait "${parts[$1]}" || code=$?
}

pause() { sleep 1 || true; } # a signal to the whole job ends the sleep, too

finish_part() { # finish_part NAME: wait for its end; exit code in $code
    while running "$1"; do
        [[ -z $stop ]] || stop_early
        pause
    done
    exit_code_of "$1"
    unset "parts[$1]"
}

end_parts() { # end_parts SIGNAL NAME...: within STOP_SECONDS in order, then by force
    local name id deadline=$((SECONDS + STOP_SECONDS))
    for name in "${@:2}"; do
        # srun hands it to its tasks.
        kill -"$1" "${parts[$name]}" 2>/dev/null || true
    done
    for name in "${@:2}"; do
        while running "$name" && ((SECONDS < deadline)); do pause; done
        running "$name" || continue
        say "$name did not end within STOP_SECONDS=$STOP_SECONDS; killed"
        id=$(squeue --noheader --steps --jobs="$JOB" --format='%i %j' |
            awk -v name="$name" '$2 == name { print $1 }')
        # Without its step, srun has nothing left to do but to end.
        [[ -n $id ]] && scancel --signal=KILL "$id" 2>/dev/null || true
        [[ -n $id ]] || kill -KILL "${parts[$name]}" 2>/dev/null || true
    done
}

end_everything() {
    trap '' TERM INT USR1
    [[ -z ${parts[trainer]:-} ]] || end_parts USR1 trainer
    end_parts INT "${!parts[@]}"
}

seconds_left() { # of the job, as Slurm limits it; much if it has no limit
    local end
    end=$(date -d "$(squeue --noheader --jobs="$JOB" --format=%e)" +%s 2>/dev/null) ||
        end=$((EPOCHSECONDS + 1000000))
    printf '%s' "$((end - EPOCHSECONDS))"
}

stop_early() { # a signal came before the trainer started: nothing has to be saved
    end_everything
    [[ $stop != SIGINT ]] || fail "SIGINT before the trainer started"
    # Starting again would only come this far again.
    (($(seconds_left) > LATE_SECONDS)) ||
        fail "$stop before the trainer started, at the end of the job's time limit: raise --time"
    requeue "$stop before the trainer started"
}

make_tiny_model() {
    [[ ! -f $MODEL/config.json ]] || return 0
    say "making a tiny random model: $MODEL"
    start_part model "${trainer_nodes[0]}" 1 "$PYTHON" tools/make_tiny_model.py "$CONFIG" \
        "$MODEL" --vocab-size 320 --hidden-size 32 --layers 4 --ffn-size 64 --head-dim 16 \
        --problems 200
    finish_part model
    ((code == 0)) || fail "the model could not be made" "$LOG_DIR/model_0.log"
}

check_layout() { # before anything large starts
    local tasks=$((TRAINER_NODES * TRAINER_TASKS_PER_NODE)) wanted=()
    # The default split of the nodes wanted, all of whose GPUs are used. Who sits before an
    # allocation of theirs is told, and asks for more by themselves.
    ((NODES <= ${#nodes[@]})) || ! job_says BatchFlag=1 ||
        wanted=(--wanted-tasks $(((NODES - (NODES + 2) / 3) * TRAINER_TASKS_PER_NODE)))
    start_part preflight "${trainer_nodes[0]}" 1 "$PYTHON" -m megatron_rlsd.diagnosis.preflight \
        "${arguments[@]}" "${server_arguments[@]}" --tasks "$tasks" "${wanted[@]}" \
        --gpus-per-node "$GPUS_PER_NODE"
    finish_part preflight
    ((code != 3)) || submit_again
    ((code == 0)) ||
        fail "this cannot run with $tasks trainer tasks" "$LOG_DIR/preflight_0.log"
}

submit_again() { # as this job was submitted, but for NODES nodes and no fewer
    local job field again=() options=(Account=account Partition=partition QOS=qos Features=constraint
        TimeLimit=time Reservation=reservation WorkDir=chdir StdOut=output JobName=job-name)
    job=$(scontrol show job --oneliner "$JOB")
    for field in "${options[@]}"; do
        # shellcheck disable=SC2076
        [[ " $job " =~ " ${field%%=*}="([^ ]+)" " ]] || continue
        [[ ${BASH_REMATCH[1]} == "(null)" || ${BASH_REMATCH[1]} == UNLIMITED ]] ||
            again+=("--${field##*=}=${BASH_REMATCH[1]}")
    done
    say "the layout needs more than ${#nodes[@]} nodes; submitting this job again, for $NODES"
    tail -n "$TAIL_LINES" "$LOG_DIR/preflight_0.log" | sed 's/^/    /'
    sbatch "${again[@]}" --nodes="$NODES" "$REPO/examples/run_rlsd_70b.sh" \
        "${given_arguments[@]}" || fail "the layout needs NODES=$NODES nodes, and Slurm refuses \
to give them: see above"
    exit 0
}

address_of() { # address_of NODE: where Slurm itself reaches it
    scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

start_servers() {
    local node
    rm -f "$RUN_DIR"/servers/*/urls
    for node in "${rollout_nodes[@]}"; do
        start_part "servers-$node" "$node" 1 "$PYTHON" -m megatron_rlsd.serve "${arguments[@]}" \
            "rollout.sglang.host=$(address_of "$node")" "${server_arguments[@]}"
    done
    say "waiting for the servers on ${rollout_nodes[*]}"
}

wait_for_servers() {
    local node urls=() deadline=$((SECONDS + START_SECONDS))
    for node in "${rollout_nodes[@]}"; do
        until [[ -s $RUN_DIR/servers/$node/urls || -n $stop ]]; do
            check_servers "while they started"
            ((SECONDS < deadline)) ||
                fail "the servers on $node do not serve after START_SECONDS=$START_SECONDS" \
                    "$LOG_DIR/servers-${node}_0.log" "$RUN_DIR/servers/$node"/sglang/*.log
            ls "$RUN_DIR/servers/$node" >/dev/null 2>&1 || true # makes NFS look again
            pause
        done
        [[ -z $stop ]] || stop_early
        mapfile -t -O "${#urls[@]}" urls <"$RUN_DIR/servers/$node/urls"
    done
    say "serving: ${urls[*]}"
    trainer_arguments=("rollout.sglang.urls=[$(IFS=,; printf '%s' "${urls[*]}")]")
}

check_servers() { # check_servers WHEN: all of them still run
    local node
    for node in "${rollout_nodes[@]}"; do
        ! running "servers-$node" || continue
        exit_code_of "servers-$node"
        fail "the servers on $node ended $1, with exit code $code" \
            "$RUN_DIR/servers/$node"/sglang/*.log "$LOG_DIR/servers-${node}_0.log"
    done
}

start_trainer() {
    MASTER_ADDR=$(address_of "${trainer_nodes[0]}")
    export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE=$TRAINER_TASKS_PER_NODE
    rm -f "$RUN_DIR/status.json"
    start_part trainer "$(IFS=,; printf '%s' "${trainer_nodes[*]}")" "$TRAINER_TASKS_PER_NODE" \
        env OMP_NUM_THREADS="$OMP_NUM_THREADS" \
        CUDA_DEVICE_MAX_CONNECTIONS="$CUDA_DEVICE_MAX_CONNECTIONS" \
        "$PYTHON" -m megatron_rlsd.train "${arguments[@]}" "${trainer_arguments[@]}"
    say "training; logs are in $LOG_DIR"
}

wait_for_trainer() {
    local told=''
    while running trainer; do
        if [[ -z $stop ]]; then
            # Once the job is to stop, Slurm may end the servers while the trainer still saves.
            check_servers "while the trainer needed them"
        else
            [[ -n $told ]] || say "$stop: the trainer saves at the end of its step"
            told=yes
            # Again and again: while it starts it does not listen yet.
            kill -USR1 "${parts[trainer]}" 2>/dev/null || true
        fi
        pause
    done
    exit_code_of trainer
}

telling_logs() { # the trainer's logs that say why it ended, at most three
    local logs
    logs=$(grep -lsE '^(error: |Traceback|rank [0-9]+ )' "$LOG_DIR"/trainer_*.log | head -n 3) ||
        true
    printf '%s\n' "${logs:-$LOG_DIR/trainer_0.log}"
}

job_says() { # job_says FIELD=VALUE: is it so?
    [[ " $(scontrol show job --oneliner "$JOB") " == *" $1 "* ]]
}

trainer_says() { # trainer_says STATUS: is it so? Its word is its own, whatever srun's exit code
    local deadline=$((SECONDS + STATUS_SECONDS))
    # It was written on another node: without a look at the folder NFS may not show it for long.
    until ls "$RUN_DIR" >/dev/null 2>&1 && [[ -s $RUN_DIR/status.json ]]; do
        ((code == 0 && SECONDS < deadline)) || return 1
        pause
    done
    grep -q "^{\"status\": \"$1\"" "$RUN_DIR/status.json"
}

requeue() { # requeue WHAT: the job starts again, unless Slurm ends it for good
    if job_says BatchFlag=1 && job_says JobState=RUNNING && scontrol requeue "$JOB"; then
        say "$1 and requeued: the next start goes on"
    else
        say "$1: the next start with RUN_DIR=$RUN_DIR goes on"
    fi
    exit 75
}

main() {
    given_arguments=("$@") arguments=("$@") server_arguments=() trainer_arguments=()
    settings
    check_sizes
    trainer_nodes=("${nodes[@]:0:TRAINER_NODES}")
    rollout_nodes=("${nodes[@]:TRAINER_NODES:ROLLOUT_NODES}")
    if ((ROLLOUT_NODES == 0 && !COLOCATED)); then
        rollout_nodes=("${trainer_nodes[@]}")
        server_arguments=("rollout.sglang.first_gpu=$TRAINER_TASKS_PER_NODE")
    fi
    mkdir -p "$LOG_DIR"
    check_folders
    declare -gA parts=()
    stop=''
    trap 'stop=SIGTERM' TERM
    trap 'stop=SIGUSR1' USR1
    trap 'stop=SIGINT' INT
    trap end_everything EXIT
    [[ $TINY != 1 ]] || make_tiny_model
    arguments=("$CONFIG" "run_dir=$RUN_DIR" "model.hf_path=$MODEL" "${arguments[@]}")
    [[ -z $SGLANG_PYTHON ]] || arguments+=("rollout.sglang.python=$SGLANG_PYTHON")
    arguments+=("rollout.colocated=$COLOCATED")

    check_layout
    # Only who has started a server knows what memory it has given back: colocated, the trainer.
    if ((!COLOCATED)); then
        start_servers
        wait_for_servers
    fi
    start_trainer
    wait_for_trainer
    end_everything
    if ((code == 0)) && trainer_says finished; then
        say "finished"
    elif ((code == 75)) || trainer_says preempted; then
        requeue saved
    else
        ((code)) || fail "the trainer's tasks ended with exit code 0, but $RUN_DIR/status.json does \
not say that it finished" "$LOG_DIR/trainer_0.log"
        mapfile -t logs < <(telling_logs)
        fail "the trainer ended with exit code $code" "${logs[@]}"
    fi
}

main "$@"
