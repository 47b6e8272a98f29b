"""The rules of API keys, pure: no I/O, no transport, nothing but the standard library."""
