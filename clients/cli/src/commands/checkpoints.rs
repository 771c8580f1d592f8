//! `oc checkpoint …`.

mod tree;

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use oc_proto::v1::{
    Checkpoint, CheckpointKind, CheckpointState, CreateCheckpointRequest, DeleteCheckpointRequest,
    GetCheckpointRequest, ListCheckpointsRequest, RestoreCheckpointRequest, RetentionMode, RetentionPolicy,
    VerifyCheckpointRequest, VerifyCheckpointResponse,
};
use serde_json::{Value as Json, json};

use crate::{
    arguments::checkpoints::{CheckpointCommand, Kind, Retention, TakeArguments},
    commands::{
        forks,
        sandboxes::{self, STORE_TIMEOUT, time},
    },
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
    progress,
};

/// All of the biggest disk and memory is read, at the pace of a slow disk.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(900);
const DELETIONS_AT_ONCE: usize = 16;
/// They read from the same disk: more at once make none faster.
const VERIFICATIONS_AT_ONCE: usize = 2;

/// `oc checkpoint …`.
pub async fn run(connection: &Connection, command: CheckpointCommand, output: Output) -> Result<(), Failure> {
    match command {
        CheckpointCommand::Create(arguments) => create(connection, arguments, output).await,
        CheckpointCommand::List { sandbox, tree } => {
            list(connection, sandbox.unwrap_or_default(), tree, output).await
        }
        CheckpointCommand::Get { checkpoint } => get(connection, checkpoint, output).await,
        CheckpointCommand::Delete { checkpoints } => delete(connection, checkpoints, output).await,
        CheckpointCommand::Restore { sandbox, checkpoint } => {
            restore(connection, sandbox, checkpoint, output).await
        }
        CheckpointCommand::Spawn { checkpoint, branches } => {
            forks::fork_checkpoint(connection, checkpoint, branches, output).await
        }
        CheckpointCommand::Fsck { checkpoints, all: false } => verify(connection, checkpoints, output).await,
        CheckpointCommand::Fsck { all: true, .. } => {
            let checkpoints = taken(connection).await?;
            verify(connection, checkpoints, output).await
        }
    }
}

async fn create(connection: &Connection, arguments: TakeArguments, output: Output) -> Result<(), Failure> {
    let kind = match arguments.kind {
        Kind::Full => CheckpointKind::Full,
        Kind::DiskOnly => CheckpointKind::DiskOnly,
    };
    let mode = match arguments.retention_policy {
        Retention::None => RetentionMode::None,
        Retention::DeleteOldest => RetentionMode::DeleteOldest,
    };
    let request = CreateCheckpointRequest {
        sandbox_id: arguments.id,
        name: arguments.name,
        kind: kind.into(),
        retention_policy: Some(RetentionPolicy {
            mode: mode.into(),
            max_count: arguments.retention_max_count.unwrap_or_default(),
        }),
    };
    let mut checkpoints = connection.checkpoints();
    let answer = checkpoints.create_checkpoint(within(STORE_TIMEOUT, request));
    let checkpoint = progress::during("taking a checkpoint", answer).await?.into_inner().checkpoint;
    show(&checkpoint.unwrap_or_default(), output)
}

async fn get(connection: &Connection, id: String, output: Output) -> Result<(), Failure> {
    let request = GetCheckpointRequest { checkpoint_id: id, sandbox_id: String::new() };
    let answer = connection.checkpoints().get_checkpoint(within(CALL_TIMEOUT, request)).await?;
    show(&answer.into_inner().checkpoint.unwrap_or_default(), output)
}

async fn list(
    connection: &Connection,
    sandbox_id: String,
    is_tree: bool,
    output: Output,
) -> Result<(), Failure> {
    let checkpoints = progress::during("listing checkpoints", all(connection, sandbox_id)).await?;
    output.show(
        || json::list(&checkpoints),
        || if is_tree { tree::draw(&checkpoints, Timestamp::now()) } else { table(&checkpoints) },
    )
}

/// Tries all, and fails with the first error.
async fn delete(connection: &Connection, ids: Vec<String>, output: Output) -> Result<(), Failure> {
    let deletions = stream::iter(ids)
        .map(async |checkpoint_id| {
            let request = DeleteCheckpointRequest { checkpoint_id, sandbox_id: String::new() };
            connection.checkpoints().delete_checkpoint(within(CALL_TIMEOUT, request)).await
        })
        .buffered(DELETIONS_AT_ONCE);
    let results: Vec<_> = progress::during("deleting", deletions.collect()).await;
    results.into_iter().collect::<Result<Vec<_>, _>>()?;
    output.done()
}

