"""How far a policy is from the truth: every response listed, so that nothing is estimated.

    all_responses, all_logprobs    every response there is, and log pi(y|x) of each
    World                          what is known of some prompts before any policy: r, pi_ref, J*
    evaluate                       what a policy reaches there: reward, KL, J, regret
    Observer                       the same, while it trains

P prompts, Y responses. Float64 on the CPU, but for what a model computes in its own precision.
"""
import math
import time

import torch
import torch.nn.functional as F

import data
import una


# ---------------------------------------------------------------- all responses
# A response is n < max_tokens words and an end-of-text, or max_tokens words, cut off there. With
# W = V - 1 words there are 1 + W + ... + W^max_tokens. Every sample is one of them: pi sums to 1.
def all_responses(vocab_size, max_tokens, eot):
    """Every possible response, shortest first: tokens (Y, max_tokens) int and mask (Y, max_tokens).

    Tokens and mask are as model.sample's: filled with eot behind the end, the end in the mask.
    """
    words = torch.tensor([token for token in range(vocab_size) if token != eot])
    levels = [torch.full((1, max_tokens), eot)]                  # no word at all
    for n in range(1, max_tokens + 1):
        strings = torch.cartesian_prod(*[words] * n).view(-1, n)                       # (W^n, n)
        levels.append(F.pad(strings, (0, max_tokens - n), value=eot))
    n_words = torch.cat([torch.full((len(level),), n) for n, level in enumerate(levels)])
    return torch.cat(levels), torch.arange(max_tokens) <= n_words[:, None]


