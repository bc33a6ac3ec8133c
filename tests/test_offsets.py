"""f(x) + c of a method, one number a prompt, in prompts that a level makes differ: what each starts
with, who gets it, and by which path it gets there."""
import functools
import math

import pytest
import torch

import data
import train
import una
from helpers import close, gradient, moved, near
from toy import FLAGS

STORED = [name for name, method in train.METHODS.items() if method.feedback != "fresh"]
WITH_OFFSET = [name for name in STORED if name.endswith(("-estimated", "-learned"))]
ALONE = [name for name in WITH_OFFSET if "mixed" not in name]     # of one kind of feedback
pytestmark = pytest.mark.usefixtures("language")                 # of toy.py


def settings(steps=3, batch=48):
    return train.parse([*FLAGS, *f"--judged 46 --out= --level 1 --steps {steps} --batch {batch}"
                        .split()])


@functools.cache
def prepared():
    """What all runs of seed 0 share: 46 responses, 16, 16 and 14 to a prompt. Change none of it."""
    return train.prepare(settings(), 0)[0]


def everything():
    return data.take(prepared().feedback, torch.arange(46))


def own_scores(name, batch):
    """What a method knows of each training prompt: its scores, or labels; of mixed feedback the
    scores of the last third."""
    first = 28 if "mixed" in name else 0
    scores = batch.labels if "binary" in name else batch.scores
    return [scores[first:][batch.prompt[first:] == x].tolist() for x in range(3)]


def logit(score):
    return math.log(score / (1 - score))


def estimates(batch, beta, name="una-score-estimated"):
    """beta log mean e^{r/beta} of each training prompt, response by response."""
    return [beta * math.log(sum(math.exp(logit(s) / beta) for s in group) / len(group))
            for group in own_scores(name, batch)]


def balances(batch, name):
    return [logit(sum(group) / len(group)) for group in own_scores(name, batch)]


def run(name, steps=3, first=None):
    """A run's policy and its f(x) + c at the end, which has another value at first, if given."""
    its = train.METHODS[name]
    policy, stream, value, offsets = train.begin(its, settings(steps), 0, prepared())
    if first is not None:
        offsets.detach().fill_(first)
    train.align(its, policy, stream, 0.25 * its.beta_multiple, steps, value, offsets)
    return policy, offsets


@pytest.mark.parametrize("name", STORED)
def test_eq04_an_offset_is_one_number_a_prompt_0_or_estimated_or_learned(name):
    method, batch = train.METHODS[name], everything()
    assert method.offset == (name.split("-")[-1] if name in WITH_OFFSET else "zero")
    for beta in (0.25, 1.0):
        offsets = train.start_offsets(method, batch, beta)
        expected = (estimates(batch, beta, name) if method.offset == "estimated" else
                    balances(batch, name) if method.offset == "learned" else [0, 0, 0])
        assert offsets.tolist() == pytest.approx(expected, abs=1e-4)
        assert offsets.requires_grad == (method.offset == "learned")
        # No two prompts are alike; and of mixed feedback not all scores are known.
        assert len({round(value, 2) for value in expected}) == (1 if method.offset == "zero" else 3)
        if method.offset == "estimated":
            assert (expected != estimates(batch, beta)) == ("mixed" in name)


@pytest.mark.parametrize("name", ["una-binary-bce", "una-score"])
def test_where_an_offset_is_balanced_the_loss_moves_no_prompts_responses_all_alike(name):
    # dL/drho of the squared loss is 2 beta (s - s_phi) s (1 - s), of bce beta (s - label).
    method, batch = train.METHODS[name], everything()
    balanced = train.start_offsets(method._replace(offset="balanced"), batch)
    assert balanced.tolist() == pytest.approx(balances(batch, name), abs=1e-4)
    loss = (lambda reward: una.una_binary_loss(reward, batch.labels, "bce") if "binary" in name
            else una.una_score_loss(reward, batch.scores))
    for offsets, still in ((balanced, True), (balanced + 0.5, False)):
        pull = gradient(lambda rho: loss(una.implicit_reward(
            rho, 0 * rho, 0.25, offsets[batch.prompt])), torch.zeros(46))
        by_prompt = torch.zeros(3).index_add(0, batch.prompt, pull)
        assert (by_prompt.abs().max() < 1e-5) == still and pull.abs().max() > 0.01


