"""The benchmark: its arithmetic, arguments, parts and reports, without an engine."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

from evals import provenance
from evals.bench import __main__ as cli
from evals.bench import (
    arithmetic,
    cache,
    classes,
    concurrency,
    decode,
    efficiency,
    engine,
    gain,
    hooks,
    interleave,
    kernels,
    overhead,
    play,
    report,
    shapes,
    traffic,
)
from evals.needle.prompts import TOKEN_ID, make_prompt
from scripts.fork import ForkError

ROOT = Path(__file__).resolve().parents[2]
LLAMA = shapes.ModelShape.from_config(shapes.LLAMA_CONFIG)
TINY = shapes.ModelShape.from_config(shapes.TINY_CONFIG)


def make_report(*segments: tuple[int, int, int]) -> dict:
    """A request's report from (first layer, last layer, tokens alive)."""
    after = [*(alive for *_, alive in segments[1:]), segments[-1][2]]
    return {
        "outcome": "pruned",
        "reason": None,
        "prompt_tokens": segments[0][2],
        "steps": 1,
        "lane_wait_seconds": 0.0,
        "segments": [
            {"layers": [first, last], "tokens_in": alive, "tokens_out": kept}
            for (first, last, alive), kept in zip(segments, after, strict=True)
        ],
    }


def make_bench(llm=None, model: shapes.ModelShape = LLAMA, **options: int) -> engine.Bench:
    """Of the shape tiny, with keep_ratio .25."""
    shape = replace(shapes.SHAPES["tiny"], keep_ratio=0.25, efficiency_lengths=(4096,))
    args = argparse.Namespace(**{"repeats": 2, "arrivals": 8, "top_p": 0.99} | options)
    prompts = shapes.Prompts(needle=False, vocabulary=50)
    return engine.Bench(shape, Path(), "dummy", model, prompts, "cpu", args, {}, llm, (3,))


# --- arithmetic


