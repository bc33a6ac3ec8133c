"""Every method is one line: L = g(squash(r_theta), target), with an offset f(x) + c in r_theta.

test_map_<method>_... writes a method's loss as its own paper has it and finds it again in una.py,
value and gradient; the nearest wrong versions must fail the same comparison. Then more exact
relations, numbers of an independent implementation, and what all losses share.
"""
import inspect
import json
import math
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import una
from helpers import close, gradient, normals

# Log-probabilities by the policy and by the reference, and rewards: of 20 pairs, the chosen
# responses and the rejected, labelled 1 and 0; and of 5 responses to each of 8 prompts.
PAIRS = normals(1)(3, 2, 20)
LABEL = torch.tensor([[1], [0]]).expand(2, 20)
LISTS = PAIRS.view(3, 8, 5)


def same(loss, other, theta):
    """Have the two losses the same value, one for each example, and the same gradient at theta?"""
    return close(loss(theta), other(theta)) and close(gradient(loss, theta), gradient(other, theta))


def finds(ours, paper, theta, *mistakes):
    """True if the losses are the same, and with each mistake, other arguments of ours, not."""
    assert same(ours, paper, theta)
    for mistake in mistakes:
        assert not same(lambda theta: ours(theta, **mistake), paper, theta), mistake
    return True


# r_theta(w) - r_theta(l), where the offset cancels; the means of a prompt's values, all or others'.
margin = lambda p, ref, beta: torch.sub(*una.implicit_reward(p, ref, beta, offset=0.8))
own_mean = lambda values: values.mean(1, keepdim=True)
others_mean = lambda values: (values.sum(1, keepdim=True) - values) / (values.shape[1] - 1)


def test_map_dpo_is_the_pair_loss_from_logits_to_loss_and_each_mistake_is_seen():
    # The same gradient at every logit is the same gradient at every parameter of whatever model
    # made the logits. Row 0 is chosen, row 1 rejected. Their lengths differ.
    (logits, ref_logits, scores), positions = normals(3)(3, 2, 9, 5), torch.arange(9)
    ids = scores.argmax(-1)
    response = torch.stack([(positions >= 2) & (positions < 8), (positions >= 4) & (positions < 7)])

    def paper(z):
        """Rafailov et al. 2023 in plain words, token by token, beta = 0.3."""
        pi, pi_ref = z.softmax(-1), ref_logits.softmax(-1)
        rho = [sum((pi[i, t - 1, ids[i, t]] / pi_ref[i, t - 1, ids[i, t]]).log()
                   for t in range(9) if response[i, t]) for i in (0, 1)]
        return torch.log(1 + torch.exp(-0.3 * (rho[0] - rho[1])))[None]

    def ours(z, mistake=None):
        shift = 1 if mistake == "unshifted labels" else 0
        counted = {"padding counted": positions >= 4, "prompt counted": positions == 1}
        tokens, mask = ids.roll(shift, -1), response.roll(shift, -1) | counted.get(mistake, False)
        policy, ref = (una.sequence_logprob(logits, tokens, mask) for logits in (z, ref_logits))
        if mistake == "mean for sum":
            policy, ref = policy / mask.sum(-1), ref / mask.sum(-1)
        ref = {"reference = policy": policy, "no reference": 0 * ref,
               "other reference": ref.flip(0)}.get(mistake, ref)
        beta = 1.0 if mistake == "missing beta" else 0.3
        w, l = una.implicit_reward(policy, ref, beta, offset=0.8)[:, None]
        if mistake == "no log sigma":
            return l - w
        return una.una_pair_loss(l, w) if mistake == "swapped pair" else una.una_pair_loss(w, l)
    assert finds(ours, paper, logits, *[dict(mistake=mistake) for mistake in (
        "unshifted labels", "padding counted", "prompt counted", "mean for sum", "swapped pair",
        "reference = policy", "no reference", "other reference", "missing beta", "no log sigma")])
    of_all = lambda z: una.sequence_logprob(z, ids, response)[:, None]
    assert same(lambda z: una.dpo_loss(*of_all(z), *of_all(ref_logits), 0.3), paper, logits)


def test_map_ipo_map_rebel_map_distilled_map_copg_and_map_sppo_are_the_reward_loss():
    (policy, ref, rewards), tau, eta = PAIRS, 0.3, 2.5
    # Azar et al. 2023: (h - 1/(2 tau))^2 with h = rho_w - rho_l. Times tau^2: (tau h - 1/2)^2.
    ipo = lambda p: ((p[0] - p[1]) - (ref[0] - ref[1]) - 1 / (2 * tau)) ** 2
    ours = lambda p, target=0.5, beta=tau: una.una_reward_loss(
        margin(p, ref, beta), target) / tau**2
    assert finds(ours, ipo, policy, dict(target=1.0), dict(target=-0.5), dict(beta=1.0))
    # Gao et al. 2024: ((1/eta) (rho - rho') - (r - r'))^2, so beta = 1/eta. No label: r itself.
    # Distilled DPO, Fisch et al. 2024, has the same but that pi_ref stays. Flet-Berliac et al. 2024
    # climb (R - R') (grad log pi(y) - grad log pi(y')) with R = r - beta rho.
    rebel = lambda p: (((p[0] - ref[0]) - (p[1] - ref[1])) / eta - (rewards[0] - rewards[1])) ** 2
    ours = lambda p, beta=1 / eta, r=rewards: una.una_reward_loss(margin(p, ref, beta), r[0] - r[1])
    assert finds(ours, rebel, policy, dict(beta=eta), dict(r=rewards.flip(0)))
    for R, copg in ((rewards - (policy - ref) / eta, True), (rewards, False)):      # no KL
        climb = torch.stack([R[0] - R[1], R[1] - R[0]])
        assert close(gradient(ours, policy), -2 / eta * climb) == copg
    # Wu et al. 2024. P, the chance to beat one of the last policy's, has the mean 1/2: f(x) + c. A
    # judge who is asked once says 1 or 0.
    for P in (torch.sigmoid(rewards), LABEL):
        sppo = lambda p: (p - ref - eta * (P - 0.5)) ** 2
        ours = lambda p, offset=0.5, target=P, beta=1 / eta: eta**2 * una.una_reward_loss(
            una.implicit_reward(p, ref, beta, offset), target)
        assert finds(ours, sppo, policy, dict(offset=0.0), dict(target=1 - P), dict(beta=eta))


