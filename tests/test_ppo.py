"""PPO, the method that UNA replaces: its equations against slow loops and full enumeration, its loop, and its two scalar models."""
import copy
import functools
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import train
import una
from helpers import gradient
from model import GPT, GPTConfig, ScalarGPT, all_responses

CPU = torch.device("cpu")


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Prompt columns first, padding last: responses of one token to all eight, with and without something on either side.
SPANS = [(0, 8), (3, 8), (0, 3), (2, 6), (4, 5), (7, 8), (0, 1), (1, 4)]
MASK = torch.tensor([[start <= t < end for t in range(8)] for start, end in SPANS])


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def finite_differences(loss, x, step=1e-6):
    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        bump = F.one_hot(torch.tensor(i), x.numel()).view(x.shape) * step
        slopes.view(-1)[i] = (loss(x + bump) - loss(x - bump)).sum() / (2 * step)
    return slopes


# ---------------------------------------------------------------- log-probabilities of tokens
def test_token_logprobs_add_up_to_the_sequence_logprob():
    tokens, logits = torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0)), normal(1, 8, 9, 5)
    mask = F.pad(MASK, (1, 0))                                              # nothing predicts column 0
    assert close(una.token_logprobs(logits, tokens, mask).sum(1), una.sequence_logprob(logits, tokens, mask))


def test_column_t_of_token_logprobs_is_of_token_t_plus_1_and_0_off_the_mask():
    tokens, logits = torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0)), normal(1, 8, 9, 5)
    value = una.token_logprobs(logits, tokens, F.pad(MASK, (1, 0)))
    shifted = torch.zeros(8, 8, dtype=torch.float64)                        # the mistake: logits t scored on token t
    for i in range(8):
        for t in range(8):
            p = logits[i, t].softmax(-1)
            expected = math.log(p[tokens[i, t + 1]]) if MASK[i, t] else 0.0
            assert value[i, t].item() == pytest.approx(expected, abs=1e-12)
            shifted[i, t] = math.log(p[tokens[i, t]]) if MASK[i, t] else 0.0
    assert value.shape == (8, 8) and not close(value, shifted, 0.1)


# ---------------------------------------------------------------- rewards of tokens
def test_token_rewards_add_up_to_the_reward_minus_beta_rho():
    reward, logprobs, ref = normal(0, 8), normal(1, 8, 8), normal(2, 8, 8)
    rho = ((logprobs - ref) * MASK).sum(1)
    rewards = una.ppo_token_rewards(reward, logprobs, ref, MASK, 0.3)
    assert close(rewards.sum(1), reward - 0.3 * rho)
    assert (rewards[~MASK] == 0).all()                                      # though log-probabilities stand there


def test_the_reward_lands_on_the_last_real_token_and_never_on_padding():
    responses, y_mask = data.encode_responses(["", " sea", " bright sea", " bright warm sea"])
    cut_off = torch.tensor([data.ENCODING.encode_ordinary(" bright warm cold sea")])        # four words, no end-of-text
    responses, y_mask = torch.cat([responses, cut_off]), torch.cat([y_mask, torch.ones(1, 4, dtype=torch.bool)])
    _, mask = data.join(data.encode_prompts(["happy sea :"] * 5), responses, y_mask)
    for padding in (0, 3):
        inner = F.pad(mask[:, 1:], (0, padding))
        zero = torch.zeros(inner.shape, dtype=torch.float64)
        rewards = una.ppo_token_rewards(normal(0, 5), zero, zero, inner, 0.3)
        # Column t is of token t + 1 and the prompt has 3 tokens, so a response of n tokens ends in column 1 + n.
        expected = zero.index_put((torch.arange(5), torch.tensor([2, 3, 4, 5, 5])), normal(0, 5))
        assert torch.equal(rewards, expected)


def test_a_token_that_the_policy_likes_more_than_the_reference_costs_beta_a_nat():
    logprobs, ref = torch.tensor([[-1.0, -2.0, -1.5]]), torch.tensor([[-3.0, -1.0, -1.5]])  # 2 nats more, 1 less, as much
    rewards = una.ppo_token_rewards(torch.tensor([10.0]), logprobs, ref, torch.ones(1, 3, dtype=torch.bool), 0.5)
    assert rewards.tolist() == [[-1.0, 0.5, 10.0]]


