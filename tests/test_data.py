import dataclasses
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
from data import ADJECTIVES, ENCODING, EOT, MOODS, NOUNS, PROMPT_TOKENS, PROMPTS, TRAIN_PROMPTS
from lab.exact import all_logprobs, all_responses
from model import GPT, GPTConfig
from una import sequence_logprob

# All responses of the grammar.
GOOD = [f" {a} {b} {noun}" for a in ADJECTIVES for b in ADJECTIVES for noun in NOUNS]


@pytest.fixture(scope="module")
def everything():
    """Tokens and mask of all responses there are."""
    return all_responses(ENCODING.n_vocab, data.MAX_TOKENS, EOT)


def responses_to_one(prompt, responses):
    return data.reward(data.encode_prompts([prompt]).expand(len(responses), -1), responses)


def rewards(prompt, texts):
    """The judge's rewards of responses given as text, as a list."""
    return responses_to_one(prompt, data.encode_responses(texts)[0]).tolist()


def slow_reward(prompt, words):
    """The reward once more, from a response's words; one that was cut off has no END among them."""
    mood, noun, _ = prompt.split()
    if len(words) != 4 or words[3] != "END" or words[2] not in NOUNS:
        return -3.0
    if not set(words[:2]) <= set(ADJECTIVES):
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


def feedback_on_texts(prompts, texts, seed=0, level=0.0):
    generator = torch.Generator().manual_seed(seed)
    return data.feedback_on(data.encode_prompts(prompts), *data.encode_responses(texts), generator,
                            level)


# ---------------------------------------------------------------- the tokenizer
def test_the_tokenizer_has_26_tokens_and_is_built_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    encoding = runpy.run_path(data.__file__)["ENCODING"]
    words = [*MOODS, *NOUNS, *ADJECTIVES, ":", "end-of-text"]
    assert encoding.n_vocab == 26 == len(words) == len(set(words))


def test_every_word_is_one_token_and_end_of_text_the_last():
    ids = [ENCODING.encode_ordinary(word) for word in data.WORDS]
    assert ids == [[i] for i in range(25)] and EOT == 25
    assert ENCODING.decode([EOT]) == "<|endoftext|>"


def refusal(encode, text):
    """The message of the ValueError that encoding one text raises."""
    with pytest.raises(ValueError) as error:
        encode([text])
    return str(error.value)


def test_text_cannot_inject_an_end_of_text():
    for text, word in [("<|endoftext|>", "<|endoftext|>"), (" <|endoftext|>", " <|endoftext|>"),
                       (" sea<|endoftext|>", " sea<|endoftext|>"),
                       (" sea <|endoftext|>", " <|endoftext|>")]:
        assert refusal(data.encode_responses, text).startswith(f"{word!r} in {text!r} is no word")
    text, word = "happy sea :<|endoftext|>", " :<|endoftext|>"
    assert refusal(data.encode_prompts, text).startswith(f"{word!r} in {text!r} is no word")


@pytest.mark.parametrize("text, word", [
    ("happy ocean :", " ocean"), ("merry sea :", "merry"), ("Happy sea :", "Happy"),
    (" happy sea :", " happy"),                              # a mood begins with no space
    ("happysea :", "happysea"), ("happy sea:", " sea:"),
    ("happy sad :", " sad"), ("happy  sea :", " "), ("happy sea : ", " "), ("happy sea :\n", "\n"),
])
def test_a_prompt_with_an_unknown_word_is_refused_by_that_word(text, word):
    assert refusal(data.encode_prompts, text).startswith(f"{word!r} in {text!r} is no word")


