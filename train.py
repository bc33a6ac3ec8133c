"""The experiment: reference model -> feedback -> alignment -> exact evaluation -> table, pictures, results.json.

    python train.py                                   every method once, with the settings below
    python train.py --methods una-pair,dpo --seeds 5
    python train.py --help
"""
import argparse
import copy
import functools
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import matplotlib
import numpy as np
import tiktoken
import torch

import data
import una
from model import GPT, GPTConfig, ScalarGPT, all_responses, response_logprobs, sample

matplotlib.use("Agg")   # pictures go to files; no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

# method: (learning rate, beta inside the method's loss as a multiple of the task's)
METHODS = {
    "una-pair": (3e-4, 2.0),           # Eq. 10 on pairs
    "una-binary-mse": (1e-3, 0.25),    # Eq. 11 on thumbs
    "una-binary-bce": (1e-3, 0.25),    # Eq. 12 on thumbs
    "una-score": (1e-3, 0.25),         # Eq. 13 on scores
    "una-mixed": (1e-3, 0.25),         # Eq. 10, 11 and 13 in one run, each on a third of the responses
    "una-online": (3e-3, 1.0),         # Eq. 7 on fresh samples and their rewards
    "una-online-score": (3e-3, 0.5),   # Eq. 9 on fresh samples and their scores
    "dpo": (3e-4, 2.0),                # Eq. 5 on pairs
    "kto": (1e-3, 0.25),               # KTO on thumbs
    "ppo": (3e-3, 1.0),                # Eq. 3 on fresh samples and their rewards, with a value model
}
ONLINE = ("una-online", "una-online-score", "ppo")
PPO_EPOCHS, PPO_CLIP, PPO_LAMBDA = 2, 0.2, 0.95   # inner steps a batch; for ratio and value; for the advantages


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    methods: str = setting(",".join(METHODS), "methods to run, comma-separated")
    seeds: int = setting(1, "runs per method, each with its own reference model and feedback")
    seed: int = setting(0, "the first seed; the others follow it")
    beta: float = setting(0.25, "the task's beta: price of one nat of KL, in units of reward")
    reward: str = setting("true", "who rewards the online methods: true, the judge; model, a reward model trained on the pairs")
    steps: int = setting(400, "alignment steps of every method, a batch each")
    batch: int = setting(192, "responses per alignment step")
    judged: int = setting(4096, "responses that get feedback, for the offline methods")
    reference_steps: int = setting(500, "training steps of the reference model, 256 sentences each")
    evaluations: int = setting(6, "points of the learning curve behind step 0, each twice the step of the one before")
    n_layer: int = setting(2, "layers of the GPT")
    n_head: int = setting(4, "attention heads of each layer")
    n_embd: int = setting(64, "width of the GPT")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("out/toy", "folder for results.json, pictures and weights")
    quick: bool = setting(False, "a short run of everything, to see that it works: the results mean little")


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
    """Optimiser step `step` of `steps`: the learning rate climbs to its peak in the first 5% and falls to 0, linearly."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, step / (0.05 * steps)) * (1 - (step - 1) / steps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_reference(settings, seed, device):
    """pi_ref: a GPT trained from scratch to make the corpus's responses likely. Returned frozen."""
    torch.manual_seed(seed)
    config = GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, settings.n_layer, settings.n_head, settings.n_embd)
    model = GPT(config).to(device)
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
        reward = una.rlhf_objective(logprobs, self.ref_logprobs, self.rewards, beta=0.0).mean().item()
        kl = -una.rlhf_objective(logprobs, self.ref_logprobs, torch.zeros_like(self.rewards), beta=1.0).mean().item()
        objective = reward - self.beta * kl                                 # Eq. 3
        optimum = self.optimum.mean().item()
        return dict(reward=reward, kl=kl, objective=objective, optimum=optimum, regret=optimum - objective,
                    frontier_reward=self.frontier(kl))


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


