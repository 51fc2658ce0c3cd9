"""Exact versions that the tests passed with, beside the ranges of settings.ini.

python .ci/lock.py           write .ci/lock/<python>.txt from this environment
python .ci/lock.py --check   do all lock files satisfy settings.ini's ranges?
pip install -c .ci/lock/3.11.txt -e ".[dev,track,faiss]"   an environment as it was tested"""
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cala.scripts.check import applies
from cala.scripts.check import closure

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / ".ci/lock"
HEAD = """# What cala {version} was tested with on Python {python}, {system}: `make lock` writes it, `python .ci/lock.py --check` compares it
# with the ranges of settings.ini. Use it as constraints: pip install -c {place} -e ".[dev,track,faiss]"
"""


def ranges():
    "Requirements of settings.ini, those of development and tracking too."
    config = ConfigParser(); config.read(ROOT / "settings.ini")
    keys = "requirements", "dev_requirements", "track_requirements", "faiss_requirements"
    return [Requirement(word) for key in keys for word in shlex.split(config["DEFAULT"].get(key, ""))]


def write():
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = closure(ranges())
    absent = [name for name, package in found.items() if package is None]
    if absent: raise SystemExit(f"not installed: {', '.join(absent)}; run make install, then lock what was tested")
    place, lines = LOCKS / f"{python}.txt", [f"{name}=={package.version.partition('+')[0]}" for name, package in sorted(found.items())]
    head = HEAD.format(version=(ROOT / "cala/__init__.py").read_text().split('"')[1], python=sys.version.split()[0], system=sys.platform, place=place.relative_to(ROOT))
    LOCKS.mkdir(exist_ok=True)
    place.write_text(head + "\n".join(lines) + "\n")
    print(f"{place.relative_to(ROOT)}: {len(lines)} packages")


def read(path):
    "name -> version of a lock file."
    needs = [Requirement(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    loose = [str(need) for need in needs if [spec.operator for spec in need.specifier] != ["=="]]
    if loose: raise SystemExit(f"{path}: {', '.join(loose)} is no exact version; write the file again with .ci/lock.py")
    return {canonicalize_name(need.name): next(iter(need.specifier)).version for need in needs}


def faults(path):
    "Why a lock file does not satisfy the ranges: one line a requirement."
    locked, python = read(path), path.stem
    for need in ranges():
        if not applies(need, python_version=python, python_full_version=f"{python}.0"): continue
        version = locked.get(canonicalize_name(need.name))
        if version is None: yield f"{path.name} lacks {need.name}"
        elif not need.specifier.contains(version, prereleases=True): yield f"{path.name} has {need.name} {version}, settings.ini wants {need.specifier}"


if __name__ == "__main__":
    if "--check" not in sys.argv: write()
    else:
        found = [fault for path in sorted(LOCKS.glob("*.txt")) for fault in faults(path)]
        if found: raise SystemExit("\n".join(found) + "\nmake lock writes them again, after the tests have passed")
        print(f"{', '.join(path.name for path in sorted(LOCKS.glob('*.txt')))}: within the ranges of settings.ini")
