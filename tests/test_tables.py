"""What the claims' page says: its numbers are claims.json's, and its words follow from them."""
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import data
import train
from lab import claims, compare, figures, tables, variants
from lab.page import page

LAB = Path(__file__).parent.parent / "lab"
README = (LAB / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((LAB / "claims.json").read_text(encoding="utf-8"))
RUNS = tables.of_variants(RESULTS)
ONE_LINE = " ".join(README.split())


def mean_lost(variant):
    return np.mean(compare.lost(RUNS[variant]))


# ---------------------------------------------------------------- figures
def test_interval_is_students():
    # A textbook's: differences 1..10 have mean 5.5, deviation 3.0277, and 95% interval
    # 5.5 +- 2.262 * 3.0277 / sqrt(10).
    expected = (5.5, 3.3341, 7.6659)
    assert compare.interval(np.arange(1.0, 11.0)) == pytest.approx(expected, abs=1e-3)


def runs(*regrets):
    """Runs that begin with a regret of 1; None diverged."""
    return [dict(diverged="the loss of step 2 is nan") if regret is None else
            dict(curve=[dict(seconds=0.0, regret=1.0), dict(seconds=1.0, regret=regret)])
            for regret in regrets]


def test_verdicts_follow_from_the_interval_alone():
    low, high = runs(0.1, 0.1, 0.12, 0.1, 0.11), runs(0.2, 0.22, 0.2, 0.2, 0.21)
    wide = runs(0.0, 0.5, 0.0, 0.3, 0.0)
    assert compare.less("", "", low, high)[-1] == "replicates"
    assert compare.less("", "", high, low)[-1] == "does not: the reverse"
    for row in (compare.less("", "", low, wide), compare.less("", "", wide, low)):
        assert row[-1] == "does not: no difference shown"
    assert compare.less("", "", low, high)[2] == "10.6 ± 0.89 % against 20.6 ± 0.89 %"
    assert compare.sooner("", "", [1.0, 1.1], [2.0, 2.2])[2:] == [
        "1.05 s against 2.1 s", "× 2 [2, 2]", "replicates"]
    three = compare.sooner("", "", [1.0, 1.1, 1.0], [math.inf, 2.2, 2.0])
    assert three[2].endswith("3 and 2 of 3 seeds arrive")
    assert compare.sooner("", "", [2.0, 2.2], [1.0, 1.1])[-1] == "does not: the reverse"


def test_where_runs_diverged_they_are_counted_and_no_verdict_is_given():
    low, high = runs(0.1, 0.1, 0.12, 0.1, 0.11), runs(0.2, None, 0.2, None, 0.21)
    for row in (compare.less("", "", low, high), compare.less("", "", high, low)):
        assert row[-1] == "–" and "[" in row[3] and "(2 of 5 diverged)" in row[2]
    none = compare.less("", "", low, runs(*[None] * 5))
    assert none[2:] == ["10.6 ± 0.89 % against (5 of 5 diverged)", "–", "–"]
    both = compare.less("", "", runs(None, 0.1, 0.1), runs(None, 0.3, 0.2))
    assert both[2] == "10 ± 0 % (1 of 3 diverged) against 25 ± 7.1 % (1 of 3 diverged)"
    assert compare.mean_sd([math.inf, 10.0], " %") == "10 % (1 of 2 diverged)"
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


# ---------------------------------------------------------------- the page is claims.json's
def test_the_pages_numbers_are_those_of_claims_json():
    assert page(RESULTS) == README
    altered = json.loads(json.dumps(RESULTS))
    for run in altered["runs"]:
        run["curve"][-1]["regret"] += 0.1 * (1 + run["seed"] % 3)
    assert page(altered) != README


def test_page_and_pictures_are_made_anew_from_claims_json_alone(tmp_path, monkeypatch, capsys):
    def training(*_):
        raise AssertionError("--tables trains nothing")
    monkeypatch.setattr(claims, "settle", training)
    assert claims.main(["--tables", "--out", str(copied(tmp_path))]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "claims.json", "frontier.png", "regret-over-time.png"]
    (tmp_path / "claims.json").unlink()
    with pytest.raises(SystemExit) as stop:
        claims.main(["--tables", "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and "claims.json" in told


def copied(folder):
    (folder / "claims.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    return folder


def test_every_link_of_the_page_leads_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) >= 6
    assert all((LAB / target).exists() for target in targets), targets


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
    assert RESULTS["settings"]["seed"] == claims.REPORTED_SEEDS[0]
    assert RESULTS["settings"]["seeds"] == len(claims.REPORTED_SEEDS)
    for name in variants.COMPARED:
        sources = (None,) if name not in claims.ONLINE else (
            ("judge", "model") if name in ("una-online", "ppo") else ("judge",))
        for source in sources:
            seeds = [run["seed"] for run in RUNS[name, source]]
            assert seeds == list(claims.REPORTED_SEEDS), (name, source)
    for (name, offset), (rates, multiples) in claims.GRIDS.items():
        candidates = tables.candidates_of(RESULTS, name, offset)
        assert [(row["learning_rate"], row["multiple"]) for row in candidates] == list(
            itertools.product(rates, multiples))
        assert all(len(candidate["lost"]) == len(claims.TUNING_SEEDS) for candidate in candidates)
        assert sum(candidate["best"] for candidate in candidates) == 1
    for kind in ("reference", "optimum"):
        assert [entry["seed"] for entry in RESULTS[kind]] == list(claims.REPORTED_SEEDS)


def test_the_frontier_of_the_picture_is_the_first_seeds():
    best, start = RESULTS["optimum"][0], RESULTS["reference"][0]
    kl, reward = np.array(best["frontier"]).T
    assert (np.diff(kl) > 0).all() and (np.diff(reward) > 0).all()
    assert kl[-1] <= 1.5 * best["train"]["kl"] < kl[-1] + 0.1
    at_optimum = np.interp(best["train"]["kl"], kl, reward)
    assert at_optimum == pytest.approx(best["train"]["reward"], abs=1e-3)
    assert start["train"]["reward"] < reward[0] < start["train"]["reward"] + 0.1
    for run in RESULTS["runs"] + RESULTS["longer"]:
        if run["seed"] == best["seed"] and kl[0] <= run["train"]["kl"] <= kl[-1]:
            assert run["train"]["reward"] <= np.interp(run["train"]["kl"], kl, reward) + 1e-3


def test_the_methods_own_settings_are_the_best_candidates_of_their_grids():
    for name, own in {name: train.METHODS[name] for name in variants.COMPARED}.items():
        candidates = tables.candidates_of(RESULTS, "una-pair" if name == "dpo" else name)
        (best,) = [candidate for candidate in candidates if candidate["best"]]
        assert (own.learning_rate, own.beta) == (best["learning_rate"], best["multiple"]), name


# ---------------------------------------------------------------- what the page says of it
def test_una_pair_and_dpo_agree_in_every_figure_of_every_seed():
    pair, dpo = ([(run["seed"], run["train"], run["heldout"]) for run in RUNS[name, None]]
                 for name in ("una-pair", "dpo"))
    assert pair == dpo and len(dpo) == len(claims.REPORTED_SEEDS)


def test_una_online_ends_within_a_hundredth_of_the_possible_gain():
    assert max(figures.lost(run) for run in RUNS["una-online", "judge"]) < 0.01


def test_differences_alone_let_probability_leave_for_strings_that_no_one_judged():
    # What the page says of pairs where feedback is short, and of offsets estimated from stored
    # responses.
    short = [run for run in RESULTS["sizes"]
             if run["method"] == "una-pair" and run["judged"] <= 1024]
    estimated = [run for run in RESULTS["offsets"] if run["offset"] in ("batch", "prompt")]
    start = np.median([entry["train"]["reward"] for entry in RESULTS["reference"]])
    assert start == pytest.approx(0.53, abs=0.01)
    for those in (short, estimated):
        assert len(those) >= 10
        assert all(run["chosen_reward"] < 0 and run["rejected_reward"] < run["chosen_reward"]
                   for run in those)
        assert np.median([run["train"]["kl"] for run in those]) > 3
        assert np.median([run["train"]["reward"] for run in those]) < 0.53


def test_what_the_page_makes_of_the_results_is_in_them():
    assert 3.5 < mean_lost(("una-score", None)) / mean_lost(("una-score", "exact")) < 4.5
    candidates = [np.mean(row["lost"])
                  for row in tables.candidates_of(RESULTS, "una-binary-bce", "exact")]
    assert 100 * min(candidates) > mean_lost(("una-binary-bce", None))
    broken = [name for name in ("una-online", "ppo")
              for share in compare.lost(RUNS[name, "model"]) if share > 100]
    assert broken == ["una-online"]
    accuracy = [run["reward_model"]["accuracy"] for run in RUNS["una-online", "model"]]
    assert 0.77 < np.mean(accuracy) < 0.85


def test_what_the_page_says_of_online_methods_and_of_short_feedback_is_in_the_runs():
    online, ppo = RUNS["una-online", "judge"], RUNS["ppo", "judge"]
    ratio = np.median(compare.seconds(ppo)) / np.median(compare.seconds(online))
    assert 2.5 < ratio < 3.5                                     # "a third of the time"
    assert np.std(compare.lost(online)) > np.std(compare.lost(ppo))
    assert mean_lost(("una-online", "judge")) < mean_lost(("ppo", "judge")) < 1
    rates, _ = claims.GRIDS["una-online", "zero"]
    assert train.METHODS["una-online"].learning_rate == max(rates)
    for size in (256, 1024):
        by_method = {}
        for run in RESULTS["sizes"]:
            if run["judged"] == size:
                by_method.setdefault(run["method"], []).append(figures.lost(run))
        score = by_method.pop("una-score")
        assert all(2 * np.mean(score) < np.mean(other) for other in by_method.values())


def test_the_counts_that_the_page_names_are_those_of_the_runs():
    settings = RESULTS["settings"]
    assert settings["judged"] == 4096 and "4096 judged responses" in ONE_LINE
    passes = settings["steps"] * settings["batch"] / settings["judged"]
    assert round(passes) == 19 and "seen some nineteen times" in ONE_LINE
    assert settings["steps"] * settings["batch"] == 76_800 and "76,800 fresh samples" in ONE_LINE
    assert settings["steps"] == 400 and settings["batch"] == 192
    assert "In 400 steps of 192" in ONE_LINE
    assert settings["beta"] == 0.25 and "with β = 0.25 for all" in ONE_LINE
    assert train.PPO_EPOCHS == 2 and "takes two inner steps" in ONE_LINE
    assert len(claims.REPORTED_SEEDS) == 8 and "There are eight:" in ONE_LINE
    assert len({run["seed"] for run in RESULTS["sizes"]}) == 5 and "Five seeds" in ONE_LINE
    assert len(claims.TUNING_SEEDS) == 2 and "two tuning seeds" in ONE_LINE
    assert {run["steps"] for run in RESULTS["longer"]} == {1000}
    words = sum((data.ENCODING.n_vocab - 1) ** n for n in range(data.MAX_TOKENS + 1))
    assert words == 406_901 and "406,901 responses" in ONE_LINE


def test_every_verdict_of_the_page_is_one_of_the_words_that_it_explains():
    block = tables.tables(RESULTS)["claims"]
    assert block in README
    for line in block.splitlines()[2:]:
        verdict = line.strip("|").split("|")[-1].strip()
        assert re.match(r"replicates|does not|it can|–", verdict), line
    for word in ("**Replicates**", "**the reverse**"):
        assert word in README
