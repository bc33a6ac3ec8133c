"""The toy language, its reward, and the three kinds of feedback. Knows neither models nor losses.

A prompt is a mood and a noun, "happy sea :", and a good response is that noun behind two adjectives that suit the mood,
" bright warm sea". 26 tokens, and responses of at most four, make 406,901 possible responses to a prompt: few enough to
list them all, so that the best policy is known.
"""
import math
from dataclasses import dataclass

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
HELDOUT_PROMPTS = ["happy sea :", "sad wind :", "calm fire :", "wild night :"]   # never any feedback; each mood, noun once
TRAIN_PROMPTS = [prompt for prompt in PROMPTS if prompt not in HELDOUT_PROMPTS]
PROMPT_TOKENS = 3
MAX_TOKENS = 4                     # of a response, its end-of-text included
BLOCK_SIZE = PROMPT_TOKENS + MAX_TOKENS

# A token is a word with the space before it, so text encodes the same in one piece or two: encode(prompt + response) is
# encode(prompt) + encode(response). Only the first word of a prompt has no space.
WORDS = [*MOODS, *(f" {word}" for word in [*NOUNS, ":", *ADJECTIVES])]
ENCODING = tiktoken.Encoding("una-toy", pat_str=r" ?\S+", explicit_n_vocab=len(WORDS) + 1,
                             mergeable_ranks={word.encode(): i for i, word in enumerate(WORDS)},
                             special_tokens={"<|endoftext|>": len(WORDS)})
EOT = ENCODING.eot_token


def encode_prompts(prompts):
    """Prompts (a list of B strings) -> tokens (B, PROMPT_TOKENS)."""
    return torch.tensor([ENCODING.encode_ordinary(prompt) for prompt in prompts])


def encode_responses(responses):
    """Responses (a list of B strings, a space before each word) -> tokens and mask (B, MAX_TOKENS), as model.sample's."""
    tokens = torch.full((len(responses), MAX_TOKENS), EOT)
    mask = torch.zeros(len(responses), MAX_TOKENS, dtype=torch.bool)
    for i, response in enumerate(responses):
        ids = [*ENCODING.encode_ordinary(response), EOT]
        tokens[i, :len(ids)] = torch.tensor(ids)
        mask[i, :len(ids)] = True
    return tokens, mask


def decode_response(tokens, mask):
    """One response, tokens and mask (MAX_TOKENS,), as text without its end-of-text; " ..." marks one that was cut off."""
    tokens = tokens[mask].tolist()
    return ENCODING.decode(tokens[:-1]) if tokens[-1] == EOT else ENCODING.decode(tokens) + " ..."


def join(prompts, responses, response_mask):
    """Prompts (B, P), responses and mask (B, R) -> tokens and response_mask (B, P + R), as sequence_logprob takes them."""
    prompt_mask = torch.zeros_like(prompts, dtype=torch.bool)
    return torch.cat([prompts, responses], dim=1), torch.cat([prompt_mask, response_mask], dim=1)


# ---------------------------------------------------------------- the reward
ADJECTIVE, NOUN, END, OTHER = range(4)                                      # kinds of tokens
GRAMMAR = torch.tensor([ADJECTIVE, ADJECTIVE, NOUN, END])
UNGRAMMATICAL, WRONG_NOUN = -3.0, -1.0


def fit(mood, adjective):
    """How well an adjective suits a mood, in [-1, 1]."""
    return sum(a * b for a, b in zip(MOODS[mood], ADJECTIVES[adjective]))


def _tables():
    kind = torch.full((ENCODING.n_vocab,), OTHER)
    fits = torch.zeros(ENCODING.n_vocab, ENCODING.n_vocab)                   # fits[mood, adjective], 0 elsewhere
    kind[EOT] = END
    for noun in NOUNS:
        kind[ENCODING.encode_single_token(f" {noun}")] = NOUN
    for adjective in ADJECTIVES:
        token = ENCODING.encode_single_token(f" {adjective}")
        kind[token] = ADJECTIVE
        for mood in MOODS:
            fits[ENCODING.encode_single_token(mood), token] = fit(mood, adjective)
    return kind, fits


KIND, FITS = _tables()


def reward(prompts, responses):
    """r(x, y), the judge: prompts (B, 3), responses (B, 4) filled with end-of-text -> (B,) in [-3, 2], on the CPU.

    Two adjectives and a noun have the sum of the adjectives' fits to the mood, less 1 if the noun is not the prompt's.
    Anything else has -3, no more than the worst of those: a policy cannot please the judge by breaking the grammar.
    """
    prompts, responses = prompts.cpu(), responses.cpu()
    grammatical = (KIND[responses] == GRAMMAR).all(dim=1)
    right_noun = (responses == prompts[:, 1:2]).any(dim=1)
    quality = FITS[prompts[:, :1], responses].sum(dim=1) + torch.where(right_noun, 0.0, WRONG_NOUN)
    return torch.where(grammatical, quality, UNGRAMMATICAL)


# ---------------------------------------------------------------- what the reference model learns
def sentences(n, rng):
    """n sentences of the language, drawn with a random.Random: a list of prompts and a list of responses, text.

    The adjectives lean to the mood, with weights e^fit; one sentence in ten has a word replaced by any other, as corpora
    have mistakes. Held-out prompts are among the prompts: the reference knows them, only feedback leaves them out.
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
    """R judged responses, and what three kinds of judges say of them. Rows 2i and 2i + 1 answer the same prompt.

    tokens, mask             (R, 7)   prompt and response, as sequence_logprob takes them
    other_tokens, other_mask (R, 7)   the same prompt with the response to another one: KTO's mismatched pairs
    pairs                    (P, 2)   rows (chosen, rejected): y_w beats y_l with probability sigma(r_w - r_l), Eq. 1
    labels                   (R,)     thumbs: 1 with probability sigma(r), the chance to beat a response of reward 0; else 0
    scores                   (R,)     sigma(r), that chance itself
    """
    tokens: torch.Tensor
    mask: torch.Tensor
    other_tokens: torch.Tensor
    other_mask: torch.Tensor
    pairs: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor


def judge(prompts, responses, mask, generator):
    """Feedback on responses (R, 4), mask (R, 4), to prompts (R, 3), with R even and rows 2i and 2i + 1 the same; on the CPU.

    All three kinds are of the same responses. Two identical responses say nothing and are left out of pairs: P <= R / 2.
    """
    rewards = reward(prompts, responses)
    first, second = torch.arange(0, len(rewards), 2), torch.arange(1, len(rewards), 2)
    first_wins = torch.bernoulli(torch.sigmoid(rewards[first] - rewards[second]), generator=generator).bool()
    pairs = torch.stack([torch.where(first_wins, first, second), torch.where(first_wins, second, first)], dim=1)
    pairs = pairs[(responses[first] != responses[second]).any(dim=1)]
    scores = torch.sigmoid(rewards)
    return Feedback(*join(prompts, responses, mask), *join(prompts, responses.roll(2, 0), mask.roll(2, 0)),
                    pairs, torch.bernoulli(scores, generator=generator), scores)
