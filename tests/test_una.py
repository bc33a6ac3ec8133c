"""The paper, equation by equation: una.py against something written independently of it.

test_eqNN_... is about Eq. NN, in the paper's order; test_printed_... shows where an equation fails
as it is printed. Wherever two things are claimed to be equal, the nearest wrong version must fail
the same comparison. Expectations are sums over a world small enough to list.
"""
import ast
import inspect
import math
import re
import runpy
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import una
from helpers import close, gradient, normals

# The world of these tests: X = 3 prompts with Y = 6 responses each, the reference and rewards; an
# arbitrary f(x) (X, 1) and another policy, logits and log-probabilities. By hand Z(x) (X,), Eq. 4's
# optimum, its value (X,), and the offset (X, 1) that makes r_theta the reward.
mean = lambda logprobs, values: (logprobs.exp() * values).sum(-1)       # E_{y~pi}: (X, Y) to (X,)
normal, beta = normals(1), 0.4
ref, rewards, f, theta = normal(3, 6).log_softmax(-1), normal(3, 6), normal(3, 1), normal(3, 6)
policy, scores = theta.log_softmax(-1), torch.sigmoid(rewards)
Z, Z_f = mean(ref, (rewards / beta).exp()), mean(ref, ((rewards - f) / beta).exp())
best, value = ref + rewards / beta - Z.log()[:, None], beta * Z.log()
offset = value[:, None]
J = lambda logprobs: una.rlhf_objective(logprobs, ref, rewards, beta)
r_theta = lambda logprobs, offset=0.0: una.implicit_reward(logprobs, ref, beta, offset)
kl = lambda p, q: mean(p, p - q)
on_policy = lambda loss, p: mean(p.detach(), loss)          # drawing the samples has no gradient
by_logits = lambda loss, logits: gradient(lambda t: loss(t.log_softmax(-1)), logits)


def fit(loss):
    """Train a policy from pi_ref, one logit a response, until the gradient of the sum is zero."""
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Rprop([logits], step_sizes=(1e-15, 1.0))    # needs gradients only
    for _ in range(1000):
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)).sum().backward()
        if logits.grad.abs().max() < 1e-10:
            return logits.detach().log_softmax(-1)
        optimizer.step()
    raise AssertionError("training did not converge")


def spans(length, *spans):
    """One row a span: True from its first number up to, not including, its second."""
    positions = torch.arange(length)
    return torch.stack([(first <= positions) & (positions < end) for first, end in spans])


# Three rows of nine tokens out of seven; the responses are tokens 3-6, 1-2 and 5-8.
logits, tokens, mask = normal(3, 9, 7), normal(3, 9, 7).argmax(-1), spans(9, (3, 7), (1, 3), (5, 9))
used, logprob = F.pad(mask[:, 1:], (0, 1)), lambda z: una.sequence_logprob(z, tokens, mask)


def looped_logprob(z, mask=mask, of=sum):
    """log pi(y|x) token by token: the token at position t is predicted by the logits at t - 1."""
    return torch.stack([of(z[i, t - 1].log_softmax(-1)[tokens[i, t]] * mask[i, t]
                           for t in range(1, 9)) for i in range(3)])


def test_logprob_is_the_sum_of_the_response_tokens_log_softmax():
    expected = looped_logprob(logits)
    assert close(logprob(logits), expected)
    by_token = looped_logprob(logits, of=lambda row: torch.stack([*row]))
    assert close(una.token_logprobs(logits, tokens, mask), by_token)    # column t: of token t + 1
    assert torch.autograd.gradcheck(logprob, logits.clone().requires_grad_())
    for wrong in (mask & mask.roll(1, -1), mask & mask.roll(-1, -1)):   # no first token, or no last
        assert not close(expected, looped_logprob(logits, wrong))       # others: map_dpo


def test_logprob_of_all_responses_adds_up_to_one():
    # The leaves of a prefix tree share out the probability 1, whatever is predicted at each prefix.
    # Responses from {a, b, end}, cut at three: 15. Padding is `end` too, and must not be counted.
    normal, end, predictions = normals(2), 2, {}
    responses = [y for n in (1, 2, 3) for y in product((0, 1, end), repeat=n)
                 if end not in y[:-1] and (n == 3 or y[-1] == end)]
    logits, tokens = torch.zeros(15, 4, 3).double(), torch.full((15, 4), end)
    for row, y in enumerate(responses):
        for t, token in enumerate(y):
            logits[row, t], tokens[row, t + 1] = predictions.setdefault(y[:t], normal(3)), token
    logprobs = una.sequence_logprob(logits, tokens, spans(4, *[(1, 1 + len(y)) for y in responses]))
    padding_counted = una.sequence_logprob(logits, tokens, spans(4, *[(1, 4)] * 15))
    mean_for_sum = logprobs / torch.tensor([len(y) for y in responses])
    assert close(logprobs.exp().sum(), 1.0) and not close(padding_counted.exp().sum(), 1.0)
    assert not close(mean_for_sum.exp().sum(), 1.0)


