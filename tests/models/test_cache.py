"""Compiled code is kept and read only where nobody else can write."""

import os
from pathlib import Path

import pytest

from models.gpu.cache import private


def planted(folder: Path) -> None:
    (folder / "xy").mkdir()
    (folder / "xy" / "kernel.so").write_bytes(b"code")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def test_a_cache_of_our_own_is_kept_with_all_that_is_in_it(folder):
    before = os.umask(0)
    try:
        assert private(folder / "inductor") == folder / "inductor"
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "inductor")] == [0o700, 0o700]
    planted(folder)
    assert private(folder) == folder


def writable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def below_a_writable_one(folder: Path) -> None:
    folder.mkdir()
    folder.parent.chmod(0o777)


def of_somebody_else(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 12345, 12345)


def with_a_file_of_somebody_else(folder: Path) -> None:
    folder.mkdir()
    planted(folder)
    os.chown(folder / "xy" / "kernel.so", 12345, 12345)


def with_a_link(folder: Path) -> None:
    folder.mkdir()
    (folder / "kernel.so").symlink_to(folder.parent / "kernel.so")


def no_folder(folder: Path) -> None:
    folder.write_text("")


@pytest.mark.parametrize(
    "make",
    [writable, below_a_writable_one, of_somebody_else, with_a_file_of_somebody_else, with_a_link, no_folder],
)
def test_where_others_could_have_written_a_fresh_one_serves_and_the_log_says_why(folder, make, caplog, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(folder.parent))
    if "somebody" in make.__name__ and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    make(folder)
    found = private(folder)
    assert found != folder
    assert (found.stat().st_mode & 0o777, list(found.iterdir())) == (0o700, [])
    assert str(folder) in caplog.text