def test_spread_keeps_the_order_of_the_repetitions() -> None:
    expected = {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    assert arithmetic.spread([3.0, 1.0, 2.0]) == expected


def test_compare_is_the_ratio_of_medians_beside_the_paired_ratios() -> None:
    found = arithmetic.compare([10.0, 20.0, 90.0], [5.0, 20.0, 10.0])
    assert found["ratio"] == 2
    assert found["paired"]["values"] == [2, 1, 9]
    with pytest.raises(ValueError):
        arithmetic.compare([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("ours", "within"),
    [([1.0, 1.1, 1.2], True), ([1.21, 1.25, 1.3], False), ([1.3, 0.9, 1.2], True)],
)
def test_a_difference_is_held_against_the_spread_of_the_runs(ours: list[float], within: bool) -> None:
    found = arithmetic.within_spread(ours, [1.0, 1.05, 1.1])
    assert found["within"] is within
    assert found["ratio"] == pytest.approx(1.05 / sorted(ours)[1]), "over 1 is faster"


def test_flops_of_llama() -> None:
    """Gain at 128K with 30 % kept after 8 of 32 layers, and of a token alone its weights, twice."""
    weights = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    assert LLAMA.prefill_flops([(1, 1)]) == 2 * weights + 2 * 4096
    assert LLAMA.flop_gain([(8, 131072), (24, round(0.3 * 131072))]) == pytest.approx(2.75, abs=0.01)
    assert LLAMA.flop_gain([(8, 4096), (24, 4096)]) == 1
    assert LLAMA.kv_bytes_per_token == 131072


def test_a_token_of_a_mixture_uses_its_experts_only() -> None:
    config = shapes.LLAMA_CONFIG | {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512}
    assert shapes.ModelShape.from_config(config | {"shared_expert_intermediate_size": 512}).ffn == 11 * 512


def test_gain_at_the_kept_length() -> None:
    """Half of the layers at a quarter of the dense time: 1 / (1/2 + 1/2 * 1/4) = 1.6."""
    segments = [(4, 1000), (4, 500)]
    assert efficiency.predicted_seconds({1000: 8.0, 500: 2.0}, segments) == 5
    found = efficiency.efficiency({1000: [8.0, 8.0], 500: [2.0, 2.0]}, [5.0, 6.25], segments)
    assert found["expected_gain"] == pytest.approx(1.6)
    assert found["paired_efficiency"]["values"] == [1, pytest.approx(0.8)]
    assert found["efficiency"] == pytest.approx(5 / 5.625)


@pytest.mark.parametrize(("tokens", "label"), [(16384, "16K"), (131072, "128K"), (655, "655")])
def test_size_label(tokens: int, label: str) -> None:
    assert arithmetic.size_label(tokens) == label


def test_percentiles_are_by_nearest_rank() -> None:
    values = list(range(1, 101))
    assert [traffic.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert traffic.percentile([7.0], 0.99) == 7.0


# --- what is measured


def test_the_parts_of_a_prefill_add_up_to_it() -> None:
    spans = {"segment": [4.0, 2.0], "score": [0.5], "choose": [0.1], "metadata": [0.2]}
    split = overhead.prefill_parts(8.0, spans)
    assert sum(split.values()) == pytest.approx(8.0)
    assert split["layers"] == 6 and split["leave"] == 0 and split["rest"] == pytest.approx(1.2)
    assert set(overhead.STEPS) < set(split)


def test_alternating_starts_with_another_job_each_time(monkeypatch) -> None:
    order: list[str] = []

    def first_token(llm, ids, variant):
        order.append(variant.name)
        return engine.Sample(float(len(order)), 0, {})

    monkeypatch.setattr(engine, "first_token", first_token)
    jobs = [(1024, engine.DENSE), *((1024, v) for v in engine.top_p_variants(0.9))]
    dense, overall, middle = engine.alternate("x", make_bench(), jobs)
    assert order[:4] == ["dense", "top_p 0.9 all", "top_p 0.9 middle", "top_p 0.9 all"]
    assert [s.seconds for s in dense] == [6, 8], "the warm-up does not count"
    assert len(overall) == len(middle) == 2


def test_efficiency_runs_dense_prefills_at_the_kept_lengths(monkeypatch) -> None:
    asked: list[tuple[str, int]] = []
    seconds = {("dense", 4096): 8.0, ("dense", 1024): 1.0, ("keep_ratio 0.25", 4096): 4.5}

    def first_token(llm, ids, variant):
        asked.append((variant.name, len(ids)))
        made = make_report((0, 3, 4096), (4, 7, 1024)) if variant.pruned else make_report((0, 7, 4096))
        return engine.Sample(seconds[asked[-1]], 0, made)

    monkeypatch.setattr(engine, "first_token", first_token)
    (found,) = efficiency.measure(make_bench())
    assert [(s["layers"], s["tokens"]) for s in found["segments"]] == [(4, 4096), (4, 1024)]
    assert found["expected_gain"] == pytest.approx(8 / 4.5) and found["efficiency"] == pytest.approx(1)
    assert asked.count(("dense", 1024)) == 3, "a warm-up and two repetitions"


def test_a_stopwatch_times_a_span_without_those_inside_it() -> None:
    from vllm.v1.worker.gpu.uniprefill import events

    ticks = iter((0, 1, 4, 10, 20, 21))
    stopwatch = hooks.Stopwatch(lambda: next(ticks), lambda begin, end: end - begin)
    with events.observed_by(stopwatch):
        with events.span("segment"), events.span("score"):
            pass
        with events.span("choose"):
            pass
    with events.span("segment"):
        pass
    assert stopwatch.seconds() == {"score": [3], "segment": [7], "choose": [1]}


def test_decode_jobs_name_the_release_that_runs_them(tmp_path: Path) -> None:
    given = ({}, {"1K": [1]}, [2], {"uniprefill": 1}, tmp_path, 3)
    jobs = decode.programs(*given)
    assert [release for _, release in jobs] == [tmp_path, None, None]
    assert [list(job["requests"]) for job, _ in jobs] == [
        [decode.PRISTINE],
        [decode.DENSE, decode.PRUNED],
        [decode.FORK],
    ]
    assert ["uniprefill_config" in job["engine"] for job, _ in jobs] == [False, True, False]
    assert len(decode.programs(*given[:4], None, 3)) == 2


def test_memory_is_what_lies_above_weights_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most in start-up's profile, weights aside; and since, with cache and graphs aside."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # which the worker sets, and nobody else is to see
    from evals.bench import decode_worker

    monkeypatch.undo()
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    device = SimpleNamespace(held=0, most=0)

    def hold(held: int, most: int) -> None:
        device.held, device.most = held, max(device.most, most)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: device.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: device.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(device, "most", device.held))
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: hold(100, 130) or self)
    memory = decode_worker.Memory()
    hold(100, 500)  # loading the weights
    assert Worker.determine_available_memory("what remains") == "what remains"
    hold(190, 190)  # the KV cache and graphs
    memory.started()
    hold(190, 215)
    assert memory.result() == {"profiled": 30, "used": 25}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode_worker.Memory().result() is None


def test_parts_share_an_engine_and_each_is_measured_on_those_it_asks_for(monkeypatch) -> None:
    started: list[tuple[int, ...]] = []

    @contextmanager
    def engine_of(arguments):
        started.append(tuple(arguments["uniprefill_config"]["selection_layers"]))
        yield "engine"

    monkeypatch.setattr(engine, "engine", engine_of)
    monkeypatch.setattr(engine.EngineSpec, "arguments", lambda *_: {})
    rows = lambda bench: [{"cuts": bench.cuts, "llm": bench.llm}]  # noqa: E731
    single, both, none = (
        report.Part("a", "", "", str, rows, lambda bench: [bench.one_at_a_time]),
        report.Part("b", "", "", str, rows, lambda bench: bench.all_and_first_cut),
        report.Part("c", "", "", str, rows),
    )
    bench = replace(make_bench(), cuts=())
    found = [(part.name, row["cuts"], row["llm"]) for part, row in cli.measured(bench, (single, both, none))]
    assert started == [(1, 3), (1,)]
    assert found == [
        ("a", (1, 3), "engine"),
        ("b", (1, 3), "engine"),
        ("b", (1,), "engine"),
        ("c", (), None),
    ]


def test_every_class_has_an_engine_of_its_own(monkeypatch) -> None:
    started: list[tuple[str, str]] = []

    @contextmanager
    def engine_of(arguments):
        started.append((shapes.read_config(Path(arguments["model"]))["model_type"], arguments["load_format"]))
        yield "engine"

    monkeypatch.setattr(engine, "engine", engine_of)
    monkeypatch.setattr(classes, "resolved_cuts", lambda arguments: (3,))
    monkeypatch.setattr(
        gain,
        "measure_length",
        lambda bench, tokens, ways: {"tokens": tokens, "ways": [way.name for way in ways], "cuts": bench.cuts},
    )
    rows = list(classes.measure(replace(make_bench(), shape=shapes.SHAPES["needle"])))
    assert started[0] == ("ministral", "auto") and {how for _, how in started[1:]} == {"dummy"}
    assert len(started) == len(shapes.CLASSES) == len({kind for kind, _ in started})
    assert [(row["model"], row["tokens"]) for row in rows] == [
        (shape.name, tokens) for shape in shapes.CLASSES for tokens in classes.LENGTHS
    ]
    assert [row["ways"] for row in rows[:3]] == [["top_p 0.99 all"]] * 2 + [["keep_ratio 0.3"]]
    assert [row["cuts"] for row in rows[:3]] == [(2, 4, 6)] * 2 + [(3,)], "its own, or the engine's"
    assert not list(classes.measure(make_bench())), "beside another model"


def test_random_prompts_are_determined_by_length_and_seed() -> None:
    prompts = shapes.Prompts(needle=False, vocabulary=100)
    assert prompts.ids(50, 1) == prompts.ids(50, 1) != prompts.ids(50, 2)
    assert prompts.answered(50, 1, 7) is None


def test_needle_prompts_know_their_answer() -> None:
    assert shapes.speaks_needle(shapes.NEEDLE_MODEL) and shapes.speaks_needle(shapes.HYBRID_MODEL)
    prompts = shapes.Prompts(needle=True, vocabulary=1024)
    answer = TOKEN_ID[make_prompt(shapes.TASK, 2048, 3).answer]
    assert len(prompts.ids(2048, 3)) == 2048
    assert prompts.answered(2048, 3, answer)
    assert not prompts.answered(2048, 3, answer + 1)


def test_a_config_alone_gets_dummy_weights(tmp_path: Path) -> None:
    with shapes.model_folder(shapes.SHAPES["llama-3.1-8b"], None) as (folder, load_format):
        assert shapes.ModelShape.from_config(shapes.read_config(folder)) == LLAMA
        assert load_format == "dummy" and not shapes.speaks_needle(folder)
    assert not folder.exists()
    for file, expected in (("config.json", "dummy"), ("model.safetensors", "auto")):
        (tmp_path / file).write_text("{}")
        with shapes.model_folder(shapes.SHAPES["needle"], tmp_path) as found:
            assert found == (tmp_path, expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 6, "sliding_window": 1024}, "no full-attention layer"),
        ({}, None),
    ],
)
def test_the_engine_says_itself_where_it_cuts_and_what_it_refuses(tmp_path: Path, changed: dict, words) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shapes.TINY_CONFIG | changed))
    arguments = engine.EngineSpec((), 4096).arguments(tmp_path, "dummy")
    if words is None:
        assert engine.resolved_cuts(arguments) == (1, 3)
        return
    with pytest.raises(ForkError, match=words) as refused:
        engine.resolved_cuts(arguments)
    assert str(refused.value).startswith("--uniprefill-config ") and "\n" not in str(refused.value)


