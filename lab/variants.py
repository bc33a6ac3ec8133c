"""What the claims train beyond train.py: other f(x) + c, and methods whose noise is measured.

A variant is a method with a rule for f(x) + c, on prompts of some level, rewarded by the judge or
by a reward model. A cell is what its grid sets: {name of a knob: value}.
"""
import copy
import functools
import math
from typing import NamedTuple

import torch

import train
import una
from lab import exact
from model import ScalarGPT

# The methods that the claims compare. Another one in train.METHODS changes nothing here.
COMPARED = ("una-pair", "una-binary-mse", "una-binary-bce", "una-binary-offset", "una-score",
            "una-score-offset", "una-reward-offset", "una-mixed", "dpo", "kto",
            "una-online", "una-online-score", "ppo")


class Variant(NamedTuple):
    """zero as in the paper; estimated, learned: as train.Method's; exact: beta log Z(x);
    constant: its mean over the prompts; residual: the mean of r - beta rho over the responses to
    the same prompt in the batch; held: the same as a constant, without its gradient."""
    method: str
    offset: str = "zero"
    level: float = 0.0
    reward: str = "judge"


# ---------------------------------------------------------------- f(x) + c of stored feedback
def beta_log_z(world, beta):
    """Of each prompt, at the loss's own beta: its optimum is that beta's. (P,)."""
    return una.optimal_policy(world.ref_logprobs, world.rewards, beta)[1]


def given_offsets(offset, world, beta):
    """f(x) + c of each training prompt where the truth is told, else None."""
    if offset not in ("exact", "constant"):
        return None
    truth = beta_log_z(world, beta).float()
    return truth if offset == "exact" else truth.mean().expand_as(truth)


def mean_residual(reward, batch):
    """The mean of r - beta rho over the responses to the same prompt in the batch, (B,)."""
    residual = batch.scores.logit() - reward
    same = batch.prompt[:, None] == batch.prompt                                         # (B, B)
    return (same * residual).sum(1) / same.sum(1)


def una_score_residual(policy, batch, beta, held=False):
    """Eq. 13, with f(x) + c the mean residual."""
    reward = train.implicit_reward(policy, batch, beta)
    offset = mean_residual(reward, batch)
    return una.una_score_loss(reward + (offset.detach() if held else offset), batch.scores)


def una_reward_residual(policy, batch, beta):
    """Eq. 7 on stored rewards, with f(x) + c the mean residual."""
    reward = train.implicit_reward(policy, batch, beta)
    return una.una_reward_loss(reward + mean_residual(reward, batch), batch.scores.logit())


METHODS = train.METHODS | {"una-reward": train.Method("scores", train.una_reward, 1e-3, 1)}
LOSSES = {("una-score", "residual"): una_score_residual,
          ("una-score", "held"): functools.partial(una_score_residual, held=True),
          ("una-reward", "residual"): una_reward_residual}


def method_of(variant, cell):
    """The train.Method of a variant in a cell."""
    method = METHODS[variant.method]
    loss = LOSSES.get((variant.method, variant.offset), method.loss)
    options = {knob: value for knob, value in cell.items() if knob not in method._fields}
    if options:                                                  # the others are the loss's own
        loss = functools.partial(loss, **options)
    rest = {knob: value for knob, value in cell.items() if knob not in options}
    return method._replace(loss=loss, offset=variant.offset, **rest)


# ---------------------------------------------------------------- what is looked at
class Glance(exact.Observer):
    """An Observer that measures regret alone: all that tuning needs."""

    def __call__(self, step, seconds, loss, policy):
        world = self.worlds["train"]
        self.reached = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
        self.curve.append(self.point(step, seconds, self.reached) | dict(loss=loss))

    def report(self):
        return dict(train=self.reached, curve=self.curve)


def gradient_noise(losses, parameters, batches=8):
    """The gradient's variance from batch to batch, summed over the parameters.

    losses yields the losses (B,) of one batch after the other.
    """
    gradients = [torch.autograd.grad(next(losses).mean(), parameters) for _ in range(batches)]
    flat = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients])
    return flat.var(0).sum().item()


class NoiseObserver(exact.Observer):
    """An Observer that also measures the noise of an online method's first inner step.

    It does so on copies, with samples from a stream of its own, so that training never feels it.
    """

    def __init__(self, method, shared, settings, seed):
        super().__init__(shared.worlds, shared.start, settings.steps)
        self.method, self.seen_value = method, None
        self.policy = copy.deepcopy(shared.reference).requires_grad_(True)
        self.value = ScalarGPT(shared.reference).to(settings.device)
        batches = train.fresh_batches(self.policy, self.value, shared, settings.batch,
                                      seed + 10**6, settings.level)
        self.losses = (method.loss(self.policy, batch, method.beta * settings.beta)
                       for batch in batches)
        self.measure()

    def loss(self, policy, batch, beta):
        """The method's own. Its batches are where PPO's value model is to be seen."""
        self.seen_value = batch.value
        return self.method.loss(policy, batch, beta)

    def measure(self):
        noise = gradient_noise(self.losses, [*self.policy.parameters()])
        if not math.isfinite(noise):
            raise FloatingPointError(f"the gradient's noise is {noise}")
        self.curve[-1]["gradient_noise"] = noise

    def __call__(self, step, seconds, loss, policy):
        super().__call__(step, seconds, loss, policy)
        self.policy.load_state_dict(policy.state_dict())
        if self.seen_value is not None:
            self.value.load_state_dict(self.seen_value.state_dict())
        self.measure()


# ---------------------------------------------------------------- one run, and what it needs
def shared_by(settings, seed, path):
    """What train.prepare saved at path, with feedback of another size."""
    shared = copy.copy(train.load(path))
    if len(shared.feedback.tokens) != settings.judged:
        shared.feedback = train.collect_feedback(settings, seed, shared.reference)
    return shared


def run_variant(settings, seed, variant, cell, path, glance=False):
    """One run on what train.prepare saved at path: its entry in claims.json.

    With a glance it has its lost share and no more.
    """
    shared = shared_by(settings, seed, path)
    method = method_of(variant, cell)
    beta, world = method.beta * settings.beta, shared.worlds["train"]
    observer = Glance if glance else exact.Observer
    if method.feedback == "fresh" and settings.evaluations > 1:
        noise = NoiseObserver(method, shared, settings, seed)
        method, observer = method._replace(loss=noise.loss), lambda *_: noise
    entry = train.run_method(settings, seed, variant.method, shared, method, observer,
                             given_offsets(variant.offset, world, beta))["runs"]
    entry = {name: value for name, value in entry.items() if name not in ("dots", "samples")}
    if variant.offset in ("estimated", "learned") and "offsets" in entry:
        error = torch.tensor(entry["offsets"]) - beta_log_z(world, beta)
        entry["offset_error"] = error.square().mean().sqrt().item()
    passes = settings.steps * settings.batch / settings.judged
    return dict(runs=dict(offset=variant.offset, level=variant.level, judged=settings.judged,
                          passes=passes, steps=settings.steps, cell=cell) | entry)


def prepare(settings, seed, path, base=None):
    """train.prepare, with the reference of what it saved at base."""
    return train.prepare(settings, seed, path, train.load(base).reference if base else None)
