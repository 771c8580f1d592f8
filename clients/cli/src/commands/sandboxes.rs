//! `oc create | ls | get | kill` and `oc sandbox …`.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use oc_proto::v1::{
    CreateSandboxRequest, DeleteSandboxRequest, EgressPolicy, GetSandboxRequest, HibernateSandboxRequest,
    ListSandboxesRequest, PreviewAuth, Sandbox, SandboxState, SetTimeoutRequest, WakeSandboxRequest,
};

use crate::{
    arguments::{CreateArguments, Egress},
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
    progress,
};

/// A cold boot on a slow, busy host takes this long; from the pool it is milliseconds.
const CREATE_TIMEOUT: Duration = Duration::from_secs(180);
/// Memory is written and read at the disk's pace.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(180);
/// As many as the service gives at once.
const PAGE: i32 = 1000;
const KILLS_AT_ONCE: usize = 16;

/// `oc create`.
pub async fn create(
    connection: &Connection,
    arguments: CreateArguments,
    output: Output,
) -> Result<(), Failure> {
    let request = CreateSandboxRequest {
        template_id: arguments.template.unwrap_or_default(),
        timeout: arguments.timeout,
        cpu_count: arguments.cpu.unwrap_or_default(),
        memory_mb: arguments.memory.unwrap_or_default(),
        disk_mb: arguments.disk.unwrap_or_default(),
        envs: arguments.env.into_iter().collect(),
        metadata: arguments.metadata.into_iter().collect(),
        egress: match arguments.egress {
            None => EgressPolicy::Unspecified,
            Some(Egress::Open) => EgressPolicy::Open,
            Some(Egress::None) => EgressPolicy::None,
        }
        .into(),
        preview_auth: match (arguments.preview_auth, arguments.preview_auth_token) {
            (None, None) => None,
            (scheme, token) => {
                Some(PreviewAuth { scheme: scheme.unwrap_or_default(), token: token.unwrap_or_default() })
            }
        },
    };
    let mut sandboxes = connection.sandboxes();
    let answer = sandboxes.create_sandbox(within(CREATE_TIMEOUT, request));
    let sandbox =
        progress::during("creating a sandbox", answer).await?.into_inner().sandbox.unwrap_or_default();
    if !output.is_json() && !sandbox.preview_auth_token.is_empty() {
        output::note("token that requests to its ports must show; it is shown only now:");
        output::note(output::Printable(&sandbox.preview_auth_token));
    }
    show(&sandbox, output)
}

/// `oc get`.
pub async fn get(connection: &Connection, id: String, output: Output) -> Result<(), Failure> {
    let request = within(CALL_TIMEOUT, GetSandboxRequest { sandbox_id: id });
    let answer = connection.sandboxes().get_sandbox(request).await?.into_inner();
    show(&answer.sandbox.unwrap_or_default(), output)
}

/// `oc ls`.
pub async fn list(connection: &Connection, output: Output) -> Result<(), Failure> {
    let sandboxes = progress::during("listing sandboxes", all(connection)).await?;
    output.show(|| json::list(&sandboxes), || table(&sandboxes, Timestamp::now()))
}

/// `oc kill`: tries all, and fails with the first error.
pub async fn kill(connection: &Connection, ids: Vec<String>, output: Output) -> Result<(), Failure> {
    let kills = stream::iter(ids).map(|id| delete(connection, id)).buffered(KILLS_AT_ONCE);
    let results: Vec<_> = progress::during("deleting", kills.collect()).await;
    results.into_iter().collect::<Result<(), _>>()?;
    output.done()
}

/// `oc sandbox hibernate`.
pub async fn hibernate(connection: &Connection, id: String, output: Output) -> Result<(), Failure> {
    let mut sandboxes = connection.sandboxes();
    let answer =
        sandboxes.hibernate_sandbox(within(STORE_TIMEOUT, HibernateSandboxRequest { sandbox_id: id }));
    let stored = progress::during("hibernating", answer).await?.into_inner();
    output.show(
        || json::of(&stored),
        || {
            output::pairs([
                ("id", stored.sandbox_id.clone()),
                ("status", json::enum_word("SandboxState", stored.state().as_str_name())),
                ("tier", json::enum_word("HibernationTier", stored.tier().as_str_name())),
                ("stored", mebibytes(stored.size_bytes)),
            ])
        },
    )
}

/// `oc sandbox wake`.
pub async fn wake(connection: &Connection, id: String, output: Output) -> Result<(), Failure> {
    let mut sandboxes = connection.sandboxes();
    let request = WakeSandboxRequest { sandbox_id: id, timeout: None };
    let answer = sandboxes.wake_sandbox(within(STORE_TIMEOUT, request));
    let sandbox = progress::during("waking", answer).await?.into_inner().sandbox.unwrap_or_default();
    show(&sandbox, output)
}

/// `oc sandbox set-timeout`.
pub async fn set_timeout(
    connection: &Connection,
    id: String,
    seconds: i32,
    output: Output,
) -> Result<(), Failure> {
    let request = within(CALL_TIMEOUT, SetTimeoutRequest { sandbox_id: id, timeout: seconds });
    connection.sandboxes().set_timeout(request).await?;
    output.done()
}

