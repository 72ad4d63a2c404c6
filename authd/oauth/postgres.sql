-- name: insert_client
INSERT INTO clients (client_id, name, secret_hash) VALUES ($1, $2, $3);

-- name: find_client_secret_hash
SELECT secret_hash FROM clients WHERE client_id = $1;

-- name: list_clients
SELECT client_id, name, created_at FROM clients ORDER BY created_at;

-- name: delete_client
DELETE FROM clients WHERE client_id = $1 RETURNING client_id;
