-- For Docker Compose, which applies it after schema.sql: the API's role gets the password.
-- The superuser, to whom the image gave it, has none from then on. So nobody becomes superuser
-- over the network, only through the socket in the container. The API's role gets into
-- neither of the other databases: every role may do some things there.

\getenv password POSTGRES_PASSWORD
ALTER ROLE registration_api PASSWORD :'password';
ALTER ROLE CURRENT_USER PASSWORD NULL;
REVOKE CONNECT ON DATABASE postgres, template1 FROM PUBLIC;
