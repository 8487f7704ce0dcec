"""The GPU benchmark: full-size SDXL with RANDOM weights, against diffusers on the same GPU: `python -m bench.gpu`."""