def test_logprob_and_its_gradient_are_exact_whatever_padding_ids_and_logits_stand_outside():
    padded = (F.pad(logits, (0, 0, 2, 3), value=5.0), F.pad(tokens, (2, 3), value=6),
              F.pad(mask, (2, 3)))
    assert close(una.sequence_logprob(*padded), logprob(logits), tol=1e-14)
    for garbage in (-100, 10**9):
        other = tokens.masked_fill(~mask, garbage)
        assert close(una.sequence_logprob(logits, other, mask), logprob(logits), tol=0), garbage
    # Left padding makes NaN. The gradient is 0 at logits that are not used, and only there.
    naive = lambda z: (z[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
                       - z[:, :-1].logsumexp(-1)).where(mask[:, 1:], 0.0).sum(-1)
    value, slope = looped_logprob(logits), gradient(looped_logprob, logits)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = logits.masked_fill(~used[..., None], garbage)
        for ours in (logprob, lambda z: una.token_logprobs(z, tokens, mask).sum(-1)):
            assert close(ours(dirty), value) and close(gradient(ours, dirty), slope), garbage
            assert ((gradient(ours, dirty) == 0).all(-1) == ~used).all(), garbage
        assert close(naive(dirty), value) and gradient(naive, dirty).isnan().any()


def test_logprob_of_a_masked_vocabulary_is_that_of_the_vocabulary_that_is_left():
    # A logit of -inf takes a token out: p = 0. If all but one are out, that one is certain.
    chosen = F.one_hot(tokens.roll(-1, 1), 7).double()
    out = (torch.arange(7) >= 4) & (chosen == 0)
    masked, p = logits.masked_fill(out, -math.inf), logits.exp() * ~out
    p = p / p.sum(-1, keepdim=True)
    expected = ((p * chosen).sum(-1).log() * used).sum(-1)
    assert close(logprob(masked), expected) and not close(logprob(logits), expected)
    assert close(gradient(logprob, masked), (chosen - p) * used[..., None])
    certain = logits.masked_fill(chosen == 0, -math.inf)
    assert close(logprob(certain), 0.0) and close(gradient(logprob, certain), 0.0)
    assert gradient(logprob, 1e4 * logits).isfinite().all()


def test_logprob_of_16_bit_logits_is_in_float32_and_only_the_response_is_copied(monkeypatch):
    # In bf16 numbers near -40 come in steps of 1/4. The logits are rounded, the sum must not be.
    rounded = logits.bfloat16()
    exact = looped_logprob(rounded.double())
    assert close(logprob(rounded).double(), exact, tol=1e-5)
    assert not close(looped_logprob(rounded).double(), exact, tol=1e-5)     # in bf16
    for given in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        wide = torch.float64 if given == torch.float64 else torch.float32
        assert logprob(logits.to(given)).dtype == wide, given
    # Logits are what fills the memory: none but those of the 10 tokens become float32.
    seen, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *of: (seen.append(t.shape), to(t, *of))[1])
    logprob(rounded)
    assert seen == [(10, 7)]


def test_logprob_refuses_a_mask_that_is_not_bool_an_empty_response_and_one_at_position_zero():
    for dtype in (torch.int64, torch.uint8):
        with pytest.raises(ValueError, match=f"must be bool, got {dtype}"):
            una.token_logprobs(logits, tokens, mask.to(dtype))
    for message, wrong in ("empty", (1, 1)), ("position 0", (0, 3)):
        with pytest.raises(ValueError, match=message):
            una.sequence_logprob(logits, tokens, spans(9, (3, 7), wrong, (5, 9)))


def test_eq01_is_sigmoid_of_the_difference_and_eq02_is_minus_log_likelihood_of_the_choices():
    winner, loser = normals(102)(2, 50)
    P = winner.exp() / (winner.exp() + loser.exp())
    likelihood = lambda winner, loser: (-una.reward_model_loss(winner, loser)).exp()
    assert close(likelihood(winner, loser), P) and not close(likelihood(loser, winner), P)
    assert close(likelihood(loser, winner), 1 - P)                  # one of the two must win
    assert close(likelihood(winner + 5, loser + 5), P)              # r_phi is known up to an f(x)
    # d/dm (-log sigma(m)) = -(1 - sigma(m)): a choice predicted with certainty teaches nothing.
    assert close(gradient(lambda r: una.reward_model_loss(r, loser), winner), P - 1)
    assert close(gradient(lambda r: una.reward_model_loss(winner, r), loser), 1 - P)


