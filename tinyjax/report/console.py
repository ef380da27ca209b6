"""The tables of a report, in the terminal."""

import rich.table
from rich.console import Console
from rich.text import Text

from tinyjax.report.display import is_numeric, printable, read
from tinyjax.report.document import Table


def print_table(table: Table, console: Console) -> None:
    """Print the table with the same texts as on the page; markup and control codes in it have no effect."""
    shown = rich.table.Table(
        title=Text(printable(table.title)) if table.title else None,
        caption=Text(printable(table.caption)) if table.caption else None,
        title_justify="left",
        caption_justify="left",
    )
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    for name, column in zip(table.columns, columns, strict=True):
        numeric = is_numeric(column)
        shown.add_column(
            Text(printable(name)), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    for row in zip(*map(read, columns), strict=True):
        shown.add_row(*map(Text, row))
    console.print(shown)
