"""A dataclass or a function becomes a command line, and an error that a user can correct becomes one line.

Every field of the dataclass, or every parameter of the function, is a flag; its trailing comment is the help text. The
parser is Python's argparse. tyro starts as fast and reads dataclasses by itself, but it prints an error as a box of
several lines, and the hook that would change this is private.
"""

import errno
import inspect
import logging
import os
import re
import sys
import tokenize
import warnings
from argparse import SUPPRESS, Action, ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import wraps
from io import StringIO, TextIOWrapper
from math import isfinite
from pathlib import Path
from textwrap import dedent
from types import FrameType
from typing import Any, get_args, get_origin, get_type_hints

from .. import __version__ as version
from ..errors import CalaError
from ..recipe import find_choice, list_choices, spell_flag

PACKAGE = Path(__file__).resolve().parents[1]

# From words to flags

OLD_FLAGS = {"--rank-timeout": "--process-timeout"}  # still read
NO_FLAGS = {  # no command has such a flag, and people try it
    "--device": "CUDA_VISIBLE_DEVICES=0 chooses the first GPU, CUDA_VISIBLE_DEVICES= the CPU",
    "--lr": "did you mean --learning-rate?",
}
LARGEST = 2**63 - 1  # of the whole numbers that torch and Python's own iterators take


class FlagParser(ArgumentParser):
    "An argparse parser that raises a `CalaError` where argparse would print its usage and exit."

    def error(
        self,
        message: str,  # argparse's words
    ):
        raise CalaError(f"{message}; --help lists every flag")


def parse_flags(
    config: Callable,  # a dataclass, or a function whose parameters are the flags
    argv: list[str] | None = None,  # words of the command line; those of this process if None
    prog: str | None = None,  # the command's name in the help
) -> Any:  # an instance of the dataclass, or a dict of the function's arguments
    "Read the command line into `config`; a wrong flag or value is a `CalaError`."
    words = read_words(sys.argv[1:] if argv is None else argv)
    parameters = inspect.signature(config).parameters
    typed_hints = get_type_hints(config)
    hints = {name: strip_none(typed_hints.get(name, str)) for name in parameters}
    comments = read_comments(config) if {"-h", "--help"} & set(words) else {}  # finding the source takes a moment
    parser = FlagParser(
        prog, usage="%(prog)s [flags]", description=config.__doc__, argument_default=SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"cala {version}", help="show the version and exit")
    actions = {}
    for name, parameter in parameters.items():
        action = add_flag(parser, name, hints[name], parameter.default, comments.get(name, ""))
        actions |= dict.fromkeys(action.option_strings, action)
    check_values(words, actions)
    typed, unknown_words = parser.parse_known_args(words)
    if unknown_words:
        advice = find_advice(unknown_words[0].partition("=")[0], list(actions))
        raise CalaError(f"unrecognized arguments: {' '.join(unknown_words)}; {advice}--help lists every flag")
    values = {
        name: read_value(value, hints[name], parameters[name].default, spell_flag(name))
        for name, value in vars(typed).items()
    }
    if isinstance(config, type):
        flags: Any = config(**values)
        if hasattr(config, "given"):  # such as `Recipe`, whose run is resumed with flags that were not given
            flags.given = frozenset(values)
        return flags
    return {name: values.get(name, parameter.default) for name, parameter in parameters.items()}


def read_words(
    argv: list[str],  # as typed
) -> list[str]:  # the same with `--data-root` for `--data_root`
    "Spell all flags with dashes; a `CalaError` names a flag whose value is empty."
    words, flag = [], "an argument"
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            flag = name.replace("_", "-")
            flag = OLD_FLAGS.get(flag, flag)
            word = flag + equals + value
        if not word.strip() or (word.startswith(flag + "=") and not value.strip()):
            raise CalaError(f"{flag} is empty (an unset shell variable?); give a value, or leave the flag out")
        words.append(word)
    return words


def check_values(
    words: list[str],  # of the command line, from `read_words`
    actions: dict[str, Action],  # flag -> its action
):
    "`CalaError` for a flag with more values than it takes; argparse would not know to which flag they belong."
    flag, values = "", []
    for word in [*words, "--"]:
        name, equals, value = word.partition("=")
        if not word.startswith("-") or is_number(word):
            values.append(word)
            continue
        action = actions.get(flag)
        if action and action.nargs == 0 and values:
            *_, off = action.option_strings
            raise CalaError(
                f"{flag} {' '.join(values)}: this flag takes no value; give {action.option_strings[0]} or {off}"
            )
        if action and action.nargs is None and len(values) > 1:
            text = " ".join(values)
            raise CalaError(f"{flag} {text}: this flag takes one value; put quotes around a value with blanks")
        flag, values = name, [value] if equals else []


