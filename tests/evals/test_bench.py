"""The benchmark's arithmetic, arguments and reports, without an engine."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evals import provenance  # noqa: E402
from evals.bench import __main__ as cli  # noqa: E402
from evals.bench import arithmetic, configs, decode, engine, parts, report, shapes, traffic  # noqa: E402
from evals.bench.expectations import expectations, not_measured  # noqa: E402

LLAMA = arithmetic.ModelShape.from_config(configs.LLAMA_CONFIG)


def make_report(*segments: tuple[int, int, int]) -> dict:
    """A request's report from (first layer, last layer, tokens alive)."""
    after = [*(alive for *_, alive in segments[1:]), segments[-1][2]]
    return {
        "outcome": "pruned",
        "reason": None,
        "prompt_tokens": segments[0][2],
        "segments": [
            {"layers": [first, last], "tokens_in": alive, "tokens_kept": kept}
            for (first, last, alive), kept in zip(segments, after, strict=True)
        ],
    }


def make_bench(shape: arithmetic.ModelShape = LLAMA, repeats: int = 2) -> parts.Bench:
    return parts.Bench(None, shape, shapes.Prompts(needle=False, vocabulary=100), repeats)


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


def test_flops_of_llama() -> None:
    assert arithmetic.linear_flops(LLAMA) == 2 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert arithmetic.attention_flops(LLAMA, 1000) == 2 * 2 * 1000**2 // 2 * 4096


def test_flop_model_gives_the_expected_gain_at_128k() -> None:
    segments = [(8, 131072), (24, round(0.3 * 131072))]
    assert arithmetic.flop_gain(LLAMA, segments) == pytest.approx(2.75, abs=0.01)


def test_keeping_all_gains_nothing() -> None:
    assert arithmetic.flop_gain(LLAMA, [(8, 4096), (24, 4096)]) == 1


def test_gain_at_the_kept_length() -> None:
    """Half of the layers at a quarter of the dense time: 1 / (1/2 + 1/2 * 1/4) = 1.6."""
    segments = [(4, 1000), (4, 500)]
    assert arithmetic.predicted_seconds({1000: 8.0, 500: 2.0}, segments) == 5
    dense = {1000: [8.0, 8.0], 500: [2.0, 2.0]}
    found = arithmetic.efficiency(dense, [5.0, 6.25], segments)
    assert found["expected_gain"] == pytest.approx(1.6)
    assert found["paired_efficiency"]["values"] == [1, pytest.approx(0.8)]
    assert found["efficiency"] == pytest.approx(5 / 5.625)


def test_segments_come_from_the_report() -> None:
    found = arithmetic.segments_of(make_report((0, 2, 4096), (3, 6, 900), (7, 7, 256)))
    assert found == [(3, 4096), (4, 900), (1, 256)]


def test_kv_cache_has_room_for_a_sequence() -> None:
    assert LLAMA.kv_bytes_per_token == 131072
    assert engine.kv_cache_bytes(LLAMA, 131073) > 131073 * 131072


@pytest.mark.parametrize(("tokens", "label"), [(16384, "16K"), (131072, "128K"), (655, "655")])
def test_size_label(tokens: int, label: str) -> None:
    assert arithmetic.size_label(tokens) == label


# --- what is measured


def test_the_parts_of_a_prefill_add_up_to_it() -> None:
    spans = {
        "run": [7.0],
        "embed": [0.3],
        "model": [4.0, 2.0],
        "score": [0.5],
        "select": [0.1],
        "compact": [0.1],
        "metadata": [0.2],
        "sample": [0.25],
    }
    split = parts.prefill_parts(8.0, spans)
    assert sum(split.values()) == pytest.approx(8.0)
    assert split["embedding"] == 0.3 and split["sampling"] == 0.25
    assert split["segment 0"] == pytest.approx(4.0 - 0.5 - 0.3) and split["segment 1"] == 2.0
    assert split["rows"] == pytest.approx(0.6)
    assert split["outside"] == pytest.approx(0.75)
    assert set(parts.OVERHEAD) < set(split)


