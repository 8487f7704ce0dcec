"""The APIs, one per file. Each translates its wire format to an Order, and pictures and errors back."""
