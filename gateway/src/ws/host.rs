//! The host's end: one call of `ExecService.AttachExec`.
//!
//! Its messages are framed here rather than by tonic, which keeps buffers for each call whether anything comes or not:
//! ten thousand attachments that are silent must cost next to nothing, also after they were busy. An answer's message
//! that came in one piece is not copied.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use oc_mesh::{
    channel::ClientChannel,
    error::{Reason, status},
};
use oc_proto::v1::{AttachExecResponse, ExecAttached, attach_exec_response::Event};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, body::Body};

use crate::{surface::Rpc, upstream};

/// Largest message of an answer: 256 KiB of output and what is around it; a session's arguments are shorter.
const MAX_MESSAGE: usize = 512 << 10;

/// gRPC's header of a message: a byte for compression, four for the length.
const HEADER: usize = 5;

/// A call under way.
#[derive(Debug)]
pub struct Host {
    /// What is sent: framed messages, one at a time. Dropped, it ends our side of the call.
    pub uplink: mpsc::Sender<Bytes>,
    /// What comes.
    pub downlink: Downlink,
}

/// The answers of a call.
#[derive(Debug)]
pub struct Downlink {
    body: Body,
    read: Deframer,
}

impl Host {
    /// Begins a call with its first message. Does not wait for the first answer.
    ///
    /// # Errors
    /// What the other side answered instead; `HOST_UNAVAILABLE`.
    pub async fn call(
        channel: ClientChannel,
        rpc: &Rpc,
        headers: HeaderMap,
        first: Bytes,
    ) -> Result<Self, Status> {
        let (uplink, messages) = mpsc::channel(1);
        // There is room for one.
        let _ = uplink.try_send(first);
        let body =
            StreamBody::new(ReceiverStream::new(messages).map(|bytes| Ok::<_, Status>(Frame::data(bytes))));
        let body = upstream::call(channel, rpc, headers, None, Body::new(body)).await?;
        Ok(Self { uplink, downlink: Downlink { body, read: Deframer::default() } })
    }

    /// Sends a last message, ends our side, and gives the other side this long to end its own: what is still on its way
    /// might be lost otherwise.
    pub async fn end(mut self, last: Option<Bytes>, patience: Duration) {
        let ending = async {
            if let Some(last) = last {
                let _ = self.uplink.send(last).await;
            }
            drop(self.uplink);
            while let Ok(Some(_)) = self.downlink.next().await {}
        };
        let _ = tokio::time::timeout(patience, ending).await;
    }
}

impl Downlink {
    /// The next message, undecoded; `None` where the call ended well. Nothing is lost if the wait is given up.
    ///
    /// # Errors
    /// How the call ended otherwise; `HOST_UNAVAILABLE` if it broke off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if let Some(message) = self.read.next()? {
                return Ok(Some(message));
            }
            let Some(frame) = self.body.frame().await else {
                return Err(broken("it has no status"));
            };
            match frame?.into_data() {
                Ok(data) => self.read.push(data),
                Err(frame) => {
                    let end = frame.trailers_ref().and_then(Status::from_header_map);
                    return match end.ok_or_else(|| broken("it has no status"))? {
                        end if end.code() == Code::Ok => Ok(None),
                        end => Err(end),
                    };
                }
            }
        }
    }

    /// The first message, which says where the attachment begins.
    ///
    /// # Errors
    /// As with [`Downlink::next`].
    pub async fn attached(&mut self) -> Result<ExecAttached, Status> {
        let first = self.next().await?.ok_or_else(|| broken("it is empty"))?;
        match decode(first)?.event {
            Some(Event::Attached(attached)) => Ok(attached),
            _ => Err(broken("it begins with another message than `attached`")),
        }
    }
}

/// Reads an answer.
///
/// # Errors
/// It is none.
pub fn decode(message: Bytes) -> Result<AttachExecResponse, Status> {
    AttachExecResponse::decode(message).map_err(|error| broken(&error.to_string()))
}

fn broken(problem: &str) -> Status {
    tracing::warn!(problem, "an attachment's answer broke the protocol");
    status(Reason::Internal, "the sandbox's answer could not be read")
}