def is_number(
    word: str,  # that begins with a hyphen
) -> bool:
    "True for a negative number."
    try:
        float(word)
    except ValueError:
        return False
    return True


def find_advice(
    word: str,  # an unknown one
    flags: list[str],  # of the command
) -> str:  # ends with a blank; empty if there is none
    "The flag that a user may have meant, or another way to do it."
    if word in NO_FLAGS:
        return f"{NO_FLAGS[word]} "
    if not word.startswith("-"):
        return ""
    names = {flag.strip("-"): flag for flag in flags}
    name = word.strip("-")
    longer = [known for known in names if known.startswith(f"{name}-")]
    similar = longer[:1] or get_close_matches(name, names, 1, 0.7)
    return f"did you mean {names[similar[0]]}? " if similar else ""


def strip_none(
    hint: Any,  # a type, `None | type` or `Optional[type]`
) -> Any:
    "The type without None."
    alternatives = [each for each in get_args(hint) if each is not type(None)]
    return alternatives[0] if type(None) in get_args(hint) else hint


def is_list_type(
    hint: Any,  # the type of a field
) -> bool:
    "True if the flag of the field takes several words."
    return get_origin(hint) in (list, tuple)


def add_flag(
    parser: FlagParser,
    name: str,  # of the field
    hint: Any,  # its type
    default: Any,  # its default, for the help
    comment: str,  # its comment, for the help
) -> Action:  # its spellings are `--x`, `--x` and `--no-x`, or `--x` and `-x` for a single letter
    "Add the flag of one field; argparse hands its value on as text."
    is_list = is_list_type(hint)
    shown = ",".join(map(str, default)) if is_list and isinstance(default, (list, tuple)) else default
    has_default = isinstance(shown, (bool, int, float, str)) and shown != ""
    text = (f"{comment} (default: {shown})" if has_default else comment).replace("%", "%%")
    is_required = default is inspect.Parameter.empty
    if hint is bool:
        return parser.add_argument(spell_flag(name), action=BooleanOptionalAction, required=is_required, help=text)
    kind = get_args(hint)[0] if is_list else hint  # of one word
    choices = list_choices(kind)
    spellings = [spell_flag(name)] if len(name) > 1 else [spell_flag(name), f"-{name}"]
    return parser.add_argument(
        *spellings,
        nargs="+" if is_list else None,
        required=is_required,
        metavar="{" + ",".join(choices) + "}" if choices else kind.__name__.upper(),
        help=text,
    )


def read_value(
    value: str | list[str] | bool,  # as argparse hands it on
    hint: Any,  # the type of the field
    default: Any,  # of the field
    flag: str,  # for the error message
) -> Any:
    "A value of the field's type; the word None stands for a flag that is not given, where the default is None."
    if isinstance(value, bool):
        return value
    if default is None and value in ("None", ["None"]):
        return None
    if isinstance(value, str):
        return read_word(value, hint, flag)
    items = [read_word(word, get_args(hint)[0], flag) for word in " ".join(value).replace(",", " ").split()]
    if not items:
        raise CalaError(f"{flag} is empty; give a value, or leave the flag out")
    return get_origin(hint)(items)


def read_word(
    word: str,  # as typed
    kind: Any,  # a type that reads text, or a Literal
    flag: str,  # for the error message
) -> Any:
    "One value; the case of letters makes no difference to a choice."
    if choices := list_choices(kind):
        return find_choice(flag, word, choices)
    try:
        value = kind(word)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
        expected = getattr(kind, "expected", expected)
        raise CalaError(f"{flag} {word}: give {expected}") from None
    if isinstance(value, float) and not isfinite(value):
        raise CalaError(f"{flag} {word}: give a number that is finite")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise CalaError(f"{flag} {word}: give a number up to {LARGEST}")
    return value


def read_comments(
    config: Callable,  # a dataclass, with those that it inherits from, or a function
) -> dict[str, str]:  # name -> comment
    "The trailing comment of every field or parameter; a field begins on a line of its own."
    comments = {}
    for part in reversed(config.__mro__) if isinstance(config, type) else [config]:
        try:
            source = dedent(inspect.getsource(part))
        except (OSError, TypeError):  # typed into a shell, or built in
            continue
        own_comments, name = {}, ""
        for token in tokenize.generate_tokens(StringIO(source).readline):
            if field := re.match(r"\s*(\w+)\s*:", token.line):
                name = field[1]
            if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#"):
                own_comments.setdefault(name, token.string.lstrip("# "))  # the body of a function comes later
        comments |= own_comments
    return comments


# From errors to one line

ADVICE: dict[int | None, str] = {
    errno.EACCES: "let this user read and write there, or name another place",
    errno.EPERM: "let this user read and write there, or name another place",
    errno.EROFS: "let this user read and write there, or name another place",
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room and start again",
    errno.EMFILE: "let a process open more files (ulimit -n 4096)",
    errno.EIO: "the disk may have a fault",
}


