"""Latchgate: API keys for gateways."""

import os

# Read by grpc when it is imported. Its handlers for fork() are of no use to a process that starts others by exec alone,
# and write a line to the terminal each time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
