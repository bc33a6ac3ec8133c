"""train.py and lab/run.py: batches, losses, the loop, and what a whole run promises."""
import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import data
import toy
import train
import una
from helpers import gpt, gradient_in, moved, near, random_tokens
from lab import exact, run
from model import GPT, GPTConfig, ScalarGPT, sample
from toy import changed, small, timeless

pytestmark = pytest.mark.usefixtures("language")
FRESH = [name for name, method in train.METHODS.items() if method.feedback == "fresh"]


def run_one(name, folder="", shared=None, **settings):
    settings = changed(small().settings, out=str(folder), **settings)
    return train.run_method(settings, 0, name, shared or small())


def load(path):
    saved = torch.load(path, weights_only=True)
    model = GPT(GPTConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model


def rho_of(policy, reference, tokens, mask):
    return (train.logprob(policy, tokens, mask) - train.logprob(reference, tokens, mask)).detach()


def test_after_prompt_and_logprob_are_those_of_the_whole_model_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 4)
    model = gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE)          # float64
    scalar = moved(ScalarGPT(model).double())                    # not 0, as it is at first
    for order in [3] * 5, [9, 2, 2, 9, 0, 15, 2, 9, 9, 1]:
        x = data.encode_prompts([data.PROMPTS[i] for i in order])
        y = random_tokens(len(order), 4, vocab_size=data.EOT)    # 1, 2, 3 or 4 of them count
        tokens, mask = data.join(x, y, torch.arange(4) <= torch.arange(len(order))[:, None] % 4)
        with mock.patch.object(GPT, "hidden", autospec=True, side_effect=GPT.hidden) as hidden:
            train.after_prompt(model, tokens)                    # each prompt once
        assert [call.args[1].shape for call in hidden.mock_calls] == [(len({*order}), 3), y.shape]
        whole = una.sequence_logprob(model(tokens), tokens, mask)
        for of, ours, theirs in (
                (model, train.after_prompt(model, tokens), model(tokens)[:, 2:]),
                (scalar, train.after_prompt(scalar, tokens), scalar(tokens)[:, 2:]),
                (model, train.logprob(model, tokens, mask), whole),
                (model, train.logprob(model, tokens, mask, una.token_logprobs),
                 una.token_logprobs(model(tokens), tokens, mask)[:, 2:])):
            weights = torch.linspace(-1, 2, ours.numel()).double().view_as(ours)     # none alike
            slopes, expected = (gradient_in(of, (weights * output).mean())
                                for output in (ours, theirs))
            assert near(ours, theirs) and all(map(near, slopes, expected))
            assert all(slope.any() for slope in slopes)
        in_chunks = train.logprob_in_chunks(model, tokens, mask)
        assert near(in_chunks, whole) and not in_chunks.requires_grad
        last = [scalar(row[None, :3 + n])[0, -1] for row, n in zip(tokens, mask.sum(1).tolist())]
        assert near(train.model_reward(scalar, tokens, mask), torch.stack(last))


def with_rows():
    """small's feedback and each response's row number, as if no two responses were identical."""
    pairs = torch.arange(96).view(48, 2)
    pairs[::2] = pairs[::2].flip(1)                              # one wins, then the other
    return changed(small().feedback, row=torch.arange(96), pairs=pairs)


def first_batches(n, kind, size, seed=0):
    return [*itertools.islice(data.stored_batches(kind, with_rows(), size, seed), n)]


def test_feedback_is_on_two_responses_of_pi_ref_to_each_training_prompt(monkeypatch):
    for flags, judged in {"--steps 3 --batch 31 --methods dpo": 92, "--judged 4096": 4096}.items():
        assert train.parse(flags.split()).judged == judged, flags                # each seen once
    monkeypatch.setattr(train, "CHUNK", 40)                      # so many at a time: for memory
    settings, reference = changed(small().settings, level=1.0), small().reference
    ours, other = (train.collect_feedback(settings, seed, reference) for seed in (1, 0))
    x = data.encode_prompts([prompt for prompt in data.TRAIN_PROMPTS for _ in range(2)] * 16)
    generator = torch.Generator().manual_seed(1)                 # one stream, not one a chunk
    y, mask = map(torch.cat, zip(*(sample(reference, part, 2, data.EOT, generator)
                                   for part in x.split(40))))
    told = data.feedback_on(x, y, mask, torch.Generator().manual_seed(1), 1.0)
    for name, part in vars(told).items():                        # labels are drawn by the seed, too
        assert torch.equal(getattr(ours, name), part), name
        assert not torch.equal(getattr(other, name), part), name
    assert ours.prompt.tolist() == [0, 0, 1, 1, 2, 2] * 16 and not ours.offset.any()
    assert near(ours.ref_logprob, train.logprob(reference, told.tokens, told.mask), 1e-5)
    mismatched = data.mismatched(told.tokens, told.mask)
    assert all(map(torch.equal, (ours.other_tokens, ours.other_mask), mismatched))
    assert near(ours.other_ref_logprob, train.logprob(reference, *mismatched), 1e-5)


