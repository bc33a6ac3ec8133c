"""How the claims are settled: a fair comparison, what it trains and measures, and its parts."""
import contextlib
import functools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import short_train
import train
from lab import claims, dots, exact, figures, memory, resume, run, tables, variants
from lab.variants import Variant
from model import ScalarGPT
from short_train import moved, small

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- f(x) + c of stored feedback
@pytest.fixture(scope="module")
def stored():
    """All feedback on 96 responses of short_train's language, a policy some way from the reference,
    and the reference's world of the training prompts, which differ in level."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in short_train.LANGUAGE.items():
            patch.setattr(data, name, value)
        patch.setattr(data, "TRAIN_PROMPTS", data.PROMPTS[1:12:5])    # three moods, three nouns
        settings = train.Settings(device="cpu", judged=96, reference_steps=8, n_layer=1, n_head=1,
                                  n_embd=8, level=1.0)
        reference = train.train_reference(settings, 0)
        world = exact.World(reference, data.TRAIN_PROMPTS, 0.25, 1.0)
        return SimpleNamespace(policy=moved(reference, 0.3), world=world,
                               feedback=train.collect_feedback(settings, 0, reference))


def batch_with(stored, offsets):
    """All feedback, with f(x) + c of its prompts."""
    batch = data.take(stored.feedback, torch.arange(96))
    batch.offset = offsets[batch.prompt]
    return batch


@pytest.mark.parametrize("beta", [0.5, 0.0625])
def test_exact_and_constant_offsets_are_beta_log_z_at_the_losss_own_beta(stored, beta):
    world = stored.world
    beta_log_z = [beta * math.log((ref.exp() * (rewards / beta).exp()).sum())
                  for ref, rewards in zip(world.ref_logprobs, world.rewards)]
    assert max(beta_log_z) - min(beta_log_z) > 0.3               # no two prompts have the same
    exact_one, constant = (variants.given_offsets(kind, world, beta)
                           for kind in ("exact", "constant"))
    assert exact_one.tolist() == pytest.approx(beta_log_z, abs=1e-6)
    assert constant.tolist() == pytest.approx([np.mean(beta_log_z)] * 3, abs=1e-6)
    assert variants.given_offsets("zero", world, beta) is None
    batch = batch_with(stored, exact_one)
    rho = (train.model_logprob(stored.policy, batch.tokens, batch.mask) - batch.ref_logprob)
    expected = torch.tensor([beta_log_z[i] for i in batch.prompt]) + beta * rho
    assert torch.allclose(train.implicit_reward(stored.policy, batch, beta), expected, atol=1e-5)


@pytest.mark.parametrize("name, squash", [("una-score", torch.sigmoid),
                                          ("una-reward", lambda reward: reward)])
def test_the_mean_residual_is_the_prompts_own_in_the_batch(stored, name, squash):
    batch = data.take(stored.feedback, torch.arange(1, 96, 2))
    rho = train.model_logprob(stored.policy, batch.tokens, batch.mask) - batch.ref_logprob
    residual = batch.scores.logit() - 0.5 * rho
    offset = torch.stack([residual[batch.prompt == prompt].mean() for prompt in batch.prompt])
    expected = (squash(0.5 * rho + offset) - squash(batch.scores.logit())) ** 2
    method = variants.method_of(Variant(name, "residual"), dict(learning_rate=1e-3, beta=2))
    got = method.loss(stored.policy, batch, 0.5)
    assert torch.allclose(got, expected, atol=1e-5)
    weights = [*stored.policy.parameters()]
    for a, b in zip(torch.autograd.grad(got.sum(), weights),
                    torch.autograd.grad(expected.sum(), weights)):
        assert torch.allclose(a, b, atol=1e-4)


def test_eq10_no_offset_is_seen_in_pairs_and_binary_feedback_sees_it(stored):
    offsets = variants.given_offsets("exact", stored.world, 0.5)
    pairs = data.take(stored.feedback, stored.feedback.pairs.T.flatten())
    without = train.una_pair(stored.policy, pairs, 0.5)
    pairs.offset = offsets[pairs.prompt]
    assert offsets.abs().min() > 0.01
    assert torch.allclose(train.una_pair(stored.policy, pairs, 0.5), without, atol=1e-6)
    binary = batch_with(stored, torch.zeros(3)), batch_with(stored, offsets)
    assert not torch.allclose(*(train.una_binary_bce(stored.policy, batch, 0.5)
                                for batch in binary), atol=1e-2)


def test_a_variant_is_the_method_with_the_cells_settings_and_the_variants_offset():
    for name in variants.COMPARED:
        own, offset = train.METHODS[name], tables.OWN.get(name, "zero")
        method = variants.method_of(Variant(name, offset), dict(learning_rate=0.125, beta=3))
        assert own.offset == offset and method == own._replace(learning_rate=0.125, beta=3)
    ppo = variants.method_of(Variant("ppo"), dict(learning_rate=0.125, epochs=2, divide=True))
    assert (ppo.epochs, ppo.loss.func, ppo.loss.keywords) == (2, train.ppo, dict(divide=True))
    online = variants.method_of(Variant("una-online"), dict(leave_one_out=True))
    assert online.loss.keywords == dict(leave_one_out=True) and online.beta == 1


def test_how_far_an_offset_ended_from_beta_log_z_is_said(few_prompts, tmp_path):
    path = str(tmp_path / "shared.pt")
    torch.save(few_prompts, path)
    settings = replace(few_prompts.settings, steps=2)
    truth = 0.5 * torch.log((few_prompts.worlds["train"].ref_logprobs
                             + few_prompts.worlds["train"].rewards / 0.5).exp().sum(1))
    for method, offset in (("una-score-offset", "estimated"), ("una-binary-offset", "learned"),
                           ("una-score", "exact"), ("una-score", "zero")):
        entry = variants.run_variant(settings, 3, Variant(method, offset),
                                     dict(learning_rate=1e-3, beta=2), path)["runs"]
        assert (entry["offset"], entry["level"], entry["judged"]) == (offset, 0.0, 96)
        assert entry["passes"] == 2 * 48 / 96
        if offset in ("estimated", "learned"):
            off = torch.tensor(entry["offsets"][:2]) - truth
            assert entry["offset_error"] == pytest.approx(off.square().mean().sqrt().item())
        else:
            assert "offset_error" not in entry


# ---------------------------------------------------------------- the gradient's noise
def test_gradient_noise_is_the_trace_of_the_gradients_covariance():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    points = torch.randn(8, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    losses = ((batch @ weight + bias) ** 2 for batch in points)
    gradients = np.array([[*(2 * batch.sum(1, keepdims=True) * batch).mean(0),
                           2 * batch.sum(1).mean()] for batch in points.numpy()])
    expected = np.trace(np.cov(gradients.T))
    assert variants.gradient_noise(losses, [weight, bias]) == pytest.approx(expected)
    assert weight.grad is None                                   # measuring leaves nothing behind


def test_eq07_gradient_noise_vanishes_at_the_optimum_and_ppos_does_not(monkeypatch):
    # pi* itself cannot be had as a GPT; but a reward whose optimum is the policy can:
    # r = beta log pi/pi_ref + f(x).
    reference, policy = small().reference, moved(small().reference, 0.3)
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:2])
    shared = SimpleNamespace(reference=reference, reward_model=None)

    def optimal_here(tokens, mask, level):
        with torch.no_grad():
            rho = (train.model_logprob(policy, tokens, mask)
                   - train.model_logprob(reference, tokens, mask))
        return 0.25 * rho + tokens[:, 0]

    def noise(name):
        batches = train.fresh_batches(policy, ScalarGPT(policy), shared, 32, 0)
        losses = (train.METHODS[name].loss(policy, batch, 0.25) for batch in batches)
        return variants.gradient_noise(losses, [*policy.parameters()])

    assert noise("una-online") > 1e-3
    monkeypatch.setattr(train, "judge_reward", optimal_here)
    assert noise("una-online") < 1e-8
    assert noise("ppo") > 1e-3                  # its values, 0 here, are not the baseline
    monkeypatch.setitem(train.METHODS, "ppo", train.METHODS["ppo"]._replace(
        loss=functools.partial(train.ppo, divide=True)))
    assert noise("ppo") > 1e-3                  # advantages are scaled to deviation 1, always


@pytest.fixture
def few_prompts(monkeypatch):
    """small(), and its prompts for what trains on it."""
    shared = SimpleNamespace(**vars(small()))
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:2])
    monkeypatch.setattr(data, "HELDOUT_PROMPTS", data.HELDOUT_PROMPTS[:1])
    shared.feedback = train.collect_feedback(shared.settings, 0, shared.reference)
    return shared


def noise_of(shared, name, settings, seed=3):
    """A run whose gradient's noise is measured: its entry and its observer."""
    method = train.METHODS[name]
    observer = variants.NoiseObserver(method, shared, settings, seed)
    watched = method._replace(loss=observer.loss)
    entry = train.run_method(settings, seed, name, shared, watched, lambda *_: observer)["runs"]
    return entry, observer


