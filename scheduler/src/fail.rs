//! The scheduler's [fail points](oc_mesh::fail): each stands behind the step that it is called by.

use oc_mesh::fail::{self, Action, Point};

oc_mesh::fail_points! {
    /// A checkpoint that is to be taken has its record.
    TAKE_RECORDED = "scheduler.take.recorded";
    /// Its host has taken it.
    TAKE_CAPTURED = "scheduler.take.captured";
    /// Its record says so.
    TAKE_WRITTEN = "scheduler.take.written";
    /// Its sandbox goes on from it.
    TAKE_FOLLOWED = "scheduler.take.followed";

    /// A checkpoint is marked to be deleted.
    DELETE_MARKED = "scheduler.delete.marked";
    /// Its host has removed it.
    DELETE_REMOVED = "scheduler.delete.removed";
    /// Its children are its parent's.
    DELETE_HANDED_OVER = "scheduler.delete.handed-over";
    /// Its record is gone.
    DELETE_FORGOTTEN = "scheduler.delete.forgotten";

    /// A sandbox is marked to be put back to a checkpoint.
    RESTORE_MARKED = "scheduler.restore.marked";
    /// Its host has done so.
    RESTORE_MADE = "scheduler.restore.made";
    /// Its record says so.
    RESTORE_WRITTEN = "scheduler.restore.written";

    /// A sandbox that is to be made has its record.
    CREATE_RECORDED = "scheduler.create.recorded";
    /// Its host has made it.
    CREATE_MADE = "scheduler.create.made";
    /// Its record says so.
    CREATE_WRITTEN = "scheduler.create.written";

    /// What a sandbox is forked by is taken.
    FORK_CAPTURED = "scheduler.fork.captured";
    /// All that were wanted are made of it.
    FORK_MADE = "scheduler.fork.made";
    /// It is removed.
    FORK_REMOVED = "scheduler.fork.removed";

    /// A sandbox is marked to be put to sleep.
    HIBERNATE_MARKED = "scheduler.hibernate.marked";
    /// Its host has done so.
    HIBERNATE_STORED = "scheduler.hibernate.stored";
    /// Its record says so.
    HIBERNATE_WRITTEN = "scheduler.hibernate.written";

    /// A sandbox is marked to be woken.
    WAKE_MARKED = "scheduler.wake.marked";
    /// Its host has done so.
    WAKE_WOKEN = "scheduler.wake.woken";
    /// Its record says so.
    WAKE_WRITTEN = "scheduler.wake.written";
}

/// What the scheduler's points know.
pub const ACTIONS: &[Action] = &[Action::Kill, Action::Pause];

/// Passes a point.
pub fn reached(point: Point) {
    // Whatever else it may be, the scheduler has no such action.
    let _ = fail::pass(point);
}
