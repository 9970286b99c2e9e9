"""What reports say, against the journal and what is computed here; how they look is in
test_report_browser.py."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import sqlite3
import statistics
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from report_page import lasting, section, tables, text
from synthetic import SyntheticTraining, killed_after

from evokernels import zoo
from evokernels.compiler.describe import formula
from evokernels.errors import JournalError, ReportWarning
from evokernels.evolution import journal, pool
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.coevolving import coevolve
from evokernels.evolution.comparison import Estimate
from evokernels.evolution.contest import Contest, compare
from evokernels.evolution.files import write_atomically
from evokernels.evolution.fitness import genome_score
from evokernels.evolution.history import Result, Spread, summarise
from evokernels.evolution.html_report import parts as report_parts
from evokernels.evolution.html_report import run as report_run
from evokernels.evolution.html_report.ancestry import family_section
from evokernels.evolution.html_report.family import family
from evokernels.evolution.html_report.formula import mathml
from evokernels.evolution.html_report.page import REPORT, Page, write
from evokernels.evolution.html_report.pictures import dots, heat, scatter
from evokernels.evolution.html_report.running import RunningReport
from evokernels.evolution.journal import JOURNAL, Entry
from evokernels.evolution.lineage import Descent, Lineage, ancestors, better_line
from evokernels.evolution.refining import Improvement
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Outcome, Trial
from evokernels.genome import Genome, Term
from evokernels.search.coevolution import CoevolutionConfig
from evokernels.search.genetic import GeneticConfig, GeneticSearch, Scored
from evokernels.search.score import Score, Status

MINI = "fashion_mnist_mini"
CONDITIONS = Conditions(
    steps=200, batch_size=32, train_samples=128, validation_samples=100, hurdle=True
)
SETTINGS = RunSettings(
    search=GeneticConfig(population=12, generations=5, elites=2, tournament=3, seed=1),
    tasks=(MINI, "mnist"),
    seeds=(0, 1),
    conditions=CONDITIONS,
    comparison_seeds=3,
    threads=1,
    finalists=3,
    race=True,
    refine=12,
)


@pytest.fixture
def training(monkeypatch):
    fake = SyntheticTraining()
    use(monkeypatch, fake)
    return fake


def use(monkeypatch, evaluate):
    monkeypatch.setattr(pool, "evaluate", evaluate)
    monkeypatch.setattr(pool, "_data", lambda *args: None)
    monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete evolution: its folder, its result, its page."""
    folder = tmp_path_factory.mktemp("report") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, SyntheticTraining())
        result = evolve(SETTINGS, folder)
    return folder, result, page_of(folder)


def page_of(folder):
    return (folder / REPORT).read_text(encoding="utf-8")


def query(folder, sql, *values):
    with sqlite3.connect(folder / JOURNAL) as connection:
        rows = connection.execute(sql, values).fetchall()
    connection.close()
    return rows


def shown(value):
    return "–" if value is None else f"{value:.4f}"


# An evolution


def test_the_numbers_of_the_fitness_are_those_of_the_journal(run):
    folder, _, page = run
    rows = query(folder, "SELECT generation, score, status FROM candidate WHERE place < 12")
    (table,) = tables(section(page, "fitness"))
    assert [row[0] for row in table[1:]] == ["1", "2", "3", "4", "5"]
    stopped = 0
    for number, row in enumerate(table[1:]):
        scores = [score for of, score, status in rows if of == number and status == "ok"]
        low, median, high = np.percentile(scores, [25, 50, 75])
        expected = [max(scores), high, median, low, np.mean(scores)]
        assert [float(cell) for cell in row[1:6]] == pytest.approx(expected, abs=6e-5)
        statuses = [status for of, _, status in rows if of == number]
        counts = [statuses.count(status) for status in ("ok", "stopped", "diverged")]
        assert row[7:] == [*map(str, counts), "0"]
        stopped += statuses.count("stopped") + statuses.count("diverged")
    assert stopped, "nothing failed, so nothing is told apart"


