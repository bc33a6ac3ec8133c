"""own_model.py against log-probabilities, losses and gradients written out here.

    python -m pytest examples/test_own_model.py
"""
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import own_model
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)
HERE, PROGRAM = Path(__file__).resolve().parent, Path(sys.argv[0]).name
WORDS = "<unk> <eos> <bos> user assistant : a b c d e f g h i j k good bad".split()
TEMPLATE = ("{% for m in messages %}{{ m.role + ' : ' + m.content + ' <eos> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")
CLOSING = processors.TemplateProcessing(
    single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
PLAIN = ["--use_cpu", "--optim", "sgd", "--lr_scheduler_type", "constant", "--max_grad_norm", "0",
         "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "1",
         "--learning_rate", "0.5"]


def ids(text):
    """What the tokenizer must give, by hand."""
    return [WORDS.index(word) for word in text.split()]


def a_tokenizer(closing=False, **special):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closing:
        words.post_processor = CLOSING
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **special or dict(eos_token="<eos>"))
    made.chat_template = TEMPLATE
    return made


def a_model(kind=transformers.GPT2LMHeadModel, **config):
    """Two layers, dropout as usual."""
    torch.manual_seed(0)
    return kind(transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=None,
        eos_token_id=1, initializer_range=0.3, **config))


def saved(path, *parts):
    for part in parts:
        part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), a_model(), a_tokenizer())


def feedback(count, prompts=None):
    """Rows of the three kinds in turn, each with a prompt of its own or with one of a few. <unk>
    has the id that pads."""
    rng = random.Random(0)

    def words(least, most):
        return " " + " ".join(rng.choices(["<unk>", *"abcdefghijk"], k=rng.randint(least, most)))

    some, rows = [words(2, 5) for _ in range(prompts or count)], []
    for i in range(count):
        said = [dict(chosen=words(1, 6) + " good", rejected=words(1, 4) + " bad"),
                dict(completion=words(1, 6), label=i % 2 == 0),
                dict(completion=words(1, 6), score=rng.random())][i % 3]
        rows.append(dict(prompt=some[i % len(some)], **said))
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(folder, rows, out, *options):
    """main on the rows. Returns results.json."""
    data = write(Path(f"{out}.jsonl"), rows)
    own_model.main(["--model", folder, "--data", data, "--output_dir", str(out), *PLAIN, *options])
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def items_of(rows, tmp_path, tokenizer=None, max_length=32):
    """What the rows become, and what was counted."""
    tokenizer, counts = tokenizer or a_tokenizer(), Counter()
    return own_model.read_lines(write(tmp_path / "rows.jsonl", rows), own_model.item_of, tokenizer,
                                len(tokenizer), max_length, counts), counts


def plain_logprob(model, prompt, completion):
    """log pi(y|x) of one response alone: no padding, no batch, no mask."""
    logprobs = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + t - 1, token] for t, token in enumerate(completion))


def completions(row):
    return [ids(row[name]) + [1] for name in ("chosen", "rejected", "completion") if name in row]


def written_out(policy, reference, rows, beta, g, anchor=0.0):
    """Loss and rewards of each row, by the equations' formulas."""
    losses, rewards = [], []
    for row in rows:
        logprobs = [[plain_logprob(model, ids(row["prompt"]), y) for y in completions(row)]
                    for model in (policy, reference)]
        reward = [beta * (p - ref.detach()) for p, ref in zip(*logprobs)]
        s, given = torch.sigmoid(reward[0]), float(row.get("label", row.get("score", 0)))
        if "chosen" in row:
            held = -(sum(logprobs[0]) - sum(logprobs[1]).detach()) / 2
            loss = torch.log(1 + torch.exp(reward[1] - reward[0])) + anchor * held
        elif g == "mse":
            loss = (s - given) ** 2
        else:
            loss = -given * torch.log(s) - (1 - given) * torch.log(1 - s)
        losses.append(loss)
        rewards.append(reward)
    return losses, rewards


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def moves(a, b):
    """By how much each weight differs in two folders."""
    a, b = loaded(a).state_dict(), loaded(b).state_dict()
    return {name: b[name] - a[name] for name in a.keys() | b.keys()}


