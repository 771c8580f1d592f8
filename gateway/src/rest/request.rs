//! An HTTP request as the message of an RPC: path, query and body.
//!
//! The body comes first and the path last, so that nothing a caller writes into a body replaces what the path
//! names: the path's sandbox is the one that was authorised.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use oc_mesh::error::{Reason, status};
use percent_encoding::percent_decode;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use tonic::{Status, body::Body as HttpBody};

use crate::{
    app::App,
    budget::{Budget, Held},
    rest::{
        json::{Json, value::from_text},
        route::{Body, Route},
    },
};

/// Largest body that is read as JSON.
pub const MAX_JSON_BYTES: usize = 8 << 20;

/// A body of unknown length is read up to here before memory is reserved for the rest.
const UNRESERVED_BYTES: usize = 32 << 10;

/// How long a client may pause within a body.
pub const BODY_IDLE: Duration = Duration::from_secs(60);

/// Query parameters that carry credentials; never fields of a request.
const CREDENTIALS: [&str; 2] = ["api_key", "token"];

/// Everything but the body: what the path and the query say.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the field.
pub fn without_body(
    json: &Json,
    route: &Route,
    path: &[(FieldDescriptor, String)],
    query: Option<&str>,
) -> Result<DynamicMessage, Status> {
    let mut message = DynamicMessage::new(route.rpc.method.input());
    fill(json, route, &mut message, path, query)?;
    Ok(message)
}

/// The whole request, its body read to the end.
///
/// # Errors
/// `INVALID_ARGUMENT`, naming the field; `MESSAGE_TOO_LARGE`; `OVERLOADED`; `DEADLINE_EXCEEDED` if the body stops
/// coming.
pub async fn with_body(
    app: &App,
    route: &Route,
    path: &[(FieldDescriptor, String)],
    query: Option<&str>,
    body: HttpBody,
) -> Result<(DynamicMessage, Held), Status> {
    read(&app.rest.json, &app.budget, route, path, query, body).await
}

async fn read(
    json: &Json,
    budget: &Budget,
    route: &Route,
    path: &[(FieldDescriptor, String)],
    query: Option<&str>,
    body: HttpBody,
) -> Result<(DynamicMessage, Held), Status> {
    let mut held = Held::default();
    let mut message = DynamicMessage::new(route.rpc.method.input());
    let malformed =
        |error: serde_json::Error| status(Reason::InvalidArgument, format!("malformed request: {error}"));
    match &route.request_body {
        Body::None | Body::Raw(_) => {}
        Body::Message => {
            json.decode(&collect(body, budget, &mut held).await?, &mut message).map_err(malformed)?;
        }
        Body::Field(field) => {
            let text = collect(body, budget, &mut held).await?;
            json.decode_field(&text, &mut message, field).map_err(malformed)?;
        }
    }
    fill(json, route, &mut message, path, query)?;
    Ok((message, held))
}

fn fill(
    json: &Json,
    route: &Route,
    message: &mut DynamicMessage,
    path: &[(FieldDescriptor, String)],
    query: Option<&str>,
) -> Result<(), Status> {
    // `body: "*"` leaves nothing for the query (google/api/http.proto).
    if !matches!(route.request_body, Body::Message) {
        fill_query(json, message, query.unwrap_or_default())?;
    }
    for (field, text) in path {
        let value = from_text(json, field, text).map_err(|problem| invalid(field, &problem))?;
        message.set_field(field, value);
    }
    Ok(())
}

fn fill_query(json: &Json, message: &mut DynamicMessage, query: &str) -> Result<(), Status> {
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, text) = pair.split_once('=').unwrap_or((pair, ""));
        let Some(field) = unescape(name).and_then(|name| query_field(&message_descriptor(message), &name))
        else {
            continue;
        };
        let text = unescape(text).ok_or_else(|| invalid(&field, "is not UTF-8"))?;
        let value = from_text(json, &field, &text).map_err(|problem| invalid(&field, &problem))?;
        if field.is_list() {
            if let Some(list) = message.get_field_mut(&field).as_list_mut() {
                list.push(value);
            }
        } else {
            message.set_field(&field, value);
        }
    }
    Ok(())
}

fn message_descriptor(message: &DynamicMessage) -> MessageDescriptor {
    use prost_reflect::ReflectMessage as _;
    message.descriptor()
}

/// The field that a parameter names. Messages and maps are not read from a query: no RPC of the contract needs it.
fn query_field(message: &MessageDescriptor, name: &str) -> Option<FieldDescriptor> {
    if CREDENTIALS.contains(&name) {
        return None;
    }
    message.fields().find(|field| {
        (field.json_name().eq_ignore_ascii_case(name) || field.name().eq_ignore_ascii_case(name))
            && !matches!(field.kind(), Kind::Message(_))
    })
}

