"""The README is executed too: its links, its tables, its commands, its numbers."""
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
import una
from lab.figures import lost
from lab.variants import COMPARED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = json.loads((ROOT / "lab" / "claims.json").read_text(encoding="utf-8"))
DEFINED = dict(re.findall(r'^\[(\w+)\]: (\S+\s+"test_\w+")$', README, re.M))
TESTED = ("The idea", "From equation to code to test", "Errata")


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(heading):
    """The cells of a section's table, without its two heading lines."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


# ---------------------------------------------------------------- links and names
def test_every_test_that_the_readme_names_is_in_the_file_it_names():
    for label, target in DEFINED.items():
        path, name = re.fullmatch(r'(\S+)\s+"(test_\w+)"', target).groups()
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.M), (label, name)
    assert len(DEFINED) > 40
    assert README.count('"test_') == len(DEFINED)


def test_every_row_of_the_tables_leads_to_its_test_and_no_name_is_left_over():
    used = set()
    for heading in TESTED:
        for cells in rows(heading):
            (label,) = re.fullmatch(r"\[test\]\[(\w+)\]", cells[-1]).groups()
            used.add(label)
    assert used == set(DEFINED)


@pytest.mark.parametrize("page", ["README.md", "lab/README.md"])
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 5
    for target in links:
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists()


def test_every_equation_has_a_row_and_every_public_function_of_una_one():
    table = rows("From equation to code to test")
    numbers = {int(number) for cells in table for number in re.findall(r"\d+", cells[0])}
    assert numbers == set(range(1, 23))
    public = {name for name, value in vars(una).items()
              if getattr(value, "__module__", "") == "una" and not name.startswith("_")}
    assert public == {cells[1].strip("`") for cells in table}


def test_equations_of_the_table_are_those_of_the_docstrings():
    table = rows("From equation to code to test")
    for name in ("reward_model_loss", "rlhf_objective", "optimal_policy", "implicit_reward",
                 "implicit_score", "una_reward_loss", "una_score_loss", "una_binary_loss",
                 "una_pair_loss", "dpo_loss"):
        docstring = getattr(una, name).__doc__
        said = set(re.findall(r"\d+", re.match(r"Eq\. ([\d, ]+)", docstring).group(1)))
        shown = {number for cells in table if f"`{name}`" in cells[1]
                 for number in re.findall(r"\d+", cells[0])}
        assert said <= shown, name


def test_every_line_of_code_and_prose_has_at_most_100_characters():
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in filter(lambda name: (ROOT / name).exists(), listed.stdout.split()):
        text = (ROOT / name).read_text(encoding="utf-8")
        if name == "lab/README.md":                              # its tables are made, and wider
            text = re.sub(r"^\|[^\n]*$|^```\n.*?^```$", "", text, flags=re.M | re.S)
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 100, f"{name}:{number}"


# ---------------------------------------------------------------- commands and numbers
def test_the_flags_that_the_readme_names_exist_with_the_defaults_it_gives():
    help_text = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT,
                               capture_output=True, text=True).stdout
    running = section("Running it")
    for flag in set(re.findall(r"`(--[a-z-]+)", running)) - {"--index-url"}:
        assert flag in help_text
    defaults = train.Settings()
    assert f"`--beta {defaults.beta}`" in running and f"`--steps {defaults.steps}`" in running
    assert f"| {defaults.judged} stored responses" in section("Results")
    assert f"{defaults.steps * defaults.batch:,} fresh samples" in section("Results")
    assert round(defaults.steps * defaults.batch / defaults.judged) == 19
    assert "some nineteen times" in section("Results")
    assert f"to each of {len(data.TRAIN_PROMPTS)} prompts" in section("The toy")


def test_the_two_commands_stand_in_one_block_near_the_top():
    block = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert block == ["pip install -r requirements.txt && python train.py",
                     "pip install -r requirements.txt && python -m pytest"]
    assert README.index("```sh") < 1200


def percent(values):
    """A median and the ends of the range, as the table of results writes them."""
    middle, low, high = (100 * f(values) for f in (statistics.median, min, max))
    middle, low, high = (f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in (middle, low, high))
    return f"{middle} % ({low} to {high})"


def test_the_results_are_those_of_claims_json():
    start = {entry["seed"]: entry for entry in CLAIMS["reference"]}
    runs = [run for run in CLAIMS["runs"] if run.get("reward_source") != "model"]
    told = {name for cells in rows("Results") for name in re.findall(r"`([\w-]+)`", cells[0])}
    assert told == {run["method"] for run in runs} == set(COMPARED) <= set(train.METHODS)
    for cells in rows("Results"):
        for name in re.findall(r"`([\w-]+)`", cells[0]):
            own = [run for run in runs if run["method"] == name]
            for split, cell in zip(("train", "heldout"), cells[2:]):
                assert percent([run[split]["regret"] / start[run["seed"]][split]["regret"]
                                for run in own]) == cell, (name, split)
            assert all(math.isclose(lost(run), run["train"]["regret"]
                                    / start[run["seed"]]["train"]["regret"], rel_tol=1e-6)
                       for run in own)


def test_the_toys_example_and_its_numbers_are_true():
    assert "`happy sea :` → ` golden dancing sea`" in README
    prompt = data.encode_prompts(["happy sea :"])
    good, _ = data.encode_responses([" golden dancing sea"])
    assert data.reward(prompt, good).item() == pytest.approx(1.9)
    assert "26 tokens" in README and data.ENCODING.n_vocab == 26
    assert sum(25 ** n for n in range(5)) == 406_901 and "406,901" in README


# ---------------------------------------------------------------- the recipe for a new loss
def test_a_new_loss_is_one_function_and_one_row_of_methods(monkeypatch, tmp_path):
    # IPO, as a stranger would add it: the README's second and last step.
    def ipo(policy, batch, beta):
        chosen, rejected = train.implicit_reward(policy, batch, beta).chunk(2)
        return una.una_reward_loss(chosen - rejected, 0.5)

    monkeypatch.setitem(train.METHODS, "ipo", train.Method("pairs", ipo, 1e-3, 1))
    monkeypatch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:2])
    monkeypatch.setattr(data, "HELDOUT_PROMPTS", data.HELDOUT_PROMPTS[:1])
    tiny = ("--methods ipo,una-score --steps 3 --judged 48 --reference-steps 8 --n-layer 1 "
            "--n-head 1 --n-embd 8 --batch 24 --jobs 1 --device cpu")
    assert train.main([*tiny.split(), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [run["method"] for run in results["runs"]] == ["ipo", "una-score"]
    assert results["runs"][0]["start_loss"] == pytest.approx(0.25)
