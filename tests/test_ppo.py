"""PPO, which UNA would replace: its equations against slow loops and full enumeration."""
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import una
from helpers import gradient, near, normals

# Prompt columns first, padding last: responses of one token to all eight, with and without
# something on either side.
SPANS = [(0, 8), (3, 8), (0, 3), (2, 6), (4, 5), (7, 8), (0, 1), (1, 4)]
MASK = torch.tensor([[start <= t < end for t in range(8)] for start, end in SPANS])
TOKENS = [(i, t) for i, (start, end) in enumerate(SPANS) for t in range(start, end)]
CLIP = 0.2


def finite_differences(loss, x, step=1e-6):
    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        bump = F.one_hot(torch.tensor(i), x.numel()).view(x.shape) * step
        slopes.view(-1)[i] = (loss(x + bump) - loss(x - bump)).sum() / (2 * step)
    return slopes


def matrices(seed, n):
    """n tensors (8, 8) of standard normal numbers."""
    return normals(seed)(n, 8, 8).unbind()


# ---------------------------------------------------------------- log-probabilities of tokens
def test_token_logprobs_are_of_the_token_behind_each_column_and_add_up_to_the_sequence_logprob():
    tokens = torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0))
    logits, mask = normals(1)(8, 9, 5), F.pad(MASK, (1, 0))    # nothing predicts column 0
    expected, shifted = torch.zeros(2, 8, 8, dtype=torch.float64)
    for i, t in TOKENS:
        p = logits[i, t].softmax(-1)
        expected[i, t] = math.log(p[tokens[i, t + 1]])
        shifted[i, t] = math.log(p[tokens[i, t]])    # the mistake: logits t scored on token t
    logprobs = una.token_logprobs(logits, tokens, mask)
    assert near(logprobs, expected) and not near(logprobs, shifted, 0.1)
    assert near(logprobs.sum(1), una.sequence_logprob(logits, tokens, mask))


# ---------------------------------------------------------------- rewards of tokens
def test_token_rewards_are_the_slow_loop_and_add_up_to_the_reward_minus_beta_rho():
    # What the policy likes more than the reference costs beta a nat. The reward lands on the last
    # token of the response, never on padding.
    reward, (logprobs, ref) = normals(0)(8), matrices(1, 2)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for i, t in TOKENS:
        expected[i, t] = -0.3 * (logprobs[i, t] - ref[i, t])
        if t + 1 == SPANS[i][1]:
            expected[i, t] += reward[i]
    rewards = una.ppo_token_rewards(reward, logprobs, ref, MASK, 0.3)
    rho = ((logprobs - ref) * MASK).sum(1)
    assert near(rewards, expected) and near(rewards.sum(1), reward - 0.3 * rho)


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


def test_advantages_are_the_double_sum_and_targets_the_advantages_plus_values():
    rewards, values = matrices(0, 2)
    for lam in (0.0, 0.5, 1.0):
        advantages, targets = una.ppo_advantages(rewards, values, MASK, lam)
        assert near(advantages, double_sum(rewards, values, lam)), lam
        assert near(targets, (advantages + values) * MASK), lam
    # Neither lambda is confused with gamma, nor padding with a future.
    advantages, _ = una.ppo_advantages(rewards, values, MASK, 0.5)
    for wrong in (dict(lam=1.0, gamma=0.5), dict(lam=0.5, gamma=0.5),
                  dict(lam=0.5, bootstrap=True)):
        assert not near(advantages, double_sum(rewards, values, **wrong), 0.1), wrong


def test_lambda_1_is_reward_to_go_minus_value_and_lambda_0_is_delta():
    # lambda = 1: the values between telescope, sum_s (r_s + V_{s+1} - V_s) = sum_s r_s - V_t.
    rewards, values = (x * MASK for x in matrices(0, 2))
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, targets = una.ppo_advantages(rewards, values, MASK, 1.0)
    assert near(advantages, (to_go - values) * MASK) and near(targets, to_go * MASK)
    delta = rewards + F.pad(values[:, 1:], (0, 1)) - values
    assert near(una.ppo_advantages(rewards, values, MASK, 0.0)[0], delta * MASK)