# --- the selection alone


def test_the_floor_counts_bytes_and_operations() -> None:
    work = kernels.work_of(LLAMA, 131072)
    assert work["flops"] == 2 * 128 * 32 * 131072 * 128
    assert work["bytes"] == 131072 * 8 * 128 * 2 + 128 * 32 * 128 * 2 + 2048 * 4
    assert work["workspace_bytes"] == 3 * 2048 * 128 * 32 * 4
    seconds = kernels.floor_seconds(work, {"bytes_per_second": 3e12, "flops_per_second": 7.5e14})
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
    shares = [row["floor_seconds"]["floor"] / value for value in row["seconds"]["mass"]["values"]]
    assert row["share_of_floor"]["values"] == shares


def test_lengths_that_do_not_fit_are_told_apart() -> None:
    assert kernels.fits(LLAMA, 131072, 60 << 30) and not kernels.fits(LLAMA, 131072, 4 << 30)


# --- traffic


class Output:
    def __init__(self, request: str, tokens: list[int], finished: bool, pruned: bool) -> None:
        self.request_id, self.finished = request, finished
        self.outputs = [type("Completion", (), {"token_ids": tokens})]
        layers = [[0, 3], [4, 7]] if pruned else [[0, 7]]
        self.uniprefill = {
            "outcome": "pruned" if pruned else "dense",
            "reason": None,
            "steps": 2,
            "segments": [{"layers": pair} for pair in layers],
        }


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

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.running[name]

    def step(self) -> list[Output]:
        made = []
        for name, (tokens, wanted, pruned) in list(self.running.items()):
            tokens.append(1)
            made.append(Output(name, list(tokens), len(tokens) == wanted, pruned))
            if len(tokens) == wanted:
                del self.running[name]
        return made