@pytest.mark.parametrize("name", ["una-online", "una-online-score", "ppo"])
def test_measuring_the_noise_changes_nothing_of_a_run(few_prompts, name):
    settings = replace(few_prompts.settings, steps=4, evaluations=2, batch=16)
    entry, _ = noise_of(few_prompts, name, settings)
    plain = train.run_method(settings, 3, name, few_prompts)["runs"]
    assert entry["train"] == plain["train"] and entry["heldout"] == plain["heldout"]
    assert [point["regret"] for point in entry["curve"]] == [
        point["regret"] for point in plain["curve"]]
    assert [point["step"] for point in entry["curve"]] == [0, 1, 4]
    assert all(point["gradient_noise"] > 0 for point in entry["curve"])
    assert entry["state_bytes"] == plain["state_bytes"]


def test_the_noise_is_the_policys_and_value_models_in_training_on_a_stream_of_its_own(
        few_prompts, monkeypatch):
    settings = replace(few_prompts.settings, steps=4, batch=16)
    streams, trained = [], []
    fresh_batches = train.fresh_batches

    def record(policy, value, shared, size, seed, level):
        streams.append(seed)
        trained.append((policy, value))
        return fresh_batches(policy, value, shared, size, seed, level)
    monkeypatch.setattr(train, "fresh_batches", record)
    _, observer = noise_of(few_prompts, "ppo", settings)
    assert streams == [3 + 10**6, 3]
    for measured, model in zip((observer.policy, observer.value), trained[1]):
        assert measured is not model
        for a, b in zip(measured.parameters(), model.parameters()):
            assert torch.equal(a, b)
    assert observer.value.scalar.weight.abs().sum() > 0          # it began at 0


