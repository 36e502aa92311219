"""Run vLLM's own CPU tests, unmodified, on the release and on the patched package.

What passes on the release must pass here: the difference is printed and must be empty. What
fails on both (a hub download, a missing GPU) is listed. On a CPU the release itself needs the
platform section of the series to run, so "the release" is the sdist with that section only.
Results of the release are kept in build/upstream and reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

from scripts import tree, wheels
from scripts.fork import ForkError, Layout, read_series, read_upstream, read_version, run_main, say

# group -> (pytest options, paths below tests/)
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "core": (["-m", "cpu_test"], ["v1/core"]),
    "core-unmarked": (
        [],
        [
            "v1/core/test_contiguous_kv_packing.py",
            "v1/core/test_kv_cache_metrics.py",
            "v1/core/test_output.py",
            "v1/core/test_prefix_replay.py",
            "v1/core/test_swa_inflight_window_free.py",
            "v1/core/test_priority_preemption_bug.py",
            "v1/core/prefix_cache",
        ],
    ),
    "v1": (
        [],
        [
            "v1/test_kv_cache_spec_registry.py",
            "v1/test_serial_utils.py",
            "v1/test_outputs.py",
            "v1/test_request.py",
            "v1/structured_output",
            "v1/cudagraph/test_cudagraph_manager.py",
        ],
    ),
    "metrics-connectors": (["-m", "cpu_test"], ["v1/metrics", "v1/kv_connector/unit"]),
    "config": (
        [],
        [
            "engine/test_arg_utils.py",
            "test_config.py",
            "config",
            "test_sampling_params.py",
            "v1/engine/test_engine_args.py",
            "v1/engine/test_kv_cache_group_metadata.py",
            "v1/engine/test_admission_control.py",
        ],
    ),
    "attention": (
        [],
        [
            "v1/attention/test_attention_splitting.py",
            "v1/attention/test_batch_reordering.py",
            "v1/attention/test_group_sliding_window.py",
            "v1/attention/test_group_head_counts.py",
        ],
    ),
    "cpu-attention": ([], ["kernels/attention/test_cpu_attn.py"]),
    "worker": (
        [],
        [
            "v1/worker/test_gpu_batch_ordering.py",
            "v1/worker/test_eagle3_aux_hidden_states_pp.py",
            "v1/spec_decode/test_ngram.py",
        ],
    ),
}
# The part of the above that CI runs (tests/installed/test_upstream.py): a minute each on two cores,
# and close to what the series hooks into.
FAST = "fast"
GROUPS[FAST] = (
    [],
    [
        "v1/core/test_priority_preemption_bug.py",
        "v1/core/test_swa_inflight_window_free.py",
        "v1/test_kv_cache_spec_registry.py",
        "v1/test_request.py",
        "v1/engine/test_admission_control.py",
        "v1/attention/test_attention_splitting.py",
        "v1/attention/test_group_sliding_window.py",
        "v1/worker/test_gpu_batch_ordering.py",
    ],
)
ALL = tuple(name for name in GROUPS if name != FAST)

# Most scheduler tests want no more of a model than its config.json, and would fetch it. Offline
# these stand in for it: the published shapes, without weights or tokenizer.
_OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "torch_dtype": "float16", "vocab_size": 50272}
_OPT |= {"max_position_embeddings": 2048, "activation_function": "relu", "bos_token_id": 2, "eos_token_id": 2}
_GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_GPT2 |= {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "bos_token_id": 50256, "eos_token_id": 50256}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16"}
_QWEN3 |= {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
_QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
_QWEN3 |= {"rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu"}
STAND_INS: dict[str, dict[str, object]] = {
    "facebook/opt-125m": _OPT
    | {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"word_embed_proj_dim": 768, "do_layer_norm_before": True},
    "facebook/opt-350m": _OPT
    | {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
    "openai-community/gpt2": _GPT2 | {"n_layer": 12},
    "distilbert/distilgpt2": _GPT2 | {"n_layer": 6},
    "Qwen/Qwen3-0.6B": _QWEN3,
}

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def read_results(xml: Path) -> dict[str, str]:
    """Test -> outcome, from a junit file; a collection error counts as a failed test."""
    results: dict[str, str] = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        outcome = FAILED if kinds & {"failure", "error"} else SKIPPED if "skipped" in kinds else PASSED
        if results.get(name) != FAILED:
            results[name] = outcome
    return results


def differences(release: dict[str, str], patched: dict[str, str]) -> list[tuple[str, str, str]]:
    """Tests whose outcome is not what it is on the release, but for those mended here."""
    found = []
    for name in sorted(release.keys() | patched.keys()):
        before, after = release.get(name, "absent"), patched.get(name, "absent")
        if before != after and not (before == FAILED and after == PASSED):
            found.append((name, before, after))
    return found


def make_release(layout: Layout, folder: Path) -> Path:
    """The release with the platform section only, unpacked and ready for PYTHONPATH."""
    upstream = read_upstream(layout.root / "UPSTREAM")
    names = {name for name, area in read_series(layout.series) if area == "platform"}
    patches = [patch for patch in tree.load_series(layout) if patch.name in names]
    steps = tree.apply_series(patches, layout.pristine)
    bases = [*(layout.build / "cpu").glob("vllm-*.whl")]
    if not bases:
        raise ForkError("There is no CPU build: run `make build DEVICE=cpu` first.")
    changes = {p: None if t is None else t.encode() for p, t in steps.final.items() if p.startswith("vllm/")}
    pristine = {p: None if t is None else t.encode() for p, t in steps.first.items() if p in changes}
    wheel = wheels.rebuild(bases[0], folder, f"{upstream.version}+cpu", changes, pristine, {"patched": False})
    target = folder / "release"
    shutil.rmtree(target, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def copy_tests(layout: Layout, folder: Path) -> Path:
    """The release's tests away from its package, which would be imported instead of ours."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    shutil.copytree(layout.pristine / "tests", root / "tests")
    shutil.copy(layout.pristine / "pyproject.toml", root)
    for name in ("benchmarks", "examples", "requirements"):
        if (layout.pristine / name).is_dir():
            shutil.copytree(layout.pristine / name, root / name)
    return root


