"""Weightless export of the static graphs. Imports torch; nothing before the export stage may import this package."""