def test_map_reward_aware_rpo_is_cross_entropy_less_its_entropy_with_the_label_sigma_of_eta_dr():
    # Sun et al. 2025: KL(B(s) || B(t)) of two coins, s = sigma(eta (r - r')), t = sigma(r_theta -
    # r_theta'). A label's own entropy has no gradient.
    (policy, ref, rewards), beta, eta = PAIRS, 0.3, 1.7
    s = 1 / (1 + torch.exp(eta * (rewards[1] - rewards[0])))
    entropy = -s * s.log() - (1 - s) * (1 - s).log()

    def rpo(p):
        t = 1 / (1 + torch.exp(-beta * ((p[0] - ref[0]) - (p[1] - ref[1]))))
        return s * (s / t).log() + (1 - s) * ((1 - s) / (1 - t)).log()
    ours = lambda p, label=s, beta=beta, less=entropy: una.una_score_loss(
        margin(p, ref, beta), label, "bce") - less
    assert finds(ours, rpo, policy, dict(label=s.round()), dict(label=1 - s), dict(beta=1.0),
                 dict(less=0.0))


def test_map_odpo_is_the_pair_loss_with_a_margin_and_map_gpo_any_convex_function_of_its_margin():
    (policy, ref, rewards), beta = PAIRS, 0.3
    difference = lambda p: beta * ((p[0] - ref[0]) - (p[1] - ref[1]))
    m = 0.5 * (rewards[0] - rewards[1]).abs().log()
    odpo = lambda p: torch.log(1 + torch.exp(m - difference(p)))
    ours = lambda p, m=m, beta=beta: una.una_pair_loss(margin(p, ref, beta) - m, 0 * m)
    assert finds(ours, odpo, policy, dict(m=0 * m), dict(m=-m), dict(beta=1.0))
    # Tang et al. 2024: E h(beta (rho_w - rho_l)), h convex. DPO's log(1 + e^-t), IPO's (t - 1)^2.
    for h, loss in ((lambda t: torch.log(1 + torch.exp(-t)), lambda r: una.una_pair_loss(r, 0 * r)),
                    (lambda t: (t - 1) ** 2, lambda r: una.una_reward_loss(r, 1.0))):
        ours = lambda p, beta=beta, sign=1: loss(sign * margin(p, ref, beta))
        gpo = lambda p: h(difference(p))
        assert finds(ours, gpo, policy, dict(beta=1.0), dict(sign=-1))


def test_map_ranked_pro_is_the_pair_loss_of_each_response_and_all_worse_ones_without_pi_ref():
    # Song et al. 2023, best first, of the mean log pi of a token. Each stands against all that are
    # worse at once: their rewards' logsumexp.
    (policy, ref, _), length = LISTS, torch.arange(3, 8).double()

    def pro(p):
        e = torch.exp(p / length)
        return -sum(torch.log(e[:, k] / e[:, k:].sum(1)) for k in range(4))

    def ours(p, ref=0 * policy, beta=1 / length, best_first=True):
        r = una.implicit_reward(p, ref, beta)
        r = r if best_first else r.flip(1)
        return sum(una.una_pair_loss(r[:, k], r[:, k + 1:].logsumexp(1)) for k in range(4))
    assert finds(ours, pro, policy, dict(ref=ref), dict(beta=1.0), dict(best_first=False))


def test_map_pro_is_the_pair_loss_over_a_population():
    # Guo et al. 2025: y and y' are drawn alike, y wins with probability P. With d = r(y) - r(y'),
    # the cross-entropy of P and sigma(d) is -(P - 1/2) d + KL(B(1/2) || B(sigma(d))) + log 2, and
    # -E (P - 1/2) d = -2 E s(y) r(y), s(y) = E P(y beats y') - 1/2. E s = 0: f(x) + c cancels.
    (policy, ref, sampler), odds, beta = normals(80)(3, 6), normals(82)(6, 6), 0.3
    mu, P = sampler.softmax(-1), torch.sigmoid(odds - odds.T)    # any sampler, no Bradley-Terry
    both = mu[:, None] * mu

    def ours(p):
        reward = una.implicit_reward(p, ref, beta, offset=0.8)
        first, second = reward[:, None].expand(6, 6), reward.expand(6, 6)
        return (both * (P * una.una_pair_loss(first, second)
                        + (1 - P) * una.una_pair_loss(second, first))).sum()[None]

    def paper(p, times=2, half=0.5, mu=mu):
        reward, s = beta * (p - ref), (P * mu).sum(1) - half
        won = 1 / (1 + torch.exp(reward - reward[:, None]))      # sigma(r(y) - r(y'))
        KL = 0.5 * torch.log(0.5 / won) + 0.5 * torch.log(0.5 / (1 - won))
        return (-times * (mu * s * reward).sum() + (both * KL).sum() + math.log(2))[None]
    assert finds(paper, ours, policy, dict(times=1), dict(half=0.0), dict(mu=mu.flip(0)))


