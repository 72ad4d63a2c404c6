"""Knows who exists.

Owns: the row of a user, the form of a username, the cached profile. Invariant: a cache never replaces a newer row.
Words: an *incarnation* tells two users apart whom Postgres gave one id.
"""
