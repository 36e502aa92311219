"""make source: where files come from and what is refused."""

import tarfile

import pytest

from scripts import fetch_source, fork, package_index

from .conftest import RELEASE, VERSION_FILE, make_sdist


def upstream(toy):
    return fork.read_upstream(toy.root / "UPSTREAM")


def no_index(*_):
    raise AssertionError("asked the package index")


def test_unpacks_once(toy):
    archive = fetch_source.fetch(upstream(toy).sdist, upstream(toy).sdist_sha256, toy)
    assert fetch_source.unpack(archive, upstream(toy), toy) is True
    assert fetch_source.unpack(archive, upstream(toy), toy) is False
    assert (toy.pristine / "vllm/core.py").read_text() == RELEASE["vllm/core.py"]


def test_another_sha256_is_refused_and_named(toy):
    (toy.archives / upstream(toy).sdist).write_bytes(b"something else")
    with pytest.raises(
        fork.ForkError, match=rf"{upstream(toy).sdist}: expected sha256 {upstream(toy).sdist_sha256}.*found"
    ):
        fetch_source.ensure_source(toy, upstream(toy))
    assert not toy.pristine.exists()


def test_a_file_that_changed_after_it_was_verified_is_refused(toy):
    fetch_source.ensure_source(toy, upstream(toy))
    archive = toy.archives / upstream(toy).sdist
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(fork.ForkError, match="expected sha256"):
        fetch_source.ensure_source(toy, upstream(toy))


def test_a_downloaded_file_is_verified_before_it_is_cached(toy, monkeypatch, tmp_path):
    pin = upstream(toy)
    (toy.archives / pin.sdist).unlink()
    monkeypatch.setattr(package_index, "download", lambda project, name, target: target.write_bytes(b"bad"))
    with pytest.raises(fork.ForkError, match="expected sha256"):
        fetch_source.fetch(pin.sdist, pin.sdist_sha256, toy)
    assert not list((tmp_path / "cache").rglob(pin.sdist))


def test_the_cache_serves_a_new_checkout_offline(toy, monkeypatch):
    pin = upstream(toy)
    fetch_source.fetch(pin.sdist, pin.sdist_sha256, toy)
    monkeypatch.setattr(package_index, "download", no_index)
    (toy.archives / pin.sdist).unlink()
    assert fetch_source.fetch(pin.sdist, pin.sdist_sha256, toy).is_file()


def test_a_spoilt_cache_is_refused(toy, tmp_path):
    pin = upstream(toy)
    fetch_source.fetch(pin.sdist, pin.sdist_sha256, toy)
    (cached,) = (tmp_path / "cache").rglob(pin.sdist)
    cached.write_bytes(b"spoilt")
    (toy.archives / pin.sdist).unlink()
    with pytest.raises(fork.ForkError, match="expected sha256"):
        fetch_source.fetch(pin.sdist, pin.sdist_sha256, toy)


def test_another_commit_is_refused(toy):
    other = RELEASE | {"vllm/_version.py": VERSION_FILE.replace("gabc123def", "g999999999")}
    archive = toy.archives / upstream(toy).sdist
    make_sdist(archive, other)
    text = (toy.root / "UPSTREAM").read_text().replace(upstream(toy).sdist_sha256, fork.sha256_file(archive))
    (toy.root / "UPSTREAM").write_text(text)
    with pytest.raises(fork.ForkError, match="expected commit abc123def.*found 999999999"):
        fetch_source.ensure_source(toy, upstream(toy))
    assert not toy.pristine.exists()


def test_the_pin_and_the_version_must_be_complete(toy):
    path = toy.root / "UPSTREAM"
    whole = path.read_text()
    for commit, said in (("", "lacks commit"), ("commit = 1\n", "lacks commit"), ("commit\n", "is not TOML .*line 3")):
        path.write_text(whole.replace('commit = "abc123def"\n', commit))
        with pytest.raises(fork.ForkError, match=said):
            upstream(toy)
    (toy.root / "VERSION").write_text("9.9\n")
    with pytest.raises(fork.ForkError, match="must read like"):
        fork.read_version(toy.root / "VERSION")


def test_package_versions():
    version = fork.Version("0.32.0", 1)
    assert version.package("cuda") == "0.32.0+uniprefill.1"
    assert version.package("cpu") == "0.32.0+uniprefill.1.cpu"


def test_pip_settings_rank_environment_before_files():
    listing = (
        ":env:.index-url='https://env.invalid/simple'\nglobal.index-url='https://global.invalid/simple'\n"
        "download.cert='/etc/a.pem'\nglobal.cert='/etc/b.pem'\nfreeze.timeout='9'\n"
    )
    assert package_index.parse_pip_config(listing) == {
        "index-url": "https://env.invalid/simple",
        "cert": "/etc/a.pem",
    }


def test_finds_the_file_on_an_index_page():
    page = (
        '<a href="../../packages/vllm-1.0.tar.gz.asc">s</a><a href="../../packages/vllm-1.0.tar.gz#sha256=ab">f</a>'
        '<a href="https://files.invalid/vllm-1.0%2Blocal-py3-none-any.whl?t=1#x">w</a>'
    )
    base = "https://index.invalid/simple/vllm/"
    assert package_index.find_link(page, base, "vllm-1.0.tar.gz") == "https://index.invalid/packages/vllm-1.0.tar.gz"
    assert package_index.find_link(page, base, "vllm-1.0+local-py3-none-any.whl").endswith("?t=1")
    assert package_index.find_link(page, base, "vllm-2.0.tar.gz") is None


def test_find_links_and_the_problem_said_when_nothing_offers_a_file(tmp_path):
    (tmp_path / "vllm-1.tar.gz").write_bytes(b"archive")
    config = {"index-url": "https://127.0.0.1:9/none", "find-links": str(tmp_path), "timeout": "1"}
    assert package_index.locate("vllm", "vllm-1.tar.gz", config) == (tmp_path / "vllm-1.tar.gz").as_uri()
    with pytest.raises(fork.ForkError, match="offers vllm-2.tar.gz .*pip config list"):
        package_index.locate("vllm", "vllm-2.tar.gz", config)


def test_unpacks_with_a_python_that_has_no_extraction_filters(toy, monkeypatch):
    """Debian 12's Python is 3.11.2, and filters came with 3.11.4."""
    plain, data_filter = tarfile.TarFile.extractall, tarfile.data_filter
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: plain(self, path, filter=data_filter))
    archive = fetch_source.fetch(upstream(toy).sdist, upstream(toy).sdist_sha256, toy)
    assert fetch_source.unpack(archive, upstream(toy), toy) is True
    assert (toy.pristine / "vllm/core.py").read_text() == RELEASE["vllm/core.py"]
