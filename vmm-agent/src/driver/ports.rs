//! `oc.v1.PortService` as a host answers it for a guest that has a network: by a connection from the VM's own namespace
//! (docs/decisions/0020).
//!
//! A caller on this machine that wants the connection itself is [handed](oc_mesh::handoff) it: what both say then passes us by.
//!
//! The first message of a call says which port is meant. What does not take a connection there, such as a server that
//! listens on the guest's loopback alone, the guest tries itself: the call is passed on to it unread, as it came, and so is one
//! that says nothing of use.

use std::{future, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use futures_util::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use http::{HeaderValue, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use nix::sys::resource::{Resource, getrlimit};
use oc_mesh::{
    error::{Reason, status},
    handoff::{Handoffs, Offer},
};
use oc_port::{Connection, MAX_CONNECTIONS, MAX_MESSAGE};
use oc_proto::v1::{ForwardPortRequest, ForwardPortResponse};
use prost::Message as _;
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tonic::{
    Status, Streaming,
    body::Body,
    codec::{Codec as _, EncodeBody},
};
use tonic_prost::ProstCodec;
use tracing::debug;

use super::guest_link::Way;
use crate::network::{namespace::Namespace, plan::GUEST};

/// The call that is answered here.
const FORWARD: &str = "/oc.v1.PortService/ForwardPort";
/// A guest that runs answers within a millisecond, and one with much to do when it is asked again, a second later (RFC 6298).
/// After that it is asked by the link, and knows better what to wait for.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// A first message that is waited for, bytes: clients bring nothing for the port with it, or little. What brings more, the guest
/// reads alone.
const MAX_FIRST: usize = 64 << 10;
/// What stands before a message: whether it is compressed, and its length (gRPC over HTTP/2, `Length-Prefixed-Message`).
const PREFIX: usize = 5;

/// Sockets for the ports of all guests of a host: half of what it may have open (`RLIMIT_NOFILE`), so that whatever guests and
/// their callers do, there are files for the rest. Clones are the same.
#[derive(Clone, Debug)]
pub struct Sockets {
    room: Arc<Semaphore>,
    /// Where this machine's own callers fetch them; none has any where we are called from others.
    handoffs: Option<Handoffs>,
}

impl Sockets {
    /// As many as this process may have, handed over by `handoffs` to who wants that.
    pub fn new(handoffs: Option<Handoffs>) -> Self {
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(files, _)| files / 2);
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        Self { room: Arc::new(Semaphore::new(files.min(Semaphore::MAX_PERMITS))), handoffs }
    }
}

/// The ports of one guest. Clones are the same.
#[derive(Clone, Debug)]
pub struct Ports {
    namespace: Namespace,
    room: Arc<Semaphore>,
    sockets: Sockets,
}

/// The room of a connection among its guest's, and among all.
type Room = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// Whether a request is for a port.
pub fn is_for(request: &http::Request<Body>) -> bool {
    request.uri().path() == FORWARD
}

impl Ports {
    /// Those of the guest whose TAP is in `namespace`, to which some of the `sockets` lead.
    pub fn new(namespace: Namespace, sockets: Sockets) -> Self {
        Self { namespace, room: Arc::new(Semaphore::new(MAX_CONNECTIONS)), sockets }
    }

    /// Connects, and answers; or passes the call on by `way`.
    ///
    /// # Errors
    ///
    /// What `way` says.
    pub async fn call(&self, request: http::Request<Body>, way: Way) -> Result<http::Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let (port, body) = match begin(body).await {
            Ok(begun) => begun,
            Err(broken_off) => return Ok(broken_off.into_http()),
        };
        if let Some(port) = port {
            let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
                let text = format!("{MAX_CONNECTIONS} connections to ports are open already");
                return Ok(status(Reason::Overloaded, text).into_http());
            };
            match self.connect(port).await {
                Ok((socket, one)) => {
                    let answered = self.answer(socket, body, (room, one)).await;
                    return Ok(answered.unwrap_or_else(Status::into_http));
                }
                Err(error) => debug!(port, %error, "not connected by the network: the guest tries itself"),
            }
        }
        way.send(http::Request::from_parts(head, body)).await
    }

    async fn connect(&self, port: u16) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
        let one = Arc::clone(&self.sockets.room).try_acquire_owned().map_err(io::Error::other)?;
        let socket = self.namespace.enter(TcpSocket::new_v4).await?;
        let connected = timeout(ANSWERS_WITHIN, socket.connect(SocketAddr::from((GUEST, port)))).await??;
        // What is sent in small pieces is not held back to make larger ones.
        connected.set_nodelay(true)?;
        Ok((connected, one))
    }

    /// Answers the call with what `socket` says, and tells that what the caller does; or has the caller fetch it.
    async fn answer(
        &self,
        socket: TcpStream,
        body: Body,
        room: Room,
    ) -> Result<http::Response<Body>, Status> {
        let mut codec = ProstCodec::<_, ForwardPortRequest>::default();
        // A call that is broken off does not end as one that is complete, whichever way (tonic takes the one for the other).
        let body = body.map_err(|error| Status::aborted(format!("broken off: {error}")));
        let mut parts = Streaming::new_request(codec.decoder(), body, None, Some(MAX_MESSAGE));
        let first = parts.message().await?.unwrap_or_default();
        let messages: BoxStream<'static, _> = match &self.sockets.handoffs {
            Some(handoffs) if first.data.is_empty() && !first.handoff_key.is_empty() => {
                let unusable = || status(Reason::InvalidArgument, "`handoffKey` must be 32 bytes of its own");
                // Ours to watch no more, and to break off still.
                let socket = socket.into_std().map_err(|error| reset(error.to_string()))?;
                let offer = handoffs.offer(&first.handoff_key, socket.into()).ok_or_else(unusable)?;
                handed_over(offer, parts, room).boxed()
            }
            _ => Connection::new(socket, first.data, parts, reset, room)?.boxed(),
        };
        let body = EncodeBody::new_server(codec.encoder(), messages, None, Default::default(), None);
        let mut response = http::Response::new(Body::new(body));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Ok(response)
    }
}

