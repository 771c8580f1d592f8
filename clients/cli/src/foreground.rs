//! A session in the foreground: its output is ours, our input is its own, and so are Ctrl-C, the size of our window, and in
//! the end our exit code.

pub mod keys;

use std::time::Duration;

use oc_proto::v1::{ExecExit, KillExecRequest};
use tokio::{fs::File, io::AsyncReadExt as _, time::timeout};

use crate::{
    attachment::{Attachment, End},
    connection::{Connection, within},
    console::Console,
    failure::Failure,
    foreground::keys::DetachKeys,
    output,
    signals::{Arrived, INTERRUPTED, Signals},
    standard,
    terminal::{self, RawMode},
};

/// Exit code after the timeout, as `timeout(1)` has it.
pub const TIMED_OUT: u8 = 124;

/// Input that is read at once.
const CHUNK: usize = 64 << 10;
/// For the mesh to hear that we go.
const FAREWELL: Duration = Duration::from_secs(2);
/// For a last signal to a session that we leave.
const LAST_WORD: Duration = Duration::from_secs(5);
/// What ends the input on a terminal.
const END_OF_FILE: u8 = 0x04;

const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGKILL: i32 = 9;
const SIGPIPE: i32 = 13;

/// What a session gets of our standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Nothing.
    Nothing,
    /// All bytes up to its end.
    Bytes,
    /// Every key: our terminal is in raw mode.
    Keys,
}

/// What becomes of the session if we end before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bond {
    /// It gets the signals that we get, and ends with us.
    Ours,
    /// It goes on.
    Free,
}

/// A session that is to be in the foreground.
#[derive(Debug)]
pub struct Foreground<'a> {
    /// The mesh.
    pub connection: &'a Connection,
    /// The sandbox.
    pub sandbox_id: &'a str,
    /// The session.
    pub session_id: &'a str,
    /// Whether it runs on a terminal.
    pub has_terminal: bool,
    /// The first byte of output that is wanted.
    pub offset: u64,
    /// What it gets.
    pub input: Input,
    /// What becomes of it.
    pub bond: Bond,
    /// How the user comes back to it.
    pub way_back: String,
}

/// Why we leave a session that has not ended.
enum Leaves {
    /// The user wants to.
    Detached,
    /// The terminal is gone.
    HungUp,
    /// Ctrl-C, and the session is to die of it.
    Interrupted,
    /// A signal asks us to.
    Ended(u8),
}

