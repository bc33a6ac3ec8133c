"""PPO, which UNA would replace: its equations against slow loops and full enumeration; then its
inner steps in train.py and the reward model, on real prompts."""
import math
from types import SimpleNamespace

import pytest
import torch

import data
import train
import una
from helpers import gpt, gradient, gradient_in, moved, near, normals
from lab.exact import all_responses
from model import ScalarGPT
from toy import changed, small

# Responses of one token to all eight, with and without a prompt and padding.
SPANS = [(0, 8), (3, 8), (0, 3), (2, 6), (4, 5), (7, 8), (0, 1), (1, 4)]
MASK = torch.tensor([[start <= t < end for t in range(8)] for start, end in SPANS])
TOKENS = [(i, t) for i, (start, end) in enumerate(SPANS) for t in range(start, end)]
CLIP = 0.2


def matrices(seed, n):
    return normals(seed)(n, 8, 8).unbind()


def slow_advantages(rewards, values, lam, gamma=1.0, behind=0.0):
    """A_t = sum_k lam^k delta_{t+k} of the tokens of one response: lists. Undiscounted, and without
    a value behind the last token: gamma and behind are two mistakes, for the controls."""
    values = [*values, behind]
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, values[1:])]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


def slow_policy_loss(logprob, old, a):
    """Of one token: A min(w, 1 + eps) for A > 0, A max(w, 1 - eps) for A < 0, with a minus; and its
    slope. Clipping stops what pays and nothing else."""
    w = math.exp(logprob - old)
    held = min(w, 1 + CLIP) if a > 0 else max(w, 1 - CLIP)
    return -a * held, -a * w if held == w else 0


def slow_value_loss(v, old, target):
    """And its slope: the held value is constant where it is held."""
    held = min(max(v, old - CLIP), old + CLIP)
    of_held = (held - target) ** 2 > (v - target) ** 2
    return max((v - target) ** 2, (held - target) ** 2) / 2, 0 if of_held else v - target


def naive(logprobs, old_logprobs, advantages, mask, clip):
    """The policy's loss, but masked too late and with no bound on the ratio."""
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain.where(mask, 0.0).sum(1)


def one_token(log_ratio, advantage, dtype=torch.float64, loss=una.ppo_policy_loss):
    """Loss, and its slope in the log-probability, of one token; clip 0.2."""
    one = torch.ones(1, 1, dtype=dtype)
    logprobs = (0 * one).requires_grad_()
    value = loss(logprobs, -log_ratio * one, advantage * one, one.bool(), CLIP)
    return value.item(), torch.autograd.grad(value.sum(), logprobs)[0].item()


def test_token_rewards_are_the_slow_loop_and_add_up_to_the_reward_minus_beta_rho():
    reward, (logprobs, ref), expected = normals(0)(8), matrices(1, 2), torch.zeros(8, 8).double()
    for i, t in TOKENS:
        last = t + 1 == SPANS[i][1]
        expected[i, t] = -0.3 * (logprobs[i, t] - ref[i, t]) + (reward[i] if last else 0)
    rewards = una.ppo_token_rewards(reward, logprobs, ref, MASK, 0.3)
    rho = ((logprobs - ref) * MASK).sum(1)
    assert near(rewards, expected) and near(rewards.sum(1), reward - 0.3 * rho)
    mask, zero = torch.tensor([[False, True, True, False], [False] * 4]), torch.zeros(2, 4)
    rewards = una.ppo_token_rewards(torch.tensor([2.0, math.nan]), zero, zero, mask, 0.3)
    assert rewards.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0]]


def test_advantages_are_the_double_sum_and_targets_the_advantages_plus_values():
    rewards, values = matrices(0, 2)

    def slow(lam, gamma=1.0, bootstrap=False):
        advantages = torch.zeros(8, 8, dtype=torch.float64)
        for i, (start, end) in enumerate(SPANS):
            behind = values[i, end] if bootstrap and end < 8 else 0.0
            advantages[i, start:end] = torch.stack(slow_advantages(
                rewards[i, start:end], values[i, start:end], lam, gamma, behind))
        return advantages

    for lam in (0.0, 0.5, 1.0):
        advantages, targets = una.ppo_advantages(rewards, values, MASK, lam)
        assert near(advantages, slow(lam)), lam
        assert near(targets, (advantages + values) * MASK), lam
    advantages, _ = una.ppo_advantages(rewards, values, MASK, 0.5)
    for wrong in (slow(1.0, gamma=0.5), slow(0.5, gamma=0.5), slow(0.5, bootstrap=True)):
        assert not near(advantages, wrong, 0.1)


