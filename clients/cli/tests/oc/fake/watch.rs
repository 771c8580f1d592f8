//! One sandbox's life as a stream of changes that breaks after each few messages.

use std::sync::{Arc, Mutex};

use futures_util::{StreamExt as _, stream, stream::BoxStream};
use oc_proto::v1::{
    Sandbox, SandboxEvent, SandboxEventType, SandboxState, WatchSandboxRequest, WatchSandboxResponse,
};
use tonic::{Code, Status};

use super::{State, refused};

pub type Events = BoxStream<'static, Result<WatchSandboxResponse, Status>>;

/// Kind, state before and after, revision of the change, and where to resume after it.
const LIFE: &[(SandboxEventType, SandboxState, SandboxState, u64, u64)] = &[
    (SandboxEventType::Created, SandboxState::Unspecified, SandboxState::Creating, 3, 3),
    (SandboxEventType::StateChanged, SandboxState::Creating, SandboxState::Running, 5, 5),
    // Written as one.
    (SandboxEventType::Updated, SandboxState::Running, SandboxState::Running, 7, 5),
    (SandboxEventType::StateChanged, SandboxState::Running, SandboxState::Hibernating, 7, 5),
    (SandboxEventType::StateChanged, SandboxState::Hibernating, SandboxState::Hibernated, 7, 7),
    (SandboxEventType::Deleted, SandboxState::Hibernated, SandboxState::Deleted, 9, 9),
];

/// The changes after the revision asked for, a few at most: then the stream breaks, in another way each time.
pub fn open(state: &Arc<Mutex<State>>, request: WatchSandboxRequest) -> Result<Events, Status> {
    let mut state = state.lock().unwrap();
    let (turn, after) = (state.watched.len(), request.after_revision);
    let id = request.sandbox_id.clone();
    state.watched.push(request);
    match id.as_str() {
        "sb-none" => return Err(refused(Code::NotFound, "SANDBOX_NOT_FOUND", "there is no such sandbox")),
        "sb-old" => return Err(refused(Code::OutOfRange, "WATCH_COMPACTED", "watch anew")),
        _ => {}
    }
    let rest: Vec<_> = LIFE.iter().filter(|(.., revision, _)| *revision > after).collect();
    let (few, is_last) = (turn + 1, rest.len() <= turn + 1);
    let progress = Ok(WatchSandboxResponse { event: None, revision: after });
    let messages = rest.into_iter().take(few).map(move |&(kind, before, now, revision, resume)| {
        let sandbox = Sandbox { sandbox_id: "sb-1".into(), state: now.into(), ..Sandbox::default() };
        let event = SandboxEvent {
            revision,
            seen_at: None,
            r#type: kind.into(),
            sandbox: Some(sandbox),
            state: now.into(),
            previous_state: before.into(),
        };
        Ok(WatchSandboxResponse { event: Some(event), revision: resume })
    });
    let messages: Vec<_> = std::iter::once(progress).chain(messages).collect();
    let end = match turn {
        _ if is_last && !id.is_empty() => None,
        _ if is_last => return Ok(stream::iter(messages).chain(stream::pending()).boxed()),
        0 => Some(Err(refused(Code::Unavailable, "HOST_UNAVAILABLE", "try again"))),
        1 => None,
        _ => Some(Err(Status::unknown("broken pipe"))),
    };
    Ok(stream::iter(messages).chain(stream::iter(end)).boxed())
}
