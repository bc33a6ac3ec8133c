"""The campaigns: what is run and kept, how cells are chosen, what the plans ask for, and what
lab/variants.py trains and measures. All runs are in a language of 651 responses to a prompt."""
import copy
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import data
import train
import una
from helpers import close, gradient_in, moved, near
from lab import __main__ as command
from lab import budget, campaign, exact, figures, noise, online, run, stored, tables, variants
from lab.campaign import REPORTED_SEEDS, TUNING_SEEDS, Run
from model import ScalarGPT
from toy import changed, timeless

LAB = campaign.Lab("", 1, tuple("--n-embd 8 --n-head 1 --n-layer 1 --batch 48 --steps 3 --judged 48"
                                " --reference-steps 8 --device cpu".split()))
pytestmark = pytest.mark.usefixtures("language")                 # of toy.py


def short(method, offset="zero", level=1.0, **fields):
    return Run(method, offset, level, **dict(judged=48, steps=3) | fields)


@functools.cache
def prepared(level=1.0, reward="judge", seed=0):
    """What train.prepare makes, once for all tests. Change nothing of it."""
    its = short("kto", level=level, reward=reward)
    return train.prepare(campaign.settings_of(LAB, its), seed)


def shared(level=1.0, reward="judge"):
    return copy.copy(prepared(level, reward)[0])


def world(split="train"):
    return prepared()[0].worlds[split]


def entry(its):
    made = prepared(its.level, its.reward, its.seed)
    return variants.entry(its, campaign.settings_of(LAB, its), made)


def policy(scale=0.3):
    return moved(shared().reference, scale).double()


def began(its, monkeypatch):
    """What a Run has for policy, batches, value model and f(x) + c when its training begins."""
    measured = mock.Mock(return_value=dict(diverged=""))
    with monkeypatch.context() as patch:
        patch.setattr(train, "measured", measured)
        entry(its)
    return measured.call_args.args[-4:]


RUNS = [short("una-online", seed=5), short("una-score", "estimated", level=0.0),
        short("una-score", "estimated", seed=5)]


def run_of(told, **more):
    """The Run that a row of a grid or an entry is of."""
    fields = {name: told[name] for name in Run._fields if name in told}
    return campaign.at(Run(**fields), tuple(told["cell"].items()), **more)


def test_what_has_ended_is_kept_and_the_same_call_makes_what_is_missing_and_no_more(
        tmp_path, monkeypatch):
    lab, stop, made, make = LAB._replace(folder=str(tmp_path)), {RUNS[2]}, [], variants.entry

    def recorded(its, *rest):
        if its in stop:
            raise KeyboardInterrupt
        made.append(its)
        return make(its, *rest)
    monkeypatch.setattr(variants, "entry", recorded)
    with pytest.raises(KeyboardInterrupt):
        campaign.results(lab, "to be broken", RUNS)
    assert 0 < len(made) < 3 and not [*tmp_path.rglob("*.part")]
    stop.clear()
    told = campaign.results(lab, "goes on", RUNS)
    assert sorted(made) == sorted(RUNS) and [*map(run_of, told)] == RUNS     # each of them once
    for its, one in zip(RUNS, told):
        assert timeless(one).items() >= timeless(entry(its)).items()
    made.clear()
    assert campaign.results(lab, "again", [*RUNS[::-1], RUNS[1]]) == [*told[::-1], told[1]]
    assert not made


def test_a_result_is_named_by_all_that_it_depends_on_the_code_and_versions_too(monkeypatch):
    its = Run("kto")
    other = dict(method="dpo", offset="exact", level=1.0, reward="model", judged=48, steps=3,
                 cell=(("epochs", 2),), seed=1, points=2)
    assert [*other] == [*Run._fields]
    name = lambda its=its, lab=LAB: campaign.path_of(lab, its, ".json")
    names = [name(), name(lab=LAB._replace(flags=())),
             *(name(its._replace(**{field: value})) for field, value in other.items())]
    read = Path.read_bytes
    monkeypatch.setattr(campaign, "code", campaign.code.__wrapped__)         # read anew each time
    assert name(lab=LAB._replace(jobs=3)) == names[0]
    for file in ("una.py", "model.py", "data.py", "train.py", "exact.py", "variants.py"):
        changed = lambda path: read(path) + b"#" * (path.name == file)
        monkeypatch.setattr(Path, "read_bytes", changed)
        names.append(name())
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(run, "versions", lambda: dict(torch="another"))
    assert len({*names, name()}) == len(names) + 1 == 18


