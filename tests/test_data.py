import itertools
import math
import random
import re
import runpy
import socket
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import data
from data import ADJECTIVES, ENCODING, EOT, HELDOUT_PROMPTS, MOODS, NOUNS, PROMPTS, TRAIN_PROMPTS
from helpers import near
from lab.exact import all_responses

GOOD = [f" {a} {b} {noun}" for a in ADJECTIVES for b in ADJECTIVES for noun in NOUNS]
# Of the 406,901 responses there are, the 651 of up to two words and every 61st of the others.
ROWS = torch.cat([torch.arange(651), torch.arange(651, 406_901, 61)])
TOKENS, MASK = (t[ROWS] for t in all_responses(ENCODING.n_vocab, data.MAX_TOKENS, EOT))


def slow_reward(prompt, words):
    """The reward once more, from a response's words; one that was cut off has no END among them."""
    mood, noun, _ = prompt.split()
    if words[3:] != ["END"] or words[2] not in NOUNS or {*words[:2]} - {*ADJECTIVES}:
        return -3.0
    joy, energy = (sum(ADJECTIVES[word][i] for word in words[:2]) for i in (0, 1))
    quality = {"happy": joy, "sad": -joy, "wild": energy, "calm": -energy}[mood]
    return quality if words[2] == noun else quality - 1


def chi_square(counts, probs):
    n = sum(counts.values())
    assert counts.keys() <= probs.keys() and sum(probs.values()) == pytest.approx(1)
    return sum((counts[key] - n * p) ** 2 / (n * p) for key, p in probs.items())


def test_each_of_25_words_is_one_token_and_end_of_text_the_last_without_a_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    encoding = runpy.run_path(data.__file__)["ENCODING"]
    assert encoding.n_vocab == 26 == len({*MOODS, *NOUNS, *ADJECTIVES, ":"}) + 1
    assert [encoding.encode_ordinary(word) for word in data.WORDS] == [[i] for i in range(25)]
    assert EOT == 25 and encoding.decode([25]) == "<|endoftext|>"


def test_text_that_is_not_of_the_language_is_refused_in_one_line():
    # No text can inject an end-of-text. Nor may there be too few or too many words.
    for encode, known, text, told in (
            (data.encode_prompts, PROMPTS, "happy ocean :", "' ocean' in 'happy ocean :' is no"),
            (data.encode_prompts, PROMPTS, "happy sea : ", "' ' in 'happy sea : ' is no"),
            (data.encode_responses, GOOD, "<|endoftext|>", "'<|endoftext|>' in '<|endoftext|>' is"),
            (data.encode_responses, GOOD, " golden\x1csea", r"'\x1c' in ' golden\x1csea' is no"),
            (data.encode_prompts, PROMPTS, "", "a prompt has 3 words, '' has 0"),
            (data.encode_prompts, PROMPTS, "happy sea : :", "3 words, 'happy sea : :' has 4"),
            (data.encode_responses, GOOD, " sea sea sea sea", "has 4 words")):
        with pytest.raises(ValueError, match=re.escape(told)):
            encode([*known, text])


def test_prompts_are_twelve_and_four_held_out_with_each_mood_and_noun_and_survive_encoding():
    moods, nouns, _ = zip(*(prompt.split() for prompt in HELDOUT_PROMPTS))
    assert sorted(moods) == sorted(MOODS) and sorted(nouns) == sorted(NOUNS)
    assert {*TRAIN_PROMPTS, *HELDOUT_PROMPTS} == {*PROMPTS} and len({*PROMPTS}) == 16
    tokens, encode = data.encode_prompts(PROMPTS), ENCODING.encode_ordinary
    assert tokens.shape == (16, 3) and len(TRAIN_PROMPTS) == 12
    assert [ENCODING.decode(row) for row in tokens.tolist()] == PROMPTS
    for prompt, response in itertools.product(PROMPTS, ["", " sea", " :", *GOOD[::37]]):
        assert encode(prompt + response) == encode(prompt) + encode(response)


