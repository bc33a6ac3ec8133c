"""lab/exact.py: every response, and what a policy reaches, against brute force and Eq. 3."""
import itertools
import math

import pytest
import torch

import data
import train
import una
from helpers import abc, close, gpt, moved, near, random_tokens, toy_gpt
from lab import exact
from lab.exact import all_logprobs, all_responses
from model import ScalarGPT, sample
from toy import small

PROMPTS = data.TRAIN_PROMPTS[:2]                                 # of the nouns wind and fire


@pytest.fixture(scope="session")
def world():
    """All 406,901 responses to two prompts, of a reference that has learned a little."""
    settings = train.parse("--reference-steps 20 --n-layer 1 --n-head 2 --n-embd 32 --device cpu"
                           .split())
    world = exact.World(train.train_reference(settings, 0), PROMPTS, 0.25)
    world.best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)
    world.policy = 0.6 * world.ref_logprobs + 0.4 * world.best   # some way to the optimum, and not
    world.policy += 0.3 * torch.sin(torch.arange(406_901.0))     # straight
    world.policy = world.policy.log_softmax(1)
    return world


# ---------------------------------------------------------------- all responses and probabilities
def test_all_responses_are_the_strings_cut_behind_their_first_end():
    for vocab_size, max_tokens, eot in ((3, 3, 2), (3, 3, 0), (4, 3, 1), (2, 4, 1), (4, 1, 3)):
        tokens, mask = all_responses(vocab_size, max_tokens, eot)
        expected = set()
        for string in itertools.product(range(vocab_size), repeat=max_tokens):
            length = string.index(eot) + 1 if eot in string else max_tokens
            rest = max_tokens - length
            expected.add((string[:length] + (eot,) * rest, (True,) * length + (False,) * rest))
        rows = [(tuple(t), tuple(m)) for t, m in zip(tokens.tolist(), mask.tolist(), strict=True)]
        assert {*rows} == expected
        assert len(rows) == sum((vocab_size - 1) ** n for n in range(max_tokens + 1))
        assert ((tokens != eot).sum(1).diff() >= 0).all()        # shortest first
        assert tokens.dtype == torch.long and mask.dtype == torch.bool


def test_the_toy_has_406901_responses_each_once_whose_probabilities_add_up_to_one(world):
    tokens, mask = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    assert tokens.shape == mask.shape == (406_901, 4)
    assert len((tokens * 26 ** torch.arange(4)).sum(1).unique()) == 406_901
    for prompt, rewards in zip(PROMPTS, world.rewards):
        x = data.encode_prompts([prompt]).expand(406_901, -1)
        assert torch.equal(rewards, data.reward(x, tokens).double()) and rewards.max() > 1
    raw = all_logprobs(toy_gpt(), world.prompts[0], data.MAX_TOKENS, data.EOT)
    ended = raw[:1 + 25 + 25 ** 2 + 25 ** 3].double().exp().sum().item()
    assert raw.dtype == torch.float32 and raw.max() - raw.min() > 10                 # not uniform
    # Without those that are cut off, far less. As a float32 model has them, nearly.
    assert ended < 0.99 and raw.double().exp().sum().item() == pytest.approx(1, abs=1e-4)
    normalised = exact.policy_logprobs(toy_gpt(), world.prompts[:1])
    assert normalised.dtype == torch.float64 and close(normalised[0], raw.double(), 1e-5)
    assert (normalised.exp().sum() - 1).abs() < 1e-12 < (raw.double().exp().sum() - 1).abs()