def farthest(a, b):
    """The largest difference of two folders' weights."""
    return max(move.abs().max().item() for move in moves(a, b).values())


# ---------------------------------------------------------------- losses, gradients, steps
@pytest.mark.parametrize("batch, micro_batches, g, anchor, more", [
    (7, 1, "mse", 0.05, []), (2, 4, "bce", 0, []),
    (3, 3, "mse", 0, ["--activation_checkpointing", "True"])])
def test_a_step_is_the_gradient_of_the_mean_over_all_items_however_they_are_cut(
        folder, tmp_path, batch, micro_batches, g, anchor, more):
    rows = feedback(7)
    run(folder, rows, tmp_path / "out", "--heldout", "0", "--max_steps", "1", "--g", g,
        "--learning_rate", "1", "--per_device_train_batch_size", str(batch),
        "--gradient_accumulation_steps", str(micro_batches), "--anchor", str(anchor), *more)
    policy, step = loaded(folder), moves(tmp_path / "out", folder)
    losses, _ = written_out(policy, loaded(folder), rows, 0.1, g, anchor)
    (sum(losses) / 7).backward()
    for name, weight in policy.named_parameters():
        torch.testing.assert_close(step[name], weight.grad, rtol=1e-4, atol=2e-6)
    assert max(weight.grad.abs().max() for weight in policy.parameters()) > 0.01


@pytest.mark.parametrize("lora", [[], ["--lora", "2", "--activation_checkpointing", "True"]])
def test_what_is_measured_on_held_out_prompts_is_that_of_a_plain_loop_on_what_is_saved(
        folder, tmp_path, lora):
    """Saved is W + BA, added up; measured was W beside BA."""
    rows, out = feedback(40), tmp_path / "out"
    results = run(folder, rows, out, "--beta", "0.7", "--heldout", "0.5", "--max_steps", "6",
                  "--per_device_eval_batch_size", "7", *lora)
    assert results["items"] == dict(train=20, held=20) and results["settings"]["beta"] == 0.7
    held = {item["prompt"] for item in own_model.split(items_of(rows, tmp_path)[0], 0.5)[1]}
    rows = [row for row in rows if tuple(ids(row["prompt"])) in held]
    for policy, measured in (folder, results["before"]), (out, results["after"]):
        with torch.no_grad():
            losses, rewards = written_out(loaded(policy), loaded(folder), rows, 0.7, "mse")
        pairs = [reward for reward in rewards if len(reward) == 2]
        up, down = ([reward[0] for reward, row in zip(rewards, rows) if row.get("label") is said]
                    for said in (True, False))
        expected = {f"loss_{kind}": [loss for loss, row in zip(losses, rows) if field in row]
                    for kind, field in dict(pair="chosen", label="label", score="score").items()}
        expected |= dict(
            loss=losses, reward_chosen=[first for first, _ in pairs] + up,
            reward_rejected=[second for _, second in pairs] + down,
            pairs_in_order=[1.0 if a > b else 0.5 if a == b else 0 for a, b in pairs],
            kl_ref_policy=[-each / 0.7 for reward in rewards for each in reward])
        for name, parts in expected.items():
            assert measured[name] == pytest.approx(float(sum(parts) / len(parts)), abs=5e-6), name
    scored = torch.tensor([(reward[0].sigmoid(), row["score"])
                           for reward, row in zip(rewards, rows) if "score" in row])
    assert measured["score_correlation"] == pytest.approx(
        torch.corrcoef(scored.T)[0, 1].item(), abs=1e-4)
    trained = [move for move in moves(folder, out).values() if move.any()]
    assert max(move.abs().max() for move in trained) > 0.01 and not list(out.glob("*.part"))
    assert not lora or all(torch.linalg.matrix_rank(move, atol=1e-6) <= 2 for move in trained)
    assert transformers.AutoTokenizer.from_pretrained(out).encode("a good") == ids("a good")


