"""What every experiment needs and no reader of the paper: a command line, runs side by side, what
they say meanwhile, and files that are whole or not there. Knows nothing of what is run."""
import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import field, fields
from importlib.metadata import version
from pathlib import Path

import torch

SPAWN = multiprocessing.get_context("spawn")                     # a forked torch may hang


# ---------------------------------------------------------------- the command line
def setting(default, help, type=None, **words):
    """A field of a dataclass of settings that is a flag too; words go to argparse."""
    return field(default=default, metadata=dict(help=help, type=type, **words))


def names(known):
    """An argparse type: names of `known`, comma-separated, or all; a list."""
    def listed(text):
        chosen = [*known] if text == "all" else text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        if len(set(chosen)) < len(chosen):
            raise argparse.ArgumentTypeError(f"a name stands twice: {text}")
        return chosen
    return listed


def whole(least, multiple_of=1, most=math.inf):
    """An argparse type."""
    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        if value % multiple_of:
            raise argparse.ArgumentTypeError(f"must be a multiple of {multiple_of}, got {value}")
        return value
    number.__name__ = "whole number"                             # argparse: invalid ... value
    return number


def between(low, high):
    """An argparse type."""
    def number(text):
        if not low <= (value := float(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
        return value
    number.__name__ = "number"
    return number


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, with status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parser_of(settings, prog, description):
    """A parser with a flag for each field of a dataclass; it returns what was given, no more."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    for item in fields(settings):
        words = dict(item.metadata)
        if item.type is bool:
            words = dict(action="store_true", help=words["help"])
        else:
            words["help"] += f" [{item.default}]"
            words["type"] = words["type"] or item.type
            if "choices" not in words:
                words["metavar"] = item.name.upper()
        parser.add_argument("--" + item.name.replace("_", "-"), **words)
    return parser


def pick_device(parser, name):
    """The device that `auto` stands for, or the one named, if it is there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(device for device in there if there[device])
    if not there[name]:
        parser.error(f"--device {name}: there is no such device here")
    return name


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):                         # Linux alone
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_writable(parser, folder):
    """Makes the folder, or says why nothing can be written there."""
    try:
        earlier_files(folder)
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(f"--out {folder}: cannot write there: {error.strerror}")
    except ValueError as error:
        parser.error(f"--out {folder}: {error}")


@functools.cache                                                 # ten milliseconds a time
def versions():
    packages = ("torch", "numpy", "tiktoken", "matplotlib")
    return dict(python=platform.python_version(), **{name: version(name) for name in packages})


# ---------------------------------------------------------------- files and text
def save(path, write):
    """write(path), whole or not at all."""
    partial = f"{path}.part"
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def write_json(path, content):
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    save(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def earlier_files(folder):
    """Names of the files that an earlier results.json of this folder lists; None if there is none.

    ValueError if it is something else.
    """
    path = Path(folder) / "results.json"
    if not path.exists():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        if isinstance(files, list):
            return [Path(name).name for name in files]
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError("the results.json there is not of a run: move it, or name another folder")


def start_folder(folder, results):
    """Removes what an earlier results.json of this folder names, and writes the new one.

    So what lies beside results.json always belongs to it.
    """
    earlier = earlier_files(folder)
    if earlier is not None:
        for path in (Path(folder) / name for name in earlier):
            if path.is_file():
                path.unlink()
        say(f"{folder}: the files of an earlier run are removed")
    write_json(Path(folder) / "results.json", results)


def print_text(text, stream=None):
    """Prints; a reader who has closed the pipe costs nothing but the text."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_channel = None                                                  # in a worker: where progress goes
_title = ""


def begin(title):
    """Names what is going on from now on in this process."""
    global _title
    _title = title


def show(text):
    """What is going on: the last line of a terminal, over the one before. Nothing elsewhere."""
    text = " | ".join(filter(None, (_title, text))) if text else ""
    if _channel is not None:
        _channel.put((os.getpid(), text))
    elif sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)


def say(text):
    """A line that stays, on stderr."""
    show("")
    print_text(text, sys.stderr)


# ---------------------------------------------------------------- time
class Clock:
    """Seconds spent inside `with clock:`, the device's work included."""

    def __init__(self, device):
        self.seconds, self.device = 0.0, torch.device(device)

    def now(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def __enter__(self):
        self.started = self.now()

    def __exit__(self, *_):
        self.seconds += self.now() - self.started


# ---------------------------------------------------------------- runs side by side
def _in_worker(channel):
    global _channel
    _channel = channel
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _at_work(function, *job):
    result = function(*job)
    show("")                                                     # nothing goes on here any more
    return result


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)                                                  # it was killed: nobody wants this


class Jobs:
    """`with Jobs(n) as jobs:` runs functions in n processes, a thread each; with n = 1 in this one.

    Whatever ends the block early, Ctrl-C too, ends the processes with it.
    """

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        if self.n > 1:
            # glibc would hand large tensors back at every free, and page them in again: that takes
            # a third of an exact evaluation. Other systems do not read these.
            os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000000")
            os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
            self.channel = SPAWN.SimpleQueue() if sys.stderr.isatty() else None
            self.pool = ProcessPoolExecutor(self.n, SPAWN, _in_worker, (self.channel,))
            if self.channel:
                threading.Thread(target=self._relay, daemon=True).start()
            self._submit(os.getpid, [()] * self.n)               # so that all processes begin now
        return self

    def __exit__(self, failure, *_):
        if self.n > 1:
            self.pool.shutdown(wait=failure is None, cancel_futures=True)
            if failure is not None:
                for process in multiprocessing.active_children():
                    process.terminate()
                    process.join()                               # or it might yet write a file

    def _relay(self):
        doing = {}
        while True:
            process, text = self.channel.get()
            doing[process] = text
            show(" || ".join(filter(None, doing.values())))

    def _submit(self, function, jobs):
        # A process that begins while Ctrl-C is ignored ignores it from its first moment.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {self.pool.submit(_at_work, function, *job): job for job in jobs}
        signal.signal(signal.SIGINT, handler)
        return futures

    def run(self, function, jobs, ended):
        """ended(job, function(*job)) for each job, as they end."""
        if self.n == 1:
            for job in jobs:
                ended(job, function(*job))
        else:
            futures = self._submit(function, jobs)
            for future in as_completed(futures):
                ended(futures[future], future.result())