def test_alternating_starts_with_another_job_each_time(monkeypatch) -> None:
    order: list[tuple[str, int]] = []

    def first_token(llm, ids, variant):
        order.append((variant.name, len(ids)))
        return engine.Sample(float(len(order)), 0, {})

    monkeypatch.setattr(parts, "first_token", first_token)
    jobs = [(1024, engine.DENSE), *((1024, v) for v in engine.top_p_variants(0.9))]
    dense, overall, middle = parts.alternate("x", make_bench(), jobs)
    names = [name for name, _ in order]
    assert names[:4] == ["dense", "top_p 0.9 all", "top_p 0.9 middle", "top_p 0.9 all"]
    assert [s.seconds for s in dense] == [6, 8], "the warm-up does not count"
    assert len(overall) == len(middle) == 2


def test_efficiency_runs_dense_prefills_at_the_kept_lengths(monkeypatch) -> None:
    asked: list[tuple[str, int]] = []
    seconds = {("dense", 4096): 8.0, ("dense", 1024): 1.0, ("keep_ratio 0.25", 4096): 4.5}

    def first_token(llm, ids, variant):
        asked.append((variant.name, len(ids)))
        made = make_report((0, 3, 4096), (4, 7, 1024)) if variant.pruned else make_report((0, 7, 4096))
        return engine.Sample(seconds[asked[-1]], 0, made)

    monkeypatch.setattr(parts, "first_token", first_token)
    monkeypatch.setattr(parts.Bench, "selection_layers", [3])
    found = parts.measure_efficiency(make_bench(), 4096, engine.keep_ratio_variant(0.25))
    assert found["expected_gain"] == pytest.approx(8 / 4.5)
    assert found["efficiency"] == pytest.approx(1)
    assert asked.count(("dense", 1024)) == 3  # a warm-up and two repetitions


def test_instrumented_restores_what_it_wraps() -> None:
    ticks = iter(range(100))
    stopwatch = engine.Stopwatch(lambda: next(ticks), lambda begin, end: end - begin)
    assert stopwatch.timed("outer", lambda: stopwatch.timed("inner", lambda: 5)())() == 5
    assert stopwatch.seconds() == {"inner": [1], "outer": [3]}


def test_decode_jobs_name_the_release_that_runs_them(tmp_path: Path) -> None:
    given = ({}, {"1K": [1]}, [2], {"uniprefill": 1}, tmp_path, 3)
    jobs = decode.programs(*given)
    assert [release for _, release in jobs] == [tmp_path, None, None]
    assert [list(job["requests"]) for job, _ in jobs] == [
        [decode.PRISTINE],
        [decode.FORK],
        [decode.DENSE, decode.PRUNED],
    ]
    assert ["uniprefill_config" in job["engine"] for job, _ in jobs] == [False, False, True]
    assert len(decode.programs(*given[:4], None, 3)) == 2


def test_random_prompts_are_determined_by_length_and_seed() -> None:
    prompts = shapes.Prompts(needle=False, vocabulary=100)
    assert prompts.ids(50, 1) == prompts.ids(50, 1) != prompts.ids(50, 2)
    assert prompts.answered(50, 1, 7) is None


def test_needle_prompts_know_their_answer() -> None:
    from evals.needle.prompts import TOKEN_ID, make_prompt

    prompts = shapes.Prompts(needle=True, vocabulary=1024)
    answer = TOKEN_ID[make_prompt(shapes.TASK, 2048, 3).answer]
    assert len(prompts.ids(2048, 3)) == 2048
    assert prompts.answered(2048, 3, answer)
    assert not prompts.answered(2048, 3, answer + 1)


def test_dummy_model_is_a_folder_with_a_config() -> None:
    with shapes.model_folder(shapes.SHAPES["llama-3.1-8b"], None) as (folder, load_format):
        assert arithmetic.ModelShape.of(folder) == LLAMA
        assert load_format == "dummy" and not shapes.speaks_needle(folder)
    assert not folder.exists()