/// One name or value of a query; `None` if it is not UTF-8.
pub fn unescape(text: &str) -> Option<String> {
    let spaced = text.replace('+', " ");
    percent_decode(spaced.as_bytes()).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

fn invalid(field: &FieldDescriptor, problem: &str) -> Status {
    let name = field.json_name();
    let text = if problem.contains(name) { problem.to_owned() } else { format!("`{name}` {problem}") };
    status(Reason::InvalidArgument, text)
}

async fn collect(mut body: HttpBody, budget: &Budget, held: &mut Held) -> Result<Bytes, Status> {
    let too_large =
        || status(Reason::MessageTooLarge, format!("the body is larger than {MAX_JSON_BYTES} bytes"));
    let announced = body.size_hint().lower();
    if announced > MAX_JSON_BYTES as u64 {
        return Err(too_large());
    }
    // Bounded by what is announced; by the limit where nothing is.
    let most =
        body.size_hint().upper().and_then(|upper| usize::try_from(upper).ok()).unwrap_or(MAX_JSON_BYTES);
    let mut reserved = false;
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    while let Some(frame) = next_frame(&mut body).await? {
        let Ok(data) = frame.into_data() else { continue };
        let so_far = first.as_ref().map_or(0, Bytes::len) + rest.len();
        if so_far + data.len() > MAX_JSON_BYTES {
            return Err(too_large());
        }
        if !reserved && so_far + data.len() > UNRESERVED_BYTES {
            *held = budget.hold(most).await?;
            reserved = true;
        }
        // Nearly every body is one frame: that one is not copied.
        match first {
            None => first = Some(data),
            Some(_) => rest.extend_from_slice(&data),
        }
    }
    Ok(match first {
        None => Bytes::new(),
        Some(first) if rest.is_empty() => first,
        Some(first) => {
            let mut whole = BytesMut::with_capacity(first.len() + rest.len());
            whole.extend_from_slice(&first);
            whole.extend_from_slice(&rest);
            whole.freeze()
        }
    })
}

/// The next frame of a client's body, `None` at its end.
///
/// # Errors
/// `DEADLINE_EXCEEDED` if the client pauses for too long, `INVALID_ARGUMENT` if it goes away.
pub async fn next_frame(body: &mut HttpBody) -> Result<Option<http_body::Frame<Bytes>>, Status> {
    match tokio::time::timeout(BODY_IDLE, body.frame()).await {
        Err(_) => Err(status(
            Reason::DeadlineExceeded,
            format!("no byte of the body came for {} seconds", BODY_IDLE.as_secs()),
        )),
        Ok(Some(Err(_))) => Err(status(Reason::InvalidArgument, "the body ended before its announced end")),
        Ok(Some(Ok(frame))) => Ok(Some(frame)),
        Ok(None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use http::Method;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::{
        rest::route::{Match, Routes},
        surface::Surface,
    };

    async fn request<M: prost::Message + Default>(
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Result<M, Status> {
        let surface = Surface::load().unwrap();
        let json = Json::new(&surface).unwrap();
        let uri: http::Uri = path.parse().unwrap();
        let Match::Found(route, bound) = Routes::new(&surface).unwrap().find(&method, uri.path()) else {
            panic!("no route for {path}");
        };
        let body = HttpBody::new(http_body_util::Full::new(body.into()));
        let (message, _) = read(&json, &Budget::default(), &route, &bound, uri.query(), body).await?;
        Ok(M::decode(message.encode_to_vec().as_slice()).unwrap())
    }

    #[tokio::test]
    async fn path_and_query_fill_fields_and_credentials_do_not() {
        let read: oc_proto::v1::ReadFileRequest = request(
            Method::GET,
            "/api/sandboxes/sb-1/files?PATH=%2Ftmp%2Fa+b%2Bc%00&offset=7&token=x&api_key=y&sandboxID=sb-2&junk&=",
            "",
        )
        .await
        .unwrap();
        assert_eq!(read.sandbox_id, "sb-1", "the path wins");
        assert_eq!(read.path, "/tmp/a b+c\0", "what the guest judges reaches the guest");
        assert_eq!(read.offset, 7);
    }

    #[tokio::test]
    async fn the_path_wins_over_the_body() {
        let run: oc_proto::v1::RunRequest =
            request(Method::POST, "/sandboxes/sb-1/exec/run?cwd=/x", r#"{"sandboxID": "sb-2", "cmd": "ls"}"#)
                .await
                .unwrap();
        assert_eq!((run.sandbox_id.as_str(), run.cmd.as_str(), run.cwd.as_str()), ("sb-1", "ls", ""));
    }

    #[tokio::test]
    async fn bad_parameters_name_the_field() {
        for (query, field) in [("offset=x", "offset"), ("path=%ff", "path"), ("limit=1.5", "limit")] {
            let error = request::<oc_proto::v1::ReadFileRequest>(
                Method::GET,
                &format!("/api/sandboxes/sb-1/files?{query}"),
                "",
            )
            .await
            .unwrap_err();
            assert!(error.message().contains(&format!("`{field}`")), "{}", error.message());
        }
    }

    #[tokio::test]
    async fn a_body_beyond_the_limit_is_refused() {
        let error = request::<oc_proto::v1::RunRequest>(
            Method::POST,
            "/sandboxes/sb-1/exec/run",
            vec![b' '; MAX_JSON_BYTES + 1],
        )
        .await
        .unwrap_err();
        assert_eq!(oc_mesh::error::reason_of(&error).as_deref(), Some("MESSAGE_TOO_LARGE"));
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(query in "[a-zA-Z0-9=&%+;/?]{0,60}") {
            let surface = Surface::load().unwrap();
            let json = Json::new(&surface).unwrap();
            let descriptor = surface.pool().get_message_by_name("oc.v1.ReadFileRequest").unwrap();
            let _ = fill_query(&json, &mut DynamicMessage::new(descriptor), &query);
        }
    }
}
