"""The engine: what runs in the process that owns the device, and the client that supervises it."""