/// A message as it goes over the wire.
#[must_use]
pub fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(HEADER + length);
    put_header(&mut framed, length);
    // Writing to a growing buffer does not fail.
    let _ = message.encode(&mut framed);
    framed.freeze()
}

/// The same for one that is encoded already.
#[must_use]
pub fn framed_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(HEADER + message.len());
    put_header(&mut framed, message.len());
    framed.extend_from_slice(message);
    framed.freeze()
}

fn put_header(framed: &mut BytesMut, length: usize) {
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// Takes a stream of bytes apart into messages, and holds no more than one of them.
#[derive(Debug, Default)]
struct Deframer {
    input: Bytes,
    header: BytesMut,
    /// Length of the message that has begun.
    wanted: Option<usize>,
    partial: BytesMut,
}

impl Deframer {
    /// Adds what came, once [`Deframer::next`] had nothing more.
    fn push(&mut self, data: Bytes) {
        debug_assert!(self.input.is_empty());
        self.input = data;
    }

    /// The next message that is whole.
    fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let message = self.cut();
        if self.input.is_empty() {
            // What is empty holds on to its memory, too.
            self.input = Bytes::new();
        }
        message
    }

    fn cut(&mut self) -> Result<Option<Bytes>, Status> {
        let wanted = match self.wanted {
            Some(wanted) => wanted,
            None => match self.length()? {
                Some(length) => *self.wanted.insert(length),
                None => return Ok(None),
            },
        };
        if self.partial.is_empty() && self.input.len() >= wanted {
            self.wanted = None;
            return Ok(Some(self.input.split_to(wanted)));
        }
        if self.partial.is_empty() {
            self.partial.reserve(wanted);
        }
        let missing = wanted - self.partial.len();
        self.partial.extend_from_slice(&self.input.split_to(missing.min(self.input.len())));
        if self.partial.len() < wanted {
            return Ok(None);
        }
        self.wanted = None;
        Ok(Some(std::mem::take(&mut self.partial).freeze()))
    }

    /// The length of the next message, once its header is there.
    fn length(&mut self) -> Result<Option<usize>, Status> {
        let missing = HEADER - self.header.len();
        self.header.extend_from_slice(&self.input.split_to(missing.min(self.input.len())));
        if self.header.len() < HEADER {
            return Ok(None);
        }
        let mut header = std::mem::take(&mut self.header);
        if header.get_u8() != 0 {
            return Err(broken("a message is compressed without being asked"));
        }
        let length = header.get_u32() as usize;
        if length > MAX_MESSAGE {
            return Err(broken("a message is too large"));
        }
        Ok(Some(length))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The messages of a wire that comes in pieces of this size.
    fn deframed(wire: &[u8], size: usize) -> Result<Vec<Bytes>, Status> {
        let (mut read, mut messages) = (Deframer::default(), Vec::new());
        for piece in wire.chunks(size) {
            read.push(Bytes::copy_from_slice(piece));
            while let Some(message) = read.next()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    #[test]
    fn a_message_in_one_piece_is_not_copied() {
        let wire = framed_bytes(b"message");
        let mut read = Deframer::default();
        read.push(wire.clone());
        let message = read.next().unwrap().unwrap();
        assert_eq!(message.as_ptr(), wire[HEADER..].as_ptr());
        assert_eq!(read.next().unwrap(), None);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        assert!(deframed(&[1, 0, 0, 0, 0], 100).is_err());
        assert!(deframed(&[0, 0xff, 0, 0, 0], 2).is_err());
        assert!(decode(Bytes::from_static(b"\x0a\xff")).is_err());
    }

    proptest! {
        #[test]
        fn messages_come_whole_however_they_are_cut(
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..10),
            size in 1_usize..60,
        ) {
            let wire: Vec<u8> = messages.iter().flat_map(|message| framed_bytes(message).to_vec()).collect();
            prop_assert_eq!(deframed(&wire, size).unwrap(), messages);
        }

        #[test]
        fn hostile_bytes_are_read_or_refused(wire in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = deframed(&wire, 7);
        }
    }
}
