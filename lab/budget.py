"""What a person with a budget asks: how many judgements, and what a reward model costs.

    python -m lab budget                 goes on where it stopped; an hour and a half on two cores

Stored feedback on 1200, 9600 and 76,800 judged responses at level 1, where f(x) matters, by the
rules of lab/stored.py; and reward models of the pairs among these, with their exact optima.
"""
from pathlib import Path

from lab import campaign, run
from lab.campaign import FEWER, REPORTED_SEEDS, Run, at, results

FEW, SOME, FULL = 1200, 9600, 76_800                             # judged responses

# ---------------------------------------------------------------- what is tuned
# With few responses the number of steps matters, since they are seen again and again. Where
# f(x) + c is right, or an anchor holds the mass, theory has the loss's beta: the task's.
DPO, ANCHOR, SCORE, BCE = (Run(name, level=1.0) for name in (
    "dpo", "una-pair-anchored", "una-score", "una-binary-bce"))
LEARNED, SCORE_LEARNED = (key._replace(offset="learned") for key in (BCE, SCORE))
FROM_ZERO = SCORE._replace(offset="from zero")
ESTIMATED = SCORE._replace(offset="estimated")
TASKS = dict(beta_multiple=(1,))
# With few scores it is open where a learned f(x) + c should begin: balanced, or at 0.
GRIDS = {key._replace(judged=size): grid for size, grids in {
    FEW: {
        DPO: dict(learning_rate=(5e-4, 1e-3), beta_multiple=(4, 16), steps=(100,)),
        ANCHOR: dict(learning_rate=(2e-3,), anchor=(0.01, 0.03), steps=(100, 400)) | TASKS,
        LEARNED: dict(learning_rate=(2e-3, 4e-3), beta_multiple=(0.5, 1), steps=(100,)),
        SCORE_LEARNED: dict(learning_rate=(4e-3, 8e-3), steps=(200, 400)) | TASKS,
        FROM_ZERO: dict(learning_rate=(4e-3, 8e-3), steps=(200, 400)) | TASKS,
        ESTIMATED: dict(learning_rate=(8e-3,), ramp=(0, 0.5), beta_multiple=(1, 4), steps=(400,)),
    },
    SOME: {
        DPO: dict(learning_rate=(1e-3,), beta_multiple=(2, 4)),
        ANCHOR: dict(learning_rate=(2e-3,), anchor=(0.01, 0.03)) | TASKS,
        LEARNED: dict(learning_rate=(2e-3,), beta_multiple=(0.25, 0.5)),
        SCORE: dict(learning_rate=(8e-3,), beta_multiple=(0.0625, 0.25)),
        SCORE_LEARNED: dict(learning_rate=(2e-3, 4e-3, 8e-3)) | TASKS,
        ESTIMATED: dict(learning_rate=(4e-3, 8e-3), ramp=(0, 0.5)) | TASKS,
    },
    FULL: {
        BCE: dict(learning_rate=(4e-3,), beta_multiple=(0.0625, 0.25)),
        SCORE: dict(learning_rate=(4e-3,), beta_multiple=(0.0625, 0.25)),
    }}.items() for key, grid in grids.items()}
# The betas of a reward model's optimum cost no training.
MODEL_GRIDS = {Run("reward model", level=1.0, judged=size): dict(
    learning_rate=(rate,), beta_multiple=(1, 2, 4), steps=(steps,))
    for size, steps, rate in ((FEW, 100, 3e-3), (SOME, 400, 1e-3), (FULL, 400, 1e-3))}


def without_beta(its):
    """Reward models that differ in their optima's beta alone are one Run."""
    return its._replace(cell=its.cell[:1])


def model_lost(lab, title, runs):
    """What tune asks."""
    models = results(lab, f"reward models, {title}", [*map(without_beta, runs)])
    return [optimum["train"]["lost"] for its, model in zip(runs, models)
            for optimum in model["optima"]
            if optimum["beta_multiple"] == dict(its.cell)["beta_multiple"]]


def settle(lab):
    """What budget.json says. It also reports cells of stored.json's grids that are not reported
    there: the best at the task's beta, with f(x) + c at once and, at level 1, with it learned."""
    stored = run.read_json(Path(lab.folder, "stored.json"))["tuning"]
    lost, chosen = campaign.tune(lab, GRIDS)
    rows, best = campaign.rows_of(lost, chosen), campaign.best_cell
    told = [at(key, cell) for key, cell in chosen.items()]
    told += [at(key, best(rows, key, ramp=ramp)) for key in chosen if key.offset == "estimated"
             for ramp in (0, 0.5)]
    told.append(at(SCORE_LEARNED, best(stored, SCORE_LEARNED._replace(level=0.0))))
    told += [at(key, best(stored, key, **fixed)) for key, fixed in (
        (Run("dpo"), dict(beta_multiple=1)), (Run("una-binary-bce", "exact"), dict(ramp=0)),
        (Run("una-score", "estimated"), dict(ramp=0)))]
    runs = results(lab, "reported seeds", [its._replace(seed=seed) for its in dict.fromkeys(told)
                                           for seed in REPORTED_SEEDS])
    lost_models, cells = campaign.tune(lab, MODEL_GRIDS, model_lost)
    models = [without_beta(at(key, cell, seed=seed))
              for key, cell in cells.items() for seed in FEWER]
    return dict(versions=run.versions(), tuning=rows + campaign.rows_of(lost_models, cells),
                runs=runs, models=results(lab, "reward models, reported seeds", models))
