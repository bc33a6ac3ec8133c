import itertools
import math
import time

import pytest
import torch

import data
import train
import una
from lab import exact
from lab.exact import all_logprobs, all_responses
from model import sample
from models import abc, close, gpt, random_tokens, toy_gpt
from short_train import moved, small
from una import sequence_logprob


# ---------------------------------------------------------------- all responses and probabilities
@pytest.mark.parametrize("vocab_size, max_tokens, eot",
                         [(3, 3, 2), (3, 3, 0), (4, 3, 1), (5, 2, 2), (2, 4, 1), (4, 1, 3)])
def test_all_responses_are_the_strings_cut_behind_their_first_end(vocab_size, max_tokens, eot):
    tokens, mask = all_responses(vocab_size, max_tokens, eot)
    expected = set()
    for string in itertools.product(range(vocab_size), repeat=max_tokens):
        length = string.index(eot) + 1 if eot in string else max_tokens
        rest = max_tokens - length
        expected.add((string[:length] + (eot,) * rest, (True,) * length + (False,) * rest))
    rows = [(tuple(t), tuple(m)) for t, m in zip(tokens.tolist(), mask.tolist(), strict=True)]
    assert set(rows) == expected
    assert len(rows) == len(expected) == sum((vocab_size - 1) ** n for n in range(max_tokens + 1))
    words = (tokens != eot).sum(1)
    assert (words.diff() >= 0).all()                             # shortest first
    assert mask[words == max_tokens].all()
    assert tokens.dtype == torch.long and mask.dtype == torch.bool


def test_the_toy_has_406901_responses_each_once():
    tokens, mask = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    assert tokens.shape == mask.shape == (406_901, 4)
    assert 1 + 25 + 25 ** 2 + 25 ** 3 + 25 ** 4 == 406_901
    keys = (tokens * 26 ** torch.arange(4)).sum(1)
    assert len(keys.unique()) == 406_901


def test_enumerated_probabilities_sum_to_one():
    model, prompt = toy_gpt(), data.encode_prompts(data.PROMPTS)[5]
    logprobs = all_logprobs(model, prompt, data.MAX_TOKENS, data.EOT)
    probs = logprobs.double().exp()
    first_token = model(prompt[None])[0, -1].softmax(-1)
    entropy = -(first_token * first_token.log()).sum()
    assert entropy < 0.8 * math.log(26) and logprobs.max() - logprobs.min() > 10    # not uniform
    assert logprobs.dtype == torch.float32 and logprobs.shape == (406_901,)
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)
    ended = 1 + 25 + 25 ** 2 + 25 ** 3                           # the rest are cut off
    assert probs[:ended].sum().item() < 0.99


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
@pytest.mark.parametrize("eot", [0, 1, 2])
def test_enumerated_probabilities_sum_to_one_in_float64(eot, max_tokens):
    logprobs = all_logprobs(abc(), torch.tensor([0, 2, 1]), max_tokens, eot)
    assert len(logprobs) == 2 ** (max_tokens + 1) - 1 and logprobs.dtype == torch.float64
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("eot", [0, 2, 4])
@pytest.mark.parametrize("prompt", [[1], [3, 0, 2, 2]])
def test_all_logprobs_agree_with_one_forward_pass_per_response(prompt, eot):
    model, prompt = gpt(), torch.tensor(prompt)
    responses, mask = all_responses(5, 3, eot)

    def one_by_one(mask, shift=0):
        logprobs = []
        for response, row in zip(responses, mask, strict=True):
            tokens = torch.cat([prompt, response])[None]
            row = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), row])[None]
            logprobs.append(sequence_logprob(model(tokens).roll(shift, 1), tokens, row))
        return torch.cat(logprobs).detach()

    logprobs = all_logprobs(model, prompt, 3, eot)
    assert close(logprobs, one_by_one(mask)) and not logprobs.requires_grad
    assert not close(logprobs.flip(0), one_by_one(mask), 1e-3)
    assert not close(logprobs, one_by_one(mask, shift=1), 1e-3)
    assert not close(logprobs, one_by_one(torch.ones_like(mask)), 1e-3)    # padding counted
    without_end = mask & ((responses != eot) | (mask.cumsum(1) == 1))
    assert not close(logprobs, one_by_one(without_end), 1e-3)


