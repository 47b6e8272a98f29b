"""JWTs of an OpenID Connect issuer: its keys, and what it says of who presents one."""