def test_a_response_survives_decoding_and_encoding_or_is_shown_with_dots_where_cut_off():
    grammatical = (data.KIND[TOKENS] == data.GRAMMAR).all(1)
    texts = [data.decode_response(*row) for row in zip(TOKENS[grammatical], MASK[grammatical])]
    assert len(texts) > 10 and all(map(torch.equal, data.encode_responses(texts), (
        TOKENS[grammatical], MASK[grammatical])))
    assert data.decode_response(TOKENS[-1], MASK[-1]) == "".join(
        data.WORDS[word] for word in TOKENS[-1]) + " ..."


def test_a_response_gets_one_end_and_stands_behind_its_prompt_where_the_mask_is_true():
    prompts = data.encode_prompts(["sad wind :", "wild sea :", "calm fire :"])
    tokens, mask = data.join(prompts, *data.encode_responses([" cold grey wind", " sea", ""]))
    assert tokens.shape == mask.shape == (3, data.BLOCK_SIZE) == (3, 7)
    assert mask.dtype == torch.bool and torch.equal(tokens[:, :3], prompts)
    cold, grey, wind, sea = map(data.WORDS.index, (" cold", " grey", " wind", " sea"))
    assert tokens[:, 3:].tolist() == [[cold, grey, wind, 25], [sea, 25, 25, 25], [25] * 4]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0],
                                   [0, 0, 0, 1, 0, 0, 0]]


def test_reward_by_hand_and_by_an_independent_one_row_by_row():
    by_hand = {("happy sea :", " bright warm sea"): 0.8 + 0.7, ("happy sea :", " bright sea"): -3.0,
               ("calm sea :", " warm bright sea"): 0.3 - 0.5,
               ("happy sea :", " bright warm wind"): 0.8 + 0.7 - 1}
    x, y = zip(*by_hand)
    rewards = data.reward(data.encode_prompts(x), data.encode_responses(y)[0])
    assert rewards.tolist() == pytest.approx([*by_hand.values()], abs=1e-6)
    words = [*(word.strip() for word in data.WORDS), "END"]
    responses = torch.cat([data.encode_responses(GOOD)[0].repeat_interleave(16, 0), TOKENS])
    texts = (PROMPTS * len(responses))[:len(responses)]
    slow = torch.tensor([slow_reward(text, [words[token] for token in row])
                         for text, row in zip(texts, responses.tolist(), strict=True)])
    prompts = data.encode_prompts(texts)
    rewards = data.reward(prompts, responses)
    assert near(rewards, slow, 1e-6)
    assert not near(data.reward(prompts.roll(1, 0), responses), slow, 0.1)
    for of_prompt in rewards[:16 * len(GOOD)].view(-1, 16).T:
        assert [of_prompt.min().item(), of_prompt.max().item()] == pytest.approx([-3, 2])
    elsewhere = (SimpleNamespace(cpu=lambda t=t: t) for t in (prompts, responses))
    assert torch.equal(data.reward(*elsewhere), rewards)         # on any device


def test_the_level_of_a_prompt_is_its_nouns_whatever_its_mood_and_0_on_average():
    for level in (0.0, 2.5):
        expected = {"sea": -level, "wind": -level / 3, "fire": level / 3, "night": level}
        got = data.prompt_level(data.encode_prompts(PROMPTS), level)
        assert got.tolist() == pytest.approx([expected[prompt.split()[1]] for prompt in PROMPTS])
    for prompts in (PROMPTS, TRAIN_PROMPTS, HELDOUT_PROMPTS):    # so no reward rises on the whole
        levels = data.prompt_level(data.encode_prompts(prompts), 1.0)
        assert levels.sum().item() == pytest.approx(0, abs=1e-6) and len(levels.unique()) == 4


