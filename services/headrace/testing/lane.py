"""A TCP connection that a test can cut or freeze, as the death or the stop of a process does."""

import asyncio

READ_BYTES = 1 << 16


class FaultyLane:
    """Forwards connections to a port of this machine until told otherwise.

    A server in the test's own process cannot be killed; behind a lane it looks killed from outside.

    Attributes:
        address: host:port that clients use; the same after `restore`.
    """

    def __init__(self) -> None:
        self.address = ""
        self._target_port = 0
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._moving = asyncio.Event()
        self._moving.set()

    async def open(self) -> None:
        """Listen on a free port; connections fail until `restore` names a target."""
        await self._listen(0)

    def connect(self, target_port: int) -> None:
        """Say where connections lead to."""
        self._target_port = target_port

    async def cut(self) -> None:
        """Drop every connection and refuse new ones."""
        self._moving.set()
        server, self._server = self._server, None
        if server is not None:
            # A server that is closed between a connection and its transport never closes that one (CPython 3.11).
            for listener in server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            await asyncio.sleep(0)
            server.close()
        for pump in tuple(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def restore(self, target_port: int) -> None:
        """Listen again at the same address, for a process that was reborn behind it."""
        self._target_port = target_port
        await self._listen(int(self.address.rpartition(":")[2]))

    def stall(self) -> None:
        """Keep connections open and move nothing, as a stopped process does."""
        self._moving.clear()

    def resume(self) -> None:
        """Move again what has waited."""
        self._moving.set()

    async def _listen(self, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Both ends see a dropped connection, even if the lane is cut before this one has moved anything.
        if self._server is None:
            writer.transport.abort()
            return
        pump = asyncio.ensure_future(self._forward(reader, writer))
        self._pumps.add(pump)
        pump.add_done_callback(lambda _: writer.transport.abort())
        pump.add_done_callback(self._pumps.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            return  # nobody listens there: the connection is dropped
        directions = ((reader, far_writer), (far_reader, writer))
        pumps = [asyncio.ensure_future(self._pump(*direction)) for direction in directions]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(READ_BYTES):
            await self._moving.wait()
            writer.write(data)
            await writer.drain()
        await self._moving.wait()
