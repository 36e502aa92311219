"""Shapes, floors, the selection alone, and many requests at once: the newer parts of the benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evals.bench import __main__ as cli  # noqa: E402
from evals.bench import arithmetic, configs, engine, kernels, parts, shapes, traffic  # noqa: E402

LLAMA = arithmetic.ModelShape.from_config(configs.LLAMA_CONFIG)
QWEN = arithmetic.ModelShape.from_config(configs.QWEN3_NEXT_CONFIG)
GEMMA = arithmetic.ModelShape.from_config(configs.GEMMA_3_12B_CONFIG)
TINY = arithmetic.ModelShape.from_config(configs.TINY_CONFIG)


# --- shapes and the FLOP model


def test_the_published_cuts_are_full_attention_layers() -> None:
    for name, shape in (("qwen3-next", QWEN), ("gemma-3-12b", GEMMA), ("llama-3.1-8b", LLAMA)):
        assert {shape.kinds[layer] for layer in shapes.SHAPES[name].selection_layers} == {"full"}
    assert QWEN.kinds.count("linear") == 36 and GEMMA.kinds.count("sliding") == 40


def test_a_token_of_a_mixture_uses_its_experts_only() -> None:
    assert QWEN.ffn == 10 * 512 + 512
    # About 3 of the model's 80 billion parameters work on a token; embeddings are not in it, and
    # the linear layers' state is arithmetic without parameters.
    active = sum(arithmetic.linear_flops(QWEN, kind) for kind in QWEN.kinds) / 2
    assert 2.5e9 < active < 3.4e9


def test_parameters_of_gemma() -> None:
    weights = GEMMA.layers * arithmetic.linear_flops(GEMMA) / 2
    assert 10.5e9 < weights < 11.5e9  # 12 billion with the embeddings


def test_a_sliding_layer_sees_its_window() -> None:
    """By counting: each query sees itself and so many before it."""
    shape = arithmetic.ModelShape.from_config(configs.GEMMA_3_12B_CONFIG | {"sliding_window": 10})
    pairs = sum(min(position + 1, 10) for position in range(100))
    flops = arithmetic.attention_flops(shape, 100, "sliding")
    assert flops == pytest.approx(4 * pairs * shape.heads * shape.head_dim, rel=0.02)
    assert arithmetic.attention_flops(shape, 8, "sliding") == arithmetic.attention_flops(shape, 8, "full")


def test_the_flop_model_knows_which_layers_come_after_the_cut() -> None:
    """After the cut at 29 Gemma has 3 full layers: little to gain from its quadratic part."""
    segments = [(30, 131072), (18, 39322)]
    layers = [
        tokens * arithmetic.linear_flops(GEMMA, kind) + arithmetic.attention_flops(GEMMA, tokens, kind)
        for kind, tokens in zip(GEMMA.kinds, [131072] * 30 + [39322] * 18, strict=True)
    ]
    assert arithmetic.prefill_flops(GEMMA, segments) == sum(layers)
    assert 1.2 < arithmetic.flop_gain(GEMMA, segments) < 1.6
    assert (
        1
        < arithmetic.flop_gain(QWEN, [(8, 131072), (40, 39322)])
        < arithmetic.flop_gain(QWEN, [(8, 131072), (40, 10000)])
    )


def test_kv_memory_of_a_hybrid_is_that_of_its_full_layers() -> None:
    assert QWEN.kv_bytes_per_token == 12 * 2 * 2 * 256 * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3-next", "hybrid"),
        ("gemma-3-12b", "sliding-attention layers"),
        ("llama-3.1-8b", None),
        ("tiny", None),
    ],
)
def test_the_engine_says_itself_which_shapes_it_refuses(name: str, words: str | None) -> None:
    with shapes.model_folder(shapes.SHAPES[name], None) as (folder, load_format):
        sentence = engine.refusal(engine.engine_arguments(folder, load_format, 4096, 1))
    if words is None:
        assert sentence is None
    else:
        assert sentence.startswith("--uniprefill-config does not work with") and words in sentence
        assert sentence.endswith("drop --uniprefill-config.") and "\n" not in sentence


def test_of_a_refused_shape_the_kernels_are_measured_and_the_rest_is_named(tmp_path: Path, monkeypatch) -> None:
    """At 1,024 keys; nothing starts an engine."""
    monkeypatch.setattr(cli, "engine", None)
    monkeypatch.setattr(
        kernels, "ceilings", lambda *_, **__: {"bytes_per_second": 1e9, "flops_per_second": 1e9, "dtype": ""}
    )
    output = tmp_path / "x"
    options = ["--shape", "gemma-3-12b", "--repeats", "1", "--kernel-lengths", "1024", "--output", str(output)]
    assert cli.main(options) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert [row["tokens"] for row in result["kernels"]] == [1024]
    assert not {"ttft", "decode", "breakdown", "poisson"} & set(result)
    (line,) = [line for line in result["not_measured"] if "refuses" in line]
    assert line.startswith("ttft, efficiency, breakdown, concurrency, poisson, decode: ") and "sliding" in line
    assert result["refused"] in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 5000


# --- the selection alone


def test_the_floor_counts_bytes_and_operations() -> None:
    floor = arithmetic.selection_floor(LLAMA, 131072, 128, 64)
    assert floor.flops == 2 * 128 * 32 * 131072 * 128
    assert floor.bytes == 131072 * 8 * 128 * 2 + 128 * 32 * 128 * 2 + 2048 * 4
    assert floor.workspace_bytes == 3 * 2048 * 128 * 32 * 4
    seconds = floor.seconds(bandwidth=3e12, rate=7.5e14)
    assert seconds["floor"] == seconds["compute"] > seconds["memory"]


def test_plain_torch_agrees_with_ours_and_short_last_blocks_count() -> None:
    import torch
    from vllm.v1.uniprefill.selection import block_mass

    query, key, specs = kernels.make_inputs(TINY, 1000, "cpu", 3)
    assert not key.is_contiguous()
    ours = block_mass(query, key, specs, block_size=64, scale=0.2)
    plain = kernels.plain_block_mass(query, key, 64, 0.2)
    assert plain.shape == ours.shape == (16,)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    assert float(plain.sum()) == pytest.approx(128 * TINY.heads, rel=1e-3)


def test_a_row_of_kernels_says_what_was_timed() -> None:
    rates = {"bytes_per_second": 1e10, "flops_per_second": 1e10, "dtype": "float32"}
    row = kernels.measure_kernels(TINY, 1024, 2, rates, "cpu")
    assert row["implementation"] == "torch reference"
    assert {len(row["seconds"][name]["values"]) for name in ("mass", "selection", "plain")} == {2}
    assert row["difference_to_plain"] < 1e-3
    assert row["over_floor"]["median"] == pytest.approx(
        row["seconds"]["mass"]["median"] / row["floor_seconds"]["floor"], rel=0.5
    )


def test_lengths_that_do_not_fit_are_told_apart() -> None:
    assert kernels.fits(LLAMA, 131072, 60 << 30) and not kernels.fits(LLAMA, 131072, 4 << 30)


# --- traffic


class Output:
    def __init__(self, request: str, tokens: list[int], finished: bool, pruned: bool) -> None:
        self.request_id, self.finished = request, finished
        self.outputs = [type("Completion", (), {"token_ids": tokens})]
        self.uniprefill = {"outcome": "pruned" if pruned else "dense"}


class ToyEngine:
    """Serves one token a step to everybody, and notes in which order requests came."""

    def __init__(self) -> None:
        self.running: dict[str, list] = {}
        self.came: list[str] = []

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def add_request(self, name: str, prompt, params) -> None:
        self.came.append(name)
        pruned = bool(params.extra_args["uniprefill"]) and len(prompt["prompt_token_ids"]) >= 1024
        self.running[name] = [[], params.max_tokens, pruned]

    def step(self) -> list[Output]:
        made = []
        for name, (tokens, wanted, pruned) in list(self.running.items()):
            tokens.append(1)
            made.append(Output(name, list(tokens), len(tokens) == wanted, pruned))
            if len(tokens) == wanted:
                del self.running[name]
        return made


def toy_bench(repeats: int = 2) -> parts.Bench:
    llm = type("Llm", (), {"llm_engine": ToyEngine()})()
    return parts.Bench(llm, TINY, shapes.Prompts(needle=False, vocabulary=50), repeats)


def test_requests_are_sent_when_they_are_due() -> None:
    arrivals = [
        traffic.Arrival(0.05, [1] * 10, traffic.SHORT, 3),
        traffic.Arrival(0.0, [1] * 2000, traffic.LONG, 2),
        traffic.Arrival(0.02, [1] * 10, traffic.SHORT, 1),
    ]
    bench = toy_bench()
    served = traffic.play(bench.llm, arrivals, engine.keep_ratio_variant(0.3))
    assert bench.llm.llm_engine.came == ["1", "2", "0"]
    assert [len(one.token_times) for one in served] == [3, 2, 1]
    assert all(0 <= one.ttft < 0.5 for one in served) and len(served[0].gaps) == 2
    assert [one.outcome for one in served] == ["dense", "pruned", "dense"]


def test_a_long_prompt_that_was_not_pruned_stops_the_measurement() -> None:
    served = [traffic.Served(traffic.Arrival(0, [1], traffic.LONG, 1), [1.0], "dense")]
    with pytest.raises(RuntimeError, match="not pruned"):
        traffic.check_outcomes(served, engine.keep_ratio_variant(0.3))
    traffic.check_outcomes(served, engine.DENSE)


def test_concurrency_keeps_every_prompts_time() -> None:
    row = traffic.measure_concurrency(toy_bench(), 2000, 4, engine.keep_ratio_variant(0.3))
    assert len(row["ttft"]["dense"]["values"]) == 8, "two repetitions of four prompts"
    assert len(row["gain"]["paired"]["values"]) == 2


def test_poisson_plays_the_same_arrivals_dense_and_pruned() -> None:
    bench = toy_bench()
    row = traffic.measure_poisson(bench, 1024, engine.keep_ratio_variant(0.3), count=8, new_tokens=2, load=0.01)
    assert len(bench.llm.llm_engine.came) == 2 + 2 * 2 * 8
    assert row["throughput"]["gain"]["ratio"] > 0 and set(row["short"]) == set(row["long"])
    arrivals = traffic.poisson_arrivals(bench, 1024, 5.0, 400, 2, 1)
    assert arrivals == traffic.poisson_arrivals(bench, 1024, 5.0, 400, 2, 1)
    assert [one.kind for one in arrivals].count(traffic.LONG) == 100
    assert {len(one.ids) for one in arrivals} == {1024, traffic.SHORT_TOKENS}
    assert 60 < arrivals[-1].due < 105  # 400 at 5 a second


def test_percentiles_are_by_nearest_rank() -> None:
    values = list(range(1, 101))
    assert [traffic.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert traffic.percentile([7.0], 0.99) == 7.0
