"""The loop, the exact evaluation and the report: what train.py promises."""
import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import train
import una
from model import GPT, GPTConfig, all_responses

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = "--steps 3 --judged 48 --reference-steps 8 --evaluations 2 --n-layer 1 --n-head 1 --n-embd 8 --batch 48".split()


def run(folder, *arguments):
    """A tiny run on four prompts: to list all responses to sixteen takes longer than to learn from them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:3])
        patch.setattr(data, "HELDOUT_PROMPTS", data.HELDOUT_PROMPTS[:1])
        train.main([*TINY, "--device", "cpu", "--out", str(folder), *arguments])
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """All methods, once: (folder, results)."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, run(folder, "--seed", "1")


def small(steps=10):
    """Settings, a reference, its feedback and its world, small enough for tests."""
    settings = train.Settings(steps=steps, judged=96, reference_steps=20, evaluations=1, n_layer=1, n_head=2, n_embd=16,
                              batch=48)
    reference = train.train_reference(settings, 0, CPU)
    feedback = train.collect_feedback(settings, 0, reference, CPU)
    return settings, reference, feedback, train.World(reference, data.TRAIN_PROMPTS[:2], settings.beta, CPU)


def losses(method, policy, reference, feedback, items, beta=0.25):
    ref = train.response_logprob(reference, feedback.tokens, feedback.mask)
    other = train.response_logprob(reference, feedback.other_tokens, feedback.other_mask)
    return train.offline_losses(method, policy, feedback, ref, other, items, beta)


def moved(reference):
    """A policy some way from its reference."""
    policy = GPT(reference.config)
    policy.load_state_dict({name: w + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
                            for name, w in reference.state_dict().items()})
    return policy


# ---------------------------------------------------------------- exact evaluation
def test_regret_is_beta_times_kl_to_the_optimum():
    # J* - J(pi) = beta KL(pi || pi*): put r = beta log pi*/pi_ref + beta log Z into Eq. 3.
    settings, reference, _, world = small()
    logprobs = world.logprobs(moved(reference))
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, settings.beta)
    kl = (logprobs.exp() * (logprobs - best)).sum(1).mean().item()
    assert world.evaluate(logprobs)["regret"] == pytest.approx(settings.beta * kl, rel=1e-5)


def test_the_optimum_has_no_regret_and_lies_on_the_frontier():
    settings, reference, _, world = small()
    best = world.evaluate(una.optimal_policy(world.ref_logprobs, world.rewards, settings.beta)[0])
    assert best["regret"] == pytest.approx(0, abs=1e-9)
    assert best["objective"] == pytest.approx(world.optimum.mean().item(), abs=1e-9)
    assert best["frontier_reward"] == pytest.approx(best["reward"], abs=1e-6)


def test_the_frontier_is_the_dual_bound_and_no_policy_is_above_it():
    # Lagrange: R*(k) = min_b [ b k + E_x b log Z_b(x) ], over a grid of b here instead of by bisection.
    settings, reference, _, world = small()
    assert world.frontier(0.0) == pytest.approx(world.evaluate(world.ref_logprobs)["reward"], abs=1e-3)
    for logprobs in (world.logprobs(moved(reference)), una.optimal_policy(world.ref_logprobs, world.rewards, 0.1)[0]):
        figures = world.evaluate(logprobs)
        bound = min(b * figures["kl"] + una.optimal_policy(world.ref_logprobs, world.rewards, b)[1].mean().item()
                    for b in torch.logspace(-2, 2, 400, dtype=torch.float64).tolist())
        assert figures["frontier_reward"] == pytest.approx(bound, abs=2e-3)
        assert figures["reward"] <= figures["frontier_reward"] + 1e-9


def test_exact_figures_agree_with_sampling():
    settings, reference, _, world = small()
    policy = moved(reference)
    figures = world.evaluate(world.logprobs(policy))
    x = world.prompts.repeat_interleave(20_000, 0)
    y, y_mask = train.sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    tokens, mask = data.join(x, y, y_mask)
    with torch.no_grad():
        rho = train.response_logprob(policy, tokens, mask) - train.response_logprob(reference, tokens, mask)
    assert data.reward(x, y).mean().item() == pytest.approx(figures["reward"], abs=0.03)
    assert rho.mean().item() == pytest.approx(figures["kl"], abs=0.03)


