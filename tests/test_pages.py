"""What is shown: tables, pictures and pages, held against the JSON files and the code."""
import inspect
import json
import math
import re
import runpy
from pathlib import Path
from statistics import median

import pytest
from matplotlib.figure import Figure

import data
import train
import una
from lab import figures, tables

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "lab/README.md", "examples/README.md", "paper/README.md", "paper/map.md")}
README, LAB, _, EQUATIONS, MAP = PAGES.values()
BLOCKS = [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
          if not language]
RAW = {name: json.loads((ROOT / "lab" / f"{name}.json").read_text(encoding="utf-8"))
       for name in ("stored", "online", "budget", "noise")}
TABLES = tables.tables(tables.read(ROOT / "lab"))


def cells(table):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text):
    return cells(re.findall(r"(?:^\|.*\n)+", text, re.M)[0])[2:]


def prose(page):
    return " ".join(re.sub(r"^\|[^\n]*$|^```\w*\n.*?^```$", "", page, flags=re.M | re.S).split())


def run(method="dpo", seed=1, lost=0.25, kl=0.75, **more):
    reached = dict(reward=1.5, kl=kl, objective=1.3125, lost=lost, optimum=1.5)
    if method not in ("reference", "optimum"):
        reached |= dict(judged=0.1, unjudged=lost - 0.1)
    curve = [dict(seconds=float(i), regret=1 - i * (1 - lost) / 4) for i in range(5)]
    return dict(method=method, seed=seed, train=reached, heldout=reached | dict(lost=2 * lost),
                curve=curve, seconds=4.0, loss=0.5, start_loss=0.75, samples={"a :": [" b"] * 3},
                dots=[[0.5, 1.5], [0.25, -9.0]]) | more


diverged = lambda seed: dict(method="kto", seed=seed, diverged="the loss is nan")


def results(*runs):
    start = [run("reference", seed, 1.0, kl=0.0) for seed in (1, 2)]
    for entry in start:
        entry["train"]["reward"] = 1.0
    return dict(runs=[*runs], reference=start, optimum=[
        run("optimum", seed, 0.0, frontier=[[0.1, 1.2], [0.9, 1.9]]) for seed in (1, 2)])


def test_what_train_py_prints_has_medians_ranges_and_what_diverged():
    made = results(run(lost=0.25), run(seed=2, lost=0.75), run("kto"), diverged(2))
    lines = {line.split()[0]: line.split()[1:] for line in figures.table(made).splitlines()[1:]}
    assert list(lines) == ["reference", "dpo", "kto", "optimum"]
    assert lines["dpo"][3] == "50.00%" and lines["dpo"][-3:] == "25.00% to 75.00%".split()
    assert lines["kto"][3] == "25.00%" and lines["kto"][-4:] == "1 of 2 diverged".split()
    assert "diverged: the loss is nan" in figures.line(diverged(2))
    assert "lost 25.0%" in figures.line(run()) and "Worse than" not in figures.report(made)
    bad = results(run(lost=1.5), run("ppo", lost=0.5), run("kto", lost=9.0))
    assert "Worse than no training, so far: dpo, kto\n" in figures.report(bad)


def test_a_verdict_needs_all_seeds_to_agree_in_sign():
    def of(*shares):
        return [run(lost=share) for share in shares]
    low, high = of(0.1, 0.1, 0.12), of(0.2, 0.22, 0.13)
    assert tables.less(low, high) == ["10 % (10 to 12) against 20 % (13 to 22)", "−10 [−12, −1]",
                                      "replicates"]
    for other, told in (([*of(0.2, 0.3), diverged(3)], "replicates"),
                        (of(0.05, 0.05, 0.05), "does not: the reverse"),
                        (of(0.2, 0.22, 0.11), "does not: no difference shown"),  # one seed against
                        (of(0.2, 0.22, 0.12), "does not: no difference shown")):         # one even
        assert tables.less(low, other)[-1] == told
    assert tables.sooner([1.0, 1.1], [2.0, 2.2])[1:] == ["× 2 [2, 2]", "replicates"]


def test_numbers_ranges_and_when_a_share_of_the_gain_is_there():
    assert [tables.number(value) for value in (12.345, 1234.5, -0.5, math.nan, math.inf)] == [
        "12.3", "1234", "−0.5", "–", "∞"]
    assert tables.ranged([99.7, 5.0, 100.4]) == "100 (5 to 100)"
    assert tables.bad([0.5, 1.0, 1.5, math.inf]) == "2 of 4"
    curve = [dict(seconds=0.0, regret=2.0), dict(seconds=2.0, regret=0.02)]
    assert tables.seconds_until(run(curve=curve), 0.1) == pytest.approx(1.0)
    assert tables.seconds_until(run(curve=curve), 0.001) == math.inf