# --- arguments


def test_lengths_decide_where_efficiency_is_measured() -> None:
    def shape(*argv: str) -> shapes.Shape:
        return cli.chosen_shape(cli.make_parser().parse_args(argv))

    assert shape().efficiency_lengths == (8192, 16384)
    assert shape("--lengths", "16384,2048").efficiency_lengths == (16384,)
    assert shape("--lengths", "4096,2048").efficiency_lengths == (4096,)
    assert shape("--shape", "llama-3.1-8b").lengths == (32768, 65536, 131072)
    assert shape("--traffic-length", "2048").traffic_length == 2048
    assert shape("--kernel-lengths", "9000,300").kernel_lengths == (300, 9000)
    assert shape("--selection-layers", "5,1", "--keep-ratio", ".5").selection_layers == (1, 5)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (cli.lengths_argument, "512,2048"),
        (cli.lengths_argument, "2K"),
        (cli.parts_argument, "ttft,other"),
        (cli.share_argument, "1.5"),
        (cli.repeats_argument, "0"),
    ],
)
def test_bad_arguments_are_refused(parse, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse(text)


def test_parts_keep_their_order() -> None:
    assert cli.parts_argument("decode,ttft") == ("ttft", "decode")


def test_help_needs_neither_vllm_nor_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "evals.bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"vllm", "torch", "matplotlib"} & imported


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
    import socket

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
            "command": "make bench",
            "shape": "needle" if device == "cpu" else "llama-3.1-8b",
            "parts": list(cli.PARTS),
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
                **arithmetic.efficiency(dense, [3.5, 3.5], segments),
            }
        ],
        "breakdown": [
            where
            | {
                "parts_seconds": {
                    name: arithmetic.spread([0.1, 0.1])
                    for name in ("embedding", "segment 0", "segment 1", *parts.OVERHEAD, "sampling", "outside")
                },
                "overhead_share": arithmetic.spread([0.03, 0.04]),
                "selection_seconds_per_cut": [arithmetic.spread([0.0008, 0.0009])],
            }
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
            for together in traffic.CONCURRENCY
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
                "over_floor": arithmetic.spread([2.0, 2.5]),
                "peak_bytes": {"mass": 34 << 20, "selection": 35 << 20, "plain": 6 << 30},
                "difference_to_plain": 1e-5,
            }
        ],
        "gpu": {
            "checks": {
                "device": "cuda",
                "seed": 5,
                "planned": 84,
                "cases": [{"case": "a", "error": 1e-5, "agrees": True}, {"case": "b", "wrong": 0, "agrees": True}],
                "failed": [],
                "new_variants": 0,
            },
            "graphs": {
                "device": "cuda",
                "graphs": 4,
                "rows": [{"tokens": 2048, "variant": "dense", "answered": [True, True], "same_tokens": 24, "of": 24}],
            },
        },
        "decode": {
            "packages": dict.fromkeys(names, "0.32.0"),
            "contexts": [
                {
                    "context": "1K",
                    "seconds_per_token": {n: arithmetic.spread(v) for n, v in medians.items()},
                    "compared": decode.comparisons(medians),
                }
            ],
        },
    }


# ttft, efficiency and breakdown, decode; concurrency, kernels, evals.gpu
@pytest.mark.parametrize(("device", "count"), [("cpu", 4 + 2 + 3 + 3 + 3), ("cuda", 2 + 3 + 3 + 3 + 2 + 3)])
def test_a_good_result_meets_every_expectation(device: str, count: int) -> None:
    found = expectations(made_result(device))
    assert len(found) == count
    assert all(row["met"] is True for row in found), found


