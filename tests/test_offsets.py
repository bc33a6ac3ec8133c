"""f(x) + c of a method, one number a prompt, and the level that makes prompts differ.

Zero, estimated or learned: what each starts with, who gets it, what becomes of it, and what a mean
residual in its place does.
"""
import copy
import functools
import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
import train
import una
from helpers import close, gradient, near, normals
from lab import variants
from short_train import moved, small

STORED = [name for name, method in train.METHODS.items() if method.feedback != "fresh"]
WITH_OFFSET = ("una-binary-offset", "una-score-offset", "una-reward-offset")


def grammatical(model, prompts, max_tokens, eot, generator):
    """In sample's place, as small's reference has hardly learned the grammar: two adjectives and a
    noun, and no word at all of each fifth response."""
    rng, texts = random.Random(0), []
    for i in range(len(prompts)):
        words = [*rng.choices([*data.ADJECTIVES], k=2), rng.choice(data.NOUNS)]
        texts.append("".join(f" {word}" for word in words) if i % 5 else "")
    return data.encode_responses(texts)


@functools.cache
def at_level(level):
    """What small shares, with feedback at a level on other responses. Change nothing of it."""
    shared = small()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample", grammatical)
        feedback = train.collect_feedback(replace(shared.settings, level=level), 0,
                                          shared.reference)
    return SimpleNamespace(**vars(shared) | dict(feedback=feedback))


def everything(level=1.0):
    """All feedback in one batch, with f = c = 0."""
    feedback = at_level(level).feedback
    return data.take(feedback, torch.arange(len(feedback.tokens)))


def numbers(batch):
    """Of each response: the place of its prompt, read as words, among the training prompts."""
    return [data.TRAIN_PROMPTS.index(data.ENCODING.decode(row[:data.PROMPT_TOKENS].tolist()))
            for row in batch.tokens]


def rewards(batch, level=1.0):
    """The judge's, with the level of each noun."""
    prompts, responses = batch.tokens.split([data.PROMPT_TOKENS, data.MAX_TOKENS], dim=1)
    levels = [level * data.LEVELS[data.TRAIN_PROMPTS[i].split()[1]] for i in numbers(batch)]
    return data.reward(prompts, responses) + torch.tensor(levels)


def estimates(batch, beta):
    """beta log mean e^{r/beta} of each training prompt, response by response."""
    own = [[] for _ in data.TRAIN_PROMPTS]
    for i, reward in zip(numbers(batch), rewards(batch).tolist()):
        own[i].append(reward)
    return [beta * math.log(sum(math.exp(r / beta) for r in group) / len(group)) for group in own]


def rho_of(policy, batch):
    """log pi/pi_ref of each response, with no prompt shared."""
    logprobs = [una.sequence_logprob(model(batch.tokens), batch.tokens, batch.mask)
                for model in (policy, small().reference)]
    return logprobs[0] - logprobs[1]


def batches(name, offsets, shared=None, size=96):
    settings = replace(small().settings, batch=size)
    return train.batches_for(train.METHODS[name], None, None, shared or at_level(1.0), settings, 0,
                             offsets)


class Keep:
    """An observer that keeps the weights, and looks at nothing."""

    def __init__(self, *_):
        pass

    def __call__(self, step, seconds, loss, policy):
        self.weights = copy.deepcopy(policy.state_dict())

    def report(self):
        return dict(weights=self.weights)


def run_one(name, level=1.0, method=None, offsets=None, steps=3):
    """run_method's entry, with the weights at its end."""
    settings = replace(small().settings, level=level, steps=steps)
    return train.run_method(settings, 0, name, at_level(level), method, Keep, offsets)["runs"]


