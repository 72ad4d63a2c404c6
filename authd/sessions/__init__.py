"""Keeps people logged in.

Owns: sessions, the revocation log, its feed into Redis, the relay of events born in Redis. Invariant: what has ended
stays ended. Words: a session *ends* by a row of the log; an *epoch* is a per-user number, and raising it ends every
session opened below it; *behind* is a Redis that has applied less of the log than the caller knows of.
"""