def test_stored_batches_deal_each_response_once_with_what_the_feedback_says_of_it():
    feedback, pairs = with_rows(), {tuple(pair) for pair in with_rows().pairs.tolist()}
    for kind in ("pairs", "binary", "scores", "mixed"):
        batches = first_batches(4, kind, 24)
        assert sorted(torch.cat([batch.row for batch in batches]).tolist()) == [*range(96)], kind
        again, other = (first_batches(1, kind, 24, seed)[0].row for seed in (0, 1))
        assert torch.equal(again, batches[0].row) and not torch.equal(other, again), kind
        for batch in batches:
            for name, part in vars(feedback).items():
                assert name == "pairs" or torch.equal(getattr(batch, name), part[batch.row]), name
            assert len(batch.row) == 24 or kind == "mixed", kind
            if kind == "pairs":
                assert {*zip(*batch.row.view(2, -1).tolist())} <= pairs
            if kind == "mixed":
                said = [batch.chosen, batch.rejected, batch.binary, batch.scored]
                assert sorted(torch.cat(said).tolist()) == [*range(len(batch.row))]
                rows = [batch.row[of].tolist() for of in said]
                assert {*zip(rows[0], rows[1])} <= pairs
                assert all(row // 32 == part for part, of in zip((0, 0, 1, 2), rows) for row in of)
    half = changed(feedback, pairs=feedback.pairs[:24])          # smaller, so that none is missing
    assert len(next(data.stored_batches("pairs", half, 24, 0)).row) == 12
    with pytest.raises(ValueError, match="no pairs among 96 responses"):
        next(data.stored_batches("pairs", changed(feedback, pairs=feedback.pairs[:0]), 24, 0))
    stream = data.shuffled(torch.arange(10), 3, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len({*one}) == 9 for one in passes) and passes[0] != passes[1]


def test_eq10_the_anchor_adds_alpha_times_minus_the_mean_rho_of_both_responses_of_a_pair():
    policy, anchored = moved(small().reference), train.METHODS["una-pair-anchored"]
    batch = next(train.stored_batches(anchored._replace(anchor=0.3), small(), 96, 0,
                                      torch.zeros(3)))
    chosen, rejected = (train.logprob(policy, batch.tokens, batch.mask)
                        - batch.ref_logprob).chunk(2)
    pair = -torch.sigmoid(0.25 * (chosen - rejected)).log()
    loss, both = anchored.loss(policy, batch, 0.25), (chosen + rejected) / 2
    assert near(loss, pair - 0.3 * both, 1e-5)
    for wrong in (0, -0.3 * chosen, -0.3 * 0.25 * both, 0.3 * both):
        assert not near(loss, pair + wrong, 1e-2)
    assert anchored.anchor > 0 == train.METHODS["una-pair"].anchor


def test_una_mixed_is_the_three_losses_with_every_item_weighing_the_same():
    policy, feedback, slopes = moved(small().reference).double(), with_rows(), []
    for n, size in (1, 96), (4, 24), (80, 1):                    # one pass each
        losses = []
        for batch in first_batches(n, "mixed", size):
            batch.anchor = 0.3
            items = [loss(policy, changed(data.take(feedback, batch.row[rows]), anchor=0.3), 0.25)
                     for loss, rows in (
                         (train.una_pair, torch.cat([batch.chosen, batch.rejected])),
                         (train.una_binary_mse, batch.binary),
                         (train.una_score, batch.scored)) if len(rows)]
            losses.append(train.una_mixed(policy, batch, 0.25))
            assert near(losses[-1], torch.cat(items)) and len(items) == (1 if size == 1 else 3)
        slopes.append(gradient_in(policy, torch.cat(losses).sum()))
    for of_parts in slopes[1:]:                                  # micro-batches add up to the whole
        assert all(near(a, b, 1e-10) for a, b in zip(slopes[0], of_parts))


def test_kto_estimates_its_kl_from_the_responses_to_other_prompts():
    # This way round, as rho is then positive on the responses.
    policy, reference, batch = small().reference, moved(small().reference), small().feedback
    own, other = [(batch.tokens, batch.mask), (batch.other_tokens, batch.other_mask)]
    batch = changed(batch, ref_logprob=train.logprob_in_chunks(reference, *own),
                    other_ref_logprob=train.logprob_in_chunks(reference, *other))
    own, other = (rho_of(policy, reference, *rows) for rows in (own, other))
    expected, wrong = ((batch.labels - torch.sigmoid(0.25 * (own - rho.mean().clamp(0)))).abs()
                       for rho in (other, own))
    assert near(train.kto(policy, batch, 0.25), expected, 1e-5) and not near(expected, wrong, 1e-4)


def test_fresh_batches_are_the_policys_samples_with_rewards_of_the_judge_or_of_the_model():
    policy, model = moved(small().reference), moved(ScalarGPT(small().reference), seed=2)
    x = data.encode_prompts(data.TRAIN_PROMPTS).repeat_interleave(8, 0)
    for judge in (None, model):
        shared, generator = changed(small(), reward_model=judge), torch.Generator().manual_seed(0)
        stream = train.fresh_batches(policy, "value", shared, 24, 0, level=1.0)
        for _ in range(2):
            batch, (y, mask) = next(stream), sample(policy, x, 2, data.EOT, generator)
            both = data.join(x, y, mask)
            assert torch.equal(batch.tokens, both[0]) and torch.equal(batch.mask, both[1])
            rewards = (train.model_reward(model, *both) if judge
                       else data.reward(x, y) + data.prompt_level(x, 1.0))
            assert torch.equal(batch.rewards, rewards) and not batch.rewards.requires_grad
            ref = train.logprob(small().reference, *both)
            assert near(batch.ref_logprob, ref, 1e-5) and near(batch.ref_logprobs.sum(1), ref, 1e-5)
            assert (batch.per_prompt, batch.offset, batch.value) == (8, 0, "value")


def test_eq07_eq09_online_take_the_mean_residual_of_a_prompts_samples_for_f_and_c_or_none():
    reference = copy.deepcopy(small().reference).double()
    policy, shared = moved(reference), changed(small(), reference=reference)
    batch = next(train.fresh_batches(policy, None, shared, 9, 0, level=1.0))    # three a prompt
    rho = train.logprob(policy, batch.tokens, batch.mask) - batch.ref_logprob
    residual = (batch.rewards - 0.25 * rho).view(3, 3)
    expected = ((residual - residual.mean(1, keepdim=True)) ** 2).flatten()
    loss = train.una_online(policy, batch, 0.25)
    assert near(loss, expected)
    assert not near(loss, ((residual - residual.mean()) ** 2).flatten(), 0.1)   # over all prompts
    slopes = [gradient_in(policy, of.mean()) for of in (loss, expected)]
    assert all(map(near, *slopes)) and max(slope.abs().max() for slope in slopes[0]) > 1e-2
    scores = (torch.sigmoid(0.25 * rho) - torch.sigmoid(batch.rewards)) ** 2
    assert near(train.una_score(policy, batch, 0.25), scores)


def test_the_real_loop_reaches_the_closed_form_optimum_in_a_world_of_15_responses(monkeypatch):
    # {a, b, end}, three tokens, two prompts, float64: GPT, loss and loop, with another language.
    rewards = (2 * torch.arange(15).double()).sin()
    responses, prompts = exact.all_responses(3, 3, 2)[0], torch.tensor([[0, 1], [1, 1]])
    reward = lambda x, y: (1 - 2 * x[:, 0]) * rewards[           # of b what is worst of a is best
        (y[:, None] == responses).all(2).int().argmax(1)]
    for name, value in dict(ENCODING=SimpleNamespace(n_vocab=3), MAX_TOKENS=3, PROMPT_TOKENS=2,
                            EOT=2, TRAIN_PROMPTS=["", ""], encode_prompts=lambda texts: prompts,
                            reward=reward, GRAMMAR=torch.arange(3)).items():
        monkeypatch.setattr(data, name, value)
    torch.manual_seed(0)
    reference = GPT(GPTConfig(3, 5, 1, 2, 16)).double().requires_grad_(False)
    reference.wte.weight *= 10                   # tells its prompts apart, as a trained one does
    shared = SimpleNamespace(reference=reference, reward_model=None)
    world = exact.World(reference, ["", ""], 0.5)
    policy = copy.deepcopy(reference).requires_grad_(True)
    method = train.Method("fresh", train.una_online, 1e-2, 1)
    train.align(method, policy, train.fresh_batches(policy, None, shared, 128, 0), 0.5, 120)
    logprobs = exact.policy_logprobs(policy, world.prompts)
    best, _ = una.optimal_policy(world.ref_logprobs, world.rewards, 0.5)
    assert exact.evaluate(world, world.ref_logprobs)["regret"] > 0.15
    assert exact.evaluate(world, logprobs)["regret"] < 0.02
    assert (logprobs.exp() - best.exp()).abs().sum(1).max() / 2 < 0.1          # total variation


def test_una_pair_and_dpo_end_in_the_same_weights_and_leave_the_reference_as_it_was(tmp_path):
    reference = small().reference
    before = copy.deepcopy(reference.state_dict())
    for name, between in (("una-pair", []), ("dpo", []), ("una-online", [15]), ("ppo", [15])):
        entry = run_one(name, tmp_path, steps=30)
        first, *_, last = curve = entry["curve"]                 # online methods alone have one
        assert [point["step"] for point in curve] == [0, *between, 30], name
        assert first == train.point(0, 0.0, small().start)
        assert last == train.point(30, entry["seconds"], entry["train"], loss=entry["loss"])
        assert all(map(torch.equal, reference.state_dict().values(), before.values())), name
        assert all(p.grad is None and not p.requires_grad for p in reference.parameters()), name
    start, ours, theirs = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in (
        reference, load(tmp_path / "una-pair-0.pt"), load(tmp_path / "dpo-0.pt")))
    assert near(ours, theirs, 1e-6) and not near(ours, start, 1e-3)


