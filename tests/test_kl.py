"""The KL on samples: what k1, k2 and k3 are as numbers and as losses. A world of 15 responses, all
listed, in float64: each mean is a sum, and nothing is sampled. And what stands on it: RLOO, GRPO,
and stored samples among fresh ones."""
import copy
import itertools
import math
import statistics

import pytest
import torch

import data
import una
from helpers import close, gradient, near, normals
from lab import exact
from toy import small

# Logits of a policy (15,), the reference's log-probabilities, rewards; the optimum and the policy.
BETA, (theta, logits, rewards) = 0.3, normals(11)(3, 15)
ref, log = logits.log_softmax(-1), lambda logits: logits.log_softmax(-1)
(star, _), p = una.optimal_policy(ref, rewards, BETA), log(theta)
mean = lambda logprobs, values: (logprobs.exp() * values).sum()
kl = lambda p, q: mean(p, p - q)


def test_kl_estimates_k1_and_k3_have_the_kl_for_their_mean_and_k2_nearly():
    means = [mean(p, una.kl_estimate(p, ref, k)) for k in (1, 2, 3)]
    assert close(means[0], kl(p, ref)) and close(means[2], kl(p, ref))
    assert not close(means[1], kl(p, ref), 1e-2)
    assert (una.kl_estimate(p, ref, 3) >= 0).all() and (una.kl_estimate(p, ref, 1) < 0).any()
    with pytest.raises(ValueError, match="k must be 1, 2 or 3, got 4"):
        una.kl_estimate(theta, ref, 4)
    near_by = log(ref + 0.01 * theta)                            # at a small KL k2 has it too
    assert close(mean(near_by, una.kl_estimate(near_by, ref, 2)), kl(near_by, ref), 2e-2)


def test_kl_as_losses_k1_is_no_price_k2_is_the_kls_gradient_and_k3_the_other_kls():
    right, other = (gradient(of, theta) for of in (lambda t: kl(log(t), ref),
                                                   lambda t: kl(ref, log(t))))
    # E grad k: the samples are held fixed.
    k1, k2, k3 = (gradient(lambda t: mean(p, una.kl_estimate(log(t), ref, k)), theta)
                  for k in (1, 2, 3))
    assert near(k1, 0 * theta) and right.abs().max() > 0.1
    assert close(k2, right) and not close(k3, right, 1e-2)
    assert close(k3, other) and not close(k2, other, 1e-2)


def test_kl_k1_in_the_reward_is_a_number_and_gives_the_gradient_of_eq03():
    J = gradient(lambda t: una.rlhf_objective(log(t), ref, rewards, BETA), theta)
    for k, right in ((1, True), (3, False)):
        advantage = rewards - BETA * una.kl_estimate(p, ref, k)
        slope = gradient(lambda t: mean(p, advantage * log(t)), theta)
        assert close(slope, J, 1e-10 if right else 1e-2) == right


def test_kl_k3_in_the_loss_has_its_own_optimum_which_is_not_the_best_policy():
    best = una.k3_optimal_policy(ref, rewards, BETA)
    assert close(best.exp().sum(), 1.0)
    # GRPO's undivided gradient vanishes there and not at pi*. Brute force: test_triangle.py.
    for policy, still in ((best, True), (star, False)):
        step = gradient(lambda t: mean(policy, rewards * log(t) - BETA * una.kl_estimate(
            log(t), ref, 3)), policy)
        assert (step.abs().max() < 1e-9) == still
    two = una.k3_optimal_policy(torch.stack([ref, ref]), torch.stack([rewards, rewards + 5]), BETA)
    assert close(two[0], best) and close(two[1], best)           # a level changes nothing
    assert near(una.k3_optimal_policy(ref, rewards, 1e6), ref, 1e-4)


