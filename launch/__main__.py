"""`python -m launch` is the command `ebbtide`."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("distrib", "strategies", "launch")


def main() -> int:
    """Other packages are called `launch` or `strategies` too; a mixture would fail in strange ways."""
    here = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        home = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if home != here:
            print(
                f"ebbtide: the package {name!r} in {home or 'no folder'} is not Ebbtide's ({here}): "
                "uninstall the other one, or install Ebbtide in a virtual environment of its own",
                file=sys.stderr,
            )
            return 2
    from launch import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
