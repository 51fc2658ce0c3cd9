"Hashes that files on disk carry, writes that are whole or not there, folders that one process works in."

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from cala.errors import CalaError
from cala.library import files
from cala.library.files import (
    FileMark,
    check_output_folder,
    find_whole_folder,
    fingerprint_bytes,
    fingerprint_file,
    fingerprint_tensors,
    hash_bytes,
    hash_file,
    hash_tensors,
    is_unchanged,
    lock_folder,
    make_output_folder,
    mark_file,
    replace_folder,
    write_atomically,
)

# Hashes


def test_the_hashes_of_bytes_and_of_files_are_the_standard_ones(tmp_path):
    data = bytes(range(256)) * 9000  # more than two of the parts that `hash_file` reads
    (tmp_path / "a").write_bytes(data)
    assert hash_bytes(data) == hash_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert fingerprint_bytes(data) == fingerprint_file(tmp_path / "a") == fingerprint
    assert fingerprint_bytes(b"", 8) == hashlib.blake2b(digest_size=8).hexdigest()


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 1)
    path = tmp_path / "weights"
    for number, data in enumerate([b"one", b"two"]):
        path.write_bytes(data)
        os.utime(path, ns=(number, number))
        reads = files._hash_large_file.cache_info().misses
        assert hash_file(path) == hash_file(path) == hashlib.sha256(data).hexdigest()
        assert files._hash_large_file.cache_info().misses == reads + 1


@pytest.fixture
def tensors():
    "Named tensors that are not in the order of their names, of several types and shapes."
    return {
        "b.weight": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "a.bias": torch.tensor([1, 2], dtype=torch.bfloat16),
        "scale": torch.tensor(2, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def test_the_hashes_of_tensors_are_those_that_files_on_disk_carry(tensors):
    # Written once by the functions that wrote the stage-1 files, the results and the caches before this module existed.
    seal = "910126eb98bef3c2f6a63477c2ce23d48938f033df321629d7f236d3ea2cc86c"
    assert hash_tensors(tensors, '{"name": "tiny"}') == seal
    assert hash_tensors(tensors) == "d35a28b0d6eb90af3e590e689e01af0d87f5a0723134432adefefe32c4eb1448"
    assert fingerprint_tensors(tensors, "Trunk(3)") == "c84c7ed042bccbb68eadabc80d61f3c8"


def test_the_hash_of_tensors_knows_names_and_values_and_not_their_order(tensors):
    for hash_them in hash_tensors, fingerprint_tensors:
        reverse = dict(reversed(tensors.items()))
        renamed = {name.upper(): tensor for name, tensor in tensors.items()}
        changed = {name: tensor + 1 for name, tensor in tensors.items()}
        hashes = [hash_them(tensors), hash_them(renamed), hash_them(changed), hash_them(tensors, "text")]
        assert hash_them(reverse) == hashes[0] and len(set(hashes)) == 4
    halves = {"a": torch.zeros(4, dtype=torch.float16)}
    assert fingerprint_tensors(halves) != fingerprint_tensors({"a": torch.zeros(2)})  # the same bytes, another type


# Files that may change


def test_a_file_is_unchanged_until_its_content_changes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    mark = mark_file(path)
    assert mark == FileMark(3, path.stat().st_mtime_ns, fingerprint_bytes(b"one")) and is_unchanged(path, mark)
    assert FileMark(*json.loads(json.dumps(mark))) == mark  # caches and indexes keep it as JSON
    os.utime(path, ns=(0, 7))
    assert is_unchanged(path, mark)  # copied: another time, the same content
    path.write_bytes(b"two")
    assert not is_unchanged(path, mark)
    os.utime(path, ns=(mark.time, mark.time))
    assert is_unchanged(path, mark) and not is_unchanged(path, mark, thorough=True)
    path.write_bytes(b"three")
    os.utime(path, ns=(mark.time, mark.time))
    assert not is_unchanged(path, mark)
    path.unlink()
    assert not is_unchanged(path, mark) and is_unchanged(path, files.NO_FILE)


# Atomic writes


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path, concurrent):
    for data in b"old", b"newer", b"":
        write_atomically(tmp_path / "a.json", data, concurrent)
        assert (tmp_path / "a.json").read_bytes() == data and os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(CalaError, match="cannot write .*no/a: No such file or directory; the file .* is unchanged"):
        write_atomically(tmp_path / "no/a", b"")
    with pytest.raises(CalaError, match="No such file or directory; make room"):
        write_atomically(tmp_path / "no/a", b"", advice="make room")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalaError, match="cannot write .*folder: Is a directory"):
        write_atomically(tmp_path / "folder", b"")
    assert os.listdir(tmp_path) == ["folder"]


