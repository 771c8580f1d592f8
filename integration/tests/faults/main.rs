//! What becomes of sandboxes when something dies, at the worst moment, or fills up. Each test has a mesh of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something is not as expected")]

mod branches;
mod chains;
mod chaos;
mod disk;
mod etcd;
mod hosts;
mod killed;
mod sleepers;
mod steps;
mod streams;
mod upgrade;

use std::process::ExitCode;

use oc_integration::suite;

fn main() -> ExitCode {
    let suite = suite! {
        killed:
            a_killed_vmm_fails_its_sandbox_alone,
            a_sandbox_outlives_every_service,
            a_sandbox_outlives_its_supervisor,
            a_call_that_is_cut_off_says_so;
        sleepers:
            a_sandbox_is_paused_or_runs_whoever_dies,
            a_sandbox_is_stored_or_runs_whoever_dies;
        branches:
            a_sandbox_is_as_before_or_as_after_whoever_dies;
        steps:
            a_sandbox_is_as_before_or_as_after_at_every_step,
            a_checkpoint_that_is_deleted_while_a_fork_reads_it_is_whole_or_not_found;
        streams:
            fifty_sessions_lose_no_byte_whatever_is_killed;
        chains:
            a_chain_of_checkpoints_misses_nothing_whatever_fails;
        chaos:
            a_hundred_creates_among_kills_leave_only_what_works;
        disk:
            a_full_host_takes_no_more_and_loses_nothing,
            a_disk_that_fills_up_amid_a_capture_leaves_nothing_of_it;
        upgrade:
            what_was_made_of_an_older_build_goes_on;
        etcd:
            a_mesh_on_etcd_outlives_its_server;
        hosts:
            a_checkpoint_outlives_its_host,
            a_hibernated_sandbox_outlives_its_host;
    };
    suite.one_at_a_time().run(|| Ok(()), Ok)
}
