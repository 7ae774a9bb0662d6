"""What a check found, and how findings are shown. A check that itself fails or hangs is a finding, too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from queue import Empty, Queue
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["ok", "warning", "error"]
STYLES: Mapping[Status, str] = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """`found` is what was seen, `fix` what to do about it (empty when it is ok)."""

    check: str
    status: Status
    found: str
    fix: str = ""


Check = Callable[[], Sequence[Finding]]


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "warning", found, fix)


def error(check: str, found: str, fix: str) -> Finding:
    return Finding(check, "error", found, fix)


def examine(checks: Mapping[str, Check], seconds: float) -> list[Finding]:
    """All checks at once, in threads that are left behind when they take longer than `seconds` together."""
    answers: Queue[tuple[str, Sequence[Finding]]] = Queue()

    def carry_out(name: str, check: Check) -> None:
        try:
            answers.put((name, check()))
        except Exception as failure:  # whatever a broken machine does to a check, the others go on
            said = f"{type(failure).__name__}: {failure}"
            answers.put((name, [warning(name, f"could not be checked: {said}", "see what it says")]))

    for name, check in checks.items():
        threading.Thread(target=carry_out, args=(name, check), daemon=True).start()
    deadline = monotonic() + seconds
    found: dict[str, Sequence[Finding]] = {}
    while len(found) < len(checks):
        try:
            name, findings = answers.get(timeout=max(0.0, deadline - monotonic()))
        except Empty:
            break
        found[name] = findings
    late = f"no answer within {seconds:.0f} s"
    return [
        finding
        for name in checks
        for finding in found.get(
            name, [error(name, late, "a disk, a driver or a name server that hangs: look there first")]
        )
    ]


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """{"ok": whether nothing is an error, "findings": [...]}."""
    return {"ok": is_well(findings), "findings": [asdict(finding) for finding in findings]}


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is an error."""
    return all(finding.status != "error" for finding in findings)


def render(findings: Sequence[Finding]) -> RenderableType:
    """A table, and a line that counts."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "found")
    for finding in findings:
        found = Text(finding.found)
        if finding.fix:
            found.append(f"\nfix: {finding.fix}", style="dim")
        table.add_row(Text(finding.status, style=STYLES[finding.status]), Text(finding.check), found)
    counts = {status: sum(finding.status == status for finding in findings) for status in STYLES}
    said = ", ".join(
        f"{number} {status}{'s' if number != 1 and status != 'ok' else ''}"
        for status, number in counts.items()
    )
    return Group(table, Text(f"\n{said}"))
