"""One mechanism for all long runs: what is missing is made, side by side, and kept.

A Run is all that a result depends on, but for the code. `results` makes those that are not on the
disk yet, so that a call goes on where the last one stopped. `tune` finds the best cell of a grid.
"""
import functools
import hashlib
import itertools
import json
import math
import os
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

import train
from lab import figures, run, variants

ROOT = Path(__file__).parent.parent
TRAINS = ("una.py", "model.py", "data.py", "train.py", "lab/exact.py", "lab/variants.py")


class Run(NamedTuple):
    """One result. method is of train.METHODS; or what there is without training: reference,
    optimum, theory (of GRPO); or "reward model"."""
    method: str
    offset: str = "zero"        # or estimated, learned, exact, from zero: learned from there
    level: float = 0.0
    reward: str = "judge"
    judged: int = 76_800
    steps: int = 400
    cell: tuple = ()            # (knob, value): what a grid sets, but for steps
    seed: int = 0
    points: int = 1             # of a learning curve; 1: there is none


class Lab(NamedTuple):
    """Where results are kept, how many are made at a time, and flags of train.py for all."""
    folder: str
    jobs: int = 1
    flags: tuple = ()


def at(key, cell, **fields):
    """A Run in a cell, a tuple of (knob, value)."""
    steps = dict(cell).get("steps", key.steps)
    return key._replace(cell=tuple(pair for pair in cell if pair[0] != "steps"), steps=steps,
                        **fields)


# ---------------------------------------------------------------- results
def results(lab, title, runs):
    """The entries of Runs, in order: dictionaries of the Run's fields and what was measured."""
    paths = {its: path_of(lab, its, ".json") for its in runs}
    missing = sorted((its for its in paths if not os.path.exists(paths[its])), key=ground)
    run.say(f"{title}: {len(paths)} runs, {len(paths) - len(missing)} of them are there already")
    os.makedirs(os.path.join(lab.folder, "parts"), exist_ok=True)
    grounds = [its for its in dict.fromkeys(map(ground, missing))
               if not os.path.exists(path_of(lab, its, ".pt"))]
    list(run.side_by_side([(prepare, lab, its) for its in grounds], lab.jobs))
    made = run.side_by_side([(make, lab, its) for its in missing], lab.jobs)
    for n, ((_, _, its), entry) in enumerate(made, 1):
        run.write_json(paths[its], entry)
        run.say(f"{title}, {n} of {len(missing)}: {its.method}, seed {its.seed}")
    return [json.loads(Path(paths[its]).read_text(encoding="utf-8")) for its in runs]


def ground(its):
    """What a Run stands on: those with the same share what train.prepare makes."""
    return Run("ground", level=its.level, reward=its.reward, seed=its.seed, judged=None, steps=None)


def settings_of(lab, its):
    fields = {name: getattr(its, name) for name in ("seed", "level", "reward", "judged", "steps")}
    flags = [f"--{name}={value}" for name, value in fields.items() if value is not None]
    return train.parse([*lab.flags, *flags, "--out="])


def path_of(lab, its, ending):
    """The name has all that the result depends on."""
    digest = hashlib.sha256(json.dumps([code(), run.versions(), lab.flags, its]).encode())
    return os.path.join(lab.folder, "parts", f"{its.method.replace(' ', '-')}-{its.seed}-"
                                             f"{digest.hexdigest()[:16]}{ending}")


@functools.cache
def code():
    return [hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in TRAINS]


def prepare(lab, its):
    made = train.prepare(settings_of(lab, its), its.seed)        # a hundred megabytes
    run.save(path_of(lab, its, ".pt"), lambda path: torch.save(made, path))


def make(lab, its):
    told = variants.entry(its, settings_of(lab, its), load(path_of(lab, ground(its), ".pt")))
    return its._asdict() | dict(cell=dict(its.cell)) | told


@functools.lru_cache(maxsize=1)
def load(path):
    return torch.load(path, weights_only=False)


# ---------------------------------------------------------------- grids
# All cells of a grid, {knob: values}, run on the first two tuning seeds. Where the cell of the
# least mean lost has the grid's least or largest learning rate, beta or anchor, the grid grows once
# by a value beyond it. The better four run on all eight tuning seeds, and the least mean wins, so
# that one breakdown in eight counts.
TUNING_SEEDS, REPORTED_SEEDS, FIRST, KEPT = range(100, 108), range(21, 29), 2, 4
FEWER = REPORTED_SEEDS[:5]                                       # for time


def cells_of(grid):
    return [tuple(zip(grid, values)) for values in itertools.product(*grid.values())]


def grown(grid, best):
    """The grid with a value more wherever the best cell is at an end of rates, betas or anchors."""
    grid = dict(grid)
    for knob in ("learning_rate", "beta_multiple", "anchor"):
        values = sorted(grid.get(knob, ()))
        for end, inner in ((0, 1), (-1, -2)):
            if len(values) > 1 and dict(best)[knob] == values[end]:
                beyond = round(values[end] ** 2 / values[inner], 6)
                grid[knob] = tuple(sorted([*values, beyond]))
    return grid


def lost_of(lab, title, runs):
    return [figures.lost(entry) for entry in results(lab, title, runs)]


def tune(lab, grids, lost_of=lost_of):
    """{key: {cell: what it lost on each tuning seed that it ran on}}, and {key: its best cell}.

    grids: {a Run without a cell: grid}. lost_of tells what each of some Runs lost.
    """
    lost = {key: {} for key in grids}

    def ranked(key):
        """Its cells, the least mean first; those that ran on all seeds before the others."""
        return sorted(lost[key], key=lambda cell: (-len(lost[key][cell]), mean(lost[key][cell])))

    def run_all(title, seeds, cells):
        todo = [(key, cell, seed) for key in cells for cell in cells[key] for seed in seeds]
        runs = [at(key, cell, seed=seed) for key, cell, seed in todo]
        for (key, cell, _), share in zip(todo, lost_of(lab, title, runs)):
            lost[key].setdefault(cell, []).append(share)

    run_all("grids", TUNING_SEEDS[:FIRST], {key: cells_of(grid) for key, grid in grids.items()})
    run_all("grown grids", TUNING_SEEDS[:FIRST], {
        key: [cell for cell in cells_of(grown(grid, ranked(key)[0])) if cell not in lost[key]]
        for key, grid in grids.items()})
    run_all(f"the better {KEPT}", TUNING_SEEDS[FIRST:], {key: ranked(key)[:KEPT] for key in grids})
    return lost, {key: ranked(key)[0] for key in grids}


def rows_of(lost, chosen):
    """How a JSON file tells of grids: a row for each cell. A run that diverged lost null."""
    return [dict(method=key.method, offset=key.offset, level=key.level, reward=key.reward,
                 judged=key.judged, cell=dict(cell), best=cell == chosen[key],
                 lost=[share if share < math.inf else None for share in shares])
            for key in lost for cell, shares in lost[key].items()]


def best_cell(rows, key, **fixed):
    """The best of a Run's cells, of the rows of a tuning, that have these knobs."""
    wanted = dict(method=key.method, offset=key.offset, level=key.level, reward=key.reward,
                  judged=key.judged) | fixed
    rows = [row for row in rows if wanted.items() <= (row | row["cell"]).items()]
    best = max(rows, key=lambda row: (len(row["lost"]), -mean(row["lost"])))
    return tuple(best["cell"].items())
