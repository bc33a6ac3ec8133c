"""How the claims are settled: a fair comparison, what it trains and measures, and its parts."""
import contextlib
import json
import math
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
import una
from lab import claims, exact, figures, memory, run, variants
from model import ScalarGPT
from short_train import moved, small

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- f(x) + c of stored feedback
@pytest.fixture(scope="module")
def stored():
    """All feedback on 96 responses of short_train's language, a policy some way from the reference,
    and the reference's world of the training prompts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in short_train.LANGUAGE.items():
            patch.setattr(data, name, value)
        patch.setattr(data, "TRAIN_PROMPTS", data.PROMPTS[1:12:5])    # three moods
        settings = train.Settings(device="cpu", judged=96, reference_steps=8, n_layer=1, n_head=1,
                                  n_embd=8)
        reference = train.train_reference(settings, 0)
        feedback = train.collect_feedback(settings, 0, reference)
        return SimpleNamespace(
            policy=moved(reference, 0.3), prompts=data.TRAIN_PROMPTS, feedback=feedback,
            rewards=data.reward(feedback.tokens[:, :3], feedback.tokens[:, 3:]),
            world=exact.World(reference, data.TRAIN_PROMPTS, 0.25))


def loss_of(stored, name, offset, beta):
    """The loss of every response, (96,), where the task's beta is 0.25."""
    method = variants.method_of((name, offset), (1e-3, beta / 0.25), stored.world, 0.25)
    batch = data.take(stored.feedback, torch.arange(96))
    return method.loss(stored.policy, batch, method.beta * 0.25)


def test_estimated_offsets_are_means_over_the_batch_or_over_the_prompt():
    residual = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    reward = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    batch = SimpleNamespace(tokens=torch.tensor([[0, 1, 9, 5], [2, 1, 9, 5], [0, 1, 9, 7],
                                                 [0, 3, 9, 5]]),
                            scores=(residual + reward).sigmoid())
    over_batch = variants.mean_residual("batch")(reward, batch)
    over_prompt = variants.mean_residual("prompt")(reward, batch)
    assert over_batch.tolist() == pytest.approx([3.75] * 4)
    assert over_prompt.tolist() == pytest.approx([2.5, 2.0, 2.5, 8.0])


@pytest.mark.parametrize("beta", [0.5, 0.0625])
def test_eq13_with_each_offset_is_the_loss_written_out_response_by_response(stored, beta):
    feedback, world = stored.feedback, stored.world
    logprob = train.model_logprob(stored.policy, feedback.tokens, feedback.mask).detach()
    rho = logprob - feedback.ref_logprob
    residual = stored.rewards - beta * rho
    index = [stored.prompts.index(data.ENCODING.decode(row[:3].tolist()))
             for row in feedback.tokens]
    beta_log_z = [beta * math.log((ref.exp() * (rewards / beta).exp()).sum())
                  for ref, rewards in zip(world.ref_logprobs, world.rewards)]
    assert len({round(value, 3) for value in beta_log_z}) == 3   # no two prompts have the same
    offsets = {
        "zero": [0.0] * 96, "batch": [residual.mean().item()] * 96,
        "exact": [beta_log_z[i] for i in index],
        "prompt": [np.mean([residual[k].item() for k in range(96) if index[k] == i])
                   for i in index],
    }
    for offset, values in offsets.items():
        implicit = torch.sigmoid(beta * rho + torch.tensor(values, dtype=torch.float32))
        expected = (implicit - feedback.scores) ** 2
        got = loss_of(stored, "una-score", offset, beta)
        assert torch.allclose(got, expected, atol=1e-5), offset


def test_eq12_with_the_exact_offset_is_the_cross_entropy_with_it(stored):
    feedback = stored.feedback
    batch = data.take(feedback, torch.arange(96))
    logit = train.implicit_reward(stored.policy, batch, 0.5)
    logit = logit + variants.exact_offset(stored.world, 0.5)(logit, batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, feedback.labels,
                                                                    reduction="none")
    assert torch.allclose(loss_of(stored, "una-binary-bce", "exact", 0.5), expected, atol=1e-6)


