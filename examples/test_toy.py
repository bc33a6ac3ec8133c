"""The toy's export and evaluation, and TRL on it.

    python -m pytest examples/test_toy.py        without TRL, the tests of it are skipped
"""
import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import memory
import toy_as_transformers as toy

import data
import short_train
import train
import una
from lab import exact
from models import toy_gpt

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export in short_train's language: folder, settings, and reference and feedback anew."""
    folder = tmp_path_factory.mktemp("toy")
    settings = train.Settings(device="cpu", seed=3, level=1.0, judged=200, reference_steps=20,
                              n_layer=2, n_head=2, n_embd=16, out="")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in short_train.LANGUAGE.items():
            patch.setattr(data, name, value)
        toy.export(settings, folder)
        reference = train.train_reference(settings, 3)
        feedback = train.collect_feedback(settings, 3, reference)
        yield SimpleNamespace(folder=folder, settings=settings, reference=reference,
                              feedback=feedback)


def read(folder, kind):
    return [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]


def response(feedback, i):
    """Prompt and completion of response i, from tokens and mask."""
    tokens, mask = feedback.tokens[i].tolist(), feedback.mask[i].tolist()
    return tokens[:3], [token for token, kept in zip(tokens, mask) if kept]


# ---------------------------------------------------------------- the model and its tokenizer
def test_the_exported_gpt2_has_the_models_logits_also_beside_padding(tmp_path):
    gpt = toy_gpt()
    toy.to_transformers(gpt).save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(26, (50, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(50) % 7 + 1
    mask = torch.arange(7) < lengths[:, None]
    expected = gpt(tokens)
    assert hf.dtype == torch.float32 and expected.std() > 1
    hf.train()                                                   # no dropout there either
    with torch.no_grad():
        assert (hf(tokens).logits - expected).abs().max() < 1e-4
        padded = hf(tokens.where(mask, data.EOT), attention_mask=mask.long()).logits
        assert (padded - expected)[mask].abs().max() < 1e-4
        # This matrix is square: the wrong way round it would load as well.
        hf.transformer.h[1].attn.c_proj.weight.copy_(gpt.h[1].attn.c_proj.weight)
        assert (hf(tokens).logits - expected).abs().max() > 0.1


def test_export_and_back_is_the_identity():
    gpt = toy_gpt()
    back = toy.from_transformers(toy.to_transformers(gpt))
    assert back.config == gpt.config
    state, expected = back.state_dict(), gpt.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_tokenizer_is_the_encoding_and_reads_whatever_it_writes(tmp_path):
    toy.tokenizer().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    responses = [" bright warm sea", " still", "", " : night furious dancing"]
    for text in [*data.PROMPTS, *responses, data.PROMPTS[3] + responses[0]]:
        assert words(text)["input_ids"] == data.ENCODING.encode(text)
        assert words.decode(data.ENCODING.encode(text)) == text
        ended = text + "<|endoftext|>"
        assert words(ended)["input_ids"] == data.ENCODING.encode(ended, allowed_special="all")
    for tokens in itertools.product(range(26), repeat=2):        # "happyhappy" too
        assert words(words.decode(tokens))["input_ids"] == [*tokens]
        assert words.decode(tokens) == data.ENCODING.decode(tokens)
    assert words.eos_token_id == words.pad_token_id == data.EOT and len(words) == 26
    for unknown in ("happy  sea :", " brightest", " blue"):
        with pytest.raises(Exception, match="UNK"):
            words(unknown)


# ---------------------------------------------------------------- the feedback
def test_the_files_are_the_responses_labels_scores_and_pairs_that_train_py_collects(exported):
    feedback, folder = exported.feedback, exported.folder
    binary, scores = read(folder, "binary"), read(folder, "scores")
    assert len(binary) == len(scores) == 200
    for i in range(200):
        prompt, completion = response(feedback, i)
        assert binary[i] == dict(prompt=prompt, completion=completion,
                                 label=feedback.labels[i].item() == 1)
        assert scores[i] == dict(prompt=prompt, completion=completion,
                                 score=feedback.scores[i].item())
    pairs = read(folder, "pairs")
    assert len(pairs) == len(feedback.pairs) < 100               # without the identical ones
    for row, (chosen, rejected) in zip(pairs, feedback.pairs.tolist()):
        assert [row["prompt"], row["chosen"]] == [*response(feedback, chosen)]
        assert [row["prompt"], row["rejected"]] == [*response(feedback, rejected)]


def test_a_response_that_was_cut_off_has_no_end_of_text(exported):
    completions = [row["completion"] for row in read(exported.folder, "binary")]
    cut_off = [completion for completion in completions if data.EOT not in completion]
    assert 20 < len(cut_off) < 180 and all(len(completion) == 2 for completion in cut_off)
    assert all(completion.index(data.EOT) == len(completion) - 1
               for completion in completions if completion not in cut_off)


def test_mixed_is_what_una_mixed_learns_from(exported):
    feedback = exported.feedback
    whole = next(data.stored_batches("mixed", feedback, 200, seed=0))      # all there is, shuffled

    def texts(rows):
        return [response(whole, row) for row in rows.tolist()]

    expected = [dict(prompt=x, chosen=chosen, rejected=rejected) for (x, chosen), (_, rejected)
                in zip(texts(whole.chosen), texts(whole.rejected))]
    expected += [dict(prompt=x, completion=y, label=bool(label)) for (x, y), label
                 in zip(texts(whole.binary), whole.labels[whole.binary])]
    expected += [dict(prompt=x, completion=y, score=score.item()) for (x, y), score
                 in zip(texts(whole.scored), whole.scores[whole.scored])]
    mixed = read(exported.folder, "mixed")
    assert sorted(map(json.dumps, mixed)) == sorted(map(json.dumps, expected))
    assert len(mixed) == len(feedback.pairs[feedback.pairs[:, 0] < 66]) + 67 + 67


# ---------------------------------------------------------------- the evaluation
def test_the_reference_loses_100_percent_at_kl_0(exported, capsys):
    folder = str(exported.folder)
    toy.main([folder, "--evaluate", f"{folder}/reference"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["train", "heldout"]
    assert all(line.split()[2] == "0.000" and line.endswith(" 100.00%") for line in lines[1:])
    toy.main([folder, "--evaluate", f"{folder}/reference", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    reached = json.loads(line)
    assert reached["train"]["lost"] == reached["heldout"]["lost"] == 1
    assert reached["train"]["kl"] == reached["heldout"]["kl"] == 0


def test_a_policy_is_measured_as_train_py_measures_it(exported, tmp_path):
    policy = short_train.moved(exported.reference, scale=0.3)
    toy.to_transformers(policy).save_pretrained(tmp_path)
    reached = toy.evaluate(exported.folder, tmp_path)
    for split, prompts in (("train", data.TRAIN_PROMPTS), ("heldout", data.HELDOUT_PROMPTS)):
        world = exact.World(exported.reference, prompts, 0.25, level=1.0)
        expected = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
        at_start = exact.evaluate(world, world.ref_logprobs)["regret"]
        lost = reached[split].pop("lost")
        assert lost == pytest.approx(expected["regret"] / at_start, abs=1e-6) and abs(lost - 1) > .1
        assert reached[split] == pytest.approx(expected, abs=1e-6)


def wider(folder):
    toy.to_transformers(toy_gpt()).save_pretrained(folder)
    return "n_head is 4, the reference's is 2"


def other_gelu(folder):
    hf = toy.to_transformers(train.GPT(train.GPTConfig(26, 7, 2, 2, 16)))
    hf.config.activation_function = "gelu"
    hf.save_pretrained(folder)
    return "activation_function is gelu, the reference's is gelu_new"


def nothing(folder):
    return "config.json: no such file"


@pytest.mark.parametrize("other", [wider, other_gelu, nothing])
def test_another_shape_is_one_line_and_status_2(other, exported, tmp_path, capfd):
    message = other(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        toy.main([str(exported.folder), "--evaluate", str(tmp_path)])
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith(message + "\n")


def test_it_starts_anywhere(tmp_path):
    command = [sys.executable, toy.__file__, "here", "--evaluate", "there"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = f"toy_as_transformers.py: {Path('here', 'toy.json')}: no such file\n"
    assert (ended.returncode, ended.stderr) == (2, message)


# ---------------------------------------------------------------- TRL
@pytest.fixture
def trl(exported, tmp_path):
    """A function that makes TRL's trainer for the export, with batches of 48 responses."""
    pytest.importorskip("trl")
    import trl_on_toy

    return lambda method, steps=5: trl_on_toy.trainer_of(
        exported.folder, method, 4e-3, beta=0.25, steps=steps, batch=48, seed=7, out=str(tmp_path))


def our_batches(exported, method, steps=5):
    """train.py's batches of 48 responses."""
    settings = train.Settings(batch=48, device="cpu", out="")
    batches = train.batches_for(train.METHODS[method], None, None, exported, settings, seed=7)
    return [*itertools.islice(batches, steps)]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trl_sees_the_very_tokens_of_train_py_in_the_same_batches(method, exported, trl):
    trainer = trl(method)
    theirs = [*trainer.get_train_dataloader()]
    ours = our_batches(exported, method)
    assert len(theirs) == len(ours) == 5                         # more than one pass over them
    ends = set()
    for their, our in zip(theirs, ours):
        assert len(their["input_ids"]) == len(our.tokens)
        masks = their["attention_mask"].bool(), their["completion_mask"].bool()
        for i, (tokens, real, completion) in enumerate(zip(their["input_ids"], *masks)):
            prompt, completion = tokens[real & ~completion].tolist(), tokens[completion].tolist()
            assert (prompt, completion) == response(our, i)
            ends.add(completion[-1] == data.EOT)
        if method == "kto":
            assert their["label"].tolist() == our.labels.bool().tolist()
    assert ends == {True, False}
    assert theirs[0]["input_ids"].shape[1] == 3 + 2
    trainer.data_collator.max_length = None                      # lets TRL's end-of-text stand
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] == 3 + 2 + 1


def test_trls_log_probabilities_of_the_export_are_train_pys(exported, trl):
    for their, our in zip(trl("dpo").get_train_dataloader(), our_batches(exported, "dpo")):
        theirs = torch.cat([their["ref_chosen_logps"], their["ref_rejected_logps"]])
        ours = train.model_logprob(exported.reference, our.tokens, our.mask)
        assert torch.allclose(theirs, ours, rtol=0, atol=1e-4)


def test_trls_first_dpo_loss_is_log_2(trl):
    trainer = trl("dpo")
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_trls_kto_takes_z0_from_each_prompt_with_the_response_in_front_of_it(exported, trl):
    trainer, reference = trl("kto"), exported.reference
    our = our_batches(exported, "kto")[0]
    others = (torch.cat([our.tokens[:, :3], our.tokens[:, 3:].roll(1, 0)], dim=1),
              our.mask.roll(1, 0))
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(1, 31):                                    # or z_0 would be cut off at 0
        train.descend(optimizer, -train.model_logprob(policy, *others).mean(), 1e-2, step, 30)
    trainer.model.transformer.load_state_dict(toy.transposed(policy.state_dict()))
    with torch.no_grad():
        logprob, ref_logprob, policy_kl, ref_kl = (
            train.model_logprob(model, *responses) for responses in ((our.tokens, our.mask), others)
            for model in (policy, reference))
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert (policy_kl - ref_kl).mean() > 0.1
    losses = una.kto_loss(logprob, ref_logprob, our.labels, policy_kl, ref_kl, 0.25)
    assert loss.item() == pytest.approx(losses.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_trl_ends_where_train_py_does(name, exported, trl):
    # kto too, as its two estimates of z_0 differ, but both are cut off at 0 here.
    trainer = trl(name, steps=40)                                # two of them are the ramp up
    trainer.train()
    policy = copy.deepcopy(exported.reference).requires_grad_(True)
    method = train.METHODS[name]._replace(learning_rate=4e-3)
    train.align(method, policy, iter(our_batches(exported, name, 40)), 0.25, steps=40)
    theirs, ours, start = (
        train.model_logprob(model, exported.feedback.tokens, exported.feedback.mask)
        for model in (toy.from_transformers(trainer.model), policy, exported.reference))
    assert (ours - start).abs().mean() > 0.5
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- memory
def test_memory_is_that_of_dpo_by_both_trainers_and_other_devices_figures_stay(tmp_path, capfd):
    pytest.importorskip("trl")
    path = tmp_path / "memory.json"
    path.write_text('{"a GPU": 7}', encoding="utf-8")
    memory.main(path, dict(vocab_size=40, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told.pop("a GPU") == 7
    ((_, here),) = told.items()
    assert {run["by"] for run in here["runs"]} == {"own_model.py", "TRL"}
    assert all(run["bytes"] > 1e6 for run in here["runs"])
    # Two steps each, on pairs: the first loss is log 2.
    capfd.readouterr()
    out, losses = tmp_path / "out", []
    memory.write_model(tmp_path, here["shape"])
    for by in memory.TRAINERS.values():
        by(str(tmp_path), False, str(out))
        losses.append([float(loss) for loss in re.findall(
            r"'loss': '?([\d.]+)", capfd.readouterr().out)])
    for both in losses:
        assert len(both) == 2 and both[0] == pytest.approx(math.log(2), abs=1e-3)
