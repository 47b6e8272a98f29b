"""Latchgate: API keys for gateways."""

import os

# Read by grpc when it is imported. Its handlers for fork() are of no use to a process that starts others by exec alone,
# and write a line to the terminal each time. What its core says on standard error beside the service's own lines, in no
# format of theirs, is said by these or is for those who look for faults in grpc: they set GRPC_VERBOSITY=error.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "none")
# Its newer listener wakes more threads for each call than the former one, which costs a quarter of the throughput.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