def kto_paper(p, ref, z0, beta=0.3, label=LABEL):
    """Ethayarajh et al. 2024, lambda = 1: 1 - v, v = sigma of the gain over z_0 or of the loss."""
    gain = beta * (p - ref - z0)
    return 1 - torch.where(label == 1, 1 / (1 + (-gain).exp()), 1 / (1 + gain.exp()))


def test_map_kto_and_map_bco_are_the_binary_loss_with_an_offset_of_minus_beta_z0_or_minus_delta():
    (policy, ref, _), beta = PAIRS, 0.3
    ours = lambda p, g, offset, beta=beta, label=LABEL: una.una_binary_loss(
        una.implicit_reward(p, ref, beta, offset), label, g)
    for K in (1, 7):
        policy_kl, ref_kl = normals(6)(K) + 1, normals(7)(K) - 1
        z0 = sum((policy_kl - ref_kl).tolist()) / K
        paper = lambda p: kto_paper(p, ref, z0)
        kto = lambda p, label=LABEL, up=1.0, down=1.0: una.kto_loss(
            p, ref, label, policy_kl, ref_kl, beta, up, down)
        assert z0 > 0 and finds(
            partial(ours, g="mae", offset=-beta * z0), paper, policy,
            dict(g="mse"), dict(g="bce"), dict(offset=-z0),
            dict(offset=beta * z0), dict(offset=0.0), dict(beta=1.0), dict(label=1 - LABEL))
        # lambda_y - lambda_y sigma(...) = lambda_y (1 - sigma(...)): weights multiply.
        weighted = lambda p: torch.where(LABEL == 1, 2.0 * paper(p), 0.7 * paper(p))
        assert finds(kto, paper, policy, dict(label=1 - LABEL))
        assert finds(partial(kto, up=2.0, down=0.7), weighted, policy, dict(up=0.7, down=2.0))
    # Jung et al. 2024: delta is a reward, no beta: half the sum of both classes' means of beta rho,
    # one for all prompts, held.
    delta = sum((beta * (policy - ref)).mean(1)) / 2
    bco = lambda p: torch.log(1 + ((1 - 2 * LABEL) * (beta * (p - ref) - delta)).exp())
    assert finds(partial(ours, g="bce", offset=-delta), bco, policy,
                 dict(offset=delta), dict(offset=-beta * delta), dict(g="mse"))


def test_map_kto_and_printed_kto_reference_point_is_a_mean_clamped_held_constant_and_no_log_Z():
    policy, ref, _ = PAIRS
    for differences, z0, wrong in (((2.0, -1.0, 5.0), 2.0, 7 / 3),   # mean, not clamp before it
                                   ((-2.0, 1.0), 0.0, 0.5),
                                   ((-2.0, 1.0), 0.0, -0.5)):        # no clamp
        kl = torch.tensor(differences).double()
        loss = una.kto_loss(policy, ref, LABEL, kl, 0 * kl, 0.3)
        assert close(loss, kto_paper(policy, ref, z0))
        assert not close(loss, kto_paper(policy, ref, wrong))
    policy, ref = policy[0] + 1, ref[0] - 1
    z0 = lambda p: (p - ref).mean()
    label = torch.arange(20) % 2
    constant = lambda p: kto_paper(p, ref, z0(p).detach(), label=label)
    flowing = lambda p: kto_paper(p, ref, z0(p), label=label)
    kto = lambda p: una.kto_loss(p, ref, label, p, ref, 0.3)
    assert z0(policy) > 0 and same(kto, constant, policy) and not same(kto, flowing, policy)
    with pytest.raises(ValueError, match="at least one"):        # the mean of nothing is nan
        una.kto_loss(policy, ref, label, policy[:0], ref[:0], 0.3)
    # Appendix A: "KTO estimates Z(x)". Its z_0 is 0 where the policy is the reference, but Z knows
    # no policy; and at the optimum beta KL(pi* || pi_ref) = E_{pi*} r - beta log Z.
    ref, rewards, beta = normals(38)(6).log_softmax(-1), normals(39)(6), 0.4
    best, value = una.optimal_policy(ref, rewards, beta)
    KL = (best.exp() * (best - ref)).sum()
    assert close(beta * KL, (best.exp() * rewards).sum() - value)
    assert (beta * KL - value).abs() > 0.1


