//! A stream of `google.api.HttpBody` as an HTTP body of raw bytes.
//!
//! The first message is awaited before anything is answered: an error up to then has its HTTP status. One later
//! breaks the body; it never ends as if all were there. So does a host that sends nothing for too long, counted only
//! while the client asks for more.

use std::collections::VecDeque;

use bytes::Bytes;
use futures_util::Stream;
use http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
};
use http_body::Frame;
use http_body_util::StreamBody;
use oc_mesh::error::{Reason, status};
use prost_reflect::{DynamicMessage, FieldDescriptor, Value};
use tonic::{Status, Streaming, body::Body};

use crate::{
    compat::content_length::{Remaining, SMALL, announced},
    rest::progress::in_time,
};

/// Answers with the bytes of a stream.
///
/// # Errors
/// The stream failed before its first message.
pub async fn answer(
    success: StatusCode,
    request: &DynamicMessage,
    field: &FieldDescriptor,
    mut stream: Streaming<DynamicMessage>,
) -> Result<Response<Body>, Status> {
    let mut read = VecDeque::new();
    let mut length = None;
    let mut ended = true;
    if let Some(mut first) = stream.message().await? {
        ended = false;
        length = announced(request, &first);
        let mut total = push(&mut read, &mut first, field);
        // What is small is read to its announced end, to see whether it comes.
        while let Some(announced) = length.filter(|length| *length > total && *length <= SMALL) {
            match stream.message().await? {
                Some(mut message) => total += push(&mut read, &mut message, field),
                None => {
                    tracing::debug!(announced, total, "a file ended before its announced end");
                    ended = true;
                    length = Some(total).filter(|total| *total > 0);
                }
            }
        }
    }
    let pieces = pieces(read, (!ended).then_some(stream), field.clone(), Remaining::new(length));
    let mut response = Response::new(Body::new(StreamBody::new(pieces)));
    *response.status_mut() = success;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    // Sandboxes hold other people's HTML: no browser is to guess that it is ours.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(response)
}

/// Takes the bytes out of a message; how many they are.
fn push(read: &mut VecDeque<Bytes>, message: &mut DynamicMessage, field: &FieldDescriptor) -> u64 {
    let data = take_data(message, field);
    let length = data.len() as u64;
    read.push_back(data);
    length
}

fn pieces(
    mut read: VecDeque<Bytes>,
    mut stream: Option<Streaming<DynamicMessage>>,
    field: FieldDescriptor,
    mut remaining: Remaining,
) -> impl Stream<Item = Result<Frame<Bytes>, Status>> + Send {
    async_stream::try_stream! {
        while !remaining.is_complete() {
            let piece = match (read.pop_front(), &mut stream) {
                (Some(piece), _) => piece,
                (None, None) => break,
                (None, Some(stream)) => match in_time(stream.message()).await? {
                    Some(mut message) => take_data(&mut message, &field),
                    None => break,
                },
            };
            let piece = remaining.take(piece);
            if !piece.is_empty() {
                yield Frame::data(piece);
            }
        }
        if !remaining.may_end() {
            Err(status(Reason::Internal, "the file ended before its announced end"))?;
        }
    }
}

/// Takes the bytes out of a message without copying them.
fn take_data(message: &mut DynamicMessage, field: &FieldDescriptor) -> Bytes {
    let Value::Message(mut body) = message.get_field(field).into_owned() else { return Bytes::new() };
    match body.get_field_by_name_mut("data") {
        Some(Value::Bytes(data)) => std::mem::take(data),
        _ => Bytes::new(),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use http_body_util::BodyExt as _;
    use oc_mesh::error::reason_of;

    use super::*;
    use crate::{surface::Surface, upstream};

    #[tokio::test(start_paused = true)]
    async fn a_host_that_stops_sending_breaks_the_body() {
        let surface = Surface::load().unwrap();
        let rpc = surface.find("/oc.v1.FileService/ReadFile").unwrap();
        let field = rpc.method.output().get_field_by_name("body").unwrap();
        // One message: `body { data: "x" }`.
        let begun = Ok::<_, Status>(Frame::data(Bytes::from_static(b"\0\0\0\0\x05\x12\x03\x12\x01x")));
        let stuck = futures_util::stream::iter([begun]).chain(futures_util::stream::pending());
        let messages = upstream::messages(rpc, Body::new(StreamBody::new(stuck)));
        let request = DynamicMessage::new(rpc.method.input());
        let mut body = answer(StatusCode::OK, &request, &field, messages).await.unwrap().into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "x");
        let error = body.frame().await.unwrap().unwrap_err();
        assert_eq!(reason_of(&error).as_deref(), Some("DEADLINE_EXCEEDED"));
    }
}
