"""Latchgate: API keys for gateways."""