def test_two_processes_are_one_also_if_they_go_on_from_a_checkpoint(folder, tmp_path):
    """Each step has all 11 items, and on two processes a copy, which must not count."""
    one, two, gone_on = (tmp_path / name for name in ("one", "two", "gone_on"))
    options = ["--num_train_epochs", "4", "--logging_steps", "1", "--heldout", "0.2",
               "--save_strategy", "epoch", "--save_total_limit", "2"]
    results = run(folder, feedback(14), one, *options, "--per_device_train_batch_size", "11")
    assert results["items"] == dict(train=11, held=3)
    for source in (HERE / "own_model.py", HERE.parent / "una.py"):
        shutil.copy(source, tmp_path)                            # a copy of una.py serves as well
    for out, more in (two, []), (gone_on, ["--resume_from_checkpoint", f"{two}/checkpoint-3"]):
        ended = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "own_model.py", "--model", folder, "--data", f"{one}.jsonl", "--output_dir", str(out),
             *PLAIN, *options, "--per_device_train_batch_size", "2",
             "--gradient_accumulation_steps", "3", *more],
            cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert ended.returncode == 0, ended.stderr
    assert farthest(one, two) < 1e-6 and farthest(one, folder) > 0.03
    assert farthest(two, gone_on) == 0
    for out in two, gone_on:
        told = json.loads((out / "results.json").read_text(encoding="utf-8"))
        assert told["after"] == pytest.approx(results["after"], abs=1e-5)
    ours, *others = [json.loads((out / "checkpoint-4/trainer_state.json").read_text("utf-8"))
                     ["log_history"][1:] for out in (one, two, gone_on)]     # the first is of zeros
    for other in others:
        for mine, logged in zip(ours, other, strict=True):
            assert logged == pytest.approx(mine | dict(epoch=logged["epoch"]), rel=1e-3, abs=1e-5)


