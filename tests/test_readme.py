"""The README: its equation map points at the lines, its tables are those under results/.

    python tests/test_readme.py        # write the present line ranges and tables into README.md
"""
import argparse
import ast
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
METHODS = ["clinfonce", "cld", "rince", "wcl", "sogclr_clip"]
LINK = re.compile(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+-L\d+\)")  # [`function`](file.py#L1-L2)
TABLE = re.compile(r"<!-- (results/[\w.-]+\.md) -->\n(?:\|.*\n)+")
LABEL = re.compile(r"\bE\d+[a-c]?\b")


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
    """README text with the present line ranges and tables."""
    def link(match):
        name, file = match.groups()
        first, last, _ = spans(file)[name]
        return f"[`{name}`]({file}#L{first}-L{last})"

    text = LINK.sub(link, text)
    return TABLE.sub(lambda m: f"<!-- {m[1]} -->\n{(ROOT / m[1]).read_text()}", text)


def expanded(text):
    """Labels of a cell: "E1 to E3" is E1, E2, E3; "E23a-c" E23a, E23b, E23c."""
    text = re.sub(r"labels E1 to E\d+", "", text)  # a sentence about them
    text = re.sub(r"\bE(\d+) to E(\d+)", lambda m: ", ".join(
        f"E{i}" for i in range(int(m[1]), int(m[2]) + 1)), text)
    text = re.sub(r"\bE(\d+)a-c\b", r"E\1a, E\1b, E\1c", text)
    return set(LABEL.findall(text))


def rows(method):
    """The equation map of a method: (labels, [(function, file)]) of each row."""
    text = README.read_text()
    table = re.search(rf"\| `{method}.py` \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text)[1]
    for line in table.splitlines():
        cells = line.strip("|").split("|")
        yield expanded(cells[0]), LINK.findall(cells[-1])


def test_line_ranges_and_tables_are_fresh():
    """After a change: python tests/test_readme.py."""
    text = README.read_text()
    assert len(LINK.findall(text)) > 60 and len(TABLE.findall(text)) == 4  # they are found at all
    assert fresh(text) == text


@pytest.mark.parametrize("method", METHODS)
def test_every_equation_is_in_the_map_and_at_its_lines(method):
    doc, mapped = ast.get_docstring(ast.parse((ROOT / f"{method}.py").read_text())), set()
    for labels, links in rows(method):
        assert links, f"{labels}: no function"
        sources = [spans(file)[name][2] for name, file in links]
        if all(file == "common.py" for _, file in links):
            continue  # named in the docstring of the method: common.py has no equation labels
        for label in labels:
            assert any(label in expanded(s) for s in sources), f"{label} is not at {links}"
    for labels, _ in rows(method):
        mapped |= labels
    assert expanded(doc) - mapped == set()


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", README.read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_losses_can_be_copied():
    """The functions of the table, and nothing else of their files, run the lines below it."""
    text = README.read_text()
    part = text[text.index("**A loss.**"):text.index("**A backbone**")]
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
    """(script, flags) of every command of a script in the README's blocks of shell."""
    for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"\$\(.*?\)", "HOST", line).partition(" #")[0].split()
            for i, word in enumerate(words):
                if word.endswith(".py") and "/" not in word:
                    yield word.removesuffix(".py"), words[i + 1:]


def test_commands_of_the_readme_parse(monkeypatch):
    """Their flags and recipes exist (their files and folders need not)."""
    import common  # not at the top: as a script this file knows no path to it

    found = list(commands())
    for script, argv in found:
        def parse(train, parser, argv=None):
            args = argparse.ArgumentParser.parse_args(parser, argv)  # reads no checkpoint
            assert args.recipe in (None, *parser.recipes), argv

        monkeypatch.setattr(common, "run", parse)
        importlib.import_module(script).main(argv)
    assert {script for script, _ in found} >= {*METHODS, "linear_eval", "ood_eval", "common"}


if __name__ == "__main__":
    README.write_text(fresh(README.read_text()))
