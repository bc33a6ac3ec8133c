"""Tables, lines and pictures."""
import copy
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import train
from lab import figures

ROOT = Path(__file__).parent.parent


def without(results, *names):
    """The same results where the methods with these names, or all, have diverged."""
    results = copy.deepcopy(results)
    for i, run in enumerate(results["runs"]):
        if not names or run["method"] in names:
            kept = ("method", "seed", "beta", "method_beta", "learning_rate")
            results["runs"][i] = {key: run[key] for key in kept} | dict(diverged="the loss is nan")
    return results


def with_second_seed(results):
    """The same results, and beside them a second seed that did a little worse."""
    results = copy.deepcopy(results)
    for key in ("reference", "optimum", "runs"):
        for entry in copy.deepcopy(results[key]):
            entry["seed"] += 1
            for split in ("train", "heldout"):
                if key == "runs":
                    entry[split]["regret"] += 0.5
            results[key].append(entry)
    return results


# ---------------------------------------------------------------- figures of a run
def test_lost_is_0_at_the_optimum_1_at_the_reference_and_endless_for_a_run_that_diverged(tiny):
    assert figures.lost(dict(curve=[dict(regret=0.8), dict(regret=0.2)])) == 0.25
    assert figures.lost(dict(curve=[dict(regret=0.8), dict(regret=0.0)])) == 0
    assert figures.lost(dict(curve=[dict(regret=0.8), dict(regret=0.8)])) == 1
    assert figures.lost(dict(diverged="the loss of step 7 is nan")) == math.inf
    start = tiny.results["reference"][0]["train"]
    for run in tiny.results["runs"]:
        share = figures.gain_share(run["train"], start)
        assert figures.lost(run) == pytest.approx(1 - share)


def test_shares_are_0_at_the_reference_and_1_at_the_optimum(tiny):
    for split in ("train", "heldout"):
        start, best = (tiny.results[key][0][split] for key in ("reference", "optimum"))
        assert figures.gain_share(start, start) == 0 and math.isnan(
            figures.frontier_share(start, start))
        assert figures.gain_share(best, start) == pytest.approx(1)
        assert figures.frontier_share(best, start) == pytest.approx(1)


# ---------------------------------------------------------------- text
def test_the_table_shows_every_method_once_with_its_figures(tiny):
    lines = figures.table(tiny.results, "heldout").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["reference", *train.METHODS, "optimum"]
    kto = next(run["heldout"] for run in tiny.results["runs"] if run["method"] == "kto")
    line = next(line for line in lines if line.startswith("kto"))
    assert line.split()[1:4] == [f"{kto[key]:.3f}" for key in ("reward", "kl", "objective")]
    assert lines[1].split()[-2:] == ["-", "-"] and lines[-1].count("100.0%") == 2
    assert figures.table(tiny.results, "train") in tiny.out
    assert figures.table(tiny.results, "heldout") in tiny.out


def test_the_table_of_several_seeds_has_their_means_and_the_regrets_deviation(tiny):
    results = with_second_seed(tiny.results)
    lines = figures.table(results, "train").splitlines()
    for name in train.METHODS:
        regrets = [run["train"]["regret"] for run in results["runs"] if run["method"] == name]
        line = next(line for line in lines if line.startswith(name + " "))
        assert line.split()[4] == f"{statistics.mean(regrets):.5f}"
        assert line.endswith(f"regret +- {statistics.stdev(regrets):.5f}")
    assert all("regret +-" in line for line in lines[1:])
    assert "regret +-" not in figures.table(tiny.results, "train")


def test_the_table_has_no_figures_of_a_run_that_diverged_and_the_mean_of_the_others(tiny):
    lines = figures.table(without(tiny.results, "kto"), "train").splitlines()
    (line,) = [line for line in lines if line.startswith("kto")]
    assert line.split() == ["kto", "1", "of", "1", "diverged"]
    results = with_second_seed(tiny.results)
    results["runs"][len(train.METHODS):] = without(results)["runs"][len(train.METHODS):]
    before = figures.table(tiny.results, "train").splitlines()
    after = figures.table(results, "train").splitlines()
    for name in train.METHODS:
        old, new = ([line for line in lines if line.startswith(name + " ")]
                    for lines in (before, after))
        assert new == [f"{old[0]}  1 of 2 diverged"]