def test_map_qrpo_is_the_reward_loss_on_quantiles_whose_Z_is_known():
    # Matrenok et al. 2025, of the quantile of the reward among samples of pi_ref: uniform on [0, 1]
    # whatever the reward, so Z_q = int_0^1 e^{q/beta} dq = beta (e^{1/beta} - 1).
    (policy, ref, rewards), beta = PAIRS, 0.3
    given, log_Z = torch.sigmoid(rewards), math.log(beta * (math.exp(1 / beta) - 1))
    paper = lambda p: (given - beta * log_Z - beta * (p - ref)) ** 2
    ours = lambda p, b=beta * log_Z: una.una_reward_loss(
        una.implicit_reward(p, ref, beta, b), given)
    assert finds(ours, paper, policy, dict(b=log_Z), dict(b=0.0))
    # It is the beta log Z of Eq. 19, by the midpoint rule.
    quantiles = (torch.arange(10_000).double() + 0.5) / 10_000
    _, value = una.optimal_policy(torch.full_like(quantiles, -math.log(10_000)), quantiles, beta)
    assert close(value, beta * log_Z, tol=1e-8) and not close(value, log_Z, tol=1e-8)


def test_map_a_star_po_rpo_and_map_kimi_are_the_reward_loss_with_the_estimated_offset():
    # Brantley et al. 2025: V of earlier responses, a baseline for fresh ones. Faye et al. 2025: of
    # the very responses that are learned from. Kimi team 2025: so too, the last policy for pi_ref.
    (policy, ref, rewards), earlier, last, tau = LISTS, normals(71)(8, 7), normals(72)(8, 5), 0.3
    V_of = lambda given, beta: beta * torch.log(torch.exp(given / beta).mean(1, keepdim=True))
    a_star_po = lambda p: (tau * (p - ref) - (rewards - V_of(earlier, 0.5))) ** 2
    rpo = lambda p: (rewards - V_of(rewards, tau) - tau * (p - ref)) ** 2
    kimi = lambda p: (rewards - V_of(rewards, tau) - tau * (p - last)) ** 2
    for paper, given, beta, anchor, other in ((a_star_po, earlier, 0.5, ref, last),
            (rpo, rewards, tau, ref, last), (kimi, rewards, tau, last, ref)):
        V = una.estimated_offset(given, beta)[:, None]
        ours = lambda p, V=V, ref=anchor: una.una_reward_loss(
            una.implicit_reward(p, ref, tau, V), rewards)
        wrong = (0.0, V / beta, V.flip(0), V + beta * math.log(given.shape[1]), own_mean(given))
        assert finds(ours, paper, policy, dict(ref=other), *[dict(V=V) for V in wrong])
    # So Kimi forgets pi_ref: a round starts with the gradient of the reward alone, without a KL.
    assert close(gradient(kimi, last), -2 * tau * (rewards - V))


def test_map_dro_map_path_and_map_trajectory_balance_are_the_reward_loss_with_a_learned_offset():
    # Richemond et al. 2024, V learned beside the policy.
    (policy, ref, rewards), V, tau = LISTS, normals(74)(8, 1), 0.3
    dro = lambda p, V=V: 0.5 * (rewards - V - tau * (p - ref)) ** 2
    ours = lambda p, V=V: una.una_reward_loss(una.implicit_reward(p, ref, tau, V), rewards) / 2
    assert finds(ours, dro, policy, dict(V=tau * V), dict(V=-V))  # V is a reward; its sign
    assert same(lambda V: ours(policy, V), lambda V: dro(policy, V), V)
    # Nachum et al. 2018, token by token, tau for their lambda, undiscounted, no entropy bonus: the
    # square of -V(x) + sum_t (r_t - tau log pi/pi_ref(y_t)), r_t = r at the last token alone.
    tokens, ref_tokens = normals(75)(2, 8, 5, 4)
    path = lambda t: (-V + sum(rewards * (i == 3) - tau * (t - ref_tokens)[..., i]
                               for i in range(4))) ** 2
    ours = lambda t, V=V, tau=tau: una.una_reward_loss(
        una.implicit_reward(t.sum(-1), ref_tokens.sum(-1), tau, V), rewards)
    assert finds(ours, path, tokens, dict(V=-V), dict(tau=tau / 4))      # sign; mean for the sum
    # Malkin et al. 2022, with one way to each response and pi_ref e^{r/beta} for what it is to be
    # sampled in proportion to (Bartoldson et al. 2025).
    theta, ref, log_Z, beta = policy, ref.log_softmax(-1), normals(91)(8, 1), 0.3
    balance = lambda t, z=log_Z: (z + t.log_softmax(-1) - ref - rewards / beta) ** 2
    ours = lambda t, z=log_Z, beta_z=beta: una.una_reward_loss(
        una.implicit_reward(t.log_softmax(-1), ref, beta, beta_z * z), rewards) / beta**2
    assert finds(ours, balance, theta, dict(beta_z=1.0))          # log Z without beta
    assert same(lambda z: ours(theta, z), lambda z: balance(theta, z), log_Z)
    # So what holds of Eq. 7 holds of it: whoever drew the samples, it is 0 at pi*.
    best, value = una.optimal_policy(ref, rewards, beta)
    assert close(balance(best, value[:, None] / beta), 0.0)


# Chen et al. 2024: -sum_i [w_i log sigma(t_i) + 1/K log sigma(-t_i)], w = softmax(r/alpha), with
# t = beta log pi/pi_ref and rewards (X, K), of K responses to each of X prompts.
def nca_paper(t, rewards, alpha):
    w = (rewards / alpha).exp() / (rewards / alpha).exp().sum(1, keepdim=True)
    return (w * torch.log(1 + (-t).exp()) + torch.log(1 + t.exp()) / t.shape[1]).sum(1)


