"""own_model.py against log-probabilities, losses and gradients written out here.

    python -m pytest examples/test_own_model.py
"""
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import own_model
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)
PROGRAM = Path(sys.argv[0]).name
WORDS = "<unk> <eos> <bos> user assistant : a b c d e f g h i j k good bad".split()
TEMPLATE = ("{% for m in messages %}{{ m.role + ' : ' + m.content + ' <eos> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")
CLOSING = processors.TemplateProcessing(
    single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model of two layers, dropout as usual, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=None,
        eos_token_id=1, initializer_range=0.3)).save_pretrained(path)
    a_tokenizer().save_pretrained(path)
    return path


def feedback(count):
    """Rows of the three kinds in turn, each with its own prompt. <unk> has the id that pads."""
    rng = random.Random(0)

    def words(least, most):
        return " " + " ".join(rng.choices(["<unk>", *"abcdefghijk"], k=rng.randint(least, most)))

    return [dict(prompt=words(2, 5), **[
        dict(chosen=words(1, 6) + " good", rejected=words(1, 4) + " bad"),
        dict(completion=words(1, 6), label=i % 2 == 0),
        dict(completion=words(1, 6), score=rng.random())][i % 3]) for i in range(count)]


def flags_for(folder, rows, out, **flags):
    """The command line that trains on the rows, by plain gradient descent unless flags differ."""
    data = Path(f"{out}.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = dict(model=folder, data=data, output_dir=out, use_cpu=True, optim="sgd",
                 lr_scheduler_type="constant", learning_rate=0.5, max_grad_norm=0,
                 save_strategy="no", report_to="none", disable_tqdm=True) | flags
    return [f"--{name}={value}" for name, value in flags.items()]


def results_in(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def logs_of(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"]


def run(folder, rows, out, **flags):
    own_model.main(flags_for(folder, rows, out, **flags))
    return results_in(out)


def ends(capsys, status, *how, **flags):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as end:
        own_model.main(flags_for(*how, **flags))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(PROGRAM)]
    assert end.value.code == status and len(said) == 1, said
    return said[0]


def items_of(rows, tokenizer=None):
    """What the rows become."""
    return [own_model.item_of(row, tokenizer or a_tokenizer(), 64, 32) for row in rows]


def on_side(side, rows, share):
    """The rows whose prompts are trained on, 0, or held out, 1."""
    prompts = [item["prompt"] for item in own_model.split(items_of(rows), share)[side]]
    return [row for row in rows if ids(row["prompt"]) in prompts]


def plain_logprob(model, prompt, completion):
    """log pi(y|x) of one response alone: no padding, no batch, no mask."""
    logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + t - 1, token] for t, token in enumerate(completion))


def written_out(policy, reference, rows, beta, g="mse", anchor=0.0):
    """{name: values} of what is measured, by the equations' formulas, row by row."""
    told = defaultdict(list)
    for row in rows:
        answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
        logprobs, ref_logprobs = (
            [plain_logprob(model, ids(row["prompt"]), ids(y) + [1]) for y in answers]
            for model in (policy, reference))
        rhos = [logprob - ref.detach() for logprob, ref in zip(logprobs, ref_logprobs)]
        reward = beta * rhos[0]
        if "chosen" in row:
            kind, other = "pair", beta * rhos[1]
            loss = torch.log(1 + torch.exp(other - reward)) - anchor * (rhos[0] + rhos[1]) / 2
            told["pairs_in_order"].append(0.5 if other == reward else float(other < reward))
            told["reward_rejected"].append(other)
        else:
            kind = "label" if "label" in row else "score"
            s, given = torch.sigmoid(reward), float(row[kind])
            loss = ((s - given) ** 2 if g == "mse" else
                    -given * torch.log(s) - (1 - given) * torch.log(1 - s))
        if kind != "score":
            told["reward_rejected" if row.get("label") is False else "reward_chosen"].append(reward)
        told["loss"].append(loss)
        told[f"loss_{kind}"].append(loss)
        told["kl_ref_policy"] += [-rho for rho in rhos]
    return told


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
@pytest.mark.parametrize("batch, micro_batches, g, anchor", [(7, 1, "mse", 0.05), (2, 4, "bce", 0)])
def test_a_step_is_the_gradient_of_the_mean_over_training_items_however_they_are_cut(
        folder, tmp_path, batch, micro_batches, g, anchor):
    rows = feedback(12)
    run(folder, rows, tmp_path / "out", heldout=0.4, max_steps=1, learning_rate=1, g=g,
        anchor=anchor, per_device_train_batch_size=batch, gradient_accumulation_steps=micro_batches)
    policy, step = loaded(folder), moves(tmp_path / "out", folder)
    told = written_out(policy, loaded(folder), on_side(0, rows, 0.4), 0.1, g, anchor)
    assert [len(told[f"loss{kind}"]) for kind in ("", "_pair", "_label", "_score")] == [7, 2, 3, 2]
    (sum(told["loss"]) / 7).backward()
    for name, weight in policy.named_parameters():
        torch.testing.assert_close(step[name], weight.grad, rtol=1e-4, atol=2e-6)
    assert max(weight.grad.abs().max() for weight in policy.parameters()) > 0.01


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_measured_on_held_out_prompts_is_that_of_a_plain_loop_on_what_is_saved(
        folder, tmp_path, lora):
    """Saved is W + BA, added up; measured was W beside BA."""
    rows, out = feedback(40), tmp_path / "out"
    results = run(folder, rows, out, beta=0.7, heldout=0.5, max_steps=6, lora=lora)
    assert results["items"] == dict(train=20, held=20) and results["settings"]["beta"] == 0.7
    for policy, measured in (folder, results["before"]), (out, results["after"]):
        with torch.no_grad():
            told = written_out(loaded(policy), loaded(folder), on_side(1, rows, 0.5), 0.7)
        assert measured == pytest.approx(
            {name: float(sum(values) / len(values)) for name, values in told.items()}, abs=5e-6)
    trained = [move for move in moves(folder, out).values() if move.any()]
    assert max(move.abs().max() for move in trained) > 0.01 and not list(out.glob("*.part"))
    assert not lora or all(torch.linalg.matrix_rank(move, atol=1e-6) <= 2 for move in trained)
    assert transformers.AutoTokenizer.from_pretrained(out).encode("a good") == ids("a good")


