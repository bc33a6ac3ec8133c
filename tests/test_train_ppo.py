"""PPO in train.py: its inner steps, the value model, and the reward model."""
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
from helpers import gpt, moved, near, random_tokens
from model import ScalarGPT
from toy import changed


# ---------------------------------------------------------------- the inner steps
@functools.cache
def reference():
    return gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE, 1, 2, 16, noise=0.3).requires_grad_(False)


def ppo_case(size=36):
    """A policy, a value model and a reference, all different, and a batch of the policy's samples.

    Some of these are shorter than others.
    """
    policy, value = moved(reference(), 0.1, 1), moved(ScalarGPT(reference()).double(), 0.1, 2)
    shared = SimpleNamespace(reference=reference(), reward_model=None)
    batch = next(train.fresh_batches(policy, value, shared, size, 0))
    assert len(batch.mask.sum(1).unique()) > 2
    return policy, value, batch


def recorded(monkeypatch, *names):
    """{name: calls of una.<name>, each as its tuple of arguments}. They still do their work."""
    calls = {name: [] for name in names}
    for name, function in [(name, getattr(una, name)) for name in names]:
        monkeypatch.setattr(una, name, lambda *of, name=name, function=function: (
            calls[name].append(of), function(*of))[1])
    return calls


def test_the_ratio_is_1_at_first_and_what_is_old_stays_old_and_carries_no_gradient(monkeypatch):
    calls = recorded(monkeypatch, "ppo_token_rewards", "ppo_advantages", "ppo_policy_loss",
                     "ppo_value_loss")
    policy, value, batch = ppo_case()
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-3)
    for _ in range(3):
        loss = train.ppo(policy, batch, 0.25)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert loss.shape == (36,) and len(calls["ppo_advantages"]) == 1
    once = calls["ppo_token_rewards"] + calls["ppo_advantages"]
    assert not any(getattr(part, "requires_grad", False) for call in once for part in call)
    for name in ("ppo_policy_loss", "ppo_value_loss"):
        first, *later = calls[name]
        assert torch.equal(first[0], first[1]) and len(later) == 2
        for new, old, fixed, response, clip in later:
            assert (new - old).abs().max() > 1e-4 and new.requires_grad
            assert torch.equal(old, first[1]) and torch.equal(fixed, first[2])
            assert not old.requires_grad and not fixed.requires_grad
            assert torch.equal(response, batch.mask[:, 3:]) and clip == train.PPO_CLIP
    assert all(p.grad.any() for model in (policy, value) for p in model.parameters())


def by_hand(policy, value, batch, lam):
    """Advantages of each response, one token at a time: a list of lists."""
    advantages = []
    for row, n, reward in zip(batch.tokens, batch.mask.sum(1).tolist(), batch.rewards.tolist()):
        pi, ref = (model(row[None])[0].log_softmax(-1) for model in (policy, reference()))
        v = [value(row[None, :t])[0, -1].item() for t in range(3, 3 + n)] + [0.0]   # before token t
        r = [-0.25 * (pi[t - 1, row[t]] - ref[t - 1, row[t]]).item() for t in range(3, 3 + n)]
        r[-1] += reward
        delta = [r[s] + v[s + 1] - v[s] for s in range(n)]
        advantages.append([sum(lam ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)])
    return advantages


def test_eq03_the_first_losses_and_gradient_are_those_by_hand_the_policy_gradient(monkeypatch):
    # With ratio 1 and V = V_old nothing is clipped: L = -sum_t A_t (less the mean of all tokens)
    # + 1/2 sum_t A_t^2 (as it is, for target - V is A), and grad L = -sum_t A_t grad log pi(y_t).
    policy, value, batch = ppo_case()
    for lam in (0.9, 1.0):
        monkeypatch.setattr(train, "PPO_LAMBDA", lam)
        losses = train.ppo(policy, changed(batch), 0.25)
        advantages = by_hand(policy, value, batch, lam)
        flat = [a for of_one in advantages for a in of_one]
        mean = sum(flat) / len(flat)
        expected = [sum(-(a - mean) + a * a / 2 for a in of_one) for of_one in advantages]
        assert losses.tolist() == pytest.approx(expected, abs=1e-9) and abs(mean) > 0.1
        logprobs = train.logprob(policy, batch.tokens, batch.mask, una.token_logprobs)
        by_policy_gradient = -sum((a - mean) * of_token for row, of_one in zip(logprobs, advantages)
                                  for of_token, a in zip(row, of_one))
        for a, b in zip(*(torch.autograd.grad(loss, [*policy.parameters()])
                          for loss in (losses.sum(), by_policy_gradient))):
            assert near(a, b, 1e-9)


