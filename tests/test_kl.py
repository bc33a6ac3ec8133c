"""The KL on samples: what k1, k2 and k3 are as numbers and as losses. A world of 15 responses, all
listed, in float64: each mean is a sum, and nothing is sampled."""
import pytest
import torch

import una
from helpers import close, gradient, near, normals

BETA = 0.3


@pytest.fixture
def world():
    """Logits of a policy (15,), log-probabilities of its reference, rewards."""
    normal = normals(11)
    return normal(15), normal(15).log_softmax(-1), normal(15)


def kl(logprobs, ref):
    return (logprobs.exp() * (logprobs - ref)).sum()


def pull(theta, ref, k):
    """E grad k: of samples that are held fixed."""
    p = theta.softmax(-1)
    return gradient(lambda t: (p * una.kl_estimate(t.log_softmax(-1), ref, k)).sum(), theta)


def test_kl_estimates_k1_and_k3_have_the_kl_for_their_mean_and_k2_nearly(world):
    theta, ref, _ = world
    p = theta.log_softmax(-1)
    means = [(p.exp() * una.kl_estimate(p, ref, k)).sum() for k in (1, 2, 3)]
    assert close(means[0], kl(p, ref)) and close(means[2], kl(p, ref))
    assert not close(means[1], kl(p, ref), 1e-2)
    assert (una.kl_estimate(p, ref, 3) >= 0).all() and (una.kl_estimate(p, ref, 1) < 0).any()
    near_by = (ref + 0.01 * theta).log_softmax(-1)               # at a small KL k2 has it too
    assert close((near_by.exp() * una.kl_estimate(near_by, ref, 2)).sum(), kl(near_by, ref), 2e-2)


def test_kl_as_losses_k1_is_no_price_k2_is_the_kls_gradient_and_k3_the_other_kls(world):
    theta, ref, _ = world
    right = gradient(lambda t: kl(t.log_softmax(-1), ref), theta)
    other = gradient(lambda t: kl(ref, t.log_softmax(-1)), theta)
    assert near(pull(theta, ref, 1), torch.zeros(15).double()) and right.abs().max() > 0.1
    assert close(pull(theta, ref, 2), right) and not close(pull(theta, ref, 3), right, 1e-2)
    assert close(pull(theta, ref, 3), other) and not close(pull(theta, ref, 2), other, 1e-2)


def test_eq07_kl_is_k2_so_that_online_una_is_reinforce_with_k2_in_the_loss(world):
    theta, ref, rewards = world
    for b in (0.0, 0.7):
        for k, same in ((2, True), (1, False), (3, False)):
            def reinforce(t, k=k, b=b):
                p = t.log_softmax(-1)
                return -(rewards - b) * p + BETA * una.kl_estimate(p, ref, k)

            def eq07(t, b=b):
                p = t.log_softmax(-1)
                return una.una_reward_loss(una.implicit_reward(p, ref, BETA, b), rewards)
            a, c = (torch.autograd.functional.jacobian(loss, theta) for loss in (eq07, reinforce))
            assert close(a, 2 * BETA * c) == same                # sample by sample


def test_kl_k1_in_the_reward_is_a_number_and_gives_the_gradient_of_eq03(world):
    theta, ref, rewards = world
    p = theta.log_softmax(-1)
    advantage = rewards - BETA * una.kl_estimate(p, ref, 1)
    J = gradient(lambda t: una.rlhf_objective(t.log_softmax(-1), ref, rewards, BETA), theta)
    assert close(gradient(lambda t: (p.exp() * advantage * t.log_softmax(-1)).sum(), theta), J)
    k3 = rewards - BETA * una.kl_estimate(p, ref, 3)
    assert not close(gradient(lambda t: (p.exp() * k3 * t.log_softmax(-1)).sum(), theta), J, 1e-2)


def test_kl_k3_in_the_loss_has_its_own_optimum_which_is_not_the_best_policy(world):
    theta, ref, rewards = world
    best = una.k3_optimal_policy(ref, rewards, BETA)
    assert close(best.exp().sum(), torch.ones(()).double())
    price = lambda p: (p.exp() * rewards).sum() - BETA * kl(ref, p)
    for seed in range(50):                                       # no policy near or far is better
        other = (best + 10 ** normals(seed)(1) * normals(seed + 99)(15)).log_softmax(-1)
        assert price(other) <= price(best) + 1e-12
    # GRPO's gradient, advantages not divided, vanishes there and not at the best policy.
    star, _ = una.optimal_policy(ref, rewards, BETA)
    for policy, still in ((best, True), (star, False)):
        p = policy.exp()
        step = gradient(lambda t, p=p: (p * (rewards * t.log_softmax(-1) - BETA * una.kl_estimate(
            t.log_softmax(-1), ref, 3))).sum(), policy)
        assert (step.abs().max() < 1e-9) == still
    two = una.k3_optimal_policy(torch.stack([ref, ref]), torch.stack([rewards, rewards + 5]), BETA)
    assert close(two[0], best) and close(two[1], best)           # a level changes nothing
    assert near(una.k3_optimal_policy(ref, rewards, 1e6), ref, 1e-4)


def test_kl_refuses_what_does_not_fit(world):
    theta, ref, rewards = world
    with pytest.raises(ValueError, match="k must be 1, 2 or 3, got 4"):
        una.kl_estimate(theta, ref, 4)
    with pytest.raises(ValueError, match="shapes differ"):
        una.kl_estimate(theta[:1], ref, 2)
    with pytest.raises(ValueError, match="beta must be positive"):
        una.k3_optimal_policy(ref, rewards, 0)
