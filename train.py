"""The experiment: reference model -> feedback -> alignment by each method -> exact evaluation -> table, pictures, results.json.

    python train.py                                   every method once, with the settings below
    python train.py --methods una-pair,dpo --seeds 5
    python train.py --help
"""
import argparse
import copy
import json
import math
import os
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields

import torch

import data
import una
from model import GPT, GPTConfig, all_responses, response_logprobs, sample

# method: (learning rate, beta inside the method's loss as a multiple of the task's)
METHODS = {
    "una-pair": (1e-3, 1.0),           # Eq. 10 on pairs
    "una-binary-mse": (1e-3, 1.0),     # Eq. 11 on thumbs
    "una-binary-bce": (1e-3, 1.0),     # Eq. 12 on thumbs
    "una-score": (1e-3, 1.0),          # Eq. 13 on scores
    "una-mixed": (1e-3, 1.0),          # Eq. 10, 11 and 13 in one run: a third of the responses has pairs, a third thumbs, a third scores
    "una-online": (1e-3, 1.0),         # Eq. 7 on fresh samples and their reward
    "una-online-score": (1e-3, 1.0),   # Eq. 9 on fresh samples and their score
    "dpo": (1e-3, 1.0),                # Eq. 5 on pairs
    "kto": (1e-3, 1.0),                # KTO on thumbs
}
ONLINE = ("una-online", "una-online-score")


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    methods: str = setting(",".join(METHODS), "methods to run, comma-separated")
    seeds: int = setting(1, "runs per method, each with its own reference model and feedback")
    seed: int = setting(0, "the first seed; the others follow it")
    beta: float = setting(0.25, "the task's beta: price of one nat of KL, in units of reward")
    steps: int = setting(400, "alignment steps of every method")
    batch: int = setting(192, "responses per alignment step")
    judged: int = setting(4096, "responses that get feedback, for the offline methods")
    reference_steps: int = setting(500, "training steps of the reference model, 256 sentences each")
    evaluations: int = setting(8, "points of the learning curve behind step 0, each twice the step of the one before")
    n_layer: int = setting(2, "layers of the GPT")
    n_head: int = setting(4, "attention heads of each layer")
    n_embd: int = setting(64, "width of the GPT")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("out/toy", "folder for results.json, pictures and weights")
    quick: bool = setting(False, "a short run of everything, to see that it works: the results mean little")


QUICK = dict(steps=16, judged=512, reference_steps=60, evaluations=2, n_embd=32)


# ---------------------------------------------------------------- progress
class Progress:
    """One line that is written over, on a terminal; nothing elsewhere."""

    def __init__(self):
        self.stream = sys.stderr
        self.on = self.stream.isatty()

    def show(self, text):
        if self.on:
            self.stream.write(f"\r\033[K{text}")
            self.stream.flush()

    def keep(self, text):
        """Leave this line standing."""
        if self.on:
            self.stream.write(f"\r\033[K{text}\n")


class Clock:
    """Seconds of training: runs from start() to stop(), again and again, and waits for the device before it is read."""

    def __init__(self, device):
        self.device, self.seconds = device, 0.0

    def now(self):
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def start(self):
        self.started = self.now()

    def stop(self):
        self.seconds += self.now() - self.started


# ---------------------------------------------------------------- the reference
def response_logprob(model, tokens, mask):
    return una.sequence_logprob(model(tokens), tokens, mask)


def train_reference(settings, seed, device, progress):
    """pi_ref: a GPT trained from scratch to give the corpus's responses the most probability. Returned frozen."""
    torch.manual_seed(seed)
    config = GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, settings.n_layer, settings.n_head, settings.n_embd)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rng = random.Random(seed)
    for step in range(settings.reference_steps):
        set_lr(optimizer, 3e-3, step, settings.reference_steps)
        prompts, responses = data.sentences(256, rng)
        tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(responses))
        loss = -response_logprob(model, tokens.to(device), mask.to(device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.show(f"seed {seed} | reference | step {step + 1} of {settings.reference_steps} | loss {loss.item():.3f} nats")
    return model.requires_grad_(False)


def set_lr(optimizer, peak, step, steps):
    """Linear warm-up over the first 5% of the steps, then linear decay to 0."""
    progress = (step + 1) / steps
    for group in optimizer.param_groups:
        group["lr"] = peak * min(progress / 0.05, (1 - progress) / 0.95 + 1e-3)



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
        return torch.stack([response_logprobs(model, prompt, data.MAX_TOKENS, data.EOT).cpu().double() for prompt in self.prompts])

    def tilted(self, b):
        """Mean reward and KL of pi_ref e^{r/b} / Z: no policy of that KL has more reward, as b is Lagrange's multiplier of the KL."""
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
        objective = una.rlhf_objective(logprobs, self.ref_logprobs, self.rewards, self.beta).mean().item()
        reward = una.rlhf_objective(logprobs, self.ref_logprobs, self.rewards, 0.0).mean().item()
        kl = (reward - objective) / self.beta
        optimum = self.optimum.mean().item()
        return dict(reward=reward, kl=kl, objective=objective, optimum=optimum, regret=optimum - objective,
                    frontier_reward=self.frontier(kl))


# ---------------------------------------------------------------- alignment
PAIR, BINARY, SCORE = range(3)


def feedback_items(method, feedback):
    """The items (kind, row, other row) that a method learns from, (N, 3). All methods see the same responses."""
    rows = torch.arange(len(feedback.tokens))

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


def offline_losses(method, policy, feedback, ref_logprob, other_ref_logprob, items, beta):
    """One loss for each item (kind, row, other row) of a batch, (N,): the table of methods, in code."""
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
    reward = una.implicit_reward(logprob, ref, beta)
    return torch.cat([
        una.una_pair_loss(reward[:n][pair], reward[n:]),
        una.una_binary_loss(reward[:n][binary], feedback.labels[first[binary]], "bce" if method == "una-binary-bce" else "mse"),
        una.una_score_loss(reward[:n][score], feedback.scores[first[score]]),
    ])


def online_losses(method, policy, reference, prompts, per_prompt, beta, generator):
    """One loss for each of per_prompt fresh samples of every prompt."""
    x = prompts.repeat_interleave(per_prompt, 0)
    y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, generator)
    explicit = data.reward(x, y).to(x.device)
    tokens, mask = data.join(x, y, y_mask)
    logprob = response_logprob(policy, tokens, mask)
    with torch.no_grad():
        ref_logprob = response_logprob(reference, tokens, mask)
    if method == "una-online-score":
        return una.una_score_loss(una.implicit_reward(logprob, ref_logprob, beta), una.implicit_score(explicit))
    # f(x), the baseline: the mean residual of the prompt's own samples, held constant.
    residual = explicit - una.implicit_reward(logprob, ref_logprob, beta).detach()
    offset = residual.view(-1, per_prompt).mean(1).repeat_interleave(per_prompt)
    return una.una_reward_loss(una.implicit_reward(logprob, ref_logprob, beta, offset), explicit)


if __name__ == "__main__":
    from dataclasses import replace
    torch.set_num_threads(2)
    s = Settings()
    t = time.time()
    m = train_reference(s, 0, torch.device("cpu"), Progress())
    print("ref", time.time() - t)
    torch.save(m, "/tmp/proto/ref.pt")
