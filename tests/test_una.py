"""The paper, equation by equation: una.py against something written independently of it.

test_eqNN_... is about Eq. NN, in the paper's order; test_printed_... shows where an equation fails
as it is printed. Most of it happens in a world small enough to list, X prompts with Y responses
each: expectations are sums, and nothing is sampled. Wherever two things are claimed to be equal,
the nearest wrong version must fail the same comparison.
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


def world(seed, X=3, Y=6):
    """log pi_ref(y|x) and r(x, y) of all Y responses to each of X prompts: two tensors (X, Y)."""
    normal = normals(seed)
    return normal(X, Y).log_softmax(-1), normal(X, Y)


def on_policy(loss, logprobs):
    """E_{y~pi} loss, (X,): the samples are drawn from pi, and drawing them carries no gradient."""
    return (logprobs.detach().exp() * loss).sum(-1)


def fit(loss, ref):
    """Train a softmax policy from pi_ref, one logit a response, until the loss's gradient is zero.

    The loss is summed over prompts and responses.
    """
    logits = ref.clone().requires_grad_()
    # needs gradients only, and is deterministic
    optimizer = torch.optim.Rprop([logits], step_sizes=(1e-15, 1.0))
    for _ in range(1000):
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)).sum().backward()
        if logits.grad.abs().max() < 1e-10:
            return logits.detach().log_softmax(-1)
        optimizer.step()
    raise AssertionError("training did not converge")


def root(f, low, high):
    """Where increasing functions f cross zero, by bisection.

    There is one function for each element of the tensors low < high.
    """
    for _ in range(100):
        middle = (low + high) / 2
        below = f(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


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
    logits, tokens, mask = batch(1)
    expected = sequence_logprob(logits, tokens, mask)
    assert close(expected, looped_logprob(logits, tokens, mask))
    assert not close(expected, looped_logprob(logits, tokens, mask, shift=0))   # labels not shifted
    assert not close(expected, looped_logprob(logits, tokens, mask) / mask.sum(-1))   # mean for sum
    # padding counted
    assert not close(expected, looped_logprob(logits, tokens, spans(9, (3, 9), (1, 9), (5, 9))))
    # prompt counted
    assert not close(expected, looped_logprob(logits, tokens, spans(9, (1, 7), (1, 3), (1, 9))))
    # first token forgotten
    assert not close(expected, looped_logprob(logits, tokens, mask & mask.roll(1, -1)))
    # end-of-text forgotten
    assert not close(expected, looped_logprob(logits, tokens, mask & mask.roll(-1, -1)))


def test_logprob_of_all_responses_adds_up_to_probability_one():
    # By the chain rule the leaves of a prefix tree share out the probability 1, whatever is
    # predicted at each prefix. Responses of at most three tokens from {a, b, end}, cut at three: 15
    # leaves. Padding is `end` too.
    normal, end = normals(2), 2
    responses = [y for n in (1, 2, 3) for y in product((0, 1, end), repeat=n)
                 if end not in y[:-1] and (n == 3 or y[-1] == end)]
    predictions = {}
    logits, tokens = torch.zeros(15, 4, 3, dtype=torch.float64), torch.full((15, 4), end)
    for row, y in enumerate(responses):
        tokens[row, 1:1 + len(y)] = torch.tensor(y)
        for t in range(len(y)):
            logits[row, t] = predictions.setdefault(y[:t], normal(3))
    logprobs = sequence_logprob(logits, tokens, spans(4, *[(1, 1 + len(y)) for y in responses]))
    lengths = torch.tensor([len(y) for y in responses])
    assert close(logprobs.exp().sum(), 1.0)
    assert not close((logprobs / lengths).exp().sum(), 1.0)   # mean for sum
    # padding counted
    assert not close(sequence_logprob(logits, tokens, spans(4, *[(1, 4)] * 15)).exp().sum(), 1.0)


def test_logprob_is_zero_where_all_mass_is_on_the_next_token():
    _, tokens, mask = batch(3)
    certain = 1000.0 * F.one_hot(tokens, 7).double()
    assert close(sequence_logprob(certain.roll(-1, 1), tokens, mask), 0.0)
    assert (sequence_logprob(certain, tokens, mask) < -100).all()   # mass on the token itself


@pytest.mark.parametrize("left, right", [(0, 1), (0, 6), (1, 0), (6, 0), (2, 3)])
def test_logprob_ignores_padding_on_either_side(left, right):
    logits, tokens, mask = batch(4)
    expected = sequence_logprob(logits, tokens, mask)
    logits = F.pad(logits, (0, 0, left, right), value=5.0)
    tokens, mask = F.pad(tokens, (left, right), value=6), F.pad(mask, (left, right))
    assert close(sequence_logprob(logits, tokens, mask), expected, tol=1e-14)


def test_logprob_counts_end_of_text_once_where_padding_is_end_of_text_too():
    # Prompt 0, response (1, end), then padding with the same id as end:
    # log p(1|0) + log p(end|0 1), and nothing else.
    end = 2
    logits, tokens = normals(5)(1, 6, 3), torch.tensor([[0, 1, end, end, end, end]])
    p = logits.softmax(-1)[0]
    expected = torch.log(p[0, 1] * p[1, end])[None]
    assert close(sequence_logprob(logits, tokens, spans(6, (1, 3))), expected)
    from_ids = tokens != end
    from_ids[:, 0] = False
    # a mask made from ids: never
    assert not close(sequence_logprob(logits, tokens, from_ids), expected)
    assert not close(sequence_logprob(logits, tokens, spans(6, (1, 6))), expected)   # or four times


def test_logprob_depends_only_on_the_logits_one_before_each_response_token():
    # So of the prompt's logits only the last count, and of the response's all but the last.
    logits, tokens, mask = batch(6)
    used = gradient(lambda z: sequence_logprob(z, tokens, mask), logits).abs().sum(-1) > 0
    assert (used[:, :-1] == mask[:, 1:]).all() and not used[:, -1].any()


@pytest.mark.parametrize("garbage", [-100, -1, 7, 10**9])
def test_logprob_never_reads_ids_outside_the_response(garbage):
    logits, tokens, mask = batch(7)
    expected = sequence_logprob(logits, tokens, mask)
    tokens = tokens.masked_fill(~mask, garbage)
    assert close(sequence_logprob(logits, tokens, mask), expected, tol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_logprob_has_its_exact_gradient_whatever_logits_stand_outside(garbage):
    # A left-padded batch makes NaN where nothing may be attended to. Outside is all but the
    # positions one before each response token; the gradient there is 0 exactly.
    clean, tokens, mask = batch(16)
    outside = ~F.pad(mask[:, 1:], (0, 1))
    logits = clean.masked_fill(outside[..., None], garbage)
    naive = lambda z: (z[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
                       - z[:, :-1].logsumexp(-1)).where(mask[:, 1:], 0.0).sum(-1)
    for logprob in (lambda z: sequence_logprob(z, tokens, mask),
                    lambda z: token_logprobs(z, tokens, mask).sum(-1)):
        assert close(logprob(logits), looped_logprob(clean, tokens, mask))
        slope = gradient(logprob, logits)
        assert close(slope, gradient(lambda z: looped_logprob(z, tokens, mask), clean))
        assert (slope[outside] == 0).all()
    assert close(naive(logits), looped_logprob(clean, tokens, mask))
    assert gradient(naive, logits).isnan().any()   # where's 0, times what logsumexp made of it


def test_logprob_of_a_masked_vocabulary_is_that_of_the_vocabulary_that_is_left():
    # A logit of -inf takes a token out: p = 0, and the gradient 1_k - p is 0 there and finite at
    # the others. If all but one are out, that one is certain.
    logits, tokens, mask = batch(17)
    out = (torch.arange(7) >= 4) & (torch.arange(7) != tokens.roll(-1, 1)[..., None])
    masked, used = logits.masked_fill(out, -math.inf), F.pad(mask[:, 1:], (0, 1))
    p = logits.exp().where(~out, 0.0)
    p = p / p.sum(-1, keepdim=True)
    chosen = F.one_hot(tokens.roll(-1, 1), 7).double()
    expected = ((p * chosen).sum(-1).log() * used).sum(-1)
    logprob = lambda z: sequence_logprob(z, tokens, mask)
    assert close(logprob(masked), expected) and not close(logprob(logits), expected)
    assert close(gradient(logprob, masked), (chosen - p) * used[..., None])
    certain = logits.masked_fill(chosen == 0, -math.inf)
    assert close(logprob(certain), 0.0) and close(gradient(logprob, certain), 0.0)


class Float32Sizes(torch.overrides.TorchFunctionMode):
    """While it is on, collects the number of elements of every float32 tensor that comes about."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if torch.is_tensor(result) and result.dtype == torch.float32:
            self.seen.append(result.numel())
        return result