# ---------------------------------------------------------------- what the methods learn from
def test_held_out_prompts_get_no_feedback():
    _, _, feedback, _ = small()
    heldout = {tuple(prompt) for prompt in data.encode_prompts(data.HELDOUT_PROMPTS).tolist()}
    trained = {tuple(prompt) for prompt in feedback.tokens[:, :data.PROMPT_TOKENS].tolist()}
    assert not heldout & trained and len(trained) == len(data.TRAIN_PROMPTS)


def test_una_mixed_uses_each_response_for_one_kind_of_feedback():
    settings, _, feedback, _ = small()
    kind, first, second = train.feedback_items("una-mixed", feedback).T
    pair = kind == train.PAIR
    rows = {k: set(first[kind == k].tolist()) for k in (train.BINARY, train.SCORE)}
    paired = set(first[pair].tolist()) | set(second[pair].tolist())
    assert not paired & rows[train.BINARY] and not paired & rows[train.SCORE] and not rows[train.BINARY] & rows[train.SCORE]
    assert len(rows[train.BINARY]) == len(rows[train.SCORE]) == settings.judged // 3
    assert len(paired) == 2 * pair.sum() > settings.judged // 4          # identical responses are left out


def test_first_losses_are_what_theory_predicts():
    # At the start pi = pi_ref, so r_theta = 0, s_theta = 1/2.
    _, reference, feedback, _ = small()
    for method, expected in {"una-pair": math.log(2), "dpo": math.log(2), "una-binary-bce": math.log(2),
                             "una-binary-mse": 1 / 4, "kto": 1 / 2}.items():
        first = losses(method, reference, reference, feedback, train.feedback_items(method, feedback))
        assert torch.allclose(first, torch.full_like(first, expected), atol=1e-6), method
    first = losses("una-score", reference, reference, feedback, train.feedback_items("una-score", feedback))
    assert torch.allclose(first, (0.5 - feedback.scores) ** 2, atol=1e-6)


def test_a_mixed_batch_is_its_single_items():
    # Shuffled, one at a time or all at once: the same loss for each item, so the same mean and the same gradient.
    _, reference, feedback, _ = small()
    policy = moved(reference)
    items = train.feedback_items("una-mixed", feedback)
    items = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(2))]
    together = losses("una-mixed", policy, reference, feedback, items)
    alone = torch.cat([losses("una-mixed", policy, reference, feedback, item[None]) for item in items])
    by_kind = torch.cat([alone[items[:, 0] == kind] for kind in (train.PAIR, train.BINARY, train.SCORE)])
    assert torch.allclose(together, by_kind, atol=1e-6)
    assert together.mean().item() == pytest.approx(alone.mean().item(), abs=1e-6)


def test_micro_batches_give_the_same_gradient():
    _, reference, feedback, _ = small()
    policy = moved(reference).double()
    items = train.feedback_items("una-mixed", feedback)
    reference = reference.double()
    losses("una-mixed", policy, reference, feedback, items).mean().backward()
    whole = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    for part in items.split(7):
        (losses("una-mixed", policy, reference, feedback, part).sum() / len(items)).backward()
    assert all(torch.allclose(p.grad, g, atol=1e-8) for p, g in zip(policy.parameters(), whole))


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("label", [None, 0, 1])
def test_kto_takes_odd_batches_one_class_and_a_batch_of_one(count, label):
    _, reference, feedback, _ = small()
    items = train.feedback_items("kto", feedback)
    if label is not None:
        items = items[feedback.labels == label]
    value = losses("kto", moved(reference), reference, feedback, items[:count])
    assert value.shape == (len(items[:count]),) and len(value) and value.isfinite().all()


def test_kto_estimates_its_kl_from_the_responses_to_other_prompts():
    _, policy, feedback, _ = small()
    reference = moved(policy)                                  # this way round, as rho is then positive on the responses
    tokens, mask = feedback.tokens.clone(), feedback.mask.clone()
    tokens[:, 3:], mask[:, 3:] = tokens[:, 3:].roll(2, 0), mask[:, 3:].roll(2, 0)          # x_i with y_{i-2}, by hand
    rho = [train.response_logprob(policy, t, m) - train.response_logprob(reference, t, m) for t, m in
           ((feedback.tokens, feedback.mask), (tokens, mask))]
    z0 = max(0.0, rho[1].mean().item())
    expected = (feedback.labels - torch.sigmoid(0.25 * (rho[0] - z0))).abs()
    value = losses("kto", policy, reference, feedback, train.feedback_items("kto", feedback))
    assert torch.allclose(value, expected, atol=1e-5)
    matched = (feedback.labels - torch.sigmoid(0.25 * (rho[0] - max(0.0, rho[0].mean().item())))).abs()
    assert not torch.allclose(value, matched, atol=1e-5)    # with its own responses: another number


