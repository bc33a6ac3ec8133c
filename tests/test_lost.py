"""Where what is lost is lost: it is a KL, split at what was judged. And why pairs leak."""
from types import SimpleNamespace

import pytest
import torch

import data
import train
import una
from helpers import gradient, near, normals
from lab import exact
from toy import small


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
    noting, lost_parts, seen, marked = exact.noting, exact.lost_parts, set(), []

    def noted(batches, *where):
        for batch in noting(batches, *where):
            seen.update(map(tuple, batch.tokens.tolist()))
            yield batch
    monkeypatch.setattr(exact, "noting", noted)
    monkeypatch.setattr(exact, "lost_parts", lambda world, logprobs, judged: (
        marked.append(judged), lost_parts(world, logprobs, judged))[1])
    reached = train.run_method(small().settings, 0, name, small())["train"]
    assert reached["judged"] + reached["unjudged"] == pytest.approx(reached["lost"], abs=1e-9)
    tokens, _ = exact.all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    prompts = small().worlds["train"].prompts
    listed = {(*prompts[x].tolist(), *tokens[y].tolist()) for x, y in marked[0].nonzero()}
    assert listed == seen and len(listed) > 20


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
