"""What a person with a budget asks: how many judgements, and what a reward model costs.

    python -m lab budget                 goes on where it stopped; two hours on two cores

Stored feedback on 1200, 9600 and 76,800 judged responses, each method tuned at each size; and
reward models of the pairs among these, with their exact optima. All of it at level 1, by the rules
of lab/stored.py, whose stored.json has what 76,800 judged responses bring.
"""
from lab import campaign
from lab.campaign import REPORTED_SEEDS, Run, at, results

SIZES, FULL = (1200, 9600), 76_800                                # judged responses
STEPS = (100, 200, 400)

# ---------------------------------------------------------------- what is tuned
# As in lab/stored.py, with coarser steps of learning rate and beta, since there is a third knob; a
# grid grows once at most.
NO_OFFSET = dict(learning_rate=(1e-3, 4e-3), beta_multiple=(0.0625, 0.25, 1), steps=STEPS)
OFFSET = dict(learning_rate=(2e-3, 8e-3), beta_multiple=(0.25, 1, 4), steps=STEPS)
SCORE, LEARNED = (Run("una-score", offset, level=1.0) for offset in ("estimated", "from zero"))
STORED = {
    Run("dpo", level=1.0): dict(learning_rate=(1e-3, 4e-3), beta_multiple=(1, 4, 16), steps=STEPS),
    Run("kto", level=1.0): dict(learning_rate=(1e-3, 4e-3), beta_multiple=(0.25, 1, 4),
                                steps=STEPS),
    Run("una-binary-bce", level=1.0): NO_OFFSET,
    Run("una-binary-bce", "from zero", level=1.0): OFFSET,
    Run("una-score", level=1.0): NO_OFFSET,
    SCORE: OFFSET, LEARNED: OFFSET,
    Run("una-mixed", level=1.0): NO_OFFSET,
}
# stored.json has most of these with 76,800.
GRIDS = {key._replace(judged=size): grid for size in SIZES for key, grid in STORED.items()} | {
    Run("una-mixed", level=1.0): dict(learning_rate=(1e-3, 2e-3, 4e-3, 8e-3),
                                      beta_multiple=(0.0625, 0.25, 1, 4), steps=(400,))}
# The betas of a reward model's optimum cost no training, only its learning rate and steps do.
MODEL_GRIDS = {Run("reward model", level=1.0, judged=size): dict(
    learning_rate=(3e-4, 1e-3, 3e-3), steps=STEPS, beta_multiple=(1, 2, 4))
    for size in (*SIZES, FULL)}
MOVES = 1
ONLINE = ("una-online", "ppo")

PREDICTIONS = dict(
    few_scores="`una-score-estimated` loses less from 1200 scores than `dpo` from 38,400 pairs",
    zero="`una-score` with f = c = 0 loses at least 0.8 times as much from 76,800 scores as from "
         "9600: what it lacks is not data",
    learned="an offset that is learned, from 0, loses less than the estimate, at every size",
    binary="`una-binary-bce` with a learned offset loses less from 9600 labels than with 0 from "
           "76,800",
    pairs="`dpo`'s best β from 600 pairs is more than the task's",
    detour="at every size the optimum of the reward model loses less than `dpo` on the same pairs",
    optimiser="`una-online` and `ppo` lose at most 1 % by the measure of their reward model, at "
              "every size",
    exploitation="from 600 pairs the optimum of the reward model gains more by the model than by "
                 "the judge, on all seeds",
)


def explained(chosen):
    """Runs that were added when a tuning seed had been seen: from 1200 scores the learned offset
    lost far less than the estimated one. Is that the estimate's error? The exact beta log Z(x) in
    the cells of both tells."""
    return [at(SCORE._replace(judged=size), cell, offset="exact") for size in SIZES
            for cell in dict.fromkeys(chosen[key._replace(judged=size)]
                                      for key in (SCORE, LEARNED))]


def model_lost(lab, title, runs):
    """What tune asks: reward models that differ in beta alone are one Run."""
    bare = [its._replace(cell=its.cell[:1]) for its in runs]
    optima = [dict(entry["optima"]) for entry in results(lab, f"reward models, {title}", bare)]
    return [lost[dict(its.cell)["beta_multiple"]] for lost, its in zip(optima, runs)]


def settle(lab):
    """What budget.json says; the cells of the online methods are online.json's."""
    best = campaign.settled(lab)
    lost, chosen = campaign.tune(GRIDS, MOVES, campaign.lost_of(lab))
    told = [at(key, cell) for key, cell in chosen.items()] + explained(chosen)
    told += [Run(name, level=1.0, cell=best[Run(name)], points=11) for name in ONLINE]
    runs = results(lab, "reported seeds", [its._replace(seed=seed) for its in told
                                           for seed in REPORTED_SEEDS])
    lost_models, cells = campaign.tune(MODEL_GRIDS, MOVES, lambda *what: model_lost(lab, *what))
    models = []
    for key, cell in cells.items():
        beta = dict(beta_multiple=dict(cell)["beta_multiple"])
        models += [at(key, cell, seed=seed, look=tuple(
            Run(name, level=1.0, cell=tuple((dict(best[Run(name)]) | beta).items()), seed=seed,
                points=6)
            for name in ONLINE)) for seed in REPORTED_SEEDS]
    return dict(predictions=PREDICTIONS,
                tuning=campaign.rows_of(lost, chosen) + campaign.rows_of(lost_models, cells),
                runs=runs, models=results(lab, "reward models, reported seeds", models))