async fn restore(
    connection: &Connection,
    sandbox_id: String,
    checkpoint_id: String,
    output: Output,
) -> Result<(), Failure> {
    let mut checkpoints = connection.checkpoints();
    let request = RestoreCheckpointRequest { sandbox_id, checkpoint_id };
    let answer = checkpoints.restore_checkpoint(within(STORE_TIMEOUT, request));
    let sandbox = progress::during("restoring", answer).await?.into_inner().sandbox.unwrap_or_default();
    sandboxes::show(&sandbox, output)
}

/// What became of verifying one checkpoint.
struct Verified {
    id: String,
    /// What was read and compared.
    result: Result<VerifyCheckpointResponse, Failure>,
}

/// Tries all, says what became of each, and fails with the first error.
async fn verify(connection: &Connection, ids: Vec<String>, output: Output) -> Result<(), Failure> {
    let what = match ids.len() {
        1 => "verifying a checkpoint".to_owned(),
        count => format!("verifying {count} checkpoints"),
    };
    let verifications = stream::iter(ids)
        .map(async |id: String| {
            let request = VerifyCheckpointRequest { checkpoint_id: id.clone() };
            let answer = connection.checkpoints().verify_checkpoint(within(VERIFY_TIMEOUT, request)).await;
            Verified { id, result: answer.map(|answer| answer.into_inner()).map_err(Failure::from) }
        })
        .buffered(VERIFICATIONS_AT_ONCE);
    let verified: Vec<_> = progress::during(what, verifications.collect()).await;
    output.show(|| verified.iter().map(verdict).collect(), || verdicts(&verified))?;
    verified.into_iter().try_for_each(|checkpoint| checkpoint.result.map(drop))
}

fn verdict(verified: &Verified) -> Json {
    match &verified.result {
        Ok(VerifyCheckpointResponse { verified_bytes, uploaded_bytes }) => json!({
            "id": verified.id,
            "ok": true,
            "verifiedBytes": verified_bytes,
            "uploadedBytes": uploaded_bytes,
        }),
        Err(failure) => {
            json!({ "id": verified.id, "ok": false, "error": failure.to_string(), "code": failure.code() })
        }
    }
}

fn verdicts(verified: &[Verified]) -> String {
    let rows = verified.iter().map(|checkpoint| {
        let (result, read, uploaded, error) = match &checkpoint.result {
            Ok(verified) => {
                ("ok".to_owned(), mib(verified.verified_bytes), mib(verified.uploaded_bytes), String::new())
            }
            Err(failure) => (failure.code(), String::new(), String::new(), failure.to_string()),
        };
        [checkpoint.id.clone(), result, read, uploaded, error]
    });
    output::table(["ID", "RESULT", "READ", "UPLOADED", "ERROR"], rows)
}

/// IDs of all checkpoints that should be whole: one that is being taken is not yet.
async fn taken(connection: &Connection) -> Result<Vec<String>, Failure> {
    let checkpoints = progress::during("listing checkpoints", all(connection, String::new())).await?;
    let taken =
        checkpoints.into_iter().filter(|checkpoint| checkpoint.state() != CheckpointState::Processing);
    Ok(taken.map(|checkpoint| checkpoint.checkpoint_id).collect())
}

/// Every checkpoint of a sandbox; of all the caller's if its ID is empty.
async fn all(connection: &Connection, sandbox_id: String) -> Result<Vec<Checkpoint>, Failure> {
    let request = within(CALL_TIMEOUT, ListCheckpointsRequest { sandbox_id });
    Ok(connection.checkpoints().list_checkpoints(request).await?.into_inner().checkpoints)
}

fn show(checkpoint: &Checkpoint, output: Output) -> Result<(), Failure> {
    output.show(|| json::of(checkpoint), || details(checkpoint))
}

