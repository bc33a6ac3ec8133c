"""The toy for other people's trainers, and what they make of it, against the exact optimum.

    python examples/on_the_toy.py write DIR                          what train.py learns from
    python examples/on_the_toy.py evaluate DIR FOLDER                what the policy in FOLDER lost
    python examples/on_the_toy.py compare DIR --seed 1 --seeds 3     four trainers, three seeds

write and compare take train.py's flags. To compare needs requirements-trl.txt and an hour on two
cores, and goes on if it was stopped.

Written are reference, a GPT-2 and its tokenizer; pairs.jsonl, binary.jsonl and scores.jsonl, with
own_model.py's fields; and mixed.jsonl, of a third of the responses each, as una-mixed has them.
Prompts and completions are lists of token ids. A completion ends with end-of-text, or was cut off
after its fourth word: then there is none, and none may be appended.

A policy is any GPT-2 with these tokens. Lost is the README's: 0 % is the exact optimum on the
training prompts, 100 % the reference.
"""
import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # or TRL would report each run to the Hub

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from lab import exact, run
from model import GPT, GPTConfig

logging.disable_progress_bar()


# ---------------------------------------------------------------- the model and its tokenizer
def transposed(state):
    """GPT's state_dict for transformers, and back: GPT-2 has four of a block's matrices so."""
    names = "c_attn.weight", "c_proj.weight", "c_fc.weight"
    return {name: part.T if name.endswith(names) else part for name, part in state.items()}


def to_transformers(gpt):
    """A model.GPT as a GPT2LMHeadModel with the same logits; copied."""
    sizes = dict(vars(gpt.config))
    hf = GPT2LMHeadModel(GPT2Config(
        n_positions=sizes.pop("block_size"), **sizes, activation_function="gelu_new",
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=data.EOT, eos_token_id=data.EOT, pad_token_id=data.EOT))
    hf.transformer.load_state_dict(transposed(gpt.state_dict()))           # lm_head is tied to wte
    return hf


def from_transformers(hf):
    """A GPT2LMHeadModel as a model.GPT with the same logits; copied. ValueError if there is none:
    of GPT-2's options, such as the activation function, model.GPT has one variant."""
    of, prompts = hf.config, data.encode_prompts(data.PROMPTS)
    gpt = GPT(GPTConfig(of.vocab_size, of.n_positions, of.n_layer, of.n_head, of.n_embd))
    gpt.load_state_dict(transposed(hf.transformer.state_dict()))
    if not torch.allclose(gpt(prompts), hf(prompts).logits, rtol=0, atol=1e-4):
        raise ValueError("this GPT-2 has other options than the reference")
    return gpt.requires_grad_(False)


def tokenizer():
    """data.ENCODING for transformers. Any tokens that are decoded and encoded come back.

    An unknown word is an error. Padding is end-of-text too: the model knows no other token.
    """
    words = {data.ENCODING.decode([token]): token for token in range(data.ENCODING.n_vocab)}
    end = data.ENCODING.decode([data.EOT])
    inner = Tokenizer(models.WordLevel(words))
    # A model may write a mood, which has no space, behind a word: that is two words all the same.
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(data.WORDS)), "isolated")
    inner.decoder = decoders.Fuse()                              # the spaces are in the words
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end,
                                   pad_token=end, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- write, evaluate