def percent(shares):
    return "{} % ({} to {})".format(*(f"{value:.2g}" if value < 99.5 else f"{value:.0f}" for value
                                      in (100 * of(shares) for of in (median, min, max))))


def lost(file, method, offset="zero", level=0.0, judged=76_800, part="lost", **fields):
    """What a method's runs lost, from the file itself."""
    fields = dict(method=method, level=level, offset=offset, judged=judged, reward="judge",
                  loss=None) | fields                            # another loss is a knob of a cell
    found = [entry["train"][part] for entry in RAW[file]["runs"]
             if fields.items() <= (entry | dict(loss=None) | entry["cell"]).items()]
    assert len(found) == 8
    return found


def test_a_sample_of_the_tables_cells_is_computed_anew():
    table = {name: {line[0]: line[1:] for line in cells(text)} for name, text in TABLES.items()}
    for name, *what in (("kto", "kto"), ("una-mixed-estimated", "una-mixed", "estimated"),
                        ("una-binary-learned", "una-binary-bce", "learned")):
        assert table["stored"][f"`{name}`"][0] == percent(lost("stored", *what))
        of = median(lost("stored", *what, part="judged"))
        assert table["stored"][f"`{name}`"][2] == f"{100 * of:.2g} %"
    for ramp, words in ((0, "at once"), (0.5, "by the path")):
        assert table["paths"][f"… the exact β log Z(x), {words}"][0] == percent(
            lost("stored", "una-binary-bce", "exact", ramp=ramp))
    assert table["noise"]["labels with the exact β log Z(x), by the path"][::2] == [
        percent(lost("stored", "una-binary-bce", "exact", ramp=0.5)),
        percent(lost("noise", "una-binary-bce", "exact", loss="labels"))]
    assert table["paths"]["scores: 0, `una-score`"][2] == percent(
        lost("stored", "una-score", level=1.0))
    assert table["sizes"]["… learned: `una-score-learned`"][0] == percent(
        lost("budget", "una-score", "learned", 1.0, 1200))
    (models,) = (line for line in cells(TABLES["models"]) if line[0].startswith("600,"))
    assert models[1] == percent([
        of["train"]["lost"] for model in RAW["budget"]["models"] if model["judged"] == 1200
        for of in model["optima"] if of["beta_multiple"] == 2])
    tuned = [row for row in RAW["stored"]["tuning"] if row["method"] == "una-score"
             and row["offset"] == "zero"]
    (best,) = [row["lost"] for row in tuned if row["best"]]
    assert table["stored_grids"]["`una-score`"][1::2] == [percent(best), str(len(tuned))]


def test_the_pages_tables_are_what_fill_writes():
    assert tables.METHODS == tuple(train.METHODS)
    assert tables.filled(LAB, TABLES) == LAB
    assert sorted(re.findall(r"<!-- (?!end)(\w+) -->", LAB)) == sorted(TABLES)
    assert tables.filled(LAB, dict(TABLES, masses="| a |")) != LAB
    drawn = [run["method"] for run in tables.read(ROOT / "lab")["main"]["runs"]]
    assert sorted(drawn) == sorted([*train.METHODS] * 8)


def test_every_number_with_a_range_in_the_prose_is_a_cell():
    shown = r"−?[\d.]+ (?:% )?\(−?[\d.]+ to −?[\d.]+\)"
    there = set(re.findall(shown, "\n".join(re.findall(r"^\|.*$", LAB, re.M))))
    for page, least in ((README, 0), (LAB, 10)):
        said = {*re.findall(shown, prose(page))}
        assert len(said) >= least and said <= there, said - there


def test_pictures_are_drawn(tmp_path, monkeypatch):
    made = results(run(), run(seed=2, lost=0.75), run("kto"), diverged(2), run("ppo", kl=1e6))
    figures.draw_all(made, tmp_path)
    for name in figures.PICTURES:
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawn = []
    for module in (figures, tables):                             # no files
        monkeypatch.setattr(module, "save", lambda path, write: drawn.append(Path(path).name))
    figures.draw_all(results(diverged(1)), tmp_path)
    assert drawn == [*figures.PICTURES]
    tables.fill(ROOT / "lab")
    assert {path.name for path in (ROOT / "lab").iterdir() if path.suffix in (
        ".png", ".gif", ".md")} <= {*drawn, "triangle.png", "slopes.png"}


