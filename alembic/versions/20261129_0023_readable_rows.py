"""Refuse times and JSON that Python cannot read.

Revision: 0023
Follows: 0022
Made: 2026-11-29

New CHECK constraints limit times to the years 1 to 9999, and require objects in the columns of
refreshes and audit events for JSON. The times infinity and -infinity are still accepted.

The migration repairs the rows of accounts, API keys and refreshes that violate a constraint,
because PostgreSQL would otherwise refuse each further update of these rows. A time outside of the
years becomes the first or last possible time. JSON that is no object becomes the value of the name
`_unreadable` in an object. Audit events are never changed: if an event violates a constraint, the
constraint is valid for new events only, and `tiger-db doctor` names the event.

Separate transactions repair rows and validate the constraints. They block neither readers nor
writers. The validation reads all audit events once.
"""

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "an interrupted run of this migration has added these constraints",
}

FIRST, LAST = "'0001-01-01 00:00:00+00'", "'9999-12-31 23:59:59.999999+00'"
TIMES = {
    "api_keys": (
        "created_at", "updated_at", "expires_at", "last_used_at", "revoked_at", "mac_denied_at",
    ),
    "audit_logs": ("created_at",),
    "tiger_accounts": (
        "created_at", "updated_at", "token_expires_at", "token_refresh_at", "last_error_at",
        "failing_until",
    ),
    "token_statuses": (
        "created_at", "updated_at", "old_token_expires_at", "new_token_expires_at", "scheduled_at",
        "started_at", "completed_at", "next_refresh_at", "lease_expires_at",
    ),
}  # fmt: skip
# The columns of accounts and API keys already have such constraints.
OBJECTS = {
    "audit_logs": ("details", "old_values", "new_values", "tags"),
    "token_statuses": ("details",),
}
VALIDATE = """
DO $$
BEGIN
    {validate};
EXCEPTION WHEN check_violation THEN
    RAISE WARNING 'rows of {table} violate new constraints: see `tiger-db doctor`';
END
$$
"""


def constraints(table: str) -> dict[str, str]:
    """Return the expressions of the new constraints of a table, by name."""
    rules = {
        f"ck_{table}_{name}_years_1_to_9999": (
            f"NOT isfinite({name}) OR {name} BETWEEN {FIRST} AND {LAST}"
        )
        for name in TIMES[table]
    }
    return rules | {
        f"ck_{table}_{name}_object": f"jsonb_typeof({name}) = 'object'"
        for name in OBJECTS.get(table, ())
    }


def upgrade() -> None:
    for table in TIMES:
        rules = constraints(table)
        # The constraints already exist if an earlier run of this migration stopped later.
        op.execute(drop(table))
        added = (f"ADD CONSTRAINT {name} CHECK ({rule}) NOT VALID" for name, rule in rules.items())
        op.execute(f"ALTER TABLE {table} {', '.join(added)}")
    with op.get_context().autocommit_block():
        for table in TIMES:
            if table != "audit_logs":
                op.execute(repair(table))
            validate = ", ".join(f"VALIDATE CONSTRAINT {name}" for name in constraints(table))
            op.execute(VALIDATE.format(table=table, validate=f"ALTER TABLE {table} {validate}"))


def repair(table: str) -> str:
    """Return the statement that repairs the rows of a table that violate a constraint."""
    changes = [
        f"{name} = CASE WHEN isfinite({name}) THEN greatest(least({name}, {LAST}), {FIRST})"
        f" ELSE {name} END"
        for name in TIMES[table]
    ]
    changes += [
        f"{name} = CASE WHEN jsonb_typeof({name}) <> 'object'"
        f" THEN jsonb_build_object('_unreadable', {name}) ELSE {name} END"
        for name in OBJECTS.get(table, ())
    ]
    is_bad = " OR ".join(f"NOT ({rule})" for rule in constraints(table).values())
    return f"UPDATE {table} SET {', '.join(changes)} WHERE {is_bad}"


def downgrade() -> None:
    for table in TIMES:
        op.execute(drop(table))


def drop(table: str) -> str:
    dropped = (f"DROP CONSTRAINT IF EXISTS {name}" for name in constraints(table))
    return f"ALTER TABLE {table} {', '.join(dropped)}"
