"""PPO, which UNA would replace: its equations against slow loops and full enumeration."""
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import una
from helpers import gradient, near


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Prompt columns first, padding last: responses of one token to all eight, with and without
# something on either side.
SPANS = [(0, 8), (3, 8), (0, 3), (2, 6), (4, 5), (7, 8), (0, 1), (1, 4)]
MASK = torch.tensor([[start <= t < end for t in range(8)] for start, end in SPANS])


def finite_differences(loss, x, step=1e-6):
    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        bump = F.one_hot(torch.tensor(i), x.numel()).view(x.shape) * step
        slopes.view(-1)[i] = (loss(x + bump) - loss(x - bump)).sum() / (2 * step)
    return slopes


# ---------------------------------------------------------------- log-probabilities of tokens
def language():
    """Tokens (8, 9) out of five, and logits (8, 9, 5)."""
    return torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0)), normal(1, 8, 9, 5)


def test_token_logprobs_add_up_to_the_sequence_logprob():
    tokens, logits = language()
    mask = F.pad(MASK, (1, 0))   # nothing predicts column 0
    logprobs = una.token_logprobs(logits, tokens, mask)
    assert near(logprobs.sum(1), una.sequence_logprob(logits, tokens, mask))


def test_column_t_of_token_logprobs_is_of_token_t_plus_1_and_0_off_the_mask():
    tokens, logits = language()
    value = una.token_logprobs(logits, tokens, F.pad(MASK, (1, 0)))
    shifted = torch.zeros(8, 8, dtype=torch.float64)   # the mistake: logits t scored on token t
    for i in range(8):
        for t in range(8):
            p = logits[i, t].softmax(-1)
            expected = math.log(p[tokens[i, t + 1]]) if MASK[i, t] else 0.0
            assert value[i, t].item() == pytest.approx(expected, abs=1e-12)
            shifted[i, t] = math.log(p[tokens[i, t]]) if MASK[i, t] else 0.0
    assert value.shape == (8, 8) and not near(value, shifted, 0.1)


# ---------------------------------------------------------------- rewards of tokens
def test_token_rewards_add_up_to_the_reward_minus_beta_rho():
    reward, logprobs, ref = normal(0, 8), normal(1, 8, 8), normal(2, 8, 8)
    rho = ((logprobs - ref) * MASK).sum(1)
    rewards = una.ppo_token_rewards(reward, logprobs, ref, MASK, 0.3)
    assert near(rewards.sum(1), reward - 0.3 * rho)
    assert (rewards[~MASK] == 0).all()   # though log-probabilities stand there


def test_the_reward_lands_on_the_last_real_token_and_never_on_padding():
    responses, y_mask = data.encode_responses(["", " sea", " bright sea", " bright warm sea"])
    # four words, no end-of-text
    cut_off = torch.tensor([data.ENCODING.encode_ordinary(" bright warm cold sea")])
    responses = torch.cat([responses, cut_off])
    y_mask = torch.cat([y_mask, torch.ones(1, 4, dtype=torch.bool)])
    _, mask = data.join(data.encode_prompts(["happy sea :"] * 5), responses, y_mask)
    for padding in (0, 3):
        inner = F.pad(mask[:, 1:], (0, padding))
        zero = torch.zeros(inner.shape, dtype=torch.float64)
        rewards = una.ppo_token_rewards(normal(0, 5), zero, zero, inner, 0.3)
        # Column t is of token t + 1 and the prompt has 3 tokens,
        # so a response of n tokens ends in column 1 + n.
        expected = zero.index_put((torch.arange(5), torch.tensor([2, 3, 4, 5, 5])), normal(0, 5))
        assert torch.equal(rewards, expected)