def test_samples_are_three_to_each_of_two_prompts_and_none_of_a_run_that_diverged(tiny):
    lines = figures.samples(without(tiny.results, "kto")).splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == ["reference", *[name for name in train.METHODS if name != "kto"]]
    texts = tiny.results["reference"][0]["samples"]
    assert list(texts) == ["happy wind :", "happy sea :"]
    assert [len(answers) for answers in texts.values()] == [3, 3]
    for prompt, answers in texts.items():
        assert prompt in lines[0] and all(answer in lines[1] for answer in answers)
    assert figures.samples(tiny.results) in tiny.out


def test_a_line_names_method_and_seed_and_what_was_reached(tiny):
    for run in tiny.results["runs"]:
        line = figures.line(dict(runs=run))
        assert line in tiny.err and "\n" not in line
        assert f"lost {figures.lost(run):.1%}" in line and f"KL {run['train']['kl']:.3f}" in line
        assert f"{run['curve'][-1]['loss']:.4f} (at start {run['start_loss']:.4f})" in line
        assert ("r_w" in line) == ("chosen_reward" in run)
    (run,) = [run for run in without(tiny.results)["runs"] if run["method"] == "dpo"]
    assert figures.line(dict(runs=run)) == "seed 1 | dpo              | diverged: the loss is nan"


def test_the_last_line_says_where_the_time_went():
    stages = dict(reference=10.0, feedback=1.0, evaluation=2.0)
    results = dict(settings=dict(jobs=3), reference=[dict(stages=stages), dict(stages=stages)],
                   runs=[dict(seconds=5.0, evaluation_seconds=0.5), dict(diverged="")])
    assert figures.time_line(results, 12.4) == (
        "12 s, on 3 processes: reference 20.0 s, feedback 2.0 s, training 5.0 s, "
        "exact evaluation 4.5 s")


# ---------------------------------------------------------------- pictures
def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pictures_are_there_and_nothing_half_written_is(tiny):
    for name in ("frontier.png", "regret-over-time.png", "implicit-against-explicit.png"):
        assert is_png(tiny.folder / name) and name in figures.PICTURES
    assert not list(tiny.folder.glob("*.part")) and not list(tiny.folder.glob("shared-*"))


def test_pictures_cope_with_runs_that_have_all_diverged(tiny, tmp_path):
    figures.draw_all(without(tiny.results), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(figures.PICTURES)


def test_pictures_cope_with_an_optimum_that_is_hardly_off_the_reference(tiny, tmp_path):
    # As where beta is large: no point of the frontier has so little KL.
    results = copy.deepcopy(tiny.results)
    results["optimum"][0] |= dict(frontier=[])
    results["optimum"][0]["train"] |= dict(kl=1e-12)
    figures.draw_all(results, tmp_path)
    assert all(is_png(tmp_path / name) for name in figures.PICTURES)


def drawn(draw, *shown):
    """A figure with it."""
    seen = []

    def keep(figure, *_):
        draw(figure, *shown)
        seen.append(figure)
    figures.picture(os.devnull, keep)
    return seen[0]


@pytest.fixture
def no_files(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda path, write: None)


def test_the_regret_picture_has_methods_with_a_curve_alone(tiny, no_files):
    (axes,) = drawn(figures.draw_regret, tiny.results).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["una-online", "una-online-score", "ppo"]


def test_the_frontier_picture_names_runs_that_are_too_far_to_the_right(tiny, no_files):
    results = with_second_seed(tiny.results)
    results["runs"][0]["train"]["kl"] = 1e6
    (axes,) = drawn(figures.draw_frontier, results).axes
    assert f"1 of {results['runs'][0]['method']}" in axes.get_title()
    assert axes.get_xlim()[1] < 100
    (axes,) = drawn(figures.draw_frontier, tiny.results).axes
    assert "too far" not in axes.get_title()


def test_the_rewards_picture_has_a_panel_for_each_policy(tiny, no_files):
    dots = {run["method"]: run["dots"] for run in tiny.results["runs"]}
    figure = drawn(figures.draw_rewards, dots, figures.colors(tiny.results))
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == list(train.METHODS)


@pytest.mark.parametrize("backend", ["nonsense", "TkAgg"])
def test_pictures_are_written_whatever_backend_the_environment_asks_for(
        backend, odd_environment, tmp_path):
    script = ("import sys; from lab import figures; figures.picture(sys.argv[1], "
              "lambda figure: figure.subplots().plot([1, 2]))")
    stubs = tmp_path / "stubs"                                   # without torch: it takes seconds
    stubs.mkdir()
    (stubs / "torch.py").write_text("")
    environment = odd_environment(dict(MPLBACKEND=backend, PYTHONPATH=f"{stubs}{os.pathsep}{ROOT}"))
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.png"], env=environment, check=True,
                   cwd=tmp_path)
    assert is_png(tmp_path / "a.png")
