import itertools
import math
import random
import runpy
import socket
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import data
from data import (ADJECTIVES, ENCODING, EOT, HELDOUT_PROMPTS, MAX_TOKENS, MOODS, NOUNS, PROMPT_TOKENS, PROMPTS,
                  TRAIN_PROMPTS)
from model import GPT, GPTConfig, all_responses, response_logprobs
from una import sequence_logprob

GOOD = [f" {a} {b} {noun}" for a in ADJECTIVES for b in ADJECTIVES for noun in NOUNS]    # all responses of the grammar


@pytest.fixture(scope="module")
def everything():
    """Tokens and mask of all responses there are."""
    return all_responses(ENCODING.n_vocab, MAX_TOKENS, EOT)


def responses_to_one(prompt, responses):
    return data.reward(data.encode_prompts([prompt]).expand(len(responses), -1), responses)


def rewards(prompt, texts):
    """The judge's rewards of responses given as text, as a list."""
    return responses_to_one(prompt, data.encode_responses(texts)[0]).tolist()


def slow_reward(prompt, words):
    """The reward once more, from the words of a response; a cut-off response has no end among them."""
    mood, noun, _ = prompt.split()
    if len(words) != 4 or words[3] != "END" or words[2] not in NOUNS or not set(words[:2]) <= set(ADJECTIVES):
        return -3.0
    joy = ADJECTIVES[words[0]][0] + ADJECTIVES[words[1]][0]
    energy = ADJECTIVES[words[0]][1] + ADJECTIVES[words[1]][1]
    quality = {"happy": joy, "sad": -joy, "wild": energy, "calm": -energy}[mood]
    return quality if words[2] == noun else quality - 1


def sigmoid(r):
    return 1 / (1 + math.exp(-r))


def within(count, n, p, deviations=4.5):
    """Is a count of successes in n trials what the probability p would give?"""
    return abs(count - n * p) < deviations * math.sqrt(n * p * (1 - p))


def chi_square(counts, probs):
    n = sum(counts.values())
    assert counts.keys() <= probs.keys() and sum(probs.values()) == pytest.approx(1)
    return sum((counts[key] - n * p) ** 2 / (n * p) for key, p in probs.items())


def feedback_on(prompts, texts, seed=0):
    return data.judge(data.encode_prompts(prompts), *data.encode_responses(texts), torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the tokenizer
def test_the_tokenizer_has_26_tokens_and_is_built_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    encoding = runpy.run_path(data.__file__)["ENCODING"]
    assert encoding.n_vocab == 26 == len(MOODS) + len(NOUNS) + len(ADJECTIVES) + len(":") + len(["end-of-text"])


def test_every_word_is_one_token_and_end_of_text_the_last():
    ids = [ENCODING.encode_ordinary(word) for word in data.WORDS]
    assert ids == [[i] for i in range(25)] and EOT == 25
    assert ENCODING.decode([EOT]) == "<|endoftext|>"


def test_text_cannot_inject_an_end_of_text():
    # tiktoken panics at a word that it does not know, and a panic is no Exception.
    with pytest.raises(BaseException, match="key"):
        data.encode_responses([" sea<|endoftext|>"])
    with pytest.raises(BaseException, match="key"):
        data.encode_prompts(["happy sea :<|endoftext|>"])


def test_prompts_survive_encoding_and_decoding():
    tokens = data.encode_prompts(PROMPTS)
    assert tokens.shape == (16, PROMPT_TOKENS) == (16, 3) and tokens.dtype == torch.long
    assert [ENCODING.decode(row) for row in tokens.tolist()] == PROMPTS


def test_text_encodes_the_same_in_one_piece_or_two():
    encode = ENCODING.encode_ordinary
    for prompt, response in itertools.product(PROMPTS, ["", " sea", " :", *GOOD[::37]]):
        assert encode(prompt + response) == encode(prompt) + encode(response)
    # Without its space a response runs into the prompt.
    with pytest.raises(BaseException, match="key"):
        encode("happy sea :" + "sea")


def test_responses_are_encoded_with_one_end_and_masked_up_to_it():
    tokens, mask = data.encode_responses([" bright warm sea", " wind", ""])
    bright, warm, sea, wind = (data.WORDS.index(f" {word}") for word in ("bright", "warm", "sea", "wind"))
    assert tokens.tolist() == [[bright, warm, sea, 25], [wind, 25, 25, 25], [25, 25, 25, 25]]
    assert mask.tolist() == [[True, True, True, True], [True, True, False, False], [True, False, False, False]]


def test_every_response_that_ends_survives_decoding_and_encoding(everything):
    # Of 1 + 21 + 21^2 + 21^3 without moods, which have no space before them and would run into the word before.
    tokens, mask = (t[:1 + 25 + 25 ** 2 + 25 ** 3] for t in everything)
    speakable = (tokens >= len(MOODS)).all(1)
    tokens, mask = tokens[speakable], mask[speakable]
    texts = [data.decode_response(*row) for row in zip(tokens, mask)]
    assert len(set(texts)) == len(texts) == 1 + 21 + 21 ** 2 + 21 ** 3 and set(GOOD) < set(texts)
    again, again_mask = data.encode_responses(texts)
    assert torch.equal(again, tokens) and torch.equal(again_mask, mask)


def test_a_response_that_was_cut_off_is_shown_with_dots():
    sea, wind = (data.WORDS.index(word) for word in (" sea", " wind"))
    everywhere = torch.ones(4, dtype=torch.bool)
    assert data.decode_response(torch.tensor([sea, wind, sea, wind]), everywhere) == " sea wind sea wind ..."
    assert data.decode_response(torch.tensor([sea, wind, sea, EOT]), everywhere) == " sea wind sea"


def test_join_puts_the_response_behind_the_prompt_and_masks_it_alone():
    prompts = data.encode_prompts(["sad wind :", "wild sea :"])
    tokens, mask = data.encode_responses([" cold grey wind", " sea"])
    joined, joined_mask = data.join(prompts, tokens, mask)
    assert joined.shape == joined_mask.shape == (2, data.BLOCK_SIZE) == (2, 7) and joined_mask.dtype == torch.bool
    assert ENCODING.decode(joined[0].tolist()) == "sad wind : cold grey wind<|endoftext|>"
    assert ENCODING.decode(joined[1].tolist()) == "wild sea : sea" + 3 * "<|endoftext|>"
    assert joined_mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]