def test_a_run_that_goes_on_in_the_midst_of_an_epoch_is_one_that_was_not_broken(folder, tmp_path):
    """The reference is --model's, not the checkpoint's."""
    rows, options = feedback(14), [
        "--max_steps", "8", "--optim", "adamw_torch", "--adam_beta2", "0.9", "--learning_rate",
        "0.01", "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--weight_decay", "0.1",
        "--max_grad_norm", "1", "--seed", "5", "--save_strategy", "steps", "--save_steps", "3",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    whole = run(folder, rows, tmp_path / "whole", *options)
    gone_on = run(folder, rows, tmp_path / "gone_on", *options, "--resume_from_checkpoint",
                  str(tmp_path / "whole" / "checkpoint-3"))
    assert farthest(tmp_path / "whole", tmp_path / "gone_on") == 0
    assert farthest(tmp_path / "whole", folder) > 0.01
    assert gone_on["before"] == whole["before"] and gone_on["after"] == whole["after"]


# ---------------------------------------------------------------- the reference
def ends(capsys, status, *arguments):
    """The one line with which main ends."""
    with pytest.raises(SystemExit) as end:
        own_model.main([*arguments, "--use_cpu"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(PROGRAM)]
    assert end.value.code == status and len(said) == 1, said
    return said[0]


def test_before_training_every_rho_is_0_or_the_run_ends(folder, tmp_path, capsys, monkeypatch):
    assert loaded(folder).config.resid_pdrop == loaded(folder).config.attn_pdrop == 0.1
    rows = [*feedback(12), dict(prompt="a " * 20, completion="b", label=1)]
    before = run(folder, rows, tmp_path / "out", "--max_steps", "1")["before"]
    assert "12 items, 1 held out. rho is 0 exactly for all of them\n" in capsys.readouterr().out
    assert before["kl_ref_policy"] == 0 and loaded(tmp_path / "out").config.resid_pdrop == 0
    load = own_model.load_model
    flags = ["--model", folder, "--data", f"{tmp_path / 'out'}.jsonl", "--heldout", "0",
             "--output_dir", str(tmp_path / "no")]

    for spoil in (lambda of: setattr(of, "drop", torch.nn.Dropout(0.1)),
                  lambda of: of.wpe.weight.data[15].fill_(math.nan)):   # in the last batch alone
        def spoilt(*arguments, spoil=spoil):
            model = load(*arguments)
            spoil(model.transformer)
            return model

        monkeypatch.setattr(own_model, "load_model", spoilt)
        assert "random or not finite" in ends(capsys, 1, *flags)
    assert not (tmp_path / "no" / "results.json").exists()


def test_bfloat16_computes_in_it_and_keeps_the_weights_in_float32(folder, tmp_path):
    results = [run(folder, feedback(12), tmp_path / kind, "--bf16", kind, "--max_steps", "3",
                   "--heldout", "0.3", "--optim", "adamw_torch_fused", "--learning_rate", "0.01",
                   "--lr_scheduler_type", "linear")
               for kind in ("True", "False")]
    assert results[0]["before"]["kl_ref_policy"] == 0
    assert results[0]["after"]["loss"] == pytest.approx(results[1]["after"]["loss"], abs=0.02)
    assert results[0]["after"]["loss"] != pytest.approx(results[1]["after"]["loss"], abs=1e-6)
    assert {p.dtype for p in transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "True", dtype="auto").parameters()} == {torch.float32}


# ---------------------------------------------------------------- from text to batches
@pytest.mark.parametrize("spaces, closing, special", [
    (False, False, {}), (True, False, {}), (True, True, dict(bos_token="<bos>")),
    (False, False, dict(padding_side="left"))], ids=["bytes", "spaces", "opening", "left"])
def test_decoded_back_the_tokens_are_the_text(spaces, closing, special, tmp_path):
    """Tokens as GPT-2's, of bytes, or as SentencePiece's, which puts a space before a text."""
    words, apart = Tokenizer(models.BPE()), []
    words.pre_tokenizer = (pre_tokenizers.Metaspace(prepend_scheme="first") if spaces else
                           pre_tokenizers.ByteLevel(add_prefix_space=False))
    words.decoder = decoders.Metaspace(prepend_scheme="first") if spaces else decoders.ByteLevel()
    words.train_from_iterator(["Say: hello world, hello again"] * 9, trainers.BpeTrainer(
        vocab_size=60, special_tokens=WORDS[:3], show_progress=False))
    if closing:
        words.post_processor = CLOSING
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>",
                                                     **special)
    for x, *answers in [("Say:", "hello", " hello"), ("Say:", " hello", ", hello"),
                        ("Say: ", "hello", "world"), ("<bos>Say:", "hello", " world")]:
        row = dict(prompt=x, chosen=answers[0], rejected=answers[1])
        [item], counts = items_of([row], tmp_path, tokenizer)
        prompt, added = list(item["prompt"]), closing and x[0] != "<"
        for y, answer in zip(item["completions"], answers):
            text = f"{x}{answer}<eos>"
            assert [*prompt, *y] == [2] * added + tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode([*prompt, *y][added:]) == text
            assert tokenizer.decode(prompt[added:]) == x.rstrip()
            rest = text.removeprefix(x.rstrip())
            apart.append(tokenizer.encode(rest, add_special_tokens=False) != y)
        assert sum(counts.values()) == (x == "Say: ")
    assert any(apart) == spaces                         # as one text, not one behind the other


