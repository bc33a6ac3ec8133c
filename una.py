"""UNA in code: every equation of arXiv 2408.15339 (v2), each above the line that it becomes.

They stand in order of need, not in the paper's: what a derivation uses comes before it.

    x, y          a prompt and a response
    pi, pi_ref    the policy that is trained, the frozen reference
    logprob       log pi(y|x), summed over the response's tokens, in nats
    rho           logprob - ref_logprob = log pi(y|x) / pi_ref(y|x)
    reward        any real number; explicit r_phi is given (by a judge or a reward model),
                  implicit r_theta is what pi implies
    score         a reward squashed into [0, 1]; explicit s_phi, implicit s_theta
    sigma(t)      1 / (1 + e^-t), which squashes it
    beta          the price of a nat of KL, in units of reward
    f(x) + c      the offset: the part of a reward that depends on the prompt alone
    Z(x)          E_{y~pi_ref} e^{r/beta}, the normaliser of the best policy pi*
    B, T, V, Y    examples in a batch, tokens, words of the vocabulary, all responses

Functions are pure, take and return tensors, and know no model. Losses are not reduced: one value
per example, shape (B,), so that any mixture of feedback can be averaged. Arguments named ref_* are
constants: compute them without gradients. A dagger, Eq. 2†, marks where the paper prints something
else than what stands here; paper/README.md says what, and why.

    python una.py          the paper in three responses, with numbers to check by hand
"""
import torch
import torch.nn.functional as F


