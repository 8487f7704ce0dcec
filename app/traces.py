"""OpenTelemetry: a span per request, and the engine's stages as its children. Off unless OTEL_EXPORTER_OTLP_ENDPOINT
says where spans are sent to (extra `otel`); all other variables of OpenTelemetry's own hold, too."""

import os
import time
from collections.abc import Sequence

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.messages import Done
from app.http.ledger import QUIET


def make_tracer() -> Tracer | None:
    """Where spans go; None where they are off. Raises ImportError without the extra."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") and not os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = Resource.create({SERVICE_NAME: "sdxl-lightning-server"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # in a thread; what it cannot send is lost
    return provider.get_tracer("sdxl-lightning-server")


class Tracing:
    """Pure ASGI. A span per request, a child of the one that traceparent names. Probes have none."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other scopes pass."""
        if scope["type"] != "http" or scope["path"].endswith(QUIET):
            await self.app(scope, receive, send)
            return
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        parent = propagate.extract(dict(Headers(scope=scope)))
        span = self.tracer.start_span(scope["method"], parent, SpanKind.SERVER, attributes)
        state = scope.setdefault("state", {})
        state["trace"] = Trace(self.tracer, span)

        async def send_and_tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self.app(scope, receive, send_and_tell)
        finally:
            if (route := getattr(scope.get("route"), "path", None)) is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            if state.get("variant"):
                span.set_attributes({"gen_ai.output.type": "image", "gen_ai.request.model": state["variant"]})
            if (problem := state.get("problem")) is not None:
                span.set_attribute("error.type", problem.cause.code)
            span.end()


class Trace:
    """A request's span, to which the stages of its pictures are added."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self._parent = trace.set_span_in_context(span)
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    @property
    def traceparent(self) -> str:
        """The span's name as W3C Trace Context writes it."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, self._parent)
        return carrier.get("traceparent", "")

    def pictures(self, done: Sequence[Done]) -> None:
        """What the engine told of each picture: queue, encode, each step with the rows of its call, decode."""
        for number, each in enumerate(done):
            for mark in each.marks:
                self.add(mark.stage, mark.start, mark.seconds, {"sdxl.picture": number, "sdxl.rows": mark.rows})

    def add(self, name: str, start: float, seconds: float, attributes: dict[str, int] | None = None) -> None:
        """A stage. start: on the monotonic clock, which all processes of this machine share."""
        began = int(start * 1e9) + self._offset_ns
        child = self._tracer.start_span(name, self._parent, attributes=attributes, start_time=began)
        child.end(began + int(seconds * 1e9))
