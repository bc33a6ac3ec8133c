"""The command line, files, progress, and processes that end when they should."""
import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import figures, run
from short_train import timeless

ROOT = Path(__file__).parent.parent
SHORT = [sys.executable, str(ROOT / "tests" / "short_train.py")]
unix = pytest.mark.skipif(sys.platform == "win32", reason="these are the signals of Unix")


# ---------------------------------------------------------------- the command line
@dataclass
class Some:
    letters: list = run.setting("all", "which", run.names(["a", "b", "c"]))
    a_number: int = run.setting(3, "how many", run.whole(2, multiple_of=2, most=8))
    beta: float = run.setting(0.5, "a price", run.between(0.25, 4))
    loud: bool = run.setting(False, "say more")
    place: str = run.setting("here", "where", choices=("here", "there"))


def given(arguments):
    return vars(run.parser_of(Some, "some.py", "What it is.").parse_args(arguments.split()))


def test_the_parser_returns_what_was_given_and_no_more():
    assert given("") == {}
    assert given("--letters c,a --a-number 4 --beta .5 --loud --place there") == dict(
        letters=["c", "a"], a_number=4, beta=0.5, loud=True, place="there")
    assert given("--letters all") == dict(letters=["a", "b", "c"])
    assert given("--a-number 2 --beta 0.25") == dict(a_number=2, beta=0.25)
    assert given("--a-number 8 --beta 4") == dict(a_number=8, beta=4)


@pytest.mark.parametrize("arguments, told", [
    ("--letters d", "'d' is none of a, b, c"), ("--letters a,a", "twice"), ("--letters a,", "''"),
    ("--a-number 0", "at least 2"), ("--a-number 10", "at most 8"),
    ("--a-number 3", "a multiple of 2"), ("--a-number x", "invalid whole number value: 'x'"),
    ("--beta 0.2", "from 0.25 to 4"), ("--beta 5", "from 0.25 to 4"), ("--beta nan", "nan"),
    ("--beta x", "invalid number value: 'x'"), ("--place nowhere", "nowhere"), ("--loud 1", "1"),
    ("--nothing", "--nothing"), ("here", "here"),
])
def test_a_mistake_is_one_line_and_status_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        given(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error
    assert error.startswith("some.py: ") and error.count("\n") == 1


def test_help_has_every_flag_its_words_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        given("--help")
    told = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("--a-number A_NUMBER", "how many [3]", "a price [0.5]", "say more",
                  "{here,there}", "What it is."):
        assert words in told


def test_auto_is_a_device_that_is_there():
    assert run.pick_device(argparse.ArgumentParser(), "auto") in ("cuda", "mps", "cpu")
    assert run.pick_device(argparse.ArgumentParser(), "cpu") == "cpu"


# ---------------------------------------------------------------- files
def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "results.json"
    target.write_text("old")

    def fail(partial):
        Path(partial).write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError):
        run.save(str(target), fail)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_does_not_know_is_never_written(value, tmp_path):
    run.write_json(tmp_path / "a.json", dict(a=1))
    with pytest.raises(ValueError):
        run.write_json(tmp_path / "a.json", dict(a=value))
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == dict(a=1)


def test_a_new_results_json_takes_away_what_the_earlier_one_names_inside_the_folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "below").mkdir(parents=True)
    for path in (folder / "a.pt", folder / "mine.pt", folder / "below" / "b.pt", tmp_path / "c.pt"):
        path.write_text("")
    run.start_folder(folder, dict(files=["a.pt", "b.pt", "../c.pt", "below", "..", "", "gone.pt"]))
    assert (folder / "a.pt").exists()            # there was no earlier one
    run.start_folder(folder, dict(files=["d.pt"]))
    assert sorted(path.name for path in folder.iterdir()) == ["below", "mine.pt", "results.json"]
    assert (folder / "below" / "b.pt").exists() and (tmp_path / "c.pt").exists()
    assert json.loads((folder / "results.json").read_text("utf-8")) == dict(files=["d.pt"])


# ---------------------------------------------------------------- progress
def test_progress_is_for_terminals_alone(capsys, monkeypatch):
    run.begin("")
    run.show("step 1")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run.show("step 2")
    assert "step 2" in capsys.readouterr().err


