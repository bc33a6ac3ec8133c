"""own_model.py against log-probabilities, losses and gradients written out here.

    python -m pytest examples/test_own_model.py
"""
import ast
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import own_model
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import una

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
WORDS = "<unk> <eos> <bos> user assistant : a b c d e f g h i j k good bad".split()
TEMPLATE = ("{% for m in messages %}{{ m.role + ' : ' + m.content + ' <eos> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")
PLAIN = ["--use_cpu", "--optim", "sgd", "--lr_scheduler_type", "constant", "--max_grad_norm", "0",
         "--save_strategy", "no", "--disable_tqdm", "1", "--learning_rate", "0.5"]


def ids(text):
    """What the tokenizer must give, by hand."""
    return [WORDS.index(word) for word in text.split()]


def a_tokenizer(closing=False, **special):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closing:
        words.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    special = special or dict(eos_token="<eos>")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = TEMPLATE
    return made


def a_model(seed=0, **config):
    """A GPT-2 of two layers, dropout as usual."""
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**dict(dict(
        vocab_size=len(WORDS), n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=None,
        eos_token_id=1, initializer_range=0.3), **config)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model and its tokenizer, saved."""
    path = tmp_path_factory.mktemp("model")
    a_model().save_pretrained(path)
    a_tokenizer().save_pretrained(path)
    return str(path)


def feedback(count, seed=0, prompts=None):
    """Rows of the three kinds in turn, each with a prompt of its own or with one of a few."""
    rng = random.Random(seed)

    def words(least, most):
        return " ".join(rng.choice("abcdefghijk") for _ in range(rng.randint(least, most)))

    some = [words(2, 5) for _ in range(prompts or count)]
    rows = []
    for i in range(count):
        row = dict(prompt=some[i % len(some)])
        if i % 3 == 0:
            row |= dict(chosen=words(1, 6) + " good", rejected=words(1, 4) + " bad")
        elif i % 3 == 1:
            row |= dict(completion=words(1, 6), label=i % 2 == 0)
        else:
            row |= dict(completion=words(1, 6), score=rng.random())
        rows.append(row)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def run(folder, rows, out, *options):
    """main on the rows. Returns results.json."""
    data = write(Path(f"{out}.jsonl"), rows)
    own_model.main(["--model", folder, "--data", data, "--output_dir", str(out), *PLAIN, *options])
    return json.loads((Path(out) / "results.json").read_text("utf-8"))


def plain_logprob(model, prompt, completion):
    """log pi(y|x), a token at a time: no padding, no batch, no mask. In the model's precision."""
    total, tokens = 0.0, list(prompt)
    for token in completion:
        logits = model(torch.tensor([tokens])).logits[0, -1]
        total = total + torch.log_softmax(logits, -1)[token]
        tokens.append(token)
    return total


def completions(row):
    return [ids(row[name]) + [1] for name in ("chosen", "rejected", "completion") if name in row]


def written_out(policy, reference, rows, beta, g, offset=None):
    """Loss of each row, rewards and rhos of its completions, by the equations' formulas."""
    losses, rewards, rhos = [], [], []
    for row in rows:
        prompt = ids(row["prompt"])
        rho = []
        for completion in completions(row):
            with torch.no_grad():
                ref = plain_logprob(reference, prompt, completion)
            rho.append(plain_logprob(policy, prompt, completion) - ref)
        reward = [beta * each + (offset or {}).get(row["prompt"], 0.0) for each in rho]
        if "chosen" in row:
            loss = torch.log(1 + torch.exp(reward[1] - reward[0]))
        else:
            said, s = float(row.get("label", row.get("score"))), 1 / (1 + torch.exp(-reward[0]))
            loss = (s - said) ** 2 if g == "mse" else -(
                said * torch.log(s) + (1 - said) * torch.log(1 - s))
        losses.append(loss)
        rewards.append(reward)
        rhos += rho
    return losses, rewards, rhos


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def weights(path):
    return loaded(path).state_dict()


