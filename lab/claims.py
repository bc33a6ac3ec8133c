"""The paper's claims, settled: variants are tuned on grids, the best cell is run on other seeds.

    python -m lab.claims                 resumes; about two hours on two cores
    python -m lab.claims --tables        page and pictures anew, from claims.json alone

Writes claims.json, README.md and two pictures into a folder; in its parts/ lies each run by itself.
"""
import ast
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

import train
from lab import figures, memory, page, run, tables, variants
from lab.run import setting, whole
from lab.variants import Variant

# ---------------------------------------------------------------- what is tuned, and how
# A grid has sixteen cells, on the knobs that matter to its variant. All cells run on the first
# tuning seed. Where the best learning rate or beta is the grid's least or largest, the grid grows
# by one value beyond it, twice at most. The better eight then run on the second seed, four on the
# third, two on the last. The best has the least median.
TUNING_SEEDS, REPORTED_SEEDS = range(100, 104), range(21, 29)
KEPT, MOVES = (8, 4, 2), 2
PAIRS = dict(learning_rate=(5e-4, 1e-3, 2e-3, 4e-3), beta=(0.5, 1, 2, 4))
NO_OFFSET = dict(learning_rate=(1e-3, 2e-3, 4e-3, 8e-3), beta=(0.125, 0.25, 0.5, 1))
OFFSET = dict(learning_rate=(2e-3, 4e-3, 8e-3, 1.6e-2), beta=(0.25, 0.5, 1, 2))
UNA_ONLINE = dict(learning_rate=(1e-3, 2e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2),
                  leave_one_out=(False, True))
PPO = dict(learning_rate=(1.5e-3, 3e-3, 6e-3, 1.2e-2), epochs=(1, 2), divide=(False, True))
GRIDS = {
    Variant("una-pair"): PAIRS,                                  # dpo's too: the same loss
    **{Variant(name): NO_OFFSET for name in (
        "una-binary-mse", "una-binary-bce", "una-score", "una-mixed", "kto")},
    Variant("una-binary-offset", "learned"): OFFSET,
    Variant("una-score-offset", "estimated"): OFFSET,
    Variant("una-reward-offset", "estimated"): OFFSET,
    Variant("una-score", "learned"): OFFSET,
    Variant("una-reward", "learned"): OFFSET,
    Variant("una-reward", "residual"): OFFSET,
    **{Variant(name, level=1.0): NO_OFFSET for name in ("una-binary-bce", "una-score", "kto")},
    Variant("una-score", "constant", level=1.0): OFFSET,
    Variant("una-online"): UNA_ONLINE,
    Variant("una-online-score"): dict(learning_rate=(1e-3, 2e-3, 4e-3, 8e-3),
                                      beta=(0.25, 0.5, 1, 2)),
    Variant("ppo"): PPO,
    Variant("una-online", reward="model"): UNA_ONLINE,
    Variant("ppo", reward="model"): PPO,
}


# ---------------------------------------------------------------- parts
# A part is the result of one function, kept on the disk. Its name has all that the result depends
# on: the code that trains, but none of its prose, and of the methods' table the row that ran.
ROOT = Path(__file__).parent.parent
TRAINS = ("una.py", "model.py", "data.py", "train.py", "lab/exact.py", "lab/variants.py")


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
    return [syntax((ROOT / name).read_text(encoding="utf-8")) for name in TRAINS]


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

    def job(self, seed, variant, cell, glance=False, **changes):
        path, settings = self.shared(seed, variant.level, variant.reward)
        settings, cell = replace(settings, **changes), dict(cell)
        row = row_of(variants.method_of(variant, cell))
        return (part_path(self.folder, settings, seed, variant.method, variant, row, glance),
                variants.run_variant, settings, seed, variant, cell, f"{path}.pt", glance)


# ---------------------------------------------------------------- tuning
# A cell is a tuple of (knob, value).
def cells_of(grid):
    return [tuple(zip(grid, values)) for values in itertools.product(*grid.values())]


def grown(grid, best):
    """The grid with a value more wherever the best cell is at an end of rates or betas."""
    grid = dict(grid)
    for knob in ("learning_rate", "beta"):
        values = sorted(grid.get(knob, ()))
        if values and dict(best)[knob] == values[-1]:
            grid[knob] = (*values, round(values[-1] ** 2 / values[-2], 6))
        elif values and dict(best)[knob] == values[0]:
            grid[knob] = (round(values[0] ** 2 / values[1], 6), *values)
    return grid


