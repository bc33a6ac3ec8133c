"""lab/exact.py: every response, and what a policy reaches, against brute force and Eq. 3."""
import itertools
import math

import pytest
import torch

import data
import train
import una
from helpers import abc, close, gpt, moved, near, random_tokens, toy_gpt
from lab import exact
from lab.exact import all_logprobs, all_responses
from model import ScalarGPT, sample
from toy import small


@pytest.fixture(scope="session")
def world():
    """All 406,901 responses to two prompts, of a reference that has learned a little."""
    world = exact.World(train.train_reference(train.parse(
        "--reference-steps 20 --n-layer 1 --n-head 2 --n-embd 32 --device cpu".split()), 0),
        data.TRAIN_PROMPTS[:2], 0.25)                            # of the nouns wind and fire
    world.best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)
    # Some way to the optimum, and not straight.
    world.policy = (0.6 * world.ref_logprobs + 0.4 * world.best
                    + 0.3 * torch.sin(torch.arange(406_901.0))).log_softmax(1)
    return world


# ---------------------------------------------------------------- all responses and probabilities
def test_all_responses_are_the_strings_cut_behind_their_first_end_406901_in_the_toy(world):
    for vocab_size, max_tokens, eot in ((3, 3, 2), (3, 3, 0), (4, 3, 1), (2, 4, 1), (4, 1, 3)):
        tokens, mask = all_responses(vocab_size, max_tokens, eot)
        expected = set()
        for string in itertools.product(range(vocab_size), repeat=max_tokens):
            length = string.index(eot) + 1 if eot in string else max_tokens
            expected.add((string[:length] + (eot,) * (max_tokens - length),
                          tuple(n < length for n in range(max_tokens))))
        rows = [(tuple(t), tuple(m)) for t, m in zip(tokens.tolist(), mask.tolist(), strict=True)]
        assert {*rows} == expected and len(rows) == len(expected)
        assert ((tokens != eot).sum(1).diff() >= 0).all()        # shortest first
    tokens, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    assert len((tokens * 26 ** torch.arange(4)).sum(1).unique()) == len(tokens) == 406_901
    for prompt, rewards in zip(world.prompts, world.rewards):
        assert torch.equal(rewards, data.reward(prompt.expand(406_901, -1), tokens).double())


def test_probabilities_of_all_add_up_to_one_in_every_precision_and_on_the_models_device():
    for eot, max_tokens in itertools.product((0, 1, 2), (1, 2, 3)):
        logprobs = all_logprobs(abc(), torch.tensor([0, 2, 1]), max_tokens, eot)
        assert len(logprobs) == 2 ** (max_tokens + 1) - 1 and logprobs.dtype == torch.float64
        assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-10)
    expected = all_logprobs(gpt(noise=0.2), random_tokens(3), 3, 2)
    for dtype, off in ((torch.bfloat16, 0.1), (torch.float16, 0.05), (torch.float32, 1e-5)):
        logprobs = all_logprobs(gpt(noise=0.2).to(dtype), random_tokens(3), 3, 2)
        assert logprobs.dtype == torch.float32 and near(logprobs.double(), expected, off)
        # A softmax in bfloat16 would round away more than that, at the first token already.
        assert logprobs.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    # In the toy: far less without those that are cut off; of a float32 model only nearly 1.
    (prompt,) = prompts = data.encode_prompts(data.TRAIN_PROMPTS[:1])
    raw = all_logprobs(toy_gpt(), prompt, data.MAX_TOKENS, data.EOT).double()
    (normalised,) = exact.policy_logprobs(toy_gpt(), prompts)
    assert raw[:1 + 25 + 25 ** 2 + 25 ** 3].exp().sum() < 0.99 and close(normalised, raw, 1e-5)
    assert (normalised.exp().sum() - 1).abs() < 1e-12 < (raw.exp().sum() - 1).abs() < 1e-4
    # A device without numbers: a tensor that was made on another one would not mix with it.
    model = gpt(dtype=torch.float32).to("meta")
    for listed, of in ((all_logprobs, model), (exact.all_rewards, ScalarGPT(abc()).to("meta"))):
        assert listed(of, random_tokens(3, vocab_size=3).to("meta"), 3, 2).device.type == "meta"