def test_two_processes_are_one(folder, tmp_path):
    """Each step has all 12 items. The held-out 3 do not fill a batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    how = dict(num_train_epochs=3, logging_steps=1, heldout=0.2, save_strategy="epoch")
    results = run(folder, feedback(15), one, **how, per_device_train_batch_size=12)
    assert results["items"] == dict(train=12, held=3)
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         own_model.__file__, *flags_for(folder, feedback(15), two, **how,
                                        per_device_train_batch_size=2,
                                        gradient_accumulation_steps=3)],
        capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr
    assert farthest(one, two) < 1e-6 and farthest(one, folder) > 0.03
    assert results_in(two)["after"] == pytest.approx(results["after"], abs=1e-5)
    for ours, theirs in zip(logs_of(one / "checkpoint-3"), logs_of(two / "checkpoint-3")):
        assert theirs == pytest.approx(ours | dict(epoch=theirs["epoch"]), rel=1e-3, abs=1e-5)


def test_a_run_that_goes_on_in_the_midst_of_an_epoch_is_one_that_was_not_broken(folder, tmp_path):
    """The reference is --model's, not the checkpoint's."""
    whole, gone_on = tmp_path / "whole", tmp_path / "gone_on"
    how = dict(max_steps=8, optim="adamw_torch", learning_rate=0.01, lr_scheduler_type="cosine",
               save_strategy="steps", save_steps=3, per_device_train_batch_size=2,
               gradient_accumulation_steps=2)
    results = run(folder, feedback(14), whole, **how)
    again = run(folder, feedback(14), gone_on, **how,
                resume_from_checkpoint=whole / "checkpoint-3")
    assert [path.name for path in gone_on.glob("checkpoint-[36]")] == ["checkpoint-6"]
    assert farthest(whole, gone_on) == 0 and farthest(whole, folder) > 0.01
    assert [again[when] for when in ("before", "after")] == [results["before"], results["after"]]


def test_bfloat16_computes_in_it_and_keeps_the_weights_in_float32(folder, tmp_path):
    narrow, wide = (run(folder, feedback(12), tmp_path / f"{bf16}", bf16=bf16, max_steps=3,
                        heldout=0.3, logging_steps=1, save_strategy="epoch")
                    for bf16 in (True, False))
    first, *_ = logs_of(tmp_path / "True/checkpoint-3")     # of all 8 items, as in the reference
    assert narrow["before"]["kl_ref_policy"] == 0 and abs(first["kl_ref_policy"]) < 1e-6
    assert 1e-6 < abs(narrow["after"]["loss"] - wide["after"]["loss"]) < 0.02
    assert {weight.dtype for weight in transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "True", dtype="auto").parameters()} == {torch.float32}


# ---------------------------------------------------------------- reference, offset, held-out
@pytest.mark.parametrize("spoil", [
    lambda of: setattr(of, "drop", torch.nn.Dropout(0.1)),
    lambda of: of.wpe.weight.data[15].fill_(math.nan)],         # in the longest item alone
    ids=["random", "not finite"])
def test_before_training_every_rho_is_0_or_the_run_ends(
        spoil, folder, tmp_path, capsys, monkeypatch):
    assert loaded(folder).config.resid_pdrop == loaded(folder).config.attn_pdrop == 0.1
    rows = [*feedback(12), dict(prompt="a " * 20, completion="b", label=1)]
    before = run(folder, rows, tmp_path / "out", max_steps=1)["before"]
    assert "rho is 0 exactly for all 13 others\n" in capsys.readouterr().out
    assert before["kl_ref_policy"] == 0 and loaded(tmp_path / "out").config.resid_pdrop == 0

    def spoilt(args, load=own_model.load):
        tokenizer, model = load(args)
        spoil(model.transformer)
        return tokenizer, model

    monkeypatch.setattr(own_model, "load", spoilt)
    assert "random or not finite" in ends(capsys, 1, folder, rows, tmp_path / "no", heldout=0)
    assert not list(tmp_path.glob("no/*"))


def test_the_offset_goes_from_the_mean_scores_logit_to_beta_log_mean_exp_of_the_logits(
        folder, tmp_path, monkeypatch):
    rows = [dict(prompt="a b ", completion=y, score=s) for y, s in zip("cde", (0.2, 0.9, 1.0))]
    rows += [dict(prompt="a b ", completion="f", label=True)]
    alone = dict(prompt="c ", completion="d", score=0.3)        # no other score of its prompt
    odds = [(s / (1 - s)) ** 2 for s in (0.2, 0.9, 1 - 1e-4)]   # beta = 0.5: e^{r/beta}
    first, last = math.log(2.1 / 0.9), 0.5 * math.log(sum(odds) / 3)    # the mean score is 0.7
    items = items_of([*rows, alone])
    own_model.estimate_offsets(items, 0.5)
    for name, offset in ("first_offset", first), ("offset", last):
        assert [item[name] for item in items] == pytest.approx([offset] * 4 + [0])
    outcome, seen = own_model.outcome, []

    def look(model, batch, args):
        if torch.is_grad_enabled():
            seen.append(batch["offset"].mean().item())
        return outcome(model, batch, args)

    monkeypatch.setattr(own_model, "outcome", look)
    rows += [dict(row, prompt="c ") for row in rows]            # one of two prompts is held out
    before = run(folder, rows, tmp_path / "out", offset="estimated", beta=0.5, heldout=0.5,
                 max_steps=6)["before"]
    assert before["reward_chosen"] == pytest.approx(last, rel=1e-6) and last - first > 0.1
    path = [first, first + (last - first) / 3, first + (last - first) * 2 / 3, last, last, last]
    assert before["kl_ref_policy"] == 0 and seen == pytest.approx(path, rel=1e-5)


def test_prompts_are_held_out_whole_and_do_not_depend_on_the_order():
    items = items_of([dict(prompt=row["prompt"], completion=y, label=True)
                      for row in feedback(20) for y in (" a", " b", " c")])
    sides = own_model.split(items, 0.25)
    prompts = [{tuple(item["prompt"]) for item in side} for side in sides]
    assert not prompts[0] & prompts[1] and [*map(len, prompts), *map(len, sides)] == [15, 5, 45, 15]
    assert {tuple(item["prompt"]) for item in own_model.split(items[::-1], 0.25)[1]} == prompts[1]


# ---------------------------------------------------------------- from text to tokens
@pytest.mark.parametrize("spaces, closing, special", [
    (False, False, {}), (True, False, {}), (True, True, dict(bos_token="<bos>"))],
    ids=["bytes", "spaces", "opening"])
def test_decoded_back_the_tokens_are_the_text(spaces, closing, special):
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
        [item] = items_of([dict(prompt=x, chosen=answers[0], rejected=answers[1])], tokenizer)
        prompt, added = item["prompt"], closing and x[0] != "<"
        alone = tokenizer.encode(x, add_special_tokens=False)   # by which prompts are held out
        assert item["whole_prompt"] == (2,) * added + tuple(alone)
        for y, answer in zip(item["completions"], answers):
            text = f"{x}{answer}<eos>"
            assert prompt + y == [2] * added + tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode((prompt + y)[added:]) == text
            assert tokenizer.decode(prompt[added:]) == x.rstrip()
            rest = text.removeprefix(x.rstrip())
            apart.append(tokenizer.encode(rest, add_special_tokens=False) != y)
    assert any(apart) == spaces                         # as one text, not one behind the other


CHAT = [dict(role="user", content="a"), dict(role="assistant", content="b"),
        dict(role="user", content="c")]
ANSWER = [dict(role="assistant", content="good")]
ASKED = "user : a <eos> assistant : b <eos> user : c <eos> assistant :"
OPENED = a_tokenizer(closing=True, eos_token="<eos>", bos_token="<bos>")
TURNS = a_tokenizer()
TURNS.chat_template = TEMPLATE.replace("<eos>", "k")            # its turns do not end with <eos>


@pytest.mark.parametrize("tokenizer, prompt, completion, first, second", [
    (None, "c d", " a b", "c d", "a b <eos>"),
    (None, "c <eos>", " a <eos> b", "c <eos>", "a <eos>"),
    (OPENED, "c d", " a b <eos> <eos>", "<bos> c d", "a b <eos>"),
    (OPENED, "<bos> c <eos>", "<eos>", "<bos> c <eos>", "<eos>"),
    (None, ids("a"), ids("b <eos> c"), "a", "b <eos> c"),
    (None, CHAT, ANSWER, ASKED, "good <eos>"), (OPENED, CHAT, ANSWER, ASKED, "good <eos>"),
    (TURNS, CHAT, ANSWER, ASKED.replace("<eos>", "k"), "good k")])
def test_texts_messages_and_ids_become_tokens_with_one_end_of_text(
        tokenizer, prompt, completion, first, second):
    rows = [dict(prompt=prompt, completion=completion, label=label, score=None, chosen=None)
            for label in (True, False, 1, 0)]
    for item, given in zip(items_of(rows, tokenizer), (1, 0, 1, 0)):
        assert (item["kind"], item["given"]) == (own_model.LABEL, given)
        assert item["prompt"] == ids(first) and item["completions"] == [ids(second)]


def test_what_is_too_long_is_dropped_and_that_is_said(folder, tmp_path, capsys):
    rows = [dict(prompt="k", chosen=" a" * count, rejected=" b", extra=3) for count in (1, 6, 7, 9)]
    results = run(folder, rows, tmp_path / "out", max_steps=1, max_length=8, heldout=0)
    assert results["items"] == dict(train=2, held=0)
    assert "2 items are too long. rho is 0 exactly for all 2 others\n" in capsys.readouterr().out


# ---------------------------------------------------------------- what cannot be trained
GOOD = dict(prompt="a", completion="b")
BAD = {
    "a line has prompt, and either": [
        GOOD, dict(completion="b", label=True), dict(prompt="a", chosen="b"), [1, 2],
        *(GOOD | dict(label=label) for label in (None, -1, 0.3, "1", math.nan)),
        *(GOOD | dict(score=score) for score in (1.5, -0.1, math.nan, "0.5"))],
    "prompt and completions are not all": [
        *(dict(prompt=x, completion=[9], score=1) for x in ("a", [], ["a"], CHAT)),
        *(dict(prompt=[5], completion=y, score=1) for y in ("b", [], [6.5], [True], ANSWER))],
    "no token of its own, or one that is not from 0 to": [
        dict(prompt=[-1], completion=[9], score=1), dict(prompt=[5], completion=[99], score=1),
        dict(prompt="", completion="b", score=1)],
    "a completion is empty": [dict(prompt="a", completion="", score=1),
                              dict(prompt="a", chosen="b", rejected="")],
    "must alternate": [dict(prompt=CHAT, completion=ANSWER, score=1)],
    "": [b'{"prompt": "a", "com', b'{"a": "\xe4"}',
         dict(prompt="a", completion="\ud800", score=1)]}


@pytest.mark.parametrize("message, line", [
    (message, line if isinstance(line, bytes) else json.dumps(line).encode())
    for message, lines in BAD.items() for line in lines])
def test_a_bad_line_is_named(message, line, tmp_path, capsys):
    path, tokenizer = tmp_path / "bad.jsonl", a_tokenizer()
    path.write_bytes(json.dumps(feedback(1)[0]).encode() + b"\n" + line)
    tokenizer.chat_template = "{{ raise_exception('must alternate') }}"
    with pytest.raises(SystemExit, match="2"):
        own_model.read_lines(path, own_model.item_of, tokenizer, len(WORDS), 32)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(message, said.split(f"bad.jsonl, line 2: {line[:60]}: ")[1])


@pytest.mark.parametrize("flags, message", [
    (dict(data=os.devnull), "nothing to learn from"), (dict(model="no"), "--model no: "),
    (dict(beta=0), "--beta must be above 0"), (dict(batch=1), "--batch"),
    (dict(offset="learned"), "--offset: invalid choice: 'learned'"),
    (dict(neftune_noise_alpha=1), "--neftune_noise_alpha would be")])
def test_other_bad_input_is_one_line_too(flags, message, folder, tmp_path, capsys):
    said = ends(capsys, 2, folder, feedback(1), tmp_path / "out", **flags)
    assert re.search(message, said), said


def test_a_run_that_diverges_says_so_and_saves_nothing(folder, tmp_path, capsys):
    said = ends(capsys, 1, folder, feedback(12), tmp_path / "out", learning_rate=1e30, heldout=0,
                max_steps=2)
    assert "training diverged and has no results" in said and not list(tmp_path.glob("out/*"))