def test_map_nca_is_the_weighted_score_loss_with_cross_entropy_and_the_offset_in_its_label():
    # K w_i = e^{r_i/alpha} / Z^, Z^ the mean over the K. So term i is cross-entropy of weight
    # w_i + 1/K, label w_i/(w_i + 1/K) = 1/(1 + 1/(K w_i)) = sigma(r_i/alpha - log Z^).
    (policy, ref, rewards), alpha, beta = LISTS, 0.4, 0.3
    V, w = una.estimated_offset(rewards, alpha)[:, None], (rewards / alpha).softmax(1)
    label, without_Z = torch.sigmoid((rewards - V) / alpha), torch.sigmoid(rewards / alpha)
    paper = lambda p: nca_paper(beta * (p - ref), rewards, alpha)
    ours = lambda p, label=label, weight=w + 1 / 5, g="bce", beta=beta: (
        weight * una.una_score_loss(una.implicit_reward(p, ref, beta), label, g)).sum(1)
    # The weight is no label. 2 / 5: weights all alike, with their sum.
    assert finds(ours, paper, policy, dict(label=w), dict(label=without_Z), dict(weight=2 / 5),
                 dict(g="mse"), dict(beta=1.0))
    # It is smallest where una-score with the estimated offset is at a beta of alpha beta. That is
    # all they share: the ratio of their slopes elsewhere is another one for each response.
    best = ref + (rewards - V) / (alpha * beta)
    score = lambda p: una.una_score_loss(
        una.implicit_reward(p, ref, alpha * beta, V), torch.sigmoid(rewards), "bce")
    assert close(gradient(paper, best), 0.0) and close(gradient(score, best), 0.0)
    assert not close(gradient(paper, best + V), 0.0)
    ratio = gradient(paper, policy) / gradient(score, policy)
    assert (ratio > 0).all() and ratio.max() > 2 * ratio.min()


def test_map_info_nca_cancels_the_offset_and_of_two_responses_is_dpo_with_a_soft_label():
    # Chen et al. 2024. softmax(t + b) = softmax(t), so that no Z^ is needed, as it is for NCA.
    (policy, ref, rewards), b, beta, alpha = LISTS, normals(77)(8, 1), 0.3, 0.4
    info_nca = lambda t, rewards, alpha: -((rewards / alpha).softmax(1) * torch.log(
        t.exp() / t.exp().sum(1, keepdim=True))).sum(1)
    for loss, cancels in ((info_nca, True), (nca_paper, False)):
        paper = lambda t: loss(t, rewards, alpha)
        shifted = lambda p: paper(una.implicit_reward(p, ref, 1.0, offset=b))
        assert same(shifted, lambda p: paper(p - ref), policy) == cancels
        assert close(gradient(paper, rewards / alpha + b), 0.0) == cancels
    # Of two, softmax(t)_1 = sigma(t_1 - t_2), and w_1 = sigma((r_1 - r_2)/alpha). alpha -> 0 makes
    # the label 1 if the first is better, else 0: DPO.
    policy, ref, rewards = PAIRS
    pairs = lambda p, alpha=alpha: info_nca(beta * (p - ref).T, rewards.T, alpha)
    soft = torch.sigmoid((rewards[0] - rewards[1]) / alpha)
    ours = lambda p, label=soft: una.una_score_loss(margin(p, ref, beta), label, "bce")
    assert finds(ours, pairs, policy, dict(label=soft.round()), dict(label=1 - soft),
                 dict(label=torch.sigmoid(rewards[0] / alpha)))
    won = rewards.argsort(0, descending=True)                    # the better one of each pair first
    dpo = lambda p: una.dpo_loss(*p.gather(0, won), *ref.gather(0, won), beta)
    assert same(dpo, lambda p: pairs(p, 1e-4), policy) and not same(dpo, pairs, policy)


def policy_gradient(theta, ref, rewards, beta, y, baseline):
    """REINFORCE for J on samples y, one a prompt: (r - beta rho - baseline) grad log pi."""
    residual = (rewards - beta * (theta.log_softmax(-1) - ref)).gather(1, y[:, None])[:, 0]
    return (residual - baseline)[:, None] * (F.one_hot(y, theta.shape[-1]) - theta.softmax(-1))


def test_map_rlhf_policy_gradient_is_the_reward_loss_sample_by_sample():
    # Eq. 7 without its mean, which test_una.py has: the offset is REINFORCE's baseline.
    (theta, ref, rewards), offset, beta = LISTS, normals(27)(8), 0.3
    ref, y, rows = ref.log_softmax(-1), normals(26)(8, 5).argmax(-1), torch.arange(8)
    reinforce = lambda baseline: policy_gradient(theta, ref, rewards, beta, y, baseline)
    ours = lambda t: una.una_reward_loss(una.implicit_reward(
        t.log_softmax(-1)[rows, y], ref[rows, y], beta, offset), rewards[rows, y])
    assert close(gradient(ours, theta), -2 * beta * reinforce(offset))
    assert not close(gradient(ours, theta), -2 * reinforce(offset))       # missing beta
    assert not close(gradient(ours, theta), -2 * beta * reinforce(0))     # in mean only


