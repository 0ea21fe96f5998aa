#!/bin/bash
# sbatch configs/slurm.sh [accelerate config] [recipe] [--any_field value ...]
#
#   sbatch configs/slurm.sh configs/multi_node_fsdp2.yaml recipes/qwen3-8b/sasft_zh.yaml --sasft_weight 0.02
#   QSCOPE_COMMAND=grpo sbatch configs/slurm.sh configs/multi_node_zero3.yaml recipes/qwen3-8b/steered_dapo.yaml \
#       --gradient_accumulation_steps 8
#
# The environment with this package must be active when sbatch is called. output_dir and the feature file must lie on
# a file system that all machines see; the feature file is a few kilobytes.
#SBATCH --job-name=qscope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one `accelerate launch` on each machine; it starts one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

command=${QSCOPE_COMMAND:-sft}
config=${1:-configs/multi_node_fsdp2.yaml}
recipe=${2:-recipes/qwen3-8b/sasft_zh.yaml}
if [ "$#" -ge 2 ]; then shift 2; else shift "$#"; fi

gpus=${SLURM_GPUS_ON_NODE:-8}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Mistakes in the recipe show in a minute on one machine, not after all of them have loaded the model.
python -m qscope_posttrain "$command" --config "$recipe" --dry_run "$@"

# The rank is expanded by the shell that srun starts on each machine, hence the single quotes.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$1" \
        --num_machines "$2" --num_processes "$3" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$4" --main_process_port 29500 \
        -m qscope_posttrain "$5" --config "$6" "${@:7}"
' launch "$config" "$SLURM_NNODES" "$((SLURM_NNODES * gpus))" "$first_node" "$command" "$recipe" "$@"
