"""Rewrite the comments of tables and columns in standard terms.

Revision: 0010
Follows: 0009
Made: 2026-11-28

The migration briefly takes a SHARE UPDATE EXCLUSIVE lock on each table, which does not block
reads and writes. Existing partitions of audit_logs keep the old comments. Code of revision 0009
works with the schema of revision 0010.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# TABLES maps the name of each table to the table's old and new comment.
TABLES = {
    "api_key_limits": (
        "Uses of each line of limited API keys in its latest hour and day",
        "Usage counts in the latest hour and day, for the rate limits of API keys",
    ),
    "audit_seals": (
        "Proof of what the audit trail held",
        "Seals: signed proofs of the contents of the audit trail",
    ),
    "api_key_usage": (
        "Accepted uses of each API key by the hour",
        "Number of accepted uses per API key and hour",
    ),
}
# COLUMNS maps the name of each table to the old and new comments of the table's columns.
COLUMNS = {
    "api_key_limits": {
        "api_key_id": (
            "First key of the line",
            "First key of the rotation chain (a key and its replacements)",
        ),
        "hour_count": ("Uses in this hour", "Number of uses of the rotation chain in this hour"),
        "day_count": ("Uses in this day", "Number of uses of the rotation chain on this day"),
    },
    "audit_logs": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 that the application generates; ids increase with creation time",
        ),
        "created_at": (
            "When it was written, by the database's clock",
            "Time of the insert, by the database's clock",
        ),
        "action": ("What was done", "Action of the event, as family:verb"),
        "result": ("How it ended", "Outcome of the action"),
        "severity": (
            "Follows from action and result where it is not given",
            "Severity; derived from action and result by default",
        ),
        "resource_type": (
            "Kind of thing it was done to",
            "Type of the affected resource, e.g. order",
        ),
        "resource_id": (
            "Which one, e.g. an order id",
            "Identifier of the affected resource, e.g. an order id",
        ),
        "user_id": ("Who did it", "User or service that performed the action"),
        "user_type": ("Kind of user, e.g. admin", "Type of the user, e.g. admin"),
        "session_id": ("Session it was done in", "Id of the user's session"),
        "ip_address": ("Address it came from", "IP address of the client"),
        "user_agent": ("Client it came from", "User-Agent of the client"),
        "request_id": (
            "Ties the events of a request",
            "Id of the request; all events of one request have the same id",
        ),
        "tiger_account_id": (
            "Account concerned; no foreign key: it may be gone",
            "Account that was used or changed; no foreign key: accounts can be deleted",
        ),
        "api_key_id": (
            "API key used; no foreign key: it may be gone",
            "API key that was used or changed; no foreign key: API keys can be deleted",
        ),
        "details": ("Whatever else is worth knowing", "Other details of the event"),
        "old_values": (
            "Values before a change, secrets masked",
            "Changed values before the change, with masked secrets",
        ),
        "new_values": (
            "Values after a change, secrets masked",
            "Changed values after the change, with masked secrets",
        ),
        "duration_ms": (
            "How long it took, in milliseconds",
            "Duration of the action in milliseconds",
        ),
        "position": (
            "Place in the order of writing; what was rolled back leaves gaps",
            "Position in the order of the inserts; rolled-back transactions leave gaps",
        ),
    },
    "audit_seals": {
        "number": ("Counts from 1, without gaps", "Consecutive number of the seal, starting at 1"),
        "statement": (
            "What is signed, as JSON: places of the events, root of their Merkle tree, digest of the previous statement",
            "Signed JSON: positions of the sealed events, root of the Merkle tree of the events, digest of the previous statement",
        ),
        "digests": (
            "SHA-256 of each event, in the order of their places",
            "SHA-256 digests of the sealed events, in the order of the event positions",
        ),
    },
    "tiger_accounts": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 that the application generates; ids increase with creation time",
        ),
        "created_at": (
            "When the row was made, by the database's clock",
            "Creation time, by the database's clock",
        ),
        "updated_at": (
            "When the row was last changed, by the database's clock",
            "Time of the last change, by the database's clock",
        ),
        "account_name": ("What people call the account", "Display name of the account"),
        "account_number": ("Tiger's number of the account", "Account number at Tiger"),
        "account_type": (
            "Follows from the account number where it is not given",
            "Account type; derived from the account number by default",
        ),
        "status": (
            "Only an active account serves requests",
            "Status of the account; only active accounts serve requests",
        ),
        "tiger_id": (
            "Tiger's id of the developer, encrypted; one may own several accounts",
            "Developer id at Tiger, encrypted; several accounts can share an id",
        ),
        "tiger_id_fingerprint": (
            "HMAC-SHA256 of tiger_id under a derived key, to search by",
            "Blind index of tiger_id: keyed hash (HMAC-SHA256) for equality search",
        ),
        "private_key": (
            "RSA private key, base64 DER, encrypted; a closed account has none",
            "RSA private key (base64 DER), encrypted; null if the account is closed",
        ),
        "private_key_format": (
            "PK1 (PKCS#1), PK8 (PKCS#8) or unknown",
            "Format of the private key: PK1 (PKCS#1), PK8 (PKCS#8) or unknown",
        ),
        "secret_key": (
            "Institutional trader's key, encrypted",
            "Secret key of institutional traders, encrypted",
        ),
        "license": ("Tiger's licence of the account", "License of the account at Tiger"),
        "environment": (
            "Tiger's environment; paper trading is chosen by the account number instead",
            "Environment at Tiger; paper trading depends on account_type instead",
        ),
        "server_url": (
            "Gateway, if not the default one",
            "URL of Tiger's gateway; null: default URL of the environment",
        ),
        "access_token": ("Current access token, encrypted", "Access token, encrypted"),
        "token_expires_at": ("When the access token expires", "Expiry of the access token"),
        "token_refresh_at": (
            "From when on the access token should be refreshed",
            "Time at which the access token should be refreshed",
        ),
        "is_default_trading": (
            "Serves trades that name no account; at most one",
            "Whether this account is the default for trades; at most one is",
        ),
        "is_default_data": (
            "Serves data that names no account; at most one",
            "Whether this account is the default for market data; at most one is",
        ),
        "market_permissions": (
            "Markets the account may trade in",
            "Markets in which the account may trade",
        ),
        "quote_permissions": (
            "Tiger's quote permissions: name and expire_at (epoch ms, -1 permanent)",
            "Quote permissions at Tiger: name and expire_at (epoch ms; -1: no expiry)",
        ),
        "client_options": (
            "What else Tiger's configuration file says: timeout, language and the like",
            "Other settings of Tiger's configuration file, such as timeout and language",
        ),
        "auto_suspended": (
            "Suspended after too many errors, not by a person; ends with the suspension",
            "Whether the account is suspended because of too many errors, not by a person",
        ),
        "error_count": (
            "Consecutive errors since the last success",
            "Number of consecutive errors since the last success",
        ),
        "last_error_at": ("When the last error happened", "Time of the last error"),
    },
    "api_keys": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 that the application generates; ids increase with creation time",
        ),
        "created_at": (
            "When the row was made, by the database's clock",
            "Creation time, by the database's clock",
        ),
        "updated_at": (
            "When the row was last changed, by the database's clock",
            "Time of the last change, by the database's clock",
        ),
        "name": ("What people call the key", "Display name of the key"),
        "key_prefix": (
            "The public part of the key, by which it is found",
            "Public part of the key, by which the key is found",
        ),
        "key_hash": (
            "passlib hash of the secret part of the key, under the pepper",
            "passlib hash of the pepper and the secret part of the key",
        ),
        "pepper_id": (
            "Id of the pepper in the hash; none: a hash of the secret itself",
            "Id of the pepper in key_hash; null: no pepper",
        ),
        "root_id": (
            "First key of the line that rotations made, which may be gone; none: this one",
            "First key of the rotation chain, possibly deleted; null: this key",
        ),
        "successor_id": (
            "Key that it was rotated to, which may be gone",
            "Key that replaced this key in a rotation, possibly deleted",
        ),
        "status": (
            "Only an active key is accepted",
            "Status of the key; only active keys are accepted",
        ),
        "scopes": ("What the key may do", "Scopes (permissions) of the key"),
        "tiger_account_id": (
            "The only account it may act on; none: every account",
            "The only account that the key can access; null: all accounts",
        ),
        "expires_at": (
            "From when on it is refused",
            "Expiry of the key, from which on the key is refused",
        ),
        "last_used_at": ("When it was last accepted", "Time of the last accepted use of the key"),
        "usage_count": ("How often it was accepted", "Number of accepted uses of the key"),
        "rate_limit_per_hour": (
            "Uses in one clock hour (UTC)",
            "Maximum number of uses per clock hour (UTC); null: no limit",
        ),
        "rate_limit_per_day": (
            "Uses in one calendar day (UTC)",
            "Maximum number of uses per calendar day (UTC); null: no limit",
        ),
        "allowed_ips": (
            "Networks it may be used from; none: any",
            "Networks from which the key is accepted; empty: all networks",
        ),
        "allowed_user_agents": (
            "Clients that may use it, * for any run of characters; none: any",
            "Patterns of accepted User-Agents (* is a wildcard); empty: all User-Agents",
        ),
        "created_by": ("Who created it", "User or service that created the key"),
        "revoked_at": ("When it was revoked", "Time of the revocation"),
        "revocation_reason": ("Why it was revoked", "Reason for the revocation"),
    },
    "token_statuses": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 that the application generates; ids increase with creation time",
        ),
        "created_at": (
            "When the row was made, by the database's clock",
            "Creation time, by the database's clock",
        ),
        "updated_at": (
            "When the row was last changed, by the database's clock",
            "Time of the last change, by the database's clock",
        ),
        "tiger_account_id": (
            "The account whose token is refreshed",
            "Account whose token is refreshed",
        ),
        "status": (
            "Pending and in progress are open; the others are final",
            "Status: pending and in_progress are open, all other statuses are final",
        ),
        "trigger": ("Why it was asked for", "Reason for the refresh"),
        "old_token_expires_at": (
            "Expiry of the token it replaces",
            "Expiry of the replaced access token",
        ),
        "new_token_expires_at": (
            "Expiry of the token it brought",
            "Expiry of the new access token",
        ),
        "old_token_hash": (
            "SHA-256 of the token it replaces",
            "SHA-256 of the replaced access token",
        ),
        "new_token_hash": ("SHA-256 of the token it brought", "SHA-256 of the new access token"),
        "scheduled_at": (
            "From when on it may be claimed",
            "Earliest time at which a worker can claim the refresh",
        ),
        "started_at": ("When the last attempt started", "Start of the last attempt"),
        "completed_at": ("When it ended for good", "Time at which the refresh got a final status"),
        "duration_ms": ("Length of the last attempt, in ms", "Duration of the last attempt, in ms"),
        "next_refresh_at": (
            "When the new token should be refreshed",
            "Time at which the new access token should be refreshed",
        ),
        "retry_count": ("How many attempts failed", "Number of failed attempts"),
        "max_retries": (
            "After how many failed attempts it is given up",
            "Maximum number of failed attempts",
        ),
        "api_response_code": ("Tiger's code in the last answer", "Code in Tiger's last response"),
        "api_response_time_ms": (
            "How long Tiger took to answer, in ms",
            "Response time of the last request to Tiger, in ms",
        ),
        "details": ("Whatever else is worth knowing", "Other details of the refresh"),
        "environment": ("Tiger's environment asked", "Environment at Tiger"),
        "worker": ("Who holds the claim", "Name of the worker that claimed the refresh"),
        "lease_expires_at": (
            "When the claim ends unless it is renewed",
            "Expiry of the worker's lease, unless the worker renews the lease",
        ),
        "fencing_token": (
            "Number of the claim: an older one is void",
            "Number of the latest claim; earlier claims of the refresh are void",
        ),
    },
    "api_key_usage": {
        "api_key_id": ("The key", "API key"),
        "count": (
            "How often the key was accepted in it",
            "Number of accepted uses of the key in the hour",
        ),
    },
}


def upgrade() -> None:
    for table, (old, new) in TABLES.items():
        op.create_table_comment(table, new, existing_comment=old)
    for table, columns in COLUMNS.items():
        for column, (old, new) in columns.items():
            op.alter_column(table, column, comment=new, existing_comment=old)


def downgrade() -> None:
    for table, (old, new) in TABLES.items():
        op.create_table_comment(table, old, existing_comment=new)
    for table, columns in COLUMNS.items():
        for column, (old, new) in columns.items():
            op.alter_column(table, column, comment=old, existing_comment=new)
