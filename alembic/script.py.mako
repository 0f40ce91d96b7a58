"""${message}

Revision: ${up_revision}
Follows: ${down_revision | comma,n}
Made: ${create_date}

Before you merge this migration, read it and run it up, down and up again. Code of the previous
release runs during the migration. Check for each statement which locks it takes, for how long, and
whether that code works with the changed schema:

- Expand in this release and contract in a later release, when no running code needs the old schema.
  Do not rename, drop, change a type or set NOT NULL in one step.
- Make a new column nullable or give it a constant default: neither rewrites the table.
- Add a CHECK or foreign key as NOT VALID, and validate it in a later migration. Set NOT NULL after a
  valid CHECK (... IS NOT NULL), which makes a scan of the table unnecessary.
- Create or drop an index on a table in use CONCURRENTLY, alone in its migration, within
  op.get_context().autocommit_block(). Begin with DROP INDEX CONCURRENTLY IF EXISTS, then CREATE INDEX
  CONCURRENTLY IF NOT EXISTS: a failure leaves an invalid index, and the migration runs again.
- A migration that waits 2 s for a lock (lock_timeout) is rolled back and run again. Take few locks,
  lock the busiest table last, and keep the transaction short. Change many rows in batches, outside of
  migrations.

`make lint` checks this with squawk. Give each exemption a reason: squawk_ignore = {"rule": "reason"}
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