def test_both_losses_and_their_slopes_are_the_slow_loops():
    old, fixed, change = matrices(0, 3)              # fixed: advantages, or targets
    new = old + 0.4 * change
    new[0, 0] = old[0, 0]                            # both arguments of the minimum are equal here
    ratios, advantages = (new - old)[MASK].exp().tolist(), fixed[MASK].tolist()
    # Both signs of A; above the clip range, below it, within.
    assert len({(a > 0, w > 1 + CLIP, w < 1 - CLIP) for w, a in zip(ratios, advantages)}) == 6
    for fast, slow in [(una.ppo_policy_loss, slow_policy_loss),
                       (una.ppo_value_loss, slow_value_loss)]:
        losses, slopes = torch.zeros(8).double(), torch.zeros(8, 8).double()
        for i, t in TOKENS:
            loss, slopes[i, t] = slow(new[i, t], old[i, t], fixed[i, t])
            losses[i] += loss
        loss = lambda new: fast(new, old, fixed, MASK, CLIP)
        assert near(loss(new), losses) and near(gradient(loss, new), slopes), slow


def test_nothing_off_the_mask_is_in_the_value_or_the_gradient():
    # With NaN or infinity in any input. 0 * NaN is NaN: masking the result is too late.
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
            for i in range(n):
                floats = [*clean[:i], clean[i].where(MASK, garbage), *clean[i + 1:]]
                for a, b in zip(value_and_gradients(floats), expected):
                    assert torch.equal(a, b), (name, garbage, i)
    old, advantages = matrices(0, 2)
    logprobs, others = (old + 0.1).where(MASK, math.nan), (old, advantages, MASK, CLIP)
    assert near(naive(logprobs, *others), una.ppo_policy_loss(logprobs, *others))
    assert gradient(lambda x: naive(x, *others), logprobs).isnan().any()


def test_a_ratio_is_exact_and_one_that_overflows_is_held_finite_and_makes_no_nan():
    for dtype, log_ratio in (torch.float32, 79.0), (torch.float64, 600.0):
        loss, slope = one_token(log_ratio, -1.0, dtype)          # -w A, and its slope the same
        assert loss == slope == pytest.approx(math.exp(log_ratio), rel=1e-5), log_ratio
    assert one_token(-math.inf, 1.0) == (0.0, 0.0)    # a token that the policy has given up
    for dtype, log_ratio in (torch.float32, 89.0), (torch.float64, 1e3):
        loss, slope = one_token(log_ratio, 1.0, dtype)
        assert loss == pytest.approx(-1.2, abs=1e-6) and slope == 0, log_ratio
        assert one_token(log_ratio, 0.0, dtype) == (0.0, 0.0), log_ratio
        assert math.isnan(one_token(log_ratio, 0.0, dtype, naive)[0]), log_ratio
        assert math.isnan(one_token(log_ratio, 1.0, dtype, naive)[1]), log_ratio
        # Where A < 0 nothing clips -w A: w is held at the largest exponent but a tenth.
        loss, slope = one_token(log_ratio, -100.0, dtype)
        held = 0.9 * math.log(torch.finfo(dtype).max)
        assert math.log(loss / 100) == pytest.approx(held, rel=1e-6) and slope == 0, log_ratio


def test_advantages_refuse_a_hole_in_the_mask():
    # A hole would pass for time, lambda a column. One such row is enough.
    for row in ([1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]):
        mask = torch.tensor([[1, 1, 1, 1], row]).bool()
        with pytest.raises(ValueError, match="a row of mask has a hole"):
            una.ppo_advantages(torch.ones(2, 4), torch.ones(2, 4), mask, 0.9)


