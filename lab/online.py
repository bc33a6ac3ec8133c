"""Fresh samples: UNA beside RLHF/PPO, on the judge's reward and on a reward model's.

    python -m lab online                 goes on where it stopped; an hour and a half on two cores
"""
from lab import campaign, run
from lab.campaign import REPORTED_SEEDS, Run, at, results

UNA_ONLINE = dict(learning_rate=(1e-3, 2e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2),
                  leave_one_out=(False, True))
PPO = dict(learning_rate=(1.5e-3, 3e-3, 6e-3, 1.2e-2), epochs=(1, 2), divide=(False, True))
GRIDS = {
    Run("una-online"): UNA_ONLINE,
    Run("una-online-score"): dict(learning_rate=(1e-3, 2e-3, 4e-3, 8e-3),
                                  beta_multiple=(0.25, 0.5, 1, 2)),
    Run("ppo"): PPO,
    Run("una-online", reward="model"): UNA_ONLINE,
    Run("ppo", reward="model"): PPO,
}
MOVES = 2
CURVES = {Run("una-online"): 11, Run("ppo"): 11, Run("una-online-score"): 6}

# Fixed before any reported seed ran. Lost is a median over the seeds.
PREDICTIONS = dict(
    online="`una-online` loses at most 0.1 %",
    alike="`una-online` and `ppo` end alike: their eight differences have both signs",
    sooner="`una-online` needs at most half of `ppo`'s seconds to 99 % of the gain",
)


def reported(chosen):
    """The Runs, without a seed, of all that is reported; chosen: the best cell of each of GRIDS."""
    ppo = dict(chosen[Run("ppo")])
    other = tuple((ppo | dict(divide=not ppo["divide"])).items())
    return [*(at(key, chosen[key], points=CURVES.get(key, 1)) for key in GRIDS),
            at(Run("una-online"), chosen[Run("una-online")], level=1.0),
            at(Run("ppo"), other)]


def settle(lab):
    """What online.json says."""
    lost, chosen = campaign.tune(GRIDS, MOVES, campaign.lost_of(lab))
    runs = results(lab, "reported seeds", [its._replace(seed=seed) for its in reported(chosen)
                                           for seed in REPORTED_SEEDS])
    return dict(versions=run.versions(), flags=lab.flags, predictions=PREDICTIONS,
                tuning=campaign.rows_of(lost, chosen), runs=runs)