def toy_bench() -> engine.Bench:
    llm = type("Llm", (), {"llm_engine": ToyEngine()})()
    llm.llm_engine.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=512))
    return make_bench(llm, TINY)


def test_requests_are_sent_when_they_are_due() -> None:
    arrivals = [
        play.Arrival(0.05, [1] * 10, play.SHORT, 3),
        play.Arrival(0.0, [1] * 2000, play.LONG, 2),
        play.Arrival(0.02, [1] * 10, play.SHORT, 1),
    ]
    bench = toy_bench()
    served = play.play(bench.llm, arrivals, bench.by_ratio)
    assert bench.llm.llm_engine.came == ["1", "2", "0"]
    assert [len(one.token_times) for one in served] == [3, 2, 1]
    assert all(one.ttft >= 0 for one in served) and len(served[0].gaps) == 2
    assert [one.outcome for one in served] == ["dense", "pruned", "dense"]


def test_a_long_prompt_that_was_not_pruned_stops_the_measurement() -> None:
    bench = toy_bench()
    with pytest.raises(RuntimeError, match="1 of 1 prompts were not pruned"):
        play.play(bench.llm, [play.Arrival(0, [1] * 10, play.LONG, 1)], bench.by_ratio)


def test_concurrency_keeps_every_prompts_time() -> None:
    row = concurrency.measure_count(toy_bench(), 2000, 4)
    assert len(row["ttft"]["dense"]["values"]) == 8, "two repetitions of four prompts"
    assert len(row["gain"]["paired"]["values"]) == 2


def test_prompts_side_by_side_are_those_between_their_first_and_last_token() -> None:
    times = [(1.0, 4.0), (2.0, 3.0), (3.0, 5.0), (3.5, 6.0)]
    served = [play.Served(play.Arrival(0, [1], play.LONG, 2), list(pair)) for pair in times]
    assert cache.side_by_side(served) == 3, "the second ended when the third began"
    row = cache.measure_length(toy_bench(), 2000)
    assert row["side_by_side"]["pruned"]["values"] == [cache.PROMPTS] * 2
    assert len(row["seconds"]["dense"]["values"]) == 2 and row["new_tokens"] == cache.NEW_TOKENS


def test_a_prompt_is_timed_alone_and_beside_decodes_with_their_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy_bench()
    alone = []

    def run(self, tokens: int, seed: int, variant: engine.Variant) -> engine.Sample:
        alone.append((tokens, seed, variant.name))
        return engine.Sample(0.5 if variant.pruned else 1.0, 1, {})

    monkeypatch.setattr(engine.Bench, "run", run)
    row = interleave.measure_length(bench, 2000)
    ways = ("dense", "keep_ratio 0.25")  # by top_p too, where the prompts are no random tokens
    assert tuple(row["ways"]) == ways and tuple(row["gains"]) == ways[1:]
    assert len(bench.llm.llm_engine.came) == 2 * 3 * (interleave.DECODES + 1), "a warm-up and two repetitions"
    assert not bench.llm.llm_engine.running, "the decodes are aborted"
    assert sorted(name for tokens, _, name in alone if tokens == 2000) == sorted(2 * ways)
    assert row["layer_ratio"] == 2 and row["budget"] == 512
    assert row["gains"]["keep_ratio 0.25"]["alone"]["ratio"] == 2
    for way in ways:
        assert all(len(row["ways"][way][what]["values"]) == 2 for what in interleave.TIMES)
        assert row["ways"][way]["gap_max"]["median"] >= row["ways"][way]["gap_p50"]["median"] > 0


def test_a_decode_that_waits_for_the_prompt_stops_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ToyEngine.step

    def starving(self) -> list[Output]:
        made = step(self)
        return made[1:] if len(made) > interleave.DECODES else made

    monkeypatch.setattr(ToyEngine, "step", starving)
    with pytest.raises(RuntimeError, match="dense at 2000 tokens: a decode got no token in a step"):
        interleave.beside_decodes(toy_bench(), 2000, 1, engine.DENSE)


def test_a_prompt_that_took_one_step_promises_nothing_to_decodes() -> None:
    result = made_result()
    del result["interleave"][0]
    assert list(interleave.expectations(result)) == []


def test_a_lane_is_held_against_one_step() -> None:
    result = made_result()
    lane, whole = result["interleave"]
    assert [row["met"] for row in interleave.expectations(result)] == [True] * 4
    lane["ways"]["keep_ratio 0.2"]["gap_max"]["median"] = 1.2
    lane["gains"]["keep_ratio 0.2"]["alone"]["ratio"] = 3.0
    missed = [row["measured"] for row in interleave.expectations(result) if not row["met"]]
    assert missed == ["0.30", "3.00x of 4.00x: 0.75"]
    result["interleave"] = [lane]
    assert len(list(interleave.expectations(result))) == 2, "nothing to hold it against"