def test_logprob_copies_no_more_than_the_response_to_float32():
    # Logits are what fills the memory. Here 8 of 512 positions are of the response.
    logits = torch.zeros(1, 512, 50, dtype=torch.bfloat16)
    tokens, mask = torch.zeros(1, 512, dtype=torch.long), spans(512, (504, 512))
    with Float32Sizes() as sizes:
        sequence_logprob(logits, tokens, mask)
    assert max(sizes.seen) == max(8 * 50, 511)   # the response's logits, or the (1, T-1) result
    with Float32Sizes() as sizes:
        logits[:, :-1].float().logsumexp(-1)
    assert max(sizes.seen) == 511 * 50


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_logprob_rejects_a_mask_that_is_not_bool(dtype):
    # A tokenizer's mask is made of integers 0 and 1. As indices they would mean something else.
    logits, tokens, mask = batch(18)
    for function in (sequence_logprob, token_logprobs):
        with pytest.raises(ValueError, match=f"must be bool, got {dtype}"):
            function(logits, tokens, mask.to(dtype))


def test_logprob_leaves_its_arguments_as_they_were():
    logits, tokens, mask = batch(8)
    copies = logits.clone(), tokens.clone(), mask.clone()
    sequence_logprob(logits, tokens, mask)
    assert logits.equal(copies[0]) and tokens.equal(copies[1]) and mask.equal(copies[2])


def test_logprob_rejects_a_row_without_a_response():
    logits, tokens, mask = batch(9)
    mask[1] = False
    with pytest.raises(ValueError, match="empty"):
        sequence_logprob(logits, tokens, mask)


def test_logprob_rejects_a_response_at_position_zero():
    # Nothing stands before the first token, so no logits predict it. One such row is enough.
    logits, tokens, mask = batch(10)
    mask[2, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        sequence_logprob(logits, tokens, mask)


def test_logprob_of_bf16_logits_is_computed_in_float32():
    # bf16 has 8 bits: a log-probability near -40 comes in steps of 1/4.
    # The logits are rounded, the sum must not be.
    logits, tokens, mask = batch(11)
    rounded = logits.bfloat16()
    logprob = sequence_logprob(rounded, tokens, mask)
    exact = looped_logprob(rounded.double(), tokens, mask)
    assert logprob.dtype == torch.float32 and close(logprob.double(), exact, tol=1e-5)
    # log-softmax of bf16, in bf16
    assert not close(looped_logprob(rounded, tokens, mask).double(), exact, tol=1e-5)


def test_logprob_raises_16_bits_to_32_and_keeps_32_and_64():
    logits, tokens, mask = batch(12)
    for given in (torch.float16, torch.bfloat16, torch.float32):
        assert sequence_logprob(logits.to(given), tokens, mask).dtype == torch.float32
    assert sequence_logprob(logits, tokens, mask).dtype == torch.float64


def test_logprob_gather_minus_logsumexp_is_log_softmax_then_gather():
    logits, tokens, mask = batch(13)

    def log_softmax_gather(z):
        logprobs = z[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (logprobs * mask[:, 1:]).sum(-1)

    ours = lambda z: sequence_logprob(z, tokens, mask)
    assert close(ours(logits), log_softmax_gather(logits))
    assert close(gradient(ours, logits), gradient(log_softmax_gather, logits))
    assert torch.autograd.gradcheck(ours, logits.requires_grad_())


def test_logprob_is_finite_for_huge_logits():
    logits, tokens, mask = batch(14)
    assert sequence_logprob(1e4 * logits, tokens, mask).isfinite().all()
    assert gradient(lambda z: sequence_logprob(z, tokens, mask), 1e4 * logits).isfinite().all()


def test_logprob_is_a_sum_so_that_doubling_independent_tokens_doubles_rho():
    # If all positions predict the same distribution, pi(yy) = pi(y)^2 and log pi/pi_ref doubles.
    # A mean would not move.
    normal = normals(15)
    policy, ref = normal(1, 1, 7).expand(1, 9, 7), normal(1, 1, 7).expand(1, 9, 7)
    tokens = torch.tensor([[0, 3, 5, 1, 6, 3, 5, 1, 6]])
    rho, doubled = (sequence_logprob(policy, tokens, m) - sequence_logprob(ref, tokens, m)
                    for m in (spans(9, (1, 5)), spans(9, (1, 9))))
    assert close(doubled, 2 * rho)
    assert not close(doubled / 8, 2 * (rho / 4))


# ---------------------------------------------------------------- RLHF: Eq. 1-3

def test_eq01_bradley_terry_is_sigmoid_of_the_difference():
    winner, loser = normals(101)(2, 50)
    P = winner.exp() / (winner.exp() + loser.exp())
    assert close((-reward_model_loss(winner, loser)).exp(), P)
    assert close((-reward_model_loss(loser, winner)).exp(), 1 - P)   # one of the two must win
    assert not close((-reward_model_loss(loser, winner)).exp(), P)   # swapped pair


def test_eq02_is_minus_log_likelihood_of_the_judges_choices():
    winner, loser = normals(102)(2, 50)
    by_hand = [-math.log(math.exp(w) / (math.exp(w) + math.exp(l)))
               for w, l in zip(winner.tolist(), loser.tolist())]
    assert close(reward_model_loss(winner, loser), by_hand)


def test_eq02_gradient_is_what_the_model_gets_wrong():
    # d/dm (-log sigma(m)) = -(1 - sigma(m)): a choice predicted with certainty teaches nothing.
    winner, loser = normals(103)(2, 50)
    surprise = 1 - winner.exp() / (winner.exp() + loser.exp())
    assert close(gradient(lambda r: reward_model_loss(r, loser), winner), -surprise)
    assert close(gradient(lambda r: reward_model_loss(winner, r), loser), surprise)


def test_eq02_best_reward_model_predicts_the_frequencies_of_the_choices():
    # y_1 beats y_2 in 30 of 40 judgements: the likelihood is greatest where
    # sigma(r_1 - r_2) = 30/40, that is at log 3.
    loss = lambda m: 30 * reward_model_loss(m, 0 * m) + 10 * reward_model_loss(0 * m, m)
    nine = torch.tensor([9.0]).double()
    margin = root(lambda m: gradient(loss, m), -nine, nine)
    assert close(margin, math.log(3))


def test_eq03_is_mean_reward_minus_beta_KL():
    # By hand: plain floats, sum over all responses of p r - beta p log(p / q).
    (ref, rewards), beta = world(104), 0.3
    logprobs = normals(105)(3, 6).log_softmax(-1)
    by_hand = [sum(p * r - beta * p * math.log(p / q) for p, q, r in zip(*row))
               for row in zip(logprobs.exp().tolist(), ref.exp().tolist(), rewards.tolist())]
    assert close(rlhf_objective(logprobs, ref, rewards, beta), by_hand)
    # policy and reference swapped
    assert not close(rlhf_objective(ref, logprobs, rewards, beta), by_hand)


def test_eq03_KL_is_that_of_torch_distributions():
    p, q = normals(106)(2, 3, 6).log_softmax(-1)
    categorical = torch.distributions.Categorical
    KL = torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))
    assert close(rlhf_objective(p, q, torch.zeros_like(p), 2.0), -2.0 * KL)


def test_eq03_without_beta_is_the_mean_reward_and_at_the_reference_too():
    (ref, rewards), logprobs = world(107), normals(108)(3, 6).log_softmax(-1)
    assert close(rlhf_objective(logprobs, ref, rewards, 0.0), (logprobs.exp() * rewards).sum(-1))
    # KL(pi_ref || pi_ref) = 0
    assert close(rlhf_objective(ref, ref, rewards, 5.0), (ref.exp() * rewards).sum(-1))


