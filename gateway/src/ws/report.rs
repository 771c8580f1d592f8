//! One line at the end of each attachment. The line of its request (see [`exchange`](crate::exchange)) was logged when
//! it was switched over.

use tokio::time::Instant;

use super::{attach::Target, closing, handshake::Framing};

/// What is logged and counted about an attachment, when this is dropped, wherever that happens.
#[derive(Debug)]
pub struct Report {
    started: Instant,
    route: &'static str,
    framing: Framing,
    request_id: String,
    tenant: String,
    sandbox: String,
    session: String,
    /// The code that it was closed with, by either side.
    pub code: u16,
    /// Bytes of all messages to the client.
    pub bytes_sent: u64,
    /// Bytes of all messages from the client.
    pub bytes_received: u64,
    /// How often the gateway attached again for it.
    pub reattached: u32,
    /// Bytes of output that it never saw.
    pub missed_bytes: u64,
}

impl Report {
    /// An attachment begins.
    #[must_use]
    pub fn begin(target: &Target, framing: Framing, request_id: &str) -> Self {
        metrics::gauge!("oc_gateway_websockets").increment(1);
        let session = &target.session;
        Self {
            started: Instant::now(),
            route: session.route,
            framing,
            request_id: request_id.to_owned(),
            tenant: target.identity.tenant().to_owned(),
            sandbox: session.sandbox_id.clone(),
            session: session.session_id.clone(),
            code: closing::ABNORMAL,
            bytes_sent: 0,
            bytes_received: 0,
            reattached: 0,
            missed_bytes: 0,
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let framing = match self.framing {
            Framing::Published => "published",
            Framing::Protobuf => "protobuf",
        };
        metrics::gauge!("oc_gateway_websockets").decrement(1);
        metrics::counter!(
            "oc_gateway_websockets_total",
            "route" => self.route,
            "framing" => framing,
            "code" => known(self.code),
        )
        .increment(1);
        metrics::counter!("oc_gateway_websocket_bytes_total", "direction" => "sent")
            .increment(self.bytes_sent);
        metrics::counter!("oc_gateway_websocket_bytes_total", "direction" => "received")
            .increment(self.bytes_received);
        metrics::counter!("oc_gateway_reattached_total").increment(self.reattached.into());
        tracing::info!(
            route = self.route,
            framing,
            code = self.code,
            bytes_sent = self.bytes_sent,
            bytes_received = self.bytes_received,
            reattached = self.reattached,
            missed_bytes = self.missed_bytes,
            ms = self.started.elapsed().as_secs_f64() * 1000.0,
            request_id = %self.request_id,
            tenant = %self.tenant,
            sandbox = %self.sandbox,
            // The client chose it, and the host knew it.
            session = %self.session,
            "attachment"
        );
    }
}

/// A code as a label. Clients may close with any, and metrics are kept for ever.
fn known(code: u16) -> String {
    match code {
        1000..=1014 | 4400..=4499 => code.to_string(),
        _ => "other".to_owned(),
    }
}
