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
from model import sample


# ---------------------------------------------------------------- losses
def una_online_own(policy, batch, beta):
    """train.una_online, with the mean residual of the policy's own samples alone."""
    reward, n = train.implicit_reward(policy, batch, beta), batch.per_prompt
    residual = (batch.rewards - reward).detach().where(~batch.is_old, math.nan).view(-1, n)
    offset = residual.nanmean(1).repeat_interleave(n)
    return una.una_reward_loss(reward + offset, batch.rewards)


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


def grpo_undivided(k):
    """train.grpo without the division by the spread of rewards, k for the KL's estimate."""
    def loss(policy, batch, beta):
        logprobs = train.logprob(policy, batch.tokens, batch.mask, una.token_logprobs)
        advantages = una.grpo_advantages(batch.rewards, batch.per_prompt, divide=False)
        return una.grpo_loss(logprobs, logprobs.detach(), batch.ref_logprobs, advantages,
                             batch.mask[:, data.PROMPT_TOKENS:], beta, train.PPO_CLIP, k)
    return loss


LOSSES = {"own mean": una_online_own, "weighted rloo": rloo_weighted, "weighted ppo": ppo_weighted,
          "undivided": grpo_undivided(3), "undivided, k2": grpo_undivided(2)}


def method_of(its):
    """The train.Method of a Run: a knob of its cell is a field of the Method, or names a loss."""
    cell, method = dict(its.cell), train.METHODS[its.method]
    cell.pop("collapsed", None)
    loss = LOSSES.get(cell.pop("loss", None), method.loss)
    return method._replace(loss=loss, offset=its.offset, **cell)


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


def given_offsets(its, shared, beta):
    """f(x) + c of each training prompt, (X,), where train.py's rules do not give it; else None.
    exact: beta log Z(x) at the loss's own beta, whose optimum it is. from zero: learned from 0."""
    truth = beta_log_z(shared, beta).float().to(shared.feedback.scores.device)
    return {"exact": truth, "from zero": torch.zeros_like(truth).requires_grad_()}.get(its.offset)


def beta_log_z(shared, beta):
    world = shared.worlds["train"]
    return una.optimal_policy(world.ref_logprobs, world.rewards, beta)[1]


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
    """What a method reaches: all figures, or with look "lost" that alone.

    its.points are those of a learning curve.
    """
    method, curve = method_of(its), []
    world, heldout = shared.worlds["train"], shared.worlds["heldout"]
    beta, fresh = method.beta_multiple * settings.beta, method.feedback == "fresh"
    policy, batches, value, offsets = train.begin(method, settings, its.seed, shared,
                                                  given_offsets(its, shared, beta))
    if dict(its.cell).get("collapsed"):
        collapse(policy, world)
    judged = torch.zeros_like(world.rewards, dtype=torch.bool)
    batches = exact.noting(batches, world, judged)

    def look(step, seconds, loss):
        logprobs = exact.policy_logprobs(policy, world.prompts)
        told["train"] = exact.evaluate(world, logprobs) | exact.lost_parts(
            world, logprobs, judged) | dict(mass=exact.masses(world, logprobs))
        curve.append(train.point(step, seconds, told["train"], loss=loss,
                                 mass=told["train"]["mass"]))

    told, apart = {}, 32 ** (1 / max(1, its.points - 1))         # geometric, from steps / 32 on
    at = {max(1, round(its.steps / apart ** i)) for i in range(its.points)}
    zeros, loss = counting(method.loss) if its.look == "zeros" else (None, method.loss)
    try:
        if its.look != "lost":
            look(0, 0.0, None)
        told |= train.align(method._replace(loss=loss), policy, batches, beta, its.steps, value,
                            offsets, look, at)
        if its.look != "lost":
            logprobs = exact.policy_logprobs(policy, heldout.prompts)
            told["heldout"] = exact.evaluate(heldout, logprobs) | dict(
                mass=exact.masses(heldout, logprobs))
    except FloatingPointError as error:
        return dict(diverged=str(error))
    if its.look == "lost":
        return dict(train=dict(lost=told["train"]["lost"]))
    if its.look == "zeros":
        told["zeros"] = sum(zeros)
    if not fresh:
        told["mean_rho"] = train.mean_rho(policy, shared.feedback)
    if its.offset in ("estimated", "learned", "from zero"):
        error = offsets.detach().cpu() - beta_log_z(shared, beta)
        told |= dict(offsets=offsets.tolist(), offset_error=error.square().mean().sqrt().item())
    if fresh:
        told["state_bytes"] += train.frozen_bytes(shared)
    if fresh and shared.reward_model:
        told["reward_model"] = dict(accuracy=accuracy(shared, its.seed))
    return told | dict(curve=curve, method_beta=beta)