def test_eq03_of_a_one_hot_policy_is_finite():
    # p log p -> 0: the policy that always says y has J = r(y) + beta log pi_ref(y).
    # For one prompt, and in any batch.
    ref, rewards = world(109, X=6)
    one_hot = torch.eye(6, dtype=torch.float64).log()
    expected = (rewards + 0.7 * ref).diagonal()
    assert close(rlhf_objective(one_hot, ref, rewards, 0.7), expected)
    assert close(rlhf_objective(one_hot[2], ref[2], rewards[2], 0.7), expected[2])
    batched = [t.view(2, 3, 6) for t in (one_hot, ref, rewards)]
    assert close(rlhf_objective(*batched, 0.7), expected.view(2, 3))


@pytest.mark.parametrize("reference_says_it", [True, False])
def test_eq03_has_a_finite_gradient_where_a_probability_is_zero(reference_says_it):
    # dJ / d log pi = p (r - beta rho) - beta p, and 0 at the response that pi never gives, whether
    # or not the reference gives it.
    (ref, rewards), beta = world(188), 0.7
    logprobs = normals(189)(3, 6).log_softmax(-1)
    logprobs[:, 2] = -math.inf
    if not reference_says_it:
        ref[:, 2] = -math.inf
    J = lambda p: rlhf_objective(p, ref, rewards, beta)
    others = [0, 1, 3, 4, 5]
    p, rho = logprobs[:, others].exp(), (logprobs - ref)[:, others]
    expected = torch.zeros(3, 6).double()
    expected[:, others] = p * (rewards[:, others] - beta * rho) - beta * p
    assert close(J(logprobs), (p * (rewards[:, others] - beta * rho)).sum(-1))
    assert close(gradient(J, logprobs), expected)

    def naive(logprobs):
        terms = logprobs.exp() * (rewards - beta * (logprobs - ref))
        return terms.where(logprobs.exp() > 0, 0.0).sum(-1)
    assert close(naive(logprobs), J(logprobs)) and gradient(naive, logprobs).isnan().any()


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_eq03_never_reads_the_reward_of_a_response_of_probability_zero(reward):
    (ref, rewards), logprobs = world(190), normals(191)(3, 6).log_softmax(-1)
    logprobs[:, 2] = -math.inf
    J = lambda p, rewards: rlhf_objective(p, ref, rewards, 0.7)
    other = rewards.clone()
    other[:, 2] = reward
    assert close(J(logprobs, other), J(logprobs, rewards))
    expected = gradient(lambda p: J(p, rewards), logprobs)
    assert close(gradient(lambda p: J(p, other), logprobs), expected)


def test_eq03_of_a_policy_that_says_what_the_reference_never_says_is_minus_infinity():
    policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert rlhf_objective(policy, ref, torch.zeros(2), 0.7) == -math.inf


# ---------------------------------------------------------------- DPO: Eq. 4 and 5

def test_eq04_optimum_is_the_reference_tilted_by_the_reward():
    # By hand: weigh each response by e^{r/beta}, then normalise; the normaliser is Z(x).
    (ref, rewards), beta = world(110), 0.4
    weights = ref.exp() * (rewards / beta).exp()
    Z = weights.sum(-1)
    policy, value = optimal_policy(ref, rewards, beta)
    assert close(policy.exp(), weights / Z[:, None]) and close(value, beta * Z.log())
    assert close(rewards, beta * (policy - ref) + value[:, None])   # the form printed as Eq. 4
    assert not close(rewards, (policy - ref) + value[:, None])      # missing beta
    assert not close(rewards, beta * (policy - ref))                # missing beta log Z


def test_eq04_estimated_offset_is_unbiased_for_Z_and_below_beta_log_Z():
    # Every draw of three of four responses there is, with its probability: no sampling error.
    (ref, rewards), beta = world(113, X=1, Y=4), 0.4
    ref, rewards = ref[0], rewards[0]
    draws = torch.tensor([*product(range(4), repeat=3)])                        # (64, 3)
    probs = ref[draws].sum(-1).exp()
    estimates = estimated_offset(rewards[draws], beta)
    Z = (ref.exp() * (rewards / beta).exp()).sum()
    assert estimates.shape == (64,) and close(probs.sum(), 1.0)
    assert close((probs * (estimates / beta).exp()).sum(), Z)
    below = (beta * Z.log() - (probs * estimates).sum()).item()
    assert below > 0.01                                                         # Jensen
    without_mean = beta * (rewards[draws] / beta).logsumexp(-1)                 # forgets log N
    assert not close((probs * (without_mean / beta).exp()).sum(), Z)
    mean_reward = rewards[draws].mean(-1)                                       # forgets e^{r/beta}
    assert not close((probs * (mean_reward / beta).exp()).sum(), Z)


def test_eq04_estimated_offset_errs_by_one_over_the_root_of_N():
    (ref, rewards), beta = world(114, X=1), 1.0
    exact = optimal_policy(ref, rewards, beta)[1].item()
    generator = torch.Generator().manual_seed(0)
    errors = []
    for N in (100, 10_000):
        draws = torch.multinomial(ref[0].exp(), 500 * N, replacement=True, generator=generator)
        estimates = estimated_offset(rewards[0][draws].view(500, N), beta)
        errors.append((estimates - exact).square().mean().sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15) and errors[1] < 0.02


def test_eq04_estimated_offset_is_the_mean_reward_for_large_beta_and_the_best_for_small():
    rewards = normals(115)(2, 3, 5)
    assert close(estimated_offset(rewards, 1e6), rewards.mean(-1), 1e-5)
    assert close(estimated_offset(rewards, 1e-4), rewards.amax(-1), 1e-3)       # e^{r/beta}: inf
    for beta in (0.1, 1.0, 10.0):
        offset, best = estimated_offset(rewards, beta), rewards.amax(-1)
        assert (best - beta * math.log(5) <= offset).all() and (offset <= best).all()
    assert close(estimated_offset(rewards + 7, 0.5), estimated_offset(rewards, 0.5) + 7)
    assert close(estimated_offset(rewards[..., :1], 0.5), rewards[..., 0])      # one response


@pytest.mark.parametrize("rewards, beta, message", [
    (torch.ones(3), 0.0, "beta must be positive, got 0.0"),
    (torch.ones(3), -1.0, "beta must be positive, got -1.0"),
    (torch.ones(3), math.nan, "beta must be positive, got nan"),
    (torch.ones(2, 0), 1.0, "at least one response"),
])
def test_eq04_estimated_offset_needs_a_positive_beta_and_a_response(rewards, beta, message):
    with pytest.raises(ValueError, match=message):
        estimated_offset(rewards, beta)


def test_eq04_optimum_beats_ascent_and_a_thousand_random_policies():
    (ref, rewards), beta = world(111, X=1), 0.4
    best, value = optimal_policy(ref, rewards, beta)
    others = (3 * normals(112)(1000, 6)).log_softmax(-1)
    assert (rlhf_objective(others, ref, rewards, beta) < value).all()
    climbed = fit(lambda logprobs: -rlhf_objective(logprobs, ref, rewards, beta), ref)
    assert close(climbed, best, tol=1e-7)
    assert not close(climbed, optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-7)


def test_eq04_larger_beta_smaller_KL_and_smaller_reward():
    # With t = 1/beta and under pi*: d E[r] / dt = Var(r) > 0 and d KL / dt = t Var(r) > 0.
    # So both fall as beta grows.
    ref, rewards = world(113)
    betas = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    policies = [optimal_policy(ref, rewards, beta)[0] for beta in betas]
    KL = torch.stack([(p.exp() * (p - ref)).sum(-1) for p in policies])
    reward = torch.stack([(p.exp() * rewards).sum(-1) for p in policies])
    assert (KL.diff(dim=0) < 0).all() and (reward.diff(dim=0) < 0).all()


def test_eq04_limits_are_the_reference_and_the_best_response():
    ref, rewards = world(114)
    best = F.one_hot(rewards.argmax(-1), 6).double()
    assert close(optimal_policy(ref, rewards, 1e9)[0], ref, tol=1e-8)   # beta -> infinity
    # beta -> 0; and no overflow
    assert close(optimal_policy(ref, rewards, 1e-4)[0].exp(), best, tol=1e-8)


