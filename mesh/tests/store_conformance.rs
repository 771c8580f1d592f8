//! One suite holds both stores to the same promises. Below it, what only one of them has: several processes on one
//! file, and a server that restarts.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something is not as expected")]

mod conformance;

use conformance::{
    fixture::Fixture,
    {keys, leases, model, transactions, watches},
};

/// Every case once per store.
macro_rules! conformance {
    ($($module:ident: $($case:ident),+;)+) => {
        mod embedded {
            use super::*;
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    $module::$case(Fixture::embedded().await).await;
                }
            )+)+
        }

        mod etcd {
            use super::*;
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    $module::$case(Fixture::etcd().await).await;
                }
            )+)+
        }
    };
}

conformance! {
    keys:
        a_key_is_absent_until_it_is_written,
        every_change_has_a_higher_revision,
        a_range_comes_in_pages,
        a_range_holds_its_prefix_and_nothing_beside_it,
        odd_keys_and_values_survive,
        large_pages_are_cut_short_rather_than_refused;
    transactions:
        absent_has_one_winner,
        racing_increments_are_all_counted,
        an_old_revision_conflicts,
        a_conflict_changes_nothing,
        many_keys_change_at_one_revision,
        readers_never_see_half_a_transaction,
        what_changes_nothing_has_no_revision,
        what_no_store_takes_is_refused;
    watches:
        changes_come_in_order_one_revision_at_a_time,
        a_watch_resumes_where_it_was_left,
        a_watch_sees_its_prefix_alone,
        a_watch_amid_writers_sees_all_of_history,
        a_compacted_past_is_refused,
        a_dropped_watch_leaves_others_alone;
    leases:
        keys_end_with_their_lease,
        a_lease_kept_alive_stays,
        a_revoked_lease_takes_its_keys,
        an_ended_lease_is_not_found,
        a_dead_lease_takes_no_keys,
        a_key_written_anew_leaves_its_lease;
    model:
        any_history_is_that_of_a_map;
}

/// What [`conformance::child`] runs in: a process of its own when asked for, else nothing.
#[test]
fn child() {
    conformance::child::run();
}