def test_term_shares_are_those_of_the_journal(run):
    folder, _, page = run
    (table,) = tables(section(page, "terms"))
    genomes = query(folder, "SELECT generation, genome FROM candidate WHERE place < 12")
    for name, *shares in table[1:]:
        for number, share in enumerate(shares):
            having = [
                name in json.loads(text)["term_types"] for of, text in genomes if of == number
            ]
            assert share == f"{sum(having) / 12:.0%}"
    everything = {name for _, text in genomes for name in json.loads(text)["term_types"]}
    assert {row[0] for row in table[1:]} == everything


def test_the_ledger_and_the_ends_of_the_runs_are_those_of_the_journal(run):
    folder, _, page = run
    (ledger,) = tables(section(page, "steps"))
    rows = query(folder, "SELECT rule, runs, steps_taken, steps_saved, factor FROM cost_ledger")
    assert ledger[1:] == [
        [rule, f"{runs:,}", f"{taken:,}", f"{saved:,}", f"{factor:.2f}"]
        for rule, runs, taken, saved, factor in rows
    ]
    (ends,) = tables(section(page, "evaluations"))
    counted = query(
        folder, "SELECT purpose, status, count(*), sum(steps) FROM evaluation GROUP BY 1, 2"
    )
    assert sorted(row[:4] for row in ends[1:]) == sorted(
        [purpose, status, f"{count:,}", f"{steps:,}"] for purpose, status, count, steps in counted
    )


def test_the_comparison_is_that_of_the_journal(run):
    folder, result, page = run
    overall, runs = tables(section(page, "comparison"))
    genomes = {"evolved": result.best.genome, "adam": zoo.adam, "adamw": zoo.adamw}
    for (name, genome), row in zip(genomes.items(), overall[1:], strict=True):
        assert row[0] == name
        means = [
            statistics.fmean(
                trained.outcome.test_fitness
                for trained in result.comparison.rows
                if (trained.name, trained.trial.seed) == (name, seed)
            )
            for seed in (2, 3, 4)
        ]
        error = np.std(means, ddof=1) / np.sqrt(3)
        assert row[1] == f"{np.mean(means):.4f} ± {error:.4f}"
        (tested,) = query(
            folder,
            "SELECT avg(test_accuracy) FROM evaluation WHERE purpose = 'report' AND genome = ?",
            json.dumps(genome.to_dict()),
        )
        assert row[2].startswith(f"{tested[0]:.4f} ±")
    assert len(runs) == 1 + 3 * 2 * 3


def test_every_setting_and_version_is_there(run):
    folder, _, page = run
    (table,) = tables(section(page, "configuration"))
    settings = {name.replace("_", "-") for name in SETTINGS.to_dict()}
    assert {row[0] for row in table[1:]} == settings
    assert dict(table[1:])["tasks"] == "fashion_mnist_mini mnist"
    assert dict(table[1:])["race"] == "true"
    machine, times = tables(section(page, "machine"))
    told = dict(machine[1:])
    assert told["numpy"] == np.__version__
    for name in ("torch", "python", "evokernels", "processor", "memory", "written by the command"):
        assert told[name]
    (steps,) = query(folder, "SELECT sum(steps) FROM evaluation")
    assert times[-1][2] == f"{steps[0]:,}"


def test_the_winner_and_its_luck_are_told(run):
    _, result, page = run
    assert formula(result.best.genome) in re.sub("&gt;", ">", section(page, "winner"))
    luck = text(section(page, "luck"))
    bias = result.best.score.fitness - result.winner.fresh.mean
    assert f"overestimated it by {bias:.4f} ±" in luck
    assert str(result.winner.test) in luck
    assert "seeds 2 3 4" in luck
    assert f"the best of {SETTINGS.finalists} finalists on seeds 5 6 7" in luck


