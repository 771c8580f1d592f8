//! What the agent counts. Every metric is named here and nowhere else.

use std::time::Instant;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use tracing::debug;

use crate::{journal::StartPath, vm::start::StartError};

const CREATES: &str = "oc_agent_creates_total";
const CREATE_SECONDS: &str = "oc_agent_create_seconds";
const START_STEP_SECONDS: &str = "oc_agent_start_step_seconds";
const ATTEMPTS_FAILED: &str = "oc_agent_start_attempts_failed_total";
const RUNNING: &str = "oc_agent_vms_running";
const PAUSED: &str = "oc_agent_vms_paused";
const FIRST_TIER_LEFT: &str = "oc_agent_first_tier_left_total";
const FIRST_TIER_FAILED: &str = "oc_agent_first_tier_failures_total";
const WAKES: &str = "oc_agent_wakes_total";
const LOST: &str = "oc_agent_vms_lost_total";
const POOL_READY: &str = "oc_agent_pool_ready";
const POOL_FAILED: &str = "oc_agent_pool_failures_total";
const UPLOADED: &str = "oc_agent_snapshots_uploaded_total";
const CHUNKS_PUT: &str = "oc_agent_chunks_put_total";
const FIRECRACKER: &str = "oc_agent_firecracker_total";
const FETCHED: &str = "oc_agent_snapshots_fetched_total";

/// Tells the recorder what the numbers mean. Called once, by the process that owns it.
pub fn describe() {
    describe_counter!(CREATES, "Creates, by how the VM was started and by result");
    describe_histogram!(CREATE_SECONDS, Unit::Seconds, "From a create to an answering guest");
    describe_histogram!(START_STEP_SECONDS, Unit::Seconds, "Steps of starting a VM");
    describe_counter!(ATTEMPTS_FAILED, "Ways of starting a VM that failed and were followed by another");
    describe_gauge!(RUNNING, "VMs of sandboxes that run");
    describe_gauge!(PAUSED, "Hibernated VMs whose process stands still with their memory");
    describe_counter!(FIRST_TIER_LEFT, "Hibernated VMs whose paused process was ended, by why");
    describe_counter!(
        FIRST_TIER_FAILED,
        "Times that a paused VM could not be captured, or ended, and will be later"
    );
    describe_counter!(WAKES, "Wakes, by what the VM went on from");
    describe_counter!(LOST, "VMs of sandboxes that ran and were lost");
    describe_gauge!(POOL_READY, "Clones that wait in the pool");
    describe_counter!(POOL_FAILED, "Clones that could not be made for the pool or died in it");
    describe_counter!(UPLOADED, "Snapshots that were put into the object store, or found there");
    describe_counter!(CHUNKS_PUT, "Chunks of snapshots that were put into the object store");
    describe_counter!(FIRECRACKER, "What Firecrackers have counted, by their name of it");
    describe_counter!(FETCHED, "Snapshots that were fetched from the object store");
}

/// Times one create.
#[derive(Debug)]
pub struct Create(Instant);

impl Create {
    /// Starts the clock.
    pub fn begin() -> Self {
        Self(Instant::now())
    }

    /// Counts the create.
    pub fn end(self, result: &Result<StartPath, StartError>) {
        let (path, outcome) = match result {
            Ok(path) => (path.as_str(), "ok"),
            Err(StartError::Full(_)) => ("none", "full"),
            Err(StartError::NoTemplate(_)) => ("none", "no_template"),
            Err(_) => ("none", "failed"),
        };
        counter!(CREATES, "path" => path, "result" => outcome).increment(1);
        if result.is_ok() {
            histogram!(CREATE_SECONDS, "path" => path).record(self.0.elapsed());
        }
    }
}

/// Times one step of starting a VM.
pub async fn step<T>(name: &'static str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = work.await;
    let took = begun.elapsed();
    histogram!(START_STEP_SECONDS, "step" => name).record(took);
    debug!(step = name, took_us = took.as_micros(), "start step");
    done
}

/// Counts a running VM while it lives.
#[derive(Debug)]
pub struct Running(());

/// A VM of a sandbox runs until the answer is dropped.
pub fn running() -> Running {
    gauge!(RUNNING).increment(1);
    Running(())
}

impl Drop for Running {
    fn drop(&mut self) {
        gauge!(RUNNING).decrement(1);
    }
}

/// Counts a hibernated VM whose process stands still while it lives.
#[derive(Debug)]
pub struct Paused(());

/// A hibernated VM keeps its process until the answer is dropped.
pub fn paused() -> Paused {
    gauge!(PAUSED).increment(1);
    Paused(())
}

impl Drop for Paused {
    fn drop(&mut self) {
        gauge!(PAUSED).decrement(1);
    }
}

/// A paused process was ended: its `time` was over, there was `pressure`, or it was `lost`.
pub fn first_tier_left(why: &'static str) {
    counter!(FIRST_TIER_LEFT, "why" => why).increment(1);
}

/// A paused VM could not be captured, or ended; that is tried again.
pub fn first_tier_failed() {
    counter!(FIRST_TIER_FAILED).increment(1);
}

/// A hibernated VM was woken.
pub fn woken(path: StartPath) {
    counter!(WAKES, "path" => path.as_str()).increment(1);
}

/// A VM that ran was lost.
pub fn lost() {
    counter!(LOST).increment(1);
}

/// One way of starting a VM failed.
pub fn attempt_failed(path: StartPath) {
    counter!(ATTEMPTS_FAILED, "path" => path.as_str()).increment(1);
}

/// So many clones wait.
pub fn pool_ready(ready: usize) {
    // No pool holds anywhere near 2^32 clones.
    gauge!(POOL_READY).set(f64::from(u32::try_from(ready).unwrap_or(u32::MAX)));
}

/// A snapshot is in the object store, of which so many chunks were put.
pub fn uploaded(chunks_put: usize) {
    counter!(UPLOADED).increment(1);
    counter!(CHUNKS_PUT).increment(chunks_put as u64);
}

/// A snapshot was fetched from the object store.
pub fn fetched() {
    counter!(FETCHED).increment(1);
}

/// A Firecracker has counted so much more of what it calls `name`.
pub fn firecracker(name: &str, added: u64) {
    counter!(FIRECRACKER, "name" => name.to_owned()).increment(added);
}

/// A clone could not be made for the pool, or died in it.
pub fn pool_failed() {
    counter!(POOL_FAILED).increment(1);
}
