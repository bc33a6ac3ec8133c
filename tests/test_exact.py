"""lab/exact.py: every response, what a policy reaches, and where it lost the rest, against brute
force and Eq. 3. And why pairs leak."""
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import data
import train
import una
from helpers import close, gpt, gradient, moved, near, normals, random_tokens, toy_gpt
from lab import exact
from lab.exact import all_logprobs, all_responses
from model import ScalarGPT
from toy import small


@pytest.fixture(scope="session")
def world():
    """All 406,901 responses to two prompts, of a reference that has learned a little."""
    world = exact.World(train.train_reference(train.parse(
        "--reference-steps 20 --n-layer 1 --n-head 2 --n-embd 32 --device cpu".split()), 0),
        data.TRAIN_PROMPTS[:2], 0.25)                            # of the nouns wind and fire
    world.best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.25)
    world.policy = (0.6 * world.ref_logprobs + 0.4 * world.best
                    + 0.3 * torch.sin(torch.arange(406_901.0))).log_softmax(1)
    return world


def test_all_responses_are_the_strings_cut_behind_their_first_end_406901_in_the_toy(world):
    for vocab_size, max_tokens, eot in ((3, 3, 2), (3, 3, 0), (4, 3, 1), (2, 4, 1), (4, 1, 3)):
        tokens, mask = all_responses(vocab_size, max_tokens, eot)
        expected = set()
        for string in itertools.product(range(vocab_size), repeat=max_tokens):
            length = string.index(eot) + 1 if eot in string else max_tokens
            expected.add(string[:length] + (eot,) * (max_tokens - length))
        assert sorted(map(tuple, tokens.tolist())) == sorted(expected)
        n_words = (tokens != eot).sum(1)
        assert (n_words.diff() >= 0).all()                       # shortest first
        assert torch.equal(mask, torch.arange(max_tokens) <= n_words[:, None])
    tokens, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    assert len((tokens * 26 ** torch.arange(4)).sum(1).unique()) == len(tokens) == 406_901
    for prompt, rewards in zip(world.prompts, world.rewards):
        assert torch.equal(rewards, data.reward(prompt.expand(406_901, -1), tokens).double())


def test_probabilities_of_all_add_up_to_one_in_every_precision_and_on_the_models_device():
    expected = all_logprobs(gpt(noise=0.2), random_tokens(3), 3, 2)
    assert expected.exp().sum().item() == pytest.approx(1, abs=1e-10)
    for dtype, off in ((torch.bfloat16, 0.1), (torch.float16, 0.05), (torch.float32, 1e-5)):
        logprobs = all_logprobs(gpt(noise=0.2).to(dtype), random_tokens(3), 3, 2)
        assert logprobs.dtype == torch.float32 and near(logprobs.double(), expected, off)
        assert logprobs.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    (prompt,) = prompts = data.encode_prompts(data.TRAIN_PROMPTS[:1])
    raw = all_logprobs(toy_gpt(), prompt, data.MAX_TOKENS, data.EOT).double()
    (normalised,) = exact.policy_logprobs(toy_gpt(), prompts)
    assert close(normalised, raw, 1e-5)
    assert (normalised.exp().sum() - 1).abs() < 1e-12 < (raw.exp().sum() - 1).abs() < 1e-4
    # A device without numbers: a tensor that was made on another one would not mix with it.
    model = gpt(dtype=torch.float32).to("meta")
    for listed, of in ((all_logprobs, model), (exact.all_rewards, ScalarGPT(gpt(3)).to("meta"))):
        assert listed(of, random_tokens(3, vocab_size=3).to("meta"), 3, 2).device.type == "meta"