def test_the_page_needs_nothing_from_elsewhere(run):
    folder, _, page = run
    spaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"' <)]+", page)) <= spaces
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', page)) == {"data:,"}
    assert "<script" not in page
    assert "@import" not in page
    assert not list(folder.glob("*.new"))
    # every reference within a picture is to something of its own
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        named = set(re.findall(r'id="([^"]+)"', svg))
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {
            pair for name in named for pair in ((name, ""), ("", name))
        }
        ElementTree.fromstring(svg)
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_a_run_killed_in_the_middle_leaves_the_same_report(training, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, search=GeneticConfig(population=6, generations=3, tournament=2, seed=2), refine=0
    )
    evolve(settings, tmp_path / "whole")
    whole, count = lasting(page_of(tmp_path / "whole")), len(training.trials)
    with killed_after(training, count // 2):
        evolve(settings, tmp_path / "killed")
    part = page_of(tmp_path / "killed")
    assert "Generation 1 of 3 had ended when this page was written" in text(part)
    assert 'id="comparison"' not in part
    assert 'id="luck"' not in part
    (table,) = tables(section(part, "fitness"))
    assert table == tables(section(page_of(tmp_path / "whole"), "fitness"))[0][:2]
    evolve(settings, tmp_path / "killed")
    assert lasting(page_of(tmp_path / "killed")) == whole
    (tmp_path / "whole" / REPORT).unlink()
    evolve(settings, tmp_path / "whole")
    assert lasting(page_of(tmp_path / "whole")) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"search": GeneticConfig(population=2, generations=1, elites=0, tournament=1)},
        {"search": GeneticConfig(population=3, generations=2, elites=1, tournament=2)},
        {"tasks": (MINI,), "seeds": (0,), "comparison_seeds": 1, "finalists": 1},
        {"rotate_seeds": True},
    ],
    ids=["one generation", "tiny", "one task, one seed", "rotating seeds"],
)
def test_any_run_has_a_report(training, tmp_path, change):
    evolve(dataclasses.replace(SETTINGS, **{"refine": 0, **change}), tmp_path)
    page = page_of(tmp_path)
    assert ('id="tasks"' in page) == ("tasks" not in change)
    assert ("best so far</span>" in page) == ("rotate_seeds" in change)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "nan" not in re.sub(r">[^<]*<", "", svg)


def test_a_run_in_which_everything_fails_has_a_report(monkeypatch, tmp_path):
    def failing(trial, conditions, data, device):
        return Outcome(Status.DIVERGED, -1.0, None, None, 30, 0.1, "digest")

    use(monkeypatch, failing)
    evolve(dataclasses.replace(SETTINGS, refine=0), tmp_path)
    page = page_of(tmp_path)
    assert "Every genome failed in at least one of its training runs." in page
    (table,) = tables(section(page, "fitness"))
    assert table[1] == ["1", *("–",) * 5, "-1.0000", "0", "0", "12", "0"]


def test_fifty_generations_of_fifty_genomes_make_a_small_report_quickly(tmp_path):
    search = GeneticSearch(GeneticConfig(population=50, generations=50, seed=1))
    training = SyntheticTraining()
    state, lineage, history, asked = search.start(), Lineage(), [], []
    while genomes := search.ask(state):
        results = []
        for genome in genomes:
            outcomes = {
                task: [training(Trial(genome, task, 0), CONDITIONS, None, None)]
                for task in SETTINGS.tasks
            }
            runs = {
                task: [Entry(None, None, "", None, outcome) for outcome in of]
                for task, of in outcomes.items()
            }
            score = genome_score(outcomes)
            results.append(Result(runs, score, score, (0,), ()))
        scores = [result.score for result in results]
        lineage.add(list(map(Scored, genomes, scores)), state.parents)
        state = search.tell(state, scores)
        history.append(summarise(len(history), results, state.best.score))
        asked.append(genomes)
    numbers = range(1, 51)
    started = time.process_time()
    sections = [
        *report_run.fitness_sections(numbers, SETTINGS, history),
        family_section("family", "the winner", lineage, state.best.genome),
        report_parts.terms(numbers, asked),
    ]
    write(tmp_path, lambda: Page("fifty", "", [], sections))
    assert time.process_time() - started < 10
    assert page_of(tmp_path).count("<circle") > 200
    assert 100_000 < (tmp_path / REPORT).stat().st_size < 1_000_000


# Lineage