def test_align_looks_after_the_steps_in_at_and_on_its_own_time(monkeypatch):
    clock, losses, seen = itertools.count(), [], []              # a step takes a second

    def loss(*arguments):
        losses.append(train.ppo(*arguments))
        return losses[-1]
    look = lambda *told: seen.append((*told, next(clock)))       # and so does a look
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock.__next__))
    method = train.METHODS["ppo"]._replace(epochs=2, loss=loss)  # a loss for each inner step
    policy, batches, value, _ = train.begin(method, small().settings, 0, small())
    entry = train.align(method, policy, itertools.islice(batches, 5), 0.25, 5, value, None, look,
                        {1, 4, 5})
    steps, seconds, told, _ = zip(*seen)
    losses = [value.mean().item() for value in losses]
    assert steps == seconds == (1, 4, 5) and entry["seconds"] == 5
    assert len({*losses}) == 10 and told == (losses[1], losses[7], losses[9])
    assert (entry["start_loss"], entry["loss"]) == (losses[0], losses[-1])


def test_state_bytes_count_every_model_in_memory():
    # Adam: a weight, a gradient and two moments of 4 bytes for each, and a step count for a tensor.
    sizes = [p.numel() for p in small().reference.parameters()]
    policy, frozen, head = 16 * sum(sizes) + 4 * len(sizes), 4 * sum(sizes), 16 + 1
    shared = changed(small(), reward_model=ScalarGPT(small().reference).requires_grad_(False))
    for name, of, expected in (
            ("una-score", small(), policy), ("una-score-learned", small(), policy + 16 * 3 + 4),
            ("una-online", small(), policy + frozen),            # the reference as well
            ("una-online", shared, policy + 2 * frozen + 4 * head),
            ("ppo", shared, 2 * policy + 16 * head + 8 + 2 * frozen + 4 * head)):
        assert run_one(name, shared=of, steps=1)["state_bytes"] == expected, name


