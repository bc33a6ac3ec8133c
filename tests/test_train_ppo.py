"""PPO in train.py: its inner steps, the two scalar models, and the reward model."""
import copy
import functools
import math
import random
from types import SimpleNamespace

import pytest
import torch

import data
import train
import una
from helpers import near
from model import GPT, GPTConfig, ScalarGPT
from short_train import moved as moved_by


# ---------------------------------------------------------------- the inner steps of train.py
def moved(model, seed):
    return moved_by(model, scale=0.1, seed=seed)


@functools.cache
def small_reference():
    settings = train.Settings(device="cpu", reference_steps=20, n_layer=1, n_head=2, n_embd=64)
    return train.train_reference(settings, 0)


def ppo_case():
    """A policy, a value model and a reference, all different, and 32 of the policy's responses.

    Some of these are shorter than others.
    """
    reference = small_reference()
    policy, value = moved(reference, 1), moved(ScalarGPT(reference), 2)
    prompts = data.encode_prompts(data.TRAIN_PROMPTS[:4])
    tokens, mask = train.fresh_samples(policy, prompts, 8, torch.Generator().manual_seed(0))
    assert len(mask.sum(1).unique()) > 2
    return policy, value, reference, tokens, mask


def record(monkeypatch, name):
    """Calls of una.<name>, each as its tuple of arguments, in a list that grows.

    The function still does its work.
    """
    calls, function = [], getattr(una, name)

    def recorded(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(una, name, recorded)
    return calls


@torch.no_grad()
def batch_of(value, reference, tokens, mask):
    """What train.fresh_batches would make of these tokens."""
    return SimpleNamespace(
        tokens=tokens, mask=mask, value=value, rewards=train.judge_reward(tokens, mask),
        ref_logprobs=train.model_logprobs(reference, tokens, mask))


def inner_steps(policy, value, batch, epochs=2):
    """The loss of each epoch, with a step of the optimiser in between."""
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-2)
    losses = []
    for _ in range(epochs):
        loss = train.ppo(policy, batch, 0.25)
        losses.append(loss)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return losses


def test_the_ratio_is_exactly_1_at_first_and_no_longer_after_a_step(monkeypatch):
    calls = record(monkeypatch, "ppo_policy_loss")
    value_calls = record(monkeypatch, "ppo_value_loss")
    policy, value, *rest = ppo_case()
    losses = inner_steps(policy, value, batch_of(value, *rest), epochs=3)
    assert len(losses) == len(calls) == 3 and losses[0].shape == (32,)
    assert torch.equal(calls[0][0], calls[0][1])
    assert torch.equal(value_calls[0][0], value_calls[0][1])
    for made in (calls, value_calls):
        # the old ones stay old, advantages and targets stand
        for new, old, fixed, _, clip in made[1:]:
            assert (new - old).abs().max() > 1e-3
            assert torch.equal(old, made[0][1]) and torch.equal(fixed, made[0][2])
            assert clip == train.PPO_CLIP


def test_only_the_new_logprobs_and_values_carry_gradients(monkeypatch):
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:4])
    names = "ppo_token_rewards", "ppo_advantages", "ppo_policy_loss", "ppo_value_loss"
    calls = {name: record(monkeypatch, name) for name in names}
    policy, value, reference, tokens, mask = ppo_case()
    # not frozen, so that a leak would show
    reference, judge = moved(reference, 3), moved(value, 4)
    shared = SimpleNamespace(reference=reference, reward_model=judge)
    batch = next(train.fresh_batches(policy, value, shared, 32, 0))
    assert torch.equal(batch.tokens, tokens) and torch.equal(batch.mask, mask)
    inner_steps(policy, value, batch)
    carries = {name: [[getattr(x, "requires_grad", False) for x in call] for call in made]
               for name, made in calls.items()}
    assert not any(carries["ppo_token_rewards"][0] + carries["ppo_advantages"][0])
    assert len(calls["ppo_advantages"]) == 1
    for call in carries["ppo_policy_loss"] + carries["ppo_value_loss"]:
        assert call == [True, False, False, False, False]
    assert all(p.grad is None for model in (reference, judge) for p in model.parameters())
    assert all(p.grad is not None and p.grad.any()
               for model in (policy, value) for p in model.parameters())


