"""The toy language, its reward, and the three kinds of feedback. Knows neither models nor losses.

A prompt is a mood and a noun, "happy sea :". A good response is that noun behind two adjectives
that suit the mood, " bright warm sea". With 26 tokens, and at most four of them in a response,
a prompt has 406,901 possible responses: few enough to list them all, so the best policy is known.
"""
import functools
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import tiktoken
import torch

# What an adjective does to each mood is the dot product of its (joy, energy) with the mood's.
MOODS = {"happy": (1, 0), "sad": (-1, 0), "calm": (0, -1), "wild": (0, 1)}
NOUNS = ["sea", "wind", "fire", "night"]
ADJECTIVES = {
    "golden": (1.0, 0.2), "bright": (0.8, 0.5), "warm": (0.7, -0.3), "sweet": (0.6, -0.5),
    "grey": (-0.4, -0.2), "cold": (-0.6, 0.1), "bitter": (-0.8, 0.4), "bleak": (-1.0, -0.4),
    "silent": (-0.1, -1.0), "still": (0.1, -0.8), "slow": (-0.2, -0.6), "soft": (0.5, -0.7),
    "quick": (0.3, 0.6), "loud": (-0.3, 0.7), "furious": (-0.7, 0.9), "dancing": (0.9, 1.0),
}
PROMPTS = [f"{mood} {noun} :" for mood in MOODS for noun in NOUNS]
# Never any feedback on these: each mood once, each noun once.
HELDOUT_PROMPTS = ["happy sea :", "sad wind :", "calm fire :", "wild night :"]
TRAIN_PROMPTS = [prompt for prompt in PROMPTS if prompt not in HELDOUT_PROMPTS]
# What --level 1 adds to all rewards of a prompt, by its noun. It is f(x) itself: no preference
# between two responses to a prompt changes, and neither does the best policy.
LEVELS = {"sea": -1.0, "wind": -1 / 3, "fire": 1 / 3, "night": 1.0}
PROMPT_TOKENS = 3
MAX_TOKENS = 4                     # of a response, its end-of-text included
BLOCK_SIZE = PROMPT_TOKENS + MAX_TOKENS

# A token is a word with the space before it, so text encodes the same in one piece or two:
# encode(prompt + response) is encode(prompt) + encode(response). Moods alone have no space: they
# come first in a prompt.
WORDS = [*MOODS, *(f" {word}" for word in [*NOUNS, ":", *ADJECTIVES])]
ENCODING = tiktoken.Encoding("una-toy", pat_str=r" ?\S+", explicit_n_vocab=len(WORDS) + 1,
                             mergeable_ranks={word.encode(): i for i, word in enumerate(WORDS)},
                             special_tokens={"<|endoftext|>": len(WORDS)})
EOT = ENCODING.eot_token


@functools.lru_cache(maxsize=4096)
def _encode(text):
    """Text -> its tokens, a list. ValueError at the first piece of it that is not in WORDS."""
    # tiktoken alone would panic at an unknown word, and skip a space that no word follows.
    for word in re.findall(r" ?\S+|\s", text):
        if word not in WORDS:
            raise ValueError(f"{word!r} in {text!r} is no word of the language: "
                             "moods begin with no space, all others with one")
    return ENCODING.encode_ordinary(text)


def encode_prompts(prompts):
    """Prompts (a list of B strings) -> tokens (B, PROMPT_TOKENS).

    ValueError at an unknown word, and where the words are not PROMPT_TOKENS.
    """
    rows = []
    for prompt in prompts:
        rows.append(_encode(prompt))
        if len(rows[-1]) != PROMPT_TOKENS:
            raise ValueError(f"a prompt has {PROMPT_TOKENS} words, {prompt!r} has {len(rows[-1])}")
    return torch.tensor(rows)


def encode_responses(responses):
    """Responses (a list of B strings) -> tokens and mask (B, MAX_TOKENS), as model.sample's.

    Each gets an end-of-text. ValueError at an unknown word, and at more than MAX_TOKENS - 1 words.
    """
    tokens = torch.full((len(responses), MAX_TOKENS), EOT)
    mask = torch.zeros(len(responses), MAX_TOKENS, dtype=torch.bool)
    for i, response in enumerate(responses):
        ids = [*_encode(response), EOT]
        if len(ids) > MAX_TOKENS:
            raise ValueError(f"a response has at most {MAX_TOKENS - 1} words and an end-of-text, "
                             f"{response!r} has {len(ids) - 1} words")
        tokens[i, :len(ids)] = torch.tensor(ids)
        mask[i, :len(ids)] = True
    return tokens, mask