def write(folder, settings):
    """Trains the reference of settings.seed, collects its feedback, and writes both."""
    reference = train.train_reference(settings, settings.seed)
    to_transformers(reference).save_pretrained(folder / "reference")
    tokenizer().save_pretrained(folder / "reference")
    feedback = train.collect_feedback(settings, settings.seed, reference)
    x = feedback.tokens[:, :data.PROMPT_TOKENS].tolist()
    y = [tokens[mask].tolist() for tokens, mask in zip(feedback.tokens, feedback.mask)]
    binary = [dict(prompt=prompt, completion=completion, label=label)
              for prompt, completion, label in zip(x, y, feedback.labels.bool().tolist())]
    scores = [dict(prompt=prompt, completion=completion, score=score)
              for prompt, completion, score in zip(x, y, feedback.scores.tolist())]
    pairs = [dict(prompt=x[chosen], chosen=y[chosen], rejected=y[rejected])
             for chosen, rejected in feedback.pairs.tolist()]
    of_labels, of_scores = data.thirds(len(x))
    of_pairs = (feedback.pairs[:, 1] < of_labels).sum().item()
    mixed = pairs[:of_pairs] + binary[of_labels:of_scores] + scores[of_scores:]
    for kind, rows in dict(pairs=pairs, binary=binary, scores=scores, mixed=mixed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
    run.write_json(folder / "toy.json", dict(beta=settings.beta, level=settings.level))


def evaluate(folder, policy_folder):
    """What a policy reaches on the training prompts: exact.evaluate's figures."""
    toy = run.read_json(folder / "toy.json")
    reference, policy = (
        from_transformers(GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32))
        for path in (folder / "reference", policy_folder))
    world = exact.World(reference, data.TRAIN_PROMPTS, toy["beta"], toy["level"])
    return exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))


# ---------------------------------------------------------------- other trainers
def stored_feedback(method, folder, settings):
    """The file that a method learns from, its rows, and how many of them train.py's batches have:
    of pairs no more than half the responses, since those of two identical ones are left out."""
    path = folder / f"{train.METHODS[method].feedback}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return path, rows, round(settings.batch * len(rows) / settings.judged)


def common_flags(method, size, out, settings):
    """train.py's settings, by the names that TRL and own_model.py have for them."""
    of = train.METHODS[method]
    return dict(output_dir=str(out), seed=settings.seed, max_steps=settings.steps,
                per_device_train_batch_size=size, beta=of.beta_multiple * settings.beta,
                learning_rate=of.learning_rate, adam_beta2=0.99, max_grad_norm=1.0,
                use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True)


def judge(prompts, completions, **_):
    """The toy's judge, as TRL and online.py call it. A level would drop out: no method below
    compares responses to different prompts."""
    tokens = tokenizer()(completions, padding="max_length", max_length=data.MAX_TOKENS,
                         return_tensors="pt").input_ids
    return data.reward(data.encode_prompts(prompts), tokens).tolist()


def trl_trainer(method, folder, out, settings):
    """TRL's trainer of a method or, for una-online, online.py's. All but the loss is train.py's:
    the batches and their order, or as many fresh samples of each prompt; Adam and its learning rate
    at each step; float32, no dropout."""
    import online
    import trl
    from datasets import Dataset

    steps = settings.steps
    if train.METHODS[method].feedback == "fresh":
        rows, size = [dict(prompt=prompt) for prompt in data.TRAIN_PROMPTS], settings.batch
        options = dict(num_generations=size // len(rows), shuffle_dataset=False,
                       max_completion_length=data.MAX_TOKENS)
        judges = dict(reward_funcs=judge)
    else:
        _, rows, size = stored_feedback(method, folder, settings)
        batches = data.shuffled(torch.arange(len(rows)), size,   # as in data.stored_batches
                                torch.Generator().manual_seed(settings.seed))
        # TRL takes texts, and appends end-of-text to those without: to responses that were cut off.
        # There it is one token too many, and is cut off again.
        rows = [{name: data.ENCODING.decode(part) if isinstance(part, list) else part
                 for name, part in rows[i].items()}
                for _, batch in zip(range(steps), batches) for i in batch.tolist()]
        options = dict(train_sampling_strategy="sequential", precompute_ref_log_probs=True,
                       max_length=data.PROMPT_TOKENS + data.MAX_TOKENS)
        judges = {}
    config, of_trl, more = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer, {}),
        "kto": (trl.KTOConfig, trl.KTOTrainer, {}),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer, {}),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer,                # the paper's, not TRL's default
                 dict(loss_type="grpo", use_bias_correction_kl=False)),
        "una-online": (trl.GRPOConfig, online.UNATrainer, dict(scale_rewards="none"))}[method]
    args = config(**common_flags(method, size, out, settings), **options, **more,
                  bf16=False, activation_checkpointing=False)    # TRL's defaults: the opposite
    trainer = of_trl(
        GPT2LMHeadModel.from_pretrained(folder / "reference", dtype=torch.float32),
        args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **judges)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(    # as train.descend's
        trainer.create_optimizer(),                              # AdamW; its weight decay is 0
        lambda done: min(1.0, (done + 1) / (0.05 * steps)) * (1 - done / steps))
    return trainer


