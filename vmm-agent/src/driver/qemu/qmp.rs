//! QEMU's control protocol: one JSON object a line (docs/interop/qmp-spec.rst in QEMU's source).
//!
//! The crates that speak it bring all of QEMU's types; seven commands with small answers need a line codec and an ID.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::{net::UnixStream, sync::Mutex, time::timeout};
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use crate::driver::{
    home::{CONTROL, Home},
    vmm::VmmError,
};

/// Longer lines come from no QEMU that does what it should.
const MAX_LINE: usize = 64 << 10;
/// The program is loaded and its machine built before it greets: 30 to 100 ms at rest (measured).
const GREETS_WITHIN: Duration = Duration::from_secs(20);
/// Every command that we use is done in milliseconds.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// A connection to a QEMU's monitor. Calls wait for each other; one that is dropped is answered to nobody.
#[derive(Debug)]
pub struct Qmp {
    io: Mutex<Framed<UnixStream, LinesCodec>>,
    calls: AtomicU64,
}

impl Qmp {
    /// Connects to the monitor in `home` and readies it for commands.
    ///
    /// # Errors
    ///
    /// [`VmmError`] if nobody listens, or does not greet in time.
    pub async fn connect(home: &Home) -> Result<Self, VmmError> {
        let stream = home.connect(CONTROL).await.map_err(VmmError::Lost)?;
        let mut io = Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE));
        match timeout(GREETS_WITHIN, receive(&mut io)).await {
            Ok(Ok(greeting)) if greeting.get("QMP").is_some() => {}
            Ok(Ok(other)) => return Err(VmmError::Lost(io::Error::other(format!("it greets with {other}")))),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(VmmError::Late { command: "the greeting", within: GREETS_WITHIN }),
        }
        let qmp = Self { io: Mutex::new(io), calls: AtomicU64::new(0) };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Tells QEMU to do `command`, and returns its answer.
    ///
    /// # Errors
    ///
    /// [`VmmError`] if it refuses, is gone or does not answer in time.
    pub async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, VmmError> {
        let call = self.call(command, arguments);
        match timeout(ANSWERS_WITHIN, call).await {
            Ok(answer) => answer,
            Err(_) => Err(VmmError::Late { command, within: ANSWERS_WITHIN }),
        }
    }

    async fn call(&self, command: &'static str, arguments: Value) -> Result<Value, VmmError> {
        let mut io = self.io.lock().await;
        let id = self.calls.fetch_add(1, Ordering::Relaxed);
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        io.send(request.to_string()).await.map_err(lost)?;
        loop {
            let mut answer = receive(&mut io).await?;
            // Events have no ID, and answers to calls that were dropped have another.
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let message =
                    error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
                return Err(VmmError::Refused { command, message });
            }
            return Ok(answer.get_mut("return").map(Value::take).unwrap_or_default());
        }
    }
}

async fn receive(io: &mut Framed<UnixStream, LinesCodec>) -> Result<Value, VmmError> {
    let line =
        io.next().await.ok_or_else(|| VmmError::Lost(io::ErrorKind::UnexpectedEof.into()))?.map_err(lost)?;
    serde_json::from_str(&line).map_err(|error| VmmError::Lost(error.into()))
}

fn lost(error: LinesCodecError) -> VmmError {
    VmmError::Lost(match error {
        LinesCodecError::Io(error) => error,
        LinesCodecError::MaxLineLengthExceeded => io::Error::other("it sends a line without end"),
    })
}