def test_the_mix_plays_the_same_arrivals_dense_and_pruned() -> None:
    bench = toy_bench()
    row = traffic.measure_mix(bench, 1024, count=8, new_tokens=2, load=0.01)
    assert len(bench.llm.llm_engine.came) == 2 + 2 * 2 * 8
    assert row["throughput"]["gain"]["ratio"] > 0 and set(row["short"]) == set(row["long"])
    arrivals = traffic.random_arrivals(bench, 1024, 5.0, 400, 2, 1)
    assert arrivals == traffic.random_arrivals(bench, 1024, 5.0, 400, 2, 1)
    assert [one.kind for one in arrivals].count(play.LONG) == 100
    assert {len(one.ids) for one in arrivals} == {1024, traffic.SHORT_TOKENS}
    assert 60 < arrivals[-1].due < 105  # 400 at 5 a second


# --- arguments


def chosen(*argv: str) -> shapes.Shape:
    return cli.chosen_shape(cli.make_parser().parse_args(argv))


def test_lengths_decide_where_efficiency_is_measured() -> None:
    assert chosen().efficiency_lengths == (8192, 16384)
    assert chosen("--lengths", "16384,2048").efficiency_lengths == (16384,)
    assert chosen("--lengths", "4096,2048").efficiency_lengths == (4096,)
    assert chosen("--shape", "llama-3.1-8b").lengths == (8192, 32768, 131072)
    assert chosen("--traffic-length", "2048").traffic_length == 2048
    assert chosen("--kernel-lengths", "9000,300").kernel_lengths == (300, 9000)
    assert chosen("--selection-layers", "5,1", "--keep-ratio", ".5").selection_layers == (1, 5)


