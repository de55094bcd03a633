"""Hashes of files are remembered for as long as the file system says that nothing has changed, and no longer."""

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import xxhash

from upcycle import hashes
from upcycle.disk import CACHE, cache_folder
from upcycle.errors import UpcycleError
from upcycle.hashes import REMEMBERED_FROM, VERIFY, XXH3, hash_file, hash_files
from upcycle.pipeline.manifest import open_partial, seal, verified

CONTENT = bytes(range(256)) * (REMEMBERED_FROM // 256)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VERIFY, raising=False)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_NS", -(10**18))  # as if every file had been written long ago


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read, rather than remembered."""
    found: list[str] = []
    reading = hashes._read

    def watched(file: hashes.FileIO, algorithm: str) -> str:
        found.append(str(file.name))
        return reading(file, algorithm)

    monkeypatch.setattr(hashes, "_read", watched)
    return found


def test_a_file_that_has_not_changed_is_read_once(file: Path, read: list[str]) -> None:
    expected = xxhash.xxh3_128(CONTENT).hexdigest()
    assert [hash_file(file, XXH3) for _ in range(3)] == [expected] * 3
    assert read == [str(file)]
    hash_file(file)  # another algorithm
    assert len(read) == 2


def test_a_folder_may_be_renamed(tmp_path: Path, read: list[str]) -> None:
    """As a stage's is when it is complete: the next verb has nothing to read."""
    folder = tmp_path / "assemble"
    partial = open_partial(folder, {}, update=False)
    (partial / "weights").write_bytes(CONTENT)
    seal(partial, folder, {}, {}, 0)
    read.clear()
    assert verified(folder) is not None
    assert [Path(name).name for name in read] == []


def test_other_content_of_the_same_size_and_time_is_seen(file: Path, read: list[str]) -> None:
    """A program may set the time of writing back, not that of change."""
    before, first = file.stat(), hash_file(file, XXH3)
    with file.open("r+b") as opened:
        opened.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hash_file(file, XXH3) != first
    assert len(read) == 2


def test_another_file_in_its_place_is_seen(file: Path) -> None:
    first, other = hash_file(file, XXH3), file.with_name("other")
    other.write_bytes(CONTENT[::-1])
    other.replace(file)
    assert hash_file(file, XXH3) != first


def test_a_file_that_has_just_changed_is_not_remembered(
    file: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again under the same time."""
    monkeypatch.setattr(hashes, "SETTLED_NS", 3600 * 10**9)
    hash_file(file, XXH3)
    hash_file(file, XXH3)
    assert len(read) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    file: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = hashes._read

    def changing(opened: hashes.FileIO, algorithm: str) -> str:
        found = reading(opened, algorithm)
        os.utime(file)
        return found

    monkeypatch.setattr(hashes, "_read", changing)
    hash_file(file, XXH3)
    hash_file(file, XXH3)
    assert len(read) == 2


def test_everything_is_read_on_request(file: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hash_file(file, XXH3)
    monkeypatch.setenv(VERIFY, "0")
    hash_file(file, XXH3)
    assert len(read) == 1
    hashes.verify_in_full()
    hash_file(file, XXH3)
    assert len(read) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"0" * 32, b"0" * 32 + b" " + b"0" * 64, None])
def test_a_damaged_entry_is_passed_over_and_written_anew(damage: bytes | None, file: Path, read: list[str]) -> None:
    expected = hash_file(file, XXH3)
    (entry,) = (cache_folder() / "hashes").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes((b"1" if whole[:1] == b"0" else b"0") + whole[1:] if damage is None else damage)
    assert hash_file(file, XXH3) == expected
    assert len(read) == 2
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("place", ["a file", "a file/under"])
def test_a_cache_that_cannot_be_written_is_done_without(
    place: str, file: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / place))
    assert hash_file(file, XXH3) == hash_file(file, XXH3)
    assert len(read) == 2


def test_small_files_are_not_worth_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    hash_file(path, XXH3)
    assert not cache_folder().exists()


def test_hashes_that_are_left_early_can_be_closed_in_a_thread_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector closes an abandoned generator in whichever thread it runs."""
    wrong: list[BaseException] = []
    left, closed = threading.Event(), threading.Event()

    def hashed(path: Path, _: str) -> str:
        if path.name == "second":
            left.wait()
            try:
                hashes.close()  # type: ignore[attr-defined]
            except BaseException as error:
                wrong.append(error)
            closed.set()
        return path.name

    monkeypatch.setattr("upcycle.hashes.hash_file", hashed)
    hashes = hash_files([tmp_path / "first", tmp_path / "second"])
    assert next(hashes) == "first"
    left.set()
    assert closed.wait(10)
    assert wrong == []


def _hash_often(paths: list[Path], expected: list[str]) -> None:
    for _ in range(20):
        assert list(hash_files(paths, XXH3)) == expected


def test_two_processes_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"shard-{i}" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(CONTENT[i:] + CONTENT[:i])
    expected = [xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in paths]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_hash_often, args=(paths, expected)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((cache_folder() / "hashes").iterdir())) == len(paths)  # and nothing half written


def test_damage_is_named_where_the_file_system_tells_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "assemble"
    partial = open_partial(folder, {}, update=False)
    (partial / "weights").write_bytes(CONTENT)
    seal(partial, folder, {}, {}, 0)
    assert verified(folder) is not None
    with (folder / "weights").open("r+b") as opened:
        opened.write(b"x")
    with pytest.raises(UpcycleError, match="weights has other content than when it was written"):
        verified(folder)