def test_exact_evaluation_of_a_policy_on_all_prompts_takes_seconds():
    model, prompts = toy_gpt(), data.encode_prompts(data.PROMPTS)
    start = time.process_time()
    for prompt in prompts:
        all_logprobs(model, prompt, data.MAX_TOKENS, data.EOT)
    assert time.process_time() - start < 10


# ---------------------------------------------------------------- precision and device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_enumerated_probabilities_of_a_half_precision_model_are_float32_and_sum_to_one(dtype):
    model, prompt = gpt(noise=0.2).to(dtype), random_tokens(2, 5)[0, :2]
    logprobs = all_logprobs(model, prompt, 3, 2)
    assert logprobs.dtype == torch.float32
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert close(logprobs.double(), all_logprobs(gpt(noise=0.2), prompt, 3, 2), 0.05)


def test_bfloat16_probabilities_of_all_the_toys_responses_sum_to_one():
    model, prompt = toy_gpt().to(torch.bfloat16), data.encode_prompts(data.PROMPTS)[3]
    logprobs = all_logprobs(model, prompt, data.MAX_TOKENS, data.EOT)
    assert logprobs.dtype == torch.float32
    assert logprobs.double().exp().sum().item() == pytest.approx(1, abs=1e-3)
    # A softmax in bfloat16 rounds away more than that, at the first token already.
    rounded = model(prompt[None])[0, -1].log_softmax(-1)
    assert abs(rounded.double().exp().sum().item() - 1) > 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_enumerated_probabilities_have_the_models_precision_where_it_is_float32_or_wider(dtype):
    logprobs = all_logprobs(gpt(noise=0.2).to(dtype), random_tokens(2), 3, 2)
    assert logprobs.dtype == dtype
    assert logprobs.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_all_logprobs_are_computed_where_the_model_is():
    # A device without numbers: a tensor that was made on another one would not mix with it.
    model, prompt = gpt(dtype=torch.float32).to("meta"), random_tokens(3).to("meta")
    assert all_logprobs(model, prompt, 3, 2).device == prompt.device


# ---------------------------------------------------------------- what a policy reaches
def policy_in(world):
    """log pi(y|x) (P, Y) of a policy some way from the reference."""
    return exact.policy_logprobs(moved(small().reference), world.prompts)


def test_regret_is_beta_times_kl_to_the_optimum():
    # J* - J(pi) = beta KL(pi || pi*): put r = beta log pi*/pi_ref + beta log Z into Eq. 3.
    world = small().worlds["train"]
    logprobs = policy_in(world)
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
    kl = (logprobs.exp() * (logprobs - best)).sum(1).mean().item()
    assert exact.evaluate(world, logprobs)["regret"] == pytest.approx(world.beta * kl, rel=1e-5)


def test_figures_are_those_of_eq03_over_all_responses():
    world = small().worlds["train"]
    logprobs = policy_in(world)
    figures = exact.evaluate_in_full(world, logprobs)
    objective = una.rlhf_objective(logprobs, world.ref_logprobs, world.rewards, world.beta)
    reward = una.rlhf_objective(logprobs, world.ref_logprobs, world.rewards, 0.0)
    assert figures["objective"] == pytest.approx(objective.mean().item(), abs=1e-12)
    assert figures["reward"] == pytest.approx(reward.mean().item(), abs=1e-12)
    assert figures["kl"] == pytest.approx((reward - objective).mean().item() / world.beta)
    assert figures["optimum"] == world.optimum.mean().item()
    assert figures["regret"] == figures["optimum"] - figures["objective"] > 0
    assert exact.evaluate(world, logprobs).items() <= figures.items()


def test_the_optimum_has_no_regret_and_lies_on_the_frontier():
    world = small().worlds["train"]
    logprobs, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
    best = exact.evaluate_in_full(world, logprobs)
    assert best["regret"] == pytest.approx(0, abs=1e-9)
    assert best["objective"] == pytest.approx(world.optimum.mean().item(), abs=1e-9)
    assert best["frontier_reward"] == pytest.approx(best["reward"], abs=1e-6)


