-- The two tables. Applied once, to an empty database: psql -v ON_ERROR_STOP=1 -f sql/schema.sql
--
--                register            activate with the right pair
--   (no row) ------------> waiting ------------------------------> active
--                           ^   |                                    |
--             register again+---+ gone after a day                   + stays

BEGIN;

CREATE TABLE users (
    email          text         PRIMARY KEY,             -- ASCII, lower case
    password_hash  text         NOT NULL,                -- Argon2id with its salt and costs
    code_digest    bytea        NOT NULL,                -- HMAC-SHA256 of the newest code
    expires_at     timestamptz  NOT NULL,                -- end of that code
    attempts       smallint     NOT NULL DEFAULT 0,      -- codes tried since registered_at
    registered_at  timestamptz  NOT NULL DEFAULT now(),  -- the latest registration
    activated_at   timestamptz  ,                        -- NULL: waiting for its code

    -- One account per address, however it is typed; RFC 5321 4.5.3.1.3 gives the length.
    CONSTRAINT email_is_canonical CHECK (email = lower(email) AND length(email) <= 254),
    CONSTRAINT digest_is_sha256   CHECK (octet_length(code_digest) = 32),
    CONSTRAINT attempts_count_up  CHECK (attempts >= 0)
);

-- Finds the registrations that were never activated; active accounts are not in it.
CREATE INDEX users_waiting ON users (registered_at) WHERE activated_at IS NULL;

-- One row per limit and subject. Unlogged: it costs no write-ahead log, and a crash of the
-- server only forgives what was counted. Half-full pages let a count be updated in place.
CREATE UNLOGGED TABLE limits (
    name           text         NOT NULL,                -- 'register client', ...
    subject        text         NOT NULL,                -- an address or a client
    count          integer      NOT NULL,                -- requests in this window
    expires_at     timestamptz  NOT NULL,                -- end of the window
    PRIMARY KEY (name, subject)
) WITH (fillfactor = 50);

-- Finds the windows that are over.
CREATE INDEX limits_expired ON limits (expires_at);

-- Every request takes away a few rows whose time is over, more than it can add, so
-- nothing piles up and no cron is needed. It runs once a request, with the client's limit,
-- after the counting; rows that another request holds are skipped: it never waits.
-- By index whatever the statistics say: a session keeps the plans that it made while the
-- tables were small, and reading all of them later would take half a second a request.
CREATE FUNCTION tidy() RETURNS trigger LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_sort = off AS $$
BEGIN
    DELETE FROM limits
     WHERE (name, subject) IN (
           SELECT name, subject
             FROM limits
            WHERE expires_at < now()
            ORDER BY expires_at
            LIMIT 8
              FOR UPDATE SKIP LOCKED);

    DELETE FROM users
     WHERE email IN (
           SELECT email
             FROM users
            WHERE activated_at IS NULL
              AND registered_at < now() - interval '1 day'
            ORDER BY registered_at
            LIMIT 8
              FOR UPDATE SKIP LOCKED);
    RETURN NULL;
END $$;

CREATE TRIGGER tidy AFTER INSERT OR UPDATE ON limits
    FOR EACH ROW WHEN (NEW.name LIKE '% client') EXECUTE FUNCTION tidy();

COMMIT;
