"""Telling a person how a run goes: a bar on a terminal, plain lines elsewhere, nothing in tests."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinyjax.data.progress import Progress as DataProgress


class Silent:
    """Says nothing; also the interface of the others."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        pass

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def data(self, event: DataProgress) -> None:
        """Show how far the preparation of data is."""

    def begin(self, step: int, steps: int) -> None:
        """Start the bar of a training run at `step`."""

    def advance(self, step: int, line: str) -> None:
        """Move the bar to `step`; `line` has the loss and the speed."""


class Shown(Silent):
    """On a terminal a live bar with the time left, else one line per logged step."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = None
        self._steps = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def data(self, event: DataProgress) -> None:
        if event.done:
            self.say(str(event))

    def begin(self, step: int, steps: int) -> None:
        self._steps = steps
        self._task = self._bar.add_task("training", total=steps, completed=step, line="compiling")

    def advance(self, step: int, line: str) -> None:
        self._bar.update(self._task, completed=step, line=line)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {line}")
