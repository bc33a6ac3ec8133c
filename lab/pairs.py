"""Is dpo so uneven because of its cell? Twice the tuning seeds, a wider grid, and a careful rule.

    python -m lab.pairs                  resumes; forty minutes on two cores

lab/claims.py chose dpo's learning rate and beta as every method's: by the median of four tuning
seeds. Here every cell runs on eight, and the best is chosen twice: by its median, and by its worst
seed, as one would who fears a bad run. Both then run on the reported seeds. Beside them stands what
the exact optimum of each beta loses: where dpo ends if all goes well. Writes pairs.json.
"""
import sys
from statistics import median

import train
from lab import figures, rewards, run
from lab.claims import KINDS, REPORTED_SEEDS, cells_of, rows_of
from lab.resume import Options, Parts, finish, settled
from lab.variants import Variant

DPO = Variant("dpo")
SEEDS = range(100, 108)
GRID = dict(learning_rate=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), beta=(0.5, 1, 2, 4, 8))
RULES = dict(median=median, worst=max)

# Fixed before any of this ran.
PREDICTIONS = dict(
    median="by the median of eight seeds a learning rate below 4e-3 is the best",
    steady="the cell of the least worst seed loses at most 50 % on every reported seed",
    price="its median on the reported seeds is at least 20 %: steadiness has a price",
)


def optima(parts):
    """{beta: what the optimum of that beta loses on each tuning seed}. Added when the grid had been
    seen: are its steady cells at their own optimum?"""
    lost = {beta: [] for beta in GRID["beta"]}
    for seed in SEEDS:
        world = train.load(f"{parts.shared(seed, *KINDS[0])[0]}.pt").worlds["train"]
        shares = rewards.ceilings(world, world.rewards)
        for beta in lost:
            lost[beta].append(shares[beta])
    return lost


def settle(settings):
    """What pairs.json says."""
    with run.Jobs(settings.jobs) as pool:
        parts = Parts(pool, settings)
        parts.prepared(SEEDS, KINDS[:1])
        cells = cells_of(GRID)
        found = iter(finish(pool, "dpo's grid", [parts.job(seed, DPO, cell, glance=True)
                                                 for cell in cells for seed in SEEDS]))
        lost = {cell: [figures.lost(next(found)["runs"]) for _ in SEEDS] for cell in cells}
        chosen = {rule: min(cells, key=lambda cell: worth(lost[cell]))
                  for rule, worth in RULES.items()}
        parts.prepared(REPORTED_SEEDS, KINDS[:1])
        runs = {rule: finish(pool, f"reported seeds, by the {rule}", [
            parts.job(seed, DPO, cell) for seed in REPORTED_SEEDS])
            for rule, cell in chosen.items()}
    tuning = [row for rule in RULES
              for row in rows_of({rule: lost}, chosen, lambda rule: dict(rule=rule))
              if row["best"] or rule == "median"]
    return dict(predictions=PREDICTIONS, tuning=tuning, optima=[*optima(parts).items()], runs=[
        dict(rule=rule, **part["runs"]) for rule in RULES for part in runs[rule]])


def main(arguments=None, settings=None):
    """Returns the status."""
    parser = run.parser_of(Options, "lab.pairs", "Is dpo so uneven because of its cell?")
    options = Options(**vars(parser.parse_args(arguments)))
    run.check_writable(parser, options.out)
    said = settled(parser, options, settings or train.Settings(), "pairs.json", settle)
    return 130 if said is None else 0


if __name__ == "__main__":
    sys.exit(main())