def test_a_token_that_the_policy_likes_more_than_the_reference_costs_beta_a_nat():
    # 2 nats more, 1 less, as much
    logprobs, ref = torch.tensor([[-1.0, -2.0, -1.5]]), torch.tensor([[-3.0, -1.0, -1.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = una.ppo_token_rewards(torch.tensor([10.0]), logprobs, ref, mask, 0.5)
    assert rewards.tolist() == [[-1.0, 0.5, 10.0]]


# ---------------------------------------------------------------- advantages
def double_sum(rewards, values, lam, gamma=1.0, bootstrap=False):
    """A_t = sum_k lam^k delta_{t+k}, in Python.

    gamma and bootstrap are two mistakes, for the controls.
    """
    advantages = torch.zeros_like(rewards)
    for i, (start, end) in enumerate(SPANS):
        delta = {}
        for t in range(start, end):
            known = t + 1 < (8 if bootstrap else end)
            following = values[i, t + 1] if known else 0.0
            delta[t] = rewards[i, t] + gamma * following - values[i, t]
        for t in range(start, end):
            advantages[i, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, end))
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_the_double_sum_and_targets_the_advantages_plus_values(lam):
    rewards, values = normal(0, 8, 8), normal(1, 8, 8)
    advantages, targets = una.ppo_advantages(rewards, values, MASK, lam)
    assert near(advantages, double_sum(rewards, values, lam))
    assert near(targets, (advantages + values) * MASK) and (targets[~MASK] == 0).all()


def test_advantages_confuse_neither_lambda_with_gamma_nor_padding_with_a_future():
    rewards, values = normal(0, 8, 8), normal(1, 8, 8)
    advantages, _ = una.ppo_advantages(rewards, values, MASK, 0.5)
    assert not near(advantages, double_sum(rewards, values, 1.0, gamma=0.5), 0.1)
    assert not near(advantages, double_sum(rewards, values, 0.5, gamma=0.5), 0.1)
    assert not near(advantages, double_sum(rewards, values, 0.5, bootstrap=True), 0.1)


def test_lambda_1_is_reward_to_go_minus_value_and_lambda_0_is_delta():
    # lambda = 1: the values between telescope, sum_s (r_s + V_{s+1} - V_s) = sum_s r_s - V_t.
    rewards, values = normal(0, 8, 8) * MASK, normal(1, 8, 8) * MASK
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, targets = una.ppo_advantages(rewards, values, MASK, 1.0)
    assert near(advantages, (to_go - values) * MASK) and near(targets, to_go * MASK)
    delta = rewards + F.pad(values[:, 1:], (0, 1)) - values
    assert near(una.ppo_advantages(rewards, values, MASK, 0.0)[0], delta * MASK)


def test_rewards_and_values_outside_the_mask_have_no_influence():
    rewards, values = normal(0, 8, 8), normal(1, 8, 8)
    expected = una.ppo_advantages(rewards, values, MASK, 0.9)
    for garbage in ((rewards.where(MASK, 1e3), values), (rewards, values.where(MASK, -1e3))):
        result = una.ppo_advantages(*garbage, MASK, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(result, expected))


# ---------------------------------------------------------------- the policy's loss
def policy_case():
    """Log-probabilities, old ones and advantages.

    Ratios are in the clip range and out of it on each side, for both signs of A.
    """
    old, advantages = -normal(0, 8, 8).abs(), normal(1, 8, 8)
    logprobs = old + 0.3 * normal(2, 8, 8)
    ratio, clip = (logprobs - old).exp()[MASK], 0.2
    for sign in (advantages[MASK] > 0, advantages[MASK] < 0):
        for side in (ratio > 1 + clip, ratio < 1 - clip, (ratio - 1).abs() < clip):
            assert (sign & side).any()
    return logprobs, old, advantages, clip


def test_policy_loss_is_the_slow_loop():
    # For A > 0, min(w A, clip(w) A) = A min(w, 1 + eps); for A < 0 it is A max(w, 1 - eps):
    # the other bound never binds.
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
    assert near(gradient(loss, logprobs), finite_differences(loss, logprobs), 1e-7)


def test_at_ratio_1_the_policy_loss_is_the_policy_gradient():
    # Also where autograd has to choose:
    # at w = 1 both arguments of the minimum are equal, and so are their gradients.
    _, old, advantages, clip = policy_case()
    losses = una.ppo_policy_loss(old, old, advantages, MASK, clip)
    assert near(losses, -(advantages * MASK).sum(1))
    logits = normal(3, 8, 8, 5)   # log pi of token 0, as softmax logits give it

    def logprobs(z):
        return z.log_softmax(-1)[..., 0]

    def loss(z):
        return una.ppo_policy_loss(logprobs(z), logprobs(logits), advantages, MASK, clip)

    expected = gradient(lambda z: -(advantages * logprobs(z) * MASK).sum(1), logits)
    assert near(gradient(loss, logits), expected)


@pytest.mark.parametrize("w, a, clipped", [
    # It moved far where moving pays: no further.
    (1.5, 2.0, True), (0.5, -2.0, True),
    # It moved far the wrong way: all the way back.
    (0.5, 2.0, False), (1.5, -2.0, False),
    # Within reach.
    (1.19, 2.0, False), (0.81, 2.0, False), (1.19, -2.0, False), (0.81, -2.0, False),
    # Just out of it.
    (1.21, 2.0, True), (0.79, -2.0, True), (0.79, 2.0, False), (1.21, -2.0, False),
])
def test_clipping_stops_what_pays_and_nothing_else(w, a, clipped):
    one = torch.ones(1, 1, dtype=torch.float64)

    def loss(logprobs):
        return una.ppo_policy_loss(logprobs, -one, a * one, one.bool(), 0.2)

    slope = gradient(loss, -one + math.log(w)).item()
    assert slope == pytest.approx(0.0 if clipped else -w * a, abs=1e-12)   # d w / d log pi = w


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
    assert near(gradient(loss, values), finite_differences(loss, values), 1e-7)


def test_value_loss_is_half_the_squared_error_within_the_clip_and_never_below_it():
    values, old, targets, clip = value_case()
    plain = 0.5 * ((values - targets) ** 2 * MASK).sum(1)
    assert (una.ppo_value_loss(values, old, targets, MASK, clip) >= plain).all()
    assert (una.ppo_value_loss(values, old, targets, MASK, clip) > plain + 0.01).any()
    close = old + (values - old).clamp(-0.19, 0.19)
    expected = 0.5 * ((close - targets) ** 2 * MASK).sum(1)
    assert near(una.ppo_value_loss(close, old, targets, MASK, clip), expected)


@pytest.mark.parametrize("value, slope", [(0.5, 0.0), (-0.5, -1.5), (0.1, -0.9), (2.5, 1.5)])
def test_a_value_that_moved_far_towards_its_target_stops_and_any_other_goes_on(value, slope):
    # Old value 0, target 1, clip 0.2. At 0.5 the held value 0.2 is the worse one, and constant.
    # At 2.5, past the target, V is worse.
    one = torch.ones(1, 1, dtype=torch.float64)

    def loss(values):
        return una.ppo_value_loss(values, 0 * one, one, one.bool(), 0.2)

    assert gradient(loss, value * one).item() == pytest.approx(slope, abs=1e-12)


def test_value_loss_never_reads_masked_columns():
    values, old, targets, clip = value_case()
    expected = una.ppo_value_loss(values, old, targets, MASK, clip)
    garbage = [x.where(MASK, 7.0 + 2 * i) for i, x in enumerate((values, old, targets))]
    assert torch.equal(una.ppo_value_loss(*garbage, MASK, clip), expected)
    slope = gradient(lambda x: una.ppo_value_loss(x, old, targets, MASK, clip), values)
    assert (slope[~MASK] == 0).all()


# ---------------------------------------------------------------- what stands off the mask
def a_loss(function, *settings):
    """The function as a number of its float tensors alone: every element weighs something else."""
    def loss(*floats):
        results = function(*floats, MASK, *settings)
        results = results if isinstance(results, tuple) else (results,)
        return sum((normal(9, *x.shape) * x).sum() for x in results)
    return loss


def token_rewards(logprobs, ref_logprobs, mask, beta):
    return una.ppo_token_rewards(normal(8, 8), logprobs, ref_logprobs, mask, beta)


PPO = {
    "token rewards": (a_loss(token_rewards, 0.3), 2),
    "advantages": (a_loss(una.ppo_advantages, 0.9), 2),
    "policy loss": (a_loss(una.ppo_policy_loss, 0.2), 3),
    "value loss": (a_loss(una.ppo_value_loss, 0.2), 3),
}


def value_and_gradients(loss, floats):
    floats = [x.detach().requires_grad_() for x in floats]
    value = loss(*floats)
    return value.detach(), torch.autograd.grad(value, floats)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PPO)
def test_nothing_off_the_mask_is_in_the_value_or_the_gradient(name, garbage):
    # Values are those of the slow loops above; here they must be the same, and so the gradients,
    # with garbage in any one input, and in all. 0 * NaN is NaN: masking the result is too late.
    loss, n = PPO[name]
    clean = [0.4 * normal(i, 8, 8) for i in range(n)]
    expected, slopes = value_and_gradients(loss, clean)
    assert all((slope[~MASK] == 0).all() and slope[MASK].any() for slope in slopes)
    for spoilt in [{i} for i in range(n)] + [set(range(n))]:
        floats = [x.where(MASK, garbage) if i in spoilt else x for i, x in enumerate(clean)]
        value, gradients = value_and_gradients(loss, floats)
        assert torch.equal(value, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, slopes))


