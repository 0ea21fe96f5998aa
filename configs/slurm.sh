#!/bin/bash
# sbatch configs/slurm.sh [accelerate config] [recipe] [--any_field value ...]
#
#   sbatch configs/slurm.sh configs/multi_node_fsdp2.yaml recipes/qwen3-8b/sasft_zh.yaml --sasft_weight 0.02
#   QSCOPE_COMMAND=grpo sbatch configs/slurm.sh configs/multi_node_zero3.yaml recipes/qwen3-8b/steered_dapo.yaml \
#       --gradient_accumulation_steps 8
#
# The environment with this package must be active when sbatch is called. output_dir and the feature file must lie on
# a file system that all machines see; the feature file is a few kilobytes.
#
# A job that reaches its time limit saves a checkpoint, is queued again and goes on from it; so does one that Slurm
# preempts. It takes the newest whole checkpoint in output_dir: give a new run a new folder. A recipe without checkpoints
# (save_strategy: "no") would begin anew each time.
#SBATCH --job-name=qscope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one `accelerate launch` on each machine; it starts one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@600        # to this script, so many seconds before the limit: a step and a checkpoint fit in
#SBATCH --requeue
#SBATCH --open-mode=append         # the log of a job that was queued again goes on
#SBATCH --output=%x-%j.log
set -euo pipefail

command=${QSCOPE_COMMAND:-sft}
config=${1:-configs/multi_node_fsdp2.yaml}
recipe=${2:-recipes/qwen3-8b/sasft_zh.yaml}
if [ "$#" -ge 2 ]; then shift 2; else shift "$#"; fi

gpus=${SLURM_GPUS_ON_NODE:-8}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Mistakes in the recipe show in a minute on one machine, not after all of them have loaded the model.
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
    python -m qscope_posttrain "$command" --config "$recipe" --dry_run "$@"
fi

# Told to stop, the processes finish their step, save and leave with status 143. torch's launcher would give them 30
# seconds for it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-570}
stopped=
stop() {
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID"    # reaches what srun has started, not this script
}
trap stop TERM

# The rank is expanded by the shell that srun starts on each machine, hence the single quotes.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$1" \
        --num_machines "$2" --num_processes "$3" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$4" --main_process_port 29500 \
        -m qscope_posttrain "$5" --config "$6" --resume_from_checkpoint last "${@:7}"
' launch "$config" "$SLURM_NNODES" "$((SLURM_NNODES * gpus))" "$first_node" "$command" "$recipe" "$@" &
step=$!

# A signal ends `wait`, not what it waits for.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
fi
exit "$status"