def test_eq03_is_mean_reward_minus_beta_KL_and_eq15_one_log_sum_for_any_f():
    by_hand = [sum(p * r - beta * p * math.log(p / q) for p, q, r in zip(*row))
               for row in zip(policy.exp().tolist(), ref.exp().tolist(), rewards.tolist())]
    assert close(J(policy), by_hand)
    assert not close(una.rlhf_objective(ref, policy, rewards, beta), by_hand)       # swapped
    assert close(una.rlhf_objective(policy, ref, rewards, 0.0), mean(policy, rewards))
    one_sum = -beta * mean(policy, (policy.exp() / (ref + (rewards - f) / beta).exp()).log())
    assert close(J(policy), one_sum + f[:, 0])
    assert not close(J(policy), one_sum) and not close(J(policy), one_sum + f[:, 0] / beta)


def test_eq03_where_a_probability_is_zero_is_finite_with_its_gradient_and_reads_no_reward():
    # p log p -> 0: the policy that always says y has J = r(y) + beta log pi_ref(y).
    one_hot, anchor, given = torch.eye(6).double().log(), policy.repeat(2, 1), normals(109)(6, 6)
    expected = (given + 0.7 * anchor).diagonal()
    assert close(una.rlhf_objective(one_hot, anchor, given, 0.7), expected)
    # Where the reference never says y, any chance of y costs infinitely much.
    half, never = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert una.rlhf_objective(half, never, torch.zeros(2), 0.7) == -math.inf
    # A response that pi never gives, whether or not the reference does, and whatever its reward.
    naive = lambda p: (p.exp() * (given - beta * (p - anchor))).where(p.exp() > 0, 0.0).sum(-1)
    objective = lambda p: una.rlhf_objective(p, anchor, given, beta)
    never = torch.arange(6) == 2
    logprobs = policy.masked_fill(never, -math.inf)
    terms = (policy.exp() * (rewards - beta * (policy - ref))).masked_fill(never, 0.0)
    for log_q, reward in product((-1.0, -math.inf), (0.3, math.nan, math.inf, -math.inf)):
        anchor, given = ref.masked_fill(never, log_q), rewards.masked_fill(never, reward)
        assert close(objective(logprobs), terms.sum(-1)), (log_q, reward)
        assert close(gradient(objective, logprobs), terms - beta * logprobs.exp()), (log_q, reward)
        assert close(naive(logprobs), terms.sum(-1)) and gradient(naive, logprobs).isnan().any()


def test_eq04_optimum_is_the_tilted_reference_and_larger_beta_means_smaller_KL_and_reward():
    optimum, maximum = una.optimal_policy(ref, rewards, beta)
    assert close(optimum, best) and close(maximum, value)
    assert close(rewards, beta * (optimum - ref) + maximum[:, None])
    for wrong in ((optimum - ref) + maximum[:, None], beta * (optimum - ref)):
        assert not close(rewards, wrong)
    # What the reference never says the optimum never says, however large the reward.
    wider, raised = F.pad(ref, (0, 1), value=-math.inf), F.pad(rewards, (0, 1), value=100.0)
    optimum, maximum = una.optimal_policy(wider, raised, beta)
    assert close(optimum, F.pad(best, (0, 1), value=-math.inf)) and close(maximum, value)
    assert close(una.rlhf_objective(optimum, wider, raised, beta), value)
    # With t = 1/beta and under pi*: d E[r] / dt = Var(r) > 0 and d KL / dt = t Var(r) > 0.
    # So both fall as beta grows, from the best response, for beta = 0, to the reference.
    first, *policies, last = [una.optimal_policy(ref, rewards, beta)[0]
                              for beta in (1e-4, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e9)]
    for fall in (lambda p: kl(p, ref), lambda p: mean(p, rewards)):
        assert (torch.stack([fall(p) for p in policies]).diff(dim=0) < 0).all()
    assert close(first.exp(), F.one_hot(rewards.argmax(-1), 6).double(), tol=1e-8)
    assert close(last, ref, tol=1e-8)


def test_eq04_estimated_offset_is_unbiased_for_Z_below_beta_log_Z_and_errs_by_one_over_root_N():
    draws = torch.tensor([*product(range(6), repeat=3)])                        # (216, 3)
    logprobs, given = ref[0][draws].sum(-1), rewards[0][draws]
    estimates = una.estimated_offset(given, beta)
    unbiased = lambda offset: close(mean(logprobs, (offset / beta).exp()), Z[0])
    assert estimates.shape == (216,) and close(logprobs.exp().sum(), 1.0) and unbiased(estimates)
    assert value[0] - mean(logprobs, estimates) > 0.01                          # Jensen
    assert not unbiased(beta * (given / beta).logsumexp(-1))                    # forgets log N
    assert not unbiased(given.mean(-1))                                         # forgets e^{r/beta}
    generator, error = torch.Generator().manual_seed(0), {}
    for N in (100, 2500):
        draws = torch.multinomial(ref[0].exp(), 500 * N, replacement=True, generator=generator)
        estimates = una.estimated_offset(rewards[0][draws].view(500, N), beta)
        error[N] = (estimates - value[0]).square().mean().sqrt().item()
    assert error[100] / error[2500] == pytest.approx(5, rel=0.15) and error[2500] < 0.02