def test_noise_is_that_of_the_first_inner_step_and_of_eight_batches(few_prompts):
    calls = []

    def loss(policy, batch, beta):
        calls.append(batch)
        return train.una_online(policy, batch, beta)
    method = train.METHODS["ppo"]._replace(loss=loss, epochs=2)
    settings = replace(few_prompts.settings, batch=16)
    variants.NoiseObserver(method, few_prompts, settings, 0)
    assert len(calls) == len(set(map(id, calls))) == 8


# ---------------------------------------------------------------- a fair comparison
def test_every_grid_has_sixteen_cells_and_no_seed_both_tunes_and_reports():
    for variant, grid in claims.GRIDS.items():
        assert len(set(claims.cells_of(grid))) == 16, variant
        assert "learning_rate" in grid and 1 in grid.get("beta", (1,))
    tuned = {variant.method for variant in claims.GRIDS if variant[2:] == (0.0, "judge")}
    assert tuned == set(variants.COMPARED) - {"dpo"} | {"una-reward"}
    assert not set(claims.TUNING_SEEDS) & set(claims.REPORTED_SEEDS)
    assert not {*range(6), *range(11, 19), 100, 101, 102, 103} & set(claims.REPORTED_SEEDS)
    assert len(claims.REPORTED_SEEDS) == 8 and len(claims.TUNING_SEEDS) == 1 + len(claims.KEPT) == 4


def test_a_grid_grows_beyond_the_end_where_its_best_cell_lies():
    grid = dict(learning_rate=(1e-3, 2e-3, 4e-3), beta=(0.5, 1, 2), divide=(False, True))

    def grown(rate, beta):
        new = claims.grown(grid, (("learning_rate", rate), ("beta", beta), ("divide", False)))
        return new["learning_rate"], new["beta"]
    assert grown(2e-3, 1) == (grid["learning_rate"], grid["beta"])
    assert grown(4e-3, 1) == ((1e-3, 2e-3, 4e-3, 8e-3), grid["beta"])
    assert grown(1e-3, 2) == ((5e-4, 1e-3, 2e-3, 4e-3), (0.5, 1, 2, 4))
    assert grown(2e-3, 0.5) == (grid["learning_rate"], (0.25, 0.5, 1, 2))


FIGURES = dict(reward=1.0, kl=0.5, objective=0.875, optimum=1.0, regret=0.125,
               frontier_reward=1.1, residual_variance=0.1)
FRESH = ("una-online", "una-online-score", "ppo")


class Inline:
    """run.Jobs without processes."""

    def __init__(self, n):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, function, jobs, ended):
        for job in jobs:
            ended(job, function(*job))


