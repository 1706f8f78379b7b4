-- Two roles, each with a database of its own. Runs at every start, so that a changed password is set.
\getenv prefect PREFECT_DB_PASSWORD
\getenv mlflow MLFLOW_DB_PASSWORD
SET password_encryption = 'scram-sha-256';
SET log_min_error_statement = panic;  -- an error must not log a statement with a password
SELECT format('CREATE ROLE %I LOGIN', name) FROM unnest(ARRAY['prefect', 'mlflow']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE prefect PASSWORD :'prefect';
ALTER ROLE mlflow PASSWORD :'mlflow';
SELECT format('CREATE DATABASE %I OWNER %I', name, name) FROM unnest(ARRAY['prefect', 'mlflow']) AS name
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec
REVOKE CONNECT ON DATABASE prefect, mlflow FROM PUBLIC;
\connect prefect
CREATE EXTENSION IF NOT EXISTS pg_trgm;  -- Prefect's migrations use it