def test_advantages_have_mean_0_over_the_tokens_of_responses_and_divided_deviation_1(monkeypatch):
    raw, calls = [], record(monkeypatch, "ppo_policy_loss")
    advantages_of = una.ppo_advantages

    def recorded(*arguments):
        raw.append(advantages_of(*arguments)[0].clone())
        return advantages_of(*arguments)
    monkeypatch.setattr(una, "ppo_advantages", recorded)
    policy, value, reference, tokens, mask = ppo_case()
    for options in ({}, dict(divide=True)):
        batch = batch_of(value, reference, tokens, mask)
        with torch.no_grad():
            train.ppo(policy, batch, 0.25, **options)
    inner = mask[:, data.PROMPT_TOKENS:]
    (centred, divided), (of_tokens, _) = (call[2] for call in calls), (a[inner] for a in raw)
    for advantages in (centred, divided):
        assert advantages[inner].mean().item() == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(call[3], inner) for call in calls) and not inner.all()
    assert torch.allclose(centred[inner], of_tokens - of_tokens.mean(), atol=1e-6)
    assert divided[inner].std().item() == pytest.approx(1, abs=1e-5)
    deviation = of_tokens.std().item()
    assert torch.allclose(divided[inner] * deviation, centred[inner], atol=1e-5)
    assert abs(deviation - 1) > 0.1                              # so that the two do not agree


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_the_first_losses_are_those_computed_by_hand_one_token_at_a_time(lam, divide, monkeypatch):
    # With ratio 1 and V = V_old nothing is clipped: L = -sum_t A_t (centred) + 1/2 sum_t A_t^2
    # (raw, as target - V is A).
    monkeypatch.setattr(train, "PPO_LAMBDA", lam)
    *models, tokens, mask = ppo_case()
    policy, value, reference = (copy.deepcopy(model).double() for model in models)
    losses = train.ppo(policy, batch_of(value, reference, tokens, mask), 0.25, divide)
    raw = []
    with torch.no_grad():
        for row, n in zip(tokens, mask.sum(1).tolist()):
            pi, ref = (model(row[None])[0].log_softmax(-1) for model in (policy, reference))
            # of what stands before each token
            v = [value(row[None, :t])[0, -1].item() for t in range(3, 3 + n)] + [0.0]
            r = [-0.25 * (pi[t - 1, row[t]] - ref[t - 1, row[t]]).item() for t in range(3, 3 + n)]
            r[-1] += data.reward(row[None, :3], row[None, 3:]).item()
            delta = [r[s] + v[s + 1] - v[s] for s in range(n)]
            raw.append([sum(lam ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)])
    flat = torch.tensor([a for advantages in raw for a in advantages], dtype=torch.float64)
    for loss, advantages in zip(losses.tolist(), raw):
        mean, deviation = flat.mean().item(), flat.std().item() if divide else 1.0
        expected = sum(-(a - mean) / deviation + a * a / 2 for a in advantages)
        assert loss == pytest.approx(expected, abs=1e-6)


def test_the_value_of_a_token_is_read_before_it(monkeypatch):
    calls = record(monkeypatch, "ppo_value_loss")
    policy, value, reference, tokens, mask = ppo_case()
    rows, last = torch.arange(len(tokens)), 2 + mask.sum(1)
    inner, seen = mask[:, data.PROMPT_TOKENS:], []
    for column in (None, last, last - 1):
        changed = tokens.clone()
        if column is not None:
            changed[rows, column] = (changed[rows, column] + 1) % data.EOT
        train.ppo(policy, batch_of(value, reference, changed, mask), 0.25)
        seen.append(calls[-1][0].detach())
    before, after_last, after_earlier = seen
    # no value of the response knows its last token ...
    assert torch.equal(before[inner], after_last[inner])
    # ... but that of it, the one before
    column = last - data.PROMPT_TOKENS
    assert not torch.isclose(before[rows, column], after_earlier[rows, column], atol=1e-4).any()
    full, blank = value(tokens)[rows, last], value(tokens * 0)[rows, last]
    assert not torch.isclose(full, blank, atol=1e-4).any()


# ---------------------------------------------------------------- the models with a scalar head
def test_scalar_gpt_starts_as_its_gpt_with_scalar_0():
    model = small_reference()
    tokens = torch.randint(data.EOT, (4, 7), generator=torch.Generator().manual_seed(0))
    scalar = ScalarGPT(model)
    assert torch.equal(scalar.hidden(tokens), model.hidden(tokens))
    assert torch.equal(scalar(tokens), torch.zeros(4, 7))
    assert all(p.requires_grad for p in scalar.parameters())


