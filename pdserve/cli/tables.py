"""Tables in a terminal."""

from rich import box
from rich.table import Table


def titled_table(title: str, *columns: str, num_left: int = 1) -> Table:
    """A table whose first `num_left` columns hold text, the others numbers."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < num_left else "right")
    return table