# ---------------------------------------------------------------- advantages
def double_sum(rewards, values, lam, gamma=1.0, bootstrap=False):
    """A_t = sum_k lam^k delta_{t+k}, in Python. gamma and bootstrap are two mistakes, for the controls."""
    advantages = torch.zeros_like(rewards)
    for i, (start, end) in enumerate(SPANS):
        def following(t):
            return values[i, t + 1].item() if t + 1 < (8 if bootstrap else end) else 0.0
        for t in range(start, end):
            advantages[i, t] = sum((gamma * lam) ** (s - t) * (rewards[i, s] + gamma * following(s) - values[i, s]) for s in range(t, end))
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_the_double_sum_and_targets_the_advantages_plus_values(lam):
    rewards, values = normal(0, 8, 8), normal(1, 8, 8)
    advantages, targets = una.ppo_advantages(rewards, values, MASK, lam)
    assert close(advantages, double_sum(rewards, values, lam))
    assert close(targets, (advantages + values) * MASK) and (targets[~MASK] == 0).all()


def test_advantages_confuse_neither_lambda_with_gamma_nor_padding_with_a_future():
    rewards, values = normal(0, 8, 8), normal(1, 8, 8)
    advantages, _ = una.ppo_advantages(rewards, values, MASK, 0.5)
    assert not close(advantages, double_sum(rewards, values, 1.0, gamma=0.5), 0.1)
    assert not close(advantages, double_sum(rewards, values, 0.5, gamma=0.5), 0.1)
    assert not close(advantages, double_sum(rewards, values, 0.5, bootstrap=True), 0.1)


def test_lambda_1_is_reward_to_go_minus_value_and_lambda_0_is_delta():
    # lambda = 1: the values between telescope, sum_s (r_s + V_{s+1} - V_s) = sum_s r_s - V_t.
    rewards, values = normal(0, 8, 8) * MASK, normal(1, 8, 8) * MASK
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, targets = una.ppo_advantages(rewards, values, MASK, 1.0)
    assert close(advantages, (to_go - values) * MASK) and close(targets, to_go * MASK)
    delta = rewards + F.pad(values[:, 1:], (0, 1)) - values
    assert close(una.ppo_advantages(rewards, values, MASK, 0.0)[0], delta * MASK)


def test_rewards_and_values_outside_the_mask_have_no_influence():
    rewards, values = normal(0, 8, 8), normal(1, 8, 8)
    expected = una.ppo_advantages(rewards, values, MASK, 0.9)
    for garbage in ((rewards.where(MASK, 1e3), values), (rewards, values.where(MASK, -1e3))):
        assert all(torch.equal(a, b) for a, b in zip(una.ppo_advantages(*garbage, MASK, 0.9), expected))


# ---------------------------------------------------------------- the policy's loss
def policy_case():
    """Log-probabilities, old ones and advantages, with ratios in the clip range and out of it on each side, for both signs of A."""
    old, advantages = -normal(0, 8, 8).abs(), normal(1, 8, 8)
    logprobs = old + 0.3 * normal(2, 8, 8)
    ratio, clip = (logprobs - old).exp()[MASK], 0.2
    for sign in (advantages[MASK] > 0, advantages[MASK] < 0):
        for side in (ratio > 1 + clip, ratio < 1 - clip, (ratio - 1).abs() < clip):
            assert (sign & side).any()
    return logprobs, old, advantages, clip


def test_policy_loss_is_the_slow_loop():
    # For A > 0, min(w A, clip(w) A) = A min(w, 1 + eps); for A < 0 it is A max(w, 1 - eps): the other bound never binds.
    logprobs, old, advantages, clip = policy_case()
    losses = una.ppo_policy_loss(logprobs, old, advantages, MASK, clip)
    assert losses.shape == (8,)
    for i, (start, end) in enumerate(SPANS):
        expected = 0.0
        for t in range(start, end):
            w, a = math.exp(logprobs[i, t] - old[i, t]), advantages[i, t].item()
            expected -= a * min(w, 1 + clip) if a > 0 else a * max(w, 1 - clip)
        assert losses[i].item() == pytest.approx(expected, abs=1e-12)