def test_texts_messages_and_ids_become_tokens_with_one_end_of_text(tmp_path):
    closing = a_tokenizer(closing=True, eos_token="<eos>", bos_token="<bos>")
    turns = a_tokenizer()
    turns.chat_template = TEMPLATE.replace("<eos>", "k")        # its turns do not end with <eos>
    chat = [dict(role="user", content="a"), dict(role="assistant", content="b"),
            dict(role="user", content="c")]
    asked = "user : a <eos> assistant : b <eos> user : c <eos> assistant :"
    answer = [dict(role="assistant", content="good")]
    for tokenizer, prompt, completion, first, second in [
            (None, "c d", " a b", "c d", "a b <eos>"),
            (None, "c <eos>", " a <eos> b", "c <eos>", "a <eos>"),
            (closing, "c d", " a b <eos> <eos>", "<bos> c d", "a b <eos>"),
            (closing, "<bos> c <eos>", "<eos>", "<bos> c <eos>", "<eos>"),
            (None, ids("a"), ids("b <eos> c"), "a", "b <eos> c"),
            (None, chat, answer, asked, "good <eos>"),
            (closing, chat, answer, asked, "good <eos>"),
            (turns, chat, answer, asked.replace("<eos>", "k"), "good k")]:
        rows = [dict(prompt=prompt, completion=completion, label=label, score=None, judge=3)
                for label in (True, False, 1, 0)]
        items, counts = items_of(rows, tmp_path, tokenizer)
        assert [item["given"] for item in items] == [1, 0, 1, 0] and not any(counts.values())
        for item in items:
            assert item["prompt"] == tuple(ids(first)) and item["completions"] == [ids(second)]


def test_what_is_too_long_is_cut_and_pairs_of_equal_completions_are_dropped(folder, tmp_path):
    long = " a b c d e f g h"
    rows = [dict(prompt=long, completion=" i j", label=1),
            dict(prompt="k", completion=long, score=0),
            dict(prompt=long, chosen=" i", rejected=long),
            dict(prompt="a b c d", completion=" i", score=1),
            dict(prompt="a b c d e", chosen=" i", rejected=" <eos>"),
            dict(prompt="k", chosen=" a", rejected=" a <eos>"),
            dict(prompt="k", chosen=long + " good", rejected=long + " bad")]
    items, counts = items_of(rows, tmp_path, max_length=6)
    assert [(item["prompt"], item["completions"]) for item in items] == [
        (tuple(ids("f g h")), [ids("i j <eos>")]), (tuple(ids("k")), [ids("a b c d e")]),
        (tuple(ids("f g h")), [ids("i <eos>"), ids("a b c")]),
        (tuple(ids("a b c d")), [ids("i <eos>")]),          # they fit
        (tuple(ids("b c d e")), [ids("i <eos>"), [1]])]
    assert +counts == {"prompts cut": 3, "completions cut": 4,
                       "pairs dropped: identical completions": 2}
    rows = [dict(prompt="a " * 40, completion="b " * 40, score=0.5)] * 2    # 32 positions
    assert run(folder, rows, tmp_path / "out", "--max_steps", "1")["counts"]["prompts cut"] == 2


