//! The first message of a gRPC call, read for the one field that names the sandbox and then replayed.
//!
//! Only that message is held here, and only up to [`MAX_BYTES`]; what follows is not touched. The field is looked
//! for as protobuf's decoders do, the last occurrence counting, so that whoever decodes the message behind us
//! reads what we read.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use oc_mesh::error::{Reason, status};
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field, string};
use tonic::{Status, body::Body};

use crate::{
    budget::{Budget, Held},
    pieces::Pieces,
};

/// Largest first message.
pub const MAX_BYTES: usize = 4 << 20;

/// How long a caller may take to send it.
const DEADLINE: Duration = Duration::from_secs(30);

/// gRPC's header of a message: a byte for compression, four for the length.
const HEADER: usize = 5;

/// Reads the string field `number` of the first message (empty where absent), and gives back the whole body.
///
/// # Errors
/// `INVALID_ARGUMENT`, `MESSAGE_TOO_LARGE`, `OVERLOADED`, `DEADLINE_EXCEEDED`.
pub async fn read(body: Body, number: u32, budget: &Budget) -> Result<(String, Body), Status> {
    tokio::time::timeout(DEADLINE, read_in_time(body, number, budget))
        .await
        .unwrap_or_else(|_| Err(status(Reason::DeadlineExceeded, "the first message did not come in time")))
}

async fn read_in_time(mut body: Body, number: u32, budget: &Budget) -> Result<(String, Body), Status> {
    let mut held = Held::default();
    let mut read = Pieces::default();
    // Known once the header is there.
    let mut wanted = None;
    while wanted.is_none_or(|wanted| read.len() < wanted) {
        if wanted.is_none() && read.len() >= HEADER {
            let header = read.first(HEADER);
            if header.first() != Some(&0) {
                return Err(status(Reason::MethodNotAllowed, "compressed messages are not taken"));
            }
            let length = header.get(1..).map_or(0, |mut length| length.get_u32()) as usize;
            if length > MAX_BYTES {
                let text = format!("the first message has {length} bytes; at most {MAX_BYTES} are taken");
                return Err(status(Reason::MessageTooLarge, text));
            }
            held = budget.hold(length).await?;
            wanted = Some(HEADER + length);
            continue;
        }
        match body.frame().await {
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    read.push(data);
                }
            }
            Some(Err(_)) | None => return Err(malformed("it has no whole message")),
        }
    }
    let message = read.first(wanted.unwrap_or(HEADER)).split_off(HEADER);
    held.shrink(message.len());
    let field = string_field(message, number).map_err(|error| malformed(&error.to_string()))?;
    Ok((field, Body::new(Replay { read: read.into_pieces(), rest: body, held })))
}

fn malformed(problem: &str) -> Status {
    status(Reason::InvalidArgument, format!("the call cannot be read: {problem}"))
}

fn string_field(mut message: Bytes, number: u32) -> Result<String, prost::DecodeError> {
    let mut found = String::new();
    while message.has_remaining() {
        let (tag, wire_type) = decode_key(&mut message)?;
        if tag == number && wire_type == WireType::LengthDelimited {
            string::merge(wire_type, &mut found, &mut message, DecodeContext::default())?;
        } else {
            skip_field(wire_type, tag, &mut message, DecodeContext::default())?;
        }
    }
    Ok(found)
}

/// What was read, and then the rest as it comes.
struct Replay {
    read: VecDeque<Bytes>,
    rest: Body,
    held: Held,
}

impl http_body::Body for Replay {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.read.pop_front() {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None => {
                self.held = Held::default();
                Pin::new(&mut self.rest).poll_frame(context)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let read: u64 = self.read.iter().map(|piece| piece.len() as u64).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(read + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(read + upper);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::StreamBody;
    use oc_mesh::error::reason_of;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut wire = vec![0];
        wire.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
        wire.extend_from_slice(message);
        wire
    }