def test_all_logprobs_and_all_rewards_are_those_of_whole_responses_without_a_cache(language):
    model, scalar = gpt(), moved(ScalarGPT(gpt()).double())
    for prompt, eot in (([1], 0), ([1], 4), ([3, 0, 2, 2], 2)):
        prompt, (responses, mask) = torch.tensor(prompt), all_responses(5, 3, eot)
        tokens = torch.cat([prompt.expand(len(responses), -1), responses], 1)
        row = torch.cat([torch.zeros(len(mask), len(prompt), dtype=torch.bool), mask], 1)
        logprobs = all_logprobs(model, prompt, 3, eot)
        assert close(logprobs, una.sequence_logprob(model(tokens), tokens, row).detach())
        assert len(logprobs.unique()) == len(logprobs) and not logprobs.requires_grad
        rewards = scalar(tokens)[torch.arange(len(tokens)), row.cumsum(1).argmax(1)].detach()
        assert close(exact.all_rewards(scalar, prompt, 3, eot), rewards)
        assert len(rewards.unique()) == len(rewards)
    for value in (math.nan, math.inf):                           # it has left the numbers
        model = moved(small().reference).requires_grad_(False)
        model.wte.weight[3] = value
        with pytest.raises(FloatingPointError, match="not numbers"):
            exact.policy_logprobs(model, small().worlds["train"].prompts)


# ---------------------------------------------------------------- what a policy reaches
def test_eq03_the_optimum_beats_all_and_regret_is_beta_times_the_kl_to_it(world):
    # J* - J(pi) = beta KL(pi || pi*): put r = beta log pi*/pi_ref + beta log Z into Eq. 3.
    def objective(logprobs, beta):
        return una.rlhf_objective(logprobs, world.ref_logprobs, world.rewards, beta).mean().item()
    optimum, start = (objective(of, 0.25) for of in (world.best, world.ref_logprobs))
    for logprobs in (world.policy, world.ref_logprobs, world.policy.flip(0), world.best):
        J, reward = objective(logprobs, 0.25), objective(logprobs, 0.0)
        figures = exact.evaluate(world, logprobs)
        expected = dict(objective=J, reward=reward, kl=(reward - J) / 0.25, optimum=optimum,
                        regret=optimum - J, lost=(optimum - J) / (optimum - start))
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-9)
        kl = exact.kl_divergence(logprobs, world.best).mean().item()
        assert figures["regret"] == pytest.approx(0.25 * kl, rel=1e-9, abs=1e-9)
        assert kl > 0.1 or logprobs is world.best
    assert figures["frontier_reward"] == pytest.approx(figures["reward"], abs=1e-6)    # of best


def test_the_frontier_is_the_dual_bound_and_no_policy_is_above_it(world):
    # Lagrange: R*(k) = min_b [ b k + E_x b log Z_b(x) ], over a grid of b here, not by bisection.
    start = exact.expect(world.ref_logprobs, world.rewards).mean().item()
    assert exact.frontier_reward(world, 0.0) == pytest.approx(start, abs=1e-3)
    grid = torch.logspace(-1, 1, 60, dtype=torch.float64).tolist()
    values = [una.optimal_policy(world.value_logprobs, world.values, b)[1].mean().item()
              for b in grid]
    for logprobs, below in ((world.policy, 0.01), (world.best, -1e-9)):
        figures = exact.evaluate(world, logprobs)
        bound = min(b * figures["kl"] + value for b, value in zip(grid, values))
        assert figures["frontier_reward"] == pytest.approx(bound, abs=2e-3)
        assert figures["reward"] < figures["frontier_reward"] - below
    for b in (0.05, 0.25, 10.0):                                 # all of one reward are as one
        tilted, _ = una.optimal_policy(world.ref_logprobs, world.rewards, b)
        kl = exact.kl_divergence(tilted, world.ref_logprobs).mean().item()
        reward = exact.expect(tilted, world.rewards).mean().item()
        assert exact.tilted(world, b) == pytest.approx((kl, reward))
    curve = exact.frontier_curve(world, 4.0)
    assert curve == sorted(curve) and 3.7 < curve[-1][0] <= 4.0 and len(curve) > 50