def describe_error(
    error: Exception,  # raised in this process, or in a loader worker and raised again by torch
) -> str:
    "One line for the user, about what the user or the machine can change; an empty text if the error is a bug."
    if isinstance(error, CalaError):
        return one_line(error)
    text = one_line(error)[:160]
    if isinstance(error, OSError) and error.strerror:
        place = one_line(error.filename) if error.filename else "reading or writing"
        return f"{place}: {error.strerror}; {ADVICE.get(error.errno, 'name another place, or check what is there')}"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"memory is used up ({text or type(error).__name__}); lower --batch-size, or give the process more memory"
        )
    if "DataLoader worker" in text:
        return f"a process that decodes pictures died ({text}); lower --num-workers, or give the processes more memory"
    return ""


def one_line(
    value: Any,  # an error, or the name of a file
) -> str:
    "The text of a value on one line; of an error that torch brings from a loader worker, the worker's own message."
    text = str(value).strip().rpartition(f"\n{CalaError.__module__}.CalaError: ")[2]
    return text.replace("\n", "\\n")


@contextmanager
def prepare_output() -> Iterator[None]:
    """Prepare standard output, messages and warnings for a user while a command runs.

    What the library writes to the logger `cala` is printed, the message alone. A character that the terminal does not
    know is printed as `\\xe9`. cala's own warnings are lines that begin with
    `note:`; warnings for programmers are hidden. What was printed is flushed, so that a closed pipe or a full disk is
    an error that can still be caught, and not one at the exit of Python."""
    default_format, logger = warnings.formatwarning, logging.getLogger("cala")
    handler, level, propagate = logging.StreamHandler(sys.stdout), logger.level, logger.propagate

    def format_note(message, category, filename, *place):
        if PACKAGE in Path(filename).resolve().parents:
            return f"note: {one_line(message)}\n"
        return default_format(message, category, filename, *place)

    if isinstance(sys.stdout, TextIOWrapper):  # in a notebook it is another class
        sys.stdout.reconfigure(errors="backslashreplace")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.formatwarning = format_note
        try:
            yield
        finally:
            warnings.formatwarning = default_format
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
            flush_output()


def flush_output():
    "Flush standard output; if that fails, the rest is thrown away, so that Python does not try again at its exit."
    if sys.stdout is None:  # the shell closed it
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


# From a function to a command


def run_command(
    main: Callable,  # the function behind the command
    argv: list[str] | None = None,  # words of the command line; those of this process if None
    prog: str | None = None,  # the command's name in messages
) -> Any:  # what the function returns
    """Parse the command line and call `main`.

    What the user or the machine did wrong ends as one line and exit status 2, Ctrl-C as status 130. A closed pipe ends
    the command silently with 141, as a shell reports it. A bug keeps its traceback."""
    prog = prog or find_name(sys.argv[0])
    hints = [hint for name, hint in get_type_hints(main).items() if name != "return"]
    config: Any = next(filter(is_dataclass, hints), main)
    try:
        with prepare_output():
            flags = parse_flags(config, argv, prog)
            return main(flags) if is_dataclass(config) else main(**flags)
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C", 130
    except BrokenPipeError:
        raise SystemExit(141) from None
    except (CalaError, OSError, MemoryError, RuntimeError) as error:
        message, status = describe_error(error), 2
        if not message:
            raise
    print(f"{prog}: {message}", file=sys.stderr)
    raise SystemExit(status)


def find_name(
    path: str,  # of the script that runs
) -> str:  # for messages
    "The name of a command: cala-train for the script cala-train, and for `python -m cala.scripts.train` too."
    script = Path(path)
    if script.resolve().parent == PACKAGE / "scripts":
        return f"cala-{script.stem.replace('_', '-')}"
    return script.name


def command(
    main: Callable,  # the function behind the command; one dataclass parameter, or one parameter a flag
) -> Callable:
    "Decorator: `main()` reads the command line when a shell calls it; with arguments it stays a plain call."

    @wraps(main)
    def run(*args, **kwargs):
        if args or kwargs:
            return main(*args, **kwargs)
        if not is_called_by_shell(inspect.currentframe()):
            return main()
        run_command(main)  # the result is for Python: a console script would take it for an exit status

    if is_called_by_shell(inspect.currentframe()):
        run_command(main)
    return run


def is_called_by_shell(
    frame: FrameType | None,  # of a function
) -> bool:
    "True if a script or a console script calls the function, and not a notebook or a module."
    caller = frame.f_back if frame else None
    return caller is not None and caller.f_globals.get("__name__") == "__main__" and "__file__" in caller.f_globals
