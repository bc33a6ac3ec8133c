"""Results of long runs, kept on the disk one by one, so that a call goes on where the last stopped.

A part is the result of one function. Its name has all that the result depends on: the code that
trains, but none of its prose, and of the methods' table the row that ran.
"""
import ast
import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lab import dots, figures, run, variants
from lab.run import setting, whole

ROOT = Path(__file__).parent.parent
TRAINS = ("una.py", "model.py", "data.py", "train.py", "lab/exact.py", "lab/variants.py",
          "lab/rewards.py", "lab/dots.py")


def syntax(source):
    """A Python source without its comments and docstrings, and without train.METHODS."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (
        isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        and getattr(node.targets[0], "id", "") == "METHODS")]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def code_that_trains():
    sources = [syntax((ROOT / name).read_text(encoding="utf-8")) for name in TRAINS]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def row_of(method):
    """A train.Method, as text."""
    loss = method.loss
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    name = getattr(loss, "func", loss).__name__
    return [method.feedback, name, options, *method[2:]]


def part_path(folder, settings, seed, name, *what):
    key = json.dumps([code_that_trains(), run.versions(), asdict(settings), seed, name, *what])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return os.path.join(folder, f"{name}-{seed}-{digest}.json")


def make_part(path, function, *arguments):
    entries = function(*arguments)
    run.write_json(path, entries)
    return entries


def finish(pool, title, jobs):
    """What the parts of jobs (path, function, *arguments) say, in order: {kind: entry} each.

    What lies there already is not run again.
    """
    missing, ended = [job for job in jobs if not os.path.exists(job[0])], 0
    run.say(f"{title}: {len(jobs)} parts, {len(jobs) - len(missing)} of them are there already")

    def tell(job, entries):
        nonlocal ended
        ended += 1
        run.say(f"{title}, {ended} of {len(missing)} | {figures.line(entries)}")

    try:
        pool.run(make_part, missing, tell)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{title}, {ended} of {len(missing)} parts done") from None
    return [json.loads(Path(job[0]).read_text(encoding="utf-8")) for job in jobs]


class Parts:
    """Makes parts in a folder, and what they stand on: a prepared file for each seed, level,
    source of rewards."""

    def __init__(self, pool, settings):
        self.pool, self.folder = pool, os.path.join(settings.out, "parts")
        os.makedirs(self.folder, exist_ok=True)
        self.base = replace(settings, out="", jobs=1, evaluations=1)  # they change no figure here

    def prepared(self, seeds, kinds):
        """What train.prepare says of each (level, source of rewards) of kinds, for each seed."""
        entries = {}
        for level, reward in kinds:                              # the first has the references
            jobs = []
            for seed in seeds:
                path, settings = self.shared(seed, level, reward)
                reference = self.shared(seed, *kinds[0])[0] if (level, reward) != kinds[0] else None
                if not os.path.exists(f"{path}.pt"):             # both, or none
                    Path(path).unlink(missing_ok=True)
                jobs.append((path, variants.prepare, settings, seed, f"{path}.pt",
                             reference and f"{reference}.pt"))
            entries[level, reward] = finish(self.pool, f"seeds, level {level:g}, {reward}", jobs)
        return entries

    def shared(self, seed, level, reward):
        settings = replace(self.base, level=level, reward=reward)
        return part_path(self.folder, settings, seed, "shared"), settings

    def film(self, seed, variant, cell):
        path, settings = self.shared(seed, variant.level, variant.reward)
        row = row_of(variants.method_of(variant, dict(cell)))
        return (part_path(self.folder, settings, seed, "film", variant, row, dots.FRAMES),
                dots.film, settings, seed, variant, dict(cell), f"{path}.pt")

    def job(self, seed, variant, cell, glance=False, **changes):
        path, settings = self.shared(seed, variant.level, variant.reward)
        settings, cell = replace(settings, **changes), dict(cell)
        row = row_of(variants.method_of(variant, cell))
        return (part_path(self.folder, settings, seed, variant.method, variant, row, glance),
                variants.run_variant, settings, seed, variant, cell, f"{path}.pt", glance)


# ---------------------------------------------------------------- the command line
@dataclass
class Options:
    out: str = setting("lab", "folder for the files, and for parts/")
    jobs: int = setting(0, "runs side by side, a thread each, 0: one a core, 1 on an accelerator",
                        whole(0))
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))


def claims_in(parser, folder):
    """What the folder's claims.json says; if there is none, or half, a line and status 2."""
    path = Path(folder) / "claims.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        parser.error(f"there is no {path}: python -m lab.claims makes it")
    except ValueError as error:
        parser.error(f"{path} is not whole: {error}")


def settled(parser, options, settings, name, settle, then=None):
    """What settle(settings) says, written to the file `name`; then(it, folder) is called.

    None, and a line that says so, if Ctrl-C came before the end.
    """
    torch.set_num_threads(1)                                     # as in the processes of Jobs
    device = run.pick_device(parser, options.device)
    jobs = options.jobs or (run.cores() if device == "cpu" else 1)
    try:
        said = settle(replace(settings, device=device, jobs=jobs, out=options.out))
        run.write_json(os.path.join(options.out, name), said)
        if then:
            then(said, options.out)
    except KeyboardInterrupt as stop:
        run.say(f"{parser.prog}: interrupted in {stop or 'what follows the runs'}. Finished parts "
                f"are in {options.out}/parts: the same command goes on from there")
        return None
    run.say(f"{options.out}: {name}")
    return said
