"""Proves who somebody is.

Owns: the check of a password, the throttle. Invariant: no guess is hashed that is not counted. Words: an attempt is
*reserved* before it is hashed and *settled* after; a *pair* is an address and an account.
"""
