"""Plain text tables, for results that print."""

from collections.abc import Mapping, Sequence


def format_table(columns: Mapping[str, Sequence[object]], *, total: Sequence[object] = ()) -> str:
    """Columns side by side, numbers to the right, with a rule under the heading and above the last line.

    Args:
        columns: Heading and entries of each column, all of one length; None prints as a blank, floats with four digits.
        total: Entries of a last line, one per column; empty: no such line.

    Returns:
        Several lines without a trailing newline.

    Example:
        >>> print(format_table({"layer": [0, 1], "tau": [0.5, 0.25]}, total=["sum", 0.75]))
        layer     tau
        -------------
            0  0.5000
            1  0.2500
        -------------
          sum  0.7500
    """
    rows = list(zip(*columns.values(), strict=True)) + ([tuple(total)] if total else [])
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(heading), *(len(row[i]) for row in cells), 0) for i, heading in enumerate(columns)]
    left = [all(isinstance(v, str) for v in values) for values in columns.values()]
    lines = [_line(list(columns), widths, left), *(_line(row, widths, left) for row in cells)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines.insert(1, rule)
    if total:
        lines.insert(-1, rule)
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    parts = [c.ljust(w) if on_left else c.rjust(w) for c, w, on_left in zip(cells, widths, left, strict=True)]
    return "  ".join(parts).rstrip()


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