def test_a_search_says_who_the_parents_of_its_genomes_are():
    """A child has its head from the first parent and every number from one of the two, unless it
    mutated; without mutation nothing else is possible."""

    class Crossing:
        """Individuals are sets of founders; a child has those of both."""

        def start(self, size, rng):
            return tuple(frozenset({place}) for place in range(size))

        def crossover(self, first, second, rng):
            return first | second

        def mutate(self, individual, rng, progress):
            return individual

    search = GeneticSearch(GeneticConfig(8, 6, 2, 3, seed=3), Crossing())
    state = search.start()
    assert state.parents == ((),) * 8
    while state.population:
        before = state.population
        scores = [Score(float((7 * sum(each)) % 11)) for each in before]
        ranked = sorted(range(8), key=lambda place: scores[place].fitness, reverse=True)
        state = search.tell(state, scores)
        for place, (each, parents) in enumerate(zip(state.population, state.parents, strict=True)):
            assert each == frozenset().union(*(before[parent] for parent in parents))
            assert parents == (ranked[place],) if place < 2 else len(parents) == 2
    assert state.parents == ()


def test_a_joined_genome_can_be_a_parent():
    search = GeneticSearch(GeneticConfig(4, 3, elites=1, tournament=4, seed=1))
    state = search.start()
    joined = search.join(state, [zoo.evolved_2026])
    assert joined.parents == ((),) * 5
    following = search.tell(joined, [Score(0.1 * place) for place in range(5)])
    assert following.population[0] == zoo.evolved_2026
    assert following.parents[0] == (4,)
    # four of five are drawn for each parent, so the best or the second best wins
    parents = {parent for of_child in following.parents[1:] for parent in of_child}
    assert 4 in parents <= {3, 4}


def small_lineage():
    """The winner is an elite of a refined genome whose origin is a child of two."""

    def genome(rate):
        return dataclasses.replace(zoo.adam, lr_log10=rate)

    a, b, c, d, e = (genome(-rate) for rate in (1.0, 2.0, 3.0, 4.0, 5.0))
    lineage = Lineage()
    lineage.add([Scored(a, Score(0.1)), Scored(b, Score(0.5))], [(), ()])
    improvement = Improvement(Scored(d, Score(0.8)), place=7, origin=1)
    lineage.add([Scored(b, Score(0.5)), Scored(c, Score(0.6))], [(1,), (0, 1)], [improvement])
    lineage.add([Scored(d, Score(0.8)), Scored(e, Score(0.2))], [(2,), (1, 0)])
    return lineage, (a, b, c, d, e)


def test_ancestors_stand_where_they_first_appeared():
    lineage, (a, b, c, d, e) = small_lineage()
    winner = lineage.generations[2][0]
    assert (winner.descent, winner.first.descent) == (Descent.ELITE, Descent.REFINED)
    assert lineage.find(d) is winner.first
    found = [(each.generation, each.place, each.genome) for each in ancestors(winner)]
    assert found == [(0, 0, a), (0, 1, b), (1, 1, c), (1, 7, d)]
    assert [each.genome for each in better_line(winner)] == [d, c, b]
    assert [each.genome for each in ancestors(lineage.find(e))] == [a, b, c, e]
    with pytest.raises(KeyError):
        lineage.find(zoo.adamw)


def test_a_family_tree_draws_every_ancestor_once():
    lineage, (_, _, _, d, _) = small_lineage()
    tree = family(lineage.find(d))
    assert [node.kind for node in tree.nodes] == ["start", "main", "main", "main"]
    assert sorted(edge.kind for edge in tree.edges) == ["main", "main refined", "other"]
    places = {(node.x, node.y) for node in tree.nodes}
    assert len(places) == 4
    assert all(0 < x < tree.width and 0 < y < tree.height for x, y in places)
    assert [node.x for node in tree.nodes] == sorted(node.x for node in tree.nodes)
    assert [text for _, text in tree.labels] == ["1", "2"]


def test_the_lineage_of_a_run_leads_from_the_start_to_the_winner(run):
    folder, result, page = run
    line = tables(section(page, "family"))[0]
    assert line[-1][1] == "start population"
    numbers = [int(row[0]) for row in line[1:]]
    assert numbers == sorted(numbers, reverse=True)
    for row in line[1:]:
        (told,) = {
            score
            for (score,) in query(
                folder,
                "SELECT score FROM candidate WHERE generation = ? AND printf('%.4f', score) = ?",
                *(int(row[0]) - 1, row[2]),
            )
        } or {None}
        assert told is not None
    (best,) = query(
        folder,
        "SELECT min(generation) FROM candidate WHERE genome = ?",
        json.dumps(result.best.genome.to_dict()),
    )
    assert int(line[1][0]) == best[0] + 1


