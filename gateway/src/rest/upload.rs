//! The body of an HTTP request as a stream of messages, for RPCs that take a stream of `google.api.HttpBody`.
//!
//! The bytes are not copied: each message is a few bytes of framing, made here, and then the piece of the body
//! as it came. A piece is asked of the client only when the host wants more, so a slow host holds the client
//! back and nothing piles up here. If the client goes away the stream breaks; it never ends as if all were
//! there, because the host would keep what it has for the whole file.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use http_body::Frame;
use http_body_util::StreamBody;
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind};
use tonic::{Status, body::Body};

use crate::rest::{progress::Progress, request::next_frame};

/// Largest piece of a body in one message.
const MAX_PIECE: usize = 512 << 10;

/// A gRPC message begins with a byte for compression and four for its length.
const GRPC_HEADER: usize = 5;

/// Why an upload broke, for the answer: the transport only knows that it did.
pub type Broken = Arc<OnceLock<Status>>;

/// Streams `body` as messages. The first also carries the fields of `head`, even if the body is empty. Each step is
/// noted as `progress`.
pub fn stream(
    head: &DynamicMessage,
    field: &FieldDescriptor,
    body: Body,
    broken: Broken,
    progress: Progress,
) -> Body {
    let framing = Framing::new(field);
    let head = head.encode_to_vec();
    Body::new(StreamBody::new(pieces(framing, head, body, broken, progress)))
}

fn pieces(
    framing: Framing,
    head: Vec<u8>,
    mut body: Body,
    broken: Broken,
    progress: Progress,
) -> impl Stream<Item = Result<Frame<Bytes>, Status>> {
    async_stream::try_stream! {
        let mut head = Some(head);
        loop {
            // The host wants more. How long the client may take for it has a limit of its own.
            progress.note();
            let frame = match next_frame(&mut body).await {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(status) => {
                    let _ = broken.set(status.clone());
                    Err(status)?
                }
            };
            let Ok(mut data) = frame.into_data() else { continue };
            while !data.is_empty() {
                progress.note();
                let piece = data.split_to(data.len().min(MAX_PIECE));
                yield Frame::data(framing.prefix(&head.take().unwrap_or_default(), piece.len()));
                yield Frame::data(piece);
            }
        }
        progress.note();
        if let Some(head) = head {
            yield Frame::data(framing.prefix(&head, 0));
        }
    }
}

/// Where the bytes go: the number of the field, and that of `data` within it.
struct Framing {
    field: u32,
    data: u32,
}

impl Framing {
    fn new(field: &FieldDescriptor) -> Self {
        // google/api/httpbody.proto; the number is looked up all the same.
        const DATA: u32 = 2;
        let data = match field.kind() {
            Kind::Message(message) => message.get_field_by_name("data").map_or(DATA, |data| data.number()),
            _ => DATA,
        };
        Self { field: field.number(), data }
    }

    /// All of a message that comes before `piece` bytes of body: gRPC's header, `head`, and the tags and lengths
    /// of the two nested fields.
    fn prefix(&self, head: &[u8], piece: usize) -> Bytes {
        let inner = key_len(self.data) + encoded_len_varint(piece as u64) + piece;
        let outer = key_len(self.field) + encoded_len_varint(inner as u64) + inner;
        let length = head.len() + outer;
        let mut prefix = BytesMut::with_capacity(GRPC_HEADER + length - piece);
        prefix.put_u8(0);
        // Bounded by the size of a path and a query and of MAX_PIECE.
        prefix.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        prefix.put_slice(head);
        encode_key(self.field, WireType::LengthDelimited, &mut prefix);
        encode_varint(inner as u64, &mut prefix);
        encode_key(self.data, WireType::LengthDelimited, &mut prefix);
        encode_varint(piece as u64, &mut prefix);
        prefix.freeze()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{TryStreamExt as _, stream};
    use http_body_util::BodyExt as _;
    use oc_proto::v1::WriteFileRequest;
    use proptest::prelude::*;

    use super::*;
    use crate::surface::Surface;

    /// The messages that a body of these frames becomes, or how it broke.
    fn messages(frames: Vec<Result<Bytes, Status>>) -> Result<Vec<WriteFileRequest>, Status> {
        let surface = Surface::load().unwrap();
        let descriptor = surface.pool().get_message_by_name("oc.v1.WriteFileRequest").unwrap();
        let field = descriptor.get_field_by_name("body").unwrap();
        let head = WriteFileRequest { sandbox_id: "sb-1".into(), path: "/x".into(), ..Default::default() };
        let head = DynamicMessage::decode(descriptor, head.encode_to_vec().as_slice()).unwrap();
        let body =
            Body::new(StreamBody::new(stream::iter(frames.into_iter().map(|frame| frame.map(Frame::data)))));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut wire = runtime
            .block_on(
                stream(&head, &field, body, Broken::default(), Progress::default())
                    .into_data_stream()
                    .try_collect::<Vec<_>>(),
            )?
            .concat()
            .into_iter()
            .collect::<std::collections::VecDeque<u8>>();
        let mut messages = Vec::new();
        while !wire.is_empty() {
            let header: Vec<u8> = wire.drain(..GRPC_HEADER).collect();
            assert_eq!(header[0], 0);
            let length = u32::from_be_bytes(header[1..].try_into().unwrap()) as usize;
            let message: Vec<u8> = wire.drain(..length).collect();
            messages.push(WriteFileRequest::decode(message.as_slice()).unwrap());
        }
        Ok(messages)
    }

    #[test]
    fn an_empty_body_is_one_message() {
        let messages = messages(vec![]).unwrap();
        assert_eq!(messages.len(), 1);
        assert_eq!((messages[0].sandbox_id.as_str(), messages[0].path.as_str()), ("sb-1", "/x"));
    }

    #[test]
    fn a_broken_body_breaks_the_stream() {
        let broken = messages(vec![Ok(Bytes::from_static(b"abc")), Err(Status::cancelled("gone"))]);
        assert!(broken.is_err());
    }

    proptest! {
        #[test]
        fn bytes_arrive_in_order_in_bounded_messages(
            sizes in proptest::collection::vec(0usize..MAX_PIECE * 2 + 10, 0..5),
        ) {
            let frames: Vec<Bytes> = sizes
                .iter()
                .enumerate()
                .map(|(index, size)| Bytes::from((0..*size).map(|at| (at + index) as u8).collect::<Vec<_>>()))
                .collect();
            let sent = frames.concat();
            let messages = messages(frames.into_iter().map(Ok).collect()).unwrap();
            prop_assert_eq!(&messages[0].path, "/x");
            prop_assert!(messages[1..].iter().all(|message| message.path.is_empty()));
            let pieces: Vec<Bytes> =
                messages.into_iter().filter_map(|message| message.body).map(|body| body.data).collect();
            prop_assert!(pieces.iter().all(|piece| piece.len() <= MAX_PIECE));
            prop_assert!(pieces.concat() == sent);
        }
    }
}