def version(number):
    "The files of a folder; each version has other contents and other names."
    return {"model": b"%d" % number * 100, "recipe": b"%d" % number, f"state{number}": b""}


def read_folder(folder):
    return {path.name: path.read_bytes() for path in find_whole_folder(folder).iterdir()}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "run/best"
    for number in 1, 2:
        replace_folder(folder, version(number))
        assert read_folder(folder) == version(number) and os.listdir(tmp_path / "run") == ["best"]


class FullDisk:
    "The call to the disk with this number fails as on a full disk; a write leaves the half that still had room."

    def __init__(self, monkeypatch, number):
        self.calls_left, self.failed_call = number, None
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self.count_calls(getattr(owner, name), name))
        monkeypatch.setattr(files, "open", self.open_unbuffered, raising=False)

    def check(self, name):
        self.calls_left -= 1
        if self.calls_left == 0:
            self.failed_call = name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def count_calls(self, original, name):
        def call(*args, **kwargs):
            self.check(name)
            return original(*args, **kwargs)

        return call

    def open_unbuffered(self, path, mode):
        disk = self

        class HalfWriter(type(open(os.devnull, mode, buffering=0))):
            def write(self, data):
                try:
                    disk.check("write")
                except OSError:
                    super().write(data[: len(data) // 2])
                    raise
                return super().write(data)

        return HalfWriter(path, mode)


def test_a_disk_that_is_full_at_any_moment_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    failed_calls = []
    for number in range(1, 100):
        folder = tmp_path / str(number) / "best"
        replace_folder(folder, version(1))
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, number)
            try:
                replace_folder(folder, version(2))
                break
            except CalaError as error:
                message = str(error)
        failed_calls.append(disk.failed_call)
        reason = "No space left on device; what was saved there before is whole; make room and go on"
        assert message == f"cannot save {folder}: {reason}"
        assert read_folder(folder) == version(1)
        assert list(folder.parent.iterdir()) == [find_whole_folder(folder)]  # no part is left to fill the disk
        replace_folder(folder, version(3))
        assert read_folder(folder) == version(3) and os.listdir(folder.parent) == ["best"]
    assert failed_calls == ["mkdir", *["write", "fsync"] * 3, "rename", "rename"]


def test_a_disk_that_is_full_at_any_moment_leaves_the_old_file(tmp_path, monkeypatch):
    failed_calls = []
    for number in range(1, 100):
        write_atomically(tmp_path / "log.csv", b"old")
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, number)
            try:
                write_atomically(tmp_path / "log.csv", b"newer")
                break
            except CalaError as error:
                assert f"cannot write {tmp_path / 'log.csv'}: No space left on device" in str(error)
        failed_calls.append(disk.failed_call)
        assert (tmp_path / "log.csv").read_bytes() == b"old" and os.listdir(tmp_path) == ["log.csv"]
    assert failed_calls == ["write", "fsync", "replace"]