impl Foreground<'_> {
    /// Stays with the session until it ends, and says with which exit code we end.
    pub async fn run(self, signals: &mut Signals) -> Result<u8, Failure> {
        let attachment = Attachment::new(self.connection, self.sandbox_id, self.session_id, self.offset)?;
        let ended = self.attend(&attachment, signals).await;
        // The terminal is as it was: from here on lines are lines.
        match ended {
            Ok(Ok(exit)) => Ok(exit_code(exit)),
            Ok(Err(Leaves::Detached)) => {
                output::note(format_args!("oc: the session goes on: come back with `{}`", self.way_back));
                Ok(0)
            }
            Ok(Err(Leaves::HungUp)) => {
                self.pass_on(SIGHUP).await;
                Ok(128 + u8::try_from(SIGHUP).unwrap_or(0))
            }
            Ok(Err(Leaves::Interrupted)) => {
                self.kill(SIGKILL).await;
                Ok(INTERRUPTED)
            }
            Ok(Err(Leaves::Ended(signal))) => {
                self.pass_on(i32::from(signal)).await;
                Ok(128 + signal)
            }
            Err(failure) => Err(self.explained(failure, attachment.offset()).await),
        }
    }

    /// Everything that goes on at the same time. The terminal is in raw mode meanwhile, if that is wanted.
    async fn attend(
        &self,
        attachment: &Attachment,
        signals: &mut Signals,
    ) -> Result<Result<ExecExit, Leaves>, Failure> {
        let is_raw = self.input == Input::Keys;
        let _raw = if is_raw { Some(RawMode::enter()?) } else { None };
        let mut console = Console::new(is_raw)?;
        self.tell_size(attachment);
        let mut followed = std::pin::pin!(attachment.follow(&mut console));
        let leaves = tokio::select! {
            end = &mut followed => match end? {
                End::Exited(exit) => return Ok(Ok(exit)),
                End::Detached => Leaves::Detached,
            },
            leaves = self.feed(attachment) => leaves?,
            leaves = self.heed(attachment, signals) => leaves,
        };
        if matches!(leaves, Leaves::Detached) || self.bond == Bond::Free {
            // Said, so that the session does not wait for us to come back. It may have ended in the meantime.
            attachment.detach();
            if let Ok(Ok(End::Exited(exit))) = timeout(FAREWELL, followed).await {
                return Ok(Ok(exit));
            }
        }
        Ok(Err(leaves))
    }

    /// Brings our standard input to the session.
    async fn feed(&self, attachment: &Attachment) -> Result<Leaves, Failure> {
        if self.input == Input::Nothing {
            return std::future::pending().await;
        }
        let mut source = standard::input()?;
        let mut keys = DetachKeys::default();
        let mut buffer = vec![0; CHUNK];
        loop {
            let room = attachment.room().await.min(CHUNK);
            let typed = match self.read(&mut source, &mut buffer[..room]).await? {
                // Whoever sat at the terminal has gone.
                0 if self.input == Input::Keys => return Ok(Leaves::HungUp),
                0 => break,
                count => &buffer[..count],
            };
            if self.input == Input::Bytes {
                attachment.send(typed);
                continue;
            }
            let typed = keys.take(typed);
            attachment.send(&typed.bytes);
            if typed.detaches {
                return Ok(Leaves::Detached);
            }
        }
        if self.has_terminal {
            // Counted like every other byte, and so never said twice.
            attachment.send(&[END_OF_FILE]);
        } else {
            attachment.end_input();
        }
        std::future::pending().await
    }

    async fn read(&self, source: &mut File, buffer: &mut [u8]) -> Result<usize, Failure> {
        match source.read(buffer).await {
            Err(_) if self.input == Input::Keys => Ok(0),
            count => count.map_err(|error| Failure::local("cannot read standard input", error)),
        }
    }

    /// Heeds signals until one of them says that we leave.
    async fn heed(&self, attachment: &Attachment, signals: &mut Signals) -> Leaves {
        let mut is_interrupted = false;
        loop {
            match signals.next().await {
                Arrived::Interrupt if self.bond == Bond::Free => {
                    return Leaves::Ended(u8::try_from(SIGINT).unwrap_or(0));
                }
                Arrived::Interrupt if is_interrupted => return Leaves::Interrupted,
                Arrived::Interrupt => {
                    is_interrupted = true;
                    attachment.signal(SIGINT);
                }
                Arrived::End(signal) => return Leaves::Ended(signal),
                Arrived::Resize => self.tell_size(attachment),
            }
        }
    }

    fn tell_size(&self, attachment: &Attachment) {
        if self.has_terminal
            && self.input == Input::Keys
            && let Some(size) = terminal::size()
        {
            attachment.resize(size);
        }
    }

    /// What ends us ends a session that is ours.
    async fn pass_on(&self, signal: i32) {
        match self.bond {
            Bond::Ours => self.kill(signal).await,
            Bond::Free => {}
        }
    }

    async fn kill(&self, signal: i32) {
        let request = KillExecRequest {
            sandbox_id: self.sandbox_id.to_owned(),
            session_id: self.session_id.to_owned(),
            signal: Some(signal),
        };
        if let Err(status) = self.connection.exec().kill_exec(within(LAST_WORD, request)).await {
            let failure = Failure::from(status);
            output::note(format_args!("oc: the session {} may go on: {failure}", self.session_id));
        }
    }

    /// What became of the session, where that is not plain from the failure.
    async fn explained(&self, failure: Failure, offset: u64) -> Failure {
        if failure.has_reason("INTERRUPTED") {
            return Failure::Interrupted(format!(
                "{} hibernated; the session goes on when it wakes: `{} --offset {offset}`",
                self.sandbox_id, self.way_back
            ));
        }
        if failure.is_passing() {
            let way_back = &self.way_back;
            output::note(format_args!("oc: the session may go on: `{way_back} --offset {offset}`"));
        }
        match failure {
            // As a program that runs here and whose reader is gone.
            Failure::OutputClosed => self.pass_on(SIGPIPE).await,
            // Nobody is left to see to it.
            Failure::Local { .. } => self.pass_on(SIGHUP).await,
            _ => {}
        }
        failure
    }
}

/// The session's exit code, as far as a process can have it.
fn exit_code(exit: ExecExit) -> u8 {
    if exit.timed_out {
        output::note("oc: the timeout ended the command");
        return TIMED_OUT;
    }
    u8::try_from(exit.exit_code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_sessions_own() {
        let ended = |exit_code, timed_out| ExecExit { exit_code, timed_out, offset: 0 };
        assert_eq!(exit_code(ended(0, false)), 0);
        assert_eq!(exit_code(ended(137, false)), 137);
        assert_eq!(exit_code(ended(-1, true)), TIMED_OUT);
        assert_eq!(exit_code(ended(-1, false)), 255);
    }
}