/// The port that a call's first message names, if it names one, and the same body again.
async fn begin(mut body: Body) -> Result<(Option<u16>, Body), Status> {
    let mut begun = BytesMut::new();
    let first = loop {
        match first(&begun) {
            Begun::Partly => match body.frame().await {
                Some(frame) => begun.extend_from_slice(&frame?.into_data().unwrap_or_default()),
                None => break None,
            },
            Begun::Whole(message) => break Some(message),
            Begun::Otherwise => break None,
        }
    };
    let begun = stream::iter([Ok(Frame::data(begun.freeze()))]);
    let body = Body::new(StreamBody::new(begun.chain(BodyStream::new(body))));
    Ok((first.and_then(|message| oc_port::named(&message)), body))
}

/// How a call begins.
#[derive(Debug, PartialEq)]
enum Begun {
    /// With less than a message.
    Partly,
    /// With this one.
    Whole(ForwardPortRequest),
    /// With what is none.
    Otherwise,
}

fn first(begun: &[u8]) -> Begun {
    let Some((&[compressed, ref length @ ..], rest)) = begun.split_first_chunk::<PREFIX>() else {
        return Begun::Partly;
    };
    match usize::try_from(u32::from_be_bytes(*length)) {
        Ok(length) if compressed == 0 && length <= MAX_FIRST => match rest.get(..length) {
            Some(message) => ForwardPortRequest::decode(message).map_or(Begun::Otherwise, Begun::Whole),
            None => Begun::Partly,
        },
        _ => Begun::Otherwise,
    }
}

/// Says so, and keeps the connection's room until the caller ends the call.
fn handed_over(
    offer: Offer,
    parts: Streaming<ForwardPortRequest>,
    room: Room,
) -> impl Stream<Item = Result<ForwardPortResponse, Status>> {
    let said = ForwardPortResponse { is_handed_over: true, ..Default::default() };
    let rest = async move {
        let _room = room;
        offer.held_for(parts).await.err().map(Err)
    };
    stream::iter([Ok(said)]).chain(stream::once(rest).filter_map(future::ready))
}

fn reset(text: String) -> Status {
    status(Reason::PortReset, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(port: u32, data: &'static [u8]) -> Vec<u8> {
        let message = ForwardPortRequest { port, data: data.into(), ..Default::default() }.encode_to_vec();
        [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
    }

    fn body(pieces: Vec<Vec<u8>>) -> Body {
        let pieces = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(piece.into())));
        Body::new(StreamBody::new(stream::iter(pieces)))
    }

    async fn begun(pieces: Vec<Vec<u8>>) -> (Option<u16>, Vec<u8>) {
        let (port, body) = begin(body(pieces)).await.unwrap();
        (port, body.collect().await.unwrap().to_bytes().to_vec())
    }

    #[tokio::test]
    async fn a_call_is_the_same_after_its_port_was_looked_at() {
        let all = [message(3000, b"first"), message(0, b"second")].concat();
        for size in [1, 3, 7, all.len()] {
            let pieces = all.chunks(size).map(<[u8]>::to_vec).collect();
            assert_eq!(begun(pieces).await, (Some(3000), all.clone()), "in pieces of {size}");
        }
    }

    #[tokio::test]
    async fn what_names_no_port_is_the_guests_to_refuse() {
        let compressed = [&[1], &message(3000, b"")[1..]].concat();
        let large = [&[0][..], &65_537_u32.to_be_bytes(), b"..."].concat();
        let garbage = b"\0\0\0\0\x03\xff\xff\xff".to_vec();
        let half = message(3000, b"half")[..9].to_vec();
        for odd in [compressed, large, garbage, half, message(0, b""), message(65_536, b""), Vec::new()] {
            assert_eq!(begun(vec![odd.clone()]).await, (None, odd));
        }
    }

    #[tokio::test]
    async fn a_caller_that_breaks_off_before_its_port_is_known_is_not_passed_on() {
        let pieces =
            [Ok(Frame::data(message(3000, b"")[..4].to_vec().into())), Err(Status::cancelled("gone"))];
        let broken = begin(Body::new(StreamBody::new(stream::iter(pieces)))).await.unwrap_err();
        assert_eq!(broken.code(), tonic::Code::Cancelled);
    }
}
