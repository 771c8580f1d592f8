//! `oc port-forward`: ports of this machine that are ports in a sandbox.
//!
//! Each connection that comes is one call to the mesh, and ends as the one in the sandbox does: a side that says that it has
//! ended is told to the other, one that breaks breaks the other.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use futures_util::{Stream, future::try_join_all, stream};
use oc_proto::v1::{ForwardPortRequest, GetSandboxRequest};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, oneshot},
    task::JoinSet,
    time::timeout,
};
use tonic::Request;

use crate::{
    arguments::PortForwardArguments,
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    output::{self, Output},
};

/// Connections at a time; more wait.
const CONNECTIONS: usize = 256;
/// For a connection in the sandbox to come about; a hibernated one wakes meanwhile.
const OPENING: Duration = Duration::from_secs(60);
/// After a failure to accept a connection: most come of a lack of something.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes per message; the contract allows 1 MiB.
const CHUNK: usize = 64 << 10;

/// A port here, and one in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Where to listen; port 0 is any free one.
    pub local: SocketAddr,
    /// Where to connect to.
    pub remote: u16,
}

impl FromStr for Forward {
    type Err = String;

    /// `[ADDRESS:]LOCAL:REMOTE`; a single port is the same on both sides.
    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "must be [ADDRESS:]LOCAL:REMOTE".to_owned();
        let port = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port"));
        let (rest, remote) = match text.rsplit_once(':') {
            Some((rest, remote)) => (rest, remote),
            None => (text, text),
        };
        let (address, local) = match rest.rsplit_once(':') {
            Some((address, local)) => (Some(address), local),
            None => (None, rest),
        };
        let address = match address {
            None => Ipv4Addr::LOCALHOST.into(),
            Some("localhost") => Ipv4Addr::LOCALHOST.into(),
            Some(address) => {
                let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
                bare.unwrap_or(address).parse::<IpAddr>().map_err(|_| form())?
            }
        };
        let remote = port(remote)?;
        if remote == 0 {
            return Err("the port in the sandbox is 1 to 65535".to_owned());
        }
        Ok(Self { local: SocketAddr::new(address, port(local)?), remote })
    }
}

/// `oc port-forward`. Ends only by a failure.
pub async fn run(
    connection: &Connection,
    arguments: PortForwardArguments,
    output: Output,
) -> Result<(), Failure> {
    let PortForwardArguments { id, ports } = arguments;
    // Said now rather than with the first connection.
    let request = within(CALL_TIMEOUT, GetSandboxRequest { sandbox_id: id.clone() });
    connection.sandboxes().get_sandbox(request).await?;
    let mut listeners = Vec::new();
    for Forward { local, remote } in ports {
        let failed = |error| Failure::local(format!("cannot listen on {local}"), error);
        let listener = TcpListener::bind(local).await.map_err(failed)?;
        listeners.push((listener.local_addr().map_err(failed)?, listener, remote));
    }
    for (local, _, remote) in &listeners {
        // A line each, also for programs: they read until they have what they wait for.
        output.line(&if output.is_json() {
            json!({ "address": local.ip(), "localPort": local.port(), "port": remote }).to_string()
        } else {
            format!("{local} -> {id}:{remote}")
        })?;
    }
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let served = listeners.iter().map(|(_, listener, remote)| {
        let way = Way { connection: connection.clone(), sandbox_id: id.clone(), remote: *remote };
        serve(way, listener, &room)
    });
    try_join_all(served).await?;
    Ok(())
}

/// Where connections of one listener go.
#[derive(Clone)]
struct Way {
    connection: Connection,
    sandbox_id: String,
    remote: u16,
}

async fn serve(way: Way, listener: &TcpListener, room: &Arc<Semaphore>) -> Result<(), Failure> {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Forgotten as they end.
            Some(_) = open.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                output::note(format_args!("oc: cannot accept a connection: {error}"));
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(room).acquire_owned().await else { return Ok(()) };
        let way = way.clone();
        open.spawn(async move {
            if let Err(failure) = way.carry(stream).await {
                let code = failure.code();
                output::note(format_args!("oc: port {}: {failure} ({code})", way.remote));
            }
            drop(permit);
        });
    }
}