def badness(cell):
    """The regret of a rehearsed run: least at rate 3e-3 and beta 1."""
    return (0.1 * abs(math.log(cell["learning_rate"] / 3e-3))
            + 0.1 * abs(math.log(cell.get("beta", 1)))
            + 0.01 * sum(bool(cell.get(knob)) for knob in ("divide", "leave_one_out"))
            + 0.02 * (cell.get("epochs", 1) - 1))


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    """lab.claims with runs that cost nothing.

    A namespace: run(flags), its status; made, the runs so far; diverge, a set of (method, seed) to
    fill; stop_at, after how many runs Ctrl-C comes.
    """
    here = SimpleNamespace(made=[], diverge=set(), stop_at=math.inf, memory=[])

    def run_variant(settings, seed, variant, cell, path, glance):
        if len(here.made) >= here.stop_at:
            here.stop_at = math.inf
            raise KeyboardInterrupt
        assert Path(path).exists()
        assert (settings.level, settings.reward) == variant[2:]
        here.made.append((variant, seed, tuple(cell.items()), settings.judged,
                          settings.evaluations, glance))
        entry = dict(offset=variant.offset, level=variant.level, judged=settings.judged,
                     passes=1.0, steps=settings.steps, cell=cell, method=variant.method, seed=seed,
                     start_loss=1.0)
        if variant.method in FRESH:
            entry["reward_source"] = settings.reward
        if cell["learning_rate"] > 1e-2 or (variant.method, seed) in here.diverge:
            return dict(runs=entry | dict(diverged="the loss of step 9 is inf"))
        point = dict(loss=0.5, gradient_noise=1.0)
        curve = [dict(step=0, seconds=0.0, regret=1.0, gradient_noise=1.0),
                 dict(step=400, seconds=1.0 + 0.01 * seed,
                      regret=badness(cell) + 0.001 * seed) | point]
        entry |= dict(seconds=1.0 + 0.01 * seed, state_bytes=1000, train=FIGURES, heldout=FIGURES,
                      curve=curve)
        if settings.reward == "model":
            entry["reward_model"] = dict(accuracy=0.8, model_gain=0.5 + seed / 100, judge_gain=0.5)
        return dict(runs=entry)

    def prepare(settings, seed, path, base):
        assert base is None or Path(base).exists()
        Path(path).touch()
        start = dict(method="reference", seed=seed, train=FIGURES, heldout=FIGURES, dots=[],
                     samples={}, stages={})
        best = dict(method="optimum", seed=seed, train=FIGURES, heldout=FIGURES,
                    frontier=[[0.1, 1.0], [0.5, 1.2]])
        return dict(reference=start | dict(train=FIGURES | dict(objective=0.5)), optimum=best)

    def peak_memory(settings, name):
        here.memory.append((name, settings.reward))
        return dict(method=name, reward_source=settings.reward, bytes=7)

    monkeypatch.setattr(variants, "run_variant", run_variant)
    monkeypatch.setattr(variants, "prepare", prepare)
    monkeypatch.setattr(memory, "peak_memory", peak_memory)
    monkeypatch.setattr(run, "Jobs", Inline)
    monkeypatch.setattr(figures, "picture", lambda path, *_, **__: Path(path).touch())
    monkeypatch.setattr(dots, "film", lambda settings, seed, variant, cell, path: dict(
        dots=dict(method=variant.method, level=variant.level, seed=seed)))
    monkeypatch.setattr(dots, "draw_pictures", lambda _, folder: [
        (Path(folder) / name).touch() for name in dots.PICTURES])
    here.run = lambda flags="": claims.main(["--device", "cpu", "--out", str(tmp_path),
                                             *flags.split()])
    here.found = lambda: json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    return here


def test_cells_run_on_the_first_tuning_seed_and_the_better_half_on_each_other(rehearsal):
    assert rehearsal.run() == 0
    made, found = rehearsal.made, rehearsal.found()
    assert len(made) == len(set(made))
    seeds = [*claims.TUNING_SEEDS]
    assert all(glance == (seed in seeds) for _, seed, _, _, _, glance in made)
    for variant, grid in claims.GRIDS.items():
        on = {seed: [cell for other, its_seed, cell, *_ in made
                     if (other, its_seed) == (variant, seed)] for seed in seeds}
        assert set(claims.cells_of(grid)) <= set(on[seeds[0]])
        assert [len(on[seed]) for seed in seeds[1:]] == [8, 4, 2]

        def rank(cell):
            cell = dict(cell)
            return math.inf if cell["learning_rate"] > 1e-2 else badness(cell)
        for before, after in zip(seeds, seeds[1:]):
            assert set(on[after]) <= set(on[before])
            worst = max(rank(cell) for cell in on[after])
            assert all(rank(cell) >= worst for cell in on[before] if cell not in on[after])
        rows = tables.grid_of(found, *variant)
        (best,) = [row for row in rows if row["best"]]
        assert badness(best["cell"]) == min(badness(dict(cell)) for cell in on[seeds[0]])
        assert sorted(len(row["lost"]) for row in rows)[-2:] == [4, 4]
        assert all(row["lost"][0] is None for row in rows if row["cell"]["learning_rate"] > 1e-2)