def test_scalar_gpt_is_causal():
    scalar = moved(ScalarGPT(small_reference()), 5)
    tokens = torch.randint(data.EOT, (4, 7), generator=torch.Generator().manual_seed(0))
    before = scalar(tokens)
    for t in range(7):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % data.EOT
        after = scalar(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t], before[:, t]).any()


def test_training_a_scalar_gpt_leaves_its_gpt_alone():
    model = GPT(GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, 1, 2, 16))
    before, scalar = copy.deepcopy(model.state_dict()), ScalarGPT(model)
    places = [{p.data_ptr() for p in x.parameters()} for x in (model, scalar)]
    assert not places[0] & places[1]
    optimizer = torch.optim.SGD(scalar.parameters(), lr=0.1)
    for _ in range(2):   # the head is 0 at first: the rest moves in the second step
        ((scalar(torch.arange(7)[None]) - 1) ** 2).sum().backward()
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(scalar.wte.weight, model.wte.weight)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- the reward model
def sentences(n, seed):
    """n responses to two prompts, rows 2i and 2i + 1 to the same.

    Random adjectives, the right noun, and in three of ten a wrong word.
    """
    rng, prompts, responses = random.Random(seed), [], []
    for _ in range(n):
        first = len(prompts) % 2 == 0
        prompts.append(rng.choice(["happy wind :", "sad sea :"]) if first else prompts[-1])
        words = [*rng.choices(list(data.ADJECTIVES), k=2), prompts[-1].split()[1]]
        if rng.random() < 0.3:
            words[rng.randrange(3)] = rng.choice([*data.NOUNS, *data.ADJECTIVES])
        responses.append("".join(f" {word}" for word in words))
    return data.encode_prompts(prompts), *data.encode_responses(responses)


@functools.cache
def trained_reward_model():
    """A reward model and the feedback, on 800 responses, that it learned from."""
    settings = train.Settings(device="cpu", steps=250, batch=96)
    feedback = data.feedback_on(*sentences(800, 0), torch.Generator().manual_seed(0))
    return train.train_reward_model(settings, 0, small_reference(), feedback), feedback


def test_model_reward_reads_the_last_token_of_the_response_and_nothing_behind_it():
    model = moved(ScalarGPT(small_reference()), 6)
    responses, y_mask = data.encode_responses(["", " sea", " bright sea", " bright warm sea"])
    tokens, mask = data.join(data.encode_prompts(["happy sea :"] * 4), responses, y_mask)
    reward = train.model_reward(model, tokens, mask)
    alone = torch.stack([model(row[None, :4 + n])[0, -1] for n, row in enumerate(tokens)])
    assert torch.allclose(reward, alone, atol=1e-6)
    other = tokens.where(mask | (torch.arange(7) < data.PROMPT_TOKENS), 1)
    assert not torch.equal(other, tokens)
    assert torch.equal(train.model_reward(model, other, mask), reward)


@pytest.mark.parametrize("seed", [0, 1])
def test_eq02_the_reward_model_learns_the_order_of_rewards(seed):
    # Seed 0 are the responses whose pairs it was trained on: coin flips of Eq. 1, not their
    # rewards. Seed 1 are others.
    model, _ = trained_reward_model()
    tokens, mask = data.join(*sentences(800, seed))
    judged = train.model_reward(model, tokens, mask).view(-1, 2)
    true = train.judge_reward(tokens, mask).view(-1, 2)
    clear = (true[:, 0] - true[:, 1]).abs() > 1
    right = (judged[:, 0] > judged[:, 1]) == (true[:, 0] > true[:, 1])
    assert clear.sum() > 100 and right[clear].float().mean() > 0.85


def test_the_reward_model_comes_back_frozen_and_without_gradients():
    model, _ = trained_reward_model()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_eq02_the_reward_models_loss_does_not_see_what_depends_on_the_prompt_alone():
    # So r_phi is known up to f(x), which UNA's offset and PPO's values both take up.
    model, feedback = trained_reward_model()
    chosen, rejected = (train.model_reward(model, feedback.tokens[rows], feedback.mask[rows])
                        .double() for rows in feedback.pairs.T)
    prompt = feedback.tokens[feedback.pairs[:, 0], :data.PROMPT_TOKENS]
    f = 5.0 * (prompt[:, 0] == prompt[0, 0])   # a mood's bonus
    loss = una.reward_model_loss(chosen, rejected)
    assert near(una.reward_model_loss(chosen + f, rejected + f), loss) and f.std() > 1
    assert loss.mean() < 0.6 < math.log(2)
    assert not near(una.reward_model_loss(chosen + f, rejected), loss, 0.1)
