"""The paper, equation by equation: una.py against something written independently of it.

test_eqNN_... is about Eq. NN, in the paper's order; test_printed_... shows where an equation fails
as it is printed. Most of it happens in a world small enough to list, three prompts with six
responses each: expectations are sums, and nothing is sampled. Wherever two things are claimed to be
equal, the nearest wrong version must fail the same comparison.
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
from una import (
    dpo_loss,
    estimated_offset,
    implicit_reward,
    implicit_score,
    optimal_policy,
    reward_model_loss,
    rlhf_objective,
    sequence_logprob,
    token_logprobs,
    una_binary_loss,
    una_pair_loss,
    una_reward_loss,
    una_score_loss,
)


def mean(logprobs, values):
    """E_{y~pi} of values (X, Y), for each prompt: (X,)."""
    return (logprobs.exp() * values).sum(-1)


def kl(p, q):
    return mean(p, p - q)


def on_policy(loss, logprobs):
    """E_{y~pi} loss: the samples are drawn from pi, and drawing them carries no gradient."""
    return mean(logprobs.detach(), loss)


def by_logits(loss, theta):
    """The gradient of a policy's loss by its logits."""
    return gradient(lambda t: loss(t.log_softmax(-1)), theta)


def fit(loss):
    """Train a softmax policy from pi_ref, one logit a response, until the loss's gradient is zero.

    The loss is summed over prompts and responses. Rprop needs gradients only, and no chance.
    """
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Rprop([logits], step_sizes=(1e-15, 1.0))
    for _ in range(1000):
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)).sum().backward()
        if logits.grad.abs().max() < 1e-10:
            return logits.detach().log_softmax(-1)
        optimizer.step()
    raise AssertionError("training did not converge")