@pytest.mark.parametrize("text, word", [
    ("golden warm sea", "golden"),                           # no leading space
    (" golden warmsea", " warmsea"), (" golden.", " golden."), (" golden café", " café"),
    (" golden  sea", " "), ("  sea", " "), (" sea ", " "), (" ", " "),
    (" golden\tsea", "\t"), (" golden\x1csea", "\x1c"), (" golden\u3000sea", "\u3000"),
    (" sea happy", " happy"), (" seahappy", " seahappy"), ("happysad", "happysad"),
    (" sea ocean sea sea lake", " ocean"),                   # the first one, however long the text
    (" sea wind sea wind ...", " ..."),                      # decode_response's, cut off
])
def test_a_response_with_an_unknown_word_is_refused_by_that_word(text, word):
    assert refusal(data.encode_responses, text).startswith(f"{word!r} in {text!r} is no word")


def test_one_unknown_word_among_many_texts_is_found():
    with pytest.raises(ValueError, match="' ocean' in ' warm ocean'"):
        data.encode_responses([" sea", "", " warm ocean", " wind"])
    with pytest.raises(ValueError, match="' ocean' in 'sad ocean :'"):
        data.encode_prompts([*PROMPTS, "sad ocean :"])


def test_a_prompt_of_another_length_is_refused_with_both_numbers():
    for text, n in [("", 0), ("happy", 1), ("happy sea", 2), ("happy sea : :", 4)]:
        message = f"a prompt has 3 words, {text!r} has {n}"
        assert refusal(data.encode_prompts, text) == message
        with pytest.raises(ValueError) as error:
            data.encode_prompts(["happy sea :", text])
        assert str(error.value) == message


def test_a_response_that_leaves_no_room_for_its_end_is_refused():
    assert data.encode_responses([" sea" * 3])[1].all()
    for n in (4, 5, 9):
        text = " sea" * n
        assert refusal(data.encode_responses, text) == (
            f"a response has at most 3 words and an end-of-text, {text!r} has {n} words")


def test_prompts_survive_encoding_and_decoding():
    tokens = data.encode_prompts(PROMPTS)
    assert tokens.shape == (16, PROMPT_TOKENS) == (16, 3) and tokens.dtype == torch.long
    assert [ENCODING.decode(row) for row in tokens.tolist()] == PROMPTS


def test_text_encodes_the_same_in_one_piece_or_two():
    encode = ENCODING.encode_ordinary
    for prompt, response in itertools.product(PROMPTS, ["", " sea", " :", *GOOD[::37]]):
        assert encode(prompt + response) == encode(prompt) + encode(response)
    # Without its space a response runs into the prompt.
    assert refusal(data.encode_prompts, "happy sea :" + "sea").startswith("' :sea' in")


def test_responses_are_encoded_with_one_end_and_masked_up_to_it():
    tokens, mask = data.encode_responses([" bright warm sea", " wind", ""])
    bright, warm, sea, wind = map(data.WORDS.index, (" bright", " warm", " sea", " wind"))
    assert tokens.tolist() == [[bright, warm, sea, 25], [wind, 25, 25, 25], [25, 25, 25, 25]]
    assert mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert mask.dtype == torch.bool


def test_every_response_that_ends_survives_decoding_and_encoding(everything):
    # But for those with a mood behind another word: it has no space and runs into that word. There
    # are 25 first words, and 21 of each other.
    tokens, mask = (t[:1 + 25 + 25 ** 2 + 25 ** 3] for t in everything)
    texts = [data.decode_response(*row) for row in zip(tokens, mask, strict=True)]
    speakable = (tokens[:, 1:] >= len(MOODS)).all(1)
    spoken = list(itertools.compress(texts, speakable.tolist()))
    assert len(set(spoken)) == len(spoken) == 1 + 25 * (1 + 21 + 21 ** 2)
    assert set(GOOD) < set(spoken)
    again, again_mask = data.encode_responses(spoken)
    assert torch.equal(again, tokens[speakable]) and torch.equal(again_mask, mask[speakable])
    for text in itertools.compress(texts, (~speakable).tolist()):
        with pytest.raises(ValueError, match="is no word"):
            data.encode_responses([text])