fn table(checkpoints: &[Checkpoint]) -> String {
    let rows = checkpoints.iter().map(|checkpoint| {
        [
            checkpoint.checkpoint_id.clone(),
            checkpoint.name.clone(),
            kind(checkpoint),
            status(checkpoint),
            mib(checkpoint.size_bytes),
            mib(checkpoint.memory_changed_bytes.saturating_add(checkpoint.disk_changed_bytes)),
            created(checkpoint),
            checkpoint.sandbox_id.clone(),
        ]
    });
    output::table(["ID", "NAME", "KIND", "STATUS", "SIZE", "CHANGED", "CREATED", "SANDBOX"], rows)
}

fn details(checkpoint: &Checkpoint) -> String {
    output::pairs([
        ("id", checkpoint.checkpoint_id.clone()),
        ("name", checkpoint.name.clone()),
        ("sandbox", checkpoint.sandbox_id.clone()),
        ("kind", kind(checkpoint)),
        ("status", status(checkpoint)),
        ("failure", checkpoint.failure.clone()),
        ("created", created(checkpoint)),
        ("parent", checkpoint.parent_id.clone()),
        ("size", mib(checkpoint.size_bytes)),
        ("memory changed", mib(checkpoint.memory_changed_bytes)),
        ("disk changed", mib(checkpoint.disk_changed_bytes)),
        ("quiesced", if checkpoint.is_quiesced { "yes" } else { "no" }.to_owned()),
        ("pause", milliseconds(checkpoint.pause_us)),
        ("freeze", milliseconds(checkpoint.freeze_us)),
        ("template", checkpoint.template_id.clone()),
        ("cpu", checkpoint.cpu_count.to_string()),
        ("memory", format!("{} MiB", checkpoint.memory_mb)),
        ("disk", format!("{} MiB", checkpoint.disk_mb)),
        ("host", checkpoint.worker_id.clone()),
        ("uploaded", if checkpoint.is_uploaded { "yes" } else { "no" }.to_owned()),
        ("manifest", checkpoint.manifest_digest.clone()),
    ])
}

fn kind(checkpoint: &Checkpoint) -> String {
    json::enum_word("CheckpointKind", checkpoint.kind().as_str_name())
}

fn status(checkpoint: &Checkpoint) -> String {
    json::enum_word("CheckpointState", checkpoint.state().as_str_name())
}

fn created(checkpoint: &Checkpoint) -> String {
    checkpoint.created_at.map(|at| time(at.seconds)).unwrap_or_default()
}

/// Bytes for people: what a checkpoint changed is often less than one MiB.
fn mib(bytes: i64) -> String {
    format!("{:.1}MiB", bytes as f64 / f64::from(1 << 20))
}

/// Microseconds for people.
pub fn milliseconds(microseconds: i64) -> String {
    format!("{:.1} ms", microseconds as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp as ProtoTimestamp;

    use super::*;

    #[test]
    fn the_table_has_the_published_columns() {
        let checkpoint = Checkpoint {
            checkpoint_id: "cp-1".into(),
            sandbox_id: "sb-1".into(),
            name: "before\nupgrade".into(),
            kind: CheckpointKind::DiskOnly.into(),
            state: CheckpointState::Ready.into(),
            size_bytes: 5 << 20,
            memory_changed_bytes: 1 << 20,
            disk_changed_bytes: 1 << 19,
            created_at: Some(ProtoTimestamp { seconds: 0, nanos: 0 }),
            ..Checkpoint::default()
        };
        let text = table(&[checkpoint]);
        assert_eq!(
            text,
            "ID    NAME             KIND       STATUS  SIZE    CHANGED  CREATED               SANDBOX\n\
             cp-1  before\\nupgrade  disk_only  ready   5.0MiB  1.5MiB   1970-01-01T00:00:00Z  sb-1\n"
        );
    }

    #[test]
    fn sizes_that_no_checkpoint_has_do_no_harm() {
        let checkpoint = Checkpoint {
            size_bytes: i64::MIN,
            memory_changed_bytes: i64::MAX,
            disk_changed_bytes: i64::MAX,
            created_at: Some(ProtoTimestamp { seconds: i64::MAX, nanos: -1 }),
            pause_us: i64::MIN,
            ..Checkpoint::default()
        };
        assert!(table(std::slice::from_ref(&checkpoint)).contains("8796093022208.0MiB"));
        details(&checkpoint);
    }

    #[test]
    fn times_are_given_in_milliseconds() {
        assert_eq!(milliseconds(0), "0.0 ms");
        assert_eq!(milliseconds(12_345), "12.3 ms");
    }
}
