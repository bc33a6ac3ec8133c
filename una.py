"""UNA in code: every equation of arXiv 2408.15339 (v2), in the paper's order, each above the line it becomes.

    x, y            a prompt and a response        pi, pi_ref      the policy that is trained, the frozen reference
    logprob         log pi(y|x), summed over the response's tokens, in nats
    rho             logprob - ref_logprob = log pi(y|x) / pi_ref(y|x)
    reward          any real number; explicit r_phi is given (judge, reward model), implicit r_theta is what pi implies
    score           a reward squashed into [0, 1]; explicit s_phi, implicit s_theta

Functions are pure, take and return tensors, and know no model. Losses are not reduced: one value per example, shape (B,),
so that any mixture of feedback in a batch has an honest mean. Arguments named ref_* are constants: compute them without
gradients. Where the printed equation is wrong, the comment says `Printed:` and the code is the corrected one.
"""
import torch
import torch.nn.functional as F


# log pi(y|x). An autoregressive model gives p(token | everything before it), so by the chain rule
#     log pi(y|x) = sum_t log p(y_t | x, y_<t)          a SUM: the mean would be the log of no probability.
# The logits at position t come from tokens 0..t, so they predict token t + 1: drop the last logits and the first token.
# With logits z:  log softmax(z)[k] = z[k] - log sum_j exp z[j]  (gather, then logsumexp: no second (B, T, V) tensor).
def token_logprobs(logits, tokens, response_mask):
    """log p(y_t | x, y_<t) of every response token; arguments as in sequence_logprob, without its checks.

    Returns (B, T-1): column t is of token t + 1, and 0 where that is no response token. Nats, float32 or wider.
    """
    mask = response_mask[:, 1:]                                                    # (B, T-1)
    targets = tokens[:, 1:].masked_fill(~mask, 0)                                  # whatever stands outside is never read
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))   # bf16 would lose rho
    chosen_logits = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (chosen_logits - logits.logsumexp(-1)).where(mask, 0.0)


def sequence_logprob(logits, tokens, response_mask):
    """log pi(y|x) of the responses in a batch (the pi of every equation).

    logits (B, T, V), tokens (B, T) int, response_mask (B, T) bool: True on the response's tokens, its end-of-text
    included, False on prompt and padding, on either side. Returns (B,), nats, float32 or wider. ValueError if a response is
    empty or begins at position 0, where no logits predict it.
    """
    if response_mask[:, 0].any():
        raise ValueError("response_mask is True at position 0, which no logits predict")
    if not response_mask.any(dim=1).all():
        raise ValueError("empty response: a row of response_mask has no True")
    return token_logprobs(logits, tokens, response_mask).sum(-1)


# ---------------------------------------------------------------- RLHF (section 2.1)
# Eq. 1, Bradley-Terry: P(y_w beats y_l) = e^{r_w} / (e^{r_w} + e^{r_l}) = sigma(r_w - r_l).
# Eq. 2: the likelihood of the judge's choices, as a function of the reward model phi. (Printed: L(pi_theta), but no
#     policy is in it.)
def reward_model_loss(chosen_reward, rejected_reward):
    """Eq. 2: -log sigma(r_phi(x, y_w) - r_phi(x, y_l)). Rewards (B,), which are log-odds. Returns (B,), nats."""
    return -F.logsigmoid(chosen_reward - rejected_reward)


# Eq. 3: pi* = argmax_pi E_x J(x) with  J(x) = E_{y~pi} r(x,y) - beta KL(pi || pi_ref) = sum_y pi (r - beta log pi/pi_ref).
#     (Printed: max, which is a number, for argmax, which is a policy.) Where all responses can be listed, J is exact.
def rlhf_objective(logprobs, ref_logprobs, rewards, beta):
    """Eq. 3: J(x), exact. All (..., Y) over every response; logprobs in nats. Returns (...), in units of reward.

    beta = 0 gives the mean reward. A response of probability 0 (log-probability -inf) adds 0, as p log p does in the limit.
    """
    probs = logprobs.exp()
    terms = probs * (rewards - beta * (logprobs - ref_logprobs))
    return terms.where(probs > 0, 0.0).sum(-1)


