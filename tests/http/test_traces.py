"""Traces, as a collector receives them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conftest import APPLE, eventually

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes OTLP over HTTP, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def named(self, start: str) -> list[Span]:
        """Spans whose names begin so, in their order in time."""
        return sorted((s for s in self.spans if s.name.startswith(start)), key=lambda s: s.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.server.shutdown()
    running.server.server_close()


def attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_is_a_span_under_the_clients_with_the_engines_stages_under_it(start_server, collector):
    endpoint = f"http://127.0.0.1:{collector.server.server_port}"
    server = start_server(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_BSP_SCHEDULE_DELAY="50").wait_until_ready()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert client.post("/generate", json={**APPLE, "n": 2}, headers=headers).status_code == 200
        assert client.post("/generate", json={**APPLE, "steps": 3}).status_code == 422
        assert client.get("/live").status_code == 200
    assert eventually(lambda: len(collector.named("POST /generate")) == 2 and len(collector.spans) == 2 + 2 * 7 + 1)
    drawn, refused = collector.named("POST /generate")
    assert (drawn.trace_id.hex(), drawn.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(drawn)["gen_ai.request.model"] == "4step-unet"
    assert attributes(drawn)["http.response.status_code"] == 200
    assert attributes(refused)["error.type"] == "invalid_request"
    children = [span for span in collector.spans if span.parent_span_id == drawn.span_id]
    first = [span for span in children if attributes(span).get("sdxl.picture") == 0]
    assert [span.name for span in first] == ["encode", "queue", "denoise", "denoise", "denoise", "denoise", "decode"]
    assert [attributes(span)["sdxl.rows"] for span in first if span.name == "denoise"] == [2, 2, 2, 2]
    for span in children:
        assert drawn.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= drawn.end_time_unix_nano
    assert "apple" not in str(collector.spans)  # a prompt is nobody else's business
