"""HTTP in front of the domain: for gateways that ask by a request of their own, such as nginx and Traefik."""
