//! Firecracker's API: HTTP/1.1 with JSON bodies on a Unix socket (src/firecracker/swagger/firecracker.yaml).

use std::{io, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::time::timeout;

use super::jail::{API, Jail};
use crate::driver::vmm::VmmError;

/// Every call but for a snapshot is done in milliseconds, on a host that is not busy.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);
/// A snapshot may be of many GiB that a disk has to take.
const SAVES_WITHIN: Duration = Duration::from_secs(300);
/// Bytes of an answer: nothing that we ask for is longer.
const MAX_ANSWER: usize = 64 << 10;
/// Characters of a reason that are passed on.
const MAX_REASON: usize = 512;

/// A call: what it is, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    method: &'static str,
    path: &'static str,
    within: Duration,
    /// For messages.
    name: &'static str,
}

macro_rules! call {
    ($method:literal, $path:literal) => {
        call!($method, $path, ANSWERS_WITHIN)
    };
    ($method:literal, $path:literal, $within:expr) => {
        Call { method: $method, path: $path, within: $within, name: concat!($method, " ", $path) }
    };
}

/// What it is and how it fares.
pub const STATE: Call = call!("GET", "/");
/// What its machine is.
pub const MACHINE: Call = call!("GET", "/machine-config");
/// CPUs and memory.
pub const SET_MACHINE: Call = call!("PUT", "/machine-config");
/// Kernel, initramfs, command line.
pub const SET_BOOT_SOURCE: Call = call!("PUT", "/boot-source");
/// The read-only disk.
pub const ADD_BASE: Call = call!("PUT", "/drives/base");
/// The writable disk.
pub const ADD_LAYER: Call = call!("PUT", "/drives/layer");
/// The writable disk is another, or of another size.
pub const CHANGE_LAYER: Call = call!("PATCH", "/drives/layer");
/// The network.
pub const ADD_NETWORK: Call = call!("PUT", "/network-interfaces/network");
/// The way to the guest.
pub const ADD_VSOCK: Call = call!("PUT", "/vsock");
/// Entropy.
pub const ADD_ENTROPY: Call = call!("PUT", "/entropy");
/// The balloon.
pub const ADD_BALLOON: Call = call!("PUT", "/balloon");
/// Starts the guest.
pub const ACT: Call = call!("PUT", "/actions");
/// Pauses it, or lets it go on.
pub const CHANGE_STATE: Call = call!("PATCH", "/vm");
/// Takes its state down.
pub const SAVE: Call = call!("PUT", "/snapshot/create", SAVES_WITHIN);
/// Takes a state on.
pub const LOAD: Call = call!("PUT", "/snapshot/load");

/// The API of one VMM. Each call has a connection of its own: so nothing is left of one that was given up, and nothing has
/// to be known of one that an earlier agent made.
#[derive(Clone, Debug)]
pub struct Api {
    jail: Jail,
}

impl Api {
    /// Of the VMM in `jail`.
    pub fn of(jail: Jail) -> Self {
        Self { jail }
    }

    /// Makes a call with `body`, if it has one. Returns the answer, if there is one.
    ///
    /// # Errors
    ///
    /// [`VmmError::Lost`] if nobody answers, [`VmmError::Late`] if not in time, [`VmmError::Refused`] with the reason.
    pub async fn call(&self, call: Call, body: Option<&Value>) -> Result<Value, VmmError> {
        let answered = timeout(call.within, self.exchange(call, body)).await;
        let (status, answer) = match answered {
            Ok(answered) => answered.map_err(VmmError::Lost)?,
            Err(_) => return Err(VmmError::Late { command: call.name, within: call.within }),
        };
        let value = serde_json::from_slice(&answer).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(value);
        }
        let reason = value.get("fault_message").and_then(Value::as_str).unwrap_or("no reason given");
        let message = format!("{status}: {}", reason.chars().take(MAX_REASON).collect::<String>());
        Err(VmmError::Refused { command: call.name, message })
    }

    async fn exchange(&self, call: Call, body: Option<&Value>) -> io::Result<(StatusCode, Bytes)> {
        let stream = self.jail.connect(API).await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(Method::from_bytes(call.method.as_bytes()).map_err(io::Error::other)?)
            .uri(call.path)
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(io::Error::other)?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(io::Error::other)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok((status, body.map_err(io::Error::other)?.to_bytes()))
        };
        // The connection is driven as long as its answer is waited for, and ends with it.
        tokio::select! {
            answer = answer => answer,
            Err(error) = connection => Err(io::Error::other(error)),
        }
    }
}
