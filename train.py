"""The experiment: reference model -> feedback -> alignment -> exact evaluation -> table, pictures, results.json.

    python train.py                                   every method once, with the settings below
    python train.py --methods una-pair,dpo --seeds 5
    python train.py --help
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import tiktoken
import torch

import data
import una
from model import GPT, GPTConfig, ScalarGPT, all_responses, response_logprobs, sample

matplotlib.use("Agg")   # pictures go to files; no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# method: (learning rate, beta inside the method's loss as a multiple of the task's): the best cells of GRIDS
METHODS = {
    "una-pair": (5e-4, 4),             # Eq. 10 on pairs
    "una-binary-mse": (2e-3, 0.0625),  # Eq. 11 on thumbs
    "una-binary-bce": (2e-3, 0.125),   # Eq. 12 on thumbs
    "una-score": (1e-3, 0.125),        # Eq. 13 on scores
    "una-mixed": (2e-3, 0.125),        # Eq. 10, 11 and 13 in one run, each on a third of the responses
    "dpo": (5e-4, 4),                  # Eq. 5 on pairs
    "kto": (4e-3, 0.125),              # KTO on thumbs
    "una-online": (1.2e-2, 1),         # Eq. 7 on fresh samples and their rewards
    "una-online-score": (1e-3, 0.5),   # Eq. 9 on fresh samples and their scores
    "ppo": (6e-3, 1),                  # Eq. 3 on fresh samples and their rewards, with a value model
}
ONLINE = ("una-online", "una-online-score", "ppo")
PPO_EPOCHS, PPO_CLIP, PPO_LAMBDA = 2, 0.2, 0.95   # inner steps a batch; for ratio and value; for the advantages
SPAWN = multiprocessing.get_context("spawn")   # a forked torch may hang


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    methods: str = setting(",".join(METHODS), "methods to run, comma-separated")
    seeds: int = setting(1, "runs per method, each with its own reference model and feedback")
    seed: int = setting(0, "the first seed; the others follow it")
    beta: float = setting(0.25, "the task's beta: price of one nat of KL, in units of reward")
    reward: str = setting("true", "who rewards the online methods: true, the judge; model, a reward model trained on the pairs")
    offset: str = setting("zero", "f(x) + c of una-score: zero, as in the paper; batch or prompt, estimated; "
                                  "exact, beta log Z (of una-binary-* and una-mixed too)")
    steps: int = setting(400, "alignment steps of every method, a batch each")
    batch: int = setting(192, "responses per alignment step")
    judged: int = setting(4096, "responses that get feedback, for the offline methods")
    reference_steps: int = setting(500, "training steps of the reference model, 256 sentences each")
    evaluations: int = setting(6, "points of the learning curve behind step 0, geometric from steps/32 to steps")
    n_layer: int = setting(2, "layers of the GPT")
    n_head: int = setting(4, "attention heads of each layer")
    n_embd: int = setting(64, "width of the GPT")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("out/toy", "folder for results.json, pictures and weights")
    quick: bool = setting(False, "a short run of everything, to see that it works: the results mean little")
    claims: bool = setting(False, "settle the paper's claims, with grids and seeds of its own, into assets unless told otherwise: "
                                  "an hour and a half on two cores; goes on where it was stopped")


QUICK = dict(steps=16, judged=512, reference_steps=60, evaluations=2, n_embd=32)


def show(text, keep=False):
    """Writes over the last line of a terminal, and leaves it standing if keep; writes nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if keep else "", file=sys.stderr, flush=True)


class Clock:
    """Seconds spent inside `with clock:`, the device's work included."""

    def __init__(self, device):
        self.seconds, self.device = 0.0, device

    def now(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def __enter__(self):
        self.started = self.now()

    def __exit__(self, *_):
        self.seconds += self.now() - self.started


# ---------------------------------------------------------------- the reference
def response_logprob(model, tokens, mask):
    return una.sequence_logprob(model(tokens), tokens, mask)


def descend(optimizer, loss, peak, step, steps):
    """Optimiser step `step` of `steps`: the learning rate climbs to its peak in the first 5% and falls to 0, linearly.

    The gradient is cut to norm 1. FloatingPointError if the loss is not finite.
    """
    if not loss.isfinite():
        raise FloatingPointError(f"the loss of step {step} is {loss.item()}")
    (group,) = optimizer.param_groups
    group["lr"] = peak * min(1.0, step / (0.05 * steps)) * (1 - (step - 1) / steps)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def new_gpt(settings):
    return GPT(GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, settings.n_layer, settings.n_head, settings.n_embd))


def train_reference(settings, seed, device):
    """pi_ref: a GPT trained from scratch to make the corpus's responses likely. Returned frozen."""
    torch.manual_seed(seed)
    model = new_gpt(settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rng = random.Random(seed)
    for step in range(1, settings.reference_steps + 1):
        prompts, responses = data.sentences(256, rng)
        tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(responses))
        loss = -response_logprob(model, tokens.to(device), mask.to(device)).mean()
        descend(optimizer, loss, 3e-3, step, settings.reference_steps)
        show(f"seed {seed} | reference | step {step} of {settings.reference_steps} | loss {loss.item():.3f} nats")
    model.zero_grad()
    return model.requires_grad_(False)


