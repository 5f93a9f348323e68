"""CPU packages and memory through Linux's powercap tree: counters of microjoules that wrap; root's at first."""

from __future__ import annotations

from pathlib import Path

from distrib.energy.clock import Clock
from distrib.energy.source import Counter, Source

POWERCAP = Path("/sys/class/powercap")
# More no socket draws.
CEILING_WATTS = 1000.0


class Rapl(Counter):
    """One domain. Its hardware counts every millisecond."""

    how = "rapl"
    edge_s = 0.001

    def __init__(self, kind: str, name: str, clock: Clock, zone: Path) -> None:
        self.wraps_at = int((zone / "max_energy_range_uj").read_text()) / 1e6
        super().__init__(kind, name, clock, CEILING_WATTS, read=lambda: int((zone / "energy_uj").read_text()) / 1e6)


def open_domains(root: Path, clock: Clock) -> tuple[list[Source], list[str]]:
    """Every package, memory and platform; what lies inside a package (its cores) is part of it.

    One that cannot be read keeps its place, and so does the package of a node that shows none.
    """
    found: list[Source] = []
    notes: list[str] = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            kind, name = _domain(zone)
            if kind is None:
                continue
            domain = Rapl(kind, name, clock, zone)
        except (OSError, ValueError) as error:
            notes.append(f"RAPL's {zone.name} cannot be read: {error}")
            continue
        found.append(domain)
        if domain.error:
            found[-1] = Source(kind, name, clock, CEILING_WATTS)
            hint = "; root can let others read it: chmod a+r" if "Permission denied" in domain.error else ""
            notes.append(f"the energy of {name} is unknown: {domain.error}{hint}")
    if not any(source.kind == "package" for source in found):
        found.append(Source("package", "package", clock, CEILING_WATTS))
        notes.append(f"the energy of the CPU is unknown: {root} shows no package of RAPL")
    return found, notes


def _domain(zone: Path) -> tuple[str | None, str]:
    """(kind, name) of a zone such as intel-rapl:0 (a package) or intel-rapl:0:1 (what lies in it or beside it)."""
    name = (zone / "name").read_text().strip()
    if name.startswith("package"):
        return "package", name
    if name == "psys":
        return "platform", name
    if name == "dram":
        parent, _, _ = zone.name.rpartition(":")
        return "dram", f"{(zone.with_name(parent) / 'name').read_text().strip()}/dram"
    return None, name