def test_precomputed_reference_logprobs_are_fresh_ones_in_any_batch():
    _, reference, feedback, _ = small()
    once = train.response_logprob(reference, feedback.tokens, feedback.mask)
    order = torch.randperm(len(once), generator=torch.Generator().manual_seed(3))
    fresh = torch.cat([train.response_logprob(reference, feedback.tokens[rows], feedback.mask[rows])
                       for rows in order.split(5)])
    assert torch.allclose(once[order], fresh, atol=1e-5)


# ---------------------------------------------------------------- online
def online(method, policy, reference, world, seed=0):
    tokens, mask = train.fresh_samples(policy, world.prompts, 8, torch.Generator().manual_seed(seed))
    return train.online_losses(method, policy, reference, train.true_reward, tokens, mask, 8, 0.25)


def test_eq07_online_the_offset_is_the_prompts_own_mean(monkeypatch):
    _, reference, _, world = small()
    residuals = []
    monkeypatch.setattr(una, "una_reward_loss", lambda implicit, explicit: residuals.append(explicit - implicit))
    online("una-online", moved(reference), reference, world)
    assert torch.allclose(residuals[0].view(2, 8).mean(1), torch.zeros(2), atol=1e-6)
    assert residuals[0].abs().max() > 0.1


@pytest.mark.parametrize("method", ["una-online", "una-online-score"])
def test_online_losses_depend_on_the_reference(method):
    # A loss that forgets pi_ref has nothing that holds the policy to it.
    _, reference, _, world = small()
    policy = moved(reference)
    gradients = []
    for anchor in (reference, policy):
        policy.zero_grad()
        online(method, policy, anchor, world).mean().backward()
        gradients.append(policy.wte.weight.grad.clone())
    assert not torch.allclose(*gradients, atol=1e-4)


def test_eq09_online_regresses_scores():
    _, reference, _, world = small()
    policy = moved(reference)
    x = world.prompts.repeat_interleave(8, 0)
    y, y_mask = train.sample(policy, x, data.MAX_TOKENS, data.EOT, torch.Generator().manual_seed(0))
    tokens, mask = data.join(x, y, y_mask)
    rho = train.response_logprob(policy, tokens, mask) - train.response_logprob(reference, tokens, mask)
    expected = (torch.sigmoid(0.25 * rho) - torch.sigmoid(data.reward(x, y))) ** 2
    assert torch.allclose(online("una-online-score", policy, reference, world), expected, atol=1e-6)


def test_the_real_loop_reaches_the_closed_form_optimum_in_a_world_of_15_responses(monkeypatch):
    # {a, b, end}, three tokens, two prompts, float64: the GPT, the losses and the loop of train.py, with another language.
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.9, -1.2, 0.4, 0.0, 0.7, -0.3, 1.5, -0.8, 0.2, 0.6, -0.1, 1.1]).double()
    responses, masks = all_responses(3, 3, 2)
    code = {tuple(row): i for i, row in enumerate(responses.tolist())}
    prompts = torch.tensor([[0, 1], [1, 1]])
    monkeypatch.setattr(data, "ENCODING", SimpleNamespace(n_vocab=3))
    monkeypatch.setattr(data, "MAX_TOKENS", 3)
    monkeypatch.setattr(data, "PROMPT_TOKENS", 2)
    monkeypatch.setattr(data, "EOT", 2)
    monkeypatch.setattr(data, "encode_prompts", lambda texts: prompts)
    monkeypatch.setattr(data, "reward", lambda x, y: torch.stack(
        [rewards[code[tuple(row)]] * (1 - 2 * first) for first, row in zip(x[:, 0], y.tolist())]))
    torch.manual_seed(0)
    reference = GPT(GPTConfig(3, 5, 2, 2, 16)).double().requires_grad_(False)
    reference.wte.weight *= 10                                 # tells its prompts apart, as a trained one does
    world = train.World(reference, ["", ""], 0.5, CPU)
    assert world.ref_logprobs.exp().sum(1) == pytest.approx([1, 1], abs=1e-12)
    tokens, mask = data.join(prompts.repeat_interleave(len(responses), 0), responses.repeat(2, 1), masks.repeat(2, 1))
    feedback = SimpleNamespace(tokens=tokens, mask=mask, other_tokens=tokens, other_mask=mask, pairs=torch.tensor([[0, 1]]))
    settings = train.Settings(steps=300, batch=128, beta=0.5, evaluations=1)
    monkeypatch.setitem(train.METHODS, "una-online", (5e-3, 1.0))
    _, logprobs, entry = train.align("una-online", 0, settings, reference, feedback, world)
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.5)
    assert entry["curve"][0]["regret"] > 0.2
    assert entry["train"]["regret"] < 0.01
    assert (logprobs.exp() - best.exp()).abs().sum(1).max() / 2 < 0.1          # total variation


