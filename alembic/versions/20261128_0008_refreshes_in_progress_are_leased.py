"""A refresh in progress has a worker and a lease.

Revision: 0008
Follows: 0007
Made: 2026-11-28

One without them could be neither claimed nor replaced. Such rows get a lease that has expired, so
that the next worker takes them over, or gives them up after `max_retries`. Code of revision 0005 can
live with it, but for `TokenStatus.start_refresh()` on a stored row, which is refused.

The constraint is validated in a transaction of its own, which blocks neither readers nor writers.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "it is there only if this migration was cut off, and is made anew",
}

NAME = "ck_token_statuses_in_progress_is_leased"


def upgrade() -> None:
    # It may run again, if the validation was cut off.
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