# ---------------------------------------------------------------- the optimum (section 3, appendices A and B)
# Eq. 14, the log-sum inequality: for a_i >= 0, b_i > 0 with sums a, b,
#         sum_i a_i log(a_i/b_i)  >=  a log(a/b),        equal if and only if a_i/b_i is the same for all i.
#     Proof. phi(t) = t log t is convex, phi'' = 1/t > 0. Jensen (Eq. 21) with weights b_i/b at the points a_i/b_i (Eq. 22):
#         sum_i a_i log(a_i/b_i) = b sum_i (b_i/b) phi(a_i/b_i)  >=  b phi(sum_i a_i/b) = a log(a/b).
# Eq. 15: write J(x) as one such sum. For any f(x), subtract it from r inside the log and add it back outside:
#         J(x) = -beta sum_y pi log( pi / (pi_ref e^{(r-f)/beta}) ) + f(x).
# Eq. 16: the inequality with a_y = pi (so a = 1) and b_y = pi_ref e^{(r-f)/beta} (so b = Z_f) bounds J for every policy:
#         J(x)  <=  beta log Z_f(x) + f(x),      Z_f(x) = E_{y~pi_ref} e^{(r-f)/beta} = Z(x) e^{-f(x)/beta},
#     that is J(x) <= beta log Z(x): f cancels, the bound is the same whichever f one takes.
# Eq. 17: it is reached if and only if pi / (pi_ref e^{(r-f)/beta}) = 1/lambda for all y. As pi sums to 1, lambda = Z_f(x).
#     (Printed: lambda is a constant. It depends on x.) With f = 0 this is Eq. 4 and 20: pi* = pi_ref e^{r/beta} / Z(x).
# Eq. 19: the value there is beta log lambda(x) + f(x) = beta log Z(x).  (Printed: beta log lambda outside of E_x.)
# Larger beta, smaller KL: beta -> infinity gives pi_ref, beta -> 0 the best response.
def optimal_policy(ref_logprobs, rewards, beta):
    """Eq. 4, 16, 19: the policy that maximises Eq. 3, and the maximum.

    ref_logprobs, rewards (..., Y) over every response. Returns log pi* (..., Y) in nats and beta log Z(x) (...) in
    units of reward. ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    tilted = ref_logprobs + rewards / beta
    log_z = tilted.logsumexp(-1)
    return tilted - log_z[..., None], beta * log_z


# ---------------------------------------------------------------- the implicit reward (sections 2.3 and 3)
# Eq. 18: solve Eq. 17 for the reward. The policy pi is optimal for exactly the rewards
#         r(x, y) = beta log pi/pi_ref + f(x) + c,       c = beta log lambda(x),     hence  f(x) + c = beta log Z(x).
#     (Printed: c is a constant. It depends on x, as lambda does, and only the sum f(x) + c is determined.)
# Eq. 6 reads this backwards: a policy in training IS a reward model, and aligning it is regressing its reward on a
#     given one. f = c = 0 is not a simplification but a condition: it is exact if and only if Z(x) = 1 for every x.
#     (Printed: "f(x) = c = 0 refers that implicit and explicit reward models are exactly the same"; and, for infinitely
#     many responses, f(x) > max r, which makes Z_f < 1 and so c < 0: it contradicts f = c = 0.)
def implicit_reward(logprob, ref_logprob, beta, offset=0.0):
    """Eq. 6: beta log pi/pi_ref + f(x) + c. Log-probabilities (B,), nats, sums; offset = f(x) + c, a number or (B,).

    Returns (B,), in units of reward. At the start of training pi is pi_ref and the reward is exactly the offset.
    """
    return beta * (logprob - ref_logprob) + offset


# Eq. 8. By Eq. 1, s(x, y) is the chance that y beats a response of reward 0.  (Printed: without f(x) + c.)
def implicit_score(reward):
    """Eq. 8: sigma(reward). Any shape, to the same shape; unit-free, in [0, 1]."""
    return torch.sigmoid(reward)


# ---------------------------------------------------------------- the general loss, online (sections 2.3 and 2.3.4)
# Eq. 7, with g the squared error. Sampling y ~ pi carries no gradient (grad E below holds the samples fixed). With b = f(x) + c
#         grad E_{y~pi} (r_phi - r_theta)^2 = -2 beta E_{y~pi} [ (r_phi - beta rho - b) grad log pi ],
#     and as E_{y~pi} grad log pi = grad sum_y pi = 0, every b that depends on x alone drops out, and
#         grad J = sum_y grad pi (r_phi - beta rho) - beta sum_y grad pi = E_{y~pi} [ (r_phi - beta rho) grad log pi ].
#     So on fresh samples grad L = -2 beta grad J for any offset: Eq. 7 IS the policy gradient of RLHF, b is its baseline,
#     and Z is never needed. At the optimum r_phi - beta rho = beta log Z(x) for every y: with that b the residual, and with
#     it the noise of the gradient, is zero.
#     On old samples (from pi_ref, say) none of this holds, and f = c = 0 leads to pi* only if Z = 1.
def una_reward_loss(implicit_reward, explicit_reward):
    """Eq. 7: (r_phi - r_theta)^2. Rewards (B,), same unit. Returns (B,), in that unit squared."""
    return (explicit_reward - implicit_reward) ** 2


# Eq. 9 compares scores. (Printed: "equivalent" to Eq. 7. It is not: the slope of sigma weighs the residuals, so that
#     even on fresh samples its gradient is not grad J. Section 2.3.4 cites Eq. 13 for the online loss; it means Eq. 9.)
# Eq. 13 is the same loss on stored scores. (Printed: with a minus, which would drive the scores apart.)
# What each g does at r_theta = r, for a score s_phi, from ds_theta/dr = s (1 - s):
#         mse  dL/dr = 2 (s - s_phi) s (1 - s)        at r = 0: 1/2 (1/2 - s_phi) ; fades where |r| is large, right or wrong
#         bce  dL/dr = s - s_phi                      never fades; same minimiser as mse, r = log s_phi / (1 - s_phi)
#         mae  dL/dr = sign(s - s_phi) s (1 - s)      minimised by the median of the scores at (x, y), not by their mean
def una_score_loss(implicit_reward, explicit_score, g="mse"):
    """Eq. 9, 13: g(s_phi, s_theta) with s_theta = sigma(r_theta), Eq. 8; g is "mse", "bce" or "mae".

    implicit_reward (B,), explicit_score (B,) in [0, 1]. Returns (B,); nats for bce, else unit-free. Finite for any finite
    reward. ValueError for a score outside [0, 1] and for another g.
    """
    inside = (explicit_score >= 0) & (explicit_score <= 1)
    if not inside.all():
        raise ValueError(f"explicit_score must lie in [0, 1], got {explicit_score[~inside][0].item()}")
    if g == "mse":
        return (implicit_score(implicit_reward) - explicit_score) ** 2
    if g == "mae":
        return (implicit_score(implicit_reward) - explicit_score).abs()
    if g == "bce":   # log s = log sigma(r) and log(1 - s) = log sigma(-r): never the log of a rounded sigmoid
        return -explicit_score * F.logsigmoid(implicit_reward) - (1 - explicit_score) * F.logsigmoid(-implicit_reward)
    raise ValueError(f'g must be "mse", "bce" or "mae", got {g!r}')


# ---------------------------------------------------------------- pairs (section 2.3.1)
# Eq. 10. (Printed: -E (r_w - r_l), linear and so unbounded below; "equivalent to DPO" is said of it with log sigma around
#     the difference, which is what stands here.) This is Eq. 2 with the implicit reward in place of the explicit one, and
#     as both responses answer the same x, f(x) + c cancels in the difference.
def una_pair_loss(chosen_reward, rejected_reward):
    """Eq. 10 with log sigma: -log sigma(r_theta(x, y_w) - r_theta(x, y_l)). Rewards (B,). Returns (B,), nats."""
    return -F.logsigmoid(chosen_reward - rejected_reward)


# ---------------------------------------------------------------- thumbs (section 2.3.2)
# A thumb up is the score 1, a thumb down the score 0, and Eq. 9 with those scores is
# Eq. 11 (mse): (s_theta - 1)^2 or (s_theta - 0)^2.   (Printed: with a leading minus, which would unlearn the labels.)
# Eq. 12 (bce): -[ y log s_theta + (1 - y) log(1 - s_theta) ].   (Printed: its first line has a minus too many.)
def una_binary_loss(implicit_reward, label, g="mse"):
    """Eq. 11 (g="mse"), Eq. 12 (g="bce"); g="mae" is KTO's, see there.

    implicit_reward (B,), label (B,) bool, int or float, each 1 (up) or 0 (down). Returns (B,) as una_score_loss does.
    ValueError for another label: -1 for "down" would otherwise pass for a score.
    """
    if not ((label == 0) | (label == 1)).all():
        raise ValueError(f"a label must be 0 or 1, got {label[(label != 0) & (label != 1)][0].item()}")
    return una_score_loss(implicit_reward, label.to(implicit_reward.dtype), g)


# ---------------------------------------------------------------- what UNA unifies, each from its own paper
# The functions below share nothing with those above, so that tests which compare them compare two derivations.

# Eq. 5, DPO (Rafailov et al. 2023, their Eq. 7). Put Eq. 4, r = beta log pi/pi_ref + beta log Z(x), into Eq. 2: Z cancels.
#     (Printed: its first line has r_phi where r_theta is meant.)  It is Eq. 10, value and gradient.
def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Eq. 5: -log sigma(beta log pi/pi_ref(y_w|x) - beta log pi/pi_ref(y_l|x)).

    Four log-probabilities (B,), nats, sums over tokens. Returns (B,), nats; log 2 where pi is pi_ref.
    """
    margin = beta * (policy_chosen - ref_chosen) - beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(margin)


