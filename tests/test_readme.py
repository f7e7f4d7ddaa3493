"""The three pages: lines, tables, commands, links and code to copy are as the project has them.

    python tests/test_readme.py        # write the present line ranges and tables into the pages
"""
import argparse
import ast
import functools
import importlib
import math
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "results/README.md", ROOT / "tests/README.md"]
METHODS = ["clinfonce", "cld", "rince", "wcl", "sogclr_clip"]
LINES = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)?)(\w+\.py)#L\d+-L\d+\)")  # [`name`](file.py#L1-L2)
# <!-- file --> before what stands in the file: a table, or text between fences
COPY = re.compile(r"<!-- (results/[\w./-]+) -->\n(?:(?:\|.*\n)+|```\n[^`]*```\n)")
LABEL = re.compile(r"\bE\d+[a-c]?\b")


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


@functools.cache
def spans(file):
    """name (of a class's part: Class.part) -> (first, last line, source) in a file."""
    lines, found = (ROOT / file).read_text().splitlines(), {}

    def visit(body, before=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[before + node.name] = (
                    first, node.end_lineno, "\n".join(lines[first - 1:node.end_lineno]))
                if isinstance(node, ast.ClassDef):
                    visit(node.body, node.name + ".")

    visit(ast.parse("\n".join(lines)).body)
    return found


def fresh(text):
    """The text of a page with the present line ranges, tables and outputs."""
    def link(match):
        name, up, file = match.groups()
        first, last, _ = spans(file)[name]
        return f"[`{name}`]({up}{file}#L{first}-L{last})"

    def copy(match):
        body = (ROOT / match[1]).read_text()
        return f"<!-- {match[1]} -->\n" + (
            body if match[1].endswith(".md") else f"```\n{body}```\n")

    return COPY.sub(copy, LINES.sub(link, text))


def expanded(text):
    """Labels of a cell: "E1 to E3" is E1, E2, E3; "E23a-c" E23a, E23b, E23c."""
    text = re.sub(r"labels E1 to E\d+", "", text)  # a sentence about them
    text = re.sub(r"\bE(\d+) to E(\d+)", lambda m: ", ".join(
        f"E{i}" for i in range(int(m[1]), int(m[2]) + 1)), text)
    text = re.sub(r"\bE(\d+)a-c\b", r"E\1a, E\1b, E\1c", text)
    return set(LABEL.findall(text))


def rows(head):
    """The cells of the rows of the one table of the pages whose head begins with these cells."""
    pages = "\n".join(page.read_text() for page in PAGES)
    (table,) = re.findall(rf"(?m)^{re.escape(head)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", pages)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def equations(method):
    """The equation map of a method: (labels, [(function, file)]) of each row."""
    return [(expanded(cells[0]), [(name, file) for name, _, file in LINES.findall(cells[-1])])
            for cells in rows(f"| `{method}.py` | equation")]


def test_line_ranges_tables_and_outputs_are_fresh():
    """After a change: python tests/test_readme.py."""
    pages = [page.read_text() for page in PAGES]
    assert len(LINES.findall("".join(pages))) > 70  # they are found at all
    copies = COPY.findall("".join(pages))
    marked = re.findall(r"<!-- (results/.*) -->", "".join(pages))
    assert copies == marked and len(copies) > 12
    for page, text in zip(PAGES, pages):
        assert fresh(text) == text, f"{page} is stale"


def test_readme_is_short():
    """One sitting: 250 lines, and no line of prose or code wider than 100 columns."""
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 250
    assert [s for s in lines if len(s) > 100 and not s.startswith(("|", "!["))] == []
    for page in PAGES[1:]:
        wide = [s for s in prose(page).splitlines() if len(s) > 100 and not s.startswith("|")]
        assert wide == [], page


@pytest.mark.parametrize("method", METHODS)
def test_every_equation_is_in_the_map_and_at_its_lines(method):
    doc, mapped = ast.get_docstring(ast.parse((ROOT / f"{method}.py").read_text())), set()
    for labels, links in equations(method):
        assert links, f"{labels}: no function"
        mapped |= labels
        if any(file == "common.py" for _, file in links):
            continue  # named in the docstring of the method: common.py has no equation labels
        sources = [spans(file)[name][2] for name, file in links]
        for label in labels:
            assert any(label in expanded(s) for s in sources), f"{label} is not at {links}"
    assert expanded(doc) - mapped == set()


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(page))
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_recipes_data_sets_and_losses_are_listed():
    """The README names what the parsers take, no more and no less."""
    import common  # not at the top: as a script this file knows no path to it

    listed = {cells[0].strip("`"): re.findall(r"`([\w-]+)`", " ".join(cells[1:]))
              for cells in rows("| file | recipes for a CPU |")}
    assert listed.keys() == set(f"{method}.py" for method in METHODS)
    for method in METHODS:
        recipes = importlib.import_module(method).RECIPES
        assert sorted(listed[f"{method}.py"]) == sorted(recipes), method
    named = re.findall(r"`(.+?)`", " ".join(cells[0] for cells in rows("| `--dataset` |")))
    assert sorted(named) == sorted(common.SOURCES)
    losses = re.findall(r"`(?:--loss )?([\w-]+)`", str(rows("| `--ita_type` |")))
    assert set(losses) >= {*importlib.import_module("sogclr_clip").LOSSES} - {"siglip", "fastclip"}


