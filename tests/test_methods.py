"""Every method is one line: L = g(squash(r_theta), target), with an offset f(x) + c in r_theta.

test_map_<method>_... writes a method's loss as its own paper has it and finds it again in una.py,
value and gradient; the nearest wrong versions must fail the same comparison. Log-probabilities are
of B responses or pairs, or of K responses to each of X prompts, at random. The other tests: numbers
of an independent implementation, more exact relations, what all losses share, KTO.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import goldens
from helpers import close, gradient, normals
from una import (
    dpo_loss,
    estimated_offset,
    implicit_reward,
    implicit_score,
    kto_loss,
    optimal_policy,
    reward_model_loss,
    rlhf_objective,
    sequence_logprob,
    una_binary_loss,
    una_pair_loss,
    una_reward_loss,
    una_score_loss,
)


def same(loss, other, theta):
    """Have the two losses the same value, one for each example, and the same gradient at theta?"""
    return close(loss(theta), other(theta)) and close(gradient(loss, theta), gradient(other, theta))


def minimiser(loss, B):
    """The B numbers in [-16, 16] where B convex functions are smallest: bisection on slopes."""
    at = torch.zeros(B, dtype=torch.float64)
    for n in range(60):
        at = at - 8 / 2**n * gradient(loss, at).sign()
    return at


def labels(B):
    """Binary feedback: 1, 0, 1, 0, ..."""
    return 1 - torch.arange(B) % 2


# ---------------------------------------------------------------- an independent implementation

def golden(*names):
    return [torch.tensor(getattr(goldens, name), dtype=torch.float64) for name in names]


CHOSEN, REF_CHOSEN = golden("POLICY_CHOSEN", "REF_CHOSEN")
REJECTED, REF_REJECTED = golden("POLICY_REJECTED", "REF_REJECTED")
POLICY_KL, REF_KL = golden("POLICY_KL", "REF_KL")
BOTH, REF_BOTH = torch.cat([CHOSEN, REJECTED]), torch.cat([REF_CHOSEN, REF_REJECTED])
LABELS = torch.tensor([1] * 6 + [0] * 6)


@pytest.mark.parametrize("beta", goldens.DPO)
def test_golden_dpo(beta):
    assert close(dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta), goldens.DPO[beta])
    chosen = implicit_reward(CHOSEN, REF_CHOSEN, beta)
    rejected = implicit_reward(REJECTED, REF_REJECTED, beta)
    assert close(una_pair_loss(chosen, rejected), goldens.DPO[beta])
    assert not close(dpo_loss(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, beta), goldens.DPO[beta])


@pytest.mark.parametrize("beta", goldens.IPO)
def test_golden_ipo(beta):
    chosen = implicit_reward(CHOSEN, REF_CHOSEN, beta)
    rejected = implicit_reward(REJECTED, REF_REJECTED, beta)
    assert close(una_reward_loss(chosen - rejected, 0.5) / beta**2, goldens.IPO[beta])


@pytest.mark.parametrize("beta", goldens.SPPO_HARD)
def test_golden_sppo(beta):
    winners = una_reward_loss(implicit_reward(CHOSEN, REF_CHOSEN, beta), 0.5)
    losers = una_reward_loss(implicit_reward(REJECTED, REF_REJECTED, beta), -0.5)
    assert close((winners + losers) / beta**2, goldens.SPPO_HARD[beta])


@pytest.mark.parametrize("beta", goldens.BCO)
def test_golden_bco(beta):
    reward = implicit_reward(BOTH, REF_BOTH, beta, offset=-goldens.BCO_DELTA)
    assert close(una_binary_loss(reward, LABELS, "bce"), sum(goldens.BCO[beta], []))


@pytest.mark.parametrize("beta, desirable_weight, undesirable_weight", goldens.KTO)
def test_golden_kto(beta, desirable_weight, undesirable_weight):
    expected = sum(goldens.KTO[beta, desirable_weight, undesirable_weight], [])
    loss = kto_loss(BOTH, REF_BOTH, LABELS, POLICY_KL, REF_KL, beta,
                    desirable_weight, undesirable_weight)
    assert close(loss, expected)
    z0 = (POLICY_KL - REF_KL).mean()
    una = una_binary_loss(implicit_reward(BOTH, REF_BOTH, beta, -beta * z0), LABELS, "mae")
    weighted = torch.where(LABELS == 1, desirable_weight * una, undesirable_weight * una)
    assert close(weighted, expected)


@pytest.mark.parametrize("beta", goldens.KTO_CLAMPED)
def test_golden_kto_clamped(beta):
    # The estimate of the KL is negative here. A KL never is, so the reference point is 0.
    expected = sum(goldens.KTO_CLAMPED[beta], [])
    assert (REF_KL - POLICY_KL).mean() < 0
    assert close(kto_loss(BOTH, REF_BOTH, LABELS, REF_KL, POLICY_KL, beta), expected)
    reward = lambda z0: implicit_reward(BOTH, REF_BOTH, beta, -beta * z0)
    una = lambda z0: una_binary_loss(reward(z0), LABELS, "mae")
    assert close(una(0.0), expected) and not close(una((REF_KL - POLICY_KL).mean()), expected)


# ---------------------------------------------------------------- the map

@pytest.mark.parametrize("beta", [0.03, 0.1, 0.7])
def test_map_dpo_is_the_pair_loss(beta):
    # Rafailov et al. 2023: -log sigma(beta [log pi/pi_ref(w) - log pi/pi_ref(l)]),
    # and -log sigma(m) = log(1 + e^-m).
    policy, ref = normals(1)(2, 20), normals(2)(2, 20)
    paper = lambda p: torch.log(1 + torch.exp(-beta * ((p[0] - p[1]) - (ref[0] - ref[1]))))
    una = lambda p, beta=beta: una_pair_loss(*implicit_reward(p, ref, beta, offset=0.8))
    assert same(una, paper, policy)
    assert same(lambda p: dpo_loss(p[0], p[1], ref[0], ref[1], beta), paper, policy)
    assert not same(lambda p: una(p, beta=1.0), paper, policy)   # missing beta
    assert not same(lambda p: una(p.flip(0)), paper, policy)   # swapped pair
    # their references
    assert not same(lambda p: una_pair_loss(*implicit_reward(p, ref.flip(0), beta)), paper, policy)


def pair_of_sequences():
    """Logits of policy and reference, tokens, response mask.

    Row 0 is chosen, row 1 rejected. Their lengths differ.
    """
    normal, positions = normals(3), torch.arange(9)
    mask = torch.stack([(positions >= 2) & (positions < 8), (positions >= 4) & (positions < 7)])
    return normal(2, 9, 5), normal(2, 9, 5), normal(2, 9, 5).argmax(-1), mask


def dpo_from_logits(z):
    """DPO from logits to loss in plain words, token by token, beta = 0.3."""
    _, ref, tokens, mask = pair_of_sequences()
    pi, pi_ref = z.softmax(-1), ref.softmax(-1)
    rho = [sum((pi[i, t - 1, tokens[i, t]] / pi_ref[i, t - 1, tokens[i, t]]).log()
               for t in range(9) if mask[i, t]) for i in (0, 1)]
    return torch.log(1 + torch.exp(-0.3 * (rho[0] - rho[1])))[None]


def una_from_logits(z, mistake=None):
    """The same with una.py, with one mistake if asked for."""
    _, ref, tokens, mask = pair_of_sequences()
    if mistake == "unshifted labels":
        tokens, mask = tokens.roll(1, -1), mask.roll(1, -1)
    if mistake == "padding counted":
        mask = mask | (torch.arange(9) >= 4)
    if mistake == "prompt counted":
        mask = mask | (torch.arange(9) == 1)
    policy, ref = sequence_logprob(z, tokens, mask), sequence_logprob(ref, tokens, mask)
    if mistake == "mean for sum":
        policy, ref = policy / mask.sum(-1), ref / mask.sum(-1)
    if mistake == "reference is the policy":
        ref = policy
    if mistake == "no reference":
        ref = torch.zeros_like(ref)
    reward = implicit_reward(policy, ref, 1.0 if mistake == "missing beta" else 0.3)
    if mistake == "swapped pair":
        reward = reward.flip(0)
    if mistake == "no log sigma":
        return (reward[1] - reward[0])[None]
    return una_pair_loss(reward[:1], reward[1:])


def test_map_dpo_from_logits_to_loss():
    # The same gradient at every logit is the same gradient at every parameter of whatever model
    # made the logits.
    assert same(una_from_logits, dpo_from_logits, pair_of_sequences()[0])


MISTAKES = ["unshifted labels", "padding counted", "prompt counted", "mean for sum", "swapped pair",
            "reference is the policy", "no reference", "missing beta", "no log sigma"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_map_dpo_from_logits_to_loss_sees_each_mistake(mistake):
    assert not same(lambda z: una_from_logits(z, mistake), dpo_from_logits, pair_of_sequences()[0])


def kto_paper(p, ref, label, z0, beta):
    """Ethayarajh et al. 2024: lambda_y - v with lambda = 1; v is sigma of the gain over z_0.

    Where the label is 0 it is sigma of the loss.
    """
    gain = beta * (p - ref - z0)
    return 1 - torch.stack([1 / (1 + (-g).exp()) if desirable else 1 / (1 + g.exp())
                            for g, desirable in zip(gain, label)])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_map_kto_is_the_binary_loss_with_absolute_error_and_offset_minus_beta_z0(beta):
    # 1 - sigma(t) for label 1, 1 - sigma(-t) = sigma(t) for label 0:
    # |label - sigma(t)|, t = beta rho - beta z_0.
    policy, ref, label = normals(4)(11), normals(5)(11), labels(11)
    policy_kl, ref_kl = normals(6)(7) + 1, normals(7)(7) - 1
    z0 = sum((policy_kl - ref_kl).tolist()) / 7
    paper = lambda p: kto_paper(p, ref, label, z0, beta)

    def una(p, beta=beta, g="mae", offset=-beta * z0, label=label):
        return una_binary_loss(implicit_reward(p, ref, beta, offset), label, g)

    assert z0 > 0 and same(una, paper, policy)
    assert same(lambda p: kto_loss(p, ref, label, policy_kl, ref_kl, beta), paper, policy)
    for g in ("mse", "bce"):
        assert not same(lambda p: una(p, g=g), paper, policy)
    assert not same(lambda p: una(p, offset=-z0), paper, policy)         # offset without beta
    assert not same(lambda p: una(p, offset=beta * z0), paper, policy)   # its sign
    assert not same(lambda p: una(p, offset=0.0), paper, policy)         # no offset
    assert not same(lambda p: una(p, beta=1.0), paper, policy)           # missing beta
    assert not same(lambda p: una(p, label=1 - label), paper, policy)    # labels swapped


def test_map_kto_weights_multiply():
    # lambda_y - lambda_y sigma(...) = lambda_y (1 - sigma(...)).
    policy, ref, label, kl = normals(8)(11), normals(9)(11), labels(11), normals(10)(2, 4)
    weighted = lambda p: kto_loss(p, ref, label, kl[0], kl[1], 0.3, 2.0, 0.7)
    plain = lambda p: kto_loss(p, ref, label, kl[0], kl[1], 0.3)
    assert same(weighted, lambda p: torch.where(label == 1, 2.0 * plain(p), 0.7 * plain(p)), policy)
    swapped = lambda p: torch.where(label == 0, 2.0 * plain(p), 0.7 * plain(p))
    assert not same(weighted, swapped, policy)


def test_map_bco_is_the_binary_loss_with_cross_entropy_and_offset_minus_delta():
    # Jung et al. 2024, with r = beta rho: -log sigma(r - delta) for label 1,
    # -log sigma(-(r - delta)) for label 0; and -log sigma(m) = log(1 + e^-m).
    policy, ref, label, delta = normals(11)(11), normals(12)(11), labels(11), 0.6
    shifted = lambda p: 0.3 * (p - ref) - delta
    sign = 2 * label - 1
    paper = lambda p: torch.log(1 + (-sign * shifted(p)).exp())

    def una(p, offset=-delta, g="bce"):
        return una_binary_loss(implicit_reward(p, ref, 0.3, offset), label, g)

    assert same(una, paper, policy)
    assert not same(lambda p: una(p, offset=delta), paper, policy)
    # delta is a reward: no beta
    assert not same(lambda p: una(p, offset=-0.3 * delta), paper, policy)
    assert not same(lambda p: una(p, g="mse"), paper, policy)


def test_map_ipo_is_the_reward_loss_of_the_margin_against_one_half():
    # Azar et al. 2023: (h - 1/(2 tau))^2 with h = rho_w - rho_l. Times tau^2: (tau h - 1/2)^2.
    policy, ref, tau = normals(13)(2, 20), normals(14)(2, 20), 0.3
    paper = lambda p: ((p[0] - p[1]) - (ref[0] - ref[1]) - 1 / (2 * tau)) ** 2

    def una(p, target=0.5, beta=tau):
        reward = implicit_reward(p, ref, beta, offset=0.8)
        return una_reward_loss(reward[0] - reward[1], target) / tau**2

    assert same(una, paper, policy)
    assert not same(lambda p: una(p, target=1.0), paper, policy)
    assert not same(lambda p: una(p, beta=1.0), paper, policy)
    assert not same(lambda p: una(p.flip(0)), paper, policy)


def test_map_rebel_is_the_reward_loss_of_differences():
    # Gao et al. 2024: ((1/eta) (rho - rho') - (r - r'))^2, so beta = 1/eta.
    # No label, and no preference: r itself.
    policy, ref, rewards, eta = normals(15)(2, 20), normals(16)(2, 20), normals(17)(2, 20), 2.5
    paper = lambda p: (((p[0] - ref[0]) - (p[1] - ref[1])) / eta - (rewards[0] - rewards[1])) ** 2

    def una(p, beta=1 / eta, rewards=rewards):
        reward = implicit_reward(p, ref, beta, offset=0.8)
        return una_reward_loss(reward[0] - reward[1], rewards[0] - rewards[1])

    assert same(una, paper, policy)
    assert not same(lambda p: una(p, beta=eta), paper, policy)   # eta for 1/eta
    assert not same(lambda p: una(p, rewards=rewards.flip(0)), paper, policy)


def test_map_sppo_is_the_reward_loss_against_plus_and_minus_one_half():
    # Wu et al. 2024: (rho - eta (P - 1/2))^2,
    # where P is 1 for the winner and 0 for the loser, and eta = 1/beta.
    policy, ref, eta = normals(18)(2, 20), normals(19)(2, 20), 2.5
    error = lambda p, i, P: p[i] - ref[i] - eta * (P - 0.5)
    paper = lambda p: error(p, 0, 1) ** 2 + error(p, 1, 0) ** 2

    def una(p, offset=0.0, up=0.5, beta=1 / eta):
        winner, loser = implicit_reward(p, ref, beta, offset)
        return (una_reward_loss(winner, up) + una_reward_loss(loser, -up)) * eta**2

    assert same(una, paper, policy)
    assert not same(lambda p: una(p, offset=0.1), paper, policy)   # here the offset does not cancel
    assert not same(lambda p: una(p, up=-0.5), paper, policy)
    assert not same(lambda p: una(p, beta=eta), paper, policy)


def test_map_qrpo_is_the_reward_loss_on_quantiles_whose_Z_is_known():
    # Matrenok et al. 2025: (R_q - beta log Z_q - beta rho)^2, R_q the quantile of the reward among
    # samples of pi_ref. Quantiles are uniform on [0, 1] whatever the reward, so
    # Z_q = int_0^1 e^{q/beta} dq = beta (e^{1/beta} - 1).
    policy, ref, beta = normals(20)(20), normals(21)(20), 0.3
    quantile = torch.sigmoid(normals(22)(20))
    log_Z = math.log(beta * (math.exp(1 / beta) - 1))
    paper = lambda p: (quantile - beta * log_Z - beta * (p - ref)) ** 2

    def una(p, offset=beta * log_Z):
        return una_reward_loss(implicit_reward(p, ref, beta, offset), quantile)

    assert same(una, paper, policy)
    assert not same(lambda p: una(p, offset=log_Z), paper, policy)   # missing beta
    assert not same(lambda p: una(p, offset=0.0), paper, policy)


def test_map_qrpo_offset_is_the_beta_log_Z_of_eq19():
    # Ten thousand equally likely responses with the quantiles (k - 1/2) / 10^4:
    # the midpoint rule, error 1e-9.
    beta, Y = 0.3, 10_000
    quantiles = (torch.arange(Y).double() + 0.5) / Y
    ref = torch.full((Y,), -math.log(Y), dtype=torch.float64)
    best, value = optimal_policy(ref, quantiles, beta)
    offset = beta * math.log(beta * (math.exp(1 / beta) - 1))
    assert close(value, offset, tol=1e-8) and not close(value, offset / beta, tol=1e-8)
    assert una_reward_loss(implicit_reward(best, ref, beta, offset), quantiles).max() < 1e-15


def test_map_a_star_po_and_rpo_are_the_reward_loss_with_the_estimated_offset():
    # Brantley et al. 2025: V = beta_1 log of the mean of e^{r/beta_1} over N responses of pi_ref,
    # then (beta_2 rho - (r - V))^2 on fresh ones, where V is a baseline. Faye et al. 2025, stored:
    # (r - V - tau rho)^2, V of the very responses that are learned from, and no mere baseline.
    policy, ref, rewards = normals(70)(3, 4, 5)   # of four prompts, five responses each
    earlier = normals(71)(4, 7)                   # rewards of seven others to each prompt
    V_of = lambda given, beta: beta * torch.log(torch.exp(given / beta).mean(1, keepdim=True))
    a_star_po = lambda p: (0.3 * (p - ref) - (rewards - V_of(earlier, 0.5))) ** 2
    rpo = lambda p: (rewards - V_of(rewards, 0.3) - 0.3 * (p - ref)) ** 2
    una = lambda p, offset: una_reward_loss(implicit_reward(p, ref, 0.3, offset), rewards)
    for paper, given, beta in ((a_star_po, earlier, 0.5), (rpo, rewards, 0.3)):
        V = estimated_offset(given, beta)[:, None]
        assert same(lambda p: una(p, V), paper, policy)
        # No offset, one without beta, another prompt's, a sum for the mean, the mean reward.
        for wrong in (0.0, V / beta, V.flip(0), V + beta * math.log(given.shape[1]),
                      given.mean(1, keepdim=True)):
            assert not same(lambda p: una(p, wrong), paper, policy)


def test_map_kimi_is_the_reward_loss_with_the_last_policy_for_its_reference():
    # Kimi team 2025: (r - tau log Z - tau log pi/pi_i)^2 on k responses of the last policy pi_i,
    # tau log Z by the mean of e^{r/tau} over the k. In practice the mean reward stands for it.
    policy, last, ref, rewards = normals(72)(4, 4, 5)
    tau, V = 0.3, estimated_offset(rewards, 0.3)[:, None]
    log_Z = torch.log(torch.exp(rewards / tau).mean(1, keepdim=True))
    paper = lambda p: (rewards - tau * log_Z - tau * (p - last)) ** 2
    una = lambda p, ref, offset: una_reward_loss(implicit_reward(p, ref, tau, offset), rewards)
    assert same(lambda p: una(p, last, V), paper, policy)
    assert not same(lambda p: una(p, ref, V), paper, policy)                         # pi_ref
    assert not same(lambda p: una(p, last, rewards.mean(1, keepdim=True)), paper, policy)
    # So pi_ref is forgotten: a round starts with the gradient of the reward alone, without a KL,
    # and ends, if the five responses are all there are, at pi_i e^{r/tau} / Z.
    assert close(gradient(paper, last), -2 * tau * (rewards - V))
    best, value = optimal_policy(last.log_softmax(-1), rewards, tau)
    assert close(una(best, last.log_softmax(-1), value[:, None]), 0.0)
    assert not close(una(best, ref.log_softmax(-1), value[:, None]), 0.0)


def test_map_dro_is_half_the_reward_loss_with_a_learned_offset():
    # Richemond et al. 2024: (r - V(x) - tau rho)^2 / 2, V learned beside the policy. With the
    # residual e = r - V - tau rho, the slope is -tau e by log pi and -sum e by V(x).
    policy, ref, rewards = normals(73)(3, 4, 5)
    V, tau = normals(74)(4, 1), 0.3
    paper = lambda p, V: 0.5 * (rewards - V - tau * (p - ref)) ** 2
    una = lambda p, V: una_reward_loss(implicit_reward(p, ref, tau, V), rewards) / 2
    assert same(lambda p: una(p, V), lambda p: paper(p, V), policy)
    assert same(lambda V: una(policy, V), lambda V: paper(policy, V), V)
    assert not same(lambda p: una(p, tau * V), lambda p: paper(p, V), policy)   # V is a reward
    assert not same(lambda p: una(p, -V), lambda p: paper(p, V), policy)        # its sign
    # The policy's part alone, -(A rho - tau/2 rho^2) with A = r - V held, is the loss over tau less
    # what does not depend on pi. V would learn something else from it.
    alone = lambda p, V: tau / 2 * (p - ref) ** 2 - (rewards - V) * (p - ref)
    residual = rewards - V - tau * (policy - ref)
    by_policy = lambda loss: gradient(lambda p: loss(p, V), policy)
    by_V = lambda loss: gradient(lambda V: loss(policy, V), V)
    assert close(by_policy(una), -tau * residual)
    assert close(by_policy(una), tau * by_policy(alone))
    assert close(by_V(una), -residual.sum(1, keepdim=True))
    assert not close(by_V(una), tau * by_V(alone))


def nca_paper(t, rewards, alpha):
    """Chen et al. 2024: -sum_i [w_i log sigma(t_i) + 1/K log sigma(-t_i)], w = softmax(r/alpha).

    t = log pi/pi_ref and rewards (X, K), of K responses to each of X prompts. Returns (X,). As
    elsewhere, -log sigma(t) = log(1 + e^-t).
    """
    w = torch.exp(rewards / alpha) / torch.exp(rewards / alpha).sum(1, keepdim=True)
    return (w * torch.log(1 + torch.exp(-t)) + torch.log(1 + torch.exp(t)) / t.shape[1]).sum(1)


def test_map_nca_is_the_weighted_score_loss_with_cross_entropy_and_the_offset_in_its_label():
    # K w_i = e^{r_i/alpha} / Z^, Z^ the mean over the K. So term i is cross-entropy of weight
    # w_i + 1/K, label w_i/(w_i + 1/K) = 1/(1 + 1/(K w_i)) = sigma(r_i/alpha - log Z^).
    (policy, ref, rewards), alpha = normals(75)(3, 4, 5), 0.4
    log_Z = estimated_offset(rewards, alpha)[:, None] / alpha
    label, w = torch.sigmoid(rewards / alpha - log_Z), (rewards / alpha).softmax(1)

    def una(p, label=label, weight=w + 1 / 5, g="bce"):
        return (weight * una_score_loss(implicit_reward(p, ref, 1.0), label, g)).sum(1)

    paper = lambda p: nca_paper(p - ref, rewards, alpha)
    assert same(una, paper, policy)
    assert not same(lambda p: una(p, label=w), paper, policy)            # the weight is no label
    assert not same(lambda p: una(p, label=torch.sigmoid(rewards / alpha)), paper, policy)  # no Z
    assert not same(lambda p: una(p, weight=2 / 5), paper, policy)       # all alike, with their sum
    assert not same(lambda p: una(p, g="mse"), paper, policy)


def test_map_nca_is_smallest_where_una_score_with_the_estimated_offset_is():
    # At t = r/alpha - log Z^, where alpha t + alpha log Z^ = r: r_theta = r. That is all they
    # share: the ratio of their slopes elsewhere is another one for each response.
    (policy, ref, rewards), alpha = normals(75)(3, 4, 5), 0.4
    V = estimated_offset(rewards, alpha)[:, None]
    nca = lambda p: nca_paper(p - ref, rewards, alpha)
    score = lambda g, offset=V: lambda p: una_score_loss(
        implicit_reward(p, ref, alpha, offset), torch.sigmoid(rewards), g)
    best = ref + (rewards - V) / alpha
    assert close(gradient(nca, best), 0.0) and not close(gradient(nca, best + V / alpha), 0.0)
    for g in ("mse", "bce"):
        assert close(gradient(score(g), best), 0.0)
        assert not close(gradient(score(g, 0.0), best), 0.0)
        ratio = gradient(nca, policy) / gradient(score(g), policy)
        assert (ratio > 0).all() and ratio.max() > 2 * ratio.min()


def info_nca_paper(t, w):
    """Chen et al. 2024: -sum_i w_i log softmax(t)_i; t and w (X, K). Returns (X,)."""
    return -(w * torch.log(t.exp() / t.exp().sum(1, keepdim=True))).sum(1)


def test_map_info_nca_cancels_the_offset_and_nca_does_not():
    # softmax(t + b) = softmax(t). So t = r/alpha + any b(x) is best, and no Z^ is needed.
    (policy, ref, rewards), alpha = normals(76)(3, 4, 5), 0.4
    b, w = normals(77)(4, 1), (rewards / alpha).softmax(1)
    for loss, cancels in ((lambda t: info_nca_paper(t, w), True),
                          (lambda t: nca_paper(t, rewards, alpha), False)):
        shifted = lambda p: loss(implicit_reward(p, ref, 1.0, offset=b))
        assert same(shifted, lambda p: loss(p - ref), policy) == cancels
        assert close(gradient(loss, rewards / alpha + b), 0.0) == cancels


def test_map_info_nca_of_two_responses_is_dpo_with_a_soft_label():
    # softmax(t)_1 = sigma(t_1 - t_2), and w_1 = sigma((r_1 - r_2)/alpha): the score loss of the
    # margin, with cross-entropy. alpha -> 0 makes the label 1 if the first is better, else 0: with
    # t = beta rho that is DPO.
    (policy, ref, rewards), beta, alpha = normals(78)(3, 2, 20), 0.3, 0.4

    def paper(p, alpha):
        return info_nca_paper(beta * (p - ref).T, (rewards / alpha).softmax(0).T)

    def una(p, label):
        reward = implicit_reward(p, ref, beta, offset=0.8)
        return una_score_loss(reward[0] - reward[1], label, "bce")

    soft = torch.sigmoid((rewards[0] - rewards[1]) / alpha)
    won = rewards.argsort(0, descending=True)                    # the better one of each pair first
    dpo = lambda p: dpo_loss(*p.gather(0, won), *ref.gather(0, won), beta)
    assert same(lambda p: una(p, soft), lambda p: paper(p, alpha), policy)
    for wrong in (soft.round(), (rewards[0] / alpha).sigmoid(), 1 - soft):
        assert not same(lambda p: una(p, wrong), lambda p: paper(p, alpha), policy)
    assert same(dpo, lambda p: paper(p, 1e-4), policy)
    assert not same(dpo, lambda p: paper(p, alpha), policy)


def test_map_pro_is_the_pair_loss_over_a_population():
    # Guo et al. 2025: y and y' are drawn alike, y wins with probability P. With r = r_theta and
    # d = r(y) - r(y'), the cross-entropy of P and sigma(d) is -(P - 1/2) d + that of 1/2, which is
    # KL(B(1/2) || B(sigma(d))) + log 2. And -E (P - 1/2) (r(y) - r(y')) = -2 E s(y) r(y), with
    # s(y) = E P(y beats y') - 1/2, as P(y' beats y) = 1 - P. E s = 0: f(x) + c cancels here too.
    policy, ref, beta = normals(80)(6), normals(81)(6), 0.3
    odds, mu = normals(82)(6, 6), normals(83)(6).softmax(-1)     # no Bradley-Terry, any sampler
    P = torch.sigmoid(odds - odds.T)
    both = mu[:, None] * mu

    def una(p):
        reward = implicit_reward(p, ref, beta, offset=0.8)
        first, second = reward[:, None].expand(6, 6), reward.expand(6, 6)
        return (both * (P * una_pair_loss(first, second)
                        + (1 - P) * una_pair_loss(second, first))).sum()[None]

    def paper(p, times=2, half=0.5, mu=mu):
        reward, s = beta * (p - ref), (P * mu).sum(1) - half
        won = 1 / (1 + torch.exp(reward - reward[:, None]))      # sigma(r(y) - r(y'))
        KL = 0.5 * torch.log(0.5 / won) + 0.5 * torch.log(0.5 / (1 - won))
        return (-times * (mu * s * reward).sum() + (both * KL).sum() + math.log(2))[None]

    assert same(una, paper, policy)
    assert not same(una, lambda p: paper(p, times=1), policy)
    assert not same(una, lambda p: paper(p, half=0.0), policy)
    assert not same(una, lambda p: paper(p, mu=torch.full((6,), 1 / 6)), policy)   # other samples


def policy_gradient(theta, ref, rewards, beta, y, baseline):
    """REINFORCE for J on samples y, one a prompt: (r - beta rho - baseline) grad log pi.

    The gradient is that by the logits: grad log pi = 1_y - pi.
    """
    p = theta.log_softmax(-1)
    rows = torch.arange(len(y))
    advantage = rewards[rows, y] - beta * (p[rows, y] - ref[rows, y]) - baseline
    return advantage[:, None] * (F.one_hot(y, theta.shape[-1]) - p.exp())


def test_map_rlhf_policy_gradient_is_the_reward_loss_sample_by_sample():
    # grad (r_phi - r_theta)^2 = -2 beta (r_phi - beta rho - b) grad log pi:
    # REINFORCE with the offset for its baseline.
    theta, ref, rewards = normals(23)(20, 6), normals(24)(20, 6).log_softmax(-1), normals(25)(20, 6)
    y, rows, offset = normals(26)(20, 6).argmax(-1), torch.arange(20), normals(27)(20)

    def una(t):
        reward = implicit_reward(t.log_softmax(-1)[rows, y], ref[rows, y], 0.3, offset)
        return una_reward_loss(reward, rewards[rows, y])

    advantage = rewards[rows, y] - 0.3 * (theta.log_softmax(-1) - ref)[rows, y] - offset
    assert close(una(theta), advantage**2)
    reinforce = lambda baseline: policy_gradient(theta, ref, rewards, 0.3, y, baseline)
    assert close(gradient(una, theta), -2 * 0.3 * reinforce(offset))
    assert not close(gradient(una, theta), -2 * reinforce(offset))    # missing beta
    assert not close(gradient(una, theta), -2 * 0.3 * reinforce(0))   # in mean only


def test_map_rlhf_policy_gradient_averages_to_the_gradient_of_the_objective():
    # E_{y~pi} over all six responses: the baseline is gone, and what is left is grad J.
    theta, ref, rewards = normals(28)(4, 6), normals(29)(4, 6).log_softmax(-1), normals(30)(4, 6)
    grad_J = gradient(lambda t: rlhf_objective(t.log_softmax(-1), ref, rewards, 0.3), theta)

    def mean(weights, baseline):
        at = lambda y: policy_gradient(theta, ref, rewards, 0.3, torch.full((4,), y), baseline)
        return sum(weights[:, y:y + 1] * at(y) for y in range(6))

    assert close(mean(theta.softmax(-1), 0.0), grad_J)
    assert close(mean(theta.softmax(-1), 2.5), grad_J)
    assert not close(mean(ref.exp(), 0.0), grad_J)   # samples of another policy


@pytest.mark.parametrize("n", [2, 3])
def test_map_rloo_is_the_reward_loss_with_the_others_mean_residual_for_its_offset(n):
    # Kool et al. 2019, Ahmadian et al. 2024: 1/n sum_i (R_i - mean of the others' R) grad log pi,
    # R = r - beta rho. The others know nothing of y_i: a baseline. The mean of all n has y_i in it:
    # R_i - mean = (n - 1)/n (R_i - mean of the others). All 6^n draws, each with its probability.
    draws, beta = torch.cartesian_prod(*[torch.arange(6)] * n), 0.3
    theta, ref, rewards = normals(84)(6), normals(85)(6).log_softmax(-1), normals(86)(6)
    every = lambda table: table.expand(len(draws), 6)            # one row for each draw
    R = (rewards - beta * (theta.log_softmax(-1) - ref))[draws]
    own = R.mean(1, keepdim=True).expand_as(R)
    others = torch.stack([(R.sum(1) - R[:, i]) / (n - 1) for i in range(n)], dim=1)

    def una(t, offset):
        logprob = t.log_softmax(-1).gather(1, draws)
        return una_reward_loss(implicit_reward(logprob, ref[draws], beta, offset),
                               rewards[draws]).mean(1)

    paper = sum(policy_gradient(every(theta), every(ref), every(rewards), beta, draws[:, i],
                                others[:, i]) for i in range(n)) / n
    slopes = lambda offset: gradient(lambda t: una(t, offset), every(theta)) / (-2 * beta)
    assert close(slopes(others), paper) and not close(slopes(own), paper)
    mean = lambda slopes: (theta.softmax(-1)[draws].prod(1, keepdim=True) * slopes).sum(0)
    grad_J = gradient(lambda t: rlhf_objective(t.log_softmax(-1), ref, rewards, beta), theta)
    assert close(mean(slopes(others)), grad_J) and not close(mean(slopes(own)), grad_J)
    assert close(mean(slopes(own)), (n - 1) / n * grad_J)


def test_map_vargrad_is_the_reward_loss_with_the_own_mean_residual_for_its_offset():
    # Richter et al. 2020: half the variance over n samples (over n - 1) of log q/p, here of
    # log pi/(pi_ref e^{r/beta}) = rho - r/beta. It deviates from its mean by (r_theta - r)/beta if
    # the offset is the mean residual b of r - beta rho. Residuals less b add up to 0, so that
    # nothing flows through b. And R_i - b = (n - 1)/n (R_i - mean of the others): RLOO, exactly.
    policy, ref, rewards = normals(87)(3, 4, 5)
    beta, n = 0.3, 5
    paper = lambda p: 0.5 * (p - ref - rewards / beta).var(1)
    own = lambda R: R.mean(1, keepdim=True)
    others = lambda R: (R.sum(1, keepdim=True) - R) / (n - 1)

    def una(p, held, mean=own):
        b = mean(rewards - implicit_reward(p, ref, beta))
        reward = implicit_reward(p, ref, beta, b.detach() if held else b)
        return una_reward_loss(reward, rewards).sum(1) / (2 * beta**2 * (n - 1))

    for held in (True, False):
        assert same(lambda p: una(p, held), paper, policy)
        assert not same(lambda p: una(p, held, others), paper, policy)
        assert not same(lambda p: una(p, held, torch.mean), paper, policy)   # one for all prompts
    R = rewards - beta * (policy - ref)
    rloo = lambda mean: (R - mean(R)) / n        # by log pi of each sample
    assert close(gradient(paper, policy), -rloo(others) / beta)
    assert not close(gradient(paper, policy), -rloo(own) / beta)


def test_map_trajectory_balance_is_the_reward_loss_with_a_learned_log_Z():
    # Malkin et al. 2022, with one way to each response and pi_ref e^{r/beta} for what it is to be
    # sampled in proportion to (Bartoldson et al. 2025):
    # (log Z_phi + log pi - log pi_ref - r/beta)^2 = ((beta rho + beta log Z_phi) - r)^2 / beta^2.
    theta, ref, rewards = normals(88)(4, 6), normals(89)(4, 6).log_softmax(-1), normals(90)(4, 6)
    log_Z, beta = normals(91)(4, 1), 0.3
    paper = lambda t, z: (z + t.log_softmax(-1) - ref - rewards / beta) ** 2

    def una(t, z, beta_z=beta):
        reward = implicit_reward(t.log_softmax(-1), ref, beta, beta_z * z)
        return una_reward_loss(reward, rewards) / beta**2

    assert same(lambda t: una(t, log_Z), lambda t: paper(t, log_Z), theta)
    assert same(lambda z: una(theta, z), lambda z: paper(theta, z), log_Z)
    assert not same(lambda t: una(t, log_Z, 1.0), lambda t: paper(t, log_Z), theta)   # no beta
    # E_{y~pi}, the samples held fixed: log Z_phi drops out, and -2 beta grad J / beta^2 is left.
    grad_J = gradient(lambda t: rlhf_objective(t.log_softmax(-1), ref, rewards, beta), theta)
    mean = lambda samples, z=log_Z: gradient(lambda t: samples.exp() * paper(t, z), theta)
    fresh, (best, value) = theta.log_softmax(-1), optimal_policy(ref, rewards, beta)
    assert close(mean(fresh), -2 / beta * grad_J) and close(mean(fresh, 0.0), -2 / beta * grad_J)
    assert not close(mean(fresh), -2 * beta * grad_J)
    # On samples of pi_ref that is lost; the loss is 0 at pi* all the same.
    assert not close(mean(ref), -2 / beta * grad_J)
    assert close(paper(best, value[:, None] / beta), 0.0)


# ---------------------------------------------------------------- more exact relations

def test_relation_cross_entropy_of_a_pair_with_its_best_offset_is_twice_dpo_at_half_beta():
    # -log sigma(w + b) - log sigma(-(l + b)) is smallest where w + b = -(l + b); it is
    # -2 log sigma((w - l)/2) there.
    # The gradient is that of the loss with the best b held fixed, since the slope in b is zero.
    policy, ref, beta = normals(31)(2, 20), normals(32)(2, 20), 0.3

    def pair(p, offset):
        winner, loser = implicit_reward(p, ref, beta, offset)
        return (una_binary_loss(winner, torch.ones(20), "bce")
                + una_binary_loss(loser, torch.zeros(20), "bce"))

    best = minimiser(lambda b: pair(policy, b), 20)
    dpo = lambda p, beta=beta / 2, times=2: times * dpo_loss(p[0], p[1], ref[0], ref[1], beta)
    assert same(lambda p: pair(p, best), dpo, policy)
    assert not same(lambda p: pair(p, best), lambda p: dpo(p, beta=beta), policy)
    assert not same(lambda p: pair(p, best), lambda p: dpo(p, times=1), policy)
    assert not same(lambda p: pair(p, 0.0), dpo, policy)


def test_relation_reward_loss_of_a_pair_with_its_best_offset_is_half_of_rebel():
    # (e_w - b)^2 + (e_l - b)^2 is smallest at the mean of the errors e,
    # where it is (e_w - e_l)^2 / 2.
    policy, ref, rewards, beta = normals(33)(2, 20), normals(34)(2, 20), normals(35)(2, 20), 0.3
    pair = lambda p, offset: una_reward_loss(implicit_reward(p, ref, beta, offset), rewards).sum(0)
    best = minimiser(lambda b: pair(policy, b), 20)
    error = lambda p: beta * (p - ref) - rewards
    half_rebel = lambda p: 0.5 * (error(p)[0] - error(p)[1]) ** 2
    assert same(lambda p: pair(p, best), half_rebel, policy)
    assert not same(lambda p: pair(p, best), lambda p: 2 * half_rebel(p), policy)
    assert not same(lambda p: pair(p, 0.0), half_rebel, policy)


def test_relation_cross_entropy_of_a_pair_exceeds_dpo():
    # sigma(w) sigma(-l) < sigma(w - l),
    # since (1 + e^-w)(1 + e^l) = 1 + e^-w + e^l + e^(l-w) > 1 + e^(l-w).
    w, l = 3 * normals(36)(2, 1000)
    bce = una_binary_loss(w, torch.ones(1000), "bce") + una_binary_loss(l, torch.zeros(1000), "bce")
    assert (bce > una_pair_loss(w, l)).all()
    assert close((bce.exp() - una_pair_loss(w, l).exp()), (-w).exp() + l.exp())


def test_relation_cross_entropy_has_the_minimiser_of_the_squared_error():
    # For a soft target s too, both are smallest at r = log s/(1 - s): nothing forces one to exclude
    # BCE for scores, as section 2.3.3 does. At its minimum BCE is not 0 but the score's entropy.
    given = torch.sigmoid(normals(37)(20))
    at = torch.log(given / (1 - given))
    for g in ("mse", "bce"):
        assert close(gradient(lambda r: una_score_loss(r, given, g), at), 0.0)
        for step in (-0.1, 0.1):
            assert (una_score_loss(at + step, given, g) > una_score_loss(at, given, g)).all()
    entropy = -given * given.log() - (1 - given) * (1 - given).log()
    assert close(una_score_loss(at, given, "bce"), entropy)


def test_relation_absolute_error_is_not_proper():
    # A label is 1 with probability 0.7. Squared error and cross-entropy are smallest at s = 0.7;
    # KTO's absolute error 0.7 (1 - s) + 0.3 s falls all the way to s = 1: it reports not the
    # probability but the majority.
    s = torch.arange(1, 100).double() / 100
    one = torch.ones(99)
    loss = lambda label, g: una_binary_loss(s.logit(), label, g)
    mean = lambda g: 0.7 * loss(one, g) + 0.3 * loss(0 * one, g)
    assert [s[mean(g).argmin()].item() for g in ("mse", "bce", "mae")] == [0.70, 0.70, 0.99]


def test_relation_slopes_at_the_start_and_at_a_confident_mistake():
    # |dL/dr| for label 1 at r = 0 and at r = -10.
    # Only DPO and BCE can still repair the confident mistake.
    r, one = torch.tensor([0.0, -10.0]).double(), torch.ones(2)
    s, zero = torch.sigmoid(r), torch.zeros(2, dtype=torch.float64)
    slope = lambda loss: gradient(loss, r).abs()
    assert close(slope(lambda r: una_pair_loss(r, zero)), [0.5, 0.99995460], tol=1e-8)
    assert close(slope(lambda r: una_binary_loss(r, one, "bce")), [0.5, 0.99995460], tol=1e-8)
    assert close(slope(lambda r: una_binary_loss(r, one, "mse")), [0.25, 9.0787e-5], tol=1e-8)
    kto = lambda r: kto_loss(r, zero, one, zero, zero, 1.0)
    assert close(slope(kto), [0.25, 4.5396e-5], tol=1e-8)
    assert close(slope(lambda r: una_binary_loss(r, one, "mae")), s * (1 - s))


def test_printed_kto_reference_point_is_a_KL_and_not_beta_log_Z():
    # Appendix A: "KTO estimates Z(x)". Its z_0 is 0 where the policy is the reference, but Z
    # depends on pi_ref and r alone, whatever the policy; and at the optimum
    # beta KL(pi* || pi_ref) = E_{pi*} r - beta log Z.
    ref, rewards, beta = normals(38)(6).log_softmax(-1), normals(39)(6), 0.4
    best, value = optimal_policy(ref, rewards, beta)
    KL = (best.exp() * (best - ref)).sum()
    assert close(beta * KL, (best.exp() * rewards).sum() - value)
    assert (beta * KL - value).abs() > 0.1
    policy, one = normals(40)(6), torch.ones(6)
    with_log_Z = una_binary_loss(implicit_reward(policy, ref, beta, -value), one, "mae")
    assert not close(kto_loss(policy, ref, one, ref, ref, beta), with_log_Z)


# ---------------------------------------------------------------- what all losses have in common

def losses(B):
    """Each as a function of B rewards, with all else fixed for each row.

    KTO and DPO are functions of B log-probabilities.
    """
    other, score, label = normals(50)(B), torch.sigmoid(normals(51)(B)), labels(B)
    kl = normals(52)(2, 5) + torch.tensor([[1.0], [-1.0]])
    return {
        "reward model": lambda r, i=slice(None): reward_model_loss(r, other[i]),
        "pair": lambda r, i=slice(None): una_pair_loss(r, other[i]),
        "reward": lambda r, i=slice(None): una_reward_loss(r, other[i]),
        "score mse": lambda r, i=slice(None): una_score_loss(r, score[i], "mse"),
        "score mae": lambda r, i=slice(None): una_score_loss(r, score[i], "mae"),
        "score bce": lambda r, i=slice(None): una_score_loss(r, score[i], "bce"),
        "binary mse": lambda r, i=slice(None): una_binary_loss(r, label[i], "mse"),
        "binary mae": lambda r, i=slice(None): una_binary_loss(r, label[i], "mae"),
        "binary bce": lambda r, i=slice(None): una_binary_loss(r, label[i], "bce"),
        "dpo": lambda r, i=slice(None): dpo_loss(r, 0 * r, other[i], score[i], 0.3),
        "kto": lambda r, i=slice(None): kto_loss(r, other[i], label[i], *kl, 0.3, 1.2, 0.8),
    }


@pytest.mark.parametrize("name", losses(1))
def test_loss_of_a_batch_is_that_of_its_rows(name):
    # One value for each example, from that example alone:
    # a batch may be split, shuffled, or mixed with other feedback.
    loss, reward, order = losses(7)[name], 2 * normals(53)(7), torch.tensor([3, 0, 6, 5, 1, 4, 2])
    whole = loss(reward)
    assert whole.shape == (7,) and whole.dtype == torch.float64
    assert close(torch.cat([loss(reward[i:i + 1], slice(i, i + 1)) for i in range(7)]), whole)
    assert close(loss(reward[order], order), whole[order]) and not close(whole[order], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", losses(1))
def test_loss_and_gradient_are_finite_at_extreme_rewards(name, dtype):
    # log(sigmoid(-1000)) would be -inf, and its gradient nan.
    # All four combinations of sign and label.
    extreme = torch.tensor([1000.0, 1000.0, -1000.0, -1000.0, 0.0, 0.0], dtype=dtype)
    loss = losses(6)[name]
    assert loss(extreme).isfinite().all() and (loss(extreme) >= 0).all()
    assert gradient(loss, extreme).isfinite().all()


def test_loss_of_an_extreme_reward_is_its_size_where_it_is_a_log_loss():
    # -log sigma(-1000) = 1000 up to e^-1000.
    r, zero = torch.tensor([1000.0, -1000.0]).double(), torch.zeros(2).double()
    label = torch.tensor([0, 1])
    assert close(una_binary_loss(r, label, "bce"), 1000.0)
    assert close(una_pair_loss(-r.abs(), zero), 1000.0)
    assert close(reward_model_loss(-r.abs(), zero), 1000.0)
    assert close(dpo_loss(-r.abs(), zero, zero, zero, 1.0), 1000.0)
    assert close(gradient(lambda r: una_binary_loss(r, label, "bce"), r), [1.0, -1.0])
    log_sigmoid = lambda r: -torch.log(torch.sigmoid(r))   # what one would write first
    assert log_sigmoid(r).isinf().any() and gradient(log_sigmoid, r).isnan().any()


def test_losses_at_the_first_step():
    # pi = pi_ref: rho = 0 exactly, so every reward is 0 and every score 1/2, whatever the labels.
    logprob, label = normals(54)(8) - 20, labels(8)
    reward = implicit_reward(logprob, logprob.clone(), 0.1)
    assert (reward == 0).all() and close(implicit_score(reward), 0.5)
    assert close(dpo_loss(logprob, logprob - 3, logprob, logprob - 3, 0.1), math.log(2))
    assert close(una_pair_loss(reward, reward), math.log(2))
    for g, expected in (("bce", math.log(2)), ("mse", 0.25), ("mae", 0.5)):
        assert close(una_binary_loss(reward, label, g), expected)
    assert close(kto_loss(logprob, logprob, label, logprob, logprob, 0.1), 0.5)
    assert close(una_score_loss(reward, torch.full_like(reward, 0.8)), 0.09)


BINARY = {
    "una": lambda r, label: una_binary_loss(r, label, "mae"),
    "kto": lambda r, label: kto_loss(r, 0 * r, label, r, 0 * r, 0.3),
}


@pytest.mark.parametrize("name", BINARY)
def test_labels_may_be_bool_int_or_float(name):
    reward, label = normals(55)(5), torch.tensor([1, 0, 0, 1, 0])
    for dtype in (torch.bool, torch.int32, torch.float32, torch.float64):
        assert BINARY[name](reward, label.to(dtype)).equal(BINARY[name](reward, label))
    for g in ("mse", "bce", "mae"):
        loss = lambda label: una_binary_loss(reward, label, g)
        assert loss(label.bool()).equal(loss(label.double()))


@pytest.mark.parametrize("bad", [-1.0, 0.3, 2.0, float("nan")])
@pytest.mark.parametrize("name", BINARY)
def test_labels_other_than_zero_and_one_are_rejected(name, bad):
    # The message names the first of them.
    for label in ([1.0, 0.0, bad], [1.0, bad, 7.0]):
        with pytest.raises(ValueError, match=f"0 or 1, got {bad}"):
            BINARY[name](normals(56)(3), torch.tensor(label))


def test_int_labels_other_than_zero_and_one_are_rejected():
    for binary in BINARY.values():
        with pytest.raises(ValueError, match="0 or 1, got -1"):
            binary(normals(57)(3), torch.tensor([1, -1, 0]))


# ---------------------------------------------------------------- shapes

# Each function of tensors that must be alike. Any values in [0, 1] will do, and for labels 0 or 1.
ALIKE = {
    "reward_model_loss": (reward_model_loss, 2),
    "implicit_reward": (lambda logprob, ref: implicit_reward(logprob, ref, 0.3), 2),
    "una_reward_loss": (una_reward_loss, 2),
    "una_score_loss mse": (lambda r, score: una_score_loss(r, score, "mse"), 2),
    "una_score_loss mae": (lambda r, score: una_score_loss(r, score, "mae"), 2),
    "una_score_loss bce": (lambda r, score: una_score_loss(r, score, "bce"), 2),
    "una_binary_loss": (lambda r, label: una_binary_loss(r, label), 2),
    "una_pair_loss": (una_pair_loss, 2),
    "dpo_loss": (lambda *four: dpo_loss(*four, 0.3), 4),
    "kto_loss": (lambda *three: kto_loss(*three, torch.ones(3), torch.zeros(3), 0.3), 3),
    "kto_loss kl": (lambda *kl: kto_loss(*torch.ones(3, 5), *kl, 0.3), 2),
}


@pytest.mark.parametrize("name, i", [(name, i) for name, (_, n) in ALIKE.items() for i in range(n)])
def test_shapes_that_would_broadcast_are_rejected_and_named(name, i):
    # (B, 1) against (B,) becomes (B, B), all against all. (1,) and () would stand for all rows.
    function, n = ALIKE[name]
    for shape in ((4, 1), (1,), (1, 4), ()):
        arguments = [torch.ones(4)] * n
        arguments[i] = torch.ones(shape)
        with pytest.raises(ValueError) as error:
            function(*arguments)
        assert "shapes differ" in str(error.value)
        assert str(shape) in str(error.value) and "(4,)" in str(error.value)


def test_shapes_are_told_by_the_names_of_the_arguments():
    four, wide = torch.ones(4), torch.ones(4, 1)
    for function, names in ((una_reward_loss, ("implicit", "explicit_reward")),
                            (una_score_loss, ("implicit", "explicit_score")),
                            (una_binary_loss, ("implicit", "label")),
                            (una_pair_loss, ("chosen_reward", "rejected_reward"))):
        with pytest.raises(ValueError) as error:
            function(four, wide)
        assert str(error.value) == f"shapes differ: {names[0]} (4,), {names[1]} (4, 1)"


@pytest.mark.parametrize("name", ALIKE)
def test_shapes_that_do_not_even_broadcast_are_rejected_in_the_same_words(name):
    function, n = ALIKE[name]
    with pytest.raises(ValueError, match=r"shapes differ.*\(4,\).*\(3,\)"):
        function(*[torch.ones(4)] * (n - 1), torch.ones(3))


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (2, 3)])
def test_shapes_that_are_alike_are_kept(name, shape):
    function, n = ALIKE[name]
    assert function(*[torch.ones(shape)] * n).shape == (shape if name != "kto_loss kl" else (5,))


def test_shapes_that_broadcast_would_train_something_else():
    # The mean over all against all is not the mean of the losses: this is what is refused.
    implicit, given = normals(64)(2, 4)
    all_against_all = (given - implicit[:, None]) ** 2
    assert all_against_all.shape == (4, 4)
    assert not close(all_against_all.mean(), una_reward_loss(implicit, given).mean())


def test_shapes_a_number_fits_any_explicit_reward():
    implicit = normals(65)(4)
    assert una_reward_loss(implicit, 0.5).equal(una_reward_loss(implicit, implicit * 0 + 0.5))


def test_shapes_an_offset_may_broadcast_to_the_log_probabilities_and_not_widen_them():
    logprob, ref = normals(66)(2, 4, 6)
    for shape in ((), (6,), (1, 6), (4, 1), (4, 6)):
        offset = normals(67)(24)[:math.prod(shape)].view(shape)
        expected = 0.3 * (logprob - ref) + offset.expand(4, 6)
        assert close(implicit_reward(logprob, ref, 0.3, offset), expected)
    for shape in ((4, 1), (1, 1), (4, 4)):
        with pytest.raises(ValueError) as error:
            implicit_reward(logprob[:, 0], ref[:, 0], 0.3, torch.zeros(shape))
        assert f"logprob (4,), offset {shape}" in str(error.value)


# ---------------------------------------------------------------- KTO's reference point

@pytest.mark.parametrize("label", [[1], [0], [1, 1, 1], [0, 0, 0], [1, 0, 0, 1, 0]])
@pytest.mark.parametrize("K", [1, 4])
def test_kto_takes_any_batch_and_any_number_of_mismatched_pairs(label, K):
    B, label = len(label), torch.tensor(label)
    policy, ref = normals(58)(B), normals(59)(B)
    kl = normals(60)(2, K) + torch.tensor([[1.0], [-1.0]])
    z0 = sum((kl[0] - kl[1]).tolist()) / K
    loss = kto_loss(policy, ref, label, kl[0], kl[1], 0.3)
    assert z0 > 0 and close(loss, kto_paper(policy, ref, label, z0, 0.3))


def test_kto_needs_a_mismatched_pair():
    # The mean of nothing is nan.
    with pytest.raises(ValueError, match="at least one"):
        kto_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), torch.zeros(0), torch.zeros(0), 0.1)


def test_kto_reference_point_is_an_average_clamped_at_zero():
    policy, ref, label = normals(61)(5), normals(62)(5), labels(5)

    def at(*kl):
        kl = torch.tensor(kl).double()
        return kto_loss(policy, ref, label, kl, 0 * kl, 0.3)
    assert close(at(2.0, -1.0, 5.0), kto_paper(policy, ref, label, 2.0, 0.3))   # mean, then clamp
    assert close(at(-2.0, 1.0), kto_paper(policy, ref, label, 0.0, 0.3))
    assert not close(at(-2.0, 1.0), kto_paper(policy, ref, label, 0.5, 0.3))    # clamp, then mean
    assert not close(at(-2.0, 1.0), kto_paper(policy, ref, label, -0.5, 0.3))   # no clamp


def test_kto_no_gradient_flows_through_the_reference_point():
    # z_0 is held constant: with the very same log-probabilities in both places the gradient is that
    # with z_0 a number.
    logprob, ref, label = normals(63)(5) + 1, normals(64)(5) - 1, labels(5)
    z0 = (logprob - ref).mean()
    constant = gradient(lambda p: kto_paper(p, ref, label, z0, 0.3), logprob)
    assert close(gradient(lambda p: kto_loss(p, ref, label, p, ref, 0.3), logprob), constant)
    flowing = gradient(lambda p: kto_paper(p, ref, label, (p - ref).mean(), 0.3), logprob)
    assert not close(flowing, constant)
    kl = logprob.clone().requires_grad_()
    assert not kto_loss(logprob, ref, label, kl, ref, 0.3).requires_grad
