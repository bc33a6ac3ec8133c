"""How many judgements, and what a reward model costs: what is run, and what is measured."""
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import data
import models
import short_train
import train
import una
from lab import budget, budget_tables, claims, compare, exact, rewards, variants
from lab.variants import Variant
from model import ScalarGPT
from short_train import small

A, B, END = range(3)


def reward_gpt(model, seed=0):
    """A reward model that likes some responses more than others."""
    reward_model = ScalarGPT(model).to(model.wte.weight.dtype)
    torch.manual_seed(seed)
    torch.nn.init.normal_(reward_model.scalar.weight)
    torch.nn.init.normal_(reward_model.scalar.bias)
    return reward_model.requires_grad_(False)


# ---------------------------------------------------------------- a model's rewards, listed
# With words a and b, and at most three of them, there are 1 + 2 + 4 + 8 = 15 responses.
FIFTEEN = [[END], [A, END], [B, END],
           *([x, y, END] for x in (A, B) for y in (A, B)),
           *([x, y, z] for x in (A, B) for y in (A, B) for z in (A, B))]


def test_a_models_listed_rewards_are_those_it_gives_the_same_strings_one_by_one():
    reward_model, prompt = reward_gpt(models.abc()), torch.tensor([B, A, A])
    listed = exact.all_rewards(reward_model, prompt, 3, END)
    one_by_one = [reward_model(torch.cat([prompt, torch.tensor(response)])[None])[0, -1].item()
                  for response in FIFTEEN]
    assert listed.tolist() == pytest.approx(one_by_one, abs=1e-10)
    assert len({round(value, 6) for value in one_by_one}) == 15
    tokens, mask = exact.all_responses(3, 3, END)
    assert [row[kept].tolist() for row, kept in zip(tokens, mask)] == FIFTEEN


def test_in_the_toys_language_listed_rewards_are_what_online_methods_are_given():
    reward_model = reward_gpt(models.toy_gpt())
    prompt = data.encode_prompts(["calm wind :"])
    listed = exact.all_rewards(reward_model, prompt[0], data.MAX_TOKENS, data.EOT)
    responses, mask = exact.all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    assert len(listed) == len(responses)
    rows = torch.cat([torch.arange(0, len(responses), 997), torch.arange(700)])
    given = train.model_reward(reward_model, *data.join(
        prompt.expand(len(rows), -1), responses[rows], mask[rows]))
    assert torch.allclose(listed[rows], given, atol=1e-4)


@pytest.fixture
def fifteen():
    """World of 15 responses to two prompts, by hand: a namespace as exact.World."""
    normal = torch.Generator().manual_seed(0)
    ref_logprobs = torch.randn(2, 15, generator=normal).double().log_softmax(1)
    judged = torch.randn(2, 15, generator=normal).double()
    by_model = judged + torch.randn(2, 15, generator=normal).double()
    world = SimpleNamespace(ref_logprobs=ref_logprobs, rewards=judged, beta=0.5, levels=None,
                            level_logprobs=None, prompts=torch.zeros(2, 3),
                            optimum=una.optimal_policy(ref_logprobs, judged, 0.5)[1])
    return world, by_model


def by_hand(world, rewards, beta):
    """The optimum of rewards, listed, and its J under the judge: means over the prompts."""
    total = 0.0
    for ref, r, judged in zip(world.ref_logprobs.exp(), rewards, world.rewards):
        weights = [p * math.exp(v / beta) for p, v in zip(ref, r)]
        pi = [weight / sum(weights) for weight in weights]
        kl = sum(p * math.log(p / q) for p, q in zip(pi, ref))
        total += sum(p * v for p, v in zip(pi, judged)) - world.beta * kl
    return total.item() / len(rewards)


def test_the_ceiling_is_the_listed_rewards_optimum_evaluated_under_the_judge(fifteen):
    world, by_model = fifteen
    best = by_hand(world, world.rewards, 0.5)
    start = (world.ref_logprobs.exp() * world.rewards).sum(1).mean().item()
    for multiple, share in rewards.ceilings(world, by_model).items():
        reached = by_hand(world, by_model, multiple * 0.5)
        assert share == pytest.approx((best - reached) / (best - start), abs=1e-12)
    assert rewards.ceilings(world, world.rewards)[1] == pytest.approx(0, abs=1e-12)
    # A level for each prompt is nothing to a policy, so a reward model need not know it.
    shifted = by_model + torch.tensor([[3.0], [-7.0]])
    assert rewards.ceilings(world, shifted)[2] == pytest.approx(
        rewards.ceilings(world, by_model)[2], abs=1e-12)