def test_eq04_what_the_reference_never_says_the_optimum_never_says():
    # pi_ref(y) = 0 makes pi*(y) = 0 however large the reward,
    # and such a response adds nothing to Z or J.
    (ref, rewards), beta = world(187, X=1), 0.4
    ref = torch.cat([ref, torch.tensor([[-math.inf]])], dim=1)
    with_it = torch.cat([rewards, torch.tensor([[100.0]])], dim=1)
    policy, value = optimal_policy(ref, with_it, beta)
    assert policy[0, 6] == -math.inf and close(value, optimal_policy(ref[:, :6], rewards, beta)[1])
    assert close(rlhf_objective(policy, ref, with_it, beta), value)


def test_eq04_batch_dimensions_are_free():
    ref, rewards = world(115, X=6)
    policy, value = optimal_policy(ref, rewards, 0.5)
    batched = optimal_policy(ref.view(2, 3, 6), rewards.view(2, 3, 6), 0.5)
    assert close(batched[0], policy.view(2, 3, 6)) and close(batched[1], value.view(2, 3))
    assert close(optimal_policy(ref[4], rewards[4], 0.5)[1], value[4])


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_eq04_rejects_a_beta_that_is_not_positive(beta):
    with pytest.raises(ValueError, match=f"got {beta}"):
        optimal_policy(*world(116), beta)


def test_eq05_dpo_is_eq02_with_eq04_put_in_for_the_reward():
    # r = beta log pi*/pi_ref + beta log Z, so DPO's loss of pi* is the reward model's loss of r:
    # Z cancels.
    (ref, rewards), beta = world(117), 0.4
    policy, _ = optimal_policy(ref, rewards, beta)
    dpo = lambda w, l, beta=beta: dpo_loss(policy[:, w], policy[:, l], ref[:, w], ref[:, l], beta)
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
    w, l, ref_w, ref_l = normals(118)(4, 20)
    push = 0.3 * torch.sigmoid(0.3 * (l - ref_l) - 0.3 * (w - ref_w))
    assert close(gradient(lambda w: dpo_loss(w, l, ref_w, ref_l, 0.3), w), -push)
    assert close(gradient(lambda l: dpo_loss(w, l, ref_w, ref_l, 0.3), l), push)


@pytest.mark.parametrize("pair_loss", ["dpo", "una"])
def test_eq05_and_eq10_with_exact_bradley_terry_labels_on_all_pairs_reach_the_optimum(pair_loss):
    # The cross-entropy of sigma(margin) with the true P is smallest where margin = r_w - r_l:
    # at r_theta = r + b(x).
    (ref, rewards), beta = world(119), 0.4
    w, l = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    P = 1 / (1 + (rewards[:, l] - rewards[:, w]).exp())

    def loss(logprobs):
        if pair_loss == "dpo":
            return P * dpo_loss(logprobs[:, w], logprobs[:, l], ref[:, w], ref[:, l], beta)
        reward = implicit_reward(logprobs, ref, beta)
        return P * una_pair_loss(reward[:, w], reward[:, l])

    trained = fit(loss, ref)
    assert close(trained, optimal_policy(ref, rewards, beta)[0], tol=1e-6)
    assert not close(trained, optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-6)
    assert not close(trained, optimal_policy(ref, -rewards, beta)[0], tol=1e-6)


# ---------------------------------------------------------------- implicit reward, losses: Eq. 6-13

def test_eq06_is_beta_times_the_log_ratio_plus_offset():
    logprob, ref, offset = normals(120)(3, 20)
    expected = 0.3 * torch.log(logprob.exp() / ref.exp()) + offset
    assert close(implicit_reward(logprob, ref, 0.3, offset), expected)
    assert close(implicit_reward(logprob, ref, 0.3) + offset, expected)   # no offset by default
    # reference and policy swapped
    assert not close(implicit_reward(ref, logprob, 0.3, offset), expected)
    assert close(implicit_reward(ref, ref, 0.3, offset), offset)   # at the start of training


def test_eq06_every_policy_is_a_reward_model_with_Z_equal_to_one():
    # E_{pi_ref} e^{beta rho / beta} = sum pi_ref pi/pi_ref = 1. An offset b makes that e^{b/beta}.
    logprobs, ref = normals(121)(2, 3, 6).log_softmax(-1)
    partition = (ref + implicit_reward(logprobs, ref, 0.3) / 0.3).exp().sum(-1)
    shifted = (ref + implicit_reward(logprobs, ref, 0.3, offset=0.6) / 0.3).exp().sum(-1)
    assert close(partition, 1.0) and close(shifted, math.exp(2))


def test_eq07_is_the_squared_difference():
    ours, given = normals(122)(2, 20)
    assert close(una_reward_loss(ours, given), ours**2 - 2 * ours * given + given**2)
    assert close(gradient(lambda r: una_reward_loss(r, given), ours), 2 * (ours - given))


def fresh_samples_gradient(offset, samples="fixed"):
    """Gradients of Eq. 7 and of J (Eq. 3) at a random policy, from all responses; beta is 0.4."""
    ref, rewards = world(123)

    def loss(theta):
        logprobs = theta.log_softmax(-1)
        squared = una_reward_loss(implicit_reward(logprobs, ref, 0.4, offset), rewards)
        weights = {"fixed": logprobs.detach(), "differentiated": logprobs, "old": ref}[samples]
        return (weights.exp() * squared).sum(-1)

    theta, J = normals(124)(3, 6), lambda t: rlhf_objective(t.log_softmax(-1), ref, rewards, 0.4)
    return gradient(loss, theta), gradient(J, theta)


@pytest.mark.parametrize("offset", [0.0, 3.7, torch.tensor([[-2.0], [0.5], [4.0]])],
                         ids=["none", "constant", "f(x)"])
def test_eq07_on_fresh_samples_has_the_gradient_of_rlhf(offset):
    # grad L = -2 beta grad J, as E_{y~pi}[b(x) grad log pi] = b(x) grad 1 = 0:
    # the offset is a baseline.
    grad_L, grad_J = fresh_samples_gradient(offset)
    assert close(grad_L, -2 * 0.4 * grad_J)
    assert not close(grad_L, -2 * grad_J)   # missing beta
    assert not close(fresh_samples_gradient(offset, "differentiated")[0], -2 * 0.4 * grad_J)
    # samples of pi_ref
    assert not close(fresh_samples_gradient(offset, "old")[0], -2 * 0.4 * grad_J)


def test_eq07_offset_that_depends_on_the_response_is_no_baseline():
    grad_L, grad_J = fresh_samples_gradient(offset=normals(125)(3, 6))
    assert not close(grad_L, -2 * 0.4 * grad_J)


def test_eq07_gradient_changes_with_the_reference():
    # Nothing but pi_ref holds the policy back, so it must be in the gradient.
    (ref, rewards), theta = world(126), normals(127)(3, 6)
    loss = lambda p, anchor: on_policy(una_reward_loss(implicit_reward(p, anchor, 0.4), rewards), p)
    one, other = (gradient(lambda t: loss(t.log_softmax(-1), anchor), theta)
                  for anchor in (ref, ref.flip(-1)))
    assert not close(one, other)


@pytest.mark.parametrize("offset", [0.0, 3.7, torch.tensor([[-2.0], [0.5], [4.0]])],
                         ids=["none", "constant", "f(x)"])
def test_eq07_trained_on_fresh_samples_reaches_the_optimum_with_any_offset(offset):
    (ref, rewards), beta = world(128), 0.5
    loss = lambda p: una_reward_loss(implicit_reward(p, ref, beta, offset), rewards)
    trained = fit(lambda p: on_policy(loss(p), p), ref)
    assert close(trained, optimal_policy(ref, rewards, beta)[0], tol=1e-6)
    assert not close(trained, optimal_policy(ref, rewards, 2 * beta)[0], tol=1e-6)


def test_eq07_noise_is_zero_at_the_optimum_with_beta_log_Z_and_only_with_it():
    # There r_theta = r for every response, so each single sample has gradient zero;
    # with another offset only the mean.
    (ref, rewards), beta = world(129), 0.4
    policy, value = optimal_policy(ref, rewards, beta)
    loss = lambda p, offset: una_reward_loss(implicit_reward(p, ref, beta, offset), rewards)
    at_each = lambda offset: gradient(lambda p: loss(p, offset), policy)
    assert close(at_each(value[:, None]), 0.0) and not close(at_each(0.0), 0.0)
    mean = lambda theta: on_policy(loss(theta.log_softmax(-1), 0.0), theta.log_softmax(-1))
    assert close(gradient(mean, policy), 0.0)


