"""Publishes what happened.

Owns: the event contract, the outbox in Postgres, the streams in Redis, the publisher. Invariant: an event is enqueued
in the transaction of what it tells, and sent at least once, in order for each user and topic. Words: a *lane* is a
bucket of the outbox; a row that the broker will not take is *parked*.
"""
