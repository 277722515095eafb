"""Plain text tables, for results that print."""

from collections.abc import Mapping, Sequence
from io import StringIO

# Nothing but a rule under the heading and one above the last line.
_RULES = "    \n    \n -- \n    \n -- \n -- \n    \n    \n"


def format_table(columns: Mapping[str, Sequence[object]], *, total: Sequence[object] = ()) -> str:
    """Set columns side by side, numbers to the right, with a rule under the heading and above the last line.

    Entries None print as a blank, floats with four digits; ``total`` holds those of a last line, one per column.
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=Box(_RULES, ascii=True), show_edge=False, pad_edge=False, show_footer=bool(total))
    table.collapse_padding = True
    for number, (heading, values) in enumerate(columns.items()):
        last, left = _text(total[number]) if total else "", all(isinstance(value, str) for value in values)
        table.add_column(heading, last, justify="left" if left else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(_text, row))
    text = StringIO()
    plain = Console(file=text, width=10_000, color_system=None, markup=False, emoji=False, force_jupyter=False)
    plain.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _text(value: object) -> str:
    """A value as it is printed."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