# (B, 1) minus (B,) silently becomes (B, B): the wrong loss, with no error. So tensors that belong
# together must have one shape; a plain number fits any.
def _alike(**tensors):
    """ValueError, with names and shapes, unless all the tensors have the same shape."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if torch.is_tensor(t)}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{n} {s}" for n, s in shapes.items()))


# log pi(y|x). An autoregressive model gives p(token | everything before it), so by the chain rule
#     log pi(y|x) = sum_t log p(y_t | x, y_<t).
# A SUM: with the mean in its place, the probabilities of all responses would not add up to 1.
# The logits at position t come from tokens 0..t, so they predict token t + 1: drop the last logits
# and the first token. Said plainly, that is
#     logprobs = logits[:, :-1].log_softmax(-1)                           # (B, T-1, V)
#     logprobs = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)     # (B, T-1)
#     (logprobs * response_mask[:, 1:]).sum(-1)                           # (B,)
# The code below computes the same. With logits z, it uses
#     log softmax(z)[k] = z[k] - log sum_j exp z[j],
# a gather and a logsumexp, with no second tensor of all log-probabilities. And it selects before it
# computes: prompt and padding get the gradient 0 exactly, even where their logits are NaN (masking
# the result would make it 0 * NaN), and are never copied to float32.
def token_logprobs(logits, tokens, response_mask):
    """log p(y_t | x, y_<t) of every response token; arguments as in sequence_logprob.

    Returns (B, T-1): column t is of token t + 1, and 0 where that is no response token. Nats,
    float32 or wider. ValueError if response_mask is not bool; position 0 is not looked at.
    """
    if response_mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be bool, got {response_mask.dtype}")
    mask = response_mask[:, 1:]                                             # (B, T-1), N are True
    logits, targets = logits[:, :-1][mask], tokens[:, 1:][mask]             # (N, V), (N,)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # bf16 would lose rho
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)


def sequence_logprob(logits, tokens, response_mask):
    """log pi(y|x) of the responses in a batch (the pi of every equation).

    logits (B, T, V), tokens (B, T) int, response_mask (B, T) bool: True on the response's tokens,
    its end-of-text included, False on prompt and padding, on either side. Returns (B,), nats,
    float32 or wider. ValueError if response_mask is not bool, if a response is empty, or if one
    begins at position 0, where no logits predict it.
    """
    if response_mask[:, 0].any():
        raise ValueError("response_mask is True at position 0, which no logits predict")
    if not response_mask.any(dim=1).all():
        raise ValueError("empty response: a row of response_mask has no True")
    return token_logprobs(logits, tokens, response_mask).sum(-1)


# ---------------------------------------------------------------- RLHF (section 2.1)
# Eq. 1, Bradley-Terry: P(y_w beats y_l) = e^{r_w} / (e^{r_w} + e^{r_l}) = sigma(r_w - r_l).
# Eq. 2†: the likelihood of the judge's choices, as a function of the reward model phi.
def reward_model_loss(chosen_reward, rejected_reward):
    """Eq. 2: -log sigma(r_phi(x, y_w) - r_phi(x, y_l)).

    Rewards (B,), which are log-odds. Returns (B,), nats. ValueError if their shapes differ.
    """
    _alike(chosen_reward=chosen_reward, rejected_reward=rejected_reward)
    return -F.logsigmoid(chosen_reward - rejected_reward)


# Eq. 3†: pi* = argmax_pi E_x J(x) with
#         J(x) = E_{y~pi} r(x, y) - beta KL(pi || pi_ref) = sum_y pi (r - beta log pi/pi_ref).
#     Where all responses can be listed, J is exact. Those that pi never gives are taken out twice:
#     from the sum, and from the log-probabilities, or else 0 * inf would make the gradient NaN.
def rlhf_objective(logprobs, ref_logprobs, rewards, beta):
    """Eq. 3: J(x), exact. All (..., Y) over every response; logprobs in nats.

    Returns (...), in units of reward. beta = 0 gives the mean reward. A response of probability 0
    (log-probability -inf) adds 0, as p log p does in the limit, and its gradient is 0.
    """
    possible = logprobs.exp() > 0
    logprobs = logprobs.where(possible, 0.0)
    terms = logprobs.exp() * (rewards - beta * (logprobs - ref_logprobs))
    return terms.where(possible, 0.0).sum(-1)


# ---------------------------------------------------------------- the optimum (sections 3, A, B)
# Eq. 14, the log-sum inequality: for a_i >= 0, b_i > 0 with sums a, b,
#         sum_i a_i log(a_i/b_i)  >=  a log(a/b),     equal if and only if all a_i/b_i are the same.
#     Proof. h(t) = t log t, with h(0) = 0, is strictly convex: h'' = 1/t > 0. Jensen (Eq. 21) with
#     weights b_i/b at the points a_i/b_i (Eq. 22), an equality only if these are all the same:
#         sum_i a_i log(a_i/b_i) = b sum_i (b_i/b) h(a_i/b_i)
#                               >= b h(sum_i a_i/b) = a log(a/b).
# Eq. 15†: write J(x) as one such sum. For any f(x), subtract it from r inside the log and add it
#     back outside:
#         J(x) = -beta sum_y pi log( pi / (pi_ref e^{(r-f)/beta}) ) + f(x).
# Eq. 16: the inequality with a_y = pi (so a = 1) and b_y = pi_ref e^{(r-f)/beta} (so b = Z_f) says
#     that the sum is at least log(1/Z_f). Times -beta, that bounds J for every policy:
#         J(x)  <=  beta log Z_f(x) + f(x),
#         Z_f(x) = E_{y~pi_ref} e^{(r-f)/beta} = Z(x) e^{-f(x)/beta},
#     that is J(x) <= beta log Z(x): f cancels, the bound is the same whichever f one takes.
# Eq. 17†: it is reached if and only if pi / (pi_ref e^{(r-f)/beta}) = 1/lambda for all y. As pi
#     sums to 1, lambda = Z_f(x), another number for each prompt. With f = 0 this is Eq. 4† and 20†:
#         pi* = pi_ref e^{r/beta} / Z(x).
# Eq. 19†: the value there is beta log lambda(x) + f(x) = beta log Z(x).
# What a policy misses is a KL. With f = 0 the b_y above are Z pi*, so Eq. 15 says for every pi
#         J(x) = -beta sum_y pi log( pi / (Z(x) pi*) ) = beta log Z(x) - beta KL(pi || pi*):
#     it is as good as it is near to pi*. The share of the possible gain that it loses, from what
#     pi_ref has to the maximum, is KL(pi || pi*) / KL(pi_ref || pi*).
# Larger beta, smaller KL. Let 1 and 2 be the optima of b_1 < b_2, with rewards R and KLs K. Neither
#     is beaten by the other at its own beta:
#         R_1 - b_1 K_1 >= R_2 - b_1 K_2,     R_2 - b_2 K_2 >= R_1 - b_2 K_1.
#     Add them: (b_2 - b_1) (K_1 - K_2) >= 0. beta -> infinity gives pi_ref, beta -> 0 the best
#     response.
def optimal_policy(ref_logprobs, rewards, beta):
    """Eq. 4, 17, 20: the policy that maximises Eq. 3; and Eq. 16, 19: the maximum.

    ref_logprobs, rewards (..., Y) over every response. Returns log pi* (..., Y) in nats and
    beta log Z(x) (...) in units of reward. ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    tilted = ref_logprobs + rewards / beta
    log_z = tilted.logsumexp(-1)
    return tilted - log_z[..., None], beta * log_z