def test_policy_loss_has_the_gradient_of_finite_differences():
    logprobs, old, advantages, clip = policy_case()

    def loss(x):
        return una.ppo_policy_loss(x, old, advantages, MASK, clip)
    assert close(gradient(loss, logprobs), finite_differences(loss, logprobs), 1e-7)


def test_at_ratio_1_the_policy_loss_is_the_policy_gradient():
    # Also where autograd has to choose: at w = 1 both arguments of the minimum are equal, and so are their gradients.
    _, old, advantages, clip = policy_case()
    losses = una.ppo_policy_loss(old, old, advantages, MASK, clip)
    assert close(losses, -(advantages * MASK).sum(1))
    logits = normal(3, 8, 8, 5)                                             # log pi of token 0, as softmax logits give it

    def logprobs(z):
        return z.log_softmax(-1)[..., 0]
    slope = gradient(lambda z: una.ppo_policy_loss(logprobs(z), logprobs(logits), advantages, MASK, clip), logits)
    assert close(slope, gradient(lambda z: -(advantages * logprobs(z) * MASK).sum(1), logits))


@pytest.mark.parametrize("w, a, clipped", [
    (1.5, 2.0, True), (0.5, -2.0, True),                                    # it moved far where moving pays: no further
    (0.5, 2.0, False), (1.5, -2.0, False),                                  # it moved far the wrong way: all the way back
    (1.19, 2.0, False), (0.81, 2.0, False), (1.19, -2.0, False), (0.81, -2.0, False),       # within reach
    (1.21, 2.0, True), (0.79, -2.0, True), (0.79, 2.0, False), (1.21, -2.0, False),         # just out of it
])
def test_clipping_stops_what_pays_and_nothing_else(w, a, clipped):
    one = torch.ones(1, 1, dtype=torch.float64)
    slope = gradient(lambda x: una.ppo_policy_loss(x, -one, a * one, one.bool(), 0.2), -one + math.log(w))
    assert slope.item() == pytest.approx(0.0 if clipped else -w * a, abs=1e-12)             # d w / d log pi = w


def test_policy_loss_never_reads_masked_columns():
    logprobs, old, advantages, clip = policy_case()
    expected = una.ppo_policy_loss(logprobs, old, advantages, MASK, clip)
    garbage = [x.where(MASK, 7.0 + i) for i, x in enumerate((logprobs, old, advantages))]
    assert torch.equal(una.ppo_policy_loss(*garbage, MASK, clip), expected)
    slope = gradient(lambda x: una.ppo_policy_loss(x, old, advantages, MASK, clip), logprobs)
    assert (slope[~MASK] == 0).all()


# ---------------------------------------------------------------- the values' loss
def value_case():
    old, targets = normal(0, 8, 8), normal(1, 8, 8)
    values, clip = old + 0.4 * normal(2, 8, 8), 0.2
    return values, old, targets, clip


def test_value_loss_is_the_slow_loop():
    values, old, targets, clip = value_case()
    losses = una.ppo_value_loss(values, old, targets, MASK, clip)
    assert losses.shape == (8,)
    for i, (start, end) in enumerate(SPANS):
        expected = 0.0
        for t in range(start, end):
            v, before, target = values[i, t].item(), old[i, t].item(), targets[i, t].item()
            held = min(max(v, before - clip), before + clip)
            expected += max((v - target) ** 2, (held - target) ** 2) / 2
        assert losses[i].item() == pytest.approx(expected, abs=1e-12)


def test_value_loss_has_the_gradient_of_finite_differences():
    values, old, targets, clip = value_case()

    def loss(x):
        return una.ppo_value_loss(x, old, targets, MASK, clip)
    assert close(gradient(loss, values), finite_differences(loss, values), 1e-7)


def test_value_loss_is_half_the_squared_error_within_the_clip_and_never_below_it():
    values, old, targets, clip = value_case()
    plain = 0.5 * ((values - targets) ** 2 * MASK).sum(1)
    assert (una.ppo_value_loss(values, old, targets, MASK, clip) >= plain).all()
    assert (una.ppo_value_loss(values, old, targets, MASK, clip) > plain + 0.01).any()
    near = old + (values - old).clamp(-0.19, 0.19)
    assert close(una.ppo_value_loss(near, old, targets, MASK, clip), 0.5 * ((near - targets) ** 2 * MASK).sum(1))