def test_the_frontier_is_the_dual_bound_and_no_policy_is_above_it():
    # Lagrange: R*(k) = min_b [ b k + E_x b log Z_b(x) ], over a grid of b here, not by bisection.
    world = small().worlds["train"]
    start = exact.evaluate(world, world.ref_logprobs)["reward"]
    assert exact.frontier_reward(world, 0.0) == pytest.approx(start, abs=1e-3)
    for logprobs in (policy_in(world),
                     una.optimal_policy(world.ref_logprobs, world.rewards, 0.1)[0]):
        figures = exact.evaluate_in_full(world, logprobs)
        bound = min(b * figures["kl"]
                    + una.optimal_policy(world.ref_logprobs, world.rewards, b)[1].mean().item()
                    for b in torch.logspace(-2, 2, 160, dtype=torch.float64).tolist())
        assert figures["frontier_reward"] == pytest.approx(bound, abs=2e-3)
        assert figures["reward"] <= figures["frontier_reward"] + 1e-9


def test_points_of_the_frontier_from_the_levels_are_those_from_all_responses():
    world = small().worlds["train"]
    for b in (0.05, 0.25, 10.0):
        logprobs, _ = una.optimal_policy(world.ref_logprobs, world.rewards, b)
        figures = exact.evaluate(world, logprobs)
        assert exact.tilted(world, b) == pytest.approx((figures["kl"], figures["reward"]))
    curve = exact.frontier_curve(world, 2.0)
    assert curve == sorted(curve) and 1.8 < curve[-1][0] <= 2.0 and len(curve) > 50


def test_exact_figures_agree_with_sampling():
    reference, world = small().reference, small().worlds["train"]
    policy = moved(reference)
    figures = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
    x = world.prompts.repeat_interleave(20_000, 0)
    y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    both = data.join(x, y, y_mask)
    with torch.no_grad():
        rho = train.model_logprob(policy, *both) - train.model_logprob(reference, *both)
    assert data.reward(x, y).mean().item() == pytest.approx(figures["reward"], abs=0.03)
    assert rho.mean().item() == pytest.approx(figures["kl"], abs=0.03)


def test_kl_divergence_is_the_sum_of_p_log_p_over_q():
    logprobs, ref_logprobs = (torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
                              .double().log_softmax(-1) for seed in (0, 1))
    expected = [sum(math.exp(p) * (p - q) for p, q in zip(*rows))
                for rows in zip(logprobs.tolist(), ref_logprobs.tolist())]
    assert exact.kl_divergence(logprobs, ref_logprobs).tolist() == pytest.approx(expected)
    assert exact.kl_divergence(logprobs, logprobs).tolist() == [0, 0, 0]
    assert exact.mean(logprobs, ref_logprobs).tolist() == pytest.approx(
        [sum(math.exp(p) * q for p, q in zip(*rows))
         for rows in zip(logprobs.tolist(), ref_logprobs.tolist())])


def test_a_response_of_probability_0_adds_nothing_to_the_kl():
    p, q = torch.tensor([0.0, 0.25, 0.75]).double().log(), torch.tensor([0.5, 0.5, 0.0]).double()
    assert exact.kl_divergence(p[:2], p[:2]).item() == 0         # and not 0 * (-inf + inf)
    expected = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.75 / 0.6)
    far = torch.tensor([0.0, 0.4, 0.6]).double().log()
    assert exact.kl_divergence(p, far).item() == pytest.approx(expected)
    assert exact.kl_divergence(p, q.log()).item() == math.inf    # what pi_ref never gives


# ---------------------------------------------------------------- a level for each noun
@pytest.fixture(scope="module")
def raised():
    """small's training world at level 1: of the prompts of the nouns wind and fire."""
    return exact.World(small().reference, data.TRAIN_PROMPTS[:2], 0.25, 1.0)


LEVEL = torch.tensor([[-1 / 3], [1 / 3]]).double()               # f(x) there


def test_a_level_is_added_to_every_reward_of_a_prompt(raised):
    world = small().worlds["train"]
    assert close(raised.rewards - world.rewards, LEVEL.expand(2, 406_901), 1e-6)
    ungrammatical = world.rewards == -3
    assert ungrammatical.sum() > 800_000
    assert close(raised.rewards[ungrammatical], (LEVEL - 3).expand(2, 406_901)[ungrammatical], 1e-6)


def test_eq16_neither_the_optimum_nor_any_regret_knows_the_level(raised):
    # Only J and J* do: they are higher by f(x).
    world = small().worlds["train"]
    best, value = una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)
    raised_best, raised_value = una.optimal_policy(raised.ref_logprobs, raised.rewards, 0.25)
    assert close(raised_best, best, 1e-9) and close(raised.optimum, raised_value)
    assert close(raised_value - value, LEVEL[:, 0], 1e-6)
    for logprobs in (world.ref_logprobs, policy_in(world), best):
        before, after = (exact.evaluate_in_full(w, logprobs) for w in (world, raised))
        for name in ("kl", "regret", "residual_variance"):
            assert after[name] == pytest.approx(before[name], abs=1e-9), name
        J, raised_J = (una.rlhf_objective(logprobs, w.ref_logprobs, w.rewards, 0.25)
                       for w in (world, raised))
        assert close(raised_J - J, LEVEL[:, 0], 1e-6)


