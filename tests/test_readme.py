"""What the documents say is so: Python blocks run, commands parse, links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from reroll.cli import COMMANDS
from reroll.cli.train import read
from reroll.train.config import resolve

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """Yield (line number, text) of the blocks of a language."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        if found[1] == language:
            yield text[: found.start()].count("\n") + 1, found[2]


def inline_code(page):
    """Return what stands between backquotes outside of blocks."""
    return INLINE.findall(BLOCK.sub("", page.read_text()))


def commands(page):
    """Return the commands of the shell blocks as words, without comments."""
    lines = [line for _, block in blocks(page, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def reroll_commands(page):
    """Yield the words after `reroll`, in shell blocks and in `inline code`."""
    named = [shlex.split(code) for code in inline_code(page) if code.startswith(("reroll ", "python -m reroll "))]
    for words in [*commands(page), *named]:
        if words[:3] == ["python", "-m", "reroll"]:
            words = words[2:]
        if words[:1] == ["reroll"]:
            yield words[1:]


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=name_of)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    """In order, in one namespace, away from the checkout."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # many small operations, on which threads would wait for each other
    namespace = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, name_of(page), "exec"), namespace)


NUMBER = re.compile(r"[-+]?\d+\.?\d*")


@pytest.mark.parametrize("line, block", [*blocks(README, "python")])
def test_a_block_of_the_readme_runs_alone(line, block, monkeypatch, tmp_path, capsys):
    """It will be copied without those before it; a block of text right after it is what it prints."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    exec(compile("\n" * line + block, "README.md", "exec"), {"__name__": "__main__"})
    after = README.read_text().partition(block)[2].removeprefix("```\n").partition("\n```python")[0]
    printed = re.match(r"[^`]*```text\n(.*?)```", after, re.DOTALL)
    if printed is not None:
        expected, numbers = (list(map(float, NUMBER.findall(text))) for text in (printed[1], capsys.readouterr().out))
        assert numbers == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("page", [p for p in PAGES if p != README and len([*blocks(p, "python")]) > 2], ids=name_of)
def test_a_page_of_many_blocks_says_that_they_build_on_each_other(page):
    assert re.search(r"build[s]? on", page.read_text().partition("```python")[0])


class Parsed(BaseException):
    """Raised where a command would begin its work."""


def parse_only(module, monkeypatch):
    """Let a module of the command line stop after it has read its arguments."""
    parse = module.parse

    def stop(*arguments, **options):
        raise Parsed(parse(*arguments, **options))

    monkeypatch.setattr(module, "parse", stop)


def check_command(words, monkeypatch):
    """Fail unless the command exists and, where it is given arguments, reads them."""
    if words in (["--help"], ["--version"], ["COMMAND", "--help"]):
        return
    assert words[0] in COMMANDS, f"reroll {' '.join(words)}: no such command"
    if words[0] in ("train", "show"):
        resolve(read(words[0], words[1:]).config)
    elif len(words) > 1:
        module = importlib.import_module(f"reroll.cli.{COMMANDS[words[0]][0]}")
        with monkeypatch.context() as patch:
            parse_only(module, patch)
            with pytest.raises(Parsed):
                module.run(words[0], words[1:])


@pytest.mark.parametrize("page", [p for p in PAGES if any(reroll_commands(p))], ids=name_of)
def test_commands_are_read_by_the_real_parser(page, monkeypatch):
    for words in reroll_commands(page):
        check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    ["train copy --stpes 3", "train nothing", "eval --path x", "bench zeroth --jsn x", "nothing", "runs stop"],
)
def test_a_wrong_command_would_be_found(command, monkeypatch):
    with pytest.raises((AssertionError, ValueError)):
        check_command(command.split(), monkeypatch)


def test_every_command_is_in_the_readme():
    assert {words[0] for words in reroll_commands(README) if words} >= set(COMMANDS)


def test_flags_named_alone_exist():
    """A flag in `inline code` that is not part of a whole command is still a flag of some command."""
    from reroll.cli.flags import flag_fields
    from reroll.cli.train import EXTRA

    known = {name.replace("_", "-") for name in [*flag_fields(), *EXTRA]} | {"help", "debug"}
    for page in PAGES:
        for code in inline_code(page):
            if code.startswith("--"):
                unknown = set(re.findall(r"--([a-z-]+)", code)) - known
                assert not unknown, f"{name_of(page)}: `{code}`"


def test_the_first_two_commands_are_demo_and_test():
    assert commands(README)[:2] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [code.split() for code in inline_code(page)]
    assert {words[1] for words in [*commands(page), *named] if words[:1] == ["make"] and words[1:]} <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}, which is not there"