# ---------------------------------------------------------------- the loop
def test_una_pair_and_dpo_end_in_the_same_weights():
    settings, reference, feedback, world = small(steps=30)
    ends = [train.align(method, 0, settings, reference, feedback, world)[0].state_dict() for method in ("una-pair", "dpo")]
    assert max((ends[0][name] - ends[1][name]).abs().max().item() for name in ends[0]) <= 1e-6
    assert max((ends[0][name] - reference.state_dict()[name]).abs().max().item() for name in ends[0]) > 1e-3


@pytest.mark.parametrize("method", train.METHODS)
def test_the_reference_never_changes_and_the_policy_does(method):
    settings, reference, feedback, world = small(steps=2)
    before = {name: weight.clone() for name, weight in reference.state_dict().items()}
    policy, logprobs, _ = train.align(method, 0, settings, reference, feedback, world)
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert not torch.equal(policy.wte.weight, reference.wte.weight)
    assert torch.equal(logprobs, world.logprobs(policy))                        # the figures are those of the final weights


def test_state_bytes_count_every_model_in_memory():
    # Adam: a weight, a gradient and two moments of 4 bytes for each parameter, and a step count for each tensor.
    settings, reference, feedback, world = small(steps=1)
    count, tensors = sum(p.numel() for p in reference.parameters()), len(list(reference.parameters()))
    offline = train.align("una-score", 0, settings, reference, feedback, world)[2]["state_bytes"]
    online = train.align("una-online", 0, settings, reference, feedback, world)[2]["state_bytes"]
    assert offline == 16 * count + 4 * tensors
    assert online == offline + 4 * count                                        # the reference as well
    # PPO trains a value model of the same size and a scalar head; with a reward model UNA needs at most 0.6 of its memory.
    reward_model = train.train_reward_model(settings, 0, reference, feedback)
    ppo, una_online = (train.align(method, 0, settings, reference, feedback, world, reward_model)[2]["state_bytes"]
                       for method in ("ppo", "una-online"))
    head = settings.n_embd + 1
    assert una_online == online + 4 * (count + head)
    assert ppo == 2 * offline + 16 * head + 8 + 4 * count + 4 * (count + head)
    assert una_online / ppo <= 0.601


def test_learning_rate_climbs_then_falls_to_zero_but_never_is():
    rates = []
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(1, 101):
        train.descend(optimizer, weight.sum(), 2.0, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert min(rates) > 0 and max(rates) == rates[4] and rates[-1] == pytest.approx(0.02)
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)


