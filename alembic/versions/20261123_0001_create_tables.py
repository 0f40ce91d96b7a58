"""Create the tables of accounts, API keys, audit events and refreshes.

Revision: 0001
Follows:
Made: 2026-11-23
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None
squawk_ignore = {"prefer-text-field": "Alembic creates the version table"}


def enum(name: str, *members: str) -> postgresql.ENUM:
    return postgresql.ENUM(*members, name=name, create_type=False)


REFRESH_TRIGGER = enum(
    "refresh_trigger", "scheduled", "manual", "on_demand", "expiry_soon", "expired", "error"
)
TOKEN_REFRESH_STATUS = enum(
    "token_refresh_status", "pending", "in_progress", "success", "failed", "expired", "cancelled"
)
AUDIT_SEVERITY = enum("audit_severity", "low", "medium", "high", "critical")
AUDIT_RESULT = enum("audit_result", "success", "failure", "partial", "error")
AUDIT_ACTION = enum(
    "audit_action",
    "account:create",
    "account:update",
    "account:status_change",
    "account:set_default",
    "account:error",
    "account:reset_errors",
    "account:close",
    "account:reopen",
    "account:delete",
    "account:import",
    "account:export",
    "api_key:create",
    "api_key:update",
    "api_key:rotate",
    "api_key:revoke",
    "api_key:use",
    "api_key:deny",
    "token:update",
    "token:refresh_schedule",
    "token:refresh_start",
    "token:refresh",
    "token:refresh_cancel",
    "token:oauth_login",
    "token:oauth_refresh",
    "token:oauth_logout",
    "trade:create_order",
    "trade:preview_order",
    "trade:place_order",
    "trade:modify_order",
    "trade:cancel_order",
    "trade:place_forex_order",
    "trade:check_option_exercise",
    "trade:submit_option_exercise",
    "trade:cancel_option_exercise",
    "trade:transfer_segment_fund",
    "trade:cancel_segment_fund",
    "trade:transfer_position",
    "data:query",
    "data:grab_quote_permission",
    "mcp:connect",
    "mcp:disconnect",
    "mcp:tool_call",
    "dashboard:login",
    "dashboard:logout",
    "dashboard:view",
    "dashboard:change",
    "system:start",
    "system:stop",
    "system:config_change",
    "system:migrate",
    "system:encryption_key_rotate",
    "system:audit_seal",
    "system:audit_retire",
    "system:error",
    "security:login_failure",
    "security:access_denied",
    "security:rate_limit",
    "security:suspicious_activity",
    "security:key_leak",
    "security:tampering",
)
API_KEY_SCOPE = enum(
    "api_key_scope",
    "mcp:read",
    "mcp:write",
    "mcp:admin",
    "dashboard:read",
    "dashboard:write",
    "dashboard:admin",
    "account:read",
    "account:write",
    "account:admin",
    "trade:read",
    "trade:write",
    "trade:admin",
    "system:read",
    "system:write",
    "system:admin",
)
API_KEY_STATUS = enum("api_key_status", "active", "inactive", "revoked", "expired")
MARKET_PERMISSION = enum("market_permission", "US", "HK", "CN", "SG")
TIGER_ENVIRONMENT = enum("tiger_environment", "PROD", "SANDBOX")
TIGER_LICENSE = enum("tiger_license", "TBNZ", "TBSG", "TBHK", "TBAU", "TBUS")
PRIVATE_KEY_FORMAT = enum("private_key_format", "PK1", "PK8", "unknown")
ACCOUNT_STATUS = enum(
    "account_status", "active", "inactive", "suspended", "pending_verification", "closed"
)
ACCOUNT_TYPE = enum("account_type", "standard", "prime", "global", "paper")
ENUMS = (
    REFRESH_TRIGGER,
    TOKEN_REFRESH_STATUS,
    AUDIT_SEVERITY,
    AUDIT_RESULT,
    AUDIT_ACTION,
    API_KEY_SCOPE,
    API_KEY_STATUS,
    MARKET_PERMISSION,
    TIGER_ENVIRONMENT,
    TIGER_LICENSE,
    PRIVATE_KEY_FORMAT,
    ACCOUNT_STATUS,
    ACCOUNT_TYPE,
)

SET_UPDATED_AT = """
CREATE FUNCTION set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$
"""

# uuid7_floor returns the smallest UUIDv7 with a given timestamp. A UUIDv7 begins with a timestamp
# of 48 bits, in milliseconds since 1970 (RFC 9562, section 5.7).
UUID7_FLOOR = """
CREATE FUNCTION uuid7_floor(at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT rpad(lpad(to_hex(milliseconds), 12, '0'), 32, '0')::uuid
    FROM CAST(floor(least(greatest(extract(epoch FROM at) * 1000, 0), 281474976710655)) AS bigint)
        AS milliseconds
$$
"""

# ATTACH PARTITION does not block writers, but CREATE TABLE with PARTITION OF does.
# The default partition contains the events of months without a partition. When make_audit_months
# creates the partition of a month, the function moves the events of that month into the partition.
MAKE_AUDIT_MONTHS = """
CREATE FUNCTION make_audit_months(ahead integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    month timestamp;
    partition text;
    lower uuid;
    upper uuid;
    made integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('make_audit_months'));
    FOR month IN
        SELECT generate_series(this_month, this_month + make_interval(months => ahead), '1 month')
        FROM date_trunc('month', now() AT TIME ZONE 'UTC') AS this_month
    LOOP
        partition := 'audit_logs_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass(partition) IS NOT NULL;
        lower := uuid7_floor(month AT TIME ZONE 'UTC');
        upper := uuid7_floor((month + interval '1 month') AT TIME ZONE 'UTC');
        LOCK TABLE audit_logs_default IN SHARE ROW EXCLUSIVE MODE;
        EXECUTE format('CREATE TABLE %I (LIKE audit_logs INCLUDING ALL)', partition);
        EXECUTE format(
            'WITH strays AS ('
            'DELETE FROM audit_logs_default WHERE id >= %L AND id < %L RETURNING *'
            ') INSERT INTO %I SELECT * FROM strays', lower, upper, partition);
        EXECUTE format(
            'ALTER TABLE audit_logs ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            partition, lower, upper);
        made := made + 1;
    END LOOP;
    RETURN made;
END
$$
"""


def upgrade() -> None:
    for type_ in ENUMS:
        members = ", ".join(f"'{member}'" for member in type_.enums)
        op.execute(f"CREATE TYPE {type_.name} AS ENUM ({members})")
    op.execute(SET_UPDATED_AT)
    op.execute(UUID7_FLOOR)
    op.execute(MAKE_AUDIT_MONTHS)
    op.create_table(
        "audit_logs",
        sa.Column(
            "id",
            sa.UUID(),
            nullable=False,
            comment="UUIDv7 that the application generates; ids increase with creation time",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Time of the insert, by the database's clock",
        ),
        sa.Column(
            "action",
            AUDIT_ACTION,
            nullable=False,
            comment="Action of the event, as family:verb",
        ),
        sa.Column(
            "result",
            AUDIT_RESULT,
            nullable=False,
            comment="Outcome of the action",
        ),
        sa.Column(
            "severity",
            AUDIT_SEVERITY,
            nullable=False,
            comment="Severity; derived from action and result by default",
        ),
        sa.Column(
            "resource_type",
            sa.Text(),
            nullable=True,
            comment="Type of the affected resource, e.g. order",
        ),
        sa.Column(
            "resource_id",
            sa.Text(),
            nullable=True,
            comment="Identifier of the affected resource, e.g. an order id",
        ),
        sa.Column(
            "user_id", sa.Text(), nullable=True, comment="User or service that performed the action"
        ),
        sa.Column("user_type", sa.Text(), nullable=True, comment="Type of the user, e.g. admin"),
        sa.Column("session_id", sa.Text(), nullable=True, comment="Id of the user's session"),
        sa.Column(
            "ip_address", postgresql.INET(), nullable=True, comment="IP address of the client"
        ),
        sa.Column("user_agent", sa.Text(), nullable=True, comment="User-Agent of the client"),
        sa.Column("request_method", sa.Text(), nullable=True, comment="HTTP method"),
        sa.Column("request_path", sa.Text(), nullable=True, comment="HTTP path"),
        sa.Column(
            "request_id",
            sa.Text(),
            nullable=True,
            comment="Id of the request; all events of one request have the same id",
        ),
        sa.Column(
            "tiger_account_id",
            sa.UUID(),
            nullable=True,
            comment="Used or changed account; no foreign key, because accounts can be deleted",
        ),
        sa.Column(
            "api_key_id",
            sa.UUID(),
            nullable=True,
            comment="Used or changed API key; no foreign key, because API keys can be deleted",
        ),
        sa.Column(
            "details",
            postgresql.JSONB(),
            nullable=True,
            comment="Other details of the event",
        ),
        sa.Column(
            "old_values",
            postgresql.JSONB(),
            nullable=True,
            comment="Values of the changed fields before the change, with masked secrets",
        ),
        sa.Column(
            "new_values",
            postgresql.JSONB(),
            nullable=True,
            comment="Values of the changed fields after the change, with masked secrets",
        ),
        sa.Column("error_code", sa.Text(), nullable=True, comment="Code of the error"),
        sa.Column("error_message", sa.Text(), nullable=True, comment="Message of the error"),
        sa.Column(
            "duration_ms",
            sa.BigInteger(),
            nullable=True,
            comment="Duration of the action in milliseconds",
        ),
        sa.Column(
            "tags",
            postgresql.JSONB(),
            nullable=True,
            comment="Free-form object",
        ),
        sa.CheckConstraint(
            "char_length(error_code) <= 50", name=op.f("ck_audit_logs_error_code_max_50")
        ),
        sa.CheckConstraint(
            "char_length(request_id) <= 100", name=op.f("ck_audit_logs_request_id_max_100")
        ),
        sa.CheckConstraint(
            "char_length(request_method) <= 10", name=op.f("ck_audit_logs_request_method_max_10")
        ),
        sa.CheckConstraint(
            "char_length(request_path) <= 500", name=op.f("ck_audit_logs_request_path_max_500")
        ),
        sa.CheckConstraint(
            "char_length(resource_id) <= 100", name=op.f("ck_audit_logs_resource_id_max_100")
        ),
        sa.CheckConstraint(
            "char_length(resource_type) <= 50", name=op.f("ck_audit_logs_resource_type_max_50")
        ),
        sa.CheckConstraint(
            "char_length(session_id) <= 100", name=op.f("ck_audit_logs_session_id_max_100")
        ),
        sa.CheckConstraint(
            "char_length(user_agent) <= 500", name=op.f("ck_audit_logs_user_agent_max_500")
        ),
        sa.CheckConstraint(
            "char_length(user_id) <= 100", name=op.f("ck_audit_logs_user_id_max_100")
        ),
        sa.CheckConstraint(
            "char_length(user_type) <= 50", name=op.f("ck_audit_logs_user_type_max_50")
        ),
        sa.CheckConstraint("duration_ms >= 0", name=op.f("ck_audit_logs_duration_ms_ge_0")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_logs")),
        postgresql_partition_by="RANGE (id)",
    )
    op.create_index(
        "ix_audit_logs_api_key_id_id",
        "audit_logs",
        ["api_key_id", "id"],
        unique=False,
        postgresql_where=sa.text("api_key_id IS NOT NULL"),
    )
    op.create_index(
        "ix_audit_logs_tiger_account_id_id",
        "audit_logs",
        ["tiger_account_id", "id"],
        unique=False,
        postgresql_where=sa.text("tiger_account_id IS NOT NULL"),
    )
    op.create_index(
        "ix_audit_logs_user_id_id",
        "audit_logs",
        ["user_id", "id"],
        unique=False,
        postgresql_where=sa.text("user_id IS NOT NULL"),
    )
    op.create_table(
        "tiger_accounts",
        sa.Column(
            "id",
            sa.UUID(),
            nullable=False,
            comment="UUIDv7 that the application generates; ids increase with creation time",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Creation time, by the database's clock",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Time of the last change, by the database's clock",
        ),
        sa.Column("account_name", sa.Text(), nullable=False, comment="Display name of the account"),
        sa.Column("account_number", sa.Text(), nullable=False, comment="Account number at Tiger"),
        sa.Column(
            "account_type",
            ACCOUNT_TYPE,
            nullable=False,
            comment="Account type; derived from the account number by default",
        ),
        sa.Column(
            "status",
            ACCOUNT_STATUS,
            nullable=False,
            comment="Status of the account; only active accounts serve requests",
        ),
        sa.Column(
            "tiger_id",
            sa.LargeBinary(),
            nullable=False,
            comment="Developer id at Tiger, encrypted; several accounts can share an id",
        ),
        sa.Column(
            "tiger_id_fingerprint",
            sa.LargeBinary(),
            nullable=False,
            comment="Blind index of tiger_id: keyed hash (HMAC-SHA256) for equality search",
        ),
        sa.Column(
            "private_key",
            sa.LargeBinary(),
            nullable=False,
            comment="RSA private key (base64 DER), encrypted",
        ),
        sa.Column(
            "private_key_format",
            PRIVATE_KEY_FORMAT,
            nullable=False,
            comment="Format of the private key: one of PK1 (PKCS#1), PK8 (PKCS#8) and unknown",
        ),
        sa.Column(
            "secret_key",
            sa.LargeBinary(),
            nullable=True,
            comment="Secret key of institutional traders, encrypted",
        ),
        sa.Column(
            "license",
            TIGER_LICENSE,
            nullable=True,
            comment="License of the account at Tiger, such as TBHK",
        ),
        sa.Column(
            "environment",
            TIGER_ENVIRONMENT,
            nullable=False,
            comment="Environment at Tiger; only account_type says whether trades are on paper",
        ),
        sa.Column(
            "server_url",
            sa.Text(),
            nullable=True,
            comment="URL of Tiger's gateway; null: default URL of the environment",
        ),
        sa.Column(
            "access_token",
            sa.LargeBinary(),
            nullable=True,
            comment="Access token, encrypted",
        ),
        sa.Column(
            "refresh_token",
            sa.LargeBinary(),
            nullable=True,
            comment="OAuth refresh token, encrypted",
        ),
        sa.Column(
            "token_expires_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Expiry of the access token",
        ),
        sa.Column(
            "is_default_trading",
            sa.Boolean(),
            nullable=False,
            comment="Default account for trading: true for at most one account",
        ),
        sa.Column(
            "is_default_data",
            sa.Boolean(),
            nullable=False,
            comment="Default account for market data: true for at most one account",
        ),
        sa.Column(
            "market_permissions",
            postgresql.ARRAY(
                MARKET_PERMISSION,
                dimensions=1,
            ),
            nullable=False,
            comment="Markets in which the account may trade",
        ),
        sa.Column(
            "quote_permissions",
            postgresql.JSONB(),
            nullable=False,
            comment="Market data permissions: name and expire_at (epoch ms; -1: no expiry)",
        ),
        sa.Column(
            "error_count",
            sa.BigInteger(),
            nullable=False,
            comment="Number of consecutive errors since the last success",
        ),
        sa.Column("last_error", sa.Text(), nullable=True, comment="Message of the last error"),
        sa.Column(
            "last_error_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time of the last error",
        ),
        sa.Column("description", sa.Text(), nullable=True, comment="Notes"),
        sa.Column(
            "tags",
            postgresql.JSONB(),
            nullable=False,
            comment="Free-form object",
        ),
        sa.CheckConstraint(
            "jsonb_typeof(quote_permissions) = 'array'",
            name=op.f("ck_tiger_accounts_quote_permissions_array"),
        ),
        sa.CheckConstraint(
            "jsonb_typeof(tags) = 'object'", name=op.f("ck_tiger_accounts_tags_object")
        ),
        sa.CheckConstraint(
            "char_length(account_name) <= 100", name=op.f("ck_tiger_accounts_account_name_max_100")
        ),
        sa.CheckConstraint(
            "char_length(account_name) >= 1", name=op.f("ck_tiger_accounts_account_name_min_1")
        ),
        sa.CheckConstraint(
            "char_length(account_number) <= 50",
            name=op.f("ck_tiger_accounts_account_number_max_50"),
        ),
        sa.CheckConstraint(
            "char_length(account_number) >= 1", name=op.f("ck_tiger_accounts_account_number_min_1")
        ),
        sa.CheckConstraint(
            "char_length(description) <= 500", name=op.f("ck_tiger_accounts_description_max_500")
        ),
        sa.CheckConstraint(
            "char_length(server_url) <= 500", name=op.f("ck_tiger_accounts_server_url_max_500")
        ),
        sa.CheckConstraint("error_count >= 0", name=op.f("ck_tiger_accounts_error_count_ge_0")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tiger_accounts")),
        sa.UniqueConstraint("account_number", name=op.f("uq_tiger_accounts_account_number")),
    )
    op.create_index(
        op.f("ix_tiger_accounts_tiger_id_fingerprint"),
        "tiger_accounts",
        ["tiger_id_fingerprint"],
        unique=False,
    )
    op.create_index(
        "ix_tiger_accounts_token_expires_at",
        "tiger_accounts",
        ["token_expires_at"],
        unique=False,
        postgresql_where=sa.text("status = 'active' AND access_token IS NOT NULL"),
    )
    op.create_index(
        "uq_tiger_accounts_is_default_data",
        "tiger_accounts",
        ["is_default_data"],
        unique=True,
        postgresql_where=sa.text("is_default_data"),
    )
    op.create_index(
        "uq_tiger_accounts_is_default_trading",
        "tiger_accounts",
        ["is_default_trading"],
        unique=True,
        postgresql_where=sa.text("is_default_trading"),
    )
    op.create_table(
        "api_keys",
        sa.Column(
            "id",
            sa.UUID(),
            nullable=False,
            comment="UUIDv7 that the application generates; ids increase with creation time",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Creation time, by the database's clock",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Time of the last change, by the database's clock",
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="Display name of the key"),
        sa.Column(
            "key_prefix",
            sa.Text(),
            nullable=False,
            comment="Public part of the key, by which the key is found",
        ),
        sa.Column(
            "key_hash",
            sa.Text(),
            nullable=False,
            comment="passlib hash of the secret part of the key",
        ),
        sa.Column(
            "status",
            API_KEY_STATUS,
            nullable=False,
            comment="Status of the key; only active keys are accepted",
        ),
        sa.Column(
            "scopes",
            postgresql.ARRAY(
                API_KEY_SCOPE,
                dimensions=1,
            ),
            nullable=False,
            comment="Scopes (permissions) of the key",
        ),
        sa.Column(
            "tiger_account_id",
            sa.UUID(),
            nullable=True,
            comment="The only account that the key can access; null: all accounts",
        ),
        sa.Column(
            "expires_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Expiry of the key; from this time on, the key is refused",
        ),
        sa.Column(
            "last_used_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time of the last accepted use of the key",
        ),
        sa.Column(
            "usage_count",
            sa.BigInteger(),
            nullable=False,
            comment="Number of accepted uses of the key",
        ),
        sa.Column(
            "rate_limit_per_hour",
            sa.BigInteger(),
            nullable=True,
            comment="Maximum number of uses per clock hour (UTC); null: no limit",
        ),
        sa.Column(
            "rate_limit_per_day",
            sa.BigInteger(),
            nullable=True,
            comment="Maximum number of uses per calendar day (UTC); null: no limit",
        ),
        sa.Column(
            "allowed_ips",
            postgresql.ARRAY(postgresql.CIDR(), dimensions=1),
            nullable=False,
            comment="Networks from which the key is accepted; empty: all networks",
        ),
        sa.Column(
            "allowed_user_agents",
            postgresql.ARRAY(sa.Text(), dimensions=1),
            nullable=False,
            comment="Patterns of accepted User-Agents (* is a wildcard); empty: all User-Agents",
        ),
        sa.Column(
            "created_by", sa.Text(), nullable=True, comment="User or service that created the key"
        ),
        sa.Column(
            "revoked_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time of the revocation",
        ),
        sa.Column(
            "revocation_reason", sa.Text(), nullable=True, comment="Reason for the revocation"
        ),
        sa.Column("description", sa.Text(), nullable=True, comment="Notes"),
        sa.Column(
            "tags",
            postgresql.JSONB(),
            nullable=False,
            comment="Free-form object",
        ),
        sa.CheckConstraint("jsonb_typeof(tags) = 'object'", name=op.f("ck_api_keys_tags_object")),
        sa.CheckConstraint("cardinality(scopes) >= 1", name=op.f("ck_api_keys_scopes_min_1")),
        sa.CheckConstraint(
            "char_length(created_by) <= 100", name=op.f("ck_api_keys_created_by_max_100")
        ),
        sa.CheckConstraint(
            "char_length(description) <= 500", name=op.f("ck_api_keys_description_max_500")
        ),
        sa.CheckConstraint("char_length(key_hash) >= 1", name=op.f("ck_api_keys_key_hash_min_1")),
        sa.CheckConstraint(
            "char_length(key_prefix) <= 50", name=op.f("ck_api_keys_key_prefix_max_50")
        ),
        sa.CheckConstraint(
            "char_length(key_prefix) >= 1", name=op.f("ck_api_keys_key_prefix_min_1")
        ),
        sa.CheckConstraint("char_length(name) <= 100", name=op.f("ck_api_keys_name_max_100")),
        sa.CheckConstraint("char_length(name) >= 1", name=op.f("ck_api_keys_name_min_1")),
        sa.CheckConstraint(
            "char_length(revocation_reason) <= 500",
            name=op.f("ck_api_keys_revocation_reason_max_500"),
        ),
        sa.CheckConstraint(
            "rate_limit_per_day >= 1", name=op.f("ck_api_keys_rate_limit_per_day_ge_1")
        ),
        sa.CheckConstraint(
            "rate_limit_per_hour >= 1", name=op.f("ck_api_keys_rate_limit_per_hour_ge_1")
        ),
        sa.CheckConstraint("usage_count >= 0", name=op.f("ck_api_keys_usage_count_ge_0")),
        sa.ForeignKeyConstraint(
            ["tiger_account_id"],
            ["tiger_accounts.id"],
            name=op.f("fk_api_keys_tiger_account_id_tiger_accounts"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_prefix", name=op.f("uq_api_keys_key_prefix")),
    )
    op.create_index(
        "ix_api_keys_tiger_account_id_id", "api_keys", ["tiger_account_id", "id"], unique=False
    )
    op.create_table(
        "token_statuses",
        sa.Column(
            "id",
            sa.UUID(),
            nullable=False,
            comment="UUIDv7 that the application generates; ids increase with creation time",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Creation time, by the database's clock",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Time of the last change, by the database's clock",
        ),
        sa.Column(
            "tiger_account_id",
            sa.UUID(),
            nullable=False,
            comment="Account whose token is refreshed",
        ),
        sa.Column(
            "status",
            TOKEN_REFRESH_STATUS,
            nullable=False,
            comment="Status: pending and in_progress are open, all other statuses are final",
        ),
        sa.Column(
            "trigger",
            REFRESH_TRIGGER,
            nullable=False,
            comment="Reason for the refresh",
        ),
        sa.Column(
            "old_token_expires_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Expiry of the replaced access token",
        ),
        sa.Column(
            "new_token_expires_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Expiry of the new access token",
        ),
        sa.Column(
            "old_token_hash",
            sa.Text(),
            nullable=True,
            comment="SHA-256 of the replaced access token",
        ),
        sa.Column(
            "new_token_hash", sa.Text(), nullable=True, comment="SHA-256 of the new access token"
        ),
        sa.Column(
            "scheduled_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="Earliest time at which a worker can claim the refresh",
        ),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Start of the last attempt",
        ),
        sa.Column(
            "completed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time at which the refresh got a final status",
        ),
        sa.Column(
            "duration_ms",
            sa.BigInteger(),
            nullable=True,
            comment="Duration of the last attempt, in ms",
        ),
        sa.Column(
            "next_refresh_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time at which the new access token should be refreshed",
        ),
        sa.Column("error_code", sa.Text(), nullable=True, comment="Code of the last error"),
        sa.Column("error_message", sa.Text(), nullable=True, comment="Message of the last error"),
        sa.Column(
            "retry_count", sa.BigInteger(), nullable=False, comment="Number of failed attempts"
        ),
        sa.Column(
            "max_retries",
            sa.BigInteger(),
            nullable=False,
            comment="Maximum number of failed attempts",
        ),
        sa.Column(
            "api_response_code",
            sa.BigInteger(),
            nullable=True,
            comment="Code in Tiger's last response",
        ),
        sa.Column(
            "api_response_time_ms",
            sa.BigInteger(),
            nullable=True,
            comment="Response time of the last request to Tiger, in ms",
        ),
        sa.Column(
            "details",
            postgresql.JSONB(),
            nullable=True,
            comment="Other details of the refresh",
        ),
        sa.Column(
            "environment",
            TIGER_ENVIRONMENT,
            nullable=True,
            comment="Environment at Tiger",
        ),
        sa.Column("server_version", sa.Text(), nullable=True, comment="Version of Tiger's gateway"),
        sa.Column(
            "worker",
            sa.Text(),
            nullable=True,
            comment="Name of the worker that claimed the refresh",
        ),
        sa.Column(
            "lease_expires_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Expiry of the worker's lease, unless the worker renews the lease",
        ),
        sa.Column(
            "fencing_token",
            sa.BigInteger(),
            nullable=False,
            comment="Number of the latest claim; earlier claims of the refresh are void",
        ),
        sa.CheckConstraint(
            "api_response_time_ms >= 0", name=op.f("ck_token_statuses_api_response_time_ms_ge_0")
        ),
        sa.CheckConstraint(
            "char_length(error_code) <= 50", name=op.f("ck_token_statuses_error_code_max_50")
        ),
        sa.CheckConstraint(
            "char_length(new_token_hash) <= 128",
            name=op.f("ck_token_statuses_new_token_hash_max_128"),
        ),
        sa.CheckConstraint(
            "char_length(old_token_hash) <= 128",
            name=op.f("ck_token_statuses_old_token_hash_max_128"),
        ),
        sa.CheckConstraint(
            "char_length(server_version) <= 50",
            name=op.f("ck_token_statuses_server_version_max_50"),
        ),
        sa.CheckConstraint(
            "char_length(worker) <= 100", name=op.f("ck_token_statuses_worker_max_100")
        ),
        sa.CheckConstraint("duration_ms >= 0", name=op.f("ck_token_statuses_duration_ms_ge_0")),
        sa.CheckConstraint("fencing_token >= 0", name=op.f("ck_token_statuses_fencing_token_ge_0")),
        sa.CheckConstraint("max_retries >= 0", name=op.f("ck_token_statuses_max_retries_ge_0")),
        sa.CheckConstraint("retry_count >= 0", name=op.f("ck_token_statuses_retry_count_ge_0")),
        sa.ForeignKeyConstraint(
            ["tiger_account_id"],
            ["tiger_accounts.id"],
            name=op.f("fk_token_statuses_tiger_account_id_tiger_accounts"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_token_statuses")),
    )
    op.create_index(
        "ix_token_statuses_due",
        "token_statuses",
        ["scheduled_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('pending', 'in_progress')"),
    )
    op.create_index(
        "ix_token_statuses_failed",
        "token_statuses",
        ["id"],
        unique=False,
        postgresql_where=sa.text("status = 'failed'"),
    )
    op.create_index(
        "ix_token_statuses_tiger_account_id_id",
        "token_statuses",
        ["tiger_account_id", "id"],
        unique=False,
    )
    op.create_index(
        "uq_token_statuses_tiger_account_id_open",
        "token_statuses",
        ["tiger_account_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('pending', 'in_progress')"),
    )
    op.create_table(
        "api_key_usage",
        sa.Column("api_key_id", sa.UUID(), nullable=False, comment="API key"),
        sa.Column(
            "hour",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="Start (UTC) of an hour in which the API key was used",
        ),
        sa.Column(
            "count",
            sa.BigInteger(),
            nullable=False,
            comment="Number of accepted uses of the API key in the hour",
        ),
        sa.CheckConstraint("count >= 1", name=op.f("ck_api_key_usage_count_ge_1")),
        sa.ForeignKeyConstraint(
            ["api_key_id"],
            ["api_keys.id"],
            name=op.f("fk_api_key_usage_api_key_id_api_keys"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("api_key_id", "hour", name=op.f("pk_api_key_usage")),
        comment="Number of accepted uses per API key and hour",
    )
    for table in ("tiger_accounts", "api_keys", "token_statuses"):
        op.execute(
            f"CREATE TRIGGER set_updated_at BEFORE UPDATE ON {table}"
            " FOR EACH ROW EXECUTE FUNCTION set_updated_at()"
        )
    op.execute("CREATE TABLE audit_logs_default PARTITION OF audit_logs DEFAULT")
    op.execute("SELECT make_audit_months(12)")


def downgrade() -> None:
    for table in ("api_key_usage", "token_statuses", "api_keys", "tiger_accounts", "audit_logs"):
        op.drop_table(table)
    op.execute("DROP FUNCTION make_audit_months(integer)")
    op.execute("DROP FUNCTION uuid7_floor(timestamptz)")
    op.execute("DROP FUNCTION set_updated_at()")
    for type_ in ENUMS:
        op.execute(f"DROP TYPE {type_.name}")
