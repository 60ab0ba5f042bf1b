"""A receiver of OTLP over HTTP and gRPC, on OpenTelemetry's own protocol classes."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE_S = 30.0


class Received:
    """Every span that came, by whichever way, and the names of the services that sent them."""

    def __init__(self) -> None:
        self.url = ""
        self.services: set[str] = set()
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._answers = threading.Event()
        self._answers.set()

    def add(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        with self._lock:
            for sent in request.resource_spans:
                names = {a.key: a.value.string_value for a in sent.resource.attributes}
                self.services.add(names["service.name"])
                for scope in sent.scope_spans:
                    self._spans += scope.spans

    def falls_silent(self) -> None:
        """Who sends something from now on waits for an answer, for as long as there is a server."""
        self._answers.clear()

    def ends(self) -> None:
        """Nobody waits any longer."""
        self._answers.set()

    def wait_to_answer(self) -> None:
        """Return when it is time to answer."""
        self._answers.wait()

    def spans(self, trace_id: str) -> list[Span]:
        with self._lock:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

    def wait_for(self, trace_id: str, enough: Callable[[list[Span]], bool]) -> list[Span]:
        deadline_s = time.monotonic() + PATIENCE_S
        while not enough(spans := self.spans(trace_id)):
            assert time.monotonic() < deadline_s, [span.name for span in spans]
            time.sleep(0.1)
        return spans


@contextmanager
def over_http() -> Iterator[Received]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            received.add(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            received.wait_to_answer()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(trace_service_pb2.ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *args: Any) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        received.url = f"http://127.0.0.1:{server.server_port}"
        yield received
        received.ends()
        server.shutdown()
        thread.join()


@contextmanager
def over_grpc() -> Iterator[Received]:
    received = Received()

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            received.add(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        received.url = f"http://127.0.0.1:{port}"
        yield received
        server.stop(None).wait()
