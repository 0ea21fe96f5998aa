#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with a driver and Python >= 3.10:
#
#     bash benchmarks/gpu.sh [folder for the results, by default benchmarks/results]
#
# Makes a virtual environment beside the repository unless one is active, installs the package, runs the CUDA tests of
# the operators and of SASFT, then the benchmarks. Results are JSON files with machine and versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=$(realpath -m "${1:-benchmarks/results}")

if [[ -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then
    python3 -m venv ../venv_gpu
    source ../venv_gpu/bin/activate
fi
python -m pip install --quiet --editable ".[dev]"
python - <<'PYTHON'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device: install a CUDA build of torch, or check the driver.")
print(torch.cuda.get_device_name(), "with torch", torch.__version__)
PYTHON

export TOKENIZERS_PARALLELISM=false
python -m pytest -q -n 0 tests/kernels
python -m pytest -q -n 0 -m cuda tests
python benchmarks/gpu_kernels.py --output "$results/gpu_kernels.json"
python benchmarks/gpu_models.py --output "$results/gpu_models.json"
python benchmarks/sasft_overhead.py --device cuda --hidden 2048 --layers 8 --length 1024 --batch 8 \
    --output "$results/sasft_overhead_gpu.json"
