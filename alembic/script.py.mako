"""${message}

Revision: ${up_revision}
Follows: ${down_revision | comma,n}
Made: ${create_date}

Before you merge this migration, read the code, and run upgrade, downgrade and upgrade again. Code of
the previous release runs during the migration. For each statement, check which locks PostgreSQL
takes, for how long, and whether the code of the previous release works with the changed schema:

- Expand the schema in this release, and contract the schema in a later release, when no running
  code needs the old schema. Do not rename or drop a column, change a type or set NOT NULL at once.
- Make each new column nullable, or set a constant default, so that PostgreSQL does not rewrite the
  table.
- Add a CHECK or foreign key as NOT VALID, and validate the constraint in a later migration. Set NOT
  NULL only after a valid CHECK (... IS NOT NULL), so that PostgreSQL does not scan the table.
- Create or drop an index on a table in use with CONCURRENTLY, in a migration without other
  statements, within op.get_context().autocommit_block(). Run DROP INDEX CONCURRENTLY IF EXISTS before
  CREATE INDEX CONCURRENTLY IF NOT EXISTS, because a failed attempt leaves an invalid index.
- A migration that waits 2 s for a lock (lock_timeout) is rolled back and run again. Take few locks,
  lock the busiest table last, and keep the transaction short. Change many rows in batches and
  outside of migrations.

`make lint` checks these rules with squawk. Each exemption needs a reason:
squawk_ignore = {"rule": "reason"}
"""

import sqlalchemy as sa
${imports if imports else ""}
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