def test_masking_the_result_alone_would_leave_nan_in_the_gradient():
    old, advantages = normal(0, 8, 8), normal(1, 8, 8)
    logprobs = (old + 0.1).where(MASK, math.nan)

    def naive(logprobs):
        ratio = (logprobs - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -gain.where(MASK, 0.0).sum(1)

    assert near(naive(logprobs), una.ppo_policy_loss(logprobs, old, advantages, MASK, 0.2))
    assert gradient(naive, logprobs).isnan().any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_the_reward_of_a_response_without_tokens_is_nobodys(garbage):
    mask = torch.tensor([[False, True, True, False], [False, False, False, False]])
    zero = torch.zeros(2, 4, dtype=torch.float64)
    reward = torch.tensor([2.0, garbage], dtype=torch.float64)
    rewards = una.ppo_token_rewards(reward, zero, zero, mask, 0.3)
    assert rewards.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0]]
    slope = gradient(lambda r: una.ppo_token_rewards(r, zero, zero, mask, 0.3), reward)
    assert slope.tolist() == [1, 0]


# ---------------------------------------------------------------- ratios too large for the dtype
def one_token(log_ratio, advantage, dtype, loss=una.ppo_policy_loss):
    """Loss, and its slope in the log-probability, of one token; clip 0.2."""
    one = torch.ones(1, 1, dtype=dtype)
    logprobs = (0 * one).requires_grad_()
    value = loss(logprobs, -log_ratio * one, advantage * one, one.bool(), 0.2)
    return value.item(), torch.autograd.grad(value.sum(), logprobs)[0].item()


