"""What the claims train beyond train.py: losses with f(x) + c, and methods whose noise is measured.

A variant is a method's name and its f(x) + c: zero, as in the paper; exact, beta log Z(x); prompt
or batch, estimated from the same feedback.
"""
import copy
import functools
import math

import torch

import data
import train
import una
from lab import exact
from model import ScalarGPT

# The methods that the claims compare. Another one in train.METHODS changes nothing here.
COMPARED = ("una-pair", "una-binary-mse", "una-binary-bce", "una-score", "una-mixed", "dpo", "kto",
            "una-online", "una-online-score", "ppo")


# ---------------------------------------------------------------- f(x) + c of stored feedback
# An offset takes the implicit rewards (B,) without it, and their batch. It is a constant, (B,).
def exact_offset(world, beta):
    """beta log Z of each response's prompt, at the loss's own beta: its optimum is that beta's."""
    beta_log_z = una.optimal_policy(world.ref_logprobs, world.rewards, beta)[1]

    def offset(reward, batch):
        prompts = batch.tokens[:, None, :data.PROMPT_TOKENS].cpu()
        return beta_log_z[(prompts == world.prompts).all(-1).int().argmax(1)].to(reward)
    return offset


def mean_residual(over):
    """The mean of r - beta rho over the batch, or over the responses to the same prompt in it."""
    def offset(reward, batch):
        residual = (batch.scores.logit() - reward).detach()
        prompts = batch.tokens[:, :data.PROMPT_TOKENS]
        same = (prompts[:, None] == prompts).all(-1) | (over == "batch")                   # (B, B)
        return (same * residual).sum(1) / same.sum(1)
    return offset


def una_score(offset, policy, batch, beta):
    """Eq. 13 with an offset."""
    reward = train.implicit_reward(policy, batch, beta)
    return una.una_score_loss(reward + offset(reward, batch), batch.scores)


def una_binary_bce(offset, policy, batch, beta):
    """Eq. 12 with an offset."""
    reward = train.implicit_reward(policy, batch, beta)
    return una.una_binary_loss(reward + offset(reward, batch), batch.labels, g="bce")


LOSSES = {"una-score": una_score, "una-binary-bce": una_binary_bce}


def method_of(variant, candidate, world, task_beta):
    (name, kind), (learning_rate, multiple) = variant, candidate
    method = train.METHODS[name]._replace(learning_rate=learning_rate, beta=multiple)
    if kind == "zero":
        return method
    offset = exact_offset(world, multiple * task_beta) if kind == "exact" else mean_residual(kind)
    return method._replace(loss=functools.partial(LOSSES[name], offset))


# ---------------------------------------------------------------- the gradient's noise
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
                                      seed + 10**6)
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
    """What train.prepare saved at path, with feedback of another size, or a reward model."""
    shared = copy.copy(train.load(path))
    if len(shared.feedback.tokens) != settings.judged:
        shared.feedback = train.collect_feedback(settings, seed, shared.reference)
    if settings.reward == "model":
        shared.reward_model = train.train_reward_model(settings, seed, shared.reference,
                                                       shared.feedback)
    return shared


def run_variant(settings, seed, variant, candidate, path):
    """One run on what train.prepare saved at path: its entry in claims.json."""
    shared = shared_by(settings, seed, path)
    method = method_of(variant, candidate, shared.worlds["train"], settings.beta)
    observer = exact.Observer
    if method.feedback == "fresh":
        noise = NoiseObserver(method, shared, settings, seed)
        method, observer = method._replace(loss=noise.loss), lambda *_: noise
    entry = train.run_method(settings, seed, variant[0], shared, method, observer)["runs"]
    entry = {name: value for name, value in entry.items() if name not in ("dots", "samples")}
    return dict(runs=dict(offset=variant[1], judged=settings.judged, steps=settings.steps) | entry)
