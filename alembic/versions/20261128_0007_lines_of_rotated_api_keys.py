"""Apply one rate limit to a rotated API key and its replacement, and record each replacement.

Revision: 0007
Follows: 0006
Made: 2026-11-28

A rotation chain ("line" in the SQL of this migration) is an API key and all its replacement keys.
The migration reads the rotations of API keys from the audit trail once, then locks api_keys and
api_key_limits briefly. Processes of revision 0005 work with the schema of revision 0007, but begin a
new rotation chain for each replacement key.
"""

import sqlalchemy as sa

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "the usage counts of a rotation chain stay when its first key is deleted",
    "ban-drop-table": "the table rotations_0007 exists only during the migration",
}

# The table rotations_0007 stores ids of API keys as text. Applications can record audit events in
# which the id of the replacement key is not a valid UUID.
ROTATIONS = """
CREATE TABLE rotations_0007 AS
SELECT api_key_id::text AS id, new_values ->> 'successor' AS successor, max(position) AS position
FROM audit_logs
WHERE action = 'api_key:rotate' AND api_key_id IS NOT NULL AND new_values ->> 'successor' IS NOT NULL
GROUP BY 1, 2
"""
ROOTS = """
WITH RECURSIVE line (id, root) AS (
    SELECT successor, id FROM rotations_0007
    UNION SELECT line.id, r.id FROM line JOIN rotations_0007 AS r ON r.successor = line.root
)
UPDATE api_keys AS k SET root_id = line.root::uuid FROM line
WHERE k.id::text = line.id AND line.root NOT IN (SELECT successor FROM rotations_0007)
"""
# If an API key was rotated more than once, `successor_id` is the id of the newest replacement key.
SUCCESSORS = """
UPDATE api_keys AS k SET successor_id = r.successor_id
FROM (SELECT DISTINCT ON (r.id) r.id, s.id AS successor_id
    FROM rotations_0007 AS r JOIN api_keys AS s ON s.id::text = r.successor
    ORDER BY r.id, r.position DESC) AS r
WHERE k.id::text = r.id
"""
# The usage count of a rotation chain starts with the sum of the uses of all API keys in the chain.
MERGE_COUNTS = """
WITH counts AS (
    SELECT coalesce(k.root_id, k.id) AS line, l.hour, l.hour_count, l.day, l.day_count,
        max(l.hour) OVER w AS last_hour, max(l.day) OVER w AS last_day
    FROM api_key_limits AS l JOIN api_keys AS k ON k.id = l.api_key_id
    WINDOW w AS (PARTITION BY coalesce(k.root_id, k.id))
), successors AS (
    DELETE FROM api_key_limits USING api_keys AS k WHERE k.id = api_key_id AND k.root_id IS NOT NULL
)
INSERT INTO api_key_limits (api_key_id, hour, hour_count, day, day_count)
SELECT line, last_hour, coalesce(sum(hour_count) FILTER (WHERE hour = last_hour), 0),
    last_day, coalesce(sum(day_count) FILTER (WHERE day = last_day), 0)
FROM counts GROUP BY line, last_hour, last_day
ON CONFLICT (api_key_id) DO UPDATE SET hour = excluded.hour, hour_count = excluded.hour_count,
    day = excluded.day, day_count = excluded.day_count
"""
# The downgrade moves the usage counts of a rotation chain to the newest API key of the chain.
LEAVE_COUNTS = """
DELETE FROM api_key_limits USING api_keys AS k WHERE k.id = api_key_id AND k.root_id IS NOT NULL;
UPDATE api_key_limits AS l SET api_key_id = k.id
FROM (SELECT DISTINCT ON (root_id) root_id, id FROM api_keys WHERE root_id IS NOT NULL
    ORDER BY root_id, id DESC) AS k WHERE k.root_id = l.api_key_id;
DELETE FROM api_key_limits AS l
WHERE NOT EXISTS (SELECT FROM api_keys AS k WHERE k.id = l.api_key_id)
"""
FOREIGN_KEY = "fk_api_key_limits_api_key_id_api_keys"


def upgrade() -> None:
    op.execute(ROTATIONS)
    # To prevent deadlocks, the migration locks api_keys and api_key_limits in the order in which the
    # authorization of an API key locks them.
    op.drop_constraint(FOREIGN_KEY, "api_key_limits", type_="foreignkey")
    for name, comment in (
        (
            "root_id",
            "First key of the rotation chain (may be deleted); null: this key is first",
        ),
        (
            "successor_id",
            "Key that replaced this key in a rotation; that key may be deleted",
        ),
    ):
        op.add_column("api_keys", sa.Column(name, sa.UUID(), nullable=True, comment=comment))
    op.execute(ROOTS)
    op.execute(SUCCESSORS)
    op.execute(MERGE_COUNTS)
    op.execute("DROP TABLE rotations_0007")


def downgrade() -> None:
    for statement in LEAVE_COUNTS.split(";"):
        op.execute(statement)
    op.create_foreign_key(
        FOREIGN_KEY, "api_key_limits", "api_keys", ["api_key_id"], ["id"], ondelete="CASCADE"
    )
    op.drop_column("api_keys", "successor_id")
    op.drop_column("api_keys", "root_id")