# ---------------------------------------------------------------- the implicit reward (2.3 and 3)
# Eq. 18†: solve Eq. 17 for the reward. Given pi, it is optimal for the rewards
#         r(x, y) = beta log pi/pi_ref + f(x) + c,     c = beta log lambda(x) = beta log Z_f(x),
#     with any f(x) + c, and for no others. Given r as well, the sum is determined: c depends on x,
#     as lambda does, and since Z_f = Z e^{-f/beta} (Eq. 16),
#         f(x) + c = f(x) + beta log Z(x) - f(x) = beta log Z(x).
# Eq. 6† reads this backwards: a policy in training IS a reward model, and aligning it is regressing
#     its reward on a given one. f = c = 0 is not a simplification but a condition: the two rewards
#     can be the same only if Z(x) = 1 for every x.
def implicit_reward(logprob, ref_logprob, beta, offset=0.0):
    """Eq. 6: beta log pi/pi_ref + f(x) + c.

    Log-probabilities (B,), nats, sums; offset = f(x) + c, a number or (B,), in units of reward.
    Returns (B,), in units of reward. At the start of training pi is pi_ref and the reward is
    exactly the offset. ValueError if the shapes of the log-probabilities differ, or if the offset
    would give the reward another shape than theirs.
    """
    _alike(logprob=logprob, ref_logprob=ref_logprob)
    reward = beta * (logprob - ref_logprob) + offset
    if reward.shape != logprob.shape:
        raise ValueError(f"shapes differ: logprob {tuple(logprob.shape)}, "
                         f"offset {tuple(offset.shape)}")
    return reward