def test_joined_responses_have_the_enumerated_log_probabilities(everything):
    # data's masks, model's enumeration and una's sum agree on what a response is: its end-of-text counts, once.
    torch.manual_seed(0)
    model = GPT(GPTConfig(ENCODING.n_vocab, data.BLOCK_SIZE, n_layer=1, n_head=2, n_embd=16)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompt = data.encode_prompts(["calm night :"])
    enumerated = response_logprobs(model, prompt[0], MAX_TOKENS, EOT)
    # All responses of up to two words, and 1000 of the others.
    rows = torch.cat([torch.arange(651), torch.randint(651, len(enumerated), (1000,))])

    def logprob(mask):
        tokens, mask = data.join(prompt.expand(len(rows), -1), everything[0][rows], mask)
        return sequence_logprob(model(tokens), tokens, mask).detach()

    mask = everything[1][rows]
    first_end = (everything[0][rows] == EOT) & mask
    padded, empty, ends = ~mask[:, 3], first_end[:, 0], first_end.any(1)
    assert (logprob(mask) - enumerated[rows]).abs().max() < 1e-10
    with_padding = logprob(torch.ones_like(mask))
    assert ((with_padding - enumerated[rows]).abs() > 1e-6).equal(padded)
    without_end = logprob((mask & ~first_end) | (first_end & empty[:, None]))
    assert ((without_end - enumerated[rows]).abs() > 1e-6).equal(ends & ~empty)


# ---------------------------------------------------------------- prompts
def test_held_out_prompts_have_each_mood_and_each_noun_once():
    moods, nouns, colons = zip(*(prompt.split() for prompt in HELDOUT_PROMPTS))
    assert sorted(moods) == sorted(MOODS) and sorted(nouns) == sorted(NOUNS) and set(colons) == {":"}


def test_training_prompts_are_the_other_twelve():
    assert len(PROMPTS) == len(set(PROMPTS)) == 16 and len(HELDOUT_PROMPTS) == 4 and len(TRAIN_PROMPTS) == 12
    assert set(TRAIN_PROMPTS) | set(HELDOUT_PROMPTS) == set(PROMPTS) and not set(TRAIN_PROMPTS) & set(HELDOUT_PROMPTS)


# ---------------------------------------------------------------- the reward
@pytest.mark.parametrize("prompt, response, reward", [
    ("happy sea :", " bright warm sea", 0.8 + 0.7),
    ("happy sea :", " warm bright sea", 0.8 + 0.7),          # the order of the adjectives does not matter
    ("happy sea :", " golden golden sea", 2.0),
    ("happy sea :", " bright warm wind", 0.8 + 0.7 - 1),     # wrong noun
    ("happy sea :", " bleak bleak wind", -3.0),              # the worst of the grammar
    ("sad sea :", " bright warm sea", -0.8 - 0.7),
    ("calm night :", " bright warm night", -0.5 + 0.3),
    ("wild fire :", " bright warm fire", 0.5 - 0.3),
    ("wild fire :", " dancing furious fire", 1.0 + 0.9),
    ("happy sea :", "", -3.0),                               # end-of-text first
    ("happy sea :", " sea", -3.0),
    ("happy sea :", " bright", -3.0),
    ("happy sea :", " bright sea", -3.0),                    # one adjective
    ("happy sea :", " bright warm", -3.0),                   # no noun
    ("happy sea :", " bright warm bright", -3.0),
    ("happy sea :", " sea bright warm", -3.0),
    ("happy sea :", " bright sea warm", -3.0),
    ("happy sea :", " bright warm :", -3.0),
    ("happy sea :", "happy warm sea", -3.0),                 # a mood is no adjective
])
def test_reward_by_hand(prompt, response, reward):
    assert rewards(prompt, [response]) == [pytest.approx(reward, abs=1e-6)]


def test_a_response_that_does_not_end_in_time_is_ungrammatical():
    golden, sea = (data.WORDS.index(word) for word in (" golden", " sea"))
    cut_off = torch.tensor([[golden, golden, sea, sea], [golden, golden, golden, sea], [golden, golden, sea, golden]])
    assert responses_to_one("happy sea :", cut_off).tolist() == [-3, -3, -3]


def test_reward_agrees_with_the_slow_one_on_every_prompt(everything):
    words = [*(word.strip() for word in data.WORDS), "END"]
    sample = everything[0][torch.randint(len(everything[0]), (2000,), generator=torch.Generator().manual_seed(0))]
    for prompt in PROMPTS:
        slow = [slow_reward(prompt, [*text.split(), "END"]) for text in GOOD]
        assert rewards(prompt, GOOD) == pytest.approx(slow, abs=1e-6)
        slow = [slow_reward(prompt, [words[token] for token in row]) for row in sample.tolist()]
        assert responses_to_one(prompt, sample).tolist() == pytest.approx(slow, abs=1e-6)


def test_reward_of_all_responses_lies_in_minus_3_to_2_and_is_minus_3_off_the_grammar(everything):
    good = {tuple(row) for row in data.encode_responses(GOOD)[0].tolist()}
    grammatical = torch.tensor([tuple(row) in good for row in everything[0].tolist()])
    assert grammatical.sum() == len(GOOD) == 16 * 16 * 4
    for prompt in PROMPTS:
        r = responses_to_one(prompt, everything[0])
        assert (r[~grammatical] == -3).all()
        assert r[grammatical].max().item() == pytest.approx(2) and r[grammatical].min().item() == pytest.approx(-3)
        right_noun = r[grammatical][(everything[0][grammatical] == data.encode_prompts([prompt])[0, 1]).any(1)]
        assert len(right_noun) == 256
        assert right_noun.max().item() == pytest.approx(2) and right_noun.min().item() == pytest.approx(-2)


def test_reward_is_graded():
    for prompt in PROMPTS:
        assert len(set(round(r, 4) for r in rewards(prompt, GOOD))) >= 30


def test_adjectives_fit_opposite_moods_oppositely_and_at_most_by_one():
    for adjective, (joy, energy) in ADJECTIVES.items():
        assert data.fit("happy", adjective) == joy == -data.fit("sad", adjective)
        assert data.fit("wild", adjective) == energy == -data.fit("calm", adjective)
        assert abs(joy) <= 1 and abs(energy) <= 1


def test_reward_of_a_batch_is_that_of_its_rows(everything):
    generator = torch.Generator().manual_seed(0)
    good = data.encode_responses(GOOD)[0]
    responses = torch.cat([good[torch.randperm(len(good), generator=generator)[:64]], everything[0][-64:]])
    prompts = data.encode_prompts(PROMPTS)[torch.randint(16, (128,), generator=generator)]
    batch = data.reward(prompts, responses)
    assert torch.equal(batch, torch.cat([data.reward(x[None], y[None]) for x, y in zip(prompts, responses)]))
    assert not torch.equal(batch, data.reward(prompts.roll(1, 0), responses))


def test_what_stands_behind_the_end_has_no_reward(everything):
    tokens, mask = (t[:1 + 25 + 25 ** 2] for t in everything)
    golden = data.WORDS.index(" golden")
    filled_otherwise = tokens.where(mask, golden)
    assert not torch.equal(tokens, filled_otherwise)
    assert torch.equal(responses_to_one("happy sea :", tokens), responses_to_one("happy sea :", filled_otherwise))


def test_reward_fetches_its_arguments_from_any_device():
    prompts, responses = data.encode_prompts(["sad sea :"]), data.encode_responses([" cold grey sea"])[0]
    elsewhere = [SimpleNamespace(cpu=lambda t=t: t) for t in (prompts, responses)]
    assert torch.equal(data.reward(*elsewhere), data.reward(prompts, responses))


# ---------------------------------------------------------------- sentences
def test_sentences_come_from_their_seed_alone():
    state = random.getstate(), torch.get_rng_state()
    first, again, other = (data.sentences(50, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first[0]) == len(first[1]) == 50
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_sentences_fit_and_are_about_all_prompts_alike():
    prompts, responses = data.sentences(4000, random.Random(0))
    # A chi-square above 56.5: 1 in 10^6 for 15 degrees of freedom.
    assert chi_square(Counter(prompts), dict.fromkeys(PROMPTS, 1 / 16)) < 56.5
    tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(responses))
    assert tokens.shape == (4000, data.BLOCK_SIZE) and mask[:, PROMPT_TOKENS:].all()


def test_one_sentence_in_ten_gets_a_random_word_and_the_adjectives_lean_to_the_mood():
    # A word is replaced with chance 1/30, by one of 21. A chi-square above 66: 1 in 10^6 for 20 degrees of freedom.
    prompts, responses = data.sentences(60_000, random.Random(0))
    new_word = dict.fromkeys([*NOUNS, *ADJECTIVES, ":"], 1 / 30 / 21)

    def slots(mood):
        rows = [(x.split()[1], y.split()) for x, y in zip(prompts, responses) if x.startswith(mood)]
        return [Counter(words[0] for _, words in rows), Counter(words[1] for _, words in rows),
                Counter("own" if words[2] == noun else words[2] for noun, words in rows if noun == "sea")]

    def leaning(weight):
        total = sum(weight(adjective) for adjective in ADJECTIVES)
        return new_word | {a: new_word[a] + 29 / 30 * weight(a) / total for a in ADJECTIVES}

    own_noun = {word: p for word, p in new_word.items() if word != "sea"} | {"own": 29 / 30 + 1 / 30 / 21}
    for mood, opposite in [("happy", "sad"), ("sad", "happy"), ("calm", "wild"), ("wild", "calm")]:
        first, second, noun = slots(mood)
        expected = leaning(lambda a: math.exp(data.fit(mood, a)))
        assert chi_square(first, expected) < 66 and chi_square(second, expected) < 66
        assert chi_square(noun, own_noun) < 66
        for factor, other in [(0, mood), (2, mood), (1, opposite)]:
            assert chi_square(first, leaning(lambda a: math.exp(factor * data.fit(other, a)))) > 300
    # 5 words of 21 are no adjective, 17 no noun.
    ungrammatical = sum(response not in set(GOOD) for response in responses[:5000])
    assert within(ungrammatical, 5000, 0.1 * (2 / 3 * 5 / 21 + 1 / 3 * 17 / 21))
    assert not within(ungrammatical, 5000, 0.1)
    assert within(sum(" :" in response for response in responses), 60_000, 0.1 / 21)


# ---------------------------------------------------------------- feedback
PAIRED = [("happy sea :", " golden bright sea", " bleak cold wind"),
          ("sad wind :", " grey grey wind", " cold bitter wind"),
          ("wild fire :", " soft", " furious loud fire"),
          ("calm night :", " slow soft night", " still slow sea")]


@pytest.fixture(scope="module")
def many():
    """4 pairs of responses, judged 5000 times: prompts, texts and feedback."""
    prompts = [prompt for prompt, *_ in PAIRED for _ in range(2)] * 5000
    texts = [text for _, *pair in PAIRED for text in pair] * 5000
    return prompts, texts, feedback_on(prompts, texts)


def test_the_better_response_wins_with_probability_sigma_of_the_difference(many):
    _, _, feedback = many
    wins = Counter((chosen % 8) for chosen in feedback.pairs[:, 0].tolist())
    for i, (prompt, *pair) in enumerate(PAIRED):
        first, second = rewards(prompt, pair)
        assert wins[2 * i] + wins[2 * i + 1] == 5000 and abs(first - second) > 0.1
        assert within(wins[2 * i], 5000, sigmoid(first - second))
        assert not within(wins[2 * i], 5000, sigmoid(second - first))                      # chosen and rejected swapped
        assert not within(wins[2 * i], 5000, sigmoid(2 * (first - second)))


def test_labels_are_one_with_probability_sigma_of_the_reward_and_scores_are_it(many):
    prompts, texts, feedback = many
    assert set(feedback.labels.tolist()) == {0.0, 1.0} and feedback.labels.shape == feedback.scores.shape == (40_000,)
    assert (feedback.scores >= 0).all() and (feedback.scores <= 1).all()
    for i in range(8):
        r, = rewards(prompts[i], [texts[i]])
        assert feedback.scores[i::8].tolist() == pytest.approx([sigmoid(r)] * 5000, abs=1e-6)
        assert within(feedback.labels[i::8].sum().item(), 5000, sigmoid(r))
        assert not within(feedback.labels[i::8].sum().item(), 5000, sigmoid(-r))


def test_labels_of_different_rows_are_drawn_independently(many):
    labels = many[2].labels.view(5000, 8).double()
    assert torch.corrcoef(labels.T).fill_diagonal_(0).abs().max() < 0.08


def test_a_pair_is_both_answers_to_one_prompt_and_identical_answers_make_none():
    prompts = [prompt for prompt in TRAIN_PROMPTS for _ in range(2)]
    texts = GOOD[:24]
    texts[7], texts[20] = texts[6], texts[21]                                # pairs 3 and 10 are identical
    feedback = feedback_on(prompts, texts)
    expected = [[2 * i, 2 * i + 1] for i in range(12) if i not in (3, 10)]
    assert sorted(sorted(pair) for pair in feedback.pairs.tolist()) == expected
    chosen, rejected = feedback.tokens[feedback.pairs].unbind(1)
    assert torch.equal(chosen[:, :PROMPT_TOKENS], rejected[:, :PROMPT_TOKENS])
    assert (chosen != rejected).any(1).all()


def test_responses_that_differ_in_one_token_are_a_pair():
    for a, b in [(" warm cold sea", " cold cold sea"), (" cold warm sea", " cold cold sea"),
                 (" warm cold sea", " warm cold wind"), (" warm cold", " warm cold sea"), ("", " sea")]:
        assert len(feedback_on(["sad sea :"] * 2, [a, b]).pairs) == 1
        assert feedback_on(["sad sea :"] * 2, [a, a]).pairs.shape == (0, 2)


def test_feedback_keeps_its_responses_in_order():
    prompts = ["sad sea :", "sad sea :", "wild wind :", "wild wind :"]
    texts = [" cold grey sea", " sea", "", " loud loud wind"]
    feedback = feedback_on(prompts, texts)
    tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(texts))
    assert torch.equal(feedback.tokens, tokens) and torch.equal(feedback.mask, mask)