def test_all_logprobs_and_all_rewards_are_those_of_whole_responses_without_a_cache(language):
    # 12 ** 2 strings of two words: too many for one pass of all_rewards.
    model, scalar = gpt(13), moved(ScalarGPT(gpt(13)).double())
    for prompt, n, eot in (([1], 3, 0), ([1], 2, 12), ([1], 1, 5), ([3, 0, 2, 2], 3, 2)):
        prompt, (responses, mask) = torch.tensor(prompt), all_responses(13, n, eot)
        tokens, row = data.join(prompt.expand(len(responses), -1), responses, mask)
        logprobs = all_logprobs(model, prompt, n, eot)
        assert close(logprobs, una.sequence_logprob(model(tokens), tokens, row).detach())
        rewards = scalar(tokens)[torch.arange(len(tokens)), row.cumsum(1).argmax(1)].detach()
        assert close(exact.all_rewards(scalar, prompt, n, eot), rewards)
        assert all(len(of.unique()) == len(of) for of in (logprobs, rewards))
    model = moved(small().reference).requires_grad_(False)
    model.wte.weight[3] = math.inf                               # it has left the numbers
    with pytest.raises(FloatingPointError, match="not numbers"):
        exact.policy_logprobs(model, small().worlds["train"].prompts)


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
    kl = exact.kl_divergence(world.best, world.ref_logprobs).mean().item()
    reward = exact.expect(world.best, world.rewards).mean().item()
    assert exact.tilted(world, 0.25) == pytest.approx((kl, reward))


def test_a_response_of_probability_0_adds_nothing_to_a_kl():
    p, q = torch.tensor([0.0, 0.25, 0.75]).double(), torch.tensor([0.0, 0.4, 0.6]).double()
    expected = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.75 / 0.6)
    assert exact.kl_divergence(p.log(), q.log()).item() == pytest.approx(expected)
    assert exact.kl_divergence(p.log(), q.flip(0).log()).item() == math.inf     # never in pi_ref


def test_reference_and_optimum_are_pi_ref_and_pi_star_in_every_world(language):
    worlds = small().worlds
    start, best = exact.reference_and_optimum(worlds)
    for name, world in worlds.items():
        optimum, _ = una.optimal_policy(world.ref_logprobs, world.rewards, world.beta)
        assert start[name] == exact.evaluate(world, world.ref_logprobs)
        assert best[name] == exact.evaluate(world, optimum)
    assert [len(world.prompts) for world in worlds.values()] == [3, 1]           # and held-out ones
    assert start["dots"] == exact.reward_dots(worlds["train"], worlds["train"].ref_logprobs)
    curve = best["frontier"]
    assert curve[-1][0] <= 1.5 * best["train"]["kl"] < 1.1 * curve[-1][0] and curve == sorted(curve)


def test_eq18_at_the_optimum_alone_dots_lie_on_the_diagonal(world):
    explicit, implicit = exact.reward_dots(world, world.best)
    assert explicit == pytest.approx(implicit, abs=2e-3)
    assert len(explicit) == (world.ref_logprobs.exp() > 1 / 300).sum() > 0
    for other in (world.ref_logprobs, world.policy):
        explicit, implicit = exact.reward_dots(world, other)
        assert explicit != pytest.approx(implicit, abs=0.1)


def test_eq16_neither_the_gain_nor_any_regret_knows_the_level_only_j_and_its_maximum_do(language):
    flat, f = small().worlds["train"], torch.tensor([-1 / 3, 1 / 3, 1]).double()
    raised = exact.World(small().reference, data.TRAIN_PROMPTS, 0.25, 1.0)       # wind, fire, night
    assert close(raised.optimum - flat.optimum, f, 1e-6) and close(raised.gain, flat.gain, 1e-6)
    policy = exact.policy_logprobs(moved(small().reference, 0.2), flat.prompts)
    before, after = (exact.evaluate(world, policy) for world in (flat, raised))
    for name in ("kl", "regret", "lost"):
        assert after[name] == pytest.approx(before[name], abs=1e-6), name


def test_each_string_is_of_one_kind_and_its_mass_is_counted_there(world):
    masses = exact.masses(world, world.policy)
    assert [*masses] == [*exact.KINDS] and sum(masses.values()) == pytest.approx(1)
    tokens, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    texts = {" bright warm wind": "right", " bright warm sea": "wrong noun", "": "no word",
             " bright wind": "wrong word", " wind warm bright": "wrong word"}
    for text, kind in texts.items():                             # the first prompt is of the wind
        row = (tokens == data.encode_responses([text])[0]).all(1)
        assert exact.KINDS[world.kinds[0][row].item()] == kind, text
    counted = [(world.kinds[0] == i).sum().item() for i in range(5)]
    assert counted == [16**2, 3 * 16**2, 1, 25 + 25**2 + 25**3 - 4 * 16**2, 25**4]
    assert masses["no word"] == pytest.approx(world.policy[:, 0].exp().mean().item())