def test_by_the_models_measure_its_optimum_loses_nothing_and_the_reference_all(fifteen):
    world, by_model = fifteen
    measure = rewards.as_rewarded(world, by_model, 1.0)
    best = una.optimal_policy(world.ref_logprobs, by_model, 1.0)[0]
    assert rewards.lost_share(measure, best) == pytest.approx(0, abs=1e-12)
    assert rewards.lost_share(measure, world.ref_logprobs) == 1
    reached = exact.evaluate(measure, world.ref_logprobs)
    assert reached["reward"] == pytest.approx(
        (world.ref_logprobs.exp() * by_model).sum(1).mean().item())
    assert (world.beta, world.rewards.equal(by_model)) == (0.5, False)       # as it was


# ---------------------------------------------------------------- runs
@pytest.fixture
def saved(tmp_path, monkeypatch):
    """small() in a file, in short_train's language: (settings, path)."""
    for name, value in short_train.LANGUAGE.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:2])
    small.cache_clear()
    shared = small()
    small.cache_clear()
    path = str(tmp_path / "shared.pt")
    torch.save(shared, path)
    return replace(shared.settings, judged=96), path


def test_a_run_on_a_reward_model_is_measured_by_the_model_and_by_the_judge(saved):
    settings, path = saved
    cell = dict(learning_rate=1e-2, steps=7, beta=2.0)
    found = rewards.run_on_model(settings, 0, cell, path, {
        "una-online": dict(learning_rate=1e-2, leave_one_out=True),
        "ppo": dict(learning_rate=1e-2, epochs=1, divide=False)})["model"]
    shared = train.load(path)
    reward_model = train.train_reward_model(replace(settings, steps=7), 0, shared.reference,
                                            shared.feedback, 1e-2)
    world = shared.worlds["train"]
    listed = torch.stack([exact.all_rewards(reward_model, prompt, data.MAX_TOKENS, data.EOT)
                          for prompt in world.prompts]).double()
    assert dict(found["ceilings"])[2.0] == pytest.approx(rewards.ceilings(world, listed)[2.0])
    optimum, best = una.optimal_policy(world.ref_logprobs, listed, 0.5)
    assert found["ceiling"]["by_model"]["regret"] == pytest.approx(0, abs=1e-9)
    assert found["ceiling"]["train"]["reward"] == pytest.approx(
        (optimum.exp() * world.rewards).sum(1).mean().item())
    method = train.METHODS["una-online"]._replace(beta=2.0, learning_rate=1e-2)
    policies = []

    class Last(exact.Observer):
        def __call__(self, step, seconds, loss, policy):
            policies.append(exact.policy_logprobs(policy, world.prompts))

        def report(self):
            return {}

    method = method._replace(loss=variants.method_of(
        Variant("una-online"), dict(leave_one_out=True)).loss)
    shared.reward_model = reward_model
    train.run_method(replace(settings, reward="model"), 0, "una-online", shared, method, Last)
    entry, (logprobs,) = found["runs"]["una-online"], policies
    assert entry["method_beta"] == 0.5 and entry["reward_source"] == "model"
    reward = (logprobs.exp() * listed).sum(1).mean().item()
    kl = (logprobs.exp() * (logprobs - world.ref_logprobs)).sum(1).mean().item()
    assert entry["by_model"]["reward"] == pytest.approx(reward)
    assert entry["by_model"]["regret"] == pytest.approx(best.mean().item() - reward + 0.5 * kl)
    assert entry["train"]["objective"] == pytest.approx(
        (logprobs.exp() * world.rewards).sum(1).mean().item() - 0.25 * kl)
    assert {*found["runs"]} == {"una-online", "ppo"} and "samples" not in entry


def test_a_glance_has_the_ceilings_of_one_prompt_of_each_mood(saved):
    settings, path = saved
    found = rewards.glance(settings, 0, dict(learning_rate=1e-2, steps=7), path)["model"]
    whole = rewards.run_on_model(settings, 0, dict(learning_rate=1e-2, steps=7, beta=1), path, {})
    world = rewards.part_of(train.load(path).worlds["train"], slice(None, None, 3))
    assert len(world.prompts) == 1                               # small() has two
    assert [multiple for multiple, _ in found["ceilings"]] == [*rewards.BETAS]
    assert found["ceilings"] != whole["model"]["ceilings"]
    moods = [prompt.split()[0] for prompt in data.PROMPTS if prompt not in data.HELDOUT_PROMPTS]
    assert len({*moods[::3]}) == 4


def test_what_is_tuned_at_each_size():
    for grids in (budget.GRIDS, budget.MODEL_GRIDS):
        for (_, size), grid in grids.items():
            cells = claims.cells_of(grid)
            trained = {tuple(pair for pair in cell if pair[0] != "beta") for cell in cells}
            assert 9 <= len(cells) <= 27 and len(trained) >= 4 and 1 in grid["beta"]
            assert size in (1200, 9600, 76_800)
    assert {variant.method for variant, _ in budget.GRIDS} == {
        "dpo", "kto", "una-binary-bce", "una-binary-offset", "una-score", "una-score-offset",
        "una-mixed"}
    assert all(variant.level == 1 and variant.reward == "judge" for variant, _ in budget.GRIDS)


