"""Where tests keep what goes with them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - what is made in it has a name of its own
_ROOM_BYTES: Final = 4 << 30


def _parent() -> Path | None:
    """Gives a folder in memory, where there is one with room for the databases of several test processes.

    A database is some hundred files. On a disk their coming and going takes several times as long, also with nothing
    written through.
    """
    try:
        has_room = os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES
    except OSError:
        return None
    return _MEMORY if has_room else None


@contextmanager
def quick_folder(prefix: str) -> Iterator[Path]:
    """Makes a folder until the block ends: in memory where that is possible, else where temporary files are kept.

    Not one of pytest's own: as root PostgreSQL runs as another user, who can not look into pytest's folders as soon as
    another pytest starts.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_parent()) as made:
        yield Path(made)


def cloning(name: str, template_url: str) -> str:
    """Gives the statement that makes a database from a template on the same server, in the way that is the quicker.

    In memory that is to copy files; on a disk to write them page by page, as PostgreSQL does by itself.
    """
    parts = urlsplit(template_url)
    sockets = parse_qs(parts.query).get("host", [""])[0]
    strategy = " STRATEGY file_copy" if _MEMORY in Path(sockets).parents else ""
    return f"CREATE DATABASE {name} TEMPLATE {parts.path[1:]}{strategy}"