/// Deletes one sandbox.
pub async fn delete(connection: &Connection, id: String) -> Result<(), Failure> {
    let request = within(CALL_TIMEOUT, DeleteSandboxRequest { sandbox_id: id });
    connection.sandboxes().delete_sandbox(request).await?;
    Ok(())
}

/// Every sandbox of the caller.
pub async fn all(connection: &Connection) -> Result<Vec<Sandbox>, Failure> {
    let mut client = connection.sandboxes();
    let mut sandboxes = Vec::new();
    let mut page_token = String::new();
    loop {
        let request =
            within(CALL_TIMEOUT, ListSandboxesRequest { page_size: PAGE, page_token: page_token.clone() });
        let page = client.list_sandboxes(request).await?.into_inner();
        sandboxes.extend(page.sandboxes);
        if page.next_page_token.is_empty() || page.next_page_token == page_token {
            return Ok(sandboxes);
        }
        page_token = page.next_page_token;
    }
}

/// One sandbox, with all there is to say about it.
pub fn show(sandbox: &Sandbox, output: Output) -> Result<(), Failure> {
    output.show(|| json::of(sandbox), || details(sandbox))
}

/// Sandboxes, a line each.
pub fn table(sandboxes: &[Sandbox], now: Timestamp) -> String {
    let rows = sandboxes.iter().map(|sandbox| {
        [
            sandbox.sandbox_id.clone(),
            sandbox.template_id.clone(),
            status(sandbox),
            sandbox.cpu_count.to_string(),
            format!("{}MiB", sandbox.memory_mb),
            sandbox.started_at.map(|started| age(started.seconds, now)).unwrap_or_default(),
        ]
    });
    output::table(["ID", "TEMPLATE", "STATUS", "CPU", "MEM", "AGE"], rows)
}

fn details(sandbox: &Sandbox) -> String {
    let mut metadata: Vec<_> =
        sandbox.metadata.iter().map(|(name, value)| format!("{name}={value}")).collect();
    metadata.sort();
    let is_deleted = sandbox.state() == SandboxState::Deleted;
    let timeout = if sandbox.timeout == 0 { "none".to_owned() } else { format!("{}s", sandbox.timeout) };
    output::pairs([
        ("id", sandbox.sandbox_id.clone()),
        ("status", status(sandbox)),
        ("failure", sandbox.failure.clone()),
        ("template", sandbox.template_id.clone()),
        ("cpu", sandbox.cpu_count.to_string()),
        ("memory", format!("{} MiB", sandbox.memory_mb)),
        ("disk", format!("{} MiB", sandbox.disk_mb)),
        ("idle timeout", timeout),
        ("started", sandbox.started_at.map(|at| time(at.seconds)).unwrap_or_default()),
        (
            if is_deleted { "deleted" } else { "hibernates" },
            sandbox.end_at.map(|at| time(at.seconds)).unwrap_or_default(),
        ),
        ("start", sandbox.start_path.clone()),
        ("stored", mebibytes(sandbox.stored_bytes)),
        ("uploaded", if sandbox.is_uploaded { "yes" } else { "" }.to_owned()),
        ("from checkpoint", sandbox.from_checkpoint_id.clone()),
        ("forked from", sandbox.forked_from.clone()),
        ("egress", json::enum_word("EgressPolicy", sandbox.egress().as_str_name())),
        ("host", sandbox.worker_id.clone()),
        ("region", sandbox.region.clone()),
        ("accelerator", sandbox.accelerator.clone()),
        ("metadata", metadata.join(" ")),
        ("connect url", sandbox.connect_url.clone()),
    ])
}

/// Nothing where there is nothing.
fn mebibytes(bytes: i64) -> String {
    if bytes == 0 { String::new() } else { format!("{} MiB", bytes >> 20) }
}

fn status(sandbox: &Sandbox) -> String {
    json::enum_word("SandboxState", sandbox.state().as_str_name())
}

/// A point in time, for people.
pub fn time(unix_seconds: i64) -> String {
    Timestamp::from_second(unix_seconds).map(|at| at.to_string()).unwrap_or_default()
}

/// How long ago, in its biggest whole unit.
pub fn age(unix_seconds: i64, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(unix_seconds).max(0);
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp as ProtoTimestamp;

    use super::*;

    #[test]
    fn ages_use_the_biggest_whole_unit() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (86400, "1d"), (-5, "0s")]
        {
            assert_eq!(age(1_000_000 - seconds, now), text);
        }
    }

    #[test]
    fn the_table_has_the_published_columns() {
        let sandbox = Sandbox {
            sandbox_id: "sb-1".into(),
            template_id: "base".into(),
            state: SandboxState::Running.into(),
            cpu_count: 1,
            memory_mb: 1024,
            started_at: Some(ProtoTimestamp { seconds: 40, nanos: 0 }),
            ..Sandbox::default()
        };
        let text = table(&[sandbox], Timestamp::from_second(100).unwrap());
        assert_eq!(
            text,
            "ID    TEMPLATE  STATUS   CPU  MEM      AGE\nsb-1  base      running  1    1024MiB  1m\n"
        );
    }
}