def tune(parts):
    """claims.json's rows of the grids: what every cell lost, on the seeds where it ran."""
    lost, grids = {variant: {} for variant in GRIDS}, dict(GRIDS)

    def best(variant, count=1):
        ranked = sorted(lost[variant], key=lambda cell: (-len(lost[variant][cell]),
                                                         median(lost[variant][cell])))
        return ranked[:count]

    def run_all(title, seed, cells):
        todo = [(variant, cell) for variant in GRIDS for cell in cells(variant)]
        todo.sort(key=lambda pair: (pair[0].level, pair[0].reward))        # one file after another
        found = finish(parts.pool, title, [parts.job(seed, *pair, glance=True) for pair in todo])
        for (variant, cell), part in zip(todo, found):
            lost[variant].setdefault(cell, []).append(figures.lost(part["runs"]))

    first, *others = TUNING_SEEDS
    for move in range(1 + MOVES):
        new = {variant: [cell for cell in cells_of(grid) if cell not in lost[variant]]
               for variant, grid in grids.items()}
        run_all(f"grids, move {move}", first, new.get)
        if move < MOVES:
            grids = {variant: grown(grid, *best(variant)) for variant, grid in grids.items()}
    for count, seed in zip(KEPT, others):
        kept = {variant: best(variant, count) for variant in GRIDS}
        run_all(f"the better {count}", seed, kept.get)
    return [dict(variant._asdict(), cell=dict(cell), best=[cell] == best(variant),
                 lost=[share if share < math.inf else None for share in shares])
            for variant in GRIDS for cell, shares in lost[variant].items()]


# ---------------------------------------------------------------- what is reported
# Fixed before any reported seed ran. Lost is a median over the seeds, in percent of the possible
# gain; tables.prediction_rows says what was found.
PREDICTIONS = dict(
    estimated="`una-score-offset` loses at most a fifth of what `una-score` loses",
    levels="at level 1 `una-score-offset` loses at most twice what it loses at level 0",
    learned="at level 1 `una-binary-offset` loses at most half of what `una-binary-bce` loses",
    constant="at level 1 `una-score` with one constant loses more than 100 %",
    pairs="`dpo`'s best β is the task's",
    zero="with f = c = 0 the best β is at most a quarter of the task's (`una-binary-mse`, "
         "`una-binary-bce`, `una-score`)",
    online="`una-online` loses at most 0.1 %",
    alike="`una-online` and `ppo` end alike: their eight differences have both signs",
    sooner="`una-online` needs at most half of `ppo`'s seconds to 99 % of the gain",
)
KINDS = ((0.0, "judge"), (1.0, "judge"), (0.0, "model"))         # (level, source of rewards)
FEW = 4096                                                       # judged: nineteen passes


def reported(chosen, settings):
    """(variant, cell, settings that differ) of all that runs on the reported seeds.

    chosen: the best cell of each variant of GRIDS. A variant without a grid takes the cell of its
    nearest relative: of the same loss, then of the same kind of offset.
    """
    score, reward, binary = (Variant("una-score-offset", "estimated"),
                             Variant("una-reward-offset", "estimated"),
                             Variant("una-binary-offset", "learned"))
    constant = Variant("una-score", "constant", 1.0)
    fine = dict(evaluations=2 * settings.evaluations - 1)
    curves = {Variant("una-online"): fine, Variant("ppo"): fine,
              Variant("una-online-score"): dict(evaluations=settings.evaluations)}
    for variant in GRIDS:
        yield variant, chosen[variant], curves.get(variant, {})
    pair = chosen[Variant("una-pair")]
    yield Variant("dpo"), pair, {}
    yield Variant("dpo", level=1.0), pair, {}
    yield Variant("una-binary-mse", level=1.0), chosen[Variant("una-binary-bce", level=1.0)], {}
    for variant in (Variant("una-mixed"), score, reward, binary, Variant("una-score", "learned"),
                    Variant("una-reward", "learned"), Variant("una-reward", "residual"),
                    Variant("una-online")):
        yield variant._replace(level=1.0), chosen[variant], {}
    for level in (0.0, 1.0):
        for method, relative in (("una-score", score), ("una-reward", reward),
                                 ("una-binary-bce", binary)):
            yield Variant(method, "exact", level), chosen[relative], {}
            if (method, level) != ("una-score", 1.0):            # that one has a grid
                yield (Variant(method, "constant", level),
                       chosen[constant if level else relative], {})
        yield Variant("una-score", "residual", level), chosen[score], {}
        yield Variant("una-reward", "zero", level), chosen[Variant("una-score", level=level)], {}
        yield Variant("una-binary-bce", "estimated", level), chosen[binary], {}
    yield Variant("una-score", "held"), chosen[score], {}
    ppo = dict(chosen[Variant("ppo")])
    yield Variant("ppo"), tuple((ppo | dict(divide=not ppo["divide"])).items()), \
        dict(evaluations=2)                                      # the noise at both ends
    few = dict(judged=FEW)
    yield Variant("dpo"), pair, few
    for variant in (Variant("una-binary-bce"), Variant("una-score"), binary, score):
        yield variant, chosen[variant], few