def test_eq04_estimated_offset_goes_from_the_best_reward_to_the_mean_and_needs_a_positive_beta():
    given = normals(115)(2, 3, 5)
    most = given.amax(-1)
    assert close(una.estimated_offset(given, 1e6), given.mean(-1), 1e-5)
    assert close(una.estimated_offset(given, 1e-4), most, 1e-3)                 # e^{r/beta}: inf
    for b in (0.1, 1.0, 10.0):
        estimate = una.estimated_offset(given, b)
        assert (most - b * math.log(5) <= estimate).all() and (estimate <= most).all()
    for b, function in product((0.0, -0.1, math.nan), (
            lambda b: una.optimal_policy(ref, rewards, b), lambda b: una.estimated_offset(given, b),
            lambda b: una.k3_optimal_policy(ref, rewards, b))):
        with pytest.raises(ValueError, match=f"beta must be positive, got {b}"):
            function(b)
    with pytest.raises(ValueError, match="at least one response"):
        una.estimated_offset(torch.ones(2, 0), 1.0)


def test_eq05_dpo_is_eq02_with_eq04_put_in_and_reaches_the_optimum_on_all_pairs_as_eq10_does():
    # The rewards of pi* are r - beta log Z, so DPO's loss of pi* is the reward model's loss of r.
    w, l = torch.tensor([*product(range(6), repeat=2)]).T
    dpo = lambda p, w=w, l=l, beta=beta: una.dpo_loss(p[:, w], p[:, l], ref[:, w], ref[:, l], beta)
    P = rewards[:, w].exp() / (rewards[:, w].exp() + rewards[:, l].exp())
    assert close(dpo(best), -P.log())
    for wrong in (dpo(best, l, w), dpo(best, beta=1.0)):            # swapped, no beta
        assert not torch.isclose(wrong, -P.log())[:, w != l].any()
    # By log pi(y_w) and log pi(y_l) its slope is minus and plus beta sigma(r_l - r_w).
    pairs, refs = normals(118)(2, 2, 20)
    push = 0.3 * torch.sigmoid(0.3 * (pairs - refs)[1] - 0.3 * (pairs - refs)[0])
    slope = gradient(lambda p: una.dpo_loss(*p, *refs, 0.3), pairs)
    assert close(slope, torch.stack([-push, push]))
    # Cross-entropy of sigma(margin) with the true P is smallest at r_w - r_l: r_theta = r + b(x).
    for loss in (dpo, lambda p: una.una_pair_loss(r_theta(p)[:, w], r_theta(p)[:, l])):
        trained = fit(lambda p: P * loss(p))
        assert close(trained, best, tol=1e-6)
        for wrong in ((rewards, 2 * beta), (-rewards, beta)):
            assert not close(trained, una.optimal_policy(ref, *wrong)[0], tol=1e-6)


def test_eq06_is_beta_log_ratio_plus_offset_and_eq08_the_chance_to_beat_a_response_of_reward_zero():
    expected = beta * torch.log(policy.exp() / ref.exp()) + f
    assert close(una.implicit_reward(policy, ref, beta, f), expected)
    assert close(una.implicit_reward(policy, ref, beta) + f, expected)      # no offset by default
    assert close(una.implicit_reward(ref, ref, beta, f), f.expand(3, 6))        # the first step
    assert not close(una.implicit_reward(ref, policy, beta, f), expected)       # swapped
    assert close(gradient(lambda q: una.implicit_reward(policy, q, beta), ref), -beta)
    reward = torch.linspace(-40, 40, 81, dtype=torch.float64)
    chance = reward.exp() / (reward.exp() + 1)                              # Eq. 1 with r_l = 0
    assert close(una.implicit_score(reward), chance, tol=1e-14)
    assert close(una.implicit_score(reward), (-una.reward_model_loss(reward, 0 * reward)).exp())
    assert not close(una.implicit_score(-reward), chance)
    assert una.implicit_score(torch.tensor([-1000.0, 0.0, 1000.0])).tolist() == [0, 0.5, 1]