def test_grids_grow_twice_at_most_and_by_the_rule(rehearsal):
    rehearsal.run()
    sizes = {variant: len(tables.grid_of(rehearsal.found(), *variant)) for variant in claims.GRIDS}
    # The best rate is 4e-3, the last one for pairs. The best beta is 1, the last without offset.
    assert sizes[Variant("una-pair")] == sizes[Variant("una-score")] == 16 + 4
    assert sizes[Variant("una-score-offset", "estimated")] == 16
    assert sizes[Variant("una-online")] == sizes[Variant("ppo")] == 16


def test_the_best_cells_and_those_of_the_nearest_relatives_are_reported(rehearsal):
    rehearsal.run()
    found, seeds = rehearsal.found(), list(claims.REPORTED_SEEDS)
    chosen = {Variant(*(row[name] for name in Variant._fields)): row["cell"]
              for row in found["tuning"] if row["best"]}
    by_run = {}
    for entry in found["runs"]:
        reward = entry.get("reward_source", "judge")
        key = (entry["method"], entry["offset"], entry["level"], reward, entry["judged"],
               tuple(entry["cell"].items()))
        by_run.setdefault(key, []).append(entry["seed"])
    assert all(at == seeds for at in by_run.values())
    told = {(Variant(*key[:4]), key[4]): dict(key[5]) for key in by_run}
    for variant, cell in chosen.items():
        if variant.method != "ppo":
            assert told[variant, 76_800] == cell
    assert told[Variant("dpo"), 76_800] == told[Variant("dpo"), 4096] == chosen[Variant("una-pair")]
    estimated = chosen[Variant("una-score-offset", "estimated")]
    for offset in ("exact", "residual", "held", "constant"):
        assert told[Variant("una-score", offset), 76_800] == estimated
    assert told[Variant("una-score", "exact", 1.0), 76_800] == estimated
    assert told[Variant("una-binary-bce", "estimated", 1.0), 76_800] == chosen[
        Variant("una-binary-offset", "learned")]
    assert told[Variant("una-reward", "constant", 1.0), 76_800] == chosen[
        Variant("una-score", "constant", 1.0)]
    division = [key[5] for key in by_run if key[:4] == ("ppo", "zero", 0.0, "judge")]
    assert sorted(dict(cell)["divide"] for cell in division) == [False, True]
    curves = {run[0] for run in rehearsal.made if run[4] == 11}
    assert curves == {Variant("una-online"), Variant("ppo")}
    assert [entry["seed"] for entry in found["reference"]] == seeds
    assert [entry["seed"] for entry in found["optimum"]] == seeds
    assert [(entry["method"], entry["level"], entry["seed"]) for entry in found["dots"]] == [
        (variant.method, variant.level, seeds[0]) for variant in dots.FILMED]
    assert sorted(rehearsal.memory) == sorted([(name, "judge") for name in variants.COMPARED]
                                              + [("una-online", "model"), ("ppo", "model")])
    assert found["settings"]["seeds"] == 8 and found["settings"]["judged"] == 76_800
    assert found["predictions"] == claims.PREDICTIONS


def test_claims_go_on_where_they_were_stopped(rehearsal, tmp_path):
    rehearsal.run()
    first, count = rehearsal.found(), len(rehearsal.made)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    lost_part = min((tmp_path / "parts").glob("una-*.json"))
    lost_part.unlink()
    rehearsal.run("--jobs 3")                                    # its name depends on no such thing
    second = rehearsal.found()
    assert second["settings"].pop("jobs") == 3 and first["settings"].pop("jobs") >= 1
    assert second == first and len(rehearsal.made) == count + 1 and lost_part.exists()
    assert page == (tmp_path / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "claims.json", "frontier.png", "implicit-against-explicit.png", "parts",
        "regret-over-time.png", "training.gif"]


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(rehearsal, tmp_path, capsys):
    rehearsal.stop_at = 100
    assert rehearsal.run() == 130
    told = capsys.readouterr().err.splitlines()[-1]
    cells = 16 * len(claims.GRIDS)
    assert told.startswith(f"lab.claims: interrupted in grids, move 0, 100 of {cells} parts done. ")
    assert f"{tmp_path}/parts" in told
    assert not (tmp_path / "claims.json").exists()
    assert rehearsal.run() == 0
    assert len(rehearsal.made) == len(set(rehearsal.made))       # nothing was run twice


