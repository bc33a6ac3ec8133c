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
                    entry[split]["objective"] -= 0.5
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
def lines_of(results):
    """{name: cells} of the table."""
    return {line.split()[0]: line.split()[1:] for line in figures.table(results).splitlines()[1:]}


def test_the_table_shows_every_method_once_with_its_figures(tiny):
    table = lines_of(tiny.results)
    assert list(table) == ["reference", *train.METHODS, "optimum"]
    start = tiny.results["reference"][0]
    for run in tiny.results["runs"]:
        reached = run["train"]
        shares = [f"{run[split]['regret'] / start[split]['regret']:.2%}"
                  for split in ("train", "heldout")]
        assert table[run["method"]][:5] == [
            *(f"{reached[key]:.3f}" for key in ("reward", "kl", "objective")), *shares]
        assert table[run["method"]][6] == f"{run['seconds']:.1f}"
    assert table["reference"][3:] == ["100.00%", "100.00%", "-", "-"]
    assert table["optimum"][3:] == ["0.00%", "0.00%", "100.0%", "-"]
    assert figures.table(tiny.results) in tiny.out
    assert max(map(len, tiny.out.splitlines())) <= 100


def test_the_table_of_several_seeds_has_their_medians_and_the_range_of_what_was_lost(tiny):
    results = with_second_seed(tiny.results)
    table, start = lines_of(results), tiny.results["reference"][0]["train"]
    for run in tiny.results["runs"]:
        shares = [(run["train"]["regret"] + more) / start["regret"] for more in (0, 0.5)]
        assert table[run["method"]][3] == f"{statistics.median(shares):.2%}"
        assert table[run["method"]][-3:] == [f"{shares[0]:.2%}", "to", f"{shares[1]:.2%}"]
    assert not any("to" in cells for cells in lines_of(tiny.results).values())


def test_the_table_has_no_figures_of_a_run_that_diverged_and_the_median_of_the_others(tiny):
    assert lines_of(without(tiny.results, "kto"))["kto"] == ["1", "of", "1", "diverged"]
    results = with_second_seed(tiny.results)
    results["runs"][len(train.METHODS):] = without(results)["runs"][len(train.METHODS):]
    before, after = lines_of(tiny.results), lines_of(results)
    for name in train.METHODS:
        assert after[name] == [*before[name], "1", "of", "2", "diverged"]


def test_samples_are_of_two_prompts_and_none_of_a_run_that_diverged(tiny):
    lines = figures.samples(without(tiny.results, "kto")).splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == ["reference", *[name for name in train.METHODS if name != "kto"]]
    texts = tiny.results["reference"][0]["samples"]
    assert list(texts) == ["happy wind :", "happy sea :"]
    assert [len(answers) for answers in texts.values()] == [3, 3]
    for prompt, answers in texts.items():
        assert prompt in lines[0] and ",".join(answers[:2])[:40].rstrip() in lines[1]
    assert figures.samples(tiny.results) in tiny.out


def test_a_line_names_method_and_seed_and_what_was_reached(tiny):
    for run in tiny.results["runs"]:
        line = figures.line(dict(runs=run))
        assert line in tiny.err and "\n" not in line
        assert f"lost {figures.lost(run):.1%}" in line and f"KL {run['train']['kl']:.3f}" in line
        assert f"{run['curve'][-1]['loss']:.4f} (at start {run['start_loss']:.4f})" in line
        assert ("r_w" in line) == ("chosen_reward" in run)
    (run,) = [run for run in without(tiny.results)["runs"] if run["method"] == "dpo"]
    assert figures.line(dict(runs=run)) == "seed 1 | dpo               | diverged: the loss is nan"


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
    figure = drawn(figures.draw_rewards, dots, figures.styles(tiny.results))
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
