"""What a person with a budget asks: how many judgements, and what a reward model costs.

    python -m lab.budget                 resumes; two hours on two cores

Stored feedback on 1200, 9600 and 76,800 judged responses, each method tuned at each size; and
reward models of the pairs among these, with their exact optima. All of it at level 1, by the rules
of lab/claims.py, whose claims.json has what 76,800 judged responses bring. Writes budget.json
there; python -m lab.claims --tables makes the page of all.
"""
import sys
from dataclasses import replace

import train
from lab import figures, rewards, run
from lab.claims import REPORTED_SEEDS, TUNING_SEEDS, rows_of, tune
from lab.resume import Options, Parts, claims_in, finish, part_path, settled
from lab.variants import Variant

SIZES, FULL = (1200, 9600), 76_800                                # judged responses
STEPS = (100, 200, 400)
LEVEL = 1.0

# ---------------------------------------------------------------- what is tuned, and how
# As in lab/claims.py, with coarser steps of learning rate and beta, since there is a third knob; a
# grid grows once at most. A key is a variant or "reward model", and a number of judged responses.
NO_OFFSET = dict(learning_rate=(1e-3, 4e-3), beta=(0.0625, 0.25, 1), steps=STEPS)
OFFSET = dict(learning_rate=(2e-3, 8e-3), beta=(0.25, 1, 4), steps=STEPS)
STORED = {
    Variant("dpo", level=LEVEL): dict(learning_rate=(1e-3, 4e-3), beta=(1, 4, 16), steps=STEPS),
    Variant("kto", level=LEVEL): dict(learning_rate=(1e-3, 4e-3), beta=(0.25, 1, 4), steps=STEPS),
    Variant("una-binary-bce", level=LEVEL): NO_OFFSET,
    Variant("una-binary-offset", "learned", LEVEL): OFFSET,
    Variant("una-score", level=LEVEL): NO_OFFSET,
    Variant("una-score-offset", "estimated", LEVEL): OFFSET,
    Variant("una-score", "learned", LEVEL): OFFSET,
    Variant("una-mixed", level=LEVEL): NO_OFFSET,
}
# claims.json has all of these with 76,800, but una-mixed's cell is that of level 0 there.
MIXED = Variant("una-mixed", level=LEVEL)
GRIDS = {(variant, size): grid for size in SIZES for variant, grid in STORED.items()} | {
    (MIXED, FULL): dict(learning_rate=(1e-3, 2e-3, 4e-3, 8e-3), beta=(0.0625, 0.25, 1, 4),
                        steps=(400,))}
# The betas of a reward model's optimum cost no training, only its learning rate and steps do.
MODEL_GRIDS = {("reward model", size): dict(learning_rate=(3e-4, 1e-3, 3e-3), steps=STEPS,
                                            beta=(1, 2, 4)) for size in (*SIZES, FULL)}
MOVES = 1
ONLINE = ("una-online", "ppo")

# Fixed before any of this ran, but for claims.json and single runs of seed 100. Lost is a median
# over the reported seeds.
PREDICTIONS = dict(
    few_scores="`una-score-offset` loses less from 1200 scores than `dpo` from 38,400 pairs",
    zero="`una-score` with f = c = 0 loses at least 0.8 times as much from 76,800 scores as from "
         "9600: what it lacks is not data",
    learned="`una-score` with a learned offset loses less than `una-score-offset` at every size",
    binary="`una-binary-offset` loses less from 9600 labels than `una-binary-bce` from 76,800",
    pairs="`dpo`'s best β from 600 pairs is more than the task's",
    detour="at every size the optimum of the reward model loses less than `dpo` on the same pairs",
    optimiser="`una-online` and `ppo` lose at most 1 % by the measure of their reward model, at "
              "every size",
    exploitation="from 600 pairs the optimum of the reward model gains more by the model than by "
                 "the judge, on all seeds",
)


def explained(chosen):
    """(key, cell) of runs that were added when a tuning seed had been seen: from 1200 scores the
    learned offset lost far less than the estimated one. Is that the estimate's error? The exact
    beta log Z(x) in the cells of both tells."""
    for size in SIZES:
        cells = [chosen[Variant(method, offset, LEVEL), size] for method, offset in (
            ("una-score-offset", "estimated"), ("una-score", "learned"))]
        for cell in dict.fromkeys(cells):
            yield (Variant("una-score", "exact", LEVEL), size), cell


