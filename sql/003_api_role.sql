-- For a database that was made before service.py had a role of its own. Apply it as the
-- database's owner, give the role a password, and name both in DATABASE_URL.

BEGIN;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'registration_api') THEN
        CREATE ROLE registration_api LOGIN;
    END IF;
    -- What PostgreSQL gives every role: temporary tables, and before version 15 any tables.
    EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    -- And large objects, which only a superuser can take away.
    IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        REVOKE EXECUTE ON FUNCTION lo_create, lo_creat, lo_from_bytea FROM PUBLIC;
    END IF;
END $$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO registration_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON users, limits TO registration_api;

COMMIT;
