"""The README is executed too: its links, its tables, its commands. Its results are test_claims.py's."""
import re
import subprocess
import sys
from pathlib import Path

import train
import una

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(heading):
    """The cells of a section's table, without its two heading lines."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_test_that_the_readme_names_exists():
    defined = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 30 and named <= defined, named - defined


def test_every_link_leads_somewhere():
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", README):
        path, _, line = target.partition("#L")
        assert target.startswith("https://") or (ROOT / path).exists(), target
        if line:
            assert (ROOT / path).read_text().splitlines()[int(line) - 1].startswith(f"def {text.strip('`')}("), (text, target)


def test_every_equation_has_a_row_and_every_public_function_of_una_one():
    table = rows("From equation to code to test")
    numbers = {int(number) for cells in table for number in re.findall(r"\d+", cells[0])}
    assert numbers == set(range(1, 23))
    public = {name for name in vars(una) if callable(getattr(una, name)) and getattr(getattr(una, name), "__module__", "") == "una"}
    assert public == set(re.findall(r"`(\w+)`\]\(una\.py", README))


def test_equations_of_the_table_are_those_of_the_docstrings():
    for name in ("reward_model_loss", "rlhf_objective", "optimal_policy", "implicit_reward", "implicit_score", "una_reward_loss",
                 "una_score_loss", "una_binary_loss", "una_pair_loss", "dpo_loss"):
        said = set(re.findall(r"\d+", re.match(r"Eq\. ([\d, ]+)", getattr(una, name).__doc__).group(1)))
        shown = {number for cells in rows("From equation to code to test") if f"`{name}`" in cells[1] for number in re.findall(r"\d+", cells[0])}
        assert said <= shown, name


def test_every_row_of_the_tables_is_linked_to_its_test():
    for heading in ("The idea", "From equation to code to test", "Errata"):
        for cells in rows(heading):
            assert any(re.fullmatch(r"\[`test_\w+`\]\(tests/test_\w+\.py#L\d+\)", cell) for cell in cells), cells


def test_the_flags_that_the_readme_names_exist_with_the_defaults_it_gives():
    told = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in told
    assert f"β = {train.Settings().beta} for all" in README and "from 4096 that" in README and train.Settings().judged == 4096
    assert "takes two inner steps" in README and train.PPO_EPOCHS == 2
    assert train.Settings().steps * train.Settings().batch == 76_800 and "76,800 fresh samples" in README


def test_the_two_commands_stand_in_one_block_near_the_top():
    block = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert block == ["pip install -r requirements.txt && python train.py", "pip install -r requirements.txt && python -m pytest"]
    assert README.index("```sh") < 1200