@pytest.mark.parametrize("value, slope", [(0.5, 0.0), (-0.5, -1.5), (0.1, -0.9), (2.5, 1.5)])
def test_a_value_that_moved_far_towards_its_target_stops_and_any_other_goes_on(value, slope):
    # Old value 0, target 1, clip 0.2. At 0.5 the held value 0.2 is the worse one, and constant. At 2.5, past the target, V is worse.
    one = torch.ones(1, 1, dtype=torch.float64)
    assert gradient(lambda v: una.ppo_value_loss(v, 0 * one, one, one.bool(), 0.2), value * one).item() == pytest.approx(slope, abs=1e-12)


def test_value_loss_never_reads_masked_columns():
    values, old, targets, clip = value_case()
    expected = una.ppo_value_loss(values, old, targets, MASK, clip)
    garbage = [x.where(MASK, 7.0 + 2 * i) for i, x in enumerate((values, old, targets))]
    assert torch.equal(una.ppo_value_loss(*garbage, MASK, clip), expected)
    assert (gradient(lambda x: una.ppo_value_loss(x, old, targets, MASK, clip), values)[~MASK] == 0).all()


# ---------------------------------------------------------------- PPO maximises Eq. 3
def tabular_world():
    """{a, b, end}, three tokens, 15 responses, and a policy with free logits behind each of the 7 prefixes of up to two words."""
    responses, mask = all_responses(3, 3, 2)
    first, second = responses[:, 0], responses[:, 1]
    node = torch.stack([torch.zeros(15, dtype=torch.long), 1 + first, 3 + 2 * first + second], dim=1).where(mask, 0)    # (15, 3)

    def logprobs(logits):                                                   # (7, 3) -> (15, 3), 0 behind the end
        return logits.log_softmax(-1)[node].gather(2, responses[..., None]).squeeze(2) * mask
    return SimpleNamespace(mask=mask, node=node, responses=responses, logprobs=logprobs, rewards=normal(0, 15), beta=0.3,
                           theta=normal(1, 7, 3), ref=logprobs(normal(2, 7, 3)))


def expected_ppo_gradient(world, values, lam=1.0):
    """E_{y~pi} grad L at ratio 1: every response, weighted with its probability."""
    old = world.logprobs(world.theta)
    rewards = una.ppo_token_rewards(world.rewards, old, world.ref, world.mask, world.beta)
    advantages, _ = una.ppo_advantages(rewards, values, world.mask, lam)
    return gradient(lambda theta: old.sum(1).exp() * una.ppo_policy_loss(world.logprobs(theta), old, advantages, world.mask, 0.2),
                    world.theta)


def eq03_gradient(world):
    return gradient(lambda theta: una.rlhf_objective(world.logprobs(theta).sum(1), world.ref.sum(1), world.rewards, world.beta),
                    world.theta)


def test_eq03_the_expected_ppo_gradient_is_minus_the_gradient_of_j():
    # grad J = E (r - beta rho) grad log pi(y): the KL's own term E grad log pi is 0. Rewards of earlier tokens, which reward-to-go
    # leaves out, are 0 in expectation too, since given the past E grad log pi(y_t) = 0.
    world = tabular_world()
    assert world.logprobs(world.theta).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    exact = eq03_gradient(world)
    assert close(expected_ppo_gradient(world, torch.zeros(15, 3, dtype=torch.float64)), -exact, 1e-10) and exact.abs().max() > 0.05


def test_eq03_any_values_of_the_past_leave_that_gradient_alone_and_values_of_the_token_do_not():
    # The same zero again, times V(x, y_<t). A value that has seen y_t is no baseline: one column too late, and PPO is biased.
    world = tabular_world()
    exact = eq03_gradient(world)
    assert close(expected_ppo_gradient(world, normal(3, 7)[world.node]), -exact, 1e-10)
    assert not close(expected_ppo_gradient(world, normal(3, 3)[world.responses]), -exact, 0.02)