# KTO (Ethayarajh et al. 2024) values an outcome against a reference point z_0, an estimate of KL(pi || pi_ref) from
# mismatched pairs (x_i, y_j), clamped at 0 and held constant:
#     v = lambda_D sigma(beta (rho - z_0)) if desirable, lambda_U sigma(beta (z_0 - rho)) if not;     L = lambda_y - v.
# As 1 - sigma(t) = sigma(-t), for lambda = 1 that is |label - sigma(beta rho - beta z_0)|: UNA's binary loss with the
# absolute error for g and f(x) + c = -beta z_0. (Printed: KTO estimates Z(x). z_0 estimates a KL, not beta log Z.)
def kto_loss(policy, ref, label, policy_kl, ref_kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO, from its own paper: lambda_y - v(x, y).

    policy, ref (B,): log-probabilities of the judged responses; label (B,) bool, int or float, 1 = desirable.
    policy_kl, ref_kl (K,), K >= 1: log-probabilities of mismatched pairs; no gradient flows through them.
    All in nats. Returns (B,), unit-free; 1/2 where pi is pi_ref. ValueError for a label other than 0 and 1, or K = 0.
    """
    if not ((label == 0) | (label == 1)).all():
        raise ValueError(f"a label must be 0 or 1, got {label[(label != 0) & (label != 1)][0].item()}")
    if policy_kl.numel() == 0:
        raise ValueError("KTO needs at least one mismatched pair to estimate its reference point")
    z0 = (policy_kl - ref_kl).mean().clamp(min=0).detach()
    gain = beta * (policy - ref - z0)
    desirable = desirable_weight * (1 - torch.sigmoid(gain))
    undesirable = undesirable_weight * (1 - torch.sigmoid(-gain))
    return torch.where(label.bool(), desirable, undesirable)


# PPO (Schulman et al. 2017) on Eq. 3, as RLHF uses it. A response is an episode, a token an action; (B, T) below are tokens
# in order, mask True on the response's, so that log-probability, value and reward of a token stand in one column.
# Token rewards: -beta log pi/pi_ref(y_t) for each token and r_phi on the last real one. They add up to r_phi - beta rho,
# whose mean over samples of pi is J.
def ppo_token_rewards(reward, logprobs, ref_logprobs, mask, beta):
    """RLHF's reward of each token, from reward (B,) of each response and logprobs, ref_logprobs (B, T) of its tokens, nats.

    Returns (B, T), in units of reward, 0 off the mask.
    """
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)                             # and all padding behind it
    return (reward[:, None] * last - beta * (logprobs - ref_logprobs)) * mask


# Generalised advantage estimation (Schulman et al. 2016), undiscounted. The error of the value at one step,
#     delta_t = r_t + V_{t+1} - V_t,     with V = 0 behind the last token,
# summed with weights lambda^k:  A_t = sum_k lambda^k delta_{t+k} = delta_t + lambda A_{t+1}.
# lambda = 1 gives the rewards still to come minus V_t, unbiased; lambda = 0 trusts the value model: delta_t.
def ppo_advantages(rewards, values, mask, lam):
    """Advantages A_t and the values' targets A_t + V_t, from rewards and values (B, T), in units of reward.

    lam in [0, 1]. Returns two (B, T), 0 off the mask.
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    delta = (rewards + following - values) * mask
    advantages = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + lam * running
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask


# The policy's loss: importance ratio w_t = pi/pi_old(y_t), clipped where moving further would pay:
#     L = -sum_t min( w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t ).
# In the first inner step w = 1 and grad L = -sum_t A_t grad log pi(y_t): the policy gradient.
def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped loss, summed over the response's tokens. All (B, T), log-probabilities in nats. Returns (B,), a reward."""
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain.where(mask, 0.0).sum(1)


# The values' loss, clipped likewise: half the larger of the squared errors of V and of V held within eps of its old self.
def ppo_value_loss(values, old_values, targets, mask, clip):
    """The value model's loss, summed over the response's tokens. All (B, T), in units of reward. Returns (B,), squared units."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - targets) ** 2, (held - targets) ** 2)
    return 0.5 * error.where(mask, 0.0).sum(1)