def test_enumerated_probabilities_add_up_to_one_in_every_precision_and_on_the_models_device():
    for eot, max_tokens in itertools.product((0, 1, 2), (1, 2, 3)):
        logprobs = all_logprobs(abc(), torch.tensor([0, 2, 1]), max_tokens, eot)
        assert len(logprobs) == 2 ** (max_tokens + 1) - 1 and logprobs.dtype == torch.float64
        assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-10)
    expected = all_logprobs(gpt(noise=0.2), random_tokens(3), 3, 2)
    for dtype, off in ((torch.bfloat16, 0.1), (torch.float16, 0.05), (torch.float32, 1e-5)):
        logprobs = all_logprobs(gpt(noise=0.2).to(dtype), random_tokens(3), 3, 2)
        assert logprobs.dtype == torch.float32 and near(logprobs.double(), expected, off)
        assert logprobs.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    # A softmax in bfloat16 rounds away more than that, at the first token already.
    rounded = gpt(noise=0.2).bfloat16()(random_tokens(1, 3))[0, -1].log_softmax(-1)
    assert abs(rounded.double().exp().sum().item() - 1) > 1e-4
    # A device without numbers: a tensor that was made on another one would not mix with it.
    model = gpt(dtype=torch.float32).to("meta")
    for listed, of in ((all_logprobs, model), (exact.all_rewards, ScalarGPT(abc()).to("meta"))):
        assert listed(of, random_tokens(3, vocab_size=3).to("meta"), 3, 2).device.type == "meta"


def test_all_logprobs_and_all_rewards_are_those_of_whole_responses_without_a_cache():
    model, scalar = gpt(), moved(ScalarGPT(gpt()).double())
    for prompt, eot in (([1], 0), ([1], 4), ([3, 0, 2, 2], 2)):
        prompt, (responses, mask) = torch.tensor(prompt), all_responses(5, 3, eot)
        tokens = torch.cat([prompt.expand(len(responses), -1), responses], 1)

        def whole(mask, shift=0):                                # a whole response at a time
            row = torch.cat([torch.zeros(len(mask), len(prompt), dtype=torch.bool), mask], 1)
            return una.sequence_logprob(model(tokens).roll(shift, 1), tokens, row).detach()
        logprobs = all_logprobs(model, prompt, 3, eot)
        assert close(logprobs, whole(mask)) and not logprobs.requires_grad
        without_end = mask & ((responses != eot) | (mask.cumsum(1) == 1))
        for wrong in (whole(mask).flip(0), whole(mask, shift=1), whole(without_end),
                      whole(torch.ones_like(mask))):             # this one counts the padding
            assert not close(logprobs, wrong, 1e-3)
        last = len(prompt) + mask.sum(1) - 1
        rewards = scalar(tokens)[torch.arange(len(tokens)), last].detach()
        assert close(exact.all_rewards(scalar, prompt, 3, eot), rewards)
        assert len(rewards.unique()) == len(rewards)


def test_a_model_that_has_left_the_numbers_has_no_logprobs(language):
    for value in (math.nan, math.inf):
        model = moved(small().reference).requires_grad_(False)
        model.wte.weight[3] = value
        with pytest.raises(FloatingPointError, match="not numbers"):
            exact.policy_logprobs(model, small().worlds["train"].prompts)


# ---------------------------------------------------------------- what a policy reaches
def test_figures_are_those_of_eq03_over_all_responses(world):
    figures = exact.evaluate(world, world.policy)
    J, reward = (una.rlhf_objective(world.policy, world.ref_logprobs, world.rewards, beta)
                 for beta in (0.25, 0.0))
    start = una.rlhf_objective(world.ref_logprobs, world.ref_logprobs, world.rewards, 0.25)
    assert figures["objective"] == pytest.approx(J.mean().item(), abs=1e-12)
    assert figures["reward"] == pytest.approx(reward.mean().item(), abs=1e-12)
    assert figures["kl"] == pytest.approx((reward - J).mean().item() / 0.25)
    assert figures["optimum"] == world.optimum.mean().item()
    assert figures["regret"] == figures["optimum"] - figures["objective"] > 0
    gain = (world.optimum - start).mean().item()
    assert figures["lost"] == pytest.approx(figures["regret"] / gain)
    assert exact.evaluate(world, world.ref_logprobs)["lost"] == pytest.approx(1)


def test_the_optimum_beats_all_and_regret_is_beta_times_the_kl_to_it(world):
    # J* - J(pi) = beta KL(pi || pi*): put r = beta log pi*/pi_ref + beta log Z into Eq. 3.
    for logprobs in (world.policy, world.ref_logprobs, world.policy.flip(0), world.best):
        kl = exact.kl_divergence(logprobs, world.best).mean().item()
        regret = exact.evaluate(world, logprobs)["regret"]
        assert regret == pytest.approx(0.25 * kl, rel=1e-9, abs=1e-9)
        assert kl > 0.1 or logprobs is world.best
    figures = exact.evaluate(world, world.best)
    assert figures["lost"] == pytest.approx(0, abs=1e-9)
    assert figures["frontier_reward"] == pytest.approx(figures["reward"], abs=1e-6)