def test_eq03_and_eq07_ppo_and_una_online_agree_on_the_expected_gradient():
    # E grad (r - beta rho)^2 = -2 beta E (r - beta rho) grad log pi = -2 beta grad J, the samples' distribution held fixed.
    world = tabular_world()
    old, ref = world.logprobs(world.theta).sum(1), world.ref.sum(1)
    una_gradient = gradient(lambda theta: old.exp() * una.una_reward_loss(
        una.implicit_reward(world.logprobs(theta).sum(1), ref, world.beta), world.rewards), world.theta)
    assert close(una_gradient, 2 * world.beta * expected_ppo_gradient(world, torch.zeros(15, 3, dtype=torch.float64)), 1e-10)


def test_eq03_with_the_true_values_any_lambda_gives_the_gradient_of_j():
    # V(x, y_<t) = E sum_{s>=t} r_s makes E[delta_s | y_<s] = 0, so later deltas add noise and no mean: lambda is free.
    world = tabular_world()
    old = world.logprobs(world.theta)
    rewards = una.ppo_token_rewards(world.rewards, old, world.ref, world.mask, world.beta)
    to_go, p = rewards.flip(1).cumsum(1).flip(1), old.sum(1).exp()[:, None] * world.mask
    mass, total = (torch.zeros(7, dtype=torch.float64).index_add(0, world.node.view(-1), x.view(-1)) for x in (p, p * to_go))
    for lam in (0.0, 0.95):
        assert close(expected_ppo_gradient(world, (total / mass)[world.node], lam), -eq03_gradient(world), 1e-10)
        assert not close(expected_ppo_gradient(world, torch.zeros(15, 3, dtype=torch.float64), lam), -eq03_gradient(world), 1e-3)


# ---------------------------------------------------------------- the inner steps of train.py
def moved(model, seed, scale=0.1):
    """A copy some way from the model, to be trained."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@functools.cache
def small_reference():
    settings = train.Settings(reference_steps=20, n_layer=1, n_head=2, n_embd=64)
    return train.train_reference(settings, 0, CPU)


def ppo_case():
    """A policy, a value model and a reference, all different, and 32 of the policy's responses, some shorter than others."""
    reference = small_reference()
    policy, value = moved(reference, 1), moved(ScalarGPT(reference), 2)
    prompts = data.encode_prompts(data.TRAIN_PROMPTS[:4])
    tokens, mask = train.fresh_samples(policy, prompts, 8, torch.Generator().manual_seed(0))
    assert len(mask.sum(1).unique()) > 2
    return policy, value, reference, tokens, mask


def record(monkeypatch, name):
    """Calls of una.<name>, each as its tuple of arguments, in a list that grows; the function still does its work."""
    calls, function = [], getattr(una, name)
    monkeypatch.setattr(una, name, lambda *arguments: calls.append(arguments) or function(*arguments))
    return calls


def inner_steps(policy, value, reference, tokens, mask, judge=train.true_reward, learning_rate=1e-2):
    """ppo_losses with a step of the optimiser between them."""
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=learning_rate)
    losses = []
    for loss in train.ppo_losses(policy, value, reference, judge, tokens, mask, 0.25):
        losses.append(loss)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return losses


def test_the_ratio_is_exactly_1_at_first_and_no_longer_after_a_step(monkeypatch):
    calls, value_calls = record(monkeypatch, "ppo_policy_loss"), record(monkeypatch, "ppo_value_loss")
    losses = inner_steps(*ppo_case())
    assert len(losses) == len(calls) == train.PPO_EPOCHS > 1 and losses[0].shape == (32,)
    assert torch.equal(calls[0][0], calls[0][1]) and torch.equal(value_calls[0][0], value_calls[0][1])
    for made in (calls, value_calls):
        for new, old, fixed, _, clip in made[1:]:                           # the old ones stay old, advantages and targets stand
            assert (new - old).abs().max() > 1e-3 and torch.equal(old, made[0][1]) and torch.equal(fixed, made[0][2])
            assert clip == train.PPO_CLIP


def test_only_the_new_logprobs_and_values_carry_gradients(monkeypatch):
    calls = {name: record(monkeypatch, name) for name in ("ppo_token_rewards", "ppo_advantages", "ppo_policy_loss", "ppo_value_loss")}
    policy, value, reference, tokens, mask = ppo_case()
    reference, judge = moved(reference, 3), moved(value, 4)                  # not frozen, so that a leak would show
    inner_steps(policy, value, reference, tokens, mask, functools.partial(train.model_reward, judge))
    carries = {name: [[getattr(x, "requires_grad", False) for x in call] for call in made] for name, made in calls.items()}
    assert not any(carries["ppo_token_rewards"][0] + carries["ppo_advantages"][0]) and len(calls["ppo_advantages"]) == 1
    assert all(call == [True, False, False, False, False] for call in carries["ppo_policy_loss"] + carries["ppo_value_loss"])
    assert all(p.grad is None for model in (reference, judge) for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for model in (policy, value) for p in model.parameters())


