"""How far a policy is from the truth: every response listed, so that nothing is estimated.

X prompts, Y responses. Float64 on the CPU, but for what a model computes in its own precision.
"""
import math

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
    depths = [torch.full((1, max_tokens), eot)]                  # no word at all
    for n in range(1, max_tokens + 1):
        strings = torch.cartesian_prod(*[words] * n).view(-1, n)                       # (W^n, n)
        depths.append(F.pad(strings, (0, max_tokens - n), value=eot))
    tokens = torch.cat(depths)
    return tokens, torch.arange(max_tokens) <= (tokens != eot).sum(1, keepdim=True)


@torch.no_grad()
def all_logprobs(model, prompt, max_tokens, eot):
    """log pi(y|x) of every response to one prompt (S,) int, in the order of all_responses.

    Returns (Y,), nats, float32 or wider. The tree of strings is walked depth by depth. At depth n
    are all strings of n words and their cache, so that a string is computed once for all responses
    that begin with it. The last word costs nothing: its parent's logits have it.
    """
    def next_logprobs(tokens):                                   # (N, T) -> (N, V)
        logits = model(tokens, cache)[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    words = [token for token in range(model.config.vocab_size) if token != eot]
    words, cache = torch.tensor(words, device=prompt.device), []
    following = next_logprobs(prompt[None])                      # (1, V): behind the prompt
    string_logprob = torch.zeros_like(following[:, 0])           # (N,): log pi(these words|x)
    depths = [following[:, eot]]
    for _ in range(max_tokens - 1):
        string_logprob = (string_logprob[:, None] + following[:, words]).view(-1)      # (N W,)
        cache = [tuple(part.repeat_interleave(len(words), 0) for part in layer) for layer in cache]
        following = next_logprobs(words.repeat(len(following))[:, None])               # (N W, V)
        depths.append(string_logprob + following[:, eot])        # these words, then end-of-text
    depths.append((string_logprob[:, None] + following[:, words]).view(-1))            # cut off
    return torch.cat(depths)


@torch.no_grad()
def all_rewards(reward_model, prompt, max_tokens, eot):
    """What a reward model gives every response to one prompt (S,) int: (Y,), as all_responses.

    It is read at a response's last token. So each response costs a token, the longest too: some
    seconds for a prompt's 406,901, where all_logprobs takes a fifth of one.
    """
    words = [token for token in range(reward_model.config.vocab_size) if token != eot]
    words, end = (torch.tensor(tokens, device=prompt.device) for tokens in (words, [eot]))

    def follow(cache, tokens):                                   # N strings, K tokens
        """The value of each string with each token behind it, (N K,), and the cache of these."""
        n = cache[0][0].shape[0]
        cache = [tuple(part.repeat_interleave(len(tokens), 0) for part in layer) for layer in cache]
        return reward_model(tokens.repeat(n)[:, None], cache)[:, 0], cache

    cache, depths = [], []
    reward_model(prompt[None], cache)
    for n in range(max_tokens):
        depths.append(follow(cache, end)[0])                     # n words, then end-of-text
        if n < max_tokens - 1:
            cache = follow(cache, words)[1]
    chunks = zip(*(zip(*(part.split(100) for part in layer)) for layer in cache))
    depths += [follow([*chunk], words)[0] for chunk in chunks]   # cut off: too many for one pass
    return torch.cat(depths)


# ---------------------------------------------------------------- what no policy changes
def policy_logprobs(model, prompts):
    """log pi(y|x) of every response to prompts (X, 3) int. Returns (X, Y), nats.

    A float32 model's probabilities add up to 1 within 1e-7. J would multiply the error by beta,
    so they are normalised here. FloatingPointError where the model has left the numbers.
    """
    prompts = prompts.to(model.wte.weight.device)
    logprobs = torch.stack([all_logprobs(model, prompt, data.MAX_TOKENS, data.EOT).cpu().double()
                            for prompt in prompts])
    if not logprobs.isfinite().all():
        raise FloatingPointError("the policy's probabilities are not numbers")
    return logprobs - logprobs.logsumexp(1, keepdim=True)


class World:
    """What is known of X prompts before any policy.

    prompts (X, 3) tokens; beta the task's; rewards (X, Y) the judge's; ref_logprobs (X, Y) nats;
    optimum (X,) the largest possible J of each prompt: beta log Z(x), Eq. 19; gain (X,) how far it
    lies above the reference's J; kinds (X, Y), of KINDS. As r takes only some hundred values:
    values (R,), and value_logprobs (X, R), log of pi_ref's probability of each.
    """

    def __init__(self, reference, prompts, beta, level=0.0):
        """prompts: X strings; level: as data.prompt_level's."""
        self.prompts, self.beta = data.encode_prompts(prompts), beta
        responses, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
        self.rewards = torch.stack([data.reward(prompt.expand(len(responses), -1), responses)
                                    for prompt in self.prompts]).double()
        self.rewards += data.prompt_level(self.prompts, level).double()[:, None]
        self.kinds = torch.stack([kinds_of(prompt, responses) for prompt in self.prompts])
        self.ref_logprobs = policy_logprobs(reference, self.prompts)
        self.optimum = una.optimal_policy(self.ref_logprobs, self.rewards, beta)[1]
        self.gain = self.optimum - expect(self.ref_logprobs, self.rewards)
        if not self.gain.mean() > 1e-9:
            raise ValueError("all responses have the same reward: no policy can gain anything")
        self.values, index = self.rewards.unique(return_inverse=True)
        mass = torch.zeros(len(self.prompts), len(self.values), dtype=torch.float64)
        self.value_logprobs = mass.scatter_add(1, index, self.ref_logprobs.exp()).log()


# What a response is, to the grammar: a sentence about the prompt's noun or another's; the
# end-of-text at once; another string that ends; one that was cut off.
KINDS = ("right", "wrong noun", "no word", "wrong word", "no end")


def kinds_of(prompt, responses):
    """Which of KINDS responses (Y, max_tokens) to a prompt (3,) are: (Y,), small integers."""
    ends = responses == data.EOT
    kinds = torch.full(responses.shape[:1], KINDS.index("wrong word"), dtype=torch.int8)
    kinds[ends[:, 0]] = KINDS.index("no word")
    kinds[~ends.any(1)] = KINDS.index("no end")
    sentence = (data.KIND[responses] == data.GRAMMAR).all(1)
    own = (responses == prompt[1]).any(1)
    kinds[sentence & own], kinds[sentence & ~own] = KINDS.index("right"), KINDS.index("wrong noun")
    return kinds


def masses(world, logprobs):
    """{kind: a policy's probability of all its strings, mean over the prompts}."""
    return {kind: logprobs.exp().where(world.kinds == i, 0.0).sum(1).mean().item()
            for i, kind in enumerate(KINDS)}


# ---------------------------------------------------------------- what a policy reaches
def expect(logprobs, values):
    """E_{y~pi} of values, both (..., Y). Returns (...)."""
    return (logprobs.exp() * values).sum(-1)


def kl_divergence(logprobs, ref_logprobs):
    """KL(pi || pi_ref), both (..., Y). Returns (...), nats. A response of probability 0 adds 0."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).where(logprobs > -math.inf, 0.0).sum(-1)


def evaluate(world, logprobs):
    """What a policy with these logprobs (X, Y) reaches: means over the prompts, as numbers.

    reward E r; kl in nats; objective J = reward - beta kl, Eq. 3; optimum J*; regret J* - J; lost,
    the regret as a share of pi_ref's: 0 at the optimum, 1 at the reference; frontier_reward, the
    most that any policy of this kl has.
    """
    reward = expect(logprobs, world.rewards).mean().item()
    kl = kl_divergence(logprobs, world.ref_logprobs).mean().item()
    objective, optimum = reward - world.beta * kl, world.optimum.mean().item()
    regret = optimum - objective
    return dict(reward=reward, kl=kl, objective=objective, optimum=optimum, regret=regret,
                lost=regret / world.gain.mean().item(), frontier_reward=frontier_reward(world, kl))


def reference_and_optimum(worlds):
    """Where every run begins and the best it could reach: {split: figures} of pi_ref, with the dots
    of a picture, and of pi*, with points (KL, reward) of the frontier. worlds: {split: World}."""
    start, best, train = {}, {}, worlds["train"]
    for split, world in worlds.items():
        optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
        start[split] = evaluate(world, world.ref_logprobs)
        best[split] = evaluate(world, optimum)
    start["dots"] = reward_dots(train, train.ref_logprobs)
    points = (tilted(train, b) for b in torch.logspace(2, -1.7, 200).tolist())
    best["frontier"] = [(kl, reward) for kl, reward in points if kl <= 1.5 * best["train"]["kl"]]
    return start, best


def reward_dots(world, logprobs):
    """(explicit, implicit) rewards, two lists, of the responses that pi_ref gives over 1 in 300.

    The implicit reward is beta log pi/pi_ref + beta log Z(x): by Eq. 18 the two agree for every y
    if and only if the policy is optimal.
    """
    likely = world.ref_logprobs > math.log(1 / 300)
    implicit = una.implicit_reward(logprobs, world.ref_logprobs, world.beta, world.optimum[:, None])
    return [[round(value, 3) for value in rewards[likely].tolist()]
            for rewards in (world.rewards, implicit)]


# ---------------------------------------------------------------- where what is lost is lost
# What is lost is KL(pi || pi*), in units of KL(pi_ref || pi*) (una.py, below Eq. 19). Let D be the
# responses to x that anyone judged, m and m* the mass that pi and pi* give them. By the chain rule
#     KL(pi || pi*) =  m KL(pi|D || pi*|D)                                              judged
#                    + m log m/m* + (1-m) log (1-m)/(1-m*) + (1-m) KL(pi|D' || pi*|D')  unjudged
# where D' is what nobody judged. Both are at least 0: a bias, and a leak of probability.
def lost_parts(world, logprobs, judged):
    """The two parts of lost, which add up to it, and pi's mass outside of D, mean over the prompts.

    logprobs, judged (X, Y), the latter bool: is the response in D?
    """
    optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
    log_m, log_best = (part.where(judged, -math.inf).logsumexp(1) for part in (logprobs, optimum))
    m, terms = log_m.exp(), logprobs.exp() * (logprobs - optimum)
    bias = terms.where(judged, 0.0).sum(1) - (m * (log_m - log_best)).where(m > 0, 0.0)
    unit = world.gain.mean().item() / world.beta                 # KL(pi_ref || pi*)
    whole, bias = terms.sum(1).mean().item() / unit, bias.mean().item() / unit
    return dict(judged=bias, unjudged=whole - bias, unjudged_mass=1 - m.mean().item())


def index_of(responses, vocab_size, eot):
    """Where responses (N, max_tokens), filled with eot, stand in all_responses: (N,)."""
    # A string of words, numbered from 1 without the eot, is a number: its place, as the shorter
    # strings come first.
    digits, place = responses + (responses < eot).long(), torch.zeros_like(responses[:, 0])
    for digit, is_word in zip(digits.T, (responses != eot).T):
        place = torch.where(is_word, place * (vocab_size - 1) + digit, place)
    return place


def noting(batches, world, judged):
    """The batches as they are; judged (X, Y) becomes True where one of their responses stands."""
    for batch in batches:
        x, y = batch.tokens.cpu().split([data.PROMPT_TOKENS, data.MAX_TOKENS], dim=1)
        prompt = (x[:, None] == world.prompts).all(-1).long().argmax(1)
        judged[prompt, index_of(y, data.ENCODING.n_vocab, data.EOT)] = True
        yield batch


# ---------------------------------------------------------------- where GRPO stands still
# A loss whose KL at a token is held but for that token's own logits (una.py, at GRPO) stands still
# where at each prefix h, with Q(h, token) = E_{y~pi} r of what a token leads to,
#     pi(.|h) = tilt(pi_ref(.|h), Q(h, .), beta).
# pi is needed behind h alone, so that this is worked out from the last token back.
def by_token(world, rewards, beta, tilt):
    """log pi of it, (X, Y). tilt: una.k3_optimal_policy; for k2 una.optimal_policy's first."""
    words = data.ENCODING.n_vocab - 1
    sizes = [words ** n for n in range(data.MAX_TOKENS + 1)]     # prefixes of n words
    ends, value = (part.split(sizes, 1) for part in (world.ref_logprobs, rewards))
    begins, Q, choices = ends[-1], value[-1], []                 # log pi_ref of all that begins so
    for n in reversed(range(data.MAX_TOKENS)):
        begins, Q = (torch.cat([end[n][..., None], further.view(len(Q), -1, words)], 2)
                     for end, further in ((ends, begins), (value, Q)))                # (X, W^n, V)
        total = begins.logsumexp(2)
        choices.append(tilt(begins - total[..., None], Q, beta))
        begins, Q = total, expect(choices[-1], Q)
    string, depths = torch.zeros_like(begins), []                # log pi of n words
    for choice in reversed(choices):
        depths.append(string + choice[..., 0])
        string = (string[..., None] + choice[..., 1:]).flatten(1)
    return torch.cat([*depths, string], 1)


# The loss has A where rewards stand here: r less what is the same for all, over the spread of a
# group. That of an endless group is the policy's own. A group of n knows its own mean and spread
# alone, and y is one of it: E A given r(y) is less than it would be, and no straight line in r.
def advantages_in_groups(world, logprobs, n, draws=1000):
    """E A given r(y), (X, Y), of groups of y and n - 1 others of the policy, from so many draws."""
    values, index = world.rewards.unique(return_inverse=True)
    mass = torch.zeros(len(index), len(values)).double().scatter_add(1, index, logprobs.exp())
    drawn = mass.multinomial(draws * (n - 1), True, generator=torch.Generator().manual_seed(0))
    others, means = values[drawn].view(-1, draws, n - 1), []
    total, squares = others.sum(2), (others ** 2).sum(2)         # (X, draws)
    for value in values:
        mean, square = (total + value) / n, (squares + value ** 2) / n
        spread = ((square - mean ** 2).clamp(min=0) * n / (n - 1)).sqrt() + 1e-4
        means.append(((value - mean) / spread).mean(1))
    return torch.stack(means, 1).gather(1, index)


def by_group(world, beta, tilt, n=None, rounds=12):
    """by_token of GRPO's advantages under the policy itself: in groups of n, or in endless ones."""
    logprobs = world.ref_logprobs
    for _ in range(rounds):
        if n:
            advantages = advantages_in_groups(world, logprobs, n)
        else:
            above = world.rewards - expect(logprobs, world.rewards)[:, None]
            advantages = above / expect(logprobs, above ** 2).sqrt()[:, None]
        logprobs = by_token(world, advantages, beta, tilt)
    return logprobs


# ---------------------------------------------------------------- the frontier
# pi_ref e^{r/b} / Z maximises E r - b KL (Eq. 4): no policy of its KL has more reward. All
# responses of one reward are tilted alike, so the values are enough.
def tilted(world, b):
    """Mean KL and mean reward of pi_ref e^{r/b} / Z: a point of the frontier."""
    logprobs, _ = una.optimal_policy(world.value_logprobs, world.values, b)
    kl = kl_divergence(logprobs, world.value_logprobs)
    return kl.mean().item(), expect(logprobs, world.values).mean().item()


def frontier_reward(world, kl):
    """R*(KL), the highest mean reward at this KL, by bisection of log b: KL falls as b grows."""
    low, high = math.log(1e-3), math.log(1e6)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(world, math.exp(middle))[0] > kl else (low, middle)
    return tilted(world, math.exp(high))[1]