def words(key):
    """What a row of budget.json says of a grid's key."""
    variant, size = key
    if variant == "reward model":
        return dict(method=variant, judged=size)
    return dict(variant._asdict(), judged=size)


def stored_job(parts, seed, key, cell, glance=False):
    """The job of lab/resume.py for a run of stored feedback."""
    (variant, size), cell = key, dict(cell)
    return parts.job(seed, variant, cell, glance, judged=size, steps=cell.pop("steps"))


def model_job(parts, seed, size, cell, function, *more):
    """The job for a reward model in a cell."""
    path, settings = parts.shared(seed, LEVEL, "judge")
    settings = replace(settings, judged=size)
    name = part_path(parts.folder, settings, seed, "reward-model", function.__name__, cell, *more)
    return name, function, settings, seed, cell, f"{path}.pt", *more


def settle(settings, claims):
    """Tunes, and runs the best cells on the reported seeds: what budget.json says."""
    with run.Jobs(settings.jobs) as pool:
        parts = Parts(pool, settings)
        parts.prepared(TUNING_SEEDS, [(LEVEL, "judge")])

        def stored_lost(title, seed, cells):
            found = finish(pool, title, [stored_job(parts, seed, *pair, glance=True)
                                         for pair in cells])
            return [figures.lost(part["runs"]) for part in found]

        def model_lost(title, seed, cells):
            """Cells that differ in beta alone share a job."""
            def apart(key, cell):
                trained = {knob: value for knob, value in cell if knob != "beta"}
                return model_job(parts, seed, key[1], trained, rewards.glance)
            jobs = {name: (name, *job) for name, *job in (apart(*pair) for pair in cells)}
            found = dict(zip(jobs, finish(pool, f"reward models, {title}", [*jobs.values()])))
            return [dict(found[apart(*pair)[0]]["model"]["ceilings"])[dict(pair[1])["beta"]]
                    for pair in cells]

        lost, chosen = tune(GRIDS, stored_lost, MOVES)
        parts.prepared(REPORTED_SEEDS, [(LEVEL, "judge")])
        stored = finish(pool, "reported seeds", [
            stored_job(parts, seed, key, cell)
            for seed in REPORTED_SEEDS for key, cell in (*chosen.items(), *explained(chosen))])
        fine = dict(evaluations=2 * settings.evaluations - 1)
        best = {name: {source: next(
            row["cell"] for row in claims["tuning"] if row["best"] and (
                row["method"], row["level"], row["reward"]) == (name, 0.0, source))
            for source in ("judge", "model")} for name in ONLINE}
        curves = finish(pool, "learning curves", [
            parts.job(seed, Variant(name, level=LEVEL), best[name]["judge"], **fine)
            for seed in REPORTED_SEEDS for name in ONLINE])
        model_lost_of, model_chosen = tune(MODEL_GRIDS, model_lost, MOVES)
        optimisers = {name: best[name]["model"] for name in ONLINE}
        models = finish(pool, "reward models, reported seeds", [
            model_job(parts, seed, key[1], dict(cell), rewards.run_on_model, optimisers)
            for seed in REPORTED_SEEDS for key, cell in model_chosen.items()])
    return dict(predictions=PREDICTIONS,
                tuning=[*rows_of(lost, chosen, words),
                        *rows_of(model_lost_of, model_chosen, words)],
                runs=[part["runs"] for part in (*stored, *curves)],
                models=[part["model"] for part in models])


def main(arguments=None, settings=None):
    """Returns the status."""
    parser = run.parser_of(Options, "lab.budget", "How many judgements, and what a reward model "
                                                  "costs.")
    options = Options(**vars(parser.parse_args(arguments)))
    run.check_writable(parser, options.out)
    claims = claims_in(parser, options.out)
    said = settled(parser, options, settings or train.Settings(), "budget.json",
                   lambda settings: settle(settings, claims))
    return 130 if said is None else 0


if __name__ == "__main__":
    sys.exit(main())