def test_ppo_refuses_shapes_that_would_broadcast_and_names_them():
    for function, *arguments in [
        (una.ppo_token_rewards, "reward", "logprobs", "ref_logprobs", "mask"),
        (una.ppo_advantages, "rewards", "values", "mask"),
        (una.ppo_policy_loss, "logprobs", "old_logprobs", "advantages", "mask"),
        (una.ppo_value_loss, "values", "old_values", "targets", "mask")]:
        good = {name: torch.ones(4) if name == "reward" else torch.ones(4, 3) for name in arguments}
        good["mask"] = good["mask"].bool()
        for name in arguments:
            for shape in (4, 1), (1,) if name == "reward" else (1, 3):
                wrong = {**good, name: torch.ones(shape, dtype=good[name].dtype)}
                with pytest.raises(ValueError, match="shapes differ") as error:
                    function(*wrong.values(), 0.2)
                assert f"{name} {shape}" in str(error.value)


def test_eq03_and_eq07_ppo_has_the_gradient_of_j_and_of_una_online_in_expectation():
    # {a, b, end}: three tokens, 15 responses, and a policy with free logits for each of 7 prefixes,
    # of up to two words. node (15, 3) is the number of what stands before a token.
    end, beta = 2, 0.3
    responses, mask = all_responses(3, 3, end)
    first, second = responses[:, 0], responses[:, 1]
    node = torch.stack([0 * first, 1 + first, 3 + 2 * first + second], dim=1).where(mask, 0)

    def logprobs(logits):   # (7, 3) -> (15, 3), 0 behind the end
        return logits.log_softmax(-1)[node].gather(2, responses[..., None]).squeeze(2) * mask

    theta, ref, rewards = normals(1)(7, 3), logprobs(normals(2)(7, 3)), normals(0)(15)
    old = logprobs(theta)
    p = old.sum(1).exp()                             # of each response
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    token_rewards = una.ppo_token_rewards(rewards, old, ref, mask, beta)

    def ppo(values, lam=1.0):
        """E_{y~pi} grad L at ratio 1: every response, weighted with its probability."""
        advantages, _ = una.ppo_advantages(token_rewards, values, mask, lam)
        loss = lambda logits: una.ppo_policy_loss(logprobs(logits), old, advantages, mask, CLIP)
        return gradient(lambda logits: p * loss(logits), theta)

    J = lambda logits: una.rlhf_objective(logprobs(logits).sum(1), ref.sum(1), rewards, beta)
    exact, zero = gradient(J, theta), 0 * old
    assert exact.abs().max() > 0.05
    # Given the past E grad log pi(y_t) = 0: times V(x, y_<t), that is all that values add.
    assert near(ppo(zero), -exact, 1e-10) and near(ppo(normals(3)(7)[node]), -exact, 1e-10)
    # A value that has seen y_t is no baseline: one column too late, and PPO is biased.
    assert not near(ppo(normals(3)(3)[responses]), -exact, 0.02)
    # The true values make E[delta_s | y_<s] = 0: later deltas add no mean, and lambda is free.
    to_go, weight = token_rewards.flip(1).cumsum(1).flip(1), p[:, None] * mask
    of_node = lambda x: torch.zeros(7).double().index_add(0, node.view(-1), x.view(-1))
    true_values = (of_node(weight * to_go) / of_node(weight))[node]
    for lam in (0.0, 0.95):
        assert near(ppo(true_values, lam), -exact, 1e-10) and not near(ppo(zero, lam), -exact, 1e-3)
    # Eq. 7: E grad (r - beta rho)^2 = -2 beta grad J, the samples' distribution held fixed.
    implicit = lambda logits: una.implicit_reward(logprobs(logits).sum(1), ref.sum(1), beta)
    una_online = gradient(lambda logits: p * una.una_reward_loss(implicit(logits), rewards), theta)
    assert near(una_online, 2 * beta * ppo(zero), 1e-10)


def ppo_case():
    """A reference, a policy and a value model, all different, and a batch of the policy's."""
    reference = gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE, 1, 2, 16, noise=0.3)
    policy, value = moved(reference, 0.1, 1), moved(ScalarGPT(reference).double(), 0.1, 2)
    shared = SimpleNamespace(reference=reference, reward_model=None)
    batch = next(train.fresh_batches(policy, value, shared, 36, 0))
    assert len(batch.mask.sum(1).unique()) > 2
    return reference, policy, value, batch