# Small parts


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([0.5], Spread(0.5, 0.5, 0.5, 0.5, 0.5)),
        ([4.0, 1.0, 2.0, 3.0, 10.0], Spread(2.0, 3.0, 4.0, 4.0, 10.0)),
    ],
)
def test_spreads_by_hand(values, expected):
    assert Spread.of(values) == expected


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("term", Term)
def test_every_term_is_typeset(term, corrected):
    genome = Genome(term_types=[term], alphas=[0.5], use_bias_correction=corrected)
    rule = mathml(formula(genome))
    ElementTree.fromstring(rule)
    assert "mtext" not in rule
    assert "*" not in rule


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("lr = 0.001", ["<mi>lr</mi>", "<mn>0.001</mn>"]),
        (
            "m^ = m / (1 - 0.9^t)",
            ["<mover", "<mfrac><mrow><mi>m</mi></mrow>", "<msup><mn>0.9</mn>"],
        ),
        ("v ← 0.5 * g * g", ["<msup><mi>g</mi><mn>2</mn></msup>"]),
        ("p ← p - lr * (sqrt(v) + 1e-08)", ["<msqrt><mi>v</mi></msqrt>", "<mn>−8</mn>"]),
        ("p ← p - lr * (-2.5e+06 * g)", ["<mo>−</mo>", "<mn>2.5</mn>", "<mn>6</mn>"]),
        ("a0 ← where(m > g, tanh(m), -g)", ["<mo>&gt;</mo>", "<msub><mi>a</mi><mn>0</mn></msub>"]),
        (
            "v ← |m^| + |g - |m||",
            ["<mrow><mo>|</mo><mover", "<mi>m</mi><mo>|</mo></mrow><mo>|</mo>"],
        ),
        ("p ← p - lr * (clip(g, -1, 1) - abs(m))", ["<mo>|</mo>", "clip"]),
        ("something <else> entirely", ["<mtext>something &lt;else&gt; entirely</mtext>"]),
        ("p ← p - lr * ([g])", ["<mtext>p ← p - lr * ([g])</mtext>"]),
        ("p ← p - lr * (g", ["<mtext>p ← p - lr * (g</mtext>"]),
        ("p ← g g", ["<mtext>p ← g g</mtext>"]),
    ],
)
def test_formulas_by_hand(line, parts):
    rule = mathml(line)
    ElementTree.fromstring(rule)
    for part in parts:
        assert part in rule


def test_names_of_any_kind_stay_text():
    rude = '<b>"&$x_1$#010101'
    for svg in (
        dots("a", [(rude, Estimate(0.5, 0.1), "best")]),
        heat("b", [1, 2], {rude: [0.5, 1.0]}),
    ):
        assert rude in "".join(ElementTree.fromstring(svg).itertext())


@pytest.mark.parametrize("error", [0.01, 0.9])
def test_networks_of_one_size_and_wide_errors_are_drawn(error):
    place = [824_458.0], [0.85]
    svg = ElementTree.fromstring(
        scatter(
            "a", [(*place, "best", 1.0)], place, [(*place[0], Estimate(0.5, error), "bad")], "xy"
        )
    )
    marks = [each for each in svg.iter() if each.tag.endswith("}use") and each.get("x")]
    across = {each.get("x") for each in marks if "var(--best)" in each.get("style", "")}
    assert len(across) == 1
    assert 0 < float(across.pop()) < 316


def test_a_rude_name_of_a_term_is_escaped(training, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "evokernels.evolution.html_report.parts.term_shares",
        lambda genomes: {"<script>alert('x')</script> & more": 0.5},
    )
    evolve(dataclasses.replace(SETTINGS, refine=0), tmp_path)
    page = page_of(tmp_path)
    assert "<script" not in page
    (table,) = tables(section(page, "terms"))
    assert table[1][0] == "<script>alert('x')</script> & more"


# What goes wrong


