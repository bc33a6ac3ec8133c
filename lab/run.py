"""What every long run needs: one line for a mistake, words on the terminal, files that are whole or
not there, and runs side by side. Knows nothing of what is run."""
import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

import torch


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, with status 2. Takes no flag that is cut short."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, allow_abbrev=False, **more)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):                         # Linux alone
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions():
    packages = ("torch", "numpy", "tiktoken", "matplotlib")
    return dict(python=platform.python_version(), **{name: version(name) for name in packages})


# ---------------------------------------------------------------- words
def say(text, stream=None, end="\n"):
    """A line on stderr, or on another stream. What cannot be written is dropped: no run ends
    because a pipe or a terminal has gone."""
    stream = stream or sys.stderr
    if stream is None or stream.closed:
        return
    try:
        over = "\r\033[K" if stream is sys.stderr and stream.isatty() else ""
        print(over + text, file=stream, end=end, flush=True)
    except OSError:
        with contextlib.suppress(OSError):                       # or Python would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(text):
    """What is going on: the last line of a terminal, over the one before. Nothing elsewhere."""
    if sys.stderr and not sys.stderr.closed and sys.stderr.isatty():
        say(text[:shutil.get_terminal_size().columns - 1], end="")


# ---------------------------------------------------------------- files
def save(path, write):
    """write(path), whole or not at all, even if two processes write there at once."""
    partial = f"{path}.{os.getpid()}.part"
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def write_json(path, content):
    """A dictionary, whole or not at all: a line for each key, and for each item of a list."""
    def lines(value):
        if isinstance(value, list):
            return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
        return json.dumps(value, allow_nan=False)
    text = ",\n".join(f"{json.dumps(key)}: {lines(value)}" for key, value in content.items())
    save(path, lambda partial: Path(partial).write_text(f"{{\n{text}\n}}\n", encoding="utf-8"))


def read_json(path):
    """What a JSON file of lab/ says; where it has null, for what a run that diverged lost, inf."""
    return json.loads(Path(path).read_text(encoding="utf-8").replace("null", "Infinity"))


# ---------------------------------------------------------------- runs side by side
def side_by_side(calls, processes):
    """Yields (call, its result) as they end, of calls (function, *arguments): each in one of so
    many processes, of a thread each; where one is enough, in this process.

    Whatever ends the loop early, Ctrl-C too, ends the processes with it.
    """
    if min(processes, len(calls)) <= 1:
        for function, *arguments in calls:
            yield (function, *arguments), function(*arguments)
        return
    # glibc would hand large tensors back at every free, and page them in again: that takes a third
    # of an exact evaluation. Other systems do not read these.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000000")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
    spawn = multiprocessing.get_context("spawn")                 # a forked torch may hang
    pool = ProcessPoolExecutor(min(processes, len(calls)), spawn, _begin)
    try:
        # A process that begins while Ctrl-C is ignored ignores it from its first moment.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(*call): call for call in calls}
        signal.signal(signal.SIGINT, handler)
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise SystemExit("a process was ended by the system, perhaps for want of memory: what had "
                         "ended before is kept") from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()                                       # or it might yet write a file
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)                                                  # it was killed: nobody wants this