def test_kl_and_mean_are_sums_in_which_a_response_of_probability_0_adds_nothing():
    p, q = torch.tensor([0.0, 0.25, 0.75]).double(), torch.tensor([0.0, 0.4, 0.6]).double()
    expected = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.75 / 0.6)
    both = torch.stack([p, q]).log()
    assert exact.kl_divergence(both, both.flip(0))[0].item() == pytest.approx(expected)
    assert exact.kl_divergence(p.log(), p.log()).item() == 0     # and not 0 * (-inf + inf)
    assert exact.kl_divergence(p.log(), q.flip(0).log()).item() == math.inf     # never in pi_ref
    assert exact.expect(both, q).tolist() == pytest.approx([0.55, 0.52])


def test_exact_figures_agree_with_sampling(language):
    reference, world = small().reference, small().worlds["train"]
    policy = moved(reference, 0.2)
    figures = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
    x = world.prompts.repeat_interleave(10_000, 0)
    y, y_mask = sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    both = data.join(x, y, y_mask)
    rho = train.logprob_in_chunks(policy, *both) - train.logprob_in_chunks(reference, *both)
    assert data.reward(x, y).mean().item() == pytest.approx(figures["reward"], abs=0.02)
    assert rho.mean().item() == pytest.approx(figures["kl"], abs=0.02) and figures["kl"] > 0.2


def test_reference_and_optimum_are_pi_ref_and_pi_star_in_every_world(language):
    worlds = small().worlds
    start, best = exact.reference_and_optimum(worlds)
    for name, world in worlds.items():
        optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
        assert start[name] == exact.evaluate(world, world.ref_logprobs)
        assert best[name] == exact.evaluate(world, optimum)
    assert [len(world.prompts) for world in worlds.values()] == [3, 1]           # and held-out ones
    assert start["dots"] == exact.reward_dots(worlds["train"], worlds["train"].ref_logprobs)
    assert best["frontier"][-1][0] <= 1.5 * best["train"]["kl"] < 1.1 * best["frontier"][-1][0]


def variance(logprobs, values):
    """Of values under a distribution, mean over the prompts."""
    mean = (logprobs.exp() * values).sum(1, keepdim=True)
    return (logprobs.exp() * (values - mean) ** 2).sum(1).mean().item()


def test_eq18_at_the_optimum_alone_the_residual_is_constant_and_dots_lie_on_the_diagonal(world):
    for logprobs in (world.ref_logprobs, world.policy, world.best):
        residual = world.rewards - 0.25 * (logprobs - world.ref_logprobs)
        expected = variance(logprobs, residual)
        assert exact.residual_variance(world, logprobs) == pytest.approx(expected, abs=1e-12)
        assert (expected < 1e-12) if logprobs is world.best else expected > 0.1
    explicit, implicit = exact.reward_dots(world, world.best)
    assert explicit == pytest.approx(implicit, abs=2e-3)
    assert len(explicit) == (world.ref_logprobs.exp() > 1 / 300).sum() > 0
    explicit, implicit = exact.reward_dots(world, world.ref_logprobs)
    assert {*implicit} <= {round(value, 3) for value in world.optimum.tolist()}
    assert explicit != pytest.approx(implicit, abs=0.1)


