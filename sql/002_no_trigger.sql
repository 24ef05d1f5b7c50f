-- For a database that was made when a trigger still deleted the expired rows: service.py
-- does it now. Apply it once, before the new service.py starts. The old one works with it,
-- but deletes nothing.

BEGIN;

DROP TRIGGER tidy ON limits;
DROP FUNCTION tidy();

COMMIT;