# ---------------------------------------------------------------- the policy's loss
def test_policy_loss_is_the_slow_loop_with_the_gradient_of_finite_differences():
    # For A > 0, min(w A, clip(w) A) = A min(w, 1 + eps); for A < 0 it is A max(w, 1 - eps):
    # the other bound never binds.
    old, advantages, change = matrices(0, 3)
    logprobs, expected, cases = old + 0.4 * change, torch.zeros(8, dtype=torch.float64), set()
    for i, t in TOKENS:
        w, a = math.exp(logprobs[i, t] - old[i, t]), advantages[i, t].item()
        expected[i] -= a * min(w, 1 + CLIP) if a > 0 else a * max(w, 1 - CLIP)
        cases.add((a > 0, w > 1 + CLIP, w < 1 - CLIP))
    assert len(cases) == 6    # both signs of A; above the clip range, below it, within
    loss = lambda x: una.ppo_policy_loss(x, old, advantages, MASK, CLIP)
    assert near(loss(logprobs), expected)
    assert near(gradient(loss, logprobs), finite_differences(loss, logprobs), 1e-7)


def test_at_ratio_1_the_policy_loss_is_the_policy_gradient():
    # Also where autograd has to choose: at w = 1 both arguments of the minimum are equal, and so
    # are their gradients. log pi is that of token 0, as softmax logits give it.
    (advantages,), logits = matrices(1, 1), normals(3)(8, 8, 5)
    logprobs = lambda z: z.log_softmax(-1)[..., 0]
    loss = lambda z: una.ppo_policy_loss(logprobs(z), logprobs(logits), advantages, MASK, CLIP)
    assert near(loss(logits), -(advantages * MASK).sum(1))
    expected = gradient(lambda z: -(advantages * logprobs(z) * MASK).sum(1), logits)
    assert near(gradient(loss, logits), expected)


def test_clipping_stops_what_pays_and_nothing_else():
    one = torch.ones(1, 1, dtype=torch.float64)
    for w, a, clipped in [
        (1.5, 2.0, True), (0.5, -2.0, True),       # it moved far where moving pays: no further
        (0.5, 2.0, False), (1.5, -2.0, False),     # far the wrong way: all the way back
        (1.19, 2.0, False), (0.81, 2.0, False), (1.19, -2.0, False), (0.81, -2.0, False),
        (1.21, 2.0, True), (0.79, -2.0, True), (0.79, 2.0, False), (1.21, -2.0, False),
    ]:
        loss = lambda logprobs: una.ppo_policy_loss(logprobs, -one, a * one, one.bool(), CLIP)
        slope = gradient(loss, -one + math.log(w))
        assert near(slope, (0.0 if clipped else -w * a) * one), (w, a)    # d w / d log pi = w


# ---------------------------------------------------------------- the values' loss
def test_value_loss_is_the_slow_loop_with_the_gradient_of_finite_differences():
    old, targets, change = matrices(0, 3)
    values, expected = old + 0.4 * change, torch.zeros(8, dtype=torch.float64)
    for i, t in TOKENS:
        v, before, target = values[i, t], old[i, t], targets[i, t]
        held = min(max(v, before - CLIP), before + CLIP)
        expected[i] += max((v - target) ** 2, (held - target) ** 2) / 2
    loss = lambda x: una.ppo_value_loss(x, old, targets, MASK, CLIP)
    assert near(loss(values), expected)
    assert near(gradient(loss, values), finite_differences(loss, values), 1e-7)
    # Never below half the squared error, which it is within the clip.
    plain = lambda x: 0.5 * ((x - targets) ** 2 * MASK).sum(1)
    assert (loss(values) >= plain(values)).all() and (loss(values) > plain(values) + 0.01).any()
    within = old + (values - old).clamp(-0.19, 0.19)
    assert near(loss(within), plain(within))


def test_a_value_that_moved_far_towards_its_target_stops_and_any_other_goes_on():
    # Old value 0, target 1, clip 0.2. At 0.5 the held value 0.2 is the worse one, and constant.
    # At 2.5, past the target, V is worse.
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = lambda values: una.ppo_value_loss(values, 0 * one, one, one.bool(), CLIP)
    for value, slope in [(0.5, 0.0), (-0.5, -1.5), (0.1, -0.9), (2.5, 1.5)]:
        assert near(gradient(loss, value * one), slope * one), value