def test_progress_is_one_line_with_its_title_cut_to_the_width(capsys, monkeypatch):
    def terminal():
        return capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    run.begin("seed 3 | dpo")
    run.show("step 1")
    assert terminal() == "\r\033[Kseed 3 | dpo | step 1"
    run.show("x" * 100)
    assert terminal() == "\r\033[K" + ("seed 3 | dpo | " + "x" * 100)[:39]
    run.say("it has ended")
    assert terminal() == "\r\033[Kit has ended\n"
    run.begin("")
    run.show("step 2")
    assert terminal() == "\r\033[Kstep 2"


def test_a_line_that_stays_is_plain_where_there_is_no_terminal(capsys):
    run.say("it has ended")
    assert capsys.readouterr() == ("", "it has ended\n")


def test_a_worker_shows_what_it_does_through_its_parent(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(run, "_channel", argparse.Namespace(put=told.append))
    run.begin("seed 0 | kto")
    run.show("step 1")
    run.begin("")
    assert told == [(os.getpid(), "seed 0 | kto | step 1")] and capsys.readouterr().err == ""


def test_a_clock_counts_what_happens_inside_alone(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = run.Clock("cpu")
    for _ in range(2):
        with clock:
            pass
    assert clock.seconds == 2.5


def test_one_process_runs_the_jobs_in_their_order_here():
    ended = []
    with run.Jobs(1) as jobs:
        jobs.run(lambda a, b: (a + b, os.getpid()), [(1, 2), (3, 4)],
                 lambda *both: ended.append(both))
    assert ended == [((1, 2), (3, os.getpid())), ((3, 4), (7, os.getpid()))]


# ---------------------------------------------------------------- processes without torch
# Importing it takes seconds, and run.py needs of it what it never computes with.
@pytest.fixture
def stub(tmp_path, odd_environment):
    """A function that starts a script with an empty torch: a Popen, stdout and stderr in pipes."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "torch.py").write_text("def set_num_threads(n): pass\n")
    path = f"{tmp_path / 'stubs'}{os.pathsep}{ROOT}"
    started = []

    def start(text, **changes):
        script = tmp_path / "script.py"
        script.write_text(text)
        started.append(subprocess.Popen(
            [sys.executable, str(script)], cwd=tmp_path, bufsize=0, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=odd_environment(dict(PYTHONPATH=path) | changes),
            start_new_session=True))
        return started[-1]
    yield start
    for process in started:
        end(process)


def end(process):
    """Whatever of a process and its children is left over from a test that failed."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.stderr.close()
    process.wait()


def test_json_is_utf8_whatever_the_locale(stub, tmp_path):
    process = stub("from lab import run\nrun.write_json('a.json', {'\\u03b2': '\\u00b1'})\n",
                   LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert process.communicate() == (b"", b"") and process.returncode == 0
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {"β": "±"}
    (tmp_path / "results.json").write_text('{"files": ["\u03b2.pt"]}', encoding="utf-8")
    process = stub("from lab import run\nprint(ascii(run.earlier_files('.')))\n",
                   LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert process.communicate()[0] == b"['\\u03b2.pt']\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_who_has_gone_away_costs_nothing_but_the_text(stream, stub, tmp_path):
    process = stub("import sys, time\nfrom lab import run\nsys.stdin.readline()\n"
                   "for _ in range(3):\n    run.print_text('a line')\n    run.say('another')\n"
                   "open('the-end', 'w').close()\n")
    getattr(process, stream).close()
    rest = process.stderr if stream == "stdout" else process.stdout
    assert rest.read() == b"another\n" * 3 if stream == "stdout" else b"a line\n" * 3
    assert process.wait() == 0 and (tmp_path / "the-end").exists()


# Each worker says that it imports, whether Ctrl-C is nothing to it by then, and later that it is
# busy; then it would take a minute.
BUSY = """
import signal
import sys
import time
if __name__ == "__mp_main__":
    deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    sys.stderr.write("importing deaf\\n" if deaf else "importing\\n")  # at once, not in pieces
    time.sleep(0.5)
from lab import run

def busy(n):
    sys.stderr.write("busy\\n")
    time.sleep(60)

if __name__ == "__main__":
    try:
        with run.Jobs(2) as jobs:
            jobs.run(busy, [(0,), (1,), (2,)], print)
    except KeyboardInterrupt:
        run.say("interrupted")
        sys.exit(130)
"""


def lines_until(process, text, times=1):
    """What stands on stderr up to the line that has text for the last of these times."""
    lines = []
    alarm = threading.Timer(90, process.kill)
    alarm.start()
    while sum(text in line for line in lines) < times:
        line = process.stderr.readline().decode()
        assert line, f"ended before {text!r}: {lines}"
        lines.append(line)
    alarm.cancel()
    return lines


def rest_of(process, seconds):
    """What follows on stderr. Its end means that no process is left that could write there: not
    the script, nor any of its workers."""
    return process.communicate(timeout=seconds)[1].decode()


@unix
@pytest.mark.parametrize("when", ["importing", "busy"])
def test_ctrl_c_ends_every_worker_even_one_that_has_hardly_begun(when, stub):
    process = stub(BUSY)
    lines = lines_until(process, when, 2)
    assert sum("importing deaf" in line for line in lines) == 2
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)                        # to all, as a terminal does
    rest = rest_of(process, 10)
    assert process.returncode == 130 and "interrupted\n" in rest
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


@unix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_workers_end_when_their_parent_is_killed(name, stub):
    process, killed = stub(BUSY), getattr(signal, name)
    lines_until(process, "busy", 2)
    os.kill(process.pid, killed)                                 # the parent alone
    rest = rest_of(process, 10)
    assert process.returncode == -killed and "Traceback" not in rest


def test_a_job_that_fails_ends_the_others(stub):
    process = stub(BUSY.replace("time.sleep(60)", "time.sleep(0.2 if n else 60); 1 / n; 1 / (n-1)"))
    assert "ZeroDivisionError" in rest_of(process, 20)
    assert process.returncode == 1


# ---------------------------------------------------------------- the real thing, side by side
@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    """train.py --jobs 2 | head -0, with an unknown backend and without UTF-8: folder, status, err.
    """
    folder = tmp_path_factory.mktemp("piped")
    odd = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", MPLBACKEND="nonsense")
    process = subprocess.Popen(
        [*SHORT, "--out", folder, "--jobs", "2", "--methods", "una-score,una-online"], text=True,
        env={**os.environ, **odd}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    return folder, process.wait(), err


def test_processes_side_by_side_give_the_figures_of_one(piped, short, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    short(tmp_path, "--methods una-score,una-online")
    here, there = (json.loads((folder / "results.json").read_text("utf-8"))
                   for folder in (tmp_path, piped[0]))
    assert there["settings"]["jobs"] == 2 and here["settings"]["jobs"] == 1
    for key in ("reference", "optimum", "runs"):
        assert timeless(there[key]) == timeless(here[key])
    assert [entry["method"] for entry in there["runs"]] == ["una-score", "una-online"]


def test_a_closed_pipe_costs_no_file_no_status_and_no_traceback(piped):
    folder, status, err = piped
    assert status == 0 and "Error" not in err and "Traceback" not in err
    files = json.loads((folder / "results.json").read_text("utf-8"))["files"]
    kept = [name for name in files if not name.startswith("shared-")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*kept, "results.json"])
    lines = err.splitlines()
    assert len(lines) == 4 and "reference" in lines[0] and "on 2 processes" in lines[-1]


def test_pictures_are_drawn_whatever_the_environment_says(piped):
    for name in figures.PICTURES:
        assert (piped[0] / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@unix
def test_ctrl_c_ends_train_py_and_its_workers_in_one_line(tmp_path):
    process = subprocess.Popen(
        [*SHORT, "--out", tmp_path, "--jobs", "2", "--steps", "10000000",
         "--methods", "una-score,una-pair,dpo"], bufsize=0, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        lines_until(process, "seed 0 | reference")
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        rest = rest_of(process, 10)
        assert process.returncode == 130
        assert rest.startswith("train.py: interrupted. 0 of 3 runs have ended: ")
        assert rest.count("\n") == 1 and str(tmp_path / "results.json") in rest
        results = json.loads((tmp_path / "results.json").read_text("utf-8"))
        assert len(results["reference"]) == 1 and results["runs"] == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["reference-0.pt",
                                                                    "results.json"]
    finally:
        end(process)
