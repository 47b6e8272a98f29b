"""`latchgate import`: a client of ImportKeys that reads files."""