def test_the_estimated_offset_is_beta_log_mean_exp_of_the_prompts_logits(
        folder, tmp_path, monkeypatch):
    rows = [dict(prompt="a b ", completion=y, score=s) for y, s in zip("cde", (0.2, 0.9, 1.0))]
    rows += [dict(prompt="a b ", completion="f", label=True), dict(prompt="c ", completion="d",
             score=0.3), dict(prompt="a b ", chosen="g", rejected="h")]
    rows += [dict(prompt="e ", completion=y, score=0.5) for y in "abcdefgh"]
    odds = [(s / (1 - s)) ** 2 for s in (0.2, 0.9, 1 - 1e-4)]    # beta = 0.5: e^{r/beta}
    last, mean = 0.5 * math.log(sum(odds) / 3), math.log(2.1 / 0.9)      # the mean score is 0.7
    items, counts = items_of(rows, tmp_path)
    own_model.estimate_offsets(items, 0.5, counts, ramped=False)
    assert [item["offset"] for item in items] == pytest.approx(
        [last if row["prompt"] == "a b " else 0 for row in rows])
    assert +counts == {"prompts with fewer than 2 scores: f(x) + c is 0": 1,
                       "prompts with fewer than 8 scores: f(x) + c is a guess": 1}
    rows = [dict(row, prompt=x) for x in ("a b ", "c ") for row in rows[:4]]     # one is held out
    outcome, seen = own_model.outcome, []

    def look(model, batch, *how):
        assert len(batch["id"]) <= 2                    # the reference's batches are no larger
        if torch.is_grad_enabled():
            seen.append(batch["offset"].mean().item())
        return outcome(model, batch, *how)

    monkeypatch.setattr(own_model, "outcome", look)
    for how, path in ("estimated", [last] * 6), ("ramped", [
            mean, mean + (last - mean) / 3, mean + (last - mean) * 2 / 3, last, last, last]):
        seen.clear()
        results = run(folder, rows, tmp_path / "out", "--offset", how, "--beta", "0.5",
                      "--heldout", "0.5", "--max_steps", "6", "--per_device_train_batch_size", "2")
        assert results["before"]["reward_chosen"] == pytest.approx(last, rel=1e-6)
        assert results["before"]["kl_ref_policy"] == 0
        assert seen == pytest.approx(path, rel=1e-5) and last - mean > 0.1


def test_held_out_prompts_are_not_trained_on_and_do_not_depend_on_the_order(tmp_path):
    items, _ = items_of(feedback(60, prompts=20), tmp_path)
    sides = own_model.split(items, 0.25)
    prompts = [{item["prompt"] for item in side} for side in sides]
    assert not prompts[0] & prompts[1] and [*map(len, prompts), *map(len, sides)] == [15, 5, 45, 15]
    assert {item["prompt"] for item in own_model.split(items[::-1], 0.25)[1]} == prompts[1]
    assert own_model.split(items, 0)[1] == [] and len(own_model.split(items, 1e-3)[1]) == 3


# ---------------------------------------------------------------- what cannot be trained
CHAT = dict(prompt=[dict(role="user", content="a")], score=1,
            completion=[dict(role="assistant", content="b")])
GOOD = dict(prompt="a", completion="b")
BAD = {
    "a line has prompt, and either": [
        GOOD, GOOD | dict(label=None), GOOD | dict(label=1, score=1), GOOD | dict(prompt=None),
        dict(prompt="a", label=True), dict(prompt="a", chosen="b"),
        dict(prompt="a", chosen="b", rejected="c", completion="d"),
        *(GOOD | dict(label=label) for label in (-1, 0.3, "1", math.nan)),
        *(GOOD | dict(score=score) for score in (1.5, -0.1, math.nan, math.inf, "0.5", True))],
    ".* is no string": [
        *(dict(prompt=x, completion=[9], score=1) for x in ([], ["a"], 6)),
        *(dict(prompt=[5], completion=y, score=1) for y in ([], [6.5], [True], 6))],
    "prompt: the token -1 is not from 0 to": [dict(prompt=[-1], completion=[9], score=1)],
    "completion: the token 99 is not from 0 to": [dict(prompt=[5], completion=[99], score=1)],
    "prompt: it has no token of its own": [dict(prompt="", completion="b", score=1)],
    "a completion is empty": [
        dict(prompt="a", completion="", score=1), dict(prompt="a", chosen="b", rejected=""),
        *(CHAT | dict(completion=[dict(role="assistant", **no)]) for no in ({}, dict(content="")))],
    "prompt and completion are not both": [
        dict(prompt=[5], completion="b", score=1), CHAT | dict(prompt="a"),
        CHAT | dict(completion=CHAT["completion"] * 2)],
    "": [dict(prompt="a", completion="\ud800", score=1), [1, 2]]}
LINES = [(json.dumps(row).encode(), message, TEMPLATE)
         for message, rows in BAD.items() for row in rows]
