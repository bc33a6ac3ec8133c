"""How a policy is trained: reference -> feedback -> batches -> losses -> the loop -> the report.

    python train.py                                   every method once, with the settings below
    python train.py --methods una-pair,dpo --seeds 5
    python train.py --help
"""
import copy
import os
import pickle
import random
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import una
from lab import exact, figures, run
from model import GPT, GPTConfig, ScalarGPT, sample


# ---------------------------------------------------------------- the reference
def train_reference(settings, seed):
    """pi_ref: a GPT trained from scratch to make the corpus's responses likely. Frozen."""
    torch.manual_seed(seed)
    config = GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, settings.n_layer, settings.n_head,
                       settings.n_embd)
    model = GPT(config).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    rng = random.Random(seed)
    for step in range(1, settings.reference_steps + 1):
        prompts, responses = data.sentences(256, rng)
        tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(responses))
        loss = -logprob(model, tokens.to(settings.device), mask.to(settings.device)).mean()
        descend(optimizer, loss, 3e-3, step, settings.reference_steps)
        run.show(f"reference | step {step} of {settings.reference_steps} | loss {loss:.3f} nats")
    model.zero_grad()
    return model.requires_grad_(False)


def descend(optimizer, loss, peak, step, steps):
    """Optimiser step `step` of `steps`. The learning rate is its peak times two ramps, one up over
    the first 5% of the steps and one down over all of them; a group of parameters may have `times`
    as much. The gradient is cut to norm 1. FloatingPointError if it or the loss is not finite."""
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}, at step {step} of {steps}")
    rate = peak * min(1.0, step / (0.05 * steps)) * (1 - (step - 1) / steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1)
    optimizer.zero_grad()
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    if not norm.isfinite():
        raise FloatingPointError(f"the gradient's norm is {norm.item()}, at step {step} of {steps}")
    optimizer.step()


# ---------------------------------------------------------------- log-probabilities
def after_prompt(model, tokens):
    """model(tokens) from the prompt's last token on. A prompt is computed once for all of its
    responses, which begin with its cache."""
    prompts, row = tokens[:, :data.PROMPT_TOKENS].unique(dim=0, return_inverse=True)
    cache = []
    last = model(prompts, cache)[:, -1:]
    cache = [tuple(part[row] for part in layer) for layer in cache]
    return torch.cat([last[row], model(tokens[:, data.PROMPT_TOKENS:], cache)], dim=1)


def logprob(model, tokens, mask, of=una.sequence_logprob):
    """log pi(y|x) of each row of tokens, mask (B, 7): (B,), nats. With of=una.token_logprobs that
    of each token of the responses: (B, MAX_TOKENS), 0 where there is none."""
    logits = after_prompt(model, tokens[:, :-1])                 # the last token predicts nothing
    start = data.PROMPT_TOKENS - 1                               # its logits predict the first word
    return of(F.pad(logits, (0, 0, 0, 1)), tokens[:, start:], mask[:, start:])


CHUNK = 2048     # responses at a time, where no gradient is: memory does not grow with their number


@torch.no_grad()
def logprob_in_chunks(model, tokens, mask):
    """logprob of any number of responses."""
    return torch.cat([logprob(model, *chunk)
                      for chunk in zip(tokens.split(CHUNK), mask.split(CHUNK))])