def align(method, seed, settings, reference, feedback, world, reward_model=None):
    """Trains a copy of the reference by one method. Returns it, its log-probabilities (P, Y) and its results.json entry."""
    learning_rate, multiple = METHODS[method]
    beta = multiple * settings.beta
    device = world.prompts.device
    policy = copy.deepcopy(reference).requires_grad_(True)
    value = ScalarGPT(reference).to(device) if method == "ppo" else None
    trained = [*policy.parameters(), *(value.parameters() if value else [])]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=True)
    with torch.no_grad():                                                   # once, not at every step
        ref_logprob = response_logprob(reference, feedback.tokens, feedback.mask)
        other_ref_logprob = response_logprob(reference, feedback.other_tokens, feedback.other_mask)
    if method in ONLINE:
        generator = torch.Generator(device).manual_seed(seed)
        per_prompt = settings.batch // len(world.prompts)
        judge = true_reward if reward_model is None else functools.partial(model_reward, reward_model)
        frozen = [reference] if reward_model is None else [reference, reward_model]
    else:
        frozen = []
        items = feedback_items(method, feedback)
        size = max(1, round(settings.batch * len(items) / len(feedback.tokens)))   # the same responses a step for all
        stream = batches(items, size, torch.Generator().manual_seed(seed))
    checkpoints = {max(1, settings.steps >> i) for i in range(settings.evaluations)}
    figures = world.evaluate(world.ref_logprobs)
    curve = [dict(step=0, seconds=0.0, objective=figures["objective"], regret=figures["regret"])]
    start_loss = None
    clock = Clock(device)
    for step in range(1, settings.steps + 1):
        with clock:
            if method in ONLINE:
                tokens, mask = fresh_samples(policy, world.prompts, per_prompt, generator)
            if method == "ppo":
                rounds = ppo_losses(policy, value, reference, judge, tokens, mask, beta)
            elif method in ONLINE:
                rounds = [online_losses(method, policy, reference, judge, tokens, mask, per_prompt, beta)]
            else:
                rounds = [offline_losses(method, policy, feedback, ref_logprob, other_ref_logprob, next(stream), beta)]
            for losses in rounds:
                loss = losses.mean()
                start_loss = loss.item() if start_loss is None else start_loss
                descend(optimizer, loss, learning_rate, step, settings.steps)
        left = clock.seconds / step * (settings.steps - step)
        show(f"seed {seed} | {method} | step {step} of {settings.steps} | loss {loss.item():.4f} | {left:.0f} s left")
        if step in checkpoints:
            logprobs = world.logprobs(policy)
            figures = world.evaluate(logprobs)
            with torch.no_grad():                                           # apart, since under DPO both may fall
                reward = una.implicit_reward(response_logprob(policy, feedback.tokens, feedback.mask), ref_logprob, beta)
                chosen, rejected = reward[feedback.pairs].mean(0).tolist()
            curve.append(dict(step=step, seconds=clock.seconds, objective=figures["objective"], regret=figures["regret"],
                              loss=loss.item(), chosen_reward=chosen, rejected_reward=rejected))
            show(f"seed {seed} | {method} | step {step} | loss {loss.item():.4f} (at start {start_loss:.4f}) | "
                 f"r_w {chosen:+.2f} r_l {rejected:+.2f} | KL {figures['kl']:.3f} | "
                 f"J {figures['objective']:.3f} of {figures['optimum']:.3f} | {clock.seconds:.1f} s", keep=True)
    run = dict(method=method, seed=seed, beta=settings.beta, method_beta=beta, learning_rate=learning_rate,
               start_loss=start_loss, seconds=clock.seconds, state_bytes=state_bytes(optimizer, frozen),
               train=figures, curve=curve)
    if method in ONLINE:
        run["reward_source"] = "true" if reward_model is None else "model"
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
    """Reward against KL: every run under the exact frontier of the first seed."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    entries = [entry for entry in results["landmarks"] if entry["method"] == "optimum"] + results["runs"]
    widest = max(1.1 * max(entry["train"]["kl"] for entry in entries), 0.1)
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
    axes.set(xlabel="KL(policy || reference), nats", ylabel="mean reward", title="Reward against KL, training prompts")
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
        axes.scatter(explicit, implicit, s=3, alpha=0.3, color=COLORS.get(name, "grey"))
        axes.set_title(name, fontsize=9)
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    figure.supxlabel("explicit reward, the judge's")
    figure.supylabel("implicit reward")
    save(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    plt.close(figure)


def reward_panel(world, logprobs):
    """(explicit, implicit) rewards of the responses that pi_ref gives more than 1 in 2000."""
    likely = world.ref_logprobs > math.log(1 / 2000)
    implicit = una.implicit_reward(logprobs, world.ref_logprobs, world.beta, world.optimum[:, None])
    return world.rewards[likely].numpy(), implicit[likely].numpy()


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
    settings = Settings(**{**(QUICK if given["quick"] else {}), **given})
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


def main(arguments=None):
    settings = parse(arguments)
    device = torch.device(settings.device)
    methods = settings.methods.split(",")
    results = dict(settings=asdict(settings),
                   versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                                 tiktoken=tiktoken.__version__, matplotlib=matplotlib.__version__),
                   device=settings.device, landmarks=[], runs=[])
    for seed in range(settings.seed, settings.seed + settings.seeds):
        reference = train_reference(settings, seed, device)
        show(f"seed {seed} | the exact optimum")
        worlds = {"train": World(reference, data.TRAIN_PROMPTS, settings.beta, device),
                  "heldout": World(reference, data.HELDOUT_PROMPTS, settings.beta, device)}
        landmarks = dict(method="reference", seed=seed), dict(method="optimum", seed=seed)
        for split, world in worlds.items():
            best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, settings.beta)
            for landmark, logprobs in zip(landmarks, (world.ref_logprobs, best)):
                landmark[split] = world.evaluate(logprobs)
        results["landmarks"] += landmarks
        feedback = collect_feedback(settings, seed, reference, device)
        reward_model = train_reward_model(settings, seed, reference, feedback) if settings.reward == "model" else None
        policies = {"reference": reference}
        panels = {"reference": reward_panel(worlds["train"], worlds["train"].ref_logprobs)}
        for method in methods:
            policy, logprobs, run = align(method, seed, settings, reference, feedback, worlds["train"],
                                          reward_model)
            run["heldout"] = worlds["heldout"].evaluate(worlds["heldout"].logprobs(policy))
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
    save(os.path.join(settings.out, "results.json"),
         lambda partial: Path(partial).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n"))
    print(f"\nwritten to {settings.out}: results.json, three pictures, weights")


if __name__ == "__main__":
    main()
