"""A run writes inside its folder alone: where that may be, and what in it would lead elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from distrib.errors import UserError
from distrib.redaction import one_line


def refuse_links(folder: Path) -> None:
    """A folder that came from elsewhere may hold links, through which its next step would write over other files."""
    home = os.path.realpath(folder)
    for inside, subfolders, files in os.walk(folder):
        for path in (Path(inside, name) for name in (*subfolders, *files)):
            if path.is_symlink() and os.path.commonpath([home, os.path.realpath(path)]) != home:
                raise UserError(f"{path} is a link to {os.path.realpath(path)}, outside of {folder}: remove it")


def refuse_unusable(folder: Path) -> None:
    """Before anything is built: a folder that cannot be made or written."""
    said = f"output_dir={one_line(repr(str(folder)), 200)}"
    for path in (folder, *folder.parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{said}: {error.strerror}; name another folder") from None
        if not path.is_dir() or not os.access(path, os.W_OK):
            raise UserError(f"{said}: cannot write below {path}; name another folder")
        return