# ---------------------------------------------------------------- stored feedback
def collect_feedback(settings, seed, reference):
    """The training prompts in turn, two responses of the reference to each, feedback on them all.

    A namespace: data.Feedback's tensors; ref_logprob (N,), nats; prompt (N,), the number of each
    response's prompt; offset (N,), f(x) + c, here 0; for KTO's reference point mismatched pairs:
    other_tokens, other_mask (N, 7), other_ref_logprob (N,). Held-out prompts get no feedback.
    """
    prompt = torch.arange(settings.judged) // 2 % len(data.TRAIN_PROMPTS)
    x = data.encode_prompts(data.TRAIN_PROMPTS)[prompt]                                  # (N, 3)
    generator = torch.Generator(settings.device).manual_seed(seed)
    chunks = [sample(reference, chunk, data.MAX_TOKENS, data.EOT, generator)
              for chunk in x.to(settings.device).split(CHUNK)]
    y, mask = (torch.cat(parts).cpu() for parts in zip(*chunks))                         # (N, 4)
    told = vars(data.feedback_on(x, y, mask, torch.Generator().manual_seed(seed), settings.level))
    told |= dict(prompt=prompt, offset=torch.zeros(len(prompt)))
    feedback = SimpleNamespace(**{name: part.to(settings.device) for name, part in told.items()})
    feedback.ref_logprob = logprob_in_chunks(reference, feedback.tokens, feedback.mask)
    other = data.mismatched(feedback.tokens, feedback.mask)
    feedback.other_tokens, feedback.other_mask = other
    feedback.other_ref_logprob = logprob_in_chunks(reference, *other)
    return feedback


# At pi_ref every implicit reward of a prompt is f(x) + c. Where that is the logit of the prompt's
# mean score, the residuals s - sigma(f + c) add up to 0: no response is pushed but against others.
# A few labels may all be 1, whose logit is infinite: their mean is kept within 1e-4 of it.
def start_offsets(method, feedback, beta=None):
    """f(x) + c of each prompt, (X,), in units of reward: by a Method's rule, where training begins.

    Estimated: by Eq. 4 from the prompt's own scored responses, which are pi_ref's. Balanced: as
    above. Learned: it begins balanced. Labels are scores of 0 and 1; of mixed feedback the last
    third has scores. A prompt without any has 0.
    """
    scores = feedback.labels if method.feedback == "binary" else feedback.scores
    first = data.thirds(len(scores))[1] if method.feedback == "mixed" else 0
    offsets = scores.new_zeros(len(data.TRAIN_PROMPTS))
    if method.offset == "zero":
        return offsets
    for x in range(len(offsets)):
        own = scores[first:][feedback.prompt[first:] == x]
        if len(own):
            offsets[x] = (una.estimated_offset(own.logit(), beta) if method.offset == "estimated"
                          else own.mean().logit(1e-4))
    return offsets.requires_grad_(method.offset == "learned")