def test_the_ratio_is_1_at_first_and_what_is_old_stays_old_and_carries_no_gradient():
    _, policy, value, batch = ppo_case()
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=0.003)
    train.ppo(policy, batch, 0.25)
    response, names = batch.mask[:, 3:], ("old_logprobs", "old_values", "advantages", "targets")
    first = [getattr(batch, name).clone() for name in names]
    old_logprobs, old_values, advantages, targets = first
    for step in range(3):
        loss = train.ppo(policy, batch, 0.25)
        for name, before in zip(names, first):
            now = getattr(batch, name)
            assert torch.equal(now, before) and not now.requires_grad, name
        logprobs = train.logprob(policy, batch.tokens, batch.mask, una.token_logprobs)
        values = value(batch.tokens)[:, 2:-1]                    # before each token
        moves = [(new - old)[response].abs().max()
                 for new, old in ((logprobs, old_logprobs), (values, old_values))]
        assert min(moves) > 1e-4 if step else max(moves) < 1e-12
        expected = una.ppo_policy_loss(logprobs, old_logprobs, advantages, response, train.PPO_CLIP)
        expected += una.ppo_value_loss(values, old_values, targets, response, train.PPO_CLIP)
        assert loss.shape == (36,) and near(loss, expected)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        assert all(p.grad.any() for model in (policy, value) for p in model.parameters())
    assert min(moves) > train.PPO_CLIP                           # so both were clipped


def test_eq03_the_first_losses_and_gradient_are_those_by_hand_the_policy_gradient(monkeypatch):
    # With ratio 1 and V = V_old nothing is clipped: L = -sum_t A_t (less the mean of all tokens)
    # + 1/2 sum_t A_t^2 (as it is, for target - V is A), and grad L = -sum_t A_t grad log pi(y_t).
    reference, policy, value, batch = ppo_case()
    monkeypatch.setattr(train, "PPO_LAMBDA", 0.9)
    losses, advantages = train.ppo(policy, batch, 0.25), []
    for row, n, reward in zip(batch.tokens, batch.mask.sum(1).tolist(), batch.rewards.tolist()):
        pi, ref = (model(row[None])[0].log_softmax(-1) for model in (policy, reference))
        v = [value(row[None, :t])[0, -1].item() for t in range(3, 3 + n)]
        r = [-0.25 * (pi[t - 1, row[t]] - ref[t - 1, row[t]]).item() for t in range(3, 3 + n)]
        r[-1] += reward
        advantages.append(slow_advantages(r, v, 0.9))
    flat = [a for of_one in advantages for a in of_one]
    mean = sum(flat) / len(flat)
    expected = [sum(-(a - mean) + a * a / 2 for a in of_one) for of_one in advantages]
    assert losses.tolist() == pytest.approx(expected, abs=1e-9) and abs(mean) > 0.1
    logprobs = train.logprob(policy, batch.tokens, batch.mask, una.token_logprobs)
    by_policy_gradient = -sum((a - mean) * of_token for row, of_one in zip(logprobs, advantages)
                              for of_token, a in zip(row, of_one))
    slopes = (gradient_in(policy, loss) for loss in (losses.sum(), by_policy_gradient))
    assert all(near(a, b, 1e-9) for a, b in zip(*slopes))


def test_eq02_the_reward_model_learns_the_order_of_rewards(language):
    # Of pairs: coin flips of Eq. 1, not rewards. Asked about other responses.
    settings, reference = changed(small().settings, judged=3200, batch=96), small().reference
    feedback, other = (train.collect_feedback(settings, seed, reference) for seed in (0, 1))
    start, model = (train.train_reward_model(changed(settings, steps=steps), 0, reference, feedback,
                                             1e-2) for steps in (0, 300))
    assert torch.equal(start.hidden(feedback.tokens), reference.hidden(feedback.tokens))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    judged, true = (rewards.view(-1, 2) for rewards in (
        train.model_reward(model, other.tokens, other.mask), other.scores.logit()))
    clear = (true[:, 0] - true[:, 1]).abs() > 1
    right = (judged[:, 0] > judged[:, 1]) == (true[:, 0] > true[:, 1])
    assert clear.sum() > 100 and right[clear].float().mean() > 0.85