def test_advantages_have_mean_0_and_deviation_1_over_the_tokens_of_responses(monkeypatch):
    calls = record(monkeypatch, "ppo_policy_loss")
    _, _, _, _, mask = case = ppo_case()
    inner_steps(*case)
    advantages, inner = calls[0][2:4]
    assert torch.equal(inner, mask[:, 1:])
    assert advantages[inner].mean().item() == pytest.approx(0, abs=1e-6) and advantages[inner].std().item() == pytest.approx(1, abs=1e-5)


def test_the_first_losses_are_those_computed_by_hand_one_token_at_a_time():
    # With ratio 1 and V = V_old nothing is clipped: L = -sum_t A_t (normalised) + 1/2 sum_t A_t^2 (raw, as target - V is A).
    policy, value, reference, tokens, mask = (x.double() if isinstance(x, torch.nn.Module) else x for x in map(copy.deepcopy, ppo_case()))
    losses = next(train.ppo_losses(policy, value, reference, train.true_reward, tokens, mask, 0.25))
    raw = []
    with torch.no_grad():
        for row, n in zip(tokens, mask.sum(1).tolist()):
            pi, ref = (model(row[None])[0].log_softmax(-1) for model in (policy, reference))
            v = [value(row[None, :t])[0, -1].item() for t in range(3, 3 + n)] + [0.0]           # of what stands before each token
            r = [-0.25 * (pi[t - 1, row[t]] - ref[t - 1, row[t]]).item() for t in range(3, 3 + n)]
            r[-1] += data.reward(row[None, :3], row[None, 3:]).item()
            raw.append([sum(train.PPO_LAMBDA ** (s - t) * (r[s] + v[s + 1] - v[s]) for s in range(t, n)) for t in range(n)])
    flat = torch.tensor([a for advantages in raw for a in advantages], dtype=torch.float64)
    for loss, advantages in zip(losses.tolist(), raw):
        expected = sum(-(a - flat.mean().item()) / flat.std().item() + a * a / 2 for a in advantages)
        assert loss == pytest.approx(expected, abs=1e-6)


def test_the_value_of_a_token_is_read_before_it(monkeypatch):
    calls = record(monkeypatch, "ppo_value_loss")
    policy, value, reference, tokens, mask = ppo_case()
    rows, last = torch.arange(len(tokens)), 2 + mask.sum(1)
    inner, seen = mask[:, 1:], []
    for column in (None, last, last - 1):
        changed = tokens.clone()
        if column is not None:
            changed[rows, column] = (changed[rows, column] + 1) % data.EOT
        next(train.ppo_losses(policy, value, reference, train.true_reward, changed, mask, 0.25))
        seen.append(calls[-1][0].detach())
    before, after_last, after_earlier = seen
    assert torch.equal(before[inner], after_last[inner])                    # no value of the response knows its last token ...
    assert not torch.isclose(before[rows, last - 1], after_earlier[rows, last - 1], atol=1e-4).any()    # ... but that of it, the one before
    assert not torch.isclose(value(tokens)[rows, last], value(tokens * 0)[rows, last], atol=1e-4).any()


# ---------------------------------------------------------------- the models with a scalar head
def test_scalar_gpt_starts_as_its_gpt_with_scalar_0():
    model = small_reference()
    tokens = torch.randint(data.EOT, (4, 7), generator=torch.Generator().manual_seed(0))
    scalar = ScalarGPT(model)
    assert torch.equal(scalar.hidden(tokens), model.hidden(tokens))
    assert torch.equal(scalar(tokens), torch.zeros(4, 7)) and all(p.requires_grad for p in scalar.parameters())


def test_scalar_gpt_is_causal():
    scalar = moved(ScalarGPT(small_reference()), 5)
    tokens = torch.randint(data.EOT, (4, 7), generator=torch.Generator().manual_seed(0))
    before = scalar(tokens)
    for t in range(7):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % data.EOT
        after = scalar(changed)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.isclose(after[:, t], before[:, t]).any()