def test_eq07_on_fresh_samples_has_the_gradient_of_rlhf_and_reaches_the_optimum_with_any_offset():
    loss = lambda r: una.una_reward_loss(r, rewards)
    assert close(loss(theta), theta**2 - 2 * theta * rewards + rewards**2)
    # grad L = -2 beta grad J: the offset is a baseline. Not so on samples of pi_ref, or if drawing
    # the samples had a gradient, or if the offset depended on the response.
    grad_L = lambda b, samples=torch.Tensor.detach, anchor=ref: by_logits(
        lambda p: mean(samples(p), loss(una.implicit_reward(p, anchor, beta, b))), theta)
    expected = -2 * beta * by_logits(J, theta)
    for b in (0.0, 3.7, f):
        assert close(grad_L(b), expected) and not close(grad_L(b), expected / beta)
        assert not close(grad_L(b, samples=lambda p: p), expected)
        assert not close(grad_L(b, samples=lambda p: ref), expected)
        trained = fit(lambda p: on_policy(loss(r_theta(p, b)), p))
        assert close(trained, best, tol=1e-6)
        assert not close(trained, una.optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-6)
    assert not close(grad_L(normals(125)(3, 6)), expected)
    assert not close(grad_L(0.0, anchor=ref.flip(-1)), expected)


def test_eq07_and_eq09_have_no_noise_at_the_optimum_with_beta_log_Z_and_only_with_it():
    # Each single sample has gradient zero there. Without that offset, on fresh samples, the mean of
    # Eq. 7 is zero still, as grad J is; not that of Eq. 9: the slope of sigma weighs the residuals.
    for loss, averages_out in (
            (lambda p, b: una.una_reward_loss(r_theta(p, b), rewards), True),
            (lambda p, b: una.una_score_loss(r_theta(p, b), scores, "mse"), False),
            (lambda p, b: una.una_score_loss(r_theta(p, b), scores, "bce"), False)):
        at_each = lambda b: gradient(lambda p: loss(p, b), best)
        assert close(at_each(offset), 0.0) and not close(at_each(0.0), 0.0)
        on_average = by_logits(lambda p: on_policy(loss(p, 0.0), p), best)
        assert close(on_average, 0.0, tol=1e-10 if averages_out else 1e-3) == averages_out


def test_eq07_eq11_eq12_and_eq13_on_old_samples_reach_the_optimum_if_the_offset_is_beta_log_Z():
    # Then r_theta = r is within reach at all responses, at pi* only. A label is 1 with probability
    # s = sigma(r): on average over labels mse and bce are smallest at s_theta = s.
    s, one = scores, torch.ones_like(scores)
    labels = lambda r, g: (s * una.una_binary_loss(r, one, g)
                           + (1 - s) * una.una_binary_loss(r, 0 * one, g))
    reward = lambda r, given=rewards: una.una_reward_loss(r, given)
    train = lambda loss, b=0.0: fit(lambda p: ref.exp() * loss(r_theta(p, b)))
    for name, loss in {"reward": reward, "labels, mse": lambda r: labels(r, "mse"),
                       "labels, bce": lambda r: labels(r, "bce"),
                       "score, mse": lambda r: una.una_score_loss(r, s, "mse"),
                       "score, bce": lambda r: una.una_score_loss(r, s, "bce")}.items():
        assert close(train(loss, offset), best, tol=1e-6), name
        assert not close(train(loss), best, tol=1e-2), name
    for wrong in (offset + 0.1, value.mean()):                      # one offset for all prompts
        assert not close(train(reward, wrong), best, tol=1e-3)
    assert close(train(lambda r: reward(r, rewards - offset)), best, tol=1e-6)


def test_eq05_and_eq13_have_other_optima_where_feedback_does_not_reach_or_connect_all_responses():
    # Pairs within 0, 1, 2 and within 3, 4, 5 say nothing of the two groups' shares; judging 0 to 3
    # says nothing of which of 4 and 5 has what is left.
    first = torch.arange(6) < 3
    w, l = torch.tensor([*product(range(6), repeat=2)]).T
    dpo = lambda p, which: una.dpo_loss(p[:, w], p[:, l], ref[:, w], ref[:, l], beta)[:, which]
    score = lambda p, judged: una.una_score_loss(r_theta(p, offset), scores)[:, :judged]
    shifted, within = (best + first).log_softmax(-1), first[w] == first[l]
    exchanged = best[:, [0, 1, 2, 3, 5, 4]]
    assert close(dpo(shifted, within), dpo(best, within))
    assert not close(dpo(shifted, ~within), dpo(best, ~within))
    assert close(score(exchanged, 4), 0.0) and not close(score(exchanged, 6), 0.0)