def no_font(*args, **kwargs):
    raise RuntimeError("no font")


def no_space(path, content):
    if path.name == REPORT:
        raise JournalError(f"cannot write {path}: No space left on device")
    write_atomically(path, content)


@pytest.mark.parametrize(
    ("place", "wrong", "reason"),
    [
        ("html_report.pictures.fitness", no_font, "RuntimeError: no font"),
        ("html_report.page.write_atomically", no_space, "No space left on device"),
    ],
)
def test_a_run_without_its_report_is_complete(
    training, tmp_path, monkeypatch, place, wrong, reason
):
    settings = dataclasses.replace(SETTINGS, refine=0)
    with monkeypatch.context() as patch:
        patch.setattr(f"evokernels.evolution.{place}", wrong)
        with pytest.warns(ReportWarning, match=f"report.html could not be written .*{reason}"):
            result = evolve(settings, tmp_path)
    assert Genome.load(tmp_path / "best_genome.json") == result.best.genome
    assert not (tmp_path / REPORT).exists()
    evolve(settings, tmp_path)
    assert (tmp_path / REPORT).exists()


def test_a_search_whose_pages_fail_goes_on(training, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, refine=0)

    def wrong(*args):
        raise ValueError("no page")

    with monkeypatch.context() as patch:
        patch.setattr("evokernels.evolution.run.running_page", wrong)
        with pytest.warns(ReportWarning, match="ValueError: no page.*; the run goes on") as warned:
            evolve(settings, tmp_path)
    assert len(warned) >= 1
    assert "Not complete" not in page_of(tmp_path)


@pytest.mark.parametrize(
    ("each", "cost", "written"),
    [(10.0, 0.05, [1, 2, 3, 4, 5, 6]), (10.0, 0.5, [1, 5]), (1e-3, 0.2, [1])],
)
def test_pages_of_a_running_search_take_a_hundredth_of_its_time(
    tmp_path, monkeypatch, each, cost, written
):
    now = [0.0]
    monkeypatch.setattr("evokernels.evolution.html_report.running.new_figure", sleeping(now, 5.0))
    running, shown = RunningReport(tmp_path, 6, lambda: now[0]), []

    def make(state):
        now[0] += cost
        shown.append(int(re.match(r"Generation (\d) of 6 had ended", state)[1]))
        return Page("running", "", [], [], state)

    for number in range(1, 7):
        now[0] += each
        running.show(number, make)
    assert shown == written
    assert "Running: running</title>" in page_of(tmp_path)


def sleeping(now, seconds):
    def sleep(*args):
        now[0] += seconds

    return sleep


@pytest.mark.parametrize("wrong", ["write_bytes", "replace"])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, wrong):
    path = tmp_path / "table.csv"
    write_atomically(path, b"before")

    def full(self, *args):
        if wrong == "write_bytes":
            self.touch()  # some of it is there
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((pathlib.Path, wrong) if wrong == "write_bytes" else (os, wrong)), full)
        with pytest.raises(JournalError, match=r"table.csv: No space left on device; choose"):
            write_atomically(path, b"after")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {path.name: b"before"}


def test_writes_that_are_killed_leave_one_file_at_most(tmp_path, monkeypatch):
    """SIGKILL: nothing is cleaned up."""
    path = tmp_path / "table.csv"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: os._exit(0))
        for _ in range(2):
            child = multiprocessing.get_context("fork").Process(
                target=write_atomically, args=(path, b"half")
            )
            child.start()
            child.join()
            assert child.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically(path, b"whole")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {path.name: b"whole"}


def test_names_that_are_no_text_do_not_keep_a_report_from_being_written(tmp_path):
    write(tmp_path, lambda: Page("a file \udcff of bytes", "", [], []))
    assert "a file ? of bytes" in page_of(tmp_path)


def test_formulas_among_the_settings_are_apart():
    own = {"own_terms": ("A = g + m", "B = sign(g)"), "tasks": ("a", "b")}
    (table,) = report_parts.configuration(own).items
    assert table.rows == [["own-terms", "A = g + m; B = sign(g)"], ["tasks", "a b"]]


# The other reports