def test_batches_cover_an_epoch_without_repetition():
    stream = train.batches(torch.arange(10), 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert len(next(train.batches(torch.arange(2), 5, torch.Generator()))) == 2   # fewer items than a batch


# ---------------------------------------------------------------- results.json, weights, report
def test_results_hold_what_is_promised(tiny):
    _, results = tiny
    assert set(results) >= {"settings", "versions", "device", "runs"}
    assert set(results["settings"]) == {item.name for item in fields(train.Settings)}
    assert [(run["seed"], run["method"]) for run in results["runs"]] == [(1, method) for method in train.METHODS]
    for run in results["runs"]:
        assert run["beta"] == 0.25 and run["method_beta"] == 0.25 * train.METHODS[run["method"]][1]
        assert run["seconds"] > 0 and run["state_bytes"] > 0
        for split in ("train", "heldout"):
            figures = run[split]
            assert set(figures) == {"reward", "kl", "objective", "optimum", "regret", "frontier_reward", "residual_variance"}
            assert figures["objective"] == pytest.approx(figures["reward"] - run["beta"] * figures["kl"], abs=1e-9)
            assert figures["regret"] == pytest.approx(figures["optimum"] - figures["objective"], abs=1e-9)
            assert figures["regret"] > -1e-6 and figures["reward"] <= figures["frontier_reward"] + 1e-5
        steps = [point["step"] for point in run["curve"]]
        assert steps == [0, 1, 3] and run["curve"][0]["seconds"] == 0
        assert run["curve"][-1]["regret"] == run["train"]["regret"] and run["curve"][-1]["seconds"] == run["seconds"]


def test_every_curve_begins_at_the_reference(tiny):
    _, results = tiny
    start = results["landmarks"][0]["train"]
    assert results["landmarks"][0]["method"] == "reference" and start["kl"] == 0
    assert all(run["curve"][0]["objective"] == start["objective"] for run in results["runs"])


def test_saved_weights_give_the_reported_figures_again(tiny):
    folder, results = tiny
    def load(name):
        saved = torch.load(folder / name, weights_only=True)
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(saved["weights"])
        return model
    world = train.World(load("reference-1.pt"), data.HELDOUT_PROMPTS[:1], 0.25, CPU)
    run = next(run for run in results["runs"] if run["method"] == "una-online")
    assert world.evaluate(world.logprobs(load("una-online-1.pt"))) == pytest.approx(run["heldout"], abs=1e-9)


def test_same_seed_same_results_whatever_else_runs(tiny, tmp_path):
    # Runs must not depend on each other: other methods, another order, the same numbers.
    _, results = tiny
    again = run(tmp_path, "--methods", "una-online,kto,una-mixed", "--seeds", "2")
    expected = {run["method"]: run for run in results["runs"]}
    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(v) for key, v in value.items() if key != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value
    first, second = again["runs"][:3], again["runs"][3:]
    assert [entry["method"] for entry in second] == ["una-online", "kto", "una-mixed"]
    for entry, other in zip(second, first):
        assert timeless(entry) == timeless(expected[entry["method"]])
        assert entry["train"] != other["train"]                                 # another seed is another run
    assert "regret +-" in train.table(again, "train")


def test_pictures_are_there_and_nothing_half_written_is(tiny):
    folder, _ = tiny
    for name in ("frontier.png", "regret-over-time.png", "implicit-against-explicit.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(folder.glob("*.part"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "results.json"
    target.write_text("old")
    def fail(partial):
        Path(partial).write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError):
        train.save(str(target), fail)
    assert target.read_text() == "old"


def test_the_table_shows_every_method_once_with_its_figures(tiny):
    _, results = tiny
    lines = train.table(results, "heldout").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["reference", *train.METHODS, "optimum"]
    kto = next(run["heldout"] for run in results["runs"] if run["method"] == "kto")
    line = next(line for line in lines if line.startswith("kto"))
    assert line.split()[1:4] == [f"{kto[key]:.3f}" for key in ("reward", "kl", "objective")]
    assert lines[1].split()[-2:] == ["-", "-"] and lines[-1].count("100.0%") == 2


def test_progress_is_for_terminals_alone(capsys, monkeypatch):
    train.show("step 1")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.show("step 2")
    assert "step 2" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("arguments, told", [
    ("--methods una-pear", "una-pear"), ("--methods dpo,dpo", "twice"), ("--methods ,", "unknown method"),
    ("--seeds 0", "--seeds"), ("--seed -1", "--seed"), ("--seeds many", "many"), ("--beta 0", "--beta"),
    ("--beta -1", "--beta"), ("--beta nan", "--beta"), ("--beta inf", "--beta"), ("--steps 0", "--steps"),
    ("--steps 1.5", "1.5"), ("--batch 23", "--batch"), ("--judged 25", "--judged"), ("--judged 0", "--judged"),
    ("--n-embd 10 --n-head 4", "--n-embd"), ("--device tpu", "tpu"), ("--reward fame", "fame"),
    ("--offset some", "some"), ("--offset batch", "--offset"), ("--offset prompt --methods una-score,kto", "--offset"),
    ("--claims --seeds 3", "--seeds"), ("--claims --methods kto", "--methods"),
    ("--evaluations 0", "--evaluations"), ("--reference-steps 0", "--reference-steps"), ("--frobnicate", "--frobnicate"),
])
def test_bad_input_is_one_line_and_status_2(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments.split(), "--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


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


def test_from_the_shell_errors_have_no_traceback_and_help_names_every_flag():
    wrong = subprocess.run([sys.executable, "train.py", "--methods", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("train.py: ") and wrong.stderr.count("\n") == 1
    told = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not wrong.stdout and all("--" + item.name.replace("_", "-") in told for item in fields(train.Settings))


def test_every_setting_is_read():
    source = (ROOT / "train.py").read_text()
    for item in fields(train.Settings):
        assert f"settings.{item.name}" in source or item.name == "quick", item.name