def unbounded(logprobs, old_logprobs, advantages, mask, clip):
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum(1)


LARGE = [(torch.float32, 100.0), (torch.float32, 1e4), (torch.float64, 1e3), (torch.float64, 1e5)]


@pytest.mark.parametrize("dtype, log_ratio", LARGE)
def test_a_ratio_that_overflows_is_0_where_the_advantage_is_0(dtype, log_ratio):
    assert one_token(log_ratio, 0.0, dtype) == (0.0, 0.0)
    assert math.isnan(one_token(log_ratio, 0.0, dtype, unbounded)[0])   # inf * 0


@pytest.mark.parametrize("dtype, log_ratio", [(torch.float32, 89.0), *LARGE])
def test_a_ratio_that_overflows_is_stopped_where_clipping_stops_it(dtype, log_ratio):
    # -min(w, 1.2) A at A = 1: flat there.
    loss, slope = one_token(log_ratio, 1.0, dtype)
    assert loss == pytest.approx(-1.2, abs=1e-6) and slope == 0
    assert math.isnan(one_token(log_ratio, 1.0, dtype, unbounded)[1])   # 0 * inf


@pytest.mark.parametrize("advantage", [-1.0, -100.0])
@pytest.mark.parametrize("dtype, log_ratio", LARGE)
def test_a_ratio_that_overflows_is_held_finite_where_nothing_clips_it(dtype, log_ratio, advantage):
    # -w A, with w held at the largest exponent but a tenth, and constant there.
    loss, slope = one_token(log_ratio, advantage, dtype)
    held = 0.9 * math.log(torch.finfo(dtype).max)
    assert math.log(loss / -advantage) == pytest.approx(held, rel=1e-6) and slope == 0
    assert math.isinf(one_token(log_ratio, advantage, dtype, unbounded)[0])


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dtype, log_ratio", [
    (torch.float32, 79.0), (torch.float32, 20.0), (torch.float32, -100.0),
    (torch.float64, 600.0), (torch.float64, 20.0), (torch.float64, -700.0),
])
def test_a_ratio_that_does_not_overflow_is_exact(dtype, log_ratio, advantage):
    loss, slope = one_token(log_ratio, advantage, dtype)
    assert (loss, slope) == one_token(log_ratio, advantage, dtype, unbounded)
    if advantage < 0 < log_ratio:   # -w A, and its slope the same; the other signs are clipped
        assert loss == slope == pytest.approx(math.exp(log_ratio), rel=1e-5)