def test_the_frontier_has_one_seeds_points_and_lost_a_dot_for_each_seed():
    parts = lambda judged, seed: dict(reward=1.5 + seed, kl=0.5, judged=judged, unjudged=0.5)
    made = results(*[run(seed=seed, train=parts(0.1 * seed - 0.1, seed)) for seed in (1, 2)],
                   run("kto", train=parts(0.2, 1) | dict(kl=9.0)), diverged(2))
    frontier, dots = Figure(), Figure()
    figures.draw_frontier(frontier, made)
    drawn = [tuple(point) for marks in frontier.axes[0].collections
             for point in marks.get_offsets().tolist()]
    assert drawn == [(0.5, 2.5), (0.0, 1.0), (0.75, 1.5)]        # dpo's, the reference's, the best
    assert "pairs: f + c cancels:\ndpo" in [text.get_text() for text in frontier.legends[0].texts]
    assert "too far right: kto at 9.0" in frontier.axes[0].get_title()
    figures.lost_parts_dots(dots, made)
    judged, unjudged, *_ = (marks.get_offsets().tolist() for marks in dots.axes[0].collections)
    assert [x for x, _ in judged] == pytest.approx([0.01, 10]) and [x for x, _ in unjudged] == [
        50, 50]


def test_every_word_for_pytest_k_selects_a_test_and_every_equation_has_one():
    names = [name for path in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)]
    words = [line[-1].strip("`") for page in (EQUATIONS, MAP) for line in rows(page)] + re.findall(
        r"`(?:python -m pytest )?-k (\w+)`", README + EQUATIONS + MAP)
    assert len(words) > 70
    for word in words + [f"eq{number:02d}" for number in range(1, 23)]:
        assert any(word in name for name in names), word


def test_the_table_of_equations_has_each_of_them_and_every_function_of_una_and_each_method_a_link():
    table = rows(EQUATIONS)
    numbers = {int(number) for line in table for number in re.findall(r"\d+", line[0])}
    assert numbers == {*range(1, 23)} and {len(line) for line in table} == {6}
    assert {name for line in table for name in re.findall(r"`(\w+)`", line[3])} == {
        name for name, _ in inspect.getmembers(una, inspect.isfunction) if name[0] != "_"}
    cited = re.findall(r"\]\[([\d.]+)\]", MAP)
    assert {*cited} == {*re.findall(r"^\[([\d.]+)\]: https://arxiv.org/abs/\1$", MAP, re.M)}
    assert {len(line) for line in rows(MAP)} == {7} and {*train.METHODS} <= {
        name.replace("`-", "`una-binary-").strip("`") for line in rows(MAP)
        for name in re.findall(r"`[\w-]+`", line[0])}


def test_every_link_leads_somewhere_and_lines_have_at_most_100_characters():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", page):
            file, _, heading = target.partition("#")
            there = ((ROOT / name).parent / file if file else ROOT / name).resolve()
            assert there.exists(), target
            assert not heading or heading in [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(
                    r"^## (.*)$", there.read_text(encoding="utf-8"), re.M)], target
        lines = [line for line in page.splitlines()
                 if line[:1] != "|" or page not in (LAB, EQUATIONS)]         # made; LaTeX
        assert max(map(len, lines)) <= 100, name


def test_the_commands_of_the_pages_exist_and_print_what_is_shown(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    known, given, running = capsys.readouterr().out, train.parse([]), section("Running it")
    assert all(flag in known for flag in re.findall(r"`(--[a-z-]+)", running))
    assert f"`--beta {given.beta}`" in running and f"`--steps {given.steps}`" in running
    install = "pip install -r requirements.txt && python"
    assert f"```sh\n{install} train.py\n{install} -m pytest\n```" in README[:2000]
    assert {*re.findall(r"python -m lab (\w+)", LAB)} == {
        *"stored online budget noise tables".split()}
    runpy.run_path(str(ROOT / "una.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(BLOCKS[0])
    ((response, total),) = re.findall(r"`( \w+ \w+ wind)` has 0.7 \+ 0.6 = (\d\.\d)",
                                      prose(section("The toy")))
    reward = data.reward(data.encode_prompts(["happy wind :"]),
                         data.encode_responses([response])[0]).item()
    assert reward == pytest.approx(float(total)) == 1.3


def test_the_table_of_results_is_the_lab_pages():
    lab = {line[0]: line for name in ("stored", "online") for line in cells(TABLES[name])}
    for method, *_, share, judged, unjudged in rows(section("Results")):
        name = method.split(", ")[0]
        assert share == lab[name][1]
        assert [judged, unjudged] == lab[name][3:5], name