def farthest(a, b):
    """The largest difference of two state_dicts."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---------------------------------------------------------------- losses and gradients
@pytest.mark.parametrize("g", ["mse", "bce"])
def test_loss_and_what_is_measured_are_those_of_a_plain_loop(folder, tmp_path, monkeypatch, g):
    rows = feedback(40)
    real_split, held = own_model.split, []
    monkeypatch.setattr(own_model, "split", lambda *a: held.append(real_split(*a)) or held[-1])
    results = run(folder, rows, tmp_path / "out", "--g", g, "--beta", "0.7", "--heldout", "0.5",
                  "--max_steps", "6", "--per_device_eval_batch_size", "5")
    prompts = {tuple(item["prompt"]) for item in held[0][1]}
    rows = [row for row in rows if tuple(ids(row["prompt"])) in prompts]
    assert len(rows) == results["items"]["held"] == 20
    for policy, measured in ((loaded(folder), results["before"]),
                             (loaded(tmp_path / "out"), results["after"])):
        with torch.no_grad():
            losses, rewards, rhos = written_out(policy, loaded(folder), rows, 0.7, g)
        kinds = {"pair": "chosen", "label": "label", "score": "score"}
        expected = {f"loss_{kind}": [loss for loss, row in zip(losses, rows) if field in row]
                    for kind, field in kinds.items()}
        pairs = [reward for reward in rewards if len(reward) == 2]
        thumbs = {said: [reward[0] for reward, row in zip(rewards, rows)
                         if row.get("label") is said] for said in (True, False)}
        assert thumbs[True] and thumbs[False]
        expected |= {"loss": losses, "kl_ref_policy": [-rho for rho in rhos],
                     "reward_chosen": [first for first, _ in pairs] + thumbs[True],
                     "reward_rejected": [second for _, second in pairs] + thumbs[False],
                     "pairs_in_order": [1.0 if a > b else 0.5 if a == b else 0 for a, b in pairs]}
        for name, parts in expected.items():
            assert measured[name] == pytest.approx(float(sum(parts) / len(parts)), abs=2e-6), name
        if measured is results["after"]:
            assert max(map(abs, rhos)) > 0.1
            scored = [(float(torch.sigmoid(reward[0])), row["score"])
                      for reward, row in zip(rewards, rows) if "score" in row]
            assert measured["score_correlation"] == pytest.approx(correlation(scored), abs=1e-4)
        else:
            assert "score_correlation" not in measured           # of a constant there is none


def correlation(pairs):
    n = len(pairs)
    mean = [sum(pair[k] for pair in pairs) / n for k in (0, 1)]
    cov = [[sum((p[i] - mean[i]) * (p[j] - mean[j]) for p in pairs) for j in (0, 1)]
           for i in (0, 1)]
    return cov[0][1] / math.sqrt(cov[0][0] * cov[1][1])


def test_losses_are_una_py_s_of_the_same_logprobs(folder):
    rows = feedback(9)
    policy, reference = a_model(1).eval(), a_model().eval()
    tokenizer = a_tokenizer()
    items = [dict(own_model.item_of(row, tokenizer, len(WORDS), 32, own_model.Counter()),
                  offset=0.3, ref_logprob=[0.0, 0.0]) for row in rows]
    with torch.no_grad():
        logprobs, refs = ([[plain_logprob(model, ids(row["prompt"]), y) for y in completions(row)]
                           for row in rows] for model in (policy, reference))
    for item, ref in zip(items, refs):
        item["ref_logprob"] = [float(each) for each in ref] + [0.0] * (2 - len(ref))
    for g in ("mse", "bce"):
        loss, *_ = own_model.outcome(policy, own_model.collate(items), 0.2, g)
        for i, row in enumerate(rows):
            rewards = [una.implicit_reward(p[None], r[None], 0.2, 0.3)
                       for p, r in zip(logprobs[i], refs[i])]
            if "chosen" in row:
                expected = una.una_pair_loss(*rewards)
            elif "label" in row:
                expected = una.una_binary_loss(rewards[0], torch.tensor([row["label"]]), g)
            else:
                expected = una.una_score_loss(rewards[0], torch.tensor([row["score"]]), g)
            torch.testing.assert_close(loss[i:i + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [(7, 1), (2, 4), (3, 4), (1, 7)])
def test_a_step_is_the_gradient_of_the_mean_over_all_items_however_they_are_cut(
        folder, tmp_path, cut):
    rows = feedback(7)
    batch, accumulation = map(str, cut)
    run(folder, rows, tmp_path / "out", "--heldout", "0", "--max_steps", "1", "--learning_rate",
        "1", "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    policy, start = loaded(folder), weights(folder)
    losses, _, _ = written_out(policy, loaded(folder), rows, 0.1, "mse")
    (sum(losses) / 7).backward()
    trained = weights(tmp_path / "out")
    for name, parameter in policy.named_parameters():
        step = start[name] - trained[name]
        torch.testing.assert_close(step, parameter.grad, rtol=1e-4, atol=2e-6)
    assert max(p.grad.abs().max() for p in policy.parameters()) > 0.01


def logged(text):
    """The dicts that the Trainer prints while it trains."""
    lines = [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{'loss'")]
    return [{name: float(value) for name, value in line.items()} for line in lines]


def test_two_processes_are_one(folder, tmp_path, capfd):
    """11 items: the second step of an epoch has 3, so one process has an item too few."""
    rows = feedback(14)
    options = ["--num_train_epochs", "2", "--logging_steps", "1", "--heldout", "0.2"]
    one = run(folder, rows, tmp_path / "one", *options, "--per_device_train_batch_size", "8")
    assert one["items"] == dict(train=11, held=3)
    of_one = logged(capfd.readouterr().out)
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(HERE / "own_model.py"), "--model", folder, "--data", f"{tmp_path / 'one'}.jsonl",
         "--output_dir", str(tmp_path / "two"), *PLAIN, *options, "--per_device_train_batch_size",
         "2", "--gradient_accumulation_steps", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert farthest(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6
    assert farthest(weights(tmp_path / "one"), weights(folder)) > 0.03
    of_two = logged(two.stdout)
    assert len(of_one) == len(of_two) == 4
    for step, (ours, theirs) in enumerate(zip(of_one, of_two)):
        # In the first step rounding alone decides what depends on the order of zeros.
        decided = {"score_correlation", "pairs_in_order"} if step == 0 else set()
        for name in ours.keys() - decided - {"epoch"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    results = json.loads((tmp_path / "two" / "results.json").read_text("utf-8"))
    assert results["after"] == pytest.approx(one["after"], abs=1e-5)


# ---------------------------------------------------------------- the reference
def test_a_run_that_was_killed_and_goes_on_is_one_that_was_not(folder, tmp_path):
    """Killed after a checkpoint. The reference is --model's, not the checkpoint's."""
    rows, options = feedback(14), [
        "--max_steps", "8", "--optim", "adamw_torch", "--lr_scheduler_type", "linear",
        "--learning_rate", "0.01", "--save_strategy", "steps", "--save_steps", "3",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    whole = run(folder, rows, tmp_path / "whole", *options)
    for source in (HERE / "own_model.py", HERE.parent / "una.py"):
        shutil.copy(source, tmp_path)                            # a copy of una.py serves as well
    killed = f"""import os, sys
