"""The serving side: HTTP, the queue in front of the engine, and the engine process."""