# ---------------------------------------------------------------- the real thing, in miniature
def test_a_miniature_is_interrupted_resumed_and_the_same_as_one_in_a_piece(
        monkeypatch, tmp_path, capsys):
    for name, value in short_train.LANGUAGE.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.PROMPTS[1:5])
    for name in ("GRIDS", "MODEL_GRIDS"):
        monkeypatch.setattr(budget, name, {
            (variant, min(size, 48)): {knob: values[:1 + (knob == "beta")] if knob != "steps"
                                       else (2,) for knob, values in grid.items()}
            for (variant, size), grid in getattr(budget, name).items()
            if variant in ("reward model", budget.MIXED) or variant.method.startswith("una-score")})
    monkeypatch.setattr(budget, "SIZES", (48,))
    for module in (budget, claims):
        monkeypatch.setattr(module, "TUNING_SEEDS", range(100, 102))
        monkeypatch.setattr(module, "REPORTED_SEEDS", range(21, 23))
    monkeypatch.setattr(claims, "KEPT", (1,))
    monkeypatch.setattr(budget, "MOVES", 0)
    settings = train.Settings(steps=2, judged=48, reference_steps=8, evaluations=2, n_layer=1,
                              n_head=1, n_embd=8, batch=48)
    cells = {"una-online": dict(learning_rate=1e-3, leave_one_out=False),
             "ppo": dict(learning_rate=1e-3, epochs=1, divide=False)}
    tuned = [dict(method=name, offset="zero", level=0.0, reward=source, cell=cell, best=True)
             for name, cell in cells.items() for source in ("judge", "model")]
    run_variant, calls = variants.run_variant, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return run_variant(*arguments)

    def main(out):
        (tmp_path / out).mkdir(exist_ok=True)
        (tmp_path / out / "claims.json").write_text(json.dumps(dict(tuning=tuned)))
        return budget.main(["--device", "cpu", "--jobs", "1", "--out", str(tmp_path / out)],
                           settings)

    monkeypatch.setattr(variants, "run_variant", interrupted)
    assert main("a") == 130
    assert "interrupted in " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(variants, "run_variant", run_variant)
    assert main("a") == main("b") == 0
    a, b = (json.loads((tmp_path / out / "budget.json").read_text("utf-8"),
                       object_hook=short_train.timeless) for out in "ab")
    assert a == b
    assert len(a["runs"]) == 2 * (len(budget.GRIDS) + 1 + 2)     # the exact offset; the curves
    assert {entry["offset"] for entry in a["runs"]} == {"zero", "estimated", "learned", "exact"}
    assert [model["seed"] for model in a["models"]] == [21, 22]
    assert all({*model["runs"]} == {"una-online", "ppo"} for model in a["models"])
    assert {row["method"] for row in a["tuning"] if row["best"]} == {
        *(variant.method for variant, _ in budget.GRIDS), "reward model"}
    assert all(entry["level"] == 1 for entry in a["runs"])


# ---------------------------------------------------------------- tables and pictures
def test_who_needs_how_many_is_read_off_the_medians_on_a_log_scale():
    points = [(1200, [60.0, 80.0, 70.0]), (9600, [20.0, 90.0, 20.0]), (76_800, [2.0, 1.0, 3.0])]
    value, text = budget_tables.needed(points, 50)               # from 70 to 20 %
    assert value == pytest.approx(1200 * 8 ** (math.log(70 / 50) / math.log(70 / 20)))
    assert text == "2,100"
    value, text = budget_tables.needed(points, 90)               # from 20 to 2 %
    assert value == pytest.approx(9600 * 8 ** (math.log(2) / math.log(10))) and text == "18,000"
    assert budget_tables.needed(points, 99) == (math.inf, "> 76,800")
    assert budget_tables.needed(points, 20) == (1200, "≤ 1,200")
    rising = [(1200, [5.0]), (9600, [50.0]), (76_800, [80.0])]   # more may be worse
    assert budget_tables.needed(rising, 90) == (1200, "≤ 1,200")
    assert budget_tables.needed([(1200, [math.inf]), (9600, [1.0])], 90)[0] == 9600


