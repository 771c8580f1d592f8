//! The terminal that we run on: the size of its window, and raw mode, which is undone whatever happens.

use std::{
    io::{self, IsTerminal as _},
    os::fd::{AsFd as _, OwnedFd},
};

use oc_proto::v1::TerminalSize;
use rustix::termios::{self, OptionalActions, Termios};

use crate::failure::Failure;

/// What the contract takes, cells each way.
const MOST_CELLS: u16 = 4096;

/// Whether our standard input is a terminal.
pub fn is_input() -> bool {
    io::stdin().is_terminal()
}

/// The size of our window, if there is one.
pub fn size() -> Option<TerminalSize> {
    let size = [
        termios::tcgetwinsize(io::stdout()),
        termios::tcgetwinsize(io::stdin()),
        termios::tcgetwinsize(io::stderr()),
    ]
    .into_iter()
    .find_map(Result::ok)?;
    // A terminal that was never told its size says 0.
    let cells = |count: u16| (count > 0).then_some(u32::from(count.min(MOST_CELLS)));
    Some(TerminalSize { cols: cells(size.ws_col)?, rows: cells(size.ws_row)? })
}

/// The terminal of our standard input passes every key on and does nothing of its own, until this is dropped.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Begins it.
    pub fn enter() -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::local("cannot set the terminal to raw mode", error);
        let terminal = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        let before = termios::tcgetattr(&terminal).map_err(|error| failed(error.into()))?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&terminal, OptionalActions::Now, &raw).map_err(|error| failed(error.into()))?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Without waiting for output to drain: a terminal that is stopped, or gone, would hold us for ever. One that is
        // gone cannot be set, and need not be.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}
