"""Prometheus metrics, in base units and with few labels. Nothing here names a prompt, a seed or a client.

device: an engine's, as DEVICES names it or by its number; a server with one engine has device 0."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.catalog import Weights

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


def labels(weights: Weights) -> tuple[str, str]:
    """A variant's name, and whether styles are added: never theirs, of which there may be thousands."""
    return weights.variant, str(weights.is_styled).lower()


class Metrics:
    """All series of one server. received = the sum of requests over all outcomes, once nothing is in flight."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.received = Counter(
            "sdxl_requests_received", "Requests to POST /generate, counted as they arrive.", registry=registry
        )
        self.requests = Counter(
            "sdxl_requests", "Requests by how they ended.", ["variant", "outcome"], registry=registry
        )
        self.of_key = Counter(
            "sdxl_key_requests", "Requests of each key by how they ended.", ["key", "outcome"], registry=registry
        )
        self.without_key = Counter(
            "sdxl_requests_without_key", "Requests without a valid key, where keys are needed.", registry=registry
        )
        self.checks = Counter("sdxl_checks", "Pictures by what the check said.", ["verdict"], registry=registry)
        self.certificate_expiry = self._gauge(
            "sdxl_c2pa_certificate_expiry_timestamp_seconds",
            "When the certificate that signs pictures expires, Unix time; 0 where none does.",
        )
        self.images = Counter("sdxl_images", "Pictures drawn.", ["variant", "styled"], registry=registry)
        self.waiting = self._gauge("sdxl_queue_depth", "Pictures accepted that have had no step yet.")
        self.running = self._gauge("sdxl_images_running", "Pictures between their first step and their answer.")
        self.queue = self._seconds("sdxl_queue_seconds", "Time from the engine's inbox to the first step.")
        self.stages = {
            "encode": self._seconds("sdxl_encode_seconds", "One call of the text encoders."),
            "denoise": self._seconds("sdxl_denoise_step_seconds", "One call of the UNet."),
            "decode": self._seconds("sdxl_decode_seconds", "One call of the VAE's decoder."),
        }
        self.style_load = self._seconds("sdxl_style_load_seconds", "Styles added to a variant's weights.")
        self.image_encode = self._seconds("sdxl_image_encode_seconds", "One picture to PNG, JPEG or WebP.")
        self.total = self._seconds("sdxl_request_seconds", "A successful request from its arrival to its answer.")
        self.batch = Histogram(
            "sdxl_batch_rows",
            "Rows in one call of the UNet.",
            ["variant", "styled"],
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=registry,
        )
        self.resident = self._gauge("sdxl_variant_resident_bytes", "Weights held in memory.", "variant", "device")
        self.device_bytes = self._gauge("sdxl_gpu_memory_bytes", "GPU memory in use by the engine.", "device")
        self.switches = self._gauge("sdxl_variant_switches", "Changes of the active variant in this engine.", "device")
        self.ready = self._gauge("sdxl_ready", "1 while the server takes requests.")
        self.engine_ready = self._gauge("sdxl_engine_ready", "1 while this engine takes pictures.", "device")
        self.work = self._gauge("sdxl_work_seconds", "Until this engine has drawn what it has.", "device")
        self.restarts = Counter(
            "sdxl_engine_restarts", "Engine processes that ended unasked.", ["device"], registry=registry
        )
        self.log_lines_dropped = Counter(
            "sdxl_log_lines_dropped", "Log lines that could not be written.", registry=registry
        )
        self.loop_lag = self._seconds(
            "sdxl_loop_lag_seconds", "How late the event loop of HTTP is, ten times a second."
        )
        self.step_cost = self._gauge("sdxl_step_cost_seconds", "Measured at warm-up: one UNet call.", "batch", "device")
        self.decode_cost = self._gauge("sdxl_decode_cost_seconds", "The same: one VAE call.", "batch", "device")

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self.registry)
