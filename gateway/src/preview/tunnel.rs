//! A WebSocket, once both sides have switched over: bytes both ways, unread.

use http::Response;
use hyper::{
    body::Incoming,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes},
    sync::OwnedSemaphorePermit,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{line::Line, pool::Place, streamed::Movement};
use crate::exchange::Exchange;

/// How long both sides may take to be switched over once that was answered.
const SWITCHES_WITHIN: Duration = Duration::from_secs(30);
/// What is read of either side at a time. Idle ones hold this much of each.
const BUFFER: usize = 8 << 10;

/// What a tunnel is made of.
#[derive(Debug)]
pub struct Tunnel {
    /// The client's side.
    pub client: OnUpgrade,
    /// The connection that it came by.
    pub line: Line,
    /// The port's answer, with its side.
    pub answer: Response<Incoming>,
    /// Its place among its sandbox's requests.
    pub place: Place,
    /// Its place among all WebSockets.
    pub room: OwnedSemaphorePermit,
    /// How long both sides may be silent.
    pub silence: Duration,
    /// The request that it was.
    pub exchange: Arc<Exchange>,
}

impl Tunnel {
    /// Carries bytes until a side has ended both directions or broken, nobody says anything for too long, or the gateway stops.
    pub async fn run(mut self, stop: CancellationToken) {
        let switched = async {
            let client = (&mut self.client).await?;
            let (port, ()) = tokio::join!(hyper::upgrade::on(&mut self.answer), self.line.finish());
            let port = port?;
            Ok::<_, hyper::Error>((client, port))
        };
        let Ok(Ok((client, port))) = timeout(SWITCHES_WITHIN, switched).await else { return };
        let movement = Movement::default();
        let mut client = Moving { inner: TokioIo::new(client), movement: movement.clone() };
        let mut port = TokioIo::new(port);
        let outcome = tokio::select! {
            carried = copy_bidirectional_with_sizes(&mut client, &mut port, BUFFER, BUFFER) => match carried {
                Ok((up, down)) => {
                    tracing::debug!(up, down, request_id = self.exchange.request_id(), "a WebSocket has ended");
                    return;
                }
                Err(error) => error.to_string(),
            },
            () = movement.stopped(self.silence) => "silent for too long".to_owned(),
            () = stop.cancelled() => "the gateway stops".to_owned(),
        };
        tracing::debug!(outcome, request_id = self.exchange.request_id(), "a WebSocket to a port was ended");
        drop((self.place, self.room));
    }
}

/// The client's side, that tells of bytes in both directions.
struct Moving {
    inner: TokioIo<Upgraded>,
    movement: Movement,
}

impl AsyncRead for Moving {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        if polled.is_ready() {
            self.movement.note();
        }
        polled
    }
}

impl AsyncWrite for Moving {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(context, data);
        if polled.is_ready() {
            self.movement.note();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
