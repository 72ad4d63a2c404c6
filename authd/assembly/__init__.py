"""Builds the objects of one process, capability by capability, for the service, its commands and the tests alike. It
starts no task and does no I/O.

A file each for the stores in Postgres, the stores in Redis, the services over both, and the HTTP apps over these: a
command imports only the drivers that it uses.
"""
