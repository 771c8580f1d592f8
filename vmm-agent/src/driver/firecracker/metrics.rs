//! What a Firecracker counts, added to what the agent counts.
//!
//! It writes a line of JSON once a minute, with what has been added since the line before (docs/metrics.md). The line comes
//! through a FIFO: a VM must not fill the host's disk with it.

use std::{io, os::fd::OwnedFd};

use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::{
    net::unix::pipe,
    task::{AbortHandle, spawn},
};
use tokio_util::codec::{FramedRead, LinesCodec};
use tracing::{debug, warn};

use crate::telemetry;

/// Bytes of a line: about 10 KiB (measured).
const MAX_LINE: usize = 128 << 10;
/// What is taken over: Firecracker's group and name.
const TAKEN: [(&str, &str); 12] = [
    ("block", "read_bytes"),
    ("block", "write_bytes"),
    ("block", "rate_limiter_throttled_events"),
    ("block", "io_engine_throttled_events"),
    ("net", "rx_bytes_count"),
    ("net", "tx_bytes_count"),
    ("net", "tx_spoofed_mac_count"),
    ("net", "tap_write_fails"),
    ("vsock", "rx_bytes_count"),
    ("vsock", "tx_bytes_count"),
    ("vcpu", "failures"),
    ("seccomp", "num_faults"),
];

/// Reads what one VMM counts until it is dropped.
#[derive(Debug)]
pub struct Reader(AbortHandle);

impl Reader {
    /// Reads from `fifo`, opened for reading and writing so that it never ends.
    ///
    /// # Errors
    ///
    /// If it is no FIFO.
    pub fn open(fifo: OwnedFd, vm: &str) -> io::Result<Self> {
        let lines =
            FramedRead::new(pipe::Receiver::from_owned_fd(fifo)?, LinesCodec::new_with_max_length(MAX_LINE));
        Ok(Self(spawn(read(lines, vm.to_owned())).abort_handle()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn read(mut lines: FramedRead<pipe::Receiver, LinesCodec>, vm: String) {
    while let Some(line) = lines.next().await {
        match line {
            Ok(line) => {
                for (name, added) in taken(&line) {
                    telemetry::firecracker(&name, added);
                    if name == "seccomp.num_faults" {
                        warn!(vm, added, "a VMM has tried what it is not permitted");
                    }
                }
            }
            Err(error) => {
                debug!(vm, %error, "what a VMM counts cannot be read");
                return;
            }
        }
    }
}

/// What of a line is taken over and is not zero.
fn taken(line: &str) -> Vec<(String, u64)> {
    let Ok(counted) = serde_json::from_str::<Value>(line) else { return Vec::new() };
    let number = |(group, name): &(&str, &str)| {
        let added = counted.get(group)?.get(name)?.as_u64().filter(|added| *added > 0)?;
        Some((format!("{group}.{name}"), added))
    };
    TAKEN.iter().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_line_what_is_known_is_taken() {
        let line = r#"{"utc_timestamp_ms":1,"block":{"read_bytes":7,"write_bytes":0},"seccomp":{"num_faults":2},"x":{}}"#;
        assert_eq!(taken(line), [("block.read_bytes".to_owned(), 7), ("seccomp.num_faults".to_owned(), 2)]);
        for nothing in ["", "{", "[]", r#"{"block":3}"#, r#"{"block":{"read_bytes":-1}}"#] {
            assert_eq!(taken(nothing), [], "{nothing}");
        }
    }
}
