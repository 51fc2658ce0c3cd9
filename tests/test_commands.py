"What a shell may do to a command, and what a machine may refuse: one line or none, never a traceback."
import errno
import os
import subprocess
import sys

import pytest

from cala.commands import CalaError
from cala.commands import alone
from cala.commands import run_command

COMMAND = r"""
import warnings
from cala.commands import run_command
def main(
    lines: int = 1, # how many
):
    "Print names that no terminal has to know."
    warnings.warn("one is missing")
    for i in range(lines): print(f"{i} café 猫 caf\udce9")
    raise SystemExit(1)
run_command(main, prog="cala-print")
"""

NOTE = "note: one is missing\n"


@pytest.fixture
def shell(tmp_path):
    "Status, standard output and standard error of a line of bash, in which PRINT is the command."
    folder = tmp_path / "cala"  # a warning of ours is a note
    folder.mkdir()
    (folder / "print.py").write_text(COMMAND)
    def shell(line, **environment):
        line = line.replace("PRINT", f"{sys.executable} {folder}/print.py")
        done = subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, **environment}, timeout=60)
        return done.returncode, done.stdout, done.stderr.decode()
    return shell


@pytest.mark.parametrize("environment", [{}, dict(PYTHONIOENCODING="ascii"), dict(PYTHONIOENCODING="latin-1"), dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")])
def test_a_name_that_the_terminal_cannot_spell_is_shown_all_the_same(shell, environment):
    status, out, err = shell("PRINT", **environment)
    assert (status, err) == (1, NOTE) and out.startswith(b"0 caf") and out.rstrip().endswith((rb"caf\udce9", b"caf\xe9"))


def test_a_reader_that_is_gone_ends_a_command_without_a_word(shell):
    for lines in 1, 99_999:  # before and after the first flush
        status, out, err = shell(f"PRINT --lines {lines} | true; exit ${{PIPESTATUS[0]}}")
        assert err == NOTE and status in ((141,) if lines > 1 else (141, 1))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_standard_output_on_a_full_disk_is_one_line(shell):
    status, out, err = shell("PRINT > /dev/full")
    assert status == 2 and err == NOTE + "cala-print: reading or writing: No space left on device; make room and start again\n"


def test_a_command_without_standard_output_works(shell):
    assert shell("PRINT >&-") == (1, b"", NOTE)


REFUSALS = {
    "nowhere.json: No such file or directory": lambda: open("nowhere.json"),
    "a.json: Permission denied; let this user": OSError(errno.EACCES, os.strerror(errno.EACCES), "a.json"),
    "b.png: Too many open files; let a process open more": OSError(errno.EMFILE, os.strerror(errno.EMFILE), "b.png"),
    "a\\nb.png: Input/output error; the disk": OSError(errno.EIO, os.strerror(errno.EIO), "a\nb.png"),
    "memory is used up (MemoryError); lower --batch-size": MemoryError(),
    "memory is used up (CUDA out of memory": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...\nmore"),
    "a process that decodes pictures died (DataLoader worker (pid 7)": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    "no folder a\\nb; name another": CalaError("no folder a\nb; name another"),
}


@pytest.mark.parametrize("says", REFUSALS)
def test_what_the_machine_refuses_is_one_line_with_status_2(says, capsys):
    def main():
        if isinstance(REFUSALS[says], Exception): raise REFUSALS[says]
        REFUSALS[says]()
    with pytest.raises(SystemExit) as ended: run_command(main, [], prog="cala-x")
    line, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"cala-x: {says}")


@pytest.mark.parametrize("bug", [KeyError("x"), RuntimeError("shapes (3, 4) and (5, 6)"), OSError("a library's own words"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(bug):
    def main(): raise bug
    with pytest.raises(type(bug)): run_command(main, [], prog="cala-x")


def test_a_folder_where_another_process_works_is_refused_until_it_is_gone(tmp_path):
    holder = "import sys; from cala.commands import alone\nwith alone(sys.argv[1]): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(CalaError, match="another process is at work in"):
            with alone(tmp_path): pass
        with alone(tmp_path / "within"): pass                    # another folder is another matter
        other.kill()
    with alone(tmp_path): pass