def decode_response(tokens, mask):
    """Tokens and mask (MAX_TOKENS,) of a response -> its words, with " ..." if it was cut off."""
    tokens = tokens[mask].tolist()
    return ENCODING.decode(tokens[:-1]) if tokens[-1] == EOT else ENCODING.decode(tokens) + " ..."


def join(prompts, responses, response_mask):
    """Prompts (B, S), responses, mask (B, T) -> tokens, mask (B, S + T) for sequence_logprob."""
    prompt_mask = torch.zeros_like(prompts, dtype=torch.bool)
    return torch.cat([prompts, responses], dim=1), torch.cat([prompt_mask, response_mask], dim=1)


# ---------------------------------------------------------------- the reward
ADJECTIVE, NOUN, END, OTHER = range(4)                        # kinds of tokens
GRAMMAR = torch.tensor([ADJECTIVE, ADJECTIVE, NOUN, END])
UNGRAMMATICAL, WRONG_NOUN = -3.0, -1.0


def fit(mood, adjective):
    """How well an adjective suits a mood, in [-1, 1]."""
    (joy, energy), (joy_wanted, energy_wanted) = ADJECTIVES[adjective], MOODS[mood]
    return joy_wanted * joy + energy_wanted * energy


def _tables():
    kind = torch.full((ENCODING.n_vocab,), OTHER)
    fits = torch.zeros(ENCODING.n_vocab, ENCODING.n_vocab)    # fits[mood, adjective], 0 elsewhere
    kind[EOT] = END
    for noun in NOUNS:
        kind[ENCODING.encode_single_token(f" {noun}")] = NOUN
    for adjective in ADJECTIVES:
        token = ENCODING.encode_single_token(f" {adjective}")
        kind[token] = ADJECTIVE
        for mood in MOODS:
            fits[ENCODING.encode_single_token(mood), token] = fit(mood, adjective)
    levels = torch.zeros(ENCODING.n_vocab)                    # levels[noun]
    for noun, level in LEVELS.items():
        levels[ENCODING.encode_single_token(f" {noun}")] = level
    return kind, fits, levels


KIND, FITS, LEVEL = _tables()


def reward(prompts, responses):
    """r(x, y), the judge: prompts (B, 3), responses (B, 4) -> (B,) in [-3, 2], on the CPU.

    Responses are filled with end-of-text. Two adjectives and a noun have the sum of the
    adjectives' fits to the mood, less 1 if the noun is not the prompt's. Anything else has -3, no
    more than the worst of those: a policy cannot please the judge by breaking the grammar.
    """
    prompts, responses = prompts.cpu(), responses.cpu()
    grammatical = (KIND[responses] == GRAMMAR).all(dim=1)
    right_noun = (responses == prompts[:, 1:2]).any(dim=1)
    quality = FITS[prompts[:, :1], responses].sum(dim=1)
    deduction = torch.where(right_noun, 0.0, WRONG_NOUN)
    return torch.where(grammatical, quality + deduction, UNGRAMMATICAL)


def prompt_level(prompts, level):
    """f(x) of --level: what it adds to all rewards of prompts (B, 3). Returns (B,), on the CPU."""
    return level * LEVEL[prompts[:, 1].cpu()]


# ---------------------------------------------------------------- what the reference model learns
def sentences(n, rng):
    """n sentences of the language, drawn with rng, a random.Random -> prompts, responses: texts.

    The adjectives lean to the mood, with weights e^fit. One sentence in ten has a word replaced by
    any other, as corpora have mistakes. Held-out prompts are among the prompts: the reference
    knows them, only feedback leaves them out.
    """
    prompts, responses = [], []
    for _ in range(n):
        prompt = rng.choice(PROMPTS)
        mood, noun, _ = prompt.split()
        leaning = [math.exp(fit(mood, adjective)) for adjective in ADJECTIVES]
        words = [*rng.choices(list(ADJECTIVES), leaning, k=2), noun]
        if rng.random() < 0.1:
            words[rng.randrange(len(words))] = rng.choice([*NOUNS, *ADJECTIVES, ":"])
        prompts.append(prompt)
        responses.append("".join(f" {word}" for word in words))
    return prompts, responses


# ---------------------------------------------------------------- feedback
@dataclass
class Feedback:
    """N responses and three kinds of feedback on them. Rows 2i and 2i + 1 answer the same prompt.

    tokens, mask (N, 7)  prompt and response, as join's
    pairs        (M, 2)  pairwise feedback: rows (chosen, rejected). y_w beats y_l with probability
                         sigma(r_w - r_l), Eq. 1
    labels       (N,)    binary feedback, floats: 1.0 (thumb up, desirable) with probability
                         sigma(r), the chance to beat a response of reward 0; else 0.0 (thumb down,
                         undesirable)
    scores       (N,)    score-based feedback: sigma(r), that chance itself
    """
    tokens: torch.Tensor
    mask: torch.Tensor
    pairs: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor


