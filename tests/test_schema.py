"""The tables, and the scripts that bring older ones up to date."""

import os
from contextlib import closing

import psycopg2
import pytest
from servers.process import TOP

TABLES = """
    CREATE TABLE users (
        email          text         PRIMARY KEY,
        password_hash  text         NOT NULL,
        code_digest    bytea        NOT NULL,
        expires_at     timestamptz  NOT NULL,
        attempts       smallint     NOT NULL DEFAULT 0,
        registered_at  timestamptz  NOT NULL DEFAULT now(),
        activated_at   timestamptz  ,
        CONSTRAINT email_is_canonical
             CHECK (email = lower(email) AND length(email) <= 254),
        CONSTRAINT digest_is_sha256 CHECK (octet_length(code_digest) = 32),
        CONSTRAINT attempts_count_up CHECK (attempts >= 0)
    );
    CREATE INDEX users_waiting ON users (registered_at) WHERE activated_at IS NULL;
    CREATE UNLOGGED TABLE limits (
        name           text         NOT NULL,
        subject        text         NOT NULL,
        count          integer      NOT NULL,
        expires_at     timestamptz  NOT NULL,
        PRIMARY KEY (name, subject)
    ) WITH (fillfactor = 50);
    CREATE INDEX limits_expired ON limits (expires_at);
    """
TRIGGER = """
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
    """

SCHEMA = (TOP / "sql/schema.sql").read_text()
LATER = {path.name[:3]: path.read_text()
         for path in sorted((TOP / "sql").glob("[0-9]*.sql"))}

# What schema.sql contained in earlier versions.
VERSIONS = {"1": TABLES + TRIGGER, "2": TABLES + LATER["003"]}
SINCE_2 = [LATER["004"], LATER["005"]]

CONTENTS = """
    SELECT 'column', table_name, concat_ws(' ', ordinal_position, column_name,
                                           data_type, collation_name, column_default,
                                           is_nullable)
      FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL
    SELECT 'constraint', conrelid::regclass::text, pg_get_constraintdef(oid)
      FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'index', tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT 'table', relname, concat_ws(' ', relpersistence, reloptions)
      FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL
    SELECT 'function', proname, pg_get_functiondef(oid)
      FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'trigger', tgrelid::regclass::text, pg_get_triggerdef(oid)
      FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT 'privilege', relname, relacl::text
      FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL
    SELECT 'privilege', nspname, nspacl::text FROM pg_namespace WHERE nspname = 'public'
    UNION ALL
    SELECT 'privilege', proname, proacl::text
      FROM pg_proc WHERE proname IN ('lo_create', 'lo_creat', 'lo_from_bytea')
    UNION ALL
    SELECT 'privilege', datname, datacl::text
      FROM pg_database WHERE datname = current_database()
    UNION ALL
    SELECT 'setting', rolname, rolconfig::text
      FROM pg_roles WHERE rolname = 'registration_api'
     ORDER BY 1, 2, 3"""


@pytest.fixture
def contents_after(servers, database):
    """Runs scripts in an empty database as its owner, and lists what is in it then."""
    name = f"empty_{os.getpid()}"

    def run_them(*scripts, owner="registration", prepare="SELECT"):
        database(f"CREATE DATABASE {name} OWNER {owner}")
        url = servers.postgres.url_of(name)
        with closing(psycopg2.connect(url)) as session:
            session.autocommit = True
            session.cursor().execute(prepare)
        url = servers.postgres.url_of(name, owner)
        with closing(psycopg2.connect(url)) as session:
            session.autocommit = True
            cursor = session.cursor()
            for script in scripts:
                cursor.execute(script)
            cursor.execute(CONTENTS)
            contents = cursor.fetchall()
        database(f"DROP DATABASE {name}")
        return contents

    yield run_them
    database(f"DROP DATABASE IF EXISTS {name}")


def test_its_schema_has_no_trigger_and_no_function(contents_after):
    contents = contents_after(SCHEMA)

    kinds = {kind for kind, *_ in contents}
    tables = {name for kind, name, _ in contents if kind == "table"}
    assert kinds == {"column", "constraint", "index", "table", "privilege",
                     "setting"}
    assert tables == {"users", "limits"}


NO_SETTINGS = "ALTER ROLE registration_api RESET ALL"     # all databases have this role


@pytest.mark.parametrize("version, scripts", [
    ("1", [*LATER.values()]), ("2", SINCE_2), ("2", [*LATER.values()])])
def test_its_later_scripts_turn_an_old_schema_into_the_new_one(
        contents_after, version, scripts):
    old = contents_after(VERSIONS[version], prepare=NO_SETTINGS)

    upgraded = contents_after(VERSIONS[version], *scripts)
    again = contents_after(VERSIONS[version], *scripts, *scripts, prepare=NO_SETTINGS)

    assert upgraded == again == contents_after(SCHEMA, prepare=NO_SETTINGS)
    assert upgraded != old


def test_its_later_scripts_can_be_applied_to_the_new_schema(contents_after):
    assert contents_after(SCHEMA, *LATER.values()) == contents_after(SCHEMA)


@pytest.fixture
def owner(database):
    """A role that is no superuser."""
    name = f"owner_{os.getpid()}"
    database(f"CREATE ROLE {name} LOGIN CREATEROLE")
    yield name
    database(f"DROP ROLE {name}")


REVOKED = "REVOKE EXECUTE ON FUNCTION lo_create, lo_creat, lo_from_bytea FROM PUBLIC"


@pytest.mark.parametrize("prepare", ["SELECT", REVOKED])
def test_its_scripts_need_no_superuser(owner, contents_after, prepare):
    scripts = [*LATER.values()] * 2

    contents = contents_after(SCHEMA, *scripts, owner=owner, prepare=prepare)

    assert ("table", "users", "p") in contents


# -- The role of the API ---------------------------------------------------------------


@pytest.fixture
def as_api(servers, service):
    """Executes a statement as the role that the API connects as."""
    with closing(psycopg2.connect(servers.postgres.api_url)) as session:
        session.autocommit = True
        yield session.cursor().execute


@pytest.mark.parametrize("statement", [
    "CREATE TABLE mine ()", "CREATE TEMPORARY TABLE mine ()", "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE SQL AS 'SELECT 1'",
    "TRUNCATE users", "DROP TABLE limits", "ALTER TABLE users ADD mine int",
    "CREATE TRIGGER mine AFTER INSERT ON users EXECUTE FUNCTION mine()",
    "CREATE ROLE mine", "CREATE DATABASE mine",
    "SELECT lo_create(0)", "SELECT lo_creat(-1)", "SELECT lo_from_bytea(0, '')",
    "SET ROLE registration", "ALTER ROLE registration PASSWORD 'mine'",
    "SELECT rolpassword FROM pg_authid", "SELECT pg_read_file('PG_VERSION')",
    "COPY users TO PROGRAM 'true'", "SELECT pg_reload_conf()"])
def test_its_role_can_do_nothing_but_read_and_write_two_tables(as_api, statement):
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        as_api(statement)


def test_its_role_is_what_the_api_connects_as(service, database):
    roles = database("""
        SELECT DISTINCT usename FROM pg_stat_activity
         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()""")

    assert ("registration_api",) in roles
