"""Batches, losses, the loop, and what a whole run promises."""
import ast
import copy
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import train
import una
from helpers import gradient, near, normals
from lab import exact, figures
from lab.exact import all_responses
from model import GPT, GPTConfig, ScalarGPT, sample
from models import gpt
from short_train import FLAGS, moved, small, timeless

ROOT = Path(__file__).parent.parent
STORED = [name for name, method in train.METHODS.items() if method.feedback != "fresh"]
FRESH = [name for name in train.METHODS if name not in STORED]
KINDS = ("pairs", "binary", "scores", "mixed")


def with_rows():
    """small's feedback, and with each response its row number."""
    feedback = small().feedback
    return SimpleNamespace(**vars(feedback), row=torch.arange(len(feedback.tokens)))


def everything(kind, feedback=None):
    """All stored feedback of a kind in one batch."""
    feedback = feedback or with_rows()
    return next(data.stored_batches(kind, feedback, len(feedback.tokens), 0))


def one_pass(kind, size, feedback=None):
    """Batches of `size` responses, until each item had its turn."""
    feedback = feedback or with_rows()
    stream = data.stored_batches(kind, feedback, size, 0)
    first = next(stream)
    items = items_in(first, kind)
    return [first] + [next(stream) for _ in range(items_in(everything(kind), kind) // items - 1)]


def items_in(batch, kind):
    """An item is a pair, a label or a score."""
    return {"pairs": len(batch.tokens) // 2,
            "mixed": len(batch.tokens) - len(getattr(batch, "chosen", ()))
            }.get(kind, len(batch.tokens))


def batches_of(name, policy, value=None, offsets=None, **settings):
    settings = replace(small().settings, **settings)
    return train.batches_for(train.METHODS[name], policy, value, small(), settings, 0, offsets)


def trained(name, steps, observe=None):
    """A copy of small's reference, trained by a method, and what align says of it."""
    policy, method = copy.deepcopy(small().reference).requires_grad_(True), train.METHODS[name]
    value = ScalarGPT(small().reference) if name == "ppo" else None
    beta, offsets = method.beta * 0.25, None
    if method.feedback != "fresh":
        offsets = train.start_offsets(method, small().feedback, beta)
    entry = train.align(method, policy, batches_of(name, policy, value, offsets), beta, steps,
                        value, {steps} if observe else (), observe, offsets)
    return policy, entry


class Blind:
    """An observer that looks at nothing."""

    def __init__(self, *_):
        pass

    def __call__(self, *_):
        pass

    def report(self):
        return {}


def run_one(name, shared=None, observer=Blind, method=None, **settings):
    """run_method's entry."""
    settings = replace(small().settings, **settings)
    return train.run_method(settings, 0, name, shared or small(), method, observer)["runs"]


# ---------------------------------------------------------------- a prompt, once for its responses
def heads():
    """A GPT and a ScalarGPT in float64; the scalar is not 0, as it is at first."""
    model = gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE)
    scalar = ScalarGPT(model).double()
    torch.nn.init.normal_(scalar.scalar.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(scalar.scalar.bias, 0.3)
    return dict(logits=model, scalar=scalar)


ORDERS = {  # of the prompts of a batch
    "one": [3] * 5, "all unlike": range(15, -1, -1), "repeated": [7, 7, 0, 0, 9, 9],
    "in any order": [9, 2, 2, 9, 0, 15, 2, 9, 9, 1],
}


def answers(order):
    """Tokens and mask of a batch: a response of each length, over and over."""
    responses, mask = data.encode_responses(
        ["".join([f" {word}" for word in [*data.ADJECTIVES][i:i + i % 4]])
         for i in range(len(order))])
    return data.join(data.encode_prompts([data.PROMPTS[i] for i in order]), responses, mask)


def value_and_gradients(model, output, seed=0):
    """A weighted mean of the output, no two weights alike, and its gradient in each parameter."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).double()
    gradients = torch.autograd.grad((weights * output).mean(), [*model.parameters()])
    assert all(slope.any() for slope in gradients)
    return [output, *gradients]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("head", ["logits", "scalar"])
def test_after_prompt_is_the_models_own_output_from_the_prompts_last_token_on(head, order):
    model, (tokens, _) = heads()[head], answers(order)
    shared = value_and_gradients(model, train.after_prompt(model, tokens))
    alone = value_and_gradients(model, model(tokens)[:, data.PROMPT_TOKENS - 1:])
    assert all(near(a, b, 1e-12) for a, b in zip(shared, alone, strict=True))


@pytest.mark.parametrize("head", ["logits", "scalar"])
def test_a_prompt_is_computed_once_and_of_a_response_nothing_but_its_own_tokens(head):
    model, (tokens, _) = heads()[head], answers(ORDERS["in any order"])
    shapes, hidden = [], model.hidden
    model.hidden = lambda tokens, *rest: (shapes.append(tuple(tokens.shape)),
                                          hidden(tokens, *rest))[1]
    train.after_prompt(model, tokens)
    assert shapes == [(5, data.PROMPT_TOKENS), (10, data.MAX_TOKENS)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_model_logprob_is_the_sequence_logprob_of_the_whole_responses_logits(order):
    model, (tokens, mask) = heads()["logits"], answers(order)
    shared = value_and_gradients(model, train.model_logprob(model, tokens, mask))
    logprob = una.sequence_logprob(model(tokens), tokens, mask)
    alone = value_and_gradients(model, logprob)
    assert all(near(a, b, 1e-12) for a, b in zip(shared, alone, strict=True))
    by_token = una.token_logprobs(model(tokens), tokens, mask)
    response = by_token[:, data.PROMPT_TOKENS - 1:]              # the prompt's columns are 0
    assert near(train.model_logprobs(model, tokens, mask), response, 1e-12)
    assert near(response.sum(1), logprob, 1e-12) and len(logprob.unique()) > 3


def test_model_reward_is_the_scalar_at_the_last_token_of_each_response():
    model, (tokens, mask) = heads()["scalar"], answers(ORDERS["in any order"])
    lengths = mask.sum(1).tolist()
    alone = torch.stack([model(row[None, :data.PROMPT_TOKENS + n])[0, -1]
                         for row, n in zip(tokens, lengths)])
    assert near(train.model_reward(model, tokens, mask), alone, 1e-12)
    assert set(lengths) == {1, 2, 3, 4} and len(alone.unique()) > 6


# ---------------------------------------------------------------- stored feedback in batches
def test_held_out_prompts_get_no_feedback():
    heldout = {tuple(prompt) for prompt in data.encode_prompts(data.HELDOUT_PROMPTS).tolist()}
    prompts = small().feedback.tokens[:, :data.PROMPT_TOKENS].tolist()
    in_feedback = {tuple(prompt) for prompt in prompts}
    assert not heldout & in_feedback and len(in_feedback) == len(data.TRAIN_PROMPTS)


def test_feedback_is_on_two_responses_to_each_training_prompt_in_turn():
    prompts = small().feedback.tokens[:, :data.PROMPT_TOKENS]
    expected = [prompt for prompt in data.TRAIN_PROMPTS for _ in range(2)] * 4
    assert torch.equal(prompts, data.encode_prompts(expected))


def test_feedback_says_which_prompt_each_response_answers_and_begins_with_no_offset():
    feedback = small().feedback
    prompts = data.encode_prompts(data.TRAIN_PROMPTS)
    assert torch.equal(prompts[feedback.prompt], feedback.tokens[:, :data.PROMPT_TOKENS])
    assert torch.equal(feedback.offset, torch.zeros(len(feedback.tokens)))


def test_responses_are_collected_in_chunks_so_that_memory_does_not_grow_with_them(monkeypatch):
    shared, asked, answered = small(), [], []

    def recorded(model, x, *rest):
        asked.append(x)
        answered.append(sample(model, x, *rest))
        return answered[-1]
    monkeypatch.setattr(train, "sample", recorded)
    monkeypatch.setattr(train, "CHUNK", 40)
    feedback = train.collect_feedback(shared.settings, 0, shared.reference)
    assert [len(x) for x in asked] == [40, 40, 16]
    responses, mask = (torch.cat(parts) for parts in zip(*answered))
    expected = data.join(torch.cat(asked), responses, mask)      # each behind its own prompt
    assert torch.equal(feedback.tokens, expected[0]) and torch.equal(feedback.mask, expected[1])
    assert torch.equal(feedback.prompt, shared.feedback.prompt)
    assert not torch.equal(responses[:40], responses[40:80])     # one stream, not one a chunk
    fresh = train.model_logprob(shared.reference, feedback.tokens, feedback.mask)
    assert torch.allclose(feedback.ref_logprob, fresh, atol=1e-5)
    rewards = data.reward(feedback.tokens[:, :3], feedback.tokens[:, 3:])
    assert torch.equal(feedback.scores, torch.sigmoid(rewards))


def test_una_mixed_uses_each_response_for_one_kind_of_feedback():
    batch = everything("mixed")
    chosen, rejected, binary, scored = (
        set(batch.row[rows].tolist())
        for rows in (batch.chosen, batch.rejected, batch.binary, batch.scored))
    paired = chosen | rejected
    assert not paired & binary and not paired & scored and not binary & scored
    assert len(binary) == len(scored) == len(small().feedback.tokens) // 3
    assert len(paired) == 2 * len(batch.chosen)
    assert len(paired) > len(small().feedback.tokens) // 4       # identical responses are left out


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_stored_batch_are_what_the_feedback_says_of_them(kind):
    feedback, pairs = with_rows(), {tuple(pair) for pair in small().feedback.pairs.tolist()}
    for batch in one_pass(kind, 24):
        for name in ("tokens", "mask", "labels", "scores", "ref_logprob", "prompt", "offset"):
            assert torch.equal(getattr(batch, name), getattr(feedback, name)[batch.row])
        if kind == "pairs":
            assert {tuple(pair) for pair in batch.row.view(2, -1).T.tolist()} <= pairs
        if kind == "mixed":
            chosen, rejected = batch.row[batch.chosen], batch.row[batch.rejected]
            assert set(zip(chosen.tolist(), rejected.tolist())) <= pairs
            assert (chosen < 32).all() and (rejected < 32).all()
            assert ((batch.row[batch.binary] >= 32) & (batch.row[batch.binary] < 64)).all()
            assert (batch.row[batch.scored] >= 64).all()
            said = [batch.chosen, batch.rejected, batch.binary, batch.scored]
            assert sorted(torch.cat(said).tolist()) == list(range(len(batch.row)))


def test_every_kind_of_feedback_gets_as_many_responses_a_step():
    # No two of these responses to one prompt are identical: no pair is missing.
    assert len(small().feedback.pairs) == 48
    passes = {kind: one_pass(kind, 24) for kind in KINDS}
    assert {len(batches) for batches in passes.values()} == {4}
    for kind in ("pairs", "binary", "scores"):
        assert {len(batch.tokens) for batch in passes[kind]} == {24}
    assert sum(len(batch.tokens) for batch in passes["mixed"]) == 96
    for batches in passes.values():                              # ... and by its end the same ones
        assert sorted(row for batch in batches for row in batch.row.tolist()) == list(range(96))


def test_where_responses_are_identical_pairs_are_missing_and_steps_are_not():
    feedback = with_rows()
    feedback.pairs = feedback.pairs[:24]
    batch = next(data.stored_batches("pairs", feedback, 24, 0))
    assert len(batch.tokens) == 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [48, 45])
def test_by_default_every_stored_response_is_seen_once(kind, pairs):
    # But for pairs, where ties, which say nothing, leave fewer of them than the batches divide.
    settings, feedback = train.Settings(steps=4, batch=24), with_rows()
    assert settings.judged == len(feedback.tokens) == 96
    feedback.pairs = feedback.pairs[:pairs]
    stream = data.stored_batches(kind, feedback, settings.batch, 0)
    rows = torch.cat([next(stream).row for _ in range(settings.steps)])
    times = torch.bincount(rows, minlength=96)
    if kind in ("binary", "scores") or pairs == 48:
        assert (times == 1).all()
    else:
        assert times.sum() >= 88 and times.max() <= 2 and (times == 1).sum() >= 80


@pytest.mark.parametrize("kind", KINDS)
def test_stored_batches_come_from_their_seed_alone(kind):
    rows = [next(data.stored_batches(kind, with_rows(), 24, seed)).row.tolist()
            for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_batches_cover_an_epoch_without_repetition():
    stream = data.shuffled(torch.arange(10), 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    few = data.shuffled(torch.arange(2), 5, torch.Generator())   # fewer items than a batch
    assert len(next(few)) == 2


# ---------------------------------------------------------------- losses of stored feedback
def test_first_losses_are_what_theory_predicts():
    # At the start pi = pi_ref, so r_theta = 0, s_theta = 1/2.
    reference, feedback = small().reference, small().feedback
    for name, expected in {"una-pair": math.log(2), "dpo": math.log(2),
                           "una-binary-bce": math.log(2), "una-binary-mse": 1 / 4,
                           "kto": 1 / 2}.items():
        batch = next(batches_of(name, reference, batch=96))
        first = train.METHODS[name].loss(reference, batch, 0.25)
        assert torch.allclose(first, torch.full_like(first, expected), atol=1e-6), name
    first = train.una_score(reference, feedback, 0.25)
    assert torch.allclose(first, (0.5 - feedback.scores) ** 2, atol=1e-6)
    rewards = data.reward(feedback.tokens[:, :3], feedback.tokens[:, 3:])
    assert torch.allclose(train.una_reward(reference, feedback, 0.25), rewards ** 2, atol=1e-5)


def test_una_mixed_is_the_three_losses_with_every_item_weighing_the_same():
    policy, feedback = moved(small().reference), with_rows()
    for batch in (everything("mixed"), *one_pass("mixed", 24)):
        rows = {name: batch.row[getattr(batch, name)]
                for name in ("chosen", "rejected", "binary", "scored")}
        pairs = data.take(feedback, torch.cat([rows["chosen"], rows["rejected"]]))
        kinds = [train.una_pair(policy, pairs, 0.25),
                 train.una_binary_mse(policy, data.take(feedback, rows["binary"]), 0.25),
                 train.una_score(policy, data.take(feedback, rows["scored"]), 0.25)]
        count = sum(len(values) for values in kinds)
        mean = train.una_mixed(policy, batch, 0.25).mean().item()
        assert mean == pytest.approx(sum(v.sum().item() for v in kinds) / count, abs=1e-6)
        assert count == items_in(batch, "mixed")
        by_kind = sum(values.mean().item() for values in kinds) / 3
        assert mean != pytest.approx(by_kind, abs=1e-4)


def test_a_mixed_batch_is_its_single_items():
    # Shuffled, one at a time or all at once: the same loss for each item, so the same mean.
    policy = moved(small().reference)
    together = train.una_mixed(policy, everything("mixed"), 0.25)
    single = one_pass("mixed", 1)
    alone = [train.una_mixed(policy, batch, 0.25) for batch in single]
    by_kind = torch.cat([value for kind in ("chosen", "binary", "scored")
                         for batch, value in zip(single, alone) if len(getattr(batch, kind))])
    assert torch.allclose(together, by_kind, atol=1e-6) and len(together) == 80
    assert together.mean().item() == pytest.approx(torch.cat(alone).mean().item(), abs=1e-6)


def in_double(feedback, reference):
    return SimpleNamespace(**vars(feedback) | dict(ref_logprob=train.logprob_in_chunks(
        copy.deepcopy(reference).double(), feedback.tokens, feedback.mask)))


@pytest.mark.parametrize("responses, items", [(6, 5), (1, 1)])
def test_micro_batches_give_the_same_gradient(responses, items):
    policy = moved(small().reference).double()
    feedback = in_double(with_rows(), small().reference)
    train.una_mixed(policy, everything("mixed", feedback), 0.25).mean().backward()
    whole = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    parts = one_pass("mixed", responses, feedback)
    assert {items_in(part, "mixed") for part in parts} == {items} and len(parts) == 80 // items
    for part in parts:
        (train.una_mixed(policy, part, 0.25).sum() / 80).backward()
    assert all(torch.allclose(p.grad, g, atol=1e-8) for p, g in zip(policy.parameters(), whole))


@pytest.mark.parametrize("missing", ["chosen", "binary", "scored"])
def test_a_mixed_batch_may_lack_a_kind(missing):
    policy = moved(small().reference)
    batch = next(batch for batch in one_pass("mixed", 3) if not len(getattr(batch, missing)))
    value = train.una_mixed(policy, batch, 0.25)
    value.mean().backward()
    assert len(value) and value.isfinite().all() and policy.wte.weight.grad.isfinite().all()
    assert policy.wte.weight.grad.any()


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("label", [None, 0, 1])
def test_kto_takes_odd_batches_one_class_and_a_batch_of_one(count, label):
    feedback = train.with_mismatched_pairs(small().feedback, small().reference)
    rows = torch.arange(len(feedback.tokens))
    if label is not None:
        rows = rows[feedback.labels == label]
    value = train.kto(moved(small().reference), data.take(feedback, rows[:count]), 0.25)
    assert value.shape == (len(rows[:count]),) and len(value) and value.isfinite().all()


def test_kto_estimates_its_kl_from_the_responses_to_other_prompts():
    # This way round, as rho is then positive on the responses.
    policy, reference, feedback = small().reference, moved(small().reference), small().feedback
    tokens, mask = feedback.tokens.clone(), feedback.mask.clone()
    tokens[:, 3:] = tokens[:, 3:].roll(2, 0)                     # x_i with y_{i-2}, by hand
    mask[:, 3:] = mask[:, 3:].roll(2, 0)
    rho = [train.model_logprob(policy, t, m) - train.model_logprob(reference, t, m)
           for t, m in ((feedback.tokens, feedback.mask), (tokens, mask))]
    z0 = max(0.0, rho[1].mean().item())
    expected = (feedback.labels - torch.sigmoid(0.25 * (rho[0] - z0))).abs()
    of_moved = SimpleNamespace(**vars(feedback) | dict(
        ref_logprob=train.logprob_in_chunks(reference, feedback.tokens, feedback.mask)))
    batch = train.with_mismatched_pairs(of_moved, reference)
    value = train.kto(policy, batch, 0.25)
    assert torch.allclose(value, expected, atol=1e-5)
    own = max(0.0, rho[0].mean().item())                         # with its own responses
    matched = (feedback.labels - torch.sigmoid(0.25 * (rho[0] - own))).abs()
    assert not torch.allclose(value, matched, atol=1e-5)


def test_precomputed_reference_logprobs_are_fresh_ones_in_any_batch():
    reference, feedback = small().reference, small().feedback
    order = torch.randperm(len(feedback.tokens), generator=torch.Generator().manual_seed(3))
    fresh = torch.cat([train.model_logprob(reference, feedback.tokens[rows], feedback.mask[rows])
                       for rows in order.split(5)])
    assert torch.allclose(feedback.ref_logprob[order], fresh, atol=1e-5)
    other = train.with_mismatched_pairs(feedback, reference)
    fresh = train.model_logprob(reference, other.other_tokens, other.other_mask)
    assert torch.allclose(other.other_ref_logprob, fresh, atol=1e-5)


def test_logprobs_in_chunks_are_those_computed_at_once_and_carry_no_gradient():
    tokens, mask = (part.repeat(50, 1) for part in (small().feedback.tokens, small().feedback.mask))
    tokens, shapes = tokens.clone(), []
    tokens[:, 3] = torch.arange(len(tokens)) % data.EOT          # no chunk is like another
    model = moved(small().reference)
    at_once = train.model_logprob(model, tokens, mask)
    model.register_forward_hook(lambda _, arguments, __: shapes.append(tuple(arguments[0].shape)))
    in_chunks = train.logprob_in_chunks(model, tokens, mask)
    assert torch.allclose(in_chunks, at_once, atol=1e-5) and not in_chunks.requires_grad
    sizes = [rows for rows, columns in shapes if columns == data.MAX_TOKENS]
    assert sizes == [train.CHUNK, train.CHUNK, 4800 - 2 * train.CHUNK] and len(tokens) == 4800


# ---------------------------------------------------------------- fresh samples
@pytest.fixture
def two_prompts(monkeypatch):
    small()                                                      # of all prompts, for who is next
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:2])


def fresh_batch(policy, reference=None, size=16, value=None):
    shared = SimpleNamespace(reference=reference or small().reference, reward_model=None)
    return next(train.fresh_batches(policy, value, shared, size, 0))


def test_a_fresh_batch_is_of_the_policys_samples_with_the_judges_rewards(two_prompts):
    policy = moved(small().reference)
    batch = fresh_batch(policy)
    x = data.encode_prompts(data.TRAIN_PROMPTS).repeat_interleave(8, 0)
    y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    tokens, mask = data.join(x, y, y_mask)
    assert torch.equal(batch.tokens, tokens) and torch.equal(batch.mask, mask)
    assert torch.equal(batch.rewards, data.reward(x, y)) and batch.per_prompt == 8
    ref_logprob = train.model_logprob(small().reference, tokens, mask)
    assert torch.allclose(batch.ref_logprob, ref_logprob, atol=1e-5)
    assert torch.allclose(batch.ref_logprobs.sum(1), ref_logprob, atol=1e-5)


@pytest.mark.parametrize("name", FRESH)
def test_online_methods_sample_from_the_policy_and_not_from_the_reference(name, two_prompts,
                                                                          monkeypatch):
    policy, seen = moved(small().reference), []

    def recorded(model, x, *_):
        seen.append(model)
        return data.encode_responses([" warm sweet wind"] * len(x))

    monkeypatch.setattr(train, "sample", recorded)
    next(batches_of(name, policy, ScalarGPT(policy), batch=32))
    assert seen == [policy]


def test_eq07_online_the_offset_is_the_prompts_own_mean_or_that_of_the_others(
        two_prompts, monkeypatch):
    baselined = []
    monkeypatch.setattr(una, "una_reward_loss",
                        lambda implicit, explicit: baselined.append(explicit - implicit))
    policy = moved(small().reference)
    batch = fresh_batch(policy)
    rho = train.model_logprob(policy, batch.tokens, batch.mask) - batch.ref_logprob
    residuals = (batch.rewards - 0.25 * rho).view(2, 8)          # prompt by prompt
    train.una_online(policy, batch, 0.25)
    train.una_online(policy, batch, 0.25, leave_one_out=True)
    own, others = (part.view(2, 8) for part in baselined)
    assert torch.allclose(own, residuals - residuals.mean(1, keepdim=True), atol=1e-5)
    assert own.abs().max() > 0.1
    for k in range(8):
        rest = torch.cat([residuals[:, :k], residuals[:, k + 1:]], dim=1)
        assert torch.allclose(others[:, k], residuals[:, k] - rest.mean(1), atol=1e-5)


@pytest.mark.parametrize("per_prompt", [2, 3, 8])
def test_eq07_online_the_own_mean_has_n_minus_1_over_n_of_the_gradient_with_the_others(
        two_prompts, per_prompt):
    # Sample by sample, so in every batch: not only on average.
    policy = moved(small().reference).double()
    batch = fresh_batch(policy, copy.deepcopy(small().reference).double(), 2 * per_prompt)
    own, others = (torch.autograd.grad(train.una_online(policy, batch, 0.25, leave_one_out).mean(),
                                       [*policy.parameters()])
                   for leave_one_out in (False, True))
    scale = (per_prompt - 1) / per_prompt
    assert all(near(a, scale * b) for a, b in zip(own, others))
    assert max(slope.abs().max() for slope in others) > 1e-2


def test_eq07_online_leaving_one_out_has_the_gradient_of_eq07_and_the_own_mean_half_of_it(
        monkeypatch):
    # Of two samples: all 36 pairs of them, each with its probability. Nothing is sampled.
    normal = normals(0)
    theta, ref, rewards = normal(6), normal(6).log_softmax(-1), normal(6)
    y = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    probability = theta.softmax(-1)[y].prod(1)
    monkeypatch.setattr(train, "implicit_reward", lambda policy, batch, beta: una.implicit_reward(
        policy.log_softmax(-1)[y.flatten()], ref[y.flatten()], beta))
    batch = SimpleNamespace(rewards=rewards[y.flatten()], per_prompt=2)
    own, others = (gradient(lambda policy: probability * train.una_online(
        policy, batch, 0.4, leave_one_out).view(-1, 2).mean(1), theta)
        for leave_one_out in (False, True))
    J = gradient(lambda policy: una.rlhf_objective(policy.log_softmax(-1), ref, rewards, 0.4),
                 theta)
    assert near(others, -2 * 0.4 * J) and near(own, -0.4 * J) and J.abs().max() > 0.01


@pytest.mark.parametrize("name", ["una-online", "una-online-score"])
def test_online_losses_depend_on_the_reference(name, two_prompts):
    # A loss that forgets pi_ref has nothing that holds the policy to it.
    policy, gradients = moved(small().reference), []
    for anchor in (small().reference, policy):
        policy.zero_grad()
        batch = fresh_batch(policy, anchor)
        train.METHODS[name].loss(policy, batch, 0.25).mean().backward()
        gradients.append(policy.wte.weight.grad.clone())
    assert not torch.allclose(*gradients, atol=1e-4)


def test_eq09_online_regresses_scores(two_prompts):
    policy, reference = moved(small().reference), small().reference
    x = data.encode_prompts(data.TRAIN_PROMPTS).repeat_interleave(8, 0)
    y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    both = data.join(x, y, y_mask)
    rho = train.model_logprob(policy, *both) - train.model_logprob(reference, *both)
    expected = (torch.sigmoid(0.25 * rho) - torch.sigmoid(data.reward(x, y))) ** 2
    value = train.una_online_score(policy, fresh_batch(policy), 0.25)
    assert torch.allclose(value, expected, atol=1e-6)


def test_the_real_loop_reaches_the_closed_form_optimum_in_a_world_of_15_responses(monkeypatch):
    # {a, b, end}, three tokens, two prompts, float64: GPT, loss and loop, with another language.
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.9, -1.2, 0.4, 0.0, 0.7, -0.3, 1.5, -0.8, 0.2, 0.6,
                            -0.1, 1.1]).double()
    responses, masks = all_responses(3, 3, 2)
    code = {tuple(row): i for i, row in enumerate(responses.tolist())}
    prompts = torch.tensor([[0, 1], [1, 1]])
    monkeypatch.setattr(data, "ENCODING", SimpleNamespace(n_vocab=3))
    monkeypatch.setattr(data, "MAX_TOKENS", 3)
    monkeypatch.setattr(data, "PROMPT_TOKENS", 2)
    monkeypatch.setattr(data, "EOT", 2)
    monkeypatch.setattr(data, "TRAIN_PROMPTS", ["", ""])
    monkeypatch.setattr(data, "encode_prompts", lambda texts: prompts)
    monkeypatch.setattr(data, "reward", lambda x, y: torch.stack(
        [rewards[code[tuple(row)]] * (1 - 2 * first) for first, row in zip(x[:, 0], y.tolist())]))
    torch.manual_seed(0)
    reference = GPT(GPTConfig(3, 5, 2, 2, 16)).double().requires_grad_(False)
    reference.wte.weight *= 10                   # tells its prompts apart, as a trained one does
    world = exact.World(reference, ["", ""], 0.5)
    assert world.ref_logprobs.exp().sum(1) == pytest.approx([1, 1], abs=1e-12)
    shared = SimpleNamespace(reference=reference, reward_model=None)
    policy = copy.deepcopy(reference).requires_grad_(True)
    method = train.Method("fresh", train.una_online, 5e-3, 1.0)
    train.align(method, policy, train.fresh_batches(policy, None, shared, 128, 0), 0.5, 300)
    logprobs = exact.policy_logprobs(policy, world.prompts)
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.5)
    assert exact.evaluate(world, world.ref_logprobs)["regret"] > 0.2
    assert exact.evaluate(world, logprobs)["regret"] < 0.01
    assert (logprobs.exp() - best.exp()).abs().sum(1).max() / 2 < 0.1          # total variation


# ---------------------------------------------------------------- the loop
def test_una_pair_and_dpo_end_in_the_same_weights():
    ends = [trained(name, 30)[0].state_dict() for name in ("una-pair", "dpo")]
    start = small().reference.state_dict()
    assert max((ends[0][name] - ends[1][name]).abs().max().item() for name in start) <= 1e-6
    assert max((ends[0][name] - start[name]).abs().max().item() for name in start) > 1e-3


@pytest.mark.parametrize("name", train.METHODS)
def test_the_reference_never_changes_and_the_policy_does(name):
    reference, seen = small().reference, []
    before = {name: weight.clone() for name, weight in reference.state_dict().items()}
    policy, _ = trained(name, 2, lambda *point: seen.append(copy.deepcopy(point)))
    assert all(torch.equal(weight, before[name])
               for name, weight in reference.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert not torch.equal(policy.wte.weight, reference.wte.weight)
    ((step, _, _, observed),) = seen             # the figures are those of the final weights
    assert step == 2 and torch.equal(observed.wte.weight, policy.wte.weight)


@pytest.mark.parametrize("name", ["una-score", "una-online", "ppo"])
def test_align_calls_the_observer_at_the_checkpoints_and_looks_at_nothing_itself(name, monkeypatch):
    def forbidden(*_):
        raise AssertionError("align enumerates")
    for listing in ("all_logprobs", "policy_logprobs", "all_responses"):
        monkeypatch.setattr(exact, listing, forbidden)
    seen, losses, method = [], [], train.METHODS[name]
    if name == "ppo":
        method = method._replace(epochs=2)                       # a loss for each inner step

    def recorded(*arguments):
        value = method.loss(*arguments)
        losses.append(value.mean().item())
        return value

    policy = copy.deepcopy(small().reference).requires_grad_(True)
    value = ScalarGPT(policy) if name == "ppo" else None
    entry = train.align(method._replace(loss=recorded), policy, batches_of(name, policy, value),
                        0.25, 5, value, {1, 4, 5},
                        lambda *point: seen.append((*point, policy.wte.weight.clone())))
    steps, seconds, of_step, policies, weights = zip(*seen)
    assert steps == (1, 4, 5) and all(seen is policy for seen in policies)
    assert of_step == tuple(losses[step * method.epochs - 1] for step in steps)
    assert 0 < seconds[0] < seconds[1] < seconds[2] == entry["seconds"]
    assert entry["start_loss"] == losses[0] and len(losses) == 5 * method.epochs
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[2], policy.wte.weight)


def test_the_clock_of_training_stands_still_while_the_observer_looks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.run.Clock, "now", lambda self: now[0])

    def loss(policy, batch, beta):
        now[0] += 1.0
        return train.una_score(policy, batch, beta)

    def observe(*_):
        now[0] += 100.0
    policy = copy.deepcopy(small().reference).requires_grad_(True)
    method = train.METHODS["una-score"]._replace(loss=loss)
    entry = train.align(method, policy, batches_of("una-score", policy), 0.25, 3, None, {1, 3},
                        observe)
    assert entry["seconds"] == 3.0


def test_state_bytes_count_every_model_in_memory():
    # Adam: a weight, a gradient and two moments of 4 bytes for each parameter, and a step count
    # for each tensor.
    reference, settings = small().reference, small().settings
    count = sum(p.numel() for p in reference.parameters())
    tensors = len(list(reference.parameters()))
    offline, online = (run_one(name, steps=1, batch=48)["state_bytes"]
                       for name in ("una-score", "una-online"))
    assert offline == 16 * count + 4 * tensors
    assert online == offline + 4 * count                         # the reference as well
    # PPO trains a value model of the same size and a scalar head; with a reward model UNA needs at
    # most 0.6 of its memory.
    reward_model = train.train_reward_model(settings, 0, reference, small().feedback)
    shared = SimpleNamespace(**vars(small()) | dict(reward_model=reward_model))
    ppo, una_online = (run_one(name, shared, steps=1, reward="model")["state_bytes"]
                       for name in ("ppo", "una-online"))
    head = settings.n_embd + 1
    assert una_online == online + 4 * (count + head)
    assert ppo == 2 * offline + 16 * head + 8 + 4 * count + 4 * (count + head)
    assert una_online / ppo <= 0.601


def test_online_methods_have_a_curve_and_methods_of_stored_feedback_an_end():
    steps = {}

    class Recorder(Blind):
        def __call__(self, step, *_):
            seen.append(step)
    for name in ("una-score", "una-online"):
        seen = steps[name] = []
        run_one(name, observer=Recorder, steps=64, evaluations=6)
    assert steps == {"una-score": [64], "una-online": [2, 4, 8, 16, 32, 64]}


# ---------------------------------------------------------------- the optimiser's step
def test_learning_rate_climbs_then_falls_to_zero_but_never_is():
    rates = []
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(1, 101):
        train.descend(optimizer, weight.sum(), 2.0, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert min(rates) > 0 and max(rates) == rates[4] and rates[-1] == pytest.approx(0.02)
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)


def test_groups_of_parameters_keep_their_multiples_of_the_rate_and_share_one_norm():
    weight, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([dict(params=[weight]), dict(params=[other], times=10)], lr=0.0)
    for step in (1, 2):
        train.descend(optimizer, 3 * weight.sum() - 4 * other.sum(), 0.5, step, 2)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.5 / step, 5.0 / step])
        assert (weight.grad.item(), other.grad.item()) == pytest.approx((0.6, -0.8), rel=1e-4)
    assert weight.item() == pytest.approx(-0.6 * 0.75, rel=1e-4)
    assert other.item() == pytest.approx(0.8 * 7.5, rel=1e-4)


def test_a_long_gradient_is_cut_to_norm_1_and_a_short_one_is_left():
    for slope, expected in ((30.0, 1.0), (0.5, 0.5)):
        weight = torch.nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        train.descend(optimizer, slope / 2 * weight.sum(), 1.0, 1, 1)
        assert weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_before_it_touches_the_weights(value):
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(FloatingPointError, match=f"the loss is {value}"):
        train.descend(torch.optim.SGD([weight], lr=1.0), weight.sum() * value, 1.0, 3, 10)
    assert weight.item() == 1.0


@pytest.mark.parametrize("at, slope", [(0.0, "inf"), (1.0, "nan")])
def test_a_gradient_that_is_no_number_stops_the_run_before_it_touches_the_weights(at, slope):
    # The slope of sqrt is infinite at 0, and cut to norm 1 inf would be NaN.
    weight = torch.nn.Parameter(torch.tensor([at]))
    loss = weight.sqrt().sum() if slope == "inf" else ((weight - 1) ** 2).sqrt().sum()
    assert loss.item() == 0
    with pytest.raises(FloatingPointError, match=f"gradient has norm {slope}"):
        train.descend(torch.optim.SGD([weight], lr=1.0), loss, 1.0, 3, 10)
    assert weight.item() == at


# ---------------------------------------------------------------- a run that leaves the numbers
def nan_loss(policy, batch, beta):
    return train.implicit_reward(policy, batch, beta) * math.nan


def steep_loss(policy, batch, beta):
    """0, with a gradient whose squares are more than float32 holds."""
    reward = 1e30 * train.implicit_reward(policy, batch, beta)
    return reward - reward.detach()


BROKEN = {  # how: (Method, steps, what is said)
    "loss": (train.Method("scores", nan_loss, 1e-3, 1), 3, "the loss is nan, at step 1 of 3"),
    "gradient": (train.Method("scores", steep_loss, 1e-3, 1), 3,
                 "the gradient has norm inf, at step 1 of 3"),
    "weights": (train.METHODS["una-score"]._replace(learning_rate=1e39), 1,
                "the policy's probabilities are not numbers, at step 1 of 1"),
    "samples": (train.METHODS["una-online-score"]._replace(learning_rate=1e39), 2,
                "the policy's probabilities are not numbers, at step 2 of 2"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_that_leaves_the_numbers_says_why_and_has_no_figures(how):
    method, steps, why = BROKEN[how]
    entry = run_one("any", method=method, steps=steps, observer=exact.Observer)
    assert why in entry.pop("diverged")
    assert entry.pop("reward_source", None) == ("judge" if method.feedback == "fresh" else None)
    assert entry == dict(method="any", seed=0, beta=0.25, method_beta=0.25 * method.beta,
                         learning_rate=method.learning_rate)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures cost more than all the rest of a short run."""
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)


def test_one_method_that_diverges_costs_a_line_and_the_status_and_nothing_else(
        short, tmp_path, capsys, monkeypatch):
    broken = dict(zip(("kto", "una-pair", "una-score", "una-online-score"), BROKEN.values()))
    for name, (method, _, _) in broken.items():
        monkeypatch.setitem(train.METHODS, name, method)
    status = short(tmp_path, f"--methods dpo,{','.join(broken)},una-online --seed 7")
    out, err = capsys.readouterr()
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert status == 1 and [run["method"] for run in results["runs"]] == [
        "dpo", *broken, "una-online"]
    for run in results["runs"]:
        ended = run["method"] not in broken
        assert ("train" in run) == ("heldout" in run) == ("curve" in run) == ended
        assert ("diverged" in run) == (not ended)
        assert (tmp_path / f"{run['method']}-7.pt").exists() == ended
    for name in broken:
        (line,) = [line for line in err.splitlines() if f"| {name} " in line]
        assert line.startswith("seed 7 | ") and "diverged: " in line and "at step " in line
        rows = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert [row.split()[1:] for row in rows] == [["1", "of", "1", "diverged"]]
    assert "Traceback" not in err
    assert all((tmp_path / name).exists() for name in figures.PICTURES)


# ---------------------------------------------------------------- results.json and weights
def load(path):
    saved = torch.load(path, weights_only=True)
    model = GPT(GPTConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model


def test_results_hold_what_is_promised(tiny):
    results = tiny.results
    assert tiny.status == 0
    assert set(results) == {"settings", "versions", "device", "files", "reference", "optimum",
                            "runs"}
    assert set(results["settings"]) == {item.name for item in fields(train.Settings)}
    assert [(run["seed"], run["method"]) for run in results["runs"]] == [
        (1, name) for name in train.METHODS]
    for run in results["runs"]:
        method = train.METHODS[run["method"]]
        assert run["beta"] == 0.25 and run["method_beta"] == 0.25 * method.beta
        assert run["learning_rate"] == method.learning_rate
        assert run["seconds"] > 0 and run["state_bytes"] > 0
        for split in ("train", "heldout"):
            reached = run[split]
            assert set(reached) == {"reward", "kl", "objective", "optimum", "regret",
                                    "frontier_reward", "residual_variance"}
            objective = reached["reward"] - run["beta"] * reached["kl"]
            assert reached["objective"] == pytest.approx(objective, abs=1e-9)
            regret = reached["optimum"] - reached["objective"]
            assert reached["regret"] == pytest.approx(regret, abs=1e-9) and regret > -1e-6
            assert reached["reward"] <= reached["frontier_reward"] + 1e-5
        steps = [point["step"] for point in run["curve"]]
        assert steps == ([0, 1, 3] if run["method"] in FRESH else [0, 3])
        assert run["curve"][0]["seconds"] == 0
        assert run["curve"][-1]["regret"] == run["train"]["regret"]
        assert run["curve"][-1]["seconds"] == run["seconds"]
        assert ("chosen_reward" in run) == ("rejected_reward" in run) == (run["method"] in STORED)
        assert run.get("reward_source") == ("judge" if run["method"] in FRESH else None)
        assert ("offsets" in run) == (method.offset != "zero")   # of the three prompts
        assert len(run.get("offsets", "123")) == 3
    kept = [name for name in results["files"] if not name.startswith("shared-")]
    assert len(kept) == len(results["files"]) - 1
    assert sorted(path.name for path in tiny.folder.iterdir()) == sorted(["results.json", *kept])


def test_every_curve_begins_at_the_reference(tiny):
    (reference,) = tiny.results["reference"]
    start = reference["train"]
    assert reference["method"] == "reference" and start["kl"] == 0
    assert all(run["curve"][0]["objective"] == start["objective"] for run in tiny.results["runs"])
    assert all(run["curve"][0]["regret"] == start["regret"] for run in tiny.results["runs"])


def test_saved_weights_give_the_reported_figures_again(tiny):
    reference = load(tiny.folder / "reference-1.pt")
    world = exact.World(reference, data.HELDOUT_PROMPTS[:1], 0.25)
    run = next(run for run in tiny.results["runs"] if run["method"] == "una-online")
    logprobs = exact.policy_logprobs(load(tiny.folder / "una-online-1.pt"), world.prompts)
    assert exact.evaluate_in_full(world, logprobs) == pytest.approx(run["heldout"], abs=1e-9)
    start, best = exact.reference_and_optimum({"train": world})
    assert start["train"] == pytest.approx(tiny.results["reference"][0]["heldout"], abs=1e-9)
    assert best["train"] == pytest.approx(tiny.results["optimum"][0]["heldout"], abs=1e-9)


def test_chosen_and_rejected_rewards_are_means_over_the_pairs(tiny, monkeypatch):
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:3])
    reference, policy = (load(tiny.folder / f"{name}-1.pt") for name in ("reference", "kto"))
    settings = train.Settings(device="cpu", judged=48)
    feedback = train.collect_feedback(settings, 1, reference)
    run = next(run for run in tiny.results["runs"] if run["method"] == "kto")
    for key, rows in zip(("chosen_reward", "rejected_reward"), feedback.pairs.T):
        both = feedback.tokens[rows], feedback.mask[rows]
        rho = train.model_logprob(policy, *both) - train.model_logprob(reference, *both)
        assert run[key] == pytest.approx(run["method_beta"] * rho.mean().item(), abs=1e-6)


