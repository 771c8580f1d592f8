//! A connection to a port in a sandbox, as something to read from and write to: one call of `ForwardPort` to the sandbox's host.
//!
//! Its bytes are [`carried`] by that call. A host on this machine has the connection [`handed`] over instead: then they take no way
//! but the socket's own.

mod carried;
mod handed;

use std::{io, path::PathBuf, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::HeaderMap;
use oc_mesh::{
    channel::ClientChannel,
    error::{Reason, status},
    handoff::Wanted,
};
use oc_proto::v1::{ForwardPortRequest, ForwardPortResponse, port_service_client::PortServiceClient};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::either::Either;
use tonic::{Request, Status, Streaming, metadata::MetadataMap};

use self::carried::AHEAD;
pub use self::{carried::Carried, handed::Handed};

type Answers = Streaming<ForwardPortResponse>;

/// A sandbox's host.
#[derive(Debug)]
pub struct Host {
    /// What it is called by.
    pub channel: ClientChannel,
    /// Where it hands connections over, if it is on this machine.
    pub handoffs: Option<PathBuf>,
}

/// An open connection to a port.
pub type PortStream = Either<Carried, Handed>;

/// Connects to a port of a sandbox on its host, on behalf of the caller whom `headers` name.
///
/// # Errors
/// `PORT_NOT_LISTENING`; `DEADLINE_EXCEEDED` after `within`; what else the host says.
pub async fn open(
    host: Host,
    sandbox_id: &str,
    port: u16,
    headers: HeaderMap,
    within: Duration,
) -> Result<PortStream, Status> {
    let late = || status(Reason::DeadlineExceeded, format!("port {port} accepts no connection"));
    timeout(within, connect(host, sandbox_id, port, headers)).await.unwrap_or_else(|_| Err(late()))
}

async fn connect(host: Host, sandbox_id: &str, port: u16, headers: HeaderMap) -> Result<PortStream, Status> {
    let failed = |error: io::Error| {
        tracing::warn!(%error, sandbox_id, port, "a connection cannot be fetched from its host");
        status(Reason::PortReset, format!("port {port}: the connection was not handed over"))
    };
    let wanted = host.handoffs.as_deref().map(Wanted::at).transpose().map_err(failed)?.flatten();
    let key = wanted.as_ref().map(|wanted| Bytes::copy_from_slice(wanted.key()));
    let first = ForwardPortRequest {
        sandbox_id: sandbox_id.to_owned(),
        port: port.into(),
        handoff_key: key.unwrap_or_default(),
        ..Default::default()
    };
    let (sender, receiver) = mpsc::channel(AHEAD);
    let requests = stream::iter([first]).chain(ReceiverStream::new(receiver));
    let request =
        Request::from_parts(MetadataMap::from_headers(headers), tonic::Extensions::default(), requests);
    let mut answers = PortServiceClient::new(host.channel).forward_port(request).await?.into_inner();
    // The first message says that it is open.
    let Some(first) = answers.message().await? else {
        return Err(status(Reason::PortReset, format!("port {port}: the connection ended at once")));
    };
    Ok(match wanted {
        Some(wanted) if first.is_handed_over => {
            let socket = wanted.fetch().await.map_err(failed)?;
            Either::Right(Handed::new(socket, answers, sender).map_err(failed)?)
        }
        _ => Either::Left(Carried::new(answers, sender, first.data)),
    })
}
