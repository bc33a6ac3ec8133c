"""What a reward model costs: its own exact optimum, and what optimisers of it make.

A policy can be no better than the optimum of the reward that it is trained on. A reward model's
rewards can be listed as the policy's probabilities can. So its optimum, pi_ref e^{r/b} / Z (Eq. 4),
is known too, and what that loses by the judge's measure is the model's own loss. What an optimiser
loses by the model's measure is the optimiser's.
"""
import copy
from dataclasses import replace

import torch

import data
import train
import una
from lab import exact, variants
from lab.variants import Variant

BETAS = tuple(2.0 ** power for power in range(-2, 7))  # of the optimum, in multiples of the task's


def part_of(world, rows):
    """A World of some of its prompts."""
    part = copy.copy(world)
    for name in ("prompts", "rewards", "ref_logprobs", "optimum"):
        setattr(part, name, getattr(world, name)[rows])
    return part


def as_rewarded(world, rewards, beta):
    """The World of the same prompts where rewards (P, Y) are given, and a nat costs beta."""
    other = copy.copy(world)
    del other.levels, other.level_logprobs                       # they are the judge's
    other.rewards, other.beta = rewards, beta
    other.optimum = una.optimal_policy(world.ref_logprobs, rewards, beta)[1]
    return other


def listed(world, reward_model):
    """All rewards that a model gives to responses to the prompts of a World, (P, Y)."""
    device = reward_model.wte.weight.device
    return torch.stack([
        exact.all_rewards(reward_model, prompt.to(device), data.MAX_TOKENS, data.EOT).cpu()
        for prompt in world.prompts]).double()


def lost_share(world, logprobs):
    """Share of the possible gain that a policy with these logprobs (P, Y) goes without."""
    possible = exact.evaluate(world, world.ref_logprobs)["regret"]
    return exact.evaluate(world, logprobs)["regret"] / possible


def ceilings(world, rewards):
    """{multiple of beta: lost share, by the judge, of the exact optimum of rewards (P, Y)}."""
    return {multiple: lost_share(world, una.optimal_policy(world.ref_logprobs, rewards,
                                                           multiple * world.beta)[0])
            for multiple in BETAS}


def trained(settings, seed, cell, path):
    """What variants.shared_by gives, with a reward model of cell's learning_rate and steps."""
    shared = variants.shared_by(settings, seed, path)
    shared.reward_model = train.train_reward_model(
        replace(settings, steps=cell["steps"]), seed, shared.reference, shared.feedback,
        cell["learning_rate"])
    return shared


def glance(settings, seed, cell, path):
    """All that tuning needs: the ceilings of a reward model on one prompt of each mood."""
    shared = trained(settings, seed, cell, path)
    world = part_of(shared.worlds["train"], slice(None, None, 3))
    return dict(model=dict(seed=seed, judged=settings.judged, cell=cell,
                           ceilings=pairs(ceilings(world, listed(world, shared.reward_model)))))


def pairs(ceilings):
    """As JSON has no keys but text."""
    return [[multiple, share] for multiple, share in ceilings.items()]


class TwoMeasures(exact.Observer):
    """An Observer of the training prompts, which measures the end by the reward model as well."""

    def __init__(self, by_model, *rest):
        super().__init__(*rest)
        self.by_model = by_model

    def __call__(self, step, seconds, loss, policy):
        world = self.worlds["train"]
        logprobs = exact.policy_logprobs(policy, world.prompts)
        self.last = dict(train=exact.evaluate(world, logprobs),
                         by_model=exact.evaluate(self.by_model, logprobs))
        self.curve.append(self.point(step, seconds, self.last["train"]) | dict(loss=loss))

    def report(self):
        return self.last | dict(curve=self.curve)


def run_on_model(settings, seed, cell, path, optimisers):
    """A reward model, its ceiling, and what optimisers make of it: an entry of budget.json.

    cell: learning_rate and steps of the model, and beta, which the ceiling and the optimisers have
    in place of the task's, as a multiple. optimisers: {name of an online method: its cell}.
    """
    shared = trained(settings, seed, cell, path)
    world = shared.worlds["train"]
    rewards = listed(world, shared.reward_model)
    by_model = as_rewarded(world, rewards, cell["beta"] * world.beta)
    best = una.optimal_policy(world.ref_logprobs, rewards, by_model.beta)[0]
    measures = dict(train=world, by_model=by_model)
    entry = dict(
        seed=seed, judged=settings.judged, cell=cell, ceilings=pairs(ceilings(world, rewards)),
        **{name: {key: exact.evaluate(measure, logprobs) for key, measure in measures.items()}
           for name, logprobs in (("reference", world.ref_logprobs), ("ceiling", best))})
    runs = {}
    for name, its in optimisers.items():
        method = variants.method_of(Variant(name), its)._replace(beta=cell["beta"])
        run = train.run_method(replace(settings, reward="model"), seed, name, shared, method,
                               lambda *given: TwoMeasures(by_model, *given))["runs"]
        runs[name] = {key: value for key, value in run.items() if key != "samples"}
    return dict(model=entry | dict(runs=runs))