def train_reward_model(settings, seed, reference, feedback, learning_rate=3e-4):
    """r_phi: Eq. 2 on the pairs, from the reference's weights with a scalar head. Frozen."""
    reward_model = ScalarGPT(reference).to(feedback.tokens.device)
    optimizer = torch.optim.Adam(reward_model.parameters(), betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(seed)
    batches = data.shuffled(feedback.pairs, settings.batch // 2, generator)
    for step in range(1, settings.steps + 1):
        chosen, rejected = (model_reward(reward_model, feedback.tokens[rows], feedback.mask[rows])
                            for rows in next(batches).T)
        loss = una.reward_model_loss(chosen, rejected).mean()
        descend(optimizer, loss, learning_rate, step, settings.steps)
        run.show(f"reward model | step {step} of {settings.steps}")
    reward_model.zero_grad()
    return reward_model.requires_grad_(False)


def model_reward(reward_model, tokens, mask):
    """The reward model's reward, read at each response's last token, (B,)."""
    mask = mask[:, data.PROMPT_TOKENS - 1:]
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return (after_prompt(reward_model, tokens) * last).sum(1)


# ---------------------------------------------------------------- batches
# What a loss is given, of B responses: tokens, mask (B, 7), as data.join's; ref_logprob (B,); and
#     stored   all else that collect_feedback tells of them, offset as it is now, and anchor. Of
#              pairs all chosen responses come first, then all rejected ones, in the same order. Of
#              mixed feedback chosen, rejected, binary and scored say which rows are what.
#     fresh    rewards, scores (B,); per_prompt, how many responses in a row answer one prompt;
#              is_old (B,), which are stored ones; offset, 0; ref_logprobs (B, 4) of the tokens; for
#              ppo the value model, and advantages: None until ppo has made them, and what else has
#              to stay as it was, from its first look.
def stored_batches(method, shared, size, seed, offsets, ramp=0):
    """What a Method learns from for ever, if its feedback is stored; offsets (X,) of the prompts.
    Over the first `ramp` batches f(x) + c moves there, from where it is balanced."""
    start = start_offsets(method._replace(offset="balanced"), shared.feedback)
    for step, batch in enumerate(data.stored_batches(method.feedback, shared.feedback, size, seed)):
        now = start.lerp(offsets, min(1.0, step / ramp)) if ramp else offsets
        batch.offset, batch.anchor = now[batch.prompt], method.anchor
        yield batch


def fresh_batches(policy, value, shared, size, seed, level=0.0, stored=0.0):
    """`size` samples of the policy as it is, rewarded by the judge or by the reward model. Of each
    prompt's samples a share `stored` is replaced by stored responses to it, drawn each time."""
    prompts = data.encode_prompts(data.TRAIN_PROMPTS).to(policy.wte.weight.device)
    generator = torch.Generator(prompts.device).manual_seed(seed)
    per_prompt = size // len(prompts)
    old = round(stored * per_prompt)
    x = prompts.repeat_interleave(per_prompt, 0)                                         # (B, 3)
    is_old = torch.arange(len(x), device=x.device) % per_prompt < old
    while True:
        y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, generator)
        tokens, mask = data.join(x, y, y_mask)
        if old:
            own = [(shared.feedback.prompt == i).nonzero().flatten() for i in range(len(prompts))]
            rows = torch.cat([mine[torch.randint(len(mine), (old,), generator=generator,
                                                 device=x.device)] for mine in own])
            tokens[is_old], mask[is_old] = shared.feedback.tokens[rows], shared.feedback.mask[rows]
        with torch.no_grad():
            ref_logprobs = logprob(shared.reference, tokens, mask, una.token_logprobs)
            if shared.reward_model:
                rewards = model_reward(shared.reward_model, tokens, mask)
            else:
                rewards = data.reward(x, tokens[:, data.PROMPT_TOKENS:])
                rewards = (rewards + data.prompt_level(x, level)).to(x.device)
        yield SimpleNamespace(tokens=tokens, mask=mask, rewards=rewards, per_prompt=per_prompt,
                              scores=una.implicit_score(rewards), is_old=is_old, offset=0.0,
                              ref_logprobs=ref_logprobs, ref_logprob=ref_logprobs.sum(1),
                              value=value, advantages=None)


# ---------------------------------------------------------------- losses
# A loss takes the policy, a batch and the beta of its method, and returns one value per example.
def implicit_reward(policy, batch, beta):
    """Eq. 6: beta log pi/pi_ref + f(x) + c, (B,)."""
    return una.implicit_reward(logprob(policy, batch.tokens, batch.mask), batch.ref_logprob, beta,
                               batch.offset)


def una_pair(policy, batch, beta):
    """Eq. 10, and batch.anchor times what holds the mass."""
    logprobs = logprob(policy, batch.tokens, batch.mask)
    chosen, rejected = una.implicit_reward(logprobs, batch.ref_logprob, beta).chunk(2)
    held = una.anchor_loss(logprobs, batch.ref_logprob).view(2, -1).mean(0)
    return una.una_pair_loss(chosen, rejected) + batch.anchor * held


def una_binary_mse(policy, batch, beta):
    """Eq. 11."""
    return una.una_binary_loss(implicit_reward(policy, batch, beta), batch.labels, g="mse")


def una_binary_bce(policy, batch, beta):
    """Eq. 12."""
    return una.una_binary_loss(implicit_reward(policy, batch, beta), batch.labels, g="bce")


def una_score(policy, batch, beta):
    """Eq. 13; on fresh samples Eq. 9."""
    return una.una_score_loss(implicit_reward(policy, batch, beta), batch.scores)


def una_reward(policy, batch, beta):
    """Eq. 7 on stored rewards: those that the scores are of."""
    return una.una_reward_loss(implicit_reward(policy, batch, beta), batch.scores.logit())


def una_mixed(policy, batch, beta):
    """Eq. 10, 11 and 13 in one: each pair, label and score weighs alike; pairs have an anchor."""
    logprobs = logprob(policy, batch.tokens, batch.mask)
    reward = una.implicit_reward(logprobs, batch.ref_logprob, beta, batch.offset)
    held = una.anchor_loss(logprobs, batch.ref_logprob)
    pairs = una.una_pair_loss(reward[batch.chosen], reward[batch.rejected])
    pairs = pairs + batch.anchor * (held[batch.chosen] + held[batch.rejected]) / 2
    binary = una.una_binary_loss(reward[batch.binary], batch.labels[batch.binary], g="mse")
    scores = una.una_score_loss(reward[batch.scored], batch.scores[batch.scored])
    return torch.cat([pairs, binary, scores])


def dpo(policy, batch, beta):
    """Eq. 5."""
    chosen, rejected = logprob(policy, batch.tokens, batch.mask).chunk(2)
    return una.dpo_loss(chosen, rejected, *batch.ref_logprob.chunk(2), beta)


def kto(policy, batch, beta):
    """KTO, its reference point from the same prompts with the responses to others."""
    own = logprob(policy, batch.tokens, batch.mask)
    with torch.no_grad():
        other = logprob(policy, batch.other_tokens, batch.other_mask)
    return una.kto_loss(own, batch.ref_logprob, batch.labels, other, batch.other_ref_logprob, beta)


def una_online(policy, batch, beta):
    """Eq. 7 on fresh samples, with the mean residual of a prompt's samples for f(x) + c. On fresh
    ones it takes out most of the noise; on stored ones among them it is the right one."""
    reward = implicit_reward(policy, batch, beta)
    residual = (batch.rewards - reward).detach().view(-1, batch.per_prompt)      # prompt by prompt
    offset = residual.mean(1, keepdim=True).expand_as(residual)                  # f(x) + c
    return una.una_reward_loss(reward + offset.flatten(), batch.rewards)


def rloo(policy, batch, beta):
    """Eq. 3 by REINFORCE, with the mean of the prompt's other samples for a baseline."""
    return una.rloo_loss(logprob(policy, batch.tokens, batch.mask), batch.ref_logprob,
                         batch.rewards, batch.per_prompt, beta)


def grpo(policy, batch, beta, divide=True, k=3):
    """GRPO, one step on a batch, so that every ratio is 1; divide and k as in una.py."""
    logprobs = logprob(policy, batch.tokens, batch.mask, una.token_logprobs)     # (B, 4)
    return una.grpo_loss(logprobs, logprobs.detach(), batch.ref_logprobs,
                         una.grpo_advantages(batch.rewards, batch.per_prompt, divide),
                         batch.mask[:, data.PROMPT_TOKENS:], beta, PPO_CLIP, k)


def ppo(policy, batch, beta):
    """Eq. 3 by PPO: the policy's loss and the value model's. What is old is frozen at the first
    step on a batch, while pi is the policy that sampled it."""
    response = batch.mask[:, data.PROMPT_TOKENS:]
    logprobs = logprob(policy, batch.tokens, batch.mask, una.token_logprobs)     # (B, 4)
    values = after_prompt(batch.value, batch.tokens[:, :-1])     # (B, 4): before each token
    if batch.advantages is None:
        batch.old_logprobs, batch.old_values = logprobs.detach(), values.detach()
        rewards = una.ppo_token_rewards(batch.rewards, batch.old_logprobs, batch.ref_logprobs,
                                        response, beta)
        advantages, batch.targets = una.ppo_advantages(rewards, batch.old_values, response,
                                                       PPO_LAMBDA)
        batch.advantages = advantages - advantages[response].mean()
    return (una.ppo_policy_loss(logprobs, batch.old_logprobs, batch.advantages, response, PPO_CLIP)
            + una.ppo_value_loss(values, batch.old_values, batch.targets, response, PPO_CLIP))


# ---------------------------------------------------------------- the methods
class Method(NamedTuple):
    feedback: str               # pairs, binary, scores, mixed: stored; fresh: the policy's samples
    loss: Callable
    learning_rate: float
    beta_multiple: float        # of the task's beta: what the loss has for beta
    offset: str = "zero"        # f(x) + c: zero, estimated or learned, one number a prompt
    ramp: float = 0.0           # share of the steps in which an estimate is moved to
    anchor: float = 0.0         # what KL(pi_ref || pi) costs beside a loss of pairs
    stored: float = 0.0         # share of the samples that are stored responses of pi_ref
    epochs: int = 1             # optimiser steps on each batch
    value_model: bool = False   # is one trained beside the policy?


# The settings are the best cells of the grids of lab/stored.py and lab/online.py.
OFFSET_TIMES = 10          # a learned f(x) + c has this multiple of the weights' learning rate
PPO_CLIP, PPO_LAMBDA = 0.2, 1.0                     # of ratio and value; of advantages
METHODS = {
    "una-pair": Method("pairs", una_pair, 1e-3, 4),
    "una-pair-anchored": Method("pairs", una_pair, 2e-3, 1, anchor=0.01),
    "una-binary-mse": Method("binary", una_binary_mse, 4e-3, 0.03125),
    "una-binary-bce": Method("binary", una_binary_bce, 2e-3, 0.03125),
    "una-binary-learned": Method("binary", una_binary_bce, 2e-3, 0.5, "learned"),
    "una-score": Method("scores", una_score, 1e-3, 0.0625),
    "una-score-estimated": Method("scores", una_score, 1.6e-2, 1, "estimated", ramp=0.5),
    "una-score-learned": Method("scores", una_score, 2e-3, 1, "learned"),
    "una-reward-estimated": Method("scores", una_reward, 1.6e-2, 1, "estimated", ramp=0.5),
    "una-mixed": Method("mixed", una_mixed, 2e-3, 0.03125),
    "una-mixed-estimated": Method("mixed", una_mixed, 8e-3, 1, "estimated", 0.5, 0.003),
    "dpo": Method("pairs", dpo, 1e-3, 4),
    "kto": Method("binary", kto, 2e-3, 0.125),
    "una-online": Method("fresh", una_online, 1.2e-2, 1),
    "una-online-stored": Method("fresh", una_online, 1.2e-2, 1, stored=0.25),
    "una-online-score": Method("fresh", una_score, 2e-3, 0.5),
    "rloo": Method("fresh", rloo, 1.2e-2, 1),
    "grpo": Method("fresh", grpo, 1.2e-2, 2),
    "ppo": Method("fresh", ppo, 3e-3, 1, value_model=True),
}


# ---------------------------------------------------------------- the loop
def align(method, policy, batches, beta, steps, value=None, offsets=None, look=None, at=()):
    """Trains the policy by a Method, and with it PPO's value model, or offsets to be learned.

    After the steps in `at`, look(step, seconds, loss) is called, on its own time. Returns first
    and last loss, seconds, and state_bytes: weights, gradients and optimiser state of what is
    trained. FloatingPointError where that leaves the numbers.
    """
    trained = [*policy.parameters(), *(value.parameters() if value else [])]
    groups = [dict(params=trained)]
    if offsets is not None and offsets.requires_grad:
        trained = [*trained, offsets]
        groups.append(dict(params=[offsets], times=OFFSET_TIMES))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    start_loss, began = None, time.perf_counter()
    for step in range(1, steps + 1):
        batch = next(batches)
        for _ in range(method.epochs):
            loss = method.loss(policy, batch, beta).mean()
            start_loss = loss.item() if start_loss is None else start_loss
            descend(optimizer, loss, method.learning_rate, step, steps)
        last_loss = loss.item()                                  # waits for the device
        seconds = time.perf_counter() - began
        run.show(f"{method.loss.__name__} | step {step} of {steps} | loss {last_loss:.4f} (at "
                 f"start {start_loss:.4f}) | {seconds / step * (steps - step):.0f} s left")
        if step in at:
            look(step, seconds, last_loss)
            began = time.perf_counter() - seconds
    state = [part for parts in optimizer.state.values() for part in parts.values()]
    return dict(start_loss=start_loss, loss=last_loss, seconds=seconds,
                state_bytes=sum(t.nbytes for t in [*trained, *(p.grad for p in trained), *state]))


# ---------------------------------------------------------------- a seed, and a method on it
def prepare(settings, seed):
    """What all methods of a seed share, and the entries of pi_ref and of pi* in results.json.

    Shared is a namespace: reference, feedback, reward_model (or None), worlds, an exact.World each
    of the training and of the held-out prompts.
    """
    reference = train_reference(settings, seed)
    feedback, reward_model = collect_feedback(settings, seed, reference), None
    if settings.reward == "model":
        reward_model = train_reward_model(settings, seed, reference, feedback)
    worlds = {split: exact.World(reference, prompts, settings.beta, settings.level)
              for split, prompts in (("train", data.TRAIN_PROMPTS),
                                     ("heldout", data.HELDOUT_PROMPTS))}
    start, best = exact.reference_and_optimum(worlds)
    save_weights(settings, f"reference-{seed}", reference)
    start = dict(method="reference", seed=seed, **start, samples=example_responses(reference, seed))
    return (SimpleNamespace(reference=reference, feedback=feedback, reward_model=reward_model,
                            worlds=worlds), start, dict(method="optimum", seed=seed, **best))


def begin(method, settings, seed, shared):
    """What `measured` needs of a method: a policy that is pi_ref yet, the batches for it, PPO's
    value model and f(x) + c of the training prompts (X,), each None where there is none."""
    policy, offsets = copy.deepcopy(shared.reference).requires_grad_(True), None
    value = ScalarGPT(policy).to(settings.device) if method.value_model else None
    if method.feedback == "fresh":
        batches = fresh_batches(policy, value, shared, settings.batch, seed, settings.level,
                                method.stored)
    else:
        offsets = start_offsets(method, shared.feedback, method.beta_multiple * settings.beta)
        batches = stored_batches(method, shared, settings.batch, seed, offsets,
                                 round(method.ramp * settings.steps))
    return policy, batches, value, offsets


def measured(method, settings, shared, at, policy, batches, value, offsets):
    """Trains what `begin` gave and says what that reached: figures of an entry in results.json.

    at: the steps of the curve. A run that leaves the numbers has only "diverged", which says why.
    """
    world, heldout = shared.worlds["train"], shared.worlds["heldout"]
    beta = method.beta_multiple * settings.beta
    judged = torch.zeros_like(world.rewards, dtype=torch.bool)   # (X, Y): what it learned from
    told, curve = {}, [point(0, 0.0, exact.evaluate(world, world.ref_logprobs))]

    def reached(world):
        logprobs = exact.policy_logprobs(policy, world.prompts)
        return exact.evaluate(world, logprobs) | dict(mass=exact.masses(world, logprobs)), logprobs

    def look(step, seconds, loss):
        its, logprobs = reached(world)
        told["train"] = its | exact.lost_parts(world, logprobs, judged)
        told["dots"] = exact.reward_dots(world, logprobs)
        curve.append(point(step, seconds, told["train"], loss=loss))

    try:
        told |= align(method, policy, exact.noting(batches, world, judged), beta, settings.steps,
                      value, offsets, look, at)
        told["heldout"], _ = reached(heldout)
    except FloatingPointError as error:
        return dict(diverged=str(error))
    if method.feedback == "fresh":
        frozen = [model for model in (shared.reference, shared.reward_model) if model]
        told["state_bytes"] += sum(p.nbytes for model in frozen for p in model.parameters())
    else:
        feedback = shared.feedback
        pairs = data.take(feedback, feedback.pairs[:CHUNK // 2].T.flatten())
        with torch.no_grad():                                    # apart: under DPO both may fall
            chosen, rejected = implicit_reward(policy, pairs, beta).chunk(2)
            # Over pi_ref's responses this estimates -KL(pi_ref || pi). It falls as pi sharpens, and
            # where probability leaves what was judged.
            rho = implicit_reward(policy, data.take(feedback, slice(CHUNK)), beta=1)
        told |= dict(chosen_reward=chosen.mean().item(), rejected_reward=rejected.mean().item(),
                     mean_rho=rho.mean().item(), offsets=offsets.tolist())
    return told | dict(curve=curve)


def run_method(settings, seed, name, shared):
    """One run of a method on what it shares with the others: its entry in results.json."""
    method, at = METHODS[name], {settings.steps}
    if method.feedback == "fresh":                               # whose curve is drawn
        at |= {settings.steps >> i for i in range(1, 6) if settings.steps >> i >= 10}
    policy, *more = begin(method, settings, seed, shared)
    told = measured(method, settings, shared, at, policy, *more)
    if "diverged" not in told:
        told["samples"] = example_responses(policy, seed)
        save_weights(settings, f"{name}-{seed}", policy)
    return dict(method=name, seed=seed, beta=settings.beta, learning_rate=method.learning_rate,
                method_beta=method.beta_multiple * settings.beta) | told


def point(step, seconds, reached, **more):
    """A point of a learning curve, from exact.evaluate's figures."""
    return dict(step=step, seconds=seconds, objective=reached["objective"],
                regret=reached["regret"], **more)


def example_responses(model, seed):
    """Three responses to a training prompt and to a held-out one: {prompt: texts}."""
    examples = [data.TRAIN_PROMPTS[0], data.HELDOUT_PROMPTS[0]]
    x = data.encode_prompts(examples).to(model.wte.weight.device)
    y, mask = sample(model, x.repeat_interleave(3, 0), data.MAX_TOKENS, data.EOT,
                     torch.Generator(x.device).manual_seed(seed))
    texts = [data.decode_response(*row) for row in zip(y, mask)]
    return dict(zip(examples, (texts[:3], texts[3:])))


def save_weights(settings, name, model):
    state = dict(config=vars(model.config), weights=model.state_dict())
    if settings.out:
        run.save(os.path.join(settings.out, f"{name}.pt"), lambda path: torch.save(state, path))


# ---------------------------------------------------------------- the whole run
DEVICES = dict(cuda=torch.cuda.is_available, mps=torch.backends.mps.is_available, cpu=lambda: True)
NUMBERS = (  # flag, default, least, most, what it is
    ("seeds", 1, 1, 10**6, "runs of each method, each with its own reference and feedback"),
    ("seed", 0, 0, 2**32, "the first seed; the others follow it"),
    ("beta", 0.25, 1e-4, 1e6, "the task's: price of a nat of KL, in units of reward"),
    ("steps", 400, 1, 10**9, "alignment steps of every method, a batch each"),
    ("batch", 192, 2, 10**9, "responses per alignment step"),
    ("judged", 0, 0, 10**9, "stored responses with feedback; 0: steps x batch, each seen once"),
    ("level", 0.0, 0, 4, "adds LEVEL x (-1, -1/3, 1/3, 1) to a prompt's rewards, by its noun"),
    ("reference-steps", 500, 1, 10**9, "steps of the reference, 256 sentences each"),
    ("n-layer", 2, 1, 10**4, "layers of the GPT"),
    ("n-head", 4, 1, 10**4, "attention heads of each layer"),
    ("n-embd", 64, 1, 10**6, "width of the GPT"),
    ("jobs", 0, 0, 10**4, "methods side by side; 0: one a core, six on a GPU. No figure changes"))
QUICK = dict(steps=60, reference_steps=200, n_layer=1, n_embd=32)


def parse(arguments=None):
    """Settings, a namespace, from the command line. A mistake is one line, and status 2."""
    parser = run.Parser("train.py", description="UNA on a toy task whose optimum is known.")
    for name, default, _, _, words in NUMBERS:
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{words} [{default}]")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,NAME",
                        help="some of " + ", ".join(METHODS))
    parser.add_argument("--reward", default="judge", choices=("judge", "model"),
                        help="who rewards fresh samples [judge]")
    parser.add_argument("--device", default=next(name for name in DEVICES if DEVICES[name]()),
                        choices=DEVICES, help="where to compute [%(default)s]")
    parser.add_argument("--out", default="out/toy", help="folder for all that is written [out/toy]")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**QUICK)
    given = parser.parse_args(arguments)
    for name, _, least, most, _ in NUMBERS:
        if not least <= (value := getattr(given, name.replace("-", "_"))) <= most:
            parser.error(f"--{name} must be from {least:g} to {most:g}, got {value}")
    given.methods = given.methods.split(",")
    for name in given.methods:
        if name not in METHODS or given.methods.count(name) > 1:
            parser.error(f"--methods: {name!r} stands twice, or is none of {', '.join(METHODS)}")
    prompts = len(data.TRAIN_PROMPTS)
    online = [name for name in given.methods if METHODS[name].feedback == "fresh"]
    if online and (given.batch % prompts or given.batch < 2 * prompts):
        parser.error(f"--batch {given.batch} must be 2, 3, ... times {prompts}: {online[0]} "
                     "answers as many prompts at each step, each as often")
    given.judged = given.judged or max(24, given.steps * given.batch // 2 * 2)
    if given.judged < 24 or given.judged % 2:
        parser.error(f"--judged must be even and at least 24, got {given.judged}")
    if given.n_embd % given.n_head:
        parser.error(f"--n-embd {given.n_embd} is not a multiple of --n-head {given.n_head}")
    if not DEVICES[given.device]():
        parser.error(f"--device {given.device}: there is no such device here")
    given.jobs = given.jobs or dict(cpu=run.cores(), cuda=6, mps=1)[given.device]
    return given


# What a seed's methods share goes to their processes as bytes, of which one copy waits for all.
def prepare_for_all(settings, seed):
    shared, *entries = prepare(settings, seed)
    return pickle.dumps(shared), *entries


def run_on(settings, seed, name, shared):
    return run_method(settings, seed, name, pickle.loads(shared))


def main(arguments=None):
    """Every method on every seed, side by side; results.json after each. Returns the status."""
    settings, started = parse(arguments), time.perf_counter()
    torch.set_num_threads(1)                                     # more are slower at this size
    seeds = range(settings.seed, settings.seed + settings.seeds)
    order, runs = ["reference", *settings.methods, "optimum"], []
    path = os.path.join(settings.out, "results.json")
    results = dict(settings=vars(settings), versions=run.versions(), reference=[], optimum=[],
                   runs=[])

    def keep(kind, entry):
        if entry["seed"] != settings.seed:
            entry.pop("dots", None)                              # one seed's picture is enough
        results[kind].append(entry)
        results[kind].sort(key=lambda entry: (entry["seed"], order.index(entry["method"])))
        run.write_json(path, results)

    try:
        os.makedirs(settings.out, exist_ok=True)
        run.write_json(path, results)
        for (*_, seed), (shared, start, best) in run.side_by_side(
                [(prepare_for_all, settings, seed) for seed in seeds], settings.jobs):
            keep("reference", start)
            keep("optimum", best)
            run.say(f"seed {seed}: reference, feedback and optimum are there")
            # The slowest methods stand last in the table and begin first: no core waits for long.
            runs += [(run_on, settings, seed, name, shared) for name in reversed(settings.methods)]
        for _, entry in run.side_by_side(runs, settings.jobs):
            keep("runs", entry)
            run.say(figures.line(entry))
        figures.draw_all(results, settings.out)
    except KeyboardInterrupt:
        run.say(f"train.py: interrupted. {len(results['runs'])} runs have ended: {path}")
        return 130
    except OSError as error:                                     # no room, or no right to write
        run.say(f"train.py: --out {settings.out}: {error}")
        return 2
    run.say(figures.report(results), sys.stdout)
    run.say(f"{time.perf_counter() - started:.0f} s, {settings.jobs} at a time: {path}")
    return 1 if any("diverged" in entry for entry in results["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
