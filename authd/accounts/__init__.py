"""Changes users.

Owns: registration. Invariant: a user and its `user.registered` event are one commit. Words: a *user* is a row of
`users`; what a client sees of it is its *profile*.
"""