def test_a_reward_that_is_the_same_for_all_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(data, "reward", lambda prompts, responses: torch.ones(len(responses)))
    with pytest.raises(ValueError, match="all responses have the same reward: no policy"):
        exact.World(small().reference, data.TRAIN_PROMPTS[:1], 0.25)


def test_lost_is_split_by_the_chain_rule_of_kl_in_brute_force_over_15_responses():
    (rewards, ref, policy, judged), beta = normals(4)(4, 2, 15), 0.4
    ref, policy, judged = ref.log_softmax(-1), policy.log_softmax(-1), judged > 0.3
    best, optimum = una.optimal_policy(ref, rewards, beta)
    J = lambda logprobs: una.rlhf_objective(logprobs, ref, rewards, beta)
    world = SimpleNamespace(rewards=rewards, ref_logprobs=ref, beta=beta, gain=optimum - J(ref))
    kl = lambda p, q: sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    within, beyond, outside, unit = torch.zeros(4).double()
    for p, q, start, there in zip(policy.exp(), best.exp(), ref.exp(), judged):
        m, m_best = p[there].sum(), q[there].sum()
        within += m * kl(p[there] / m, q[there] / m_best)
        beyond += kl([m, 1 - m], [m_best, 1 - m_best])
        beyond += (1 - m) * kl(p[~there] / (1 - m), q[~there] / (1 - m_best))
        outside += (1 - m) / 2
        unit += kl(start, q)
    parts = dict(judged=(within / unit).item(), unjudged=(beyond / unit).item())
    lost = ((optimum - J(policy)).mean() / (optimum - J(ref)).mean()).item()
    assert sum(parts.values()) == pytest.approx(lost) and min(parts.values()) > 0.05
    assert exact.lost_parts(world, policy, judged) == pytest.approx(
        parts | dict(unjudged_mass=outside.item()), abs=1e-12)
    for which, all_or_none in (("unjudged", torch.zeros_like), ("judged", torch.ones_like)):
        told = exact.lost_parts(world, policy, all_or_none(judged))
        assert told[which] == pytest.approx(lost, abs=1e-12)
    told = exact.lost_parts(world, best, judged)                 # the optimum loses neither
    assert abs(told["judged"]) + abs(told["unjudged"]) < 1e-12


def test_index_of_finds_every_response_where_all_responses_has_it():
    for vocab_size, max_tokens, eot in ((3, 3, 2), (4, 3, 1), (3, 2, 0), (26, 2, 25)):
        tokens, _ = exact.all_responses(vocab_size, max_tokens, eot)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        assert torch.equal(exact.index_of(tokens[order], vocab_size, eot), order)


@pytest.mark.parametrize("name", ["una-pair", "una-online"])
def test_a_run_says_what_it_lost_on_the_responses_it_learned_from(name, language, monkeypatch):
    noting, lost_parts, seen = exact.noting, mock.Mock(side_effect=exact.lost_parts), set()

    def noted(batches, *where):
        for batch in noting(batches, *where):
            seen.update(map(tuple, batch.tokens.tolist()))
            yield batch
    monkeypatch.setattr(exact, "noting", noted)
    monkeypatch.setattr(exact, "lost_parts", lost_parts)
    reached = train.run_method(small().settings, 0, name, small())["train"]
    assert reached["judged"] + reached["unjudged"] == pytest.approx(reached["lost"], abs=1e-9)
    tokens, _ = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    (world, _, judged), _ = lost_parts.call_args
    assert seen == {(*world.prompts[x].tolist(), *tokens[y].tolist()) for x, y in judged.nonzero()}
    assert len(seen) > 20


def test_eq10_the_logit_of_a_token_that_begins_neither_response_has_no_gradient():
    # Why pairs leak: what cancels f(x) cancels the price of leaving what was judged, too.
    logits, beta, ref = normals(2)(6), 0.5, -1.8

    def pair(z):
        logprobs = z.log_softmax(-1)
        return una.dpo_loss(logprobs[:1], logprobs[1:2], *torch.full((2, 1), ref).double(), beta)

    def score(z):
        reward = una.implicit_reward(z.log_softmax(-1)[:1], torch.tensor([ref]).double(), beta)
        return una.una_score_loss(reward, torch.tensor([0.9]).double())
    assert near(gradient(pair, logits)[2:], torch.zeros(4).double(), 1e-15)
    assert (gradient(pair, logits)[:2].abs() > 0.01).all()
    assert (gradient(score, logits)[1:].abs() > 1e-3).all()
