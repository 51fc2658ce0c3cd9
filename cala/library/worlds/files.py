"""Two data sets drawn by program, on disk exactly as CIRR and FashionIQ are published."""
import json
import os
from operator import index



from ...errors import CalaError
from ..files import LOCK_NAME


def _write(path, content, indent=None):
    "`content` as JSON; its folder is made."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")

def _mark(folder, finished):
    "The note that says which world is in `folder`."
    return folder / "drawn" / ("world.json" if finished else "unfinished.json")

def _held(folder):
    "The arguments of the world in `folder`, finished or not; None if it holds none."
    mark = next((_mark(folder, finished) for finished in (True, False) if _mark(folder, finished).exists()), None)
    return mark and json.loads(mark.read_text(encoding="utf-8"))

def _refuse(folder, record, held):
    "`CalaError` if `folder` holds anything but the world of `record` or a part of it."
    if isinstance(held, dict) and held != record:
        other = ", ".join(f"{key} {held.get(key)} not {value}" for key, value in record.items() if held.get(key) != value)
        raise CalaError(f"{folder} holds another world ({other}); name another folder or delete this one")
    if held != record and folder.exists() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        raise CalaError(f"{folder} is not empty and was not drawn by us; name another folder")

def _whole(folder, record):
    "True if the finished world of `record` is in `folder`. No lock is asked for: many may read at once."
    try: return _mark(folder, True).exists() and _held(folder) == record
    except (OSError, ValueError): return False

def _claim(folder, record):
    "True if the world of `record` is in `folder`, whole. If not, claim the folder for it; `CalaError` if that cannot be."
    try:
        held = _held(folder)
        _refuse(folder, record, held)
        if held == record and _mark(folder, True).exists(): return True
        _write(_mark(folder, False), record)
    except (OSError, ValueError) as error: raise CalaError(f"cannot draw in {folder} ({error}); name another folder") from error

def _finish(folder):
    "All is written: say so in one step."
    os.replace(_mark(folder, False), _mark(folder, True))

def _counted(name, value, low, high):
    "`value` as an int within bounds; `CalaError` if it is not."
    try: number = index(value)
    except TypeError: number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise CalaError(f"{name}={value!r} cannot be drawn; give a whole number from {low} to {high}")
    return number
