"""Compile vLLM's C++ CPU backend for this machine with g++ alone.

The release builds it with CMake, oneDNN and libnuma; here torch's own matmul stands in for
oneDNN (platform-build-cpu-without-onednn.patch) and memory is not bound to NUMA nodes.
Objects are kept in the user's cache under a hash of all that went into them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from scripts.fork import ForkError, Layout, cache_dir, run_main, say, write_if_changed

# VLLM_EXT_SRC_AVX2 of cmake/cpu_extension.cmake without dnnl_kernels.cpp, slowest first
AVX2_SOURCES = (
    "csrc/cpu/cpu_attn.cpp",
    "csrc/cpu/cpu_fused_moe.cpp",
    "csrc/cpu/torch_bindings.cpp",
    "csrc/cpu/mla_decode.cpp",
    "csrc/cpu/sgl-kernels/fla.cpp",
    "csrc/cpu/mamba_cpu.cpp",
    "csrc/cpu/dynamic_4bit_int_moe_cpu.cpp",
    "csrc/cpu/pos_encoding.cpp",
    "csrc/cpu/layernorm.cpp",
    "csrc/cpu/activation.cpp",
    "csrc/cpu/sampling_kernels.cpp",
    "csrc/cpu/spec_decode_utils.cpp",
    "csrc/cpu/utils.cpp",
    "csrc/cpu/cpu_isa.cpp",
)
# VLLM_EXT_SRC_AVX512 adds these
AVX512_SOURCES = ("csrc/cpu/cpu_wna16.cpp", "csrc/cpu/shm.cpp", *AVX2_SOURCES)

COMMON_FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fopenmp",
    "-w",
    "-DVLLM_CPU_EXTENSION",
    "-DTORCH_EXTENSION_NAME=_C",
    "-DPy_LIMITED_API=0x030B0000",
    "-DVLLM_NUMA_DISABLED",
    "-DVLLM_ONEDNN_DISABLED",
    "-mf16c",
    "-mfma",
)


@dataclass(frozen=True)
class Isa:
    """One instruction set: how to compile for it and what vLLM imports on such a machine."""

    name: str
    needs: frozenset[str]  # /proc/cpuinfo flags
    flags: tuple[str, ...]
    sources: tuple[str, ...]


AVX2 = Isa("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2",), AVX2_SOURCES)
AVX512 = Isa(
    "avx512",
    frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma", "f16c"}),
    ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
    AVX512_SOURCES,
)


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def choose_isa(flags: frozenset[str]) -> Isa:
    for isa in (AVX512, AVX2):
        if isa.needs <= flags:
            return isa
    raise ForkError(
        "This CPU lacks AVX2 (with FMA and F16C), which vLLM's CPU backend needs: "
        "build on a newer machine or with DEVICE=cuda."
    )


def extension_name(flags: frozenset[str]) -> str:
    """The library vllm/platforms/cpu.py imports on this machine (CpuPlatform.import_kernels)."""
    if not AVX512.needs <= flags:
        return "_C_AVX2"
    return "_C" if "avx512_bf16" in flags else "_C_AVX512"


def check_machine(system: str, machine: str) -> None:
    if (system, machine) != ("Linux", "x86_64"):
        raise ForkError(
            f"The CPU build is made for Linux on x86-64, and this is {system} on {machine}: build on such a machine."
        )


def find_compiler() -> tuple[str, str]:
    """g++ (or $CXX) and its version line."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if not path:
        raise ForkError(
            f"No C++ compiler ({name}): install g++ 12.3 or newer (Debian and Ubuntu: g++; Fedora: "
            "gcc-c++), or set CXX."
        )
    done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True)
    found = done.stdout.strip()
    if done.returncode or not found[:1].isdigit():
        raise ForkError(f"{name} does not tell its version; set CXX to g++ 12 or newer.")
    if int(found.split(".")[0]) < 12:
        raise ForkError(
            f"{name} is version {found}, and vLLM's CPU backend needs 12 or newer: install a newer "
            "g++ (Debian and Ubuntu: g++-12) and set CXX to it."
        )
    return path, found


def python_include() -> str:
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").is_file():
        raise ForkError(
            "This Python's headers (Python.h) are missing: install them (Debian and Ubuntu: "
            "python3-dev; Fedora: python3-devel)."
        )
    return include


@dataclass(frozen=True)
class Torch:
    version: str
    root: Path

    @property
    def includes(self) -> list[str]:
        base = self.root / "include"
        return [str(base), str(base / "torch" / "csrc" / "api" / "include")]

    @property
    def gomp(self) -> Path | None:
        """The OpenMP runtime that torch ships; ours must be the same one."""
        for folder in (self.root / "lib", self.root.parent / "torch.libs"):
            for path in sorted(folder.glob("libgomp*.so*")):
                return path
        return None


