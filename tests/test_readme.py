"""The README is executed too: its links, its tables, its commands, its numbers."""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
import una
from lab import budget_tables, compare, figures, tables
from lab.variants import COMPARED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = json.loads((ROOT / "lab" / "claims.json").read_text(encoding="utf-8"))
BUDGET = json.loads((ROOT / "lab" / "budget.json").read_text(encoding="utf-8"))
# What `python train.py` wrote, on seed 0, but for its dots.
DEFAULT = json.loads((ROOT / "lab" / "default.json").read_text(encoding="utf-8"))
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
TESTS = [name for path in (ROOT / "tests").glob("test_*.py")
         for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)]


def section(heading, page=README):
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(heading, page=README):
    """The cells of a section's first table, without its two heading lines."""
    table = re.findall(r"(?:^\|.*\n)+", section(heading, page), re.M)[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


def numbers(cell):
    """The equations of a cell: 4, 19–21 are 4, 19, 20, 21."""
    return {number for first, last in re.findall(r"(\d+)(?:–(\d+))?", cell)
            for number in range(int(first), int(last or first) + 1)}


def block(number):
    """What stands between the README's fences that have no language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for language, text in blocks if not language][number].rstrip("\n")


# ---------------------------------------------------------------- links and names
def test_every_word_for_pytest_k_selects_a_test():
    words = [cells[-1].strip("`") for heading in ("The map of methods", "Errata")
             for cells in rows(heading)]
    words += re.findall(r"`(?:python -m pytest )?-k (\w+)`", README)
    assert len(words) > 40
    for word in words:
        assert any(word in name for name in TESTS), word


def test_every_equation_has_tests_of_its_number():
    for number in range(1, 23):
        assert any(f"eq{number:02d}" in name for name in TESTS), number


@pytest.mark.parametrize("page", ["README.md", "lab/README.md", "examples/README.md"])
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for target in links:
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        there = (ROOT / page).parent / name if name else ROOT / page
        assert there.exists(), target
        if heading:
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                               for title in re.findall(r"^## (.*)$", there.read_text(
                                   encoding="utf-8"), re.M)}, target


def test_every_equation_has_a_row_and_every_public_function_of_una_one():
    table = rows("From equation to code to test")
    assert set.union(*(numbers(cells[0]) for cells in table)) == set(range(1, 23))
    public = [name for name, value in vars(una).items()
              if getattr(value, "__module__", "") == "una" and not name.startswith("_")]
    shown = [name for cells in table for name in re.findall(r"`(\w+)`", cells[1])]
    assert sorted(public) == sorted(shown)


def test_equations_of_the_table_are_those_of_the_docstrings():
    table = rows("From equation to code to test")
    for name in ("reward_model_loss", "rlhf_objective", "optimal_policy", "implicit_reward",
                 "implicit_score", "una_reward_loss", "una_score_loss", "una_binary_loss",
                 "una_pair_loss", "dpo_loss"):
        docstring = getattr(una, name).__doc__
        said = set(re.findall(r"\d+", re.match(r"Eq\. ([\d, ]+)", docstring).group(1)))
        shown = next(numbers(cells[0]) for cells in table if f"`{name}`" in cells[1])
        assert {int(number) for number in said} <= shown, name


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
    for flag in set(re.findall(r"`(--[a-z-]+)", running)):
        assert flag in help_text
    defaults = train.Settings()
    assert f"`--beta {defaults.beta}`" in running and f"`--steps {defaults.steps}`" in running
    assert f"with β = {defaults.beta} and" in README
    one_line = " ".join(README.split())
    assert f"sees {defaults.judged:,} judged responses once" in one_line
    assert defaults.judged == defaults.steps * defaults.batch
    assert f"It answers {len(data.TRAIN_PROMPTS)} prompts in turn" in one_line
    assert data.LEVELS == {"sea": -1, "wind": -1 / 3, "fire": 1 / 3, "night": 1}
    assert "−1, −1/3, 1/3 or 1 to all rewards of a prompt" in one_line


def test_the_two_commands_stand_in_one_block_near_the_top():
    block = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert block == ["pip install -r requirements.txt && python train.py",
                     "pip install -r requirements.txt && python -m pytest"]
    assert README.index("```sh") < 1200


def test_what_the_main_command_prints_is_what_it_printed():
    assert block(0) == figures.table(DEFAULT)
    settings = train.Settings()
    for name, value in DEFAULT["settings"].items():
        if name not in ("methods", "out", "device", "jobs"):
            assert value == getattr(settings, name), name
    assert DEFAULT["settings"]["methods"] == [*COMPARED]
    for run in DEFAULT["runs"]:
        method = train.METHODS[run["method"]]
        assert (run["learning_rate"], run["method_beta"]) == (
            method.learning_rate, method.beta * settings.beta), run["method"]


def test_the_paper_in_three_responses_is_what_una_py_prints():
    printed = subprocess.run([sys.executable, "una.py"], cwd=ROOT, capture_output=True, text=True,
                             encoding="utf-8", check=True).stdout
    assert block(1) == printed.rstrip("\n")


def percent(values):
    """A median and the ends of the range, as the tables of results write them."""
    middle, low, high = (100 * f(values) for f in (statistics.median, min, max))
    middle, low, high = (f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in (middle, low, high))
    return f"{middle} % ({low} to {high})"


def test_the_results_and_what_f_is_for_are_those_of_claims_json():
    offsets = {"0": "zero", "one constant": "constant", "estimated": "estimated",
               "learned": "learned", "cancels": "zero", "−β z₀: 0 here": "zero",
               "a baseline": "zero", "a value model": "zero"}
    kinds = {"pairs": "pairs", "labels": "binary", "scores": "scores", "a third of each": "mixed",
             "fresh rewards": "fresh"}
    assert len(rows("Results")) == 10
    for names, feedback, offset, *cells in rows("Results"):
        for name in re.findall(r"`([\w-]+)`", names):
            method = train.METHODS[name]
            assert method.feedback == kinds[feedback.split(":")[0]]
            for level, cell in zip((0.0, 1.0), cells):
                runs = tables.pick(CLAIMS, name, offsets[offset], level)
                if (name, level) == ("una-pair", 1.0):           # dpo's
                    assert not runs
                    continue
                if (name, level) in (("una-mixed", 1.0), ("ppo", 1.0)):  # tuned there, run there
                    runs = [run for run in BUDGET["runs"]
                            if run["method"] == name and run["judged"] == 76_800]
                assert len(runs) == 8
                assert cell == percent([lost / 100 for lost in compare.lost(runs)]), (name, level)


def test_the_sentences_under_the_results_are_those_of_the_runs():
    prose = " ".join(section("Results").split())
    start = {entry["seed"]: entry["heldout"]["regret"] for entry in CLAIMS["reference"]}

    def heldout(name, offset="zero", level=0.0):
        share = statistics.median(run["heldout"]["regret"] / start[run["seed"]]
                                  for run in tables.pick(CLAIMS, name, offset, level))
        return f"{100 * share:.2g} %"
    assert (f"but for `una-score-offset`, {heldout('una-score-offset', 'estimated')}, and `dpo`, "
            f"{heldout('dpo')}; with levels `una-binary-bce` loses "
            f"{heldout('una-binary-bce', level=1.0)}.") in prose
    exact = statistics.median(compare.lost(tables.pick(CLAIMS, "una-binary-bce", "exact", beta=1)))
    zero = statistics.median(compare.lost(tables.pick(CLAIMS, "una-binary-bce", "zero")))
    idea = " ".join(section("The idea").split())
    assert f"that loses {exact:.2g} %, and 0 only {zero:.2g} %" in idea
    runs = [tables.pick(CLAIMS, "dpo"), *(tables.pick(CLAIMS, name) for name in (
        "una-pair", "una-online"))]
    assert [sum(lost > 100 for lost in compare.lost(of)) for of in runs] == [4, 4, 1]

    def of(method, offset, size):
        lost = compare.lost(budget_tables.pick(CLAIMS, BUDGET, method, offset, size))
        return f"{statistics.median(lost):.2g}"
    few, many = ([of("una-score", "zero", size), of("una-score-offset", "estimated", size),
                  of("una-score", "learned", size)] for size in (1200, 76_800))
    assert (f"loses {few[0]} % with f = c = 0, {few[1]} % with the estimate and {few[2]} % with a "
            f"learned number; from 76,800 it is {many[0]}, {many[1]} and {many[2]} %.") in prose


def test_what_dpo_loses_with_twice_the_tuning_is_that_of_pairs_json():
    told = json.loads((ROOT / "lab" / "pairs.json").read_text(encoding="utf-8"))
    lost = compare.lost([run for run in told["runs"] if run["rule"] == "median"])
    assert len(lost) == 8
    assert f"loses {percent([share / 100 for share in lost])} ([more]" in " ".join(README.split())


def test_the_trainers_on_the_toy_are_those_of_on_the_toy_json():
    told = json.loads((ROOT / "examples" / "on_the_toy.json").read_text(encoding="utf-8"))
    table = rows("Is it what train.py does, and what others do?", EXAMPLES)
    for by, column in (("train.py", 1), ("own_model.py", 2), ("TRL", 3)):
        runs = [run for run in told["runs"] if run["by"] == by]
        for cells in table:
            lost = [run["lost"] for run in runs if run["method"] == cells[0].strip("`")]
            assert cells[column] == (percent(lost) if lost else "–"), (by, cells[0])
            assert len(lost) in (0, 3)
        assert {run["method"] for run in runs} <= {cells[0].strip("`") for cells in table}
    noisy = [100 * run["lost"] for run in told["runs"] if run["by"] == "train.py, noise"]
    assert f"between {min(noisy):.0f} and {max(noisy):.0f} %" in " ".join(EXAMPLES.split())


def test_the_memory_of_the_trainers_is_that_of_memory_json():
    told = json.loads((ROOT / "examples" / "memory.json").read_text(encoding="utf-8"))
    columns = [("NVIDIA H100 80GB HBM3", False), ("NVIDIA H100 80GB HBM3", True), ("cpu", False)]
    for words, *cells in rows("Memory", EXAMPLES):
        for (device, bf16), cell in zip(columns, cells, strict=True):
            assert [f"{run['bytes'] / 1e9:.1f}" for run in told[device]["runs"]
                    if (run["by"], run["bf16"]) == (words.split("'")[0].strip("`"), bf16)] == [cell]


def test_what_dpo_lost_elsewhere_is_what_it_lost_there():
    told = {name: json.loads((ROOT / "lab" / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("default", "default-cpu", "default-h100")}
    lost = [next(100 * figures.lost(run) for run in results["runs"] if run["method"] == "dpo")
            for results in told.values()]
    here, cpu, gpu = (f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in lost)
    assert f"it lost {here} % here, {cpu} % on another CPU, {gpu} % on an H100" in " ".join(
        README.split())


def test_the_toys_example_and_its_numbers_are_true():
    samples = DEFAULT["reference"][0]["samples"]
    prompt = list(samples)[0]
    assert f"responses to `{prompt}`" in section("The toy")
    for text in samples[prompt]:
        reward = data.reward(data.encode_prompts([prompt]), data.encode_responses([text])[0])
        assert f"`{text}` {reward.item():+.1f}".replace("-", "−") in section("The toy")
    assert "26 tokens" in README and data.ENCODING.n_vocab == 26
    assert sum(25 ** n for n in range(5)) == 406_901 and "406,901" in README
    assert sum(50256 ** n for n in range(5)) == pytest.approx(6e18, rel=0.1)


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
