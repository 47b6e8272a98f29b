"""Settings for every test of the pure rules."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run, and no verdict that depends on how busy the machine is.
settings.register_profile("unit", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("unit")