def test_what_falls_short_is_missed() -> None:
    result = made_result()
    result["ttft"].reverse()  # shrinking with length
    for row in result["ttft"]:
        row["pruned"]["top_p 0.99 all"]["answered"] = {"right": 1, "asked": 2}
    result["efficiency"][0]["efficiency"] = 0.84
    result["breakdown"][0]["overhead_share"]["median"] = 0.06
    slow = {
        decode.PRUNED: [0.02, 0.021],
        decode.DENSE: [0.01, 0.011],
        decode.PRISTINE: [0.005, 0.005],
    }
    result["decode"]["contexts"][0]["compared"] = decode.comparisons(slow)
    result["concurrency"][0]["gain"]["ratio"] = 0.9
    result["gpu"]["checks"] |= {"failed": ["a"], "new_variants": 2}
    result["gpu"]["graphs"]["rows"][0]["same_tokens"] = 23
    missed = [row["expectation"] for row in expectations(result) if not row["met"]]
    assert len(missed) == 2 + 1 + 1 + 1 + 2 + 1 + 3, missed


def test_a_slow_selection_is_missed() -> None:
    result = made_result("cuda")
    result["kernels"][0]["seconds"]["selection"]["median"] = 1.1e-3
    result["kernels"][0]["against_plain"]["ratio"] = 0.9
    missed = [row["expectation"] for row in expectations(result) if not row["met"]]
    assert len(missed) == 2 and all("kernels at 128K" in line for line in missed)


def test_graphs_that_were_never_captured_prove_nothing() -> None:
    result = made_result("cuda")
    result["gpu"]["graphs"]["graphs"] = 0
    assert [row["met"] for row in expectations(result)].count(False) == 1
    result["gpu"]["graphs"]["device"] = "cpu"
    assert not any("CUDA graphs" in row["expectation"] for row in expectations(result))


def test_a_faster_decode_after_pruning_is_no_miss() -> None:
    result = made_result()
    fast = {decode.PRUNED: [0.005, 0.005], decode.DENSE: [0.01, 0.01]}
    result["decode"]["contexts"][0]["compared"] = decode.comparisons(fast)
    assert all(row["met"] for row in expectations(result))


def test_runs_that_differ_widely_prove_nothing() -> None:
    result = made_result()
    noisy = {decode.FORK: [0.01, 0.05], decode.PRISTINE: [0.01, 0.04]}
    result["decode"]["contexts"][0]["compared"] = decode.comparisons(noisy)
    (row,) = [row for row in expectations(result) if row["expectation"].startswith("decode at")]
    assert not row["met"] and "too noisy" in row["measured"]


def test_what_was_not_measured_is_listed() -> None:
    assert any("GPU" in line for line in not_measured(made_result()))
    assert not any("GPU" in line for line in not_measured(made_result("cuda")))
    result = made_result()
    result["settings"]["parts"] = ["ttft"]
    del result["decode"]["packages"][decode.PRISTINE]
    lines = "\n".join(not_measured(result))
    assert "decode: not asked for" in lines and "pristine" in lines
    result["settings"]["parts"] = ["ttft", "kernels"]
    result |= {"refused": "It does not work.", "too_long_for_plain_torch": [131072], "cut_short": ["graphs: stopped"]}
    lines = not_measured(result)
    assert "ttft: the engine refuses this shape: It does not work." in lines and "graphs: stopped" in lines
    assert any(line.startswith("kernels at 128K: plain torch") for line in lines)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_result_is_written_as_json_and_markdown(tmp_path: Path, device: str) -> None:
    cli.write(made_result(device), tmp_path / "deep" / "name.v1", with_plot=False)
    result = json.loads((tmp_path / "deep" / "name.v1.json").read_text())
    assert {"provenance", "settings", "expectations", "not_measured", *cli.PARTS} <= set(result)
    text = (tmp_path / "deep" / "name.v1.md").read_text()
    for words in ("25%", "Not measured", "5df63a720", "Decode", "sampling ms", "16 of 4K", "between tokens", "TFLOP/s"):
        assert words in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


@pytest.mark.parametrize("lacks", [(), ("ttft", "efficiency", "breakdown")])
def test_a_result_is_plotted_whatever_it_lacks(tmp_path: Path, lacks: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    report.require_matplotlib()
    result = made_result()
    for part in lacks:
        del result[part]
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
