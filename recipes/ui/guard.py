"""Access control of the local web page: only this machine's browser, with the printed token, from the page itself."""

import secrets
from typing import Any

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""The page loads nothing from other hosts. Its library compiles templates in the browser, so eval must be allowed."""


class Guard:
    """ASGI middleware: the token in the first address becomes a cookie; other hosts and origins are refused.

    This stops DNS rebinding (another host name that resolves to this machine) and pages of other origins that open a
    socket.
    """

    def __init__(self, app: Any, token: str, port: int):
        self.app, self.token, self.cookie = app, token, f"excise-{port}"
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse, RedirectResponse

        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        origin = connection.headers.get("origin")
        refused = ""
        if connection.headers.get("host") not in self.hosts:
            refused = "another host"
        elif origin is not None and origin.removeprefix("http://") not in self.hosts:
            refused = "another origin"
        elif not _same(connection.cookies.get(self.cookie), self.token):
            if scope["type"] == "http" and _same(connection.query_params.get("token"), self.token):
                # The redirect takes the token out of the address, which browsers remember.
                answer = RedirectResponse(scope["path"], 303)
                answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
                await answer(scope, receive, send)
                return
            refused = "no token; open the address that excise printed"
        if not refused:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refused})
        else:
            await PlainTextResponse(f"refused: {refused}\n", 403)(scope, receive, send)


def _same(candidate: str | None, token: str) -> bool:
    # compare_digest takes the same time for every input, so timing reveals nothing of the token.
    return candidate is not None and secrets.compare_digest(candidate.encode(), token.encode())


def _with_headers(send: Any) -> Any:
    async def answer(message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            added = [
                (b"content-security-policy", POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"x-content-type-options", b"nosniff"),
            ]
            message["headers"] = [*message["headers"], *(item for item in added if item[0] not in names)]
        await send(message)

    return answer
