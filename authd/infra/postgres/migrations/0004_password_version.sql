-- expand
-- Raised by whatever sets another password, which ends the use of device tokens; a renewed hash of the same one leaves it.

ALTER TABLE users ADD COLUMN password_version integer NOT NULL DEFAULT 1;