@pytest.mark.parametrize("outcome, status, told, files", [
    (dict(runs=[]), 0, "", ["online.json"]),
    (KeyboardInterrupt(), 130, "interrupted. What has ended .*: the same command goes on", []),
    (FileNotFoundError("stored.json"), 2, "python -m lab: --out .*: stored.json", []),
    (json.JSONDecodeError("half", "{", 1), 2, "python -m lab: --out .*: half: line 1 .*", [])])
def test_a_plan_is_written_whole_or_ends_in_one_line(
        outcome, status, told, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PLANS, "online", mock.Mock(side_effect=[outcome]))
    with pytest.raises(SystemExit, match=f"^{status}$"):
        sys.exit(command.main(["online", "--out", str(tmp_path), "--jobs", "1"]))
    assert re.fullmatch(told, capsys.readouterr().err.strip())
    assert [path.name for path in tmp_path.iterdir()] == files


def tuned(grid, lost):
    """What tune says of a grid of kto, and the cells that ran on each seed; lost(cell, seed) tells
    what a run lost."""
    ran = {seed: [] for seed in TUNING_SEEDS}

    def lost_of(lab, title, runs):
        for its in runs:
            assert its == Run("kto", cell=its.cell, seed=its.seed)
            ran[its.seed].append(its.cell)
        return [lost(dict(its.cell), its.seed) for its in runs]
    lost, chosen = campaign.tune(None, {Run("kto"): grid}, lost_of)
    return lost[Run("kto")], dict(chosen[Run("kto")]), ran


def test_all_cells_run_on_two_seeds_the_better_four_on_eight_and_the_least_mean_is_the_best():
    # A breakdown in eight counts: 1 has the least median, and of two seeds the least mean too; 3
    # diverges once. 5 and 6 do not come so far.
    shares = {1: (0,) * 7 + (9,), 2: (1,) * 8, 3: (0,) * 7 + (math.inf,), 4: (1.5,) * 8,
              5: (2, 2) + (0,) * 6, 6: (math.inf,) * 8}
    lost, chosen, ran = tuned(dict(epochs=(1, 2, 3, 4, 5, 6)), lambda cell, seed: (
        shares[cell["epochs"]][seed - 100]))
    assert {len(ran[seed]) for seed in (100, 101)} == {6} and chosen == dict(epochs=2)
    assert all({dict(cell)["epochs"] for cell in ran[seed]} == {1, 2, 3, 4}
               for seed in range(102, 108))
    assert all(tuple(lost[cell]) == shares[dict(cell)["epochs"]][:len(lost[cell])] for cell in lost)
    rows = campaign.rows_of({Run("kto"): lost}, {Run("kto"): (("epochs", 2),)})
    assert [row["lost"][-1] for row in rows] == [9, 1, None, 1.5, 2, None]
    assert [row["cell"]["epochs"] for row in rows if row["best"]] == [2]


def test_a_grid_grows_by_one_value_beyond_the_end_where_its_best_cell_lies_and_no_further():
    rates, betas = (1e-3, 2e-3, 4e-3), (0.5, 1, 2)
    grid = dict(learning_rate=rates, beta_multiple=betas, epochs=(1, 2), anchor=(1,))
    for rate, beta, new in (
            (2e-3, 1, {}), (4e-3, 1, dict(learning_rate=(*rates, 8e-3))),
            (1e-3, 2, dict(learning_rate=(5e-4, *rates), beta_multiple=(*betas, 4)))):
        best = dict(learning_rate=rate, beta_multiple=beta, epochs=2, anchor=1)
        assert campaign.grown(grid, best) == grid | new
    lost, chosen, ran = tuned(grid, lambda cell, seed: (
        abs(cell["beta_multiple"] - 1) - cell["learning_rate"]))
    assert len(lost) == len(ran[100]) == len({*ran[100]}) == 18 + 6
    assert chosen["learning_rate"] == 8e-3