sys.path = [{str(tmp_path)!r}, *(path for path in sys.path if path)]
import own_model
assert own_model.una.__file__ == {str(tmp_path / "una.py")!r}
save = own_model.UNATrainer._save_checkpoint
def save_and_die(self, *arguments):
    save(self, *arguments)
    if self.state.global_step == 3:
        os.kill(os.getpid(), 9)
own_model.UNATrainer._save_checkpoint = save_and_die
own_model.main(sys.argv[1:])"""
    command = [sys.executable, "-c", killed, "--model", folder, "--data",
               f"{tmp_path / 'whole'}.jsonl", "--output_dir", str(tmp_path / "killed"), *PLAIN]
    ended = subprocess.run([*command, *options], cwd="/", capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert not list((tmp_path / "killed").glob("results.json*"))
    gone_on = run(folder, rows, tmp_path / "killed", *options, "--resume_from_checkpoint",
                  str(tmp_path / "killed" / "checkpoint-3"))
    assert farthest(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0
    assert farthest(weights(tmp_path / "whole"), weights(folder)) > 0.01
    assert gone_on["before"] == whole["before"] and gone_on["after"] == whole["after"]


def test_at_the_start_every_rho_is_0_and_dropout_is_off(folder, tmp_path, capsys):
    assert loaded(folder).config.resid_pdrop == loaded(folder).config.attn_pdrop == 0.1
    before = run(folder, feedback(24), tmp_path / "out", "--heldout", "0.3", "--max_steps", "1")[
        "before"]
    assert "17 items, 7 held out. rho is 0 exactly for 15 of them\n" in capsys.readouterr().out
    assert before["kl_ref_policy"] == before["reward_chosen"] == before["reward_rejected"] == 0
    assert before["pairs_in_order"] == 0.5 and before["loss_label"] == 0.25
    assert loaded(tmp_path / "out").config.resid_pdrop == 0


def test_a_model_with_dropout_left_in_it_is_found_out(folder, tmp_path, capsys, monkeypatch):
    load = transformers.AutoModelForCausalLM.from_pretrained

    def random_model(*arguments, **options):
        model = load(*arguments, **options)
        model.transformer.drop = torch.nn.Dropout(0.1)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", random_model)
    with pytest.raises(SystemExit) as end:
        run(folder, feedback(6), tmp_path / "out", "--max_steps", "1")
    assert end.value.code == 1 and not (tmp_path / "out" / "results.json").exists()
    assert "something in the model is random" in capsys.readouterr().err


def test_one_model_is_loaded_and_its_reference_stays_beside_the_data(
        folder, tmp_path, monkeypatch):
    load, batches = transformers.AutoModelForCausalLM.from_pretrained, []
    calls = []
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda *a, **k: calls.append(a) or load(*a, **k))
    outcome = own_model.outcome
    monkeypatch.setattr(own_model, "outcome", lambda model, batch, *how: (
        batches.append(batch) or outcome(model, batch, *how)))
    rows = feedback(6)
    run(folder, rows, tmp_path / "out", "--heldout", "0", "--num_train_epochs", "2")
    assert len(calls) == 1
    reference, by_prompt = loaded(folder), {}
    for row in rows:
        values = [plain_logprob(reference, ids(row["prompt"]), y).item() for y in completions(row)]
        by_prompt[tuple(ids(row["prompt"]))] = values + [0.0] * (2 - len(values))
    assert len(batches) == 4                 # the reference, the check, an epoch, the second one
    for batch in batches[1:]:
        for tokens, ref in zip(batch["input_ids"].tolist(), batch["ref_logprob"].tolist()):
            start = next(x for x in by_prompt if tuple(tokens[:len(x)]) == x)
            assert ref == pytest.approx(by_prompt[start], abs=1e-5)


# ---------------------------------------------------------------- from text to tokens
def items_of(rows, tmp_path, tokenizer=None, max_length=32):
    return own_model.read(write(tmp_path / "rows.jsonl", rows), tokenizer or a_tokenizer(),
                          len(WORDS), max_length)


@pytest.mark.parametrize("text, expected", [
    ("a b", "a b <eos>"), ("a b <eos>", "a b <eos>"), ("a b <eos> <eos>", "a b <eos>"),
    ("a <eos> b", "a <eos>"), ("<eos>", "<eos>")])
@pytest.mark.parametrize("closing", [False, True])
def test_a_completion_has_one_end_of_text_and_a_prompt_has_none_of_the_tokenizer_s(
        tmp_path, text, expected, closing):
    tokenizer = a_tokenizer(True, eos_token="<eos>", bos_token="<bos>") if closing else None
    rows = [dict(prompt="c d", completion=text, label=True),
            dict(prompt="c <eos>", completion=text, label=True)]
    items, counts = items_of(rows, tmp_path, tokenizer)
    assert [item["completions"] for item in items] == [[ids(expected)]] * 2
    opening = "<bos> " if closing else ""
    assert items[0]["prompt"] == tuple(ids(opening + "c d"))
    assert items[1]["prompt"] == tuple(ids(opening + "c <eos>"))
    assert not any(counts.values())


def test_token_ids_are_taken_as_they_are(tmp_path):
    rows = [dict(prompt=[5, 6], completion=[7, 1, 8], score=0.5),
            dict(prompt=[1], chosen=[9], rejected=[1])]
    items, _ = items_of(rows, tmp_path)
    assert [(item["prompt"], item["completions"]) for item in items] == [
        ((5, 6), [[7, 1, 8]]), ((1,), [[9], [1]])]


def test_too_long_texts_are_cut_and_counted(tmp_path):
    long = "a b c d e f g h"
    rows = [dict(prompt=long, completion="i j", label=1),
            dict(prompt="k", completion=long, label=0),
            dict(prompt=long, chosen="i", rejected=long),
            dict(prompt="k", completion="i", label=0)]
    items, counts = items_of(rows, tmp_path, max_length=6)
    assert [item["prompt"] for item in items] == [
        tuple(ids(text)) for text in ("f g h", "k", "f g h", "k")]
    assert [item["completions"] for item in items] == [
        [ids("i j <eos>")], [ids("a b c d e")], [ids("i <eos>"), ids("a b c")], [ids("i <eos>")]]
    assert (counts["prompts cut"], counts["completions cut"]) == (2, 2)


def test_no_more_tokens_than_the_model_has_positions(folder, tmp_path):
    """32 of them. More would be an error in the model."""
    rows = [dict(prompt="a " * 40, completion="b " * 40, score=0.5) for _ in range(2)]
    results = run(folder, rows, tmp_path / "out", "--max_steps", "1")
    assert results["counts"]["prompts cut"] == results["counts"]["completions cut"] == 2


def test_padding_is_on_the_right_and_the_masks_are_of_lengths(tmp_path):
    """A completion may hold the id that pads."""
    rows = [dict(prompt=[5], completion=[0, 6, 0], label=1),
            dict(prompt=[5, 6, 7], chosen=[8], rejected=[9, 9])]
    items, _ = items_of(rows, tmp_path)
    batch = own_model.collate(items)
    assert batch["input_ids"].tolist() == [[5, 0, 6, 0, 0], [5, 6, 7, 8, 0], [5, 6, 7, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["response_mask"].int().tolist() == [
        [0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_chat_messages_go_through_the_template(tmp_path):
    prompt = [dict(role="user", content="a b"), dict(role="assistant", content="c"),
              dict(role="user", content="d")]
    answer = [dict(role="assistant", content="good")]
    items, _ = items_of([dict(prompt=prompt, completion=answer, label=True)], tmp_path)
    assert items[0]["prompt"] == tuple(ids(
        "user : a b <eos> assistant : c <eos> user : d <eos> assistant :"))
    assert items[0]["completions"] == [ids("good <eos>")]        # not the template's and one more


def test_a_pair_of_identical_completions_is_dropped_and_counted(tmp_path):
    rows = [dict(prompt="a", chosen="b", rejected="b <eos>"), dict(prompt="a", chosen="b",
            rejected="c"), dict(prompt="a", chosen="b b b c", rejected="b b b d")]
    items, counts = items_of(rows, tmp_path, max_length=4)
    assert [item["completions"] for item in items] == [[ids("b <eos>"), ids("c <eos>")]]
    assert counts["pairs dropped: identical completions"] == 2


def test_labels_are_true_false_1_and_0_and_other_fields_do_not_matter(tmp_path):
    rows = [dict(prompt="a", completion="b", label=label, score=None, score_chosen=3)
            for label in (True, False, 1, 0)]
    items, _ = items_of(rows, tmp_path)
    assert [item["given"] for item in items] == [1, 0, 1, 0]
    assert {item["kind"] for item in items} == {own_model.LABEL}


# ---------------------------------------------------------------- offsets and held-out prompts
def test_the_estimated_offset_is_beta_log_mean_exp_of_the_prompt_s_logits(
        folder, tmp_path, capsys):
    beta, scores = 0.5, [0.2, 0.9, 1.0]
    rows = [dict(prompt="a b", completion=word, score=score)
            for word, score in zip("cde", scores)]
    rows += [dict(prompt="a b", completion="f", label=True), dict(prompt="c", completion="d",
             score=0.3), dict(prompt="d", completion="e", label=False)]
    rows += [dict(prompt="e", completion=word, score=0.5) for word in "abcdefgh"]
    rows += [dict(prompt="a b", chosen="g", rejected="h")]
    rewards = [math.log(s / (1 - s)) for s in (0.2, 0.9, 1 - 1e-4)]
    offset = beta * math.log(sum(math.exp(r / beta) for r in rewards) / 3)
    items, counts = items_of(rows, tmp_path)
    own_model.estimate_offsets(items, beta, counts)
    expected = {"a b": offset, "c": 0.0, "d": 0.0, "e": 0.0}
    assert [item["offset"] for item in items] == pytest.approx(
        [expected[row["prompt"]] for row in rows])
    said = {name: n for name, n in counts.items() if n}
    assert said == {
        "prompts whose f(x) + c is estimated, as if the model itself wrote what is scored": 1,
        "prompts whose f(x) + c is a guess: WARNING, there are fewer than 8 scores": 1,
        "prompts whose f(x) + c is 0: there are fewer than 2 scores": 2,
        "scores taken for 0.0001 or 0.9999, since 0 and 1 have no logit": 1}
    out = tmp_path / "out"
    results = run(folder, rows, out, "--offset", "estimated", "--beta", "0.5", "--max_steps", "1")
    assert results["counts"] | said == results["counts"]
    printed = capsys.readouterr().out.splitlines()
    assert all(f"{number} {name}" in printed for name, number in said.items())


def test_before_training_the_implicit_reward_is_the_estimated_offset(folder, tmp_path):
    rows = [dict(prompt=x, completion=y, score=score) for x, scores in
            (("a", (0.2, 0.9)), ("b", (0.3, 0.4))) for y, score in zip("cd", scores)]
    rows += [dict(prompt=x, completion="e", label=True) for x in "ab"]
    items, _ = items_of(rows, tmp_path)
    held = own_model.split(items, 0.5)[1]
    scores = [item["given"] for item in held if item["kind"] == own_model.SCORE]
    odds = sum((s / (1 - s)) ** 2 for s in scores) / 2           # beta = 0.5: e^{r/beta}
    offset = 0.5 * math.log(odds)
    before = run(folder, rows, tmp_path / "out", "--offset", "estimated", "--beta", "0.5",
                 "--heldout", "0.5", "--max_steps", "1")["before"]
    s = 1 / (1 + math.exp(-offset))
    assert before["reward_chosen"] == pytest.approx(offset, rel=1e-6)
    assert before["loss_score"] == pytest.approx(sum((s - said) ** 2 for said in scores) / 2)
    assert before["kl_ref_policy"] == 0


def test_held_out_prompts_are_not_in_the_training_part_and_do_not_depend_on_the_order(tmp_path):
    rows = feedback(60, prompts=20)
    items, _ = items_of(rows, tmp_path)
    train, held = own_model.split(items, 0.25)
    prompts = [{item["prompt"] for item in side} for side in (train, held)]
    assert not prompts[0] & prompts[1] and list(map(len, prompts)) == [15, 5]
    assert len(train) == 45 and len(held) == 15
    random.Random(1).shuffle(rows)
    again, _ = items_of(rows, tmp_path)
    assert {item["prompt"] for item in own_model.split(again, 0.25)[1]} == prompts[1]
    assert own_model.split(items, 0)[1] == []
    assert [len({item["prompt"] for item in side}) for side in own_model.split(items, 1e-3)] == [
        19, 1]


# ---------------------------------------------------------------- what is saved
def test_lora_is_added_up_before_saving(folder, tmp_path, monkeypatch):
    wrap, trained = own_model.peft.get_peft_model, []
    monkeypatch.setattr(own_model.peft, "get_peft_model",
                        lambda *a, **k: trained.append(wrap(*a, **k)) or trained[-1])
    tokens, before_merge = torch.tensor([[5, 6, 7, 8, 9]]), []
    merge = own_model.peft.LoraModel.merge_and_unload

    def look_and_merge(self, *arguments, **options):
        with torch.no_grad():
            before_merge.append(trained[0](input_ids=tokens).logits)
        return merge(self, *arguments, **options)

    monkeypatch.setattr(own_model.peft.LoraModel, "merge_and_unload", look_and_merge)
    results = run(folder, feedback(12), tmp_path / "out", "--lora", "2", "--max_steps", "8",
                  "--heldout", "0.3")
    assert results["before"]["kl_ref_policy"] == 0 != results["after"]["kl_ref_policy"]
    with torch.no_grad():
        saved = loaded(tmp_path / "out")(tokens).logits
        start = loaded(folder)(tokens).logits
    torch.testing.assert_close(saved.float(), before_merge[0], rtol=1e-5, atol=1e-5)
    assert (saved - start).abs().max() > 0.01
    old, new = weights(folder), weights(tmp_path / "out")
    moved = {name: new[name] - old[name] for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(torch.linalg.matrix_rank(move, atol=1e-6) <= 2 for move in moved.values())
    assert not list((tmp_path / "out").glob("adapter*"))


def test_what_is_saved_loads_with_its_tokenizer_and_results_say_what_was_done(folder, tmp_path):
    results = run(folder, feedback(12), tmp_path / "out", "--max_steps", "2", "--beta", "0.3")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.encode("a good") == ids("a good")
    assert results["settings"] == dict(
        model=folder, data=str(tmp_path / "out.jsonl"), beta=0.3, offset="zero", g="mse",
        heldout=0.1, lora=0, max_length=1024)
    assert results["items"] == dict(train=11, held=1)
    assert results["before"].keys() <= results["after"].keys()
    assert not list((tmp_path / "out").glob("*.part"))


# ---------------------------------------------------------------- bad input
GOOD = b'{"prompt": "a", "completion": "b", "label": true}\n'
BAD = {
    "no JSON": (b"{prompt: a}", "line 2.*b'{prompt: a}"),
    "half a line": (GOOD[:20], 'line 2.*"prompt": "a", "com'),
    "an empty line": (b"", "line 2"),
    "no object": (b"[1, 2]", r"line 2.*fields.*\[1, 2\]"),
    "no prompt": (b'{"completion": "b", "label": true}', 'line 2.*fields.*"completion"'),
    "no completion": (b'{"prompt": "a", "label": true}', "line 2.*fields"),
    "only half a pair": (b'{"prompt": "a", "chosen": "b"}', "line 2.*fields"),
    "nothing said": (b'{"prompt": "a", "completion": "b"}', "line 2.*fields"),
    "an empty label": (b'{"prompt": "a", "completion": "b", "label": null}', "line 2.*fields"),
    "label and score": (b'{"prompt": "a", "completion": "b", "label": 1, "score": 1}',
                        "line 2.*fields"),
    "pair and completion": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}',
                            "line 2.*fields"),
    "label -1": (b'{"prompt": "a", "completion": "b", "label": -1}', "line 2: label -1 is not"),
    "label 0.3": (b'{"prompt": "a", "completion": "b", "label": 0.3}', "line 2: label 0.3"),
    "label text": (b'{"prompt": "a", "completion": "b", "label": "1"}', "line 2: label '1'"),
    "label NaN": (b'{"prompt": "a", "completion": "b", "label": NaN}', "line 2: label nan"),
    "score 1.5": (b'{"prompt": "a", "completion": "b", "score": 1.5}', "line 2: score 1.5 is not"),
    "score -0.1": (b'{"prompt": "a", "completion": "b", "score": -0.1}', "line 2: score -0.1"),
    "score NaN": (b'{"prompt": "a", "completion": "b", "score": NaN}', "line 2: score nan"),
    "score Infinity": (b'{"prompt": "a", "completion": "b", "score": Infinity}', "score inf"),
    "score text": (b'{"prompt": "a", "completion": "b", "score": "0.5"}', "line 2: score '0.5'"),
    "score true": (b'{"prompt": "a", "completion": "b", "score": true}', "line 2: score True"),
    "empty completion": (b'{"prompt": "a", "completion": "", "score": 1}', "line 2: an empty"),
    "empty ids": (b'{"prompt": [5], "completion": [], "score": 1}', "line 2: an empty"),
    "empty message": (b'{"prompt": [{"role": "user", "content": "a"}], "completion": '
                      b'[{"role": "assistant", "content": ""}], "score": 1}', "line 2: an empty"),
    "empty rejected": (b'{"prompt": "a", "chosen": "b", "rejected": ""}', "line 2: an empty"),
    "empty prompt": (b'{"prompt": "", "completion": "b", "score": 1}', "line 2: a prompt without"),
    "no ids": (b'{"prompt": [5], "completion": [6.5], "score": 1}', "line 2: .*not both strings"),
    "unknown id": (b'{"prompt": [5], "completion": [99], "score": 1}', "line 2: .*not below 19"),
    "negative id": (b'{"prompt": [-1], "completion": [9], "score": 1}', "line 2: .*not below 19"),
    "text and ids": (b'{"prompt": "a", "completion": [6], "score": 1}', "line 2: .*not both"),
    "a number": (b'{"prompt": "a", "completion": 6, "score": 1}', "line 2: .*not both"),
    "two messages": (b'{"prompt": [{"role": "user", "content": "a"}], "completion": '
                     b'[{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], '
                     b'"score": 1}', "line 2: .*not both"),
    "no character": (b'{"prompt": "a", "completion": "\\ud800", "score": 1}', "line 2"),
    "latin-1": ('{"prompt": "ä", "completion": "b", "score": 1}'.encode("latin-1"),
                r"line 2: .*utf-8.*xe4"),
}


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded."""
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)


