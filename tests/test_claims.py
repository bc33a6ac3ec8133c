"""The comparison behind the README's claims: what it measures, that it is fair, and that the README says what it found."""
import concurrent.futures
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import claims
import data
import train
import una
from model import GPT, GPTConfig, ScalarGPT

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
RESULTS = json.loads((ROOT / "assets" / "claims.json").read_text())


def small_world(seed=0, prompts=data.TRAIN_PROMPTS[:2]):
    """A random reference, a policy some way from it, and their world."""
    torch.manual_seed(seed)
    config = GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, 1, 2, 16)
    reference, policy = (GPT(config).requires_grad_(False) for _ in range(2))
    for model in (reference, policy):
        model.wte.weight *= 5
    return reference, policy, train.World(reference, prompts, 0.25, CPU)


# ---------------------------------------------------------------- what is measured
def test_eq18_residual_variance_is_that_of_the_reward_at_the_reference_and_0_at_the_optimum():
    _, policy, world = small_world()
    probs = world.ref_logprobs.exp()
    mean = (probs * world.rewards).sum(1, keepdim=True)
    variance = (probs * (world.rewards - mean) ** 2).sum(1).mean().item()
    assert world.evaluate(world.ref_logprobs)["residual_variance"] == pytest.approx(variance)
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)
    assert world.evaluate(best)["residual_variance"] == pytest.approx(0, abs=1e-12)
    logprobs = world.logprobs(policy)                                       # and over 200,000 samples of any policy
    index = torch.multinomial(logprobs.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    residual = (world.rewards - 0.25 * (logprobs - world.ref_logprobs)).gather(1, index)
    assert world.evaluate(logprobs)["residual_variance"] == pytest.approx(residual.var(1).mean().item(), rel=0.05)


def test_gradient_noise_is_the_trace_of_the_gradients_covariance():
    weight, bias = torch.nn.Parameter(torch.ones(2, dtype=torch.float64)), torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    points = torch.randn(8, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    rounds = ([(batch @ weight + bias) ** 2, None] for batch in points)     # of two inner steps, the first
    gradients = np.array([[*(2 * batch.sum(1, keepdims=True) * batch).mean(0), 2 * batch.sum(1).mean()] for batch in points.numpy()])
    expected = np.trace(np.cov(gradients.T))
    assert train.gradient_noise(rounds, [weight, bias]) == pytest.approx(expected)
    assert weight.grad is None                                              # measuring leaves nothing behind


@pytest.mark.parametrize("method", ["una-online", "una-online-score", "ppo"])
def test_online_methods_sample_from_the_policy_and_not_from_the_reference(method, monkeypatch):
    reference, policy, world = small_world()
    seen = []
    monkeypatch.setattr(train, "sample", lambda model, *_: seen.append(model) or data.encode_responses([" warm sweet wind"] * 32))
    value = ScalarGPT(policy)
    settings = train.Settings(batch=32)
    next(iter(next(train.online_rounds(method, policy, value, reference, train.true_reward, world.prompts, settings, 0.25, 0))))
    assert seen == [policy]


def test_eq07_gradient_noise_vanishes_at_the_optimum_and_ppos_does_not():
    # pi* itself cannot be had as a GPT; but a reward whose optimum is the policy can: r = beta log pi/pi_ref.
    reference, policy, _ = small_world()
    policy.requires_grad_(True)
    prompts = data.encode_prompts(data.TRAIN_PROMPTS[:2])

    def judge(tokens, mask):
        with torch.no_grad():
            return 0.25 * (train.response_logprob(policy, tokens, mask) - train.response_logprob(reference, tokens, mask)) + tokens[:, 0]

    def noise(method, rewards):
        rounds = train.online_rounds(method, policy, ScalarGPT(policy), reference, rewards, prompts, train.Settings(batch=32), 0.25, 0)
        return train.gradient_noise(rounds, [*policy.parameters()])

    assert noise("una-online", judge) < 1e-8 < 1e-3 < noise("una-online", train.true_reward)
    assert noise("ppo", judge) > 1e-3                                       # advantages are scaled to deviation 1, whatever they are


def test_the_reward_models_report_is_right_for_a_perfect_a_reversed_and_an_indifferent_model(monkeypatch):
    reference, policy, world = small_world()
    gain = world.evaluate(world.logprobs(policy))["reward"] - world.evaluate(world.ref_logprobs)["reward"]
    for factor, accuracy in ((2.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        # The 9 is one of the many f(x) that Eq. 2 cannot see.
        monkeypatch.setattr(train, "model_reward", lambda model, tokens, mask: factor * train.true_reward(tokens, mask) + 9)
        report = train.reward_model_report(None, reference, policy, world.prompts, 0)
        assert report["accuracy"] == accuracy
        assert report["true_gain"] == pytest.approx(gain, abs=0.05)
        assert report["judged_gain"] == pytest.approx(factor * report["true_gain"], abs=1e-5)


def test_seconds_to_a_share_of_the_gain_are_read_on_the_log_of_the_regret():
    run = dict(curve=[dict(seconds=0.0, regret=1.0), dict(seconds=2.0, regret=0.01), dict(seconds=4.0, regret=0.5)])
    assert claims.seconds_to(0.9, run) == pytest.approx(1.0)
    assert claims.seconds_to(0.99, run) == pytest.approx(2.0)
    assert claims.seconds_to(0.999, run) == math.inf


def test_lost_is_0_at_the_optimum_1_at_the_reference_and_endless_for_a_run_that_diverged():
    assert train.lost(dict(curve=[dict(regret=0.8), dict(regret=0.2)])) == 0.25
    assert train.lost(dict(diverged="the loss of step 7 is nan")) == math.inf
    run = RESULTS["runs"][0]
    start = next(entry["train"] for entry in RESULTS["landmarks"] if entry["seed"] == run["seed"])
    assert train.lost(run) == pytest.approx(1 - train.gain_share(run["train"], start))


# ---------------------------------------------------------------- f(x) + c of stored feedback
def test_estimated_offsets_are_means_over_the_batch_or_over_the_prompt():
    residual = torch.tensor([1.0, 2.0, 4.0, 8.0])
    prompts = torch.tensor([[0, 1], [2, 1], [0, 1], [0, 3]])
    assert train.estimated_offset(residual, prompts, "batch").tolist() == [3.75] * 4
    assert train.estimated_offset(residual, prompts, "prompt").tolist() == [2.5, 2.0, 2.5, 8.0]


@pytest.fixture(scope="module")
def stored():
    reference, policy, world = small_world(prompts=data.TRAIN_PROMPTS)
    feedback = train.collect_feedback(train.Settings(judged=96), 0, reference, CPU)
    return reference, policy, world, feedback


def losses(stored, method, offset):
    reference, policy, world, feedback = stored
    settings = train.Settings(batch=96, offset=offset)
    torch.manual_seed(0)
    return next(train.offline_rounds(method, policy, reference, feedback, world, settings, 0.5, 0))[0].sort().values


def test_eq13_with_each_offset_is_the_loss_written_out_response_by_response(stored):
    reference, policy, world, feedback = stored
    rho = train.response_logprob(policy, feedback.tokens, feedback.mask) - train.response_logprob(reference, feedback.tokens, feedback.mask)
    reward = data.reward(feedback.tokens[:, :3], feedback.tokens[:, 3:])
    residual = reward - 0.5 * rho
    index = [data.TRAIN_PROMPTS.index(data.ENCODING.decode(row.tolist())) for row in feedback.tokens[:, :3]]
    beta_log_z = [0.5 * math.log((ref.exp() * (rewards / 0.5).exp()).sum()) for ref, rewards in zip(world.ref_logprobs, world.rewards)]
    offsets = {
        "zero": [0.0] * 96, "batch": [residual.mean().item()] * 96, "exact": [beta_log_z[i] for i in index],
        "prompt": [np.mean([residual[k].item() for k in range(96) if index[k] == i]) for i in index],
    }
    for offset, values in offsets.items():
        expected = (torch.sigmoid(0.5 * rho + torch.tensor(values, dtype=torch.float32)) - feedback.scores) ** 2
        assert torch.allclose(losses(stored, "una-score", offset), expected.sort().values, atol=1e-5), offset


def test_eq10_no_offset_is_seen_in_pairs_and_thumbs_see_it(stored):
    assert torch.allclose(losses(stored, "una-pair", "exact"), losses(stored, "una-pair", "zero"), atol=1e-6)
    assert not torch.allclose(losses(stored, "una-binary-bce", "exact"), losses(stored, "una-binary-bce", "zero"), atol=1e-2)


def test_estimated_offsets_carry_no_gradient(stored):
    # With gradient the mean residual would be fitted away: a shift of all logprobs would cost nothing.
    reference, policy, world, feedback = stored
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "estimated_offset", lambda residual, prompts, offset: seen.append(residual.requires_grad) or 0.0)
        policy.requires_grad_(True)
        next(train.offline_rounds("una-score", policy, reference, feedback, world, train.Settings(offset="batch"), 0.25, 0))
        policy.requires_grad_(False)
    assert seen == [False]


# ---------------------------------------------------------------- the optimiser's step
def test_a_long_gradient_is_cut_to_norm_1_and_a_short_one_is_left():
    for slope, expected in ((30.0, 1.0), (0.5, 0.5)):
        weight = torch.nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        train.descend(optimizer, slope / 2 * weight.sum(), 1.0, 1, 1)
        assert weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_before_it_touches_the_weights(value):
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(FloatingPointError, match="step 3"):
        train.descend(torch.optim.SGD([weight], lr=1.0), weight.sum() * value, 1.0, 3, 10)
    assert weight.item() == 1.0


# ---------------------------------------------------------------- a fair comparison
def test_every_method_has_a_grid_of_the_same_size_and_no_seed_both_tunes_and_reports():
    assert {len(rates) * len(multiples) for rates, multiples in train.GRIDS.values()} == {16}
    assert all(len(set(rates)) == len(set(multiples)) == 4 for rates, multiples in train.GRIDS.values())
    assert {method for method, offset in train.GRIDS if offset == "zero"} == set(train.METHODS) - {"dpo"}
    assert not set(train.TUNING_SEEDS) & set(train.REPORTED_SEEDS) and len(train.REPORTED_SEEDS) >= 5


FIGURES = dict(reward=1.0, kl=0.5, objective=0.875, optimum=1.0, regret=0.125, frontier_reward=1.1, residual_variance=0.1)


class Inline:
    """A pool of processes that is none."""
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    """settle_claims with runs that cost nothing: (run it, the runs made so far). Their regret is least at rate 3e-3 and beta 1."""
    made = []

    def measure(method, seed, settings, reference, feedback, worlds, reward_model, cell):
        rate, multiple = cell
        made.append((method, settings.offset, seed, cell, settings.reward, settings.steps, settings.judged))
        if rate > 1e-2:
            raise FloatingPointError("the loss of step 9 is inf")
        regret = 0.1 * abs(math.log(rate / 3e-3)) + 0.1 * abs(math.log(multiple)) + 0.001 * seed
        source = dict(reward_source=settings.reward) if method in train.ONLINE else {}
        curve = [dict(seconds=0.0, regret=1.0), dict(seconds=1.0, regret=regret)]
        return None, None, dict(method=method, seed=seed, seconds=1.0, train=FIGURES, heldout=FIGURES, curve=curve) | source

    world = SimpleNamespace(tilted=lambda b: (1 + 1 / b, 1 / b))
    landmarks = [dict(method=name, train=FIGURES, heldout=FIGURES) for name in ("reference", "optimum")]

    def prepare(settings, seed, device):
        return None, {"train": world}, [entry | dict(seed=seed) for entry in landmarks]
    for name, stand_in in dict(measure=measure, prepare=prepare, ProcessPoolExecutor=Inline, as_completed=list,
                               collect_feedback=lambda *_: None, train_reward_model=lambda *_: None,
                               peak_memory=lambda method, settings: 7).items():
        monkeypatch.setattr(train, name, stand_in)
    train.prepared.cache_clear()

    def run():
        train.settle_claims(train.Settings(device="cpu", out=str(tmp_path)))
        return json.loads((tmp_path / "claims.json").read_text())
    yield run, made
    train.prepared.cache_clear()


def test_claims_tune_on_the_tuning_seeds_and_report_the_best_cells_on_the_others(rehearsal):
    run, made = rehearsal
    found = run()
    tuned = [entry for entry in made if entry[2] in train.TUNING_SEEDS]
    assert len(tuned) == len(set(tuned)) == 16 * len(train.GRIDS) * len(train.TUNING_SEEDS)
    best = {(method, offset): min(((rate, multiple) for rate in rates for multiple in multiples if rate <= 1e-2),
                                  key=lambda cell: abs(math.log(cell[0] / 3e-3)) + abs(math.log(cell[1])))
            for (method, offset), (rates, multiples) in train.GRIDS.items()}
    best["dpo", "zero"] = best["una-pair", "zero"]
    stored = [method for method in train.METHODS if method not in train.ONLINE]
    expected = [(method, "zero", seed, "true", 400, 4096) for method in train.METHODS for seed in train.REPORTED_SEEDS]
    expected += [(method, "zero", seed, "model", 400, 4096) for method in ("una-online", "ppo") for seed in train.REPORTED_SEEDS]
    expected += [("una-online", "zero", seed, "true", 1000, 4096) for seed in train.REPORTED_SEEDS]
    expected += [(*variant, seed, "true", 400, 4096) for variant in train.GRIDS if variant[1] != "zero" for seed in train.REPORTED_SEEDS]
    expected += [(method, "zero", seed, "true", 400, size)
                 for method in stored if method != "dpo" for seed in train.REPORTED_SEEDS[:5] for size in (256, 1024, 16384)]
    reported = [entry for entry in made if entry[2] not in train.TUNING_SEEDS]
    assert sorted((*entry[:3], *entry[4:]) for entry in reported) == sorted(expected)
    assert all(entry[3] == best[entry[:2]] for entry in reported)
    assert all(cell["lost"] == [None, None] for cell in found["tuning"] if cell["learning_rate"] > 1e-2)   # diverged: never the best
    assert [len(found[key]) for key in ("runs", "longer", "offsets", "sizes")] == [96, 8, 32, 90]
    assert len(found["landmarks"]) == 16 and len(found["peak_memory"]) == len(train.METHODS) + 2


def test_claims_go_on_where_they_were_stopped(rehearsal, tmp_path):
    run, made = rehearsal
    first, count = run(), len(made)
    lost_part = min((tmp_path / "parts").iterdir())
    lost_part.unlink()
    assert run() == first and len(made) == count + 1 and lost_part.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.json", "frontier.png", "parts", "regret-over-time.png"]


def test_the_flag_settles_the_claims_in_assets_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = []
    monkeypatch.setattr(train, "settle_claims", told.append)
    train.main(["--claims"])
    train.main(["--claims", "--out", "elsewhere"])
    train.main(["--claims", "--quick"])                                     # a rehearsal does not write over results
    assert [settings.out for settings in told] == ["assets", "elsewhere", "out/toy"]


def test_a_diverged_cell_is_the_worst_and_a_diverged_reported_run_ends_in_one_line(tmp_path, monkeypatch):
    def measure(method, seed, *_):
        raise FloatingPointError("the loss of step 2 is nan")
    monkeypatch.setattr(train, "measure", measure)
    monkeypatch.setattr(train, "prepared", lambda seed, **_: (None, {}, [dict(seed=seed)]))
    monkeypatch.setattr(train, "collect_feedback", lambda *_: None)
    job = dict(method="kto", seed=3, cell=(1e-3, 1.0), settings=vars(train.Settings(device="cpu")))
    run, landmarks = train.run_job(job, str(tmp_path))
    assert run["diverged"] == "the loss of step 2 is nan" and train.lost(run) == math.inf and landmarks == [dict(seed=3)]
    monkeypatch.setattr(train, "reward_panel", lambda *_: None)
    monkeypatch.setattr(train, "prepare", lambda *_: (None, {"train": SimpleNamespace(ref_logprobs=None)}, []))
    with pytest.raises(SystemExit) as stop:
        train.main(["--methods", "kto", "--seed", "7", "--out", str(tmp_path / "out")])
    assert stop.value.code == "train.py: kto diverged on seed 7: the loss of step 2 is nan"


# ---------------------------------------------------------------- what is said of it
def test_interval_is_students():
    # A textbook's: differences 1..10 have mean 5.5, deviation 3.0277, and 95% interval 5.5 +- 2.262 * 3.0277 / sqrt(10).
    assert claims.interval(np.arange(1.0, 11.0)) == pytest.approx((5.5, 3.3341, 7.6659), abs=1e-3)


def test_verdicts_follow_from_the_interval_alone():
    def runs(*regrets):
        return [dict(curve=[dict(regret=1.0), dict(regret=regret)]) for regret in regrets]
    low, high, wide = runs(0.1, 0.1, 0.12, 0.1, 0.11), runs(0.2, 0.22, 0.2, 0.2, 0.21), runs(0.0, 0.5, 0.0, 0.3, 0.0)
    assert claims.less("", "", low, high)[-1] == "replicates"
    assert claims.less("", "", high, low)[-1] == "does not: the reverse"
    assert claims.less("", "", low, wide)[-1] == claims.less("", "", wide, low)[-1] == "does not: no difference shown"
    assert claims.less("", "", low, high)[2] == "10.6 ± 0.89 % against 20.6 ± 0.89 %"
    assert claims.sooner("", "", [1.0, 1.1], [2.0, 2.2])[2:] == ["1.05 s against 2.1 s", "× 2 [2, 2]", "replicates"]
    assert claims.sooner("", "", [1.0, 1.1, 1.0], [math.inf, 2.2, 2.0])[2].endswith("3 and 2 of 3 seeds arrive")
    assert claims.sooner("", "", [2.0, 2.2], [1.0, 1.1])[-1] == "does not: the reverse"


def test_the_readmes_numbers_are_those_of_claims_json():
    readme = (ROOT / "README.md").read_text()
    assert claims.written_into(readme, RESULTS) == readme
    altered = json.loads(json.dumps(RESULTS))
    for run in altered["runs"]:
        run["curve"][-1]["regret"] += 0.1 * (1 + run["seed"] % 3)
    assert claims.written_into(readme, altered) != readme


def test_claims_json_is_of_the_defaults_and_complete():
    for name, value in RESULTS["settings"].items():
        if name not in ("out", "claims", "device"):
            assert value == getattr(train.Settings(), name), name
    for method in train.METHODS:
        for source in ("true", "model") if method in ("una-online", "ppo") else ("true",) if method in train.ONLINE else (None,):
            seeds = [run["seed"] for run in RESULTS["runs"] if (run["method"], run.get("reward_source")) == (method, source)]
            assert seeds == list(train.REPORTED_SEEDS), (method, source)
    for (method, offset), (rates, multiples) in train.GRIDS.items():
        cells = claims.cells(RESULTS, method, offset)
        assert [(cell["learning_rate"], cell["multiple"]) for cell in cells] == list(itertools.product(rates, multiples))
        assert all(len(cell["lost"]) == len(train.TUNING_SEEDS) for cell in cells) and sum(cell["best"] for cell in cells) == 1


def test_the_methods_own_settings_are_the_best_cells_of_their_grids():
    for method, own in train.METHODS.items():
        (best,) = [cell for cell in claims.cells(RESULTS, "una-pair" if method == "dpo" else method) if cell["best"]]
        assert own == (best["learning_rate"], best["multiple"]), method


def test_una_pair_and_dpo_agree_in_every_figure_of_every_seed():
    pair, dpo = ([(run["seed"], run["train"], run["heldout"]) for run in RESULTS["runs"] if run["method"] == method]
                 for method in ("una-pair", "dpo"))
    assert pair == dpo and len(dpo) == len(train.REPORTED_SEEDS)


def test_una_online_ends_within_a_hundredth_of_the_possible_gain():
    assert max(train.lost(run) for run in RESULTS["runs"] if (run["method"], run.get("reward_source")) == ("una-online", "true")) < 0.01


def test_differences_alone_let_probability_leave_for_strings_that_no_one_judged():
    # What the README says of pairs where feedback is short, and of offsets estimated from stored responses.
    short = [run for run in RESULTS["sizes"] if run["method"] == "una-pair" and run["judged"] <= 1024]
    estimated = [run for run in RESULTS["offsets"] if run["offset"] in ("batch", "prompt")]
    for runs in (short, estimated):
        ends = [run["curve"][-1] for run in runs]
        assert len(runs) >= 10 and all(end["chosen_reward"] < 0 and end["rejected_reward"] < end["chosen_reward"] for end in ends)
        assert np.median([run["train"]["kl"] for run in runs]) > 3 and np.median([run["train"]["reward"] for run in runs]) < 0.53   # pi_ref has 0.53


def test_what_the_readme_makes_of_the_results_is_in_them():
    runs = claims.runs_of(RESULTS)
    zero, exact = (claims.lost(runs["una-score", kind]).mean() for kind in (None, "exact"))
    assert 3.5 < zero / exact < 4.5
    thumbs = [np.mean(cell["lost"]) for cell in claims.cells(RESULTS, "una-binary-bce", "exact")]
    assert 100 * min(thumbs) > claims.lost(runs["una-binary-bce", None]).mean()
    broken = [method for method in ("una-online", "ppo") for share in claims.lost(runs[method, "model"]) if share > 100]
    assert broken == ["una-online"]
    accuracy = [run["reward_model"]["accuracy"] for run in runs["una-online", "model"]]
    assert 0.77 < np.mean(accuracy) < 0.85


def test_every_verdict_of_the_readme_is_one_of_the_words_that_it_explains():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- claims -->\n(.*?)\n<!-- end -->", readme, re.S)[1]
    for line in block.splitlines()[2:]:
        assert re.match(r"replicates|does not|it can|–", line.strip("|").split("|")[-1].strip()), line
