"""Hashes, atomic writes, output folders and locks: every module that touches the disk uses these functions.

`hash_*` is SHA-256, for files that people exchange: checkpoints and stage-1 backbones carry such hashes.
`fingerprint_*` is BLAKE2b, which is faster and shorter, for caches and indexes on this machine. Files on disk carry
both, so the digests must not change.

`lock_folder` keeps its lock file, `.cala.lock`, inside the folder. There it is on the same file system as the
results, so that machines and containers that share the folder share the lock. A file beside the folder could lie
outside a mounted volume, and a file below /tmp would be unknown to other machines. The lock file is removed on
release; after a killed process it stays behind, unlocked, and `check_output_folder` ignores it. The lock is
filelock's, from version 4 on: with older versions, forked loader workers keep the lock of a killed process.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import lru_cache
from hashlib import blake2b, sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from ..errors import CalaError
from ..progress import LARGE, MEGABYTE, show_progress, show_tensors
from ..trust import hash_tensors as hash_tensors
from ..trust import read_bytes

LOCK_NAME = ".cala.lock"
PART = 8 * MEGABYTE  # of a large file or value, hashed at once
LOCK_PATIENCE = 1.0  # seconds; a process that was just killed may need a moment to be gone


# Hashes


def hash_bytes(
    data: bytes,  # any content
) -> str:
    "SHA-256 of bytes, as hexadecimal digits."
    return _hash_stream(BytesIO(data), len(data), "hash of the weights")


def hash_file(
    path: str | Path,  # a file of any size
) -> str:
    "SHA-256 of a file; that of a large file is remembered until the file changes."
    stat = os.stat(path)
    if stat.st_size < LARGE:
        return hash_bytes(Path(path).read_bytes())
    return _hash_large_file(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)  # a command asks for the hash of its weights several times
def _hash_large_file(path, size, time):
    with open(path, "rb") as file:
        return _hash_stream(file, size, f"check {os.path.basename(path)}")


def _hash_stream(stream, size, title):
    "SHA-256 of an open file of this size, with progress if it is large."
    digest = sha256()
    with show_progress(None, title, size // MEGABYTE, "MB", is_hidden=size < LARGE, is_part=True) as bar:
        while part := stream.read(PART):
            digest.update(part)
            bar.update(stream.tell() // MEGABYTE - bar.n)
    return digest.hexdigest()


def fingerprint_bytes(
    data: bytes,  # any content
    size: int = 16,  # bytes of the digest; each is two hexadecimal digits
) -> str:
    "BLAKE2b of bytes, as hexadecimal digits."
    return blake2b(data, digest_size=size).hexdigest()


def fingerprint_file(
    path: str | Path,  # a file that fits in memory, such as a picture
) -> str:
    "BLAKE2b of a file."
    return fingerprint_bytes(Path(path).read_bytes())


def fingerprint_tensors(
    tensors: dict,  # name -> tensor of any shape
    text: str = "",  # hashed before the tensors, for example the `repr` of their module
) -> str:
    "BLAKE2b of a text and of named tensors with their types and shapes, in the order of their names."
    digest = blake2b(text.encode(), digest_size=16)
    for name, tensor in show_tensors(dict(sorted(tensors.items())), "fingerprint of the weights"):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(read_bytes(tensor))
    return digest.hexdigest()


# Files that may change


class FileMark(NamedTuple):
    "What a file was when it was read."

    size: int  # bytes
    time: int  # of the last change, in nanoseconds
    digest: str  # `fingerprint_file`


NO_FILE = FileMark(0, 0, "")  # the mark of a file that could not be read


def mark_file(
    path: str | Path,  # a file that exists
) -> FileMark:
    "Size, time and fingerprint of a file."
    stat = os.stat(path)
    return FileMark(stat.st_size, stat.st_mtime_ns, fingerprint_file(path))


def is_unchanged(
    path: str | Path,  # a file that may have changed, or may be gone
    mark: FileMark,  # what it was before
    thorough: bool = False,  # compare the content even where size and time are equal
) -> bool:
    "True if the file is still what `mark` says; its content is read only where size and time do not decide."
    try:
        stat = os.stat(path)
        if stat.st_size != mark.size:
            return False
        if stat.st_mtime_ns == mark.time and not thorough:
            return True
        return fingerprint_file(path) == mark.digest
    except OSError:
        return mark == NO_FILE


# Atomic writes


def write_atomically(
    path: str | Path,  # where the file will be; its folder exists
    data: bytes,  # the whole content
    concurrent: bool = False,  # other processes may write the same file at the same moment
    advice: str = "the file that was there before is unchanged",  # end of the error message
):
    "Write a file beside `path`, then rename it: at every moment `path` is the old file or the new one, never a part."
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if concurrent else f"{path.name}.part")
    try:
        _write_to_disk(part, data)
        os.replace(part, path)
    except OSError as error:
        _remove(part)
        raise CalaError(f"cannot write {path}: {error.strerror}; {advice}") from error


def replace_folder(
    folder: str | Path,  # made if need be; its parents too
    files: dict,  # name -> bytes, everything that it will hold
):
    "Replace a folder as a whole: at every moment `folder`, or `folder.old` next to it, is complete."
    folder = Path(folder)
    part, old = _folder_beside(folder, ".part"), _folder_beside(folder, ".old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, data in files.items():
            _write_to_disk(part / name, data)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        is_saved = folder.exists() or old.exists()
        before = "what was saved there before is whole" if is_saved else "nothing was saved there before"
        raise CalaError(f"cannot save {folder}: {error.strerror}; {before}; make room and go on") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # on a full disk the part would take room that others need
    shutil.rmtree(old, ignore_errors=True)


def find_whole_folder(
    folder: str | Path,  # as it was given to `replace_folder`
) -> Path:
    "The folder itself, or its `.old` if `replace_folder` was killed between its two renames."
    folder = Path(folder)
    old = _folder_beside(folder, ".old")
    return old if old.is_dir() and not folder.exists() else folder


def _folder_beside(folder, ending):
    return folder.with_name(folder.name + ending)


def _write_to_disk(path, data):
    "Write a file; when this returns, the data are on the disk and not only in the system's memory."
    is_small = len(data) < LARGE
    total = len(data) // MEGABYTE
    with (
        open(path, "wb") as file,
        show_progress(None, f"write {path.name}", total, "MB", is_hidden=is_small, is_part=True) as bar,
    ):
        for start in range(0, max(1, len(data)), LARGE):
            file.write(memoryview(data)[start : start + LARGE])
            file.flush()
            os.fsync(file.fileno())
            bar.update(min(start + LARGE, len(data)) // MEGABYTE - bar.n)


def _remove(path):
    "Remove a file if that is possible."
    with suppress(OSError):
        path.unlink()


# Output folders


def check_output_folder(
    folder: str | Path,  # where a command will write; it need not exist
    may_hold: Iterable[str] = (),  # names, or patterns of names, of files that may be there already
    advice: str = "choose another --output",  # end of the error message
) -> Path:  # the folder
    "`CalaError` if the folder holds anything that the command did not write itself. Nothing is made."
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CalaError(f"{folder} is a file; {advice}")
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in (LOCK_NAME, *may_hold))]
    if foreign:
        raise CalaError(f"{folder} is not empty ({foreign[0]} is there); {advice}")
    return folder


def check_output_file(
    path: str | Path,  # where a command will write at its end; it need not exist
    ending: str,  # of files that may be replaced, such as .txt
    advice: str = "name another file",  # end of the error message
) -> Path:  # the file
    "`CalaError` if the file cannot be written, or if another kind of file is there. Nothing is made."
    path = Path(path)
    if path.is_dir():
        raise CalaError(f"{path} is a folder; {advice}")
    if not path.parent.is_dir():
        raise CalaError(f"no folder {path.parent}; {advice}")
    if path.exists() and path.suffix.lower() != ending:
        raise CalaError(f"{path} is there already, and only a {ending} file is replaced; {advice}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CalaError(f"{path} cannot be written by this user; {advice}")
    return path


def make_output_folder(
    folder: str | Path,  # made if need be; its parents too
    advice: str = "choose another --output",  # end of the error message
) -> Path:  # the folder
    "Make a folder; `CalaError` if that is not possible."
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CalaError(f"{folder} is a file; {advice}") from None
    except OSError as error:
        raise CalaError(f"cannot make {folder}: {error.strerror}; {advice}") from error
    return folder


@contextmanager
def lock_folder(
    folder: str | Path,  # made if need be, and removed again if nothing is written into it
) -> Iterator[Path]:  # the folder
    """Let one process at a time work in a folder; `CalaError` for the second one.

    The lock of a killed process is free at once. A file system without locks promises nothing, and the work goes on."""
    # Imported here, because this takes longer than the import of the rest of this module.
    from filelock import FileLock, Timeout

    new_folders = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    folder = make_output_folder(folder, "name another folder")
    path = folder / LOCK_NAME
    # The mode lets every user of the folder lock it. A soft lock is refused: a killed process would keep it.
    lock = FileLock(path, timeout=LOCK_PATIENCE, mode=0o666, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise CalaError(f"another process is at work in {folder}; wait until it ends, or name another folder") from None
    except PermissionError:
        pass  # the folder, or the lock file of another user, is not ours to write
    except OSError:
        _remove(path)  # a file system without locks
    try:
        yield folder
    finally:
        if lock.is_locked:
            _remove(path)  # before the release, while no other process can hold it
            lock.release()
        with suppress(OSError):  # the system refuses to remove a folder that holds something
            for path in new_folders:
                path.rmdir()


@contextmanager
def lock_output(
    folder: str | Path,  # where a command will write; made if need be
    may_hold: Iterable[str] = (),  # as for `check_output_folder`
) -> Iterator[Path]:  # the folder
    "Let one command at a time write into a folder that holds nothing else."
    check_output_folder(folder, may_hold)
    with lock_folder(folder) as locked:
        check_output_folder(folder, may_hold)  # another command may have used it between the first check and the lock
        yield locked
