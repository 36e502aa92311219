"""The two ways to ask: vLLM in this process, or a server's completions API, both through the harness's own classes.

Every request carries `vllm_xargs` (`extra_args` in process) that say dense or pruned and ask for the report.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from scripts.fork import ForkError

REQUEST_SECONDS = 3600
REPORT = {"uniprefill_report": 1}

Request = tuple[str, dict[str, Any]]
"""(prompt, the harness's generation arguments)."""


@dataclass(frozen=True)
class Completion:
    text: str
    report: dict[str, Any]


class Backend(ABC):
    """Something that completes prompts, and says what was kept of them."""

    lm: TemplateLM
    max_length: int  # tokens, prompt and completion

    def __init__(self) -> None:
        self._salts = itertools.count()

    def complete(self, requests: Sequence[Request], xargs: Mapping[str, Any]) -> list[Completion]:
        """Completions in the requests' order; they may run side by side."""
        arguments = {self.arguments_name: {**xargs, **REPORT}}
        instances = [
            Instance("generate_until", {}, (prompt, generation | arguments), i)
            for i, (prompt, generation) in enumerate(requests)
        ]
        return self._complete(instances)

    def salt(self) -> str:
        """A new one for every timed request, so that none finds its prompt in the prefix cache."""
        return f"{time.time_ns()}-{next(self._salts)}"

    @property
    @abstractmethod
    def arguments_name(self) -> str:
        """Where the harness's generation arguments carry UniPrefill's."""

    @abstractmethod
    def encode(self, prompt: str) -> list[int]:
        """The token ids that the model gets for a prompt."""

    @abstractmethod
    def _complete(self, instances: list[Instance]) -> list[Completion]: ...

    @abstractmethod
    def first_token(self, ids: Sequence[int], xargs: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """(seconds from sending the prompt, alone, to its first token; the report)."""


def make_engine_backend(model: str, arguments: Mapping[str, Any], chat: bool, batch_size: int) -> Backend:
    """vLLM in this process (the harness's `vllm`); `arguments` go to `LLM(...)`."""
    import vllm
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.distributed import cleanup_dist_env_and_memory

    class EngineLM(VLLM):
        """The harness's class, which keeps the reports that it would drop."""

        reports: dict[tuple[int, ...], dict[str, Any]]

        def _model_generate(self, requests: list[list[int]], *args: Any, **kwargs: Any) -> list[Any]:
            outputs = super()._model_generate(requests, *args, **kwargs)
            self.reports |= {tuple(ids): output.uniprefill for ids, output in zip(requests, outputs, strict=True)}
            return outputs

    class EngineBackend(Backend):
        arguments_name = "extra_args"

        def __init__(self) -> None:
            super().__init__()
            # A chat template writes the first token itself; plain prompts get it from the tokenizer.
            self.lm = EngineLM(model, batch_size=batch_size, add_bos_token=False if chat else None, **arguments)
            self.max_length = self.lm.max_length

        def close(self) -> None:
            """End the engine, so that another fits in this process."""
            self.lm.model.llm_engine.engine_core.shutdown()
            del self.lm
            gc.collect()
            cleanup_dist_env_and_memory()

        def encode(self, prompt: str) -> list[int]:
            return self.lm.tok_encode(prompt)

        def _complete(self, instances: list[Instance]) -> list[Completion]:
            self.lm.reports = {}
            texts = self.lm.generate_until(instances, disable_tqdm=True)
            reports = [self.lm.reports[tuple(self.encode(instance.args[0]))] for instance in instances]
            return [Completion(text, report) for text, report in zip(texts, reports, strict=True)]

        def first_token(self, ids: Sequence[int], xargs: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
            params = vllm.SamplingParams(max_tokens=1, temperature=0, extra_args={**xargs, **REPORT})
            prompt = vllm.TokensPrompt(prompt_token_ids=list(ids), cache_salt=self.salt())
            started = time.perf_counter()
            [output] = self.lm.model.generate([prompt], params, use_tqdm=False)
            return time.perf_counter() - started, output.uniprefill

    return EngineBackend()


class ReportedText(str):
    """A completion's text that carries its report through the harness."""

    report: dict[str, Any]


class ApiLM(LocalCompletionsAPI):
    """The harness's `local-completions`, which keeps the reports that it would drop."""

    @staticmethod
    def parse_generations(outputs: Any, **kwargs: Any) -> list[str]:
        texts = []
        for output in outputs if isinstance(outputs, list) else [outputs]:
            for choice in sorted(output["choices"], key=lambda choice: choice["index"]):
                if "uniprefill" not in choice:
                    raise ForkError("The server sends no UniPrefill report; start it from this repository's package.")
                texts.append(ReportedText(choice["text"]))
                texts[-1].report = choice["uniprefill"]
        return texts


class ApiBackend(Backend):
    """A server at `base_url`, as http://127.0.0.1:8000."""

    arguments_name = "vllm_xargs"

    def __init__(self, base_url: str, tokenizer: str, chat: bool, concurrency: int) -> None:
        super().__init__()
        self.base_url = base_url.rstrip("/")
        served = self._get("/v1/models")["data"][0]
        self.name = served["id"]
        self.max_length = served["max_model_len"]
        self.lm = ApiLM(
            base_url=f"{self.base_url}/v1/completions",
            model=self.name,
            tokenizer=tokenizer,
            tokenizer_backend="huggingface",
            add_bos_token=not chat,  # a chat template writes it itself
            num_concurrent=concurrency,
            max_retries=1,  # a refused request stays refused
            max_length=self.max_length + 1,  # the class takes one off
            timeout=REQUEST_SECONDS,
        )
        self.first_token(self.encode("a"), {"uniprefill": 0})  # a server that takes no such request says why

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=30) as response:
                return json.load(response)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ForkError(f"{self.base_url}{path} does not answer ({error}); is the server up?") from None

    def package(self) -> str:
        """The version of vLLM that serves."""
        return self._get("/version")["version"]

    def encode(self, prompt: str) -> list[int]:
        return self.lm.tok_encode(prompt)

    def _complete(self, instances: list[Instance]) -> list[Completion]:
        try:
            texts = self.lm.generate_until(instances)
        except (aiohttp.ClientError, requests.RequestException) as error:
            raise ForkError(f"{self.base_url} failed a request ({error}); its log says why.") from error
        return [Completion(str(text), text.report) for text in texts]

    def first_token(self, ids: Sequence[int], xargs: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Streamed: until the first chunk is here.

        Raises:
            ForkError: with the server's words if it refuses.

        """
        body = {
            "model": self.name,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0,
            "stream": True,
            "cache_salt": self.salt(),
            "vllm_xargs": {**xargs, **REPORT},
        }
        request = urllib.request.Request(
            f"{self.base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        seconds, report = 0.0, None
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    seconds = seconds or time.perf_counter() - started
                    [choice] = json.loads(line.removeprefix(b"data: "))["choices"]
                    report = choice.get("uniprefill", report)
        except urllib.error.HTTPError as error:
            raise ForkError(f"{self.base_url} refused a request: {error.read().decode(errors='replace')}") from None
        if report is None:
            raise ForkError("The server sends no UniPrefill report; start it from this repository's package.")
        return seconds, report