# ---------------------------------------------------------------- the truth, and the distance to it
class World:
    """Everything about one set of prompts that does not depend on the policy, over all Y responses: float64, on the CPU."""

    def __init__(self, reference, prompts, beta, device):
        self.prompts, self.beta = data.encode_prompts(prompts).to(device), beta
        self.responses, self.mask = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
        self.rewards = torch.stack([data.reward(prompt.expand(len(self.responses), -1), self.responses)
                                    for prompt in self.prompts.cpu()]).double()                       # (P, Y)
        self.ref_logprobs = self.logprobs(reference)                                                  # (P, Y)
        self.optimum = una.optimal_policy(self.ref_logprobs, self.rewards, beta)[1]                   # (P,)
        # The frontier needs of pi_ref no more than how much of it has which reward: r takes some hundred values.
        self.levels, index = self.rewards.unique(return_inverse=True)                                 # (L,), (P, Y)
        mass = torch.zeros(len(prompts), len(self.levels), dtype=torch.float64)
        self.level_logprobs = mass.scatter_add(1, index, self.ref_logprobs.exp()).log()               # (P, L)

    def logprobs(self, model):
        """log pi(y|x) of every response to every prompt, (P, Y)."""
        return torch.stack([response_logprobs(model, prompt, data.MAX_TOKENS, data.EOT).cpu().double()
                            for prompt in self.prompts])

    def tilted(self, b):
        """Mean reward and KL of pi_ref e^{r/b} / Z. It maximises E r - b KL, so no policy of its KL has more reward."""
        logprobs, b_log_z = una.optimal_policy(self.level_logprobs, self.levels, b)
        reward = una.rlhf_objective(logprobs, self.level_logprobs, self.levels, 0.0).mean().item()
        return reward, (reward - b_log_z.mean().item()) / b

    def frontier(self, kl):
        """R*(KL): the highest mean reward at this KL. KL falls as b grows, so b is found by bisection of log b."""
        low, high = math.log(1e-3), math.log(1e6)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.tilted(math.exp(middle))[1] > kl else (low, middle)
        return self.tilted(math.exp(high))[0]

    def evaluate(self, logprobs):
        """The exact figures of a policy with these logprobs (P, Y), means over the prompts."""
        def mean(values):
            return una.rlhf_objective(logprobs, self.ref_logprobs, values, beta=0.0)                      # (P,)

        reward = mean(self.rewards).mean().item()
        kl = -una.rlhf_objective(logprobs, self.ref_logprobs, torch.zeros_like(self.rewards), beta=1.0).mean().item()
        objective = reward - self.beta * kl                                 # Eq. 3
        optimum = self.optimum.mean().item()
        residual = self.rewards - una.implicit_reward(logprobs, self.ref_logprobs, self.beta)            # Eq. 7's, f = c = 0
        variance = mean((residual - mean(residual)[:, None]) ** 2).mean().item()
        return dict(reward=reward, kl=kl, objective=objective, optimum=optimum, regret=optimum - objective,
                    frontier_reward=self.frontier(kl), residual_variance=variance)


# ---------------------------------------------------------------- alignment
PAIR, BINARY, SCORE = range(3)


