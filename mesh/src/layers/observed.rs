//! A body that tells how its call ended.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tonic::{Code, Status};

/// Told how a call ended, once: with its gRPC code, or dropped without being told if the call was cut off.
pub trait Observer: Send + Unpin + 'static {
    /// `bytes` of the body passed.
    fn passed(&mut self, bytes: usize) {
        let _ = bytes;
    }

    /// The call ended with this code.
    fn ended(&mut self, code: Code);
}

/// A response body that keeps an observer until the call is over.
#[derive(Debug)]
pub struct Observed<B, O> {
    body: B,
    observer: Option<O>,
}

impl<B, O: Observer> Observed<B, O> {
    /// Watches `body`. `headers` are those of the response: a call that fails at once has its code there.
    pub fn new(body: B, headers: &HeaderMap, mut observer: O) -> Self {
        let observer = match Status::from_header_map(headers) {
            Some(status) => {
                observer.ended(status.code());
                None
            }
            None => Some(observer),
        };
        Self { body, observer }
    }

    fn end(&mut self, code: Code) {
        if let Some(mut observer) = self.observer.take() {
            observer.ended(code);
        }
    }
}

impl<B, O> Body for Observed<B, O>
where
    B: Body<Data = Bytes> + Unpin,
    O: Observer,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(data), Some(observer)) = (frame.data_ref(), &mut this.observer) {
                    observer.passed(data.len());
                } else if let Some(trailers) = frame.trailers_ref() {
                    let code =
                        Status::from_header_map(trailers).map_or(Code::Unknown, |status| status.code());
                    this.end(code);
                }
            }
            Some(Err(_)) => this.end(Code::Unknown),
            None => this.observer = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