def test_a_prepared_seed_that_was_lost_is_prepared_anew(rehearsal, tmp_path):
    rehearsal.run()
    lost = min((tmp_path / "parts").glob("*.pt"))
    lost.unlink()
    count = len(rehearsal.made)
    assert rehearsal.run() == 0 and lost.exists() and len(rehearsal.made) == count


def test_claims_are_settled_in_lab_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = []
    monkeypatch.setattr(claims, "settle", lambda settings: told.append(settings) or dict(runs=[]))
    monkeypatch.setattr(claims, "write_page", lambda *_: None)
    claims.main([])
    claims.main(["--out", "elsewhere"])
    assert [settings.out for settings in told] == ["lab", "elsewhere"]
    defaults = train.Settings(methods=[*variants.COMPARED])
    for settings in told:
        assert replace(settings, out=defaults.out, jobs=0, device="auto") == defaults


def test_a_diverged_cell_is_the_worst_and_a_diverged_reported_run_is_kept_and_told(
        rehearsal, tmp_path, capsys):
    rehearsal.diverge |= {("kto", 22), ("kto", 25), ("una-score", 21), ("ppo", 28),
                          *(("una-mixed", seed) for seed in claims.REPORTED_SEEDS)}
    assert rehearsal.run() == 1
    told = capsys.readouterr().err.splitlines()
    assert "seed 22 | kto diverged: the loss of step 9 is inf" in told
    found = rehearsal.found()
    assert sum("diverged" in entry for entry in tables.pick(found, "kto")) == 2
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "2 of 8 diverged" in page and "8 of 8 diverged" in page
    assert "nan" not in page and "inf" not in page.replace("infinite", "")
    count = len(rehearsal.made)
    rehearsal.run()
    assert len(rehearsal.made) == count                          # it is not run again


def test_a_run_that_leaves_the_numbers_has_lost_more_than_any_other(few_prompts, tmp_path):
    path = str(tmp_path / "shared.pt")
    torch.save(few_prompts, path)
    settings = replace(few_prompts.settings, steps=2)
    for variant in (Variant("kto"), Variant("una-score", "residual"), Variant("una-online")):
        for glance in (False, True):
            cell = dict(learning_rate=1e39)
            entry = variants.run_variant(settings, 3, variant, cell, path, glance)["runs"]
            assert entry["diverged"] and figures.lost(entry) == math.inf
            assert (entry["method"], entry["offset"], entry["seed"]) == (*variant[:2], 3)


def test_a_glance_sees_what_the_whole_observer_sees(few_prompts, tmp_path):
    path = str(tmp_path / "shared.pt")
    torch.save(few_prompts, path)
    settings = replace(few_prompts.settings, steps=2)
    short, whole = (variants.run_variant(settings, 3, Variant("una-score"), {}, path, glance)
                    for glance in (True, False))
    assert figures.lost(short["runs"]) == figures.lost(whole["runs"])
    assert "heldout" in whole["runs"] and "heldout" not in short["runs"]
    assert figures.line(short)                                   # the log can tell of it


def test_what_a_run_needs_beyond_the_prepared_seed_is_made_for_it(few_prompts, tmp_path):
    path = str(tmp_path / "shared.pt")
    torch.save(few_prompts, path)
    settings = few_prompts.settings
    same = variants.shared_by(settings, 0, path)
    assert torch.equal(same.feedback.tokens, few_prompts.feedback.tokens)
    other = variants.shared_by(replace(settings, judged=48), 0, path)
    expected = train.collect_feedback(replace(settings, judged=48), 0, few_prompts.reference)
    assert torch.equal(other.feedback.tokens, expected.tokens)
    assert torch.equal(other.feedback.pairs, expected.pairs)
    again = variants.shared_by(settings, 0, path)                # the prepared seed is as it was
    assert len(again.feedback.tokens) == 96