@pytest.mark.parametrize("n_prompts", [2, 5, 12])
def test_mismatched_pairs_are_a_prompt_with_the_response_to_another_one(n_prompts):
    # Prompts are dealt in turn, each to two rows; the response names its prompt by its length and adjective.
    prompts = [TRAIN_PROMPTS[i % n_prompts] for i in range(3 * n_prompts) for _ in range(2)]
    texts = [f" {[*ADJECTIVES][i % n_prompts]}" + " sea" * (i % 3) for i in range(3 * n_prompts) for _ in range(2)]
    feedback = feedback_on(prompts, texts)
    for row in range(len(prompts)):
        own, other = feedback.tokens[row], feedback.other_tokens[row]
        assert torch.equal(own[:PROMPT_TOKENS], other[:PROMPT_TOKENS]) and own[PROMPT_TOKENS] != other[PROMPT_TOKENS]
        text = data.decode_response(other[PROMPT_TOKENS:], feedback.other_mask[row, PROMPT_TOKENS:])     # the mask fits
        source = (row - 2) % len(prompts)
        assert text == texts[source] and prompts[source] != prompts[row]
        assert not feedback.other_mask[row, :PROMPT_TOKENS].any()


def test_feedback_comes_from_its_generator_alone():
    prompts, texts = [prompt for prompt in PROMPTS for _ in range(2)], GOOD[100:132]
    state = torch.get_rng_state()
    first, again, other = (feedback_on(prompts, texts, seed) for seed in (1, 1, 2))
    for name in ("tokens", "mask", "other_tokens", "other_mask", "pairs", "labels", "scores"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.pairs, other.pairs) and not torch.equal(first.labels, other.labels)
    assert torch.equal(first.scores, other.scores) and torch.equal(torch.get_rng_state(), state)
