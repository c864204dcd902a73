"""Plain-text tables: how results print."""

from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, numbers to the right; an empty string when there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in (heading, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_the_right = [all(isinstance(cell, int) or cell == "" for cell in column) for column in zip(*rows, strict=True)]

    def line(row):
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), line(["-" * width for width in widths]), *map(line, cells[1:])])