def test_another_model_names_the_result_and_is_cut_where_the_engine_chooses() -> None:
    shape = chosen("--model", "some/Model-7B")
    assert (shape.name, shape.selection_layers) == ("Model-7B", None)
    assert chosen("--model", "x", "--shape", "tiny").selection_layers == (1, 3)
    assert chosen("--model", str(shapes.NEEDLE_MODEL)) == chosen()
    with pytest.raises(ForkError, match=r"--model some/Model-7B holds no config\.json"):
        shapes.read_config(Path("some/Model-7B"))


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (cli.lengths_argument, "512,2048"),
        (cli.lengths_argument, "2K"),
        (cli.parts_argument, "ttft,other"),
        (cli.share_argument, "1.5"),
        (cli.count_argument, "0"),
    ],
)
def test_bad_arguments_are_refused(parse, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse(text)


def test_parts_keep_their_order() -> None:
    assert cli.parts_argument("decode,ttft") == ("ttft", "decode")


def test_help_names_the_parts_and_needs_neither_vllm_nor_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "evals.bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"  {part.name:12}{part.about}" in done.stdout for part in cli.PARTS)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"vllm", "torch", "matplotlib"} & imported


def test_results_stay_out_of_the_committed_ones_unless_asked() -> None:
    assert cli.make_parser().parse_args([]).results == ROOT / "build" / "results"
    line = provenance.command_line("bench", ["--repeats", "2", "--results", "evals/results", "--model", f"{ROOT}/x"])
    assert line == "make bench 'ARGS=--repeats 2 --model x'"


@pytest.mark.parametrize("task", ["bench", "bench-load", "eval"])
def test_make_passes_model_and_results_on(task: str) -> None:
    command = ["make", "-n", task, "MODEL=a b", "RESULTS=here"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--model 'a b' --results 'here'" in done.stdout


def test_make_soak_passes_results_on_and_takes_no_model() -> None:
    def shown(*given: str) -> str:
        return subprocess.run(["make", "-n", "soak", *given], cwd=ROOT, capture_output=True, text=True).stdout

    assert "evals.soak --results 'here'" in shown("RESULTS=here")
    assert "leave MODEL out" in shown("MODEL=x") and "leave MODEL out" not in shown()


# --- provenance


@pytest.mark.parametrize(
    ("version", "has_feature", "problem"),
    [
        ("0.32.0+uniprefill.1.cpu", True, None),
        ("0.32.0+cpu", True, "not the patched one"),
        ("0.32.0+uniprefill.1.cpu", False, "no module"),
        ("0.32.0+uniprefill.2.cpu", True, "VERSION asks for"),
    ],
)
def test_only_the_patched_package_passes(version: str, has_feature: bool, problem: str | None) -> None:
    expected = {"0.32.0+uniprefill.1", "0.32.0+uniprefill.1.cpu"}
    found = provenance.package_problem(version, has_feature, expected)
    assert (found is None) if problem is None else (problem in found)


def test_provenance_names_no_host() -> None:
    found = provenance.provenance()
    assert {"version", "package", "upstream_commit", "series_sha256", "torch", "machine"} <= set(found)
    assert len(found["series_sha256"]) == 64
    assert socket.gethostname() not in json.dumps(found)


# --- results


def made_poisson() -> dict:
    value = {"dense": arithmetic.spread([2.0, 2.2]), "pruned": arithmetic.spread([1.0, 1.1])}
    value["gain"] = arithmetic.compare([2.0, 2.2], [1.0, 1.1])
    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    return {
        "tokens": 4096,
        "short_tokens": 200,
        "variant": "keep_ratio 0.3",
        "requests": 24,
        "new_tokens": 32,
        "requests_per_second": 1.5,
        "load": 1.2,
        "throughput": value,
        "short": dict.fromkeys(names, value),
        "long": dict.fromkeys(names, value),
    }


def made_result(device: str = "cpu") -> dict:
    """A result with every part, of made-up times."""
    variants = engine.top_p_variants(0.99) if device == "cpu" else [engine.keep_ratio_variant(0.3)]
    lengths, gains = ((4096, 16384), (1.5, 2.5)) if device == "cpu" else ((65536, 131072), (2.5, 2.6))
    kept = [{"layers": [0, 2], "share": arithmetic.spread([1.0, 1.0])}]
    kept.append({"layers": [3, 7], "share": arithmetic.spread([0.2, 0.3])})

    def ttft_row(tokens: int, gain: float) -> dict:
        dense = [2.0 * gain, 2.1 * gain]
        pruned = {
            variant.name: {
                "seconds": arithmetic.spread([2.0, 2.1]),
                "gain": arithmetic.compare(dense, [2.0, 2.1]),
                "answered": {"right": 2, "asked": 2},
                "kept": kept,
                "flop_model_gain": 2.75,
            }
            for variant in variants
        }
        seconds = {"seconds": arithmetic.spread(dense), "answered": {"right": 2, "asked": 2}}
        return {"tokens": tokens, "dense": seconds, "pruned": pruned}

    tokens = lengths[-1]
    where = {"tokens": tokens, "selection_layers": [2], "variant": "keep_ratio 0.2"}
    segments = [(3, tokens), (5, 1000)]
    dense = {tokens: [8.0, 8.2], 1000: [0.5, 0.5]}
    names = [decode.PRISTINE, decode.FORK, decode.DENSE, decode.PRUNED]
    medians = {name: [0.01, 0.0105, 0.011] for name in names}
    return {
        "provenance": {
            "version": "0.32.0-1",
            "package": "0.32.0+uniprefill.1",
            "upstream": "v0.32.0",
            "upstream_commit": "5df63a720",
            "series_sha256": "0" * 64,
            "torch": "2.13.0",
            "python": "3.11.0",
            "machine": {
                "device": device,
                "cpu": "A CPU",
                "cores": 2,
                "gpu": None if device == "cpu" else "A GPU",
            },
        },
        "settings": {
            "title": "Benchmark",
            "method": "Medians.",
            "command": "make bench",
            "shape": "needle" if device == "cpu" else "llama-3.1-8b",
            "parts": list(cli.NAMES),
            "repeats": 2,
            "prompts": "needle" if device == "cpu" else "random",
        },
        "load_average": 0.1,
        "finished": "2026-01-01 00:00 UTC",
        "ttft": [ttft_row(tokens, gain) for tokens, gain in zip(lengths, gains, strict=True)],
        "efficiency": [
            where
            | {
                "segments": [{"layers": layers, "tokens": alive} for layers, alive in segments],
                "pruned_seconds": arithmetic.spread([3.5, 3.5]),
                **efficiency.efficiency(dense, [3.5, 3.5], segments),
            }
        ],
        "breakdown": [
            where
            | {
                "parts_seconds": {name: arithmetic.spread([0.1, 0.1]) for name in ("layers", *overhead.STEPS, "rest")},
                "overhead_share": arithmetic.spread([0.03, 0.04]),
                "selection_seconds_per_cut": [arithmetic.spread([0.0008, 0.0009])],
                "wait_seconds_per_cut": [arithmetic.spread([0.1, 0.2])],
            }
        ],
        "interleave": [
            where
            | {
                "budget": budget,
                "decodes": interleave.DECODES,
                "layer_ratio": 8 / 3,
                "gains": {
                    "keep_ratio 0.2": {what: arithmetic.compare([4.0, 4.2], [1.0, 1.1]) for what in interleave.TIMES}
                    | {"alone": arithmetic.compare([4.0, 4.0], [1.0, 1.0])}
                },
                "ways": {
                    name: {"steps": steps} | {what: arithmetic.spread([gap, gap]) for what in interleave.TIMES}
                    for name in ("dense", "keep_ratio 0.2")
                },
            }
            for budget, steps, gap in ((4096, 4, 1.0), (20480, 1, 4.0))
        ],
        "classes": [
            {"model": name, "selection_layers": [1, 3]} | ttft_row(8192, 2.0)
            for name in ("needle-hybrid", "qwen3-next")
        ],
        "concurrency": [
            {
                "tokens": 4096,
                "together": together,
                "variant": "keep_ratio 0.3",
                "ttft": {"dense": arithmetic.spread([2.0, 4.0]), "pruned": arithmetic.spread([1.0, 2.0])},
                "mean_ttft": {"dense": arithmetic.spread([3.0, 3.2]), "pruned": arithmetic.spread([1.5, 1.6])},
                "gain": arithmetic.compare([3.0, 3.2], [1.5, 1.6]),
            }
            for together in concurrency.COUNTS
        ],
        "cache": [
            where
            | {
                "prompts": cache.PROMPTS,
                "side_by_side": {"dense": arithmetic.spread([3, 3]), "pruned": arithmetic.spread([6, 7])},
                "seconds": {"dense": arithmetic.spread([3.0, 3.2]), "pruned": arithmetic.spread([1.5, 1.6])},
                "gain": arithmetic.compare([3.0, 3.2], [1.5, 1.6]),
            }
        ],
        "poisson": [made_poisson()],
        "ceilings": {"bytes_per_second": 3e12, "flops_per_second": 7e14, "dtype": "bfloat16"},
        "kernels": [
            {
                "tokens": 131072,
                "implementation": "Triton kernels",
                "seconds": {
                    "mass": arithmetic.spread([4e-4, 5e-4]),
                    "selection": arithmetic.spread([7e-4, 8e-4]),
                    "plain": arithmetic.spread([9e-3, 9e-3]),
                },
                "against_plain": arithmetic.compare([9e-3, 9e-3], [4e-4, 5e-4]),
                "floor_seconds": {"memory": 9e-5, "compute": 2e-4, "floor": 2e-4},
                "share_of_floor": arithmetic.spread([0.4, 0.5]),
                "peak_bytes": {"mass": 34 << 20, "selection": 35 << 20, "plain": 6 << 30},
                "difference_to_plain": 1e-5,
            }
        ],
        "decode": {
            "packages": dict.fromkeys(names, "0.32.0"),
            "memory": {decode.PRISTINE: {"profiled": 3 << 30, "used": 2 << 30}},
            "contexts": [
                {
                    "context": "32K",
                    "tokens": 32768,
                    "flop_model_gain": 1.0,
                    "cold_seconds_to_first": dict.fromkeys(names, 0.5),
                    "seconds_per_token": {n: arithmetic.spread(v) for n, v in medians.items()},
                    "seconds_to_first": {n: arithmetic.spread(v) for n, v in medians.items()},
                    "compared": decode.comparisons(medians),
                    "first_compared": decode.comparisons(medians),
                }
            ],
        },
    }


def expected(result: dict) -> list[dict]:
    return [row for part in cli.PARTS for row in part.expectations(result)]


# ttft, efficiency, breakdown, interleave, classes, concurrency, cache, kernels, decode
@pytest.mark.parametrize(
    ("device", "count"), [("cpu", 4 + 1 + 1 + 4 + 4 + 3 + 1 + 0 + 5), ("cuda", 2 + 1 + 2 + 4 + 2 + 3 + 1 + 2 + 12)]
)
def test_a_good_result_meets_every_expectation(device: str, count: int) -> None:
    found = expected(made_result(device))
    assert len(found) == count
    assert all(row["met"] is True for row in found), found


def test_what_falls_short_is_missed() -> None:
    result = made_result()
    result["ttft"].reverse()  # shrinking with length
    for row in result["ttft"]:
        row["pruned"]["top_p 0.99 all"]["answered"] = {"right": 1, "asked": 2}
    result["efficiency"][0]["efficiency"] = 0.84
    result["breakdown"][0]["overhead_share"]["median"] = 0.06
    slow = {decode.PRUNED: [0.02, 0.021], decode.DENSE: [0.01, 0.011], decode.PRISTINE: [0.005, 0.005]}
    result["decode"]["contexts"][0]["compared"] = decode.comparisons(slow)
    result["concurrency"][0]["gain"]["ratio"] = 0.9
    result["cache"][0]["side_by_side"]["pruned"]["median"] = 3
    result["interleave"][0]["gains"]["keep_ratio 0.2"]["gap_max"]["ratio"] = 1.9
    missed = [row["expectation"] for row in expected(result) if not row["met"]]
    assert len(missed) == 2 + 1 + 1 + 1 + 3 + 1 + 1 + 1, missed


def test_a_slow_selection_is_missed() -> None:
    result = made_result("cuda")
    result["kernels"][0]["seconds"]["selection"]["median"] = 1.1e-3
    result["kernels"][0]["against_plain"]["ratio"] = 0.9
    missed = [row["expectation"] for row in expected(result) if not row["met"]]
    assert len(missed) == 2 and all("kernels at 128K" in line for line in missed)


def test_on_a_gpu_a_prompt_is_held_against_the_release() -> None:
    """Its gain against the FLOP model, the first run of its length, and memory against start-up's profile."""
    result = made_result("cuda")
    (row,) = result["decode"]["contexts"]
    row["flop_model_gain"] = 1.2  # and pruned ones are as fast as the release's
    row["cold_seconds_to_first"][decode.PRUNED] = 1.2
    result["decode"]["memory"][decode.PRISTINE]["used"] = 4 << 30
    missed = {row["expectation"]: row["measured"] for row in expected(result) if not row["met"]}
    assert list(missed.values()) == ["1.00x of 1.20x: 0.83", "1.20 s, then 0.01 s", "4.00 of 3.00 GiB"], missed
    first, *_ = missed
    assert first == ("decode: first token at 32K, fork, flag, pruned against pristine: at least 0.9 of the FLOP model")
    row["tokens"] = 8192  # short prompts are held to nothing
    assert len([row for row in expected(result) if not row["met"]]) == 2
    assert list(decode.OF_FLASHINFER.expectations(result)) == []
    result["flashinfer"] = result.pop("decode")
    assert len(list(decode.OF_FLASHINFER.expectations(result))) == 11
    assert "FlashInfer" in report.markdown(result | {"expectations": [], "not_measured": []}, cli.PARTS)


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if name.startswith("tiny-")])
def test_a_shrunk_shape_has_every_kind_of_layer_of_its_own(name: str) -> None:
    """What is tried on a CPU goes through the code that the GPU's goes through."""
    small, real = (shapes.SHAPES[shape].model for shape in (name, name.removeprefix("tiny-")))
    assert small["architectures"] == real["architectures"] and set(small) == set(real)
    assert set(small.get("layer_types", ())) == set(real.get("layer_types", ()))
    assert shapes.ModelShape.from_config(small).full < 1 or shapes.ModelShape.from_config(real).full == 1


