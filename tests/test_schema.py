"""The tables, the scripts that bring older ones up to date, and the block list."""

import os
from contextlib import closing

import psycopg2
import pytest
from servers.process import TOP

# What the first version had.
FIRST = """
    CREATE TABLE users (
        email text PRIMARY KEY, password_hash text NOT NULL, code_digest bytea NOT NULL,
        expires_at timestamptz NOT NULL, attempts smallint NOT NULL DEFAULT 0,
        registered_at timestamptz NOT NULL DEFAULT now(), activated_at timestamptz,
        CONSTRAINT email_is_canonical
             CHECK (email = lower(email) AND length(email) <= 254),
        CONSTRAINT digest_is_sha256 CHECK (octet_length(code_digest) = 32),
        CONSTRAINT attempts_count_up CHECK (attempts >= 0));
    CREATE INDEX users_waiting ON users (registered_at) WHERE activated_at IS NULL;
    CREATE UNLOGGED TABLE limits (
        name text NOT NULL, subject text NOT NULL, count integer NOT NULL,
        expires_at timestamptz NOT NULL, PRIMARY KEY (name, subject)
    ) WITH (fillfactor = 50);
    CREATE INDEX limits_expired ON limits (expires_at);
    CREATE FUNCTION tidy() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER tidy AFTER INSERT OR UPDATE ON limits
        FOR EACH ROW WHEN (NEW.name LIKE '% client') EXECUTE FUNCTION tidy();
    """

SCHEMA = (TOP / "sql/schema.sql").read_text()
LATER = [path.read_text() for path in sorted((TOP / "sql").glob("[0-9]*.sql"))]

CONTENTS = """
    SELECT 'column', table_name, concat_ws(' ', ordinal_position, column_name,
                             data_type, collation_name, column_default, is_nullable)
      FROM information_schema.columns WHERE table_schema = 'public' UNION ALL
    SELECT 'constraint', conrelid::regclass::text, pg_get_constraintdef(oid)
      FROM pg_constraint WHERE connamespace = 'public'::regnamespace UNION ALL
    SELECT 'index', tablename, indexdef
      FROM pg_indexes WHERE schemaname = 'public' UNION ALL
    SELECT 'table', relname, concat_ws(' ', relpersistence, reloptions, relacl)
      FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
     UNION ALL
    SELECT 'function', proname, pg_get_functiondef(oid)
      FROM pg_proc WHERE pronamespace = 'public'::regnamespace UNION ALL
    SELECT 'trigger', tgrelid::regclass::text, pg_get_triggerdef(oid)
      FROM pg_trigger WHERE NOT tgisinternal UNION ALL
    SELECT 'privilege', nspname, nspacl::text
      FROM pg_namespace WHERE nspname = 'public' UNION ALL
    SELECT 'privilege', proname, proacl::text
      FROM pg_proc WHERE proname IN ('lo_create', 'lo_creat', 'lo_from_bytea') UNION ALL
    SELECT 'privilege', datname, datacl::text
      FROM pg_database WHERE datname = current_database() UNION ALL
    SELECT 'setting', rolname, rolconfig::text
      FROM pg_roles WHERE rolname = 'registration_api' ORDER BY 1, 2, 3"""


@pytest.fixture
def contents_after(servers, database):
    """Runs scripts in an empty database as its owner; after each list of them, lists
    what is in it."""
    name = f"empty_{os.getpid()}"

    def run_them(*lists, owner="registration"):
        database(f"CREATE DATABASE {name} OWNER {owner}")
        found = []
        with closing(psycopg2.connect(servers.postgres.url_of(name, owner))) as session:
            session.autocommit = True
            cursor = session.cursor()
            for scripts in lists:
                for script in scripts:
                    cursor.execute(script)
                cursor.execute(CONTENTS)
                found.append(cursor.fetchall())
        database(f"DROP DATABASE {name}")
        return found

    yield run_them
    database(f"DROP DATABASE IF EXISTS {name}")


# All databases have this role, so it may have the settings already.
NO_SETTINGS = "ALTER ROLE registration_api RESET ALL"


@pytest.mark.parametrize("old", [FIRST, SCHEMA], ids=["the first", "this one"])
def test_its_later_scripts_turn_a_schema_into_the_new_one_however_often_they_run(
        contents_after, old):
    upgraded, again = contents_after([NO_SETTINGS, old, *LATER], LATER)

    [new] = contents_after([NO_SETTINGS, SCHEMA])
    assert upgraded == again == new


def test_its_scripts_need_no_superuser(contents_after, database):
    owner = f"owner_{os.getpid()}"
    database(f"CREATE ROLE {owner} LOGIN CREATEROLE")
    # What PostgreSQL 16 and later give to the one who makes the API's role.
    database(f"GRANT registration_api TO {owner} WITH ADMIN OPTION")

    [contents] = contents_after([SCHEMA, *LATER], owner=owner)

    database(f"DROP ROLE {owner}")
    assert {"users", "limits"} <= {name for kind, name, _ in contents}


# -- The role of the API ---------------------------------------------------------------


@pytest.mark.parametrize("statement", [
    "CREATE TABLE mine ()", "CREATE TEMPORARY TABLE mine ()", "CREATE SCHEMA mine",
    "TRUNCATE users", "DROP TABLE limits", "CREATE ROLE mine", "CREATE DATABASE mine",
    "SELECT lo_create(0)", "SELECT lo_creat(-1)", "SELECT lo_from_bytea(0, '')",
    "SET ROLE registration", "SELECT rolpassword FROM pg_authid",
    "SELECT pg_read_file('PG_VERSION')", "COPY users TO PROGRAM 'true'"])
def test_the_role_of_the_api_can_only_read_and_write_two_tables(servers, statement):
    with closing(psycopg2.connect(servers.postgres.api_url)) as session, \
            pytest.raises(psycopg2.errors.InsufficientPrivilege):
        session.autocommit = True
        session.cursor().execute(statement)


# -- The block list of passwords -------------------------------------------------------


def test_its_common_passwords_are_such_as_would_be_accepted_in_lower_case():
    listed = (TOP / "common-passwords.txt").read_text().splitlines()

    assert len(listed) > 8000
    assert listed == sorted(set(listed))
    assert [each for each in listed if not 8 <= len(each) <= 128
            or not each.isascii() or not each.isprintable() or each.lower() != each
            ] == []


def test_its_licence_says_whose_list_of_common_passwords_it_is():
    licence = (TOP / "LICENSE").read_text()

    assert "common-passwords.txt is taken from Django" in licence
    assert "(BSD-3-Clause)" in licence
    assert "Copyright (c) Django Software Foundation" in licence
