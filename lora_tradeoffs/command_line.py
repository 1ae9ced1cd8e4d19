"""Command lines: their parser, the flags that all share, and errors of one line.

Imports the standard library and config alone, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from config import LARGEST_NUMBER, LARGEST_SEED, PRESETS, ROOT, UNUSABLE, UserError

# What to do about an error of the system, by its number.
SYSTEM_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free disk space"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "allow reading and writing there, or choose other folders with OUTPUT_DIR and DATA_DIR",
    ),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "restore it",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV), "check the disk or its network"
    ),
}


class Parser(argparse.ArgumentParser):
    """An argparse parser with errors of one line, and exit code 2; line breaks in texts stay.

    No flag takes an infinite or huge number, or text with control characters.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.register("type", None, _usable_text)
        self.register("type", int, whole_number)
        self.register("type", float, finite_number)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": must be", " must be", 1)
        message = UNUSABLE.sub("?", f"{message:.300}")  # what was typed stands in it
        self.exit(2, f"error: {message} ({self.prog} --help lists all flags)\n")


def _usable_text(text: str) -> str:
    if UNUSABLE.search(text):
        raise argparse.ArgumentTypeError("must be UTF-8 text without control characters")
    return text


def whole_number(text: str, lowest: int = -LARGEST_NUMBER, highest: int = LARGEST_NUMBER) -> int:
    """An argparse type: a whole number in the bounds."""
    number = int(text)
    if number < lowest:
        raise argparse.ArgumentTypeError(f"must be {lowest} or more, not {number}")
    if number > highest:
        raise argparse.ArgumentTypeError(f"must be at most {highest}, not {number}")
    return number


def finite_number(text: str) -> float:
    """An argparse type: any number but infinity and nan."""
    number = float(text)
    if not abs(number) <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"must be a number up to {LARGEST_NUMBER:g}, not {text}")
    return number


positive_int = functools.partial(whole_number, lowest=1)
seed_number = functools.partial(whole_number, lowest=0, highest=LARGEST_SEED)
# argparse quotes them: invalid int value
positive_int.__name__ = seed_number.__name__ = whole_number.__name__ = "int"
finite_number.__name__ = "float"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command shares."""
    group = parser.add_argument_group(
        "model, data and study (a flag beats the environment, .env and the preset)"
    )
    for flag, metavar, text in (
        ("--preset", "NAME", f"{', '.join(PRESETS)}: defaults for all else (PRESET; default demo)"),
        ("--study", "NAME", "name of the study's folders (STUDY_NAME; default: the preset's name)"),
        ("--model", "ID_OR_FOLDER", "base model, of a family that README.md names (MODEL_NAME)"),
        ("--data", "SOURCE", "hub, sample, or a folder of <task>/<split>.jsonl (DATA_SOURCE)"),
    ):
        group.add_argument(flag, metavar=metavar, help=text)
    text = "put prompts as turns of the tokenizer's chat template, in training and measuring alike"
    group.add_argument("--apply-chat-template", action="store_true", default=None, help=text)
    text = "the chat's system message (default: the template's own)"
    group.add_argument("--system-instruction", metavar="TEXT", help=text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What an error about an unknown word asks; "" if none of those known is like it."""
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {close[0]}? " if close and close[0] != word else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the device's memory ran out."""
    # torch's own kind goes by its name, since torch is not imported here
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def reason_of(error: Exception) -> str:
    """An error of foreign code in one line: its kind, and its message's first line.

    Raises it again if the memory ran out, which says nothing of that code.
    """
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0]


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception: a full disk, a folder without permission.

    safetensors and torch raise kinds of their own that hold it in their message alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        message = str(error)
        codes = [code for code in SYSTEM_ADVICE if os.strerror(code) in message]
        if codes or "file write failed" in message:  # torch says no more: the disk is full
            code = codes[0] if codes else errno.ENOSPC
            return OSError(code, os.strerror(code))
        error = error.__cause__
    return None


def system_error_line(error: OSError) -> str:
    """What failed, where, and what to do."""
    where = f": {error.filename}" if error.filename else ""
    advice = SYSTEM_ADVICE.get(error.errno, "mend that")
    return f"{error.strerror}{where}; {advice}, then run the same command to resume"


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """Turn what the user can mend into one line on stderr and exit code 2, and Ctrl-C into 130.

    That is a UserError, an error of the disk, a missing package, and too little memory. A reader
    that closes the pipe, as `| head` does, ends the command without a word (141, as the shell has
    it). A command that takes a second or more ends by printing how long it took.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        start = time.monotonic()
        _make_outputs_writable()
        try:
            try:
                code = main(argv)
                if time.monotonic() - start >= 1:
                    print(f"{time.monotonic() - start:.0f} s")
                return code
            finally:
                sys.stdout.flush()  # here, since Python's own flush at the end cannot be caught
        except UserError as error:
            message = str(error)
        except KeyboardInterrupt:
            print("interrupted; run the same command to resume", file=sys.stderr)
            return 130
        except Exception as error:
            if cause := system_error(error):
                _discard_unwritable_output()
                if cause.errno == errno.EPIPE:
                    return 141
                message = system_error_line(cause)
            elif is_out_of_memory(error):
                message = "the memory ran out; choose smaller batches (see --help) and run"
                message += " the same command to resume: finished results are kept"
            elif not (message := missing_package(error)):
                raise
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
        return 2

    return wrapper


def _make_outputs_writable() -> None:
    """Give closed outputs a place to write to, and show what their encoding lacks as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_unwritable_output() -> None:
    """Send an output that takes no more nowhere, so that Python's last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def missing_package(error: Any) -> str:
    """The line for a package that is missing or too old; "" for any other error."""
    cause = error
    while cause.__cause__ and not getattr(cause, "name", None):  # transformers' own has none
        cause = cause.__cause__
    package = (getattr(cause, "name", None) or "config").partition(".")[0]
    is_ours = (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file()
    if not isinstance(cause, ImportError) or is_ours:
        return ""
    reason = cause.msg if type(cause) is ImportError else f"the package {package} is missing"
    return f"{reason}; pip install -r requirements.txt"


def _without_a_package(kind: type, error: Any, traceback: Any) -> None:
    """Python's excepthook, with one line for a package that a command lacks when it is imported."""
    is_command = ROOT in Path(sys.argv[0]).resolve().parents  # not a script of the user's own
    if not is_command or not (message := missing_package(error)):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


sys.excepthook = _without_a_package
