"""Comments of columns in standard terms.

Revision: 0010
Follows: 0009
Made: 2026-11-28

Takes a SHARE UPDATE EXCLUSIVE lock on each table for a moment; reads and writes go on. Partitions of
audit_logs that exist keep their comments. Code of revision 0009 is not affected.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# The comment before and after, by table.
TABLES = {
    "api_key_limits": (
        "Uses of each line of limited API keys in its latest hour and day",
        "Counts for the rate limits of API keys, in the latest hour and day",
    ),
    "audit_seals": (
        "Proof of what the audit trail held",
        "Seals: signed proofs of the contents of the audit trail",
    ),
}
# The comment before and after, by table and column.
COLUMNS = {
    "api_key_limits": {
        "api_key_id": ("First key of the line", "First key of the line (a key and its successors)"),
    },
    "audit_logs": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 made by the application, ordered by creation time",
        ),
        "created_at": (
            "When it was written, by the database's clock",
            "Time of the insert, by the database's clock",
        ),
        "action": ("What was done", "Action, as family:verb"),
        "result": ("How it ended", "Outcome of the action"),
        "severity": (
            "Follows from action and result where it is not given",
            "Severity; by default, it follows from action and result",
        ),
        "resource_type": ("Kind of thing it was done to", "Type of the resource, e.g. order"),
        "resource_id": (
            "Which one, e.g. an order id",
            "Identifier of the resource, e.g. an order id",
        ),
        "user_id": ("Who did it", "User or service that acted"),
        "user_type": ("Kind of user, e.g. admin", "Type of the user, e.g. admin"),
        "session_id": ("Session it was done in", "Session of the user"),
        "ip_address": ("Address it came from", "IP address of the client"),
        "user_agent": ("Client it came from", "User-Agent of the client"),
        "request_id": (
            "Ties the events of a request",
            "Identifier that the events of a request share",
        ),
        "tiger_account_id": (
            "Account concerned; no foreign key: it may be gone",
            "Account concerned; no foreign key, because accounts can be deleted",
        ),
        "api_key_id": (
            "API key used; no foreign key: it may be gone",
            "API key used; no foreign key, because keys can be deleted",
        ),
        "details": ("Whatever else is worth knowing", "Other details of the event"),
        "old_values": (
            "Values before a change, secrets masked",
            "Values before a change, with masked secrets",
        ),
        "new_values": (
            "Values after a change, secrets masked",
            "Values after a change, with masked secrets",
        ),
        "duration_ms": ("How long it took, in milliseconds", "Duration in milliseconds"),
        "position": (
            "Place in the order of writing; what was rolled back leaves gaps",
            "Order of the inserts; rolled-back transactions leave gaps",
        ),
    },
    "audit_seals": {
        "number": ("Counts from 1, without gaps", "Number of the seal, from 1, without gaps"),
        "statement": (
            "What is signed, as JSON: places of the events, root of their Merkle tree, digest of the previous statement",
            "Signed JSON: positions of the events, root of their Merkle tree, digest of the previous statement",
        ),
        "digests": (
            "SHA-256 of each event, in the order of their places",
            "SHA-256 of each event, in the order of their positions",
        ),
    },
    "tiger_accounts": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 made by the application, ordered by creation time",
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
            "Type; by default, it follows from the account number",
        ),
        "tiger_id": (
            "Tiger's id of the developer, encrypted; one may own several accounts",
            "Developer id at Tiger, encrypted; several accounts can share it",
        ),
        "tiger_id_fingerprint": (
            "HMAC-SHA256 of tiger_id under a derived key, to search by",
            "Blind index of tiger_id: HMAC-SHA256 under a derived key",
        ),
        "private_key": (
            "RSA private key, base64 DER, encrypted; a closed account has none",
            "RSA private key (base64 DER), encrypted; null if the account is closed",
        ),
        "secret_key": (
            "Institutional trader's key, encrypted",
            "Secret key of institutional traders, encrypted",
        ),
        "license": ("Tiger's licence of the account", "License of the account at Tiger"),
        "environment": (
            "Tiger's environment; paper trading is chosen by the account number instead",
            "Environment at Tiger; the account number determines paper trading",
        ),
        "server_url": (
            "Gateway, if not the default one",
            "URL of the gateway, if it is not the default",
        ),
        "access_token": ("Current access token, encrypted", "Access token, encrypted"),
        "token_expires_at": ("When the access token expires", "Expiry of the access token"),
        "token_refresh_at": (
            "From when on the access token should be refreshed",
            "Time at which the access token should be refreshed",
        ),
        "is_default_trading": (
            "Serves trades that name no account; at most one",
            "Default account for trades; at most one",
        ),
        "is_default_data": (
            "Serves data that names no account; at most one",
            "Default account for market data; at most one",
        ),
        "market_permissions": (
            "Markets the account may trade in",
            "Markets in which the account may trade",
        ),
        "quote_permissions": (
            "Tiger's quote permissions: name and expire_at (epoch ms, -1 permanent)",
            "Quote permissions at Tiger: name and expire_at (epoch ms, -1: permanent)",
        ),
        "client_options": (
            "What else Tiger's configuration file says: timeout, language and the like",
            "Other settings of Tiger's configuration file, such as timeout and language",
        ),
        "auto_suspended": (
            "Suspended after too many errors, not by a person; ends with the suspension",
            "Suspended after too many errors, not by a person; reset with the suspension",
        ),
        "last_error_at": ("When the last error happened", "Time of the last error"),
    },
    "api_keys": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 made by the application, ordered by creation time",
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
            "Public part of the key, for look-up",
        ),
        "key_hash": (
            "passlib hash of the secret part of the key, under the pepper",
            "passlib hash of the pepper and the secret part of the key",
        ),
        "pepper_id": (
            "Id of the pepper in the hash; none: a hash of the secret itself",
            "Id of the pepper in the hash; null: no pepper",
        ),
        "root_id": (
            "First key of the line that rotations made, which may be gone; none: this one",
            "First key of the line that rotations made, possibly deleted; null: this key",
        ),
        "successor_id": (
            "Key that it was rotated to, which may be gone",
            "Key that replaced this one, possibly deleted",
        ),
        "scopes": ("What the key may do", "Scopes of the key"),
        "tiger_account_id": (
            "The only account it may act on; none: every account",
            "The only account that the key can access; null: all accounts",
        ),
        "expires_at": ("From when on it is refused", "Time from which the key is refused"),
        "last_used_at": ("When it was last accepted", "Time of the last accepted use"),
        "usage_count": ("How often it was accepted", "Number of accepted uses"),
        "rate_limit_per_hour": (
            "Uses in one clock hour (UTC)",
            "Maximum uses in a clock hour (UTC)",
        ),
        "rate_limit_per_day": (
            "Uses in one calendar day (UTC)",
            "Maximum uses in a calendar day (UTC)",
        ),
        "allowed_ips": (
            "Networks it may be used from; none: any",
            "Networks from which the key is accepted; empty: all",
        ),
        "allowed_user_agents": (
            "Clients that may use it, * for any run of characters; none: any",
            "Accepted User-Agents, with * as wildcard; empty: all",
        ),
        "created_by": ("Who created it", "Creator of the key"),
        "revoked_at": ("When it was revoked", "Time of the revocation"),
        "revocation_reason": ("Why it was revoked", "Reason for the revocation"),
    },
    "token_statuses": {
        "id": (
            "UUIDv7, made by the application: ordered by time of creation",
            "UUIDv7 made by the application, ordered by creation time",
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
            "pending and in_progress are open, the others are final",
        ),
        "trigger": ("Why it was asked for", "Reason for the refresh"),
        "old_token_expires_at": ("Expiry of the token it replaces", "Expiry of the replaced token"),
        "new_token_expires_at": ("Expiry of the token it brought", "Expiry of the new token"),
        "old_token_hash": ("SHA-256 of the token it replaces", "SHA-256 of the replaced token"),
        "new_token_hash": ("SHA-256 of the token it brought", "SHA-256 of the new token"),
        "scheduled_at": (
            "From when on it may be claimed",
            "Time from which the refresh can be claimed",
        ),
        "started_at": ("When the last attempt started", "Start of the last attempt"),
        "completed_at": ("When it ended for good", "Time of the final status"),
        "duration_ms": ("Length of the last attempt, in ms", "Duration of the last attempt, in ms"),
        "next_refresh_at": (
            "When the new token should be refreshed",
            "Time at which the new token should be refreshed",
        ),
        "retry_count": ("How many attempts failed", "Number of failed attempts"),
        "max_retries": (
            "After how many failed attempts it is given up",
            "Maximum number of failed attempts",
        ),
        "api_response_code": ("Tiger's code in the last answer", "Code of Tiger's last response"),
        "api_response_time_ms": (
            "How long Tiger took to answer, in ms",
            "Duration of Tiger's last response, in ms",
        ),
        "details": ("Whatever else is worth knowing", "Other details of the refresh"),
        "environment": ("Tiger's environment asked", "Environment at Tiger"),
        "worker": ("Who holds the claim", "Worker that holds the claim"),
        "lease_expires_at": (
            "When the claim ends unless it is renewed",
            "End of the claim, unless it is renewed",
        ),
        "fencing_token": (
            "Number of the claim: an older one is void",
            "Number of the claim; claims with lower numbers are void",
        ),
    },
    "api_key_usage": {
        "api_key_id": ("The key", "API key"),
        "count": ("How often the key was accepted in it", "Accepted uses in the hour"),
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
