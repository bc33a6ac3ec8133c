"""What the campaigns train and measure beyond train.py: other f(x) + c, other losses beside ours,
reward models and their optima.

`entry` makes the result of one campaign.Run; all that it knows besides is what train.prepare made.
"""
import copy
import math

import torch

import data
import train
import una
from lab import exact


# ---------------------------------------------------------------- losses
def una_online_own(policy, batch, beta):
    """train.una_online, with the mean residual of the policy's own samples alone."""
    reward, n = train.implicit_reward(policy, batch, beta), batch.per_prompt
    residual = (batch.rewards - reward).detach().where(~batch.is_old, math.nan).view(-1, n)
    offset = residual.nanmean(1).repeat_interleave(n)
    return una.una_reward_loss(reward + offset, batch.rewards)


# Who wins a pair, and whether a label is 1, is drawn by chance: sigma(r_w - r_l), sigma(r). Below
# each chance stands for its draw, so that a loss is the mean over all draws, and has no noise.
def label_chances(policy, batch, beta):
    """Eq. 12, train.una_binary_bce."""
    return una.una_score_loss(train.implicit_reward(policy, batch, beta), batch.scores, g="bce")


def either_way(reward, other, score, other_score):
    """Eq. 10 of two responses whose judge has not drawn a winner yet: all (B,)."""
    chance = (score.logit() - other_score.logit()).sigmoid()     # Eq. 1
    return (chance * una.una_pair_loss(reward, other)
            + (1 - chance) * una.una_pair_loss(other, reward))


def pair_chances(policy, batch, beta):
    """Eq. 10 with an anchor, train.una_pair."""
    logprobs = train.logprob(policy, batch.tokens, batch.mask)
    rewards = una.implicit_reward(logprobs, batch.ref_logprob, beta).chunk(2)
    held = una.anchor_loss(logprobs, batch.ref_logprob).view(2, -1).mean(0)
    return either_way(*rewards, *batch.scores.chunk(2)) + batch.anchor * held


def mixed_chances(policy, batch, beta):
    """Eq. 10, 11 and 13 in one, train.una_mixed."""
    logprobs = train.logprob(policy, batch.tokens, batch.mask)
    reward = una.implicit_reward(logprobs, batch.ref_logprob, beta, batch.offset)
    two, one = [batch.chosen, batch.rejected], torch.cat([batch.binary, batch.scored])
    held = una.anchor_loss(logprobs, batch.ref_logprob)[torch.stack(two)].mean(0)
    pairs = either_way(*(of[rows] for of in (reward, batch.scores) for rows in two))
    return torch.cat([pairs + batch.anchor * held,
                      una.una_score_loss(reward[one], batch.scores[one])])


def rloo_weighted(policy, batch, beta):
    """train.rloo, stored responses weighed by pi/pi_ref: in the mean they stand for fresh ones."""
    rho = train.logprob_in_chunks(policy, batch.tokens, batch.mask) - batch.ref_logprob
    return train.rloo(policy, batch, beta) * rho.exp().where(batch.is_old, 1.0)


def ppo_weighted(policy, batch, beta):
    """train.ppo, whose clipped ratio of a stored response is to pi_ref, which wrote it."""
    if batch.advantages is None:
        train.ppo(policy, batch, beta)                           # notes what is old
        batch.old_logprobs = batch.ref_logprobs.where(batch.is_old[:, None], batch.old_logprobs)
    return train.ppo(policy, batch, beta)


LOSSES = {"own mean": una_online_own, "weighted rloo": rloo_weighted, "weighted ppo": ppo_weighted,
          "undivided": lambda *of: train.grpo(*of, divide=False),
          "undivided, k2": lambda *of: train.grpo(*of, divide=False, k=2),
          "labels": label_chances, "pairs": pair_chances, "mixed": mixed_chances}


# Of f(x) + c that train.py knows no rule for: the rule by which it is made, before it is set.
RULES = {"exact": "zero", "from zero": "learned"}


def method_of(its):
    """The train.Method of a Run: a knob of its cell is a field of the Method, or names a loss."""
    cell, method = dict(its.cell), train.METHODS[its.method]
    cell.pop("collapsed", None)
    loss = LOSSES.get(cell.pop("loss", None), method.loss)
    return method._replace(loss=loss, offset=RULES.get(its.offset, its.offset), **cell)


def collapse(policy, world, steps=300):
    """Trains the policy to answer each prompt by one sentence alone, the likeliest of pi_ref's
    about a wrong noun: what is left of a policy that has lost its way."""
    responses, mask = exact.all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    wrong = world.kinds == exact.KINDS.index("wrong noun")
    rows = world.ref_logprobs.where(wrong, -math.inf).argmax(1)
    tokens, mask = (part.to(policy.wte.weight.device) for part in data.join(
        world.prompts, responses[rows], mask[rows]))
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    for step in range(1, steps + 1):
        train.descend(optimizer, -train.logprob(policy, tokens, mask).mean(), 3e-3, step, steps)


