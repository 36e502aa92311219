#!/bin/sh
# vllm serve with UniPrefill on: $UNIPREFILL_CONFIG, unless the arguments have --uniprefill-config of their own.
# The flag comes last because vllm serve wants the model first.
set -eu
for argument; do
    case $argument in
        --uniprefill[-_]config*) exec vllm serve "$@" ;;
    esac
done
if [ -n "${UNIPREFILL_CONFIG:-}" ]; then
    set -- "$@" --uniprefill-config "$UNIPREFILL_CONFIG"
fi
exec vllm serve "$@"
