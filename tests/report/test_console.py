import io

from rich.console import Console

from tinyjax.report.console import print_table
from tinyjax.report.document import Table


def shown(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_table(table, console)
    return console.file.getvalue()


def test_texts_are_those_of_the_page():
    text = shown(Table("Losses", ("name", "n", "loss"), (("a", 1234567, 2.0512), ("b", None, 2.05)), caption="3 seeds"))
    for part in ("Losses", "1,234,567", "2.051", "2.050", "–", "3 seeds"):
        assert part in text


def test_numbers_are_aligned_right():
    lines = shown(Table("", ("a long name", "text"), ((1, "x"), (1000, "yy")))).splitlines()
    (one,) = (line for line in lines if " x " in line)
    (thousand,) = (line for line in lines if " yy " in line)
    assert one.index("1 ") == thousand.index("1,000") + len("1,000") - 1
    assert one.index("x") == thousand.index("yy")


def test_markup_and_control_codes_have_no_effect():
    hostile = "[red]x[/red][/nothing] \x1b[31m \x07"
    text = shown(Table(hostile, (hostile,), ((hostile,),), caption=hostile))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.count("[red]x[/red][/nothing]") == 4


def test_a_narrow_terminal_loses_nothing():
    word = "abcdefghijklmnopqrstuvwxyz"
    text = shown(Table("", ("w", "n"), ((word, 1),)), width=20)
    assert "".join(c for c in text if c in word).removeprefix("wn") == word


def test_empty_tables():
    assert "a" in shown(Table("t", ("a",), ()))
    shown(Table("t", (), ()))
