import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import pytest

from recap_ds.config import DataConfig
from recap_ds.data import cache as module
from recap_ds.data import fetch
from recap_ds.data.cache import ShardCache
from recap_ds.data.fetch import FileLost
from recap_ds.data.manifest import ShardEntry
from recap_ds.data.remote import open_origin
from recap_ds.errors import RunFailed, UsageError
from tests.data.shard_server import serve
from tests.distributed.harness import REPOSITORY

SIZE = 100_000


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    with serve(tmp_path / "store") as server:
        yield server


def put(store, number: int, size: int = SIZE) -> ShardEntry:
    data = os.urandom(size)
    name = f"demo-{number:06d}.tar"
    (store.folder / name).write_bytes(data)
    return ShardEntry(name=name, source="demo", num_samples=1, bytes=size, sha256=hashlib.sha256(data).hexdigest())


def cache_of(tmp_path, num_shards: float = 100, patience_seconds: float = 30.0) -> ShardCache:
    cache = ShardCache(tmp_path / "cache", int(num_shards * SIZE), patience_seconds)
    cache.prepare()
    return cache


def read(cache: ShardCache, store, entry: ShardEntry) -> bytes:
    descriptor = cache.open(open_origin(store.url), entry)
    try:
        return os.pread(descriptor, entry.bytes + 1, 0)
    finally:
        os.close(descriptor)


def kept(cache: ShardCache) -> set[str]:
    """Checksums of the shards in the cache, each of which must be that of its bytes."""
    names = {path.stem for path in cache.shards.glob("*.tar")}
    assert {hashlib.sha256((cache.shards / f"{name}.tar").read_bytes()).hexdigest() for name in names} == names
    assert not list(cache.shards.glob("*.part"))
    return names


def test_the_settings_say_where_and_how_much():
    data = DataConfig(cache_folder="~/here", max_cache_gib=0.5, fetch_patience_seconds=7)
    assert ShardCache.of(data) == ShardCache(module.Path.home() / "here", 2**29, 7)
    assert ShardCache.of(DataConfig()).folder == module.Path.home() / ".cache" / "recap_ds"


def test_a_shard_is_fetched_once_and_checked(tmp_path, store):
    cache, entry = cache_of(tmp_path), put(store, 0)
    for _ in range(3):
        assert read(cache, store, entry) == (store.folder / entry.name).read_bytes()
    assert store.requests == {entry.name: 1} and kept(cache) == {entry.sha256}


def test_broken_transfers_are_tried_again(tmp_path, store, capfd):
    cache, entries = cache_of(tmp_path), [put(store, number) for number in range(12)]
    store.drop_every, store.truncate = 3, {entries[4].name}
    for entry in entries:
        assert read(cache, store, entry) == (store.folder / entry.name).read_bytes()
    assert kept(cache) == {entry.sha256 for entry in entries}
    assert store.requests.total() > 15
    assert capfd.readouterr().err == ""  # nothing to worry about


def test_what_is_not_there_or_always_wrong_is_lost(tmp_path, store):
    cache, entry = cache_of(tmp_path), put(store, 0)
    path = store.folder / entry.name
    whole = path.read_bytes()
    for data, what in (
        (whole[:-1], r"99999 of 100000 bytes came, 3 times"),
        (whole + b"x", r"more than 100000 of 100000 bytes came, 3 times"),
        (bytes([whole[0] ^ 1]) + whole[1:], r"its sha256 is not the one in the manifest, 3 times"),
    ):
        path.write_bytes(data)
        with pytest.raises(FileLost, match=rf"^demo-000000\.tar: {what}$"):
            read(cache, store, entry)
    path.unlink()
    store.requests.clear()
    with pytest.raises(FileLost, match=r"demo-000000\.tar: the server says 404"):
        read(cache, store, entry)
    assert store.requests.total() == 1 and kept(cache) == set()


def test_an_outage_ends_the_run_in_one_line_and_a_refusal_at_once(tmp_path, store, capfd):
    cache, entry = cache_of(tmp_path, patience_seconds=1.5), put(store, 0)
    store.answers[entry.name] = 503
    with pytest.raises(
        RunFailed, match=r"demo-000000.tar could not be fetched, \d+ times within 1.5 s .*503"
    ) as caught:
        read(cache, store, entry)
    assert "\n" not in str(caught.value) and store.url in str(caught.value)
    assert "the server says 503" in capfd.readouterr().err.splitlines()[0]
    store.requests.clear()
    store.answers[entry.name] = 403
    with pytest.raises(RunFailed, match=r"demo-000000.tar cannot be had: the server says 403"):
        read(cache, store, entry)
    assert store.requests.total() == 1 and kept(cache) == set()


def test_the_least_recently_used_make_room(tmp_path, store):
    cache = cache_of(tmp_path, num_shards=3.5)
    a, b, c, d, e = (put(store, number) for number in range(5))
    for entry in (a, b, c, a, d):
        read(cache, store, entry)
    assert kept(cache) == {entry.sha256 for entry in (a, c, d)}
    in_use = cache.open(open_origin(store.url), c)
    for entry in (d, a, e, b):
        read(cache, store, entry)
    assert kept(cache) == {entry.sha256 for entry in (c, e, b)}
    os.close(in_use)
    read(cache, store, a)
    assert kept(cache) == {entry.sha256 for entry in (e, b, a)}