def test_eq16_neither_the_optimum_nor_any_regret_knows_the_level(language):
    # Only J and J* do: they are higher by f(x).
    flat, f = small().worlds["train"], torch.tensor([-1 / 3, 1 / 3, 1]).double()
    raised = exact.World(small().reference, data.TRAIN_PROMPTS, 0.25, 1.0)       # wind, fire, night
    assert close(raised.rewards - flat.rewards, f[:, None].expand(3, 651), 1e-6)
    best, raised_best = (una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)[0]
                         for world in (flat, raised))
    assert close(raised_best, best, 1e-6) and close(raised.gain, flat.gain, 1e-6)
    assert close(raised.optimum - flat.optimum, f, 1e-6)
    policy = exact.policy_logprobs(moved(small().reference, 0.2), flat.prompts)
    for logprobs in (flat.ref_logprobs, policy, best):
        before, after = (exact.evaluate(world, logprobs) for world in (flat, raised))
        for name in ("kl", "regret", "lost", "residual_variance"):
            assert after[name] == pytest.approx(before[name], abs=1e-6), name
        assert after["objective"] - before["objective"] == pytest.approx(1 / 3, abs=1e-6)


def test_from_the_smallest_beta_to_the_largest_regret_is_a_number_and_the_gain_is_exact(language):
    # log E e^{r/b} = E r / b + Var r / 2 b^2 + ..., so J* - J(pi_ref) = Var r / 2 b + O(1 / b^2).
    # Without normalised probabilities float32's rounding would be more than the gain.
    reference = small().reference
    for beta, off in ((1e-4, None), (1e3, 1e-2), (1e6, 0.1)):    # there float64's digits run out
        world = exact.World(reference, data.TRAIN_PROMPTS, beta)
        for model in (reference, moved(reference)):
            figures = exact.evaluate(world, exact.policy_logprobs(model, world.prompts))
            assert all(map(math.isfinite, figures.values())) and figures["regret"] >= 0, beta
        best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, beta)
        rounding = 1e-12 + 2e-15 * beta                          # float64's
        assert abs(exact.evaluate(world, best)["regret"]) < rounding < world.gain.min() / 10
        if off:
            expected = variance(world.ref_logprobs, world.rewards) / (2 * beta)
            assert world.gain.mean().item() == pytest.approx(expected, rel=off)


# ---------------------------------------------------------------- kinds of strings
def test_each_string_is_of_one_kind_and_its_mass_is_counted_there(world):
    masses = exact.masses(world, world.policy)
    assert [*masses] == [*exact.KINDS] and sum(masses.values()) == pytest.approx(1)
    tokens, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    texts = {" bright warm wind": "right", " bright warm sea": "wrong noun", "": "no word",
             " bright wind": "wrong word", " wind warm bright": "wrong word"}
    for text, kind in texts.items():                             # the first prompt is of the wind
        row = (tokens == data.encode_responses([text])[0]).all(1)
        assert exact.KINDS[world.kinds[0][row].item()] == kind, text
    cut = tokens[:, -1] != data.EOT
    assert (world.kinds[:, cut] == exact.KINDS.index("no end")).all() and cut.sum() == 25**4
    counted = [(world.kinds[0] == i).sum().item() for i in range(5)]
    assert counted == [16**2, 3 * 16**2, 1, 25 + 25**2 + 25**3 - 4 * 16**2, 25**4]
    for prompt in range(2):
        of = world.policy[prompt].exp()[world.kinds[prompt] == 2]
        assert of.item() == world.policy[prompt][0].exp().item()
    assert masses["no word"] == pytest.approx(world.policy[:, 0].exp().mean().item())


def test_a_reward_that_is_the_same_for_all_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(data, "reward", lambda prompts, responses: torch.ones(len(responses)))
    with pytest.raises(ValueError, match="all responses have the same reward: no policy"):
        exact.World(small().reference, data.TRAIN_PROMPTS[:1], 0.25)
