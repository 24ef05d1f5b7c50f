-- For a database that was made before the keys were sorted by bytes (COLLATE "C" in schema.sql).
-- It also makes their indexes anew, so it is right after a change of the C library, too. If it
-- stops at a duplicate key, two accounts have one address: delete the one that is not active.

BEGIN;

SET LOCAL lock_timeout = '2s';   -- behind a backup, it would block all requests: try later
ALTER TABLE users  ALTER COLUMN email   TYPE text COLLATE "C";
ALTER TABLE limits ALTER COLUMN name    TYPE text COLLATE "C",
                   ALTER COLUMN subject TYPE text COLLATE "C";
REINDEX TABLE users;
REINDEX TABLE limits;

COMMIT;