def test_eq07_trained_on_old_samples_reaches_the_optimum_if_the_offset_is_beta_log_Z():
    # Then r_theta = r is within reach, and a squared error can be zero. Samples of pi_ref.
    (ref, rewards), beta = world(130), 0.5
    best, value = optimal_policy(ref, rewards, beta)
    loss = lambda p, offset: una_reward_loss(implicit_reward(p, ref, beta, offset), rewards)
    train = lambda offset: fit(lambda p: ref.exp() * loss(p, offset), ref)
    assert close(train(value[:, None]), best, tol=1e-6)
    assert not close(train(value[:, None] + 0.1), best, tol=1e-3)
    assert not close(train(value.mean()), best, tol=1e-3)   # one offset for all prompts


def test_eq07_trained_on_old_samples_without_offset_reaches_the_optimum_if_Z_is_one():
    # Subtracting beta log Z from the reward makes Z = 1 and leaves the optimum where it was.
    (ref, rewards), beta = world(131), 0.5
    best, value = optimal_policy(ref, rewards, beta)
    loss = lambda p, rewards: una_reward_loss(implicit_reward(p, ref, beta), rewards)
    train = lambda rewards: fit(lambda p: ref.exp() * loss(p, rewards), ref)
    assert close(train(rewards - value[:, None]), best, tol=1e-6)
    assert not close(train(rewards), best, tol=1e-2)


def test_eq08_is_the_chance_to_beat_a_response_of_reward_zero():
    reward = torch.linspace(-40, 40, 81, dtype=torch.float64)
    # Eq. 1 with r_l = 0
    assert close(implicit_score(reward), reward.exp() / (reward.exp() + 1), tol=1e-14)
    assert close(implicit_score(reward), (-reward_model_loss(reward, 0 * reward)).exp())
    assert implicit_score(torch.tensor([-1000.0, 0.0, 1000.0])).tolist() == [0, 0.5, 1]
    assert not close(implicit_score(-reward), reward.exp() / (reward.exp() + 1))   # sign


@pytest.mark.parametrize("g, formula", [
    ("mse", lambda s, given: (s - given) ** 2),
    ("mae", lambda s, given: torch.maximum(s - given, given - s)),
    ("bce", lambda s, given: -given * s.log() - (1 - given) * (1 - s).log()),
])
def test_eq09_compares_scores(g, formula):
    reward, given = 2 * normals(133)(30), torch.sigmoid(normals(134)(30))
    s = 1 / (1 + (-reward).exp())
    assert close(una_score_loss(reward, given, g), formula(s, given))
    # reward not squashed
    assert not close(una_score_loss(reward, given, g), formula(reward.abs(), given))
    for other in {"mse", "mae", "bce"} - {g}:
        assert not close(una_score_loss(reward, given, other), formula(s, given))


def test_eq09_is_squared_by_default():
    reward, given = normals(135)(9), torch.sigmoid(normals(136)(9))
    assert una_score_loss(reward, given).equal(una_score_loss(reward, given, "mse"))
    assert una_binary_loss(reward, given > 0.5).equal(una_binary_loss(reward, given > 0.5, "mse"))


@pytest.mark.parametrize("g, slope", [
    ("mse", lambda s, given: 2 * (s - given) * s * (1 - s)),
    ("mae", lambda s, given: (s - given).sign() * s * (1 - s)),
    ("bce", lambda s, given: s - given),
])
def test_eq09_slopes_are_those_of_the_table_in_una(g, slope):
    reward, given = 2 * normals(137)(30), torch.sigmoid(normals(138)(30))
    expected = slope(torch.sigmoid(reward), given)
    assert close(gradient(lambda r: una_score_loss(r, given, g), reward), expected)


def test_eq09_squared_slope_at_the_start_is_half_of_what_is_missing():
    given = torch.sigmoid(normals(139)(9))
    assert close(gradient(lambda r: una_score_loss(r, given), 0 * given), (0.5 - given) / 2)


def test_eq09_is_at_the_optimum_only_with_the_offset_even_on_fresh_samples():
    # grad J is zero at pi*. So is Eq. 9's gradient if f + c = beta log Z (residuals are zero), but
    # not if f = c = 0: there the slope of sigma weighs the residuals, so that they no longer
    # average out as in Eq. 7.
    (ref, rewards), beta = world(140), 0.5
    best, value = optimal_policy(ref, rewards, beta)
    for g in ("mse", "bce"):
        reward = lambda p, offset: implicit_reward(p, ref, beta, offset)
        given = torch.sigmoid(rewards)
        loss = lambda p, offset: on_policy(una_score_loss(reward(p, offset), given, g), p)
        at_best = lambda offset: gradient(lambda t: loss(t.log_softmax(-1), offset), best)
        assert close(at_best(value[:, None]), 0.0) and at_best(0.0).abs().max() > 1e-3


@pytest.mark.parametrize("score", [-1e-6, 1 + 1e-6, 1.5, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("g", ["mse", "bce", "mae"])
def test_eq09_rejects_scores_outside_zero_and_one(score, g):
    # The message names the first of them. 0 and 1 themselves are scores.
    for scores in ([0.0, 1.0, score, 0.5], [0.5, score, 7.0]):
        with pytest.raises(ValueError, match=f"got {score}"):
            una_score_loss(torch.zeros(len(scores)), torch.tensor(scores, dtype=torch.float64), g)
    una_score_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), g)


@pytest.mark.parametrize("g", ["MSE", "l2", "", None])
def test_eq09_rejects_another_g(g):
    with pytest.raises(ValueError, match=f"got {g!r}"):
        una_score_loss(torch.zeros(2), torch.ones(2), g)
    with pytest.raises(ValueError, match=f"got {g!r}"):
        una_binary_loss(torch.zeros(2), torch.ones(2), g)


def test_eq10_is_eq02_on_implicit_rewards():
    w, l = normals(141)(2, 20)
    assert close(una_pair_loss(w, l), -torch.log(w.exp() / (w.exp() + l.exp())))
    # swapped pair
    assert not close(una_pair_loss(l, w), -torch.log(w.exp() / (w.exp() + l.exp())))


def test_eq10_pair_loss_is_dpo():
    # Value and gradient, with any offset:
    # both responses answer the same prompt, so f(x) + c cancels.
    policy, (ref_w, ref_l), offset = normals(142)(2, 20), normals(143)(2, 20), normals(144)(20)

    def una_pair(p, beta=0.3, offset_l=offset):
        return una_pair_loss(implicit_reward(p[0], ref_w, beta, offset),
                             implicit_reward(p[1], ref_l, beta, offset_l))

    def same(loss):
        dpo = lambda p: dpo_loss(p[0], p[1], ref_w, ref_l, 0.3)
        slopes = gradient(loss, policy), gradient(dpo, policy)
        return close(loss(policy), dpo(policy)) and close(*slopes)
    assert same(una_pair)
    assert not same(lambda p: una_pair(p.flip(0)))         # swapped pair
    assert not same(lambda p: una_pair(p, beta=1.0))       # missing beta
    assert not same(lambda p: una_pair(p, offset_l=0.0))   # an offset that does not cancel


@pytest.mark.parametrize("label, target", [(1, 1.0), (0, 0.0)])
def test_eq11_is_the_squared_distance_of_the_score_from_the_label(label, target):
    reward, labels = 2 * normals(145)(20), torch.full((20,), label)
    s = reward.exp() / (1 + reward.exp())
    assert close(una_binary_loss(reward, labels, "mse"), (s - target) ** 2)
    assert not close(una_binary_loss(reward, 1 - labels, "mse"), (s - target) ** 2)   # swapped


def test_eq12_is_the_cross_entropy_of_torch_with_and_without_logits():
    reward, labels = 2 * normals(146)(20), (normals(147)(20) > 0).double()
    loss = una_binary_loss(reward, labels, "bce")
    assert close(loss, F.binary_cross_entropy_with_logits(reward, labels, reduction="none"))
    score = torch.sigmoid(reward)
    assert close(loss, F.binary_cross_entropy(score, labels, reduction="none"))
    assert not close(loss, F.binary_cross_entropy(score, 1 - labels, reduction="none"))   # swapped


