"""The model side: catalog, weights, schedule, pipeline and registry. Knows nothing of HTTP."""