def test_a_file_that_the_system_does_not_let_grow_leaves_the_old_folder_whole(tmp_path):
    replace_folder(tmp_path / "best", version(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(CalaError, match="cannot save .*best: File too large; what was saved there before is whole"):
            replace_folder(tmp_path / "best", version(2))
        with pytest.raises(CalaError, match="cannot save .*last: File too large; nothing was saved there before"):
            replace_folder(tmp_path / "last", version(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_folder(tmp_path / "best") == version(1) and os.listdir(tmp_path) == ["best"]


def touches_disk(event, function):
    "True for a call of Python's to the disk: open, write, flush, sync, rename, remove ..."
    module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return event == "c_call" and module in ("posix", "_io")


def kill_in_fork(work, fatal):
    "Run `work` in a fork that is killed at its call to the disk number `fatal`; True if it came to that call."
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    calls = count(1)

    def watch(frame, event, function):
        if touches_disk(event, function) and next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    try:
        work()
    finally:
        os._exit(0)


def test_a_replacement_killed_at_any_call_to_the_disk_leaves_the_old_folder_or_the_new_one(tmp_path):
    versions_found = []
    for fatal in count(1):
        folder = tmp_path / str(fatal) / "last"
        replace_folder(folder, version(1))
        was_killed = kill_in_fork(lambda: replace_folder(folder, version(2)), fatal)
        versions_found.append([version(1), version(2)].index(read_folder(folder)) + 1)
        replace_folder(folder, version(3))
        assert read_folder(folder) == version(3) and os.listdir(folder.parent) == ["last"]
        if not was_killed:
            break
    assert versions_found == sorted(versions_found) and set(versions_found) == {1, 2} and len(versions_found) > 15


# Output folders


def test_an_output_folder_may_be_missing_or_empty_or_hold_the_commands_own_files(tmp_path):
    assert check_output_folder(str(tmp_path / "new")) == tmp_path / "new" and not (tmp_path / "new").exists()
    assert check_output_folder(tmp_path) == tmp_path
    for name in "result.json", "ranks.csv", "table.csv", files.LOCK_NAME:
        (tmp_path / name).touch()
    check_output_folder(tmp_path, ["result.json", "*.csv"])
    check_output_folder(tmp_path, ["*"])
    with pytest.raises(CalaError, match=r"is not empty \(table.csv is there\); choose another --output$"):
        check_output_folder(tmp_path, ["result.json", "ranks.csv"])
    with pytest.raises(CalaError, match=r"is not empty \(ranks.csv is there\); go on with --resume"):
        check_output_folder(tmp_path, advice="go on with --resume")
    for refuse in check_output_folder, make_output_folder:
        with pytest.raises(CalaError, match="ranks.csv is a file; choose another --output"):
            refuse(tmp_path / "ranks.csv")


def test_an_output_folder_is_made_with_its_parents(tmp_path):
    for _ in range(2):
        assert make_output_folder(f"{tmp_path}/a/b") == tmp_path / "a/b" and (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(CalaError, match="cannot make .*file/b: Not a directory; name another folder"):
        make_output_folder(tmp_path / "file/b", "name another folder")


# Locks


def start(code, folder):
    "A process that has run `code` with the folder as its argument, and waits."
    code = f"import os, sys, time\nfrom cala.library.files import lock_folder\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    return process


HOLD = "with lock_folder(sys.argv[1]):\n    print('locked', flush=True); sys.stdin.read()"
HOLD_WITH_WORKER = """
with lock_folder(sys.argv[1]):
    if os.fork() == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print('locked', flush=True)
    sys.stdin.read()
"""


def refuse_lock(folder):
    with pytest.raises(CalaError, match=f"another process is at work in {folder}; wait until it ends, or name another"):
        with lock_folder(folder):
            pass


def test_a_folder_where_another_process_works_is_refused_until_that_process_ends(tmp_path):
    with start(HOLD, tmp_path) as other:
        refuse_lock(tmp_path)
        with lock_folder(tmp_path / "within"):  # another folder
            pass
        other.stdin.close()
        other.wait(10)
    with lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_process_frees_the_folder_at_once_although_its_worker_lives_on(tmp_path):
    with start(HOLD_WITH_WORKER, tmp_path) as other:
        refuse_lock(tmp_path)
        (worker,) = [int(pid) for pid in Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()]
        other.kill()
        other.wait(10)
    try:
        with lock_folder(tmp_path):
            assert Path(f"/proc/{worker}").exists()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_same_process_cannot_lock_a_folder_twice(tmp_path):
    with lock_folder(tmp_path) as folder:
        assert folder == tmp_path
        refuse_lock(tmp_path)
        check_output_folder(tmp_path)  # the lock file does not count
    with lock_folder(tmp_path):
        pass


def test_the_lock_file_of_a_killed_process_locks_nobody_out(tmp_path):
    with start(HOLD, tmp_path) as other:
        other.kill()
    assert os.listdir(tmp_path) == [files.LOCK_NAME]
    check_output_folder(tmp_path)
    with lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_made_for_the_lock_is_removed_if_nothing_came_into_it(tmp_path):
    with lock_folder(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError):
        with lock_folder(tmp_path / "run"):
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with lock_folder(tmp_path / "run") as folder:
        (folder / "log.csv").touch()
    with lock_folder(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == ["log.csv"]


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_promises_nothing_and_does_not_fail(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_folder(tmp_path / "run"):
        with lock_folder(tmp_path / "run"):
            pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_not_locked_and_does_not_fail(tmp_path, monkeypatch):
    def refuse_open(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / files.LOCK_NAME).touch()  # of another user
    monkeypatch.setattr("filelock.FileLock.acquire", refuse_open)
    with lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == [files.LOCK_NAME]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CalaError, match="cannot make .*: Not a directory; name another folder"):
        with lock_folder(tmp_path / "file/run"):
            pass


def test_importing_the_module_imports_neither_torch_nor_filelock():
    code = "import sys, cala.library.files; print(*{'torch', 'numpy', 'filelock'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"