def refused(capsys, *arguments):
    """The one line with which main refuses these arguments."""
    with pytest.raises(SystemExit) as end:
        own_model.main([*arguments, "--use_cpu"])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("own_model")]
    assert end.value.code == 2 and len(err) == 1
    return err[0]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_before_any_model_is_loaded(folder, tmp_path, capsys, no_model, name):
    line, message = BAD[name]
    data = tmp_path / "bad.jsonl"
    data.write_bytes(GOOD + line + b"\n" + GOOD)
    said = refused(capsys, "--model", folder, "--data", str(data), "--output_dir", str(tmp_path))
    assert str(data) in said
    assert re.search(message, said), said


def test_other_bad_input_is_one_line_too(folder, tmp_path, capsys, no_model):
    data, empty = tmp_path / "good.jsonl", tmp_path / "empty.jsonl"
    data.write_bytes(GOOD)
    empty.write_bytes(b"")
    same = write(tmp_path / "same.jsonl", [dict(prompt="a", chosen="b", rejected="b")])
    without, bare = tmp_path / "without", tmp_path / "bare"
    a_model().save_pretrained(without)
    a_tokenizer(unk_token="<unk>").save_pretrained(without)
    a_model().save_pretrained(bare)
    good = {"--model": folder, "--data": str(data), "--output_dir": str(tmp_path / "out")}
    for changes, message in [
            ({"--data": str(empty)}, "empty.jsonl: no feedback"),
            ({"--data": same}, "same.jsonl: no feedback"),
            ({"--data": "missing.jsonl"}, "No such file.*missing.jsonl"),
            ({"--model": str(tmp_path / "no")}, f"--model {tmp_path / 'no'}"),
            ({"--model": str(without)}, "without: no tokenizer, or one without end-of-text"),
            ({"--model": str(bare)}, "bare: no tokenizer, or one without end-of-text"),
            ({"--offset": "learned"}, "--offset: invalid choice: 'learned'"),
            ({"--g": "mae"}, "--g: invalid choice: 'mae'"),
            ({"--beta": "0"}, "--beta > 0"), ({"--beta": "nan"}, "--beta > 0"),
            ({"--heldout": "1"}, "--heldout < 1"), ({"--max_length": "1"}, "--max_length > 1"),
            ({"--batch": "1"}, "--batch"), ({"--learning_rate": "fast"}, "--learning_rate.*fast"),
            ({"--resume_from_checkpoint": "nowhere"}, "No such file.*nowhere")]:
        arguments = [part for pair in (good | changes).items() for part in pair]
        assert re.search(message, refused(capsys, *arguments)), message


def test_a_template_that_writes_the_prompt_otherwise_once_it_is_answered(
        tmp_path):
    tokenizer = a_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    rows = [dict(prompt=[dict(role="user", content="a")], label=1,
                 completion=[dict(role="assistant", content="b")])]
    with pytest.raises(ValueError, match="line 1: the chat template"):
        items_of(rows, tmp_path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="line 1: roles must alternate"):
        items_of(rows, tmp_path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="line 1: .*chat.template"):
        items_of(rows, tmp_path, tokenizer)