FILES = {name: json.loads((campaign.ROOT / "lab" / f"{name}.json").read_text(encoding="utf-8"))
         for name in ("stored", "online", "budget", "noise")}


def test_a_grid_of_stored_feedback_has_six_cells_and_no_seed_both_tunes_and_reports():
    assert {len({*campaign.cells_of(grid)}) for grid in stored.GRIDS.values()} == {6}
    assert not {*TUNING_SEEDS, *range(20)} & {*REPORTED_SEEDS}
    assert len(REPORTED_SEEDS) == len(TUNING_SEEDS) == 8


def test_the_methods_of_train_have_the_best_cells_of_their_grids():
    for row in FILES["stored"]["tuning"] + FILES["online"]["tuning"]:
        if row["best"] and not row["level"] and row["offset"] != "exact":
            its = Run(row["method"], row["offset"], cell=tuple(row["cell"].items()))
            name = tables.name_of(row["method"], row["offset"])
            assert variants.method_of(its) == train.METHODS[name], name
            if name == "dpo":
                pair = variants.method_of(its._replace(method="una-pair"))
                assert pair == train.METHODS["una-pair"]


@pytest.mark.parametrize("plan", [stored, online, budget, noise])
def test_a_plan_that_finds_each_run_in_its_file_writes_that_file(plan, monkeypatch):
    file, found, asked = FILES[plan.__name__.removeprefix("lab.")], {}, set()
    for row in file["tuning"]:
        for seed, share in zip(TUNING_SEEDS, row["lost"]):
            its = run_of(row, seed=seed)
            told = dict(diverged="") if share is None else dict(train=dict(lost=share))
            if its.method == "reward model":                     # one Run has all betas' optima
                told["beta_multiple"] = row["cell"]["beta_multiple"]
                found.setdefault(budget.without_beta(its), dict(optima=[]))["optima"].append(told)
            else:
                found[its] = told
    for told in file["runs"]:
        found[run_of(told)] = told
    for told in file.get("theory", []):
        found[run_of(told, method="theory")] = told
    for told in file.get("models", []):
        found[run_of(told)] = told
    for told in file.get("reference", []) + file.get("optimum", []):
        blank = dict(frontier=[]) if told["method"] == "optimum" else {}    # the first is kept
        found[Run(told["method"], seed=told["seed"])] = blank | told

    def results(lab, title, runs):
        asked.update(runs)
        return [found[its] for its in runs]
    for module in (campaign, plan):
        monkeypatch.setattr(module, "results", results)
    told = json.loads(json.dumps(plan.settle(campaign.Lab(campaign.ROOT / "lab"))))
    assert told.keys() == file.keys() and asked == found.keys()
    for key in file.keys() - {"versions"}:
        a, b = (sorted(one[key], key=str) if type(one[key]) is list else one[key]
                for one in (told, file))
        assert a == b, key


@pytest.mark.parametrize("beta", [0.5, 0.0625])
def test_the_exact_offset_is_beta_log_z_at_the_losss_own_beta(beta, monkeypatch):
    _, beta_log_z = una.optimal_policy(world().ref_logprobs, world().rewards, beta)
    assert beta_log_z.max() - beta_log_z.min() > 0.3             # no two prompts have the same
    for offset, learned in (("exact", False), ("from zero", True), ("learned", True)):
        its = short("una-score", offset, cell=(("beta_multiple", beta / 0.25),))
        _, batches, _, offsets = began(its, monkeypatch)
        assert offsets.requires_grad == learned
        assert near(offsets.double(), beta_log_z, 1e-6) == (offset == "exact")
        assert (not offsets.any()) == (offset == "from zero")
        batch = next(batches)
        assert torch.equal(batch.offset, offsets[batch.prompt])


def stored_batch(model, share=0.25):
    return next(train.fresh_batches(model, ScalarGPT(model).double(), shared(), 48, 0,
                                    stored=share))


