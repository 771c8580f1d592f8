//! What clients have sent for a session's standard input, until its process reads it: a bounded queue. What is in it is
//! with the session, whatever happens to the client.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use prost::bytes::{Buf as _, Bytes};
use tokio::{io::AsyncWriteExt as _, net::unix::pipe, sync::Notify};

use super::terminal::Terminal;

/// What waits at most, bytes. More is taken as long as it is less than this, so that no message is ever cut.
const CAPACITY: usize = 256 << 10;
/// What a terminal takes as the end of a file (termios(3), `VEOF`).
const END_OF_FILE: &[u8] = &[4];

/// The queue.
#[derive(Debug, Default)]
pub struct Stdin {
    state: Mutex<State>,
    /// Something was put in.
    filled: Notify,
    /// Something was taken out.
    emptied: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Bytes>,
    bytes: usize,
    /// Whether nothing follows what waits.
    has_ended: bool,
    /// Whether nobody reads it any more.
    is_closed: bool,
}

/// Nobody reads it any more, or its end was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl Stdin {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-changed by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room.
    ///
    /// # Errors
    ///
    /// [`Closed`].
    pub async fn room(&self) -> Result<(), Closed> {
        loop {
            let mut emptied = std::pin::pin!(self.emptied.notified());
            emptied.as_mut().enable();
            {
                let state = self.lock();
                if state.is_closed || state.has_ended {
                    return Err(Closed);
                }
                if state.bytes < CAPACITY {
                    return Ok(());
                }
            }
            emptied.await;
        }
    }

    /// Puts bytes in.
    pub fn put(&self, bytes: Bytes) {
        let mut state = self.lock();
        if !bytes.is_empty() && !state.is_closed && !state.has_ended {
            state.bytes += bytes.len();
            state.waiting.push_back(bytes);
            self.filled.notify_one();
        }
    }

    /// Nothing follows.
    pub fn end(&self) {
        self.lock().has_ended = true;
        self.filled.notify_one();
        self.emptied.notify_waiters();
    }

    /// Nobody reads it any more.
    pub fn close(&self) {
        let mut state = self.lock();
        *state = State { is_closed: true, ..State::default() };
        self.filled.notify_one();
        self.emptied.notify_waiters();
    }

    /// The next bytes, which stay until they are taken; `None` at the end.
    async fn next(&self) -> Option<Bytes> {
        loop {
            {
                let state = self.lock();
                if let Some(first) = state.waiting.front() {
                    return Some(first.clone());
                }
                if state.has_ended || state.is_closed {
                    return None;
                }
            }
            // One reader only: what is told between is not lost.
            self.filled.notified().await;
        }
    }

    /// Takes out what was written of the next bytes.
    fn take(&self, written: usize) {
        let mut state = self.lock();
        let Some(first) = state.waiting.front_mut() else { return };
        first.advance(written.min(first.len()));
        if first.is_empty() {
            state.waiting.pop_front();
        }
        state.bytes = state.bytes.saturating_sub(written);
        drop(state);
        self.emptied.notify_waiters();
    }

    /// Writes all of it into a pipe, until the end or until nobody reads it.
    pub async fn feed_pipe(&self, mut pipe: pipe::Sender) {
        while let Some(bytes) = self.next().await {
            match pipe.write(&bytes).await {
                Ok(written) => self.take(written),
                Err(_) => break,
            }
        }
        drop(pipe);
        self.close();
    }

    /// Types all of it on a terminal.
    pub async fn feed_terminal(&self, terminal: &Terminal) {
        while let Some(bytes) = self.next().await {
            match terminal.write(&bytes).await {
                Ok(written) => self.take(written),
                Err(_) => return self.close(),
            }
        }
        let _ = terminal.write(END_OF_FILE).await;
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn all_comes_in_order_however_slowly_it_is_read() {
        let stdin = Arc::new(Stdin::default());
        let (writer, mut reader) = pipe::pipe().unwrap();
        let feeder = {
            let stdin = Arc::clone(&stdin);
            tokio::spawn(async move { stdin.feed_pipe(writer).await })
        };
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
        let client = {
            let (stdin, sent) = (Arc::clone(&stdin), sent.clone());
            tokio::spawn(async move {
                for piece in sent.chunks(50_000) {
                    stdin.room().await.unwrap();
                    assert!(stdin.lock().bytes < CAPACITY);
                    stdin.put(Bytes::copy_from_slice(piece));
                }
                stdin.end();
            })
        };
        let mut read = Vec::new();
        reader.read_to_end(&mut read).await.unwrap();
        client.await.unwrap();
        feeder.await.unwrap();
        assert!(read == sent);
        assert_eq!(stdin.room().await, Err(Closed));
    }

    #[tokio::test]
    async fn who_waits_is_told_that_nobody_reads() {
        let stdin = Arc::new(Stdin::default());
        let (writer, reader) = pipe::pipe().unwrap();
        for _ in 0..20 {
            stdin.put(vec![0; 64 << 10].into());
        }
        let feeder = {
            let stdin = Arc::clone(&stdin);
            tokio::spawn(async move { stdin.feed_pipe(writer).await })
        };
        let waiter = {
            let stdin = Arc::clone(&stdin);
            tokio::spawn(async move { stdin.room().await })
        };
        tokio::task::yield_now().await;
        drop(reader);
        assert_eq!(waiter.await.unwrap(), Err(Closed));
        feeder.await.unwrap();
        assert_eq!(stdin.lock().bytes, 0);
    }
}
