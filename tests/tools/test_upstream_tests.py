"""make test-upstream: which outcomes count as a difference, and what is run."""

from scripts import fork, upstream_tests
from scripts.upstream_tests import FAILED, PASSED, SKIPPED

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.v1.a" name="good"/>
<testcase classname="tests.v1.a" name="bad"><failure message="x">trace</failure></testcase>
<testcase classname="tests.v1.a" name="torn"/>
<testcase classname="tests.v1.a" name="torn"><error message="teardown">trace</error></testcase>
<testcase classname="tests.v1.a" name="left"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.v1.b"><error message="collection failure">trace</error></testcase>
</testsuite></testsuites>"""


def test_outcomes_of_a_junit_file(tmp_path):
    (tmp_path / "r.xml").write_text(JUNIT)
    assert upstream_tests.read_results(tmp_path / "r.xml") == {
        "tests.v1.a::good": PASSED,
        "tests.v1.a::bad": FAILED,
        "tests.v1.a::torn": FAILED,
        "tests.v1.a::left": SKIPPED,
        "::tests.v1.b": FAILED,
    }


def test_only_what_got_worse_or_vanished_is_a_difference():
    release = {"same": PASSED, "broken": PASSED, "gone": PASSED, "both": FAILED, "mended": FAILED, "left": PASSED}
    patched = {"same": PASSED, "broken": FAILED, "both": FAILED, "mended": PASSED, "left": SKIPPED, "new": FAILED}
    assert upstream_tests.differences(release, patched) == [
        ("broken", PASSED, FAILED),
        ("gone", PASSED, "absent"),
        ("left", PASSED, SKIPPED),
        ("new", "absent", FAILED),
    ]
    assert upstream_tests.differences(release, release) == []


def test_every_listed_test_is_in_the_release():
    tests = fork.Layout().pristine / "tests"
    for name, (_, paths) in upstream_tests.GROUPS.items():
        for path in paths:
            assert (tests / path).exists(), f"{name}: {path}"


def test_the_fast_part_is_a_part():
    everything = [path for name in upstream_tests.ALL for path in upstream_tests.GROUPS[name][1]]
    for path in upstream_tests.GROUPS[upstream_tests.FAST][1]:
        assert any(path == other or path.startswith(f"{other}/") for other in everything), path


def test_stand_ins_are_a_hub_cache_that_transformers_reads(tmp_path):
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    hub = upstream_tests.make_stand_ins(tmp_path)
    for name, config in upstream_tests.STAND_INS.items():
        path = try_to_load_from_cache(name, "config.json", cache_dir=hub)
        loaded = AutoConfig.from_pretrained(path)
        assert loaded.architectures == config["architectures"]


def test_the_tests_are_kept_away_from_the_releases_package(toy):
    (toy.pristine / "tests").mkdir(parents=True)
    (toy.pristine / "tests" / "test_a.py").touch()
    (toy.pristine / "vllm").mkdir()
    (toy.pristine / "pyproject.toml").touch()
    root = upstream_tests.copy_tests(toy, toy.build / "upstream")
    assert (root / "tests" / "test_a.py").is_file() and (root / "pyproject.toml").is_file()
    assert not (root / "vllm").exists()