# That offset from samples. Z(x) is a mean under pi_ref, so N responses of pi_ref to the same x
#     estimate it without bias:
#         Z^ = 1/N sum_i e^{r_i/beta},     E Z^ = Z.
#     Of scores, r = log s/(1-s). Its logarithm is too small on average, E beta log Z^ <=
#     beta log Z, by Jensen: log is concave. The error falls as 1/sqrt(N). Where the responses that
#     pi* likes are rarer than 1 in N, none of them may be there to see:
#         max r - beta log N <= beta log Z^ <= max r, over the N.
#     beta -> infinity gives the mean of their rewards, beta -> 0 the largest.
# Known: A*-PO (Brantley et al. 2025) and RPO (Faye et al. 2025) regress on r less this estimate.
def estimated_offset(rewards, beta):
    """Eq. 4, 19 from samples: beta log Z(x), which is f(x) + c by Eq. 18, of N responses of pi_ref.

    rewards (..., N), N >= 1. Returns (...), in units of reward: beta log mean e^{r/beta}.
    ValueError unless beta > 0 and N >= 1.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if rewards.shape[-1] == 0:
        raise ValueError("an offset is estimated from at least one response")
    count = rewards.new_tensor(rewards.shape[-1])
    return beta * ((rewards / beta).logsumexp(-1) - count.log())


# Eq. 8†. By Eq. 1, s(x, y) is the chance that y beats a response of reward 0.
def implicit_score(reward):
    """Eq. 8: sigma(reward). Any shape, to the same shape; unit-free, in [0, 1]."""
    return torch.sigmoid(reward)


# ---------------------------------------------------------------- the general loss (2.3 and 2.3.4)
# Eq. 7, with g the squared error, on fresh samples, y ~ pi. Write b = f(x) + c.
#   1. The samples are held fixed: only the loss has a gradient, not the sampling. So
#         grad L = -2 beta E_{y~pi} [ (r_phi - beta rho - b) grad log pi ].
#   2. The score function has mean zero: E_{y~pi} grad log pi = sum_y grad pi = grad 1 = 0. So a b
#      that depends on x alone drops out of that mean. And Eq. 3 has the gradient
#         grad J = sum_y grad pi (r_phi - beta rho) - beta sum_y pi grad log pi
#                = E_{y~pi} [ (r_phi - beta rho) grad log pi ].
#      Hence grad L = -2 beta grad J, for any b: Eq. 7 IS the policy gradient of RLHF, b is its
#      baseline, and Z is never needed.
#   3. What is left of b is the noise. At the optimum r_phi - beta rho = beta log Z(x) for every y.
#      With that b every single term is zero, not only their mean.
# On samples of any other mu, stored ones of pi_ref, say, or both kinds, 2 fails: the mean of
#     grad log pi is not zero there, so that b does not drop out. 3 still holds: with
#     b = beta log Z every residual is 0 at pi*, which makes pi* a minimum, the only one if mu
#     reaches all responses. With b = 0 it is one only if Z = 1. And Z need not be known. The best b
#     for given residuals is their mean, where the loss is their variance under mu,
#         min_b E_mu (r_phi - beta rho - b)^2 = Var_mu (r_phi - beta rho),
#     with no gradient through b, which is at its minimum. It is 0 if and only if all residuals are
#     the same, on all that mu reaches: at pi*. So the mean residual of a prompt's samples is the
#     right f(x) + c whoever drew them. (Known: the log-variance of Richter et al. 2020, VarGrad.)
# Weights pi/mu would make old samples stand for fresh ones, and Eq. 7 the policy gradient again;
#     but where pi has given a response up, the weight is 0, and what mu saw there is lost.
def una_reward_loss(implicit, explicit_reward):
    """Eq. 7: (r_phi - r_theta)^2.

    implicit, the implicit reward, and explicit_reward (B,), in the same unit. Returns (B,), in
    that unit squared. ValueError if their shapes differ.
    """
    _alike(implicit=implicit, explicit_reward=explicit_reward)
    return (explicit_reward - implicit) ** 2


# Eq. 9† compares scores. The slope of sigma weighs the residuals, so that even on fresh samples its
#     gradient is not grad J: it is another loss than Eq. 7.
# Eq. 13† is the same loss on stored scores.
# What each g does at r_theta = r, s = sigma(r), for a score s_phi, from ds/dr = s (1 - s):
#         mse  dL/dr = 2 (s - s_phi) s (1 - s)     at r = 0: (1/2 - s_phi) / 2; fades where |r| is
#                                                  large, right or wrong
#         bce  dL/dr = s - s_phi                   does not fade while wrong; has the minimiser of
#                                                  mse, r = log(s_phi / (1 - s_phi))
#         mae  dL/dr = sign(s - s_phi) s (1 - s)   smallest at the median of the scores at (x, y)
#                                                  (of labels: at the majority), not at their mean
def una_score_loss(implicit, explicit_score, g="mse"):
    """Eq. 9, 13: g(s_phi, s_theta) with s_theta = sigma(r_theta), Eq. 8.

    implicit (B,), the implicit reward; explicit_score (B,) in [0, 1]; g is "mse", "bce" or "mae".
    Returns (B,); nats for bce, else unit-free. Finite for any finite reward. ValueError if the
    shapes differ, for a score outside [0, 1] and for another g.
    """
    _alike(implicit=implicit, explicit_score=explicit_score)
    inside = (explicit_score >= 0) & (explicit_score <= 1)
    if not inside.all():
        first = explicit_score[~inside][0].item()
        raise ValueError(f"explicit_score must lie in [0, 1], got {first}")
    if g == "mse":
        return (implicit_score(implicit) - explicit_score) ** 2
    if g == "mae":
        return (implicit_score(implicit) - explicit_score).abs()
    if g == "bce":
        # log s = log sigma(r) and log(1 - s) = log sigma(-r): never the log of a rounded sigmoid.
        log_s, log_not_s = F.logsigmoid(implicit), F.logsigmoid(-implicit)
        return -explicit_score * log_s - (1 - explicit_score) * log_not_s
    raise ValueError(f'g must be "mse", "bce" or "mae", got {g!r}')


# ---------------------------------------------------------------- pairs (section 2.3.1)
# Eq. 10† is Eq. 2 with the implicit reward in place of the explicit one. As both responses answer
#     the same x, f(x) + c cancels in the difference.
def una_pair_loss(chosen_reward, rejected_reward):
    """Eq. 10 with log sigma: -log sigma(r_theta(x, y_w) - r_theta(x, y_l)).

    Implicit rewards (B,), which are log-odds. Returns (B,), nats. ValueError if shapes differ.
    """
    _alike(chosen_reward=chosen_reward, rejected_reward=rejected_reward)
    return -F.logsigmoid(chosen_reward - rejected_reward)


# Pairs leak. Let D be the responses to x that stand in pairs. What cancels f(x) cancels the price
#     of leaving D as well: where log pi of all of D falls by one amount the loss stays as it is, so
#     that its minima are as many as there are ways to spend that mass on what nobody judged. Nor
#     does its gradient see them: with logits z behind one prefix,
#         d/dz_k log pi(y_w) - d/dz_k log pi(y_l) = [k = w] - pi_k - ([k = l] - pi_k) = 0
#     for every token k that begins neither.
# An anchor holds it. Over pi_ref's own responses, of which a pair's two are samples,
#         E_{y~pi_ref} -rho = E_{y~pi_ref} log pi_ref/pi = KL(pi_ref || pi),
#     whose gradient pulls every logit towards pi_ref's probability: d/dz_k KL = pi_k - pi_ref,k.
#     Its own minimum is pi_ref. So a large weight is a bias, and a small one suffices, since beside
#     it nothing else weighs on what the pairs do not see.
# Known: -log pi of the chosen response alone beside DPO (RPO, Pang et al. 2024).
def anchor_loss(logprob, ref_logprob):
    """One response of pi_ref's term of KL(pi_ref || pi): -rho.

    Log-probabilities (B,), nats, sums. Returns (B,), nats: 0 where pi is pi_ref, and below 0 where
    pi says the response more often. ValueError if their shapes differ.
    """
    _alike(logprob=logprob, ref_logprob=ref_logprob)
    return ref_logprob - logprob


# ---------------------------------------------------------------- binary feedback (section 2.3.2)
# The judge's thumb up is the label 1, thumb down the label 0. Labels are scores, and Eq. 9 is then
# Eq. 11† (mse): (s_theta - 1)^2 or (s_theta - 0)^2.
# Eq. 12† (bce): -[ label log s_theta + (1 - label) log(1 - s_theta) ].
def una_binary_loss(implicit, label, g="mse"):
    """Eq. 11 (g="mse"), Eq. 12 (g="bce"); g="mae" is KTO's, see there.

    implicit (B,), the implicit reward; label (B,) bool, int or float, each 1 or 0. Returns (B,)
    as una_score_loss does. ValueError if the shapes differ and for another label: -1 for "down"
    would otherwise pass for a score.
    """
    _alike(implicit=implicit, label=label)
    valid = (label == 0) | (label == 1)
    if not valid.all():
        raise ValueError(f"a label must be 0 or 1, got {label[~valid][0].item()}")
    return una_score_loss(implicit, label.to(implicit.dtype), g)


# ---------------------------------------------------------------- what UNA unifies
# DPO and KTO, each from its own paper. They share nothing with the functions above, down to the
# checks, so that tests which compare them compare two derivations.

# Eq. 5†, DPO (Rafailov et al. 2023, their Eq. 7). Put Eq. 4, r = beta log pi/pi_ref + beta log Z,
#     into Eq. 2: Z cancels. It is Eq. 10, value and gradient.
def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Eq. 5: -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x)).

    Four log-probabilities (B,), nats, sums over tokens. Returns (B,), nats; log 2 where pi is
    pi_ref. ValueError if their shapes differ.
    """
    shapes = [tuple(p.shape) for p in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    margin = beta * (policy_chosen - ref_chosen) - beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(margin)


# KTO (Ethayarajh et al. 2024) takes from prospect theory that people feel gains and losses against
# what they are used to. For that reference point it has z_0, how far the policy has moved on
# average: an estimate of KL(pi || pi_ref) from mismatched pairs (x_i, y_j), i != j, clamped at 0
# and held constant (biased, since y_j answers another prompt):
#     v = lambda_D sigma(beta (rho - z_0)) if desirable, lambda_U sigma(beta (z_0 - rho)) if not,
#     L = lambda_y - v.
# As 1 - sigma(t) = sigma(-t), for lambda = 1 that is |label - sigma(beta rho - beta z_0)|: UNA's
# binary loss with the absolute error for g and f(x) + c = -beta z_0, a KL† and not beta log Z.
def kto_loss(policy, ref, label, policy_kl, ref_kl, beta,
             desirable_weight=1.0, undesirable_weight=1.0):
    """KTO, from its own paper: lambda_y - v(x, y).

    policy, ref (B,): log-probabilities of the judged responses; label (B,) bool, int or float,
    1 = desirable. policy_kl, ref_kl (K,), K >= 1: log-probabilities of mismatched pairs; no
    gradient flows through them. All in nats. Returns (B,), unit-free; half the weight where pi is
    pi_ref on both.
    ValueError if the shapes of one kind differ, for a label other than 0 and 1, or if K = 0.
    """
    for shapes in ([tuple(t.shape) for t in (policy, ref, label)],
                   [tuple(t.shape) for t in (policy_kl, ref_kl)]):
        if len(set(shapes)) > 1:
            raise ValueError(f"shapes differ: {shapes}")
    valid = (label == 0) | (label == 1)
    if not valid.all():
        raise ValueError(f"a label must be 0 or 1, got {label[~valid][0].item()}")
    if policy_kl.numel() == 0:
        raise ValueError("KTO needs at least one mismatched pair to estimate its reference point")
    z0 = (policy_kl - ref_kl).mean().clamp(min=0).detach()
    gain = beta * (policy - ref - z0)
    desirable = desirable_weight * (1 - torch.sigmoid(gain))
    undesirable = undesirable_weight * (1 - torch.sigmoid(-gain))
    return torch.where(label.bool(), desirable, undesirable)


# ---------------------------------------------------------------- the KL on samples
# What stands for the KL in today's RLHF is one of three numbers for each sample of pi (Schulman
# 2020). With x = pi_ref/pi, so that rho = -log x,
#         k1 = rho,     k2 = rho^2 / 2,     k3 = x - 1 - log x.
#     As numbers k1 and k3 have the mean KL(pi || pi_ref), since E x = sum_y pi_ref = 1, and k2 has
#     it nearly. As losses, with the samples held fixed, their mean gradients are other matters:
#         E grad k1 = E grad log pi = 0                                       no price at all,
#         E grad k2 = E [ rho grad log pi ] = grad KL(pi || pi_ref)           the right one,
#         E grad k3 = E [ (1 - x) grad log pi ] = -sum_y pi_ref grad log pi
#                   = grad KL(pi_ref || pi)                                   the other KL.
#     Eq. 7 has the gradient -2 beta (r_phi - b - beta rho) grad log pi. Divided by 2 beta that is
#     the gradient of -(r_phi - b) log pi + beta k2: UNA's online loss is REINFORCE, with b for its
#     baseline and k2 for its KL. RLOO has k1 in the reward, where it is a number: the same again.
# Known: Liu et al. 2025, Rethinking KL Regularization in RLHF; Tang and Munos 2025.
def kl_estimate(logprob, ref_logprob, k):
    """k1, k2 or k3 (Schulman 2020): what a sample of pi says of KL(pi || pi_ref).

    Log-probabilities (B,), nats, sums; k is 1, 2 or 3. Returns (B,), nats. ValueError if their
    shapes differ and for another k.
    """
    _alike(logprob=logprob, ref_logprob=ref_logprob)
    rho = logprob - ref_logprob
    if k not in (1, 2, 3):
        raise ValueError(f"k must be 1, 2 or 3, got {k!r}")
    return rho if k == 1 else rho ** 2 / 2 if k == 2 else (-rho).exp() - 1 + rho


# With k3 in the loss, as GRPO has it (Shao et al. 2024), what is climbed is
#         E_{y~pi} r - beta KL(pi_ref || pi),     the sum of pi being 1.
#     Its derivative in pi(y) is r + beta pi_ref/pi, the same number lambda(x) for all y. So
#         pi(y|x) = beta pi_ref / (lambda(x) - r),
#     which is not pi*: it falls off as 1/(lambda - r) and not exponentially. No pi(y) is above 1,
#     so lambda >= max (r + beta pi_ref). From there the sum falls, and is convex in lambda.
def k3_optimal_policy(ref_logprobs, rewards, beta):
    """The policy that maximises E r - beta KL(pi_ref || pi), where k3 in the loss leads.

    ref_logprobs, rewards (..., Y) over every response. Returns its log-probabilities (..., Y), in
    nats. ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    weight = beta * ref_logprobs.exp()
    lam = (rewards + weight).amax(-1, keepdim=True)              # where the sum is 1 or more
    for _ in range(50):                                          # Newton, which stays below
        total, slope = ((weight / (lam - rewards) ** n).sum(-1, keepdim=True) for n in (1, 2))
        lam = lam + (total - 1) / slope
        if total.max() < 1 + 1e-12:
            break
    logprobs = (weight / (lam - rewards)).log()
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


# ---------------------------------------------------------------- PPO, RLHF's usual optimiser
# PPO (Schulman et al. 2017) climbs Eq. 3, as RLHF does. It is what UNA would replace, and shares no
# equation with UNA's losses. A response is an episode, a token an action. The policy writes
# responses; each token is made likelier or less likely as what followed it was better or worse than
# a value model had foretold, in steps that clipping keeps short; the value model learns from the
# same responses.
# (B, T) below are tokens in order, mask True on the response's, so that log-probability, value and
# reward of a token stand in one column. What stands off the mask, NaN and infinity included, is
# made 0 before anything is computed from it: it moves no value, and its gradient is 0.

# Token rewards: -beta log pi/pi_ref(y_t) for each token, and r_phi on the last. They add up to
# r_phi - beta rho, whose mean over samples of pi is J.
def ppo_token_rewards(reward, logprobs, ref_logprobs, mask, beta):
    """RLHF's reward of each token (Ziegler et al. 2019).

    reward (B,) of each response; logprobs, ref_logprobs (B, T) of its tokens, nats; mask (B, T)
    bool. Returns (B, T), in units of reward, 0 off the mask. ValueError if shapes do not fit.
    """
    _alike(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    _alike(reward=reward, rows_of_mask=mask.any(1))
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rho = logprobs.where(mask, 0.0) - ref_logprobs.where(mask, 0.0)
    return reward[:, None].where(last, 0.0) - beta * rho


# Generalised advantage estimation (Schulman et al. 2016), undiscounted. The error of the value at
# one step,
#     delta_t = r_t + V_{t+1} - V_t,     with V = 0 behind the last token,
# summed with weights lambda^k:  A_t = sum_k lambda^k delta_{t+k} = delta_t + lambda A_{t+1}.
# lambda = 1 gives the rewards still to come minus V_t, unbiased; lambda = 0 trusts the value
# model: delta_t. A gap inside a response would count as a step of time whose value is 0.
def ppo_advantages(rewards, values, mask, lam):
    """Advantages A_t (Schulman et al. 2016) and the values' targets A_t + V_t.

    rewards, values (B, T), in units of reward; mask (B, T) bool; lam in [0, 1]. Returns two
    (B, T), in units of reward, 0 off the mask. ValueError if the shapes differ, or if the True of
    a row are not consecutive.
    """
    _alike(rewards=rewards, values=values, mask=mask)
    begun, over = mask.cumsum(1) > 0, mask.cumsum(1) == mask.sum(1, keepdim=True)
    if (begun & ~over & ~mask).any():
        raise ValueError("a row of mask has a hole: the tokens of a response must be consecutive")
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    delta = rewards + F.pad(values[:, 1:], (0, 1)) - values
    advantages = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + lam * running
        advantages[:, t] = running
    advantages = advantages.where(mask, 0.0)                # the prompt's columns have sums too
    return advantages, advantages + values


# The policy's loss: importance ratio w_t = pi/pi_old(y_t), clipped where moving further would pay:
#     L = -sum_t min( w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t ).
# In the first inner step w = 1 and grad L = -sum_t A_t grad log pi(y_t): the policy gradient.
def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped loss (Schulman et al. 2017, their Eq. 7), summed over the response's tokens.

    All (B, T): log-probabilities in nats, advantages in units of reward, mask bool. clip is eps.
    Returns (B,), in units of reward. ValueError if the shapes differ.
    """
    _alike(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    log_ratio = logprobs.where(mask, 0.0) - old_logprobs.where(mask, 0.0)
    advantages = advantages.where(mask, 0.0)
    # A ratio of inf would make NaN: inf * 0 where A = 0, and in the gradient that clipping stops.
    # So beyond e^limit it is constant, with gradient 0. Nine tenths of the largest exponent (80 in
    # float32) keep all below exact and leave room for A.
    limit = 0.9 * log_ratio.new_tensor(torch.finfo(log_ratio.dtype).max).log()
    ratio = log_ratio.clamp(max=limit).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain.sum(1)


# The values' loss, clipped likewise (in OpenAI's code, not in the paper): half the larger of the
# squared errors of V and of V held within eps of its old self.
def ppo_value_loss(values, old_values, targets, mask, clip):
    """The value model's loss, summed over the response's tokens.

    All (B, T), in units of reward; mask bool; clip is eps, in units of reward too. Returns (B,),
    in those units squared. ValueError if the shapes differ.
    """
    _alike(values=values, old_values=old_values, targets=targets, mask=mask)
    values, targets = values.where(mask, 0.0), targets.where(mask, 0.0)
    old_values = old_values.where(mask, 0.0)
    held = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - targets) ** 2, (held - targets) ** 2)
    return 0.5 * error.sum(1)


