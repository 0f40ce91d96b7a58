"""Rewrite the comments of tables and columns in the terms of the glossary.

Revision: 0017
Follows: 0016
Made: 2026-11-28

Databases from earlier versions of the migrations 0001 to 0014 have other comments. The migration
briefly takes a SHARE UPDATE EXCLUSIVE lock on each table, which does not block reads and writes.
Existing partitions of audit_logs keep their comments. Processes that run the code of revision 0016
work with the schema of revision 0017.

The downgrade keeps the new comments, because no code depends on comments.
"""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

# TABLES maps the name of each table to the comment of the table.
TABLES = {
    "trading_pauses": "The pause of trading that is in force; no row: trading is not paused",
    "api_key_limits": "Usage counts in the latest hour and day, for the rate limits of API keys",
    "audit_seals": "Seals: signed proofs of the contents of the audit trail",
    "api_key_usage": "Number of accepted uses per API key and hour",
}
# COLUMNS maps the name of each table to the comments of the table's columns.
COLUMNS = {
    "api_key_limits": {
        "api_key_id": "First key of the rotation chain (a key and its replacements)",
        "hour": "Start (UTC) of the latest hour in which the rotation chain was used",
        "hour_count": "Number of uses of the rotation chain in the hour in the column `hour`",
        "day": "Start (UTC) of the latest day on which the rotation chain was used",
        "day_count": "Number of uses of the rotation chain on the day in the column `day`",
    },
    "audit_logs": {
        "id": "UUIDv7 that the application generates; ids increase with creation time",
        "created_at": "Time of the insert, by the database's clock",
        "action": "Action of the event, as family:verb",
        "result": "Outcome of the action",
        "severity": "Severity; derived from action and result by default",
        "resource_type": "Type of the affected resource, e.g. order",
        "resource_id": "Identifier of the affected resource, e.g. an order id",
        "user_id": "User or service that performed the action",
        "user_type": "Type of the user, e.g. admin",
        "session_id": "Id of the user's session",
        "ip_address": "IP address of the client",
        "user_agent": "User-Agent of the client",
        "request_id": "Id of the request; all events of one request have the same id",
        "tiger_account_id": "Used or changed account; no foreign key, because accounts can be deleted",
        "api_key_id": "Used or changed API key; no foreign key, because API keys can be deleted",
        "details": "Other details of the event",
        "old_values": "Values of the changed fields before the change, with masked secrets",
        "new_values": "Values of the changed fields after the change, with masked secrets",
        "duration_ms": "Duration of the action in milliseconds",
        "position": "Position in the order of the inserts; rolled-back transactions leave gaps",
    },
    "audit_seals": {
        "number": "Consecutive number of the seal, starting at 1",
        "statement": "Signed JSON: positions of the sealed events, root of the Merkle tree of the events, digest of the previous seal",
        "signature": "Ed25519 signature of the bytes in the column `statement`",
        "digests": "SHA-256 digests of the sealed events, in the order of the event positions",
    },
    "tiger_accounts": {
        "id": "UUIDv7 that the application generates; ids increase with creation time",
        "created_at": "Creation time, by the database's clock",
        "updated_at": "Time of the last change, by the database's clock",
        "account_name": "Display name of the account",
        "account_number": "Account number at Tiger",
        "account_type": "Account type; derived from the account number by default",
        "status": "Status of the account; only active accounts serve requests",
        "tiger_id": "Developer id at Tiger, encrypted; several accounts can share an id",
        "tiger_id_fingerprint": "Blind index of tiger_id: keyed hash (HMAC-SHA256) for equality search",
        "private_key": "RSA private key (base64 DER), encrypted; null if the account is closed",
        "private_key_format": "Format of the private key: one of PK1 (PKCS#1), PK8 (PKCS#8) and unknown",
        "secret_key": "Secret key of institutional traders, encrypted",
        "license": "License of the account at Tiger, such as TBHK",
        "environment": "Environment at Tiger; only account_type says whether trades are on paper",
        "server_url": "URL of Tiger's gateway; null: default URL of the environment",
        "access_token": "Access token, encrypted",
        "token_expires_at": "Expiry of the access token",
        "token_refresh_at": "Time at which the access token should be refreshed",
        "is_default_trading": "Default account for trading: true for at most one account",
        "is_default_data": "Default account for market data: true for at most one account",
        "market_permissions": "Markets in which the account may trade",
        "quote_permissions": "Market data permissions: name and expire_at (epoch ms; -1: no expiry)",
        "client_options": "Other settings of Tiger's configuration file, such as timeout and language",
        "auto_suspended": "Whether the account is suspended because of too many errors, not by a person",
        "error_count": "Number of consecutive errors since the last success",
        "last_error_at": "Time of the last error",
    },
    "api_keys": {
        "id": "UUIDv7 that the application generates; ids increase with creation time",
        "created_at": "Creation time, by the database's clock",
        "updated_at": "Time of the last change, by the database's clock",
        "name": "Display name of the key",
        "key_prefix": "Public part of the key, by which the key is found",
        "key_hash": "passlib hash of the pepper and the secret part of the key",
        "pepper_id": "Id of the pepper in key_hash; null: no pepper",
        "root_id": "First key of the rotation chain (may be deleted); null: this key is first",
        "successor_id": "Key that replaced this key in a rotation; that key may be deleted",
        "status": "Status of the key; only active keys are accepted",
        "scopes": "Scopes (permissions) of the key",
        "tiger_account_id": "The only account that the key can access; null: all accounts",
        "expires_at": "Expiry of the key; from this time on, the key is refused",
        "last_used_at": "Time of the last accepted use of the key",
        "usage_count": "Number of accepted uses of the key",
        "rate_limit_per_hour": "Maximum number of uses per clock hour (UTC); null: no limit",
        "rate_limit_per_day": "Maximum number of uses per calendar day (UTC); null: no limit",
        "allowed_ips": "Networks from which the key is accepted; empty: all networks",
        "allowed_user_agents": "Patterns of accepted User-Agents (* is a wildcard); empty: all User-Agents",
        "created_by": "User or service that created the key",
        "revoked_at": "Time of the revocation",
        "revocation_reason": "Reason for the revocation",
    },
    "token_statuses": {
        "id": "UUIDv7 that the application generates; ids increase with creation time",
        "created_at": "Creation time, by the database's clock",
        "updated_at": "Time of the last change, by the database's clock",
        "tiger_account_id": "Account whose token is refreshed",
        "status": "Status: pending and in_progress are open, all other statuses are final",
        "trigger": "Reason for the refresh",
        "old_token_expires_at": "Expiry of the replaced access token",
        "new_token_expires_at": "Expiry of the new access token",
        "old_token_hash": "SHA-256 of the replaced access token",
        "new_token_hash": "SHA-256 of the new access token",
        "scheduled_at": "Earliest time at which a worker can claim the refresh",
        "started_at": "Start of the last attempt",
        "completed_at": "Time at which the refresh got a final status",
        "duration_ms": "Duration of the last attempt, in ms",
        "next_refresh_at": "Time at which the new access token should be refreshed",
        "retry_count": "Number of failed attempts",
        "max_retries": "Maximum number of failed attempts",
        "api_response_code": "Code in Tiger's last response",
        "api_response_time_ms": "Response time of the last request to Tiger, in ms",
        "details": "Other details of the refresh",
        "environment": "Environment at Tiger",
        "worker": "Name of the worker that claimed the refresh",
        "lease_expires_at": "Expiry of the worker's lease, unless the worker renews the lease",
        "fencing_token": "Number of the latest claim; earlier claims of the refresh are void",
    },
    "trading_pauses": {
        "singleton": "Primary key whose only value is true, so that there is at most one pause",
    },
    "api_key_usage": {
        "api_key_id": "API key",
        "hour": "Start (UTC) of an hour in which the API key was used",
        "count": "Number of accepted uses of the API key in the hour",
    },
}


def upgrade() -> None:
    for table, comment in TABLES.items():
        op.create_table_comment(table, comment)
    for table, columns in COLUMNS.items():
        for column, comment in columns.items():
            op.alter_column(table, column, comment=comment)


def downgrade() -> None:
    pass
