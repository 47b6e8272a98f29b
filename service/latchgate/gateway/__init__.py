"""What all gateways have in common, however they ask: what their clients send, and what those are told."""