impl Way {
    /// Carries one connection to its end.
    async fn carry(&self, stream: TcpStream) -> Result<(), Failure> {
        // Bytes wait for others of the same burst already; neither side is to wait for more.
        let _ = stream.set_nodelay(true);
        let (from_here, mut to_here) = stream.into_split();
        let carried = self.exchange(from_here, &mut to_here).await;
        if carried.is_err() {
            // What came is not all there was: an end would say that it is.
            let _ = to_here.as_ref().set_zero_linger();
            to_here.forget();
        }
        carried
    }

    async fn exchange(&self, from_here: OwnedReadHalf, to_here: &mut OwnedWriteHalf) -> Result<(), Failure> {
        let (tell, broken) = oneshot::channel();
        let requests = requests(self.sandbox_id.clone(), self.remote, from_here, tell);
        let mut client = self.connection.ports();
        let mut answers = match timeout(OPENING, client.forward_port(Request::new(requests))).await {
            Ok(answer) => answer?.into_inner(),
            Err(_) => return Err(Failure::Stalled("no connection in time".to_owned())),
        };
        let there = async {
            let mut is_open = false;
            while let Some(answer) = answers.message().await? {
                match (answer.data.is_empty(), std::mem::replace(&mut is_open, true)) {
                    (false, _) => to_here.write_all(&answer.data).await.map_err(lost)?,
                    // The first one says that there is a connection.
                    (true, false) => {}
                    (true, true) => to_here.shutdown().await.map_err(lost)?,
                }
            }
            // One that we ended already cannot be ended again.
            let _ = to_here.shutdown().await;
            Ok(())
        };
        tokio::select! {
            ended = there => ended,
            // The call is dropped, and so is the connection in the sandbox.
            Ok(error) = broken => Err(lost(error)),
        }
    }
}

fn lost(error: io::Error) -> Failure {
    Failure::local("the connection on this side broke", error)
}

/// What comes from here. That it has ended ends the stream; that it broke does not: it is told beside it.
fn requests(
    sandbox_id: String,
    remote: u16,
    from_here: OwnedReadHalf,
    tell: oneshot::Sender<io::Error>,
) -> impl Stream<Item = ForwardPortRequest> + Send + 'static {
    let first = ForwardPortRequest { sandbox_id, port: remote.into(), ..ForwardPortRequest::default() };
    let rest =
        stream::unfold((from_here, BytesMut::new(), tell), async |(mut from_here, mut buffer, tell)| {
            buffer.reserve(CHUNK);
            match from_here.read_buf(&mut buffer).await {
                Ok(0) => None,
                Ok(_) => {
                    let data = buffer.split().freeze();
                    Some((
                        ForwardPortRequest { data, ..ForwardPortRequest::default() },
                        (from_here, buffer, tell),
                    ))
                }
                Err(error) => {
                    // Nobody listens if the call is over.
                    let _ = tell.send(error);
                    std::future::pending().await
                }
            }
        });
    futures_util::StreamExt::chain(stream::iter([first]), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_may_have_an_address_or_be_the_same_on_both_sides() {
        for (text, local, remote) in [
            ("8080", "127.0.0.1:8080", 8080),
            ("0:80", "127.0.0.1:0", 80),
            ("localhost:1:2", "127.0.0.1:1", 2),
            ("0.0.0.0:8080:80", "0.0.0.0:8080", 80),
            ("[::1]:8080:80", "[::1]:8080", 80),
            ("::1:8080:80", "[::1]:8080", 80),
        ] {
            assert_eq!(text.parse(), Ok(Forward { local: local.parse().unwrap(), remote }), "{text}");
        }
        for text in ["", "a:1", "1:0", "0", "65536:1", "host:1:2", "1:2:3:4:5"] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
    }
}