def test_eq10_no_offset_is_seen_in_pairs_and_binary_feedback_sees_it(stored):
    pairs = data.take(stored.feedback, stored.feedback.pairs.T.flatten())
    reward = train.implicit_reward(stored.policy, pairs, 0.5)
    with_offset = reward + variants.exact_offset(stored.world, 0.5)(reward, pairs)
    assert (with_offset - reward).abs().min() > 0.01
    assert torch.allclose(una.una_pair_loss(*with_offset.chunk(2)),
                          una.una_pair_loss(*reward.chunk(2)), atol=1e-6)
    assert not torch.allclose(loss_of(stored, "una-binary-bce", "exact", 0.5),
                              loss_of(stored, "una-binary-bce", "zero", 0.5), atol=1e-2)


@pytest.mark.parametrize("over", ["batch", "prompt"])
def test_estimated_offsets_carry_no_gradient(stored, over):
    # With gradient the mean residual would be fitted away: a shift of all logprobs would cost
    # nothing.
    batch = data.take(stored.feedback, torch.arange(96))
    reward = train.implicit_reward(stored.policy, batch, 0.25)
    offset = variants.mean_residual(over)(reward, batch)
    assert reward.requires_grad and not offset.requires_grad
    weights = [*stored.policy.parameters()]
    constant = una.una_score_loss(reward + offset.clone(), batch.scores).sum()
    expected = torch.autograd.grad(constant, weights)
    got = torch.autograd.grad(loss_of(stored, "una-score", over, 0.25).sum(), weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))


def test_without_an_offset_a_variant_is_the_method_with_the_candidates_settings():
    for name, own in {name: train.METHODS[name] for name in variants.COMPARED}.items():
        method = variants.method_of((name, "zero"), (0.125, 3), None, 0.25)
        assert method == own._replace(learning_rate=0.125, beta=3)


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

    def optimal_here(tokens, mask):
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
    assert noise("ppo") > 1e-3                  # advantages are scaled to deviation 1, always


@pytest.fixture
def few_prompts(monkeypatch):
    """small(), and its prompts for what trains on it."""
    shared = small()
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:2])
    monkeypatch.setattr(data, "HELDOUT_PROMPTS", data.HELDOUT_PROMPTS[:1])
    return shared


def noise_of(shared, name, settings, seed=3):
    """A run whose gradient's noise is measured: its entry and its observer."""
    method = train.METHODS[name]
    observer = variants.NoiseObserver(method, shared, settings, seed)
    watched = method._replace(loss=observer.loss)
    entry = train.run_method(settings, seed, name, shared, watched, lambda *_: observer)["runs"]
    return entry, observer


@pytest.mark.parametrize("name", claims.ONLINE)
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

    def record(policy, value, shared, size, seed):
        streams.append(seed)
        trained.append((policy, value))
        return fresh_batches(policy, value, shared, size, seed)
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
    method = train.METHODS["ppo"]._replace(loss=loss)            # two inner steps
    settings = replace(few_prompts.settings, batch=16)
    variants.NoiseObserver(method, few_prompts, settings, 0)
    assert len(calls) == len(set(map(id, calls))) == 8


# ---------------------------------------------------------------- a fair comparison
def test_every_method_has_a_grid_of_the_same_size_and_no_seed_both_tunes_and_reports():
    assert {len(rates) * len(multiples) for rates, multiples in claims.GRIDS.values()} == {16}
    assert all(len(set(rates)) == len(set(multiples)) == 4
               for rates, multiples in claims.GRIDS.values())
    with_zero = {method for method, offset in claims.GRIDS if offset == "zero"}
    assert with_zero == set(variants.COMPARED) - {"dpo"}
    assert not set(claims.TUNING_SEEDS) & set(claims.REPORTED_SEEDS)
    assert len(claims.REPORTED_SEEDS) >= 5


