"""Stored feedback: what each kind of it allows, what is lost, and where.

    python -m lab stored                 goes on where it stopped; an hour and a half on two cores

Every method is tuned on a grid; its best cell runs on eight other seeds. What is lost is split at
what was judged (lab/exact.py): a bias of the loss, or a leak of probability.
"""
from lab import campaign, run
from lab.campaign import REPORTED_SEEDS, Run, at, results

# ---------------------------------------------------------------- what is tuned
# A grid has six cells, around what earlier grids on tuning seeds had found: learning rate and the
# knob that matters to a method. Where f(x) + c is right, theory has the loss's beta: the task's.
# Then the knob is the path: how much of the run f(x) + c takes to get there; 0 is at once.
SLOW, FAST, FASTER = (1e-3, 2e-3, 4e-3), (2e-3, 4e-3, 8e-3), (4e-3, 8e-3, 1.6e-2)
NO_OFFSET = dict(learning_rate=SLOW, beta_multiple=(0.0625, 0.125))
ANCHORED = dict(anchor=(0.003, 0.01), beta_multiple=(1,))
PATH = dict(ramp=(0, 0.5), beta_multiple=(1,))
DPO, ANCHOR, KTO = Run("dpo"), Run("una-pair-anchored"), Run("kto")
MSE, BCE, SCORE, MIXED = (Run(name) for name in (
    "una-binary-mse", "una-binary-bce", "una-score", "una-mixed"))
LEARNED, EXACT = (Run("una-binary-bce", offset) for offset in ("learned", "exact"))
ESTIMATED, SCORE_LEARNED = (Run("una-score", offset) for offset in ("estimated", "learned"))
REWARD, CURED = Run("una-reward-estimated", "estimated"), Run("una-mixed", "estimated")
GRIDS = {
    DPO: dict(learning_rate=(5e-4, 1e-3, 2e-3), beta_multiple=(1, 2)),
    ANCHOR: dict(learning_rate=SLOW) | ANCHORED,
    MSE: NO_OFFSET, BCE: NO_OFFSET, KTO: NO_OFFSET, SCORE: NO_OFFSET, MIXED: NO_OFFSET,
    LEARNED: dict(learning_rate=SLOW, beta_multiple=(0.25, 0.5)),
    EXACT: dict(learning_rate=FAST) | PATH,
    ESTIMATED: dict(learning_rate=FASTER) | PATH,
    SCORE_LEARNED: dict(learning_rate=FASTER, beta_multiple=(0.5, 1)),
    CURED: dict(learning_rate=FAST, ramp=(0.5,)) | ANCHORED,
}


# ---------------------------------------------------------------- what is reported
def other_path(cell):
    """The same cell, at once instead of by the path, or by the path instead of at once."""
    return tuple((dict(cell) | dict(ramp=0 if dict(cell)["ramp"] else 0.5)).items())


def reported(chosen):
    """The Runs, without a seed, of all that is reported. chosen: the best cell of each of GRIDS.

    una-pair has dpo's cell, as it is the same loss, and una-reward-estimated that of scores. Other
    paths and beginnings of f(x) + c have the cell of the method that they are compared with. At
    level 1 all have their cell of level 0.
    """
    runs = [at(key, chosen[key]) for key in GRIDS]
    runs += [at(Run("una-pair"), chosen[DPO]), at(REWARD, chosen[ESTIMATED])]
    runs += [at(key, other_path(chosen[key])) for key in (EXACT, ESTIMATED)]
    runs += [at(key, chosen[key], offset="from zero") for key in (LEARNED, SCORE_LEARNED)]
    return runs + [at(key, chosen[key], level=1.0) for key in (BCE, SCORE, LEARNED, ESTIMATED)]


def settle(lab):
    """What stored.json says: every method tuned, the best of each run on the reported seeds."""
    lost, chosen = campaign.tune(lab, GRIDS)
    runs = results(lab, "reported seeds", [its._replace(seed=seed) for its in reported(chosen)
                                           for seed in REPORTED_SEEDS])
    reference, optimum = (results(lab, name, [Run(name, seed=seed) for seed in REPORTED_SEEDS])
                          for name in ("reference", "optimum"))
    for entry in optimum[1:]:                                    # the picture has one frontier
        entry.pop("frontier")
    return dict(versions=run.versions(), tuning=campaign.rows_of(lost, chosen),
                reference=reference, optimum=optimum, runs=runs)