def test_same_seed_same_results_whatever_else_runs(short, tmp_path, no_pictures):
    # Runs must not depend on each other: other methods, another order, the same numbers.
    short(tmp_path / "all", "--seed 1")
    short(tmp_path / "some", "--seed 1 --methods una-online,kto,una-mixed --seeds 2")
    everything, again = (json.loads((tmp_path / name / "results.json").read_text("utf-8"))
                         for name in ("all", "some"))
    expected = {run["method"]: run for run in everything["runs"]}
    first, second = again["runs"][:3], again["runs"][3:]
    assert [entry["method"] for entry in second] == ["una-online", "kto", "una-mixed"]
    for entry, other in zip(first, second):
        assert timeless(entry) == timeless(expected[entry["method"]])
        assert entry["train"] != other["train"]                  # another seed is another run
    assert timeless(again["reference"][0]) == timeless(everything["reference"][0])
    assert " to " in figures.table(again).splitlines()[-2]       # of two seeds


def test_a_reward_model_stands_in_for_the_judge_and_is_reported(short, tmp_path, no_pictures):
    for source in ("judge", "model"):
        short(tmp_path / source, f"--reward {source} --methods una-score,una-online,ppo")
    judge, model = (json.loads((tmp_path / source / "results.json").read_text("utf-8"))["runs"]
                    for source in ("judge", "model"))
    assert timeless(judge[0]) == timeless(model[0])              # stored feedback is the judge's
    for by_judge, by_model in zip(judge[1:], model[1:]):
        assert "reward_model" not in by_judge and by_model["reward_source"] == "model"
        assert set(by_model["reward_model"]) == {"accuracy", "model_gain", "judge_gain"}
        assert by_judge["train"] != by_model["train"]