def test_the_frontier_is_the_dual_bound_and_no_policy_is_above_it(world):
    # Lagrange: R*(k) = min_b [ b k + E_x b log Z_b(x) ], over a grid of b here, not by bisection.
    start = exact.expect(world.ref_logprobs, world.rewards).mean().item()
    assert exact.frontier_reward(world, 0.0) == pytest.approx(start, abs=1e-3)
    grid = torch.logspace(-1, 1, 60, dtype=torch.float64).tolist()
    values = [una.optimal_policy(world.value_logprobs, world.values, b)[1].mean().item()
              for b in grid]
    assert una.optimal_policy(world.ref_logprobs, world.rewards, grid[0])[1].mean().item() == (
        pytest.approx(values[0]))                                # all of one reward in one
    for logprobs in (world.policy, world.best):
        figures = exact.evaluate(world, logprobs)
        bound = min(b * figures["kl"] + value for b, value in zip(grid, values))
        assert figures["frontier_reward"] == pytest.approx(bound, abs=2e-3)
        assert figures["reward"] <= figures["frontier_reward"] + 1e-9
    assert exact.evaluate(world, world.policy)["reward"] < figures["frontier_reward"] - 0.01
    for b in (0.05, 0.25, 10.0):
        tilted, _ = una.optimal_policy(world.ref_logprobs, world.rewards, b)
        kl = exact.kl_divergence(tilted, world.ref_logprobs).mean().item()
        reward = exact.expect(tilted, world.rewards).mean().item()
        assert exact.tilted(world, b) == pytest.approx((kl, reward))
    curve = exact.frontier_curve(world, 4.0)
    assert curve == sorted(curve) and 3.7 < curve[-1][0] <= 4.0 and len(curve) > 50


def test_kl_and_mean_are_sums_in_which_a_response_of_probability_0_adds_nothing():
    p, q = torch.tensor([0.0, 0.25, 0.75]).double(), torch.tensor([0.0, 0.4, 0.6]).double()
    expected = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.75 / 0.6)
    assert exact.kl_divergence(p.log(), q.log()).item() == pytest.approx(expected)
    assert exact.kl_divergence(p.log(), p.log()).item() == 0     # and not 0 * (-inf + inf)
    assert exact.kl_divergence(p.log(), q.flip(0).log()).item() == math.inf     # never in pi_ref
    both = torch.stack([p, q]).log()
    assert exact.expect(both, q).tolist() == pytest.approx([0.55, 0.52])
    assert exact.kl_divergence(both, both.flip(0))[0].item() == pytest.approx(expected)


def test_exact_figures_agree_with_sampling(language):
    reference, world = small().reference, small().worlds["train"]
    policy = moved(reference, 0.2)
    figures = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
    x = world.prompts.repeat_interleave(10_000, 0)
    y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    both = data.join(x, y, y_mask)
    rho = train.logprob_in_chunks(policy, *both) - train.logprob_in_chunks(reference, *both)
    assert data.reward(x, y).mean().item() == pytest.approx(figures["reward"], abs=0.02)
    assert rho.mean().item() == pytest.approx(figures["kl"], abs=0.02) and figures["kl"] > 0.2


def test_reference_and_optimum_are_pi_ref_and_pi_star_in_every_world(language):
    worlds = small().worlds
    start, best = exact.reference_and_optimum(worlds)
    for name, world in worlds.items():
        optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
        assert start[name] == exact.evaluate(world, world.ref_logprobs)
        assert best[name] == exact.evaluate(world, optimum)
    assert [len(world.prompts) for world in worlds.values()] == [3, 1]           # and held-out ones
    assert start["dots"] == exact.reward_dots(worlds["train"], worlds["train"].ref_logprobs)
    assert best["frontier"][-1][0] <= 1.5 * best["train"]["kl"] < 1.1 * best["frontier"][-1][0]


# ---------------------------------------------------------------- the residual of Eq. 7, Eq. 18
def variance(logprobs, values):
    """Of values under a distribution, mean over the prompts."""
    mean = (logprobs.exp() * values).sum(1, keepdim=True)
    return (logprobs.exp() * (values - mean) ** 2).sum(1).mean().item()


