"""The toy for other people's trainers, and what they make of it, against the exact optimum.

    python examples/on_the_toy.py write DIR                          what train.py learns from
    python examples/on_the_toy.py evaluate DIR FOLDER                what the policy in FOLDER lost
    python examples/on_the_toy.py trl DIR --method dpo --out FOLDER  a policy by a trainer of TRL's
    python examples/on_the_toy.py compare DIR                        four trainers, three seeds

The last two need requirements-trl.txt. All but evaluate take train.py's flags too: --seed, --steps,
--judged, --level, ... Written are reference, a GPT-2 and its tokenizer for from_pretrained;
pairs.jsonl, binary.jsonl and scores.jsonl, with own_model.py's field names; mixed.jsonl, of a third
of the responses each, as una-mixed has them; and toy.json: seed, judged, level and beta.

Prompts and completions are lists of token ids, to be taken as they are. A completion ends with
end-of-text, or was cut off after its fourth word: then there is none, and none may be appended.
Pairs of two identical responses are left out, as train.py leaves them out.
A policy is any GPT-2 of the reference's shape. Lost is the README's: 0 % is the exact optimum,
100 % the reference. To compare takes an hour on two cores, and goes on if it was stopped.
"""
import argparse
import contextlib
import copy
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # or TRL would report each run to the Hub

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from lab import exact, run
from model import GPT, GPTConfig

logging.disable_progress_bar()
# Of GPT-2 model.GPT has one variant: with another GELU a policy would be measured as another.
SHAPE = ("model_type vocab_size n_positions n_layer n_head n_embd n_inner activation_function "
         "layer_norm_epsilon scale_attn_weights scale_attn_by_inverse_layer_idx "
         "tie_word_embeddings").split()


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
    """A GPT2LMHeadModel of the toy's options as a model.GPT with the same logits; copied."""
    of = hf.config
    gpt = GPT(GPTConfig(of.vocab_size, of.n_positions, of.n_layer, of.n_head, of.n_embd))
    gpt.load_state_dict(transposed(hf.transformer.state_dict()))
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


# ---------------------------------------------------------------- write
def rows_of(feedback):
    """{kind: its rows}: what data.Feedback says, as the objects of the JSONL files."""
    x = feedback.tokens[:, :data.PROMPT_TOKENS].tolist()
    y = [tokens[mask].tolist() for tokens, mask in zip(feedback.tokens, feedback.mask)]
    pairs = [dict(prompt=x[chosen], chosen=y[chosen], rejected=y[rejected])
             for chosen, rejected in feedback.pairs.tolist()]
    binary = [dict(prompt=x[i], completion=y[i], label=label)
              for i, label in enumerate(feedback.labels.bool().tolist())]
    scores = [dict(prompt=x[i], completion=y[i], score=score)
              for i, score in enumerate(feedback.scores.tolist())]
    of_labels, of_scores = data.thirds(len(x))
    of_pairs = int((feedback.pairs[:, 1] < of_labels).sum())
    mixed = pairs[:of_pairs] + binary[of_labels:of_scores] + scores[of_scores:]
    return dict(pairs=pairs, binary=binary, scores=scores, mixed=mixed)


def write(folder, settings):
    """Trains the reference of settings.seed, collects its feedback, and writes all into folder."""
    reference = train.train_reference(settings, settings.seed)
    to_transformers(reference).save_pretrained(folder / "reference")
    tokenizer().save_pretrained(folder / "reference")
    feedback = train.collect_feedback(settings, settings.seed, reference)
    for kind, rows in rows_of(feedback).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
    names = "seed", "judged", "level", "beta"
    run.write_json(folder / "toy.json", {name: getattr(settings, name) for name in names})


