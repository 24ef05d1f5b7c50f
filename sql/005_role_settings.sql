-- For a database that was made when service.py still set these for each of its sessions.

ALTER ROLE registration_api SET statement_timeout = '1900ms';
ALTER ROLE registration_api SET idle_in_transaction_session_timeout = '3s';
