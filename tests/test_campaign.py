"""The campaigns: what is run and kept, how cells are chosen, what the plans ask for, and what
lab/variants.py trains and measures. All runs are in a language of 651 responses to a prompt."""
import copy
import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import train
from helpers import close, moved, near, normals
from lab import __main__ as command
from lab import budget, campaign, compare, exact, figures, online, run, stored, tables, variants
from lab.campaign import REPORTED_SEEDS, TUNING_SEEDS, Run
from model import ScalarGPT

TRAIN_PROMPTS = data.TRAIN_PROMPTS
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
    """A copy of what a seed's methods share."""
    return copy.copy(prepared(level, reward)[0])


def world(split="train"):
    return prepared()[0].worlds[split]


def entry(its):
    made = prepared(its.level, its.reward, its.seed)
    return variants.entry(its, campaign.settings_of(LAB, its), made)


def policy(scale=0.3):
    return moved(shared().reference, scale).double()


def everything():
    """All stored feedback in a batch, in float64."""
    feedback = shared().feedback
    batch = data.take(feedback, torch.arange(len(feedback.tokens)))
    return SimpleNamespace(**{name: value.double() if value.is_floating_point() else value
                              for name, value in vars(batch).items()})


def trained_by_hand(its, on=None, offsets=None):
    """The policy at the end of a Run, with no one looking."""
    settings, method = campaign.settings_of(LAB, its), variants.method_of(its)
    trained, batches, value, offsets = train.begin(method, settings, its.seed, on or shared(),
                                                   offsets)
    train.align(method, trained, batches, 0.25 * method.beta_multiple, its.steps, value, offsets)
    return trained


# ---------------------------------------------------------------- results
RUNS = [short("una-online", points=2, seed=5), short("una-score", "estimated", level=0.0),
        short("una-score", "estimated", seed=5)]


@pytest.fixture
def made(monkeypatch):
    """The levels that are prepared and the Runs that are made, in order; `stop`: at which Ctrl-C
    comes."""
    log = SimpleNamespace(levels=[], runs=[], stop=None)
    prepare, make = train.prepare, variants.entry

    def recorded_prepare(settings, seed):
        log.levels.append(settings.level)
        return prepare(settings, seed)

    def recorded_entry(its, *rest):
        if its == log.stop:
            raise KeyboardInterrupt
        log.runs.append(its)
        return make(its, *rest)
    monkeypatch.setattr(train, "prepare", recorded_prepare)
    monkeypatch.setattr(variants, "entry", recorded_entry)
    return log


def timeless(told):
    """Without what the clock said, and without look."""
    if isinstance(told, dict):
        return {name: timeless(value) for name, value in told.items()
                if name not in ("seconds", "look")}
    return [timeless(value) for value in told] if isinstance(told, list) else told


def test_results_come_in_order_each_ground_is_prepared_once_and_nothing_is_made_twice(
        tmp_path, made, capsys):
    lab = LAB._replace(folder=str(tmp_path))
    told = campaign.results(lab, "all", RUNS)
    assert sorted(made.levels) == [0.0, 1.0] and sorted(made.runs) == sorted(RUNS)
    expected = [its._asdict() | dict(cell=dict(its.cell)) | entry(its) for its in RUNS]
    assert timeless(told) == timeless(expected)
    made.levels, made.runs = [], []
    assert campaign.results(lab, "again", [*RUNS[::-1], RUNS[1]]) == [*told[::-1], told[1]]
    assert made.levels == made.runs == []
    Path(campaign.path_of(lab, RUNS[1], ".json")).unlink()
    Path(campaign.path_of(lab, campaign.ground(RUNS[1]), ".pt")).unlink()
    assert timeless(campaign.results(lab, "lost", RUNS)) == timeless(told)
    assert (made.levels, made.runs) == ([0.0], [RUNS[1]])
    part, made.runs = campaign.path_of(lab, RUNS[2], ".json"), []
    Path(part).write_text('{"method":', encoding="utf-8")        # half
    assert timeless(campaign.results(lab, "half", RUNS)) == timeless(told)
    assert made.runs == [RUNS[2]] and f"{part} is half or empty" in capsys.readouterr().err