def test_a_step_has_the_ramps_rate_the_groups_multiples_one_norm_and_nothing_but_numbers():
    for scale, cut in ((1.0, 0.2), (0.1, 1.0)):                  # a short gradient is left alone
        weight, other = (torch.nn.Parameter(torch.tensor(0.0).double()) for _ in range(2))
        optimizer = torch.optim.SGD([dict(params=[weight]), dict(params=[other], times=10)], lr=0.0)
        for step in range(1, 101):
            before = weight.item(), other.item()
            train.descend(optimizer, scale * (3 * weight - 4 * other), 2.0, step, 100)
            rate = 2 * min(step / 5, 1) * (1 - (step - 1) / 100) * scale * cut
            moves = weight.item() - before[0], other.item() - before[1]
            assert moves == pytest.approx((-3 * rate, 4 * 10 * rate), rel=1e-6, abs=0)
    # The slope of sqrt is infinite at 0, and cut to norm 1 inf would be NaN.
    for start, loss, told in ((1.0, lambda w: w * math.nan, "the loss is nan"),
                              (0.0, lambda w: w.sqrt(), "the gradient's norm is inf"),
                              (1.0, lambda w: ((w - 1) ** 2).sqrt(), "the gradient's norm is nan")):
        weight = torch.nn.Parameter(torch.tensor(start))
        with pytest.raises(FloatingPointError, match=f"{told}, at step 3 of 10"):
            train.descend(torch.optim.SGD([weight], lr=1.0), loss(weight), 1.0, 3, 10)
        assert weight.item() == start


