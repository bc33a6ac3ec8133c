"""What the noise of feedback costs: who wins a pair, and whether a label is 1, is drawn by chance.

    python -m lab noise          goes on where it stopped; a quarter of an hour; needs stored

In these runs each chance stands for its draw (lab/variants.py), and nothing else changes. All have
the cell of the method that they are compared with. Pairs at the task's beta also have a grid, by
the rules of lab/stored.py, since without noise a faster rate may be better.
"""
from pathlib import Path

from lab import campaign, run
from lab.campaign import REPORTED_SEEDS, Run, at, results

PAIRS = Run("una-pair")
GRIDS = {PAIRS: dict(learning_rate=(1e-3, 2e-3, 4e-3), beta_multiple=(1,), loss=("pairs",))}
SAME_CELL = {Run("una-pair-anchored"): "pairs", Run("una-binary-bce", "exact"): "labels",
             Run("una-mixed", "estimated"): "mixed"}


def settle(lab):
    """What noise.json says."""
    stored = run.read_json(Path(lab.folder, "stored.json"))["tuning"]
    lost, chosen = campaign.tune(lab, GRIDS)
    of_dpo = campaign.best_cell(stored, Run("dpo"), beta_multiple=1)
    told = [at(PAIRS, cell) for cell in (chosen[PAIRS], (*of_dpo, ("loss", "pairs")))]
    told += [at(key, (*campaign.best_cell(stored, key), ("loss", loss)))
             for key, loss in SAME_CELL.items()]
    return dict(versions=run.versions(), tuning=campaign.rows_of(lost, chosen), runs=results(
        lab, "reported seeds", [its._replace(seed=seed) for its in told
                                for seed in REPORTED_SEEDS]))
