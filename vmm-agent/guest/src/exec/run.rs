//! `Run`: one command, from its start to its last byte.

use std::time::Duration;

use oc_proto::v1::RunResponse;
use prost::bytes::Bytes;
use tokio::{
    io::AsyncWriteExt as _,
    net::unix::pipe,
    time::{sleep, timeout},
};

use super::output::Tail;
use crate::children::Process;

/// After a command has ended, what it left running may hold its pipes open; it is not waited for longer.
const LINGER: Duration = Duration::from_millis(200);

/// A command that runs, and our ends of its pipes.
#[derive(Debug)]
pub struct Running {
    /// The process. Dropped if the caller goes away: it is ended then.
    pub process: Process,
    /// `None` where there is nothing to write.
    pub stdin: Option<pipe::Sender>,
    /// What it writes to standard output.
    pub stdout: pipe::Receiver,
    /// What it writes to standard error.
    pub stderr: pipe::Receiver,
}

impl Running {
    /// Feeds it `stdin` and waits for its end, or ends it when its time is over.
    pub async fn finish(self, stdin: Bytes, time_limit: Option<Duration>) -> RunResponse {
        let Self { mut process, stdin: writer, stdout, stderr } = self;
        let (mut out, mut err) = (Tail::new(), Tail::new());
        let (exit_code, timed_out) = {
            let mut reading = std::pin::pin!(async {
                tokio::join!(out.read_all(stdout), err.read_all(stderr), feed(writer, &stdin));
            });
            let limit = async {
                match time_limit {
                    Some(limit) => sleep(limit).await,
                    None => std::future::pending().await,
                }
            };
            let mut limit = std::pin::pin!(limit);
            let mut drained = false;
            let ended = loop {
                tokio::select! {
                    code = process.exit() => break Some(code),
                    () = &mut reading, if !drained => drained = true,
                    () = &mut limit => break None,
                }
            };
            if ended.is_none() {
                process.kill_group();
                process.exit().await;
            }
            if !drained {
                // What does not come now is held by a process that the command left behind.
                let _ = timeout(LINGER, reading).await;
            }
            (ended.unwrap_or(-1), ended.is_none())
        };
        if timed_out {
            let seconds = time_limit.unwrap_or_default().as_secs();
            err.add_line(&format!("oc: killed after the timeout of {seconds} s"));
        }
        RunResponse {
            exit_code,
            truncated: out.is_truncated() || err.is_truncated(),
            stdout_bytes: out.total(),
            stderr_bytes: err.total(),
            stdout: out.into_bytes(),
            stderr: err.into_bytes(),
            timed_out,
        }
    }
}

/// Writes all of the input. A command need not read it.
async fn feed(writer: Option<pipe::Sender>, stdin: &[u8]) {
    if let Some(mut writer) = writer {
        let _ = writer.write_all(stdin).await;
    }
}