def test_a_share_of_each_prompts_samples_is_drawn_from_its_stored_responses():
    model, feedback = policy(2.0), shared().feedback             # far: it writes other responses
    fresh, mixed = (stored_batch(model, share) for share in (0.0, 0.25))
    assert not fresh.is_old.any() and mixed.is_old.view(3, 16).sum(1).tolist() == [4, 4, 4]
    told = {(*row, *mask) for row, mask in zip(feedback.tokens.tolist(), feedback.mask.tolist())}
    rows = [(*row, *mask) for row, mask in zip(mixed.tokens.tolist(), mixed.mask.tolist())]
    assert {row for row, old in zip(rows, mixed.is_old) if old} <= told
    assert torch.equal(mixed.tokens[~mixed.is_old], fresh.tokens[~mixed.is_old])
    assert torch.equal(mixed.tokens[:, :3], fresh.tokens[:, :3])             # prompt by prompt
    assert torch.equal(mixed.rewards, data.reward(mixed.tokens[:, :3], mixed.tokens[:, 3:]))
    assert close(mixed.ref_logprob, train.logprob_in_chunks(shared().reference, mixed.tokens,
                                                            mixed.mask))


def test_chances_are_the_mean_of_a_loss_over_all_draws():
    def batch_of(name):
        return next(train.stored_batches(train.METHODS[name], shared(), 24, 0, torch.ones(3)))

    def chances(batch, rows, other):
        given = data.reward(batch.tokens[:, :3], batch.tokens[:, 3:])
        return torch.sigmoid(given[rows] - given[other])
    model, beta = policy(), 0.3
    batch = batch_of("una-pair-anchored")
    half = len(batch.tokens) // 2
    swapped = changed(batch, **{name: part.roll(half, 0) for name, part in vars(batch).items()
                                if torch.is_tensor(part)})
    chance = chances(batch, slice(half), slice(half, None))
    expected = (chance * train.una_pair(model, batch, beta)
                + (1 - chance) * train.una_pair(model, swapped, beta))
    assert close(variants.pair_chances(model, batch, beta), expected, 1e-6)
    assert not close(train.una_pair(model, batch, beta), expected, 1e-2)
    batch = batch_of("una-binary-learned")
    ones, zeros = (train.una_binary_bce(model, changed(batch, labels=labels), beta)
                   for labels in (torch.ones(24), torch.zeros(24)))
    assert close(variants.label_chances(model, batch, beta),
                 batch.scores * ones + (1 - batch.scores) * zeros, 1e-6)
    batch = changed(batch_of("una-mixed-estimated"), anchor=0.1)
    sizes, drawn = [*map(len, (batch.chosen, batch.binary, batch.scored))], batch.labels
    (one_way, ups, scores), (other_way, downs, _) = (
        train.una_mixed(model, changed(batch, **how), beta).split(sizes) for how in (
            dict(labels=drawn * 0 + 1),
            dict(labels=drawn * 0, chosen=batch.rejected, rejected=batch.chosen)))
    chance, s = chances(batch, batch.chosen, batch.rejected), batch.scores[batch.binary]
    expected = torch.cat([chance * one_way + (1 - chance) * other_way,
                          s * ups + (1 - s) * downs - s * (1 - s), scores])  # a label's variance
    assert close(variants.mixed_chances(model, batch, beta), expected, 1e-6) and min(sizes) > 0
    assert not close(train.una_mixed(model, batch, beta), expected, 1e-2)


def test_what_is_made_of_stored_samples_beside_the_mean_residual_of_all():
    model = policy()
    batch, old = stored_batch(model), stored_batch(model).is_old
    rho = train.logprob(model, batch.tokens, batch.mask) - batch.ref_logprob
    residual = (batch.rewards - 0.25 * rho).detach()
    means = [residual[i:i + 16][~old[:16]].mean() for i in (0, 16, 32)]      # of its own
    expected = (residual - torch.stack(means).repeat_interleave(16)) ** 2
    assert close(variants.una_online_own(model, batch, 0.25).double(), expected.double(), 1e-6)
    ours, plain = (loss(model, batch, 0.25) for loss in (variants.rloo_weighted, train.rloo))
    assert close(ours / plain, rho.exp().where(old, 1.0).detach(), 1e-5)
    variants.ppo_weighted(model, batch, 0.25)
    own = train.logprob(model, batch.tokens, batch.mask, una.token_logprobs).detach()
    assert torch.equal(batch.old_logprobs[old].float(), batch.ref_logprobs[old])
    assert torch.equal(batch.old_logprobs[~old], own[~old]) and batch.advantages.abs().max() > 0