def test_eq09_compares_scores_as_eq13_does_and_both_are_smallest_at_the_logit_of_the_given_one():
    # g of a score s and the given one t, and its slope by the reward: the table in una.py.
    table = {
        "mse": (lambda s, t: (s - t) ** 2, lambda s, t: 2 * (s - t) * s * (1 - s)),
        "mae": (lambda s, t: torch.max(s - t, t - s), lambda s, t: (s - t).sign() * s * (1 - s)),
        "bce": (lambda s, t: -t * s.log() - (1 - t) * (1 - s).log(), lambda s, t: s - t)}
    reward, given = 2 * normals(133)(30), torch.sigmoid(normals(134)(30))
    s = 1 / (1 + (-reward).exp())
    for g, (formula, slope) in table.items():
        loss = lambda r, given=given: una.una_score_loss(r, given, g)
        assert close(loss(reward), formula(s, given)), g
        assert close(gradient(loss, reward), slope(s, given)), g
        assert not close(loss(reward), formula(reward.abs(), given)), g         # not squashed
        least, *others = (loss(rewards + off, scores) for off in (0, 0.1, -0.1))
        assert all((least < other).all() for other in others), g
    assert una.una_score_loss(reward, given).equal(una.una_score_loss(reward, given, "mse"))
    assert close(gradient(lambda r: una.una_score_loss(r, given), 0 * reward), (0.5 - given) / 2)


def test_eq09_refuses_scores_outside_zero_and_one_and_another_g():
    for bad in (-1e-6, 1 + 1e-6, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"got {bad}"):
            una.una_score_loss(theta[0, :4], torch.tensor([0, bad, 7, 1], dtype=torch.float64))
    una.una_score_loss(torch.zeros(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="got 'MSE'"):
        una.una_score_loss(torch.zeros(2), torch.ones(2), "MSE")


def test_eq10_is_eq02_on_implicit_rewards_and_so_dpo_with_any_offset():
    pairs, refs, b = normals(142)(2, 20), normals(143)(2, 20), normals(144)(20)
    value_and_slope = lambda loss: torch.stack([loss(pairs), *gradient(loss, pairs)])
    pair = lambda p, b_l=b: una.una_pair_loss(*una.implicit_reward(
        p, refs, 0.3, torch.stack([b, b_l])))
    bradley_terry = value_and_slope(lambda r: -torch.log(r[0].exp() / (r[0].exp() + r[1].exp())))
    assert close(value_and_slope(lambda r: una.una_pair_loss(*r)), bradley_terry)
    dpo = value_and_slope(lambda p: una.dpo_loss(*p, *refs, 0.3))
    assert close(value_and_slope(pair), dpo)
    assert not close(value_and_slope(lambda p: pair(p, 0 * b)), dpo)    # one that does not cancel


def test_eq11_is_the_squared_distance_to_the_label_and_eq12_the_cross_entropy_of_torch():
    reward, label = 2 * normals(145)(20), (normals(147)(20) > 0).double()
    loss, s = lambda label, *g: una.una_binary_loss(reward, label, *g), 1 / (1 + (-reward).exp())
    squared = torch.where(label == 1, (s - 1) ** 2, (s - 0) ** 2)
    entropy = F.binary_cross_entropy(s, label, reduction="none")
    assert close(entropy, F.binary_cross_entropy_with_logits(reward, label, reduction="none"))
    for g, expected in ((), squared), (("mse",), squared), (("bce",), entropy):     # () by default
        assert close(loss(label, *g), expected) and not close(loss(1 - label, *g), expected)
    assert una.una_binary_loss(reward.half(), label).dtype == torch.float16     # the rewards' type


def test_eq14_log_sum_inequality_and_its_proof_line_by_line_eq21_jensen_and_eq22():
    a, b = normals(151)(2, 1000, 5).exp()
    left = lambda a: (a * (a / b).log()).sum(-1)
    right = lambda a: a.sum(-1) * (a.sum(-1) / b.sum(-1)).log()
    assert (left(a) > right(a)).all() and close(left(2.5 * b), right(2.5 * b))
    not_quite = 2.5 * b * torch.tensor([1, 1, 1, 1, 1.01])
    assert (left(not_quite) > right(not_quite)).all()
    assert not ((a * (b / a).log()).sum(-1) > right(a)).all()       # ratio upside down
    # Jensen: the mean of a convex phi is at least phi of the mean; reversed for a concave phi.
    B, phi, derivative = b.sum(-1), lambda t: t * t.log(), torch.func.grad
    average = lambda points: (b * points).sum(-1) / B
    assert (average(phi(a)) > phi(average(a))).all()
    assert (average(a.log()) < average(a).log()).all()
    assert close(torch.vmap(derivative(derivative(phi)))(a[0]), 1 / a[0])       # > 0: convex
    for line in ((b * phi(a / b)).sum(-1), B * (b / B[:, None] * phi(a / b)).sum(-1),
                 B * average(phi(a / b))):
        assert close(left(a), line)
    last = B * phi(average(a / b))                                  # by Jensen
    assert (left(a) > last).all() and close(last, right(a))
    # 0 log 0 = 0. This is what lets a policy with probability 0 somewhere into the bound of J.
    half, b = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).double(), ref.exp() * (rewards / beta).exp()
    of_half = (half[:2] * (half[:2] / b[:, :2]).log()).sum(-1)
    assert (of_half > -b.sum(-1).log()).all() and close(-beta * of_half, J(half.log() + 0 * ref))


