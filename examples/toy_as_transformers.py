"""The toy for other people's trainers, and what they make of it, against the exact optimum.

    pip install -r requirements.txt transformers==5.24.0
    python examples/toy_as_transformers.py DIR [--seed 0] [--judged 76800] [--level 0]
    python examples/toy_as_transformers.py DIR --evaluate FOLDER [--json]

The first writes what train.py learns from on this seed, on a CPU:

    DIR/reference      the reference and the tokenizer, for transformers' from_pretrained: a GPT-2
    DIR/pairs.jsonl    {"prompt": ..., "chosen": ..., "rejected": ...}
    DIR/binary.jsonl   {"prompt": ..., "completion": ..., "label": true or false}
    DIR/scores.jsonl   {"prompt": ..., "completion": ..., "score": from 0 to 1}
    DIR/mixed.jsonl    all three: of a third of the responses each, as una-mixed has them
    DIR/toy.json       seed, judged, level and beta: the last two are what an evaluation needs

Prompts and completions are lists of token ids, to be taken as they are. A completion ends with
end-of-text, or was cut off after its fourth word: then there is none, and none may be appended.
Pairs of two identical responses are left out, as train.py leaves them out.

The second measures a policy: any GPT-2 of the reference's shape that was saved in FOLDER. Lost is
the README's: 0 % is the exact optimum, 100 % the reference.
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from lab import exact, figures, run
from model import GPT, GPTConfig

# Sizes, and what GPT-2 leaves open and model.GPT does not: with another GELU a policy would load,
# and be measured as what it is not.
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
    sizes = asdict(gpt.config)
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


# ---------------------------------------------------------------- the feedback
def rows_of(feedback):
    """{kind: its rows}: what data.Feedback says, as the objects of the JSONL files."""
    prompts = feedback.tokens[:, :data.PROMPT_TOKENS].tolist()
    completions = [row[kept].tolist() for row, kept in zip(feedback.tokens, feedback.mask)]
    third = len(prompts) // 6 * 2                                # as in data.stored_batches
    responses = [dict(prompt=x, completion=y) for x, y in zip(prompts, completions)]
    binary = [row | dict(label=bool(label)) for row, label in zip(responses, feedback.labels)]
    scores = [row | dict(score=score.item()) for row, score in zip(responses, feedback.scores)]

    def paired(pairs):
        return [dict(prompt=prompts[chosen], chosen=completions[chosen],
                     rejected=completions[rejected]) for chosen, rejected in pairs.tolist()]

    mixed = (paired(feedback.pairs[feedback.pairs[:, 1] < third]) + binary[third:2 * third]
             + scores[2 * third:])
    return dict(pairs=paired(feedback.pairs), binary=binary, scores=scores, mixed=mixed)


def export(settings, folder):
    """Trains the reference of settings.seed, collects its feedback, and writes all into folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reference = train.train_reference(settings, settings.seed)
    to_transformers(reference).save_pretrained(folder / "reference")
    tokenizer().save_pretrained(folder / "reference")
    feedback = train.collect_feedback(settings, settings.seed, reference)
    for kind, rows in rows_of(feedback).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
    run.write_json(folder / "toy.json", {name: getattr(settings, name)
                                         for name in ("seed", "judged", "level", "beta")})


# ---------------------------------------------------------------- the evaluation
def evaluate(folder, policy_folder):
    """{"train": figures, "heldout": figures} of a policy: exact.evaluate's, and what was lost.

    ValueError where one of the folders is not what it should be; FloatingPointError where the
    policy has left the numbers.
    """
    reference, policy = Path(folder, "reference"), Path(policy_folder)
    for path in (Path(folder, "toy.json"), reference / "config.json", policy / "config.json"):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    ours, theirs = (AutoConfig.from_pretrained(path) for path in (reference, policy))
    for name in SHAPE:
        if getattr(theirs, name, None) != getattr(ours, name):
            raise ValueError(f"{policy_folder}: {name} is {getattr(theirs, name, None)}, "
                             f"the reference's is {getattr(ours, name)}")
    reference, policy = (from_transformers(GPT2LMHeadModel.from_pretrained(
        path, dtype=torch.float32)) for path in (reference, policy))
    settings = json.loads(Path(folder, "toy.json").read_text(encoding="utf-8"))
    reached = {}
    for split, prompts in (("train", data.TRAIN_PROMPTS), ("heldout", data.HELDOUT_PROMPTS)):
        world = exact.World(reference, prompts, settings["beta"], settings["level"])
        start = exact.evaluate(world, world.ref_logprobs)
        there = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
        reached[split] = there | dict(lost=1 - figures.gain_share(there, start))
    return reached


def table(reached):
    lines = [f"{'':<9}{'reward':>9}{'KL':>9}{'J':>9}{'lost':>10}"]
    for split, of in reached.items():
        lines.append(f"{split:<9}{of['reward']:9.3f}{of['kl']:z9.3f}{of['objective']:9.3f}"
                     f"{of['lost']:z10.2%}")
    return "\n".join(lines)


def main(arguments=None):
    parser = run.Parser("toy_as_transformers.py", description="The toy for transformers.")
    parser.add_argument("folder", metavar="DIR", help="where the toy is, or will be")
    for name, default, number in (("seed", 0, run.whole(0, most=2 ** 32)),
                                  ("judged", 76_800, run.whole(24, multiple_of=2)),
                                  ("level", 0.0, run.between(0, 4))):
        parser.add_argument(f"--{name}", type=number, default=default, metavar=name.upper(),
                            help=f"as train.py's, for a new toy [{default}]")
    parser.add_argument("--evaluate", metavar="FOLDER", help="measure the policy that is there")
    parser.add_argument("--json", action="store_true", help="print its figures as a line of JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)                                     # as in train.py: the same figures
    logging.disable_progress_bar()
    try:
        if given.evaluate is None:
            export(train.Settings(seed=given.seed, judged=given.judged, level=given.level,
                                  device="cpu", out=""), given.folder)
        else:
            reached = evaluate(given.folder, given.evaluate)
            print(json.dumps(reached) if given.json else table(reached))
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