def settle(settings):
    """Tunes every variant, runs the best of each on the reported seeds: what claims.json says."""
    with run.Jobs(settings.jobs) as pool:
        parts = Parts(pool, settings)
        parts.prepared(TUNING_SEEDS, KINDS)
        tuning = tune(parts)
        chosen = {Variant(*(row[name] for name in Variant._fields)): tuple(row["cell"].items())
                  for row in tuning if row["best"]}
        prepared = parts.prepared(REPORTED_SEEDS, KINDS)[KINDS[0]]
        found = finish(pool, "reported seeds", [
            parts.job(seed, variant, cell, **changes)
            for variant, cell, changes in reported(chosen, settings) for seed in REPORTED_SEEDS])
    claims = dict(settings=asdict(settings) | dict(seed=REPORTED_SEEDS[0],
                                                   seeds=len(REPORTED_SEEDS)),
                  device=settings.device, versions=run.versions(), predictions=PREDICTIONS,
                  tuning=tuning, reference=[], optimum=[], runs=[part["runs"] for part in found])
    for part in prepared:
        for kind, entry in part.items():
            claims[kind].append({name: value for name, value in entry.items()
                                 if name not in ("dots", "samples")})
    for entry in claims["optimum"][1:]:                          # the picture has one frontier
        del entry["frontier"]
    return claims | dict(peak_memory=memory.peak_memories(settings))


def write_page(claims, folder):
    """README.md and the pictures, from what claims.json says."""
    shown = claims | dict(runs=[entry for entry in tables.main_runs(claims)
                                if "diverged" not in entry])
    for name, draw, height in (("frontier.png", figures.draw_frontier, 5),
                               ("regret-over-time.png", figures.draw_regret, 4.5)):
        figures.picture(os.path.join(folder, name), draw, shown, figsize=(7, height))
    text = page.page(claims)
    run.save(os.path.join(folder, "README.md"),
             lambda partial: Path(partial).write_text(text, encoding="utf-8"))


@dataclass
class Options:
    out: str = setting("lab", "folder for claims.json, README.md, pictures and parts/")
    jobs: int = setting(0, "runs side by side, a thread each, 0: one a core, 1 on an accelerator",
                        whole(0))
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    tables: bool = setting(False, "README.md and pictures anew from claims.json, without training")


def main(arguments=None, settings=None):
    """Returns the status."""
    parser = run.parser_of(Options, "lab.claims", "The paper's claims, settled.")
    options = Options(**vars(parser.parse_args(arguments)))
    run.check_writable(parser, options.out)
    path = os.path.join(options.out, "claims.json")
    if options.tables:
        try:
            claims = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            parser.error(f"--tables: there is no {path}")
        except ValueError as error:
            parser.error(f"--tables: {path} is not whole: {error}")
        write_page(claims, options.out)
        return 0
    torch.set_num_threads(1)                                     # as in the processes of Jobs
    device = run.pick_device(parser, options.device)
    jobs = options.jobs or (run.cores() if device == "cpu" else 1)
    settings = replace(settings or train.Settings(methods=[*variants.COMPARED]), device=device,
                       jobs=jobs, out=options.out)
    try:
        claims = settle(settings)
        run.write_json(path, claims)
        write_page(claims, options.out)
    except KeyboardInterrupt as stop:
        run.say(f"lab.claims: interrupted in {stop or 'what follows the runs'}. Finished parts are "
                f"in {options.out}/parts: the same command goes on from there")
        return 130
    run.say(f"{options.out}: claims.json, README.md, two pictures")
    diverged = [entry for entry in claims["runs"] if "diverged" in entry]
    for entry in diverged:
        run.say(f"seed {entry['seed']} | {entry['method']} diverged: {entry['diverged']}")
    return 1 if diverged else 0


if __name__ == "__main__":
    sys.exit(main())