def feedback_on(prompts, responses, mask, generator, level=0.0):
    """Feedback on responses (N, 4), mask (N, 4), to prompts (N, 3), all on the CPU.

    N is even, and prompts 2i and 2i + 1 are the same. All three kinds are of the same responses.
    Two identical responses say nothing and are left out of pairs: M <= N / 2.
    """
    rewards = reward(prompts, responses)
    first, second = torch.arange(0, len(rewards), 2), torch.arange(1, len(rewards), 2)
    first_beats_second = torch.sigmoid(rewards[first] - rewards[second])                   # Eq. 1
    first_wins = torch.bernoulli(first_beats_second, generator=generator).bool()
    chosen = torch.where(first_wins, first, second)
    rejected = torch.where(first_wins, second, first)
    differ = (responses[first] != responses[second]).any(dim=1)
    pairs = torch.stack([chosen, rejected], dim=1)[differ]
    scores = torch.sigmoid(rewards + prompt_level(prompts, level))      # in pairs it cancels
    labels = torch.bernoulli(scores, generator=generator)
    return Feedback(*join(prompts, responses, mask), pairs, labels, scores)


def mismatched(tokens, mask):
    """KTO's mismatched pairs (x_i, y_j): each prompt with a response to another prompt.

    tokens, mask (N, 7) as Feedback's -> other_tokens, other_mask (N, 7). Row k has the response of
    row k - 2; where that answers the same prompt, of row k - 4, and so on, mod N. ValueError where
    all rows answer one prompt.
    """
    prompts = tokens[::2, :PROMPT_TOKENS]                                      # rows 2i, 2i + 1
    if (prompts == prompts[:1]).all():
        raise ValueError(f"mismatched pairs need two prompts, all {len(tokens)} rows answer one")
    other = torch.arange(len(prompts), device=tokens.device)
    while (same := (prompts[other] == prompts).all(dim=1)).any():
        other = torch.where(same, (other - 1) % len(other), other)
    row = torch.stack([2 * other, 2 * other + 1], dim=1).flatten()
    return torch.cat([tokens[:, :PROMPT_TOKENS], tokens[row, PROMPT_TOKENS:]], dim=1), mask[row]


# ---------------------------------------------------------------- feedback in batches
def shuffled(items, size, generator):
    """Batches of items for ever; what is left over at the end of a pass is dropped."""
    while True:
        order = torch.randperm(len(items), generator=generator)
        yield from items[order].split(size)[:max(1, len(items) // size)]


def take(feedback, rows):
    """What the feedback says of some responses: a batch."""
    return SimpleNamespace(**{name: tensor[rows] for name, tensor in vars(feedback).items()
                              if name != "pairs"})


def thirds(count):
    """Where labels begin, and where scores, among `count` mixed responses. Pairs stay whole."""
    third = count // 6 * 2
    return third, 2 * third


def stored_batches(kind, feedback, size, seed):
    """For ever: a batch of stored feedback of one kind, of `size` responses for every kind. At the
    first, ValueError where there is none.

    An item is one response, or two: (chosen, rejected). Of mixed feedback each response has one
    kind: a third of them its pairs, a third its labels, a third its scores.
    """
    count = len(feedback.tokens)
    rows = torch.arange(count, device=feedback.tokens.device)[:, None]
    labels, scores = thirds(count)
    pairs_of_first_third = feedback.pairs[feedback.pairs[:, 1] < labels]
    items = dict(pairs=feedback.pairs, binary=rows, scores=rows,
                 mixed=torch.cat([pairs_of_first_third, rows[labels:].expand(-1, 2)]))[kind]
    if not len(items):
        raise ValueError(f"no pairs among {count} responses: in each both are the same")
    size = max(1, round(size * len(items) / count))
    for batch in shuffled(items, size, torch.Generator().manual_seed(seed)):
        if kind == "mixed":
            yield _mixed_batch(feedback, *batch.T, labels, scores)
        else:
            yield take(feedback, batch.T.flatten())


def _mixed_batch(feedback, first, second, labels, scores):
    """Rows `first`, then the rejected ones of its pairs; and which rows are what."""
    pair = first < labels
    batch = take(feedback, torch.cat([first, second[pair]]))
    batch.chosen = pair.nonzero().flatten()
    batch.rejected = torch.arange(len(first), len(batch.tokens), device=first.device)
    batch.binary = ((labels <= first) & (first < scores)).nonzero().flatten()
    batch.scored = (scores <= first).nonzero().flatten()
    return batch