# ---------------------------------------------------------------- what stands off the mask
def test_nothing_off_the_mask_is_in_the_value_or_the_gradient():
    # With NaN or infinity in any one input, and in all. 0 * NaN is NaN: masking the result is too
    # late.
    token_rewards = lambda *floats: una.ppo_token_rewards(normals(8)(8), *floats)
    for name, function, setting, n in [("token rewards", token_rewards, 0.3, 2),
                                       ("advantages", una.ppo_advantages, 0.9, 2),
                                       ("policy loss", una.ppo_policy_loss, CLIP, 3),
                                       ("value loss", una.ppo_value_loss, CLIP, 3)]:
        def value_and_gradients(floats):
            """The function as one number: every element of its results weighs something else."""
            floats = [x.detach().requires_grad_() for x in floats]
            results = function(*floats, MASK, setting)
            results = results if isinstance(results, tuple) else (results,)
            value = sum((normals(9)(*x.shape) * x).sum() for x in results)
            return value.detach(), *torch.autograd.grad(value, floats)

        clean = [0.4 * x for x in matrices(0, n)]
        expected = value_and_gradients(clean)
        assert all((slope[~MASK] == 0).all() and slope[MASK].any() for slope in expected[1:]), name
        for garbage in (math.nan, math.inf, -math.inf):
            for spoilt in [{i} for i in range(n)] + [set(range(n))]:
                floats = [x.where(MASK, garbage) if i in spoilt else x for i, x in enumerate(clean)]
                for a, b in zip(value_and_gradients(floats), expected):
                    assert torch.equal(a, b), (name, garbage, spoilt)


def naive(logprobs, old_logprobs, advantages, mask, clip):
    """The policy's loss, but masked too late and with no bound on the ratio."""
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain.where(mask, 0.0).sum(1)


def test_masking_the_result_alone_would_leave_nan_in_the_gradient():
    old, advantages = matrices(0, 2)
    logprobs, others = (old + 0.1).where(MASK, math.nan), (old, advantages, MASK, CLIP)
    assert near(naive(logprobs, *others), una.ppo_policy_loss(logprobs, *others))
    assert gradient(lambda x: naive(x, *others), logprobs).isnan().any()


def test_the_reward_of_a_response_without_tokens_is_nobodys():
    mask = torch.tensor([[False, True, True, False], [False, False, False, False]])
    zero = torch.zeros(2, 4, dtype=torch.float64)
    rewards = lambda reward: una.ppo_token_rewards(reward, zero, zero, mask, 0.3)
    for garbage in (math.nan, math.inf):
        reward = torch.tensor([2.0, garbage], dtype=torch.float64)
        assert rewards(reward).tolist() == [[0, 0, 2, 0], [0, 0, 0, 0]]
        assert gradient(rewards, reward).tolist() == [1, 0]


# ---------------------------------------------------------------- ratios too large for the dtype
def one_token(log_ratio, advantage, dtype, loss=una.ppo_policy_loss):
    """Loss, and its slope in the log-probability, of one token; clip 0.2."""
    one = torch.ones(1, 1, dtype=dtype)
    logprobs = (0 * one).requires_grad_()
    value = loss(logprobs, -log_ratio * one, advantage * one, one.bool(), CLIP)
    return value.item(), torch.autograd.grad(value.sum(), logprobs)[0].item()


def test_a_ratio_that_overflows_is_held_finite_and_makes_no_nan():
    for dtype, log_ratio in [(torch.float32, 89.0), (torch.float32, 100.0), (torch.float32, 1e4),
                             (torch.float64, 1e3), (torch.float64, 1e5)]:
        # -min(w, 1.2) A is flat where A > 0.
        loss, slope = one_token(log_ratio, 1.0, dtype)
        assert loss == pytest.approx(-1.2, abs=1e-6) and slope == 0, log_ratio
        assert one_token(log_ratio, 0.0, dtype) == (0.0, 0.0), log_ratio
        # inf * 0 would be in the loss, 0 * inf in the slope.
        assert math.isnan(one_token(log_ratio, 0.0, dtype, naive)[0]), log_ratio
        assert math.isnan(one_token(log_ratio, 1.0, dtype, naive)[1]), log_ratio
        # Where A < 0 nothing clips -w A: w is held at the largest exponent but a tenth.
        for advantage in (-1.0, -100.0):
            loss, slope = one_token(log_ratio, advantage, dtype)
            held = 0.9 * math.log(torch.finfo(dtype).max)
            assert math.log(loss / -advantage) == pytest.approx(held, rel=1e-6), log_ratio
            assert slope == 0, log_ratio
            assert math.isinf(one_token(log_ratio, advantage, dtype, naive)[0]), log_ratio


def test_a_ratio_that_does_not_overflow_is_exact():
    for dtype, log_ratio in [(torch.float32, 79.0), (torch.float32, 20.0), (torch.float32, -100.0),
                             (torch.float64, 600.0), (torch.float64, -700.0)]:
        for advantage in (-1.0, 0.0, 1.0):
            loss, slope = one_token(log_ratio, advantage, dtype)
            assert (loss, slope) == one_token(log_ratio, advantage, dtype, naive), log_ratio
            if advantage < 0 < log_ratio:    # -w A, and its slope the same; other signs are clipped
                assert loss == slope == pytest.approx(math.exp(log_ratio), rel=1e-5), log_ratio
    # A token that the policy has given up has ratio 0.
    assert one_token(-math.inf, 1.0, torch.float64) == (0.0, 0.0)