def make_stand_ins(folder: Path) -> Path:
    """A hub cache that holds the stand-ins."""
    hub = folder / "hub"
    for name, config in STAND_INS.items():
        commit = hashlib.sha1(name.encode()).hexdigest()
        model = hub / f"models--{name.replace('/', '--')}"
        (model / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (model / "snapshots" / commit / "config.json").write_text(json.dumps(config, indent=2))
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)
    return hub


def run_group(name: str, root: Path, xml: Path, release: Path | None, timeout: int, hub: Path | None) -> dict[str, str]:
    options, paths = GROUPS[name]
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    if release:
        env["PYTHONPATH"] = str(release)
    if hub:
        env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    xml.parent.mkdir(parents=True, exist_ok=True)
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    command += [f"--junitxml={xml}", "-o", "junit_family=xunit1", f"--timeout={timeout}", "-W", "ignore"]
    command += ["--continue-on-collection-errors", *options, *(f"tests/{p}" for p in paths)]
    log = xml.with_suffix(".log")
    with log.open("w") as out:
        subprocess.run(command, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT)
    if not xml.is_file():
        raise ForkError(f"The tests of group {name} did not run to their end: see {log}.")
    return read_results(xml)


def tally(results: dict[str, str]) -> str:
    values = list(results.values())
    return ", ".join(f"{values.count(kind)} {kind}" for kind in (PASSED, FAILED, SKIPPED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all but {FAST}")
    parser.add_argument("--fast", action="store_true", help="only the part that CI runs")
    parser.add_argument(
        "--hub", action="store_true", help="let tests download models (default: offline, with configs standing in)"
    )
    parser.add_argument("--timeout", type=int, default=300, help="seconds a test may take (default 300)")
    parser.add_argument("--fresh", action="store_true", help="run the release again, too")
    args = parser.parse_args()
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        raise ForkError(f"Unknown group {unknown[0]}: use {', '.join(GROUPS)}.")
    names = args.groups or ([FAST] if args.fast else list(ALL))

    layout = Layout()
    folder = layout.build / "upstream"
    upstream = read_upstream()
    platform = [name for name, area in read_series(layout.series) if area == "platform"]
    key = hashlib.sha256(upstream.sdist_sha256.encode())
    for name in platform:
        key.update((layout.patches / name).read_bytes())
    key.update(f"{args.timeout} {args.hub} {sys.version_info[:2]}".encode())
    say("preparing the release and its tests")
    release, root = make_release(layout, folder), copy_tests(layout, folder)
    hub = None if args.hub else make_stand_ins(folder)

    release_results: dict[str, str] = {}
    patched_results: dict[str, str] = {}
    for name in names:
        group = key.copy()
        group.update(json.dumps([GROUPS[name], STAND_INS]).encode())
        kept = folder / "results" / f"{name}-{group.hexdigest()[:16]}.json"
        if kept.is_file() and not args.fresh:
            found = json.loads(kept.read_text())
            say(f"{name}: release: {tally(found)} (kept from an earlier run)")
        else:
            found = run_group(name, root, folder / "results" / f"{name}-release.xml", release, args.timeout, hub)
            kept.write_text(json.dumps(found))
            say(f"{name}: release: {tally(found)}")
        release_results |= found
        ours = run_group(name, root, folder / "results" / f"{name}-patched.xml", None, args.timeout, hub)
        say(f"{name}: patched: {tally(ours)}")
        patched_results |= ours

    both = [n for n, outcome in patched_results.items() if outcome == FAILED and release_results.get(n) == FAILED]
    if both:
        print(f"\nFail on the release and here ({len(both)}):")
        for name in sorted(both):
            print(f"  {name}")
    found = differences(release_results, patched_results)
    print(f"\nvLLM {upstream.version}, {read_version().package('cpu')}; groups: {', '.join(names)}")
    print(f"release: {tally(release_results)}\npatched: {tally(patched_results)}")
    print(f"difference: {len(found) or 'none'}")
    for name, before, after in found:
        print(f"  {name}: {before} on the release, {after} here")
    return 1 if found or not patched_results else 0


if __name__ == "__main__":
    run_main(main)
