"""The benchmark: real servers over HTTP, side by side in one run. `python -m bench`, or `make bench`."""
