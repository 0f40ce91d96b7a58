"""Require a worker and a lease for each refresh in progress.

Revision: 0008
Follows: 0007
Made: 2026-11-28

Before this migration, the table token_statuses can contain a refresh in progress without a worker
or a lease. No worker can claim or replace a refresh in progress that has no worker or no lease. The
migration sets a missing worker to `unknown`, and a missing lease to an expired lease. After the
migration, a worker claims a refresh with an expired lease, or sets its status to failed after
`max_retries` failed attempts. Processes of revision 0005 can work with the
schema of revision 0008, unless their own code calls `TokenStatus.start_refresh()` on a refresh of
the database: the flush then raises an error.

A separate transaction validates the new CHECK constraint, and blocks neither readers nor writers.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "the constraint exists only if an earlier run of this migration was interrupted",
}

NAME = "ck_token_statuses_in_progress_is_leased"


def upgrade() -> None:
    # The constraint already exists if an earlier run of this migration stopped during validation.
    op.execute(f"ALTER TABLE token_statuses DROP CONSTRAINT IF EXISTS {NAME}")
    op.execute(
        f"ALTER TABLE token_statuses ADD CONSTRAINT {NAME} CHECK (status <> 'in_progress'"
        " OR num_nulls(worker, lease_expires_at) = 0) NOT VALID"
    )
    op.execute(
        "UPDATE token_statuses SET worker = coalesce(worker, 'unknown'),"
        " lease_expires_at = coalesce(lease_expires_at, now()),"
        " scheduled_at = least(scheduled_at, now())"
        " WHERE status = 'in_progress' AND num_nulls(worker, lease_expires_at) > 0"
    )
    with op.get_context().autocommit_block():
        op.execute(f"ALTER TABLE token_statuses VALIDATE CONSTRAINT {NAME}")


def downgrade() -> None:
    op.drop_constraint(op.f(NAME), "token_statuses")