@pytest.mark.parametrize("g", ["mse", "bce"])
def test_eq11_and_eq12_of_noisy_labels_reach_the_optimum_with_the_offset(g):
    # A label is 1 with probability s = sigma(r). On average over labels both losses are smallest
    # at s_theta = s (both are proper): with f + c = beta log Z that is r_theta = r at all
    # responses, true of pi* only. Samples of pi_ref.
    (ref, rewards), beta = world(148), 0.5
    best, value = optimal_policy(ref, rewards, beta)
    s, one = torch.sigmoid(rewards), torch.ones_like(rewards)

    def train(offset):
        loss = lambda p, label: una_binary_loss(implicit_reward(p, ref, beta, offset), label, g)
        return fit(lambda p: ref.exp() * (s * loss(p, one) + (1 - s) * loss(p, 0 * one)), ref)
    assert close(train(value[:, None]), best, tol=1e-6)
    assert not close(train(0.0), best, tol=1e-2)


@pytest.mark.parametrize("g", ["mse", "bce"])
def test_eq13_on_stored_scores_reaches_the_optimum_with_the_offset(g):
    (ref, rewards), beta = world(149), 0.5
    best, value = optimal_policy(ref, rewards, beta)
    train = lambda offset: fit(lambda p: ref.exp() * una_score_loss(
        implicit_reward(p, ref, beta, offset), torch.sigmoid(rewards), g), ref)
    assert close(train(value[:, None]), best, tol=1e-6)
    assert not close(train(0.0), best, tol=1e-2)


@pytest.mark.parametrize("g", ["mse", "bce", "mae"])
def test_eq13_is_smallest_at_the_logit_of_the_score(g):
    given = torch.sigmoid(normals(150)(20))
    minimiser = root(lambda r: gradient(lambda r: una_score_loss(r, given, g), r),
                     torch.full((20,), -9.0).double(), torch.full((20,), 9.0).double())
    assert close(minimiser, torch.log(given / (1 - given)), tol=1e-8)


@pytest.mark.parametrize("g, best", [("mse", 0.40), ("bce", 0.40), ("mae", 0.20)])
def test_eq13_several_scores_of_one_response_are_fitted_by_their_mean_but_by_the_median_for_mae(
        g, best):
    # Scores 0.1, 0.2, 0.9: the mean is 0.4, the median 0.2. Search s_theta on a grid of 0.01.
    s = torch.arange(1, 100).double() / 100
    loss = sum(una_score_loss(s.logit(), torch.full_like(s, given), g) for given in (0.1, 0.2, 0.9))
    assert s[loss.argmin()].item() == best


# ---------------------------------------------------------------- the proof: Eq. 14-22

def test_eq14_log_sum_inequality():
    # A thousand random a, b > 0. Strictly greater, as random ratios are never all equal.
    a, b = normals(151)(2, 1000, 5).exp()
    left, right = (a * (a / b).log()).sum(-1), a.sum(-1) * (a.sum(-1) / b.sum(-1)).log()
    assert (left > right).all()
    assert not ((a * (b / a).log()).sum(-1) > right).all()   # ratio upside down


def test_eq14_is_an_equality_if_all_ratios_are_equal_and_only_then():
    b = normals(152)(1000, 5).exp()
    gap = lambda a: (a * (a / b).log()).sum(-1) - a.sum(-1) * (a.sum(-1) / b.sum(-1)).log()
    assert close(gap(2.5 * b), 0.0)
    one_off = 2.5 * b * torch.tensor([1, 1, 1, 1, 1.01])
    assert (gap(one_off) > 0).all()


def test_eq14_a_zero_among_the_a_adds_zero():
    # 0 log 0 = 0. This is what lets a policy with probability 0 somewhere into the bound,
    # here of J in Eq. 16.
    ref, rewards = world(153, X=1)
    policy = torch.tensor([[0.5, 0.5, 0, 0, 0, 0]], dtype=torch.float64).log()
    a, b = policy.exp()[0, :2], (ref + rewards).exp()[0]
    left, right = (a * (a / b[:2]).log()).sum(), -b.sum().log()
    assert left > right and close(-left[None], rlhf_objective(policy, ref, rewards, 1.0))


def test_eq15_writes_the_objective_as_one_log_sum_for_any_f():
    # -beta pi log( pi / (pi_ref e^{(r-f)/beta}) ) = pi (r - f) - beta pi log pi/pi_ref,
    # and sum_y pi f = f.
    (ref, rewards), beta, f = world(154), 0.4, normals(155)(3, 1)
    logprobs = normals(156)(3, 6).log_softmax(-1)
    b = ref.exp() * ((rewards - f) / beta).exp()
    one_sum = -beta * (logprobs.exp() * (logprobs.exp() / b).log()).sum(-1)
    J = rlhf_objective(logprobs, ref, rewards, beta)
    assert close(J, one_sum + f[:, 0])
    assert not close(J, one_sum)                    # f not added back
    assert not close(J, one_sum + f[:, 0] / beta)   # added back inside of beta


def test_eq16_bounds_every_policy_whatever_f():
    # 1000 policies x 3 prompts; the bound is beta log Z_f + f, with Z_f written out.
    (ref, rewards), beta = world(157), 0.4
    J = rlhf_objective((2 * normals(158)(1000, 3, 6)).log_softmax(-1), ref, rewards, beta)
    for f in (0.0, 5.0, normals(159)(3)):
        Z_f = (ref.exp() * ((rewards.T - f).T / beta).exp()).sum(-1)
        bound = beta * Z_f.log() + f
        assert (J < bound).all()
        assert close(bound, optimal_policy(ref, rewards, beta)[1])
        assert not close(beta * Z_f.log() + 2.0, optimal_policy(ref, rewards, beta)[1])


def test_eq16_bound_is_reached_by_the_optimum_alone():
    # What is missing is beta KL(pi || pi*) exactly: positive unless pi is pi*.
    (ref, rewards), beta = world(160), 0.4
    best, bound = optimal_policy(ref, rewards, beta)
    others = (best + 0.01 * normals(161)(100, 3, 6)).log_softmax(-1)
    missing = bound - rlhf_objective(others, ref, rewards, beta)
    assert close(rlhf_objective(best, ref, rewards, beta), bound)
    assert (missing > 0).all() and close(missing, beta * (others.exp() * (others - best)).sum(-1))


def test_eq17_ratio_is_one_over_lambda_for_every_response_and_lambda_is_Z_f():
    # pi* = pi_ref e^{r/beta} / Z, so pi* / (pi_ref e^{(r-f)/beta}) = e^{f/beta} / Z = 1 / Z_f.
    (ref, rewards), beta, f = world(162), 0.4, normals(163)(3, 1)
    best, _ = optimal_policy(ref, rewards, beta)
    b = ref.exp() * ((rewards - f) / beta).exp()
    ratio = best.exp() / b
    assert close(ratio, ratio[:, :1].expand(3, 6))   # the same for all y
    assert close(1 / ratio[:, 0], b.sum(-1))         # lambda = Z_f(x)
    assert ratio[:, 0].std() > 0.1                   # and not the same for all x


def test_eq18_a_policy_is_optimal_for_its_implicit_reward_with_any_offset():
    # For r = beta log pi/pi_ref + b(x), pi_ref e^{r/beta} = pi e^{b/beta}:
    # so Z = e^{b/beta}, and pi* = pi.
    logprobs, ref = normals(164)(2, 3, 6).log_softmax(-1)
    for offset in (0.0, 2.0, normals(165)(3, 1)):
        best, value = optimal_policy(ref, implicit_reward(logprobs, ref, 0.4, offset), 0.4)
        assert close(best, logprobs)
        assert close(value[:, None] - offset, 0.0)   # f + c = beta log Z
    # missing beta
    assert not close(optimal_policy(ref, implicit_reward(logprobs, ref, 0.4), 1.0)[0], logprobs)


def test_eq18_any_reward_is_the_implicit_reward_of_its_optimum():
    # c = beta log lambda with lambda = Z_f, so that f + c = beta log Z.
    (ref, rewards), beta, f = world(166), 0.4, normals(167)(3, 1)
    best, value = optimal_policy(ref, rewards, beta)
    c = beta * (ref.exp() * ((rewards - f) / beta).exp()).sum(-1, keepdim=True).log()
    assert close(implicit_reward(best, ref, beta, f + c), rewards) and close(f + c, value[:, None])


