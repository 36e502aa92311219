#!/bin/sh
# Everything that wants a GPU, in calls of under 8 minutes. On a machine where scripts/install_gpu.py put the
# package (UNIPREFILL_SITE), with that machine's own Python; elsewhere with build/venv.
cd "$(dirname "$0")/.." || exit
site=${UNIPREFILL_SITE:-/tmp/uniprefill/site}
if [ -d "$site/vllm" ]; then
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    export VLLM_USE_FLASHINFER_SAMPLER=0 # the package leaves FlashInfer out
    exec "${PYTHON:-python3}" -m evals.gpu "$@"
fi
make build && exec build/venv/bin/python -m evals.gpu "$@"