# ---------------------------------------------------------------- one run
def entry(its, settings, prepared):
    """The result of a campaign.Run, a dictionary; prepared is what train.prepare gave."""
    shared, start, best = prepared
    if its.method == "theory":
        n = settings.batch // len(data.TRAIN_PROMPTS)
        return grpo_theory(its, shared.worlds["train"], n)
    if its.method in ("reference", "optimum"):
        told = start if its.method == "reference" else best
        return {name: told[name] for name in told if name not in ("dots", "samples")}
    shared = copy.copy(shared)
    if len(shared.feedback.tokens) != its.judged:
        shared.feedback = train.collect_feedback(settings, its.seed, shared.reference)
    if its.method == "reward model":
        return reward_model(its, settings, shared)
    return trained(its, settings, shared)


def trained(its, settings, shared):
    """What a method reaches. its.points are those of a learning curve beside the reference's."""
    method, feedback = method_of(its), shared.feedback
    beta = method.beta_multiple * settings.beta
    policy, batches, value, offsets = train.begin(method, settings, its.seed, shared)
    world = shared.worlds["train"]
    _, truth = una.optimal_policy(world.ref_logprobs, world.rewards, beta)   # at the loss's beta
    if its.offset == "exact":
        offsets.copy_(truth)
    if its.offset == "from zero":
        offsets.detach().zero_()
    if dict(its.cell).get("collapsed"):
        collapse(policy, world)
    apart = 32 ** (1 / max(1, its.points - 1))                   # geometric, from steps / 32 on
    at = {max(1, round(its.steps / apart ** i)) for i in range(its.points)}
    told = train.measured(method, settings, shared, at, policy, batches, value, offsets)
    if "diverged" in told:
        return told
    if its.offset in ("estimated", "learned", "from zero"):
        told["offset_error"] = (offsets.detach().cpu() - truth).square().mean().sqrt().item()
    if its.method == "kto":                                      # the mean that z_0 cuts off at 0
        few = slice(train.CHUNK)
        rho = train.logprob_in_chunks(policy, feedback.other_tokens[few], feedback.other_mask[few])
        told["other_rho"] = (rho - feedback.other_ref_logprob[few]).mean().item()
    if its.points == 1:
        del told["curve"]
    for name in ("dots", "offsets", "chosen_reward", "rejected_reward"):     # no table has them
        told.pop(name, None)
    return told | dict(method_beta=beta)


def grpo_theory(its, world, n):
    """Where its cell of GRPO stands still, worked out and not trained: "train" in endless groups,
    "grouped" in groups of n. Without division a group's own mean takes 1/n off A, and no more."""
    cell, told = dict(its.cell), {}
    beta, k2 = cell["beta_multiple"] * world.beta, cell.get("loss") == "undivided, k2"
    tilt = (lambda *of: una.optimal_policy(*of)[0]) if k2 else una.k3_optimal_policy
    for name, size in (("train", None), ("grouped", n)):
        if "loss" in cell:
            rewards = world.rewards * (1 - 1 / size if size else 1)
            logprobs = exact.by_token(world, rewards, beta, tilt)
        else:
            logprobs = exact.by_group(world, beta, tilt, size)
        told[name] = exact.evaluate(world, logprobs)
    return told


# ---------------------------------------------------------------- reward models
# A policy can be no better, by the reward that it is trained on, than that reward's own optimum,
# pi_ref e^{r/b} / Z (Eq. 4). A reward model's rewards can be listed as a policy's probabilities
# can. So its optimum is known too; what that loses by the judge is the reward model's doing, what
# an optimiser loses by the reward model is the optimiser's.
BETAS = (0.5, 1, 2, 4, 8)                                        # multiples of the task's


def reward_model(its, settings, shared):
    """The optima of a reward model that its cell trains, one for each of BETAS: what they lost by
    the judge, and how much more reward than pi_ref they have by the model and by the judge."""
    world = shared.worlds["train"]
    model = train.train_reward_model(settings, its.seed, shared.reference, shared.feedback,
                                     dict(its.cell)["learning_rate"])
    rewards = torch.stack([exact.all_rewards(
        model, prompt.to(settings.device), data.MAX_TOKENS, data.EOT).cpu()
        for prompt in world.prompts]).double()
    judged, optima = torch.zeros_like(world.rewards, dtype=torch.bool), []
    list(exact.noting([shared.feedback], world, judged))
    for multiple in BETAS:
        best, _ = una.optimal_policy(world.ref_logprobs, rewards, multiple * world.beta)
        gained = [(exact.expect(best, of) - exact.expect(world.ref_logprobs, of)).mean().item()
                  for of in (rewards, world.rewards)]
        optima.append(dict(beta_multiple=multiple, gained=gained, train=exact.evaluate(
            world, best) | exact.lost_parts(world, best, judged)))
    return dict(optima=optima)
