//! `oc fork` and `oc checkpoint spawn`.

use std::time::Duration;

use jiff::Timestamp;
use oc_proto::v1::{ForkCheckpointRequest, ForkMode, ForkSandboxRequest};

use crate::{
    arguments::checkpoints::{Branches, ForkArguments},
    commands::{checkpoints::milliseconds, sandboxes},
    connection::{Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
    progress,
};

/// Many sandboxes that boot at once share their host's processors.
const FORK_TIMEOUT: Duration = Duration::from_secs(600);
/// What IDs of checkpoints begin with, see `Checkpoint.checkpoint_id`.
const CHECKPOINT_PREFIX: &str = "cp-";

/// `oc fork`: of a checkpoint if the ID is one's.
pub async fn fork(connection: &Connection, arguments: ForkArguments, output: Output) -> Result<(), Failure> {
    let ForkArguments { id, branches } = arguments;
    if id.starts_with(CHECKPOINT_PREFIX) {
        fork_checkpoint(connection, id, branches, output).await
    } else {
        fork_sandbox(connection, id, branches, output).await
    }
}

/// `oc checkpoint spawn`.
pub async fn fork_checkpoint(
    connection: &Connection,
    id: String,
    branches: Branches,
    output: Output,
) -> Result<(), Failure> {
    let what = what(&branches);
    let request = ForkCheckpointRequest {
        checkpoint_id: id,
        count: branches.count,
        mode: mode(&branches).into(),
        timeout: branches.timeout,
        envs: branches.env.into_iter().collect(),
        metadata: branches.metadata.into_iter().collect(),
    };
    let mut checkpoints = connection.checkpoints();
    let answer = checkpoints.fork_checkpoint(within(FORK_TIMEOUT, request));
    let forked = progress::during(what, answer).await?.into_inner();
    output.show(|| json::of(&forked), || sandboxes::table(&forked.sandboxes, Timestamp::now()))
}

async fn fork_sandbox(
    connection: &Connection,
    id: String,
    branches: Branches,
    output: Output,
) -> Result<(), Failure> {
    let what = what(&branches);
    let request = ForkSandboxRequest {
        sandbox_id: id.clone(),
        count: branches.count,
        mode: mode(&branches).into(),
        timeout: branches.timeout,
        envs: branches.env.into_iter().collect(),
        metadata: branches.metadata.into_iter().collect(),
    };
    let mut checkpoints = connection.checkpoints();
    let answer = checkpoints.fork_sandbox(within(FORK_TIMEOUT, request));
    let forked = progress::during(what, answer).await?.into_inner();
    output.show(|| json::of(&forked), || sandboxes::table(&forked.sandboxes, Timestamp::now()))?;
    if !output.is_json() {
        // Beside the table, which is as `oc ls` has it.
        let (pause, freeze) = (milliseconds(forked.pause_us), milliseconds(forked.freeze_us));
        output::note(format_args!("{id}: pause {pause}, freeze {freeze}"));
    }
    Ok(())
}

fn mode(branches: &Branches) -> ForkMode {
    if branches.live { ForkMode::Live } else { ForkMode::Cold }
}

fn what(branches: &Branches) -> String {
    match branches.count.unwrap_or(1) {
        1 => "making a sandbox".to_owned(),
        count => format!("making {count} sandboxes"),
    }
}