def test_the_value_of_a_token_is_read_before_it(monkeypatch):
    values = recorded(monkeypatch, "ppo_value_loss")["ppo_value_loss"]
    policy, value, batch = ppo_case()
    rows, last = torch.arange(36), batch.mask.sum(1) - 1         # the last token, of four
    for column in (None, last, last - 1):
        tokens = batch.tokens.clone()
        if column is not None:
            tokens[rows, 3 + column] = (tokens[rows, 3 + column] + 1) % data.EOT
        train.ppo(policy, changed(batch, tokens=tokens), 0.25)
    (before, *_), (after_last, *_), (after_earlier, *_) = values
    response = batch.mask[:, 3:]
    assert torch.equal(before[response], after_last[response])   # no value knows the last token,
    changes = (before - after_earlier)[rows, last].abs()         # and its own the one before
    assert changes.min() > 1e-6


# ---------------------------------------------------------------- the models with a scalar head
def test_a_scalar_gpt_starts_as_its_gpt_with_scalar_0_is_causal_and_leaves_its_gpt_alone():
    model, tokens = gpt(dtype=torch.float32), random_tokens(4, 7)
    before, scalar = copy.deepcopy(model.state_dict()), ScalarGPT(model)
    assert torch.equal(scalar.hidden(tokens), model.hidden(tokens))
    assert not scalar(tokens).any() and all(p.requires_grad for p in scalar.parameters())
    optimizer = torch.optim.SGD(scalar.parameters(), lr=0.1)
    for _ in range(2):           # the head is 0 at first: the rest moves in the second step
        optimizer.zero_grad()
        ((scalar(tokens) - 1) ** 2).mean().backward()
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(scalar.wte.weight, model.wte.weight)
    for t in range(7):
        changed_at_t = tokens.clone()
        changed_at_t[:, t] = (tokens[:, t] + 1) % 5
        before, after = scalar(tokens), scalar(changed_at_t)
        assert torch.equal(after[:, :t], before[:, :t]) and (after[:, t] != before[:, t]).all()


# ---------------------------------------------------------------- the reward model
def sentences(n, seed):
    """n responses to two prompts, rows 2i and 2i + 1 to the same.

    Random adjectives, the right noun, and in three of ten a wrong word.
    """
    rng, prompts, responses = random.Random(seed), [], []
    for i in range(n):
        prompts.append(prompts[-1] if i % 2 else rng.choice(["happy wind :", "sad sea :"]))
        words = [*rng.choices([*data.ADJECTIVES], k=2), prompts[-1].split()[1]]
        if rng.random() < 0.3:
            words[rng.randrange(3)] = rng.choice([*data.NOUNS, *data.ADJECTIVES])
        responses.append("".join(f" {word}" for word in words))
    return data.encode_prompts(prompts), *data.encode_responses(responses)


def test_eq02_the_reward_model_learns_the_order_of_rewards_and_nothing_of_the_prompt_alone():
    # Of pairs: coin flips of Eq. 1, not rewards. Asked about other responses.
    settings = SimpleNamespace(reference_steps=40, steps=160, batch=96, n_layer=1, n_head=2,
                               n_embd=32, device="cpu")
    base = train.train_reference(settings, 0)
    feedback = data.feedback_on(*sentences(3200, 0), torch.Generator().manual_seed(0))
    model = train.train_reward_model(settings, 0, base, feedback, learning_rate=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    x, y, mask = sentences(800, 1)
    judged = train.model_reward(model, *data.join(x, y, mask)).view(-1, 2)
    true = data.reward(x, y).view(-1, 2)
    clear = (true[:, 0] - true[:, 1]).abs() > 1
    right = (judged[:, 0] > judged[:, 1]) == (true[:, 0] > true[:, 1])
    assert clear.sum() > 100 and right[clear].float().mean() > 0.85
    # r_phi is known up to f(x), which UNA's offset and PPO's values both take up.
    chosen, rejected = (train.model_reward(model, feedback.tokens[rows], feedback.mask[rows])
                        .double() for rows in feedback.pairs.T)
    f = 5.0 * feedback.tokens[feedback.pairs[:, 0], 0]           # a mood's bonus
    loss = una.reward_model_loss(chosen, rejected)
    assert near(una.reward_model_loss(chosen + f, rejected + f), loss) and f.std() > 1
    assert loss.mean() < 0.6 < math.log(2)
    assert not near(una.reward_model_loss(chosen + f, rejected), loss, 0.1)