def test_offsets_are_numbers_however_few_the_scores_of_a_prompt():
    batch = data.take(prepared().feedback, torch.arange(6))      # two a prompt, in thirds
    batch.labels = torch.tensor([1.0, 1, 0, 0, 1, 0])
    binary, mixed = (train.METHODS[name] for name in ("una-binary-learned", "una-mixed-estimated"))
    assert train.start_offsets(binary, batch).tolist() == pytest.approx(
        [logit(0.9999), logit(0.0001), 0.0], abs=1e-2)
    estimate = train.start_offsets(mixed, batch, 0.25).tolist()  # of the last two alone
    assert estimate[:2] == [0, 0] and estimate[2] == pytest.approx(
        una.estimated_offset(batch.scores[4:].logit(), 0.25).item())


@pytest.mark.parametrize("ramp", [0, 0.5])
@pytest.mark.parametrize("name", ["una-score-estimated", "una-mixed-estimated"])
def test_eq04_an_estimate_at_the_losses_beta_goes_to_its_prompt_in_even_steps_or_at_once(
        name, ramp):
    its = train.METHODS[name]._replace(beta_multiple=6, ramp=ramp)
    _, stream, _, offsets = train.begin(its, settings(steps=8, batch=24), 0, prepared())
    assert offsets.tolist() == pytest.approx(estimates(everything(), 6 * 0.25, name), abs=1e-4)
    start = torch.tensor(balances(everything(), name))
    assert not near(start, offsets, 0.05)
    for step, batch in zip(range(8), stream):
        way = min(1, step / 4) if ramp else 1
        assert near(batch.offset, (start + way * (offsets - start))[batch.prompt], 1e-5)
    assert not prepared().feedback.offset.any()                  # what is shared stays as it was


def test_offsets_are_reported_as_they_are_at_the_end():
    for name in ("una-score", "una-score-estimated", "una-score-learned"):
        entry = train.run_method(settings(), 0, name, prepared())
        assert entry["offsets"] == run(name)[1].tolist()
    assert train.begin(train.METHODS["una-online"], settings(), 0, prepared())[3] is None


def written_out(name, batch, logit):
    """The loss of each response whose implicit reward is logit."""
    s = 1 / (1 + torch.exp(-logit))
    if "binary" in name:
        return -torch.where(batch.labels == 1, s, 1 - s).log()
    return (s - batch.scores) ** 2 if "score" in name else (batch.scores.logit() - logit) ** 2


@pytest.mark.parametrize("name", ALONE)
def test_eq07_eq12_eq13_with_an_offset_are_the_losses_written_out(name, beta=0.25):
    policy, table = moved(prepared().reference, 0.2), torch.linspace(-1, 2, 3)
    batch = next(train.stored_batches(train.METHODS[name], prepared(), 46, 0, table))
    own, others = table[batch.prompt], table.roll(1)[batch.prompt]
    pi, pi_ref = (una.sequence_logprob(model(batch.tokens), batch.tokens, batch.mask)
                  for model in (policy, prepared().reference))
    rho, value = pi - pi_ref, train.METHODS[name].loss(policy, batch, beta)
    assert value.shape == (46,)
    assert near(value, written_out(name, batch, beta * rho + own), 1e-4)
    for wrong in (beta * rho, beta * rho + others, beta * rho - own, 2 * beta * rho + own):
        assert not near(value, written_out(name, batch, wrong), 1e-2)


@pytest.mark.parametrize("name", ["una-binary-learned", "una-score-learned"])
def test_a_learned_offset_has_offset_times_the_learning_rate_of_the_weights(name):
    # Adam's first step is the learning rate, against the gradient's sign.
    rate, batch = train.METHODS[name].learning_rate, everything()
    up = torch.zeros(3).index_add(0, batch.prompt, 0.5 - (
        batch.labels if "binary" in name else batch.scores))
    policy, offsets = run(name, steps=1, first=0.0)
    pulled = up != 0
    assert pulled.sum() > 1 and close(offsets.detach()[pulled],
                                      -up.sign()[pulled] * train.OFFSET_TIMES * rate, 1e-4)
    farthest = max((a - b).abs().max().item() for a, b in zip(
        policy.parameters(), prepared().reference.parameters()))
    assert farthest == pytest.approx(rate, rel=1e-3) and train.OFFSET_TIMES > 1
