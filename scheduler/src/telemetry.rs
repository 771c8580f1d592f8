//! What the scheduler counts. Every metric is named here and nowhere else.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use oc_proto::v1::SandboxState;

const CREATES: &str = "oc_scheduler_creates_total";
const CREATE_SECONDS: &str = "oc_scheduler_create_seconds";
const PLACED_AGAIN: &str = "oc_scheduler_placed_again_total";
const DELETES: &str = "oc_scheduler_deletes_total";
const CONFLICTS: &str = "oc_scheduler_ledger_conflicts_total";
const ACTIONS: &str = "oc_scheduler_reconcile_actions_total";
const UNREACHABLE: &str = "oc_scheduler_hosts_unreachable_total";
const REPAIRED: &str = "oc_scheduler_counts_repaired_total";
const SANDBOXES: &str = "oc_scheduler_sandboxes";

/// Tells the recorder what the numbers mean. Called once, by the process that owns it.
pub fn describe() {
    describe_counter!(CREATES, "Creates, by result: ok, or the reason of the refusal");
    describe_histogram!(CREATE_SECONDS, Unit::Seconds, "From a create to its sandbox running");
    describe_counter!(PLACED_AGAIN, "Sandboxes that were given another host because the first failed");
    describe_counter!(DELETES, "Deletes, by result: gone, or left to reconciliation");
    describe_counter!(CONFLICTS, "Transactions that were drafted anew because somebody else was quicker");
    describe_counter!(ACTIONS, "What reconciliation did, by kind and result");
    describe_counter!(UNREACHABLE, "Looks at a host that was not reached");
    describe_counter!(REPAIRED, "Counts of hosts and tenants that disagreed with the records");
    describe_gauge!(SANDBOXES, "Records of sandboxes, by state");
}

/// A create ended.
pub fn created(result: &'static str, elapsed: Duration) {
    counter!(CREATES, "result" => result).increment(1);
    if result == "ok" {
        histogram!(CREATE_SECONDS).record(elapsed);
    }
}

/// A sandbox goes to another host.
pub fn placed_again() {
    counter!(PLACED_AGAIN).increment(1);
}

/// A delete was answered; `is_gone` if its microVM was gone then.
pub fn deleted(is_gone: bool) {
    counter!(DELETES, "result" => if is_gone { "gone" } else { "left" }).increment(1);
}

/// A transaction is drafted anew.
pub fn ledger_conflict() {
    counter!(CONFLICTS).increment(1);
}

/// Reconciliation acted.
pub fn reconciled(kind: &'static str, is_done: bool) {
    counter!(ACTIONS, "kind" => kind, "result" => if is_done { "done" } else { "failed" }).increment(1);
}

/// A host was not reached.
pub fn host_unreachable() {
    counter!(UNREACHABLE).increment(1);
}

/// Counts were repaired.
pub fn counts_repaired(number: usize) {
    counter!(REPAIRED).increment(number as u64);
}

/// So many records are in each state.
pub fn sandboxes(states: impl Iterator<Item = SandboxState>) {
    const SHOWN: [(SandboxState, &str); 4] = [
        (SandboxState::Creating, "creating"),
        (SandboxState::Running, "running"),
        (SandboxState::Failed, "failed"),
        (SandboxState::Deleted, "deleted"),
    ];
    let mut numbers = [0_u32; SHOWN.len()];
    for state in states {
        if let Some(place) = SHOWN.iter().position(|(shown, _)| *shown == state) {
            numbers[place] += 1;
        }
    }
    for ((_, name), number) in SHOWN.iter().zip(numbers) {
        gauge!(SANDBOXES, "state" => *name).set(f64::from(number));
    }
}