def test_a_result_is_named_by_all_that_it_depends_on():
    its, inner = Run("kto"), Run("ppo")
    other = dict(method="dpo", offset="exact", level=1.0, reward="model", judged=48, steps=3,
                 cell=(("epochs", 2),), seed=1, look=(inner,), points=2)
    assert [*other] == [*Run._fields]
    names = [(LAB, its), (LAB._replace(flags=()), its),
             (LAB, its._replace(look=(inner._replace(seed=1),))),
             *((LAB, its._replace(**{name: value})) for name, value in other.items())]
    assert len({campaign.path_of(*name, ".json") for name in names}) == len(names) == 13


@pytest.mark.parametrize("changed", ["una.py", "model.py", "data.py", "train.py", "lab/exact.py",
                                     "lab/variants.py", "versions", None])
def test_a_change_in_the_code_that_trains_or_in_versions_makes_all_anew(
        changed, monkeypatch, tmp_path):
    def name():
        return Path(campaign.path_of(LAB._replace(folder="any", jobs=3), RUNS[0], ".json")).name
    before, root = Path(campaign.path_of(LAB, RUNS[0], ".json")).name, campaign.ROOT
    monkeypatch.setattr(campaign, "code", campaign.code.__wrapped__)         # read anew each time
    monkeypatch.setattr(campaign, "ROOT", tmp_path)
    (tmp_path / "lab").mkdir()
    for source in campaign.TRAINS:
        shutil.copy(root / source, tmp_path / source)
    if changed == "versions":
        monkeypatch.setattr(run, "versions", lambda: dict(torch="another"))
    elif changed:
        with open(tmp_path / changed, "a", encoding="utf-8") as file:
            file.write("EXTRA = 2\n")
    assert (name() == before) == (changed is None)


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, made):
    told = []
    monkeypatch.setattr(tables, "fill", told.append)
    monkeypatch.setitem(command.PLANS, "online", lambda lab: dict(
        runs=campaign.results(lab._replace(flags=LAB.flags), "miniature", RUNS)))
    monkeypatch.chdir(tmp_path)
    Path("lab").mkdir()
    made.stop = RUNS[2]
    assert command.main(["online", "--jobs", "1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted. What has ended is in lab/parts: the same command goes on")
    assert not Path("lab/online.json").exists() and not told
    assert not [*tmp_path.rglob("*.part")]
    first, made.stop = made.runs[:], None
    assert command.main(["online", "--jobs", "1"]) == 0 and told == ["lab"]
    assert 0 < len(first) < 3 and sorted(made.runs) == sorted(RUNS)          # each of them once
    assert sorted(made.levels) == [0.0, 1.0]
    written = json.loads(Path("lab/online.json").read_text(encoding="utf-8"))["runs"]
    assert [(its["method"], its["level"]) for its in written] == [its[0:3:2] for its in RUNS]


def test_without_a_whole_stored_json_there_is_one_line_and_status_2_at_once(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(campaign, "results", None)               # nothing is run before
    for content in (None, "{"):
        if content:
            (tmp_path / "stored.json").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            command.main(["budget", "--out", str(tmp_path), "--jobs", "1"])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("python -m lab: --out ")
    assert not (tmp_path / "budget.json").exists()


# ---------------------------------------------------------------- cells
def tuned(grids, moves, lost):
    """tune's answer, and the cells that ran on each seed; lost(cell, seed) tells what a run lost.
    """
    ran = {seed: [] for seed in TUNING_SEEDS}

    def lost_of(title, runs):
        for its in runs:
            assert its.look == "lost"
            ran[its.seed].append(its._replace(seed=0, look="end"))
        return [lost(its.cell, its.seed) for its in runs]
    return campaign.tune(grids, moves, lost_of), ran


def test_all_cells_run_on_two_seeds_and_the_better_four_on_all_eight():
    keys = Run("kto"), Run("ppo", level=1.0)
    grid = dict(learning_rate=(1, 2, 3, 4), epochs=(1, 2, 3, 4))
    every, values = campaign.cells_of(grid), torch.rand(16, 8, generator=torch.Generator()).tolist()
    assert len({*every}) == 16 and every[1] == (("learning_rate", 1), ("epochs", 2))
    share = dict(zip(every, values))
    (lost, _), ran = tuned(dict.fromkeys(keys, grid), 0, lambda cell, seed: share[cell][seed - 100])
    four = sorted(every, key=lambda cell: sum(share[cell][:2]))[:4]
    for seed in TUNING_SEEDS:
        cells = every if seed < 102 else four
        assert sorted(ran[seed]) == sorted(key._replace(cell=cell) for key in keys
                                           for cell in cells)
    assert all(share[cell][:len(of)] == of for key in keys for cell, of in lost[key].items())


def test_the_best_has_the_least_mean_of_eight_seeds_so_that_one_breakdown_in_eight_counts():
    # 1 has the least median, of two seeds the least mean too; 3 diverges once, 4 on each seed.
    shares = {1: (0,) * 7 + (9,), 2: (1,) * 8, 3: (0,) * 7 + (math.inf,), 4: 8 * (math.inf,)}
    key, grid = Run("kto"), dict(learning_rate=(1, 2, 3, 4))
    (lost, chosen), _ = tuned({key: grid}, 0, lambda cell, seed: shares[cell[0][1]][seed - 100])
    assert chosen == {key: (("learning_rate", 2),)}
    rows = campaign.rows_of(lost, chosen)
    assert [row["lost"][-1] for row in rows] == [9, 1, None, None]
    assert [row["best"] for row in rows] == [False, True, False, False]
    assert rows[0]["cell"] == dict(learning_rate=1)
    assert figures.lost(dict(diverged="the loss is inf")) == math.inf


def test_a_grid_grows_by_one_value_beyond_the_end_where_its_best_cell_lies_and_no_further():
    grid = dict(learning_rate=(1e-3, 2e-3, 4e-3), beta_multiple=(0.5, 1, 2), epochs=(1, 2))

    def grown(rate, beta):
        best = (("learning_rate", rate), ("beta_multiple", beta), ("epochs", 2))
        new = campaign.grown(grid, best)
        assert new["epochs"] == (1, 2)
        return new["learning_rate"], new["beta_multiple"]
    assert grown(2e-3, 1) == (grid["learning_rate"], grid["beta_multiple"])
    assert grown(4e-3, 1) == ((1e-3, 2e-3, 4e-3, 8e-3), grid["beta_multiple"])
    assert grown(1e-3, 2) == ((5e-4, 1e-3, 2e-3, 4e-3), (0.5, 1, 2, 4))
    assert grown(2e-3, 0.5) == (grid["learning_rate"], (0.25, 0.5, 1, 2))
    assert campaign.grown(dict(anchor=(1,), ramp=(0, 1)), (("anchor", 1), ("ramp", 1))) == dict(
        anchor=(1,), ramp=(0, 1))                                # nothing to go by
    key = Run("kto")
    for moves in (0, 1, 2):
        (lost, chosen), ran = tuned({key: grid}, moves, lambda cell, seed: (
            abs(cell[1][1] - 1) - cell[0][1]))
        assert len(lost[key]) == len(ran[100]) == len(set(ran[100])) == 18 + 6 * moves
        assert dict(chosen[key])["learning_rate"] == 4e-3 * 2 ** moves


# ---------------------------------------------------------------- plans
FILES = {name: json.loads((campaign.ROOT / "lab" / f"{name}.json").read_text(encoding="utf-8"))
         for name in ("stored", "online")}


def test_grids_are_of_a_size_and_no_seed_both_tunes_and_reports():
    for grids, size in ((stored.GRIDS, {6}), (online.GRIDS, {3, 4, 6}), (budget.GRIDS, {2, 3, 4}),
                        (budget.MODEL_GRIDS, {3})):
        assert {len({*campaign.cells_of(grid)}) for grid in grids.values()} == size
    assert {(key.judged, key.level) for key in budget.GRIDS | budget.MODEL_GRIDS} == {
        (size, 1.0) for size in (1200, 9600, 76_800)}
    assert not {*TUNING_SEEDS, *range(20)} & {*REPORTED_SEEDS}
    assert [*REPORTED_SEEDS] == [*range(21, 29)] and len(TUNING_SEEDS) == 8


def test_the_methods_of_train_have_the_best_cells_of_their_grids():
    for row in FILES["stored"]["tuning"] + FILES["online"]["tuning"]:
        if row["best"] and not row["level"] and row["offset"] != "exact":
            its = Run(row["method"], row["offset"], cell=tuple(row["cell"].items()))
            name = compare.name_of(row["method"], row["offset"])
            assert variants.method_of(its) == train.METHODS[name], name
            if name == "dpo":
                pair = variants.method_of(its._replace(method="una-pair"))
                assert pair == train.METHODS["una-pair"]


def run_of(told, **more):
    """The Run that a row of a grid or an entry is of."""
    fields = {name: told[name] for name in Run._fields if name in told}
    return Run(**fields | dict(cell=tuple(told["cell"].items())) | more)


@pytest.mark.parametrize("plan", [stored, online])
def test_a_plan_that_finds_each_run_in_its_file_writes_that_file(plan, monkeypatch):
    file, found, asked = FILES[plan.__name__.removeprefix("lab.")], {}, set()
    for row in file["tuning"]:
        for seed, share in zip(TUNING_SEEDS, row["lost"]):
            found[run_of(row, seed=seed, look="lost")] = (
                dict(diverged="") if share is None else dict(train=dict(lost=share)))
    for told in file["runs"] + file.get("watched", []):
        found[run_of(told, look="zeros" if "zeros" in told else "end")] = told
    for told in file.get("theory", []):
        found[run_of(told, method="theory")] = told
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


# ---------------------------------------------------------------- f(x) + c, and other losses
def test_a_run_is_trained_by_its_method_with_the_knobs_of_its_cell():
    for name, own in train.METHODS.items():
        method, _, last = name.rpartition("-")
        named = last in ("learned", "estimated") and name != "una-reward-estimated"
        its = Run(method.replace("binary", "binary-bce") if named else name, own.offset)
        assert named or variants.method_of(its) == own
        its = its._replace(cell=(("learning_rate", 0.125), ("beta_multiple", 3), ("ramp", 0.5),
                                 ("anchor", 2)))
        assert variants.method_of(its) == own._replace(learning_rate=0.125, beta_multiple=3,
                                                       ramp=0.5, anchor=2)
    for name, loss in variants.LOSSES.items():
        cell = (("loss", name), ("collapsed", True), ("stored", 0.5))
        assert variants.method_of(Run("rloo", cell=cell)) == train.METHODS["rloo"]._replace(
            loss=loss, stored=0.5)


@pytest.mark.parametrize("beta", [0.5, 0.0625])
def test_the_exact_offset_is_beta_log_z_at_the_losss_own_beta(beta):
    weights = world().ref_logprobs.exp() * (world().rewards / beta).exp()
    beta_log_z = beta * weights.sum(1).log()
    assert beta_log_z.max() - beta_log_z.min() > 0.3             # no two prompts have the same
    given = {offset: variants.given_offsets(Run("una-score", offset), shared(), beta)
             for offset in ("exact", "from zero", "learned", "estimated")}
    assert near(given["exact"].double(), beta_log_z, 1e-6)
    assert given["from zero"].requires_grad and not given["from zero"].any()
    assert given["learned"] is None is given["estimated"]


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


def test_what_is_made_of_stored_samples_beside_the_mean_residual_of_all():
    model = policy()
    batch, old = stored_batch(model), stored_batch(model).is_old
    rho = train.logprob(model, batch.tokens, batch.mask) - batch.ref_logprob
    residual = (batch.rewards - 0.25 * rho).detach()
    means = [residual[i:i + 16][~old[:16]].mean() for i in (0, 16, 32)]      # of its own
    expected = (residual - torch.stack(means).repeat_interleave(16)) ** 2
    assert close(variants.una_online_own(model, batch, 0.25).double(), expected.double(), 1e-6)
    # Weights: in the mean a stored response stands for a fresh one.
    ours, plain = (loss(model, batch, 0.25) for loss in (variants.rloo_weighted, train.rloo))
    assert close(ours / plain, rho.exp().where(old, 1.0).detach(), 1e-5)
    variants.ppo_weighted(model, batch, 0.25)
    own = train.logprob(model, batch.tokens, batch.mask, train.una.token_logprobs).detach()
    assert torch.equal(batch.old_logprobs[old].float(), batch.ref_logprobs[old])
    assert torch.equal(batch.old_logprobs[~old], own[~old]) and batch.advantages.abs().max() > 0


def test_rloo_and_grpo_take_all_of_a_prompts_samples_for_a_group_and_grpo_divides():
    model = policy()
    batch = stored_batch(model, 0.0)
    logprob = train.logprob(model, batch.tokens, batch.mask)
    rewards = (batch.rewards - 0.25 * (logprob - batch.ref_logprob)).detach().view(3, 16)
    others = (rewards.sum(1, keepdim=True) - rewards) / 15
    expected = -(rewards - others).flatten() * logprob
    assert close(train.rloo(model, batch, 0.25).double(), expected.double(), 1e-5)
    tokens, ref = train.logprob(model, batch.tokens, batch.mask, train.una.token_logprobs), (
        batch.ref_logprobs)
    groups = batch.rewards.view(3, 16)
    A = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    k3 = (ref - tokens).exp() - 1 - (ref - tokens)
    length = batch.mask[:, 3:].sum(1)
    expected = (0.25 * (k3 * batch.mask[:, 3:]).sum(1) - length * A.flatten()) / length
    assert close(train.grpo(model, batch, 0.25).double(), expected.double(), 1e-5)


def test_grpo_undivided_is_grpo_with_rewards_less_their_groups_mean(monkeypatch):
    model = policy()
    batch = stored_batch(model, 0.0)
    divided = train.grpo(model, batch, 0.25)
    monkeypatch.setattr(torch.Tensor, "std", lambda of, *_, **__: torch.ones(()))
    ones = train.grpo(model, batch, 0.25)                        # divided by 1
    assert close(variants.LOSSES["undivided"](model, batch, 0.25), ones, 1e-3)
    assert not close(divided, ones, 0.1)
    assert not close(variants.LOSSES["undivided, k2"](model, batch, 0.25), ones, 1e-6)


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


# ---------------------------------------------------------------- what is measured
def test_eq07_gradient_noise_vanishes_at_the_optimum_and_ppos_does_not(monkeypatch):
    # pi* itself cannot be had as a GPT; but a reward whose optimum is the policy can:
    # r = beta log pi/pi_ref + f(x).
    model, ours = policy(), shared()
    ours.reference = copy.deepcopy(ours.reference).double()

    def optimal_here(x, y):
        mask = torch.stack([torch.ones(len(y)).bool(), y[:, 0] != data.EOT], dim=1)
        rows = data.join(x, y, mask)
        with torch.no_grad():
            rho = train.logprob(model, *rows) - train.logprob(ours.reference, *rows)
        return 0.25 * rho + x[:, 0]

    def noise(loss):
        batches = train.fresh_batches(model, ScalarGPT(model).double(), ours, 48, 0)
        gradients = [torch.cat([part.flatten() for part in torch.autograd.grad(
            loss(model, next(batches), 0.25).mean(), [*model.parameters()])]) for _ in range(8)]
        return torch.stack(gradients).var(0).sum().item()
    assert min(noise(train.una_online), noise(train.rloo)) > 1e-3
    monkeypatch.setattr(data, "reward", optimal_here)
    assert max(noise(train.una_online), noise(train.rloo)) < 1e-20
    assert noise(train.ppo) > 1e-3              # its values, 0 here, are not the baseline
    assert noise(train.grpo) > 1e-3             # its own optimum is another policy


def test_the_end_is_measured_exactly_and_how_far_an_offset_ended_from_beta_log_z():
    for name, offset in (("una-score", "estimated"), ("una-binary-bce", "learned"),
                         ("una-score", "exact"), ("una-score", "zero")):
        its = short(name, offset, cell=(("learning_rate", 1e-2), ("beta_multiple", 2)))
        truth, told = variants.beta_log_z(shared(), 0.5), entry(its)
        trained = trained_by_hand(its, offsets=truth.float() if offset == "exact" else None)
        for split in ("train", "heldout"):
            end = exact.policy_logprobs(trained, world(split).prompts)
            assert told[split].items() >= exact.evaluate(world(split), end).items()
        of = told["train"]
        assert of["judged"] + of["unjudged"] == pytest.approx(of["lost"], abs=1e-9)
        assert told["curve"][-1]["regret"] == told["train"]["regret"] and told["method_beta"] == 0.5
        assert entry(its._replace(look="lost")) == dict(train=dict(lost=told["train"]["lost"]))
        if offset in ("estimated", "learned"):
            off = torch.tensor(told["offsets"]) - truth
            assert told["offset_error"] == off.square().mean().sqrt().item() > 1e-3
        else:
            assert "offset_error" not in told


def test_a_run_of_another_size_learns_from_as_much_and_the_prepared_feedback_stays():
    its = short("una-score", "estimated", judged=24, cell=(("beta_multiple", 1),))
    feedback = train.collect_feedback(campaign.settings_of(LAB, its), 0, shared().reference)
    offsets = train.start_offsets(variants.method_of(its), feedback, 0.25)
    assert entry(its)["offsets"] == offsets.tolist() != entry(its._replace(judged=48))["offsets"]
    assert len(shared().feedback.tokens) == 48
    flat, raised = shared(level=0.0), shared()                   # a level is in feedback alone
    assert all(map(torch.equal, flat.reference.parameters(), raised.reference.parameters()))
    assert torch.equal(flat.feedback.tokens, raised.feedback.tokens)
    assert not torch.equal(flat.feedback.scores, raised.feedback.scores)


@pytest.mark.parametrize("method, offset", [("kto", "zero"), ("una-score", "from zero"),
                                            ("una-online", "zero")])
def test_a_run_that_leaves_the_numbers_says_so_and_has_lost_more_than_any_other(method, offset):
    for look in ("end", "lost"):
        told = entry(short(method, offset, look=look, cell=(("learning_rate", 1e39),)))
        assert [*told] == ["diverged"] and figures.lost(told) == math.inf


def test_kto_is_counted_where_z0_is_0_and_trains_as_ever():
    its = short("kto", steps=8, judged=192, look="zeros",
                cell=(("learning_rate", 1e-2), ("beta_multiple", 0.5)))
    told, own = entry(its), entry(its._replace(look="end"))
    assert 1 <= told.pop("zeros") <= 8 and timeless(told) == timeless(own)
    noted, loss = variants.counting(train.kto)
    model = policy()
    batch = everything()
    ref_logprob = batch.other_ref_logprob
    for shift in (1e3, -1e3):                                    # the sign of log pi/pi_ref
        batch.other_ref_logprob = ref_logprob + shift
        assert torch.equal(loss(model, batch, 0.3), train.kto(model, batch, 0.3))
    assert noted == [True, False]


def test_a_curve_has_the_mass_of_each_kind_of_string_and_the_end_the_mean_rho():
    its = short("una-score", "estimated", points=3, cell=(("learning_rate", 1e-2),))
    told, trained = entry(its), trained_by_hand(its)
    end = exact.policy_logprobs(trained, world().prompts)
    assert told["curve"][-1]["mass"] == told["train"]["mass"] == exact.masses(world(), end)
    assert told["curve"][0]["mass"] == exact.masses(world(), world().ref_logprobs)
    feedback = shared().feedback
    with torch.no_grad():
        rho = train.logprob(trained, feedback.tokens, feedback.mask) - feedback.ref_logprob
    assert told["mean_rho"] == pytest.approx(rho.mean().item(), abs=1e-6)


# ---------------------------------------------------------------- reward models
def test_a_models_listed_rewards_are_those_it_gives_the_same_strings_one_by_one():
    # Of up to three words, as the strings of two words are then too many for one pass.
    model, prompt = ScalarGPT(policy()).double(), data.encode_prompts(["calm wind :"])
    torch.nn.init.normal_(model.scalar.weight, generator=torch.Generator().manual_seed(0))
    listed = exact.all_rewards(model, prompt[0], 3, data.EOT)
    tokens, mask = exact.all_responses(data.ENCODING.n_vocab, 3, data.EOT)
    values = model(torch.cat([prompt.expand(len(tokens), -1), tokens], dim=1)).detach()
    assert len(listed) == 1 + 25 + 25**2 + 25**3
    assert close(listed, values[torch.arange(len(tokens)), 2 + mask.sum(1)])
    assert len(listed.unique()) > 16_000


def optimum(rewards, beta):
    """pi_ref e^{r/beta} / Z: its logprobs."""
    weights = world().ref_logprobs.exp() * (rewards / beta).exp()
    return (weights / weights.sum(1, keepdim=True)).log()


def share_lost(rewards, beta, ours):
    """By the measure of rewards and beta: what logprobs `ours` lose, sum by sum."""
    ref = world().ref_logprobs
    best, own, start = ((logprobs.exp() * (rewards - beta * (logprobs - ref))).sum()
                        for logprobs in (optimum(rewards, beta), ours, ref))
    return ((best - own) / (best - start)).item()


def test_optima_are_the_listed_rewards_optima_by_the_judges_measure_and_no_level_changes_them():
    other = world().rewards + normals(0)(3, 651)
    expected = {multiple: share_lost(world().rewards, 0.25, optimum(other, multiple * 0.25))
                for multiple in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)}
    for rewards in (other, other + torch.tensor([[3.0], [-7.0], [1.0]])):
        assert dict(variants.optima(world(), rewards)) == pytest.approx(expected)
    judged = variants.optima(world(), world().rewards)
    assert dict(judged)[1] == pytest.approx(0, abs=1e-9)


def test_a_part_of_a_world_is_the_world_of_those_prompts():
    part = variants.part_of(world(), slice(None, None, 2))
    alone = exact.World(shared().reference, data.TRAIN_PROMPTS[::2], 0.25, 1.0)
    logprobs = exact.policy_logprobs(policy(), alone.prompts)
    assert exact.evaluate(part, logprobs) == pytest.approx(exact.evaluate(alone, logprobs))
    assert torch.equal(part.prompts, alone.prompts) and len(world().rewards) == 3
    assert len({prompt.split()[0] for prompt in TRAIN_PROMPTS[::3]}) == 4    # one of each mood


def test_a_run_on_a_reward_model_is_measured_by_the_model_and_by_the_judge():
    cell = (("learning_rate", 1e-2), ("stored", 0.25), ("beta_multiple", 2))
    online = [short("una-online", cell=cell, steps=7), short("ppo", cell=cell[:1], steps=7)]
    its = short("reward model", cell=cell[::2], steps=7, look=tuple(online))
    told, on = entry(its), shared()
    on.reward_model = train.train_reward_model(campaign.settings_of(LAB, its), 0, on.reference,
                                               on.feedback, 1e-2)
    listed = torch.stack([exact.all_rewards(on.reward_model, prompt, 2, data.EOT)
                          for prompt in world().prompts]).double()
    assert told["optima"] == variants.optima(world(), listed)
    end = exact.policy_logprobs(trained_by_hand(online[0], on), world().prompts)
    for name, logprobs in (("reference", world().ref_logprobs), ("optimum", optimum(listed, 0.5)),
                           ("una-online", end)):
        for measure, rewards, beta in (("train", world().rewards, 0.25), ("by_model", listed, 0.5)):
            assert told[name][measure]["lost"] == pytest.approx(
                share_lost(rewards, beta, logprobs), abs=1e-9)
    assert told["optimum"]["by_model"]["lost"] == pytest.approx(0, abs=1e-9)
    seen, (responses, _) = {*map(tuple, on.feedback.tokens.tolist())}, exact.all_responses(
        data.ENCODING.n_vocab, 2, data.EOT)
    judged = torch.tensor([[(*x, *y) in seen for y in responses.tolist()]
                           for x in world().prompts.tolist()])
    parts = exact.lost_parts(world(), optimum(listed, 0.5), judged)  # judged: the pairs' responses
    assert parts.items() <= told["optimum"]["train"].items() and 0 < judged.sum() < judged.numel()
    assert told["una-online"]["method_beta"] == 0.5 and "heldout" not in told["una-online"]
    assert {"by_model", "reward_model", "curve"} <= {*told["ppo"]}
    third = variants.part_of(world(), slice(0, 1))               # each third of three prompts
    assert entry(its._replace(look="lost")) == dict(optima=variants.optima(third, listed[:1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_model_is_accurate_where_it_orders_as_the_judge_does(sign, monkeypatch):
    monkeypatch.setattr(train, "model_reward", lambda model, tokens, mask: sign * data.reward(
        tokens[:, :3], tokens[:, 3:]))
    assert variants.accuracy(shared(), 0) == (sign == 1)


def test_online_runs_on_a_prepared_reward_model_are_rewarded_by_it_and_say_how_good_it_is():
    its = short("una-online", reward="model")
    by_model, by_judge = entry(its), entry(its._replace(reward="judge"))
    assert by_model["train"] != by_judge["train"] and "reward_model" not in by_judge
    assert 0 <= by_model["reward_model"]["accuracy"] <= 1
    assert by_model["state_bytes"] - by_judge["state_bytes"] == sum(
        part.nbytes for part in shared(reward="model").reward_model.parameters())
