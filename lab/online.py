"""Fresh samples: online UNA beside PPO, RLOO and GRPO; and what stored samples among them do.

    python -m lab online                 goes on where it stopped; an hour and a half on two cores

Rules are those of lab/stored.py. A run without a grid has the cell of the method that it varies.
"""
from lab import campaign, run
from lab.campaign import FEWER, REPORTED_SEEDS, Run, at, results

UNA, STORED, SCORE, PPO, RLOO, GRPO = (Run(name) for name in (
    "una-online", "una-online-stored", "una-online-score", "ppo", "rloo", "grpo"))
RATES = dict(learning_rate=(6e-3, 8e-3, 1.2e-2), beta_multiple=(1,))
GRIDS = {
    UNA: RATES, STORED: RATES, RLOO: RATES,
    SCORE: dict(learning_rate=(1e-3, 2e-3), beta_multiple=(0.25, 0.5)),
    PPO: dict(learning_rate=(3e-3, 6e-3, 1.2e-2), beta_multiple=(1,)),
    GRPO: dict(learning_rate=(3e-3, 6e-3, 1.2e-2), beta_multiple=(1, 2)),
}
VARIANTS = ("undivided", "undivided, k2")                        # of GRPO
CURVES = {UNA: 11, PPO: 11}                                      # points of a learning curve


def knobs(key, chosen, **more):
    """A Run in the best cell of its grid, with some knobs set otherwise."""
    return at(key, tuple((dict(chosen[key]) | more).items()))


def reported(chosen):
    """The Runs, without a seed, of all that is reported: on all seeds, and on the first FEWER.
    chosen: the best cell of each of GRIDS."""
    runs = [at(key, chosen[key], points=CURVES.get(key, 1)) for key in GRIDS]
    runs += [at(key, chosen[key], reward="model") for key in (UNA, PPO)]
    more = [knobs(GRPO, chosen, loss=loss, beta_multiple=1) for loss in VARIANTS]
    more += [knobs(STORED, chosen, stored=share) for share in (0.125, 0.5)]
    more += [knobs(STORED, chosen, loss="own mean"),
             knobs(RLOO, chosen, stored=0.25, loss="weighted rloo"),
             knobs(PPO, chosen, stored=0.25)]
    collapsed = [(UNA, {}), (STORED, {}), (PPO, {}), (PPO, dict(stored=0.25)),
                 (PPO, dict(stored=0.25, loss="weighted ppo")),
                 (RLOO, dict(stored=0.25, loss="weighted rloo"))]
    return runs, more + [knobs(key, chosen, collapsed=True, **of) for key, of in collapsed]


def settle(lab):
    """What online.json says."""
    lost, chosen = campaign.tune(lab, GRIDS)
    runs, more = reported(chosen)
    told = [its._replace(seed=seed) for its in runs for seed in REPORTED_SEEDS]
    told += [its._replace(seed=seed) for its in more for seed in FEWER]
    theory = results(lab, "theory", [its._replace(method="theory", seed=seed)
                                     for its in runs + more if its.method == "grpo"
                                     for seed in FEWER])
    for entry in theory:
        entry["method"] = "grpo"
    return dict(versions=run.versions(), tuning=campaign.rows_of(lost, chosen),
                runs=results(lab, "reported seeds", told), theory=theory)
