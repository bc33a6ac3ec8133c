"""on_the_toy.py and online.py. They are skipped where TRL is missing."""
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import on_the_toy as toy
import online
import own_model

import data
import train
import una
from helpers import moved, near
from lab import exact, run
from toy import LANGUAGE as SMALL

trl = pytest.importorskip("trl")
torch.set_num_threads(1)
FLAGS = "--level 1 --judged 198 --reference-steps 20 --n-layer 2 --n-head 2 --n-embd 16".split()
PROGRAM = Path(sys.argv[0]).name
LANGUAGE = SMALL | dict(TRAIN_PROMPTS=data.TRAIN_PROMPTS[:3],
                        HELDOUT_PROMPTS=data.HELDOUT_PROMPTS[:1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export in the small language: its folder, and reference and feedback made anew."""
    folder = tmp_path_factory.mktemp("toys") / "seed-3"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LANGUAGE.items():
            patch.setattr(data, name, value)
        toy.main(["write", str(folder), "--seed", "3", *FLAGS])
        settings = train.parse([*FLAGS, "--device", "cpu"])
        reference = train.train_reference(settings, 3)
        feedback = train.collect_feedback(settings, 3, reference)
        yield SimpleNamespace(folder=folder, reference=reference, feedback=feedback,
                              reward_model=None)


@pytest.fixture
def same_numbers(monkeypatch):
    """TRL draws its samples by the random numbers by which train.py draws them."""
    for trainer in trl.GRPOTrainer, trl.RLOOTrainer:
        def sample(self, *prompts, generate=trainer._generate_single_turn):
            self.numbers = getattr(
                self, "numbers", torch.Generator().manual_seed(self.args.seed).get_state())
            with torch.random.fork_rng():
                torch.set_rng_state(self.numbers)
                samples = generate(self, *prompts)
                self.numbers = torch.get_rng_state()
            return samples
        monkeypatch.setattr(trainer, "_generate_single_turn", sample)


# ---------------------------------------------------------------- tokenizer, evaluate
def test_the_tokenizer_is_the_encoding_and_reads_whatever_it_writes(tmp_path):
    toy.tokenizer().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    for tokens in ([i, j] for i in range(26) for j in range(26)):          # "happyhappy" too
        assert words.decode(tokens) == data.ENCODING.decode(tokens)
        assert words(words.decode(tokens))["input_ids"] == tokens
    with pytest.raises(Exception, match="UNK"):
        words("happy  sea :")


def test_a_policy_is_measured_as_train_py_measures_it_or_not_at_all(exported, tmp_path, capsys):
    policy = moved(exported.reference, scale=0.3)
    toy.to_transformers(policy).save_pretrained(tmp_path)
    world = exact.World(exported.reference, data.TRAIN_PROMPTS, 0.25, level=1.0)
    expected = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
    assert toy.evaluate(exported.folder, tmp_path) == pytest.approx(expected, abs=1e-6)
    toy.main(["evaluate", str(exported.folder), str(tmp_path)])
    assert f"lost {expected['lost']:.2%}\n" in capsys.readouterr().out
    other = GPT2LMHeadModel.from_pretrained(tmp_path, activation_function="gelu")
    with pytest.raises(ValueError, match="other options"):
        toy.from_transformers(other)
    with pytest.raises(SystemExit, match="^2$"):
        toy.main(["evaluate", str(tmp_path), str(tmp_path)])
    assert re.fullmatch("on_the_toy.py: .*toy.json'\n", capsys.readouterr().err)


# ---------------------------------------------------------------- TRL
def test_the_judge_reads_each_completion_with_its_own_prompt(exported):
    prompts, texts = ["happy wind :", "sad wind :"], [" warm", " warm"]
    rewards = data.reward(data.encode_prompts(prompts), data.encode_responses(texts)[0])
    assert toy.judge(prompts, texts) == rewards.tolist() and rewards[0] != rewards[1]


def trl_and_us(exported, method, steps, out, monkeypatch):
    """TRL's trainer of a method for the export; a policy; train.py's batches of 48 for it, too."""
    of = train.METHODS[method]._replace(learning_rate=4e-3, beta_multiple=2)
    monkeypatch.setitem(train.METHODS, method, of)
    settings = train.parse(f"--steps {steps} --batch 48 --judged 198 --beta 0.125 --seed 7".split())
    trainer = toy.trl_trainer(method, exported.folder, out, settings)
    policy = moved(exported.reference, scale=0)
    if of.feedback == "fresh":
        return trainer, policy, train.fresh_batches(policy, None, exported, 48, 7, level=1.0)
    return trainer, policy, train.stored_batches(of, exported, 48, 7, torch.zeros(3))


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "rloo", "una-online"])
def test_trl_has_train_pys_losses_and_ends_where_it_does(
        name, exported, tmp_path, monkeypatch, same_numbers):
    # kto too, as its two estimates of z_0 differ, but both are cut off at 0 here.
    trainer, policy, batches = trl_and_us(exported, name, 40, tmp_path, monkeypatch)
    losses = []
    train.align(train.METHODS[name], policy, batches, 0.25, 40,            # 2 are the ramp up
                look=lambda step, seconds, loss: losses.append(loss), at=range(1, 41))
    expected = 0 if name == "rloo" else sum(losses) / 40         # TRL has ratios for log pi: -A
    assert trainer.train().training_loss == pytest.approx(expected, abs=1e-5)
    theirs, ours, start = (
        train.logprob(model, exported.feedback.tokens, exported.feedback.mask)
        for model in (toy.from_transformers(trainer.model), policy, exported.reference))
    assert (ours - start).abs().mean() > 0.5 and near(theirs, ours, 1e-4)


def test_trls_kto_takes_z0_from_each_prompt_with_the_response_in_front_of_it(
        exported, tmp_path, monkeypatch):
    trainer, policy, batches = trl_and_us(exported, "kto", 1, tmp_path, monkeypatch)
    our = next(batches)
    others = torch.cat([our.tokens[:, :3], our.tokens[:, 3:].roll(1, 0)], 1), our.mask.roll(1, 0)
    likelier = train.METHODS["kto"]._replace(loss=lambda *_: -train.logprob(policy, *others))
    train.align(likelier, policy, batches, 0.25, 30)             # or z_0 would be cut off at 0
    trainer.model.transformer.load_state_dict(toy.transposed(policy.state_dict()))
    with torch.no_grad():
        logprob, ref_logprob, policy_kl, ref_kl = (
            train.logprob(model, *responses) for responses in ((our.tokens, our.mask), others)
            for model in (policy, exported.reference))
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert (policy_kl - ref_kl).mean() > 0.1
    losses = una.kto_loss(logprob, ref_logprob, our.labels, policy_kl, ref_kl, 0.25)
    assert near(loss, losses.mean(), 1e-5)


# ---------------------------------------------------------------- online.py
PLAIN = ("--optim sgd --lr_scheduler_type constant --learning_rate 0.5 --max_grad_norm 0 "
         "--max_steps 2 --num_generations 8 --max_completion_length 2 --beta 0.25 --judge "
         "on_the_toy:judge --per_device_train_batch_size 24 --save_strategy no --report_to none "
         "--use_cpu True --disable_tqdm True --seed 6").split()          # some samples end early


def run_online(exported, out, flags="", lines=None):
    """online.py's command for the export, with its prompts or other lines. Returns its weights."""
    path = exported.folder / "prompts.jsonl"
    lines = [dict(prompt=prompt) for prompt in data.TRAIN_PROMPTS] if lines is None else lines
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    online.main(["--model", f"{exported.folder}/reference", "--prompts", str(path),
                 "--output_dir", str(out), *PLAIN, *flags.split()])
    return load_file(out / "model.safetensors")


def test_a_step_online_is_one_however_its_batch_is_cut_or_prompts_are_told_and_lora_is_added_up(
        exported, tmp_path, same_numbers, capsys, monkeypatch):
    start = load_file(exported.folder / "reference/model.safetensors")
    whole = run_online(exported, tmp_path / "whole")
    assert capsys.readouterr().out.count("rho is 0 exactly for the first 24 samples\n") == 1
    cut = run_online(exported, tmp_path, "--per_device_train_batch_size 4 "
                     "--gradient_accumulation_steps 6 --activation_checkpointing 1")
    lora = run_online(exported, tmp_path / "lora", "--lora 1 --learning_rate 5")
    judge, load = toy.judge, own_model.load

    def with_template(args):
        words, model = load(args)
        words.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        return words, model

    monkeypatch.setattr(own_model, "load", with_template)
    monkeypatch.setattr(toy, "judge", lambda prompts, completions: judge(
        [message["content"] for [message] in prompts], completions))
    chats = [dict(prompt=[dict(role="user", content=x)]) for x in data.TRAIN_PROMPTS]
    by_chat = run_online(exported, tmp_path / "chat", lines=chats)
    for name, weight in whole.items():
        assert near(cut[name], weight, 1e-6) and near(by_chat[name], weight, 1e-6), name
    assert max((whole[name] - start[name]).abs().max() for name in start) > 0.01
    moves = [lora[name] - start[name] for name in start if not near(lora[name], start[name], 1e-6)]
    assert moves and all(torch.linalg.matrix_rank(move, atol=1e-5) == 1 for move in moves)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("sad sea :").input_ids


def too_few(prompts, completions):
    return [0.0]


def nan(prompts, completions):
    return [float("nan")] * len(prompts)


GOOD = dict(prompt="happy wind :")


@pytest.mark.parametrize("flags, lines, message", [
    *((f"{flag} 2", None, f"{flag}: for Eq. 7 it must be [1n]") for flag in (
        "--scale_rewards", "--num_iterations", "--steps_per_generation", "--temperature")),
    ("--num_generations 7", None, "flags: .*24.* must be divisible by num_generations .7"),
    ("--judge nowhere:f", None, "--judge nowhere:f: No module named 'nowhere'"),
    ("--judge math:f", None, "--judge math:f: .*no attribute 'f'"),
    ("--judge math:pi", None, "--judge math:pi: 'float' object is not callable"),
    ("--judge test_on_the_toy:too_few", None, "too_few: for 24 completions, no finite"),
    ("--judge test_on_the_toy:nan", None, "nan: for 24 completions, no finite .*nan"),
    ("--model nowhere", None, "--model nowhere: "),
    ("--prompts nowhere", None, "--prompts nowhere: .*No such file"),
    ("", [{}], "line 1: b'{}': 'prompt'"),
    ("", [GOOD, dict(prompt=[dict(content="happy")])], "line 2: .*chat.template"),
    ("", [GOOD], "jsonl: a step takes 3 prompts, and there are 1")])
def test_online_pys_bad_input_is_one_line(flags, lines, message, exported, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_online(exported, tmp_path / "out", flags, lines)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(PROGRAM)]
    assert ended.value.code == 2 and len(said) == 1 and re.search(message, said[0]), said
    assert not [*tmp_path.glob("out/*")]


def test_a_run_online_that_starts_elsewhere_or_diverges_ends_and_saves_nothing(
        exported, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="1"):
        run_online(exported, tmp_path, "--learning_rate 1e30")
    assert re.search("training: .*inf.*nan", capsys.readouterr().err)
    load = own_model.load

    def with_dropout(args):
        words, model = load(args)
        model.transformer.drop = torch.nn.Dropout(0.5)
        return words, model

    monkeypatch.setattr(own_model, "load", with_dropout)
    with pytest.raises(SystemExit, match="1"):
        run_online(exported, tmp_path)
    assert "nats before training" in capsys.readouterr().err and not [*tmp_path.glob("*")]


# ---------------------------------------------------------------- compare
def test_on_all_feedback_at_once_all_trainers_are_one_and_compare_goes_on(
        exported, monkeypatch, same_numbers):
    path = exported.folder.parent / "on_the_toy.json"
    flags = "--seed 3 --seeds 1 --jobs 1 --batch 198 --steps 4"  # of so few none is a ramp up
    command = ["compare", str(path.parent), *flags.split(), *FLAGS]
    toy.main(command)
    told = run.read_json(path)
    ours = {row["method"]: row for row in told["runs"] if row["by"] == "train.py"}
    assert len(told["runs"]) == 9 + 5 + 1 + 4 and all(row["kl"] > 1e-3 for row in ours.values())
    for row in told["runs"]:
        assert row == pytest.approx(ours[row["method"]] | dict(by=row["by"]), abs=1e-5)
    missing = next(row for row in told["runs"] if row["by"] == "own_model.py")
    run.write_json(path, told | dict(runs=[row for row in told["runs"] if row != missing]))
    for name in ("write", "trl_trainer"):
        monkeypatch.setattr(toy, name, None)
    toy.main(command)
    assert run.read_json(path) == told