def root(f, low, high):
    """Where increasing functions f, one for each element of low < high, cross zero: bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        below = f(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


# The world of these tests: X = 3 prompts with Y = 6 responses each, the reference and rewards; an
# arbitrary f(x) (X, 1) and another policy, logits and log-probabilities. By hand Z(x) (X,), Eq. 4's
# optimum, its value (X,), and the offset (X, 1) that makes r_theta the reward.
normal, beta = normals(1), 0.4
ref, rewards, f, theta = normal(3, 6).log_softmax(-1), normal(3, 6), normal(3, 1), normal(3, 6)
policy, scores = theta.log_softmax(-1), torch.sigmoid(rewards)
Z, Z_f = mean(ref, (rewards / beta).exp()), mean(ref, ((rewards - f) / beta).exp())
best, value = ref + rewards / beta - Z.log()[:, None], beta * Z.log()
offset = value[:, None]
J = lambda logprobs: rlhf_objective(logprobs, ref, rewards, beta)
r_theta = lambda logprobs, offset=0.0: implicit_reward(logprobs, ref, beta, offset)


# ---------------------------------------------------------------- log pi(y|x)

def spans(length, *spans):
    """One row a span: True from its first number up to, not including, its second."""
    positions = torch.arange(length)
    return torch.stack([(first <= positions) & (positions < end) for first, end in spans])


def batch(seed):
    """Three rows of nine tokens out of seven; the responses are tokens 3-6, 1-2 and 5-8."""
    normal = normals(seed)
    return normal(3, 9, 7), normal(3, 9, 7).argmax(-1), spans(9, (3, 7), (1, 3), (5, 9))


def looped_logprob(logits, tokens, response_mask, shift=1):
    """log pi(y|x) token by token: the token at position t is predicted by the logits at t - 1."""
    rows = [[z[t - shift].log_softmax(-1)[ids[t]] for t in range(len(ids)) if mask[t]]
            for z, ids, mask in zip(logits, tokens, response_mask)]
    return torch.stack([sum(row) for row in rows])


def test_logprob_is_the_sum_of_the_response_tokens_log_softmax():
    logits, tokens, mask = given = batch(1)
    copies, expected = [tensor.clone() for tensor in given], looped_logprob(*given)
    assert close(sequence_logprob(*given), expected)
    assert torch.autograd.gradcheck(lambda z: sequence_logprob(z, tokens, mask),
                                    logits.clone().requires_grad_())
    assert all(tensor.equal(copy) for tensor, copy in zip(given, copies))
    for mistake, wrong in {
            "labels not shifted": looped_logprob(logits, tokens, mask, shift=0),
            "mean for sum": expected / mask.sum(-1),
            "padding": looped_logprob(logits, tokens, spans(9, (3, 9), (1, 9), (5, 9))),
            "prompt": looped_logprob(logits, tokens, spans(9, (1, 7), (1, 3), (1, 9))),
            "no first token": looped_logprob(logits, tokens, mask & mask.roll(1, -1)),
            "no end-of-text": looped_logprob(logits, tokens, mask & mask.roll(-1, -1))}.items():
        assert not close(sequence_logprob(*given), wrong), mistake


def test_logprob_of_all_responses_adds_up_to_probability_one():
    # By the chain rule the leaves of a prefix tree share out the probability 1, whatever is
    # predicted at each prefix. Responses of at most three tokens from {a, b, end}, cut at three: 15
    # leaves. Padding is `end` too, and must not be counted.
    normal, end = normals(2), 2
    responses = [y for n in (1, 2, 3) for y in product((0, 1, end), repeat=n)
                 if end not in y[:-1] and (n == 3 or y[-1] == end)]
    predictions, lengths = {}, torch.tensor([len(y) for y in responses])
    logits, tokens = torch.zeros(15, 4, 3, dtype=torch.float64), torch.full((15, 4), end)
    for row, y in enumerate(responses):
        tokens[row, 1:1 + len(y)] = torch.tensor(y)
        for t in range(len(y)):
            logits[row, t] = predictions.setdefault(y[:t], normal(3))
    logprobs = sequence_logprob(logits, tokens, spans(4, *[(1, 1 + n) for n in lengths]))
    padding_counted = sequence_logprob(logits, tokens, spans(4, *[(1, 4)] * 15))
    assert close(logprobs.exp().sum(), 1.0)
    for wrong in (padding_counted, logprobs / lengths):                 # and mean for sum
        assert not close(wrong.exp().sum(), 1.0)


def test_logprob_is_a_sum_so_that_doubling_independent_tokens_doubles_rho():
    # If all positions predict the same distribution, pi(yy) = pi(y)^2 and log pi/pi_ref doubles.
    # A mean would not move.
    policy, ref = normals(15)(2, 1, 1, 7).expand(2, 1, 9, 7)
    tokens = torch.tensor([[0, 3, 5, 1, 6, 3, 5, 1, 6]])
    once, twice = (sequence_logprob(policy, tokens, mask) - sequence_logprob(ref, tokens, mask)
                   for mask in (spans(9, (1, 5)), spans(9, (1, 9))))
    assert close(twice, 2 * once) and not close(twice / 8, 2 * (once / 4))


def test_logprob_never_reads_ids_outside_the_response_nor_padding_on_either_side():
    logits, tokens, mask = batch(4)
    expected = sequence_logprob(logits, tokens, mask)
    for left, right in ((0, 1), (0, 6), (1, 0), (6, 0), (2, 3)):
        padded = (F.pad(logits, (0, 0, left, right), value=5.0),
                  F.pad(tokens, (left, right), value=6), F.pad(mask, (left, right)))
        assert close(sequence_logprob(*padded), expected, tol=1e-14), (left, right)
    for garbage in (-100, -1, 7, 10**9):
        other = tokens.masked_fill(~mask, garbage)
        assert close(sequence_logprob(logits, other, mask), expected, tol=0), garbage


def test_logprob_has_its_exact_gradient_whatever_logits_stand_outside():
    # A left-padded batch makes NaN where nothing may be attended to. Outside is all but the
    # positions one before each response token; the gradient is 0 there, exactly, and only there.
    clean, tokens, mask = batch(16)
    outside, loop = ~F.pad(mask[:, 1:], (0, 1)), lambda z: looped_logprob(z, tokens, mask)
    naive = lambda z: (z[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
                       - z[:, :-1].logsumexp(-1)).where(mask[:, 1:], 0.0).sum(-1)
    for garbage in (math.nan, math.inf, -math.inf):
        logits = clean.masked_fill(outside[..., None], garbage)
        for logprob in (lambda z: sequence_logprob(z, tokens, mask),
                        lambda z: token_logprobs(z, tokens, mask).sum(-1)):
            slope = gradient(logprob, logits)
            assert close(logprob(logits), loop(clean)) and close(slope, gradient(loop, clean))
            assert ((slope == 0).all(-1) == outside).all(), garbage
        assert close(naive(logits), loop(clean)) and gradient(naive, logits).isnan().any()


def test_logprob_of_a_masked_vocabulary_is_that_of_the_vocabulary_that_is_left():
    # A logit of -inf takes a token out: p = 0, and the gradient 1_k - p is 0 there and finite at
    # the others. If all but one are out, that one is certain, as it is if its logit is huge.
    logits, tokens, mask = batch(17)
    targets = tokens.roll(-1, 1)[..., None]
    chosen, used = F.one_hot(targets[..., 0], 7).double(), F.pad(mask[:, 1:], (0, 1))[..., None]
    out = (torch.arange(7) >= 4) & (torch.arange(7) != targets)
    masked, p = logits.masked_fill(out, -math.inf), logits.exp() * ~out
    p = p / p.sum(-1, keepdim=True)
    expected = ((p * chosen).sum(-1).log() * used[..., 0]).sum(-1)
    logprob = lambda z: sequence_logprob(z, tokens, mask)
    assert close(logprob(masked), expected) and not close(logprob(logits), expected)
    assert close(gradient(logprob, masked), (chosen - p) * used)
    for certain in (logits.masked_fill(chosen == 0, -math.inf), 1000 * chosen):
        assert close(logprob(certain), 0.0) and close(gradient(logprob, certain), 0.0)
    assert (logprob(1000 * chosen.roll(1, 1)) < -100).all()             # mass on the token itself
    assert gradient(logprob, 1e4 * logits).isfinite().all()


def test_logprob_copies_no_more_than_the_response_to_float32():
    # Logits are what fills the memory. Here 8 of 512 positions are of the response.
    class Sizes(torch.overrides.TorchFunctionMode):
        """While it is on, collects the size of every float32 tensor that comes about."""

        def __torch_function__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if torch.is_tensor(result) and result.dtype == torch.float32:
                sizes.append(result.numel())
            return result

    logits, tokens = torch.zeros(1, 512, 50).bfloat16(), torch.zeros(1, 512, dtype=torch.long)
    naive = lambda logits, *_: logits[:, :-1].float().logsumexp(-1)
    # Ours: the response's logits, or the (1, T-1) result.
    for function, largest in (sequence_logprob, max(8 * 50, 511)), (naive, 511 * 50):
        sizes = []
        with Sizes():
            function(logits, tokens, spans(512, (504, 512)))
        assert max(sizes) == largest


def test_logprob_of_16_bit_logits_is_computed_in_float32_and_that_of_others_as_they_are():
    # bf16 has 8 bits: a log-probability near -40 comes in steps of 1/4.
    # The logits are rounded, the sum must not be.
    logits, tokens, mask = batch(11)
    rounded = logits.bfloat16()
    exact = looped_logprob(rounded.double(), tokens, mask)
    assert close(sequence_logprob(rounded, tokens, mask).double(), exact, tol=1e-5)
    assert not close(looped_logprob(rounded, tokens, mask).double(), exact, tol=1e-5)   # in bf16
    for given, wide in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                        (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert sequence_logprob(logits.to(given), tokens, mask).dtype == wide, given


def test_logprob_refuses_a_mask_that_is_not_bool_an_empty_response_and_one_at_position_zero():
    # A tokenizer's mask is made of integers 0 and 1. As indices they would mean something else.
    # Nothing stands before the first token, so no logits predict it. One such row is enough.
    logits, tokens, mask = batch(18)
    cases = [(f"must be bool, got {dtype}", mask.to(dtype))
             for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32)]
    for message, wrong in (*cases, ("empty", spans(9, (3, 7), (1, 1), (5, 9))),
                           ("position 0", spans(9, (3, 7), (1, 3), (0, 9)))):
        with pytest.raises(ValueError, match=message):
            sequence_logprob(logits, tokens, wrong)
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            token_logprobs(logits, tokens, wrong)


# ---------------------------------------------------------------- RLHF: Eq. 1-3

def test_eq01_is_sigmoid_of_the_difference_and_eq02_is_minus_log_likelihood_of_the_choices():
    winner, loser = normals(102)(2, 50)
    P = winner.exp() / (winner.exp() + loser.exp())
    likelihood = (-reward_model_loss(winner, loser)).exp()
    swapped = (-reward_model_loss(loser, winner)).exp()
    assert close(likelihood, P) and not close(swapped, P)
    assert close(swapped, 1 - P)                                    # one of the two must win
    # d/dm (-log sigma(m)) = -(1 - sigma(m)): a choice predicted with certainty teaches nothing.
    assert close(gradient(lambda r: reward_model_loss(r, loser), winner), P - 1)
    assert close(gradient(lambda r: reward_model_loss(winner, r), loser), 1 - P)
    # If y_1 beats y_2 in 30 of 40 judgements, the likelihood is greatest where
    # sigma(r_1 - r_2) = 30/40, that is at log 3.
    loss = lambda m: 30 * reward_model_loss(m, 0 * m) + 10 * reward_model_loss(0 * m, m)
    nine = torch.tensor([9.0]).double()
    assert close(root(lambda m: gradient(loss, m), -nine, nine), math.log(3))


def test_eq03_is_mean_reward_minus_beta_KL():
    # By hand: plain floats, sum over all responses of p r - beta p log(p / q).
    by_hand = [sum(p * r - beta * p * math.log(p / q) for p, q, r in zip(*row))
               for row in zip(policy.exp().tolist(), ref.exp().tolist(), rewards.tolist())]
    assert close(J(policy), by_hand)
    assert not close(rlhf_objective(ref, policy, rewards, beta), by_hand)       # swapped
    categorical = torch.distributions.Categorical
    KL = torch.distributions.kl_divergence(categorical(logits=policy), categorical(logits=ref))
    assert close(rlhf_objective(policy, ref, 0 * rewards, 2.0), -2.0 * KL)
    assert close(rlhf_objective(policy, ref, rewards, 0.0), mean(policy, rewards))
    assert close(rlhf_objective(ref, ref, rewards, 5.0), mean(ref, rewards))    # its KL is 0


def test_eq03_of_a_one_hot_policy_is_finite_for_one_prompt_and_in_any_batch():
    # p log p -> 0: the policy that always says y has J = r(y) + beta log pi_ref(y).
    one_hot, ref, rewards = torch.eye(6).double().log(), policy.repeat(2, 1), normals(109)(6, 6)
    expected = (rewards + 0.7 * ref).diagonal()
    for shape in ((6,), (2, 3)):
        batched = [t.view(*shape, 6) for t in (one_hot, ref, rewards)]
        assert close(rlhf_objective(*batched, 0.7), expected.view(shape))
    assert close(rlhf_objective(one_hot[2], ref[2], rewards[2], 0.7), expected[2])
    # Where the reference never says y, any chance of y costs infinitely much.
    half, never = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert rlhf_objective(half, never, torch.zeros(2), 0.7) == -math.inf


def test_eq03_has_a_finite_gradient_where_a_probability_is_zero_and_reads_no_reward_there():
    # dJ / d log pi = p (r - beta rho) - beta p, and 0 at the response that pi never gives, whether
    # or not the reference gives it, and whatever its reward.
    def naive(logprobs):
        terms = logprobs.exp() * (given - beta * (logprobs - anchor))
        return terms.where(logprobs.exp() > 0, 0.0).sum(-1)
    objective = lambda logprobs: rlhf_objective(logprobs, anchor, given, beta)
    never = torch.arange(6) == 2
    logprobs = policy.masked_fill(never, -math.inf)
    terms = (policy.exp() * (rewards - beta * (policy - ref))).masked_fill(never, 0.0)
    for log_q, reward in product((-1.0, -math.inf), (0.3, math.nan, math.inf, -math.inf)):
        anchor, given = ref.masked_fill(never, log_q), rewards.masked_fill(never, reward)
        assert close(objective(logprobs), terms.sum(-1)), (log_q, reward)
        assert close(gradient(objective, logprobs), terms - beta * logprobs.exp()), (log_q, reward)
        assert close(naive(logprobs), terms.sum(-1)) and gradient(naive, logprobs).isnan().any()


# ---------------------------------------------------------------- DPO: Eq. 4 and 5

def test_eq04_optimum_is_the_reference_tilted_by_the_reward():
    # By hand: weigh each response by e^{r/beta}, then normalise; the normaliser is Z(x).
    optimum, maximum = optimal_policy(ref, rewards, beta)
    assert close(optimum.exp(), ref.exp() * (rewards / beta).exp() / Z[:, None])
    assert close(maximum, beta * Z.log())
    assert close(rewards, beta * (optimum - ref) + maximum[:, None])    # the form printed as Eq. 4
    assert not close(rewards, (optimum - ref) + maximum[:, None])       # missing beta
    assert not close(rewards, beta * (optimum - ref))                   # missing beta log Z
    for i in (1, None):                                                 # one prompt, and any batch
        optimum, maximum = optimal_policy(ref[i], rewards[i], beta)
        assert close(optimum, best[i]) and close(maximum, value[i])
    # What the reference never says the optimum never says, however large the reward.
    wider, raised = F.pad(ref, (0, 1), value=-math.inf), F.pad(rewards, (0, 1), value=100.0)
    optimum, maximum = optimal_policy(wider, raised, beta)
    assert close(optimum, F.pad(best, (0, 1), value=-math.inf)) and close(maximum, value)
    assert close(rlhf_objective(optimum, wider, raised, beta), value)


def test_eq04_optimum_beats_ascent_and_a_thousand_random_policies():
    best, value = optimal_policy(ref, rewards, beta)
    assert (J((3 * normals(112)(1000, 3, 6)).log_softmax(-1)) < value).all()
    climbed = fit(lambda logprobs: -J(logprobs))
    assert close(climbed, best, tol=1e-7)
    assert not close(climbed, optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-7)


def test_eq04_larger_beta_smaller_KL_and_smaller_reward_between_the_best_and_the_reference():
    # With t = 1/beta and under pi*: d E[r] / dt = Var(r) > 0 and d KL / dt = t Var(r) > 0.
    # So both fall as beta grows. The limits: the best response for 0, the reference for infinity.
    first, *policies, last = [optimal_policy(ref, rewards, beta)[0]
                              for beta in (1e-4, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e9)]
    for fall in (lambda p: kl(p, ref), lambda p: mean(p, rewards)):
        assert (torch.stack([fall(p) for p in policies]).diff(dim=0) < 0).all()
    assert close(first.exp(), F.one_hot(rewards.argmax(-1), 6).double(), tol=1e-8)
    assert close(last, ref, tol=1e-8)


def test_eq04_estimated_offset_is_unbiased_for_Z_and_below_beta_log_Z():
    # Every draw of three of six responses there is, with its probability: no sampling error.
    draws = torch.tensor([*product(range(6), repeat=3)])                        # (216, 3)
    logprobs, given = ref[0][draws].sum(-1), rewards[0][draws]
    estimates = estimated_offset(given, beta)
    unbiased = lambda offset: close(mean(logprobs, (offset / beta).exp()), Z[0])
    assert estimates.shape == (216,) and close(logprobs.exp().sum(), 1.0)
    assert unbiased(estimates)
    assert value[0] - mean(logprobs, estimates) > 0.01                          # Jensen
    assert not unbiased(beta * (given / beta).logsumexp(-1))                    # forgets log N
    assert not unbiased(given.mean(-1))                                         # forgets e^{r/beta}


def test_eq04_estimated_offset_errs_by_one_over_the_root_of_N():
    generator = torch.Generator().manual_seed(0)

    def error(N):
        draws = torch.multinomial(ref[0].exp(), 500 * N, replacement=True, generator=generator)
        estimates = estimated_offset(rewards[0][draws].view(500, N), beta)
        return (estimates - value[0]).square().mean().sqrt().item()
    few, many = error(100), error(2500)
    assert few / many == pytest.approx(5, rel=0.15) and many < 0.02


def test_eq04_estimated_offset_is_the_mean_reward_for_large_beta_and_the_best_for_small():
    rewards = normals(115)(2, 3, 5)
    best = rewards.amax(-1)
    assert close(estimated_offset(rewards, 1e6), rewards.mean(-1), 1e-5)
    assert close(estimated_offset(rewards, 1e-4), best, 1e-3)                   # e^{r/beta}: inf
    for beta in (0.1, 1.0, 10.0):
        offset = estimated_offset(rewards, beta)
        assert (best - beta * math.log(5) <= offset).all() and (offset <= best).all()
    assert close(estimated_offset(rewards + 7, 0.5), estimated_offset(rewards, 0.5) + 7)
    assert close(estimated_offset(rewards[..., :1], 0.5), rewards[..., 0])      # one response


def test_eq04_needs_a_positive_beta_and_an_estimate_a_response():
    for beta, function in product((0.0, -0.1, math.nan), (
            lambda beta: optimal_policy(ref, rewards, beta),
            lambda beta: estimated_offset(rewards, beta))):
        with pytest.raises(ValueError, match=f"beta must be positive, got {beta}"):
            function(beta)
    with pytest.raises(ValueError, match="at least one response"):
        estimated_offset(torch.ones(2, 0), 1.0)


def test_eq05_dpo_is_eq02_with_eq04_put_in_for_the_reward():
    # r = beta log pi*/pi_ref + beta log Z, so DPO's loss of pi* is the reward model's loss of r:
    # Z cancels.
    dpo = lambda w, l, beta=beta: dpo_loss(best[:, w], best[:, l], ref[:, w], ref[:, l], beta)
    for w, l in product(range(6), repeat=2):
        won, lost = rewards[:, w].exp(), rewards[:, l].exp()
        bradley_terry = -torch.log(won / (won + lost))
        assert close(dpo(w, l), bradley_terry)
        if w != l:
            assert not close(dpo(l, w), bradley_terry)             # swapped
            assert not close(dpo(w, l, beta=1.0), bradley_terry)   # no beta


def test_eq05_gradient_is_the_one_in_the_dpo_paper():
    # -beta sigma(r_l - r_w) [grad log pi(y_w) - grad log pi(y_l)];
    # here with respect to the two log-probabilities.
    pairs, ref = normals(118)(2, 2, 20)
    push = 0.3 * torch.sigmoid(0.3 * (pairs - ref)[1] - 0.3 * (pairs - ref)[0])
    slopes = gradient(lambda p: dpo_loss(*p, *ref, 0.3), pairs)
    assert close(slopes, torch.stack([-push, push]))


def test_eq05_and_eq10_with_exact_bradley_terry_labels_on_all_pairs_reach_the_optimum():
    # The cross-entropy of sigma(margin) with the true P is smallest where margin = r_w - r_l:
    # at r_theta = r + b(x).
    w, l = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    P = 1 / (1 + (rewards[:, l] - rewards[:, w]).exp())
    for loss in (lambda p: dpo_loss(p[:, w], p[:, l], ref[:, w], ref[:, l], beta),
                 lambda p: una_pair_loss(r_theta(p)[:, w], r_theta(p)[:, l])):
        trained = fit(lambda p: P * loss(p))
        assert close(trained, best, tol=1e-6)
        for wrong in ((rewards, 2 * beta), (-rewards, beta)):
            assert not close(trained, optimal_policy(ref, *wrong)[0], tol=1e-6)


# ---------------------------------------------------------------- implicit reward, losses: Eq. 6-13

def test_eq06_is_beta_times_the_log_ratio_plus_offset():
    expected = beta * torch.log(policy.exp() / ref.exp()) + f
    assert close(implicit_reward(policy, ref, beta, f), expected)
    assert close(implicit_reward(policy, ref, beta) + f, expected)          # no offset by default
    assert close(implicit_reward(ref, ref, beta, f), f.expand(3, 6))        # the first step
    assert not close(implicit_reward(ref, policy, beta, f), expected)       # swapped
    # Every policy is a reward model with Z = 1: E_{pi_ref} e^{beta rho / beta} =
    # sum pi_ref pi/pi_ref = 1. An offset b makes that e^{b/beta}.
    assert close(mean(ref, (r_theta(policy) / beta).exp()), 1.0)
    assert close(mean(ref, (r_theta(policy, f) / beta).exp()), (f / beta).exp()[:, 0])


def test_eq07_is_the_squared_difference():
    loss = lambda r: una_reward_loss(r, rewards)
    assert close(loss(theta), theta**2 - 2 * theta * rewards + rewards**2)
    assert close(gradient(loss, theta), 2 * (theta - rewards))


def test_eq07_on_fresh_samples_has_the_gradient_of_rlhf_and_reaches_the_optimum_with_any_offset():
    # grad L = -2 beta grad J, as E_{y~pi}[b(x) grad log pi] = b(x) grad 1 = 0: the offset is a
    # baseline. Not so on samples of pi_ref, or if drawing the samples had a gradient, or if the
    # offset depended on the response. Nothing but pi_ref holds the policy back: it must be in it.
    def grad_L(b, samples=torch.Tensor.detach, anchor=ref):
        squared = lambda p: una_reward_loss(implicit_reward(p, anchor, beta, b), rewards)
        return by_logits(lambda p: mean(samples(p), squared(p)), theta)
    expected = -2 * beta * by_logits(J, theta)
    for b in (0.0, 3.7, f):
        assert close(grad_L(b), expected) and not close(grad_L(b), expected / beta)
        assert not close(grad_L(b, samples=lambda p: p), expected)
        assert not close(grad_L(b, samples=lambda p: ref), expected)
        trained = fit(lambda p: on_policy(una_reward_loss(r_theta(p, b), rewards), p))
        assert close(trained, best, tol=1e-6)
        assert not close(trained, optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-6)
    assert not close(grad_L(normals(125)(3, 6)), expected)
    assert not close(grad_L(0.0, anchor=ref.flip(-1)), expected)


def test_eq07_and_eq09_have_no_noise_at_the_optimum_with_beta_log_Z_and_only_with_it():
    # There r_theta = r for every response, so each single sample has gradient zero. Without that
    # offset, on fresh samples, the mean of Eq. 7 is zero still, as grad J is; not that of Eq. 9:
    # the slope of sigma weighs the residuals, so that they no longer average out.
    for loss, averages_out in (
            (lambda p, b: una_reward_loss(r_theta(p, b), rewards), True),
            (lambda p, b: una_score_loss(r_theta(p, b), scores, "mse"), False),
            (lambda p, b: una_score_loss(r_theta(p, b), scores, "bce"), False)):
        at_each = lambda b: gradient(lambda p: loss(p, b), best)
        assert close(at_each(offset), 0.0) and not close(at_each(0.0), 0.0)
        on_average = by_logits(lambda p: on_policy(loss(p, 0.0), p), best)
        assert close(on_average, 0.0, tol=1e-10 if averages_out else 1e-3) == averages_out


def test_eq07_trained_on_old_samples_reaches_the_optimum_if_the_offset_is_beta_log_Z():
    # Then r_theta = r is within reach, and a squared error can be zero. Samples of pi_ref. No
    # offset will do as well, if Z = 1: subtracting beta log Z from the reward makes it so and
    # leaves the optimum where it was.
    train = lambda b, given=rewards: fit(
        lambda p: ref.exp() * una_reward_loss(r_theta(p, b), given))
    assert close(train(offset), best, tol=1e-6)
    assert close(train(0.0, rewards - offset), best, tol=1e-6)
    for wrong in (0.0, offset + 0.1, value.mean()):                 # one offset for all prompts
        assert not close(train(wrong), best, tol=1e-3)


def test_eq08_is_the_chance_to_beat_a_response_of_reward_zero():
    reward = torch.linspace(-40, 40, 81, dtype=torch.float64)
    chance = reward.exp() / (reward.exp() + 1)                      # Eq. 1 with r_l = 0
    assert close(implicit_score(reward), chance, tol=1e-14)
    assert close(implicit_score(reward), (-reward_model_loss(reward, 0 * reward)).exp())
    assert not close(implicit_score(-reward), chance)
    assert implicit_score(torch.tensor([-1000.0, 0.0, 1000.0])).tolist() == [0, 0.5, 1]


# g of a score s and the given one t, and its slope by the reward: the table in una.py.
G = {
    "mse": (lambda s, t: (s - t) ** 2, lambda s, t: 2 * (s - t) * s * (1 - s)),
    "mae": (lambda s, t: torch.maximum(s - t, t - s), lambda s, t: (s - t).sign() * s * (1 - s)),
    "bce": (lambda s, t: -t * s.log() - (1 - t) * (1 - s).log(), lambda s, t: s - t),
}


def test_eq09_compares_scores():
    reward, given = 2 * normals(133)(30), torch.sigmoid(normals(134)(30))
    s = 1 / (1 + (-reward).exp())
    for g, (formula, slope) in G.items():
        loss = lambda r: una_score_loss(r, given, g)
        assert close(loss(reward), formula(s, given)), g
        assert close(gradient(loss, reward), slope(s, given)), g
        assert not close(loss(reward), formula(reward.abs(), given)), g         # not squashed
        for other in {*G} - {g}:
            assert not close(loss(reward), G[other][0](s, given)), (g, other)
    # Squared by default. Its slope at the start is half of what is missing.
    assert una_score_loss(reward, given).equal(una_score_loss(reward, given, "mse"))
    start = gradient(lambda r: una_score_loss(r, given), 0 * reward)
    assert close(start, (0.5 - given) / 2)


def test_eq09_refuses_scores_outside_zero_and_one_and_another_g():
    # The message names the first of them. 0 and 1 themselves are scores.
    for g, bad in product(G, (-1e-6, 1 + 1e-6, 1.5, -1.0, math.nan, math.inf)):
        with pytest.raises(ValueError, match=f"got {bad}"):
            una_score_loss(theta[0, :4], torch.tensor([0, bad, 7, 1], dtype=torch.float64), g)
        una_score_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), g)
    for g, loss in product(("MSE", "l2", "", None), (una_score_loss, una_binary_loss)):
        with pytest.raises(ValueError, match=f"got {g!r}"):
            loss(torch.zeros(2), torch.ones(2), g)


def test_eq10_is_eq02_on_implicit_rewards_and_so_dpo_with_any_offset():
    # Value and gradient: both responses answer the same prompt, so f(x) + c cancels.
    pairs, (ref_w, ref_l), b = normals(142)(2, 20), normals(143)(2, 20), normals(144)(20)

    def pair(p, beta=0.3, b_l=b):
        return una_pair_loss(implicit_reward(p[0], ref_w, beta, b),
                             implicit_reward(p[1], ref_l, beta, b_l))

    def same(loss, other):
        return (close(loss(pairs), other(pairs))
                and close(gradient(loss, pairs), gradient(other, pairs)))
    bradley_terry = lambda r: -torch.log(r[0].exp() / (r[0].exp() + r[1].exp()))
    assert same(lambda r: una_pair_loss(*r), bradley_terry)
    assert not same(lambda r: una_pair_loss(*r.flip(0)), bradley_terry)         # swapped pair
    dpo = lambda p: dpo_loss(*p, ref_w, ref_l, 0.3)
    assert same(pair, dpo)
    assert not same(lambda p: pair(p.flip(0)), dpo)                 # swapped pair
    assert not same(lambda p: pair(p, beta=1.0), dpo)               # missing beta
    assert not same(lambda p: pair(p, b_l=0.0), dpo)                # an offset that does not cancel


def test_eq11_is_the_squared_distance_to_the_label_and_eq12_the_cross_entropy_of_torch():
    reward, label = 2 * normals(145)(20), (normals(147)(20) > 0).double()
    loss, s = lambda label, *g: una_binary_loss(reward, label, *g), 1 / (1 + (-reward).exp())
    squared = torch.where(label == 1, (s - 1) ** 2, (s - 0) ** 2)
    entropy = F.binary_cross_entropy(s, label, reduction="none")
    assert close(loss(label, "mse"), squared) and close(loss(label), squared)   # the default
    assert close(loss(label, "bce"), entropy)
    assert close(entropy, F.binary_cross_entropy_with_logits(reward, label, reduction="none"))
    assert not close(loss(1 - label, "mse"), squared)                           # swapped
    assert not close(loss(1 - label, "bce"), entropy)


def test_eq11_eq12_and_eq13_of_noisy_labels_and_stored_scores_reach_the_optimum_with_the_offset():
    # A label is 1 with probability s = sigma(r). On average over labels both losses are smallest
    # at s_theta = s (both are proper), and so they are of the score s itself. With f + c =
    # beta log Z that is r_theta = r at all responses, true of pi* only. Samples of pi_ref.
    s, one = scores, torch.ones_like(scores)
    of_labels = lambda r: s * una_binary_loss(r, one, g) + (1 - s) * una_binary_loss(r, 0 * one, g)
    of_scores = lambda r: una_score_loss(r, s, g)
    for g, loss in product(("mse", "bce"), (of_labels, of_scores)):
        train = lambda b: fit(lambda p: ref.exp() * loss(r_theta(p, b)))
        assert close(train(offset), best, tol=1e-6) and not close(train(0.0), best, tol=1e-2), g


def test_eq13_is_smallest_at_the_logit_of_the_score():
    nine = torch.full((3, 6), 9.0).double()
    for g in G:
        slope = lambda r: gradient(lambda r: una_score_loss(r, scores, g), r)
        assert close(root(slope, -nine, nine), rewards, tol=1e-8), g
    # Scores 0.1, 0.2, 0.9 of one response: the mean is 0.4, the median 0.2, and mae takes the
    # median. Search s_theta on a grid of 0.01.
    s = torch.arange(1, 100).double() / 100
    for g, expected in (("mse", 0.40), ("bce", 0.40), ("mae", 0.20)):
        loss = sum(una_score_loss(s.logit(), 0 * s + given, g) for given in (0.1, 0.2, 0.9))
        assert s[loss.argmin()].item() == expected, g


# ---------------------------------------------------------------- the proof: Eq. 14-22

def test_eq14_log_sum_inequality_is_an_equality_if_all_ratios_are_equal_and_only_then():
    # A thousand random a, b > 0. Strictly greater, as random ratios are never all equal.
    a, b = normals(151)(2, 1000, 5).exp()
    right = lambda a: a.sum(-1) * (a.sum(-1) / b.sum(-1)).log()
    gap = lambda a: (a * (a / b).log()).sum(-1) - right(a)
    assert (gap(a) > 0).all() and close(gap(2.5 * b), 0.0)
    assert (gap(2.5 * b * torch.tensor([1, 1, 1, 1, 1.01])) > 0).all()
    assert not ((a * (b / a).log()).sum(-1) > right(a)).all()       # ratio upside down
    # 0 log 0 = 0. This is what lets a policy with probability 0 somewhere into the bound of J.
    half, b = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).double(), ref.exp() * (rewards / beta).exp()
    left = (half[:2] * (half[:2] / b[:, :2]).log()).sum(-1)
    assert (left > -b.sum(-1).log()).all() and close(-beta * left, J(half.log().expand(3, 6)))


def test_eq15_writes_the_objective_as_one_log_sum_for_any_f():
    # -beta pi log( pi / (pi_ref e^{(r-f)/beta}) ) = pi (r - f) - beta pi log pi/pi_ref,
    # and sum_y pi f = f.
    b = ref.exp() * ((rewards - f) / beta).exp()
    one_sum = -beta * mean(policy, (policy.exp() / b).log())
    assert close(J(policy), one_sum + f[:, 0])
    assert not close(J(policy), one_sum)                            # f not added back
    assert not close(J(policy), one_sum + f[:, 0] / beta)           # added back inside of beta


def test_eq16_eq19_and_eq20_beta_log_Z_bounds_every_policy_by_beta_KL_to_the_optimum():
    # J = -beta [ KL(pi || pi_ref e^{r/beta} / Z) - log Z ], the last line of appendix A: below
    # beta log Z by a KL that is zero for pi* alone. Policies near it, and a thousand anywhere.
    near, anywhere = best + 0.01 * normals(161)(100, 3, 6), 2 * normals(158)(1000, 3, 6)
    for p in (near.log_softmax(-1), anywhere.log_softmax(-1)):
        assert (J(p) < value).all() and close(J(p), -beta * (kl(p, best) - Z.log()))
        assert not close(J(p), -beta * (kl(best, p) - Z.log()))     # KL the other way round
        assert not close(J(p), beta * (kl(p, best) - Z.log()))
    optimum, maximum = optimal_policy(ref, rewards, beta)
    assert close(J(optimum), value) and close(maximum, value)
    # The bound is the same for any f: beta log Z_f + f, with Z_f = Z e^{-f/beta}.
    for b in (torch.full((3, 1), 5.0), f):
        log_Z_f = mean(ref, ((rewards - b) / beta).exp()).log()
        assert close(beta * log_Z_f + b[:, 0], value) and not close(beta * log_Z_f, value)


def test_eq17_ratio_is_one_over_lambda_for_every_response_and_lambda_is_Z_f():
    # pi* = pi_ref e^{r/beta} / Z, so pi* / (pi_ref e^{(r-f)/beta}) = e^{f/beta} / Z = 1 / Z_f.
    optimum, _ = optimal_policy(ref, rewards, beta)
    ratio = optimum.exp() / (ref.exp() * ((rewards - f) / beta).exp())
    assert close(1 / ratio, Z_f[:, None].expand(3, 6))              # the same for all y
    assert ratio[:, 0].std() > 0.1                                  # and not the same for all x


def test_eq18_a_policy_is_optimal_for_its_implicit_reward_with_any_offset():
    # For r = beta log pi/pi_ref + b(x), pi_ref e^{r/beta} = pi e^{b/beta}:
    # so Z = e^{b/beta}, and pi* = pi.
    for b in (0.0, 2.0, f):
        optimum, maximum = optimal_policy(ref, r_theta(policy, b), beta)
        assert close(optimum, policy)
        assert close(maximum[:, None] - b, 0.0)                     # f + c = beta log Z
    assert not close(optimal_policy(ref, r_theta(policy), 1.0)[0], policy)      # missing beta


def test_eq18_any_reward_is_the_implicit_reward_of_its_optimum_and_no_other_has_it():
    # c = beta log lambda with lambda = Z_f, so that f + c = beta log Z.
    (optimum, maximum), c = optimal_policy(ref, rewards, beta), beta * Z_f.log()[:, None]
    assert close(r_theta(optimum, f + c), rewards) and close(f + c, maximum[:, None])
    # d log pi* / d r = (I - 1 pi*^T) / beta:
    # the only change of the reward that pi* does not feel is a constant.
    jacobian = torch.autograd.functional.jacobian(
        lambda r: optimal_policy(ref[0], r, beta)[0], rewards[0])
    assert torch.linalg.matrix_rank(jacobian).item() == 5 and close(jacobian.sum(-1), 0.0)
    assert close(jacobian, (torch.eye(6).double() - best[0].exp()) / beta)


def test_eq21_jensen_and_eq22_each_line_of_the_proof_of_the_log_sum_inequality():
    # phi convex: the mean of phi is at least phi of the mean. Equal if all points are one;
    # reversed for a concave phi.
    a, b = normals(175)(2, 1000, 5).exp()
    A, B, phi = a.sum(-1), b.sum(-1), lambda t: t * t.log()
    average = lambda points: (b * points).sum(-1) / B
    assert (average(phi(a)) > phi(average(a))).all()
    assert (average(a.log()) < average(a).log()).all()
    one = a[:, :1].expand(1000, 5)
    assert close(average(phi(one)), phi(average(one)))
    t = a[0].clone().requires_grad_()
    slope, = torch.autograd.grad(phi(t).sum(), t, create_graph=True)
    curvature, = torch.autograd.grad(slope.sum(), t)
    assert close(slope, 1 + t.log()) and close(curvature, 1 / t)    # positive: phi is convex
    first, *others = [(a * (a / b).log()).sum(-1), (b * phi(a / b)).sum(-1),
                      B * (b / B[:, None] * phi(a / b)).sum(-1), B * average(phi(a / b))]
    last = B * phi(average(a / b))                                  # by Jensen
    assert all(close(first, other) for other in others)
    assert (first > last).all() and close(last, A * (A / B).log())


# ---------------------------------------------------------------- as printed

def test_printed_eq04_with_the_implicit_reward_in_Z_any_Z_fits():
    # Printed: r_theta = beta log pi/pi_ref + beta log Z with Z = E_ref e^{r_theta/beta}. For any
    # policy that is so with any Z; only the given reward's Z makes the reward the given one.
    for log_Z in (-3.0, 0.0, 5.0):
        assert close(mean(ref, (r_theta(policy, beta * log_Z) / beta).exp()).log(), log_Z)
    assert close(r_theta(best, offset), rewards)
    assert not close(r_theta(best, offset + 0.01), rewards, tol=1e-3)


def test_printed_eq06_f_and_c_zero_misses_the_optimum_by_a_computable_amount():
    # On samples of pi_ref minimise sum_y pi_ref (beta u - r)^2 over u = log pi/pi_ref, subject to
    # sum_y pi_ref e^u = 1. Lagrange: beta u + kappa e^u = r, with kappa from the constraint
    # (positive, as Z > 1). Solve it, bisection within bisection: the trained policy is this one and
    # not pi*, though it ranks the responses as pi* does.
    given, zeros = rewards.abs(), torch.zeros(3, 1).double()
    u = lambda kappa: root(lambda u: beta * u + kappa * u.exp() - given,
                           torch.full_like(ref, -40.0), given / beta)
    missing = lambda kappa: 1 - (ref + u(kappa)).exp().sum(-1, keepdim=True)
    trained = fit(lambda p: ref.exp() * una_reward_loss(r_theta(p), given))
    assert close(trained, ref + u(root(missing, zeros, zeros + 99)), tol=1e-7)
    optimum, _ = optimal_policy(ref, given, beta)
    assert (trained.exp() - optimum.exp()).abs().sum(-1).min() / 2 > 0.02       # total variation
    assert ((trained - ref).argsort() == given.argsort()).all()


def test_printed_eq06_f_and_c_zero_is_exact_if_and_only_if_Z_is_one():
    # "f(x) = c = 0 refers that implicit and explicit reward models are exactly the same":
    # no, they differ by beta log Z.
    with_Z_one = rewards - offset
    assert close(mean(ref, (with_Z_one / beta).exp()), 1.0)
    for given, difference in ((rewards, offset), (with_Z_one, 0 * offset)):
        optimum, _ = optimal_policy(ref, given, beta)
        assert close(given - r_theta(optimum), difference.expand(3, 6))
    assert offset.abs().min() > 0.05


def test_printed_eq09_is_not_equivalent_to_eq07():
    # Same world, same fresh samples, scores = sigma(rewards): the two gradients do not point the
    # same way, and the policy that Eq. 9 leads to is far from the optimum at some prompts.
    score = lambda p: on_policy(una_score_loss(r_theta(p), scores), p)
    reward = lambda p: on_policy(una_reward_loss(r_theta(p), rewards), p)
    slopes = by_logits(score, theta), by_logits(reward, theta)
    assert F.cosine_similarity(*slopes, dim=-1).min() < 0.99
    assert close(fit(reward), best, tol=1e-6)
    assert (fit(score).exp() - best.exp()).abs().sum(-1).max() / 2 > 0.1        # total variation


def test_printed_eq10_linear_is_unbounded_below():
    # -(r_w - r_l) pushes as hard at a margin of 1000 as at 0, so it has no minimum;
    # -log sigma(r_w - r_l) >= 0 lets go.
    margin = torch.tensor([0.0, 10.0, 1000.0], dtype=torch.float64)
    printed, ours = lambda m: -m, lambda m: una_pair_loss(m, 0 * m)
    assert (gradient(printed, margin) == -1).all() and printed(margin).min() == -1000
    assert (ours(margin) >= 0).all()
    assert close(gradient(ours, margin), [-0.5, -1 / (1 + math.exp(10)), 0.0])


def test_printed_eq11_printed_eq12_and_printed_eq13_minus_drives_scores_and_labels_apart():
    # 200 steps of gradient descent from rewards 0.5 and -0.5, on each loss and on its negative.
    label, given, start = torch.tensor(
        [[1, 0], [0.7, 0.3], [0.5, -0.5]], dtype=torch.float64)

    def descend(loss, sign):
        reward = start
        for _ in range(200):
            reward = reward - sign * gradient(loss, reward)
        return torch.sigmoid(reward)
    for g in ("mse", "bce"):
        (up, down), (up_minus, down_minus) = (
            descend(lambda r: una_binary_loss(r, label, g), sign) for sign in (1, -1))
        assert up > 0.9 and down < 0.1 and up_minus < 0.1 and down_minus > 0.9, g
    reached, apart = (descend(lambda r: una_score_loss(r, given), sign) for sign in (1, -1))
    assert close(reached, given, tol=1e-3) and (apart - given).abs().min() > 0.5
    # Eq. 12: L_BCE is -[y log s + (1 - y) log(1 - s)] already. The second printed line is right,
    # the first, which puts a minus before it, is its negative.
    s, ours = torch.sigmoid(start), una_binary_loss(start, label, "bce").sum()
    second_line = -(torch.log(s[0]) + torch.log(1 - s[1]))
    first_line = -F.binary_cross_entropy(s, label, reduction="sum")
    assert close(ours, second_line) and not close(ours, first_line) and close(ours, -first_line)


def test_printed_eq17_and_printed_eq19_lambda_is_no_constant_but_one_number_for_each_prompt():
    # pi_ref e^{r/beta} / lambda adds up to Z(x) / lambda: to 1 at all prompts only if Z is the same
    # at all of them. So Eq. 19's beta log lambda(x) belongs inside of E_x: the log of the mean is
    # more than the mean of the log.
    assert close(best.exp().sum(-1), 1.0)
    for constant in torch.linspace(Z.min().item(), Z.max().item(), 100):
        assert (Z / constant - 1).abs().max() > 0.1
    assert close(J(best).mean(), beta * Z.log().mean())
    assert beta * Z.mean().log() > J(best).mean() + 0.01


def test_printed_f_above_the_largest_reward_makes_Z_f_less_than_one_so_that_c_is_not_zero():
    # e^{(r - f)/beta} < 1 for every y. Only with Z_f = 1 would c = beta log Z_f be zero;
    # here it must be negative.
    f = rewards.max(-1, keepdim=True).values + 0.1
    Z_f = mean(ref, ((rewards - f) / beta).exp())[:, None]
    c = beta * Z_f.log()
    assert (Z_f < 1).all() and (c < -0.1).all()
    assert close(r_theta(best, f + c), rewards) and not close(r_theta(best, f), rewards)


# ---------------------------------------------------------------- una.py as a text

def test_meta_dpo_and_kto_stand_alone():
    # What is compared with UNA must not be made of UNA, or the comparison proves nothing.
    source = ast.parse(inspect.getsource(una)).body
    functions = {node.name: node for node in source if isinstance(node, ast.FunctionDef)}
    uses = lambda name: {*functions} & {node.id for node in ast.walk(functions[name])
                                        if isinstance(node, ast.Name)}
    assert uses("dpo_loss") == uses("kto_loss") == set()
    assert uses("una_binary_loss") == {"una_score_loss", "_alike"}              # such a use is seen
    assert not [node for node in source if isinstance(node, ast.Assign)]        # all are functions
    assert all(ast.get_docstring(function) for function in functions.values())
    imports = [node for node in source if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == [
        "import torch", "import torch.nn.functional as F"]


def test_meta_the_paper_in_three_responses_prints_what_a_calculator_says(capsys):
    runpy.run_path(una.__file__, run_name="__main__")
    rows = {line[:29].strip(): [float(x) for x in re.findall(r"-?\d+\.\d{3}", line[29:])]
            for line in capsys.readouterr().out.splitlines()}
    p, r = [0.5, 0.3, 0.2], [-1.0, 0.0, 1.0]
    sigma = lambda t: 1 / (1 + math.exp(-t))
    tilt = lambda beta: [q * math.exp(r_y / beta) for q, r_y in zip(p, r)]
    best = lambda beta: [weight / sum(tilt(beta)) for weight in tilt(beta)]
    theta = [0.5 * math.log(b / q) for b, q in zip(best(0.5), p)]
    third = [0, theta[2], 1]            # its reward: at pi_ref, at pi*, and there with the offset
    expected = {
        "pi_ref": p, "r, given": r, "pi_ref e^{r/beta}": [*tilt(0.5), sum(tilt(0.5))],
        "pi*: divided by Z": [*best(0.5), 0.5 * math.log(sum(tilt(0.5)))],
        "beta log pi_ref/pi_ref": [0, 0, 0], "beta log pi*/pi_ref": theta,
        "... + f + c = beta log Z": r,
        "preferred to the first: DPO": [-math.log(sigma(m)) for m in (0, 2, 2)],
        "label 1, bce": [-math.log(sigma(x)) for x in third],
        "label 1, mse": [(1 - sigma(x)) ** 2 for x in third],
        "label 1, mae": [1 - sigma(x) for x in third],
        "score sigma(1), mse": [(sigma(1) - sigma(x)) ** 2 for x in third],
        "reward 1": [(1 - x) ** 2 for x in third]}
    for b in (0.25, 0.5, 1.0):
        reward = sum(q * r_y for q, r_y in zip(best(b), r))
        KL = sum(q * math.log(q / q_ref) for q, q_ref in zip(best(b), p))
        expected[f"pi* of beta = {b}"] = [reward, KL, reward - 0.5 * KL]
    for name, values in expected.items():
        assert rows[name] == pytest.approx(values, abs=6e-4), name