def test_eq18_residual_variance_is_that_of_the_reward_at_the_reference_and_0_at_the_optimum(world):
    assert exact.residual_variance(world, world.best) == pytest.approx(0, abs=1e-12)
    residual = world.rewards - 0.25 * (world.policy - world.ref_logprobs)
    for logprobs, values in ((world.ref_logprobs, world.rewards), (world.policy, residual)):
        assert variance(logprobs, values) > 0.1
        assert exact.residual_variance(world, logprobs) == pytest.approx(variance(logprobs, values))


def test_eq18_dots_lie_on_the_diagonal_at_the_optimum_alone(world):
    explicit, implicit = exact.reward_dots(world, world.best)
    assert explicit == pytest.approx(implicit, abs=2e-3)
    assert len(explicit) == (world.ref_logprobs.exp() > 1 / 300).sum() > 0
    explicit, implicit = exact.reward_dots(world, world.ref_logprobs)
    assert {*implicit} <= {round(value, 3) for value in world.optimum.tolist()}
    assert explicit != pytest.approx(implicit, abs=0.1)


# ---------------------------------------------------------------- a level; beta large and small
def test_eq16_neither_the_optimum_nor_any_regret_knows_the_level(language):
    # Only J and J* do: they are higher by f(x).
    flat, prompts = small().worlds["train"], data.TRAIN_PROMPTS
    raised = exact.World(small().reference, prompts, 0.25, 1.0)
    f = torch.tensor([-1 / 3, 1 / 3, 1]).double()                # wind, fire, night
    assert close(raised.rewards - flat.rewards, f[:, None].expand(3, 651), 1e-6)
    (best, value), (raised_best, raised_value) = (
        una.optimal_policy(world.ref_logprobs, world.rewards, 0.25) for world in (flat, raised))
    assert close(raised_best, best, 1e-6) and close(raised_value - value, f, 1e-6)
    assert close(raised.optimum, raised_value) and close(raised.gain, flat.gain, 1e-6)
    policy = exact.policy_logprobs(moved(small().reference, 0.2), flat.prompts)
    for logprobs in (flat.ref_logprobs, policy, best):
        before, after = (exact.evaluate(world, logprobs) for world in (flat, raised))
        for name in ("kl", "regret", "lost", "residual_variance"):
            assert after[name] == pytest.approx(before[name], abs=1e-6), name
        assert after["objective"] - before["objective"] == pytest.approx(1 / 3, abs=1e-6)


def test_at_large_beta_the_possible_gain_is_half_the_rewards_variance_over_beta(language):
    # log E e^{r/b} = E r / b + Var r / 2 b^2 + ..., so J* - J(pi_ref) = Var r / 2 b + O(1 / b^2).
    # What a sum of probabilities misses of 1 is multiplied by b: so much as float32 rounds away
    # would be more than the gain.
    reference, prompts = small().reference, data.TRAIN_PROMPTS
    for beta, off in ((1e3, 1e-2), (1e6, 0.1)):                  # there float64's digits run out
        world = exact.World(reference, prompts, beta)
        expected = variance(world.ref_logprobs, world.rewards) / (2 * beta)
        assert world.gain.mean().item() == pytest.approx(expected, rel=off)
        raw = torch.stack([all_logprobs(reference, prompt, 2, data.EOT)
                           for prompt in world.prompts]).double()
        as_computed = (una.optimal_policy(raw, world.rewards, beta)[1]
                       - exact.expect(raw, world.rewards)).mean().item()
        assert as_computed != pytest.approx(expected, rel=off)


def test_figures_are_finite_and_regret_is_never_below_0_at_both_ends_of_beta(language):
    reference = small().reference
    for beta in (1e-4, 1e6):
        world = exact.World(reference, data.TRAIN_PROMPTS, beta)
        for model in (reference, moved(reference)):
            figures = exact.evaluate(world, exact.policy_logprobs(model, world.prompts))
            assert all(map(math.isfinite, figures.values())) and figures["regret"] >= 0
        best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, beta)
        rounding = 1e-12 + 2e-15 * beta                          # float64's
        assert abs(exact.evaluate(world, best)["regret"]) < rounding < world.gain.min() / 10
