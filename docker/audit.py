"""Known vulnerabilities of the locked packages: `python docker/audit.py LOCK...`, as `make audit` calls it.

A vulnerability fails. Where the database cannot be asked, or does not know a package, one line says what was not
audited, and that passes: a machine without network can still check its work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

UNREACHABLE = ("requests.exceptions", "ServiceError", "Timeout", "timed out")


def judged(lock: str, answer: str, errors: str) -> tuple[list[str], bool]:
    """What there is to say of pip-audit's answer, and whether it passes."""
    last = (errors.strip().splitlines() or ["no answer"])[-1]
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError):
        return [f"not audited: {lock}: {last[:200]}"], any(word in errors for word in UNREACHABLE)
    found = [
        f"{lock}: {package['name']} {package['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}"
        for package in packages
        for flaw in package.get("vulns", ())
    ]
    skipped = [package for package in packages if "skip_reason" in package]
    lines = list(found)
    if skipped:
        lines.append(f"not audited: {len(skipped)} of {len(packages)} packages of {lock}: {skipped[0]['skip_reason']}")
    if len(skipped) < len(packages):
        lines.append(f"audited: {len(packages) - len(skipped)} packages of {lock}, {len(found)} known vulnerabilities")
    return lines, not found


def main(locks: list[str]) -> int:
    passed = True
    for lock in locks:
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--disable-pip",
            "--require-hashes",
            "--format",
            "json",
            "-r",
            lock,
        ]
        done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
        lines, well = judged(Path(lock).name, done.stdout, done.stderr)
        print("\n".join(lines))
        passed &= well
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
