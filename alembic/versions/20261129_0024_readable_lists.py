"""Refuse lists that Python cannot read.

Revision: 0024
Follows: 0023
Made: 2026-11-29

New CHECK constraints refuse nulls and nested lists in the array columns of accounts and API keys,
and items of `quote_permissions` that are no objects.

The migration repairs the rows that violate a constraint, because PostgreSQL would otherwise refuse
each further update of these rows, such as a revocation. The repaired lists contain the items of
nested lists, and no nulls. An item of `quote_permissions` becomes the value of the name
`_unreadable` in an object. tiger_db never accepts an API key with such a list, so the migration
revokes the API key, and stores the earlier lists in its `tags` under `_unreadable`. A list of scopes
without an item gets the scope `mcp:read`, because a list of scopes must not be empty.

Separate transactions repair rows and validate the constraints. They block neither readers nor
writers.
"""

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "an interrupted run of this migration has added these constraints",
}

LISTS = {
    "api_keys": ("scopes", "allowed_ips", "allowed_user_agents"),
    "tiger_accounts": ("market_permissions",),
}
OBJECTS = (
    "NOT jsonb_path_exists(quote_permissions, 'strict $[*] ? (@.type() != \"object\")',"
    " silent => true)"
)


def constraints(table: str) -> dict[str, str]:
    """Return the expressions of the new constraints of a table, by name."""
    rules = {
        f"ck_{table}_{name}_list": (
            f"coalesce(array_ndims({name}), 1) = 1 AND num_nulls(VARIADIC {name}) = 0"
        )
        for name in LISTS[table]
    }
    if table == "tiger_accounts":
        rules["ck_tiger_accounts_quote_permissions_objects"] = OBJECTS
    return rules


def upgrade() -> None:
    for table in LISTS:
        # The constraints already exist if an earlier run of this migration stopped later.
        op.execute(drop(table))
        rules = constraints(table).items()
        added = (f"ADD CONSTRAINT {name} CHECK ({rule}) NOT VALID" for name, rule in rules)
        op.execute(f"ALTER TABLE {table} {', '.join(added)}")
    with op.get_context().autocommit_block():
        for table in LISTS:
            op.execute(repair(table))
            validate = ", ".join(f"VALIDATE CONSTRAINT {name}" for name in constraints(table))
            op.execute(f"ALTER TABLE {table} {validate}")


def repair(table: str) -> str:
    """Return the statement that repairs the rows of a table that violate a constraint."""
    changes = {
        # unnest() also returns the items of nested lists.
        name: f"ARRAY(SELECT item FROM unnest({name}) AS item WHERE item IS NOT NULL)"
        for name in LISTS[table]
    }
    if table == "api_keys":
        changes["scopes"] = (
            "CASE WHEN num_nonnulls(VARIADIC scopes) = 0 THEN '{mcp:read}'"
            f" ELSE {changes['scopes']} END"
        )
        lists = ", ".join(f"'{name}', {name}::text" for name in LISTS[table])
        changes["tags"] = f"tags || jsonb_build_object('_unreadable', jsonb_build_object({lists}))"
        changes |= {
            "status": "'revoked'",
            "revoked_at": "coalesce(revoked_at, now())",
            "revocation_reason": (
                "coalesce(revocation_reason, 'migration 0024: a list of the row was unreadable')"
            ),
        }
    else:
        changes["quote_permissions"] = (
            "(SELECT coalesce(jsonb_agg(CASE jsonb_typeof(item) WHEN 'object' THEN item"
            " ELSE jsonb_build_object('_unreadable', item) END ORDER BY number), '[]')"
            " FROM jsonb_array_elements(CASE jsonb_typeof(quote_permissions) WHEN 'array'"
            " THEN quote_permissions ELSE jsonb_build_array(quote_permissions) END)"
            " WITH ORDINALITY AS i (item, number))"
        )
    assignments = ", ".join(f"{name} = {value}" for name, value in changes.items())
    is_bad = " OR ".join(f"NOT ({rule})" for rule in constraints(table).values())
    return f"UPDATE {table} SET {assignments} WHERE {is_bad}"


def downgrade() -> None:
    for table in LISTS:
        op.execute(drop(table))


def drop(table: str) -> str:
    dropped = (f"DROP CONSTRAINT IF EXISTS {name}" for name in constraints(table))
    return f"ALTER TABLE {table} {', '.join(dropped)}"