def test_rloo_and_grpo_take_all_of_a_prompts_samples_for_a_group_and_grpo_divides():
    model, undivided, with_k2 = policy(), *map(variants.LOSSES.get, ("undivided", "undivided, k2"))
    batch = stored_batch(model, 0.0)
    tokens = train.logprob(model, batch.tokens, batch.mask, una.token_logprobs)
    expected = una.rloo_loss(tokens.sum(1), batch.ref_logprob, batch.rewards, 16, 0.25)
    assert close(train.rloo(model, batch, 0.25), expected, 1e-5)
    of_grpo = [una.grpo_loss(tokens, tokens.detach(), batch.ref_logprobs, una.grpo_advantages(
        batch.rewards, 16, divide), batch.mask[:, 3:], 0.25, 0.2, k)
        for divide, k in ((True, 3), (False, 3), (False, 2))]
    for i, loss in enumerate((train.grpo, undivided, with_k2)):
        ours = loss(model, batch, 0.25)
        assert [close(ours, expected, 1e-6) for expected in of_grpo] == [i == 0, i == 1, i == 2]
    named = variants.method_of(Run("grpo", cell=(("loss", "undivided"), ("collapsed", True))))
    assert named == train.METHODS["grpo"]._replace(loss=variants.LOSSES["undivided"])


def test_grpos_theory_is_of_its_cell_and_an_own_mean_in_a_group_of_n_raises_beta_by_1_in_n():
    def lost(beta_multiple, n, **loss):
        cell = tuple(dict(beta_multiple=beta_multiple, **loss).items())
        told = variants.grpo_theory(short("theory", cell=cell), world(), n)
        return [told[name]["lost"] for name in ("train", "grouped")]
    for loss in ("undivided", "undivided, k2"):
        assert lost(1, 4, loss=loss)[1] == pytest.approx(lost(4 / 3, 4, loss=loss)[0], abs=1e-9)
    assert len({round(share, 6) for loss in ({}, dict(loss="undivided"), dict(
        loss="undivided, k2")) for share in lost(2, 4, **loss)}) == 6


def test_a_collapsed_policy_says_one_sentence_about_a_wrong_noun():
    model = copy.deepcopy(shared().reference).requires_grad_(True)
    at = copy.copy(world())
    at.kinds = torch.where(at.rewards < -0.5, exact.KINDS.index("wrong noun"), 0)
    variants.collapse(model, at, steps=200)
    logprobs = exact.policy_logprobs(model, at.prompts)
    top = logprobs.argmax(1)
    assert (logprobs.exp().amax(1) > 0.3).all() and at.ref_logprobs.max().exp() < 0.2
    assert top.tolist() == at.ref_logprobs.where(at.rewards < -0.5, -math.inf).argmax(1).tolist()


def test_eq07_gradient_noise_vanishes_at_the_optimum_and_ppos_does_not():
    # A reward whose optimum is a given policy: r = beta log pi/pi_ref + f(x).
    model, ours = policy(), shared()
    ours.reference = copy.deepcopy(ours.reference).double()

    def noise(loss, optimal=True):
        batches, gradients = train.fresh_batches(model, ScalarGPT(model).double(), ours, 48, 0), []
        for batch in itertools.islice(batches, 8):
            if optimal:
                rho = train.logprob(model, batch.tokens, batch.mask).detach() - batch.ref_logprob
                batch.rewards = 0.25 * rho + batch.tokens[:, 0]
            slopes = gradient_in(model, loss(model, batch, 0.25).mean())
            gradients.append(torch.nn.utils.parameters_to_vector(slopes))
        return torch.stack(gradients).var(0).sum().item()
    for loss in (train.una_online, train.rloo):
        assert noise(loss) < 1e-20 and noise(loss, optimal=False) > 1e-3
    assert noise(train.ppo) > 1e-3              # its values, 0 here, are not the baseline
    assert noise(train.grpo) > 1e-3             # its own optimum is another policy


