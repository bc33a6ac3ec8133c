"""lab/pairs.py: which cells run on which seeds, and what is chosen by which rule."""
import json

import data
import short_train
import train
from lab import figures, pairs, tables


def test_a_miniature_runs_every_cell_on_every_seed_and_chooses_by_median_and_by_the_worst(
        monkeypatch, tmp_path):
    for name, value in short_train.LANGUAGE.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(pairs, "GRID", dict(learning_rate=(1e-3, 5e-2), beta=(0.5, 4)))
    monkeypatch.setattr(pairs, "SEEDS", range(100, 103))
    monkeypatch.setattr(pairs, "REPORTED_SEEDS", range(21, 23))
    settings = train.Settings(steps=2, judged=48, reference_steps=8, evaluations=2, n_layer=1,
                              n_head=1, n_embd=8, batch=48)

    def main():
        arguments = ["--device", "cpu", "--jobs", "1", "--out", str(tmp_path)]
        assert pairs.main(arguments, settings) == 0
        return json.loads((tmp_path / "pairs.json").read_text("utf-8"))

    told = main()
    assert [beta for beta, _ in told["optima"]] == [0.5, 4]
    assert all(0 < share < 1 for _, lost in told["optima"] for share in lost)
    assert told == main()                                        # all its parts are there
    grid = [row for row in told["tuning"] if row["rule"] == "median"]
    assert len({tuple(row["cell"].values()) for row in grid}) == 4
    assert all(len(row["lost"]) == 3 for row in grid)
    for rule, worth in (("median", lambda lost: sorted(lost)[1]), ("worst", max)):
        (best,) = (row for row in told["tuning"] if row["rule"] == rule and row["best"])
        assert worth(best["lost"]) == min(worth(row["lost"]) for row in grid)
        runs = [run for run in told["runs"] if run["rule"] == rule]
        assert [run["seed"] for run in runs] == [21, 22]
        assert all(run["method"] == "dpo" and run["cell"] == best["cell"] for run in runs)
    # What a cell lost on a tuning seed is what a run of it loses there.
    parts = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "parts").glob("dpo-101-*")]
    assert sorted(row["lost"][1] for row in grid) == sorted(
        figures.lost(part["runs"]) for part in parts)


def test_the_tables_tell_grid_rules_and_predictions():
    def row(rate, beta, lost, rule="median", best=False):
        return dict(rule=rule, cell=dict(learning_rate=rate, beta=beta), lost=lost, best=best)

    def run(rule, regret):
        return dict(rule=rule, curve=[dict(regret=1.0), dict(regret=regret)])
    steady = [0.3, 0.35, 0.4]
    told = dict(predictions=pairs.PREDICTIONS, tuning=[
        row(1e-3, 1, [0.1, 0.2, 3.0], best=True), row(1e-3, 4, steady),
        row(4e-3, 1, [0.5, None, 0.25]), row(4e-3, 4, [1.0, 2.0, 3.0]),
        row(1e-3, 4, steady, "worst", True)], optima=[(1, [0.0, 0.0]), (4, [0.25, 0.35])],
        runs=[run("median", 0.8), run("median", 0.1), run("worst", 0.6), run("worst", 0.2)])
    said = tables.pairs(told)
    assert said["pairs_grid"].splitlines()[2:] == [
        "| 0.001 | 20 % (10 to 300) | 35 % (30 to 40) |",
        "| 0.004 | 50 % (25 to ∞), 1 of 3 diverged | 200 % (100 to 300) |",
        "| **the optimum of that β** | 0 % (0 to 0) | 30 % (25 to 35) |"]
    assert said["pairs_rules"].splitlines()[2:] == [
        "| the median of eight | 0.001, β × 1 | 20 % (10 to 300) | 45 % (10 to 80) |",
        "| the worst of eight | 0.001, β × 4 | 35 % (30 to 40) | 40 % (20 to 60) |"]
    assert [line.split(" | ")[1:] for line in said["pairs_predictions"].splitlines()[2:]] == [
        ["0.001", "holds |"], ["60 %", "does not hold |"], ["40 %", "holds |"]]