def test_map_rloo_map_vargrad_and_map_gvpo_are_the_reward_loss_with_others_or_own_mean_residual():
    # Kool et al. 2019, Ahmadian et al. 2024. The others know nothing of y_i: a baseline. The mean
    # of all has y_i in it: R_i - mean = (n - 1)/n (R_i - mean of the others). All 5^n draws.
    (theta, ref, rewards), beta = LISTS[:, 0], 0.3
    ref = ref.log_softmax(-1)
    grad_J = gradient(lambda t: una.rlhf_objective(t.log_softmax(-1), ref, rewards, beta), theta)
    for n in (2, 3):
        draws = torch.cartesian_prod(*[torch.arange(5)] * n)
        every = [table.expand(len(draws), 5) for table in (theta, ref, rewards)]
        R = (rewards - beta * (theta.log_softmax(-1) - ref))[draws]
        ours = lambda t, offset: una.una_reward_loss(una.implicit_reward(
            t.log_softmax(-1).gather(1, draws), ref[draws], beta, offset), rewards[draws]).mean(1)
        paper = sum(policy_gradient(*every, beta, draws[:, i], others_mean(R)[:, i])
                    for i in range(n)) / n
        others, own = (gradient(lambda t: ours(t, offset), every[0]) / (-2 * beta)
                       for offset in (others_mean(R), own_mean(R)))
        assert close(others, paper) and not close(own, paper)
        mean = lambda slopes: (theta.softmax(-1)[draws].prod(1, keepdim=True) * slopes).sum(0)
        assert close(mean(others), grad_J) and not close(mean(own), grad_J)
        assert close(mean(own), (n - 1) / n * grad_J)
    # Richter et al. 2020: half the variance of rho - r/beta over n samples. Residuals less their
    # mean b add up to 0, so that nothing flows through b. So it is RLOO: test_kl.py.
    (policy, ref, rewards), n = LISTS, 5
    vargrad = lambda p: 0.5 * (p - ref - rewards / beta).var(1)
    residual = lambda p: rewards - una.implicit_reward(p, ref, beta)
    for hold in (torch.Tensor.detach, lambda b: b):
        ours = lambda p, mean=own_mean: una.una_reward_loss(una.implicit_reward(
            p, ref, beta, hold(mean(residual(p)))), rewards).sum(1) / (2 * beta**2 * (n - 1))
        assert finds(ours, vargrad, policy, dict(mean=others_mean), dict(mean=torch.mean))  # of all
    # Zhang et al. 2025, GVPO, for any samples: log pi(y_i) has a weight that is held.
    weight = rewards - own_mean(rewards) - beta * (policy - ref - own_mean(policy - ref))
    half = lambda p, mean=own_mean: una.una_reward_loss(una.implicit_reward(
        p, ref, beta, mean(residual(p))), rewards) / 2
    assert close(gradient(half, policy), -beta * weight)
    assert not close(gradient(lambda p: half(p, lambda b: 0.0), policy), -beta * weight)
    # So both are 0 where pi is proportional to pi_ref e^{r/beta} on the samples, whoever drew them.
    tilted = ref + rewards / beta - 2.0
    assert close(half(tilted), 0.0) and close(vargrad(tilted), 0.0)
    assert not close(half(tilted + normals(92)(8, 5)), 0.0)


def test_map_grpo_is_eq07_of_rewards_over_their_spread_but_for_its_KL_which_is_k2_in_eq07():
    # Shao et al. 2024, the first inner step, whole responses: -A_i log pi + beta k3, with A = (r -
    # mean r)/std r. Sample by sample Eq. 7 is the same with k2.
    (policy, ref, rewards), beta = LISTS, 0.3
    for r in (rewards / rewards.std(1, keepdim=True), rewards):
        ours = lambda p: una.una_reward_loss(
            una.implicit_reward(p, ref, beta, own_mean(r)), r) / (2 * beta)
        for k in (1, 2, 3):
            grpo = lambda p: beta * una.kl_estimate(p, ref, k) - (r - own_mean(r)) * p
            assert close(gradient(ours, policy), gradient(grpo, policy)) == (k == 2)


def test_map_mass_only_a_loss_that_sees_each_response_feels_that_all_of_them_lose_the_same_share():
    # All judged responses are left alike: log pi falls by the same at each, to others that nobody
    # judged. A loss of differences does not see that. Nor does one whose f(x) + c is fitted.
    (policy, ref, rewards), beta = LISTS, 0.3
    V, label = una.estimated_offset(rewards, beta)[:, None], (rewards > 0).double()
    r = lambda p, offset=0.0: una.implicit_reward(p, ref, beta, offset)
    residual = lambda p: own_mean(rewards - r(p))
    delta = lambda p: -r(p).mean()                               # BCO's follows r, as this one does
    for sees, loss in (
            (False, lambda p: una.una_pair_loss(r(p)[:, 0], r(p)[:, 1])),
            (False, lambda p: una.una_reward_loss(r(p)[:, 0] - r(p)[:, 1], rewards[:, 0])),
            (False, lambda p: una.una_reward_loss(r(p, residual(p)), rewards)),
            (False, lambda p: una.una_binary_loss(r(p, delta(p)), label, "bce")),
            (True, lambda p: una.una_reward_loss(r(p, V), rewards)),
            (True, lambda p: una.una_score_loss(r(p), torch.sigmoid(rewards))),
            (True, lambda p: una.una_binary_loss(r(p), label, "mae"))):
        assert close(loss(policy - 1), loss(policy)) != sees


