"""The committed tables, and the verdicts in the READMEs, follow from the committed records."""

import re

import pytest

import report
from conftest import ROOT
from depthlab.report import load_experiment, read_records, tabulate
from depthlab.report.given import Notes
from depthlab.report.page import Page, judging
from depthlab.report.recipes import Expected, Recipes
from depthlab.report.text import BEGIN, COUNTED, END, KINDS, NOT_RUN, VERDICTS, summary

RESULTS = ROOT / "results"
RUNS = ["results/runs"]


def experiment(id):
    return load_experiment(ROOT / f"conf/experiment/{id}.yaml", id)


def committed(runs: bool) -> list[str]:
    ids = [id for id in report.choose([]) if (RESULTS / f"{id}.md").exists()]
    return [id for id in ids if experiment(id).runs == runs]


def followed(id, out):
    assert report.main([id, "--runs", *RUNS, "--out", str(out), "--format", "md,csv"]) == 0
    files = [file for file in out.rglob("*") if file.suffix in (".md", ".csv")]
    assert files
    for file in files:
        assert file.read_text() == (RESULTS / file.relative_to(out)).read_text()


@pytest.mark.parametrize("id", committed(runs=True))
def test_tables_follow_from_records(id, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    followed(id, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("id", ["barz2018/fig2", "chang2018/table2", "chang2018/table5", "yu2019/fig13"])
def test_what_is_computed(id, tmp_path, monkeypatch):
    """Those whose last digits hang neither on the machine nor on images at hand."""
    monkeypatch.chdir(ROOT)
    followed(id, tmp_path)


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in lines]


def block_of(readme: str, begin: str) -> str:
    return re.search(f"{begin}(.*?){END}", (ROOT / readme).read_text(), re.DOTALL)[1]


def test_verdicts(monkeypatch):
    """Of every claim that is tested on runs: its row where it was, else its name."""
    monkeypatch.chdir(ROOT)
    records, problems = read_records(RUNS)
    assert not problems
    block = block_of("results/README.md", BEGIN)
    found = {row[0]: row[1:] for row in rows(block)}
    not_run = set(re.findall(r"[\w]+", " ".join(re.findall(r"Not run: (.*)\.", block))))
    recipes = Recipes(report.compose, report.build)
    for id in report.choose([]):
        if not (asked := experiment(id)).runs:
            continue
        page = Page(asked, Notes(asked), blocks=tabulate(asked, records, Expected(recipes, asked)))
        page.verdicts = judging(asked, page.blocks)
        for v in summary(page)["verdicts"]:
            if v["verdict"] == NOT_RUN:
                assert v["id"] in not_run
            else:
                assert found[v["id"]] == [v["plain"], v["paper"], v["why"], v["evidence"], f"**{v['verdict']}**"]
    assert list(VERDICTS) in rows(block)


def test_the_readme_counts_them():
    """A line per paper: as many of its own claims as the tables of verdicts have, questions of ours apart."""
    header, *found = rows(block_of("README.md", COUNTED))
    assert header == ["paper", *KINDS]
    ours = {claim["id"] for id in report.choose([]) for claim in experiment(id).paper.get("claims") or []
            if claim.get("ours")}  # fmt: skip
    papers = block_of("results/README.md", BEGIN).split("\n### ")[1:]
    assert len(found) == len(papers) == 4
    for line, paper in zip(found, papers, strict=True):
        verdicts = [row[-1].strip("*") for row in rows(paper) if row[0] not in {"claim", *ours}]
        not_run = re.findall(r"\w+", " ".join(re.findall(r"Not run: (.*)\.", paper)))
        counted = [len([id for id in not_run if id not in ours]) if kind == NOT_RUN else verdicts.count(kind)
                   for kind in KINDS]  # fmt: skip
        assert line == [paper.splitlines()[0], *map(str, counted)]