def test_attention_counts_in_the_layers_that_have_it() -> None:
    """Beside sliding windows or recurrent layers a prompt's length weighs less."""
    gains = [
        shapes.ModelShape.from_config(shapes.GEMMA3_CONFIG | given).flop_gain([(12, 131072), (36, 13107)])
        for given in ({}, {"layer_types": ["full_attention"] * 48})
    ]
    assert 2 < gains[0] < gains[1] < 4
    next_like = shapes.ModelShape.from_config(shapes.QWEN3_NEXT_CONFIG)
    assert next_like.full == 0.25 and next_like.ffn == 11 * 512


def test_a_faster_decode_after_pruning_is_no_miss() -> None:
    result = made_result()
    fast = {decode.PRUNED: [0.005, 0.005], decode.DENSE: [0.01, 0.01]}
    result["decode"]["contexts"][0]["compared"] = decode.comparisons(fast)
    assert all(row["met"] for row in expected(result))


def test_runs_that_differ_widely_prove_nothing() -> None:
    result = made_result()
    noisy = {decode.FORK: [0.01, 0.05], decode.PRISTINE: [0.01, 0.04]}
    result["decode"]["contexts"][0]["compared"] = decode.comparisons(noisy)
    (row,) = [row for row in expected(result) if row["expectation"].startswith("decode at")]
    assert not row["met"] and "too noisy" in row["measured"]


