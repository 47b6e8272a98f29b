"""Several worker processes on one port: the supervisor, its workers, and what they tell each other."""