def test_a_seed_is_prepared_at_another_level_with_the_same_reference(few_prompts, tmp_path):
    settings = few_prompts.settings
    for name, level, base in (("a", 0.0, None), ("b", 1.0, "a")):
        variants.prepare(replace(settings, level=level), 0, str(tmp_path / name),
                         base and str(tmp_path / base))
    a, b = (train.load(str(tmp_path / name)) for name in "ab")
    for one, other in zip(a.reference.parameters(), b.reference.parameters()):
        assert torch.equal(one, other)
    assert torch.equal(a.feedback.tokens, b.feedback.tokens)
    assert not torch.equal(a.feedback.scores, b.feedback.scores)


# ---------------------------------------------------------------- films
def test_a_film_goes_from_the_reference_to_the_trained_policy(few_prompts, tmp_path, monkeypatch):
    path, frames = str(tmp_path / "shared.pt"), []
    torch.save(few_prompts, path)
    monkeypatch.setattr(dots, "FRAMES", 3)
    settings, world = replace(few_prompts.settings, steps=4), few_prompts.worlds["train"]
    cell = dict(learning_rate=1e-2, beta=2)
    entry = dots.film(settings, 0, dots.OFFSET, cell, path)["dots"]
    align = train.align

    def watched(method, policy, *rest, **words):
        result = align(method, policy, *rest, **words)
        frames.append(exact.policy_logprobs(policy, world.prompts))
        return result
    monkeypatch.setattr(train, "align", watched)
    variants.run_variant(settings, 0, dots.OFFSET, cell, path)   # the same run, with other eyes
    likely = world.ref_logprobs > math.log(1 / 300)
    explicit, implicit, beta_log_z, prompt = dots.of([entry], dots.OFFSET)
    assert entry["steps"] == [0, 1, 4] and len(implicit) == 3
    assert not implicit[0].any() and implicit[1].any()
    expected = 0.25 * (frames[0] - world.ref_logprobs)[likely]
    assert np.allclose(implicit[2], expected, atol=0.0051)       # two decimals
    assert np.allclose(explicit, world.rewards[likely], atol=0.0051)
    assert np.allclose(beta_log_z, world.optimum[likely.nonzero()[:, 0]])
    assert set(prompt) == {0, 1}
    still = dots.film(settings, 0, dots.SCORE, cell, path)["dots"]
    assert still["steps"] == [0, 4] and len(still["frames"]) == 2


# ---------------------------------------------------------------- parts
SOURCE = '''"""A module."""
import math


def half(x):
    """x / 2."""
    return x * 0.5     # exact
'''


def test_syntax_is_the_same_with_other_prose_and_another_with_another_number():
    same = SOURCE.replace("A module.", "Another.").replace("x / 2.", "Half of\n    x.")
    same = same.replace("# exact", "# no rounding").replace("import math\n", "import math  # !\n")
    assert same != SOURCE and resume.syntax(same) == resume.syntax(SOURCE)
    assert resume.syntax(SOURCE.replace('    """x / 2."""\n', "")) == resume.syntax(SOURCE)
    for old, new in (("0.5", "0.25"), ("import math", "import cmath"), ("* 0.5", "/ 0.5"),
                     ("return x * 0.5", "return 'x'")):
        assert resume.syntax(SOURCE.replace(old, new)) != resume.syntax(SOURCE), new


@contextlib.contextmanager
def changed(monkeypatch, folder, name, change):
    """The repository with one file changed, for the keys of parts."""
    for path in resume.TRAINS:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    source = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(change(source), encoding="utf-8")
    assert (folder / name).read_text(encoding="utf-8") != source
    with monkeypatch.context() as patch:
        patch.setattr(resume, "ROOT", folder)
        resume.code_that_trains.cache_clear()
        yield
    resume.code_that_trains.cache_clear()


@pytest.mark.parametrize("name", ["una.py", "model.py", "data.py", "train.py", "lab/exact.py",
                                  "lab/variants.py"])
def test_a_parts_name_changes_with_the_code_that_trains_and_not_with_its_prose(
        name, monkeypatch, tmp_path):
    assert set(resume.TRAINS) >= {name}

    def path():
        return resume.part_path("parts", train.Settings(), 11, "kto", "zero", 1e-3, 0.5)
    before = path()
    with changed(monkeypatch, tmp_path, name, lambda source: "# A comment.\n" + source):
        assert path() == before
    with changed(monkeypatch, tmp_path, name, lambda source: source.replace('"""', '"""So: ', 1)):
        assert path() == before
    with changed(monkeypatch, tmp_path, name, lambda source: source + "\nEXTRA = 2\n"):
        with_2 = path()
    with changed(monkeypatch, tmp_path, name, lambda source: source + "\nEXTRA = 3\n"):
        assert len({before, with_2, path()}) == 3
    assert path() == before


