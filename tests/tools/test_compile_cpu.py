"""Which instruction set, which compiler, and when an object is compiled again."""

import os
import stat

import pytest

from scripts import compile_cpu, fork

SKYLAKE = frozenset("fma f16c avx2 avx512f avx512dq avx512bw avx512vl".split())


@pytest.mark.parametrize(
    "flags, isa, name",
    [
        (SKYLAKE | {"avx512_bf16", "avx512_vnni"}, "avx512", "_C"),
        (SKYLAKE, "avx512", "_C_AVX512"),
        (SKYLAKE - {"avx512vl"}, "avx2", "_C_AVX2"),
        (frozenset({"fma", "f16c", "avx2"}), "avx2", "_C_AVX2"),
    ],
)
def test_isa_and_the_name_vllm_imports(flags, isa, name):
    assert compile_cpu.choose_isa(flags).name == isa
    assert compile_cpu.extension_name(flags) == name


def test_a_cpu_without_avx2_is_refused():
    with pytest.raises(fork.ForkError, match="lacks AVX2"):
        compile_cpu.choose_isa(frozenset({"sse4_2", "avx"}))


def test_the_names_agree_with_what_the_release_imports():
    source = (fork.Layout().tree / "vllm/platforms/cpu.py").read_text()
    body = source[source.index("def import_kernels") :]
    order = [body.index(f"import {name}  #") for name in ("vllm._C", "vllm._C_AVX512", "vllm._C_AVX2")]
    assert order == sorted(order)
    assert body.index("_is_avx512_supported") < body.index("_is_avx512_bf16_supported") < order[0]


def test_the_sources_are_the_releases_lists_without_onednn():
    text = (fork.Layout().tree / "cmake/cpu_extension.cmake").read_text()
    for name, ours in (("AVX512", compile_cpu.AVX512_SOURCES), ("AVX2", compile_cpu.AVX2_SOURCES)):
        listed = text.split(f"set(VLLM_EXT_SRC_{name}\n")[1].split(")")[0]
        theirs = {line.strip().strip('"') for line in listed.splitlines() if line.strip().startswith('"')}
        assert theirs - {"csrc/cpu/dnnl_kernels.cpp"} == set(ours)


def test_cpuinfo():
    text = "processor\t: 0\nflags\t\t: fpu avx2\nbugs\t: x\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert compile_cpu.cpu_flags(text) == {"fpu", "avx2"}
    assert compile_cpu.cpu_flags("") == frozenset()


def test_other_machines_are_refused_in_one_sentence():
    compile_cpu.check_machine("Linux", "x86_64")
    for other in (("Darwin", "arm64"), ("Linux", "aarch64")):
        with pytest.raises(fork.ForkError, match=r"Linux on x86-64, and this is \w+ on \w+: build on such"):
            compile_cpu.check_machine(*other)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_no_compiler_says_which_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(fork.ForkError, match=r"No C\+\+ compiler \(g\+\+\): install .*Debian and Ubuntu: g\+\+"):
        compile_cpu.find_compiler()
    script(tmp_path / "g++", "echo 11.4.0")
    with pytest.raises(fork.ForkError, match="is version 11.4.0, and .* needs 12"):
        compile_cpu.find_compiler()
    script(tmp_path / "g++", "echo 13.1.0")
    assert compile_cpu.find_compiler() == (str(tmp_path / "g++"), "13.1.0")


def test_an_object_key_covers_all_that_goes_in():
    base = (b"src", "headers", ["-O2", "-mavx2"], "12.2", "2.13.0")
    others = [
        (b"src2", *base[1:]),
        (base[0], "headers2", *base[2:]),
        (*base[:2], ["-O2 -mavx2"], *base[3:]),
        (*base[:3], "12.3", base[4]),
        (*base[:4], "2.13.1"),
    ]
    keys = {compile_cpu.object_key(*parts) for parts in [base, *others]}
    assert len(keys) == 6
    assert compile_cpu.object_key(*base) in keys


def test_headers_digest_sees_an_edit_and_the_generated_header(tmp_path):
    header = tmp_path / "csrc/cpu/a.hpp"
    header.parent.mkdir(parents=True)
    header.write_text("1")
    first = compile_cpu.headers_digest(tmp_path, "gen")
    assert compile_cpu.headers_digest(tmp_path, "gen2") != first
    (tmp_path / "csrc/cpu/x.cpp").write_text("not a header")
    assert compile_cpu.headers_digest(tmp_path, "gen") == first
    header.write_text("2")
    assert compile_cpu.headers_digest(tmp_path, "gen") != first


def test_a_failed_compile_shows_the_errors_and_leaves_no_object(tmp_path):
    (tmp_path / "bad.cpp").write_text("int f( {")
    target = tmp_path / "objects/key.o"
    with pytest.raises(fork.ForkError, match="bad.cpp does not compile:\n.*error"):
        compile_cpu.compile_one(["g++", "-c", "bad.cpp"], target, tmp_path)
    assert list(target.parent.iterdir()) == []


def test_old_objects_are_forgotten_and_used_ones_kept(tmp_path):
    old, used, new = (tmp_path / f"{n}.o" for n in ("old", "used", "new"))
    for path in (old, used, new):
        path.touch()
    for path in (old, used):
        os.utime(path, (1, 1))
    compile_cpu.prune(tmp_path, {used})
    assert not old.exists() and used.exists() and new.exists()


def test_a_finished_build_needs_no_cache(toy, monkeypatch, tmp_path):
    """What lies in build/ is linked from the sources as they are: no object is made again."""
    monkeypatch.setattr(compile_cpu, "find_torch", lambda python: compile_cpu.Torch("1", tmp_path / "torch"))
    isa = compile_cpu.Isa("toy", frozenset(), (), ("csrc/op.cpp",))
    script(tmp_path / "g++", 'for last; do case $before in -o) echo "$@" > "$last"; esac; before=$last; done')
    monkeypatch.setattr(compile_cpu, "prerequisites", lambda: (isa, "_C", str(tmp_path / "g++"), "12.2.0", "/include"))
    source = toy.tree / "csrc/op.cpp"
    (source.parent / "cpu").mkdir(parents=True)
    source.write_text("one\n")
    (source.parent / "cpu/generate_cpu_attn_dispatch.py").write_text("def generate_header_file():\n    return ''\n")
    library = compile_cpu.build_extension(toy, 1)
    made = library.stat().st_mtime_ns
    assert library.is_file() and len(list((tmp_path / "cache").rglob("*.o"))) == 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert compile_cpu.build_extension(toy, 1).stat().st_mtime_ns == made
    assert not list((tmp_path / "other").rglob("*.o"))
    source.write_text("two\n")
    assert compile_cpu.build_extension(toy, 1).stat().st_mtime_ns > made
    assert len(list((tmp_path / "other").rglob("*.o"))) == 1