def collect_feedback(settings, seed, reference, device):
    """Two responses of the reference to one training prompt after the other, judged. The held-out prompts get none."""
    generator = torch.Generator().manual_seed(seed)
    prompts = data.encode_prompts(data.TRAIN_PROMPTS)[torch.arange(settings.judged) // 2 % len(data.TRAIN_PROMPTS)]
    responses, mask = sample(reference, prompts.to(device), data.MAX_TOKENS, data.EOT,
                             torch.Generator(device).manual_seed(seed))
    feedback = data.judge(prompts, responses.cpu(), mask.cpu(), generator)
    return data.Feedback(*(getattr(feedback, item.name).to(device) for item in fields(feedback)))


def feedback_items(method, feedback):
    """The items (kind, row, other row) that a method learns from, (N, 3). All methods see the same responses."""
    rows = torch.arange(len(feedback.tokens), device=feedback.tokens.device)

    def items(kind, first, second):
        return torch.stack([torch.full_like(first, kind), first, second], dim=1)

    pairs = items(PAIR, *feedback.pairs.T)
    thumbs, scores = items(BINARY, rows, rows), items(SCORE, rows, rows)
    if method in ("una-pair", "dpo"):
        return pairs
    if method in ("una-binary-mse", "una-binary-bce", "kto"):
        return thumbs
    if method == "una-score":
        return scores
    third = len(rows) // 6 * 2                                              # una-mixed; even, so that no pair is cut in two
    return torch.cat([pairs[pairs[:, 1] < third], thumbs[third:2 * third], scores[2 * third:]])


def estimated_offset(residual, prompts, offset):
    """f(x) + c, (B,): the mean of r - beta rho, (B,), over the batch or over the responses to the same prompt in it."""
    same = (prompts[:, None] == prompts).all(-1) | (offset == "batch")                                    # (B, B)
    return (same * residual).sum(1) / same.sum(1)


def offline_losses(method, policy, feedback, ref_logprob, other_ref_logprob, items, beta, offset="zero", beta_log_z=None):
    """One loss for each item (kind, row, other row) of a batch, (N,): the table of methods, in code.

    offset: Settings.offset; beta_log_z (R,) of each response's prompt, where it is exact.
    """
    kind, first, second = items.T
    pair, binary, score = kind == PAIR, kind == BINARY, kind == SCORE
    rows = torch.cat([first, second[pair]])                                 # every response once
    logprob, ref = response_logprob(policy, feedback.tokens[rows], feedback.mask[rows]), ref_logprob[rows]
    n = len(items)
    if method == "dpo":
        return una.dpo_loss(logprob[:n], logprob[n:], ref[:n], ref[n:], beta)
    if method == "kto":
        with torch.no_grad():
            other_logprob = response_logprob(policy, feedback.other_tokens[rows], feedback.other_mask[rows])
        return una.kto_loss(logprob, ref, feedback.labels[rows], other_logprob, other_ref_logprob[rows], beta)
    reward = una.implicit_reward(logprob, ref, beta)                        # f = c = 0, as in the paper
    if offset == "exact":                                                   # in pairs it cancels
        reward = reward + beta_log_z[rows]
    elif offset != "zero":
        residual = (feedback.scores[rows].logit() - reward).detach()
        reward = reward + estimated_offset(residual, feedback.tokens[rows, :data.PROMPT_TOKENS], offset)
    g = "bce" if method == "una-binary-bce" else "mse"
    return torch.cat([
        una.una_pair_loss(reward[:n][pair], reward[n:]),
        una.una_binary_loss(reward[:n][binary], feedback.labels[first[binary]], g),
        una.una_score_loss(reward[:n][score], feedback.scores[first[score]]),
    ])


def true_reward(tokens, mask):
    """The judge's reward of prompts and responses, (B,)."""
    return data.reward(tokens[:, :data.PROMPT_TOKENS], tokens[:, data.PROMPT_TOKENS:]).to(tokens.device)


def model_reward(reward_model, tokens, mask):
    """The reward model's, read at each response's last token, (B,)."""
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return (reward_model(tokens) * last).sum(1)


def train_reward_model(settings, seed, reference, feedback):
    """r_phi: Eq. 2 on the pairs, from the reference's weights with a scalar head. Returned frozen."""
    reward_model = ScalarGPT(reference).to(feedback.tokens.device)
    optimizer = torch.optim.Adam(reward_model.parameters(), betas=(0.9, 0.99), fused=True)
    stream = batches(feedback.pairs, min(len(feedback.pairs), settings.batch // 2), torch.Generator().manual_seed(seed))
    for step in range(1, settings.steps + 1):
        pairs = next(stream)
        chosen, rejected = (model_reward(reward_model, feedback.tokens[rows], feedback.mask[rows]) for rows in pairs.T)
        descend(optimizer, una.reward_model_loss(chosen, rejected).mean(), 3e-4, step, settings.steps)
        show(f"seed {seed} | reward model | step {step} of {settings.steps}")
    reward_model.zero_grad()
    return reward_model.requires_grad_(False)


def fresh_samples(policy, prompts, per_prompt, generator):
    """tokens and mask of per_prompt responses of the policy to each prompt, prompt by prompt."""
    x = prompts.repeat_interleave(per_prompt, 0)
    return data.join(x, *sample(policy, x, data.MAX_TOKENS, data.EOT, generator))


def online_losses(method, policy, reference, judge, tokens, mask, per_prompt, beta):
    """One loss for each fresh sample: Eq. 9 for una-online-score, Eq. 7 for una-online."""
    explicit = judge(tokens, mask)
    logprob = response_logprob(policy, tokens, mask)
    with torch.no_grad():
        ref_logprob = response_logprob(reference, tokens, mask)
    if method == "una-online-score":
        return una.una_score_loss(una.implicit_reward(logprob, ref_logprob, beta), una.implicit_score(explicit))
    # f(x), the baseline: the mean residual of the prompt's own samples, held constant.
    residual = explicit - una.implicit_reward(logprob, ref_logprob, beta).detach()
    offset = residual.view(-1, per_prompt).mean(1).repeat_interleave(per_prompt)
    return una.una_reward_loss(una.implicit_reward(logprob, ref_logprob, beta, offset), explicit)


def ppo_losses(policy, value, reference, judge, tokens, mask, beta):
    """PPO's loss for each fresh sample, policy's and value's, PPO_EPOCHS times over: step the optimiser between them."""
    inner = mask[:, 1:]                                                     # the columns of token_logprobs
    with torch.no_grad():
        old_logprobs = una.token_logprobs(policy(tokens), tokens, mask)
        ref_logprobs = una.token_logprobs(reference(tokens), tokens, mask)
        old_values = value(tokens)[:, :-1]
        rewards = una.ppo_token_rewards(judge(tokens, mask), old_logprobs, ref_logprobs, inner, beta)
        advantages, targets = una.ppo_advantages(rewards, old_values, inner, PPO_LAMBDA)
        advantages = (advantages - advantages[inner].mean()) / (advantages[inner].std() + 1e-8)
    for _ in range(PPO_EPOCHS):
        logprobs = una.token_logprobs(policy(tokens), tokens, mask)
        yield (una.ppo_policy_loss(logprobs, old_logprobs, advantages, inner, PPO_CLIP)
               + una.ppo_value_loss(value(tokens)[:, :-1], old_values, targets, inner, PPO_CLIP))


def state_bytes(optimizer, frozen):
    """Bytes of weights, gradients and optimiser state of all models that training holds: the trained and the frozen."""
    trained = optimizer.param_groups[0]["params"]
    held = [*trained, *(p.grad for p in trained), *(p for model in frozen for p in model.parameters()),
            *(value for state in optimizer.state.values() for value in state.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def batches(items, size, generator):
    """Shuffled batches for ever; what is left over at the end of an epoch is dropped."""
    while True:
        order = torch.randperm(len(items), generator=generator)
        yield from items[order].split(size)[:max(1, len(items) // size)]


def offline_rounds(method, policy, reference, feedback, world, settings, beta, seed):
    """For ever: the losses (N,) of the next batch of stored feedback, in a list of one, as one step is made with them."""
    with torch.no_grad():                                                   # once, not at every step
        ref_logprob = response_logprob(reference, feedback.tokens, feedback.mask)
        other_ref_logprob = response_logprob(reference, feedback.other_tokens, feedback.other_mask)
    beta_log_z = None
    if settings.offset == "exact":                                          # of the loss's beta: its pi* is that beta's
        same = (feedback.tokens[:, None, :data.PROMPT_TOKENS] == world.prompts).all(-1)                   # (R, P)
        beta_log_z = (same.cpu().double() @ una.optimal_policy(world.ref_logprobs, world.rewards, beta)[1]).to(ref_logprob)
    items = feedback_items(method, feedback)
    size = max(1, round(settings.batch * len(items) / len(feedback.tokens)))           # the same responses a step for all
    for batch in batches(items, size, torch.Generator().manual_seed(seed)):
        yield [offline_losses(method, policy, feedback, ref_logprob, other_ref_logprob, batch, beta,
                              settings.offset, beta_log_z)]


def online_rounds(method, policy, value, reference, judge, prompts, settings, beta, seed):
    """For ever: the losses (B,) of the next batch of fresh samples, one tensor for each inner step."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    per_prompt = settings.batch // len(prompts)
    while True:
        tokens, mask = fresh_samples(policy, prompts, per_prompt, generator)
        yield (ppo_losses(policy, value, reference, judge, tokens, mask, beta) if method == "ppo" else
               [online_losses(method, policy, reference, judge, tokens, mask, per_prompt, beta)])


def gradient_noise(rounds, parameters, batches=8):
    """The variance of the gradient of the first inner step from batch to batch, summed over the parameters."""
    gradients = [torch.autograd.grad(next(iter(next(rounds))).mean(), parameters) for _ in range(batches)]
    return torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients]).var(0).sum().item()


def align(method, seed, settings, reference, feedback, world, reward_model=None, cell=None):
    """Trains a copy of the reference by one method. Returns it, its log-probabilities (P, Y) and its results.json entry.

    cell: (learning rate, multiple of beta) in place of the method's own. FloatingPointError if the loss leaves the numbers.
    """
    learning_rate, multiple = cell or METHODS[method]
    beta = multiple * settings.beta
    device = world.prompts.device
    policy = copy.deepcopy(reference).requires_grad_(True)
    value = ScalarGPT(reference).to(device) if method == "ppo" else None
    trained = [*policy.parameters(), *(value.parameters() if value else [])]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=True)
    if method in ONLINE:
        judge = true_reward if reward_model is None else functools.partial(model_reward, reward_model)
        frozen = [reference] if reward_model is None else [reference, reward_model]
        rounds, noise_rounds = (online_rounds(method, policy, value, reference, judge, world.prompts, settings, beta, number)
                                for number in (seed, seed + 10**6))
    else:
        frozen = []
        rounds = offline_rounds(method, policy, reference, feedback, world, settings, beta, seed)
    with torch.no_grad():
        ref_logprob = response_logprob(reference, feedback.tokens, feedback.mask)
    curve, start_loss, clock = [], None, Clock(device)
    apart = 32 ** (1 / max(1, settings.evaluations - 1))
    checkpoints = {0, *(max(1, round(settings.steps / apart**i)) for i in range(settings.evaluations))}
    for step in range(settings.steps + 1):
        if step > 0:
            with clock:
                for losses in next(rounds):
                    loss = losses.mean()
                    start_loss = loss.item() if start_loss is None else start_loss
                    descend(optimizer, loss, learning_rate, step, settings.steps)
            left = clock.seconds / step * (settings.steps - step)
            show(f"seed {seed} | {method} | step {step} of {settings.steps} | loss {loss.item():.4f} | {left:.0f} s left")
        if step in checkpoints:
            logprobs = world.logprobs(policy)
            figures = world.evaluate(logprobs)
            point = dict(step=step, seconds=clock.seconds, objective=figures["objective"], regret=figures["regret"])
            if method in ONLINE:
                point["gradient_noise"] = gradient_noise(noise_rounds, [*policy.parameters()])
            if step > 0:
                with torch.no_grad():                                       # apart, since under DPO both may fall
                    reward = una.implicit_reward(response_logprob(policy, feedback.tokens, feedback.mask), ref_logprob, beta)
                    chosen, rejected = reward[feedback.pairs].mean(0).tolist()
                point |= dict(loss=loss.item(), chosen_reward=chosen, rejected_reward=rejected)
                show(f"seed {seed} | {method} | step {step} | loss {loss.item():.4f} (at start {start_loss:.4f}) | "
                     f"r_w {chosen:+.2f} r_l {rejected:+.2f} | KL {figures['kl']:.3f} | "
                     f"J {figures['objective']:.3f} of {figures['optimum']:.3f} | {clock.seconds:.1f} s", keep=True)
            curve.append(point)
    run = dict(method=method, seed=seed, beta=settings.beta, method_beta=beta, learning_rate=learning_rate,
               start_loss=start_loss, seconds=clock.seconds, state_bytes=state_bytes(optimizer, frozen),
               train=figures, curve=curve)
    if method in ONLINE:
        run["reward_source"] = "true" if reward_model is None else "model"
    return policy, logprobs, run


def reward_model_report(reward_model, reference, policy, prompts, seed):
    """How good the reward model is, and what the policy made of it, from 4096 samples of each to prompts (P, 3).

    accuracy: how often it orders two of the reference's responses to a prompt as the judge does, where the judge prefers one.
    judged_gain, true_gain: how far the policy's mean reward lies above the reference's, by the model and by the judge.
    """
    generator = torch.Generator(prompts.device).manual_seed(seed)
    samples = [fresh_samples(model, prompts, 4096 // len(prompts), generator) for model in (reference, policy)]
    with torch.no_grad():
        judged, true = (torch.stack([rewards(*sample) for sample in samples])
                        for rewards in (functools.partial(model_reward, reward_model), true_reward))      # (2, N) each
    judged_gap, true_gap = (rewards[0, 0::2] - rewards[0, 1::2] for rewards in (judged, true))
    told = true_gap.abs() > 1e-6
    return dict(accuracy=(judged_gap * true_gap > 0)[told].float().mean().item(),
                judged_gain=(judged[1].mean() - judged[0].mean()).item(), true_gain=(true[1].mean() - true[0].mean()).item())


def measure(method, seed, settings, reference, feedback, worlds, reward_model, cell=None):
    """As align, with the figures that are taken once: of held-out prompts, and of the reward model."""
    policy, logprobs, run = align(method, seed, settings, reference, feedback, worlds["train"], reward_model, cell)
    run["heldout"] = worlds["heldout"].evaluate(worlds["heldout"].logprobs(policy))
    if reward_model and method in ONLINE:
        run["reward_model"] = reward_model_report(reward_model, reference, policy, worlds["train"].prompts, seed)
    return policy, logprobs, run


# ---------------------------------------------------------------- the report
def gain_share(figures, reference):
    """J gained, as a share of what the optimum gains."""
    return (figures["objective"] - reference["objective"]) / (figures["optimum"] - reference["objective"])


def frontier_share(figures, reference):
    """Reward gained, as a share of what the frontier gains at the same KL; NaN where nothing moved."""
    possible = figures["frontier_reward"] - reference["reward"]
    return (figures["reward"] - reference["reward"]) / possible if figures["kl"] > 1e-6 else math.nan


def table(results, split):
    """The table of one set of prompts: means over the seeds, and the regret's standard deviation if there are several."""
    start = {entry["seed"]: entry[split] for entry in results["landmarks"] if entry["method"] == "reference"}
    columns = {  # heading: (format, figure of one entry)
        "reward": ("{:z.3f}", lambda entry: entry[split]["reward"]),
        "KL": ("{:z.3f}", lambda entry: entry[split]["kl"]),
        "J": ("{:z.3f}", lambda entry: entry[split]["objective"]),
        "regret": ("{:z.5f}", lambda entry: entry[split]["regret"]),
        "of gain": ("{:z.1%}", lambda entry: gain_share(entry[split], start[entry["seed"]])),
        "of frontier": ("{:z.1%}", lambda entry: frontier_share(entry[split], start[entry["seed"]])),
        "seconds": ("{:.1f}", lambda entry: entry.get("seconds", math.nan)),
    }
    lines = [f"{split + ' prompts':<18}" + "".join(f"{heading:>12}" for heading in columns)]
    entries = sorted(results["landmarks"], key=lambda entry: entry["method"] == "optimum")
    entries[len(start):len(start)] = results["runs"]                        # reference, methods, optimum
    for method in dict.fromkeys(entry["method"] for entry in entries):
        same = [entry for entry in entries if entry["method"] == method]
        cells = [form.format(np.mean([figure(entry) for entry in same])) for form, figure in columns.values()]
        regrets = [entry[split]["regret"] for entry in same]
        spread = f"  regret +- {np.std(regrets, ddof=1):.5f}" if len(start) > 1 else ""
        lines.append(f"{method:<18}" + "".join(f"{'-' if 'nan' in cell else cell:>12}" for cell in cells) + spread)
    return "\n".join(lines)


def show_samples(name, model, prompts, seed):
    """Three responses to each prompt, from the same random numbers for every model."""
    x = data.encode_prompts(prompts).repeat_interleave(3, 0).to(model.wte.weight.device)
    y, mask = sample(model, x, data.MAX_TOKENS, data.EOT, torch.Generator(x.device).manual_seed(seed))
    texts = [data.decode_response(*row) for row in zip(y, mask)]
    return f"{name:<17}" + " ".join(f"{','.join(texts[i:i + 3]):<60}" for i in range(0, len(texts), 3)).rstrip()


COLORS = dict(zip(METHODS, plt.get_cmap("tab10").colors))


def save(path, write):
    """write(path) whole or not at all."""
    partial = f"{path}.part"
    write(partial)
    os.replace(partial, path)


def draw_frontier(results, world, path):
    """Reward against KL, under the exact frontier of the first seed. Runs far beyond the optimum are named, not shown."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    optima = [entry for entry in results["landmarks"] if entry["method"] == "optimum"]
    widest = 1.5 * max(entry["train"]["kl"] for entry in optima)
    beyond = [entry["method"] for entry in results["runs"] if entry["train"]["kl"] > widest]
    entries = optima + [entry for entry in results["runs"] if entry["train"]["kl"] <= widest]
    points = [world.tilted(b) for b in np.geomspace(0.02, 100, 200)]
    axes.plot(*zip(*[(kl, reward) for reward, kl in points if kl <= widest]), color="black", label="frontier: none is above")
    for method in dict.fromkeys(entry["method"] for entry in entries):
        xy = [(entry["train"]["kl"], entry["train"]["reward"]) for entry in entries if entry["method"] == method]
        style = dict(color=COLORS.get(method), s=30)
        if method == "optimum":
            style = dict(marker="*", s=260, color="gold", edgecolor="black", zorder=1)   # below the dots
        if method == "una-pair":                                            # a ring: dpo's dot lies in it
            style = dict(s=110, facecolor="none", edgecolor=COLORS[method], linewidth=1.5)
        axes.scatter(*zip(*xy), label="optimum of J" if method == "optimum" else method, **style)
    told = ", ".join(f"{beyond.count(method)} of {method}" for method in dict.fromkeys(beyond))
    axes.set(xlabel="KL(policy || reference), nats", ylabel="mean reward",
             title="Reward against KL, training prompts" + (f"\n(runs too far to the right: {told})" if told else ""))
    axes.legend(fontsize=8)
    save(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)


def draw_regret(results, path):
    """Regret to the exact optimum against seconds of training, for the online methods: seeds thin, their median thick."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in ONLINE:
        curves = [[(point["seconds"], max(point["regret"], 1e-6)) for point in run["curve"]]
                  for run in results["runs"] if run["method"] == method]
        for curve in curves:
            axes.plot(*zip(*curve), color=COLORS[method], linewidth=0.7, alpha=0.6)
        if curves:
            axes.plot(*np.median(np.array(curves), axis=0).T, color=COLORS[method], linewidth=2.2, label=method)
    axes.set(yscale="log", xlabel="seconds of training", ylabel="regret: J* - J",
             title="Distance to the exact optimum, training prompts")
    if axes.lines:
        axes.legend()
    save(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)


def draw_rewards(panels, path):
    """Implicit reward beta log pi/pi_ref + beta log Z(x) against the judge's r(x, y), one panel a policy.

    Each dot is a response of pi_ref's more likely ones. On the diagonal the two agree, and the policy is optimal (Eq. 18).
    """
    columns = min(5, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.7 * rows + 0.4), sharex=True, sharey=True,
                                squeeze=False, layout="constrained")
    for axes, (name, (explicit, implicit)) in zip(grid.flat, panels.items()):
        axes.plot([-3, 2], [-3, 2], color="black", linewidth=0.8)
        axes.scatter(explicit, np.maximum(implicit, -6), s=3, alpha=0.3, color=COLORS.get(name, "grey"))
        axes.set_title(name, fontsize=9)
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    figure.supxlabel("explicit reward, the judge's")
    figure.supylabel("implicit reward (below -6: drawn at -6)")
    figure.suptitle("A policy whose dots lie on the diagonal is optimal")
    save(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)


def reward_panel(world, logprobs):
    """(explicit, implicit) rewards of the responses that pi_ref gives more than 1 in 2000."""
    likely = world.ref_logprobs > math.log(1 / 2000)
    implicit = una.implicit_reward(logprobs, world.ref_logprobs, world.beta, world.optimum[:, None])
    return world.rewards[likely].numpy(), implicit[likely].numpy()


# ---------------------------------------------------------------- the claims
# Every variant has one grid of 16 cells, tuned on the training prompts of seeds that are not reported.
TUNING_SEEDS, REPORTED_SEEDS = range(100, 102), range(11, 19)
GRIDS = {  # (method, offset): (learning rates, multiples of the task's beta)
    ("una-pair", "zero"): ((5e-4, 1e-3, 2e-3, 4e-3), (1, 2, 4, 8)),         # for dpo too: it is the same loss
    **{(method, "zero"): ((5e-4, 1e-3, 2e-3, 4e-3), (0.0625, 0.125, 0.25, 0.5))
       for method in ("una-binary-mse", "una-binary-bce", "una-score", "una-mixed", "kto")},
    **{variant: ((1e-3, 2e-3, 4e-3, 8e-3), (0.5, 1, 2, 4))                  # with beta log Z the task's beta is the right one
       for variant in (("una-score", "batch"), ("una-score", "prompt"), ("una-score", "exact"), ("una-binary-bce", "exact"))},
    **{(method, "zero"): ((1e-3, 3e-3, 6e-3, 1.2e-2), (0.25, 0.5, 1, 2)) for method in ONLINE},
}
SIZES = (256, 1024, 4096, 16384)                                            # judged responses


@functools.lru_cache(maxsize=1)
def prepared(seed, **settings):
    return prepare(Settings(**settings), seed, torch.device(settings["device"]))


def run_job(job, folder):
    """One run in a process of its own: (results.json entry, landmarks of its seed). What is in the folder is not run again."""
    name = f"{job['method']}-{job['seed']}-{hashlib.sha256(json.dumps(job).encode()).hexdigest()[:12]}.json"
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        settings, seed = Settings(**job["settings"]), job["seed"]
        reference, worlds, landmarks = prepared(seed, **{name: job["settings"][name] for name in (
            "beta", "reference_steps", "n_layer", "n_head", "n_embd", "device")})
        feedback = collect_feedback(settings, seed, reference, torch.device(settings.device))
        reward_model = train_reward_model(settings, seed, reference, feedback) if settings.reward == "model" else None
        run = dict(method=job["method"], seed=seed, offset=settings.offset, judged=settings.judged, steps=settings.steps)
        try:
            run |= measure(job["method"], seed, settings, reference, feedback, worlds, reward_model, job["cell"])[2]
        except FloatingPointError as error:
            run["diverged"] = str(error)
        write_json(path, [run, landmarks])
    return json.loads(Path(path).read_text())


def run_jobs(title, jobs, settings):
    """The jobs' runs and landmarks, in order; a single-threaded process for each core."""
    folder = os.path.join(settings.out, "parts")
    os.makedirs(folder, exist_ok=True)
    with ProcessPoolExecutor(torch.get_num_threads(), SPAWN, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(run_job, job, folder) for job in jobs]
        for done, _ in enumerate(as_completed(futures), 1):
            show(f"claims | {title} | run {done} of {len(jobs)}")
    return [future.result() for future in futures]


def lost(run):
    """The share of the possible gain in J that a run ends without, training prompts: 0 at the optimum, above 1 below pi_ref."""
    return math.inf if "diverged" in run else run["curve"][-1]["regret"] / run["curve"][0]["regret"]


def peak_memory(method, settings):
    """Bytes by which 20 steps of training raise the peak of this (fresh) process, or the device's peak."""
    import resource                                                         # Unix alone
    device = torch.device(settings.device)
    torch.set_num_threads(1)
    settings = dataclasses.replace(settings, steps=20, judged=settings.batch, evaluations=1)
    reference = new_gpt(settings).to(device).requires_grad_(False)
    reward_model = ScalarGPT(reference).to(device).requires_grad_(False) if settings.reward == "model" else None
    feedback = collect_feedback(settings, 0, reference, device)
    warm_up = new_gpt(settings).to(device)                                  # torch loads parts of itself at the first step
    descend(torch.optim.Adam(warm_up.parameters(), fused=True), warm_up(feedback.tokens[:1]).mean(), 1e-3, 1, 1)
    unmeasured = SimpleNamespace(prompts=data.encode_prompts(data.TRAIN_PROMPTS).to(device), logprobs=lambda model: None,
                                 evaluate=lambda logprobs: dict(objective=0.0, optimum=0.0, regret=0.0, kl=0.0))

    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    before = 0 if device.type == "cuda" else peak()
    align(method, 0, settings, reference, feedback, unmeasured, reward_model)
    return peak() - before


def settle_claims(settings):
    """Tunes every variant on its grid, runs the best cells on the reported seeds, and writes claims.json and two pictures."""
    def job(seed, method, cell, **changes):
        changes |= dict(methods=method, seeds=1, seed=seed, out="", claims=False, quick=False)
        return dict(method=method, seed=seed, cell=cell, settings=asdict(dataclasses.replace(settings, **changes)))

    cells = {variant: list(itertools.product(*grid)) for variant, grid in GRIDS.items()}
    jobs = {(variant, cell, seed): job(seed, variant[0], cell, offset=variant[1], evaluations=1)
            for seed in TUNING_SEEDS for variant in GRIDS for cell in cells[variant]}
    shares = {key: lost(run) for key, (run, _) in zip(jobs, run_jobs("tuning", jobs.values(), settings))}
    tuning, best = [], {}
    for variant in GRIDS:
        of_cell = {cell: [shares[variant, cell, seed] for seed in TUNING_SEEDS] for cell in cells[variant]}
        best[variant] = min(cells[variant], key=lambda cell: sum(of_cell[cell]))
        tuning += [dict(method=variant[0], offset=variant[1], learning_rate=cell[0], multiple=cell[1],
                        lost=[share if share < math.inf else None for share in of_cell[cell]], best=cell == best[variant])
                   for cell in cells[variant]]
    best["dpo", "zero"] = best["una-pair", "zero"]

    stored, online = ([(method, "zero") for method in METHODS if (method in ONLINE) == kind] for kind in (False, True))
    once = dict(evaluations=1)
    groups = [  # key in claims.json, variants, seeds, settings
        ("runs", stored, REPORTED_SEEDS, once),
        ("runs", online, REPORTED_SEEDS, dict(evaluations=2 * settings.evaluations - 1)),
        ("runs", [("una-online", "zero"), ("ppo", "zero")], REPORTED_SEEDS, once | dict(reward="model")),
        ("longer", [("una-online", "zero")], REPORTED_SEEDS, once | dict(steps=5 * settings.steps // 2)),
        ("offsets", [variant for variant in GRIDS if variant[1] != "zero"], REPORTED_SEEDS, once),
        *(("sizes", [variant for variant in stored if variant[0] != "dpo"], REPORTED_SEEDS[:5], once | dict(judged=judged))
          for judged in SIZES if judged != settings.judged),
    ]
    jobs = [(key, job(seed, method, best[method, offset], offset=offset, **changes))
            for seed in REPORTED_SEEDS for key, variants, seeds, changes in groups if seed in seeds
            for method, offset in variants]
    claims = circumstances(settings) | dict(tuning=tuning, landmarks=[], runs=[], longer=[], offsets=[], sizes=[])
    for (key, _), (run, landmarks) in zip(jobs, run_jobs("reported seeds", [job for _, job in jobs], settings)):
        if "diverged" in run:
            sys.exit(f"train.py: {run['method']} diverged on seed {run['seed']}: {run['diverged']}")
        claims[key].append(run)
        claims["landmarks"] += [entry for entry in landmarks if entry not in claims["landmarks"]]
    claims["peak_memory"] = []
    for reward, methods in (("true", METHODS), ("model", ("una-online", "ppo"))):
        for method in methods:
            with ProcessPoolExecutor(1, SPAWN) as pool:
                peak = pool.submit(peak_memory, method, dataclasses.replace(settings, reward=reward)).result()
            claims["peak_memory"].append(dict(method=method, reward_source=reward, bytes=peak))
    write_json(os.path.join(settings.out, "claims.json"), claims)
    shown = claims | dict(runs=[run for run in claims["runs"] if run.get("reward_source") != "model"])
    draw_frontier(shown, prepare(settings, REPORTED_SEEDS[0], torch.device(settings.device))[1]["train"],
                  os.path.join(settings.out, "frontier.png"))
    draw_regret(shown, os.path.join(settings.out, "regret-over-time.png"))
    show("")
    print(table(shown, "train"), table(shown, "heldout"), f"written to {settings.out}: claims.json, two pictures", sep="\n\n")


# ---------------------------------------------------------------- the whole run
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments):
    """Settings from the command line; whatever is wrong with them ends the program with one line and status 2."""
    parser = Parser(prog="train.py", description="UNA on a toy task whose optimum is known: train, measure, report.")
    for item in fields(Settings):
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=item.metadata["help"])
        else:
            parser.add_argument(flag, type=item.type, metavar=item.name.upper(), default=argparse.SUPPRESS,
                                help=f"{item.metadata['help']} [{item.default}]")
    given = vars(parser.parse_args(arguments))
    defaults = (QUICK if given["quick"] else {}) | (dict(out="assets") if given["claims"] and not given["quick"] else {})
    settings = Settings(**{**defaults, **given})
    for name in ("methods", "seeds", "seed", "reward", "offset"):
        if given["claims"] and name in given:
            parser.error(f"--claims has its own methods, seeds, rewards and offsets: --{name} does not go with it")
    names = settings.methods.split(",")
    for name in names:
        if name not in METHODS:
            parser.error(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        parser.error(f"--methods names a method twice: {settings.methods}")
    if not 0 < settings.beta < math.inf:
        parser.error(f"--beta must be a positive number, got {settings.beta}")
    least = dict(seeds=1, seed=0, steps=1, batch=2 * len(data.TRAIN_PROMPTS), judged=24, reference_steps=1, evaluations=1,
                 n_layer=1, n_head=1, n_embd=1)
    for name, low in least.items():
        if getattr(settings, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(settings, name)}")
    if settings.judged % 2:
        parser.error(f"--judged must be even, as responses come in pairs, got {settings.judged}")
    if settings.n_embd % settings.n_head:
        parser.error(f"--n-embd {settings.n_embd} is not a multiple of --n-head {settings.n_head}")
    if settings.reward not in ("true", "model"):
        parser.error(f"--reward must be true or model, got {settings.reward!r}")
    if settings.offset not in ("zero", "batch", "prompt", "exact"):
        parser.error(f"--offset must be zero, batch, prompt or exact, got {settings.offset!r}")
    if settings.offset in ("batch", "prompt") and names != ["una-score"]:
        parser.error(f"--offset {settings.offset} is estimated from scores: it takes --methods una-score")
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if settings.device == "auto":
        settings.device = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if settings.device not in available:
        parser.error(f"--device must be auto, cpu, cuda or mps, got {settings.device!r}")
    if not available[settings.device]:
        parser.error(f"--device {settings.device}: there is no such device here")
    try:
        os.makedirs(settings.out, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.out):
            pass
    except OSError as error:
        parser.error(f"--out {settings.out}: cannot write there: {error.strerror}")
    return settings


def prepare(settings, seed, device):
    """A reference, the worlds of training and held-out prompts, and the figures of the reference and the optimum in them."""
    reference = train_reference(settings, seed, device)
    show(f"seed {seed} | the exact optimum")
    worlds = {"train": World(reference, data.TRAIN_PROMPTS, settings.beta, device),
              "heldout": World(reference, data.HELDOUT_PROMPTS, settings.beta, device)}
    landmarks = [dict(method="reference", seed=seed), dict(method="optimum", seed=seed)]
    for split, world in worlds.items():
        best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, settings.beta)
        for landmark, logprobs in zip(landmarks, (world.ref_logprobs, best)):
            landmark[split] = world.evaluate(logprobs)
    return reference, worlds, landmarks


def circumstances(settings):
    return dict(settings=asdict(settings), device=settings.device,
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                              tiktoken=tiktoken.__version__, matplotlib=matplotlib.__version__))


def write_json(path, content):
    save(path, lambda partial: Path(partial).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"))


def main(arguments=None):
    settings = parse(arguments)
    if settings.claims:
        return settle_claims(settings)
    device = torch.device(settings.device)
    methods = settings.methods.split(",")
    results = circumstances(settings) | dict(landmarks=[], runs=[])
    for seed in range(settings.seed, settings.seed + settings.seeds):
        reference, worlds, landmarks = prepare(settings, seed, device)
        results["landmarks"] += landmarks
        feedback = collect_feedback(settings, seed, reference, device)
        reward_model = train_reward_model(settings, seed, reference, feedback) if settings.reward == "model" else None
        policies = {"reference": reference}
        panels = {"reference": reward_panel(worlds["train"], worlds["train"].ref_logprobs)}
        for method in methods:
            try:
                policy, logprobs, run = measure(method, seed, settings, reference, feedback, worlds, reward_model)
            except FloatingPointError as error:
                sys.exit(f"train.py: {method} diverged on seed {seed}: {error}")
            results["runs"].append(run)
            policies[method] = policy
            panels[method] = reward_panel(worlds["train"], logprobs)
        for name, policy in policies.items():
            state = dict(config=asdict(policy.config), weights=policy.state_dict())
            save(os.path.join(settings.out, f"{name}-{seed}.pt"), lambda partial: torch.save(state, partial))
        if seed == settings.seed:
            shown = worlds["train"], policies, panels
    show("")
    world, policies, panels = shown
    print(table(results, "train"), table(results, "heldout"), sep="\n\n")
    examples = [data.TRAIN_PROMPTS[0], data.HELDOUT_PROMPTS[0]]
    print("\n" + f"{'responses to':<18}" + " ".join(f"{prompt:<60}" for prompt in examples).rstrip())
    for name, policy in policies.items():
        print(show_samples(name, policy, examples, settings.seed))
    draw_frontier(results, world, os.path.join(settings.out, "frontier.png"))
    draw_regret(results, os.path.join(settings.out, "regret-over-time.png"))
    draw_rewards(panels, os.path.join(settings.out, "implicit-against-explicit.png"))
    write_json(os.path.join(settings.out, "results.json"), results)
    print(f"\nwritten to {settings.out}: results.json, three pictures, weights")


if __name__ == "__main__":
    main()