def test_eq18_no_other_reward_has_that_optimum():
    # d log pi* / d r = (I - 1 pi*^T) / beta:
    # the only change of the reward that pi* does not feel is a constant.
    ref, rewards = (t[0] for t in world(168))
    jacobian = torch.autograd.functional.jacobian(lambda r: optimal_policy(ref, r, 0.4)[0], rewards)
    assert torch.linalg.matrix_rank(jacobian).item() == 5
    assert close(jacobian.sum(-1), 0.0)
    best, _ = optimal_policy(ref, rewards, 0.4)
    assert close(jacobian, (torch.eye(6).double() - best.exp()) / 0.4)


def test_eq19_value_at_the_optimum_is_beta_log_Z_whatever_f():
    # lambda = Z_f = Z e^{-f/beta}, so beta log lambda + f = beta log Z.
    (ref, rewards), beta = world(169), 0.4
    best, value = optimal_policy(ref, rewards, beta)
    log_Z = torch.logsumexp(ref + rewards / beta, -1)
    assert close(value, beta * log_Z)
    assert close(rlhf_objective(best, ref, rewards, beta), beta * log_Z)
    for f in (-3.0, 4.0, normals(170)(3)):
        log_lambda = torch.logsumexp(ref + (rewards.T - f).T / beta, -1)
        assert close(beta * log_lambda + f, value)
        assert not close(beta * log_lambda, value)   # f forgotten


def test_eq20_objective_is_the_optimum_minus_beta_KL_to_it():
    # J(pi) = -beta [ KL(pi || pi_ref e^{r/beta} / Z) - log Z ], the last line of appendix A.
    (ref, rewards), beta = world(171), 0.4
    weights = ref.exp() * (rewards / beta).exp()
    Z = weights.sum(-1)
    best, logprobs = (weights / Z[:, None]).log(), normals(172)(3, 6).log_softmax(-1)
    KL = lambda p, q: (p.exp() * (p - q)).sum(-1)
    J = rlhf_objective(logprobs, ref, rewards, beta)
    assert close(J, -beta * (KL(logprobs, best) - Z.log()))
    assert not close(J, -beta * (KL(best, logprobs) - Z.log()))   # KL the other way round
    assert not close(J, beta * (KL(logprobs, best) - Z.log()))


def test_eq21_jensen():
    # phi convex: the mean of phi is at least phi of the mean. Equal if all points are one;
    # reversed for a concave phi.
    weights, points = normals(173)(2, 1000, 5).exp()
    mean = lambda v: (weights * v).sum(-1) / weights.sum(-1)
    phi = lambda t: t * t.log()
    assert (mean(phi(points)) > phi(mean(points))).all()
    same = points[:, :1].expand(1000, 5)
    assert close(mean(phi(same)), phi(mean(same)))
    assert (mean(points.log()) < mean(points).log()).all()


def test_eq21_t_log_t_is_convex_with_second_derivative_one_over_t():
    t = normals(174)(50).exp().requires_grad_()
    first, = torch.autograd.grad((t * t.log()).sum(), t, create_graph=True)
    second, = torch.autograd.grad(first.sum(), t)
    assert close(first, 1 + t.log()) and close(second, 1 / t)


def test_eq22_each_line_of_the_proof_of_the_log_sum_inequality():
    a, b = normals(175)(2, 1000, 5).exp()
    A, B, phi = a.sum(-1), b.sum(-1), lambda t: t * t.log()
    first = (a * (a / b).log()).sum(-1)
    second = (b * phi(a / b)).sum(-1)
    third = B * (b / B[:, None] * phi(a / b)).sum(-1)
    fourth = B * (b * phi(a / b)).sum(-1) / b.sum(-1)
    last = B * phi((b * (a / b)).sum(-1) / B)   # Jensen, weights b, points a/b
    assert close(first, second) and close(second, third) and close(third, fourth)
    assert (fourth > last).all() and close(last, A * (A / B).log())


# ---------------------------------------------------------------- as printed

def test_printed_eq04_with_the_implicit_reward_in_Z_any_Z_fits():
    # Printed: r_theta = beta log pi/pi_ref + beta log Z with Z = E_ref e^{r_theta/beta}. For any
    # policy that is so with any Z; only the given reward's Z makes the reward the given one.
    (ref, rewards), beta = world(182), 0.4
    policy = world(183)[0]
    for log_z in (-3.0, 0.0, 5.0):
        implied = implicit_reward(policy, ref, beta, beta * torch.full((3, 6), log_z).double())
        assert close((ref + implied / beta).logsumexp(-1), log_z)
    best, value = optimal_policy(ref, rewards, beta)
    given = lambda offset: implicit_reward(best, ref, beta, offset[:, None].expand(3, 6))
    assert close(given(value), rewards) and not close(given(value + 0.01), rewards, tol=1e-3)


def test_printed_eq06_f_and_c_zero_misses_the_optimum_by_a_computable_amount():
    # On samples of pi_ref minimise sum_y pi_ref (beta u - r)^2 over u = log pi/pi_ref, subject to
    # sum_y pi_ref e^u = 1. Lagrange: beta u + kappa e^u = r, with kappa from the constraint
    # (positive, as Z > 1). Solve it, bisection within bisection: the trained policy is this one and
    # not pi*, though it ranks the responses as pi* does.
    (ref, rewards), beta = world(180), 0.5
    rewards = rewards.abs()
    best, _ = optimal_policy(ref, rewards, beta)
    lowest = torch.full_like(ref, -40.0)
    u = lambda kappa: root(lambda u: beta * u + kappa * u.exp() - rewards, lowest, rewards / beta)
    missing = lambda kappa: 1 - (ref + u(kappa)).exp().sum(-1, keepdim=True)
    zeros = torch.zeros(3, 1).double()
    predicted = ref + u(root(missing, zeros, zeros + 99))
    loss = lambda p: una_reward_loss(implicit_reward(p, ref, beta), rewards)
    trained = fit(lambda p: ref.exp() * loss(p), ref)
    assert close(trained, predicted, tol=1e-7)
    assert (trained.exp() - best.exp()).abs().sum(-1).min() / 2 > 0.02   # total variation
    assert ((trained - ref).argsort() == rewards.argsort()).all()


def test_printed_eq06_f_and_c_zero_is_exact_if_and_only_if_Z_is_one():
    # "f(x) = c = 0 refers that implicit and explicit reward models are exactly the same":
    # no, they differ by beta log Z
    (ref, rewards), beta = world(181), 0.4
    best, value = optimal_policy(ref, rewards, beta)
    assert close(rewards - implicit_reward(best, ref, beta), value[:, None].expand(3, 6))
    assert value.abs().min() > 0.05
    with_Z_one = rewards - value[:, None]
    assert close((ref + with_Z_one / beta).exp().sum(-1), 1.0)
    assert close(implicit_reward(optimal_policy(ref, with_Z_one, beta)[0], ref, beta), with_Z_one)


def test_printed_eq09_is_not_equivalent_to_eq07():
    # Same world, same fresh samples, scores = sigma(rewards): the two gradients do not point the
    # same way, and the policy that Eq. 9 leads to is far from the optimum at some prompts.
    (ref, rewards), beta = world(182), 0.5
    rewards = 2 * rewards
    given = torch.sigmoid(rewards)
    score = lambda p: on_policy(una_score_loss(implicit_reward(p, ref, beta), given), p)
    reward = lambda p: on_policy(una_reward_loss(implicit_reward(p, ref, beta), rewards), p)
    theta = normals(183)(3, 6)
    grads = [gradient(lambda t: loss(t.log_softmax(-1)), theta) for loss in (score, reward)]
    assert F.cosine_similarity(*grads, dim=-1).min() < 0.99
    best, _ = optimal_policy(ref, rewards, beta)
    assert close(fit(reward, ref), best, tol=1e-6)
    assert (fit(score, ref).exp() - best.exp()).abs().sum(-1).max() / 2 > 0.1   # total variation


