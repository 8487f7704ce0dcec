"""What makes a CPU fast: the family's networks as OpenVINO graphs."""

import sys

# OpenVINO's tools report conversions to their makers. Without this module they do not; nothing of the user's changes.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
