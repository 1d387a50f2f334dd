"""An HTTP proxy on the loopback that treats some requests badly, as networks and stores do."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import ClientSession, ClientTimeout, web

SLOW_DOWN = (
    "<?xml version='1.0'?><Error><Code>SlowDown</Code>"
    "<Message>Please reduce your request rate.</Message></Error>"
)
INTERNAL = (
    "<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We failed.</Message></Error>"
)
FAULTS = (
    "500",
    "503",
    "delay",
    "reset",  # before the request is passed on
    "lost answer",  # after the server did what was asked
    "cut",  # half of an answer
)


class Proxy:
    """`rate` of all requests meet a fault of `faults`, drawn by the seed."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.url = ""
        self.rate = 0.0
        self.faults: tuple[str, ...] = FAULTS
        self.delay_s = 0.3
        self.met: Counter[str] = Counter()
        self.paths: list[str] = []  # of all requests
        self._chance = random.Random(0)

    def trouble(self, rate: float, seed: int, faults: tuple[str, ...] = FAULTS) -> None:
        self.rate, self.faults = rate, faults
        self._chance = random.Random(seed)
        self.met.clear()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        fault = ""
        self.paths.append(request.raw_path)
        if self._chance.random() < self.rate:
            fault = self._chance.choice(self.faults)
            self.met[fault] += 1
        body = await request.read()
        if fault == "500":
            return web.Response(status=500, text=INTERNAL, content_type="application/xml")
        if fault == "503":
            return web.Response(status=503, text=SLOW_DOWN, content_type="application/xml")
        if fault == "reset":
            return self._cut_off(request)
        if fault == "delay":
            await asyncio.sleep(self.delay_s)
        async with (
            ClientSession(auto_decompress=False, timeout=ClientTimeout(60)) as session,
            session.request(
                request.method,
                f"{self.target}{request.raw_path}",
                headers=request.headers,
                data=body,
                allow_redirects=False,
                skip_auto_headers=["Content-Type", "Accept", "Accept-Encoding", "User-Agent"],
            ) as answer,
        ):
            data = await answer.read()
            hop = {"transfer-encoding", "connection", "keep-alive"}
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in hop}
            if fault == "lost answer":
                return self._cut_off(request)
            if fault != "cut" or len(data) < 2 or request.method == "HEAD":
                if request.method != "HEAD":
                    headers["Content-Length"] = str(len(data))
                return web.Response(status=answer.status, headers=headers, body=data)
            response = web.StreamResponse(status=answer.status, headers=headers)
            response.content_length = len(data)
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            return self._cut_off(request)

    @staticmethod
    def _cut_off(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


@contextmanager
def proxy_to(target: str) -> Iterator[Proxy]:
    """A running proxy before `target`, in a thread of its own."""
    proxy = Proxy(target)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def serve() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        proxy.url = f"http://{host}:{port}"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
