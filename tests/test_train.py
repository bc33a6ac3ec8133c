"""train.py and lab/run.py: batches, losses, the loop, and what a whole run promises."""
import copy
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import toy
import train
import una
from helpers import gpt, gradient, moved, near, normals, random_tokens
from lab import exact, figures, run
from model import GPT, GPTConfig, ScalarGPT, sample
from toy import changed, small, timeless

pytestmark = pytest.mark.usefixtures("language")
ROOT = Path(__file__).parent.parent
STORED = [name for name, method in train.METHODS.items() if method.feedback != "fresh"]
FRESH = [name for name in train.METHODS if name not in STORED]
KINDS = ("pairs", "binary", "scores", "mixed")


def run_one(name, folder="", shared=None, **settings):
    """run_method's entry."""
    settings = changed(small().settings, out=str(folder), **settings)
    return train.run_method(settings, 0, name, shared or small())


def load(path):
    saved = torch.load(path, weights_only=True)
    model = GPT(GPTConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model


# ---------------------------------------------------------------- a prompt, once for its responses
ORDERS = [3] * 5, range(15, -1, -1), [7, 7, 0, 0, 9, 9], [9, 2, 2, 9, 0, 15, 2, 9, 9, 1]


def answers(order):
    """Tokens and mask of a batch: responses of 1, 2, 3 and 4 tokens, anything behind them."""
    responses = random_tokens(len(order), 4, vocab_size=data.EOT)
    mask = torch.arange(4) <= torch.arange(len(order))[:, None] % 4
    return data.join(data.encode_prompts([data.PROMPTS[i] for i in order]), responses, mask)


def heads():
    """A GPT and a ScalarGPT in float64; the scalar is not 0, as it is at first."""
    model = gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE)
    return model, moved(ScalarGPT(model).double())


def value_and_gradients(model, output):
    """A weighted mean of the output, no two weights alike, and its gradient in each parameter."""
    weights = torch.linspace(-1, 2, output.numel()).double().view_as(output)
    gradients = torch.autograd.grad((weights * output).mean(), [*model.parameters()])
    assert all(slope.any() for slope in gradients)
    return [output, *gradients]


def test_after_prompt_is_the_models_own_output_with_each_prompt_computed_once():
    for model in heads():
        shapes, hidden = [], model.hidden
        model.hidden = lambda tokens, *cache: (shapes.append(tuple(tokens.shape)),
                                               hidden(tokens, *cache))[1]
        for order in ORDERS:
            tokens, _ = answers(order)
            shared = value_and_gradients(model, train.after_prompt(model, tokens))
            assert shapes[-2:] == [(len(set(order)), 3), (len(order), 4)]
            alone = value_and_gradients(model, model(tokens)[:, 2:])
            assert all(near(a, b) for a, b in zip(shared, alone, strict=True))


def test_logprob_is_the_sequence_logprob_of_the_whole_responses_logits(monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 4)
    model, _ = heads()
    for order in ORDERS:
        tokens, mask = answers(order)
        whole = una.sequence_logprob(model(tokens), tokens, mask)
        shared = value_and_gradients(model, train.logprob(model, tokens, mask))
        alone = value_and_gradients(model, whole)
        assert all(near(a, b) for a, b in zip(shared, alone, strict=True))
        by_token = train.logprob(model, tokens, mask, una.token_logprobs)
        assert near(by_token, una.token_logprobs(model(tokens), tokens, mask)[:, 2:])
        in_chunks = train.logprob_in_chunks(model, tokens, mask)
        assert near(in_chunks, whole) and not in_chunks.requires_grad


def test_model_reward_is_the_scalar_at_the_last_token_of_each_response():
    (_, model), (tokens, mask) = heads(), answers(ORDERS[3])
    alone = [model(row[None, :3 + n])[0, -1] for row, n in zip(tokens, mask.sum(1).tolist())]
    assert near(train.model_reward(model, tokens, mask), torch.stack(alone))
    assert len(torch.stack(alone).unique()) == 10


# ---------------------------------------------------------------- stored feedback in batches
def with_rows():
    """small's feedback and each response's row number, as if no two responses were identical."""
    pairs = torch.arange(96).view(48, 2)
    pairs[::2] = pairs[::2].flip(1)                              # one wins, then the other
    return changed(small().feedback, row=torch.arange(96), pairs=pairs)


def one_pass(kind, size):
    """Batches of `size` responses, until each item had its turn: a pair, a label or a score."""
    stream = data.stored_batches(kind, with_rows(), size, 0)
    batches, left = [], dict(pairs=48, mixed=16 + 32 + 32).get(kind, 96)
    while left > 0:
        batches.append(batch := next(stream))
        left -= len(batch.row) // 2 if kind == "pairs" else len(batch.row)
        left += len(getattr(batch, "rejected", ()))
    return batches