# ---------------------------------------------------------------- precision where beta is large
def variance(logprobs, values):
    """Of values under a distribution, mean over the prompts."""
    mean = (logprobs.exp() * values).sum(1, keepdim=True)
    return (logprobs.exp() * (values - mean) ** 2).sum(1).mean().item()


@pytest.mark.parametrize("beta", [1e3, 1e6])
def test_at_large_beta_the_possible_gain_is_half_the_rewards_variance_over_beta(beta):
    # log E e^{r/b} = E r / b + Var r / 2 b^2 + ..., so J* - J(pi_ref) = Var r / 2 b + O(1 / b^2).
    # What a sum of probabilities misses of 1 is multiplied by b: so much as float32 rounds away
    # would be more than the gain.
    reference = small().reference
    world = exact.World(reference, data.TRAIN_PROMPTS[:1], beta)
    expected = variance(world.ref_logprobs, world.rewards) / (2 * beta)
    near = 1e-2 if beta < 1e6 else 0.1       # there float64's sixteen digits are as good as used up
    assert exact.evaluate(world, world.ref_logprobs)["regret"] == pytest.approx(expected, rel=near)
    raw = all_logprobs(reference, world.prompts[0], data.MAX_TOKENS, data.EOT).double()[None]
    as_computed = una.optimal_policy(raw, world.rewards, beta)[1] - exact.mean(raw, world.rewards)
    assert as_computed.item() != pytest.approx(expected, rel=near)


@pytest.mark.parametrize("beta", [1e-4, 1e6])
def test_figures_are_finite_and_regret_is_never_below_0_at_both_ends_of_beta(beta):
    reference = small().reference
    world = exact.World(reference, data.TRAIN_PROMPTS[:1], beta)
    for model in (reference, moved(reference)):
        figures = exact.evaluate_in_full(world, exact.policy_logprobs(model, world.prompts))
        assert all(map(math.isfinite, figures.values()))
        assert figures["regret"] >= 0
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, beta)
    possible = exact.evaluate(world, world.ref_logprobs)["regret"]
    rounding = 2e-15 * max(1.0, beta)                            # float64's, times beta
    assert abs(exact.evaluate(world, best)["regret"]) < rounding < possible / 10


def test_policy_logprobs_sum_to_1_more_closely_than_a_float32_model_does():
    prompts = data.encode_prompts(data.TRAIN_PROMPTS[:2])
    model = toy_gpt()
    logprobs = exact.policy_logprobs(model, prompts)
    raw = torch.stack([all_logprobs(model, prompt, data.MAX_TOKENS, data.EOT).double()
                       for prompt in prompts])
    assert logprobs.dtype == torch.float64 and close(logprobs, raw, 1e-5)
    assert (logprobs.exp().sum(1) - 1).abs().max() < 1e-12 < (raw.exp().sum(1) - 1).abs().max()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_has_left_the_numbers_has_no_logprobs(value):
    model = moved(small().reference).requires_grad_(False)
    model.wte.weight[3] = value
    with pytest.raises(FloatingPointError, match="not numbers"):
        exact.policy_logprobs(model, data.encode_prompts(data.TRAIN_PROMPTS[:1]))


# ---------------------------------------------------------------- residuals, dots, the observer
def test_eq18_residual_variance_is_that_of_the_reward_at_the_reference_and_0_at_the_optimum():
    world = small().worlds["train"]
    assert exact.residual_variance(world, world.ref_logprobs) == pytest.approx(
        variance(world.ref_logprobs, world.rewards))
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)
    assert exact.residual_variance(world, best) == pytest.approx(0, abs=1e-12)
    logprobs = policy_in(world)                                  # and over samples of any policy
    index = torch.multinomial(logprobs.exp(), 200_000, replacement=True,
                              generator=torch.Generator().manual_seed(0))
    residual = (world.rewards - 0.25 * (logprobs - world.ref_logprobs)).gather(1, index)
    assert exact.residual_variance(world, logprobs) == pytest.approx(
        residual.var(1).mean().item(), rel=0.05)