def test_what_was_not_measured_is_listed() -> None:
    def lacking(result: dict) -> str:
        return "\n".join(report.lacking(result, cli.PARTS))

    assert "GPU" in lacking(made_result()) and "GPU" not in lacking(made_result("cuda"))
    result = made_result() | {"too_long_for_plain_torch": [131072], "cut_short": ["tests: stopped"]}
    result["settings"]["parts"] = ["ttft"]
    del result["decode"]["packages"][decode.PRISTINE]
    for words in ("decode: not asked for", "pristine", "kernels at 128K: plain torch", "tests: stopped"):
        assert words in lacking(result)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_result_is_written_as_json_markdown_and_plot(tmp_path: Path, device: str) -> None:
    output = tmp_path / "deep" / "name.v1"
    text = report.write(made_result(device), cli.PARTS, output)
    result = json.loads(Path(f"{output}.json").read_text())
    assert {"provenance", "settings", "expectations", "not_measured", *cli.NAMES} <= {*result, "flashinfer"}
    for words in ("25%", "Not measured", "5df63a720", "Decode", "layers ms", "16 of 4K", "between tokens", "TFLOP/s"):
        assert words in text
    assert text == Path(f"{output}.md").read_text()
    assert all(line.endswith("|") for line in text.splitlines() if line.startswith("|"))
    assert os.path.getsize(f"{output}.png") > 10_000


def test_a_result_is_plotted_whatever_it_lacks(tmp_path: Path) -> None:
    result = made_result()
    for part in ("ttft", "efficiency", "breakdown", "decode"):
        del result[part]
    report.write(result, cli.PARTS, tmp_path / "x")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_lines_that_coincide_are_drawn_once_under_both_names() -> None:
    report.require_matplotlib()
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    lines = {"a": [1.0, 3.0], "b": [2.0, 3.0], "c": [1.005, 3.0]}
    report.draw_lines(axis, [1, 2], {name: [arithmetic.spread([v]) for v in line] for name, line in lines.items()})
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a\nc", "b"]


def test_no_title_is_wider_than_its_panel(tmp_path: Path, monkeypatch) -> None:
    """Of every panel, drawn as it is written."""
    report.require_matplotlib()
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    report.write(made_result(), cli.PARTS, tmp_path / "x")
    (figure,) = figures
    width = figure.bbox.width
    for axis in figure.axes:
        box = axis.title.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width, axis.get_title()
        assert box.width <= 1.25 * axis.bbox.width, axis.get_title()