def test_the_reward_models_report_compares_responses_to_one_prompt(monkeypatch):
    seen, worlds = [], {"train": exact.World(small().reference, data.TRAIN_PROMPTS[:1], 0.25)}
    worlds["train"].prompts = data.encode_prompts(data.TRAIN_PROMPTS)

    def recorded(_, tokens, mask):
        seen.append(tokens)
        return train.judge_reward(tokens, mask)
    monkeypatch.setattr(train, "model_reward", recorded)
    shared = SimpleNamespace(reference=small().reference, reward_model=None, worlds=worlds)
    report = train.reward_model_report(shared, moved(small().reference), 0)
    for tokens in seen:
        first, second = tokens.view(-1, 2, data.BLOCK_SIZE)[:, :, :data.PROMPT_TOKENS].unbind(1)
        assert torch.equal(first, second) and 4000 < len(tokens) <= 4096
        assert len(first.unique(dim=0)) == len(data.TRAIN_PROMPTS)
    assert len(seen) == 2 and report["model_gain"] == report["judge_gain"]


def test_results_are_on_disk_whole_before_anything_is_said_of_them(
        short, tmp_path, no_pictures, monkeypatch):
    seen = []

    def look(_):
        results = json.loads((tmp_path / "results.json").read_text("utf-8"))
        names = [entry["method"] for key in ("reference", "runs") for entry in results[key]]
        for name in names:
            load(tmp_path / f"{name}-0.pt")
        seen.append(names)
    monkeypatch.setattr(train.run, "say", look)
    monkeypatch.setattr(train.run, "print_text", look)
    assert short(tmp_path, "--methods una-pair,una-score,dpo") == 0
    everything = ["reference", "una-pair", "una-score", "dpo"]
    assert seen == [["reference"], ["reference", "dpo"], ["reference", "una-score", "dpo"],
                    everything, everything, everything]