def test_training_a_scalar_gpt_leaves_its_gpt_alone():
    model = GPT(GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, 1, 2, 16))
    before, scalar = copy.deepcopy(model.state_dict()), ScalarGPT(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in scalar.parameters()}
    optimizer = torch.optim.SGD(scalar.parameters(), lr=0.1)
    for _ in range(2):                                                      # the head is 0 at first: the rest moves in the second step
        ((scalar(torch.arange(7)[None]) - 1) ** 2).sum().backward()
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(scalar.wte.weight, model.wte.weight) and all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- the reward model
def sentences(n, seed):
    """n responses to two prompts, rows 2i and 2i + 1 to the same: random adjectives, the right noun, and in three of ten a wrong word."""
    rng, prompts, responses = random.Random(seed), [], []
    for _ in range(n):
        prompts.append(rng.choice(["happy wind :", "sad sea :"]) if len(prompts) % 2 == 0 else prompts[-1])
        words = [*rng.choices(list(data.ADJECTIVES), k=2), prompts[-1].split()[1]]
        if rng.random() < 0.3:
            words[rng.randrange(3)] = rng.choice([*data.NOUNS, *data.ADJECTIVES])
        responses.append("".join(f" {word}" for word in words))
    return data.encode_prompts(prompts), *data.encode_responses(responses)


@functools.cache
def trained_reward_model():
    """A reward model and the feedback, on 800 responses, that it learned from."""
    settings = train.Settings(steps=250, batch=96)
    feedback = data.judge(*sentences(800, 0), torch.Generator().manual_seed(0))
    return train.train_reward_model(settings, 0, small_reference(), feedback), feedback


def test_model_reward_reads_the_last_token_of_the_response_and_nothing_behind_it():
    model = moved(ScalarGPT(small_reference()), 6)
    responses, y_mask = data.encode_responses(["", " sea", " bright sea", " bright warm sea"])
    tokens, mask = data.join(data.encode_prompts(["happy sea :"] * 4), responses, y_mask)
    reward = train.model_reward(model, tokens, mask)
    alone = torch.stack([model(row[None, :4 + n])[0, -1] for n, row in enumerate(tokens)])
    assert torch.allclose(reward, alone, atol=1e-6)
    other = tokens.where(mask | (torch.arange(7) < data.PROMPT_TOKENS), 1)
    assert not torch.equal(other, tokens) and torch.equal(train.model_reward(model, other, mask), reward)


@pytest.mark.parametrize("seed", [0, 1])
def test_eq02_the_reward_model_learns_the_order_of_rewards(seed):
    # Seed 0 are the responses whose pairs it was trained on: coin flips of Eq. 1, not their rewards. Seed 1 are others.
    model, _ = trained_reward_model()
    tokens, mask = data.join(*sentences(800, seed))
    judged, true = train.model_reward(model, tokens, mask).view(-1, 2), train.true_reward(tokens, mask).view(-1, 2)
    clear = (true[:, 0] - true[:, 1]).abs() > 1
    right = (judged[:, 0] > judged[:, 1]) == (true[:, 0] > true[:, 1])
    assert clear.sum() > 100 and right[clear].float().mean() > 0.85


def test_the_reward_model_comes_back_frozen_and_without_gradients():
    model, _ = trained_reward_model()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_eq02_the_reward_models_loss_does_not_see_what_depends_on_the_prompt_alone():
    # So r_phi is known up to f(x), which UNA's offset and PPO's values both take up.
    model, feedback = trained_reward_model()
    chosen, rejected = (train.model_reward(model, feedback.tokens[rows], feedback.mask[rows]).double() for rows in feedback.pairs.T)
    prompt = feedback.tokens[feedback.pairs[:, 0], :data.PROMPT_TOKENS]
    f = 5.0 * (prompt[:, 0] == prompt[0, 0])                                # a mood's bonus
    loss = una.reward_model_loss(chosen, rejected)
    assert close(una.reward_model_loss(chosen + f, rejected + f), loss) and f.std() > 1
    assert loss.mean() < 0.6 < math.log(2) and not close(una.reward_model_loss(chosen + f, rejected), loss, 0.1)
