"""What every request passes before and after its API: the server, the limits and the ledger."""
