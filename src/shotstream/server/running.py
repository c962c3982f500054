"""The server's process: uvicorn, told what a live server needs, and how to end well."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from shotstream.server.studio import Studio


class Server(uvicorn.Server):
    """Ends the sessions first: streams have no end of their own, and the shot under way is to be kept."""

    def __init__(self, app: FastAPI, studio: Studio) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws="websockets-sansio",
                ws_max_size=64 * 1024,  # of what viewers send
                ws_per_message_deflate=False,  # video is compressed already
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._studio = studio

    async def main_loop(self) -> None:
        """Serve; end by itself if the model cannot be loaded at all."""
        watcher = asyncio.create_task(self._watch())
        await super().main_loop()
        watcher.cancel()

    async def _watch(self) -> None:
        await self._studio.hopeless.wait()
        self.should_exit = True

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await self._studio.close()
        await super().shutdown(list(sockets) if sockets else None)


def run(app: FastAPI, studio: Studio, listener: socket.socket) -> None:
    """Serve at an open socket until SIGINT or SIGTERM. Raises KeyboardInterrupt after SIGINT."""
    Server(app, studio).run(sockets=[listener])