FIGURES = dict(reward=1.0, kl=0.5, objective=0.875, optimum=1.0, regret=0.125,
               frontier_reward=1.1, residual_variance=0.1)


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


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    """lab.claims with runs that cost nothing. Their regret is least at rate 3e-3 and beta 1.

    A namespace: run(flags), its status; made, the runs so far; diverge, a set of (method, seed) to
    fill; stop_at, after how many runs Ctrl-C comes.
    """
    here = SimpleNamespace(made=[], diverge=set(), stop_at=math.inf, memory=[])

    def run_variant(settings, seed, variant, candidate, path):
        if len(here.made) >= here.stop_at:
            here.stop_at = math.inf
            raise KeyboardInterrupt
        assert Path(path).exists()
        (name, offset), (rate, multiple) = variant, candidate
        here.made.append((name, offset, seed, candidate, settings.reward, settings.steps,
                          settings.judged, settings.evaluations))
        entry = dict(offset=offset, judged=settings.judged, steps=settings.steps, method=name,
                     seed=seed, start_loss=1.0)
        if rate > 1e-2 or (name, seed) in here.diverge:
            return dict(runs=entry | dict(diverged="the loss of step 9 is inf"))
        regret = 0.1 * abs(math.log(rate / 3e-3)) + 0.1 * abs(math.log(multiple)) + 0.001 * seed
        point = dict(loss=0.5, gradient_noise=1.0)
        curve = [dict(step=0, seconds=0.0, regret=1.0, gradient_noise=1.0),
                 dict(step=400, seconds=1.0 + 0.01 * seed, regret=regret) | point]
        entry |= dict(seconds=1.0 + 0.01 * seed, state_bytes=1000, train=FIGURES, heldout=FIGURES,
                      curve=curve)
        if name in claims.ONLINE:
            entry["reward_source"] = settings.reward
        if settings.reward == "model":
            entry["reward_model"] = dict(accuracy=0.8, model_gain=0.5 + seed / 100, judge_gain=0.5)
        return dict(runs=entry)

    def prepare(settings, seed, path):
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
    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(memory, "peak_memory", peak_memory)
    monkeypatch.setattr(run, "Jobs", Inline)
    monkeypatch.setattr(figures, "picture", lambda path, *_, **__: Path(path).touch())
    here.run = lambda flags="": claims.main(["--device", "cpu", "--out", str(tmp_path),
                                             *flags.split()])
    here.found = lambda: json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    return here


def test_claims_tune_on_the_tuning_seeds_and_report_the_best_candidates_on_the_others(rehearsal):
    assert rehearsal.run() == 0
    made, found = rehearsal.made, rehearsal.found()
    tuned = [entry for entry in made if entry[2] in claims.TUNING_SEEDS]
    assert len(tuned) == len(set(tuned)) == 16 * len(claims.GRIDS) * len(claims.TUNING_SEEDS)

    def distance(candidate):
        return abs(math.log(candidate[0] / 3e-3)) + abs(math.log(candidate[1]))
    best = {variant: min(((rate, multiple) for rate in rates for multiple in multiples
                          if rate <= 1e-2), key=distance)
            for variant, (rates, multiples) in claims.GRIDS.items()}
    best["dpo", "zero"] = best["una-pair", "zero"]
    stored = claims.STORED
    seeds = claims.REPORTED_SEEDS
    expected = [(name, "zero", seed, "judge", 400, 4096, 1 if name in stored else 11)
                for name in variants.COMPARED for seed in seeds]
    expected += [(name, "zero", seed, "model", 400, 4096, 1)
                 for name in ("una-online", "ppo") for seed in seeds]
    expected += [("una-online", "zero", seed, "judge", 1000, 4096, 1) for seed in seeds]
    expected += [(*variant, seed, "judge", 400, 4096, 1)
                 for variant in claims.GRIDS if variant[1] != "zero" for seed in seeds]
    expected += [(name, "zero", seed, "judge", 400, size, 1)
                 for name in stored if name != "dpo" for seed in seeds[:5]
                 for size in (256, 1024, 16384)]
    reported = [entry for entry in made if entry[2] not in claims.TUNING_SEEDS]
    assert sorted((*entry[:3], *entry[4:]) for entry in reported) == sorted(expected)
    assert all(entry[3] == best[entry[:2]] for entry in reported)
    assert all(candidate["lost"] == [None, None] for candidate in found["tuning"]
               if candidate["learning_rate"] > 1e-2)                  # diverged: never the best
    assert [len(found[key]) for key in ("runs", "longer", "offsets", "sizes")] == [96, 8, 32, 90]
    assert [entry["seed"] for entry in found["reference"]] == [*seeds]
    assert [entry["seed"] for entry in found["optimum"]] == [*seeds]
    assert len(found["peak_memory"]) == len(variants.COMPARED) + 2
    assert sorted(rehearsal.memory) == sorted([(name, "judge") for name in variants.COMPARED]
                                              + [("una-online", "model"), ("ppo", "model")])
    assert found["settings"]["seeds"] == 8 and found["settings"]["judged"] == 4096


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
        "README.md", "claims.json", "frontier.png", "parts", "regret-over-time.png"]


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(rehearsal, tmp_path, capsys):
    rehearsal.stop_at = 100
    assert rehearsal.run() == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("lab.claims: interrupted in tuning, 100 of 416 parts done. ")
    assert f"{tmp_path}/parts" in told
    assert not (tmp_path / "claims.json").exists()
    assert rehearsal.run() == 0
    assert len(rehearsal.made) == len(set(rehearsal.made))       # nothing was run twice
    assert len(rehearsal.made) == 416 + 96 + 8 + 32 + 90