def read(path):
    """The object of a JSON file, or those of a JSONL file."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [*map(json.loads, text.splitlines())]


def evaluate(folder, policy_folder):
    """{"train": figures, "heldout": figures} of a policy, as exact.evaluate has them."""
    toy, folders = read(folder / "toy.json"), (folder / "reference", policy_folder)
    (policy_folder / "config.json").stat()       # or transformers would look for it elsewhere
    configs = [*map(AutoConfig.from_pretrained, folders)]
    for name in SHAPE:
        ours, theirs = (getattr(config, name, None) for config in configs)
        if theirs != ours:
            raise ValueError(f"{policy_folder}: {name} is {theirs}, the reference's is {ours}")
    reference, policy = (from_transformers(GPT2LMHeadModel.from_pretrained(
        path, dtype=torch.float32)) for path in folders)
    worlds = ((split, exact.World(reference, prompts, toy["beta"], toy["level"])) for split, prompts
              in (("train", data.TRAIN_PROMPTS), ("heldout", data.HELDOUT_PROMPTS)))
    return {split: exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
            for split, world in worlds}


# ---------------------------------------------------------------- trl
def judge(prompts, completions):
    """The toy's judge as examples/online.py calls it. A level would drop out: no method below
    compares responses to different prompts."""
    words = tokenizer()
    rows = [ids + [data.EOT] * (data.MAX_TOKENS - len(ids)) for ids in words(completions).input_ids]
    return data.reward(data.encode_prompts(prompts), torch.tensor(rows)).tolist()


def trl_trainer(folder, method, out, settings, learning_rate=None, beta=None):
    """TRL's trainer of a method of TRL or, for una-online, that of online.py. All but the loss is
    as in train.py: the same batches in the same order, or as many fresh samples of each prompt,
    Adam without weight decay, the gradient cut to norm 1, two ramps of the learning rate, float32,
    no dropout; learning rate and the loss's beta too, if none are given.

    KTO's z_0 is not quite train.py's. Both are the mean log pi/pi_ref of as many mismatched
    responses as a batch has, and at least 0. TRL gives each prompt the response in front of it in
    the batch, which answers the same prompt one time in twelve; train.py's always answer another.
    GRPO is the paper's: TRL's default multiplies k3 by the ratio, which changes its gradient.
    """
    import online
    import trl
    from datasets import Dataset

    toy, of, steps = read(folder / "toy.json"), train.METHODS[method], settings.steps
    words = PreTrainedTokenizerFast.from_pretrained(folder / "reference")
    if of.feedback == "fresh":
        size, texts = settings.batch, [dict(prompt=prompt) for prompt in data.TRAIN_PROMPTS]
        options = dict(num_generations=size // len(texts), shuffle_dataset=False,
                       max_completion_length=data.MAX_TOKENS)
        options |= dict(grpo=dict(loss_type="grpo", use_bias_correction_kl=False), rloo={}).get(
            method, dict(scale_rewards="none"))
        judges = dict(reward_funcs=online.reward_function(judge, "the toy's"))
    else:
        rows = read(folder / f"{of.feedback}.jsonl")
        # Pairs of two identical responses are left out: so a batch has no more than batch / 2.
        size = min(len(rows), max(1, round(settings.batch * len(rows) / toy["judged"])))
        batches = data.shuffled(torch.arange(len(rows)), size,   # as in data.stored_batches
                                torch.Generator().manual_seed(settings.seed))
        texts = [{name: words.decode(part) if isinstance(part, list) else part
                  for name, part in rows[i].items()}
                 for _, batch in zip(range(steps), batches) for i in batch.tolist()]
        # They are shuffled already. TRL takes texts, and appends end-of-text to those without it:
        # to responses that were cut off. There it is one token too many, and is cut off again.
        options = dict(train_sampling_strategy="sequential", precompute_ref_log_probs=True,
                       max_length=data.PROMPT_TOKENS + data.MAX_TOKENS)
        judges = {}
    config, trainer = {"una-online": (trl.GRPOConfig, online.UNATrainer)}.get(method) or (
        getattr(trl, f"{method.upper()}{part}") for part in ("Config", "Trainer"))
    model = GPT2LMHeadModel.from_pretrained(folder / "reference", dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate or of.learning_rate,
                                 betas=(0.9, 0.99), fused=True)
    ramps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (      # as train.descend's
        min(1.0, (done + 1) / (0.05 * steps)) * (1 - done / steps)))
    args = config(
        output_dir=str(out), seed=settings.seed, beta=beta or of.beta_multiple * toy["beta"],
        max_steps=steps, per_device_train_batch_size=size, max_grad_norm=1.0,
        bf16=False, activation_checkpointing=False, use_cpu=True,  # TRL's defaults: the opposite
        report_to="none", save_strategy="no", **options)
    return trainer(model=model, args=args, train_dataset=Dataset.from_list(texts),
                   processing_class=words, optimizers=(optimizer, ramps), **judges)


def train_by_trl(folder, method, out, *how):
    trainer = trl_trainer(folder, method, out, *how)
    trainer.train()
    trainer.model.save_pretrained(out)


# ---------------------------------------------------------------- compare
# All settings are the same, but own_model.py has the Trainer's own batches and schedule: shuffled
# otherwise, and the rate's two ramps one after the other, where train.py multiplies them.
TRL = ("dpo", "kto", "grpo", "rloo")
OWN = {"dpo": [], "una-binary-bce": ["--g=bce"], "una-score": [],    # and flags of own_model.py
       "una-score-estimated": ["--offset=estimated"], "una-mixed": []}
BY = {"train.py": ["dpo"], "TRL": TRL, "online.py": ["una-online"], "own_model.py": OWN}


def train_by_own_model(folder, method, out, settings):
    import own_model

    toy, of = read(folder / "toy.json"), train.METHODS[method]
    path = folder / f"{of.feedback}.jsonl"
    flags = dict(
        model=folder / "reference", data=path, output_dir=out, heldout=0, seed=settings.seed,
        beta=of.beta_multiple * toy["beta"], learning_rate=of.learning_rate, anchor=of.anchor,
        adam_beta2=0.99,
        per_device_train_batch_size=round(settings.batch * len(read(path)) / toy["judged"]),
        per_device_eval_batch_size=1024, max_steps=settings.steps, lr_scheduler_type="linear",
        warmup_steps=settings.steps // 20, save_strategy="no", use_cpu=True, report_to="none")
    own_model.main([*OWN[method], *(f"--{name}={value}" for name, value in flags.items())])


def runs_by(by, method, folder, settings):
    """[(by, method, figures)] of a run of own_model.py or TRL; what they say is in a file. Of
    train.py all runs of a seed: they share its reference and feedback."""
    if by == "train.py":
        return runs_by_train_py(settings)
    out = folder / f"{by}-{method}"
    with (open(f"{out}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        (train_by_own_model if by == "own_model.py" else train_by_trl)(
            folder, method, out, settings)
        return [(by, method, evaluate(folder, out)["train"])]


def runs_by_train_py(settings):
    """Beside each method's run those of dpo from first weights that differ by 1e-7 of themselves:
    how far does rounding carry?"""
    shared, *_ = train.prepare(settings, settings.seed)
    runs = [("train.py", method, shared) for method in settings.methods]
    for number in (1, 2, 3):
        noisy, generator = copy.copy(shared), torch.Generator().manual_seed(number)
        noisy.reference = copy.deepcopy(shared.reference)
        for part in noisy.reference.parameters():
            part *= 1 + 1e-7 * torch.randn(part.shape, generator=generator)
        runs.append(("train.py, noise", "dpo", noisy))
    return [(by, method, train.run_method(settings, settings.seed, method, on)["train"])
            for by, method, on in runs]


def compare(folder, settings):
    """Writes on_the_toy.json, anew after each run. What it has already is not run again."""
    path = folder / "on_the_toy.json"
    told = read(path) if path.exists() else dict(versions=run.versions(), runs=[])
    done = [(row["by"], row["method"], row["seed"]) for row in told["runs"]]
    toys = [(write, folder / f"seed-{seed}", argparse.Namespace(**vars(settings) | dict(seed=seed)))
            for seed in range(settings.seed, settings.seed + settings.seeds)]
    for (_, toy, _), _ in run.side_by_side(
            [call for call in toys if not (call[1] / "toy.json").exists()], settings.jobs):
        run.say(f"{toy}: written")
    calls = [(runs_by, by, method, toy, of)
             for by, methods in BY.items() for method in methods
             for _, toy, of in toys if (by, method, of.seed) not in done]
    for (*_, of), ended in run.side_by_side(calls, settings.jobs):
        told["runs"] += [dict(seed=of.seed, by=by, method=method, **{
            name: reached[name] for name in ("kl", "lost")}) for by, method, reached in ended]
        told["runs"].sort(key=lambda row: (row["by"], row["seed"], row["method"]))
        run.write_json(path, told)
        run.say(f"{path}: {len(told['runs'])} runs")


# ---------------------------------------------------------------- the commands
def main(arguments=None):
    parser = run.Parser("on_the_toy.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "evaluate", "trl", "compare"):
        commands.add_parser(name).add_argument("folder", metavar="DIR", type=Path)
    commands.choices["evaluate"].add_argument("policy", metavar="FOLDER", type=Path)
    trl = commands.choices["trl"]
    trl.add_argument("--method", choices=[*TRL, "una-online"], required=True)
    trl.add_argument("--out", metavar="FOLDER", type=Path, required=True)
    for name in ("--learning_rate", "--beta"):
        trl.add_argument(name, type=float, help="[as in train.py's METHODS]")
    args, flags = parser.parse_known_args(arguments)
    seeds = ["--seed", "1", "--seeds", "3"] if args.command == "compare" else []
    methods = ",".join(dict.fromkeys([*OWN, *TRL, "una-online"]))
    settings = train.parse([*seeds, *flags, "--methods", methods, "--device", "cpu", "--out", ""])
    torch.set_num_threads(1)                                     # as in train.py: the same figures
    try:
        if args.command == "write":
            write(args.folder, settings)
        elif args.command == "evaluate":
            lines = ["            reward       KL        J      lost"] + [
                "{:<9}{reward:9.3f}{kl:z9.3f}{objective:9.3f}{lost:z10.2%}".format(split, **of)
                for split, of in evaluate(args.folder, args.policy).items()]
            print("\n".join(lines))
        elif args.command == "trl":
            how = settings, args.learning_rate, args.beta
            train_by_trl(args.folder, args.method, args.out, *how)
        else:
            compare(args.folder, settings)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
