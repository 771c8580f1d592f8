//! The one answer of a call that has one, as the bytes of its message.
//!
//! It is not decoded here: a directory of a hundred thousand entries is shown entry by entry.

use bytes::{Buf as _, Bytes};
use http_body_util::BodyExt as _;
use oc_mesh::error::{Reason, status};
use tonic::{Code, Status, body::Body};

use crate::{
    budget::{Budget, Held},
    pieces::Pieces,
};

/// Largest answer. The largest of the contract are a directory's listing and a command's output.
const MAX_BYTES: usize = 32 << 20;

/// gRPC's header of a message: a byte for compression, four for the length.
const HEADER: usize = 5;

/// Reads the answer, and the status behind it.
///
/// # Errors
/// What the other side answered instead; `MESSAGE_TOO_LARGE`; `OVERLOADED`; `INTERNAL` if it broke the protocol;
/// `HOST_UNAVAILABLE` if it broke off.
pub async fn read(mut body: Body, budget: &Budget) -> Result<(Bytes, Held), Status> {
    let mut read = Pieces::default();
    let mut wanted = None;
    let mut held = Held::default();
    while let Some(frame) = body.frame().await {
        let frame = match frame?.into_data() {
            Ok(data) => {
                read.push(data);
                if wanted.is_none()
                    && let Some(length) = message_length(&mut read)?
                {
                    held = budget.hold(length).await?;
                    wanted = Some(HEADER + length);
                }
                if wanted.is_some_and(|wanted| read.len() > wanted) {
                    return Err(broken("more than one answer"));
                }
                continue;
            }
            Err(frame) => frame,
        };
        let Some(end) = frame.trailers_ref().and_then(Status::from_header_map) else {
            return Err(broken("no status"));
        };
        if end.code() != Code::Ok {
            return Err(end);
        }
        return match wanted {
            Some(wanted) if read.len() == wanted => Ok((read.into_whole().split_off(HEADER), held)),
            _ => Err(broken("no whole answer")),
        };
    }
    Err(broken("no status"))
}

fn broken(problem: &str) -> Status {
    tracing::error!(problem, "an answer broke the protocol");
    status(Reason::Internal, "the answer could not be read")
}

/// The length of the message, once its header is there.
fn message_length(read: &mut Pieces) -> Result<Option<usize>, Status> {
    if read.len() < HEADER {
        return Ok(None);
    }
    let mut header = read.first(HEADER);
    if header.get_u8() != 0 {
        return Err(broken("compressed without being asked"));
    }
    let length = header.get_u32() as usize;
    if length > MAX_BYTES {
        let text = format!("the answer has {length} bytes; at most {MAX_BYTES} are shown");
        return Err(status(Reason::MessageTooLarge, text));
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use oc_mesh::error::reason_of;
    use proptest::prelude::*;

    use super::*;

    fn read_wire(wire: &[u8], size: usize, grpc_status: Option<&'static str>) -> Result<Bytes, Status> {
        let mut frames: Vec<Result<Frame<Bytes>, Status>> =
            wire.chunks(size).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        if let Some(code) = grpc_status {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static(code));
            frames.push(Ok(Frame::trailers(trailers)));
        }
        let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(read(body, &Budget::default())).map(|(message, _)| message)
    }

    #[test]
    fn an_answer_without_its_status_is_none() {
        let wire = [0, 0, 0, 0, 2, 7, 7];
        assert_eq!(read_wire(&wire, 100, Some("0")).unwrap(), &[7, 7][..]);
        assert!(read_wire(&wire, 100, None).is_err());
        assert_eq!(read_wire(&wire, 100, Some("5")).unwrap_err().code(), Code::NotFound);
        assert_eq!(read_wire(&[], 100, Some("5")).unwrap_err().code(), Code::NotFound);
        assert!(read_wire(&[], 100, Some("0")).is_err());
        assert!(read_wire(&wire[..6], 100, Some("0")).is_err());
        assert!(read_wire(&[0, 0, 0, 0, 1, 7, 7], 100, Some("0")).is_err());
        let large = read_wire(&[0, 0x7f, 0, 0, 0], 100, Some("0")).unwrap_err();
        assert_eq!(reason_of(&large).as_deref(), Some("MESSAGE_TOO_LARGE"));
    }

    proptest! {
        #[test]
        fn it_comes_whole_however_it_is_cut(
            message in proptest::collection::vec(any::<u8>(), 0..300),
            size in 1usize..50,
        ) {
            let mut wire = vec![0];
            wire.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
            wire.extend(&message);
            prop_assert_eq!(read_wire(&wire, size, Some("0")).unwrap(), message);
        }

        #[test]
        fn hostile_bytes_are_read_or_refused(wire in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = read_wire(&wire, 7, Some("0"));
        }
    }
}
