# `make demo` and `make test` need nothing but python3 (3.11 or later) with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARITY := .venv-parity
ONNX := .venv-onnx
BEAM := .venv-beam
TPU := .venv-tpu
TORCH := torch==2.13.0
# Tests share the cores; more workers than cores only swap.
WORKERS ?= 2

.PHONY: demo test twins parity onnx beam tpu lint format lock clean

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py --out demo

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# Two steps of every pod config's small twin.
twins: $(VENV)/.test-installed
	$(BIN)/python -m pytest -q tests/twins

# Against diffusers itself, which needs torch: in an environment of its own.
parity: $(PARITY)/.installed
	$(PARITY)/bin/python -m pytest -q tests/parity

# An environment for `sora-jax convert export --to onnx`, and a test of it.
onnx: $(ONNX)/.installed
	$(ONNX)/bin/python -m pytest -q tests/onnx

# An environment for `sora-jax data build --runner NAME`, and a test of it.
beam: $(BEAM)/.installed
	$(BEAM)/bin/python -m pytest -q tests/beam

# An environment with libtpu, which compiles for TPUs that are not there: `sora-jax plan`'s tests.
tpu: $(TPU)/.installed
	$(TPU)/bin/python -m pytest -q tests/tpu

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh .ci/run
	$(BIN)/hadolint launch/Containerfile

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The lock names packages, versions and hashes for every platform and Python, but no index.
lock: $(VENV)/.uv
	$(BIN)/uv pip compile -q --no-header --universal --generate-hashes --extra test \
		--extra tensorboard --extra wandb --extra data --extra tpu --extra gpu pyproject.toml -o requirements.lock

$(VENV)/.uv:
	$(PYTHON) -c 'import sys; sys.exit("sora_jax needs Python 3.11 or later; set PYTHON=python3.12, say." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	touch $@

$(VENV)/.installed: $(VENV)/.uv pyproject.toml requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.lock -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.lock -e '.[test,tensorboard,data]'
	touch $@

# pip finds a CPU build of torch where a machine offers one; the rest is not worth its slowness.
$(PARITY)/.installed: $(VENV)/.uv pyproject.toml requirements.lock
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install -q --disable-pip-version-check '$(TORCH)'
	$(BIN)/uv pip install -q --python $(PARITY)/bin/python -c requirements.lock -e '.[test,parity]'
	touch $@

# jax2onnx pins an orbax-checkpoint older than the one that we ask for; it reads our checkpoints too.
$(ONNX)/.installed: $(VENV)/.uv pyproject.toml requirements.lock
	$(PYTHON) -m venv $(ONNX)
	echo 'orbax-checkpoint<0.11.37' > $(ONNX)/override.txt
	$(BIN)/uv pip install -q --python $(ONNX)/bin/python --override $(ONNX)/override.txt \
		jax2onnx==0.17.1 onnxruntime -e '.[test]'
	touch $@

# Apache Beam pins a pyarrow and a protobuf older than those of the lock.
$(BEAM)/.installed: $(VENV)/.uv pyproject.toml
	$(PYTHON) -m venv $(BEAM)
	$(BIN)/uv pip install -q --python $(BEAM)/bin/python 'apache-beam>=2.77' -e '.[test,data]'
	touch $@

# Not in $(VENV): where libtpu is installed, jax looks for a TPU at every start.
$(TPU)/.installed: $(VENV)/.uv pyproject.toml requirements.lock
	$(PYTHON) -m venv $(TPU)
	$(BIN)/uv pip install -q --python $(TPU)/bin/python -c requirements.lock -e '.[test,tpu]'
	touch $@

clean:
	rm -rf $(VENV) $(PARITY) $(ONNX) $(BEAM) $(TPU) demo