# ---------------------------------------------------------------- masks and shapes
def test_advantages_take_prompt_padding_and_even_no_token_and_refuse_a_hole_in_the_mask():
    ones = lambda rows: torch.tensor([[int(bit) for bit in row] for row in rows])
    for row in ("1", "0", "111", "011", "110", "0110", "000", "0100"):
        mask = ones([row]).bool()
        advantages, targets = una.ppo_advantages(torch.ones(mask.shape), 0.0 * mask, mask, 1.0)
        to_go = [row[t:].count("1") * (row[t] == "1") for t in range(len(row))]
        assert advantages.tolist() == targets.tolist() == [to_go], row
    # A hole would pass for time, lambda a column, and drop the value behind it. One such row is
    # enough.
    for row in ("1001", "101", "0101", "1011000", "00100100"):
        for rows in ([row], ["1" * len(row), row]):
            mask = ones(rows).bool()
            with pytest.raises(ValueError, match="^a row of mask has a hole: .* consecutive$"):
                una.ppo_advantages(torch.ones(mask.shape), torch.ones(mask.shape), mask, 0.9)


def test_ppo_refuses_shapes_that_would_broadcast_and_names_them():
    for function, *arguments in [
        (una.ppo_token_rewards, "reward", "logprobs", "ref_logprobs", "mask"),
        (una.ppo_advantages, "rewards", "values", "mask"),
        (una.ppo_policy_loss, "logprobs", "old_logprobs", "advantages", "mask"),
        (una.ppo_value_loss, "values", "old_values", "targets", "mask"),
    ]:
        # (B,) is the reward of each response, all else is (B, T).
        good = {name: torch.ones(4) if name == "reward" else torch.ones(4, 3) for name in arguments}
        good["mask"] = good["mask"].bool()
        function(*good.values(), 0.2)
        for name in arguments:
            shapes = [(1,), (4, 1), (1, 4)] if name == "reward" else [(4, 1), (1, 3), (4, 3, 1)]
            for shape in shapes:
                wrong = {**good, name: torch.ones(shape, dtype=good[name].dtype)}
                with pytest.raises(ValueError, match="shapes differ") as error:
                    function(*wrong.values(), 0.2)
                assert f"{name} {shape}" in str(error.value)


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
                           rewards=normals(0)(15), beta=0.3, theta=normals(1)(7, 3),
                           ref=logprobs(normals(2)(7, 3)), no_values=0 * normals(0)(15, 3))


def expected_ppo_gradient(world, values, lam=1.0):
    """E_{y~pi} grad L at ratio 1: every response, weighted with its probability."""
    old = world.logprobs(world.theta)
    rewards = una.ppo_token_rewards(world.rewards, old, world.ref, world.mask, world.beta)
    advantages, _ = una.ppo_advantages(rewards, values, world.mask, lam)

    def loss(theta):
        losses = una.ppo_policy_loss(world.logprobs(theta), old, advantages, world.mask, CLIP)
        return old.sum(1).exp() * losses

    return gradient(loss, world.theta)


def eq03_gradient(world):
    def J(theta):
        logprobs, ref = world.logprobs(theta).sum(1), world.ref.sum(1)
        return una.rlhf_objective(logprobs, ref, world.rewards, world.beta)

    return gradient(J, world.theta)


def test_eq03_the_expected_ppo_gradient_is_minus_that_of_j_with_any_values_of_the_past():
    # grad J = E (r - beta rho) grad log pi(y): the KL's own term E grad log pi is 0. Rewards of
    # earlier tokens, which reward-to-go leaves out, are 0 in expectation too, since given the past
    # E grad log pi(y_t) = 0. The same zero, times V(x, y_<t), is all that values of the past add.
    world = tabular_world()
    assert world.logprobs(world.theta).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    exact = eq03_gradient(world)
    assert exact.abs().max() > 0.05
    assert near(expected_ppo_gradient(world, world.no_values), -exact, 1e-10)
    assert near(expected_ppo_gradient(world, normals(3)(7)[world.node]), -exact, 1e-10)
    # A value that has seen y_t is no baseline: one column too late, and PPO is biased.
    assert not near(expected_ppo_gradient(world, normals(3)(3)[world.responses]), -exact, 0.02)


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
