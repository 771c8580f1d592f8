//! `POST …/exec/run` answers in one piece however long the command takes, and the published Python client gives
//! up after 30 seconds without a byte, whatever timeout the command was given.
//!
//! So when a command takes longer than [`QUIET`] the answer begins: status 200, and a space every [`QUIET`].
//! White space in front of JSON is still JSON. An error after that point can no longer have its status: it is
//! 200 with `{"error", "code"}`.

use std::{convert::Infallible, pin::Pin, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::Frame;
use http_body_util::StreamBody;
use prost_reflect::DynamicMessage;
use tonic::{Status, body::Body};

use crate::{
    rest::answer::{self, Text},
    surface::Rpc,
};

/// Longest time without a byte.
pub const QUIET: Duration = Duration::from_secs(10);

/// RPCs whose answer may take as long as the caller's command does.
const SLOW: [&str; 1] = ["oc.v1.ExecService.Run"];

/// Timeout of a command whose request names none (oc/v1/exec.proto).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// What the mesh adds to a command's own time: the way there and back, and the end of its process group.
const SLACK: Duration = Duration::from_secs(30);

/// Whether the answer may take long.
#[must_use]
pub fn applies_to(rpc: &Rpc) -> bool {
    SLOW.contains(&rpc.method.full_name())
}

/// How long the call may take by what the request itself asks for; `None` for any time.
#[must_use]
pub fn budget(request: &DynamicMessage) -> Option<Duration> {
    let timeout = request.get_field_by_name("timeout");
    if !request.has_field_by_name("timeout") {
        return Some(DEFAULT_TIMEOUT + SLACK);
    }
    match timeout.and_then(|timeout| timeout.as_i32()) {
        Some(0) => None,
        // A negative one is refused by the guest, at once.
        seconds => {
            Some(Duration::from_secs(seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0)) + SLACK)
        }
    }
}

/// A call under way: what it answers as JSON.
pub type Pending = Pin<Box<dyn Future<Output = Result<Text, Status>> + Send>>;

/// Waits for the call, and begins the answer before it if need be. Dropping the answer cancels the call.
pub async fn answer(success: StatusCode, mut pending: Pending) -> Response<Body> {
    match tokio::time::timeout(QUIET, &mut pending).await {
        Ok(Ok(text)) => answer::json(success, text),
        Ok(Err(error)) => answer::error(&error),
        Err(_) => {
            let mut response = answer::json(StatusCode::OK, Bytes::new());
            *response.body_mut() = Body::new(StreamBody::new(spaces_then(pending)));
            response
        }
    }
}

fn spaces_then(
    mut pending: Pending,
) -> impl futures_util::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
    async_stream::stream! {
        loop {
            yield Ok(Frame::data(Bytes::from_static(b" ")));
            if let Ok(outcome) = tokio::time::timeout(QUIET, &mut pending).await {
                let text = outcome.unwrap_or_else(|error| answer::error_json(&error).into());
                yield Ok(Frame::data(text.text));
                // Asked for what follows, the transport has sent the text.
                drop(text.held);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use oc_mesh::error::{Reason, status};

    use super::*;

    fn after(seconds: u64, outcome: Result<Bytes, Status>) -> Pending {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            outcome.map(Text::from)
        })
    }

    async fn text(response: Response<Body>) -> String {
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_quick_answer_has_its_own_status() {
        let answered = answer(StatusCode::OK, after(9, Ok(Bytes::from_static(b"{}")))).await;
        assert_eq!(text(answered).await, "{}");
        let refused = answer(StatusCode::OK, after(1, Err(status(Reason::SandboxDeleted, "gone")))).await;
        assert_eq!(refused.status(), StatusCode::GONE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_one_is_never_quiet_for_long() {
        let started = tokio::time::Instant::now();
        let response = answer(StatusCode::OK, after(35, Ok(Bytes::from_static(b"{\"exitCode\":0}")))).await;
        assert_eq!(response.status(), StatusCode::OK);
        let mut body = response.into_body();
        let mut last = started;
        let mut whole = Vec::new();
        while let Some(frame) = body.frame().await {
            assert!(last.elapsed() <= QUIET + Duration::from_millis(10));
            last = tokio::time::Instant::now();
            whole.extend_from_slice(frame.unwrap().data_ref().unwrap());
        }
        assert_eq!(whole, b"   {\"exitCode\":0}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_error_is_told_in_the_body() {
        let response = answer(StatusCode::OK, after(15, Err(status(Reason::SandboxFailed, "lost")))).await;
        assert_eq!(response.status(), StatusCode::OK);
        let body: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
        assert_eq!(body["code"], "SANDBOX_FAILED");
    }
}
