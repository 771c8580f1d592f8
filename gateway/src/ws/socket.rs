//! A client's end: one message on its way at a time, read and written by one task.
//!
//! What is to be sent is taken only when all before it has gone to the kernel, so a client that does not read holds
//! back whoever writes, and memory is bounded. Meanwhile the client is read on: it may have to say something.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Sink as _, SinkExt as _, Stream as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

use super::{closing::Close, cut::Cut};

/// Bytes that are read at once; there is such a buffer for every connection.
const READ_BUFFER: usize = 4 << 10;
/// Most that waits to be written: a frame, and answers to pings.
const MAX_WRITE_BUFFER: usize = 256 << 10;
/// Most that is read and thrown away of a client that did not stick to the protocol.
const MAX_DISCARDED: usize = 128 << 20;

/// A WebSocket.
#[derive(Debug)]
pub struct Socket {
    socket: WebSocketStream<TokioIo<Upgraded>>,
    outgoing: VecDeque<Cut>,
    ping: bool,
    unflushed: bool,
    /// Bytes of all messages that were sent.
    pub bytes_sent: u64,
    /// Bytes of all messages that came.
    pub bytes_received: u64,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// All that was to be sent has gone to the kernel.
    Flushed,
    /// The client sent text or bytes.
    Message(Message),
    /// The client pinged, or answered a ping.
    Alive,
    /// The client closes, with this code and reason.
    Closed(Option<CloseFrame>),
    /// The connection broke, or the client broke the protocol: nothing more is read.
    Broken(Error),
}

impl Socket {
    /// Speaks WebSocket on a connection that was switched over. Larger messages than this are not taken.
    pub async fn new(upgraded: Upgraded, max_message: usize) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_write_buffer_size(MAX_WRITE_BUFFER)
            .max_message_size(Some(max_message))
            .max_frame_size(Some(max_message));
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
        Self {
            socket,
            outgoing: VecDeque::new(),
            ping: false,
            unflushed: false,
            bytes_sent: 0,
            bytes_received: 0,
        }
    }

    /// Whether everything has been sent.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        !self.unflushed
    }

    /// Sends messages, in the course of the next events. More than a few only once everything before has been sent.
    pub fn send(&mut self, messages: Cut) {
        self.outgoing.push_back(messages);
        self.unflushed = true;
    }

    /// Sends a ping, in the course of the next events.
    pub fn ping(&mut self) {
        self.ping = true;
        self.unflushed = true;
    }

    /// Waits for what happens next, and reads the client only if `reading`. Nothing is lost if it is given up.
    pub async fn event(&mut self, reading: bool) -> Event {
        poll_fn(|context| self.poll_event(context, reading)).await
    }

    fn poll_event(&mut self, context: &mut Context<'_>, reading: bool) -> Poll<Event> {
        if self.unflushed {
            match self.poll_write(context) {
                Poll::Ready(Ok(())) => {
                    self.unflushed = false;
                    return Poll::Ready(Event::Flushed);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Event::Broken(error)),
                Poll::Pending => {}
            }
        }
        if !reading {
            return Poll::Pending;
        }
        let event = match ready!(Pin::new(&mut self.socket).poll_next(context)) {
            Some(Ok(Message::Close(frame))) => Event::Closed(frame),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Event::Alive,
            Some(Ok(message)) => {
                self.bytes_received += message.len() as u64;
                Event::Message(message)
            }
            Some(Err(error)) => Event::Broken(error),
            None => Event::Broken(Error::ConnectionClosed),
        };
        Poll::Ready(event)
    }

    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            ready!(Pin::new(&mut self.socket).poll_ready(context))?;
            let message = if std::mem::take(&mut self.ping) {
                Message::Ping(Bytes::new())
            } else if let Some(messages) = self.outgoing.front_mut() {
                let Some(message) = messages.next() else {
                    self.outgoing.pop_front();
                    continue;
                };
                self.bytes_sent += message.len() as u64;
                message
            } else {
                return Pin::new(&mut self.socket).poll_flush(context);
            };
            Pin::new(&mut self.socket).start_send(message)?;
        }
    }

    /// Closes, and gives the client this long to take what was sent before and to answer. What it still sends is thrown
    /// away: left unread, it would reset the connection, and the client might not see why it was closed.
    pub async fn close(&mut self, close: &Close, patience: Duration) {
        let closing = async {
            if self.socket.send(Message::Close(Some(close.frame()))).await.is_err() {
                return;
            }
            let mut answered = false;
            while let Some(Ok(message)) = self.socket.next().await {
                answered |= message.is_close();
            }
            if !answered {
                self.discard().await;
            }
        };
        let _ = tokio::time::timeout(patience, closing).await;
    }

    /// Answers the client's close.
    pub async fn answer_close(&mut self, patience: Duration) {
        let _ = tokio::time::timeout(patience, async { while let Some(Ok(_)) = self.socket.next().await {} })
            .await;
    }

    /// Reads what no longer has a meaning until the client has nothing more to say.
    async fn discard(&mut self) {
        let mut buffer = vec![0; 64 << 10];
        let mut discarded = 0;
        while discarded < MAX_DISCARDED {
            match self.socket.get_mut().read(&mut buffer).await {
                Ok(length @ 1..) => discarded += length,
                Ok(0) | Err(_) => return,
            }
        }
    }
}