def test_map_anchor_is_on_average_the_KL_of_pi_ref_and_pi_and_feels_what_pairs_do_not():
    (theta, ref, _), log = LISTS, lambda t: t.log_softmax(-1)
    p, p_ref = log(theta), log(ref)
    mean = lambda t: (p_ref.exp() * una.anchor_loss(log(t), p_ref)).sum(1)
    KL = torch.distributions.kl_divergence(
        *[torch.distributions.Categorical(logits=logprobs) for logprobs in (p_ref, p)])
    assert close(mean(theta), KL) and not close((p.exp() * una.anchor_loss(p_ref, p)).sum(1), KL)
    assert close(gradient(mean, theta), p.exp() - p_ref.exp())
    assert close(una.anchor_loss(p - 1, p_ref), una.anchor_loss(p, p_ref) + 1)


def test_relation_a_pair_with_its_best_offset_is_twice_dpo_at_half_beta_or_half_of_rebel():
    # -log sigma(w + b) - log sigma(-(l + b)) is smallest where w + b = -(l + b). Both losses are
    # convex in b, with slope 0 there: the gradient is that with the best b held fixed.
    (policy, ref, rewards), beta = PAIRS, 0.3
    dpo = lambda p, beta=beta / 2, times=2: times * una.dpo_loss(*p, *ref, beta)
    rebel = lambda p, half=0.5: half * (
        beta * ((p - ref)[0] - (p - ref)[1]) - (rewards[0] - rewards[1])) ** 2
    of_labels = lambda reward: una.una_binary_loss(reward, LABEL, "bce").sum(0)
    of_rewards = lambda reward: una.una_reward_loss(reward, rewards).sum(0)
    for loss, target, known, mistakes in (
            (of_labels, 0.0, dpo, (dict(beta=beta), dict(times=1))),
            (of_rewards, rewards, rebel, (dict(half=1.0),))):
        pair = lambda p, offset: loss(una.implicit_reward(p, ref, beta, offset))
        best = (target - beta * (policy - ref)).mean(0)
        assert close(gradient(lambda b: pair(policy, b), best), 0.0)
        assert finds(known, lambda p: pair(p, best), policy, *mistakes)
        assert not same(lambda p: pair(p, 0.0), known, policy)


def test_relation_cross_entropy_exceeds_dpo_and_has_the_minimiser_of_mse_as_mae_has_not():
    # sigma(w) sigma(-l) < sigma(w - l): (1 + e^-w)(1 + e^l) is 1 + e^(l-w) and e^-w + e^l more.
    (w, l), one = 3 * normals(36)(2, 1000), torch.ones(1000)
    bce = una.una_binary_loss(w, one, "bce") + una.una_binary_loss(l, 0 * one, "bce")
    assert (bce > una.una_pair_loss(w, l)).all()
    assert close((bce.exp() - una.una_pair_loss(w, l).exp()), (-w).exp() + l.exp())
    # For a soft target s too, both are smallest at r = log s/(1 - s), where BCE is s's entropy.
    given = torch.sigmoid(PAIRS[2])
    at = torch.log(given / (1 - given))
    for g in ("mse", "bce"):
        loss = lambda r: una.una_score_loss(r, given, g)
        assert close(gradient(loss, at), 0.0)
        assert (loss(at + 0.1) > loss(at)).all() and (loss(at - 0.1) > loss(at)).all()
    assert close(loss(at), -given * given.log() - (1 - given) * (1 - given).log())
    # Of several scores of one response both take the mean, the absolute error the median. A label
    # is 1 in seven of ten: KTO's loss falls all the way to s = 1. It is not proper, and reports not
    # the probability but the majority.
    s = torch.arange(1, 100).double() / 100
    for scores, least in (((0.1, 0.2, 0.9), [0.40, 0.40, 0.20]),
                          ((1,) * 7 + (0,) * 3, [0.70, 0.70, 0.99])):
        loss = lambda g: sum(una.una_score_loss(s.logit(), 0 * s + score, g) for score in scores)
        assert [s[loss(g).argmin()].item() for g in ("mse", "bce", "mae")] == least


GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("golden", GOLDENS["records"], ids=lambda g: f"{g['method']} {g['beta']}")
def test_losses_are_those_of_an_independent_implementation(golden):
    policy, ref, policy_kl, ref_kl = map(torch.DoubleTensor, GOLDENS["inputs"].values())
    method, beta, (up, down) = golden["method"], golden["beta"], golden.get("weights", [1.0, 1.0])
    if method == "kto_clamped":     # a KL is never negative: where its estimate is, z_0 is 0
        policy_kl, ref_kl = ref_kl, policy_kl
    label, z0 = LABEL[:, :6], (policy_kl - ref_kl).mean()
    w, l = reward = una.implicit_reward(policy, ref, beta)
    pair, ipo = una.una_pair_loss, lambda margin: una.una_reward_loss(margin, 0.5) / beta**2
    sppo = lambda target: una.una_reward_loss(reward, target).sum(0) / beta**2
    bco = lambda delta: una.una_binary_loss(reward - delta, label, "bce")
    plain = lambda z0: una.una_binary_loss(reward - beta * z0, label, "mae")
    kto = lambda z0: torch.where(label == 1, up * plain(z0), down * plain(z0))
    papers_kto = una.kto_loss(policy, ref, label, policy_kl, ref_kl, beta, up, down)
    right, wrong = {
        "dpo": ([pair(w, l), una.dpo_loss(*policy, *ref, beta)], pair(l, w)),
        "ipo": ([ipo(w - l)], ipo(l - w)),
        "sppo_hard": ([sppo(label - 0.5)], sppo(0.5 - label)),
        "bco": ([bco(golden.get("delta", 0.0))], bco(0.0)),
        "kto": ([papers_kto, kto(z0)], kto(0.0)),
        "kto_clamped": ([papers_kto, kto(0.0)], kto(z0))}[method]
    assert all(close(loss, golden["losses"]) for loss in right)
    assert not close(wrong, golden["losses"])