# ---------------------------------------------------------------- RLOO and GRPO
# Today's RLHF has no value model: it gives each prompt a group of n samples, and what the others
# reach says what is to be expected. Below, the responses of a group stand in n consecutive rows.
def _groups(reward, n):
    """(B,) as (B/n, n). ValueError unless n >= 2 divides B."""
    if n < 2 or len(reward) % n:
        raise ValueError(f"{len(reward)} responses are no groups of {n}")
    return reward.view(-1, n)


# RLOO (Kool et al. 2019, Ahmadian et al. 2024). The reward has the KL in it, as k1,
#         R_i = r_i - beta rho_i,     A_i = R_i - 1/(n-1) sum_{j != i} R_j,
#     and the loss is -A log pi, A held. The others' mean knows nothing of y_i: a baseline, and by
#     step 2 of Eq. 7 the mean gradient is -grad J. As A_i = n/(n-1) (R_i - mean R), it is sample by
#     sample that of Eq. 7 with f(x) + c = mean R, times n / (2 beta (n-1)). So it has pi* for its
#     minimum on old samples as well, without weights (known: Yao et al. 2025, arXiv 2509.24203).
def rloo_loss(logprob, ref_logprob, reward, n, beta):
    """RLOO, from its own papers: -A log pi of whole responses, n of each prompt in a row.

    Log-probabilities (B,), nats, sums; reward (B,). Returns (B,), nats times a reward; only its
    gradient means something. ValueError if shapes differ, or unless n >= 2 divides B.
    """
    shapes = [tuple(t.shape) for t in (logprob, ref_logprob, reward)]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    R = _groups((reward - beta * (logprob - ref_logprob)).detach(), n)
    others = (R.sum(1, keepdim=True) - R) / (n - 1)
    return -(R - others).flatten() * logprob


