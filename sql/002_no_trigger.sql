-- For a database that was made when a trigger still deleted the expired rows: service.py
-- does it now. Apply it before the new service.py starts. The old one works with it, but
-- deletes nothing. Like every script with a number, it may be applied again.

BEGIN;

SET LOCAL lock_timeout = '2s';   -- behind a backup, it would block all requests: try later
DROP TRIGGER IF EXISTS tidy ON limits;
DROP FUNCTION IF EXISTS tidy();

COMMIT;