@torch.no_grad()
def all_logprobs(model, prompt, max_tokens, eot):
    """log pi(y|x) of every response to one prompt (P,) int, in the order of all_responses.

    Returns (Y,), nats, float32 or wider. The tree of strings is walked level by level. A level
    holds all strings of n words and their cache, so that a string is computed once for all
    responses that begin with it. The last word costs nothing: its parent's logits have it.
    """
    def next_logprobs(tokens):                                   # (N, T) -> (N, V)
        logits = model(tokens, cache)[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    vocab_size = model.config.vocab_size
    words = torch.tensor([token for token in range(vocab_size) if token != eot]).to(prompt.device)
    cache = []
    following = next_logprobs(prompt[None])                      # (1, V): behind the prompt
    string_logprob = torch.zeros_like(following[:, 0])           # (N,): log pi(these words|x)
    levels = [following[:, eot]]
    for _ in range(max_tokens - 1):
        string_logprob = (string_logprob[:, None] + following[:, words]).view(-1)      # (N W,)
        cache = [tuple(part.repeat_interleave(len(words), 0) for part in layer) for layer in cache]
        following = next_logprobs(words.repeat(len(following))[:, None])               # (N W, V)
        levels.append(string_logprob + following[:, eot])        # these words, then end-of-text
    levels.append((string_logprob[:, None] + following[:, words]).view(-1))            # cut off
    return torch.cat(levels)


@torch.no_grad()
def all_rewards(reward_model, prompt, max_tokens, eot):
    """What a reward model gives every response to one prompt (P,) int: (Y,), as all_responses.

    It is read at a response's last token. So each response costs a token, the longest too: some
    seconds for a prompt's 406,901, where all_logprobs takes a fifth of one.
    """
    words = torch.tensor([token for token in range(reward_model.config.vocab_size) if token != eot])
    words, end = words.to(prompt.device), torch.tensor([eot], device=prompt.device)

    def follow(cache, tokens):                                   # N strings, K tokens
        """The value of each string with each token behind it, (N K,), and the cache of these."""
        n = cache[0][0].shape[0]
        cache = [tuple(part.repeat_interleave(len(tokens), 0) for part in layer) for layer in cache]
        return reward_model(tokens.repeat(n)[:, None], cache)[:, 0], cache

    cache, levels = [], []
    reward_model(prompt[None], cache)
    for n in range(max_tokens):
        levels.append(follow(cache, end)[0])                     # n words, then end-of-text
        if n < max_tokens - 1:
            cache = follow(cache, words)[1]
    chunks = zip(*(zip(*(part.split(100) for part in layer)) for layer in cache))
    levels += [follow([*chunk], words)[0] for chunk in chunks]   # cut off: too many for one pass
    return torch.cat(levels)


# ---------------------------------------------------------------- what no policy changes
def policy_logprobs(model, prompts):
    """log pi(y|x) of every response to prompts (P, 3) int. Returns (P, Y), nats.

    A float32 model's probabilities add up to 1 within 1e-7. J would multiply the error by beta,
    so they are normalised here. FloatingPointError where the model has left the numbers.
    """
    prompts = prompts.to(model.wte.weight.device)
    logprobs = torch.stack([all_logprobs(model, prompt, data.MAX_TOKENS, data.EOT).cpu().double()
                            for prompt in prompts])
    log_total = logprobs.logsumexp(1, keepdim=True)
    if not logprobs.isfinite().all():
        raise FloatingPointError("the policy's probabilities are not numbers")
    return logprobs - log_total


class World:
    """What is known of P prompts before any policy.

    prompts (P, 3) tokens; beta the task's; rewards (P, Y) the judge's; ref_logprobs (P, Y) nats;
    optimum (P,) the largest possible J of each prompt: beta log Z(x), Eq. 19. As r takes only some
    hundred values: levels (L,), and level_logprobs (P, L), log of pi_ref's probability of each.
    """

    def __init__(self, reference, prompts, beta, level=0.0):
        """prompts: P strings; level: as data.prompt_level's."""
        self.prompts, self.beta = data.encode_prompts(prompts), beta
        responses, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
        self.rewards = torch.stack([data.reward(prompt.expand(len(responses), -1), responses)
                                    for prompt in self.prompts]).double()
        self.rewards += data.prompt_level(self.prompts, level).double()[:, None]
        self.ref_logprobs = policy_logprobs(reference, self.prompts)
        self.optimum = una.optimal_policy(self.ref_logprobs, self.rewards, beta)[1]
        self.levels, index = self.rewards.unique(return_inverse=True)
        mass = torch.zeros(len(self.prompts), len(self.levels), dtype=torch.float64)
        self.level_logprobs = mass.scatter_add(1, index, self.ref_logprobs.exp()).log()


# ---------------------------------------------------------------- what a policy reaches
def mean(logprobs, values):
    """E_{y~pi} of values, both (..., Y). Returns (...)."""
    return (logprobs.exp() * values).sum(-1)


def kl_divergence(logprobs, ref_logprobs):
    """KL(pi || pi_ref), both (..., Y). Returns (...), nats. A response of probability 0 adds 0."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).where(logprobs > -math.inf, 0.0).sum(-1)


def evaluate(world, logprobs):
    """What a policy with these logprobs (P, Y) reaches: means over the prompts, as numbers.

    reward E r; kl in nats; objective J = reward - beta kl, Eq. 3; optimum J*; regret J* - J.
    """
    reward = mean(logprobs, world.rewards).mean().item()
    kl = kl_divergence(logprobs, world.ref_logprobs).mean().item()
    objective, optimum = reward - world.beta * kl, world.optimum.mean().item()
    return dict(reward=reward, kl=kl, objective=objective, optimum=optimum,
                regret=optimum - objective)


def evaluate_in_full(world, logprobs):
    """evaluate's figures, and frontier_reward and residual_variance."""
    figures = evaluate(world, logprobs)
    return figures | dict(frontier_reward=frontier_reward(world, figures["kl"]),
                          residual_variance=residual_variance(world, logprobs))


def reference_and_optimum(worlds):
    """Where every run begins and the best it could reach: entries of pi_ref and of pi*.

    worlds: {"train": World, "heldout": World}. Beside the figures of both worlds, pi_ref has the
    dots of a picture and pi* the frontier.
    """
    start, best, train = {}, {}, worlds["train"]
    for name, world in worlds.items():
        optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
        start[name] = evaluate_in_full(world, world.ref_logprobs)
        best[name] = evaluate_in_full(world, optimum)
    start["dots"] = reward_dots(train, train.ref_logprobs)
    best["frontier"] = frontier_curve(train, 1.5 * best["train"]["kl"])
    return start, best


def reward_dots(world, logprobs):
    """(explicit, implicit) rewards, two lists, of the responses that pi_ref gives over 1 in 1000.

    The implicit reward is beta log pi/pi_ref + beta log Z(x): by Eq. 18 the two agree for every y
    if and only if the policy is optimal.
    """
    likely = world.ref_logprobs > math.log(1 / 1000)
    offset = world.optimum[:, None]
    implicit = una.implicit_reward(logprobs, world.ref_logprobs, world.beta, offset)
    return [[round(value, 3) for value in rewards[likely].tolist()]
            for rewards in (world.rewards, implicit)]


class Observer:
    """Looks at a policy while it trains: a point of its curve each time, all figures at the end.

    worlds: {"train": World, "heldout": World}; start: the figures of the reference, where every
    curve begins. Called as align does: observe(step, seconds, loss, policy).
    """

    def __init__(self, worlds, start, last_step):
        self.worlds, self.last_step, self.seconds = worlds, last_step, 0.0
        self.curve = [self.point(0, 0.0, start)]

    def point(self, step, seconds, figures):
        return dict(step=step, seconds=seconds, objective=figures["objective"],
                    regret=figures["regret"])

    def __call__(self, step, seconds, loss, policy):
        started = time.perf_counter()
        world = self.worlds["train"]
        logprobs = policy_logprobs(policy, world.prompts)
        self.curve.append(self.point(step, seconds, evaluate(world, logprobs)) | dict(loss=loss))
        if step == self.last_step:
            heldout = self.worlds["heldout"]
            self.last = dict(train=evaluate_in_full(world, logprobs), heldout=evaluate_in_full(
                heldout, policy_logprobs(policy, heldout.prompts)))
            self.dots = reward_dots(world, logprobs)
        self.seconds += time.perf_counter() - started

    def report(self):
        """What an entry of results.json has of it."""
        return dict(**self.last, curve=self.curve, evaluation_seconds=self.seconds, dots=self.dots)


# The residual of Eq. 7 is r - beta log pi/pi_ref. At the optimum it is beta log Z(x) for every y.
def residual_variance(world, logprobs):
    """Its variance under pi, mean over the prompts: 0 at the optimum alone. Squared reward."""
    residual = world.rewards - una.implicit_reward(logprobs, world.ref_logprobs, world.beta)
    centred = residual - mean(logprobs, residual)[:, None]
    return mean(logprobs, centred ** 2).mean().item()


# ---------------------------------------------------------------- the frontier
# pi_ref e^{r/b} / Z maximises E r - b KL (Eq. 4): no policy of its KL has more reward. All
# responses of one reward are tilted alike, so the levels are enough.
def tilted(world, b):
    """Mean KL and mean reward of pi_ref e^{r/b} / Z: a point of the frontier."""
    logprobs, _ = una.optimal_policy(world.level_logprobs, world.levels, b)
    kl = kl_divergence(logprobs, world.level_logprobs)
    return kl.mean().item(), mean(logprobs, world.levels).mean().item()


def frontier_curve(world, widest):
    """Points (KL, reward) of the frontier, up to the KL `widest`."""
    points = [tilted(world, b) for b in torch.logspace(2, -1.7, 200).tolist()]
    return [point for point in points if point[0] <= widest]


def frontier_reward(world, kl):
    """R*(KL): the highest mean reward at this KL.

    KL falls as b grows, so b is found by bisection of log b.
    """
    low, high = math.log(1e-3), math.log(1e6)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(world, math.exp(middle))[0] > kl else (low, middle)
    return tilted(world, math.exp(high))[1]


# ---------------------------------------------------------------- a reward model
def reward_model_report(model, judge):
    """How good a reward model is, and what a policy made of it, from rewards by it and the judge.

    model, judge (2, N): of N samples of the reference, then of N samples of the policy, 2i and
    2i + 1 answering one prompt. accuracy: how often the model orders two of the reference's
    samples as the judge does, where the judge prefers one. model_gain, judge_gain: how far the
    policy's mean reward lies above the reference's, by each.
    """
    model_gap, judge_gap = (rewards[0, 0::2] - rewards[0, 1::2] for rewards in (model, judge))
    differ = judge_gap.abs() > 1e-6
    return dict(accuracy=(model_gap * judge_gap > 0)[differ].float().mean().item(),
                model_gain=(model[1].mean() - model[0].mean()).item(),
                judge_gain=(judge[1].mean() - judge[0].mean()).item())