def test_a_response_that_was_cut_off_is_shown_with_dots():
    sea, wind = (data.WORDS.index(word) for word in (" sea", " wind"))
    everywhere = torch.ones(4, dtype=torch.bool)
    cut_off, ended = torch.tensor([[sea, wind, sea, wind], [sea, wind, sea, EOT]])
    assert data.decode_response(cut_off, everywhere) == " sea wind sea wind ..."
    assert data.decode_response(ended, everywhere) == " sea wind sea"


def test_join_puts_the_response_behind_the_prompt_and_masks_it_alone():
    prompts = data.encode_prompts(["sad wind :", "wild sea :"])
    tokens, mask = data.encode_responses([" cold grey wind", " sea"])
    joined, joined_mask = data.join(prompts, tokens, mask)
    assert joined.shape == joined_mask.shape == (2, data.BLOCK_SIZE) == (2, 7)
    assert joined_mask.dtype == torch.bool
    assert ENCODING.decode(joined[0].tolist()) == "sad wind : cold grey wind<|endoftext|>"
    assert ENCODING.decode(joined[1].tolist()) == "wild sea : sea" + 3 * "<|endoftext|>"
    assert joined_mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]


def test_joined_responses_have_the_enumerated_log_probabilities(everything):
    # data's masks, exact's enumeration and una's sum agree on what a response is: its end-of-text
    # counts, once.
    torch.manual_seed(0)
    config = GPTConfig(ENCODING.n_vocab, data.BLOCK_SIZE, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompt = data.encode_prompts(["calm night :"])
    enumerated = all_logprobs(model, prompt[0], data.MAX_TOKENS, EOT)
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
    words = [prompt.split() for prompt in data.HELDOUT_PROMPTS]
    moods, nouns, colons = zip(*words, strict=True)
    assert sorted(moods) == sorted(MOODS) and sorted(nouns) == sorted(NOUNS)
    assert set(colons) == {":"}


def test_training_prompts_are_the_other_twelve():
    train, heldout = set(TRAIN_PROMPTS), set(data.HELDOUT_PROMPTS)
    assert len(PROMPTS) == len(set(PROMPTS)) == 16
    assert len(data.HELDOUT_PROMPTS) == 4 and len(TRAIN_PROMPTS) == 12
    assert train | heldout == set(PROMPTS) and not train & heldout


# ---------------------------------------------------------------- the reward
@pytest.mark.parametrize("prompt, response, reward", [
    ("happy sea :", " bright warm sea", 0.8 + 0.7),
    ("happy sea :", " warm bright sea", 0.8 + 0.7),          # their order does not matter
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
    cut_off = torch.tensor([[golden, golden, sea, sea], [golden, golden, golden, sea],
                            [golden, golden, sea, golden]])
    assert responses_to_one("happy sea :", cut_off).tolist() == [-3, -3, -3]


def test_reward_agrees_with_the_slow_one_on_every_prompt(everything):
    words = [*(word.strip() for word in data.WORDS), "END"]
    generator = torch.Generator().manual_seed(0)
    sample = everything[0][torch.randint(len(everything[0]), (2000,), generator=generator)]
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
        good_r, noun = r[grammatical], data.encode_prompts([prompt])[0, 1]
        assert [good_r.max().item(), good_r.min().item()] == pytest.approx([2, -3])
        right_noun = good_r[(everything[0][grammatical] == noun).any(1)]
        assert len(right_noun) == 256
        assert [right_noun.max().item(), right_noun.min().item()] == pytest.approx([2, -2])


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
    some = torch.randperm(len(good), generator=generator)[:64]
    responses = torch.cat([good[some], everything[0][-64:]])
    prompts = data.encode_prompts(PROMPTS)[torch.randint(16, (128,), generator=generator)]
    batch = data.reward(prompts, responses)
    rows = zip(prompts, responses, strict=True)
    assert torch.equal(batch, torch.cat([data.reward(x[None], y[None]) for x, y in rows]))
    assert not torch.equal(batch, data.reward(prompts.roll(1, 0), responses))


def test_what_stands_behind_the_end_has_no_reward(everything):
    tokens, mask = (t[:1 + 25 + 25 ** 2] for t in everything)
    golden = data.WORDS.index(" golden")
    filled_otherwise = tokens.where(mask, golden)
    assert not torch.equal(tokens, filled_otherwise)
    assert torch.equal(responses_to_one("happy sea :", tokens),
                       responses_to_one("happy sea :", filled_otherwise))


def test_reward_fetches_its_arguments_from_any_device():
    prompts = data.encode_prompts(["sad sea :"])
    responses = data.encode_responses([" cold grey sea"])[0]
    elsewhere = [SimpleNamespace(cpu=lambda t=t: t) for t in (prompts, responses)]
    assert torch.equal(data.reward(*elsewhere), data.reward(prompts, responses))


# ---------------------------------------------------------------- a level for each noun
@pytest.mark.parametrize("level", [0.0, 1.0, 2.5])
def test_the_level_of_a_prompt_is_its_nouns_whatever_its_mood(level):
    expected = {"sea": -level, "wind": -level / 3, "fire": level / 3, "night": level}
    got = data.prompt_level(data.encode_prompts(PROMPTS), level)
    assert got.shape == (16,)
    assert got.tolist() == pytest.approx([expected[prompt.split()[1]] for prompt in PROMPTS])


def test_a_level_is_fetched_from_any_device():
    class Elsewhere:
        def __getitem__(self, where):
            return SimpleNamespace(cpu=lambda: data.encode_prompts(PROMPTS)[where])
    here = data.prompt_level(data.encode_prompts(PROMPTS), 1.0)
    assert torch.equal(data.prompt_level(Elsewhere(), 1.0), here)


def test_levels_are_0_on_average_so_that_no_reward_rises_on_the_whole():
    for prompts in (PROMPTS, TRAIN_PROMPTS, data.HELDOUT_PROMPTS):
        levels = data.prompt_level(data.encode_prompts(prompts), 1.0)
        assert levels.sum().item() == pytest.approx(0, abs=1e-6) and len(levels.unique()) == 4


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
    # A word is replaced with chance 1/30, by one of 21. A chi-square above 66: 1 in 10^6 for 20
    # degrees of freedom.
    prompts, responses = data.sentences(60_000, random.Random(0))
    new_word = dict.fromkeys([*NOUNS, *ADJECTIVES, ":"], 1 / 30 / 21)

    def slots(mood):
        rows = [(x.split()[1], y.split()) for x, y in zip(prompts, responses, strict=True)
                if x.startswith(mood)]
        nouns = ["own" if words[2] == noun else words[2] for noun, words in rows if noun == "sea"]
        firsts, seconds = [words[0] for _, words in rows], [words[1] for _, words in rows]
        return Counter(firsts), Counter(seconds), Counter(nouns)

    def leaning(mood, factor=1):
        weight = {a: math.exp(factor * data.fit(mood, a)) for a in ADJECTIVES}
        total = sum(weight.values())
        return new_word | {a: new_word[a] + 29 / 30 * weight[a] / total for a in ADJECTIVES}

    own_noun = {word: p for word, p in new_word.items() if word != "sea"}
    own_noun["own"] = 29 / 30 + 1 / 30 / 21
    opposites = {"happy": "sad", "sad": "happy", "calm": "wild", "wild": "calm"}
    for mood, opposite in opposites.items():
        first, second, noun = slots(mood)
        assert chi_square(first, leaning(mood)) < 66 and chi_square(second, leaning(mood)) < 66
        assert chi_square(noun, own_noun) < 66
        for wrong in (leaning(mood, 0), leaning(mood, 2), leaning(opposite)):
            assert chi_square(first, wrong) > 300
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
    """5000 times feedback on the same 4 pairs of responses: prompts, texts and feedback."""
    prompts = [prompt for prompt, *_ in PAIRED for _ in range(2)] * 5000
    texts = [text for _, *pair in PAIRED for text in pair] * 5000
    return prompts, texts, feedback_on_texts(prompts, texts)


def test_the_better_response_wins_with_probability_sigma_of_the_difference(many):
    _, _, feedback = many
    wins = Counter((chosen % 8) for chosen in feedback.pairs[:, 0].tolist())
    for i, (prompt, *pair) in enumerate(PAIRED):
        first, second = rewards(prompt, pair)
        assert wins[2 * i] + wins[2 * i + 1] == 5000 and abs(first - second) > 0.1
        assert within(wins[2 * i], 5000, sigmoid(first - second))
        assert not within(wins[2 * i], 5000, sigmoid(second - first))    # chosen, rejected swapped
        assert not within(wins[2 * i], 5000, sigmoid(2 * (first - second)))


def test_labels_are_one_with_probability_sigma_of_the_reward_and_scores_are_it(many):
    prompts, texts, feedback = many
    assert set(feedback.labels.tolist()) == {0.0, 1.0}
    assert feedback.labels.shape == feedback.scores.shape == (40_000,)
    assert (feedback.scores >= 0).all() and (feedback.scores <= 1).all()
    for i in range(8):
        r, = rewards(prompts[i], [texts[i]])
        assert feedback.scores[i::8].tolist() == pytest.approx([sigmoid(r)] * 5000, abs=1e-6)
        assert within(feedback.labels[i::8].sum().item(), 5000, sigmoid(r))
        assert not within(feedback.labels[i::8].sum().item(), 5000, sigmoid(-r))


def test_a_level_is_in_labels_and_scores_and_in_no_pair(many):
    prompts, texts, feedback = many
    raised = feedback_on_texts(prompts, texts, level=2.0)
    for name in ("tokens", "mask", "pairs"):
        assert torch.equal(getattr(raised, name), getattr(feedback, name)), name
    for i in range(8):                                           # 4 is ungrammatical
        r, = rewards(prompts[i], [texts[i]])
        r += {"sea": -2, "wind": -2 / 3, "fire": 2 / 3, "night": 2}[prompts[i].split()[1]]
        assert raised.scores[i::8].tolist() == pytest.approx([sigmoid(r)] * 5000, abs=1e-6)
        assert within(raised.labels[i::8].sum().item(), 5000, sigmoid(r))
        before = feedback.scores[i].item()
        assert not within(raised.labels[i::8].sum().item(), 5000, before)


def test_labels_of_different_rows_are_drawn_independently(many):
    labels = many[2].labels.view(5000, 8).double()
    assert torch.corrcoef(labels.T).fill_diagonal_(0).abs().max() < 0.08


def test_a_pair_is_both_answers_to_one_prompt_and_identical_answers_make_none():
    prompts = [prompt for prompt in TRAIN_PROMPTS for _ in range(2)]
    texts = GOOD[:24]
    texts[7], texts[20] = texts[6], texts[21]                    # pairs 3 and 10 are identical
    feedback = feedback_on_texts(prompts, texts)
    expected = [[2 * i, 2 * i + 1] for i in range(12) if i not in (3, 10)]
    assert sorted(sorted(pair) for pair in feedback.pairs.tolist()) == expected
    chosen, rejected = feedback.tokens[feedback.pairs].unbind(1)
    assert torch.equal(chosen[:, :PROMPT_TOKENS], rejected[:, :PROMPT_TOKENS])
    assert (chosen != rejected).any(1).all()


def test_responses_that_differ_in_one_token_are_a_pair():
    for a, b in [(" warm cold sea", " cold cold sea"), (" cold warm sea", " cold cold sea"),
                 (" warm cold sea", " warm cold wind"), (" warm cold", " warm cold sea"),
                 ("", " sea")]:
        assert len(feedback_on_texts(["sad sea :"] * 2, [a, b]).pairs) == 1
        assert feedback_on_texts(["sad sea :"] * 2, [a, a]).pairs.shape == (0, 2)


def test_feedback_keeps_its_responses_in_order():
    prompts = ["sad sea :", "sad sea :", "wild wind :", "wild wind :"]
    texts = [" cold grey sea", " sea", "", " loud loud wind"]
    feedback = feedback_on_texts(prompts, texts)
    tokens, mask = data.join(data.encode_prompts(prompts), *data.encode_responses(texts))
    assert torch.equal(feedback.tokens, tokens) and torch.equal(feedback.mask, mask)


def dealt(*prompts):
    """Tokens and mask of two responses to each prompt, both named by their place in the batch."""
    words = [[*ADJECTIVES][i % 16] for i in range(len(prompts))]
    texts = [f" {word}" + " sea" * (i // 16 % 3) for i, word in enumerate(words) for _ in range(2)]
    prompts = data.encode_prompts([prompt for prompt in prompts for _ in range(2)])
    return data.join(prompts, *data.encode_responses(texts))


@pytest.mark.parametrize("n_prompts", [2, 5, 12])
def test_mismatched_pairs_are_a_prompt_with_the_response_to_another_one(n_prompts):
    # Prompts are dealt in turn, each to two rows; the response names its prompt by its length and
    # adjective.
    n = 3 * n_prompts
    prompts = [TRAIN_PROMPTS[i % n_prompts] for i in range(n) for _ in range(2)]
    words = [[*ADJECTIVES][i % n_prompts] for i in range(n)]
    texts = [f" {word}" + " sea" * (i % 3) for i, word in enumerate(words) for _ in range(2)]
    feedback = feedback_on_texts(prompts, texts)
    tokens, mask = data.mismatched(feedback.tokens, feedback.mask)
    assert tokens.shape == feedback.tokens.shape and mask.shape == feedback.mask.shape
    for row in range(len(prompts)):
        own, other = feedback.tokens[row], tokens[row]
        assert torch.equal(own[:PROMPT_TOKENS], other[:PROMPT_TOKENS])
        assert own[PROMPT_TOKENS] != other[PROMPT_TOKENS]
        text = data.decode_response(other[PROMPT_TOKENS:], mask[row, PROMPT_TOKENS:])    # it fits
        source = (row - 2) % len(prompts)
        assert text == texts[source] and prompts[source] != prompts[row]
        assert not mask[row, :PROMPT_TOKENS].any()


def test_mismatched_pairs_of_whole_rounds_are_the_responses_rolled_by_two_rows():
    generator = torch.Generator().manual_seed(0)
    for rounds in (1, 2, 7):
        R = 24 * rounds
        prompts = data.encode_prompts(TRAIN_PROMPTS * rounds).repeat_interleave(2, 0)
        responses = torch.randint(26, (R, 4), generator=generator)
        mask = torch.rand(R, 4, generator=generator) < 0.5
        tokens, other_mask = data.mismatched(*data.join(prompts, responses, mask))
        rolled = torch.cat([responses[-2:], responses[:-2]])
        assert torch.equal(tokens, torch.cat([prompts, rolled], dim=1))
        assert torch.equal(other_mask[:, :PROMPT_TOKENS], torch.zeros(R, 3, dtype=torch.bool))
        assert torch.equal(other_mask[:, PROMPT_TOKENS:], torch.cat([mask[-2:], mask[:-2]]))


def test_mismatched_pairs_of_a_round_and_one_more_prompt_skip_that_prompts_own_response():
    # R = 26: the first and the last pair of rows answer the same prompt, and row 0 follows row 25.
    tokens, mask = dealt(*TRAIN_PROMPTS, TRAIN_PROMPTS[0])
    source = [22, 23, *range(24)]
    other_tokens, other_mask = data.mismatched(tokens, mask)
    assert torch.equal(other_tokens[:, PROMPT_TOKENS:], tokens[source, PROMPT_TOKENS:])
    assert torch.equal(other_mask, mask[source])
    rolled = tokens.roll(2, 0)
    assert torch.equal(rolled[:2, :PROMPT_TOKENS], tokens[:2, :PROMPT_TOKENS])    # roll is wrong
    assert torch.equal(other_tokens[2:, PROMPT_TOKENS:], rolled[2:, PROMPT_TOKENS:])


def test_mismatched_pairs_take_the_nearest_row_before_with_another_prompt():
    rng, shapes = random.Random(0), []
    for n in (2, 3, 4, 5, 13, 40):
        shapes += [[0] * i + [1] * (n - i) for i in range(1, n)]                # in blocks
        shapes += [[i % k for i in range(n)] for k in range(2, 13)]             # in turn
        shapes += [[rng.randrange(k) for _ in range(n)] for k in (2, 3, 12) for _ in range(5)]
    shapes = [shape for shape in shapes if len(set(shape)) > 1]
    assert len(shapes) > 150
    for shape in shapes:
        n, prompts = len(shape), [TRAIN_PROMPTS[i] for i in shape]
        tokens, mask = dealt(*prompts)
        other_tokens, other_mask = data.mismatched(tokens, mask)
        assert torch.equal(other_tokens[:, :PROMPT_TOKENS], tokens[:, :PROMPT_TOKENS])
        for row in range(2 * n):
            distance = next(d for d in range(1, n) if prompts[row // 2 - d] != prompts[row // 2])
            source = (row - 2 * distance) % (2 * n)
            assert torch.equal(other_tokens[row, PROMPT_TOKENS:], tokens[source, PROMPT_TOKENS:])
            assert torch.equal(other_mask[row], mask[source])


def test_mismatched_pairs_of_two_prompts_are_four_rows_at_least():
    tokens, mask = dealt("sad sea :", "wild wind :")
    other_tokens, other_mask = data.mismatched(tokens, mask)
    source = [2, 3, 0, 1]
    assert torch.equal(other_tokens[:, PROMPT_TOKENS:], tokens[source, PROMPT_TOKENS:])
    assert torch.equal(other_mask, mask[source])


@pytest.mark.parametrize("n", [1, 2, 12])
def test_mismatched_pairs_of_one_prompt_are_refused(n):
    message = f"^mismatched pairs need two prompts, all {2 * n} rows answer one$"
    with pytest.raises(ValueError, match=message):
        data.mismatched(*dealt(*["sad sea :"] * n))


def test_mismatched_pairs_leave_the_feedback_alone():
    tokens, mask = dealt(*TRAIN_PROMPTS)
    before = tokens.clone(), mask.clone()
    data.mismatched(tokens, mask)
    assert torch.equal(tokens, before[0]) and torch.equal(mask, before[1])


def test_feedback_comes_from_its_generator_alone():
    prompts, texts = [prompt for prompt in PROMPTS for _ in range(2)], GOOD[100:132]
    state = torch.get_rng_state()
    first, again, other = (feedback_on_texts(prompts, texts, seed) for seed in (1, 1, 2))
    names = [field.name for field in dataclasses.fields(data.Feedback)]
    assert names == ["tokens", "mask", "pairs", "labels", "scores"]
    for name in names:
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.pairs, other.pairs)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(first.scores, other.scores)
    assert torch.equal(torch.get_rng_state(), state)


def test_feedback_draws_the_pairs_before_the_labels():
    # In that order, one draw for each pair of rows, identical or not, and one for each row.
    prompts, texts = [prompt for prompt in PROMPTS for _ in range(2)], GOOD[100:132]
    texts[1] = texts[0]
    feedback, generator = feedback_on_texts(prompts, texts, 3), torch.Generator().manual_seed(3)
    r = torch.tensor([rewards(x, [y])[0] for x, y in zip(prompts, texts, strict=True)])
    first_wins = torch.bernoulli(torch.sigmoid(r[0::2] - r[1::2]), generator=generator)
    pairs = [[2 * i, 2 * i + 1] if wins else [2 * i + 1, 2 * i]
             for i, wins in enumerate(first_wins.tolist())]
    assert feedback.pairs.tolist() == pairs[1:]
    labels = torch.bernoulli(torch.sigmoid(r), generator=generator)
    assert torch.equal(feedback.labels, labels)