def train_by_own_model(method, folder, out, settings):
    """Batches and learning rate are the Trainer's own. The batches are shuffled otherwise, and the
    rate's two ramps follow one another, where train.py multiplies them."""
    import own_model

    path, _, size = stored_feedback(method, folder, settings)
    flags = common_flags(method, size, out, settings) | dict(
        model=folder / "reference", data=path, heldout=0, per_device_eval_batch_size=1024,
        warmup_steps=settings.steps // 20)
    more = {"una-binary-bce": ["--g=bce"], "una-score-estimated": ["--offset=estimated"]}
    own_model.main([f"--{name}={value}" for name, value in flags.items()] + more.get(method, []))


# ---------------------------------------------------------------- compare
BY = {"train.py": ["dpo", "kto", "una-binary-bce", "una-score", "una-score-estimated", "una-mixed",
                   "una-online", "rloo", "grpo"],
      "own_model.py": ["dpo", "una-binary-bce", "una-score", "una-score-estimated", "una-mixed"],
      "online.py": ["una-online"],
      "TRL": ["dpo", "kto", "rloo", "grpo"]}


def figures_of(by, method, folder, settings):
    """One run, and exact.evaluate's figures of where it ended."""
    if by == "train.py":
        shared, *_ = train.prepare(settings, settings.seed)
        return train.run_method(settings, settings.seed, method, shared)["train"]
    out = folder / f"{by}-{method}"
    if by == "own_model.py":
        train_by_own_model(method, folder, out, settings)
    else:
        trainer = trl_trainer(method, folder, out, settings)
        trainer.train()
        trainer.save_model()
    return evaluate(folder, out)


def compare(folder, settings):
    """Writes on_the_toy.json, anew after each run. What it has already is not run again."""
    path = folder / "on_the_toy.json"
    told = run.read_json(path) if path.exists() else dict(versions=run.versions(), runs=[])
    for seed in range(settings.seed, settings.seed + settings.seeds):
        toy, of = folder / f"seed-{seed}", argparse.Namespace(**vars(settings) | dict(seed=seed))
        if not (toy / "toy.json").exists():
            write(toy, of)
        done = [(row["by"], row["method"]) for row in told["runs"] if row["seed"] == seed]
        calls = [(figures_of, by, method, toy, of) for by, methods in BY.items()
                 for method in methods if (by, method) not in done]
        for (_, by, method, *_), reached in run.side_by_side(calls, settings.jobs):
            figures = dict(kl=reached["kl"], lost=reached["lost"])
            told["runs"].append(dict(seed=seed, by=by, method=method, **figures))
            told["runs"].sort(key=lambda row: (row["by"], row["seed"], row["method"]))
            run.write_json(path, told)
            run.say(f"{path}: {len(told['runs'])} runs")


# ---------------------------------------------------------------- the commands
def main(arguments=None):
    parser = run.Parser("on_the_toy.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "evaluate", "compare"):
        commands.add_parser(name).add_argument("folder", metavar="DIR", type=Path)
    commands.choices["evaluate"].add_argument("policy", metavar="FOLDER", type=Path)
    args, flags = parser.parse_known_args(arguments)
    settings = train.parse([*flags, "--device", "cpu", "--out", ""])
    torch.set_num_threads(1)                                     # as in train.py: the same figures
    try:
        if args.command == "evaluate":
            print("reward {reward:.3f}, KL {kl:z.3f}, J {objective:.3f}, lost {lost:z.2%}".format(
                **evaluate(args.folder, args.policy)))
        else:
            dict(write=write, compare=compare)[args.command](args.folder, settings)
    except (OSError, ValueError) as error:                       # a folder is not there, or another
        parser.error(f"{args.folder}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