def test_a_pair_is_one_judgement_of_two_responses():
    assert budget_tables.both_ways(2345.0, "2,300", 1) == "2,300"
    assert budget_tables.both_ways(2345.0, "2,300", 1 / 2) == "2,300 (1,200)"
    assert budget_tables.both_ways(1200, "≤ 1,200", 5 / 6) == "≤ 1,200 (≤ 1,000)"
    assert budget_tables.both_ways(math.inf, "> 76,800", 1 / 2) == "> 76,800"
    weights = {name: weight for name, _, _, weight in budget_tables.STORED}
    kinds = {name: train.METHODS[method].feedback
             for name, method, _, _ in budget_tables.STORED}
    assert {name for name, weight in weights.items() if weight == 1 / 2} == {
        name for name, kind in kinds.items() if kind == "pairs"}
    feedback = train.collect_feedback(train.Settings(device="cpu", judged=96), 0,
                                      small().reference)
    batch = next(data.stored_batches("mixed", feedback, 10**6, 0))   # all of it
    items = len(batch.chosen) + len(batch.binary) + len(batch.scored)
    assert items == pytest.approx(weights["una-mixed"] * 96, abs=2)  # but for identical pairs


LAB = Path(budget.__file__).parent
CLAIMS, RESULTS = (json.loads((LAB / name).read_text(encoding="utf-8"))
                   for name in ("claims.json", "budget.json"))


def shares(method, offset, size, like=None):
    """Lost, in percent, of the reported seeds."""
    return compare.lost(budget_tables.pick(CLAIMS, RESULTS, method, offset, size, like))


def test_budget_json_is_complete():
    assert RESULTS["predictions"] == budget.PREDICTIONS
    seeds = [*claims.REPORTED_SEEDS]
    for variant, size in budget.GRIDS:
        runs = budget_tables.pick(CLAIMS, RESULTS, variant.method, variant.offset, size)
        assert [entry["seed"] for entry in runs] == seeds, (variant, size)
        (best,) = [row for row in RESULTS["tuning"] if row["best"] and (
            row["method"], row.get("offset"), row["judged"])
            == (variant.method, variant.offset, size)]
        assert runs[0]["cell"] | dict(steps=runs[0]["steps"]) == best["cell"]
    for size in budget_tables.SIZES:
        assert [model["seed"] for model in budget_tables.models(RESULTS, size)] == seeds
    for name in budget.ONLINE:
        assert sum(entry["method"] == name for entry in RESULTS["runs"]) == 8


def test_the_figures_of_the_pictures_are_those_of_the_two_files():
    figure = Figure()
    budget_tables.draw_judgements(figure, CLAIMS, RESULTS)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for name, method, offset, _ in budget_tables.STORED:
        expected = [statistics.median(shares(method, offset, size))
                    for size in (1200, 9600, 76_800)]
        assert lines[name] == pytest.approx(expected), name
    for name in budget.ONLINE:
        runs = [entry for entry in RESULTS["runs"] if entry["method"] == name]
        last = [100 * entry["curve"][-1]["regret"] / entry["curve"][0]["regret"] for entry in runs]
        assert lines[f"{name}, fresh"][-1] == pytest.approx(statistics.median(last))
    figure = Figure()
    budget_tables.draw_models(figure, CLAIMS, RESULTS)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    for label, entry_of in (("the model's optimum", lambda model: model["ceiling"]),
                            ("ppo on the model", lambda model: model["runs"]["ppo"])):
        expected = [statistics.median(
            100 * entry_of(model)["train"]["regret"] / model["reference"]["train"]["regret"]
            for model in RESULTS["models"] if model["judged"] == size)
            for size in (1200, 9600, 76_800)]
        assert lines[label] == pytest.approx(expected)


def test_what_the_page_says_of_budgets_is_so():
    median = statistics.median
    few = shares("una-score", "learned", 1200)                   # the title of the picture
    assert max(few) < min(shares("una-score", "zero", 76_800))
    assert median(few) < median(shares("dpo", "zero", 76_800))
    for cell_of in (("una-score-offset", "estimated"), ("una-score", "learned")):
        like = budget_tables.pick(CLAIMS, RESULTS, *cell_of, 1200)[0]
        assert median(few) < median(shares("una-score", "exact", 1200, like))
    zero = [median(shares("una-score", "zero", size)) for size in (1200, 9600, 76_800)]
    assert max(zero) < 1.1 * min(zero)
    assert max(shares("una-binary-offset", "learned", 9600)) < min(
        shares("una-binary-bce", "zero", 76_800))
    for model in RESULTS["models"]:                              # tuned for the model's own optimum
        assert dict(map(tuple, model["ceilings"]))[model["cell"]["beta"]] == pytest.approx(
            model["ceiling"]["train"]["regret"] / model["reference"]["train"]["regret"])
        assert model["ceiling"]["by_model"]["regret"] == pytest.approx(0, abs=1e-6)


def test_without_claims_there_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        budget.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("python -m lab.claims makes it")
    (tmp_path / "claims.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        budget.main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and "is not whole" in capsys.readouterr().err
    assert not (tmp_path / "budget.json").exists()