def test_results_hold_what_is_promised_and_saved_weights_give_the_figures_again(tiny):
    (start,) = tiny.results["reference"]
    assert tiny.status == 0 and [*tiny.runs] == [*train.METHODS]
    for name, entry in tiny.runs.items():
        beta = 0.25 * train.METHODS[name].beta_multiple
        assert (entry["beta"], entry["method_beta"]) == (0.25, beta) and entry["seconds"] > 0
        for split in ("train", "heldout"):
            assert entry[split]["optimum"] == start[split]["optimum"] >= entry[split]["objective"]
        assert ("chosen_reward" in entry) == ("offsets" in entry) == (name not in FRESH)
    reference, dpo = (load(tiny.folder / f"{name}-1.pt") for name in ("reference", "dpo"))
    for split, prompts in (("train", data.TRAIN_PROMPTS), ("heldout", data.HELDOUT_PROMPTS)):
        world = exact.World(reference, prompts, 0.25)
        for name, told in (("reference", start), *tiny.runs.items()):
            model = load(tiny.folder / f"{name}-1.pt")
            again = exact.evaluate(world, exact.policy_logprobs(model, world.prompts))
            assert {key: told[split][key] for key in again} == pytest.approx(again, abs=1e-9)
    feedback = train.collect_feedback(train.parse([*toy.FLAGS]), 1, reference)
    rho, told = rho_of(dpo, reference, feedback.tokens, feedback.mask), tiny.runs["dpo"]
    for key, rows in zip(("chosen_reward", "rejected_reward"), feedback.pairs.T):
        assert told[key] == pytest.approx(told["method_beta"] * rho[rows].mean().item(), abs=1e-6)


def test_same_seed_same_results_whatever_else_is_run_and_another_seed_others(tiny, short, tmp_path):
    names = ["una-online", "kto", "una-mixed"]
    _, again = short(tmp_path, f"--seed 1 --seeds 2 --methods {','.join(names)}")
    assert timeless(again["reference"][0]) == timeless(tiny.results["reference"][0])
    for name, one, other in zip(names, again["runs"][:3], again["runs"][3:], strict=True):
        assert timeless(one) == timeless(tiny.runs[name]) and other["method"] == name
        assert one["train"] != other["train"] and "dots" not in other


def test_a_level_is_in_all_but_pairs_and_a_reward_model_judges_fresh_samples(tiny, short, tmp_path):
    for flags, level, unmoved in (("--level 1", 1 / 3, ["dpo"]),              # 1/3 on average
                                  ("--reward model", 0, ["dpo", "una-score"])):
        _, results = short(tmp_path, f"--seed 1 --methods dpo,una-score,una-online-score {flags}")
        for entry in results["runs"]:
            now, then = entry["train"], tiny.runs[entry["method"]]["train"]
            assert now["optimum"] - then["optimum"] == pytest.approx(level, abs=1e-9)
            same = now["regret"] == pytest.approx(then["regret"], abs=1e-9)
            assert same == (entry["method"] in unmoved), (flags, entry["method"])