LINES += [(line, "", TEMPLATE) for line in (
    b"{prompt: a}", b'{"prompt": "a", "com', b"", b'{"a": "\xe4"}')]
LINES += [(json.dumps(CHAT).encode(), message, template) for message, template in {
    "completion: it has no token of its own": "{{ messages | length }}", ".*chat.template": None,
    "must alternate": "{{ raise_exception('must alternate') }}"}.items()]


def test_bad_lines_and_bad_templates_are_named(tmp_path, capsys):
    good, path = json.dumps(feedback(1)[0]).encode(), tmp_path / "bad.jsonl"
    for line, message, template in LINES:
        line, tokenizer = line + b"\n", a_tokenizer()
        path.write_bytes(good + b"\n" + line)
        tokenizer.chat_template = template
        with pytest.raises(SystemExit) as end:
            own_model.read_lines(path, own_model.item_of, tokenizer, len(WORDS), 32, Counter())
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1, line
        said = said.split(f"bad.jsonl, line 2: {line[:60]}: ")[1]
        assert re.match(message, said), (line, said)


def test_other_bad_input_is_one_line_too(folder, tmp_path, capsys):
    bert = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, initializer_range=1.0))
    headless = a_model(transformers.GPT2Model, tie_word_embeddings=False)
    saved(tmp_path / "bare", a_model())
    saved(tmp_path / "open", a_model(), a_tokenizer(unk_token="<unk>"))
    saved(tmp_path / "headless", headless, a_tokenizer())
    saved(tmp_path / "bert", bert, a_tokenizer())
    write(tmp_path / "empty", [])
    write(tmp_path / "same", [{"prompt": "a ", "chosen": "b", "rejected": "b"}])
    good = write(tmp_path / "good", feedback(1))
    for flag, value, message in [
            ("--data", tmp_path / "empty", "empty: no feedback"),
            ("--data", tmp_path / "same", "same: no feedback"),
            ("--data", "missing", "No such file.*missing"),
            ("--model", "no", "--model no: "),
            ("--model", tmp_path / "bare", "bare: no tokenizer"),
            ("--model", tmp_path / "open", "open: no tokenizer, or one without end-of-text"),
            ("--model", tmp_path / "headless", "no weights for lm_head.weight"),
            ("--model", tmp_path / "bert", "not causal"),
            ("--offset", "learned", "--offset: invalid choice: 'learned'"),
            ("--beta", "0", "--beta > 0"), ("--beta", "nan", "--beta > 0"),
            ("--anchor", "-1", "--anchor >= 0"), ("--anchor", "inf", "--anchor >= 0"),
            ("--heldout", "1", "--heldout < 1"), ("--max_length", "1", "--max_length > 1"),
            ("--learning_rate", "fast", "--learning_rate.*fast"), ("--batch", "1", "--batch"),
            ("--dataloader_drop_last", "1", "--dataloader_drop_last"),
            ("--neftune_noise_alpha", "1", "--neftune_noise_alpha"),
            ("--optim", "schedule_free_adamw", "--optim: invalid choice"),
            ("--report_to", "nobody", "nobody"),
            ("--resume_from_checkpoint", "nowhere", "nowhere: there is no checkpoint")]:
        said = ends(capsys, 2, "--model", folder, "--data", good, "--output_dir",
                    str(tmp_path / "out"), flag, str(value))
        assert re.search(message, said), said


def test_a_run_that_diverges_says_so_and_saves_nothing(folder, tmp_path, capsys):
    for logging_steps, what in ("1", "the loss is"), ("9", "not finite"):
        out = tmp_path / logging_steps
        said = ends(capsys, 1, "--model", folder, "--data", write(tmp_path / "rows", feedback(12)),
                    "--output_dir", str(out), "--learning_rate", "1e30", "--heldout", "0",
                    "--max_steps", "2", "--logging_steps", logging_steps)
        assert what in said and "training diverged and has no results" in said
        assert not (out / "results.json").exists() and not list(out.glob("*.safetensors"))
