"""What the claims' page says: its numbers are claims.json's, and its words follow from them."""
import json
import math
import re
from pathlib import Path
from statistics import median

import numpy as np
import pytest

import data
import train
from lab import claims, compare, figures, tables, variants
from lab.page import FILES, page
from lab.variants import Variant

LAB = Path(__file__).parent.parent / "lab"
README = (LAB / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((LAB / "claims.json").read_text(encoding="utf-8"))
MORE = {name: json.loads((LAB / f"{name}.json").read_text(encoding="utf-8")) for name in FILES}
BUDGET = MORE["budget"]
ONE_LINE = " ".join(README.split())
SEEDS = list(claims.REPORTED_SEEDS)


def lost(*what, **more):
    """The median over the seeds, in percent."""
    return median(compare.lost(tables.pick(RESULTS, *what, **more)))


# ---------------------------------------------------------------- figures
def runs(*regrets):
    """Runs that begin with a regret of 1; None diverged."""
    return [dict(seed=seed) | (
        dict(diverged="the loss of step 2 is nan") if regret is None else
        dict(curve=[dict(seconds=0.0, regret=1.0), dict(seconds=1.0, regret=regret)]))
        for seed, regret in enumerate(regrets)]


def test_a_verdict_needs_all_seeds_to_agree_in_sign():
    low, high = runs(0.1, 0.1, 0.12), runs(0.2, 0.22, 0.13)
    assert compare.less("", "", low, high)[-1] == "replicates"
    assert compare.less("", "", high, low)[-1] == "does not: the reverse"
    for other in (runs(0.2, 0.22, 0.11), runs(0.2, 0.22, 0.12)):  # one seed against, one even
        assert compare.less("", "", low, other)[-1] == "does not: no difference shown"
    assert compare.less("", "", low, high)[2:4] == [
        "10 % (10 to 12) against 20 % (13 to 22)", "−10 [−12, −1]"]
    assert compare.sooner("", "", [1.0, 1.1], [2.0, 2.2])[2:] == [
        "1.05 s against 2.1 s", "× 2 [2, 2]", "replicates"]
    assert compare.sooner("", "", [1.0, 2.0], [2.0, 1.0])[-1] == "does not: no difference shown"
    assert compare.sooner("", "", [2.0, 2.2], [1.0, 1.1])[-1] == "does not: the reverse"
    three = compare.sooner("", "", [1.0, 1.1, 1.0], [math.inf, 2.2, 2.0])
    assert three[2].endswith("3 and 2 of 3 seeds arrive") and three[-1] == "replicates"
    assert compare.sooner("", "", [1.0, math.inf], [2.0, math.inf])[-2:] == ["–", "–"]


def test_runs_are_compared_seed_by_seed():
    shifted = [run | dict(seed=run["seed"] + 1) for run in runs(0.1, 0.2)]
    with pytest.raises(AssertionError):
        compare.less("a claim", "", runs(0.1, 0.2), shifted)


def test_a_run_that_diverged_lost_more_than_any_number_and_is_counted():
    low, high = runs(0.1, 0.1, 0.12, 0.1, 0.11), runs(0.2, None, 0.2, None, 0.21)
    row = compare.less("", "", low, high)
    assert row[2].endswith("21 % (20 to ∞), 2 of 5 diverged")
    assert row[3:] == ["−11 [−∞, −8]", "replicates"] or row[-1] == "replicates"
    assert compare.less("", "", high, low)[-1] == "does not: the reverse"
    both = compare.less("", "", runs(None, 0.1, 0.1), runs(None, 0.3, 0.2))
    assert both[-2:] == ["–", "–"]
    assert compare.median([math.inf, 1.0, 2.0]) == 2 and compare.median([math.inf, 1.0]) == math.inf
    assert compare.median([math.inf] * 2) == math.inf
    assert compare.seconds_to(0.5, runs(None)[0]) == math.inf


def test_seconds_to_a_share_of_the_gain_are_read_on_the_log_of_the_regret():
    run = dict(curve=[dict(seconds=0.0, regret=1.0), dict(seconds=2.0, regret=0.01),
                      dict(seconds=4.0, regret=0.5)])
    assert compare.seconds_to(0.9, run) == pytest.approx(1.0)
    assert compare.seconds_to(0.99, run) == pytest.approx(2.0)
    assert compare.seconds_to(0.999, run) == math.inf


def test_lost_is_0_at_the_optimum_1_at_the_reference_and_endless_for_a_run_that_diverged():
    assert figures.lost(dict(curve=[dict(regret=0.8), dict(regret=0.2)])) == 0.25
    assert figures.lost(dict(diverged="the loss of step 7 is nan")) == math.inf
    run = RESULTS["runs"][0]
    start = next(entry["train"] for entry in RESULTS["reference"] if entry["seed"] == run["seed"])
    assert figures.lost(run) == pytest.approx(1 - figures.gain_share(run["train"], start))


def test_numbers_are_short_and_have_no_exponents():
    assert [compare.number(value) for value in (12.345, 1234.5, -0.5, math.nan, math.inf)] == [
        "12.3", "1234", "−0.5", "–", "∞"]


def test_what_is_at_an_end_of_a_grid_is_said():
    def row(rate, beta, best):
        return dict(cell=dict(learning_rate=rate, beta=beta), best=best)
    rows = [row(rate, beta, (rate, beta) == (2, 4)) for rate in (1, 2, 3) for beta in (1, 2, 4)]
    assert tables.edges(rows) == ["β"]
    assert tables.edges([row(1, 2, True), row(2, 1, False), row(2, 4, False)]) == ["learning rate"]


# ---------------------------------------------------------------- the page is claims.json's
def test_the_pages_numbers_are_those_of_claims_json():
    assert page(RESULTS, MORE) == README
    altered = json.loads(json.dumps(RESULTS))
    for run in altered["runs"]:
        run["curve"][-1]["regret"] += 0.1 * (1 + run["seed"] % 3)
    assert page(altered, MORE) != README
    altered = json.loads(json.dumps(BUDGET))
    for entry in altered["runs"]:
        entry["curve"][-1]["regret"] += 0.1
    assert page(RESULTS, MORE | dict(budget=altered)) != README
    for run in (altered := json.loads(json.dumps(MORE["default-h100"])))["runs"]:
        run["curve"][-1]["regret"] *= 1.1
    assert page(RESULTS, MORE | {"default-h100": altered}) != README
    alone = page(RESULTS, {})                                    # before the other files are there
    assert "## How many judgements" not in alone and "## Other machines" not in alone


def test_page_and_pictures_are_made_anew_from_the_two_files_alone(tmp_path, monkeypatch):
    def training(*_):
        raise AssertionError("--tables trains nothing")
    monkeypatch.setattr(claims, "settle", training)
    assert claims.main(["--tables", "--out", str(copied(tmp_path))]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == [
        "README.md", "frontier.png", "implicit-against-explicit.png", "judgements.png",
        "regret-over-time.png", "reward-model.png", "training.gif"]
    assert (tmp_path / "training.gif").stat().st_size < 1e6


@pytest.mark.parametrize("text", [None, "", '{"runs": ['])
def test_without_a_whole_claims_json_there_is_one_line_and_status_2(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "claims.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        claims.main(["--tables", "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and "claims.json" in told


def copied(folder):
    for name, content in dict(MORE, claims=RESULTS).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_every_link_of_the_page_leads_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) >= 6
    assert all((LAB / target.split("#")[0]).exists() for target in targets), targets


def test_prose_lines_have_at_most_100_characters():
    inside = False
    for line in README.splitlines():
        inside ^= line.startswith("```")
        assert len(line) <= 100 or line.startswith("|") or inside, line


def test_claims_json_is_of_the_defaults_and_complete():
    for name, value in RESULTS["settings"].items():
        if name == "methods":
            assert value == [*variants.COMPARED]
        elif name not in ("out", "device", "jobs", "seed", "seeds"):
            assert value == getattr(train.Settings(), name), name
    assert RESULTS["settings"]["seed"] == SEEDS[0] and RESULTS["settings"]["seeds"] == len(SEEDS)
    assert RESULTS["predictions"] == claims.PREDICTIONS
    for variant, grid in claims.GRIDS.items():
        rows = tables.grid_of(RESULTS, *variant)
        cells = [tuple(row["cell"].items()) for row in rows]
        assert set(claims.cells_of(grid)) <= set(cells) and len(set(cells)) == len(cells)
        assert sum(row["best"] for row in rows) == 1
        assert sorted((len(row["lost"]) for row in rows), reverse=True)[:9] == [
            4, 4, 3, 3, 2, 2, 2, 2, 1]
        (best,) = [row for row in rows if row["best"]]
        final = [np.median([math.inf if share is None else share for share in row["lost"]])
                 for row in rows if len(row["lost"]) == 4]
        assert min(final) == np.median(best["lost"])
    chosen = {Variant(*(row[name] for name in Variant._fields)): tuple(row["cell"].items())
              for row in RESULTS["tuning"] if row["best"]}
    settings = train.Settings()
    for variant, cell, changes in claims.reported(chosen, settings):
        reported = tables.pick(RESULTS, *variant, judged=changes.get("judged"), **dict(cell))
        assert [run["seed"] for run in reported] == SEEDS, (variant, cell)
    for kind in ("reference", "optimum"):
        assert [entry["seed"] for entry in RESULTS[kind]] == SEEDS


def test_the_frontier_of_the_picture_is_the_first_seeds():
    best, start = RESULTS["optimum"][0], RESULTS["reference"][0]
    kl, reward = np.array(best["frontier"]).T
    assert (np.diff(kl) > 0).all() and (np.diff(reward) > 0).all()
    assert kl[-1] <= 1.5 * best["train"]["kl"] < kl[-1] + 0.1
    at_optimum = np.interp(best["train"]["kl"], kl, reward)
    assert at_optimum == pytest.approx(best["train"]["reward"], abs=1e-3)
    assert start["train"]["reward"] < reward[0] < start["train"]["reward"] + 0.1
    for run in tables.main_runs(RESULTS):
        if run["seed"] == best["seed"] and kl[0] <= run["train"]["kl"] <= kl[-1]:
            assert run["train"]["reward"] <= np.interp(run["train"]["kl"], kl, reward) + 1e-3


def test_the_methods_own_settings_are_the_best_cells_of_their_grids():
    for name in variants.COMPARED:
        own, offset = train.METHODS[name], tables.OWN.get(name, "zero")
        cell = tables.best_cell(RESULTS, "una-pair" if name == "dpo" else name, offset)
        best = variants.method_of(Variant(name, offset), cell)
        given = getattr(best.loss, "keywords", {})               # a knob of False is the default
        has = getattr(own.loss, "keywords", {})
        assert {knob: value for knob, value in given.items() if value} == has, name
        assert own._replace(loss=None) == best._replace(loss=None), name


# ---------------------------------------------------------------- what the page says of it
def test_una_pair_and_dpo_agree_in_every_figure_of_every_seed_and_see_no_level():
    pair, dpo, level = ([(run["seed"], run["train"], run["heldout"]) for run in
                         tables.pick(RESULTS, name, level=level)]
                        for name, level in (("una-pair", 0.0), ("dpo", 0.0), ("dpo", 1.0)))
    assert pair == dpo and len(dpo) == len(SEEDS)
    for (_, one, held), (_, other, other_held) in zip(dpo, level):
        assert one["kl"] == other["kl"] and held["kl"] == other_held["kl"]
        assert one["regret"] == pytest.approx(other["regret"], abs=1e-6)


def apart(ours, theirs, **more):
    """Differences of what two methods lost, over the seeds."""
    pair = [compare.lost(tables.pick(RESULTS, name, **more)) for name in (ours, theirs)]
    return [a - b for a, b in zip(*pair)]


def test_what_the_page_says_of_the_papers_claims_is_in_the_runs():
    online, ppo = (tables.pick(RESULTS, name) for name in ("una-online", "ppo"))
    ratio = median(compare.seconds(online)) / median(compare.seconds(ppo))
    assert 0.6 < ratio < 0.73                                    # "two thirds of PPO's time"
    assert tables.state(online) / tables.state(ppo) == pytest.approx(5 / 9, abs=0.01)
    assert [sum(share > 100 for share in compare.lost(which)) for which in (online, ppo)] == [1, 0]
    assert abs(lost("una-online") - lost("ppo")) < 0.05
    noise = {divide: median(run["curve"][-1]["gradient_noise"] / run["curve"][0]["gradient_noise"]
                            for run in tables.pick(RESULTS, "ppo", divide=divide))
             for divide in (False, True)}
    assert noise[False] < 0.01 < 0.1 < noise[True]               # "PPO's does too, unless ..."
    for binary in ("una-binary-mse", "una-binary-bce"):
        for level in (0.0, 1.0):
            less = sum(share < 0 for share in apart(binary, "kto", level=level))
            assert 4 <= less < 8, (binary, level)
        assert min(apart("una-score", binary)) > 0               # "reversed on all seeds"


def test_what_the_page_advises_is_in_the_runs():
    assert 10 * lost("una-score-offset") < lost("una-score")
    assert max(apart("una-score-offset", "una-score")) < 0
    assert 1.5 * lost("una-binary-offset") < min(lost("una-binary-bce"), lost("kto"))
    assert sum(share < 0 for share in apart("una-binary-offset", "una-binary-bce")) == 7
    spread = {name: np.ptp(compare.lost(tables.pick(RESULTS, name))) for name in variants.COMPARED}
    assert max(spread, key=spread.get) in ("dpo", "una-pair")    # "the most uneven of all"
    errors = [run["offset_error"] for run in tables.pick(RESULTS, "una-binary-offset")]
    assert min(errors) > 0.5                                     # "is not beta log Z(x)"
    for level in (0.0, 1.0):
        for offset in ("exact", "estimated"):
            small, one = (compare.lost(tables.pick(RESULTS, "una-binary-bce", offset, level,
                                                   beta=beta)) for beta in (0.25, 1))
            assert min(small) > 500 and max(one) < 100           # "breaks down", "does not"
    rows = [row for row in tables.grid_of(RESULTS, "una-pair") if row["cell"]["beta"] == 1]
    by_rate = {row["cell"]["learning_rate"]: row["lost"] for row in rows}
    best = tables.best_cell(RESULTS, "una-pair")["learning_rate"]
    assert [len(by_rate[best]), len(by_rate[best / 4])] == [4, 3]
    assert np.ptp(by_rate[best / 4]) < np.ptp(by_rate[best])     # "a quarter of it was steadier"


def test_what_the_page_says_that_f_is_for_is_in_the_runs():
    one = compare.lost(tables.pick(RESULTS, "una-score", "constant"))
    estimated = compare.lost(tables.pick(RESULTS, "una-score-offset"))
    signs = {a > b for a, b in zip(one, estimated)}
    assert signs == {True, False}                                # "no difference is shown"
    best = tables.best_cell(RESULTS, "una-score", "constant", 1.0)
    moved = tables.pick(RESULTS, "una-score", "constant", 1.0)
    betas = [row["cell"]["beta"] for row in tables.grid_of(RESULTS, "una-score", "constant", 1.0)]
    assert best["beta"] == 8 == max(betas)                       # "the largest of its grid"
    assert 80 < min(compare.lost(moved)) and max(compare.lost(moved)) < 100
    for name in ("una-score-offset", "una-binary-offset"):       # "levels cost nothing"
        assert lost(name, level=1.0) < 1.2 * lost(name)
    held, flows = (compare.lost(tables.pick(RESULTS, "una-score", offset))
                   for offset in ("held", "residual"))
    assert min(held) > 200 and sum(a > b for a, b in zip(held, flows)) == 7
    assert 6400 == RESULTS["settings"]["judged"] // len(data.TRAIN_PROMPTS)


def test_the_counts_that_the_page_names_are_those_of_the_runs():
    settings = RESULTS["settings"]
    assert settings["judged"] == settings["steps"] * settings["batch"] == 76_800
    assert "76,800 judged responses" in ONE_LINE and "400 steps of 192, each seen once" in ONE_LINE
    assert settings["steps"] == 400 and settings["batch"] == 192
    assert claims.FEW == 4096 and "4096 judged responses, seen nineteen times" in ONE_LINE
    assert round(76_800 / 4096) == 19 and 192 // len(data.TRAIN_PROMPTS) == 16
    assert "prompt's 16 samples" in ONE_LINE and "15/16" in ONE_LINE
    assert settings["beta"] == 0.25 and "with β = 0.25 for all" in ONE_LINE
    assert len(SEEDS) == 8 and "There are eight:" in ONE_LINE and 2 ** 7 == 128
    assert train.OFFSET_TIMES == 10 and "ten times their learning rate" in ONE_LINE
    assert train.PPO_LAMBDA == 1 and "λ of 1" in ONE_LINE
    assert data.LEVELS == {"sea": -1, "wind": -1 / 3, "fire": 1 / 3, "night": 1}
    assert "−1, −1/3, 1/3 or 1 is added" in ONE_LINE
    words = sum((data.ENCODING.n_vocab - 1) ** n for n in range(data.MAX_TOKENS + 1))
    assert words == 406_901 and "406,901 responses" in ONE_LINE
    assert "The reported ones, 21 to 28" in ONE_LINE and SEEDS == [*range(21, 29)]
    assert [*claims.TUNING_SEEDS] == [*range(100, 104)] and "seeds, 100 to 103" in ONE_LINE


def test_every_verdict_of_the_page_is_one_of_the_words_that_it_explains():
    block = tables.tables(RESULTS)["claims"]
    assert block in README
    for line in block.splitlines()[2:]:
        verdict = line.strip("|").split("|")[-1].strip()
        assert re.match(r"replicates|does not|it can|–", verdict), line