def test_a_prepared_seed_that_was_lost_is_prepared_anew(rehearsal, tmp_path):
    rehearsal.run()
    lost = min((tmp_path / "parts").glob("*.pt"))
    lost.unlink()
    count = len(rehearsal.made)
    assert rehearsal.run() == 0 and lost.exists() and len(rehearsal.made) == count


def test_claims_are_settled_in_lab_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = []
    monkeypatch.setattr(claims, "settle", lambda settings: told.append(settings) or dict(
        runs=[], longer=[], offsets=[], sizes=[]))
    monkeypatch.setattr(claims, "write_page", lambda *_: None)
    claims.main([])
    claims.main(["--out", "elsewhere"])
    assert [settings.out for settings in told] == ["lab", "elsewhere"]
    defaults = train.Settings(methods=[*variants.COMPARED])
    for settings in told:
        assert replace(settings, out=defaults.out, jobs=0, device="auto") == defaults


def test_a_diverged_candidate_is_the_worst_and_a_diverged_reported_run_is_kept_and_told(
        rehearsal, tmp_path, capsys):
    rehearsal.diverge |= {("kto", 12), ("kto", 15), ("una-score", 11), ("ppo", 18),
                          *(("una-mixed", seed) for seed in claims.REPORTED_SEEDS)}
    assert rehearsal.run() == 1
    told = capsys.readouterr().err.splitlines()
    assert "seed 12 | kto diverged: the loss of step 9 is inf" in told
    found = rehearsal.found()
    assert len(found["runs"]) == 96
    assert sum("diverged" in entry for entry in found["runs"]) == 2 + 1 + 2 + 8
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "(2 of 8 diverged)" in page and "(8 of 8 diverged)" in page
    assert "nan" not in page and "inf" not in page.replace("infinite", "")
    count = len(rehearsal.made)
    rehearsal.run()
    assert len(rehearsal.made) == count                          # it is not run again


def test_a_run_that_leaves_the_numbers_has_lost_more_than_any_other(few_prompts, tmp_path):
    path = str(tmp_path / "shared.pt")
    torch.save(few_prompts, path)
    settings = replace(few_prompts.settings, steps=2)
    for variant in (("kto", "zero"), ("una-score", "batch"), ("una-online", "zero")):
        entry = variants.run_variant(settings, 3, variant, (1e39, 1.0), path)["runs"]
        assert entry["diverged"] and figures.lost(entry) == math.inf
        assert (entry["method"], entry["offset"], entry["seed"]) == (*variant, 3)