def test_sentences_come_from_their_seed_lean_to_the_mood_and_one_in_ten_has_a_random_word():
    first, again, other = (data.sentences(50, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first[0]) == len(first[1]) == 50
    # A word is replaced with chance 1/30, by one of 21. Chance passes each limit once in 10^6.
    prompts, responses = data.sentences(30_000, random.Random(0))
    assert chi_square(Counter(prompts), dict.fromkeys(PROMPTS, 1 / 16)) < 56.5
    new_word = dict.fromkeys([*NOUNS, *ADJECTIVES, ":"], 1 / 30 / 21)
    own_noun = new_word | {"sea": 29 / 30 + 1 / 30 / 21}

    def leaning(mood, factor=1):
        weight = {a: math.exp(factor * data.fit(mood, a)) for a in ADJECTIVES}
        total = sum(weight.values())
        return new_word | {a: new_word[a] + 29 / 30 * weight[a] / total for a in ADJECTIVES}

    for mood in MOODS:
        rows = [(x.split()[1], *y.split()) for x, y in zip(prompts, responses, strict=True)
                if x.startswith(mood)]
        first, second = (Counter(row[slot] for row in rows) for slot in (1, 2))
        last = Counter(row[3] for row in rows if row[0] == "sea")
        assert chi_square(first, leaning(mood)) < 66 and chi_square(second, leaning(mood)) < 66
        assert chi_square(last, own_noun) < 66
        for wrong in (0, 2, -1):
            assert chi_square(first, leaning(mood, wrong)) > 150
    noise = sum(" :" in response for response in responses)      # 30,000 * 0.1 / 21 = 143 +- 12
    assert abs(noise - 143) < 55


def test_feedback_draws_the_winner_of_two_answers_by_their_rewards_and_then_labels_by_the_level():
    # One draw for each two rows, identical or not, and one for each row; of its own generator.
    prompts, texts = [prompt for prompt in TRAIN_PROMPTS for _ in range(2)], GOOD[:24]
    texts[7], texts[20] = texts[6], texts[21]                    # pairs 3 and 10 are identical
    texts[:6] = [" warm cold sea", " cold cold sea", " cold warm sea", " cold cold sea",
                 " warm cold sea", " warm cold wind"]
    prompts, texts = 20 * prompts, 20 * texts
    x, (y, mask) = data.encode_prompts(prompts), data.encode_responses(texts)
    r = torch.tensor([slow_reward(x, [*y.split(), "END"]) for x, y in zip(prompts, texts)])
    f = torch.tensor([{"sea": -2, "wind": -2 / 3, "fire": 2 / 3, "night": 2}[prompt.split()[1]]
                      for prompt in prompts])
    for level, score in ((0.0, torch.sigmoid(r)), (2.0, torch.sigmoid(r + f))):
        ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
        feedback = data.feedback_on(x, y, mask, ours, level)
        first_wins = torch.bernoulli(torch.sigmoid(r[0::2] - r[1::2]), generator=theirs)     # Eq. 1
        assert feedback.pairs.tolist() == [
            [2 * i, 2 * i + 1] if wins else [2 * i + 1, 2 * i]
            for i, wins in enumerate(first_wins.tolist()) if i % 12 not in (3, 10)]
        assert torch.equal(feedback.labels, torch.bernoulli(score, generator=theirs))
        assert near(feedback.scores, score, 1e-6)
    assert all(map(torch.equal, (feedback.tokens, feedback.mask), data.join(x, y, mask)))


def test_mismatched_pairs_take_the_nearest_row_before_with_another_prompt_or_are_refused():
    # Three prompts in every order, and longer ones: in turn, or one prompt among many of another.
    orders = [order for n in (1, 2, 3, 4) for order in itertools.product(range(3), repeat=n)]
    orders += [[i % 12 for i in range(40)], [0] * 39 + [1], [1] + [0] * 39]
    for order in orders:
        # Two responses to each, like no other. Prompts 0 and 1 share a noun, 0 and 2 a mood.
        prompts, n = data.encode_prompts([TRAIN_PROMPTS[7 * i % 12] for i in order]), len(order)
        mask = torch.rand(2 * n, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        responses = torch.arange(8 * n).view(-1, 4)
        tokens, mask = data.join(prompts.repeat_interleave(2, 0), responses, mask)
        if len({*order}) == 1:
            with pytest.raises(ValueError, match=f"need two prompts, all {2 * n} rows answer one"):
                data.mismatched(tokens, mask)
            continue
        other_tokens, other_mask = data.mismatched(tokens, mask)
        nearest = [next(i - d for d in range(1, n) if order[i - d] != order[i]) for i in range(n)]
        source = [row for j in nearest for row in (2 * j, 2 * j + 1)]
        assert torch.equal(other_tokens, torch.cat([tokens[:, :3], tokens[source, 3:]], 1)), order
        assert torch.equal(other_mask, mask[source]), order
