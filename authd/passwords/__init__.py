"""Hashes passwords.

Owns: the rules for passwords, the formats of hashes, the hasher. Invariant: each attempt costs exactly one hash, on a
bounded number of threads. Words: *effort* is what the time of a hash depends on.
"""
