"""A local web page for a folder of runs: list, compare, read, chat with base and edited model, audit."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...artifacts.runs import Run
from ...editing.errors import RequestError
from .audits import audit_page, watch_page
from .frame import Workbench, known
from .guard import Guard
from .pages import chat_page, compare_page, index_page, run_page

HOST = "127.0.0.1"
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)
"""A report from elsewhere may run its script, but cannot reach this page, its cookie or the network."""


def serve(folder: Path, port: int, device: str, dtype: str, ready: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted.

    Args:
        folder: The folder of runs.
        port: TCP port on this machine; 0 takes any free one.
        device: Where chats and audits compute.
        dtype: What they compute in.
        ready: Called with the address, including the token, just before the page starts.

    Raises:
        RequestError: The package for the page is missing, the folder does not exist, or the port is taken.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder of runs; run a recipe first, or give another folder")
    try:
        import uvicorn
        from fastapi import FastAPI
        from nicegui import ui
    except ImportError as error:
        raise RequestError("the page needs the package nicegui; run: pip install 'excise[ui]'") from error
    with _listening(port) as socket:
        port, token = socket.getsockname()[1], secrets.token_urlsafe(24)
        bench, app = Workbench(folder, device, dtype), FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        _pages(bench, app)
        ui.run_with(app, title="excise", language="en-GB", dark=None, show_welcome_message=False)
        app.add_middleware(Guard, token=token, port=port)
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1)
        ready(f"http://{HOST}:{port}/?token={token}")
        try:
            uvicorn.Server(config).run(sockets=[socket])
        finally:
            # Audits are processes of their own and would outlive the page.
            for audit in bench.audits.values():
                audit.process.terminate()


@contextmanager
def _listening(port: int) -> Iterator[Any]:
    import socket

    with socket.socket() as listening:
        # A port whose last connection has just ended can be used again at once.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise RequestError(f"port {port} is taken; give another --port, or 0 for any that is free") from error
        listening.listen()
        yield listening


def _pages(bench: Workbench, app: Any) -> None:
    from nicegui import ui

    def of_run(page: Callable[[Workbench, Run], None]) -> Callable[[str], None]:
        def shown(name: str) -> None:
            if run := known(bench, name):
                page(bench, run)

        return shown

    for place, page in {"run": run_page, "chat": chat_page, "audit": audit_page}.items():
        ui.page(f"/{place}/{{name:path}}")(of_run(page))

    ui.page("/")(lambda: index_page(bench))

    @ui.page("/compare")
    def compare(runs: str) -> None:
        compare_page(bench, runs.split(","))

    @ui.page("/watch/{name:path}")
    def watch(name: str) -> None:
        watch_page(bench, name)

    app.get("/report/{name:path}")(lambda name: _report(bench, name))


def _report(bench: Workbench, name: str) -> Any:
    from fastapi.responses import FileResponse, PlainTextResponse

    run = bench.run(name)
    if run is None or not (run.folder / "report.html").is_file():
        return PlainTextResponse("there is no report of that name\n", 404)
    return FileResponse(run.folder / "report.html", headers={"Content-Security-Policy": REPORT_POLICY})
