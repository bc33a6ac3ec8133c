"""The paper's claims, settled: variants are tuned on grids, the best cell is run on other seeds.

    python -m lab.claims                 resumes; two to three hours on two cores
    python -m lab.claims --tables        page and pictures anew, from the JSON files there

Writes claims.json, README.md and its pictures into a folder. In its parts/ lies each run by
itself.
"""
import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import train
from lab import budget_tables, dots, figures, memory, page, resume, run, tables, variants
from lab.resume import Parts, claims_in, finish, settled
from lab.run import setting
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


def tune(grids, lost_of, moves):
    """{key: {cell: what it lost on each tuning seed that it ran on}}, and {key: its best cell}.

    grids: {key: grid}, which grow `moves` times at most. lost_of(title, seed, [(key, cell), ...])
    runs cells and tells what each lost.
    """
    lost, grids = {key: {} for key in grids}, dict(grids)

    def best(key, count=1):
        ranked = sorted(lost[key], key=lambda cell: (-len(lost[key][cell]),
                                                     median(lost[key][cell])))
        return ranked[:count]

    def run_all(title, seed, cells):
        todo = [(key, cell) for key in grids for cell in cells(key)]
        for (key, cell), share in zip(todo, lost_of(title, seed, todo)):
            lost[key].setdefault(cell, []).append(share)

    first, *others = TUNING_SEEDS
    for move in range(1 + moves):
        new = {key: [cell for cell in cells_of(grid) if cell not in lost[key]]
               for key, grid in grids.items()}
        run_all(f"grids, move {move}", first, new.get)
        if move < moves:
            grids = {key: grown(grid, *best(key)) for key, grid in grids.items()}
    for count, seed in zip(KEPT, others):
        kept = {key: best(key, count) for key in grids}
        run_all(f"the better {count}", seed, kept.get)
    return lost, {key: best(key)[0] for key in grids}


def rows_of(lost, chosen, words):
    """How a JSON file tells them: a row for each cell. words(key) says what the key is."""
    return [dict(words(key), cell=dict(cell), best=cell == chosen[key],
                 lost=[share if share < math.inf else None for share in shares])
            for key in lost for cell, shares in lost[key].items()]


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
    # Added when the other runs had been seen: that relative's beta was tuned for an offset that is
    # learned.
    if dict(chosen[binary])["beta"] != 1:
        cell = tuple((dict(chosen[binary]) | dict(beta=1)).items())
        for level in (0.0, 1.0):
            for offset in ("exact", "estimated"):
                yield Variant("una-binary-bce", offset, level), cell, {}
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

        def lost_of(title, seed, cells):
            one_file_after_another = sorted(cells, key=lambda pair: (pair[0].level, pair[0].reward))
            found = finish(pool, title, [parts.job(seed, *pair, glance=True)
                                         for pair in one_file_after_another])
            lost = {pair: figures.lost(part["runs"])
                    for pair, part in zip(one_file_after_another, found)}
            return [lost[pair] for pair in cells]

        lost, chosen = tune(GRIDS, lost_of, MOVES)
        prepared = parts.prepared(REPORTED_SEEDS, KINDS)[KINDS[0]]
        told = list(reported(chosen, settings))
        found = finish(pool, "reported seeds", [
            parts.job(seed, variant, cell, **changes)
            for variant, cell, changes in told for seed in REPORTED_SEEDS])
        cells = {variant: cell for variant, cell, changes in reversed(told)}
        films = finish(pool, "films", [parts.film(REPORTED_SEEDS[0], variant, cells[variant])
                                       for variant in dots.FILMED])
    claims = dict(settings=asdict(settings) | dict(seed=REPORTED_SEEDS[0],
                                                   seeds=len(REPORTED_SEEDS)),
                  device=settings.device, versions=run.versions(), predictions=PREDICTIONS,
                  tuning=rows_of(lost, chosen, Variant._asdict), reference=[], optimum=[],
                  runs=[part["runs"] for part in found],
                  dots=[part["dots"] for part in films])
    for part in prepared:
        for kind, entry in part.items():
            claims[kind].append({name: value for name, value in entry.items()
                                 if name not in ("dots", "samples")})
    for entry in claims["optimum"][1:]:                          # the picture has one frontier
        del entry["frontier"]
    return claims | dict(peak_memory=memory.peak_memories(settings))


def write_page(claims, folder):
    """README.md and the pictures, from what claims.json says and the other files that are there."""
    more = {path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in Path(folder).glob("*.json") if path.stem in page.FILES}
    budget = more.get("budget")
    shown = claims | dict(runs=[entry for entry in tables.main_runs(claims)
                                if "diverged" not in entry])
    for name, draw, height in (("frontier.png", figures.draw_frontier, 5),
                               ("regret-over-time.png", figures.draw_regret, 4.5)):
        figures.picture(os.path.join(folder, name), draw, shown, figsize=(8.5, height))
    dots.draw_pictures(claims["dots"], folder)
    if budget:
        budget_tables.draw_pictures(claims, budget, folder)
    text = page.page(claims, more)
    run.save(os.path.join(folder, "README.md"),
             lambda partial: Path(partial).write_text(text, encoding="utf-8"))


@dataclass
class Options(resume.Options):
    tables: bool = setting(False, "README.md and pictures anew from these files, no training")


def main(arguments=None, settings=None):
    """Returns the status."""
    parser = run.parser_of(Options, "lab.claims", "The paper's claims, settled.")
    options = Options(**vars(parser.parse_args(arguments)))
    run.check_writable(parser, options.out)
    if options.tables:
        write_page(claims_in(parser, options.out), options.out)
        return 0
    settings = settings or train.Settings(methods=[*variants.COMPARED])
    claims = settled(parser, options, settings, "claims.json", settle, write_page)
    if claims is None:
        return 130
    diverged = [entry for entry in claims["runs"] if "diverged" in entry]
    for entry in diverged:
        run.say(f"seed {entry['seed']} | {entry['method']} diverged: {entry['diverged']}")
    return 1 if diverged else 0


if __name__ == "__main__":
    sys.exit(main())