def test_eq16_eq19_and_eq20_optimum_beats_every_policy_by_beta_KL_and_ascent_climbs_to_it():
    # The last line of appendix A. Policies near pi*, and a thousand anywhere.
    near, anywhere = best + 0.01 * normals(161)(100, 3, 6), 2 * normals(158)(1000, 3, 6)
    for p in (near.log_softmax(-1), anywhere.log_softmax(-1)):
        assert (J(p) < value).all() and close(J(p), -beta * (kl(p, best) - Z.log()))
        assert not close(J(p), -beta * (kl(best, p) - Z.log()))     # KL the other way round
        assert not close(J(p), beta * (kl(p, best) - Z.log()))
    optimum, maximum = una.optimal_policy(ref, rewards, beta)
    climbed = fit(lambda logprobs: -J(logprobs))
    assert close(J(optimum), maximum) and close(climbed, optimum, tol=1e-7)
    assert not close(climbed, una.optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-7)
    # The bound is the same for any f: beta log Z_f + f, with Z_f = Z e^{-f/beta}.
    for b in (torch.full((3, 1), 5.0), f):
        log_Z_f = mean(ref, ((rewards - b) / beta).exp()).log()
        assert close(beta * log_Z_f + b[:, 0], value) and not close(beta * log_Z_f, value)


def test_eq17_lambda_is_Z_f_at_every_response_and_eq18_a_policy_is_optimal_for_its_rewards_alone():
    (optimum, maximum), lambda_ = una.optimal_policy(ref, rewards, beta), Z_f[:, None]
    ratio = optimum.exp() / (ref.exp() * ((rewards - f) / beta).exp())
    assert close(1 / ratio, lambda_.expand(3, 6))                   # the same for all y
    assert ratio[:, 0].std() > 0.1                                  # and not the same for all x
    # Any reward is the implicit reward of its optimum, with c = beta log lambda.
    c = beta * lambda_.log()
    assert close(r_theta(optimum, f + c), rewards) and close(f + c, maximum[:, None])
    # r = beta log pi/pi_ref + b(x): pi_ref e^{r/beta} = pi e^{b/beta}, so Z = e^{b/beta}, pi* = pi.
    for b in (0.0, 2.0, f):
        optimum, maximum = una.optimal_policy(ref, r_theta(policy, b), beta)
        assert close(optimum, policy) and close(maximum[:, None] - b, 0.0)      # b = beta log Z
    assert not close(una.optimal_policy(ref, r_theta(policy), 1.0)[0], policy)      # missing beta
    # No other reward has that optimum. d log pi* / d r = (I - 1 pi*^T) / beta:
    # the only change of the reward that pi* does not feel is a constant.
    jacobian = torch.autograd.functional.jacobian(
        lambda r: una.optimal_policy(ref[0], r, beta)[0], rewards[0])
    assert torch.linalg.matrix_rank(jacobian).item() == 5 and close(jacobian.sum(-1), 0.0)
    assert close(jacobian, (torch.eye(6).double() - best[0].exp()) / beta)


def test_printed_eq04_with_the_implicit_reward_in_Z_any_Z_fits():
    # For any policy that is so with any Z; only the given reward's makes the reward the given one.
    for log_Z in (-3.0, 0.0, 5.0):
        assert close(mean(ref, (r_theta(policy, beta * log_Z) / beta).exp()).log(), log_Z)
    assert close(r_theta(best, offset), rewards)
    assert not close(r_theta(best, offset + 0.01), rewards, tol=1e-3)


def test_printed_eq06_f_and_c_zero_is_exact_only_if_Z_is_one_and_misses_by_beta_log_Z():
    # "f(x) = c = 0 refers that implicit and explicit reward models are exactly the same": no.
    with_Z_one = rewards - offset
    assert close(mean(ref, (with_Z_one / beta).exp()), 1.0) and offset.abs().min() > 0.05
    for given, difference in ((rewards, offset), (with_Z_one, 0 * offset)):
        optimum, _ = una.optimal_policy(ref, given, beta)
        assert close(given - r_theta(optimum), difference.expand(3, 6))


def test_printed_eq09_is_not_equivalent_to_eq07():
    # The two gradients do not point the same way, and Eq. 9 leads elsewhere at some prompts.
    score = lambda p: on_policy(una.una_score_loss(r_theta(p), scores), p)
    reward = lambda p: on_policy(una.una_reward_loss(r_theta(p), rewards), p)
    slopes = by_logits(score, theta), by_logits(reward, theta)
    assert F.cosine_similarity(*slopes, dim=-1).min() < 0.99
    assert close(fit(reward), best, tol=1e-6)
    assert (fit(score).exp() - best.exp()).abs().sum(-1).max() / 2 > 0.1        # total variation