def test_feedback_is_on_two_responses_of_the_reference_to_each_training_prompt_in_turn(
        monkeypatch):
    asked, answered, reference = [], [], small().reference

    def recorded(*arguments):
        asked.append(arguments)
        answered.append(sample(*arguments))
        return answered[-1]
    monkeypatch.setattr(train, "sample", recorded)
    monkeypatch.setattr(train, "CHUNK", 40)                      # so many at a time: for memory
    settings = changed(small().settings, level=1.0)
    feedback = train.collect_feedback(settings, 0, reference)
    models, prompts, *_ = zip(*asked)
    x, (y, mask) = torch.cat(prompts), (torch.cat(parts) for parts in zip(*answered))
    assert [len(part) for part in prompts] == [40, 40, 16] and {*models} == {reference}
    assert torch.equal(x, data.encode_prompts(
        [prompt for prompt in data.TRAIN_PROMPTS for _ in range(2)] * 16))
    assert feedback.prompt.tolist() == [0, 0, 1, 1, 2, 2] * 16 and not feedback.offset.any()
    tokens, mask = data.join(x, y, mask)
    assert torch.equal(feedback.tokens, tokens) and torch.equal(feedback.mask, mask)
    assert not torch.equal(y[:36], y[40:76])                     # one stream, not one a chunk
    assert near(feedback.ref_logprob, train.logprob(reference, tokens, mask), 1e-5)
    level = torch.tensor([-1 / 3, 1 / 3, 1])[feedback.prompt]    # wind, fire, night
    assert near(feedback.scores, torch.sigmoid(data.reward(x, y) + level), 1e-6)
    again, other = (train.collect_feedback(settings, seed, reference) for seed in (0, 1))
    for name in ("tokens", "pairs", "labels", "scores"):
        assert torch.equal(getattr(again, name), getattr(feedback, name)), name
        assert not torch.equal(getattr(other, name), getattr(feedback, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_stored_batches_deal_each_response_once_with_what_the_feedback_says_of_it(kind):
    feedback, batches = with_rows(), one_pass(kind, 24)
    pairs, kinds = {tuple(pair) for pair in feedback.pairs.tolist()}, set()
    assert len(batches) == 4                                     # of every kind
    assert sorted(torch.cat([batch.row for batch in batches]).tolist()) == [*range(96)]
    for batch in batches:
        for name in ("tokens", "mask", "labels", "scores", "ref_logprob", "prompt", "offset"):
            assert torch.equal(getattr(batch, name), getattr(feedback, name)[batch.row]), name
        if kind == "mixed":
            said = [batch.chosen, batch.rejected, batch.binary, batch.scored]
            assert sorted(torch.cat(said).tolist()) == [*range(len(batch.row))]
            chosen, rejected, binary, scored = (batch.row[rows].tolist() for rows in said)
            assert {*zip(chosen, rejected)} <= pairs
            kinds |= {("pair", row // 32) for row in chosen + rejected}
            kinds |= {("label", row // 32) for row in binary}
            kinds |= {("score", row // 32) for row in scored}
        else:
            assert len(batch.row) == 24
        if kind == "pairs":
            assert {*zip(*batch.row.view(2, -1).tolist())} <= pairs
    if kind == "mixed":                                          # a third of each
        assert kinds == {("pair", 0), ("label", 1), ("score", 2)}


def test_batches_come_from_their_seed_and_are_smaller_where_identical_responses_make_no_pair():
    for kind in KINDS:
        rows = [next(data.stored_batches(kind, with_rows(), 24, seed)).row.tolist()
                for seed in (0, 0, 1)]
        assert rows[0] == rows[1] != rows[2], kind
    half = changed(with_rows(), pairs=with_rows().pairs[:24])    # so that steps are not missing
    assert len(next(data.stored_batches("pairs", half, 24, 0)).row) == 12
    stream = data.shuffled(torch.arange(10), 3, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len({*one}) == 9 for one in passes) and passes[0] != passes[1]
    assert len(next(data.shuffled(torch.arange(2), 5, torch.Generator()))) == 2     # no more there


def test_eq04_an_offset_is_estimated_from_its_own_prompts_scores_and_goes_to_its_responses():
    feedback, method = small().feedback, train.METHODS["una-score-estimated"]
    offsets = train.start_offsets(method, feedback, 0.5)
    batch = next(train.stored_batches(method, small(), 24, 0, offsets))
    for prompt, offset in zip(data.encode_prompts(data.TRAIN_PROMPTS), offsets, strict=True):
        own, in_batch = ((of.tokens[:, :3] == prompt).all(1) for of in (feedback, batch))
        Z = (feedback.scores[own].double().logit() / 0.5).exp().mean()
        assert offset.item() == pytest.approx(0.5 * Z.log().item(), abs=1e-5)
        assert (batch.offset[in_batch] == offset).all() and in_batch.any()
    assert len(offsets.unique()) == 3


# ---------------------------------------------------------------- losses of stored feedback
def test_first_losses_are_what_theory_predicts():
    # At the start pi = pi_ref, so r_theta = 0, s_theta = 1/2.
    reference, feedback = small().reference, small().feedback
    rewards = data.reward(feedback.tokens[:, :3], feedback.tokens[:, 3:])
    for name, expected in {"una-pair": math.log(2), "dpo": math.log(2), "kto": 1 / 2,
                           "una-binary-bce": math.log(2), "una-binary-mse": 1 / 4}.items():
        batch = next(train.stored_batches(train.METHODS[name], small(), 96, 0, torch.zeros(3)))
        first = train.METHODS[name].loss(reference, batch, 0.25)
        assert near(first, torch.full_like(first, expected), 1e-6), name
    assert near(train.una_score(reference, feedback, 0.25), (0.5 - feedback.scores) ** 2, 1e-6)
    assert near(train.una_reward(reference, feedback, 0.25), rewards ** 2, 1e-5)


def test_una_mixed_is_the_three_losses_with_every_item_weighing_the_same():
    policy, feedback = moved(small().reference).double(), with_rows()
    (everything,), mixed = one_pass("mixed", 96), one_pass("mixed", 24)
    for batch in (everything, *mixed, *one_pass("mixed", 1)):    # these last lack two kinds
        items = []
        for loss, rows in ((train.una_pair, torch.cat([batch.chosen, batch.rejected])),
                           (train.una_binary_mse, batch.binary), (train.una_score, batch.scored)):
            if len(rows):
                items.append(loss(policy, data.take(feedback, batch.row[rows]), 0.25))
        assert near(train.una_mixed(policy, batch, 0.25), torch.cat(items))
        assert len(batch.row) < 24 or len(items) == 3
    whole = gradient_of(policy, train.una_mixed(policy, everything, 0.25).sum())
    for parts in (mixed, one_pass("mixed", 1)):                  # micro-batches add up to it
        in_parts = gradient_of(policy, sum(train.una_mixed(policy, batch, 0.25).sum()
                                           for batch in parts))
        assert all(near(a, b, 1e-10) for a, b in zip(whole, in_parts))


def gradient_of(model, loss):
    return torch.autograd.grad(loss, [*model.parameters()])


def test_kto_estimates_its_kl_from_the_responses_to_other_prompts():
    # This way round, as rho is then positive on the responses.
    policy, reference, feedback = small().reference, moved(small().reference), small().feedback
    matched = feedback.tokens, feedback.mask
    prompts, responses = feedback.tokens.split([3, 2], 1)        # x_i with y_{i-2}, by hand
    mismatched = torch.cat([prompts, responses.roll(2, 0)], 1), feedback.mask.roll(2, 0)
    own, other = (rho_of(policy, reference, *both) for both in (matched, mismatched))
    batch = train.with_mismatched_pairs(changed(
        feedback, ref_logprob=train.logprob_in_chunks(reference, *matched)), reference)
    expected, wrong = ((feedback.labels - torch.sigmoid(0.25 * (own - rho.mean().clamp(0)))).abs()
                       for rho in (other, own))
    assert near(train.kto(policy, batch, 0.25), expected, 1e-5) and not near(expected, wrong, 1e-4)
    for label in (0, 1):                                         # a single one; odd; one class
        for count in (1, 7):
            few = data.take(batch, (feedback.labels == label).nonzero().flatten()[:count])
            assert train.kto(moved(policy), few, 0.25).isfinite().sum() == count


# ---------------------------------------------------------------- fresh samples
def rho_of(policy, reference, tokens, mask):
    """log pi/pi_ref."""
    return (train.logprob(policy, tokens, mask) - train.logprob(reference, tokens, mask)).detach()


def test_fresh_batches_are_the_policys_samples_with_rewards_of_the_judge_or_of_the_model():
    policy, model = moved(small().reference), moved(ScalarGPT(small().reference), seed=2)
    x = data.encode_prompts(data.TRAIN_PROMPTS).repeat_interleave(8, 0)
    for judge in (None, model):
        shared, generator = changed(small(), reward_model=judge), torch.Generator().manual_seed(0)
        stream = train.fresh_batches(policy, "value", shared, 24, 0, level=1.0)
        for _ in range(2):
            batch, (y, mask) = next(stream), sample(policy, x, 2, data.EOT, generator)
            both = data.join(x, y, mask)
            assert torch.equal(batch.tokens, both[0]) and torch.equal(batch.mask, both[1])
            rewards = (train.model_reward(model, *both) if judge
                       else data.reward(x, y) + data.prompt_level(x, 1.0))
            assert torch.equal(batch.rewards, rewards) and not batch.rewards.requires_grad
            ref = train.logprob(small().reference, *both)
            assert near(batch.ref_logprob, ref, 1e-5) and near(batch.ref_logprobs.sum(1), ref, 1e-5)
            assert (batch.per_prompt, batch.offset, batch.value) == (8, 0, "value")


def leave_one_out(policy, batch, beta):
    """una_online, but with the mean residual of the prompt's other samples for its offset."""
    reward = train.implicit_reward(policy, batch, beta)
    residual = (batch.rewards - reward).detach().view(-1, batch.per_prompt)
    others = (residual.sum(1, keepdim=True) - residual) / (batch.per_prompt - 1)
    return una.una_reward_loss(reward + others.flatten(), batch.rewards)


def test_eq07_online_the_own_mean_has_n_minus_1_over_n_of_the_gradient_with_the_others():
    # Sample by sample, so in every batch: not only on average.
    policy, shared = moved(small().reference).double(), changed(
        small(), reference=copy.deepcopy(small().reference).double())
    for n in (2, 3, 8):
        batch = next(train.fresh_batches(policy, None, shared, 3 * n, 0, level=1.0))
        own, others = (gradient_of(policy, loss(policy, batch, 0.25).mean())
                       for loss in (train.una_online, leave_one_out))
        assert all(near(a, (n - 1) / n * b) for a, b in zip(own, others))
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
    own, others = (gradient(lambda policy: probability * loss(policy, batch, 0.4).view(-1, 2)
                            .mean(1), theta) for loss in (train.una_online, leave_one_out))
    J = gradient(lambda policy: una.rlhf_objective(policy.log_softmax(-1), ref, rewards, 0.4),
                 theta)
    assert near(others, -2 * 0.4 * J) and near(own, -0.4 * J) and J.abs().max() > 0.01


def test_eq09_online_regresses_scores():
    policy = moved(small().reference)
    batch = next(train.fresh_batches(policy, None, small(), 24, 0))
    rho = rho_of(policy, small().reference, batch.tokens, batch.mask)
    expected = (torch.sigmoid(0.25 * rho) - torch.sigmoid(batch.rewards)) ** 2
    assert near(train.una_online_score(policy, batch, 0.25), expected, 1e-6)


def test_the_real_loop_reaches_the_closed_form_optimum_in_a_world_of_15_responses(monkeypatch):
    # {a, b, end}, three tokens, two prompts, float64: GPT, loss and loop, with another language.
    rewards = [1.0, -0.5, 0.3, 0.9, -1.2, 0.4, 0.0, 0.7, -0.3, 1.5, -0.8, 0.2, 0.6, -0.1, 1.1]
    responses, prompts = exact.all_responses(3, 3, 2)[0].tolist(), torch.tensor([[0, 1], [1, 1]])

    def reward(x, y):                                            # of b what is worst of a is best
        return torch.tensor([rewards[responses.index(response)] * (1 - 2 * mood)
                             for (mood, _), response in zip(x.tolist(), y.tolist())]).double()
    for name, value in dict(ENCODING=SimpleNamespace(n_vocab=3), MAX_TOKENS=3, PROMPT_TOKENS=2,
                            EOT=2, TRAIN_PROMPTS=["", ""], encode_prompts=lambda texts: prompts,
                            reward=reward).items():
        monkeypatch.setattr(data, name, value)
    torch.manual_seed(0)
    reference = GPT(GPTConfig(3, 5, 1, 2, 16)).double().requires_grad_(False)
    reference.wte.weight *= 10                   # tells its prompts apart, as a trained one does
    world = exact.World(reference, ["", ""], 0.5)
    shared = SimpleNamespace(reference=reference, reward_model=None)
    policy = copy.deepcopy(reference).requires_grad_(True)
    method = train.Method("fresh", train.una_online, 1e-2, 1)
    train.align(method, policy, train.fresh_batches(policy, None, shared, 128, 0), 0.5, 150)
    logprobs = exact.policy_logprobs(policy, world.prompts)
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.5)
    assert exact.evaluate(world, world.ref_logprobs)["regret"] > 0.2
    assert exact.evaluate(world, logprobs)["regret"] < 0.02
    assert (logprobs.exp() - best.exp()).abs().sum(1).max() / 2 < 0.1          # total variation


# ---------------------------------------------------------------- the loop
def test_una_pair_and_dpo_end_in_the_same_weights(tmp_path):
    for name in ("una-pair", "dpo"):
        run_one(name, tmp_path, steps=30)
    start = small().reference.state_dict()
    ends = [load(tmp_path / f"{name}-0.pt").state_dict() for name in ("una-pair", "dpo")]
    assert max((ends[0][name] - ends[1][name]).abs().max().item() for name in start) <= 1e-6
    assert max((ends[0][name] - start[name]).abs().max().item() for name in start) > 1e-3


def test_the_reference_never_changes_the_policy_does_and_fresh_samples_are_the_policys(
        tmp_path, monkeypatch):
    reference, world, seen = small().reference, small().worlds["train"], []
    monkeypatch.setattr(train, "sample", lambda model, *rest: (
        seen.append(model.wte.weight.clone()), sample(model, *rest))[1])
    before = copy.deepcopy(reference.state_dict())
    for name in train.METHODS:
        seen.clear()
        entry, policy = run_one(name, tmp_path, steps=2), load(tmp_path / f"{name}-0.pt")
        for key, weight in reference.state_dict().items():
            assert torch.equal(weight, before[key]), (name, key)
        assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
        assert not torch.equal(policy.wte.weight, reference.wte.weight), name
        assert entry["train"] == exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
        if name in FRESH:                                        # the second batch; the examples
            assert len(seen) == 3 and not torch.equal(seen[1], reference.wte.weight), name
        assert torch.equal(seen[-1], policy.wte.weight), name


def test_align_looks_after_the_steps_in_at_and_on_its_own_time(monkeypatch):
    now, losses, seen = [0.0], [], []

    def loss(*arguments):
        now[0] += 1
        value = train.ppo(*arguments)
        losses.append(value.mean().item())
        return value

    def look(step, seconds, last_loss):
        now[0] += 100
        seen.append((step, seconds, last_loss, policy.wte.weight.clone()))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    policy, value = moved(small().reference), ScalarGPT(small().reference)
    method = train.METHODS["ppo"]._replace(epochs=2, loss=loss)  # a loss for each inner step
    batches = itertools.islice(train.fresh_batches(policy, value, small(), 24, 0), 5)   # no more
    entry = train.align(method, policy, batches, 0.25, 5, value, None, look, {1, 4, 5})
    steps, seconds, told, weights = zip(*seen)
    assert steps == (1, 4, 5) and seconds == (2.0, 8.0, 10.0) and entry["seconds"] == 10.0
    assert len(losses) == 10 and told == (losses[1], losses[7], losses[9])
    assert (entry["start_loss"], entry["loss"]) == (losses[0], losses[-1])
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[2], policy.wte.weight)


def test_state_bytes_count_every_model_in_memory():
    # Adam: a weight, a gradient and two moments of 4 bytes for each parameter, and a step count
    # for each tensor. PPO trains a value model of the same size and a scalar head.
    sizes = [p.numel() for p in small().reference.parameters()]
    policy, frozen, head = 16 * sum(sizes) + 4 * len(sizes), 4 * sum(sizes), 16 + 1
    shared = changed(small(), reward_model=ScalarGPT(small().reference).requires_grad_(False))
    for name, of, expected in (
            ("una-score", small(), policy), ("una-score-learned", small(), policy + 16 * 3 + 4),
            ("una-online", small(), policy + frozen),            # the reference as well
            ("una-online", shared, policy + 2 * frozen + 4 * head),
            ("ppo", shared, 2 * policy + 16 * head + 8 + 2 * frozen + 4 * head)):
        assert run_one(name, shared=of, steps=1)["state_bytes"] == expected, name


def test_online_methods_have_a_curve_and_methods_of_stored_feedback_an_end():
    for name, steps in (("una-score", [0, 40]), ("una-online", [0, 10, 20, 40])):
        entry = run_one(name, steps=40)
        first, *_, last = curve = entry["curve"]
        assert [point["step"] for point in curve] == steps and first == train.point(
            0, 0.0, small().start)
        assert last == train.point(40, entry["seconds"], entry["train"], loss=entry["loss"])
        assert len({point["regret"] for point in curve}) == len(curve)


# ---------------------------------------------------------------- the optimiser's step
def test_learning_rate_climbs_then_falls_to_zero_but_never_is():
    rates, weight = [], torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(1, 101):
        train.descend(optimizer, weight.sum(), 2.0, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2 * min(step / 5, 1) * (1 - (step - 1) / 100)
                                   for step in range(1, 101)])


def test_groups_of_parameters_keep_their_multiples_of_the_rate_and_share_one_norm():
    for scale, cut in ((1.0, 0.2), (0.1, 1.0)):                  # a short gradient is left alone
        weight, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([dict(params=[weight]), dict(params=[other], times=10)], lr=0.0)
        for step in (1, 2):
            loss = scale * (3 * weight.sum() - 4 * other.sum())
            train.descend(optimizer, loss, 0.5, step, 2)
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([0.5 / step, 5.0 / step])
            slopes = weight.grad.item(), other.grad.item()
            assert slopes == pytest.approx((3 * scale * cut, -4 * scale * cut), rel=1e-4)
        assert weight.item() == pytest.approx(-3 * scale * cut * 0.75, rel=1e-4)
        assert other.item() == pytest.approx(4 * scale * cut * 7.5, rel=1e-4)


def test_what_is_no_number_stops_the_run_before_it_touches_the_weights():
    # The slope of sqrt is infinite at 0, and cut to norm 1 inf would be NaN.
    for start, loss, told in ((1.0, lambda w: w * math.nan, "the loss is nan"),
                              (1.0, lambda w: w * math.inf, "the loss is inf"),
                              (0.0, lambda w: w.sqrt(), "the gradient's norm is inf"),
                              (1.0, lambda w: ((w - 1) ** 2).sqrt(), "the gradient's norm is nan")):
        weight = torch.nn.Parameter(torch.tensor(start))
        with pytest.raises(FloatingPointError, match=f"{told}, at step 3 of 10"):
            train.descend(torch.optim.SGD([weight], lr=1.0), loss(weight), 1.0, 3, 10)
        assert weight.item() == start


# ---------------------------------------------------------------- a whole run
def test_results_hold_what_is_promised(tiny):
    (start,), (best,) = tiny.results["reference"], tiny.results["optimum"]
    runs = {entry["method"]: entry for entry in tiny.results["runs"]}
    assert tiny.status == 0 and [*runs] == [*train.METHODS]
    assert start["train"]["kl"] == 0 < best["train"]["kl"] <= best["frontier"][-1][0]
    for name, entry in runs.items():
        beta = 0.25 * train.METHODS[name].beta_multiple
        assert (entry["beta"], entry["method_beta"]) == (0.25, beta) and entry["seconds"] > 0
        for split in ("train", "heldout"):
            assert entry[split]["optimum"] == start[split]["optimum"] >= entry[split]["objective"]
            assert entry[split]["reward"] <= entry[split]["frontier_reward"] + 1e-5
        assert entry["curve"][0]["objective"] == start["train"]["objective"]
        assert ("chosen_reward" in entry) == ("offsets" in entry) == (name in STORED)
        assert figures.line(entry) in tiny.err
    assert figures.report(tiny.results) in tiny.out and "\r" not in tiny.err
    files = {path.name for path in tiny.folder.iterdir()}        # and three pictures
    assert files > {"results.json", "reference-1.pt", *(f"{name}-1.pt" for name in runs)}
    assert len(files) == len(runs) + 2 + 3


def test_saved_weights_give_the_reported_figures_again(tiny):
    reference, dpo = (load(tiny.folder / f"{name}-1.pt") for name in ("reference", "dpo"))
    entry = next(entry for entry in tiny.results["runs"] if entry["method"] == "dpo")
    for split, prompts in (("train", data.TRAIN_PROMPTS), ("heldout", data.HELDOUT_PROMPTS)):
        world = exact.World(reference, prompts, 0.25)
        end = exact.evaluate(world, exact.policy_logprobs(dpo, world.prompts))
        assert entry[split] == pytest.approx(end, abs=1e-9)
        start = exact.evaluate(world, world.ref_logprobs)
        assert tiny.results["reference"][0][split] == pytest.approx(start, abs=1e-9)
    feedback = train.collect_feedback(train.parse([*toy.FLAGS]), 1, reference)
    for key, rows in zip(("chosen_reward", "rejected_reward"), feedback.pairs.T):
        rho = rho_of(dpo, reference, feedback.tokens[rows], feedback.mask[rows])
        assert entry[key] == pytest.approx(0.25 * rho.mean().item(), abs=1e-6)


def test_same_seed_same_results_whatever_else_runs(tiny, short, tmp_path):
    _, again = short(tmp_path, "--seed 1 --seeds 2 --methods una-online,kto,una-mixed")
    expected = {entry["method"]: timeless(entry) for entry in tiny.results["runs"]}
    first, second = again["runs"][:3], again["runs"][3:]
    assert timeless(again["reference"][0]) == timeless(tiny.results["reference"][0])
    assert [entry["method"] for entry in second] == ["una-online", "kto", "una-mixed"]
    for one, other in zip(first, second):
        assert timeless(one) == expected[one["method"]]
        assert one["train"] != other["train"] and "dots" not in other


def test_a_level_is_in_all_but_preferences_and_a_reward_model_judges_fresh_samples_alone(
        tiny, short, tmp_path):
    before = {entry["method"]: entry["train"] for entry in tiny.results["runs"]}
    for flags, level, unmoved in (("--level 1", 1 / 3, ["dpo"]),              # 1/3 on average
                                  ("--reward model", 0, ["dpo", "una-score"])):
        _, results = short(tmp_path, f"--seed 1 --methods dpo,una-score,una-online-score {flags}")
        for entry in results["runs"]:
            now, then = entry["train"], before[entry["method"]]
            assert now["optimum"] - then["optimum"] == pytest.approx(level, abs=1e-9)
            same = now["regret"] == pytest.approx(then["regret"], abs=1e-9)
            assert same == (entry["method"] in unmoved), (flags, entry["method"])


def test_at_either_end_of_beta_a_run_ends_in_numbers(short, tmp_path):
    for beta in ("1e-4", "1e6"):
        status, results = short(tmp_path, f"--beta {beta} --methods una-score,una-online")
        possible = results["reference"][0]["train"]["regret"]
        assert status == 0 < possible
        assert all(entry["train"]["regret"] > -1e-6 * possible for entry in results["runs"])


def steep_loss(policy, batch, beta):
    """0, with a gradient whose squares are more than float32 holds."""
    reward = 1e30 * train.implicit_reward(policy, batch, beta)
    return reward - reward.detach()


def test_a_method_that_leaves_the_numbers_costs_a_line_the_status_and_nothing_else(
        short, tmp_path, capsys, monkeypatch):
    score, online = train.METHODS["una-score"], train.METHODS["una-online-score"]
    broken = {
        "kto": (score._replace(loss=lambda *of: train.una_score(*of) * math.nan), "loss is nan"),
        "una-pair": (score._replace(loss=steep_loss), "norm is inf, at step 1 of 3"),
        "una-score": (score._replace(learning_rate=1e39), ""),   # in the weights, soon everywhere
        "una-online-score": (online._replace(learning_rate=1e39), "probabilities are not numbers")}
    for name, (method, _) in broken.items():
        monkeypatch.setitem(train.METHODS, name, method)
    status, results = short(tmp_path, f"--methods dpo,{','.join(broken)},una-online")
    out, err = capsys.readouterr()
    assert status == 1 and "Traceback" not in err
    assert [entry["method"] for entry in results["runs"]] == ["dpo", *broken, "una-online"]
    for entry in results["runs"]:
        name, why = entry["method"], entry.get("diverged", "")
        (line,) = [line for line in err.splitlines() if f"| {name} " in line]
        assert (tmp_path / f"{name}-0.pt").exists() == ("train" in entry) == (name not in broken)
        if name in broken:
            assert broken[name][1] in why and f"diverged: {why}" in line
            assert not {"heldout", "curve", "samples"} & {*entry}
            assert re.search(f"^{name} +1 of 1 diverged$", out, re.M)


def test_what_has_ended_is_on_disk_whole_before_a_word_is_said_of_it_and_after_ctrl_c(
        short, tmp_path, monkeypatch):
    seen = []

    def say(text, *_):
        results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        ended = [entry["method"] for key in ("reference", "runs") for entry in results[key]]
        seen.append((ended, text))
        for name in ended:
            load(tmp_path / f"{name}-0.pt")

    def interrupted(*_):
        raise KeyboardInterrupt
    method = train.METHODS["una-pair"]._replace(loss=interrupted)
    monkeypatch.setitem(train.METHODS, "una-pair", method)
    monkeypatch.setattr(run, "say", say)
    status, _ = short(tmp_path, "--methods una-binary-mse,una-pair,una-score,dpo")
    ended, texts = zip(*seen)
    assert status == 130 and ended == (["reference"], ["reference", "dpo"], *[
        ["reference", "una-score", "dpo"]] * 2)
    assert "interrupted. 2 runs" in texts[-1] and str(tmp_path / "results.json") in texts[-1]
    assert len([*tmp_path.iterdir()]) == 4


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize("arguments, told", [
    ("--methods dpo,una-pear", "una-pear"), ("--beta nan", "--beta"), ("--steps 1.5", "--steps"),
    ("--batch 100 --methods dpo,ppo", "ppo"), ("--judged 25", "--judged"),
    ("--n-embd 10 --n-head 4", "--n-embd"), ("--quic", "--quic"), ("--out file", "file"),
    ("--out file/below", "file/below")])
def test_bad_input_is_one_line_and_status_2(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", encoding="utf-8")
    try:
        status = train.main(["--out", "new", *arguments.split()])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and told in err and err.count("\n") == 1
    assert err.startswith("train.py: ") and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(["--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and not err
    assert all(f"--{name.replace('_', '-')} " in out for name in vars(train.parse([])))


def test_every_response_is_judged_that_a_run_sees_unless_a_number_says_otherwise():
    for flags, judged in {"": 76_800, "--judged 4096": 4096, "--steps 1 --batch 6": 24,
                          "--steps 3 --batch 31 --methods dpo,kto": 92,              # in pairs
                          "--quick": 60 * 192, "--quick --steps 10": 1920}.items():
        assert train.parse(flags.split()).judged == judged, flags
    assert train.parse([]).methods == [*train.METHODS] and train.parse(["--quick"]).n_embd == 32


def test_imports_run_one_way():
    own = re.compile(r"^(?:from|import) ((?:data|una|model|train|lab)(?: |$|\.\w+))", re.M)
    for path, expected in {"una": "", "model": "", "data": "", "lab/run": "",
                           "lab/exact": "data una", "lab/figures": "lab.run",
                           "train": "data una lab model"}.items():
        imported = own.findall((ROOT / f"{path}.py").read_text(encoding="utf-8"))
        assert " ".join(imported).split() == expected.split(), path


# ---------------------------------------------------------------- words and files
def closed_pipe():
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def test_say_and_show_never_raise_and_progress_is_for_terminals_alone(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    class Full(Terminal):
        def write(self, text):
            raise OSError("no space left on device")

    def speak(stderr):
        monkeypatch.setattr(sys, "stderr", stderr)
        run.show("x" * 100)
        run.say("it has ended")
    monkeypatch.setenv("COLUMNS", "40")
    speak(sys.stderr)
    assert capsys.readouterr() == ("", "it has ended\n")
    speak(terminal := Terminal())
    assert terminal.getvalue() == "\r\033[K" + "x" * 39 + "\r\033[Kit has ended\n"
    speak(None)                                                  # it was closed from the start
    speak(Full())
    with closed_pipe() as pipe:                                  # whose end does not raise either
        speak(pipe)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def fail(partial):
        Path(partial).write_text("half", encoding="utf-8")
        raise RuntimeError
    content = dict(a=[1, dict(b=2)], c={})
    run.write_json(tmp_path / "a.json", content)
    with pytest.raises(RuntimeError):
        run.save(tmp_path / "a.json", fail)
    for value in (math.nan, math.inf):                           # what JSON does not know
        with pytest.raises(ValueError):
            run.write_json(tmp_path / "a.json", dict(a=[value]))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# ---------------------------------------------------------------- processes
def test_two_processes_give_the_figures_of_one_and_a_closed_pipe_costs_nothing(
        tiny, short, tmp_path, monkeypatch):
    side_by_side, jobs = run.side_by_side, []

    def in_language(calls, processes):
        jobs.append(processes)
        calls = [(toy.in_language, *call) for call in calls]
        for (_, *call), result in side_by_side(calls, processes):
            yield call, result
    monkeypatch.setattr(run, "side_by_side", in_language)
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        status, results = short(tmp_path, "--jobs 2 --seed 1 --methods una-score,una-online")
    assert status == 0 and jobs == [2, 2]
    expected = {entry["method"]: timeless(entry) for entry in tiny.results["runs"]}
    for entry, name in zip(results["runs"], ("una-score", "una-online"), strict=True):
        assert timeless(entry) == expected[name]


# As train.main, but without torch, which takes seconds to import: the first call ends at once,
# in its own way, and the other two would take a minute. Each process says whether Ctrl-C is nothing
# to it from its first moment.
CALLS = """
import os, signal, sys, time
if __name__ == "__mp_main__":
    deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    sys.stderr.write("deaf\\n" if deaf else "not deaf\\n")
from lab import run

def call(n, way):
    if n:
        time.sleep(60)
    if way == "fail":
        raise ZeroDivisionError
    if way == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return n

if __name__ == "__main__":
    try:
        for call, n in run.side_by_side([(call, n, sys.argv[1]) for n in range(3)], 2):
            run.write_json("results.json", dict(runs=[n]))
            sys.stderr.write("written\\n")
    except KeyboardInterrupt:
        run.say("interrupted")
        sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="these are the signals of Unix")
@pytest.mark.parametrize("way, status, told", [
    ("Ctrl-C", 130, "interrupted"), ("killed", -9, ""), ("fail", 1, "ZeroDivisionError"),
    ("die", 1, "a process was ended by the system")])
def test_no_process_is_left_however_the_run_ends(way, status, told, tmp_path, odd_environment):
    (tmp_path / "torch.py").write_text("def set_num_threads(n): pass\n", encoding="utf-8")
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "calls.py", way], cwd=tmp_path, bufsize=0, stderr=subprocess.PIPE,
        env=odd_environment(dict(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")),
        start_new_session=True)
    alarm = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    err = ""
    if way in ("Ctrl-C", "killed"):
        while not ("written" in err and err.count("deaf") == 2):
            assert (line := process.stderr.readline().decode()), err
            err += line
        if way == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)                # to all, as a terminal does
        else:
            process.kill()                                       # the parent alone
    began = time.monotonic()
    # Its end means that no process is left that could write there.
    err += process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == status and told in err and time.monotonic() - began < 30
    alarm.cancel()
    assert "not deaf" not in err and ("Traceback" in err) == (way == "fail")
    if way in ("Ctrl-C", "killed"):
        assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == dict(runs=[0])