def test_the_end_is_measured_exactly_with_its_masses_and_how_far_an_offset_is_from_beta_log_z(
        monkeypatch):
    feedback = shared().feedback
    for name, offset in (("una-score", "estimated"), ("una-binary-bce", "learned"),
                         ("una-score", "exact"), ("kto", "zero")):
        its = short(name, offset, steps=32, points=3,
                    cell=(("learning_rate", 1e-2), ("beta_multiple", 2)))
        policy, batches, value, offsets = began(its, monkeypatch)
        train.align(variants.method_of(its), policy, batches, 0.5, 32, value, offsets)
        told, rho = entry(its), train.logprob(policy, feedback.tokens, feedback.mask)
        for split in ("train", "heldout"):
            end = exact.policy_logprobs(policy, world(split).prompts)
            assert told[split].items() >= exact.evaluate(world(split), end).items()
            assert told[split]["mass"] == exact.masses(world(split), end)
        assert [point["step"] for point in told["curve"]] == [0, 1, 6, 32]
        assert told["method_beta"] == 0.5
        assert told["mean_rho"] == pytest.approx((rho - feedback.ref_logprob).mean().item(),
                                                 abs=1e-6)
        assert ("offset_error" in told) == (offset in ("estimated", "learned"))
        if "offset_error" in told:
            _, truth = una.optimal_policy(world().ref_logprobs, world().rewards, 0.5)
            off = offsets.detach() - truth
            assert told["offset_error"] == off.square().mean().sqrt().item() > 1e-3
        if name == "kto":
            rho = train.logprob(policy, feedback.other_tokens, feedback.other_mask)
            assert told["other_rho"] == pytest.approx(
                (rho - feedback.other_ref_logprob).mean().item(), abs=1e-6)
            assert abs(told["other_rho"] - told["mean_rho"]) > 1e-4
        assert "curve" not in entry(its._replace(points=1))


def test_a_run_of_another_size_learns_from_as_much_and_the_prepared_feedback_stays(monkeypatch):
    its = short("una-score", "estimated", judged=24, cell=(("beta_multiple", 1),))
    feedback = train.collect_feedback(campaign.settings_of(LAB, its), 0, shared().reference)
    offsets = train.start_offsets(variants.method_of(its), feedback, 0.25)
    few, more = (began(run, monkeypatch)[-1] for run in (its, its._replace(judged=48)))
    assert torch.equal(few, offsets) and not near(few, more, 1e-3)
    assert len(shared().feedback.tokens) == 48


def test_a_run_that_leaves_the_numbers_says_so_and_has_lost_more_than_any_other():
    for its in (short("kto"), short("una-score", "from zero"), short("una-online")):
        told = entry(its._replace(cell=(("learning_rate", 1e39),)))
        assert [*told] == ["diverged"] and figures.lost(told) == math.inf


def test_a_reward_models_optimum_is_measured_by_the_model_and_by_the_judge():
    its, on = short("reward model", cell=(("learning_rate", 1e-2),), steps=7), shared()
    model = train.train_reward_model(campaign.settings_of(LAB, its), 0, on.reference, on.feedback,
                                     1e-2)
    listed = torch.stack([exact.all_rewards(model, prompt, 2, data.EOT)
                          for prompt in world().prompts]).double()
    seen, (responses, _) = {*map(tuple, on.feedback.tokens.tolist())}, exact.all_responses(
        data.ENCODING.n_vocab, 2, data.EOT)
    judged = torch.tensor([[(*x, *y) in seen for y in responses.tolist()]
                           for x in world().prompts.tolist()])   # the pairs' responses
    assert 0 < judged.sum() < judged.numel()
    told = {of["beta_multiple"]: of for of in entry(its)["optima"]}
    assert [*told] == [0.5, 1, 2, 4, 8]
    for multiple, of in told.items():
        best, _ = una.optimal_policy(world().ref_logprobs, listed, multiple * 0.25)
        assert of["train"] == pytest.approx(exact.evaluate(world(), best)
                                            | exact.lost_parts(world(), best, judged))
        by_model, by_judge = ((rewards * (best.exp() - world().ref_logprobs.exp())).sum(1).mean()
                              for rewards in (listed, world().rewards))
        assert of["gained"] == pytest.approx([by_model.item(), by_judge.item()])
    assert len({round(of["train"]["lost"], 6) for of in told.values()}) == 5
