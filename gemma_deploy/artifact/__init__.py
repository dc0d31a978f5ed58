"""The artifact: its directory, manifest, ledger, checks and report. Imports no torch."""
