//! Signals that a command decides about itself. All others that end a process end this one.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// Exit code of a command that Ctrl-C ended, as shells have it: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// What has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// Ctrl-C.
    Interrupt,
    /// What asks us to end: the signal's number.
    End(u8),
    /// The window has another size.
    Resize,
}

/// The signals that come from now on.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    quit: Signal,
    window: Signal,
}

impl Signals {
    /// Listens.
    pub fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::local("cannot listen for signals", error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            quit: listen(SignalKind::quit())?,
            window: listen(SignalKind::window_change())?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) -> Arrived {
        tokio::select! {
            _ = self.interrupt.recv() => Arrived::Interrupt,
            _ = self.terminate.recv() => Arrived::End(15),
            _ = self.hang_up.recv() => Arrived::End(1),
            _ = self.quit.recv() => Arrived::End(3),
            _ = self.window.recv() => Arrived::Resize,
        }
    }

    /// The next one that asks us to end: the exit code that says so.
    pub async fn ending(&mut self) -> u8 {
        loop {
            match self.next().await {
                Arrived::Interrupt => return INTERRUPTED,
                Arrived::End(signal) => return 128 + signal,
                Arrived::Resize => {}
            }
        }
    }
}

/// Runs `command` until Ctrl-C. Dropping it undoes what it had half done: temporary files, open streams.
pub async fn until_interrupted(command: impl Future<Output = Result<u8, Failure>>) -> Result<u8, Failure> {
    tokio::select! {
        result = command => result,
        _ = tokio::signal::ctrl_c() => Ok(INTERRUPTED),
    }
}