def test_a_parts_name_has_all_that_the_run_depends_on():
    settings = train.Settings()
    names = {resume.part_path("parts", *arguments) for arguments in (
        (settings, 11, "kto", "zero", 1e-3, 0.5), (settings, 12, "kto", "zero", 1e-3, 0.5),
        (settings, 11, "dpo", "zero", 1e-3, 0.5), (settings, 11, "kto", "exact", 1e-3, 0.5),
        (settings, 11, "kto", "zero", 2e-3, 0.5), (settings, 11, "kto", "zero", 1e-3, 0.25),
        *((replace(settings, **change), 11, "kto", "zero", 1e-3, 0.5) for change in (
            dict(steps=401), dict(judged=48), dict(reward="model"), dict(evaluations=1),
            dict(beta=0.5), dict(n_embd=32), dict(reference_steps=3), dict(device="cuda"))))}
    assert len(names) == 14


# ---------------------------------------------------------------- the real thing, in miniature
def test_a_miniature_is_interrupted_resumed_and_the_same_as_one_in_a_piece(
        monkeypatch, tmp_path, capsys):
    for name, value in short_train.LANGUAGE.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.PROMPTS[1:5])
    monkeypatch.setattr(claims, "GRIDS", {
        variant: {knob: values[:1 + (knob == "learning_rate" and i == 0)]
                  for knob, values in grid.items()}
        for i, (variant, grid) in enumerate(claims.GRIDS.items())})
    monkeypatch.setattr(claims, "TUNING_SEEDS", range(100, 101))
    monkeypatch.setattr(claims, "MOVES", 0)
    monkeypatch.setattr(claims, "REPORTED_SEEDS", range(21, 23))
    monkeypatch.setattr(claims, "FEW", 24)
    monkeypatch.setattr(memory, "peak_memories", lambda settings: [])
    monkeypatch.setattr(dots, "FRAMES", 3)
    settings = train.Settings(methods=[*variants.COMPARED], steps=3, judged=48, reference_steps=8,
                              evaluations=2, n_layer=1, n_head=1, n_embd=8, batch=48)
    run_variant, calls = variants.run_variant, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return run_variant(*arguments)

    def main(out):
        return claims.main(["--device", "cpu", "--jobs", "1", "--out", str(out)], settings)

    monkeypatch.setattr(variants, "run_variant", interrupted)
    assert main(tmp_path / "a") == 130
    tuned = 1 + len(claims.GRIDS)
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"interrupted in reported seeds, {39 - tuned} of " in told
    reported = int(re.search(r"of (\d+) parts", told)[1])
    assert main(tmp_path / "a") == 0
    assert len(calls) == tuned + reported + 1
    monkeypatch.setattr(variants, "run_variant", run_variant)
    monkeypatch.setattr(claims, "write_page", lambda *_: None)   # once is enough
    assert main(tmp_path / "b") == 0
    found = [json.loads((tmp_path / out / "claims.json").read_text(encoding="utf-8"))
             for out in "ab"]
    for entry in (entry for one in found for entry in one["runs"]):
        assert "dots" not in entry and "samples" not in entry
        online = entry["method"] in FRESH
        measured = online and entry["level"] == 0 and entry["reward_source"] == "judge"
        assert all(("gradient_noise" in point) == measured for point in entry["curve"])
        assert ("chosen_reward" in entry) != online
    a, b = (json.loads(json.dumps(one), object_hook=without_times) for one in found)
    assert a.pop("settings")["out"] != b.pop("settings")["out"] and a == b
    assert "frontier" in a["optimum"][0] and "frontier" not in a["optimum"][1]
    assert not [*tmp_path.glob("*/parts/*.part")]


def without_times(entry):
    return {name: value for name, value in entry.items()
            if name not in ("seconds", "evaluation_seconds", "stages")}


# ---------------------------------------------------------------- memory
def test_peak_memory_is_measured_in_fresh_processes_or_left_out_with_a_word(monkeypatch, capsys):
    pytest.importorskip("resource")
    settings = train.Settings(device="cpu", batch=48, n_layer=1, n_head=1, n_embd=8)
    with run.Jobs(2) as pool:
        entries = []
        pool.run(memory.peak_memory, [(settings, "una-pair")],
                 lambda _, entry: entries.append(entry))
    (entry,) = entries
    assert (entry["method"], entry["reward_source"]) == ("una-pair", "judge")
    assert 0 <= entry["bytes"] < 1e9
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    assert memory.peak_memories(settings) == []
    assert "peak memory: not measured" in capsys.readouterr().err
