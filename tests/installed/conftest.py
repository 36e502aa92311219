"""Put the oracle and the needle prompts on the path, and vLLM before torch."""

import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import vllm  # noqa: E402, F401  before torch: on a CPU it chooses Triton's interpreter
