"""Makes and reads tokens.

Owns: access, refresh and device tokens, the key ring, its seal and rotation. Invariant: one text for each token, and
nothing stored can be turned into one. Words: a *subject* is a user's id and incarnation.
"""
