"""A task of a few milliseconds, and a bar that shows nothing."""

from pathlib import Path

from benchmarks.runs import Task
from examples import train_gpt

TASK = Task(context=8, width=8, layers=1, heads=2, batch=2, windows=8, glance=4)
CORPUS = train_gpt.load_corpus(Path(train_gpt.__file__))


class Bar:
    """Counts like a tqdm bar."""

    def __init__(self, total: int) -> None:
        self.n, self.total = 0, total

    def update(self, steps: int = 1) -> None:
        self.n += steps

    def set_description(self, text: str) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool) -> None: ...


def quiet(text: str) -> None:
    """A listener of progress that does nothing."""