    /// Reads a wire cut into pieces of this size; gives the field and all that is replayed.
    fn read_in_pieces(wire: &[u8], size: usize) -> Result<(String, Vec<u8>), Status> {
        let pieces: Vec<Result<Frame<Bytes>, Status>> =
            wire.chunks(size).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (field, body) =
                read(Body::new(StreamBody::new(stream::iter(pieces))), 1, &Budget::default()).await?;
            Ok((field, body.collect().await.unwrap().to_bytes().to_vec()))
        })
    }

    #[test]
    fn the_last_occurrence_counts_as_it_does_for_decoders() {
        let mut message =
            oc_proto::v1::RunRequest { sandbox_id: "sb-1".into(), ..Default::default() }.encode_to_vec();
        message.extend(
            oc_proto::v1::RunRequest { sandbox_id: "sb-2".into(), ..Default::default() }.encode_to_vec(),
        );
        let decoded = oc_proto::v1::RunRequest::decode(message.as_slice()).unwrap();
        assert_eq!(read_in_pieces(&framed(&message), 3).unwrap().0, decoded.sandbox_id);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let refused = |wire: &[u8]| read_in_pieces(wire, 4).unwrap_err();
        assert_eq!(reason_of(&refused(&[])).as_deref(), Some("INVALID_ARGUMENT"));
        assert_eq!(reason_of(&refused(&framed(&[1; 40])[..20])).as_deref(), Some("INVALID_ARGUMENT"));
        assert_eq!(reason_of(&refused(&framed(&[0x0a, 2, 0xff, 0xff]))).as_deref(), Some("INVALID_ARGUMENT"));
        assert_eq!(reason_of(&refused(&framed(&[0x0a, 200]))).as_deref(), Some("INVALID_ARGUMENT"));
        assert_eq!(reason_of(&refused(&[0, 0xff, 0xff, 0xff, 0xff])).as_deref(), Some("MESSAGE_TOO_LARGE"));
        assert_eq!(refused(&[1, 0, 0, 0, 0]).code(), tonic::Code::Unimplemented);
    }

    #[test]
    fn an_empty_message_names_nothing() {
        assert_eq!(read_in_pieces(&framed(&[]), 1).unwrap(), (String::new(), framed(&[])));
    }

    #[tokio::test]
    async fn a_message_in_single_bytes_is_replayed_in_few_pieces() {
        let wire = framed(
            &oc_proto::v1::RunRequest { cmd: "x".repeat(200_000), ..Default::default() }.encode_to_vec(),
        );
        let bytes: Vec<Result<Frame<Bytes>, Status>> =
            wire.iter().map(|byte| Ok(Frame::data(Bytes::copy_from_slice(&[*byte])))).collect();
        let body = Body::new(StreamBody::new(stream::iter(bytes)));
        let (_, mut body) = read(body, 1, &Budget::default()).await.unwrap();
        let (mut pieces, mut total) = (0, 0);
        while let Some(frame) = body.frame().await {
            pieces += 1;
            total += frame.unwrap().into_data().unwrap().len();
        }
        assert_eq!(total, wire.len());
        assert!(pieces < 10, "{pieces}");
    }

    proptest! {
        #[test]
        fn all_is_replayed_however_it_is_cut(
            id in "[a-z0-9-]{0,30}",
            cmd in ".{0,100}",
            rest in proptest::collection::vec(any::<u8>(), 0..200),
            size in 1usize..50,
        ) {
            let request = oc_proto::v1::RunRequest { sandbox_id: id.clone(), cmd, ..Default::default() };
            let mut wire = framed(&request.encode_to_vec());
            wire.extend(rest);
            prop_assert_eq!(read_in_pieces(&wire, size).unwrap(), (id, wire));
        }

        #[test]
        fn hostile_bytes_are_read_or_refused(wire in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read_in_pieces(&wire, 7);
            let _ = read_in_pieces(&framed(&wire), 7);
        }
    }
}
