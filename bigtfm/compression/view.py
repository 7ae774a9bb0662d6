"""What a compression came to, as a table for reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtfm.compression.command import Report
from bigtfm.compression.measure import Side, Speed

if TYPE_CHECKING:
    from rich.console import Group


def render(report: Report) -> Group:
    """Both sides, beside each other, and the next command."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if name != "groups")
    table = Table("", "before", "after", "change", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    for name, *cells in _rows(report.before, report.after):
        table.add_row(name, *cells)
    return Group(
        Text(f"{report.method}{' (' if settings else ''}{settings}{')' if settings else ''}: {report.out}"),
        table,
        Text(
            f"CPU, {report.threads} threads, torch {report.torch}; loss in nats a token; "
            "speed: median (quartiles), in turns"
        ),
        Text(f"next: {report.next}", overflow="fold"),
    )


def _rows(before: Side, after: Side) -> list[tuple[str, str, str, str]]:
    rows = [
        ("bytes on disk", f"{before.bytes:,}", f"{after.bytes:,}", f"{after.bytes / before.bytes:.3f} x"),
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}",
         f"{after.parameters / before.parameters:.3f} x"),
        ("zeros in blocks", f"{before.zeros:.1%}", f"{after.zeros:.1%}", ""),
        ("validation loss", f"{before.val_loss:.4f}", f"{after.val_loss:.4f}",
         f"{after.val_loss / before.val_loss - 1:+.2%}"),
        _rate("tokens/s read", before.read, after.read),
    ]  # fmt: skip
    if before.write is not None and after.write is not None:
        rows.append(_rate("tokens/s written", before.write, after.write))
    return rows


def _rate(name: str, before: Speed, after: Speed) -> tuple[str, str, str, str]:
    first, second = (f"{one.median:,.0f} ({one.low:,.0f}-{one.high:,.0f})" for one in (before, after))
    return name, first, second, f"{after.median / before.median:.2f} x"