def test_headline_figures_are_those_of_the_tables():
    figure = re.compile(r"\d+\.\d+ ± \d+\.\d+")
    tables = "".join(file.read_text() for file in (ROOT / "results").glob("*.md")
                     if file.name != "README.md")
    headline = rows("| question |")
    assert 5 <= len(headline) <= 10
    for cells in headline:
        assert figure.findall(" ".join(cells)) and not set(
            figure.findall(" ".join(cells))) - set(figure.findall(tables)), cells


def test_losses_can_be_copied():
    """The functions of the table, and nothing else of their files, run the lines below it."""
    text = PAGES[0].read_text()
    part = text[text.index("**A loss.**"):text.index("**A backbone.**")]
    space = {"torch": torch, "F": torch.nn.functional, "math": math}
    for line in re.findall(r"\| from .*", part):
        file, *names = re.findall(r"`([\w.]+)`", line)
        for node in ast.parse(source := (ROOT / file).read_text()).body:
            name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", "")
            if name in names:
                exec("\n".join(source.splitlines()[min(
                    [node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1:
                    node.end_lineno]), space)
                names.remove(name)
        assert not names, f"{file} has no {names}"
    x = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    space["z"], space["v"] = torch.nn.functional.normalize(x, dim=3)
    space.update(y=torch.arange(16) % 3, B=16)
    done = 0
    for line in re.search(r"```python\n(.*?)```", part, re.S)[1].splitlines():
        exec(line, space)
        if line.startswith("loss"):
            (grad,) = torch.autograd.grad(space["loss"], x, retain_graph=True)
            assert space["loss"].ndim == 0 and grad.abs().sum() > 0
            done += 1
    assert done == 5


def commands():
    """(script, flags) of every command of a script: in blocks of shell, and `in a line` of text."""
    for page in PAGES:
        lines = [line for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
                 for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`((?:python|torchrun) [^`]*)`", prose(page).replace("\n", " "))
        for line in lines:
            words = re.sub(r"\$\(.*?\)", "HOST", line).partition(" #")[0].split()
            for i, word in enumerate(words):
                if word.endswith(".py") and "/" not in word:
                    yield word.removesuffix(".py"), words[i + 1:]
                elif word.endswith(".py"):
                    assert (ROOT / word).exists(), line


def test_commands_parse(monkeypatch):
    """Their flags and recipes exist (their files and folders need not)."""
    import common

    found = list(commands())
    for script, argv in found:
        def parse(train, parser, argv=None):
            args = argparse.ArgumentParser.parse_args(parser, argv)  # reads no checkpoint
            assert args.recipe in (None, *parser.recipes), argv

        monkeypatch.setattr(common, "run", parse)
        importlib.import_module(script).main(argv)
    assert {script for script, _ in found} >= {*METHODS, "linear_eval", "ood_eval", "common"}
    assert len(found) > 65


def test_ci_runs_the_first_two_commands():
    """.ci/run takes the test command from the README; the demo stands right before it."""
    block = re.search(r"```bash\n(.*?)```", PAGES[0].read_text(), re.S)[1].splitlines()
    assert len(block) == 2 and block[0].endswith("clinfonce.py")
    assert re.fullmatch(r"pip install .*python -m pytest tests", block[1])


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fresh(page.read_text()))
