"""Serves registered services (RFC 6749, 7009, 7662, 8414).

Owns: the service clients, introspection, revocation, the metadata. Invariant: nothing is said of a token before the
client is authenticated. Words: a *client* is a service here, never the caller of an endpoint.
"""