def test_eq18_dots_lie_on_the_diagonal_at_the_optimum_alone():
    world = small().worlds["train"]
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
    explicit, implicit = exact.reward_dots(world, best)
    assert explicit == pytest.approx(implicit, abs=2e-3)
    assert len(explicit) == (world.ref_logprobs.exp() > 0.001).sum() > 0
    explicit, implicit = exact.reward_dots(world, world.ref_logprobs)
    assert set(implicit) <= {round(value, 3) for value in world.optimum.tolist()}
    assert explicit != pytest.approx(implicit, abs=0.1)


def test_reference_and_optimum_are_pi_ref_and_pi_star_in_every_world():
    worlds = small().worlds
    start, best = exact.reference_and_optimum(worlds)
    for name, world in worlds.items():
        optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
        assert start[name] == exact.evaluate_in_full(world, world.ref_logprobs)
        assert best[name] == exact.evaluate_in_full(world, optimum)
        assert start[name]["kl"] == 0 < start[name]["regret"] and best[name]["kl"] > 0
    assert best["frontier"][-1][0] <= 1.5 * best["train"]["kl"] < 1.1 * best["frontier"][-1][0]


def test_the_observer_begins_at_the_reference_and_ends_with_all_figures(monkeypatch):
    worlds, reference, looks, listing = small().worlds, small().reference, [], exact.all_logprobs

    def counted(*arguments):
        looks.append(arguments[1].tolist())
        return listing(*arguments)
    monkeypatch.setattr(exact, "all_logprobs", counted)
    observe = exact.Observer(worlds, small().start, 4)
    observe(2, 0.5, 0.1, reference)
    policy = moved(reference)
    observe(4, 0.7, 0.2, policy)
    prompts = [worlds[name].prompts.tolist() for name in ("train", "train", "heldout")]
    assert looks == [prompt for part in prompts for prompt in part]   # held-out ones once
    report = observe.report()
    first, middle, last = report["curve"]
    figures = {name: exact.evaluate_in_full(world, exact.policy_logprobs(policy, world.prompts))
               for name, world in worlds.items()}
    assert first == dict(step=0, seconds=0.0, objective=small().start["objective"],
                         regret=small().start["regret"])
    assert middle == first | dict(step=2, seconds=0.5, loss=0.1)
    assert last == dict(step=4, seconds=0.7, loss=0.2, objective=figures["train"]["objective"],
                        regret=figures["train"]["regret"])
    assert (report["train"], report["heldout"]) == (figures["train"], figures["heldout"])
    assert report["evaluation_seconds"] > 0
    assert report["dots"] == exact.reward_dots(worlds["train"], policy_in(worlds["train"]))


# ---------------------------------------------------------------- a reward model
def test_the_reward_models_report_is_right_for_a_perfect_a_reversed_and_an_indifferent_model():
    reference, policy, world = small().reference, moved(small().reference), small().worlds["train"]
    generator = torch.Generator().manual_seed(0)
    samples = [train.fresh_samples(model, world.prompts, 2048, generator)
               for model in (reference, policy)]
    judge = torch.stack([train.judge_reward(*both) for both in samples])
    gain = (exact.evaluate(world, policy_in(world))["reward"]
            - exact.evaluate(world, world.ref_logprobs)["reward"])
    for factor, accuracy in ((2.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        # The 9 is one of the many f(x) that Eq. 2 cannot see.
        report = exact.reward_model_report(factor * judge + 9, judge)
        assert report["accuracy"] == accuracy
        assert report["judge_gain"] == pytest.approx(gain, abs=0.05)
        assert report["model_gain"] == pytest.approx(factor * report["judge_gain"], abs=1e-5)


def test_accuracy_counts_the_references_pairs_that_the_judge_tells_apart():
    judge = torch.tensor([[0.0, 1.0, 1.0, 0.0, 2.0, 2.0, 1.0, 0.0], [5.0] * 8])
    model = torch.tensor([[0.0, 0.1, 0.3, 0.2, 7.0, 1.0, 0.0, 0.9], [1.0] * 8])
    report = exact.reward_model_report(model, judge)
    assert report["accuracy"] == pytest.approx(2 / 3)            # right, right, a tie, wrong
    assert report["judge_gain"] == pytest.approx(5 - 7 / 8)
    assert report["model_gain"] == pytest.approx(1 - 9.5 / 8)