def test_a_token_that_the_policy_has_given_up_has_ratio_0():
    assert one_token(-math.inf, 1.0, torch.float64) == (0.0, 0.0)


# ---------------------------------------------------------------- masks and shapes
@pytest.mark.parametrize("row", ["1001", "101", "0101", "1011000", "00100100"])
def test_advantages_refuse_a_hole_in_the_mask(row):
    # It would pass for time, lambda a column, and drop the value behind it. One such row is enough.
    for rows in ([row], ["1" * len(row), row]):
        mask = torch.tensor([[bit == "1" for bit in row] for row in rows])
        with pytest.raises(ValueError, match="consecutive"):
            una.ppo_advantages(torch.ones(mask.shape), torch.ones(mask.shape), mask, 0.9)


@pytest.mark.parametrize("row", ["1", "0", "111", "011", "110", "0110", "000", "0100"])
def test_advantages_take_prompt_padding_and_even_no_token(row):
    mask = torch.tensor([[bit == "1" for bit in row]])
    advantages, targets = una.ppo_advantages(torch.ones(mask.shape), 0.0 * mask, mask, 1.0)
    to_go = [row[t:].count("1") * (row[t] == "1") for t in range(len(row))]
    assert advantages.tolist() == targets.tolist() == [to_go]


@pytest.mark.parametrize("function, arguments", [
    (una.ppo_token_rewards, ("reward", "logprobs", "ref_logprobs", "mask")),
    (una.ppo_advantages, ("rewards", "values", "mask")),
    (una.ppo_policy_loss, ("logprobs", "old_logprobs", "advantages", "mask")),
    (una.ppo_value_loss, ("values", "old_values", "targets", "mask")),
])
def test_ppo_refuses_shapes_that_would_broadcast_and_names_them(function, arguments):
    # (B,) is the reward of each response, all else is (B, T).
    shapes = {name: (4,) if name == "reward" else (4, 3) for name in arguments}
    ones = lambda shapes: [torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float32)
                           for name, shape in shapes.items()]
    function(*ones(shapes), 0.2)
    for name in arguments:
        for wrong in [(1,), (4, 1), (1, 4)] if name == "reward" else [(4, 1), (1, 3), (4, 3, 1)]:
            with pytest.raises(ValueError) as error:
                function(*ones({**shapes, name: wrong}), 0.2)
            assert "shapes differ" in str(error.value) and f"{name} {wrong}" in str(error.value)


# ---------------------------------------------------------------- PPO maximises Eq. 3
def tabular_world():
    """{a, b, end}, three tokens, 15 responses, and a policy with free logits for each prefix.

    There are 7 prefixes, of up to two words. node (15, 3) is the number of what stands before.
    """
    end = 2
    responses = torch.tensor([y for y in product((0, 1, end), repeat=3)
                              if all(after == end for y_t, after in zip(y, y[1:]) if y_t == end)])
    first, second = responses[:, 0], responses[:, 1]
    mask = torch.stack([first >= 0, first != end, (first != end) & (second != end)], dim=1)
    node = torch.stack([0 * first, 1 + first, 3 + 2 * first + second], dim=1).where(mask, 0)

    def logprobs(logits):   # (7, 3) -> (15, 3), 0 behind the end
        return logits.log_softmax(-1)[node].gather(2, responses[..., None]).squeeze(2) * mask
    return SimpleNamespace(mask=mask, node=node, responses=responses, logprobs=logprobs,
                           rewards=normal(0, 15), beta=0.3, theta=normal(1, 7, 3),
                           ref=logprobs(normal(2, 7, 3)), no_values=0 * normal(0, 15, 3))


