//! `oc watch`: a line for every change of sandboxes, as it happens. A connection that breaks is made anew, and goes on
//! where it broke: nothing is missing, and nothing comes twice.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::future::try_join_all;
use jiff::Timestamp;
use oc_proto::v1::{SandboxEvent, SandboxEventType, SandboxState, WatchSandboxRequest, WatchSandboxResponse};
use tonic::{Request, Status};

use crate::{
    arguments::WatchArguments,
    connection::Connection,
    failure::Failure,
    json,
    output::{self, Output},
};

/// A stream says something every 15 seconds (oc/v1/sandbox.proto): one that is silent for this long is broken.
const SILENCE: Duration = Duration::from_secs(45);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a connection is tried that does not come about: about two minutes.
const ATTEMPTS: usize = 30;

/// `oc watch`.
pub async fn run(connection: &Connection, arguments: WatchArguments, output: Output) -> Result<(), Failure> {
    let WatchArguments { mut ids, after } = arguments;
    ids.sort();
    ids.dedup();
    if ids.is_empty() {
        ids.push(String::new());
    }
    let watches = ids.into_iter().map(|id| {
        let progress = Progress { revision: after.unwrap_or(0), told: 0, is_over: false };
        follow(connection, id, progress, output)
    });
    try_join_all(watches).await?;
    Ok(())
}

/// How far a watch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Progress {
    /// Where to resume; 0 to begin anew.
    revision: u64,
    /// Events that were printed after that: of changes that were written as one and broke off in the middle. They come
    /// again, in the same order.
    told: usize,
    /// Whether nothing can follow.
    is_over: bool,
}

/// Why a stream ended.
enum End {
    /// It is to be resumed.
    Old,
    /// It broke.
    Broken(Failure),
}

/// Prints the events of one sandbox until it is deleted, or of all for ever.
async fn follow(
    connection: &Connection,
    id: String,
    mut progress: Progress,
    output: Output,
) -> Result<(), Failure> {
    let patience = ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_max_times(ATTEMPTS)
        .with_jitter();
    let mut pauses = patience.build();
    loop {
        let before = progress;
        let end = stream(connection, &id, &mut progress, output).await?;
        if progress.is_over {
            return Ok(());
        }
        if progress != before {
            pauses = patience.build();
        }
        match end {
            End::Old => {}
            End::Broken(failure) => {
                let Some(pause) = pauses.next() else { return Err(failure) };
                output::note(format_args!("oc: {failure}; trying again"));
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Prints the events of one stream until it ends.
async fn stream(
    connection: &Connection,
    id: &str,
    progress: &mut Progress,
    output: Output,
) -> Result<End, Failure> {
    let request = WatchSandboxRequest { sandbox_id: id.to_owned(), after_revision: progress.revision };
    let mut client = connection.sandboxes();
    let opened = tokio::time::timeout(SILENCE, client.watch_sandbox(Request::new(request))).await;
    let mut messages = match opened {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return broken(status),
        Err(_) => return Ok(End::Broken(silent())),
    };
    // What comes again of a part that was printed already.
    let mut again = std::mem::take(&mut progress.told);
    loop {
        let message = match tokio::time::timeout(SILENCE, messages.message()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return Ok(End::Old),
            Ok(Err(status)) => return broken(status),
            Err(_) => return Ok(End::Broken(silent())),
        };
        let WatchSandboxResponse { event, revision } = message;
        if let Some(event) = event {
            progress.told += 1;
            progress.is_over |= !id.is_empty() && event.state() == SandboxState::Deleted;
            match again.checked_sub(1) {
                Some(rest) => again = rest,
                None => print(&event, output)?,
            }
        }
        if revision > progress.revision {
            (progress.revision, progress.told, again) = (revision, 0, 0);
        }
    }
}

/// What an error of a stream means: that it is to be resumed, or the end.
fn broken(status: Status) -> Result<End, Failure> {
    let failure = Failure::from(status);
    if failure.is_passing() { Ok(End::Broken(failure)) } else { Err(failure) }
}

fn silent() -> Failure {
    Failure::Stalled("the connection is silent".to_owned())
}

fn print(event: &SandboxEvent, output: Output) -> Result<(), Failure> {
    output.line(&if output.is_json() { json::of(event).to_string() } else { text(event) })
}

/// `12:34:56  sb-…  creating → running  42`.
fn text(event: &SandboxEvent) -> String {
    let word = |state: SandboxState| json::enum_word("SandboxState", state.as_str_name());
    let id = event.sandbox.as_ref().map_or("", |sandbox| sandbox.sandbox_id.as_str());
    let seen = event.seen_at.and_then(|at| Timestamp::new(at.seconds, at.nanos).ok());
    let seen = seen.map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()).unwrap_or_default();
    let now = word(event.state());
    let change = match (event.r#type(), event.previous_state()) {
        (SandboxEventType::Current, _) => format!("is {now}"),
        (_, SandboxState::Unspecified) => format!("new → {now}"),
        (SandboxEventType::Updated, _) => format!("{now}, updated"),
        (_, before) => format!("{} → {now}", word(before)),
    };
    format!("{seen}  {}  {change:26}  {}", output::Printable(id), event.revision)
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::Sandbox;

    use super::*;

    #[test]
    fn a_line_says_when_what_and_from_where_to_where() {
        let mut event = SandboxEvent {
            revision: 42,
            seen_at: Some(prost_types::Timestamp { seconds: 0, nanos: 5 }),
            r#type: SandboxEventType::StateChanged.into(),
            sandbox: Some(Sandbox { sandbox_id: "sb-1".into(), ..Sandbox::default() }),
            state: SandboxState::Waking.into(),
            previous_state: SandboxState::Hibernated.into(),
        };
        assert_eq!(text(&event), "1970-01-01T00:00:00Z  sb-1  hibernated → waking         42");
        event.set_type(SandboxEventType::Updated);
        assert!(text(&event).contains("  waking, updated  "));
        event.set_type(SandboxEventType::Current);
        assert!(text(&event).contains("  is waking  "));
        event.set_previous_state(SandboxState::Unspecified);
        event.set_type(SandboxEventType::Created);
        assert!(text(&event).contains("  new → waking  "));
    }
}
