"""Lock files: the exact versions that the tests passed with, beside the ranges of settings.ini.

python .ci/lock.py           write .ci/lock/PYTHON.txt from this environment
python .ci/lock.py --check   check that all lock files are within the ranges of settings.ini

A lock file serves pip as constraints: pip install -c .ci/lock/3.11.txt -e ".[dev,track,faiss]"
"""

import shlex
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / ".ci/lock"
KEYS = ("requirements", "dev_requirements", "track_requirements", "faiss_requirements")  # of settings.ini
HEAD = """# Versions that cala {version} was tested with on Python {python}, {system}. `make lock` writes this file;
# `python .ci/lock.py --check` compares it with the ranges of settings.ini.
# Use it as constraints: pip install -c {place} -e ".[dev,track,faiss]"
"""


def read_ranges() -> list[Requirement]:
    "The requirements of settings.ini, with those for development and tracking."
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [Requirement(word) for key in KEYS for word in shlex.split(config["DEFAULT"].get(key, ""))]


def applies(
    need: Requirement,
    extras: tuple[str, ...] = (),  # of the package that has this requirement
    **environment: str,  # of another Python, such as python_version="3.11"; of this one if not given
) -> bool:
    "True if the requirement has no condition, or if its condition holds."
    if need.marker is None:
        return True
    return any(need.marker.evaluate({"extra": extra, **environment}) for extra in (*extras, ""))


def find_packages(
    needs: list[Requirement],
) -> dict[str, Distribution | None]:
    "The installed package for each requirement, for the requirements of these, and so on; None if it is not installed."
    packages: dict[str, Distribution | None] = {}
    visited = set()
    waiting = [(need, ()) for need in needs]
    while waiting:
        need, extras = waiting.pop()
        name = canonicalize_name(need.name)
        own_extras = tuple(sorted(need.extras))
        if not applies(need, extras) or (name, own_extras) in visited:
            continue
        visited.add((name, own_extras))
        try:
            packages[name] = distribution(name)
        except PackageNotFoundError:
            packages[name] = None
            continue
        waiting += [(Requirement(line), own_extras) for line in packages[name].requires or []]
    return packages


def write_lock() -> None:
    "Write the lock file of this Python."
    packages = find_packages(read_ranges())
    missing = [name for name, package in packages.items() if package is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; run make install, then the tests, then make lock")
    path = LOCKS / f"{sys.version_info[0]}.{sys.version_info[1]}.txt"
    lines = [f"{name}=={package.version.partition('+')[0]}" for name, package in sorted(packages.items())]
    head = HEAD.format(
        version=(ROOT / "cala/__init__.py").read_text(encoding="utf-8").split('__version__ = "')[1].partition('"')[0],
        python=sys.version.split()[0],
        system=sys.platform,
        place=path.relative_to(ROOT),
    )
    LOCKS.mkdir(exist_ok=True)
    path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(lines)} packages")


def read_lock(
    path: Path,
) -> dict[str, str]:
    "Name and version of every package of a lock file."
    lines = path.read_text(encoding="utf-8").splitlines()
    needs = [Requirement(line) for line in lines if line and not line.startswith("#")]
    inexact = [str(need) for need in needs if [specifier.operator for specifier in need.specifier] != ["=="]]
    if inexact:
        sys.exit(f"{path}: {', '.join(inexact)} is not an exact version; write the file again with make lock")
    return {canonicalize_name(need.name): next(iter(need.specifier)).version for need in needs}


def lock_faults(
    path: Path,
) -> Iterator[str]:
    "Where a lock file is outside the ranges: one line a requirement."
    versions = read_lock(path)
    python = path.stem
    for need in read_ranges():
        if not applies(need, python_version=python, python_full_version=f"{python}.0"):
            continue
        version = versions.get(canonicalize_name(need.name))
        if version is None:
            yield f"{path.name} lacks {need.name}"
        elif not need.specifier.contains(version, prereleases=True):
            yield f"{path.name} has {need.name} {version}, settings.ini wants {need.specifier}"


def main() -> None:
    "Write a lock file, or check all of them."
    if "--check" not in sys.argv:
        write_lock()
        return
    paths = sorted(LOCKS.glob("*.txt"))
    faults = [fault for path in paths for fault in lock_faults(path)]
    if faults:
        sys.exit("\n".join(faults) + "\nmake lock writes a lock file again, after the tests have passed")
    print(f"{', '.join(path.name for path in paths)}: within the ranges of settings.ini")


if __name__ == "__main__":
    main()