def test_printed_eq10_linear_is_unbounded_below():
    # -(r_w - r_l) pushes as hard at a margin of 1000 as at 0; -log sigma(r_w - r_l) >= 0 lets go.
    margin = torch.tensor([0.0, 10.0, 1000.0], dtype=torch.float64)
    printed, ours = lambda m: -m, lambda m: una.una_pair_loss(m, 0 * m)
    assert (gradient(printed, margin) == -1).all() and printed(margin).min() == -1000
    assert (ours(margin) >= 0).all()
    assert close(gradient(ours, margin), [-0.5, -1 / (1 + math.exp(10)), 0.0])


def test_printed_eq11_printed_eq12_and_printed_eq13_minus_drives_scores_and_labels_apart():
    label, given, start = torch.tensor([[1, 0], [0.7, 0.3], [0.5, -0.5]]).double()

    def descend(loss):
        reward = start
        for _ in range(200):
            reward = reward - gradient(loss, reward)
        return torch.sigmoid(reward)
    for target, loss in ((label, lambda r: una.una_binary_loss(r, label)),
                         (label, lambda r: una.una_binary_loss(r, label, "bce")),
                         (given, lambda r: una.una_score_loss(r, given))):
        reached, apart = descend(loss), descend(lambda r: -loss(r))
        assert (reached - target).abs().max() < 0.1 and (apart - target).abs().min() > 0.5
    # Eq. 12: the second printed line is right, the first has a minus before L_BCE.
    s, ours = torch.sigmoid(start), una.una_binary_loss(start, label, "bce").sum()
    second_line = -(torch.log(s[0]) + torch.log(1 - s[1]))
    first_line = -F.binary_cross_entropy(s, label, reduction="sum")
    assert close(ours, second_line) and not close(ours, first_line) and close(ours, -first_line)


def test_printed_eq17_printed_eq19_and_printed_f_above_lambda_differs_by_prompt_and_c_is_not_zero():
    # pi_ref e^{r/beta} / lambda adds up to Z(x) / lambda: to 1 at all prompts only if Z is the same
    # at all of them. So Eq. 19's beta log lambda(x) belongs inside of E_x.
    assert close(best.exp().sum(-1), 1.0)
    for constant in torch.linspace(Z.min().item(), Z.max().item(), 100):
        assert (Z / constant - 1).abs().max() > 0.1
    assert close(J(best).mean(), beta * Z.log().mean())
    assert beta * Z.mean().log() > J(best).mean() + 0.01
    # With f above the largest reward e^{(r - f)/beta} < 1 for every y: Z_f < 1 and c < 0.
    f = rewards.max(-1, keepdim=True).values + 0.1
    c = beta * mean(ref, ((rewards - f) / beta).exp()).log()[:, None]
    assert (c < -0.1).all() and close(r_theta(best, f + c), rewards)
    assert not close(r_theta(best, f), rewards)


def test_meta_dpo_and_kto_stand_alone():
    source = ast.parse(inspect.getsource(una)).body
    functions = {node.name: node for node in source if isinstance(node, ast.FunctionDef)}
    uses = lambda name: {*functions} & {node.id for node in ast.walk(functions[name])
                                        if isinstance(node, ast.Name)}
    assert uses("dpo_loss") == uses("kto_loss") == set()
    assert uses("una_binary_loss") == {"una_score_loss", "_alike"}              # such a use is seen
    assert not [node for node in source if isinstance(node, ast.Assign)]        # all are functions


def test_meta_the_paper_in_three_responses_prints_what_a_calculator_says(capsys):
    runpy.run_path(una.__file__, run_name="__main__")
    rows = {line[:29].strip(): [float(x) for x in re.findall(r"-?\d+\.\d{3}", line[29:])]
            for line in capsys.readouterr().out.splitlines()}
    tilted, log = [q * math.exp(r / 0.5) for q, r in zip([0.5, 0.3, 0.2], [-1, 0, 1])], math.log
    offset, best = 0.5 * log(sum(tilted)), [weight / sum(tilted) for weight in tilted]
    s = [1 / (1 + math.exp(-reward)) for reward in (0, 1 - offset, 1)]
    KL = sum(p * log(p / q) for p, q in zip(best, [0.5, 0.3, 0.2]))
    for name, values in {
            "pi*: divided by Z": [*best, offset], "... + f + c = beta log Z": [-1, 0, 1],
            "pi* of beta = 0.5": [best[2] - best[0], KL, offset],
            "preferred to the first: DPO": [log(1 + math.exp(-m)) for m in (0, 2, 2)],
            "label 1, bce": [-log(y) for y in s], "label 1, mae": [1 - y for y in s],
            "score sigma(1), mse": [(s[2] - y) ** 2 for y in s]}.items():
        assert rows[name] == pytest.approx(values, abs=6e-4), name