def find_torch(python: Path) -> Torch:
    """Where torch is, without the seconds its import takes."""
    code = (
        "import importlib.metadata as m, importlib.util as u;"
        "print(m.version('torch')); print(u.find_spec('torch').origin)"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ForkError("torch is missing from build/venv; delete build/venv and `make build`.")
    version, origin = done.stdout.split("\n")[:2]
    return Torch(version, Path(origin).parent)


def headers_digest(tree: Path, generated: str) -> str:
    digest = hashlib.sha256(generated.encode())
    for path in sorted((tree / "csrc").rglob("*.h*")):
        if path.suffix in (".h", ".hpp") and not path.name.endswith("_generated.h"):
            digest.update(path.relative_to(tree).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def object_key(source: bytes, headers: str, flags: list[str], compiler: str, torch: str) -> str:
    digest = hashlib.sha256()
    for part in (source, headers.encode(), "\0".join(flags).encode(), compiler.encode(), torch.encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def compile_one(command: list[str], target: Path, cwd: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.part.o")
    try:
        done = subprocess.run([*command, "-o", str(partial)], cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            source = command[-1]
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            shown = "\n".join(errors[:10]) or done.stderr[-2000:]
            raise ForkError(f"{source} does not compile:\n{shown}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def default_jobs() -> int:
    """One g++ a core, but each takes up to 2 GiB."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 31
    return max(1, min(cores, memory))


def prune(folder: Path, keep: set[Path], days: float = 30) -> None:
    """Forget objects nobody used for a month."""
    import time

    for path in folder.glob("*.o"):
        if path not in keep and path.stat().st_mtime < time.time() - days * 86400:
            path.unlink(missing_ok=True)


def prerequisites() -> tuple[Isa, str, str, str, str]:
    """Instruction set, extension's name, compiler, its version, Python's headers; or what to install."""
    check_machine(platform.system(), platform.machine())
    found = cpu_flags(Path("/proc/cpuinfo").read_text())
    return choose_isa(found), extension_name(found), *find_compiler(), python_include()


def build_extension(layout: Layout, jobs: int, cache: Path | None = None) -> Path:
    """The compiled library in build/cpu/, named as vLLM imports it here."""
    isa, name, compiler, compiler_version, include = prerequisites()
    torch = find_torch(layout.python)

    work = layout.build / "cpu"
    generator = runpy.run_path(str(layout.tree / "csrc/cpu/generate_cpu_attn_dispatch.py"))
    header = generator["generate_header_file"]()
    write_if_changed(work / "include" / "cpu_attn_dispatch_generated.h", header.encode())

    flags = [*COMMON_FLAGS, *isa.flags]
    if int(compiler_version.split(".")[0]) >= 15:
        flags.append("-fno-tree-pre")  # as cmake/cpu_extension.cmake: a GCC 15 optimiser crash
    # the limited API is the same for every Python, so its version stays out of the key
    headers = headers_digest(layout.tree, header)
    objects = (cache or cache_dir()) / "objects"
    targets: dict[str, Path] = {}
    for source in isa.sources:
        data = (layout.tree / source).read_bytes()
        key = object_key(data, headers, flags, compiler_version, torch.version)
        targets[source] = objects / f"{key}.o"
    stamp = hashlib.sha256("\0".join(sorted(t.name for t in targets.values())).encode()).hexdigest()
    library, stamp_file = work / f"{name}.abi3.so", work / "linked"
    if library.is_file() and stamp_file.is_file() and stamp_file.read_text() == stamp:
        return library
    missing = [source for source, target in targets.items() if not target.is_file()]

    command = [compiler, *flags, "-Icsrc", "-Icsrc/cpu", f"-I{work / 'include'}"]
    command += [f"-isystem{folder}" for folder in (*torch.includes, include)]
    if missing:
        say(f"compiling {len(missing)} of {len(targets)} C++ sources for {isa.name}, {jobs} at a time")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(compile_one, [*command, "-c", source], targets[source], layout.tree): source
            for source in missing
        }
        try:
            for number, done in enumerate(concurrent.futures.as_completed(running), 1):
                done.result()
                say(f"  {number}/{len(missing)} {running[done]}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for target in targets.values():
        os.utime(target)
    prune(objects, set(targets.values()))

    for old in work.glob("_C*.so"):
        old.unlink()
    lib = torch.root / "lib"
    link = [compiler, "-shared", "-o", str(library), *map(str, targets.values()), f"-L{lib}"]
    link += ["-ltorch", "-ltorch_cpu", "-lc10", "-lrt"]
    link += [str(torch.gomp)] if torch.gomp else ["-lgomp"]
    link += ["-Wl,-rpath,$ORIGIN/../torch/lib:$ORIGIN/../torch.libs", "-Wl,--no-undefined-version"]
    done = subprocess.run(link, capture_output=True, text=True)
    if done.returncode:
        raise ForkError(f"Linking {library.name} failed:\n{done.stderr[-2000:]}")
    stamp_file.write_text(stamp)
    say(f"linked {library.name} ({library.stat().st_size >> 20} MiB)")
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=default_jobs(), help="g++ processes at a time")
    args = parser.parse_args()
    print(build_extension(Layout(), args.jobs))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