def test_ctrl_c_leaves_what_has_ended_and_says_where_it_is(short, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setitem(train.METHODS, "una-pair",
                        train.METHODS["una-pair"]._replace(loss=interrupted))
    assert short(tmp_path, "--methods una-binary-mse,una-pair,una-score,dpo") == 130
    out, err = capsys.readouterr()
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [run["method"] for run in results["runs"]] == ["una-score", "dpo"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dpo-0.pt", "reference-0.pt", "results.json", "una-score-0.pt"]
    last = err.splitlines()[-1]
    assert last.startswith("train.py: interrupted") and "2 of 4 runs" in last
    assert str(tmp_path / "results.json") in last and err.count("interrupted") == 1 and not out


def test_another_run_in_the_folder_replaces_the_files_of_the_first_and_no_others(
        short, tmp_path, no_pictures, capsys):
    short(tmp_path, "--methods una-pair,dpo --seeds 2")
    (tmp_path / "frontier.png").write_bytes(b"a picture of that run")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "my-0.pt").write_text("mine")
    short(tmp_path, "--methods dpo --seed 5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dpo-5.pt", "my-0.pt", "notes.txt", "reference-5.pt", "results.json"]
    assert "an earlier run" in capsys.readouterr().err


def test_another_run_in_this_process_learns_from_its_own_reference(short, tmp_path, no_pictures):
    # The same folder and seed: what is shared has the same path, and must not be the first run's.
    for folder, flags in (("a", "--reference-steps 2"), ("a", ""), ("b", "")):
        short(tmp_path / folder, f"--methods dpo {flags}")
    again, alone = (json.loads((tmp_path / name / "results.json").read_text("utf-8"))
                    for name in ("a", "b"))
    assert timeless(again["runs"]) == timeless(alone["runs"])


def test_what_a_seed_shares_may_begin_with_a_reference_that_is_there_already(
        short, tmp_path, monkeypatch, no_pictures):
    short(tmp_path, "--methods dpo")
    reference = load(tmp_path / "reference-0.pt").requires_grad_(False)
    monkeypatch.setattr(train, "train_reference", None)          # it is not asked for
    path = str(tmp_path / "shared.pt")
    settings = train.parse([*FLAGS, "--out", str(tmp_path / "other")])
    entries = train.prepare(settings, 0, path, reference)
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert timeless(entries["reference"]["train"]) == results["reference"][0]["train"]
    shared = train.load(path)
    assert torch.equal(shared.reference.wte.weight, reference.wte.weight)


@pytest.mark.parametrize("beta", ["1e-4", "1e6"])
def test_a_run_at_either_end_of_beta_ends_in_numbers(beta, short, tmp_path, no_pictures):
    assert short(tmp_path, f"--beta {beta} --methods una-score,una-online") == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    possible = results["reference"][0]["train"]["regret"]
    assert possible > 0
    for run in results["runs"]:
        assert math.isfinite(figures.lost(run)) and run["train"]["regret"] > -1e-6 * possible


# ---------------------------------------------------------------- what is said meanwhile
def test_without_a_terminal_each_stage_and_method_is_a_line_as_it_ends(tiny):
    lines = tiny.err.splitlines()
    assert "\r" not in tiny.err and "\033" not in tiny.err
    assert len(lines) == len(train.METHODS) + 2
    for stage in ("reference", "feedback", "evaluation"):
        assert f" {stage} " in lines[0]
    assert lines[0].startswith("seed 1 | ")
    for line, name in zip(lines[1:], reversed(train.METHODS)):
        assert line.split(" | ")[:2] == ["seed 1", f"{name:<17}"] and line.endswith(" s")
        assert " lost " in line and "loss " in line
    for stage in ("reference", "feedback", "training", "exact evaluation"):
        assert f"{stage} " in lines[-1]


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("arguments, told", [
    ("--methods una-pear", "una-pear"), ("--methods dpo,dpo", "twice"), ("--methods ,", "is none"),
    ("--seeds 0", "--seeds"), ("--seed -1", "--seed"), ("--seeds many", "many"),
    ("--seed 99999999999999999999", "--seed"),
    ("--beta 0", "--beta"), ("--beta -1", "--beta"), ("--beta nan", "--beta"),
    ("--beta inf", "--beta"), ("--beta 1e30", "--beta"), ("--beta 1e-310", "--beta"),
    ("--beta 9e-5", "--beta"), ("--beta 1.1e6", "--beta"), ("--beta little", "little"),
    ("--steps 0", "--steps"), ("--steps 1.5", "1.5"), ("--batch 23", "--batch"),
    ("--batch 100 --methods dpo,ppo", "ppo"), ("--batch 12 --methods una-online", "--batch 12"),
    ("--batch 1 --methods dpo", "--batch"),
    ("--judged 25", "--judged"), ("--judged 10", "--judged 10"), ("--judged 22", "24 at least"),
    ("--judged -2", "--judged"), ("--level -1", "--level"), ("--level 5", "--level"),
    ("--level nan", "--level"), ("--level high", "high"),
    ("--n-embd 10 --n-head 4", "--n-embd"), ("--device tpu", "tpu"), ("--reward fame", "fame"),
    ("--reward true", "true"), ("--jobs -1", "--jobs"), ("--out", "--out"),
    ("--evaluations 0", "--evaluations"), ("--reference-steps 0", "--reference-steps"),
    ("--frobnicate", "--frobnicate"), ("--claims", "--claims"), ("--offset batch", "--offset"),
])
def test_bad_input_is_one_line_and_status_2(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path / "new"), *arguments.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1
    assert error.startswith("train.py: ") and not (tmp_path / "new").exists()


def test_every_response_is_judged_that_a_run_sees_unless_a_number_says_otherwise(tmp_path):
    settings = train.Settings()
    assert settings.judged == settings.steps * settings.batch == 76_800
    assert train.Settings(steps=3, batch=31).judged == 92        # in pairs
    assert train.Settings(steps=1, batch=2).judged == 24         # two for each prompt
    assert replace(train.Settings(judged=96), steps=7).judged == 96
    assert replace(settings, judged=0, steps=2).judged == 384

    def judged(flags):
        return train.parse([*flags.split(), "--out", str(tmp_path)]).judged
    assert judged("") == judged("--judged 0") == 76_800 and judged("--judged 4096") == 4096
    assert judged("--steps 10 --batch 24") == 240 and judged("--judged 24") == 24
    assert judged("--quick") == train.QUICK["steps"] * 192


def test_stored_feedback_takes_any_batch_and_fresh_samples_a_multiple_of_the_prompts(tmp_path):
    def batch(flags):
        return train.parse([*flags.split(), "--out", str(tmp_path)]).batch
    assert batch("--batch 23 --methods dpo,kto,una-mixed") == 23
    assert batch("--batch 24") == batch("--batch 24 --methods ppo") == 24


@pytest.mark.parametrize("content", [
    b"no json", b"[1, 2]", b"null", b"{}", b'{"files": "abc"}', b'{"files": {"a": 1}}',
    b'{"files": [1]}', b'{"settings": {}, "landmarks": [], "runs": []}', b"\xff\xfe",
    b"[" * 100_000,
])
def test_a_results_json_of_something_else_is_bad_input_and_stays(content, tmp_path, capsys):
    for name in ("results.json", "abc", "a"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(tmp_path) in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("results.json", "abc", "a"), content)


def test_an_unwritable_folder_and_a_missing_device_are_bad_input(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cases = [["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "file" / "below")]]
    if not torch.cuda.is_available():
        cases.append(["--device", "cuda", "--out", str(tmp_path / "new")])
    for arguments in cases:
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and arguments[1] in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Where UTF-8 is not the default, and a notebook asks for a backend that is not installed here.
ODD = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
           MPLBACKEND="module://matplotlib_inline.backend_inline")


def test_from_the_shell_errors_have_no_traceback_and_help_names_every_flag(odd_environment):
    wrong = subprocess.run([sys.executable, "train.py", "--methods", "nope"], cwd=ROOT,
                           capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("train.py: ")
    assert wrong.stderr.count("\n") == 1 and not wrong.stdout
    told = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True, env=odd_environment(ODD))
    assert told.returncode == 0 and not told.stderr
    assert all("--" + item.name.replace("_", "-") in told.stdout for item in fields(train.Settings))


# ---------------------------------------------------------------- the source
def test_every_setting_is_read():
    source = (ROOT / "train.py").read_text("utf-8")
    for item in fields(train.Settings):
        assert f"settings.{item.name}" in source or item.name == "quick", item.name


def imported(path):
    """Modules of this project, and torch, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" if node.module == "lab" else node.module
                      for alias in node.names}
    own = {file.stem for file in ROOT.glob("*.py")} | {"torch"}
    return {name for name in names if name.split(".")[0] in own | {"lab"}}


def test_imports_run_one_way():
    assert imported("una.py") == {"torch", "torch.nn.functional"}
    assert imported("model.py") == {"torch", "torch.nn", "torch.nn.functional"}
    assert imported("data.py") == {"torch"}
    assert imported("lab/run.py") == {"torch"}
    assert imported("lab/exact.py") == {"torch", "torch.nn.functional", "data", "una"}
    assert imported("lab/figures.py") == {"lab.run"}
    assert imported("train.py") == {"torch", "data", "una", "model", "lab.exact", "lab.figures",
                                    "lab.run"}