def test_rloo_is_eq07_with_the_mean_residual_sample_by_sample_but_for_a_factor():
    (policy, ref, rewards), n = normals(3)(3, 12), 4
    loss = lambda p: una.rloo_loss(p, ref, rewards, n, BETA)
    R = rewards - BETA * (policy - ref)                          # its papers', one by one
    groups = torch.stack([R[i - i % n:i - i % n + n] for i in range(12)])
    A = torch.stack([r - (sum(group) - r) / (n - 1) for r, group in zip(R, groups)])
    assert close(loss(policy), -A * policy) and close(gradient(loss, policy), -A)
    eq07 = gradient(lambda p: una.una_reward_loss(
        una.implicit_reward(p, ref, BETA, groups.mean(1)), rewards), policy)
    assert close(eq07 * n / (2 * BETA * (n - 1)), -A)
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"12 responses are no groups of {wrong}"):
            una.rloo_loss(policy, ref, rewards, wrong, BETA)
    with pytest.raises(ValueError, match="shapes differ"):
        una.rloo_loss(policy, ref[:1], rewards, n, BETA)


def test_grpo_is_its_papers_sum_token_by_token():
    normal, n, clip = normals(5), 4, 0.2
    new, old, ref = -normal(3, 8, 5).abs()
    old, rewards = new + 0.4 * old, normal(8)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]] * 2)
    mask = mask > 0
    for divide, scale in ((True, None), (False, 1.0)):
        expected, clipped = [], 0
        for i in range(8):
            group = rewards.tolist()[i - i % n:i - i % n + n]
            spread = scale or statistics.stdev(group) + 1e-4
            A, total = (group[i % n] - statistics.mean(group)) / spread, 0.0
            for t in range(5):
                if mask[i, t]:
                    ratio = math.exp(new[i, t] - old[i, t])
                    held = min(max(ratio, 1 - clip), 1 + clip)
                    clipped += held * A < ratio * A
                    x = math.exp(ref[i, t] - new[i, t])
                    total -= min(ratio * A, held * A) - BETA * (x - math.log(x) - 1)
            expected.append(total / mask[i].sum().item())
        advantage = una.grpo_advantages(rewards, n, divide)
        off = [part.where(mask, math.nan) for part in (new, old, ref)]       # must not matter
        assert close(una.grpo_loss(*off, advantage, mask, BETA, clip), expected) and clipped > 3
    assert not una.grpo_advantages(torch.ones(8), n).any()       # a group that is all alike
    slope = gradient(lambda p: una.grpo_loss(p, *off[1:], advantage, mask, BETA, clip), off[0])
    assert slope.isfinite().all() and not slope[~mask].any()
    with pytest.raises(ValueError, match="shapes differ"):
        una.grpo_loss(new, old, ref, advantage[:1], mask, BETA, clip)


def token_loss(world, rewards, k):
    """Of logits theta (X, 1 + W, V) behind each prefix: GRPO's loss, summed over the tokens, of all
    responses to each prompt, each as often as pi gives it, with A = r."""
    words = data.ENCODING.n_vocab - 1
    responses, mask = exact.all_responses(words + 1, data.MAX_TOKENS, data.EOT)
    first = (responses[:, 0] + 1).clamp(max=words)               # the prefix of a second token
    tokens = lambda behind: torch.stack([behind[:, 0, responses[:, 0]],
                                         behind[:, first, responses[:, 1]]], 2).where(mask, 0.0)

    def loss(theta):
        p, q = tokens(theta.log_softmax(-1)), tokens(prefix_logits(world.ref_logprobs))
        every = [part.flatten(0, 1) for part in (p, p.detach(), q)]
        lost = una.grpo_loss(*every, rewards.flatten(), mask.repeat(len(p), 1), BETA, 0.2, k)
        return lost * mask.sum(1).repeat(len(p)) * p.sum(2).flatten().detach().exp()
    return loss


def prefix_logits(logprobs):
    """log pi(token | prefix) (X, 1 + W, V), the end-of-text last, of all responses' (X, Y)."""
    words = data.ENCODING.n_vocab - 1
    none, one, two = logprobs.split([1, words, words ** 2], 1)
    begins = torch.cat([two.view(len(none), words, words), one[..., None]], 2)
    return torch.cat([torch.cat([begins.logsumexp(2), none], 1)[:, None], begins], 1).log_softmax(2)


@pytest.fixture
def tree(language):
    """The small world, with rewards that depend on both words."""
    world = copy.copy(small().worlds["train"])
    world.rewards = world.rewards + 0.5 * normals(8)(*world.rewards.shape)
    return world


