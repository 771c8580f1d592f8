//! The rest of a request's body that nobody read.
//!
//! An error may be answered while the client is still sending. On HTTP/1.1 the connection then has to be closed,
//! and closing it with unread bytes resets it: clients that are still writing would see the reset instead of the
//! answer. So, for a moment, the rest is read and thrown away first.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tonic::body::Body;

/// Most that is thrown away.
const MAX_BYTES: usize = 64 << 20;

/// Where the rest of a body will be once its reader has let go of it, if there is a body.
#[derive(Debug)]
pub struct Leftover(Option<oneshot::Receiver<Incoming>>);

/// Keeps hold of a request's body.
pub fn keep(request: Request<Incoming>) -> (Request<Body>, Leftover) {
    let mut leftover = Leftover(None);
    let request = request.map(|body| {
        if body.is_end_stream() {
            return Body::empty();
        }
        let (sender, receiver) = oneshot::channel();
        leftover.0 = Some(receiver);
        Body::new(Kept { body: Some(body), back: Some(sender) })
    });
    (request, leftover)
}

impl Leftover {
    /// Throws the rest away, as far as that is worth the while, and for no longer than this.
    pub async fn discard(self, within: Duration) {
        let Some(back) = self.0 else { return };
        let _ = tokio::time::timeout(within, async {
            if let Ok(body) = back.await {
                drain(body).await;
            }
        })
        .await;
    }

    /// Does so once its reader has let go of it, whenever that is, and keeps nobody waiting.
    pub fn discard_later(self, within: Duration) {
        let Some(back) = self.0 else { return };
        tokio::spawn(async move {
            if let Ok(body) = back.await {
                let _ = tokio::time::timeout(within, drain(body)).await;
            }
        });
    }
}

async fn drain(mut body: Incoming) {
    let mut discarded = 0;
    while let Some(Ok(frame)) = body.frame().await {
        discarded += frame.data_ref().map_or(0, Bytes::len);
        if discarded > MAX_BYTES {
            return;
        }
    }
}

/// A body that comes back when its reader drops it before its end.
struct Kept {
    body: Option<Incoming>,
    back: Option<oneshot::Sender<Incoming>>,
}

impl http_body::Body for Kept {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take()) {
            // Nobody waits for it if the answer was a success.
            let _ = back.send(body);
        }
    }
}