def test_what_has_ended_is_on_disk_whatever_happens_next(short, tmp_path, capsys, monkeypatch):
    why = {"kto": "loss is nan", "una-score": "", "una-online-score": "are not numbers"}
    wrong = dict(learning_rate=1e39)                             # in the weights, soon everywhere
    for name, how in {"kto": dict(loss=lambda *of: train.kto(*of) * math.nan), "una-score": wrong,
                      "una-online-score": wrong,
                      "una-pair": dict(loss=mock.Mock(side_effect=KeyboardInterrupt))}.items():
        monkeypatch.setitem(train.METHODS, name, train.METHODS[name]._replace(**how))
    status, results = short(tmp_path, f"--methods dpo,{','.join(why)}")
    out, err = capsys.readouterr()
    assert status == 1 and [entry["method"] for entry in results["runs"]] == ["dpo", *why]
    for entry in results["runs"]:
        name, told = entry["method"], entry.get("diverged", "")
        assert (tmp_path / f"{name}-0.pt").exists() == ("train" in entry) == (name not in why)
        assert why.get(name, "") in told and told in err
    status, results = short(tmp_path, "--methods una-binary-mse,una-pair,una-online,dpo")
    assert status == 130 and "interrupted. 2 runs have ended" in capsys.readouterr().err
    assert [entry["method"] for entry in results["runs"]] == ["una-online", "dpo"]


@pytest.mark.parametrize("arguments, told", [
    ("--methods dpo,una-pear", "una-pear"), ("--beta nan", "--beta"), ("--judged 25", "--judged"),
    ("--batch 100 --methods dpo,ppo", "ppo"), ("--quic", "--quic"), ("--out file/below", "below")])
def test_bad_input_is_one_line_and_status_2(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="^2$"):
        sys.exit(train.main(["--out", "new", *arguments.split()]))
    out, err = capsys.readouterr()
    assert re.fullmatch(f"train.py: .*{told}.*\n", err) and not out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_words_that_cannot_be_written_are_dropped_and_files_are_kept(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as closed:          # whose end does not raise either
        monkeypatch.setattr(sys, "stderr", closed)
        run.say("it has ended")
    path, content = tmp_path / "a.json", dict(a=[1, dict(b=2)], c={})
    run.write_json(path, content)
    with pytest.raises(ZeroDivisionError):                       # it has half of it written
        run.save(path, lambda partial: Path(partial).write_text("half", encoding="utf-8") / 0)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert [*tmp_path.iterdir()] == [path]


CALLS = """
import signal, time
from lab import run
signal.signal(signal.SIGINT, signal.default_int_handler)         # a background shell ignores it
for _ in run.side_by_side([{}, (time.sleep, 60), (time.sleep, 60)], 2):
    run.say("ended")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="these are the signals of Unix")
@pytest.mark.parametrize("first, end, status, told", [
    ("(time.sleep, 0)", signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt"),
    ("(time.sleep, 0)", signal.SIGKILL, -signal.SIGKILL, "ended"),
    ("(signal.raise_signal, signal.SIGKILL)", None, 1, "a process was ended by the system")])
def test_no_process_is_left_however_the_run_ends(first, end, status, told, tmp_path):
    (tmp_path / "torch.py").write_text("def set_num_threads(n): pass", "utf-8")      # at once there
    path = f"{tmp_path}{os.pathsep}{Path(run.__file__).parent.parent}"
    process = subprocess.Popen([sys.executable, "-c", CALLS.format(first)], bufsize=0,
                               stderr=subprocess.PIPE, env=os.environ | dict(PYTHONPATH=path),
                               start_new_session=True)
    line = process.stderr.readline()
    if end:                                                      # Ctrl-C goes to all
        (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
    _, rest = process.communicate(timeout=60)                    # when nobody is left to write
    err = (line + rest).decode()
    assert process.returncode == status and told in err and err.count("KeyboardInterrupt") <= 1