# GRPO (Shao et al. 2024): A_i = (r_i - mean r) / std r for all tokens of y_i, PPO's clipped ratio,
#     k3 of each token beside it, and the mean over a response's tokens:
#         L_i = -1/|y_i| sum_t [ min(w_t A_i, clip(w_t, 1 - eps, 1 + eps) A_i) - beta k3_t ].
#     A token's k3 is held like the samples, so that at a prefix h its mean gradient is that of
#     KL(pi_ref(.|h) || pi(.|h)) alone; that a token leads to prefixes where more is to be paid, no
#     gradient says. So (with undivided A, and but for 1/|y|) the policy stands still where at each
#     h it is k3_optimal_policy of what a token gets from there on, Q(h, token) = E_{y~pi} r: that
#     can be worked out from the last token back, and it is not pi*.
#     Division by the spread of the group's rewards has the price beta std r in place of beta: as a
#     policy sharpens it pays less and less.
# Known: that the loss has but a part of the KL's gradient, Tang and Munos 2025, Yao et al. 2026
#     (arXiv 2601.10201); what the division does, Liu et al. 2025, Dr. GRPO (arXiv 2503.20783).
def grpo_advantages(reward, n, divide=True):
    """GRPO's A: how far a reward (B,) lies above its group's mean, in units of its spread (B,).

    n responses of each prompt in a row. Without divide in units of reward (Liu et al. 2025,
    Dr. GRPO). A group of equal rewards has A = 0. ValueError unless n >= 2 divides B.
    """
    groups = _groups(reward, n)
    above = groups - groups.mean(1, keepdim=True)
    return (above / (groups.std(1, keepdim=True) + 1e-4) if divide else above).flatten()


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantage, mask, beta, clip, k=3):
    """GRPO's loss, mean over the response's tokens (Shao et al. 2024, their Eq. 3 and 4).

    logprobs, old_logprobs, ref_logprobs (B, T) of tokens, nats; advantage (B,); mask (B, T) bool.
    k: which estimate of the KL stands beside it. Returns (B,). ValueError if shapes do not fit.
    """
    _alike(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    _alike(advantage=advantage, rows_of_mask=mask.any(1))
    policy = ppo_policy_loss(logprobs, old_logprobs, advantage[:, None].expand_as(mask), mask, clip)
    kl = kl_estimate(logprobs.where(mask, 0.0), ref_logprobs.where(mask, 0.0), k)     # 0 off it
    return (policy + beta * kl.sum(1)) / mask.sum(1)


# ---------------------------------------------------------------- the paper in three responses
if __name__ == "__main__":
    def show(name, values, note=""):
        print(f"{name:<29}" + "".join(f"{value:8.3f}" for value in values) + f"    {note}".rstrip())

    beta, rewards = 0.5, torch.tensor([-1.0, 0.0, 1.0]).double()
    ref = torch.tensor([0.5, 0.3, 0.2]).double().log()
    best, offset = optimal_policy(ref, rewards, beta)
    print(f"One prompt, three responses, beta = {beta}:")
    show("pi_ref", ref.exp())
    show("r, given", rewards)
    show("pi_ref e^{r/beta}", (ref + rewards / beta).exp(), f"sum: Z = {(offset / beta).exp():.3f}")
    show("pi*: divided by Z", best.exp(), f"Eq. 4; beta log Z = {offset:.3f}")
    show("beta log pi_ref/pi_ref", implicit_reward(ref, ref, beta), "Eq. 6: all alike")
    show("beta log pi*/pi_ref", implicit_reward(best, ref, beta), "off r by beta log Z")
    show("... + f + c = beta log Z", implicit_reward(best, ref, beta, offset), "Eq. 18: r itself")
    print("\nLarger beta, smaller KL:         E r      KL   J = E r - 0.5 KL, Eq. 3")
    for b in (0.25, 0.5, 1.0):
        policy, _ = optimal_policy(ref, rewards, b)
        mean, kl = (policy.exp() * rewards).sum(), (policy.exp() * (policy - ref)).sum()
        show(f"pi* of beta = {b}", (mean, kl, rlhf_objective(policy, ref, rewards, beta)))
    print("\nLosses of the third response:  pi_ref     pi*   pi* with f + c = beta log Z")
    policies = [implicit_reward(*of) for of in ((ref, ref, beta), (best, ref, beta),
                                                (best, ref, beta, offset))]
    up, score = torch.ones(1).double(), rewards[2:].sigmoid()
    show("preferred to the first: DPO", [una_pair_loss(r[2:], r[:1]).item() for r in policies])
    for g, name in (("bce", ""), ("mse", ""), ("mae", "KTO, with z_0 = 0: no offset")):
        show(f"label 1, {g}", [una_binary_loss(r[2:], up, g).item() for r in policies], name)
    show("score sigma(1), mse", [una_score_loss(r[2:], score).item() for r in policies])
    show("reward 1", [una_reward_loss(r[2:], rewards[2:]).item() for r in policies])