ALIKE = {f"una_score_loss {g}": partial(una.una_score_loss, g=g) for g in ("mse", "bce", "mae")} | {
    "una_binary_loss bce": partial(una.una_binary_loss, g="bce"),
    "una_binary_loss": una.una_binary_loss, "una_reward_loss": una.una_reward_loss,
    "una_pair_loss": una.una_pair_loss, "reward_model_loss": una.reward_model_loss,
    "dpo_loss": partial(una.dpo_loss, beta=0.3),
    "kto_loss": lambda a, b, c: una.kto_loss(a, b, c, torch.ones(3), torch.zeros(3), 0.3, 1.2, 0.8),
    "kto_loss kl": lambda a, b: una.kto_loss(*torch.ones(3, 5), a, b, 0.3),
    "implicit_reward": partial(una.implicit_reward, beta=0.3), "anchor_loss": una.anchor_loss,
    "kl_estimate": partial(una.kl_estimate, k=2)}
LOSSES = [*ALIKE][:-4]
ARGUMENTS = {name: [argument for argument, is_ in inspect.signature(function).parameters.items()
                    if is_.default is is_.empty] for name, function in ALIKE.items()}


def of_first(name, rows=slice(None), dtype=torch.float64):
    """A loss as a function of its first tensor. Each other is rows of 1, 0, 1, 0, 1, 0, 1, 0."""
    other = torch.tensor([1, 0] * 4, dtype=dtype)[rows]
    return lambda first: ALIKE[name](first, *[other] * (len(ARGUMENTS[name]) - 1))


def test_loss_of_a_batch_is_that_of_its_rows_and_finite_with_its_gradient_at_extreme_rewards():
    reward = 2 * normals(53)(8)
    for name in LOSSES:
        rows = [of_first(name, slice(i, i + 1))(reward[i:i + 1]) for i in range(8)]
        assert close(of_first(name)(reward), torch.cat(rows)), name
        # log(sigmoid(-1000)) would be -inf, its gradient nan. All combinations of sign and label.
        for dtype in (torch.float32, torch.float64):
            extreme = torch.tensor([1000, 1000, -1000, -1000, 0, 0, 1, 1], dtype=dtype)
            loss = of_first(name, dtype=dtype)
            assert loss(extreme).isfinite().all() and (loss(extreme) >= 0).all(), name
            assert gradient(loss, extreme).isfinite().all(), name
    wrong, zero, one = torch.tensor([[-1000.0], [0], [1]]).double()
    for loss in (una.una_pair_loss, una.reward_model_loss,
                 lambda w, l: una.dpo_loss(w, l, l, l, 1.0),
                 lambda w, _: una.una_binary_loss(w, one, "bce")):
        assert close(loss(wrong, zero), 1000.0)                  # -log sigma(-1000), up to e^-1000
    log_sigmoid = lambda r: -torch.log(torch.sigmoid(r))         # what one would write first
    assert log_sigmoid(wrong).isinf() and gradient(log_sigmoid, wrong).isnan()


def test_labels_may_be_bool_int_or_float_and_nothing_but_zero_and_one():
    r, label = PAIRS[0, 0, :3], torch.tensor([1, 0, 0])
    for loss in (*[partial(una.una_binary_loss, r, g=g) for g in ("mse", "bce", "mae")],
                 lambda label: una.kto_loss(r, 0 * r, label, r, 0 * r, 0.3)):
        for dtype in (torch.bool, torch.float32):
            assert loss(label.to(dtype)).equal(loss(label))
        for bad in (-1, 0.3, math.nan):
            with pytest.raises(ValueError, match=f"0 or 1, got {bad}"):
                loss(torch.tensor([1, bad, 7]))


def test_shapes_that_differ_are_refused_and_named_and_an_offset_may_broadcast_but_not_widen():
    # (B, 1) against (B,) becomes (B, B), all against all. (1,) and () would stand for all rows.
    for name, function in ALIKE.items():
        arguments = ARGUMENTS[name]
        for i, shape in product(range(len(arguments)), ((4, 1), (1,), ())):
            shapes = [(4,)] * len(arguments)
            shapes[i] = shape
            with pytest.raises(ValueError) as error:
                function(*map(torch.ones, shapes))
            told = str(shapes) if name.startswith(("dpo", "kto")) else ", ".join(
                f"{argument} {of}" for argument, of in zip(arguments, shapes))
            assert str(error.value) == f"shapes differ: {told}"
        for shape in ((), (1,), (4,), (4, 1), (2, 3)):           # alike, and kept
            kept = function(*[torch.ones(shape)] * len(arguments)).shape
            assert kept == (shape if name != "kto_loss kl" else (5,)), name
    for shape in ((), (6,), (4, 1), (4, 6)):
        reward = una.implicit_reward(torch.ones(4, 6), torch.zeros(4, 6), 0.3, torch.zeros(shape))
        assert close(reward, 0.3, 1e-6)
    with pytest.raises(ValueError, match=r"logprob \(4,\), offset \(4, 1\)"):
        una.implicit_reward(torch.ones(4), torch.zeros(4), 0.3, torch.zeros(4, 1))