def test_where_all_are_read_the_limit_gives_way(tmp_path, store):
    cache = cache_of(tmp_path, num_shards=1)
    entries = [put(store, number) for number in range(3)]
    in_use = [cache.open(open_origin(store.url), entry) for entry in entries]
    assert len(kept(cache)) == 3
    for descriptor in in_use:
        os.close(descriptor)
    read(cache, store, put(store, 3))
    assert len(kept(cache)) == 1


def test_a_shard_on_its_way_counts_in_full(tmp_path, store):
    """Two that are fetched at the same time must not both take the last place."""
    cache = cache_of(tmp_path, num_shards=2.5)
    a, b, c = (put(store, number) for number in range(3))
    read(cache, store, a)
    sizes = []

    class Slow:
        place = "slow"

        def read(self, name):
            yield (store.folder / name).read_bytes()[:10]
            read(cache, store, c)  # by somebody else, meanwhile
            sizes.append(sum(path.stat().st_size for path in cache.shards.iterdir()))
            yield (store.folder / name).read_bytes()[10:]

    os.close(cache.open(Slow(), b))
    assert sizes == [2 * SIZE] and kept(cache) == {b.sha256, c.sha256}


def test_a_copy_that_went_bad_on_the_disk_is_fetched_again(tmp_path, store):
    cache, entry = cache_of(tmp_path), put(store, 0)
    read(cache, store, entry)
    assert not cache.drop_if_changed(entry)
    path = cache.path_of(entry)
    os.truncate(path, SIZE - 1)  # seen when it is opened
    assert len(read(cache, store, entry)) == SIZE
    with open(path, "r+b") as file:
        file.write(b"damage")
    assert cache.drop_if_changed(entry) and not path.exists() and cache.drop_if_changed(entry)
    assert len(read(cache, store, entry)) == SIZE and kept(cache) == {entry.sha256}
    shutil.rmtree(cache.folder)
    assert len(read(cache, store, entry)) == SIZE and kept(cache) == {entry.sha256}


FETCH = """
import json, sys
from pathlib import Path
from recap_ds.data.cache import ShardCache
from recap_ds.data.manifest import ShardEntry
from recap_ds.data.remote import open_origin
cache = ShardCache(Path(sys.argv[1]), 10**9, 30.0)
for entry in json.loads(sys.argv[3]):
    cache.open(open_origin(sys.argv[2]), ShardEntry(**entry))
print("done")
"""


def start_fetching(cache: ShardCache, place: str, entries: list[ShardEntry]) -> subprocess.Popen:
    listed = json.dumps([entry.model_dump() for entry in entries])
    command = [sys.executable, "-c", FETCH, str(cache.folder), place, listed]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_processes_share_what_they_fetch(tmp_path, store):
    cache, entries = cache_of(tmp_path), [put(store, number) for number in range(12)]
    store.drop_every, store.truncate = 10, {entries[7].name}
    ranks = [start_fetching(cache, store.url, entries[::step]) for step in (1, -1)]
    assert [rank.communicate()[0] for rank in ranks] == ["done\n"] * 2
    assert kept(cache) == {entry.sha256 for entry in entries}
    # Each once, but for the connections dropped, the answer cut short, and its second.
    assert store.requests.total() <= 12 + 12 // 10 + 2


def test_what_a_killed_process_was_fetching_is_fetched_by_another(tmp_path, store):
    cache, entry = cache_of(tmp_path, num_shards=1), put(store, 0)
    killed = start_fetching(cache, "pipe:printf something; sleep 600 {name}", [entry])
    part = cache.path_of(entry).with_suffix(".part")
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes()[:1]):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    waiting = ThreadPoolExecutor(1).submit(read, cache, store, entry)
    assert not waiting.done()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(waiting.result(timeout=120)) == SIZE and kept(cache) == {entry.sha256}
    # And where nobody wants it any more, it is swept away with the next one.
    part.write_bytes(b"half")
    read(cache, store, put(store, 1))
    assert not part.exists() and len(kept(cache)) == 1


def test_a_fetch_that_is_interrupted_leaves_nothing(tmp_path, store, monkeypatch):
    cache, entry = cache_of(tmp_path), put(store, 0)
    for error, kind, message in (
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            RunFailed,
            r"No space left on device; lower data.max_cache_gib",
        ),
        (OSError(errno.EIO, "Input/output error"), UsageError, r"data.cache_folder: .* cannot be used \(Input/output"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "replace", Mock(side_effect=error))
            with pytest.raises(kind, match=message):
                read(cache, store, entry)
        assert kept(cache) == set()


def test_a_folder_that_cannot_serve_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.cache_folder: .*file cannot be used \(Not a directory\)"):
        ShardCache(tmp_path / "file", 10, 1).prepare()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=r"data\.cache_folder: .* keeps no locks; name a folder on a disk of the node"):
        ShardCache(tmp_path / "cache", 10, 1).prepare()


def test_threads_that_evict_and_read_meet_no_wrong_byte(tmp_path, store):
    cache = cache_of(tmp_path, num_shards=2.5)
    entries = [put(store, number) for number in range(5)]
    wanted = {entry.name: (store.folder / entry.name).read_bytes() for entry in entries}
    wrong = []

    def run(seed: int) -> None:
        for step in range(20):
            entry = entries[(seed * 7 + step * (seed + 2)) % 5]
            if read(replace(cache), store, entry) != wanted[entry.name]:
                wrong.append((seed, step))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    read(cache, store, put(store, 5))
    assert len(kept(cache)) <= 2
