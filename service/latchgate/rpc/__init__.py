"""grpc.aio in front of the domain."""
