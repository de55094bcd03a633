"""What is said of counts, progress and tables."""

import random
from pathlib import Path

import pytest

from upcycle import console
from upcycle.console import table, tell, track, warn
from upcycle.errors import command_line, counted


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [
        (0, "row", "0 rows"),
        (1, "training row", "1 training row"),
        (11_169, "row", "11,169 rows"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (3, "batch", "3 batches"),
    ],
)
def test_a_count_agrees_with_its_noun(number: int, noun: str, said: str) -> None:
    assert counted(number, noun) == said


def test_progress_says_what_it_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(track(range(2000), "hashing base", "files")) == list(range(2000))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("hashing base: 1 of 2,000 files, ")
    assert lines[-1] == "hashing base: 2,000 of 2,000 files, 0:00:00 left"


@pytest.mark.parametrize("width", [20, 40, 80, 140])
def test_every_figure_of_a_table_is_shown_whatever_the_width(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.console, "width", width)
    figures = [[f"0.{i:02}{j:02}" for j in range(16)] for i in range(16)]
    rows = [[f"E{i} expert", *row] for i, row in enumerate(figures)]
    table("experts", ["", *(f"E{j}" for j in range(16))], rows)
    printed = capsys.readouterr().out
    assert all(printed.count(figure) == 1 for row in figures for figure in row)
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= max(width, 24)  # the first column and one more are the least
    lines = [line.split() for line in printed.splitlines() if line.strip().startswith("E0 expert")]
    assert [cell for line in lines for cell in line[2:]] == figures[0]


@pytest.mark.parametrize("width", [12, 30, 60, 80, 100])
def test_every_word_of_a_table_is_shown(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.console, "width", width)
    draw = random.Random(width)
    for _ in range(40):
        columns = draw.randint(2, 9)
        heads = [f"head{i}" + draw.choice(["", " of a token", " p (paired)"]) for i in range(columns)]
        cells = ("0.1234", "12,345,678", "100.0% (25.0%)", "-0.09 (-0.1 to -0.08)")
        rows = [["v" * draw.randint(3, 50), *(draw.choice(cells) for _ in range(columns - 1))] for _ in range(3)]
        table("t", heads, rows, words=draw.random() < 0.5)
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= width
        whole = " ".join(cell for row in rows for cell in row[1:])
        for word in set(whole.split()) if width > 30 else ():
            assert printed.split().count(word) == whole.split().count(word)
        assert printed.count("v") >= sum(len(row[0]) for row in rows)
        assert sum(map(printed.count, "0123456789")) >= sum(map(whole.count, "0123456789"))


def test_commands_are_typed_with_their_spaces_quoted() -> None:
    assert command_line("run", Path("a b/recipe.yaml"), "--run", "a b") == "upcycle run 'a b/recipe.yaml' --run 'a b'"


def test_a_note_stands_below_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    table("experts", ("k", "G"), [("2", "1")], note="k: experts that each token uses")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert (lines[0], lines[-1]) == ("experts", "k: experts that each token uses")


def test_what_data_hold_is_no_command_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    title = "\x1b]0;pwned\x07"
    tell(title)
    warn(title)
    table(title, ("domain", title), [(title, "1")])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.count(r"\x1b]0;pwned\x07") >= 4