def grpo_theory(its, world, n):
    """Where its cell of GRPO stands still, worked out and not trained: "train" in endless groups,
    "grouped" in groups of n. Without division a group's own mean takes 1/n off A, and no more."""
    cell, told, tilt = dict(its.cell), {}, una.k3_optimal_policy
    beta = cell["beta_multiple"] * world.beta
    if cell.get("loss") == "undivided, k2":
        def tilt(*of):
            return una.optimal_policy(*of)[0]
    for name, size in (("train", None), ("grouped", n)):
        if "loss" in cell:
            rewards = world.rewards * (1 - 1 / size if size else 1)
            logprobs = exact.by_token(world, rewards, beta, tilt)
        else:
            logprobs = exact.by_group(world, beta, tilt, size)
        told[name] = exact.evaluate(world, logprobs)
    return told


def counting(loss):
    """A list, and kto's loss that notes in it for each batch whether z_0 is 0."""
    zeros = []

    def counted(policy, batch, beta):
        other = train.logprob_in_chunks(policy, batch.other_tokens, batch.other_mask)
        zeros.append((other - batch.other_ref_logprob).mean().item() <= 0)
        return loss(policy, batch, beta)
    return zeros, counted


# ---------------------------------------------------------------- reward models
# A policy can be no better, by the reward that it is trained on, than that reward's own optimum,
# pi_ref e^{r/b} / Z (Eq. 4). A reward model's rewards can be listed as a policy's probabilities
# can. So its optimum is known too; what that loses by the judge is the reward model's doing, what
# an optimiser loses by the reward model is the optimiser's.
BETAS = tuple(2.0 ** power for power in range(-2, 7))  # of the optimum, in multiples of the task's


def optima(world, rewards):
    """[[multiple of beta, lost by the World's own measure of the optimum of rewards (X, Y)]]."""
    return [[multiple, exact.evaluate(world, una.optimal_policy(
        world.ref_logprobs, rewards, multiple * world.beta)[0])["lost"]] for multiple in BETAS]


def reward_model(its, settings, shared):
    """The optima of a reward model, trained by its cell; with look "lost" on four prompts alone.

    Else also the reference and the model's own optimum at the cell's beta, measured by the judge
    ("train") and by the model ("by_model").
    """
    cell, world = dict(its.cell), shared.worlds["train"]
    if its.look == "lost":
        world = part_of(world, slice(None, None, 3))             # a prompt of each mood
    shared.reward_model = train.train_reward_model(
        settings, its.seed, shared.reference, shared.feedback, cell["learning_rate"])
    rewards = torch.stack([exact.all_rewards(
        shared.reward_model, prompt.to(settings.device), data.MAX_TOKENS, data.EOT).cpu()
        for prompt in world.prompts]).double()
    told = dict(optima=optima(world, rewards))
    if its.look == "lost":
        return told
    by_model = as_rewarded(world, rewards, cell["beta_multiple"] * world.beta)
    best = una.optimal_policy(world.ref_logprobs, rewards, by_model.beta)[0]
    judged = torch.zeros_like(world.rewards, dtype=torch.bool)
    list(exact.noting([shared.feedback], world, judged))
    for name, logprobs in (("reference", world.ref_logprobs), ("optimum", best)):
        told[name] = dict(train=exact.evaluate(world, logprobs),
                          by_model=exact.evaluate(by_model, logprobs))
    told["optimum"]["train"] |= exact.lost_parts(world, best, judged)
    return told


def part_of(world, rows):
    """A World of some of its prompts."""
    part = copy.copy(world)
    for name in ("prompts", "rewards", "ref_logprobs", "optimum", "gain", "kinds",
                 "value_logprobs"):
        setattr(part, name, getattr(world, name)[rows])
    return part


def as_rewarded(world, rewards, beta):
    """The World of the same prompts where rewards (X, Y) are given, and a nat costs beta."""
    other = copy.copy(world)
    other.rewards, other.beta = rewards, beta
    other.values = other.value_logprobs = None                   # there are too many
    other.optimum = una.optimal_policy(world.ref_logprobs, rewards, beta)[1]
    other.gain = other.optimum - exact.expect(world.ref_logprobs, rewards)
    return other


@torch.no_grad()
def accuracy(shared, seed):
    """How often the reward model orders two samples of the reference as the judge does, among some
    2000 such twos, where the judge prefers one of them."""
    prompts = shared.worlds["train"].prompts.to(shared.feedback.tokens.device)
    x = prompts.repeat_interleave(4096 // len(prompts) // 2 * 2, 0)        # even: in twos
    y, mask = sample(shared.reference, x, data.MAX_TOKENS, data.EOT,
                     torch.Generator(x.device).manual_seed(seed))
    by_model = train.model_reward(shared.reward_model, *data.join(x, y, mask)).cpu()
    model_gap, judge_gap = (rewards[0::2] - rewards[1::2] for rewards in (
        by_model, data.reward(x, y)))
    return (model_gap * judge_gap > 0)[judge_gap.abs() > 1e-6].float().mean().item()