def test_a_coevolution_has_a_report(training, tmp_path, monkeypatch):
    drawn, draw = {}, report_parts.spread_pictures

    def drawing(name, title, numbers, best, spreads, **others):
        drawn[name] = spreads
        return draw(name, title, numbers, best, spreads, **others)

    monkeypatch.setattr(report_parts, "spread_pictures", drawing)
    settings = CoevolutionSettings(
        search=CoevolutionConfig(first=5, second=4, generations=3, elites=1, tournament=2),
        tasks=(MINI, "mnist"),
        seeds=(0,),
        conditions=CONDITIONS,
        comparison_seeds=2,
        threads=1,
        finalists=2,
        max_parameters=20_000,
    )
    result = coevolve(settings, tmp_path)
    page = page_of(tmp_path)
    (plan,) = tables(section(page, "plan"))
    made = query(tmp_path, "SELECT count(*) FROM evaluation")[0][0]
    assert plan[-1] == ["all", f"{settings.planned_runs:,}", str(made)]
    overall, _ = tables(section(page, "comparison"))
    assert [row[0] for row in overall[1:]] == list(result.contenders)
    (front,) = tables(section(page, "pareto"))
    assert [float(row[1]) for row in front[1:]] == sorted(float(row[1]) for row in front[1:])
    for side, spreads in drawn.items():
        means = [getattr(entry, side).mean for entry in result.history]
        assert [spread and spread.mean for spread in spreads] == pytest.approx(means)
    assert list(drawn) == ["architectures", "optimizers"]
    (numbers,) = tables(section(page, "populations"))
    for number, row in enumerate(numbers[1:]):
        for cell, condition in ((1, "place < 5"), (3, "place >= 5")):
            ((best,),) = query(
                tmp_path,
                f"SELECT max(score) FROM candidate WHERE generation = ? AND {condition} "
                "AND status = 'ok'",
                number,
            )
            assert row[cell] == shown(best)
    assert formula(result.best.pair.optimizer) in section(page, "winner")
    for side, individual, condition in (
        ("architecture", result.best.pair.architecture, "place < 5"),
        ("optimizer", result.best.pair.optimizer, "place >= 5"),
    ):
        line = tables(section(page, f"family-{side}"))[0][1:]
        assert line[-1][1] == "start population"
        for row, younger in zip(line, [None, *line], strict=False):
            scores = query(
                tmp_path,
                f"SELECT score FROM candidate WHERE generation = ? AND {condition}",
                int(row[0]) - 1,
            )
            assert row[2] in [shown(score) for (score,) in scores]
            assert younger is None or int(row[0]) < int(younger[0])
        ((first,),) = query(
            tmp_path,
            "SELECT min(generation) FROM candidate WHERE genome = ?",
            json.dumps(individual.to_dict()),
        )
        assert int(line[0][0]) == first + 1
    (shares,) = tables(section(page, "components"))
    for kind, *cells in shares[1:]:
        for number, cell in enumerate(cells):
            networks = query(
                tmp_path,
                "SELECT genome FROM candidate WHERE generation = ? AND place < 5",
                number,
            )
            having = [
                any(name.split()[0] == kind for name in json.loads(text)["components"])
                for (text,) in networks
            ]
            assert cell == f"{sum(having) / 5:.0%}"


@pytest.mark.parametrize("trials", [0, 2])
def test_a_comparison_has_a_report(training, tmp_path, trials):
    given = {"adam": zoo.adam, "<mine>.json": Genome(term_types=["MOMENTUM"])}
    conditions = dataclasses.replace(CONDITIONS, hurdle=False)
    contest = Contest(given, (MINI, "mnist"), (0, 1), conditions, 1, trials=trials)
    result = compare(contest, tmp_path)
    page = page_of(tmp_path)
    versions = [result.untuned] + [result.tuned] * bool(trials)
    for place, comparison in enumerate(versions):
        overall, runs = tables(section(page, f"comparison-{place}"))
        assert [row[:2] for row in overall[1:]] == [
            [name, str(comparison.overall_fitness(name))] for name in given
        ]
        assert len(runs) == 1 + 2 * 2 * 2
    assert (f"comparison-{len(versions)}" in page, 'id="tuning"' in page) == (False, trials > 0)
