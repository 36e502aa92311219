#!/bin/sh
# On a machine with an 80 GB NVIDIA GPU, after `make build`: Llama-3.1-8B's shape with dummy
# weights at 32K, 64K and 128K, in about six minutes on an H100. More options may follow.
cd "$(dirname "$0")/../.." || exit
exec build/venv/bin/python -m evals.bench \
    --shape llama-3.1-8b --parts ttft,efficiency,breakdown --repeats 3 "$@"