def test_grpo_stands_still_where_each_token_is_tilted_by_what_it_leads_to(tree):
    world = tree
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, BETA)
    whole = una.k3_optimal_policy(world.ref_logprobs, world.rewards, BETA)
    by = {k: exact.by_token(world, world.rewards, BETA, tilt) for k, tilt in (
        (2, lambda *of: una.optimal_policy(*of)[0]), (3, una.k3_optimal_policy))}
    for k, other in ((2, 3), (3, 2)):
        assert close(by[k].exp().sum(1), 1.0)
        slope = {name: gradient(token_loss(world, world.rewards, k), prefix_logits(policy))
                 .abs().max() for name, policy in dict(own=by[k], other=by[other], best=best,
                                                       whole=whole).items()}
        assert slope.pop("own") < 1e-9 and min(slope.values()) > 1e-4, (k, slope)


def test_grpo_divided_stands_still_where_beta_is_times_the_spread_of_its_own_rewards(tree):
    world = small().worlds["train"]
    policy = exact.by_group(world, BETA, una.k3_optimal_policy, rounds=60)
    p, r = policy.exp(), world.rewards
    spread = ((p * r ** 2).sum(1) - (p * r).sum(1) ** 2).sqrt()
    for rewards, still in ((r / spread[:, None], True), (r, False)):
        slope = gradient(token_loss(world, rewards, 3), prefix_logits(policy)).abs().max()
        assert (slope < 1e-6) == still


def test_grpo_in_groups_has_the_mean_advantage_of_a_reward_among_others_of_the_policy(tree):
    world, n = tree, 4
    world.rewards = (2 * world.rewards).round() / 2              # a few values
    told = exact.advantages_in_groups(world, world.ref_logprobs, n, draws=20_000)
    drawn = world.ref_logprobs.exp().multinomial(40_000 * n, True)           # whole responses
    rewards = world.rewards.gather(1, drawn)
    advantages = una.grpo_advantages(rewards.flatten(), n).view(rewards.shape)
    for x, value in itertools.product(range(len(rewards)), rewards.unique()):
        seen = advantages[x][rewards[x] == value]
        if len(seen) > 1000:
            off = 5 * seen.std() * (len(seen) ** -0.5 + 20_000 ** -0.5)
            assert (told[x][world.rewards[x] == value] - seen.mean()).abs().max() < off
    assert not close(told, world.rewards / world.rewards.std(), 0.1)         # no straight line


def test_eq07_with_the_mean_residual_has_pi_star_for_its_minimum_whoever_drew_the_samples():
    residual = lambda t: rewards - BETA * (log(t) - ref)
    # Eq. 7 of the policy's logits, on samples of mu, with b for f(x) + c.
    eq07 = lambda t, mu, b: (mu * una.una_reward_loss(
        una.implicit_reward(log(t), ref, BETA, b), rewards)).sum()
    held = lambda t, mu: (mu * residual(t)).sum().detach()
    for share in (0.25, 1.0):                                    # of pi_ref's samples
        mu = (1 - share) * p.exp() + share * ref.exp()
        loss = lambda t: eq07(t, mu, held(t, mu))
        variance = lambda t: (mu * residual(t) ** 2).sum() - (mu * residual(t)).sum() ** 2
        # No gradient is lost in b. The variance is 0 where all residuals are alike: eq18.
        assert close(loss(theta), variance(theta)) and variance(theta) > 0.01
        assert close(gradient(loss, theta), gradient(variance, theta))
        assert close(loss(star), 0.0, 1e-12)
    # With b = 0 in its place, or with weights where pi has given a response up, it is another.
    assert gradient(lambda t: eq07(t, ref.exp(), 0.0), star).abs().max() > 1e-2
    gone, most = theta.clone(), rewards.argmax()
    gone[most] = -60.0
    stored, weighted = (gradient(lambda t: eq07(t, mu, held(gone, mu)), gone)[most]
                        for mu in (ref.exp(), gone.softmax(-1)))
    assert stored < -0.1 and abs(weighted) < 1e-9                # who brings it back