def test_what_a_run_needs_beyond_the_prepared_seed_is_made_for_it(few_prompts, tmp_path):
    path = str(tmp_path / "shared.pt")
    torch.save(few_prompts, path)
    settings = few_prompts.settings
    same = variants.shared_by(settings, 0, path)
    assert same.reward_model is None
    assert torch.equal(same.feedback.tokens, few_prompts.feedback.tokens)
    other = variants.shared_by(replace(settings, judged=48, reward="model"), 0, path)
    expected = train.collect_feedback(replace(settings, judged=48), 0, few_prompts.reference)
    assert torch.equal(other.feedback.tokens, expected.tokens)
    assert torch.equal(other.feedback.pairs, expected.pairs)
    assert isinstance(other.reward_model, ScalarGPT)
    again = variants.shared_by(settings, 0, path)                # the prepared seed is as it was
    assert len(again.feedback.tokens) == 96 and again.reward_model is None


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
    assert same != SOURCE and claims.syntax(same) == claims.syntax(SOURCE)
    assert claims.syntax(SOURCE.replace('    """x / 2."""\n', "")) == claims.syntax(SOURCE)
    for old, new in (("0.5", "0.25"), ("import math", "import cmath"), ("* 0.5", "/ 0.5"),
                     ("return x * 0.5", "return 'x'")):
        assert claims.syntax(SOURCE.replace(old, new)) != claims.syntax(SOURCE), new


@contextlib.contextmanager
def changed(monkeypatch, folder, name, change):
    """The repository with one file changed, for the keys of parts."""
    for path in claims.TRAINS:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    source = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(change(source), encoding="utf-8")
    assert (folder / name).read_text(encoding="utf-8") != source
    with monkeypatch.context() as patch:
        patch.setattr(claims, "ROOT", folder)
        claims.code_that_trains.cache_clear()
        yield
    claims.code_that_trains.cache_clear()


@pytest.mark.parametrize("name", ["una.py", "model.py", "data.py", "train.py", "lab/exact.py",
                                  "lab/variants.py"])
def test_a_parts_name_changes_with_the_code_that_trains_and_not_with_its_prose(
        name, monkeypatch, tmp_path):
    assert set(claims.TRAINS) >= {name}

    def path():
        return claims.part_path("parts", train.Settings(), 11, "kto", "zero", 1e-3, 0.5)
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
    names = {claims.part_path("parts", *arguments) for arguments in (
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
    monkeypatch.setattr(claims, "GRIDS", {variant: (rates[:1], multiples[:1 + (i == 0)])
                                          for i, (variant, (rates, multiples))
                                          in enumerate(claims.GRIDS.items())})
    monkeypatch.setattr(claims, "TUNING_SEEDS", range(100, 101))
    monkeypatch.setattr(claims, "REPORTED_SEEDS", range(11, 13))
    monkeypatch.setattr(claims, "SIZES", (24, 48))
    monkeypatch.setattr(memory, "peak_memories", lambda settings: [])
    settings = train.Settings(methods=[*variants.COMPARED], steps=3, judged=48, reference_steps=8,
                              evaluations=2, n_layer=1, n_head=1, n_embd=8, batch=48)
    run_variant, calls = variants.run_variant, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return run_variant(*arguments)

    def main(out):
        return claims.main(["--device", "cpu", "--jobs", "1", "--out", str(out)], settings)

    monkeypatch.setattr(variants, "run_variant", interrupted)
    assert main(tmp_path / "a") == 130
    assert "interrupted in reported seeds, 15 of 46 parts done" in capsys.readouterr().err
    assert main(tmp_path / "a") == 0
    assert len(calls) == 14 + 46 + 1
    monkeypatch.setattr(variants, "run_variant", run_variant)
    assert main(tmp_path / "b") == 0
    found = [json.loads((tmp_path / out / "claims.json").read_text(encoding="utf-8"))
             for out in "ab"]
    for entry in (entry for one in found for key in ("runs", "longer", "offsets", "sizes")
                  for entry in one[key]):
        assert "dots" not in entry and "samples" not in entry
        online = entry["method"] in claims.ONLINE
        assert all(("gradient_noise" in point) == online for point in entry["curve"])
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
