"""${message}

Revision: ${up_revision}
Follows: ${down_revision | comma,n}
Made: ${create_date}

Before it is merged: read it, run it up, down and up again, and ask of every statement what it
locks, for how long, and whether the code that runs now can live with it. It runs while that does:

- Expand now, contract in a later release, when no code that runs needs the old: nothing is renamed,
  changes its type, becomes NOT NULL or goes away in one step.
- A new column is nullable, or has a constant default: neither rewrites the table.
- A CHECK or foreign key comes NOT VALID, and a later migration validates it; NOT NULL follows a
  valid CHECK (... IS NOT NULL), which spares it the scan.
- An index on a table in use is made and dropped CONCURRENTLY, alone in its migration, within
  op.get_context().autocommit_block(). DROP INDEX CONCURRENTLY IF EXISTS comes before CREATE INDEX
  CONCURRENTLY IF NOT EXISTS: a failure leaves an invalid index, and the migration runs again.
- After 2 s without a lock (lock_timeout) it is rolled back and tried again: few locks, that of the
  busiest table last, a short transaction. Many rows change in batches, outside of migrations.

`make lint` has squawk check this. An exemption gives its reason: squawk_ignore = {"rule": "reason"}
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