# ---------------------------------------------------------------- where an offset begins
@pytest.mark.parametrize("name", STORED)
def test_an_offset_is_one_number_a_prompt_and_0_unless_it_is_estimated(name):
    method = train.METHODS[name]
    offsets = train.start_offsets(method, at_level(1.0).feedback, 0.25)
    assert offsets.shape == (len(data.TRAIN_PROMPTS),) == (12,)
    assert offsets.any() == (method.offset == "estimated")
    assert offsets.requires_grad == (method.offset == "learned")
    assert (name in WITH_OFFSET) == (method.offset != "zero")


@pytest.mark.parametrize("beta", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("name", ["una-score-offset", "una-reward-offset"])
def test_eq04_an_estimated_offset_is_that_of_the_prompts_own_scored_rewards(name, beta):
    method, order = train.METHODS[name], torch.randperm(60, generator=torch.Generator())
    # In any order, and where the prompts have 6 responses or 4.
    for batch in (everything(), data.take(at_level(1.0).feedback, order)):
        expected = estimates(batch, beta)
        offsets = train.start_offsets(method, batch, beta)
        assert offsets.tolist() == pytest.approx(expected, abs=1e-4)
        assert len({round(value, 3) for value in expected}) == 12     # no two prompts are alike
    assert torch.bincount(torch.tensor(numbers(batch))).tolist() == [6] * 6 + [4] * 6


def test_eq04_an_offset_is_estimated_at_the_losses_beta_and_not_at_the_tasks():
    batch = everything()
    for multiple in (1, 6):
        method = train.METHODS["una-score-offset"]._replace(beta=multiple)
        entry = run_one("una-score-offset", method=method, steps=1)
        assert entry["method_beta"] == 0.25 * multiple
        assert entry["offsets"] == pytest.approx(estimates(batch, 0.25 * multiple), abs=1e-4)
    assert entry["offsets"] != pytest.approx(estimates(batch, 0.25), abs=0.1)


# ---------------------------------------------------------------- who gets it
@pytest.mark.parametrize("name", ["una-pair", "una-binary-offset", "una-score-offset", "una-mixed"])
def test_each_response_has_the_number_of_its_own_prompt(name):
    shared, table = at_level(1.0), torch.linspace(-3, 3, 12)
    for batch in itertools.islice(batches(name, table, size=24), 5):
        assert torch.equal(batch.offset, table[numbers(batch)])
    assert not shared.feedback.offset.any()                      # what is shared stays as it was
    (batch,) = itertools.islice(batches(name, None), 1)
    assert torch.equal(batch.offset, torch.zeros(len(batch.tokens)))


def test_fresh_samples_have_no_offset():
    policy = moved(small().reference)
    (batch,) = itertools.islice(train.fresh_batches(policy, None, small(), 24, 0), 1)
    assert batch.offset == 0


def test_offsets_that_are_given_stand_in_for_the_methods_own_and_are_reported():
    table, seen = torch.linspace(-3, 3, 12), []

    def recorded(policy, batch, beta):
        seen.append(torch.equal(batch.offset, table[numbers(batch)]))
        return train.una_score(policy, batch, beta)
    for offset in ("estimated", "exact"):                        # exact: one of lab/variants.py's
        method = train.METHODS["una-score-offset"]._replace(loss=recorded, offset=offset)
        entry = run_one("una-score-offset", method=method, offsets=table)
        assert entry["offsets"] == table.tolist()
    assert seen == [True] * 6


def test_offsets_are_reported_of_methods_that_have_some():
    for name in ("una-score", "una-pair", "una-online"):
        assert "offsets" not in run_one(name, steps=1)
    for name in WITH_OFFSET:
        assert len(run_one(name, steps=1)["offsets"]) == 12


# ---------------------------------------------------------------- the losses, written out
def written_out(name, batch, logit):
    """The loss of each response whose implicit reward is logit."""
    s = 1 / (1 + torch.exp(-logit))
    return {"una-score-offset": (s - torch.sigmoid(rewards(batch))) ** 2,
            "una-reward-offset": (rewards(batch) - logit) ** 2,
            "una-binary-offset": -torch.where(batch.labels == 1, s, 1 - s).log()}[name]


@pytest.mark.parametrize("beta", [0.25, 1.0])
@pytest.mark.parametrize("name", WITH_OFFSET)
def test_eq07_eq12_eq13_with_an_offset_are_the_losses_written_out(name, beta):
    policy, method = moved(small().reference, 0.2), train.METHODS[name]
    offsets = torch.linspace(-1, 2, 12)                          # to be learned: any numbers
    if method.offset == "estimated":
        offsets = train.start_offsets(method, at_level(1.0).feedback, beta)
    (batch,) = itertools.islice(batches(name, offsets), 1)
    rho = rho_of(policy, batch)
    table = torch.tensor(estimates(batch, beta)) if method.offset == "estimated" else offsets
    own, others = table[numbers(batch)], table.roll(1)[numbers(batch)]
    value = method.loss(policy, batch, beta)
    assert value.shape == (96,)
    assert torch.allclose(value, written_out(name, batch, beta * rho + own), atol=1e-4)
    for wrong in (beta * rho, beta * rho + others, beta * rho - own, 2 * beta * rho + own):
        assert not torch.allclose(value, written_out(name, batch, wrong), atol=1e-2)


def optimal_here(policy, level):
    """All feedback in float64, with scores of rewards whose optimum the policy is.

    Those are beta rho + f(x), for any f: their beta log Z(x) is f(x) itself, by Eq. 18.
    """
    batch = everything()
    reference = copy.deepcopy(small().reference).double()
    batch.ref_logprob = train.logprob_in_chunks(reference, batch.tokens, batch.mask)
    rho = train.logprob_in_chunks(policy, batch.tokens, batch.mask) - batch.ref_logprob
    batch.offset = level[numbers(batch)]
    batch.scores = torch.sigmoid(0.25 * rho + batch.offset)
    return batch


def mean_loss(name, policy, batch):
    """Of labels, the mean over them: 1 has the chance that the score is."""
    if name != "una-binary-offset":
        return train.METHODS[name].loss(policy, batch, 0.25)
    up, down = (train.una_binary_bce(policy, SimpleNamespace(
        **vars(batch) | dict(labels=torch.full_like(batch.labels, label))), 0.25)
        for label in (1, 0))
    return batch.scores * up + (1 - batch.scores) * down


@pytest.mark.parametrize("name", WITH_OFFSET)
def test_eq18_at_the_optimum_stored_feedback_pulls_at_nothing_if_the_offset_is_exact(name):
    policy = moved(small().reference, 0.2).double()
    batch = optimal_here(policy, torch.linspace(-1, 2, 12).double())

    def steepest():
        slopes = torch.autograd.grad(mean_loss(name, policy, batch).mean(), [*policy.parameters()])
        return max(slope.abs().max().item() for slope in slopes)
    assert steepest() < 1e-12
    for wrong in (batch.offset.mean(), 0.0):                     # one constant for all, or none
        batch.offset = wrong
        assert steepest() > 1e-3


# ---------------------------------------------------------------- an offset that is learned
def test_a_learned_offset_is_pulled_by_the_responses_to_its_own_prompt_alone():
    # d bce / d logit = s - label, and the loss is the mean of all.
    policy, table = moved(small().reference, 0.2), torch.linspace(-1, 2, 12).requires_grad_()
    some = data.take(at_level(1.0).feedback, torch.arange(6, 40))
    some.pairs = at_level(1.0).feedback.pairs[:0]
    shared = SimpleNamespace(feedback=some)
    (batch,) = itertools.islice(batches("una-binary-offset", table, shared, size=34), 1)
    train.una_binary_bce(policy, batch, 0.25).mean().backward()
    with torch.no_grad():
        logit = 0.25 * rho_of(policy, batch) + table[numbers(batch)]
        pulls = (torch.sigmoid(logit) - batch.labels) / 34
    expected = [sum(pull for pull, i in zip(pulls.tolist(), numbers(batch)) if i == prompt)
                for prompt in range(12)]
    assert table.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert max(map(abs, expected)) > 0.01 and len(set(numbers(batch))) == 12
    few = data.take(batch, torch.tensor([i in (2, 9) for i in numbers(batch)]))
    few.offset, table.grad = table[few.prompt], None
    train.una_binary_bce(policy, few, 0.25).mean().backward()
    assert table.grad.nonzero().flatten().tolist() == [2, 9]


def one_step(name, offsets):
    """align's entry after a step on all feedback, and how far the weights went."""
    policy, method = copy.deepcopy(small().reference).requires_grad_(True), train.METHODS[name]
    entry = train.align(method, policy, batches(name, offsets), 0.25, 1, offsets=offsets)
    start = small().reference.state_dict()
    return entry, {key: weight - start[key] for key, weight in policy.state_dict().items()}


def test_a_learned_offset_has_offset_times_the_learning_rate_of_the_weights():
    # Adam's first step is the learning rate, against the gradient's sign.
    method, batch = train.METHODS["una-binary-offset"], everything()
    offsets = train.start_offsets(method, batch, 0.25)
    _, weights = one_step("una-binary-offset", offsets)
    up = [sum(0.5 - label for label, i in zip(batch.labels.tolist(), numbers(batch)) if i == own)
          for own in range(12)]
    assert sum(pull != 0 for pull in up) > 6
    rate = method.learning_rate
    for offset, pull in zip(offsets.tolist(), up):
        if pull:
            expected = -math.copysign(train.OFFSET_TIMES * rate, pull)
            assert offset == pytest.approx(expected, rel=1e-4)
    farthest = max(step.abs().max().item() for step in weights.values())
    assert farthest == pytest.approx(rate, rel=1e-3) and train.OFFSET_TIMES > 1


def test_a_learned_offset_is_in_the_bytes_of_the_training_state_and_no_other_is():
    # A number, its gradient and two moments of 4 bytes for each prompt, and a step count.
    sizes = {name: run_one(name, steps=1)["state_bytes"]
             for name in ("una-binary-bce", "una-score", *WITH_OFFSET)}
    assert sizes["una-binary-offset"] == sizes["una-binary-bce"] + 16 * 12 + 4
    assert sizes["una-score-offset"] == sizes["una-reward-offset"] == sizes["una-score"]


def test_an_estimated_offset_never_moves_and_a_learned_one_does():
    for name in ("una-score-offset", "una-reward-offset"):
        method = train.METHODS[name]
        beta = 0.25 * method.beta
        start = train.start_offsets(method, at_level(1.0).feedback, beta)
        assert run_one(name, steps=4)["offsets"] == start.tolist()
        _, weights = one_step(name, start.clone())
        assert max(step.abs().max() for step in weights.values()) > 0
    learned = [run_one("una-binary-offset", steps=steps)["offsets"] for steps in (1, 4)]
    assert all(a != b != 0 for a, b in zip(*learned))


# ---------------------------------------------------------------- the level of a prompt
@pytest.mark.parametrize("name, differs", [
    ("dpo", False), ("una-pair", False), ("una-score", True), ("una-binary-bce", True)])
def test_a_run_on_pairs_knows_no_level_to_the_last_bit_and_other_feedback_has_it(name, differs):
    flat, raised = (run_one(name, level)["weights"] for level in (0.0, 1.0))
    equal = [torch.equal(flat[key], raised[key]) for key in flat]
    assert any(equal) != differs and all(equal) != differs
    assert not torch.equal(flat["wte.weight"], small().reference.wte.weight)


def test_a_level_is_in_the_rewards_of_fresh_samples_and_una_onlines_baseline_takes_it_out():
    policy, slopes, seen = moved(small().reference), {}, {}
    for level in (0.0, 1.0):
        (batch,) = itertools.islice(
            train.fresh_batches(policy, None, small(), 48, 0, level), 1)
        seen[level] = batch
        assert torch.allclose(batch.rewards, rewards(batch, level))
        for name in ("una-online", "una-online-score"):
            loss = train.METHODS[name].loss(policy, batch, 0.25).mean()
            slopes[name, level] = torch.cat([slope.flatten() for slope in torch.autograd.grad(
                loss, [*policy.parameters()])])
    assert torch.equal(seen[0.0].tokens, seen[1.0].tokens)
    assert not torch.allclose(seen[0.0].rewards, seen[1.0].rewards, atol=0.3)
    assert torch.allclose(slopes["una-online", 0.0], slopes["una-online", 1.0], atol=1e-5)
    assert not torch.allclose(slopes["una-online-score", 0.0], slopes["una-online-score", 1.0],
                              atol=1e-3)


@pytest.mark.parametrize("name", ["una-online-score", "ppo"])
def test_the_settings_level_reaches_the_runs_of_fresh_samples(name):
    flat, raised = (run_one(name, level)["weights"] for level in (0.0, 1.0))
    assert not torch.equal(flat["wte.weight"], raised["wte.weight"])


# ---------------------------------------------------------------- the mean residual in its place
PROMPT = torch.tensor([0, 1, 2, 0, 2, 2, 1, 0, 2, 2])


@pytest.fixture
def scored(monkeypatch):
    """Ten responses to three prompts, in place of a policy their implicit rewards, and scores."""
    monkeypatch.setattr(train, "implicit_reward", lambda reward, batch, beta: reward)
    normal = normals(1)
    return 2 * normal(10), SimpleNamespace(prompt=PROMPT, scores=torch.sigmoid(2 * normal(10)))


def pulls(loss, scored, **options):
    """dL/dr of each response."""
    reward, batch = scored
    return gradient(lambda r: loss(r, batch, 0.25, **options), reward)


def by_prompt(values):
    return torch.zeros(3).double().index_add(0, PROMPT, values)


def held_reward_residual(reward, batch, beta):
    """Eq. 7 with the mean residual as a constant."""
    offset = variants.mean_residual(reward, batch).detach()
    return una.una_reward_loss(reward + offset, batch.scores.logit())


def test_a_held_mean_residual_leaves_a_push_on_all_responses_alike_only_after_the_sigmoid(scored):
    held = by_prompt(pulls(variants.una_score_residual, scored, held=True))
    flowing = by_prompt(pulls(variants.una_score_residual, scored))
    assert held.abs().min() > 1e-3
    assert near(flowing, torch.zeros(3).double())
    for loss in (variants.una_reward_residual, held_reward_residual):
        assert near(by_prompt(pulls(loss, scored)), torch.zeros(3).double())


def test_on_rewards_the_mean_residual_may_be_held_and_after_the_sigmoid_it_may_not(scored):
    # The residuals less their mean add up to 0: through the mean there flows nothing. The slope of
    # sigma weighs each of them with another weight.
    by_hand = pulls(held_reward_residual, scored)
    assert near(pulls(variants.una_reward_residual, scored), by_hand)
    assert by_hand.abs().min() > 1e-3
    held, flowing = (pulls(variants.una_score_residual, scored, held=held)
                     for held in (True, False))
    assert not close(held, flowing, 1e-2)


def test_that_push_lowers_no_loss(scored):
    # What is added to all implicit rewards of a prompt goes out of its mean residual again.
    (reward, batch), normal = scored, normals(2)
    shift, other = normal(3)[PROMPT], normal(10)
    for loss in (variants.una_score_residual, variants.una_reward_residual,
                 functools.partial(variants.una_score_residual, held=True)):
        before = loss(reward, batch, 0.25)
        assert near(loss(reward + shift, batch, 0.25), before)
        assert not near(loss(reward + other, batch, 0.25), before, 0.05)