def expected_ppo_gradient(world, values, lam=1.0):
    """E_{y~pi} grad L at ratio 1: every response, weighted with its probability."""
    old = world.logprobs(world.theta)
    rewards = una.ppo_token_rewards(world.rewards, old, world.ref, world.mask, world.beta)
    advantages, _ = una.ppo_advantages(rewards, values, world.mask, lam)

    def loss(theta):
        return una.ppo_policy_loss(world.logprobs(theta), old, advantages, world.mask, 0.2)

    return gradient(lambda theta: old.sum(1).exp() * loss(theta), world.theta)


def eq03_gradient(world):
    def J(theta):
        logprobs, ref = world.logprobs(theta).sum(1), world.ref.sum(1)
        return una.rlhf_objective(logprobs, ref, world.rewards, world.beta)

    return gradient(J, world.theta)


def test_eq03_the_expected_ppo_gradient_is_minus_the_gradient_of_j():
    # grad J = E (r - beta rho) grad log pi(y): the KL's own term E grad log pi is 0. Rewards of
    # earlier tokens, which reward-to-go leaves out, are 0 in expectation too, since given the past
    # E grad log pi(y_t) = 0.
    world = tabular_world()
    assert world.logprobs(world.theta).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    exact = eq03_gradient(world)
    assert near(expected_ppo_gradient(world, world.no_values), -exact, 1e-10)
    assert exact.abs().max() > 0.05


def test_eq03_any_values_of_the_past_leave_that_gradient_alone_and_values_of_the_token_do_not():
    # The same zero again, times V(x, y_<t). A value that has seen y_t is no baseline: one column
    # too late, and PPO is biased.
    world = tabular_world()
    exact = eq03_gradient(world)
    assert near(expected_ppo_gradient(world, normal(3, 7)[world.node]), -exact, 1e-10)
    assert not near(expected_ppo_gradient(world, normal(3, 3)[world.responses]), -exact, 0.02)


def test_eq03_and_eq07_ppo_and_una_online_agree_on_the_expected_gradient():
    # E grad (r - beta rho)^2 = -2 beta E (r - beta rho) grad log pi = -2 beta grad J,
    # the samples' distribution held fixed.
    world = tabular_world()
    old, ref = world.logprobs(world.theta).sum(1), world.ref.sum(1)

    def loss(theta):
        implicit = una.implicit_reward(world.logprobs(theta).sum(1), ref, world.beta)
        return una.una_reward_loss(implicit, world.rewards)

    una_gradient = gradient(lambda theta: old.exp() * loss(theta), world.theta)
    ppo_gradient = expected_ppo_gradient(world, world.no_values)
    assert near(una_gradient, 2 * world.beta * ppo_gradient, 1e-10)


def test_eq03_with_the_true_values_any_lambda_gives_the_gradient_of_j():
    # V(x, y_<t) = E sum_{s>=t} r_s makes E[delta_s | y_<s] = 0,
    # so later deltas add noise and no mean: lambda is free.
    world = tabular_world()
    old = world.logprobs(world.theta)
    rewards = una.ppo_token_rewards(world.rewards, old, world.ref, world.mask, world.beta)
    to_go, p = rewards.flip(1).cumsum(1).flip(1), old.sum(1).exp()[:, None] * world.mask
    mass, total = (torch.zeros(7, dtype=torch.float64).index_add(0, world.node.view(-1), x.view(-1))
                   for x in (p, p * to_go))
    values, exact = (total / mass)[world.node], eq03_gradient(world)
    for lam in (0.0, 0.95):
        assert near(expected_ppo_gradient(world, values, lam), -exact, 1e-10)
        assert not near(expected_ppo_gradient(world, world.no_values, lam), -exact, 1e-3)