def test_printed_eq10_linear_is_unbounded_below():
    # -(r_w - r_l) pushes as hard at a margin of 1000 as at 0, so it has no minimum;
    # -log sigma(r_w - r_l) >= 0 lets go.
    margin = torch.tensor([0.0, 10.0, 1000.0], dtype=torch.float64)
    printed = lambda m: -m
    assert (gradient(printed, margin) == -1).all() and printed(margin).min() == -1000
    assert (una_pair_loss(margin, 0 * margin) >= 0).all()
    slope = gradient(lambda m: una_pair_loss(m, 0 * m), margin)
    assert close(slope, [-0.5, -1 / (1 + math.exp(10)), 0.0])


def descend(loss, reward, steps=200):
    """Two hundred steps of gradient descent on the rewards themselves."""
    for _ in range(steps):
        reward = reward - gradient(loss, reward)
    return torch.sigmoid(reward)


def test_printed_eq11_minus_unlearns_the_labels():
    label, start = torch.tensor([1, 0]), torch.tensor([0.5, -0.5], dtype=torch.float64)
    up, down = descend(lambda r: una_binary_loss(r, label, "mse"), start)
    assert up > 0.9 and down < 0.1
    up, down = descend(lambda r: -una_binary_loss(r, label, "mse"), start)
    assert up < 0.1 and down > 0.9


def test_printed_eq12_first_line_has_a_minus_too_many():
    # L_BCE is -[y log s + (1 - y) log(1 - s)] already.
    # The second printed line is right, the first is its negative.
    label, start = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.5, -0.5]).double()
    s = torch.sigmoid(start)
    second_line = -(torch.log(s[0]) + torch.log(1 - s[1]))
    first_line = -F.binary_cross_entropy(s, label, reduction="sum")
    ours = una_binary_loss(start, label, "bce").sum()
    assert close(ours, second_line) and not close(ours, first_line) and close(ours, -first_line)
    up, down = descend(lambda r: -una_binary_loss(r, label, "bce"), start)
    assert up < 0.1 and down > 0.9


def test_printed_eq13_minus_drives_the_scores_apart():
    given, start = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.5, -0.5]).double()
    assert close(descend(lambda r: una_score_loss(r, given), start), given, tol=1e-3)
    apart = descend(lambda r: -una_score_loss(r, given), start)
    assert (apart - given).abs().min() > 0.5


def test_printed_eq17_no_constant_lambda_makes_all_prompts_policies():
    # pi_ref e^{r/beta} / lambda adds up to Z(x) / lambda:
    # to 1 at all prompts only if Z is the same at all of them.
    (ref, rewards), beta = world(184), 0.4
    Z = (ref.exp() * (rewards / beta).exp()).sum(-1)
    for constant in torch.linspace(Z.min().item(), Z.max().item(), 100):
        assert (Z / constant - 1).abs().max() > 0.1
    assert close(optimal_policy(ref, rewards, beta)[0].exp().sum(-1), 1.0)


def test_printed_eq19_log_lambda_may_not_leave_the_mean_over_prompts():
    # As lambda depends on x, beta log lambda belongs inside of E_x;
    # log of the mean is more than mean of the log.
    (ref, rewards), beta = world(185), 0.4
    J = rlhf_objective(optimal_policy(ref, rewards, beta)[0], ref, rewards, beta).mean()
    Z = (ref.exp() * (rewards / beta).exp()).sum(-1)
    assert close(J, beta * Z.log().mean()) and beta * Z.mean().log() > J + 0.01


def test_printed_f_above_the_largest_reward_makes_Z_f_less_than_one_so_that_c_is_not_zero():
    # e^{(r - f)/beta} < 1 for every y. Only with Z_f = 1 would c = beta log Z_f be zero;
    # here it must be negative.
    (ref, rewards), beta = world(186), 0.4
    f = rewards.max(-1, keepdim=True).values + 0.1
    best, value = optimal_policy(ref, rewards, beta)
    Z_f = (ref.exp() * ((rewards - f) / beta).exp()).sum(-1, keepdim=True)
    c = beta * Z_f.log()
    assert (Z_f < 1).all() and (c < -0.1).all()
    assert close(implicit_reward(best, ref, beta, f + c), rewards)
    assert not close(implicit_reward(best, ref, beta, f), rewards)   # c = 0


# ---------------------------------------------------------------- una.py as a text

SOURCE = ast.parse(inspect.getsource(una))
FUNCTIONS = {node.name: node for node in SOURCE.body if isinstance(node, ast.FunctionDef)}


def module_names_in(function):
    """Names that the function takes from una.py: its functions and constants, not its imports."""
    assigned = {name.id for node in SOURCE.body if isinstance(node, ast.Assign)
                for target in node.targets for name in ast.walk(target)
                if isinstance(name, ast.Name)}
    used = {node.id for node in ast.walk(FUNCTIONS[function]) if isinstance(node, ast.Name)}
    arguments = {argument.arg for argument in FUNCTIONS[function].args.args}
    return used & (set(FUNCTIONS) | assigned) - arguments


def test_meta_dpo_and_kto_stand_alone():
    # What is compared with UNA must not be made of UNA, or the comparison proves nothing.
    assert module_names_in("dpo_loss") == set() and module_names_in("kto_loss") == set()
    # Such a use is seen.
    assert module_names_in("una_binary_loss") == {"una_score_loss", "_alike"}


def test_meta_every_public_function_has_a_docstring():
    public = [f for name, f in inspect.getmembers(una, inspect.isfunction)
              if f.__module__ == "una" and name[0] != "_"]
    assert len(public) == len([name for name in FUNCTIONS if name[0] != "_"]) >= 12
    assert all(len(inspect.getdoc(function) or "") > 40 for function in public)


def test_meta_the_paper_in_three_responses_prints_what_a_calculator_says(capsys):
    runpy.run_path(una.__file__, run_name="__main__")
    rows = {line[:29].strip(): [float(x) for x in re.findall(r"-?\d+\.\d{3}", line[29:])]
            for line in capsys.readouterr().out.splitlines()}
    p, r, beta = [0.5, 0.3, 0.2], [-1.0, 0.0, 1.0], 0.5
    tilted = [p_y * math.exp(r_y / beta) for p_y, r_y in zip(p, r)]
    z = sum(tilted)
    best = [t / z for t in tilted]
    theta = [beta * math.log(b / p_y) for b, p_y in zip(best, p)]
    shifted = [x + beta * math.log(z) for x in theta]

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    expected = {
        "pi_ref": p, "r, given": r, "pi_ref e^{r/beta}": [*tilted, z],
        "pi*: divided by Z": [*best, beta * math.log(z)], "beta log pi_ref/pi_ref": [0, 0, 0],
        "beta log pi*/pi_ref": theta, "... + f + c = beta log Z": r,
        "preferred to the first: DPO": [-math.log(sigma(x[2] - x[0]))
                                        for x in ([0] * 3, theta, shifted)],
        "label 1, bce": [-math.log(sigma(x)) for x in (0, theta[2], shifted[2])],
        "label 1, mse": [(1 - sigma(x)) ** 2 for x in (0, theta[2], shifted[2])],
        "label 1, mae": [1 - sigma(x) for x in (0, theta[2], shifted[2])],
        "score sigma(1), mse": [(sigma(1) - sigma(x)) ** 2 for x in (0, theta[2], shifted[2])],
        "reward 1": [(1 - x) ** 2 for x in (0, theta[2], shifted[2])]}
    for b in (0.25, 0.5, 1.0):
        weights = [p_y * math.exp(r_y / b) for p_y, r_y in zip(p, r)]
        policy = [w / sum(weights) for w in weights]
        mean = sum(q * r_y for q, r_y in zip(policy, r))
        kl = sum(q * math.log(q / p_y) for q, p_y in zip(policy, p))
        expected[f"pi* of beta = {b}"] = [mean, kl, mean - beta * kl]
    for name, values in expected.items():
        assert rows[name] == pytest.approx(values, abs=6e-4), name
    assert rows["label 1, mse"][0] == 1 / 4 and rows["label 1, mae"][0] == 1 / 2
    kls = [rows[f"pi* of beta = {b}"][1] for b in (0.25, 0.5, 1.0)]
    assert kls[0] > kls[1] > kls[2]                              # larger beta, smaller KL


def test_meta_una_imports_only_torch():
    imports = [node for node in ast.walk(SOURCE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(isinstance(node, ast.Import) for node in imports)
    assert {alias.name.split(".")[0] for node in imports for alias in node.names} == {"torch"}
