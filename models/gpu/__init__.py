"""What makes a GPU fast: streams, CUDA graphs, static weights, attention kernels, fp8."""
